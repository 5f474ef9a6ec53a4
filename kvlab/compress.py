"""Eviction: scores of the entries of a KV cache, and a cache of those with the best scores only.

A score is a function of the queries, keys and values of one attention layer; it returns one number
per entry, (B, H_kv, T). `evict` keeps the entries with the highest scores and frees the others. The
result is a `Prefix`, which the unchanged model continues at the next position. Its cache is an
ordinary one if all heads keep the same number of entries; see `kvlab.ragged` for the other.

>>> from kvlab import lab
>>> model, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
>>> ids = tokenizer("Anna lives in Rome. Ben has a dog.", return_tensors="pt").input_ids
>>> prefix = evict(model, ids, key_norm, retention=0.5)
>>> length(prefix.cache), prefix.next_position
(6, 12)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlab.cache import Prefix, from_ragged, length, prefill, select, shift
from kvlab.generation import encode_parts, end_tokens
from kvlab.models import position_limit, require_supported, rotary_of, rotate_keys, use_attention
from kvlab.ragged import is_ragged, pack

SCOPES = ("head", "layer", "model", "token")  # where entries compete for the budget
MAXIMUM_BIAS = 3  # of attention matching


class Attention(NamedTuple):
    """The input of one attention layer for a context and, after it, a question (if one is known).

    Args:
        queries: (B, H, Q, D), rotated, of the last Q of the T tokens: those that are read now. Q is
            T, unless the tokens are read after a prefix.
        keys: (B, H_kv, T, D), rotated.
        values: (B, H_kv, T, D).
        scaling: factor of the attention logits.
        context: length of the context, the first entries. Only these can be evicted.
        part: the entries to score, where that is only a part of the context.
        hidden_states: (B, Q, hidden size), the input of the layer (after its norm).
        positions: of the T tokens, (B | 1, H_kv | 1, T).
        layer: the module, with its weights.
        rotary: the rotary embedding of the model.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    context: int
    part: slice = slice(0, None)
    hidden_states: Tensor | None = None
    positions: Tensor | None = None
    layer: nn.Module | None = None
    rotary: nn.Module | None = None


Score = Callable[[Attention, int], Tensor]  # (attention, budget) -> (B, H_kv, context)


def random(attention: Attention, budget: int) -> Tensor:
    """Random entries, drawn for each head: the baseline of every method."""
    shape = (*attention.keys.shape[:2], attention.context)
    return torch.rand(shape, device=attention.keys.device)


def sinks_recent(attention: Attention, budget: int, sinks: int = 4) -> Tensor:
    """The first entries (attention sinks) and the most recent ones.

    Source: Xiao et al. (2023), StreamingLLM, arXiv 2309.17453, section 3.2. The paper counts
    positions inside the cache, as `compact` does; `evict` does not change them.
    """
    if sinks < 0:
        raise ValueError(f"sinks is {sinks}, expected 0 or more.")
    scores = torch.arange(attention.context, device=attention.keys.device).float()
    scores[: min(sinks, budget)] = float("inf")
    return scores.expand(*attention.keys.shape[:2], -1)


def key_norm(attention: Attention, budget: int) -> Tensor:
    """Minus the norm of the key: small keys tend to receive more attention.

    Source: Devoto et al. (2024), arXiv 2406.11430, section 3. The paper does not compress the first
    two layers; here they are no exception.
    """
    return -attention.keys[:, :, : attention.context].float().norm(dim=-1)


def key_norm_reversed(attention: Attention, budget: int) -> Tensor:
    """The norm of the key: where keys are normalized (Qwen3), `key_norm` may have it reversed."""
    return -key_norm(attention, budget)


def h2o(attention: Attention, budget: int, chunk_size: int = 512) -> Tensor:
    """Attention received from all queries, summed; half of the budget is for recent entries.

    Source: Zhang et al. (2023), H2O, arXiv 2306.14048, algorithm 1, which evicts at each decoding
    step; here entries are evicted once, after the context. Query heads that share a key head are
    summed. Queries are processed `chunk_size` at a time: memory is (B, H, chunk_size, T).
    """
    received = 0
    for start in range(0, attention.queries.shape[2], chunk_size):
        received += _attention_weights(attention, start, start + chunk_size).sum((2, 3))
    received[..., attention.context - budget // 2 :] = float("inf")
    return received[..., : attention.context]


def snapkv(attention: Attention, budget: int, window_size=32, kernel_size=5) -> Tensor:
    """Attention from the last tokens (the window), smoothed over neighbors; the window is kept.

    Source: Li et al. (2024), SnapKV, arXiv 2404.14469, section 4 and listing 1, with the average
    pooling of their code. There each query head selects entries, here the query heads of a key head
    together. The window is the end of the question. Without a question it is the end of the
    context, and at most half the budget, since the paper's budgets are much larger than its window.
    """
    count, total = attention.queries.shape[2], attention.keys.shape[2]
    context = attention.context
    window_size = min(window_size, count, total - context or max(1, budget // 2))
    before = min(context, total - window_size)  # entries before the window
    votes = _attention_weights(attention, count - window_size, count).sum(3).mean(2)[..., :before]
    if before:
        votes = F.avg_pool1d(votes, kernel_size, stride=1, padding=kernel_size // 2)
    return F.pad(votes, (0, context - before), value=float("inf"))


def tova(attention: Attention, budget: int) -> Tensor:
    """Attention from the last token, the mean over all heads: the same entries in each head.

    Source: Oren et al. (2024), TOVA, arXiv 2401.06104, section 3.3, where an entry is evicted at
    each decoding step.
    """
    count, heads = attention.queries.shape[2], attention.keys.shape[1]
    weights = _attention_weights(attention, count - 1, count)[..., : attention.context]
    return weights.mean((1, 2, 3))[:, None].expand(-1, heads, -1)


def keydiff(attention: Attention, budget: int) -> Tensor:
    """Minus the cosine of a key with the mean of all normalized keys: unusual keys stay.

    Source: Park et al. (2025), KeyDiff, arXiv 2504.15364, section 3.2.
    """
    keys = F.normalize(attention.keys[:, :, : attention.context].float(), dim=-1)
    return -F.cosine_similarity(keys, keys.mean(2, keepdim=True), dim=-1)


def expected_attention(
    attention: Attention, budget: int, sinks=4, future=512, epsilon: float = 0.01
) -> Tensor:
    """The attention that queries at future positions are expected to pay, times the value's norm.

    Queries are taken as Gaussian, with the mean and covariance of the context's un-rotated queries,
    and rotated by the mean rotation of the next positions. Source: Devoto et al. (2025), arXiv
    2510.00636, section 3, with the constants of the authors' code.

    Args:
        sinks: number of first tokens, which are not among the queries and keys, and always stay.
        future: number of positions.
        epsilon: added to the attention weights.
    """
    context, keys = attention.context, attention.keys.float()
    sinks = min(sinks, context - 1)
    queries, positions = attention.queries.float(), attention.positions
    read = keys.shape[2] - queries.shape[2]  # the tokens before have no query here
    queries = queries[:, :, max(0, sinks - read) : context - read]
    at = positions.reshape(-1, keys.shape[2])[0, max(sinks, read) : context]  # of all heads
    queries = rotate_keys(queries, -at, attention.rotary, 1 / attention.rotary.attention_scaling)
    mean = queries.mean(2)  # (B, H, D)
    spread = queries - mean[:, :, None]
    covariance = spread.mT @ spread / spread.shape[2]
    # k' R q = (R' k)' q, and R' rotates backwards.
    keys = keys[:, :, sinks:context]
    steps = positions.max() + 1 + torch.arange(future, device=keys.device)
    keys = _mean_rotation(keys, -steps, attention.rotary).repeat_interleave(
        mean.shape[1] // keys.shape[1], 1
    )
    logits = attention.scaling * (keys @ mean[..., None])[..., 0]
    logits = logits + attention.scaling**2 / 2 * ((keys @ covariance) * keys).sum(-1)
    weights = logits.softmax(-1).unflatten(1, (attention.keys.shape[1], -1)).mean(2)
    values = attention.values[:, :, sinks:context].float()
    scores = (weights + epsilon) * values.norm(dim=-1)
    return F.pad(scores, (sinks, 0), value=float("inf"))


def _mean_rotation(keys: Tensor, steps: Tensor, rotary: nn.Module) -> Tensor:
    """The mean of keys rotated by each of some numbers of positions, with the attention scaling."""
    angles = steps[:, None] * rotary.inv_freq
    cos, sin = angles.cos().mean(0), angles.sin().mean(0)
    cos, sin = (x.to(keys.dtype) * rotary.attention_scaling for x in (cos, sin))
    x, y = keys.chunk(2, -1)
    return torch.cat((x * cos - y * sin, y * cos + x * sin), -1)


def compactor(
    attention: Attention, budget: int, sinks=8, recent=4, sketch=48, chunk_size=256
) -> Tensor:
    """Leverage of the un-rotated keys, plus attention without a causal mask times value norms.

    Both are standardized over a layer; leverage has the evicted fraction as its weight, as in the
    authors' code, whose attention logits are not scaled. Source: Chari and Van Durme (2025),
    Compactor, arXiv 2507.08143, section 3.

    Args:
        sinks: number of first tokens, which always stay.
        recent: number of last tokens, which always stay.
        sketch: dimensions of the keys after a Gaussian sketch, if they have more.
        chunk_size: tokens attend to those of their chunk.
    """
    context = attention.context
    sinks, recent = min(sinks, context), max(0, min(recent, context - sinks))
    part = slice(sinks, context - recent)
    if part.stop - sinks < 2:
        return attention.keys.new_full((*attention.keys.shape[:2], context), float("inf"))
    keys, values = (x[:, :, part].float() for x in (attention.keys, attention.values))
    backwards = -attention.positions[..., part]
    scale = 1 / attention.rotary.attention_scaling
    plain = rotate_keys(keys, backwards, attention.rotary, scale)
    read = attention.keys.shape[2] - attention.queries.shape[2]  # before, by others
    queries = attention.queries[:, :, max(0, sinks - read) : max(0, part.stop - read)].float()
    earlier = keys.shape[2] - queries.shape[2]
    received = [0]
    for q, k in zip(
        queries.split(chunk_size, 2), keys[:, :, earlier:].split(chunk_size, 2), strict=True
    ):
        k = torch.cat((keys[:, :, :earlier], k), 2)
        weights = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT).softmax(-1).sum(2)
        received[0] = received[0] + weights[..., :earlier]
        received.append(weights[..., earlier:])
    received = torch.cat(received, -1).unflatten(1, (keys.shape[1], -1)).mean(2)
    received = F.avg_pool1d(received * values.norm(dim=-1), 3, stride=1, padding=1)
    removed = 1 - budget / attention.context
    scores = removed * _z(_leverage(plain, sketch)) + _z(received)
    return F.pad(scores, (sinks, recent), value=float("inf"))


def _leverage(keys: Tensor, sketch: int) -> Tensor:
    """Statistical leverage of centered keys, (B, H, T, D), after a Gaussian sketch: (B, H, T)."""
    x = keys - keys.mean(2, keepdim=True)
    width = x.shape[-1]
    if width > sketch:
        shape = (*x.shape[:2], width, sketch)
        x = x @ torch.randn(shape, device=x.device) / sketch**0.5
    gram = x.mT @ x
    ridge = 1e-2 * torch.eye(x.shape[-1], device=x.device)
    return (x * torch.linalg.solve(gram + ridge, x.mT).mT).sum(-1)


def _z(scores: Tensor) -> Tensor:
    """Standardize over the heads and entries of each row."""
    flat = scores.flatten(1)
    mean, deviation = flat.mean(1), flat.std(1).clamp(min=1e-6)
    return (scores - mean[:, None, None]) / deviation[:, None, None]


def kvzip(attention: Attention, budget: int, sinks: int = 4) -> Tensor:
    """The highest attention weight an entry receives while the model repeats the context.

    Source: Kim et al. (2025), KVzip, arXiv 2505.23416, section 3.2. `repeat_texts` has what the
    model reads; keys are those of the first tokens, of the part that it repeats, and of the text.

    Args:
        sinks: number of first tokens, which always stay.
    """
    return _repeated(attention, sinks)


def kvzip_plus(attention: Attention, budget: int, sinks: int = 4) -> Tensor:
    """`kvzip` with weights a_ij ||W_O v_j|| / ||h_i||: what an entry adds to a hidden state.

    Source: the normalization of KVzip+ in NVIDIA's kvpress, where h_i is the layer's input.
    """
    heads, width = attention.queries.shape[1], attention.values.shape[3]
    weight = attention.layer.o_proj.weight.float().unflatten(1, (heads, width))
    gram = torch.einsum("ohd,ohe->hde", weight, weight).unflatten(0, (attention.keys.shape[1], -1))
    values = attention.values.float()
    norms = torch.einsum("bntd,ngde,bnte->bngt", values, gram, values).clamp(min=0).sqrt()
    return _repeated(attention, sinks, norms, attention.hidden_states.float().norm(dim=-1))


def _repeated(attention: Attention, sinks: int, norms=None, sizes=None) -> Tensor:
    """Largest attention weight by entry of the part, times `norms` of entries, over `sizes`."""
    context, total = attention.context, attention.keys.shape[2]
    if total == context:
        hint = "give repeat=repeat_texts(tokenizer, input_ids)"
        raise ValueError(
            f"These scores need a text in which the model repeats the context: {hint}."
        )
    start, stop, _ = attention.part.indices(context)
    part = torch.arange(start, stop, device=attention.keys.device)
    before = torch.arange(min(sinks, start), device=part.device)
    text = torch.arange(context, total, device=part.device)
    columns = torch.cat((before, part, text))
    keys = attention.keys[:, :, None, columns].float()
    queries = attention.queries[:, :, context - total :].unflatten(1, (keys.shape[1], -1)).float()
    best = None
    for rows in torch.arange(total - context).split(512):
        logits = queries[:, :, :, rows] @ keys.mT * attention.scaling
        later = columns > context + rows[:, None].to(columns.device)
        weights = logits.masked_fill(later, float("-inf")).softmax(-1)
        weights = weights[..., len(before) : len(before) + len(part)]
        if norms is not None:
            size = sizes[:, context - total :][:, rows]
            weights = weights * norms[..., None, start:stop] / size[:, None, None, :, None]
        highest = weights.amax((2, 3))
        best = highest if best is None else best.maximum(highest)
    return best.masked_fill(part < sinks, float("inf"))


_SCORES = (random, sinks_recent, h2o, snapkv, key_norm, key_norm_reversed)
_SCORES += (tova, keydiff, expected_attention, compactor)
METHODS: dict[str, Score] = {score.__name__: score for score in _SCORES}
REPEATED: dict[str, tuple[Score, str]] = {  # with the scope of their budget
    "kvzip": (kvzip, "model"),
    "kvzip_layer": (kvzip, "layer"),
    "kvzip_uniform": (kvzip, "head"),
    "kvzip_plus": (kvzip_plus, "model"),
}
AWARE: dict[str, Score] = {"h2o_aware": h2o, "snapkv_aware": snapkv}  # the question is known


def _attention_weights(attention: Attention, start: int, stop: int) -> Tensor:
    """Causal attention weights of some queries, (B, H_kv, H / H_kv, stop - start, T)."""
    keys = attention.keys[:, :, None].float()
    queries = attention.queries[:, :, start:stop].unflatten(1, (keys.shape[1], -1)).float()
    logits = queries @ keys.mT * attention.scaling
    positions = torch.arange(keys.shape[3], device=keys.device)
    own = positions[-attention.queries.shape[2] :]  # of the queries
    later = positions > own[start:stop, None]
    return logits.masked_fill(later, float("-inf")).softmax(-1)


@contextmanager
def capture_attention(model: PreTrainedModel, on_layer: Callable[..., None]) -> Iterator[None]:
    """Call `on_layer(queries, keys, values, scaling)` for each attention layer that runs, in order.

    Inside the context the layers run with PyTorch's attention (sdpa).
    """
    with _capture(model, lambda layer, hidden_states, *inputs: on_layer(*inputs)):
        yield


@contextmanager
def _capture(model: PreTrainedModel, on_layer: Callable[..., None]) -> Iterator[None]:
    """Call `on_layer(layer, hidden_states, queries, keys, values, scaling)` for each layer."""
    require_supported(model)  # which runs layers that are not to be captured
    sdpa, inputs = ALL_ATTENTION_FUNCTIONS["sdpa"], {}

    def capture(layer, query, key, value, attention_mask, scaling=None, **options):
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        on_layer(layer, inputs.get(layer), query, key, value, factor)
        return sdpa(layer, query, key, value, attention_mask, scaling=scaling, **options)

    def keep_input(layer, args, options) -> None:
        inputs[layer] = options.get("hidden_states", args[0] if args else None)

    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                stack.enter_context(module.register_forward_pre_hook(keep_input, with_kwargs=True))
        stack.enter_context(use_attention(model, capture))
        yield


def count_kept(entries: int, retention: float | None = None, budget: int | None = None) -> int:
    """Number of entries to keep: a fraction of them, at least one, or a number, at most all.

    Example:
        >>> count_kept(90, retention=0.1), count_kept(90, budget=200)
        (9, 90)
    """
    if (retention is None) == (budget is None):
        raise ValueError("Give either retention, a fraction, or budget, a number of entries.")
    if budget is None:
        if not 0 < retention <= 1:
            raise ValueError(f"retention is {retention}, expected a fraction in (0, 1].")
        return max(1, round(retention * entries))
    if budget < 1:
        raise ValueError(f"budget is {budget}, expected a positive integer.")
    return min(budget, entries)


def require_tokens(input_ids: Tensor) -> None:
    """Refuse token ids other than (B, T)."""
    if input_ids.ndim != 2 or not input_ids.numel():
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids is {shape}, expected (B, T): texts of one length, unpadded.")


class Repeat(NamedTuple):
    """A text (1, Q) in which the model repeats a part of the context, see `repeat_texts`."""

    input_ids: Tensor
    part: slice


def repeat_texts(
    tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, chunk_size: int = 2048
) -> list[Repeat]:
    """Return what a model reads after a context (1, T) for `kvzip`: it is told to repeat the context.

    One text for each chunk: a user turn that asks for it, then the chunk as the answer. Source: Kim
    et al. (2025), KVzip, arXiv 2505.23416, section 3.2.

    Example:
        >>> from kvlab import lab
        >>> tokenizer = lab.load_tokenizer("lab-target")
        >>> ids = tokenizer("Anna lives in Rome.", return_tensors="pt").input_ids
        >>> tokenizer.decode(repeat_texts(tokenizer, ids)[0].input_ids[0])
        '<|user|> Repeat the previous context exactly.<|assistant|>Anna lives in Rome.'
    """
    require_tokens(input_ids)
    if len(input_ids) > 1 or chunk_size < 1:
        seen = f"input_ids is {tuple(input_ids.shape)}, chunk_size {chunk_size}"
        raise ValueError(f"{seen}, expected one text, (1, T), and a positive number.")
    prompts = []
    for part in ("", "part of the "):
        text = f"Repeat the {part}previous context exactly" + (", starting with" if part else ".")
        turns = [{"role": "system", "content": "."}, {"role": "user", "content": text}]
        prompts.append(encode_parts(tokenizer, turns)[1])
    first, later = prompts
    closing = 0  # number of tokens that close the user's turn and open the answer
    while closing < len(first) and first[-1 - closing] == later[-1 - closing]:
        closing += 1
    texts = []
    for start in range(0, input_ids.shape[1], chunk_size):
        prompt = first
        if start:
            before = input_ids[0, max(0, start - 8) : start].tolist()
            middle = len(later) - closing
            prompt = later[:middle] + before + later[middle:]
        chunk = input_ids[:, start : start + chunk_size]
        ids = torch.cat((input_ids.new_tensor([prompt]), chunk), 1)
        texts.append(Repeat(ids, slice(start, start + chunk.shape[1])))
    return texts


@torch.no_grad()
def score_entries(
    model: PreTrainedModel,
    input_ids: Tensor,
    score: Score,
    budget: int,
    question_ids: Tensor | None = None,
    prefix: Prefix | None = None,
    repeat: Sequence[Repeat] = (),
) -> tuple[Tensor, DynamicCache]:
    """Read a context, and a question or its repetition after it, and score the entries.

    Args:
        input_ids: (B, T), the context.
        score: one of METHODS, or any function like them. It is called once per layer, with
            `repeat` once per layer and text.
        budget: number of entries per head that the score plans for.
        question_ids: (1, Q) or (B, Q), or None.
        prefix: what the context follows. Its P entries are scored with those of the context.
        repeat: texts, each of which is read after the context for the scores of its part.

    Returns:
        Scores, (L, B, H_kv, P + T), and the cache of prefix, context and question. Entries that a
        method always keeps have infinity.

    Example:
        >>> from kvlab import lab
        >>> model, ids = lab.load("lab-target"), torch.arange(10, 30)[None]
        >>> score_entries(model, ids, key_norm, budget=6)[0].shape
        torch.Size([12, 1, 2, 20])
    """
    require_tokens(input_ids)
    prefix = prefix or _empty(input_ids)
    if is_ragged(prefix.cache):
        hint = "evict its text again, or with scope='head'"
        raise ValueError(f"Heads of the prefix have lengths of their own: {hint}.")
    context = length(prefix.cache) + input_ids.shape[1]
    if not repeat:
        text = input_ids
        if question_ids is not None:
            text = torch.cat([input_ids, question_ids.expand(len(input_ids), -1)], 1)
        return _score_text(model, text, prefix, lambda layer: score(layer, budget), context)
    if len(input_ids) > 1 or repeat[-1].part.stop != context:
        hint = "give repeat_texts(tokenizer, input_ids), for one text at a time"
        raise ValueError(f"What is repeated is not the text of input_ids: {hint}.")
    end = prefix.next_position + input_ids.shape[1]
    needed = end + max(text.input_ids.shape[1] for text in repeat)
    if needed > (limit := position_limit(model)):
        sizes = f"The text with its repetition has {needed} tokens, the model reads up to {limit}"
        raise ValueError(f"{sizes}: cut the text, or give repeat_texts a smaller chunk_size.")
    prefix, parts = prefill(model, input_ids, prefix), []
    for text in repeat:
        inputs = model, text.input_ids, prefix, lambda layer: score(layer, budget), context
        parts.append(_score_text(*inputs, text.part)[0])
    return torch.cat(parts, -1), prefix.cache


def _score_text(
    model, text: Tensor, prefix: Prefix, score: Callable, context: int, part=slice(0, None)
) -> tuple[Tensor, DynamicCache]:
    """Read a text after a prefix; score(attention) of each layer, stacked, and the longer cache."""
    _require_room(model, prefix.next_position + text.shape[1])
    new = torch.arange(text.shape[1], device=text.device) + prefix.next_position
    scores, rotary = [], rotary_of(model)

    def score_layer(layer, hidden_states, *inputs) -> None:
        positions = prefix.positions
        if positions is not None:
            held = positions[len(scores)] if positions.ndim == 4 else positions[:, None]
            positions = torch.cat([held, new.expand(*held.shape[:-1], -1)], -1)
        details = {"hidden_states": hidden_states, "layer": layer, "positions": positions}
        attention = Attention(*inputs, context, part, **details, rotary=rotary)
        scores.append(score(attention))

    with _capture(model, score_layer):
        cache = prefill(model, text, prefix).cache
    return torch.stack(scores), cache


def _require_room(model: PreTrainedModel, total: int) -> None:
    if total > (limit := position_limit(model)):
        raise ValueError(f"The text has {total} tokens, the model reads up to {limit}: cut it.")


def evict(
    model: PreTrainedModel,
    input_ids: Tensor,
    score: Score,
    *,
    retention: float | None = None,
    budget: int | None = None,
    scope: Literal[SCOPES] = "head",
    question_ids: Tensor | None = None,
    repeat: Sequence[Repeat] = (),
    chunk_size: int | None = None,
    prefix: Prefix | None = None,
) -> Prefix:
    """Read a context, keep the entries with the highest scores, and free the memory of the others.

    In chunks, each chunk is read after the entries kept so far, and the best of these and of its
    own are kept: no more than the budget and one chunk are in memory, and attention is scored chunk
    by chunk.

    Positions are those of the text. If the text is longer than the positions of the model, the kept
    entries move to positions 0 to k - 1 after each chunk (see `compact`): `next_position` is k.

    Args:
        input_ids: (B, T), a context, or several of one length, without padding.
        score: one of METHODS, `kvzip`, `kvzip_plus`, or any function like them.
        retention: fraction of the entries to keep. Give this or `budget`.
        budget: number of entries to keep per head, in the mean.
        scope: where entries compete: "head" keeps the same number in each head; "layer" in each
            layer, and "model" in the whole model, so that heads have lengths of their own
            (`kvlab.ragged`); "token" keeps the same entries in all heads and layers, by the mean of
            their scores.
        question_ids: (1, Q) or (B, Q), a question that is known beforehand. It is used for the
            scores only and is not in the returned cache, which is made for this one question.
        repeat: `repeat_texts` of the context, for `kvzip`. They, too, are used for the scores only.
        chunk_size: number of tokens to read at once. Default: all.
        prefix: what the context follows. Its entries count, too, and can be evicted.

    Returns:
        The smaller cache. `positions` of its entries is (L, B, H_kv, k), or (B, k) for "token";
        where a head is shorter than the longest, its first are -1.

    Example:
        >>> from kvlab import lab
        >>> model, ids = lab.load("lab-target"), torch.arange(10, 30)[None]
        >>> evict(model, ids, sinks_recent, budget=6, scope="token").positions
        tensor([[ 0,  1,  2,  3, 18, 19]])
        >>> evict(model, ids, sinks_recent, budget=6, scope="token", chunk_size=7).positions
        tensor([[ 0,  1,  2,  3, 18, 19]])
        >>> small = evict(model, ids, h2o, budget=6, scope="model")
        >>> (small.positions >= 0).sum() == 6 * 12 * 2
        tensor(True)
    """
    require_tokens(input_ids)
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}, expected one of {', '.join(SCOPES)}.")
    if chunk_size is not None and (repeat or scope in ("layer", "model")):
        hint = "leave chunk_size out, or choose scope='head' and another score"
        raise ValueError(f"Entries of the whole text compete, or it is repeated: {hint}.")
    if repeat and (prefix is not None or question_ids is not None):
        hint = "leave prefix and question_ids out"
        raise ValueError(f"A text is repeated alone, from its first token: {hint}.")
    prefix = _start(model, prefix, input_ids)
    past, total = length(prefix.cache), input_ids.shape[1]
    count = count_kept(past + total, retention, budget)
    chunks = input_ids.split(total if chunk_size is None else chunk_size, 1)
    asked = 0 if question_ids is None else question_ids.shape[1]
    limit = position_limit(model)
    if too_long := prefix.next_position + total + asked > limit:
        needed = max(past, count if len(chunks) > 1 else 0) + chunks[0].shape[1] + asked
        if needed > limit:
            sizes = f"{needed} tokens and entries at once, the model reads up to {limit}"
            raise ValueError(f"{sizes}: give a smaller chunk_size or budget.")
        prefix = compact(prefix) if past else prefix
    for chunk in chunks:
        count_now = min(count, length(prefix.cache) + chunk.shape[1])
        options = {"question_ids": question_ids, "repeat": repeat}
        scores, cache = score_entries(model, chunk, score, count_now, prefix=prefix, **options)
        kept = choose_entries(scores, count_now, scope)
        prefix = keep_entries(model, chunk, cache, kept, prefix)
        prefix = compact(prefix) if too_long else prefix
    return prefix


def choose_entries(scores: Tensor, count: int, scope: str) -> Tensor:
    """Which entries have the highest scores: (L, B, H_kv, T), or (B, T) for the scope "token".

    Args:
        scores: (L, B, H_kv, T).
        count: of entries to keep per head, in the mean.
        scope: as in `evict`.

    Example:
        >>> scores = torch.tensor([[9.0, 8, 7, 0], [6, 0, 0, 0]])[None, None]  # two heads
        >>> choose_entries(scores, 2, "layer").sum(-1)
        tensor([[[3, 1]]])
    """
    layers, rows, heads, size = scores.shape
    if scope == "token":
        return _highest(scores.mean((0, 2)), count)
    if scope == "head":
        return _highest(scores, count)
    if scope == "layer":
        return _highest(scores.flatten(2), count * heads).view_as(scores)
    flat = scores.movedim(1, 0).flatten(1)
    kept = _highest(flat, count * heads * layers).view(rows, layers, heads, size)
    return kept.movedim(0, 1)


def _highest(scores: Tensor, count: int) -> Tensor:
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(-1, scores.topk(count).indices, True)


def _start(model: PreTrainedModel, prefix: Prefix | None, input_ids: Tensor) -> Prefix:
    """The prefix, or an empty one, with the positions of its entries."""
    if prefix is None:
        return _empty(input_ids)
    if prefix.positions is None and length(prefix.cache) == prefix.next_position:
        positions = torch.arange(prefix.next_position, device=input_ids.device)
        prefix = replace(prefix, positions=positions[None], rotary=rotary_of(model))
    padded = prefix.attention_mask is not None or not isinstance(prefix.next_position, int)
    if padded or prefix.positions is None:
        raise ValueError("The prefix has padding or unknown positions: use `prefill` or `evict`.")
    return prefix


def _empty(input_ids: Tensor) -> Prefix:
    return Prefix(DynamicCache(), 0, positions=input_ids[:, :0])


def keep_entries(
    model, input_ids: Tensor, cache: DynamicCache, kept: Tensor, prefix: Prefix | None = None
) -> Prefix:
    """The kept entries, (L, B, H_kv, T) or (B, T), of tokens, and of a prefix they were read after."""
    prefix = prefix or _empty(input_ids)
    rows, count = input_ids.shape
    end = prefix.next_position + count
    new = torch.arange(prefix.next_position, end, device=input_ids.device)
    held = torch.cat([prefix.positions, new.expand(*prefix.positions.shape[:-1], -1)], -1)
    if held.ndim != kept.ndim:
        held, kept = (x if x.ndim == 4 else x[None, :, None] for x in (held, kept))
    held, kept = torch.broadcast_tensors(held, kept)
    counts, total = kept.sum(-1), kept.shape[-1]
    columns = kept.byte().argsort(dim=-1, stable=True)[..., total - int(counts.max()) :]
    positions = held.gather(-1, columns).masked_fill(~kept.gather(-1, columns), -1)
    if counts.min() == counts.max():
        cache = select(cache, columns)
    else:
        layers = [(x.keys[:, :, :total], x.values[:, :, :total]) for x in cache.layers]
        cache = from_ragged(pack(*layer, keep) for layer, keep in zip(layers, kept, strict=True))
    ids = [*prefix.input_ids, *input_ids[0].tolist()] if rows == 1 else ()
    return Prefix(cache, end, ids, positions=positions, rotary=rotary_of(model))


@torch.no_grad()
def attention_matching(
    model: PreTrainedModel,
    input_ids: Tensor,
    repeat: Sequence[Repeat],
    *,
    retention: float | None = None,
    budget: int | None = None,
    scope: Literal[SCOPES] = "model",
    score: Score = kvzip,
) -> Prefix:
    """Evict, and fit what stays to the attention of the whole: writing without training.

    For the queries Q of the repeated context, keys K and values V, of which K1 stay: a bias for
    each kept key, log b, from the non-negative least squares exp(Q K1') b = sum of exp(Q K'); then
    values V1 from the least squares softmax(Q K1' + log b) V1 = softmax(Q K') V. (Logits are
    scaled.) The bias is in the cache (`kvlab.ragged`). It is cut to -3 to 3, the bounds of the
    authors' code: the values of an entry that receives no weight would have no bound. Source:
    Zweiger et al. (2026), arXiv 2602.16284, section 3.

    Args:
        input_ids: (1, T), the context.
        repeat: `repeat_texts` of it.
        retention, budget, scope: as in `evict`.
        score: chooses the entries that stay.

    Example:
        >>> from kvlab import lab
        >>> model, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
        >>> ids = tokenizer("Anna lives in Rome. Ben has a dog.", return_tensors="pt").input_ids
        >>> texts = repeat_texts(tokenizer, ids)
        >>> attention_matching(model, ids, texts, retention=0.5).next_position
        12
    """
    total = input_ids.shape[1]
    count = count_kept(total, retention, budget)
    kept = []  # queries, by text and layer, with the factor of the logits

    def keep_queries(attention: Attention, budget: int) -> Tensor:
        kept.append(attention.queries * attention.scaling)
        return score(attention, budget)

    scores, cache = score_entries(model, input_ids, keep_queries, count, repeat=repeat)
    chosen = choose_entries(scores, count, scope)
    depth, layers = len(cache.layers), []
    for i, (layer, keep) in enumerate(zip(cache.layers, chosen.expand_as(scores), strict=True)):
        queries = torch.cat(kept[i::depth], 2).unflatten(1, (keep.shape[1], -1)).flatten(2, 3)
        values, bias = layer.values.clone(), torch.zeros_like(layer.keys[..., 0])
        for head, columns in enumerate(keep[0]):
            if columns.any():
                tensors = queries[0, head], layer.keys[0, head], layer.values[0, head]
                b, v = _match(*tensors, columns)
                bias[0, head, columns], values[0, head, columns] = b, v
        layers.append(pack(layer.keys, values, keep, bias))
    return replace(keep_entries(model, input_ids, cache, chosen), cache=from_ragged(layers))


def _match(queries: Tensor, keys: Tensor, values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Bias (k,) and values (k, D) of the kept columns of a head, from (N, D) and (T, D)."""
    from scipy.optimize import nnls  # slow to import

    logits = queries.cpu().double() @ keys.cpu().double().T  # (N, T)
    logits, columns = logits - logits.max(), columns.cpu()
    weights = logits.exp()
    factors, _ = nnls(weights[:, columns].numpy(), weights.sum(1).numpy())
    bias = torch.from_numpy(factors).log().clamp(-MAXIMUM_BIAS, MAXIMUM_BIAS)
    attended = logits.softmax(1) @ values.cpu().double()
    kept = (logits[:, columns] + bias).softmax(1)
    written = torch.linalg.lstsq(kept, attended, driver="gelsd").solution
    return bias.to(keys), written.to(keys)


def compact(prefix: Prefix) -> Prefix:
    """Move the kept entries to positions 0 to k - 1, so that the next position is their number, k.

    This is how `generate` of transformers counts. Distances between entries shrink, which changes
    the logits wherever a gap is closed. If nothing was evicted between or after the kept entries,
    the model's output stays the same.

    Example:
        >>> from kvlab import lab
        >>> model, ids = lab.load("lab-target"), torch.arange(10, 30)[None]
        >>> small = compact(evict(model, ids, key_norm, budget=6))
        >>> small.next_position, length(small.cache)
        (6, 6)
    """
    count = length(prefix.cache)
    positions = torch.arange(count, device=prefix.positions.device)
    cache = shift(prefix.cache, positions - prefix.positions, prefix.rotary)
    positions = positions[None]
    if is_ragged(cache):
        positions = positions.where(prefix.positions >= 0, -1)
    return Prefix(cache, count, prefix.input_ids, positions=positions, rotary=prefix.rotary)


def generate_within(
    generate: Callable,
    model: PreTrainedModel,
    input_ids: Tensor,
    score: Score,
    *,
    budget: int,
    every: int = 32,
    max_new_tokens: int = 256,
) -> tuple[Tensor, Prefix]:
    """Generate a text, and evict again after every few tokens: compression while decoding.

    After a stretch its tokens are read once more, at once, for their scores. In memory are at most
    `budget + every` entries, plus the prompt while it is read. A text longer than the positions of
    the model goes on at the number of its entries (see `compact`).

    Args:
        generate: `kvlab.speculate.generate` for this model, such as `partial(generate, model)`.
        model: the same model.
        input_ids: (1, T), T > 1, the prompt.
        score: as in `evict`.
        budget: number of entries to keep.
        every: number of tokens from one eviction to the next.
        max_new_tokens: as in `generate`.

    Returns:
        The generated ids, and the cache of prompt and text up to the last stretch.

    Example:
        >>> from functools import partial
        >>> from kvlab import lab, speculate
        >>> model, ids = lab.load("lab-target"), torch.arange(10, 30)[None]
        >>> generate, options = partial(speculate.generate, model), {"budget": 9, "every": 4}
        >>> _, prefix = generate_within(generate, model, ids, h2o, **options, max_new_tokens=12)
        >>> length(prefix.cache)
        9
    """
    ends = end_tokens(model)
    text, tokens, prefix = input_ids, [], None
    while True:
        prefix = evict(model, text[:, :-1], score, budget=budget, prefix=prefix)
        count = min(every, max_new_tokens - len(tokens))
        if prefix.next_position + 1 + count > position_limit(model):
            prefix = compact(prefix)
        new = generate(text[:, -1:], prefix=prefix, max_new_tokens=count).tokens[0].tolist()
        tokens += new
        if len(new) < count or new[-1] in ends or len(tokens) == max_new_tokens:
            return torch.tensor(tokens), prefix
        text = torch.cat([text[:, -1:], text.new_tensor([new])], 1)
