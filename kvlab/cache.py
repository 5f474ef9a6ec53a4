"""The KV cache as a value: make one, take it apart, put it together, move it, keep it.

The only file that touches the inside of a transformers cache. A `DynamicCache` holds, for each of L
layers, keys and values of shape (B, H_kv, T, D); keys are stored rotated. An *entry* is one of the
T columns, its *position* the number of steps its key was rotated by. The two agree until entries
are dropped or moved. `prefill` and `load` return the next position with a cache, `select` leaves
it, `shift` moves it; whoever continues such a cache passes it.

No function writes into a tensor that it was given; results may share memory with their arguments
(`truncate` copies nothing, `shift` keeps the values). Gradients follow the caller: use
`torch.no_grad()` for inference. What does not fit raises `CacheError` before any work is done.
`_example()` is a random two-layer Qwen3 and five token ids.

>>> model, ids = _example()
>>> cache, logits, next_position = prefill(model, ids)
>>> length(cache), length(select(cache, torch.tensor([0, 3]))), length(join(cache, truncate(cache, 2)))
(5, 2, 7)
>>> nbytes(clone(cache)) == 5 * bytes_per_token(model.config, torch.float32)
True
"""

import copy
import hashlib
import json
import math
import reprlib
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvlab.files import as_bytes, write_tensors

FORMAT_VERSION = 1
ROPE_TYPES = (
    "default",
    "linear",
    "llama3",
    "yarn",
)  # their frequencies do not depend on the length of the text
ARCHITECTURE = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
                "num_key_value_heads", "hidden_act", "rms_norm_eps", "vocab_size")  # fmt: skip
Position = int | Tensor  # one for all rows, or (B,)
Owner = PreTrainedModel | dict  # the model that made a cache, or its `fingerprint`
_checked = weakref.WeakSet()  # models and rotary modules that passed their checks


class CacheError(ValueError):
    """A cache, a model or a file that does not fit; the message says what was seen, what was expected, what to do."""


class Prefill(NamedTuple):
    """A cache, the logits (B, vocab) after its last token, and the next position, (B,) if rows differ."""

    cache: DynamicCache
    logits: Tensor
    next_position: Position


class Saved(NamedTuple):
    """A cache from a file, the position at which to continue it, and what else was saved."""

    cache: DynamicCache
    next_position: Position
    metadata: dict


class Prefix(NamedTuple):
    """What stands before a prompt: a cache of one row, its next position, and the ids it stands for (if known).

    A prefilled, spliced, compressed or loaded cache. The ids (n,) are for those who need the text
    itself (a proposer, a repetition penalty); the cache's model does not read them again.
    """

    cache: DynamicCache
    next_position: Position
    input_ids: Sequence[int] = ()


class Read(NamedTuple):
    """What a model made of texts: its cache, the positions (B, T) of its entries, its rope, and a mask (B, T).

    The mask is 0 for padding. It may be a part of each text only, such as what came last while
    decoding.
    """

    cache: DynamicCache
    positions: Tensor
    rotary: nn.Module
    mask: Tensor


def require(condition: object, sentence: str) -> None:
    """Raise CacheError with this sentence unless the condition holds."""
    if not condition:
        raise CacheError(sentence)


def _require_cache(cache: DynamicCache):
    hint = "pass its .cache" if hasattr(cache, "cache") else "make one with `prefill`"
    require(
        isinstance(cache, DynamicCache),
        f"Expected a DynamicCache, got {type(cache).__name__}: {hint}.",
    )


def _pairs(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Return (keys, values) of every layer, each (B, H_kv, T, D)."""
    _require_cache(cache)
    layers = cache.layers
    require(
        layers and all(layer.keys is not None for layer in layers),
        "The cache is empty: prefill something first.",
    )
    odd = sorted({type(layer).__name__ for layer in layers} - {"DynamicLayer"})
    require(
        not odd,
        f"The cache has layers of type {odd}, expected DynamicLayer: use full attention in every layer.",
    )
    return [(layer.keys, layer.values) for layer in layers]


def _shape(pairs: list[tuple[Tensor, Tensor]]) -> tuple[int, ...]:
    """Return (L, B, H_kv, T, D)."""
    return (len(pairs), *pairs[0][0].shape)


def _build(pairs: Iterable[tuple[Tensor, Tensor]]) -> DynamicCache:
    """Put a DynamicCache around tensors, without copying them."""
    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _example() -> tuple[PreTrainedModel, Tensor]:
    """Return a random two-layer Qwen3 and five token ids, for the examples below."""
    from transformers import Qwen3Config, Qwen3ForCausalLM  # only needed here, and slow to import

    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "head_dim": 16,
    }
    model = Qwen3ForCausalLM(Qwen3Config(num_attention_heads=4, num_key_value_heads=2, **sizes))
    return model.eval().requires_grad_(False), torch.tensor([[5, 17, 2, 90, 33]])


def rotary_of(model: nn.Module) -> nn.Module:
    """Find the rotary embedding of a model: the module with `inv_freq` (D/2,) and `attention_scaling`."""
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "inv_freq", None), Tensor)
    ]
    seen = f"{type(model).__name__} has {len(found)} rotary embeddings, expected one"
    require(len(found) == 1, f"{seen}, so its keys cannot be moved: use a Llama-like decoder.")
    return found[0]


def require_supported(model: PreTrainedModel) -> None:
    """Refuse a model whose cache cannot be cut, joined and moved.

    Raises CacheError for encoder-decoders, for layers other than full attention (sliding window,
    linear attention), and for rotary embeddings that are missing, partial, interleaved, or change
    with the length of the text.
    """
    if model in _checked:
        return
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    seen = f"{name} is an encoder-decoder, whose cache also depends on the encoder's input"
    require(not model.config.is_encoder_decoder, f"{seen}: use a decoder-only model.")
    layers = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    seen = f"{name} has cache layers of type {sorted(layers)}, which drop or mix entries and cannot be cut and joined"
    require(
        layers == {"DynamicLayer"},
        f"{seen}: use full attention in every layer (Mistral: sliding_window=None).",
    )
    _require_rotary(rotary_of(model), _head_dim(config))
    _checked.add(model)


def _require_rotary(rotary: nn.Module, head_dim: int) -> None:
    """Check type and width and, once a module, that `_turn` is the model's rotation and its own inverse."""
    seen = f"The rotary embedding is a {type(rotary).__name__} without inv_freq"
    require(
        isinstance(getattr(rotary, "inv_freq", None), Tensor), f"{seen}: pass rotary_of(model)."
    )
    kind, width = getattr(rotary, "rope_type", "default"), 2 * rotary.inv_freq.numel()
    seen = f"Rotary embeddings of type '{kind}' change with the length of the text, so stored keys cannot be moved"
    require(kind in ROPE_TYPES, f"{seen}: use a model with one of {ROPE_TYPES}.")
    seen = f"The rotary embedding turns {width} of {head_dim} key dimensions, expected all"
    require(
        width == head_dim,
        f"{seen}: use that of the model that made the cache, and one that rotates whole heads.",
    )
    if rotary in _checked:
        return
    by, scale = torch.tensor([3, 11, 29], device=rotary.inv_freq.device), rotary.attention_scaling
    keys = torch.linspace(-1, 1, 3 * width, device=by.device).reshape(1, 1, 3, width)
    cos, sin = rotary(keys, by[None])  # (1, 3, D), times the scale
    theirs = keys * cos + torch.cat((-keys[..., width // 2 :], keys[..., : width // 2]), -1) * sin
    ours = _turn(keys, by, rotary, scale)
    back = _turn(ours, -by, rotary, 1 / scale)
    error = max((ours - theirs).abs().max().item(), (back - keys).abs().max().item())
    seen = f"Keys turned by {type(rotary).__name__}.inv_freq differ from the model's own by {error:.2g}"
    require(error < 1e-3, f"{seen}, expected less than 0.001: use a model with the Llama layout.")
    _checked.add(rotary)


def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    past: DynamicCache | None = None,
    position: Position | None = None,
    attention_mask: Tensor | None = None,
) -> Prefill:
    """Run token ids through a model, after `past`, and return the longer cache; `past` stays as it was.

    In pieces or at once gives the same. Costs one pass over the new tokens, and a copy of `past`.
    Raises CacheError for a model that is not supported and for shapes that do not fit.

    Args:
        input_ids: (B, T), the new tokens, padded on the left if at all.
        past: what they can look back to; P entries.
        position: of the first new token that is no padding. Default: the number of entries of
            `past` that are no padding, which after an eviction or a shift is wrong.
        attention_mask: (B, P + T), 0 for padding. A padded cache must be continued with its mask,
            which no file holds.
    """
    require_supported(model)
    require(
        input_ids.ndim == 2 and input_ids.numel(),
        f"input_ids is {tuple(input_ids.shape)}, expected (B, T > 0).",
    )
    (rows, count), seen = input_ids.shape, 0 if past is None else length(past)
    pairs, shape = _pairs(past) if seen else [], (rows, seen + count)
    if seen:
        config = model.config.get_text_config(decoder=True)
        want = (config.num_hidden_layers, rows, config.num_key_value_heads, seen, _head_dim(config))
        hint = "prefill it with this model, one row a text"
        require(
            _shape(pairs) == want,
            f"past has (L, B, H_kv, P, D) = {_shape(pairs)}, expected {want}: {hint}.",
        )
        have, want = (
            (str(t.dtype), str(t.device)) for t in (pairs[0][0], next(model.parameters()))
        )
        require(have == want, f"past is in {have}, the model in {want}: {hint}, or move the cache.")
    mask = input_ids.new_ones(shape) if attention_mask is None else attention_mask.long()
    require(
        mask.shape == shape,
        f"attention_mask is {tuple(mask.shape)}, expected (B, P + T) = {shape}.",
    )
    require(
        attention_mask is None or mask[:, -1].all(), "attention_mask ends in 0: pad on the left."
    )
    if position is None:
        position = seen if attention_mask is None else mask[:, :seen].sum(1)
    start = torch.as_tensor(position, device=input_ids.device).reshape(-1, 1)
    _require_position(position, rows)
    position_ids = (start + mask[:, seen:].cumsum(1) - 1).clamp(
        min=0
    )  # (B, T); what padding gets only has to exist
    text = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    out = model(**text, past_key_values=_build(pairs), use_cache=True, logits_to_keep=1)
    alike = isinstance(position, int) and attention_mask is None
    return Prefill(
        out.past_key_values,
        out.logits[:, -1],
        position + count if alike else position_ids[:, -1] + 1,
    )


def read(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position: int = 0,
) -> Read:
    """Read texts (B, T), padded on the left if at all, the first token of each at `position`, as `prefill` does.

    >>> model, ids = _example()
    >>> read(model, ids, position=3).positions
    tensor([[3, 4, 5, 6, 7]])
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    cache = prefill(model, input_ids, position=position, attention_mask=attention_mask).cache
    return Read(cache, (position + mask.cumsum(1) - 1).clamp(min=0), rotary_of(model), mask)


def part(read: Read, start: int, stop: int) -> Read:
    """Return the columns from `start` to `stop` of what a model read.

    >>> model, ids = _example()
    >>> part(read(model, ids), 1, 3).positions
    tensor([[1, 2]])
    """
    cache = select(read.cache, torch.arange(start, stop, device=read.mask.device))
    return Read(cache, read.positions[:, start:stop], read.rotary, read.mask[:, start:stop])


def prefix_of(model: PreTrainedModel, input_ids: Tensor) -> Prefix:
    """Read one text, (1, T), as what stands before a prompt.

    >>> prefix = prefix_of(*_example())
    >>> length(prefix.cache), prefix.next_position, prefix.input_ids
    (5, 5, [5, 17, 2, 90, 33])
    """
    cache, _, next_position = prefill(model, input_ids)
    return Prefix(cache, next_position, input_ids[0].tolist())


def length(cache: DynamicCache) -> int:
    """Count the entries T of a cache (which is not the next position, once entries were dropped)."""
    _require_cache(cache)
    return cache.get_seq_length()


def _require_position(position: Position, rows: int):
    given = torch.as_tensor(position).flatten()
    whole = not given.is_floating_point() and bool((given >= 0).all())
    seen = f"The position is {position}, expected one whole number from 0, or one for each of {rows} rows"
    require(
        whole and len(given) in (1, rows),
        f"{seen}: pass the next_position that came with the cache.",
    )


def clone(cache: DynamicCache) -> DynamicCache:
    """Copy a cache into memory of its own."""
    return _build((keys.clone(), values.clone()) for keys, values in _pairs(cache))


def _per_entry(given: int | Tensor, cache: DynamicCache, any_length: bool = False) -> Tensor:
    """Give a number, (T,), (B, T), (B, H_kv, T) or (L, B, H_kv, T) four dimensions that broadcast to the last."""
    pairs = _pairs(cache)
    full = _shape(pairs)[:4]
    given = torch.as_tensor(given, device=pairs[0][0].device)
    four = given[:, None] if given.ndim == 2 else given
    four = four.reshape((1,) * (4 - four.ndim) + four.shape)
    fits = [
        have in (1, want)
        for have, want in zip(four.shape, full[: 3 if any_length else 4], strict=False)
    ]
    seen = f"Shape {tuple(given.shape)} does not fit a cache of (L, B, H_kv, T) = {full}"
    require(
        four.ndim == 4 and all(fits), f"{seen}: give (T,), (B, T), (B, H_kv, T) or (L, B, H_kv, T)."
    )
    return four


def select(cache: DynamicCache, positions: Tensor) -> DynamicCache:
    """Keep the entries at the given indices, in that order. This is real eviction: the rest is in memory no more.

    Indices, 0 <= index < T, are (P,), (B, P), (B, H_kv, P) or (L, B, H_kv, P); others raise
    CacheError. Kept keys keep their rotation, so the next position is what it was.
    """
    index, pairs, have = _per_entry(positions, cache, any_length=True), _pairs(cache), length(cache)
    if index.numel():
        whole = not index.is_floating_point() and index.dtype != torch.bool
        require(
            whole,
            f"Positions are {index.dtype}, expected integer indices: a mask becomes indices by nonzero().",
        )
        low, high = index.min().item(), index.max().item()
        require(
            low >= 0 and high < have, f"Positions are {low} to {high}: count from 0 to {have - 1}."
        )
    layers = zip(
        pairs, index.long()[..., None].expand(len(pairs), -1, -1, -1, -1), strict=True
    )  # (B|1, H_kv|1, P, 1)
    return _build([x.take_along_dim(i.to(x.device), 2) for x in pair] for pair, i in layers)


def truncate(cache: DynamicCache, length: int) -> DynamicCache:
    """Keep the first `length` entries, without copying; CacheError if there are fewer."""
    pairs = _pairs(cache)
    have = _shape(pairs)[3]
    require(
        0 <= length <= have,
        f"A cache of {have} entries cannot be truncated to {length}: give 0 to {have}.",
    )
    return _build((keys[:, :, :length], values[:, :, :length]) for keys, values in pairs)


def join(first: DynamicCache, second: DynamicCache) -> DynamicCache:
    """Put the entries of `second` behind those of `first`; positions stay what they are (see `shift`).

    An item prefilled alone has not seen what stands before it: beyond one layer, joining it is an
    approximation. Raises CacheError if the two differ in anything but T.
    """
    a, b = _pairs(first), _pairs(second)
    one, two = ((*_shape(c)[:3], _shape(c)[4], c[0][0].dtype, str(c[0][0].device)) for c in (a, b))
    require(
        one == two,
        f"Cannot join (L, B, H_kv, D, dtype, device) {one} and {two}: make both with one model.",
    )
    return _build(
        tuple(torch.cat(both, 2) for both in zip(*layer, strict=True))
        for layer in zip(a, b, strict=True)
    )


def _turn(keys: Tensor, by: Tensor, rotary: nn.Module, scale: float = 1.0) -> Tensor:
    """Rotate keys (B, H_kv, T, D) by steps m of shape (B|1, H_kv|1, T|1): RoFormer, equation 34."""
    exact = torch.float32 if keys.device.type == "mps" else torch.float64  # mps has no float64
    angle = by[..., None].to(keys.device, exact) * rotary.inv_freq.to(
        keys.device, exact
    )  # m theta_i, (..., D/2)
    wide = torch.promote_types(keys.dtype, torch.float32)
    cos, sin = (scale * angle.cos()).to(wide), (scale * angle.sin()).to(wide)
    x, y = keys.to(wide).chunk(
        2, -1
    )  # Llama and its kin pair i with i + D/2, RoFormer 2i with 2i + 1
    return torch.cat((x * cos - y * sin, y * cos + x * sin), -1).to(keys.dtype)


def _turned(
    cache: DynamicCache, by: int | Tensor, rotary: nn.Module, power: int = 0
) -> DynamicCache:
    pairs = _pairs(cache)
    _require_rotary(rotary, pairs[0][0].shape[-1])
    scale = rotary.attention_scaling**power
    layers = zip(pairs, _per_entry(by, cache).expand(len(pairs), -1, -1, -1), strict=True)
    return _build((_turn(keys, m, rotary, scale), values) for (keys, values), m in layers)


def shift(cache: DynamicCache, by: int | Tensor, rotary: nn.Module) -> DynamicCache:
    """Move entries by a number of positions: rotate their keys by so many steps more (RoFormer, equations 14 to 16).

    Steps are one number, (T,), (B, 1), (B, T), (B, H_kv, T) or (L, B, H_kv, T), negative for
    backwards. They add up: shift(shift(c, a), b) = shift(c, a + b), so -a undoes a, up to one
    rounding each. The attention scaling of yarn is in stored keys already. `rotary` is `rotary_of`
    the model that made the cache; one of another kind or width, or that fails its self-check (once
    a module), raises CacheError. Source: arXiv 2104.09864, sections 3.2.2 and 3.4.2.

    >>> model, ids = _example()
    >>> moved, there = shift(prefill(model, ids).cache, 100, rotary_of(model)), prefill(model, ids, position=100).cache
    >>> torch.allclose(moved.layers[1].keys, there.layers[1].keys, atol=1e-4)
    True
    """
    return _turned(cache, by, rotary)


def unrotate(cache: DynamicCache, positions: int | Tensor, rotary: nn.Module) -> DynamicCache:
    """Return keys as before the rotary embedding, attention scaling divided out; positions are shaped as for `shift`.

    >>> (model, ids), positions = _example(), torch.arange(5)
    >>> cache, rotary = prefill(model, ids).cache, rotary_of(model)
    >>> again = rotate(unrotate(cache, positions, rotary), positions, rotary)
    >>> torch.allclose(again.layers[0].keys, cache.layers[0].keys, atol=1e-5)
    True
    """
    return _turned(cache, -torch.as_tensor(positions), rotary, -1)


def rotate(cache: DynamicCache, positions: int | Tensor, rotary: nn.Module) -> DynamicCache:
    """Put un-rotated keys at positions, with the model's attention scaling: the inverse of `unrotate`."""
    return _turned(cache, positions, rotary, 1)


class _Cursor:
    """Where the next call of a model writes in every layer of a `Slots`, and how many columns it sees."""

    where: slice | Tensor = slice(0, 0)  # the same columns of all rows, or (B, k)
    seen: int | None = None  # None: all


class _SlotLayer(DynamicLayer):
    """The columns of one layer."""

    def __init__(self, cursor: _Cursor, keys: Tensor, values: Tensor):
        super().__init__()
        self.cursor, self.keys, self.values, self.is_initialized = cursor, keys, values, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        where, seen = self.cursor.where, self.cursor.seen
        if isinstance(where, slice):
            self.keys[:, :, where], self.values[:, :, where] = key_states, value_states
        else:
            rows = torch.arange(len(where), device=where.device)[:, None]
            self.keys[rows, :, where] = key_states.transpose(1, 2)
            self.values[rows, :, where] = value_states.transpose(1, 2)
        return self.keys[:, :, :seen], self.values[:, :, :seen]


class Slots(Cache):
    """A transformers cache in memory that stays in place, each row of which grows and shrinks by itself.

    Row b has `lengths[b]` entries, in columns 0, 1, ... of `room`; column i stands at position i +
    `offsets[b]`. A call of a model must be aimed, and overwrites the columns it is aimed at: to
    take entries back is to make `lengths[b]` smaller, and costs nothing. What a query must not see
    (later columns, columns never written) the caller hides with a mask.

    >>> model, ids = _example()
    >>> slots, (cache, _, next_position) = Slots(model, rows=1, room=8), prefill(model, ids)
    >>> slots.put(0, cache, next_position)
    >>> columns = slots.aim(slots.lengths, count=1)
    >>> there = model(ids[:, :1], position_ids=columns + slots.offsets, past_key_values=slots).logits
    >>> torch.allclose(there[0], prefill(model, ids[:, :1], cache).logits, atol=1e-5)
    True
    """

    def __init__(self, model: PreTrainedModel, rows: int, room: int):
        config = model.config.get_text_config(decoder=True)
        shape, self.room = (rows, config.num_key_value_heads, room, _head_dim(config)), room
        kind = {"dtype": model.dtype, "device": model.device}
        self.cursor, self.lengths = _Cursor(), [0] * rows
        self.offsets = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        # Zeros, for what is hidden is still multiplied by 0, and 0 * nan is nan.
        memory = (torch.zeros(2, *shape, **kind) for _ in range(config.num_hidden_layers))
        super().__init__(layers=[_SlotLayer(self.cursor, keys, values) for keys, values in memory])

    def put(self, row: int, cache: DynamicCache, next_position: Position) -> None:
        """Make a row a copy of a cache of one row."""
        self.replace(row, 0, cache)
        self.lengths[row] = length(cache)
        self.offsets[row] = next_position - self.lengths[row]

    def aim(self, starts: list[int], count: int, fixed: bool = False) -> Tensor:
        """Let the next call write `count` columns of each row, from `starts[b]` on, and return them, (B, count).

        `fixed` makes all calls alike, as a compiler wants them: columns are a tensor, and all are
        seen.
        """
        stop = max(starts) + count
        require(
            stop <= self.room,
            f"Column {stop - 1} does not fit a row of {self.room}: give more room.",
        )
        if alike := min(starts) == max(starts) and not fixed:
            columns = torch.arange(stop - count, stop, device=self.offsets.device).expand(
                len(starts), -1
            )
        else:
            columns = torch.tensor(
                [[*range(start, start + count)] for start in starts], device=self.offsets.device
            )
        self.cursor.where, self.cursor.seen = (
            slice(stop - count, stop) if alike else columns,
            None if fixed else stop,
        )
        return columns

    def aim_at(self, columns: Tensor) -> Tensor:
        """Let the next call write the given columns (B, k) of each row, and return them."""
        self.cursor.where, self.cursor.seen = columns, None
        return columns

    def entries(self, row: int, start: int = 0, stop: int | None = None) -> DynamicCache:
        """Return the entries of a row, or a part of them, as a cache that shares their memory."""
        rows, columns = (
            slice(row, row + 1),
            slice(start, self.lengths[row] if stop is None else stop),
        )
        return _build(
            (layer.keys[rows, :, columns], layer.values[rows, :, columns]) for layer in self.layers
        )

    def read(self, row: int, start: int, stop: int, rotary: nn.Module) -> Read:
        """Return a part of a row's entries with their positions."""
        positions = torch.arange(start, stop, device=self.offsets.device) + self.offsets[row]
        return Read(
            self.entries(row, start, stop),
            positions[None],
            rotary,
            torch.ones_like(positions)[None],
        )

    def replace(self, row: int, start: int, cache: DynamicCache) -> None:
        """Write the entries of a cache of one row into a row's columns, from `start` on."""
        pairs, stop = _pairs(cache), start + length(cache)
        keys = self.layers[0].keys
        have = (
            len(pairs),
            pairs[0][0].shape[0],
            pairs[0][0].shape[1],
            pairs[0][0].shape[3],
            pairs[0][0].dtype,
        )
        want = (len(self.layers), 1, keys.shape[1], keys.shape[3], keys.dtype)
        require(
            have == want,
            f"The cache has (L, B, H_kv, D, dtype) = {have}, expected {want}: prefill one row.",
        )
        require(
            stop <= self.room,
            f"The cache has {stop} entries, a row has room for {self.room}: give more room.",
        )
        for layer, (keys, values) in zip(self.layers, pairs, strict=True):
            layer.keys[row, :, start:stop], layer.values[row, :, start:stop] = keys[0], values[0]

    def first(self, layers: int) -> "Slots":
        """Return the first layers, in the same memory, to be aimed on their own."""
        part = copy.copy(self)
        part.cursor, part.lengths = _Cursor(), list(self.lengths)
        part.layers = [
            _SlotLayer(part.cursor, layer.keys, layer.values) for layer in self.layers[:layers]
        ]
        return part


def step(
    model: PreTrainedModel, slots: Slots, tokens: Tensor, columns: Tensor, logits_to_keep: int = 0
) -> Tensor:
    """Run tokens (B, k) at columns (B, k) that slots are aimed at; query i of row b sees columns 0 to columns[b, i].

    Returns the logits of all of them, (B, k, vocab), or of the last few.
    """
    seen, mask = slots.cursor.seen or slots.room, None
    alike = isinstance(slots.cursor.where, slice) and model.config._attn_implementation == "sdpa"
    if (
        tokens.shape[1] > 1 or not alike
    ):  # else all that is seen may be seen, and sdpa needs no mask
        later = torch.arange(seen, device=columns.device) > columns[..., None]  # (B, k, seen)
        mask = torch.zeros(later.shape, dtype=model.dtype, device=later.device)
        mask = mask.masked_fill(later, float("-inf"))[:, None]
    places = {
        "position_ids": columns + slots.offsets,
        "attention_mask": mask,
        "logits_to_keep": logits_to_keep,
    }
    return model(input_ids=tokens, past_key_values=slots, use_cache=True, **places).logits


def first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Return a model of the first layers, last norm and head, that shares all its modules with the whole one.

    >>> model, ids = _example()
    >>> len(prefill(first_layers(model, 1), ids).cache.layers)
    1
    """
    have = model.config.num_hidden_layers
    require(0 < layers <= have, f"layers is {layers}, expected 1 to {have}, which the model has.")
    shallow, base = copy.copy(model), copy.copy(model.base_model)
    shallow.config = base.config = copy.copy(model.config)
    base.config.num_hidden_layers = layers  # decoders read it when they run
    shallow._modules = {**model._modules, model.base_model_prefix: base}
    return shallow


def repeat(cache: DynamicCache, rows: int) -> DynamicCache:
    """Give a cache of one row to several rows.

    >>> repeat(prefill(*_example()).cache, 3).layers[0].keys.shape
    torch.Size([3, 2, 5, 16])
    """
    pairs = _pairs(cache)
    have = _shape(pairs)[1]
    require(have == 1, f"The cache has {have} rows, expected one.")
    return _build(
        (keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)) for keys, values in pairs
    )


def scale_keys(cache: DynamicCache, factors: Tensor) -> DynamicCache:
    """Multiply keys by factors, (T,), (B, T), (B, H_kv, T) or (L, B, H_kv, T), and with them all logits they give.

    >>> cache = prefill(*_example()).cache
    >>> half = scale_keys(cache, torch.full((5,), 0.5)).layers[1]
    >>> torch.equal(half.keys, cache.layers[1].keys / 2), torch.equal(half.values, cache.layers[1].values)
    (True, True)
    """
    pairs = _pairs(cache)
    factors = _per_entry(factors, cache).expand(len(pairs), -1, -1, -1)[..., None]
    return _build(
        ((keys * f).to(keys.dtype), values)
        for (keys, values), f in zip(pairs, factors, strict=True)
    )


def shape_of(cache: DynamicCache) -> tuple[int, ...]:
    """Return (L, B, H_kv, T, D).

    >>> model, ids = _example()
    >>> shape_of(prefill(model, ids).cache)
    (2, 1, 2, 5, 16)
    """
    return _shape(_pairs(cache))


def pick_layers(cache: DynamicCache, layers: Sequence[int]) -> DynamicCache:
    """Return a cache of some layers, in the order given, that shares their memory."""
    pairs = _pairs(cache)
    return _build(pairs[layer] for layer in layers)


def to_tensor(cache: DynamicCache) -> Tensor:
    """Copy a cache into one tensor, (L, 2, B, H_kv, T, D), keys before values.

    >>> cache = prefill(*_example()).cache
    >>> to_tensor(cache).shape, torch.equal(from_tensor(to_tensor(cache)).layers[1].values, cache.layers[1].values)
    (torch.Size([2, 2, 1, 2, 5, 16]), True)
    """
    return torch.stack([torch.stack(pair) for pair in _pairs(cache)])


def from_tensor(tensor: Tensor) -> DynamicCache:
    """Return the cache that `to_tensor` took apart, or some of its layers, without copying."""
    seen = f"The tensor is {tuple(tensor.shape)}, expected (L, 2, B, H_kv, T, D)"
    require(tensor.ndim == 6 and tensor.shape[1] == 2, f"{seen}: give what `to_tensor` returned.")
    return _build((keys, values) for keys, values in tensor)


def nbytes(cache: DynamicCache) -> int:
    """Count the bytes of all keys and values."""
    return sum(tensor.nbytes for pair in _pairs(cache) for tensor in pair)


def bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Predict the bytes of one token's keys and values: 2 * L * H_kv * D * bytes of one number."""
    config = config.get_text_config(decoder=True)
    return (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * _head_dim(config)
        * dtype.itemsize
    )


def fingerprint(model: PreTrainedModel) -> dict:
    """Describe what makes a cache belong to a model, in parts that JSON can hold.

    The parts are "architecture" (sizes), "rope" (frequencies and scaling) and "weights" (dtype, and
    SHA-256 of 64 evenly spaced numbers of every parameter: any training changes some of them, a
    single edited number can escape).
    """
    config, rotary, digest = (
        model.config.get_text_config(decoder=True),
        rotary_of(model),
        hashlib.sha256(),
    )
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        digest.update(name.encode() + as_bytes(flat[:: max(1, flat.numel() // 64)][:64]))
    rope = {"type": getattr(rotary, "rope_type", "default"), "inv_freq": rotary.inv_freq.tolist()}
    return {
        "architecture": {key: getattr(config, key, None) for key in ARCHITECTURE}
        | {"head_dim": _head_dim(config)},
        "rope": rope | {"attention_scaling": float(rotary.attention_scaling)},
        "weights": {"dtype": str(model.dtype), "sha256": digest.hexdigest()},
    }


def _same(a, b) -> bool:
    """Compare, leaving the last digits of a frequency to the device that computed it."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return (
        math.isclose(a, b, rel_tol=1e-5)
        if isinstance(a, float) and isinstance(b, float)
        else a == b
    )


def differences(saved: dict, own: dict) -> str:
    """Name the fields in which two fingerprints differ, with both values."""
    fields = (
        (f"{part} {key}", saved[part].get(key), value)
        for part in own
        for key, value in own[part].items()
    )
    unlike = ((name, reprlib.repr(a), reprlib.repr(b)) for name, a, b in fields if not _same(a, b))
    return "; ".join(f"{name} is {a} in the file and {b} in the model" for name, a, b in unlike)


def _digest(header: dict, tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of all that a file holds except this number."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def save(
    cache: DynamicCache,
    path: str | Path,
    model: Owner,
    next_position: Position,
    metadata: dict | None = None,
):
    """Write a cache to one safetensors file, atomically: a kill leaves the old file or the new one.

    `next_position` is where to continue, `metadata` anything JSON can hold. Raises CacheError if
    the cache does not have the model's layers, heads and width, or the folder does not exist.

    >>> import tempfile
    >>> model, ids = _example()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(prefill(model, ids).cache, f"{folder}/a.safetensors", model, 5, {"text": "hello"})
    ...     load(f"{folder}/a.safetensors", model).metadata
    {'text': 'hello'}
    """
    path, pairs = Path(path), _pairs(cache)
    owner = model if isinstance(model, dict) else fingerprint(model)
    require(path.parent.is_dir(), f"There is no folder {path.parent}: make it first.")
    require(not path.is_dir(), f"{path} is a folder: give the name of a file in it.")
    _require_position(next_position, _shape(pairs)[1])
    have = tuple(_shape(pairs)[i] for i in (0, 2, 4))
    want = tuple(
        owner["architecture"][key]
        for key in ("num_hidden_layers", "num_key_value_heads", "head_dim")
    )
    require(
        have == want,
        f"The cache has (L, H_kv, D) = {have}, the model {want}: give the model that made it.",
    )
    tensors = {f"layer.{i}.keys": keys for i, (keys, _) in enumerate(pairs)}
    tensors |= {f"layer.{i}.values": values for i, (_, values) in enumerate(pairs)}
    header = {
        "version": FORMAT_VERSION,
        "fingerprint": owner,
        "next_position": torch.as_tensor(next_position).tolist(),
    }
    header |= {"dtype": str(pairs[0][0].dtype), "layers": len(pairs), "length": length(cache)}
    header = json.loads(
        json.dumps(header | {"metadata": metadata or {}})
    )  # as it will be read, for the checksum
    text = json.dumps(header | {"sha256": _digest(header, tensors)})
    write_tensors(path, tensors, {"kvlab": text})


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Return header and tensors of a file written by `save`, or say what is wrong with it."""
    require(path.is_file(), f"There is no file {path}: save a cache there first.")
    damaged = f"{path} is damaged or cut short: delete it and save the cache again, if it ever was a cache."
    try:
        with safe_open(path, framework="pt") as file:
            text, names = (file.metadata() or {}).get("kvlab", "null"), file.keys()
            header, tensors = json.loads(text), {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, TypeError, RuntimeError, OSError) as error:
        raise CacheError(f"{damaged} ({type(error).__name__}: {error})") from error
    require(
        isinstance(header, dict),
        f"{path} is a safetensors file but no kvlab cache: give one made by `save`.",
    )
    seen = f"{path} has cache format version {header.get('version')}, this kvlab reads version {FORMAT_VERSION}"
    require(
        header.get("version") == FORMAT_VERSION,
        f"{seen}: use the kvlab that wrote it, or save the cache again.",
    )
    claimed = header.pop("sha256", None)
    require(
        claimed == _digest(header, tensors), f"{damaged} (Its contents do not match its checksum.)"
    )
    return header, tensors


def load(path: str | Path, model: Owner) -> Saved:
    """Read a cache that `save` wrote, bit for bit, onto the device of the model that made it (CPU for a fingerprint).

    Raises CacheError for a file that is missing, damaged, cut short, of another kind or format
    version, or of another model (the message names the fields that differ).
    """
    header, tensors = _read(Path(path))
    owner, device = (
        (model, "cpu") if isinstance(model, dict) else (fingerprint(model), model.device)
    )
    unlike = differences(header["fingerprint"], owner)
    require(
        not unlike,
        f"{path} was made by another model ({unlike}): load it with that model, or save it again.",
    )
    layers = [
        (tensors[f"layer.{i}.keys"], tensors[f"layer.{i}.values"]) for i in range(header["layers"])
    ]
    cache = clone(
        _build((keys.to(device), values.to(device)) for keys, values in layers)
    )  # not a map of the file
    position = header["next_position"]
    position = torch.tensor(position, device=device) if isinstance(position, list) else position
    return Saved(cache, position, header["metadata"])
