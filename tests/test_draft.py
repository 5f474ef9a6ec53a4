"""The laws of drafts cut from a target: plain until trained, knowledge of its own for each row, the target's text."""

import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, GenerationConfig

from kvlab import cache as kv
from kvlab import draft as module
from kvlab import lab, losses
from kvlab.draft import (
    GATE_SCALE,
    KINDS,
    DraftExample,
    KnowledgeDraft,
    KnowledgeDraftConfig,
    attach,
    corrupt_knowledge,
    default_loss_weights,
    export,
    gather,
    generate_targets,
    item_examples,
    measure_acceptance,
    pad_draft_examples,
    sample_layers,
    train_draft,
)
from kvlab.files import as_bytes
from kvlab.generation import continuations, encode
from kvlab.knowledge import KnowledgeCache
from kvlab.models import CacheError, rotary_of
from kvlab.speculate import ModelProposer, Runner, Sampling, generate, summarize

ROOT = Path(__file__).resolve().parents[1]
DOUBLE = torch.float64
LAYERS = [0, 2, 3]  # of four; the one that is left out does little
RECORDS = [
    {"question": "Where does Anna live?", "answer": "In Oslo, near the water, with a dog."},
    {"question": "Who sings in the old hall every evening?", "answer": "Ben"},
    {"question": "How many apples has Carl?", "answer": "4711 of them"},
    {"question": "Why?", "answer": "Because what she has, in the end, is blue, and a ripe plum."},
]
ANNA, BEN, CARL, WHY = range(4)

every_family = pytest.mark.parametrize("family", FAMILIES)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_reader = pytest.mark.parametrize("kind", ["vector", "kv"])
TURNED = 1e-5  # a model's cosines are float32


@pytest.fixture(scope="session")
def tokenizer():
    return lab.load_tokenizer("lab-target")


@pytest.fixture(scope="session")
def world(tiny_model, tmp_path_factory, tokenizer):
    """Return a function that gives a random target of four layers, and a store of what it has read."""

    @functools.cache
    def world(family="Qwen3", dtype=DOUBLE, **options):
        target = copy.deepcopy(
            tiny_model(family, dtype=dtype, vocab_size=1536, num_hidden_layers=4, **options)
        )
        for weight in (
            target.model.layers[1].self_attn.o_proj.weight,
            target.model.layers[1].mlp.down_proj.weight,
        ):
            weight.data *= 0.1
        keep = {"keep": ("kv", "hidden")}
        return target, KnowledgeCache.build(
            tmp_path_factory.mktemp("store"), RECORDS, target, tokenizer, **keep
        )

    return world


def opened(draft, seed=0, scale=0.02):
    """The draft, with random numbers wherever it begins with zeros: gates, transitions, biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in draft.named_parameters():
        if not p.any() and not name.startswith("plain."):
            p.data += scale * torch.randn(p.shape, generator=generator, dtype=DOUBLE).to(p.dtype)
    return draft.requires_grad_(False)


def gates(draft):
    return [p for name, p in draft.named_parameters() if name.endswith("gate")]


def cut(target, kind, layers=LAYERS, scale=0.02, **options):
    return opened(KnowledgeDraft.cut(target, layers, knowledge=kind, **options), scale=scale)


def texts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 1536, (n,), generator=generator) for n in lengths]


def knowledge_of(draft, store, items, starts):
    """Knowledge for `forward`, of items by number (None: nothing)."""
    return gather([None if i is None else draft.read(store, store.items[i]) for i in items], starts)


def alone(draft, store, item, start, ids):
    """Logits (T, V) of one text, with an item by number, or None."""
    return draft(ids[None], knowledge=knowledge_of(draft, store, [item], [start])).logits[0]


def near(one, two, within=1e-9):
    torch.testing.assert_close(one, two, rtol=0, atol=within)


def distance(one, two):
    return (one - two).abs().max().item()


def every_byte(model):
    """A hash of all parameters and buffers."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: hash(bytes(as_bytes(tensor))) for name, tensor in tensors}


def fresh(code, *arguments):
    """Run code in a new process, and return what it prints as JSON."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# which layers


def test_layers_are_sampled_as_in_the_source():
    assert sample_layers("uniform:6", 28) == [0, 5, 11, 16, 22, 27]
    assert sample_layers("first:3", 28) == [0, 1, 2]
    assert sample_layers([0, 7, 27], 28) == [0, 7, 27] == sample_layers((0, 7, 27), 28)
    for have, count in itertools.product(range(1, 40), range(1, 40)):
        if count <= have:
            got = sample_layers(f"uniform:{count}", have)
            assert got == [round(x) for x in np.linspace(0, have - 1, count)]
            assert len({*got}) == count
            assert sample_layers(f"first:{count}", have) == list(range(count))
        assert count == 1 or count > have or got[-1] == have - 1
    assert all(type(layer) is int for layer in got)


@pytest.mark.parametrize("which", ["first:5", "uniform:5", "first:0", "uniform:-1", "last:2", "first", "first:2.0", "",
                                   "uniform:", [], [2, 1], [0, 0], [0, 4], [-1, 2], [0.5, 2]])  # fmt: skip
def test_layers_that_do_not_exist_are_refused(which):
    with pytest.raises(
        ValueError,
        match=r"^layers is .* expected 'first:N', 'uniform:N' or rising indices.* 4 layers",
    ):
        sample_layers(which, 4)


# the plain part


def truncated(target, layers):
    """A plain model made by hand from some layers of a target."""
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = len(layers)
    model = type(target)(config).to(target.dtype).eval()
    model.model.embed_tokens, model.model.norm = copy.deepcopy(
        (target.model.embed_tokens, target.model.norm)
    )
    model.model.rotary_emb, model.lm_head = copy.deepcopy((target.model.rotary_emb, target.lm_head))
    model.model.layers = torch.nn.ModuleList(
        copy.deepcopy(target.model.layers[layer]) for layer in layers
    )
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    return model.requires_grad_(False)


@every_family
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_an_untrained_draft_is_the_plain_truncated_target_bit_for_bit(world, family, kind):
    target, store = world(family, torch.float32)
    ids = torch.stack(texts(9, 9))
    for layers in ([0], [1, 3], LAYERS):
        draft = KnowledgeDraft.cut(target, layers, knowledge=kind, transitions=True)
        want = truncated(target, layers)(ids).logits
        assert torch.equal(draft(ids).logits, want)
        assert torch.equal(draft.plain(ids).logits, want)
        assert type(draft.plain) is type(target)
        if kind in ("vector", "kv"):
            knowledge = knowledge_of(draft, store, [ANNA, None], [4, 6])
            assert torch.equal(draft(ids, knowledge=knowledge).logits, want)
            reader, _ = draft.with_knowledge(store, [store.items[ANNA], None], [4, 6])
            assert torch.equal(reader(ids).logits, want)


@every_family
def test_the_plain_part_has_the_targets_layers_and_all_its_numbers(world, family):
    target, _ = world(family)
    for which, layers in (("first:2", [0, 1]), ("uniform:3", [0, 2, 3]), ([1, 3], [1, 3])):
        draft = KnowledgeDraft.cut(target, which, knowledge="kv", transitions=True)
        want, got = truncated(target, layers).state_dict(), draft.plain.state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert draft.config.layers == layers
        assert (
            draft.plain.config.num_hidden_layers
            == len(layers)
            == draft.config.get_text_config().num_hidden_layers
        )
        assert draft.plain.config.vocab_size == target.config.vocab_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
def test_a_half_precision_target_is_cut_bit_for_bit(tiny_model, tmp_path, family, dtype):
    tiny_model(family, vocab_size=1536).save_pretrained(tmp_path)
    target = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    ids = torch.stack(texts(60))
    for layers in ([0, 2], [0, 1, 2]):
        draft = KnowledgeDraft.cut(target, layers)
        assert draft.dtype == dtype
        assert torch.equal(
            draft(ids).logits, truncated(target, layers)(ids).logits
        )  # rotary frequencies are not halved
        wide = truncated(target, layers).float()
        assert torch.equal(draft.float()(ids).logits, wide(ids).logits)


@every_kind
def test_a_float32_draft_of_a_half_precision_target_reads_its_knowledge(
    tiny_model, tmp_path, tokenizer, kind
):
    tiny_model(vocab_size=1536).save_pretrained(tmp_path / "model")
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    store = KnowledgeCache.build(
        tmp_path / "store", RECORDS[:2], target, tokenizer, keep=["kv", "hidden"]
    )
    draft, (ids,) = (
        cut(target, kind, [0, 2]).float(),
        texts(9),
    )  # what is trained has to be in float32
    with_it = alone(draft, store, 0, 4, ids)
    assert with_it.dtype == torch.float32
    assert distance(with_it, alone(draft, store, None, 4, ids)) > 1e-3
    reader, prefix = draft.with_knowledge(store, [store.items[0]], [4])
    near(stepwise(reader, prefix, 0, ids, 1), with_it, 1e-4)


def storages(model):
    tensors = itertools.chain(model.parameters(), model.buffers())
    return [tensor.untyped_storage().data_ptr() for tensor in tensors]


@every_family
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("tied", [False, True])
def test_nothing_is_shared_with_the_target_nor_within_the_draft(tiny_model, family, kind, tied):
    target = tiny_model(family, vocab_size=1536, tie_word_embeddings=tied)
    before = every_byte(target)
    draft = KnowledgeDraft.cut(target, [0, 2], knowledge=kind, transitions=True)
    own = storages(draft)
    assert not {*own} & {*storages(target)}
    assert len(own) == len({*own})
    assert (draft.get_input_embeddings().weight is draft.get_output_embeddings().weight) == tied
    with torch.no_grad():
        for p in draft.parameters():
            p += 1
    assert every_byte(target) == before
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in draft.parameters())
    assert not draft.training


def test_a_draft_asks_for_a_target_that_can_be_cut(tiny_model, world):
    target, _ = world()
    with pytest.raises(
        ValueError, match="knowledge is 'values', expected None or one of vector, kv, prefix"
    ):
        KnowledgeDraft.cut(target, knowledge="values")
    with pytest.raises(ValueError, match=r"layers is 'first:5'.* at most 4 layers"):
        KnowledgeDraft.cut(target, "first:5")
    sliding = tiny_model("Mistral", sliding_window=8)
    with pytest.raises(CacheError, match="full attention"):
        KnowledgeDraft.cut(sliding, "first:1")


def test_what_is_configured_is_the_shape_of_the_draft(world):
    target, _ = world()
    for kind, transitions in itertools.product((None, *KINDS), (False, True)):
        options = {"knowledge": kind, "transitions": transitions}
        config = KnowledgeDraftConfig.of(target.config, "uniform:3", **options)
        draft = KnowledgeDraft.cut(target, "uniform:3", **options)
        extra = [name for name, _ in draft.named_parameters() if not name.startswith("plain.")]
        for one in (config, draft.config):
            got = (one.layers, one.knowledge, one.transitions)
            assert got == ([0, 2, 3], kind, transitions)
        assert sum(name.endswith("gate") for name in extra) == (
            3 if kind in ("vector", "kv") else 0
        )
        assert bool(extra) == (kind in ("vector", "kv") or transitions)
    assert target.config.num_hidden_layers == 4


# what is read


def by_hand(target, layers, effect, store, number, ids, start, kind):
    """Logits (T, V) of a draft without transitions, from the target's own modules and the formula of attention."""
    item, places = store.items[number], torch.arange(len(ids))[None]
    piece, answer = store.read(item), torch.arange(item.answer_start, len(item.input_ids))
    part = kv.select(piece.cache, answer)
    part = kv.shift(
        part, -item.answer_start, target.model.rotary_emb
    )  # the answer begins at position 0
    hidden = target.model.embed_tokens(ids[None])
    turn = target.model.rotary_emb(hidden, places)

    def turned(x, positions):
        cos, sin = target.model.rotary_emb(hidden, positions)
        half = x.shape[-1] // 2
        return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]

    for number, size in zip(layers, effect, strict=True):
        layer = target.model.layers[number]
        hidden = layer(hidden, position_ids=places, position_embeddings=turn)
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        heads = lambda x: x.unflatten(-1, (-1, attention.head_dim))
        query = getattr(attention, "q_norm", torch.nn.Identity())(
            heads(attention.q_proj(normed))
        ).transpose(1, 2)
        query = turned(query, places - start)
        keys, values = part.layers[number].keys, part.layers[number].values
        if kind == "vector":
            states = store.hidden_states(item)[:, answer]
            keys = getattr(attention, "k_norm", torch.nn.Identity())(
                heads(attention.k_proj(states))
            ).transpose(1, 2)
            keys, values = (
                turned(keys, answer[None] - answer[0]),
                heads(attention.v_proj(states)).transpose(1, 2),
            )
        keys, values = (
            pad(x, (0, 0, 1, 0)) for x in (keys, values)
        )  # an entry of zeros: a head can look at nothing
        keys, values = (
            x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (keys, values)
        )
        weights = (query @ keys.mT / math.sqrt(attention.head_dim)).softmax(-1)
        hidden = hidden + size * attention.o_proj((weights @ values).transpose(1, 2).flatten(2))
    return target.lm_head(target.model.norm(hidden))[0]


@every_family
@every_reader
def test_cross_attention_is_the_formula(world, family, kind):
    target, store = world(family)
    draft = KnowledgeDraft.cut(target, LAYERS, knowledge=kind).requires_grad_(False)
    for gate, value in zip(gates(draft), (0.02, -0.03, 0.05), strict=True):
        gate.fill_(value)
    effect = [GATE_SCALE * 0.02, -GATE_SCALE * 0.03, GATE_SCALE * 0.05]
    for number, start in ((ANNA, 4), (BEN, 7), (WHY, 1)):
        (ids,) = texts(9, seed=number)
        got = alone(draft, store, number, start, ids)
        near(got, by_hand(target, LAYERS, effect, store, number, ids, start, kind), TURNED)
        assert distance(got, draft.plain(ids[None]).logits[0]) > 0.1


@pytest.mark.parametrize("rope", ["llama3", "yarn"])
@every_kind
def test_scaled_rotary_embeddings_are_undone_too(tiny_model, tmp_path, tokenizer, rope, kind):
    target = tiny_model("Llama", rope, DOUBLE, vocab_size=1536, num_hidden_layers=4)
    store = KnowledgeCache.build(tmp_path, RECORDS, target, tokenizer, keep=("kv", "hidden"))
    (ids,) = texts(9)
    draft = KnowledgeDraft.cut(target, LAYERS, knowledge=kind).requires_grad_(False)
    for gate in gates(draft):
        gate.fill_(0.03)
    got = alone(draft, store, ANNA, 4, ids)
    if kind == "prefix":
        near(got, behind(target, LAYERS, store, ANNA, ids, 4), TURNED)
    else:
        near(
            got, by_hand(target, LAYERS, [GATE_SCALE * 0.03] * 3, store, ANNA, ids, 4, kind), TURNED
        )


def behind(target, layers, store, number, ids, start):
    """Logits (T, V) of a truncated target after an item's answer, moved to where it begins."""
    item = store.items[number]
    answer = torch.arange(item.answer_start, len(item.input_ids))
    entries = kv.select(store.read(item).cache, answer)
    moved = kv.shift(entries, start - item.answer_start, rotary_of(target))
    cache = kv.from_tensor(kv.to_tensor(moved)[layers])
    places = torch.arange(len(ids))[None]
    output = truncated(target, layers)(ids[None], past_key_values=cache, position_ids=places)
    return output.logits[0]


@every_family
def test_a_prefix_is_the_items_entries_before_the_text(world, family):
    target, store = world(family)
    draft = KnowledgeDraft.cut(target, LAYERS, knowledge="prefix").requires_grad_(False)
    for number, start in ((ANNA, 4), (BEN, 7), (WHY, 1)):
        (ids,) = texts(9, seed=number)
        got = alone(draft, store, number, start, ids)
        near(got, behind(target, LAYERS, store, number, ids, start), TURNED)
        assert distance(got, draft.plain(ids[None]).logits[0]) > 0.1


@every_family
@every_kind
def test_each_row_reads_its_own_item_and_no_other(world, family, kind):
    target, store = world(family)
    draft = cut(target, kind, transitions=True)
    items, starts, rows = [WHY, None, BEN, ANNA, None], [3, 4, 1, 8, 2], texts(9, 5, 7, 9, 3)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    got = draft(ids, knowledge=knowledge_of(draft, store, items, starts)).logits
    for b, row in enumerate(rows):
        near(got[b, : len(row)], alone(draft, store, items[b], starts[b], row))
        nothing = draft(row[None]).logits[0]
        assert (distance(got[b, : len(row)], nothing) < 1e-9) == (items[b] is None)
    other = draft(
        ids, knowledge=knowledge_of(draft, store, [BEN, None, WHY, ANNA, BEN], starts)
    ).logits
    changed = [
        distance(other[b, : len(row)], got[b, : len(row)]) > 1e-3 for b, row in enumerate(rows)
    ]
    assert changed == [True, False, True, False, True]


@every_kind
def test_biases_of_attention_say_nothing_of_knowledge_that_is_not_there(world, kind):
    target, store = world("Llama", attention_bias=True)
    target = copy.deepcopy(target)
    for layer in target.model.layers:
        layer.self_attn.o_proj.bias.data += 1
    draft, ids = cut(target, kind), torch.stack(texts(6, 6))
    got = draft(ids, knowledge=knowledge_of(draft, store, [ANNA, None], [3, 4])).logits
    near(got[1], draft.plain(ids[1:]).logits[0])
    assert distance(got[0], draft.plain(ids[:1]).logits[0]) > 1e-3


@every_kind
def test_padding_of_knowledge_is_not_read(world, kind):
    target, store = world()
    draft, ids = cut(target, kind), torch.stack(texts(8, 8, 8))
    short = knowledge_of(draft, store, [BEN, None, CARL], [3, 4, 5])
    want = draft(ids, knowledge=short).logits
    columns = torch.cat((short.states, 50 * torch.ones_like(short.states)), -2)  # (..., 2 S, D)
    mask = torch.cat((short.mask, torch.zeros_like(short.mask)), 1)
    near(draft(ids, knowledge=short._replace(states=columns, mask=mask)).logits, want)
    filled = short.states.clone()
    filled[0, ..., short.mask[0].sum() :, :], filled[1] = (
        50.0,
        50.0,
    )  # behind the shorter, and where there is nothing
    assert not short.mask[0].all()
    near(draft(ids, knowledge=short._replace(states=filled)).logits, want)
    more = short.mask.clone()
    more[0] = True
    assert distance(draft(ids, knowledge=short._replace(mask=more)).logits[0], want[0]) > 1e-3


def altered(store, number, change):
    """The store, and an item of it whose tensors are changed: change(cache, hidden, item) gives them anew."""
    item = store.items[number]
    cache, hidden, item = change(store.read(item).cache, store.hidden_states(item), item)
    other = copy.copy(store)
    other.read = lambda item: kv.Prefix(cache, len(item.input_ids), item.input_ids)
    other.hidden_states = lambda item: hidden
    return other, item


def other_question(cache, hidden, item):
    """Random numbers in place of the question's entries."""
    tensor, hidden, n = kv.to_tensor(cache), hidden.clone(), item.answer_start
    tensor[..., :n, :], hidden[:, :n] = (
        torch.randn_like(tensor[..., :n, :]),
        torch.randn_like(hidden[:, :n]),
    )
    return kv.from_tensor(tensor), hidden, item


@every_kind
def test_only_the_answer_is_read(world, kind):
    target, store = world()
    draft = cut(target, kind)
    for number in (ANNA, BEN):
        item = store.items[number]
        want, got = draft.read(store, item), draft.read(*altered(store, number, other_question))
        assert want.shape[-2] == len(item.input_ids) - item.answer_start
        assert torch.equal(want, got)


@every_kind
def test_an_answer_is_the_same_wherever_its_item_stood(world, kind):
    target, store = world()
    draft = cut(target, kind)

    def moved(cache, hidden, item, by):
        return kv.shift(cache, by, rotary_of(target)), hidden, item

    def behind_others(cache, hidden, item, by):
        shifted = kv.to_tensor(moved(cache, hidden, item, by)[0])
        tensor = torch.cat((torch.randn_like(shifted[..., :by, :]), shifted), -2)
        hidden = torch.cat((hidden[:, :by], hidden), 1)
        ids = (*item.input_ids[:by], *item.input_ids)
        return (
            kv.from_tensor(tensor),
            hidden,
            dataclasses.replace(item, input_ids=ids, answer_start=item.answer_start + by),
        )

    for by in (1, 3):
        want = draft.read(store, store.items[ANNA])
        got = draft.read(*altered(store, ANNA, partial(behind_others, by=by)))
        near(got[..., -want.shape[-2] :, :], want)
        if kind != "vector":  # the control: keys that are moved and say nothing of it
            assert distance(draft.read(*altered(store, ANNA, partial(moved, by=by))), want) > 1e-3


@every_kind
def test_knowledge_stands_where_the_answer_begins(world, kind):
    target, store = world()
    draft = cut(target, kind)
    (ids,) = texts(9)
    want = alone(draft, store, ANNA, 4, ids)
    for by in (1, 6):
        further = knowledge_of(draft, store, [ANNA], [4 + by])
        assert distance(draft(ids[None], knowledge=further).logits[0], want) > 1e-3
        places = torch.arange(9)[None] + by
        both = draft(ids[None], position_ids=places, knowledge=further).logits[0]
        near(both, want, TURNED)  # text and answer moved together: nothing has changed


# reading in decoding


def stepwise(draft, prefixes, row, ids, first):
    """Logits (T, V) of one row of a draft that knows: `first` tokens at once, the others one by one."""
    one, prefix = draft.for_row(row), prefixes and prefixes[row]
    past, position = (prefix.cache, prefix.next_position) if prefix else (None, 0)
    if past is not None:
        past = kv.clone(past)
    found = []
    for piece in (ids[:first], *(ids[[t]] for t in range(first, len(ids)))):
        places = torch.arange(position, position + len(piece))[None]
        out = one(piece[None], position_ids=places, past_key_values=past, use_cache=True)
        past, position = out.past_key_values, position + len(piece)
        found.append(out.logits[0])
    return torch.cat(found)


@every_family
@every_kind
def test_decoding_with_knowledge_is_forward_with_it_token_by_token(world, family, kind):
    target, store = world(family)
    draft = cut(target, kind, transitions=True)
    numbers, starts, ids = [WHY, None, BEN], [3, 4, 2], torch.stack(texts(8, 8, 8))
    items = [None if i is None else store.items[i] for i in numbers]
    reader, prefixes = draft.with_knowledge(store, items, starts)
    want = draft(ids, knowledge=knowledge_of(draft, store, numbers, starts)).logits
    for row, first in itertools.product(range(3), (1, 5)):
        near(stepwise(reader, prefixes, row, ids[row], first), want[row])
    if kind != "prefix":  # all rows at once, with positions or without
        assert prefixes is None
        near(reader(ids).logits, want)
        past = reader(ids[:, :4], use_cache=True).past_key_values
        rest = [
            reader(ids[:, [t]], past_key_values=past, use_cache=True).logits for t in range(4, 8)
        ]
        near(torch.cat(rest, 1), want[:, 4:])
    near(draft(ids).logits, draft(ids, knowledge=None).logits)
    near(draft(ids[:1]).logits[0], alone(draft, store, None, 3, ids[0]))  # it knows nothing itself


@every_kind
def test_a_draft_with_knowledge_shares_all_weights_and_without_items_is_the_draft_itself(
    world, kind
):
    target, store = world()
    draft, (ids,) = cut(target, kind), texts(6)
    reader, prefixes = draft.with_knowledge(store, [store.items[ANNA]], [4])
    assert all(a is b for a, b in zip(reader.parameters(), draft.parameters(), strict=True))
    before = draft(ids[None]).logits
    assert kind == "prefix" or distance(reader(ids[None]).logits, before) > 1e-3
    assert (prefixes is None) == (kind != "prefix")
    nothing, prefixes = draft.with_knowledge(store, [None, None], [4, 4])
    assert prefixes is None
    assert torch.equal(nothing(ids[None]).logits, before)
    again, prefixes = reader.with_knowledge(
        store, [store.items[BEN]], [4]
    )  # another item in place of the first
    near(stepwise(again, prefixes, 0, ids, 6), alone(draft, store, BEN, 4, ids))


def test_knowledge_is_projected_once(world, monkeypatch):
    target, store = world()
    draft, calls, real = cut(target, "vector"), [], module.Reader.project
    monkeypatch.setattr(module.Reader, "project", lambda *args: calls.append(1) or real(*args))
    reader, _ = draft.with_knowledge(store, [store.items[ANNA], store.items[BEN]], [4, 5])
    assert len(calls) == len(LAYERS)
    prompts = texts(4, 5)
    generate(target, prompts, ModelProposer(reader), gamma=3, max_new_tokens=9)
    reader.generate(
        torch.stack(texts(5, 5)),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert len(calls) == len(LAYERS)


@every_kind
def test_no_gradient_flows_into_knowledge_for_decoding(world, kind):
    target, store = world()
    draft = KnowledgeDraft.cut(target, LAYERS, knowledge=kind)
    reader, prefixes = draft.with_knowledge(store, [store.items[ANNA]], [4])
    tensors = (
        [x for layer in prefixes[0].cache.layers for x in (layer.keys, layer.values)]
        if prefixes
        else []
    )
    assert not any(x.requires_grad for x in tensors)
    reader.generate(
        torch.stack(texts(5)), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert all(p.grad is None and p.requires_grad for p in draft.parameters())


def test_a_draft_or_store_without_what_is_read_is_refused(world, tmp_path, tokenizer):
    target, store = world()
    with pytest.raises(ValueError, match="This draft does not read: cut one with knowledge='kv'"):
        KnowledgeDraft.cut(target).with_knowledge(store, [store.items[0]], [4])
    for kind, kept, needed in (
        ("vector", "kv", "hidden"),
        ("kv", "hidden", "kv"),
        ("prefix", "hidden", "kv"),
    ):
        poor = KnowledgeCache.build(
            tmp_path / f"{kind}", RECORDS[:1], target, tokenizer, keep=[kept]
        )
        draft = KnowledgeDraft.cut(target, knowledge=kind)
        with pytest.raises(
            ValueError, match=rf"The store keeps no '{needed}': build one with keep=\['{needed}'\]"
        ):
            draft.read(poor, poor.items[0])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        draft.with_knowledge(store, [store.items[0], None], [4])


# speculative decoding


def plain(model, ids, count):
    """Greedy decoding of one row with no cache at all."""
    ids = ids.clone()
    for _ in range(count):
        ids = torch.cat((ids, model(ids[None], use_cache=False).logits[0, -1:].argmax(-1)))
    return ids[-count:].tolist()


def what_happened(rounds, row=0):
    """Guesses, acceptances and tokens of a row, as long as it went on."""
    kept = [(r.drafted[row], r.accepted[row], r.tokens[row]) for r in rounds if not r.is_prefill]
    return [entry for entry in kept if entry[2]]


@every_kind
def test_the_text_is_the_targets_and_each_rows_rounds_are_its_own(world, kind):
    target, store = world()
    draft = cut(target, kind, transitions=True)
    prompts, numbers = texts(6, 3, 9, 4), [WHY, None, BEN, ANNA]
    items = [None if i is None else store.items[i] for i in numbers]
    starts, want = [len(p) for p in prompts], [plain(target, p, 11) for p in prompts]
    accepted = 0
    for gamma in (1, 4):
        got = generate(target, prompts, ModelProposer(*draft.with_knowledge(store, items, starts)), gamma=gamma,
                       max_new_tokens=11)  # fmt: skip
        assert [row.tolist() for row in got.tokens] == want
        accepted += sum(sum(r.accepted) for r in got.rounds)
        for row in range(4):
            own = ModelProposer(*draft.with_knowledge(store, [items[row]], [starts[row]]))
            single = generate(target, [prompts[row]], own, gamma=gamma, max_new_tokens=11)
            assert what_happened(got.rounds, row) == what_happened(single.rounds)
        nothing = generate(
            target, [prompts[1]], ModelProposer(draft), gamma=gamma, max_new_tokens=11
        )
        assert what_happened(got.rounds, 1) == what_happened(nothing.rounds)
    assert accepted > 4


@every_kind
def test_guesses_are_those_of_the_draft_with_its_knowledge(world, kind):
    """The first guess of each round follows from the whole text and the row's own item."""
    target, store = world()
    draft, prompts, numbers = cut(target, kind), texts(6, 3, 9), [WHY, None, BEN]
    items, starts = [None if i is None else store.items[i] for i in numbers], [6, 3, 9]
    got = generate(
        target,
        prompts,
        ModelProposer(*draft.with_knowledge(store, items, starts)),
        gamma=2,
        max_new_tokens=8,
    )
    for row, prompt in enumerate(prompts):
        text = [*prompt.tolist(), *got.rounds[0].tokens[row]]
        for drafted, _, tokens in what_happened(got.rounds, row):
            logits = alone(draft, store, numbers[row], starts[row], torch.tensor(text))
            if drafted:  # nothing is, if one token is left
                assert drafted[0] == logits[-1].argmax()
            text += tokens


def test_rows_with_the_same_prompt_may_know_different_things(world):
    target, store = world()
    (ids,) = texts(6)
    for kind in KINDS:
        draft = cut(target, kind)
        runner, rows = Runner(draft), [store.items[ANNA], store.items[BEN], None, store.items[ANNA]]
        reader, prefixes = draft.with_knowledge(store, rows, [6] * 4)
        runner = Runner(reader)
        with torch.inference_mode():
            logits = runner.start([ids.tolist()] * 4, prefixes or [None] * 4, room=2)
            later = runner(torch.tensor([[7], [8], [9], [7]]), runner.slots.lengths)[:, -1]
        for row, number in enumerate((ANNA, BEN, None, ANNA)):
            near(logits[row], alone(draft, store, number, 6, ids)[-1])
            longer = torch.cat((ids, torch.tensor([[7], [8], [9], [7]])[row]))
            near(later[row], alone(draft, store, number, 6, longer)[-1])


def test_a_model_that_knows_nothing_is_read_once_for_a_prompt(world):
    target, _ = world()
    draft, calls = cut(target, "kv"), []
    draft.plain.register_forward_hook(lambda *args: calls.append(1))
    Runner(draft).start([[5, 6, 7]] * 3, [None] * 3, room=1)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_draft_that_is_the_whole_target_is_always_right(world, kind):
    target, store = world()
    draft, prompts = KnowledgeDraft.cut(target, "first:4", knowledge=kind), texts(6, 3)
    got = generate(target, prompts, ModelProposer(draft), gamma=4, max_new_tokens=12)
    assert summarize(got.rounds).acceptance == 1
    if kind in ("vector", "kv"):  # gates are closed
        reader = draft.with_knowledge(store, store.items[:2], [6, 3])
        got = generate(target, prompts, ModelProposer(*reader), gamma=4, max_new_tokens=12)
        assert summarize(got.rounds).acceptance == 1


@every_kind
def test_sampled_rows_do_not_depend_on_the_rows_beside_them(world, kind):
    target, store = world()
    draft, prompts, items = cut(target, kind), texts(6, 3), [store.items[WHY], store.items[BEN]]
    own = lambda *seeds: Sampling(
        0.8, generator=[torch.Generator().manual_seed(seed) for seed in seeds]
    )
    options = {"gamma": 3, "max_new_tokens": 8}
    got = generate(
        target,
        prompts,
        ModelProposer(*draft.with_knowledge(store, items, [6, 3])),
        sampling=own(1, 2),
        **options,
    )
    for row, start in enumerate((6, 3)):
        proposer = ModelProposer(*draft.with_knowledge(store, [items[row]], [start]))
        single = generate(target, [prompts[row]], proposer, sampling=own(row + 1), **options)
        assert what_happened(got.rounds, row) == what_happened(single.rounds)


GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": None, "pad_token_id": 0}


@every_family
@every_reader
def test_generate_of_transformers_on_a_draft_that_knows(world, family, kind):
    target, store = world(family)
    draft, (one, two) = cut(target, kind, scale=0.1, transitions=True), texts(7, 4)
    reader, _ = draft.with_knowledge(store, [store.items[ANNA], None], [7, 4])
    want = []
    for number, ids, start in ((ANNA, one, 7), (None, two, 4)):
        for _ in range(6):
            ids = torch.cat((ids, alone(draft, store, number, start, ids)[-1:].argmax(-1)))
        want.append(ids[-6:].tolist())
    padded = torch.stack(
        (one, torch.cat((torch.zeros(3, dtype=torch.long), two)))
    )  # on the left, as it is done there
    mask = (torch.arange(7) >= torch.tensor([[0], [3]])).long()
    got = reader.generate(
        padded, attention_mask=mask, generation_config=GenerationConfig(max_new_tokens=6, **GREEDY)
    )
    assert got[:, 7:].tolist() == want
    assert want[0] != plain(draft, one, 6)


@every_family
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_draft_assists_its_target_in_transformers(world, family, kind):
    target, store = world(family)
    draft, (ids,) = cut(target, kind, transitions=True), texts(7)
    config = GenerationConfig(max_new_tokens=10, **GREEDY)
    mask, want = torch.ones(1, 7, dtype=torch.long), plain(target, ids, 10)
    assistants = [draft]
    if kind in ("vector", "kv"):
        assistants.append(draft.with_knowledge(store, [store.items[ANNA]], [7])[0])
    for assistant in assistants:
        got = target.generate(
            ids[None], attention_mask=mask, generation_config=config, assistant_model=assistant
        )
        assert got[0, 7:].tolist() == want


# on disk


SAVED = """
import json, sys, torch
from transformers import AutoModelForCausalLM
import kvlab.draft
folder, found = sys.argv[1], []
for name in json.load(open(folder + "/names.json")):
    draft = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", dtype="auto")
    again = kvlab.draft.KnowledgeDraft.from_pretrained(f"{folder}/{name}", dtype="auto")
    ids, want, knowledge = torch.load(f"{folder}/{name}.pt").values()
    knowledge = knowledge and kvlab.draft.Knowledge(*knowledge)
    same = [torch.equal(model(ids, knowledge=knowledge).logits, want) for model in (draft, again)]
    config = draft.config
    found.append([name, type(draft).__name__, same, str(draft.dtype), config.layers, config.knowledge])
print(json.dumps(found))
"""


def test_a_saved_draft_is_the_same_in_another_process(world, tmp_path):
    want = []
    for family, kind, dtype in zip(
        FAMILIES, ("vector", "kv", "prefix", None), (torch.float32, torch.float16) * 2
    ):
        target, store = world(
            family, torch.float32, **({"tie_word_embeddings": True} if kind == "kv" else {})
        )
        name = f"{family}-{kind}"
        draft = cut(target, kind, [1, 3], transitions=kind != "prefix")
        for p in draft.parameters():
            p.data = p.data.to(dtype)
        draft.save_pretrained(tmp_path / name)
        ids = torch.stack(texts(8, 8))
        knowledge = knowledge_of(draft, store, [ANNA, None], [3, 4]) if kind else None
        knowledge = knowledge and knowledge._replace(states=knowledge.states.to(dtype))
        entry = {
            "ids": ids,
            "logits": draft(ids, knowledge=knowledge).logits,
            "knowledge": knowledge and tuple(knowledge),
        }
        torch.save(entry, tmp_path / f"{name}.pt")
        want.append([name, "KnowledgeDraft", [True, True], str(dtype), [1, 3], kind])
    (tmp_path / "names.json").write_text(json.dumps([entry[0] for entry in want]))
    assert fresh(SAVED, tmp_path) == want


@every_kind
def test_a_configuration_survives_json(world, tmp_path, kind):
    target, _ = world()
    config = KnowledgeDraftConfig.of(target.config, "uniform:2", knowledge=kind, transitions=True)
    config.save_pretrained(tmp_path)
    again = KnowledgeDraftConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() | {
        "transformers_version": again.to_dict()["transformers_version"]
    }
    assert type(again.text_config) is type(target.config)
    assert (again.layers, again.knowledge, again.transitions) == ([0, 3], kind, True)
    with pytest.raises(ValueError, match="aligned is False, expected True: train a new draft"):
        KnowledgeDraftConfig(target.config, knowledge=kind, aligned=False)


def test_a_saved_draft_with_a_weight_missing_says_so(world, tmp_path):
    target, _ = world(dtype=torch.float32)
    cut(target, "kv").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in state if name.endswith("gate"))
    del state[gone]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    draft, told = KnowledgeDraft.from_pretrained(tmp_path, output_loading_info=True)
    assert {*told["missing_keys"]} == {gone}
    assert gates(draft)[0] == 0  # what is not there begins closed


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cut_that_shares_embedding_and_head_trains_all_else(tiny_model, family, dtype):
    target = copy.deepcopy(tiny_model(family, dtype=dtype))
    own = KnowledgeDraft.cut(target, "uniform:2")
    shared = KnowledgeDraft.cut(target, "uniform:2", share=True)
    assert shared.get_input_embeddings() is target.get_input_embeddings()
    assert shared.get_output_embeddings() is target.get_output_embeddings()
    frozen = {name for name, p in shared.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in own.named_parameters() if "embed_tokens" in n or "lm_head" in n}
    assert {p.dtype for p in shared.parameters() if p.requires_grad} == {torch.float32}
    module.cast(shared, dtype)
    ids = torch.arange(8)[None]
    assert torch.equal(shared(ids).logits, own(ids).logits)


# the target's answers


@pytest.fixture(scope="session")
def prompts():
    return [ids.tolist() for ids in texts(5, 3, 8, 3, 6, 4, 7)]


@pytest.fixture(scope="session")
def targets(world, tokenizer, prompts):
    target, _ = world()
    return generate_targets(target, tokenizer, prompts, max_new_tokens=9)


def test_targets_are_the_targets_greedy_answers(world, tokenizer, prompts, targets):
    target, _ = world()
    for prompt, example in zip(prompts, targets, strict=True):
        assert example.start == len(prompt)
        assert example.input_ids[: len(prompt)].tolist() == prompt
        config = GenerationConfig(
            max_new_tokens=9, **GREEDY | {"eos_token_id": tokenizer.eos_token_id}
        )
        want = target.generate(torch.tensor([prompt]), generation_config=config)[0].tolist()
        assert example.input_ids.tolist() == want
        assert example.knowledge is None
        logits = target(example.input_ids[None]).logits[
            0, example.start - 1 : -1
        ]  # before each token of the answer
        near(target.lm_head(example.hidden_states.to(DOUBLE)), logits)
        assert (
            target.lm_head(example.hidden_states).argmax(-1).tolist()
            == example.input_ids[example.start :].tolist()
        )


def test_targets_are_no_inference_tensors(world, targets):
    draft, example = KnowledgeDraft.cut(world()[0]), targets[0]
    logits = draft(example.input_ids[None]).logits[0, example.start - 1 : -1]
    (
        draft.get_input_embeddings().weight.sum()
        + (logits.mean(-1) * example.hidden_states.mean(-1)).sum()
    ).backward()
    assert draft.get_output_embeddings().weight.grad.any()


def test_an_answer_that_ends_is_generated_to_its_end(world, tokenizer, prompts, targets):
    target, _ = world()
    early = copy.deepcopy(tokenizer)
    early.eos_token = tokenizer.convert_ids_to_tokens(
        targets[0].input_ids[targets[0].start + 3].item()
    )
    example = generate_targets(target, early, prompts, max_new_tokens=9)[0]
    answer = targets[0].input_ids[targets[0].start :].tolist()
    stop = answer.index(early.eos_token_id) + 1
    assert example.input_ids[example.start :].tolist() == answer[:stop]
    assert len(example.hidden_states) == stop


def test_targets_are_read_from_their_file(world, tokenizer, prompts, targets, tmp_path):
    target, _ = world()
    folder, options = tmp_path / "new" / "answers", {"max_new_tokens": 9}
    first = generate_targets(target, tokenizer, prompts, folder, **options)
    calls, (file,) = [], folder.iterdir()
    hook = target.model.register_forward_hook(lambda *args: calls.append(1))
    try:
        again = generate_targets(target, tokenizer, prompts, folder, **options)
        assert not calls
        for a, b, c in zip(first, again, targets, strict=True):
            assert a.start == b.start == c.start
            for name in ("input_ids", "hidden_states"):
                assert torch.equal(getattr(a, name), getattr(b, name))
                assert torch.equal(getattr(a, name), getattr(c, name))
        generate_targets(target, tokenizer, prompts[:3], folder, **options)
        generate_targets(target, tokenizer, prompts, folder, **options | {"max_new_tokens": 4})
    finally:
        hook.remove()
    assert calls
    other = copy.deepcopy(target)
    other.model.norm.weight.data *= 1.01
    generate_targets(other, tokenizer, prompts, folder, **options)
    assert len({*folder.iterdir()} - {file}) == 3


def test_targets_before_a_kill_are_not_generated_again(
    world, tokenizer, prompts, targets, tmp_path, monkeypatch
):
    target, calls = world()[0], []

    def killed(model, tokenizer, prompts, *rest, **options):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return continuations(model, tokenizer, prompts, *rest, **options)

    monkeypatch.setattr("kvlab.draft.ANSWERS_PER_FILE", 3)
    monkeypatch.setattr("kvlab.draft.continuations", killed)
    with pytest.raises(KeyboardInterrupt):
        generate_targets(target, tokenizer, prompts, tmp_path, max_new_tokens=9)
    again = generate_targets(target, tokenizer, prompts, tmp_path, max_new_tokens=9)
    assert calls == [3, 3, 1, 1]  # seven prompts
    for a, b in zip(again, targets, strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist()
        near(a.hidden_states.to(DOUBLE), b.hidden_states.to(DOUBLE))


GENERATION = """
import sys
from accelerate import PartialState
from kvlab import draft, lab

if __name__ == "__main__":
    rank, draft.ANSWERS_PER_FILE = PartialState(cpu=True).process_index, 2
    target, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
    prompts, calls, real = [[5, 6, n] for n in range(10, 20)], [], draft.continuations
    draft.continuations = lambda *args, **more: calls.append(args[2]) or real(*args, **more)
    targets = draft.generate_targets(target, tokenizer, prompts, sys.argv[1], max_new_tokens=4)
    assert [example.input_ids[:3].tolist() for example in targets] == prompts
    print(f"rank {rank}: {len(calls)} parts")
"""


def test_processes_share_the_generation(tmp_path):
    (tmp_path / "script.py").write_text(GENERATION)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    setting = os.environ | {"OMP_NUM_THREADS": "1"}
    told = [*launch, str(tmp_path / "script.py"), str(tmp_path / "answers")]
    done = subprocess.run(told, env=setting, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split("\n")) == ["", "rank 0: 3 parts", "rank 1: 2 parts"]


def test_given_answers_are_those_of_the_items(world):
    _, store = world()
    for item, example in zip(store, item_examples(store), strict=True):
        assert tuple(example.input_ids.tolist()) == item.input_ids
        assert example.start == item.answer_start
        assert example.hidden_states is None is example.knowledge


@every_kind
def test_attach_gives_each_example_its_item_which_is_read_once(world, targets, monkeypatch, kind):
    target, store = world()
    draft, calls, real = cut(target, kind), [], KnowledgeCache._tensors
    numbers = [ANNA, None, BEN, ANNA, WHY, None, ANNA]
    want = [None if i is None else draft.read(store, store.items[i]) for i in numbers]
    monkeypatch.setattr(KnowledgeCache, "_tensors", lambda *args: calls.append(1) or real(*args))
    got = attach(draft, store, targets, [None if i is None else store.items[i] for i in numbers])
    assert len(calls) == 3
    for example, before, states in zip(got, targets, want, strict=True):
        assert example[:3] == before[:3]
        assert example.knowledge is states is None or torch.equal(example.knowledge, states)
    with pytest.raises(ValueError, match="argument 2"):
        attach(draft, store, targets, store.items[:2])


def test_corruption_drops_and_swaps_the_fractions():
    examples = [
        DraftExample(torch.tensor([i, 1]), 1, None, torch.full((1, 2), float(i)))
        for i in range(2000)
    ]
    got = corrupt_knowledge(examples, drop=0.25, swap=0.1, seed=3)
    assert [
        a.input_ids is b.input_ids and a.start == b.start
        for a, b in zip(got, examples, strict=True)
    ] == [True] * 2000
    none = sum(example.knowledge is None for example in got)
    wrong = sum(e.knowledge is not None and e.knowledge[0, 0] != e.input_ids[0] for e in got)
    assert abs(none - 500) < 80  # four standard deviations
    assert abs(wrong - 200) < 55
    again, other = (corrupt_knowledge(examples, drop=0.25, swap=0.1, seed=seed) for seed in (3, 4))
    kinds = [
        [e.knowledge if e.knowledge is None else e.knowledge[0, 0].item() for e in one]
        for one in (got, again, other)
    ]
    assert kinds[0] == kinds[1] != kinds[2]
    assert all(
        e.knowledge is x.knowledge
        for e, x in zip(corrupt_knowledge(examples, 0, 0), examples, strict=True)
    )
    assert all(e.knowledge is None for e in corrupt_knowledge(examples, 1, 0))


def test_a_batch_is_padded_on_the_right_and_weighs_answers_only(world, targets):
    _, store = world()
    examples = [
        targets[0],
        item_examples(store)[BEN],
        targets[1]._replace(knowledge=torch.ones(4, 64)),
        targets[2],
    ]
    batch = pad_draft_examples(examples, 64)
    longest = max(len(example.input_ids) for example in examples)
    assert batch["input_ids"].shape == batch["weights"].shape == (4, longest)
    for row, example in enumerate(examples):
        n, start = len(example.input_ids), example.start
        assert torch.equal(batch["input_ids"][row, :n], example.input_ids)
        want = [1.0 if start <= t < n else 0.0 for t in range(longest)]
        assert batch["weights"][row].tolist() == want
        own = example.hidden_states is not None
        assert batch["distill_weights"][row].tolist() == [weight * own for weight in want]
        hidden = torch.zeros(longest, 64)
        if own:
            hidden[start - 1 : n - 1] = example.hidden_states  # before each token of the answer
        assert torch.equal(batch["hidden_states"][row], hidden)
    states, mask, start = batch["knowledge"]
    assert mask.tolist() == [[False] * 4, [False] * 4, [True] * 4, [False] * 4]
    assert start.tolist() == [example.start for example in examples]
    assert torch.equal(states[2], torch.ones(4, 64))
    assert "knowledge" not in pad_draft_examples(targets, 64)


def test_gather_puts_pieces_of_different_lengths_into_one_batch():
    one, two = torch.randn(3, 2, 2, 4, 8), torch.randn(3, 2, 2, 7, 8)
    got = gather([one, None, two], [5, 6, 7])
    assert got.states.shape == (3, 3, 2, 2, 7, 8)
    assert got.mask.tolist() == [[True] * 4 + [False] * 3, [False] * 7, [True] * 7]
    assert torch.equal(got.states[0, ..., :4, :], one)
    assert torch.equal(got.states[2], two)
    assert got.start.tolist() == [5, 6, 7]
    assert gather([None, None], [1, 2]) is None


# acceptance


@every_kind
def test_acceptance_is_that_of_a_plain_loop(world, targets, monkeypatch, kind):
    target, store = world()
    draft, numbers = cut(target, kind, transitions=True), [ANNA, None, BEN, WHY, CARL, None, ANNA]
    examples = attach(
        draft, store, targets, [None if i is None else store.items[i] for i in numbers]
    )
    got = measure_acceptance(draft, target, examples)
    greedy, sampled = [], []
    for example, number in zip(examples, numbers, strict=True):
        q = alone(draft, store, number, example.start, example.input_ids).softmax(-1)
        p = target(example.input_ids[None]).logits[0].softmax(-1)
        counted = range(
            example.start, len(example.input_ids) - 1
        )  # the first token comes from reading the prompt
        greedy.append(np.mean([(q[t].argmax() == p[t].argmax()).item() for t in counted]))
        sampled.append(np.mean([torch.minimum(q[t], p[t]).sum().item() for t in counted]))
    np.testing.assert_allclose(got.greedy, greedy, atol=1e-6)
    np.testing.assert_allclose(got.sampled, sampled, atol=1e-5)
    assert 0 < got.greedy.mean() < 1
    for size in (1, 3):
        monkeypatch.setattr(module, "BATCH_SIZE", size)
        again = measure_acceptance(draft, target, examples).sampled
        np.testing.assert_allclose(again, sampled, atol=1e-5)


@every_kind
def test_acceptance_predicts_the_rounds_of_decoding(world, targets, kind):
    target, store = world()
    draft, numbers = cut(target, kind), [ANNA, None, BEN, WHY, CARL, None, ANNA]
    items = [None if i is None else store.items[i] for i in numbers]
    examples = attach(draft, store, targets, items)
    for example, item in zip(examples, items, strict=True):
        proposer = ModelProposer(*draft.with_knowledge(store, [item], [example.start]))
        prompt, count = example.input_ids[: example.start], len(example.input_ids) - example.start
        got = generate(target, [prompt], proposer, gamma=1, max_new_tokens=count, eos_token_id=[])
        logits = alone(draft, store, numbers[items.index(item)], example.start, example.input_ids)
        right, at = (logits[:-1].argmax(-1) == example.input_ids[1:])[example.start :], 0
        for drafted, accepted, tokens in what_happened(got.rounds):
            if drafted:  # nothing is, if one token is left
                assert drafted[0] == logits[example.start + at].argmax()
                assert accepted == right[at]
            at += len(tokens)
        share = measure_acceptance(draft, target, [example]).greedy
        np.testing.assert_allclose(share, right.float().mean(), atol=1e-6)


def test_acceptance_is_that_of_decoding_under_a_generation_config(world, tokenizer, prompts):
    """Target and draft choose among what the generation config leaves, in measuring as in decoding."""
    target, _ = world()
    target = copy.deepcopy(target)
    free = generate_targets(target, tokenizer, prompts, max_new_tokens=9)
    target.generation_config.suppress_tokens = [int(e.input_ids[e.start + 2]) for e in free]
    target.generation_config.no_repeat_ngram_size = 2
    examples = generate_targets(target, tokenizer, prompts, max_new_tokens=9)
    assert any(a.input_ids.tolist() != b.input_ids.tolist() for a, b in zip(free, examples))
    same = measure_acceptance(KnowledgeDraft.cut(target, "first:4"), target, examples)
    assert (same.greedy == 1).all()
    np.testing.assert_allclose(same.sampled, 1, atol=1e-5)
    draft = KnowledgeDraft.cut(target, "first:3")
    for example in examples:
        prompt, answer = example.input_ids[: example.start], example.input_ids[example.start :]
        options, right = {"gamma": 1, "max_new_tokens": 3, "eos_token_id": []}, []
        for k in range(1, len(answer)):  # what the draft chooses after each token
            begun = torch.cat([prompt, answer[: k - 1]])
            rounds = generate(target, [begun], ModelProposer(draft), **options).rounds
            right.append(rounds[2].drafted[0][0] == answer[k])
        share = measure_acceptance(draft, target, [example]).greedy.item()
        assert share == pytest.approx(np.mean(right))


def test_the_whole_target_is_accepted_always(world, targets):
    target, _ = world()
    got = measure_acceptance(KnowledgeDraft.cut(target, "first:4"), target, targets)
    assert (got.greedy == 1).all()
    np.testing.assert_allclose(got.sampled, 1, atol=1e-5)
    assert len(got.greedy) == len(targets)


# training


@pytest.fixture(scope="session")
def lesson(world, tokenizer):
    """A float32 target, and its answers to 24 prompts and to eight others."""
    target, store = world(dtype=torch.float32)
    prompts = [ids.tolist() for ids in texts(*([4, 5, 6, 7] * 8), seed=9)]
    examples = generate_targets(target, tokenizer, prompts, max_new_tokens=12)
    return target, store, examples[:24], examples[24:]


QUICK = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-3}


def weights_of(draft):
    return {name: p.detach().clone() for name, p in draft.named_parameters()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_training_helps_on_questions_that_were_held_out_and_leaves_the_target_alone(tokenizer):
    target = lab.load("lab-target")
    questions = [
        encode(tokenizer, [{"role": "user", "content": entry["question"]}])
        for entry in lab.faq()[:32]
    ]
    examples, before = (
        generate_targets(target, tokenizer, questions, max_new_tokens=24),
        every_byte(target),
    )
    examples, heldout = examples[:24], examples[24:]
    draft = KnowledgeDraft.cut(target, "uniform:3")
    start = measure_acceptance(draft, target, heldout)
    history = train_draft(
        draft,
        target,
        examples,
        heldout,
        loss_weights={"kl": 1.0},
        epochs=8,
        batch_size=4,
        learning_rate=1e-3,
    )
    after = measure_acceptance(draft, target, heldout)
    assert after.greedy.mean() > start.greedy.mean() + 0.08
    assert after.sampled.mean() > start.sampled.mean() + 0.05
    assert every_byte(target) == before
    assert after.greedy.mean() == max(entry.get("acceptance", 0) for entry in history)
    assert history[-1]["kl"] < history[0]["kl"]
    assert not draft.training


def test_the_best_weights_are_kept(lesson):
    target, _, examples, heldout = lesson
    draft = KnowledgeDraft.cut(target, "first:3")
    before = weights_of(draft)
    history = train_draft(
        draft, target, examples, heldout, **QUICK | {"learning_rate": 3.0}, every=1
    )  # it only gets worse
    assert [entry["acceptance"] for entry in history][-1] < history[0]["acceptance"]
    assert history[0]["learning_rate"] == 0  # so the first check is of the weights as they were
    assert same(weights_of(draft), before)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
def test_gradients_reach_all_that_is_to_learn(world, family, kind, targets):
    target, store = world(family, torch.float32)
    draft = opened(
        KnowledgeDraft.cut(target, LAYERS, knowledge=kind, transitions=True)
    ).requires_grad_(True)
    examples = [example._replace(hidden_states=None) for example in targets[:4]]
    if kind:
        examples = attach(
            draft, store, examples, [store.items[ANNA], None, store.items[BEN], store.items[WHY]]
        )
    batch = pad_draft_examples(examples, 64)
    logits = draft(batch["input_ids"], knowledge=batch.get("knowledge"), use_cache=False).logits
    losses.cross_entropy(logits, batch["input_ids"], batch["weights"]).backward()
    silent = [name for name, p in draft.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@every_reader
def test_closed_gates_and_transitions_learn_first(lesson, kind):
    target, store, examples, heldout = lesson
    draft = KnowledgeDraft.cut(target, LAYERS, knowledge=kind, transitions=True)
    before = weights_of(draft)
    items = [store.items[i % 4] for i in range(24)]
    train_draft(
        draft,
        target,
        attach(draft, store, examples, items),
        heldout,
        **QUICK | {"epochs": 1, "every": 3},
    )
    moved = {name for name, p in draft.named_parameters() if not torch.equal(p, before[name])}
    assert {
        name for name in before if name.endswith(("gate", "down.weight", "q_proj.weight"))
    } <= moved


STOPS = [("kv", 2), ("kv", 8), ("kv", "saving 1"), ("kv", "saving 2"), ("vector", 6)]


@pytest.mark.parametrize(("kind", "stop"), STOPS)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    lesson, tmp_path, monkeypatch, kind, stop
):
    target, store, examples, heldout = lesson
    items, calls = [store.items[i % 4] if i % 3 else None for i in range(24)], []

    def run(folder):
        torch.manual_seed(0)  # of transitions
        draft = opened(
            KnowledgeDraft.cut(target, LAYERS, knowledge=kind, transitions=True)
        ).requires_grad_(True)
        data = [attach(draft, store, part, items[: len(part)]) for part in (examples, heldout)]
        return draft, train_draft(draft, target, *data, folder=folder, **QUICK)

    def interrupt(*args):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt

    want, history = run(tmp_path / "whole")
    if isinstance(
        stop, int
    ):  # the head is called three times for losses, then once to check, in each epoch
        hook = target.get_output_embeddings().register_forward_hook(interrupt)
    else:
        real, stop = module.fit.__globals__["write_tensors"], int(stop[-1])
        monkeypatch.setitem(
            module.fit.__globals__, "write_tensors", lambda *args: interrupt() or real(*args)
        )
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    hook.remove() if "hook" in locals() else monkeypatch.undo()
    got, resumed = run(tmp_path / "stopped")
    assert same(weights_of(got), weights_of(want))
    drop = lambda entries: [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]
    assert drop(resumed) == drop(history)
    finished, third = run(tmp_path / "stopped")  # nothing is left to do
    assert same(weights_of(finished), weights_of(want))
    assert drop(third) == drop(history)


def test_default_loss_weights_are_those_of_the_sources(lesson):
    target, _, examples, heldout = lesson
    for kind, names in (
        ("kv", {"kl", "tv"}),
        ("vector", {"kl", "ce", "tv"}),
        (None, {"kl", "ce", "tv"}),
    ):
        history = train_draft(
            KnowledgeDraft.cut(target, knowledge=kind), target, examples[:8], heldout, epochs=1
        )
        assert {*history[0]} & {*losses.NAMES} == names
    assert default_loss_weights("vector", False) == {"kl": 0.5, "ce": 1.0, "tv": 0.3}
    assert default_loss_weights("kv", False) == {"kl": 0.8, "tv": 0.3}


def test_the_losses_are_those_of_the_batch(lesson):
    target, store, examples, heldout = lesson
    draft, mixed = cut(target, "kv"), [*examples[:5], *item_examples(store)[:3]]
    mixed = attach(draft, store, mixed, [store.items[i % 4] if i % 2 else None for i in range(8)])
    total = {"kl": 0.0, "ce": 0.0}
    for i, example in enumerate(mixed):
        logs = alone(
            draft, store, i % 4 if i % 2 else None, example.start, example.input_ids
        ).log_softmax(-1)
        p = target(example.input_ids[None]).logits[0].log_softmax(-1)
        for t in range(example.start - 1, len(example.input_ids) - 1):
            total["ce"] -= logs[t, example.input_ids[t + 1]].item()
            total["kl"] += (
                (p[t].exp() * (p[t] - logs[t])).sum().item() if i < 5 else 0.0
            )  # given ones count for ce only
    answers = [len(example.input_ids) - example.start for example in mixed]
    loss_weights = {"kl": 0.5, "ce": 2.0}
    first = train_draft(
        draft.requires_grad_(True), target, mixed, heldout, loss_weights=loss_weights, epochs=1
    )[0]
    assert first["kl"] == pytest.approx(0.5 * total["kl"] / sum(answers[:5]), rel=1e-4)
    assert first["ce"] == pytest.approx(2.0 * total["ce"] / sum(answers), rel=1e-4)
    assert first["weight"] == sum(answers)
    again = cut(target, "kv").requires_grad_(True)
    halves = train_draft(
        again,
        target,
        mixed,
        heldout,
        loss_weights=loss_weights,
        epochs=1,
        batch_size=4,
        accumulate=2,
    )[0]
    for name in (
        "kl",
        "ce",
        "grad_norm",
    ):  # given answers, which count for ce only, need not be evenly spread
        assert halves[name] == pytest.approx(first[name], rel=1e-4)


@pytest.fixture(scope="session")
def secrets(world, tmp_path_factory, tokenizer):
    """One question with eight made-up answers: only the item can tell which."""
    target, _ = world(dtype=torch.float32)
    rng = np.random.default_rng(0)
    records = [
        {"question": "Code?", "answer": " ".join(rng.choice(list("abcdefghij"), 5))}
        for _ in range(8)
    ]
    folder = tmp_path_factory.mktemp("secrets")
    return target, KnowledgeCache.build(folder, records, target, tokenizer, keep=("kv", "hidden"))


@every_kind
def test_a_little_training_makes_a_draft_use_what_it_reads(secrets, targets, kind):
    target, store = secrets
    draft = KnowledgeDraft.cut(target, "first:2", knowledge=kind)
    items = list(store)

    def loss(items):
        batch = pad_draft_examples(attach(draft, store, item_examples(store), items), 64)
        with torch.no_grad():
            logits = draft(batch["input_ids"], knowledge=batch.get("knowledge")).logits
        return losses.cross_entropy(logits, batch["input_ids"], batch["weights"]).item()

    examples = attach(draft, store, item_examples(store), items)
    heldout = [example._replace(hidden_states=example.hidden_states.float()) for example in targets]
    options = {
        "loss_weights": {"ce": 1.0},
        "epochs": 40,
        "learning_rate": 3e-3,
        "batch_size": 8,
        "every": 40,
    }
    train_draft(draft, target, examples, heldout, **options)
    right, wrong, none = loss(items), loss(items[1:] + items[:1]), loss([None] * 8)
    assert right < 0.7 * min(wrong, none)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_half_precision_arithmetic_trains_all_kinds(world, lesson, kind):
    target, store = world("Qwen2", torch.float32)
    draft = KnowledgeDraft.cut(target, LAYERS, knowledge=kind, transitions=True)
    examples = (
        item_examples(store)
        if kind is None
        else attach(draft, store, item_examples(store), store.items)
    )
    heldout = lesson[3][:2]
    history = train_draft(draft, target, examples, heldout, loss_weights={"ce": 1.0}, epochs=3, batch_size=2, precision="bf16",
                    learning_rate=1e-3)  # fmt: skip
    assert all(math.isfinite(entry["loss"]) for entry in history)
    assert history[-1]["loss"] < history[0]["loss"]
    assert draft.dtype == torch.float32


def test_what_training_cannot_work_with_is_refused(lesson):
    target, store, examples, heldout = lesson
    draft = KnowledgeDraft.cut(target)
    with pytest.raises(
        ValueError, match=r"Of 0 answers 0 are the target's own, .* use `generate_targets`"
    ):
        train_draft(draft, target, examples, [])
    with pytest.raises(ValueError, match="The loader has no batch"):
        train_draft(draft, target, examples[:7], heldout)
    with pytest.raises(ValueError, match="steps is 0 and accumulate 100"):
        train_draft(draft, target, examples, heldout, accumulate=100)
    with pytest.raises(ValueError, match="not the target's own: give 'ce' a loss weight"):
        train_draft(
            draft, target, [*examples, *item_examples(store)], heldout, loss_weights={"kl": 1.0}
        )
    with pytest.raises(
        ValueError, match=r"There is no loss .*'kld'.* expected one or more of ce, kl"
    ):
        train_draft(draft, target, examples, heldout, loss_weights={"kld": 1.0})


def test_heldout_answers_must_be_the_targets_own(lesson):
    target, store, examples, _ = lesson
    draft = KnowledgeDraft.cut(target)
    for call in (
        lambda: train_draft(draft, target, examples, item_examples(store)),
        lambda: measure_acceptance(draft, target, item_examples(store)),
    ):
        with pytest.raises(ValueError, match="target's own"):
            call()


# giving a draft away


def exported(draft, folder, *options, **more):
    """The model read back from where a draft was exported to."""
    export(draft, folder, *options, **more)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").requires_grad_(False)


PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder, found = sys.argv[1], []
for name in json.load(open(folder + "/names.json")):
    model, told = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", dtype="auto", output_loading_info=True)
    ids, want = torch.load(f"{folder}/{name}.pt").values()
    odd = [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if told[key]]
    found.append([name, type(model).__name__, torch.equal(model(ids).logits, want), odd])
print(json.dumps([found, "kvlab" in sys.modules]))
"""


def test_an_exported_draft_is_a_plain_model_in_another_process(world, tmp_path, tokenizer):
    want, ids = [], torch.stack(texts(9))
    for family, tied in itertools.product(FAMILIES, (False, True)):
        target, _ = world(family, torch.float32, **({"tie_word_embeddings": True} if tied else {}))
        name = f"{family}-{tied}"
        draft = KnowledgeDraft.cut(target, LAYERS, knowledge="prefix" if tied else None)
        back = exported(draft, tmp_path / name, tokenizer)
        assert type(back) is type(target)
        logits = truncated(target, LAYERS)(ids).logits
        assert torch.equal(back(ids).logits, logits)
        torch.save({"ids": ids, "logits": logits}, tmp_path / f"{name}.pt")
        want.append([name, f"{family}ForCausalLM", True, []])
        assert (tmp_path / name / "tokenizer.json").exists()
        layers = {
            key.split(".")[2]
            for key in load_file(tmp_path / name / "model.safetensors")
            if ".layers." in key
        }
        assert layers == {"0", "1", "2"}
    (tmp_path / "names.json").write_text(json.dumps([entry[0] for entry in want]))
    assert fresh(PLAIN, tmp_path) == [want, False]


def test_an_exported_draft_assists_a_target_and_any_model_can_be_exported(
    world, tmp_path, tokenizer
):
    target, _ = world()
    (ids,) = texts(7)
    back = exported(KnowledgeDraft.cut(target, LAYERS), tmp_path / "draft", tokenizer)
    assert back.dtype == DOUBLE
    config = GenerationConfig(max_new_tokens=10, **GREEDY)
    mask = torch.ones(1, 7, dtype=torch.long)
    got = target.generate(
        ids[None], attention_mask=mask, generation_config=config, assistant_model=back
    )
    assert got[0, 7:].tolist() == plain(target, ids, 10)
    again = exported(target, tmp_path / "target", tokenizer)
    assert torch.equal(again(ids[None]).logits, target(ids[None]).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_is_padded_with_tokens_of_logit_zero(world, tmp_path, tokenizer, tied):
    target, _ = world(dtype=torch.float32, **({"tie_word_embeddings": True} if tied else {}))
    draft, ids = KnowledgeDraft.cut(target, LAYERS), torch.stack(texts(9))
    before = every_byte(draft)
    back = exported(draft, tmp_path, tokenizer, vocab_size=1600)
    assert (
        back.config.vocab_size
        == 1600
        == json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    )
    logits = back(ids).logits
    near(logits[..., :1536], draft(ids).logits, 1e-5)
    assert not logits[..., 1536:].any()
    assert logits.shape[-1] == 1600
    assert every_byte(draft) == before
    assert draft.plain.config.vocab_size == 1536


def test_what_other_programs_cannot_take_is_not_exported(world, tmp_path, tokenizer):
    target, _ = world()
    for options in ({"knowledge": "kv"}, {"knowledge": "vector"}, {"transitions": True}):
        with pytest.raises(
            ValueError, match="Cross-attention and transitions are kvlab's: use save_pretrained"
        ):
            export(KnowledgeDraft.cut(target, LAYERS, **options), tmp_path, tokenizer)
    with pytest.raises(
        ValueError, match="The draft has 1536 tokens, the target 1000: use its family"
    ):
        export(KnowledgeDraft.cut(target, LAYERS), tmp_path, tokenizer, vocab_size=1000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("harm", ["missing", "unexpected", "shape", "number"])
def test_a_file_that_does_not_hold_the_draft_is_refused(
    world, tmp_path, tokenizer, monkeypatch, harm
):
    target, _ = world(dtype=torch.float32)
    draft = KnowledgeDraft.cut(target, LAYERS)
    real = type(target).save_pretrained

    def tampered(self, folder, *args, **options):
        real(self, folder, *args, **options)
        path = Path(folder) / "model.safetensors"
        state = load_file(path)
        name = "model.layers.1.mlp.up_proj.weight"
        if harm == "missing":
            del state[name]
        elif harm == "unexpected":
            state["model.layers.7.mlp.up_proj.weight"] = state[name].clone()
        else:
            state[name] = state[name][:-1].clone() if harm == "shape" else 1.5 * state[name]
        save_file(state, path, {"format": "pt"})

    monkeypatch.setattr(type(target), "save_pretrained", tampered)
    sentence = (
        "gives other logits than the draft"
        if harm == "number"
        else "does not hold the model's weights"
    )
    with pytest.raises(
        (ValueError, RuntimeError),
        match=sentence if harm != "shape" else "ignore_mismatched_sizes|does not hold",
    ):
        export(draft, tmp_path, tokenizer)


@pytest.mark.parametrize(
    "options", [{"knowledge": "kv"}, {"knowledge": "vector"}, {"transitions": True}]
)
def test_a_draft_with_more_than_layers_is_not_compiled(tiny_model, options):
    with pytest.raises(
        ValueError, match="A draft with cross-attention or transitions cannot be compiled: leave"
    ):
        Runner(KnowledgeDraft.cut(tiny_model(), "first:2", **options), compiled_room=16)
