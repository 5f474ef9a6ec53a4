"""`fit`: one training loop, on Accelerate, for everything in kvlab that trains.

It knows nothing of what is trained: a model, a loader, and a function from a batch to named losses.
The same call runs on a CPU, on one GPU, or under `accelerate launch` on many, and gives the same
weights for the same global batch.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_wsd_schedule

from kvlab.files import write_tensors

Losses = Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]]


def fit(
    model: nn.Module,
    loader: DataLoader,
    losses: Losses,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.98),
    weight_decay: float = 0.05,
    warmup: int = 100,
    decay: float = 0.4,
    clip: float = 1.0,
    accumulate: int = 1,
    precision: str = "no",
    weight: Callable[[Mapping[str, Tensor]], Tensor | Mapping[str, Tensor]] | None = None,
    factors: Callable[[int], Mapping[str, float]] | None = None,
    shares_every: int = 0,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    checkpoint: str | Path | None = None,
    every: int = 200,
    seed: int = 0,
    label: str = "fit",
) -> list[dict[str, float]]:
    """Train the parameters of `model` that require a gradient, with AdamW, for `steps` optimizer steps.

    Args:
        model: changed in place; parameters with `requires_grad=False` are left alone.
        loader: batches are dicts of tensors; `batch_size` is the global batch, whatever the number
            of processes. It is read again from its start when it ends. For the number of processes
            not to matter, batches must be full (`drop_last=True`).
        losses: `losses(model, batch)` returns named scalar losses, coefficients applied; their sum
            is minimized.
        steps, warmup, decay: optimizer steps. The rate rises over `warmup`, stays, and falls over
            the last share `decay`.
        accumulate: batches for one optimizer step.
        precision: "no", "fp16" or "bf16", as Accelerate names them.
        weight: a batch's weight (its number of answer tokens, say). A loss that is a mean over
            tokens then stays an exact mean over all tokens of the step, across batches and
            processes. By default batches weigh the same. Where losses are means over different
            tokens, a weight for each by name; the history has the first.
        factors: of named losses at a step (1, 2, ...), where they are not 1: for terms that come
            late or fade. The history has losses times their factors. A run that is resumed does not
            check that they are the same.
        shares_every: each so many steps, log the share that each loss has in the gradient, as
            "share_NAME": its norm over the sum of norms, for the step's first batch in this
            process. A term whose share is 0 teaches nothing.
        evaluate: called with the bare model every `every` steps and at the end; its figures join
            the history.
        checkpoint: a safetensors file, written every `every` steps and at the end. If it exists,
            training goes on from it.
        seed: with the step's number, of torch's, NumPy's and Python's generators, set anew before
            each step.

    Returns:
        A dict for each step, with step, loss, each named loss, grad_norm, learning_rate, weight,
        seconds, and what `evaluate` gave.

    Raises:
        FloatingPointError: a loss is not finite; the weights are those of the step before.
        ValueError: nothing to train, half-precision weights, an empty loader, a checkpoint of
            another run.

    Example:
        >>> line = nn.Linear(1, 1)
        >>> points = DataLoader([{"x": torch.ones(1)}] * 8, batch_size=4)
        >>> history = fit(line, points, lambda m, b: {"mse": (m(b["x"]) - 3).pow(2).mean()}, steps=80, learning_rate=0.1)
        >>> history[-1]["mse"] < 0.1 < history[0]["mse"]
        True
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _check(trainable, loader, steps, accumulate)
    AcceleratorState._reset_state()  # a notebook calls fit more than once, perhaps with another precision
    accelerator = Accelerator(
        mixed_precision=precision,
        dataloader_config=DataLoaderConfiguration(
            split_batches=True, use_seedable_sampler=True, data_seed=seed
        ),
    )
    set_seed(seed)
    optimizer = torch.optim.AdamW(_groups(trainable, weight_decay), lr=learning_rate, betas=betas)
    schedule = get_wsd_schedule(
        optimizer,
        num_warmup_steps=min(warmup, steps // 2),
        num_decay_steps=round(decay * steps),
        num_training_steps=steps,
        decay_type="linear",
    )
    run = {
        "steps": steps,
        "batch_size": loader.batch_size,
        "accumulate": accumulate,
        "learning_rate": learning_rate,
    }
    run |= {
        "betas": list(betas),
        "weight_decay": weight_decay,
        "warmup": warmup,
        "decay": decay,
        "clip": clip,
    }
    run |= {"precision": precision, "seed": seed}
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    wrapped.train()
    optimizer.zero_grad()  # a run that broke off may have left gradients
    history = []
    if checkpoint and Path(checkpoint).exists():
        history = _resume(Path(checkpoint), trainable, optimizer, schedule, run)
    batches = _batches(loader, skip=len(history) * accumulate)
    bar = tqdm(
        total=steps, initial=len(history), desc=label, disable=not accelerator.is_local_main_process
    )
    try:
        while len(history) < steps:
            started, step = time.perf_counter(), len(history) + 1
            group = list(islice(batches, accumulate))
            set_seed(
                (1_000_003 * seed + step) % 2**32
            )  # a resumed run draws what the whole one would have drawn
            scaled = _scaled(losses, factors(step)) if factors else losses
            logged = list(trainable.values()) if shares_every and step % shares_every == 0 else []
            entry = _gradients(accelerator, wrapped, scaled, group, weight, step, logged)
            entry["grad_norm"] = float(accelerator.clip_grad_norm_(trainable.values(), clip))
            entry["learning_rate"] = schedule.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            entry["seconds"] = time.perf_counter() - started
            history.append(entry)
            bar.update()
            bar.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
            if step % every == 0 or step == steps:
                if evaluate:
                    model.eval()
                    entry.update(evaluate(model))
                    model.train()
                if checkpoint and accelerator.is_main_process:
                    _save(Path(checkpoint), trainable, optimizer, schedule, run, history)
    finally:
        bar.close()
        # Else the model's forward would stay in autocast, and the next call would take the model as prepared.
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        vars(wrapped).pop("_is_accelerate_prepared", None)
        model.eval()
    return history


def _check(
    trainable: dict[str, nn.Parameter], loader: DataLoader, steps: int, accumulate: int
) -> None:
    if not trainable:
        raise ValueError(
            "The model has no parameter that requires a gradient; unfreeze what is to be trained."
        )
    halves = [name for name, p in trainable.items() if p.dtype in (torch.float16, torch.bfloat16)]
    if halves:
        raise ValueError(
            f"{len(halves)} trainable parameters are in half precision (first: {halves[0]}); keep trained weights in "
            "float32 (model.float()) and pass precision='fp16' or 'bf16' for the arithmetic."
        )
    if len(loader) == 0:
        raise ValueError(
            "The loader gives no batch; expected at least one (is batch_size larger than the data set?)."
        )
    if steps < 1 or accumulate < 1:
        raise ValueError(f"steps is {steps} and accumulate {accumulate}; both must be at least 1.")


def _groups(trainable: dict[str, nn.Parameter], weight_decay: float) -> list[dict]:
    """Weight decay for matrices only: norms, biases and gates are left to the data."""
    return [
        {"params": [p for p in trainable.values() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable.values() if p.ndim < 2], "weight_decay": 0.0},
    ]


def _batches(loader: DataLoader, skip: int) -> Iterator[Mapping[str, Tensor]]:
    """Batches without end; the first `skip` are passed over without being made."""
    epoch, skip = divmod(skip, len(loader))
    while True:
        loader.set_epoch(epoch)
        yield from skip_first_batches(loader, skip) if skip else loader
        epoch, skip = epoch + 1, 0


def _scaled(losses: Losses, factors: Mapping[str, float]) -> Losses:
    def scaled(model, batch):
        named = losses(model, batch)
        unknown = sorted(factors.keys() - named.keys())
        if unknown:
            raise ValueError(
                f"factors has {', '.join(unknown)}, expected names of losses: {', '.join(named)}."
            )
        return {name: value * factors.get(name, 1.0) for name, value in named.items()}

    return scaled


def _shares(named: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> dict[str, float]:
    """Each loss's share of the gradient: its norm over the sum of the norms."""
    norms = {}
    for name, value in named.items():
        parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        norms[name] = sum(part.square().sum().item() for part in parts if part is not None) ** 0.5
    total = sum(norms.values()) or 1.0
    return {f"share_{name}": norm / total for name, norm in norms.items()}


def _gradients(accelerator, model, losses, group, weight, step, logged) -> dict[str, float]:
    """Backward through a group of batches; returns the step's losses, averaged by weight over batches and processes."""
    given = [weight(batch) if weight else 1.0 for batch in group]
    names = list(given[0]) if isinstance(given[0], Mapping) else []
    rows = [[float(w[name]) for name in names] if names else [float(w)] for w in given]
    weights = torch.tensor(
        rows, dtype=torch.float32, device=accelerator.device
    )  # (batches, 1 or losses)
    total = accelerator.reduce(weights.sum(0), reduction="sum").clamp_min(1e-9)
    sums: dict[str, Tensor] = {}
    shares: dict[str, float] = {}
    for i, batch in enumerate(group):
        last = i == len(group) - 1
        with model.no_sync() if not last and hasattr(model, "no_sync") else nullcontext():
            named = losses(model, batch)
            bad = [name for name, value in named.items() if not torch.isfinite(value)]
            if bad:
                raise FloatingPointError(
                    f"Step {step}: the loss {bad[0]!r} is {named[bad[0]].item()}, expected a finite number. The "
                    "weights are those of the step before; lower the rate, check the batch, or use float32."
                )
            if logged and not i:
                scale = (
                    accelerator.scaler.get_scale() if accelerator.scaler else 1.0
                )  # fp16 gradients underflow
                shares = _shares(
                    {name: scale * value for name, value in named.items() if value.requires_grad},
                    logged,
                )
            share = {
                name: (weights[i] / total)[names.index(name) if names else 0] for name in named
            }
            # DistributedDataParallel takes the mean over processes; the factor makes it a sum.
            accelerator.backward(
                sum(value * share[name] for name, value in named.items())
                * accelerator.num_processes
            )
        for name, value in named.items():
            sums[name] = sums.get(name, 0.0) + value.detach() * share[name]
    means = {
        name: accelerator.reduce(value, reduction="sum").item() for name, value in sums.items()
    }
    return {"step": step, "loss": sum(means.values()), **means, **shares, "weight": total[0].item()}


def _save(path: Path, trainable, optimizer, schedule, run, history) -> None:
    """Write one safetensors file, atomically: weights and AdamW moments, and in its header the rest as JSON."""
    tensors = {f"weights.{name}": p.detach() for name, p in trainable.items()}
    for name, p in trainable.items():
        tensors |= {
            f"adamw.{name}.{key}": value for key, value in optimizer.state.get(p, {}).items()
        }
    state = {"run": run, "schedule": schedule.state_dict(), "history": history}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {"kvlab": json.dumps(state, default=float)})


def _resume(path: Path, trainable, optimizer, schedule, run) -> list[dict[str, float]]:
    try:
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["kvlab"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is no checkpoint of `fit` ({error}); delete it to start again."
        ) from error
    differing = {
        key: (state["run"].get(key), value)
        for key, value in run.items()
        if state["run"].get(key) != value
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("weights.")}
    if differing or shapes != {f"weights.{name}": p.shape for name, p in trainable.items()}:
        raise ValueError(
            f"{path} is a checkpoint of another run (seen, expected: {differing or 'other parameters'}); "
            "delete it to start again, or call fit with the settings that it was made with."
        )
    for name, p in trainable.items():
        p.data.copy_(tensors[f"weights.{name}"])
        prefix = f"adamw.{name}."
        moments = {
            key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)
        }
        optimizer.state[p] = {
            key: t if key == "step" else t.to(p.device) for key, t in moments.items()
        }
    schedule.load_state_dict(state["schedule"])
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    return state["history"]
