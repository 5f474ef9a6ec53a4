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
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlab.files import as_bytes

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies independent of the text's length
ARCHITECTURE = (
    "model_type num_hidden_layers hidden_size intermediate_size num_attention_heads".split()
)
ARCHITECTURE += "num_key_value_heads hidden_act rms_norm_eps vocab_size".split()
FAR = 10_000  # positions by which `require_supported` moves two tokens, if the model has so many
_checked = weakref.WeakSet()  # decoders that passed `require_supported`, and their rotary modules


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


def rotary_of(model: PreTrainedModel) -> nn.Module:
    """Return the rotary embedding of a supported model: `inv_freq` (D/2,) and `attention_scaling`."""
    require_supported(model)
    return _rotary_modules(model)[0]


def _rotary_modules(model: PreTrainedModel) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]


def position_limit(model: PreTrainedModel | PretrainedConfig) -> float:
    """Return the number of positions that a model was made for, infinity if it does not say."""
    config = getattr(model, "config", model).get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or math.inf


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


@contextmanager
def use_attention(model: PreTrainedModel, attention: Callable) -> Iterator[None]:
    """Let the layers of a model attend by another function, as transformers calls them.

    The function is registered under a temporary name, which is removed again.
    """
    name = f"kvlab_{attention.__name__}_{id(attention)}"
    # A model of the first layers has a config of its own, which its attention does not see.
    configs = [model.config.get_text_config(decoder=True)]
    configs += [module.config for module in model.modules() if hasattr(module, "layer_idx")]
    before = {id(config): (config, config._attn_implementation) for config in configs}
    ALL_ATTENTION_FUNCTIONS[name] = attention
    masks = ALL_MASK_ATTENTION_FUNCTIONS  # a name that is not registered gets no mask at all
    masks.register(name, masks["sdpa"])
    try:
        for config, _ in before.values():
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in before.values():
            config._attn_implementation = implementation
        del ALL_ATTENTION_FUNCTIONS[name], masks._global_mapping[name]


def require_supported(model: PreTrainedModel) -> None:
    """Refuse a model whose cache cannot be cut, joined and moved.

    Once per model, its decoder reads two tokens at two places. In each layer, `rotate_keys` must make
    the keys of the one place from those of the other: relative error below 1e-3, in half precision
    8 times the resolution of the dtype. In float32 also the second token, which attends to the first
    and so carries the rounding of attention, with an error below 1e-2.

    Raises:
        CacheError: for encoder-decoders; wrappers such as PEFT's; layers other than full attention
            (sliding window, linear attention); keys and values of several sizes; rotary embeddings
            that are missing, change with the length of the text, or rotate otherwise than
            `rotate_keys` (not all dimensions, not in all layers, other pairs, a norm afterwards);
            attention that depends on positions by more than their distances.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        inner = "pass the model inside, where adapters stay active (PEFT: model.get_base_model())"
        raise CacheError(f"{name} is not a PreTrainedModel of transformers: {inner}.")
    decoder = model
    while decoder.base_model is not decoder:  # a draft is a causal LM around a causal LM
        decoder = decoder.base_model
    if decoder in _checked:
        return
    if model.config.is_encoder_decoder:
        raise CacheError(f"{name} is an encoder-decoder: use a decoder-only model.")
    config = model.config.get_text_config(decoder=True)
    layer_types = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    if layer_types != {"DynamicLayer"}:
        hint = "use full attention in every layer (Mistral: sliding_window=None)"
        raise CacheError(f"{name} has cache layers of type {sorted(layer_types)}: {hint}.")
    rotary = _require_one_rotary(model, config)
    _require_width(rotary, head_dim(config))
    if decoder.device.type == "meta":
        return
    layers, by = _read_at_two_places(decoder, config)
    _require_sizes(name, layers, config)
    _require_rotation(name, layers, by, rotary)
    layer_list(decoder, config.num_hidden_layers)
    _checked.update((decoder, rotary))


def _require_one_rotary(model: PreTrainedModel, config: PretrainedConfig) -> nn.Module:
    """Return the only rotary embedding, the same for texts of every length."""
    modules, name = _rotary_modules(model), type(model).__name__
    if len(modules) != 1:
        count = f"{name} has {len(modules)} rotary embeddings, expected one"
        raise CacheError(f"{count}: use a Llama-like decoder.")
    rope_type = getattr(modules[0], "rope_type", "default")
    if rope_type not in ROPE_TYPES:
        sentence = f"Rotary embeddings of type '{rope_type}' change with the length of the text"
        raise CacheError(f"{sentence}: use a model with one of {ROPE_TYPES}.")
    if "llama_4_scaling_beta" in (getattr(config, "rope_parameters", None) or ()):
        sentence = f"{name} scales queries by their position (llama_4_scaling_beta)"
        raise CacheError(f"{sentence}, expected attention to depend on distances: use another.")
    return modules[0]


def _require_width(rotary: nn.Module, width: int) -> None:
    rotated_width = 2 * rotary.inv_freq.numel()
    if rotated_width != width:
        sentence = (
            f"The rotary embedding turns {rotated_width} of {width} key dimensions, expected all"
        )
        raise CacheError(f"{sentence}: pass rotary_of the model that made the cache.")


@torch.no_grad()
def _read_at_two_places(decoder: PreTrainedModel, config: PretrainedConfig) -> tuple[list, Tensor]:
    """Read two tokens at positions 0, 1 and, in a second row, farther on; return layers and distance."""
    limit = getattr(config, "max_position_embeddings", None) or FAR
    by = torch.tensor(min(FAR, limit - 2), device=decoder.device)
    size = decoder.get_input_embeddings().num_embeddings
    ids = torch.tensor([[size // 3, size // 2]] * 2, device=decoder.device)
    positions = torch.stack((0 * by, by))[:, None] + torch.arange(2, device=by.device)
    cache = DynamicCache()
    try:
        with evaluating(decoder):
            decoder(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        sentence = f"{type(decoder).__name__} cannot read two tokens into a DynamicCache"
        cause = f"{type(error).__name__}: {error}"
        raise CacheError(f"{sentence} ({cause}): use a Llama-like decoder.") from error
    return cache.layers, by


def _require_sizes(name: str, layers: list, config: PretrainedConfig) -> None:
    """Check that every layer keeps keys and values as the configuration says."""
    heads = getattr(config, "num_key_value_heads", None)
    expected = (config.num_hidden_layers, heads, head_dim(config))
    shapes = [x.shape for layer in layers for x in (layer.keys, layer.values) if x is not None]
    sizes = {(len(shapes) // 2, shape[1], shape[3]) for shape in shapes}
    if sizes != {expected}:
        found = f"{name} keeps (layers, heads, width) {sorted(sizes)}, its config says {expected}"
        raise CacheError(f"{found}: use a model with keys and values of one size in every layer.")


def _require_rotation(name: str, layers: list, by: Tensor, rotary: nn.Module) -> None:
    """Check that keys at the second place are the rotated keys of the first, in every layer."""
    eps = torch.finfo(layers[0].keys.dtype).eps
    limits = torch.tensor([max(1e-3, 8 * eps), 1e-2 if eps < 1e-4 else math.inf])
    errors = {}
    for i, layer in enumerate(layers):
        here, there = layer.keys.float()  # (H_kv, 2, D)
        difference = rotate_keys(here, by, rotary) - there
        error = (difference.norm(dim=(0, 2)) / there.norm(dim=(0, 2)).clamp(min=1e-9)).cpu()
        if not (error < limits).all():  # nan is wrong too
            errors[i] = error.max().item()
    if errors:
        error = f"relative error {max(errors.values()):.2g} after {by} positions"
        sentence = f"{name} rotates keys otherwise than Llama in layers {list(errors)} ({error}"
        limit = f"expected less than {limits[0]:.2g})"
        raise CacheError(f"{sentence}, {limit}: use a Llama-like decoder.")


def require_rotary(rotary: nn.Module, width: int) -> None:
    """Refuse a rotary embedding that no supported model of this head width has."""
    if rotary not in _checked:
        sentence = f"A {type(rotary).__name__} is not the rotary embedding of a tried model"
        raise CacheError(f"{sentence}: pass rotary_of(model).")
    _require_width(rotary, width)


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


def layer_list(decoder: nn.Module, count: int) -> str:
    """Return the name of the module that lists a decoder's layers."""
    children = decoder.named_children()
    lists = [k for k, m in children if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        sentence = (
            f"{type(decoder).__name__} has {len(lists)} lists of {count} layers, expected one"
        )
        raise CacheError(f"{sentence}: use a Llama-like decoder.")
    return lists[0]


def first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Return a model of the first layers, last norm and head, that shares all modules with the whole one.

    >>> first_layers(_example()[0], 1).config.num_hidden_layers
    1
    """
    require_supported(model)
    base = copy.copy(model.base_model)
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    name = layer_list(base, count)
    if not 0 < layers <= count:
        raise CacheError(f"layers is {layers}, expected 1 to {count}, which the model has.")
    shallow = copy.copy(model)
    shallow.config = base.config = copy.copy(model.config)
    base.config.num_hidden_layers = layers
    base._modules = {**base._modules, name: base._modules[name][:layers]}
    shallow._modules = {**model._modules, model.base_model_prefix: base}
    _checked.add(base)
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
