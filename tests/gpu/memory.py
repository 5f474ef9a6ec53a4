"""Part of tests/gpu/run.py: the peak memory of each chapter's largest step, beside `Scale.memory`.

`steps` has for each chapter a function that makes its models, of random weights, and returns the
step: two optimizer steps (only the second has moments) by the same functions of kvlab as in the
notebook, or for chapters that train nothing a prefill of the largest batch.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvlab import align, cache
from kvlab.align import AlignedStudent, Projector, Segmented, TeacherFeatures
from kvlab.distill import DistillExample, KVDistiller, train_distiller
from kvlab.draft import DraftExample, KnowledgeDraft, cast, train_draft
from kvlab.evaluate import figure
from kvlab.fuse import Fuser, FuserArm, FuserExample, Size
from kvlab.models import head_dim
from kvlab.scale import PRESETS, SHAPES, Need, Scale, config_of, parameters

LIMIT = 15e9  # of Colab's T4


def peak_bytes(function: Callable[[], object], *models: torch.nn.Module) -> int:
    """The largest number of bytes alive while a function runs, the weights of models included."""
    devices = {p.device.type for p in chain(*(model.parameters() for model in models))}
    gc.collect()
    if devices == {"cuda"}:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        function()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    weights = {p.data_ptr(): p.nbytes for model in models for p in model.parameters()}
    alive = largest = sum(weights.values())
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        largest = max(largest, alive)
    return largest


def make(scale: Scale, role: str) -> PreTrainedModel:
    """A frozen model of random weights, made on the device in the scale's precision."""
    torch.manual_seed(0)
    with torch.device(scale.device):
        model = AutoModelForCausalLM.from_config(config_of(getattr(scale, role)), dtype=scale.dtype)
    return model.eval().requires_grad_(False)


def draw(scale: Scale, *shape: int) -> torch.Tensor:
    """Random token ids, on the CPU, where examples are."""
    return torch.randint(config_of(scale.target).vocab_size, shape)


def draft_step(scale: Scale):
    """Chapter 02: a draft that reads, beside the plain cut and a draft that was trained before."""
    need, target = scale.needs["02_draft_training"], make(scale, "target")
    layers = f"uniform:{need.layers}"
    plain = KnowledgeDraft.cut(target, layers).requires_grad_(False)
    trained = KnowledgeDraft.cut(target, layers, share=True).requires_grad_(False)
    cast(trained, scale.dtype)
    reader = KnowledgeDraft.cut(target, layers, share=True, knowledge="kv")
    prompt = need.tokens - need.answer
    config, examples = target.config, []
    for ids in draw(scale, 2 * need.batch, need.tokens):
        states = torch.randn(need.answer, config.hidden_size).to(scale.dtype)
        shape = need.layers, 2, config.num_key_value_heads, 32, config.head_dim
        examples.append(DraftExample(ids, prompt, states, torch.randn(shape).to(scale.dtype)))

    def step():
        options = {"batch_size": need.batch, "epochs": 1, "precision": scale.precision}
        train_draft(reader, target, examples, examples[:1], loss_weights=LOSSES, **options)

    return step, target, plain, trained, reader


LOSSES = {"kl": 1.0, "ce": 1.0}  # of chapter 02


def distill_step(scale: Scale):
    """Chapter 03: a distiller, by gradients that are accumulated over two batches."""
    need, target = scale.needs["03_kv_distill"], make(scale, "target")
    settings = {} if scale.name in PRESETS else {"rank": 8, "scorer_hidden_size": 32}
    distiller = KVDistiller(target, **settings)
    context = need.tokens - need.answer
    examples = [
        DistillExample(
            *draw(scale, need.tokens).split((context, need.answer)), torch.ones(need.answer)
        )
        for _ in range(4 * need.batch)
    ]

    def step():
        options = {"batch_size": need.batch, "accumulate": 2, "precision": scale.precision}
        train_distiller(distiller, examples, steps=2, retention=(0.5, 0.5), **options)

    return step, distiller


def align_step(scale: Scale):
    """Chapter 04: a student in float32; the teacher has read the problems and is not there."""
    need, student = scale.needs["04_alignment_4d"], make(scale, "student")
    learner = make(replace(scale, dtype=torch.float32), "student").requires_grad_(True)
    learner.gradient_checkpointing_enable()
    teacher, config = config_of(scale.teacher), student.config
    widths = [c.num_key_value_heads * head_dim(c) for c in (teacher, config)]
    states = torch.nn.Linear(teacher.hidden_size, config.hidden_size, bias=False)
    aligned = AlignedStudent(learner, [Projector(*widths)], [states]).to(scale.device)
    prompt, problems = need.tokens - need.answer, []
    for ids in draw(scale, 2 * need.batch, need.tokens):
        borders = torch.tensor([0, prompt, need.tokens - 4, need.tokens])
        features = torch.randn(2, config.num_hidden_layers, need.tokens, widths[0]).half()
        state = torch.randn(config.num_hidden_layers, teacher.hidden_size).half()
        problems.append((Segmented(ids, borders), TeacherFeatures(*features, state)))
    settings = align.AlignmentSettings(epochs=1, batch_size=need.batch, kv_warmup=0)
    step = lambda: align.train_student(aligned, problems, settings, shares_every=2)  # noqa: E731
    return step, student, aligned


def fuse_step(scale: Scale):
    """Chapter 06: a fuser trained on responses."""
    need = scale.needs["06_cache_fusion"]
    sharer, receiver = make(scale, "target"), make(scale, "draft")
    texts = draw(scale, 2 * need.batch, need.tokens)
    examples = [FuserExample.split(ids, need.tokens - need.answer) for ids in texts]
    options = {"hidden": need.hidden, "steps": 2, "batch_size": need.batch}
    arm = FuserArm(gate=4.0, precision=scale.precision, **options)
    return lambda: arm.train(receiver, sharer, examples), sharer, receiver


def prefill_step(scale: Scale, chapter: str):
    """The other chapters: each model reads the chapter's largest batch, and the caches stay."""
    need = scale.needs[chapter]
    models = [make(scale, role) for role in need.frozen]
    ids = draw(scale, need.batch, need.tokens).to(scale.device)

    @torch.inference_mode()
    def step():
        return [cache.prefill(model, ids) for model in models]

    return step, *models


STEPS: dict[str, Callable] = {
    "02_draft_training": draft_step,
    "03_kv_distill": distill_step,
    "04_alignment_4d": align_step,
    "06_cache_fusion": fuse_step,
}
for _chapter in PRESETS["tiny"]["needs"]:
    STEPS.setdefault(_chapter, lambda scale, chapter=_chapter: prefill_step(scale, chapter))


def measured(scale: Scale, chapter: str) -> float:
    """GB at the peak of a chapter's step."""
    step, *models = STEPS[chapter](scale)
    return peak_bytes(step, *models) / 1e9
