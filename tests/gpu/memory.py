"""Part of tests/gpu/run.py: the peak memory of each chapter's largest step, beside `Scale.memory`.

`STEPS` has for each chapter a function that makes its models, of random weights, and returns the
step: two optimizer steps (only the second has moments) by the same functions of kvlab as in the
notebook, or for chapters that train nothing a prefill of the largest batch.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvlab import cache
from kvlab.align import (
    AlignedStudent,
    AlignmentSettings,
    Projector,
    Segmented,
    TeacherFeatures,
    train_student,
)
from kvlab.distill import DistillExample, KVDistiller, train_distiller
from kvlab.draft import DraftExample, KnowledgeDraft, cast, train_draft
from kvlab.evaluate import figure
from kvlab.files import write_tensors
from kvlab.fuse import Fuser, FuserArm, FuserExample, Settings, Size
from kvlab.models import head_dim
from kvlab.scale import PRESETS, SHAPES, Scale, config_of, parameters

LIMITS = {"t4": 15e9, "full": 80e9}  # bytes of the GPUs


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
    share = scale.name != "tiny"
    trained = KnowledgeDraft.cut(target, layers, share).requires_grad_(False)
    cast(trained, scale.dtype)
    reader = KnowledgeDraft.cut(target, layers, share, knowledge="kv")
    prompt = need.tokens - need.answer
    config, examples = target.config, []
    for ids in draw(scale, 2 * need.batch, need.tokens):
        states = torch.randn(need.answer, config.hidden_size).to(scale.dtype)
        shape = need.layers, 2, config.num_key_value_heads, 32, config.head_dim
        examples.append(DraftExample(ids, prompt, states, torch.randn(shape).to(scale.dtype)))

    def write_nothing(draft, score, path):
        write_tensors(path, {"nothing": torch.zeros(1)})

    def step():
        options = {"batch_size": need.batch, "epochs": 1, "precision": scale.precision}
        options["loss_weights"] = {"kl": 1.0, "ce": 1.0}
        # Gigabytes of checkpoints take seconds, and no memory of the device.
        with patch("kvlab.training._save_run"), patch("kvlab.draft._keep_best", write_nothing):
            train_draft(reader, target, examples, examples[:1], **options)

    return step, target, plain, trained, reader


def distill_step(scale: Scale):
    """Chapter 03: a distiller, by gradients that are accumulated over two batches."""
    need, target = scale.needs["03_kv_distill"], make(scale, "target")
    small = {"rank": 8, "scorer_hidden_size": 32}
    settings = {"t4": {}, "full": {}, "tiny": {"rank": 32, "scorer_hidden_size": 512}}
    distiller = KVDistiller(target, **settings.get(scale.name, small))
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
    need = scale.needs["04_alignment_4d"]
    frozen = [make(scale, role) for role in need.frozen]
    learner = make(replace(scale, dtype=torch.float32), "student").requires_grad_(True)
    learner.gradient_checkpointing_enable()
    teacher, config = config_of(scale.teacher), learner.config
    widths = [c.num_key_value_heads * head_dim(c) for c in (teacher, config)]
    states = torch.nn.Linear(teacher.hidden_size, config.hidden_size, bias=False)
    aligned = AlignedStudent(learner, [Projector(*widths)], [states]).to(scale.device)
    prompt, problems = need.tokens - need.answer, []
    for ids in draw(scale, 2 * need.batch, need.tokens):
        borders = torch.tensor([0, prompt, need.tokens - 4, need.tokens])
        features = torch.randn(2, config.num_hidden_layers, need.tokens, widths[0]).half()
        state = torch.randn(config.num_hidden_layers, teacher.hidden_size).half()
        problems.append((Segmented(ids, borders), TeacherFeatures(*features, state)))
    settings = AlignmentSettings(epochs=1, batch_size=need.batch, kv_warmup=0)
    return partial(train_student, aligned, problems, settings, shares_every=2), *frozen, aligned


def fuse_step(scale: Scale):
    """Chapter 06: a fuser trained on responses."""
    need = scale.needs["06_cache_fusion"]
    sharer, receiver = make(scale, "target"), make(scale, "draft")
    texts = draw(scale, 2 * need.batch, need.tokens)
    examples = [FuserExample.split(ids, need.tokens - need.answer) for ids in texts]
    options = {"hidden": need.hidden, "steps": 2, "batch_size": need.batch}
    arm = FuserArm(gate=4.0, precision=scale.precision, **options)
    return partial(arm.train, receiver, sharer, examples), sharer, receiver


def prefill_step(scale: Scale, chapter: str):
    """The other chapters: each model reads the chapter's largest batch, and the caches stay."""
    need = scale.needs[chapter]
    scale = replace(scale, **need.models)
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
for _chapter in PRESETS["t4"]["needs"]:
    STEPS.setdefault(_chapter, partial(prefill_step, chapter=_chapter))


def measured(scale: Scale, chapter: str) -> float:
    """GB at the peak of a chapter's step."""
    step, *models = STEPS[chapter](scale)
    return peak_bytes(step, *models) / 1e9


def counted(scale: Scale, chapter: str) -> dict[str, int]:
    """Parameters that train beside those of a student, and those of copies, as in `Need`."""
    need = scale.needs[chapter]
    _, *models = STEPS[chapter](scale)
    if need.method == "fuse":
        sizes = [Size.of(config_of(name)) for name in (scale.draft, scale.target)]
        with torch.device("meta"):
            models.append(Fuser(*sizes, settings=Settings(hidden=need.hidden)))
    counts = {"added": 0, "copied": 0}
    for parameter in {id(p): p for model in models for p in model.parameters()}.values():
        counts["added" if parameter.requires_grad else "copied"] += parameter.numel()
    counts["copied"] -= sum(parameters(config_of(getattr(scale, role))) for role in need.frozen)
    if need.method == "align":
        counts["added"] -= parameters(config_of(scale.student))
    return counts


# Widths of models so small that a CPU is done in a second, with a vocabulary as large beside them as
# it is in real ones: hidden size, MLP, layers, heads, KV heads, width of a head, vocabulary.
STAND_INS = {
    "narrow": {
        "target": (64, 192, 4, 4, 2, 16, 6000),
        "draft": (32, 96, 3, 4, 2, 16, 6000),
        "teacher": (64, 192, 4, 4, 2, 16, 6000),
        "student": (48, 160, 3, 4, 2, 12, 6000),
    },
    "wide": {
        "target": (96, 320, 8, 8, 4, 16, 12000),
        "draft": (64, 160, 5, 8, 4, 16, 12000),
        "teacher": (96, 320, 8, 6, 2, 16, 12000),
        "student": (64, 256, 6, 4, 2, 16, 12000),
    },
}
FIELDS = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"


def stand_in(name: str, tokens: int = 64) -> Scale:
    """A scale of small models on the CPU, in bfloat16, which stands for a GPU's half precision."""
    roles = {"embedder": "", "questions": 1, "device": "cpu", "dtype": torch.bfloat16}
    for role, widths in STAND_INS[name].items():
        family = "qwen3" if role in ("target", "draft") else "qwen2"
        fields = dict(zip((*FIELDS.split(), "head_dim", "vocab_size"), widths, strict=True))
        if family == "qwen2":
            fields.pop("head_dim")
        roles[role] = f"{name} {role}"
        SHAPES[roles[role]] = {"model_type": family, "tie_word_embeddings": True} | fields
    needs = {}
    for chapter, need in PRESETS["t4"]["needs"].items():
        changes = {"batch": 2, "tokens": 4 * tokens, "models": {}}
        if need.method:
            changes = {"batch": 2, "tokens": tokens, "answer": tokens // 2}
        if need.hidden:
            changes["hidden"] = 32
        needs[chapter] = replace(need, **changes)
    scale = Scale(name=name, needs=needs, **roles)
    for chapter, need in needs.items():
        if need.method:
            needs[chapter] = replace(need, **counted(scale, chapter))
    return scale


@contextmanager
def limit(bytes_: float, device: str) -> Iterator[None]:
    """Let PyTorch take no more of a GPU's memory than this."""
    if device != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, bytes_ / total))
    try:
        yield
    finally:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)


def check(scale: Scale, preset: str, chapter: str) -> list[dict]:
    """Compare one chapter's peak with the prediction, and with the limit of the preset's GPU."""
    with limit(LIMITS[preset], scale.device):
        peak = measured(scale, chapter)
    predicted = scale.memory(chapter)["total"]
    need = scale.needs[chapter]
    conditions = f"{', '.join(need.frozen)}; {need.batch} x {need.tokens} tokens, {scale.dtype}"
    names = {"gb": peak, "predicted_gb": predicted}
    figures = [
        figure(f"{preset}_{chapter[:2]}_{name}", [value], "GB", conditions)
        for name, value in names.items()
    ]
    assert peak < LIMITS[preset] / 1e9 - 1, f"{peak:.2f} GB"
    assert abs(predicted / peak - 1) < 0.15, f"{peak:.4g} GB, predicted were {predicted:.4g}"
    return figures


def checks(device: str, dry: bool):
    """Each chapter at t4 within its 15 GB, then at full; dry: a stand-in for t4."""
    settings = {"t4": torch.float16} if dry else {"t4": torch.float16, "full": torch.bfloat16}
    for preset, dtype in settings.items():
        if dry:
            scale = stand_in("narrow")
        else:
            scale = Scale(name=preset, device=device, dtype=dtype, **PRESETS[preset])
        for chapter in sorted(scale.needs):
            yield f"{preset} {chapter}", partial(check, scale, preset, chapter)
