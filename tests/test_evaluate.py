"""Scores, against plain loops over tokens, transformers' own generation, and known cases."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2, kstest

from kvlab.cache import Prefix, length, prefill, repeat, select
from kvlab.evaluate import (
    chi_square,
    exact_match,
    exponential,
    f1,
    figure,
    log_likelihoods,
    mean_interval,
    multiple_choice,
    rouge_l,
    squad_v2,
)
from kvlab.generation import answers, continuations, encode, rendered
from kvlab.lab.tokenizers import train_tokenizer

WORDS = (
    "Anna lives in Rome and Ben keeps a turtle at home while Carla plays the flute in Oslo".split()
)


def asked(text):
    return [{"role": "user", "content": text}]


CONVERSATIONS = [
    asked("Where does Anna live?"),
    [{"role": "system", "content": " ".join(WORDS)}, *asked("Which animal does Ben keep?")],
    asked("Why?"),
    [
        *asked("Who?"),
        {"role": "assistant", "content": "Carla"},
        *asked("What does she play in the evening?"),
    ],
    asked(" ".join(WORDS[::-1])),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(400, n_documents=50)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("Qwen3", dtype=torch.float64, vocab_size=400, pad_token_id=0, eos_token_id=1)


def ids(tokenizer, text):
    return torch.tensor(tokenizer(text).input_ids)


def prompt_of(tokenizer, conversation):
    return tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=True
    )["input_ids"]


@torch.no_grad()
def plain(model, prompt, ending):
    """log p(ending | prompt), a token at a time."""
    total, seen = 0.0, prompt.tolist()
    for token in ending.tolist():
        total += model(torch.tensor([seen])).logits[0, -1].float().log_softmax(-1)[token].item()
        seen.append(token)
    return total


# log-likelihoods


def test_log_likelihoods_are_the_plain_loop(model, tokenizer):
    prompts = [ids(tokenizer, " ".join(WORDS[:n])) for n in (3, 9, 1, 6)]
    endings = [
        ids(tokenizer, " " + " ".join(WORDS[n:m])) for n, m in ((3, 5), (9, 10), (1, 9), (6, 7))
    ]
    got = log_likelihoods(model, tokenizer, prompts, endings)
    want = [plain(model, *pair) for pair in zip(prompts, endings, strict=True)]
    assert len({len(p) + len(e) for p, e in zip(prompts, endings, strict=True)}) > 1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert got.dtype == np.float64


def test_other_rows_and_their_padding_do_no_harm(model, tokenizer):
    prompt, ending = ids(tokenizer, "Anna lives"), ids(tokenizer, " in Rome")
    alone = log_likelihoods(model, tokenizer, [prompt], [ending])
    longer = ids(tokenizer, " ".join(WORDS))
    together = log_likelihoods(model, tokenizer, [longer, prompt], [longer, ending])
    np.testing.assert_allclose(together[1:], alone, rtol=0, atol=1e-5)


def test_a_pad_token_inside_an_ending_counts(model, tokenizer):
    prompt, ending = ids(tokenizer, "Anna"), torch.tensor([7, tokenizer.pad_token_id])
    got = log_likelihoods(model, tokenizer, [prompt], [ending])
    np.testing.assert_allclose(got, [plain(model, prompt, ending)], atol=1e-4)


def test_endings_add_up(model, tokenizer):
    one, two, three = (ids(tokenizer, text) for text in ("Anna lives", " in Rome", " with a cat"))
    first, second, both = log_likelihoods(
        model, tokenizer, [one, torch.cat([one, two]), one], [two, three, torch.cat([two, three])]
    )
    assert both == pytest.approx(first + second, abs=1e-4)


def test_log_likelihoods_behind_a_cache_are_those_of_the_whole_text(model, tokenizer):
    context = ids(tokenizer, " ".join(WORDS))
    prompts = [ids(tokenizer, text) for text in ("Anna lives", "Why", "Carla plays the flute")]
    endings = [ids(tokenizer, text) for text in (" in Rome", " a turtle at home", " in Oslo")]
    read = prefill(model, context[None])
    got = log_likelihoods(
        model, tokenizer, prompts, endings, Prefix(read.cache, read.next_position)
    )
    want = log_likelihoods(model, tokenizer, [torch.cat([context, p]) for p in prompts], endings)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert length(read.cache) == len(context)  # as it was
    assert np.abs(got - log_likelihoods(model, tokenizer, prompts, endings)).min() > 0.01


def test_log_likelihoods_go_on_at_the_next_position_not_at_the_number_of_entries(model, tokenizer):
    context, prompt, ending = (
        ids(tokenizer, text) for text in (" ".join(WORDS), "Anna lives", " in Rome")
    )
    kept = torch.tensor([0, 1, 5, 7])
    small = Prefix(select(prefill(model, context[None]).cache, kept), len(context))
    text = torch.cat([prompt, ending])[None]
    places = len(context) + torch.arange(text.shape[1])[None]
    with torch.no_grad():
        logits = model(text, past_key_values=repeat(small.cache, 1), position_ids=places).logits[0]
    logs = logits.float().log_softmax(-1)
    want = sum(logs[i - 1, text[0, i]].item() for i in range(len(prompt), text.shape[1]))
    assert log_likelihoods(model, tokenizer, [prompt], [ending], small) == pytest.approx(
        [want], abs=1e-4
    )


def test_prompts_and_endings_must_pair(model, tokenizer):
    with pytest.raises(ValueError, match="zip"):
        log_likelihoods(model, tokenizer, [ids(tokenizer, "Anna")] * 2, [ids(tokenizer, "Ben")])


# multiple choice


def test_multiple_choice_is_the_likeliest_sum(model, tokenizer):
    options = [
        ["so", "Rome and Oslo", " ".join(WORDS)],
        ["a dog", "turtle"],
        ["so " * 30, "why"],
        ["a", "b " * 9],
        ["A", "B"],
    ]
    got = multiple_choice(model, tokenizer, CONVERSATIONS, options)
    means = []
    for pick, conversation, choices in zip(got, CONVERSATIONS, options, strict=True):
        prompt = torch.tensor(prompt_of(tokenizer, conversation))
        endings = [ids(tokenizer, f" {choice}<|end|>") for choice in choices]
        scores = [plain(model, prompt, ending) for ending in endings]
        assert pick == np.argmax(scores)
        means.append(
            np.argmax([score / len(ending) for score, ending in zip(scores, endings, strict=True)])
        )
    assert got.tolist() != means, (
        "the mean a token would have chosen the same: these options tell nothing"
    )


def test_an_empty_prompt_continues_the_prefix(model, tokenizer):
    ids = torch.tensor([5, 17, 2, 90, 33, 41])
    whole = log_likelihoods(model, tokenizer, [ids[:3]], [ids[3:]])
    prefix = prefill(model, ids[None, :3])
    empty, one = ids[:0], prefill(model, ids[None, :2])
    np.testing.assert_allclose(
        log_likelihoods(model, tokenizer, [empty], [ids[3:]], prefix), whole, rtol=1e-5
    )
    mixed = log_likelihoods(model, tokenizer, [empty, ids[3:5]], [ids[3:], ids[5:]], prefix)
    rest = log_likelihoods(model, tokenizer, [ids[:5]], [ids[5:]])
    np.testing.assert_allclose(mixed, [*whole, *rest], rtol=1e-5)
    np.testing.assert_allclose(
        log_likelihoods(model, tokenizer, [ids[2:3]], [ids[3:]], one), whole, rtol=1e-5
    )
    for unknown in (None, replace(prefix, logits=None)):
        with pytest.raises(ValueError, match="Nothing predicts the ending after empty prompt 1"):
            log_likelihoods(model, tokenizer, [ids[:2], empty], [ids[3:]] * 2, unknown)


def test_whole_answers_are_scored_where_a_template_opens_them_otherwise(model, tokenizer):
    """The generation prompt of some templates begins a thought, which past answers do not show."""
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = tokenizer.chat_template.replace(
        "<|assistant|>{% endif", "<|assistant|><think> Hm, well, let me see.{% endif"
    )
    assert thinking.chat_template != tokenizer.chat_template
    options = [["lo", "a much longer answer, with many words"]] * len(CONVERSATIONS)
    picks = []
    for conversation, texts in zip(CONVERSATIONS, options, strict=True):
        prompt = ids(thinking, rendered(thinking, conversation))
        endings = [ids(thinking, f" {text}<|end|>") for text in texts]
        picks.append(log_likelihoods(model, thinking, [prompt] * 2, endings).argmax())
    assert multiple_choice(model, thinking, CONVERSATIONS, options).tolist() == picks


def test_multiple_choice_finds_what_was_learned(tiny_model, tokenizer):
    model = copy.deepcopy(
        tiny_model("Qwen3", vocab_size=400, pad_token_id=0, eos_token_id=1)
    ).requires_grad_(True)
    learned = ["Rome", "turtle", "because", "flute", "Oslo"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(6):
        for conversation, answer in zip(CONVERSATIONS, learned, strict=True):
            whole = ids(tokenizer, tokenizer.apply_chat_template(
                [*conversation, {"role": "assistant", "content": answer}], tokenize=False))[None]  # fmt: skip
            labels = whole.clone()
            labels[:, : len(prompt_of(tokenizer, conversation))] = -100
            model(whole, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    options = [
        [*learned[i + 1 :], *learned[: i + 1]] for i in range(5)
    ]  # the learned one stands last
    assert multiple_choice(model.eval(), tokenizer, CONVERSATIONS, options).tolist() == [4] * 5
    assert (
        multiple_choice(model, tokenizer, CONVERSATIONS, [o[::-1] for o in options]).tolist()
        == [0] * 5
    )


# generated answers


@pytest.fixture(scope="module")
def generated(model, tokenizer):
    """Greedy continuations by transformers, one unpadded prompt at a time."""
    outputs = []
    for conversation in CONVERSATIONS:
        prompt = torch.tensor([prompt_of(tokenizer, conversation)])
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False
        )
        outputs.append(output[0, prompt.shape[1] :].tolist())
    return outputs


@pytest.fixture
def spelled(tokenizer):
    """The same tokenizer, which decodes to numbers: texts can hide a difference between tokens."""
    spelled = copy.deepcopy(tokenizer)
    spelled.decode = lambda ids, **_: numbers([ids])[0]
    return spelled


def numbers(outputs):
    """Ids as texts, without the padding that ends a row."""
    return [" ".join(map(str, output)).removesuffix(" 0" * padding(output)) for output in outputs]


def padding(output):
    return next((n for n, token in enumerate(reversed(output)) if token != 0), len(output))


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_answers_are_generates_token_for_token(model, spelled, generated, batch_size):
    assert len({len(prompt_of(spelled, c)) for c in CONVERSATIONS}) == len(CONVERSATIONS)
    assert len(set(numbers(generated))) == len(CONVERSATIONS)
    assert answers(model, spelled, CONVERSATIONS, 20, batch_size) == numbers(generated)


def test_answers_end_at_the_end_token(model, spelled, generated):
    end = generated[1][
        4
    ]  # plays the end token: one row stops there, others go on or stop elsewhere
    spelled.eos_token = spelled.convert_ids_to_tokens(end)
    want = [o[: o.index(end) + 1] if end in o else o for o in generated]
    assert len(set(map(len, want))) > 1
    for batch_size in (1, 5):
        assert answers(model, spelled, CONVERSATIONS, 20, batch_size) == numbers(want)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_continuations_are_ids_up_to_and_with_the_end_token(
    model, tokenizer, generated, batch_size
):
    prompts = [prompt_of(tokenizer, conversation) for conversation in CONVERSATIONS]
    end = generated[1][4]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    cut = [ids[: ids.index(end) + 1] if end in ids else ids for ids in generated]
    assert len({len(ids) for ids in cut}) > 1
    assert continuations(model, tokenizer, prompts, 20, batch_size) == cut


def test_a_conversation_is_encoded_as_its_template_says(tokenizer):
    question, answer = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ben"}
    assert tokenizer.decode(encode(tokenizer, [question])) == "<|user|> Who?<|assistant|>"
    assert (
        tokenizer.decode(encode(tokenizer, [question, answer]))
        == "<|user|> Who?<|assistant|> Ben<|end|>"
    )
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = (
        "{{ messages[0].content }}{% if enable_thinking is not false %} hmm{% endif %}"
    )
    assert thinking.decode(encode(thinking, [question])) == "Who?"
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert plain.decode(encode(plain, [question, answer])) == "Who?\nBen"


def test_answers_are_texts_without_special_tokens(model, tokenizer, generated):
    want = [tokenizer.decode(o, skip_special_tokens=True).strip() for o in generated]
    assert answers(model, tokenizer, CONVERSATIONS, 20) == want
    assert answers(model, tokenizer, CONVERSATIONS[:1], 3) == [
        tokenizer.decode(generated[0][:3]).strip()
    ]


def test_no_conversation_no_answer(model, tokenizer):
    assert answers(model, tokenizer, []) == []


def test_answers_do_not_follow_the_models_own_sampling(model, spelled, generated):
    sampling = copy.deepcopy(model)
    sampling.generation_config.update(do_sample=True, repetition_penalty=2.0, max_new_tokens=3)
    assert answers(sampling, spelled, CONVERSATIONS, 20) == numbers(generated)


# SQuAD


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "overlap"),
    [
        ("Denver Broncos", "Denver Broncos", 1, 1),
        ("the Denver Broncos!", "denver  broncos", 1, 1),
        ("Broncos", "Denver Broncos", 0, 2 / 3),
        ("a cat and a dog", "dog", 0, 2 / 4),
        ("red red box", "red box", 0, 2 * (2 / 3) / (2 / 3 + 1)),
        ("red", "blue", 0, 0),
        ("", "blue", 0, 0),
        ("", "", 1, 1),
        ("the", "an", 1, 1),
        ("it's", "its", 1, 1),
    ],
)
def test_squad_cases(prediction, reference, exact, overlap):
    assert exact_match([prediction], [reference]).tolist() == [exact]
    assert f1([prediction], [reference]) == pytest.approx([overlap])


def test_squad_v2_scores_unanswerable_questions_as_the_official_script():
    predictions = ["Denver Broncos", "red box", "", "Rome", "the", "."]
    references = [["the Broncos", "Denver Broncos"], ["red"], ["blue"], [], [], ["the", "."]]
    scores = squad_v2(predictions, references)
    expected = {"exact": 300 / 6, "f1": 100 * (1 + 2 / 3 + 2) / 6, "total": 6}
    expected |= {"HasAns_exact": 100 / 3, "HasAns_f1": 100 * (1 + 2 / 3) / 3, "HasAns_total": 3}
    expected |= {"NoAns_exact": 200 / 3, "NoAns_f1": 200 / 3, "NoAns_total": 3}
    assert scores == pytest.approx(expected, abs=1e-4)
    assert "NoAns_exact" not in squad_v2(["a cat"], [["cat"]])
    with pytest.raises(ValueError, match="zip"):
        squad_v2(["a"], [])


def test_squad_scores_are_one_a_pair():
    assert exact_match(["a", "b", "c"], ["b", "b", "c"]).tolist() == [0, 1, 1]
    assert f1(["a b", "c d"], ["b", "d e"]) == pytest.approx([1.0, 0.5])  # "a" is an article
    with pytest.raises(ValueError, match="zip"):
        exact_match(["a"], ["a", "b"])


def test_of_several_texts_the_best_counts_for_each_score_by_itself():
    texts = ["a red house", "red house by the sea", "Rome"]
    assert exact_match(["Red house!", "red", "Rome"], [texts, texts, "Oslo"]).tolist() == [1, 0, 0]
    alone = [f1(["red house sea"], [text])[0] for text in texts]
    assert f1(["red house sea"], [tuple(texts)]) == pytest.approx([max(alone)])
    assert max(alone) not in (alone[0], alone[-1])  # neither the first nor the last is meant
    for score in (exact_match, f1, rouge_l):
        with pytest.raises(ValueError, match=r"no reference for 'red': give one or several"):
            score(["red"], [[]])


@pytest.mark.parametrize(
    ("prediction", "reference", "common"),
    [
        (
            "the gunman was shot by police",
            "police killed the gunman",
            2,
        ),  # the gunman; words in another order do not add
        ("a b c", "A, b: c!", 3),
        ("a x b y c", "a b c", 3),  # gaps do no harm
        ("x y", "a b c", 0),
        ("a a a", "a", 1),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(prediction, reference, common):
    precision, recall = common / len(prediction.split()), common / len(reference.split())
    want = 2 * precision * recall / (precision + recall) if common else 0
    assert rouge_l([prediction], [reference]) == pytest.approx([want], abs=1e-6)
    assert rouge_l([prediction], [["zz", reference]]) == pytest.approx([want], abs=1e-6)
    with pytest.raises(ValueError, match="zip"):
        rouge_l([prediction], [])


def test_a_uniform_model_gives_each_token_one_over_its_vocabulary(model, tokenizer):
    uniform = copy.deepcopy(model)
    uniform.lm_head.weight.zero_()
    texts = [ids(tokenizer, " ".join(WORDS[:n])) for n in (4, 12)]
    logs = log_likelihoods(uniform, tokenizer, [t[:1] for t in texts], [t[1:] for t in texts])
    assert np.exp(-logs / [len(t) - 1 for t in texts]) == pytest.approx([400, 400], rel=1e-5)


# intervals


def coverage(draw, mean, n, times=2000, **options):
    """How many intervals of samples contain the mean."""
    samples = [draw(n) for _ in range(times)]
    ends = np.array([mean_interval(sample, **options)[1:] for sample in samples])
    return ((ends[:, 0] <= mean + 1e-12) & (mean - 1e-12 <= ends[:, 1])).mean()


def exact_coverage(n, p):
    """The same for n questions that are right with probability p, by adding up all outcomes."""
    ends = [mean_interval([1] * right + [0] * (n - right))[1:] for right in range(n + 1)]
    low, high = np.transpose(ends)[..., None]
    return (binom.pmf(np.arange(n + 1)[:, None], n, p) * ((low <= p) & (p <= high))).sum(0)


@pytest.mark.parametrize("n", [16, 24, 40, 64, 100, 200, 400])
def test_intervals_of_fractions_cover_near_one_half_and_near_one(n):
    p = np.linspace(0.5, 0.995, 200)  # outcomes are whole numbers, so coverage jumps with p
    for fractions in (p, 1 - p):
        covered = exact_coverage(n, fractions)
        assert 0.945 <= covered.mean() <= 0.97
        assert covered.min() > 0.92
        assert (covered > 0.93).mean() > 0.98


@pytest.mark.parametrize("n", [2, 3, 5, 16, 60])
def test_intervals_over_seeds_and_measurements_cover(n):
    rng = np.random.default_rng(n)
    assert 0.935 <= coverage(lambda k: rng.normal(30, 2, k), 30, n) <= 0.965
    ratios = coverage(lambda k: np.exp(rng.normal(1, 0.2, k)), np.exp(1.02), n)
    assert 0.93 <= ratios <= 0.97
    halves = coverage(lambda k: rng.normal(30, 2, k), 30, n, level=0.5)
    assert 0.46 <= halves <= 0.54


@pytest.mark.parametrize("n", [16, 24, 60, 200])
@pytest.mark.parametrize(("mean", "questions"), [(0.5, 3), (0.9, 3), (0.8, 40), (0.96, 40)])
def test_intervals_of_fractions_per_passage_cover(n, mean, questions):
    """Some passages are harder than others, so their questions are not independent."""
    rng = np.random.default_rng(n)
    spread = 20 if questions == 40 else 2

    def fractions(k):
        p = rng.beta(mean * spread, (1 - mean) * spread, k)
        return rng.binomial(questions, p) / questions

    assert 0.93 <= coverage(fractions, mean, n) <= 0.99


@pytest.mark.parametrize("n", [16, 40, 200])
@pytest.mark.parametrize(("better", "worse"), [(0.03, 0.01), (0.13, 0.03), (0.4, 0.1), (0.2, 0)])
def test_intervals_of_paired_differences_cover(n, better, worse):
    rng, p = np.random.default_rng(n), [worse, 1 - better - worse, better]
    covered = coverage(lambda k: rng.choice(3, k, p=p) - 1, better - worse, n, unit="difference")
    assert covered > 0.92


def test_an_interval_is_not_narrower_than_what_is_known():
    assert mean_interval([1] * 20)[1] < 0.85  # 20 of 20 do not show that the next is right
    assert mean_interval([0] * 20) == pytest.approx([0, 0, 1 - mean_interval([1] * 20)[1]])
    assert mean_interval([True] * 9 + [False]) == mean_interval([1.0] * 9 + [0.0])
    value, low, high = mean_interval([0.5])
    assert value == 0.5
    assert np.isnan([low, high]).all()  # one measurement has no spread
    assert mean_interval([0.2, 0.4])[1:] == pytest.approx((0.3 - 1.27062, 0.3 + 1.27062), abs=1e-4)
    assert mean_interval([0.2, 0.4], unit="fraction")[1] > 0
    low, high = mean_interval([0] * 20, unit="difference")[1:]
    assert low < 0 < high
    assert mean_interval([1] * 20, unit="tokens") == (1, 1, 1)  # counts have no upper end


def test_intervals_move_with_the_values():
    values = np.random.default_rng(1).random(30)
    mean, low, high = mean_interval(values)
    assert low < mean < high
    assert mean == pytest.approx(values.mean())
    moved = mean_interval(10 + 2 * values)
    assert moved == pytest.approx((10 + 2 * mean, 10 + 2 * low, 10 + 2 * high))
    rights = np.repeat([0, 1], [3, 21])
    mean, low, high = mean_interval(rights)
    assert mean_interval(1 - rights) == pytest.approx((1 - mean, 1 - high, 1 - low))


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")], [[1.0, 2.0]], 3.0])
def test_intervals_refuse_what_is_not_a_list_of_numbers(values):
    with pytest.raises(ValueError, match="list of finite numbers"):
        mean_interval(values)


def test_a_figure_keeps_what_its_interval_is_made_of():
    values = np.random.default_rng(0).random(24)
    kept = figure("speed", values, "ratio", "24 prompts")
    again = mean_interval(kept["values"], unit=kept["unit"])
    assert again == pytest.approx([kept["value"], kept["low"], kept["high"]], rel=1e-5)
    once = figure("size", [3.5], "MB", "one file")
    assert (once["low"], once["high"], "values" in once) == (None, None, False)
    assert json.loads(json.dumps(kept | once)) == kept | once
    logs = exponential(figure("cost", [0.0, 2.0], "ratio", "two prompts"))
    assert logs["value"] == pytest.approx(np.e)
    assert logs["low"] < 1 < logs["high"]
    assert exponential(figure("cost", [1.0], "ratio", "one"))["low"] is None


def test_chi_square_p_values_are_uniform_when_the_draws_are_right():
    rng, p = np.random.default_rng(0), [0.4, 0.3, 0.2, 0.0997, 0.0002, 0.0001]
    values = [chi_square(rng.multinomial(2000, p), p) for _ in range(400)]
    assert kstest(values, "uniform").pvalue > 0.01
    assert np.mean(np.array(values) < 0.05) == pytest.approx(0.05, abs=0.03)


def test_chi_square_finds_a_small_fault_and_an_impossible_outcome():
    p, wrong = np.array([0.5, 0.3, 0.2]), np.array([0.47, 0.33, 0.2])
    assert chi_square(np.random.default_rng(0).multinomial(20_000, wrong), p) < 1e-6
    assert chi_square([500, 499, 1], [0.5, 0.5, 0.0]) == 0.0
    assert chi_square([500, 500, 0], [0.5, 0.5, 0.0]) == pytest.approx(1.0)


def test_chi_square_takes_rare_outcomes_together():
    p = np.array([0.5, 0.496, 0.002, 0.002])  # expected 500, 496, 2, 2: three cells, the last of 4
    counts = [505, 490, 5, 0]
    statistic = 5**2 / 500 + 6**2 / 496 + 1**2 / 4
    assert chi_square(counts, p) == pytest.approx(chi2.sf(statistic, df=2))
