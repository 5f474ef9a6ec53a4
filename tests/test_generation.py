"""One text everywhere: where it ends, what a generation config changes, how turns are written."""

import copy
import functools
import itertools

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from kvlab import lab
from kvlab.draft import generate_targets
from kvlab.generation import (
    MARK,
    Ending,
    answer_text,
    answers,
    close_turn,
    closing,
    continuations,
    encode,
    encode_answer,
    encode_parts,
    rendered,
    without_thoughts,
)
from kvlab.lab.report import heldout
from kvlab.records import Record, messages
from kvlab.speculate import (
    EarlyExitProposer,
    LookupProposer,
    ModelProposer,
    Sampling,
    decode,
    generate,
)

DOUBLE = torch.float64
COUNT = 14
END = 1  # of the lab's tokenizer


@functools.cache
def tokenizer():
    return lab.load_tokenizer("lab-target")


def with_template(template):
    other = copy.deepcopy(tokenizer())
    other.chat_template = template
    return other


PROMPTS = [[5, 6, 7, 5, 6], [40, 41, 42, 43, 44, 45, 46, 47, 48], [300, 301, 300, 301]]


@pytest.fixture(scope="module")
def target(tiny_model):
    return tiny_model(vocab_size=1536, dtype=DOUBLE)


def configured(model, **fields):
    model = copy.deepcopy(model)
    model.generation_config = GenerationConfig(**fields)
    return model


def noisy(model):
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(3)
    for weight in other.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    other.generation_config = GenerationConfig()  # a draft's own says nothing about the text
    return other


def by_transformers(model, prompts, **options):
    """Greedy texts of `model.generate`, one prompt at a time, with the tokenizer's end token."""
    model, texts = copy.deepcopy(model), []
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()
    model.generation_config.eos_token_id = [*ends, END]
    for ids in prompts:
        ids = torch.tensor([ids])
        options = {"max_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0} | options
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, tokenizer=tokenizer(), **options)
        texts.append(output[0, ids.shape[1] :].tolist())
    return texts


def by_decoding(model, prompts, proposer=None, **options):
    options = {"max_new_tokens": COUNT, "tokenizer": tokenizer(), "gamma": 3} | options
    output = generate(model, list(map(torch.tensor, prompts)), proposer, **options)
    return [row.tolist() for row in output.tokens]


def by_targets(model, prompts, **options):
    targets = generate_targets(model, tokenizer(), prompts, max_new_tokens=COUNT, **options)
    return [example.input_ids[example.start :].tolist() for example in targets]


def proposers(model):
    return ModelProposer(noisy(model)), LookupProposer(), EarlyExitProposer(model, 1)


def freely(target):
    return continuations(configured(target), tokenizer(), PROMPTS, COUNT)


def config_of(name, target):
    """A generation config that changes the texts of a target, made from those texts."""
    first, second, third = freely(target)
    return {
        "nothing": {},
        "one end": {"eos_token_id": first[3]},
        "several ends": {"eos_token_id": [END, second[2], third[5]]},
        "ends in a tensor": {"eos_token_id": torch.tensor([first[4], 7])},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "min_new_tokens": {"min_new_tokens": 8, "eos_token_id": [first[1], second[4]]},
        "min_length": {"min_length": 12, "eos_token_id": [first[1], second[1]]},
        "suppress_tokens": {"suppress_tokens": [first[0], second[3]]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [first[0], second[0]]},
        "sequence_bias": {"sequence_bias": [[[first[1]], -10.0], [[second[0], 9], 20.0]]},
        "bad_words_ids": {"bad_words_ids": [[first[2]], [second[1], second[2]]]},
        "forced_eos_token_id": {"forced_eos_token_id": END},
        "exponential_decay_length_penalty": {
            "exponential_decay_length_penalty": (2, 1.6),
            "eos_token_id": END,
        },
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
        "stop_strings": {"stop_strings": tokenizer().decode(first[2:4])},
    }[name]


CONFIGS = (
    "nothing, one end, several ends, ends in a tensor, no_repeat_ngram_size, min_new_tokens, "
    "min_length, suppress_tokens, begin_suppress_tokens, sequence_bias, bad_words_ids, "
    "forced_eos_token_id, exponential_decay_length_penalty, encoder_no_repeat_ngram_size, "
    "stop_strings"
).split(", ")


@pytest.mark.parametrize("name", CONFIGS)
def test_one_text_for_every_generation_config(target, name):
    model = configured(target, **config_of(name, target))
    texts = continuations(model, tokenizer(), PROMPTS, COUNT)
    assert (texts == freely(target)) == (name in ("nothing", "encoder_no_repeat_ngram_size"))
    assert texts == by_transformers(model, PROMPTS)
    assert texts == continuations(model, tokenizer(), PROMPTS, COUNT, batch_size=1)
    assert texts == by_decoding(model, PROMPTS) == by_targets(model, PROMPTS)
    for proposer in proposers(model):
        assert texts == by_decoding(model, PROMPTS, proposer)


def test_the_lab_answers_as_transformers_does():
    model, prompts = lab.load("lab-target"), []
    for task in ("reading", "arithmetic"):
        prompts += [encode(tokenizer(), d[:-1]) for d in heldout(task, 2, seed=4)[:2]]
    for fields in ({"no_repeat_ngram_size": 3}, {"eos_token_id": [1, 17]}):
        model.generation_config = GenerationConfig(**{"eos_token_id": 1} | fields)
        texts = continuations(model, tokenizer(), prompts, COUNT)
        assert texts == by_transformers(model, prompts) == by_decoding(model, prompts)


@pytest.mark.parametrize(
    ("field", "value"), [("num_beams", 4), ("guidance_scale", 2.0), ("max_time", 3.0)]
)
def test_what_cannot_be_followed_is_refused_by_name(target, field, value):
    model = configured(target, **{field: value})
    for call in (
        lambda: continuations(model, tokenizer(), PROMPTS),
        lambda: by_decoding(model, PROMPTS),
        lambda: by_targets(model, PROMPTS),
    ):
        with pytest.raises(ValueError, match=f"{field}={value}.*generation_config.{field} ="):
            call()


class Forbid(LogitsProcessor):
    """No token that is the last one plus an even number."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, last in enumerate(input_ids[:, -1].tolist()):
            scores[row, last % 2 :: 2] = -float("inf")
        return scores


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_processors_of_ones_own_and_min_new_tokens(target, temperature):
    first = freely(target)[0]
    model = configured(target, eos_token_id=[END, first[0]], suppress_tokens=[first[4]])
    extra = LogitsProcessorList([Forbid()])
    want = by_transformers(model, PROMPTS, logits_processor=extra, min_new_tokens=5)
    assert want != by_transformers(model, PROMPTS, min_new_tokens=5)
    sampling = Sampling(temperature, min_new_tokens=5, logits_processor=extra)
    for proposer in (None, *proposers(model)):
        assert by_decoding(model, PROMPTS, proposer, sampling=sampling) == want
    assert all(len(text) >= 5 for text in want)


@pytest.mark.parametrize("size", [1000, 1600])
def test_processors_for_a_draft_with_another_vocabulary(target, tiny_model, size):
    first = freely(target)[0]
    fields = {"sequence_bias": [[[1535], -1.0]], "suppress_tokens": [first[1]]}
    model = configured(target, no_repeat_ngram_size=2, **fields)
    draft = ModelProposer(tiny_model(vocab_size=size, dtype=DOUBLE, seed=1))
    assert by_decoding(model, PROMPTS, draft) == by_transformers(model, PROMPTS)


# Stop strings.


def stops_of(texts):
    """Strings of different lengths in texts, also such as begin or end inside a token."""
    text = tokenizer().decode(texts[0])
    other = tokenizer().decode(texts[1])
    return [text[3:5], text[5:16], other[len(other) // 2 :], "nowhere"]


def test_a_text_ends_where_it_first_contains_a_stop_string(target):
    free = freely(target)
    for stop in [*stops_of(free), stops_of(free)[:3]]:
        texts = continuations(configured(target), tokenizer(), PROMPTS, COUNT, stop=stop)
        strings = [stop] if isinstance(stop, str) else stop
        for whole, text in zip(free, texts, strict=True):
            prefixes = [whole[: n + 1] for n in range(len(whole))]
            decoded = map(tokenizer().decode, prefixes)
            contains = [any(s in text for s in strings) for text in decoded]
            assert text == prefixes[contains.index(True) if any(contains) else -1]
        for proposer in (None, *proposers(target)):
            assert by_decoding(configured(target), PROMPTS, proposer, stop=stop) == texts
        assert by_targets(configured(target), PROMPTS, stop=stop) == texts


def test_an_answer_ends_before_the_stop_string():
    model = lab.load("lab-target")
    conversations = [d[:-1] for d in heldout("arithmetic", 6, seed=4)[:6]]
    whole = answers(model, tokenizer(), conversations, 60)
    stop = [" = ", whole[0][7:9]]
    assert any(s in text for s in stop for text in whole)
    cut = answers(model, tokenizer(), conversations, 60, stop=stop)
    for text, got in zip(whole, cut, strict=True):
        assert got == text[: min([text.find(s) for s in stop if s in text], default=None)].strip()


def test_stop_strings_need_a_tokenizer_and_are_not_empty(target):
    for stop, sentence in (("a", "give the tokenizer"), ("", "is empty")):
        with pytest.raises(ValueError, match=sentence):
            by_decoding(target, PROMPTS, stop=stop, tokenizer=None if stop else tokenizer())


def test_no_pad_token_is_needed(target):
    bare = copy.deepcopy(tokenizer())
    bare.pad_token = None
    model = configured(target, eos_token_id=END)
    assert continuations(model, bare, PROMPTS, COUNT) == freely(target)


# Lengths.


def test_prompts_longer_than_the_model_reads_are_refused_before_work(target, monkeypatch):
    limit = target.config.max_position_embeddings
    long = list(range(5, 6 + limit))
    monkeypatch.setattr(type(target), "forward", lambda *_, **__: pytest.fail("work"))
    for call in (
        lambda: continuations(target, tokenizer(), [PROMPTS[0], long]),
        lambda: by_decoding(target, [PROMPTS[0], long]),
        lambda: by_decoding(target, [PROMPTS[0], long], LookupProposer()),
    ):
        with pytest.raises(ValueError, match=f"{limit + 1} tokens, the model reads up to {limit}"):
            call()


def test_a_text_ends_where_the_model_reads_no_further(target):
    limit = target.config.max_position_embeddings
    prompts = [list(range(5, limit)), list(range(5, 5 + limit)), PROMPTS[0]]
    texts = continuations(configured(target), tokenizer(), prompts, COUNT)
    assert list(map(len, texts)) == [6, 1, COUNT]
    for proposer in (None, *proposers(target)):
        assert by_decoding(configured(target), prompts, proposer) == texts


@pytest.mark.parametrize("gamma", [2, 5, 100_000])
def test_no_more_is_drafted_than_is_left(target, gamma):
    for count in (1, 2, 6):
        for proposer in proposers(target):
            left = [count] * 3
            prompts = list(map(torch.tensor, PROMPTS))
            options = {"gamma": gamma, "max_new_tokens": count, "eos_token_id": []}
            for r in decode(target, prompts, proposer, **options):
                for row, drafted in enumerate(r.drafted):
                    assert len(drafted) <= max(left[row] - 1, 0)
                    assert r.accepted[row] <= len(drafted)
                    left[row] -= len(r.tokens[row])
            assert left == [0, 0, 0]


def test_no_more_is_drafted_than_a_text_can_be_long_with_generators_of_rows(target):
    sampling = Sampling(1.0, generator=[torch.Generator().manual_seed(n) for n in range(3)])
    options = {"gamma": 100_000, "max_new_tokens": 6, "sampling": sampling}
    rounds = generate(target, list(map(torch.tensor, PROMPTS)), LookupProposer(), **options).rounds
    assert max(len(drafted) for r in rounds for drafted in r.drafted) <= 5


# Turns.

LAB = tokenizer().chat_template
TURN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
OPENS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
THINKS = OPENS.replace("<|assistant|>", "<|assistant|><think>\n")
SWITCH = OPENS.replace(
    "<|assistant|>", "<|assistant|>{% if enable_thinking is false %}<think></think>{% endif %}"
)
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
TEMPLATES = {
    "lab": LAB,
    "none": None,
    "plain": TURN + OPENS,
    "thinks": TURN + THINKS,
    "lab that thinks": LAB.replace("<|assistant|>{%", "<|assistant|><think>\n{%"),
    "switch": TURN + SWITCH,
    "refuses system": REFUSES + TURN + OPENS,
    "line after the end": TURN.replace("<|end|>", "<|end|>\n") + OPENS,
}
QUESTION = [{"role": "user", "content": "Where does Anna live?"}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_follows_its_prompt_and_has_its_end(name):
    tok = with_template(TEMPLATES[name])
    prompt, answer = encode_answer(tok, QUESTION, "Rome")
    assert prompt == encode(tok, QUESTION)
    text = tok.decode(answer)
    assert text.strip().removesuffix(closing(tok).strip()) == "Rome"
    assert text.endswith(closing(tok)) or name == "none"
    assert close_turn(tok, answer) == answer or name == "none"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", ["<think", "<", "<|", MARK, " ", "a\nb"])
def test_no_letter_of_an_answer_is_taken_for_the_opening(name, content):
    tok = with_template(TEMPLATES[name])
    content += "x"
    _, answer = encode_answer(tok, QUESTION, content)
    assert content.strip() in tok.decode(answer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_closed_turns_are_the_conversation(name):
    """An answer that ended, one that was cut, and one that ended otherwise become the same turn."""
    tok = with_template(TEMPLATES[name])
    end = tok(closing(tok), add_special_tokens=False).input_ids
    cut = tok(" Rome", add_special_tokens=False).input_ids
    other_end = 3
    want = cut + end
    assert end
    for n in range(len(end) + 1):
        assert close_turn(tok, cut + end[:n], [*end, other_end]) == want
    assert close_turn(tok, [*cut, other_end], [other_end]) == want
    assert close_turn(tok, [], [other_end]) == end


@pytest.mark.parametrize("name", TEMPLATES)
def test_parts_are_the_prompt_and_the_answer(name):
    tok = with_template(TEMPLATES[name])
    parts = encode_parts(tok, [*QUESTION, {"role": "assistant", "content": "Rome"}])
    if name == "none":  # each message is a line
        assert "".join(map(tok.decode, parts)) == "Where does Anna live?\nRome"
    else:
        assert parts == list(encode_answer(tok, QUESTION, "Rome"))


def test_a_template_that_refuses_is_a_sentence():
    tok = with_template(TEMPLATES["refuses system"])
    system = [{"role": "system", "content": "Be brief."}, *QUESTION]
    sentence = r"refuses a conversation of system, user \(No system role\): use a tokenizer"
    with pytest.raises(ValueError, match=sentence):
        rendered(tok, system)
    with pytest.raises(ValueError, match="refuses a conversation of system"):
        encode_parts(tok, system)


def test_thinking_is_off_unless_it_is_wanted():
    tok = with_template(TEMPLATES["switch"])
    assert rendered(tok, QUESTION).endswith("<|assistant|><think></think>")
    assert rendered(tok, QUESTION, enable_thinking=True).endswith("<|assistant|>")
    assert encode(tok, QUESTION) != encode(tok, QUESTION, enable_thinking=True)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7", "7"),
        ("<think>6 or 8?</think>\n\n7", "7"),
        ("6 or 8?</think>7", "7"),
        ("<think>6</think><think>8</think> 7 ", "7"),
        ("<think>6 or", ""),
        ("", ""),
    ],
)
def test_thoughts_are_no_answer(text, answer):
    assert without_thoughts(text) == answer


def test_answers_are_without_thoughts(target, monkeypatch):
    texts = itertools.cycle(["6 or 8?</think> 7", "6 or 8, I"])
    monkeypatch.setattr(
        "kvlab.generation.continuations",
        lambda model, tokenizer, prompts, *_: [tokenizer(next(texts)).input_ids for _ in prompts],
    )
    tok = with_template(TEMPLATES["thinks"])
    assert answers(target, tok, [QUESTION] * 2) == ["7", ""]
    assert answer_text(tok, tok("6 or 8").input_ids) == "6 or 8"


def test_an_ending_has_every_end_once(target):
    model = configured(target, eos_token_id=[4, END], stop_strings=["b"])
    ending = Ending.of(model, tokenizer(), "a")
    assert (ending.ids, ending.stop) == ((4, END), ("a", "b"))
    assert Ending.of(model, tokenizer(), eos_token_id=[]).ids == ()


def test_a_record_is_a_conversation():
    prompt, solution = messages(Record("", "What is hot?", ("sun",), ("snow", "sun")))
    ids, answer = encode_answer(tokenizer(), [prompt], solution["content"])
    assert tokenizer().decode(answer) == " The answer is B.<|end|>"
    assert ids == encode(tokenizer(), [prompt])
