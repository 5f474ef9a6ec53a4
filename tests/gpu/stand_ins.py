"""Small random models in place of the public ones, with tokenizers of their class and template.

What they say means nothing. But a chapter that runs with them runs all branches of the scales `t4`
and `full` without a download: their families, half precision, a default system message, a template
that knows `enable_thinking`, embeddings that are wider than the vocabulary.
"""

import json
import zlib
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen2Tokenizer

from kvlab.lab import models as lab
from kvlab.scale import config_of

START, END = "<|im_start|>", "<|im_end|>"
SYSTEM = "You are a helpful assistant."  # what Qwen2 and Qwen2.5 begin with, if the user does not
MESSAGES = (
    "{% for message in messages %}"
    "{% set thinks = thinking and loop.last and message.role == 'assistant' %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if thinks %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if thinking and enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
)


def make_tokenizer(name: str) -> Qwen2Tokenizer:
    """A tokenizer of Qwen's class and template, with the lab's words."""
    parts = json.loads((lab.MODELS / "lab-target" / "tokenizer.json").read_text("utf-8"))["model"]
    words = [word for word in parts["vocab"] if not word.startswith("<|")]
    vocabulary = {word: i for i, word in enumerate(words)}
    merges = [tuple(pair) for pair in parts["merges"]]
    tokenizer = Qwen2Tokenizer(vocabulary, merges, eos_token=END, pad_token="<|endoftext|>")
    thinks = "Qwen3" in name
    special = [START, END, "<|endoftext|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    if thinks:
        tokenizer.add_tokens(["<think>", "</think>"])
    template = "{% set thinking = " + str(thinks).lower() + " %}"
    tokenizer.chat_template = template + ("" if thinks else DEFAULT_SYSTEM) + MESSAGES
    return tokenizer


def make_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of the family, with the proportions of heads and layers, but small and random."""
    real = config_of(name)
    heads = {14: 7, 12: 6}.get(real.num_attention_heads, 4 if real.hidden_size < 2048 else 8)
    changes = {
        "hidden_size": 16 * heads,
        "intermediate_size": 64,
        "num_hidden_layers": 6 if real.num_hidden_layers < 32 else 9,
        "num_attention_heads": heads,
        "num_key_value_heads": 1 if heads == 7 else 2,  # it must divide
        "head_dim": 16,
        "vocab_size": 1664 if real.vocab_size > 151936 else 1600,  # more than the tokenizer has
        "layer_types": None,
        "initializer_range": 0.1,
        "eos_token_id": make_tokenizer(name).eos_token_id,
    }
    settings = real.to_dict() | changes
    config = AutoConfig.for_model(**settings)
    torch.manual_seed(zlib.crc32(name.encode()))
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def loaders() -> dict[str, Callable]:
    """Functions that take the place of those of `kvlab.lab.models`, by name."""
    real = {name: getattr(lab, name) for name in ("load_model", "load_tokenizer", "load_embedder")}

    def load_model(name, dtype=torch.float32):
        return (real["load_model"] if name in lab.NAMES else make_model)(name, dtype)

    def load_tokenizer(name):
        return (real["load_tokenizer"] if name in lab.NAMES else make_tokenizer)(name)

    def load_embedder(name=lab.EMBEDDER, device="cpu"):
        return real["load_embedder"](lab.EMBEDDER, device)

    return {
        "load_model": load_model,
        "load_tokenizer": load_tokenizer,
        "load_embedder": load_embedder,
    }
