"""What the lab models can do, on held-out data: reading, multiple choice, arithmetic, FAQ, speed, size."""

from kvlab.evaluate import benchmark, figure
from kvlab.lab import NAMES
from kvlab.lab.report import megabytes, report, tokens_per_second


def measure(quick: bool, seed: int) -> list[dict]:
    """Measure what the lab models can do, how fast they are, and what they weigh."""
    figures = [f for name in NAMES for f in report(name, n=20 if quick else 400, seed=seed)]
    told = "greedy decoding, batch 1, after a passage of 16 facts; one value a repeat"
    for name in NAMES:
        rates = tokens_per_second(name, repeats=2 if quick else 9)
        role = "" if name == "lab-target" else name.removeprefix("lab-") + "_"
        figures.append(figure(f"{role}tokens_per_second", rates, "tokens/s", f"{name}, {told}"))
    return [*figures, figure("megabytes", [megabytes()], "10^6 bytes", "all shipped safetensors")]


if __name__ == "__main__":
    benchmark(measure)
