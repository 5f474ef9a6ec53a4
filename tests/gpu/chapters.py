"""Every chapter's code cells, run on the GPU: the lab's models in fp16, and those of t4 as stand-ins.

`python tests/gpu/chapters.py NOTEBOOK SCALE DEVICE DTYPE` runs one, and names the cell that fails.
"""

import builtins
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# With stand-ins, which say and learn nothing, it is enough that every line is reached.
STEPS = 2  # of each training
TOKENS = 14  # of each generated text
ITEMS = 4  # of each data set that is made up
QUESTIONS = {"tiny": 64, "t4": 32}


def checks(device: str, dry: bool):
    """One check a chapter and scale; chapters run beside each other, each in a process of its own."""
    runs = [("t4", "float16", path) for path in NOTEBOOKS]
    runs += [("tiny", "float16", path) for path in NOTEBOOKS]
    if dry:  # tests/test_gpu.py runs all; on a CPU half precision is bf16
        runs = [
            ("t4", "bfloat16", path) for path in NOTEBOOKS if path.stem.startswith(("00", "07"))
        ]
    pool = ThreadPoolExecutor(2 if dry else 8)
    waiting = []
    for scale, dtype, path in runs:
        done = pool.submit(run_apart, path, scale, device, dtype)
        waiting.append((f"{path.stem}, {scale}, {dtype}", done.result))
    yield from waiting


def run_apart(path: Path, scale: str, device: str, dtype: str) -> None:
    """Run a chapter in a Python of its own; raise what one of its cells raised."""
    command = [sys.executable, __file__, str(path), scale, device, dtype]
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = os.environ | {"KVLAB_SCALE": scale, "MPLBACKEND": "agg"} | one_thread
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{done.stdout[-1500:]}\n{done.stderr[-4000:]}")


def run(path: Path, scale: str, device: str, dtype: str) -> None:
    """Run a chapter's code cells in one namespace, as Jupyter does, without showing anything."""
    import torch
    from stand_ins import loaders

    from kvlab import draft, speculate, training
    from kvlab.lab import corpora, report
    from kvlab.lab import models as lab
    from kvlab.scale import PRESETS, Scale

    def current(chapter=None):
        torch.manual_seed(0)
        preset = PRESETS[scale] | dict(PRESETS[scale]["needs"][chapter].models if chapter else {})
        preset["questions"] = min(preset["questions"], QUESTIONS[scale])
        return Scale(name=scale, device=device, dtype=getattr(torch, dtype), **preset)

    class FewSteps(training.FitSettings):
        def __init__(self, **settings):
            super().__init__(**settings | {"steps": min(settings["steps"], STEPS)})

    def short(*args, max_new_tokens=TOKENS, **options):
        return decode(*args, max_new_tokens=min(max_new_tokens, TOKENS), **options)

    def few_targets(model, tokenizer, prompts, *args, **options):
        some = generate_targets(model, tokenizer, prompts[:ITEMS], *args, **options)
        return [some[i % len(some)] for i in range(len(prompts))]

    def few(make):
        return lambda n, *args, **options: make(min(n, ITEMS), *args, **options)

    def few_blanked(tokenizer, n, *args, **options):
        return blanked(tokenizer, min(n, 2 * ITEMS), *args, **options)

    def short_report(name, n, **options):
        return make_report(name, n=1, **options)

    decode, generate_targets = speculate.decode, draft.generate_targets
    blanked, make_report = corpora.blanked, report.report
    patches = [mock.patch.object(Scale, "current", current)]
    if scale != "tiny":
        patches.append(mock.patch.object(training, "FitSettings", FewSteps))
        patches.append(mock.patch.object(speculate, "decode", short))
        patches.append(mock.patch.object(draft, "generate_targets", few_targets))
        patches.append(mock.patch.object(corpora, "blanked", few_blanked))
        patches.append(mock.patch.object(report, "report", short_report))
        for name in ("made_up", "Requests", "Readings"):
            patches.append(mock.patch.object(corpora, name, few(getattr(corpora, name))))
        patches += [mock.patch.object(lab, name, load) for name, load in loaders().items()]
    show_nothing()
    for patch in patches:
        patch.start()
    cells = json.loads(path.read_text("utf-8"))["cells"]
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        started = time.perf_counter()
        try:
            exec(compile(source, f"{path.stem}, cell {number}", "exec"), names)
        except Exception as error:
            error.add_note(f"In {path.stem} at {scale} on {device}, cell {number}:\n{source}")
            raise
        print(f"cell {number:3} {time.perf_counter() - started:7.1f} s", file=sys.stderr)


def show_nothing() -> None:
    """Give chapters what Jupyter would: `display`, and IPython's HTML where there is no IPython."""
    import matplotlib.pyplot as plt

    plt.rcParams["figure.max_open_warning"] = 0
    builtins.display = lambda *values: None
    try:
        import IPython.display  # noqa: F401
    except ImportError:
        package, module = ModuleType("IPython"), ModuleType("IPython.display")
        package.display, module.HTML = module, str
        sys.modules |= {"IPython": package, "IPython.display": module}


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    run(Path(sys.argv[1]), *sys.argv[2:])
