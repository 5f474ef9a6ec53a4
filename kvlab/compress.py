"""Shrink a KV cache and keep what it knows: scores by which entries are kept, eviction, and KV-Distill.

A score says how much each entry of a context is worth, (B, H_kv, T), from what one attention layer
computed. `evict` keeps the best of each head and forgets the rest. `KVDistiller` (Chari and Van
Durme 2025, arXiv 2503.10337) learns both: which tokens to keep, and how to write into them what the
others said. What both return is an ordinary cache with its next position: the unchanged model goes
on from there. No function here knows what a cache is used for.

>>> from kvlab import lab
>>> model, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
>>> ids = tokenizer("Anna lives in Rome. Ben has a dog.", return_tensors="pt").input_ids
>>> kept = evict(model, ids, key_norm, retention=0.5)
>>> length(kept.prefix.cache), kept.prefix.next_position
(6, 12)
"""

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlab.cache import (
    Prefix,
    from_tensor,
    length,
    prefill,
    scale_keys,
    select,
    shift,
    to_tensor,
    truncate,
)
from kvlab.files import write_tensors, write_text
from kvlab.generation import encode_parts
from kvlab.losses import distillation_losses
from kvlab.models import differences, fingerprint, first_layers, require, require_supported
from kvlab.training import fit

GATES = ("multiply", "log", "none")
ROUTINGS = ("conditional", "all", "embedding")
SCORER, ABOUT = "scorer.safetensors", "kvdistill.json"


# -- scores


class Attention(NamedTuple):
    """What one attention layer computed: rotated queries (B, H, T, D), keys and values (B, H_kv, T, D), all in order.

    The first `context` entries can be evicted; those behind them are a question, if there are any.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    context: int


Score = Callable[
    [Attention, int], Tensor
]  # what was computed, and how many entries stay: (B, H_kv, context)


def random(seen: Attention, budget: int) -> Tensor:
    """Any entries, each head its own: what every method must do better than."""
    return torch.rand(*seen.keys.shape[:2], seen.context, device=seen.keys.device)


def sinks_recent(seen: Attention, budget: int, sinks: int = 4) -> Tensor:
    """The first four entries and the latest (StreamingLLM: Xiao et al. 2023, arXiv 2309.17453, section 3.2).

    The source counts positions inside the cache, as `compact` does; `evict` leaves them.
    """
    places = torch.arange(seen.context, device=seen.keys.device, dtype=torch.float32)
    return _pinned(places.expand(*seen.keys.shape[:2], -1), first=min(sinks, budget))


def key_norm(seen: Attention, budget: int) -> Tensor:
    """The smaller a key, the more attention it tends to get (Devoto et al. 2024, arXiv 2406.11430, section 3).

    The source leaves the first two layers whole; here all give the same share.
    """
    return -seen.keys[:, :, : seen.context].float().norm(dim=-1)


def key_norm_reversed(seen: Attention, budget: int) -> Tensor:
    """The larger a key the better, as no source has it: where keys are normalized (Qwen3), the sign may turn round."""
    return -key_norm(seen, budget)


def h2o(seen: Attention, budget: int, chunk: int = 512) -> Tensor:
    """Attention received from all queries, summed; half the budget is for the latest entries.

    Source: Zhang et al. (2023), H2O, arXiv 2306.14048, algorithm 1, which evicts step by step while
    it decodes; this evicts once, after the context. Queries that share keys add up. They are taken
    `chunk` at a time: memory is (B, H, chunk, T).
    """
    total = seen.queries.shape[2]
    parts = (_weights(seen, start, min(start + chunk, total)) for start in range(0, total, chunk))
    received = sum(part.sum((2, 3)) for part in parts)
    return _pinned(received[..., : seen.context], last=budget // 2)


def snapkv(seen: Attention, budget: int, window: int = 32, kernel: int = 5) -> Tensor:
    """Attention that the last tokens pay to each entry, smoothed over neighbors; these last tokens are kept.

    Source: Li et al. (2024), SnapKV, arXiv 2404.14469, section 4 and listing 1 (whose pooling is an
    average in their code; they let each query head choose, here those of a group choose together).
    The window is the end of a question, or, without one, at most half the budget: the source's
    budgets are far larger than its window.
    """
    total, context = seen.queries.shape[2], seen.context
    window = min(window, total - context or max(1, budget // 2))
    before = max(0, min(context, total - window))  # entries in front of the window
    votes = _weights(seen, total - window, total).sum(3).mean(2)[..., :before]  # (B, H_kv, before)
    if before:
        votes = F.avg_pool1d(votes, kernel, stride=1, padding=kernel // 2)
    return F.pad(votes, (0, context - before), value=float("inf"))


METHODS: dict[str, Score] = {
    f.__name__: f for f in (random, sinks_recent, h2o, snapkv, key_norm, key_norm_reversed)
}
AWARE: dict[str, Score] = {
    f"{f.__name__}_aware": f for f in (h2o, snapkv)
}  # with a question behind the context


def _weights(seen: Attention, start: int, stop: int) -> Tensor:
    """Causal attention of some of the queries, (B, H_kv, H / H_kv, stop - start, T)."""
    keys, total = seen.keys[:, :, None], seen.keys.shape[2]
    queries = seen.queries[:, :, start:stop].unflatten(1, (seen.keys.shape[1], -1))
    logits = queries.float() @ keys.float().mT * seen.scaling
    places = torch.arange(total, device=keys.device)
    return logits.masked_fill(places > places[start:stop, None], float("-inf")).softmax(-1)


def _pinned(scores: Tensor, first: int = 0, last: int = 0) -> Tensor:
    """Scores with which the first and the last entries are kept whatever the others have."""
    places = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill((places < first) | (places >= scores.shape[-1] - last), float("inf"))


# -- eviction


class Compressed(NamedTuple):
    """What is left of a context.

    prefix : the smaller cache, where to go on, and the whole context's token ids. positions : of
    the kept entries, in order: (1, k), or (L, 1, H_kv, k) where heads keep their own. scores : of
    all entries, (1, T) or (L, 1, H_kv, T). Those that a score always keeps have infinity; a
    distiller's first tokens are kept whatever they have. bias : (1, k) or None; what a decoder must
    add to the attention logits of these entries (gate "log" only).
    """

    prefix: Prefix
    positions: Tensor
    scores: Tensor
    bias: Tensor | None = None


@contextmanager
def observing(
    model: PreTrainedModel, see: Callable[[Tensor, Tensor, Tensor, float], None]
) -> Iterator[None]:
    """Have `see(queries, keys, values, scaling)` called with what each attention layer computes, in order.

    The layers run with PyTorch's attention meanwhile, through a name in transformers' registry that
    is taken out again.
    """
    name, config = f"kvlab_observing_{id(see)}", model.config.get_text_config(decoder=True)
    plain, before = ALL_ATTENTION_FUNCTIONS["sdpa"], config._attn_implementation

    def attention(module, query, key, value, attention_mask, scaling=None, **options):
        see(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return plain(module, query, key, value, attention_mask, scaling=scaling, **options)

    ALL_ATTENTION_FUNCTIONS[name], ALL_MASK_ATTENTION_FUNCTIONS[name] = (
        attention,
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"],
    )
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[name], ALL_MASK_ATTENTION_FUNCTIONS[name]


def count_kept(entries: int, retention: float | None = None, budget: int | None = None) -> int:
    """How many of so many entries stay: a share of them, at least one, or a number, at most all.

    >>> count_kept(90, retention=0.1), count_kept(90, budget=200)
    (9, 90)
    """
    require(
        (retention is None) != (budget is None),
        "Give either retention, a share, or budget, a number of entries.",
    )
    if budget is not None:
        require(
            budget == int(budget) and budget > 0,
            f"budget is {budget}, expected a whole number from 1.",
        )
        return min(int(budget), entries)
    require(0 < retention <= 1, f"retention is {retention}, expected a share above 0, at most 1.")
    return max(1, round(retention * entries))


@torch.no_grad()
def evict(
    model: PreTrainedModel,
    input_ids: Tensor,
    score: Score,
    *,
    retention: float | None = None,
    budget: int | None = None,
    question_ids: Tensor | None = None,
    shared: bool = False,
) -> Compressed:
    """Read a context, keep the entries with the best scores, and forget the rest: their memory is free.

    Args:
        input_ids: (1, T), the context.
        score: one of METHODS, or any function like them. It is asked in each layer.
        retention, budget: a share of the T entries, or their number; the same in each head.
        question_ids: (1, Q), a question that is known beforehand. It is read behind the context for
            the scores only, and is to be read again behind what is kept: a method that knows it
            answers this one question.
        shared: keep the same entries in all heads and layers, by the mean of their scores.

    Raises:
        CacheError: the model's cache cannot be cut. ValueError : both or neither of retention and
            budget, or no text.

    Example:
        >>> from kvlab import lab
        >>> model, ids = lab.load("lab-target"), torch.arange(10, 30)[None]
        >>> evict(model, ids, sinks_recent, budget=6, shared=True).positions
        tensor([[ 0,  1,  2,  3, 18, 19]])
    """
    _require_text(model, input_ids)
    total, scores, read = input_ids.shape[1], [], input_ids
    if question_ids is not None:
        _require_text(model, question_ids, "question_ids")
        read = torch.cat([input_ids, question_ids], 1)
    k = count_kept(total, retention, budget)
    with observing(model, lambda *seen: scores.append(score(Attention(*seen, total), k))):
        cache = prefill(model, read).cache
    scores = torch.stack(scores)  # (L, 1, H_kv, T)
    if shared:
        scores = scores.mean((0, 2))  # (1, T)
    positions = scores.topk(k).indices.sort().values
    return Compressed(
        Prefix(select(cache, positions), total, input_ids[0].tolist()), positions, scores
    )


def _require_text(model: PreTrainedModel, input_ids: Tensor, name: str = "input_ids") -> None:
    shape, most = (
        tuple(input_ids.shape),
        model.config.get_text_config(decoder=True).max_position_embeddings,
    )
    require(
        len(shape) == 2 and shape[0] == 1 and shape[1] > 0,
        f"{name} is {shape}, expected (1, T), one text.",
    )
    require(
        shape[1] <= most, f"{name} has {shape[1]} tokens, the model reads up to {most}: give fewer."
    )


def compact(compressed: Compressed, rotary: nn.Module) -> Compressed:
    """Move the kept entries to positions 0 to k - 1, so that the next position is their number, as `generate` expects.

    Distances between entries shrink, so logits change wherever a gap is closed; where nothing was
    evicted between or behind the kept ones, the model says the same. `rotary` is `rotary_of` the
    model.

    >>> from kvlab import cache, lab
    >>> model, ids = lab.load("lab-target"), torch.arange(10, 30)[None]
    >>> small = compact(evict(model, ids, key_norm, budget=6), cache.rotary_of(model)).prefix
    >>> small.next_position, length(small.cache)
    (6, 6)
    """
    prefix, positions = compressed.prefix, compressed.positions
    k = positions.shape[-1]
    moved = shift(prefix.cache, torch.arange(k, device=positions.device) - positions, rotary)
    return compressed._replace(prefix=Prefix(moved, k, prefix.input_ids))


# -- KV-Distill


@dataclass(frozen=True)
class DistillSettings:
    """What a `KVDistiller` is made of.

    layer : eta; tokens are scored by the hidden states after so many layers (the source: 6 of 32).
    rank : of the adapters, rank-stabilized LoRA on q, k, v and o (the source: 128), and alpha,
    which it does not state. width : of the scorer's hidden layer, which the source does not state.
    gate : "multiply", as in the source: logits to kept entries times sigma(s), which is their keys
    times sigma(s); "log": plus log sigma(s), which no key can hold; "none": then the scorer cannot
    learn. standardize : bring the scores of a context to mean 2 and deviation 1, as the source does
    not. Free scores may grow until all gates of kept tokens are open; then nothing tells the scorer
    which of them is worth more. The price: gates are never all open, so that even with retention 1
    the cache is not quite the plain one. routing : "conditional", as in the source: the adapters of
    q and o act on kept tokens only; "all": on every token; "embedding": the same, and kept tokens
    are marked by a learned vector instead. sinks : so many first tokens are always kept (the
    source: fewer than ten). row : longer contexts are read in rows of so many tokens, which do not
    see one another.
    """

    layer: int
    rank: int = 128
    width: int = 1024
    gate: str = "multiply"
    standardize: bool = False
    routing: str = "conditional"
    sinks: int = 4
    row: int = 1536

    def __post_init__(self):
        for name, known in (("gate", GATES), ("routing", ROUTINGS)):
            given = getattr(self, name)
            require(given in known, f"{name} is {given!r}, expected one of {', '.join(known)}.")
        for name in ("layer", "rank", "width", "row"):
            require(
                getattr(self, name) > 0,
                f"{name} is {getattr(self, name)}, expected a number from 1.",
            )


class Scorer(nn.Module):
    """s = FFN(h): one number a token, from hidden states (..., d). Starts at 3 or so (if left free): open gates."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(
            hidden_size, elementwise_affine=False
        )  # the residual stream has any scale
        self.up, self.down = nn.Linear(hidden_size, width), nn.Linear(width, 1)
        nn.init.constant_(self.down.bias, 3.0)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(hidden.to(self.up.weight.dtype)))))[..., 0]


class _Kept(NamedTuple):
    """Kept entries of B contexts: the cache, positions (B, k), all scores (B, T), and the contexts' lengths (B,)."""

    cache: DynamicCache
    bias: Tensor  # (B, k), added to the logits of entries; -inf where a row keeps fewer
    positions: Tensor
    scores: Tensor
    lengths: Tensor


class KVDistiller(nn.Module):
    """Chooses the tokens of a context to keep, and writes what the others said into their keys and values.

    First pass: the frozen model up to layer eta, and a scorer on its hidden states; the k best
    tokens stay, the same in all layers. Second pass: the whole context through the model with
    adapters. Kept keys are scaled by sigma(s). The model itself, unchanged, reads on from what is
    kept. Source: Chari and Van Durme (2025), arXiv 2503.10337.

    The model given is frozen and left as it is: `adapted` is a PEFT model around modules of its own
    that share the model's weights. Trained are the adapters and the scorer, in float32.

    Example:
        >>> from kvlab import lab
        >>> distiller = KVDistiller(lab.load("lab-target"), rank=8)
        >>> kept = distiller.compress(torch.arange(10, 30)[None], retention=0.25)
        >>> kept.positions.shape, kept.prefix.next_position
        (torch.Size([1, 5]), 20)
    """

    def __init__(self, model: PreTrainedModel, layer: int | None = None, **settings):
        super().__init__()
        require_supported(model)
        kind = model.config._attn_implementation
        seen = f"The model's attention is {kind!r}, which takes no mask of numbers"
        require(kind in ("sdpa", "eager"), f"{seen}: load it with attn_implementation='sdpa'.")
        config = model.config.get_text_config(decoder=True)
        have = config.num_hidden_layers
        settings = DistillSettings(
            layer=max(1, round(have * 6 / 32)) if layer is None else layer, **settings
        )
        require(
            settings.layer <= have,
            f"layer is {settings.layer}, but the model has {have} layers: give 1 to {have}.",
        )
        self.settings, self.model = settings, model.requires_grad_(False)
        lora = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.rank,
            use_rslora=True,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            exclude_modules=rf".*\.{have - 1}\.self_attn\.[qo]_proj",  # no keys or values come after these
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "`is_gradient_checkpointing`", FutureWarning
            )  # PEFT's, at each call
            self.adapted = get_peft_model(_view(model), lora)
        self.scorer = Scorer(config.hidden_size, settings.width).requires_grad_(
            settings.gate != "none"
        )
        marked = settings.routing == "embedding"
        self.marker = nn.Parameter(torch.zeros(config.hidden_size)) if marked else None
        self.to(model.device)

    # -- what is kept

    def scores(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """s of each token, (B, T), standardized over the context if the settings say so.

        Gradients reach the scorer only. A mask has 0 for padding, on the left.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = _unfold(
            self._hidden(_Folded.of(input_ids, mask, self.settings.row)), *input_ids.shape
        )
        return (
            _standardized(self.scorer(hidden), mask)
            if self.settings.standardize
            else self.scorer(hidden)
        )

    @torch.no_grad()
    def _hidden(self, text: "_Folded") -> Tensor:
        """Hidden states of the frozen model after layer eta, before any last norm."""
        shallow, states = first_layers(self.model, self.settings.layer).base_model, []
        hook = shallow.layers[self.settings.layer - 1].register_forward_hook(
            lambda _, __, out: states.append(out)
        )
        try:
            shallow(**text._asdict(), use_cache=False)
        finally:
            hook.remove()
        return states[0]

    def keep(self, input_ids: Tensor, attention_mask: Tensor, counts: Tensor) -> _Kept:
        """Compress contexts (B, T), padded on the left, to counts (B,) entries; gradients reach all that is trained."""
        scores, rows = (
            self.scores(input_ids, attention_mask),
            torch.arange(len(input_ids), device=input_ids.device),
        )
        positions = _positions(attention_mask)
        ranked = scores.detach().masked_fill(positions < self.settings.sinks, float("inf"))
        ranked = ranked.masked_fill(attention_mask == 0, float("-inf"))
        best = ranked.sort(descending=True, stable=True).indices[
            :, : int(counts.max())
        ]  # of equals, the first
        real = torch.arange(best.shape[1], device=best.device) < counts[:, None]
        columns, order = best.masked_fill(
            ~real, -1
        ).sort()  # those that a row keeps, in order, on the right
        real = columns >= 0
        columns = torch.where(real, columns, best.gather(1, order))
        chosen = torch.zeros_like(attention_mask, dtype=torch.bool)
        chosen[rows[:, None].expand_as(columns)[real], columns[real]] = True
        cache, s = (
            select(self._adapted(input_ids, attention_mask, chosen), columns),
            scores.gather(1, columns),
        )
        if self.settings.gate == "multiply":
            cache = scale_keys(cache, s.sigmoid())
        bias = F.logsigmoid(s) if self.settings.gate == "log" else torch.zeros_like(s)
        places = positions.gather(1, columns)
        return _Kept(
            cache, bias.masked_fill(~real, float("-inf")), places, scores, attention_mask.sum(1)
        )

    def _adapted(self, input_ids: Tensor, mask: Tensor, chosen: Tensor) -> DynamicCache:
        """Keys and values of the adapted model for whole contexts, with the tokens to be kept routed."""
        row, inputs = self.settings.row, _Folded.of(input_ids, mask, self.settings.row)._asdict()
        if self.marker is not None:
            marked = _fold(chosen, row)[..., None] * self.marker
            words = self.model.get_input_embeddings()(inputs.pop("input_ids"))
            inputs["inputs_embeds"] = words + marked.to(words.dtype)
        with (
            routed(self.adapted, _fold(chosen, row))
            if self.settings.routing == "conditional"
            else nullcontext()
        ):
            cache = (
                self.adapted.get_base_model().base_model(**inputs, use_cache=True).past_key_values
            )
        if input_ids.shape[1] <= row:
            return cache
        whole = to_tensor(cache).unflatten(2, (len(input_ids), -1)).movedim(3, 4).flatten(4, 5)
        return from_tensor(whole[..., -input_ids.shape[1] :, :])

    @torch.no_grad()
    def compress(
        self, input_ids: Tensor, *, retention: float | None = None, budget: int | None = None
    ) -> Compressed:
        """Compress one context, (1, T), to a share of its entries or a number of them.

        The kept keys carry their gates and their places, so that the model needs nothing but the
        prefix (with gate "log" also `bias`). Raises ValueError for more than one text, or both or
        neither of retention and budget.
        """
        _require_text(self.model, input_ids)
        count = torch.tensor(
            [count_kept(input_ids.shape[1], retention, budget)], device=input_ids.device
        )
        kept = self.keep(input_ids, torch.ones_like(input_ids), count)
        prefix = Prefix(kept.cache, input_ids.shape[1], input_ids[0].tolist())
        return Compressed(
            prefix, kept.positions, kept.scores, kept.bias if self.settings.gate == "log" else None
        )

    # -- training

    def train(self, mode: bool = True) -> "KVDistiller":
        """Set the mode of all but the model, which teaches and reads as it does in use, without dropout."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(
        self, context: Tensor, context_mask: Tensor, text: Tensor, retention: float
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, S, vocab) of the model on texts behind compressed contexts, and behind whole ones.

        Args:
            context, context_mask: (B, T), padded on the left; 0 in the mask is padding.
            text: (B, S), padded on the right, whatever with.
            retention: the share of each context's tokens that is kept.
        """
        counts = [count_kept(entries, retention) for entries in context_mask.sum(1).tolist()]
        counts = torch.tensor(counts, device=context.device)
        return self.read_on(self.keep(context, context_mask, counts), text), self._teach(
            context, context_mask, text
        )

    def read_on(self, kept: _Kept, text: Tensor) -> Tensor:
        """Logits of the model itself on texts (B, S) behind what was kept."""
        rows, size = text.shape
        steps = torch.arange(size, device=text.device)
        causal = torch.zeros(size, size, device=text.device).masked_fill(
            steps > steps[:, None], float("-inf")
        )
        mask = torch.cat(
            [kept.bias[:, None].expand(-1, size, -1), causal.expand(rows, -1, -1)], -1
        )[:, None]
        places = {
            "position_ids": kept.lengths[:, None] + steps,
            "attention_mask": mask.to(self.model.dtype),
        }
        past = truncate(
            kept.cache, length(kept.cache)
        )  # a model writes into the cache that it is given
        return self.model(input_ids=text, past_key_values=past, use_cache=True, **places).logits

    @torch.no_grad()
    def _teach(self, context: Tensor, mask: Tensor, text: Tensor) -> Tensor:
        whole = torch.cat([context, text], 1), torch.cat([mask, torch.ones_like(text)], 1)
        places = {"attention_mask": whole[1], "position_ids": _positions(whole[1])}
        return self.model(
            input_ids=whole[0], use_cache=False, logits_to_keep=text.shape[1], **places
        ).logits

    # -- files

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write a PEFT adapter, scorer.safetensors, and kvdistill.json: the settings and the model's fingerprint."""
        folder, adapter = Path(folder), self.adapted.peft_config["default"]
        name = adapter.base_model_name_or_path or ""
        adapter.base_model_name_or_path = Path(name).name if Path(name).is_dir() else name
        self.adapted.save_pretrained(
            folder, save_embedding_layers=False
        )  # else it asks the hub for the model
        (folder / "README.md").unlink(
            missing_ok=True
        )  # an empty form, but for the model's path on this machine
        parts = {name: p.detach() for name, p in self._own().items()}
        write_tensors(folder / SCORER, parts, {"format": "pt"})
        text = {"version": 1, "settings": asdict(self.settings), "model": fingerprint(self.model)}
        return write_text(folder / ABOUT, json.dumps(text, indent=1) + "\n").parent

    def _own(self) -> dict[str, nn.Parameter]:
        """What is trained beside the adapters."""
        return {
            name: p
            for name, p in self.named_parameters()
            if name.split(".")[0] in ("scorer", "marker")
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: PreTrainedModel) -> "KVDistiller":
        """Read what `save_pretrained` wrote, around the model that it was trained for.

        Raises ValueError for another folder or a model of another shape; other weights give a
        warning.
        """
        folder = Path(folder)
        missing = [
            name for name in (ABOUT, SCORER, "adapter_config.json") if not (folder / name).is_file()
        ]
        require(
            not missing,
            f"{folder} has no {', '.join(missing)}: give a folder that `save_pretrained` wrote.",
        )
        about, own = json.loads((folder / ABOUT).read_text("utf-8")), fingerprint(model)
        unlike = {
            part: differences({part: about["model"][part]}, {part: own[part]}) for part in own
        }
        other = "; ".join(filter(None, (unlike["architecture"], unlike["rope"])))
        require(
            not other, f"{folder} was trained for another model ({other}): load it with that model."
        )
        same_dtype = about["model"]["weights"]["dtype"] == own["weights"]["dtype"]
        if same_dtype and unlike["weights"]:  # rounding changes every digest
            warnings.warn(
                f"{folder} was trained for other weights of this model ({unlike['weights']}).",
                stacklevel=2,
            )
        distiller = cls(model, **about["settings"])
        distiller.adapted.load_adapter(str(folder), "default", torch_device=str(model.device))
        with torch.no_grad():
            for name, tensor in load_file(folder / SCORER).items():
                distiller.get_parameter(name).copy_(tensor)
        return distiller


def _standardized(scores: Tensor, mask: Tensor, mean: float = 2.0) -> Tensor:
    """Scores (B, T) brought to a mean, and to deviation 1, over each context's tokens; equal ones to the mean."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(mask == 0, 0)
    count = mask.sum(1, keepdim=True)
    centered = (scores - scores.sum(1, keepdim=True) / count).masked_fill(mask == 0, 0)
    return mean + centered / (centered.square().sum(1, keepdim=True) / count + 1e-6).sqrt()


def _view(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in modules of its own, whose parameters and buffers are the model's: adapters stay in the copy."""
    return copy.deepcopy(
        model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    )


@contextmanager
def routed(adapted: PeftModel, chosen: Tensor) -> Iterator[None]:
    """Let the adapters of q and o act on chosen tokens (B, T) only: an adapter without bias makes nothing of zeros."""

    def only_chosen(_, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0] * chosen[..., None].to(inputs[0].dtype),)

    ends = ("q_proj.lora_A.default", "o_proj.lora_A.default")
    modules = [module for name, module in adapted.named_modules() if name.endswith(ends)]
    hooks = [module.register_forward_pre_hook(only_chosen) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Folded(NamedTuple):
    """Contexts in rows that do not see one another, (B * R, row), as a model takes them; positions go on through R."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, mask: Tensor, row: int) -> "_Folded":
        ids, mask, positions = (_fold(x, row) for x in (input_ids, mask, _positions(mask)))
        return cls(
            ids, mask.masked_fill(~mask.any(1, keepdim=True), 1), positions
        )  # a row of padding sees itself


def _fold(x: Tensor, row: int) -> Tensor:
    """(B, T) as (B * R, row), the first of each R filled up with zeros; (B, T) itself if T is no longer than a row.

    Rows are counted from the end, as padding stands in front: what else is in a batch changes
    nothing.
    """
    more = -x.shape[1] % row if x.shape[1] > row else 0
    return F.pad(x, (more, 0)).reshape(-1, row) if x.shape[1] > row else x


def _unfold(x: Tensor, rows: int, size: int) -> Tensor:
    """(B * R, row, ...) as (B, T, ...)."""
    return x.reshape(rows, -1, *x.shape[2:])[:, -size:]


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


# -- training


class Example(NamedTuple):
    """A context (T,), the turns that follow it (S,), and the weight of each of their tokens (S,)."""

    context: Tensor
    text: Tensor
    weights: Tensor


def example(
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    turns: Sequence[tuple[str, str]],
    instruction: float = 0.0,
) -> Example:
    """Tokens of a context and of (question, answer) turns behind it. Answers have weight 1, questions `instruction`.

    Several questions to one context make more of each compression, though a later one has earlier
    answers before it, for teacher and student alike. Each is put as if it were the first, so that
    chat templates that change earlier turns give what they give in use.

    >>> from kvlab import lab
    >>> made = example(lab.load_tokenizer("lab-target"), "Anna lives in Rome.", [("Where does Anna live?", "Rome")])
    >>> made.context.shape, made.weights
    (torch.Size([6]), tensor([0., 0., 0., 0., 0., 0., 0., 1., 1.]))
    """
    require(turns, "There is no turn behind the context: give a question and its answer.")
    parts, weights = [], []
    for question, answer in turns:
        roles = zip(("system", "user", "assistant"), (context, question, answer), strict=True)
        start, *turn = encode_parts(
            tokenizer, [{"role": role, "content": text} for role, text in roles]
        )
        parts += turn
        weights += [
            torch.full((len(ids),), weight)
            for ids, weight in zip(turn, (instruction, 1.0), strict=True)
        ]
    return Example(
        torch.tensor(start), torch.tensor([i for ids in parts for i in ids]), torch.cat(weights)
    )


class Examples(Dataset):
    """`example` of each of many (context, turns), made when it is asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, readings, instruction: float = 0.0):
        self.tokenizer, self.readings, self.instruction = tokenizer, readings, instruction

    def __len__(self) -> int:
        return len(self.readings)

    def __getitem__(self, index: int) -> Example:
        return example(self.tokenizer, *self.readings[index], self.instruction)


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch: contexts padded on the left, texts on the right."""
    sides = {"context": "left", "text": "right", "weights": "right"}
    batch = {
        name: nn.utils.rnn.pad_sequence(
            [getattr(e, name) for e in examples], batch_first=True, padding_side=side
        )
        for name, side in sides.items()
    }
    lengths = torch.tensor([len(e.context) for e in examples])[:, None]
    size = batch["context"].shape[1]
    return batch | {"context_mask": (torch.arange(size) >= size - lengths).long()}


def train(
    distiller: KVDistiller,
    examples: Sequence[Example] | Dataset,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 5e-5,
    retention: tuple[float, float] = (0.001, 0.8),
    forward_share: float = 0.6,
    **options,
) -> list[dict[str, float]]:
    """Teach a distiller to say behind a compressed context what the model says behind the whole one.

    The loss is lambda KL(p||q) + (1 - lambda) KL(q||p) over the vocabulary, p with the whole
    context, on tokens by their weights. Source: Chari and Van Durme (2025), arXiv 2503.10337,
    section 3.3.

    Args:
        retention: each batch keeps a share drawn between these, evenly on a logarithmic scale (the
            source does not say how it draws).
        forward_share: lambda.
        options: of `kvlab.training.fit`: checkpoint, every, accumulate, precision, seed, evaluate,
            ...

    Returns:
        The history of `fit`; "kl" and "reverse_kl" have their shares in them.
    """
    shares = {"kl": forward_share, "reverse_kl": 1 - forward_share}
    shares = {name: share for name, share in shares.items() if share}
    low, high = map(math.log, retention)
    PartialState(
        cpu=distiller.model.device.type == "cpu"
    )  # before `fit`, which would take the best device there is

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        share = math.exp(low + (high - low) * torch.rand(()).item())
        logits, target_logits = model(batch["context"], batch["context_mask"], batch["text"], share)
        return distillation_losses(shares, logits, target_logits, batch["text"], batch["weights"])

    loader = DataLoader(
        examples, batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=collate
    )
    defaults = {"weight_decay": 0.0, "warmup": max(1, steps // 20)}
    options = {"weight": lambda batch: batch["weights"][:, 1:].sum()} | defaults | options
    return fit(distiller, loader, losses, steps=steps, learning_rate=learning_rate, **options)
