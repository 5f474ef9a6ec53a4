"""The laws of 4D alignment: exact borders, time that crosses none, maps that are what they say, and no leaks."""

import copy
import functools
import random
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import processors
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, StackDataset
from transformers import GPT2TokenizerFast, Qwen2TokenizerFast

from kvlab import align as module
from kvlab import cache as kv
from kvlab import lab
from kvlab.align import (
    KV,
    MARKER,
    AlignedStudent,
    AlignmentSettings,
    Projector,
    StoredTeacherFeatures,
    TimePlan,
    align_kv,
    as_prefix,
    by_index,
    codi_loss,
    encode_with_teacher,
    features,
    fuse,
    kv_loss,
    mix_layers,
    own_features,
    pad_problems,
    plan_time,
    resample,
    save_teacher_features,
    segment,
    similar_layers,
    train_student,
)
from kvlab.cache import Prefix
from kvlab.generation import encode
from kvlab.lab.worlds import arithmetic_document
from kvlab.layers import LayerMap, layer_map, proportional
from kvlab.losses import cross_entropy
from kvlab.training import fit

DOUBLE = torch.float64
PUBLISHED = Path(__file__).parents[2] / "shared/data"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
seeds = st.integers(0, 10**6)


def near(one, two, within=1e-12):
    torch.testing.assert_close(one, two, rtol=0, atol=within)


def some(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# -- segments


@functools.cache
def tokenizer_of(name):
    if name.startswith("lab"):
        return lab.load_tokenizer(name)
    if not PUBLISHED.is_dir():
        pytest.skip("the published vocabularies are not here")
    if name.startswith("gpt2"):
        folder = PUBLISHED / "gpt2_tokenizer"
        tokenizer = GPT2TokenizerFast(
            vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe")
        )
        if name == "gpt2-trimmed":  # offsets without the space in front of a word
            tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        return tokenizer
    folder = PUBLISHED / "qwen_tokenizer"
    tokenizer = Qwen2TokenizerFast(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


VOCABULARIES = ("lab-target", "lab-teacher", "gpt2", "gpt2-trimmed", "qwen")
every_vocabulary = pytest.mark.parametrize("name", VOCABULARIES)
OPENS = {"lab-target": ("<|user|> ", "<|assistant|>", "<|end|>"), "gpt2": ("", "\n", "")}
OPENS |= {"lab-teacher": OPENS["lab-target"], "gpt2-trimmed": OPENS["gpt2"]}
OPENS |= {"qwen": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n")}


def solved(solution, question="How many?"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]


def texts_of(name, conversation, **options):
    """The three segments, decoded."""
    tokenizer = tokenizer_of(name)
    ids, borders, _ = segment(tokenizer, conversation, **options)
    assert ids.tolist() == encode(tokenizer, conversation)
    assert borders.tolist()[::3] == [0, len(ids)]
    parts = zip(borders.tolist(), borders.tolist()[1:], strict=False)
    return [tokenizer.decode(ids[a:b], clean_up_tokenization_spaces=False) for a, b in parts]


SOLUTIONS = [
    ("1+1=2.", " Answer: 2"),
    ("So: is the Answer 3? No.", " The answer is 2."),
    ("Answer: 3? No.", " answer: 2"),  # the last marker counts
    ("1 + 1 = 2", "\n#### 2"),
    ("So it is", " \\boxed{2}"),
    ("一加一等于二。", "因此答案是2"),
    ("一加一等于二。答案不明。", "答案：二"),
    ("龘😀😀", "答案为龘😀"),
    ("Twice 😀", "   Final answer: 😀"),
    ("e\u0301 is one.", " Answer: e\u0301"),
]


@every_vocabulary
@pytest.mark.parametrize(("reasoning", "answer"), SOLUTIONS)
def test_segments_end_where_the_text_does(name, reasoning, answer):
    opens, turns, closes = OPENS[name]
    got = texts_of(name, solved(reasoning + answer))
    space = " " if name.startswith("lab") else ""  # which the lab's template puts before a message
    if answer[0] == "\n":  # a line break stays with what it ends
        reasoning, answer = reasoning + "\n", answer[1:]
    want = [f"{opens}How many?{turns}", space + reasoning, answer + closes]
    if name == "qwen":
        want = [text.replace("e\u0301", "é") for text in want]  # the vocabulary's own normal form
    assert got == want


@every_vocabulary
@pytest.mark.parametrize("style", ["short", "long"])
def test_the_labs_solutions_have_all_three(name, style):
    for seed in range(20):
        conversation = arithmetic_document(random.Random(seed), 3, style)
        prompt, reasoning, answer = texts_of(name, conversation)
        assert conversation[0]["content"] in prompt
        assert reasoning.strip() + answer.removesuffix(OPENS[name][2]) == conversation[1]["content"]
        assert answer.startswith(" Answer: ")


@every_vocabulary
def test_the_same_text_in_a_prompt_is_not_taken_for_the_solution(name):
    solution = "1+1=2. Answer: 2"
    for question in (solution, f"{solution} Answer: 5 #### 6"):
        parts = texts_of(name, solved(solution, question))
        assert question in parts[0]
        assert parts[1].strip() == "1+1=2."


def test_a_token_belongs_where_it_begins():
    assert texts_of("qwen", solved("乙的答案是2"))[1:] == [
        "乙的答案",
        "是2<|im_end|>\n",
    ]  # 的答案 is one token
    assert texts_of("gpt2", solved("It is answered by 2"), marker="wer")[1:] == [
        "It is answered",
        " by 2",
    ]
    with pytest.raises(
        ValueError,
        match=r"The answer is empty in a text that begins 'It is answered', .* was found",
    ):
        segment(tokenizer_of("gpt2"), solved("It is answered"), marker="wer")


@pytest.mark.parametrize("name", ["lab-target", "gpt2", "qwen"])
def test_every_token_of_a_split_character_is_on_its_side(name):
    tokenizer = tokenizer_of(name)
    for border in ("龘😀|龘龘", "😀 |龘", "中|😀", " 龘|é中"):
        left, right = border.split("|")
        ids, borders, _ = segment(tokenizer, solved(left + right), marker=right.replace(" ", ""))
        assert tokenizer.decode(ids[borders[1] : borders[2]]).strip() == left.strip()
        assert tokenizer.decode(ids[borders[2] :]).strip().startswith(right)


def test_special_tokens_around_a_text_are_in_its_first_and_last_segment():
    folder = PUBLISHED / "gpt2_tokenizer"
    if not PUBLISHED.is_dir():
        pytest.skip("the published vocabularies are not here")
    tokenizer = GPT2TokenizerFast(
        vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe")
    )
    end = ("<|endoftext|>", tokenizer.eos_token_id)
    framed = f"{end[0]} $A {end[0]}"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=framed, special_tokens=[end]
    )
    ids, borders, _ = segment(tokenizer, solved("1+1=2. Answer: 2"))
    assert (ids[0], ids[-1]) == (end[1], end[1])
    assert tokenizer.decode(ids[borders[2] :]) == " Answer: 2<|endoftext|>"
    assert tokenizer.decode(ids[: borders[1]]) == "<|endoftext|>How many?\n"


def test_white_space_around_a_solution_is_the_templates_business():
    assert texts_of("qwen", solved("\n  1+1=2. Answer: 2 \n"))[1] == "1+1=2."
    assert texts_of("lab-target", solved("  1+1=2. Answer: 2"))[1] == "   1+1=2."


@every_vocabulary
@pytest.mark.parametrize(
    ("conversation", "sentence"),
    [
        (
            solved("It is 2, that is all."),
            "The answer is empty in a text that begins 'It is 2, .* was not found",
        ),
        (
            solved("Answer: 2"),
            "The reasoning is empty in a text that begins 'Answer: 2', where the marker .* was found",
        ),
        (solved(""), "The answer is empty in a text that begins ''"),
        (
            solved("1. Answer: 2")[:1],
            "The last message is by 'user': append the assistant's solution",
        ),
    ],
)
def test_what_cannot_be_cut_is_named(name, conversation, sentence):
    with pytest.raises(ValueError, match=sentence):
        segment(tokenizer_of(name), conversation)


def test_the_marker_is_shown_and_so_is_an_empty_prompt():
    with pytest.raises(
        ValueError, match=r"where the marker Result= was not found: give prompt, reasoning"
    ):
        segment(tokenizer_of("lab-target"), solved("1. Answer: 2"), marker="Result=")
    with pytest.raises(
        ValueError, match=r"The prompt is empty in a text that begins '1\+1=2. Answer: 2'"
    ):
        segment(tokenizer_of("gpt2"), solved("1+1=2. Answer: 2")[1:])


def test_a_template_that_changes_the_solution_is_refused():
    tokenizer = lab.load_tokenizer("lab-target")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content", "message.content | upper"
    )
    with pytest.raises(
        ValueError, match=r"The chat template changes the assistant's text, '1. Answer: 2'"
    ):
        segment(tokenizer, solved("1. Answer: 2"))


# -- time

sizes = st.integers(1, 7)
texts = st.lists(st.tuples(sizes, sizes, sizes, sizes, sizes, sizes), min_size=1, max_size=4)


def borders_of(*rows):
    """Borders of texts with segments of these sizes."""
    return torch.tensor([[0, *torch.tensor(row).cumsum(0).tolist()] for row in rows])


def both_of(rows):
    return borders_of(*(row[:3] for row in rows)), borders_of(*(row[3:] for row in rows))


def padded(rows, fill=float("nan")):
    """Texts (L, T, D) of any length, on the right side of a batch (B, L, T, D)."""
    length = max(row.shape[1] for row in rows)
    return torch.stack(
        [torch.nn.functional.pad(row, (0, 0, length - row.shape[1], 0), value=fill) for row in rows]
    )


def inputs(teacher, layers=2, width=3, seed=0):
    """Teacher features; nan where there is padding."""
    return padded([some(layers, int(n), width, seed=seed + i) for i, n in enumerate(teacher[:, 3])])


def looped(x, student, teacher):
    """The formula, token by token."""
    rows = []
    for b, (own, theirs) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        row, pad = [], x.shape[2] - theirs[3]
        for k in range(3):
            n_s, n_t = own[k + 1] - own[k], theirs[k + 1] - theirs[k]
            part = x[b, :, pad + theirs[k] : pad + theirs[k + 1]]
            for i in range(n_s):
                u = i * (n_t - 1) / (n_s - 1) if n_s > 1 else None
                if u is None:
                    row.append(part.mean(1))
                elif u == n_t - 1:
                    row.append(part[:, -1])
                else:
                    row.append(
                        (1 - (u - int(u))) * part[:, int(u)] + (u - int(u)) * part[:, int(u) + 1]
                    )
        rows.append(torch.stack(row, 1))
    return padded(rows, 0.0)


@settings(deadline=None, max_examples=150)
@given(rows=texts, seed=seeds)
def test_resampling_is_the_formula_token_by_token_and_reads_no_padding(rows, seed):
    student, teacher = both_of(rows)
    x = inputs(teacher, seed=seed)
    got = resample(x, plan_time(student, teacher))
    assert got.shape == (len(rows), 2, int(student[:, 3].max()), 3)
    near(got, looped(x, student, teacher))


@settings(deadline=None, max_examples=60)
@given(
    row=st.tuples(*[st.integers(2, 60)] * 3, *[st.integers(1, 60)] * 3),
    a=st.floats(-3, 3),
    b=st.floats(-3, 3),
)
def test_what_is_linear_in_position_stays_so(row, a, b):
    student, teacher = both_of([row])
    line = [a * k + b * torch.linspace(-1, 1, n, dtype=DOUBLE) if n > 1 else torch.tensor([a * k], dtype=DOUBLE)
            for k, n in enumerate(row[3:])]  # fmt: skip
    got = resample(torch.cat(line).view(1, 1, -1, 1), plan_time(student, teacher)).flatten()
    want = [
        a * k + (b if row[3 + k] > 1 else 0) * torch.linspace(-1, 1, n, dtype=DOUBLE)
        for k, n in enumerate(row[:3])
    ]
    near(got, torch.cat(want))


@settings(deadline=None, max_examples=40)
@given(rows=texts, seed=seeds)
def test_equal_lengths_are_the_identity(rows, seed):
    student, _ = both_of(rows)
    x = inputs(student, seed=seed)
    for plan in (plan_time(student, student), by_index(student, student)):
        assert torch.equal(resample(x, plan), x.nan_to_num(0))


@settings(deadline=None, max_examples=60)
@given(rows=texts, seed=seeds)
def test_first_tokens_map_to_first_and_last_to_last(rows, seed):
    student, teacher = both_of(rows)
    x = inputs(teacher, seed=seed)
    got = resample(x, plan_time(student, teacher))
    for b in range(len(rows)):
        pad, teacher_pad = got.shape[2] - student[b, 3], x.shape[2] - teacher[b, 3]
        for k in (k for k in range(3) if rows[b][k] > 1):
            for one, two in (
                (student[b, k], teacher[b, k]),
                (student[b, k + 1] - 1, teacher[b, k + 1] - 1),
            ):
                assert torch.equal(got[b, :, pad + one], x[b, :, teacher_pad + two])


def test_far_along_a_long_segment_the_ends_are_still_exact():
    for n_s, n_t in ((4099, 10007), (99_991, 99_989)):
        plan = plan_time(borders_of((n_s, 2, 2)), borders_of((n_t, 2, 2)))
        x = torch.arange(n_t + 4, dtype=DOUBLE).view(1, 1, -1, 1)
        got = resample(x, plan).flatten()
        assert got[n_s - 1] == n_t - 1
        near(got[:n_s], torch.arange(n_s, dtype=DOUBLE) * (n_t - 1) / (n_s - 1), within=1e-9)
        assert plan.columns[plan.tokens < n_s].max() == n_t - 1


@settings(deadline=None, max_examples=60)
@given(rows=texts, segment=st.integers(0, 2))
def test_what_one_segment_holds_never_shows_in_another(rows, segment):
    student, teacher = both_of(rows)
    x = torch.zeros(len(rows), 1, int(teacher[:, 3].max()), 1)
    for b, theirs in enumerate(teacher):
        pad = x.shape[2] - theirs[3]
        x[b, :, pad + theirs[segment] : pad + theirs[segment + 1]] = 1
        x[b, :, :pad] = float("nan")
    got = resample(x, plan_time(student, teacher))[:, 0, :, 0]
    for b, own in enumerate(student):
        want = torch.zeros(got.shape[1])
        pad = got.shape[1] - own[3]
        want[pad + own[segment] : pad + own[segment + 1]] = 1
        near(got[b], want, within=1e-6)


@settings(deadline=None, max_examples=40)
@given(rows=texts)
def test_shares_of_a_token_add_up_to_one_and_padding_has_none(rows):
    student, teacher = both_of(rows)
    for plan in (plan_time(student, teacher), by_index(student, teacher)):
        total = torch.zeros(plan.mask.numel(), dtype=DOUBLE).index_add(0, plan.tokens, plan.weights)
        near(total.view(plan.mask.shape), plan.mask.double())
        assert plan.mask.sum(1).tolist() == student[:, 3].tolist()
        assert (plan.tokens.diff() >= 0).all()


def test_one_token_takes_the_mean_and_one_teacher_token_is_for_all():
    x = torch.tensor([1.0, 2, 3, 6, 10, 20, 40]).double().view(1, 1, 7, 1)
    got = resample(x, plan_time(borders_of((1, 3, 1)), borders_of((4, 1, 2)))).flatten()
    near(got, torch.tensor([3.0, 10, 10, 10, 30]).double())


@settings(deadline=None, max_examples=40)
@given(rows=texts, seed=seeds)
def test_a_batch_is_its_rows_one_by_one(rows, seed):
    student, teacher = both_of(rows)
    x = inputs(teacher, seed=seed)
    for make in (plan_time, by_index):
        got = resample(x, make(student, teacher))
        for b in range(len(rows)):
            alone = x[b : b + 1, :, x.shape[2] - teacher[b, 3] :]
            one = resample(alone, make(student[b : b + 1], teacher[b : b + 1]))
            assert torch.equal(got[b : b + 1, :, got.shape[2] - student[b, 3] :], one)
            assert (got[b, :, : got.shape[2] - student[b, 3]] == 0).all()


def test_by_index_counts_from_the_first_token_and_stays_at_the_last():
    x = padded([torch.arange(4.0).view(1, 4, 1), torch.arange(6.0).view(1, 6, 1)])
    got = resample(x, by_index(borders_of((1, 2, 4), (1, 1, 1)), borders_of((1, 2, 1), (2, 2, 2))))
    assert got[0].flatten().tolist() == [0, 1, 2, 3, 3, 3, 3]
    assert got[1].flatten().tolist() == [0, 0, 0, 0, 0, 1, 2]


def test_gradients_of_resampling_are_right_and_padding_gets_none():
    student, teacher = both_of([(1, 3, 2, 2, 2, 4), (2, 1, 1, 3, 1, 2)])
    plan, x = plan_time(student, teacher), inputs(teacher).nan_to_num(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resample(x, plan), x)
    resample(x, plan).sum().backward()
    assert (x.grad[1, :, :2] == 0).all()
    assert (x.grad[0, :, :2] != 0).all()  # a mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_precision_keeps_its_own(dtype):
    student, teacher = both_of([(5, 1, 9, 3, 3, 4)])
    x = inputs(teacher)
    got = resample(x.to(dtype), plan_time(student, teacher))
    assert got.dtype == dtype
    near(got.double(), looped(x, student, teacher), within=0.03)


# -- layers


def test_a_one_hot_map_selects_layers():
    x, chosen = some(2, 5, 3, 4), [3, 0, 3]
    got = mix_layers(x, LayerMap(torch.tensor(chosen)[:, None], torch.ones(3, 1).double(), 5))
    assert torch.equal(got, x[:, chosen])
    weights = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    assert torch.equal(
        mix_layers(x, LayerMap(torch.tensor([[1, 4], [2, 0]]), weights, 5)), x[:, [4, 2]]
    )


def test_layers_are_mixed_by_the_maps_weights():
    x, chosen = some(2, 5, 3, 4), layer_map(some(3, 5, seed=1), k=2)
    got = mix_layers(x, chosen)
    for k in range(3):
        (i, j), (a, b) = chosen.indices[k], chosen.weights[k]
        near(got[:, k], a * x[:, i] + b * x[:, j])
    near(mix_layers(torch.ones(1, 5, 2, 2).double(), chosen), torch.ones(1, 3, 2, 2).double())


# -- heads and rotation


def positions_of(borders):
    """Positions (B, T) of left-padded texts, 0 in padding."""
    width = int(borders[:, 3].max())
    return (torch.arange(width) - (width - borders[:, 3:])).clamp(min=0)


TEXTS = [torch.randint(1, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 4, 6)]
BORDERS = borders_of((2, 3, 4), (1, 2, 1), (2, 3, 1))


def read(model, texts=TEXTS):
    """The prefix of texts, padded on the left with a token of its own."""
    length = max(map(len, texts))
    ids = torch.stack(
        [torch.nn.functional.pad(text, (length - len(text), 0), value=7) for text in texts]
    )
    mask = torch.stack([(torch.arange(length) >= length - len(text)).long() for text in texts])
    return kv.prefill(model, ids, attention_mask=mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_features_are_what_the_projections_gave_out(tiny_model, family, rope):
    model, text = tiny_model(family, rope), TEXTS[0]
    found = {}
    keys = "k_norm" if family == "Qwen3" else "k_proj"
    hooks = [
        module.register_forward_hook(
            lambda _, __, out, path=path: found.update({path: out[0].flatten(1)})
        )
        for path, module in model.named_modules()
        if path.endswith((keys, "v_proj"))
    ]
    prefix = kv.prefill(model, text[None])
    for hook in hooks:
        hook.remove()
    got = features(prefix)
    assert (
        got.keys.shape == got.values.shape == (1, 3, 9, 2 * 16)
    )  # two KV heads, though there are four for attention
    for side, name in ((got.keys, keys), (got.values, "v_proj")):
        near(
            side[0],
            torch.stack([out for path, out in found.items() if path.endswith(name)]),
            within=2e-5,
        )


@pytest.mark.parametrize("rope", ["default", "llama3", "yarn"])
def test_where_a_text_stands_does_not_change_its_features(tiny_model, rope):
    model = tiny_model("Qwen2", rope)
    here = kv.prefill(model, TEXTS[0][None])
    there = kv.prefill(model, TEXTS[0][None], position=70)
    one, two = features(here), features(there)
    near(one.keys, two.keys, within=5e-5)
    near(one.values, two.values, within=5e-5)
    assert (here.cache.layers[0].keys - there.cache.layers[0].keys).abs().max() > 0.1


def test_padding_does_not_change_features(tiny_model):
    model = tiny_model("Qwen3")
    whole = features(read(model))
    for b, text in enumerate(TEXTS):
        alone = features(read(model, [text]))
        for one, two in zip(whole, alone, strict=True):
            near(one[b, :, 9 - len(text) :], two[0], within=5e-5)


def test_half_precision_is_turned_in_float32(tiny_model):
    model = tiny_model("Qwen3", dtype=torch.bfloat16)
    prefix = read(model)
    got = features(prefix)
    wide = replace(prefix, cache=kv.from_tensor(kv.to_tensor(prefix.cache).float()))
    assert got.keys.dtype == torch.float32
    assert torch.equal(got.keys, features(wide).keys)
    rounded = kv.unrotate(prefix.cache, prefix.positions, prefix.rotary).layers[0].keys
    assert not torch.equal(got.keys[:, 0], rounded.transpose(1, 2).flatten(2).float())


@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_features_make_the_cache_again(tiny_model, rope):
    model = tiny_model("Qwen3", rope)
    prefix = read(model)
    again = as_prefix(features(prefix), prefix.positions, model)
    near(kv.to_tensor(again.cache), kv.to_tensor(prefix.cache), within=1e-5)
    assert again.cache.layers[0].keys.shape == prefix.cache.layers[0].keys.shape
    assert again.next_position.tolist() == [9, 4, 6]


def test_features_carry_the_students_gradient(tiny_model):
    model = tiny_model("Qwen3")
    prefix = read(model)
    stored = kv.to_tensor(prefix.cache).requires_grad_()
    got = features(replace(prefix, cache=kv.from_tensor(stored)))
    (got.keys.square().sum() + got.values.sum()).backward()
    near(stored.grad[:, 0], 2 * stored[:, 0].detach(), within=1e-4)  # a rotation is orthogonal
    assert (stored.grad[:, 1] == 1).all()


# -- hidden


def identity_of(width, other=None):
    return Projector(width, other or width, "identity")


def kv_of(*shape, seed=0, dtype=torch.float32):
    return KV(some(*shape, seed=seed, dtype=dtype), some(*shape, seed=seed + 1, dtype=dtype))


def test_keys_and_values_have_maps_of_their_own_for_all_layers():
    projector, x = Projector(6, 4), kv_of(2, 3, 5, 6)
    got = projector(x)
    near(got.keys, torch.einsum("bltd,ed->blte", x.keys, projector.keys.weight), within=1e-5)
    near(got.values, torch.einsum("bltd,ed->blte", x.values, projector.values.weight), within=1e-5)
    assert not torch.equal(projector.keys.weight, projector.values.weight)
    assert all("bias" not in name for name in projector.state_dict())


@pytest.mark.parametrize(("teacher", "student"), [(64, 64), (64, 32), (32, 64)])
def test_starts_are_what_they_are_called(teacher, student):
    torch.manual_seed(0)
    for weight in Projector(teacher, student, "orthogonal").parameters():
        small = weight if student <= teacher else weight.T
        near(small @ small.T, torch.eye(len(small)), within=1e-5)
    for weight in Projector(teacher, student, "xavier").parameters():
        bound = (6 / (teacher + student)) ** 0.5
        assert 0.95 * bound < weight.abs().max() <= bound
    got = identity_of(teacher, student)(x := kv_of(4, 3, 50, teacher))
    common = min(teacher, student)
    scale = (student / common) ** 0.5
    for one, two in zip(got, x, strict=True):
        near(one[..., :common], scale * two[..., :common], within=1e-6)
        assert (one[..., common:] == 0).all()
        assert abs(one.square().mean() / two.square().mean() - 1) < 0.05


def test_an_identity_of_equal_widths_changes_nothing():
    x = kv_of(2, 3, 5, 6)
    assert all(torch.equal(one, two) for one, two in zip(identity_of(6)(x), x, strict=True))


def test_real_shapes_have_this_many_parameters():
    large, small = (
        Projector(4 * 128, 2 * 128),
        Projector(2 * 128, 2 * 128),
    )  # Qwen2-7B and Qwen2-1.5B, to the latter
    assert (large.num_parameters(), small.num_parameters()) == (262_144, 131_072)
    heads = Projector(
        28 * 128, 12 * 128
    )  # as many as if all attention heads had keys: what the source counts
    assert heads.num_parameters() == 11_010_048
    assert 2 * heads.num_parameters() == 21 * 2**20


def pairs_of(n, maps, noise=0.0, seed=0):
    x = kv_of(n, maps[0].shape[0], seed=seed, dtype=DOUBLE)
    y = (a @ m + noise * some(n, m.shape[1], seed=seed + 9) for a, m in zip(x, maps, strict=True))
    return x, KV(*y)


MAPS = some(5, 3, seed=20), some(5, 3, seed=21)


def weights_of(projector):
    return projector.keys.weight, projector.values.weight


def test_ridge_recovers_a_linear_map():
    projector = Projector(5, 3).fit_ridge([pairs_of(40, MAPS)], strength=1e-12)
    for weight, want in zip(weights_of(projector), MAPS, strict=True):
        near(weight.double(), want.T, within=1e-6)
        assert weight.dtype == torch.float32
        assert weight.requires_grad


def test_at_tiny_strength_it_is_least_squares():
    teacher, student = pairs_of(40, MAPS, noise=0.5)
    projector = Projector(5, 3).double().fit_ridge([(teacher, student)], strength=1e-14)
    for weight, x, y in zip(weights_of(projector), teacher, student, strict=True):
        near(weight, torch.linalg.lstsq(x, y).solution.T, within=1e-10)


def test_strength_is_relative_to_the_features_and_pulls_to_zero():
    teacher, student = pairs_of(40, MAPS, noise=0.5)
    x, y = teacher.keys, student.keys
    want = torch.linalg.solve(
        x.T @ x + 0.3 * (x.T @ x).diagonal().mean() * torch.eye(5).double(), x.T @ y
    ).T
    for scale in (1e-4, 1.0, 1e4):
        pair = KV(scale * x, scale * x), student
        got = Projector(5, 3).double().fit_ridge([pair], strength=0.3)
        near(scale * got.keys.weight, want, within=1e-9)
    small = Projector(5, 3).double().fit_ridge([(teacher, student)], strength=1e6)
    assert small.keys.weight.norm() < 1e-3 * want.norm()


def test_sums_are_in_float64_whatever_comes_in():
    x = 1000 + some(300, 4, dtype=torch.float32)
    got = Projector(4, 2).fit_ridge([(KV(x, x), KV(x[:, :2], x[:, :2]))], strength=0.0)
    near(got.keys.weight, torch.eye(4)[:2], within=1e-6)


def test_pairs_that_determine_no_map_are_refused():
    x = some(2, 4)
    with pytest.raises(RuntimeError, match="not positive-definite"):
        Projector(4, 4).fit_ridge([(KV(x, x), KV(x, x))], strength=0.0)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, cut=st.integers(1, 29), strength=st.sampled_from([0.0, 1e-3, 2.0]))
def test_batches_add_up_to_the_whole_and_shapes_do_not_matter(seed, cut, strength):
    teacher, student = pairs_of(30, MAPS, noise=0.5, seed=seed)
    whole = Projector(5, 3).double().fit_ridge([(teacher, student)], strength)
    batches = (
        [KV(*(x[part] for x in side)) for side in (teacher, student)]
        for part in (slice(cut), slice(cut, 30))
    )
    stream = Projector(5, 3).double().fit_ridge(batches, strength)
    shaped = [KV(*(x.view(2, 5, 3, -1) for x in side)) for side in (teacher, student)]
    other = Projector(5, 3).double().fit_ridge([shaped], strength)
    for one, two, three in zip(*map(weights_of, (whole, stream, other)), strict=True):
        near(two, one, within=1e-9)
        near(three, one, within=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projector_comes_back_bit_for_bit(tmp_path, dtype):
    projector = Projector(6, 4).to(dtype)
    folder = projector.save_pretrained(tmp_path / "deep" / "teacher")
    assert sorted(path.name for path in folder.iterdir()) == [
        "projector.json",
        "projector.safetensors",
    ]
    back = Projector.from_pretrained(str(folder))
    for one, two in zip(weights_of(back), weights_of(projector), strict=True):
        assert torch.equal(one, two)
        assert one.dtype == dtype
        assert one.requires_grad


def test_a_projector_of_another_version_is_refused(tmp_path):
    folder = Projector(6, 4).save_pretrained(tmp_path / "it")
    (folder / "projector.json").write_text('{"version": 2}')
    with pytest.raises(ValueError, match="holds no projector of version 1"):
        Projector.from_pretrained(folder)


# -- fusion


def test_fusion_is_a_mean_by_normalized_weights():
    parts = [kv_of(1, 2, 3, 4, seed=2 * i, dtype=DOUBLE) for i in range(3)]
    for side in range(2):
        one, two, three = (part[side] for part in parts)
        near(fuse(parts)[side], (one + two + three) / 3)
        got = fuse(parts, torch.tensor([2.0, 0.0, 6.0]))[side]
        near(got, 0.25 * one + 0.75 * three, within=1e-7)
        near(fuse([parts[0]] * 3, torch.tensor([5.0, 1.0, 0.1]))[side], one, within=1e-6)
        assert torch.equal(fuse(parts[:1], torch.tensor([0.3]))[side], one)


def test_weights_can_be_learned():
    logits = torch.nn.Parameter(torch.zeros(2))
    parts = [kv_of(1, 1, 4, 4, seed=i, dtype=DOUBLE) for i in range(2)]
    optimizer = torch.optim.SGD([logits], lr=1.0)
    for _ in range(50):
        optimizer.zero_grad()
        (fuse(parts, logits.softmax(0)).keys - parts[1].keys).square().mean().backward()
        optimizer.step()
    assert logits.softmax(0)[1] > 0.95


# -- all steps


class Teacher(NamedTuple):
    """A teacher's prefix of a batch, and the plan by which it is carried over."""

    prefix: Prefix
    plan: TimePlan
    layer_map: LayerMap
    projector: Projector


def with_cache(teacher, stored):
    """The teacher with another cache, as one tensor."""
    return teacher._replace(prefix=replace(teacher.prefix, cache=kv.from_tensor(stored)))


def moved(teacher):
    """Teacher features with the student's tokens and layers."""
    return align_kv(features(teacher.prefix), teacher.plan, teacher.layer_map)


def carried(*teachers, weights=None):
    """All steps: rotation and head, time, layer, hidden, fusion."""
    return fuse([teacher.projector(moved(teacher)) for teacher in teachers], weights)


def itself(model, texts=TEXTS, borders=BORDERS):
    """A model as the teacher of itself, on the same texts."""
    width, layers = 2 * 16, model.config.num_hidden_layers
    steps = plan_time(borders, borders), proportional(layers, layers), identity_of(width)
    return Teacher(read(model, texts), *steps)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ["default", "llama3", "yarn"])
def test_a_teacher_that_is_the_student_gives_back_its_own_cache(tiny_model, family, rope):
    model = tiny_model(family, rope)
    teacher, mask = itself(model), plan_time(BORDERS, BORDERS).mask
    got, own = carried(teacher), features(teacher.prefix)
    for one, two in zip(got, own, strict=True):
        assert torch.equal(one, two * mask[:, None, :, None])
    stored = kv.to_tensor(as_prefix(got, teacher.prefix.positions, model).cache)
    real = kv.to_tensor(teacher.prefix.cache) * mask[:, None, :, None]
    near(stored, real, within=1e-5)
    assert torch.equal(stored[:, 1], real[:, 1])


def test_the_students_rope_is_its_own_and_so_are_its_positions(tiny_model):
    one, two = tiny_model("Llama"), tiny_model("Llama", "linear")
    text = [TEXTS[0]]
    there = kv.prefill(one, TEXTS[0][None], position=40)
    teacher = itself(one, text, BORDERS[:1])._replace(prefix=there)
    got = as_prefix(carried(teacher), torch.arange(9)[None], two).cache
    # the same weights: the first layer differs in rope only
    want = kv.prefill(two, TEXTS[0][None]).cache
    near(got.layers[0].keys, want.layers[0].keys, within=5e-5)
    assert (there.cache.layers[0].keys - want.layers[0].keys).abs().max() > 0.1


def other(model, seed=0):
    """A teacher of other depth and KV heads, whose texts have other lengths."""
    borders = borders_of((3, 5, 2), (2, 2, 2), (1, 6, 3))
    lengths = borders[:, 3].tolist()
    texts = [
        torch.randint(1, 97, (n,), generator=torch.Generator().manual_seed(seed + n))
        for n in lengths
    ]
    heads, layers = model.config.num_key_value_heads, model.config.num_hidden_layers
    chosen = layer_map(some(3, layers, seed=seed), k=2)
    torch.manual_seed(seed)
    steps = plan_time(BORDERS, borders), chosen, Projector(16 * heads, 32)
    return Teacher(read(model, texts), *steps), borders


def test_all_steps_are_taken_for_teachers_of_other_shapes(tiny_model):
    models = (
        tiny_model("Qwen2", num_hidden_layers=5, num_key_value_heads=4),
        tiny_model("Llama", num_key_value_heads=1),
    )
    taught = [other(model, seed) for seed, model in enumerate(models)]
    weights = torch.tensor([3.0, 1.0])
    got = carried(*(teacher for teacher, _ in taught), weights=weights)
    for side in range(2):
        want = 0
        for (teacher, borders), share in zip(taught, (0.75, 0.25), strict=True):
            turned = kv.to_tensor(
                kv.unrotate(teacher.prefix.cache, teacher.prefix.positions, teacher.prefix.rotary)
            )[:, side]  # (L, B, H, T, d)
            timed = looped(turned.permute(1, 0, 3, 2, 4).flatten(3), BORDERS, borders)
            pairs = zip(teacher.layer_map.indices, teacher.layer_map.weights, strict=True)
            mixed = torch.stack(
                [sum(w * timed[:, i] for i, w in zip(*row, strict=True)) for row in pairs], 1
            )
            want = want + share * mixed.float() @ weights_of(teacher.projector)[side].T
        near(got[side], want, within=1e-4)
        assert got[side].shape == (3, 3, 9, 32)
        assert (got[side][1, :, :5] == 0).all()


def test_an_aligned_batch_is_its_rows_one_by_one(tiny_model):
    model = tiny_model("Qwen3")
    teacher, borders = other(model)
    whole = carried(teacher)
    for b in range(3):
        own, theirs = BORDERS[b : b + 1], borders[b : b + 1]
        n, pad = int(own[0, 3]), int(borders[:, 3].max() - theirs[0, 3])
        stored = kv.to_tensor(teacher.prefix.cache)[:, :, b : b + 1, :, pad:]
        prefix = replace(
            teacher.prefix, cache=kv.from_tensor(stored), positions=positions_of(theirs)
        )
        one = teacher._replace(prefix=prefix, plan=plan_time(own, theirs))
        for got, want in zip(whole, carried(one), strict=True):
            near(got[b : b + 1, :, 9 - n :], want, within=1e-5)


def test_what_stands_in_padding_does_not_matter(tiny_model):
    teacher, borders = other(tiny_model("Qwen3"))
    stored = kv.to_tensor(teacher.prefix.cache)
    columns = torch.arange(stored.shape[4]) < borders[:, 3].max() - borders[:, 3:]
    spoiled = stored.masked_fill(columns[None, None, :, None, :, None], float("nan"))
    assert columns.any()
    for one, two in zip(carried(teacher), carried(with_cache(teacher, spoiled)), strict=True):
        assert torch.equal(one, two)


def test_gradients_reach_projectors_weights_and_caches(tiny_model):
    taught = [other(tiny_model("Qwen3"), seed)[0] for seed in range(2)]
    stored = kv.to_tensor(taught[0].prefix.cache).requires_grad_()
    logits = torch.nn.Parameter(torch.zeros(2))
    got = carried(with_cache(taught[0], stored), taught[1], weights=logits.softmax(0))
    sum(x.square().sum() for x in got).backward()
    grads = [logits.grad, *(p.grad for teacher in taught for p in teacher.projector.parameters())]
    assert all(grad.norm() > 0 for grad in [*grads, stored.grad[:, 0], stored.grad[:, 1]])


def test_a_projector_is_fitted_on_aligned_features(tiny_model):
    model = tiny_model("Qwen3")
    teacher, mask = itself(model), plan_time(BORDERS, BORDERS).mask
    mixed = moved(teacher)
    turn = torch.linalg.qr(some(32, 32)).Q.float()
    pair = [KV(*(x.transpose(1, 2)[mask] @ m for x in mixed)) for m in (torch.eye(32), turn)]
    got = carried(teacher._replace(projector=Projector(32, 32).fit_ridge([pair], strength=1e-9)))
    near(got.keys, mixed.keys @ turn, within=1e-4)
    near(got.values, mixed.values @ turn, within=1e-4)


@pytest.mark.parametrize("style", ["short", "long"])
def test_lab_models_of_two_vocabularies_are_aligned(style):
    names = "lab-draft", "lab-teacher"
    problems = [arithmetic_document(random.Random(seed), 1 + seed, style) for seed in range(3)]
    cut = [[segment(lab.load_tokenizer(name), problem) for problem in problems] for name in names]
    student, teacher = (torch.stack([text.borders for text in texts]) for texts in cut)
    assert (student != teacher).any()
    models = [lab.load(name).requires_grad_(False) for name in names]
    read_by = read(models[1], [text.input_ids for text in cut[1]])
    steps = plan_time(student, teacher), proportional(2, 6), Projector(4 * 40, 2 * 32)
    got = carried(Teacher(read_by, *steps))
    assert got.keys.shape == got.values.shape == (3, 2, int(student[:, 3].max()), 64)
    own = read(models[0], [text.input_ids for text in cut[0]])
    made = as_prefix(got, positions_of(student), models[0])
    assert kv.to_tensor(made.cache).shape == kv.to_tensor(own.cache).shape


@pytest.mark.parametrize(
    "text",
    [
        "Answer: 2",
        "the final answer is 2",
        "#### 2",
        "\\boxed{2}",
        "答案：2",
        "所以答案是2",
        "最终答案为2",
    ],
)
def test_markers_in_two_languages(text):
    assert module.re.fullmatch(f"(?:{MARKER}).*", text)


@pytest.mark.parametrize(
    "text", ["We answer it", "the unanswered", "# 2", "boxed", "答案不明", "answers"]
)
def test_words_that_open_no_answer(text):
    assert not module.re.search(MARKER, text)


# -- what a teacher makes of the student's texts


def problems(n, style="short"):
    """Problems with solutions in one style; in the other style they are the same problems."""
    return [arithmetic_document(random.Random(i), 1 + i % 3, style) for i in range(n)]


def model_like(name="lab-draft", seed=0, **changes):
    return lab.models.make(name, seed, **{"num_hidden_layers": 3} | changes)


def own_texts(n=5, name="lab-draft"):
    return [segment(tokenizer_of(name), c) for c in problems(n)]


def teacher_texts(n=5, name="lab-teacher"):
    return [segment(tokenizer_of(name), c) for c in problems(n, "long")]


def map_to_itself(layers=3):
    return proportional(layers, layers)


def lessons_of(texts, *seen):
    return list(zip(texts, *seen, strict=True))


def own_lessons(student, n=5):
    """Lessons in which the teacher is the student, with maps that change nothing."""
    texts = own_texts(n)
    seen = encode_with_teacher(student, texts, texts, map_to_itself())
    width, size = (
        student.config.num_key_value_heads * student.config.head_dim,
        student.config.hidden_size,
    )
    states = nn.Linear(size, size, bias=False)
    nn.init.eye_(states.weight)
    return lessons_of(texts, seen), ([Projector(width, width, "identity")], [states])


@pytest.mark.parametrize("batch", [2, 16])
def test_what_a_teacher_makes_is_align_kv_text_by_text(batch, monkeypatch):
    monkeypatch.setattr(module, "BATCH", batch)
    teacher, texts = model_like("lab-teacher", num_hidden_layers=4), own_texts()
    others, chosen = teacher_texts(), LayerMap(*layer_map(torch.rand(3, 4), 2))
    seen = encode_with_teacher(teacher, others, texts, chosen)
    same = Projector(160, 160, "identity")
    for text, (ids, borders, _), part in zip(texts, others, seen, strict=True):
        out = teacher(ids[None], output_hidden_states=True)
        prefix, plan = kv.prefill(teacher, ids[None]), plan_time(text.borders[None], borders[None])
        want = carried(Teacher(prefix, plan, chosen, same))
        near(part.keys.float(), want.keys[0], 0.02)  # kept in half precision
        near(part.values.float(), want.values[0], 0.02)
        before = torch.stack([x[0, borders[2] - 1] for x in out.hidden_states[1:]])
        want = torch.stack(
            [
                (w[:, None] * before[i]).sum(0)
                for i, w in zip(chosen.indices, chosen.weights, strict=True)
            ]
        )
        near(part.state.float(), want.float(), 0.02)


def test_other_plans_can_be_given():
    teacher, texts = model_like("lab-teacher"), own_texts()
    arguments = teacher, teacher_texts(), texts, map_to_itself()
    one, two = encode_with_teacher(*arguments), encode_with_teacher(*arguments, by_index)
    assert not any(a.keys.equal(b.keys) for a, b in zip(one, two, strict=True))


def test_features_are_read_problem_by_problem_from_files_of_any_number(tmp_path):
    texts = own_texts()
    seen = encode_with_teacher(model_like(), texts, texts, map_to_itself())
    files = [save_teacher_features(tmp_path / "a", seen[:2])]
    files.append(save_teacher_features(tmp_path / "b", seen[2:]))
    with safe_open(files[0], "pt") as file:  # the format of files of before
        assert sorted(file.keys()) == ["keys", "sizes", "states", "values"]
        assert file.metadata() == {"kvlab": "seen 1"}
    stored = ConcatDataset([StoredTeacherFeatures(file) for file in files])
    lessons = StackDataset(texts, stored, seen)
    assert len(lessons) == len(texts)
    for number in (2, 0, len(texts) - 1):
        text, one, two = lessons[number]
        assert text is texts[number]
        assert all(a.equal(b) for a, b in zip(one, two, strict=True))
    batch = pad_problems([lessons[i] for i in range(3)])
    assert batch["keys_0"].equal(batch["keys_1"])
    with pytest.raises(IndexError):
        StoredTeacherFeatures(files[0])[2]


def test_another_file_is_refused(tmp_path):
    Projector(4, 4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no teacher features: encode the problems again"):
        StoredTeacherFeatures(tmp_path / "projector.safetensors")


# -- losses


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_own_features_are_those_of_the_cache(tiny_model, family, checkpointing):
    model = copy.deepcopy(tiny_model(family, dtype=DOUBLE)).requires_grad_()
    ids = torch.arange(20).view(2, 10)
    want = features(kv.prefill(model, ids))
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    made = own_features(model, model(ids, use_cache=False, output_hidden_states=True).hidden_states)
    near(made.keys, want.keys, 1e-5)  # the rotation is in float32
    near(made.values, want.values, 1e-9)
    (made.keys.square().sum() + made.values.square().sum()).backward()
    for layer in model.base_model.layers:
        assert layer.self_attn.k_proj.weight.grad.abs().sum() > 0
        assert layer.self_attn.v_proj.weight.grad.abs().sum() > 0
    assert (
        model.base_model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0
    )  # through the layers below


def loop_distance(student, target, mask, kind):
    layers = []
    for layer in range(student.shape[1]):
        pairs = [(student[b, layer, t], target[b, layer, t]) for b, t in mask.nonzero().tolist()]
        scale = torch.stack([s for s, _ in pairs]).std(correction=0)
        rows = torch.stack([(s - t) / scale for s, t in pairs])
        smooth = torch.where(rows.abs() < 1, rows.square() / 2, rows.abs() - 0.5)
        layers.append({"smooth_l1": smooth, "l1": rows.abs(), "mse": rows.square()}[kind].mean())
    return torch.stack(layers).mean()


@pytest.mark.parametrize("kind", ["smooth_l1", "l1", "mse"])
def test_the_kv_loss_is_the_loop_of_its_formula(kind):
    student, target = (KV(some(2, 3, 5, 4, seed=s), some(2, 3, 5, 4, seed=s + 1)) for s in (0, 2))
    student = KV(student.keys * torch.tensor([1.0, 30, 0.1]).view(1, 3, 1, 1), student.values)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    want = [
        loop_distance(s.float(), t.float(), mask, kind)
        for s, t in zip(student, target, strict=True)
    ]
    near(kv_loss(student, target, mask, kind), sum(want) / 2, 1e-5)


def test_padding_does_not_count():
    student, target = (KV(some(2, 3, 5, 4, seed=s), some(2, 3, 5, 4, seed=s + 1)) for s in (0, 2))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    other = KV(*(x.masked_fill(mask[:, None, :, None] == 0, 1e6) for x in target))
    assert kv_loss(student, target, mask).equal(kv_loss(student, other, mask))


def test_a_student_does_not_grow_to_make_the_loss_small():
    student, target = (
        KV(some(1, 1, 6, 4), some(1, 1, 6, 4)),
        KV(some(1, 1, 6, 4, seed=1), some(1, 1, 6, 4, seed=1)),
    )
    factor = torch.ones((), dtype=DOUBLE, requires_grad=True)
    loss = kv_loss(KV(*(x * factor for x in student)), target, torch.ones(1, 6), "mse")
    (got,) = torch.autograd.grad(loss, factor)
    scale = student.keys.std(correction=0)
    want = (
        2 * (student.keys - target.keys) * student.keys
    ).mean() / scale**2  # with the deviation held fast
    near(got, want, 1e-5)


def test_losses_in_deviations_do_not_depend_on_units():
    student, target = (
        KV(some(1, 2, 6, 4), some(1, 2, 6, 4)),
        KV(some(1, 2, 6, 4, seed=1), some(1, 2, 6, 4, seed=1)),
    )
    mask = torch.ones(1, 6)
    thousand = [KV(*(1000 * x for x in kv)) for kv in (student, target)]
    near(kv_loss(student, target, mask), kv_loss(*thousand, mask), 1e-6)
    one, two = some(4, 2, 3), some(4, 2, 3, seed=1)
    near(codi_loss(one, two), codi_loss(1000 * one, 1000 * two), 1e-6)


def test_the_codi_loss_is_its_formula():
    one, two = some(4, 2, 3), some(4, 2, 3, seed=1)
    want = []
    for layer in (0, 1):
        rows = ((one - two)[:, layer] / two[:, layer].std(correction=0)).float()
        want.append(torch.where(rows.abs() < 1, rows.square() / 2, rows.abs() - 0.5).mean())
    near(codi_loss(one, two), sum(want) / 2, 1e-6)


# -- training


def test_a_teacher_that_is_the_student_leaves_nothing_to_learn():
    student = model_like()
    lessons, alignment = own_lessons(student)
    losses = AlignedStudent(student, *alignment)(pad_problems(lessons))
    assert losses["kv"] < 1e-6 < losses["ce"]  # half precision in between
    assert losses["codi"] < 1e-6


def test_another_teacher_leaves_something_to_learn():
    student, other = model_like(), model_like(seed=1)
    lessons, _ = own_lessons(other)
    _, alignment = own_lessons(student)
    losses = AlignedStudent(student, *alignment)(pad_problems(lessons))
    assert min(losses["kv"], losses["codi"]) > 0.1


def test_the_loss_falls_as_the_student_moves_toward_the_target():
    student, other = model_like(), model_like(seed=1)
    lessons, alignment = own_lessons(other)
    batch, found = pad_problems(lessons), []
    for way in (0.0, 0.5, 0.9, 1.0):
        mixed = copy.deepcopy(student)
        for p, q in zip(mixed.parameters(), other.parameters(), strict=True):
            p.data.lerp_(q, way)
        found.append(AlignedStudent(mixed, *alignment)(batch)["kv"].item())
    assert found == sorted(found, reverse=True)
    assert found[-1] < 1e-6


def test_gradients_reach_the_students_keys_and_values_and_projectors_and_no_teacher():
    student, teacher, texts = model_like(), model_like("lab-teacher"), own_texts()
    seen = encode_with_teacher(teacher, teacher_texts(), texts, map_to_itself())
    assert not any(x.requires_grad for part in seen for x in part)
    projector, states = Projector(160, 64), nn.Linear(160, 128, bias=False)
    aligned = AlignedStudent(student, [projector], [states])
    losses = aligned(pad_problems(lessons_of(texts, seen)))
    losses["kv"].backward(retain_graph=True)
    for layer in student.model.layers:
        assert layer.self_attn.k_proj.weight.grad.abs().sum() > 0
        assert layer.self_attn.v_proj.weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in projector.parameters())
    assert states.weight.grad is None
    losses["codi"].backward()
    assert states.weight.grad.abs().sum() > 0
    assert not any(p.grad is not None for p in teacher.parameters())


def test_a_batch_is_its_lessons(monkeypatch):
    texts = own_texts()
    seen = encode_with_teacher(model_like(), texts, texts, map_to_itself())
    batch = pad_problems(lessons_of(texts, seen))
    for i, (text, part) in enumerate(zip(texts, seen, strict=True)):
        size, solution = len(text.input_ids), int(text.borders[1])
        assert batch["input_ids"][i, -size:].equal(text.input_ids)
        assert batch["attention_mask"][i].sum() == size
        assert batch["position_ids"][i, -size:].tolist() == list(range(size))
        assert batch["weights"][i, -size:].tolist() == [0] * solution + [1] * (size - solution)
        assert batch["borders"][i].tolist() == text.borders.tolist()
        assert batch["keys_0"][i, :, -size:].equal(part.keys.float())
        assert batch["values_0"][i, :, -size:].equal(part.values.float())
        assert not batch["keys_0"][i, :, :-size].any()


def test_without_an_alignment_it_is_cross_entropy_alone():
    one, two, texts = model_like(), model_like(), own_texts(8)
    lessons = [(text,) for text in texts]
    history = train_student(
        AlignedStudent(one), lessons, AlignmentSettings(epochs=2, batch_size=4, learning_rate=1e-3)
    )

    def by_hand(model, batch):
        options = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        logits = model(**options, use_cache=False).logits
        return {"ce": cross_entropy(logits, batch["input_ids"], batch["weights"])}

    loader = DataLoader(
        lessons, batch_size=4, shuffle=True, drop_last=True, collate_fn=pad_problems
    )
    fit(
        two,
        loader,
        by_hand,
        steps=4,
        learning_rate=1e-3,
        weight=lambda batch: batch["weights"][:, 1:].sum(),
    )
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)  # the head computes columns with a loss alone
    assert history[0]["loss"] == history[0]["ce"]


def test_weights_rise_and_fade():
    student = model_like()
    lessons, alignment = own_lessons(model_like(seed=1), 8)
    rates = {"learning_rate": 0.0, "kv_weight": 2.0, "kv_warmup": 4, "kv_end": 0.75}
    settings = AlignmentSettings(epochs=8, batch_size=8, **rates)
    history = train_student(AlignedStudent(student, *alignment), lessons, settings)
    (batch,) = DataLoader(lessons, batch_size=8, collate_fn=pad_problems)
    plain = AlignedStudent(student, *alignment)(batch)
    factors = [entry["kv"] / plain["kv"].item() for entry in history]
    want = [2 * min(1, step / 4) * max(0, 1 - (step - 1) / 6) for step in range(1, 9)]
    assert factors == pytest.approx(want, rel=1e-3)
    codi = [entry["codi"] / plain["codi"].item() for entry in history]
    assert codi == pytest.approx([factor / 4 for factor in want], rel=1e-3)


def test_students_come_nearer_to_their_teachers():
    student, texts = model_like(), own_texts(8)
    teachers = [
        model_like("lab-teacher", seed=1),
        model_like("lab-target", seed=2, num_hidden_layers=4),
    ]
    maps = [map_to_itself(), proportional(3, 4)]
    names = ("lab-teacher", "lab-target")
    seen = [
        encode_with_teacher(teacher, teacher_texts(8, name), texts, chosen)
        for teacher, name, chosen in zip(teachers, names, maps, strict=True)
    ]
    aligned = AlignedStudent(student, [Projector(160, 64), Projector(64, 64)])
    options = {"epochs": 12, "batch_size": 8, "learning_rate": 3e-3, "kv_warmup": 0}
    lessons = lessons_of(texts, *seen)
    history = train_student(aligned, lessons, AlignmentSettings(**options), warmup=1)
    assert history[-1]["kv"] < 0.8 * history[0]["kv"]
    assert "codi" not in history[0]


# -- which layers are alike


@pytest.mark.parametrize("what", ["hidden", "keys", "values"])
def test_a_model_is_like_itself_layer_by_layer(what, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 4)
    model, texts = model_like(), own_texts(12)
    matrix = similar_layers(model, texts, model, texts, what)
    near(matrix.diagonal(), torch.ones(3, dtype=DOUBLE), 1e-9)
    assert (matrix < 1 + 1e-9).all()


def test_hidden_states_are_the_outputs_of_layers_and_the_last_one_normed():
    model, (text,) = model_like(), own_texts(1)
    outputs = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    got = module._read_texts(model, [text])[0]["hidden"]
    want = [*outputs[:2], model.model.norm(outputs[2])]
    near(got, torch.stack(want, 1).view_as(got), 1e-5)


def test_answers_and_padding_do_not_count_for_similarity():
    model, texts = model_like(), own_texts(8)
    other = [
        t._replace(
            input_ids=torch.cat([t.input_ids[: t.borders[2]], t.input_ids[t.borders[2] :].flip(0)])
        )
        for t in texts
    ]
    one, two = (similar_layers(model, part, model, part, "values") for part in (texts, other))
    near(one, two)
