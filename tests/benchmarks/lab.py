"""Abilities of the lab models on held-out data: reading, multiple choice, arithmetic, FAQ, speed, size."""

import time

import torch
from _benchmark import benchmark

from kvlab import lab
from kvlab.evaluate import figure
from kvlab.lab.models import MODELS
from kvlab.lab.report import questions, report


@torch.inference_mode()
def tokens_per_second(name: str, repeats: int, n_tokens: int = 64) -> list[float]:
    """Tokens per second of greedy decoding, batch 1, after a passage of 16 facts; one value per repeat."""
    model, tokenizer = lab.load(name), lab.load_tokenizer(name)
    prompt = questions("about", 1, (16, 16), seed=0)[0][:-1]
    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    rates = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False)
        rates.append(n_tokens / (time.perf_counter() - start))
    return rates[1:]


def measure(quick: bool, seed: int) -> list[dict]:
    """Measure accuracy, speed and size of the lab models."""
    figures = []
    for name in lab.NAMES:
        figures += report(name, n=20 if quick else 400, seed=seed)
    conditions = "greedy decoding, batch 1, after a passage of 16 facts; one value a repeat"
    for name in lab.NAMES:
        rates = tokens_per_second(name, repeats=2 if quick else 9)
        role = "" if name == "lab-target" else name.removeprefix("lab-") + "_"
        label = f"{role}tokens_per_second"
        figures.append(figure(label, rates, "tokens/s", f"{name}, {conditions}"))
    megabytes = sum(path.stat().st_size for path in MODELS.rglob("*.safetensors")) / 1e6
    return [*figures, figure("megabytes", [megabytes], "10^6 bytes", "all shipped safetensors")]


if __name__ == "__main__":
    benchmark(measure)
