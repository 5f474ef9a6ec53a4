"""`kvlab layer-map`, `kvlab train-aligned` and `kvlab compare-alignments`: 4D alignment."""

import random
from collections.abc import Set
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlab import align
from kvlab.align import AlignedStudent, AlignmentSettings, Arm, Problems
from kvlab.answers import extract_answer
from kvlab.commands import shared
from kvlab.evaluate import figure, run_info
from kvlab.files import read_text, require_writable
from kvlab.generation import encode
from kvlab.lab import corpora
from kvlab.layers import layer_map, save_layer_map
from kvlab.records import DATA_SETS, PROBLEMS, accepted_answers, messages, read_records
from kvlab.scale import Scale

SOLVED = ("lab", *PROBLEMS)


@dataclass(frozen=True, kw_only=True)
class AlignmentOptions(AlignmentSettings):
    """Problems and training, for `train-aligned` and `compare-alignments`.

    Args:
        model_name: the student; a lab model, a hub name or a folder. Default: the scale's student.
        teacher_model: one or more teachers, e.g. --teacher_model A B. Default: the scale's teacher.
        dataset_name: problems with reasoning to learn from, lab (made up; the teacher reads longer
            solutions) or records, of which teacher and student read the same.
        source: of records, a file as their authors published it or a name on the Hugging Face hub.
        split: part of the hub's data set; a file is read whole.
        eval_dataset_name: problems to be asked. Default: some that are held out of the others.
        eval_source: source of these.
        eval_split: split of these.
        problems: maximum number of problems to learn from. Default: all; the lab makes 600.
        heldout: number of problems to be asked.
        gradient_checkpointing: compute layers again in the backward pass: slower, in less memory.
        max_new_tokens: of each solution, when problems are asked.
        every: optimizer steps between checkpoints; 0: only at the end and on Ctrl-C.
        enable_thinking: let the student think before it answers, if its template has this option.
    """

    model_name: str | None = None
    teacher_model: list[str] | None = None
    dataset_name: Literal[SOLVED] = "lab"
    source: str | None = None
    split: str = "train"
    eval_dataset_name: Literal[SOLVED] | None = None
    eval_source: str | None = None
    eval_split: str = "test"
    problems: int | None = None
    heldout: int = 200
    gradient_checkpointing: bool = False
    max_new_tokens: int = 256
    every: int = 200
    enable_thinking: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.eval_source and self.eval_dataset_name in (None, "lab"):
            hint = "which needs --eval_dataset_name, not lab"
            raise ValueError(f"eval_source is {self.eval_source!r}, {hint}.")

    def teachers(self) -> list[str]:
        return self.teacher_model or [Scale.current().teacher]

    def scale(self) -> Scale:
        scale = Scale.current()
        if self.fp16 and scale.device == "cpu":
            raise ValueError(f"fp16 needs a GPU: {scale.name} computes on the CPU.")
        student = self.model_name or scale.student
        return replace(scale, student=student, enable_thinking=self.enable_thinking)


def map_layers(
    student_model: str | None = None,
    teacher_model: str | None = None,
    dataset_name: Literal[SOLVED] = "lab",
    num_samples: int = align.LAYER_MAP_PROBLEMS,
    output: Path = Path("layer_map.json"),
    source: str | None = None,
    split: str = "train",
    what: Literal["hidden", "keys", "values"] = "hidden",
    k: int = 2,
) -> None:
    """Find the teacher layers that are most similar to each student layer (unbiased CKA), and write them as JSON.

    Args:
        student_model: a lab model, a hub name or a folder. Default: the scale's student.
        teacher_model: the same. Default: the scale's teacher.
        dataset_name: problems that both read with their solutions, except for the answers: lab or
            records.
        num_samples: number of problems.
        output: the file, for `kvlab train-aligned --layer_mapping_path`.
        source: of records, a file as their authors published it or a name on the Hugging Face hub.
        split: part of the hub's data set; a file is read whole.
        what: the states to compare, each layer's hidden states, its keys (before they are rotated)
            or its values.
        k: teacher layers for each student layer, weighted by a softmax over their CKA.
    """
    require_writable(output)
    scale = Scale.current()
    names = {"student": student_model or scale.student, "teacher": teacher_model or scale.teacher}
    scale = replace(scale, **names)
    pairs = _solutions(dataset_name, source, split, num_samples)
    for column, role in enumerate(names):
        pairs = _leave_out_long(scale, role, pairs, column)
    student, tokenizer = scale.load("student"), scale.load_tokenizer("student")
    teacher, teacher_tokenizer = _load_teacher(scale)
    layers = teacher.config.num_hidden_layers
    if k > layers:
        raise ValueError(f"k is {k}, but {scale.teacher} has {layers} layers: give a smaller one.")
    texts = [align.segment(tokenizer, conversation) for conversation, _ in pairs]
    others = [align.segment(teacher_tokenizer, conversation) for _, conversation in pairs]
    matrix = align.similar_layers(student, texts, teacher, others, what)
    chosen = layer_map(matrix, k)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_layer_map(output, chosen, **names, samples=len(pairs), what=what)
    print(f"CKA of layers of {scale.student} (rows) and {scale.teacher}, {len(pairs)} problems:")
    print(pd.DataFrame(matrix.numpy()).to_string(float_format="{:.2f}".format))
    for layer, indices in enumerate(chosen.indices.tolist()):
        weights = zip(indices, chosen.weights[layer].tolist(), strict=True)
        text = ", ".join(f"{index} ({weight:.2f})" for index, weight in weights)
        print(f"student layer {layer}: teacher layers {text}")
    print(output)


def train_aligned(
    use_cka_layer_mapping: bool = False,
    layer_mapping_path: list[Path] | None = None,
    use_segment_resampling: bool = False,
    seed: int = 0,
    output_dir: Path = Path("aligned"),
    **options,
) -> None:
    """Train a student to solve problems, toward keys and values like those of its teachers (4D alignment).

    Each teacher reads the problems with their solutions, in its own tokens, one teacher after
    another; its features are kept in OUTPUT_DIR, so that a run that was stopped continues by the
    same command. Then OUTPUT_DIR holds the student, a projector for each teacher, and the results
    (training.json). The four arms of the source are: neither, one or both of
    --use_cka_layer_mapping and --use_segment_resampling. With both weights 0 there is no teacher.

    Args:
        use_cka_layer_mapping: align each student layer to the teacher layers that are most similar
            to it; otherwise to the one at the same fraction of the depth.
        layer_mapping_path: for each teacher a file that `kvlab layer-map` wrote. Default: they are
            made first.
        use_segment_resampling: stretch the teacher's prompt, reasoning and answer, each over the
            student's; otherwise token i learns from the teacher's token i.
        seed: random seed (data, projectors, shuffling).
        output_dir: folder of the student.
    """
    settings = AlignmentOptions(**options)
    scale = settings.scale()
    maps = layer_mapping_path or []
    teachers = len(settings.teachers())
    if maps and (not use_cka_layer_mapping or len(maps) != teachers):
        hint = "give one each, and --use_cka_layer_mapping"
        raise ValueError(f"There are {len(maps)} layer maps for {teachers} teachers: {hint}.")
    for path in maps:
        if not path.is_file():
            raise ValueError(f"There is no layer map {path}: make it by `kvlab layer-map`.")
    problems = _load_problems(settings, seed)
    require_writable(output_dir / "training.json")
    # before loading: gives each process its own GPU
    main = PartialState(cpu=scale.device == "cpu").is_main_process
    student, tokenizer = _load_student(scale, settings), scale.load_tokenizer("student")
    figures = []

    def measure(when: str) -> None:
        correct = align.solved(student, tokenizer, problems, settings.max_new_tokens)
        conditions = "problems that were not learned from, the answer right, greedy"
        figures.append(figure(f"accuracy_{when}", correct, "fraction", conditions))

    if main:
        counts = len(problems.student), len(problems.questions)
        print("To learn from: {} problems. To be asked: {}.".format(*counts))
        measure("before")
    arm = Arm(2 * use_cka_layer_mapping, use_segment_resampling)
    history, aligned = _train(arm, student, problems, settings, seed, output_dir, maps)
    if main:
        student.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
        for number, projector in enumerate(aligned.projectors):
            projector.save_pretrained(output_dir / f"projector_{number}")
        measure("after")
        path = _write(output_dir / "training.json", settings, figures, {}, history=history)
        print(shared.figures_table(figures), path, sep="\n")


def compare_alignments(
    arms: list[str] | None = None, seeds: int = 3, output_dir: Path = Path("alignments"), **options
) -> None:
    """Train one student after another, by each arm of 4D alignment and by controls, and compare what they solve.

    Arms are ce_only (no teacher), baseline (by index, proportional layers), cka (layers by
    similarity), segment (time by segments), full (both), and full_one_layer (both, with the one
    most similar layer); no_kv_loss and no_projector (as segment, without one of these);
    text_distillation and logit_distillation (the solutions that the first teacher writes, and the
    probabilities of their tokens, too, instead of its cache); and controls that should be no better
    than ce_only: shuffled and shuffled_segment (as full and segment, but the teacher read another
    problem), and random_teacher (as full, with random weights). All have the same problems, order
    and steps. OUTPUT_DIR holds the results so far (comparison.json), and the files from which a run
    that was stopped continues.

    Args:
        arms: some of them, e.g. --arms ce_only full. Default: all.
        seeds: runs of each arm. Each seed has its own problems to learn from, order and projectors.
        output_dir: folder of the comparison.
    """
    settings = AlignmentOptions(**options)
    arms = list(dict.fromkeys(arms or align.ARMS))
    unknown = ", ".join(arm for arm in arms if arm not in align.ARMS)
    if unknown:
        raise ValueError(f"There is no arm {unknown}: choose from {', '.join(align.ARMS)}.")
    scale = settings.scale()
    main = PartialState(cpu=scale.device == "cpu").is_main_process
    tokenizer = scale.load_tokenizer("student")
    problems = [_load_problems(settings, seed) for seed in range(seeds)]
    path = output_dir / "comparison.json"
    require_writable(path)
    rows = []
    for seed, arm in product(range(seeds), arms):
        student = _load_student(scale, settings)
        if scale.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        history, _ = _train(align.ARMS[arm], student, problems[seed], settings, seed, output_dir)
        # a stopped run's seconds too
        row = {"arm": arm, "seed": seed, "seconds": sum(entry["seconds"] for entry in history)}
        if scale.device == "cuda":
            row["GB"] = torch.cuda.max_memory_allocated() / 1e9
        correct = align.solved(student, tokenizer, problems[seed], settings.max_new_tokens)
        row["accuracy"] = float(correct.mean())
        rows.append(row)
        if main:
            print(f"{arm}, seed {seed}: {row['accuracy']:.3f}")
            figures = align.alignment_figures(pd.DataFrame(rows))
            _write(path, settings, figures, {"arms": arms}, runs=rows)
    if main:
        print(shared.figures_table(figures), path, sep="\n")


def _write(path: Path, settings: AlignmentOptions, figures: list, resolved: dict, **more) -> Path:
    resolved |= {"model_name": settings.scale().student, "teacher_model": settings.teachers()}
    result = {"settings": shared.command_settings(**resolved), "figures": figures, **run_info()}
    return shared.write_json(path, result | more)


def _load_student(scale: Scale, settings: AlignmentOptions) -> PreTrainedModel:
    student = scale.load("student").float().requires_grad_(True)
    if settings.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    return student


def _load_teacher(scale: Scale) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return scale.load("teacher"), scale.load_tokenizer("teacher")


def _train(
    arm: Arm | None, student, problems: Problems, settings: AlignmentOptions, seed, folder, maps=()
) -> tuple[list[dict[str, float]], AlignedStudent]:
    """Train in a folder of the run's own name."""
    values = [getattr(settings, field.name) for field in fields(AlignmentSettings)]
    names, texts = settings.teachers(), [read_text(path) for path in maps]
    read = problems.student, problems.teacher, settings.enable_thinking
    folder /= shared.run_name(student, arm, values, seed, names, texts, *read)
    scale = settings.scale()
    scales = [replace(scale, teacher=name, enable_thinking=False) for name in names]
    loaders = [partial(_load_teacher, teacher) for teacher in scales]
    models = student, scale.load_tokenizer("student")
    every = settings.every or settings.steps(len(problems.student))
    run = settings, folder, maps, seed
    return align.train_arm(arm, *models, problems, loaders, *run, every=every)


def _load_problems(settings: AlignmentOptions, seed: int) -> Problems:
    """Problems to learn from, which the seed chooses, and others to be asked, the same for every seed."""
    data = settings.dataset_name, settings.source, settings.split
    test = data
    if settings.eval_dataset_name:
        test = settings.eval_dataset_name, settings.eval_source, settings.eval_split
    questions, answers, kind = _questions(*test, settings.heldout)
    without = {question[0]["content"] for question in questions}
    pairs = _solutions(*data, settings.problems, seed, without)
    scale = settings.scale()
    asked = [*zip(questions, answers, strict=True)]
    asked = _leave_out_long(scale, "student", asked, 0, settings.max_new_tokens)
    questions, answers = map(list, zip(*asked, strict=True))
    pairs = _leave_out_long(scale, "student", pairs, 0)
    for name in settings.teachers() if settings.kv_weight or settings.codi_weight else ():
        scale = replace(scale, teacher=name, enable_thinking=False)
        pairs = _leave_out_long(scale, "teacher", pairs, 1)
    settings.steps(len(pairs))  # too few are refused before models are loaded
    student, teacher = ([pair[i] for pair in pairs] for i in (0, 1))
    return Problems(student, teacher, questions, answers, kind)


def _leave_out_long(scale: Scale, role: str, rows: list, column: int, more: int = 0) -> list:
    """Rows of which a model can read the conversation in a column, and so many tokens more."""
    tokenizer = scale.load_tokenizer(role)
    lengths = [len(encode(tokenizer, row[column])) + more for row in rows]
    return shared.leave_out_long([scale.load_config(role)], rows, lengths)


def _questions(name: str, source: str | None, split: str, count: int) -> tuple[list, list, str]:
    """Conversations that end with the question, accepted answers, and their kind."""
    if name == "lab":
        solutions = [solution for solution, _ in corpora.Solutions(count, test=True)]
        answers = [(extract_answer("number", solution[1]["content"]),) for solution in solutions]
        return [solution[:1] for solution in solutions], answers, "number"
    records = _read_shuffled(name, source, split)[:count]
    if not records:
        raise ValueError(f"There is no problem to be asked in {source}: give another source.")
    questions = [messages(record)[:1] for record in records]
    return questions, [accepted_answers(record) for record in records], DATA_SETS[name].answer_kind


def _solutions(
    name: str, source: str | None, split: str, count: int | None, seed: int = 0, without: Set = ()
) -> list[tuple]:
    """Problems as student and teacher solve them, without some questions."""
    if name == "lab":
        shared.require_no_source(source)
        pairs = [*corpora.Solutions(count or 600, seed=seed)]
        return [pair for pair in pairs if pair[0][0]["content"] not in without]
    records = _read_shuffled(name, source, split)
    bare = sum(not record.reasoning.strip() for record in records)
    if bare:
        raise ValueError(f"{bare} of {len(records)} {name} records have no reasoning to align.")
    solutions = [messages(record) for record in records]
    solutions = [solution for solution in solutions if solution[0]["content"] not in without]
    solutions = random.Random(seed).sample(solutions, min(count or len(solutions), len(solutions)))
    return list(zip(solutions, solutions, strict=True))


def _read_shuffled(name: str, source: str | None, split: str) -> list:
    """Records, each once, in an order that is always the same: many sources are sorted by subject."""
    if source is None:
        raise ValueError(f"There is no source of {name} records: give a file or a name on the hub.")
    records = list(dict.fromkeys(read_records(name, source, split)))
    return random.Random(0).sample(records, len(records))
