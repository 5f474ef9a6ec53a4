"""The laws of spliced pieces and of a store of them: exact where said, whole after a kill, honest about misses."""

import copy
import dataclasses
import functools
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from filelock import FileLock
from safetensors.torch import load_file

from kvlab import cache as kv
from kvlab import files, knowledge, lab
from kvlab.compress import evict, key_norm
from kvlab.draft import KnowledgeDraft
from kvlab.generation import close_turn, continuations, encode, rendered
from kvlab.knowledge import (
    ARMS,
    CACHES_USED,
    Hit,
    KnowledgeCache,
    prefill_behind,
    splice,
    tokens_computed,
)
from kvlab.lab.tokenizers import CHAT_TEMPLATE
from kvlab.models import CacheError, first_layers, rotary_of
from kvlab.ragged import bias_of

ROOT = Path(__file__).parents[1]
IDS = torch.randint(0, 97, (25,), generator=torch.Generator().manual_seed(3)).tolist()
TEXTS, QUESTION = (IDS[:7], IDS[7:12], IDS[12:21]), torch.tensor([IDS[21:]])
FLAT, FIRST, LATER = IDS[:21], 7, 14
RECORDS = [
    {"question": "Where does Anna live?", "answer": "Rome", "domain": "people"},
    {
        "question": "Who sings in the old hall every evening?",
        "answer": "Ben and his two sons",
        "domain": "people",
    },
    {
        "question": "What is a hash table?",
        "answer": "A table that finds a value by a number made from its key.",
    },
    {"question": "How many apples has Carl?", "answer": "4711", "domain": "fruit"},
    {
        "question": "What color is a ripe plum, and what is it like?",
        "answer": "Blue",
        "domain": "fruit",
    },
    {
        "question": "Where does Dora live?",
        "answer": "In Oslo, near the water, with a dog.",
        "domain": "people",
    },
    {"question": "Why?", "answer": "Because.", "id": "why"},
]
MORE = [
    {"question": f"What is number {i}?", "answer": f"It is {i * i}.", "domain": "numbers"}
    for i in range(6)
]

every_family = pytest.mark.parametrize("family", FAMILIES)
every_rope = pytest.mark.parametrize("rope", ["default", "llama3", "yarn"])


class Bag:
    """An embedder that hashes words."""

    def __init__(self, width=64, start=0):
        self.width, self.start = width, start

    def encode(self, sentences, *, normalize_embeddings, show_progress_bar=False):
        assert normalize_embeddings
        counts = torch.zeros(len(sentences), self.width)
        for row, sentence in zip(counts, sentences, strict=True):
            for word in re.findall(r"\w+", sentence.casefold()):
                row[zlib.crc32(word.encode(), self.start) % self.width] += 1
        return counts / counts.norm(dim=1, keepdim=True).clamp(min=1e-9)


BAG = Bag()


def tensors(cache):
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def near(one, two, within):
    torch.testing.assert_close(tensors(one), tensors(two), rtol=0, atol=within)


def prefill(model, ids):
    return kv.prefill(model, torch.tensor([list(ids)]))


def prefill_each(model, texts=TEXTS):
    return [prefill(model, ids) for ids in texts]


# prefixes joined


@every_family
@every_rope
@pytest.mark.parametrize("arm", ["full", "prefix"])
def test_two_arms_are_the_prefill_of_everything(tiny_model, family, rope, arm):
    model = tiny_model(family, rope, torch.float64)
    prefix = splice(model, prefill_each(model), arm)
    near(prefix.cache, prefill(model, FLAT).cache, 1e-9)
    after = kv.prefill(model, QUESTION, prefix)
    torch.testing.assert_close(after.logits, prefill(model, IDS).logits, rtol=0, atol=1e-9)


@every_family
@pytest.mark.parametrize("early", [1, 2, 3])
@pytest.mark.parametrize("arm", ["recompute", "gradual"])
def test_computing_all_again_is_exact_and_computing_none_is_shift_above(
    tiny_model, family, arm, early, monkeypatch
):
    monkeypatch.setattr(knowledge, "EARLY_LAYERS", early)
    model = tiny_model(family, "yarn", torch.float64)
    prefixes, true = prefill_each(model), prefill(model, FLAT).cache
    again = splice(model, prefixes, arm, fraction=1.0)
    near(again.cache, true, 1e-9)
    none = splice(model, prefixes, arm, fraction=0).cache
    moved = splice(model, prefixes, "shift").cache
    torch.testing.assert_close(
        tensors(none)[: 2 * early], tensors(true)[: 2 * early], rtol=0, atol=1e-9
    )
    assert all(map(torch.equal, tensors(none)[2 * early :], tensors(moved)[2 * early :]))
    error = (tensors(moved)[-1] - tensors(true)[-1]).abs().max()
    assert error > 1e-3  # else the arms would be the same


def computed_again(model, cache, layer, tokens):
    """A cache whose entries of some tokens in one layer are computed one after the other, in a plain loop."""
    shallow, ids = first_layers(model, layer + 1), torch.tensor([FLAT])
    entries = kv.to_tensor(cache).clone()  # (L, 2, 1, H_kv, T, D)
    for token in tokens:
        before = kv.Prefix(kv.from_tensor(entries[: layer + 1, ..., :token, :]), token)
        new = kv.prefill(shallow, ids[:, token : token + 1], before).cache
        entries[layer, ..., token, :] = kv.to_tensor(new)[layer, ..., token, :]
    return kv.from_tensor(entries)


def most_different(one, two, tokens, count):
    """Those of the tokens whose keys and values in one layer differ most, in a plain loop."""
    scores = dict.fromkeys(tokens, 0.0)
    for a, b in ((one.keys, two.keys), (one.values, two.values)):
        mean = sum(a[0, :, t].square().sum().item() for t in range(len(FLAT))) / len(FLAT)
        for token in tokens:
            scores[token] += (a[0, :, token] - b[0, :, token]).square().sum().item() / mean
    return sorted(sorted(scores, key=scores.get)[len(scores) - count :])


@every_family
@pytest.mark.parametrize(
    ("arm", "fraction", "counts"),
    [
        ("recompute", 0.15, [14, 14, 2, 2, 2]),
        ("recompute", 0.5, [14, 14, 7, 7, 7]),
        ("gradual", 0.25, [14, 14, 7, 4, 0]),
        ("gradual", 0.6, [14, 14, 14, 8, 3]),
    ],
)
def test_each_layer_computes_those_tokens_of_the_layer_before_that_differ_most(
    tiny_model, family, arm, fraction, counts
):
    model = tiny_model(family, "yarn", torch.float64, num_hidden_layers=5)
    prefixes, chosen = prefill_each(model), list(range(FIRST, len(FLAT)))
    assert tokens_computed(arm, [*map(len, TEXTS)], 5, fraction) == counts
    moved = want = splice(model, prefixes, "shift").cache
    for layer, count in enumerate(counts):
        if count < len(chosen):
            before = want.layers[layer - 1], moved.layers[layer - 1]
            chosen = most_different(*before, chosen, count)
        want = computed_again(model, want, layer, chosen)
    got = splice(model, prefixes, arm, fraction=fraction).cache
    near(got, want, 1e-9)
    changed = (got.layers[4].values != moved.layers[4].values).any(-1).any(1)[0]
    assert changed.nonzero().flatten().tolist() == chosen
    assert not any(layer._forward_pre_hooks for layer in model.base_model.layers)


@every_family
@pytest.mark.parametrize("k", [1, 3, 5])
def test_legolink_computes_the_first_tokens_of_later_pieces_again_on_everything_before(
    tiny_model, family, k
):
    model = tiny_model(family, "yarn", torch.float64)
    prefixes, chosen = prefill_each(model), []
    for start, ids in ((7, TEXTS[1]), (12, TEXTS[2])):
        chosen += range(start, start + min(k, len(ids)))
    moved = want = splice(model, prefixes, "shift").cache
    for layer in range(3):
        want = computed_again(model, want, layer, chosen)
    got = splice(model, prefixes, "legolink", first_tokens=k).cache
    near(got, want, 1e-9)
    changed = (got.layers[2].values != moved.layers[2].values).any(-1).any(1)[0]
    assert changed.nonzero().flatten().tolist() == chosen
    assert tokens_computed("legolink", [*map(len, TEXTS)], 3, first_tokens=k) == [len(chosen)] * 3


@every_family
def test_legolink_of_no_tokens_is_shift_and_of_all_is_exact(tiny_model, family):
    model = tiny_model(family, "llama3", torch.float64)
    prefixes, arm = prefill_each(model), "legolink"
    none = splice(model, prefixes, arm, first_tokens=0).cache
    moved = splice(model, prefixes, "shift").cache
    assert all(map(torch.equal, tensors(none), tensors(moved)))
    longest = max(map(len, TEXTS[1:]))
    again = splice(model, prefixes, arm, first_tokens=longest).cache
    near(again, prefill(model, FLAT).cache, 1e-9)
    fewer = splice(model, prefixes, arm, first_tokens=longest - 1).cache
    assert (tensors(fewer)[-1] - tensors(again)[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("arm", ARMS)
def test_the_work_of_an_arm_is_the_tokens_that_pass_each_layer(tiny_model, arm):
    model, passed = copy.deepcopy(tiny_model(num_hidden_layers=6)), [0] * 6
    prefixes = prefill_each(model)
    for i, layer in enumerate(model.base_model.layers):

        def count(module, inputs, options, output, i=i):
            passed[i] += output.shape[1]

        layer.register_forward_hook(count, with_kwargs=True)
    splice(model, prefixes, arm, fraction=0.4, first_tokens=3)
    assert passed == tokens_computed(arm, [*map(len, TEXTS)], 6, fraction=0.4, first_tokens=3)


@pytest.mark.parametrize("fraction", [0.0, 0.15, 0.4, 0.5, 0.8, 1.0])
def test_gradual_is_as_much_work_as_recompute(fraction):
    one, two = (
        tokens_computed(arm, [9, 3000, 1000], 12, fraction) for arm in ("recompute", "gradual")
    )
    assert sum(one) == pytest.approx(sum(two), abs=6)  # rounding in each layer
    assert two == sorted(two, reverse=True)
    assert max(two) <= 4000
    assert (one == two) == (fraction in (0, 1))


@every_family
@every_rope
def test_a_piece_behind_a_dummy_prefix_is_its_entries_there_moved_back(tiny_model, family, rope):
    model, dummy = tiny_model(family, rope, torch.float64), IDS[:4]
    piece = prefill_behind(model, TEXTS[1], dummy)
    assert (piece.next_position, piece.input_ids, kv.length(piece.cache)) == (5, TEXTS[1], 5)
    before = kv.select(prefill(model, dummy + TEXTS[1]).cache, torch.arange(4, 9))
    near(kv.shift(piece.cache, 4, rotary_of(model)), before, 1e-9)
    # Only where a piece follows the dummy in earnest is nothing lost.
    first = prefill(model, dummy)
    near(splice(model, [first, piece], "shift").cache, prefill(model, dummy + TEXTS[1]).cache, 1e-9)
    alone = prefill(model, TEXTS[1]).cache
    assert (piece.cache.layers[2].values - alone.layers[2].values).abs().max() > 1e-3


@every_family
def test_an_empty_dummy_prefix_is_shift(tiny_model, family):
    model = tiny_model(family, "yarn", torch.float64)
    pieces = [prefill_behind(model, ids, []) for ids in TEXTS]
    moved = [splice(model, p, "shift").cache for p in (pieces, prefill_each(model))]
    near(*moved, 1e-12)


@every_family
@every_rope
def test_shift_is_each_text_read_alone_at_its_positions_and_concat_at_the_start(
    tiny_model, family, rope
):
    model, start = tiny_model(family, rope, torch.float64), 0
    prefixes = prefill_each(model)
    moved, unmoved = (splice(model, prefixes, arm).cache for arm in ("shift", "concat"))
    for ids in TEXTS:
        place = torch.arange(start, start + len(ids))
        alone = kv.prefill(model, torch.tensor([ids]), position=start).cache
        near(kv.select(moved, place), alone, 1e-5)  # a model computes its angles in float32
        near(kv.select(unmoved, place), prefill(model, ids).cache, 1e-9)
        start += len(ids)
    assert (moved.layers[0].keys - unmoved.layers[0].keys)[:, :, FIRST:].abs().max() > 1e-2


@pytest.mark.parametrize("arm", ARMS)
def test_a_single_prefix_is_exact_in_every_arm(tiny_model, arm):
    model = tiny_model("Llama", "llama3", torch.float64)
    prefix = splice(model, prefill_each(model, [FLAT]), arm)
    near(prefix.cache, prefill(model, FLAT).cache, 1e-9)
    assert prefix.next_position == len(FLAT)


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS])
@pytest.mark.parametrize("arm", ARMS)
def test_a_splice_has_its_text_and_leaves_its_prefixes_alone(tiny_model, arm, texts):
    model = copy.deepcopy(tiny_model()).requires_grad_(True)
    with torch.no_grad():
        prefixes = prefill_each(model, texts)
    before = [(kv.clone(p.cache), [t._version for t in tensors(p.cache)]) for p in prefixes]
    spliced = splice(model, prefixes, arm)
    flat = list(itertools.chain(*texts))
    assert (spliced.next_position, list(spliced.input_ids)) == (len(flat), flat)
    assert kv.length(spliced.cache) == len(flat)
    assert not any(t.requires_grad for t in tensors(spliced.cache))
    model(torch.tensor([FLAT[:3]]), past_key_values=spliced.cache)  # adds to it
    for prefix, ids, (cache, versions) in zip(prefixes, texts, before, strict=True):
        assert all(map(torch.equal, tensors(prefix.cache), tensors(cache)))
        assert [t._version for t in tensors(prefix.cache)] == versions
        assert prefix.cache.get_seq_length() == len(ids)


def test_an_unknown_arm_is_refused(tiny_model):
    with pytest.raises(
        CacheError, match=r"'blend'.*full, prefix, concat, shift, recompute, gradual, legolink"
    ):
        splice(tiny_model(), prefill_each(tiny_model()), "blend")


def test_prefixes_that_do_not_fit_are_refused(tiny_model):
    model, prefix = tiny_model(), prefill(tiny_model(), TEXTS[0])
    wrong = [
        dataclasses.replace(prefix, input_ids=TEXTS[0][:-1]),
        kv.prefill(model, torch.tensor([TEXTS[0]]), position=5),
        prefill(tiny_model(num_hidden_layers=2), TEXTS[0]),
    ]
    for other, arm in itertools.product(wrong, ARMS[1:]):
        with pytest.raises(CacheError, match="prefill it alone, from position 0, with this model"):
            splice(model, [other, prefix], arm)
    many = [prefix] * (256 // len(TEXTS[0]) + 1)
    with pytest.raises(CacheError, match="tokens, the model reads up to 256: give fewer"):
        splice(model, many, "shift")


@pytest.mark.parametrize("arm", CACHES_USED)
def test_caches_that_an_arm_does_not_use_may_be_missing(tiny_model, arm):
    model, count = tiny_model(), CACHES_USED[arm]
    bare = [kv.Prefix(None, len(ids), ids) for ids in TEXTS[count:]]
    prefixes = [*prefill_each(model, TEXTS[:count]), *bare]
    near(splice(model, prefixes, arm).cache, prefill(model, FLAT).cache, 1e-5)


def test_a_store_reads_from_disk_only_what_an_arm_needs(make, monkeypatch):
    store, done, original = make(), [], KnowledgeCache.read
    monkeypatch.setattr(
        KnowledgeCache, "read", lambda self, item: done.append(item.id) or original(self, item)
    )
    for arm in ARMS:
        count = {"full": 0, "prefix": 1}.get(arm, 3)
        done.clear()
        prefix = store.splice(store.items[:3], arm)
        assert done == [item.id for item in store.items[:count]]
        ids = [token for item in store.items[:3] for token in item.input_ids]
        assert list(prefix.input_ids) == ids


# reading


@every_family
def test_a_text_in_a_batch_is_the_text_alone(tiny_model, family):
    model = tiny_model(family, dtype=torch.float64)
    texts = [FLAT[i : 21 - 3 * (i % 5)] for i in range(5)]
    for ids, parts in zip(texts, knowledge._prefill_rows(model, texts), strict=True):
        near(kv.from_tensor(parts["kv"]), prefill(model, ids).cache, 1e-9)
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state
        torch.testing.assert_close(parts["hidden"], hidden, rtol=0, atol=1e-9)


# the store


@pytest.fixture(scope="module")
def tokenizer():
    return lab.load_tokenizer("lab-draft")


@pytest.fixture
def model(tiny_model):
    return tiny_model(vocab_size=1536)


@pytest.fixture
def make(tmp_path, model, tokenizer):
    """Return a function that builds a store in a new folder."""

    def make(
        records=RECORDS, name="store", embedder=BAG, tokenizer=tokenizer, model=model, **options
    ):
        return KnowledgeCache.build(tmp_path / name, records, model, tokenizer, embedder, **options)

    return make


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(knowledge, "SHARD_ITEMS", 2)


def load(store, **changes):
    given = {
        "model": store.model,
        "tokenizer": store.tokenizer,
        "embedder": store.embedder,
    } | changes
    return KnowledgeCache.load(store.folder, **given)


def listing(folder):
    """All files but the lock, with what is in them."""
    found = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def shown(items):
    return [
        (i.id, i.domain, i.question, i.answer, i.input_ids, i.answer_start, i.generated)
        for i in items
    ]


def same_tensors(one, two):
    """Whether two stores hold the same items, bit for bit."""
    pairs = list(zip(one.items, two.items, strict=True))
    stored = [(one._tensors(a), two._tensors(b)) for a, b in pairs]
    alike = all(a.keys() == b.keys() and all(torch.equal(a[p], b[p]) for p in a) for a, b in stored)
    return (
        alike
        and shown(one.items) == shown(two.items)
        and torch.equal(one.embeddings, two.embeddings)
    )


def data_of(store, item):
    return store.folder / "shards" / f"{item.shard}.safetensors"


def index_of(store, item):
    return store.folder / "shards" / f"{item.shard}.index.safetensors"


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", [("kv",), ("hidden",), ("hidden", "kv")], ids="+".join)
def test_what_is_read_is_what_was_computed_bit_for_bit(make, model, keep, dtype):
    store = load(make(keep=keep, dtype=dtype, batch_size=1))
    assert (set(store.keep), store.dtype) == (set(keep), dtype or torch.float32)
    for item in store.items:
        ids, stored = torch.tensor([item.input_ids]), store._tensors(item)
        assert stored.keys() == set(keep)
        assert all(t.dtype == store.dtype for t in stored.values())
        if "kv" in keep:
            prefix = store.read(item)
            computed = [
                t.to(store.dtype).to(model.dtype)
                for t in tensors(prefill(model, ids[0].tolist()).cache)
            ]
            assert all(map(torch.equal, tensors(prefix.cache), computed))
            assert prefix.input_ids == item.input_ids
            assert prefix.next_position == len(item.input_ids)
            assert prefix.positions.tolist() == [[*range(len(item.input_ids))]]
        else:
            with pytest.raises(CacheError, match="keeps no 'kv': build one with keep="):
                store.read(item)
        if "hidden" in keep:
            computed = model.base_model(ids).last_hidden_state.to(store.dtype).to(model.dtype)
            assert torch.equal(store.hidden_states(item), computed)
        else:
            with pytest.raises(CacheError, match="keeps no 'hidden': build one with keep="):
                store.hidden_states(item)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_an_item_does_not_depend_on_its_batch(make, model, batch_size):
    store = make(batch_size=batch_size)
    assert len({len(item.input_ids) for item in store.items}) > 3
    for item in store.items:
        near(store.read(item).cache, prefill(model, item.input_ids).cache, 1e-5)


def test_items_are_the_records_in_their_order(make):
    for store in (made := make(), load(made)):
        assert [(i.question, i.answer, i.domain) for i in store.items] == [
            (r["question"], r["answer"], r.get("domain", "")) for r in RECORDS
        ]
        assert len(store) == len(RECORDS) == len({item.id for item in store.items})
        assert store["why"].question == "Why?"
        assert not any(item.generated for item in store.items)
        assert store.embeddings.shape == (len(RECORDS), 64)
        torch.testing.assert_close(
            store.embeddings, knowledge._embed(BAG, [r["question"] for r in RECORDS])
        )
        with pytest.raises(KeyError, match="nobody"):
            store["nobody"]
    assert same_tensors(made, load(made))


def test_ids_are_those_of_the_chat_template(make, tokenizer):
    for item in make().items:
        asked = [{"role": "user", "content": item.question}]
        whole = [*asked, {"role": "assistant", "content": item.answer}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert (
            list(item.input_ids)
            == tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"]
        )
        assert list(item.input_ids[: item.answer_start]) == prompt
        assert tokenizer.decode(item.input_ids[item.answer_start :]) == f" {item.answer}<|end|>"


def test_a_template_may_open_an_answer_otherwise_than_it_shows_one(make, tokenizer):
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = tokenizer.chat_template.replace(
        "<|assistant|>{% endif", "<|assistant|> thought{% endif"
    )
    asked = [{"role": "user", "content": RECORDS[0]["question"]}]
    prompt = thinking.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    item = make(tokenizer=thinking).items[0]
    assert thinking.decode(prompt).endswith("<|assistant|> thought")
    assert list(item.input_ids[: item.answer_start]) == prompt
    assert list(item.input_ids[item.answer_start :]) == tokenizer("Rome<|end|>")["input_ids"]


def test_a_tokenizer_needs_no_chat_template(make, tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    for item in make(tokenizer=plain).items:
        assert list(item.input_ids[: item.answer_start]) == tokenizer(item.question)["input_ids"]
        assert tokenizer.decode(item.input_ids[item.answer_start :]) == f"\n{item.answer}\n"


def test_what_is_there_is_skipped(make, tokenizer, model):
    store = make([*RECORDS, RECORDS[1]])
    before, other = (
        listing(store.folder),
        {"question": RECORDS[0]["question"], "answer": "Paris", "domain": "people"},
    )
    assert len(store) == len(RECORDS)
    assert store.add(RECORDS) == load(store).add(RECORDS[::-1]) == 0
    assert len(make(RECORDS)) == len(RECORDS)
    assert listing(store.folder) == before
    elsewhere = RECORDS[0] | {"domain": "cities"}
    assert store.add([RECORDS[2], other, elsewhere, other]) == 2
    assert [(i.answer, i.domain) for i in store.items[-2:]] == [
        ("Paris", "people"),
        ("Rome", "cities"),
    ]
    assert same_tensors(store, load(store))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"question": "What?"}, "Record 1 has 'answer' = None"),
        ({"answer": "That."}, "Record 1 has 'question' = None"),
        ({"question": " ", "answer": "That."}, "Record 1 has 'question' = ' '"),
        ({"question": "What?", "answer": 5}, "Record 1 has 'answer' = 5"),
        ({"question": "What?", "answer": "That.", "id": "why"}, "Two items have the id 'why'"),
        ({"question": "What?", "answer": "That.", "id": "new"}, "Two items have the id 'new'"),
        ({"question": "What?", "answer": "long " * 300}, "tokens, the model reads 256"),
    ],
    ids=str,
)
def test_a_bad_record_is_refused_before_anything_is_written(make, bad, words):
    store = make()
    before, items = listing(store.folder), list(store.items)
    with pytest.raises(CacheError, match=words):
        store.add([{"question": "A new one?", "answer": "Yes.", "id": "new"}, bad])
    assert listing(store.folder) == before
    assert store.items == items == load(store).items


def greedy(model, tokenizer, item, count):
    prompt = torch.tensor([item.input_ids[: item.answer_start]])
    options = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    done = model.generate(
        prompt, do_sample=False, max_new_tokens=count, repetition_penalty=1.0, **options
    )
    return done[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generated_answers_are_kept_in_the_tokens_of_the_model(make, model, tokenizer, batch_size):
    questions = [{key: value for key, value in r.items() if key != "answer"} for r in RECORDS]
    store = make(questions, generate=True, max_new_tokens=9, batch_size=batch_size)
    again = []
    for item, record in zip(store.items, RECORDS, strict=True):
        made = list(item.input_ids[item.answer_start :])
        assert made == close_turn(tokenizer, greedy(model, tokenizer, item, 9))
        assert (item.question, item.generated) == (record["question"], True)
        assert item.answer == tokenizer.decode(made, skip_special_tokens=True).strip()
        near(store.read(item).cache, prefill(model, item.input_ids).cache, 1e-5)
        again.append(tokenizer(item.answer)["input_ids"] == made[:-1])
    assert not all(again)  # tokenizing the text again would not do
    assert store.add(questions, generate=True, max_new_tokens=9) == 0
    assert load(store).add(RECORDS, generate=True) == 0
    assert store.add([RECORDS[0]]) == 1  # a given answer is another item
    assert store.summary().loc["all", "generated"] == len(RECORDS)


def test_a_generated_answer_holds_its_end_token_and_no_padding(tmp_path, tokenizer):
    model, faq = lab.load("lab-draft"), lab.faq()[:6]
    store = KnowledgeCache.build(
        tmp_path / "s", faq, model, tokenizer, generate=True, max_new_tokens=48
    )
    ended = 0
    for item in store.items:
        made = list(item.input_ids[item.answer_start :])
        assert made == close_turn(tokenizer, greedy(model, tokenizer, item, 48))
        ended += made[-1] == tokenizer.eos_token_id
    assert ended
    assert len({len(item.input_ids) - item.answer_start for item in store.items}) > 1


@pytest.mark.parametrize("domain", ["people", "fruit", "", None])
def test_an_exported_domain_is_a_store_of_its_own(make, small_shards, tmp_path, domain):
    store = make(keep=("kv", "hidden"), dtype=torch.bfloat16)
    before = listing(store.folder)
    made = store.export(tmp_path / "copy", domain)
    assert listing(store.folder) == before
    shutil.rmtree(store.folder)
    store.folder.mkdir()
    # An export does not need its source.
    for name, content in before.items():
        (store.folder / name).parent.mkdir(exist_ok=True)
        (store.folder / name).write_bytes(content)
    chosen = [i for i, item in enumerate(store.items) if domain in (None, item.domain)]
    for copied in (made, load(made)):
        assert shown(copied.items) == shown([store.items[i] for i in chosen])
        assert torch.equal(copied.embeddings, store.embeddings[chosen])
        for item, i in zip(copied.items, chosen, strict=True):
            one, two = copied._tensors(item), store._tensors(store.items[i])
            assert one.keys() == two.keys()
            assert all(torch.equal(one[part], two[part]) for part in one)
    assert made.add(RECORDS[:3]) == sum(r.get("domain", "") != domain for r in RECORDS[:3]) * (
        domain is not None
    )


def test_an_export_is_brought_up_to_date(make, small_shards, tmp_path):
    store = make(RECORDS[:3])
    made = store.export(tmp_path / "copy")
    before = listing(made.folder)
    assert len(store.export(made.folder)) == 3
    assert listing(made.folder) == before
    store.add(RECORDS)
    again = store.export(made.folder)
    assert shown(again.items) == shown(store.items)
    changed = {name for name, content in before.items() if listing(made.folder)[name] != content}
    assert changed == {"manifest.json"}
    assert torch.equal(again.embeddings, store.embeddings)


def test_an_export_does_not_mix_what_does_not_fit(make, tmp_path):
    store, other = make(), make(MORE, "other", dtype=torch.float16)
    mine = make([{"question": "Why?", "answer": "No.", "id": store.items[0].id}], "mine")
    before = [listing(s.folder) for s in (other, mine)]
    with pytest.raises(CacheError, match=r"a store with other settings: give an empty folder"):
        store.export(other.folder)
    with pytest.raises(CacheError, match="Two items have the id"):
        store.export(mine.folder)
    assert [listing(s.folder) for s in (other, mine)] == before
    with pytest.raises(CacheError, match=r"no domain 'stars'.*fruit.*people"):
        store.export(tmp_path / "new", "stars")
    assert not (tmp_path / "new").exists()


def test_summary_adds_up(make):
    store = make(keep=("kv", "hidden"))
    table = store.summary()
    assert table.index.tolist() == ["", "fruit", "people", "all"]
    np.testing.assert_allclose(table[:-1].sum(), table.loc["all"])
    assert table.loc["people", "items"] == 3
    assert table.loc["all", "tokens"] == sum(len(item.input_ids) for item in store.items)
    assert table.loc["fruit", "answer tokens"] == sum(
        len(i.input_ids) - i.answer_start for i in store.items if i.domain == "fruit"
    )
    assert table.loc["all", "size (MB)"] * 1e6 == pytest.approx(written(store))


def test_summary_of_little(make):
    assert make([]).summary().loc["all", "items"] == 0
    named = make([RECORDS[0] | {"domain": "all"}, RECORDS[1]], "named").summary()
    assert named["items"].tolist() == [1, 1, 2]


def written(store):
    shards = {data_of(store, item) for item in store.items}
    return sum(tensor.nbytes for path in shards for tensor in load_file(path).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("keep", [("kv",), ("hidden",), ("kv", "hidden")], ids="+".join)
def test_the_estimate_is_what_is_written(make, keep, dtype):
    store = make(keep=keep, dtype=dtype)
    had, more = written(store), store.estimate([*RECORDS, *MORE, *MORE])
    assert more > 0
    assert had == store.estimate([]) + sum(
        store.bytes_of(len(item.input_ids)) for item in store.items
    )
    store.add(MORE)
    assert written(store) == had + more
    assert store.estimate(MORE) == 0
    most = store.estimate(RECORDS[:6], generate=True, max_new_tokens=5)
    had = written(store)
    store.add(RECORDS[:6], generate=True, max_new_tokens=5)
    assert written(store) == had + most  # no answer of this model ends early


@pytest.fixture
def opened(monkeypatch):
    """Paths that are opened as safetensors, in order."""
    paths, real = [], knowledge.safe_open

    def watching(path, *args, **options):
        paths.append(Path(path))
        return real(path, *args, **options)

    monkeypatch.setattr(knowledge, "safe_open", watching)
    return paths


def test_tensors_are_read_when_their_item_is(make, small_shards, opened):
    store = make()
    opened.clear()
    store = load(store)
    store.retrieve("Where does Anna live?")
    store.summary()
    assert opened == [index_of(store, store.items[i]) for i in (0, 2, 4, 6)]
    opened.clear()
    store.read(store.items[3])
    assert opened == [data_of(store, store.items[3])]


def test_shards_change_nothing(make, monkeypatch):
    one = make(name="one", batch_size=1)
    monkeypatch.setattr(knowledge, "SHARD_ITEMS", 3)
    few = make(name="few", batch_size=1)
    assert [shard["items"] for shard in few.shards] == [3, 3, 1]
    assert same_tensors(few, one)
    sizes = [one.bytes_of(len(item.input_ids)) for item in one.items]
    monkeypatch.setattr(knowledge, "SHARD_BYTES", sizes[0] + sizes[1])
    bytewise = make(name="bytes", batch_size=1)
    assert len(bytewise.shards) > len(few.shards)
    assert all(
        written_in(bytewise, shard) <= sizes[0] + sizes[1] or shard["items"] == 1
        for shard in bytewise.shards
    )
    assert same_tensors(bytewise, one)
    assert len(one.shards) == 1
    assert same_tensors(bytewise.export(bytewise.folder.parent / "again"), one)


def written_in(store, shard):
    return sum(tensor.nbytes for tensor in load_file(store._paths(shard["name"])[0]).values())


def test_a_store_splices_what_it_finds(make, model):
    store = make()
    hits = store.retrieve("Where does Dora live?", k=2)
    assert [type(hit) for hit in hits] == [Hit, Hit]
    prefix = store.splice(hits, "full")
    assert list(prefix.input_ids) == [*hits[0].item.input_ids, *hits[1].item.input_ids]
    near(
        store.splice([hit.item for hit in hits], "recompute", fraction=1.0).cache,
        prefix.cache,
        1e-4,
    )


@pytest.mark.parametrize("keep", ["kv", (), ("keys",), ("kv", "keys")], ids=str)
def test_what_can_be_kept(make, tmp_path, keep):
    with pytest.raises(CacheError, match="expected a list of one or both of"):
        make(keep=keep)
    with pytest.raises(CacheError, match=r"dtype is torch.int8"):
        make(dtype=torch.int8)
    assert not (tmp_path / "store").exists()


def test_a_store_keeps_its_settings(make):
    store = make()
    before = listing(store.folder)
    for other in ({"keep": ("hidden",)}, {"dtype": torch.float16}):
        with pytest.raises(CacheError, match=r"keeps .*: use a new folder"):
            make(MORE, **other)
    assert listing(store.folder) == before


# finding


@pytest.mark.parametrize("k", [1, 3, 100])
@pytest.mark.parametrize("domain", [None, "people", "numbers"])
def test_the_ranking_is_that_of_brute_force(make, small_shards, k, domain):
    store = load(make([*RECORDS, *MORE]))
    for question in [
        "Where does she live?",
        "What is number 3?",
        "a table, a value",
        *(r["question"] for r in RECORDS),
    ]:
        cosines = (
            knowledge._embed(BAG, [r["question"] for r in [*RECORDS, *MORE]]).numpy()
            @ BAG.encode([question], normalize_embeddings=True)[0].numpy()
        )
        allowed = np.array([domain in (None, r.get("domain", "")) for r in [*RECORDS, *MORE]])
        want = np.sort(cosines[allowed & (cosines >= 0.3)])[::-1][:k]
        hits = store.retrieve(question, k, threshold=0.3, domain=domain)
        np.testing.assert_allclose([hit.score for hit in hits], want, atol=1e-6)
        for hit in hits:
            assert hit.score == pytest.approx(cosines[store.items.index(hit.item)], abs=1e-6)
            assert domain in (None, hit.item.domain)
        assert len({hit.item.id for hit in hits}) == len(hits)


def test_a_miss_is_a_miss(make):
    store = make()
    hit = store.retrieve("Where does Anna sleep?")[0]
    assert 0.5 < hit.score < 0.95
    assert store.retrieve("Where does Anna sleep?", threshold=hit.score) == [hit]
    assert store.retrieve("Where does Anna sleep?", threshold=np.nextafter(hit.score, 2)) == []
    assert store.retrieve("zebra crossing xylophone") == []
    assert len(store.retrieve("zebra crossing xylophone", threshold=-1)) == 1
    assert store.retrieve("Where does Anna live?", domain="fruit") == []
    assert make([], "empty").retrieve("Where does Anna live?", threshold=-1) == []


@pytest.mark.parametrize("embedder", [BAG, None])
def test_every_question_finds_its_own_item(make, small_shards, embedder):
    store = load(make([*RECORDS, *MORE], embedder=embedder))
    for item in store.items[::-1]:
        hit = store.retrieve(item.question, k=1)[0]
        assert hit.item == item
        assert hit.score == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("embedder", [BAG, None])
def test_exact_is_exact_but_for_case_punctuation_and_space(make, embedder):
    store = make([*RECORDS, RECORDS[0] | {"answer": "Paris"}], embedder=embedder)
    for question in (
        "where does anna live",
        "Where does  Anna live ?!",
        "WHERE DOES ANNA LIVE?",
        "“Where does Anna live？”",
        "«¿Where does ‘Anna’ live?»",
    ):
        hits = store.retrieve(question, k=5, exact=True)
        assert [(hit.item.answer, hit.score) for hit in hits] == [("Rome", 1.0), ("Paris", 1.0)]
        assert len(store.retrieve(question, exact=True)) == 1
    assert store.retrieve("where does anna live", exact=True, domain="fruit") == []
    assert store.retrieve("Where does Anna really live?", exact=True) == []
    assert store.retrieve("Rome", k=9, exact=True, threshold=-1) == []
    if embedder is None:
        assert store.retrieve("Where does Anna really live?", threshold=-1) == []
    store.add(
        [
            {"question": f"What is {thing}?", "answer": thing}
            for thing in ("C++", "C#", "1", "-1", "n!=1", "Anna's dog")
        ]
        + [{"question": "???", "answer": "?"}]
    )
    assert [hit.item.answer for hit in store.retrieve("???", k=9, exact=True)] == ["?"]
    assert store.retrieve("!!!", exact=True) == []
    assert store.retrieve("What is Anna’s dog?", exact=True)[0].item.answer == "Anna's dog"
    for thing in ("C++", "C#", "1", "-1", "n!=1"):
        assert [hit.item.answer for hit in store.retrieve(f"what is {thing}", k=9, exact=True)] == [
            thing
        ]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"k": 0}, "k is 0"), ({"domain": "stars"}, "no domain 'stars' in .*'fruit', 'people'")],
    ids=str,
)
def test_wrong_arguments_of_a_search(make, arguments, words, exact):
    with pytest.raises(CacheError, match=words):
        make().retrieve(**{"question": "Why?"} | arguments, exact=exact)


# what does not fit, and what is damaged


@pytest.fixture
def store(make, small_shards):
    return make()


def test_a_store_belongs_to_its_model(store, tiny_model):
    before = listing(store.folder)
    base, rope = {"vocab_size": 1536}, {"rope_type": "default", "rope_theta": 20000.0}
    others = {
        "weights sha256": tiny_model(seed=1, **base),
        "rope inv_freq": tiny_model.__wrapped__(rope_parameters=rope, **base),
        "rope type": tiny_model(rope="yarn", **base),
        "architecture num_hidden_layers": tiny_model(num_hidden_layers=2, **base),
        "weights dtype": tiny_model(dtype=torch.float64, **base),
    }
    for words, other in others.items():
        with pytest.raises(
            CacheError, match=f"{store.folder}.*another model.*{words}.*load it with that"
        ):
            load(store, model=other)
        with pytest.raises(CacheError, match=words):
            KnowledgeCache.build(store.folder, MORE, other, store.tokenizer, BAG)
    assert listing(store.folder) == before


def test_a_store_belongs_to_its_tokenizer_and_template(store, tokenizer):
    before, other, template = (
        listing(store.folder),
        copy.deepcopy(tokenizer),
        copy.deepcopy(tokenizer),
    )
    other.add_tokens(["Rome"])
    template.chat_template = template.chat_template.replace("|> ", "|>")
    both = lab.load_tokenizer("lab-teacher")
    both.chat_template = "{{ messages }}"
    refused = {"tokenizer vocabulary": other, "tokenizer chat template": template}
    refused["tokenizer vocabulary.*tokenizer chat template"] = both
    for words, unlike in refused.items():
        with pytest.raises(CacheError, match=rf"{store.folder}.*another .*tokenizer \(.*{words}"):
            load(store, tokenizer=unlike)
    used = copy.deepcopy(tokenizer)
    used(["a b c", "d"], padding=True, truncation=True, max_length=2)
    assert len(load(store, tokenizer=used)) == len(RECORDS)
    assert listing(store.folder) == before


def test_a_store_belongs_to_its_embedder(store, make):
    before = listing(store.folder)
    for other, words in (
        (Bag(32), "the store's own embedder"),
        (Bag(start=7), "load it with that"),
    ):
        with pytest.raises(CacheError, match=f"embedder.*{words}"):
            load(store, embedder=other)
    without = load(store, embedder=None)
    assert without.retrieve("where does anna live", exact=True)[0].item.answer == "Rome"
    with pytest.raises(CacheError, match="the store's own embedder"):
        without.retrieve("where does anna live")
    with pytest.raises(CacheError, match="the store's own embedder"):
        without.add(MORE)
    assert listing(store.folder) == before
    bare = make(name="bare", embedder=None)
    with pytest.raises(CacheError, match=r"The embedder \(Bag\) gave \(1, 64\), expected \(1, 0\)"):
        load(bare, embedder=BAG)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


DAMAGE = {
    "truncated data": (data_of, truncate),
    "missing data": (data_of, Path.unlink),
    "empty data": (data_of, lambda path: path.write_bytes(b"")),
    "missing index": (index_of, Path.unlink),
    "truncated index": (index_of, truncate),
    "flipped header of index": (index_of, lambda path: flip(path, 20)),
    "flipped end of index": (index_of, flip),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_named(store, kind):
    file_of, harm = DAMAGE[kind]
    path, intact = file_of(store, store.items[2]), load(store)
    backup = path.read_bytes()
    harm(path)
    before = listing(store.folder)
    name = data_of(store, store.items[2])
    for attempt in (load, lambda store: store.add(MORE)):
        with pytest.raises(CacheError, match=f"{name} or its index is .*damaged: use a backup"):
            attempt(store)
    assert listing(store.folder) == before
    path.write_bytes(backup)
    assert same_tensors(load(store), intact)


def test_a_flipped_byte_costs_one_item(store, tmp_path):
    lost, spared = store.items[2:4]
    path = data_of(store, lost)
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    flip(path, start + 100)  # in the first item of the shard
    store = load(store)
    with pytest.raises(CacheError, match=f"Item '{lost.id}' in {path} is missing or damaged"):
        store.read(lost)
    with pytest.raises(CacheError, match=lost.id):
        store.splice([spared, lost])
    for item in [i for i in store.items if i != lost]:
        near(store.read(item).cache, prefill(store.model, item.input_ids).cache, 1e-5)
    with pytest.raises(CacheError, match=lost.id):
        store.export(tmp_path / "strict")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_changed_byte_of_a_header_gives_other_tensors(make, dtype):
    store = make(RECORDS[:1], dtype=dtype, embedder=None)
    item = store.items[0]
    path, want = data_of(store, item), store._tensors(item)["kv"].clone()
    content, refused = path.read_bytes(), 0
    size = 8 + int.from_bytes(content[:8], "little")
    for at in range(size):
        for byte in {
            *b"IFUB0123456789",
            content[at] ^ 1,
            content[at] ^ 0x20,
            content[at] ^ 0x80,
        } - {content[at]}:
            path.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
            try:
                got = store._tensors(item)["kv"]
            except CacheError:
                refused += 1
            else:
                assert got.dtype == want.dtype, path.read_bytes()[:size]
                assert torch.equal(got, want), path.read_bytes()[:size]
    assert refused > 10 * size


def test_a_shard_that_vanishes_after_opening_is_named(store):
    path = data_of(store, store.items[0])
    path.unlink()
    with pytest.raises(CacheError, match=f"in {path} is missing or damaged: use a backup"):
        store.read(store.items[0])
    assert store.read(store.items[2]).cache is not None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe garbage", b'{"shards": []}'], ids=str
)
def test_garbage_for_a_manifest(store, content):
    path = store.folder / "manifest.json"
    path.write_bytes(content)
    before = listing(store.folder)
    with pytest.raises(CacheError, match=f"{path} is damaged: restore it from a backup"):
        load(store)
    with pytest.raises(CacheError, match=f"{path} is damaged"):
        KnowledgeCache.build(store.folder, MORE, store.model, store.tokenizer, BAG)
    with pytest.raises(CacheError, match=f"{path} is damaged"):
        store.add(MORE)
    assert listing(store.folder) == before


def test_every_flipped_byte_of_a_manifest_is_noticed(store):
    path = store.folder / "manifest.json"
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        flip(path, at)
        if json_or_none(path.read_bytes()) != json.loads(content):
            with pytest.raises(CacheError, match=f"{path} is damaged|has format version"):
                knowledge._read_manifest(store.folder)
        path.write_bytes(content)
    assert len(load(store)) == len(RECORDS)


def json_or_none(content):
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_another_format_version_is_refused(store):
    path = store.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    manifest["version"] = 2
    path.write_text(json.dumps({"checksum": knowledge._json_hash(manifest), **manifest}))
    with pytest.raises(CacheError, match=f"{store.folder} has format version 2, expected 1"):
        load(store)


def test_a_store_of_an_earlier_version_is_read_and_added_to(store):
    """It may have a copy of its manifest, and numbers of items that were removed."""
    before = load(store)
    knowledge._commit(
        store.folder, store.settings, [store.shards[0] | {"removed": [1]}, *store.shards[1:]]
    )
    shutil.copy(store.folder / "manifest.json", store.folder / "manifest.copy.json")
    left = load(store)
    assert shown(left.items) == shown([before.items[0], *before.items[2:]])
    assert torch.equal(left.embeddings, before.embeddings[[0, *range(2, len(RECORDS))]])
    assert left.add(RECORDS) == 1
    assert shown(load(store).items) == shown([*left.items[:-1], before.items[1]])
    assert len(left.export(store.folder.with_name("copy"))) == len(RECORDS)


def test_a_folder_that_holds_something_else(make, tmp_path, model, tokenizer):
    folder = tmp_path / "store"
    with pytest.raises(CacheError, match=f"There is no store in {folder}: build one"):
        KnowledgeCache.load(folder, model, tokenizer)
    folder.mkdir()
    (folder / "letter.txt").write_text("Dear Anna")
    with pytest.raises(CacheError, match=rf"{folder} holds \['letter.txt'\] and no store"):
        make()
    assert listing(folder) == {"letter.txt": b"Dear Anna"}
    with pytest.raises(CacheError, match=r"letter.txt"):
        make(name="other").export(folder)
    assert listing(folder) == {"letter.txt": b"Dear Anna"}
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FileExistsError):
        make(name="file")


# kills, and others


class Killed(BaseException):
    """What a process that is killed at this point would not live to see."""


def kill_at(monkeypatch, module, name, number, after):
    """Let the call of that number be the last thing that happens, done or not; files are not even cleaned up."""
    real, calls, unlink = getattr(module, name), [0], Path.unlink

    def watched(*args, **options):
        calls[0] += 1
        if calls[0] - 1 != number:
            return real(*args, **options)
        monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        if after:
            real(*args, **options)
        raise Killed

    def undo():
        monkeypatch.setattr(module, name, real)
        monkeypatch.setattr(Path, "unlink", unlink)

    monkeypatch.setattr(module, name, watched)
    return undo


points = pytest.mark.parametrize(
    ("name", "after"),
    [(name, after) for name in ("save_file", "_replace") for after in (False, True)],
)


@points
def test_a_kill_while_adding_leaves_the_old_or_the_new(
    make, small_shards, monkeypatch, name, after
):
    records, number, lengths = RECORDS[:2] + MORE[:5], 0, []
    before = make(records[:2], name="before")
    while True:
        folder = before.folder.with_name(f"copy{number}")
        shutil.copytree(before.folder, folder)
        store = KnowledgeCache.load(folder, before.model, before.tokenizer, BAG)
        undo = kill_at(monkeypatch, files, name, number, after)
        try:
            store.add(records)
            break
        except Killed:
            pass
        finally:
            undo()
        left = load(store)
        lengths.append(len(left))
        assert [item.question for item in left.items] == [
            r["question"] for r in records[: len(left)]
        ]
        assert left.embeddings.shape[0] == len(left)
        for item in left.items[2:]:
            near(left.read(item).cache, prefill(left.model, item.input_ids).cache, 1e-5)
        again = (store, left)[number % 2]  # the one that failed, or a new one
        missing = len(records) - len(left)
        assert again.add(records) == missing
        assert [item.question for item in load(again).items] == [r["question"] for r in records]
        expect_no_leftovers(again)
        number += 1
    # Of each shard, data and index are written, then the manifest that lists them.
    expected = {"save_file": [2, 2, 4, 4, 6, 6], "_replace": [2, 2, 2, 4, 4, 4, 6, 6, 6]}[name]
    if (name, after) == ("_replace", True):
        expected = [*expected[1:], 7]
    assert lengths == expected


def expect_no_leftovers(store):
    named = {path for shard in store.shards for path in store._paths(shard["name"])}
    assert set((store.folder / "shards").iterdir()) == named
    assert {path.name for path in store.folder.iterdir()} <= {"manifest.json", "shards", ".lock"}


@points
def test_a_kill_while_making_a_store_leaves_none_or_an_empty_one(
    make, monkeypatch, tmp_path, name, after
):
    for number in range(2):
        undo = kill_at(monkeypatch, files, name, number, after)
        try:
            make(RECORDS[:2], name=f"store{number}")
        except Killed:
            pass
        finally:
            undo()
        store = make(RECORDS[:2], name=f"store{number}")
        assert len(store) == len(load(store)) == 2
        expect_no_leftovers(store)


KILLS = """
import os, random, signal, sys
from pathlib import Path

sys.path.insert(0, {tests!r})
from conftest import _tiny_model
from kvlab import knowledge, lab
from test_knowledge import BAG, MORE, RECORDS

knowledge.SHARD_ITEMS, rng = 1, random.Random(0)
model, tokenizer = _tiny_model(vocab_size=1536), lab.load_tokenizer("lab-draft")
killed = 0
for number in range(6):
    folder, wait = Path(sys.argv[1]) / str(number), rng.randrange(1, 30) if number else 0
    if not (child := os.fork()):
        knowledge.KnowledgeCache.build(folder, [*RECORDS, *MORE], model, tokenizer, BAG)
        os._exit(0)
    while (end := os.waitpid(child, os.WNOHANG)) == (0, 0):  # until there are so many files, whole or not
        try:
            if folder.exists() and len(list(folder.rglob("*"))) > wait:
                os.kill(child, signal.SIGKILL)
        except FileNotFoundError:  # one was renamed meanwhile
            pass
    killed += os.WIFSIGNALED(end[1])
assert killed
"""


def in_python(*command, timeout=200):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_real_kill_at_any_moment(tmp_path, model, tokenizer):
    script, records = tmp_path / "kills.py", [*RECORDS, *MORE]
    script.write_text(KILLS.format(tests=str(ROOT / "tests")))
    in_python(script, tmp_path)
    for number in range(6):
        folder = tmp_path / str(number)
        if (folder / "manifest.json").exists():
            left = KnowledgeCache.load(folder, model, tokenizer, BAG)
            assert [item.question for item in left.items] == [
                r["question"] for r in records[: len(left)]
            ]
            assert all(left.read(item).cache is not None for item in left.items)
        store = KnowledgeCache.build(folder, records, model, tokenizer, BAG)
        assert [item.question for item in load(store).items] == [r["question"] for r in records]
        expect_no_leftovers(store)


def test_one_adds_and_others_read(store):
    other = load(store)
    before = listing(store.folder)
    with FileLock(store.folder / ".lock", timeout=0):
        with pytest.raises(
            CacheError, match=f"Another writer is adding to {store.folder}: wait for it"
        ):
            other.add(MORE)
        reader = load(store)
        assert reader.retrieve("Where does Anna live?")[0].item.answer == "Rome"
        assert reader.read(reader.items[-1]).cache is not None
        assert listing(store.folder) == before
    assert other.add(MORE) == len(MORE)


def test_two_that_add_in_turn_lose_nothing(store):
    other = load(store)
    assert other.add(MORE[:3]) == 3
    assert store.add(MORE) == 3  # three are there
    assert other.add([]) == 0
    records = [*RECORDS, *MORE]
    for each in (store, other, load(store)):
        assert [item.question for item in each.items] == [r["question"] for r in records]
        assert len(each.embeddings) == len(records)
        assert each.retrieve("What is number 5?")[0].item.answer == "It is 25."
    assert same_tensors(store, other)


def test_a_store_that_was_made_again_is_taken_up_as_it_is(store, make):
    old = load(store)
    shutil.rmtree(store.folder)
    new = make(MORE)
    assert old.add(RECORDS[:1]) == 1
    assert [item.question for item in old.items] == [r["question"] for r in [*MORE, RECORDS[0]]]
    assert same_tensors(old, load(new))


def test_meeting_another_damaged_shard_leaves_a_store_as_it_was(store):
    other, items = load(store), list(store.items)
    other.add(MORE)
    path = index_of(other, other.items[-1])
    content = path.read_bytes()
    flip(path)
    with pytest.raises(CacheError, match="or its index is missing or damaged"):
        store.add([RECORDS[0]])
    assert store.items == items
    assert len(store.embeddings) == len(items)
    path.write_bytes(content)
    assert store.add(RECORDS) == 0
    assert same_tensors(store, load(other))


TWO = """
import sys

sys.path.insert(0, {tests!r})
from conftest import _tiny_model
from kvlab import knowledge, lab
from test_knowledge import BAG, MORE, RECORDS


def main(folder):
    model, tokenizer = _tiny_model(vocab_size=1536), lab.load_tokenizer("lab-draft")
    before, knowledge.SHARD_ITEMS = knowledge.SHARD_ITEMS, 3
    store = knowledge.KnowledgeCache.build(folder, [*RECORDS, *MORE], model, tokenizer, BAG, keep=("kv", "hidden"))
    assert store.add(MORE) == 0
    assert store.add(MORE[:4], generate=True, max_new_tokens=4) == 4
    knowledge.SHARD_ITEMS = before
    assert len(store) == len(store.embeddings) == 17
    return store


if __name__ == "__main__":
    main(sys.argv[1])
"""


def test_two_processes_make_the_store_of_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO.format(tests=str(ROOT / "tests")))
    in_python(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        tmp_path / "two",
    )
    one = runpy.run_path(str(script), run_name="alone")["main"](tmp_path / "one")
    two = KnowledgeCache.load(tmp_path / "two", one.model, one.tokenizer, BAG)
    assert (
        [s["items"] for s in two.shards]
        == [s["items"] for s in one.shards]
        == [3, 3, 3, 3, 1, 3, 1]
    )
    assert shown(two.items) == shown(one.items)
    torch.testing.assert_close(two.embeddings, one.embeddings)
    for a, b in zip(two.items, one.items, strict=True):
        torch.testing.assert_close(two._tensors(a), one._tensors(b), rtol=0, atol=1e-6)
    expect_no_leftovers(two)


# the lab's own


def test_the_faq_finds_itself(tmp_path, tokenizer):
    model, embedder, faq = lab.load("lab-draft"), lab.load_embedder(), lab.faq()
    KnowledgeCache.build(tmp_path / "faq", faq, model, tokenizer, embedder)
    store = KnowledgeCache.load(tmp_path / "faq", model, tokenizer, embedder)
    assert [item.id for item in store.items] == [record["id"] for record in faq]
    for item in store.items:
        hit = store.retrieve(item.question)[0]
        assert hit.item is item
        assert store.retrieve(item.question, domain=item.domain)[0].item is item
        assert tokenizer.decode(item.input_ids[item.answer_start :]) == f" {item.answer}<|end|>"
    asked = [(record["id"], text) for record in faq for text in record["paraphrases"][:2]]
    right = [
        [hit.item.id for hit in store.retrieve(text, threshold=-1)] == [id] for id, text in asked
    ]
    assert np.mean(right) > 0.95


# what a first reader tried


def test_what_is_not_a_stores_own_is_never_deleted(make, tmp_path):
    folder = tmp_path / "store"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards/model-00001.safetensors").write_bytes(b"precious")
    with pytest.raises(CacheError, match=r"holds \['shards'\] and no store"):
        make()
    store = make(name="other")
    for name in ("shards/backup.safetensors", "shards/.notes.part", "notes.txt"):
        (store.folder / name).write_bytes(b"precious")
    before = listing(store.folder)
    store.add(MORE)
    after = listing(store.folder)
    del before["manifest.json"]
    assert all(after[name] == content for name, content in before.items())


def test_a_model_that_was_trained_after_loading_is_refused_before_anything_is_added(make):
    store = make()
    store.model = copy.deepcopy(store.model)
    store.model.model.layers[0].mlp.up_proj.weight.data += 0.1
    before = listing(store.folder)
    with pytest.raises(CacheError, match=r"model has changed since it opened .*weights sha256"):
        store.add(MORE)
    assert listing(store.folder) == before


class Odd:
    """An embedder that does what another should not."""

    def __init__(self, change):
        self.change = change

    def encode(self, sentences, **options):
        return self.change(BAG.encode(sentences, **options))


def test_vectors_need_not_be_tensors_or_of_unit_length(make):
    want = make(name="want")
    for number, change in enumerate((lambda v: 7 * v, lambda v: v.numpy(), lambda v: v.tolist())):
        store = make(name=str(number), embedder=Odd(change))
        assert torch.allclose(store.embeddings, want.embeddings)
        hit = store.retrieve("Where does she live?", threshold=-1)[0]
        assert hit.score == pytest.approx(
            want.retrieve("Where does she live?", threshold=-1)[0].score
        )


@pytest.mark.parametrize(
    "change", [lambda v: v[:0], lambda v: v[0], lambda v: v / 0], ids=["rows", "flat", "nan"]
)
def test_vectors_that_do_not_fit_are_refused_before_anything_is_written(make, tmp_path, change):
    with pytest.raises(
        CacheError, match=r"The embedder \(Odd\) gave \(.*expected .* finite numbers"
    ):
        make(embedder=Odd(change))
    assert not (tmp_path / "store").exists()


def test_bad_records_leave_no_store_behind(make, tmp_path):
    for records in ([{"question": "Why?"}], [*RECORDS, {"question": "Why?", "answer": 3}]):
        with pytest.raises(CacheError, match="'answer' = "):
            make(records)
    with pytest.raises(CacheError, match="Two items have the id"):
        make([RECORDS[-1], RECORDS[0] | {"id": "why"}])
    with pytest.raises(CacheError, match="max_new_tokens is 0"):
        make(generate=True, max_new_tokens=0)
    assert not (tmp_path / "store").exists()


def test_items_and_hits_can_be_spliced(make):
    store = make()
    item = store.items[0]
    hit = store.retrieve(item.question)[0]
    for found in (item, hit):
        assert list(store.splice([found]).input_ids) == list(item.input_ids)
    assert list(store) == store.items
    assert store[item.id] == item


def test_a_relative_folder_stays_where_it_was(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = make()
    store = KnowledgeCache.load("store", made.model, made.tokenizer, BAG)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store.read(store.items[0]).cache is not None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(KnowledgeCache.load("~/store", made.model, made.tokenizer, BAG)) == len(RECORDS)


# what a template opens every conversation with


@pytest.mark.parametrize("opening", ["", "<|system|>", "<|system|> Be brief."])
def test_spliced_items_and_a_question_are_one_conversation(make, tokenizer, opening):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = opening + CHAT_TEMPLATE
    store = make(tokenizer=tokenizer)
    items, turns = store.items[:3], []
    for item in items:
        turns += [
            {"role": "user", "content": item.question},
            {"role": "assistant", "content": item.answer},
        ]
    turns.append({"role": "user", "content": "And now?"})
    whole = encode(tokenizer, turns)
    assert len(tokenizer(opening).input_ids) == store._opening
    for arm in ARMS:
        prefix = store.splice(items, arm)
        assert [*prefix.input_ids, *store.prompt("And now?")] == whole
        assert prefix.cache.get_seq_length() == prefix.next_position == len(prefix.input_ids)
    exact = prefill(store.model, prefix.input_ids).cache
    near(store.splice(items, "prefix").cache, exact, 1e-5)
    near(store.splice(items, "recompute", fraction=1.0).cache, exact, 1e-4)


def test_spliced_items_without_a_template_are_lines(make, tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    store = make(tokenizer=plain)
    turns = []
    for item in store.items[:3]:
        turns += [
            {"role": "user", "content": item.question},
            {"role": "assistant", "content": item.answer},
        ]
    turns.append({"role": "user", "content": "And now?"})
    ids = [*store.splice(store.items[:3], "full").input_ids, *store.prompt("And now?")]
    assert plain.decode(ids) == rendered(plain, turns)


@pytest.mark.parametrize("ending", ["<|end|>", "<|end|>\n"])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_generated_answers_are_closed_turns(make, model, tokenizer, ending, count):
    """Whether cut off or ended, by whichever end token, an item can be followed by a turn."""
    tokenizer, other = copy.deepcopy(tokenizer), 3
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", ending)
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = [1, other]
    closed = tokenizer(ending, add_special_tokens=False).input_ids
    records = [{"question": record["question"]} for record in RECORDS]
    store = make(records, model=model, tokenizer=tokenizer, generate=True, max_new_tokens=count)
    prompts = [list(item.input_ids[: item.answer_start]) for item in store.items]
    answers = continuations(model, tokenizer, prompts, count)
    for item, answer in zip(store.items, answers, strict=True):
        text = answer[:-1] if answer[-1] in (1, other) else answer
        assert list(item.input_ids[item.answer_start :]) == [*text, *closed]


def test_a_later_item_is_moved_as_if_its_opening_were_not_there(make, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "<|system|> Be brief." + CHAT_TEMPLATE
    store = make(tokenizer=tokenizer)
    first, second = store.items[:2]
    start, begin = store._opening, len(first.input_ids)
    alone = kv.shift(store.read(second).cache, begin - start, rotary_of(store.model))
    spliced = store.splice([first, second], "shift").cache
    for got, want in zip(spliced.layers, alone.layers, strict=True):
        torch.testing.assert_close(
            got.keys[:, :, begin:], want.keys[:, :, start:], rtol=0, atol=1e-5
        )
        assert torch.equal(got.values[:, :, begin:], want.values[:, :, start:])


def test_a_template_whose_first_turn_has_a_form_of_its_own_has_no_opening(make, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.first %}<|system|>{% endif %}{{ m.content }}."
    )
    tokenizer.chat_template += "{% if loop.first %} First.{% endif %}{% endfor %}<|assistant|>"
    assert make([], tokenizer=tokenizer)._opening == 0


# compressed items


def halved(model):
    """Keeps the first half of a text's entries and its last one: positions have a gap."""

    def compress(input_ids):
        count = input_ids.shape[1]
        positions = torch.tensor([[*range(count // 2), count - 1]])
        prefix = kv.prefill(model, input_ids)
        cache = kv.select(prefix.cache, positions)
        return dataclasses.replace(prefix, cache=cache, positions=positions)

    return compress


def test_a_compressed_item_is_kept_with_fewer_entries_and_where_they_stand(make, model):
    store, whole = make(compress=halved(model)), make(name="whole")
    for item in load(store):
        piece, expected = load(store).read(item), halved(model)(torch.tensor([item.input_ids]))
        near(piece.cache, expected.cache, 1e-5)
        assert piece.positions.tolist() == expected.positions.tolist()
        assert (
            item.kept
            == piece.positions.shape[1]
            < len(piece.input_ids)
            == len(whole[item.id].input_ids)
        )
    sizes = [s.summary().loc["all", "size (MB)"] * 1e6 for s in (store, whole)]
    kept, tokens = sum(i.kept for i in store), sum(len(i.input_ids) for i in store)
    assert sizes[0] / sizes[1] == pytest.approx(kept / tokens)
    assert (
        data_of(store, store.items[0]).stat().st_size
        < data_of(whole, whole.items[0]).stat().st_size
    )
    assert not any(item.kept for item in whole)


@pytest.mark.parametrize("arm", ["prefix", "concat", "shift"])
def test_a_single_compressed_item_is_continued_at_the_length_of_its_text(make, model, arm):
    store = make(compress=halved(model))
    item = store.items[1]
    prefix, expected = (store.splice([item], arm), halved(model)(torch.tensor([item.input_ids])))
    near(prefix.cache, expected.cache, 1e-5)
    assert prefix.next_position == len(item.input_ids)


def test_compressed_items_behind_one_another_stand_where_their_texts_would(make, model):
    store, rotary = make(compress=halved(model)), rotary_of(model)
    one, two = store.items[:2]
    start = len(one.input_ids)
    parts = [halved(model)(torch.tensor([i.input_ids])).cache for i in (one, two)]
    prefix = store.splice([one, two], "shift")
    near(prefix.cache, kv.join(parts[0], kv.shift(parts[1], start, rotary)), 1e-4)
    assert prefix.next_position == start + len(two.input_ids)
    read_anew = store.splice([one, two], "prefix")
    near(
        read_anew.cache,
        kv.prefill(model, torch.tensor([two.input_ids]), kv.Prefix(parts[0], start)).cache,
        1e-4,
    )


def test_what_opens_a_conversation_is_left_out_of_later_compressed_items(make, model, monkeypatch):
    store = make(compress=halved(model))
    monkeypatch.setitem(vars(store), "_opening", 2)
    one, two = store.items[:2]
    kept = load(store).read(two).positions[0]
    prefix = store.splice([one, two], "shift")
    assert kv.length(prefix.cache) == one.kept + int((kept >= 2).sum())
    assert prefix.next_position == len(one.input_ids) + len(two.input_ids) - 2


def test_an_export_of_compressed_items_is_the_same(make, model, tmp_path):
    store = make(compress=halved(model))
    copied = store.export(tmp_path / "copy")
    assert same_tensors(store, copied)
    assert [i.kept for i in copied] == [i.kept for i in store]


@pytest.mark.parametrize("scope", ["model", "layer", "head"])
def test_items_whose_heads_keep_entries_of_their_own(make, model, scope):
    way = functools.partial(evict, model, score=key_norm, retention=0.4, scope=scope)
    store, whole = make(compress=way), make(name="whole")
    text = torch.tensor([store.prompt("Who?")])
    expected = []
    for item in load(store):
        prefix, alone = load(store).read(item), way(torch.tensor([item.input_ids]))
        assert torch.equal(prefix.positions, alone.positions)
        logits = [kv.prefill(model, text, p).logits for p in (prefix, alone)]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
        expected.append(alone.cache)
    path, whole_path = data_of(store, store.items[0]), data_of(whole, whole.items[0])
    assert path.stat().st_size < 0.6 * whole_path.stat().st_size
    one, two = store.items[:2]
    start = len(one.input_ids)
    prefix = store.splice([one, two], "shift")
    cache = kv.join(expected[0], kv.shift(expected[1], start, rotary_of(model)))
    joined = kv.Prefix(cache, start + len(two.input_ids))
    logits = [kv.prefill(model, text, p).logits for p in (prefix, joined)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    for arm in ("recompute", "gradual", "legolink"):
        with pytest.raises(CacheError, match="Evicted entries cannot be recomputed"):
            store.splice([one, two], arm)


def test_the_opening_is_left_out_of_items_whose_heads_keep_entries_of_their_own(
    make, model, monkeypatch
):
    way = functools.partial(evict, model, score=key_norm, retention=0.4, scope="model")
    store = make(compress=way)
    monkeypatch.setitem(vars(store), "_opening", 2)
    one, two = store.items[:2]
    kept = [way(torch.tensor([item.input_ids])).positions for item in (one, two)]
    prefix = store.splice([one, two], "shift")
    entries = sum(int((bias_of(layer) == 0).sum()) for layer in prefix.cache.layers)
    assert entries == (kept[0] >= 0).sum() + (kept[1] >= 2).sum()
    assert prefix.next_position == len(one.input_ids) + len(two.input_ids) - 2


def test_a_store_keeps_no_bias(make, model):
    def biased(ids):
        prefix = evict(model, ids, key_norm, retention=0.4, scope="model")
        cache = prefix.cache
        cache.layers[0].bias = cache.layers[0].bias + 0.5
        return dataclasses.replace(prefix, cache=cache)

    with pytest.raises(CacheError, match="Entries have a bias, which a store does not keep"):
        make(compress=biased)


def test_what_cannot_be_done_with_compressed_items_is_a_sentence(make, model, tmp_path):
    store, first = make(compress=halved(model)), halved(model)
    with pytest.raises(CacheError, match=r"Evicted entries cannot be recomputed: use 'shift'"):
        store.splice(store.items[:2], "recompute")
    by_head = lambda ids: dataclasses.replace(first(ids), positions=torch.zeros(2, 1, 2, 3))
    with pytest.raises(
        CacheError, match=r"positions, next \(\(2, 1, 2, 3\), .*expected \(\(\d, 1, "
    ):
        make(name="by_head", compress=by_head)
    moved = lambda ids: dataclasses.replace(first(ids), next_position=3)
    with pytest.raises(CacheError, match=r"compress returned positions, next \(.*, 3\): expected"):
        make(name="moved", compress=moved)
    draft = KnowledgeDraft.cut(model, "first:1", knowledge="kv")
    with pytest.raises(ValueError, match="Drafts do not read compressed caches"):
        draft.read(store, store.items[0])


# a check before a splice is trusted


@pytest.fixture(scope="module")
def pieces(tokenizer):
    """A trained model, what it read, and a question with its answer."""
    model = lab.load("lab-target")
    texts = ["Anna lives in Rome.", " Ben has a dog.", " Carl lives in Oslo.", " Dora is a baker."]
    question = "<|user|> Where does Carl live?<|assistant|> Oslo<|end|>"
    read = [prefill(model, ids) for ids in tokenizer(texts).input_ids]
    return model, read, tokenizer(question).input_ids


def change(pieces, change_cache):
    """The pieces with the caches of all but the first changed."""
    later = [dataclasses.replace(p, cache=change_cache(p.cache)) for p in pieces[1:]]
    return [pieces[0], *later]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probe", [True, False])
def test_a_check_tells_right_splices_from_wrong_positions_and_wrong_caches(pieces, probe, dtype):
    model, read, question = pieces
    model = copy.deepcopy(model).to(dtype)
    read = [prefill(model, piece.input_ids) for piece in read]
    run = functools.partial(knowledge.check, model, probe_ids=question if probe else None)
    assert [run(read, arm).verdict for arm in ("full", "prefix")] == ["trust", "trust"]
    right = {arm: run(read, arm) for arm in ("shift", "recompute", "gradual", "legolink")}
    assert max(result.error for result in right.values()) < 0.004
    assert right["shift"].verdict == "recompute"  # right, but short texts depend on each other
    assert right["recompute"].kl < right["shift"].kl
    rotary = rotary_of(model)
    wrong = [change(read, lambda cache, by=by: kv.shift(cache, by, rotary)) for by in (1, -1, 50)]
    wrong.append(change(read, lambda cache: kv.from_tensor(kv.to_tensor(cache).roll(1, -1))))
    wrong.append(change(read, lambda cache: kv.from_tensor(kv.to_tensor(cache) * 3)))
    for prefixes, arm in itertools.product(wrong, ("shift", "recompute")):
        assert run(prefixes, arm).verdict == "reject"
    assert run(read, "concat").verdict == "reject"
    rolled = kv.from_tensor(kv.to_tensor(read[0].cache).roll(1, -1))
    first = [dataclasses.replace(read[0], cache=rolled), *read[1:]]
    assert run(first, "prefix").verdict == "reject"
    nan = change(read, lambda cache: kv.from_tensor(kv.to_tensor(cache) * float("nan")))
    assert run(nan, "shift").verdict == "reject"


@every_family
@every_rope
@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "concat"])
def test_the_error_of_a_right_splice_is_zero_and_its_price_is_a_plain_loops(
    tiny_model, family, rope, arm
):
    model, probe = tiny_model(family, rope, torch.float64), IDS[21:]
    prefixes = prefill_each(model)
    result = knowledge.check(model, prefixes, arm, probe_ids=probe)
    assert result.error < 1e-6
    spliced, price, same = splice(model, prefixes, arm), 0.0, 0
    for end in range(1, len(probe) + 1):
        ids = torch.tensor([probe[:end]])
        p = prefill(model, FLAT + probe[:end]).logits[0].log_softmax(-1)
        q = kv.prefill(model, ids, spliced).logits[0].log_softmax(-1)
        price += (p.exp() * (p - q)).sum().item() / len(probe)
        same += (p.argmax() == q.argmax()).item() / len(probe)
    assert result.kl == pytest.approx(price, abs=1e-5)
    assert result.agreement == pytest.approx(same)


def test_what_cannot_be_checked_is_a_sentence(tiny_model):
    model = tiny_model()
    prefixes = prefill_each(model)
    small = dataclasses.replace(prefixes[1], cache=kv.truncate(prefixes[1].cache, 2))
    with pytest.raises(CacheError, match="A piece is compressed, so it is not its text"):
        knowledge.check(model, [prefixes[0], small], "shift")
    with pytest.raises(CacheError, match="261 tokens with the probe, the model reads up to 256"):
        knowledge.check(model, prefixes, probe_ids=IDS[:24] * 10)
