"""A KV cache whose layers and heads have numbers of entries of their own.

If entries compete for one budget over all layers and heads, some heads keep many and some none. A
`RaggedLayer` pads the heads of a layer on the left, to the longest of them: new entries are
ordinary columns on the right. Each entry has a number that is added to its attention logits, and
padding has minus infinity. Padding is memory, so `kvlab.cache.nbytes` counts it.

`log_likelihoods`, the decoding of `kvlab.speculate`, the store of `kvlab.knowledge` and these
functions of `kvlab.cache` take such a cache: `prefill`, `save`, `load`, `join`, `shift`, `rotate`,
`unrotate`, `repeat`, `length`, `nbytes`. The others refuse it. A model of transformers must run
inside `attend_ragged`, with `position_ids`.

>>> keys = values = torch.arange(8.0).view(1, 2, 4, 1)  # two heads
>>> kept = torch.tensor([[[True, False, True, True], [False, False, True, False]]])
>>> layer = pack(keys, values, kept)
>>> layer.keys[0, :, :, 0], layer.bias[0]
(tensor([[0., 2., 3.],
        [0., 0., 6.]]), tensor([[0., 0., 0.],
        [-inf, -inf, 0.]]))
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlab.models import use_attention


class RaggedLayer(DynamicLayer):
    """One layer: keys and values (B, H_kv, T, D).

    Args:
        bias: (B, H_kv, T'), added to the attention logits of the first T' columns; later ones have
            0. Minus infinity marks padding.
    """

    def __init__(self, keys: Tensor, values: Tensor, bias: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.bias = keys, values, bias


def bias_of(layer: DynamicLayer, columns: int | None = None) -> Tensor:
    """Return the bias of the first columns of a layer, or of all: zeros for an ordinary layer."""
    rows, heads, total, _ = layer.keys.shape
    columns = total if columns is None else columns
    bias = getattr(layer, "bias", None)
    if bias is None:
        return layer.keys.new_zeros(rows, heads, columns)
    bias = bias[..., :columns]
    return F.pad(bias, (0, columns - bias.shape[-1]))


def is_ragged(cache: Cache) -> bool:
    """Tell whether heads of a cache may have lengths of their own."""
    return any(getattr(layer, "bias", None) is not None for layer in cache.layers)


def pack(keys: Tensor, values: Tensor, kept: Tensor, bias: Tensor | None = None) -> RaggedLayer:
    """Keep some entries of a layer, (B, H_kv, T, D), in memory of their own.

    Args:
        kept: (B, H_kv, T), True for entries that stay.
        bias: (B, H_kv, T), of the entries. Default: zeros.
    """
    longest = int(kept.sum(-1).max())
    columns = kept.byte().argsort(dim=-1, stable=True)[..., kept.shape[-1] - longest :]
    padding = ~kept.gather(-1, columns)
    # Zeros, for hidden entries are still multiplied by 0, and 0 * nan is nan.
    entries = [x.take_along_dim(columns[..., None], 2) for x in (keys, values)]
    entries = [x.masked_fill(padding[..., None], 0) for x in entries]
    bias = torch.zeros_like(keys[..., 0]) if bias is None else bias
    return RaggedLayer(*entries, bias.gather(-1, columns).masked_fill(padding, float("-inf")))


@contextmanager
def attend_ragged(model: PreTrainedModel, cache: Cache) -> Iterator[None]:
    """Let a model read with a ragged cache: hide padding, and add the bias of entries.

    Inside the context the model runs with PyTorch's attention (sdpa). The mask that it is given
    must be (B | 1, 1, Q, columns), for the layer with the most columns: a layer takes the last of
    them. For an ordinary cache nothing changes.
    """
    if not is_ragged(cache):
        yield
        return
    name = model.config.get_text_config(decoder=True)._attn_implementation
    inner = ALL_ATTENTION_FUNCTIONS[name if name.startswith("kvlab_") else "sdpa"]  # captures, too

    def attend(module, query, key, value, attention_mask, **options):
        bias = bias_of(cache.layers[module.layer_idx], key.shape[2])
        mask = attention_mask[..., -key.shape[2] :] + bias[:, :, None]  # (B, H_kv, Q, T)
        mask = mask.repeat_interleave(query.shape[1] // key.shape[1], 1)
        return inner(module, query, key, value, mask, **options)

    with use_attention(model, attend):
        yield


def causal_mask(model: PreTrainedModel, queries: int, columns: int) -> Tensor:
    """Return the additive mask (1, 1, Q, T) of the last Q of T columns."""
    mask = torch.full((queries, columns), float("-inf"), dtype=model.dtype, device=model.device)
    return mask.triu(columns - queries + 1)[None, None]
