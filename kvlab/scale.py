"""`Scale`: which models, sizes, device and precision a notebook uses, chosen by KVLAB_SCALE.

`tiny` is the lab on a CPU, offline; `t4` is Qwen3 on a 16 GB GPU; `full` is the pairs of the
methods' own sources.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from kvlab import losses
from kvlab.cache import bytes_per_token
from kvlab.lab import models as lab
from kvlab.models import head_dim


@dataclass(frozen=True)
class Need:
    """What a chapter keeps in memory at its largest step, of training or, without one, of reading.

    Args:
        frozen: roles of the models on the device.
        batch: sequences at once.
        tokens: of each sequence.
        method: what trains: "draft" (02), "distill" (03), "align" (04) or "fuse" (06).
        answer: tokens at the end of each sequence that have a loss.
        added: parameters that train, those of a student apart.
        copied: parameters of copies of models, in the scale's precision.
        layers: of the draft.
        hidden: width of the fuser's networks.
        models: instead of the preset's, by role.
    """

    frozen: Sequence[str]
    batch: int
    tokens: int
    method: Literal["", "draft", "distill", "align", "fuse"] = ""
    answer: int = 0
    added: int = 0
    copied: int = 0
    layers: int = 0
    hidden: int = 0
    models: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """One preset: a model name per role, and settings that differ between scales."""

    name: str
    target: str
    draft: str
    teacher: str
    student: str
    embedder: str
    device: str
    dtype: torch.dtype
    questions: int  # in an evaluation inside a notebook
    needs: dict[str, Need]
    seed: int = 0
    enable_thinking: bool = False  # before answers, by the chat template

    @classmethod
    def current(cls, chapter: str | None = None) -> Scale:
        """The preset named by KVLAB_SCALE, else one that fits the device; sets seed and threads.

        Args:
            chapter: One that has models of its own in kvlab/scales.yaml; default: the preset's.

        Raises:
            ValueError: KVLAB_SCALE names no preset, or one that needs a GPU where there is none.

        Example:
            >>> Scale.current().name in PRESETS
            True
        """
        has_cuda = torch.cuda.is_available()
        fitting = "tiny"
        if has_cuda:
            memory = torch.cuda.get_device_properties(0).total_memory
            fitting = "full" if memory > 70e9 else "t4"
        name = os.environ.get("KVLAB_SCALE") or fitting
        if name not in PRESETS:
            raise ValueError(f"KVLAB_SCALE is {name!r}; expected one of {', '.join(PRESETS)}.")
        # The lab models are so small that a GPU only adds latency to each step.
        device, dtype = "cpu", torch.float32
        if name == "tiny":
            torch.set_num_threads(min(torch.get_num_threads(), 2))
        elif has_cuda or torch.backends.mps.is_available():
            device, dtype = "cuda" if has_cuda else "mps", torch.float16
            if name == "full" and has_cuda and torch.cuda.is_bf16_supported(False):
                dtype = torch.bfloat16
        else:
            raise ValueError(f"KVLAB_SCALE is {name!r}, which needs a GPU. Use KVLAB_SCALE=tiny.")
        preset = dict(PRESETS[name])
        if chapter:
            preset |= preset["needs"][chapter].models
        scale = cls(name=name, device=device, dtype=dtype, **preset)
        torch.manual_seed(scale.seed)
        logging.disable_progress_bar()
        return scale

    def load(self, role: str) -> PreTrainedModel:
        """The model of a role ("target", "draft", "teacher", "student"), frozen, on the device."""
        model = lab.load_model(getattr(self, role), self.dtype)
        return model.to(self.device).requires_grad_(False)

    def load_config(self, role: str) -> PreTrainedConfig:
        """The configuration of a role's model."""
        return lab.load_config(getattr(self, role))

    def load_tokenizer(self, role: str) -> PreTrainedTokenizerBase:
        """The tokenizer of a role's model, which renders prompts with or without thinking."""
        tokenizer = lab.load_tokenizer(getattr(self, role))
        if self.enable_thinking and "enable_thinking" not in str(tokenizer.chat_template):
            text = f"The chat template of {getattr(self, role)} has no enable_thinking"
            raise ValueError(f"{text}: leave it out, or choose a model whose template has it.")
        tokenizer.enable_thinking = self.enable_thinking
        return tokenizer

    def load_embedder(self) -> torch.nn.Module:
        """The sentence embedder, on the device."""
        return lab.load_embedder(self.embedder, self.device)

    def memory(self, chapter: str) -> dict[str, float]:
        """Predicted peak memory of a chapter's largest step in GB (10^9 bytes), by part and in total.

        - weights: of frozen models and copies, in the scale's precision;
        - training: weights and two AdamW moments in float32, 12 bytes per trained parameter;
        - cache: keys and values of the frozen models;
        - step: the larger of gradients (float32) and of what the backward pass needs: activations,
          copies of trained weights in half precision, and the logits of the loss.

        tests/gpu/memory.py measures the same steps. Left out are the embedder (0.1 to 0.5 GB) and
        the GPU's own context (0.3 to 0.5 GB).

        Example:
            >>> scale = Scale(name="t4", device="cuda", dtype=torch.float16, **PRESETS["t4"])
            >>> 3 < scale.memory("00_start_here")["total"] < 5
            True
        """
        if chapter not in self.needs:
            raise ValueError(f"No chapter {chapter!r}; expected one of {', '.join(self.needs)}.")
        need = self.needs[chapter]
        scale, size = replace(self, **need.models), self.dtype.itemsize
        context = need.batch * (need.tokens - need.answer)  # an answer's entries are activations
        parts = dict.fromkeys(("weights", "training", "cache", "step"), 0.0)
        parts["weights"] = need.copied * size
        for role in need.frozen:
            config = config_of(getattr(scale, role))
            parts["weights"] += parameters(config) * size
            if need.method not in ("draft", "align"):  # these train from what the model left
                parts["cache"] += context * bytes_per_token(config, self.dtype)
        trained = need.added
        if need.method == "align":
            trained += parameters(config_of(scale.student))
        parts["training"] = 12 * trained
        parts["step"] = max(4 * trained, STEPS[need.method](scale, need))
        parts["total"] = sum(parts.values())
        return {part: value / 1e9 for part, value in parts.items()}

    @property
    def precision(self) -> str:
        """Precision of the arithmetic in training, an option of `kvlab.training.fit`."""
        return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(self.dtype, "no")

    def describe(self, chapter: str) -> str:
        """One sentence for the top of a notebook: models, device, precision and predicted memory.

        Example:
            >>> Scale.current().describe("00_start_here").split(":")[0]
            'Scale tiny'
        """
        need = self.needs[chapter]
        scale = replace(self, **need.models)
        roles = dict.fromkeys((*need.frozen, "teacher") if need.method == "align" else need.frozen)
        models = ", ".join(f"{role} {getattr(scale, role)}" for role in roles)
        dtype = str(self.dtype).removeprefix("torch.")
        total = self.memory(chapter)["total"]
        amount = f"{total:.1f} GB" if total >= 1 else f"{total * 1000:.0f} MB"
        where = f"Scale {self.name}: {models}; {dtype} on {self.device}"
        return f"{where}; about {amount} for models, caches and training."


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a model by name, from kvlab/scales.yaml or the lab; no network is used.

    Example:
        >>> config_of("Qwen/Qwen3-0.6B").num_key_value_heads
        8
    """
    if name in lab.SHAPES:
        return lab.make_config(name)
    if name not in SHAPES:
        raise ValueError(f"The shape of {name!r} is not in kvlab/scales.yaml; add it there.")
    return AutoConfig.for_model(**SHAPES[name])


def parameters(config: PreTrainedConfig, layers: int | None = None) -> int:
    """Parameters of a causal LM of this shape (tied ones once), counted without using memory.

    Example:
        >>> parameters(config_of("Qwen/Qwen3-0.6B")) / 1e6  # the model card says 0.6B
        596.04992
    """
    if layers is not None:
        config = copy.deepcopy(config)
        config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def _layer(config: PreTrainedConfig, hidden: float, mlp: float, query: float, kv: float) -> float:
    """Bytes of one layer for one token, from bytes for each unit of its four widths."""
    head = head_dim(config)
    widths = hidden * config.hidden_size + mlp * config.intermediate_size
    return widths + head * (query * config.num_attention_heads + kv * config.num_key_value_heads)


def _logits_bytes(config: PreTrainedConfig, tokens: int, all_of: int, chunk: int) -> float:
    """Bytes of logits: `all_of` for each, and `chunk` for each that a loss works on at once."""
    vocabulary = config.vocab_size
    return all_of * tokens * vocabulary + chunk * min(tokens * vocabulary, losses.CHUNK)


def _prefill(scale: Scale, need: Need) -> float:
    """One layer at work: its input twice and normalized in float32, and three tensors of its MLP."""
    layers = [_layer(config_of(getattr(scale, role)), 8, 6, 0, 0) for role in need.frozen]
    return need.batch * need.tokens * max(layers) * scale.dtype.itemsize / 2


# What the backward pass keeps in mixed precision, in bytes per token and unit of width. Norms keep
# their input and output in float32; an MLP three tensors of its width, and a fourth where it trains;
# attention queries, keys and values, before and after norm and rotation.


def _draft_step(scale: Scale, need: Need) -> float:
    """A cut that reads: each layer's self-attention, MLP and cross-attention train."""
    config, size = config_of(scale.target), scale.dtype.itemsize
    kept = need.tokens * need.layers * _layer(config, 38, 8, 21, 10) * size / 2
    logits = _logits_bytes(config, need.answer * need.batch, 16, 20)
    return need.batch * kept + need.added * size + logits


def _distill_step(scale: Scale, need: Need) -> float:
    """A context through layers with adapters, then an answer through the frozen ones."""
    config, size = config_of(scale.target), scale.dtype.itemsize
    kept = (need.tokens - need.answer) * _layer(config, 14, 6, 12, 17)
    kept += need.answer * _layer(config, 8, 6, 12, 4)
    logits = _logits_bytes(config, need.answer * need.batch, 16, 28)
    return need.batch * kept * config.num_hidden_layers * size / 2 + need.added * size + logits


def _align_step(scale: Scale, need: Need) -> float:
    """Gradients, beside all that is kept for a second loss: gradient checkpoints, keys and values.

    A tied embedding has two gradients, as embedding and as head, before they are added up.
    """
    config = config_of(scale.student)
    embedding = config.vocab_size * config.hidden_size
    gradients = 4 * (parameters(config) + need.added + embedding)
    kept = need.tokens * config.num_hidden_layers * _layer(config, 12, 0, 0, 36)
    return gradients + need.batch * kept + _logits_bytes(config, need.answer * need.batch, 9, 0)


def _fuse_step(scale: Scale, need: Need) -> float:
    """Two networks per layer on fused tokens, half of the answer among them; then the receiver."""
    config, size = config_of(scale.draft), scale.dtype.itemsize
    fused = _layer(config, 0, 0, 8, 17) + 2 * 59 * need.hidden
    kept = (need.tokens - need.answer / 2) * fused + need.answer * _layer(config, 8, 6, 12, 0)
    logits = _logits_bytes(config, need.answer * need.batch, 6, 8)
    return need.batch * kept * config.num_hidden_layers * size / 2 + need.added * size + logits


STEPS = {
    "": _prefill,
    "draft": _draft_step,
    "distill": _distill_step,
    "align": _align_step,
    "fuse": _fuse_step,
}
_FILE = yaml.safe_load(Path(__file__).with_name("scales.yaml").read_text(encoding="utf-8"))
PRESETS: dict[str, dict] = _FILE["presets"]
SHAPES: dict[str, dict] = _FILE["shapes"]
for _preset in PRESETS.values():
    _preset["needs"] = {chapter: Need(**need) for chapter, need in _preset["needs"].items()}
