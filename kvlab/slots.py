"""A KV cache in memory that stays in place, for decoding: each row grows and shrinks by itself.

`kvlab.cache` makes new caches and never writes into old ones; here every call of a model overwrites
columns. So a rejected guess is taken back by lowering one number, and a compiled step always finds the
same tensors.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvlab.cache import Position, Prefix, from_layers, layout, length
from kvlab.models import CacheError, evaluating, head_dim, rotary_of
from kvlab.ragged import attend_ragged, bias_of, is_ragged


class _WriteState:
    """Where the next call of a model writes in every layer, and how many columns its queries see."""

    positions: slice | Tensor = slice(0, 0)  # the same columns in all rows, or (B, k)
    visible_length: int | None = None  # None: all


class _SlotLayer(DynamicLayer):
    """The columns of one layer, from `first` on; `bias` as in `kvlab.ragged`, or None."""

    def __init__(self, write: _WriteState, keys, values, first: int = 0, bias=None):
        super().__init__()
        self.write = write
        self.keys = keys
        self.values = values
        self.first = first
        self.bias = bias
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        positions = self.write.positions
        if isinstance(positions, slice):
            columns = self.columns(positions)
            self.keys[:, :, columns] = key_states
            self.values[:, :, columns] = value_states
        else:
            columns = positions - self.first
            rows = torch.arange(len(positions), device=positions.device)[:, None]
            self.keys[rows, :, columns] = key_states.transpose(1, 2)
            self.values[rows, :, columns] = value_states.transpose(1, 2)
        visible = self.columns(slice(0, self.write.visible_length))
        return self.keys[:, :, visible], self.values[:, :, visible]

    def columns(self, part: slice) -> slice:
        """Where this layer has some of the columns; it does not have those before `first`."""
        stop = None if part.stop is None else part.stop - self.first
        return slice(max(0, part.start - self.first), stop)


class Slots(Cache):
    """A transformers cache in fixed memory.

    Row b has `lengths[b]` entries, in columns 0, 1, ... of `room`; column i has position i + `offsets[b]`.
    Of a row whose heads have lengths of their own (`kvlab.ragged`) these are the columns of the longest.
    Before each call of a model, `set_write_positions` says which columns the call overwrites. To take
    entries back, lower `lengths[b]`. The caller hides what a query must not see (later columns, columns
    never written) with a mask, as `step` does.

    With `keep_hidden`, each call of `step` leaves the last hidden states of its tokens in `hidden`, (B, k, d).

    Args:
        model: the causal LM whose entries are stored.
        rows: the batch size.
        room: columns per row.
        prefixes: ragged caches that rows will get, one per row: what no row needs in a layer is not
            allocated. Default: all rows get ordinary caches.

    Example:
        >>> from kvlab.cache import prefill
        >>> from kvlab.models import _example
        >>> (model, ids), slots = _example(), Slots(_example()[0], rows=1, room=8)
        >>> slots.put(0, (prefix := prefill(model, ids)).cache, prefix.next_position)
        >>> columns = slots.set_write_positions(slots.lengths, count=1)
        >>> logits = step(model, slots, ids[:, :1], columns)[:, 0]
        >>> torch.allclose(logits, prefill(model, ids[:, :1], prefix).logits, atol=1e-5)
        True
    """

    keep_hidden = False
    hidden: Tensor | None = None

    def __init__(
        self, model: PreTrainedModel, rows: int, room: int, prefixes: Sequence[Cache] = ()
    ):
        config = model.config.get_text_config(decoder=True)
        heads, width = config.num_key_value_heads, head_dim(config)
        self.room = room
        self.rotary = rotary_of(model)
        self.write = _WriteState()
        self.lengths = [0] * rows
        self.offsets = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        layers = []
        for i in range(config.num_hidden_layers):
            unused = [length(cache) - cache.layers[i].get_seq_length() for cache in prefixes]
            first = min(unused, default=0)
            # Zeros, for hidden entries are still multiplied by 0, and 0 * nan is nan.
            shape = (2, rows, heads, room - first, width)
            keys, values = torch.zeros(shape, dtype=model.dtype, device=model.device)
            bias = torch.zeros_like(keys[..., 0]) if prefixes else None
            layers.append(_SlotLayer(self.write, keys, values, first, bias))
        super().__init__(layers=layers)

    def put(self, row: int, cache: DynamicCache, next_position: Position) -> None:
        """Make a row a copy of a cache of one row."""
        count = length(cache)
        if is_ragged(self):
            self._put_ragged(row, cache, count)
        elif is_ragged(cache):
            raise CacheError("Heads of the cache have lengths of their own: give it as a prefix.")
        else:
            self.replace(row, 0, cache)
        self.lengths[row] = count
        self.offsets[row] = next_position - count

    def _put_ragged(self, row: int, cache: DynamicCache, count: int) -> None:
        for slot, layer in zip(self.layers, cache.layers, strict=True):
            columns = slot.columns(slice(count - layer.get_seq_length(), count))
            slot.keys[row, :, columns] = layer.keys[0]
            slot.values[row, :, columns] = layer.values[0]
            slot.bias[row] = 0
            slot.bias[row, :, : columns.start] = float("-inf")
            slot.bias[row, :, columns] = bias_of(layer)[0]

    def set_write_positions(self, starts: list[int], count: int, fixed: bool = False) -> Tensor:
        """Let the next call write `count` columns of each row from `starts[b]` on; returns them, (B, count).

        With `fixed` all calls look alike, as a compiler needs: columns are a tensor, and all are visible.
        """
        first = max(starts)
        stop = first + count
        if stop > self.room:
            raise CacheError(f"Column {stop - 1} is outside a row of {self.room}: give more room.")
        columns = torch.arange(count, device=self.offsets.device).expand(len(starts), -1)
        if min(starts) == first and not fixed:
            columns = columns + first
            self.write.positions = slice(first, stop)
        else:
            columns = columns + torch.tensor(starts, device=columns.device)[:, None]
            self.write.positions = columns
        self.write.visible_length = None if fixed else stop
        return columns

    def set_write_columns(self, columns: Tensor) -> Tensor:
        """Let the next call write the given columns (B, k) of each row, and return them."""
        self.write.positions = columns
        self.write.visible_length = None
        return columns

    def is_ragged_row(self, row: int) -> bool:
        """Tell whether heads of a row have lengths of their own, or entries a bias."""
        return is_ragged(self) and any(x.first or bool(x.bias[row].any()) for x in self.layers)

    def entries(self, row: int, start: int = 0, stop: int | None = None) -> DynamicCache:
        """Return the entries of a row, or some of them, as a cache that shares their memory."""
        part = slice(start, self.lengths[row] if stop is None else stop)
        layers = []
        for layer in self.layers:
            biased = layer.bias is not None and layer.bias[row, :, layer.columns(part)].any()
            if biased or start < layer.first:
                raise CacheError("Heads of this row have lengths of their own: take later columns.")
            columns = slice(row, row + 1), slice(None), layer.columns(part)
            layers.append((layer.keys[columns], layer.values[columns]))
        return from_layers(layers)

    def prefix(self, row: int, start: int, stop: int) -> Prefix:
        """Return some of a row's entries with their positions."""
        offset = self.offsets[row]
        positions = torch.arange(start, stop, device=offset.device) + offset
        cache = self.entries(row, start, stop)
        return Prefix(cache, stop + offset, positions=positions[None], rotary=self.rotary)

    def replace(self, row: int, start: int, cache: DynamicCache) -> None:
        """Write the entries of a cache of one row into a row's columns, from `start` on."""
        expected = layout(self)._replace(rows=1)
        if layout(cache) != expected:
            raise CacheError(f"The cache has {layout(cache)}, expected {expected}: use one row.")
        stop = start + length(cache)
        if stop > self.room:
            raise CacheError(f"{stop} entries are more than a row of {self.room}: give more room.")
        for slot, layer in zip(self.layers, cache.layers, strict=True):
            columns = slot.columns(slice(start, stop))
            slot.keys[row, :, columns] = layer.keys[0]
            slot.values[row, :, columns] = layer.values[0]

    def first(self, layers: int) -> "Slots":
        """Return the first layers, in the same memory, with write positions of their own."""
        part = copy.copy(self)
        part.write = _WriteState()
        part.lengths = list(self.lengths)
        part.layers = []
        for x in self.layers[:layers]:
            part.layers.append(_SlotLayer(part.write, x.keys, x.values, x.first, x.bias))
        return part


def step(
    model: PreTrainedModel, slots: Slots, tokens: Tensor, columns: Tensor, logits_to_keep: int = 0
) -> Tensor:
    """Run tokens (B, k) at the columns (B, k) that slots will write.

    Query i of row b sees columns 0 to columns[b, i]. Returns the logits of all tokens (B, k, vocab), or of
    the last `logits_to_keep`.
    """
    if model.training:
        with evaluating(model):
            return step(model, slots, tokens, columns, logits_to_keep)
    mask = None
    sdpa = model.config._attn_implementation == "sdpa"
    # One token per row at one column sees every column, and needs no mask.
    ragged = is_ragged(slots)
    if ragged or tokens.shape[1] > 1 or not sdpa or not isinstance(slots.write.positions, slice):
        visible = torch.arange(slots.write.visible_length or slots.room, device=columns.device)
        later = visible > columns[..., None]  # (B, k, visible)
        mask = torch.where(later, float("-inf"), 0.0).to(model.dtype)[:, None]
    positions = columns + slots.offsets
    options = {"attention_mask": mask, "logits_to_keep": logits_to_keep, "use_cache": True}
    if slots.keep_hidden:
        options["output_hidden_states"] = True
    with attend_ragged(model, slots) if ragged else nullcontext():
        output = model(input_ids=tokens, past_key_values=slots, position_ids=positions, **options)
    if slots.keep_hidden:
        slots.hidden = output.hidden_states[-1]
    return output.logits
