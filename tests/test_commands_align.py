"""The command line: layer-map, train-aligned and compare-alignments."""

import gc
import itertools
import json
import os
import subprocess
import sys
import weakref
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from command_helpers import PUBLISHED, equal, write
from transformers import AutoModelForCausalLM

from kvlab import align as align_module
from kvlab import lab, training
from kvlab.align import ARMS, AlignedStudent, Problems, TeacherFeatures, alignment_figures, solved
from kvlab.cli import main
from kvlab.generation import answers, encode
from kvlab.lab import corpora
from kvlab.layers import LayerMap, layer_map, load_layer_map, proportional, save_layer_map
from kvlab.records import messages, read_records
from kvlab.scale import Scale

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
            patch.setattr("kvlab.align.solved", lambda *_: np.zeros(1))
            patch.setattr(
                "kvlab.align.train_arm",
                lambda *args, **_: (
                    got.append(args[3]) or ([{"seconds": 0.0}], AlignedStudent(args[1]))
                ),
            )
            main([*command, "--output_dir", "set_out", *options])
        return got

    return run


@pytest.fixture
def listened(tiny, monkeypatch):
    """Return a function that runs a command without training: lessons, alignment, settings and options of it."""

    def run(command, *options, name="listened"):
        got = []
        with monkeypatch.context() as patch:
            patch.setattr("kvlab.align.solved", lambda *_: np.zeros(1))
            patch.setattr(
                "kvlab.align.train_student",
                lambda student, lessons, settings, **more: (
                    got.append((lessons, student, settings, more)) or [{"seconds": 0.0}]
                ),
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
    others = [align_module.segment(lab.load_tokenizer(name), c) for c in theirs]
    return align_module.encode_with_teacher(lab.load(name), others, texts, chosen, plan)


def same(lessons, seen, number=0):
    pairs = [
        zip(lesson[1 + number], part, strict=True)
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
        "kvlab.align.solved", lambda model, *_: students.append(model.state_dict()) or np.zeros(1)
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
        tasks.questions == found[0].questions and tasks.answers == found[0].answers
        for tasks in found
    )
    assert all(tasks.student == tasks.teacher and tasks.kind == "number" for tasks in found)
    assert [
        one.student == two.student for one, two in zip(found[::2], found[1::2], strict=True)
    ] == [True] * 3  # both arms
    assert len({str(tasks.student) for tasks in found}) == 3
    right = {record.question: record.answers for record in sums}
    for n, wanted in (("99", 20), ("16", 16)):
        for seed in range(2):
            (tasks,) = set_out(
                ALIGNED, *SUMS, "--problems", n, "--seed", str(seed), "--heldout", "5"
            )
            asked, learned = (
                [c[0]["content"] for c in part] for part in (tasks.questions, tasks.student)
            )
            assert len(asked) == 5
            assert all(len(c) == 1 for c in tasks.questions)
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
        list(p) for p in zip(two.student, two.teacher, strict=True)
    ]
    assert one.questions == two.questions == [own[:1] for own, _ in corpora.Solutions(4, test=True)]
    assert [f"Answer: {n}" for (n,) in one.answers] == [
        own[1]["content"][-len(f"Answer: {n}") :]
        for (own, _), (n,) in zip(corpora.Solutions(4, test=True), one.answers, strict=True)
    ]
    assert not {c[0]["content"] for c in [*one.student, *two.student]} & {
        c[0]["content"] for c in one.questions
    }
    assert one.student[0] != one.teacher[0]


def test_other_problems_may_be_asked(set_out, sums, heat):
    (tasks,) = set_out(ALIGNED, *SUMS, *HEAT, "--problems", "99", "--heldout", "2")
    assert (len(tasks.student), len(tasks.questions), tasks.kind) == (25, 2, "choice")
    right = {messages(record)[0]["content"]: (record.letter,) for record in heat}
    assert [right[c[0]["content"]] for c in tasks.questions] == tasks.answers
    (tasks,) = set_out(ALIGNED, *SUMS, "--eval_dataset_name", "lab", "--problems", "99")
    assert (len(tasks.student), len(tasks.questions), tasks.kind) == (25, 4, "number")
    (tasks,) = set_out(ALIGNED, *HEAT)
    assert (len(tasks.student), len(tasks.questions), tasks.kind) == (16, 3, "choice")
    again = ["--eval_dataset_name", "gsm8k", "--eval_source", "sums.jsonl"]
    (tasks,) = set_out(ALIGNED, *SUMS, *again, "--problems", "99", "--heldout", "9")
    assert not {c[0]["content"] for c in tasks.questions} & {c[0]["content"] for c in tasks.student}


def test_solved_is_what_is_answered_by_an_accepted_answer(monkeypatch):
    said = ["It is (B).", "The answer is A.", "", "The answer is C."]
    tasks = Problems([], [], [["asked"]] * 4, [("B",), ("B",), ("A",), ("A", "C")], "choice")
    monkeypatch.setattr(
        "kvlab.align.answers",
        lambda model, tokenizer, asked, tokens, **_: said if asked == tasks.questions else [],
    )
    assert solved(None, None, tasks, 9).tolist() == [1, 0, 0, 1]


def test_each_arm_learns_from_what_its_name_says(listened):
    runs = listened(ALIGNMENTS_COMPARED, "--seeds", "1")
    assert len(runs) == len(ARMS)
    lessons = {arm: run[0] for arm, run in zip(ARMS, runs, strict=True)}
    texts, _ = pair_of()
    for arm, part in lessons.items():
        pairs = zip(part, texts, strict=True)
        given = [torch.equal(a[0].input_ids, b.input_ids) for a, b in pairs]
        assert all(given) == (arm not in {"text_distillation", "logit_distillation"})
    without = {"ce_only", "text_distillation", "logit_distillation"}
    assert [len(run[1].projectors) for run in runs] == [int(arm not in without) for arm in ARMS]
    assert all(len(lesson) == 1 for lesson in lessons["ce_only"])
    by_depth, by_likeness = proportional(2, 6), layer_map(alike(), 2)
    segments, index = align_module.plan_time, align_module.by_index
    assert same(lessons["baseline"], heard(by_depth, index))
    assert same(lessons["cka"], heard(by_likeness, index))
    assert same(lessons["segment"], heard(by_depth, segments))
    assert same(lessons["full"], heard(by_likeness, segments))
    assert same(lessons["full_one_layer"], heard(layer_map(alike(), 1), segments))
    assert same(lessons["no_kv_loss"], heard(by_depth, segments))
    assert same(lessons["no_projector"], heard(by_depth, segments))
    assert same(lessons["shuffled"], heard(by_likeness, segments, shift=8))
    assert same(lessons["shuffled_segment"], heard(by_depth, segments, shift=8))
    for arm, lessons_of in lessons.items():
        own = [
            torch.equal(a[1].keys, b[1].keys)
            for a, b in zip(lessons_of, lessons["full"], strict=True)
            if a[1:] and hasattr(a[1], "keys")
        ]
        assert any(own) == (arm == "full"), arm
    assert all(torch.isfinite(x).all() for lesson in lessons["random_teacher"] for x in lesson[1])
    for arm, (*_, settings, options) in zip(ARMS, runs, strict=True):
        values = options["seed"], settings.steps(16), settings.kv_weight, settings.codi_weight
        assert values == (0, 2, 0.0 if arm == "no_kv_loss" else 1.0, 0.5)
    (plain,) = runs[[*ARMS].index("no_projector")][1].projectors
    assert torch.equal(plain.keys.weight, torch.eye(64, 160))
    assert not plain.keys.weight.requires_grad


def test_flags_of_training_choose_the_arm_and_the_seed_the_problems(listened):
    likeness = layer_map(alike(seed=3), 2)
    ((lessons, *_),) = listened(ALIGNED, BOTH[0], "--seed", "3")
    assert same(lessons, heard(likeness, align_module.by_index, seed=3))
    ((lessons, *_),) = listened(ALIGNED, BOTH[1], "--seed", "3")
    assert same(lessons, heard(proportional(2, 6), align_module.plan_time, seed=3))


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
    saved = load_layer_map("maps/keys.json", 2, 6)
    content = json.loads((tiny / "maps/keys.json").read_text())
    about = {"student": "lab-draft", "teacher": "lab-teacher", "samples": 16, "what": "keys"}
    assert content | about == content
    wanted = layer_map(alike(what="keys"), 3)
    assert saved.indices.tolist() == wanted.indices.tolist()
    assert saved.weights.flatten().tolist() == pytest.approx(wanted.weights.flatten().tolist())
    assert all(
        f"student layer {n}: teacher layers {one[0]} (" in printed
        for n, one in enumerate(wanted.indices.tolist())
    )
    mapped = [*BOTH, "--layer_mapping_path", "maps/keys.json"]
    ((lessons, *_),) = listened(ALIGNED, *mapped)
    assert same(lessons, heard(saved, align_module.plan_time))

    for layer in (0, 5):  # the file's name is the same
        one = LayerMap(torch.full((2, 1), layer), torch.ones(2, 1).double(), 6)
        save_layer_map("maps/keys.json", one, student="lab-draft", teacher="lab-teacher", samples=9)
        ((lessons, *_),) = listened(ALIGNED, *mapped)
        assert same(lessons, heard(one, align_module.plan_time))
        assert all(torch.equal(*lesson[1].keys) for lesson in lessons)

    ((lessons, *_),) = listened(ALIGNED, *BOTH)  # what is made on the way stays
    (path,) = tiny.glob("listened/*/teacher_0/layer_map.json")
    main(["layer-map", "--num_samples", "16", "--output", "map.json"])
    kept, made = (load_layer_map(p, 2, 6) for p in (path, "map.json"))
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
        ((lessons, alignment, *_),) = listened(ALIGNED, *two)
    assert len(loaded) == 2
    assert same(lessons, heard(proportional(2, 6), align_module.plan_time), 0)
    assert same(lessons, heard(proportional(2, 12), align_module.plan_time, "lab-target"), 1)
    assert [p.keys.in_features for p in alignment.projectors] == [160, 64]
    maps = ["a.json", "b.json"]
    for path, layers, layer in zip(maps, (6, 12), (3, 7), strict=True):
        one = LayerMap(torch.full((2, 1), layer), torch.ones(2, 1).double(), layers)
        save_layer_map(path, one, student="s", teacher="t", samples=9)
    ((lessons, *_),) = listened(ALIGNED, *two, BOTH[0], "--layer_mapping_path", *maps)
    assert same(lessons, heard(one, align_module.plan_time, "lab-target"), 1)


def test_an_aligned_student_that_was_killed_goes_on_and_ends_the_same(align, tiny, monkeypatch):
    options = [*BOTH, "--epochs", "2"]
    align("whole", *options)
    save, fit, load, steps = training._save_run, training.fit, Scale.load, []

    def killed(*state):
        save(*state)
        raise KeyboardInterrupt

    def counted(model, loader, losses, **more):
        return fit(model, loader, lambda *batch: steps.append(1) or losses(*batch), **more)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save_run", killed)
        patch.setattr(align_module, "fit", lambda *args, **more: fit(*args, **more | {"every": 3}))
        with pytest.raises(SystemExit, match=r"^130$"):
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
        one = LayerMap(torch.full((2, 1), layer), torch.ones(2, 1).double(), 6)
        save_layer_map(name, one, student="s", teacher="t", samples=9)
    features = [TeacherFeatures(*[torch.zeros(2, 2, 8)] * 3)]
    for name, stub in (
        ("_encode_to_files", lambda *_: None),
        ("StoredTeacherFeatures", lambda _: features),
        ("StackDataset", lambda *_: []),
    ):
        monkeypatch.setattr(align_module, name, stub)
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
    ((_, alignment, *_),) = listened(ALIGNED, "--freeze_projectors", *options)
    trained = {name for name, p in alignment.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"student"}
    # now the features are read from disk
    ((_, again, *_),) = listened(ALIGNED, "--freeze_projectors", *options)
    assert equal(again.projectors.state_dict(), alignment.projectors.state_dict())
    assert equal(again.states.state_dict(), alignment.states.state_dict())
    ((_, alignment, *_),) = listened(ALIGNED, "--codi_weight", "0")
    assert not alignment.states


def test_gradient_checkpointing_changes_memory_alone(align, monkeypatch):
    used = []
    monkeypatch.setattr(
        "kvlab.align.solved", lambda m, *_: used.append(m.is_gradient_checkpointing) or np.zeros(1)
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
    monkeypatch.setattr("kvlab.align.solved", lambda *_: np.array([next(said)]))
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
        monkeypatch.setattr(align_module, "_encode_to_files", lambda *_: pytest.fail("read again"))
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
        pytest.approx(0.3 - 0.1 * 4.30265 / 3**0.5, abs=1e-5),  # Student's t of 0.2, 0.3 and 0.4
        pytest.approx(0.3 + 0.1 * 4.30265 / 3**0.5, abs=1e-5),
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
            "There are 1 layer maps for 1 teachers: give one each, and --use_cka",
        ),
        (
            ALIGNED,
            [*MAPPED, "none.json"],
            "There is no layer map none.json: make it by `kvlab layer-map",
        ),
        (
            ALIGNED,
            [*MAPPED, "none.json", "none.json"],
            "There are 2 layer maps for 1 teachers: give one each",
        ),
        (ALIGNED, ["--batch_size", "17"], "16 problems are less than a batch of 17: give more"),
        (ALIGNED, ["--accumulate", "3"], "16 problems are less than a batch of 24"),
        (ALIGNED, ["--problems", "0"], "problems is 0, expected a positive integer"),
        (ALIGNED, ["--heldout", "0"], "heldout is 0, expected a positive integer"),
        (ALIGNED, ["--epochs", "0"], "epochs is 0, expected a positive integer"),
        (ALIGNED, ["--kv_weight", "-1"], r"kv_weight is -1.0, expected a number in \[0, inf\)"),
        (
            ALIGNED,
            ["--codi_weight", "-0.1"],
            r"codi_weight is -0.1, expected a number in \[0, inf\)",
        ),
        (ALIGNED, ["--learning_rate", "-1"], "learning_rate is -1.0, expected a number"),
        (ALIGNED, ["--kv_warmup", "-1"], r"kv_warmup is -1, expected an integer in \[0, inf\)"),
        (ALIGNED, ["--kv_end", "-0.5"], r"kv_end is -0.5, expected a number in \[0, 1\]"),
        (ALIGNED, ["--fp16"], "fp16 needs a GPU: tiny computes on the CPU"),
        (
            ALIGNED,
            ["--source", "sums.jsonl"],
            "source is 'sums.jsonl', but the lab makes its texts up",
        ),
        (
            ALIGNED,
            ["--eval_source", "heat.jsonl"],
            "eval_source is 'heat.jsonl', which needs --eval_dataset_name",
        ),
        (
            ALIGNED,
            [*HEAT, "--eval_dataset_name", "lab"],
            "eval_source is 'heat.jsonl', which needs --eval_dataset_name",
        ),
        (ALIGNED, HEAT[:2], "There is no source of arc records: give a file or a name on the hub"),
        (ALIGNED, [*HEAT[:3], "empty.jsonl"], "empty.jsonl does not fit: it is empty"),
        (
            ALIGNED,
            SUMS[:2],
            "There is no source of gsm8k records: give a file or a name on the hub",
        ),
        (ALIGNED, [*SUMS[:3], "none.jsonl"], "There is no file none.jsonl"),
        (ALIGNED, [*SUMS, "--heldout", "25"], "0 problems are less than a batch of 8"),
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
            "There is no arm both: choose from ce_only, baseline",
        ),
        (ALIGNMENTS_COMPARED, ["--seeds", "0"], "seeds is 0, expected a positive integer"),
        (ALIGNMENTS_COMPARED, ["--batch_size", "17"], "16 problems are less than a batch of 17"),
        (ALIGNMENTS_COMPARED, ["--kv_end", "2"], r"kv_end is 2.0, expected a number in \[0, 1\]"),
        (["layer-map"], ["--num_samples", "0"], "num_samples is 0, expected a positive integer"),
        (["layer-map"], ["--k", "0"], "k is 0, expected a positive integer"),
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
    monkeypatch.setattr("kvlab.align.similar_layers", lambda *_: pytest.fail("read"))
    with pytest.raises(
        SystemExit, match=r"^kvlab: k is 7, but lab-teacher has 6 layers: give a smaller one"
    ):
        main(["layer-map", "--k", "7", "--num_samples", "4"])
    one = LayerMap(torch.zeros(2, 1).long(), torch.ones(2, 1).double(), 12)
    save_layer_map("map.json", one, student="lab-draft", teacher="lab-target", samples=9)
    monkeypatch.setattr(align_module, "encode_with_teacher", lambda *_: pytest.fail("read"))
    with pytest.raises(
        SystemExit,
        match=r"^kvlab: map.json maps 2 layers of lab-draft to 12 of lab-target, but the models",
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
            tokenizer.decode(lesson[0].input_ids[a:b])
            for a, b in itertools.pairwise(lesson[0].borders)
        )
        assert f" The answer is {found[reasoning.strip()]}." in answer


def lengthened(path, rows):
    """Make some problems of a file longer than the lab models read."""
    lines = (path).read_text().splitlines()
    for row in rows:
        problem = json.loads(lines[row])
        lines[row] = json.dumps(problem | {"question": "Anna counts eggs. " * 3000 + str(row)})
    path.write_text("\n".join(lines))


def test_problems_longer_than_a_model_reads_are_left_out_with_a_count(set_out, sums, tiny, capsys):
    lengthened(tiny / "sums.jsonl", [2, 5])
    more = ["--problems", "99", "--heldout", "4"]
    (tasks,) = set_out(ALIGNED, *SUMS, *more, "--eval_dataset_name", "lab")
    assert len(tasks.student) == len(tasks.teacher) == len(sums) - 2
    assert "2 of 25 texts are left out: they have more than the 2048" in capsys.readouterr().out
    again = ["--eval_dataset_name", "gsm8k", "--eval_source", "sums.jsonl"]
    (tasks,) = set_out(ALIGNED, "--heldout", "99", *again)
    assert len(tasks.questions) == len(tasks.answers) == len(sums) - 2
    run = ["layer-map", *SUMS, "--student_model", "lab-draft", "--num_samples", "99"]
    main(run)
    assert "draft (rows) and lab-teacher, 23 problems:" in capsys.readouterr().out


def test_a_problem_that_only_the_teacher_cannot_read_is_left_out(set_out, tiny, monkeypatch):
    load = Scale.load_config

    def short(scale, role):
        config = load(scale, role)
        config.max_position_embeddings = 80 if role == "teacher" else 2048
        return config

    monkeypatch.setattr(Scale, "load_config", short)
    few = ["--problems", "64", "--batch_size", "2"]
    (tasks,) = set_out(ALIGNED, *few)
    tokenizer = lab.load_tokenizer("lab-teacher")
    lengths = [len(encode(tokenizer, conversation)) for conversation in tasks.teacher]
    assert 0 < len(lengths) < 64
    assert max(lengths) <= 80
    alone = ["--kv_weight", "0", "--codi_weight", "0"]
    assert len(set_out(ALIGNED, *few, *alone)[0].student) == 64


def test_arms_compared_so_far_are_there_when_a_comparison_is_stopped(tiny, monkeypatch):
    accuracies = iter([0.2, 0.4, 0.7])
    monkeypatch.setattr("kvlab.align.solved", lambda *_: np.array([next(accuracies)]))
    train, calls = align_module.train_arm, []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setattr("kvlab.align.train_arm", stopping)
    arms = ["--arms", "segment", "ce_only", "--seeds", "2", "--output_dir", "compared"]
    with pytest.raises(SystemExit) as stop:
        main([*ALIGNMENTS_COMPARED, *arms])
    assert stop.value.code == 130
    written = json.loads((tiny / "compared/comparison.json").read_text())
    assert [(run["arm"], run["seed"]) for run in written["runs"]] == [
        ("segment", 0), ("ce_only", 0), ("segment", 1),
    ]  # fmt: skip
    counts = {figure["name"]: figure["n"] for figure in written["figures"]}
    assert (counts["accuracy_segment"], counts["accuracy_ce_only"]) == (2, 1)
    assert counts["gain_segment"] == 1
    monkeypatch.setattr("kvlab.align.train_arm", train)
    monkeypatch.setattr("kvlab.align.solved", lambda *_: np.array([0.5]))
    monkeypatch.setattr(align_module, "_encode_to_files", lambda *_: pytest.fail("read again"))
    main([*ALIGNMENTS_COMPARED, *arms])
    again = json.loads((tiny / "compared/comparison.json").read_text())["runs"]
    assert [run["seconds"] for run in again[:3]] == [run["seconds"] for run in written["runs"]]
