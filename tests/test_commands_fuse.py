"""The command line: train-fuser, and what speculate does with a fuser."""

import functools
import itertools
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_helpers import FEW, equal, opened, result
from published_fusers import write_published
from transformers import AutoModelForCausalLM

from kvlab import draft as drafts
from kvlab import fuse as fuse_module
from kvlab import lab, layers, training
from kvlab.cache import from_tensor, to_tensor
from kvlab.cli import main
from kvlab.fuse import Fuser, FuserArm, Settings, Size
from kvlab.generation import encode
from kvlab.lab import corpora
from kvlab.lab.report import problems
from kvlab.models import fingerprint
from kvlab.records import messages, read_records
from kvlab.scale import Scale
from kvlab.speculate import FusedProposer, ModelProposer, Sampling, generate, summarize

FUSED = "train-fuser --prompts 8 --heldout 2 --steps 2 --batch_size 4 --hidden 16".split()
# at this rate little is left of the acceptance, so that the arms differ
FUSED += "--max_new_tokens 12 --learning_rate 0.05".split()


@pytest.fixture
def fuse(trained):
    """Return a function that runs train-fuser."""
    return functools.partial(trained, FUSED)


@pytest.fixture
def fusible(tiny, monkeypatch):
    """Return a function that runs train-fuser without training.

    It returns the arm, the untrained fuser, the examples, the options of `fit`, and test prompts.
    """
    train = FuserArm.train

    def run(*options, name="fusible"):
        calls = []

        def train_arm(arm, *args, **more):
            calls.append(arm)
            return train(arm, *args, **more)

        def fit(fuser, loader, losses, **more):
            calls.extend((fuser, loader.dataset, more | {"batch_size": loader.batch_size}))
            return []

        def measure(target, prompts, *_, **more):
            calls.append(prompts)
            pytest.skip("measured")

        with monkeypatch.context() as patch:
            patch.setattr(FuserArm, "train", train_arm)
            patch.setattr("kvlab.fuse.fit", fit)
            patch.setattr("kvlab.commands.fuse.measure_fusion", measure)
            with pytest.raises(pytest.skip.Exception):
                main([*FUSED, "--output_dir", name, *options])
        return calls

    return run


def save_fuser(folder, draft, target, strength=20):
    """Save a fuser whose gates are open and that changes a lot."""
    torch.manual_seed(0)
    sizes = Size.of(draft.config), Size.of(target.config)
    fuser = Fuser(*sizes, settings=Settings(hidden=16, gate=1.0))
    fuser.value_out.weight.data.mul_(strength)
    fuser.save_pretrained(folder)
    return fuser


def drafted(output):
    return [r.drafted for r in output.rounds]


@pytest.fixture
def guesses(monkeypatch):
    """Return a list of what is guessed for each text that speculate decodes, round by round."""
    rounds = []

    def watched(target, prompts, proposer=None, **options):
        output = generate(target, prompts, proposer, **options)
        if proposer:
            rounds.append(drafted(output))
        return output

    monkeypatch.setattr("kvlab.commands.speculate.generate", watched)
    return rounds


def token_ids(conversations):
    tokenizer = lab.load_tokenizer("lab-target")
    return [encode(tokenizer, conversation) for conversation in conversations]


def noise(prefix):
    """A prefix with random content."""
    return replace(prefix, cache=from_tensor(torch.randn_like(to_tensor(prefix.cache))))


@pytest.mark.parametrize("control", ["none", "self", "matched"])
def test_a_fuser_is_saved_with_what_it_was_measured_at(control, fuse, tiny):
    written = fuse("fuser", "--control", control, "--gamma", "3")
    assert "Training: 8 answers of lab-target. Held out: 2 prompts." in written["printed"]
    settings = {"base_model": "lab-draft", "teacher_model": "lab-target", "control": control}
    assert written["settings"] | settings | {"dropout": 0.0} == written["settings"]
    assert {"device", "versions", "commit"} <= set(written)
    assert [entry["step"] for entry in written["history"]] == [1, 2]

    draft, target = lab.load("lab-draft"), lab.load("lab-target")
    fuser = Fuser.from_pretrained(tiny / "fuser")
    assert written["gates"] == fuser.gate_logits().tolist()
    assert written["parameters"] == fuser.num_parameters()
    used = {
        "none": fuser,
        "self": lambda receiver, _: fuser(receiver, receiver),
        "matched": lambda receiver, sharer: fuser(receiver, noise(sharer)),
    }[control]
    expected = {}
    for arm, ways in {
        "none": None,
        "prefill": (True, False),
        "decode": (False, True),
        "both": (True, True),
    }.items():
        fractions = []
        for ids in token_ids(corpora.Requests(2, test=True)):
            proposer = FusedProposer(draft, used, None, *ways) if ways else ModelProposer(draft)
            output = generate(target, [ids], proposer, gamma=3, max_new_tokens=12)
            fractions.append(summarize(output.rounds).acceptance)
        expected[f"acceptance_{arm}"] = np.mean(fractions)
    assert {f["name"]: f["value"] for f in written["figures"]} == pytest.approx(expected)
    assert [f["name"] for f in written["figures"]] == list(expected)
    assert len({*expected.values()}) > 2  # so that one arm in place of another is noticed
    assert all(f"{f['name']} " in written["printed"] and f["n"] == 2 for f in written["figures"])


@pytest.mark.parametrize(
    ("control", "sharer"),
    [("none", "lab-target"), ("self", "lab-draft"), ("matched", "lab-target")],
)
def test_a_fuser_learns_the_large_models_answers_from_the_sharer_of_its_control(
    control, sharer, fusible
):
    arm, fuser, examples, more, _ = fusible("--control", control, "--seed", "3")
    models = {"receiver": lab.load("lab-draft"), "sharer": lab.load(sharer)}
    assert fuser.trained_for == {name: fingerprint(model) for name, model in models.items()}
    assert (fuser.receiver, fuser.sharer) == tuple(Size.of(m.config) for m in models.values())
    options = {"hidden": 16, "dropout": 0.0, "gate": 4.0, "use_sharer": control != "matched"}
    assert fuser.settings == Settings(**options)
    options = {"steps": 2, "batch_size": 4, "learning_rate": 0.05, "accumulate": 1}
    assert more | options | {"precision": "no", "seed": 3} == more
    assert arm.decode
    target, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
    prompts = token_ids(corpora.Requests(8, seed=3))
    answers = drafts.generate_targets(target, tokenizer, prompts, max_new_tokens=12)
    for answer, (prompt, response) in zip(answers, examples, strict=True):
        assert torch.equal(answer.input_ids[: answer.start], prompt.receiver_ids)
        assert torch.equal(answer.input_ids[answer.start :], response)
        assert prompt.token_weights is None


def test_a_fuser_is_made_as_asked_and_starts_by_the_seed(fusible):
    options = "--dropout 0.2 --gate -1 --keys rotated --noise gumbel --layer_map proportional"
    options += " --no_decode_fusion"
    training = ["--accumulate", "2", "--precision", "bf16"]
    arm, fuser, _, more, _ = fusible(*options.split(), *training)
    assert fuser.settings == Settings(16, 0.2, "rotated", "gumbel", -1.0)
    assert torch.equal(fuser.layer_map.indices, layers.proportional(2, 12).indices)
    assert more | {"accumulate": 2, "precision": "bf16"} == more
    assert not arm.decode
    assert fusible("--rank", "3")[1].input_proj.weight.shape == (2, 2 * 128, 3)
    starts = []
    for seed, name, indices in (
        ("0", "last", [10, 11]),
        ("0", "first", [0, 1]),
        ("1", "first", [0, 1]),
    ):
        fuser = fusible("--seed", seed, "--layer_map", name)[1]
        assert fuser.layer_map.indices.flatten().tolist() == indices
        starts.append(fuser.input_proj.weight)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])


def test_held_out_contexts_are_not_fused_to_learn_and_are_the_same_for_every_seed(fusible, squad):
    options = ["--data", "squad", "--source", squad, "--heldout", "2", "--prompts", "5"]
    records, tokenizer, runs = read_records("squad", squad), lab.load_tokenizer("lab-target"), []
    for seed in "12":
        *_, examples, _, heldout = fusible(*options, "--seed", seed)
        texts = [tokenizer.decode(ids) for ids in heldout]
        contexts = {r.context for r in records for text in texts if r.context in text}
        assert len(heldout) == len(contexts) == 2
        rest = token_ids(messages(r)[:1] for r in records if r.context not in contexts)
        learned = [example.prompt.receiver_ids.tolist() for example in examples]
        assert len(learned) == 5 < len(rest)
        assert all(ids in rest for ids in learned)
        runs.append((heldout, learned))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] != runs[1][1]
    *_, examples, _, _ = fusible(*options[:-2], "--prompts", "99")
    assert len(examples) == len(rest)


def test_a_fuser_that_was_killed_goes_on_and_ends_the_same(fuse, tiny, monkeypatch):
    options = ["--steps", "3", "--heldout", "1", "--max_new_tokens", "4"]
    fuse("whole", *options)
    save, fit, steps = training._save_run, training.fit, []

    def killed(*state):
        save(*state)
        raise KeyboardInterrupt

    def counted(model, loader, losses, **more):
        return fit(model, loader, lambda *batch: steps.append(1) or losses(*batch), **more)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save_run", killed)
        patch.setattr(fuse_module, "fit", lambda *args, **more: fit(*args, **more | {"every": 2}))
        with pytest.raises(SystemExit, match=r"^130$"):
            fuse("killed", *options)
    assert not (tiny / "killed" / "training.json").exists()
    monkeypatch.setattr(fuse_module, "fit", counted)
    written = fuse("killed", *options)
    assert [len(steps), len(written["history"])] == [1, 3]
    assert equal(*(Fuser.from_pretrained(tiny / name).state_dict() for name in ("whole", "killed")))
    fuse("killed", *options, "--gamma", "2", "--heldout", "2")
    assert len(steps) == 1  # nothing is left to learn


def test_a_fuser_of_other_settings_begins_anew(fusible):
    changes = ["", "--hidden 32", "--no_decode_fusion", "--prompts 9", "--max_new_tokens 9"]
    changes += ["--base_model lab-target", "--teacher_model lab-draft"]
    checkpoints = [fusible(*change.split())[3]["checkpoint"] for change in changes]
    assert len({*checkpoints}) == len(changes)
    assert fusible("--heldout", "1", "--gamma", "2")[3]["checkpoint"] == checkpoints[0]
    assert fusible(name="other")[3]["checkpoint"].parts[1:] == checkpoints[0].parts[1:]


def test_answers_that_end_at_once_are_not_measured(fuse, monkeypatch):
    prompts, ended = token_ids(corpora.Requests(2, test=True)), []

    def ending(target, prompts, *args, **options):
        ends = range(target.config.vocab_size) if prompts[0] in ended else None
        return generate(target, prompts, *args, **options, eos_token_id=ends)

    monkeypatch.setattr("kvlab.commands.fuse.generate", ending)
    every = fuse("fuser")
    ended.append(prompts[0])
    written = fuse("fuser")
    assert [f["n"] for f in written["figures"]] == [1] * 4
    assert all(0 <= f["value"] <= 1 for f in written["figures"])
    assert [f["value"] for f in written["figures"]] != [f["value"] for f in every["figures"]]
    ended.extend(prompts)
    written = fuse("fuser")
    assert written["figures"] == []
    assert "Nothing was guessed" in written["printed"]


def test_of_two_processes_one_measures_and_writes(tiny, capsys, monkeypatch):
    other = SimpleNamespace(is_main_process=False)
    monkeypatch.setattr("kvlab.commands.fuse.PartialState", lambda **_: other)
    monkeypatch.setattr(
        "kvlab.commands.fuse.measure_fusion", lambda *_, **more: pytest.fail("measured")
    )
    main([*FUSED, "--output_dir", "fuser"])
    assert capsys.readouterr().out == ""
    assert not list((tiny / "fuser").glob("*.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            (f"--{name} {count}", f"{name} is {count}, expected a ")
            for name, count in zip(
                ("prompts", "heldout", "gamma", "steps", "batch_size", "accumulate"),
                (-2, 0, 0, 0, -2, 0),
                strict=True,
            )
        ),
        ("--max_new_tokens 1", "max_new_tokens is 1, expected 2 or more"),
        ("--learning_rate -1", "learning_rate is -1.0, expected a number in"),
        ("--hidden 0", "hidden is 0, expected a positive integer"),
        ("--dropout 1", r"dropout is 1.0, expected a number in \[0, 1\)"),
        ("--prompts 3", "3 prompts are less than a batch of 4: give more, or a smaller batch_size"),
        ("--source squad.json", "source is 'squad.json', but the lab makes its texts up"),
        ("--data squad", "There is no source of squad records: give --source"),
        ("--data squad --source no.json", "There is no file no.json"),
        (
            "--data squad --source squad.json --heldout 6",
            "There are 6 contexts, 6 to hold out: give a source that",
        ),
        (
            "--data squad --source squad.json --heldout 5",
            r"[123] prompts are less than a batch of 4",
        ),
        (
            "--base_model lab-teacher",
            "The two models' tokenizers differ .lab-target has 1536 tokens and reads",
        ),
        (
            "--output_dir squad.json",
            "squad.json/training.json cannot be written .Not a directory.: give",
        ),
    ],
)
def test_a_mistake_in_fusing_is_a_sentence_before_any_work(
    options, message, squad, tiny, monkeypatch
):
    monkeypatch.setattr(Scale, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=f"^kvlab: {message}"):
        main([*FUSED, *options.split()])
    assert {path.name for path in tiny.iterdir()} == {"squad.json"}


@functools.cache
def guesses_of_each_way(*prompts):
    """What the draft of `save_fuser` guesses for prompts, by what is fused: (prefill, decode)."""
    draft, target, each = lab.load("lab-draft"), lab.load("lab-target"), {}
    with tempfile.TemporaryDirectory() as folder:
        fuser = save_fuser(folder, draft, target)
    for ways in itertools.product((True, False), repeat=2):
        each[ways] = []
        for ids in token_ids([{"role": "user", "content": text}] for text in prompts):
            proposer = FusedProposer(draft, fuser, None, *ways)
            each[ways].append(drafted(generate(target, [ids], proposer, max_new_tokens=12)))
    return each


@pytest.mark.parametrize(
    ("flags", "ways"),
    [
        ("", (True, True)),
        ("--no_prefill_fusion", (False, True)),
        ("--no_decode_fusion", (True, False)),
    ],
)
def test_speculate_fuses_what_it_is_not_told_to_leave(flags, ways, guesses, tiny, capsys):
    save_fuser("fuser", lab.load("lab-draft"), lab.load("lab-target"))
    prompts = [problem[0]["content"] for problem in problems(4, "long", 2, seed=0)]
    options = ["--fuser_checkpoint", "fuser", *flags.split(), "--output_dir", str(tiny / "out")]
    main([*FEW, *options, "--prompts", *prompts])
    written, _ = result(tiny / "out", capsys)
    settings = {name: name in flags for name in ("no_prefill_fusion", "no_decode_fusion")} | {
        "fuser_checkpoint": "fuser"
    }
    assert written["settings"] | settings == written["settings"]
    assert written["summary"]["equal_texts"] is True
    assert all(
        prompt["plain"]["text"] == prompt["speculative"]["text"] for prompt in written["prompts"]
    )
    each = dict(guesses_of_each_way(*prompts))
    assert guesses[1:] == each.pop(ways)  # the first warms up
    assert guesses[1:] not in each.values()


def test_speculate_fuses_prompts_with_a_published_folder(guesses, tiny, capsys):
    draft, target = lab.load("lab-draft"), lab.load("lab-target")
    sizes = Size.of(draft.config), Size.of(target.config)
    write_published(tiny / "q_Fuser" / "final", *sizes, {0: [[3, 1]], 1: [[11, 0]]})
    fused = ["--fuser_checkpoint", "q_Fuser", "--no_decode_fusion", "--output_dir"]
    main([*FEW, *fused, str(tiny / "out"), "--prompts", "Anna has 3 apples. How many?"])
    assert result(tiny / "out", capsys)[0]["summary"]["equal_texts"] is True
    (ids,) = token_ids([[{"role": "user", "content": "Anna has 3 apples. How many?"}]])
    each, fuser = [], Fuser.from_pretrained("q_Fuser")
    for proposer in (FusedProposer(draft, fuser, None, True, False), ModelProposer(draft)):
        each.append(drafted(generate(target, [ids], proposer, max_new_tokens=12)))
    assert guesses[1:] == each[:1] != each[1:]


def test_a_fuser_serves_drawn_text_compiled_models_and_a_single_token(
    guesses, tiny, capsys, monkeypatch
):
    monkeypatch.setattr("torch.compile", lambda step, **_: step)
    draft, target = lab.load("lab-draft"), lab.load("lab-target")
    fuser = save_fuser("fuser", draft, target)
    fused = [*FEW, "--prompts", "Anna has 3 apples. How many?", "--fuser_checkpoint", "fuser"]
    fused += ["--output_dir"]
    main([*fused, str(tiny / "drawn"), "--temperature", "0.9", "--seed", "5"])
    (prompt_ids,) = token_ids([[{"role": "user", "content": "Anna has 3 apples. How many?"}]])
    sampling = Sampling(0.9, generator=torch.Generator().manual_seed(5))
    output = generate(
        target, [prompt_ids], FusedProposer(draft, fuser), max_new_tokens=12, sampling=sampling
    )
    assert guesses[1:] == [drafted(output)]
    (prompt,) = result(tiny / "drawn", capsys)[0]["prompts"]
    assert prompt["speculative"]["token_ids"] == output.tokens[0].tolist()
    for name, more in (("compiled", ["--compiled"]), ("single", ["--max_new_tokens", "1"])):
        main([*fused, str(tiny / name), *more])
        assert result(tiny / name, capsys)[0]["summary"]["equal_texts"] is True


def test_a_draft_that_reads_from_a_store_is_fused(guesses, learn, facts, tmp_path, capsys):
    folder, _ = learn("draft", "--knowledge", "prefix", "--epochs", "1")
    draft, store = AutoModelForCausalLM.from_pretrained(folder), opened(facts)
    fuser = save_fuser(tmp_path / "fuser", draft, store.model, strength=3)
    models = ["--base_model", str(folder), "--teacher_model", "lab-draft", "--threshold", "0.6"]
    models += ["--fuser_checkpoint", str(tmp_path / "fuser"), "--store", str(facts)]
    models += ["--prompts", "Clara what?"]
    main([*FEW, *models, "--output_dir", str(tmp_path / "out")])
    written, _ = result(tmp_path / "out", capsys)
    assert (written["summary"]["equal_texts"], written["summary"]["found"]) == (True, 1)
    (ids,) = token_ids([[{"role": "user", "content": "Clara what?"}]])
    each = []
    for item in (next(item for item in store if item.question == "Clara what?"), None):
        knowing, prefix = draft.with_knowledge(store, [item], [len(ids)])
        for proposer in (FusedProposer(knowing, fuser, prefix), ModelProposer(knowing, prefix)):
            output = generate(store.model, [ids], proposer, max_new_tokens=12)
            each.append(drafted(output))
    assert guesses[1:] == each[:1]
    assert each[0] not in each[1:]  # without the fuser, or the item, others are guessed


def test_a_fuser_for_other_models_is_a_sentence(tiny):
    save_fuser("self", lab.load("lab-draft"), lab.load("lab-draft"))  # as --control self makes them
    sizes = [r"Size\(layers=2, heads=2, head_dim=32\)", r"Size\(layers=12, heads=2, head_dim=32\)"]
    message = (
        f"The fuser is from {sizes[0]} to {sizes[0]}, the models are {sizes[1]} and {sizes[0]}"
    )
    with pytest.raises(SystemExit, match=f"^kvlab: {message}"):
        main([*FEW, "--fuser_checkpoint", "self"])
    save_fuser("fuser", lab.load("lab-draft"), lab.load("lab-target"))
    for other in (["--base_model", "lab-target"], ["--teacher_model", "lab-draft"]):
        with pytest.raises(
            SystemExit, match=f"^kvlab: The fuser is from {sizes[1]} to {sizes[0]}, the models are"
        ):
            main([*FEW, "--fuser_checkpoint", "fuser", *other])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--fuser_checkpoint none", r"There is no file none/fuser\.json"),
        (
            "--fuser_checkpoint x+y_Fuser",
            r"x\+y_Fuser is no folder here, and not to be had from the",
        ),
        ("--fuser_checkpoint broken", "broken has a fuser of version None, expected 1 or 2"),
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
def test_what_is_no_fuser_is_a_sentence_before_anything_is_loaded(
    options, message, tiny, monkeypatch
):
    save_fuser("broken", lab.load("lab-draft"), lab.load("lab-draft"))
    (tiny / "broken" / "fuser.json").write_text("{}")
    monkeypatch.setattr(Scale, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=f"^kvlab: {message}"):
        main([*FEW, *options.split()])
