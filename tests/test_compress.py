"""The laws of a shrunk cache: scores as in their papers, real eviction, and a distiller that begins as the model."""

import copy
import functools
import itertools
import json
import math
from functools import partial

import pytest
import torch
from conftest import FAMILIES
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlab import cache as kv
from kvlab import compress as module
from kvlab import lab, losses
from kvlab.compress import (
    METHODS,
    Attention,
    Example,
    Examples,
    KVDistiller,
    collate,
    compact,
    count_kept,
    evict,
    example,
    h2o,
    key_norm,
    observing,
    random,
    routed,
    sinks_recent,
    snapkv,
    train,
)
from kvlab.files import as_bytes
from kvlab.models import CacheError, rotary_of

DOUBLE = torch.float64
INF = float("inf")
IDS = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(3))
TEXT = torch.randint(0, 97, (1, 6), generator=torch.Generator().manual_seed(4))
HEADS, GROUPS, LAYERS = 4, 2, 3  # of the models in conftest

every_family = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", METHODS)
with_or_without_a_question = pytest.mark.parametrize("question", [0, 6])


def near(one, two, within=1e-9):
    torch.testing.assert_close(one, two, rtol=0, atol=within)


def distance(one, two):
    return (one - two).abs().max().item()


def same_cache(one, two):
    return torch.equal(kv.to_tensor(one), kv.to_tensor(two))


def every_byte(model):
    """A hash of all parameters and buffers."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: hash(bytes(as_bytes(tensor))) for name, tensor in tensors}


def read_on(model, prefix, text, bias=None):
    """Logits of a text behind a cache, which stays as it was; `bias` is added to the logits of its entries."""
    size, k = text.shape[1], kv.length(prefix.cache)
    mask = torch.cat([torch.zeros(size, k), torch.full((size, size), -INF).triu(1)], 1)[
        None, None
    ].to(model.dtype)
    if bias is not None:
        mask[..., :k] += bias
    places = {
        "position_ids": prefix.next_position + torch.arange(size)[None],
        "attention_mask": mask,
    }
    return model(text, past_key_values=kv.clone(prefix.cache), **places).logits


def latest(seen, budget):
    return torch.arange(seen.context).expand(*seen.keys.shape[:2], -1).to(seen.keys)


# scores


@functools.cache
def seen_by(model, context, read):
    """What each layer computed for the first `read` ids, the attention that eager layers report, and their keys."""
    seen = []
    with observing(model, lambda *what: seen.append(Attention(*what, context))):
        cache = kv.prefill(model, IDS[:, :read]).cache
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    given = eager(IDS[:, :read], output_attentions=True).attentions
    return [
        (a, w[0].tolist(), layer.keys[0])
        for a, w, layer in zip(seen, given, cache.layers, strict=True)
    ]


def group_of(head):
    return head // (HEADS // GROUPS)


def heads_of(group):
    return [head for head in range(HEADS) if group_of(head) == group]


def looped_h2o(weights, keys, context, budget):
    read = len(weights[0])
    scores = [[0.0] * context for _ in range(GROUPS)]
    for head, j in itertools.product(range(HEADS), range(context)):
        for i in range(read):
            scores[group_of(head)][j] += weights[head][i][j]
    return [[INF if j >= context - budget // 2 else s for j, s in enumerate(row)] for row in scores]


def looped_snapkv(weights, keys, context, budget, window=32, kernel=5):
    read = len(weights[0])
    window = min(window, read - context or max(1, budget // 2))
    before = min(context, read - window)
    scores = []
    for group in range(GROUPS):
        votes = [0.0] * before
        for head, j in itertools.product(heads_of(group), range(before)):
            for i in range(read - window, read):
                votes[j] += weights[head][i][j] / len(heads_of(group))
        pooled = []
        for j in range(before):
            near_by = [
                votes[n] for n in range(j - kernel // 2, j + kernel // 2 + 1) if 0 <= n < before
            ]
            pooled.append(sum(near_by) / kernel)
        scores.append(pooled + [INF] * (context - before))
    return scores


def looped_key_norm(weights, keys, context, budget):
    return [
        [-math.sqrt(sum(x * x for x in keys[g, j].tolist())) for j in range(context)]
        for g in range(GROUPS)
    ]


def looped_sinks_recent(weights, keys, context, budget):
    return [
        [INF if j < min(4, budget) else float(j) for j in range(context)] for _ in range(GROUPS)
    ]


LOOPS = {
    "h2o": (h2o, looped_h2o),
    "h2o in chunks": (partial(h2o, chunk=3), looped_h2o),
    "snapkv": (snapkv, looped_snapkv),
    "snapkv, few": (partial(snapkv, window=3), partial(looped_snapkv, window=3)),
    "snapkv, sharp": (
        partial(snapkv, window=4, kernel=1),
        partial(looped_snapkv, window=4, kernel=1),
    ),
    "key_norm": (key_norm, looped_key_norm),
    "sinks_recent": (sinks_recent, looped_sinks_recent),
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("budget", [1, 3, 8, 14])
@with_or_without_a_question
def test_scores_are_the_loops_of_their_papers(tiny_model, name, budget, question):
    method, loop = LOOPS[name]
    context = 14
    for seen, weights, keys in seen_by(
        tiny_model("Llama", dtype=DOUBLE), context, context + question
    ):
        got, want = (
            method(seen, budget),
            torch.tensor(loop(weights, keys, context, budget), dtype=DOUBLE),
        )
        assert got.shape == (1, GROUPS, context)
        assert (
            got.isinf().sum(-1).max() <= budget
        )  # else which of those that must stay are kept would be chance
        near(got[0].double(), want, 1e-5)


def test_all_heads_of_a_group_count_and_none_of_another(tiny_model):
    (seen, _, _), *_ = seen_by(tiny_model("Llama", dtype=DOUBLE), 14, 14)
    for method, head in itertools.product((partial(h2o, chunk=5), snapkv), range(HEADS)):
        queries = seen.queries.clone()
        queries[:, head] *= -3
        moved = (
            method(seen._replace(queries=queries), 4) - method(seen, 4)
        ).nan_to_num().abs().amax((0, 2)) > 1e-4
        assert moved.tolist() == [group == group_of(head) for group in range(GROUPS)]


def test_random_scores_differ_by_head_and_call_and_follow_the_seed(tiny_model):
    (seen, _, _), *_ = seen_by(tiny_model("Llama", dtype=DOUBLE), 14, 20)
    torch.manual_seed(5)
    one, two = random(seen, 3), random(seen, 3)
    torch.manual_seed(5)
    assert random(seen, 3).equal(one)
    assert one.shape == (1, GROUPS, 14)
    assert not one.equal(two)
    assert not one[0, 0].equal(one[0, 1])


# observing


@every_family
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_observing_changes_nothing_and_sees_what_layers_compute(tiny_model, family, implementation):
    model = tiny_model(family, dtype=DOUBLE, attn_implementation=implementation)
    want, seen = kv.prefill(model, IDS), []
    names = set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)
    with observing(model, lambda *what: seen.append(Attention(*what, 40))):
        got = kv.prefill(model, IDS)
    near(got.logits, want.logits, 0 if implementation == "sdpa" else 1e-4)
    assert len(seen) == LAYERS
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for layer, what, weights in zip(
        got.cache.layers, seen, eager(IDS, output_attentions=True).attentions, strict=True
    ):
        assert what.keys.equal(layer.keys)
        assert what.values.equal(layer.values)
        logits = what.queries @ what.keys.repeat_interleave(HEADS // GROUPS, 1).mT * what.scaling
        near(logits.masked_fill(torch.ones(40, 40).triu(1).bool(), -INF).softmax(-1), weights, 1e-6)
    assert model.config._attn_implementation == implementation
    assert (set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)) == names


def test_observing_is_undone_after_an_exception(tiny_model):
    model = tiny_model()
    names, want = (
        (set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)),
        model(IDS).logits,
    )

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), observing(model, fail):
        model(IDS)
    assert (set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)) == names
    assert model.config._attn_implementation == "sdpa"
    assert model(IDS).logits.equal(want)


# eviction


def test_a_share_is_rounded_and_at_least_one_and_a_number_at_most_all():
    assert [count_kept(10, retention=r) for r in (0.001, 0.06, 0.26, 0.34, 0.99, 1)] == [
        1,
        1,
        3,
        3,
        10,
        10,
    ]
    assert [count_kept(10, budget=b) for b in (1, 9, 10, 11)] == [1, 9, 10, 10]


@every_family
@every_method
def test_whole_retention_is_the_whole_cache(tiny_model, family, method):
    model = tiny_model(family)
    want = kv.prefill(model, IDS)
    for options in ({"retention": 1.0}, {"budget": 40}, {"budget": 99, "shared": True}):
        got = evict(model, IDS, METHODS[method], **options)
        assert same_cache(got.prefix.cache, want.cache)
        assert got.prefix.next_position == want.next_position == 40
        assert got.prefix.input_ids == IDS[0].tolist()


@every_method
@pytest.mark.parametrize("shared", [True, False])
@with_or_without_a_question
def test_what_is_kept_is_the_best_of_each_head_and_nothing_else_is_in_memory(
    tiny_model, method, shared, question
):
    model = tiny_model("Llama")
    whole, asked = kv.prefill(model, IDS).cache, TEXT[:, :question] if question else None
    for k, options in ((1, {"budget": 1}), (10, {"retention": 0.26}), (17, {"budget": 17})):
        got = evict(model, IDS, METHODS[method], question_ids=asked, shared=shared, **options)
        assert got.positions.shape == ((1, k) if shared else (LAYERS, 1, GROUPS, k))
        assert got.scores.shape == (*got.positions.shape[:-1], 40)
        for positions, scores in zip(
            got.positions.reshape(-1, k), got.scores.reshape(-1, 40), strict=True
        ):
            ranked = sorted(range(40), key=lambda j: (-scores[j].item(), j))
            kept = positions.tolist()
            assert kept == sorted(set(kept))
            assert sorted(scores[kept].tolist()) == sorted(scores[ranked[:k]].tolist())
        for layer, group in itertools.product(range(LAYERS), range(GROUPS)):
            kept = got.positions[0] if shared else got.positions[layer, 0, group]
            for name in ("keys", "values"):
                there = getattr(got.prefix.cache.layers[layer], name)
                near(there[0, group], getattr(whole.layers[layer], name)[0, group, kept], 1e-5)
                assert there.untyped_storage().nbytes() == there.nbytes
        assert kv.nbytes(got.prefix.cache) * 40 == kv.nbytes(whole) * k
        assert got.prefix.next_position == 40
        assert got.bias is None


@pytest.mark.parametrize("method", ["random", "key_norm", "h2o", "snapkv"])
def test_heads_keep_their_own(tiny_model, method):
    kept = evict(tiny_model("Llama"), IDS, METHODS[method], budget=10).positions[:, 0].flatten(0, 1)
    assert len({tuple(row) for row in kept.tolist()}) == LAYERS * GROUPS


def test_shared_entries_are_those_of_the_mean_score(tiny_model):
    own, shared = (
        evict(tiny_model("Llama"), IDS, key_norm, budget=9, shared=s) for s in (False, True)
    )
    near(shared.scores[0], own.scores.mean((0, 1, 2)), 1e-6)
    assert shared.positions[0].tolist() == sorted(
        own.scores.mean((0, 1, 2)).argsort()[-9:].tolist()
    )


@every_family
@pytest.mark.parametrize("method", ["snapkv", "key_norm"])
def test_reading_on_is_the_whole_text_with_the_evicted_hidden(tiny_model, family, method):
    model = tiny_model(family, dtype=DOUBLE)
    got = evict(model, IDS, METHODS[method], budget=11, shared=True)
    hidden = torch.ones(40).index_fill(0, got.positions[0], 0).bool()
    mask = torch.full((46, 46), -INF, dtype=DOUBLE).triu(1)
    mask[40:, :40] = mask[40:, :40].masked_fill(hidden, -INF)
    want = model(torch.cat([IDS, TEXT], 1), attention_mask=mask[None, None]).logits[:, 40:]
    near(read_on(model, got.prefix, TEXT), want)
    assert distance(model(torch.cat([IDS, TEXT], 1)).logits[:, 40:], want) > 0.1


def test_reading_on_hides_each_heads_own(tiny_model):
    model = tiny_model(
        dtype=DOUBLE, num_hidden_layers=1
    )  # where a mask of heads can say what each hides
    got = evict(model, IDS, key_norm, budget=11)
    mask = torch.full((HEADS, 46, 46), -INF, dtype=DOUBLE).triu(1)
    for head in range(HEADS):
        hidden = torch.ones(40).index_fill(0, got.positions[0, 0, group_of(head)], 0).bool()
        mask[head, 40:, :40] = mask[head, 40:, :40].masked_fill(hidden, -INF)
    want = model(torch.cat([IDS, TEXT], 1), attention_mask=mask[None]).logits[:, 40:]
    near(read_on(model, got.prefix, TEXT), want)


@pytest.mark.parametrize("method", ["h2o", "snapkv"])
def test_a_question_moves_scores_and_is_not_in_the_cache(tiny_model, method):
    model, whole = tiny_model(dtype=DOUBLE), kv.prefill(tiny_model(dtype=DOUBLE), IDS).cache
    first, second = (
        evict(model, IDS, METHODS[method], budget=12, question_ids=q) for q in (TEXT, TEXT.flip(1))
    )
    for got in (first, second):
        near(kv.to_tensor(got.prefix.cache), kv.to_tensor(kv.select(whole, got.positions)))
        assert got.prefix.next_position == len(got.prefix.input_ids) == 40
    assert not first.positions.equal(second.positions)
    alone = evict(model, IDS, METHODS[method], budget=12)
    assert not alone.positions.equal(first.positions)


@every_family
def test_eviction_leaves_the_model_as_it_was(tiny_model, family):
    model = tiny_model(family, attn_implementation="eager")
    before = every_byte(model), model(IDS).logits
    evict(model, IDS, snapkv, retention=0.5)
    assert model.config._attn_implementation == "eager"
    assert before[0] == every_byte(model)
    assert before[1].equal(model(IDS).logits)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "Give either retention, a share, or budget"),
        ({"retention": 0.5, "budget": 3}, "Give either retention, a share, or budget"),
        ({"retention": 0.0}, "retention is 0.0, expected a share above 0, at most 1"),
        ({"retention": 1.5}, "retention is 1.5, expected a share above 0, at most 1"),
        ({"retention": float("nan")}, "retention is nan, expected a share"),
        ({"budget": 0}, "budget is 0, expected a whole number from 1"),
        ({"budget": 2.5}, "budget is 2.5, expected a whole number from 1"),
    ],
)
def test_what_cannot_be_kept_is_refused(tiny_model, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        evict(tiny_model(), IDS, key_norm, **options)
    with pytest.raises(ValueError, match=sentence):
        made(tiny_model()).compress(IDS, **options)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (1, 0)])
def test_what_is_not_one_text_is_refused(tiny_model, shape):
    wrong = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=r"input_ids is \(.*expected \(1, T\), one text"):
        evict(tiny_model(), wrong, key_norm, retention=0.5)
    with pytest.raises(ValueError, match=r"input_ids is \(.*expected \(1, T\), one text"):
        made(tiny_model()).compress(wrong, retention=0.5)
    with pytest.raises(ValueError, match=r"expected \(1, [TQ]\)"):
        evict(tiny_model(), IDS, key_norm, retention=0.5, question_ids=wrong)


def test_a_sliding_window_is_refused(tiny_model):
    model = tiny_model("Mistral", sliding_window=8)
    for call in (partial(evict, model, IDS, key_norm, retention=0.5), partial(made, model)):
        with pytest.raises(CacheError, match="use full attention in every layer"):
            call()
    assert model.config._attn_implementation == "sdpa"


# compaction


def greedy(model, prefix, text, steps=6):
    """Greedy ids behind a cache, with every position told."""
    made_ids = []
    for _ in range(steps):
        prefix = kv.prefill(model, text, prefix)
        text = prefix.logits.argmax(-1, keepdim=True)
        made_ids.append(text.item())
    return made_ids


@every_family
@pytest.mark.parametrize("shared", [True, False])
def test_a_block_says_the_same_wherever_it_stands(tiny_model, family, shared):
    model = tiny_model(family, dtype=DOUBLE)
    block = evict(model, IDS, latest, budget=9, shared=shared)
    assert (block.positions == torch.arange(31, 40)).all()
    small = compact(block, rotary_of(model))
    assert small.prefix.next_position == 9
    near(read_on(model, small.prefix, TEXT), read_on(model, block.prefix, TEXT), 1e-4)
    assert greedy(model, small.prefix, TEXT) == greedy(model, block.prefix, TEXT)
    gapped = evict(model, IDS, sinks_recent, budget=9, shared=shared)
    closed = compact(gapped, rotary_of(model))
    assert distance(read_on(model, closed.prefix, TEXT), read_on(model, gapped.prefix, TEXT)) > 0.01


@pytest.mark.parametrize("shared", [True, False])
def test_compact_keys_are_rotated_to_the_first_positions(tiny_model, shared):
    model = tiny_model(dtype=DOUBLE)
    rotary, whole = rotary_of(model), kv.prefill(model, IDS).cache
    got = evict(model, IDS, key_norm, budget=7, shared=shared)
    small = compact(got, rotary)
    unturned = kv.select(kv.unrotate(whole, torch.arange(40), rotary), got.positions)
    near(
        kv.to_tensor(small.prefix.cache),
        kv.to_tensor(kv.rotate(unturned, torch.arange(7), rotary)),
        1e-5,
    )
    assert small.positions.equal(got.positions)
    assert same_cache(got.prefix.cache, kv.select(whole, got.positions))  # as it was


def test_compacting_the_whole_changes_nothing(tiny_model):
    model = tiny_model()
    whole = evict(model, IDS, key_norm, retention=1)
    small = compact(whole, rotary_of(model)).prefix
    near(kv.to_tensor(small.cache), kv.to_tensor(whole.prefix.cache), 1e-6)
    assert small.next_position == 40


@every_family
@pytest.mark.parametrize("shared", [True, False])
def test_generate_takes_a_compact_cache_behind_placeholders(tiny_model, family, shared):
    model = tiny_model(family, dtype=DOUBLE)
    small = compact(evict(model, IDS, key_norm, budget=10, shared=shared), rotary_of(model)).prefix
    prompt = torch.cat([torch.zeros(1, 10, dtype=torch.long), TEXT], 1)
    got = model.generate(
        prompt, past_key_values=kv.clone(small.cache), do_sample=False, max_new_tokens=6
    )
    assert got[0, 16:].tolist() == greedy(model, small, TEXT)


# KV-Distill: what it begins as


def made(model, seed=0, **settings):
    """A distiller as created, small; its score is in the model's precision."""
    torch.manual_seed(seed)
    distiller = KVDistiller(model, **{"layer": 1, "rank": 4, "width": 16} | settings)
    distiller.scorer.to(model.dtype)
    return distiller


def moved(model, seed=0, scale=0.1, **settings):
    """A distiller with random adapters, a marker if there may be one, and scores of all sizes around 0."""
    distiller = made(model, seed, **settings)
    for name, p in distiller.named_parameters():
        if "lora_B" in name or name == "marker":
            p.data.normal_(std=scale)
    distiller.scorer.down.weight.data *= 5
    distiller.scorer.down.bias.data.zero_()
    return distiller


def opened(distiller):
    """With gates that are open altogether: sigma(s) is 1 to the last bit."""
    distiller.scorer.down.bias.data.fill_(1e3)
    return distiller


@every_family
@pytest.mark.parametrize("gate", module.GATES)
@pytest.mark.parametrize("routing", module.ROUTINGS)
def test_it_begins_as_the_model_itself(tiny_model, family, gate, routing):
    model = tiny_model(family)
    distiller = opened(made(model, gate=gate, routing=routing))
    want = kv.prefill(model, IDS)
    got = distiller.compress(IDS, retention=1)
    assert same_cache(got.prefix.cache, want.cache)
    assert got.prefix.next_position == want.next_position
    assert got.positions.tolist() == [list(range(40))]
    assert (got.bias is None) == (gate != "log")
    assert got.bias is None or not got.bias.any()
    logits, target_logits = distiller(IDS, torch.ones_like(IDS), TEXT, 1.0)
    whole = model(torch.cat([IDS, TEXT], 1)).logits[:, 40:]
    near(logits, whole, 1e-4)
    near(target_logits, whole, 1e-4)


def test_a_half_open_gate_is_not_the_model(tiny_model):
    distiller = made(tiny_model())
    assert 0.9 < distiller.scores(IDS).sigmoid().mean() < 0.99  # begins almost open
    logits, target_logits = distiller(IDS, torch.ones_like(IDS), TEXT, 1.0)
    assert distance(logits, target_logits) > 0.01


@every_family
def test_the_model_is_left_as_it_is_and_shared(tiny_model, family):
    model = copy.deepcopy(tiny_model(family))
    before, want, names = (
        every_byte(model),
        model(IDS).logits,
        [name for name, _ in model.named_modules()],
    )
    distiller = moved(model)
    assert distiller.adapted(IDS).logits.ne(want).any()
    assert model(IDS).logits.equal(want)
    assert [name for name, _ in model.named_modules()] == names
    assert every_byte(model) == before
    own, base = (
        dict(model.named_parameters()),
        distiller.adapted.get_base_model().named_parameters(),
    )
    theirs = {name.replace(".base_layer", ""): p for name, p in base if "lora" not in name}
    assert theirs.keys() == own.keys()
    assert all(theirs[name].data_ptr() == p.data_ptr() for name, p in own.items())
    trained = {name.split(".")[0] for name, p in distiller.named_parameters() if p.requires_grad}
    assert trained == {"adapted", "scorer"}
    assert all(
        "lora" in name for name, p in distiller.adapted.named_parameters() if p.requires_grad
    )


def test_adapters_are_rank_stabilized_on_q_k_v_and_o(tiny_model):
    distiller = moved(tiny_model(), rank=4)
    found = {
        name: m
        for name, m in distiller.adapted.get_base_model().named_modules()
        if hasattr(m, "lora_A")
    }
    parts = {f"model.layers.{i}.self_attn.{part}_proj" for i in range(LAYERS) for part in "qkvo"}
    last = f"model.layers.{LAYERS - 1}.self_attn."
    assert found.keys() == parts - {
        f"{last}q_proj",
        f"{last}o_proj",
    }  # which would write nothing that is kept
    for part in found.values():
        assert part.scaling["default"] == pytest.approx(4 / math.sqrt(4))  # alpha / sqrt(r)


def test_scores_are_of_the_frozen_models_states_after_so_many_layers(tiny_model):
    model = tiny_model(dtype=DOUBLE)
    for layer in (1, 2, 3):
        distiller, states = moved(model, layer=layer), []
        hook = model.model.layers[layer - 1].register_forward_hook(
            lambda _, __, out, states=states: states.append(out)
        )
        model(IDS)
        hook.remove()
        near(distiller.scores(IDS), distiller.scorer(states[0]))
        assert not model.model.layers[layer - 1]._forward_hooks


def test_standardized_scores_have_one_mean_and_deviation_and_the_same_order(tiny_model):
    free, distiller = (moved(tiny_model(dtype=DOUBLE), standardize=on) for on in (False, True))
    scores = distiller.scores(IDS)
    near(scores.mean(), torch.tensor(2.0, dtype=DOUBLE), 1e-9)
    near(scores.std(correction=0), torch.tensor(1.0, dtype=DOUBLE), 1e-4)
    assert scores.argsort().equal(free.scores(IDS).argsort())
    distiller.scorer.down.weight.data *= 3
    distiller.scorer.down.bias.data += 7
    near(distiller.scores(IDS), scores, 1e-4)  # no scorer can open all gates
    near(distiller.scores(IDS[:, :1]), torch.full((1, 1), 2.0, dtype=DOUBLE))
    distiller.scorer.down.weight.data.zero_()
    near(distiller.scores(IDS), torch.full(IDS.shape, 2.0, dtype=DOUBLE))


@pytest.mark.parametrize(("layers", "eta"), [(3, 1), (8, 2), (1, 1)])
def test_layers_before_the_scorer_grow_with_depth(tiny_model, layers, eta):
    assert made(tiny_model(num_hidden_layers=layers), layer=None).settings.layer == eta


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gate": "open"}, "gate is 'open', expected one of multiply, log, none"),
        ({"routing": "some"}, "routing is 'some', expected one of conditional, all, embedding"),
        ({"layer": 4}, "layer is 4, but the model has 3 layers: give 1 to 3"),
        ({"layer": 0}, "layer is 0, expected a number from 1"),
        ({"rank": 0}, "rank is 0, expected a number from 1"),
        ({"row": 0}, "row is 0, expected a number from 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny_model, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        made(tiny_model(), **settings)


# routing


def projected(distiller, ids, chosen):
    """(input, output, layer) of every projection with adapters, by name, when a context is compressed."""
    found, hooks = {}, []
    for name, part in distiller.adapted.named_modules():
        if hasattr(part, "lora_A"):
            note = lambda m, inputs, out, name=name: found.update({name: (inputs[0], out, m)})
            hooks.append(part.register_forward_hook(note))
    distiller._adapted(ids, torch.ones_like(ids), chosen)
    for hook in hooks:
        hook.remove()
    return found


@every_family
@pytest.mark.parametrize("routing", module.ROUTINGS)
def test_adapters_of_q_and_o_act_on_chosen_tokens_only(tiny_model, family, routing):
    distiller = moved(tiny_model(family), routing=routing)
    chosen = torch.zeros(1, 40, dtype=torch.bool)
    chosen[0, distiller.compress(IDS, budget=13).positions[0]] = True
    with torch.no_grad():
        found = projected(distiller, IDS, chosen)
    assert len(found) == 4 * LAYERS - 2  # the last layer's q and o write nothing that is kept
    for name, (given, out, part) in found.items():
        with torch.no_grad():
            differs = (out != part.base_layer(given)).any(-1)
        only_chosen = routing == "conditional" and name.endswith(("q_proj", "o_proj"))
        assert differs.equal(chosen if only_chosen else torch.ones_like(chosen)), name


def test_routing_ends_with_its_context(tiny_model):
    distiller = moved(tiny_model())
    want = distiller.adapted(IDS).logits

    def break_off():
        with routed(distiller.adapted, torch.zeros(1, 40)):
            assert distiller.adapted(IDS).logits.ne(want).any()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert distiller.adapted(IDS).logits.equal(want)


def test_a_marker_marks_kept_tokens(tiny_model):
    distiller = opened(moved(tiny_model(dtype=DOUBLE), routing="embedding"))
    got = distiller.compress(IDS, budget=13)
    words = distiller.model.get_input_embeddings()(IDS)
    words[0, got.positions[0]] += distiller.marker
    cache = distiller.adapted(inputs_embeds=words).past_key_values
    near(kv.to_tensor(got.prefix.cache), kv.to_tensor(kv.select(cache, got.positions)))
    assert made(tiny_model()).marker is None


# gradients


def gradients(distiller):
    loss_of(distiller, *distiller(IDS, torch.ones_like(IDS), TEXT, 0.4)).backward()
    return {
        name: p.grad
        for name, p in distiller.named_parameters()
        if p.grad is not None and p.grad.any()
    }


def loss_of(distiller, logits, target_logits):
    return losses.kl(logits.log_softmax(-1), target_logits.log_softmax(-1)).mean()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("gate", module.GATES)
@pytest.mark.parametrize("routing", module.ROUTINGS)
def test_gradients_reach_what_is_trained_and_nothing_else(
    tiny_model, gate, routing, implementation
):
    model = tiny_model(attn_implementation=implementation)
    distiller = moved(model, gate=gate, routing=routing)
    found = gradients(distiller)
    assert all(p.requires_grad == (gate != "none") for p in distiller.scorer.parameters())
    assert any(name.startswith("scorer") for name in found) == (gate != "none")
    assert ("marker" in found) == (routing == "embedding")
    reached = {name.split(".")[-4] for name in found if "lora_A" in name}
    assert reached == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name.split(".")[0] for name in found} <= {"adapted", "scorer", "marker"}
    assert all("lora" in name for name in found if name.startswith("adapted"))
    assert all(p.grad is None for p in model.parameters())
    assert all(grad.isfinite().all() for grad in found.values())


def test_new_adapters_get_a_gradient(tiny_model):
    found = gradients(made(tiny_model()))
    assert {name.split(".")[-2] for name in found if "lora" in name} == {"default"}
    assert any("v_proj.lora_B" in name for name in found)
    assert any(name.startswith("scorer.down") for name in found)


# the gate


@every_family
@pytest.mark.parametrize("gate", module.GATES)
def test_gates_act_on_the_logits_of_kept_entries(tiny_model, family, gate):
    model, text = tiny_model(family, dtype=DOUBLE, num_hidden_layers=1), TEXT

    def balanced(gate):
        distiller = moved(model, gate=gate)
        distiller.scorer.down.bias.data -= distiller.scores(IDS).sort().values[0, -8]
        return distiller

    distiller = balanced(gate)
    got = distiller.compress(IDS, budget=13)
    s = got.scores.gather(1, got.positions)[0]
    assert s.min() < -0.1
    assert s.max() > 0.1
    plain = balanced("none").compress(
        IDS, budget=13
    )  # in one layer, gates change no query, key or value
    assert plain.positions.equal(got.positions)
    seen = []
    with observing(model, lambda *what: seen.append(what)):
        read_on(model, plain.prefix, text)
    queries, keys, values, scaling = seen[0]
    keys, values = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (keys, values))
    logits = queries @ keys.mT * scaling
    if gate == "multiply":
        logits[..., :13] *= s.sigmoid()
    if gate == "log":
        logits[..., :13] += s.sigmoid().log()
    causal = torch.cat([torch.zeros(6, 13), torch.full((6, 6), -INF).triu(1)], 1)
    want = ((logits + causal).softmax(-1) @ values).transpose(1, 2).flatten(2)
    mixed = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, given: mixed.append(given[0])
    )
    read_on(model, got.prefix, text, got.bias)
    distiller.read_on(distiller.keep(IDS, torch.ones_like(IDS), torch.tensor([13])), text)
    hook.remove()
    near(mixed[0], want, 1e-8)
    near(mixed[-1].detach(), want, 1e-8)  # in training as in use


@pytest.mark.parametrize("gate", module.GATES)
def test_only_the_log_gate_needs_a_bias(tiny_model, gate):
    got = moved(tiny_model(), gate=gate).compress(IDS, budget=13)
    if gate == "log":
        near(got.bias, F.logsigmoid(got.scores.gather(1, got.positions)), 1e-6)
    else:
        assert got.bias is None


# several contexts at once


def batch_of(*sizes):
    """Contexts padded on the left with ids of their own, a mask, and texts."""
    ids = torch.randint(0, 97, (len(sizes), max(sizes)), generator=torch.Generator().manual_seed(9))
    mask = (torch.arange(max(sizes)) >= max(sizes) - torch.tensor(sizes)[:, None]).long()
    texts = torch.randint(0, 97, (len(sizes), 5), generator=torch.Generator().manual_seed(10))
    return ids, mask, texts


@every_family
@pytest.mark.parametrize("gate", module.GATES)
@pytest.mark.parametrize("row", [1536, 8], ids=["one row", "folded"])
@pytest.mark.parametrize("standardize", [False, True], ids=["free", "standardized"])
def test_a_batch_is_its_contexts_one_by_one(tiny_model, family, gate, row, standardize):
    distiller = moved(tiny_model(family, dtype=DOUBLE), gate=gate, row=row, standardize=standardize)
    sizes = (21, 40, 3, 8)
    ids, mask, texts = batch_of(*sizes)
    together = distiller(ids, mask, texts, 0.3)
    kept = distiller.keep(ids, mask, torch.tensor([round(0.3 * n) for n in sizes]))
    for i, size in enumerate(sizes):
        own = ids[i : i + 1, -size:]
        alone = distiller(own, torch.ones_like(own), texts[i : i + 1], 0.3)
        near(together[0][i], alone[0][0], 1e-6)
        near(together[1][i], alone[1][0], 1e-6)
        single, real = distiller.compress(own, retention=0.3), kept.bias[i] > -INF
        assert kept.positions[i][real].tolist() == single.positions[0].tolist()
        near(read_on(distiller.model, single.prefix, texts[i : i + 1], single.bias), alone[0], 1e-6)
        near(kept.scores[i, -size:], single.scores[0], 1e-6)


@pytest.mark.parametrize("retention", [0.01, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("sinks", [0, 4])
def test_each_context_keeps_its_share_sinks_first_then_the_best(tiny_model, retention, sinks):
    distiller = moved(tiny_model(), sinks=sinks)
    sizes = (21, 40, 3, 8)
    ids, mask, texts = batch_of(*sizes)
    given, read = [], distiller.read_on
    distiller.read_on = lambda kept, text: given.append(kept) or read(kept, text)
    distiller(ids, mask, texts, retention)
    (kept,) = given
    assert kept.lengths.tolist() == list(sizes)
    for i, size in enumerate(sizes):
        count = max(1, round(retention * size))
        places = kept.positions[i][kept.bias[i] > -INF].tolist()
        assert (
            len(places)
            == count
            == distiller.compress(ids[i : i + 1, -size:], retention=retention).positions.numel()
        )
        assert places == sorted(set(places))
        first = set(range(sinks))
        scores = kept.scores[i, -size:].tolist()
        ranked = sorted(range(size), key=lambda j: (j not in first, -scores[j]))
        assert places == sorted(sorted(first)[:count] if count < sinks else ranked[:count])


def test_what_stands_in_the_padding_does_not_matter(tiny_model):
    distiller = moved(tiny_model(dtype=DOUBLE), row=8)
    ids, mask, texts = batch_of(21, 40)
    near(
        distiller(ids, mask, texts, 0.4)[0],
        distiller(ids.masked_fill(mask == 0, 5), mask, texts, 0.4)[0],
        1e-12,
    )


def test_reading_on_leaves_what_was_kept(tiny_model):
    distiller = moved(tiny_model())
    kept = distiller.keep(IDS, torch.ones_like(IDS), torch.tensor([9]))
    first = distiller.read_on(kept, TEXT)
    assert kv.length(kept.cache) == 9
    assert distiller.read_on(kept, TEXT).equal(first)


# long contexts


@pytest.mark.parametrize("routing", module.ROUTINGS)
@pytest.mark.parametrize("size", [16, 20, 24, 17])
def test_a_long_context_is_read_in_rows_at_their_positions(tiny_model, routing, size):
    distiller, row, ids = (
        moved(tiny_model(dtype=DOUBLE), row=8, routing=routing, gate="none"),
        8,
        IDS[:, :size],
    )
    got = distiller.compress(ids, retention=0.5)
    chosen = torch.zeros(1, size, dtype=torch.bool)
    chosen[0, got.positions[0]] = True
    caches, scores, starts = (
        [],
        [],
        [0, *range(size % row or row, size, row)],
    )  # the first is the shorter one
    for start, stop in itertools.pairwise([*starts, size]):
        part, places = ids[:, start:stop], torch.arange(start, stop)[None]
        words = distiller.model.get_input_embeddings()(part)
        if routing == "embedding":
            words = words + chosen[:, start:stop, None] * distiller.marker
        only = chosen[:, start:stop] if routing == "conditional" else torch.ones_like(part)
        with routed(distiller.adapted, only), torch.no_grad():
            caches.append(
                distiller.adapted(inputs_embeds=words, position_ids=places).past_key_values
            )
        states = distiller.model(part, position_ids=places, output_hidden_states=True).hidden_states
        scores.append(distiller.scorer(states[1]))
    whole = functools.reduce(kv.join, caches)
    near(kv.to_tensor(got.prefix.cache), kv.to_tensor(kv.select(whole, got.positions)), 1e-6)
    near(got.scores, torch.cat(scores, 1), 1e-6)
    assert got.prefix.next_position == size


def test_rows_do_not_see_one_another(tiny_model):
    distiller, other = opened(moved(tiny_model(dtype=DOUBLE), row=8)), IDS.clone()
    other[0, 18] = (other[0, 18] + 1) % 97  # in the third row of five
    one, two = (
        kv.to_tensor(distiller.compress(ids, retention=1).prefix.cache) for ids in (IDS, other)
    )
    differs = (one != two).any(-1)[-1].flatten(0, 2).any(0)  # in the last layer
    assert differs.nonzero().flatten().tolist() == list(range(18, 24))
    differs = (distiller.scores(IDS) != distiller.scores(other))[0]
    assert differs.nonzero().flatten().tolist() == list(range(18, 24))


@pytest.mark.parametrize("size", [7, 8])
def test_a_context_of_a_row_is_not_folded(tiny_model, size):
    folds, whole = (moved(tiny_model(), row=row) for row in (8, 1536))
    one, two = (d.compress(IDS[:, :size], retention=0.6) for d in (folds, whole))
    assert one.positions.equal(two.positions)
    assert one.scores.equal(two.scores)
    assert same_cache(one.prefix.cache, two.prefix.cache)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_of_padding_spoil_no_gradient(tiny_model, implementation):
    distiller = moved(tiny_model(attn_implementation=implementation), row=8)
    ids, mask, texts = batch_of(3, 40, 9, 1)
    loss_of(distiller, *distiller(ids, mask, texts, 0.3)).backward()
    found = [p.grad for p in distiller.parameters() if p.grad is not None]
    assert found
    assert all(grad.isfinite().all() for grad in found)


# files


@pytest.fixture
def on_disk(tiny_model, tmp_path):
    """A random model that comes from a folder."""
    tiny_model().save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()


@pytest.mark.parametrize(
    "settings",
    [{}, {"gate": "log", "routing": "embedding"}, {"row": 8, "layer": 2, "standardize": True}],
    ids=str,
)
def test_a_saved_distiller_is_the_same(tiny_model, tmp_path, settings):
    distiller = moved(tiny_model(), **settings)
    distiller.save_pretrained(tmp_path / "saved")
    again = KVDistiller.from_pretrained(tmp_path / "saved", tiny_model())
    assert again.settings == distiller.settings
    ids, mask, texts = batch_of(21, 40)
    assert again(ids, mask, texts, 0.3)[0].equal(distiller(ids, mask, texts, 0.3)[0])
    learns = [
        {name for name, p in d.named_parameters() if p.requires_grad} for d in (distiller, again)
    ]
    assert learns[0] == learns[1]


def test_peft_reads_the_adapters_by_itself(tiny_model, tmp_path):
    distiller = moved(tiny_model())
    distiller.save_pretrained(tmp_path)
    adapted = PeftModel.from_pretrained(copy.deepcopy(tiny_model()), tmp_path)
    near(adapted(IDS).logits, distiller.adapted(IDS).logits, 0)
    merged = dict(adapted.merge_and_unload().named_modules())
    for name, part in distiller.adapted.get_base_model().named_modules():
        if name.endswith(("k_proj", "v_proj")):
            near(
                merged[name].weight, part.base_layer.weight + part.get_delta_weight("default"), 1e-6
            )


def test_files_hold_no_code_and_no_path_and_need_no_network(
    on_disk, tmp_path, monkeypatch, recwarn
):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", refuse)
    distiller = moved(on_disk)
    for _ in range(2):
        assert distiller.save_pretrained(tmp_path / "saved") == tmp_path / "saved"
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    files = sorted((tmp_path / "saved").iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors", "kvdistill.json"} <= {
        file.name for file in files
    }
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".md"}
    for file in files:
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    assert (
        json.loads((tmp_path / "saved/adapter_config.json").read_text())["base_model_name_or_path"]
        == "base"
    )


def test_another_model_is_refused_and_other_weights_are_told(tiny_model, tmp_path):
    moved(tiny_model()).save_pretrained(tmp_path)
    for changes, field in (
        ({"family": "Llama"}, "model_type"),
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
    ):
        with pytest.raises(
            ValueError, match=rf"trained for another model \(.*{field} is .* in the file and"
        ):
            KVDistiller.from_pretrained(tmp_path, tiny_model(**changes))
    with pytest.raises(ValueError, match=r"trained for another model .*rope type"):
        KVDistiller.from_pretrained(tmp_path, tiny_model(rope="linear"))
    with pytest.warns(UserWarning, match="trained for other weights of this model"):
        KVDistiller.from_pretrained(tmp_path, tiny_model(seed=1))


@pytest.mark.parametrize("name", ["adapter_config.json", "scorer.safetensors", "kvdistill.json"])
def test_a_missing_file_is_named(tiny_model, tmp_path, name):
    made(tiny_model()).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(
        ValueError, match=f"has no {name}: give a folder that `save_pretrained` wrote"
    ):
        KVDistiller.from_pretrained(tmp_path, tiny_model())


# training


def lessons(n=4, weights=(0.0, 0.0, 1.0, 1.0, 1.0, 1.0)):
    ids = torch.randint(0, 97, (n, 26), generator=torch.Generator().manual_seed(11))
    return [Example(row[i % 3 : 20], row[20:], torch.tensor(weights)) for i, row in enumerate(ids)]


QUICK = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "retention": (0.2, 0.6)}


def trained(distiller):
    return {name: p.detach().clone() for name, p in distiller.named_parameters() if p.requires_grad}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@every_family
def test_it_learns_and_the_model_does_not(tiny_model, family):
    model = copy.deepcopy(tiny_model(family))
    before, distiller = every_byte(model), made(model)
    history = train(distiller, lessons(), **QUICK | {"steps": 15, "retention": (0.4, 0.4)})
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    assert every_byte(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_the_loss_is_both_divergences_on_weighed_tokens(tiny_model):
    distiller, weights = moved(tiny_model()), (0.5, 0.25, 1.0, 0.0, 1.0, 1.0)
    examples = lessons(weights=weights)
    want = {"kl": 0.0, "reverse_kl": 0.0}
    for context, text, _ in examples:
        kept = distiller.compress(context[None], retention=0.4)
        q = read_on(distiller.model, kept.prefix, text[None], kept.bias)[0].log_softmax(-1)
        p = (
            distiller.model(torch.cat([context, text])[None])
            .logits[0, -len(text) :]
            .log_softmax(-1)
        )
        for t in range(1, len(text)):  # the first token is said by the context
            share = weights[t] / sum(weights[1:]) / len(examples)
            want["kl"] += 0.6 * share * (p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum().item()
            want["reverse_kl"] += (
                0.4 * share * (q[t - 1].exp() * (q[t - 1] - p[t - 1])).sum().item()
            )
    first, *_ = train(distiller, examples, **QUICK | {"steps": 1, "retention": (0.4, 0.4)})
    assert first["kl"] == pytest.approx(want["kl"], rel=1e-4)
    assert first["reverse_kl"] == pytest.approx(want["reverse_kl"], rel=1e-4)
    assert first["weight"] == pytest.approx(4 * sum(weights[1:]))
    for share, names in ((1.0, {"kl"}), (0.0, {"reverse_kl"})):
        first, *_ = train(
            moved(tiny_model()), examples, **QUICK | {"steps": 1, "forward_share": share}
        )
        assert first.keys() & {"kl", "reverse_kl"} == names


def test_batches_keep_shares_drawn_evenly_on_a_logarithmic_scale(tiny_model):
    distiller, drawn = made(tiny_model()), []
    forward = distiller.forward
    distiller.forward = lambda *args: drawn.append(args[3]) or forward(*args)
    train(distiller, lessons(), **QUICK | {"steps": 60, "batch_size": 1, "retention": (0.01, 0.81)})
    assert 0.01 <= min(drawn) < 0.02
    assert 0.4 < max(drawn) <= 0.81
    assert 0.3 < sum(share < 0.09 for share in drawn) / 60 < 0.7  # 0.09: the geometric mean


def test_a_seed_is_a_distiller(tiny_model):
    one, two, other = (made(tiny_model()) for _ in range(3))
    for distiller, seed in ((one, 1), (two, 1), (other, 2)):
        train(distiller, lessons(8), **QUICK | {"steps": 3}, seed=seed)
    assert equal(trained(one), trained(two))
    assert not equal(trained(one), trained(other))


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(tiny_model, tmp_path):
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    def run(file, distiller):
        history = train(distiller, lessons(8), **QUICK, checkpoint=tmp_path / file, every=2)
        return distiller, [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]

    want, history = run("whole.safetensors", made(tiny_model()))
    stopped = made(tiny_model())
    stopped.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("stopped.safetensors", stopped)
    got, resumed = run("stopped.safetensors", made(tiny_model()))
    assert resumed == history
    assert equal(trained(got), trained(want))


def test_the_model_teaches_and_reads_without_dropout(tiny_model):
    model = tiny_model(attention_dropout=0.5)
    distiller, batch = made(model), batch_of(21, 40)
    distiller.train()
    assert distiller(*batch, 0.3)[1].equal(distiller(*batch, 0.3)[1])
    assert not model.training


# examples


@pytest.fixture(scope="session")
def tokenizer():
    return lab.load_tokenizer("lab-target")


PASSAGE, TURNS = (
    "Anna lives in Rome. Ben has a dog.",
    [("Where does Anna live?", "Rome"), ("Who has a dog?", "Ben")],
)


def chat(question, answer=None):
    messages = [{"role": "system", "content": PASSAGE}, {"role": "user", "content": question}]
    return messages + ([] if answer is None else [{"role": "assistant", "content": answer}])


def test_one_turn_is_the_chat_template(tokenizer):
    for turn in TURNS:
        got = example(tokenizer, PASSAGE, [turn])
        whole = tokenizer.apply_chat_template(chat(*turn), return_dict=True)["input_ids"]
        assert [*got.context.tolist(), *got.text.tolist()] == whole
        context = tokenizer.apply_chat_template(chat(*turn)[:1], return_dict=True)["input_ids"]
        assert got.context.tolist() == context


@pytest.mark.parametrize("instruction", [0.0, 0.1])
def test_answers_and_their_ends_count_and_questions_as_told(tokenizer, instruction):
    got = example(tokenizer, PASSAGE, TURNS, instruction)
    parts = [example(tokenizer, PASSAGE, [turn], instruction) for turn in TURNS]
    assert got.text.equal(torch.cat([part.text for part in parts]))
    assert got.weights.equal(torch.cat([part.weights for part in parts]))
    assert all(got.context.equal(part.context) for part in parts)
    for (question, answer), part in zip(TURNS, parts, strict=True):
        asked = tokenizer.apply_chat_template(
            chat(question), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        size = len(asked) - len(part.context)
        assert part.weights.tolist() == pytest.approx(
            [instruction] * size + [1.0] * (len(part.text) - size)
        )
        assert tokenizer.decode(part.text[size:]) == f" {answer}<|end|>"


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_question_tokens_are_learned_from_if_they_count(tiny_model, weight):
    first = lessons(2, weights=[weight] * 3 + [1.0] * 3)
    second = [
        e._replace(text=e.text.index_fill(0, torch.tensor([5]), 7)) for e in first
    ]  # the last is never read
    results = [
        train(moved(tiny_model()), e, **QUICK | {"steps": 1, "batch_size": 2})[0]
        for e in (first, second)
    ]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"])
    assert results[0]["weight"] == (2 * 5 if weight else 2 * 3)
    plain = lessons(2, weights=[0.0] * 3 + [1.0] * 3)
    unweighed = train(moved(tiny_model()), plain, **QUICK | {"steps": 1, "batch_size": 2})
    assert (results[0]["loss"] == pytest.approx(unweighed[0]["loss"])) == (weight == 0)


def test_a_template_that_changes_what_was_said_is_refused(tokenizer):
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = (
        "{% for m in messages %}{% if loop.last %}* {% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(
        ValueError, match="chat template changes a system message when another follows it"
    ):
        example(forgetful, PASSAGE, TURNS)


def test_a_context_without_turns_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"turn|question"):
        example(tokenizer, PASSAGE, [])


def test_examples_are_made_when_they_are_asked_for(tokenizer):
    asked = []

    class Readings:
        def __len__(self):
            return 1_000_000

        def __getitem__(self, index):
            asked.append(index)
            return PASSAGE, TURNS

    many = Examples(tokenizer, Readings(), instruction=0.25)
    assert len(many) == 1_000_000
    assert not asked
    got, want = many[777_777], example(tokenizer, PASSAGE, TURNS, 0.25)
    assert asked == [777_777]
    assert all(map(torch.equal, got, want))


def test_a_batch_pads_contexts_on_the_left_and_texts_on_the_right():
    short = Example(torch.tensor([5, 6]), torch.tensor([7]), torch.tensor([1.0]))
    long = Example(torch.tensor([1, 2, 3]), torch.tensor([8, 9, 10]), torch.tensor([0.0, 0.5, 1.0]))
    batch = collate([short, long])
    assert batch["context"].tolist() == [[0, 5, 6], [1, 2, 3]]
    assert batch["context_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch["text"].tolist() == [[7, 0, 0], [8, 9, 10]]
    assert batch["weights"].tolist() == [[1, 0, 0], [0, 0.5, 1]]
