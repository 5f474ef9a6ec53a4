"""`Scale`: which models, sizes, device and precision a notebook uses. The one switch is the variable KVLAB_SCALE.

`tiny` is the lab on a CPU, offline; `t4` is Qwen3 on a 16 GB GPU; `full` is the pairs of the
methods' own sources.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from kvlab.cache import bytes_per_token
from kvlab.lab import models as lab

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Shapes of the public models that the larger scales use, so that memory is known before anything is downloaded.
# hidden, intermediate, layers, heads, KV heads, head size, vocabulary, tied embeddings
_SHAPES = {
    "Qwen/Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "Qwen/Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True),
    "Qwen/Qwen3-14B": ("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False),
    "Qwen/Qwen2-0.5B-Instruct": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "Qwen/Qwen2-1.5B-Instruct": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "Qwen/Qwen2-7B-Instruct": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
}
GB = 1e9


@dataclass(frozen=True)
class Need:
    """What a chapter holds at once: models by role, sequences in flight, and what it trains."""

    frozen: tuple[str, ...]
    batch: int
    tokens: int
    trains: str = ""  # the role whose parameters all train
    added: int = 0  # parameters of adapters, scorers or fusers that train beside it
    layers: int = 0  # train only this many layers of `trains`, in a copy


@dataclass(frozen=True)
class Scale:
    """One preset. Roles are model names; the rest is what notebooks need to be the same code at every scale."""

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
        """The preset named by KVLAB_SCALE, else the one that fits the device; also sets seed and threads.

        Raises:
            ValueError: KVLAB_SCALE names no preset, or one that needs a GPU where there is none.

        Example:
            >>> Scale.current().name in PRESETS
            True
        """
        name = os.environ.get("KVLAB_SCALE") or _fitting()
        if name not in PRESETS:
            raise ValueError(f"KVLAB_SCALE is {name!r}; expected one of {', '.join(PRESETS)}.")
        device, dtype = _device(), torch.float32
        if name != "tiny":
            if device == "cpu":
                raise ValueError(
                    f"KVLAB_SCALE is {name!r}, which needs a GPU; found none. Use KVLAB_SCALE=tiny."
                )
            bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = torch.bfloat16 if name == "full" and bf16 else torch.float16
        # The lab models are so small that a GPU only adds latency to each step.
        scale = cls(
            name=name, device="cpu" if name == "tiny" else device, dtype=dtype, **PRESETS[name]
        )
        torch.manual_seed(scale.seed)
        torch.set_num_threads(
            min(torch.get_num_threads(), 2) if name == "tiny" else torch.get_num_threads()
        )
        logging.disable_progress_bar()
        return scale

    def load(self, role: str) -> PreTrainedModel:
        """The model of a role ("target", "draft", "teacher", "student"), in evaluation mode, frozen, on the device."""
        name = getattr(self, role)
        if name in lab.NAMES:
            return lab.load(name, self.device, self.dtype).requires_grad_(False)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=self.dtype)
        return model.to(self.device).eval().requires_grad_(False)

    def load_tokenizer(self, role: str) -> PreTrainedTokenizerBase:
        """The tokenizer of a role's model."""
        name = getattr(self, role)
        return (
            lab.load_tokenizer(name) if name in lab.NAMES else AutoTokenizer.from_pretrained(name)
        )

    def load_embedder(self) -> SentenceTransformer:
        """The sentence embedder, on the device."""
        return lab.load_embedder(self.embedder, self.device)

    def memory(self, chapter: str) -> dict[str, float]:
        """Predicted peak memory of a chapter in units of 10^9 bytes, by part and in total.

        Frozen weights count once in the scale's precision; trained ones 16 bytes each (float32
        weight, gradient and two AdamW moments); the KV cache by its formula; activations for a
        backward pass with gradient checkpointing: one hidden state a layer, one layer in full (17
        hidden sizes a token: 34 bytes each at 16 bits, Korthikanti et al. 2022, equation 2 without
        attention scores) and three float32 copies of the logits.

        Example:
            >>> scale = Scale(name="t4", device="cuda", dtype=torch.float16, **PRESETS["t4"])
            >>> 3 < scale.memory("00_start_here")["total"] < 5
            True
        """
        if chapter not in self.needs:
            raise ValueError(
                f"There is no chapter {chapter!r}; expected one of {', '.join(self.needs)}."
            )
        need, size = self.needs[chapter], self.dtype.itemsize
        configs = {
            role: config_of(getattr(self, role)) for role in {*need.frozen, need.trains} - {""}
        }
        places = need.batch * need.tokens
        weights = sum(parameters(configs[role]) for role in need.frozen) * size
        cache = sum(places * bytes_per_token(configs[role], self.dtype) for role in need.frozen)
        trained, activations = need.added, 0.0
        if need.trains or need.added:
            config = configs[need.trains or need.frozen[0]]
            if need.layers:
                shell = parameters(config, layers=0)
                trained += parameters(config, layers=need.layers) - shell
                weights += shell * size  # the copy's own embedding, not trained
            elif need.trains:
                trained += parameters(config)
            layers = need.layers or config.num_hidden_layers
            activations = places * (
                config.hidden_size * (layers + 17) * size + 12 * config.vocab_size
            )
        parts = {
            "weights": weights,
            "training": 16 * trained,
            "cache": cache,
            "activations": activations,
        }
        return {part: value / GB for part, value in parts.items()} | {
            "total": sum(parts.values()) / GB
        }

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
        return f"Scale {self.name}: {models}; {dtype} on {self.device}; about {amount} for models, caches and training."


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a model by name, from tables in kvlab; no network is used.

    Example:
        >>> config_of("Qwen/Qwen3-0.6B").num_key_value_heads
        8
    """
    if name in lab.SHAPES:
        return lab.make_config(name)
    if name not in _SHAPES:
        raise ValueError(f"The shape of {name!r} is not in kvlab.scale; add it to _SHAPES.")
    kind, hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, tied = _SHAPES[name]
    return AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def parameters(config: PreTrainedConfig, layers: int | None = None) -> int:
    """Parameters of a causal LM of this shape (tied ones once), built on the meta device: no memory is used.

    Example:
        >>> parameters(config_of("Qwen/Qwen3-0.6B")) / 1e6  # the model card says 0.6B
        596.04992
    """
    if layers is not None:
        config = copy.deepcopy(config)
        config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def _device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _fitting() -> str:
    if not torch.cuda.is_available():
        return "tiny"
    return "full" if torch.cuda.get_device_properties(0).total_memory > 70e9 else "t4"


_INFERENCE = {
    "00_start_here": Need(("target",), batch=1, tokens=2048),
    "01_knowledge_caching": Need(("target",), batch=8, tokens=1024),
    "05_speculative_decoding": Need(("target", "draft"), batch=1, tokens=2048),
}
PRESETS: dict[str, dict] = {
    "tiny": {
        "target": "lab-target",
        "draft": "lab-draft",
        "teacher": "lab-teacher",
        "student": "lab-draft",
        "embedder": "lab-embedder",
        "questions": 64,
        "needs": _INFERENCE
        | {
            "02_draft_training": Need(("target",), batch=8, tokens=256, trains="target", layers=3),
            "03_kv_distill": Need(("target",), batch=16, tokens=320, added=400_000),
            "04_alignment_4d": Need(("teacher",), batch=32, tokens=256, trains="student"),
            "06_cache_fusion": Need(("target", "draft"), batch=32, tokens=256, added=1_000_000),
            "07_putting_it_together": Need(("target", "draft"), batch=1, tokens=1024),
        },
    },
    "t4": {
        "target": "Qwen/Qwen3-1.7B",
        "draft": "Qwen/Qwen3-0.6B",
        "teacher": "Qwen/Qwen2-1.5B-Instruct",
        "student": "Qwen/Qwen2-0.5B-Instruct",
        "embedder": "sentence-transformers/all-MiniLM-L6-v2",
        "questions": 100,
        "needs": _INFERENCE
        | {
            "02_draft_training": Need(("target",), batch=2, tokens=512, trains="target", layers=3),
            "03_kv_distill": Need(("target",), batch=1, tokens=1536, added=52_000_000),
            "04_alignment_4d": Need(("teacher",), batch=1, tokens=768, trains="student"),
            "06_cache_fusion": Need(("target", "draft"), batch=1, tokens=512, added=480_000_000),
            "07_putting_it_together": Need(("target", "draft"), batch=1, tokens=2048, added=0),
        },
    },
    "full": {
        "target": "Qwen/Qwen3-14B",
        "draft": "Qwen/Qwen3-0.6B",
        "teacher": "Qwen/Qwen2-7B-Instruct",
        "student": "Qwen/Qwen2-1.5B-Instruct",
        "embedder": "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
        "questions": 400,
        "needs": _INFERENCE
        | {
            "02_draft_training": Need(("target",), batch=4, tokens=512, trains="target", layers=3),
            "03_kv_distill": Need(("target",), batch=2, tokens=1536, added=173_000_000),
            "04_alignment_4d": Need(("teacher",), batch=4, tokens=1024, trains="student"),
            "06_cache_fusion": Need(("target", "draft"), batch=4, tokens=1024, added=480_000_000),
            "07_putting_it_together": Need(("target", "draft"), batch=1, tokens=4096),
        },
    },
}
