"""Laws of the C2C fuser: closed gates change no bit, positions do not matter, tokens meet where they spell alike."""

import copy
import functools
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kvlab import cache as kv
from kvlab import lab
from kvlab.cache import from_tensor, to_tensor, truncate
from kvlab.fuse import (
    NOISES,
    PUBLISHED,
    Aligned,
    Fuser,
    Lesson,
    Settings,
    Size,
    align_tokens,
    collate,
    fuse_prompt,
    lesson,
    rehearsal_loss,
    response_loss,
    train,
)
from kvlab.generation import encode
from kvlab.layers import last_aligned, layer_map
from kvlab.models import CacheError, fingerprint, rotary_of

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAX = CHATML.replace(" | trim", "")
RECEIVER, SHARER = Size(3, 2, 16), Size(5, 1, 8)
ROTATED = Settings(hidden=24, keys="rotated")


def near(one, two, within=1e-5):
    torch.testing.assert_close(one, two, rtol=0, atol=within)


def fuser_of(receiver=RECEIVER, sharer=SHARER, layers=None, made=Settings(hidden=24), logit=None):
    torch.manual_seed(0)
    fuser = Fuser(receiver, sharer, layers, made)
    if logit is not None:
        set_gates(fuser, logit)
    return fuser


def set_gates(fuser, logit):
    for name, parameter in fuser.named_parameters():
        if name.endswith("gate_logit"):
            parameter.data.fill_(logit)


def tokens(rows, count, seed=0):
    return torch.randint(1, 97, (rows, count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair(tiny_model):
    """A receiver and a sharer of other depth, heads and width."""
    return tiny_model(), tiny_model(seed=1, num_hidden_layers=5, num_key_value_heads=1, head_dim=8)


@pytest.fixture(scope="module")
def texts(pair):
    ids = tokens(2, 7)
    return tuple(kv.prefill(model, ids) for model in pair)


# -- the fuser


def test_the_published_fuser_has_477_8_million_parameters():
    with torch.device("meta"):
        fuser = Fuser(Size(28, 8, 128), Size(24, 2, 64), settings=PUBLISHED)
    assert fuser.num_parameters() == 477_848_056
    inside = 2 * 28 * (1152 * 1024 + 3 * (2 * 1024 * 1024 + 1024) + 1024 * 1024 + 1024 * 8 + 1)
    assert fuser.num_parameters() - inside == 2 * 28 * (
        1024 + 1024 + 8
    )  # the biases of what goes in and out


def test_a_change_is_what_the_equations_say_in_each_layer():
    fuser = fuser_of(made=Settings(hidden=24, dropout=0.5))
    theirs, own = torch.randn(6, 5, 8), torch.randn(6, 5, 32)  # (2 L, N, width)
    for parameter in fuser.parameters():
        parameter.data.normal_(std=0.3)

    def linear(part, i, x):
        made = x @ part.weight[i]
        return (
            made if part.bias is None else made + part.bias[i * made.shape[-1] :][: made.shape[-1]]
        )

    def block(part, i, x):
        normed = (
            x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * part.norm[24 * i : 24 * i + 24]
        )
        up = linear(part.up, i, normed)
        return x + linear(part.down, i, up * (1 + torch.erf(up / math.sqrt(2))) / 2)

    made = fuser._changes(torch.cat((theirs, own), -1))
    for i in range(6):
        x = block(fuser.shared, i, linear(fuser.enter, i, torch.cat((theirs[i], own[i]), -1)))
        change = linear(fuser.change, i, block(fuser.project, i, x))
        weight = torch.sigmoid(linear(fuser.weight, i, block(fuser.weigh, i, x)))
        expected = torch.cat(
            [weight[:, h, None] * change[:, 16 * h : 16 * h + 16] for h in range(2)], 1
        )
        near(made[i], expected, 1e-4)


@pytest.mark.parametrize("made", [Settings(hidden=24), ROTATED])
def test_an_untrained_fuser_returns_the_receivers_bits(texts, made):
    fuser = fuser_of(made=made)
    assert not fuser.training
    assert not fuser.open_gates().any()
    assert torch.equal(to_tensor(fuser(*texts)), to_tensor(texts[0].cache))


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("what", [0, 1])
def test_one_open_gate_changes_its_keys_or_values_and_nothing_else(texts, layer, what):
    fuser = fuser_of()
    fuser.gate_logit.data[2 * layer + what] = 0.01
    assert fuser.open_gates().nonzero().tolist() == [[layer, what]]
    before, after = to_tensor(texts[0].cache), to_tensor(fuser(*texts))
    same = (before == after).flatten(2)
    assert same.all(-1).logical_not().nonzero().tolist() == [[layer, what]]
    assert not same[layer, what].any()


def test_fusing_leaves_both_caches_as_they_were(pair):
    ids = tokens(1, 6)
    own, theirs = (kv.prefill(model, ids) for model in pair)
    kept = [to_tensor(x.cache) for x in (own, theirs)]
    fused = fuser_of(logit=1)(own, theirs)
    pair[0](ids, past_key_values=fused)  # the model goes on from it, and writes
    fused.layers[0].keys.zero_()
    assert torch.equal(to_tensor(own.cache), kept[0])
    assert torch.equal(to_tensor(theirs.cache), kept[1])


@pytest.mark.parametrize("moved", [(0, 31), (31, 0), (31, 57)])
def test_the_change_does_not_depend_on_where_texts_stand(pair, moved):
    ids = tokens(2, 7)
    here, there = (
        [kv.prefill(m, ids, position=p) for m, p in zip(pair, places, strict=True)]
        for places in ((0, 0), moved)
    )
    fuser, published = fuser_of(logit=1), fuser_of(made=ROTATED, logit=1)
    back = kv.shift(fuser(*there), -moved[0], rotary_of(pair[0]))
    near(to_tensor(back), to_tensor(fuser(*here)), 1e-4)
    back = kv.shift(published(*there), -moved[0], rotary_of(pair[0]))
    assert (to_tensor(back) - to_tensor(published(*here)))[
        :, 0
    ].abs().max() > 1e-2  # the published one does
    near(to_tensor(back)[:, 1], to_tensor(published(*here))[:, 1], 1e-4)  # values have no position


@pytest.mark.parametrize("rope", ["llama3", "yarn"])
def test_scaled_ropes_are_undone_and_put_back(tiny_model, rope):
    model, ids = tiny_model(rope=rope), tokens(1, 5)
    fuser = fuser_of(sharer=RECEIVER, logit=1)
    with torch.no_grad():
        for part, value in (
            (fuser.change, 1.0),
            (fuser.weight, 30.0),
        ):  # what is added is 1, whatever is read
            part.weight.zero_()
            part.bias.fill_(value)
    own = kv.prefill(model, ids)
    plain = [
        to_tensor(kv.unrotate(c, own.positions, own.rotary)) for c in (fuser(own, own), own.cache)
    ]
    near((plain[0] - plain[1])[0], torch.ones(2, 1, 2, 5, 16), 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_receiver_and_sharer(tiny_model, pair, family):
    model, ids = tiny_model(family), tokens(1, 6)
    size = Size.of(model.config)
    for receiver, sharer, sizes in (
        (model, pair[1], (size, SHARER)),
        (pair[1], model, (SHARER, size)),
    ):
        fused = fuser_of(*sizes, logit=1)(kv.prefill(receiver, ids), kv.prefill(sharer, ids))
        logits = kv.prefill(receiver, ids[:, :1], kv.Prefix(fused, 6)).logits
        assert torch.isfinite(logits).all()
        assert not torch.allclose(
            logits, kv.prefill(receiver, ids[:, :1], kv.prefill(receiver, ids)).logits
        )


def test_padding_is_neither_read_nor_changed(pair):
    ids, fuser = tokens(2, 6), fuser_of(logit=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    own, theirs = (kv.prefill(model, ids, attention_mask=mask) for model in pair)
    batch = to_tensor(fuser(own, theirs))
    assert torch.equal(batch[:, :, 0, :, :2], to_tensor(own.cache)[:, :, 0, :, :2])
    alone = to_tensor(fuser(*(kv.prefill(model, ids[:1, 2:]) for model in pair)))
    near(batch[:, :, :1, :, 2:], alone, 1e-4)


def test_part_of_a_text_can_be_fused_later(pair):
    ids, fuser = tokens(1, 8), fuser_of(logit=1)
    own, theirs = (kv.prefill(model, ids) for model in pair)
    whole, parts = fuser(own, theirs), []
    for part in (slice(0, 5), slice(5, 8)):
        index = torch.arange(8)[part]
        cut = [
            replace(x, cache=kv.select(x.cache, index), positions=x.positions[:, part])
            for x in (own, theirs)
        ]
        parts.append(fuser(*cut))
    near(to_tensor(kv.join(*parts)), to_tensor(whole))


def test_without_the_sharer_nothing_of_it_matters(pair, texts):
    blind, seeing = (
        fuser_of(made=Settings(hidden=24, sharer_seen=seen), logit=1) for seen in (False, True)
    )
    other = kv.prefill(pair[1], tokens(2, 7, seed=5))
    assert torch.equal(to_tensor(blind(*texts)), to_tensor(blind(texts[0], other)))
    assert not torch.allclose(to_tensor(seeing(*texts)), to_tensor(seeing(texts[0], other)))
    assert blind.num_parameters() == seeing.num_parameters()


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_and_keeps_its_dtype(tiny_model, dtype, weights):
    fuser, own = (
        fuser_of(sharer=RECEIVER, logit=1),
        kv.prefill(tiny_model(dtype=dtype), tokens(1, 6)),
    )
    wide = replace(own, cache=from_tensor(to_tensor(own.cache).float()))
    stored, exact = to_tensor(wide.cache), to_tensor(fuser(wide, wide))
    half = to_tensor(copy.deepcopy(fuser).to(weights)(own, own))
    assert half.dtype == dtype
    rounding = torch.finfo(dtype).eps * stored.abs().mean() + torch.finfo(torch.bfloat16).eps * 0.2
    assert (half.float() - exact).abs().mean() < rounding < 0.1 * (exact - stored).abs().mean()
    assert torch.equal(
        to_tensor(fuser_of(sharer=RECEIVER).to(weights)(own, own)), to_tensor(own.cache)
    )


# -- gates


@pytest.mark.parametrize("logit", [-3.0, -0.2, 0.0, 0.2, 3.0])
def test_gates_in_training_are_open_with_probability_sigma(logit):
    for noise, chance in (
        ("logistic", 1 / (1 + math.exp(-logit))),
        ("gumbel", 1 - math.exp(-math.exp(logit))),
    ):
        torch.manual_seed(0)
        fuser = fuser_of(made=Settings(hidden=4, noise=noise), logit=logit)
        for fuser.temperature in (1.0, 0.001):
            drawn = fuser._gates((3, 2, 70, 1, 100, 1))
            assert (
                abs((drawn > 0.5).float().mean().item() - chance) < 0.01
            )  # 40000 draws: 4 deviations
    assert abs(drawn.mean().item() - chance) < 0.01  # cold gates are 0 or 1


@pytest.mark.parametrize("logit", [-0.2, -1e-3, 1e-3, 0.2])
def test_most_gates_of_training_agree_with_inference_and_gumbel_ones_do_not(logit):
    agree = {}
    for noise in NOISES:
        torch.manual_seed(0)
        fuser = fuser_of(made=Settings(hidden=4, noise=noise), logit=logit)
        fuser.temperature = 0.001
        drawn = fuser._gates((3, 2, 170, 10, 100, 1)) > 0.5
        agree[noise] = (drawn == (logit > 0)).float().mean().item() > 0.5 - 0.0015
    assert agree == {"logistic": True, "gumbel": logit > 0}


def test_a_sure_gate_makes_training_what_inference_is(texts):
    """As temperature falls the two are the same: noise does not turn a gate that is sure, and a gate is 0 or 1."""
    gaps = []
    for logit in (-18.0, 18.0):
        fuser = fuser_of(made=Settings(hidden=24, dropout=0), logit=logit)
        expected = to_tensor(fuser(*texts))
        for fuser.temperature in (10.0, 1.0, 0.001):
            torch.manual_seed(0)
            gaps.append((to_tensor(fuser.train()(*texts)) - expected).abs().max().item())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[3] > gaps[4] > gaps[5]
    assert max(gaps[2], gaps[5]) < 1e-6


def test_the_gates_logit_gets_a_gradient_and_sees_each_token_anew(texts):
    fuser = fuser_of().train()
    to_tensor(fuser(*texts)).square().sum().backward()
    assert (fuser.gate_logit.grad != 0).all()
    assert fuser._gates((3, 2, 2, 3, 4, 1)).unique().numel() == 144


# -- layers


def test_a_layer_sees_the_weighted_mean_of_the_layers_it_is_mapped_to(pair, texts):
    own, theirs = texts
    chosen = layer_map(
        torch.tensor([[0.1, 0.9, 0, 0, 0], [0.5, 0, 0, 0, 0.4], [0, 0, 0.3, 0.2, 0]]), k=2
    )
    plain = to_tensor(kv.unrotate(theirs.cache, theirs.positions, theirs.rotary))
    mixed = torch.einsum("rk,rk...->r...", chosen.weights.float(), plain[chosen.indices])
    mixed = kv.rotate(from_tensor(mixed), theirs.positions, theirs.rotary)
    fused = fuser_of(layers=chosen, logit=1)(own, theirs)
    same = fuser_of(sharer=SHARER._replace(layers=3), logit=1)(own, replace(theirs, cache=mixed))
    near(to_tensor(fused), to_tensor(same))


# -- tokens


@functools.cache
def tokenizer_of(name, template=None):
    tokenizer = lab.load_tokenizer(name)
    if template:
        tokenizer.chat_template = template
    return tokenizer


def asked(text, role="user"):
    return [{"role": role, "content": text}]


def spans(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


WORDS = st.text(
    st.sampled_from("Anna  lives in Rome,\n3+4=7 naïve 中文é 🙂"), min_size=1, max_size=40
)


@settings(deadline=None, max_examples=30)
@given(text=WORDS)
def test_tokens_meet_exactly_where_they_spell_the_same_characters(text):
    one, two = tokenizer_of("lab-draft"), tokenizer_of("lab-teacher")
    ids, other_ids, shares = align_tokens(one, two, asked(text))
    assert ids.tolist() == encode(one, asked(text))
    assert other_ids.tolist() == encode(two, asked(text))
    assert (shares is None) == torch.equal(ids, other_ids)
    if shares is None:
        return
    whole = one.apply_chat_template(asked(text), tokenize=False, add_generation_prompt=True)
    own, theirs = spans(one, whole), spans(two, whole)
    if own != theirs:
        for i, (a, b) in enumerate(own):
            for j, (c, d) in enumerate(theirs):
                assert (shares[i, j] > 0) == (
                    max(a, c) < min(b, d)
                )  # every overlapping one is kept
    near(shares.sum(1), torch.ones(len(ids)))
    assert (shares.sum(0) > 0).all()
    longest = align_tokens(one, two, asked(text), keep="longest").shares
    assert ((longest > 0).sum(1) == 1).all()
    assert torch.equal((longest * shares).sum(1), shares.amax(1))


@settings(deadline=None, max_examples=20)
@given(text=WORDS)
def test_one_tokenizer_with_itself_needs_no_shares(text):
    for name in ("lab-draft", "lab-teacher"):
        ids, other_ids, shares = align_tokens(*[tokenizer_of(name)] * 2, asked(text))
        assert torch.equal(ids, other_ids)
        assert shares is None


@settings(deadline=None, max_examples=20)
@given(
    text=WORDS.filter(str.strip),
    template=st.sampled_from([CHATML, LAX]),
    system=st.sampled_from(["system", "s"]),
)
def test_where_templates_differ_what_messages_say_is_aligned(text, template, system):
    """Even where a message says what a template writes, as "system" or "s"."""
    one, two = tokenizer_of("lab-draft"), tokenizer_of("lab-draft", template)
    messages = [*asked(system, "system"), *asked(text)]
    ids, other_ids, shares = align_tokens(one, two, messages)
    spoken = one.decode(ids[shares.sum(1) > 0]), two.decode(other_ids[shares.sum(0) > 0])
    assert (
        "".join(spoken[0].split()) == "".join(spoken[1].split()) == "".join((system + text).split())
    )
    assert set(shares.sum(1).mul(1000).round().int().tolist()) <= {0, 1000}


def test_shares_of_the_same_tokens_give_what_no_shares_give(pair, texts):
    fuser = fuser_of(logit=1)
    same = fuser(*texts, torch.eye(7).expand(2, 7, 7))
    near(to_tensor(same), to_tensor(fuser(*texts)), 0)


def test_shares_are_the_sharers_tokens_each_token_is_made_of(pair):
    fuser, own = fuser_of(logit=1), kv.prefill(pair[0], tokens(1, 3))
    theirs = kv.prefill(pair[1], tokens(1, 4, seed=1))
    shares = torch.tensor([[[1.0, 0, 0, 0], [0, 0.25, 0.75, 0], [0, 0, 0, 0]]])
    fused = to_tensor(fuser(own, theirs, shares))
    assert torch.equal(fused[..., 2, :], to_tensor(own.cache)[..., 2, :])  # made of none
    plain = to_tensor(kv.unrotate(theirs.cache, theirs.positions, theirs.rotary))
    made = torch.stack(
        (plain[..., 0, :], plain[..., 1, :] / 4 + plain[..., 2, :] * 3 / 4, plain[..., 3, :]), -2
    )
    made = kv.rotate(from_tensor(made), own.positions, theirs.rotary)
    same = fuser(own, replace(own, cache=made, rotary=theirs.rotary))
    near(to_tensor(same)[..., :2, :], fused[..., :2, :])


# -- prompts and training


@functools.cache
def lab_pair():
    """The lab's draft and teacher, with other tokenizers, and a fuser between them."""
    models = [lab.load(name).requires_grad_(False) for name in ("lab-draft", "lab-teacher")]
    return *models, tokenizer_of("lab-draft"), tokenizer_of("lab-teacher")


def lab_fuser(logit=None, **made):
    receiver, sharer, *_ = lab_pair()
    return fuser_of(
        Size.of(receiver.config),
        Size.of(sharer.config),
        made=Settings(hidden=32, **made),
        logit=logit,
    )


LIVES = [("Anna", "Rome"), ("Ben", "the north of Paris"), ("Clara", "Oslo"), ("Dan", "New Berlin")]


def lessons():
    ask = [
        [
            *asked(f"Where does {who} live? {who} lives in {where}."),
            {"role": "assistant", "content": where},
        ]
        for who, where in LIVES
    ]
    return [lesson(*lab_pair()[2:], c) for c in ask]


def test_a_fused_prompt_is_all_but_its_last_token():
    receiver, sharer, *tokenizers = lab_pair()
    prompt = align_tokens(*tokenizers, asked("Where does Anna live?"))
    fused = fuse_prompt(lab_fuser(), receiver, sharer, prompt)
    cache, position, ids = fused.cache, fused.next_position, fused.input_ids
    assert [*ids, prompt.receiver_ids[-1]] == prompt.receiver_ids.tolist()
    assert position == kv.length(cache) == len(ids)
    expected = kv.prefill(receiver, prompt.receiver_ids[None]).logits
    near(
        kv.prefill(receiver, prompt.receiver_ids[None, -1:], fused).logits, expected, 1e-4
    )  # closed gates
    opened = fuse_prompt(lab_fuser(logit=1), receiver, sharer, prompt)
    assert (
        kv.prefill(receiver, prompt.receiver_ids[None, -1:], opened).logits - expected
    ).abs().max() > 1e-2


def test_the_loss_of_a_batch_is_that_of_each_response_behind_its_own_fused_prompt():
    receiver, sharer, *_ = lab_pair()
    given, fuser = lessons(), lab_fuser(logit=1)
    batch = collate(given)
    total = 0.0
    for prompt, response in given:
        fused = fuse_prompt(fuser, receiver, sharer, prompt).cache
        ids = torch.cat((prompt.receiver_ids[-1:], response))[None]
        places = torch.arange(
            len(prompt.receiver_ids) - 1, len(prompt.receiver_ids) + len(response)
        )[None]
        logits = receiver(ids, past_key_values=fused, position_ids=places).logits
        total += nn.functional.cross_entropy(logits[0, :-1], response, reduction="sum").item()
    assert len({len(x.response) for x in given}) > 1
    assert len({len(x.prompt.receiver_ids) for x in given}) > 1
    assert batch["weights"].sum() == sum(len(x.response) for x in given)
    near(
        response_loss(fuser, receiver, sharer, batch)["ce"].item(),
        total / batch["weights"].sum().item(),
        1e-4,
    )


def test_only_the_fuser_gets_a_gradient_and_all_of_it_does():
    receiver, sharer, *_ = lab_pair()
    receiver, sharer = (copy.deepcopy(model).requires_grad_(False) for model in (receiver, sharer))
    fuser = lab_fuser().train()
    response_loss(fuser, receiver, sharer, collate(lessons()))["ce"].backward()
    silent = [name for name, p in fuser.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert all(p.grad is None for model in (receiver, sharer) for p in model.parameters())


def test_training_lowers_the_loss_opens_gates_and_changes_no_model():
    receiver, sharer, *_ = lab_pair()
    before = [fingerprint(model) for model in (receiver, sharer)]
    fuser, given = lab_fuser(dropout=0.0), lessons()
    batch = collate(given)
    start = response_loss(fuser, receiver, sharer, batch)["ce"].item()
    seen = []

    def weight(batch):
        seen.append(fuser.temperature)
        return batch["weights"].sum()

    history = train(
        fuser, receiver, sharer, given, steps=40, batch_size=4, learning_rate=3e-3, weight=weight
    )
    assert response_loss(fuser, receiver, sharer, batch)["ce"].item() < 0.5 * start
    assert history[-1]["open"] == fuser.open_gates().float().mean().item() > 0
    assert not fuser.training
    assert [fingerprint(model) for model in (receiver, sharer)] == before
    falls = [b / a for a, b in itertools.pairwise(seen)]
    assert seen[0] == 1
    assert math.isclose(seen[-1], 0.001)
    assert max(falls) - min(falls) < 1e-9  # geometric
    rates = [entry["learning_rate"] for entry in history]
    assert rates.index(max(rates)) in (3, 4)
    assert rates[-1] < 0.1 * max(rates)


def test_a_run_that_is_cut_off_goes_on_as_if_it_had_not_been(tmp_path):
    receiver, sharer, *_ = lab_pair()
    runs, calls = {"steps": 4, "batch_size": 2, "every": 2}, []

    def cut(batch):
        calls.append(batch)
        if len(calls) == 4:
            raise InterruptedError
        return batch["weights"].sum()

    whole, first, second = (lab_fuser() for _ in range(3))
    train(whole, receiver, sharer, lessons(), **runs)
    kept = {"checkpoint": tmp_path / "run.safetensors"} | runs
    with pytest.raises(InterruptedError):
        train(first, receiver, sharer, lessons(), weight=cut, **kept)
    history = train(second, receiver, sharer, lessons(), **kept)
    assert len(history) == 4
    for one, two in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_fuser_trains_in_bfloat16_arithmetic():
    receiver, sharer, *_ = lab_pair()
    fuser = lab_fuser()
    history = train(fuser, receiver, sharer, lessons(), steps=2, batch_size=4, precision="bf16")
    assert all(math.isfinite(entry["ce"]) and entry["grad_norm"] > 0 for entry in history)
    assert {p.dtype for p in fuser.parameters()} == {torch.float32}


# -- what was said, fused too


@pytest.fixture(scope="module")
def exact_pair(tiny_model):
    """The pair and an open fuser in float64."""
    small = {"num_hidden_layers": 5, "num_key_value_heads": 1, "head_dim": 8}
    fuser = fuser_of(made=Settings(hidden=24, dropout=0), logit=1).double()
    return (
        fuser,
        tiny_model(dtype=torch.float64),
        tiny_model(rope="linear", seed=1, dtype=torch.float64, **small),
    )


def same_tokens(*sizes):
    """Lessons of random tokens that both models share, from (prompt, response) lengths."""
    texts = [tokens(1, sum(size), seed)[0].split(size) for seed, size in enumerate(sizes)]
    return [Lesson(Aligned(prompt, prompt), response) for prompt, response in texts]


RAGGED = same_tokens((6, 4), (2, 1), (9, 6), (4, 3))


def loss_in_a_loop(fuser, receiver, sharer, given, said):
    """Each text by itself: fuse the prompt, read some tokens, fuse these, and read the rest one by one."""
    total = count = 0
    for prompt, response in given:
        ids = torch.cat((prompt.receiver_ids, response))[None]
        begin, theirs = len(prompt.receiver_ids) - 1, kv.prefill(sharer, ids)
        stop, own = min(begin + said, ids.shape[1]), kv.prefill(receiver, ids[:, :begin])
        cache, losses = fuser(own, kv.part(theirs, 0, begin)), []
        for i in range(begin, ids.shape[1]):
            if i == stop and said:
                places = torch.arange(begin, stop)
                entries = kv.select(cache, places)
                new = kv.Prefix(entries, stop, positions=places[None], rotary=own.rotary)
                cache = kv.join(truncate(cache, begin), fuser(new, kv.part(theirs, begin, stop)))
            after = kv.prefill(receiver, ids[:, i : i + 1], kv.Prefix(cache, i))
            cache = after.cache
            losses.append(-after.logits.log_softmax(-1)[0, ids[0, min(i + 1, ids.shape[1] - 1)]])
        total, count = total + sum(losses[:-1]), count + len(response)
    return total / count


@pytest.mark.parametrize("said", range(7))
def test_the_loss_with_some_of_the_response_fused_is_that_of_a_plain_loop(exact_pair, said):
    with torch.no_grad():
        got = response_loss(*exact_pair, collate(RAGGED), said)["ce"]
        near(got.double(), loss_in_a_loop(*exact_pair, RAGGED, said))
        change = abs(got - response_loss(*exact_pair, collate(RAGGED))["ce"])
        assert (
            change == 0 if said in (0, 6) else change > 1e-3
        )  # behind six, nothing is left to predict


@pytest.mark.parametrize("said", [0, 1, 3, 5])
def test_padding_of_what_was_said_changes_nothing(exact_pair, said):
    batch = collate(RAGGED)
    batch["weights"][2] = 0  # the longest, beside which all others are padded
    others = [*RAGGED[:2], RAGGED[3]]
    with torch.no_grad():
        got = response_loss(*exact_pair, batch, said)["ce"]
        near(got, response_loss(*exact_pair, collate(others), min(said, 4))["ce"])
        padding = batch["attention_mask"] == 0
        assert padding[:, -2:].any()
        assert padding[:, :3].any()
        batch["input_ids"] = torch.where(padding, 96, batch["input_ids"])
        near(response_loss(*exact_pair, batch, said)["ce"], got)


def test_the_gradient_goes_through_what_was_said(exact_pair):
    fuser, batch = copy.deepcopy(exact_pair[0]), collate(RAGGED)
    for said in (0, 3):
        fuser.zero_grad()
        response_loss(fuser, *exact_pair[1:], batch, said)["ce"].backward()
        with torch.no_grad():
            generator, slope, ends = torch.Generator().manual_seed(said), 0.0, []
            steps = [
                torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in fuser.parameters()
            ]
            for p, step in zip(fuser.parameters(), steps, strict=True):
                slope += 0 if p.grad is None else (p.grad * step).sum().item()
            for size in (1e-3, -2e-3):
                for p, step in zip(fuser.parameters(), steps, strict=True):
                    p += size * step if p.ndim else 0  # an open gate of evaluation has no slope
                ends.append(response_loss(fuser, *exact_pair[1:], batch, said)["ce"].item())
            for p, step in zip(fuser.parameters(), steps, strict=True):
                p += 1e-3 * step if p.ndim else 0
        assert math.isclose(slope, (ends[0] - ends[1]) / 2e-3, rel_tol=1e-2)
        assert abs(slope) > 1e-2


def test_what_was_said_needs_the_same_tokens(exact_pair):
    prompt = RAGGED[0].prompt._replace(shares=torch.eye(6))
    batch = collate([RAGGED[0]._replace(prompt=prompt), *RAGGED[1:]])
    with torch.no_grad():
        near(
            response_loss(*exact_pair, batch)["ce"],
            response_loss(*exact_pair, collate(RAGGED))["ce"],
        )
    with pytest.raises(CacheError, match="can be fused for the same tokens only"):
        response_loss(*exact_pair, batch, 1)


def decode_training(pair, fuser, **options):
    options = {
        "steps": 6,
        "batch_size": 4,
        "every": 2,
        "learning_rate": 3e-3,
        "decode": True,
    } | options
    return train(fuser, *pair, RAGGED, **options)


def test_training_for_decoding_lowers_the_loss_whatever_was_said(pair):
    fuser, batch = fuser_of(made=Settings(hidden=24, dropout=0)), collate(RAGGED)
    start = [response_loss(fuser, *pair, batch, said)["ce"].item() for said in range(6)]
    decode_training(pair, fuser, steps=60)
    end = [response_loss(fuser, *pair, batch, said)["ce"].item() for said in range(6)]
    assert max(start) - min(start) < 1e-5  # closed
    assert all(b < 0.7 * a for a, b in zip(start, end, strict=True))


def test_each_part_of_a_response_is_drawn_and_none_without_decoding(pair):
    drawn = []

    def spy(*args, said=0):
        drawn.append(said)
        return response_loss(*args, said)

    decode_training(pair, fuser_of(), steps=50, loss=spy)
    assert set(drawn) == set(
        range(6)
    )  # the longest response has six tokens, the last of which is only predicted
    drawn.clear()
    decode_training(pair, fuser_of(), steps=3, decode=False, loss=spy)
    assert drawn == [0, 0, 0]


def test_training_for_decoding_is_reproducible_and_goes_on_after_a_cut(pair, tmp_path):
    fusers, calls = [fuser_of() for _ in range(5)], []

    def cut(batch):
        calls.append(batch)
        if len(calls) == 5:
            raise InterruptedError
        return batch["weights"].sum()

    histories = [decode_training(pair, fuser) for fuser in fusers[:2]]
    assert [entry["ce"] for entry in histories[0]] == [entry["ce"] for entry in histories[1]]
    decode_training(pair, fusers[2], decode=False)
    kept = {"checkpoint": tmp_path / "run.safetensors"}
    with pytest.raises(InterruptedError):
        decode_training(pair, fusers[3], weight=cut, **kept)
    decode_training(pair, fusers[4], **kept)
    one, same, other, _, resumed = ([p.detach() for p in fuser.parameters()] for fuser in fusers)
    assert all(map(torch.equal, one, same))
    assert all(map(torch.equal, one, resumed))
    assert not all(map(torch.equal, one, other))


# -- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, texts, dtype):
    chosen = layer_map(torch.rand(3, 5, generator=torch.Generator().manual_seed(0)), k=2)
    made = Settings(hidden=20, dropout=0.3, keys="rotated", noise="gumbel", sharer_seen=True)
    fuser = fuser_of(layers=chosen, made=made, logit=0.5).to(dtype)
    assert fuser.save_pretrained(tmp_path / "fuser") == tmp_path / "fuser"
    assert {f.name for f in (tmp_path / "fuser").iterdir()} == {"fuser.json", "fuser.safetensors"}
    again = Fuser.from_pretrained(tmp_path / "fuser")
    assert (again.receiver, again.sharer, again.settings) == (RECEIVER, SHARER, made)
    assert torch.equal(again.layer_map.weights, chosen.weights)
    assert all(p.requires_grad and p.dtype == dtype for p in again.parameters())
    assert torch.equal(to_tensor(again(*texts)), to_tensor(fuser(*texts)))
    assert not again.training


def test_a_trained_fuser_tells_other_models_from_those_it_was_trained_for(tmp_path, recwarn):
    receiver, sharer, *_ = lab_pair()
    other = copy.deepcopy(sharer)
    other.model.layers[3].mlp.up_proj.weight.data.mul_(1.5)
    fuser = lab_fuser()
    fuser.warn_of_others(receiver, other)  # not trained: for any
    train(fuser, receiver, sharer, lessons(), steps=1, batch_size=4)
    fuser = Fuser.from_pretrained(fuser.save_pretrained(tmp_path))
    fuser.warn_of_others(receiver, sharer)
    fuser.warn_of_others(
        *(lab.load(name, dtype=torch.bfloat16) for name in ("lab-draft", "lab-teacher"))
    )
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match=r"trained with another sharer \(weights sha256 is .* in the file and"
    ):
        fuser.warn_of_others(receiver, other)
    with pytest.warns(UserWarning, match=r"trained with another receiver \(architecture"):
        fuser.warn_of_others(sharer, sharer)


def test_a_damaged_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no fuser\.json, fuser\.safetensors: give a folder"):
        Fuser.from_pretrained(tmp_path)
    fuser_of().save_pretrained(tmp_path)
    about = json.loads((tmp_path / "fuser.json").read_text())
    for change, reason in (
        ({"version": 7}, "its version is 7"),
        (
            {"receiver": {"layers": 2, "heads": 2, "head_dim": 16}},
            "from 5 layers to 3, expected from 5 to 2",
        ),
        ({"settings": {"hidden": 8}}, "size mismatch"),
        ({"settings": {"wide": 8}}, "unexpected keyword"),
    ):
        (tmp_path / "fuser.json").write_text(json.dumps(about | change))
        with pytest.raises(
            ValueError, match=rf"holds no fuser of format version 1 (?s:.*){reason}"
        ):
            Fuser.from_pretrained(tmp_path)
    (tmp_path / "fuser.json").write_text(json.dumps(about))
    (tmp_path / "fuser.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="holds no fuser"):
        Fuser.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file: give the name of a folder"):
        fuser_of().save_pretrained(tmp_path / "fuser.json")


# -- errors


def test_caches_that_do_not_fit_are_refused_with_a_sentence(pair, texts):
    own, theirs = texts
    fuser = fuser_of(logit=1)
    with pytest.raises(
        CacheError,
        match=r"receiver's cache has Size\(layers=5, heads=1, head_dim=8\), the fuser was",
    ):
        fuser(theirs, own)
    short = kv.prefill(pair[1], tokens(2, 5))
    with pytest.raises(
        CacheError,
        match=r"2 texts of 7 tokens, the sharer 2 of 5, expected as many tokens: give shar",
    ):
        fuser(own, short)
    with pytest.raises(CacheError, match=r"shares is \(2, 7, 7\), expected \(2, 7, 5\)"):
        fuser(own, short, torch.ones(2, 7, 7))
    with pytest.raises(
        CacheError, match=r"2 texts of 7 tokens, the sharer 1 of 7, expected as many texts"
    ):
        fuser(own, kv.prefill(pair[1], tokens(1, 7)))
    with pytest.raises(
        CacheError, match=r"positions of the sharer: shape \(2, 6\), expected \(B, T\) = \(2, 7\)"
    ):
        fuser(own, replace(theirs, positions=theirs.positions[:, 1:]))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"hidden": 0}, "hidden is 0, expected 1 or more"),
        ({"dropout": 1.0}, "dropout is 1.0, expected 0 or more, and less than 1"),
        ({"keys": "turned"}, "keys is 'turned', expected one of unrotated, rotated"),
        ({"noise": "normal"}, "noise is 'normal', expected one of logistic, gumbel"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**wrong)


def test_layers_tokenizers_and_lessons_that_do_not_fit_are_refused():
    with pytest.raises(CacheError, match="layer map is from 6 layers to 3, expected from 5 to 3"):
        Fuser(RECEIVER, SHARER, last_aligned(3, 6))
    one, two = (
        tokenizer_of("lab-draft"),
        tokenizer_of("lab-draft", CHATML.replace("| trim", "| upper")),
    )
    with pytest.raises(CacheError, match="keep is 'some', expected one of all, longest"):
        align_tokens(one, one, asked("a"), keep="some")
    with pytest.raises(CacheError, match="changes message 0, which begins 'Anna': use a tokenizer"):
        align_tokens(one, two, asked("Anna"))
    with pytest.raises(CacheError, match="The conversation is empty"):
        align_tokens(one, one, [])
    with pytest.raises(
        CacheError, match="last message is by 'user', expected the assistant's response"
    ):
        lesson(one, one, asked("Anna"))
    one_token = Aligned(torch.tensor([5]), torch.tensor([5]), torch.eye(1))
    with pytest.raises(CacheError, match="prompt has 1 tokens, expected 2 or more"):
        fuse_prompt(lab_fuser(), *lab_pair()[:2], one_token)
    with pytest.raises(CacheError, match=r"end_temperature is 0, expected more than 0"):
        train(lab_fuser(), *lab_pair()[:2], lessons(), steps=1, end_temperature=0)


# -- rehearsal


def blanked_lessons(*lengths):
    """Prompts in which the receiver reads a blank, 3, for every other token."""
    made = []
    for i, n in enumerate(lengths):
        ids = tokens(1, n, seed=i)[0] + 3
        blanks = ids.clone()
        blanks[1::2] = 3
        made.append(Lesson(Aligned(blanks, ids, torch.eye(n)), torch.tensor([5, 6])))
    return made


def test_nothing_is_unexplained_where_the_fused_cache_is_what_the_receiver_would_have_made(pair):
    receiver, sharer = pair
    batch = collate(blanked_lessons(8, 5))
    others, mask = batch["sharer_ids"][:, :-1], batch["sharer_mask"][:, :-1]
    oracle = lambda own, theirs, shares: kv.prefill(receiver, others, attention_mask=mask).cache
    assert rehearsal_loss(oracle, receiver, sharer, batch)["unexplained"] == 0
    alone = rehearsal_loss(lambda own, theirs, shares: own.cache, receiver, sharer, batch)[
        "unexplained"
    ]
    closed = rehearsal_loss(fuser_of(), receiver, sharer, batch)["unexplained"]
    assert alone == closed > 0.1


def test_what_is_unexplained_is_the_error_over_the_variance_of_each_layers_keys_and_values(pair):
    receiver, sharer = pair
    batch = collate(blanked_lessons(8, 5))
    wanted, made = [], []
    for prompt, _ in blanked_lessons(8, 5):
        for ids, kept in ((prompt.sharer_ids, wanted), (prompt.receiver_ids, made)):
            one = kv.prefill(receiver, ids[None, :-1])
            kept.append(
                to_tensor(kv.unrotate(one.cache, one.positions, one.rotary))[:, :, 0]
                .transpose(2, 3)
                .flatten(3)
            )
    wanted, made = torch.cat(wanted, 2), torch.cat(made, 2)  # (L, 2, tokens, H d)
    parts = [
        (made[i, j] - wanted[i, j]).square().mean() / wanted[i, j].var(0).mean()
        for i in range(3)
        for j in range(2)
    ]
    got = rehearsal_loss(lambda own, theirs, shares: own.cache, receiver, sharer, batch)[
        "unexplained"
    ]
    near(got, torch.stack(parts).mean(), 1e-4)


def test_rehearsing_explains_more_and_needs_a_place_for_each_blank(pair):
    lessons = blanked_lessons(8, 5, 7, 8)
    fuser = fuser_of(made=Settings(hidden=24, dropout=0, gate=4.0))
    history = train(
        fuser, *pair, lessons, steps=30, batch_size=4, learning_rate=1e-2, loss=rehearsal_loss
    )
    assert history[-1]["unexplained"] < 0.7 * history[0]["unexplained"]
    longer = Lesson(
        Aligned(lessons[0].prompt.receiver_ids, tokens(1, 9)[0], torch.ones(8, 9) / 9),
        torch.tensor([5]),
    )
    with pytest.raises(
        CacheError, match="read prompts of other lengths: give each token's blank its place"
    ):
        rehearsal_loss(fuser, *pair, collate([longer]))


def test_other_tokens_without_shares_are_refused(pair):
    ids = tokens(1, 6)[0]
    prompt = Aligned(ids, ids + 1)
    with pytest.raises(CacheError, match="other tokens for the sharer, and no shares"):
        collate([Lesson(prompt, torch.tensor([5]))])
    with pytest.raises(CacheError, match="other tokens for the sharer, and no shares"):
        fuse_prompt(fuser_of(), *pair, prompt)
