"""Eviction: scores of the entries of a KV cache, and a cache of those with the best scores only.

A score is a function of the queries, keys and values of one attention layer; it returns one number
per entry, (B, H_kv, T). `evict` keeps the entries with the highest scores in each head and frees
the others. The result is a `Prefix`: an ordinary cache, which the unchanged model continues at the
next position.

>>> from kvlab import lab
>>> model, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
>>> ids = tokenizer("Anna lives in Rome. Ben has a dog.", return_tensors="pt").input_ids
>>> prefix = evict(model, ids, key_norm, retention=0.5)
>>> length(prefix.cache), prefix.next_position
(6, 12)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlab.cache import Prefix, length, prefill, select, shift
from kvlab.generation import end_tokens
from kvlab.models import position_limit, require_supported, rotary_of


class Attention(NamedTuple):
    """The input of one attention layer for a context and, after it, a question (if one is known).

    Args:
        queries: (B, H, Q, D), rotated, of the last Q of the T tokens: those that are read now. Q is
            T, unless the tokens are read after a prefix.
        keys: (B, H_kv, T, D), rotated.
        values: (B, H_kv, T, D).
        scaling: factor of the attention logits.
        context: length of the context, the first entries. Only these can be evicted.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    context: int


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
    two layers; here all layers keep the same number of entries.
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


_SCORES = (random, sinks_recent, h2o, snapkv, key_norm, key_norm_reversed)
METHODS: dict[str, Score] = {score.__name__: score for score in _SCORES}
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

    Inside the context the layers run with PyTorch's attention (sdpa), registered under a temporary
    name.
    """
    require_supported(model)  # which runs layers that are not to be captured
    name = f"kvlab_capture_{id(on_layer)}"
    config = model.config.get_text_config(decoder=True)
    implementation = config._attn_implementation
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, query, key, value, attention_mask, scaling=None, **options):
        on_layer(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **options)

    ALL_ATTENTION_FUNCTIONS[name] = attention
    masks = ALL_MASK_ATTENTION_FUNCTIONS  # a name that is not registered gets no mask at all
    masks.register(name, masks["sdpa"])
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = implementation
        del ALL_ATTENTION_FUNCTIONS[name], masks._global_mapping[name]


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


@torch.no_grad()
def score_entries(
    model: PreTrainedModel,
    input_ids: Tensor,
    score: Score,
    budget: int,
    question_ids: Tensor | None = None,
    prefix: Prefix | None = None,
) -> tuple[Tensor, DynamicCache]:
    """Read a context, and a question after it, and score the entries of the context.

    Args:
        input_ids: (B, T), the context.
        score: one of METHODS, or any function like them. It is called once per layer.
        budget: number of entries per head that the score plans for.
        question_ids: (1, Q) or (B, Q), or None.
        prefix: what the context follows. Its P entries are scored with those of the context.

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
    prefix = prefix or Prefix(DynamicCache(), 0)
    text, context = input_ids, length(prefix.cache) + input_ids.shape[1]
    if question_ids is not None:
        text = torch.cat([input_ids, question_ids.expand(len(input_ids), -1)], 1)
    total, limit = prefix.next_position + text.shape[1], position_limit(model)
    if total > limit:
        raise ValueError(f"The text has {total} tokens, the model reads up to {limit}: cut it.")
    scores = []

    def score_layer(*layer) -> None:
        scores.append(score(Attention(*layer, context=context), budget))

    with capture_attention(model, score_layer):
        cache = prefill(model, text, prefix).cache
    return torch.stack(scores), cache


def evict(
    model: PreTrainedModel,
    input_ids: Tensor,
    score: Score,
    *,
    retention: float | None = None,
    budget: int | None = None,
    question_ids: Tensor | None = None,
    shared: bool = False,
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
        score: one of METHODS, or any function like them.
        retention: fraction of the entries to keep, the same in each head. Give this or `budget`.
        budget: number of entries to keep.
        question_ids: (1, Q) or (B, Q), a question that is known beforehand. It is used for the
            scores only and is not in the returned cache, which is made for this one question.
        shared: keep the same entries in all heads and layers, by the mean of their scores.
        chunk_size: number of tokens to read at once. Default: all.
        prefix: what the context follows. Its entries count, too, and can be evicted.

    Returns:
        The smaller cache. `positions` of its entries is (L, B, H_kv, k), or (B, k) if shared.

    Example:
        >>> from kvlab import lab
        >>> model, ids = lab.load("lab-target"), torch.arange(10, 30)[None]
        >>> evict(model, ids, sinks_recent, budget=6, shared=True).positions
        tensor([[ 0,  1,  2,  3, 18, 19]])
        >>> evict(model, ids, sinks_recent, budget=6, shared=True, chunk_size=7).positions
        tensor([[ 0,  1,  2,  3, 18, 19]])
    """
    require_tokens(input_ids)
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
        prefix = _evict_chunk(model, chunk, score, count, question_ids, shared, prefix)
        prefix = compact(prefix) if too_long else prefix
    return prefix


def _start(model: PreTrainedModel, prefix: Prefix | None, input_ids: Tensor) -> Prefix:
    """The prefix, or an empty one, with the positions of its entries."""
    if prefix is None:
        return Prefix(DynamicCache(), 0, positions=input_ids[:, :0])
    if prefix.positions is None and length(prefix.cache) == prefix.next_position:
        positions = torch.arange(prefix.next_position, device=input_ids.device)
        prefix = replace(prefix, positions=positions[None], rotary=rotary_of(model))
    padded = prefix.attention_mask is not None or not isinstance(prefix.next_position, int)
    if padded or prefix.positions is None:
        raise ValueError("The prefix has padding or unknown positions: use `prefill` or `evict`.")
    return prefix


def _evict_chunk(model, input_ids, score, count, question_ids, shared, prefix: Prefix) -> Prefix:
    """Read tokens after a prefix, and keep `count` of the entries of both."""
    rows, size = input_ids.shape
    count = min(count, length(prefix.cache) + size)
    scores, cache = score_entries(model, input_ids, score, count, question_ids, prefix)
    if shared:
        scores = scores.mean((0, 2))  # (B, T)
    columns = scores.topk(count).indices.sort().values
    end = prefix.next_position + size
    new = torch.arange(prefix.next_position, end, device=input_ids.device)
    held = prefix.positions
    held = torch.cat([held, new.expand(*held.shape[:-1], -1)], -1)
    if held.ndim == columns.ndim == 2:
        positions = held.expand(rows, -1).gather(1, columns)
    else:  # (L, B, H_kv, T)
        held, picked = (x if x.ndim == 4 else x[None, :, None] for x in (held, columns))
        positions = held.take_along_dim(picked, -1)
    ids = [*prefix.input_ids, *input_ids[0].tolist()] if rows == 1 else ()
    fields = {"positions": positions, "rotary": rotary_of(model)}
    return Prefix(select(cache, columns), end, ids, **fields)


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
    return Prefix(cache, count, prefix.input_ids, positions=positions[None], rotary=prefix.rotary)


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
