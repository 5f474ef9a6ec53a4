"""KV-Distill with one budget over all layers and heads: scores first, then writing."""

import pytest
import torch
from compression_helpers import DOUBLE, GROUPS, IDS, LAYERS, TEXT, every_byte, near, same_cache

from kvlab import cache as kv
from kvlab import lab
from kvlab.compress import kvzip, repeat_texts, score_entries
from kvlab.distill import (
    DistillDataset,
    FreeDistiller,
    KVDistiller,
    ScoreDataset,
    fit_scores,
    own_score,
    train_distiller,
)
from kvlab.lab.corpora import Readings
from kvlab.ragged import is_ragged


def free(model, seed=0, **settings):
    """A small distiller whose scores are random."""
    torch.manual_seed(seed)
    distiller = FreeDistiller(model, **{"rank": 4, "scorer_hidden_size": 8, "sinks": 0} | settings)
    distiller.scorer.to(model.dtype)
    with torch.no_grad():
        distiller.scorer.down.normal_()
    return distiller


def written(distiller):
    """Let the adapters write something."""
    with torch.no_grad():
        for name, parameter in distiller.adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return distiller


def test_with_all_entries_and_untrained_adapters_the_cache_is_the_whole_one(tiny_model):
    model = tiny_model("Qwen3")
    whole = free(model).compress(IDS, retention=1.0)
    assert same_cache(whole.cache, kv.prefill(model, IDS).cache)
    assert whole.next_position == 40


@pytest.mark.parametrize("budget", [1, 7])
def test_the_highest_scores_of_all_heads_stay(tiny_model, budget):
    model = tiny_model("Llama", dtype=DOUBLE)
    distiller = written(free(model))
    prefix = distiller.compress(IDS, budget=budget)
    with torch.no_grad():
        cache, scores = distiller.score(IDS, torch.ones_like(IDS))
    assert scores.shape == (LAYERS, 1, GROUPS, 40)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for layer, row, head in torch.cartesian_prod(*map(torch.arange, (LAYERS, 1, GROUPS))):
        own = prefix.positions[layer, row, head]
        kept[layer, row, head, own[own >= 0]] = True
    assert kept.sum() == budget * LAYERS * GROUPS
    assert scores[kept].min() > scores[~kept].max()
    for layer, small, keep in zip(cache.layers, prefix.cache.layers, kept, strict=True):
        for head in range(GROUPS):
            expected = layer.values[0, head, keep[0, head]]
            if len(expected):
                near(small.values[0, head, -len(expected) :], expected, 1e-12)


def test_first_tokens_stay_if_they_are_sinks(tiny_model):
    prefix = free(tiny_model("Llama"), sinks=2).compress(IDS, budget=4)
    for position in (0, 1):
        assert (prefix.positions == position).any(-1).all()


def test_training_hides_what_compression_removes(tiny_model):
    model = tiny_model("Llama", dtype=DOUBLE)
    distiller = written(free(model))
    short = IDS[:, 10:]  # padded on the left beside the long one
    context = torch.cat([IDS, torch.cat([IDS[:, :10] * 0, short], 1)])
    mask = torch.ones_like(context)
    mask[1, :10] = 0
    text = TEXT.expand(2, -1)
    with torch.no_grad():
        logits = distiller.read_on(distiller.keep(context, mask, [6, 3]), text)
        for row, (ids, count) in enumerate(((IDS, 6), (short, 3))):
            prefix = distiller.compress(ids, budget=count)
            for i in range(TEXT.shape[1]):
                alone = kv.prefill(model, TEXT[:, : i + 1], prefix).logits[0]
                near(logits[row, i], alone, 1e-9)
    distiller = free(model)  # writes nothing
    near(*distiller(IDS, torch.ones_like(IDS), TEXT, retention=1.0), 1e-9)


def test_a_context_longer_than_a_chunk_is_joined(tiny_model):
    distiller = free(tiny_model("Llama"), chunk_size=16)
    prefix = distiller.compress(IDS, retention=0.5)
    assert prefix.next_position == 40
    assert (prefix.positions >= 0).sum() == 20 * LAYERS * GROUPS
    assert (prefix.positions >= 32).any()


def test_a_context_longer_than_the_model_is_compacted(tiny_model):
    model = tiny_model("Llama", max_position_embeddings=32)
    prefix = free(model, chunk_size=16).compress(IDS, budget=2)
    longest = kv.length(prefix.cache)
    assert prefix.next_position == longest < 32
    assert prefix.positions.max() == longest - 1
    with pytest.raises(ValueError, match="give a smaller chunk_size or budget"):
        free(model, chunk_size=64).compress(IDS, budget=2)
    with pytest.raises(ValueError, match=r"expected \(1, T\), one text"):
        free(model).compress(IDS.expand(2, -1), budget=2)


@pytest.fixture
def on_the_lab():
    model, tokenizer = lab.load("lab-draft"), lab.load_tokenizer("lab-draft")
    torch.manual_seed(0)
    return model, tokenizer, FreeDistiller(model, rank=4, scorer_hidden_size=16, sinks=1)


def test_scores_learn_those_of_kvzip_and_nothing_else_changes(on_the_lab):
    model, tokenizer, distiller = on_the_lab
    texts = [text for text, _ in Readings(8, (3, 5), 1, seed=0)]
    examples = ScoreDataset(model, tokenizer, texts, sinks=1)
    ids, targets = examples[3]
    score = lambda attention, budget: kvzip(attention, budget, sinks=1)
    repeat = repeat_texts(tokenizer, ids[None])
    expected, _ = score_entries(model, ids[None], score, 9, repeat=repeat)
    near(targets[..., 1:], (expected[:, 0, :, 1:] + 1e-4).log().clamp(max=0), 1e-6)
    assert (targets[..., 0] == 0).all()  # infinity: always stays

    before = every_byte(model)
    adapters = {n: p.clone() for n, p in distiller.adapted.named_parameters() if "lora" in n}
    trained = [n for n, p in distiller.named_parameters() if p.requires_grad]
    history = fit_scores(distiller, examples, steps=30, batch_size=4)
    assert history[-1]["loss"] < history[0]["loss"] / 2
    assert every_byte(model) == before
    for name, parameter in distiller.adapted.named_parameters():
        if name in adapters:
            assert torch.equal(parameter, adapters[name])
    assert [n for n, p in distiller.named_parameters() if p.requires_grad] == trained


def test_adapters_learn_to_write_with_frozen_scores_and_are_saved(on_the_lab, tmp_path):
    model, tokenizer, distiller = on_the_lab
    distiller.scorer.requires_grad_(False)
    before = {n: p.clone() for n, p in distiller.named_parameters() if "lora_B" in n}
    examples = DistillDataset(tokenizer, Readings(8, (3, 5), 2, seed=0))
    options = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "retention": (0.1, 0.3)}
    train_distiller(distiller, examples, **options)
    after = dict(distiller.named_parameters())
    changed = {name.split(".")[-4] for name in before if not torch.equal(after[name], before[name])}
    assert {"k_proj", "v_proj"} <= changed

    ids = examples[0].context[None]
    small = distiller.compress(ids, retention=0.2)
    loaded = KVDistiller.from_pretrained(distiller.save_pretrained(tmp_path / "free"), model)
    assert isinstance(loaded, FreeDistiller)
    again = loaded.compress(ids, retention=0.2)
    assert is_ragged(again.cache)
    assert torch.equal(again.positions, small.positions)
    for one, two in zip(again.cache.layers, small.cache.layers, strict=True):
        assert torch.equal(one.keys, two.keys)
        assert torch.equal(one.bias, two.bias)


@pytest.mark.parametrize("name", ["nowhere:score", "kvlab.compress:nothing", "math:pi", ":"])
def test_a_score_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=r"^(There is no score|.* is no function)"):
        own_score(name)


def test_a_score_of_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text("def mine(attention, budget):\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    assert own_score("my_scores:mine")(None, 3) == 1
