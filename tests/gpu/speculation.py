"""What calls of target and draft cost at the sources' shapes, and the speed-up that this predicts."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from _timing import (
    bandwidth,
    bandwidths,
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
from transformers import PreTrainedModel

from kvlab.evaluate import figure
from kvlab.scale import PRESETS
from kvlab.slots import step
from kvlab.speculate import Runner, best_gamma, cost_model

ROOM = 16  # columns after the context
ACCEPTANCES = (0.6, 0.7, 0.8)


def checks(device, dry):
    """Bandwidth, then both pairs without and with CUDA graphs, then the package's compiled path."""
    yield "bandwidth", partial(bandwidth_figures, device, dry)
    need = PRESETS["t4"]["needs"]["05_speculative_decoding"]
    small = getattr(need, "models", None) or PRESETS["t4"]
    pairs = [("Qwen/Qwen3-14B", "Qwen/Qwen3-0.6B"), (small["target"], small["draft"])]
    for pair in pairs:
        for mode in ("eager", "graph"):
            words = f"{label(pair[0])} and {label(pair[1])}, {mode}"
            yield words, partial(pair_figures, pair, mode, device, dry)
    yield "compiled draft", partial(compiled_figures, pairs[0][1], device, dry)


def bandwidth_figures(device: str, dry: bool) -> list[dict]:
    """Bandwidth of memory, for reading and for copying."""
    words = "4 GiB of float32 in the device's memory, bytes read and written, mean of 5"
    return [
        figure(f"bandwidth_{name}", values / 1e9, "GB/s", f"{name} of {words}")
        for name, values in bandwidths(device, dry).items()
    ]


@torch.inference_mode()
def pair_figures(pair: tuple[str, str], mode: str, device: str, dry: bool) -> list[dict]:
    """Costs of a pair for both batch sizes."""
    context, counts = (32, range(1, 4)) if dry else (512, range(1, 10))
    target, draft = (random_model(name, device, dry) for name in pair)
    rate = bandwidth(device, dry)
    kind = (
        "launched by Python" if mode == "eager" else "as a CUDA graph with a mask over all columns"
    )
    figures = []
    for rows in (1, 8):
        words = f"batch {rows}, after {context} tokens per row, {kind}"
        times = call_seconds(target, rows, context, counts, mode)
        draft_time = call_seconds(draft, rows, context, [1], mode)[1]
        suffix = f"b{rows}_{mode}"
        for k, values in times.items():
            name = f"{label(pair[0])}_b{rows}_k{k}_{mode}"
            call = f"target, {conditions(pair[0], dry)}, tokens of the call: {k} per row, {words}"
            moved = bytes_moved(target, rows, context + k, k)
            figures += call_figures(f"target_{{}}_{name}", values, moved, rate, call)
        name = f"{label(pair[1])}_for_{label(pair[0])}_{suffix}"
        call = f"draft, {conditions(pair[1], dry)}, tokens of the call: 1 per row, {words}"
        moved = bytes_moved(draft, rows, context + 1, 1)
        figures += call_figures(f"draft_{{}}_{name}", draft_time, moved, rate, call)
        both = f"{conditions(pair[0], dry)}, draft of {pair[1]}, {words}, from medians"
        medians = {k: float(np.median(values)) for k, values in times.items()}
        c = float(np.median(draft_time)) / medians[1]
        figures += predictions(f"{label(pair[0])}_{label(pair[1])}_{suffix}", medians, c, both)
    return figures


def call_seconds(
    model: PreTrainedModel, rows: int, context: int, counts: Sequence[int], mode: str
) -> dict[int, np.ndarray]:
    """Seconds of a call on each number of tokens per row, after a context that all rows share."""
    device = model.device.type
    runner = Runner(model)
    runner.start(random_ids(model, 1, context).tolist() * rows, [None] * rows, ROOM)
    slots, times = runner.slots, {}
    for count in counts:
        tokens = random_ids(model, rows, count)
        call = partial(runner, tokens, slots.lengths)
        if mode == "graph":
            columns = slots.set_write_positions(slots.lengths, count, fixed=True)
            call = captured(partial(step, model, slots, tokens, columns), device)
            tokens.random_(model.config.vocab_size)  # others than those of the capture
            logits = call().clone()
            require_close(logits, runner(tokens, slots.lengths))
        times[count] = seconds(call, device, calls=3)
    return times


def call_figures(name: str, times: np.ndarray, moved: int, rate: float, words: str) -> list[dict]:
    """Time of a call, and the fraction of the bandwidth `rate` at which it moves its bytes."""
    share = moved / rate / np.median(times)
    parts = f"{words}: {moved / 1e9:.4g} GB (weights once, cache, logits) over the median"
    return [
        milliseconds(name.format("ms"), times, words),
        figure(name.format("share"), [share], "of bandwidth", parts),
    ]


def predictions(name: str, medians: dict[int, float], c: float, words: str) -> list[dict]:
    """c, v by gamma, and the best gamma with its speed-up by acceptance."""

    def v(gamma: int) -> float:
        return medians[gamma + 1] / medians[1]

    of_target = "over a target call on one token"
    figures = [figure(f"c_{name}", [c], "ratio", f"a draft call {of_target}; {words}")]
    gammas = range(1, len(medians))
    for gamma in gammas:
        call = f"a target call on {gamma + 1} tokens {of_target}; {words}"
        figures.append(figure(f"v_{gamma}_{name}", [v(gamma)], "ratio", call))
    for acceptance in ACCEPTANCES:
        gamma = best_gamma(acceptance, c, v, maximum=len(gammas))
        model = f"by the cost model at acceptance {acceptance}, gamma up to {len(gammas)}; {words}"
        speedup = cost_model(acceptance, c, gamma, v).speedup
        ending = f"a{round(100 * acceptance)}_{name}"
        figures.append(figure(f"gamma_{ending}", [gamma], "tokens", f"best gamma {model}"))
        figures.append(figure(f"speedup_{ending}", [speedup], "ratio", f"at best gamma, {model}"))
    return figures


@torch.inference_mode()
def compiled_figures(name: str, device: str, dry: bool) -> list[dict]:
    """The same call of the draft by the package's own compiled path."""
    context = 32 if dry else 512
    model = random_model(name, device, dry)
    text = random_ids(model, 1, context).tolist()
    eager = Runner(model)
    # Compiling for a CPU takes longer than all of the dry run.
    runner = eager if dry else Runner(model, compiled_room=context + ROOM)
    eager.start(text, [None], ROOM)
    runner.start(text, [None], ROOM)
    tokens = random_ids(model, 1, 1)
    call = partial(runner, tokens, [context])
    for _ in range(4):  # it compiles, warms up and captures
        logits = call().clone()
    require_close(logits, eager(tokens, [context]))
    words = f"draft, {conditions(name, dry)}, 1 token, batch 1, after {context} tokens"
    times = seconds(call, device, calls=3)
    return [milliseconds("draft_ms_compiled", times, f"{words}, compiled, with a CUDA graph")]
