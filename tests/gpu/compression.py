"""Milliseconds of a decoding step and bytes of the cache, by the fraction of entries that is kept."""

from collections.abc import Callable
from functools import partial

import torch
from _timing import (
    bandwidth,
    bytes_moved,
    captured,
    conditions,
    label,
    milliseconds,
    random_ids,
    random_model,
    require_close,
    seconds,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvlab.cache import from_layers, nbytes, select
from kvlab.compress import count_kept
from kvlab.evaluate import figure
from kvlab.models import head_dim
from kvlab.slots import Slots, step

RETENTIONS = (100, 50, 25, 10, 5, 2)  # per cent
KINDS = {
    "eager": "launched by Python, without a mask",
    "graph": "as a CUDA graph, without a mask",
    "masked": "as a CUDA graph with a mask, as the compiled path of the package",
}


def checks(device, dry):
    """Each model at each context."""
    for name in ("Qwen/Qwen3-14B", "Qwen/Qwen3-0.6B"):
        for context in (16, 64) if dry else (8192, 32768):
            words = f"decoding, {label(name)}, {context} entries"
            yield words, partial(context_figures, name, context, device, dry)


def random_cache(model: PreTrainedModel, entries: int) -> DynamicCache:
    """A cache of one row with entries that no text has."""
    config = model.config
    size = (2, 1, config.num_key_value_heads, entries, head_dim(config))
    options = {"dtype": model.dtype, "device": model.device}
    return from_layers(torch.randn(size, **options) for _ in range(config.num_hidden_layers))


@torch.inference_mode()
def context_figures(name: str, context: int, device: str, dry: bool) -> list[dict]:
    """Bytes, times and predicted times of a decoding step for every retention."""
    model = random_model(name, device, dry)
    whole, figures = random_cache(model, context), []
    for retention in RETENTIONS[::3] if dry else RETENTIONS:
        kept = count_kept(context, retention / 100)
        indices = torch.randperm(context, device=device)[:kept].sort().values
        cache = select(whole, indices)
        slots = Slots(model, rows=1, room=kept + 8)
        slots.put(0, cache, context)
        ending = f"{label(name)}_{context}_keep{retention}"
        words = f"{retention} % of {context} entries, batch 1, {conditions(name, dry)}"
        size = nbytes(cache) / 1e6
        figures.append(figure(f"cache_mb_{ending}", [size], "10^6 bytes", f"cache of {words}"))
        moved = bytes_moved(model, 1, kept + 1, 1)
        predicted = 1e3 * moved / bandwidth(device, dry)
        by_bytes = f"{moved / 1e9:.4g} GB by the bandwidth of a large copy or sum; {words}"
        figures.append(figure(f"decode_predicted_ms_{ending}", [predicted], "ms", by_bytes))
        for kind, call in decoding_calls(model, slots, device).items():
            times = seconds(call, device, calls=2)
            call_words = f"one token decoded, {KINDS[kind]}; {words}"
            figures.append(milliseconds(f"decode_ms_{ending}_{kind}", times, call_words))
    return figures


def decoding_calls(
    model: PreTrainedModel, slots: Slots, device: str
) -> dict[str, Callable[[], Tensor]]:
    """A decoding step of each kind; all write the same column and give the same logits."""
    tokens = random_ids(model, 1, 1)
    starts = slots.lengths
    columns = slots.set_write_positions(starts, 1, fixed=True)
    masked = captured(partial(step, model, slots, tokens, columns), device)
    columns = slots.set_write_positions(starts, 1)
    graph = captured(partial(step, model, slots, tokens, columns), device)

    def eager() -> Tensor:
        return step(model, slots, tokens, slots.set_write_positions(starts, 1))

    tokens.random_(model.config.vocab_size)  # another than that of the capture
    expected = eager()
    require_close(graph().clone(), expected)
    require_close(masked().clone(), expected)
    return {"eager": eager, "graph": graph, "masked": masked}
