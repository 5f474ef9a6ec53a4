"""`kvlab layer-map`, `kvlab train-aligned` and `kvlab compare-alignments`: 4D alignment."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product, zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import ConcatDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlab.align import (
    STARTS,
    KVAlignmentLoss,
    Lessons,
    Projector,
    Segmented,
    by_index,
    load_seen,
    plan_time,
    save_seen,
    seen_by,
    segment,
    similar_layers,
)
from kvlab.align import train as train_pupil
from kvlab.commands.shared import (
    Conversation,
    figures_table,
    require_counts,
    require_no_source,
    run_name,
    write_json,
)
from kvlab.evaluate import circumstances, figure
from kvlab.generation import answers
from kvlab.lab import corpora
from kvlab.records import (
    ANSWER_KINDS,
    PROBLEMS,
    Record,
    accepted,
    extract_answer,
    messages,
    read_records,
    same_answer,
)
from kvlab.scale import Scale
from kvlab.similarity import STATES, layer_map, load_layer_map, proportional, save_layer_map

SOLVED = ("lab", *PROBLEMS)


ALIGNMENTS = {  # whether layers go by likeness, time by segments, and what is wrong with what the teacher read
    "ce_only": None,
    "baseline": (False, False, ""),
    "cka": (True, False, ""),
    "segment": (False, True, ""),
    "full": (True, True, ""),
    "shuffled": (True, True, "another problem"),
    "shuffled_segment": (False, True, "another problem"),
    "random_teacher": (True, True, "nothing learned"),
}


SAMPLES = 100  # problems by which layers are compared


TOGETHER = 256  # problems in a file of what a teacher made of them


SMALL_ALIGNED = {"kv_warmup": 50, "learning_rate": 1e-3}


LARGE_ALIGNED = {"kv_warmup": 1000, "learning_rate": 2e-5}


Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class Problems(NamedTuple):
    """Problems as a student and its teachers solve them, to learn from, and others to be asked.

    asked : conversations that end with the question. answers : of each the accepted ones. kind : of
    `extract_answer`.
    """

    own: list[Conversation]
    theirs: list[Conversation]
    asked: list[Conversation]
    answers: list[tuple[str, ...]]
    kind: str


def map_layers(
    student_model: str | None = None,
    teacher_model: str | None = None,
    dataset_name: Literal[SOLVED] = "lab",
    num_samples: int = 100,
    output: Path = Path("layer_map.json"),
    source: str | None = None,
    split: str = "train",
    what: Literal[STATES] = "hidden",
    k: int = 2,
) -> None:
    """Find the teacher layers that are most like each student layer (unbiased CKA), and write them as JSON.

    Args: student_model: a lab model, a hub name or a folder. Default: the scale's student.
    teacher_model: the same. Default: the scale's teacher. dataset_name: problems that both read
    with their solutions, but for the answers: lab (made up without end) or records. num_samples:
    problems to read. output: the file, for `kvlab train-aligned --layer_mapping_path`. source: of
    records; a file as their authors published it, or a name on the Hugging Face hub. split: part of
    the hub's data set; a file is read whole. what: is compared, each layer's hidden states, its
    keys (before they are rotated) or its values. k: teacher layers for each student layer; their
    weights are a softmax of what was found.
    """
    require_counts(num_samples=num_samples, k=k)
    scale = Scale.current()
    scale = replace(
        scale, student=student_model or scale.student, teacher=teacher_model or scale.teacher
    )
    settings = {
        "dataset_name": dataset_name,
        "source": source,
        "split": split,
        "problems": num_samples,
    }
    own, theirs = zip(*_solutions(settings)[0], strict=True)
    student, tokenizer = scale.load("student"), scale.load_tokenizer("student")
    texts, teacher = (
        [segment(tokenizer, c) for c in own],
        (scale.load("teacher"), scale.load_tokenizer("teacher")),
    )
    layers = teacher[0].config.num_hidden_layers
    if k > layers:
        raise ValueError(f"k is {k}, but {scale.teacher} has {layers} layers: give a smaller one.")
    matrix = _likeness(student, texts, *teacher, theirs, what)
    chosen = layer_map(matrix, k)
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {"student": scale.student, "teacher": scale.teacher, "samples": len(own), "what": what}
    path = save_layer_map(output, chosen, **about)
    print(
        f"CKA of each layer of {scale.student} (rows) with each of {scale.teacher}, {len(own)} problems:"
    )
    print(pd.DataFrame(matrix.numpy()).to_string(float_format="{:.2f}".format))
    for layer, (indices, weights) in enumerate(
        zip(chosen.indices.tolist(), chosen.weights.tolist(), strict=True)
    ):
        told = ", ".join(f"{i} ({w:.2f})" for i, w in zip(indices, weights, strict=True))
        print(f"student layer {layer}: teacher layers {told}")
    print(path)


def _likeness(
    student: PreTrainedModel,
    texts: Sequence[Segmented],
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    theirs: Sequence[Conversation],
    what: str = "hidden",
) -> Tensor:
    return similar_layers(student, texts, teacher, [segment(tokenizer, c) for c in theirs], what)


def train_aligned(
    model_name: str | None = None,
    teacher_model: list[str] | None = None,
    dataset_name: Literal[SOLVED] = "lab",
    source: str | None = None,
    split: str = "train",
    eval_dataset_name: Literal[SOLVED] | None = None,
    eval_source: str | None = None,
    eval_split: str = "test",
    use_cka_layer_mapping: bool = False,
    layer_mapping_path: list[str] | None = None,
    use_segment_resampling: bool = False,
    kv_weight: float = 1.0,
    codi_weight: float = 0.5,
    kv_warmup: int | None = None,
    kv_end: float = 0.0,
    start: Literal[STARTS] = "xavier",
    freeze_projectors: bool = False,
    problems: int | None = None,
    heldout: int = 200,
    epochs: int = 2,
    batch_size: int = 8,
    learning_rate: float | None = None,
    accumulate: int = 1,
    fp16: bool = False,
    gradient_checkpointing: bool = False,
    max_new_tokens: int = 256,
    seed: int = 0,
    output_dir: Path = Path("aligned"),
) -> None:
    """Teach a student to solve problems, and to make keys and values like those of its teachers (4D alignment).

    Each teacher reads the problems with their solutions, in its own tokens, one teacher after
    another; what it made of them is kept in OUTPUT_DIR, so that a run that was stopped goes on by
    the same command. Then OUTPUT_DIR holds the student, a projector for each teacher, and what was
    found (training.json). The four arms of the source are: neither, one or both of
    --use_cka_layer_mapping and --use_segment_resampling. With both weights 0 there is no teacher.

    Args: model_name: the student; a lab model, a hub name or a folder. Default: the scale's
    student. teacher_model: one or more teachers, e.g. --teacher_model A B. Default: the scale's
    teacher. dataset_name: problems with reasoning, to learn from: lab (made up; the teacher reads
    longer solutions), or records, of which teacher and student read the same. source: of records; a
    file as their authors published it, or a name on the Hugging Face hub. split: part of the hub's
    data set; a file is read whole. eval_dataset_name: problems to be asked. Default: some that are
    held out of the others. eval_source: of these. eval_split: of these. use_cka_layer_mapping: each
    student layer learns from the teacher layers that are most like it; else from the one at the
    same share of the depth. layer_mapping_path: for each teacher a file that `kvlab layer-map`
    wrote. Default: they are made first. use_segment_resampling: stretch the teacher's prompt,
    reasoning and answer, each over the student's; else token i learns from the teacher's token i.
    kv_weight: of the difference of keys and values. codi_weight: of the difference of hidden states
    before the answer. kv_warmup: steps over which both rise from 0. Default: 1000; 50 for the tiny
    scale. kv_end: share of the steps after which both have faded to 0; 0: they stay. start: of the
    projectors, xavier, orthogonal or identity. freeze_projectors: they stay as they start, and the
    student alone moves. problems: most problems to learn from. Default: all; the lab makes 600.
    heldout: problems that are not learned from but asked. epochs: times that each problem is read.
    batch_size: of training, in problems. learning_rate: by default 2e-5; 1e-3 for the tiny scale.
    accumulate: batches of an optimizer step. fp16: mixed precision. gradient_checkpointing: make
    again in the backward pass what layers computed: slower, in much less memory. max_new_tokens: of
    each solution, when problems are asked. seed: of what is learned from, of the projectors, and of
    the order. output_dir: folder of the student.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    scale, settings = _pair(settings, model_name, teacher_model)
    _require_maps(layer_mapping_path, settings["teacher_model"], use_cka_layer_mapping)
    tasks = _tasks(settings)
    main = PartialState(
        cpu=scale.device == "cpu"
    ).is_main_process  # before loading: gives each process its own GPU
    if main:
        print(f"To learn from: {len(tasks.own)} problems. To be asked: {len(tasks.asked)}.")
    student, tokenizer = _learner(scale, gradient_checkpointing), scale.load_tokenizer("student")
    right = {"before": solved(student, tokenizer, tasks, max_new_tokens)} if main else {}
    arm = (use_cka_layer_mapping, use_segment_resampling, "") if kv_weight or codi_weight else None
    teachers = _teachers(scale, settings["teacher_model"])
    history, alignment = teach(
        arm, student, tokenizer, tasks, teachers, settings, output_dir, layer_mapping_path
    )
    if not main:
        return
    student.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    for number, projector in enumerate(alignment.projectors if alignment else ()):
        projector.save_pretrained(output_dir / f"projector_{number}")
    right["after"] = solved(student, tokenizer, tasks, max_new_tokens)
    told = "problems that were not learned from, the answer right, greedy"
    figures = [
        figure(f"accuracy_{when}", values, "fraction", told) for when, values in right.items()
    ]
    print(figures_table(figures))
    result = {"settings": settings, "figures": figures, **circumstances(), "history": history}
    print(write_json(output_dir / "training.json", result))


def compare_alignments(
    model_name: str | None = None,
    teacher_model: list[str] | None = None,
    dataset_name: Literal[SOLVED] = "lab",
    source: str | None = None,
    split: str = "train",
    eval_dataset_name: Literal[SOLVED] | None = None,
    eval_source: str | None = None,
    eval_split: str = "test",
    arms: list[str] | None = None,
    seeds: int = 3,
    kv_weight: float = 1.0,
    codi_weight: float = 0.5,
    kv_warmup: int | None = None,
    kv_end: float = 0.0,
    start: Literal[STARTS] = "xavier",
    freeze_projectors: bool = False,
    problems: int | None = None,
    heldout: int = 200,
    epochs: int = 2,
    batch_size: int = 8,
    learning_rate: float | None = None,
    accumulate: int = 1,
    fp16: bool = False,
    gradient_checkpointing: bool = False,
    max_new_tokens: int = 256,
    output_dir: Path = Path("alignments"),
) -> None:
    """Train one student after another, by each arm of 4D alignment and by controls, and compare what they solve.

    Arms are ce_only (no teacher), baseline (by index, proportional layers), cka (layers by
    likeness), segment (time by segments), full (both), and controls that should be no better than
    ce_only: shuffled and shuffled_segment (as full and segment, but the teacher read another
    problem), and random_teacher (as full, with random weights). All have the same problems, order
    and steps. OUTPUT_DIR holds what was found (comparison.json), and what a run that was stopped
    needs to go on.

    Args:
        model_name: the student, as for train-aligned; so are all options that are not told here.
        teacher_model: one or more teachers.
        dataset_name: problems to learn from.
        source: of records.
        split: of records.
        eval_dataset_name: problems to be asked.
        eval_source: of these.
        eval_split: of these.
        arms: some of them, e.g. --arms ce_only full. Default: all.
        seeds: runs of each arm. Each seed has its own problems to learn from, order and projectors.
        kv_weight: of the difference of keys and values.
        codi_weight: of the difference of hidden states before the answer.
        kv_warmup: steps over which both rise from 0.
        kv_end: share of the steps after which both have faded to 0.
        start: of the projectors.
        freeze_projectors: they stay as they start.
        problems: most problems to learn from.
        heldout: problems to be asked.
        epochs: times that each problem is read.
        batch_size: of training.
        learning_rate: of training.
        accumulate: batches of an optimizer step.
        fp16: mixed precision.
        gradient_checkpointing: slower, in less memory.
        max_new_tokens: of each solution.
        output_dir: folder of the comparison.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    require_counts(seeds=seeds)
    arms = list(dict.fromkeys(arms or ALIGNMENTS))
    unknown = [arm for arm in arms if arm not in ALIGNMENTS]
    if unknown:
        raise ValueError(
            f"There is no arm {', '.join(unknown)}: expected some of {', '.join(ALIGNMENTS)}."
        )
    scale, settings = _pair(settings | {"arms": arms}, model_name, teacher_model)
    main, rows = PartialState(cpu=scale.device == "cpu").is_main_process, []
    tokenizer, teachers = (
        scale.load_tokenizer("student"),
        _teachers(scale, settings["teacher_model"]),
    )
    every_task = [_tasks(settings | {"seed": seed}) for seed in range(seeds)]
    for (seed, tasks), arm in product(enumerate(every_task), arms):
        student = _learner(scale, gradient_checkpointing)
        torch.cuda.reset_peak_memory_stats() if scale.device == "cuda" else None
        history, _ = teach(
            ALIGNMENTS[arm],
            student,
            tokenizer,
            tasks,
            teachers,
            settings | {"seed": seed},
            output_dir,
        )
        row = {
            "arm": arm,
            "seed": seed,
            "seconds": sum(entry["seconds"] for entry in history),
        }  # a stopped run's too
        if scale.device == "cuda":
            row["GB"] = torch.cuda.max_memory_allocated() / 1e9
        rows.append(
            row | {"accuracy": float(solved(student, tokenizer, tasks, max_new_tokens).mean())}
        )
        if main:
            print("{arm}, seed {seed}: {accuracy:.3f}".format(**rows[-1]))
    if main:
        figures = alignment_figures(pd.DataFrame(rows))
        print(figures_table(figures))
        result = {"settings": settings, "figures": figures, **circumstances(), "runs": rows}
        print(write_json(output_dir / "comparison.json", result))


def _pair(settings: dict, student: str | None, teachers: list[str] | None) -> tuple[Scale, dict]:
    """The scale with the student that is asked for, and settings with the scale's own where none are."""
    names = ("heldout", "epochs", "batch_size", "accumulate", "max_new_tokens")
    require_counts(
        **{name: settings[name] for name in (*names, "problems") if settings[name] is not None}
    )
    for name in ("kv_weight", "codi_weight", "kv_warmup", "learning_rate"):
        if not (settings[name] or 0) >= 0:
            raise ValueError(f"{name} is {settings[name]}, expected 0 or more.")
    if not 0 <= settings["kv_end"] <= 1:
        raise ValueError(f"kv_end is {settings['kv_end']}, expected a share from 0 to 1.")
    scale = Scale.current()
    if settings["fp16"] and scale.device == "cpu":
        raise ValueError(
            f"fp16 needs a GPU, but the scale {scale.name} computes on the CPU: leave --fp16 out."
        )
    scale = replace(scale, student=student or scale.student)
    own = SMALL_ALIGNED if scale.name == "tiny" else LARGE_ALIGNED
    settings = own | {name: value for name, value in settings.items() if value is not None}
    return scale, settings | {
        "model_name": scale.student,
        "teacher_model": teachers or [scale.teacher],
    }


def _require_maps(maps: list[str] | None, teachers: list[str], by_likeness: bool) -> None:
    if maps and not by_likeness:
        raise ValueError(
            "layer_mapping_path is given without --use_cka_layer_mapping: give both, or none."
        )
    if maps and len(maps) != len(teachers):
        raise ValueError(
            f"There are {len(teachers)} teachers and {len(maps)} layer maps: give one for each teacher."
        )
    for path in maps or ():
        if not Path(path).is_file():
            raise ValueError(
                f"There is no layer map {path}: make one by `kvlab layer-map --output {path}`."
            )


def _learner(scale: Scale, checkpointing: bool) -> PreTrainedModel:
    student = scale.load("student").float().requires_grad_(True)
    if checkpointing:
        student.gradient_checkpointing_enable()
    return student


def _teachers(scale: Scale, names: Sequence[str]) -> list[Callable[[], Loaded]]:
    """Functions that load them, so that there is one at a time."""
    scales = [replace(scale, teacher=name) for name in names]
    return [lambda one=one: (one.load("teacher"), one.load_tokenizer("teacher")) for one in scales]


def _tasks(settings: Mapping) -> Problems:
    """Problems to learn from, which the seed chooses, and others to be asked, the same for every seed."""
    about, source = settings.get("eval_dataset_name"), settings.get("eval_source")
    if source is not None and about in (None, "lab"):
        held = (
            "the lab makes its problems up"
            if about
            else "problems to be asked are held out of the others"
        )
        raise ValueError(
            f"eval_source is {source!r}, but {held}: leave it out, or give another --eval_dataset_name."
        )
    learned, spare, data = *_solutions(settings), about or settings["dataset_name"]
    if about and about != "lab":
        spare = _solvable(about, source, settings["eval_split"])[: settings["heldout"]]
        if not spare:
            raise ValueError(f"There is no problem to be asked in {source}: give another source.")
    if data == "lab":
        test = corpora.Solutions(settings["heldout"], test=True)
        to_ask = [(own[:1], (extract_answer("number", own[1]["content"]),)) for own, _ in test]
    else:
        to_ask = [(messages(record)[:1], accepted(record)) for record in spare]
    known = {question["content"] for (question,), _ in to_ask}
    learned = [pair for pair in learned if pair[0][0]["content"] not in known]
    _steps(len(learned), settings)
    (own, theirs), (asked, right) = (
        map(list, zip(*pairs, strict=True)) for pairs in (learned, to_ask)
    )
    return Problems(own, theirs, asked, right, "number" if data == "lab" else ANSWER_KINDS[data])


def _solutions(settings: Mapping) -> tuple[list[tuple[Conversation, Conversation]], list[Record]]:
    """Problems as student and teacher solve them, and records that were held out."""
    data, source, most = settings["dataset_name"], settings.get("source"), settings.get("problems")
    seed, held = settings.get("seed", 0), settings.get("heldout", 0)
    if data == "lab":
        require_no_source(source)
        return [*corpora.Solutions(most or 600, seed=seed)], []
    records = _solvable(data, source, settings["split"])
    bare = sum(not record.reasoning.strip() for record in records)
    if bare:
        seen = f"{bare} of {len(records)} {data} records have no reasoning, so that they cannot be aligned"
        raise ValueError(f"{seen}: leave them out, or learn from another data set.")
    held = 0 if settings.get("eval_dataset_name") else held
    if len(records) <= held:
        raise ValueError(
            f"There are {len(records)} problems, {held} to hold out: give more, or a smaller heldout."
        )
    chosen = random.Random(seed).sample(
        records[held:], min(most or len(records), len(records) - held)
    )
    return [(messages(record),) * 2 for record in chosen], records[:held]


def _solvable(data: str, source: str | None, split: str) -> list[Record]:
    """Records, each once, in an order that is always the same: many sources go by subject."""
    if source is None:
        raise ValueError(f"There is no source of {data} records: give a file or a name on the hub.")
    records = dict.fromkeys(read_records(data, source, split))
    return random.Random(0).sample([*records], len(records))


def _steps(problems: int, settings: Mapping) -> int:
    batch = settings["batch_size"] * settings["accumulate"]
    if problems < batch:
        raise ValueError(
            f"{problems} problems are less than a batch of {batch}: give more, or smaller batches."
        )
    return settings["epochs"] * (problems // batch)


def teach(
    arm: tuple[bool, bool, str] | None,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Problems,
    teachers: Sequence[Callable[[], Loaded]],
    settings: Mapping,
    folder: Path,
    maps: Sequence[str] | None = None,
    **fit_options,
) -> tuple[list[dict[str, float]], KVAlignmentLoss | None]:
    """Train a student by one arm; a run that was stopped goes on. Its history, and the alignment that learned along.

    Args:
        arm: one of `ALIGNMENTS`.
        teachers: functions that load each with its tokenizer. They are called one after another.
        settings: kv_weight, codi_weight, kv_warmup, kv_end, start, freeze_projectors, epochs,
            batch_size, accumulate, learning_rate, fp16, seed and teacher_model, as for
            `train_aligned`.
        maps: of each teacher, the file of its layer map.
        fit_options: of `kvlab.training.fit`: evaluate, every, ...
    """
    steps = _steps(len(tasks.own), settings)
    names = (
        "batch_size",
        "accumulate",
        "learning_rate",
        "seed",
        "kv_weight",
        "codi_weight",
        "kv_warmup",
        "kv_end",
    )
    options = {name: settings[name] for name in names}
    options |= {
        "steps": steps,
        "precision": "fp16" if settings["fp16"] else "no",
        "shares_every": max(1, steps // 20),
    }
    texts = [segment(tokenizer, conversation) for conversation in tasks.own]
    shape = [settings[name] for name in ("start", "freeze_projectors", "teacher_model")]
    told, mapped = (
        [list(map(Tensor.tolist, text)) for text in texts],
        [Path(path).read_text() for path in maps or ()],
    )
    run = folder / run_name(student, arm, options, shape, mapped, told, tasks.theirs)
    if arm is None:
        lessons, alignment = Lessons(texts), None
    else:
        lessons, alignment = _listened(
            arm, student, texts, tasks.theirs, teachers, settings, run, maps
        )
    options |= {"checkpoint": run / "checkpoint.safetensors"} | fit_options
    return train_pupil(student, lessons, alignment, **options), alignment


def _listened(
    arm: tuple[bool, bool, str],
    student: PreTrainedModel,
    texts: Sequence[Segmented],
    theirs: Sequence[Conversation],
    teachers: Sequence[Callable[[], Loaded]],
    settings: Mapping,
    run: Path,
    maps: Sequence[str] | None,
) -> tuple[Lessons, KVAlignmentLoss]:
    """What teachers made of the problems, kept on disk, and projectors for it."""
    seen = []
    for number, (load, path) in enumerate(zip_longest(teachers, maps or ())):
        home = run / f"teacher_{number}"
        with PartialState().main_process_first():
            files = [home / f"{start:06}.safetensors" for start in range(0, len(texts), TOGETHER)]
            if not all(file.is_file() for file in files):
                torch.manual_seed(settings["seed"])
                _read_by(arm, student, texts, theirs, *load(), path and Path(path), files)
        seen.append(ConcatDataset([load_seen(file) for file in files]))
    width = student.base_model.layers[0].self_attn.k_proj.out_features
    torch.manual_seed(settings["seed"])
    projectors = [Projector(part[0].keys.shape[-1], width, settings["start"]) for part in seen]
    states = [
        nn.Linear(len(part[0].state.T), student.config.hidden_size, bias=False) for part in seen
    ]
    alignment = KVAlignmentLoss(projectors, states if settings["codi_weight"] else ())
    alignment.requires_grad_(not settings["freeze_projectors"])
    return Lessons(texts, *seen), alignment


def _read_by(
    arm: tuple[bool, bool, str],
    student: PreTrainedModel,
    texts: Sequence[Segmented],
    theirs: Sequence[Conversation],
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path | None,
    files: Sequence[Path],
) -> None:
    """Keep what a teacher makes of problems for a student, some in each file, and a layer map that had to be made."""
    by_likeness, by_segments, wrong = arm
    if wrong == "nothing learned":
        teacher = type(teacher)(teacher.config).to(teacher.device, teacher.dtype).eval()
    layers = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    path = path or files[0].with_name("layer_map.json")
    files[0].parent.mkdir(parents=True, exist_ok=True)
    if by_likeness and path.is_file():
        chosen = load_layer_map(path, *layers).layer_map
    elif by_likeness:
        matrix = _likeness(student, texts[:SAMPLES], teacher, tokenizer, theirs[:SAMPLES])
        chosen, names = (
            layer_map(matrix, min(2, layers[1])),
            [m.config.name_or_path for m in (student, teacher)],
        )
        about = dict(
            zip(("student", "teacher"), names, strict=True), samples=min(SAMPLES, len(texts))
        )
        save_layer_map(path, chosen, **about)
    else:
        chosen = proportional(*layers)
    if wrong == "another problem":
        theirs = [*theirs[len(theirs) // 2 :], *theirs[: len(theirs) // 2]]
    plan = plan_time if by_segments else by_index
    for number, file in enumerate(files):
        part = slice(number * TOGETHER, (number + 1) * TOGETHER)
        if not file.is_file():
            save_seen(file, seen_by(teacher, tokenizer, theirs[part], texts[part], chosen, plan))


def solved(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Problems,
    max_new_tokens: int = 256,
) -> np.ndarray:
    """1 for each problem to be asked whose greedy answer is an accepted one, else 0."""
    said = answers(model, tokenizer, tasks.asked, max_new_tokens, label="problems")
    found = [extract_answer(tasks.kind, text) for text in said]
    right = [
        any(same_answer(tasks.kind, one, a) for a in good)
        for one, good in zip(found, tasks.answers, strict=True)
    ]
    return np.array(right, float)


def alignment_figures(runs: pd.DataFrame) -> list[dict]:
    """Figures of runs with arm, seed, accuracy, seconds and perhaps GB; intervals (95 %) are over seeds.

    `gain_ARM` is its accuracy minus that of ce_only, seed by seed.

    Example:
        >>> rows = [["ce_only", 0, 0.5, 9.0], ["full", 0, 0.75, 10.0]]
        >>> figures = alignment_figures(pd.DataFrame(rows, columns=["arm", "seed", "accuracy", "seconds"]))
        >>> [(f["name"], f["value"]) for f in figures if "accuracy" in f["name"] or "gain" in f["name"]]
        [('accuracy_ce_only', 0.5), ('accuracy_full', 0.75), ('gain_full', 0.25)]
    """
    figures, table = [], runs.pivot(index="seed", columns="arm")
    for score, unit in {"accuracy": "fraction", "seconds": "seconds", "GB": "GB"}.items():
        for arm in runs["arm"].unique() if score in runs else ():
            figures.append(figure(f"{score}_{arm}", table[score][arm], unit, "n is seeds"))
    alone = table["accuracy"].get("ce_only")
    for arm in runs["arm"].unique() if alone is not None else ():
        if arm != "ce_only":
            told = f"accuracy of {arm} minus that of ce_only, seed by seed; n is seeds"
            figures.append(
                figure(f"gain_{arm}", table["accuracy"][arm] - alone, "difference", told)
            )
    return figures
