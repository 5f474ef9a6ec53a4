"""The command line: speculate."""

import inspect
import re

import pytest
from command_helpers import FEW, result

from kvlab.cli import main
from kvlab.commands.speculate import RULES, speculate
from kvlab.scale import Scale
from kvlab.speculate import Sampling

SOURCE = {
    "prompts": None,
    "max_new_tokens": 256,
    "gamma": 4,
    "base_model": None,
    "teacher_model": None,
    "fuser_checkpoint": None,
    "skip_standard": False,
    "no_prefill_fusion": False,
    "no_decode_fusion": False,
    "save_results": False,
}


def test_speculate_has_the_options_and_defaults_of_the_system_it_follows(capsys):
    parameters = inspect.signature(speculate).parameters
    assert {name: parameters[name].default for name in SOURCE} == SOURCE
    with pytest.raises(SystemExit):
        main(["speculate", "--help"])
    printed = capsys.readouterr().out
    options = [*parameters, *inspect.signature(Sampling).parameters, "config", "print_config"]
    options = [name for name in options if name not in ("options", "generator", "logits_processor")]
    assert all(f"--{name} " in printed for name in options)
    assert "0 takes the most probable token" in printed  # the library's docstring


def test_a_stop_string_ends_both_texts_and_is_cut_off(tmp_path, capsys):
    run = [*FEW, "--prompts", "Anna has 3 apples. How many?", "--output_dir"]
    main([*run, str(tmp_path / "whole")])
    whole = result(tmp_path / "whole", capsys)[0]["prompts"][0]["plain"]
    stop = whole["text"][4:7]
    main([*run, str(tmp_path / "cut"), "--stop", "nowhere", stop, "--min_new_tokens", "2"])
    cut = result(tmp_path / "cut", capsys)[0]["prompts"][0]
    assert cut["plain"]["text"] == whole["text"].partition(stop)[0].strip()
    assert cut["plain"]["token_ids"] == cut["speculative"]["token_ids"]
    assert len(cut["plain"]["token_ids"]) < len(whole["token_ids"])


def test_speculate_writes_all_it_found(tmp_path, capsys):
    prompts = ["Anna has 3 apples. How many?", "Anna lives in [Rome]."]
    main([*FEW, "--prompts", *prompts, "--output_dir", str(tmp_path), "--gamma", "2"])
    found, printed = result(tmp_path, capsys)
    assert re.fullmatch(r"speculate_\d{8}_\d{6}\.json", next(tmp_path.iterdir()).name)
    assert [p["prompt"] for p in found["prompts"]] == prompts
    assert (
        found["settings"] | {"gamma": 2, "max_new_tokens": 12, "teacher_model": "lab-target"}
        == found["settings"]
    )
    assert {"device", "versions", "commit"} <= set(found)
    for prompt in found["prompts"]:
        assert prompt["plain"]["token_ids"] == prompt["speculative"]["token_ids"]
        assert prompt["plain"]["text"] == prompt["speculative"]["text"] != ""
    summary = found["summary"]
    assert summary["equal_texts"] is True
    assert summary["predicted_speedup"] > 0
    assert 0 < summary["speculative"]["draft_calls"] <= 2 * summary["speculative"]["target_calls"]
    shown = "latency ttft tokens_per_second acceptance tokens_per_call draft_calls target_calls"
    assert all(
        name in printed
        for name in f"{shown} c v predicted_speedup measured_speedup best_gamma".split()
    )


def test_speculate_reads_a_config_file(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text(
        f"prompts: [Anna has 3 apples.]\nmax_new_tokens: 5\nskip_standard: true\noutput_dir: {tmp_path}/out\n"
    )
    main(["speculate", "--config", str(tmp_path / "options.yaml"), "--save_results", "true"])
    found, _ = result(tmp_path / "out", capsys)
    assert found["settings"] | {"max_new_tokens": 5, "skip_standard": True} == found["settings"]
    assert "plain" not in found["prompts"][0]
    assert set(found["summary"]) == {"speculative"}


@pytest.mark.parametrize("flags", [["--skip_standard"], ["--skip_standard", "true"]])
def test_a_flag_needs_no_value(flags, tmp_path, capsys):
    main([*FEW, *flags, "--output_dir", str(tmp_path)])
    found, _ = result(tmp_path, capsys)
    assert found["settings"]["skip_standard"] is True
    assert len(found["prompts"]) == 3  # the default ones


def test_a_seed_repeats_what_was_drawn(tmp_path, capsys):
    texts = []
    for name in "ab":
        main([*FEW, "--temperature", "1.5", "--seed", "7", "--output_dir", str(tmp_path / name)])
        found, _ = result(tmp_path / name, capsys)
        assert "equal_texts" not in found["summary"]
        texts.append([prompt["speculative"]["text"] for prompt in found["prompts"]])
    assert texts[0] == texts[1]


def test_one_token_leaves_nothing_to_compare(tmp_path, capsys):
    main([*FEW, "--max_new_tokens", "1", "--output_dir", str(tmp_path)])
    found, _ = result(tmp_path, capsys)
    assert "c" not in found["summary"]
    assert found["summary"]["equal_texts"] is True


def test_compiled_memory_has_room_for_the_longest_prompt(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda step, **_: step)
    prompts = ["Anna has 3 apples. " * 6, "Hello."]
    main([*FEW, "--prompts", *prompts, "--compiled", "--output_dir", str(tmp_path)])
    found, _ = result(tmp_path, capsys)
    assert found["settings"]["compiled"] is True
    assert found["summary"]["equal_texts"] is True


def test_a_draft_with_another_tokenizer_is_translated(tmp_path, capsys):
    main([*FEW, "--base_model", "lab-teacher", "--output_dir", str(tmp_path)])
    found, printed = result(tmp_path, capsys)
    assert found["summary"]["equal_texts"] is True
    assert found["summary"]["speculative"]["acceptance"] > 0.9
    assert "lab-teacher has another tokenizer than lab-target" in printed


@pytest.mark.parametrize("options", [["--compiled"], ["--store", "x"], ["--fuser_checkpoint", "x"]])
def test_other_tokenizers_are_refused_where_both_models_read_the_same_tokens(options, monkeypatch):
    monkeypatch.setattr(Scale, "load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("kvlab.commands.shared.require_store", lambda *_: None)
    monkeypatch.setattr("kvlab.fuse.Fuser.from_pretrained", lambda *_: None)
    reads = r"lab-target has \d+ tokens and reads '( \w+)' as '\1', lab-teacher .* as '.*\|.*'"
    with pytest.raises(SystemExit, match=rf"tokenizers differ \({reads}\): choose one family"):
        main(["speculate", "--base_model", "lab-teacher", *options])


def test_block_verification_is_used_where_it_is_asked_for(tmp_path, capsys, monkeypatch):
    calls = []
    for name, rule in RULES.items():
        spy = lambda *args, name=name, rule=rule: calls.append(name) or rule(*args)
        monkeypatch.setitem(RULES, name, spy)
    for name in RULES:
        run = [*FEW, "--temperature", "1", "--skip_standard", "--verification", name]
        main([*run, "--output_dir", str(tmp_path / name)])
        found, _ = result(tmp_path / name, capsys)
        assert found["settings"]["verification"] == name
        assert {*calls} == {name}
        calls.clear()


def test_an_empty_prompt_file_is_a_sentence(tmp_path):
    (tmp_path / "prompts").write_text("\n")
    with pytest.raises(SystemExit, match=r"prompts does not fit: it is empty"):
        main(["speculate", "--prompt_file", str(tmp_path / "prompts")])
