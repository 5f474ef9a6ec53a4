"""Sizes and memory that are known before anything is downloaded, and the one switch."""

import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch

from kvlab import cache as kv
from kvlab.lab import models as lab
from kvlab.scale import PRESETS, Scale, config_of, parameters
from kvlab.speculate import best_gamma, cost_model

sys.path.append(str(Path(__file__).parent / "gpu"))

import memory

CHAPTERS = set(PRESETS["tiny"]["needs"])
TRAINING = sorted(name for name, need in PRESETS["t4"]["needs"].items() if need.method)
OWN_PAIR = "05_speculative_decoding"


def preset(name, **changes):
    settings = {
        "device": "cpu",
        "dtype": torch.float32 if name == "tiny" else torch.float16,
    } | changes
    return Scale(name=name, **settings, **PRESETS[name])


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)


# sizes


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("Qwen/Qwen3-0.6B", 596.05),
        ("Qwen/Qwen3-1.7B", 1720.57),
        ("Qwen/Qwen3-14B", 14768.3),
        ("Qwen/Qwen2-0.5B-Instruct", 494.03),
        ("Qwen/Qwen2-1.5B-Instruct", 1543.7),
        ("Qwen/Qwen2-7B-Instruct", 7615.6),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494.03),
        ("Qwen/Qwen2.5-3B-Instruct", 3085.94),
        ("Qwen/Qwen2.5-14B-Instruct", 14770.03),
    ],
)
def test_parameters_are_those_of_the_model_cards(name, millions):
    assert parameters(config_of(name)) / 1e6 == pytest.approx(millions, abs=0.06)


def test_every_role_has_a_known_size():
    for settings in PRESETS.values():
        for role in ("target", "draft", "teacher", "student"):
            assert config_of(settings[role]).num_hidden_layers > 0


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match=r"'gpt2' is not in kvlab/scales\.yaml"):
        config_of("gpt2")


def test_parameters_are_linear_in_layers():
    config = config_of("Qwen/Qwen3-0.6B")
    counts = [parameters(config, layers=n) for n in (0, 1, 3)]
    assert counts[2] - counts[0] == 3 * (counts[1] - counts[0])
    assert parameters(config, layers=28) == parameters(config)
    assert config.num_hidden_layers == len(config.layer_types) == 28


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
def test_cache_bytes_are_those_of_a_real_cache(tiny_model, family, dtype):
    model = tiny_model(family, dtype=dtype)
    cache = kv.prefill(model, torch.zeros(2, 13, dtype=torch.long)).cache
    assert 2 * 13 * kv.bytes_per_token(model.config, dtype) == kv.nbytes(cache)


# memory


@pytest.mark.parametrize("chapter", sorted(CHAPTERS))
def test_every_chapter_fits_its_gpu(chapter):
    assert preset("t4").memory(chapter)["total"] < 14
    assert preset("full").memory(chapter)["total"] < 75  # of 80


def test_every_preset_knows_every_chapter():
    assert all(set(settings["needs"]) == CHAPTERS for settings in PRESETS.values())
    for chapter in CHAPTERS:
        parts = preset("tiny").memory(chapter)
        assert parts.pop("total") == pytest.approx(sum(parts.values()))
        assert all(value >= 0 for value in parts.values())


def test_the_peak_is_that_of_known_tensors():
    layer = torch.nn.Linear(500, 2000, bias=False).requires_grad_(False)
    x = torch.randn(1000, 500)

    def step():
        y = layer(x)  # 8 MB
        z = y * 2  # 16 MB
        del y
        (z + 1).sum()

    assert memory.peak_bytes(step, layer) == pytest.approx(4e6 + 16e6, rel=1e-4)


@pytest.mark.parametrize("chapter", sorted({*TRAINING, "01_knowledge_caching", OWN_PAIR}))
@pytest.mark.parametrize("shape", ["narrow", "wide"])
def test_predicted_memory_is_measured(shape, chapter):
    scale = stand_in(shape)
    assert scale.memory(chapter)["total"] == pytest.approx(
        memory.measured(scale, chapter), rel=0.15
    )


@pytest.mark.parametrize("chapter", TRAINING)
def test_predicted_memory_is_measured_where_a_loss_works_in_chunks(chapter, monkeypatch):
    scale = stand_in("narrow", 128)
    whole = scale.memory(chapter)["total"]
    monkeypatch.setattr("kvlab.losses.CHUNK", 32 * config_of(scale.target).vocab_size)
    predicted = scale.memory(chapter)["total"]
    assert predicted == pytest.approx(memory.measured(scale, chapter), rel=0.15)
    assert (predicted < 0.9 * whole) == (chapter != "04_alignment_4d")


@functools.cache
def stand_in(shape, tokens=64):
    return memory.stand_in(shape, tokens)


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("chapter", TRAINING)
def test_trained_and_copied_parameters_are_those_of_the_modules(name, chapter, monkeypatch):
    for module in ("draft", "distill"):  # it computes with real numbers
        monkeypatch.setattr(f"kvlab.{module}.require_supported", lambda _: None)
    scale = preset(name, device="meta")
    need = scale.needs[chapter]
    counts = memory.counted(scale, chapter)
    assert counts == {"added": need.added, "copied": need.copied}


def test_weights_are_the_bytes_of_the_models():
    scale = preset("tiny")
    real = {name: sum(p.nbytes for p in lab.make(name).parameters()) for name in lab.NAMES}
    for chapter, names in {
        "01_knowledge_caching": ["lab-target"],
        "05_speculative_decoding": ["lab-target", "lab-draft"],
        "06_cache_fusion": ["lab-target", "lab-draft"],
    }.items():
        assert scale.memory(chapter)["weights"] == pytest.approx(
            sum(real[name] for name in names) / 1e9, rel=1e-9
        )
        half = preset("tiny", dtype=torch.float16).memory(chapter)["weights"]
        assert half == pytest.approx(scale.memory(chapter)["weights"] / 2)


def test_the_cache_part_is_one_real_cache_per_model():
    scale = preset("tiny")
    need = scale.needs["05_speculative_decoding"]
    real = 0
    for role in need.frozen:
        cache = kv.prefill(
            lab.make(getattr(scale, role)), torch.zeros(need.batch, 8, dtype=torch.long)
        ).cache
        real += kv.nbytes(cache) * need.tokens // 8
    assert scale.memory("05_speculative_decoding")["cache"] == pytest.approx(real / 1e9)


def test_training_is_weights_and_moments_in_float32():
    scale = preset("tiny")
    for chapter, student in {
        "06_cache_fusion": 0,
        "04_alignment_4d": lab.make("lab-draft"),
    }.items():
        trained = scale.needs[chapter].added + (student and student.num_parameters())
        assert scale.memory(chapter)["training"] == pytest.approx(12 * trained / 1e9)
        assert scale.memory(chapter)["step"] >= 4 * trained / 1e9  # gradients
    assert scale.memory("00_start_here")["training"] == 0


def test_an_unknown_chapter_is_refused():
    with pytest.raises(ValueError, match=r"No chapter '99'; expected one of 00_start_here"):
        preset("tiny").memory("99")


def test_describe_is_a_sentence_with_the_models():
    sentence = preset("t4", device="cuda").describe("05_speculative_decoding")
    for part in (
        "Scale t4",
        "target Qwen/Qwen2.5-3B-Instruct",
        "draft Qwen/Qwen2.5-0.5B-Instruct",
        "float16 on cuda",
        "GB",
    ):
        assert part in sentence


# the switch


def test_an_unknown_name_is_refused_with_the_choices(monkeypatch):
    monkeypatch.setenv("KVLAB_SCALE", "huge")
    with pytest.raises(ValueError, match="KVLAB_SCALE is 'huge'; expected one of tiny, t4, full"):
        Scale.current()


@pytest.mark.parametrize("name", ["t4", "full"])
def test_a_scale_that_needs_a_gpu_says_so(monkeypatch, no_gpu, name):
    monkeypatch.setenv("KVLAB_SCALE", name)
    with pytest.raises(ValueError, match=f"'{name}', which needs a GPU. Use KVLAB_SCALE=tiny"):
        Scale.current()


@pytest.mark.parametrize("value", [None, "", "tiny"])
def test_without_a_gpu_the_scale_is_tiny(monkeypatch, no_gpu, value):
    monkeypatch.delenv("KVLAB_SCALE", raising=False)
    if value is not None:
        monkeypatch.setenv("KVLAB_SCALE", value)
    scale = Scale.current()
    assert (scale.name, scale.device, scale.dtype) == ("tiny", "cpu", torch.float32)
    first = torch.rand(3)
    Scale.current()
    assert torch.equal(torch.rand(3), first)


def test_current_never_adds_threads(monkeypatch, no_gpu):
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    before = torch.get_num_threads()
    Scale.current()
    assert torch.get_num_threads() <= min(before, 2)


@pytest.mark.parametrize(("gigabytes", "want"), [(16, "t4"), (80, "full")])
def test_the_gpu_chooses(monkeypatch, gigabytes, want):
    monkeypatch.delenv("KVLAB_SCALE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: want == "full"
    )
    memory = type("Properties", (), {"total_memory": gigabytes * 2**30})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: memory)
    monkeypatch.setattr("torch.manual_seed", lambda _: None)
    scale = Scale.current()
    assert (scale.name, scale.device) == (want, "cuda")
    assert scale.dtype == (torch.bfloat16 if want == "full" else torch.float16)


def test_a_scale_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tiny").target = "lab-draft"
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tiny").needs["00_start_here"].batch = 2


# chapter 05's pair


@pytest.mark.parametrize("name", ["t4", "full"])
def test_the_pair_of_chapter_05_can_win_by_layers_and_by_bytes(name):
    models = PRESETS[name]["needs"]["05_speculative_decoding"].models
    target, draft = (config_of(models[role]) for role in ("target", "draft"))
    for c in (
        draft.num_hidden_layers / target.num_hidden_layers,
        parameters(draft) / parameters(target),
    ):
        assert best_gamma(0.7, c) > 0
        assert cost_model(0.7, c, best_gamma(0.7, c)).speedup > 1
    assert draft.vocab_size <= target.vocab_size


def test_a_chapter_can_have_models_of_its_own(monkeypatch):
    monkeypatch.setenv("KVLAB_SCALE", "t4")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    properties = type("Properties", (), {"total_memory": 16 * 2**30})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)
    monkeypatch.setattr("torch.manual_seed", lambda _: None)
    own = Scale.current("05_speculative_decoding")
    assert (own.target, own.draft) == ("Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct")
    assert own.teacher == Scale.current().teacher
    assert Scale.current().target == Scale.current("06_cache_fusion").target == "Qwen/Qwen3-1.7B"
    assert Scale.current().describe("05_speculative_decoding") == own.describe(
        "05_speculative_decoding"
    )
    chapter = "05_speculative_decoding"
    assert Scale.current().memory(chapter) == own.memory(chapter)
    weights = sum(parameters(config_of(model)) for model in (own.target, own.draft))
    assert own.memory(chapter)["weights"] == pytest.approx(2 * weights / 1e9)
