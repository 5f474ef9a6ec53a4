"""The page "At scale": commands exist, scripts are bash, runs resume on more processes."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvlab import cli, lab, training
from kvlab.knowledge import KnowledgeCache

PAGE = (Path(__file__).parents[1] / "book/at_scale.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.S | re.M)
COMMANDS = re.findall(
    r"(?:kvlab|-m kvlab\.cli) ([a-z]+(?:-[a-z]+)* .*?)(?: &)?$",
    "\n".join(SCRIPTS).replace("\\\n", " "),
    re.M,
)
COMMANDS += re.findall(r"`kvlab ([^`]*)`", PAGE)


class Parsed(Exception):
    """Raised in place of running a command whose options are those of kvlab."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_on_the_page_is_one_of_kvlab(command, monkeypatch):
    parse = cli.ArgumentParser.parse_args

    def parse_only(parser, *args, **options):
        parse(parser, *args, **options)
        raise Parsed

    monkeypatch.setattr(cli._Parser, "parse_args", parse_only, raising=False)
    with pytest.raises(Parsed):
        cli.main(shlex.split(command))


def test_all_commands_of_the_page_are_found():
    names = {"build-cache", "train-draft", "distill", "ask"}
    assert {command.split()[0] for command in COMMANDS} == names
    assert len(COMMANDS) == PAGE.count("-m kvlab.cli ") + len(
        re.findall(r"[ `]kvlab (?=build-cache|ask)", PAGE)
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_bash(script):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_shows_how_often_a_checkpoint_is_written():
    every = inspect.signature(training.fit).parameters["every"].default
    assert f"each {every} steps" in PAGE


def test_a_draft_begun_by_one_process_is_finished_by_two(tmp_path, monkeypatch):
    records = [
        {"question": f"Where does {name} live?", "answer": "In Rome."}
        for name in "Anna Ben Cara Dan Eva".split()
    ]
    KnowledgeCache.build(
        tmp_path / "knowledge", records, lab.load("lab-draft"), lab.load_tokenizer("lab-draft")
    )
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    monkeypatch.chdir(tmp_path)
    options = "--base_model lab-draft --knowledge none --layers first:1"
    options += " --epochs 2 --batch_size 2 --max_new_tokens 6"
    # One mean over tokens; with ce there would be two.
    command = ["train-draft", *options.split(), "--losses.kl", "1"]
    cli.main([*command, "--output_dir", "full"])
    save = training._save_run

    def save_and_die(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save_run", save_and_die)
    with pytest.raises(SystemExit, match="130"):
        cli.main([*command, "--output_dir", "split"])
    options = "-m torch.distributed.run --standalone --nproc_per_node 2 -m kvlab.cli"
    launch = [sys.executable, *options.split()]
    setting = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [*launch, *command, "--output_dir", "split"]
    done = subprocess.run(command, env=setting, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    full, split = (
        json.loads((tmp_path / n / "training.json").read_text())["history"]
        for n in ("full", "split")
    )
    assert [entry["loss"] for entry in split] == pytest.approx(
        [entry["loss"] for entry in full], rel=1e-3
    )
    want, got = (load_file(name + "/model.safetensors") for name in ("full", "split"))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-5)
