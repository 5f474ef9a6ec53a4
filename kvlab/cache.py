"""The KV cache as a value: make one, take it apart, put it together, move it, keep it.

A `DynamicCache` holds keys and values of shape (B, H_kv, T, D) for each of L layers; keys are stored
rotated. An *entry* is one of the T columns; its *position* is the number of steps its key was rotated by.
The two agree until entries are dropped or moved, so a cache travels with the position at which its text
continues: that pair is a `Prefix`.

No function writes into a tensor that it was given; results may share memory with their arguments
(`truncate` copies nothing, `shift` keeps the values). Gradients follow the caller: use `torch.no_grad()`
for inference. `_example()` is a random two-layer Qwen3 and five token ids.

>>> model, ids = _example()
>>> prefix = prefill(model, ids)
>>> prefix.next_position, length(select(prefix.cache, torch.tensor([0, 3])))
(5, 2)
>>> nbytes(prefix.cache) == 5 * bytes_per_token(model.config, torch.float32)
True
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvlab.files import as_bytes, write_tensors
from kvlab.models import (
    CacheError,
    _example,  # noqa: F401, for the examples
    differences,
    evaluating,
    fingerprint,
    head_dim,
    require_rotary,
    require_supported,
    rotary_of,
    rotate_keys,
)
from kvlab.ragged import RaggedLayer, attend_ragged, bias_of, causal_mask, is_ragged, pack

FORMAT_VERSION, RAGGED_VERSION = 1, 2  # files of ordinary caches, and of those in `kvlab.ragged`
Position = int | Tensor  # one for all rows, or (B,)
Owner = PreTrainedModel | dict  # the model that made a cache, or its `fingerprint`


class _OwnCache:
    """A field that holds a cache of its own and gives out copies, which share its keys and values.

    `generate` and `model(...)` append to the cache they are given: to a copy, and the field stays as it was.
    """

    def __get__(self, owner, owner_type=None) -> Cache | None:
        if owner is None:
            raise AttributeError("The field has no default.")
        return self._copied(owner.__dict__["_cache"])

    def __set__(self, owner, cache: Cache | None) -> None:
        owner.__dict__["_cache"] = self._copied(cache)

    def _copied(self, cache: Cache | None) -> Cache | None:
        copied = copy.copy(cache)
        if cache is not None:
            copied.layers = [copy.copy(layer) for layer in cache.layers]
        return copied


@dataclass(frozen=True, eq=False)
class Prefix:
    """A cache and where to go on: what `prefill`, `load`, splicing, eviction and compression return.

    Its cache does not grow: models append to the copy that `prefix.cache` gives.

    Args:
        cache: keys and values of T entries. After eviction T is not the next position.
        next_position: the position of the next token; (B,) where rows differ.
        input_ids: the token ids the cache stands for, of one row, where they are known.
        logits: (B, V), the model's output after the last token, if it was just computed.
        positions: of the entries, (B, T), where they are known.
        attention_mask: (B, T), 0 for padding; None if there is no padding.
        rotary: the rotary embedding that rotated the keys.
        metadata: what was saved with it.
    """

    cache: DynamicCache = _OwnCache()
    next_position: Position
    input_ids: Sequence[int] = ()
    logits: Tensor | None = None
    positions: Tensor | None = None
    attention_mask: Tensor | None = None
    rotary: nn.Module | None = None
    metadata: dict | None = None


class Layout(NamedTuple):
    """What two caches must have in common to be joined."""

    layers: int
    rows: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


def layout(cache: Cache) -> Layout:
    """Return the layout of a cache; CacheError for an empty one, and for layers that drop or mix entries."""
    layers = cache.layers
    if not layers or any(layer.keys is None for layer in layers):
        raise CacheError("The cache is empty: prefill something first.")
    other = sorted(
        {type(layer).__name__ for layer in layers if not isinstance(layer, DynamicLayer)}
    )
    other += [type(layer).__name__ for layer in layers if getattr(layer, "is_sliding", False)]
    if other:
        raise CacheError(
            f"The cache has layers of type {other}, expected DynamicLayer (full attention)."
        )
    rows, kv_heads, _, width = layers[0].keys.shape
    return Layout(len(layers), rows, kv_heads, width, layers[0].keys.dtype)


def from_layers(pairs: Iterable[tuple[Tensor, Tensor]]) -> DynamicCache:
    """Put a DynamicCache around (keys, values) of each layer, (B, H_kv, T, D), without copying them."""
    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def from_ragged(layers: Iterable[RaggedLayer]) -> DynamicCache:
    """Make a cache of layers: an ordinary one, if all heads have one length, and no entry a bias."""
    layers = list(layers)
    lengths = {layer.keys.shape[2] for layer in layers}
    if len(lengths) == 1 and not any(layer.bias.any() for layer in layers):
        return from_layers((layer.keys, layer.values) for layer in layers)
    cache = DynamicCache()
    cache.layers = layers
    return cache


def _layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Return (keys, values) of every layer of a cache that can be cut and joined."""
    layout(cache)
    if is_ragged(cache):
        takers = "see kvlab.ragged for the functions that take it"
        raise CacheError(f"Heads of this cache have lengths of their own: {takers}.")
    return [(layer.keys, layer.values) for layer in cache.layers]


def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    prefix: Prefix | None = None,
    *,
    position: Position | None = None,
    attention_mask: Tensor | None = None,
) -> Prefix:
    """Run token ids through a model, after a prefix, and return the longer prefix; the old one stays as it was.

    In pieces or at once gives the same. Costs one pass over the new tokens, and a copy of the cache.

    Args:
        model: a causal LM; see `kvlab.models.require_supported`.
        input_ids: (B, T), the new tokens, padded on the left if at all.
        prefix: what the new tokens can look back to.
        position: of the first new token that is not padding. Default: the prefix's next position, or 0.
        attention_mask: (B, T) of the new tokens, 0 for padding. The prefix brings its own.

    Example:
        >>> model, ids = _example()
        >>> whole, pieces = prefill(model, ids), prefill(model, ids[:, 3:], prefill(model, ids[:, :3]))
        >>> torch.allclose(whole.logits, pieces.logits, atol=1e-5), pieces.next_position
        (True, 5)
    """
    require_supported(model)
    if input_ids.ndim != 2 or not input_ids.numel():
        raise CacheError(f"input_ids is {tuple(input_ids.shape)}, expected (B, T > 0).")
    rows, count = input_ids.shape
    prefix = prefix or Prefix(DynamicCache(), 0)
    past = length(prefix.cache)
    if past:
        _require_made_by(prefix.cache, model, rows)
    position = prefix.next_position if position is None else position
    _require_position(position, rows)
    new_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if new_mask.shape != input_ids.shape:
        expected = f"expected that of the new tokens, {(rows, count)}"
        raise CacheError(f"attention_mask is {tuple(new_mask.shape)}, {expected}.")
    if attention_mask is not None and not new_mask[:, -1].all():
        raise CacheError("attention_mask ends in 0: pad on the left.")
    mask = None
    if attention_mask is not None or prefix.attention_mask is not None:
        past_mask = prefix.attention_mask
        past_mask = new_mask.new_ones(rows, past) if past_mask is None else past_mask.long()
        mask = torch.cat((past_mask, new_mask), 1)
    start = torch.as_tensor(position, device=input_ids.device).reshape(-1, 1)
    new_positions = (start + new_mask.cumsum(1) - 1).clamp(min=0)  # padding gets any position
    options = {"attention_mask": mask, "position_ids": new_positions, "logits_to_keep": 1}
    cache = prefix.cache if past else DynamicCache()
    output = read(model, input_ids, cache, **options)
    positions = prefix.positions if past else new_positions[:, :0]
    if (
        positions is not None and positions.ndim == 2
    ):  # evicted entries may differ by layer and head
        positions = torch.cat((positions.expand(rows, past), new_positions), 1)
    else:
        positions = None
    ids_known = rows == 1 and (not past or len(prefix.input_ids) > 0)
    same_rows = isinstance(position, int) and attention_mask is None
    return Prefix(
        cache=output.past_key_values,
        next_position=position + count if same_rows else new_positions[:, -1] + 1,
        input_ids=[*prefix.input_ids, *input_ids[0].tolist()] if ids_known else (),
        logits=output.logits[:, -1],
        positions=positions,
        attention_mask=mask,
        rotary=rotary_of(model),
    )


def read(model: PreTrainedModel, input_ids: Tensor, cache: DynamicCache, **options):
    """Run token ids, (B, T), through a model after a cache, which grows, and return its output.

    Args:
        options: of the model, such as position_ids, (B, T).

    Raises:
        CacheError: a mask together with heads of different lengths.
    """
    if is_ragged(cache):
        if options.get("attention_mask") is not None:
            hint = "read rows without padding, one by one"
            raise CacheError(f"Heads of this cache have lengths of their own: {hint}.")
        count = input_ids.shape[1]
        options["attention_mask"] = causal_mask(model, count, length(cache) + count)
    with evaluating(model), attend_ragged(model, cache):
        return model(input_ids=input_ids, past_key_values=cache, use_cache=True, **options)


def _require_made_by(cache: DynamicCache, model: PreTrainedModel, rows: int) -> None:
    config = model.config.get_text_config(decoder=True)
    heads = config.num_key_value_heads
    expected = Layout(config.num_hidden_layers, rows, heads, head_dim(config), model.dtype)
    if layout(cache) != expected:
        raise CacheError(
            f"The prefix has {layout(cache)}, expected {expected}: prefill this model."
        )


def _require_position(position: Position, rows: int) -> None:
    position = torch.as_tensor(position).flatten()
    integers = not position.is_floating_point() and bool((position >= 0).all())
    if not integers or len(position) not in (1, rows):
        expected = f"expected a non-negative integer, or one for each of {rows} rows"
        raise CacheError(
            f"The position is {position.tolist()}, {expected}: pass the next_position."
        )


def part(prefix: Prefix, start: int, stop: int) -> Prefix:
    """Return the entries from `start` to `stop`, without copying, with their positions and mask.

    >>> model, ids = _example()
    >>> part(prefill(model, ids, position=3), 1, 3).positions
    tensor([[4, 5]])
    """
    columns = slice(start, stop)
    fields = {"input_ids": prefix.input_ids[columns], "logits": None}
    for name in ("positions", "attention_mask"):
        value = getattr(prefix, name)
        fields[name] = None if value is None else value[:, columns]
    layers = (
        (keys[:, :, columns], values[:, :, columns]) for keys, values in _layers(prefix.cache)
    )
    return replace(prefix, cache=from_layers(layers), **fields)


def length(cache: Cache) -> int:
    """Count the entries T of a cache (which is not the next position, once entries were dropped).

    Where heads have lengths of their own: those of the longest.
    """
    return max((layer.get_seq_length() for layer in cache.layers), default=0)


def clone(cache: DynamicCache) -> DynamicCache:
    """Copy a cache into memory of its own."""
    return from_layers((keys.clone(), values.clone()) for keys, values in _layers(cache))


def _per_entry(numbers: int | Tensor, cache: DynamicCache) -> Tensor:
    """Broadcast a number, (T,), (B, T), (B, H_kv, T) or (L, B, H_kv, T) to (L, B|1, H_kv|1, T|1)."""
    numbers = torch.as_tensor(numbers, device=cache.layers[0].keys.device)
    if numbers.ndim == 2:
        numbers = numbers[:, None]
    numbers = numbers.reshape((1,) * (4 - numbers.ndim) + numbers.shape)
    return numbers.expand(len(cache.layers), -1, -1, -1)


def select(cache: DynamicCache, indices: Tensor) -> DynamicCache:
    """Keep the entries at the given indices, in that order. This is real eviction: the rest is freed.

    Indices are (P,), (B, P), (B, H_kv, P) or (L, B, H_kv, P), counted from 0. Kept keys keep their
    rotation, so the next position is what it was.
    """
    entries = length(cache)
    if indices.dtype == torch.bool:
        raise CacheError("The indices are a mask, expected integers: use mask.nonzero().")
    if (
        indices.numel() and not 0 <= indices.min() <= indices.max() < entries
    ):  # torch does not check
        raise CacheError(f"Indices outside 0 to {entries - 1}, the entries of the cache.")
    layers = []
    for (keys, values), index in zip(_layers(cache), _per_entry(indices, cache), strict=True):
        index = index.long()[..., None]  # (B|1, H_kv|1, P, 1)
        layers.append((keys.take_along_dim(index, 2), values.take_along_dim(index, 2)))
    return from_layers(layers)


def truncate(cache: DynamicCache, length: int) -> DynamicCache:
    """Keep the first `length` entries, without copying; CacheError if there are fewer."""
    pairs, entries = _layers(cache), cache.get_seq_length()
    if not 0 <= length <= entries:
        raise CacheError(f"A cache of {entries} entries cannot be truncated to {length}.")
    return from_layers((keys[:, :, :length], values[:, :, :length]) for keys, values in pairs)


def join(first: DynamicCache, second: DynamicCache) -> DynamicCache:
    """Append the entries of `second` to those of `first`; positions stay what they are (see `shift`).

    An item prefilled alone has not seen what precedes it: beyond one layer, joining it is an approximation.
    """
    if layout(first) != layout(second):
        raise CacheError(f"Cannot join {layout(first)} and {layout(second)}: use one model.")
    ragged = is_ragged(first) or is_ragged(second)
    layers = []
    for pair in zip(first.layers, second.layers, strict=True):
        keys = torch.cat([layer.keys for layer in pair], 2)
        values = torch.cat([layer.values for layer in pair], 2)
        layers.append((keys, values))
        if ragged:
            bias = torch.cat([bias_of(layer) for layer in pair], 2)
            layers[-1] = pack(keys, values, bias > float("-inf"), bias)
    return from_ragged(layers) if ragged else from_layers(layers)


def _rotated(
    cache: DynamicCache, by: int | Tensor, rotary: nn.Module, scale: float
) -> DynamicCache:
    require_rotary(rotary, layout(cache).head_dim)
    steps = _per_entry(by, cache)
    if is_ragged(cache):
        layers = []
        for layer, m in zip(cache.layers, steps, strict=True):
            m = m[..., -max(1, layer.keys.shape[2]) :]  # of T numbers a layer has the last
            keys = rotate_keys(layer.keys, m, rotary, scale)
            layers.append(RaggedLayer(keys, layer.values, layer.bias))
        return from_ragged(layers)
    layers = zip(_layers(cache), steps, strict=True)
    return from_layers(
        (rotate_keys(keys, m, rotary, scale), values) for (keys, values), m in layers
    )


def shift(cache: DynamicCache, by: int | Tensor, rotary: nn.Module) -> DynamicCache:
    """Move entries by a number of positions: rotate their keys further (RoFormer, equations 14 to 16).

    Shifts add up, so -a undoes a, up to one rounding each. The attention scaling of yarn is in stored keys
    already. Source: arXiv 2104.09864, sections 3.2.2 and 3.4.2.

    Args:
        cache: the cache to move.
        by: positions, negative for backwards: one number, (T,), (B, 1), (B, T), (B, H_kv, T) or
            (L, B, H_kv, T).
        rotary: `rotary_of` the model that made the cache.

    Example:
        >>> model, ids = _example()
        >>> moved = shift(prefill(model, ids).cache, 100, rotary_of(model))
        >>> expected = prefill(model, ids, position=100).cache
        >>> torch.allclose(moved.layers[1].keys, expected.layers[1].keys, atol=1e-4)
        True
    """
    return _rotated(cache, by, rotary, 1.0)


def unrotate(cache: DynamicCache, positions: int | Tensor, rotary: nn.Module) -> DynamicCache:
    """Return keys as before the rotary embedding, attention scaling divided out; positions as for `shift`.

    >>> (model, ids), positions = _example(), torch.arange(5)
    >>> cache, rotary = prefill(model, ids).cache, rotary_of(model)
    >>> restored = rotate(unrotate(cache, positions, rotary), positions, rotary)
    >>> torch.allclose(restored.layers[0].keys, cache.layers[0].keys, atol=1e-5)
    True
    """
    return _rotated(cache, -torch.as_tensor(positions), rotary, 1 / rotary.attention_scaling)


def rotate(cache: DynamicCache, positions: int | Tensor, rotary: nn.Module) -> DynamicCache:
    """Put un-rotated keys at positions, with the model's attention scaling: the inverse of `unrotate`."""
    return _rotated(cache, positions, rotary, rotary.attention_scaling)


def repeat(cache: DynamicCache, rows: int) -> DynamicCache:
    """Give a cache of one row to several rows.

    >>> repeat(prefill(*_example()).cache, 3).layers[0].keys.shape
    torch.Size([3, 2, 5, 16])
    """
    if layout(cache).rows != 1:
        raise CacheError(f"The cache has {layout(cache).rows} rows, expected one.")
    size = (rows, -1, -1, -1)
    if is_ragged(cache):
        layers = [(layer.keys, layer.values, layer.bias[..., None]) for layer in cache.layers]
        layers = [[tensor.expand(size) for tensor in tensors] for tensors in layers]
        return from_ragged(RaggedLayer(k, v, bias[..., 0]) for k, v, bias in layers)
    return from_layers((keys.expand(size), values.expand(size)) for keys, values in _layers(cache))


def scale_keys(cache: DynamicCache, factors: Tensor) -> DynamicCache:
    """Multiply keys by factors, (T,), (B, T), (B, H_kv, T) or (L, B, H_kv, T), and so their logits.

    >>> cache = prefill(*_example()).cache
    >>> half = scale_keys(cache, torch.full((5,), 0.5)).layers[1]
    >>> torch.equal(half.keys, cache.layers[1].keys / 2)
    True
    """
    layers = zip(_layers(cache), _per_entry(factors, cache)[..., None], strict=True)
    return from_layers(((keys * f).to(keys.dtype), values) for (keys, values), f in layers)


def pick_layers(cache: DynamicCache, layers: Sequence[int]) -> DynamicCache:
    """Return a cache of some layers, in the order given, that shares their memory."""
    pairs = _layers(cache)
    return from_layers(pairs[layer] for layer in layers)


def shape_of(cache: DynamicCache) -> tuple[int, ...]:
    """Return (L, B, H_kv, T, D).

    >>> shape_of(prefill(*_example()).cache)
    (2, 1, 2, 5, 16)
    """
    pairs = _layers(cache)
    return (len(pairs), *pairs[0][0].shape)


def to_tensor(cache: DynamicCache) -> Tensor:
    """Copy a cache into one tensor, (L, 2, B, H_kv, T, D), keys before values.

    >>> cache = prefill(*_example()).cache
    >>> restored = from_tensor(to_tensor(cache))
    >>> torch.equal(restored.layers[1].values, cache.layers[1].values)
    True
    """
    return torch.stack([torch.stack(pair) for pair in _layers(cache)])


def from_tensor(tensor: Tensor) -> DynamicCache:
    """Return the cache that `to_tensor` took apart, or some of its layers, without copying."""
    if tensor.ndim != 6 or tensor.shape[1] != 2:
        raise CacheError(f"The tensor is {tuple(tensor.shape)}, expected (L, 2, B, H_kv, T, D).")
    return from_layers((keys, values) for keys, values in tensor)


def convert(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy a tensor to the CPU in a dtype to be stored in; CacheError for numbers that it cannot hold.

    >>> convert(torch.tensor([1.5]), torch.float16)
    tensor([1.5000], dtype=torch.float16)
    """
    converted = tensor.to("cpu", dtype, copy=True)
    if not converted.float().isfinite().all():
        limit = f"expected at most {torch.finfo(dtype).max:,.0f}, the largest in {dtype}"
        message = f"A number is {tensor.abs().max().item():.3g}, {limit}"
        raise CacheError(f"{message}: store in torch.bfloat16 or torch.float32.")
    return converted


def nbytes(cache: DynamicCache) -> int:
    """Count the bytes of all keys and values."""
    layout(cache)
    parts = [(x.keys, x.values, getattr(x, "bias", None)) for x in cache.layers]
    return sum(tensor.nbytes for part in parts for tensor in part if tensor is not None)


def bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Predict the bytes of one token's keys and values: 2 * L * H_kv * D * bytes of one number."""
    config = config.get_text_config(decoder=True)
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * heads * head_dim(config) * dtype.itemsize


def _checksum(header: dict, tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of all that a file holds except this number."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def save(prefix: Prefix, path: str | Path, model: Owner, metadata: dict | None = None) -> None:
    """Write a cache and its next position to one safetensors file, atomically.

    Args:
        prefix: what to keep; its mask, logits and token ids are not written.
        path: the file.
        model: the model that made the cache, or its `fingerprint`.
        metadata: anything that JSON can hold.

    Example:
        >>> import tempfile
        >>> model, ids = _example()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(prefill(model, ids), f"{folder}/a.safetensors", model, {"text": "hello"})
        ...     load(f"{folder}/a.safetensors", model).metadata
        {'text': 'hello'}
    """
    owner = model if isinstance(model, dict) else fingerprint(model)
    cache, sizes = prefix.cache, layout(prefix.cache)
    ragged = is_ragged(cache)
    _require_position(prefix.next_position, sizes.rows)
    names = {
        "layers": "num_hidden_layers",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
    }
    expected = sizes._replace(**{k: owner["architecture"][name] for k, name in names.items()})
    if sizes != expected:
        raise CacheError(
            f"The cache has {sizes}, the model {expected}: give the model that made it."
        )
    tensors = {}
    for i, layer in enumerate(cache.layers):
        tensors[f"layer.{i}.keys"] = layer.keys
        tensors[f"layer.{i}.values"] = layer.values
        if ragged:
            tensors[f"layer.{i}.bias"] = layer.bias
    header = {
        "version": RAGGED_VERSION if ragged else FORMAT_VERSION,
        "fingerprint": owner,
        "next_position": torch.as_tensor(prefix.next_position).tolist(),
        "dtype": str(sizes.dtype),
        "layers": len(cache.layers),
        "length": length(cache),
        "metadata": metadata or {},
    }
    header = json.loads(json.dumps(header))  # as it will be read, for the checksum
    header["sha256"] = _checksum(header, tensors)
    write_tensors(Path(path), tensors, {"kvlab": json.dumps(header)})


def _read_cache_file(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Return header and tensors of a file written by `save`, or say what is wrong with it."""
    if not path.is_file():
        raise CacheError(f"There is no file {path}: save a cache there first.")
    damaged = f"{path} is damaged or cut short, or no kvlab cache: save the cache again"
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("kvlab", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, RuntimeError, OSError) as error:
        raise CacheError(f"{damaged} ({type(error).__name__}: {error}).") from error
    if not isinstance(header, dict):
        raise CacheError(
            f"{path} is a safetensors file but no kvlab cache: give one made by `save`."
        )
    version = header.get("version")
    if version not in (FORMAT_VERSION, RAGGED_VERSION):
        expected = f"this kvlab reads up to version {RAGGED_VERSION}: save the cache again"
        raise CacheError(f"{path} has cache format version {version}, {expected}.")
    if header.pop("sha256", None) != _checksum(header, tensors):
        raise CacheError(f"{damaged} (its contents do not match its checksum).")
    return header, tensors


def load(path: str | Path, model: Owner) -> Prefix:
    """Read a cache that `save` wrote, bit for bit, onto the model's device (the CPU for a fingerprint).

    Raises:
        CacheError: for a file that is missing, damaged, cut short, of another kind or format version, or
            of another model (the message names the fields that differ).
    """
    header, tensors = _read_cache_file(Path(path))
    owner, device = (
        (model, "cpu") if isinstance(model, dict) else (fingerprint(model), model.device)
    )
    if differs := differences(header["fingerprint"], owner):
        raise CacheError(f"{path} was made by another model ({differs}): load it with that model.")
    ragged = header["version"] == RAGGED_VERSION
    layers = []
    for i in range(header["layers"]):
        names = ("keys", "values", "bias")[: 3 if ragged else 2]
        # Clones are not a map of the file.
        layers.append([tensors[f"layer.{i}.{name}"].to(device).clone() for name in names])
    position = header["next_position"]
    return Prefix(
        cache=from_ragged(RaggedLayer(*x) for x in layers) if ragged else from_layers(layers),
        next_position=torch.tensor(position, device=device)
        if isinstance(position, list)
        else position,
        rotary=None if isinstance(model, dict) else rotary_of(model),
        metadata=header["metadata"],
    )
