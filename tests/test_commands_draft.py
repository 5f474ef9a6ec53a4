"""The command line: train-draft."""

import re

import command_helpers
import pytest
import torch
from command_helpers import FACTS, FEW, QUICK, opened, result
from transformers import AutoModelForCausalLM

from kvlab import draft as drafts
from kvlab import lab, training
from kvlab.cli import main
from kvlab.draft import KnowledgeDraft
from kvlab.generation import encode
from kvlab.lab import corpora
from kvlab.scale import Scale


@pytest.fixture
def lessons(learn, monkeypatch):
    """Return a function that runs train-draft up to its training, and returns what `draft.train_draft` would have got."""

    def run(*options):
        got = []
        monkeypatch.setattr(
            drafts,
            "train_draft",
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
        f"{f[part]:.3f}" in told["printed"]
        for f in told["figures"]
        for part in ("value", "low", "high")
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
    said = drafts.generate_targets(store.model, tokenizer, prompts, max_new_tokens=12)
    cut = KnowledgeDraft.cut(store.model, "first:1")
    expected = [*drafts.measure_acceptance(cut, store.model, said)]
    expected += drafts.measure_acceptance(
        draft, store.model, drafts.attach(draft, store, said, items)
    )
    expected += drafts.measure_acceptance(draft, store.model, said)
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
    save, fit, steps = training._save_run, training.fit, []

    def killed(*state):
        save(*state)
        raise KeyboardInterrupt

    def counted(model, loader, losses, **options):
        return fit(model, loader, lambda *batch: steps.append(1) or losses(*batch), **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save_run", killed)
        with pytest.raises(SystemExit, match="130"):
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
        example.hidden_states is not None and example.knowledge is not None for example in heldout
    )
    assert all(e.knowledge is not None for e in examples if prompt_of(e) in made_up)
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
    knows = {prompt_of(example): example.knowledge is not None for example in heldout}
    assert knows == {"Anna, what?": True, "Ben what?": True, "zz qq": False}
    asked = [prompt_of(example) for example in examples]
    assert asked.count("Anna what?") == 2  # the model's answer, and the one that was given
    assert "Ben what?" not in asked
    assert [example.knowledge for example in examples if prompt_of(example) == "1+1"] == [None]


def test_a_draft_that_does_not_read_needs_neither_embedder_nor_made_up_records(
    lessons, monkeypatch
):
    monkeypatch.setattr(Scale, "load_embedder", lambda *_: pytest.fail("loaded"))
    draft, examples, heldout, options = lessons("--knowledge", "none", "--transitions")
    assert draft.config.knowledge is None
    assert draft.config.transitions is True
    assert all(example.knowledge is None for example in [*examples, *heldout])
    assert {prompt_of(example) for example in examples} < {record["question"] for record in FACTS}
    assert options["loss_weights"] == {"ce": 1.0, "kl": 0.5, "tv": 0.3}


def test_without_cross_entropy_only_the_models_own_answers_are_learned_from(lessons):
    _, examples, _, options = lessons("--losses.kl", "0.5")
    assert all(example.hidden_states is not None for example in examples)
    assert len(examples) == len(FACTS) - 1
    assert options["loss_weights"] == {"kl": 0.5}


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
            command_helpers, "QUICK", ["--base_model", "lab-draft", "--max_new_tokens", "12"]
        )
        draft, examples, _, options = lessons(
            "--config", str(tmp_path / "options.yaml"), "--losses.ce", "0.25"
        )
    assert (draft.config.knowledge, draft.config.layers) == ("vector", [1])
    assert options["loss_weights"] == {"lk_hybrid": 1.0, "ce": 0.25}
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
        (["--losses.lk", "1"], r"There is no loss \['lk'\]: expected one or more of ce, kl"),
        (["--losses", "{}"], r"There is no loss \[\]: expected one or more of ce, kl"),
        (["--heldout", "1"], r"heldout is 1.0, expected a number in \(0, 1\)"),
        (["--heldout", "0.95"], "There are 6 questions, 6 to hold out"),
        (["--layers", "first:5"], "layers is 'first:5', expected"),
        (["--max_new_tokens", "1"], "max_new_tokens is 1, expected at least 2"),
        (["--batch_size", "0"], "batch_size is 0, expected"),
        (["--other_prompts", "nothing"], "There is no file nothing"),
    ],
)
def test_a_mistake_in_training_is_a_sentence_before_any_work(
    options, said, facts, tmp_path, monkeypatch
):
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drafts, "generate_targets", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(SystemExit, match=f"^kvlab: {said}"):
        main(["train-draft", "--store", str(facts.with_name("kv")), *QUICK, *options])
    assert not list(tmp_path.iterdir())


def test_too_few_examples_for_a_step_are_a_sentence(learn):
    with pytest.raises(SystemExit, match=r"^kvlab: The loader has no batch"):
        learn("draft", "--batch_size", "64")


@pytest.mark.parametrize("way", ["vector", "kv", "prefix"])
def test_speculate_gives_a_draft_what_the_store_has(
    way, learn, facts, tmp_path, capsys, monkeypatch
):
    folder, _ = learn("draft", "--knowledge", way, "--epochs", "1")
    calls, real = [], KnowledgeDraft.with_knowledge

    def watched(draft, store, items, starts):
        calls.append((items[0] and items[0].question, starts[0]))
        return real(draft, store, items, starts)

    monkeypatch.setattr(KnowledgeDraft, "with_knowledge", watched)
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
    assert {*calls} == {("Clara what?", starts[0]), (None, starts[1])}
    assert [prompt["found"] for prompt in found["prompts"]] == ["Clara what?", None]
    assert "knows: Clara what?\n" in printed
    assert "knows: nothing\n" in printed
    assert found["summary"]["equal_texts"] is True
    assert found["summary"]["found"] == 1
    assert found["summary"]["finding_seconds"] > 0

    main([*FEW, *models, "--output_dir", str(tmp_path / "without")])
    without, printed = result(tmp_path / "without", capsys)
    assert len(calls) == 1 + len(asked)  # to warm up, and for each prompt; none in the second run
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
