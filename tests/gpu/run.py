"""Whether all of kvlab holds on a GPU, in eight minutes: `python tests/gpu/run.py OUT`.

It needs this repository and the packages that README.md beside it names, and no network. Parts run one after another, each in a process of its own with
a time limit. OUT/gpu.json is written after each, and a table is printed last. README.md beside this
file says how to run it on a machine that is lent for minutes.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from argparse import ArgumentParser
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")  # bars would stand in the table
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from kvlab.evaluate import run_info
from kvlab.files import write_text

# Seconds after which a part is stopped, on a GPU and with --dry; what it has found by then is kept.
PARTS = {
    "laws": (90, 150),
    "chapters": (140, 150),
    "speculation": (90, 60),
    "knowledge": (60, 60),
    "compression": (40, 60),
    "memory": (60, 100),
}

START = 120  # seconds that a process may take to import what it needs


def work(part: str, dry: bool, go, results: Connection) -> None:
    """In a process of its own: run the checks of a part when it is told to, and send what each found."""
    os.setsid()  # what it starts ends with it
    checks = importlib.import_module(part).checks  # while another part runs
    go.wait()
    results.send({})  # from now on its time counts
    device = "cpu" if dry else "cuda"
    if dry:
        importlib.import_module("torch").set_num_threads(1)
    for name, check in checks(device, dry):
        started = time.perf_counter()
        row = {"part": part, "check": name, "error": None, "figures": []}
        try:
            row["figures"] = check() or []
        except Exception:
            row["error"] = traceback.format_exc()[-6000:]
        results.send(row | {"seconds": round(time.perf_counter() - started, 2)})
    results.send({"part": part, **run_info()})


def collect(part: str, process, results: Connection, limit: float) -> tuple[list[dict], dict]:
    """What a part sent until it ended, failed or was stopped at its limit; and its device."""
    rows, info, error = [], {}, None
    deadline = time.monotonic() + START
    while not info and not error:
        try:
            if not results.poll(max(0.0, deadline - time.monotonic())):
                error = f"stopped after {limit} seconds"
                continue
            message = results.recv()
        except EOFError:
            process.join(1)
            error = f"the process ended with code {process.exitcode}"
            continue
        if not message:
            deadline = time.monotonic() + limit
        elif "check" in message:
            rows.append(message)
            print(line(message), flush=True)
        else:
            info = message
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if error:
        rest = {"check": "the rest", "error": error, "figures": [], "seconds": limit}
        rows.append({"part": part, **rest})
        print(line(rows[-1]), flush=True)
    return rows, info


def line(row: dict) -> str:
    """One check of the table."""
    outcome = (row["error"] or "ok").strip().splitlines()[-1]
    return f"{row['part']:12} {row['check']:44} {row['seconds']:7.1f} s  {outcome[:120]}"


def main() -> None:
    """Run the chosen parts, write OUT/gpu.json after each, and print a table."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of gpu.json")
    parser.add_argument("--dry", action="store_true", help="small shapes on the CPU: does it run?")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for the processes
    # A process that uses a GPU cannot be forked from one that might have, and a new one imports again.
    context = multiprocessing.get_context("forkserver" if options.dry else "spawn")
    if options.dry:
        context.set_forkserver_preload(options.parts)
    waiting = []
    for part in options.parts:
        go, (here, there) = context.Event(), context.Pipe(duplex=False)
        process = context.Process(target=work, args=(part, options.dry, go, there), daemon=True)
        process.start()
        there.close()
        waiting.append((part, process, go, here))
    rows, info = [], {}
    for part, process, go, results in waiting:
        go.set()
        found, device = collect(part, process, results, PARTS[part][options.dry])
        rows += found
        info |= device
        report = {
            "figures": [figure for row in rows for figure in row["figures"]],
            "checks": [
                {key: row[key] for key in ("part", "check", "seconds", "error")} for row in rows
            ],
            **{key: info.get(key) for key in ("device", "versions", "commit")},
            "seeds": [0],
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_text(options.out / "gpu.json", json.dumps(report, indent=1) + "\n")
    print("\n" + "\n".join(map(line, rows)))
    for figure in report["figures"]:
        print("{name:44} {value:12.5g} {unit:10} {conditions}".format(**figure))
    failed = sum(row["error"] is not None for row in rows)
    print(f"{len(rows)} checks, {failed} failed; {report['seconds']:.0f} seconds")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
