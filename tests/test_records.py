"""Records from files: all formats say the same, values stay as written, and what does not fit is named."""

import json
import re
import warnings
from collections import Counter
from pathlib import Path

import datasets
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab import records
from kvlab.records import (
    ANSWER_KINDS,
    RECORDS,
    Record,
    accepted,
    extract_answer,
    faq,
    messages,
    read_prompts,
    read_records,
    same_answer,
)

DATA = Path(__file__).parent / "data"
PUBLISHED = Path(__file__).parents[2] / "shared/data"
CORPUS = PUBLISHED / "faq_chatterbot/english"
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def write(folder, name, content):
    path = folder / name
    path.write_text(content, "utf-8")
    return path


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1), TEXTS)
def test_any_text_comes_back_from_either_format(tmp_path_factory, pairs, domain):
    folder = tmp_path_factory.mktemp("records")
    records = [
        {"question": question, "answer": answer, "domain": domain} for question, answer in pairs
    ]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    corpus = {"categories": [domain], "conversations": [list(pair) for pair in pairs]}
    assert faq(write(folder, "a.jsonl", lines)) == records
    assert faq(write(folder, "a.yml", yaml.safe_dump(corpus))) == records


def test_only_the_fields_that_are_given_and_known(tmp_path):
    path = write(
        tmp_path,
        "a.jsonl",
        '\n{"question": "Who?", "id": "w-1", "paraphrases": [3], "answer": null}\n\n',
    )
    assert faq(path) == [{"question": "Who?", "id": "w-1"}]


@pytest.mark.parametrize("value", "22 3.10 yes No null ~ 1990-01-02 0x1F 1_000 12:30:45".split())
def test_yaml_values_are_text_as_written(value, tmp_path):
    path = write(
        tmp_path, "a.yaml", f"categories:\n- {value}\nconversations:\n- - {value}\n  - {value}\n"
    )
    assert faq(path) == [{"question": value, "answer": value, "domain": value}]


def test_each_reply_answers_the_first_text_and_the_first_category_is_the_domain(tmp_path):
    path = write(tmp_path, "a.yml", "categories: [AI, more]\nconversations: [[Q, A, B], [R, C]]")
    assert [(r["domain"], r["question"], r["answer"]) for r in faq(path)] == [
        ("AI", "Q", "A"),
        ("AI", "Q", "B"),
        ("AI", "R", "C"),
    ]


def test_a_folder_is_read_by_name_and_other_files_are_left_alone(tmp_path):
    write(tmp_path, "b.jsonl", '{"question": "Second?"}')
    write(tmp_path, "a.yml", "categories: [x]\nconversations: [[First, One]]")
    write(tmp_path, "LICENSE", "no records")
    assert [record["question"] for record in faq(tmp_path)] == ["First", "Second?"]


@pytest.mark.parametrize("alone", ["- Two little ducks? - '22'", "- - Two little ducks?"])
def test_a_conversation_without_an_answer_is_left_out_with_a_warning(alone, tmp_path):
    path = write(tmp_path, "a.yml", f"categories: [x]\nconversations:\n{alone}\n- - Q?\n  - A\n")
    with pytest.warns(
        UserWarning, match=r"a\.yml, entry 1 of 'conversations', is left out: [\"']Two little"
    ) as told:
        records = faq(path)
    assert records == [{"question": "Q?", "answer": "A", "domain": "x"}]
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"question": "A?", "ans', r"line 2 is '.*', expected a JSON object like"),
        ('["A?", "B"]', "line 2 is .*, expected a JSON object like"),
        ('{"answer": "B"}', "line 2 has no 'question'"),
        ('{"question": " "}', "line 2, has 'question' = ' ', expected a text"),
        ('{"question": "A?", "answer": 42}', "line 2, has 'answer' = 42, expected a text"),
        ('{"question": "A?", "domain": ["x"]}', r"line 2, has 'domain' = \['x'\], expected a text"),
        ('{"question": "A?", "id": 7}', "line 2, has 'id' = 7, expected a text"),
    ],
)
def test_a_broken_line_is_named(line, named, tmp_path):
    path = write(tmp_path, "a.jsonl", f'{{"question": "Fine?"}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl, {named}"):
        faq(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("categories: [", r"a\.yml is no YAML .*line 1, column 14"),
        ("- A\n- B", r"a\.yml holds .* expected a mapping with the lists"),
        ("conversations: [[A, B]]", "has 'categories' = 'None'"),
        ("categories: x\nconversations: [[A, B]]", "has 'categories' = 'x'"),
        ("categories: [x]\nconversations: []", r"has 'conversations' = '\[\]'"),
        (
            "categories: [[x]]\nconversations: [[A, B]]",
            r"'categories' beginning with \['x'\], expected a text",
        ),
        (
            "categories: [x]\nconversations: [[A, B], {C: D}]",
            "entry 2 of 'conversations', is .* a list of texts",
        ),
        (
            "categories: [x]\nconversations: [[A, B], []]",
            "entry 2 of 'conversations', is .* a list of texts",
        ),
        (
            "categories: [x]\nconversations: [[A, B: C]]",
            "entry 1 of 'conversations', has a text that is {'B': 'C'}",
        ),
        (
            "categories: [x]\nconversations:\n- - A\n  -\n",
            "entry 1 of 'conversations', has a text that is ''",
        ),
    ],
)
def test_a_broken_entry_is_named(content, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        faq(write(tmp_path, "a.yml", content))


def test_what_is_no_file_of_records_is_a_sentence(tmp_path):
    for path, said in (
        (tmp_path / "none.jsonl", "There is no file or folder"),
        (tmp_path, r"has no file that ends in \.jsonl, \.yml, \.yaml"),
        (write(tmp_path, "a.csv", "A?,B"), r"a\.csv ends in '\.csv', expected one of"),
    ):
        with pytest.raises(ValueError, match=said):
            faq(path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9?"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl is no text in UTF-8"):
        faq(tmp_path / "latin.jsonl")


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus is not here")
def test_the_chatterbot_corpus_has_2306_pairs():
    # 2026 conversations, one of them a lone text; 1946 of one reply, 79 of more.
    with pytest.warns(UserWarning, match=r"trivia\.yml, entry 14 .* 'In a game of bingo") as told:
        records = faq(CORPUS)
    assert len(told) == 1
    assert len(records) == 2306
    assert len({record["domain"] for record in records}) == 21
    assert {type(value) for record in records for value in record.values()} == {str}
    assert {len(record) for record in records} == {3}


# -- prompts


@pytest.mark.parametrize(
    "written",
    [
        "One.\n\n Two [a], b: c\n",
        '{"turns": ["One.", "More."], "id": 3}\n{"turns": ["Two [a], b: c"]}\n',
    ],
)
def test_prompt_files(written, tmp_path):
    (tmp_path / "prompts").write_text(written)
    assert read_prompts(tmp_path / "prompts") == ["One.", "Two [a], b: c"]


@pytest.mark.parametrize(
    "line", ['{"turns": []}', '{"turns": [3]}', '{"text": "Two."}', '{"turns": ["Tw', "Two.", "[1]"]
)
def test_a_broken_line_of_prompts_is_named(line, tmp_path):
    (tmp_path / "prompts").write_text(f'{{"turns": ["One."]}}\n\n{line}\n')
    with pytest.raises(ValueError, match=r"line 3 is .*, expected a JSON object like"):
        read_prompts(tmp_path / "prompts")


# -- a context to read: the files in data/ are invented texts in the forms that the data sets are published in

FILES = {
    "squad": ("squad_v1.json", "squad_v2.json"),
    "quality": ("QuALITY.invented.train",),
    "self_instruct": ("self_instruct.jsonl",),
    "p3": ("p3.jsonl",),
    "long_alpaca": ("long_alpaca.json",),
}
OURS = [(kind, DATA / name) for kind, names in FILES.items() for name in names]
REAL = [
    ("squad", "squad/dev-part-a.json"),
    ("self_instruct", "self_instruct/seed_tasks.jsonl"),
    ("self_instruct", "self_instruct/user_oriented_instructions.jsonl"),
    ("p3", "p3/adversarial_qa_dbert_answer_the_following_q.jsonl"),
    ("p3", "p3/adversarial_qa_dbert_based_on.jsonl"),
]
ABSENT = pytest.mark.skipif(not CORPUS.is_dir(), reason="the published files are not here")
EVERY = OURS + [pytest.param(kind, PUBLISHED / name, marks=ABSENT) for kind, name in REAL]


def of_kind(kind, params=EVERY):
    return [
        param
        for param in params
        if (param.values if hasattr(param, "values") else param)[0] == kind
    ]


def raw(path):
    text = path.read_text("utf-8")
    return (
        json.loads(text)
        if path.suffix == ".json"
        else [json.loads(line) for line in text.splitlines()]
    )


def read(kind, source):
    """Return the records, without the warning that counts those that are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RECORDS[kind](source)


def words(*texts):
    return Counter(" ".join(texts).split())


@pytest.mark.parametrize(("kind", "path"), EVERY)
def test_every_record_has_its_three_texts_and_of_choices_one_is_right(kind, path):
    found = read(kind, path)
    assert found
    for record in found:
        texts = [record.context, record.question, *record.answers, *record.choices]
        assert all(isinstance(text, str) and text.strip() for text in texts)
        assert record.answer == record.answers[0]
        assert len(set(record.answers)) == len(record.answers)
        assert not record.choices or (len(record.answers) == 1 and record.answer in record.choices)


@pytest.mark.parametrize(("kind", "path"), of_kind("squad"))
def test_squad_texts_are_as_written_so_that_offsets_hold(kind, path):
    paragraphs = [paragraph for article in raw(path)["data"] for paragraph in article["paragraphs"]]
    asked = [
        (paragraph["context"], qa)
        for paragraph in paragraphs
        for qa in paragraph["qas"]
        if qa["answers"]
    ]
    found = read(kind, path)
    assert [(r.context, r.question) for r in found] == [
        (context, qa["question"]) for context, qa in asked
    ]
    for record, (_, qa) in zip(found, asked, strict=True):
        assert record.answer == qa["answers"][0]["text"]
        assert set(record.answers) == {answer["text"] for answer in qa["answers"]}
        for answer in qa["answers"]:
            assert record.context[answer["answer_start"] :].startswith(answer["text"])


def test_questions_that_nothing_answers_are_left_out_with_one_warning():
    with pytest.warns(
        UserWarning, match=r"squad_v2\.json: 1 of 2 records are left out: 1 without answer"
    ) as told:
        found = records.squad(DATA / "squad_v2.json")
    assert len(told) == 1
    assert told[0].filename == __file__
    assert [record.answers for record in found] == [
        ("1960",)
    ]  # and no plausible answer stands in for one


def test_what_is_left_out_is_counted_by_what_it_lacks():
    asked = {"question": "Q", "answers": {"text": ["A"], "answer_start": [0]}}
    rows = [
        {"context": "C"} | asked,
        {"context": " "} | asked,
        {"context": "C"} | asked | {"question": ""},
    ]
    rows += [{"context": "C"} | asked | {"answers": {"text": [" "], "answer_start": [0]}}] * 2
    said = r"the list: 4 of 5 records are left out: 1 without context, 1 without question, 2 without answer\."
    with pytest.warns(UserWarning, match=said) as told:
        assert records.squad(rows) == [Record("C", "Q", ("A",))]
    assert len(told) == 1


def test_quality_counts_labels_from_one_and_the_writer_answers_where_no_vote_does():
    found = records.quality(DATA / "QuALITY.invented.train")
    assert [record.answer for record in found] == ["The oil", "Per", "Over the harbor", "Blue"]
    assert [len(record.choices) for record in found] == [4] * 4
    assert found[0].choices[1] == "The oil"


def test_quality_rows_of_the_hub_count_from_zero():
    row = {
        "article": "Kites fly.",
        "question": "What flies?",
        "options": ["A", "B", "C", "D"],
        "hard": True,
    }
    assert [records.quality([row | {"answer": i}])[0].answer for i in range(4)] == [
        "A",
        "B",
        "C",
        "D",
    ]
    assert records.quality([row | {"gold_label": 1, "writer_label": 2}])[0].answer == "A"


def test_quality_html_becomes_text_and_plain_text_stays():
    lamp, _, kite, _ = records.quality(DATA / "QuALITY.invented.train")
    paragraphs = [
        "THE LAMP",
        "Old Per & his lamp had kept the bay safe.",
        "One night, the oil ran out; 2 < 3 ships came home.",
    ]
    assert [" ".join(paragraph.split()) for paragraph in lamp.context.split("\n\n")] == paragraphs
    assert kite.context == raw(DATA / "QuALITY.invented.train")[1]["article"]
    plain = "if a < b and c > d: R&amp;D\n\n\n  (p < .05)"
    row = {"article": plain, "question": "Q", "options": ["A", "B", "C", "D"], "answer": 0}
    assert records.quality([row])[0].context == plain


@pytest.mark.parametrize(("kind", "path"), of_kind("self_instruct"))
def test_self_instruct_reads_the_input_and_keeps_the_instruction(kind, path):
    instances = [
        (row["instruction"], instance) for row in raw(path) for instance in row["instances"]
    ]
    given = [
        (instance["input"], asked, (instance["output"],))
        for asked, instance in instances
        if instance["input"]
    ]
    assert [(r.context, r.question, r.answers) for r in read(kind, path)] == given
    with pytest.warns(
        UserWarning,
        match=rf"{len(instances) - len(given)} of {len(instances)} records are left out",
    ):
        records.self_instruct(path)


@pytest.mark.parametrize(("kind", "path"), of_kind("p3"))
def test_p3_parts_a_prompt_and_loses_nothing(kind, path):
    rows = [row for row in raw(path) if "passage" in row["prompt"] or "context" in row["prompt"]]
    found = read(kind, path)
    assert len(found) == len(rows)
    for record, row in zip(found, rows, strict=True):
        assert words(record.context, record.question) == words(row["prompt"])
        assert record.answer + "<|endoftext|>" == row["completion"]
        assert record.answer in record.context
        assert "Question: " not in record.context
        assert len(record.question) < 250


TALE = (
    "Mira walked to the lake, and there she found the ring that her brother had lost a year before."
)


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        (
            f"Given the context:\n\n{TALE}\n\nanswer:\n\nWhat was lost?\n",
            "Given the context:\n\nanswer:\n\nWhat was lost?",
        ),
        (
            f"What was lost?\n\nUse the text below.\n\n{TALE}",
            "What was lost?\n\nUse the text below.",
        ),
        (f"Question: What was lost?\nstory: {TALE}\nAnswer:", "Question: What was lost?\nAnswer:"),
        (f"{TALE}\nWhat does the story say was lost?", "What does the story say was lost?"),
        ("What was lost in the story that Mira told?", None),
        ("Question: What do people write with?\n\nAnswer:", None),
        ("Question: Which text is the longest of all the texts?\n\nOptions: a, b", None),
    ],
)
def test_p3_finds_the_passage_wherever_it_stands(prompt, question):
    rows = [
        {
            "inputs_pretokenized": prompt,
            "targets_pretokenized": "\nthe ring\n",
            "inputs": [3],
            "targets": [4],
        }
    ]
    found = read("p3", rows)
    assert [record.question for record in found] == ([] if question is None else [question])
    for record in found:
        assert record.context.removeprefix("story: ") == TALE
        assert record.answers == ("the ring",)


def test_p3_choices_and_no_wrong_target():
    row = {"inputs_pretokenized": f"{TALE}\n\nIs the text true?", "answer_choices": [" Yes", "No"]}
    rows = [row | {"targets_pretokenized": t, "is_correct": t == "No"} for t in ("Yes", "No")]
    assert [(r.answers, r.choices) for r in records.p3(rows)] == [(("No",), ("Yes", "No"))]
    assert records.p3([row | {"targets_pretokenized": "Perhaps"}])[0].choices == ()


def test_long_alpaca_is_cut_behind_the_last_end_or_before_the_last_paragraph():
    path = DATA / "long_alpaca.json"
    with pytest.warns(
        UserWarning, match=r"long_alpaca\.json: 1 of 6 records are left out: 1 without context"
    ):
        found = records.long_alpaca(path)
    assert [(record.context.split("\n")[-1], record.question) for record in found] == [
        (" Now the paper ends.", "What did the snails do?"),
        (" Now the second paper ends.", "How do the\n\ntwo papers differ?"),
        (" Now the material ends.", "Question: Was it open?"),
        ("A week has seven days.", "How many eggs are laid in a week?"),
        ("snail", "Translate the word to German."),
    ]
    for record, row in zip(found, raw(path), strict=False):
        whole = f"{row['instruction']} {row.get('input', '')}"
        assert words(record.context, record.question) == words(whole)
        assert record.answers == (row["output"],)


# -- the hub


ANSWERS = {"text": ["one"], "answer_start": [2]}
HUB = {
    "squad": {"id": "1", "title": "T", "context": "C one.", "question": "Q", "answers": ANSWERS},
    "quality": {
        "article": "C one.",
        "question": "Q",
        "options": ["a", "b", "one", "d"],
        "answer": 2,
        "hard": False,
    },
    "self_instruct": {
        "id": "1",
        "instruction": "Q",
        "instances": {"input": ["C one."], "output": ["one"]},
    },
    "p3": {
        "inputs": [1],
        "inputs_pretokenized": "Text: C one.\n\nQ",
        "targets": [2],
        "targets_pretokenized": "one",
    },
    "long_alpaca": {"instruction": "C one.\n\nQ", "input": None, "output": "one", "file": "f"},
}
READ = dict.fromkeys(HUB, Record("C one.", "Q", ("one",)))
FOUR = {"A": "a", "B": "b", "C": "one", "D": "d"}
# Of each kind a row of the hub, what it says, and the same row in the form of the original file.
PROBLEMS = {
    "gsm8k": (
        {
            "question": "Q",
            "answer": "It is 3-2 = <<3-2=1>>1.\nSo 0+1 = $<<0+1=1>>1 or <<1=1>>1.\n#### 1",
        },
        Record("", "Q", ("1",), reasoning="It is 3-2 = 1.\nSo 0+1 = $1 or 1."),
        (
            "a.jsonl",
            '{"question": "Q", "answer": "It is 3-2 = <<3-2=1>>1.\\nSo 0+1 = $<<0+1=1>>1 or <<1=1>>1.\\n#### 1"}\n',
        ),
    ),
    "svamp": (
        {
            "ID": "1",
            "Body": "B. ",
            "Question": "Q",
            "Answer": "1.0",
            "Equation": "( 3.0 - 2.0 )",
            "Type": "S",
        },
        Record("", "B. Q", ("1",), reasoning="( 3.0 - 2.0 )"),
        ("a.json", '[{"Body": "B.", "Question": "Q", "Answer": 1.0, "Equation": "( 3.0 - 2.0 )"}]'),
    ),
    "math23k": (
        {
            "id": "1",
            "original_text": "Q",
            "equation": "x=25%",
            "ans": "25%",
        },  # codespell:ignore ans
        Record("", "Q", ("25%",), reasoning="x=25%"),
        (
            "a.json",
            '{\n "original_text":"Q",\n "equation":"x=25%",\n "ans":"25%"\n}\n' * 3,
        ),  # codespell:ignore ans
    ),
    "math": (
        {"problem": "Q", "solution": r"$\boxed{2}$ or $\boxed{\sqrt{\frac{1}{2}}}$."},
        Record(
            "",
            "Q",
            (r"\sqrt{\frac{1}{2}}",),
            reasoning=r"$\boxed{2}$ or $\boxed{\sqrt{\frac{1}{2}}}$.",
        ),
        (
            "a.jsonl",
            r'{"problem": "Q", "solution": "$\\boxed{2}$ or $\\boxed{\\sqrt{\\frac{1}{2}}}$."}',
        ),
    ),
    "strategyqa": (
        {"question": "Q", "answer": False, "facts": "F. G."},
        Record("", "Q", ("no",), reasoning="F. G."),
        ("a.json", '[{"question": "Q", "answer": false, "facts": ["F.", "G."], "evidence": []}]'),
    ),
    "hotpotqa": (
        {
            "context": {"title": ["T", "U"], "sentences": [["C.", " D."], ["E."]]},
            "question": "Q",
            "answer": "1",
        },
        Record("T\nC. D.\n\nU\nE.", "Q", ("1",)),
        (
            "a.json",
            '[{"context": [["T", ["C.", " D."]], ["U", ["E."]]], "question": "Q", "answer": "1"}]',
        ),
    ),
    "bbh": (
        {"input": "Q", "target": "(A)"},
        Record("", "Q", ("(A)",)),
        ("a.json", '{"canary": "c", "examples": [{"input": "Q", "target": "(A)"}]}'),
    ),
    "arc": (
        {
            "question": "Q",
            "choices": {"text": ["a", "one", "c"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        Record("", "Q", ("one",), ("a", "one", "c")),
        (
            "a.jsonl",
            '{"question": {"stem": "Q", "choices": [{"text": "a", "label": "A"}, {"text": "one", "label": "B"}, '
            '{"text": "c", "label": "C"}]}, "answerKey": "B"}',
        ),
    ),
    "gpqa": (
        {f"Incorrect Answer {i}": str(i) for i in (1, 2, 3)}
        | {"Question": "Q\n", "Correct Answer": "one\n"},
        Record("", "Q", ("one",), ("2", "3", "1", "one")),
        (
            "a.csv",
            "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Explanation\n"
            'Q,"one\n",1,2,3,"E, ""F"""\n',
        ),
    ),
    "truthfulqa": (
        {"question": "Q", "mc1_targets": {"choices": ["one", "a", "b"], "labels": [1, 0, 0]}},
        Record("", "Q", ("one",), ("a", "one", "b")),
        (
            "a.json",
            '[{"question": "Q", "mc1_targets": {"a": 0, "one": 1, "b": 0}, "mc2_targets": {}}]',
        ),
    ),
    "cmmlu": (
        {"Question": "Q", "Answer": "C"} | FOUR,
        Record("", "Q", ("one",), ("a", "b", "one", "d")),
        ("a.csv", ",Question,A,B,C,D,Answer\n0,Q,a,b,one,d,C\n"),
    ),
    "ceval": (
        {"id": 0, "question": "Q", "answer": "C", "explanation": ""} | FOUR,
        Record("", "Q", ("one",), ("a", "b", "one", "d")),
        ("a.csv", "id,question,A,B,C,D,answer\n0,Q,a,b,one,d,C\n"),
    ),
}
PROBLEMS["math500"] = PROBLEMS["math"]
HUB |= {kind: row for kind, (row, _, _) in PROBLEMS.items()}
READ |= {kind: record for kind, (_, record, _) in PROBLEMS.items()}


@pytest.mark.parametrize("kind", RECORDS)
def test_what_is_no_file_comes_from_the_hub(kind, monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list([HUB[kind]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (record,) = read_records(kind, "some/set:part", split="validation[:1]")
    assert asked == [(("some/set", "part"), {"split": "validation[:1]"})]
    assert (record.answer, record.question) == (READ[kind].answer, READ[kind].question)
    assert record.context.removeprefix("Text: ") == READ[kind].context
    assert read_records(kind, Path("some/set")) == [record]
    assert asked[1] == (("some/set",), {"split": "train"})


def test_squad_v2_of_the_hub_has_empty_answers(monkeypatch):
    row = HUB["squad"]
    rows = [row, row | {"answers": {"text": [], "answer_start": []}}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    with pytest.warns(
        UserWarning, match=r"some/set, split 'train': 1 of 2 records are left out: 1 without answer"
    ) as told:
        assert len(read_records("squad", "some/set")) == 1
    assert told[0].filename == __file__


@pytest.mark.parametrize(("kind", "path"), OURS)
def test_a_file_is_read_and_the_hub_is_not_asked(kind, path, monkeypatch):
    monkeypatch.delattr(datasets, "load_dataset")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_records(kind, str(path)) == read(kind, path)


@pytest.mark.parametrize(
    "error",
    [ConnectionError("cannot reach"), ValueError("Unknown split"), FileNotFoundError("none")],
)
def test_neither_file_nor_hub_is_a_sentence(error, monkeypatch):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError,
        match=rf"no file some/set, and the .* hub gave no .* 'test' \(it says: {error}\)",
    ):
        read_records("squad", "some/set", "test")


def test_a_missing_json_file_is_not_looked_for_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.delattr(datasets, "load_dataset")
    for name in ("squad/dev.json", "rows.jsonl", "gpqa_main.csv"):
        with pytest.raises(ValueError, match=f"There is no file {name}: give a file"):
            read_records("squad", name)
    with pytest.raises(ValueError, match=r"There is no file .*QuALITY"):
        records.quality(tmp_path / "QuALITY")
    with pytest.raises(
        ValueError,
        match="kind 'sqad': expected one of squad, quality, self_instruct, p3, long_alpaca",
    ):
        read_records("sqad", "rows.jsonl")


# -- what does not fit


def spoil(value, keys, new):
    """Return a copy with another value, or none if `new` is ..., where the keys lead."""
    if not keys:
        return new
    key, *rest = keys
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[key] = spoil(value[key] if rest else None, rest, new)
    if changed[key] is ...:
        del changed[key]
    return changed


SPOILED = [
    ("squad", "data", None, r"holds .*, expected a list of rows, or a mapping with such a list in 'data'"),
    ("squad", "data 1", "Brandt", "article 2 is 'Brandt', expected a mapping"),
    ("squad", "data 1 paragraphs", ..., "article 2 has no 'paragraphs', expected a list"),
    ("squad", "data 0 paragraphs 0 context", ..., "article 1, paragraph 1 has no 'context', expected a text"),
    ("squad", "data 0 paragraphs 0 qas", {}, "article 1, paragraph 1 has 'qas' = '{}', expected a list"),
    ("squad", "data 0 paragraphs 0 qas 1 question", 3, "article 1, paragraph 1, question 2 has 'question' = '3'"),
    ("squad", "data 0 paragraphs 0 qas 1 answers", ..., "article 1, paragraph 1, question 2 has no 'answers'"),
    ("squad", "data 0 paragraphs 0 qas 0 answers 2 text", 5, r".*, paragraph 1, question 1, answer 3 has 'text' = '5'"),
    ("quality", "1 article", ..., "line 2 has no 'article', expected a text"),
    ("quality", "1 questions", ..., "line 2 has no 'questions', expected a list"),
    ("quality", "0 questions 1 question", ..., "line 1, question 2 has no 'question', expected a text"),
    ("quality", "0 questions 1 options 3", ..., r"line 1, question 2 has 'options' = .*, expected four texts"),
    ("quality", "0 questions 1 options 3", 7, r"line 1, question 2 has 'options' = .*, expected four texts"),
    ("quality", "0 questions 1 gold_label", 0, "line 1, question 2 has 'gold_label' = 0, expected 1 to 4"),
    ("quality", "0 questions 1 gold_label", 5, "line 1, question 2 has 'gold_label' = 5, expected 1 to 4"),
    ("quality", "0 questions 1 gold_label", "B", "line 1, question 2 has 'gold_label' = 'B', expected a whole number"),
    ("quality", "1 questions 1 writer_label", ..., "line 2, question 2 has no 'gold_label', expected a whole number"),
    ("self_instruct", "1", ["a"], "line 2 is .*, expected a JSON object"),
    ("self_instruct", "1 instruction", ..., "line 2 has no 'instruction', expected a text"),
    ("self_instruct", "1 instances", "a", "line 2 has 'instances' = 'a', expected a list"),
    ("self_instruct", "0 instances 1", "a", "line 1, instance 2 is 'a', expected a mapping"),
    ("self_instruct", "0 instances 1 input", ..., "line 1, instance 2 has no 'input', expected a text"),
    ("self_instruct", "0 instances 1 output", 4, "line 1, instance 2 has 'output' = '4', expected a text"),
    ("p3", "2 prompt", ..., "line 3 has no 'prompt', expected a text"),
    ("p3", "2 completion", None, "line 3 has 'completion' = 'None', expected a text"),
    ("p3", "2 inputs_pretokenized", "a", "line 3 has no 'targets_pretokenized', expected a text"),
    ("long_alpaca", "", "rows", "holds 'rows', expected a list of rows"),
    ("long_alpaca", "3", 8, "row 4 is '8', expected a mapping"),
    ("long_alpaca", "3 instruction", ..., "row 4 has no 'instruction', expected a text"),
    ("long_alpaca", "3 input", ["a"], r"row 4 has 'input' = .*, expected a text"),
    ("long_alpaca", "3 output", ..., "row 4 has no 'output', expected a text"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "where", "new", "named"), SPOILED)
def test_what_does_not_fit_is_named_by_file_row_and_field(kind, where, new, named, tmp_path):
    ours = DATA / FILES[kind][0]
    keys = [int(key) if key.isdigit() else key for key in where.split()]
    given = spoil(raw(ours), keys, new)
    text = (
        json.dumps(given) if ours.suffix == ".json" else "\n".join(json.dumps(row) for row in given)
    )
    with pytest.raises(ValueError, match=rf"{ours.name},? {named}"):
        read(kind, write(tmp_path, ours.name, text))


@pytest.mark.parametrize(
    ("kind", "row", "named"),
    [
        (
            "squad",
            {"question": "Q", "answers": {"text": ["A"]}},
            "the list, row 2 has no 'context', expected a text",
        ),
        (
            "squad",
            HUB["squad"] | {"answers": {"text": "A"}},
            "row 2 has 'answers' = .*, expected a list",
        ),
        (
            "squad",
            HUB["squad"] | {"answers": {"text": ["A"], "answer_start": []}},
            "row 2 has 'answers' = .* a list",
        ),
        ("quality", HUB["quality"] | {"answer": 4}, "row 2 has 'answer' = 4, expected 0 to 3"),
        ("quality", HUB["quality"] | {"answer": -1}, "row 2 has 'answer' = -1, expected 0 to 3"),
        ("p3", "a prompt", "row 2 is 'a prompt', expected a mapping"),
    ],
)
def test_a_row_that_does_not_fit_is_named(kind, row, named):
    with pytest.raises(ValueError, match=named):
        read(kind, [HUB[kind], row])


def test_lines_in_a_json_file_are_a_sentence(tmp_path):
    with pytest.raises(
        ValueError, match=r"a\.json is no JSON \(Extra data.*line 2.*call it \.jsonl"
    ):
        records.long_alpaca(write(tmp_path, "a.json", '{"instruction": "a"}\n{"instruction": "b"}'))


# -- problems: the rows above, in the forms that the data sets are published in


@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_problem_says_the_same_on_the_hub_and_in_the_original_file(kind, tmp_path):
    row, record, (name, text) = PROBLEMS[kind]
    assert RECORDS[kind]([row]) == [record]
    assert read_records(kind, write(tmp_path, name, text)) == [record] * (
        text.count("original_text") or 1
    )
    assert ANSWER_KINDS[kind] in EXTRACTED
    assert RECORDS[kind].__name__ in kind


@pytest.mark.parametrize("kind", ["gsm8k", "cmmlu"])
def test_a_problem_without_a_question_is_left_out_and_none_needs_a_context(kind):
    row = HUB[kind]
    with pytest.warns(
        UserWarning, match="the list: 1 of 2 records are left out: 1 without question"
    ) as told:
        assert RECORDS[kind]([row, row | {"question": " ", "Question": " "}]) == [READ[kind]]
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("((13)/(120))", "13/120"),
        ("(1/3)", "1/3"),
        ("1(1/2)", "1(1/2)"),
        ("2((3)/(4))", "2(3/4)"),
        ("7.50", "7.50"),
    ],
)
def test_fractions_of_math23k(given, answer):
    row = {"original_text": "Q", "equation": "x=1", "ans": given}  # codespell:ignore ans
    assert records.math23k([row])[0].answer == answer


@pytest.mark.parametrize("letter", "ABCD")
def test_the_letter_is_that_of_the_right_choice(letter):
    for kind, field in (("cmmlu", "Answer"), ("ceval", "answer")):
        (record,) = RECORDS[kind]([HUB[kind] | {field: letter}])
        assert (record.letter, record.answer) == (letter, FOUR[letter])
    with pytest.raises(ValueError, match="'Q' has no choices, so no letter"):
        _ = READ["gsm8k"].letter


def test_the_right_option_stands_anywhere_but_always_in_the_same_place():
    row = HUB["gpqa"]
    rows = [row | {"Question": f"Q {i}"} for i in range(400)]
    found = records.gpqa(rows)
    assert found == records.gpqa(rows)
    counts = Counter(record.letter for record in found)
    assert all(60 < counts[letter] < 140 for letter in "ABCD")  # 100 each, five standard deviations
    swapped = {"Incorrect Answer 1": "3", "Incorrect Answer 3": "1"}
    assert (
        records.gpqa([other | swapped for other in rows]) == found
    )  # nor does the order of the wrong ones count
    asked = [
        {"question": f"Q {i}", "mc1_targets": {"one": 1, "1": 0, "2": 0, "3": 0}}
        for i in range(400)
    ]
    assert records.truthfulqa(asked) == found


SPOILED_PROBLEMS = [
    ("gsm8k", "answer", "It is 1.", "has 'answer' = 'It is 1.', expected a solution with ####"),
    ("gsm8k", "answer", "So 1.\n#### one", "has 'answer' = 'one', expected a number"),
    ("gsm8k", "question", ..., "has no 'question', expected a text"),
    ("svamp", "Answer", [1], r"has 'Answer' = '\[1\]', expected a number"),
    ("svamp", "Answer", True, "has 'Answer' = 'True', expected a number"),
    ("svamp", "Body", ..., "has no 'Body', expected a text"),
    ("svamp", "Equation", None, "has 'Equation' = 'None', expected a text"),
    ("math23k", "equation", ..., "has no 'equation', expected a text"),
    ("math23k", "ans", "?", r"has 'ans' = '\?', expected a number"),  # codespell:ignore ans
    ("math", "solution", "It is 1.", r"has 'solution' = 'It is 1.', expected an answer in \\boxed\{\}"),
    ("math", "solution", r"\boxed{1", r"has 'solution' = .*, expected an answer in \\boxed\{\}"),
    ("math", "problem", ..., "has no 'problem', expected a text"),
    ("strategyqa", "answer", "yes", "has 'answer' = 'yes', expected true or false"),
    ("strategyqa", "facts", ..., "has no 'facts', expected a list"),
    ("strategyqa", "facts", ["F.", 1], "has 'facts' = .*, expected a list of texts"),
    ("hotpotqa", "context", [["T", ["C."]], "U"], "paragraph 2 is 'U', expected a mapping"),
    ("hotpotqa", "context", [["T"]], "paragraph 1 has no 'sentences', expected a list"),
    ("hotpotqa", "context", ..., "has no 'context', expected a list"),
    ("hotpotqa", "answer", ..., "has no 'answer', expected a text"),
    ("bbh", "target", True, "has 'target' = 'True', expected a text"),
    ("arc", "answerKey", "4", "has 'answerKey' = '4', expected one of 1, 2, 3"),
    ("arc", "question", {"stem": 3}, "has 'stem' = '3', expected a text"),
    ("arc", "question", {"stem": "Q"}, "has no 'choices', expected a list"),
    ("arc", "choices", [{"text": "a"}], "choice 1 has no 'label', expected a text"),
    ("gpqa", "Incorrect Answer 3", None, "has 'Incorrect Answer 3' = 'None', expected a text"),
    ("truthfulqa", "mc1_targets", ["a"], "has 'mc1_targets' = .*, expected a mapping"),
    ("truthfulqa", "mc1_targets", {"choices": ["a", "b"], "labels": [1, 1]}, r"has 'labels' = '\[1, 1\]'"),
    ("truthfulqa", "mc1_targets", {"choices": ["a", "b"], "labels": [1]}, r"has 'labels' = '\[1\]', expected one"),
    ("truthfulqa", "mc1_targets", {"choices": ["a", 2], "labels": [1, 0]}, "has 'choices' = .* a list of texts"),
    ("cmmlu", "B", ..., "has no 'B', expected a text"),
    ("cmmlu", "Answer", "E", "has 'Answer' = 'E', expected one of A, B, C, D"),
    ("ceval", "answer", "", "has 'answer' = '', expected one of A, B, C, D"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "field", "new", "named"), SPOILED_PROBLEMS)
def test_a_problem_that_does_not_fit_is_named(kind, field, new, named):
    with pytest.raises(ValueError, match=f"the list, row 2,? {named}"):
        RECORDS[kind]([HUB[kind], spoil(HUB[kind], [field], new)])


def test_a_broken_row_of_a_file_is_named(tmp_path):
    header = "Question,A,B,C,D,Answer\nQ,a,b,c,d,A\n"
    for kind, name, text, named in (
        ("cmmlu", "a.csv", f"{header}Q,a,b\n", r"a\.csv, row 2 has 'C' = 'None', expected a text"),
        ("bbh", "a.json", '{"examples": [{"input": "Q"}]}', r"a\.json, example 1 has no 'target'"),
        (
            "bbh",
            "b.json",
            '{"examples": "Q"}',
            r"b\.json holds .*, expected a list of rows, .* or 'examples'",
        ),
    ):
        with pytest.raises(ValueError, match=named):
            RECORDS[kind](write(tmp_path, name, text))


GSM8K = pytest.mark.skipif(
    not (PUBLISHED / "gsm8k").is_dir(), reason="the published files are not here"
)


@GSM8K
@pytest.mark.parametrize(("name", "count"), [("train", 1500), ("dev", 500)])
def test_of_gsm8k_every_solution_says_its_answer(name, count):
    path = PUBLISHED / f"gsm8k/{name}.jsonl"
    found = records.gsm8k(path)
    assert len(found) == count
    for record, row in zip(found, raw(path), strict=True):
        assert record.question == row["question"]
        assert record.answer == row["answer"].split()[-1].replace(",", "")
        assert not re.search("<<|>>|####", record.reasoning)
        said = f"{record.reasoning}\nThe answer is ${record.answer}. That is all 2 asked."
        for solution in (row["answer"], said, said.replace("The answer is", "####")):
            assert extract_answer("number", solution) == record.answer


# -- answers in generated texts

EXTRACTED = {
    "number": [
        ("She has 5 cats.\n#### 1,234", "1234"),
        ("#### $-3.50 ", "-3.50"),
        ("#### 18\nQuestion: 7 dogs", "18"),
        ("The answer is 18. She sold 3.", "18"),
        ("The answer is 5? No, the answer is 6, not 7.", "6"),
        ("The answer is 18. To check: 3 * 6 = 19.", "18"),
        ("The answer is 3 + 4 = 7 dollars for 2 days.", "7"),
        ("So 2 + 2 = 4. The final answer is:\n\n**4**", "4"),
        ("**Answer:** 5 of 7", "5"),
        ("The answer to the question is 12 apples", "12"),
        ("First 3, so the answer is clear: he pays 20", "20"),
        ("The answer is obvious. He pays $20.", "20"),
        (r"Adding, \boxed{18\text{ of } 20} and 7", "18"),
        (r"$\boxed{1\frac{1}{2}}$ hours", "1 1/2"),
        (r"It is $\$1{,}234$", "1234"),
        (r"\boxed{1,\!234,\!567}", "1234567"),
        (r"\boxed{25\%}", "25%"),
        ("a 10-5", "5"),
        ("共-5度", "-5"),
        ("at −5", "-5"),
        ("答案是5元，不是6元。", "5"),
        ("所以答案应该是：(3/8)", "3/8"),
        ("答：一共5元，3人。", "5"),
        ("25％", "25%"),
        ("half, .5.", ".5"),
        ("1, 2, 3", "3"),
        ("11,12", "12"),
        ("none", ""),
        ("1/0", "0"),
    ],
    "math": [
        (r"so $\boxed{1}$, no, $\boxed{\frac{1}{\sqrt{2}}}$ or 3", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"is $\boxed 5$.", "5"),
        (r"is \fbox{5}.", "5"),
        (r"The final answer is $\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
        ("The answer is 0.5.", "0.5"),
        ("所以答案是$x^2$。谢谢", "x^2"),
        (r"Cut off: the answer is 7, \boxed{7", "7, \\boxed{7"),
        ("5", "5"),
        ("", ""),
    ],
    "choice": [
        ("The answer is (B).", "B"),
        ("Answer: C.", "C"),
        ("**Answer:** D", "D"),
        ("The correct answer is: **B. Paris**", "B"),
        ("The correct option is (c)", "C"),
        ("The answer is option D", "D"),
        ("I think A or B; the answer is B because A is cold.", "B"),
        ("The answer is A because dogs bark.", "A"),
        ("The answer is A.", "A"),
        ("The answer is A dog.", ""),
        ("A dog barks.", ""),
        ("Answer: I guess so", ""),
        ("Answer: Ann", ""),
        ("B", "B"),
        ("B. The heart of A", "B"),
        ("C) Paris\n(A) is wrong", "C"),
        ("D\nExplanation: (A) is wrong.", "D"),
        ("(A) is cold. (B) is hot.", "B"),
        (r"Thus $\boxed{\text{(D)}}$, not (A)", "D"),
        ("答案是B", "B"),
        ("因此正确答案为：（C）。", "C"),
        ("故选：D。", "D"),
        ("所以选择A项，A正确", "A"),
        ("答案选项是C", "C"),
        ("I do not know.", ""),
    ],
    "yes_no": [
        ("There is no doubt that cats purr. So the answer is yes.", "yes"),
        ("Yes, there is no doubt.", "yes"),
        ("No\n", "no"),
        ("No one knows all. Still, yes.", "yes"),
        ("Answer: True", "yes"),
        ("it is **False**", "no"),
        ("Nobody knows yesterday.", ""),
    ],
    "text": [
        ("Let us think. So the answer is (B).", "(B)"),
        ("the answer is apple banana.\n\nQ: next", "apple banana"),
        ("Reasons.\nvalid.", "valid"),
        ("The answer is St. Ives.", "St. Ives"),
        (r"\boxed{24}", "24"),
        ("Answer: ] ) >", "] ) >"),
        ("", ""),
    ],
}


@pytest.mark.parametrize(
    ("kind", "text", "answer"), [(k, *pair) for k, pairs in EXTRACTED.items() for pair in pairs]
)
def test_the_answer_of_a_text(kind, text, answer):
    assert extract_answer(kind, text) == answer
    assert same_answer(kind, answer, extract_answer(kind, answer)) == bool(
        answer
    )  # an answer answers itself
    assert not same_answer(kind, answer, "")


PIECES = r"answer is: 答案是 #### \boxed{ \boxed } { ( ) (B) A 选 yes no x \ \frac{1}{2} 1 0 - . , / % $ = \!".split()
PIECES += [" ", "\n"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.lists(st.sampled_from(PIECES)).map("".join),
)
def test_no_text_is_too_strange_and_sameness_has_no_sides(one, two):
    for kind in EXTRACTED:
        a, b = extract_answer(kind, one), extract_answer(kind, two)
        assert same_answer(kind, a, b) == same_answer(kind, b, a)
        if kind in ("number", "choice", "yes_no"):
            assert extract_answer(kind, a) == a
            assert same_answer(kind, a, a) == bool(a)


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(1, 400))
def test_a_number_is_the_same_however_it_is_written(whole, parts):
    number = f"{whole}/{parts}"
    assert extract_answer("number", f"It is {whole:,} by 7.\n#### {whole:,}") == str(whole)
    for kind in ("number", "math"):
        assert same_answer(kind, number, f"{3 * whole}/{3 * parts}")
        assert not same_answer(kind, number, f"{whole + 1}/{parts}")
        assert same_answer(kind, str(whole), f"{whole:,}.00")
        assert same_answer(kind, f"{whole / 8}", f"{whole}/8")
    latex = rf"{'-' * (whole < 0)}\frac{{{abs(whole)}}}{{{parts}}}"
    assert same_answer("math", number, latex)
    assert same_answer("number", number, extract_answer("number", rf"is $\boxed{{{latex}}}$"))


NESTED = st.recursive(
    st.sampled_from(["x", "1", r"\{", r"\\", " ", r"\pi"]),
    lambda inner: st.one_of(inner.map("{{{}}}".format), st.tuples(inner, inner).map("".join)),
)


@settings(max_examples=100, deadline=None)
@given(NESTED, NESTED)
def test_a_box_holds_whatever_is_balanced(first, last):
    text = rf"So $\boxed{{{first}}}$ and $\boxed{{{last}}}$, where {{x}} is 1."
    if last.strip():
        assert extract_answer("math", text) == last.strip()


SAME = [
    ("number", "50%", "50", True),
    ("number", "50%", "0.5", True),
    ("number", "50%", "1/2", True),
    ("number", "50", "0.5", False),
    ("number", "150%", "1(1/2)", True),
    ("number", "-1 1/2", "-1.5", True),
    ("number", "0.33", "1/3", False),
    ("number", "$1,000.00", "1000", True),
    ("number", "1000", "100", False),
    ("number", "9" * 9999, "9", False),
    ("math", r"\dfrac12", r"\frac{1}{2}", True),
    ("math", r"\tfrac{3}4", "0.75", True),
    ("math", r"\frac{\sqrt3}{2}", r"\frac{\sqrt{3}}{2}", True),
    ("math", r"\left( 1, \frac12 \right]", r"(1,\frac{1}{2}]", True),
    ("math", "(1,234)", "1234", False),
    ("math", "(1,2)", "(2,1)", False),
    ("math", "12{,}345", r"12,\!345", True),
    ("math", r"$5\text{ cm}^2$", "5", True),
    ("math", r"5\ \mathrm{cm}", "5.", True),
    ("math", r"\text{east}", "east", True),
    ("math", r"\text{even}", r"\text{odd}", False),
    ("math", r"90^\circ", "90", True),
    ("math", r"x = \sqrt 2", r"\sqrt{2}", True),
    ("math", "y=x+1", "x+1", True),
    ("math", ".5", "0.5", True),
    ("math", r"50\%", "50", True),
    ("math", r"\$50", "50", True),
    ("math", "3 1/2", "31/2", False),
    ("math", r"3\frac{1}{2}", "3.5", True),
    ("math", r"\leftarrow", "arrow", False),
    ("math", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
    ("math", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}12\end{pmatrix}", False),
    ("math", "-2", "2", False),
    ("choice", "(b)", "B", True),
    ("choice", "A", "B", False),
    ("yes_no", "Yes", "yes", True),
    ("text", "(A)", "a", True),
    ("text", "Apple  banana.", "apple banana", True),
    ("text", "The Cat", "cat", False),
    ("text", "( )", "( ) )", False),
    ("text", ") ]", "] )", False),
]


@pytest.mark.parametrize(("kind", "one", "two", "same"), SAME)
def test_what_is_the_same_answer(kind, one, two, same):
    assert same_answer(kind, one, two) is same
    assert same_answer(kind, two, one) is same


@pytest.mark.parametrize(
    "function", [extract_answer, lambda kind, text: same_answer(kind, text, text)]
)
def test_an_unknown_kind_of_answer_is_named(function):
    with pytest.raises(
        ValueError, match="kind 'letter': expected one of number, math, choice, yes_no, text"
    ):
        function("letter", "A")


# -- problems as conversations


@pytest.mark.parametrize("kind", records.PROBLEMS)
def test_a_solution_ends_with_an_accepted_answer(kind):
    record, answers = READ[kind], ANSWER_KINDS[kind]
    asked, solved = messages(record)
    assert (asked["role"], solved["role"]) == ("user", "assistant")
    assert all(
        part in asked["content"] for part in (record.context, record.question, *record.choices)
    )
    assert solved["content"].startswith(record.reasoning)
    assert not solved["content"].startswith(" ")
    found = extract_answer(answers, solved["content"])
    assert any(same_answer(answers, found, one) for one in accepted(record))


def test_every_right_choice_is_told_by_its_letter():
    for number, letter in enumerate("ABCDEFGH"):
        record = Record(
            "A text.", "Which?", (f"option {number}",), tuple(f"option {n}" for n in range(8))
        )
        asked, solved = messages(record)
        assert asked["content"].startswith("A text.\n\nWhich?\nA) option 0\nB) option 1\n")
        assert f"\n{letter}) option {number}" in asked["content"]
        assert extract_answer("choice", solved["content"]) == letter
        assert accepted(record) == (letter,)


def test_all_answers_to_a_question_are_accepted_and_the_first_is_told():
    record = Record("", "Where?", ("in Rome", "Rome"), reasoning="She lives there.")
    assert accepted(record) == ("in Rome", "Rome")
    assert messages(record)[1]["content"] == "She lives there. The answer is in Rome."


@pytest.mark.parametrize(
    "path", sorted((PUBLISHED / "gsm8k").glob("*.jsonl")), ids=lambda path: path.stem
)
def test_solutions_of_published_problems_are_right(path):
    for record in read_records("gsm8k", path):
        assert extract_answer("number", messages(record)[1]["content"]) == record.answer
