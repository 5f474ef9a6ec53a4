"""The scores of KVzip and other rivals are the loops of their formulas, and so is attention matching."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from compression_helpers import DOUBLE, GROUPS, HEADS, IDS, INF, LAYERS, TEXT, near, same_cache
from scipy.optimize import nnls

from kvlab import cache as kv
from kvlab import lab
from kvlab.compress import (
    METHODS,
    Repeat,
    attention_matching,
    compactor,
    evict,
    expected_attention,
    keydiff,
    kvzip,
    kvzip_plus,
    repeat_texts,
    score_entries,
    tova,
)
from kvlab.models import rotary_of, use_attention
from kvlab.ragged import bias_of

WIDTH, CONTEXT, SIZE = 16, 32, 16  # of a head, of the context, of the chunks that are repeated
every_rope = pytest.mark.parametrize("rope", ["default", "yarn"])


def group_of(head):
    return head // (HEADS // GROUPS)


def dot(one, two):
    return sum(x * y for x, y in zip(one, two, strict=True))


def norm(vector):
    return math.sqrt(dot(vector, vector))


def softmax(numbers):
    highest = max(numbers)
    powers = [math.exp(number - highest) for number in numbers]
    return [power / sum(powers) for power in powers]


def layers_of(model, ids):
    """What each layer computes for a text, read at once: q, k, v, (H, T, D), and its input, (T, ...).

    Queries are those that would give the same logits, q k / sqrt(D), if the model has another factor.
    """
    layers, inputs, hooks = [], [], []

    def record(module, query, key, value, mask, scaling, **options):
        layers.append([query[0] * scaling * math.sqrt(WIDTH), key[0], value[0]])
        every_head = [x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value)]
        output = torch.nn.functional.scaled_dot_product_attention(
            query, *every_head, is_causal=True, scale=scaling
        )
        return output.transpose(1, 2), None

    for layer in model.model.layers:
        norm_layer = layer.input_layernorm
        hooks.append(norm_layer.register_forward_hook(lambda *args: inputs.append(args[2][0])))
    with use_attention(model, record):
        model(ids)
    for hook in hooks:
        hook.remove()
    return [(*layer, x) for layer, x in zip(layers, inputs, strict=True)]


def scores_of(model, method, budget=8, ids=IDS, **options):
    """(L, H_kv, T), in float64."""
    return score_entries(model, ids, method, budget, **options)[0][:, 0].double()


# KVzip


@pytest.fixture(scope="module")
def zipped(tiny_model):
    """A model with the lab's words, a context of two chunks, and the texts that repeat them."""
    tokenizer = lab.load_tokenizer("lab-target")
    models = {}
    for family in ("Llama", "Qwen3"):
        models[family] = tiny_model(family, dtype=DOUBLE, vocab_size=len(tokenizer))
    sentences = "Anna lives in Rome. Ben has a dog and a cat. Clara has a horse and lives in Oslo. "
    ids = tokenizer(sentences * 2, return_tensors="pt").input_ids[:, :CONTEXT]
    assert ids.shape[1] == CONTEXT
    return models, ids, repeat_texts(tokenizer, ids, chunk_size=SIZE), tokenizer


def weights_of_repeat(layer, head, chunk, sinks, repeated):
    """Attention of each token of a repetition to the chunk: rows of softmax(q [sinks; chunk; own])."""
    queries, keys = layer[0][head].tolist(), layer[1][group_of(head)].tolist()
    first = [j for j in range(sinks) if j < chunk.start]
    part = list(range(chunk.start, chunk.stop))
    rows = []
    for i in range(CONTEXT, CONTEXT + repeated):
        seen = [*first, *part, *range(CONTEXT, i + 1)]
        weights = softmax([dot(queries[i], keys[j]) / math.sqrt(WIDTH) for j in seen])
        rows.append(weights[len(first) : len(first) + len(part)])
    return rows


def looped_kvzip(model, ids, repeats, sinks, plus=False):
    scores = [[[] for _ in range(GROUPS)] for _ in range(LAYERS)]
    for text in repeats:
        repeated = text.input_ids.shape[1]
        layers = layers_of(model, torch.cat([ids, text.input_ids], 1))
        for (i, layer), group in itertools.product(enumerate(layers), range(GROUPS)):
            best = [0.0] * SIZE
            for head in (head for head in range(HEADS) if group_of(head) == group):
                rows = weights_of_repeat(layer, head, text.part, sinks, repeated)
                output = model.model.layers[i].self_attn.o_proj.weight
                output = output[:, head * WIDTH : (head + 1) * WIDTH]
                for n, row in enumerate(rows):
                    size = norm(layer[3][CONTEXT + n].tolist())
                    for j, weight in enumerate(row):
                        if plus:
                            value = layer[2][group, text.part.start + j]
                            weight *= norm((output @ value).tolist()) / size
                        best[j] = max(best[j], weight)
            first = text.part.start
            best = [INF if first + j < sinks else score for j, score in enumerate(best)]
            scores[i][group] += best
    return torch.tensor(scores, dtype=DOUBLE)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("sinks", [0, 4])
def test_kvzip_is_the_loop_of_its_paper(zipped, family, plus, sinks):
    models, ids, repeats, _ = zipped
    method = partial(kvzip_plus if plus else kvzip, sinks=sinks)
    scores = scores_of(models[family], method, ids=ids, repeat=repeats)
    expected = looped_kvzip(models[family], ids, repeats, sinks, plus)
    assert scores.isinf().sum(-1).unique().tolist() == [sinks]
    near(scores, expected, 1e-6)


def test_kvzip_without_a_repetition_takes_the_question(zipped):
    models, ids, _, tokenizer = zipped
    model, (one,) = models["Llama"], repeat_texts(tokenizer, ids)
    expected = scores_of(model, kvzip, ids=ids, repeat=[one])
    near(scores_of(model, kvzip, ids=ids, question_ids=one.input_ids), expected, 1e-6)
    with pytest.raises(ValueError, match=r"repeats the context: give repeat=repeat_texts\("):
        scores_of(model, kvzip, ids=ids)


def test_a_repetition_is_not_in_the_cache_and_stands_alone(zipped):
    models, ids, repeats, _ = zipped
    model = models["Llama"]
    whole = kv.prefill(model, ids)
    prefix = evict(model, ids, kvzip, budget=9, repeat=repeats)
    near(kv.to_tensor(prefix.cache), kv.to_tensor(kv.select(whole.cache, prefix.positions)))
    assert prefix.next_position == len(prefix.input_ids) == CONTEXT
    assert (prefix.positions[..., :4] == torch.arange(4)).all()
    for options in ({"prefix": whole}, {"question_ids": TEXT}):
        with pytest.raises(ValueError, match="repeated alone, from its first token"):
            evict(model, ids, kvzip, budget=9, repeat=repeats, **options)
    with pytest.raises(ValueError, match="leave chunk_size out"):
        evict(model, ids, kvzip, budget=9, repeat=repeats, chunk_size=9)
    long = repeats[0]._replace(input_ids=repeats[0].input_ids.repeat(1, 10))
    with pytest.raises(ValueError, match=r"has \d+ tokens, .* up to 256: .* a smaller chunk_size"):
        evict(model, ids, kvzip, budget=9, repeat=[long, *repeats[1:]])


def test_all_entries_of_kvzip_are_the_whole_cache_in_every_scope(zipped):
    models, ids, repeats, _ = zipped
    whole = kv.prefill(models["Qwen3"], ids).cache
    for scope in ("head", "layer", "model", "token"):
        for method in (kvzip, kvzip_plus):
            prefix = evict(models["Qwen3"], ids, method, retention=1.0, scope=scope, repeat=repeats)
            assert same_cache(prefix.cache, whole)


def test_a_model_repeats_chunks_after_their_last_tokens(zipped):
    _, ids, _, tokenizer = zipped
    chunks = ids.split(10, 1)
    texts = repeat_texts(tokenizer, ids, chunk_size=10)
    assert [text.part for text in texts] == [slice(s, min(s + 10, 32)) for s in (0, 10, 20, 30)]

    def words(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    closing = words("<|assistant|>")
    first = words("<|user|> Repeat the previous context exactly.") + closing
    assert texts[0].input_ids.tolist() == [first + chunks[0][0].tolist()]
    asked = words("<|user|> Repeat the part of the previous context exactly, starting with")
    for before, chunk, text in zip(chunks[:-1], chunks[1:], texts[1:], strict=True):
        last = before[0, -8:].tolist()
        assert text.input_ids.tolist() == [asked + last + closing + chunk[0].tolist()]
    short = repeat_texts(tokenizer, ids, chunk_size=3)[1]  # fewer than eight tokens come before
    assert short.input_ids.tolist() == [
        asked + ids[0, :3].tolist() + closing + ids[0, 3:6].tolist()
    ]
    assert repeat_texts(tokenizer, ids)[0].part == slice(0, 32)


# scores without a repetition


def looped_tova(layer, context):
    queries, keys = layer[0].tolist(), layer[1].tolist()
    mean = [0.0] * context
    for head in range(HEADS):
        row = softmax([dot(queries[head][-1], k) / math.sqrt(WIDTH) for k in keys[group_of(head)]])
        mean = [m + row[j] / HEADS for j, m in enumerate(mean)]
    return [mean] * GROUPS


def looped_keydiff(layer, context):
    scores = []
    for keys in layer[1].tolist():
        units = [[x / norm(k) for x in k] for k in keys[:context]]
        anchor = [sum(unit[d] for unit in units) / context for d in range(WIDTH)]
        scores.append([-dot(unit, anchor) / norm(anchor) for unit in units])
    return scores


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("question", [0, 6])
@pytest.mark.parametrize(("method", "loop"), [(tova, looped_tova), (keydiff, looped_keydiff)])
def test_tova_and_keydiff_are_the_loops_of_their_papers(tiny_model, family, question, method, loop):
    model, options = tiny_model(family, dtype=DOUBLE), {}
    if question:
        options["question_ids"] = TEXT
    layers = layers_of(model, torch.cat([IDS, TEXT[:, :question]], 1))
    expected = torch.tensor([loop(layer, 40) for layer in layers], dtype=DOUBLE)
    near(scores_of(model, method, **options), expected, 1e-6)


def rotation(model, position):
    """The matrix (D, D) by which a model turns queries and keys at a position."""
    rotary = rotary_of(model)
    matrix = np.zeros((WIDTH, WIDTH))
    for i, frequency in enumerate(rotary.inv_freq.double().tolist()):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        j = i + WIDTH // 2
        matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = cos, -sin, sin, cos
    return matrix * rotary.attention_scaling


def looped_expected_attention(model, layer, total, sinks=4):
    context = 40
    later = sum(rotation(model, total + n) for n in range(512)) / 512
    queries, keys, values = (x.numpy() for x in layer[:3])
    scores = []
    for group in range(GROUPS):
        mean_weights = [0.0] * (context - sinks)
        for head in (head for head in range(HEADS) if group_of(head) == group):
            rows = range(sinks, context)
            plain = [np.linalg.inv(rotation(model, i)) @ queries[head, i] for i in rows]
            mu = sum(plain) / len(plain)
            sigma = sum(np.outer(q - mu, q - mu) for q in plain) / len(plain)
            z = []
            for j in rows:
                k = keys[group, j]
                z.append(mu @ later.T @ k / math.sqrt(WIDTH))
                z[-1] += k @ later @ sigma @ later.T @ k / (2 * WIDTH)
            for j, weight in enumerate(softmax(z)):
                mean_weights[j] += weight / (HEADS // GROUPS)
        row = [INF] * sinks
        for j, weight in enumerate(mean_weights):
            row.append((weight + 0.01) * norm(values[group, sinks + j].tolist()))
        scores.append(row)
    return scores


@every_rope
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("question", [0, 6])
def test_expected_attention_is_the_loop_of_its_paper(tiny_model, family, rope, question):
    model, options = tiny_model(family, rope, dtype=DOUBLE), {}
    assert rope == "default" or rotary_of(model).attention_scaling > 1.1
    if question:
        options["question_ids"] = TEXT
    text = torch.cat([IDS, TEXT[:, :question]], 1)
    expected = []
    for layer in layers_of(model, text):
        expected.append(looped_expected_attention(model, layer, text.shape[1]))
    near(scores_of(model, expected_attention, **options), torch.tensor(expected).double(), 2e-5)


def standardized(rows):
    """Subtract the mean over all rows, and divide by the standard deviation."""
    numbers = [number for row in rows for number in row]
    mean = sum(numbers) / len(numbers)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1))
    return [[(x - mean) / deviation for x in row] for row in rows]


def looped_compactor(model, layer, budget, draws, chunk_size, sinks=8, recent=4):
    context = 40
    queries, keys, values = (x.numpy() for x in layer[:3])
    part = range(sinks, context - recent)
    leverage, attention = [], []
    for group in range(GROUPS):
        x = np.stack([np.linalg.inv(rotation(model, j)) @ keys[group, j] for j in part])
        x = x - x.mean(0)
        if draws is not None:
            x = x @ draws[group].numpy() / math.sqrt(draws.shape[-1])
        inverse = np.linalg.inv(x.T @ x + 0.01 * np.eye(x.shape[1]))
        leverage.append([row @ inverse @ row for row in x])
        received = dict.fromkeys(part, 0.0)
        for head in (head for head in range(HEADS) if group_of(head) == group):
            for i in part:
                chunk = (i - sinks) // chunk_size
                rivals = [j for j in part if (j - sinks) // chunk_size == chunk]
                weights = softmax([queries[head, i] @ keys[group, j] for j in rivals])
                for j, weight in zip(rivals, weights, strict=True):
                    received[j] += weight / (HEADS // GROUPS)
        row = [received[j] * norm(values[group, j].tolist()) for j in part]
        row = [0.0, *row, 0.0]
        attention.append([sum(row[j : j + 3]) / 3 for j in range(len(part))])
    scores = []
    for one, two in zip(standardized(leverage), standardized(attention), strict=True):
        both = [(1 - budget / context) * a + b for a, b in zip(one, two, strict=True)]
        scores.append([INF] * sinks + both + [INF] * recent)
    return scores


@every_rope
@pytest.mark.parametrize("options", [{}, {"chunk_size": 10}, {"sketch": 6}])
def test_compactor_is_the_loop_of_its_paper(tiny_model, rope, options):
    model = tiny_model("Llama", rope, dtype=DOUBLE)
    torch.manual_seed(5)
    scores = scores_of(model, partial(compactor, **options), budget=14)
    torch.manual_seed(5)
    expected = []
    for layer in layers_of(model, IDS):
        sketch = options.get("sketch")
        draws = torch.randn(1, GROUPS, WIDTH, sketch)[0].double() if sketch else None
        chunk_size = options.get("chunk_size", 256)
        expected.append(looped_compactor(model, layer, 14, draws, chunk_size))
    near(scores, torch.tensor(expected).double(), 2e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_compactor_attends_from_the_tokens_that_are_read_now(tiny_model, size):
    """Of a short chunk after a prefix, none but its own tokens before the last four are queries."""
    model = tiny_model("Llama", dtype=DOUBLE)
    before = kv.prefill(model, IDS[:, : 40 - size])
    attentions = []

    def record(attention, budget):
        attentions.append(attention)
        return compactor(attention, budget)

    scores, _ = score_entries(model, IDS[:, 40 - size :], record, 14, prefix=before)
    for attention, row in zip(attentions, scores, strict=True):
        queries = attention.queries.clone()
        own = max(0, size - 4)
        queries[:, :, own:] *= -3  # the last four are no queries
        assert compactor(attention._replace(queries=queries), 14).equal(row)
        if own:
            queries[:, :, :own] *= -3
            assert not compactor(attention._replace(queries=queries), 14).equal(row)


@pytest.mark.parametrize("scope", ["token", "head"])
@pytest.mark.parametrize("chunk_size", [None, 9])
@pytest.mark.parametrize("method", ["tova", "keydiff", "expected_attention", "compactor"])
def test_rows_of_a_batch_are_texts_alone(tiny_model, method, scope, chunk_size):
    model, rows = tiny_model("Llama", dtype=DOUBLE), torch.cat([IDS, IDS.flip(1), IDS.roll(5, 1)])
    options = {"budget": 14, "scope": scope, "chunk_size": chunk_size}
    batch = evict(model, rows, METHODS[method], **options)
    for i, ids in enumerate(rows):
        alone = evict(model, ids[None], METHODS[method], **options)
        own = batch.positions[i : i + 1] if scope == "token" else batch.positions[:, i : i + 1]
        assert own.equal(alone.positions)


def test_tova_keeps_the_same_entries_in_all_heads_of_a_layer(tiny_model):
    positions = evict(tiny_model(), IDS, tova, budget=9).positions
    assert positions[:, :, :1].expand_as(positions).equal(positions)
    assert not positions[0].equal(positions[1])


# attention matching


def repeats_of(ids, sizes=(9, 11)):
    """Two texts, each of which repeats half of a context."""
    half = ids.shape[1] // 2
    texts = []
    for n, size in enumerate(sizes):
        part = slice(n * half, (n + 1) * half)
        texts.append(Repeat(torch.cat([TEXT[:, :size], ids[:, part]], 1), part))
    return texts


def queries_of(model, ids, repeats):
    """By layer and KV head, the queries (N, D) of all texts and of the group's heads."""
    layers = [[[] for _ in range(GROUPS)] for _ in range(LAYERS)]
    for text in repeats:
        for i, layer in enumerate(layers_of(model, torch.cat([ids, text.input_ids], 1))):
            for head in range(HEADS):
                layers[i][group_of(head)].append(layer[0][head, ids.shape[1] :])
    return [[torch.cat(parts).numpy() for parts in groups] for groups in layers]


def attended(queries, keys, values, bias=0.0):
    logits = queries @ keys.T / math.sqrt(WIDTH) + bias
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return (weights / weights.sum(1, keepdims=True)) @ values


def heads_of(cache, whole, positions):
    """For each layer and KV head: its kept keys, values and biases, and all keys and values."""
    for i, group in itertools.product(range(LAYERS), range(GROUPS)):
        layer, bias = cache.layers[i], bias_of(cache.layers[i])[0, group]
        stays = bias > -INF
        kept = [x[0, group][stays].numpy() for x in (layer.keys, layer.values)]
        every = [x[0, group].numpy() for x in (whole.layers[i].keys, whole.layers[i].values)]
        columns = positions[i, 0, group]
        yield i, group, columns[columns >= 0].numpy(), (*kept, bias[stays].numpy()), every


@pytest.mark.parametrize("scope", ["model", "head"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Granite"])
def test_attention_matching_is_two_least_squares_by_head(tiny_model, family, scope):
    factor = {"attention_multiplier": 0.4} if family == "Granite" else {}  # not 1 / sqrt(D)
    model, repeats = tiny_model(family, dtype=DOUBLE, **factor), repeats_of(IDS)
    whole = kv.prefill(model, IDS)
    prefix = attention_matching(model, IDS, repeats, retention=0.3, scope=scope)
    plain = evict(model, IDS, kvzip, retention=0.3, scope=scope, repeat=repeats)
    assert prefix.positions.equal(plain.positions)
    assert prefix.next_position == len(prefix.input_ids) == 40
    queries, better, biases = queries_of(model, IDS, repeats), [], []
    for i, group, columns, kept, (keys, values) in heads_of(
        prefix.cache, whole.cache, prefix.positions
    ):
        near(torch.tensor(kept[0]), torch.tensor(keys[columns]), 1e-9)
        q = queries[i][group]
        powers = np.exp(q @ keys.T / math.sqrt(WIDTH))
        factors, _ = nnls(powers[:, columns], powers.sum(1))
        bias = np.log(factors.clip(math.exp(-3), math.exp(3)))
        near(torch.tensor(kept[2]), torch.tensor(bias), 1e-6)
        biases += bias.tolist()
        logits = q @ keys[columns].T / math.sqrt(WIDTH) + bias
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        expected = attended(q, keys, values)
        written, *_ = np.linalg.lstsq(weights, expected, rcond=None)
        near(torch.tensor(kept[1]), torch.tensor(written), 1e-4 * np.abs(written).max())
        after = np.abs(attended(q, *kept) - expected).mean()
        better.append(after / np.abs(attended(q, keys[columns], values[columns]) - expected).mean())
    assert max(better) < 1
    assert np.mean(better) < 0.9
    assert max(biases) > 0.5
    assert min(biases) < -0.5


def test_attention_matching_of_all_entries_is_the_whole_cache(tiny_model):
    model = tiny_model("Llama", dtype=DOUBLE)
    whole = kv.prefill(model, IDS)
    prefix = attention_matching(model, IDS, repeats_of(IDS), retention=1.0)
    after = kv.prefill(model, TEXT, prefix)
    near(after.logits, kv.prefill(model, TEXT, whole).logits, 1e-6)
    assert after.next_position == 46


def test_values_stay_of_a_size_that_half_precision_holds():
    model, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
    sentences = "Anna lives in Rome. Ben has a dog and a cat. Clara has a horse and lives in Oslo."
    ids = tokenizer(sentences, return_tensors="pt").input_ids
    prefix = attention_matching(model, ids, repeat_texts(tokenizer, ids), retention=0.5)
    for layer in prefix.cache.layers:
        assert layer.values.abs().max() < 5_000
        assert bias_of(layer)[bias_of(layer) > -INF].abs().max() <= 3.0001
