"""Which models are supported: what their keys show, what is refused, and that a prefix does not grow."""

import copy
import importlib.util
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import DynamicCache

from kvlab import cache as kv
from kvlab import models
from kvlab.models import CacheError, first_layers, require_supported, rotary_of
from kvlab.speculate import Runner

IDS = torch.randint(0, 97, (1, 13), generator=torch.Generator().manual_seed(7))


# The trial of a model


def altered(model, change, layer=1):
    """Return a copy in which `change` is made of the keys that one layer puts into its cache."""
    model = copy.deepcopy(model)
    attention = model.model.layers[layer].self_attn

    class Cache(DynamicCache):
        def update(self, keys, values, *args, **options):
            return attention.cache.update(change(keys), values, *args, **options)

    def before(module, args, options):
        module.cache = options["past_key_values"]
        options["past_key_values"] = Cache()
        return args, options

    attention.register_forward_pre_hook(before, with_kwargs=True)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_layer_that_rotates_otherwise_is_refused_in_every_precision(tiny_model, dtype):
    model = tiny_model(dtype=dtype)
    weight = torch.linspace(0.5, 1.5, 16, dtype=dtype)
    for change in (
        lambda keys: keys * weight,  # a norm with weights after the rotation
        lambda keys: keys[:1].expand_as(keys),  # no rotation
        lambda keys: keys.unflatten(-1, (2, 8)).mT.flatten(-2),  # pairs beside each other
        lambda keys: torch.cat((keys[..., :8], -keys[..., 8:]), -1),  # the other direction
    ):
        with pytest.raises(CacheError, match=r"otherwise than Llama in layers \[1"):
            kv.prefill(altered(model, change), IDS)
    kv.prefill(altered(model, lambda keys: keys), IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_trial_changes_nothing_and_runs_once(tiny_model, dtype):
    model = copy.deepcopy(tiny_model(dtype=dtype, attention_dropout=0.5)).train()
    model.model.layers[0].eval()
    calls = []
    model.model.register_forward_hook(lambda *args: calls.append(args))
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    for _ in range(3):
        require_supported(model)
        first_layers(model, 2)
        rotary_of(model)
    assert len(calls) == 1
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())


def test_a_rotary_embedding_moves_caches_only_after_its_model_was_tried(tiny_model):
    model = copy.deepcopy(tiny_model())
    cache = kv.prefill(tiny_model(), IDS).cache
    with pytest.raises(CacheError, match=r"pass rotary_of\(model\)"):
        kv.shift(cache, 3, model.model.rotary_emb)
    kv.shift(cache, 3, rotary_of(model))


# Wrappers


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_a_wrapped_model_is_refused_and_the_model_inside_keeps_its_adapters(tiny_model, kind):
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    if kind == "prompt":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped = peft.get_peft_model(copy.deepcopy(tiny_model()), config).eval()
    for call in (
        lambda: kv.prefill(wrapped, IDS),
        lambda: first_layers(wrapped, 1),
        lambda: rotary_of(wrapped),
        lambda: models.fingerprint(wrapped),
        lambda: Runner(wrapped),
    ):
        with pytest.raises(CacheError, match=r"PEFT: model.get_base_model\(\)"):
            call()
    if kind == "lora":
        inside = wrapped.get_base_model()
        with torch.no_grad():
            torch.testing.assert_close(kv.prefill(inside, IDS).logits, wrapped(IDS).logits[:, -1])
            assert len(kv.prefill(first_layers(inside, 1), IDS).cache.layers) == 1
            assert not torch.allclose(wrapped(IDS).logits, tiny_model()(IDS).logits, atol=1e-2)


# A prefix is a value, and numbers are kept


def test_a_prefix_does_not_grow_when_a_model_appends_to_its_cache(tiny_model):
    model = tiny_model()
    mine = kv.prefill(model, IDS[:, :8]).cache
    prefix = kv.Prefix(mine, 8, IDS[0, :8].tolist())
    expected = kv.prefill(model, IDS[:, 8:], prefix).logits
    for cache in (mine, prefix.cache):
        model.generate(IDS, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert kv.length(cache) > 8
        cache.crop(-9)
        assert kv.length(prefix.cache) == 8
        assert torch.equal(kv.prefill(model, IDS[:, 8:], prefix).logits, expected)
        assert torch.equal(Runner(model).start([IDS[0, 8:].tolist()], [prefix], 1), expected)


@pytest.mark.parametrize("value", [65_600.0, -1e6, float("inf"), float("nan")])
def test_numbers_that_a_dtype_cannot_hold_are_refused(value):
    tensor = torch.tensor([1.0, 65_504.0, value])
    with pytest.raises(CacheError, match=r"at most 65,504.*store in torch.bfloat16"):
        kv.convert(tensor, torch.float16)
    assert kv.convert(tensor[:2], torch.float16).tolist() == [1.0, 65_504.0]


# Every architecture

ROOT = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore")
def test_every_causal_lm_is_right_or_refused_in_a_sentence_and_the_page_says_so():
    path = ROOT / "book/try_architectures.py"
    spec = importlib.util.spec_from_file_location("architectures", path)
    architectures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architectures)
    outcomes = architectures.outcomes()
    assert not {name: why for name, (result, why) in outcomes.items() if result == "wrong"}
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"):
        assert outcomes[name][0] == "right"
    for name in ("SmolLM3", "Ernie4_5", "Falcon", "DeepseekV3", "MiniCPM3", "Ministral3"):
        assert outcomes[f"{name}ForCausalLM"][0] == "refused"
    assert sum(result == "not built" for result, _ in outcomes.values()) < len(outcomes) / 5
    if f"transformers=={transformers.__version__}\n" in (ROOT / "constraints.txt").read_text():
        page = (ROOT / "book/architectures.md").read_text(encoding="utf-8")
        assert page == architectures.page(outcomes), "run `python book/try_architectures.py`"
