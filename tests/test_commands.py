"""The command line: subcommands are functions, options their signatures, and a mistake gets a sentence."""

import json

import pytest

from kvlab.cli import main
from kvlab.scale import PRESETS, Scale


def test_scale_prints_every_chapter(capsys, monkeypatch):
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    main(["scale"])
    printed = capsys.readouterr().out
    assert printed.startswith("Scale tiny on cpu")
    assert all(chapter in printed for chapter in PRESETS["tiny"]["needs"])


def test_report_prints_what_the_function_returns(capsys):
    main(["lab", "report", "--names", "[lab-draft]", "--questions", "2", "--as_json", "true"])
    figures = json.loads(capsys.readouterr().out)
    assert {"draft_reading", "draft_faq_heldout"} <= {figure["name"] for figure in figures}


def test_help_lists_options_of_the_signature(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["lab", "train", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--names", "--work", "--out"))


def test_an_unknown_option_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["scale", "--colour", "3"])
    assert stop.value.code == 2
    assert "colour" in capsys.readouterr().err


def test_an_unknown_model_is_a_sentence():
    with pytest.raises(SystemExit, match=r"no lab model 'lab-giant'; expected one of lab-target"):
        main(["lab", "report", "--names", "[lab-giant]"])


def test_scale_comes_from_the_variable(monkeypatch):
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    assert Scale.current().target == "lab-target"
