"""The command line: subcommands are functions, options their signatures, and a mistake gets a sentence."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from kvlab import cli
from kvlab.cli import COMMANDS, main
from kvlab.commands import shared
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


class Trainer:
    """A stand-in for a module of the library."""

    @staticmethod
    def fit(
        steps: int = 10, rate: float = 0.1, hook=None, names: Sequence[str] = (), fast: bool = False
    ) -> dict:
        """Fit.

        Args:
            steps: Optimizer steps in all.
            rate: Learning rate.
            hook: Called after each step.
            names: Of what is fitted.
            fast: Skip checks.
        """
        return {"steps": steps, "rate": rate, "names": names, "fast": fast}


def train_toy(width: int, *, range: tuple[float, float] = (0.1, 0.9), **options) -> dict:
    """Train.

    Args:
        width: Given by the command.
        range: Where values are drawn from.
        **options: Of `Trainer.fit`.
    """
    return {"width": width, "range": range, **Trainer.fit(hook=print, **options)}


def toy(output_dir: Path = Path("toy"), **options) -> None:
    """Train a toy.

    Args:
        output_dir: Folder of the toy.
        **options: Of `train_toy`.
    """
    trained = train_toy(3, **options)
    print(json.dumps({"trained": trained, "settings": shared.command_settings(width=3)}))


@pytest.fixture
def run_toy(tmp_path, monkeypatch, capsys):
    defaults = tmp_path / "tiny.yaml"
    defaults.write_text("toy: {rate: 1e-3, range: [0.2, 0.8]}\n")
    monkeypatch.setattr(shared, "defaults_file", lambda: defaults)
    monkeypatch.setattr(cli, "COMMANDS", {"toy": toy, "scale": COMMANDS["scale"]})

    def run(*args):
        main(["toy", *args])
        return capsys.readouterr().out

    return run


def test_options_of_the_library_come_with_their_help(run_toy, capsys):
    with pytest.raises(SystemExit):
        run_toy("--help")
    printed = capsys.readouterr().out
    for text in (
        "--output_dir",
        "Folder of the toy",
        "--range",
        "Where values are",
        "--steps",
        "Optimizer steps",
    ):
        assert text in printed
    assert "--width" not in printed
    assert "--hook" not in printed


def test_defaults_come_from_the_signature_then_the_scale_then_a_file_then_the_line(
    run_toy, tmp_path
):
    trained = json.loads(run_toy())["trained"]
    assert trained == {
        "width": 3,
        "range": [0.2, 0.8],
        "steps": 10,
        "rate": 0.001,
        "names": [],
        "fast": False,
    }
    (tmp_path / "mine.yaml").write_text("rate: 0.5\nsteps: 5\n")
    trained = json.loads(run_toy("--config", str(tmp_path / "mine.yaml"), "--steps", "7"))[
        "trained"
    ]
    assert (trained["rate"], trained["steps"], trained["range"]) == (0.5, 7, [0.2, 0.8])


def test_lists_and_flags_need_no_yaml(run_toy):
    trained = json.loads(run_toy("--range", "0.3", "0.4", "--fast", "--names", "a", "[b]"))[
        "trained"
    ]
    assert trained["range"] == [0.3, 0.4]
    assert trained["names"] == ["a", "[b]"]
    assert trained["fast"] is True


def test_settings_are_all_options_and_what_the_command_resolved(run_toy, capsys):
    settings = json.loads(run_toy("--output-dir", "here"))["settings"]
    assert settings.pop("width") == 3
    assert settings == {"output_dir": "here", "range": [0.2, 0.8], "steps": 10, "rate": 0.001,
                        "names": [], "fast": False}  # fmt: skip
    toy(steps=4)  # called from Python, a command keeps what it resolved only
    assert json.loads(capsys.readouterr().out)["settings"] == {"width": 3}


def test_the_printed_configuration_is_one_that_can_be_read(run_toy, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_toy("--steps", "2", "--print_config")
    assert stop.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    trained = json.loads(run_toy("--config", str(tmp_path / "printed.yaml")))["trained"]
    assert (trained["steps"], trained["rate"]) == (2, 0.001)


@pytest.mark.parametrize("scale", PRESETS)
def test_each_scale_has_defaults_that_every_command_accepts(scale, monkeypatch, capsys):
    path = Path(shared.__file__).with_name(f"{scale}.yaml")
    sections = yaml.safe_load(path.read_text()) or {}
    assert sections.keys() <= COMMANDS.keys()
    monkeypatch.setattr(shared, "defaults_file", lambda: path)
    for command, defaults in sections.items():
        with pytest.raises(SystemExit) as stop:
            main([command, "--print_config"])
        assert stop.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert {name: printed[name] for name in defaults} == defaults


def test_a_scale_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setenv("KVLAB_SCALE", "huge")
    with pytest.raises(SystemExit, match="kvlab: KVLAB_SCALE is 'huge'; expected one of"):
        main(["scale"])
