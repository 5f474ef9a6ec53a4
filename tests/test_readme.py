"""The README can be copied: each Python snippet runs alone, and its comparisons hold."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvlab
from kvlab import compress, knowledge

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_of_the_readme_runs_alone(number, tmp_path):
    command = [sys.executable, "-c", SNIPPETS[number]]
    environment = os.environ | {"KVLAB_SCALE": "tiny", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_best_other_score_is_the_best():
    results = kvlab.results("distill")
    names = ("key_norm_reversed_free", "expected_attention_free", "random_free", *compress.METHODS)
    for percent in (10, 2):
        scores = {name: results[f"em_{name}_{percent}"].value for name in names}
        assert max(scores, key=scores.get) == "key_norm_reversed_free"


@pytest.mark.parametrize("kind", ["", "_reference"])
def test_the_best_way_to_recompute_at_the_same_work_is_legolink(kind):
    results = kvlab.results("knowledge")
    work = [results[f"work_{arm}"].value for arm in knowledge.RECOMPUTING]
    assert max(work) < 1.05 * min(work)
    errors = {arm: results[f"kl_{arm}{kind}"].value for arm in knowledge.RECOMPUTING}
    assert min(errors, key=errors.get) == "legolink"


def test_the_figure_shows_what_its_description_says():
    results = kvlab.results("distill")
    full = results["em_full"].value
    for name in ("distill_free", "kvzip"):
        assert results[f"em_{name}_10"].value > full - 0.05
    for percent in (10, 5, 2):
        value = min(results[f"em_{name}_{percent}"].value for name in ("distill_free", "kvzip"))
        for other in ("distill", "kvzip_uniform", "snapkv", "random"):
            assert value > results[f"em_{other}_{percent}"].value
