"""The command line that all benchmarks share."""

import json
import re
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path

from kvlab.evaluate import run_info
from kvlab.files import write_text
from kvlab.results import Figure


def as_text(result: dict) -> str:
    """A result as JSON, with the values of a figure in one line, in six digits."""
    figures = []
    for f in result["figures"]:
        values = [float(f"{value:.6g}") for value in f.get("values", ())]
        figures.append(f | {"values": values} if values else f)
    text = json.dumps(result | {"figures": figures}, indent=1)
    return re.sub(r"\[\s+([^][{}]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)


def benchmark(measure: Callable[..., list[dict]], seed: int = 0, parts: Sequence[str] = ()) -> None:
    """The command line of a benchmark: `--json` prints the result, `--out FILE` writes it, `--quick` takes seconds.

    Args:
        measure: `measure(quick, seed)` returns a list of `figure`; with parts also `parts`.
        parts: that can be measured alone, `--parts a b`. The other figures of FILE stay, and
            "earlier" has the commit of each.
    """
    parser = ArgumentParser(description=measure.__doc__)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="write the result to a JSON file")
    parser.add_argument("--quick", action="store_true", help="a smaller sample, in seconds")
    if parts:
        parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options = parser.parse_args()
    started = time.perf_counter()
    chosen = {"parts": options.parts} if parts else {}
    figures = measure(options.quick, seed, **chosen)
    earlier, before = {}, {}
    if parts and options.out and options.out.is_file() and set(options.parts) < set(parts):
        before, names = json.loads(options.out.read_text("utf-8")), {f["name"] for f in figures}
        kept = [f for f in before["figures"] if f["name"] not in names]
        commits = before.get("earlier", {})
        earlier = {f["name"]: commits.get(f["name"], before["commit"]) for f in kept}
        figures = figures + kept
    result = {
        "figures": figures,
        **run_info(),
        "seeds": [seed],
        "seconds": round(time.perf_counter() - started, 1),
        **({"earlier": earlier} if earlier else {}),
        **({"note": before["note"]} if earlier and "note" in before else {}),
    }
    text = as_text(result)
    if options.out:
        write_text(options.out, text + "\n")
    if options.json:
        print(text)
    elif not options.out:
        for f in figures:
            print(f"{f['name']:32} {Figure(**f):10.3f} {f['unit']}: {f['conditions']}")
