"""Commands check what they are given before any work, and keep what they have when they are stopped."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from command_helpers import RECORDS, write

from kvlab import cache, cli, generation, lab, speculate
from kvlab.cli import COMMANDS, main
from kvlab.commands import shared
from kvlab.knowledge import KnowledgeCache
from kvlab.scale import Scale
from kvlab.speculate import generate

ALL = [name for name in COMMANDS if name not in ("scale", "lab")]
UNSET = {"retention": 0.5, "problems": 1, "prompts": 1}  # numbers whose default is not one
OUTPUTS = {
    "speculate": "--save_results --output_dir",
    "build-cache": "--store",
    "train-draft": "--output_dir",
    "distill": "--output_dir",
    "eval-compression": "--save_results --output_dir",
    "layer-map": "--output",
    "train-aligned": "--output_dir",
    "compare-alignments": "--output_dir",
    "train-fuser": "--output_dir",
    "train-parallel": "--output_dir",
}


@pytest.fixture
def nothing_loads(monkeypatch):
    for name in ("load", "load_embedder"):
        monkeypatch.setattr(Scale, name, lambda *_: pytest.fail("loaded"))


def numbers_of(command, capsys):
    """The options of a command that are numbers, with an example each."""
    with pytest.raises(SystemExit):
        main([command, "--print_config"])
    defaults = yaml.safe_load(capsys.readouterr().out)
    options = {name: UNSET[name] for name in UNSET if name in defaults}
    if command == "speculate":
        del options["prompts"]
    for name, value in defaults.items():
        if type(value) in (int, float):
            options[name] = value
    return options


@pytest.mark.parametrize("command", ALL)
def test_every_number_is_checked_before_anything_is_loaded(command, tiny, nothing_loads, capsys):
    options = numbers_of(command, capsys)
    for name, value in options.items():
        wrong = (-2,) if type(value) is int else (float("nan"), float("inf"), -float("inf"))
        for number in wrong:
            for given in (number, [value, number]):
                with pytest.raises(ValueError, match=rf"^{name} is {number}, expected "):
                    shared.require_ranges({name: given})
    assert not list(tiny.iterdir())
    name = next(name for name, value in options.items() if type(value) is int)
    with pytest.raises(SystemExit, match=rf"^kvlab: {name} is -2, expected "):
        main([command, *(["Why?"] if command == "ask" else []), f"--{name}", "-2"])


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", [0, 0.5], [-0.1, 1, float("nan")]),
        ("(0, 1]", [1, 1e-9], [0, 1.1, float("inf")]),
        ("[1, inf)", [1, 10**9], [0, float("inf")]),
        ("(-inf, inf)", [-1e9, 0.0], [float("nan"), float("inf"), float("-inf")]),
    ],
)
def test_an_interval_has_the_ends_that_it_shows(interval, inside, outside):
    assert all(shared._is_in(number, interval) for number in inside)
    assert not any(shared._is_in(number, interval) for number in outside)


@pytest.mark.parametrize("command", OUTPUTS)
def test_an_output_that_cannot_be_written_is_found_out_first(
    command, facts, tiny, nothing_loads, monkeypatch
):
    (tiny / "taken").write_text("")
    more = ["--store", str(facts)] if command == "train-draft" else []
    for place in ("taken/x", "taken/x/y", "x" * 300):
        with pytest.raises(SystemExit, match=rf"^kvlab: {place}.* cannot be written \("):
            main([command, *more, *OUTPUTS[command].split(), place])
    assert [path.name for path in tiny.iterdir()] == ["taken"]


def toy(
    output_dir: Path = Path("toy"),
    maps: list[Path] | None = None,
    base_model: str = "lab-draft",
    prompts: list[str] | None = None,
    questions: Path | None = None,
    losses: dict[str, float] | None = None,
) -> None:
    """Print the options, or end as they say."""
    if base_model == "stopped":
        raise KeyboardInterrupt("step 3 of 6 is in run/checkpoint.safetensors")
    print(json.dumps(shared.command_settings()))


@pytest.fixture
def run_toy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shared, "defaults_file", lambda: tmp_path / "none.yaml")
    monkeypatch.setattr(cli, "COMMANDS", {"toy": toy, "scale": COMMANDS["scale"]})
    monkeypatch.setenv("HOME", str(tmp_path))

    def run(*args):
        main(["toy", *args])
        return json.loads(capsys.readouterr().out)

    return run


def test_a_tilde_is_the_users_folder_in_every_path_and_in_no_text(run_toy, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "__name__", "toy")
    texts = ["~/.bashrc is a file", "~5 apples"]
    options = ["--output_dir", "~/out", "--maps", "~/a.json", "b~.json", "--base_model", "~/model"]
    got = run_toy(*options, "--questions", "~/q.txt", "--prompts", *texts)
    assert got["output_dir"] == f"{tmp_path}/out"
    assert got["maps"] == [f"{tmp_path}/a.json", "b~.json"]
    assert got["base_model"] == f"{tmp_path}/model"
    assert got["questions"] == f"{tmp_path}/q.txt"
    assert got["prompts"] == texts


def test_loss_weights_are_numbers_from_0(run_toy):
    assert run_toy("--losses.kl", "2")["losses"] == {"kl": 2}
    with pytest.raises(SystemExit, match=r"losses is -1\.0, expected a number in \[0, inf\)"):
        run_toy("--losses.kl", "-1")


def test_bytes_that_are_no_text_are_a_sentence(run_toy):
    with pytest.raises(SystemExit, match="does not fit: it has half a character"):
        run_toy("--prompts", "M\udce9")


def test_a_configuration_that_is_no_text_is_named(run_toy, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff")
    with pytest.raises(
        SystemExit, match=r"^kvlab: --config .*mine\.yaml does not fit: byte 0 is not"
    ):
        run_toy("--config", str(tmp_path / "mine.yaml"))


def test_ctrl_c_ends_a_command_with_a_sentence_and_130(run_toy, capsys):
    with pytest.raises(SystemExit) as stop:
        run_toy("--base_model", "stopped")
    assert stop.value.code == 130
    printed = capsys.readouterr().err
    assert "kvlab: interrupted (step 3 of 6 is in run/checkpoint.safetensors)." in printed
    assert "Traceback" not in printed
    assert shared.parsed_options == {}


SMALL = "--steps 6 --batch_size 2 --contexts 1 --questions 1 --rank 4 --width 8 --every 0".split()
SMALL = ["distill", "--base_model", "lab-draft", *SMALL, "--output_dir"]


def test_a_command_stopped_by_ctrl_c_goes_on_from_the_step_and_ends_the_same(
    tiny, monkeypatch, capsys
):
    from kvlab import distill

    losses, calls = distill.distillation_losses, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return losses(*args)

    main([*SMALL, "whole"])
    with monkeypatch.context() as patch:
        patch.setattr(distill, "distillation_losses", stopping)
        with pytest.raises(SystemExit) as stop:
            main([*SMALL, "stopped"])
    assert stop.value.code == 130
    assert "step 3 of 6 is in stopped/run-" in capsys.readouterr().err
    monkeypatch.setattr(distill, "distillation_losses", lambda *a: calls.append(1) or losses(*a))
    main([*SMALL, "stopped"])
    assert len(calls) == 6
    whole, stopped = (
        json.loads((tiny / name / "training.json").read_text()) for name in ("whole", "stopped")
    )
    assert [e["loss"] for e in stopped["history"]] == [e["loss"] for e in whole["history"]]
    assert stopped["figures"] == whole["figures"]


@pytest.mark.parametrize("every", [0, 2])
def test_every_is_the_steps_between_checkpoints(every, tiny, monkeypatch):
    from kvlab import distill

    seen = []
    monkeypatch.setattr(distill, "fit", lambda *_, **o: seen.append(o["every"]) or [])
    main([*SMALL, "out", "--every", str(every)])
    assert seen == [every or 6]


def squad_file(path, lengths):
    paragraphs = []
    for n, length in enumerate(lengths):
        context = f"Anna{n} lives in Rome. " * length
        answers = [{"text": "Rome"}]
        qas = [{"question": f"Where does Anna{n} live?", "answers": answers}]
        paragraphs.append({"context": context, "qas": qas})
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))


COMPARE = "eval-compression --base_model lab-draft --methods key_norm --retention 0.5".split()
COMPARE += "--max_new_tokens 2 --data squad --source squad.json --save_results".split()


def test_contexts_longer_than_the_model_reads_are_left_out_and_counted(tiny, capsys):
    squad_file(tiny / "squad.json", [1, 5000, 1, 5000, 1])
    main(COMPARE)
    assert "2 of 5 texts are left out: they have more than the" in capsys.readouterr().out
    (path,) = (tiny / "results").iterdir()
    long = json.loads(path.read_text())
    squad_file(tiny / "squad.json", [5000, 5000])
    with pytest.raises(SystemExit, match="No text is left: all have more than"):
        main(COMPARE)
    assert long["contexts"] == 3
    assert {figure["n"] for figure in long["figures"]} == {3}


def test_results_so_far_are_there_when_a_comparison_is_stopped(tiny, monkeypatch):
    from kvlab.commands.distill import chapter

    squad_file(tiny / "squad.json", [1, 1, 1])
    score, calls = chapter.compression_scores, []

    def stopping(*args, **options) -> pd.DataFrame:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*args, **options)

    monkeypatch.setattr(chapter, "compression_scores", stopping)
    with pytest.raises(SystemExit) as stop:
        main(COMPARE)
    assert stop.value.code == 130
    (path,) = (tiny / "results").iterdir()
    assert json.loads(path.read_text())["contexts"] == 2


def test_prompts_decoded_so_far_are_there_when_decoding_is_stopped(tiny, monkeypatch):
    from kvlab.commands import speculate

    calls = []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 5:  # two to warm up, two for the first prompt
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr(speculate, "generate", stopping)
    with pytest.raises(SystemExit) as stop:
        main("speculate --prompts One? Two? --max_new_tokens 4 --save_results".split())
    assert stop.value.code == 130
    (path,) = (tiny / "results").iterdir()
    assert [row["prompt"] for row in json.loads(path.read_text())["prompts"]] == ["One?"]


def test_flags_stand_alone(tiny, capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--standardize", "--rank", "4", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["standardize"], printed["rank"]) == (True, 4)
    for command in ALL:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "Conditional" not in capsys.readouterr().out


def test_a_model_that_cannot_be_loaded_is_named(tiny):
    (tiny / "file").write_text("")
    (tiny / "empty").mkdir()
    (tiny / "config").mkdir()
    (tiny / "config" / "config.json").write_text("{")
    lab.load_tokenizer("lab-draft").save_pretrained("cut")
    lab.load("lab-draft").save_pretrained("cut")
    weights = tiny / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for name in ("file", "empty", "config", "cut", "./no/such/folder", "a b", "."):
        with pytest.raises(SystemExit, match=f"^kvlab: '{name}' cannot be loaded .*: expected one"):
            main(["speculate", "--teacher_model", "lab-draft", "--base_model", name])


def test_ask_prints_the_stored_answer(tiny, capsys):
    store = ["--store", "store", "--base_model", "lab-draft"]
    main(["build-cache", "--records", write(tiny / "records.jsonl"), *store])
    capsys.readouterr()
    main(["ask", RECORDS[0]["question"], *store, "--exact", "--max_new_tokens", "2"])
    assert f"stored answer: {RECORDS[0]['answer']}" in capsys.readouterr().out
    assert len(KnowledgeCache.load("store", lab.load("lab-draft"), lab.load_tokenizer("lab-draft")))


DEEP = "[" * 100_000


@pytest.mark.parametrize("flags", [["--config", "deep.yaml"], ["--config=deep.yaml"]])
def test_a_configuration_that_is_nested_too_deeply_is_a_sentence(flags, run_toy, tmp_path):
    path = tmp_path / "deep.yaml"
    for text in (f"maps: {DEEP}", f"maps: {DEEP}{DEEP.replace('[', ']')}", "- " * 100_000):
        path.write_text(text)
        with pytest.raises(SystemExit, match=r"^kvlab: .* does not fit: it is nested too deeply\."):
            run_toy(*[flag.replace("deep.yaml", str(path)) for flag in flags])


def test_an_option_that_is_nested_too_deeply_is_a_sentence(run_toy):
    with pytest.raises(SystemExit, match=r"^kvlab: The command line does not fit: it is nested"):
        run_toy("--losses", DEEP)


STOPPED = """
import sys
from kvlab import __main__ as entry

class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "kvlab.cli":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
entry.run()
"""


def test_ctrl_c_while_modules_are_imported_ends_with_130():
    run = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "")


def test_the_command_is_the_module_that_handles_ctrl_c():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"kvlab": "kvlab.__main__:run"}


def test_a_template_without_thinking_refuses_it_before_anything_is_loaded(tiny, nothing_loads):
    with pytest.raises(SystemExit, match="template of lab-target has no enable_thinking: leave it"):
        main(["speculate", "--enable_thinking"])


@pytest.fixture
def thinker(tiny):
    """A folder of a lab model whose template opens an answer with a thought, if it may."""
    lab.load("lab-draft").save_pretrained("thinker")
    tokenizer = lab.load_tokenizer("lab-draft")
    opening = "<|assistant|>{% if enable_thinking %} hmm{% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>", opening)
    assert opening in tokenizer.chat_template
    tokenizer.save_pretrained("thinker")
    return "thinker"


@pytest.mark.parametrize("flags", [[], ["--enable_thinking", "false"], ["--enable_thinking"]])
def test_every_prompt_of_a_command_is_rendered_with_thinking_or_without(
    flags, thinker, tiny, monkeypatch, capsys
):
    prompts = []
    prefill = cache.prefill

    def reading(model, input_ids, *args, **options):
        prompts.extend(map(lab.load_tokenizer("lab-draft").decode, input_ids.tolist()))
        return prefill(model, input_ids, *args, **options)

    for module in (generation, speculate):
        monkeypatch.setattr(module, "prefill", reading)
    few = [*flags, "--max_new_tokens", "2", "--base_model", thinker]
    main(["speculate", "--prompts", "Who?", "--teacher_model", thinker, *few])
    build = ["build-cache", "--records", write(tiny / "records.jsonl"), "--store", "store"]
    main([*build, "--generate_answers", *few])
    main(["ask", "Who?", "--store", "store", "--exact", *few])
    answers = [text for text in prompts if "<|assistant|>" in text]
    assert len(answers) >= 4
    thinks = flags == ["--enable_thinking"]
    assert {"<|assistant|> hmm" in text for text in answers} == {thinks}


def figures_of(*options):
    main([*COMPARE, *options])
    (path,) = Path("results").iterdir()
    figures = json.loads(path.read_text())["figures"]
    path.unlink()
    return {figure["name"]: figure for figure in figures}


def test_unanswerable_questions_are_scored_apart_and_change_nothing_else(tiny):
    squad_file(tiny / "squad.json", [1, 1, 1])
    plain = figures_of()
    rows = json.loads((tiny / "squad.json").read_text())
    for n, paragraph in enumerate(rows["data"][0]["paragraphs"]):
        question = {"question": f"Where is Anna{n}?", "answers": [], "is_impossible": True}
        paragraph["qas"].append(question)
    (tiny / "squad.json").write_text(json.dumps(rows))
    both = figures_of()
    assert not any("Ans" in name for name in plain)
    for score in ("exact", "f1"):
        name = score.replace("exact", "exact_match")
        for arm in ("full, 1", "key_norm, 0.5"):
            has, no = (both[f"{arm}, {group}_{score}"] for group in ("HasAns", "NoAns"))
            assert has["value"] == plain[f"{arm}, {name}"]["value"]
            assert (has["n"], no["n"]) == (3, 3)
            assert both[f"{arm}, {name}"]["value"] == pytest.approx(
                (has["value"] + no["value"]) / 2
            )


def test_unanswerable_questions_are_not_trained_on(tiny, capsys):
    squad_file(tiny / "squad.json", [1, 1, 1, 1])
    rows = json.loads((tiny / "squad.json").read_text())
    rows["data"][0]["paragraphs"][0]["qas"][0]["answers"] = []
    (tiny / "squad.json").write_text(json.dumps(rows))
    main([*SMALL, "out", "--data", "squad", "--source", "squad.json", "--steps", "1"])
    printed = capsys.readouterr().out
    assert "1 of 4 questions are left out: they have no answer." in printed
    assert "Training: 2 examples. Held out: 1 contexts with 1 questions." in printed


def test_compiled_models_decode_as_few_tokens_as_two(tiny, monkeypatch, capsys):
    monkeypatch.setattr("torch.compile", lambda step, **_: step)
    for tokens in ("1", "2", "3"):
        main(["speculate", "--prompts", "One?", "--compiled", "--max_new_tokens", tokens])
        assert "equal_texts          True" in capsys.readouterr().out


def test_one_value_of_a_list_may_stand_alone_in_a_configuration(run_toy, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    for text, prompts in (("One two?", ["One two?"]), ("[a, b]", ["a", "b"])):
        path.write_text(f"prompts: {text}\nmaps: a.json\n")
        got = run_toy("--config", str(path))
        assert (got["prompts"], got["maps"]) == (prompts, ["a.json"])
    path.write_text("prompts: 3\n")
    with pytest.raises(SystemExit):
        run_toy("--config", str(path))
    assert 'key "prompts" element 1' in capsys.readouterr().err


def test_null_in_a_configuration_is_the_default(tiny, capsys):
    (tiny / "mine.yaml").write_text("max_new_tokens: null\nprompts: null\n")
    main(["speculate", "--config", "mine.yaml", "--teacher_model", "lab-draft"])
    assert "equal_texts          True" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["loop", "loop/x", "gone", "gone/x"])
def test_an_output_folder_behind_a_link_that_leads_nowhere_is_a_sentence(
    place, tiny, nothing_loads
):
    (tiny / "loop").symlink_to("loop")
    (tiny / "gone").symlink_to("nowhere")
    with pytest.raises(SystemExit, match=rf"^kvlab: {place}/manifest.json cannot be written \("):
        main(["build-cache", "--store", place])
