"""The command line: train-fuser, and what speculate does with a fuser."""

import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_helpers import FEW, equal, opened, result
from transformers import AutoModelForCausalLM

from kvlab import draft as drafts
from kvlab import fuse as fuse_module
from kvlab import lab, layers, training
from kvlab.cache import from_tensor, to_tensor
from kvlab.cli import main
from kvlab.fuse import Fuser, Settings, Size
from kvlab.generation import encode
from kvlab.lab import corpora
from kvlab.lab.report import problems
from kvlab.records import messages, read_records
from kvlab.scale import Scale
from kvlab.speculate import FusedProposer, ModelProposer, Sampling, generate, summarize

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
                "kvlab.commands.fuse.train_on",
                lambda *args, **more: got.append((*args, more)) or [],
            )
            patch.setattr(
                "kvlab.commands.fuse.speculated",
                lambda *args: got.append(args[1]) or pytest.skip("measured"),
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

    monkeypatch.setattr("kvlab.commands.fuse.generate", watched)
    return told


def spelled(conversations):
    tokenizer = lab.load_tokenizer("lab-target")
    return [encode(tokenizer, conversation) for conversation in conversations]


def noise(read):
    """What was read, but for its content."""
    return replace(read, cache=from_tensor(torch.randn_like(to_tensor(read.cache))))


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
        == layers.proportional(2, 12).indices.flatten().tolist()
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

    monkeypatch.setattr("kvlab.commands.fuse.generate", ending)
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
        "kvlab.commands.fuse.PartialState", lambda **_: SimpleNamespace(is_main_process=False)
    )
    monkeypatch.setattr("kvlab.commands.fuse.speculated", lambda *_: pytest.fail("measured"))
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
