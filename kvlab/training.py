"""`fit`: one training loop, on Accelerate, for everything in kvlab that trains.

It knows nothing of what is trained: a model, a loader, and a function from a batch to named losses.
The same call runs on a CPU, on one GPU, or under `accelerate launch` on many, and gives the same
weights for the same global batch.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed, tqdm
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_wsd_schedule

from kvlab.files import write_tensors

Losses = Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]]
Weight = Callable[[Mapping[str, Tensor]], Tensor | Mapping[str, Tensor]]


@dataclass(frozen=True)
class FitSettings:
    """How `fit` optimizes: AdamW, with a rate that rises, stays, and falls.

    Args:
        steps: Optimizer steps.
        learning_rate: Highest learning rate.
        betas: AdamW's decay rates of the moments.
        weight_decay: Of all weights except biases, norms and gates.
        warmup: Steps over which the rate rises.
        decay: Fraction of the steps, at the end, over which the rate falls to 0.
        clip: Largest norm of the gradient.
        accumulate: Batches per optimizer step.
        precision: Precision of the arithmetic; weights stay in float32.
        seed: Random seed (shuffling, dropout).
    """

    steps: int
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    warmup: int = 100
    decay: float = 0.4
    clip: float = 1.0
    accumulate: int = 1
    precision: Literal["no", "fp16", "bf16"] = "no"
    seed: int = 0

    def __post_init__(self):
        if min(self.steps, self.accumulate) < 1:
            counts = f"steps is {self.steps} and accumulate {self.accumulate}, expected 1 or more"
            raise ValueError(f"{counts}: give more examples, or a smaller batch or accumulate.")
        require_least(self, learning_rate=0, weight_decay=0, warmup=0)
        if not 0 <= self.decay <= 1 or not self.clip > 0:
            expected = "a fraction from 0 to 1, and a number above 0"
            raise ValueError(f"decay is {self.decay} and clip {self.clip}, expected {expected}.")


def require_least(settings: object, **least: float) -> None:
    """Refuse settings that are less than they may be, or no finite number.

    Example:
        >>> require_least(FitSettings(steps=5), steps=9)
        Traceback (most recent call last):
        ValueError: steps is 5, expected 9 or more.
    """
    for name, value in least.items():
        number = getattr(settings, name)
        if not value <= number < math.inf:
            raise ValueError(f"{name} is {number}, expected {value} or more.")


def fit(
    model: nn.Module,
    loader: DataLoader,
    losses: Losses,
    *,
    weight: Weight | None = None,
    loss_weight_schedule: Callable[[int], Mapping[str, float]] | None = None,
    on_step: Callable[[int], None] | None = None,
    shares_every: int = 0,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    checkpoint: str | Path | None = None,
    every: int = 200,
    **settings,
) -> list[dict[str, float]]:
    """Train the parameters of `model` that require a gradient.

    Args:
        model: Changed in place; parameters with `requires_grad=False` are left alone.
        loader: Batches are dicts of tensors; `batch_size` is the global batch, whatever the number of
            processes. Its batches must be full (`drop_last=True`) for that number not to matter.
        losses: `losses(model, batch)` returns named scalar losses, coefficients applied; their sum is
            minimized.
        weight: A batch's weight, for example its number of answer tokens. A loss that is a mean over
            tokens then stays an exact mean over all tokens of the step, across batches and processes.
            Where losses are means over different tokens, a weight for each by name.
        loss_weight_schedule: Weights of named losses at a step (1, 2, ...), where they are not 1.
        on_step: Called with the number of each step before it, for example to anneal a temperature.
        shares_every: Steps between logs of each loss's fraction of the gradient norm, "share_NAME"
            (0: never). A loss whose share is 0 teaches nothing.
        evaluate: Called with the model every `every` steps and at the end; its figures join the history.
        checkpoint: A safetensors file, written every `every` steps, at the end and on Ctrl-C, which
            waits for the end of the step. If it exists, training resumes from it.
        every: Steps between checkpoints and evaluations.
        **settings: Of `FitSettings`.

    Returns:
        A dict per step: step, loss, each named loss, grad_norm, learning_rate, weight, seconds, and
        what `evaluate` returned.

    Raises:
        FloatingPointError: a loss is not finite; the weights are those of the step before.
        KeyboardInterrupt: Ctrl-C; the message names the step and the checkpoint that has it.
        ValueError: nothing to train, half-precision weights, an empty loader, a checkpoint of another run.

    Example:
        >>> points = DataLoader([{"x": torch.ones(1)}] * 8, batch_size=4)
        >>> loss = lambda model, batch: {"mse": (model(batch["x"]) - 3).pow(2).mean()}
        >>> history = fit(nn.Linear(1, 1), points, loss, steps=80, learning_rate=0.1)
        >>> history[-1]["mse"] < 0.1 < history[0]["mse"]
        True
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _require_trainable(trainable, loader, every)
    settings = FitSettings(**settings)
    accelerator = _new_accelerator(settings)
    optimizer, schedule = _make_optimizer(trainable, settings)
    run = asdict(settings) | {"betas": list(settings.betas), "batch_size": loader.batch_size}
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    optimizer.zero_grad()  # an interrupted run may have left gradients
    history = []
    if checkpoint and Path(checkpoint).exists():
        history = _resume(Path(checkpoint), trainable, optimizer, schedule, run)
    batches = _endless(loader, skip=len(history) * settings.accumulate)
    bar = tqdm(total=settings.steps, initial=len(history), desc=type(model).__name__)
    alone = accelerator.num_processes == 1
    training_mode = _training_mode(model, wrapped, accelerator, optimizer)
    with training_mode, bar, _delayed_interrupts(alone) as interrupts:
        for step in range(len(history) + 1, settings.steps + 1):
            started = time.perf_counter()
            group = list(islice(batches, settings.accumulate))
            # A resumed run draws what the whole one would have drawn.
            set_seed((1_000_003 * settings.seed + step) % 2**32)
            if on_step:
                on_step(step)
            loss_weights = loss_weight_schedule(step) if loss_weight_schedule else {}
            logged = [*trainable.values()] if shares_every and step % shares_every == 0 else []
            entry = {"step": step}
            entry |= _backward(accelerator, wrapped, losses, group, weight, loss_weights, logged)
            _require_finite(entry)
            norm = accelerator.clip_grad_norm_(trainable.values(), settings.clip)
            entry["grad_norm"] = float(norm)
            entry["learning_rate"] = schedule.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            entry["seconds"] = time.perf_counter() - started
            history.append(entry)
            bar.update()
            bar.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
            is_due = step % every == 0 or step == settings.steps
            if is_due and evaluate:
                entry |= _evaluated(model, evaluate)
            is_stopped = _in_any_process(accelerator, interrupts)
            if (is_due or is_stopped) and checkpoint and accelerator.is_main_process:
                _save_run(Path(checkpoint), trainable, optimizer, schedule, run, history)
            if is_stopped:
                raise KeyboardInterrupt(f"step {step} of {settings.steps} is in {checkpoint}")
    return history


def _evaluated(model: nn.Module, evaluate: Callable) -> Mapping[str, float]:
    model.eval()
    figures = evaluate(model)
    model.train()
    return figures


@contextmanager
def _delayed_interrupts(alone: bool) -> Iterator[list[int]]:
    """Collect Ctrl-C, so that a step ends whole. The second stops at once, if no process waits."""
    interrupts = []

    def collect(number: int, _) -> None:
        if interrupts and alone:
            raise KeyboardInterrupt
        interrupts.append(number)

    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupts
        return
    signal.signal(signal.SIGINT, collect)
    try:
        yield interrupts
        if interrupts:  # while the last step was saved
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_any_process(accelerator: Accelerator, interrupts: list[int]) -> bool:
    """Whether a process got Ctrl-C: all must stop after the same step, else the others wait for it."""
    count = len(interrupts)
    if accelerator.num_processes > 1:
        count = accelerator.reduce(torch.tensor(count, device=accelerator.device)).item()
    return count > 0


@contextmanager
def _training_mode(model: nn.Module, wrapped: nn.Module, accelerator: Accelerator, optimizer):
    wrapped.train()
    try:
        yield
    finally:
        # Else the model's forward would stay in autocast, and the next call would take it as prepared.
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        vars(wrapped).pop("_is_accelerate_prepared", None)
        # References in circles would keep weights and moments until Python collects its garbage.
        if getattr(vars(model).get("forward"), "__func__", None) is type(model).forward:
            del model.forward
        optimizer.state.clear()
        optimizer.param_groups.clear()
        model.eval()


def _require_trainable(trainable: dict, loader: DataLoader, every: int) -> None:
    if not trainable:
        raise ValueError("The model has no parameter that requires a gradient: unfreeze some.")
    halves = [name for name, p in trainable.items() if p.dtype in (torch.float16, torch.bfloat16)]
    if halves:
        hint = "keep weights in float32 (model.float()), and pass precision='fp16' or 'bf16'"
        raise ValueError(
            f"{len(halves)} parameters are in half precision ({halves[0]}, ...): {hint}."
        )
    if len(loader) == 0:
        raise ValueError("The loader has no batch: is batch_size larger than the data set?")
    if every < 1:
        raise ValueError(f"every is {every}, expected a positive number of steps.")


def _new_accelerator(settings: FitSettings) -> Accelerator:
    AcceleratorState._reset_state()  # a notebook calls fit again, perhaps with another precision
    set_seed(settings.seed)
    data = {"split_batches": True, "use_seedable_sampler": True, "data_seed": settings.seed}
    config = DataLoaderConfiguration(**data)
    return Accelerator(mixed_precision=settings.precision, dataloader_config=config)


def _make_optimizer(trainable: dict, settings: FitSettings):
    """Return AdamW, which decays matrices and leaves biases, norms and gates to the data, and its schedule."""
    decayed, free = [], []
    for name, parameter in trainable.items():
        decays = parameter.ndim >= 2 and "norm" not in name and not name.endswith("bias")
        (decayed if decays else free).append(parameter)
    groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    options = {"lr": settings.learning_rate, "betas": settings.betas, "fused": True}
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, **options)
    warmup = min(settings.warmup, settings.steps // 2)
    falling = round(settings.decay * settings.steps)
    stages = {"num_training_steps": settings.steps, "decay_type": "linear"}
    return optimizer, get_wsd_schedule(optimizer, warmup, falling, **stages)


def _endless(loader: DataLoader, skip: int) -> Iterator[Mapping[str, Tensor]]:
    """Yield batches without end; the first `skip` are passed over without being made."""
    epoch, skip = divmod(skip, len(loader))
    while True:
        loader.set_epoch(epoch)
        yield from skip_first_batches(loader, skip) if skip else loader
        epoch, skip = epoch + 1, 0


def _gradient_shares(named: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, float]:
    """Return each loss's fraction of the gradient: its norm over the sum of the norms."""
    norms = {}
    for name, value in named.items():
        if value.requires_grad:
            grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            norms[name] = sum(g.square().sum().item() for g in grads if g is not None) ** 0.5
            del grads  # before those of the next loss
    total = sum(norms.values()) or 1.0
    return {f"share_{name}": norm / total for name, norm in norms.items()}


def _batch_weights(group: Sequence, weight: Weight | None, device) -> tuple[Tensor, list[str]]:
    """Return the weight of each batch, (batches, 1), or of each batch and loss, (batches, losses)."""
    rows, names = [], []
    for batch in group:
        value = weight(batch) if weight else 1.0
        if isinstance(value, Mapping):
            names = list(value)
        values = value.values() if isinstance(value, Mapping) else [value]
        rows.append(
            torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device) for v in values])
        )
    return torch.stack(rows), names


def _backward(accelerator, model, losses, group, weight, loss_weights, logged) -> dict[str, float]:
    """Backward through the batches of a step; returns losses averaged by weight over batches and processes."""
    weights, names = _batch_weights(group, weight, accelerator.device)
    total = accelerator.reduce(weights.sum(0), reduction="sum").clamp_min(1e-9)
    fractions = weights / total
    sums: dict[str, Tensor] = {}
    shares: dict[str, float] = {}
    for i, batch in enumerate(group):
        last = i == len(group) - 1
        with model.no_sync() if not last and hasattr(model, "no_sync") else nullcontext():
            named = dict(losses(model, batch))
            for name, factor in loss_weights.items():
                named[name] = named[name] * factor
            if logged and i == 0:
                scale = (
                    accelerator.scaler.get_scale() if accelerator.scaler else 1.0
                )  # fp16 underflows
                shares = _gradient_shares({k: scale * v for k, v in named.items()}, logged)
            averaged = {
                name: value * fractions[i, names.index(name) if names else 0]
                for name, value in named.items()
            }
            # DistributedDataParallel takes the mean over processes; the factor makes it a sum.
            accelerator.backward(sum(averaged.values()) * accelerator.num_processes)
        for name, value in averaged.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    means = accelerator.reduce(torch.stack([*sums.values(), total[0]]), reduction="sum").tolist()
    total_weight = means.pop() / accelerator.num_processes
    entry = dict(zip(sums, means, strict=True))
    return {"loss": sum(means)} | entry | shares | {"weight": total_weight}


def _require_finite(entry: Mapping[str, float]) -> None:
    bad = [name for name, value in entry.items() if not math.isfinite(value) and name != "loss"]
    if bad:
        raise FloatingPointError(
            f"Step {entry['step']}: the loss {bad[0]!r} is {entry[bad[0]]}, expected a finite number. The "
            "weights are those of the step before: lower the rate, check the batch, or use float32."
        )


def _save_run(path: Path, trainable, optimizer, schedule, run, history) -> None:
    """Write one safetensors file: weights and AdamW moments, and in its header the rest as JSON."""
    tensors = {}
    for name, parameter in trainable.items():
        tensors[f"weights.{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adamw.{name}.{key}"] = value
    state = {"run": run, "schedule": schedule.state_dict(), "history": history}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {"kvlab": json.dumps(state, default=float)})


def _resume(path: Path, trainable, optimizer, schedule, run) -> list[dict[str, float]]:
    """Load weights, moments and schedule of a checkpoint of the same run, and return its history."""
    try:
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["kvlab"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is no checkpoint of `fit` ({error}): delete it to start again."
        ) from error
    before = state["run"]
    differing = {key: (before.get(key), new) for key, new in run.items() if before.get(key) != new}
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("weights.")}
    if differing or shapes != {f"weights.{name}": p.shape for name, p in trainable.items()}:
        raise ValueError(
            f"{path} is a checkpoint of another run (saved, expected: {differing or 'other parameters'}): "
            "delete it to start again, or call fit with the settings that it was made with."
        )
    for name, parameter in trainable.items():
        parameter.data.copy_(tensors[f"weights.{name}"])
        moments = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"adamw.{name}.{key}" in tensors:
                moments[key] = tensors[f"adamw.{name}.{key}"].to(parameter.device)
        optimizer.state[parameter] = moments
    schedule.load_state_dict(state["schedule"])
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    return state["history"]
