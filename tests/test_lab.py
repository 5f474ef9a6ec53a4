"""The lab: worlds whose truth is known, a tokenizer without loss, rows with exact weights, a recipe that resumes."""

import copy
import functools
import random
import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvlab.evaluate import exact_match
from kvlab.generation import answers
from kvlab.lab import corpora, models, recipe, report, worlds
from kvlab.lab.tokenizers import END, PAD, ROLES, train_tokenizer

SPECIAL = (PAD, END, *ROLES)


def parsers(texts, attribute):
    """Patterns that read the subject (and value) back from a statement or question."""
    patterns = [
        re.escape(t).replace(r"\{s\}", r"(?P<s>\w+)").replace(r"\{v\}", r"(?P<v>\w+)")
        for t in texts
    ]
    return [(re.compile(pattern), attribute) for pattern in patterns]


STATEMENTS = [
    p for name, relation in worlds.RELATIONS.items() for p in parsers(relation.statements, name)
]
QUESTIONS = [
    p for name, relation in worlds.RELATIONS.items() for p in parsers(relation.questions, name)
]


def read(sentence, patterns):
    matches = [
        (match.groupdict(), name)
        for pattern, name in patterns
        if (match := pattern.fullmatch(sentence))
    ]
    assert len(matches) == 1, f"{sentence!r} reads in {len(matches)} ways"
    return (
        matches[0][0]["s"],
        matches[0][1],
        *([matches[0][0]["v"]] if "v" in matches[0][0] else []),
    )


def stated(text):
    """The (subject, attribute, value) triples of a text of statements."""
    return {read(sentence + ".", STATEMENTS) for sentence in text.rstrip(".").split(". ")}


def passage_of(document):
    return " ".join(m["content"] for m in document if m["role"] == "system")


def questions_and_answers(document):
    """(question, answer) pairs of a document."""
    pairs, turns = [], [m for m in document if m["role"] != "system"]
    for user, assistant in zip(turns[::2], turns[1::2], strict=True):
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        pairs.append((user["content"], assistant["content"]))
    return pairs


# reading


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("n_facts", [1, 2, 7, 16, 40])
def test_a_passage_states_its_facts_once(n_facts, test):
    for seed in range(20):
        passage = worlds.make_passage(random.Random(seed), n_facts, test)
        facts = {(f.subject, f.attribute, f.value) for f in passage.facts}
        assert (
            len(passage.facts)
            == n_facts
            == len({fact[:2] for fact in facts})
            == passage.text.count(".")
        )
        assert stated(passage.text) == facts


@pytest.fixture
def quick_hash(monkeypatch):
    """Many draws ask the same hashes again."""
    monkeypatch.setattr(worlds, "is_held_out", functools.cache(worlds.is_held_out))


@pytest.mark.usefixtures("quick_hash")
def test_training_and_test_facts_are_disjoint():
    rng = random.Random(0)
    facts = {
        test: {f for _ in range(700) for f in worlds.make_passage(rng, 30, test).facts}
        for test in (False, True)
    }
    assert (
        len(facts[False]) > 6000
    )  # a good part of all there are, so that the next line says something
    assert len(facts[True]) > 1200
    assert not facts[False] & facts[True]


def test_a_tenth_of_all_facts_is_held_out():
    facts = [
        (s, a, v)
        for s in worlds.NAMES
        for a, relation in worlds.PEOPLE.items()
        for v in relation.values
    ]
    facts += [
        (s, a, v)
        for s in worlds.THINGS
        for a, relation in worlds.OBJECTS.items()
        for v in relation.values
    ]
    assert 0.09 < sum(worlds.is_held_out(*fact) for fact in facts) / len(facts) < 0.115


@pytest.mark.parametrize("test", [False, True])
def test_free_questions_are_answered_by_the_passage(test):
    rng = random.Random(1)
    for _ in range(200):
        document = worlds.reading_document(
            rng, rng.randint(2, 20), ["free"] * 3, test, parts=rng.randint(1, 3)
        )
        facts = stated(passage_of(document))
        for question, answer in questions_and_answers(document):
            assert (*read(question, QUESTIONS), answer) in facts


def test_unanswerable_questions_are_not():
    rng, others = random.Random(2), 0
    for _ in range(300):
        document = worlds.reading_document(rng, rng.randint(1, 20), ["unanswerable"] * 3)
        facts = stated(passage_of(document))
        for question, answer in questions_and_answers(document):
            subject, attribute = read(question, QUESTIONS)
            assert answer == worlds.UNKNOWN
            assert (subject, attribute) not in {fact[:2] for fact in facts}
            assert attribute in (worlds.PEOPLE if subject in worlds.NAMES else worlds.OBJECTS)
            others += subject not in {fact[0] for fact in facts}
    assert (
        0.1 < others / 900 < 0.4
    )  # mostly about somebody of the passage: the name alone must not tell
    assert all(worlds.UNKNOWN not in relation.values for relation in worlds.RELATIONS.values())


def test_an_unanswerable_question_is_found_where_the_passage_leaves_nothing_open():
    everything = tuple(worlds.Fact("lamp", a, r.values[0]) for a, r in worlds.OBJECTS.items())
    passage = worlds.Passage(
        everything, " ".join(f.statement(random.Random(0)) for f in everything)
    )
    for seed in range(30):
        question, answer = worlds.ask_unanswerable(random.Random(seed), passage)
        assert answer == worlds.UNKNOWN
        assert read(question, QUESTIONS)[0] != "lamp"


def test_choice_letters_are_right_and_options_distinct():
    rng, letters = random.Random(3), Counter()
    for _ in range(300):
        document = worlds.reading_document(rng, 8, ["choice"] * 2)
        facts = stated(passage_of(document))
        for question, letter in questions_and_answers(document):
            question, listed = re.fullmatch(r"(.*?\?) (A\) .*)", question).groups()
            options = dict(re.findall(r"([A-D])\) (\w+)", listed))
            subject, attribute = read(question, QUESTIONS)
            assert list(options) == list("ABCD")
            assert len(set(options.values())) == 4
            assert set(options.values()) <= set(worlds.RELATIONS[attribute].values)
            assert [o for o in options if (subject, attribute, options[o]) in facts] == [letter]
            letters[letter] += 1
    assert min(letters.values()) > 100  # of 600: no letter is a better guess


def test_open_requests_are_answered_with_all_facts_of_their_subject():
    rng, answers_drawn = random.Random(4), set()
    for _ in range(100):
        document = worlds.reading_document(rng, 10, ["about"])
        facts = stated(passage_of(document))
        ((question, answer),) = questions_and_answers(document)
        subject = re.fullmatch(r"Tell me about (?:the )?(\w+)\.", question).group(1)
        assert stated(answer) == {fact for fact in facts if fact[0] == subject}
        answers_drawn.add(answer)
    assert len(answers_drawn) > 50


@pytest.mark.parametrize("parts", [1, 2, 3, 50])
def test_parts_split_a_passage_between_sentences(parts):
    undivided = worlds.reading_document(random.Random(5), 9, ["free"])
    split = worlds.reading_document(random.Random(5), 9, ["free"], parts=parts)
    systems = [m for m in split if m["role"] == "system"]
    assert passage_of(split) == passage_of(undivided)
    assert questions_and_answers(split) == questions_and_answers(undivided)
    assert len(systems) == min(parts, 9)
    assert all(m["content"].endswith(".") for m in systems)


def test_repetition_repeats():
    system, assistant = worlds.repetition_document(random.Random(0), 12)
    assert system["content"] == assistant["content"]
    assert len(system["content"].split()) == 12


# arithmetic

EVENTS = {
    "=": r"has (\d+) \w+",
    "+": r"buys (\d+) more|finds (\d+) more|gets (\d+) as a gift",
    "-": r"gives away (\d+)|loses (\d+)|sells (\d+)",
    "*": r"then has (\d+) times as many",
}


def compute(operator, value, n):
    return {"=": n, "+": value + n, "-": value - n, "*": value * n}[operator]


def solve(question):
    """Name, noun, style and the (operator, operand) chain of a word problem, read from its words."""
    story, noun, name, style = re.fullmatch(
        r"(.*) How many (\w+) does (\w+) have\? (.*)", question
    ).groups()
    chain = []
    for sentence in story.rstrip(".").split(". "):
        who, event = sentence.split(" ", 1)
        ((operator, match),) = [
            (o, match) for o, pattern in EVENTS.items() if (match := re.fullmatch(pattern, event))
        ]
        assert who == name
        chain.append((operator, int(next(group for group in match.groups() if group))))
    assert [operator == "=" for operator, _ in chain] == [True] + [False] * (len(chain) - 1)
    assert story.startswith(f"{name} has {chain[0][1]} {noun}.")
    return name, noun, style, tuple(chain)


def values_of(chain):
    values = [0]
    for operator, n in chain:
        values.append(compute(operator, values[-1], n))
    return values[1:]


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("style", worlds.STYLES)
def test_solutions_are_right(style, test):
    rng, used = random.Random(6), Counter()
    for i in range(300):
        n_steps = i % 5 + 1
        ((question, answer),) = questions_and_answers(
            worlds.arithmetic_document(rng, n_steps, style, test)
        )
        name, noun, wanted, chain = solve(question)
        values = values_of(chain)
        assert wanted == worlds.STYLES[style]
        assert len(values) == n_steps + 1
        assert all(0 <= value <= 99 for value in values)
        reasoning, final = re.fullmatch(r"(.*)\. Answer: (\d+)", answer).groups()
        assert int(final) == values[-1]
        sentences = reasoning.split(". ")
        if style == "long":
            assert sentences.pop(0) == f"{name} starts with {values[0]} {noun}"
        assert len(sentences) == n_steps
        for sentence, before, after in zip(sentences, values, values[1:], strict=False):
            wording = r"(?:[A-Z][a-z ]*(\d+)[a-z ]* )?(\d+)([-+*])(\d+)=(\d+)(?: (\w+))?"
            again, left, operator, right, result, thing = re.fullmatch(wording, sentence).groups()
            assert (again, thing) == ((right, noun) if style == "long" else (None, None))
            left, right = int(left), int(right)
            assert (left, int(result), compute(operator, left, right)) == (before, after, after)
            used[operator] += 1
    assert min(used.values()) > 100
    assert set(used) == set("+-*")


def test_training_and_test_problems_are_disjoint():
    rng = random.Random(7)
    draws = {
        test: {worlds.make_problem(rng, i % 2 + 1, test) for i in range(3000)}
        for test in (False, True)
    }
    assert len(draws[False]) > 1200
    assert len(draws[True]) > 300
    assert not draws[False] & draws[True]
    written = {
        test: {
            solve(worlds.arithmetic_document(rng, 1, "short", test)[0]["content"])[-1]
            for _ in range(1000)
        }
        for test in (False, True)
    }
    assert not written[False] & written[True]


# all generators


@pytest.mark.parametrize(
    "make",
    [
        lambda rng: worlds.reading_document(rng, 9, ["free", "choice", "unanswerable", "about"]),
        lambda rng: worlds.arithmetic_document(rng, 3, "long"),
        lambda rng: worlds.repetition_document(rng, 9),
        corpora.faq_document,
        corpora.sample_document,
    ],
)
def test_a_seed_is_a_document(make):
    documents = [str(make(random.Random(seed))) for seed in [*range(20), *range(20)]]
    assert documents[:20] == documents[20:]
    assert len(set(documents)) > 15


@pytest.mark.usefixtures("quick_hash")
def test_split_questions_are_about_a_sentence_whose_subject_ends_the_piece_before():
    made = report.split_questions(40, facts=16, pieces=4, seed=0)
    asked = set()
    for (passage, question, answer), texts in made:
        assert "".join(texts) == passage["content"]
        assert [text.count(".") for text in texts] == [4, 4, 4, 4]
        subjects = [re.search(r"\w+$", text)[0] for text in texts[:-1]]
        assert set(subjects) <= {*worlds.NAMES, *worlds.THINGS}
        beginnings = [text.split(".")[0] for text in texts[1:]]
        assert all(text.startswith(" ") for text in beginnings)
        split = list(zip(subjects, beginnings, strict=True))
        found = [i for i, (s, b) in enumerate(split)
                 if s in question["content"] and answer["content"] in b]  # fmt: skip
        assert found
        asked.update(found)
    assert asked == {0, 1, 2}
    assert made == report.split_questions(40, facts=16, pieces=4, seed=0)
    assert made != report.split_questions(40, facts=16, pieces=4, seed=1)


def test_reports_ask_what_training_never_shows():
    for document in report.questions("free", 50, (8, 16), seed=0):
        assert all(worlds.is_held_out(*fact) for fact in stated(passage_of(document)))
    assert report.questions("free", 5, (2, 4), seed=0) == report.questions(
        "free", 5, (2, 4), seed=0
    )
    assert report.problems(2, "long", 5, seed=0) != report.problems(2, "long", 5, seed=1)
    for document in report.problems(2, "long", 50, seed=0):
        *_, chain = solve(document[0]["content"])
        assert worlds.is_held_out(chain[0][1], *chain[1:])
        assert report.result(document[1]["content"]) == str(values_of(chain)[-1])


# passages by index


def test_a_reading_depends_on_its_seed_and_index_alone():
    one, two, other, held_out = (corpora.Readings(30, seed=seed, test=test) for seed, test in
                                 ((3, False), (3, False), (4, False), (3, True)))  # fmt: skip
    forward = [one[i] for i in range(30)]
    random.seed(0)
    for i in random.sample(range(30), 30):
        assert two[i] == forward[i]
        assert other[i][0] != forward[i][0]
        assert held_out[i][0] != forward[i][0]
    assert len({text for text, _ in forward}) == len(one) == 30
    assert list(one) == forward  # a loop ends by the IndexError
    assert corpora.Readings(3, seed=3)[2] == forward[2]  # whatever their number


@pytest.mark.parametrize("test", [False, True])
def test_readings_state_their_facts_and_ask_for_them(test):
    readings = corpora.Readings(60, facts=(3, 9), questions=4, seed=1, test=test)
    sizes = set()
    for text, turns in readings:
        facts = stated(text)
        sizes.add(len(facts))
        assert all(worlds.is_held_out(*fact) == test for fact in facts)
        assert len(turns) == 4
        for question, answer in turns:
            assert (*read(question, QUESTIONS), answer) in facts
    assert sizes == set(range(3, 10))


@pytest.mark.parametrize("data", [corpora.Readings, corpora.Requests, corpora.Solutions])
@pytest.mark.parametrize("index", [-1, 5])
def test_an_item_that_is_not_there_is_refused(data, index):
    with pytest.raises(IndexError, match=f"There is no item {index} among 5"):
        data(5)[index]


@pytest.mark.parametrize("test", [False, True])
def test_a_request_asks_about_somebody_in_its_passage(test):
    requests = corpora.Requests(20, (4, 8), seed=3, test=test)
    assert requests[7] == corpora.Requests(8, (4, 8), seed=3, test=test)[7]
    assert requests[7] != requests[8]
    assert requests[7] != corpora.Requests(20, (4, 8), seed=4, test=test)[7]
    for passage, request in requests:
        assert (passage["role"], request["role"]) == ("system", "user")
        name = re.fullmatch(r"Tell me about (.*)\.", request["content"])[1]
        facts = stated(passage["content"])
        assert name.lower() in passage["content"].lower()  # "The book" opens a sentence
        assert all(worlds.is_held_out(*fact) == test for fact in facts)
        assert 4 <= len(facts) <= 8


@pytest.mark.parametrize("ending", ["", "\n"])  # text that a chat template puts after an answer
@pytest.mark.parametrize("kind", ["free", "about"])
def test_blanks_hide_the_values_of_facts_and_nothing_else(kind, ending):
    tokenizer = copy.deepcopy(models.load_tokenizer("lab-draft"))
    tokenizer.chat_template = tokenizer.chat_template.replace(END, END + ending)
    assert tokenizer.apply_chat_template(
        [{"role": "assistant", "content": "a"}], tokenize=False
    ).endswith(END + ending)
    blank = tokenizer(" unknown", add_special_tokens=False).input_ids[0]
    for blanks, shown, answer in corpora.blanked(
        tokenizer, 20, (4, 8), seed=1, test=True, kind=kind
    ):
        hidden = blanks != shown
        assert hidden.any()
        assert (blanks[hidden] == blank).all()
        blanked_text, text, answer_text = (
            tokenizer.decode(ids) for ids in (blanks, shown, answer[:-1])
        )
        assert answer[-1] == tokenizer.eos_token_id
        if kind == "free":
            assert answer_text.strip() in text
            assert not re.search(rf"\b{re.escape(answer_text.strip())}\b", blanked_text)
        else:
            facts = answer_text.strip(". ").split(". ")
            assert all(fact in text and fact not in blanked_text for fact in facts if fact in text)
        question = text[text.rindex("<|user|>") :]
        assert blanked_text.endswith(question)


def test_a_solution_depends_on_its_seed_and_index_alone():
    one, two, other = (corpora.Solutions(40, seed=seed) for seed in (3, 3, 4))
    forward = [one[i] for i in range(40)]
    random.seed(0)
    for i in random.sample(range(40), 40):
        assert two[i] == forward[i] != other[i]
    assert list(one) == forward  # a loop ends by the IndexError
    assert len({short[0]["content"] for short, _ in forward}) > 30
    assert corpora.Solutions(3, seed=3)[2] == forward[2]  # whatever their number


@pytest.mark.parametrize("test", [False, True])
def test_a_problem_is_solved_in_both_styles_and_held_out_or_not(test):
    sizes = set()
    for short, long in corpora.Solutions(60, steps=(2, 4), seed=1, test=test):
        *story, wanted, chain = solve(short[0]["content"])
        *again, other, same = solve(long[0]["content"])
        assert (story, chain) == (again, same)
        assert (wanted, other) == (worlds.STYLES["short"], worlds.STYLES["long"])
        assert (
            report.result(short[1]["content"])
            == report.result(long[1]["content"])
            == str(values_of(chain)[-1])
        )
        assert len(short[1]["content"]) < len(long[1]["content"])
        assert worlds.is_held_out(chain[0][1], *chain[1:]) is test
        sizes.add(len(chain) - 1)
    assert sizes == {2, 3, 4}


# the FAQ


def plain(text):
    return re.sub(r"\W+", " ", text.lower()).strip()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_faq_items_are_whole(language):
    items = corpora.faq(language)
    assert len(items) >= 42
    assert len({item["domain"] for item in items}) == 7
    assert len({item["id"] for item in items}) == len(items)
    for item in items:
        assert set(item) == {"id", "domain", "question", "answer", "paraphrases"}
        wordings = [item["question"], *item["paraphrases"]]
        assert len(wordings) == len({plain(w) for w in wordings}) == 4
        assert all(text == text.strip() != "" for text in (*wordings, item["answer"]))
    everything = [plain(w) for item in items for w in (item["question"], *item["paraphrases"])]
    assert len(set(everything)) == len(everything)


def test_faq_languages_are_aligned():
    for en, zh in zip(corpora.faq("en"), corpora.faq("zh"), strict=True):
        assert (en["id"], en["domain"]) == (zh["id"], zh["domain"])
        assert en["question"].isascii()
        assert all(
            re.search("[一-鿿]", text)
            for text in (zh["question"], zh["answer"], *zh["paraphrases"])
        )


def test_an_unknown_faq_language_is_refused():
    with pytest.raises(ValueError, match="expected 'en' or 'zh'"):
        corpora.faq("fr")


def test_held_out_paraphrases_are_in_no_training_text():
    rng = random.Random(0)
    documents = [m["content"] for _ in range(3000) for m in corpora.faq_document(rng)]
    trained = {plain(text) for text in [*corpora.faq_texts(), *documents]}
    for item in corpora.faq():
        for text in (item["question"], *item["paraphrases"][:2], item["answer"]):
            assert plain(text) in trained
        assert not any(plain(item["paraphrases"][2]) in text for text in trained)


def test_faq_documents_answer_their_question():
    rng, answered = (
        random.Random(1),
        {(q, i["answer"]) for i in corpora.faq() for q in (i["question"], *i["paraphrases"])},
    )
    assert all(questions_and_answers(corpora.faq_document(rng))[0] in answered for _ in range(200))


# the tokenizer


@functools.cache
def tokenizer(size=400):
    return train_tokenizer(size, n_documents=50)


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None)
@given(text=ANY_TEXT)
def test_any_text_comes_back(text):
    ids = tokenizer()(text).input_ids
    assert tokenizer().decode(ids) == text
    assert tokenizer().backend_tokenizer.encode(text).ids == ids


@settings(deadline=None)
@given(text=st.text("0123456789 .=+-a", max_size=40))
def test_digits_stand_alone(text):
    tokens = tokenizer().convert_ids_to_tokens(tokenizer()(text).input_ids)
    assert [t for t in tokens if any(c.isdigit() for c in t)] == [c for c in text if c.isdigit()]


@pytest.mark.parametrize("size", [300, 400])
def test_the_vocabulary_has_exactly_the_asked_size(size):
    assert len(tokenizer(size)) == tokenizer(size).vocab_size == size
    assert sorted(tokenizer(size).get_vocab().values()) == list(range(size))


def test_special_tokens_are_where_models_expect_them():
    shared = models.make_config("lab-target")
    assert (tokenizer().pad_token_id, tokenizer().eos_token_id) == (
        shared.pad_token_id,
        shared.eos_token_id,
    )
    assert tokenizer().convert_tokens_to_ids(list(SPECIAL)) == list(range(5))
    assert set(tokenizer().all_special_tokens) == set(SPECIAL)
    for name, (size, _) in recipe.TOKENIZERS.items():
        assert models.SHAPES[name]["vocab_size"] == size
    assert recipe.TOKENIZERS["lab-target"] == recipe.TOKENIZERS["lab-draft"]


@settings(deadline=None)
@given(before=ANY_TEXT, special=st.sampled_from(SPECIAL), after=ANY_TEXT)
def test_special_tokens_are_never_split_or_merged(before, special, after):
    encode = lambda text: tokenizer()(text).input_ids
    number = tokenizer().convert_tokens_to_ids(special)
    assert encode(before + special + after) == [*encode(before), number, *encode(after)]


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": ANY_TEXT}
    ),
    min_size=1,
)


@settings(deadline=None)
@given(messages=MESSAGES)
def test_the_chat_template_is_what_rows_hold(messages):
    rows = corpora.Rows(tokenizer(), corpora.Mix(), 1)
    rendered = tokenizer().apply_chat_template(messages, return_dict=True)["input_ids"]
    assert rows.tokens(messages) == rendered
    asking = tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert asking == [*rendered, tokenizer().convert_tokens_to_ids("<|assistant|>")]


def test_an_answer_goes_on_where_its_prompt_ends():
    conversation = [{"role": "user", "content": "Why?"}]
    conversation_text = tokenizer().apply_chat_template(
        [*conversation, {"role": "assistant", "content": "So."}], tokenize=False
    )
    asking = tokenizer().apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=False
    )
    assert conversation_text == asking + " So.<|end|>"


def test_a_saved_tokenizer_is_the_same(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    loaded, rng = AutoTokenizer.from_pretrained(tmp_path), random.Random(0)
    for _ in range(20):
        document = corpora.sample_document(rng)
        first, second = (
            t.apply_chat_template(document, return_dict=True)["input_ids"]
            for t in (tokenizer(), loaded)
        )
        assert first == second
        assert loaded.decode(first) == tokenizer().decode(second)
    assert (loaded.pad_token, loaded.eos_token, loaded.get_vocab()) == (
        PAD,
        END,
        tokenizer().get_vocab(),
    )
    assert loaded.backend_tokenizer.to_str() == tokenizer().backend_tokenizer.to_str()


def test_training_a_tokenizer_depends_on_its_seed_alone():
    vocabularies = [train_tokenizer(400, seed, 50).get_vocab() for seed in (0, 0, 1)]
    assert vocabularies[0] == vocabularies[1] == tokenizer().get_vocab() != vocabularies[2]


# rows

MIXES = {
    "all": corpora.Mix(row=160, repetition=0.2, arithmetic=0.3, faq=0.2),
    "repetition": corpora.Mix(row=96, repetition=1.0),
    "arithmetic": corpora.Mix(row=200, repetition=0.0, arithmetic=1.0),
    "faq": corpora.Mix(row=200, repetition=0.0, arithmetic=0.0, faq=1.0),
    "reading": corpora.Mix(row=256, repetition=0.0, arithmetic=0.0, facts=(1, 12)),
}


def test_a_row_depends_on_its_seed_and_index_alone():
    one, two, other = (corpora.Rows(tokenizer(), MIXES["all"], 40, seed=seed) for seed in (3, 3, 4))
    forward = [one[i] for i in range(40)]
    random.seed(0)
    for i in random.sample(range(40), 40):
        assert torch.equal(two[i]["input_ids"], forward[i]["input_ids"])
        assert torch.equal(two[i]["weights"], forward[i]["weights"])
    assert sum(torch.equal(other[i]["input_ids"], forward[i]["input_ids"]) for i in range(40)) == 0
    assert (
        len({tuple(row["input_ids"].tolist()) for row in forward}) >= 38
    )  # one FAQ item may come twice
    assert len(one) == 40


def weighed(document):
    """Ids and weights of a document, message by message."""
    encode, name, ids, weights = (
        tokenizer().backend_tokenizer.encode,
        tokenizer().convert_tokens_to_ids,
        [],
        [],
    )
    for message in document:
        answer = message["role"] == "assistant"
        content = encode(" " + message["content"]).ids + ([name(END)] if answer else [])
        ids += [name(f"<|{message['role']}|>"), *content]
        weights += [0.05, *[1.0 if answer else 0.05] * len(content)]
    return ids, weights


@pytest.mark.parametrize("mix", MIXES)
def test_weights_are_one_on_answers_and_their_end(mix):
    rows, documents, cut = corpora.Rows(tokenizer(), MIXES[mix], 30, seed=1), [], 0
    make = rows.tokens
    rows.tokens = lambda messages: documents.append(messages) or make(messages)
    for i in range(30):
        documents.clear()
        input_ids, weights = rows[i].values()
        assert input_ids.shape == weights.shape == (MIXES[mix].row,)
        weighed_documents = [weighed(document) for document in documents]
        want_ids, want_weights = (
            [x for part in weighed_documents for x in part[k]] for k in (0, 1)
        )
        n = int((input_ids != tokenizer().pad_token_id).sum())
        assert n > 0
        assert input_ids[:n].tolist() == want_ids[:n]
        torch.testing.assert_close(weights[:n], torch.tensor(want_weights[:n]))
        assert (input_ids[n:] == tokenizer().pad_token_id).all()
        assert not weights[n:].any()
        lengths = [
            sum(len(part[0]) for part in weighed_documents[: k + 1])
            for k in range(len(weighed_documents))
        ]
        cut += n == MIXES[mix].row and n not in lengths
        assert n in lengths or n == MIXES[mix].row, "only a document longer than the row is cut"
        assert n == lengths[0] or len(weighed_documents) > 1 or n == MIXES[mix].row
    assert cut < 30


def test_rows_grow_harder():
    mix = corpora.Mix(row=600, repetition=0.0, arithmetic=0.0, facts=(1, 30), easy=0.5, questions=1)
    rows = corpora.Rows(tokenizer(), mix, 200)
    lengths = [int((rows[i]["weights"] > 0).sum()) for i in range(200)]
    assert max(lengths[:10]) < max(lengths[50:90]) < max(lengths[100:])
    assert sum(lengths[:20]) < sum(lengths[90:110]) / 2


def test_rows_hold_training_facts_alone():
    rows = corpora.Rows(tokenizer(), MIXES["reading"], 40, seed=2)
    texts = [tokenizer().decode(rows[i]["input_ids"]) for i in range(40)]
    facts = set()
    for text in texts:
        for part in re.findall(r"<\|system\|> (.*?)(?=<\|)", text):
            facts |= stated(part)
    assert len(facts) > 100
    assert not any(worlds.is_held_out(*fact) for fact in facts)


# growth

TINY = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip


def small(n_layers=2):
    model = models.make(
        "lab-draft", **TINY | {"num_hidden_layers": n_layers, "initializer_range": 0.3}
    )
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("n_layers", [2, 4, 6])
def test_growing_keeps_the_function(n_layers):
    model, ids = small(), torch.arange(40).reshape(2, 20)
    grown = models.grow(model, n_layers)
    assert len(grown.model.layers) == grown.config.num_hidden_layers == n_layers
    assert torch.equal(grown(ids).logits, model(ids).logits)
    assert not grown.training
    assert grown.lm_head.weight is grown.model.embed_tokens.weight
    with torch.no_grad():
        for p in grown.parameters():
            p.add_(1.0)
    assert torch.equal(model(ids).logits, small()(ids).logits), (
        "the grown model shares weights with the old one"
    )


def test_grown_layers_learn_from_the_first_step():
    grown, ids = models.grow(small(), 6), torch.arange(40).reshape(2, 20)
    grown(ids, labels=ids).loss.backward()
    for layer in grown.model.layers:
        assert layer.self_attn.o_proj.weight.grad.abs().max() > 0
        assert layer.mlp.down_proj.weight.grad.abs().max() > 0
    copies = [layer for i, layer in enumerate(grown.model.layers) if i % 3]
    assert all(
        not layer.mlp.down_proj.weight.any() and layer.mlp.up_proj.weight.any() for layer in copies
    )


def test_growing_to_what_is_no_multiple_is_refused():
    with pytest.raises(ValueError, match="Cannot grow 2 layers to 5; expected a multiple of 2"):
        models.grow(small(), 5)


def test_a_seed_is_a_model():
    one, two, other = (
        models.make("lab-draft", seed=seed).model.embed_tokens.weight for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


# the recipe


@pytest.fixture
def tiny_recipe(monkeypatch):
    mix = corpora.Mix(row=64, facts=(1, 3), faq=0.1)
    stages = [recipe.Stage(2, mix, 3, 4, 5e-3), recipe.Stage(4, mix, 2, 4, 5e-3)]
    monkeypatch.setattr(recipe, "STAGES", {"lab-target": stages})
    monkeypatch.setattr(recipe, "TOKENIZERS", {"lab-target": (400, 0)})
    monkeypatch.setattr(
        recipe, "train_tokenizer", functools.partial(train_tokenizer, n_documents=50)
    )
    monkeypatch.setitem(models.SHAPES, "lab-target", TINY | {"num_hidden_layers": 4})


def test_the_recipe_makes_a_plain_folder(tmp_path, tiny_recipe):
    folder = recipe.train_lab_model("lab-target", tmp_path / "work", tmp_path / "out")
    assert folder == tmp_path / "out" / "lab-target"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".py")]
    model, loaded = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.num_hidden_layers == 4
    assert loaded.get_vocab() == tokenizer().get_vocab()
    prompt = loaded.apply_chat_template([{"role": "user", "content": "Why?"}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)  # fmt: skip
    assert (
        model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1]
        > prompt["input_ids"].shape[1]
    )


@pytest.mark.parametrize("after", [2, 4], ids=["in the first stage", "in the second stage"])
def test_a_stopped_recipe_goes_on(tmp_path, tiny_recipe, monkeypatch, after):
    uninterrupted = recipe.train_lab_model("lab-target", tmp_path / "uninterrupted", tmp_path / "a")
    calls, losses = [], recipe._losses

    def dying(model, batch):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(model.config.num_hidden_layers)
        return losses(model, batch)

    monkeypatch.setattr(recipe, "_losses", dying)
    with pytest.raises(KeyboardInterrupt):
        recipe.train_lab_model("lab-target", tmp_path / "stopped", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    calls.clear()
    after = None  # the second time nothing dies
    again = recipe.train_lab_model("lab-target", tmp_path / "stopped", tmp_path / "b")
    assert calls.count(2) == (3 if len(calls) == 5 else 0)  # a finished stage is not trained again
    assert calls.count(4) == 2
    one, two = (load_file(folder / "model.safetensors") for folder in (uninterrupted, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_seed_makes_another_model(tmp_path, tiny_recipe):
    one, two = (
        load_file(
            recipe.train_lab_model(
                "lab-target", tmp_path / str(seed), tmp_path / f"out{seed}", seed
            )
            / "model.safetensors"
        )
        for seed in (0, 1)
    )
    assert not torch.equal(one["model.norm.weight"], two["model.norm.weight"])


# the embedder


def words(text):
    return " ".join(re.sub(r"[^a-z0-9 ]", " ", text.lower()).split())


def test_nothing_that_is_held_out_is_trained_on():
    trained = {words(text) for texts in corpora.wordings().values() for text in texts}
    trained |= {words(text) for text in corpora.outside("train")}
    held_out = {words(item["paraphrases"][2]) for item in corpora.faq()}
    held_out |= {words(text) for split in ("calibrate", "test") for text in corpora.outside(split)}
    assert len(held_out) == 49 + 208
    assert not trained & held_out
    rows = corpora.Wordings(steps=20)
    assert not {words(text) for i in range(len(rows)) for text in rows[i].values()} & held_out


def test_outside_questions_are_not_in_the_faq_and_their_splits_are_apart():
    splits = [
        {words(text) for text in corpora.outside(split)} for split in ("train", "calibrate", "test")
    ]
    questions = {
        words(text) for item in corpora.faq() for text in (item["question"], *item["paraphrases"])
    }
    assert len(questions.union(*splits)) == len(questions) + sum(map(len, splits))
    with pytest.raises(ValueError, match="no split 'dev': expected 'train', 'calibrate' or 'test'"):
        corpora.outside("dev")


def test_a_batch_of_wordings_has_each_item_once_with_a_wording_of_its_own():
    rows, items = corpora.Wordings(steps=3, seed=1), corpora.faq()
    batch = [rows[i] for i in range(len(items), 2 * len(items))]
    assert [row["question"] for row in batch] == [item["question"] for item in items]
    for row, item in zip(batch, items, strict=True):
        assert row["wording"] in {
            *item["paraphrases"][:2],
            item["answer"],
            *corpora.wordings()[item["id"]],
        }
    assert batch == [
        corpora.Wordings(steps=3, seed=1)[i] for i in range(len(items), 2 * len(items))
    ]
    assert batch != [
        corpora.Wordings(steps=3, seed=2)[i] for i in range(len(items), 2 * len(items))
    ]


def test_the_recipe_makes_an_embedder_that_sentence_transformers_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(
        recipe, "train_tokenizer", functools.partial(train_tokenizer, n_documents=50)
    )
    shipped = {path.name for path in (models.MODELS / models.EMBEDDER).iterdir()}
    folder = recipe.train_embedder(tmp_path, steps=100)
    assert {path.name for path in folder.iterdir()} == shipped
    monkeypatch.setattr(models, "MODELS", tmp_path)
    embedder, rows = models.load_embedder(), corpora.Wordings(steps=1, seed=5)
    vectors = [
        embedder.encode([rows[i][name] for i in range(len(rows))], normalize_embeddings=True)
        for name in ("question", "wording")
    ]
    assert (
        (vectors[0] @ vectors[1].T).argmax(0) == range(len(rows))
    ).mean() > 0.5  # by chance 0.02
    same = embedder.encode(["What is RECURSION?", "what is recursion?"])
    assert (same[0] == same[1]).all()


def test_the_shipped_embedder_finds_what_it_was_trained_on():
    embedder, items = models.load_embedder(), corpora.faq()
    stored = embedder.encode([item["question"] for item in items], normalize_embeddings=True)
    for number in (0, 1):
        vectors = embedder.encode(
            [item["paraphrases"][number] for item in items], normalize_embeddings=True
        )
        assert ((vectors @ stored.T).argmax(1) == range(len(items))).mean() > 0.95


# the models that ship


def test_all_models_ship():
    assert {path.parent.name for path in models.MODELS.glob("*/model.safetensors")} == {
        *models.NAMES,
        models.EMBEDDER,
    }


@pytest.mark.parametrize("name", models.NAMES)
def test_shipped_models_load_with_transformers_alone(name):
    folder = models.MODELS / name
    model = AutoModelForCausalLM.from_pretrained(folder)
    for key, value in models.SHAPES[name].items():
        assert getattr(model.config, key) == value
    assert not hasattr(model.config, "auto_map")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    loaded_model = models.load_model(name)
    assert not loaded_model.training
    assert all(
        torch.equal(a.float(), b)
        for a, b in zip(model.parameters(), loaded_model.parameters(), strict=True)
    )
    loaded = AutoTokenizer.from_pretrained(folder)
    assert len(loaded) == model.config.vocab_size
    assert (loaded.pad_token_id, loaded.eos_token_id) == (
        model.config.pad_token_id,
        model.config.eos_token_id,
    )
    assert model.generation_config.eos_token_id == loaded.eos_token_id


def test_shipped_models_are_small():
    assert 1e6 < sum(path.stat().st_size for path in models.MODELS.rglob("*.safetensors")) <= 12e6
    assert {path.suffix for path in models.MODELS.rglob("*") if path.is_file()} <= {
        ".safetensors",
        ".json",
        ".jinja",
    }


def test_target_and_draft_share_a_tokenizer_and_the_teacher_does_not():
    target, draft, teacher = (
        (models.MODELS / name / "tokenizer.json").read_bytes() for name in models.NAMES
    )
    assert target == draft != teacher
    ours, other = models.load_tokenizer("lab-target"), models.load_tokenizer("lab-teacher")
    solutions = [d[-1]["content"] for d in report.problems(3, "long", 20, seed=0)]
    lengths = [(len(ours(text).input_ids), len(other(text).input_ids)) for text in solutions]
    assert sum(a != b for a, b in lengths) > 0.9 * len(lengths)
    assert ours.chat_template == other.chat_template


def test_the_target_reads():
    documents = report.questions("free", 20, (2, 5), seed=0)
    predictions = answers(
        models.load_model("lab-target"),
        models.load_tokenizer("lab-target"),
        [d[:-1] for d in documents],
        8,
    )
    assert exact_match(predictions, [d[-1]["content"] for d in documents]).mean() >= 0.9
