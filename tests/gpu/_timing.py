"""Timers, CUDA graphs, and models with random weights, for the parts that measure costs."""

import copy
import time
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kvlab.cache import bytes_per_token
from kvlab.evaluate import figure
from kvlab.models import head_dim, rotary_of
from kvlab.scale import config_of

DTYPE = torch.bfloat16
# Largest relative difference of logits between two ways to compute them. Some hundred operations in a
# row round to 8 bits, which adds up to 0.06 in 40 layers with random weights; keys at wrong positions
# or another context change logits by more than their norm.
TOLERANCE = 0.25
SMALL = {  # sizes of a model with --dry
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}


def label(name: str) -> str:
    """The size of a model, for the name of a figure: "14b" of "Qwen/Qwen3-14B"."""
    return name.split("/")[-1].split("-")[1].lower()


def shape(name: str, dry: bool) -> PretrainedConfig:
    """The configuration of a model by name; with `dry`, of a small one of its kind."""
    config = config_of(name)
    if dry:
        config = copy.deepcopy(config)
        for key, value in SMALL.items():
            setattr(config, key, value)
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def conditions(name: str, dry: bool) -> str:
    """The model in words."""
    small = "a small model in place of " if dry else ""
    return f"{small}the shape of {name} with random weights in bfloat16"


@lru_cache(maxsize=2)  # a target and a draft
def random_model(name: str, device: str, dry: bool) -> PreTrainedModel:
    """A model of this shape, made on the device in bfloat16; weights have the deviation 0.02."""
    torch.manual_seed(0)
    config = shape(name, dry)
    with torch.inference_mode(False), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    model.eval().requires_grad_(False)
    width = head_dim(config)
    theta = config.rope_parameters["rope_theta"]
    expected = theta ** -(torch.arange(0, width, 2) / width)
    torch.testing.assert_close(rotary_of(model).inv_freq.cpu(), expected, rtol=1e-5, atol=0)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embeddings is head) == config.tie_word_embeddings
    assert {parameter.dtype for parameter in model.parameters()} == {DTYPE}
    assert 0.018 < head[:100].float().std().item() < 0.022
    return model


def random_ids(model: PreTrainedModel, rows: int, count: int) -> Tensor:
    """Token ids (rows, count) on the model's device."""
    return torch.randint(model.config.vocab_size, (rows, count), device=model.device)


def bytes_moved(model: PreTrainedModel, rows: int, columns: int, tokens: int) -> int:
    """The bytes that a call on `tokens` tokens per row must read and write.

    All weights once (of embeddings that are not also the output's, nothing), `columns` entries per
    row of the cache read and the new ones written, and the logits written.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes
    entries = rows * (columns + tokens) * bytes_per_token(model.config, DTYPE)
    return weights + entries + rows * tokens * model.config.vocab_size * DTYPE.itemsize


# -- time


def synchronize(device: str) -> None:
    """Wait until a GPU has done everything."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(
    call: Callable,
    device: str,
    *,
    repeats: int = 5,
    calls: int = 1,
    warm_up: int = 2,
    limit: float = 2.0,
) -> np.ndarray:
    """Seconds of a call, measured `repeats` times; each time a number of calls in a row.

    After `limit` seconds it stops, but not before the second time.
    """
    for _ in range(warm_up):
        call()
    times = []
    while len(times) < repeats and (len(times) < 2 or calls * sum(times) < limit):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        times.append((time.perf_counter() - started) / calls)
    return np.array(times)


def milliseconds(name: str, times: np.ndarray, words: str) -> dict:
    """The figure of a time: the median, with the interval of the mean."""
    words = f"{words}; median of {len(times)}, after a warm-up"
    return figure(name, 1e3 * times, "ms", words) | {"value": float(1e3 * np.median(times))}


@cache
def bandwidths(device: str, dry: bool) -> dict[str, np.ndarray]:
    """Bytes per second that simple operations on 4 GiB (float32) read and write."""
    source = torch.ones(2**20 if dry else 2**30, device=device)
    target = torch.empty_like(source)
    operations = {
        "copy": (2, lambda: target.copy_(source)),
        "sum": (1, source.sum),
        "max": (1, source.amax),
    }
    return {
        name: passes * source.nbytes / seconds(operation, device, calls=5)
        for name, (passes, operation) in operations.items()
    }


def bandwidth(device: str, dry: bool) -> float:
    """Bytes per second of the fastest of these operations."""
    return max(float(np.median(values)) for values in bandwidths(device, dry).values())


# -- CUDA graphs


class _Graph:
    """A CUDA graph of a call. Its result is overwritten by the next replay."""

    def __init__(self, call: Callable[[], Tensor]):
        self.call = call  # whose tensors the graph reads: they must live as long
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = call()

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.result


def captured(call: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    """The call as a CUDA graph; on a CPU, which has none, the call itself."""
    return _Graph(call) if device == "cuda" else call


def require_close(logits: Tensor, expected: Tensor) -> None:
    """Assert that logits agree within what bfloat16 allows (never, if a number is not finite)."""
    error = ((logits.float() - expected.float()).norm() / expected.float().norm()).item()
    assert error < TOLERANCE, f"logits differ by {error:.3f} of their norm"
