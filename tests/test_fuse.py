"""Laws of the C2C fuser: closed gates change no bit, positions do not matter, tokens are aligned."""

import copy
import functools
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from published_fusers import PublishedProjector, write_published
from safetensors.torch import load_file
from torch import nn

from kvlab import cache as kv
from kvlab import lab
from kvlab.cache import from_tensor, part, prefill, to_tensor, truncate
from kvlab.fuse import (
    NOISES,
    Aligned,
    Fuser,
    FuserArm,
    FuserExample,
    Settings,
    Size,
    align_tokens,
    entries,
    fuse_prompt,
    pad_fuser_batch,
    rehearsal_loss,
    response_loss,
    ridge_fuser,
)
from kvlab.generation import encode, encode_parts
from kvlab.layers import last_aligned, layer_map
from kvlab.models import CacheError, fingerprint, rotary_of

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAX = CHATML.replace(" | trim", "")
RECEIVER, SHARER = Size(3, 2, 16), Size(5, 1, 8)
SMALL = Settings(hidden=24)
ROTATED = Settings(hidden=24, keys="rotated")


def near(one, two, within=1e-5):
    torch.testing.assert_close(one, two, rtol=0, atol=within)


def make_fuser(receiver=RECEIVER, sharer=SHARER, layers=None, options=SMALL, logit=None):
    torch.manual_seed(0)
    fuser = Fuser(receiver, sharer, layers, options)
    if logit is not None:
        fuser.gate_logit.data.fill_(logit)
    return fuser


def tokens(rows, count, seed=0):
    return torch.randint(1, 97, (rows, count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair(tiny_model):
    """A receiver and a sharer of other depth, heads and width."""
    return tiny_model(), tiny_model(seed=1, num_hidden_layers=5, num_key_value_heads=1, head_dim=8)


@pytest.fixture(scope="module")
def texts(pair):
    ids = tokens(2, 7)
    return tuple(prefill(model, ids) for model in pair)


# -- the fuser


def test_the_published_fuser_has_477_8_million_parameters():
    with torch.device("meta"):
        fuser = Fuser(Size(28, 8, 128), Size(24, 2, 64))
    assert fuser.num_parameters() == 477_848_056
    weights = 2 * 28 * (1152 * 1024 + 3 * (2 * 1024 * 1024 + 1024) + 1024 * 1024 + 1024 * 8 + 1)
    biases = 2 * 28 * (1024 + 1024 + 8)
    assert fuser.num_parameters() == weights + biases


def test_a_change_is_what_the_equations_say_in_each_layer():
    fuser = make_fuser(options=Settings(hidden=24, dropout=0.5))
    sharer, receiver = torch.randn(6, 5, 8), torch.randn(6, 5, 32)  # (2 L, N, width)
    for parameter in fuser.parameters():
        parameter.data.normal_(std=0.3)

    def linear(layer, i, x):
        product = x @ layer.weight[i]
        return product if layer.bias is None else product + layer.bias[i]

    def mlp(layer, i, x):
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm[i]
        up = linear(layer.up, i, normed)
        return x + linear(layer.down, i, up * (1 + torch.erf(up / math.sqrt(2))) / 2)

    changes = fuser._changes(torch.cat((sharer, receiver), -1))
    for i in range(6):
        x = linear(fuser.input_proj, i, torch.cat((sharer[i], receiver[i]), -1))
        x = mlp(fuser.shared_mlp, i, x)
        value = linear(fuser.value_out, i, mlp(fuser.value_mlp, i, x))
        weight = torch.sigmoid(linear(fuser.weight_out, i, mlp(fuser.weight_mlp, i, x)))
        heads = [weight[:, h, None] * value[:, 16 * h : 16 * h + 16] for h in range(2)]
        near(changes[i], torch.cat(heads, 1), 1e-4)


@pytest.mark.parametrize("options", [SMALL, ROTATED])
def test_an_untrained_fuser_returns_the_receivers_bits(texts, options):
    fuser = make_fuser(options=options)
    assert not fuser.training
    assert torch.equal(to_tensor(fuser(*texts)), to_tensor(texts[0].cache))


@pytest.mark.parametrize(("layer", "what"), [(0, 1), (2, 0)])
def test_one_open_gate_changes_its_keys_or_values_and_nothing_else(texts, layer, what):
    fuser = make_fuser()
    fuser.gate_logit.data[2 * layer + what] = 0.01
    assert (fuser.gate_logits() > 0).nonzero().tolist() == [[layer, what]]
    before, after = to_tensor(texts[0].cache), to_tensor(fuser(*texts))
    same = (before == after).flatten(2)
    assert same.all(-1).logical_not().nonzero().tolist() == [[layer, what]]
    assert not same[layer, what].any()


def test_fusing_leaves_both_caches_as_they_were(pair):
    ids = tokens(1, 6)
    prefixes = [prefill(model, ids) for model in pair]
    before = [to_tensor(prefix.cache) for prefix in prefixes]
    fused = make_fuser(logit=1)(*prefixes)
    pair[0](ids, past_key_values=fused)  # the model goes on from it, and writes
    fused.layers[0].keys.zero_()
    assert torch.equal(to_tensor(prefixes[0].cache), before[0])
    assert torch.equal(to_tensor(prefixes[1].cache), before[1])


@pytest.mark.parametrize("moved", [(0, 31), (31, 57)])
def test_the_change_does_not_depend_on_the_positions_of_the_texts(pair, moved):
    ids = tokens(2, 7)
    here = [prefill(model, ids) for model in pair]
    there = [prefill(model, ids, position=p) for model, p in zip(pair, moved, strict=True)]
    fuser, published = make_fuser(logit=1), make_fuser(options=ROTATED, logit=1)
    back = kv.shift(fuser(*there), -moved[0], rotary_of(pair[0]))
    near(to_tensor(back), to_tensor(fuser(*here)), 1e-4)
    back = to_tensor(kv.shift(published(*there), -moved[0], rotary_of(pair[0])))
    difference = (back - to_tensor(published(*here))).abs()
    assert difference[:, 0].max() > 1e-2  # the published one does
    assert difference[:, 1].max() < 1e-4  # values have no position


@pytest.mark.parametrize("rope", ["llama3", "yarn"])
def test_scaled_ropes_are_undone_and_put_back(tiny_model, rope):
    fuser = make_fuser(sharer=RECEIVER, logit=1)
    with torch.no_grad():  # the change is 1, whatever the features are
        for layer, value in ((fuser.value_out, 1.0), (fuser.weight_out, 30.0)):
            layer.weight.zero_()
            layer.bias.fill_(value)
    prefix = prefill(tiny_model(rope=rope), tokens(1, 5))
    fused = entries(replace(prefix, cache=fuser(prefix, prefix)))
    near((fused - entries(prefix))[0], torch.ones(2, 1, 5, 32), 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_receiver_and_sharer(tiny_model, pair, family):
    model, ids = tiny_model(family), tokens(1, 6)
    size = Size.of(model.config)
    for receiver, sharer, sizes in (
        (model, pair[1], (size, SHARER)),
        (pair[1], model, (SHARER, size)),
    ):
        prefix = prefill(receiver, ids)
        fused = make_fuser(*sizes, logit=1)(prefix, prefill(sharer, ids))
        logits = prefill(receiver, ids[:, :1], replace(prefix, cache=fused)).logits
        assert torch.isfinite(logits).all()
        assert not torch.allclose(logits, prefill(receiver, ids[:, :1], prefix).logits)


def test_padding_is_neither_read_nor_changed(pair):
    ids, fuser = tokens(2, 6), make_fuser(logit=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    prefixes = [prefill(model, ids, attention_mask=mask) for model in pair]
    batch, before = to_tensor(fuser(*prefixes)), to_tensor(prefixes[0].cache)
    assert torch.equal(batch[:, :, 0, :, :2], before[:, :, 0, :, :2])
    alone = to_tensor(fuser(*(prefill(model, ids[:1, 2:]) for model in pair)))
    near(batch[:, :, :1, :, 2:], alone, 1e-4)


def test_part_of_a_text_can_be_fused_later(texts):
    fuser, parts = make_fuser(logit=1), []
    for start, stop in ((0, 5), (5, 7)):
        parts.append(fuser(*(part(prefix, start, stop) for prefix in texts)))
    near(to_tensor(kv.join(*parts)), to_tensor(fuser(*texts)))


def test_the_matched_control_reads_nothing_of_the_sharer(pair, texts):
    matched = make_fuser(options=Settings(hidden=24, use_sharer=False), logit=1)
    fuser, other = make_fuser(logit=1), prefill(pair[1], tokens(2, 7, seed=5))
    assert torch.equal(to_tensor(matched(*texts)), to_tensor(matched(texts[0], other)))
    assert not torch.allclose(to_tensor(fuser(*texts)), to_tensor(fuser(texts[0], other)))
    assert matched.num_parameters() == fuser.num_parameters()


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_and_keeps_its_dtype(tiny_model, dtype, weights):
    fuser, prefix = (
        make_fuser(sharer=RECEIVER, logit=1),
        prefill(tiny_model(dtype=dtype), tokens(1, 6)),
    )
    wide = replace(prefix, cache=from_tensor(to_tensor(prefix.cache).float()))
    stored, exact = to_tensor(wide.cache), to_tensor(fuser(wide, wide))
    half = to_tensor(copy.deepcopy(fuser).to(weights)(prefix, prefix))
    assert half.dtype == dtype
    rounding = torch.finfo(dtype).eps * stored.abs().mean() + torch.finfo(torch.bfloat16).eps * 0.2
    assert (half.float() - exact).abs().mean() < rounding < 0.1 * (exact - stored).abs().mean()
    closed = make_fuser(sharer=RECEIVER).to(weights)
    assert torch.equal(to_tensor(closed(prefix, prefix)), to_tensor(prefix.cache))


# -- gates


@pytest.mark.parametrize("logit", [-3.0, -0.2, 0.0, 0.2, 3.0])
def test_gates_in_training_are_open_with_probability_sigma(logit):
    chances = {"logistic": 1 / (1 + math.exp(-logit)), "gumbel": 1 - math.exp(-math.exp(logit))}
    for noise, chance in chances.items():
        fuser = make_fuser(options=Settings(hidden=4, noise=noise), logit=logit)
        for fuser.temperature in (1.0, 0.001):
            drawn = fuser._gates((3, 2, 70, 1, 100, 1))  # 42000: 0.01 is 4 deviations
            assert abs((drawn > 0.5).float().mean().item() - chance) < 0.01
    assert abs(drawn.mean().item() - chance) < 0.01  # cold gates are 0 or 1


@pytest.mark.parametrize("logit", [-0.2, -1e-3, 1e-3, 0.2])
def test_most_gates_of_training_agree_with_inference_and_gumbel_ones_do_not(logit):
    agree = {}
    for noise in NOISES:
        fuser = make_fuser(options=Settings(hidden=4, noise=noise), logit=logit)
        fuser.temperature = 0.001
        drawn = fuser._gates((3, 2, 170, 10, 100, 1)) > 0.5
        agree[noise] = (drawn == (logit > 0)).float().mean().item() > 0.5 - 0.0015
    assert agree == {"logistic": True, "gumbel": logit > 0}


def test_a_sure_gate_makes_training_what_inference_is(texts):
    """As temperature falls the two are the same: noise does not turn a gate that is sure."""
    gaps = []
    for logit in (-18.0, 18.0):
        fuser = make_fuser(options=Settings(hidden=24, dropout=0), logit=logit)
        expected = to_tensor(fuser(*texts))
        for fuser.temperature in (10.0, 1.0, 0.001):
            torch.manual_seed(0)
            gaps.append((to_tensor(fuser.train()(*texts)) - expected).abs().max().item())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[3] > gaps[4] > gaps[5]
    assert max(gaps[2], gaps[5]) < 1e-6


def test_the_gates_logit_gets_a_gradient_and_each_token_its_own_gate(texts):
    fuser = make_fuser().train()
    to_tensor(fuser(*texts)).square().sum().backward()
    assert (fuser.gate_logit.grad != 0).all()
    assert fuser._gates((3, 2, 2, 3, 4, 1)).unique().numel() == 144


# -- layers


def test_a_network_reads_the_weighted_mean_of_the_layers_it_is_mapped_to(texts):
    receiver, sharer = texts
    similarity = [[0.1, 0.9, 0, 0, 0], [0.5, 0, 0, 0, 0.4], [0, 0, 0.3, 0.2, 0]]
    chosen = layer_map(torch.tensor(similarity), k=2)
    plain = to_tensor(kv.unrotate(sharer.cache, sharer.positions, sharer.rotary))
    mixed = torch.einsum("rk,rk...->r...", chosen.weights.float(), plain[chosen.indices])
    mixed = kv.rotate(from_tensor(mixed), sharer.positions, sharer.rotary)
    fused = make_fuser(layers=chosen, logit=1)(receiver, sharer)
    three = make_fuser(sharer=SHARER._replace(layers=3), logit=1)
    near(to_tensor(fused), to_tensor(three(receiver, replace(sharer, cache=mixed))))


# -- tokens


@functools.cache
def load_tokenizer(name, template=None):
    tokenizer = lab.load_tokenizer(name)
    if template:
        tokenizer.chat_template = template
    return tokenizer


def message(text, role="user"):
    return [{"role": role, "content": text}]


def spans(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


WORDS = st.text(
    st.sampled_from("Anna  lives in Rome,\n3+4=7 naïve 中文é 🙂"), min_size=1, max_size=40
)


@settings(deadline=None, max_examples=30)
@given(text=WORDS)
def test_tokens_meet_exactly_where_they_spell_the_same_characters(text):
    one, two = load_tokenizer("lab-draft"), load_tokenizer("lab-teacher")
    aligned = align_tokens(one, two, message(text))
    ids, weights = aligned.receiver_ids, aligned.token_weights
    assert ids.tolist() == encode(one, message(text))
    assert aligned.sharer_ids.tolist() == encode(two, message(text))
    assert (weights is None) == torch.equal(ids, aligned.sharer_ids)
    if weights is None:
        return
    rendered = one.apply_chat_template(message(text), tokenize=False, add_generation_prompt=True)
    receiver_spans, sharer_spans = spans(one, rendered), spans(two, rendered)
    if receiver_spans != sharer_spans:
        for i, (a, b) in enumerate(receiver_spans):
            for j, (c, d) in enumerate(sharer_spans):
                assert (weights[i, j] > 0) == (max(a, c) < min(b, d))  # every overlap counts
    near(weights.sum(1), torch.ones(len(ids)))
    assert (weights.sum(0) > 0).all()
    longest = align_tokens(one, two, message(text), longest=True).token_weights
    assert ((longest > 0).sum(1) == 1).all()
    assert torch.equal((longest * weights).sum(1), weights.amax(1))


@settings(deadline=None, max_examples=20)
@given(
    text=WORDS.filter(str.strip),
    template=st.sampled_from([CHATML, LAX]),
    system=st.sampled_from(["system", "s"]),
)
def test_where_templates_differ_the_contents_of_messages_are_aligned(text, template, system):
    """Even where a message has the words that a template writes, "system" or "s"."""
    one, two = load_tokenizer("lab-draft"), load_tokenizer("lab-draft", template)
    aligned = align_tokens(one, two, [*message(system, "system"), *message(text)])
    weights = aligned.token_weights
    spelled = one.decode(aligned.receiver_ids[weights.sum(1) > 0])
    other = two.decode(aligned.sharer_ids[weights.sum(0) > 0])
    content = "".join((system + text).split())
    assert "".join(spelled.split()) == "".join(other.split()) == content
    assert set(weights.sum(1).mul(1000).round().int().tolist()) <= {0, 1000}


def test_token_weights_of_the_same_tokens_give_what_none_gives(texts):
    fuser = make_fuser(logit=1)
    same = fuser(*texts, torch.eye(7).expand(2, 7, 7))
    near(to_tensor(same), to_tensor(fuser(*texts)), 0)


def test_a_token_reads_the_weighted_mean_of_the_sharers_tokens(pair):
    fuser, receiver = make_fuser(logit=1), prefill(pair[0], tokens(1, 3))
    sharer = prefill(pair[1], tokens(1, 4, seed=1))
    weights = torch.tensor([[[1.0, 0, 0, 0], [0, 0.25, 0.75, 0], [0, 0, 0, 0]]])
    fused = to_tensor(fuser(receiver, sharer, weights))
    assert torch.equal(fused[..., 2, :], to_tensor(receiver.cache)[..., 2, :])  # all weights 0
    plain = to_tensor(kv.unrotate(sharer.cache, sharer.positions, sharer.rotary))
    middle = plain[..., 1, :] / 4 + plain[..., 2, :] * 3 / 4
    mixed = from_tensor(torch.stack((plain[..., 0, :], middle, plain[..., 3, :]), -2))
    mixed = kv.rotate(mixed, receiver.positions, sharer.rotary)
    same = fuser(receiver, replace(receiver, cache=mixed, rotary=sharer.rotary))
    near(to_tensor(same)[..., :2, :], fused[..., :2, :])


# -- prompts and training


@functools.cache
def lab_pair():
    """The lab's draft and teacher, with other tokenizers."""
    models = [lab.load(name).requires_grad_(False) for name in ("lab-draft", "lab-teacher")]
    return *models, load_tokenizer("lab-draft"), load_tokenizer("lab-teacher")


def lab_fuser(logit=None, **options):
    receiver, sharer, *_ = lab_pair()
    sizes = Size.of(receiver.config), Size.of(sharer.config)
    return make_fuser(*sizes, options=Settings(hidden=32, **options), logit=logit)


LIVES = [("Anna", "Rome"), ("Ben", "the north of Paris"), ("Clara", "Oslo"), ("Dan", "New Berlin")]


@functools.cache
def lab_examples():
    examples, tokenizers = [], lab_pair()[2:]
    for who, where in LIVES:
        ask = message(f"Where does {who} live? {who} lives in {where}.")
        response = encode_parts(tokenizers[0], [*ask, *message(where, "assistant")])[-1]
        examples.append(FuserExample(align_tokens(*tokenizers, ask), torch.tensor(response)))
    return examples


def test_a_fused_prompt_is_all_but_its_last_token():
    receiver, sharer, *tokenizers = lab_pair()
    prompt = align_tokens(*tokenizers, message("Where does Anna live?"))
    closed = fuse_prompt(lab_fuser(), receiver, sharer, prompt)
    opened = fuse_prompt(lab_fuser(logit=1), receiver, sharer, prompt)
    ids = prompt.receiver_ids[None]
    assert [*closed.input_ids, ids[0, -1]] == ids[0].tolist()
    assert closed.next_position == kv.length(closed.cache) == len(closed.input_ids)
    expected = prefill(receiver, ids).logits
    near(prefill(receiver, ids[:, -1:], closed).logits, expected, 1e-4)
    assert (prefill(receiver, ids[:, -1:], opened).logits - expected).abs().max() > 1e-2


def test_the_loss_of_a_batch_is_that_of_each_response_given_its_own_fused_prompt():
    receiver, sharer, *_ = lab_pair()
    examples, fuser = lab_examples(), lab_fuser(logit=1)
    batch, total = pad_fuser_batch(examples), 0.0
    for prompt, response in examples:
        fused = fuse_prompt(fuser, receiver, sharer, prompt)
        ids = torch.cat((prompt.receiver_ids[-1:], response))[None]
        positions = torch.arange(ids.shape[1])[None] + fused.next_position
        logits = receiver(ids, past_key_values=fused.cache, position_ids=positions).logits
        total += nn.functional.cross_entropy(logits[0, :-1], response, reduction="sum").item()
    assert len({len(e.response) for e in examples}) > 1
    assert len({len(e.prompt.receiver_ids) for e in examples}) > 1
    assert batch["weights"].sum() == sum(len(e.response) for e in examples)
    ce = response_loss(fuser, receiver, sharer, batch)["ce"].item()
    near(ce, total / batch["weights"].sum().item(), 1e-4)


def test_only_the_fuser_gets_a_gradient_and_all_of_it_does():
    receiver, sharer, *_ = lab_pair()
    fuser = lab_fuser().train()
    response_loss(fuser, receiver, sharer, pad_fuser_batch(lab_examples()))["ce"].backward()
    silent = [name for name, p in fuser.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert all(p.grad is None for model in (receiver, sharer) for p in model.parameters())


def test_training_lowers_the_loss_opens_gates_and_changes_no_model():
    receiver, sharer, *_ = lab_pair()
    before = [fingerprint(model) for model in (receiver, sharer)]
    batch, temperatures = pad_fuser_batch(lab_examples()), []
    start = response_loss(lab_fuser(), receiver, sharer, batch)["ce"].item()

    def loss(fuser, *args):
        temperatures.append(fuser.temperature)
        return response_loss(fuser, *args)

    arm = FuserArm(32, 0.0, steps=40, batch_size=4, learning_rate=3e-3, decode=False)
    fuser, history = arm.train(receiver, sharer, lab_examples(), loss)
    assert response_loss(fuser, receiver, sharer, batch)["ce"].item() < 0.5 * start
    assert history[-1]["open"] == (fuser.gate_logit > 0).float().mean().item() > 0
    assert not fuser.training
    assert [fingerprint(model) for model in (receiver, sharer)] == before
    falls = [b / a for a, b in itertools.pairwise(temperatures)]
    assert temperatures[0] == 1
    assert math.isclose(temperatures[-1], 0.001)
    assert max(falls) - min(falls) < 1e-9  # geometric
    rates = [entry["learning_rate"] for entry in history]
    assert rates.index(max(rates)) in (3, 4)
    assert rates[-1] < 0.1 * max(rates)


def test_the_fuser_trains_in_bfloat16_arithmetic():
    receiver, sharer, *_ = lab_pair()
    arm = FuserArm(32, steps=2, batch_size=4, precision="bf16", decode=False)
    fuser, history = arm.train(receiver, sharer, lab_examples())
    assert all(math.isfinite(entry["ce"]) and entry["grad_norm"] > 0 for entry in history)
    assert {p.dtype for p in fuser.parameters()} == {torch.float32}


# -- tokens of the response, fused too


@pytest.fixture(scope="module")
def exact_pair(tiny_model):
    """The pair and an open fuser in float64."""
    small = {"num_hidden_layers": 5, "num_key_value_heads": 1, "head_dim": 8}
    fuser = make_fuser(options=Settings(hidden=24, dropout=0), logit=1).double()
    sharer = tiny_model(rope="linear", seed=1, dtype=torch.float64, **small)
    return fuser, tiny_model(dtype=torch.float64), sharer


def same_tokens(*sizes):
    """Examples of random tokens that both models share, from (prompt, response) lengths."""
    texts = [tokens(1, sum(size), seed)[0].split(size) for seed, size in enumerate(sizes)]
    return [FuserExample(Aligned(prompt, prompt), response) for prompt, response in texts]


RAGGED = same_tokens((6, 4), (2, 1), (9, 6), (4, 3))


def loss_in_a_loop(fuser, receiver, sharer, examples, count):
    """Each text by itself: fuse the prompt, read and fuse some tokens, read the rest one by one."""
    total = tokens = 0
    for prompt, response in examples:
        ids = torch.cat((prompt.receiver_ids, response))[None]
        begin, other = len(prompt.receiver_ids) - 1, prefill(sharer, ids)
        stop, prefix = min(begin + count, ids.shape[1]), prefill(receiver, ids[:, :begin])
        prefix, losses = replace(prefix, cache=fuser(prefix, part(other, 0, begin))), []
        for i in range(begin, ids.shape[1]):
            if i == stop and count:
                new = fuser(part(prefix, begin, stop), part(other, begin, stop))
                prefix = replace(prefix, cache=kv.join(truncate(prefix.cache, begin), new))
            prefix = prefill(receiver, ids[:, i : i + 1], prefix)
            losses.append(-prefix.logits.log_softmax(-1)[0, ids[0, min(i + 1, ids.shape[1] - 1)]])
        total, tokens = total + sum(losses[:-1]), tokens + len(response)
    return total / tokens


@pytest.mark.parametrize("count", [0, 1, 3, 5, 6])
def test_the_loss_with_some_of_the_response_fused_is_that_of_a_plain_loop(exact_pair, count):
    batch = pad_fuser_batch(RAGGED)
    with torch.no_grad():
        loss = response_loss(*exact_pair, batch, count)["ce"]
        near(loss.double(), loss_in_a_loop(*exact_pair, RAGGED, count))
        change = abs(loss - response_loss(*exact_pair, batch)["ce"])
        assert change == 0 if count in (0, 6) else change > 1e-3  # after six, nothing is predicted


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_padding_of_the_fused_response_changes_nothing(exact_pair, count):
    batch = pad_fuser_batch(RAGGED)
    batch["weights"][2] = 0  # the longest, beside which all others are padded
    others = pad_fuser_batch([*RAGGED[:2], RAGGED[3]])
    with torch.no_grad():
        loss = response_loss(*exact_pair, batch, count)["ce"]
        near(loss, response_loss(*exact_pair, others, min(count, 4))["ce"])
        padding = batch["attention_mask"] == 0
        assert padding[:, -2:].any()
        assert padding[:, :3].any()
        batch["input_ids"] = torch.where(padding, 96, batch["input_ids"])
        near(response_loss(*exact_pair, batch, count)["ce"], loss)


@pytest.mark.parametrize("count", [0, 3])
def test_the_gradient_goes_through_the_fused_response(exact_pair, count):
    fuser, batch = copy.deepcopy(exact_pair[0]), pad_fuser_batch(RAGGED)
    response_loss(fuser, *exact_pair[1:], batch, count)["ce"].backward()
    parameters = [p for name, p in fuser.named_parameters() if name != "gate_logit"]  # no slope
    generator = torch.Generator().manual_seed(count)
    steps = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum((p.grad * step).sum().item() for p, step in zip(parameters, steps, strict=True))
    ends = []
    with torch.no_grad():
        for size in (1e-3, -2e-3):
            for p, step in zip(parameters, steps, strict=True):
                p += size * step
            ends.append(response_loss(fuser, *exact_pair[1:], batch, count)["ce"].item())
    assert math.isclose(slope, (ends[0] - ends[1]) / 2e-3, rel_tol=1e-2)
    assert abs(slope) > 1e-2


def test_fusing_the_response_needs_the_same_tokens(exact_pair):
    ids = RAGGED[0].prompt.receiver_ids
    mixed = [FuserExample(Aligned(ids, ids, torch.eye(6)), RAGGED[0].response), *RAGGED[1:]]
    batch, plain = pad_fuser_batch(mixed), pad_fuser_batch(RAGGED)
    with torch.no_grad():
        near(response_loss(*exact_pair, batch)["ce"], response_loss(*exact_pair, plain)["ce"])
    with pytest.raises(ValueError, match="other tokens: set fused_response_tokens to 0"):
        response_loss(*exact_pair, batch, 1)


DECODES = FuserArm(24, steps=6, batch_size=4, learning_rate=3e-3)


def test_training_for_decoding_lowers_the_loss_whatever_is_fused(pair):
    fuser, batch = make_fuser(), pad_fuser_batch(RAGGED)
    start = [response_loss(fuser, *pair, batch, count)["ce"].item() for count in range(6)]
    fuser, _ = replace(DECODES, dropout=0, steps=60).train(*pair, RAGGED)
    end = [response_loss(fuser, *pair, batch, count)["ce"].item() for count in range(6)]
    assert max(start) - min(start) < 1e-5  # closed
    assert all(b < 0.7 * a for a, b in zip(start, end, strict=True))


def test_each_part_of_a_response_is_drawn_and_none_without_decoding(pair):
    drawn = []

    def spy(fuser, receiver, sharer, batch, fused_response_tokens=0):
        drawn.append(fused_response_tokens)
        return {"ce": fuser.gate_logit.sum()}

    replace(DECODES, steps=50).train(*pair, RAGGED, spy)
    assert set(drawn) == set(range(6))  # of six tokens the last is only predicted
    drawn.clear()
    replace(DECODES, steps=3, decode=False).train(*pair, RAGGED, spy)
    assert drawn == [0, 0, 0]


def test_training_is_reproducible_and_goes_on_after_a_cut(pair, tmp_path):
    calls = []

    def cut(*args, **options):
        calls.append(args)
        if len(calls) == 5:
            raise InterruptedError
        return response_loss(*args, **options)

    fusers, histories = zip(*(DECODES.train(*pair, RAGGED) for _ in range(2)))
    assert [entry["ce"] for entry in histories[0]] == [entry["ce"] for entry in histories[1]]
    fuser, _ = replace(DECODES, decode=False).train(*pair, RAGGED)
    options = {"checkpoint": tmp_path / "run.safetensors", "every": 2}
    with pytest.raises(InterruptedError):
        DECODES.train(*pair, RAGGED, cut, **options)
    resumed, history = DECODES.train(*pair, RAGGED, **options)
    assert len(history) == 6
    one, same, other, resumed = ([*f.parameters()] for f in (*fusers, fuser, resumed))
    assert all(map(torch.equal, one, same))
    assert all(map(torch.equal, one, resumed))
    assert not all(map(torch.equal, one, other))


def test_a_control_differs_from_the_fuser_in_its_sharer_alone(pair):
    receiver, sharer = pair
    fusers = {}
    for control in ("none", "self", "matched"):
        arm = FuserArm(hidden=24, control=control, steps=1, batch_size=4, layer_map="first")
        fuser, history = arm.train(*pair, RAGGED)
        fusers[control] = fuser
        assert len(history) == 1
        used = receiver if control == "self" else sharer
        assert fuser.trained_for["sharer"] == fingerprint(used)
        assert fuser.sharer == Size.of(used.config)
        assert fuser.layer_map.indices.flatten().tolist() == [0, 1, 2]
    assert fusers["none"].settings == fusers["self"].settings == SMALL
    assert fusers["matched"].settings == replace(SMALL, use_sharer=False)
    assert fusers["none"].num_parameters() == fusers["matched"].num_parameters()


# -- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_fuser_comes_back_bit_for_bit(tmp_path, texts, dtype):
    chosen = layer_map(torch.rand(3, 5, generator=torch.Generator().manual_seed(0)), k=2)
    options = Settings(hidden=20, dropout=0.3, keys="rotated", noise="gumbel", use_sharer=True)
    fuser = make_fuser(layers=chosen, options=options, logit=0.5).to(dtype)
    assert fuser.save_pretrained(tmp_path / "fuser") == tmp_path / "fuser"
    assert {f.name for f in (tmp_path / "fuser").iterdir()} == {"fuser.json", "fuser.safetensors"}
    again = Fuser.from_pretrained(tmp_path / "fuser")
    assert (again.receiver, again.sharer, again.settings) == (RECEIVER, SHARER, options)
    assert torch.equal(again.layer_map.weights, chosen.weights)
    assert all(p.requires_grad and p.dtype == dtype for p in again.parameters())
    assert torch.equal(to_tensor(again(*texts)), to_tensor(fuser(*texts)))
    assert not again.training


def test_a_fuser_of_format_version_1_is_read(tmp_path):
    """tests/data/fuser_v1 holds the parameters 0, 1, 2, ... in the order of the state dict."""
    folder = Path(__file__).parent / "data/fuser_v1"
    fuser = Fuser.from_pretrained(folder)
    assert fuser.settings == Settings(hidden=3, dropout=0.25, noise="gumbel", use_sharer=False)
    assert (fuser.receiver, fuser.sharer) == (Size(2, 2, 2), Size(3, 1, 2))
    assert list(fuser.trained_for) == ["receiver", "sharer"]
    values = torch.cat([tensor.flatten() for tensor in fuser.state_dict().values()])
    assert torch.equal(values, torch.arange(len(values)).float())
    assert fuser.value_out.bias.shape == (4, 4)
    assert fuser.shared_mlp.norm.shape == (4, 3)
    fuser.save_pretrained(tmp_path)
    again = Fuser.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], x) for name, x in fuser.state_dict().items())


def test_the_shipped_fuser_has_the_names_of_today():
    folder = lab.models.MODELS / "lab-fuser"
    assert json.loads((folder / "fuser.json").read_text())["version"] == 2
    assert load_file(folder / "fuser.safetensors").keys() == make_fuser().state_dict().keys()


def test_a_trained_fuser_tells_other_models_from_those_it_was_trained_for(tmp_path, recwarn):
    receiver, sharer, *_ = lab_pair()
    other = copy.deepcopy(sharer)
    other.model.layers[3].mlp.up_proj.weight.data.mul_(1.5)
    lab_fuser().warn_of_others(receiver, other)  # not trained: for any
    arm = FuserArm(32, steps=1, batch_size=4, decode=False)
    fuser, _ = arm.train(receiver, sharer, lab_examples())
    fuser = Fuser.from_pretrained(fuser.save_pretrained(tmp_path))
    fuser.warn_of_others(receiver, sharer)
    halves = [lab.load(name, dtype=torch.bfloat16) for name in ("lab-draft", "lab-teacher")]
    fuser.warn_of_others(*halves)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"another sharer \(weights sha256 is .* in the file and"):
        fuser.warn_of_others(receiver, other)
    with pytest.warns(UserWarning, match=r"is for another receiver \(architecture"):
        fuser.warn_of_others(sharer, sharer)


def test_a_folder_without_a_fuser_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"fuser\.json"):
        Fuser.from_pretrained(tmp_path)
    make_fuser().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "fuser.json").read_text())
    for change, reason in (
        ({"version": 7}, "a fuser of version 7, expected 1 or 2"),
        ({"receiver": Size(2, 2, 16)._asdict()}, r"for \(3, 5\) layers, expected \(2, 5\)"),
        ({"settings": {"hidden": 8}}, "size mismatch"),
    ):
        (tmp_path / "fuser.json").write_text(json.dumps(config | change))
        with pytest.raises((ValueError, RuntimeError), match=reason):
            Fuser.from_pretrained(tmp_path)


# -- published folders


LAYERS_OF_PUBLISHED = {0: [[1, 2], [3, 0]], 2: [[4, 0]]}  # layer 1 has none, layer 0 two


def published_folder(folder):
    """Write three projectors, of which the last has a closed gate."""
    return write_published(folder, RECEIVER, SHARER, LAYERS_OF_PUBLISHED)


@pytest.mark.parametrize("inside", [".", "final"])
def test_a_published_folder_gives_the_caches_of_its_description(tmp_path, texts, inside):
    projectors = published_folder(tmp_path / "published" / inside)
    fuser = Fuser.from_pretrained(tmp_path / "published")
    assert (fuser.receiver, fuser.sharer) == (RECEIVER, SHARER)
    assert fuser.gate_logits().gt(0).tolist() == [[False, True], [False, False], [True, True]]
    fused, before = fuser(*texts), texts[0].cache
    for layer, (entry, old) in enumerate(zip(fused.layers, before.layers, strict=True)):
        if layer == 1:
            assert torch.equal(entry.keys, old.keys)
            assert torch.equal(entry.values, old.values)
            continue
        source, index = LAYERS_OF_PUBLISHED[layer][0]
        shared = texts[1].cache.layers[source]
        for kind, x in (("key", "keys"), ("value", "values")):
            sizes = getattr(shared, x), getattr(old, x)
            near(getattr(entry, x), projectors[index](kind, *sizes))
    assert torch.equal(fused.layers[0].keys, before.layers[0].keys)  # its gate is closed
    assert not torch.equal(fused.layers[0].values, before.layers[0].values)
    again = Fuser.from_pretrained(fuser.save_pretrained(tmp_path / "ours"))
    assert torch.equal(to_tensor(again(*texts)), to_tensor(fused))


def test_a_published_fuser_of_the_papers_size_has_the_papers_number_of_parameters():
    published = PublishedProjector(Size(28, 8, 128), Size(24, 2, 64), 1024, 1024, 3)
    assert 28 * sum(p.numel() for p in published.parameters()) == 477_848_056


def test_a_name_on_the_hub_is_the_folder_behind_the_colon(tmp_path, monkeypatch):
    published_folder(tmp_path / "qwen_Fuser" / "final")
    calls = []

    def download(repository, allow_patterns):
        calls.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("kvlab.fuse.snapshot_download", download)
    for name in ("nics-efc/C2C_Fuser:qwen_Fuser", "qwen_Fuser"):
        assert Fuser.from_pretrained(name).sharer == SHARER
    assert calls == [("nics-efc/C2C_Fuser", "qwen_Fuser/*")] * 2
    Fuser.from_pretrained(tmp_path / "qwen_Fuser")
    assert len(calls) == 2  # a local folder is read as it is
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"^a/b:c is no folder here, and not to be had from the"):
        Fuser.from_pretrained("a/b:c")


def test_a_damaged_published_folder_is_a_sentence(tmp_path, texts):
    folder = tmp_path / "published"
    projectors = published_folder(folder)
    fuser = Fuser.from_pretrained(folder)
    with pytest.raises(CacheError, match="receiver first"):
        fuser(texts[1], texts[0])
    place, config = folder / "projector_0.json", folder / "projector_config.json"
    whole = json.loads(place.read_text())
    for change, reason in (
        ({"init_args": {}}, r"projector_0.json does not fit: there is no 'target_dim'"),
        ({"class": "OtherProjector"}, "its class is OtherProjector, expected C2CProjector"),
        ({"init_args": whole["init_args"] | {"hidden_dim": 13}}, "differ in size, expected one"),
    ):
        place.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=reason):
            Fuser.from_pretrained(folder)
    place.write_text(json.dumps(whole))
    state = projectors[0].state_dict()
    for change, reason in (
        ({"key_in.weight": torch.ones(12, 9)}, r"projector_0.pt .*key_in.weight is \[9, 12\], exp"),
        ({"class": PublishedProjector}, "projector_0.pt does not fit: it is no file of tensors"),
    ):
        torch.save(state | change, folder / "projector_0.pt")
        with pytest.raises(ValueError, match=reason):
            Fuser.from_pretrained(folder)
    torch.save({}, folder / "projector_0.pt")
    with pytest.raises(ValueError, match=r"projector_0.pt does not fit: there is no 'key_gate"):
        Fuser.from_pretrained(folder)
    (folder / "projector_0.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"There is no file .*projector_0\.pt"):
        Fuser.from_pretrained(folder)
    for broken in ({}, {"0": {"1": {}}}, {"0": {"1": {"0": [[0, 0]]}, "2": {"0": [[0, 1]]}}}):
        config.write_text(json.dumps(broken))
        with pytest.raises(
            ValueError, match=r"config.json does not fit: it is for \d pairs of mod"
        ):
            Fuser.from_pretrained(folder)


# -- rivals


def test_a_low_rank_fuser_adds_one_map_of_keys_and_values_of_both_models(tmp_path, texts):
    fuser = make_fuser(options=Settings(rank=5), logit=1)
    assert torch.equal(to_tensor(fuser(*texts)), to_tensor(texts[0].cache))  # it starts at zero
    assert fuser.num_parameters() == 3 * (5 * 2 * (8 + 32) + 5 * 2 * 32 + 2 * 32) + 6
    for parameter in fuser.value_out.parameters():
        nn.init.normal_(parameter)
    receiver = entries(texts[0])
    sharer = entries(texts[1])[2:]  # last layers
    fused = entries(replace(texts[0], cache=fuser(*texts)))
    changes = (fused - receiver).transpose(0, 1)
    for layer in range(3):
        features = [x[layer, kind] for kind in (0, 1) for x in (sharer, receiver)]
        low = torch.cat(features, -1) @ fuser.input_proj.weight[layer]
        change = low @ fuser.value_out.weight[layer] + fuser.value_out.bias[layer]
        near(changes[:, layer], torch.stack(change.chunk(2, -1)), 1e-4)
    again = Fuser.from_pretrained(fuser.save_pretrained(tmp_path))
    assert torch.equal(to_tensor(again(*texts)), to_tensor(fuser(*texts)))


def test_a_low_rank_fuser_learns_from_the_sharer():
    receiver, sharer, *_ = lab_pair()
    options = {"steps": 40, "batch_size": 4, "learning_rate": 1e-2, "decode": False}
    start = response_loss(lab_fuser(), receiver, sharer, pad_fuser_batch(lab_examples()))["ce"]
    fuser, history = FuserArm(rank=4, gate=4.0, **options).train(receiver, sharer, lab_examples())
    assert history[-1]["ce"] < 0.5 * start
    assert fuser.input_proj.weight.grad is None or fuser.input_proj.weight.grad.any()


@pytest.mark.parametrize("mix", [1.0, 0.25])
def test_ridge_maps_are_those_of_least_squares_with_a_ridge(pair, mix):
    ids = [tokens(1, n, seed)[0] for seed, n in enumerate((9, 30, 21))]
    fuser = ridge_fuser(*pair, ids, layer_map(torch.eye(3, 5), k=1), strength=0.01, mix=mix)
    prefixes = [[prefill(model, row[None]) for model in pair] for row in ids]
    x = torch.cat([entries(sharer)[:3] for _, sharer in prefixes], 3)[:, :, 0].double()
    y = torch.cat([entries(receiver) for receiver, _ in prefixes], 3)[:, :, 0].double()
    held = [prefill(model, tokens(2, 5, seed=9), position=3) for model in pair]
    fused = entries(replace(held[0], cache=fuser(*held)))
    old, inputs = entries(held[0]), entries(held[1])
    for layer, kind in itertools.product(range(3), range(2)):
        a = np.pad(x[layer, kind].numpy(), ((0, 0), (0, 1)), constant_values=1)
        penalty = np.sqrt(0.01 * np.square(a).sum(0).mean()) * np.eye(9)
        b = np.concatenate((y[layer, kind].numpy(), np.zeros((9, 32))))
        expected = np.linalg.lstsq(np.concatenate((a, penalty)), b)[0]
        mapped = inputs[layer, kind].numpy() @ expected[:-1] + expected[-1]
        near(fused[layer, kind], mix * torch.tensor(mapped).float() + (1 - mix) * old[layer, kind])


def test_a_ridge_map_recovers_a_receiver_that_is_a_linear_map_of_its_sharer(pair):
    """Even where the receiver has read something else: its own entries are replaced."""
    model = pair[0]
    fuser = ridge_fuser(model, model, [tokens(1, 60, seed)[0] for seed in range(4)], strength=1e-9)
    blank, whole = prefill(model, tokens(1, 6)), prefill(model, tokens(1, 6, seed=3))
    near(to_tensor(fuser(blank, whole)), to_tensor(whole.cache), 1e-3)
    assert (to_tensor(blank.cache) - to_tensor(whole.cache)).abs().max() > 0.1
    assert fuser.trained_for["sharer"] == fingerprint(model)


# -- errors


def test_caches_of_other_models_and_other_texts_are_refused(pair, texts):
    receiver, sharer = texts
    fuser = make_fuser(logit=1)
    size = r"Size\(layers=5, heads=1, head_dim=8\), the fuser Size\(layers=3"
    with pytest.raises(CacheError, match=size):
        fuser(sharer, receiver)
    short = prefill(pair[1], tokens(2, 5))
    for other, weights in (
        (short, None),
        (short, torch.ones(2, 7, 7)),
        (prefill(pair[1], tokens(1, 7)), None),
    ):
        with pytest.raises(RuntimeError):
            fuser(receiver, other, weights)


@pytest.mark.parametrize(
    "wrong", [{"keys": "turned"}, {"noise": "normal"}, {"hidden": 0}, {"dropout": 1.0}]
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(
        ValueError, match=r"The settings are .*, expected hidden from 1, dropout in"
    ):
        Settings(**wrong)


def test_layers_and_tokenizers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"map is for \(3, 6\) layers, expected \(3, 5\)"):
        Fuser(RECEIVER, SHARER, last_aligned(3, 6))
    one = load_tokenizer("lab-draft")
    two = load_tokenizer("lab-draft", CHATML.replace("| trim", "| upper"))
    with pytest.raises(ValueError, match=r"changes message 0 \('Anna'\): use another"):
        align_tokens(one, two, message("Anna"))
    ids = tokens(1, 6)[0]
    with pytest.raises(ValueError, match="The sharer has other tokens: give token_weights"):
        Aligned(ids, ids + 1)


# -- rehearsal


def blanked_examples(*lengths):
    """Prompts in which the receiver reads a blank, 3, for every other token."""
    examples = []
    for i, n in enumerate(lengths):
        ids = tokens(1, n, seed=i)[0] + 3
        blanks = ids.clone()
        blanks[1::2] = 3
        examples.append(FuserExample(Aligned(blanks, ids, torch.eye(n)), torch.tensor([5, 6])))
    return examples


def keep_receiver(receiver, sharer, token_weights):
    return receiver.cache


def test_nothing_is_unexplained_if_the_fused_cache_is_that_of_the_whole_text(pair):
    batch = pad_fuser_batch(blanked_examples(8, 5))
    ids, mask = batch["sharer_ids"][:, :-1], batch["sharer_mask"][:, :-1]

    def oracle(receiver, sharer, token_weights):
        return prefill(pair[0], ids, attention_mask=mask).cache

    assert rehearsal_loss(oracle, *pair, batch)["fvu"] == 0
    alone = rehearsal_loss(keep_receiver, *pair, batch)["fvu"]
    assert alone == rehearsal_loss(make_fuser(), *pair, batch)["fvu"] > 0.1


def test_fvu_is_the_error_over_the_variance_of_each_layers_keys_and_values(pair):
    expected, read = [], []
    for prompt, _ in blanked_examples(8, 5):
        expected.append(entries(prefill(pair[0], prompt.sharer_ids[None, :-1]))[:, :, 0])
        read.append(entries(prefill(pair[0], prompt.receiver_ids[None, :-1]))[:, :, 0])
    expected, read = torch.cat(expected, 2), torch.cat(read, 2)  # (L, 2, tokens, H d)
    ratios = []
    for i, j in itertools.product(range(3), range(2)):
        error = (read[i, j] - expected[i, j]).square().mean()
        ratios.append(error / expected[i, j].var(0).mean())
    batch = pad_fuser_batch(blanked_examples(8, 5))
    near(rehearsal_loss(keep_receiver, *pair, batch)["fvu"], torch.stack(ratios).mean(), 1e-4)


def test_rehearsal_explains_more_and_needs_prompts_of_one_length(pair):
    examples = blanked_examples(8, 5, 7, 8)
    options = {"steps": 30, "batch_size": 4, "learning_rate": 1e-2, "decode": False}
    fuser, history = FuserArm(24, 0, gate=4.0, **options).train(*pair, examples, rehearsal_loss)
    assert history[-1]["fvu"] < 0.7 * history[0]["fvu"]
    longer = Aligned(examples[0].prompt.receiver_ids, tokens(1, 9)[0], torch.ones(8, 9) / 9)
    batch = pad_fuser_batch([FuserExample(longer, torch.tensor([5]))])
    with pytest.raises(ValueError, match="prompts differ in length"):
        rehearsal_loss(fuser, *pair, batch)
