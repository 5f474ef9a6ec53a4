"""What `fit` promises: the plain loop, exact token means, resuming to the bit, one result on all processes."""

import copy
import gc
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from kvlab.align import AlignmentSettings
from kvlab.cache import prefill
from kvlab.distill import DistillSettings
from kvlab.draft import DraftSettings
from kvlab.evaluate import log_likelihoods
from kvlab.fuse import FuserArm
from kvlab.speculate import ModelProposer, decode
from kvlab.training import fit

ROOT = Path(__file__).resolve().parents[1]
PADDED = SimpleNamespace(pad_token_id=0)
QUICK = {"learning_rate": 0.05, "warmup": 3}


def net(seed=0, dropout=0.0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 8), nn.LayerNorm(8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 2)
    ).to(dtype)


def rows(n=32, dtype=torch.float32):
    """Rows of five tokens, of which half have one that counts and half have all: batches differ in their tokens."""
    generator = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(n, 5, 3, generator=generator).to(dtype),
        torch.randn(n, 5, 2, generator=generator).to(dtype),
    )
    counted = torch.ones(n, 5)
    counted[torch.arange(n) % 8 < 4, 1:] = 0
    return [{"x": a, "y": b, "weights": c} for a, b, c in zip(x, y, counted, strict=True)]


def mse(model, batch):
    error = (model(batch["x"]) - batch["y"]).pow(2).mean(-1)  # (B, T)
    return {"mse": (error * batch["weights"]).sum() / batch["weights"].sum()}


def tokens(batch):
    return batch["weights"].sum()


def loader(size=8, shuffle=False, n=32, dtype=torch.float32):
    return DataLoader(rows(n, dtype), batch_size=size, shuffle=shuffle)


def near(one, two, atol=1e-6):
    return all(
        torch.allclose(a, b, rtol=0, atol=atol)
        for a, b in zip(one.parameters(), two.parameters(), strict=True)
    )


def same(one, two):
    return all(map(torch.equal, one.parameters(), two.parameters()))


def figures(history):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


def killed(after, losses=mse):
    """The same losses, and a kill in the place of call number `after + 1`."""
    calls = []

    def interrupted(model, batch):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(batch)
        return losses(model, batch)

    return interrupted


def interrupted(*calls):
    """The same losses, with Ctrl-C in the middle of these calls (1, 2, ...)."""
    made = []

    def losses(model, batch):
        made.append(batch)
        if len(made) in calls:
            os.kill(os.getpid(), signal.SIGINT)
        return mse(model, batch)

    return losses


def test_a_model_in_training_is_read_as_in_evaluation(tiny_model):
    model = copy.deepcopy(tiny_model(attention_dropout=0.5))
    ids = torch.randint(97, (1, 9), generator=torch.Generator().manual_seed(0))
    draft = copy.deepcopy(tiny_model(seed=1))
    want = list(decode(model, ids, max_new_tokens=8))
    logits, likelihoods = prefill(model, ids).logits, log_likelihoods(model, PADDED, ids, ids)
    for training in (model, draft):
        training.train()
        training.model.norm.eval()
        training.gradient_checkpointing_enable({"use_reentrant": False})
    for proposer in (None, ModelProposer(draft)):
        rounds = list(decode(model, ids, proposer, max_new_tokens=8))
        texts = [[token for r in run for token in r.tokens[0]] for run in (rounds, want)]
        assert texts[0] == texts[1]
    assert torch.equal(prefill(model, ids).logits, logits)
    prefix = prefill(model, ids[:, :4])
    assert log_likelihoods(model, PADDED, ids[:, 4:], ids, prefix) == pytest.approx(
        log_likelihoods(model.eval(), PADDED, ids[:, 4:], ids, prefix)
    )
    assert log_likelihoods(model, PADDED, ids, ids) == pytest.approx(likelihoods)
    assert draft.training
    assert not draft.model.norm.training


# the loop


def test_fit_is_the_plain_loop():
    model, plain, data = (
        net(dtype=torch.float64),
        net(dtype=torch.float64),
        rows(dtype=torch.float64),
    )
    steps, warmup, decay, rate, clip = 11, 3, 0.4, 0.05, 0.3
    history = fit(model, DataLoader(data, batch_size=8), mse, steps=steps, learning_rate=rate, betas=(0.8, 0.9),
                  weight_decay=0.2, warmup=warmup, decay=decay, clip=clip)  # fmt: skip
    parameters = list(plain.parameters())
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if p.ndim == 2], "weight_decay": 0.2},
                                   {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}],
                                  betas=(0.8, 0.9))  # fmt: skip
    falling = round(decay * steps)
    want = []
    for step in range(steps):
        share = min(step / warmup, 1.0, (steps - step) / falling)
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        batch = {
            k: torch.stack([row[k] for row in data[step % 4 * 8 : step % 4 * 8 + 8]])
            for k in data[0]
        }
        loss = mse(plain, batch)["mse"]
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        want.append(
            {
                "loss": loss.item(),
                "mse": loss.item(),
                "grad_norm": norm.item(),
                "learning_rate": rate * share,
            }
        )
    assert near(model, plain, atol=1e-12)
    assert any(entry["grad_norm"] > clip for entry in want)
    assert [entry["step"] for entry in history] == list(range(1, steps + 1))
    for got, entry in zip(history, want, strict=True):
        assert {key: got[key] for key in entry} == pytest.approx(entry, abs=1e-6)


def test_named_losses_add_up():
    two = lambda model, batch: {
        "a": 0.25 * mse(model, batch)["mse"],
        "b": 0.75 * mse(model, batch)["mse"],
    }
    one, other = net(), net()
    history = fit(one, loader(), two, steps=4, **QUICK)
    fit(other, loader(), mse, steps=4, **QUICK)
    assert near(one, other)
    assert all(entry["loss"] == pytest.approx(entry["a"] + entry["b"]) for entry in history)
    assert all(entry["b"] == pytest.approx(3 * entry["a"], rel=1e-5) for entry in history)


def two_terms(model, batch):
    return {
        "mse": mse(model, batch)["mse"],
        "size": sum(p.square().sum() for p in model.parameters()),
    }


def test_factors_are_of_their_loss_and_step():
    one, two, seen = net(), net(), []

    def factors(step):
        seen.append(step)
        return {"size": 0.0 if step < 3 else 0.5}

    history = fit(one, loader(), two_terms, steps=4, loss_weight_schedule=factors, **QUICK)
    steps = iter(range(1, 5))

    def by_hand(model, batch):
        named = two_terms(model, batch)
        return {"mse": named["mse"], "size": named["size"] * (0.0 if next(steps) < 3 else 0.5)}

    other = fit(two, loader(), by_hand, steps=4, **QUICK)
    assert seen == [1, 2, 3, 4]
    assert same(one, two)
    assert figures(history) == figures(other)
    assert history[0]["size"] == 0 < history[3]["size"]


def test_a_factor_of_no_loss_is_refused():
    with pytest.raises(KeyError, match="other"):
        fit(
            net(),
            loader(),
            two_terms,
            steps=1,
            loss_weight_schedule=lambda step: {"other": 1.0},
            **QUICK,
        )


def test_shares_are_of_the_gradients_norm():
    model = net()
    norms = {}
    for name, value in two_terms(model, next(iter(loader()))).items():
        parts = torch.autograd.grad(value, list(model.parameters()))
        norms[name] = (3.0 if name == "size" else 1.0) * sum(
            part.square().sum() for part in parts
        ).sqrt().item()
    history = fit(
        model,
        loader(),
        two_terms,
        steps=1,
        loss_weight_schedule=lambda step: {"size": 3.0},
        shares_every=1,
        **QUICK,
    )
    assert history[0]["share_size"] == pytest.approx(norms["size"] / sum(norms.values()), abs=1e-6)
    assert history[0]["share_mse"] == pytest.approx(norms["mse"] / sum(norms.values()), abs=1e-6)
    later = fit(net(), loader(), two_terms, steps=4, shares_every=2, **QUICK)
    assert ["share_mse" in entry for entry in later] == [False, True, False, True]


def test_logging_shares_changes_nothing():
    one, two = net(dropout=0.3), net(dropout=0.3)
    fit(one, loader(), two_terms, steps=3, **QUICK)
    fit(two, loader(), two_terms, steps=3, shares_every=1, **QUICK)
    assert same(one, two)


def test_a_term_without_a_gradient_has_no_share():
    constant = {"constant": torch.tensor(5.0)}
    history = fit(
        net(), loader(), lambda m, b: mse(m, b) | constant, steps=1, shares_every=1, **QUICK
    )
    assert history[0]["share_mse"] == 1
    assert "share_constant" not in history[0]


def test_accumulated_batches_are_one_batch():
    whole, parts = net(), net()
    want = fit(whole, loader(8), mse, steps=6, weight=tokens, **QUICK)
    got = fit(parts, loader(4), mse, steps=6, weight=tokens, accumulate=2, **QUICK)
    assert near(whole, parts)
    assert [entry["weight"] for entry in want] == [entry["weight"] for entry in got] == [24.0] * 6
    for key in ("loss", "grad_norm"):
        assert [entry[key] for entry in got] == pytest.approx(
            [entry[key] for entry in want], abs=1e-6
        )


def test_losses_over_different_tokens_each_have_a_weight():
    def both(model, batch):
        error, few = (
            (model(batch["x"]) - batch["y"]).pow(2).mean(-1),
            batch["weights"] * (batch["x"].sum(-1) > 0),
        )
        return mse(model, batch) | {"few": (error.sqrt() * few).sum() / few.sum().clamp_min(1e-9)}

    def each(batch):
        return {
            "mse": batch["weights"].sum(),
            "few": (batch["weights"] * (batch["x"].sum(-1) > 0)).sum(),
        }

    whole, parts, wrong = net(), net(), net()
    want = fit(whole, loader(8), both, steps=6, weight=each, **QUICK)
    got = fit(parts, loader(4), both, steps=6, weight=each, accumulate=2, **QUICK)
    fit(wrong, loader(4), both, steps=6, weight=tokens, accumulate=2, **QUICK)
    assert near(whole, parts)
    assert not near(whole, wrong, atol=1e-4)
    for key in ("loss", "few", "weight"):
        assert [entry[key] for entry in got] == pytest.approx(
            [entry[key] for entry in want], abs=1e-6
        )


def test_without_weight_a_mean_of_means_is_not_the_mean():
    whole, parts = net(), net()
    fit(whole, loader(8), mse, steps=6, **QUICK)
    fit(parts, loader(4), mse, steps=6, accumulate=2, **QUICK)
    assert not near(whole, parts, atol=1e-3)


def test_batches_of_equal_weight_need_no_weight():
    plain = lambda model, batch: {"mse": (model(batch["x"]) - batch["y"]).pow(2).mean()}
    whole, parts = net(), net()
    fit(whole, loader(8), plain, steps=6, **QUICK)
    fit(parts, loader(4), plain, steps=6, accumulate=2, **QUICK)
    assert near(whole, parts)


def test_frozen_parameters_stay():
    model = net()
    model[0].requires_grad_(False)
    start = copy.deepcopy(model)
    fit(model, loader(), mse, steps=3, **QUICK)
    assert same(model[0], start[0])
    assert not near(model[4], start[4])
    assert all(p.grad is None for p in model[0].parameters())


def test_shuffling_depends_on_seed_alone():
    runs = [
        fit(net(), loader(shuffle=True), mse, steps=8, seed=seed, **QUICK) for seed in (0, 0, 1)
    ]
    assert figures(runs[0]) == figures(runs[1])
    assert runs[0][0]["loss"] != runs[2][0]["loss"]


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_shows_every_row_once(shuffle):
    seen = []

    def watching(model, batch):
        seen.append(batch["x"])
        return mse(model, batch)

    fit(net(), loader(shuffle=shuffle), watching, steps=8)
    every = torch.stack([row["x"] for row in rows()])
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    for epoch in (first, second):
        assert sorted(epoch.flatten(1).tolist()) == sorted(every.flatten(1).tolist())
    assert torch.equal(first, second) != shuffle


# evaluation and modes


def test_evaluate_joins_the_history():
    training, seen, model = [], [], net()

    def watching(m, batch):
        training.append(m.training)
        return mse(m, batch)

    def evaluate(m):
        seen.append((m, m.training, copy.deepcopy(m[0].weight.detach())))
        return {"score": len(seen)}

    history = fit(model, loader(), watching, steps=7, evaluate=evaluate, every=3, **QUICK)
    assert [entry.get("score") for entry in history] == [None, None, 1, None, None, 2, 3]
    assert all(m is model and not mode for m, mode, _ in seen)
    assert torch.equal(seen[-1][2], model[0].weight)
    assert training == [True] * 7
    assert not model.training


def test_evaluate_at_the_end_is_called_once():
    history = fit(net(), loader(), mse, steps=6, evaluate=lambda m: {"score": 1}, every=3)
    assert [entry.get("score") for entry in history] == [None, None, 1, None, None, 1]


# precision


def test_fits_of_different_precision_follow_each_other():
    model, x = net(), rows()[0]["x"]
    fit(model, loader(), mse, steps=3, precision="no", **QUICK)
    seen = []

    def watching(m, batch):
        seen.append(m[0](batch["x"]).dtype)
        hooked = m[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
        named = mse(m, batch)
        hooked.remove()
        return named

    fit(model, loader(), watching, steps=1, precision="bf16", **QUICK)
    assert seen[1] == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters())
    again = net()
    again.load_state_dict(model.state_dict())
    assert torch.equal(model(x), again(x)), (
        "the forward of a trained model still computes in half precision"
    )
    fit(model, loader(), mse, steps=3, precision="no", **QUICK)
    fit(again, loader(), mse, steps=3, precision="no", **QUICK)
    assert same(model, again)


def test_a_stopped_fit_leaves_the_models_forward():
    model, x = net(), rows()[0]["x"]
    want = model.eval()(x)
    with pytest.raises(KeyboardInterrupt):
        fit(model, loader(), killed(0), steps=3, precision="bf16")
    assert torch.equal(model.eval()(x), want)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_trained_model_and_its_moments_are_freed_with_its_last_name(precision, monkeypatch):
    model, optimizers, make = net(), [], torch.optim.AdamW
    monkeypatch.setattr(
        "torch.optim.AdamW",
        lambda *args, **kw: optimizers.append(make(*args, **kw)) or optimizers[0],
    )
    weight = weakref.ref(next(model.parameters()))
    gc.disable()
    try:
        fit(model, loader(), mse, steps=2, precision=precision)
        assert not optimizers[0].state  # here it has another name
        del model
        assert weight() is None
    finally:
        gc.enable()


# refusals


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model, reached = net(), []

    def exploding(m, batch):
        reached.append(copy.deepcopy(m))
        named = mse(m, batch)
        return {
            "fine": named["mse"],
            "broken": named["mse"] * (math.inf if len(reached) == 3 else 1.0),
        }

    with pytest.raises(FloatingPointError, match=r"Step 3: the loss 'broken' is inf") as error:
        fit(model, loader(), exploding, steps=9, **QUICK)
    assert "The weights are those of the step before" in str(error.value)
    assert same(model, reached[-1])
    assert not same(model, reached[0])


def test_a_bad_loss_in_the_second_batch_of_a_step_stops_too():
    calls, model = [], net()

    def exploding(m, batch):
        calls.append(copy.deepcopy(m))
        return {"mse": mse(m, batch)["mse"] * (math.nan if len(calls) == 6 else 1.0)}

    with pytest.raises(FloatingPointError, match=r"Step 3: the loss 'mse' is nan"):
        fit(model, loader(4), exploding, steps=9, accumulate=2, **QUICK)
    assert same(model, calls[-1])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": net().requires_grad_(False)}, "no parameter that requires a gradient"),
        ({"model": net(dtype=torch.bfloat16)}, r"half precision \(0.weight"),
        ({"model": net(dtype=torch.float16)}, "float32"),
        ({"loader": DataLoader(rows(4), batch_size=8, drop_last=True)}, "has no batch"),
    ],
)
def test_what_cannot_be_trained_is_refused(change, told):
    settings = {"model": net(), "loader": loader(), "losses": mse, "steps": 2} | change
    with pytest.raises(ValueError, match=told):
        fit(**settings)


def test_frozen_half_precision_is_fine():
    model = net()
    model[0].requires_grad_(False).to(torch.bfloat16)
    half = lambda m, batch: {
        "mse": (m[4](m[0](batch["x"].bfloat16()).float()) - batch["y"]).pow(2).mean()
    }
    fit(model, loader(), half, steps=2)
    assert model[0].weight.dtype == torch.bfloat16


# checkpoints


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("accumulate", "after"), [(1, 7), (1, 8), (2, 13), (1, 2)])
def test_a_stopped_run_goes_on_to_the_bit(tmp_path, shuffle, dropout, accumulate, after):
    settings = {
        "steps": 12,
        "accumulate": accumulate,
        "weight": tokens,
        "every": 4 if after == 8 else 3,
    } | QUICK
    whole, stopped = net(dropout=dropout), net(dropout=dropout)
    want = fit(whole, loader(shuffle=shuffle), mse, **settings)
    path = tmp_path / "runs" / "net.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, loader(shuffle=shuffle), killed(after), checkpoint=path, **settings)
    assert path.exists() == (after > 2)
    fresh, calls = net(seed=5, dropout=dropout), []
    if after == 2:
        fresh.load_state_dict(net(dropout=dropout).state_dict())

    def counting(model, batch):
        calls.append(1)
        return mse(model, batch)

    got = fit(fresh, loader(shuffle=shuffle), counting, checkpoint=path, **settings)
    every = settings["every"]
    assert len(calls) == (12 - after // accumulate // every * every) * accumulate
    assert same(fresh, whole)
    assert figures(got) == figures(want)


@pytest.mark.parametrize("every", [3, 100])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_ctrl_c_keeps_the_step_and_the_run_goes_on_to_the_bit(tmp_path, step, accumulate, every):
    path, model, fresh = tmp_path / "net.safetensors", net(dropout=0.3), net(5, dropout=0.3)
    settings = {"steps": 6, "accumulate": accumulate, "every": every} | QUICK
    settings["evaluate"] = lambda model: {"bias": model[0].bias.sum().item()}
    want = fit(model, loader(shuffle=True), mse, **settings)
    settings["checkpoint"] = path
    with pytest.raises(KeyboardInterrupt, match=f"step {step} of 6 is in {path}"):
        fit(net(dropout=0.3), loader(shuffle=True), interrupted(step * accumulate), **settings)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    calls = []
    losses = lambda model, batch: calls.append(1) or mse(model, batch)
    got = fit(fresh, loader(shuffle=True), losses, **settings)
    assert len(calls) == (6 - step) * accumulate
    assert same(fresh, model)
    assert figures(got) == figures(want)


def test_the_second_ctrl_c_does_not_wait_for_the_step(tmp_path):
    path = tmp_path / "net.safetensors"

    def losses(model, batch):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return pytest.fail("the step went on")

    with pytest.raises(KeyboardInterrupt):
        fit(net(), loader(), losses, steps=4, checkpoint=path, **QUICK)
    assert not path.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_is_only_read(tmp_path):
    path, model, fresh = tmp_path / "net.safetensors", net(), net(seed=5)
    settings = {"steps": 4, "checkpoint": path, "every": 3} | QUICK
    want = fit(model, loader(), mse, evaluate=lambda m: {"score": 1.0}, **settings)
    assert fit(fresh, loader(), killed(0), evaluate=lambda m: {"score": 2.0}, **settings) == want
    assert same(model, fresh)
    assert not fresh.training


def test_a_checkpoint_is_safetensors_with_a_readable_header(tmp_path):
    path, model = tmp_path / "net.safetensors", net()
    model[1].requires_grad_(False)
    history = fit(model, loader(), mse, steps=4, checkpoint=path, every=3, **QUICK)
    tensors = load_file(path)
    for name, p in model.named_parameters():
        assert (f"weights.{name}" in tensors) == p.requires_grad
        assert not p.requires_grad or torch.equal(tensors[f"weights.{name}"], p)
        assert not p.requires_grad or tensors[f"adamw.{name}.exp_avg_sq"].shape == p.shape
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["kvlab"])["history"] == history
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_while_writing_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path, settings = tmp_path / "net.safetensors", {"steps": 6, "every": 3} | QUICK
    whole, fresh = net(), net(seed=5)
    fit(whole, loader(), mse, **settings)
    calls = []

    def dying(tensors, filename, metadata=None):
        calls.append(1)
        if len(calls) == 2:
            Path(filename).write_bytes(b"half a file")
            raise KeyboardInterrupt
        save_file(tensors, filename, metadata)

    monkeypatch.setattr("kvlab.files.save_file", dying)
    with pytest.raises(KeyboardInterrupt):
        fit(net(), loader(), mse, checkpoint=path, **settings)
    monkeypatch.undo()
    fit(fresh, loader(), mse, checkpoint=path, **settings)
    assert same(whole, fresh)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": 9}, r"'steps': \(6, 9\)"),
        ({"seed": 1}, r"'seed': \(0, 1\)"),
        ({"learning_rate": 0.1}, "learning_rate"),
        ({"accumulate": 2}, "accumulate"),
        ({"clip": 0.5}, "clip"),
        ({"precision": "bf16"}, "precision"),
        ({"model": nn.Linear(3, 2)}, "other parameters"),
        ({"model": nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(1), nn.Identity(), nn.Identity(), nn.Linear(1, 2))},
         "other parameters"),
    ],
    ids=["steps", "seed", "rate", "accumulate", "clip", "precision", "names", "shapes"],
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, told):
    path = tmp_path / "net.safetensors"
    settings = {
        "model": net(),
        "loader": loader(),
        "losses": mse,
        "steps": 6,
        "checkpoint": path,
    } | QUICK
    fit(**settings)
    settings |= {"model": net()} | change
    before, kept = copy.deepcopy(settings["model"]), path.read_bytes()
    with pytest.raises(ValueError, match=told) as error:
        fit(**settings)
    assert "another run" in str(error.value)
    assert "delete it" in str(error.value)
    assert same(settings["model"], before)
    assert path.read_bytes() == kept


@pytest.mark.parametrize("damage", ["truncated", "empty", "no header", "text"])
def test_a_damaged_checkpoint_is_told(tmp_path, damage):
    path = tmp_path / "net.safetensors"
    fit(net(), loader(), mse, steps=2, checkpoint=path)
    if damage == "no header":
        save_file(load_file(path), path)
    else:
        whole = path.read_bytes()
        path.write_bytes(
            {"truncated": whole[:-100], "empty": b"", "text": b"not a checkpoint"}[damage]
        )
    with pytest.raises(ValueError, match=r"net\.safetensors is no checkpoint .*delete it"):
        fit(net(), loader(), mse, steps=2, checkpoint=path)


# processes

SCRIPT = """
import os
import sys

from safetensors.torch import save_file

sys.path.insert(0, {tests!r})
from test_training import QUICK, fit, interrupted, loader, mse, net, tokens, killed

RUNS = {{"plain": (False, 1), "shuffled": (True, 1), "accumulated": (True, 2)}}


def main(folder):
    tensors, sizes = {{}}, set()

    def watching(model, batch):
        sizes.add(len(batch["x"]))
        return mse(model, batch)

    for name, (shuffle, accumulate) in RUNS.items():
        model = net()
        history = fit(model, loader(shuffle=shuffle), watching, steps=6, accumulate=accumulate, weight=tokens, **QUICK)
        tensors |= {{f"{{name}}.{{key}}": value for key, value in model.state_dict().items()}}
        tensors[name + ".loss"] = model[0].weight.new_tensor([entry["loss"] for entry in history])
    resumed, settings = net(), {{"steps": 6, "weight": tokens, "every": 2}} | QUICK
    try:
        fit(net(), loader(), killed(5), checkpoint=f"{{folder}}/run.safetensors", **settings)
    except KeyboardInterrupt:
        fit(resumed, loader(), mse, checkpoint=f"{{folder}}/run.safetensors", **settings)
    tensors |= {{f"resumed.{{key}}": value for key, value in resumed.state_dict().items()}}
    went_on, path = net(), f"{{folder}}/stopped.safetensors"
    calls = [3] if os.environ.get("RANK", "1") == "1" else []  # the process that does not write
    try:
        fit(net(), loader(), interrupted(*calls), checkpoint=path, **settings)
    except KeyboardInterrupt as error:
        assert str(error) == f"step 3 of 6 is in {{path}}", error
        fit(went_on, loader(), mse, checkpoint=path, **settings)
    tensors |= {{f"went_on.{{key}}": value for key, value in went_on.state_dict().items()}}
    return tensors, sizes


if __name__ == "__main__":
    tensors, sizes = main(sys.argv[1])
    assert sizes == {{4}}, sizes
    save_file(tensors, f"{{sys.argv[1]}}/{{os.environ['RANK']}}.safetensors")
"""


def test_two_processes_give_the_weights_of_one(tmp_path):
    script, together, alone = tmp_path / "script.py", tmp_path / "two", tmp_path / "one"
    together.mkdir()
    alone.mkdir()
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests")))
    # What `accelerate launch` runs for several GPUs; `--standalone` takes a free port.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        together,
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    want, _ = runpy.run_path(str(script), run_name="alone")["main"](alone)
    for rank in (0, 1):
        got = load_file(together / f"{rank}.safetensors")
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            torch.testing.assert_close(
                got[name], tensor, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("steps", 0, "steps is 0 and accumulate 1, expected 1 or more"),
        ("accumulate", -1, "accumulate -1, expected 1 or more"),
        ("learning_rate", -1e-3, r"learning_rate is -0\.001, expected 0 or more"),
        ("learning_rate", float("nan"), "learning_rate is nan, expected 0 or more"),
        ("weight_decay", -0.1, r"weight_decay is -0\.1, expected 0 or more"),
        ("weight_decay", float("inf"), "weight_decay is inf, expected 0 or more"),
        ("warmup", -1, "warmup is -1, expected 0 or more"),
        ("decay", 1.5, r"decay is 1\.5 and clip 1\.0, expected a fraction"),
        ("decay", -0.5, r"decay is -0\.5 and clip 1\.0, expected a fraction"),
        ("clip", 0.0, r"and clip 0\.0, expected .* a number above 0"),
        ("clip", -1.0, r"and clip -1\.0, expected .* a number above 0"),
        ("every", 0, "every is 0, expected a positive number of steps"),
        ("betas", (0.9, 1.5), "[Ii]nvalid beta"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_the_first_step(setting, value, message):
    model = net()
    before = copy.deepcopy(model)
    options = {"steps": 4, setting: value}
    with pytest.raises(ValueError, match=message):
        fit(model, DataLoader(rows(), batch_size=8), mse, **options)
    assert near(model, before, atol=0)


@pytest.mark.parametrize("value", [-1, float("nan")])
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (settings, name)
        for settings, names in [
            (FuserArm, "steps batch_size learning_rate accumulate"),
            (DraftSettings, "epochs batch_size learning_rate accumulate every"),
            (AlignmentSettings, "epochs batch_size learning_rate accumulate kv_weight kv_warmup"),
            (partial(DistillSettings, layer=1), "rank scorer_hidden_size sinks chunk_size"),
        ]
        for name in names.split()
    ],
)
def test_each_chapter_refuses_settings_of_training_where_they_are_made(settings, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected [01] or more"):
        settings(**{name: value})
