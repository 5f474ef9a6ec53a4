"""The laws of KV-Distill: it begins as the model, and its cache needs nothing else."""

import copy
import functools
import itertools
import json
import math

import pandas as pd
import pytest
import torch
from benchmarks.distill import LogGateDistiller
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
from peft import PeftModel
from transformers import AutoModelForCausalLM

from kvlab import cache as kv
from kvlab import lab, losses
from kvlab.compress import capture_attention, sinks_recent
from kvlab.distill import (
    ROUTINGS,
    DistillDataset,
    DistillExample,
    KVDistiller,
    compression_figures,
    encode_turns,
    pad_contexts,
    routed,
    train_distiller,
)
from kvlab.draft import DraftSettings
from kvlab.evaluate import exact_match, f1, squad_v2
from kvlab.models import CacheError, rotary_of

# the start


def make(model, seed=0, kind=KVDistiller, **settings):
    """A small distiller as created; its scorer is in the model's precision."""
    torch.manual_seed(seed)
    settings = {"layer": 1, "rank": 4, "scorer_hidden_size": 16} | settings
    distiller = kind(model, **settings)
    distiller.scorer.to(model.dtype)
    return distiller


def moved(model, seed=0, scale=0.1, **settings):
    """A distiller with random adapters and marker, and scores of all sizes around 0."""
    distiller = make(model, seed, **settings)
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


def all_ones(ids):
    return torch.ones_like(ids)


@every_family
@pytest.mark.parametrize(
    ("gate", "routing"), [("multiply", r) for r in ROUTINGS] + [("none", "conditional")]
)
def test_it_begins_as_the_model_itself(tiny_model, family, gate, routing):
    model = tiny_model(family)
    distiller = opened(make(model, gate=gate, routing=routing))
    full = kv.prefill(model, IDS)
    prefix = distiller.compress(IDS, retention=1)
    assert same_cache(prefix.cache, full.cache)
    assert prefix.next_position == full.next_position
    assert prefix.positions.tolist() == [list(range(40))]
    assert prefix.attention_mask is None
    logits, target_logits = distiller(IDS, all_ones(IDS), TEXT, 1.0)
    expected = model(torch.cat([IDS, TEXT], 1)).logits[:, 40:]
    near(logits, expected, 1e-4)
    near(target_logits, expected, 1e-4)


def test_a_half_open_gate_is_not_the_model(tiny_model):
    distiller = make(tiny_model())
    assert 0.9 < distiller.scores(IDS).sigmoid().mean() < 0.99  # begins almost open
    logits, target_logits = distiller(IDS, all_ones(IDS), TEXT, 1.0)
    assert distance(logits, target_logits) > 0.01


@every_family
def test_the_model_is_left_as_it_is_and_shared(tiny_model, family):
    model = copy.deepcopy(tiny_model(family))
    before, logits = every_byte(model), model(IDS).logits
    names = [name for name, _ in model.named_modules()]
    distiller = moved(model)
    assert distiller.adapted(IDS).logits.ne(logits).any()
    assert model(IDS).logits.equal(logits)
    assert [name for name, _ in model.named_modules()] == names
    assert every_byte(model) == before
    shared = {}
    for name, p in distiller.adapted.get_base_model().named_parameters():
        if "lora" not in name:
            shared[name.replace(".base_layer", "")] = p.data_ptr()
    assert shared == {name: p.data_ptr() for name, p in model.named_parameters()}
    trained = [name for name, p in distiller.named_parameters() if p.requires_grad]
    assert {name.split(".")[0] for name in trained} == {"adapted", "scorer"}
    assert all("lora" in name for name in trained if name.startswith("adapted"))


def test_adapters_are_rank_stabilized_on_q_k_v_and_o(tiny_model):
    modules = moved(tiny_model(), rank=4).adapted.get_base_model().named_modules()
    adapters = {name: module for name, module in modules if hasattr(module, "lora_A")}
    parts = {f"model.layers.{i}.self_attn.{part}_proj" for i in range(LAYERS) for part in "qkvo"}
    last = f"model.layers.{LAYERS - 1}.self_attn."
    unused = {f"{last}q_proj", f"{last}o_proj"}  # no key or value comes after these
    assert adapters.keys() == parts - unused
    for adapter in adapters.values():
        assert adapter.scaling["default"] == pytest.approx(4 / math.sqrt(4))  # alpha / sqrt(r)


def test_scores_are_of_the_frozen_models_states_after_a_layer(tiny_model):
    model = tiny_model(dtype=DOUBLE)
    for layer in (1, 2, 3):
        distiller, states = moved(model, layer=layer), []
        hook = model.model.layers[layer - 1].register_forward_hook(
            lambda _, __, out, states=states: states.append(out)
        )
        model(IDS)
        hook.remove()
        near(distiller.scores(IDS), distiller.scorer(states[0]))
        assert model.model.norm.weight.shape == (64,)  # the model still has its norm


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
    assert make(tiny_model(num_hidden_layers=layers), layer=None).settings.layer == eta


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gate": "open"}, "gate is 'open', expected one of multiply, none"),
        ({"routing": "some"}, "routing is 'some', expected one of conditional, all, embedding"),
        ({"sinks": -1}, "sinks is -1, expected 0 or more"),
        ({"rank": 0}, "rank is 0, expected 1 or more"),
        ({"chunk_size": -8}, "chunk_size is -8, expected 1 or more"),
        ({"layer": 4}, "layers is 4, expected 1 to 3, which the model has"),
        ({"layer": 0}, "layers is 0, expected 1 to 3, which the model has"),
    ],
)
def test_impossible_settings_are_refused(tiny_model, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(tiny_model(), **settings)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_loss_with_a_weight_below_zero_is_refused(tiny_model, fraction):
    with pytest.raises(ValueError, match=f"forward_share is {fraction}, expected a fraction"):
        train_distiller(make(tiny_model()), [], steps=1, forward_share=fraction)
    with pytest.raises(ValueError, match="weight of kl is -1, expected 0 or more"):
        DraftSettings(loss_weights={"ce": 1, "kl": -1})
    with pytest.raises(ValueError, match="sinks is -1, expected 0 or more"):
        sinks_recent(None, 2, sinks=-1)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (1, 0)])
def test_anything_but_one_text_is_refused(tiny_model, shape):
    with pytest.raises(ValueError, match=r"input_ids is \(.*expected \(1, T\), one text"):
        make(tiny_model()).compress(torch.zeros(shape, dtype=torch.long), retention=0.5)


def test_a_sliding_window_is_refused(tiny_model):
    with pytest.raises(CacheError, match="use full attention in every layer"):
        make(tiny_model("Mistral", sliding_window=8))


# routing


def projections(distiller, ids, kept):
    """(input, output, layer) of every projection with adapters when a context is encoded."""
    calls, hooks = {}, []
    for name, part in distiller.adapted.named_modules():
        if hasattr(part, "lora_A"):
            note = lambda m, inputs, out, name=name: calls.update({name: (inputs[0], out, m)})
            hooks.append(part.register_forward_hook(note))
    distiller._encode(ids, all_ones(ids), kept)
    for hook in hooks:
        hook.remove()
    return calls


@every_family
@pytest.mark.parametrize("routing", ROUTINGS)
def test_adapters_of_q_and_o_act_on_kept_tokens_only(tiny_model, family, routing):
    distiller = moved(tiny_model(family), routing=routing)
    kept = torch.zeros(1, 40, dtype=torch.bool)
    kept[0, distiller.compress(IDS, budget=13).positions[0]] = True
    with torch.no_grad():
        calls = projections(distiller, IDS, kept)
    assert len(calls) == 4 * LAYERS - 2  # no key or value comes after the last layer's q and o
    for name, (inputs, out, part) in calls.items():
        with torch.no_grad():
            differs = (out != part.base_layer(inputs)).any(-1)
        only_kept = routing == "conditional" and name.endswith(("q_proj", "o_proj"))
        assert differs.equal(kept if only_kept else torch.ones_like(kept)), name


def test_routing_ends_with_its_context(tiny_model):
    distiller = moved(tiny_model())
    expected = distiller.adapted(IDS).logits

    def break_off():
        with routed(distiller.adapted, torch.zeros(1, 40)):
            assert distiller.adapted(IDS).logits.ne(expected).any()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert distiller.adapted(IDS).logits.equal(expected)


def test_a_marker_marks_kept_tokens(tiny_model):
    distiller = opened(moved(tiny_model(dtype=DOUBLE), routing="embedding"))
    prefix = distiller.compress(IDS, budget=13)
    embeddings = distiller.model.get_input_embeddings()(IDS)
    embeddings[0, prefix.positions[0]] += distiller.marker
    cache = distiller.adapted(inputs_embeds=embeddings).past_key_values
    near(kv.to_tensor(prefix.cache), kv.to_tensor(kv.select(cache, prefix.positions)))
    assert make(tiny_model()).marker is None


# gradients


def loss_of(logits, target_logits):
    return losses.kl(logits.log_softmax(-1), target_logits.log_softmax(-1)).mean()


def gradients(distiller):
    loss_of(*distiller(IDS, all_ones(IDS), TEXT, 0.4)).backward()
    parameters = distiller.named_parameters()
    return {name: p.grad for name, p in parameters if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize(
    ("options", "implementation"),
    [
        ({}, "sdpa"),
        ({}, "eager"),
        ({"routing": "embedding"}, "sdpa"),
        ({"gate": "none"}, "sdpa"),
        ({"kind": LogGateDistiller}, "sdpa"),
    ],
    ids=str,
)
def test_gradients_reach_what_is_trained_and_nothing_else(tiny_model, options, implementation):
    model = tiny_model(attn_implementation=implementation)
    distiller = moved(model, **options)
    found = gradients(distiller)
    learns = options.get("gate") != "none"
    assert all(p.requires_grad == learns for p in distiller.scorer.parameters())
    assert any(name.startswith("scorer") for name in found) == learns
    assert ("marker" in found) == ("routing" in options)
    reached = {name.split(".")[-4] for name in found if "lora_A" in name}
    assert reached == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name.split(".")[0] for name in found} <= {"adapted", "scorer", "marker"}
    assert all("lora" in name for name in found if name.startswith("adapted"))
    assert all(p.grad is None for p in model.parameters())
    assert all(grad.isfinite().all() for grad in found.values())


def test_new_adapters_get_a_gradient(tiny_model):
    found = gradients(make(tiny_model()))
    assert {name.split(".")[-2] for name in found if "lora" in name} == {"default"}
    assert any("v_proj.lora_B" in name for name in found)
    assert any(name.startswith("scorer.down") for name in found)


# the gate


@every_family
@pytest.mark.parametrize("gate", ["multiply", "none", "log"])
def test_gates_act_on_the_logits_of_kept_entries(tiny_model, family, gate):
    model = tiny_model(family, dtype=DOUBLE, num_hidden_layers=1)

    def balanced(**options):
        distiller = moved(model, **options)
        distiller.scorer.down.bias.data -= distiller.scores(IDS).sort().values[0, -8]
        return distiller

    distiller = balanced(kind=LogGateDistiller) if gate == "log" else balanced(gate=gate)
    prefix = distiller.compress(IDS, budget=13)
    s = distiller.scores(IDS).gather(1, prefix.positions)[0]
    assert s.min() < -0.1
    assert s.max() > 0.1
    plain = balanced(gate="none").compress(IDS, budget=13)  # in one layer, gates change no entry
    assert plain.positions.equal(prefix.positions)
    layers = []
    with capture_attention(model, lambda *layer: layers.append(layer)):
        read_on(model, plain, TEXT)
    queries, keys, values, scaling = layers[0]
    keys, values = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (keys, values))
    logits = queries @ keys.mT * scaling
    if gate == "multiply":
        logits[..., :13] *= s.sigmoid()
    if gate == "log":
        logits[..., :13] += s.sigmoid().log()
    causal = torch.cat([torch.zeros(6, 13), torch.full((6, 6), -INF).triu(1)], 1)
    expected = ((logits + causal).softmax(-1) @ values).transpose(1, 2).flatten(2)
    kept, outputs = distiller.keep(IDS, all_ones(IDS), [13]), []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, inputs: outputs.append(inputs[0])
    )
    distiller.read_on(kept, TEXT)
    if gate != "log":
        read_on(model, prefix, TEXT)
    hook.remove()
    for output in outputs:  # in use as in training
        near(output.detach(), expected, 1e-8)


# several contexts at once


def batch_of(*sizes):
    """Contexts padded on the left with ids of their own, a mask, and texts."""
    ids = torch.randint(0, 97, (len(sizes), max(sizes)), generator=torch.Generator().manual_seed(9))
    mask = (torch.arange(max(sizes)) >= max(sizes) - torch.tensor(sizes)[:, None]).long()
    texts = torch.randint(0, 97, (len(sizes), 5), generator=torch.Generator().manual_seed(10))
    return ids, mask, texts


@every_family
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_size": 8, "standardize": True},
        {"chunk_size": 8, "gate": "none"},
        {"kind": LogGateDistiller},
    ],
    ids=str,
)
def test_a_batch_is_its_contexts_one_by_one(tiny_model, family, options):
    distiller = moved(tiny_model(family, dtype=DOUBLE), **options)
    sizes = (21, 40, 3, 8)
    ids, mask, texts = batch_of(*sizes)
    together = distiller(ids, mask, texts, 0.3)
    scores = distiller.scores(ids, mask)
    for i, size in enumerate(sizes):
        context, text = ids[i : i + 1, -size:], texts[i : i + 1]
        alone = distiller(context, all_ones(context), text, 0.3)
        near(together[0][i], alone[0][0], 1e-6)
        near(together[1][i], alone[1][0], 1e-6)
        near(scores[i, -size:], distiller.scores(context)[0], 1e-6)
        if "kind" not in options:
            prefix = distiller.compress(context, retention=0.3)
            near(read_on(distiller.model, prefix, text), alone[0], 1e-6)


@pytest.mark.parametrize("retention", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("sinks", [0, 4])
def test_each_context_keeps_its_fraction_sinks_first_then_the_best(tiny_model, retention, sinks):
    distiller = moved(tiny_model(), sinks=sinks)
    sizes = (21, 40, 3, 8)
    ids, mask, texts = batch_of(*sizes)
    prefixes, read = [], distiller.read_on
    distiller.read_on = lambda prefix, text: prefixes.append(prefix) or read(prefix, text)
    distiller(ids, mask, texts, retention)
    prefix, full = prefixes
    assert prefix.next_position.tolist() == full.next_position.tolist() == list(sizes)
    for i, size in enumerate(sizes):
        count = max(1, round(retention * size))
        positions = prefix.positions[i][prefix.attention_mask[i] == 1].tolist()
        alone = distiller.compress(ids[i : i + 1, -size:], retention=retention)
        assert positions == alone.positions[0].tolist() == sorted(set(positions))
        scores = distiller.scores(ids[i : i + 1, -size:])[0].tolist()
        ranked = sorted(range(size), key=lambda j: (j >= sinks, -scores[j]))
        assert positions == sorted(range(count) if count < sinks else ranked[:count])


def test_the_padding_does_not_matter(tiny_model):
    distiller = moved(tiny_model(dtype=DOUBLE), chunk_size=8)
    ids, mask, texts = batch_of(21, 40)
    other = distiller(ids.masked_fill(mask == 0, 5), mask, texts, 0.4)
    near(distiller(ids, mask, texts, 0.4)[0], other[0], 1e-12)


def test_reading_on_leaves_the_prefix(tiny_model):
    distiller = moved(tiny_model())
    prefix = distiller.keep(IDS, all_ones(IDS), [9])
    first = distiller.read_on(prefix, TEXT)
    assert kv.length(prefix.cache) == 9
    assert distiller.read_on(prefix, TEXT).equal(first)


# long contexts


@pytest.mark.parametrize("routing", ["conditional", "embedding"])
@pytest.mark.parametrize("size", [16, 24, 17])
def test_a_long_context_is_read_in_chunks_at_their_positions(tiny_model, routing, size):
    distiller = moved(tiny_model(dtype=DOUBLE), chunk_size=8, routing=routing, gate="none")
    ids = IDS[:, :size]
    prefix = distiller.compress(ids, retention=0.5)
    kept = torch.zeros(1, size, dtype=torch.bool)
    kept[0, prefix.positions[0]] = True
    caches, scores = [], []
    starts = [0, *range(size % 8 or 8, size, 8)]  # the first chunk is the shorter one
    for start, stop in itertools.pairwise([*starts, size]):
        part, positions = ids[:, start:stop], torch.arange(start, stop)[None]
        embeddings = distiller.model.get_input_embeddings()(part)
        if routing == "embedding":
            embeddings = embeddings + kept[:, start:stop, None] * distiller.marker
        tokens = kept[:, start:stop] if routing == "conditional" else torch.ones_like(part)
        inputs = {"inputs_embeds": embeddings, "position_ids": positions}
        with routed(distiller.adapted, tokens), torch.no_grad():
            caches.append(distiller.adapted(**inputs).past_key_values)
        states = distiller.model(part, position_ids=positions, output_hidden_states=True)
        scores.append(distiller.scorer(states.hidden_states[1]))
    cache = kv.select(functools.reduce(kv.join, caches), prefix.positions)
    near(kv.to_tensor(prefix.cache), kv.to_tensor(cache), 1e-6)
    near(distiller.scores(ids), torch.cat(scores, 1), 1e-6)
    assert prefix.next_position == size


def test_chunks_do_not_attend_to_each_other(tiny_model):
    distiller, other = opened(moved(tiny_model(dtype=DOUBLE), chunk_size=8)), IDS.clone()
    other[0, 18] = (other[0, 18] + 1) % 97  # in the third chunk of five
    one, two = (kv.to_tensor(distiller.compress(ids, retention=1).cache) for ids in (IDS, other))
    differs = (one != two).any(-1)[-1].flatten(0, 2).any(0)  # in the last layer
    assert differs.nonzero().flatten().tolist() == list(range(18, 24))
    differs = (distiller.scores(IDS) != distiller.scores(other))[0]
    assert differs.nonzero().flatten().tolist() == list(range(18, 24))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_chunks_of_padding_spoil_no_gradient(tiny_model, implementation):
    distiller = moved(tiny_model(attn_implementation=implementation), chunk_size=8)
    ids, mask, texts = batch_of(3, 40, 9, 1)
    loss_of(*distiller(ids, mask, texts, 0.3)).backward()
    gradients = [p.grad for p in distiller.parameters() if p.grad is not None]
    assert gradients
    assert all(grad.isfinite().all() for grad in gradients)


# files


@pytest.fixture
def on_disk(tiny_model, tmp_path):
    """A random model that comes from a folder."""
    tiny_model().save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()


@pytest.mark.parametrize(
    "settings",
    [{"gate": "none", "routing": "embedding"}, {"chunk_size": 8, "layer": 2, "standardize": True}],
    ids=str,
)
def test_a_saved_distiller_is_the_same(tiny_model, tmp_path, settings):
    distiller = moved(tiny_model(), **settings)
    distiller.save_pretrained(tmp_path / "saved")
    loaded = KVDistiller.from_pretrained(tmp_path / "saved", tiny_model())
    assert loaded.settings == distiller.settings
    batch = batch_of(21, 40)
    assert loaded(*batch, 0.3)[0].equal(distiller(*batch, 0.3)[0])
    assert trained(loaded).keys() == trained(distiller).keys()


def test_a_file_with_the_old_names_of_the_settings_loads(tiny_model, tmp_path):
    distiller = moved(tiny_model(), chunk_size=8)
    distiller.save_pretrained(tmp_path)
    text = (tmp_path / "kvdistill.json").read_text()
    text = text.replace('"scorer_hidden_size"', '"width"').replace('"chunk_size"', '"row"')
    (tmp_path / "kvdistill.json").write_text(text)
    assert KVDistiller.from_pretrained(tmp_path, tiny_model()).settings == distiller.settings


def test_peft_reads_the_adapters_by_itself(tiny_model, tmp_path):
    distiller = moved(tiny_model())
    distiller.save_pretrained(tmp_path)
    adapted = PeftModel.from_pretrained(copy.deepcopy(tiny_model()), tmp_path)
    assert adapted(IDS).logits.equal(distiller.adapted(IDS).logits)
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


@pytest.mark.parametrize("name", ["adapter_model", "scorer.safetensors", "kvdistill.json"])
def test_a_missing_file_is_refused(tiny_model, tmp_path, name):
    make(tiny_model()).save_pretrained(tmp_path)
    (file,) = tmp_path.glob(f"{name}*")
    file.unlink()
    with pytest.raises((ValueError, OSError), match=str(tmp_path)):
        KVDistiller.from_pretrained(tmp_path, tiny_model())


# training


def examples_of(n=4, weights=(0.0, 0.0, 1.0, 1.0, 1.0, 1.0)):
    ids = torch.randint(0, 97, (n, 26), generator=torch.Generator().manual_seed(11))
    weights = torch.tensor(weights)
    return [DistillExample(row[i % 3 : 20], row[20:], weights) for i, row in enumerate(ids)]


QUICK = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "retention": (0.2, 0.6)}


def trained(distiller):
    return {name: p.detach().clone() for name, p in distiller.named_parameters() if p.requires_grad}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@every_family
def test_it_learns_and_the_model_does_not(tiny_model, family):
    model = copy.deepcopy(tiny_model(family))
    before, distiller = every_byte(model), make(model)
    options = QUICK | {"steps": 15, "retention": (0.4, 0.4)}
    history = train_distiller(distiller, examples_of(), **options)
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    assert every_byte(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_the_loss_is_both_divergences_on_weighted_tokens(tiny_model):
    distiller, weights = moved(tiny_model()), (0.5, 0.25, 1.0, 0.0, 1.0, 1.0)
    examples = examples_of(weights=weights)
    expected = {"kl": 0.0, "reverse_kl": 0.0}
    for context, text, _ in examples:
        prefix = distiller.compress(context[None], retention=0.4)
        q = read_on(distiller.model, prefix, text[None])[0].log_softmax(-1)
        logits = distiller.model(torch.cat([context, text])[None]).logits[0, -len(text) :]
        p = logits.log_softmax(-1)
        for t in range(1, len(text)):  # the first token is predicted by the context
            weight = weights[t] / sum(weights[1:]) / len(examples)
            forward = (p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum().item()
            reverse = (q[t - 1].exp() * (q[t - 1] - p[t - 1])).sum().item()
            expected["kl"] += 0.6 * weight * forward
            expected["reverse_kl"] += 0.4 * weight * reverse
    one_step = QUICK | {"steps": 1, "retention": (0.4, 0.4)}
    first, *_ = train_distiller(distiller, examples, **one_step)
    assert first["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    assert first["reverse_kl"] == pytest.approx(expected["reverse_kl"], rel=1e-4)
    assert first["weight"] == pytest.approx(4 * sum(weights[1:]))
    for forward_share, names in ((1.0, {"kl"}), (0.0, {"reverse_kl"})):
        options = one_step | {"forward_share": forward_share}
        first, *_ = train_distiller(moved(tiny_model()), examples, **options)
        assert first.keys() & {"kl", "reverse_kl"} == names


def test_batches_keep_fractions_drawn_evenly_on_a_logarithmic_scale(tiny_model):
    distiller, drawn = make(tiny_model()), []
    forward = distiller.forward
    distiller.forward = lambda *args: drawn.append(args[3]) or forward(*args)
    options = QUICK | {"steps": 60, "batch_size": 1, "retention": (0.01, 0.81)}
    train_distiller(distiller, examples_of(), **options)
    assert 0.01 <= min(drawn) < 0.02
    assert 0.4 < max(drawn) <= 0.81
    assert 0.3 < sum(fraction < 0.09 for fraction in drawn) / 60 < 0.7  # the geometric mean


def test_a_stopped_run_ends_as_if_it_had_not_been_and_as_its_seed(tiny_model, tmp_path):
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    def run(file, distiller, seed=1):
        options = QUICK | {"checkpoint": tmp_path / file, "every": 2, "seed": seed}
        history = train_distiller(distiller, examples_of(8), **options)
        return [entry["loss"] for entry in history]

    whole, other, stopped, resumed = (make(tiny_model()) for _ in range(4))
    history = run("whole.safetensors", whole)
    stopped.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("stopped.safetensors", stopped)
    assert run("stopped.safetensors", resumed) == history
    assert equal(trained(resumed), trained(whole))
    run("other.safetensors", other, seed=2)
    assert not equal(trained(other), trained(whole))


def test_the_model_teaches_and_reads_without_dropout(tiny_model):
    model = tiny_model(attention_dropout=0.5)
    distiller, batch = make(model), batch_of(21, 40)
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
        got = encode_turns(tokenizer, PASSAGE, [turn])
        whole = tokenizer.apply_chat_template(chat(*turn), return_dict=True)["input_ids"]
        assert [*got.context.tolist(), *got.text.tolist()] == whole
        context = tokenizer.apply_chat_template(chat(*turn)[:1], return_dict=True)["input_ids"]
        assert got.context.tolist() == context


@pytest.mark.parametrize("instruction", [0.0, 0.1])
def test_answers_and_their_ends_count_and_questions_as_told(tokenizer, instruction):
    got = encode_turns(tokenizer, PASSAGE, TURNS, instruction)
    parts = [encode_turns(tokenizer, PASSAGE, [turn], instruction) for turn in TURNS]
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
    first = examples_of(2, weights=[weight] * 3 + [1.0] * 3)
    second = [
        e._replace(text=e.text.index_fill(0, torch.tensor([5]), 7)) for e in first
    ]  # the last is never read
    results = [
        train_distiller(moved(tiny_model()), e, **QUICK | {"steps": 1, "batch_size": 2})[0]
        for e in (first, second)
    ]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"])
    assert results[0]["weight"] == (2 * 5 if weight else 2 * 3)
    plain = examples_of(2, weights=[0.0] * 3 + [1.0] * 3)
    unweighed = train_distiller(moved(tiny_model()), plain, **QUICK | {"steps": 1, "batch_size": 2})
    assert (results[0]["loss"] == pytest.approx(unweighed[0]["loss"])) == (weight == 0)


def test_a_template_that_changes_what_was_said_is_refused(tokenizer):
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = (
        "{% for m in messages %}{% if loop.last %}* {% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(
        ValueError, match="chat template changes a system message when another follows it"
    ):
        encode_turns(forgetful, PASSAGE, TURNS)


def test_examples_are_made_when_they_are_asked_for(tokenizer):
    asked = []

    class Readings:
        def __len__(self):
            return 1_000_000

        def __getitem__(self, index):
            asked.append(index)
            return PASSAGE, TURNS

    many = DistillDataset(tokenizer, Readings(), instruction=0.25)
    assert len(many) == 1_000_000
    assert not asked
    got, want = many[777_777], encode_turns(tokenizer, PASSAGE, TURNS, 0.25)
    assert asked == [777_777]
    assert all(map(torch.equal, got, want))


def test_a_batch_pads_contexts_on_the_left_and_texts_on_the_right():
    short = DistillExample(torch.tensor([5, 6]), torch.tensor([7]), torch.tensor([1.0]))
    long = DistillExample(
        torch.tensor([1, 2, 3]), torch.tensor([8, 9, 10]), torch.tensor([0.0, 0.5, 1.0])
    )
    batch = pad_contexts([short, long])
    assert batch["context"].tolist() == [[0, 5, 6], [1, 2, 3]]
    assert batch["context_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch["text"].tolist() == [[7, 0, 0], [8, 9, 10]]
    assert batch["weights"].tolist() == [[1, 0, 0], [0, 0.5, 1]]


# longer than the model reads


@every_family
def test_a_context_longer_than_the_model_reads_is_compressed_to_the_first_positions(
    tiny_model, family
):
    sizes = {"rank": 4, "scorer_hidden_size": 8, "chunk_size": 16}
    model = tiny_model(family, dtype=DOUBLE, max_position_embeddings=32)
    distiller = KVDistiller(model, **sizes).eval()
    prefix = distiller.compress(IDS, budget=10)
    assert prefix.positions.tolist() == [list(range(10))]
    assert (prefix.next_position, prefix.input_ids) == (10, IDS[0].tolist())
    kept = distiller.keep(IDS, torch.ones_like(IDS), [10])
    by = torch.arange(10) - kept.positions
    near(kv.to_tensor(prefix.cache), kv.to_tensor(kv.shift(kept.cache, by, rotary_of(model))))
    with pytest.raises(ValueError, match="33 tokens or entries at once, the model reads up to 32"):
        distiller.compress(IDS, budget=33)
    with pytest.raises(ValueError, match="give a smaller chunk_size or budget"):
        KVDistiller(model, **sizes | {"chunk_size": 33}).compress(IDS, budget=9)


def test_figures_of_unanswerable_questions_are_those_of_squads_script():
    answers = ["Rome", "a red Rome", "", "Oslo", "The.", "Bern"]
    references = [("Rome",), ("red Rome", "Rome"), (), (), (), ("Oslo", "Bern street")]
    texts = [text or ("",) for text in references]
    rows = pd.DataFrame({"method": "full", "retention": 1.0, "answer": answers})
    rows["references"] = references
    rows["context"] = 0  # so that questions weigh the same, as in the script
    rows = rows.assign(exact_match=exact_match(answers, texts), f1=f1(answers, texts))
    rows = rows.assign(log_likelihood=-1.0, tokens=2, bytes=10)
    figures = {f["score"]: f["value"] for f in compression_figures(rows)}
    script = squad_v2(answers, references)
    for name in ("HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1", "f1"):
        assert 100 * figures[name] == pytest.approx(script[name]), name
    assert 100 * figures["exact_match"] == pytest.approx(script["exact"])
    answerable = rows[rows["references"].map(bool)]
    assert not any("Ans" in f["score"] for f in compression_figures(answerable))
