"""Time to the first token after a context that is read, loaded, moved or partly computed again."""

import hashlib
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from _timing import (
    conditions,
    label,
    milliseconds,
    random_ids,
    random_model,
    require_close,
    seconds,
)
from safetensors import safe_open
from transformers import PreTrainedModel
from xxhash import xxh3_128

from kvlab.cache import Prefix, load, prefill, save, shift, to_tensor
from kvlab.files import as_bytes
from kvlab.knowledge import splice
from kvlab.models import fingerprint

PIECES, FRACTION = 4, 0.15  # of "recompute"
MOVE = 1000  # positions
KINDS = {
    "read": "context and one token read",
    "load": "context loaded from a file in the system's page cache (checksum included), one token read",
    "shift": f"a cache in the device's memory moved by {MOVE} positions, one token read",
    "recompute": f"{PIECES} caches in the device's memory joined and {FRACTION:.0%} of the tokens "
    "computed again, one token read",
}


def checks(device, dry):
    """The larger model first: if time runs out, the smaller one's times are missing."""
    for name in ("Qwen/Qwen3-14B", "Qwen/Qwen3-0.6B"):
        for context in (16, 64) if dry else (512, 1024, 2048, 4096, 8192):
            words = f"first token, {label(name)}, {context} tokens"
            yield words, partial(first_token_figures, name, context, device, dry)
        context = 64 if dry else 2048
        words = f"steps of loading, {label(name)}, {context} tokens"
        yield words, partial(loading_figures, name, context, device, dry)


def save_to_page_cache(prefix: Prefix, folder: str, model: PreTrainedModel) -> Path:
    """Save a cache without waiting for the disk."""
    path = Path(folder) / "cache.safetensors"
    with mock.patch("os.fsync"):
        save(prefix, path, model)
    return path


def moved(prefix: Prefix) -> Prefix:
    """The prefix at later positions."""
    cache = shift(prefix.cache, MOVE, prefix.rotary)
    return Prefix(cache, prefix.next_position + MOVE, rotary=prefix.rotary)


@torch.inference_mode()
def first_token_figures(name: str, context: int, device: str, dry: bool) -> list[dict]:
    """Every way to the logits after one more token."""
    model = random_model(name, device, dry)
    text = random_ids(model, 1, context + 1)
    context_ids, question = text[:, :-1], text[:, -1:]
    prefix = replace(prefill(model, context_ids), logits=None)
    pieces = [prefill(model, ids) for ids in context_ids.chunk(PIECES, 1)]
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        path = save_to_page_cache(prefix, folder, model)
        ways = {
            "read": lambda: prefill(model, text),
            "load": lambda: prefill(model, question, load(path, model)),
            "shift": lambda: prefill(model, question, moved(prefix)),
            "recompute": lambda: prefill(
                model, question, splice(model, pieces, "recompute", FRACTION)
            ),
        }
        logits = {way: call().logits for way, call in ways.items()}  # warms up, too
        assert logits.pop("recompute").isfinite().all()  # an approximation
        for values in logits.values():
            require_close(values, logits["read"])
        for way, call in ways.items():
            times = seconds(lambda call=call: call().logits, device, warm_up=0, limit=0.5)
            words = f"{KINDS[way]}; context of {context} tokens, {conditions(name, dry)}"
            figures.append(milliseconds(f"ttft_{way}_ms_{label(name)}_{context}", times, words))
    return figures


@torch.inference_mode()
def loading_figures(name: str, context: int, device: str, dry: bool) -> list[dict]:
    """Where loading spends its time, and what other ways to do the same would take."""
    model = random_model(name, device, dry)
    prefix = prefill(model, random_ids(model, 1, context))
    host = to_tensor(prefix.cache).cpu()
    pinned = host.pin_memory() if device == "cuda" else host
    with tempfile.TemporaryDirectory() as folder:
        path = save_to_page_cache(prefix, folder, model)

        def read_file(to: str) -> None:
            with safe_open(path, framework="pt", device=to) as file:
                for key in file.keys():
                    file.get_tensor(key).to(device)

        steps = {
            "load": (lambda: load(path, model), "all of kvlab.cache.load"),
            "fingerprint": (lambda: fingerprint(model), "the fingerprint of the model"),
            "sha256": (lambda: hashlib.sha256(as_bytes(host)), "SHA-256 of the cache on the host"),
            "xxh3": (lambda: xxh3_128(as_bytes(host)), "XXH3 of the cache on the host"),
            "map": (partial(read_file, "cpu"), "the file mapped, then copied to the device"),
            "direct": (partial(read_file, device), "the file read to the device by safetensors"),
            "pageable": (lambda: host.to(device), "a copy to the device from pageable memory"),
            "pinned": (lambda: pinned.to(device), "a copy to the device from pinned memory"),
        }
        figures = []
        for step, (call, words) in steps.items():
            times = seconds(call, device, repeats=3, warm_up=1, limit=0.5)
            words += (
                f"; cache of {context} tokens, {host.nbytes / 1e9:.4g} GB, {conditions(name, dry)}"
            )
            figures.append(milliseconds(f"loading_{step}_ms_{label(name)}", times, words))
    return figures
