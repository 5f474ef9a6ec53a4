"""Speculative decoding: a proposer drafts, the target verifies, and the text is exactly the target's.

`decode` is the loop. It knows a proposer only by three methods and yields one `Round` a target
call; texts, statistics and pictures are made from the rounds. Without a proposer it is plain
autoregressive decoding. Rows of a batch advance each at its own pace, because every row has its own
columns in memory (`kvlab.cache.Slots`).

Sources: Leviathan, Kalman and Matias (2023), arXiv 2211.17192, Algorithm 1 and section 3; Chen et
al. (2023), arXiv 2302.01318, Algorithm 2. Names: gamma drafted tokens, draft distribution q, target
distribution p.
"""

import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvlab.cache import Prefix, length, prefill
from kvlab.models import first_layers, require_supported, rotary_of
from kvlab.slots import Slots, step

Texts = list[list[int]]  # token ids of each row


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


class Proposal(NamedTuple):
    """Drafted tokens (B, g), and the distributions (B, g, V) they were drawn from; None: each was certain.

    A token of -1 stands for "no guess", in rows that have fewer than others.
    """

    tokens: Tensor
    probabilities: Tensor | None = None


@dataclass(frozen=True)
class Round:
    """What one target call did. Lists have one entry a row; those of rows that had ended before are empty, or 0.

    `drafted` are the guesses, `accepted` how many of them the target agreed with, and `tokens` what
    the row gained: those and one of the target's own, but never past the end of the text (so
    `accepted` can be more than that). `reading` marks the reading of the prompt, by the target (it
    gives the first token) and then by the proposer. `seconds` is the whole round, so it includes
    both others. All three are wall clock.
    """

    drafted: Texts
    accepted: list[int]
    tokens: Texts
    draft_seconds: float
    target_seconds: float
    seconds: float
    reading: bool = False


class Proposer(Protocol):
    """What drafts. `target_cache` is the target's own memory: may be read, must not be changed."""

    def start(self, texts: Texts, target_cache: Slots, sampling: "Sampling", room: int) -> None:
        """Begin with texts (prefix, prompt, the target's first token) that will gain fewer than `room` tokens."""

    def propose(self, gamma: int) -> Proposal:
        """Draft up to `gamma` tokens a row (0: none)."""

    def accept(self, accepted: list[int], next_tokens: list[int], target_cache: Slots) -> None:
        """Take note that each row gained so many drafted tokens and the next one; -1: the row has ended."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, by the logits processors of transformers, in its order.

    Args:
        temperature: 0 takes the most probable token (greedy), else tokens are sampled.
        top_k: Sample among the k most probable tokens; 0 keeps all.
        top_p: Sample among the most probable tokens that together reach this probability; 1.0 keeps all.
        repetition_penalty: Above 1.0 makes tokens of the context less probable.
        generator: One for all rows, or a list with one per row: then a row's text does not depend on the other rows.

    Example:
        >>> Sampling(0.7, top_p=0.9).greedy, Sampling().greedy
        (False, True)
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    generator: torch.Generator | Sequence[torch.Generator] | None = None

    def __post_init__(self):
        right = self.temperature == 0 or 1e-6 <= self.temperature < float("inf")
        _require(
            right, f"The temperature is {self.temperature}, expected 0 (greedy) or at least 1e-6."
        )
        _require(self.top_k >= 0, f"top_k is {self.top_k}, expected 0 (keep all) or more.")
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}, expected more than 0 and at most 1.")
        _require(
            self.repetition_penalty > 0,
            f"repetition_penalty is {self.repetition_penalty}, expected above 0.",
        )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @cached_property
    def _warpers(self) -> LogitsProcessorList:
        warpers = LogitsProcessorList()
        if self.temperature not in (0, 1):
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k and not self.greedy:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p != 1 and not self.greedy:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers

    def contexts(self, texts: Texts, drafted: Sequence[Tensor]) -> Texts:
        """Texts with drafted tokens behind them, (B,) a place; only the penalty asks for it, and makes a GPU wait."""
        if self.repetition_penalty == 1 or not len(drafted):
            return texts
        new = torch.stack(tuple(drafted), 1).clamp(min=0).tolist()
        return [text + more for text, more in zip(texts, new, strict=True)]

    def scores(self, logits: Tensor, texts: Texts) -> Tensor:
        """Processed logits (B, k, V), in float32 or wider; the last of the k follows texts[b], the others its start."""
        rows, count, size = logits.shape
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.repetition_penalty != 1:
            scores, penalty = (
                scores.clone(),
                RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)),
            )
            for row, text in enumerate(texts):
                ids = torch.tensor([text], device=logits.device)
                for i in range(count):
                    seen = ids[:, : len(text) - count + 1 + i]
                    scores[row, i] = penalty(seen, scores[row, i][None])[0]
        return self._warpers(None, scores.reshape(-1, size)).reshape(rows, count, size)

    def uniform(self, rows: int, count: int, device: torch.device) -> Tensor:
        """Numbers in [0, 1), (rows, count)."""
        one = self.generator is None or isinstance(self.generator, torch.Generator)
        if not one:
            seen = f"There are {len(self.generator)} generators for {rows} rows"
            _require(len(self.generator) == rows, f"{seen}: give one for all, or one for each.")
        sources = (
            [(self.generator, rows)] if one else [(generator, 1) for generator in self.generator]
        )
        drawn = [
            torch.rand(n, count, generator=g, device=g.device if g else None) for g, n in sources
        ]
        return torch.cat(drawn).to(device)

    def choose(self, logits: Tensor, texts: Texts) -> tuple[Tensor, Tensor | None]:
        """One token a row, (B,), from logits (B, 1, V), and what it was drawn from, (B, V) (greedy: None)."""
        scores = self.scores(logits, texts)[:, 0]
        if self.greedy:
            return scores.argmax(-1), None
        probabilities = scores.softmax(-1)
        return draw(probabilities, self.uniform(len(logits), 1, logits.device)[:, 0]), probabilities


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The index (B,) at which the running sum of weights (B, V) passes the uniform number's share of the total.

    >>> draw(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([0.5]))
    tensor([2])
    """
    exact = torch.float32 if weights.device.type == "mps" else torch.float64  # mps has no float64
    total = weights.to(exact).cumsum(-1)
    return torch.searchsorted(total, uniform.to(exact)[:, None] * total[:, -1:], right=True)[:, 0]


def match(choices: Tensor, proposal: Proposal) -> tuple[Tensor, Tensor]:
    """Count the drafted tokens (B, g) that equal the target's choices (B, g + 1), and give its next token, both (B,).

    >>> match(torch.tensor([[4, 7, 9]]), Proposal(torch.tensor([[4, 5]])))
    (tensor([1]), tensor([7]))
    """
    width = proposal.tokens.shape[1]
    accepted = (choices[:, :width] == proposal.tokens).long().cumprod(1).sum(1)
    return accepted, choices.gather(1, accepted[:, None])[:, 0]


def verify(p: Tensor, proposal: Proposal, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Accept or resample (Leviathan et al. 2023, Algorithm 1): tokens accepted and the next token, both (B,).

    Token i is accepted if u_i < p_i(x_i) / q_i(x_i). At the first that is not, the next token is
    drawn from norm(max(0, p_i - q_i)); after all g, from p_(g+1). What results is distributed as p,
    whatever q is.

    Args:
        p: (B, g + 1, V), the target's distributions, processed as q was.
        proposal: g tokens a row, with the distributions they were really drawn from.
        uniform: (B, at least g + 1) independent numbers in [0, 1).

    Example:
        >>> p = torch.tensor([[[0.2, 0.8], [0.5, 0.5]]])
        >>> proposal = Proposal(torch.tensor([[0]]), torch.tensor([[[0.9, 0.1]]]))
        >>> verify(p, proposal, torch.tensor([[0.1, 0.7]])), verify(p, proposal, torch.tensor([[0.5, 0.7]]))
        ((tensor([1]), tensor([1])), (tensor([0]), tensor([1])))
    """
    (tokens, q), width = proposal, proposal.tokens.shape[1]
    guess = tokens.clamp(min=0)[..., None]
    if q is None:
        q = torch.zeros_like(p[:, :width]).scatter(-1, guess, 1.0)
    if (
        wider := q.shape[-1] - p.shape[-1]
    ) > 0:  # vocabularies of one family can be padded to different sizes
        p = pad(p, (0, wider))
    elif wider < 0:
        q = pad(q, (0, -wider))
    q = torch.where((tokens < 0)[..., None], 0.0, q)
    passed = (
        uniform[:, :width] * q.gather(-1, guess)[..., 0] < p[:, :width].gather(-1, guess)[..., 0]
    )
    accepted = (passed & (tokens >= 0)).long().cumprod(1).sum(1)
    at = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    p_next, q_next = (
        x.gather(1, at)[:, 0] for x in (p, torch.cat((q, torch.zeros_like(p[:, :1])), 1))
    )
    rest = (p_next - q_next).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_next)  # p = q up to rounding
    return accepted, draw(rest, uniform[:, -1])


class Runner:
    """A causal LM and the memory it writes to. Called with tokens (B, k) and their columns, it gives logits (B, k, V).

    With `compiled_room`, memory has that many columns and stays where it is, and each shape of call
    is compiled once (on a GPU into a CUDA graph): the same tokens sooner, after a minute of
    compiling. Worth it for many texts. The values of the model's weights may change afterwards, its
    modules and dtype may not. A Runner serves one stream of rounds at a time.

    Args:
        compiled_room: columns a row, at least prompt + max_new_tokens + gamma + 1. Default: nothing
            is compiled, and memory is made for each text.

    Example:
        >>> from kvlab import lab
        >>> runner = Runner(lab.load("lab-draft"))
        >>> with torch.inference_mode():
        ...     runner.start([[5, 6, 7]], [None], room=2).shape, runner(torch.tensor([[8, 9]]), [3]).shape
        (torch.Size([1, 1536]), torch.Size([1, 2, 1536]))
    """

    def __init__(self, model: PreTrainedModel, compiled_room: int | None = None):
        seen = f"The model is a {type(model).__name__}, expected a causal LM of transformers"
        _require(
            isinstance(model, torch.nn.Module) and hasattr(model, "config"),
            f"{seen}: load it first.",
        )
        require_supported(model)
        kind = model.config._attn_implementation
        seen = f"The attention implementation is {kind!r}, expected 'sdpa' or 'eager', which take a mask"
        _require(
            kind in ("eager", "sdpa"), f"{seen}: load the model with attn_implementation='sdpa'."
        )
        able = compiled_room is None or getattr(model, "compilable", True)
        _require(
            able,
            "A draft with cross-attention or transitions cannot be compiled: leave compiled_room out.",
        )
        self.text = None  # an object of its own for each start, by which a stream knows whether memory is still its own
        self.model, self.compiled_room, self.slots, self._programs = model, compiled_room, None, {}

    def start(self, texts: Texts, prefixes: Sequence[Prefix | None], room: int) -> Tensor:
        """Read texts, each after its prefix, and return the logits (B, V) that follow; leave room for more columns."""
        device, states, keys, self.text = self.model.device, {}, [], object()
        of_row = getattr(
            self.model, "for_row", lambda row: self.model
        )  # a draft may know something else in each row
        models = [of_row(row) for row in range(len(texts))]
        for model, text, prefix in zip(models, texts, prefixes, strict=True):
            keys.append((tuple(text), id(prefix), id(model)))
            if keys[-1] not in states:  # many samples of one prompt read it once
                states[keys[-1]] = prefill(model, torch.tensor([text], device=device), prefix)
        self.prepare(len(texts), max(length(state.cache) for state in states.values()) + room)
        for row, key in enumerate(keys):
            self.slots.put(row, states[key].cache, states[key].next_position)
        return torch.cat([states[key].logits for key in keys])

    def prepare(self, rows: int, needed: int) -> None:
        """Make memory for so many rows and columns, or, compiled, use what there is."""
        seen = f"The texts need {needed} columns, compiled_room is {self.compiled_room}"
        _require(needed <= (self.compiled_room or needed), f"{seen}: make it larger.")
        if self.compiled_room is None or self.slots is None or len(self.slots.lengths) != rows:
            self.slots = Slots(self.model, rows, self.compiled_room or needed)
            if self.compiled_room:
                for layer in self.slots.layers:
                    torch._dynamo.mark_static_address(layer.keys)
                    torch._dynamo.mark_static_address(layer.values)

    def __call__(self, tokens: Tensor, starts: list[int]) -> Tensor:
        columns = self.slots.set_write_positions(
            starts, tokens.shape[1], fixed=self.compiled_room is not None
        )
        if self.compiled_room is None:
            return step(self.model, self.slots, tokens, columns)
        if tokens.shape not in self._programs:
            self._programs[tokens.shape] = _compiled_step(self.model.device)
        return self._programs[tokens.shape](self.model, self.slots, tokens, columns)


def _compiled_step(device: torch.device) -> Callable[..., Tensor]:
    """Compile `step` for one model and one shape, without the checks before each call that nothing else has changed.

    For a small model these checks take as long as its layers. The compiler tells programs apart by
    their code, and without checks would take one for another: so each gets its own copy of the
    code.
    """
    own = types.FunctionType(step.__code__.replace(), step.__globals__, argdefs=step.__defaults__)
    options = {
        "guard_filter_fn": lambda guards: [False] * len(guards),
        "triton.cudagraphs": device.type == "cuda",
    }
    return torch.compile(own, dynamic=False, options=options)


class ModelProposer:
    """A smaller causal LM with the target's tokenizer (which nothing here can check: another only guesses badly).

    It reads texts itself, prefixes of the target included, but for a `prefix` of its own (one for
    all rows, or a list), whose ids must begin the text and leave at least one token to read. It
    serves one stream of rounds at a time.
    """

    leaves = 1  # tokens that `start` leaves unread

    def __init__(
        self, model: PreTrainedModel | Runner, prefix: Prefix | Sequence[Prefix] | None = None
    ):
        self.runner, self.prefix = model if isinstance(model, Runner) else Runner(model), prefix

    def start(self, texts: Texts, target_cache: Slots, sampling: Sampling, room: int) -> None:
        """Read the texts, but for their last token."""
        own = "The draft's Runner is the target's own: give the proposer a Runner of its own."
        _require(self.runner.slots is not target_cache, own)
        self._begin(texts, sampling)
        parts, prefixes = [], _per_row(self.prefix, len(texts))
        for text, prefix in zip(self.texts, prefixes, strict=True):
            known = list(prefix.input_ids) if prefix else []
            fits = text[: len(known)] == known and len(known) < len(text) - 1
            _require(
                fits,
                "The draft's prefix must stand for the first ids of the text, and leave one to read.",
            )
            self.unread[len(parts)] = min(self.leaves, len(text) - len(known) - 1)
            parts.append(text[len(known) : -self.unread[len(parts)]])
        self.runner.start(parts, prefixes, room)

    def _begin(self, texts: Texts, sampling: Sampling) -> None:
        self.top = (
            self.runner.model.get_input_embeddings().num_embeddings - 1
        )  # beyond it, the last stands for all
        self.texts = [[min(token, self.top) for token in text] for text in texts]
        self.sampling, self.unread = sampling, [1] * len(texts)

    def propose(self, gamma: int) -> Proposal:
        """Draw x_1 from q_1(text), x_2 from q_2(text, x_1), ... (Algorithm 1, lines 1 to 4)."""
        lengths, device = self.runner.slots.lengths, self.runner.model.device
        self.drafted = torch.empty(len(self.texts), 0, dtype=torch.long)
        if gamma == 0:
            return Proposal(self.drafted.to(device))
        # Rows that lack less read zeros behind, in columns that are written again (rows that have ended: any will do).
        width = max(2 if self.runner.compiled_room else 1, *self.unread)
        unread = [
            text[len(text) - n :] + [0] * (width - n)
            for text, n in zip(self.texts, self.unread, strict=True)
        ]
        tokens, starts = (
            torch.tensor(unread, device=device),
            [min(n, self.runner.slots.room - width) for n in lengths],
        )
        last = torch.tensor(self.unread, device=device).clamp(min=1)[:, None, None] - 1
        drafted, q = [], []
        for i in range(gamma):
            logits = self.runner(tokens, starts)
            logits = logits[:, -1:] if i else logits.take_along_dim(last, 1)
            token, probabilities = self.sampling.choose(
                logits, self.sampling.contexts(self.texts, drafted)
            )
            drafted.append(token)
            q.append(probabilities)
            tokens, starts = (
                token[:, None],
                [have + new + i for have, new in zip(lengths, self.unread, strict=True)],
            )
        self.drafted = torch.stack(drafted, 1)
        return Proposal(self.drafted, None if self.sampling.greedy else torch.stack(q, 1))

    def accept(self, accepted: list[int], next_tokens: list[int], target_cache: Slots) -> None:
        """Keep what was accepted. The last drafted token was never read: after full acceptance two are missing."""
        for row, (n, drafted) in enumerate(zip(accepted, self.drafted.tolist(), strict=True)):
            read = min(max(n, 0), max(len(drafted) - 1, 0))  # of what was accepted
            if drafted:
                self.runner.slots.lengths[row] += self.unread[row] + read
                self.unread[row] = 0
            if n >= 0:
                self.texts[row] += [*drafted[:n], min(next_tokens[row], self.top)]
                self.unread[row] += n + 1 - read


class EarlyExitProposer(ModelProposer):
    """The first layers of the target itself, then its last norm and its head, in the target's own memory.

    Nothing is copied and nothing read twice: what the target's first layers kept of a text is what
    the draft needs. `layers` is how many. It serves one stream of rounds at a time.
    """

    def __init__(self, target: PreTrainedModel | Runner, layers: int):
        model, room = (
            (target.model, target.compiled_room) if isinstance(target, Runner) else (target, None)
        )
        have = model.config.num_hidden_layers
        _require(
            0 < layers < have,
            f"layers is {layers}, expected 1 to {have - 1}: the target has {have}.",
        )
        super().__init__(Runner(first_layers(model, layers), room))
        self.layers = layers

    def start(self, texts: Texts, target_cache: Slots, sampling: Sampling, room: int) -> None:
        """Take over the target's memory of the texts."""
        self._begin(texts, sampling)
        self.runner.slots = target_cache.first(self.layers)

    def accept(self, accepted: list[int], next_tokens: list[int], target_cache: Slots) -> None:
        """Keep what was accepted; the target has read it."""
        super().accept(accepted, next_tokens, target_cache)
        self.runner.slots.lengths, self.unread = list(target_cache.lengths), [1] * len(accepted)


class FusedProposer(ModelProposer):
    """A draft whose cache is fused from the target's: what the target made of the text helps to guess what follows.

    As it starts, and after each verification, the entries of the tokens that both have read are
    fused, in the draft's own memory; only the newest tokens are the draft's alone (Fu et al. 2025,
    arXiv 2510.03215, used in speculation). A text that the target did not read token by token (a
    compressed prefix) is fused from the first guess on.

    Args:
        model, prefix: as for `ModelProposer`. The draft's own prefix is not fused.
        target: the model that verifies, or its Runner.
        fuser: from the target to the draft, as `fuse.Fuser`: called with a `Prefix` of each, it
            returns the draft's cache.
        prefill, decode: whether to fuse what stands before the first guess, and what is accepted
            later.
    """

    def __init__(
        self,
        model: PreTrainedModel | Runner,
        target: PreTrainedModel | Runner,
        fuser: Callable[[Prefix, Prefix], DynamicCache],
        prefix: Prefix | Sequence[Prefix] | None = None,
        prefill: bool = True,
        decode: bool = True,
    ):
        super().__init__(model, prefix)
        models = (self.runner.model, target.model if isinstance(target, Runner) else target)
        self.fuser, self.prefill, self.decode, self.leaves = fuser, prefill, decode, 2
        self.rotary, self.sharer_rotary = map(rotary_of, models)

    def start(self, texts: Texts, target_cache: Slots, sampling: Sampling, room: int) -> None:
        """Read the texts, but for their last two tokens, and fuse them; the next to last is read on what is fused."""
        super().start(texts, target_cache, sampling, room)
        self.settled = [
            len(text) - n for text, n in zip(texts, self.unread, strict=True)
        ]  # fused, or not to be
        for row, prefix in enumerate(_per_row(self.prefix, len(texts)) if self.prefill else []):
            if target_cache.lengths[row] == len(texts[row]) - 1:
                self.settled[row] = len(prefix.input_ids) if prefix else 0
                self._fuse(row, target_cache)

    def accept(self, accepted: list[int], next_tokens: list[int], target_cache: Slots) -> None:
        """Keep what was accepted, and fuse it."""
        super().accept(accepted, next_tokens, target_cache)
        for row, n in enumerate(accepted if self.decode else []):
            if n >= 0:
                self._fuse(row, target_cache)

    def _fuse(self, row: int, target_cache: Slots) -> None:
        """Fuse the entries of a row's tokens that both have read and that are not settled."""
        own, text = self.runner.slots, self.texts[row]
        read = len(text) - self.unread[row]  # by the draft; the target has read all but the last
        count, self.settled[row] = read - self.settled[row], read
        if count > 0:
            ends = own.lengths[row], target_cache.lengths[row] - (len(text) - 1 - read)
            reads = [slots.prefix(row, end - count, end, rotary) for slots, end, rotary in zip(
                (own, target_cache), ends, (self.rotary, self.sharer_rotary), strict=True)]  # fmt: skip
            own.replace(row, ends[0] - count, self.fuser(*reads))


class LookupProposer:
    """Prompt lookup: what followed the last tokens where they stood before (Saxena 2023). No model, no distribution.

    The last `longest` tokens are looked for first, then fewer.
    """

    def __init__(self, longest: int = 3):
        self.longest = longest

    def start(self, texts: Texts, target_cache: Slots, sampling: Sampling, room: int) -> None:
        """Take the texts."""
        self.texts, self.device = [list(text) for text in texts], target_cache.offsets.device

    def propose(self, gamma: int) -> Proposal:
        """Guess what followed; -1 where there is nothing to go by."""
        guesses = [self.find(text, gamma) for text in self.texts]
        width = gamma if any(guesses) else 0
        self.drafted = [guess + [-1] * (width - len(guess)) for guess in guesses]
        return Proposal(
            torch.tensor(self.drafted, dtype=torch.long, device=self.device).reshape(
                len(guesses), width
            )
        )

    def find(self, text: list[int], gamma: int) -> list[int]:
        """What followed the longest ending of a text that stood earlier: latest with gamma tokens after it, or first.

        >>> LookupProposer().find([5, 6, 7, 8, 5, 6], gamma=2)
        [7, 8]
        """
        ids = np.asarray(text)
        for n in range(min(self.longest, len(text) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], n)
            ends = (windows == ids[-n:]).all(1).nonzero()[0] + n
            if len(ends):
                whole = ends[ends + gamma <= len(text)]
                start = whole[-1] if len(whole) else ends[0]
                return text[start : start + gamma]
        return []

    def accept(self, accepted: list[int], next_tokens: list[int], target_cache: Slots) -> None:
        """Keep what was accepted."""
        for row, n in enumerate(accepted):
            self.texts[row] += [*self.drafted[row][:n], next_tokens[row]] if n >= 0 else []


class _Clock:
    """Seconds between marks: on a GPU by events in its stream, so that the host need not wait."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def mark(self) -> float | torch.cuda.Event:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, a: float | torch.cuda.Event, b: float | torch.cuda.Event) -> float:
        if not self.cuda:
            return b - a
        b.synchronize()
        return a.elapsed_time(b) / 1000


def _per_row(given, rows: int) -> list[Prefix | None]:
    """One prefix for all rows, or one for each, also from what `prefill` and `load` return."""
    alone = given is None or hasattr(given, "next_position")
    _require(
        alone or isinstance(given, list | tuple), "prefix is neither a Prefix nor a list of them."
    )
    _require(alone or len(given) == rows, f"There are {0 if alone else len(given)} prefixes for {rows} rows: give "
             "one for all, or one for each, as Prefix(cache, next_position, ids).")  # fmt: skip
    if not alone:
        return [_per_row(one, 1)[0] for one in given]
    if given is not None and not isinstance(given, Prefix):
        given = Prefix(given.cache, given.next_position)
    return [
        given and given._replace(input_ids=torch.as_tensor(given.input_ids).flatten().tolist())
    ] * rows


def _prompts(input_ids: Tensor | Sequence[Tensor], size: int) -> Texts:
    """Rows of token ids, from (B, T) or a list of (T,) of any lengths."""
    wanted = "give input_ids as a tensor (B, T), or as a list of (T,) of any lengths, one a prompt"
    try:
        rows = [torch.as_tensor(row) for row in input_ids]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"input_ids is {type(input_ids).__name__}: {wanted}.") from error
    _require(len(rows) > 0, f"There is no prompt: {wanted}.")
    for row in rows:
        _require(row.ndim == 1, f"A prompt has shape {tuple(row.shape)}, expected (T,): {wanted}.")
        _require(row.numel() > 0, f"A prompt is empty, expected at least one token: {wanted}.")
        whole = not row.is_floating_point() and row.dtype != torch.bool
        seen = f"Token ids are {row.dtype} from {row.min().item()} to {row.max().item()}"
        _require(
            whole and row.min() >= 0 and row.max() < size,
            f"{seen}, expected whole numbers below {size}.",
        )
    return [row.tolist() for row in rows]


def _ends(model: PreTrainedModel, eos_token_id: int | Sequence[int] | None) -> set[int]:
    given = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    _require(
        not isinstance(given, str),
        f"eos_token_id is the text {given!r}, expected the id of a token, or several.",
    )
    return set() if given is None else set(np.asarray(given, dtype=int).flatten().tolist())


class _Rows:
    """The texts so far, and how many tokens each may still gain (0: it has ended)."""

    def __init__(self, texts: Texts, max_new_tokens: int, ends: set[int]):
        self.texts, self.left, self.ends = texts, [max_new_tokens] * len(texts), ends

    def extend(self, row: int, tokens: list[int]) -> list[int]:
        """Add tokens up to the end of the text, and return those."""
        stop = next((i + 1 for i, token in enumerate(tokens) if token in self.ends), None)
        kept = tokens[: self.left[row]][:stop]
        self.texts[row] += kept
        self.left[row] = 0 if kept and kept[-1] in self.ends else self.left[row] - len(kept)
        return kept


@torch.inference_mode()
def decode(
    target: PreTrainedModel | Runner,
    input_ids: Tensor | Sequence[Tensor],
    proposer: Proposer | None = None,
    *,
    gamma: "int | AdaptiveGamma" = 4,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    prefix: Prefix | Sequence[Prefix] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> Iterator[Round]:
    """Decode, and yield a `Round` after each target call: print its tokens as they come, or keep all for `summarize`.

    The text is the target's own: with greedy choice token for token, with sampling in distribution
    (for any proposer that tells the truth about q). Without a proposer this is plain decoding, one
    token a round.

    Args:
        target: a causal LM, or a Runner around one.
        input_ids: (B, T), or a list of prompts (T,) of any lengths; what follows the prefix, if
            there is one. There is no attention mask, so no padding: prompts of different lengths go
            into a list.
        proposer: what drafts; default: nothing does.
        gamma: tokens to draft a round.
        max_new_tokens: of each row; the end is exact, also inside a round.
        sampling: default: greedy.
        prefix: what was read before: one for all rows, or one for each.
        eos_token_id: where a row ends; default: the target's own; [] for nowhere.

    Example:
        >>> from kvlab import lab
        >>> prompt = lab.load_tokenizer("lab-target")("Anna lives in", return_tensors="pt").input_ids
        >>> draft = ModelProposer(lab.load("lab-draft"))
        >>> rounds = list(decode(lab.load("lab-target"), prompt, draft, max_new_tokens=8))
        >>> sum(len(r.tokens[0]) for r in rounds) <= 8
        True
    """
    runner, sampling = (
        target if isinstance(target, Runner) else Runner(target),
        sampling or Sampling(),
    )
    widest = gamma.maximum if isinstance(gamma, AdaptiveGamma) else gamma
    for name, value in (("gamma", widest), ("max_new_tokens", max_new_tokens)):
        _require(
            isinstance(value, int) and value > 0,
            f"{name} is {value!r}, expected a whole number from 1.",
        )
    _require(
        isinstance(sampling, Sampling),
        f"sampling is {sampling!r}: give a Sampling(temperature, ...).",
    )
    seen = f"The proposer is a {type(proposer).__name__}, expected an object with start, propose and accept"
    _require(
        proposer is None or callable(getattr(proposer, "propose", None)),
        f"{seen}: ModelProposer(draft), say.",
    )
    size = runner.model.get_input_embeddings().num_embeddings
    prompts = _prompts(input_ids, size)
    prefixes, room, clock = (
        _per_row(prefix, len(prompts)),
        max_new_tokens + widest + 1,
        _Clock(runner.model.device),
    )
    texts = [
        [*(p.input_ids if p else ()), *prompt] for p, prompt in zip(prefixes, prompts, strict=True)
    ]
    rows, nothing = (
        _Rows(texts, max_new_tokens, _ends(runner.model, eos_token_id)),
        [[] for _ in texts],
    )

    began, start = time.perf_counter(), clock.mark()
    token = sampling.choose(runner.start(prompts, prefixes, room)[:, None], texts)[0]  # (B,)
    read, text = clock.mark(), runner.text
    gained = [rows.extend(row, [one]) for row, one in enumerate(token.tolist())]
    seconds = (0.0, clock.between(start, read), time.perf_counter() - began)
    yield (last := Round(nothing, [0] * len(texts), gained, *seconds, reading=True))
    if proposer and any(rows.left):
        began, start = time.perf_counter(), clock.mark()
        proposer.start(texts, runner.slots, sampling, room)
        seconds = (clock.between(start, clock.mark()), 0.0, time.perf_counter() - began)
        yield Round(nothing, [0] * len(texts), nothing, *seconds, reading=True)

    while any(rows.left):
        _require(
            runner.text is text,
            "The Runner began another text before this one ended: give each its own Runner.",
        )
        began, start = time.perf_counter(), clock.mark()
        g = gamma(last) if isinstance(gamma, AdaptiveGamma) else gamma
        proposal = proposer.propose(g) if proposer else Proposal(token.new_empty(len(texts), 0))
        drafted = clock.mark()
        given = proposal.tokens.clamp(
            0, size - 1
        )  # what cannot be accepted still has to be read as something
        logits = runner(torch.cat((token[:, None], given), 1), runner.slots.lengths)
        accepted, token = _judge(logits, proposal, sampling, texts, g)
        judged = clock.mark()
        drafts, counts, gained = [], [], []
        result = torch.cat(
            (proposal.tokens, accepted[:, None], token[:, None]), 1
        ).tolist()  # a GPU is waited for here
        for row, (*guess, n, one) in enumerate(result):
            going = rows.left[row] > 0
            drafts.append(guess if going else [])
            counts.append(n if going else 0)
            gained.append(rows.extend(row, [*guess[:n], one]) if going else [])
            runner.slots.lengths[row] += n + 1 if rows.left[row] else 0
        if proposer:
            heard = [n if left else -1 for n, left in zip(counts, rows.left, strict=True)]
            proposer.accept(heard, [row[-1] for row in result], runner.slots)
        seconds = (
            clock.between(start, drafted),
            clock.between(drafted, judged),
            time.perf_counter() - began,
        )
        yield (last := Round(drafts, counts, gained, *seconds))


def _judge(
    logits: Tensor, proposal: Proposal, sampling: Sampling, texts: Texts, gamma: int
) -> tuple[Tensor, Tensor]:
    """Verify a proposal by the target's logits (B, g + 1, V) after the last token of each text and after each guess."""
    scores = sampling.scores(logits, sampling.contexts(texts, proposal.tokens.T))
    if sampling.greedy:
        return match(scores.argmax(-1), proposal)
    return verify(
        scores.softmax(-1), proposal, sampling.uniform(len(logits), gamma + 1, logits.device)
    )


class Generated(NamedTuple):
    """New tokens of each row, (n,), and the rounds that made them."""

    tokens: list[Tensor]
    rounds: list[Round]


def generate(
    target: PreTrainedModel | Runner, input_ids: Tensor | Sequence[Tensor], *args, **options
) -> Generated:
    """Run `decode`, with the same arguments, to the end.

    Example:
        >>> from kvlab import lab
        >>> prompt = lab.load_tokenizer("lab-target")("Anna lives in", return_tensors="pt").input_ids
        >>> len(generate(lab.load("lab-target"), prompt, LookupProposer(), max_new_tokens=8).tokens[0]) <= 8
        True
    """
    rounds = list(decode(target, input_ids, *args, **options))
    rows = zip(*(r.tokens for r in rounds), strict=True)
    return Generated(
        [torch.tensor([i for ids in row for i in ids], dtype=torch.long) for row in rows], rounds
    )


@dataclass(frozen=True)
class Summary:
    """What rounds add up to. Lists have an entry for each drafted position, fractions are of 1, times in seconds.

    `conditional[k]` : of the guesses at position k + 1 that were reached (all before accepted), the
    share accepted. `unconditional[k]` : of all guesses at position k + 1, the share accepted.
    `acceptance` : of all guesses that were reached, the share accepted. `tokens_per_call` : gained
    by a row in a round, the target's own included. `draft_calls` : drafted positions of all rounds;
    one call of a draft model each. Rounds that read a prompt count in `reading_seconds` and
    `first_token_seconds` (mean over texts) only.
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
    reading_seconds: float
    first_token_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, prompts apart."""
        return self.tokens / self.seconds if self.seconds else float("nan")


def _tested(r: Round, row: int) -> tuple[int, int]:
    """How many guesses of a row were reached, and how many of them accepted, as far as the text went."""
    guesses, gained, n = (
        sum(token >= 0 for token in r.drafted[row]),
        len(r.tokens[row]),
        r.accepted[row],
    )
    return (min(n + 1, guesses), n) if gained == n + 1 else (gained, gained)


def summarize(rounds: Sequence[Round]) -> Summary:
    """Add up the rounds of one text or of many.

    Example:
        >>> rounds = [Round([[5, 6]], [1], [[5, 9]], 0.1, 0.2, 0.3), Round([[7, 8]], [2], [[7, 8, 4]], 0.1, 0.2, 0.3)]
        >>> summary = summarize(rounds)
        >>> summary.conditional, summary.tokens_per_call, round(summary.tokens_per_second, 2)
        ([1.0, 0.5], 2.5, 8.33)
    """
    reading, rounds = [r for r in rounds if r.reading], [r for r in rounds if not r.reading]
    steps = [(r, row) for r in rounds for row in range(len(r.tokens)) if r.tokens[row]]
    widest = max((len(r.drafted[row]) for r, row in steps), default=0)
    made, reached, passed = np.zeros(widest), np.zeros(widest), np.zeros(widest)
    for r, row in steps:
        tested, accepted = _tested(r, row)
        made[: sum(token >= 0 for token in r.drafted[row])] += 1
        reached[:tested] += 1
        passed[:accepted] += 1
    tokens, firsts = (
        sum(len(r.tokens[row]) for r, row in steps),
        [r for r in reading if any(r.tokens)],
    )
    return Summary(
        tokens=tokens,
        target_calls=len(rounds),
        draft_calls=sum(max(map(len, r.drafted)) for r in rounds),
        acceptance=_share(passed.sum(), reached.sum()),
        conditional=[_share(*pair) for pair in zip(passed, reached, strict=True)],
        unconditional=[_share(*pair) for pair in zip(passed, made, strict=True)],
        tokens_per_call=_share(tokens, len(steps)),
        seconds=sum(r.seconds for r in rounds),
        draft_seconds=sum(r.draft_seconds for r in rounds),
        target_seconds=sum(r.target_seconds for r in rounds),
        reading_seconds=sum(r.seconds for r in reading),
        first_token_seconds=_share(sum(r.seconds for r in firsts), len(firsts)),
    )


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


class Expected(NamedTuple):
    """Tokens gained a target call, and how many times faster than plain decoding."""

    tokens_per_call: float
    speedup: float


def cost_model(
    acceptance: float | Sequence[float],
    c: float,
    gamma: int,
    v: float | Callable[[int], float] = 1.0,
) -> Expected:
    """Tokens a call and speed-up of speculative decoding (Leviathan et al. 2023, equation 1 and theorem 3.8).

    E = 1 + sum over k of a_1 ... a_k, which is (1 - a^(gamma + 1)) / (1 - a) if all a_k are alike,
    and the speed-up is E / (gamma c + v): the paper has v = 1, a target call that costs the same
    for any number of tokens.

    Args:
        acceptance: a, or the conditional a_k by position (at least gamma of them).
        c: seconds of one draft step over seconds of one target step.
        gamma: drafted tokens a round.
        v: seconds of a target call on gamma + 1 tokens over that on one; a number, or a function of
            gamma.

    Example:
        >>> [round(value, 4) for value in cost_model(0.8, c=0.1, gamma=6)]
        [3.9514, 2.4696]
    """
    chain = [float(acceptance)] * gamma if np.ndim(acceptance) == 0 else list(acceptance[:gamma])
    _require(
        gamma >= 0 and len(chain) == gamma,
        f"acceptance has {len(chain)} positions, expected gamma = {gamma} or more.",
    )
    _require(
        all(0 <= a <= 1 for a in chain),
        f"acceptance is {acceptance}, expected fractions between 0 and 1.",
    )
    tokens = 1.0 + float(np.cumprod(chain).sum())
    return Expected(tokens, tokens / (gamma * c + (v(gamma) if callable(v) else v)))


def best_gamma(
    acceptance: float | Sequence[float],
    c: float,
    v: float | Callable[[int], float] = 1.0,
    maximum: int = 16,
) -> int:
    """The gamma up to `maximum` with the largest predicted speed-up; 0 if none is faster than plain decoding.

    Example:
        >>> best_gamma(0.8, c=0.1), best_gamma(0.3, c=0.5)
        (6, 0)
    """
    top = maximum if np.ndim(acceptance) == 0 else min(maximum, len(acceptance))
    speedups = [1.0, *(cost_model(acceptance, c, gamma, v).speedup for gamma in range(1, top + 1))]
    return int(np.argmax(speedups))


def costs(speculative: Summary, plain: Summary) -> tuple[float, float]:
    """Measured c and v: seconds of a draft step and of a verification, over those of a plain target step.

    >>> plain = summarize([Round([[]], [0], [[5]], 0.0, 2.0, 2.0)])
    >>> costs(summarize([Round([[5]], [1], [[5, 6]], 1.0, 2.5, 3.5)]), plain)
    (0.5, 1.25)
    """
    enough = plain.target_calls and speculative.draft_calls and speculative.target_calls
    _require(
        enough,
        "Costs need rounds with a draft, and plain ones to compare: costs(speculative, plain).",
    )
    step = plain.target_seconds / plain.target_calls
    c = speculative.draft_seconds / speculative.draft_calls
    return c / step, speculative.target_seconds / speculative.target_calls / step


@dataclass
class AdaptiveGamma:
    """A gamma that follows the text: the best for the acceptance seen lately, given c and v (measure them: `costs`).

    Where drafting does not pay it is 0, and the target decodes alone; then what was seen fades, and
    `prior`, the acceptance assumed before anything is seen, has another try. `memory` is the weight
    that a round keeps in the next.

    >>> gamma, reading = AdaptiveGamma(c=0.2), Round([[]], [0], [[4]], 0.0, 0.2, 0.2, reading=True)
    >>> gamma(reading), gamma(Round([[5, 6, 7]], [3], [[5, 6, 7, 8]], 0.1, 0.2, 0.3))
    (3, 8)
    """

    c: float
    v: float | Callable[[int], float] = 1.0
    maximum: int = 8
    prior: float = 0.7
    memory: float = 0.8

    def __call__(self, last: Round) -> int:
        if last.reading:
            self._accepted = self._reached = 0.0
        pairs = [_tested(last, row) for row in range(len(last.tokens)) if last.tokens[row]]
        reached, accepted = np.mean(pairs, 0)
        self._accepted = self.memory * self._accepted + accepted
        self._reached = self.memory * self._reached + reached
        weight = 0.25  # of the prior, against one guess that was tested in this round
        acceptance = (weight * self.prior + self._accepted) / (weight + self._reached)
        return best_gamma(acceptance, self.c, self.v, self.maximum)
