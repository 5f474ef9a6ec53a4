"""The command line: distill and eval-compression."""

import json
import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from command_helpers import PUBLISHED, result

from kvlab import compress, lab, training
from kvlab.cli import main
from kvlab.commands.distill import compression_figures, compression_scores
from kvlab.compress import AWARE, KVDistiller
from kvlab.evaluate import exact_match, log_likelihoods, multiple_choice
from kvlab.generation import answers, encode
from kvlab.lab import corpora
from kvlab.records import Record, read_records
from kvlab.scale import Scale
from kvlab.speculate import generate

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
TAUGHT, COMPARED, SQUAD = (
    ["distill", *FEW_STEPS],
    ["eval-compression"],
    ["--data", "squad", "--source", "squad.json"],
)


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
        "kvlab.commands.distill.compression_scores",
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
    assert value == pytest.approx(np.exp(-sum(logs) / sum(map(len, endings))), rel=1e-4)


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
