"""Speculative decoding: a proposer drafts, the target verifies, and the text is the target's own.

`decode` is the loop: prefill, then rounds of draft, verify and commit. It knows a proposer only by
three methods and yields one `Round` per target call; texts, statistics and figures are made from
rounds. Without a proposer it is plain autoregressive decoding. Rows of a batch advance
independently, because every row has its own columns in memory (`kvlab.slots.Slots`).

Sources: Leviathan, Kalman and Matias (2023), arXiv 2211.17192, Algorithm 1 and section 3; Chen et
al. (2023), arXiv 2302.01318, Algorithm 2; Sun et al. (2024), arXiv 2403.10444, Algorithm 2. Names:
gamma drafted tokens, draft distribution q, target distribution p.
"""

import itertools
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import logits_process

from kvlab.cache import Prefix, length, prefill
from kvlab.generation import (
    Ending,
    Stop,
    process,
    processors_of,
    require_masks,
    tokens_left,
    widened,
)
from kvlab.models import first_layers, require_supported
from kvlab.ragged import is_ragged
from kvlab.slots import Slots, step
from kvlab.vocabularies import shared_tokens

Acceptance = float | Sequence[float]  # of all positions, or by position
Fuse = Callable[[Prefix, Prefix], DynamicCache]  # as `kvlab.fuse.Fuser`
VerifyCost = float | Callable[[int], float]  # v of the cost model, or a function of gamma
Texts = list[list[int]]  # token ids per row
Prompts = Tensor | Sequence[Tensor]  # (B, T), or rows (T,) of any lengths
Prefixes = Prefix | Sequence[Prefix | None] | None  # one for all rows, or one per row
Lists = tuple[Texts, list[int], Texts]  # of a round: drafted, accepted, tokens
NO_GUESS = -1  # a drafted token, in rows that have fewer guesses than others
FINISHED = -1  # instead of the number of accepted tokens, for a row whose text has ended
MAXIMUM_GAMMA = 16


class Proposal(NamedTuple):
    """Drafted tokens (B, g) and the distributions (B, g, V) of the sampling (None: certain)."""

    tokens: Tensor
    probabilities: Tensor | None = None


Verify = Callable[[Tensor, Proposal, Tensor], tuple[Tensor, Tensor]]  # as `verify`


@dataclass(frozen=True)
class Round:
    """One target call. Lists have one entry per row; of a row that had ended it is empty, or 0.

    Args:
        drafted: The drafted tokens.
        accepted: The number of drafted tokens that the target accepted.
        tokens: The new tokens: those accepted and one of the target's own, up to the end of the
            text. So `accepted` can be larger than their number.
        draft_seconds: Of the proposer.
        target_seconds: Of the target's call and the verification.
        seconds: Of the whole round, both others included, by the wall clock.
        is_prefill: The prompt was read, by the target (it gives the first token) or after it by the
            proposer.
    """

    drafted: Texts
    accepted: list[int]
    tokens: Texts
    draft_seconds: float
    target_seconds: float
    seconds: float
    is_prefill: bool = False


class Proposer(Protocol):
    """A source of drafts. It may read `target_cache`, the target's memory, but not change it."""

    def start(self, texts: Texts, target_cache: Slots, sampling: "Sampling", room: int) -> None:
        """Begin with texts (prefix, prompt, first token).

        The loop extends these same lists, by less than `room` tokens each, before `accept`.
        """

    def propose(self, gamma: int) -> Proposal:
        """Draft up to `gamma` tokens per row. It is not called in a round without a draft."""

    def accept(self, accepted: list[int], target_cache: Slots) -> None:
        """Each text has gained this number of drafted tokens and one more, or is FINISHED."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, by the logits processors of transformers, in its order.

    What a model's generation config says about sampling is not used. Whatever else it says about
    tokens (no_repeat_ngram_size, suppress_tokens, sequence_bias and so on) is applied, too.

    Args:
        temperature: 0 takes the most probable token (greedy), else tokens are sampled.
        top_k: Sample among the k most probable tokens; 0 keeps all.
        top_p: Sample among the most probable tokens that together reach this probability; 1.0 keeps
            all.
        min_p: Sample among tokens at least this many times as probable as the most probable one.
        repetition_penalty: Above 1.0 makes tokens of the context less probable.
        min_new_tokens: No end token comes before; 0: as in the model's generation config.
        logits_processor: More processors, such as a `LogitsProcessorList`, applied before the
            temperature to target and draft. They see texts with guesses, so they must depend on
            their arguments alone.
        generator: One for all rows, or a list with one per row: then a row's text does not depend
            on the other rows.

    Example:
        >>> Sampling(0.7, top_p=0.9).greedy, Sampling().greedy
        (False, True)
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    logits_processor: Sequence[LogitsProcessor] = ()
    generator: torch.Generator | Sequence[torch.Generator] | None = None

    def __post_init__(self):
        fits = self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1
        fits = fits and self.repetition_penalty > 0 and self.min_new_tokens >= 0
        if not fits or not (self.temperature == 0 or 1e-6 <= self.temperature < float("inf")):
            limits = "temperature 0 or >= 1e-6, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, "
            limits += "repetition_penalty > 0, min_new_tokens >= 0"
            raise ValueError(f"{self}, expected {limits}.")

    vocab_size = None  # that processors are made for, if it may be another than that of logits

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0

    def processors(self, rows: int) -> Sequence[LogitsProcessorList]:
        """The processors of each row that look at its text."""
        penalty = float(self.repetition_penalty)
        penalize = [logits_process.RepetitionPenaltyLogitsProcessor(penalty)] * (penalty != 1)
        return [LogitsProcessorList([*penalize, *self.logits_processor])] * rows

    def contexts(self, texts: Texts, drafted: Sequence[Tensor]) -> Texts:
        """Texts with drafted tokens, (B,) per position; only for processors: a GPU must wait."""
        if not len(drafted) or not any(self.processors(len(texts))):
            return texts
        tokens = torch.stack(tuple(drafted), 1).clamp(min=0).tolist()
        return [text + new for text, new in zip(texts, tokens, strict=True)]

    def scores(self, logits: Tensor, texts: Texts) -> Tensor:
        """Processed logits, in float32 or wider.

        Args:
            logits: (B, k, V). The last of the k follows texts[b], the others its beginning.
            texts: Token ids per row, which processors look at.
        """
        scores = widened(logits)
        processors = self.processors(len(texts))
        if any(processors):
            scores = process(scores, texts, processors, self.vocab_size)
        if self.greedy:
            return scores
        scores = scores.flatten(0, 1) / self.temperature
        if self.top_k:
            scores = logits_process.TopKLogitsWarper(self.top_k)(None, scores)
        if self.top_p < 1:
            scores = logits_process.TopPLogitsWarper(self.top_p)(None, scores)
        if self.min_p:
            scores = logits_process.MinPLogitsWarper(self.min_p)(None, scores)
        return scores.reshape(logits.shape)

    def uniform(self, rows: int, count: int, device: torch.device) -> Tensor:
        """Independent numbers in [0, 1), (rows, count)."""
        if not isinstance(self.generator, list | tuple):
            return _uniform(rows, count, self.generator).to(device)
        _require_rows("generators", self.generator, rows)
        return torch.cat([_uniform(1, count, one) for one in self.generator]).to(device)

    def choose(self, logits: Tensor, texts: Texts) -> tuple[Tensor, Tensor | None]:
        """Choose tokens (B,) by logits (B, 1, V); with their distributions (B, V), if sampled."""
        scores = self.scores(logits, texts)[:, 0]
        if self.greedy:
            return scores.argmax(-1), None
        probabilities = scores.softmax(-1)
        uniform = self.uniform(len(logits), 1, logits.device)[:, 0]
        return sample_categorical(probabilities, uniform), probabilities


@dataclass(frozen=True)
class RowSampling(Sampling):
    """Sampling with the processors of each row, made for its prompt and for the target."""

    row_processors: Sequence[LogitsProcessorList] = ()
    vocab_size: int | None = None

    @classmethod
    def of(
        cls, sampling: Sampling, model: PreTrainedModel, texts: Texts, ending: Ending, left: list
    ) -> "RowSampling":
        """Make the processors of texts (prefix, prompt), which may gain left[b] tokens."""
        options = {
            "min_new_tokens": sampling.min_new_tokens,
            "repetition_penalty": sampling.repetition_penalty,
            "logits_processor": sampling.logits_processor,
        }
        rows = []
        for text, count in zip(texts, left, strict=True):
            rows.append(processors_of(model, text, ending, count, **options))
        vocab_size = model.config.get_text_config(decoder=True).vocab_size
        return cls(**vars(sampling) | {"row_processors": rows, "vocab_size": vocab_size})

    def processors(self, rows: int) -> Sequence[LogitsProcessorList]:
        return self.row_processors


def _uniform(rows: int, count: int, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator else None
    return torch.rand(rows, count, generator=generator, device=device)


def _require_rows(name: str, values: Sequence, rows: int) -> None:
    if len(values) != rows:
        counts = f"{len(values)} {name} for {rows} rows"
        raise ValueError(f"There are {counts}: give one for all, or one per row.")


def sample_categorical(weights: Tensor, uniform: Tensor) -> Tensor:
    """Sample indices (B,) in proportion to weights (B, V): invert the running sum at uniform.

    Example:
        >>> sample_categorical(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([0.5]))
        tensor([2])
    """
    exact = torch.float32 if weights.device.type == "mps" else torch.float64  # mps has no float64
    running_sum = weights.to(exact).cumsum(-1)
    threshold = uniform.to(exact)[:, None] * running_sum[:, -1:]
    return torch.searchsorted(running_sum, threshold, right=True)[:, 0]


def verify_greedy(choices: Tensor, proposal: Proposal) -> tuple[Tensor, Tensor]:
    """Accept drafted tokens (B, g) while they equal the target's choices (B, g + 1).

    Returns:
        The number accepted and the target's next token, both (B,).

    Example:
        >>> verify_greedy(torch.tensor([[4, 7, 9]]), Proposal(torch.tensor([[4, 5]])))
        (tensor([1]), tensor([7]))
    """
    gamma = proposal.tokens.shape[1]
    accepted = (choices[:, :gamma] == proposal.tokens).long().cumprod(1).sum(1)
    return accepted, choices.gather(1, accepted[:, None])[:, 0]


def verify(p: Tensor, proposal: Proposal, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Accept or resample (Leviathan et al. 2023, Algorithm 1).

    Token i is accepted if u_i < p_i(x_i) / q_i(x_i). At the first rejection, the next token is
    sampled from norm(max(0, p_i - q_i)); after all g, from p_(g+1). The result is distributed as p,
    whatever q is.

    Args:
        p: (B, g + 1, V), the target's distributions, processed as q was.
        proposal: g tokens per row, with the distributions they were really sampled from.
        uniform: (B, at least g + 1) independent numbers in [0, 1).

    Returns:
        The number accepted and the next token, both (B,).

    Example:
        >>> p = torch.tensor([[[0.2, 0.8], [0.5, 0.5]]])
        >>> proposal = Proposal(torch.tensor([[0]]), torch.tensor([[[0.9, 0.1]]]))
        >>> verify(p, proposal, torch.tensor([[0.1, 0.7]]))
        (tensor([1]), tensor([1]))
    """
    p, q, p_x, q_x = _aligned(p, proposal)
    gamma = p_x.shape[1]
    passed = uniform[:, :gamma] * q_x < p_x
    accepted = passed.long().cumprod(1).sum(1)
    rows = torch.arange(len(p), device=p.device)
    p_next, q_next = p[rows, accepted], q[rows, accepted]
    return accepted, _sample_rest(p_next, q_next, uniform[:, -1])


def verify_block(p: Tensor, proposal: Proposal, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Accept or resample a block as a whole (Sun et al. 2024, arXiv 2403.10444, Algorithm 2).

    Arguments, result and its distribution are those of `verify`, and the expected number of
    accepted tokens is never smaller: a guess that is more probable than q says lends its surplus
    to those after it. With c_0 = 1 and c_i = min(1, c_(i-1) p_i(x_i) / q_i(x_i)), and the sum A_i
    of max(0, c_i p_(i+1) - q_(i+1)), the accepted tokens are x_1 to x_i for the largest i with
    u_i < A_i / (A_i + 1 - c_i); after all g, A_g = c_g. The next token is sampled from
    norm(max(0, c_i p_(i+1) - q_(i+1))).

    Example:
        >>> p = torch.tensor([[[0.2, 0.8], [0.5, 0.5]]])
        >>> proposal = Proposal(torch.tensor([[0]]), torch.tensor([[[0.9, 0.1]]]))
        >>> verify_block(p, proposal, torch.tensor([[0.1, 0.7]]))
        (tensor([1]), tensor([1]))
    """
    p, q, p_x, q_x = _aligned(p, proposal)
    gamma = p_x.shape[1]
    ratios = (p_x / q_x).nan_to_num(0.0)  # 0 / 0: a guess that neither allows
    carries = [torch.ones_like(p[:, 0, 0])]
    for i in range(gamma):
        carries.append((carries[-1] * ratios[:, i]).clamp(max=1))
    carry = torch.stack(carries, 1)  # (B, g + 1)
    rest = (carry[..., None] * p - q).clamp(min=0).sum(-1)
    thresholds = (rest / (rest + 1 - carry)).nan_to_num(1.0)  # 0 / 0: p = q from here on
    passed = uniform[:, :gamma] < thresholds[:, 1:]
    counts = passed * torch.arange(1, gamma + 1, device=p.device)
    accepted = pad(counts, (1, 0)).amax(1)
    rows = torch.arange(len(p), device=p.device)
    p_next, q_next = carry[rows, accepted, None] * p[rows, accepted], q[rows, accepted]
    return accepted, _sample_rest(p_next, q_next, uniform[:, -1])


def _aligned(p: Tensor, proposal: Proposal) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p and q (B, g + 1, V), and those of the guesses (B, g): without a guess 0 and 1."""
    tokens, q = proposal
    gamma = tokens.shape[1]
    x = tokens.clamp(min=0)[..., None]  # (B, g, 1)
    if q is None:
        q = torch.zeros_like(p[:, :gamma]).scatter(-1, x, 1.0)
    # Vocabularies of one family can be padded to different sizes.
    size = max(p.shape[-1], q.shape[-1])
    p = pad(p, (0, size - p.shape[-1]))
    guessed = tokens != NO_GUESS
    q = pad(q * guessed[..., None], (0, size - q.shape[-1], 0, 1))  # 0 after all g
    p_x = p[:, :gamma].gather(-1, x)[..., 0] * guessed
    q_x = q[:, :gamma].gather(-1, x)[..., 0].where(guessed, 1.0)
    return p, q, p_x, q_x


def _sample_rest(p: Tensor, q: Tensor, uniform: Tensor) -> Tensor:
    """Sample from norm(max(0, p - q)), (B, V)."""
    rest = (p - q).clamp(min=0)
    rejected_by_rounding = rest.sum(-1, keepdim=True) == 0  # p = q
    return sample_categorical(torch.where(rejected_by_rounding, p, rest), uniform)


class Runner:
    """A causal LM and the memory it writes to.

    Called with tokens (B, k) and the first column of each row, it gives logits (B, k, V). With
    `compiled_room`, memory has that many columns and stays where it is, and each shape of call is
    compiled once (on a GPU into a CUDA graph): the same tokens sooner, after a minute of compiling.
    Worth it for many texts. The values of the model's weights may change afterwards, its modules
    and dtype may not. A Runner serves one stream of rounds at a time.

    Args:
        model: The causal LM.
        compiled_room: Columns per row, at least prompt + max_new_tokens + gamma + 1. Default:
            nothing is compiled, and memory is made for each text.

    Example:
        >>> from kvlab import lab
        >>> runner = Runner(lab.load("lab-draft"))
        >>> with torch.inference_mode():
        ...     logits = runner.start([[5, 6, 7]], [None], room=2)  # (1, 1536)
        ...     runner(torch.tensor([[8, 9]]), [3]).shape
        torch.Size([1, 2, 1536])
    """

    def __init__(self, model: PreTrainedModel, compiled_room: int | None = None):
        require_masks(model)
        require_supported(model)
        if compiled_room is not None and not getattr(model, "compilable", True):
            kind = "A draft with cross-attention or transitions"
            raise ValueError(f"{kind} cannot be compiled: leave compiled_room out.")
        self.model = model
        self.compiled_room = compiled_room
        self.slots: Slots | None = None
        self.streams = 0  # started so far, by which a stream knows whether memory is still its own
        self._programs = {}

    def start(self, texts: Texts, prefixes: Sequence[Prefix | None], room: int) -> Tensor:
        """Read texts, each after its prefix, with room for more; return the logits (B, V)."""
        self.streams += 1
        states = []
        prefixed = {}
        for row, (text, prefix) in enumerate(zip(texts, prefixes, strict=True)):
            # A draft may have other knowledge in each row.
            model = self.model.for_row(row) if hasattr(self.model, "for_row") else self.model
            key = (tuple(text), prefix, model)
            if key not in prefixed:  # many samples of one prompt read it once
                ids = torch.tensor([text], device=self.model.device)
                prefixed[key] = prefill(model, ids, prefix)
            states.append(prefixed[key])
        caches = [state.cache for state in states]
        columns = max(map(length, caches)) + room
        size = self.compiled_room or columns
        if columns > size:
            raise ValueError(f"compiled_room is {size}, but texts need {columns}.")
        ragged = caches if any(map(is_ragged, caches)) else ()
        if ragged and self.compiled_room:
            hint = "leave compiled_room out, or compress with one budget for every head"
            raise ValueError(f"Heads of a prefix have lengths of their own: {hint}.")
        if not self.compiled_room or self.slots is None or len(self.slots.lengths) != len(texts):
            self.slots = Slots(self.model, len(texts), size, ragged)
            if self.compiled_room:
                for layer in self.slots.layers:
                    torch._dynamo.mark_static_address(layer.keys)
                    torch._dynamo.mark_static_address(layer.values)
        for row, state in enumerate(states):
            self.slots.put(row, state.cache, state.next_position)
        return torch.cat([state.logits for state in states])

    def __call__(self, tokens: Tensor, starts: list[int]) -> Tensor:
        compiled = self.compiled_room is not None
        columns = self.slots.set_write_positions(starts, tokens.shape[1], fixed=compiled)
        if not compiled:
            return step(self.model, self.slots, tokens, columns)
        if tokens.shape not in self._programs:
            self._programs[tokens.shape] = _compiled_step(self.model.device)
        return self._programs[tokens.shape](self.model, self.slots, tokens, columns)


def _compiled_step(device: torch.device) -> Callable[..., Tensor]:
    """Compile `step` for one model and one shape, without checks before each call."""
    # For a small model these checks take as long as its layers. The compiler distinguishes programs
    # by their code, and without checks would take one for another: so each gets its own copy.
    code = step.__code__.replace()
    copied = types.FunctionType(code, step.__globals__, argdefs=step.__defaults__)
    options = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    options["triton.cudagraphs"] = device.type == "cuda"
    return torch.compile(copied, dynamic=False, options=options)


Model = PreTrainedModel | Runner


def _draft(gamma: int, read: Callable, choose: Callable) -> Proposal:
    """Choose tokens one after another.

    Args:
        gamma: Their number.
        read: From the tokens (B,) drafted before to the logits (B, 1, V) of the next.
        choose: From these logits and tokens to the next, and its distribution (None: greedy).
    """
    drafted, distributions = [], []
    for _ in range(gamma):
        token, q = choose(read(drafted), drafted)
        drafted.append(token)
        distributions.append(q)
    q = None if distributions[0] is None else torch.stack(distributions, 1)
    return Proposal(torch.stack(drafted, 1), q)


class ModelProposer:
    """A smaller causal LM with the target's tokenizer (not checked: another only guesses badly).

    It serves one stream of rounds at a time.

    Args:
        model: The draft model, or its Runner.
        prefix: Of its own (one for all rows, or a list), whose ids must begin the text and leave at
            least one token to read. Default: it reads the whole text itself, prefixes of the target
            included.
    """

    leaves = 1  # tokens that `start` leaves unread
    drafted = 0  # tokens in this round

    def __init__(self, model: Model, prefix: Prefixes = None):
        self.runner = model if isinstance(model, Runner) else Runner(model)
        self.prefix = prefix

    def start(self, texts: Texts, target_cache: Slots, sampling: Sampling, room: int) -> None:
        """Read the texts, except for their last token."""
        if self.runner.slots is target_cache:
            raise ValueError("The draft's Runner is the target's: give it a Runner of its own.")
        self.texts = texts
        self.sampling = sampling
        self.unread = []
        prefixes = _prefix_per_row(self.prefix, len(texts))
        parts = []
        for text, prefix in zip(texts, prefixes, strict=True):
            ids = list(prefix.input_ids) if prefix else []
            if text[: len(ids)] != ids or len(ids) >= len(text) - 1:
                raise ValueError("The draft's prefix must begin the text, and leave one to read.")
            self.unread.append(min(self.leaves, len(text) - len(ids) - 1))
            parts.append(self._clamped(text[len(ids) : len(text) - self.unread[-1]]))
        self.runner.start(parts, prefixes, room)

    def _clamped(self, tokens: list[int]) -> list[int]:
        """Tokens beyond the draft's vocabulary are all read as its last one."""
        last_id = self.runner.model.get_input_embeddings().num_embeddings - 1
        return [min(token, last_id) for token in tokens]

    def propose(self, gamma: int) -> Proposal:
        """Sample x_1 from q_1(text), x_2 from q_2(text, x_1), ... (Algorithm 1, lines 1 to 4)."""
        lengths = self.runner.slots.lengths

        def read(drafted: list[Tensor]) -> Tensor:
            if not drafted:
                return self._read_text()
            return self.runner(drafted[-1][:, None], [n + len(drafted) - 1 for n in lengths])

        self.drafted = gamma
        return _draft(gamma, read, self._choose)

    def _choose(self, logits: Tensor, drafted: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Choose the token (B,) after those drafted; with its distribution, if sampled."""
        return self.sampling.choose(logits, self.sampling.contexts(self.texts, drafted))

    def _read_text(self) -> Tensor:
        """Read the unread tokens of each row, and return the logits after the last (B, 1, V)."""
        slots, device = self.runner.slots, self.runner.model.device
        width = max(2 if self.runner.compiled_room else 1, *self.unread)
        rows = []
        for text, unread in zip(self.texts, self.unread, strict=True):
            # Rows with fewer read zeros after them, in columns that are written again.
            rows.append(self._clamped(text[len(text) - unread :]) + [0] * (width - unread))
        starts = [min(n, slots.room - width) for n in slots.lengths]  # of finished rows, any
        last = torch.tensor(self.unread, device=device).clamp(min=1) - 1
        logits = self.runner(torch.tensor(rows, device=device), starts)
        for row, unread in enumerate(self.unread):
            slots.lengths[row] += unread
        self.unread = [0] * len(rows)
        return logits.take_along_dim(last[:, None, None], 1)

    def accept(self, accepted: list[int], target_cache: Slots) -> None:
        """Keep accepted tokens. The last drafted is unread: after full acceptance two are left."""
        for row, n in enumerate(accepted):
            if n != FINISHED:
                read = min(n, max(self.drafted - 1, 0))
                self.runner.slots.lengths[row] += read
                self.unread[row] += n + 1 - read
        self.drafted = 0


class EarlyExitProposer(ModelProposer):
    """The first layers of the target, then its last norm and its head, in the target's memory.

    Nothing is copied and nothing is read twice: the draft needs the entries that the target's first
    layers have written. It serves one stream of rounds at a time.

    Args:
        target: The model that verifies, or its Runner.
        layers: The number of layers that draft.
    """

    def __init__(self, target: Model, layers: int):
        runner = target if isinstance(target, Runner) else Runner(target)
        super().__init__(Runner(first_layers(runner.model, layers), runner.compiled_room))
        self.layers = layers

    def start(self, texts: Texts, target_cache: Slots, sampling: Sampling, room: int) -> None:
        """Use the target's memory of the texts."""
        self.texts = texts
        self.sampling = sampling
        self.unread = [1] * len(texts)
        self.runner.slots = target_cache.first(self.layers)

    def accept(self, accepted: list[int], target_cache: Slots) -> None:
        """Go on after what the target has read: all tokens but the last."""
        self.runner.slots.lengths = list(target_cache.lengths)
        self.unread = [1] * len(self.texts)


class FusedProposer(ModelProposer):
    """A draft whose cache is fused from the target's, which helps it to guess.

    At the start and after each verification, the entries of the tokens that both models have read
    are fused, in the draft's own memory; only the newest tokens are the draft's alone (Fu et al.
    2025, arXiv 2510.03215, used in speculation). A text that the target did not read token by token
    (a compressed prefix) is fused from the first guess on.

    Args:
        model: The draft model, or its Runner.
        fuser: From the target to the draft, as `fuse.Fuser`: called with a `Prefix` of each, it
            returns the draft's cache.
        prefix: As for `ModelProposer`; it is not fused.
        prefill: Fuse the tokens before the first guess.
        decode: Fuse accepted tokens.
    """

    leaves = 2

    def __init__(
        self, model: Model, fuser: Fuse, prefix: Prefixes = None, prefill=True, decode=True
    ):
        super().__init__(model, prefix)
        self.fuser = fuser
        self.prefill = prefill
        self.decode = decode

    def start(self, texts: Texts, target_cache: Slots, sampling: Sampling, room: int) -> None:
        """Read and fuse the texts, except for their last two tokens, which are read later."""
        super().start(texts, target_cache, sampling, room)
        self.settled = []  # the tokens of each row that are fused, or will not be
        for row, prefix in enumerate(_prefix_per_row(self.prefix, len(texts))):
            self.settled.append(len(texts[row]) - self.unread[row])
            whole = target_cache.lengths[row] == len(texts[row]) - 1
            if self.prefill and whole and not target_cache.is_ragged_row(row):
                self.settled[row] = len(prefix.input_ids) if prefix else 0
                self._fuse(row, target_cache)

    def accept(self, accepted: list[int], target_cache: Slots) -> None:
        """Keep what was accepted, and fuse it."""
        super().accept(accepted, target_cache)
        for row, n in enumerate(accepted):
            if self.decode and n != FINISHED:
                self._fuse(row, target_cache)

    def _fuse(self, row: int, target_cache: Slots) -> None:
        """Fuse the entries of a row that both models have read and that are not settled."""
        slots, size = self.runner.slots, len(self.texts[row])
        read = size - self.unread[row]
        count = read - self.settled[row]
        self.settled[row] = read
        if count > 0:
            stop = slots.lengths[row]
            # The target has read all tokens but the last.
            target_stop = target_cache.lengths[row] - (size - 1 - read)
            receiver = slots.prefix(row, stop - count, stop)
            sharer = target_cache.prefix(row, target_stop - count, target_stop)
            slots.replace(row, stop - count, self.fuser(receiver, sharer))


class ParallelProposer:
    """Heads on the target's last hidden states, which guess all tokens in one call.

    In its first round it guesses nothing, as the target's states are known from then on. It serves
    one stream of rounds at a time.

    Args:
        target: The model that verifies.
        draft: Trained for it, `kvlab.parallel.ParallelDraft`: called with hidden states and
            embeddings (B, d), it returns states (B, guesses, d) for the target's output head.
    """

    def __init__(self, target: PreTrainedModel, draft: Callable[[Tensor, Tensor], Tensor]):
        self.embed = target.get_input_embeddings()
        self.head = target.get_output_embeddings()
        self.draft = draft

    def start(self, texts: Texts, target_cache: Slots, sampling: Sampling, room: int) -> None:
        """Have the target's states kept."""
        self.texts = texts
        self.sampling = sampling
        self.states: Tensor | None = None
        target_cache.keep_hidden = True

    def propose(self, gamma: int) -> Proposal:
        """Choose each token by its own distribution; processors see the tokens before it."""
        last = torch.tensor([text[-1] for text in self.texts], device=self.head.weight.device)
        if self.states is None:
            return Proposal(last.new_empty(len(last), 0))
        logits = self.head(self.draft(self.states, self.embed(last))[:, :gamma])

        def choose(logits: Tensor, drafted: list[Tensor]) -> tuple[Tensor, Tensor | None]:
            return self.sampling.choose(logits, self.sampling.contexts(self.texts, drafted))

        steps = logits.split(1, 1)
        return _draft(len(steps), lambda drafted: steps[len(drafted)], choose)

    def accept(self, accepted: list[int], target_cache: Slots) -> None:
        """Take the states from which the target chose the last token of each text."""
        device = target_cache.hidden.device
        columns = torch.tensor(accepted, device=device).clamp(min=0)
        self.states = target_cache.hidden[torch.arange(len(accepted), device=device), columns]


class TranslatingProposer(ModelProposer):
    """A draft model with another tokenizer than the target's (Timor et al. 2025, arXiv 2502.05202).

    The draft reads the target's text in its own tokens. After each round only what follows a border
    on which both tokenizers agree is encoded again, and the draft's memory is cropped to what it
    has read of that. If the target decodes greedily, the draft writes text, which is encoded for
    the target: certain guesses, up to gamma. If it samples, the draft samples among the tokens that
    are in both vocabularies, so q is renormalized over these.

    Args:
        model: The draft model, or its Runner (not compiled: rounds have no fixed shape).
        tokenizer: Of the draft.
        target_tokenizer: Of the target.

    Example:
        >>> from kvlab import lab
        >>> names = ("lab-teacher", "lab-target")
        >>> own, tokenizer = map(lab.load_tokenizer, names)
        >>> draft = TranslatingProposer(lab.load("lab-teacher"), own, tokenizer)
        >>> ids = tokenizer("Anna lives", return_tensors="pt").input_ids
        >>> len(generate(lab.load("lab-target"), ids, draft, max_new_tokens=8).tokens[0]) <= 8
        True
    """

    lookback = 8  # tokens of the target that a border leaves open

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        target_tokenizer: PreTrainedTokenizerBase,
    ):
        super().__init__(model)
        if self.runner.compiled_room:
            reason = "A draft with another tokenizer reads texts of other lengths in each round"
            raise ValueError(f"{reason}: leave compiled_room out.")
        self.tokenizer, self.target_tokenizer = tokenizer, target_tokenizer
        shared = shared_tokens(target_tokenizer, tokenizer).to(self.runner.model.device)
        size = self.runner.model.get_input_embeddings().num_embeddings
        self.target_ids, self.draft_ids = shared[:, shared[1] < size]
        if not len(self.draft_ids):
            counts = f"The draft's tokenizer has {len(tokenizer)} tokens"
            counts += f", the target's {len(target_tokenizer)}"
            raise ValueError(f"{counts}, and none is in both: choose a draft of a related family.")
        self.to_draft = self.draft_ids.new_zeros(max(target_tokenizer.get_vocab().values()) + 1)
        self.to_draft[self.target_ids] = self.draft_ids
        self.to_target = self.draft_ids.new_zeros(size)
        self.to_target[self.draft_ids] = self.target_ids

    def start(self, texts: Texts, target_cache: Slots, sampling: Sampling, room: int) -> None:
        """Read the texts, encoded for the draft, with room for about two tokens per new one."""
        self.target_texts = texts
        self.room = room
        self.texts = [[] for _ in texts]
        self.borders = [(0, 0)] * len(texts)  # numbers of tokens: the target's, the draft's
        own = [self._encode_text(row) for row in range(len(texts))]
        super().start(own, target_cache, sampling, 2 * room)
        self.guesses = [[]] * len(texts)  # of this round, in the draft's tokens

    def _encode_text(self, row: int) -> list[int]:
        """The draft's tokens of a text; moves its border."""
        text, (before, draft_before) = self.target_texts[row], self.borders[row]
        border = len(text) - self.lookback
        tail = self._encode(text[before:])
        own = self.texts[row][:draft_before] + tail
        if border > before:
            head = self._encode(text[before:border])
            if head + self._encode(text[border:]) == tail:
                self.borders[row] = (border, draft_before + len(head))
        return [0] * (2 - len(own)) + own  # a draft reads one token and guesses after another

    def _encode(self, tokens: list[int]) -> list[int]:
        text = self.target_tokenizer.decode(tokens)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def propose(self, gamma: int) -> Proposal:
        """Draft `gamma` tokens of the draft's, and return what they are in the target's."""
        if max(map(len, self.texts)) + max(self.unread) + gamma > self.runner.slots.room:
            self.start(self.target_texts, None, self.sampling, self.room)  # with new room
        own, q = super().propose(gamma)
        self.guesses = own.tolist()
        if q is not None:
            return Proposal(self.to_target[own], q)
        rows = []
        for row, guess in enumerate(self.guesses):
            known = self.texts[row][self.borders[row][1] :]
            text = self.tokenizer.decode(known + guess)[len(self.tokenizer.decode(known)) :]
            new = self.target_tokenizer(text, add_special_tokens=False).input_ids[:gamma]
            rows.append(new + [NO_GUESS] * (gamma - len(new)))
        return Proposal(torch.tensor(rows, device=own.device))

    def _choose(self, logits: Tensor, drafted: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Choose a token of the draft's; when sampling, by the target's processors."""
        if self.sampling.greedy:
            return logits[:, 0].argmax(-1), None
        # Low enough that no token outside of both vocabularies is sampled, also in half precision.
        scores = logits.new_full((len(logits), 1, len(self.to_draft)), -1e4)
        scores[..., self.target_ids] = logits[..., self.draft_ids]
        contexts = self.sampling.contexts(self.target_texts, [self.to_target[x] for x in drafted])
        token, q = self.sampling.choose(scores, contexts)
        return self.to_draft[token], q

    def accept(self, accepted: list[int], target_cache: Slots) -> None:
        """Encode the texts again, and keep of what was read how they begin."""
        for row, n in enumerate(accepted):
            if n != FINISHED:
                known = len(self.texts[row]) - self.unread[row]
                read = self.texts[row][:known] + self.guesses[row][:-1]
                own = self.texts[row] = self._encode_text(row)
                pairs = enumerate(zip(read, own[:-1], strict=False))
                same = next((i for i, (a, b) in pairs if a != b), min(len(read), len(own) - 1))
                self.runner.slots.lengths[row] += same - known
                self.unread[row] = len(own) - same
        self.guesses = [[]] * len(self.texts)


class LookupProposer:
    """Prompt lookup (Saxena 2023): guess what followed the last tokens where they occurred before.

    Args:
        longest: The number of last tokens to search for first; then fewer.
    """

    def __init__(self, longest: int = 3):
        self.longest = longest

    def start(self, texts: Texts, target_cache: Slots, sampling: Sampling, room: int) -> None:
        """Take the texts."""
        self.texts = texts
        self.device = target_cache.offsets.device

    def propose(self, gamma: int) -> Proposal:
        """Guess what followed; NO_GUESS where nothing was found."""
        guesses = [self.find(text, gamma) for text in self.texts]
        width = gamma if any(guesses) else 0
        rows = [guess + [NO_GUESS] * (width - len(guess)) for guess in guesses]
        return Proposal(torch.tensor(rows, dtype=torch.long, device=self.device))

    def find(self, text: list[int], gamma: int) -> list[int]:
        """The tokens after an earlier occurrence of the longest possible ending of a text.

        It is the latest occurrence with gamma tokens after it, or else the first.

        Example:
            >>> LookupProposer().find([5, 6, 7, 8, 5, 6], gamma=2)
            [7, 8]
        """
        ids = np.asarray(text)
        for n in range(min(self.longest, len(text) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], n)
            ends = (windows == ids[-n:]).all(1).nonzero()[0] + n
            if len(ends):
                full = ends[ends + gamma <= len(text)]
                start = full[-1] if len(full) else ends[0]
                return text[start : start + gamma]
        return []

    def accept(self, accepted: list[int], target_cache: Slots) -> None:
        """Nothing to do: the loop has extended the texts."""


class _Timer:
    """Times the parts of a round, on a GPU by events in its stream: the host need not wait."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.began = time.perf_counter()
        self.marks = []
        self.mark()

    def mark(self) -> None:
        """End a part."""
        mark = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            mark.record()
        self.marks.append(mark)

    def round(self, lists: Lists, is_prefill=False) -> Round:
        """A round of two parts, draft and target."""
        if self.cuda:
            self.marks[-1].synchronize()
        parts = []
        for start, stop in itertools.pairwise(self.marks):
            parts.append(start.elapsed_time(stop) / 1000 if self.cuda else stop - start)
        return Round(*lists, *parts, time.perf_counter() - self.began, is_prefill)


def _prefix_per_row(prefix: Prefixes, rows: int) -> Sequence[Prefix | None]:
    if prefix is None or isinstance(prefix, Prefix):
        return [prefix] * rows
    _require_rows("prefixes", prefix, rows)
    return prefix


class _Stream:
    """A batch that is decoded.

    `token` (B,) is the last of each text, which is not yet read; `left`, the number of tokens that
    a row may still gain, is 0 once its text has ended. If a stream `shrinks`, no row drafts more
    than it can use of them.
    """

    def __init__(self, runner: Runner, input_ids: Prompts, prefix: Prefixes, max_new_tokens: int):
        prompts = [torch.as_tensor(row) for row in input_ids]
        if not prompts or any(row.ndim != 1 or len(row) == 0 for row in prompts):
            shapes = [tuple(row.shape) for row in prompts]
            raise ValueError(f"input_ids has shapes {shapes}: give (B, T), or a list of (T,).")
        self.runner = runner
        self.prompts = [row.tolist() for row in prompts]
        self.prefixes = _prefix_per_row(prefix, len(prompts))
        self.texts, self.left = [], []
        for ids, prefix in zip(self.prompts, self.prefixes, strict=True):
            self.texts.append([*(prefix.input_ids if prefix else ()), *ids])
            position = int(prefix.next_position) if prefix else 0
            self.left.append(tokens_left(runner.model, position + len(ids), max_new_tokens))
        self.new = [[] for _ in prompts]

    def set_end(self, ending: Ending, sampling: Sampling, rule: Verify) -> None:
        """Decide where texts end, and how their tokens are chosen and verified."""
        self.ending = ending
        self.rule = rule
        model = self.runner.model
        self.sampling = RowSampling.of(sampling, model, self.texts, ending, self.left)
        # Compiled calls have one shape, and a row with its own generator draws as if it were alone.
        own_generators = isinstance(sampling.generator, list | tuple)
        self.shrinks = not self.runner.compiled_room and not own_generators

    def prefill(self, room: int) -> Texts:
        """Let the target read the prompts and give the first token of each row."""
        logits = self.runner.start(self.prompts, self.prefixes, room)
        self.token, _ = self.sampling.choose(logits[:, None], self.texts)
        return [self._extend(row, [token]) for row, token in enumerate(self.token.tolist())]

    def verify(self, proposal: Proposal, gamma: int) -> tuple[Tensor, Tensor]:
        """Lines 5 to 14, for all guesses at once. Returns numbers accepted and next tokens (B,)."""
        runner, sampling = self.runner, self.sampling
        size = runner.model.get_input_embeddings().num_embeddings
        # Guesses that cannot be accepted must be read as something.
        tokens = torch.cat((self.token[:, None], proposal.tokens.clamp(0, size - 1)), 1)
        logits = runner(tokens, runner.slots.lengths)  # (B, g + 1, V)
        scores = sampling.scores(logits, sampling.contexts(self.texts, proposal.tokens.T))
        if sampling.greedy:
            return verify_greedy(scores.argmax(-1), proposal)
        uniform = sampling.uniform(len(logits), gamma + 1, logits.device)
        return self.rule(scores.softmax(-1), proposal, uniform)

    def commit(self, proposal: Proposal, accepted: Tensor, token: Tensor) -> Lists:
        """Extend the texts by the accepted tokens and the next; return the lists of a `Round`."""
        self.token = token
        # One transfer: here the host waits for a GPU.
        rows = torch.cat((proposal.tokens, accepted[:, None], token[:, None]), 1).tolist()
        drafts, counts, gained = [], [], []
        for row, (*drafted, n, next_token) in enumerate(rows):
            if self.left[row] == 0:  # it ended in an earlier round
                drafted = []
                n = 0
            usable = drafted[: self.left[row] - 1] if self.shrinks else drafted
            drafts.append(usable)
            counts.append(min(n, len(usable)))
            gained.append(self._extend(row, [*drafted[:n], next_token]))
            if self.left[row] > 0:
                self.runner.slots.lengths[row] += n + 1
        return drafts, counts, gained

    def _extend(self, row: int, tokens: list[int]) -> list[int]:
        """Add tokens up to the end of the text, and return those."""
        gained = []
        for token in tokens:
            if self.left[row] > 0:
                gained.append(token)
                self.new[row].append(token)
                self.left[row] = 0 if self.ending.reached(self.new[row]) else self.left[row] - 1
        self.texts[row] += gained
        return gained


@torch.inference_mode()
def decode(
    target: Model,
    input_ids: Prompts,
    proposer: Proposer | None = None,
    *,
    gamma: int | Callable[[Round], int] = 4,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    prefix: Prefixes = None,
    eos_token_id: int | Sequence[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop: Stop = (),
    verify: Verify = verify,
) -> Iterator[Round]:
    """Decode, and yield a `Round` after each target call.

    The text is the target's own: with greedy choice token for token, with sampling in distribution
    (for any proposer that returns the true q). Without a proposer this is plain decoding, one token
    per round.

    Args:
        target: A causal LM, or a Runner around one.
        input_ids: (B, T), or a list of prompts (T,) of any lengths, which follow the prefix. There
            is no attention mask, so no padding: prompts of different lengths go into a list.
        proposer: The source of drafts; default: none.
        gamma: Tokens to draft per round: a number, or a function of the last round, such as
            `AdaptiveGamma`, that returns at most its attribute `maximum` (default 16). No more are
            drafted than texts may still gain.
        max_new_tokens: Per row; the end is exact, also inside a round. A text ends before where it
            is as long as the target reads.
        sampling: Default: greedy.
        prefix: Read before: one for all rows, or one per row.
        eos_token_id: End tokens; default: those of the target's generation config and of the
            tokenizer; [] for none.
        tokenizer: Of the target, for its end token and for stop strings.
        stop: A row ends with the token that completes one of these strings (and of
            `stop_strings` in the generation config).
        verify: The rule for sampled tokens, `verify` or `verify_block`.

    Example:
        >>> from kvlab import lab
        >>> draft = ModelProposer(lab.load("lab-draft"))
        >>> rounds = decode(lab.load("lab-target"), torch.tensor([[5, 6]]), draft, max_new_tokens=8)
        >>> sum(len(r.tokens[0]) for r in rounds) <= 8
        True
    """
    maximum = getattr(gamma, "maximum", MAXIMUM_GAMMA) if callable(gamma) else gamma
    if maximum < 1 or max_new_tokens < 1:
        numbers = f"gamma is {maximum}, max_new_tokens is {max_new_tokens}"
        raise ValueError(f"{numbers}: expected positive integers.")
    runner = target if isinstance(target, Runner) else Runner(target)
    stream = _Stream(runner, input_ids, prefix, max_new_tokens)
    ending = Ending.of(runner.model, tokenizer, stop, eos_token_id)
    stream.set_end(ending, sampling or Sampling(), verify)
    maximum = min(maximum, max(1, max(stream.left) - 1))  # a round gains one token more
    room = max(stream.left) + maximum + 1
    empty, zeros = [[]] * len(stream.texts), [0] * len(stream.texts)
    device = runner.model.device

    timer = _Timer(device)
    timer.mark()
    tokens = stream.prefill(room)
    timer.mark()
    number = runner.streams
    last = timer.round((empty, zeros, tokens), is_prefill=True)
    yield last
    if proposer and any(stream.left):
        timer = _Timer(device)
        proposer.start(stream.texts, runner.slots, stream.sampling, room)
        timer.mark()
        timer.mark()
        yield timer.round((empty, zeros, empty), is_prefill=True)

    no_draft = Proposal(stream.token.new_empty(len(stream.texts), 0))
    while any(stream.left):
        if runner.streams != number:
            raise ValueError("The Runner began another text before this one ended.")
        timer = _Timer(device)
        g = min(gamma(last) if callable(gamma) else gamma, maximum)
        g = min(g, max(stream.left) - 1) if stream.shrinks else g
        proposal = proposer.propose(g) if proposer and g else no_draft
        timer.mark()
        accepted, token = stream.verify(proposal, g)
        timer.mark()
        lists = stream.commit(proposal, accepted, token)
        if proposer:
            going = zip(lists[1], stream.left, strict=True)
            proposer.accept([n if left else FINISHED for n, left in going], runner.slots)
        last = timer.round(lists)
        yield last


class Generated(NamedTuple):
    """New tokens of each row, (n,), and the rounds that made them."""

    tokens: list[Tensor]
    rounds: list[Round]


def generate(target: Model, input_ids: Prompts, *args, **options) -> Generated:
    """Run `decode`, with the same arguments, to the end.

    Example:
        >>> from kvlab import lab
        >>> generated = generate(lab.load("lab-target"), torch.tensor([[5, 6]]), max_new_tokens=8)
        >>> len(generated.tokens[0]) <= 8
        True
    """
    rounds = list(decode(target, input_ids, *args, **options))
    tokens = []
    for row in zip(*(r.tokens for r in rounds), strict=True):
        tokens.append(torch.tensor([*itertools.chain(*row)], dtype=torch.long))
    return Generated(tokens, rounds)


@dataclass(frozen=True)
class Summary:
    """Statistics of rounds. Lists have one entry per drafted position; times are in seconds.

    Args:
        tokens: Gained after the first of each text.
        target_calls: Rounds that are not prefill.
        draft_calls: Drafted positions of all rounds; one call of a draft model each.
        acceptance: Fraction of the guesses that were reached (all before accepted) that were
            accepted.
        conditional: The same, by position.
        unconditional: Fraction of all guesses at a position that were accepted.
        tokens_per_call: Gained by a row per round, the target's own token included.
        seconds: Of decoding.
        draft_seconds: Of the proposer.
        target_seconds: Of the target.
        prefill_seconds: Of reading prompts, which no other time includes.
        ttft: Time to first token, mean over texts.
        tokens_per_second: Of decoding, without prefill.
    """

    tokens: int
    target_calls: int
    draft_calls: int
    acceptance: float
    conditional: list[float]
    unconditional: list[float]
    tokens_per_call: float
    seconds: float
    draft_seconds: float
    target_seconds: float
    prefill_seconds: float
    ttft: float
    tokens_per_second: float


def _ratio(part: float, total: float) -> float:
    return float(part / total) if total else float("nan")


def _count_guesses(r: Round, row: int) -> tuple[int, int, int]:
    """Numbers of guesses of a row: all, those reached and accepted up to the end of the text."""
    guesses = sum(token != NO_GUESS for token in r.drafted[row])
    gained, n = len(r.tokens[row]), r.accepted[row]
    if gained != n + 1:  # the end was inside the accepted tokens
        return guesses, gained, gained
    return guesses, min(n + 1, guesses), n


def summarize(rounds: Sequence[Round]) -> Summary:
    """Add up the rounds of one text or of many.

    Example:
        >>> some, all = ([[5, 6]], [1], [[5, 9]]), ([[7, 8]], [2], [[7, 8, 4]])
        >>> summary = summarize([Round(*some, 0.1, 0.2, 0.3), Round(*all, 0.1, 0.2, 0.3)])
        >>> summary.conditional, summary.tokens_per_call, round(summary.tokens_per_second, 2)
        ([1.0, 0.5], 2.5, 8.33)
    """
    prefills = [r for r in rounds if r.is_prefill]
    rounds = [r for r in rounds if not r.is_prefill]
    steps = [(r, row) for r in rounds for row in range(len(r.tokens)) if r.tokens[row]]
    widest = max((len(r.drafted[row]) for r, row in steps), default=0)
    counts = np.zeros((3, widest))
    for r, row in steps:
        for i, count in enumerate(_count_guesses(r, row)):
            counts[i, :count] += 1
    drafted, reached, passed = counts
    tokens = sum(len(r.tokens[row]) for r, row in steps)
    first = [r.seconds for r in prefills if any(r.tokens)]
    seconds = sum(r.seconds for r in rounds)
    return Summary(
        tokens=tokens,
        target_calls=len(rounds),
        draft_calls=sum(max(map(len, r.drafted)) for r in rounds),
        acceptance=_ratio(passed.sum(), reached.sum()),
        conditional=list(map(_ratio, passed, reached)),
        unconditional=list(map(_ratio, passed, drafted)),
        tokens_per_call=_ratio(tokens, len(steps)),
        seconds=seconds,
        draft_seconds=sum(r.draft_seconds for r in rounds),
        target_seconds=sum(r.target_seconds for r in rounds),
        prefill_seconds=sum(r.seconds for r in prefills),
        ttft=_ratio(sum(first), len(first)),
        tokens_per_second=_ratio(tokens, seconds),
    )


class Expected(NamedTuple):
    """Tokens gained per target call, and the speed-up over plain decoding."""

    tokens_per_call: float
    speedup: float


def cost_model(acceptance: Acceptance, c: float, gamma: int, v: VerifyCost = 1.0) -> Expected:
    """Tokens per call and speed-up (Leviathan et al. 2023, equation 1 and theorem 3.8).

    E = 1 + sum over k of a_1 ... a_k, which is (1 - a^(gamma + 1)) / (1 - a) if all a_k are equal,
    and the speed-up is E / (gamma c + v): the paper has v = 1, a target call that costs the same
    for any number of tokens.

    Args:
        acceptance: a, or the conditional a_k by position (at least gamma of them).
        c: Seconds of one draft step over seconds of one target step.
        gamma: Drafted tokens per round.
        v: Seconds of a target call on gamma + 1 tokens over that on one; a number, or a function of
            gamma.

    Example:
        >>> [round(value, 4) for value in cost_model(0.8, c=0.1, gamma=6)]
        [3.9514, 2.4696]
    """
    chain = [acceptance] * gamma if np.ndim(acceptance) == 0 else acceptance[:gamma]
    if len(chain) != gamma or not all(0 <= a <= 1 for a in chain):
        raise ValueError(f"acceptance is {acceptance}, expected {gamma} (gamma) fractions, or one.")
    tokens = 1.0 + float(np.cumprod(chain).sum())
    return Expected(tokens, tokens / (gamma * c + (v(gamma) if callable(v) else v)))


def best_gamma(
    acceptance: Acceptance, c: float, v: VerifyCost = 1.0, maximum: int = MAXIMUM_GAMMA
) -> int:
    """The gamma with the largest predicted speed-up; 0 if plain decoding is the fastest.

    Example:
        >>> best_gamma(0.8, c=0.1), best_gamma(0.3, c=0.5)
        (6, 0)
    """
    if np.ndim(acceptance):
        maximum = min(maximum, len(acceptance))
    speedups = [1.0]
    for gamma in range(1, maximum + 1):
        speedups.append(cost_model(acceptance, c, gamma, v).speedup)
    return int(np.argmax(speedups))


def costs(speculative: Summary, plain: Summary) -> tuple[float, float]:
    """Measured c and v: seconds of a draft step and of a verification over a plain target step.

    Example:
        >>> plain = summarize([Round([[]], [0], [[5]], 0.0, 2.0, 2.0)])
        >>> costs(summarize([Round([[5]], [1], [[5, 6]], 1.0, 2.5, 3.5)]), plain)
        (0.5, 1.25)
    """
    plain_step = plain.target_seconds / plain.target_calls
    c = speculative.draft_seconds / speculative.draft_calls / plain_step
    return c, speculative.target_seconds / speculative.target_calls / plain_step


def compare(arms: dict[str, Summary], prompts: int, gamma: int) -> dict:
    """Means per prompt of each arm and, with a plain arm, the predicted and the measured speed-up.

    The cost of a verification between one token and gamma + 1 is taken to grow linearly.

    Example:
        >>> plain = summarize([Round([[]], [0], [[5]], 0.0, 2.0, 2.0)])
        >>> speculative = summarize([Round([[5]], [1], [[5, 6]], 1.0, 2.0, 3.0)])
        >>> figures = compare({"plain": plain, "speculative": speculative}, prompts=1, gamma=1)
        >>> round(figures["predicted_speedup"], 3), round(figures["measured_speedup"], 3)
        (1.333, 1.333)
    """
    names = "ttft tokens_per_second acceptance tokens_per_call draft_calls target_calls"
    figures = {}
    for arm, summary in arms.items():
        figures[arm] = {name: getattr(summary, name) for name in names.split()}
        figures[arm]["latency"] = (summary.prefill_seconds + summary.seconds) / prompts
    fast, plain = arms["speculative"], arms.get("plain")
    if plain and plain.target_calls and fast.draft_calls:
        c, v = costs(fast, plain)
        chain = np.nan_to_num(fast.conditional).tolist()
        figures |= {"c": c, "v": v}
        figures["predicted_speedup"] = cost_model(chain, c, len(chain), v).speedup
        figures["measured_speedup"] = fast.tokens_per_second / plain.tokens_per_second
        figures["best_gamma"] = best_gamma(fast.acceptance, c, lambda g: 1 + (v - 1) * g / gamma)
    return figures


@dataclass
class AdaptiveGamma:
    """A gamma that follows the text: the best for the recent acceptance, given c and v (`costs`).

    Where drafting does not pay it is 0, and the target decodes alone; then the memory of past
    rounds fades, so that drafting is tried again.

    Args:
        c: As for `cost_model`.
        v: As for `cost_model`.
        maximum: The largest gamma.

    Example:
        >>> start = Round([[]], [0], [[4]], 0.0, 0.2, 0.2, is_prefill=True)
        >>> gamma, accepted = AdaptiveGamma(c=0.2), Round([[5, 6]], [2], [[5, 6, 7]], 0.1, 0.2, 0.3)
        >>> gamma(start), gamma(accepted)
        (3, 8)
    """

    c: float
    v: VerifyCost = 1.0
    maximum: int = 8

    def __call__(self, last: Round) -> int:
        if last.is_prefill:
            self._accepted = self._reached = 0.0
        rows = [_count_guesses(last, row) for row, new in enumerate(last.tokens) if new]
        _, reached, accepted = np.mean(rows, 0)
        self._accepted = 0.8 * self._accepted + accepted
        self._reached = 0.8 * self._reached + reached
        # The prior is 0.7, with the weight 0.25 of a guess that was tested in this round.
        acceptance = (0.25 * 0.7 + self._accepted) / (0.25 + self._reached)
        return best_gamma(acceptance, self.c, self.v, self.maximum)
