"""The run for a GPU, dry: every part says what it found, in a file that `kvlab.results` can read."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvlab.results import Results

RUN = Path(__file__).parent / "gpu" / "run.py"
# The dry run has the others.
CHAPTERS = [
    path
    for path in sorted((RUN.parents[2] / "notebooks").glob("*.ipynb"))
    if not path.stem.startswith(("00", "07"))
]
PARTS = ("laws", "chapters", "speculation", "knowledge", "compression", "memory")


def test_every_part_of_the_gpu_run_works_dry(tmp_path):
    command = [sys.executable, RUN, tmp_path, "--dry"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    report = json.loads((tmp_path / "gpu.json").read_text())
    failed = {f"{c['part']}: {c['check']}": c["error"] for c in report["checks"] if c["error"]}
    assert not failed
    assert done.returncode == 0, done.stderr[-3000:]
    assert {check["part"] for check in report["checks"]} == set(PARTS)
    results = Results(report)
    assert results.versions["torch"]
    assert len(results) == len(report["figures"]) > 0  # no name twice


@pytest.mark.parametrize("broken", ["exits", "hangs"])
def test_a_part_that_ends_early_does_not_stop_the_next(tmp_path, broken):
    code = {"exits": "os._exit(3)", "hangs": "time.sleep(60)"}[broken]
    (tmp_path / "gpu").mkdir()
    for name in ("laws", "memory"):
        (tmp_path / "gpu" / f"{name}.py").write_text(
            "import os, time\n\n\ndef checks(device, dry):\n    yield 'one', lambda: None\n"
            + (f"    yield 'two', lambda: {code}\n" if name == "laws" else "")
        )
    source = RUN.read_text().replace('"laws": (90, 150)', '"laws": (90, 5)')
    source = source.replace("str(Path(__file__).parents[2])", repr(str(RUN.parents[2])))
    (tmp_path / "gpu" / "run.py").write_text(source)
    command = [
        sys.executable,
        tmp_path / "gpu/run.py",
        tmp_path,
        "--dry",
        "--parts",
        "laws",
        "memory",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    checks = json.loads((tmp_path / "gpu.json").read_text())["checks"]
    assert [(c["part"], c["check"], c["error"] is None) for c in checks] == [
        ("laws", "one", True),
        ("laws", "the rest", False),
        ("memory", "one", True),
    ]
    assert checks[1]["error"].startswith(
        "the process ended" if broken == "exits" else "stopped after 5"
    )
    assert done.returncode == 1


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_runs_at_t4_with_stand_ins(path, monkeypatch):
    monkeypatch.syspath_prepend(RUN.parent)
    run_apart = importlib.import_module("chapters").run_apart
    run_apart(path, "t4", "cpu", "bfloat16")  # raises what one of its cells raised


def test_a_chapter_that_fails_is_named_with_its_cell(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(RUN.parent)
    broken = {"cells": [{"cell_type": "code", "source": ["1 / 0"]}]}
    (tmp_path / "broken.ipynb").write_text(json.dumps(broken))
    run_apart = importlib.import_module("chapters").run_apart
    with pytest.raises(RuntimeError, match="In broken at t4 on cpu, cell 0:\n1 / 0"):
        run_apart(tmp_path / "broken.ipynb", "t4", "cpu", "bfloat16")


@pytest.mark.parametrize("law", ["splice_arms", "distill_gradient", "fuse_gates"])
def test_a_law_mixes_no_tensors_of_two_devices(monkeypatch, law):
    monkeypatch.syspath_prepend(RUN.parent)
    laws, pretend = importlib.import_module("laws"), importlib.import_module("pretend")
    with pretend.pretended():
        here, there = torch.ones(2), torch.ones(2, device="cuda")
        with pytest.raises(RuntimeError, match="to be on the same device"):
            here + there
        getattr(laws, law)("cuda", torch.float32)
