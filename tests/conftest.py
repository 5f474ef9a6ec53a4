"""Small random models that the tests share."""

import functools

import pytest
import torch
import transformers

torch.set_num_threads(1)

FAMILIES = ("Qwen3", "Qwen2", "Llama", "Mistral")
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


@functools.cache
def _tiny_model(family="Qwen3", rope="default", dtype=torch.float32, seed=0, **changes):
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
             "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
    if family == "Mistral":
        sizes["sliding_window"] = None
    config = getattr(transformers, f"{family}Config")(
        **sizes | {"rope_parameters": dict(ROPES[rope])} | changes
    )
    torch.manual_seed(seed)
    return (
        getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval().requires_grad_(False)
    )


@pytest.fixture(scope="session")
def tiny_model():
    """Return a factory tiny_model(family, rope, dtype, seed, **config): 3 layers, 4 heads, 2 KV heads, 97 tokens.

    Models are built once and shared: a test that changes one must copy it.
    """
    return _tiny_model
