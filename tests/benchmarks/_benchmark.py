"""The command line that all benchmarks share."""

import json
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

from kvlab.evaluate import run_info
from kvlab.files import write_text
from kvlab.results import Figure


def benchmark(measure: Callable[[bool, int], list[dict]], seed: int = 0) -> None:
    """The command line of a benchmark: `--json` prints the result, `--out FILE` writes it, `--quick` takes seconds.

    Args:
        measure: `measure(quick, seed)` returns a list of `figure`.
    """
    parser = ArgumentParser(description=measure.__doc__)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="write the result to a JSON file")
    parser.add_argument("--quick", action="store_true", help="a smaller sample, in seconds")
    options = parser.parse_args()
    started = time.perf_counter()
    figures = measure(options.quick, seed)
    result = {
        "figures": figures,
        **run_info(),
        "seeds": [seed],
        "seconds": round(time.perf_counter() - started, 1),
    }
    text = json.dumps(result, indent=1)
    if options.out:
        write_text(options.out, text + "\n")
    if options.json:
        print(text)
    elif not options.out:
        for f in figures:
            print(f"{f['name']:32} {Figure(**f):10.3f} {f['unit']}: {f['conditions']}")
