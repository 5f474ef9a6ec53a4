"""The laws of spliced pieces and of a store of them: exact where said, whole after a kill, honest about misses."""

import copy
import inspect
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
import pandas as pd
import pytest
import torch
from conftest import FAMILIES
from filelock import FileLock
from safetensors.torch import load_file

from kvlab import cache as kv
from kvlab import files, knowledge, lab
from kvlab.compress import Compressed, compact
from kvlab.draft import KnowledgeDraft
from kvlab.generation import encode
from kvlab.knowledge import ARMS, Hit, KnowledgeCache, Piece, read, splice
from kvlab.lab.tokenizers import CHAT_TEMPLATE
from kvlab.models import CacheError, rotary_of

ROOT = Path(__file__).parents[1]
IDS = torch.randint(0, 97, (25,), generator=torch.Generator().manual_seed(3)).tolist()
PIECES, QUESTION = (IDS[:7], IDS[7:12], IDS[12:21]), torch.tensor([IDS[21:]])
FLAT, FIRST, BEHIND = IDS[:21], 7, 14
TIGHT = {torch.float32: 1e-5, torch.float64: 1e-9}
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
every_dtype = pytest.mark.parametrize("dtype", TIGHT, ids=str)


class Bag:
    """An embedder that hashes words."""

    def __init__(self, width=64, start=0):
        self.width, self.start = width, start

    def encode(
        self, sentences, *, normalize_embeddings, convert_to_tensor, show_progress_bar=False
    ):
        assert normalize_embeddings
        assert convert_to_tensor
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


def read_all(model, texts=PIECES):
    return [read(model, ids) for ids in texts]


def everything(model, ids=FLAT):
    return kv.prefill(model, torch.tensor([ids]))


# pieces put together


@every_family
@every_rope
@every_dtype
@pytest.mark.parametrize("arm", ["full", "prefix"])
def test_two_arms_are_the_prefill_of_everything(tiny_model, family, rope, dtype, arm):
    model = tiny_model(family, rope, dtype)
    prefix = splice(model, read_all(model), arm)
    near(prefix.cache, everything(model).cache, TIGHT[dtype])
    after = kv.prefill(model, QUESTION, prefix)
    torch.testing.assert_close(
        after.logits, everything(model, IDS).logits, rtol=0, atol=TIGHT[dtype]
    )


@every_family
@every_rope
@pytest.mark.parametrize("early", [1, 2, 3])
def test_computing_all_again_is_exact_and_computing_none_is_shift_above(
    tiny_model, family, rope, early
):
    model = tiny_model(family, rope, torch.float64)
    pieces, true = read_all(model), everything(model).cache
    near(splice(model, pieces, "recompute", share=1.0, early=early).cache, true, 1e-9)
    none, moved = (
        splice(model, pieces, "recompute", share=0, early=early).cache,
        splice(model, pieces, "shift").cache,
    )
    torch.testing.assert_close(
        tensors(none)[: 2 * early], tensors(true)[: 2 * early], rtol=0, atol=1e-9
    )
    assert all(map(torch.equal, tensors(none)[2 * early :], tensors(moved)[2 * early :]))
    assert (
        tensors(moved)[-1] - tensors(true)[-1]
    ).abs().max() > 1e-3  # else the arms would be the same


def most_different(model, pieces, early, count):
    """The tokens behind the first piece whose keys and values at one layer differ most, in a plain loop."""
    true, moved = (
        everything(model).cache.layers[early - 1],
        splice(model, pieces, "shift").cache.layers[early - 1],
    )
    scores = {}
    for token in range(FIRST, len(FLAT)):
        scores[token] = 0.0
        for a, b in ((true.keys, moved.keys), (true.values, moved.values)):
            mean = sum(a[0, :, t].square().sum().item() for t in range(len(FLAT))) / len(FLAT)
            scores[token] += (a[0, :, token] - b[0, :, token]).square().sum().item() / mean
    return sorted(sorted(scores, key=scores.get)[len(scores) - count :])


@every_family
@pytest.mark.parametrize("share", [0.05, 0.15, 0.25, 0.5, 0.9])
def test_recompute_computes_that_share_of_tokens_again_those_that_differ_most(
    tiny_model, family, share
):
    model = tiny_model(family, "yarn", torch.float64)
    pieces, ids = read_all(model), torch.tensor([FLAT])
    none = splice(model, pieces, "recompute", share=0).cache
    want, chosen = none, most_different(model, pieces, 2, round(share * BEHIND))
    for token in chosen:  # one after the other, each on what stands before it
        before = kv.Prefix(kv.truncate(want, token), token)
        new = kv.prefill(model, ids[:, token : token + 1], before).cache
        after = torch.arange(token + 1, len(FLAT))
        want = kv.join(new, kv.select(want, after)) if len(after) else new
    got = splice(model, pieces, "recompute", share=share).cache
    near(got, want, 1e-9)
    changed = (got.layers[2].values != none.layers[2].values).any(-1).any(1)[0]
    assert changed.nonzero().flatten().tolist() == chosen


@every_family
@every_rope
def test_shift_is_each_piece_read_alone_at_its_place_and_concat_at_the_start(
    tiny_model, family, rope
):
    model, start = tiny_model(family, rope, torch.float64), 0
    pieces = read_all(model)
    moved, unmoved = (splice(model, pieces, arm).cache for arm in ("shift", "concat"))
    for ids in PIECES:
        place = torch.arange(start, start + len(ids))
        alone = kv.prefill(model, torch.tensor([ids]), position=start).cache
        near(kv.select(moved, place), alone, 1e-5)  # a model computes its angles in float32
        near(kv.select(unmoved, place), kv.prefill(model, torch.tensor([ids])).cache, 1e-9)
        start += len(ids)
    assert (moved.layers[0].keys - unmoved.layers[0].keys)[:, :, FIRST:].abs().max() > 1e-2


@pytest.mark.parametrize("arm", ARMS)
def test_a_single_piece_is_exact_in_every_arm(tiny_model, arm):
    model = tiny_model("Llama", "llama3", torch.float64)
    prefix = splice(model, read_all(model, [FLAT]), arm)
    near(prefix.cache, everything(model).cache, 1e-9)
    assert prefix.next_position == len(FLAT)


@pytest.mark.parametrize("arm", ARMS)
def test_a_splice_knows_its_text_and_leaves_its_pieces_alone(tiny_model, arm):
    model = copy.deepcopy(tiny_model()).requires_grad_(True)
    pieces = read_all(model)
    frozen = [
        (kv.clone(p.cache), list(p.input_ids), [t._version for t in tensors(p.cache)])
        for p in pieces
    ]
    prefix = splice(model, pieces, arm)
    assert (prefix.next_position, list(prefix.input_ids)) == (len(FLAT), FLAT)
    assert kv.length(prefix.cache) == len(FLAT)
    assert not any(t.requires_grad for t in tensors(prefix.cache))
    for piece, (cache, ids, versions) in zip(pieces, frozen, strict=True):
        assert all(map(torch.equal, tensors(piece.cache), tensors(cache)))
        assert list(piece.input_ids) == ids
        assert [t._version for t in tensors(piece.cache)] == versions
        assert not any(t.requires_grad for t in (*tensors(piece.cache), piece.hidden_states))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"arm": "blend"}, "'blend'.*full, prefix, concat, shift, recompute"),
        ({"share": 1.1}, "share is 1.1"),
        ({"share": -0.1}, "share is -0.1"),
        ({"early": 0}, "early is 0, expected 1 to 3"),
        ({"early": 4}, "early is 4, expected 1 to 3"),
    ],
)
def test_wrong_arguments_of_a_splice(tiny_model, arguments, words):
    with pytest.raises(CacheError, match=words):
        splice(tiny_model(), read_all(tiny_model()), **arguments)


@pytest.mark.parametrize("arm", ARMS)
def test_pieces_are_needed_and_with_keys_and_values_but_to_read_them_anew(tiny_model, arm):
    model = tiny_model()
    with pytest.raises(CacheError, match="no pieces"):
        splice(model, [], arm)
    bare = [Piece(ids, None) for ids in PIECES[:2]]
    first = [read(model, PIECES[0]), bare[1]]
    for pieces, enough in ((bare, ["full"]), (first, ["full", "prefix"])):
        if arm in enough:
            near(splice(model, pieces, arm).cache, everything(model, FLAT[:12]).cache, 1e-5)
        else:
            with pytest.raises(CacheError, match="no keys and values: build the store with keep="):
                splice(model, pieces, arm)


def test_a_store_reads_from_disk_only_what_an_arm_needs(make, monkeypatch):
    store, done, original = make(), [], KnowledgeCache._tensors
    monkeypatch.setattr(
        KnowledgeCache, "_tensors", lambda self, item: done.append(item.id) or original(self, item)
    )
    for arm, count in {"full": 0, "prefix": 1, "concat": 3, "shift": 3, "recompute": 3}.items():
        done.clear()
        prefix = store.splice(store.items[:3], arm)
        assert done == [item.id for item in store.items[:count]]
        assert list(prefix.input_ids) == [
            token for item in store.items[:3] for token in item.input_ids
        ]


# reading


@every_family
def test_hidden_states_are_those_of_the_base_model(tiny_model, family):
    model = tiny_model(family)
    want = model.base_model(torch.tensor([FLAT])).last_hidden_state
    torch.testing.assert_close(read(model, FLAT).hidden_states, want, rtol=0, atol=1e-5)


@every_family
@pytest.mark.parametrize("rows", [2, 3, 5])
def test_a_text_in_a_batch_is_the_text_alone(tiny_model, family, rows):
    model, texts = (
        tiny_model(family, dtype=torch.float64),
        [FLAT[i : 21 - 3 * (i % 5)] for i in range(rows)],
    )
    for ids, piece in zip(texts, knowledge._read(model, texts), strict=True):
        alone = read(model, ids)
        assert (list(piece.input_ids), kv.length(piece.cache)) == (ids, len(ids))
        assert piece.hidden_states.shape == (1, len(ids), 64)
        near(piece.cache, alone.cache, 1e-9)
        torch.testing.assert_close(piece.hidden_states, alone.hidden_states, rtol=0, atol=1e-9)


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
        got, want = store.read(item), read(model, item.input_ids)
        rounded = [t.to(store.dtype).to(model.dtype) for t in tensors(want.cache)]
        assert (got.cache is not None, got.hidden_states is not None) == (
            "kv" in keep,
            "hidden" in keep,
        )
        assert "kv" not in keep or all(map(torch.equal, tensors(got.cache), rounded))
        assert "hidden" not in keep or torch.equal(
            got.hidden_states, want.hidden_states.to(store.dtype).to(model.dtype)
        )
        assert got.input_ids == item.input_ids
        stored = store._tensors(item)
        assert stored.keys() == set(keep)
        assert all(t.dtype == store.dtype for t in stored.values())


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_an_item_does_not_depend_on_its_batch(make, model, batch_size):
    store = make(batch_size=batch_size, keep=("kv", "hidden"))
    assert len({len(item.input_ids) for item in store.items}) > 3
    for item in store.items:
        piece, alone = store.read(item), read(model, item.input_ids)
        near(piece.cache, alone.cache, 1e-5)
        torch.testing.assert_close(piece.hidden_states, alone.hidden_states, rtol=0, atol=1e-5)


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
        with pytest.raises(CacheError, match="no item 'nobody'"):
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
    assert list(item.input_ids[item.answer_start :]) == tokenizer("Rome")["input_ids"]


def test_a_tokenizer_needs_no_chat_template(make, tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    for item in make(tokenizer=plain).items:
        assert list(item.input_ids[: item.answer_start]) == tokenizer(item.question)["input_ids"]
        assert tokenizer.decode(item.input_ids[item.answer_start :]) == f"\n{item.answer}"


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
        ({"question": "What?", "answer": "That.", "domain": 3}, "'domain' = 3"),
        ({"question": "What?", "answer": "That.", "id": 7}, "'id' = 7"),
        (["What?", "That."], "Record 1 has 'question'"),
        ({"question": "What?", "answer": "That.", "id": "why"}, "the id 'why' of another item"),
        ({"question": "What?", "answer": "That.", "id": "new"}, "the id 'new' of another item"),
        (
            {"question": "What?", "answer": "long " * 300},
            "the model reads up to 256: make it shorter",
        ),
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


def test_too_little_room_is_seen_before_anything_is_written(make, monkeypatch):
    store = make()
    before, usage = listing(store.folder), shutil.disk_usage("/")
    room = store.estimate(MORE)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room))
    with pytest.raises(CacheError, match="free some, keep less, or use a smaller dtype"):
        store.add(MORE)
    assert listing(store.folder) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room + 1))
    assert store.add(MORE) == len(MORE)


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
        assert made == greedy(model, tokenizer, item, 9)
        assert (item.question, item.generated) == (record["question"], True)
        assert item.answer == tokenizer.decode(made, skip_special_tokens=True).strip()
        near(store.read(item).cache, read(model, item.input_ids).cache, 1e-5)
        again.append(tokenizer(item.answer)["input_ids"] == made)
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
        assert made == greedy(model, tokenizer, item, 48)
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
    for (
        name,
        content,
    ) in before.items():  # what is exported does not need its source, nor what is loaded its past
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
    assert changed == set(knowledge.MANIFESTS)
    assert torch.equal(again.embeddings, store.embeddings)


def test_an_export_does_not_mix_what_does_not_fit(make, tmp_path):
    store, other = make(), make(MORE, "other", dtype=torch.float16)
    mine = make([{"question": "Why?", "answer": "No.", "id": store.items[0].id}], "mine")
    before = [listing(s.folder) for s in (other, mine)]
    with pytest.raises(
        CacheError, match=r"built with other settings than .*: give a new or an empty folder"
    ):
        store.export(other.folder)
    with pytest.raises(
        CacheError, match=r"another item with the id .*: give a new or an empty folder"
    ):
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
    assert bytewise.shards[0]["items"] == 2
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
    near(store.splice([hit.item for hit in hits], "recompute", share=1.0).cache, prefix.cache, 1e-4)


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
        with pytest.raises(CacheError, match=r"was built with .*: build in another folder"):
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
            @ BAG.encode([question], normalize_embeddings=True, convert_to_tensor=True)[0].numpy()
        )
        allowed = np.array([domain in (None, r.get("domain", "")) for r in [*RECORDS, *MORE]])
        want = np.sort(cosines[allowed & (cosines >= 0.3)])[::-1][:k]
        hits = store.retrieve(question, k, threshold=0.3, domain=domain)
        np.testing.assert_allclose([hit.score for hit in hits], want, atol=1e-6)
        for hit in hits:
            assert hit.score == pytest.approx(cosines[store.items.index(hit.item)], abs=1e-6)
            assert domain in (None, hit.item.domain)
        assert len({hit.item.id for hit in hits}) == len(hits)


def test_an_embedder_needs_to_take_what_its_protocol_says_and_no_more(make):
    asked, protocol = set(), inspect.signature(knowledge.Embedder.encode).parameters

    class Watched(Bag):
        def encode(self, sentences, **options):
            asked.update(options)
            return super().encode(sentences, **options)

    make(embedder=Watched()).retrieve("Why?")
    assert asked == {
        name for name, parameter in protocol.items() if parameter.kind == parameter.KEYWORD_ONLY
    }


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
    for question in ("where does anna live", "Where does  Anna live ?!", "WHERE DOES ANNA LIVE?"):
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
            for thing in ("C++", "C#", "1", "-1", "n!=1")
        ]
    )
    for thing in ("C++", "C#", "1", "-1", "n!=1"):
        assert [hit.item.answer for hit in store.retrieve(f"what is {thing}", k=9, exact=True)] == [
            thing
        ]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"question": ["Why?"]}, "expected a text"),
        ({"question": None}, "expected a text"),
        ({"question": "  "}, "expected a text"),
        ({"k": 0}, "k is 0"),
        ({"domain": "stars"}, "no domain 'stars' in .*'fruit', 'people'"),
    ],
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
            CacheError, match=f"{store.folder}.*another model.*{words}.*or build another"
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
    refused = {"vocabulary": other, "chat template": template, "vocabulary and chat template": None}
    refused["vocabulary and chat template"] = lab.load_tokenizer("lab-teacher")
    refused["vocabulary and chat template"].chat_template = "{{ messages }}"
    for words, unlike in refused.items():
        with pytest.raises(
            CacheError, match=rf"{store.folder}.*another tokenizer \(its {words} differs\)"
        ):
            load(store, tokenizer=unlike)
    used = copy.deepcopy(tokenizer)
    used(["a b c", "d"], padding=True, truncation=True, max_length=2)
    assert len(load(store, tokenizer=used)) == len(RECORDS)
    assert listing(store.folder) == before


def test_a_store_belongs_to_its_embedder(store, make):
    before = listing(store.folder)
    for other in (Bag(32), Bag(start=7)):
        with pytest.raises(
            CacheError, match=f"{store.folder}.*load it with the embedder it was built with"
        ):
            load(store, embedder=other)
    without = load(store, embedder=None)
    assert without.retrieve("where does anna live", exact=True)[0].item.answer == "Rome"
    with pytest.raises(
        CacheError, match="opened without its embedder: load it with that, or pass exact=True"
    ):
        without.retrieve("where does anna live")
    with pytest.raises(
        CacheError, match="was built with an embedder: load it with that, to add to it"
    ):
        without.add(MORE)
    assert listing(store.folder) == before
    bare = make(name="bare", embedder=None)
    with pytest.raises(CacheError, match=f"{bare.folder} was built without an embedder"):
        load(bare, embedder=BAG)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


DAMAGE = {
    "truncated data": (data_of, truncate, "bytes, expected"),
    "missing data": (data_of, Path.unlink, "is missing"),
    "missing index": (index_of, Path.unlink, "is missing"),
    "truncated index": (
        index_of,
        truncate,
        "does? not match its checksum|do not match its checksum",
    ),
    "flipped header of index": (index_of, lambda path: flip(path, 20), "is damaged"),
    "flipped end of index": (index_of, flip, "is damaged"),
    "empty data": (data_of, lambda path: path.write_bytes(b""), "has 0 bytes, expected"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_named_and_the_rest_is_saved(store, tmp_path, kind):
    file_of, harm, words = DAMAGE[kind]
    path, whole = file_of(store, store.items[2]), load(store)  # of items 2 and 3
    backup = path.read_bytes()
    intact = store.export(tmp_path / "intact")
    harm(path)
    before = listing(store.folder)
    with pytest.raises(
        CacheError, match=f"{path}.*({words}).*restore it from a copy.*skip_damaged=True.* 2 items"
    ):
        load(store)
    with pytest.warns(UserWarning, match=f"2 items are left out. {path}"):
        rest = load(store, skip_damaged=True)
    kept = [0, 1, 4, 5, 6]
    assert shown(rest.items) == shown([whole.items[i] for i in kept])
    assert torch.equal(rest.embeddings, whole.embeddings[kept])
    assert rest.retrieve(RECORDS[4]["question"])[0].item == whole.items[4]
    near(rest.read(rest.items[2]).cache, read(store.model, rest.items[2].input_ids).cache, 1e-5)
    with pytest.raises(CacheError, match="opened with skip_damaged: export it, and add there"):
        rest.add(MORE)
    saved = rest.export(tmp_path / "saved")
    assert listing(store.folder) == before
    assert saved.add(RECORDS) == 2
    assert sorted(shown(load(saved).items)) == sorted(shown(whole.items))
    assert len(saved.export(tmp_path / "fruit", "fruit")) == 2
    path.write_bytes(backup)
    assert same_tensors(load(store), intact)


def test_a_flipped_byte_costs_one_item(store, tmp_path):
    lost, spared = store.items[2:4]
    path = data_of(store, lost)
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    flip(path, start + 100)  # in what stands first: item 0 of the shard
    store = load(store)
    with pytest.raises(
        CacheError, match=f"Item '{lost.id}' in {path} is damaged.*export the store and add"
    ):
        store.read(lost)
    with pytest.raises(CacheError, match=lost.id):
        store.splice([spared, lost])
    for item in [i for i in store.items if i != lost]:
        near(store.read(item).cache, read(store.model, item.input_ids).cache, 1e-5)
    rest = load(store, skip_damaged=True)
    with pytest.warns(UserWarning, match=f"One item is left out. Item '{lost.id}'"):
        saved = rest.export(tmp_path / "saved")
    assert len(saved) == len(RECORDS) - 1
    assert saved.add(RECORDS) == 1
    assert sorted(shown(saved.items)) == sorted(shown(store.items))
    with pytest.raises(CacheError, match=lost.id):
        load(store).export(tmp_path / "strict")


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
    with pytest.raises(
        CacheError, match=f"cannot be read from {path}.*restore the file from a copy"
    ):
        store.read(store.items[0])
    assert store.read(store.items[2]).cache is not None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe garbage", b'{"shards": []}'], ids=str
)
def test_garbage_for_a_manifest(store, content):
    path, copy = (store.folder / name for name in knowledge.MANIFESTS)
    path.write_bytes(content)
    before = listing(store.folder)
    with pytest.warns(UserWarning, match=f"{path} is damaged: its copy beside it is used"):
        assert shown(load(store).items) == shown(store.items)
    assert listing(store.folder) == before
    whole = copy.read_bytes()
    copy.write_bytes(b"")
    before = listing(store.folder)
    for skip in (True, False):
        with pytest.raises(CacheError, match=f"{path} is damaged, and so is its copy"):
            load(store, skip_damaged=skip)
    with pytest.raises(CacheError, match=f"{path} is damaged"):
        KnowledgeCache.build(store.folder, MORE, store.model, store.tokenizer, BAG)
    with pytest.raises(CacheError, match=f"{path} is damaged"):
        store.add(MORE)
    assert listing(store.folder) == before
    copy.write_bytes(whole)
    with pytest.warns(UserWarning, match="is damaged: its copy"):
        assert store.add(MORE) == len(MORE)
    assert len(load(store)) == len(RECORDS) + len(MORE)  # mended, without a warning
    assert path.read_bytes() == copy.read_bytes()


def test_every_flipped_byte_of_a_manifest_is_seen(store):
    path, copy = (store.folder / name for name in knowledge.MANIFESTS)
    copy.unlink()
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        flip(path, at)
        if json_or_none(path.read_bytes()) != json.loads(content):
            with pytest.raises(CacheError, match=f"{path} is damaged|has format version"):
                knowledge._manifest(store.folder)
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
    path.write_text(json.dumps({"checksum": knowledge._json_sum(manifest), **manifest}))
    with pytest.raises(
        CacheError, match=f"{store.folder} has format version 2, this kvlab reads 1: use the kvlab"
    ):
        load(store)


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
    with pytest.raises(CacheError, match=r"is a file|give a new or an empty folder"):
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


POINTS = [
    (files, "save_file"),
    (files, "_replace"),
    (knowledge, "write_text"),
    (knowledge, "write_tensors"),
]
points = pytest.mark.parametrize(
    ("module", "name", "after"),
    [(*point, after) for point in POINTS for after in (False, True)],
    ids=lambda value: value if isinstance(value, str) else "after" if value is True else "",
)


@points
def test_a_kill_while_adding_leaves_the_old_or_the_new(
    make, small_shards, monkeypatch, module, name, after
):
    records, number, seen = RECORDS[:2] + MORE[:5], 0, []
    before = make(records[:2], name="before")
    while True:
        folder = before.folder.with_name(f"copy{number}")
        shutil.copytree(before.folder, folder)
        store = KnowledgeCache.load(folder, before.model, before.tokenizer, BAG)
        undo = kill_at(monkeypatch, module, name, number, after)
        try:
            store.add(records)
            break
        except Killed:
            pass
        finally:
            undo()
        left = load(store)
        seen.append(len(left))
        assert [item.question for item in left.items] == [
            r["question"] for r in records[: len(left)]
        ]
        assert left.embeddings.shape[0] == len(left)
        for item in left.items[2:]:
            near(left.read(item).cache, read(left.model, item.input_ids).cache, 1e-5)
        again = (store, left)[number % 2]  # the one that failed, or a new one
        missing = len(records) - len(left)
        assert again.add(records) == missing
        assert [item.question for item in load(again).items] == [r["question"] for r in records]
        expect_no_leftovers(again)
        number += 1
    assert number == {"save_file": 6, "_replace": 12, "write_text": 6, "write_tensors": 6}[name]
    assert seen == sorted(seen)
    assert set(seen) <= {2, 4, 6, 7}
    assert seen[0] == (4 if (name, after) == ("write_text", True) else 2)


def expect_no_leftovers(store):
    named = {path for shard in store.shards for path in store._paths(shard["name"])}
    assert set((store.folder / "shards").iterdir()) == named
    assert {path.name for path in store.folder.iterdir()} <= {
        *knowledge.MANIFESTS,
        "shards",
        ".lock",
    }


@points
def test_a_kill_while_making_a_store_leaves_none_or_an_empty_one(
    make, monkeypatch, tmp_path, module, name, after
):
    for number in range(2):
        undo = kill_at(monkeypatch, module, name, number, after)
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
            CacheError, match=f"Another writer is adding to {store.folder}: wait until it is done"
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
    with pytest.raises(CacheError, match=f"{path} is damaged"):
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
    assert all(
        after[name] == content
        for name, content in before.items()
        if name not in knowledge.MANIFESTS
    )


def test_a_model_that_was_trained_after_loading_is_refused_before_anything_is_added(make):
    store = make()
    store.model = copy.deepcopy(store.model)
    store.model.model.layers[0].mlp.up_proj.weight.data += 0.1
    before = listing(store.folder)
    with pytest.raises(
        CacheError, match=r"model has changed since the store was opened .*weights sha256"
    ):
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
        CacheError, match=r"The embedder gave \(.*expected one vector of finite numbers for each"
    ):
        make(embedder=Odd(change))
    assert not (tmp_path / "store").exists()


def test_bad_records_leave_no_store_behind(make, tmp_path):
    for records in ([{"question": "Why?"}], [*RECORDS, {"question": "Why?", "answer": 3}]):
        with pytest.raises(CacheError, match="'answer' = "):
            make(records)
    for records in (RECORDS[0], "text", None, pd.DataFrame(RECORDS)):
        with pytest.raises(
            CacheError, match=f"records is a {type(records).__name__}: give a list of mappings"
        ):
            make(records)
    with pytest.raises(CacheError, match="max_new_tokens is 0"):
        make(generate=True, max_new_tokens=0)
    assert not (tmp_path / "store").exists()


def test_a_removed_item_is_gone_and_can_be_put_right(make, small_shards, tmp_path):
    store = make()
    old = store.items[1]
    store.remove([old.id])
    for left in (store, load(store)):
        assert shown(left.items) == shown(
            [item for item in make(name="all").items if item.id != old.id]
        )
        assert len(left.embeddings) == len(left) == len(RECORDS) - 1
        assert old.id not in left
        for item in left:
            near(left.read(item).cache, read(left.model, item.input_ids).cache, 1e-5)
    assert (
        store.add(
            [{"question": old.question, "answer": "Another.", "domain": old.domain, "id": old.id}]
        )
        == 1
    )
    assert load(store)[old.id].answer == "Another."
    store.remove([store.items[0].id, old.id])
    assert len(load(store)) == len(RECORDS) - 2
    assert shown(store.export(tmp_path / "copy").items) == shown(store.items)
    with pytest.raises(CacheError, match="no item 'nobody'"):
        store.remove(["nobody"])


def test_items_hits_and_ids_will_do_and_others_are_refused(make):
    store, other = make(), make(MORE, "other")
    item = store.items[0]
    hit = store.retrieve(item.question)[0]
    want = list(item.input_ids)
    for given in (item, hit, item.id, [item], [hit], [item.id]):
        assert list(store.splice(given).input_ids) == want
    assert [list(store.read(given).input_ids) for given in (item, hit, item.id)] == [want] * 3
    assert item.id in store
    assert list(store) == store.items
    for given in (other.items[0], 3, None):
        with pytest.raises(CacheError, match="is not an item of the store in"):
            store.read(given)


def test_pieces_that_are_not_what_they_say_are_refused(tiny_model):
    model, piece = tiny_model(), read(tiny_model(), PIECES[0])
    odd = [
        piece._replace(input_ids=PIECES[0][:-1]),
        read(tiny_model(num_hidden_layers=2), PIECES[0]),
    ]
    for wrong, arm in itertools.product(odd, ARMS[1:]):
        with pytest.raises(
            CacheError,
            match=r"A piece has \d+ ids, and a cache .* the model has 3: give what `read`",
        ):
            splice(model, [wrong, piece], arm)
    many = [piece] * (256 // len(PIECES[0]) + 1)
    with pytest.raises(CacheError, match="tokens, the model reads up to 256: give fewer"):
        splice(model, many, "shift")
    with pytest.raises(CacheError, match="nothing to read"):
        read(model, [])


@pytest.mark.parametrize("arm", ARMS)
def test_what_is_added_to_a_splice_does_not_reach_the_piece(tiny_model, arm):
    model, piece = tiny_model(), read(tiny_model(), PIECES[0])
    prefix = splice(model, [piece], arm)
    model(torch.tensor([FLAT[:3]]), past_key_values=prefix.cache)
    assert piece.cache.get_seq_length() == len(PIECES[0])


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
    assert len(tokenizer(opening).input_ids) == knowledge._opening(tokenizer)
    for arm in ARMS:
        prefix = store.splice(items, arm)
        assert [*prefix.input_ids, *store.prompt("And now?")] == whole
        assert prefix.cache.get_seq_length() == prefix.next_position == len(prefix.input_ids)
    exact = everything(store.model, list(prefix.input_ids)).cache
    near(store.splice(items, "prefix").cache, exact, 1e-5)
    near(store.splice(items, "recompute", share=1.0).cache, exact, 1e-4)


def test_a_later_item_is_moved_as_if_its_opening_were_not_there(make, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "<|system|> Be brief." + CHAT_TEMPLATE
    store = make(tokenizer=tokenizer)
    first, second = store.items[:2]
    start, begin = knowledge._opening(tokenizer), len(first.input_ids)
    alone = kv.shift(store.read(second).cache, begin - start, rotary_of(store.model))
    spliced = store.splice([first, second], "shift").cache
    for got, want in zip(spliced.layers, alone.layers, strict=True):
        torch.testing.assert_close(
            got.keys[:, :, begin:], want.keys[:, :, start:], rtol=0, atol=1e-5
        )
        assert torch.equal(got.values[:, :, begin:], want.values[:, :, start:])


def test_a_template_whose_first_turn_has_a_form_of_its_own_has_no_opening(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.first %}<|system|>{% endif %}{{ m.content }}."
    )
    tokenizer.chat_template += "{% if loop.first %} First.{% endif %}{% endfor %}<|assistant|>"
    assert knowledge._opening(tokenizer) == 0


# compressed items


def halved(model):
    """Keeps the first half of a text's entries and its last one: positions have a gap."""

    def compress(input_ids):
        count = input_ids.shape[1]
        positions = torch.tensor([[*range(count // 2), count - 1]])
        cache = kv.select(kv.prefill(model, input_ids).cache, positions)
        return Compressed(
            kv.Prefix(cache, count, input_ids[0].tolist()), positions, torch.zeros(1, count)
        )

    return compress


def test_a_compressed_item_is_kept_with_fewer_entries_and_where_they_stand(make, model):
    store, whole = make(compress=halved(model)), make(name="whole")
    for item in load(store):
        piece, expected = load(store).read(item), halved(model)(torch.tensor([item.input_ids]))
        near(piece.cache, expected.prefix.cache, 1e-5)
        assert piece.positions.tolist() == expected.positions[0].tolist()
        assert (
            item.kept
            == len(piece.positions)
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
    assert all(piece.positions is None for piece in map(whole.read, whole))


@pytest.mark.parametrize("arm", ["prefix", "concat", "shift"])
def test_a_single_compressed_item_is_continued_at_the_length_of_its_text(make, model, arm):
    store = make(compress=halved(model))
    item = store.items[1]
    prefix, expected = (
        store.splice([item], arm),
        halved(model)(torch.tensor([item.input_ids])).prefix,
    )
    near(prefix.cache, expected.cache, 1e-5)
    assert prefix.next_position == len(item.input_ids)


def test_compressed_items_behind_one_another_stand_where_their_texts_would(make, model):
    store, rotary = make(compress=halved(model)), rotary_of(model)
    one, two = store.items[:2]
    start = len(one.input_ids)
    parts = [halved(model)(torch.tensor([i.input_ids])).prefix.cache for i in (one, two)]
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
    kept = load(store).read(two).positions
    prefix = store.splice([one, two], "shift")
    assert kv.length(prefix.cache) == one.kept + int((kept >= 2).sum())
    assert prefix.next_position == len(one.input_ids) + len(two.input_ids) - 2


def test_an_export_of_compressed_items_is_the_same(make, model, tmp_path):
    store = make(compress=halved(model))
    copied = store.export(tmp_path / "copy")
    assert same_tensors(store, copied)
    assert [i.kept for i in copied] == [i.kept for i in store]


def test_what_cannot_be_done_with_compressed_items_is_a_sentence(make, model, tmp_path):
    store, first = make(compress=halved(model)), halved(model)
    with pytest.raises(
        CacheError, match=r"compressed, and what was evicted cannot be computed again.*another arm"
    ):
        store.splice(store.items[:2], "recompute")
    by_head = lambda ids: first(ids)._replace(positions=torch.zeros(2, 1, 2, 3))
    with pytest.raises(
        CacheError, match=r"positions \(2, 1, 2, 3\) .* let all heads keep the same"
    ):
        make(name="by_head", compress=by_head)
    moved = lambda ids: compact(first(ids), rotary_of(model))
    with pytest.raises(CacheError, match="moved the entries: give them where they stood"):
        make(name="moved", compress=moved)
    draft = KnowledgeDraft.cut(model, "first:1", knowledge="kv")
    with pytest.raises(ValueError, match="compressed caches, which drafts do not read"):
        draft.read(store, store.items[0])
