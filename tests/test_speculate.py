"""The laws of speculative decoding: the text is the target's own, the statistics are what happened."""

import copy
import dataclasses
import functools
import itertools
import json
import os
import shutil
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from _broken import RawProposer
from conftest import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvlab import cache as kv
from kvlab import lab, speculate
from kvlab.evaluate import chi_square
from kvlab.fuse import Fuser, Settings, Size
from kvlab.generation import encode
from kvlab.lab.report import heldout
from kvlab.models import CacheError, rotary_of
from kvlab.slots import Slots
from kvlab.speculate import (
    FINISHED,
    AdaptiveGamma,
    EarlyExitProposer,
    FusedProposer,
    LookupProposer,
    ModelProposer,
    Prefix,
    Proposal,
    Round,
    Runner,
    Sampling,
    TranslatingProposer,
    best_gamma,
    cost_model,
    costs,
    decode,
    generate,
    sample_categorical,
    summarize,
    verify,
    verify_block,
    verify_greedy,
)

DOUBLE = torch.float64
both_rules = pytest.mark.parametrize("rule", [verify, verify_block])
every_family = pytest.mark.parametrize("family", FAMILIES)


def random_prompts(*lengths, seed=0, vocab=97):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator) for n in lengths]


def cut(text, ends):
    return text[: next((i + 1 for i, token in enumerate(text) if token in ends), None)]


TEXTS = {}  # greedy continuations by model and prompt, as long as they were asked for so far


def plain(model, ids, count, ends=()):
    """Greedy decoding of one row with no cache at all."""
    ids = torch.as_tensor(ids)
    new = TEXTS.setdefault((model, tuple(ids.tolist())), [])
    while len(new) < count:
        text = torch.cat((ids, torch.tensor(new, dtype=torch.long)))
        new.append(model(text[None], use_cache=False).logits[0, -1].argmax().item())
    return cut(new[:count], ends)


def plain_after(model, prefix, ids, count):
    """Greedy decoding of one row after a prefix, one token at a time, by `kvlab.cache.prefill`."""
    if prefix is None:
        return plain(model, ids, count)
    new, ids = [], torch.as_tensor(ids)[None]
    for _ in range(count):
        prefix = kv.prefill(model, ids, prefix)
        ids = prefix.logits.argmax(-1, keepdim=True)
        new.append(ids.item())
    return new


def theirs(model, ids, count, **options):
    """Greedy decoding of one row by transformers, all settings explicit."""
    given = {
        "max_new_tokens": count,
        "do_sample": False,
        "repetition_penalty": 1.0,
        "eos_token_id": None,
    } | options
    config = GenerationConfig(**given, pad_token_id=0)
    ids = torch.as_tensor(ids)[None]
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[
        0, ids.shape[1] :
    ].tolist()


@functools.cache
def noisy(model, scale=0.02, seed=3):
    """A copy of a model with other weights close by: it guesses right often, not always."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for weight in other.parameters():
        weight.data += scale * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return other


def read(model, ids, **options):
    """The prefix that reading ids gives."""
    return kv.prefill(model, torch.as_tensor(ids)[None], **options)


def compressed(model, ids, kept):
    """The same with some of its entries only, and its position."""
    whole = read(model, ids)
    return Prefix(kv.select(whole.cache, torch.tensor(kept)), whole.next_position, whole.input_ids)


def new_tokens(target, prompts, *args, **options):
    return [row.tolist() for row in generate(target, prompts, *args, **options).tokens]


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def verifications(rounds):
    return [r for r in rounds if not r.is_prefill]


# Greedy decoding gives the target's text, token for token.


@every_family
@pytest.mark.parametrize(("dtype", "draft"), [(torch.float32, "noisy"), (DOUBLE, "small")], ids=str)
def test_greedy_text_is_the_targets(tiny_model, family, dtype, draft):
    target, prompts = tiny_model(family, dtype=dtype), random_prompts(7, 1)
    small = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    draft = tiny_model(family, dtype=dtype, seed=1, **small) if draft == "small" else noisy(target)
    want = [plain(target, ids, 10) for ids in prompts]
    assert (
        want
        == [theirs(target, ids, 10) for ids in prompts]
        == new_tokens(target, prompts, max_new_tokens=10)
    )
    for gamma in (1, 8):
        assert (
            new_tokens(
                target, prompts[0][None], ModelProposer(draft), gamma=gamma, max_new_tokens=10
            )
            == want[:1]
        )
    for gamma in (4,):
        assert (
            new_tokens(target, prompts, ModelProposer(draft), gamma=gamma, max_new_tokens=10)
            == want
        )


@pytest.mark.parametrize("gamma", [1, 5])
def test_ragged_rows_are_the_rows_alone(tiny_model, gamma):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(3, 11, 1, 6, 6, 20, 2, 9)
    rounds = generate(target, prompts, ModelProposer(noisy(target)), gamma=gamma, max_new_tokens=14)
    assert [row.tolist() for row in rounds.tokens] == [plain(target, ids, 14) for ids in prompts]
    assert 0 < summarize(rounds.rounds).acceptance < 1


PREFIX_KINDS = ("none", "prefilled", "compressed", "moved")


def make_prefix(model, kind, seed):
    (ids,) = random_prompts(10, seed=100 + seed)
    if kind == "prefilled":
        return read(model, ids)
    if kind == "compressed":
        return compressed(model, ids, [0, 2, 3, 7, 9])
    return read(model, ids, position=30 + seed) if kind == "moved" else None


@pytest.mark.parametrize(
    ("family", "kind"), [*zip(FAMILIES, [*PREFIX_KINDS[1:], "compressed"], strict=True)]
)
def test_a_prefix_shared_by_rows(tiny_model, family, kind):
    target, prompts = tiny_model(family, dtype=DOUBLE), random_prompts(5, 1, 8)
    prefix = make_prefix(target, kind, 0)
    want = [plain_after(target, prefix, ids, 9) for ids in prompts]
    if kind == "prefilled":
        assert want == [plain(target, [*prefix.input_ids, *ids.tolist()], 9) for ids in prompts]
    for proposer in (
        None,
        ModelProposer(noisy(target)),
        LookupProposer(),
        EarlyExitProposer(target, 1),
    ):
        assert (
            new_tokens(target, prompts, proposer, gamma=3, max_new_tokens=9, prefix=prefix) == want
        )
    without_ids = replace(prefix, input_ids=())
    assert (
        new_tokens(
            target, prompts, ModelProposer(noisy(target)), max_new_tokens=9, prefix=without_ids
        )
        == want
    )


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(FAMILIES),
    st.integers(1, 8),
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from(PREFIX_KINDS)), min_size=1, max_size=4),
    st.sampled_from(("model", "noisy", "lookup", "early")),
    st.integers(1, 9),
)
def test_each_row_with_its_own_prefix(tiny_model, family, gamma, rows, drafter, count):
    target = tiny_model(family, dtype=DOUBLE)
    proposer = {
        "model": lambda: ModelProposer(
            tiny_model(family, dtype=DOUBLE, seed=1, num_hidden_layers=1)
        ),
        "noisy": lambda: ModelProposer(noisy(target)),
        "lookup": lambda: LookupProposer(longest=2),
        "early": lambda: EarlyExitProposer(target, 2),
    }[drafter]()
    prompts = random_prompts(*[n for n, _ in rows])
    prefixes = [make_prefix(target, kind, seed) for seed, (_, kind) in enumerate(rows)]
    want = [plain_after(target, *pair, count) for pair in zip(prefixes, prompts, strict=True)]
    assert (
        new_tokens(target, prompts, proposer, gamma=gamma, max_new_tokens=count, prefix=prefixes)
        == want
    )


def test_one_prompt_after_different_prefixes(tiny_model):
    target, (ids,) = tiny_model(dtype=DOUBLE), random_prompts(5)
    prefixes = [make_prefix(target, "prefilled", 0), None, make_prefix(target, "prefilled", 1)]
    want = [plain_after(target, prefix, ids, 9) for prefix in prefixes]
    assert (
        new_tokens(
            target, [ids] * 3, ModelProposer(noisy(target)), max_new_tokens=9, prefix=prefixes
        )
        == want
    )


def test_a_draft_may_have_a_prefix_of_its_own(tiny_model):
    target, (known, *prompts) = tiny_model(dtype=DOUBLE), random_prompts(10, 6, 3)
    draft, want = noisy(target), [plain(target, [*known, *ids], 12) for ids in prompts]
    drafted = []
    for own in (
        None,
        read(draft, known),
        [read(draft, known), read(draft, known)],
        compressed(draft, known, [0, 9]),
    ):
        got = generate(
            target,
            prompts,
            ModelProposer(draft, own),
            max_new_tokens=12,
            prefix=read(target, known),
        )
        assert [row.tolist() for row in got.tokens] == want
        drafted.append([r.drafted for r in verifications(got.rounds)])
    assert drafted[0] == drafted[1] == drafted[2] != drafted[3]
    hint = replace(
        read(draft, random_prompts(8, seed=9)[0]), input_ids=()
    )  # known to the draft alone
    alone = generate(target, prompts, ModelProposer(draft, hint), max_new_tokens=12)
    assert [row.tolist() for row in alone.tokens] == [plain(target, ids, 12) for ids in prompts]


def test_a_draft_with_the_targets_prefix_is_accepted_whole(tiny_model):
    target, (known, *prompts) = tiny_model(dtype=DOUBLE), random_prompts(10, 6, 3)
    small = compressed(target, known, [0, 4, 9])
    got = generate(target, prompts, ModelProposer(target, small), max_new_tokens=12, prefix=small)
    assert summarize(got.rounds).acceptance == 1
    reads_all = generate(target, prompts, ModelProposer(target), max_new_tokens=12, prefix=small)
    assert summarize(reads_all.rounds).acceptance < 1
    assert all(map(torch.equal, reads_all.tokens, got.tokens))


def test_the_lab_pair():
    tokenizer, target, draft = (
        lab.load_tokenizer("lab-target"),
        lab.load("lab-target"),
        lab.load("lab-draft"),
    )
    questions = [d[:-1] for task in ("reading", "arithmetic") for d in heldout(task, 2, seed=4)[:2]]
    prompts = [
        tokenizer.apply_chat_template(
            q, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"][0]
        for q in questions
    ]
    end = tokenizer.eos_token_id
    want = [theirs(target, ids, 24, eos_token_id=end) for ids in prompts]
    for proposer in (ModelProposer(draft), LookupProposer()):
        got = generate(target, prompts, proposer, gamma=4, max_new_tokens=24, eos_token_id=end)
        assert [row.tolist() for row in got.tokens] == want
        assert summarize(got.rounds).acceptance > 0.2


# A cache that was prefilled gives the same text as none.


@pytest.mark.parametrize("seed", range(5))
def test_a_prefilled_cache_gives_the_text_of_the_whole_prompt(tiny_model, seed):
    target, draft = (
        tiny_model(seed=s, num_hidden_layers=2, dtype=DOUBLE) for s in (seed, 50 + seed)
    )
    (whole,) = random_prompts(12, seed=seed)
    prefix = read(target, whole[:8])
    got = new_tokens(
        target, whole[None, 8:], ModelProposer(draft), max_new_tokens=10, prefix=prefix
    )
    assert got == [plain(target, whole, 10)]


# A draft equal to the target is accepted whole.


@pytest.mark.parametrize(("temperature", "gamma"), [(0.0, 1), (0.0, 4), (0.8, 1), (0.8, 4)])
def test_a_draft_equal_to_the_target_is_always_right(tiny_model, temperature, gamma):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(4, 9, 1)
    sampling = Sampling(temperature, generator=seeded(1, 2, 3))
    count = 1 + 4 * (gamma + 1)
    got = generate(
        target, prompts, ModelProposer(target), gamma=gamma, max_new_tokens=count, sampling=sampling
    )
    summary = summarize(got.rounds)
    assert summary.acceptance == 1
    assert summary.conditional == summary.unconditional == [1.0] * gamma
    assert summary.tokens_per_call == gamma + 1
    assert summary.target_calls == 4
    assert summary.draft_calls == 4 * gamma
    assert all(r.accepted == [gamma] * 3 for r in verifications(got.rounds))


class ForgetfulProposer(ModelProposer):
    """The classic bug: after full acceptance the last drafted token is taken for read."""

    def accept(self, accepted, target_cache):
        super().accept(accepted, target_cache)
        for row, missing in enumerate(self.unread):
            self.runner.slots.lengths[row] += missing == 2
            self.unread[row] = min(missing, 1)


@pytest.mark.parametrize("gamma", [1, 3])
def test_a_forgotten_draft_token_costs_acceptance_and_not_the_text(tiny_model, gamma):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(4, 9)
    got = generate(target, prompts, ForgetfulProposer(target), gamma=gamma, max_new_tokens=25)
    assert [row.tolist() for row in got.tokens] == [plain(target, ids, 25) for ids in prompts]
    assert summarize(got.rounds).acceptance < 1


# Lookup and early exit.


def lookup_by_search(text, gamma, longest):
    """Try every earlier place of every ending, the longest first."""
    for n in range(min(longest, len(text) - 1), 0, -1):
        follows = [i + n for i in range(len(text) - n) if text[i : i + n] == text[-n:]]
        if follows:
            whole = [at for at in follows if at + gamma <= len(text)]
            at = whole[-1] if whole else follows[0]
            return text[at : at + gamma]
    return []


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 6), st.integers(1, 4))
def test_lookup_finds_what_a_search_finds(text, gamma, longest):
    found = LookupProposer(longest).find(text, gamma)
    assert found == lookup_by_search(text, gamma, longest)
    assert bool(found) == (text[-1] in text[:-1])
    assert len(found) <= gamma


def test_lookup_with_guesses_in_some_rows_only(tiny_model):
    target = tiny_model(dtype=DOUBLE)
    prompts = [
        torch.tensor([5, 6, 7, 8] * 3),
        torch.arange(20, 31),
        torch.tensor([40]),
        torch.tensor([9, 9]),
    ]
    for gamma in (1, 3, 6):
        got = generate(target, prompts, LookupProposer(), gamma=gamma, max_new_tokens=25)
        assert [row.tolist() for row in got.tokens] == [plain(target, ids, 25) for ids in prompts]
        drafted = [r.drafted for r in verifications(got.rounds)]
        guessed = {
            (any(row)) for d in drafted if any(d) for row in [[t >= 0 for t in r] for r in d]
        }
        assert guessed == {True, False}


class PartialGuesses(LookupProposer):
    """Right guesses from a known text, of another number in each row, then none."""

    def __init__(self, texts):
        super().__init__()
        self.known = texts

    def find(self, text, gamma):
        whole = next(t for t in self.known if t[: len(text)] == text)
        return whole[len(text) : len(text) + (len(text) + len(whole)) % (gamma + 1)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_guess_is_never_accepted(tiny_model, temperature):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(3, 8, 5)
    known = [ids.tolist() + plain(target, ids, 30) for ids in prompts]
    certain = Sampling(1e-6) if temperature else None  # sampling from a point
    got = generate(
        target, prompts, PartialGuesses(known), gamma=4, max_new_tokens=20, sampling=certain
    )
    assert [row.tolist() for row in got.tokens] == [plain(target, ids, 20) for ids in prompts]
    for r in verifications(got.rounds)[:3]:
        for drafted, accepted in zip(r.drafted, r.accepted, strict=True):
            assert accepted == sum(token >= 0 for token in drafted)
    assert summarize(got.rounds).acceptance == 1


@pytest.mark.parametrize(("family", "layers"), [*zip(FAMILIES, (1, 2, 2, 1), strict=True)])
def test_early_exit(tiny_model, family, layers):
    target, prompts = (
        tiny_model(family, dtype=DOUBLE, initializer_range=0.05),
        random_prompts(3, 11, 1),
    )
    want = [plain(target, ids, 20) for ids in prompts]
    for gamma in (1, 4):
        got = generate(
            target, prompts, EarlyExitProposer(target, layers), gamma=gamma, max_new_tokens=20
        )
        assert [row.tolist() for row in got.tokens] == want
        assert 0 < summarize(got.rounds).acceptance < 1


def test_early_exit_drafts_what_a_model_of_the_first_layers_drafts(tiny_model):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(3, 11, 1)
    config = copy.deepcopy(target.config)
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    shallow = type(target)(config).to(DOUBLE).eval()
    shallow.load_state_dict(target.state_dict(), strict=False)
    one, two = (
        generate(target, prompts, p, max_new_tokens=20)
        for p in (EarlyExitProposer(target, 1), ModelProposer(shallow))
    )
    assert [r.drafted for r in one.rounds] == [r.drafted for r in two.rounds]
    assert [r.accepted for r in one.rounds] == [r.accepted for r in two.rounds]


def test_early_exit_leaves_the_targets_memory_as_plain_decoding_would(tiny_model):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(4, 9)
    runner = Runner(target)
    tokens = generate(
        runner, prompts, EarlyExitProposer(target, 2), gamma=3, max_new_tokens=10
    ).tokens
    for row, (ids, new) in enumerate(zip(prompts, tokens, strict=True)):
        have = runner.slots.lengths[row]
        want = kv.prefill(target, torch.cat((ids, new))[None, :have]).cache
        for mine, good in zip(runner.slots.entries(row).layers, want.layers, strict=True):
            torch.testing.assert_close(mine.keys, good.keys, rtol=0, atol=1e-10)
            torch.testing.assert_close(mine.values, good.values, rtol=0, atol=1e-10)


# Sampling is exact.


def processors(sampling):
    """The processors of transformers, in the order of its `generate`."""
    penalty, k, p, t = (
        sampling.repetition_penalty,
        sampling.top_k,
        sampling.top_p,
        sampling.temperature,
    )
    return LogitsProcessorList(
        ([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else [])
        + list(sampling.logits_processor)
        + ([TemperatureLogitsWarper(t)] if t != 1 else [])
        + ([TopKLogitsWarper(k)] if k else [])
        + ([TopPLogitsWarper(p)] if p != 1 else [])
        + ([MinPLogitsWarper(sampling.min_p)] if sampling.min_p else [])
    )


class NotTwice(LogitsProcessor):
    """Makes the last token improbable, and the one before it impossible."""

    def __call__(self, input_ids, scores):
        scores = scores.scatter_add(1, input_ids[:, -1:], scores.new_full((len(scores), 1), -0.7))
        return scores.scatter(1, input_ids[:, -2:-1], -float("inf"))


def joint(model, prompt, count, sampling, prefix=None):
    """Exact probabilities of all texts of `count` new tokens, (V,) * count, by enumeration."""
    size, process = model.config.vocab_size, processors(sampling)
    known = torch.tensor(prefix.input_ids if prefix else [], dtype=torch.long)
    total = torch.ones(1, dtype=DOUBLE)
    for n in range(count):
        new = torch.tensor(
            list(itertools.product(range(size), repeat=n)), dtype=torch.long
        ).reshape(size**n, n)
        ids = torch.cat((prompt.expand(len(new), -1), new), 1)
        past = kv.clone(prefix.cache) if prefix else None
        if prefix:
            past.batch_repeat_interleave(len(new))
        past = Prefix(past, prefix.next_position) if prefix else None
        logits = kv.prefill(model, ids, past).logits
        scores = process(torch.cat((known.expand(len(new), -1), ids), 1), logits)
        total = (total.reshape(-1, 1) * scores.double().softmax(-1)).flatten()
    return total.reshape((size,) * count).numpy()


def p_values(
    target, prompt, sampling, proposer, gamma, rows=2000, count=5, prefix=None, rule=verify
):
    """Chi-square p-values of the first three and of the last two of five new tokens of many rows."""
    model = target.model if isinstance(target, Runner) else target
    sampling = dataclasses.replace(sampling, generator=torch.Generator().manual_seed(5))
    got = generate(
        target,
        prompt.expand(rows, -1),
        proposer,
        gamma=gamma,
        max_new_tokens=count,
        sampling=sampling,
        prefix=prefix,
        verify=rule,
    )
    counts = np.zeros((model.config.vocab_size,) * count)
    np.add.at(counts, tuple(torch.stack(got.tokens).T.numpy()), 1)
    exact = joint(model, prompt, count, dataclasses.replace(sampling, generator=None), prefix)
    first, last = tuple(range(3, count)), tuple(range(count - 2))
    return [chi_square(counts.sum(axes).ravel(), exact.sum(axes).ravel()) for axes in (first, last)]


TINY = {
    "vocab_size": 5,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
}
PROMPT = torch.tensor([1, 2, 3, 1, 2, 4, 1, 2])
KNOWN = [0, 3, 3, 1, 4, 2]
SETTINGS = {
    "model, gamma 1": ("model", 1, {}, None),
    "model, gamma 5, hot, top-p": ("model", 5, {"temperature": 1.6, "top_p": 0.8}, None),
    "model, gamma 3, all": (
        "model",
        3,
        {"temperature": 1.3, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.2},
        None,
    ),
    "noisy copy, gamma 4": ("noisy", 4, {}, None),
    "lookup, gamma 3": ("lookup", 3, {}, None),
    "early exit, gamma 2": ("early", 2, {}, None),
    "early exit, gamma 4, cool, top-k": ("early", 4, {"temperature": 0.7, "top_k": 4}, None),
    "early exit, gamma 2, compressed prefix": ("early", 2, {}, "compressed"),
    "model, gamma 2, penalty, prefix": ("model", 2, {"repetition_penalty": 1.4}, "whole"),
    "model, gamma 0 to 3": ("model", (2, 0, 0, 3), {}, None),
    "fused, gamma 2": ("fused", 2, {}, None),
    "fused, gamma 3, cool, top-k, prefix": ("fused", 3, {"temperature": 0.7, "top_k": 4}, "whole"),
    "other tokenizer, gamma 2": ("other tokenizer", 2, {}, None),
    "other tokenizer, gamma 3, all": (
        "other tokenizer",
        3,
        {"temperature": 1.3, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.2},
        None,
    ),
    "plain": ("none", 1, {"top_p": 0.9}, None),
    "noisy copy, gamma 3, min-p": ("noisy", 3, {"min_p": 0.3}, None),
    "model, gamma 3, processors": ("model", 3, {"logits_processor": [NotTwice()]}, None),
    "lookup, gamma 2, processors, prefix": (
        "lookup",
        2,
        {"logits_processor": [NotTwice()], "min_p": 0.1},
        "whole",
    ),
}


def drafter(tiny_model, kind, target):
    return {
        "model": lambda: ModelProposer(tiny_model(seed=1, **TINY)),
        "noisy": lambda: ModelProposer(noisy(target, 0.1)),
        "lookup": lambda: LookupProposer(),
        "early": lambda: EarlyExitProposer(target, 1),
        "fused": lambda: FusedProposer(tiny_model(seed=1, **TINY), cross),
        "other tokenizer": lambda: translating(tiny_model),
        "none": lambda: None,
    }[kind]()


@both_rules
@pytest.mark.parametrize("setting", SETTINGS)
def test_sampling_is_exact(tiny_model, setting, rule):
    target, (kind, gamma, options, known) = tiny_model(**TINY), SETTINGS[setting]
    make = {"whole": read, "compressed": lambda *a: compressed(*a, [0, 3, 5])}.get(known)
    rows = 800 if {"repetition_penalty", "logits_processor"} & options.keys() else 2000
    found = p_values(
        target,
        PROMPT,
        Sampling(**{"temperature": 1.0} | options),
        drafter(tiny_model, kind, target),
        gamma if isinstance(gamma, int) else cycle(*gamma),
        rows,
        prefix=make(target, KNOWN) if make else None,
        rule=rule,
    )
    assert min(found) > 0.01 / (4 * len(SETTINGS))


def draw_again_from_p(p, proposal, uniform):
    accepted, _ = verify(p, proposal, uniform)
    return accepted, sample_categorical(p[torch.arange(len(p)), accepted], uniform[:, -1])


def accept_all(p, proposal, uniform):
    width = proposal.tokens.shape[1]
    return torch.full((len(p),), width), sample_categorical(p[:, width], uniform[:, -1])


def broken_block(p, proposal, uniform, flaw):
    """Block verification, written once more in the paper's terms, with one flaw."""
    tokens, q = proposal
    gamma = tokens.shape[1]
    if gamma == 0:
        return verify_block(p, proposal, uniform)
    ratios = (p[:, :-1] / q).gather(-1, tokens[..., None])[..., 0]
    if flaw == "clamped only at the end":
        carry = ratios.cumprod(1).clamp(max=1)
    elif flaw == "each ratio clamped":
        carry = ratios.clamp(max=1).cumprod(1)
    else:
        carry = [torch.ones(len(p), dtype=p.dtype)]
        for ratio in ratios.T:
            carry.append((carry[-1] * ratio).clamp(max=1))
        carry = torch.stack(carry[1:], 1)
    carry = torch.cat((torch.ones_like(carry[:, :1]), carry), 1)
    q = torch.cat((q, torch.zeros_like(q[:, :1])), 1)
    surplus = (carry[..., None] * p - q).clamp(min=0).sum(-1)
    passed = uniform[:, :gamma] < (surplus / (surplus + 1 - carry))[:, 1:]
    if flaw == "accepted by the carry alone":
        passed = uniform[:, :gamma] < carry[:, 1:]
    accepted = (passed * torch.arange(1, gamma + 1)).amax(1)
    if flaw == "stops at the first rejection":
        accepted = passed.long().cumprod(1).sum(1)
    rows = torch.arange(len(p))
    weight = torch.ones_like(carry[:, 0]) if flaw == "rest of p" else carry[rows, accepted]
    rest = (weight[:, None] * p[rows, accepted] - q[rows, accepted]).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[rows, accepted])
    return accepted, sample_categorical(rest, uniform[:, -1])


FLAWS = ("clamped only at the end", "each ratio clamped", "accepted by the carry alone")
FLAWS += ("stops at the first rejection", "rest of p")


class WrongQ(ModelProposer):
    """Draws at one temperature, tells the probabilities of another."""

    def propose(self, gamma):
        tokens, q = super().propose(gamma)
        return Proposal(tokens, (q.log() / 2).softmax(-1))


class ColumnOff(Runner):
    """Writes one column too early."""

    def __call__(self, tokens, starts):
        return super().__call__(tokens, [start - 1 for start in starts])


class PositionOff(Runner):
    """Goes on one position too early."""

    def start(self, *args):
        logits = super().start(*args)
        self.slots.offsets -= 1
        return logits


@pytest.mark.parametrize(
    "control", ["no residual", "accept all", "wrong q", "column off", "position off"]
)
def test_wrong_sampling_is_found(tiny_model, control):
    target, proposer = tiny_model(**TINY), ModelProposer(tiny_model(seed=1, **TINY))
    rule = {"no residual": draw_again_from_p, "accept all": accept_all}.get(control, verify)
    if control == "wrong q":
        proposer = WrongQ(tiny_model(seed=1, **TINY))
    target = {"column off": ColumnOff, "position off": PositionOff}.get(control, Runner)(target)
    assert min(p_values(target, PROMPT, Sampling(1.0), proposer, gamma=2, rule=rule)) < 1e-6


def test_lookup_without_residual_is_found(tiny_model):
    target, rule = tiny_model(**TINY), draw_again_from_p
    assert min(p_values(target, PROMPT, Sampling(1.0), LookupProposer(), 2, rule=rule)) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.5, "top_p": 0.6},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.7, "repetition_penalty": 1.3},
        {"temperature": 0.9, "min_p": 0.4, "top_p": 0.8},
    ],
    ids=str,
)
def test_scores_are_those_of_generate(tiny_model, options):
    model, (ids,) = tiny_model(), random_prompts(9)
    given = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0} | options
    config = GenerationConfig(**given, do_sample=True, max_new_tokens=4, output_scores=True, output_logits=True,
                              return_dict_in_generate=True, pad_token_id=0)  # fmt: skip
    out = model.generate(ids[None], attention_mask=torch.ones(1, 9), generation_config=config)
    ours = Sampling(**options).scores(torch.stack(out.logits, 1), out.sequences[:, :-1].tolist())
    torch.testing.assert_close(ours, torch.stack(out.scores, 1))


def test_low_precision_is_widened_before_it_is_processed(tiny_model):
    logits = torch.randn(2, 3, 97, generator=torch.Generator().manual_seed(0))
    for dtype, wide in {
        torch.bfloat16: torch.float32,
        torch.float32: torch.float32,
        DOUBLE: DOUBLE,
    }.items():
        scores = Sampling(0.7, top_p=0.9).scores(logits.to(dtype), [[1, 2, 3]] * 2)
        assert scores.dtype == wide
        assert torch.equal(
            scores, Sampling(0.7, top_p=0.9).scores(logits.to(dtype).to(wide), [[1, 2, 3]] * 2)
        )


# One generator a row.


@pytest.mark.parametrize("kind", ["model", "lookup", "early", "none"])
def test_a_row_with_its_own_generator_is_the_row_alone(tiny_model, kind):
    target, prompts = (
        tiny_model(dtype=DOUBLE),
        [*random_prompts(3, 12, 1), torch.tensor([4, 5] * 4)],
    )
    model = noisy(target)
    proposer = {
        "model": ModelProposer(model),
        "lookup": LookupProposer(),
        "early": EarlyExitProposer(target, 1),
    }.get(kind)
    options = {"gamma": 3, "max_new_tokens": 12, "eos_token_id": [3, 50]}

    def sampled(prompts, *seeds):
        sampling = Sampling(1.1, top_k=30, repetition_penalty=1.1, generator=seeded(*seeds))
        return new_tokens(target, prompts, proposer, sampling=sampling, **options)

    together = sampled(prompts, 1, 2, 3, 4)
    assert together == [sampled([ids], seed)[0] for seed, ids in enumerate(prompts, 1)]
    assert together == sampled(prompts, 1, 2, 3, 4)
    others = sampled(prompts, 5, 6, 7, 8)
    assert all(a != b for a, b in zip(together, others, strict=True))


def test_one_generator_for_all_rows(tiny_model):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(4, 4, 4)
    prompts = [prompts[0]] * 3
    texts = [new_tokens(target, prompts, ModelProposer(noisy(target)), max_new_tokens=8,
                        sampling=Sampling(1.0, generator=seeded(seed)[0])) for seed in (1, 1, 2)]  # fmt: skip
    assert texts[0] == texts[1] != texts[2]
    assert len({tuple(text) for text in texts[0]}) == 3


@pytest.mark.parametrize("count", [1, 2, 4])
def test_another_number_of_generators_than_rows_is_refused(tiny_model, count):
    sampling = Sampling(1.0, generator=seeded(*range(count)))
    with pytest.raises(ValueError, match=f"{count} generators for 3 rows"):
        generate(tiny_model(), random_prompts(4, 4, 4), max_new_tokens=4, sampling=sampling)


# Where a text ends.


class Spy(ModelProposer):
    """Counts what it is asked."""

    calls, ended = (0, 0, 0), ()

    def start(self, *args):
        self.calls = (1, 0, 0)
        super().start(*args)

    def propose(self, gamma):
        self.calls = (self.calls[0], self.calls[1] + 1, self.calls[2])
        return super().propose(gamma)

    def accept(self, accepted, target_cache):
        self.calls = (*self.calls[:2], self.calls[2] + 1)
        self.ended = [n == FINISHED for n in accepted]
        super().accept(accepted, target_cache)


@pytest.mark.parametrize("gamma", [1, 2, 4])
@pytest.mark.parametrize("draft", ["same", "noisy"])
def test_an_end_at_every_place_of_a_round(tiny_model, gamma, draft):
    target, (ids,) = tiny_model(dtype=DOUBLE), random_prompts(9)
    draft, text = target if draft == "same" else noisy(target), plain(target, ids, 14)
    for k in range(1, 8):
        spy = Spy(draft)
        got = generate(
            target, ids[None], spy, gamma=gamma, max_new_tokens=14, eos_token_id=text[k - 1]
        )
        assert (
            got.tokens[0].tolist()
            == cut(text, [text[k - 1]])
            == plain(target, ids, 14, [text[k - 1]])
        )
        rounds = len(verifications(got.rounds))
        assert spy.calls == (int(rounds > 0), rounds, rounds)
        assert summarize(got.rounds).tokens == len(got.tokens[0]) - 1


def test_a_list_of_ends_and_the_models_own(tiny_model):
    target, (ids,) = copy.deepcopy(tiny_model(dtype=DOUBLE)), random_prompts(9)
    text, options = plain(target, ids, 14), {"gamma": 3, "max_new_tokens": 14}
    for ends in ([text[6], text[4]], [text[3], 1000], []):
        assert new_tokens(
            target, ids[None], ModelProposer(target), eos_token_id=ends, **options
        ) == [cut(text, ends)]
    for own in (text[4], [text[4], text[6]]):
        target.generation_config.eos_token_id = own
        assert new_tokens(target, ids[None], ModelProposer(target), **options) == [
            cut(text, [text[4]])
        ]
    assert new_tokens(target, ids[None], ModelProposer(target), eos_token_id=[], **options) == [
        text
    ]


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_the_number_of_new_tokens_is_exact(tiny_model, count):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(9, 2)
    for draft in (target, noisy(target)):
        for gamma in (1, 4):
            got = generate(target, prompts, ModelProposer(draft), gamma=gamma, max_new_tokens=count)
            assert [row.tolist() for row in got.tokens] == [
                plain(target, ids, count) for ids in prompts
            ]
            assert summarize(got.rounds).tokens == 2 * (count - 1)


@pytest.mark.parametrize("kind", ["same", "noisy", "lookup", "early", "none"])
def test_a_row_that_ended_stays_while_others_go_on(tiny_model, kind):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(9, 4, 7, 5)
    texts = [plain(target, ids, 24) for ids in prompts]
    ends = [texts[0][0], texts[1][5], texts[2][9]]
    want = [cut(text, ends) for text in texts]
    assert len({len(text) for text in want}) >= 3
    proposer = {"same": ModelProposer(target), "noisy": ModelProposer(noisy(target)), "lookup": LookupProposer(),
                "early": EarlyExitProposer(target, 2)}.get(kind)  # fmt: skip
    for gamma in (1, 3, 5):
        rounds = generate(
            target, prompts, proposer, gamma=gamma, max_new_tokens=24, eos_token_id=ends
        ).rounds
        for row, text in enumerate(want):
            parts = [r.tokens[row] for r in rounds if not r.is_prefill or r.tokens[row]]
            assert [token for part in parts for token in part] == text
            live = [bool(part) for part in parts]
            assert live == sorted(live, reverse=True)
        assert any(rounds[-1].tokens)


def test_a_proposer_hears_of_rows_that_ended(tiny_model):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(9, 4)
    text = plain(target, prompts[0], 24)
    spy, ended = Spy(noisy(target)), []
    for r in decode(target, prompts, spy, gamma=2, max_new_tokens=24, eos_token_id=text[3]):
        if not r.is_prefill:
            ended.append(spy.ended)
            assert spy.runner.slots.lengths[0] + spy.unread[0] <= len(prompts[0]) + 4
    assert ended[-1] == [True, True]
    assert [row for row, _ in ended] == sorted(row for row, _ in ended)
    assert (
        spy.texts[1]
        == prompts[1].tolist() + plain(target, prompts[1], 24, [text[3]])[: len(spy.texts[1]) - 4]
    )


# Repetition penalty.


def test_repetition_penalty_is_that_of_transformers(tiny_model):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(6, 15, 2)
    want = [theirs(target, ids, 16, repetition_penalty=1.3) for ids in prompts]
    assert want != [plain(target, ids, 16) for ids in prompts]
    greedy = {"sampling": Sampling(repetition_penalty=1.3), "max_new_tokens": 16}
    proposers = (
        None,
        ModelProposer(noisy(target)),
        ModelProposer(target),
        LookupProposer(),
        EarlyExitProposer(target, 1),
    )
    for proposer in proposers:
        assert new_tokens(target, prompts, proposer, gamma=3, **greedy) == want
    same = generate(target, prompts, ModelProposer(target), gamma=4, **greedy)
    assert summarize(same.rounds).acceptance == 1


def test_repetition_penalty_counts_the_prefix(tiny_model):
    target, (whole,) = tiny_model(dtype=DOUBLE), random_prompts(40)
    want, prefix = theirs(target, whole, 16, repetition_penalty=1.3), read(target, whole[:30])
    for proposer in (
        None,
        ModelProposer(noisy(target)),
        EarlyExitProposer(target, 1),
        LookupProposer(),
    ):
        options = {"max_new_tokens": 16, "sampling": Sampling(repetition_penalty=1.3)}
        assert new_tokens(target, whole[None, 30:], proposer, prefix=prefix, **options) == [want]
    unknown = new_tokens(target, whole[None, 30:], prefix=replace(prefix, input_ids=()), **options)
    assert unknown != [want]


# Both kinds of attention.


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("rows", [1, 3])
def test_both_attention_implementations(tiny_model, kind, rows):
    target = tiny_model(dtype=DOUBLE, attn_implementation=kind)
    prompts = [random_prompts(9)[0]] if rows == 1 else random_prompts(5, 9, 5)
    want = [plain(target, ids, 12) for ids in prompts]
    for proposer in (
        None,
        ModelProposer(noisy(target)),
        EarlyExitProposer(target, 1),
        LookupProposer(),
    ):
        assert new_tokens(target, prompts, proposer, max_new_tokens=12) == want


# Compiled.


@pytest.fixture
def compiled(monkeypatch):
    """Replace the compiler's back end by one that counts programs and their calls."""
    real, counts = torch.compile, {"programs": 0, "calls": 0}

    def backend(graph, inputs):
        counts["programs"] += 1

        def call(*args):
            counts["calls"] += 1
            return graph(*args)

        return call

    def compile_eager(function, options=None, **rest):
        kept = {key: value for key, value in (options or {}).items() if key == "guard_filter_fn"}
        return real(function, backend=backend, options=kept, **rest)

    monkeypatch.setattr(torch, "compile", compile_eager)
    yield counts
    torch._dynamo.reset()


def test_compiled_is_uncompiled(tiny_model, compiled):
    target, prompts = tiny_model(dtype=DOUBLE, num_hidden_layers=2), random_prompts(9, 1, 12)
    draft, limit = (
        noisy(tiny_model(dtype=DOUBLE, num_hidden_layers=1)),
        torch._dynamo.config.recompile_limit,
    )
    fast, fast_draft = Runner(target, 48), Runner(draft, 48)
    for rows in (prompts[:1], prompts, prompts[:1]):
        want = [plain(target, ids, 14) for ids in rows]
        assert new_tokens(fast, rows, ModelProposer(fast_draft), gamma=3, max_new_tokens=14) == want
    early = EarlyExitProposer(fast, 1)
    for ids in prompts[:2]:
        assert new_tokens(fast, ids[None], early, gamma=3, max_new_tokens=14) == [
            plain(target, ids, 14)
        ]
    assert (
        compiled["programs"] == 8
    )  # (1, 4) and (3, 4) of the target, (1 or 3, 2 or 1) of the draft, (1, 2 or 1) early

    programs, calls, got = compiled["programs"], compiled["calls"], []
    for one, two in ((target, draft), (fast, fast_draft)):
        for temperature in (0.0, 0.9):
            sampling = Sampling(temperature, top_p=0.9, generator=seeded(1, 2, 3))
            got.append(
                generate(
                    one, prompts, ModelProposer(two), gamma=3, max_new_tokens=14, sampling=sampling
                )
            )
    for plainly, quickly in (got[::2], got[1::2]):
        for part in ("drafted", "accepted", "tokens"):
            assert [getattr(r, part) for r in plainly.rounds] == [
                getattr(r, part) for r in quickly.rounds
            ]
    assert compiled["programs"] == programs
    assert compiled["calls"] - calls == 4 * sum(
        len(verifications(g.rounds)) for g in got[2:]
    )  # no call went around it
    assert torch._dynamo.config.recompile_limit == limit


def test_compiled_memory_stays_in_place_and_forgets_the_text_before(tiny_model, compiled):
    target, (long, short) = tiny_model(dtype=DOUBLE, num_hidden_layers=1), random_prompts(20, 4)
    fast = Runner(target, 48)
    assert new_tokens(fast, [long], gamma=1, max_new_tokens=14) == [plain(target, long, 14)]
    places, prefix = (
        [layer.keys.data_ptr() for layer in fast.slots.layers],
        compressed(target, long, [0, 5, 19]),
    )
    want = [plain_after(target, prefix, short, 14)]
    assert new_tokens(fast, [short], gamma=1, max_new_tokens=14, prefix=prefix) == want
    assert (
        new_tokens(fast, [short], gamma=1, max_new_tokens=14) == [plain(target, short, 14)] != want
    )
    assert [layer.keys.data_ptr() for layer in fast.slots.layers] == places


def test_two_compiled_models_keep_their_own_programs(tiny_model, compiled):
    models = [tiny_model(dtype=DOUBLE, seed=seed, num_hidden_layers=1) for seed in range(2)]
    (ids,) = random_prompts(7)
    runners, want = (
        [Runner(model, 32) for model in models],
        [plain(model, ids, 8) for model in models],
    )
    assert want[0] != want[1]
    for _ in range(2):
        assert [
            new_tokens(runner, ids[None], gamma=1, max_new_tokens=8)[0] for runner in runners
        ] == want
    for runner, draft, text in zip(runners, runners[::-1], want, strict=True):
        assert new_tokens(runner, ids[None], ModelProposer(draft), gamma=1, max_new_tokens=8) == [
            text
        ]


def test_weights_of_a_compiled_model_may_change(tiny_model, compiled):
    model, (ids,) = copy.deepcopy(tiny_model(dtype=DOUBLE, num_hidden_layers=1)), random_prompts(7)
    runner = Runner(model, 32)
    before = new_tokens(runner, ids[None], gamma=1, max_new_tokens=8)
    model.load_state_dict(tiny_model(dtype=DOUBLE, num_hidden_layers=1, seed=8).state_dict())
    after = new_tokens(runner, ids[None], gamma=1, max_new_tokens=8)
    assert after == [plain(model, ids, 8)] != before


def test_too_small_a_room_is_refused_before_any_step(tiny_model, compiled):
    target, (ids,) = tiny_model(num_hidden_layers=1), random_prompts(9)
    runner = Runner(target, 20)
    with pytest.raises(ValueError, match="compiled_room is 20, but texts need 24"):
        generate(runner, ids[None], gamma=4, max_new_tokens=10)
    assert compiled["programs"] == 0
    with pytest.raises(ValueError, match="compiled_room is 12"):
        generate(target, ids[None], ModelProposer(Runner(target, 12)), gamma=4, max_new_tokens=10)


@pytest.mark.skipif(
    "CI_FAST" in os.environ or not shutil.which("g++"), reason="needs a C++ compiler, and seconds"
)
def test_the_real_compiler(tiny_model):
    models, (ids,) = (
        [tiny_model(num_hidden_layers=1, seed=seed) for seed in range(2)],
        random_prompts(7),
    )
    runners, want = (
        [Runner(model, 32) for model in models],
        [plain(model, ids, 8) for model in models],
    )
    for _ in range(2):
        assert [
            new_tokens(runner, ids[None], gamma=1, max_new_tokens=8)[0] for runner in runners
        ] == want
    torch._dynamo.reset()


# A draft whose cache is fused from the target's.


def open_fuser(draft, target, logit=1.0):
    """A C2C fuser with large random changes that all pass (or, with a logit of 0, none)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fuser = Fuser(
            *(Size.of(model.config) for model in (draft, target)), settings=Settings(hidden=16)
        )
    for name, weight in fuser.named_parameters():
        weight.data.fill_(logit) if name.endswith("gate_logit") else weight.data.mul_(3)
    return fuser


def cross(own, theirs):
    """A quick fuser that does change what is guessed, for models of one size."""
    return kv.from_tensor((kv.to_tensor(own.cache) + kv.to_tensor(theirs.cache)) / 2)


def unequal(tiny_model, family="Qwen3"):
    """A target, and a draft of other depth, heads and rope."""
    small = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return tiny_model(family, dtype=DOUBLE), tiny_model(
        family, "linear", dtype=DOUBLE, seed=1, **small
    )


class Fusions:
    """A fuser that keeps what it was given and what it made: (row, first column, own, theirs, made) of each call."""

    def __init__(self, fuse=lambda own, theirs: own.cache):
        self.fuse, self.calls = fuse, []

    def __call__(self, own, theirs):
        keys, made = (
            own.cache.layers[0].keys,
            self.fuse(own, theirs),
        )  # a view of memory: where it is tells the row
        row, rest = divmod(keys.storage_offset(), keys.stride(0))
        kept = [kv.clone(cache) for cache in (own.cache, theirs.cache, made)]
        given = replace(own, cache=kept[0]), replace(theirs, cache=kept[1])
        self.calls.append((row, rest // keys.shape[-1], *given, kept[2]))
        return made


def rounded(own, theirs):
    """A fuser that changes next to nothing and leaves its mark: all numbers are those of float32."""
    return kv.from_tensor(kv.to_tensor(own.cache).float().double())


def handed_over(own, theirs):
    """The fuser that knows best, if both are one model: what the target made, at the draft's positions."""
    return kv.rotate(
        kv.unrotate(theirs.cache, theirs.positions, theirs.rotary), own.positions, own.rotary
    )


@pytest.mark.parametrize(("family", "kind"), [*zip(FAMILIES, PREFIX_KINDS, strict=True)])
def test_greedy_text_of_a_fused_draft_is_the_targets(tiny_model, family, kind):
    (target, draft), prompts = unequal(tiny_model, family), random_prompts(5, 1, 8)
    prefix, fuser = make_prefix(target, kind, 0), open_fuser(draft, target)
    want = [plain_after(target, prefix, ids, 10) for ids in prompts]
    ends = [want[0][4], want[2][7]]
    for gamma in (1, 3):
        proposer = FusedProposer(draft, fuser)
        assert (
            new_tokens(target, prompts, proposer, gamma=gamma, max_new_tokens=10, prefix=prefix)
            == want
        )
        short = new_tokens(
            target,
            prompts,
            proposer,
            gamma=gamma,
            max_new_tokens=10,
            prefix=prefix,
            eos_token_id=ends,
        )
        assert short == [cut(text, ends) for text in want]


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(FAMILIES),
    st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from(PREFIX_KINDS)), min_size=1, max_size=3),
    st.sampled_from(("none", "whole", "compressed", "hint")),
    st.booleans(),
    st.booleans(),
    st.integers(1, 12),
)
def test_whatever_is_fused_the_text_is_the_targets(
    tiny_model, family, gammas, rows, known, prefill, decode, count
):
    (target, draft), prompts = unequal(tiny_model, family), random_prompts(*[n for n, _ in rows])
    prefixes, own = [make_prefix(target, kind, seed) for seed, (_, kind) in enumerate(rows)], None
    if known == "hint":
        own = replace(read(draft, random_prompts(6, seed=9)[0]), input_ids=())
    elif known != "none":
        texts = [
            [*(p.input_ids if p else ()), *ids.tolist()]
            for p, ids in zip(prefixes, prompts, strict=True)
        ]
        begins = [text[: max(0, len(text) - 3)] for text in texts]
        make = (
            read
            if known == "whole"
            else lambda model, ids: compressed(model, ids, [0, len(ids) - 1])
        )
        own = [make(draft, ids) if len(ids) > 1 else None for ids in begins]
    proposer = FusedProposer(draft, open_fuser(draft, target), own, prefill, decode)
    want = [plain_after(target, *pair, count) for pair in zip(prefixes, prompts, strict=True)]
    assert (
        new_tokens(
            target, prompts, proposer, gamma=cycle(*gammas), max_new_tokens=count, prefix=prefixes
        )
        == want
    )


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_draft_with_closed_gates_is_the_draft_alone(tiny_model, temperature):
    (target, draft), prompts = unequal(tiny_model), random_prompts(5, 1, 8)

    class TwoLeft(ModelProposer):
        leaves = 2

    found = []
    for proposer in (FusedProposer(draft, open_fuser(draft, target, 0.0)), TwoLeft(draft),
                     ModelProposer(draft), FusedProposer(draft, open_fuser(draft, target)),
                     FusedProposer(draft, open_fuser(draft, target), None, False, False)):  # fmt: skip
        told, propose = [], proposer.propose
        proposer.propose = lambda gamma, told=told, propose=propose: (
            told.append(propose(gamma)) or told[-1]
        )
        sampling = Sampling(temperature, generator=seeded(1, 2, 3))
        rounds = generate(
            target, prompts, proposer, gamma=3, max_new_tokens=14, sampling=sampling
        ).rounds
        found.append((told, [(r.drafted, r.accepted, r.tokens) for r in rounds]))
    closed, same, alone, opened, off = found
    assert closed[1] == same[1] == alone[1] == off[1] != opened[1]
    for one, two, three, four in zip(closed[0], same[0], alone[0], off[0], strict=True):
        assert torch.equal(one.tokens, two.tokens)
        if temperature:
            assert torch.equal(one.probabilities, two.probabilities)
            assert torch.equal(one.probabilities, four.probabilities)
            torch.testing.assert_close(one.probabilities, three.probabilities, rtol=0, atol=1e-12)


@pytest.mark.parametrize("known", ["none", "whole", "compressed", "hint"])
@pytest.mark.parametrize("kind", PREFIX_KINDS)
def test_what_both_have_read_is_fused_once_and_in_order(tiny_model, kind, known):
    """Each token at its own column and position in both memories, as soon as both have read it."""
    target, (ids,) = tiny_model(dtype=DOUBLE), random_prompts(7)
    draft, prefix = noisy(target, 0.04), make_prefix(target, kind, 0)
    text = [*(prefix.input_ids if prefix else ()), *ids.tolist()]
    own = {"none": lambda: None, "whole": lambda: read(draft, text[:5]),
           "compressed": lambda: compressed(draft, text[:5], [0, 3]),
           "hint": lambda: replace(read(draft, random_prompts(6, seed=9)[0]), input_ids=())}[known]()  # fmt: skip
    begin, column = (len(own.input_ids), kv.length(own.cache)) if own else (0, 0)
    want = [*text, *plain_after(target, prefix, ids, 15)]
    for gammas, early, later in (((1,), True, True), ((2, 0, 0, 4), True, True),
                                 ((3,), True, False), ((3,), False, True)):  # fmt: skip
        spy, stop = (
            Fusions(),
            len(text) - 1,
        )  # what the draft has read: all of the prompt but its last
        fused = begin if early and kind != "compressed" else stop
        proposer = FusedProposer(draft, spy, own, early, later)
        rounds = decode(
            target, ids[None], proposer, gamma=cycle(*gammas), max_new_tokens=15, prefix=prefix
        )
        have = len(text) + len(next(rounds).tokens[0])
        assert not spy.calls
        for r in rounds:
            if drafted := len(r.drafted[0]):  # the last one drafted was never read
                stop = have + min(r.accepted[0], drafted - 1)
            have += len(r.tokens[0])
            going = have < len(want) and (early if r.is_prefill else later)
            assert len(spy.calls) == int(going and stop > fused)
            for row, start, mine, other, _ in spy.calls:
                assert (row, start) == (0, column + fused - begin)
                check_read(draft, own, want[:stop], mine, fused)
                check_read(target, prefix, want[:stop], other, fused)
                fused = stop
            spy.calls.clear()
        assert have == len(want)


def check_read(model, prefix, text, got, start):
    """What was read is what the model makes of the tokens from `start` on of a text that its prefix stands before."""
    known = len(prefix.input_ids) if prefix else 0
    after = kv.prefill(model, torch.tensor([text[known:]]), prefix)
    whole, behind = after.cache, after.next_position
    count, have = len(text) - start, kv.length(whole)
    assert got.positions.tolist() == [[*range(behind - count, behind)]]
    assert got.rotary is rotary_of(model)
    want = kv.select(whole, torch.arange(have - count, have))
    torch.testing.assert_close(kv.to_tensor(got.cache), kv.to_tensor(want), rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", [1, -1])
def test_rows_with_prefixes_of_their_own_are_fused_each_by_itself(tiny_model, order):
    target, prompts, spy = tiny_model(dtype=DOUBLE), random_prompts(4, 9, 6, 5), Fusions()
    draft, kinds = noisy(target), PREFIX_KINDS[::order]
    prefixes = [make_prefix(target, kind, seed) for seed, kind in enumerate(kinds)]
    texts = [
        [*(p.input_ids if p else ()), *ids.tolist()]
        for p, ids in zip(prefixes, prompts, strict=True)
    ]
    hint = replace(read(draft, random_prompts(6, seed=9)[0]), input_ids=())
    own = [None, read(draft, texts[1][:4]), compressed(draft, texts[2][:3], [0, 2]), hint]
    proposer = FusedProposer(draft, spy, own)
    new = new_tokens(target, prompts, proposer, gamma=3, max_new_tokens=16, prefix=prefixes)
    begins = [len(p.input_ids) if p else 0 for p in own]
    fused = [
        len(text) - 1 if kind == "compressed" else n
        for text, kind, n in zip(texts, kinds, begins, strict=True)
    ]
    for row, start, mine, other, _ in spy.calls:
        stop = fused[row] + kv.length(other.cache)
        check_read(draft, own[row], [*texts[row], *new[row]][:stop], mine, fused[row])
        check_read(target, prefixes[row], [*texts[row], *new[row]][:stop], other, fused[row])
        assert start == fused[row] - begins[row] + (kv.length(own[row].cache) if own[row] else 0)
        fused[row] = stop
    assert all(stop - len(text) >= 10 for stop, text in zip(fused, texts, strict=True))


def test_positions_of_both_agree_in_texts_that_both_have_read(tiny_model):
    (target, draft), prompts = unequal(tiny_model), random_prompts(5, 2, 8)
    spy, known = Fusions(open_fuser(draft, target)), random_prompts(6, seed=8)[0]
    options = {"gamma": 2, "max_new_tokens": 16, "prefix": read(target, known)}
    generate(target, prompts, FusedProposer(draft, spy), **options)
    for row, ids in enumerate(prompts):
        mine, theirs = (
            [p for c in spy.calls if c[0] == row for p in c[side].positions[0].tolist()]
            for side in (2, 3)
        )
        assert mine == theirs == [*range(len(mine))]
        assert 10 <= len(mine) - 6 - len(ids) < 16
    assert {(own.rotary, theirs.rotary) for *_, own, theirs, _ in spy.calls} == {
        (rotary_of(draft), rotary_of(target))
    }


class Watched(FusedProposer):
    """Sees to it that the target's memory stays as it was, and the draft's where it was, whatever is fused."""

    def start(self, texts, target_cache, *rest):
        before = copies(target_cache)
        super().start(texts, target_cache, *rest)
        assert all(map(torch.equal, before, copies(target_cache)))
        self.places = [layer.keys.data_ptr() for layer in self.runner.slots.layers]

    def accept(self, accepted, target_cache):
        before = copies(target_cache)
        super().accept(accepted, target_cache)
        assert all(map(torch.equal, before, copies(target_cache)))
        assert [layer.keys.data_ptr() for layer in self.runner.slots.layers] == self.places


def copies(slots):
    lengths = torch.tensor(slots.lengths)
    return [
        lengths,
        slots.offsets.clone(),
        *(x.clone() for y in slots.layers for x in (y.keys, y.values)),
    ]


def check_marks(proposer, spy):
    """What was fused is in the draft's memory, bit for bit, and all else there is the draft's own."""
    slots, fused = proposer.runner.slots, [0] * len(proposer.texts)
    for row, start, *_, made in spy.calls:
        assert start == fused[row]
        fused[row] += kv.length(made)
        assert torch.equal(kv.to_tensor(slots.entries(row, start, fused[row])), kv.to_tensor(made))
    for row, stop in enumerate(fused):
        if stop < slots.lengths[row]:
            later = kv.to_tensor(slots.entries(row, stop))
            assert (later != later.float().double()).all()


@pytest.mark.parametrize("gamma", [1, 4])
def test_what_is_fused_is_in_the_drafts_memory_and_the_targets_is_unchanged(tiny_model, gamma):
    target, (ids,), spy = tiny_model(dtype=DOUBLE), random_prompts(7), Fusions(rounded)
    proposer, rounds = Watched(noisy(target), spy), 0
    for r in decode(target, ids[None], proposer, gamma=gamma, max_new_tokens=24):
        rounds += not r.is_prefill
        if spy.calls:
            check_marks(proposer, spy)
    assert len(spy.calls) == rounds  # at the start and after all but the last


@pytest.mark.parametrize("room", [None, 48])
def test_what_is_fused_stays_in_the_drafts_memory(tiny_model, compiled, room):
    target, prompts, spy = (
        tiny_model(dtype=DOUBLE),
        random_prompts(7, 1, 9)[: 1 if room else 3],
        Fusions(rounded),
    )
    proposer = Watched(Runner(noisy(target), room), spy)
    for _ in decode(target, prompts, proposer, gamma=3, max_new_tokens=24):
        if spy.calls:
            check_marks(proposer, spy)


def test_a_fused_row_is_the_row_alone(tiny_model):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(9, 4, 7, 1, 6, 12)
    draft = noisy(target)
    proposer, options = (
        FusedProposer(draft, open_fuser(draft, target)),
        {"gamma": 3, "max_new_tokens": 30},
    )
    together = verifications(generate(target, prompts, proposer, **options).rounds)
    assert 0 < summarize(together).acceptance < 1
    for row, ids in enumerate(prompts):
        alone = verifications(generate(target, ids[None], proposer, **options).rounds)
        drafted = [r.drafted[0] for r in alone if r.drafted[0]]  # the last round may draft none
        assert [r.drafted[row] for r in together if r.drafted[row]] == drafted


def test_a_compiled_fused_draft_guesses_what_an_uncompiled_one_does(tiny_model, compiled):
    target, (ids,) = tiny_model(dtype=DOUBLE), random_prompts(9)
    draft = noisy(target)
    fuser, told = open_fuser(draft, target), []
    for runner in (Runner(draft), Runner(draft, 64)):
        rounds = generate(
            target, ids[None], FusedProposer(runner, fuser), gamma=3, max_new_tokens=40
        ).rounds
        told.append([(r.drafted, r.accepted) for r in rounds])
    assert told[0] == told[1]


class Wiped(Runner):
    """Forgets what it has read."""

    def start(self, *args):
        logits = super().start(*args)
        for layer in self.slots.layers:
            layer.keys.zero_()
            layer.values.zero_()
        return logits


@pytest.mark.parametrize(("kind", "gamma"), [("none", 4), ("prefilled", 1), ("moved", 4)])
def test_the_targets_own_memory_makes_up_for_a_draft_that_forgot(tiny_model, kind, gamma):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(4, 9, 2)
    prefix, proposers = (make_prefix(target, kind, 0), [FusedProposer(Wiped(target), handed_over)])
    proposers += [FusedProposer(target, handed_over), FusedProposer(Wiped(target), Fusions())]
    got = [
        generate(target, prompts, p, gamma=gamma, max_new_tokens=21, prefix=prefix)
        for p in proposers
    ]
    for one in got:
        assert [row.tolist() for row in one.tokens] == [
            plain_after(target, prefix, ids, 21) for ids in prompts
        ]
    assert [summarize(one.rounds).acceptance for one in got[:2]] == [1, 1]
    assert summarize(got[2].rounds).acceptance < 1


def test_the_prompts_last_token_is_read_on_what_is_fused(tiny_model):
    """As a fuser is trained: with another prompt's cache from the start, no guess is that of the prompt itself."""
    target, (ids, other) = tiny_model(dtype=DOUBLE), random_prompts(9, 9)
    elsewhere = kv.prefill(target, other[None, :8])
    swapped = FusedProposer(target, lambda own, theirs: elsewhere.cache, decode=False)
    first = verifications(generate(target, ids[None], swapped, gamma=3, max_new_tokens=8).rounds)[0]
    both = torch.cat((ids[-1:], torch.tensor(plain(target, ids, 1))))
    assert first.drafted[0] == plain_after(target, Prefix(elsewhere.cache, 8), both, 3)
    assert first.drafted[0] != plain(target, [*ids.tolist(), both[-1].item()], 3)


def test_a_row_that_ended_is_fused_no_more(tiny_model):
    target, prompts, spy = tiny_model(dtype=DOUBLE), random_prompts(9, 4, 7), Fusions()
    texts = [plain(target, ids, 24) for ids in prompts]
    ends, live, seen = [texts[1][5], texts[2][9]], [True] * 3, []
    lengths = [len(cut(text, ends)) for text in texts]
    assert len(set(lengths)) == 3
    proposer = FusedProposer(noisy(target), spy)
    for r in decode(target, prompts, proposer, gamma=2, max_new_tokens=24, eos_token_id=ends):
        seen = [a + b for a, b in zip(seen or [[]] * 3, r.tokens, strict=True)]
        live = [len(tokens) < n for tokens, n in zip(seen, lengths, strict=True)]
        if not r.is_prefill:
            assert [row for row, *_ in spy.calls] == [row for row in range(3) if live[row]]
        spy.calls.clear()
    assert not any(live)


def test_a_compiled_draft_is_fused_in_place(tiny_model, compiled):
    target, prompts = tiny_model(dtype=DOUBLE, num_hidden_layers=2), random_prompts(9, 1, 12)
    draft = noisy(tiny_model(dtype=DOUBLE, num_hidden_layers=1))
    fast, runner, spy = Runner(target, 48), Runner(draft, 48), Fusions(open_fuser(draft, target))
    places = []
    for rows in (prompts[:1], prompts, prompts[:1]):
        proposer, count, new = Watched(runner, spy), len(spy.calls), [[] for _ in rows]
        for r in decode(fast, rows, proposer, gamma=3, max_new_tokens=14):
            new = [a + b for a, b in zip(new, r.tokens, strict=True)]
            for row, start, *_, made in spy.calls[count:]:
                stop = start + kv.length(made)
                assert torch.equal(
                    kv.to_tensor(runner.slots.entries(row, start, stop)), kv.to_tensor(made)
                )
            count = len(spy.calls)
        assert new == [plain(target, ids, 14) for ids in rows]
        places.append(proposer.places)
    assert places[0] != places[1]  # other rows, other memory
    assert compiled["programs"] == 6


def test_a_shared_vocabulary_of_another_size_changes_nothing(tiny_model):
    target, (ids,) = tiny_model(dtype=DOUBLE), random_prompts(9)
    for size in (90, 120):
        draft = tiny_model(vocab_size=size, dtype=DOUBLE)
        proposer = FusedProposer(draft, open_fuser(draft, target))
        assert new_tokens(target, ids[None], proposer, gamma=3, max_new_tokens=14) == [
            plain(target, ids, 14)
        ]


# The q of a proposer is the distribution it sampled from.


class Drafts:
    """A proposer that notes, for each guess, the text before it, the guess and its q.

    Texts count as equal if they were drafted in the same rounds: a draft's memory may depend on it.
    """

    def __init__(self, proposer):
        self.proposer, self.notes = proposer, []

    def start(self, texts, *args):
        self.texts, self.finished = texts, [False] * len(texts)
        self.rounds = [()] * len(texts)
        self.proposer.start(texts, *args)

    def propose(self, gamma):
        tokens, q = proposal = self.proposer.propose(gamma)
        for row, guess in enumerate(tokens.tolist()):
            self.rounds[row] += (len(self.texts[row]),)
            for i, token in enumerate(() if self.finished[row] else guess):
                text = (*self.texts[row], *guess[:i])
                self.notes.append(((self.rounds[row], text), token, q[row, i]))
        return proposal

    def accept(self, accepted, target_cache):
        self.finished = [n == FINISHED for n in accepted]
        self.proposer.accept(accepted, target_cache)

    def p_value(self):
        """The smallest of all texts with at least 100 guesses, times the number of these texts."""
        by_text = {}
        for text, token, law in self.notes:
            by_text.setdefault(text, []).append((token, law))
        found = []
        for guesses in by_text.values():
            tokens, laws = zip(*guesses, strict=True)
            torch.testing.assert_close(torch.stack(laws), laws[0].expand(len(laws), -1))  # all rows
            if len(tokens) >= 100 and laws[0].max() < 1:
                counts = torch.tensor(tokens).bincount(minlength=len(laws[0]))
                found.append(chi_square(counts, laws[0].double()))
        return min(found) * len(found)


def p_value_of_drafts(tiny_model, kind, options, rows=1500):
    target = tiny_model(**TINY)
    proposer = RawProposer(tiny_model(seed=1, **TINY)) if kind == "raw" else None
    drafts = Drafts(proposer or drafter(tiny_model, kind, target))
    sampling = Sampling(**{"temperature": 1.0, "generator": seeded(0)[0]} | options)
    ends = [3] if sampling.min_new_tokens else []
    generate(target, PROMPT.expand(rows, -1), drafts, gamma=2, max_new_tokens=4,
             sampling=sampling, eos_token_id=ends)  # fmt: skip
    return drafts.p_value()


LAWS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.4},
    "penalty": {"repetition_penalty": 1.5},
    "no end": {"min_new_tokens": 4},
    "processor": {"logits_processor": [NotTwice()]},
    "all": {"temperature": 1.4, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.3, "min_p": 0.05},
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", ["model", "early", "fused", "other tokenizer"])
def test_a_proposer_reports_the_law_it_drew_from(tiny_model, kind, law):
    rows = 600 if kind == "fused" else 1500
    assert p_value_of_drafts(tiny_model, kind, LAWS[law], rows) > 0.001


@pytest.mark.parametrize("law", ["temperature", "top-k", "penalty", "processor", "all"])
def test_probabilities_of_raw_logits_are_found(tiny_model, law):
    assert p_value_of_drafts(tiny_model, "raw", LAWS[law]) < 1e-6
    assert p_value_of_drafts(tiny_model, "raw", {}) > 0.001  # nothing is processed


@pytest.mark.parametrize("law", LAWS)
@both_rules
def test_a_draft_equal_to_the_target_is_accepted_under_each_law(tiny_model, law, rule):
    target, prompts = tiny_model(**TINY, dtype=DOUBLE), PROMPT.expand(50, -1)
    sampling = Sampling(**{"temperature": 1.0, "generator": seeded(0)[0]} | LAWS[law])
    ends = [3] if sampling.min_new_tokens else []
    got = generate(target, prompts, ModelProposer(target), gamma=3, max_new_tokens=9,
                   sampling=sampling, eos_token_id=ends, verify=rule)  # fmt: skip
    assert summarize(got.rounds).acceptance == 1


def test_a_certain_proposer_reports_no_law(tiny_model):
    proposer = LookupProposer()
    generate(tiny_model(), PROMPT[None], proposer, max_new_tokens=2)
    assert proposer.propose(2).probabilities is None


# A draft with another tokenizer.


def small_tokenizer(tokens, merges=()):
    """Byte-pair encoding of letters."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = tokenizers.models.BPE(vocabulary, [tuple(pair.split()) for pair in merges])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


OWN_TOKENIZER = small_tokenizer(["bc", "b", "d", "a", "c", "cd"], ["b c", "c d"])
TARGET_TOKENIZER = small_tokenizer(["a", "b", "c", "d", "ab"], ["a b"])


def translating(tiny_model, seed=1, **changes):
    model = tiny_model(seed=seed, **TINY | {"vocab_size": 6} | changes)
    return TranslatingProposer(model, OWN_TOKENIZER, TARGET_TOKENIZER)


def lab_prompts(count):
    tokenizer = lab.load_tokenizer("lab-target")
    questions = [d[:-1] for d in heldout("arithmetic", count, seed=4)[:count]]
    return tokenizer, [torch.tensor(encode(tokenizer, question)) for question in questions]


def test_a_teacher_with_another_tokenizer_drafts_for_the_lab_target():
    tokenizer, prompts = lab_prompts(3)
    target, own = lab.load("lab-target"), lab.load_tokenizer("lab-teacher")
    proposer = TranslatingProposer(lab.load("lab-teacher"), own, tokenizer)
    options = {"max_new_tokens": 40, "tokenizer": tokenizer}
    want = new_tokens(target, prompts, **options)
    for gamma in (1, 5, cycle(2, 0, 0, 6)):
        got = generate(target, prompts, proposer, gamma=gamma, **options)
        assert [row.tolist() for row in got.tokens] == want
        assert summarize(got.rounds).acceptance > 0.9


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_with_equal_tokenizers_nothing_is_translated(temperature):
    tokenizer, prompts = lab_prompts(3)
    target, draft = lab.load("lab-target"), lab.load("lab-draft")
    options = {"max_new_tokens": 40, "tokenizer": tokenizer, "gamma": 5}
    one, other = (
        generate(
            target, prompts, p, sampling=Sampling(temperature, generator=seeded(1)[0]), **options
        )
        for p in (ModelProposer(draft), TranslatingProposer(draft, tokenizer, tokenizer))
    )
    assert [r.drafted for r in one.rounds] == [r.drafted for r in other.rounds]
    assert [r.accepted for r in one.rounds] == [r.accepted for r in other.rounds]
    assert all(map(torch.equal, one.tokens, other.tokens))


class CheckedTranslation(TranslatingProposer):
    """Compares each reading with that of the whole text, encoded anew, and counts what is read."""

    read = restarts = 0

    def start(self, *args):
        super().start(*args)
        self.restarts += 1
        self.unfinished = range(len(self.texts))

    def accept(self, accepted, target_cache):
        super().accept(accepted, target_cache)
        self.unfinished = [row for row, n in enumerate(accepted) if n != FINISHED]

    def _read_text(self):
        self.read += sum(self.unread)
        logits = super()._read_text()
        for row in self.unfinished:
            text = self.target_texts[row]
            string = self.target_tokenizer.decode(text)
            own = self.tokenizer(string, add_special_tokens=False).input_ids
            assert own == self.texts[row][-len(own) :]
            anew = self.runner.model(torch.tensor([self.texts[row]])).logits[0, -1]
            torch.testing.assert_close(logits[row, 0], anew, rtol=0, atol=1e-8)
        return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("lookback", [2, 8, 100])
def test_the_draft_has_read_the_text_in_its_own_tokens(tiny_model, temperature, lookback):
    target = tiny_model(**TINY, dtype=DOUBLE)
    model = tiny_model(seed=1, **TINY | {"vocab_size": 6}, dtype=DOUBLE)
    proposer = CheckedTranslation(model, OWN_TOKENIZER, TARGET_TOKENIZER)
    proposer.lookback = lookback
    prompts = [PROMPT, PROMPT[:1], PROMPT[3:]]
    sampling = Sampling(temperature, generator=seeded(2)[0])
    got = generate(target, prompts, proposer, gamma=3, max_new_tokens=30, sampling=sampling,
                   eos_token_id=[])  # fmt: skip
    assert {len(row) for row in got.tokens} == {30}
    if temperature == 0:
        assert [row.tolist() for row in got.tokens] == [plain(target, ids, 30) for ids in prompts]
    assert proposer.restarts == 1
    assert 0 < sum(map(len, proposer.texts)) / 3 < proposer.read < 3 * 90  # never the whole again


def test_a_draft_with_far_more_tokens_gets_new_room(tiny_model):
    """The target writes words of eight letters, the draft knows letters alone."""
    word = "abcdefgh"
    merges = [f"{word[:i]} {word[i]}" for i in range(1, 8)]
    pieces = [*word, *(word[: i + 1] for i in range(1, 8))]
    letters, words = small_tokenizer([*word]), small_tokenizer(pieces, merges)
    target = tiny_model(vocab_size=len(pieces), dtype=DOUBLE)
    proposer = CheckedTranslation(tiny_model(seed=1, vocab_size=8, dtype=DOUBLE), letters, words)
    ids, only_words = torch.tensor([len(pieces) - 1] * 3), NotBelow(len(pieces) - 1)
    sampling = Sampling(1.0, logits_processor=[only_words], generator=seeded(0)[0])
    got = generate(target, ids[None], proposer, gamma=2, max_new_tokens=25, sampling=sampling,
                   eos_token_id=[])  # fmt: skip
    assert got.tokens[0].tolist() == [len(pieces) - 1] * 25
    assert proposer.restarts > 1


class NotBelow(LogitsProcessor):
    """Forbids all tokens below one."""

    def __init__(self, first):
        self.first = first

    def __call__(self, input_ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[-1]) < self.first, -float("inf"))


def test_tokenizers_without_a_common_token_are_refused(tiny_model):
    model = tiny_model(vocab_size=6)
    with pytest.raises(ValueError, match="has 2 tokens, the target's 5, and none is in both"):
        TranslatingProposer(model, small_tokenizer(["x", "y"]), TARGET_TOKENIZER)
    with pytest.raises(ValueError, match="leave compiled_room out"):
        TranslatingProposer(Runner(model, 64), OWN_TOKENIZER, TARGET_TOKENIZER)


# Verification alone.


@st.composite
def dyadic(draw_from, size):
    """Probabilities that are multiples of 1/64, so that products and sums in floating point are exact."""
    cuts = sorted(draw_from(st.lists(st.integers(0, 64), min_size=size - 1, max_size=size - 1)))
    return [Fraction(b - a, 64) for a, b in itertools.pairwise([0, *cuts, 64])]


def running(weights, u):
    total, have = sum(weights), 0
    for i, weight in enumerate(weights):
        have += weight
        if have > u * total:
            return i
    raise AssertionError


def algorithm_1(p, guesses, q, u):
    """Leviathan et al. (2023), Algorithm 1, in a loop over fractions; -1 stands for no guess."""
    for i, x in enumerate(guesses):
        if x < 0:
            return i, running(p[i], u[-1])
        if not u[i] < p[i][x] / q[i][x]:
            rest = [max(0, a - b) for a, b in zip(p[i], q[i], strict=True)]
            return i, running(rest, u[-1])
    return len(guesses), running(p[len(guesses)], u[-1])


def carries(p, guesses, q):
    """The carry c_i before any guess and after each of them."""
    carry = [Fraction(1)]
    for i, x in enumerate(guesses):
        carry.append(min(Fraction(1), carry[-1] * p[i][x] / q[i][x]) if x >= 0 else Fraction(0))
    return carry


def block_rest(p, q, carry, i):
    q_next = q[i] if i < len(q) else [0] * len(p[i])
    return [max(0, carry * a - b) for a, b in zip(p[i], q_next, strict=True)]


def block_thresholds(p, guesses, q):
    """h_1 to h_gamma of Sun et al. (2024), equation 4, with fractions; at no guess q is 0."""
    thresholds = []
    q = [row if x >= 0 else [0] * len(row) for x, row in zip(guesses, q, strict=True)]
    for i, carry in enumerate(carries(p, guesses, q)):
        surplus = sum(block_rest(p, q, carry, i))
        thresholds.append(surplus / (surplus + 1 - carry) if surplus + 1 - carry else Fraction(1))
    return thresholds[1:]


def algorithm_2(p, guesses, q, u):
    """Sun et al. (2024), Algorithm 2, in a loop over fractions; -1 stands for no guess."""
    accepted = 0
    for i, threshold in enumerate(block_thresholds(p, guesses, q)):
        if u[i] < threshold:
            accepted = i + 1
    q = [row if x >= 0 else [0] * len(row) for x, row in zip(guesses, q, strict=True)]
    rest = block_rest(p, q, carries(p, guesses, q)[accepted], accepted)
    return accepted, running(rest if sum(rest) else p[accepted], u[-1])


uniforms = st.integers(0, 1023).map(lambda n: Fraction(n, 1024))
odd_uniforms = uniforms.map(lambda u: u + Fraction(1, 3072))  # never where a rule decides


@pytest.mark.parametrize(
    ("rule", "by_hand", "numbers"),
    [(verify, algorithm_1, uniforms), (verify_block, algorithm_2, odd_uniforms)],
)
@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(2, 5), st.integers(0, 4), st.integers(1, 3), st.integers(0, 2))
def test_verify_is_the_algorithm(rule, by_hand, numbers, data, size, gamma, rows, spare):
    p = [[data.draw(dyadic(size)) for _ in range(gamma + 1)] for _ in range(rows)]
    q = [
        [data.draw(st.sampled_from([data.draw(dyadic(size)), p[b][i]])) for i in range(gamma)]
        for b in range(rows)
    ]
    guesses = [
        [data.draw(st.sampled_from([-1, *(x for x in range(size) if q_i[x])])) for q_i in row]
        for row in q
    ]
    u = [[data.draw(numbers) for _ in range(gamma + spare + 1)] for _ in range(rows)]
    want = [by_hand(*row) for row in zip(p, guesses, q, u, strict=True)]

    def tensor(x):
        return torch.tensor(np.array(x, dtype=float).reshape(rows, -1, size))

    proposal = Proposal(torch.tensor(guesses, dtype=torch.long).reshape(rows, gamma), tensor(q))
    accepted, tokens = rule(tensor(p), proposal, torch.tensor(np.array(u, dtype=float)))
    assert list(zip(accepted.tolist(), tokens.tolist(), strict=True)) == want


def tree(seed, size, depth):
    """Random distributions after each text of up to `depth` tokens, as fractions."""
    rng, laws = np.random.default_rng(seed), {}
    for n in range(depth + 1):
        for text in itertools.product(range(size), repeat=n):
            weights = rng.integers(0, 9, size) + (np.arange(size) == rng.integers(size))
            laws[text] = [Fraction(int(w), int(weights.sum())) for w in weights]
    return laws


@pytest.mark.parametrize("seed", range(4))
def test_block_verification_is_exact_and_never_accepts_fewer(seed):
    """By enumeration of all drafts: the law of the first gamma + 1 tokens, and their number."""
    size = gamma = 3
    target, draft = tree(seed, size, gamma), tree(seed + 100, size, gamma)
    law, lengths = dict.fromkeys(itertools.product(range(size), repeat=gamma + 1), Fraction(0)), []

    def spread(text, weight):
        if len(text) > gamma:
            law[text] += weight
        for x, chance in enumerate(target[text] if len(text) <= gamma else ()):
            spread((*text, x), weight * chance)

    for guess in itertools.product(range(size), repeat=gamma):
        p = [target[guess[:i]] for i in range(gamma + 1)]
        q = [draft[guess[:i]] for i in range(gamma)]
        chance = np.prod([q[i][x] for i, x in enumerate(guess)])
        if not chance:
            continue
        ratios = [min(Fraction(1), p[i][x] / q[i][x]) for i, x in enumerate(guess)]
        by_token = sum(np.cumprod(ratios))
        left, by_block = chance, 0
        for i, h in reversed([*enumerate([Fraction(1), *block_thresholds(p, guess, q)])]):
            rest = block_rest(p, q, carries(p, guess, q)[i], i)
            rest = rest if sum(rest) else p[i]
            for x, w in enumerate(rest):
                spread((*guess[:i], x), left * h * w / sum(rest))
            by_block += i * left * h / chance
            left *= 1 - h
        lengths.append((chance * by_token, chance * by_block))
    for text, weight in law.items():
        assert weight == np.prod([target[text[:i]][x] for i, x in enumerate(text)])
    by_token, by_block = map(sum, zip(*lengths, strict=True))
    assert by_block > by_token  # with gamma 1 or one text alone they can be equal


@pytest.mark.parametrize("flaw", [None, "none", *FLAWS])
def test_wrong_block_verification_is_found(flaw):
    """Chi-square of the first gamma + 1 tokens: what was accepted, the next, then more of p."""
    rows, size, gamma = 40_000, 3, 3
    laws = [torch.zeros(gamma + 1, size**gamma, size, dtype=DOUBLE) for _ in range(2)]
    for table, seed in zip(laws, (6, 106), strict=True):
        for text, law in tree(seed, size, gamma).items():
            code = sum(x * size**i for i, x in enumerate(reversed(text)))
            table[len(text), code] = torch.tensor([float(x) for x in law], dtype=DOUBLE)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(rows, 3 * gamma + 2, dtype=DOUBLE, generator=generator)

    def extend(table, text, n, start):
        """Texts of n tokens, those from `start` (B,) on sampled anew, and the laws of each."""
        code, used = torch.zeros(rows, dtype=torch.long), []
        for i in range(n):
            used.append(table[i, code])
            new = sample_categorical(used[-1], uniform[:, gamma + 1 + i + (n - gamma) * gamma])
            text[:, i] = torch.where(i < start, text[:, i], new)
            code = code * size + text[:, i]
        return torch.stack(used, 1)

    target, draft = laws
    text = torch.zeros(rows, gamma + 1, dtype=torch.long)
    q = extend(draft, text, gamma, torch.zeros(rows))
    p = extend(target, text.clone(), gamma + 1, torch.full((rows,), gamma))
    rule = functools.partial(broken_block, flaw=flaw) if flaw else verify_block
    accepted, following = rule(p, Proposal(text[:, :gamma].clone(), q), uniform[:, : gamma + 1])
    text.scatter_(1, accepted[:, None], following[:, None])
    extend(target, text, gamma + 1, accepted + 1)
    codes = text @ size ** torch.arange(gamma, -1, -1)
    exact = torch.ones(1, dtype=DOUBLE)
    for table in target:
        exact = (exact[:, None] * table[: len(exact)]).flatten()
    found = chi_square(codes.bincount(minlength=len(exact)), exact)
    assert found < 1e-6 if flaw in FLAWS else found > 0.01


def test_block_verification_of_one_guess_is_that_of_a_token():
    generator = torch.Generator().manual_seed(0)
    p, q, uniform = (
        torch.rand(500, n, m, generator=generator) for n, m in ((2, 5), (1, 5), (2, 1))
    )
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    proposal = Proposal(
        sample_categorical(q[:, 0], torch.rand(500, generator=generator))[:, None], q
    )
    for one, other in zip(*(f(p, proposal, uniform[..., 0]) for f in (verify, verify_block))):
        assert torch.equal(one, other)


def test_greedy_text_does_not_depend_on_the_rule(tiny_model):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(4, 9)
    by_rule = [generate(target, prompts, ModelProposer(noisy(target)), max_new_tokens=12, verify=rule)
               for rule in (verify, verify_block)]  # fmt: skip
    assert [r.accepted for r in by_rule[0].rounds] == [r.accepted for r in by_rule[1].rounds]
    assert by_rule[1].tokens[0].tolist() == plain(target, prompts[0], 12)


@both_rules
@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(2, 5), st.integers(1, 4))
def test_a_certain_guess_is_a_distribution_of_one(rule, data, size, gamma):
    p = torch.tensor(
        [[[float(w) for w in data.draw(dyadic(size))] for _ in range(gamma + 1)]], dtype=DOUBLE
    )
    tokens = torch.tensor([[data.draw(st.integers(-1, size - 1)) for _ in range(gamma)]])
    u = torch.tensor([[float(data.draw(uniforms)) for _ in range(gamma + 1)]], dtype=DOUBLE)
    certain = torch.nn.functional.one_hot(tokens.clamp(min=0), size).to(DOUBLE)
    assert rule(p, Proposal(tokens), u) == rule(p, Proposal(tokens, certain), u)
    _, chosen = rule(p, Proposal(tokens), u)
    assert p[0, rule(p, Proposal(tokens), u)[0].item(), chosen.item()] > 0


@both_rules
def test_equal_distributions_accept_all_and_a_zero_residual_is_p(rule):
    p = torch.tensor([[[0.1, 0.2, 0.7], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])
    for u in torch.rand(200, 3, generator=torch.Generator().manual_seed(0)):
        accepted, token = rule(p, Proposal(torch.tensor([[2, 1]]), p[:, :2]), u[None])
        assert (accepted.item(), token.item()) == (2, 2)
    scaled = p[:, :1] * (1 + 1e-6)  # rejected by rounding alone, and nothing is left over
    accepted, token = verify(
        p[:, :2], Proposal(torch.tensor([[2]]), scaled), torch.tensor([[1 - 2**-24, 0.0]])
    )
    assert (accepted.item(), token.item()) == (0, 0)


@both_rules
def test_an_impossible_guess_is_refused(rule):
    p = torch.tensor([[[0.0, 0.4, 0.6], [1.0, 0.0, 0.0]]])
    for q in (None, torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 1.0, 0.0]]])):
        accepted, token = rule(p, Proposal(torch.tensor([[0]]), q), torch.zeros(1, 2))
        assert accepted.item() == 0
        assert token.item() in (1, 2)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.lists(st.integers(0, 3), min_size=6, max_size=6).filter(any), min_size=1, max_size=4
    ),
    st.data(),
)
def test_draw_follows_the_running_sum_and_never_takes_a_weight_of_zero(weights, data):
    u = [data.draw(uniforms) for _ in weights]
    for dtype in (torch.float32, DOUBLE):
        got = sample_categorical(
            torch.tensor(weights, dtype=dtype), torch.tensor([float(x) for x in u], dtype=dtype)
        ).tolist()
        assert got == [running(w, x) for w, x in zip(weights, u, strict=True)]


def test_draw_at_the_edges():
    almost = torch.tensor([1 - 2**-24, 0.0, 1 - 2**-24])
    weights = torch.tensor(
        [[0.0, 0.2, 0.0, 0.8, 0.0, 0.0], [0.0, 0.2, 0.0, 0.8, 0.0, 0.0], [1e-30, 0, 0, 0, 0, 0]]
    )
    assert sample_categorical(weights, almost).tolist() == [3, 1, 0]
    wide = torch.rand(1, 50_000, generator=torch.Generator().manual_seed(0))
    wide[0, -1000:] = 0
    assert sample_categorical(wide, torch.tensor([1 - 2**-24])).item() < 49_000


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(0, 5), st.integers(1, 4))
def test_verify_greedy_counts_the_guesses_before_the_first_wrong_one(data, gamma, rows):
    guess = st.lists(st.integers(-1, 1), min_size=gamma, max_size=gamma)
    choice = st.lists(st.integers(0, 1), min_size=gamma + 1, max_size=gamma + 1)
    guesses, choices = ([data.draw(kind) for _ in range(rows)] for kind in (guess, choice))
    tokens = torch.tensor(guesses, dtype=torch.long).reshape(rows, gamma)
    accepted, following = verify_greedy(torch.tensor(choices), Proposal(tokens))
    for row, (mine, right) in enumerate(zip(guesses, choices, strict=True)):
        n = next((i for i in range(gamma) if mine[i] != right[i]), gamma)
        assert (accepted[row].item(), following[row].item()) == (n, right[n])


# Statistics.


ROUNDS = [
    Round([[], []], [0, 0], [[3], [4]], 0.0, 0.5, 0.6, is_prefill=True),
    Round([[], []], [0, 0], [[], []], 0.25, 0.0, 0.3, is_prefill=True),
    Round([[1, 2, 3], [1, -1, -1]], [3, 1], [[1, 2, 3, 9], [1, 7]], 0.1, 0.2, 0.4),
    Round(
        [[5, 6, 7], [5, 6, 7]], [2, 0], [[5, 6], [8]], 0.1, 0.3, 0.5
    ),  # the end cuts row 0 inside what was accepted
    Round(
        [[0, 0, 0], [-1, -1, -1]], [0, 0], [[], [2]], 0.1, 0.1, 0.3
    ),  # row 0 has ended, row 1 has no guess
]


def test_summary_by_hand():
    summary = summarize(ROUNDS)
    assert summary.tokens == 10
    assert summary.target_calls == 3
    assert summary.draft_calls == 9
    assert summary.tokens_per_call == 10 / 5
    assert summary.conditional == [3 / 4, 2 / 2, 1 / 1]
    assert summary.unconditional == [3 / 4, 2 / 3, 1 / 3]
    assert summary.acceptance == 6 / 7
    assert summary.prefill_seconds == pytest.approx(0.9)
    assert summary.ttft == pytest.approx(0.6)
    assert (summary.seconds, summary.draft_seconds, summary.target_seconds) == pytest.approx(
        (1.2, 0.3, 0.6)
    )
    assert summary.tokens_per_second == pytest.approx(10 / 1.2)


def test_summary_of_several_texts_and_of_none():
    twice = summarize([*ROUNDS, *ROUNDS])
    once = summarize(ROUNDS)
    assert (twice.tokens, twice.target_calls, twice.draft_calls) == (20, 6, 18)
    assert (twice.conditional, twice.unconditional) == (once.conditional, once.unconditional)
    assert twice.ttft == pytest.approx(once.ttft)
    empty = summarize(ROUNDS[:1])
    assert empty.tokens == empty.target_calls == empty.draft_calls == 0
    assert empty.conditional == empty.unconditional == []
    assert np.isnan([empty.acceptance, empty.tokens_per_call, empty.tokens_per_second]).all()


@pytest.mark.parametrize("gamma", [1, 2, 5])
def test_summary_of_what_was_decoded(tiny_model, gamma):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(4, 9, 2)
    draft, calls = noisy(target), []
    hook = draft.register_forward_hook(lambda *_: calls.append(1))
    got = generate(target, prompts, ModelProposer(draft), gamma=gamma, max_new_tokens=30)
    hook.remove()
    summary, steps = summarize(got.rounds), verifications(got.rounds)
    assert summary.tokens == 3 * 29
    assert summary.target_calls == len(steps)
    assert summary.draft_calls == len(calls) - len(prompts) <= gamma * len(steps)
    assert summary.tokens_per_call == 3 * 29 / sum(
        bool(tokens) for r in steps for tokens in r.tokens
    )
    texts = [ids.tolist() + row.tolist() for ids, row in zip(prompts, got.tokens, strict=True)]
    at, reached, passed = [len(ids) + 1 for ids in prompts], [0] * gamma, [0] * gamma
    for r, row in itertools.product(steps, range(3)):
        for k, guess in enumerate(r.drafted[row][: len(texts[row]) - at[row]]):
            reached[k] += 1
            passed[k] += guess == texts[row][at[row] + k]
            if guess != texts[row][at[row] + k]:
                break
        at[row] += len(r.tokens[row])
    assert summary.conditional == [a / b for a, b in zip(passed, reached, strict=True)]
    assert summary.acceptance == sum(passed) / sum(reached)


def test_seconds_of_a_round_hold_those_of_its_parts(tiny_model):
    target = tiny_model()
    for r in decode(target, random_prompts(4), ModelProposer(noisy(target)), max_new_tokens=12):
        assert 0 <= r.draft_seconds + r.target_seconds <= r.seconds


def test_plain_rounds_have_one_token_and_no_draft(tiny_model):
    rounds = generate(tiny_model(), random_prompts(4, 2), max_new_tokens=6).rounds
    assert [r.is_prefill for r in rounds] == [True] + [False] * 5
    assert all(
        r.drafted == [[], []] and r.accepted == [0, 0] and list(map(len, r.tokens)) == [1, 1]
        for r in rounds
    )
    summary = summarize(rounds)
    assert (summary.tokens_per_call, summary.target_calls, summary.draft_calls) == (1, 5, 0)


def test_cost_model_of_the_paper():
    assert cost_model(0.8, c=0.1, gamma=6) == pytest.approx((3.951424, 2.46964), abs=1e-5)
    assert best_gamma(0.8, c=0.1) == 6
    assert cost_model(1.0, c=0.1, gamma=4) == pytest.approx((5, 5 / 1.4))
    assert cost_model(0.0, c=0.1, gamma=4) == pytest.approx((1, 1 / 1.4))
    assert best_gamma(1.0, c=0.1, maximum=9) == 9
    assert best_gamma(1.0, c=1.0) == best_gamma(0.0, c=0.01) == 0
    for a in (0.1, 0.5, 0.9):
        for gamma in (1, 3, 8):
            assert cost_model(a, 0.2, gamma).tokens_per_call == pytest.approx(
                (1 - a ** (gamma + 1)) / (1 - a)
            )


def test_cost_model_by_position_and_with_a_measured_v():
    tokens = 1 + 0.9 + 0.9 * 0.5 + 0.9 * 0.5 * 0.2
    assert cost_model([0.9, 0.5, 0.2, 0.7], 0.1, 3, v=2.0) == pytest.approx((tokens, tokens / 2.3))
    assert cost_model(
        np.array([0.9, 0.5, 0.2]), 0.1, 3, v=lambda g: 1 + g / 10
    ).speedup == pytest.approx(tokens / 1.6)
    assert cost_model(0.8, 0.1, 0) == (1.0, 1.0)
    assert best_gamma([0.9, 0.9, 0.0, 1.0], c=0.1) == 2
    assert best_gamma(0.8, 0.1, v=lambda g: 1.0 if g < 4 else 5.0) == 3
    with pytest.raises(ValueError, match=r"expected 3 \(gamma\) fractions"):
        cost_model([0.5, 0.5], 0.1, 3)


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1), st.floats(0.01, 1), st.floats(1, 2))
def test_best_gamma_is_the_best(a, c, v):
    speedups = [1.0] + [cost_model(a, c, gamma, v).speedup for gamma in range(1, 13)]
    best = best_gamma(a, c, v, maximum=12)
    assert speedups[best] == max(speedups)


def test_measured_costs():
    plainly = summarize([Round([[]], [0], [[1]], 0.0, 0.5, 0.5)] * 4)
    assert costs(summarize(ROUNDS), plainly) == pytest.approx((0.3 / 9 / 0.5, 0.6 / 3 / 0.5))


def full(gamma):
    return Round([[1] * gamma], [gamma], [[1] * (gamma + 1)], 0.0, 0.0, 0.0)


def failed(gamma):
    return Round([[1] * gamma], [0], [[2]], 0.0, 0.0, 0.0)


PLAIN = Round([[]], [0], [[1]], 0.0, 0.0, 0.0)
START = Round([[]], [0], [[1]], 0.0, 0.0, 0.0, is_prefill=True)


def test_adaptive_gamma_follows_the_acceptance():
    gamma = AdaptiveGamma(c=0.1)
    first = gamma(START)
    assert first == best_gamma(0.7, 0.1, maximum=8)
    up = [gamma(full(8)) for _ in range(12)]
    assert up == sorted(up)
    assert up[-1] == 8
    down = [gamma(failed(8)) for _ in range(30)]
    assert down == sorted(down, reverse=True)
    assert down[-1] == 0
    undrafted = [gamma(PLAIN) for _ in range(30)]
    assert undrafted == sorted(undrafted)
    assert undrafted[-1] == first  # another try
    gamma(full(8))
    assert gamma(START) == first
    assert AdaptiveGamma(c=0.0, maximum=5)(START) == 5


def test_adaptive_gamma_does_not_depend_on_how_many_rows_agree():
    one, many = AdaptiveGamma(c=0.1), AdaptiveGamma(c=0.1)
    for r in (START, full(4), failed(4), full(2), full(5)):
        rows = Round(
            r.drafted * 3, r.accepted * 3, [*(r.tokens * 2), []], 0.0, 0.0, 0.0, r.is_prefill
        )
        assert one(r) == many(rows)


def test_adaptive_gamma_changes_no_text(tiny_model):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(4, 9)
    want = [plain(target, ids, 30) for ids in prompts]
    adaptive = AdaptiveGamma(c=0.1)
    for proposer in (
        ModelProposer(noisy(target)),
        ModelProposer(target),
        LookupProposer(),
        EarlyExitProposer(target, 1),
    ):
        got = generate(target, prompts, proposer, gamma=adaptive, max_new_tokens=30)
        assert [row.tolist() for row in got.tokens] == want
        assert len({len(r.drafted[0]) for r in verifications(got.rounds)}) > 1


def test_adaptive_gamma_bears_rounds_without_a_guess():
    gamma = AdaptiveGamma(c=0.1)
    assert gamma(START) >= 1
    assert {gamma(PLAIN) for _ in range(1200)} <= set(range(1, 9))
    assert [gamma(full(4)) for _ in range(8)][-1] == 8


def cycle(*numbers):
    """A gamma that takes its numbers one after the other, whatever happens."""
    endless = itertools.cycle(numbers)
    return lambda last: next(endless)


def test_a_gamma_is_bounded_by_the_room_that_is_reserved(tiny_model):
    target, (ids,) = tiny_model(dtype=DOUBLE), random_prompts(4)
    for maximum in (16, 3):
        greedy_gamma = lambda last: 99
        if maximum == 3:
            greedy_gamma = AdaptiveGamma(c=0.0, maximum=3)
        rounds = generate(
            target, ids[None], ModelProposer(target), gamma=greedy_gamma, max_new_tokens=40
        ).rounds
        drafted = [len(r.drafted[0]) for r in verifications(rounds)]
        left = 39 - (maximum + 1) * (len(drafted) - 1)  # in the last round
        assert drafted == [maximum] * (len(drafted) - 1) + [min(maximum, left - 1)]


@pytest.mark.parametrize("numbers", [(2, 0), (0, 0, 0, 3, 1), (1, 4, 2), (0,)], ids=str)
def test_a_gamma_that_changes_and_may_be_zero(tiny_model, numbers):
    target, prompts = tiny_model(dtype=DOUBLE), random_prompts(4, 1, 9)
    want, model = [plain(target, ids, 20) for ids in prompts], noisy(target)
    ends = [want[0][2], want[1][9]]
    for proposer in (
        ModelProposer(model),
        LookupProposer(),
        EarlyExitProposer(target, 1),
        ModelProposer(target),
    ):
        got = generate(target, prompts, proposer, gamma=cycle(*numbers), max_new_tokens=20)
        assert [row.tolist() for row in got.tokens] == want
        short = new_tokens(
            target, prompts, proposer, gamma=cycle(*numbers), max_new_tokens=20, eos_token_id=ends
        )
        assert short == [cut(text, ends) for text in want]
    assert not any(numbers) or summarize(got.rounds).acceptance == 1


# The stream of rounds.


class NotYet(ModelProposer):
    started = False

    def start(self, *args):
        self.started = True
        super().start(*args)


def test_the_first_token_comes_before_the_proposer_starts(tiny_model):
    target, (ids,) = tiny_model(), random_prompts(6)
    proposer = NotYet(noisy(target))
    rounds = decode(target, ids[None], proposer, max_new_tokens=6)
    assert not proposer.started
    first = next(rounds)
    assert (first.tokens, first.is_prefill, proposer.started) == (
        [plain(target, ids, 1)],
        True,
        False,
    )
    second = next(rounds)
    assert (second.tokens, second.is_prefill, proposer.started) == ([[]], True, True)
    assert [token for r in (first, second, *rounds) for token in r.tokens[0]] == plain(
        target, ids, 6
    )


def test_rounds_are_json(tiny_model):
    target = tiny_model()
    for proposer in (
        None,
        ModelProposer(noisy(target)),
        LookupProposer(),
        EarlyExitProposer(target, 1),
    ):
        for sampling in (Sampling(), Sampling(1.0, generator=seeded(0)[0])):
            for r in decode(
                target, random_prompts(6, 2), proposer, max_new_tokens=6, sampling=sampling
            ):
                assert Round(**json.loads(json.dumps(dataclasses.asdict(r)))) == r


def test_a_stream_that_is_left_and_taken_up_again(tiny_model):
    target, (ids,) = tiny_model(dtype=DOUBLE), random_prompts(6)
    proposer = ModelProposer(noisy(target))
    rounds = decode(target, ids[None], proposer, max_new_tokens=20)
    for _ in range(4):
        next(rounds)
    rounds.close()
    assert new_tokens(target, ids[None], proposer, max_new_tokens=20) == [plain(target, ids, 20)]
    assert not torch.is_inference_mode_enabled()


# What must not change.


def test_prefixes_models_and_libraries_stay_as_they_were(tiny_model):
    target, (known, ids) = tiny_model(dtype=DOUBLE), random_prompts(8, 5)
    draft, prefix = noisy(target), read(target, known)
    own = read(draft, known)

    def state():
        caches = [
            x for p in (prefix, own) for layer in p.cache.layers for x in (layer.keys, layer.values)
        ]
        tensors = [*caches, *target.state_dict().values(), *draft.state_dict().values()]
        return [(x.data_ptr(), x._version, x.double().sum().item()) for x in tensors]

    def setting():
        places = (transformers.Cache, transformers.DynamicCache, kv.DynamicLayer, type(target), type(target.model),
                  torch.nn.functional, torch.Tensor, transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)  # fmt: skip
        models = [
            (m.config.to_dict(), m.generation_config.to_dict(), m.training) for m in (target, draft)
        ]
        hooks = [
            len(x._forward_hooks) + len(x._forward_pre_hooks)
            for m in (target, draft)
            for x in m.modules()
        ]
        modules = [id(x) for m in (target, draft) for x in m.modules()]
        return models, hooks, modules, [list(map(id, vars(place).values())) for place in places]

    before, random_state, around = state(), torch.get_rng_state(), setting()
    fused = FusedProposer(draft, cross, own)
    for proposer in (
        ModelProposer(draft, own),
        LookupProposer(),
        EarlyExitProposer(target, 1),
        fused,
    ):
        for sampling in (Sampling(), Sampling(1.0, generator=seeded(3))):
            generate(
                target, ids[None], proposer, max_new_tokens=10, prefix=prefix, sampling=sampling
            )
    assert state() == before
    assert setting() == around
    assert torch.equal(torch.get_rng_state(), random_state)
    assert prefix.next_position == own.next_position == kv.length(prefix.cache) == 8
    assert prefix.input_ids == known.tolist()


def test_ids_given_stay_as_they_were(tiny_model):
    target, known = tiny_model(), random_prompts(8)[0].tolist()
    prefix, prompts = read(target, known), random_prompts(3, 5)
    frozen = [ids.clone() for ids in prompts]
    generate(target, prompts, LookupProposer(), max_new_tokens=6, prefix=prefix)
    assert prefix.input_ids == known
    assert all(map(torch.equal, prompts, frozen))


# Refusals.


def flash(model):
    model = copy.deepcopy(model)
    model.config._attn_implementation = "flash_attention_2"
    return model


def test_arguments_that_do_not_fit_are_refused(tiny_model):
    target, prompts = tiny_model(), random_prompts(4, 4, 4)
    prefix, empty = read(target, prompts[0]), torch.zeros(1, 0, dtype=torch.long)

    def begin(prefix):
        generate(target, prompts[:1], ModelProposer(target, prefix), max_new_tokens=3)

    for sentence, call in {
        "gamma is 0, .*expected positive": lambda: generate(target, prompts, gamma=0),
        "gamma is -2": lambda: generate(target, prompts, LookupProposer(), gamma=-2),
        "gamma is 0,": lambda: generate(target, prompts, gamma=AdaptiveGamma(0.1, maximum=0)),
        "max_new_tokens is 0": lambda: generate(target, prompts, max_new_tokens=0),
        r"shapes \[\(0,\)\]: give \(B, T\), or a list": lambda: generate(target, empty),
        r"shapes \[\(4,\), \(0,\)\]": lambda: generate(target, [prompts[0], empty[0]]),
        r"shapes \[\]": lambda: generate(target, []),
        r"shapes \[\(\), \(\), \(\), \(\)\]": lambda: generate(target, prompts[0]),
        r"shapes \[\(1, 4\)\]": lambda: generate(target, [prompts[0][None]]),
        "must begin the text": lambda: begin(replace(prefix, input_ids=[96, 1])),
        "leave one to read": lambda: begin(prefix),
        "2 prefixes for 3 rows: give one for all": lambda: generate(
            target, prompts, prefix=[prefix] * 2
        ),
        "2 prefixes for 1 rows": lambda: begin([prefix] * 2),
        "'flash_attention_2', expected 'sdpa' or 'eager'": lambda: generate(flash(target), prompts),
        "is 'flash_attention_2'": lambda: ModelProposer(flash(target)),
        "layers is 0": lambda: EarlyExitProposer(target, 0),
        "temperature=-1.*expected temperature 0": lambda: Sampling(-1),
        "temperature=nan": lambda: Sampling(float("nan")),
        "expected .*repetition_penalty > 0": lambda: Sampling(repetition_penalty=0.0),
        "top_k=-1": lambda: Sampling(1.0, top_k=-1),
        "min_p=2": lambda: Sampling(1.0, min_p=2),
        "min_new_tokens=-1": lambda: Sampling(min_new_tokens=-1),
        "top_p=1.5": lambda: Sampling(1.0, top_p=1.5),
        "acceptance is 98, expected 4": lambda: cost_model(98, 0.1, 4),
        "expected -2": lambda: cost_model(0.5, 0.1, -2),
    }.items():
        with pytest.raises(ValueError, match=sentence):
            call()
    with pytest.raises(CacheError, match=r"(?s)layers=3.*layers=2"):
        generate(tiny_model(num_hidden_layers=2), prompts, prefix=prefix)
    with pytest.raises(CacheError, match="full attention in every layer"):
        Runner(tiny_model("Mistral", sliding_window=16))


@pytest.mark.parametrize("size", [90, 120])
def test_a_draft_with_another_vocabulary_is_refused_or_harmless(tiny_model, size):
    target, (ids,) = tiny_model(dtype=DOUBLE), random_prompts(4)
    draft = ModelProposer(tiny_model(vocab_size=size, dtype=DOUBLE))
    for temperature in (0.0, 1e-6):  # both give the likeliest
        try:
            got = new_tokens(
                target, ids[None], draft, max_new_tokens=30, sampling=Sampling(temperature)
            )
        except ValueError as error:
            assert "vocabulary" in str(error)
        else:
            assert got == [plain(target, ids, 30)]


def test_a_draft_in_the_targets_own_memory_is_refused_or_harmless(tiny_model, monkeypatch):
    monkeypatch.setattr(speculate, "_compiled_step", lambda device: speculate.step)
    (ids,) = random_prompts(6)
    for room in (None, 64):
        runner = Runner(tiny_model(dtype=DOUBLE), room)
        try:
            got = new_tokens(runner, ids[None], ModelProposer(runner), max_new_tokens=9)
        except ValueError as error:
            assert "Runner" in str(error)
        else:
            assert got == [plain(runner.model, ids, 9)]


def test_slots_of_the_target_are_what_a_proposer_is_shown(tiny_model):
    target, prompts, seen = tiny_model(dtype=DOUBLE), random_prompts(4, 7), []

    class Watching(LookupProposer):
        def start(self, texts, target_cache, sampling, room):
            super().start(texts, target_cache, sampling, room)
            seen.append(
                (list(map(len, texts)), list(target_cache.lengths), isinstance(target_cache, Slots))
            )

        def accept(self, accepted, target_cache):
            super().accept(accepted, target_cache)
            rows = [row for row, n in enumerate(accepted) if n != FINISHED]
            texts = [len(self.texts[row]) for row in rows]
            seen.append((texts, [target_cache.lengths[row] for row in rows], True))

    generate(target, prompts, Watching(), gamma=3, max_new_tokens=20)
    assert all(slots for *_, slots in seen)
    assert all(
        have == [n - 1 for n in texts] for texts, have, _ in seen
    )  # all but the last token was read


def test_two_streams_of_one_runner_are_refused(tiny_model):
    runner, prompts = Runner(tiny_model()), random_prompts(4, 5)
    first = decode(runner, prompts[:1], max_new_tokens=9)
    next(first), next(first)
    generate(runner, prompts[1:], max_new_tokens=2)
    with pytest.raises(ValueError, match="began another text"):
        list(first)


def test_what_prefill_and_load_return_is_a_prefix(tiny_model, tmp_path):
    target, (ids,) = tiny_model(dtype=DOUBLE), random_prompts(8)
    state, want = kv.prefill(target, ids[None, :5]), plain(target, ids, 6)
    kv.save(state, tmp_path / "saved", target)
    for prefix in (state, kv.load(tmp_path / "saved", target)):
        assert new_tokens(
            target, [ids[5:]], ModelProposer(target), prefix=prefix, max_new_tokens=6
        ) == [want]


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_ends_of_any_kind(tiny_model, kind):
    target, (ids,) = tiny_model(dtype=DOUBLE), random_prompts(8)
    text = plain(target, ids, 6)
    want = cut(text, [text[3]])
    assert new_tokens(target, [ids], eos_token_id=kind([text[3]]), max_new_tokens=6) == [want]
    assert new_tokens(target, [ids], eos_token_id=np.int64(text[3]), max_new_tokens=6) == [want]
