"""The command line: distill and eval-compression."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from command_helpers import PUBLISHED, result

from kvlab import distill, lab, training
from kvlab.cli import main
from kvlab.commands import shared as common
from kvlab.compress import AWARE, METHODS, REPEATED, evict, h2o
from kvlab.distill import KVDistiller, compression_figures, compression_scores, encode_question
from kvlab.evaluate import exact_match, log_likelihoods, mean_interval, multiple_choice
from kvlab.generation import answers, encode
from kvlab.lab import corpora
from kvlab.records import Record, read_records
from kvlab.scale import Scale
from kvlab.speculate import generate

TRAIN = "distill --base_model lab-draft --steps 2 --batch_size 2 --rank 4 --width 16".split()
TWO = ["--contexts", "2", "--questions", "2"]
TRAIN += TWO
COMPARE, SQUAD = ["eval-compression"], ["--data", "squad", "--source", "squad.json"]


@pytest.fixture
def train(trained):
    """Return a function that runs distill."""
    return partial(trained, TRAIN)


@pytest.fixture
def training_of(train, monkeypatch):
    """Return a function that runs distill and returns the arguments of `train_distiller`."""

    def run(*options):
        calls = []

        def stop(*args, **more):
            calls.append((*args, more))
            pytest.skip("trained")

        with monkeypatch.context() as patch:
            patch.setattr("kvlab.distill.train_distiller", stop)
            with pytest.raises(pytest.skip.Exception):
                train("distiller", *options)
        return calls[0]

    return run


@pytest.fixture
def compare(tiny, capsys):
    """Return a function that runs eval-compression and returns its file and printed tables."""

    def run(*options):
        folder = tiny / "results"
        save = ["--base_model", "lab-draft", "--save_results", "--output_dir", str(folder)]
        main([*COMPARE, *save, *options])
        (path,) = folder.iterdir()
        written, printed = result(folder, capsys)
        path.unlink()
        first, *parts = printed.removesuffix(f"{path}\n").split("\n\n")
        tables = {part.split(" (")[0]: part for part in parts}
        return written, tables | {"first": first}, path.name

    return run


def compared(model, contexts, methods, retention, **options):
    model, tokenizer = lab.load(model), lab.load_tokenizer(model)
    answer = partial(generate, model, max_new_tokens=64)
    return compression_scores(model, tokenizer, contexts, methods, retention, answer, **options)


def passages(n, questions):
    readings = corpora.Readings(n, questions=questions, test=True)
    return [
        [Record(text, question, (answer,)) for question, answer in turns]
        for text, turns in readings
    ]


def rows_of(table):
    """The method and retention of each row of a printed table."""
    names = [re.match(r"(\w*) +([\d.]+) ", line) for line in table.splitlines()[3:]]
    method, rows = "", []
    for name in filter(None, names):
        method = name[1] or method
        rows.append((method, float(name[2])))
    return rows


def test_a_distiller_is_saved_and_measured_on_test_passages(train, tiny):
    written = train("distiller")
    figures = written["figures"]
    names = [(f["method"], f["retention"]) for f in figures if f["score"] == "exact_match"]
    assert names == [("full", 1.0), ("distill", 0.5), ("distill", 0.25), ("distill", 0.1)]
    expected = {"learning_rate": 1e-3, "retention": [0.03, 0.8], "sinks": 1, "row": 1536}
    expected |= {"layer": 1, "rank": 4, "base_model": "lab-draft", "gate": "multiply"}
    assert written["settings"] | expected == written["settings"]
    assert [entry["step"] for entry in written["history"]] == [1, 2]
    assert {"device", "versions", "commit"} <= set(written)
    for f in figures:
        assert "{value:.3f} [{low:.3f}, {high:.3f}]".format(**f) in written["printed"]

    distiller = KVDistiller.from_pretrained(tiny / "distiller", lab.load("lab-draft"))
    assert distiller.settings.sinks == 1
    parameters = distiller.named_parameters()
    assert any(p.abs().sum() > 0 for name, p in parameters if "lora_B" in name)  # it was trained
    sizes = [0.5, 0.25, 0.1]
    scores = compared("lab-draft", passages(2, 2), ["distill"], sizes, distiller=distiller)
    values = [f["value"] for f in compression_figures(scores)]
    assert values == pytest.approx([f["value"] for f in figures])


def test_a_killed_distiller_resumes_and_ends_the_same(train, tiny, squad, monkeypatch):
    options = [*SQUAD, "--steps", "3"]
    train("whole", *options)
    save, fit, steps = training._save_run, training.fit, []

    def killed(*state):
        save(*state)
        raise KeyboardInterrupt

    def often(*args, **more):
        return fit(*args, **more | {"every": 2})

    def counted(model, loader, losses, **more):
        return fit(model, loader, lambda *batch: steps.append(1) or losses(*batch), **more)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save_run", killed)
        patch.setattr(distill, "fit", often)
        with pytest.raises(SystemExit, match=r"^130$"):
            train("killed", *options)
    assert not (tiny / "killed" / "training.json").exists()
    monkeypatch.setattr(distill, "fit", counted)
    train("killed", *options)
    assert len(steps) == 1
    model = lab.load("lab-draft")
    whole, resumed = (KVDistiller.from_pretrained(tiny / n, model) for n in ("whole", "killed"))
    parameters = dict(resumed.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in whole.named_parameters())
    for other in (["--instruction", "0.5"], ["--heldout", "0.5"], ["--routing", "all"]):
        del steps[:]
        train("killed", *options, *other)  # the checkpoint of other settings is not used
        assert len(steps) == 3


def test_held_out_contexts_are_not_trained_on(training_of, train, squad, monkeypatch):
    options = [*SQUAD, "--heldout", "0.3", "--contexts", "1", "--seed", "4"]
    more = ["--gate", "none", "--layer", "2", "--batch_size", "3"]
    distiller, dataset, arguments = training_of(*options, *more)
    assert (distiller.settings.gate, distiller.settings.layer) == ("none", 2)
    assert (arguments["batch_size"], arguments["seed"]) == (3, 4)
    training_contexts = {context for context, _ in dataset.readings}
    records = read_records("squad", squad)
    heldout = {record.context for record in records} - training_contexts
    assert len(heldout) == 2
    turns = [(context, *turn) for context, turns in dataset.readings for turn in turns]
    assert turns == [(r.context, r.question, r.answer) for r in records if r.context not in heldout]
    sizes = {len(turns) for _, turns in dataset.readings}
    assert sizes == {1, 2}  # three questions are two examples

    contexts = []

    def stop(model, tokenizer, records, *_, **__):
        contexts.extend(records)
        pytest.skip("compared")

    monkeypatch.setattr("kvlab.distill.compression_scores", stop)
    with pytest.raises(pytest.skip.Exception):
        train("held", *options)
    assert len(contexts) == 1
    assert {record.context for rows in contexts for record in rows} < heldout


def test_lab_passages_for_training_are_endless_and_not_those_of_the_test(training_of):
    more = ["--retention", "0.1", "0.2", "--instruction", "0.2"]
    _, dataset, arguments = training_of("--steps", "50", "--accumulate", "3", *more)
    assert len(dataset) == 50 * 2 * 3
    assert not dataset.readings.test
    assert arguments["retention"] == [0.1, 0.2]
    assert dataset[0].weights.unique().tolist() == pytest.approx([0.2, 1.0])


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
    scores = compared("lab-target", [records], [], [])
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
    per_token = sum(logs) / sum(len(ending) for ending in endings)
    assert value == pytest.approx(np.exp(-per_token), rel=1e-4)


def test_each_method_answers_from_what_it_kept():
    contexts, sizes = passages(2, 3), [1.0, 0.3]
    methods = [*METHODS, *REPEATED, "attention_matching", *AWARE]
    scores = compared("lab-draft", contexts, methods, sizes, long_answers=True)
    assert len(scores) == 2 * 3 * (1 + len(methods) * 2)
    full = scores[scores["method"] == "full"]
    likelihoods = full["log_likelihood"].tolist()
    for (method, size), rows in scores.groupby(["method", "retention"], sort=False):
        ratio = rows["bytes"].to_numpy() / full["bytes"].to_numpy()
        ragged = method in {*REPEATED, "attention_matching"} - {"kvzip_uniform"}
        assert ratio.max() <= size * (1.4 if ragged else 1) + 0.01
        assert ratio.min() >= size - 0.01
        if size == 1:
            assert rows["log_likelihood"].tolist() == pytest.approx(likelihoods, abs=1e-3)
            assert rows["rouge_l"].tolist() == full["rouge_l"].tolist()
        elif method != "full":
            assert rows["log_likelihood"].tolist() != pytest.approx(likelihoods, abs=1e-2)

    model, tokenizer = lab.load("lab-draft"), lab.load_tokenizer("lab-draft")
    expected = {"h2o": [], "h2o_aware": []}
    for record in (record for records in contexts for record in records):
        q = encode_question(tokenizer, record)
        for method, question_ids in (("h2o", None), ("h2o_aware", q.question[None])):
            prefix = evict(model, q.context, h2o, retention=0.3, question_ids=question_ids)
            tokens = generate(model, [q.question], prefix=prefix, max_new_tokens=64).tokens[0]
            answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            expected[method].append(float(answer == record.answer))
    for method, matches in expected.items():
        rows = scores[(scores["method"] == method) & (scores["retention"] == 0.3)]
        assert rows["exact_match"].tolist() == matches


def test_a_context_is_compressed_once_unless_the_question_is_known(monkeypatch):
    calls = []

    def watched(model, ids, score, question_ids=None, **options):
        calls.append((score.__name__, options, question_ids is None))
        return evict(model, ids, score, question_ids=question_ids, **options)

    monkeypatch.setattr(distill, "evict", watched)
    compared("lab-draft", passages(1, 3), ["key_norm", "snapkv_aware"], [0.5, 0.2], scope="token")
    options = [{"retention": size, "scope": "token"} for size in (0.5, 0.2)]
    agnostic = [("key_norm", size, True) for size in options]
    aware = [("snapkv", size, False) for size in options for _ in range(3)]
    assert calls == [*agnostic, *aware]


def test_intervals_are_over_contexts():
    rows = [
        ["full", 1.0, context, float(context), -2.0, 2, 10] for context in (0, 1, 1, 1, 1, 1, 1, 1)
    ]
    columns = "method retention context exact_match log_likelihood tokens bytes".split()
    scores = pd.DataFrame(rows, columns=columns)
    exact, likely, size = compression_figures(scores)
    assert (exact["value"], exact["low"], exact["high"], exact["n"]) == (
        0.5,
        *map(pytest.approx, mean_interval([0.0, 1.0])[1:]),
        2,
    )  # contexts count alike
    assert likely["value"] == pytest.approx(np.e)
    assert size["value"] == pytest.approx(1e-5)
    (alone, *_) = compression_figures(scores[scores["context"] == 1])
    assert (alone["low"], alone["high"], alone["n"]) == (
        *mean_interval([1.0])[1:],
        1,
    )  # seven questions, but one context


def test_a_distiller_with_one_budget_for_all_heads_is_trained_and_compared(train, compare):
    written = train("free", "--scope", "model", "--score_steps", "2")
    names = {(f["method"], f["retention"]) for f in written["figures"]}
    assert ("distill", 0.1) in names
    _, tables, _ = compare(
        "--distiller", "free", *TWO, "--retention", "0.3", "--methods", "distill"
    )
    rows = rows_of(tables["Compressed without the question"])
    assert rows == [("full", 1.0), ("distill", 0.3)]


def test_a_score_of_ones_own_is_compared(compare, tmp_path, monkeypatch):
    (tmp_path / "own_scores.py").write_text(
        "def latest(attention, budget):\n"
        "    from kvlab.compress import sinks_recent\n"
        "    return sinks_recent(attention, budget)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--methods", "own_scores:latest", "sinks_recent", "--retention", "0.4"]
    for scope in ("head", "model"):
        written, _, _ = compare(*TWO, *options, "--scope", scope)
        values = {}
        for f in written["figures"]:
            values.setdefault(f["method"], []).append(f["value"])
        assert values["own_scores:latest"] == values["sinks_recent"]


def test_methods_that_know_the_question_have_a_table_of_their_own(compare, train):
    train("distiller")
    written, tables, name = compare("--distiller", "distiller", *TWO, "--retention", "1", "0.25")
    assert re.fullmatch(r"eval_compression_\d{8}_\d{6}\.json", name)

    def arms(methods):
        return [("full", 1.0), *((method, size) for method in methods for size in (1.0, 0.25))]

    assert rows_of(tables["Compressed without the question"]) == arms(
        ["distill", *METHODS, *REPEATED, "attention_matching"]
    )
    assert rows_of(tables["Compressed for one known question"]) == arms(AWARE)
    methods = ["distill", *METHODS, *REPEATED, "attention_matching", *AWARE]
    settings = {"distiller": "distiller", "retention": [1.0, 0.25], "methods": methods}
    assert written["settings"] | settings == written["settings"]
    assert {"device", "versions", "commit"} <= set(written)
    figures = written["figures"]
    assert {f["score"] for f in figures} == {"exact_match", "f1", "perplexity", "MB"}
    assert all(f["n"] == 2 and f["low"] <= f["value"] <= f["high"] for f in figures)
    values = {(f["method"], f["retention"], f["score"]): f["value"] for f in figures}
    full = values["full", 1.0, "perplexity"]
    assert values["h2o", 1.0, "perplexity"] == pytest.approx(full, rel=1e-3)
    size = values["full", 1.0, "MB"]
    assert values["distill", 0.25, "MB"] == pytest.approx(size / 4, rel=0.02)


def test_only_the_given_methods_are_compared(compare):
    _, tables, _ = compare(*TWO, "--retention", "0.5", "--methods", "h2o_aware")
    (table,) = (table for title, table in tables.items() if title != "first")
    assert rows_of(table) == [("full", 1.0), ("h2o_aware", 0.5)]


def test_two_processes_learn_what_one_learns(train, tiny):
    written = train("one")
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
    command = [*launch, *TRAIN, "--output_dir", "two"]
    done = subprocess.run(
        command, cwd=tiny, env=setting, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    again = json.loads((tiny / "two" / "training.json").read_text())
    assert [e["loss"] for e in again["history"]] == pytest.approx(
        [e["loss"] for e in written["history"]], rel=1e-4
    )
    assert done.stdout.count("Held out") == 1


def test_a_distiller_is_compared_on_held_out_contexts(compare, train, squad):
    written = train("distiller", *SQUAD, "--heldout", "0.4", "--contexts", "1")
    assert len(written["heldout"]) == 2
    few = [*SQUAD, "--retention", "0.5", "--methods", "key_norm", "--contexts", "9"]
    first = compare(*few)[1]["first"]
    assert first.startswith("Comparing answers on: 6 contexts with 12 questions")
    first = compare(*few, "--distiller", "distiller")[1]["first"]
    assert first.startswith("Comparing answers on: 2 ")


def test_choices_and_long_answers_have_scores_of_their_own(compare, tiny):
    question = {"question": "Who waits?", "options": ["Ann", "Ben", "Cy", "Di"], "gold_label": 2}
    (tiny / "quality").write_text(
        json.dumps({"article": "Ben waits for Ann.", "questions": [question]})
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
        written, tables, _ = compare("--data", data, "--source", source, *few)
        assert {f["score"] for f in written["figures"]} == {
            "exact_match",
            "f1",
            "perplexity",
            "MB",
            score,
        }
        assert score in tables["Compressed without the question"]


@pytest.mark.parametrize(
    ("command", "options", "sentence"),
    [
        (
            TRAIN,
            ["--retention", "0.8", "0.1"],
            r"retention is \[0.8, 0.1\], expected two fractions in",
        ),
        (TRAIN, ["--retention", "0.5"], r"retention is \[0.5\], expected two fractions"),
        (TRAIN, ["--retention", "0.1", "1.5"], r"retention is 1.5, expected a number in \(0, 1\]"),
        (TRAIN, ["--forward_share", "1.5"], r"forward_share is 1.5, expected a number in \[0, 1\]"),
        (TRAIN, ["--batch_size", "0"], "batch_size is 0, expected a"),
        (TRAIN, ["--questions", "0"], "questions is 0, expected a"),
        (TRAIN, ["--data", "squad", "--source", "no.json"], "There is no file no.json"),
        (TRAIN, ["--data", "p3", "--source", "squad.json"], "squad.json, .*'prompt'"),
        (TRAIN, ["--data", "squad"], "There is no source of squad records: give --source"),
        (TRAIN, ["--source", "squad.json"], "source is 'squad.json', but the lab"),
        ([*TRAIN, *SQUAD], ["--heldout", "1"], "heldout is 1.0, expected"),
        ([*TRAIN, *SQUAD], ["--heldout", "0.95"], "0 examples are fewer than a batch of 2"),
        ([*TRAIN, *SQUAD], ["--batch_size", "16"], r"\d examples are fewer than a batch of 16"),
        (COMPARE, ["--methods", "h2o", "h3o"], "There is no method h3o: expected some of random, "),
        (COMPARE, ["--methods", "distill"], "There is no method distill: .*needs a distiller"),
        (COMPARE, ["--retention", "0.5", "0"], "retention is 0.0, expected a number in"),
        (COMPARE, ["--contexts", "0"], "contexts is 0, expected a"),
        (COMPARE, ["--data", "squad", "--source", "no.json"], "There is no file no.json"),
        (
            COMPARE,
            ["--data", "squad", "--source", "none.json"],
            "There is no squad record in none.json",
        ),
    ],
)
def test_a_mistake_in_compression_is_a_sentence_before_any_work(
    command, options, sentence, squad, tiny, monkeypatch
):
    (tiny / "none.json").write_text("[]")
    monkeypatch.setattr(Scale, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=f"^kvlab: {sentence}"):
        main([*command, *options])
    assert {path.name for path in tiny.iterdir()} == {"squad.json", "none.json"}


def test_a_folder_without_a_distiller_is_a_sentence(tiny):
    with pytest.raises(SystemExit, match=r"^kvlab: .*none/kvdistill.json"):
        main([*COMPARE, "--distiller", "none", "--base_model", "lab-draft", "--contexts", "1"])


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not here")
def test_real_contexts_are_grouped_and_held_out_whole(training_of):
    source = str(PUBLISHED / "squad/dev-part-a.json")
    options = ["--data", "squad", "--source", source, "--questions", "4", "--heldout", "0.2"]
    _, dataset, _ = training_of(*options)
    records = read_records("squad", source)
    training_contexts = {context for context, _ in dataset.readings}
    contexts = {record.context for record in records}
    assert len(contexts - training_contexts) == round(0.2 * len(contexts))
    turns = [turn for _, turns in dataset.readings for turn in turns]
    assert len(turns) == sum(record.context in training_contexts for record in records)
    assert max(len(turns) for _, turns in dataset.readings) == 4
    assert len(dataset.readings) < len(turns) / 2
    assert 0 < dataset[0].weights.sum() < len(dataset[0].text)


@pytest.mark.parametrize(("method", "expected"), [("key_norm", 2), ("attention_matching", 1)])
def test_a_context_must_leave_room_for_its_repetition(tiny, capsys, monkeypatch, method, expected):
    long = Record("Anna lives in Rome. " * 220, "Where does Anna live?", ("Rome",))
    contexts = [[long], [replace(long, context="Anna lives in Rome.")]]
    monkeypatch.setattr(common, "lab_passages", lambda *_: contexts)
    main([*COMPARE, "--base_model", "lab-draft", "--methods", method, "--retention", "0.01"])
    assert f"Comparing answers on: {expected} contexts" in capsys.readouterr().out
