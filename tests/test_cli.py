"""The command line: subcommands are functions, options their signatures, and a mistake gets a sentence."""

import gc
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from kvlab import align as align_module
from kvlab import compress, lab, similarity, training
from kvlab import draft as drafts
from kvlab import fuse as fuse_module
from kvlab.cache import from_tensor, to_tensor
from kvlab.cli import (
    ALIGNMENTS,
    AWARE,
    Problems,
    alignment_figures,
    ask,
    build_cache,
    compare_alignments,
    compression_figures,
    compression_scores,
    distill,
    eval_compression,
    main,
    map_layers,
    solved,
    speculate,
    train_aligned,
    train_draft,
    train_fuser,
)
from kvlab.compress import KVDistiller
from kvlab.draft import KnowledgeDraft
from kvlab.evaluate import (
    answers,
    encode,
    exact_match,
    log_likelihoods,
    multiple_choice,
    perplexity,
)
from kvlab.fuse import Fuser, Settings, Size
from kvlab.knowledge import KnowledgeCache
from kvlab.lab import corpora
from kvlab.lab.report import problems
from kvlab.records import Record, messages, read_records
from kvlab.scale import PRESETS, Scale
from kvlab.speculate import FusedProposer, ModelProposer, Sampling, generate, summarize


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


# -- speculate

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
FEW = ["speculate", "--max_new_tokens", "12", "--save_results"]


def result(folder, capsys):
    """What the one result file says, and what was printed."""
    (path,) = folder.iterdir()
    printed = capsys.readouterr().out
    assert str(path) in printed
    return json.loads(path.read_text(), parse_constant=pytest.fail), printed


def test_speculate_has_the_options_and_defaults_of_the_system_it_follows(capsys):
    parameters = inspect.signature(speculate).parameters
    assert {name: parameters[name].default for name in SOURCE} == SOURCE
    with pytest.raises(SystemExit):
        main(["speculate", "--help"])
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in [*parameters, "config"])
    told = inspect.getdoc(speculate).split("Args:")[1]
    assert all(f"{name}: " in told for name in parameters)


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
    assert summary["speculative"]["draft_calls"] == 2 * summary["speculative"]["target_calls"]
    shown = "latency first_token_seconds tokens_per_second acceptance tokens_per_call draft_calls target_calls"
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


def test_models_with_other_tokenizers_are_refused(monkeypatch):
    monkeypatch.setattr(Scale, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(
        SystemExit, match=r"tokenizers differ .lab-target has \d+ tokens, lab-teacher \d+"
    ):
        main(["speculate", "--base_model", "lab-teacher"])


def test_an_empty_prompt_file_is_a_sentence(tmp_path):
    (tmp_path / "prompts").write_text("\n")
    with pytest.raises(SystemExit, match=r"is empty, expected one prompt a line"):
        main(["speculate", "--prompt_file", str(tmp_path / "prompts")])


# -- build-cache and ask

RECORDS = [
    {"question": "Where does Anna live?", "answer": "Anna lives in Rome.", "domain": "people"},
    {"question": "Who has a dog?", "answer": "Ben has a dog.", "domain": "pets"},
]


def write(path, records=RECORDS):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def opened(folder, with_embedder=True):
    embedder = lab.load_embedder() if with_embedder else None
    return KnowledgeCache.load(
        folder, lab.load("lab-draft"), lab.load_tokenizer("lab-draft"), embedder
    )


@pytest.fixture
def build(tmp_path, monkeypatch, capsys):
    """Return a function that runs build-cache on records, for the small lab model, and returns what it printed."""
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    monkeypatch.chdir(tmp_path)

    def run(records, *options):
        path = write(tmp_path / "records.jsonl", records)
        main(["build-cache", "--records", path, "--base_model", "lab-draft", *options])
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the folder of a store of the lab's FAQ, read by its target, with a store a domain beside it."""
    folder = tmp_path_factory.mktemp("built") / "knowledge"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVLAB_SCALE", "tiny")
        main(["build-cache", "--store", str(folder), "--per-domain"])
    return folder


@pytest.fixture
def answered(monkeypatch, capsys):
    """Return a function that runs ask and returns, for each question, what was found and the rows of its table."""
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    columns = re.compile(r"^([a-z ]+?) +([\d.]+) +(\d+) +([\d.]+)$", re.MULTILINE)

    def run(folder, *arguments):
        main(["ask", *arguments, "--store", str(folder)])
        parts = capsys.readouterr().out.strip().split("\n\n")
        found = [[line.strip() for line in part.splitlines() if line.startswith("    ") and "ms" not in line]
                 for part in parts]  # fmt: skip
        rows = []
        for part in parts:
            numbers, texts = (
                columns.findall(part),
                dict(re.findall(r"^([a-z][a-z ]+): ?(.*)$", part, re.MULTILINE)),
            )
            assert [way for way, *_ in numbers] == list(texts)
            rows.append(
                {
                    way: (float(ms), int(read), float(mb), texts[way])
                    for way, ms, read, mb in numbers
                }
            )
        return list(zip(found, rows, strict=True))

    return run


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("build-cache", build_cache),
        ("ask", ask),
        ("train-draft", train_draft),
        ("distill", distill),
        ("eval-compression", eval_compression),
        ("layer-map", map_layers),
        ("train-aligned", train_aligned),
        ("compare-alignments", compare_alignments),
        ("train-fuser", train_fuser),
    ],
)
def test_help_of_a_command_tells_every_option(name, command, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"\n    {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([name, "--help"])
    printed, told = capsys.readouterr().out, inspect.getdoc(command).split("Args:")[1]
    options = list(inspect.signature(command).parameters)
    assert all(f"{option}: " in told for option in options)
    assert all(f"--{option}" in printed for option in options if option != "questions")


def test_the_lab_has_seven_domains_and_eight_stores(built):
    stores = sorted(path.name for path in built.parent.iterdir())
    domains = {item["domain"] for item in lab.faq()}
    assert stores == ["knowledge", *(f"knowledge-{name}" for name in sorted(domains))]
    assert len(stores) == 8
    model, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
    whole, *parts = (KnowledgeCache.load(built.parent / name, model, tokenizer) for name in stores)
    assert len(whole) == len(lab.faq())
    assert {part.folder.name: {item.domain for item in part.items} for part in parts} == {
        f"knowledge-{name}": {name} for name in domains
    }
    assert sorted(item.id for part in parts for item in part.items) == sorted(
        item.id for item in whole.items
    )


def test_building_again_adds_what_is_new_also_to_the_domains(build, tmp_path):
    more = {"question": "Who sings?", "answer": "Clara sings.", "domain": "people"}
    assert "2 items are new, 0 were there" in build(RECORDS, "--per-domain")
    manifest = tmp_path / "knowledge-pets" / "manifest.json"
    before = manifest.stat()
    assert "0 items are new, 2 were there" in build(RECORDS, "--per-domain")
    assert (manifest.stat().st_ino, manifest.stat().st_mtime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
    )
    printed = build([*RECORDS, more], "--per-domain")
    assert "1 items are new, 2 were there" in printed
    assert "knowledge-people: 2 items" in printed
    assert "knowledge-pets: 1 items" in printed
    assert [item.question for item in opened(tmp_path / "knowledge-people").items] == [
        "Where does Anna live?",
        "Who sings?",
    ]


def test_the_estimate_is_printed_before_and_is_what_it_takes(build, tmp_path):
    printed = build(RECORDS, "--keep", "kv", "hidden", "--dtype", "float16")
    said = re.match(r"knowledge has 0 items. Of 2 records, .* will take ([\d.]+) MB", printed)
    store = opened(tmp_path / "knowledge")
    assert (store.keep, str(store.dtype)) == (("kv", "hidden"), "torch.float16")
    taken = float(store.summary().loc["all", "size (MB)"])
    assert float(said[1]) == pytest.approx(taken, abs=0.06)
    assert taken > 0.01


def test_a_domain_of_any_text_gets_a_folder_of_its_own(build, tmp_path):
    domains = ["../a", "..%2Fa", "a b", "人", ""]
    records = [
        {"question": f"Q{n}?", "answer": "A.", **({"domain": domain} if domain else {})}
        for n, domain in enumerate(domains)
    ]
    build(records, "--per-domain")
    build(records, "--per-domain")
    folders = list(tmp_path.glob("knowledge-*"))
    assert {item.domain for folder in folders for item in opened(folder, False).items} == set(
        domains
    )
    assert len(folders) == len(domains)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "knowledge",
        *(f.name for f in folders),
    }


def test_a_folder_in_the_way_is_left_alone(build, tmp_path):
    folder = tmp_path / "knowledge-pets"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(
        SystemExit, match=r"^kvlab: .*knowledge-pets holds \['notes.txt'\] and no store"
    ):
        build(RECORDS, "--per-domain")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_items_that_a_domain_has_already_stay(build, tmp_path):
    build(RECORDS, "--per-domain")
    opened(tmp_path / "knowledge-pets").add(
        [{"question": "Who has a cat?", "answer": "Dora.", "domain": "pets"}]
    )
    assert "knowledge-pets: 2 items" in build(RECORDS, "--per-domain")


def test_generated_answers_are_the_models_own(build, tmp_path):
    questions = [{"question": record["question"]} for record in RECORDS]
    printed = build(questions, "--generate-answers", "--max_new_tokens", "5")
    assert "will take at most" in printed
    items = opened(tmp_path / "knowledge").items
    assert [item.generated for item in items] == [True, True]
    assert all(len(item.input_ids) - item.answer_start <= 5 for item in items)
    assert "0 items are new, 2 were there" in build(questions, "--generate_answers")


def test_of_two_processes_one_prints(tmp_path):
    path = write(tmp_path / "records.jsonl", RECORDS)
    command = ["build-cache", "--records", path, "--base_model", "lab-draft", "--per-domain"]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "kvlab.cli",
    ]
    setting = os.environ | {"KVLAB_SCALE": "tiny", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *command], cwd=tmp_path, env=setting, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 items are new, 0 were there") == 1
    assert done.stdout.count("knowledge-pets: 1 items") == 1
    assert len(opened(tmp_path / "knowledge")) == 2


def test_records_of_the_chatterbot_corpus(build, tmp_path):
    corpus = {"categories": ["bingo"], "conversations": [["Two little ducks?", "22", "Quack."]]}
    (tmp_path / "bingo.yml").write_text(yaml.safe_dump(corpus))
    main(["build-cache", "--records", str(tmp_path / "bingo.yml"), "--base_model", "lab-draft"])
    assert [(i.domain, i.answer) for i in opened(tmp_path / "knowledge").items] == [
        ("bingo", "22"),
        ("bingo", "Quack."),
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dtype", "float12"], "dtype is 'float12', expected the name of one, such as float16"),
        (["--dtype", "nn"], "dtype is 'nn', expected the name of one"),
        (["--dtype", "int8"], "dtype is torch.int8, expected a floating one"),
        (["--keep", "keys"], r"keep is \['keys'\], expected a list of one or both"),
        (["--records", "none.jsonl"], ".*No such file or directory: 'none.jsonl'"),
        (["--language", "fr"], "There is no FAQ in 'fr': expected 'en' or 'zh'"),
    ],
)
def test_a_mistake_in_building_is_a_sentence(options, said, monkeypatch, tmp_path):
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^kvlab: {said}"):
        main(["build-cache", "--base_model", "lab-draft", *options])
    assert not (tmp_path / "knowledge").exists()


def test_records_without_answers_need_the_model_to_answer(build):
    with pytest.raises(SystemExit, match=r"^kvlab: Record 0 has 'answer' = None, expected a text"):
        build([{"question": "Who?"}])


def test_a_stored_question_is_answered_from_one_token(answered, built):
    item = lab.faq()[0]
    ((found, rows),) = answered(built, item["question"])
    assert found == [f"found: {item['question']} (domain {item['domain']}, score 1.00)"]
    assert list(rows) == [
        "question alone",
        "knowledge as text",
        "knowledge from the store",
        "the stored question itself",
    ]
    read = {way: tokens for way, (_, tokens, _, _) in rows.items()}
    loaded = {way: size for way, (_, _, size, _) in rows.items()}
    assert read["the stored question itself"] == 1
    assert read["knowledge from the store"] == read["question alone"] < read["knowledge as text"]
    assert loaded["question alone"] == loaded["knowledge as text"] == 0
    assert loaded["knowledge from the store"] == loaded["the stored question itself"] > 0
    texts = {way: text for way, (*_, text) in rows.items()}
    assert texts["the stored question itself"] == texts["question alone"] == item["answer"]
    assert (
        texts["knowledge from the store"] == texts["knowledge as text"]
    )  # one item: no arm approximates
    assert all(ms > 0 for ms, *_ in rows.values())


@pytest.mark.parametrize("arm", ["full", "prefix", "recompute", "concat", "shift"])
def test_tokens_read_are_those_the_model_reads(arm, answered, built, monkeypatch):
    seen, load = [], Scale.load

    def watched(scale, role):
        model = load(scale, role)
        model.base_model.layers[0].register_forward_pre_hook(
            lambda _, given: seen.append(given[0].shape[1])
        )
        return model

    monkeypatch.setattr(Scale, "load", watched)
    options = ["--k", "2", "--threshold", "-1", "--max_new_tokens", "1"]
    ((found, rows),) = answered(built, lab.faq()[0]["question"], "--arm", arm, *options)
    read = {way: tokens for way, (_, tokens, _, _) in rows.items()}
    first, second = (len(item.input_ids) for item in _items(built, found))
    again = (
        round(0.15 * second) if arm == "recompute" else 0
    )  # these go through the first layers twice
    assert sum(seen) == 5 * (
        sum(read.values()) + again
    )  # 4 runs for the time, and one for the answer
    assert read["knowledge as text"] == first + second + read["question alone"]


def _items(folder, found):
    store = KnowledgeCache.load(folder, lab.load("lab-target"), lab.load_tokenizer("lab-target"))
    return [next(item for item in store.items if f" {item.question} (" in line) for line in found]


def test_a_miss_is_told_and_gets_one_row(answered, built):
    known = lab.faq()[0]["question"]
    (found, rows), (_, more) = answered(
        built, "qq zz?", known, "--threshold", "0.999", "--max_new_tokens", "2"
    )
    assert found == ["not in the store: nothing scores 0.999"]
    assert list(rows) == ["question alone"]
    assert len(more) == 4
    ((found, rows),) = answered(built, "qq zz?", "--exact", "--max_new_tokens", "2")
    assert found == ["not in the store: no item has this question"]
    assert list(rows) == ["question alone"]


def test_exact_needs_no_embedder(answered, built, monkeypatch):
    monkeypatch.setattr(Scale, "load_embedder", lambda *_: pytest.fail("loaded"))
    item = lab.faq()[0]
    ((found, _),) = answered(
        built, f"  {item['question'].upper()}", "--exact", "--max_new_tokens", "1"
    )
    assert found == [f"found: {item['question']} (domain {item['domain']}, score 1.00)"]


def test_asking_without_a_store_says_how_to_build_one(monkeypatch, tmp_path):
    monkeypatch.setattr(Scale, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(
        SystemExit,
        match=r"^kvlab: There is no store in .*: build one with `kvlab build-cache --store",
    ):
        main(["ask", "Who?", "--store", str(tmp_path / "none")])


def test_a_mistake_in_asking_is_a_sentence(built, build, tmp_path):
    build(RECORDS, "--keep", "hidden", "--store", "hidden")
    with pytest.raises(SystemExit, match=r"^kvlab: The store in .* keeps no keys and values"):
        main(["ask", "Who?", "--store", str(tmp_path / "hidden"), "--base_model", "lab-draft"])
    for options, said in (
        (["--domain", "art"], "There is no domain 'art' in .*: .*'ai', 'biology'"),
        (["--k", "0"], "k is 0, expected a whole number from 1"),
        (["--base_model", "lab-draft"], "The store in .* was built with another model"),
    ):
        with pytest.raises(SystemExit, match=f"^kvlab: {said}"):
            main(["ask", "Who?", "--store", str(built), *options])


# -- train-draft

FACTS = [
    {"question": f"{who} what?", "answer": f"{who} has a {thing} and lives in {city}.", "domain": "people"}
    for who, thing, city in [
        ("Anna", "dog", "Rome"), ("Ben", "cat", "Paris"), ("Clara", "horse", "Oslo"),
        ("Dora", "fish", "Bern"), ("Emil", "bird", "Wien"), ("Fritz", "mouse", "Prag"),
    ]
]  # fmt: skip
QUICK = [
    "--base_model",
    "lab-draft",
    "--layers",
    "first:1",
    "--epochs",
    "2",
    "--batch_size",
    "4",
    "--max_new_tokens",
]
QUICK += ["12", "--made_up", "4"]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Return the folder of a small store that keeps both keys and values and hidden states."""
    folder = tmp_path_factory.mktemp("facts")
    path = write(folder / "records.jsonl", FACTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVLAB_SCALE", "tiny")
        keep = ["--keep", "kv", "hidden"]
        main(
            [
                "build-cache",
                "--records",
                path,
                "--base_model",
                "lab-draft",
                "--store",
                str(folder / "both"),
                *keep,
            ]
        )
        main(
            [
                "build-cache",
                "--records",
                path,
                "--base_model",
                "lab-draft",
                "--store",
                str(folder / "kv"),
            ]
        )
    return folder / "both"


@pytest.fixture
def learn(facts, tmp_path, monkeypatch, capsys):
    """Return a function that runs train-draft into a folder of tmp_path, and returns the folder and what it wrote."""
    monkeypatch.setenv("KVLAB_SCALE", "tiny")

    def run(name, *options):
        main(
            [
                "train-draft",
                "--store",
                str(facts),
                "--output_dir",
                str(tmp_path / name),
                *QUICK,
                *options,
            ]
        )
        told = json.loads(
            (tmp_path / name / "training.json").read_text(), parse_constant=pytest.fail
        )
        return tmp_path / name, told | {"printed": capsys.readouterr().out}

    return run


@pytest.fixture
def lessons(learn, monkeypatch):
    """Return a function that runs train-draft up to its training, and returns what `draft.train` would have got."""

    def run(*options):
        got = []
        monkeypatch.setattr(
            drafts,
            "train",
            lambda *args, **more: got.append((*args, more)) or pytest.skip("trained"),
        )
        with pytest.raises(pytest.skip.Exception):
            learn("lessons", *options)
        ((draft, _, examples, heldout, more),) = got
        return draft, examples, heldout, more

    return run


def prompt_of(example):
    text = lab.load_tokenizer("lab-draft").decode(example.input_ids[: example.start])
    return re.search(r"<\|user\|> (.*)<\|assistant\|>", text)[1]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_what_is_saved_is_what_was_measured(learn, facts):
    folder, told = learn("draft", "--heldout", "0.4")
    names = [figure["name"] for figure in told["figures"]]
    arms = ("truncated", "trained", "trained, without knowledge")
    assert names == [f"{arm}, {way}" for arm in arms for way in ("greedy", "sampled")]
    assert all(
        f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" in told["printed"]
        for f in told["figures"]
    )
    assert {"settings", "history", "parameters", "device", "versions", "commit"} <= set(told)
    settings = {
        "learning_rate": 1e-3,
        "base_model": "lab-draft",
        "losses": {"ce": 1.0, "kl": 0.8, "tv": 0.3},
    }
    assert told["settings"] | settings == told["settings"]

    store, tokenizer = opened(facts), lab.load_tokenizer("lab-draft")
    draft = AutoModelForCausalLM.from_pretrained(folder)
    items = [
        next(item for item in store if item.question == question) for question in told["heldout"]
    ]
    prompts = [list(item.input_ids[: item.answer_start]) for item in items]
    said = drafts.listen(store.model, tokenizer, prompts, max_new_tokens=12)
    cut = KnowledgeDraft.cut(store.model, "first:1")
    expected = [*drafts.acceptance(cut, store.model, said)]
    expected += drafts.acceptance(draft, store.model, drafts.attach(draft, store, said, items))
    expected += drafts.acceptance(draft, store.model, said)
    assert [f["value"] for f in told["figures"]] == pytest.approx(
        [values.mean() for values in expected]
    )
    assert told["parameters"] == {
        "draft": draft.num_parameters(),
        "target": store.model.num_parameters(),
    }
    assert draft.readers[0].gate.item() != 0
    assert not (folder / "plain").exists()


def test_a_draft_that_was_killed_goes_on_and_ends_the_same(learn, tmp_path, monkeypatch):
    whole, _ = learn("whole")
    save, fit, steps = training._save, training.fit, []

    def killed(*state):
        save(*state)
        raise KeyboardInterrupt

    def counted(model, loader, losses, **options):
        return fit(model, loader, lambda *batch: steps.append(1) or losses(*batch), **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", killed)
        with pytest.raises(KeyboardInterrupt):
            learn("killed")
    assert not (tmp_path / "killed" / "training.json").exists()
    monkeypatch.setattr(drafts, "fit", counted)
    monkeypatch.setattr(
        drafts, "continuations", lambda *_: pytest.fail("the model was asked again")
    )
    again, told = learn("killed")
    assert 0 < len(steps) < len(told["history"])
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(whole).items())
    learn("killed", "--losses.ce", "1")  # nothing of a checkpoint that was made with other losses
    assert len(steps) > len(told["history"])


def test_held_out_questions_are_not_learned_from(lessons):
    draft, examples, heldout, options = lessons("--heldout", "0.3", "--seed", "3")
    assert draft.config.knowledge == "kv"
    asked, held = (
        [prompt_of(example) for example in examples],
        [prompt_of(example) for example in heldout],
    )
    assert len(held) == 2
    assert {*held} < {record["question"] for record in FACTS}
    rest = {record["question"] for record in FACTS} - {*held}
    made_up = [record["question"] for record in corpora.made_up(4)]
    assert sorted(asked) == sorted([*rest, *rest, *made_up])
    own = [example.hidden_states is not None for example in examples]
    assert sum(own) == len(rest)
    assert all(
        example.hidden_states is not None and example.known is not None for example in heldout
    )
    assert all(e.known is not None for e in examples if prompt_of(e) in made_up)
    assert options["seed"] == 3


def test_questions_of_a_file_are_held_out_and_other_prompts_have_no_knowledge(lessons, tmp_path):
    (tmp_path / "questions").write_text("Anna, what?\nzz qq\nBen what?\n")
    (tmp_path / "others").write_text("1+1\n")
    files = [
        "--questions",
        str(tmp_path / "questions"),
        "--other_prompts",
        str(tmp_path / "others"),
    ]
    _, examples, heldout, _ = lessons(*files, "--heldout", "0.99", "--threshold", "0.6")
    knows = {prompt_of(example): example.known is not None for example in heldout}
    assert knows == {"Anna, what?": True, "Ben what?": True, "zz qq": False}
    asked = [prompt_of(example) for example in examples]
    assert asked.count("Anna what?") == 2  # the model's answer, and the one that was given
    assert "Ben what?" not in asked
    assert [example.known for example in examples if prompt_of(example) == "1+1"] == [None]


def test_a_draft_that_does_not_read_needs_neither_embedder_nor_made_up_records(
    lessons, monkeypatch
):
    monkeypatch.setattr(Scale, "load_embedder", lambda *_: pytest.fail("loaded"))
    draft, examples, heldout, options = lessons("--knowledge", "none", "--transitions")
    assert draft.config.knowledge is None
    assert draft.config.transitions is True
    assert all(example.known is None for example in [*examples, *heldout])
    assert {prompt_of(example) for example in examples} < {record["question"] for record in FACTS}
    assert options["shares"] == {"ce": 1.0, "kl": 0.5, "tv": 0.3}


def test_without_cross_entropy_only_the_models_own_answers_are_learned_from(lessons):
    _, examples, _, options = lessons("--losses.kl", "0.5")
    assert all(example.hidden_states is not None for example in examples)
    assert len(examples) == len(FACTS) - 1
    assert options["shares"] == {"kl": 0.5}


@pytest.mark.parametrize("way", ["none", "prefix"])
def test_a_plain_model_is_also_written_as_one(way, learn):
    folder, told = learn("draft", "--knowledge", way)
    assert ("trained, without knowledge, greedy" in {f["name"] for f in told["figures"]}) == (
        way == "prefix"
    )
    draft, plain = (
        AutoModelForCausalLM.from_pretrained(path) for path in (folder, folder / "plain")
    )
    ids = torch.arange(8)[None]
    assert type(plain) is type(lab.load("lab-draft"))
    assert torch.equal(draft(ids).logits, plain(ids).logits)
    assert plain.config.vocab_size == lab.load("lab-draft").config.vocab_size


def test_train_draft_reads_a_config_file_with_a_mapping(lessons, tmp_path):
    text = "knowledge: vector\nlayers: [1]\nlosses: {lk_hybrid: 1, ce: 0.5}\nlearning_rate: 0.01\nmade_up: 2\n"
    (tmp_path / "options.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys.modules[__name__], "QUICK", ["--base_model", "lab-draft", "--max_new_tokens", "12"]
        )
        draft, examples, _, options = lessons(
            "--config", str(tmp_path / "options.yaml"), "--losses.ce", "0.25"
        )
    assert (draft.config.knowledge, draft.config.layers) == ("vector", [1])
    assert options["shares"] == {"lk_hybrid": 1.0, "ce": 0.25}
    assert (options["learning_rate"], options["epochs"], options["batch_size"]) == (0.01, 5, 8)
    assert len(examples) == 2 * (len(FACTS) - 1) + 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--store", "none"],
            "There is no store in none: build one with .*--store none --keep kv hidden`",
        ),
        (
            ["--knowledge", "vector"],
            "The store in .* keeps no hidden states: build one with --keep hidden",
        ),
        (["--base_model", "lab-target"], "The store in .* was built with another model"),
        (["--losses.lk", "1"], r"There is no loss \['lk'\]; expected one or more of ce, kl"),
        (["--losses", "{}"], r"There is no loss \{\}; expected one or more of ce, kl"),
        (["--heldout", "1"], "heldout is 1.0, expected a share between 0 and 1"),
        (["--heldout", "0.95"], "There are 6 questions, 6 to hold out"),
        (["--layers", "first:5"], "layers is 'first:5', expected"),
        (["--max_new_tokens", "1"], "max_new_tokens is 1, expected at least 2"),
        (["--other_prompts", "nothing"], ".*No such file or directory: 'nothing'"),
    ],
)
def test_a_mistake_in_training_is_a_sentence_before_any_work(
    options, said, facts, tmp_path, monkeypatch
):
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drafts, "listen", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(SystemExit, match=f"^kvlab: {said}"):
        main(["train-draft", "--store", str(facts.with_name("kv")), *QUICK, *options])
    assert not list(tmp_path.iterdir())


def test_too_few_examples_for_a_step_are_a_sentence(learn):
    with pytest.raises(SystemExit, match=r"^kvlab: 14 examples are less than a step of 64"):
        learn("draft", "--batch_size", "64")


@pytest.mark.parametrize("way", ["vector", "kv", "prefix"])
def test_speculate_gives_a_draft_what_the_store_has(
    way, learn, facts, tmp_path, capsys, monkeypatch
):
    folder, _ = learn("draft", "--knowledge", way, "--epochs", "1")
    known, knowing = [], KnowledgeDraft.knowing

    def watched(draft, store, items, starts):
        known.append((items[0] and items[0].question, starts[0]))
        return knowing(draft, store, items, starts)

    monkeypatch.setattr(KnowledgeDraft, "knowing", watched)
    asked = ["Clara what?", "zz qq"]
    models = ["--base_model", str(folder), "--teacher_model", "lab-draft", "--prompts", *asked]
    main(
        [
            *FEW,
            *models,
            "--store",
            str(facts),
            "--threshold",
            "0.6",
            "--output_dir",
            str(tmp_path / "with"),
        ]
    )
    found, printed = result(tmp_path / "with", capsys)
    starts = [
        len(encode(lab.load_tokenizer("lab-draft"), [{"role": "user", "content": text}]))
        for text in asked
    ]
    assert {*known} == {("Clara what?", starts[0]), (None, starts[1])}
    assert [prompt["found"] for prompt in found["prompts"]] == ["Clara what?", None]
    assert "knows: Clara what?\n" in printed
    assert "knows: nothing\n" in printed
    assert found["summary"]["equal_texts"] is True
    assert found["summary"]["found"] == 1
    assert found["summary"]["finding_seconds"] > 0

    main([*FEW, *models, "--output_dir", str(tmp_path / "without")])
    without, printed = result(tmp_path / "without", capsys)
    assert len(known) == 1 + len(asked)  # to warm up, and for each prompt; none in the second run
    assert "knows" not in printed
    assert "found" not in without["prompts"][0]
    texts = [
        [prompt["plain"]["token_ids"] for prompt in run["prompts"]] for run in (found, without)
    ]
    assert texts[0] == texts[1]
    guessed = [
        [prompt["speculative"]["conditional"] for prompt in run["prompts"]]
        for run in (found, without)
    ]
    assert guessed[0][1] == guessed[1][1]  # where nothing was found it drafts the same


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--store", "none"], "There is no store in none"),
        (
            ["--compiled"],
            "What a draft knows differs from prompt to prompt: leave --compiled out, or --store",
        ),
        ([], "lab-draft does not read knowledge: leave --store out, or give a draft"),
    ],
)
def test_a_store_that_speculate_cannot_use_is_a_sentence(options, said, facts, monkeypatch):
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    with pytest.raises(SystemExit, match=f"^kvlab: {said}"):
        main([*FEW, "--store", str(facts), *options])


# -- distill and eval-compression

FEW_STEPS = [
    "--base_model",
    "lab-draft",
    "--steps",
    "2",
    "--batch_size",
    "2",
    "--rank",
    "4",
    "--width",
    "16",
]
TWO = ["--contexts", "2", "--questions", "2"]
FEW_STEPS += TWO
PEOPLE = {
    "Anna": "Rome",
    "Ben": "Paris",
    "Clara": "Oslo",
    "Dora": "Bern",
    "Emil": "Wien",
    "Fritz": "Prag",
}
TAUGHT, COMPARED, SQUAD = (
    ["distill", *FEW_STEPS],
    ["eval-compression"],
    ["--data", "squad", "--source", "squad.json"],
)
PUBLISHED = Path(__file__).parents[2] / "shared/data"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def squad(tiny):
    """Return a file in SQuAD's form: six contexts, with one to three questions, of several answers."""
    paragraphs = []
    for n, (who, city) in enumerate(PEOPLE.items()):
        asked = [
            (f"Where does {who} live?", [f"in {city}", city]),
            (f"Who has {n} dogs?", [who]),
            ("Who?", [who]),
        ]
        qas = [
            {"question": q, "answers": [{"text": text} for text in texts]}
            for q, texts in asked[: n % 3 + 1]
        ]
        paragraphs.append({"context": f"{who} lives in {city}. {who} has {n} dogs.", "qas": qas})
    (tiny / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return "squad.json"


@pytest.fixture
def trained(tiny, capsys):
    """Return a function that runs a command that trains into a folder, and returns what it wrote and printed."""

    def run(command, name, *options):
        main([*command, "--output_dir", name, *options])
        told = json.loads((tiny / name / "training.json").read_text(), parse_constant=pytest.fail)
        return told | {"printed": capsys.readouterr().out}

    return run


@pytest.fixture
def shrink(trained):
    """Return a function that runs distill."""
    return partial(trained, TAUGHT)


@pytest.fixture
def taught(shrink, monkeypatch):
    """Return a function that runs distill up to its training, and returns what `compress.train` would have got."""

    def run(*options):
        got = []
        with monkeypatch.context() as patch:
            patch.setattr(
                compress,
                "train",
                lambda *args, **more: got.append((*args, more)) or pytest.skip("trained"),
            )
            with pytest.raises(pytest.skip.Exception):
                shrink("taught", *options)
        return got[0]

    return run


@pytest.fixture
def measured(tiny, capsys):
    """Return a function that runs eval-compression, and returns what it wrote and the tables it printed by title."""

    def run(*options):
        folder = tiny / "results"
        main(
            [
                *COMPARED,
                "--base_model",
                "lab-draft",
                "--save_results",
                "--output_dir",
                str(folder),
                *options,
            ]
        )
        (path,) = folder.iterdir()
        told, printed = result(folder, capsys)
        path.unlink()
        first, *parts = printed.removesuffix(f"{path}\n").split("\n\n")
        return told, {part.split(" (")[0]: part for part in parts} | {"first": first}, path.name

    return run


def read(model, contexts, *arguments, **options):
    return compression_scores(
        lab.load(model), lab.load_tokenizer(model), contexts, *arguments, **options
    )


def passages(n, questions):
    readings = corpora.Readings(n, questions=questions, test=True)
    return [
        [Record(text, question, (answer,)) for question, answer in turns]
        for text, turns in readings
    ]


def rows_of(table):
    """The method and share of each row of a printed table."""
    names = [re.match(r"(\w*) +([\d.]+) ", line) for line in table.splitlines()[3:]]
    method, rows = "", []
    for name in filter(None, names):
        method = name[1] or method
        rows.append((method, float(name[2])))
    return rows


def test_a_distiller_is_saved_and_measured_on_test_passages(shrink, tiny):
    told = shrink("distiller")
    names = [(f["method"], f["retention"]) for f in told["figures"] if f["score"] == "exact_match"]
    assert names == [("full", 1.0), ("distill", 0.5), ("distill", 0.25), ("distill", 0.1)]
    settings = {
        "learning_rate": 1e-3,
        "retention": [0.03, 0.8],
        "sinks": 1,
        "row": 1536,
        "layer": 1,
        "rank": 4,
    }
    assert (
        told["settings"] | settings | {"base_model": "lab-draft", "gate": "multiply"}
        == told["settings"]
    )
    assert [entry["step"] for entry in told["history"]] == [1, 2]
    assert {"device", "versions", "commit"} <= set(told)
    shown = [f for f in told["figures"] if f["score"] in ("exact_match", "f1")]
    assert all(
        f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" in told["printed"] for f in shown
    )

    distiller = KVDistiller.from_pretrained(tiny / "distiller", lab.load("lab-draft"))
    assert distiller.settings.sinks == 1
    assert any(
        p.abs().sum() > 0 for name, p in distiller.named_parameters() if "lora_B" in name
    )  # it was trained
    again = read("lab-draft", passages(2, 2), ["distill"], [0.5, 0.25, 0.1], distiller=distiller)
    assert [f["value"] for f in compression_figures(again)] == pytest.approx(
        [f["value"] for f in told["figures"]]
    )


def test_a_distiller_that_was_killed_goes_on_and_ends_the_same(shrink, tiny, squad, monkeypatch):
    options = [*SQUAD, "--steps", "3"]
    shrink("whole", *options)
    save, fit, steps = training._save, training.fit, []

    def killed(*state):
        save(*state)
        raise KeyboardInterrupt

    def often(*args, **more):
        return fit(*args, **more | {"every": 2})

    def counted(model, loader, losses, **more):
        return fit(model, loader, lambda *batch: steps.append(1) or losses(*batch), **more)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", killed)
        patch.setattr(compress, "fit", often)
        with pytest.raises(KeyboardInterrupt):
            shrink("killed", *options)
    assert not (tiny / "killed" / "training.json").exists()
    monkeypatch.setattr(compress, "fit", counted)
    shrink("killed", *options)
    assert len(steps) == 1
    whole, again = (
        KVDistiller.from_pretrained(tiny / n, lab.load("lab-draft")) for n in ("whole", "killed")
    )
    mine = dict(again.named_parameters())
    assert all(torch.equal(p, mine[name]) for name, p in whole.named_parameters())
    for other in (
        ["--instruction", "0.5"],
        ["--heldout", "0.5"],
        ["--routing", "all"],
        ["--forward_share", "1"],
    ):
        del steps[:]
        shrink("killed", *options, *other)  # nothing of a checkpoint that was made otherwise
        assert len(steps) == 3


def test_held_out_contexts_are_not_learned_from(taught, shrink, squad, monkeypatch):
    options = [*SQUAD, "--heldout", "0.3", "--contexts", "1", "--seed", "4"]
    distiller, examples, more = taught(
        *options, "--gate", "none", "--layer", "2", "--batch_size", "3"
    )
    assert (
        distiller.settings.gate,
        distiller.settings.layer,
        more["batch_size"],
        more["seed"],
    ) == ("none", 2, 3, 4)
    learned = {context for context, _ in examples.readings}
    whole = {record.context for record in read_records("squad", squad)}
    assert len(whole - learned) == 2
    turns = [(context, *turn) for context, turns in examples.readings for turn in turns]
    asked = [
        (r.context, r.question, r.answer)
        for r in read_records("squad", squad)
        if r.context in learned
    ]
    assert turns == asked
    assert {len(turns) for _, turns in examples.readings} == {
        1,
        2,
    }  # three questions are two examples

    seen = []
    monkeypatch.setattr(
        "kvlab.cli.compression_scores",
        lambda *args, **_: seen.extend(args[2]) or pytest.skip("read"),
    )
    with pytest.raises(pytest.skip.Exception):
        shrink("held", *options)
    assert len(seen) == 1
    assert {record.context for records in seen for record in records} < whole - learned


def test_lab_passages_to_learn_from_are_endless_and_not_those_of_the_test(taught):
    more = ["--retention", "0.1", "0.2", "--instruction", "0.2"]
    _, examples, more = taught("--steps", "50", "--accumulate", "3", *more)
    assert len(examples) == 50 * 2 * 3
    assert not examples.readings.test
    assert more["retention"] == [0.1, 0.2]
    assert examples[0].weights.unique().tolist() == pytest.approx([0.2, 1.0])


def test_full_cache_answers_are_those_to_the_whole_text():
    records = [
        Record(
            "Anna lives in Rome. Ben has a dog.",
            "Where does Anna live?",
            ("in Rome", "Rome"),
            ("Oslo", "in Rome"),
        ),
        Record(
            "Anna lives in Rome. Ben has a dog.",
            "Who has a dog?",
            ("Ben",),
            ("Anna", "Ben", "Rome", "the dog"),
        ),
    ]
    scores = read("lab-target", [records], [], [])
    assert set(scores["method"]) == {"full"}
    parts = lab.load("lab-target"), lab.load_tokenizer("lab-target")
    whole = [
        [{"role": "system", "content": r.context}, {"role": "user", "content": r.question}]
        for r in records
    ]
    said = answers(*parts, whole)
    assert (
        scores["exact_match"].tolist() == exact_match(said, [r.answers for r in records]).tolist()
    )
    assert (
        scores["exact_match"].tolist() != exact_match(said, [r.answer for r in records]).tolist()
    )  # the best counts
    prompts = [torch.tensor(encode(parts[1], text)) for text in whole]
    told = [
        [*text, {"role": "assistant", "content": r.answer}]
        for text, r in zip(whole, records, strict=True)
    ]
    endings = [
        torch.tensor(encode(parts[1], text))[len(p) :]
        for text, p in zip(told, prompts, strict=True)
    ]
    logs = log_likelihoods(*parts, prompts, endings)
    assert scores["log_likelihood"].tolist() == pytest.approx(logs, abs=1e-4)
    assert scores["tokens"].tolist() == [len(ending) for ending in endings]
    chosen = multiple_choice(*parts, whole, [r.choices for r in records])
    right = [r.choices[i] == r.answer for r, i in zip(records, chosen, strict=True)]
    assert scores["accuracy"].tolist() == right
    (value,) = [f["value"] for f in compression_figures(scores) if f["score"] == "perplexity"]
    assert value == pytest.approx(perplexity(logs, [len(ending) for ending in endings]), rel=1e-4)


def test_each_method_answers_behind_what_it_kept():
    contexts, shares = passages(2, 3), [1.0, 0.3]
    methods = [*compress.METHODS, *AWARE]
    scores = read("lab-draft", contexts, methods, shares, long_answers=True)
    assert len(scores) == 2 * 3 * (1 + len(methods) * 2)
    full = scores[scores["method"] == "full"].set_index(["context"])
    for (method, share), rows in scores.groupby(["method", "retention"], sort=False):
        ratio = (rows["bytes"].to_numpy() / full["bytes"].to_numpy()).tolist()
        assert ratio == pytest.approx([share] * 6, abs=0.01)
        if share == 1:
            assert rows["log_likelihood"].tolist() == pytest.approx(
                full["log_likelihood"].tolist(), abs=1e-3
            )
            assert rows["rouge_l"].tolist() == full["rouge_l"].tolist()
        elif method != "full":
            assert rows["log_likelihood"].tolist() != pytest.approx(
                full["log_likelihood"].tolist(), abs=1e-2
            )

    model, tokenizer = lab.load("lab-draft"), lab.load_tokenizer("lab-draft")
    wanted = {"h2o": [], "h2o_aware": []}
    for records in contexts:
        for record in records:
            made = compress.example(tokenizer, record.context, [(record.question, record.answer)])
            question = made.text[made.weights == 0]
            for method, known in (("h2o", None), ("h2o_aware", question[None])):
                kept = compress.evict(
                    model, made.context[None], compress.h2o, retention=0.3, question_ids=known
                )
                tokens = generate(model, [question], prefix=kept.prefix, max_new_tokens=64).tokens[
                    0
                ]
                said = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                wanted[method].append(float(said == record.answer))
    for method, right in wanted.items():
        rows = scores[(scores["method"] == method) & (scores["retention"] == 0.3)]
        assert rows["exact_match"].tolist() == right


def test_a_context_is_compressed_once_unless_the_question_is_seen(monkeypatch):
    seen, evict = [], compress.evict

    def watched(model, ids, score, question_ids=None, **options):
        seen.append((score.__name__, options, question_ids is None))
        return evict(model, ids, score, question_ids=question_ids, **options)

    monkeypatch.setattr(compress, "evict", watched)
    read("lab-draft", passages(1, 3), ["key_norm", "snapkv_aware"], [0.5, 0.2], shared=True)
    options = [{"retention": share, "shared": True} for share in (0.5, 0.2)]
    agnostic = [("key_norm", way, True) for way in options]
    aware = [("snapkv", way, False) for way in options for _ in range(3)]
    assert seen == [*agnostic, *aware]


def test_a_gate_that_no_cache_holds_is_a_sentence():
    with pytest.raises(
        ValueError, match=r"the gate 'log', which no cache can hold: train one with gate 'multiply'"
    ):
        read(
            "lab-draft",
            passages(1, 1),
            ["distill"],
            [0.5],
            distiller=KVDistiller(lab.load("lab-draft"), gate="log"),
        )
    with pytest.raises(ValueError, match=r"The method distill needs a distiller"):
        read("lab-draft", passages(1, 1), ["distill"], [0.5])


def test_intervals_are_over_contexts():
    rows = [
        ["full", 1.0, context, float(context), -2.0, 2, 10] for context in (0, 1, 1, 1, 1, 1, 1, 1)
    ]
    columns = "method retention context exact_match log_likelihood tokens bytes".split()
    scores = pd.DataFrame(rows, columns=columns)
    exact, likely, size = compression_figures(scores)
    assert (exact["value"], exact["low"], exact["high"], exact["n"]) == (
        0.5,
        0.0,
        1.0,
        2,
    )  # contexts count alike
    assert likely["value"] == pytest.approx(np.e)
    assert size["value"] == pytest.approx(1e-5)
    (alone, *_) = compression_figures(scores[scores["context"] == 1])
    assert (alone["low"], alone["high"], alone["n"]) == (
        1.0,
        1.0,
        1,
    )  # seven questions, but nothing to draw anew


def test_what_sees_the_question_has_a_table_of_its_own(measured, shrink):
    shrink("distiller")
    told, tables, name = measured("--distiller", "distiller", *TWO, "--retention", "1", "0.25")
    assert re.fullmatch(r"eval_compression_\d{8}_\d{6}\.json", name)
    agnostic, aware = ([*rows_of(tables[title])] for title in (
        "Compressed without the question", "Compressed for one question, which was seen first"))  # fmt: skip
    ways = lambda methods: [
        ("full", 1.0),
        *((method, share) for method in methods for share in (1.0, 0.25)),
    ]
    assert agnostic == ways(["distill", *compress.METHODS])
    assert aware == ways(AWARE)
    settings = {
        "distiller": "distiller",
        "retention": [1.0, 0.25],
        "methods": ["distill", *compress.METHODS, *AWARE],
    }
    assert told["settings"] | settings == told["settings"]
    assert {"device", "versions", "commit"} <= set(told)
    assert {f["score"] for f in told["figures"]} == {"exact_match", "f1", "perplexity", "MB"}
    assert all(f["n"] == 2 and f["low"] <= f["value"] <= f["high"] for f in told["figures"])
    values = {(f["method"], f["retention"], f["score"]): f["value"] for f in told["figures"]}
    assert values["h2o", 1.0, "perplexity"] == pytest.approx(
        values["full", 1.0, "perplexity"], rel=1e-3
    )
    assert values["distill", 0.25, "MB"] == pytest.approx(values["full", 1.0, "MB"] / 4, rel=0.02)


def test_only_methods_asked_for_are_compared(measured):
    _, tables, _ = measured(*TWO, "--retention", "0.5", "--methods", "h2o_aware")
    (table,) = (table for title, table in tables.items() if title != "first")
    assert rows_of(table) == [("full", 1.0), ("h2o_aware", 0.5)]


def test_two_processes_learn_what_one_learns(shrink, tiny):
    told = shrink("one")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "kvlab.cli",
    ]
    setting = os.environ | {"KVLAB_SCALE": "tiny", "OMP_NUM_THREADS": "1"}
    command = [*launch, *TAUGHT, "--output_dir", "two"]
    done = subprocess.run(
        command, cwd=tiny, env=setting, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    again = json.loads((tiny / "two" / "training.json").read_text())
    assert [e["loss"] for e in again["history"]] == pytest.approx(
        [e["loss"] for e in told["history"]], rel=1e-4
    )
    assert done.stdout.count("Held out") == 1


def test_a_distiller_is_compared_on_what_it_did_not_learn_from(measured, shrink, squad):
    told = shrink("distiller", *SQUAD, "--heldout", "0.4", "--contexts", "1")
    assert len(told["heldout"]) == 2
    few = ["--retention", "0.5", "--methods", "key_norm", "--contexts", "9"]
    assert measured(*SQUAD, *few)[1]["first"].startswith(
        "To compare answers on: 6 contexts with 12 questions"
    )
    assert measured(*SQUAD, *few, "--distiller", "distiller")[1]["first"].startswith(
        "To compare answers on: 2 "
    )


def test_choices_and_long_answers_have_scores_of_their_own(measured, tiny):
    asked = {"question": "Who waits?", "options": ["Ann", "Ben", "Cy", "Di"], "gold_label": 2}
    (tiny / "quality").write_text(
        json.dumps({"article": "Ben waits for Ann.", "questions": [asked]})
    )
    tasks = {
        "instruction": "Say it in many words.",
        "instances": [{"input": "Rome.", "output": "It is Rome, I say."}],
    }
    (tiny / "tasks.jsonl").write_text(json.dumps(tasks))
    few = ["--retention", "0.5", "--methods", "random", "--max_new_tokens", "4"]
    for data, source, score in (
        ("quality", "quality", "accuracy"),
        ("self_instruct", "tasks.jsonl", "rouge_l"),
    ):
        told, tables, _ = measured("--data", data, "--source", source, *few)
        assert {f["score"] for f in told["figures"]} == {
            "exact_match",
            "f1",
            "perplexity",
            "MB",
            score,
        }
        assert score in tables["Compressed without the question"]


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        (
            TAUGHT,
            ["--retention", "0.8", "0.1"],
            "retention is 0.8 0.1, expected two shares .* the lower first",
        ),
        (TAUGHT, ["--retention", "0", "0.1"], "retention is 0.0 0.1, expected two shares above 0"),
        (TAUGHT, ["--retention", "0.5"], "retention is 0.5, expected two shares"),
        (
            TAUGHT,
            ["--retention", "0.1", "1.5"],
            "retention is 0.1 1.5, expected two shares above 0, at most 1",
        ),
        (TAUGHT, ["--forward_share", "1.5"], "forward_share is 1.5, expected a share from 0 to 1"),
        (TAUGHT, ["--batch_size", "0"], "batch_size is 0, expected a whole number from 1"),
        (TAUGHT, ["--questions", "0"], "questions is 0, expected a whole number from 1"),
        (TAUGHT, ["--data", "squad", "--source", "no.json"], "There is no file no.json"),
        (
            TAUGHT,
            ["--data", "p3", "--source", "squad.json"],
            "squad.json, row 1 does not fit: there is no 'prompt'",
        ),
        (TAUGHT, ["--data", "squad"], "There is no source of squad records: give --source"),
        (
            TAUGHT,
            ["--source", "squad.json"],
            "source is 'squad.json', but the lab makes its texts up",
        ),
        ([*TAUGHT, *SQUAD], ["--heldout", "1"], "heldout is 1.0, expected a share between 0 and 1"),
        (
            [*TAUGHT, *SQUAD],
            ["--heldout", "0.95"],
            "There are 6 contexts, 6 to hold out: give a source that has more",
        ),
        ([*TAUGHT, *SQUAD], ["--batch_size", "16"], r"\d examples are less than a batch of 16"),
        (
            COMPARED,
            ["--methods", "h2o", "h3o"],
            "There is no method h3o: expected some of random, .*snapkv_aware",
        ),
        (COMPARED, ["--methods", "distill"], "The method distill needs a distiller: give one"),
        (COMPARED, ["--retention", "0.5", "0"], "retention is 0.0, expected a share above 0"),
        (COMPARED, ["--contexts", "0"], "contexts is 0, expected a whole number from 1"),
        (COMPARED, ["--data", "squad", "--source", "no.json"], "There is no file no.json"),
        (COMPARED, ["--data", "squad", "--source", "none.json"], "There is no record in none.json"),
    ],
)
def test_a_mistake_in_compression_is_a_sentence_before_any_work(
    command, options, said, squad, tiny, monkeypatch
):
    (tiny / "none.json").write_text("[]")
    monkeypatch.setattr(Scale, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=f"^kvlab: {said}"):
        main([*command, *options])
    assert {path.name for path in tiny.iterdir()} == {"squad.json", "none.json"}


def test_a_folder_without_a_distiller_is_a_sentence(tiny):
    with pytest.raises(SystemExit, match=r"^kvlab: none has no kvdistill.json"):
        main([*COMPARED, "--distiller", "none", "--base_model", "lab-draft", "--contexts", "1"])


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not here")
def test_real_contexts_are_grouped_and_held_out_whole(taught):
    source = str(PUBLISHED / "squad/dev-part-a.json")
    _, examples, _ = taught(
        "--data", "squad", "--source", source, "--questions", "4", "--heldout", "0.2"
    )
    records = read_records("squad", source)
    learned, contexts = (
        {context for context, _ in examples.readings},
        {record.context for record in records},
    )
    assert len(contexts - learned) == round(0.2 * len(contexts))
    turns = [turn for _, turns in examples.readings for turn in turns]
    assert len(turns) == sum(record.context in learned for record in records)
    assert max(len(turns) for _, turns in examples.readings) == 4
    assert len(examples.readings) < len(turns) / 2
    assert 0 < examples[0].weights.sum() < len(examples[0].text)


# -- layer-map, train-aligned and compare-alignments

SMALL = ["--problems", "16", "--heldout", "4", "--epochs", "1", "--max_new_tokens", "2"]
ALIGNED, ALIGNMENTS_COMPARED = ["train-aligned", *SMALL], ["compare-alignments", *SMALL]
BOTH = ["--use_cka_layer_mapping", "--use_segment_resampling"]
SUMS = ["--dataset_name", "gsm8k", "--source", "sums.jsonl"]
HEAT = ["--eval_dataset_name", "arc", "--eval_source", "heat.jsonl"]


@pytest.fixture
def sums(tiny):
    """Return the records of a file in GSM8K's form; the last has the question of the one before, solved otherwise."""
    texts = [
        (f"Anna has {n} eggs and buys {n + 2}. How many?", f"{n}+{n + 2}={2 * n + 2}.", 2 * n + 2)
        for n in range(3, 27)
    ]
    texts.append((texts[-1][0], "She counts them.", texts[-1][2]))
    write(
        tiny / "sums.jsonl",
        [{"question": q, "answer": f"{steps}\n#### {n}"} for q, steps, n in texts],
    )
    return read_records("gsm8k", "sums.jsonl")


@pytest.fixture
def heat(tiny):
    """Return the records of a file in ARC's form."""
    rows = [
        ("What is hot?", ["snow", "sun"], "B"),
        ("What is cold?", ["snow", "sun"], "A"),
        ("Hot or cold?", ["no", "yes"], "A"),
    ]
    form = [
        {
            "question": {
                "stem": q,
                "choices": [{"text": t, "label": x} for t, x in zip(texts, "AB", strict=True)],
            },
            "answerKey": key,
        }
        for q, texts, key in rows
    ]
    write(tiny / "heat.jsonl", form)
    return read_records("arc", "heat.jsonl")


@pytest.fixture
def align(trained):
    """Return a function that runs train-aligned."""
    return partial(trained, ALIGNED)


@pytest.fixture
def set_out(tiny, monkeypatch):
    """Return a function that runs a command up to its training, and returns the problems that it has."""

    def run(command, *options):
        got = []
        with monkeypatch.context() as patch:
            patch.setattr("kvlab.cli.solved", lambda *_: np.zeros(1))
            patch.setattr(
                "kvlab.cli.teach", lambda *args: got.append(args[3]) or ([{"seconds": 0.0}], None)
            )
            main([*command, "--output_dir", "set_out", *options])
        return got

    return run


@pytest.fixture
def listened(tiny, monkeypatch):
    """Return a function that runs a command without training: lessons, alignment and options that it would have had."""

    def run(command, *options, name="listened"):
        got = []
        with monkeypatch.context() as patch:
            patch.setattr("kvlab.cli.solved", lambda *_: np.zeros(1))
            patch.setattr(
                "kvlab.cli.train_pupil",
                lambda *args, **more: got.append((*args[1:], more)) or [{"seconds": 0.0}],
            )
            main([*command, "--output_dir", name, *options])
        return got

    return run


def pair_of(n=16, seed=0):
    """Texts of the first lab problems for the small student, and the same as the lab's teacher words them."""
    own, theirs = zip(*corpora.Solutions(n, seed=seed), strict=True)
    return [align_module.segment(lab.load_tokenizer("lab-draft"), c) for c in own], list(theirs)


def heard(chosen, plan, name="lab-teacher", shift=0, seed=0):
    """What a teacher makes of the lab's problems."""
    texts, theirs = pair_of(seed=seed)
    theirs = [*theirs[shift:], *theirs[:shift]]
    return align_module.seen_by(
        lab.load(name), lab.load_tokenizer(name), theirs, texts, chosen, plan
    )


def same(lessons, seen, number=0):
    pairs = [
        zip(lesson.seen[number], part, strict=True)
        for lesson, part in zip(lessons, seen, strict=True)
    ]
    return all(torch.equal(one, two) for pair in pairs for one, two in pair)


def alike(n=16, what="hidden", seed=0):
    texts, theirs = pair_of(n, seed)
    tokenizer = lab.load_tokenizer("lab-teacher")
    others = [align_module.segment(tokenizer, c) for c in theirs]
    return align_module.similar_layers(
        lab.load("lab-draft"), texts, lab.load("lab-teacher"), others, what
    )


def weights_in(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_an_aligned_student_is_saved_with_projectors_and_what_it_solves(align, tiny):
    told = align(
        "student",
        *BOTH,
        "--heldout",
        "24",
        "--max_new_tokens",
        "40",
        "--accumulate",
        "2",
        "--fp16",
        "false",
    )
    settings = {
        "model_name": "lab-draft",
        "teacher_model": ["lab-teacher"],
        "learning_rate": 1e-3,
        "kv_warmup": 50,
    }
    assert told["settings"] | settings == told["settings"]
    assert {"device", "versions", "commit"} <= set(told)
    (entry,) = told["history"]  # 16 problems are one batch of 2 x 8
    assert {"ce", "kv", "codi", "share_kv", "share_codi"} <= set(entry)
    assert "To learn from: 16 problems. To be asked: 24." in told["printed"]
    assert {path.name for path in (tiny / "student").glob("projector*")} == {"projector_0"}
    projector = align_module.Projector.from_pretrained(tiny / "student/projector_0")
    assert (projector.keys.in_features, projector.keys.out_features) == (160, 64)
    assert not equal(weights_in(tiny / "student"), lab.load("lab-draft").state_dict())

    test = [own for own, _ in corpora.Solutions(24, test=True)]
    values = {f["name"]: (f["value"], f["n"]) for f in told["figures"]}
    for when, path in (("before", lab.models.MODELS / "lab-draft"), ("after", tiny / "student")):
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(path).eval(),
            lab.load_tokenizer("lab-draft"),
        )
        said = answers(model, tokenizer, [own[:1] for own in test], 40)
        right = [
            lab.report.result(text) == lab.report.result(own[1]["content"])
            for text, own in zip(said, test, strict=True)
        ]
        assert values[f"accuracy_{when}"] == (np.mean(right), 24)
        assert f"accuracy_{when} " in told["printed"]
    assert 0 < values["accuracy_before"][0] < 1


def test_without_weights_there_is_no_teacher_and_a_student_learns_as_from_solutions_alone(
    align, tiny, monkeypatch
):
    load = Scale.load
    with monkeypatch.context() as patch:
        patch.setattr(
            Scale,
            "load",
            lambda scale, role: pytest.fail("loaded") if role == "teacher" else load(scale, role),
        )
        told = align("alone", *BOTH, "--kv_weight", "0", "--codi_weight", "0")
    assert not {"kv", "codi"} & set(told["history"][0])
    students = []
    monkeypatch.setattr(
        "kvlab.cli.solved", lambda model, *_: students.append(model.state_dict()) or np.zeros(1)
    )
    options = [
        "--arms",
        "ce_only",
        "full",
        "shuffled",
        "--seeds",
        "1",
        "--kv_weight",
        "0",
        "--codi_weight",
        "0",
    ]
    main([*ALIGNMENTS_COMPARED, *options])
    main([*ALIGNMENTS_COMPARED, "--arms", "full", "--seeds", "1"])
    alone = weights_in(tiny / "alone")
    assert [equal(student, alone) for student in students] == [True, True, True, False]


def test_what_is_asked_is_the_same_for_every_seed_and_never_learned_from(set_out, sums):
    found = set_out(ALIGNMENTS_COMPARED, *SUMS, "--seeds", "3", "--arms", "ce_only", "full")
    assert all(
        tasks.asked == found[0].asked and tasks.answers == found[0].answers for tasks in found
    )
    assert all(tasks.own == tasks.theirs and tasks.kind == "number" for tasks in found)
    assert [one.own == two.own for one, two in zip(found[::2], found[1::2], strict=True)] == [
        True
    ] * 3  # both arms
    assert len({str(tasks.own) for tasks in found}) == 3
    right = {record.question: record.answers for record in sums}
    for n, wanted in (("99", 20), ("16", 16)):
        for seed in range(6):
            (tasks,) = set_out(
                ALIGNED, *SUMS, "--problems", n, "--seed", str(seed), "--heldout", "5"
            )
            asked, learned = ([c[0]["content"] for c in part] for part in (tasks.asked, tasks.own))
            assert len(asked) == 5
            assert all(len(c) == 1 for c in tasks.asked)
            assert [right[question] for question in asked] == tasks.answers
            assert not {*asked} & {*learned}
            assert (
                abs(len(learned) - wanted) <= 1
            )  # a question that is there twice is held out as a whole
            assert {*asked, *learned} <= {*right}
    assert asked != [record.question for record in sums][:5]  # a file may go by subject


def test_lab_problems_to_learn_from_are_those_of_the_seed_and_not_those_of_the_test(
    set_out, listened
):
    runs = listened(ALIGNMENTS_COMPARED, "--seeds", "3", "--arms", "ce_only")
    assert [options["seed"] for *_, options in runs] == [0, 1, 2]
    one, two = set_out(ALIGNMENTS_COMPARED, "--seeds", "2", "--arms", "full")
    assert [list(pair) for pair in corpora.Solutions(16, seed=1)] == [
        list(p) for p in zip(two.own, two.theirs, strict=True)
    ]
    assert one.asked == two.asked == [own[:1] for own, _ in corpora.Solutions(4, test=True)]
    assert [f"Answer: {n}" for (n,) in one.answers] == [
        own[1]["content"][-len(f"Answer: {n}") :]
        for (own, _), (n,) in zip(corpora.Solutions(4, test=True), one.answers, strict=True)
    ]
    assert not {c[0]["content"] for c in [*one.own, *two.own]} & {
        c[0]["content"] for c in one.asked
    }
    assert one.own[0] != one.theirs[0]


def test_other_problems_may_be_asked(set_out, sums, heat):
    (tasks,) = set_out(ALIGNED, *SUMS, *HEAT, "--problems", "99", "--heldout", "2")
    assert (len(tasks.own), len(tasks.asked), tasks.kind) == (25, 2, "choice")
    right = {messages(record)[0]["content"]: (record.letter,) for record in heat}
    assert [right[c[0]["content"]] for c in tasks.asked] == tasks.answers
    (tasks,) = set_out(ALIGNED, *SUMS, "--eval_dataset_name", "lab", "--problems", "99")
    assert (len(tasks.own), len(tasks.asked), tasks.kind) == (25, 4, "number")
    (tasks,) = set_out(ALIGNED, *HEAT)
    assert (len(tasks.own), len(tasks.asked), tasks.kind) == (16, 3, "choice")
    again = ["--eval_dataset_name", "gsm8k", "--eval_source", "sums.jsonl"]
    (tasks,) = set_out(ALIGNED, *SUMS, *again, "--problems", "99", "--heldout", "9")
    assert not {c[0]["content"] for c in tasks.asked} & {c[0]["content"] for c in tasks.own}


def test_solved_is_what_is_answered_by_an_accepted_answer(monkeypatch):
    said = ["It is (B).", "The answer is A.", "", "The answer is C."]
    tasks = Problems([], [], [["asked"]] * 4, [("B",), ("B",), ("A",), ("A", "C")], "choice")
    monkeypatch.setattr(
        "kvlab.cli.answers",
        lambda model, tokenizer, asked, tokens, **_: said if asked == tasks.asked else [],
    )
    assert solved(None, None, tasks).tolist() == [1, 0, 0, 1]


def test_each_arm_learns_from_what_its_name_says(listened):
    runs = listened(ALIGNMENTS_COMPARED, "--seeds", "1")
    assert len(runs) == len(ALIGNMENTS)
    lessons = {arm: run[0] for arm, run in zip(ALIGNMENTS, runs, strict=True)}
    texts, _ = pair_of()
    assert all(
        torch.equal(a.text.input_ids, b.input_ids)
        for part in lessons.values()
        for a, b in zip(part, texts, strict=True)
    )
    assert [run[1] is None for run in runs] == [True] + [False] * 7
    assert all(lesson.seen == () for lesson in lessons["ce_only"])
    by_depth, by_likeness = similarity.proportional(2, 6), similarity.layer_map(alike(), 2)
    segments, index = align_module.plan_time, align_module.by_index
    assert same(lessons["baseline"], heard(by_depth, index))
    assert same(lessons["cka"], heard(by_likeness, index))
    assert same(lessons["segment"], heard(by_depth, segments))
    assert same(lessons["full"], heard(by_likeness, segments))
    assert same(lessons["shuffled"], heard(by_likeness, segments, shift=8))
    assert same(lessons["shuffled_segment"], heard(by_depth, segments, shift=8))
    for arm, lessons_of in lessons.items():
        own = [
            torch.equal(a.seen[0].keys, b.seen[0].keys)
            for a, b in zip(lessons_of, lessons["full"], strict=True)
            if a.seen
        ]
        assert any(own) == (arm == "full"), arm
    assert all(
        torch.isfinite(x).all() for lesson in lessons["random_teacher"] for x in lesson.seen[0]
    )
    for *_, options in runs:
        assert (
            options["seed"],
            options["steps"],
            options["kv_weight"],
            options["codi_weight"],
        ) == (0, 2, 1.0, 0.5)


def test_flags_of_training_choose_the_arm_and_the_seed_the_problems(listened):
    likeness = similarity.layer_map(alike(seed=3), 2)
    ((lessons, *_),) = listened(ALIGNED, BOTH[0], "--seed", "3")
    assert same(lessons, heard(likeness, align_module.by_index, seed=3))
    ((lessons, *_),) = listened(ALIGNED, BOTH[1], "--seed", "3")
    assert same(lessons, heard(similarity.proportional(2, 6), align_module.plan_time, seed=3))


def test_a_layer_map_is_written_and_obeyed(listened, tiny, capsys):
    main(
        [
            "layer-map",
            "--num_samples",
            "16",
            "--what",
            "keys",
            "--k",
            "3",
            "--output",
            "maps/keys.json",
        ]
    )
    printed = capsys.readouterr().out
    saved = similarity.load_layer_map("maps/keys.json", 2, 6)
    assert (saved.student, saved.teacher, saved.samples, saved.what) == (
        "lab-draft",
        "lab-teacher",
        16,
        "keys",
    )
    wanted = similarity.layer_map(alike(what="keys"), 3)
    assert saved.layer_map.indices.tolist() == wanted.indices.tolist()
    assert saved.layer_map.weights.flatten().tolist() == pytest.approx(
        wanted.weights.flatten().tolist()
    )
    assert all(
        f"student layer {n}: teacher layers {one[0]} (" in printed
        for n, one in enumerate(wanted.indices.tolist())
    )
    mapped = [*BOTH, "--layer_mapping_path", "maps/keys.json"]
    ((lessons, *_),) = listened(ALIGNED, *mapped)
    assert same(lessons, heard(saved.layer_map, align_module.plan_time))

    for layer in (0, 5):  # the file's name is the same
        one = similarity.LayerMap(torch.full((2, 1), layer), torch.ones(2, 1).double(), 6)
        similarity.save_layer_map(
            "maps/keys.json", one, student="lab-draft", teacher="lab-teacher", samples=9
        )
        ((lessons, *_),) = listened(ALIGNED, *mapped)
        assert same(lessons, heard(one, align_module.plan_time))
        assert all(torch.equal(*lesson.seen[0].keys) for lesson in lessons)

    ((lessons, *_),) = listened(ALIGNED, *BOTH)  # what is made on the way stays
    (path,) = tiny.glob("listened/*/teacher_0/layer_map.json")
    main(["layer-map", "--num_samples", "16", "--output", "map.json"])
    kept, made = (similarity.load_layer_map(p, 2, 6).layer_map for p in (path, "map.json"))
    assert torch.equal(kept.indices, made.indices)
    assert torch.equal(kept.weights, made.weights)


def test_two_teachers_are_heard_one_after_another_each_in_its_own_tokens(listened, monkeypatch):
    load, loaded = Scale.load, []

    def watched(scale, role):
        gc.collect()
        assert all(one() is None for one in loaded)
        model = load(scale, role)
        if role == "teacher":
            loaded.append(weakref.ref(model))
        return model

    two = ["--teacher_model", "lab-teacher", "lab-target", "--use_segment_resampling"]
    with monkeypatch.context() as patch:
        patch.setattr(Scale, "load", watched)
        ((lessons, alignment, _),) = listened(ALIGNED, *two)
    assert len(loaded) == 2
    assert same(lessons, heard(similarity.proportional(2, 6), align_module.plan_time), 0)
    assert same(
        lessons, heard(similarity.proportional(2, 12), align_module.plan_time, "lab-target"), 1
    )
    assert [p.keys.in_features for p in alignment.projectors] == [160, 64]
    maps = ["a.json", "b.json"]
    for path, layers, layer in zip(maps, (6, 12), (3, 7), strict=True):
        one = similarity.LayerMap(torch.full((2, 1), layer), torch.ones(2, 1).double(), layers)
        similarity.save_layer_map(path, one, student="s", teacher="t", samples=9)
    ((lessons, *_),) = listened(ALIGNED, *two, BOTH[0], "--layer_mapping_path", *maps)
    assert same(lessons, heard(one, align_module.plan_time, "lab-target"), 1)


def test_an_aligned_student_that_was_killed_goes_on_and_ends_the_same(align, tiny, monkeypatch):
    options = [*BOTH, "--epochs", "2"]
    align("whole", *options)
    save, fit, load, steps = training._save, training.fit, Scale.load, []

    def killed(*state):
        save(*state)
        raise KeyboardInterrupt

    def counted(model, loader, losses, **more):
        return fit(model, loader, lambda *batch: steps.append(1) or losses(*batch), **more)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", killed)
        patch.setattr(align_module, "fit", lambda *args, **more: fit(*args, **more | {"every": 3}))
        with pytest.raises(KeyboardInterrupt):
            align("killed", *options)
    assert not (tiny / "killed" / "training.json").exists()
    monkeypatch.setattr(align_module, "fit", counted)
    monkeypatch.setattr(
        Scale,
        "load",
        lambda scale, role: pytest.fail("loaded") if role == "teacher" else load(scale, role),
    )
    told = align("killed", *options)
    assert [len(steps), len(told["history"])] == [1, 4]
    assert equal(*(weights_in(tiny / name) for name in ("whole", "killed")))
    projectors = [
        align_module.Projector.from_pretrained(tiny / name / "projector_0")
        for name in ("whole", "killed")
    ]
    assert equal(*(p.state_dict() for p in projectors))
    align("killed", *options)
    assert len(steps) == 1  # nothing is left to do


def test_a_run_of_other_settings_begins_anew(listened, sums, monkeypatch):
    for name, layer in (("a.json", 0), ("b.json", 1)):
        one = similarity.LayerMap(torch.full((2, 1), layer), torch.ones(2, 1).double(), 6)
        similarity.save_layer_map(name, one, student="s", teacher="t", samples=9)
    monkeypatch.setattr("kvlab.cli._listened", lambda *_: ([], None))
    changes = [
        "", "--kv_weight 0.5", "--codi_weight 0.1", "--kv_warmup 3", "--kv_end 0.5", "--start orthogonal", "--seed 1",
        "--freeze_projectors", "--problems 24", "--epochs 2", "--batch_size 4", "--accumulate 2", "--learning_rate 0.1",
        "--teacher_model lab-target", "--teacher_model lab-teacher lab-target", "--model_name lab-target",
        "--use_cka_layer_mapping", "--use_cka_layer_mapping --layer_mapping_path a.json", " ".join(SUMS),
        "--use_cka_layer_mapping --layer_mapping_path b.json", "--use_segment_resampling",
        "--kv_weight 0 --codi_weight 0",
    ]  # fmt: skip
    places = [listened(ALIGNED, *change.split())[0][-1]["checkpoint"] for change in changes]
    assert len({*places}) == len(changes)
    assert listened(ALIGNED, "--max_new_tokens", "9")[0][-1]["checkpoint"] == places[0]
    assert listened(ALIGNED, name="other")[0][-1]["checkpoint"].parts[1:] == places[0].parts[1:]


def test_projectors_start_by_the_seed_and_stay_if_they_are_frozen(align, listened, tiny):
    for seed, start in ((0, "xavier"), (1, "orthogonal")):
        options = ["--seed", str(seed), "--start", start]
        align("frozen", *options, "--freeze_projectors")
        torch.manual_seed(seed)
        begun = align_module.Projector(160, 64, start).state_dict()
        assert equal(
            align_module.Projector.from_pretrained(tiny / "frozen/projector_0").state_dict(), begun
        )
        assert not equal(weights_in(tiny / "frozen"), lab.load("lab-draft").state_dict())
    align("free", *options)
    assert not equal(
        align_module.Projector.from_pretrained(tiny / "free/projector_0").state_dict(), begun
    )
    ((_, alignment, _),) = listened(ALIGNED, "--freeze_projectors", *options)
    assert not any(p.requires_grad for p in alignment.parameters())  # the student alone moves
    ((_, again, _),) = listened(
        ALIGNED, "--freeze_projectors", *options
    )  # now what the teacher made of it is on disk
    assert equal(again.state_dict(), alignment.state_dict())
    ((_, alignment, _),) = listened(ALIGNED, "--codi_weight", "0")
    assert not alignment.states


def test_gradient_checkpointing_changes_memory_alone(align, monkeypatch):
    used = []
    monkeypatch.setattr(
        "kvlab.cli.solved", lambda m, *_: used.append(m.is_gradient_checkpointing) or np.zeros(1)
    )
    histories = [
        align(name, *flags)["history"]
        for name, flags in (("a", []), ("b", ["--gradient_checkpointing"]))
    ]
    assert used == [False, False, True, True]
    for one, two in zip(*histories, strict=True):
        for term in ("ce", "kv", "codi", "grad_norm"):
            assert one[term] == pytest.approx(two[term], rel=1e-4)


def test_arms_are_compared_seed_by_seed_and_a_run_that_is_over_is_not_made_again(
    tiny, capsys, monkeypatch
):
    said, kept = iter([0.2, 0.4, 0.7, 0.3] * 2), []
    monkeypatch.setattr("kvlab.cli.solved", lambda *_: np.array([next(said)]))
    for _ in range(2):
        main(
            [
                *ALIGNMENTS_COMPARED,
                "--arms",
                "ce_only",
                "segment",
                "ce_only",
                "--seeds",
                "2",
                "--output_dir",
                "compared",
            ]
        )
        told = json.loads(
            (tiny / "compared/comparison.json").read_text(), parse_constant=pytest.fail
        )
        runs = [(run["arm"], run["seed"], run["accuracy"]) for run in told["runs"]]
        assert runs == [
            ("ce_only", 0, 0.2),
            ("segment", 0, 0.4),
            ("ce_only", 1, 0.7),
            ("segment", 1, 0.3),
        ]
        assert told["settings"]["arms"] == ["ce_only", "segment"]
        assert told["figures"] == alignment_figures(pd.DataFrame(told["runs"]))
        assert "segment, seed 1: 0.300" in capsys.readouterr().out
        kept.append([run["seconds"] for run in told["runs"]])
        monkeypatch.setattr(align_module, "seen_by", lambda *_: pytest.fail("read again"))
        monkeypatch.setattr("kvlab.cli._read_by", lambda *_: pytest.fail("read again"))
    assert kept[0] == kept[1]
    assert min(kept[0]) > 0


def test_gains_are_seed_by_seed():
    rows = [
        ("full", 1, 0.9),
        ("ce_only", 0, 0.1),
        ("full", 0, 0.3),
        ("ce_only", 2, 0.5),
        ("ce_only", 1, 0.5),
        ("full", 2, 0.8),
    ]
    runs = pd.DataFrame(
        [(*row, 1.0, 2.0) for row in rows], columns=["arm", "seed", "accuracy", "seconds", "GB"]
    )
    found = {f["name"]: f for f in alignment_figures(runs)}
    assert [*found] == [
        f"{score}_{arm}" for score in ("accuracy", "seconds", "GB") for arm in ("full", "ce_only")
    ] + ["gain_full"]
    gain = found["gain_full"]
    assert gain["value"] == pytest.approx(0.3)
    assert (gain["low"], gain["high"], gain["n"]) == (
        pytest.approx(0.2, abs=0.01),
        pytest.approx(0.4, abs=0.01),
        3,
    )
    assert found["GB_full"]["unit"] == "GB"
    assert not any(
        "gain" in f["name"] or "GB" in f["name"]
        for f in alignment_figures(runs[runs["arm"] == "full"].drop(columns="GB"))
    )


def test_two_processes_align_as_one_does(align, tiny):
    told = align("one", "--use_segment_resampling")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "kvlab.cli",
    ]
    setting = os.environ | {"KVLAB_SCALE": "tiny", "OMP_NUM_THREADS": "1"}
    command = [*launch, *ALIGNED, "--use_segment_resampling", "--output_dir", "two"]
    done = subprocess.run(
        command, cwd=tiny, env=setting, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    again = json.loads((tiny / "two" / "training.json").read_text())
    for term, near in (
        ("ce", 1e-3),
        ("kv", 0.05),
    ):  # each process measures deviations in its own share of a batch
        assert [e[term] for e in again["history"]] == pytest.approx(
            [e[term] for e in told["history"]], rel=near
        )
    assert done.stdout.count("To learn from") == 1
    assert len([*(tiny / "two").glob("run-*/teacher_0/*.safetensors")]) == 1


MAPPED = ["--use_cka_layer_mapping", "--layer_mapping_path"]


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        (
            ALIGNED,
            [*MAPPED[1:], "sums.jsonl"],
            "layer_mapping_path is given without --use_cka_layer_mapping",
        ),
        (
            ALIGNED,
            [*MAPPED, "none.json"],
            "There is no layer map none.json: make one by `kvlab layer-map",
        ),
        (
            ALIGNED,
            [*MAPPED, "none.json", "none.json"],
            "There are 1 teachers and 2 layer maps: give one for each",
        ),
        (
            ALIGNED,
            ["--batch_size", "17"],
            "16 problems are less than a batch of 17: give more, or smaller batches",
        ),
        (ALIGNED, ["--accumulate", "3"], "16 problems are less than a batch of 24"),
        (ALIGNED, ["--problems", "0"], "problems is 0, expected a whole number from 1"),
        (ALIGNED, ["--heldout", "0"], "heldout is 0, expected a whole number from 1"),
        (ALIGNED, ["--epochs", "0"], "epochs is 0, expected a whole number from 1"),
        (ALIGNED, ["--kv_weight", "-1"], "kv_weight is -1.0, expected 0 or more"),
        (ALIGNED, ["--codi_weight", "-0.1"], "codi_weight is -0.1, expected 0 or more"),
        (ALIGNED, ["--learning_rate", "-1"], "learning_rate is -1.0, expected 0 or more"),
        (ALIGNED, ["--kv_warmup", "-1"], "kv_warmup is -1, expected 0 or more"),
        (ALIGNED, ["--kv_end", "-0.5"], "kv_end is -0.5, expected a share from 0 to 1"),
        (
            ALIGNED,
            ["--fp16"],
            "fp16 needs a GPU, but the scale tiny computes on the CPU: leave --fp16 out",
        ),
        (
            ALIGNED,
            ["--source", "sums.jsonl"],
            "source is 'sums.jsonl', but the lab makes its texts up",
        ),
        (
            ALIGNED,
            ["--eval_source", "heat.jsonl"],
            "eval_source is 'heat.jsonl', but problems to be asked are held out",
        ),
        (
            ALIGNED,
            [*HEAT, "--eval_dataset_name", "lab"],
            "eval_source is 'heat.jsonl', but the lab makes its problems up",
        ),
        (ALIGNED, HEAT[:2], "There is no source of arc records: give a file or a name on the hub"),
        (ALIGNED, [*HEAT[:3], "empty.jsonl"], "There is no problem to be asked in empty.jsonl"),
        (
            ALIGNED,
            SUMS[:2],
            "There is no source of gsm8k records: give a file or a name on the hub",
        ),
        (ALIGNED, [*SUMS[:3], "none.jsonl"], "There is no file none.jsonl"),
        (
            ALIGNED,
            [*SUMS, "--heldout", "25"],
            "There are 25 problems, 25 to hold out: give more, or a smaller heldout",
        ),
        (ALIGNED, [*SUMS, "--heldout", "20"], "[45] problems are less than a batch of 8"),
        (
            ALIGNED,
            ["--dataset_name", "arc", "--source", "heat.jsonl"],
            "3 of 3 arc records have no reasoning",
        ),
        (ALIGNED, [*SUMS[:3], "bare.jsonl"], "1 of 2 gsm8k records have no reasoning"),
        (
            ALIGNMENTS_COMPARED,
            ["--arms", "full", "both"],
            "There is no arm both: expected some of ce_only, baseline",
        ),
        (ALIGNMENTS_COMPARED, ["--seeds", "0"], "seeds is 0, expected a whole number from 1"),
        (ALIGNMENTS_COMPARED, ["--batch_size", "17"], "16 problems are less than a batch of 17"),
        (ALIGNMENTS_COMPARED, ["--kv_end", "2"], "kv_end is 2.0, expected a share from 0 to 1"),
        (["layer-map"], ["--num_samples", "0"], "num_samples is 0, expected a whole number from 1"),
        (["layer-map"], ["--k", "0"], "k is 0, expected a whole number from 1"),
        (["layer-map"], SUMS[:2], "There is no source of gsm8k records"),
    ],
)
def test_a_mistake_in_alignment_is_a_sentence_before_any_work(
    command, options, said, sums, heat, tiny, monkeypatch
):
    (tiny / "empty.jsonl").write_text("")
    write(
        tiny / "bare.jsonl",
        [{"question": "1+1?", "answer": f"{text}\n#### 2"} for text in ("1+1=2.", " ")],
    )
    monkeypatch.setattr(Scale, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=f"^kvlab: {said}"):
        main([*command, *options])
    assert {path.suffix for path in tiny.iterdir()} == {".jsonl"}


def test_what_does_not_fit_the_models_is_a_sentence_before_anything_is_read(tiny, monkeypatch):
    monkeypatch.setattr(align_module, "similar_layers", lambda *_: pytest.fail("read"))
    with pytest.raises(
        SystemExit, match=r"^kvlab: k is 7, but lab-teacher has 6 layers: give a smaller one"
    ):
        main(["layer-map", "--k", "7", "--num_samples", "4"])
    one = similarity.LayerMap(torch.zeros(2, 1).long(), torch.ones(2, 1).double(), 12)
    similarity.save_layer_map("map.json", one, student="lab-draft", teacher="lab-target", samples=9)
    monkeypatch.setattr("kvlab.cli.seen_by", lambda *_: pytest.fail("read"))
    with pytest.raises(
        SystemExit,
        match=r"^kvlab: map.json maps 2 layers of lab-draft to 12 of lab-target, the models",
    ):
        main([*ALIGNED, *MAPPED, "map.json"])


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not here")
def test_published_problems_are_learned_from_as_they_are(listened):
    source = str(PUBLISHED / "gsm8k/dev.jsonl")
    ((lessons, *_),) = listened(
        ALIGNED, "--dataset_name", "gsm8k", "--source", source, "--use_segment_resampling"
    )
    tokenizer, found = (
        lab.load_tokenizer("lab-draft"),
        {r.reasoning: r.answer for r in read_records("gsm8k", source)},
    )
    assert len(lessons) == 16
    for lesson in lessons:
        _, reasoning, answer = (
            tokenizer.decode(lesson.text.input_ids[a:b])
            for a, b in itertools.pairwise(lesson.text.borders)
        )
        assert f" The answer is {found[reasoning.strip()]}." in answer


# -- train-fuser, and what speculate does with a fuser

FUSED = [
    "train-fuser",
    "--prompts",
    "8",
    "--heldout",
    "2",
    "--steps",
    "2",
    "--batch_size",
    "4",
    "--hidden",
    "16",
]
FUSED += [
    "--max_new_tokens",
    "12",
    "--learning_rate",
    "0.05",
]  # a rate at which little is left of what was accepted
WAYS = {"none": None, "prefill": (True, False), "decode": (False, True), "both": (True, True)}


@pytest.fixture
def fuse(trained):
    """Return a function that runs train-fuser."""
    return partial(trained, FUSED)


@pytest.fixture
def fusible(tiny, monkeypatch):
    """Return a function that runs train-fuser without training: what `fuse.train` gets, and the prompts to measure."""

    def run(*options, name="fusible"):
        got = []
        with monkeypatch.context() as patch:
            patch.setattr(
                "kvlab.cli.train_on", lambda *args, **more: got.append((*args, more)) or []
            )
            patch.setattr(
                "kvlab.cli.speculated", lambda *args: got.append(args[1]) or pytest.skip("measured")
            )
            with pytest.raises(pytest.skip.Exception):
                main([*FUSED, "--output_dir", name, *options])
        return got

    return run


def save_fuser(folder, draft, target, strength=20):
    """Save a fuser whose gates are open and that changes a lot."""
    torch.manual_seed(0)
    fuser = Fuser(
        Size.of(draft.config), Size.of(target.config), settings=Settings(hidden=16, gate=1.0)
    )
    fuser.change.weight.data.mul_(strength)
    fuser.save_pretrained(folder)
    return fuser


@pytest.fixture
def guesses(monkeypatch):
    """Return a list of what is guessed for each text that a command speculates on, round by round."""
    told = []

    def watched(target, prompts, proposer=None, **options):
        made = generate(target, prompts, proposer, **options)
        if proposer:
            told.append([r.drafted for r in made.rounds])
        return made

    monkeypatch.setattr("kvlab.cli.generate", watched)
    return told


def spelled(conversations):
    tokenizer = lab.load_tokenizer("lab-target")
    return [encode(tokenizer, conversation) for conversation in conversations]


def noise(read):
    """What was read, but for its content."""
    return read._replace(cache=from_tensor(torch.randn_like(to_tensor(read.cache))))


@pytest.mark.parametrize("control", ["none", "self", "matched"])
def test_a_fuser_is_saved_with_what_it_was_measured_at(control, fuse, tiny):
    told = fuse("fuser", "--control", control, "--gamma", "3")
    assert "To learn from: 8 answers of lab-target. Held out: 2 prompts." in told["printed"]
    settings = {
        "base_model": "lab-draft",
        "teacher_model": "lab-target",
        "control": control,
        "dropout": 0.0,
    }
    assert told["settings"] | settings == told["settings"]
    assert {"device", "versions", "commit"} <= set(told)
    assert [entry["step"] for entry in told["history"]] == [1, 2]

    draft, target, fuser = (
        lab.load("lab-draft"),
        lab.load("lab-target"),
        Fuser.from_pretrained(tiny / "fuser"),
    )
    assert (told["gates"], told["parameters"]) == (
        fuser.gate_logits().tolist(),
        fuser.num_parameters(),
    )
    seen = {
        "none": fuser,
        "self": lambda own, _: fuser(own, own),
        "matched": lambda own, s: fuser(own, noise(s)),
    }
    expected = {}
    for arm, ways in WAYS.items():
        shares = []
        for ids in spelled(corpora.Requests(2, test=True)):
            proposer = (
                FusedProposer(draft, target, seen[control], None, *ways)
                if ways
                else ModelProposer(draft)
            )
            shares.append(
                summarize(
                    generate(target, [ids], proposer, gamma=3, max_new_tokens=12).rounds
                ).acceptance
            )
        expected[f"acceptance_{arm}"] = np.mean(shares)
    assert {f["name"]: f["value"] for f in told["figures"]} == pytest.approx(expected)
    assert [f["name"] for f in told["figures"]] == list(expected)
    assert len({*expected.values()}) > 2  # so that one arm in place of another is seen
    assert all(f"{f['name']} " in told["printed"] and f["n"] == 2 for f in told["figures"])


@pytest.mark.parametrize(
    ("control", "sharer"),
    [("none", "lab-target"), ("self", "lab-draft"), ("matched", "lab-target")],
)
def test_a_fuser_learns_what_the_large_model_says_from_the_sharer_of_its_control(
    control, sharer, fusible
):
    (fuser, draft, shares, lessons, more), _ = fusible("--control", control, "--seed", "3")
    assert (draft.config.num_hidden_layers, shares.config) == (2, lab.load(sharer).config)
    assert (fuser.receiver, fuser.sharer) == (Size.of(draft.config), Size.of(shares.config))
    assert fuser.settings == Settings(
        hidden=16, dropout=0.0, gate=4.0, sharer_seen=control != "matched"
    )
    options = {
        "steps": 2,
        "batch_size": 4,
        "learning_rate": 0.05,
        "accumulate": 1,
        "precision": "no",
        "seed": 3,
    }
    assert more | options | {"decode": True} == more
    said = drafts.listen(
        lab.load("lab-target"),
        lab.load_tokenizer("lab-target"),
        spelled(corpora.Requests(8, seed=3)),
        max_new_tokens=12,
    )
    pairs = [(prompt.receiver_ids.tolist(), answer.tolist()) for prompt, answer in lessons]
    assert pairs == [
        (e.input_ids[: e.start].tolist(), e.input_ids[e.start :].tolist()) for e in said
    ]
    assert all(
        torch.equal(e.prompt.receiver_ids, e.prompt.sharer_ids) and e.prompt.shares is None
        for e in lessons
    )


def test_a_fuser_is_made_as_asked_and_starts_by_the_seed(fusible):
    asked = "--dropout 0.2 --gate -1 --keys rotated --noise gumbel --layer_map proportional --no_decode_fusion"
    (fuser, *_, more), _ = fusible(*asked.split(), "--accumulate", "2", "--precision", "bf16")
    assert fuser.settings == Settings(16, 0.2, "rotated", "gumbel", -1.0)
    assert (
        fuser.layer_map.indices.flatten().tolist()
        == similarity.proportional(2, 12).indices.flatten().tolist()
    )
    assert more | {"decode": False, "accumulate": 2, "precision": "bf16"} == more
    maps = {
        name: fusible("--layer_map", name)[0][0].layer_map.indices.flatten().tolist()
        for name in ("last", "first")
    }
    assert maps == {"last": [10, 11], "first": [0, 1]}
    starts = [fusible("--seed", seed)[0][0].enter.weight for seed in "001"]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_held_out_contexts_are_not_fused_to_learn_and_are_the_same_for_every_seed(fusible, squad):
    options = ["--data", "squad", "--source", squad, "--heldout", "2", "--prompts", "5"]
    records, tokenizer, found = read_records("squad", squad), lab.load_tokenizer("lab-target"), []
    for seed in "12":
        (*_, lessons, _), held = fusible(*options, "--seed", seed)
        contexts = {
            r.context for r in records for ids in held if r.context in tokenizer.decode(ids)
        }
        assert len(held) == len(contexts) == 2
        rest = spelled(messages(r)[:1] for r in records if r.context not in contexts)
        learned = [lesson.prompt.receiver_ids.tolist() for lesson in lessons]
        assert len(learned) == 5 < len(rest)
        assert all(ids in rest for ids in learned)
        found.append((held, learned))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]
    (*_, lessons, _), _ = fusible(*options[:-2], "--prompts", "99")
    assert len(lessons) == len(rest)


def test_a_fuser_that_was_killed_goes_on_and_ends_the_same(fuse, tiny, monkeypatch):
    options = ["--steps", "3", "--heldout", "1", "--max_new_tokens", "4"]
    fuse("whole", *options)
    save, fit, steps = training._save, training.fit, []

    def killed(*state):
        save(*state)
        raise KeyboardInterrupt

    def counted(model, loader, losses, **more):
        return fit(model, loader, lambda *batch: steps.append(1) or losses(*batch), **more)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", killed)
        patch.setattr(fuse_module, "fit", lambda *args, **more: fit(*args, **more | {"every": 2}))
        with pytest.raises(KeyboardInterrupt):
            fuse("killed", *options)
    assert not (tiny / "killed" / "training.json").exists()
    monkeypatch.setattr(fuse_module, "fit", counted)
    told = fuse("killed", *options)
    assert [len(steps), len(told["history"])] == [1, 3]
    assert equal(*(Fuser.from_pretrained(tiny / name).state_dict() for name in ("whole", "killed")))
    fuse("killed", *options, "--gamma", "2", "--heldout", "2")
    assert len(steps) == 1  # nothing is left to learn


def test_a_fuser_of_other_settings_begins_anew(fusible):
    changes = [
        "", "--hidden 32", "--dropout 0.1", "--gate 0", "--keys rotated", "--noise gumbel", "--layer_map proportional",
        "--layer_map first", "--control self", "--control matched", "--no_decode_fusion", "--steps 3", "--batch_size 2",
        "--learning_rate 0.1", "--accumulate 2", "--precision bf16", "--seed 1", "--prompts 9", "--max_new_tokens 9",
        "--base_model lab-target", "--teacher_model lab-draft",
    ]  # fmt: skip
    places = [fusible(*change.split())[0][-1]["checkpoint"] for change in changes]
    assert len({*places}) == len(changes)
    assert fusible("--heldout", "1", "--gamma", "2")[0][-1]["checkpoint"] == places[0]
    assert fusible(name="other")[0][-1]["checkpoint"].parts[1:] == places[0].parts[1:]


def test_answers_that_end_at_once_are_not_measured(fuse, monkeypatch):
    asked, ended = spelled(corpora.Requests(2, test=True)), []

    def ending(target, prompts, *args, **options):
        ends = range(target.config.vocab_size) if prompts[0] in ended else None
        return generate(target, prompts, *args, **options, eos_token_id=ends)

    monkeypatch.setattr("kvlab.cli.generate", ending)
    whole = fuse("fuser")
    ended.append(asked[0])
    told = fuse("fuser")
    assert [f["n"] for f in told["figures"]] == [1] * 4
    assert all(0 <= f["low"] <= f["value"] <= f["high"] <= 1 for f in told["figures"])
    assert [f["value"] for f in told["figures"]] != [f["value"] for f in whole["figures"]]
    ended.extend(asked)
    told = fuse("fuser")
    assert told["figures"] == []
    assert "nothing was guessed" in told["printed"]


def test_of_two_processes_one_measures_and_writes(tiny, capsys, monkeypatch):
    monkeypatch.setattr(
        "kvlab.cli.PartialState", lambda **_: SimpleNamespace(is_main_process=False)
    )
    monkeypatch.setattr("kvlab.cli.speculated", lambda *_: pytest.fail("measured"))
    main([*FUSED, "--output_dir", "fuser"])
    assert capsys.readouterr().out == ""
    assert not list((tiny / "fuser").glob("*.json"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *(
            (f"--{name} {count}", f"{name} is {count}, expected a whole number from 1")
            for name in ("prompts", "heldout", "gamma", "steps", "batch_size", "accumulate")
            for count in (0, -2)
        ),
        ("--max_new_tokens 1", "max_new_tokens is 1, expected at least 2"),
        ("--learning_rate -1", "learning_rate is -1.0, expected 0 or more"),
        ("--hidden 0", "hidden is 0, expected 1 or more"),
        ("--dropout 1", "dropout is 1.0, expected 0 or more, and less than 1"),
        ("--prompts 3", "3 prompts are less than a batch of 4: give more, or a smaller batch_size"),
        ("--source squad.json", "source is 'squad.json', but the lab makes its texts up"),
        ("--data squad", "There is no source of squad records: give --source"),
        ("--data squad --source no.json", "There is no file no.json"),
        (
            "--data squad --source squad.json --heldout 6",
            "There are 6 contexts, 6 to hold out: give a source that",
        ),
        (
            "--data squad --source squad.json --heldout 9",
            "There are 6 contexts, 9 to hold out: give a source that",
        ),
        (
            "--data squad --source squad.json --heldout 5",
            r"[123] prompts are less than a batch of 4",
        ),
        (
            "--base_model lab-teacher",
            "The two models' tokenizers differ .lab-target has 1536 tokens, lab-teacher 640",
        ),
        ("--output_dir squad.json", "squad.json is a file: give the name of a folder"),
    ],
)
def test_a_mistake_in_fusing_is_a_sentence_before_any_work(options, said, squad, tiny, monkeypatch):
    monkeypatch.setattr(Scale, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=f"^kvlab: {said}"):
        main([*FUSED, *options.split()])
    assert {path.name for path in tiny.iterdir()} == {"squad.json"}


@pytest.mark.parametrize(
    ("flags", "ways"),
    [
        ("", (True, True)),
        ("--no_prefill_fusion", (False, True)),
        ("--no_decode_fusion", (True, False)),
    ],
)
def test_speculate_fuses_what_it_is_not_told_to_leave(flags, ways, guesses, tiny, capsys):
    draft, target = lab.load("lab-draft"), lab.load("lab-target")
    fuser = save_fuser("fuser", draft, target)
    prompts = [problem[0]["content"] for problem in problems(4, "long", 2, seed=0)]
    main(
        [
            *FEW,
            "--fuser_checkpoint",
            "fuser",
            *flags.split(),
            "--output_dir",
            str(tiny / "out"),
            "--prompts",
            *prompts,
        ]
    )
    found, _ = result(tiny / "out", capsys)
    told = {name: name in flags for name in ("no_prefill_fusion", "no_decode_fusion")} | {
        "fuser_checkpoint": "fuser"
    }
    assert found["settings"] | told == found["settings"]
    assert found["summary"]["equal_texts"] is True
    assert all(
        prompt["plain"]["text"] == prompt["speculative"]["text"] for prompt in found["prompts"]
    )
    asked = spelled([{"role": "user", "content": text}] for text in prompts)
    each = {}
    for way in itertools.product((True, False), repeat=2):
        made = [
            generate(
                target, [ids], FusedProposer(draft, target, fuser, None, *way), max_new_tokens=12
            )
            for ids in asked
        ]
        each[way] = [[r.drafted for r in one.rounds] for one in made]
    assert guesses[1:] == each.pop(ways)  # the first warms up
    assert guesses[1:] not in each.values()


def test_a_fuser_serves_drawn_text_compiled_models_and_a_single_token(
    guesses, tiny, capsys, monkeypatch
):
    monkeypatch.setattr("torch.compile", lambda step, **_: step)
    draft, target = lab.load("lab-draft"), lab.load("lab-target")
    fuser = save_fuser("fuser", draft, target)
    fused = [
        *FEW,
        "--prompts",
        "Anna has 3 apples. How many?",
        "--fuser_checkpoint",
        "fuser",
        "--output_dir",
    ]
    main([*fused, str(tiny / "drawn"), "--temperature", "0.9", "--seed", "5"])
    (asked,) = spelled([[{"role": "user", "content": "Anna has 3 apples. How many?"}]])
    sampling = Sampling(0.9, generator=torch.Generator().manual_seed(5))
    made = generate(
        target, [asked], FusedProposer(draft, target, fuser), max_new_tokens=12, sampling=sampling
    )
    assert guesses[1:] == [[r.drafted for r in made.rounds]]
    (prompt,) = result(tiny / "drawn", capsys)[0]["prompts"]
    assert prompt["speculative"]["token_ids"] == made.tokens[0].tolist()
    for name, more in (("compiled", ["--compiled"]), ("single", ["--max_new_tokens", "1"])):
        main([*fused, str(tiny / name), *more])
        assert result(tiny / name, capsys)[0]["summary"]["equal_texts"] is True


def test_a_draft_that_reads_from_a_store_is_fused(guesses, learn, facts, tmp_path, capsys):
    folder, _ = learn("draft", "--knowledge", "prefix", "--epochs", "1")
    draft, store = AutoModelForCausalLM.from_pretrained(folder), opened(facts)
    fuser = save_fuser(tmp_path / "fuser", draft, store.model, strength=3)
    models = ["--base_model", str(folder), "--teacher_model", "lab-draft", "--threshold", "0.6"]
    models += [
        "--fuser_checkpoint",
        str(tmp_path / "fuser"),
        "--store",
        str(facts),
        "--prompts",
        "Clara what?",
    ]
    main([*FEW, *models, "--output_dir", str(tmp_path / "out")])
    found, _ = result(tmp_path / "out", capsys)
    assert (found["summary"]["equal_texts"], found["summary"]["found"]) == (True, 1)
    (ids,) = spelled([[{"role": "user", "content": "Clara what?"}]])
    each = []
    for item in (next(item for item in store if item.question == "Clara what?"), None):
        knowing, prefix = draft.knowing(store, [item], [len(ids)])
        for proposer in (
            FusedProposer(knowing, store.model, fuser, prefix),
            ModelProposer(knowing, prefix),
        ):
            made = generate(store.model, [ids], proposer, max_new_tokens=12)
            each.append([r.drafted for r in made.rounds])
    assert guesses[1:] == each[:1]
    assert each[0] not in each[1:]  # without the fuser, or the item, others are guessed


def test_a_fuser_for_other_models_is_a_sentence(tiny):
    save_fuser("self", lab.load("lab-draft"), lab.load("lab-draft"))  # as --control self makes them
    sizes = [r"Size\(layers=2, heads=2, head_dim=32\)", r"Size\(layers=12, heads=2, head_dim=32\)"]
    said = f"The fuser is from {sizes[0]} to {sizes[0]}, the models are {sizes[1]} and {sizes[0]}: train one"
    with pytest.raises(SystemExit, match=f"^kvlab: {said}"):
        main([*FEW, "--fuser_checkpoint", "self"])
    save_fuser("fuser", lab.load("lab-draft"), lab.load("lab-target"))
    for other in (["--base_model", "lab-target"], ["--teacher_model", "lab-draft"]):
        with pytest.raises(
            SystemExit, match=f"^kvlab: The fuser is from {sizes[1]} to {sizes[0]}, the models are"
        ):
            main([*FEW, "--fuser_checkpoint", "fuser", *other])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--fuser_checkpoint none", "none has no fuser.json, fuser.safetensors: give a folder"),
        ("--fuser_checkpoint broken", "broken holds no fuser of format version 1"),
        (
            "--no_prefill_fusion",
            "Without a fuser nothing is fused: give --fuser_checkpoint, or leave",
        ),
        (
            "--no_decode_fusion",
            "Without a fuser nothing is fused: give --fuser_checkpoint, or leave",
        ),
    ],
)
def test_what_is_no_fuser_is_a_sentence_before_anything_is_loaded(options, said, tiny, monkeypatch):
    save_fuser("broken", lab.load("lab-draft"), lab.load("lab-draft"))
    (tiny / "broken" / "fuser.json").write_text("{}")
    monkeypatch.setattr(Scale, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=f"^kvlab: {said}"):
        main([*FEW, *options.split()])
