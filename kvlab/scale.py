"""`Scale`: which models, sizes, device and precision a notebook uses, chosen by KVLAB_SCALE.

`tiny` is the lab on a CPU, offline; `t4` is Qwen3 on a 16 GB GPU; `full` is the pairs of the
methods' own sources.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from kvlab.cache import bytes_per_token
from kvlab.lab import models as lab


@dataclass(frozen=True)
class Need:
    """What a chapter keeps in memory: models by role, sequences of a batch, what it trains."""

    frozen: Sequence[str]
    batch: int
    tokens: int
    trains: str = ""  # the role whose parameters all train
    added: int = 0  # parameters of adapters, scorers or fusers that train, too
    layers: int = 0  # train only this many layers of `trains`, in a copy
    answer: int = 0  # tokens at the end of each sequence that have a loss
    hidden: int = 0  # width of a fuser's networks


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

    @classmethod
    def current(cls) -> Scale:
        """The preset named by KVLAB_SCALE, else one that fits the device; sets seed and threads.

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
        scale = cls(name=name, device=device, dtype=dtype, **PRESETS[name])
        torch.manual_seed(scale.seed)
        logging.disable_progress_bar()
        return scale

    def load(self, role: str) -> PreTrainedModel:
        """The model of a role ("target", "draft", "teacher", "student"), frozen, on the device."""
        model = lab.load_model(getattr(self, role), self.dtype)
        return model.to(self.device).requires_grad_(False)

    def load_tokenizer(self, role: str) -> PreTrainedTokenizerBase:
        """The tokenizer of a role's model."""
        return lab.load_tokenizer(getattr(self, role))

    def load_embedder(self) -> torch.nn.Module:
        """The sentence embedder, on the device."""
        return lab.load_embedder(self.embedder, self.device)

    def memory(self, chapter: str) -> dict[str, float]:
        """Predicted peak memory of a chapter in GB (10^9 bytes), by part and in total.

        Frozen weights count once in the scale's precision; trained ones 16 bytes each (float32
        weight, gradient and two AdamW moments); the KV cache by its formula; activations for a
        backward pass with gradient checkpointing: one hidden state per layer, one layer in full (17
        hidden sizes per token: 34 bytes each at 16 bits, Korthikanti et al. 2022, equation 2
        without attention scores) and three float32 copies of the logits.

        Example:
            >>> scale = Scale(name="t4", device="cuda", dtype=torch.float16, **PRESETS["t4"])
            >>> 3 < scale.memory("00_start_here")["total"] < 5
            True
        """
        if chapter not in self.needs:
            raise ValueError(f"No chapter {chapter!r}; expected one of {', '.join(self.needs)}.")
        need = self.needs[chapter]
        size = self.dtype.itemsize
        positions = need.batch * need.tokens
        parts = dict.fromkeys(("weights", "training", "cache", "activations"), 0.0)
        for role in need.frozen:
            config = config_of(getattr(self, role))
            parts["weights"] += parameters(config) * size
            parts["cache"] += positions * bytes_per_token(config, self.dtype)
        parts["training"] = 16 * need.added
        if need.trains or need.added:
            config = config_of(getattr(self, need.trains or need.frozen[0]))
            layers = need.layers or config.num_hidden_layers
            if need.trains:
                parts["training"] += 16 * parameters(config, layers)
            if need.layers:  # the embedding of the copy is not trained
                parts["training"] -= 16 * parameters(config, 0)
                parts["weights"] += size * parameters(config, 0)
            per_position = config.hidden_size * (layers + 17) * size + 12 * config.vocab_size
            parts["activations"] = positions * per_position
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
        models = ", ".join(f"{role} {getattr(self, role)}" for role in self.needs[chapter].frozen)
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


_FILE = yaml.safe_load(Path(__file__).with_name("scales.yaml").read_text(encoding="utf-8"))
PRESETS: dict[str, dict] = _FILE["presets"]
SHAPES: dict[str, dict] = _FILE["shapes"]
for _preset in PRESETS.values():
    _preset["needs"] = {chapter: Need(**need) for chapter, need in _preset["needs"].items()}
