"""The command line: train-parallel."""

import functools
import json

import numpy as np
import pytest
import torch

from kvlab import lab
from kvlab import parallel as parallel_module
from kvlab.cli import main
from kvlab.draft import generate_targets
from kvlab.generation import encode
from kvlab.lab import corpora
from kvlab.parallel import ParallelDraft
from kvlab.speculate import ParallelProposer, generate, summarize

FEW = "train-parallel --prompts 8 --heldout 3 --epochs 4 --batch_size 4 --guesses 2".split()
FEW += "--max_new_tokens 12 --learning_rate 0.02".split()


@pytest.fixture
def train(trained):
    """Return a function that runs train-parallel."""
    return functools.partial(trained, FEW)


def test_heads_are_saved_and_measured_on_requests_that_are_held_out(train, tiny):
    result = train("heads")
    assert [entry["step"] for entry in result["history"]] == [*range(1, 9)]
    assert result["history"][-1]["ce"] < result["history"][0]["ce"]
    draft = ParallelDraft.from_pretrained(tiny / "heads")
    assert draft.guesses == 2
    assert result["parameters"] == sum(p.numel() for p in draft.parameters())
    target, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
    summaries = []
    for request in corpora.Requests(3, test=True):
        ids = torch.tensor(encode(tokenizer, request))
        options = {"gamma": 2, "max_new_tokens": 12, "tokenizer": tokenizer}
        rounds = generate(target, [ids], ParallelProposer(target, draft), **options).rounds
        summaries.append(summarize(rounds))
    values = {f["name"]: (f["value"], f["n"]) for f in result["figures"]}
    assert values["acceptance"] == (np.mean([s.acceptance for s in summaries]), 3)
    first = [s.conditional[0] for s in summaries]
    assert values["acceptance_position_1"] == (np.mean(first), 3)
    assert values["tokens_per_call"] == (np.mean([s.tokens_per_call for s in summaries]), 3)
    assert {"device", "versions", "commit"} <= set(result)
    assert result["settings"]["teacher_model"] == "lab-target"


def test_what_is_learned_from_are_the_targets_own_answers(train, monkeypatch):
    lessons = []

    def learn(draft, target, examples, **options):
        lessons.append((examples, options))
        return []

    monkeypatch.setattr("kvlab.commands.parallel.train_parallel", learn)
    train("heads", "--seed", "3", "--losses.kl", "0.5")
    ((examples, options),) = lessons
    target, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
    prompts = [encode(tokenizer, request) for request in corpora.Requests(8, seed=3)]
    answers = generate_targets(target, tokenizer, prompts, max_new_tokens=12)
    for example, answer in zip(examples, answers, strict=True):
        assert example.input_ids.tolist() == answer.input_ids.tolist()
        assert torch.allclose(example.hidden_states, answer.hidden_states, atol=1e-5)
    assert options["loss_weights"] == {"kl": 0.5}
    assert options["seed"] == 3


def test_a_stopped_run_goes_on_and_ends_the_same(train, tiny, monkeypatch):
    whole = train("whole")
    fit = parallel_module.fit

    def stopped(draft, loader, losses, **options):
        def stop(step):
            if step == 4:
                raise KeyboardInterrupt

        return fit(draft, loader, losses, on_step=stop, every=1, **options)

    with monkeypatch.context() as patch:
        patch.setattr(parallel_module, "fit", stopped)
        with pytest.raises(SystemExit):
            main([*FEW, "--output_dir", "again"])
    resumed = train("again")
    assert [entry["ce"] for entry in resumed["history"]] == pytest.approx(
        [entry["ce"] for entry in whole["history"]]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guesses", "0"], "guesses is 0"),
        (["--losses.no", "1"], "There is no loss"),
        (["--prompts", "2"], "There are 2 answers of more than 2 tokens, a batch has 4"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message, tiny):
    with pytest.raises(SystemExit, match=message):
        main([*FEW, "--output_dir", "none", *options])


def test_speculate_drafts_with_the_heads(train, tiny, capsys):
    train("heads")
    capsys.readouterr()
    options = "speculate --max_new_tokens 16 --gamma 4 --save_results --parallel_draft heads"
    main(options.split())
    assert "equal_texts" in capsys.readouterr().out
    (path,) = (tiny / "results").glob("*.json")
    result = json.loads(path.read_text())
    assert result["summary"]["equal_texts"] is True
    assert all(len(p["speculative"]["conditional"]) <= 2 for p in result["prompts"])


@pytest.mark.parametrize("option", ["fuser_checkpoint", "store"])
def test_heads_are_neither_fused_nor_do_they_read(option, tiny):
    with pytest.raises(SystemExit, match="A parallel draft has no cache to fuse"):
        main(["speculate", "--parallel_draft", "heads", f"--{option}", "folder"])
