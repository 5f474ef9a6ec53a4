"""The laws of eviction: scores are those of their papers, and evicted entries are gone."""

import copy
import functools
import itertools
import math
from functools import partial

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
    every_byte,
    every_family,
    near,
    read_on,
    same_cache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlab import cache as kv
from kvlab.compress import (
    METHODS,
    Attention,
    capture_attention,
    compact,
    count_kept,
    evict,
    generate_within,
    h2o,
    key_norm,
    random,
    score_entries,
    sinks_recent,
    snapkv,
)
from kvlab.models import CacheError, rotary_of
from kvlab.speculate import generate

every_method = pytest.mark.parametrize("method", METHODS)
with_or_without_a_question = pytest.mark.parametrize("question", [0, 6])


def latest(attention, budget):
    keys = attention.keys
    return torch.arange(attention.context).expand(*keys.shape[:2], -1).to(keys)


# scores


@functools.cache
def attention_of(model, context, total):
    """For each layer: its Attention for the first `total` ids, eager attention weights, its keys."""
    layers = []
    with capture_attention(model, lambda *layer: layers.append(Attention(*layer, context))):
        cache = kv.prefill(model, IDS[:, :total]).cache
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    weights = eager(IDS[:, :total], output_attentions=True).attentions
    weights = [layer[0].tolist() for layer in weights]
    return list(zip(layers, weights, [layer.keys[0] for layer in cache.layers], strict=True))


def group_of(head):
    return head // (HEADS // GROUPS)


def heads_of(group):
    return [head for head in range(HEADS) if group_of(head) == group]


def looped_h2o(weights, keys, context, budget):
    total = len(weights[0])
    scores = [[0.0] * context for _ in range(GROUPS)]
    for head, j in itertools.product(range(HEADS), range(context)):
        for i in range(total):
            scores[group_of(head)][j] += weights[head][i][j]
    return [[INF if j >= context - budget // 2 else s for j, s in enumerate(row)] for row in scores]


def looped_snapkv(weights, keys, context, budget, window_size=32, kernel_size=5):
    total = len(weights[0])
    window_size = min(window_size, total - context or max(1, budget // 2))
    before = min(context, total - window_size)
    scores = []
    for group in range(GROUPS):
        votes = [0.0] * before
        for head, j in itertools.product(heads_of(group), range(before)):
            for i in range(total - window_size, total):
                votes[j] += weights[head][i][j] / len(heads_of(group))
        pooled = []
        for j in range(before):
            window = range(j - kernel_size // 2, j + kernel_size // 2 + 1)
            neighbors = [votes[n] for n in window if 0 <= n < before]
            pooled.append(sum(neighbors) / kernel_size)
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
    "h2o in chunks": (partial(h2o, chunk_size=3), looped_h2o),
    "snapkv": (snapkv, looped_snapkv),
    "snapkv, sharp": (
        partial(snapkv, window_size=4, kernel_size=1),
        partial(looped_snapkv, window_size=4, kernel_size=1),
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
    model = tiny_model("Llama", dtype=DOUBLE)
    for attention, weights, keys in attention_of(model, context, context + question):
        scores = method(attention, budget)
        expected = torch.tensor(loop(weights, keys, context, budget), dtype=DOUBLE)
        assert scores.shape == (1, GROUPS, context)
        assert scores.isinf().sum(-1).max() <= budget  # else chance decides which of them are kept
        near(scores[0].double(), expected, 1e-5)


def test_all_heads_of_a_group_count_and_none_of_another(tiny_model):
    (attention, _, _), *_ = attention_of(tiny_model("Llama", dtype=DOUBLE), 14, 14)
    for method, head in itertools.product((partial(h2o, chunk_size=5), snapkv), range(HEADS)):
        queries = attention.queries.clone()
        queries[:, head] *= -3
        change = method(attention._replace(queries=queries), 4) - method(attention, 4)
        moved = change.nan_to_num().abs().amax((0, 2)) > 1e-4
        assert moved.tolist() == [group == group_of(head) for group in range(GROUPS)]


def test_random_scores_differ_by_head_and_call_and_follow_the_seed(tiny_model):
    (attention, _, _), *_ = attention_of(tiny_model("Llama", dtype=DOUBLE), 14, 20)
    torch.manual_seed(5)
    one, two = random(attention, 3), random(attention, 3)
    torch.manual_seed(5)
    assert random(attention, 3).equal(one)
    assert one.shape == (1, GROUPS, 14)
    assert not one.equal(two)
    assert not one[0, 0].equal(one[0, 1])


# attention capture


@every_family
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_capture_changes_nothing_and_gets_what_layers_compute(tiny_model, family, implementation):
    model = tiny_model(family, dtype=DOUBLE, attn_implementation=implementation)
    plain, layers = kv.prefill(model, IDS), []
    names = set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)
    with capture_attention(model, lambda *layer: layers.append(Attention(*layer, 40))):
        captured = kv.prefill(model, IDS)
    near(captured.logits, plain.logits, 0 if implementation == "sdpa" else 1e-4)
    assert len(layers) == LAYERS
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    weights = eager(IDS, output_attentions=True).attentions
    later = torch.ones(40, 40).triu(1).bool()
    for entries, layer, expected in zip(captured.cache.layers, layers, weights, strict=True):
        assert layer.keys.equal(entries.keys)
        assert layer.values.equal(entries.values)
        keys = layer.keys.repeat_interleave(HEADS // GROUPS, 1)
        logits = layer.queries @ keys.mT * layer.scaling
        near(logits.masked_fill(later, -INF).softmax(-1), expected, 1e-6)
    assert model.config._attn_implementation == implementation
    assert (set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)) == names


@every_family
def test_capture_keeps_the_mask_of_a_prefix_and_of_padding(tiny_model, family):
    model, mask = tiny_model(family, dtype=DOUBLE), torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    before, rows = kv.prefill(model, IDS[:, :25]), IDS.repeat(2, 1)
    after, padded = (
        kv.prefill(model, IDS[:, 25:], before),
        kv.prefill(model, rows, attention_mask=mask),
    )
    with capture_attention(model, lambda *_: None):
        captured = kv.prefill(model, IDS[:, 25:], before)
        assert same_cache(captured.cache, after.cache)
        assert same_cache(kv.prefill(model, rows, attention_mask=mask).cache, padded.cache)


def test_capture_is_undone_after_an_exception(tiny_model):
    model = tiny_model()
    names = set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)
    expected = model(IDS).logits

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), capture_attention(model, fail):
        model(IDS)
    assert (set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)) == names
    assert model.config._attn_implementation == "sdpa"
    assert model(IDS).logits.equal(expected)


# eviction


def test_a_fraction_is_rounded_and_at_least_one_and_a_number_at_most_all():
    fractions = [0.001, 0.06, 0.26, 0.34, 0.99, 1]
    assert [count_kept(10, retention=r) for r in fractions] == [1, 1, 3, 3, 10, 10]
    assert [count_kept(10, budget=b) for b in (1, 9, 10, 11)] == [1, 9, 10, 10]


@every_family
@every_method
def test_full_retention_is_the_full_cache(tiny_model, family, method):
    model = tiny_model(family)
    full = kv.prefill(model, IDS)
    for options in ({"retention": 1.0}, {"budget": 99, "scope": "token"}):
        prefix = evict(model, IDS, METHODS[method], **options)
        assert same_cache(prefix.cache, full.cache)
        assert prefix.next_position == full.next_position == 40
        assert prefix.input_ids == IDS[0].tolist()


@every_method
@pytest.mark.parametrize("scope", ["token", "head"])
@with_or_without_a_question
def test_the_best_of_each_head_are_kept_and_nothing_else_is_in_memory(
    tiny_model, method, scope, question
):
    model = tiny_model("Llama")
    full, question_ids = kv.prefill(model, IDS).cache, TEXT[:, :question] if question else None
    for k, options in ((1, {"budget": 1}), (10, {"retention": 0.26}), (17, {"budget": 17})):
        options |= {"question_ids": question_ids, "scope": scope}
        torch.manual_seed(1)
        prefix = evict(model, IDS, METHODS[method], **options)
        torch.manual_seed(1)
        scores, _ = score_entries(model, IDS, METHODS[method], k, question_ids)
        assert scores.shape == (LAYERS, 1, GROUPS, 40)
        scores = scores.mean((0, 2)) if scope == "token" else scores
        assert prefix.positions.shape == (*scores.shape[:-1], k)
        rows = zip(prefix.positions.reshape(-1, k), scores.reshape(-1, 40), strict=True)
        for positions, row in rows:
            ranked = sorted(range(40), key=lambda j: (-row[j].item(), j))
            assert positions.tolist() == sorted(set(positions.tolist()))
            assert sorted(row[positions].tolist()) == sorted(row[ranked[:k]].tolist())
        for layer, group in itertools.product(range(LAYERS), range(GROUPS)):
            positions = (
                prefix.positions[0] if scope == "token" else prefix.positions[layer, 0, group]
            )
            for name in ("keys", "values"):
                entries = getattr(prefix.cache.layers[layer], name)
                expected = getattr(full.layers[layer], name)[0, group, positions]
                near(entries[0, group], expected, 1e-5)
                assert entries.untyped_storage().nbytes() == entries.nbytes
        assert kv.nbytes(prefix.cache) * 40 == kv.nbytes(full) * k
        assert prefix.next_position == len(prefix.input_ids) == 40


@pytest.mark.parametrize("method", ["random", "key_norm", "h2o", "snapkv"])
def test_each_head_keeps_entries_of_its_own(tiny_model, method):
    prefix = evict(tiny_model("Llama"), IDS, METHODS[method], budget=10)
    rows = prefix.positions[:, 0].flatten(0, 1).tolist()
    assert len({tuple(row) for row in rows}) == LAYERS * GROUPS


@every_family
@pytest.mark.parametrize("method", ["snapkv", "key_norm"])
def test_an_evicted_cache_is_the_whole_text_with_the_evicted_hidden(tiny_model, family, method):
    model = tiny_model(family, dtype=DOUBLE)
    prefix = evict(model, IDS, METHODS[method], budget=11, scope="token")
    hidden = torch.ones(40).index_fill(0, prefix.positions[0], 0).bool()
    mask = torch.full((46, 46), -INF, dtype=DOUBLE).triu(1)
    mask[40:, :40] = mask[40:, :40].masked_fill(hidden, -INF)
    text = torch.cat([IDS, TEXT], 1)
    expected = model(text, attention_mask=mask[None, None]).logits[:, 40:]
    near(read_on(model, prefix, TEXT), expected)
    assert distance(model(text).logits[:, 40:], expected) > 0.1


def test_each_heads_own_evicted_entries_are_hidden(tiny_model):
    model = tiny_model(dtype=DOUBLE, num_hidden_layers=1)  # where a mask per head can hide them
    prefix = evict(model, IDS, key_norm, budget=11)
    mask = torch.full((HEADS, 46, 46), -INF, dtype=DOUBLE).triu(1)
    for head in range(HEADS):
        positions = prefix.positions[0, 0, group_of(head)]
        hidden = torch.ones(40).index_fill(0, positions, 0).bool()
        mask[head, 40:, :40] = mask[head, 40:, :40].masked_fill(hidden, -INF)
    expected = model(torch.cat([IDS, TEXT], 1), attention_mask=mask[None]).logits[:, 40:]
    near(read_on(model, prefix, TEXT), expected)


@pytest.mark.parametrize("method", ["h2o", "snapkv"])
def test_a_question_changes_scores_and_is_not_in_the_cache(tiny_model, method):
    model = tiny_model(dtype=DOUBLE)
    full = kv.prefill(model, IDS).cache
    prefixes = []
    for question_ids in (None, TEXT, TEXT.flip(1)):
        prefix = evict(model, IDS, METHODS[method], budget=12, question_ids=question_ids)
        near(kv.to_tensor(prefix.cache), kv.to_tensor(kv.select(full, prefix.positions)))
        assert prefix.next_position == len(prefix.input_ids) == 40
        prefixes.append(prefix)
    for one, two in itertools.combinations(prefixes, 2):
        assert not one.positions.equal(two.positions)


@every_family
def test_eviction_leaves_the_model_as_it_was(tiny_model, family):
    model = tiny_model(family, attn_implementation="eager")
    before, logits = every_byte(model), model(IDS).logits
    evict(model, IDS, snapkv, retention=0.5)
    assert model.config._attn_implementation == "eager"
    assert before == every_byte(model)
    assert logits.equal(model(IDS).logits)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "Give either retention, a fraction, or budget"),
        ({"retention": 0.5, "budget": 3}, "Give either retention, a fraction, or budget"),
        ({"retention": 0.0}, r"retention is 0.0, expected a fraction in \(0, 1\]"),
        ({"retention": 1.5}, r"retention is 1.5, expected a fraction in \(0, 1\]"),
        ({"retention": float("nan")}, "retention is nan, expected a fraction"),
        ({"budget": 0}, "budget is 0, expected a positive integer"),
    ],
)
def test_an_impossible_size_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        count_kept(40, **options)


@pytest.mark.parametrize("shape", [(5,), (2, 1, 5), (1, 0)])
def test_anything_but_texts_of_one_length_is_refused(tiny_model, shape):
    with pytest.raises(
        ValueError, match=r"input_ids is \(.*expected \(B, T\): texts of one length"
    ):
        evict(tiny_model(), torch.zeros(shape, dtype=torch.long), key_norm, retention=0.5)


def test_a_text_longer_than_the_models_positions_is_refused_at_once_and_read_in_chunks(tiny_model):
    model, ids = tiny_model(), IDS.repeat(1, 7)[:, :257]
    with pytest.raises(
        ValueError, match="257 tokens and entries at once, the model reads up to 256"
    ):
        evict(model, ids, key_norm, retention=0.5)
    with pytest.raises(ValueError, match="The text has 257 tokens, the model reads up to 256"):
        score_entries(model, ids, key_norm, 9)
    for options in ({"retention": 1.0}, {"budget": 160}):
        with pytest.raises(ValueError, match="give a smaller chunk_size or budget"):
            evict(model, ids, key_norm, chunk_size=100, **options)


def test_a_sliding_window_is_refused(tiny_model):
    model = tiny_model("Mistral", sliding_window=8)
    with pytest.raises(CacheError, match="use full attention in every layer"):
        evict(model, IDS, key_norm, retention=0.5)
    assert model.config._attn_implementation == "sdpa"


# compaction


def greedy(model, prefix, text, steps=6):
    """Greedy ids after a cache."""
    ids = []
    for _ in range(steps):
        prefix = kv.prefill(model, text, prefix)
        text = prefix.logits.argmax(-1, keepdim=True)
        ids.append(text.item())
    return ids


@every_family
@pytest.mark.parametrize("scope", ["token", "head"])
def test_a_block_says_the_same_at_any_position(tiny_model, family, scope):
    model = tiny_model(family, dtype=DOUBLE)
    block = evict(model, IDS, latest, budget=9, scope=scope)
    assert (block.positions == torch.arange(31, 40)).all()
    small = compact(block)
    assert small.next_position == 9
    near(read_on(model, small, TEXT), read_on(model, block, TEXT), 1e-4)
    assert greedy(model, small, TEXT) == greedy(model, block, TEXT)
    gapped = evict(model, IDS, sinks_recent, budget=9, scope=scope)
    assert distance(read_on(model, compact(gapped), TEXT), read_on(model, gapped, TEXT)) > 0.01


@pytest.mark.parametrize("scope", ["token", "head"])
def test_compact_keys_are_rotated_to_the_first_positions(tiny_model, scope):
    model = tiny_model(dtype=DOUBLE)
    rotary, full = rotary_of(model), kv.prefill(model, IDS).cache
    prefix = evict(model, IDS, key_norm, budget=7, scope=scope)
    small = compact(prefix)
    unrotated = kv.select(kv.unrotate(full, torch.arange(40), rotary), prefix.positions)
    expected = kv.rotate(unrotated, torch.arange(7), rotary)
    near(kv.to_tensor(small.cache), kv.to_tensor(expected), 1e-5)
    assert small.positions.tolist() == [list(range(7))]
    assert same_cache(prefix.cache, kv.select(full, prefix.positions))  # unchanged


def test_compacting_a_full_cache_changes_nothing(tiny_model):
    full = evict(tiny_model(), IDS, key_norm, retention=1)
    small = compact(full)
    near(kv.to_tensor(small.cache), kv.to_tensor(full.cache), 1e-6)
    assert small.next_position == 40


@every_family
@pytest.mark.parametrize("scope", ["token", "head"])
def test_generate_takes_a_compact_cache_with_placeholders(tiny_model, family, scope):
    model = tiny_model(family, dtype=DOUBLE)
    small = compact(evict(model, IDS, key_norm, budget=10, scope=scope))
    prompt = torch.cat([torch.zeros(1, 10, dtype=torch.long), TEXT], 1)
    past = kv.clone(small.cache)
    ids = model.generate(prompt, past_key_values=past, do_sample=False, max_new_tokens=6)
    assert ids[0, 16:].tolist() == greedy(model, small, TEXT)


# chunks


@every_method
@pytest.mark.parametrize("scope", ["token", "head"])
@with_or_without_a_question
def test_one_chunk_is_plain_eviction(tiny_model, method, scope, question):
    model, question_ids = tiny_model(), TEXT[:, :question] if question else None
    options = {"budget": 12, "scope": scope, "question_ids": question_ids}
    prefixes = []
    for chunk_size in (None, 40, 99):
        torch.manual_seed(1)
        prefixes.append(evict(model, IDS, METHODS[method], chunk_size=chunk_size, **options))
    for prefix in prefixes[1:]:
        assert same_cache(prefix.cache, prefixes[0].cache)
        assert prefix.positions.equal(prefixes[0].positions)


@every_family
@every_method
@pytest.mark.parametrize("size", [1, 7])
def test_full_retention_in_chunks_is_the_full_cache(tiny_model, family, method, size):
    model = tiny_model(family, dtype=DOUBLE)
    prefix = evict(model, IDS, METHODS[method], retention=1.0, chunk_size=size)
    full = kv.prefill(model, IDS)
    near(kv.to_tensor(prefix.cache), kv.to_tensor(full.cache))
    near(read_on(model, prefix, TEXT), read_on(model, full, TEXT))
    assert (prefix.positions == torch.arange(40)).all()
    assert prefix.next_position == len(prefix.input_ids) == 40


@every_method
@pytest.mark.parametrize("scope", ["token", "head"])
@with_or_without_a_question
def test_a_chunk_is_read_after_the_best_so_far_and_the_best_of_both_are_kept(
    tiny_model, method, scope, question
):
    model, question_ids = tiny_model(dtype=DOUBLE), TEXT[:, :question] if question else None
    torch.manual_seed(1)
    options = {"question_ids": question_ids, "scope": scope, "chunk_size": 9}
    prefix = evict(model, IDS, METHODS[method], budget=12, **options)
    torch.manual_seed(1)
    cache, positions = None, torch.zeros(LAYERS, 1, GROUPS, 0, dtype=torch.long)
    for start in range(0, 40, 9):
        chunk = IDS[:, start : start + 9]
        before = kv.Prefix(cache, start, positions=positions) if start else None
        held = positions.shape[-1] + chunk.shape[1]
        k = min(12, held)
        scores, cache = score_entries(model, chunk, METHODS[method], k, question_ids, before)
        assert scores.shape == (LAYERS, 1, GROUPS, held)
        assert scores.isinf().sum(-1).max() <= k
        assert kv.length(cache) == held + question
        scores = scores.mean((0, 2), keepdim=True) if scope == "token" else scores
        columns = scores.topk(k).indices.sort().values.expand(LAYERS, 1, GROUPS, -1)
        new = torch.arange(start, start + chunk.shape[1]).expand(LAYERS, 1, GROUPS, -1)
        positions = torch.cat([positions, new], -1).gather(-1, columns)
        cache = kv.select(cache, columns)
    assert same_cache(prefix.cache, cache)
    assert prefix.positions.shape == ((1, 12) if scope == "token" else (LAYERS, 1, GROUPS, 12))
    assert (prefix.positions == positions).all()
    assert prefix.next_position == len(prefix.input_ids) == 40
    for layer in prefix.cache.layers:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


@pytest.mark.parametrize("size", [1, 7, 20])
def test_sinks_and_recent_entries_are_the_same_in_chunks(tiny_model, size):
    at_once = evict(tiny_model(), IDS, sinks_recent, budget=11).positions
    chunks = evict(tiny_model(), IDS, sinks_recent, budget=11, chunk_size=size).positions
    assert chunks.equal(at_once)


@every_family
@pytest.mark.parametrize("method", ["h2o", "snapkv"])
def test_attention_after_a_prefix_is_the_models(tiny_model, family, method):
    model = tiny_model(family, dtype=DOUBLE)
    before = kv.prefill(model, IDS[:, :25])
    rows = []

    def rest_of_all(attention, budget):
        """The score of the last 15 queries, from a reading of all 40 tokens."""
        attention = attention._replace(queries=attention.queries[:, :, 25:])
        rows.append(METHODS[method](attention, budget))
        return rows[-1]

    score_entries(model, IDS, rest_of_all, 12)
    scores, _ = score_entries(model, IDS[:, 25:], METHODS[method], 12, prefix=before)
    near(scores, torch.stack(rows), 1e-5)


def test_a_text_longer_than_the_model_reads_counts_entries(tiny_model):
    model = tiny_model(dtype=DOUBLE, max_position_embeddings=32)
    rotary, seen = rotary_of(model), []

    def best(attention, budget):
        seen.append(attention.keys.shape[2])
        return key_norm(attention, budget)

    prefix = evict(model, IDS, best, budget=10, chunk_size=16, question_ids=TEXT)
    assert max(seen) == 10 + 16 + 6 == 32
    assert prefix.positions.tolist() == [list(range(10))]
    assert prefix.next_position == 10
    assert prefix.input_ids == IDS[0].tolist()
    one = compact(evict(model, IDS[:, :16], key_norm, budget=10, question_ids=TEXT))
    two = kv.prefill(model, IDS[:, 16:32], one).cache  # at positions 10 to 25
    scores, _ = score_entries(model, IDS[:, 16:32], key_norm, 10, TEXT, one)
    columns = scores.topk(10).indices.sort().values
    two = kv.shift(kv.select(two, columns), torch.arange(10) - columns, rotary)
    three = evict(model, IDS[:, 32:], key_norm, budget=10, prefix=kv.Prefix(two, 10))
    near(kv.to_tensor(prefix.cache), kv.to_tensor(compact(three).cache), 1e-6)
    read_on(model, prefix, TEXT)


# after a prefix: eviction while a text is written


@every_family
@pytest.mark.parametrize("scope", ["token", "head"])
def test_evicting_after_a_prefix_is_the_next_chunk(tiny_model, family, scope):
    model = tiny_model(family)
    options = {"budget": 12, "scope": scope}
    prefix = None
    for chunk in IDS.split(9, 1):
        prefix = evict(model, chunk, h2o, prefix=prefix, **options)
    expected = evict(model, IDS, h2o, chunk_size=9, **options)
    assert same_cache(prefix.cache, expected.cache)
    assert prefix.positions.equal(expected.positions)
    assert prefix.next_position == expected.next_position == 40


def test_entries_of_a_prefix_that_was_shared_or_prefilled_can_be_evicted_by_head(tiny_model):
    model = tiny_model(dtype=DOUBLE)
    full = kv.prefill(model, IDS)
    for before in (kv.prefill(model, IDS[:, :30]), kv.Prefix(kv.truncate(full.cache, 30), 30)):
        prefix = evict(model, IDS[:, 30:], key_norm, budget=12, prefix=before)
        assert prefix.positions.shape == (LAYERS, 1, GROUPS, 12)
        expected = evict(model, IDS, key_norm, budget=12)
        assert prefix.positions.equal(expected.positions)
        near(kv.to_tensor(prefix.cache), kv.to_tensor(expected.cache))
    by_head = evict(model, IDS[:, :30], key_norm, budget=20)
    prefix = evict(model, IDS[:, 30:], key_norm, budget=12, prefix=by_head, scope="token")
    assert prefix.positions.shape == (LAYERS, 1, GROUPS, 12)
    for layer, group in itertools.product(range(LAYERS), range(GROUPS)):
        positions = prefix.positions[layer, 0, group]
        assert set(positions.tolist()) <= {*by_head.positions[layer, 0, group].tolist()} | {
            *range(30, 40)
        }
        old = positions < 30
        entries = prefix.cache.layers[layer].values[0, group]
        near(entries[old], full.cache.layers[layer].values[0, group, positions[old]])


@every_family
@pytest.mark.parametrize("every", [1, 5, 24, 99])
def test_generating_within_a_budget_that_holds_all_is_plain_generation(tiny_model, family, every):
    model = copy.deepcopy(tiny_model(family, dtype=DOUBLE))
    plain = generate(model, IDS, max_new_tokens=24).tokens[0]
    for end in (None, plain[9].item()):
        model.generation_config.eos_token_id = end
        expected = generate(model, IDS, max_new_tokens=24).tokens[0]
        options = {"budget": 99, "every": every, "max_new_tokens": 24}
        tokens, _ = generate_within(partial(generate, model), model, IDS, h2o, **options)
        assert tokens.equal(expected)


def test_generating_within_a_budget_is_a_stretch_after_what_was_kept_and_so_on(tiny_model):
    model, held = tiny_model("Llama", dtype=DOUBLE, max_position_embeddings=48), []

    def observed(attention, budget):
        held.append(attention.keys.shape[2])
        return sinks_recent(attention, budget)

    options = {"budget": 12, "every": 5, "max_new_tokens": 30}
    tokens, prefix = generate_within(partial(generate, model), model, IDS, observed, **options)
    assert kv.length(prefix.cache) == 12
    assert max(held[LAYERS:]) == 12 + 5
    text, before, expected = IDS, None, []
    for _ in range(6):  # beyond 48 positions, entries are counted
        before = evict(model, text[:, :-1], sinks_recent, budget=12, prefix=before)
        before = compact(before) if before.next_position + 6 > 48 else before
        new = greedy(model, before, text[:, -1:], steps=5)
        expected += new
        text = torch.tensor([[text[0, -1].item(), *new]])
    assert tokens.tolist() == expected
    assert same_cache(prefix.cache, before.cache)


def test_a_padded_prefix_is_refused(tiny_model):
    model, mask = tiny_model(), torch.ones(2, 40, dtype=torch.long)
    mask[0, :3] = 0
    padded = kv.prefill(model, IDS.repeat(2, 1), attention_mask=mask)
    with pytest.raises(ValueError, match="padding or unknown positions: use `prefill` or `evict`"):
        evict(model, TEXT.repeat(2, 1), key_norm, budget=12, prefix=padded)
    unknown = kv.Prefix(kv.truncate(kv.prefill(model, IDS).cache, 30), 40)
    with pytest.raises(ValueError, match="padding or unknown positions"):
        evict(model, TEXT, key_norm, budget=12, prefix=unknown)


# batches


@pytest.mark.parametrize("method", ["sinks_recent", "key_norm", "h2o", "snapkv"])
@pytest.mark.parametrize("scope", ["token", "head"])
@pytest.mark.parametrize("chunk_size", [None, 9])
def test_rows_of_a_batch_are_texts_alone(tiny_model, method, scope, chunk_size):
    model, rows = tiny_model("Llama", dtype=DOUBLE), torch.cat([IDS, IDS.flip(1), IDS.roll(5, 1)])
    options = {"budget": 12, "scope": scope, "chunk_size": chunk_size, "question_ids": TEXT}
    batch = evict(model, rows, METHODS[method], **options)
    assert batch.positions.shape == ((3, 12) if scope == "token" else (LAYERS, 3, GROUPS, 12))
    assert batch.next_position == 40
    after = read_on(model, batch, TEXT.repeat(3, 1))
    small = read_on(model, compact(batch), TEXT.repeat(3, 1))
    for i, ids in enumerate(rows):
        alone = evict(model, ids[None], METHODS[method], **options)
        cache = kv.from_tensor(kv.to_tensor(batch.cache)[:, :, i : i + 1])
        near(kv.to_tensor(cache), kv.to_tensor(alone.cache))
        own = batch.positions[i : i + 1] if scope == "token" else batch.positions[:, i : i + 1]
        assert own.equal(alone.positions)
        near(after[i : i + 1], read_on(model, alone, TEXT))
        near(small[i : i + 1], read_on(model, compact(alone), TEXT), 1e-4)
