"""What the tests of eviction and of KV-Distill share."""

import itertools

import pytest
import torch
from conftest import FAMILIES

from kvlab import cache as kv
from kvlab.files import as_bytes

DOUBLE = torch.float64
INF = float("inf")
IDS = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(3))
TEXT = torch.randint(0, 97, (1, 6), generator=torch.Generator().manual_seed(4))
HEADS, GROUPS, LAYERS = 4, 2, 3  # of the models in conftest

every_family = pytest.mark.parametrize("family", FAMILIES)


def near(one, two, within=1e-9):
    torch.testing.assert_close(one, two, rtol=0, atol=within)


def distance(one, two):
    return (one - two).abs().max().item()


def same_cache(one, two):
    return torch.equal(kv.to_tensor(one), kv.to_tensor(two))


def every_byte(model):
    """A hash of all parameters and buffers."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: hash(bytes(as_bytes(tensor))) for name, tensor in tensors}


def read_on(model, prefix, text):
    """Logits of a text after a cache, which is not changed."""
    size, entries = text.shape[1], kv.length(prefix.cache)
    causal = torch.full((size, size), -INF).triu(1)
    mask = torch.cat([torch.zeros(size, entries), causal], 1)[None, None].to(model.dtype)
    position_ids = prefix.next_position + torch.arange(size)[None]
    past = kv.clone(prefix.cache)
    inputs = {"position_ids": position_ids, "attention_mask": mask, "past_key_values": past}
    return model(text, **inputs).logits
