"""What a KV cache depends on in a model: head sizes, rotary embedding, supported layers, fingerprint.

A rotary embedding multiplies each pair of key dimensions (i, i + D/2) by the rotation of angle m theta_i,
with m the position (RoFormer, arXiv 2104.09864, equation 34). Rotations add up, so stored keys can be
moved; `rotate_keys` does it on tensors, `kvlab.cache.shift` on caches. `_example()` is a random two-layer
Qwen3 and five token ids.
"""

import copy
import hashlib
import math
import reprlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from kvlab.files import as_bytes

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies independent of the text's length
ARCHITECTURE = (
    "model_type num_hidden_layers hidden_size intermediate_size num_attention_heads".split()
)
ARCHITECTURE += "num_key_value_heads hidden_act rms_norm_eps vocab_size".split()
_checked = weakref.WeakSet()  # models and rotary modules that passed their checks


class CacheError(ValueError):
    """A cache, a model or a file that does not fit; says what was seen, expected, and what to do."""


def head_dim(config: PretrainedConfig) -> int:
    """Return the width of one head.

    >>> head_dim(_example()[0].config)
    16
    """
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _example() -> tuple[PreTrainedModel, Tensor]:
    from transformers import Qwen3Config, Qwen3ForCausalLM  # only needed here, and slow to import

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=97, **sizes, **heads))
    return model.eval().requires_grad_(False), torch.tensor([[5, 17, 2, 90, 33]])


def rotary_of(model: nn.Module) -> nn.Module:
    """Find the rotary embedding of a model: the module with `inv_freq` (D/2,) and `attention_scaling`."""
    modules = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if len(modules) != 1:
        count = f"{type(model).__name__} has {len(modules)} rotary embeddings, expected one"
        raise CacheError(f"{count}: use a Llama-like decoder.")
    return modules[0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while.

    In training, dropout changes what is read, and gradient checkpointing leaves the cache out.
    """
    modules = [module for module in model.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def require_supported(model: PreTrainedModel) -> None:
    """Refuse a model whose cache cannot be cut, joined and moved.

    Raises:
        CacheError: for encoder-decoders, for layers other than full attention (sliding window, linear
            attention), and for rotary embeddings that are missing, partial, interleaved, or change
            with the length of the text.
    """
    if model in _checked:
        return
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise CacheError(f"{name} is an encoder-decoder: use a decoder-only model.")
    config = model.config.get_text_config(decoder=True)
    layer_types = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    if layer_types != {"DynamicLayer"}:
        hint = "use full attention in every layer (Mistral: sliding_window=None)"
        raise CacheError(f"{name} has cache layers of type {sorted(layer_types)}: {hint}.")
    require_rotary(rotary_of(model), head_dim(config))
    _checked.add(model)


def require_rotary(rotary: nn.Module, width: int) -> None:
    """Check that `rotate_keys` is the rotation of a rotary module of this head width (once a module)."""
    if not isinstance(getattr(rotary, "inv_freq", None), Tensor):
        raise CacheError(f"A {type(rotary).__name__} has no inv_freq: pass rotary_of(model).")
    rope_type = getattr(rotary, "rope_type", "default")
    if rope_type not in ROPE_TYPES:
        sentence = f"Rotary embeddings of type '{rope_type}' change with the length of the text"
        raise CacheError(f"{sentence}: use a model with one of {ROPE_TYPES}.")
    rotated_width = 2 * rotary.inv_freq.numel()
    if rotated_width != width:
        sentence = (
            f"The rotary embedding turns {rotated_width} of {width} key dimensions, expected all"
        )
        raise CacheError(f"{sentence}: pass rotary_of the model that made the cache.")
    if rotary in _checked:
        return
    by = torch.tensor([3, 11, 29], device=rotary.inv_freq.device)
    keys = torch.linspace(-1, 1, 3 * width, device=by.device).reshape(1, 1, 3, width)
    cos, sin = rotary(keys, by[None])  # (1, 3, D), times the attention scaling
    halves = torch.cat((-keys[..., width // 2 :], keys[..., : width // 2]), -1)
    rotated = rotate_keys(keys, by, rotary, rotary.attention_scaling)
    restored = rotate_keys(rotated, -by, rotary, 1 / rotary.attention_scaling)
    error = (rotated - (keys * cos + halves * sin)).abs().max().item()
    error = max(error, (restored - keys).abs().max().item())
    if error >= 1e-3:
        sentence = f"Keys turned by {type(rotary).__name__}.inv_freq are off by {error:.2g}"
        raise CacheError(
            f"{sentence}, expected less than 0.001: use a model with the Llama layout."
        )
    _checked.add(rotary)


def rotate_keys(keys: Tensor, by: Tensor, rotary: nn.Module, scale: float = 1.0) -> Tensor:
    """Rotate keys by a number of positions, in float64, and multiply them by `scale`.

    Args:
        keys: (..., T, D), for example (B, H_kv, T, D) or (L, B, H_kv, T, D).
        by: positions to move by, broadcastable to (..., T).
        rotary: the rotary embedding of the model, from `rotary_of`.
        scale: the attention scaling to multiply in (yarn), or its inverse to divide it out.
    """
    precise = torch.float32 if keys.device.type == "mps" else torch.float64  # mps has no float64
    angle = by[..., None].to(keys.device, precise) * rotary.inv_freq.to(keys.device, precise)
    wide = torch.promote_types(keys.dtype, torch.float32)
    cos = (scale * angle.cos()).to(wide)
    sin = (scale * angle.sin()).to(wide)
    x, y = keys.to(wide).chunk(2, -1)  # Llama pairs i with i + D/2, RoFormer 2i with 2i + 1
    return torch.cat((x * cos - y * sin, y * cos + x * sin), -1).to(keys.dtype)


def first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Return a model of the first layers, last norm and head, that shares all modules with the whole one.

    >>> first_layers(_example()[0], 1).config.num_hidden_layers
    1
    """
    count = model.config.num_hidden_layers
    if not 0 < layers <= count:
        raise CacheError(f"layers is {layers}, expected 1 to {count}, which the model has.")
    shallow = copy.copy(model)
    base = copy.copy(model.base_model)
    shallow.config = base.config = copy.copy(model.config)
    base.config.num_hidden_layers = layers  # decoders read it when they run
    shallow._modules = {**model._modules, model.base_model_prefix: base}
    return shallow


def fingerprint(model: PreTrainedModel) -> dict:
    """Describe what makes a cache belong to a model, in parts that JSON can hold.

    The parts are "architecture" (sizes), "rope" (frequencies and scaling) and "weights" (dtype, and the
    SHA-256 of 64 evenly spaced numbers of every parameter: any training changes some of them, a single
    edited number can escape).
    """
    config = model.config.get_text_config(decoder=True)
    rotary = rotary_of(model)
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        digest.update(name.encode() + as_bytes(flat[:: max(1, flat.numel() // 64)][:64]))
    architecture = {key: getattr(config, key, None) for key in ARCHITECTURE}
    rope = {"type": getattr(rotary, "rope_type", "default"), "inv_freq": rotary.inv_freq.tolist()}
    return {
        "architecture": architecture | {"head_dim": head_dim(config)},
        "rope": rope | {"attention_scaling": float(rotary.attention_scaling)},
        "weights": {"dtype": str(model.dtype), "sha256": digest.hexdigest()},
    }


def _equal(a, b) -> bool:
    """Compare, leaving the last digits of a frequency to the device that computed it."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-5)
    return a == b


def differences(saved: dict, current: dict) -> str:
    """Name the fields in which two fingerprints differ, with both values; empty if they are equal."""
    sentences = []
    for part, fields in current.items():
        for key, value in fields.items():
            before = saved[part].get(key)
            if not _equal(before, value):
                before, value = reprlib.repr(before), reprlib.repr(value)
                sentences.append(f"{part} {key} is {before} in the file and {value} in the model")
    return "; ".join(sentences)
