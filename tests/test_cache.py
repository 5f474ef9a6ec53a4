"""The laws of a cache as a value, checked against transformers."""

import copy
import json

import pytest
import torch
import transformers
from conftest import FAMILIES, ROPES
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from kvlab import cache as kv
from kvlab.models import CacheError, fingerprint, first_layers, require_supported, rotary_of
from kvlab.slots import Slots, step

IDS = torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(7))
TIGHT = {torch.float32: 1e-5, torch.float64: 1e-12}

every_family = pytest.mark.parametrize("family", FAMILIES)
every_rope = pytest.mark.parametrize("rope", ROPES)
every_dtype = pytest.mark.parametrize("dtype", TIGHT, ids=str)


def tensors(cache):
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def keys_of(cache):
    return torch.stack([layer.keys for layer in cache.layers])  # (L, B, H_kv, T, D)


def values_of(cache):
    return torch.stack([layer.values for layer in cache.layers])


def equal(one, two):
    return len(one.layers) == len(two.layers) and all(map(torch.equal, tensors(one), tensors(two)))


def distance(one, two):
    """Largest difference, relative to the largest number."""
    return max(
        ((a - b).abs().max() / b.abs().max()).item()
        for a, b in zip(tensors(one), tensors(two), strict=True)
    )


def random_cache(rows=2, entries=9, dtype=torch.float32, seed=0):
    generator, cache = torch.Generator().manual_seed(seed), DynamicCache()
    for layer in range(3):
        cache.update(
            *torch.randn(2, rows, 2, entries, 16, generator=generator, dtype=torch.float64).to(
                dtype
            ),
            layer,
        )
    return cache


# prefill


@every_family
@every_rope
@every_dtype
def test_prefill_in_pieces_is_prefill_at_once(tiny_model, family, rope, dtype):
    model, near = tiny_model(family, rope, dtype), {"rtol": 0, "atol": TIGHT[dtype]}
    whole = kv.prefill(model, IDS)
    torch.testing.assert_close(whole.logits, model(IDS, use_cache=False).logits[:, -1], **near)
    past = None
    for piece in IDS.split([1, 4, 6, 2], dim=1):
        past = kv.prefill(model, piece, past)
    assert past.next_position == whole.next_position == kv.length(past.cache) == 13
    assert torch.equal(past.positions, whole.positions)
    torch.testing.assert_close(past.logits, whole.logits, **near)
    torch.testing.assert_close(tensors(past.cache), tensors(whole.cache), **near)


@every_family
@every_rope
def test_decoding_from_a_cache_is_generate(tiny_model, family, rope):
    model = tiny_model(family, rope, torch.float64)
    want = model.generate(
        IDS, do_sample=False, max_new_tokens=8, attention_mask=torch.ones_like(IDS)
    )[:, 13:]
    prefix = kv.prefill(model, IDS)
    tokens = []
    for _ in range(8):
        tokens.append(prefix.logits.argmax(-1, keepdim=True))
        prefix = kv.prefill(model, tokens[-1], prefix)
    assert torch.equal(torch.cat(tokens, 1), want)


@every_family
def test_padded_rows_are_the_rows_alone(tiny_model, family):
    model, lengths = tiny_model(family, dtype=torch.float64), torch.tensor([13, 9])
    mask = (torch.arange(13) >= 13 - lengths[:, None]).long()
    ids = torch.stack([IDS[0], torch.cat((torch.zeros(4, dtype=torch.long), IDS[1, :9]))])
    prefix = kv.prefill(model, ids[:, :7], attention_mask=mask[:, :7])
    prefix = kv.prefill(model, ids[:, 7:], prefix)
    assert prefix.next_position.tolist() == [13, 9]
    for row, n in enumerate(lengths):
        alone = kv.prefill(model, ids[row : row + 1, 13 - n :])
        torch.testing.assert_close(prefix.logits[row], alone.logits[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(
            keys_of(prefix.cache)[:, row, :, 13 - n :],
            keys_of(alone.cache)[:, 0],
            rtol=0,
            atol=1e-6,
        )


@every_family
def test_eviction_is_masking_if_the_position_is_passed(tiny_model, family):
    model = tiny_model(family, dtype=torch.float64)
    full, kept = kv.prefill(model, IDS[:, :10]).cache, torch.tensor([0, 2, 3, 7, 9])
    visible = torch.zeros(2, 10)
    visible[:, kept] = 1
    masked = kv.prefill(model, IDS[:, 10:], kv.Prefix(full, 10, attention_mask=visible))
    small = kv.select(full, kept)
    evicted = kv.prefill(model, IDS[:, 10:], kv.Prefix(small, 10))
    assert evicted.next_position == 13
    assert kv.length(evicted.cache) == 8
    torch.testing.assert_close(evicted.logits, masked.logits, rtol=0, atol=1e-12)
    forgotten = kv.prefill(model, IDS[:, 10:], kv.Prefix(small, kv.length(small)))
    assert (forgotten.logits - masked.logits).abs().max() > 1e-3


def test_rows_may_continue_at_their_own_positions(tiny_model):
    model, past = tiny_model(), kv.prefill(tiny_model(), IDS[:, :5])
    both = kv.prefill(model, IDS[:, 5:], past, position=torch.tensor([5, 40]))
    assert both.next_position.tolist() == [13, 48]
    for row, position in enumerate((5, 40)):
        one = kv.prefill(model, IDS[:, 5:], past, position=position)
        torch.testing.assert_close(both.logits[row], one.logits[row], rtol=0, atol=1e-5)


def test_gradients_reach_what_a_cache_was_made_from(tiny_model):
    model = copy.deepcopy(tiny_model())
    weight = model.model.layers[0].self_attn.k_proj.weight.requires_grad_(True)
    cache = kv.select(kv.prefill(model, IDS).cache, torch.tensor([1, 4]))
    keys_of(kv.shift(cache, 3, rotary_of(model))).square().sum().backward()
    assert weight.grad.abs().sum() > 0


# select, join, truncate


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 3), st.integers(1, 12))
def test_select_and_join(data, rows, entries):
    cache = random_cache(rows, entries)
    cut = data.draw(st.integers(0, entries))
    parts = kv.select(cache, torch.arange(cut)), kv.select(cache, torch.arange(cut, entries))
    assert equal(kv.join(*parts), kv.clone(cache))
    index = st.lists(st.integers(0, entries - 1), min_size=1, max_size=15)
    p = torch.tensor(data.draw(index))
    q = torch.tensor(data.draw(st.lists(st.integers(0, len(p) - 1), max_size=9)), dtype=torch.long)
    assert equal(kv.select(kv.select(cache, p), q), kv.select(cache, p[q]))
    assert torch.equal(keys_of(kv.select(cache, p)), keys_of(cache)[:, :, :, p])
    assert torch.equal(values_of(kv.select(cache, p)), values_of(cache)[:, :, :, p])


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 2, 4), (3, 2, 2, 4)], ids=str)
def test_select_by_row_head_and_layer(shape):
    cache, index = (
        random_cache(),
        torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(1)),
    )
    four = index[:, None] if index.ndim == 2 else index
    four = four.expand(3, 2, 2, 4)
    for tensor, kept in (
        (keys_of(cache), keys_of(kv.select(cache, index))),
        (values_of(cache), None),
    ):
        kept = values_of(kv.select(cache, index)) if kept is None else kept
        for at in [(0, 0, 0, 0), (1, 1, 0, 2), (2, 0, 1, 3), (2, 1, 1, 1)]:
            assert torch.equal(kept[at], tensor[(*at[:3], four[at])])


def test_truncate_is_crop():
    for kept in range(9):  # crop(-n) alone means the same in every release; crop(0) does not
        cropped = kv.clone(random_cache())
        cropped.crop(-(9 - kept))
        assert equal(kv.truncate(random_cache(), kept), cropped)


def test_bytes(tiny_model):
    model = tiny_model()
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        cache = random_cache(rows=2, entries=8, dtype=dtype)
        assert kv.nbytes(cache) == kv.bytes_per_token(model.config, dtype) * 8 * 2
        kept = kv.select(cache, torch.tensor([1, 5]))
        assert kv.nbytes(kept) * 4 == kv.nbytes(cache)
        assert kv.nbytes(kv.truncate(cache, 2)) == kv.nbytes(kept)
        assert sum(x.untyped_storage().nbytes() for x in tensors(kept)) == kv.nbytes(kept)


def test_a_cache_never_changes_under_its_owner(tiny_model):
    model, rotary = tiny_model(), rotary_of(tiny_model())
    cache = kv.prefill(model, IDS).cache
    before, frozen = [(x.data_ptr(), x._version) for x in tensors(cache)], kv.clone(cache)
    kv.prefill(model, IDS, kv.Prefix(cache, 13))
    kv.join(kv.select(cache, torch.tensor([1, 2])), kv.truncate(cache, 3))
    kv.rotate(kv.unrotate(kv.shift(cache, 5, rotary), torch.arange(13), rotary), 3, rotary)
    model(
        IDS, past_key_values=kv.truncate(cache, 13)
    )  # transformers grows the result, not the argument
    assert [(x.data_ptr(), x._version) for x in tensors(cache)] == before
    assert equal(cache, frozen)
    assert not {x.data_ptr() for x in tensors(frozen)} & {x.data_ptr() for x in tensors(cache)}


# shift


@settings(deadline=None, max_examples=25)
@given(
    st.integers(-3000, 3000),
    st.integers(-3000, 3000),
    st.sampled_from(list(ROPES)),
    st.sampled_from(list(TIGHT)),
)
def test_shift_adds_up_and_comes_back(tiny_model, a, b, rope, dtype):
    cache, rotary = random_cache(dtype=dtype), rotary_of(tiny_model(rope=rope))
    near = 1e-6 if dtype == torch.float32 else 1e-12
    assert distance(kv.shift(kv.shift(cache, a, rotary), -a, rotary), cache) < near
    assert (
        distance(kv.shift(kv.shift(cache, a, rotary), b, rotary), kv.shift(cache, a + b, rotary))
        < near
    )
    assert torch.equal(values_of(kv.shift(cache, a, rotary)), values_of(cache))


def test_shift_by_row_entry_head_and_layer(tiny_model):
    cache, rotary = random_cache(), rotary_of(tiny_model())
    by_step = {n: keys_of(kv.shift(cache, n, rotary)) for n in range(5)}
    for shape in [(9,), (2, 1), (2, 9), (2, 2, 9), (3, 2, 2, 9)]:
        by = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(1))
        moved = keys_of(kv.shift(cache, by, rotary))
        four = (by[:, None] if by.ndim == 2 else by).expand(3, 2, 2, 9)
        want = sum(by_step[n] * (four == n)[..., None] for n in range(5))
        torch.testing.assert_close(moved, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_shift_in_low_precision_rounds_once(tiny_model, dtype):
    cache, rotary = random_cache(dtype=dtype), rotary_of(tiny_model())
    exact = kv.shift(random_cache(dtype=dtype), 900, rotary)
    wide = DynamicCache()
    for i, layer in enumerate(cache.layers):
        wide.update(layer.keys.double(), layer.values.double(), i)
    assert keys_of(exact).dtype == dtype
    torch.testing.assert_close(keys_of(exact), keys_of(kv.shift(wide, 900, rotary)).to(dtype))


@every_family
@every_rope
def test_shift_is_prefill_at_that_position(tiny_model, family, rope):
    model = tiny_model(family, rope)
    moved = kv.shift(kv.prefill(model, IDS).cache, 50, rotary_of(model))
    there = kv.prefill(model, IDS, position=50).cache
    torch.testing.assert_close(tensors(moved), tensors(there), rtol=0, atol=5e-5)


@every_family
@every_rope
@every_dtype
def test_in_one_layer_an_item_prefilled_alone_fits_after_a_shift(tiny_model, family, rope, dtype):
    model = tiny_model(family, rope, dtype, num_hidden_layers=1)
    whole, first, second = (kv.prefill(model, ids).cache for ids in (IDS, IDS[:, :6], IDS[:, 6:]))
    joined = kv.join(first, kv.shift(second, 6, rotary_of(model)))
    torch.testing.assert_close(
        tensors(joined), tensors(whole), rtol=0, atol=1e-5
    )  # the model's angles are float32
    unmoved = kv.join(first, second)
    assert torch.allclose(values_of(unmoved), values_of(whole), atol=1e-5)
    assert (keys_of(unmoved) - keys_of(whole)).abs().max() > 0.1


def test_beyond_one_layer_an_item_prefilled_alone_is_an_approximation(tiny_model):
    model = tiny_model()
    whole, first, second = (kv.prefill(model, ids).cache for ids in (IDS, IDS[:, :6], IDS[:, 6:]))
    off = (keys_of(kv.join(first, kv.shift(second, 6, rotary_of(model)))) - keys_of(whole)).abs()
    assert off[0].max() < 1e-4
    assert off[1].max() > 0.1


@every_family
@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_scaled_rope_needs_its_own_frequencies(tiny_model, family, rope):
    model = tiny_model(family, rope)
    there = kv.prefill(model, IDS, position=50).cache
    wrong = kv.shift(kv.prefill(model, IDS).cache, 50, rotary_of(tiny_model(family)))
    assert (keys_of(wrong) - keys_of(there)).abs().max() > 0.1


@every_family
@every_rope
def test_unrotate_gives_the_keys_before_rotation(tiny_model, family, rope):
    model, seen = tiny_model(family, rope), []
    attention, rotary = model.model.layers[0].self_attn, rotary_of(model)
    last = attention.k_norm if family == "Qwen3" else attention.k_proj
    handle = last.register_forward_hook(lambda module, args, out: seen.append(out))
    cache = kv.prefill(model, IDS, position=20).cache
    handle.remove()
    plain = kv.unrotate(cache, torch.arange(20, 33), rotary)
    want = seen[0].reshape(2, 13, 2, 16).transpose(1, 2)
    torch.testing.assert_close(plain.layers[0].keys, want, rtol=0, atol=5e-5)
    assert distance(kv.rotate(plain, torch.arange(20, 33), rotary), cache) < 1e-6


# refusals


def build(name, **config):
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = getattr(transformers, name)
    return model(model.config_class(**sizes | config))


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        (
            "MistralForCausalLM",
            {"num_key_value_heads": 1},
            "DynamicSlidingWindowLayer.*sliding_window=None",
        ),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "max_window_layers": 1, "num_key_value_heads": 1},
            "Sliding",
        ),
        ("T5ForConditionalGeneration", {"d_ff": 32}, "encoder-decoder"),
        ("GPT2LMHeadModel", {}, "0 rotary embeddings"),
        ("MambaForCausalLM", {"state_size": 4}, "full attention in every layer"),
        ("StableLmForCausalLM", {"num_key_value_heads": 1}, "turns 4 of 16 key dimensions"),
        (
            "CohereForCausalLM",
            {"pad_token_id": 0},
            r"rotates keys otherwise than Llama in layers \[0, 1\]",
        ),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "type 'dynamic' change with the length",
        ),
    ],
)
def test_models_that_cannot_work_are_refused(name, config, sentence):
    config = (
        {"intermediate_size": 32} | config
        if name not in ("T5ForConditionalGeneration", "GPT2LMHeadModel")
        else config
    )
    with pytest.raises(CacheError, match=sentence):
        kv.prefill(build(name, **config), torch.tensor([[1, 2]]))


def test_a_sliding_window_that_is_switched_off_is_fine():
    model = build(
        "Qwen2ForCausalLM",
        intermediate_size=32,
        num_key_value_heads=1,
        sliding_window=4,
        use_sliding_window=False,
    )
    require_supported(model)


def test_arguments_that_do_not_fit_are_refused(tiny_model):
    model, cache, rotary = tiny_model(), random_cache(), rotary_of(tiny_model())
    narrow = rotary_of(tiny_model(head_dim=8))
    for sentence, call in {
        "is empty": lambda: kv.nbytes(DynamicCache()),
        "9 entries cannot be truncated to 10": lambda: kv.truncate(cache, 10),
        "are a mask, expected integers": lambda: kv.select(cache, torch.ones(9, dtype=torch.bool)),
        "turns 8 of 16": lambda: kv.shift(cache, 1, narrow),
        "Cannot join": lambda: kv.join(cache, random_cache(rows=1)),
        "Cannot join .*float32.*float64": lambda: kv.join(cache, random_cache(dtype=torch.float64)),
        r"input_ids is \(13,\)": lambda: kv.prefill(model, IDS[0]),
        r"expected that of the new tokens, \(2, 13\)": lambda: kv.prefill(
            model, IDS, kv.Prefix(cache, 9), attention_mask=torch.ones(2, 22)
        ),
        r"has .*rows=2.*, expected .*rows=1": lambda: kv.prefill(
            model, IDS[:1], kv.Prefix(cache, 9)
        ),
        r"has .*layers=3.* expected .*layers=2": lambda: kv.prefill(
            tiny_model(num_hidden_layers=2), IDS, kv.Prefix(cache, 9)
        ),
        "pad on the left": lambda: kv.prefill(
            model, IDS, attention_mask=torch.arange(12, -1, -1).expand(2, 13)
        ),
    }.items():
        with pytest.raises(CacheError, match=sentence):
            call()
    for indices in ([2, 9], [-1, 3]):
        with pytest.raises(CacheError, match="Indices outside 0 to 8"):
            kv.select(cache, torch.tensor(indices))
    with pytest.raises(RuntimeError):
        kv.select(cache, torch.zeros(3, 4, dtype=torch.long))
    with pytest.raises(RuntimeError):
        kv.shift(cache, torch.arange(8), rotary)


# files


@pytest.fixture
def saved(tiny_model, tmp_path):
    """Return the path of a saved cache, and the cache."""
    path, cache = tmp_path / "a.safetensors", random_cache(entries=5)
    kv.save(kv.Prefix(cache, 5), path, tiny_model(), {"text": "five words"})
    return path, cache


def rewrite(path, change):
    """Change the header of a file and write it again."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["kvlab"])
    change(header)
    save_file(load_file(path), path, metadata={"kvlab": json.dumps(header)})


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("entries", [0, 1, 7])
def test_save_and_load_are_bit_equal(tiny_model, tmp_path, dtype, entries):
    cache, model = random_cache(entries=entries, dtype=dtype), tiny_model()
    prefix = kv.Prefix(cache, torch.tensor([entries, 90]))
    kv.save(prefix, tmp_path / "a", model, {"question": "où?", "numbers": (1, 2.5), 2: 0, 10: 1})
    again = kv.load(tmp_path / "a", fingerprint(model))
    assert equal(again.cache, cache)
    assert keys_of(again.cache).dtype == dtype
    assert again.next_position.tolist() == [entries, 90]
    assert again.metadata == {
        "question": "où?",
        "numbers": [1, 2.5],
        "2": 0,
        "10": 1,
    }  # as JSON has it


@every_family
@every_rope
def test_a_text_continues_from_a_file(tiny_model, tmp_path, family, rope):
    model = tiny_model(family, rope)
    prefix = kv.prefill(model, IDS[:, :8])
    kv.save(prefix, tmp_path / "a", model)
    want = kv.prefill(model, IDS[:, 8:], prefix).logits
    loaded = kv.load(tmp_path / "a", model)
    assert torch.equal(kv.prefill(model, IDS[:, 8:], loaded).logits, want)


def test_what_was_loaded_does_not_change_with_the_file(saved, tiny_model):
    path, cache = saved
    again = kv.load(path, tiny_model()).cache
    path.write_bytes(bytes(path.stat().st_size))
    assert equal(again, cache)


def test_another_model_is_refused_by_the_part_that_differs(saved, tiny_model):
    path, cache = saved
    trained = copy.deepcopy(tiny_model())
    trained.model.layers[2].mlp.down_proj.weight.data.mul_(1.01)
    half = copy.deepcopy(tiny_model()).to(torch.float16)
    for sentence, other in {
        "architecture model_type is 'qwen3' in the file and 'llama' in the model": tiny_model(
            "Llama"
        ),
        "architecture num_hidden_layers is 3 in the file and 2": tiny_model(num_hidden_layers=2),
        "rope inv_freq": tiny_model(rope="linear"),
        "rope attention_scaling is 1.0 in the file": tiny_model(rope="yarn"),
        "another model .weights sha256": tiny_model(seed=1),
        "another model .weights sha256 is": trained,
        "weights dtype is 'torch.float32' in the file and 'torch.float16'": half,
    }.items():
        with pytest.raises(CacheError, match=sentence) as error:
            kv.load(path, other)
        assert str(path) in str(error.value)
    assert equal(kv.load(path, copy.deepcopy(tiny_model())).cache, cache)
    with pytest.raises(CacheError, match=r"layers=3.*the model .*layers=2"):
        kv.save(kv.Prefix(cache, 5), path, tiny_model(num_hidden_layers=2))


def test_a_file_cut_short_is_refused(saved, tiny_model):
    path, _ = saved
    whole, owner = path.read_bytes(), fingerprint(tiny_model())
    for kept in [0, 1, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:kept])
        with pytest.raises(CacheError, match=r"a\.safetensors is damaged or cut short"):
            kv.load(path, owner)


def test_a_flipped_bit_is_found_or_harmless(saved, tiny_model):
    path, cache = saved
    whole, owner = path.read_bytes(), fingerprint(tiny_model())
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = torch.Generator().manual_seed(3)
    places = [*range(8), *torch.randint(8, header, (150,), generator=draw).tolist()]
    places += torch.randint(header, len(whole), (50,), generator=draw).tolist()
    found = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(torch.randint(8, (), generator=draw))
        path.write_bytes(damaged)
        try:
            again = kv.load(path, owner)
        except CacheError as error:
            assert str(path) in str(error)
            found += 1
        else:
            assert equal(again.cache, cache)
            assert (again.next_position, again.metadata) == (5, {"text": "five words"})
    assert found >= len(places) - 2


def test_files_of_other_kinds_are_refused(saved, tiny_model, tmp_path):
    path, owner = saved[0], fingerprint(tiny_model())
    rewrite(path, lambda header: header.update(version=99))
    with pytest.raises(
        CacheError, match=r"a\.safetensors has cache format version 99, this kvlab reads up to v"
    ):
        kv.load(path, owner)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(
        CacheError, match=r"a\.safetensors is a safetensors file but no kvlab cache"
    ):
        kv.load(path, owner)
    path.write_text("not a safetensors file at all")
    with pytest.raises(CacheError, match="damaged or cut short"):
        kv.load(path, owner)
    with pytest.raises(CacheError, match=r"There is no file .*missing"):
        kv.load(tmp_path / "missing", owner)


@pytest.mark.parametrize("field", ["next_position", "length", "metadata", "dtype"])
def test_an_edited_header_is_refused(saved, tiny_model, field):
    rewrite(saved[0], lambda header: header.update({field: 6}))
    with pytest.raises(CacheError, match="do not match its checksum"):
        kv.load(saved[0], tiny_model())


def test_a_write_that_fails_leaves_the_old_file(saved, tiny_model, monkeypatch):
    path, cache = saved

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        kv.save(kv.Prefix(random_cache(seed=1), 9), path, tiny_model())
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]
    assert equal(kv.load(path, tiny_model()).cache, cache)


# slots


def run_slots(model, slots, tokens, starts, fixed=False):
    """Run tokens (B, k) at columns from starts on, with a mask that hides later columns; return the logits."""
    columns = slots.set_write_positions(starts, tokens.shape[1], fixed)
    seen = slots.write.visible_length or slots.room
    mask = torch.zeros(len(starts), 1, tokens.shape[1], seen, dtype=model.dtype)
    mask.masked_fill_((torch.arange(seen) > columns[..., None])[:, None], float("-inf"))
    places = {"position_ids": columns + slots.offsets, "attention_mask": mask}
    return model(tokens, past_key_values=slots, use_cache=True, **places).logits


def filled(model, caches, room):
    """Slots with a row for each (cache, next position)."""
    slots = Slots(model, len(caches), room)
    for row, (cache, position) in enumerate(caches):
        slots.put(row, cache, position)
    return slots


def near(one, two, atol=1e-10):
    torch.testing.assert_close(tensors(one), tensors(two), rtol=0, atol=atol)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(9, 12), st.data())
def test_put_and_entries_give_back_what_was_put(tiny_model, lengths, room, data):
    caches = [random_cache(rows=1, entries=n, dtype=torch.float32, seed=n) for n in lengths]
    slots = filled(
        tiny_model(), [(cache, 20 + n) for n, cache in zip(lengths, caches, strict=True)], room
    )
    assert slots.lengths == lengths
    assert slots.offsets.tolist() == [[20]] * len(lengths)
    for row, cache in enumerate(caches):
        assert equal(slots.entries(row), kv.clone(cache))
        start = data.draw(st.integers(0, lengths[row]))
        stop = data.draw(st.integers(start, lengths[row]))
        assert equal(slots.entries(row, start, stop), kv.select(cache, torch.arange(start, stop)))
    shorter = random_cache(rows=1, entries=data.draw(st.integers(1, 9)), seed=99)
    slots.put(0, shorter, torch.tensor([7]))  # a position may be a tensor
    assert (slots.lengths[0], slots.offsets[0].item()) == (
        kv.length(shorter),
        7 - kv.length(shorter),
    )
    assert equal(slots.entries(0), kv.clone(shorter))
    assert all(equal(slots.entries(row), kv.clone(caches[row])) for row in range(1, len(caches)))


def test_put_copies_and_entries_share(tiny_model):
    cache = random_cache(rows=1, entries=4)
    slots, frozen = filled(tiny_model(), [(cache, 4)], 6), kv.clone(cache)
    shared, places = slots.entries(0), [layer.keys.data_ptr() for layer in slots.layers]
    slots.layers[1].keys[0, :, 2] = 5
    assert equal(cache, frozen)
    assert (shared.layers[1].keys[0, :, 2] == 5).all()
    assert [layer.keys.data_ptr() for layer in shared.layers] == places
    assert not Slots(tiny_model(), 2, 6).layers[0].keys.any()


@pytest.mark.parametrize("fixed", [False, True])
@every_family
def test_ragged_writes_are_the_rows_alone(tiny_model, family, fixed):
    model, lengths = tiny_model(family, dtype=torch.float64), (9, 2, 6, 6)
    texts = [
        torch.randint(0, 97, (1, n + 5), generator=torch.Generator().manual_seed(n))
        for n in lengths
    ]
    pasts = [kv.prefill(model, text[:, :n]) for text, n in zip(texts, lengths, strict=True)]
    pasts[2] = kv.Prefix(kv.select(pasts[2].cache, torch.tensor([0, 3, 5])), 6)
    slots = filled(model, [(past.cache, past.next_position) for past in pasts], 16)
    for first, last in ((0, 1), (1, 4), (4, 5)):  # in pieces of 1, 3 and 1
        tokens = torch.cat(
            [text[:, n + first : n + last] for text, n in zip(texts, lengths, strict=True)]
        )
        logits = run_slots(model, slots, tokens, slots.lengths, fixed)
        slots.lengths = [n + last - first for n in slots.lengths]
    for row, (text, n, past) in enumerate(zip(texts, lengths, pasts, strict=True)):
        alone = kv.prefill(model, text[:, n:], past)
        torch.testing.assert_close(logits[row, -1], alone.logits[0], rtol=0, atol=1e-10)
        near(slots.entries(row), alone.cache)


@pytest.mark.parametrize("fixed", [False, True])
def test_what_was_taken_back_leaves_no_trace(tiny_model, fixed):
    model = tiny_model(dtype=torch.float64)
    past = kv.prefill(model, IDS[:1, :6])
    slots = filled(model, [(past.cache, 6)] * 2, 14)
    run_slots(
        model, slots, IDS[:, 8:13], slots.lengths, fixed
    )  # tried, and given up: lengths did not grow
    assert slots.lengths == [6, 6]
    near(slots.entries(0), past.cache, 0)
    run_slots(model, slots, IDS[:, 2:4], [6, 4], fixed)
    slots.lengths = [8, 6]  # row 1 gave up two entries of the prompt as well
    for row, kept in enumerate((6, 4)):
        before = kv.Prefix(kv.truncate(past.cache, kept), kept)
        want = kv.prefill(model, IDS[row : row + 1, 2:4], before)
        near(slots.entries(row), want.cache)
    logits = run_slots(model, slots, IDS[:, 5:6], slots.lengths, fixed)
    again = kv.prefill(model, IDS[1:, 5:6], want)
    torch.testing.assert_close(logits[1], again.logits, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=4), st.integers(1, 4), st.booleans())
def test_a_write_changes_the_columns_it_is_aimed_at_and_no_other(tiny_model, starts, count, fixed):
    slots = Slots(tiny_model(), len(starts), 12)
    columns = slots.set_write_positions(starts, count, fixed)
    assert columns.tolist() == [[*range(start, start + count)] for start in starts]
    states = torch.randn(2, len(starts), 2, count, 16, generator=torch.Generator().manual_seed(0))
    seen = slots.layers[1].update(*states)
    for memory, written, visible in zip(
        (slots.layers[1].keys, slots.layers[1].values), states, seen, strict=True
    ):
        for row, start in enumerate(starts):
            assert torch.equal(memory[row, :, start : start + count], written[row])
            assert not memory[row, :, :start].any()
            assert not memory[row, :, start + count :].any()
        assert visible.shape[2] == (12 if fixed else max(starts) + count)
        assert visible.data_ptr() == memory.data_ptr()
    assert not slots.layers[0].keys.any()


def test_the_first_layers_share_memory_and_are_aimed_apart(tiny_model):
    model, ids = tiny_model(dtype=torch.float64), IDS[:1]
    past = kv.prefill(model, ids[:, :6])
    slots = filled(model, [(past.cache, 9)], 12)
    part = slots.first(2)
    assert [layer.keys.data_ptr() for layer in part.layers] == [
        layer.keys.data_ptr() for layer in slots.layers[:2]
    ]
    assert (len(part.layers), len(slots.layers), part.lengths, part.offsets.tolist()) == (
        2,
        3,
        [6],
        [[3]],
    )
    slots.set_write_positions([6], 2)
    part.set_write_positions([8], 1)
    assert (slots.write.positions, slots.write.visible_length) == (slice(6, 8), 8)
    part.lengths[0] = 7
    assert slots.lengths == [6]
    part.layers[0].update(*torch.ones(2, 1, 2, 1, 16, dtype=torch.float64))
    assert (slots.layers[0].keys[0, :, 8] == 1).all()
    near(slots.entries(0), past.cache, 0)


def test_slots_say_what_does_not_fit(tiny_model):
    slots = Slots(tiny_model(), 2, 6)
    for sentence, call in {
        "9 entries are more than a row of 6: give more room": lambda: slots.put(
            0, random_cache(rows=1), 9
        ),
        "Column 6 is outside a row of 6: give more room": lambda: slots.set_write_positions(
            [0, 4], 3
        ),
        "Column 7 is outside": lambda: slots.set_write_positions([5, 5], 3, fixed=True),
        "The cache is empty|Expected a DynamicCache": lambda: slots.put(0, DynamicCache(), 0),
    }.items():
        with pytest.raises(CacheError, match=sentence):
            call()
    assert slots.lengths == [0, 0]
    assert not slots.layers[0].keys.any()
    slots.set_write_positions([0, 3], 3)


def test_slots_refuse_a_cache_of_another_shape(tiny_model):
    slots = Slots(tiny_model(), 2, 9)
    for cache in (
        random_cache(rows=2, entries=4),
        kv.prefill(tiny_model(num_hidden_layers=2), IDS[:1]).cache,
        kv.prefill(tiny_model(num_key_value_heads=1), IDS[:1, :4]).cache,
        random_cache(rows=1, entries=4, dtype=torch.float64),
    ):
        with pytest.raises(CacheError, match="expected"):
            slots.put(0, kv.truncate(cache, 4), 4)
        assert slots.lengths == [0, 0]
        assert not slots.layers[0].keys.any()


@every_family
def test_columns_anywhere_are_computed_again_on_what_the_others_hold(tiny_model, family):
    model = tiny_model(family, dtype=torch.float64)
    true = kv.prefill(model, IDS[:1])
    columns = torch.tensor([[2, 5, 6]])
    spoiled = kv.to_tensor(true.cache)
    spoiled[..., columns[0], :] = 7.0
    slots = Slots(model, 1, IDS.shape[1])
    slots.put(0, kv.from_tensor(spoiled), IDS.shape[1])
    logits = step(model, slots, IDS[:1, columns[0]], slots.set_write_columns(columns))
    near(slots.entries(0), true.cache, 1e-12)
    want = model(IDS[:1]).logits[:, columns[0]]
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-10)
    kept = step(
        model, slots, IDS[:1, columns[0]], slots.set_write_columns(columns), logits_to_keep=1
    )
    torch.testing.assert_close(kept, want[:, -1:], rtol=0, atol=1e-10)


# a cache as one tensor, and the first layers of a model


def test_a_cache_as_one_tensor_comes_back_and_is_a_copy():
    cache = random_cache(rows=2, entries=5)
    tensor = kv.to_tensor(cache)
    near(kv.from_tensor(tensor), cache, 0)
    assert kv.from_tensor(tensor).layers[1].values.data_ptr() == tensor[1, 1].data_ptr()
    tensor.zero_()
    assert cache.layers[0].keys.any()
    for shape in ((2, 2, 5, 4), (3, 1, 2, 2, 5, 4)):
        with pytest.raises(CacheError, match=r"expected \(L, 2, B, H_kv, T, D\)"):
            kv.from_tensor(torch.zeros(shape))


@every_family
def test_the_first_layers_are_a_model_cut_there(tiny_model, family):
    model = tiny_model(family)
    shallow, cut = first_layers(model, 2), tiny_model(family, num_hidden_layers=2)
    cut = copy.deepcopy(cut)
    cut.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(shallow(IDS).logits, cut(IDS).logits, rtol=0, atol=0)
    near(kv.prefill(shallow, IDS).cache, kv.prefill(cut, IDS).cache, 0)
    assert model.config.num_hidden_layers == 3
    assert len(kv.prefill(model, IDS).cache.layers) == 3
    assert first_layers(model, 3)(IDS).logits.equal(model(IDS).logits)
    for layers in (0, 4):
        with pytest.raises(CacheError, match=f"layers is {layers}, expected 1 to 3"):
            first_layers(model, layers)


# one row for several, and keys that count for more or less


@every_family
def test_a_repeated_cache_is_the_cache_of_each_row(tiny_model, family):
    model = tiny_model(family, dtype=torch.float64)
    read = kv.prefill(model, IDS[:1, :8])
    rows = torch.stack([IDS[0, 8:], IDS[1, 8:], IDS[0, :5]])
    many = kv.repeat(read.cache, 3)
    together = kv.prefill(model, rows, kv.Prefix(many, 8))
    for i in range(3):
        alone = kv.prefill(model, rows[i : i + 1], read)
        torch.testing.assert_close(together.logits[i], alone.logits[0], rtol=0, atol=1e-12)
    assert kv.length(read.cache) == kv.length(many) == 8
    assert tensors(read.cache)[0].shape[0] == 1
    assert tensors(many)[0].data_ptr() == tensors(read.cache)[0].data_ptr()  # no copies


def test_only_one_row_is_repeated():
    with pytest.raises(CacheError, match="The cache has 2 rows, expected one"):
        kv.repeat(random_cache(rows=2), 3)


SHAPES = [(9,), (2, 9), (2, 2, 9), (3, 2, 2, 9), (2, 1), (3, 1, 1, 9)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_key_is_scaled_by_its_own_factor(shape):
    cache, factors = (
        random_cache(),
        torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5,
    )
    before = kv.to_tensor(cache)
    scaled = kv.scale_keys(cache, factors)
    four = factors[:, None] if factors.ndim == 2 else factors  # (B, T) is the same for all heads
    for layer, row, head, i in ((0, 0, 0, 0), (1, 1, 0, 4), (2, 1, 1, 8), (0, 1, 0, 7)):
        places = [
            (layer, row, head, i)[4 - four.ndim + n] if size > 1 else 0
            for n, size in enumerate(four.shape)
        ]
        torch.testing.assert_close(keys_of(scaled)[layer, row, head, i],
                                   before[layer, 0, row, head, i] * four[tuple(places)], rtol=0, atol=0)  # fmt: skip
    assert values_of(scaled).equal(before[:, 1])
    assert kv.to_tensor(cache).equal(before)


@every_dtype
def test_scaling_keys_commutes_with_rotation_and_selection(tiny_model, dtype):
    rotary, cache = rotary_of(tiny_model(dtype=dtype)), random_cache(dtype=dtype)
    factors, kept = (
        torch.rand(2, 9, generator=torch.Generator().manual_seed(2)),
        torch.tensor([[0, 4], [3, 8]]),
    )
    one = kv.shift(kv.scale_keys(cache, factors), 17, rotary)
    near(one, kv.scale_keys(kv.shift(cache, 17, rotary), factors), TIGHT[dtype])
    two = kv.scale_keys(kv.select(cache, kept), factors.gather(1, kept))
    near(two, kv.select(kv.scale_keys(cache, factors), kept), 0)
    assert tensors(one)[0].dtype == dtype


@pytest.mark.parametrize("shape", [(8,), (3, 9), (2, 3, 9), (1, 1, 1, 1, 9)], ids=str)
def test_factors_that_do_not_fit_are_refused(shape):
    with pytest.raises((CacheError, RuntimeError)):
        kv.scale_keys(random_cache(), torch.ones(shape))


# what a model read, and parts of it


@every_family
@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_positions_of_what_was_read_undo_its_rotation(tiny_model, family, rope):
    model, exact = (
        tiny_model(family, rope, torch.float64),
        {"rtol": 0, "atol": 1e-4},
    )  # angles are float32
    mask = torch.tensor([[0] * 4 + [1] * 9, [1] * 13])
    here, padded, there = (
        kv.prefill(model, IDS),
        kv.prefill(model, IDS, attention_mask=mask),
        kv.prefill(model, IDS, position=31, attention_mask=mask),
    )
    assert here.attention_mask is None
    assert torch.equal(there.attention_mask, mask)
    assert here.positions.tolist() == [[*range(13)]] * 2
    assert there.positions[0, 4:].tolist() == [*range(31, 40)]
    assert all(
        read.positions.shape == (2, 13) and read.positions.min() >= 0
        for read in (here, padded, there)
    )
    stored = [keys_of(kv.unrotate(x.cache, x.positions, x.rotary)) for x in (here, padded, there)]
    text = mask.bool()[:, None, :, None].expand_as(stored[0])
    torch.testing.assert_close(stored[1][text], stored[2][text], **exact)
    torch.testing.assert_close(stored[0][:, 1], stored[2][:, 1], **exact)
    alone = kv.prefill(model, IDS[:1, 4:], position=5)
    plain = keys_of(kv.unrotate(alone.cache, alone.positions, alone.rotary))
    torch.testing.assert_close(plain, stored[2][:, :1, :, 4:], **exact)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 12), st.data())
def test_parts_of_what_was_read_make_up_the_whole(tiny_model, at, data):
    mask = torch.tensor([[0] * 4 + [1] * 9, [1] * 13])
    whole = kv.prefill(tiny_model(), IDS, position=7, attention_mask=mask)
    one, two = kv.part(whole, 0, at), kv.part(whole, at, 13)
    assert equal(kv.join(one.cache, two.cache), whole.cache)
    assert torch.equal(torch.cat((one.positions, two.positions), 1), whole.positions)
    assert torch.equal(torch.cat((one.attention_mask, two.attention_mask), 1), mask)
    assert one.rotary is two.rotary is whole.rotary
    stop = data.draw(st.integers(at, 13))
    inner, direct = kv.part(two, 0, stop - at), kv.part(whole, at, stop)
    assert equal(inner.cache, direct.cache)
    assert torch.equal(inner.positions, direct.positions)
    assert torch.equal(inner.attention_mask, direct.attention_mask)
    assert (
        kv.length(direct.cache)
        == direct.positions.shape[1]
        == direct.attention_mask.shape[1]
        == stop - at
    )


def test_what_slots_hold_is_read_at_its_positions(tiny_model):
    model = tiny_model(dtype=torch.float64)
    whole = kv.prefill(model, IDS[:1], position=20)
    evicted = kv.select(
        whole.cache, torch.tensor([0, 1, 2, 9, 10, 11, 12])
    )  # what was kept last is where it was
    slots = filled(
        model, [(whole.cache, 33), (evicted, 33), (random_cache(1, 3, torch.float64), 3)], 16
    )
    for row, first in ((0, 9), (1, 3)):
        for start, stop in ((0, 4), (1, 2), (2, 4)):
            got, want = (
                slots.prefix(row, first + start, first + stop),
                kv.part(whole, 9 + start, 9 + stop),
            )
            assert equal(got.cache, want.cache)
            assert torch.equal(got.positions, want.positions)
            assert got.rotary is whole.rotary
    assert slots.prefix(2, 0, 3).positions.tolist() == [[0, 1, 2]]
    assert (
        got.cache.layers[0].keys.data_ptr() == slots.layers[0].keys[1, :, 5:].data_ptr()
    )  # no copy


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2), st.integers(1, 6), st.data())
def test_what_is_replaced_is_there_and_nothing_else_has_changed(tiny_model, row, count, data):
    slots = filled(
        tiny_model(), [(random_cache(1, 9, seed=seed), 9 + seed) for seed in range(3)], 12
    )
    start, new = data.draw(st.integers(0, 9 - count)), random_cache(1, count, seed=7)
    before, kept = [x.clone() for x in tensors(slots)], kv.clone(new)
    places, state = (
        [x.data_ptr() for x in tensors(slots)],
        (list(slots.lengths), slots.offsets.tolist()),
    )
    slots.replace(row, start, new)
    assert equal(slots.entries(row, start, start + count), kept)
    assert equal(new, kept)
    for old, now in zip(before, tensors(slots), strict=True):
        changed = (old != now).any(-1)  # (B, H_kv, T)
        assert changed[row, :, start : start + count].all()
        assert changed.sum() == 2 * count
    assert [x.data_ptr() for x in tensors(slots)] == places
    assert (slots.lengths, slots.offsets.tolist()) == state
    new.layers[0].keys.zero_()
    assert equal(slots.entries(row, start, start + count), kept)


def test_replacing_entries_by_themselves_changes_no_bit(tiny_model):
    slots = filled(tiny_model(), [(random_cache(1, 9), 9)], 12)
    before = [x.clone() for x in tensors(slots)]
    slots.replace(0, 2, slots.entries(0, 2, 7))
    assert all(map(torch.equal, before, tensors(slots)))
