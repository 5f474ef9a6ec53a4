"""The laws of caches whose heads have lengths of their own: what is removed is what a mask hides."""

import hashlib
import itertools
import json
import types

import pytest
import torch
from compression_helpers import (
    DOUBLE,
    GROUPS,
    HEADS,
    IDS,
    INF,
    LAYERS,
    TEXT,
    distance,
    near,
    same_cache,
)
from safetensors.torch import save_file
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlab import cache as kv
from kvlab import lab
from kvlab.compress import (
    Repeat,
    capture_attention,
    choose_entries,
    compact,
    evict,
    key_norm,
    kvzip,
    random,
    repeat_texts,
    score_entries,
)
from kvlab.evaluate import log_likelihoods
from kvlab.files import as_bytes
from kvlab.models import CacheError, fingerprint, first_layers, rotary_of, use_attention
from kvlab.ragged import RaggedLayer, attend_ragged, bias_of, is_ragged, pack
from kvlab.slots import Slots
from kvlab.speculate import (
    EarlyExitProposer,
    FusedProposer,
    LookupProposer,
    ModelProposer,
    Runner,
    Sampling,
    generate,
)

TOTAL = IDS.shape[1]
every_shape = pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral"])


def mask_like(kind="random", rows=1, columns=TOTAL, seed=0):
    """Which entries stay, (L, B, H_kv, T)."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(LAYERS, rows, GROUPS, columns, generator=generator) < 0.4
    if kind == "a head keeps nothing":
        kept[1, :, 0] = False
    if kind == "the first layer keeps nothing":
        kept[0] = False
    if kind == "only one head keeps all":
        kept[:], kept[2, :, 1] = False, True
    if kind == "nothing stays":
        kept[:] = False
    return kept


KINDS = ("random", "a head keeps nothing", "the first layer keeps nothing")
KINDS += ("only one head keeps all", "nothing stays")


def packed(cache, kept, bias=None):
    """The kept entries of a whole cache."""
    bias = [None] * len(kept) if bias is None else bias
    layers = zip(cache.layers, kept, bias, strict=True)
    return kv.from_ragged(pack(layer.keys, layer.values, keep, b) for layer, keep, b in layers)


def masked_attention(kept, bias=None):
    """Attention over all entries, of which those not kept are hidden in their layer and head."""
    bias = torch.zeros_like(kept, dtype=DOUBLE) if bias is None else bias

    def masked(module, query, key, value, attention_mask, scaling, **options):
        hidden = bias[module.layer_idx].masked_fill(~kept[module.layer_idx], -INF)  # (B, H_kv, T)
        count, columns = query.shape[2], key.shape[2]
        later = torch.ones(count, columns).triu(columns - count + 1).bool()
        output = torch.zeros_like(query)
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            logits = scaling * query[:, head] @ key[:, group].mT  # (B, Q, T)
            logits[:, :, : hidden.shape[-1]] += hidden[:, group, None]
            weights = logits.masked_fill(later, -INF).softmax(-1)
            output[:, head] = weights @ value[:, group]
        return output.transpose(1, 2), None

    return masked


def masked_logits(model, cache, kept, text, position, bias=None):
    """Logits of a text after a whole cache of which some entries are hidden."""
    positions = position + torch.arange(text.shape[1])[None]
    with use_attention(model, masked_attention(kept, bias)):
        return model(text, past_key_values=kv.clone(cache), position_ids=positions).logits


def masked_text(model, cache, kept, text, count=12, position=TOTAL):
    """The greedy text after a whole cache of which some entries are hidden, read anew each time."""
    size = text.shape[1]
    for _ in range(count):
        logits = masked_logits(model, cache, kept, text, position)
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    return text[0, size:].tolist()


def logits_after(model, prefix, text):
    """Logits of a text after a cache, by `read`."""
    positions = prefix.next_position + torch.arange(text.shape[1])[None]
    return kv.read(model, text, prefix.cache, position_ids=positions).logits


def ragged_prefix(model, kept, ids=IDS):
    whole = kv.prefill(model, ids)
    return whole, kv.Prefix(packed(whole.cache, kept), ids.shape[1], ids[0].tolist())


def registered():
    return set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)


# what is removed is what a mask hides


def test_if_all_entries_stay_the_cache_is_an_ordinary_one_bit_for_bit(tiny_model):
    model = tiny_model()
    whole = kv.prefill(model, IDS).cache
    cache = packed(whole, torch.ones(LAYERS, 1, GROUPS, TOTAL, dtype=torch.bool))
    assert not is_ragged(cache)
    assert same_cache(cache, whole)
    for scope in ("head", "layer", "model", "token"):
        prefix = evict(model, IDS, random, retention=1.0, scope=scope)
        assert not is_ragged(prefix.cache)
        assert same_cache(prefix.cache, whole)
        assert (prefix.positions == torch.arange(TOTAL)).all()


def test_heads_of_one_length_are_an_ordinary_cache(tiny_model):
    whole = kv.prefill(tiny_model(), IDS).cache
    kept = torch.zeros(LAYERS, 1, GROUPS, TOTAL, dtype=torch.bool)
    columns = torch.rand(kept.shape, generator=torch.Generator().manual_seed(1)).argsort(-1)[
        ..., :9
    ]
    cache = packed(whole, kept.scatter(-1, columns, True))
    assert not is_ragged(cache)
    assert same_cache(cache, kv.select(whole, columns.sort().values))


@every_shape
@pytest.mark.parametrize("kind", KINDS)
def test_removed_entries_are_hidden_entries(tiny_model, family, kind):
    model, kept = tiny_model(family, dtype=DOUBLE), mask_like(kind)
    whole, prefix = ragged_prefix(model, kept)
    expected = masked_logits(model, whole.cache, kept, TEXT, TOTAL)
    near(logits_after(model, prefix, TEXT), expected)
    near(kv.prefill(model, TEXT, prefix).logits, expected[:, -1])
    one_by_one, pieces = prefix, prefix
    for i, token in enumerate(TEXT.split(1, 1)):
        one_by_one = kv.prefill(model, token, one_by_one)
        near(one_by_one.logits, expected[:, i])
    for piece in TEXT.split([1, 3, 2], 1):
        pieces = kv.prefill(model, piece, pieces)
    near(pieces.logits, expected[:, -1])
    assert pieces.next_position == one_by_one.next_position == TOTAL + 6
    assert pieces.input_ids == [*IDS[0].tolist(), *TEXT[0].tolist()]
    assert distance(logits_after(model, whole, TEXT), expected) > 0.1


@every_shape
def test_biases_are_added_to_the_logits_of_their_entries(tiny_model, family):
    model, kept = tiny_model(family, dtype=DOUBLE), mask_like()
    bias = torch.randn(kept.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    whole = kv.prefill(model, IDS)
    prefix = kv.Prefix(packed(whole.cache, kept, bias), TOTAL)
    expected = masked_logits(model, whole.cache, kept, TEXT, TOTAL, bias)
    near(logits_after(model, prefix, TEXT), expected)
    without = kv.Prefix(packed(whole.cache, kept), TOTAL)
    assert distance(logits_after(model, without, TEXT), expected) > 0.1


@pytest.mark.parametrize("kind", KINDS[:3])
def test_rows_of_a_batch_hide_entries_of_their_own(tiny_model, kind):
    model, rows = tiny_model("Llama", dtype=DOUBLE), torch.cat([IDS, IDS.flip(1), IDS.roll(7, 1)])
    kept, text = mask_like(kind, rows=3), torch.cat([TEXT, TEXT.flip(1), TEXT.roll(2, 1)])
    whole, prefix = ragged_prefix(model, kept, rows)
    expected = masked_logits(model, whole.cache, kept, text, TOTAL)
    near(logits_after(model, prefix, text), expected)
    for row in range(3):
        one = slice(row, row + 1)
        _, alone = ragged_prefix(model, kept[:, one], rows[one])
        near(logits_after(model, alone, text[one]), expected[one])


def test_memory_that_no_entry_needs_holds_zeros_and_is_no_part_of_the_whole_cache(tiny_model):
    whole, kept = kv.prefill(tiny_model(), IDS).cache, mask_like()
    whole.layers[0].keys.masked_fill_(~kept[0, ..., None], float("nan"))  # hidden, but multiplied
    for layer, keep in zip(packed(whole, kept).layers, kept, strict=True):
        assert layer.keys.shape[2] == keep.sum(-1).max()
        assert (layer.keys[~bias_of(layer).isfinite()] == 0).all()
        assert bias_of(layer).isfinite().sum(-1).equal(keep.sum(-1))
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


# eviction by scope


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_entries_of_a_scope_compete_and_the_others_are_hidden(tiny_model, scope):
    model, ids = tiny_model("Llama", dtype=DOUBLE), torch.arange(TOTAL)[None]  # no two are equal
    rows = torch.cat([ids, ids.flip(1) + 50])
    prefix = evict(model, rows, key_norm, budget=12, scope=scope)
    scores, _ = score_entries(model, rows, key_norm, 12)
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    places = [(i, h, j) for i in range(LAYERS) for h in range(GROUPS) for j in range(TOTAL)]
    for row in range(2):
        for one in range(LAYERS) if scope == "layer" else [None]:
            rivals = [place for place in places if one in (None, place[0])]
            rivals.sort(key=lambda place: -scores[place[0], row, place[1], place[2]].item())
            for i, h, j in rivals[: 12 * len(rivals) // TOTAL]:
                kept[i, row, h, j] = True
    assert kept.sum((0, 2, 3)).tolist() == [12 * LAYERS * GROUPS] * 2
    assert len(set(kept.sum(-1).flatten().tolist())) > 2
    longest = kept.sum(-1).max()
    assert prefix.positions.shape == (LAYERS, 2, GROUPS, longest)
    for place in [(i, b, h) for i in range(LAYERS) for b in range(2) for h in range(GROUPS)]:
        expected = kept[place].nonzero()[:, 0].tolist()
        assert prefix.positions[place].tolist() == [-1] * (longest - len(expected)) + expected
    whole = kv.prefill(model, rows)
    text = torch.cat([TEXT, TEXT.flip(1)])
    near(logits_after(model, prefix, text), masked_logits(model, whole.cache, kept, text, TOTAL))
    assert prefix.next_position == TOTAL


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_compact_cache_has_its_entries_at_the_last_positions_before_the_next(tiny_model, scope):
    model = tiny_model("Llama", dtype=DOUBLE)
    prefix = evict(model, IDS, key_norm, budget=12, scope=scope)
    small, longest = compact(prefix), kv.length(prefix.cache)
    assert small.next_position == kv.length(small.cache) == longest
    last = torch.arange(longest)
    assert small.positions.equal(last.where(prefix.positions >= 0, -1))
    plain = kv.unrotate(kv.prefill(model, IDS).cache, torch.arange(TOTAL), rotary_of(model))
    for i, (layer, old) in enumerate(zip(plain.layers, prefix.positions, strict=True)):
        size = small.cache.layers[i].keys.shape[2]
        for head in range(GROUPS):
            stays = old[0, head] >= 0
            entries = layer.keys[:, head : head + 1, old[0, head][stays]]
            moved = kv.rotate(kv.from_layers([(entries, entries)]), last[stays], rotary_of(model))
            count = int(stays.sum())
            near(small.cache.layers[i].keys[0, head, size - count :], moved.layers[0].keys[0, 0])


@pytest.mark.parametrize("scope", ["head", "layer", "model", "token"])
def test_the_highest_scores_of_each_scope_are_chosen(scope):
    scores = torch.rand(3, 2, 4, 11, generator=torch.Generator().manual_seed(5))
    kept = choose_entries(scores, 5, scope).expand(scores.shape) if scope != "token" else None
    if scope == "token":
        kept = choose_entries(scores, 5, scope)[None, :, None].expand(scores.shape)
        scores = scores.mean((0, 2), keepdim=True).expand(scores.shape)
    axes = {"head": (3,), "token": (3,), "layer": (2, 3), "model": (0, 2, 3)}[scope]
    lowest_kept = scores.masked_fill(~kept, INF).amin(axes)
    highest_left = scores.masked_fill(kept, -INF).amax(axes)
    assert (lowest_kept > highest_left).all()
    count = {"head": 5, "token": 5, "layer": 5 * 4, "model": 5 * 4 * 3}[scope]
    assert (kept.sum(axes) == count).all()


def test_what_cannot_be_chosen_is_refused(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match="scope is 'row', expected one of head, layer, model, tok"):
        evict(model, IDS, random, budget=9, scope="row")
    with pytest.raises(ValueError, match="leave chunk_size out, or choose scope='head'"):
        evict(model, IDS, random, budget=9, scope="model", chunk_size=7)
    for rows, stop in ((1, 8), (2, IDS.shape[1])):  # of another text, and of several
        repeat = [Repeat(IDS, slice(0, stop))]
        with pytest.raises(ValueError, match="not the text of input_ids: give repeat_texts"):
            evict(model, IDS.expand(rows, -1), kvzip, budget=9, repeat=repeat)
    small = evict(model, IDS, random, budget=9, scope="model")
    for function in (evict, score_entries):
        with pytest.raises(ValueError, match="Heads of the prefix have lengths of their own"):
            function(model, TEXT, key_norm, budget=9, prefix=small)


# decoding


def proposers(model, tiny_model):
    draft = tiny_model("Llama", dtype=DOUBLE, num_hidden_layers=1, seed=5)
    return {
        "plain": None,
        "lookup": LookupProposer(),
        "early exit": EarlyExitProposer(model, 2),
        "draft": ModelProposer(draft),
        "fused": FusedProposer(draft, lambda receiver, sharer: receiver.cache),
    }


@every_shape
@pytest.mark.parametrize("name", ["plain", "lookup", "early exit", "draft", "fused"])
@pytest.mark.parametrize("kind", ["random", "the first layer keeps nothing"])
def test_greedy_text_is_that_of_hidden_entries(tiny_model, family, name, kind):
    model, kept = tiny_model(family, dtype=DOUBLE), mask_like(kind)
    whole, prefix = ragged_prefix(model, kept)
    expected = masked_text(model, whole.cache, kept, TEXT)
    options = {"gamma": 3, "max_new_tokens": 12, "prefix": prefix}
    generated = generate(model, TEXT, proposers(model, tiny_model)[name], **options)
    assert generated.tokens[0].tolist() == expected
    assert generate(model, TEXT, max_new_tokens=12, prefix=whole).tokens[0].tolist() != expected


def test_where_one_head_keeps_all_a_fused_draft_reads_the_text_itself(tiny_model):
    model, kept = tiny_model("Llama", dtype=DOUBLE), mask_like("only one head keeps all")
    whole, prefix = ragged_prefix(model, kept)
    proposer = proposers(model, tiny_model)["fused"]
    generated = generate(model, TEXT, proposer, max_new_tokens=12, prefix=prefix)
    assert generated.tokens[0].tolist() == masked_text(model, whole.cache, kept, TEXT)


@pytest.mark.parametrize("name", ["plain", "lookup", "early exit", "draft"])
@pytest.mark.parametrize("mixed", [True, False])
def test_rows_with_prefixes_of_all_kinds_get_their_own_texts(tiny_model, name, mixed):
    model = tiny_model("Llama", dtype=DOUBLE)
    all_stay = torch.ones(LAYERS, 1, GROUPS, TOTAL, dtype=torch.bool)
    masks = [mask_like(), mask_like("the first layer keeps nothing", seed=8)]
    contexts, prompts = [IDS, IDS.flip(1)], [TEXT[0], TEXT[0, :4]]
    if mixed:
        masks.append(all_stay)
        contexts.append(IDS.roll(9, 1))
        prompts.append(TEXT[0].flip(0))
    prefixes, expected = [], []
    for ids, kept, prompt in zip(contexts, masks, prompts, strict=True):
        whole, prefix = ragged_prefix(model, kept, ids)
        prefixes.append(prefix)
        expected.append(masked_text(model, whole.cache, kept, prompt[None]))
    if mixed:
        prefixes.append(None)
        prompts.append(IDS[0, :9])
        expected.append(generate(model, IDS[:, :9], max_new_tokens=12).tokens[0].tolist())
    options = {"gamma": 3, "max_new_tokens": 12, "prefix": prefixes}
    generated = generate(model, prompts, proposers(model, tiny_model)[name], **options)
    assert [row.tolist() for row in generated.tokens] == expected


@pytest.mark.parametrize("name", ["plain", "early exit", "draft"])
def test_sampled_text_is_that_of_hidden_entries(tiny_model, name):
    model, kept = tiny_model("Llama", dtype=DOUBLE), mask_like()
    whole, prefix = ragged_prefix(model, kept)
    runner, proposer = Runner(model), proposers(model, tiny_model)[name]

    def sample(before):
        sampling = Sampling(0.8, generator=torch.Generator().manual_seed(7))
        options = {"sampling": sampling, "gamma": 3, "max_new_tokens": 12, "prefix": before}
        return generate(runner, TEXT, proposer, **options).tokens[0].tolist()

    text, plain = sample(prefix), sample(whole)
    with use_attention(model, masked_attention(kept)):
        assert sample(whole) == text
    assert text != plain


def test_memory_of_decoding_begins_where_an_entry_is(tiny_model):
    model, kept = tiny_model("Llama"), mask_like("only one head keeps all")
    _, prefix = ragged_prefix(model, kept)
    slots = Slots(model, 1, TOTAL + 8, [prefix.cache])
    assert [layer.keys.shape[2] for layer in slots.layers] == [8, 8, TOTAL + 8]
    slots.put(0, prefix.cache, TOTAL)
    assert slots.is_ragged_row(0)
    with pytest.raises(CacheError, match="Heads of this row have lengths of their own"):
        slots.entries(0)


def test_memory_forgets_what_it_held_before(tiny_model):
    model = tiny_model("Llama")
    whole, prefix = ragged_prefix(model, mask_like())
    small = packed(whole.cache, mask_like(seed=8) & (torch.arange(TOTAL) < 6))
    longer = kv.prefill(model, TEXT, prefix).cache
    caches = [prefix.cache, small, longer, whole.cache]
    for cache, before in itertools.permutations(caches, 2):
        slots, fresh = Slots(model, 1, 60, caches), Slots(model, 1, 60, caches)
        slots.put(0, before, 60)
        for memory in (slots, fresh):
            memory.put(0, cache, 60)
        for one, two in zip(slots.layers, fresh.layers, strict=True):
            assert one.bias.equal(two.bias)
        assert slots.lengths == fresh.lengths
        assert slots.offsets.equal(fresh.offsets)


def test_fixed_memory_is_refused(tiny_model):
    model = tiny_model()
    _, prefix = ragged_prefix(model, mask_like())
    with pytest.raises(ValueError, match="lengths of their own: leave compiled_room out"):
        generate(Runner(model, compiled_room=128), TEXT, prefix=prefix, max_new_tokens=4)
    with pytest.raises(CacheError, match="lengths of their own: give it as a prefix"):
        Slots(model, 1, 60).put(0, prefix.cache, TOTAL)


# files


def test_a_saved_cache_is_loaded_bit_for_bit(tiny_model, tmp_path):
    model, kept = tiny_model(), mask_like("a head keeps nothing")
    bias = torch.randn(kept.shape, generator=torch.Generator().manual_seed(2))
    whole = kv.prefill(model, IDS)
    cache = packed(whole.cache, kept, bias)
    longer = kv.prefill(model, TEXT, kv.Prefix(cache, TOTAL))  # biases of fewer columns
    for prefix in (kv.Prefix(cache, TOTAL), longer):
        kv.save(prefix, tmp_path / "a", model, {"text": "x"})
        loaded = kv.load(tmp_path / "a", model)
        assert (loaded.next_position, loaded.metadata) == (prefix.next_position, {"text": "x"})
        for one, two in zip(loaded.cache.layers, prefix.cache.layers, strict=True):
            assert isinstance(one, RaggedLayer)
            for name in ("keys", "values", "bias"):
                assert getattr(one, name).equal(getattr(two, name))
        near(logits_after(model, loaded, TEXT), logits_after(model, prefix, TEXT), 0)


def write_by_hand(path, cache, owner, version):
    """A file as version 1 of the format has it."""
    tensors = {}
    for i, layer in enumerate(cache.layers):
        tensors |= {f"layer.{i}.keys": layer.keys, f"layer.{i}.values": layer.values}
    header = {"version": version, "fingerprint": owner, "next_position": TOTAL}
    header |= {"dtype": "torch.float32", "layers": LAYERS, "length": TOTAL, "metadata": {}}
    header = json.loads(json.dumps(header))
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + as_bytes(tensor))
    header["sha256"] = digest.hexdigest()
    save_file(tensors, path, {"kvlab": json.dumps(header)})


def version_of(path):
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["kvlab"]
    return json.loads(header)["version"]


def test_files_of_ordinary_caches_are_of_the_first_version_and_still_read(tiny_model, tmp_path):
    model = tiny_model()
    whole, prefix = ragged_prefix(model, mask_like())
    write_by_hand(tmp_path / "old", whole.cache, fingerprint(model), 1)
    kv.save(whole, tmp_path / "new", model)
    kv.save(prefix, tmp_path / "ragged", model)
    assert [version_of(tmp_path / name) for name in ("old", "new", "ragged")] == [1, 1, 2]
    for name in ("old", "new"):
        loaded = kv.load(tmp_path / name, model)
        assert not is_ragged(loaded.cache)
        assert same_cache(loaded.cache, whole.cache)
        assert loaded.next_position == TOTAL
    write_by_hand(tmp_path / "future", whole.cache, fingerprint(model), 3)
    with pytest.raises(CacheError, match="version 3, this kvlab reads up to version 2: save the"):
        kv.load(tmp_path / "future", model)


def test_a_damaged_file_is_refused(tiny_model, tmp_path):
    model, path = tiny_model(), tmp_path / "a"
    _, prefix = ragged_prefix(model, mask_like())
    kv.save(prefix, path, model)
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:size])
    at = size + entries["layer.1.bias"]["data_offsets"][0]
    damaged = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], content[:-4]]
    damaged.append(content.replace(b'\\"version\\": 2', b'\\"version\\": 1'))
    assert content not in damaged
    for broken in damaged:
        path.write_bytes(broken)
        with pytest.raises(CacheError, match="damaged or cut short"):
            kv.load(path, model)
    path.write_bytes(content)
    with pytest.raises(CacheError, match="made by another model"):
        kv.load(path, tiny_model(seed=1))


# taking apart and putting together


@pytest.mark.parametrize("kinds", [("random", "all"), ("all", "random"), ("random", KINDS[2])])
def test_joined_caches_are_concatenated_under_a_mask(tiny_model, kinds):
    model = tiny_model("Llama", dtype=DOUBLE)
    parts, masks, biases = [], [], []
    for n, (ids, kind) in enumerate(zip(IDS.split([25, 15], 1), kinds, strict=True)):
        shape = LAYERS, 1, GROUPS, ids.shape[1]
        parts.append(kv.prefill(model, ids, position=25 * n).cache)
        every = torch.ones(shape, dtype=torch.bool)
        masks.append(every if kind == "all" else mask_like(kind, columns=shape[-1], seed=n))
        biases.append(
            torch.zeros(shape, dtype=DOUBLE) if kind == "all" else torch.randn(shape).double()
        )
    pieces = [packed(*part) for part in zip(parts, masks, biases, strict=True)]
    assert [is_ragged(piece) for piece in pieces] == [kind != "all" for kind in kinds]
    prefix = kv.Prefix(kv.join(*pieces), TOTAL)
    kept, bias = torch.cat(masks, -1), torch.cat(biases, -1)
    expected = masked_logits(model, kv.join(*parts), kept, TEXT, TOTAL, bias)
    near(logits_after(model, prefix, TEXT), expected)
    for layer, keep in zip(prefix.cache.layers, kept, strict=True):
        assert layer.keys.shape[2] == keep.sum(-1).max()  # no padding between the parts


@pytest.mark.parametrize("kind", KINDS[:4])
def test_entries_move_by_a_number_or_each_by_its_own(tiny_model, kind):
    model, kept = tiny_model(dtype=DOUBLE), mask_like(kind)
    rotary = rotary_of(model)
    bias = torch.randn(kept.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    whole = kv.prefill(model, IDS).cache
    cache = packed(whole, kept, bias)
    steps = torch.randint(-9, 90, kept.shape, generator=torch.Generator().manual_seed(6))
    for by in (13, -4, torch.tensor(5), torch.full((1, 1), 7), steps):
        expected = packed(kv.shift(whole, by, rotary), kept, bias)
        if isinstance(by, torch.Tensor) and by.ndim == 4:  # as `positions`: on the right
            longest = kv.length(cache)
            columns = kept.byte().argsort(dim=-1, stable=True)[..., TOTAL - longest :]
            by = by.gather(-1, columns)
        moved = kv.shift(cache, by, rotary)
        for one, two in zip(moved.layers, expected.layers, strict=True):
            near(one.keys, two.keys)
            assert one.values.equal(two.values)
            assert one.bias.equal(two.bias)
        back = kv.shift(moved, -by, rotary)
        for one, two in zip(back.layers, cache.layers, strict=True):
            near(one.keys, two.keys)


def test_a_text_reads_the_same_after_entries_at_any_positions(tiny_model):
    model, kept = tiny_model(dtype=DOUBLE), mask_like("a head keeps nothing")
    _, prefix = ragged_prefix(model, kept)
    moved = kv.Prefix(kv.shift(prefix.cache, 50, rotary_of(model)), TOTAL + 50)
    near(logits_after(model, moved, TEXT), logits_after(model, prefix, TEXT), 1e-4)


def test_repeated_rows_are_the_row(tiny_model):
    model, kept = tiny_model(dtype=DOUBLE), mask_like()
    bias = torch.randn(kept.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    prefix = kv.Prefix(packed(kv.prefill(model, IDS).cache, kept, bias), TOTAL)
    rows = kv.Prefix(kv.repeat(prefix.cache, 3), TOTAL)
    expected = logits_after(model, prefix, TEXT)
    near(logits_after(model, rows, TEXT.repeat(3, 1)), expected.repeat(3, 1, 1))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_log_likelihoods_are_those_of_hidden_entries(tiny_model, kind):
    model, kept = tiny_model("Llama", dtype=DOUBLE), mask_like(kind)
    whole, prefix = ragged_prefix(model, kept)
    prompts = [TEXT[0], TEXT[0, :3], TEXT[0, 2:]]
    endings = [IDS[0, :4], IDS[0, 4:9], IDS[0, 9:10]]
    tokenizer = types.SimpleNamespace(pad_token_id=0)
    scores = log_likelihoods(model, tokenizer, prompts, endings, prefix)
    for score, prompt, ending in zip(scores, prompts, endings, strict=True):
        text = torch.cat([prompt, ending])[None]
        log_p = masked_logits(model, whole.cache, kept, text, TOTAL)[0].log_softmax(-1)
        tokens = zip(log_p[len(prompt) - 1 : -1], ending, strict=True)
        expected = sum(row[token].item() for row, token in tokens)
        assert score == pytest.approx(expected, abs=1e-4)  # in float32


REFUSING = {
    "part": lambda prefix: kv.part(prefix, 0, 2),
    "clone": lambda prefix: kv.clone(prefix.cache),
    "select": lambda prefix: kv.select(prefix.cache, torch.tensor([0, 1])),
    "truncate": lambda prefix: kv.truncate(prefix.cache, 2),
    "scale_keys": lambda prefix: kv.scale_keys(prefix.cache, torch.ones(1)),
    "pick_layers": lambda prefix: kv.pick_layers(prefix.cache, [0]),
    "shape_of": lambda prefix: kv.shape_of(prefix.cache),
    "to_tensor": lambda prefix: kv.to_tensor(prefix.cache),
}


@pytest.mark.parametrize("name", REFUSING)
@pytest.mark.parametrize("kind", KINDS[:4])
def test_functions_that_do_not_take_such_a_cache_refuse_it(tiny_model, name, kind):
    _, prefix = ragged_prefix(tiny_model(), mask_like(kind))
    with pytest.raises(CacheError, match=r"Heads of this cache have lengths of their own: see kvl"):
        REFUSING[name](prefix)


def test_padding_of_texts_is_refused(tiny_model):
    model, mask = tiny_model(), torch.ones_like(TEXT)
    _, prefix = ragged_prefix(model, mask_like())
    mask[0, 0] = 0
    with pytest.raises(CacheError, match="read rows without padding, one by one"):
        kv.prefill(model, TEXT, prefix, attention_mask=mask)


# nothing is left behind


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_attends_as_before_also_after_an_exception(tiny_model, implementation):
    model = tiny_model(dtype=DOUBLE, attn_implementation=implementation)
    whole, prefix = ragged_prefix(model, mask_like())
    shallow = first_layers(model, 2)
    before, logits = registered(), logits_after(model, whole, TEXT)

    def fails(*inputs, **options):
        raise KeyboardInterrupt

    def clean():
        configs = [x.config for x in (*model.modules(), shallow) if hasattr(x, "config")]
        assert {config._attn_implementation for config in configs} == {implementation}
        assert registered() == before
        assert logits_after(model, whole, TEXT).equal(logits)

    kv.prefill(model, TEXT, prefix)
    clean()
    for one in (model, shallow):
        with pytest.raises(KeyboardInterrupt), use_attention(one, fails):
            one(TEXT)
        clean()
    with attend_ragged(model, whole.cache):
        assert registered() == before
    short = [layer.keys[:, :, :1] for layer in prefix.cache.layers]
    broken = kv.Prefix(prefix.cache, TOTAL)
    broken.__dict__["_cache"].layers[2].keys = short[2][..., :3]  # of another width
    with pytest.raises(RuntimeError):
        kv.prefill(model, TEXT, broken)
    clean()


def test_a_cache_that_was_given_stays_as_it_was(tiny_model):
    model = tiny_model()
    _, prefix = ragged_prefix(model, mask_like())
    layers = [(x.keys.clone(), x.values.clone(), x.bias.clone()) for x in prefix.cache.layers]
    longer = kv.prefill(model, TEXT, prefix)
    generate(model, TEXT, prefix=prefix, max_new_tokens=4)
    kv.shift(kv.join(prefix.cache, longer.cache), 3, rotary_of(model))
    for layer, tensors in zip(prefix.cache.layers, layers, strict=True):
        assert all(map(torch.equal, (layer.keys, layer.values, layer.bias), tensors))
    assert bias_of(longer.cache.layers[0])[..., -6:].eq(0).all()


# bytes


def ideal(cache, prefix):
    """Bytes of the kept entries alone."""
    width, size = cache.layers[0].keys.shape[-1], cache.layers[0].keys.dtype.itemsize
    return int((prefix.positions >= 0).sum()) * 2 * width * size


@pytest.mark.parametrize("retention", [0.25, 0.1])
def test_padding_costs_little_on_a_trained_model(retention):
    model, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
    facts = [f"{item['question']} {item['answer']}" for item in lab.faq()[:16]]
    ids = tokenizer(" ".join(facts), return_tensors="pt").input_ids[:, :300]
    score = lambda layer, k: kvzip(layer, k, sinks=0)
    options = {"scope": "model", "repeat": repeat_texts(tokenizer, ids)}
    prefix = evict(model, ids, score, retention=retention, **options)
    whole = kv.prefill(model, ids).cache
    assert ideal(whole, prefix) == pytest.approx(retention * kv.nbytes(whole), rel=0.01)
    assert ideal(whole, prefix) < kv.nbytes(prefix.cache) <= 1.3 * ideal(whole, prefix)


@pytest.mark.parametrize("retention", [0.25, 0.1])
def test_padding_costs_little_in_a_larger_shape(retention):
    torch.manual_seed(0)
    layers, heads, total, width = 30, 3, 400, 64
    scores = torch.rand(layers, 1, heads, total)
    kept = choose_entries(scores, round(retention * total), "model")
    entries = torch.zeros(1, heads, total, width)
    cache = kv.from_ragged(pack(entries, entries, keep) for keep in kept)
    smallest = int(kept.sum()) * 2 * width * 4
    assert kept.sum() == round(retention * total) * layers * heads
    assert smallest < kv.nbytes(cache) <= 1.5 * smallest


def test_attention_after_such_a_cache_can_be_captured(tiny_model):
    model = tiny_model("Llama", dtype=DOUBLE)
    (_, prefix), layers = ragged_prefix(model, mask_like()), []
    with capture_attention(model, lambda *layer: layers.append(layer)):
        captured = kv.prefill(model, TEXT, prefix)
    near(captured.logits, kv.prefill(model, TEXT, prefix).logits, 1e-12)
    shapes = [(*queries.shape[1:3], keys.shape[2]) for queries, keys, _, _ in layers]
    columns = [layer.keys.shape[2] + TEXT.shape[1] for layer in prefix.cache.layers]
    assert shapes == [(HEADS, TEXT.shape[1], count) for count in columns]
