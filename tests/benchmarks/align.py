"""4D alignment: what students learn by each arm and by controls, what it costs, and what each setting does."""

import hashlib
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from _benchmark import benchmark
from torch import Tensor
from tqdm.auto import tqdm

from kvlab import lab
from kvlab.align import (
    ARMS,
    AlignedStudent,
    AlignmentSettings,
    Problems,
    Projector,
    encode_with_teacher,
    pad_problems,
    plan_time,
    resample,
    segment,
    similar_layers,
    solved,
    train_arm,
)
from kvlab.evaluate import figure
from kvlab.lab import models
from kvlab.lab.corpora import Solutions
from kvlab.layers import layer_map, proportional, save_layer_map
from kvlab.records import extract_answer
from kvlab.scale import config_of

RUNS, HARD, CHECKS = Path("lab-runs/align"), (1, 3), 4
SEEDS, LONGEST = 5, 128  # tokens of a solution: a teacher's take up to 100
SETTINGS = {
    "problems": 600,
    "epochs": 56,
    "batch_size": 32,
    "accumulate": 1,
    "learning_rate": 2e-3,
    "kv_weight": 10.0,
    "codi_weight": 0.0,
    "kv_warmup": 0,
    "kv_end": 0.6,
    "start": "orthogonal",
    "freeze_projectors": True,
    "teacher_model": ["lab-teacher"],
    "fp16": False,
}
SOURCE = {"kv_weight": 1.0, "codi_weight": 0.5, "kv_warmup": 1000, "kv_end": 0.0}
SOURCE |= {"start": "xavier", "freeze_projectors": False}
CODI = {"codi_weight": 0.5}
# KaVa's two ablations; without the KV loss, CODI is all that remains of the teacher.
CHANGES = {"no_kv_loss": CODI, "segment_codi": CODI}
# The part "rivals": these arms alone, with this number of seeds.
RIVALS, RIVAL_SEEDS = ("ce_only", "segment", "text_distillation", "logit_distillation"), 1
ALL_ARMS = ARMS | {"segment_codi": ARMS["segment"]}
TRIED = {  # what changes, in the arm that this is about, with one seed
    "source": ("full", SOURCE),
    "weight_1": ("segment", {"kv_weight": 1.0}),
    "learned_projectors": ("segment", {"start": "xavier", "freeze_projectors": False}),
}


def problems(seed: int, settings: dict, quick: bool) -> Problems:
    """Problems to learn from, by seed, and test problems, the same for all."""
    own, theirs = zip(*Solutions(settings["problems"], HARD, seed), strict=True)
    asked = [own for own, _ in Solutions(8 if quick else 300, HARD, test=True)]
    right = [(extract_answer("number", problem[1]["content"]),) for problem in asked]
    return Problems([*own], [*theirs], [problem[:1] for problem in asked], right, "number")


def file_of(arm: str, seed: int, changes: dict, folder: Path) -> Path:
    """Where a result is kept: another setting is another file."""
    told = json.dumps([SETTINGS | changes, HARD, CHECKS, LONGEST], sort_keys=True)
    return folder / f"{arm}-{seed}-{hashlib.sha256(told.encode()).hexdigest()[:8]}.json"


def run(arm: str, seed: int, changes: dict, quick: bool, folder: Path) -> dict:
    """Train one student, alone in its process, and measure what it solves. One that is done is read."""
    settings = SETTINGS | changes
    if quick:
        settings |= {"problems": 16, "epochs": 2, "batch_size": 4}
    done = file_of(arm, seed, changes, folder)
    if done.exists():
        return json.loads(done.read_text())
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    student = models.make("lab-draft", seed, num_hidden_layers=3)
    tokenizer = lab.load_tokenizer("lab-draft")
    tasks = problems(seed, settings, quick)
    names = settings.pop("teacher_model")
    teachers = [lambda n=n: (lab.load(n), lab.load_tokenizer(n)) for n in names]
    options = AlignmentSettings(**{k: v for k, v in settings.items() if k != "problems"})
    steps = options.steps(settings["problems"])
    correct: list[np.ndarray] = []

    def evaluate(aligned) -> dict[str, float]:
        correct.append(solved(aligned.student, tokenizer, tasks, 8 if quick else LONGEST))
        return {"accuracy": float(correct[-1].mean())}

    work = done.with_suffix("")
    chosen = ALL_ARMS[arm]
    similar = layer_map_file(folder, seed, chosen.layers if chosen else 0)
    history, _ = train_arm(
        chosen,
        student,
        tokenizer,
        tasks,
        teachers,
        options,
        work,
        [similar],
        seed,
        evaluate=evaluate,
        every=max(1, steps // CHECKS),
    )
    if arm == "ce_only" and not changes:
        write_layer_maps(student, tokenizer, tasks, teachers[0], folder, seed)
    hard = np.array([text[0]["content"].count(".") - 2 for text in tasks.questions])
    result = {
        "accuracy": [entry["accuracy"] for entry in history if "accuracy" in entry],
        "by_steps": {int(k): float(correct[-1][hard == k].mean()) for k in np.unique(hard)},
        "seconds": sum(entry["seconds"] for entry in history),
        "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "shares": [[entry["step"], entry["share_kv"]] for entry in history if "share_kv" in entry],
    }
    done.write_text(json.dumps(result))
    shutil.rmtree(work)
    return result


def layer_map_file(folder: Path, seed: int, layers: int) -> Path:
    """Where the map to so many teacher layers for each student layer is kept."""
    return folder / f"layer-map-{layers}-{seed}.json"


def write_layer_maps(student, tokenizer, tasks: Problems, load, folder: Path, seed: int) -> None:
    """Write layer maps of a student that has learned: random weights are similar to nothing."""
    teacher, teacher_tokenizer = load()
    texts = [segment(tokenizer, conversation) for conversation in tasks.student[:100]]
    others = [segment(teacher_tokenizer, conversation) for conversation in tasks.teacher[:100]]
    matrix = similar_layers(student, texts, teacher, others)
    names = {"student": "ce_only", "teacher": "lab-teacher"}
    for layers in (1, 2):
        path = layer_map_file(folder, seed, layers)
        save_layer_map(path, layer_map(matrix, layers), **names, samples=len(texts))


def train_all(
    quick: bool, seed: int, parts: Sequence[str], folder: Path
) -> dict[tuple[str, int], dict]:
    """Each arm with each seed, and what else was tried with one; two students at a time, each on a core."""
    seeds = range(seed, seed + (1 if quick else SEEDS))
    needed = {*parts, "ce_only", *({"segment"} if "tried" in parts else ())}
    arms = [arm for arm in ALL_ARMS if arm in needed]
    jobs = {(arm, i): (arm, i, CHANGES.get(arm, {})) for i in seeds for arm in arms}
    if "tried" in parts:
        jobs |= {(name, seed): (arm, seed, changes) for name, (arm, changes) in TRIED.items()}
    # layer maps are made of these
    first = {key: job for key, job in jobs.items() if key[0] == "ce_only"}
    done = train_some(first, quick, folder)
    rest = {key: job for key, job in jobs.items() if key not in first}
    return done | train_some(rest, quick, folder)


def train_some(
    jobs: dict[tuple[str, int], tuple], quick: bool, folder: Path
) -> dict[tuple[str, int], dict]:
    if quick or all(file_of(*job, folder).exists() for job in jobs.values()):
        return {key: run(*job, quick, folder) for key, job in jobs.items()}
    options = {"max_workers": 2, "mp_context": get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(**options) as pool:
        waiting = {key: pool.submit(run, *job, quick, folder) for key, job in jobs.items()}
        return {key: future.result() for key, future in tqdm(waiting.items(), desc="students")}


def arm_figures(runs: dict[tuple[str, int], dict]) -> list[dict]:
    """Accuracy of each arm, on the way and in the end, its gain over no teacher, and what it costs; n is seeds."""
    figures, told = (
        [],
        "a student of 3 layers from random weights, 600 problems; test problems of 1 to 3 steps, greedy",
    )
    told += "; n is seeds; the interval is that of chance in training"
    final = {}
    for (arm, i), r in runs.items():
        if arm in ALL_ARMS:
            final.setdefault(arm, {})[i] = r["accuracy"][-1]
    for arm in final:
        rows = [r for (name, _), r in runs.items() if name == arm]
        figures.append(figure(f"accuracy_{arm}", [*final[arm].values()], "fraction", told))
        for i, value in final[arm].items():
            figures.append(
                figure(f"accuracy_{arm}_seed_{i}", [value], "fraction", f"seed {i} alone; {told}")
            )
        for part in range(len(rows[0]["accuracy"])):
            on_the_way = (
                f"after {part + 1} of {len(rows[0]['accuracy'])} parts of the training; {told}"
            )
            values = [r["accuracy"][part] for r in rows]
            figures.append(
                figure(f"accuracy_{arm}_part_{part + 1}", values, "fraction", on_the_way)
            )
        for steps in rows[0]["by_steps"]:
            values = [r["by_steps"][steps] for r in rows]
            figures.append(
                figure(
                    f"accuracy_{arm}_steps_{steps}",
                    values,
                    "fraction",
                    f"problems of {steps} steps; {told}",
                )
            )
        if arm != "ce_only":
            figures.append(_minus(final, arm, "ce_only", f"gain_{arm}", told))
        cost = "two students at a time, one thread each; training steps alone; n is seeds"
        figures.append(figure(f"seconds_{arm}", [r["seconds"] for r in rows], "seconds", cost))
        cost = "peak resident memory of its process, teacher and evaluation included; n is seeds"
        figures.append(figure(f"mb_{arm}", [r["MB"] for r in rows], "MB", cost))
    if {"segment", "shuffled_segment"} <= final.keys():
        over = "segment", "shuffled_segment", "segment_over_shuffled"
        figures.append(_minus(final, *over, told))
    return figures


def rival_figures(quick: bool, seed: int, folder: Path) -> list[dict]:
    """Distillation of text and probabilities, beside no teacher and segments in the same run."""
    seeds = range(seed, seed + (1 if quick else RIVAL_SEEDS))
    jobs = {(arm, i): (arm, i, {}) for i in seeds for arm in RIVALS}
    runs, figures = train_some(jobs, quick, folder), []
    told = (
        "a student of 3 layers from random weights, 600 problems; test problems of 1 to 3 steps, "
    )
    told += "greedy; all rivals in one run; n is seeds"
    final = {arm: {i: runs[arm, i]["accuracy"][-1] for i in seeds} for arm in RIVALS}
    for arm, values in final.items():
        name = f"accuracy_{arm}" if arm.endswith("distillation") else f"accuracy_beside_{arm}"
        figures.append(figure(name, [*values.values()], "fraction", told))
        for i, value in values.items():
            figures.append(
                figure(f"{name}_seed_{i}", [value], "fraction", f"seed {i} alone; {told}")
            )
        if arm.endswith("distillation"):
            figures.append(_minus(final, arm, "ce_only", f"gain_{arm}", told))
            figures.append(_minus(final, arm, "segment", f"segment_to_{arm}", told))
    return figures


def _minus(final: dict[str, dict[int, float]], one: str, other: str, name: str, told: str) -> dict:
    """How much more of the problems one arm solves than another, on the seeds that both have."""
    gains = [value - final[other][i] for i, value in final[one].items() if i in final[other]]
    return figure(
        name, gains, "difference", f"accuracy of {one} minus that of {other}, seed by seed; {told}"
    )


def map_figures(folder: Path, seeds: range) -> list[dict]:
    """Where in the teacher the map by CKA sends each student layer."""
    maps = [json.loads(layer_map_file(folder, seed, 2).read_text()) for seed in seeds]
    told = "weighted mean of the teacher layers (0 to 5) that are most like it; n is seeds"
    return [
        figure(
            f"cka_layer_{layer}",
            [np.dot(m["indices"][layer], m["weights"][layer]) for m in maps],
            "layer",
            told,
        )
        for layer in range(maps[0]["student_layers"])
    ]


def tried_figures(runs: dict[tuple[str, int], dict]) -> list[dict]:
    """What other settings do, with one seed."""
    figures = []
    for name, (arm, changes) in TRIED.items():
        (found,) = (r for (key, _), r in runs.items() if key == name)
        told = (
            f"as {arm}, but {', '.join(f'{k} {v}' for k, v in changes.items())}; one seed, n is 1"
        )
        figures.append(figure(f"accuracy_tried_{name}", found["accuracy"][-1:], "fraction", told))
    for name in ("segment", "source"):
        found = next(r for (key, _), r in runs.items() if key == name)
        for step, share in found["shares"]:
            told = f"share of the KV loss in the norm of the gradient at step {step}, one seed"
            figures.append(figure(f"share_{name}_{step}", [share], "fraction", told))
    return figures


def loop_over_tokens(x: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """What `resample` does, token by token: (B, L, T_t, D) to (B, L, T_s, D), both padded on the left."""
    longest = int(student[:, 3].max())
    out = x.new_zeros(*x.shape[:2], longest, x.shape[3])
    for b, (own, theirs) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        to, of = longest - own[3], x.shape[2] - theirs[3]
        for part in range(3):
            (s, e), (s_t, e_t) = own[part : part + 2], theirs[part : part + 2]
            for i in range(e - s):
                u = i * (e_t - s_t - 1) / (e - s - 1) if e - s > 1 else 0.0
                low = int(u)
                rows = x[b, :, of + s_t : of + e_t]
                mixed = rows[:, low] + (u - low) * (
                    rows[:, min(low + 1, e_t - s_t - 1)] - rows[:, low]
                )
                out[b, :, to + s + i] = mixed if e - s > 1 else rows.mean(1)
    return out


@torch.inference_mode()
def resampling_figures(quick: bool) -> list[dict]:
    """Time resampling beside a plain loop, in turn."""
    rows, layers, width, scale = (2, 2, 8, 8) if quick else (8, 28, 512, 1)
    rng = np.random.default_rng(0)
    student, teacher = (
        torch.from_numpy(
            np.cumsum(np.c_[np.zeros(rows), rng.integers(*span, (rows, 3)) // scale], 1)
        ).long()
        for span in ((80, 170), (80, 240))
    )
    x = torch.randn(rows, layers, int(teacher[:, 3].max()), width)
    ways = {
        "vectorized": lambda: resample(x, plan_time(student, teacher)),
        "loop": lambda: torch.cat(
            [loop_over_tokens(part, student, teacher) for part in x.split(1, 1)], 1
        ),
        "loop_all_layers": lambda: loop_over_tokens(x, student, teacher),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(2 if quick else 7):
        made = {}
        for name, way in ways.items():
            started = time.perf_counter()
            made[name] = way()
            seconds[name].append(time.perf_counter() - started)
        assert all(torch.allclose(each, made["loop"], atol=1e-4) for each in made.values())
    told = f"{rows} texts, {layers} layers, width {width}, up to {x.shape[2]} tokens, float32, plan included; "
    told += "one thread, in turn; time of a loop over tokens"
    figures = []
    for name, which in (
        ("loop", " and layers"),
        ("loop_all_layers", " that takes all layers at once"),
    ):
        ratios = [a / b for a, b in zip(seconds[name][1:], seconds["vectorized"][1:], strict=True)]
        figures.append(
            figure(f"resampling_over_{name}", ratios, "ratio", f"{told}{which}, over ours")
        )
    return figures


def overhead_figures(quick: bool) -> list[dict]:
    """A training step with alignment over one without, on the same batch, in turn; and what the reading takes."""
    torch.manual_seed(0)
    student = models.make("lab-draft", 0, num_hidden_layers=3)
    teacher, teacher_tokenizer = lab.load("lab-teacher"), lab.load_tokenizer("lab-teacher")
    pairs = [*Solutions(8 if quick else 32, HARD)]
    texts = [segment(lab.load_tokenizer("lab-draft"), text) for text, _ in pairs]
    others = [segment(teacher_tokenizer, text) for _, text in pairs]
    arguments = teacher, others, texts, proportional(3, 6)
    features = encode_with_teacher(*arguments)
    projector = Projector(160, 64, "orthogonal").requires_grad_(False)
    ways = {
        "without": (AlignedStudent(student), [(text,) for text in texts]),
        "with": (AlignedStudent(student, [projector]), list(zip(texts, features, strict=True))),
    }
    seconds: dict[str, list[float]] = {"with": [], "without": [], "reading": []}
    for _ in range(2 if quick else 12):
        started = time.perf_counter()
        encode_with_teacher(*arguments)
        seconds["reading"].append(time.perf_counter() - started)
        for name, (aligned, batch) in ways.items():
            started = time.perf_counter()
            sum(aligned(pad_problems(batch)).values()).backward()
            seconds[name].append(time.perf_counter() - started)
    told = f"a batch of {len(texts)} problems; forward and backward of a 3-layer student, batch made anew, one thread"
    ratios = [a / b for a, b in zip(seconds["with"][1:], seconds["without"][1:], strict=True)]
    steps = [a / b for a, b in zip(seconds["reading"][1:], seconds["without"][1:], strict=True)]
    return [
        figure("alignment_overhead", ratios, "ratio", f"with the KV loss over without; {told}"),
        figure(
            "reading_over_step",
            steps,
            "ratio",
            f"what the teacher takes to read it, once, over a step without; {told}",
        ),
    ]


def projector_figures() -> list[dict]:
    """Parameters of projectors for the source's models: what teachers of 7B and 1.5B need for a student of 1.5B."""
    student, figures, total = config_of("Qwen/Qwen2-1.5B-Instruct"), [], 0
    for name in ("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-1.5B-Instruct"):
        widths = [
            c.num_key_value_heads * c.hidden_size // c.num_attention_heads
            for c in (config_of(name), student)
        ]
        count = Projector(*widths).num_parameters()
        total += count
        told = f"W_K and W_V from {widths[0]} to {widths[1]}"
        figures.append(
            figure(
                f"projector_parameters_{name.split('-')[1].lower()}", [count], "parameters", told
            )
        )
    told = "both teachers; the source says about 21 million"
    return [*figures, figure("projector_parameters", [total], "parameters", told)]


def measure(quick: bool, seed: int, parts: Sequence[str]) -> list[dict]:
    """Accuracy of students that learn by each arm and by controls, cost of each, and the parts of it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if quick else RUNS
        folder.mkdir(parents=True, exist_ok=True)
        alone = "rivals" in parts and not {*parts} & {*RIVALS}
        figures = rival_figures(quick, seed, folder) if alone else []
        if {*parts} & {*ALL_ARMS, "tried"}:
            runs = train_all(quick, seed, parts, folder)
            figures += map_figures(folder, range(seed, seed + (1 if quick else SEEDS)))
            figures += arm_figures(runs)
    torch.set_num_threads(1)
    if "tried" in parts:
        figures += tried_figures(runs)
    if "costs" in parts:
        figures += resampling_figures(quick) + overhead_figures(quick) + projector_figures()
    return figures


if __name__ == "__main__":
    benchmark(measure, parts=[*ALL_ARMS, "tried", "costs", "rivals"])
