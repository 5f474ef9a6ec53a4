"""Records from files: the same records from every published form, texts as written, misfits named."""

import csv
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

from kvlab.answers import ANSWER_KINDS, extract_answer, same_answer
from kvlab.records import (
    DATA_SETS,
    PROBLEMS,
    Record,
    accepted_answers,
    messages,
    read_faq,
    read_prompts,
    read_records,
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
    assert read_faq(write(folder, "a.jsonl", lines)) == records
    assert read_faq(write(folder, "a.yml", yaml.safe_dump(corpus))) == records


def test_only_the_fields_that_are_given_and_known(tmp_path):
    path = write(
        tmp_path,
        "a.jsonl",
        '\n{"question": "Who?", "id": "w-1", "paraphrases": [3], "answer": null}\n\n',
    )
    assert read_faq(path) == [{"question": "Who?", "id": "w-1"}]


@pytest.mark.parametrize("value", "22 3.10 yes No null ~ 1990-01-02 0x1F 1_000 12:30:45".split())
def test_yaml_values_are_text_as_written(value, tmp_path):
    path = write(
        tmp_path, "a.yaml", f"categories:\n- {value}\nconversations:\n- - {value}\n  - {value}\n"
    )
    assert read_faq(path) == [{"question": value, "answer": value, "domain": value}]


def test_each_reply_answers_the_first_text_and_the_first_category_is_the_domain(tmp_path):
    path = write(tmp_path, "a.yml", "categories: [AI, more]\nconversations: [[Q, A, B], [R, C]]")
    assert [(r["domain"], r["question"], r["answer"]) for r in read_faq(path)] == [
        ("AI", "Q", "A"),
        ("AI", "Q", "B"),
        ("AI", "R", "C"),
    ]


def test_a_folder_is_read_by_name_and_other_files_are_left_alone(tmp_path):
    write(tmp_path, "b.jsonl", '{"question": "Second?"}')
    write(tmp_path, "a.yml", "categories: [x]\nconversations: [[First, One]]")
    write(tmp_path, "LICENSE", "no records")
    assert [record["question"] for record in read_faq(tmp_path)] == ["First", "Second?"]


@pytest.mark.parametrize("alone", ["- Two little ducks? - '22'", "- - Two little ducks?"])
def test_a_conversation_without_an_answer_is_left_out_with_a_warning(alone, tmp_path):
    path = write(tmp_path, "a.yml", f"categories: [x]\nconversations:\n{alone}\n- - Q?\n  - A\n")
    with pytest.warns(
        UserWarning, match=r"a\.yml, conversation 1 is left out: [\"']Two little"
    ) as warned:
        records = read_faq(path)
    assert records == [{"question": "Q?", "answer": "A", "domain": "x"}]
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"question": "A?", "ans', "Unterminated string .* line 2"),
        ('["A?", "B"]', "row 2 does not fit"),
        ('{"answer": "B"}', "row 2 does not fit: there is no 'question'"),
        ('{"question": " "}', r"row 2 does not fit: \[' '\] is not a list of texts"),
        ('{"question": "A?", "answer": 42}', r"row 2 does not fit: \['A\?', 42\] is not a list of"),
    ],
)
def test_a_broken_line_is_named(line, named, tmp_path):
    path = write(tmp_path, "a.jsonl", f'{{"question": "First?"}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl.* {named}"):
        read_faq(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("categories: [", r"a\.yml does not fit: (.*\n)*.*line 1, column 14"),
        ("- A\n- B", r"a\.yml does not fit"),
        ("conversations: [[A, B]]", "there is no 'categories'"),
        ("categories: x\nconversations: [[A, B]]", "'x' is not a list of texts"),
        ("categories: [[x]]\nconversations: [[A, B]]", r"\[\['x'\]\] is not a list of texts"),
        ("categories: [x]\nconversations: A", "'A' is not a list"),
        ("categories: [x]\nconversations: [[A, B], {C: D}]", "conversation 2 does not fit: {'C': 'D'}"),
        ("categories: [x]\nconversations: [[A, B], []]", r"conversation 2 does not fit: \[\]"),
        ("categories: [x]\nconversations: [[A, B: C]]", "conversation 1 does not fit: .*{'B': 'C'}"),
        ("categories: [x]\nconversations:\n- - A\n  -\n", r"conversation 1 does not fit: \['A', ''\]"),
    ],
)  # fmt: skip
def test_a_broken_entry_is_named(content, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        read_faq(write(tmp_path, "a.yml", content))


def test_what_is_no_file_of_records_is_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_faq(tmp_path / "none.jsonl")
    for path in (tmp_path, write(tmp_path, "a.csv", "A?,B"), tmp_path / "none"):
        with pytest.raises(
            ValueError, match=r"There are no records in .*: expected \.jsonl, \.yml"
        ):
            read_faq(path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9?"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl does not fit: byte 14 is not UTF-8"):
        read_faq(tmp_path / "latin.jsonl")


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus is not here")
def test_the_chatterbot_corpus_has_2306_pairs():
    # 2026 conversations, one of them a lone text; 1946 of one reply, 79 of more.
    with pytest.warns(
        UserWarning, match=r"trivia\.yml, conversation 14 .* 'In a game of bingo"
    ) as warned:
        records = read_faq(CORPUS)
    assert len(warned) == 1
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


LINES = "one\u2028still one", "[2] two\x0bstill two", "drei\x85immer noch drei"


@pytest.mark.parametrize("name", ["prompts", "prompts.json", "prompts.jsonl"])
@pytest.mark.parametrize("mark", ["", "\ufeff", "\ufeff\ufeff"])
@pytest.mark.parametrize(
    "form",
    [
        lambda texts: "\n".join(json.dumps({"turns": [t, "More."]}) for t in texts),
        lambda texts: "\n\ufeff".join(
            json.dumps({"turns": [t]}, ensure_ascii=False) for t in texts
        ),
        lambda texts: json.dumps(texts, indent=1),
        lambda texts: json.dumps([{"turns": [t]} for t in texts], ensure_ascii=False),
        lambda texts: json.dumps({"data": [{"turns": [t]} for t in texts]}),
    ],
)
def test_prompts_come_back_from_json_in_any_form(form, mark, name, tmp_path):
    (tmp_path / name).write_text(mark + form(LINES), "utf-8")
    assert read_prompts(tmp_path / name) == [*LINES]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_line_of_prompts_ends_with_a_newline_only(mark, tmp_path):
    (tmp_path / "prompts").write_text(mark + "\n".join(LINES), "utf-8")
    assert read_prompts(tmp_path / "prompts") == [*LINES]


READERS = {
    ".jsonl": read_faq,
    ".yml": read_faq,
    ".json": lambda path: read_records("squad", path),
    ".csv": lambda path: read_records("cmmlu", path),
    ".txt": read_prompts,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "it is empty"),
        (b"\xef\xbb\xbf \n", "it is empty"),
        (b'{"a": "\xff\xfe"}', "byte 7 is not UTF-8"),
        ("{}".encode("utf-16"), "byte 0 is not UTF-8"),
    ],
)
def test_every_reader_names_a_file_that_is_no_text(reader, content, told, tmp_path):
    (tmp_path / f"a{reader}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a{reader} does not fit: {told}"):
        READERS[reader](tmp_path / f"a{reader}")


@pytest.mark.parametrize("reader", [".jsonl", ".yml", ".json", ".txt"])
@pytest.mark.parametrize(("opening", "depth"), [("[[", 50_000), ('{"a": ', 50_000)])
def test_every_reader_names_a_file_that_is_nested_too_deeply(reader, opening, depth, tmp_path):
    (tmp_path / f"a{reader}").write_text(opening * depth)
    with pytest.raises(ValueError, match=rf"a{reader} does not fit: it is nested too deeply"):
        READERS[reader](tmp_path / f"a{reader}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", r'{"question": "\ud800", "answer": "x"}'),
        ("a.yml", r'{categories: [x], conversations: [[a, "\uDFFF"]]}'),
        ("a.json", r'[{"context": "x", "question": "a\ud83d", "answers": [{"text": "x"}]}]'),
        ("a.txt", r'["a", "\udc00"]'),
    ],
)
def test_half_a_character_is_named(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.* does not fit: it has half a character"):
        READERS[(tmp_path / name).suffix](tmp_path / name)


def test_a_field_of_csv_is_as_long_as_it_is(tmp_path):
    limit, long = csv.field_size_limit(), "x" * 200_000
    (tmp_path / "a.csv").write_text(f"Question,A,B,C,D,Answer\n{long},1,2,3,4,B\n")
    assert read_records("cmmlu", tmp_path / "a.csv")[0].question == long
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("source", ["", ":", ".", "a:b:c:d", "a.parquet"])
def test_a_source_that_is_no_data_set_is_a_sentence(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"cannot be read .*: give a file, a name on the hub, or"):
        read_records("squad", source)


@pytest.mark.parametrize(
    "line", ['{"turns": []}', '{"turns": [3]}', '{"text": "Two."}', '{"turns": ["Tw', "Two.", "[1]"]
)
def test_a_broken_line_of_prompts_is_named(line, tmp_path):
    (tmp_path / "prompts").write_text(f'{{"turns": ["One."]}}\n\n{line}\n')
    with pytest.raises(ValueError, match=r"prompts(, row 2)? does not fit"):
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


def paths_of(name):
    return [case for case in EVERY if getattr(case, "values", case)[0] == name]


def raw(path):
    text = path.read_text("utf-8")
    return (
        json.loads(text)
        if path.suffix == ".json"
        else [json.loads(line) for line in text.splitlines()]
    )


def read(kind, source):
    """Return the records, without the warning that counts the ones left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_records(kind, source)


def words(*texts):
    return Counter(" ".join(texts).split())


@pytest.mark.parametrize(("kind", "path"), EVERY)
def test_every_record_has_its_three_texts_and_of_choices_one_is_right(kind, path):
    records = read(kind, path)
    assert records
    for record in records:
        texts = [record.context, record.question, *record.answers, *record.choices]
        assert all(isinstance(text, str) and text.strip() for text in texts)
        assert record.answer == (*record.answers, "")[0]
        assert len(set(record.answers)) == len(record.answers)
        assert not record.choices or (len(record.answers) == 1 and record.answer in record.choices)


@pytest.mark.parametrize(("kind", "path"), paths_of("squad"))
def test_squad_texts_are_as_written_so_that_offsets_hold(kind, path):
    paragraphs = [paragraph for article in raw(path)["data"] for paragraph in article["paragraphs"]]
    questions = [(paragraph["context"], qa) for paragraph in paragraphs for qa in paragraph["qas"]]
    records = read(kind, path)
    assert [(r.context, r.question) for r in records] == [
        (context, qa["question"]) for context, qa in questions
    ]
    for record, (_, qa) in zip(records, questions, strict=True):
        assert set(record.answers) == {answer["text"] for answer in qa["answers"]}
        for answer in qa["answers"]:
            assert record.context[answer["answer_start"] :].startswith(answer["text"])


def test_unanswerable_questions_have_no_answers_and_nothing_to_learn_from():
    records = read_records("squad", DATA / "squad_v2.json")
    # A plausible answer does not replace a missing one.
    assert [record.answers for record in records] == [("1960",), ()]
    assert records[1].answer == ""
    assert [message["role"] for message in messages(records[1])] == ["user"]


def test_records_that_lack_a_text_are_counted():
    row = {"context": "C", "question": "Q", "answers": {"text": ["A"], "answer_start": [0]}}
    rows = [row, row | {"context": " "}, row | {"question": ""}]
    rows += [row | {"answers": {"text": [" "], "answer_start": [0]}}] * 2
    with pytest.warns(UserWarning, match="the list: 4 of 5 records are left out") as warned:
        assert read_records("squad", rows) == [Record("C", "Q", ("A",))]
    assert len(warned) == 1


def test_quality_counts_labels_from_one_and_the_writer_answers_where_no_vote_does():
    records = read_records("quality", DATA / "QuALITY.invented.train")
    assert [record.answer for record in records] == ["The oil", "Per", "Over the harbor", "Blue"]
    assert [len(record.choices) for record in records] == [4] * 4
    assert records[0].choices[1] == "The oil"


def test_quality_rows_of_the_hub_count_from_zero():
    row = {
        "article": "Kites fly.",
        "question": "What flies?",
        "options": ["A", "B", "C", "D"],
        "hard": True,
    }
    assert [read_records("quality", [row | {"answer": i}])[0].answer for i in range(4)] == [
        "A",
        "B",
        "C",
        "D",
    ]
    assert read_records("quality", [row | {"gold_label": 1, "writer_label": 2}])[0].answer == "A"


def test_quality_html_becomes_text_and_plain_text_stays():
    lamp, _, kite, _ = read_records("quality", DATA / "QuALITY.invented.train")
    paragraphs = [
        "THE LAMP",
        "Old Per & his lamp had kept the bay safe.",
        "One night, the oil ran out; 2 < 3 ships came home.",
    ]
    assert [" ".join(paragraph.split()) for paragraph in lamp.context.split("\n\n")] == paragraphs
    assert kite.context == raw(DATA / "QuALITY.invented.train")[1]["article"]
    plain = "if a < b and c > d: R&amp;D\n\n\n  (p < .05)"
    row = {"article": plain, "question": "Q", "options": ["A", "B", "C", "D"], "answer": 0}
    assert read_records("quality", [row])[0].context == plain


@pytest.mark.parametrize(("kind", "path"), paths_of("self_instruct"))
def test_self_instruct_reads_the_input_and_keeps_the_instruction(kind, path):
    instances = [
        (row["instruction"], instance) for row in raw(path) for instance in row["instances"]
    ]
    expected = [
        (instance["input"], instruction, (instance["output"],))
        for instruction, instance in instances
        if instance["input"]
    ]
    assert [(r.context, r.question, r.answers) for r in read(kind, path)] == expected
    with pytest.warns(
        UserWarning,
        match=rf"{len(instances) - len(expected)} of {len(instances)} records are left out",
    ):
        read_records("self_instruct", path)


@pytest.mark.parametrize(("kind", "path"), paths_of("p3"))
def test_p3_parts_a_prompt_and_loses_nothing(kind, path):
    rows = [row for row in raw(path) if "passage" in row["prompt"] or "context" in row["prompt"]]
    records = read(kind, path)
    assert len(records) == len(rows)
    for record, row in zip(records, rows, strict=True):
        assert words(record.context, record.question) == words(row["prompt"])
        assert record.answer + "<|endoftext|>" == row["completion"]
        assert record.answer in record.context
        assert "Question: " not in record.context
        assert len(record.question) < 250


TALE = "Mira walked to the lake, and there she records the ring that her brother had lost a year before."


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
def test_p3_finds_the_passage_wherever_it_is(prompt, question):
    rows = [
        {
            "inputs_pretokenized": prompt,
            "targets_pretokenized": "\nthe ring\n",
            "inputs": [3],
            "targets": [4],
        }
    ]
    records = read("p3", rows)
    assert [record.question for record in records] == ([] if question is None else [question])
    for record in records:
        assert record.context.removeprefix("story: ") == TALE
        assert record.answers == ("the ring",)


def test_p3_choices_and_no_wrong_target():
    row = {"inputs_pretokenized": f"{TALE}\n\nIs the text true?", "answer_choices": [" Yes", "No"]}
    rows = [row | {"targets_pretokenized": t, "is_correct": t == "No"} for t in ("Yes", "No")]
    assert [(r.answers, r.choices) for r in read_records("p3", rows)] == [(("No",), ("Yes", "No"))]
    assert read_records("p3", [row | {"targets_pretokenized": "Perhaps"}])[0].choices == ()


def test_long_alpaca_is_cut_after_the_last_end_or_before_the_last_paragraph():
    path = DATA / "long_alpaca.json"
    with pytest.warns(UserWarning, match=r"long_alpaca\.json: 1 of 6 records are left out"):
        records = read_records("long_alpaca", path)
    assert [(record.context.split("\n")[-1], record.question) for record in records] == [
        (" Now the paper ends.", "What did the snails do?"),
        (" Now the second paper ends.", "How do the\n\ntwo papers differ?"),
        (" Now the material ends.", "Question: Was it open?"),
        ("A week has seven days.", "How many eggs are laid in a week?"),
        ("snail", "Translate the word to German."),
    ]
    for record, row in zip(records, raw(path), strict=False):
        text = f"{row['instruction']} {row.get('input', '')}"
        assert words(record.context, record.question) == words(text)
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
FORMS = {
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
FORMS["math500"] = FORMS["math"]
HUB |= {kind: row for kind, (row, _, _) in FORMS.items()}
READ |= {kind: record for kind, (_, record, _) in FORMS.items()}


@pytest.mark.parametrize("kind", DATA_SETS)
def test_what_is_no_file_comes_from_the_hub(kind, monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return datasets.Dataset.from_list([HUB[kind]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (record,) = read_records(kind, "some/set:part", split="validation[:1]")
    assert calls == [(("some/set", "part"), {"split": "validation[:1]"})]
    assert (record.answer, record.question) == (READ[kind].answer, READ[kind].question)
    assert record.context.removeprefix("Text: ") == READ[kind].context
    assert read_records(kind, Path("some/set")) == [record]
    assert calls[1] == (("some/set",), {"split": "train"})


def test_squad_v2_of_the_hub_has_empty_answers(monkeypatch):
    row = HUB["squad"]
    rows = [row, row | {"answers": {"text": [], "answer_start": []}}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    assert [len(record.answers) for record in read_records("squad", "some/set")] == [1, 0]


@pytest.mark.parametrize(("kind", "path"), OURS)
def test_a_file_is_read_and_the_hub_is_not_asked(kind, path, monkeypatch):
    monkeypatch.delattr(datasets, "load_dataset")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_records(kind, str(path)) == read(kind, path)


@pytest.mark.parametrize("error", [ConnectionError("cannot reach"), ValueError("Unknown split")])
def test_an_error_of_the_hub_is_shown(error, monkeypatch):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=f"'some/set', split 'test', cannot be read .{error}"):
        read_records("squad", "some/set", "test")


def test_a_missing_json_file_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.delattr(datasets, "load_dataset")
    for name in ("squad/dev.json", "rows.jsonl", "gpqa_main.csv"):
        with pytest.raises(ValueError, match=f"There is no file {name}: give one"):
            read_records("squad", name)
    with pytest.raises(ValueError, match="kind 'sqad': expected one of squad, quality, self_instr"):
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
    ("squad", "data", None, "row 1 does not fit"),
    ("squad", "data 1", "Brandt", "row 2 does not fit"),
    ("squad", "data 0 paragraphs 0 context", ..., "row 1, paragraphs 1, qas 1 does not fit: there is no 'context'"),
    ("squad", "data 0 paragraphs 0 qas", "Q", "row 1, paragraphs 1 does not fit: 'Q' is not a list"),
    ("squad", "data 0 paragraphs 0 qas 1 question", 3, "row 1, paragraphs 1, qas 2 does not fit: 3 is not a text"),
    ("squad", "data 0 paragraphs 0 qas 1 answers", ..., "qas 2 does not fit: there is no 'answers'"),
    ("squad", "data 0 paragraphs 0 qas 0 answers 2 text", 5, "qas 1 does not fit"),
    ("quality", "1 article", ..., "row 2, questions 1 does not fit: there is no 'article'"),
    ("quality", "0 questions 1 options 3", ..., "row 1, questions 2 does not fit: .* the labels of the choices"),
    ("quality", "0 questions 1 options 3", 7, "row 1, questions 2 does not fit: 7 is not a text"),
    ("quality", "0 questions 1 options", "abcd", "row 1, questions 2 does not fit: .* of the choices abcd"),
    ("quality", "0 questions 1 gold_label", 0, r"questions 2 does not fit: '0' is not one of \['1', '2'"),
    ("quality", "0 questions 1 gold_label", 5, "questions 2 does not fit: '5' is not one of"),
    ("quality", "0 questions 1 gold_label", "B", "questions 2 does not fit: 'B' is not one of"),
    ("quality", "1 questions 1 writer_label", ..., "row 2, questions 2 does not fit: there is no 'gold_label'"),
    ("self_instruct", "1", ["a"], "row 2 does not fit"),
    ("self_instruct", "0 instances 1", "a", "row 1 does not fit"),
    ("self_instruct", "0 instances 1 output", 4, "row 1, instances 2 does not fit: 4 is not a text"),
    ("p3", "2 prompt", ..., "row 3 does not fit: there is no 'prompt'"),
    ("p3", "2 completion", None, "row 3 does not fit: 'NoneType'"),
    ("p3", "2 inputs_pretokenized", "a", "row 3 does not fit: there is no 'targets_pretokenized'"),
    ("long_alpaca", "3", 8, "row 4 does not fit"),
    ("long_alpaca", "3 input", ["a"], r"row 4 does not fit: \['a'\] is not a text"),
    ("long_alpaca", "3 output", ..., "row 4 does not fit: there is no 'output'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "where", "new", "message"), SPOILED)
def test_what_does_not_fit_is_named_by_file_and_row(name, where, new, message, tmp_path):
    ours = DATA / FILES[name][0]
    keys = [int(key) if key.isdigit() else key for key in where.split()]
    rows = spoil(raw(ours), keys, new)
    text = json.dumps(rows)
    if ours.suffix != ".json":
        text = "\n".join(json.dumps(row) for row in rows)
    with pytest.raises(ValueError, match=rf"{ours.name}, .*{message}"):
        read(name, write(tmp_path, ours.name, text))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("squad", HUB["squad"] | {"answers": {"text": "A"}}),
        ("squad", HUB["squad"] | {"answers": {"text": ["A"], "answer_start": []}}),
        ("quality", HUB["quality"] | {"answer": 4}),
        ("quality", HUB["quality"] | {"answer": -1}),
        ("p3", "a prompt"),
    ],
)
def test_a_row_that_does_not_fit_is_named(name, row):
    with pytest.raises(ValueError, match="the list, row 2 does not fit"):
        read(name, [HUB[name], row])


@pytest.mark.parametrize(
    "text",
    [
        '[{"instruction": "A\\n\\nB", "output": "a"}, {"instruction": "A\\n\\nC", "output": "a"}]',
        '{"instruction": "A\\n\\nB", "output": "a"}\n\n{"instruction": "A\\n\\nC", "output": "a"}\n',
        '{"instruction":\n"A\\n\\nB", "output": "a"\n}{"instruction": "A\\n\\nC", "output": "a"}',
        '\ufeff{"data": [{"instruction": "A\\n\\nB", "output": "a"},\n'
        '{"instruction": "A\\n\\nC", "output": "a"}]}',
    ],
)
def test_json_comes_as_a_list_or_value_after_value_whatever_the_suffix(text, tmp_path):
    for suffix in ("json", "jsonl", "train"):
        records = read_records("long_alpaca", write(tmp_path, f"a.{suffix}", text))
        assert [record.question for record in records] == ["B", "C"]


def test_a_parquet_file_and_a_folder_are_read(tmp_path):
    rows = datasets.Dataset.from_list([HUB["squad"]])
    rows.to_parquet(str(tmp_path / "train.parquet"))
    assert read_records("squad", tmp_path / "train.parquet") == [READ["squad"]]
    assert read_records("squad", tmp_path) == [READ["squad"]]


def test_texts_that_look_like_times_or_numbers_stay_as_written(tmp_path):
    texts = ["1990-01-02", "007", "None", "1.50"]
    row = dict(zip("ABCD", texts, strict=True)) | {"Question": "Q", "Answer": "A"}
    table = "Question,A,B,C,D,Answer\nQ,1990-01-02,007,None,1.50,A\n"
    for path in (write(tmp_path, "a.csv", table), write(tmp_path, "a.jsonl", json.dumps(row))):
        assert read_records("cmmlu", path)[0].choices == tuple(texts)


# -- problems: the rows above, in the forms that the data sets are published in


@pytest.mark.parametrize("kind", FORMS)
def test_a_problem_is_the_same_on_the_hub_and_in_the_original_file(kind, tmp_path):
    row, record, (name, text) = FORMS[kind]
    assert read_records(kind, [row]) == [record]
    assert read_records(kind, write(tmp_path, name, text)) == [record] * (
        text.count("original_text") or 1
    )
    assert DATA_SETS[kind].answer_kind in ANSWER_KINDS


@pytest.mark.parametrize("kind", ["gsm8k", "cmmlu"])
def test_a_problem_without_a_question_is_left_out_and_none_needs_a_context(kind):
    row = HUB[kind]
    with pytest.warns(UserWarning, match="the list: 1 of 2 records are left out") as warned:
        assert read_records(kind, [row, row | {"question": " ", "Question": " "}]) == [READ[kind]]
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("((13)/(120))", "13/120"),
        ("(1/3)", "1/3"),
        ("1(1/2)", "1(1/2)"),
        ("2((3)/(4))", "2(3/4)"),
        ("7.50", "7.50"),
    ],
)
def test_fractions_of_math23k(written, answer):
    row = {"original_text": "Q", "equation": "x=1", "ans": written}  # codespell:ignore ans
    assert read_records("math23k", [row])[0].answer == answer


@pytest.mark.parametrize("letter", "ABCD")
def test_the_letter_is_that_of_the_right_choice(letter):
    for kind, field in (("cmmlu", "Answer"), ("ceval", "answer")):
        (record,) = read_records(kind, [HUB[kind] | {field: letter}])
        assert (record.letter, record.answer) == (letter, FOUR[letter])


def test_the_right_option_is_anywhere_but_always_in_the_same_place():
    row = HUB["gpqa"]
    rows = [row | {"Question": f"Q {i}"} for i in range(400)]
    records = read_records("gpqa", rows)
    assert records == read_records("gpqa", rows)
    counts = Counter(record.letter for record in records)
    assert all(60 < counts[letter] < 140 for letter in "ABCD")  # 100 each, five standard deviations
    swapped = {"Incorrect Answer 1": "3", "Incorrect Answer 3": "1"}
    assert (
        read_records("gpqa", [other | swapped for other in rows]) == records
    )  # nor does the order of the wrong ones count
    rows = [
        {"question": f"Q {i}", "mc1_targets": {"one": 1, "1": 0, "2": 0, "3": 0}}
        for i in range(400)
    ]
    assert read_records("truthfulqa", rows) == records


SPOILED_PROBLEMS = [
    ("gsm8k", "answer", "It is 1.", "not enough values"),
    ("gsm8k", "answer", "So 1.\n#### one", "' one' is not a number"),
    ("gsm8k", "question", ..., "there is no 'question'"),
    ("svamp", "Answer", True, "True is not a number"),
    ("svamp", "Equation", None, "None is not a text"),
    ("math23k", "ans", "?", r"'\?' is not a number"),  # codespell:ignore ans
    ("math", "solution", "It is 1.", r"the solution has no \\boxed\{\}: 'It is 1.'"),
    ("math", "solution", r"\boxed{1", r"the solution has no \\boxed\{\}"),
    ("strategyqa", "answer", "yes", "the answer is 'yes', expected true or false"),
    ("strategyqa", "facts", ["F.", 1], "sequence item 1: expected str"),
    ("hotpotqa", "context", [["T", ["C."]], "U"], "not enough values"),
    ("hotpotqa", "context", ..., "there is no 'context'"),
    ("bbh", "target", True, "True is not a text"),
    ("arc", "answerKey", "4", r"'4' is not one of \['1', '2', '3'\]"),
    ("arc", "question", {"stem": 3}, "3 is not a text"),
    ("arc", "choices", [{"text": "a"}], "there is no 'label'"),
    ("gpqa", "Incorrect Answer 3", None, "'NoneType'"),
    ("truthfulqa", "mc1_targets", {"choices": ["a", "b"], "labels": [1, 1]}, r"the labels are \[1, 1\]"),
    ("truthfulqa", "mc1_targets", {"choices": ["a", "b"], "labels": [1]}, "zip"),
    ("cmmlu", "B", ..., "there is no 'B'"),
    ("cmmlu", "Answer", "E", r"'E' is not one of \['A', 'B', 'C', 'D'\]"),
    ("ceval", "answer", "", "'' is not one of"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "field", "new", "message"), SPOILED_PROBLEMS)
def test_a_problem_that_does_not_fit_is_named(name, field, new, message):
    with pytest.raises(ValueError, match=f"the list, row 2 does not fit: {message}"):
        read_records(name, [HUB[name], spoil(HUB[name], [field], new)])


def test_a_broken_row_of_a_file_is_named(tmp_path):
    header = "Question,A,B,C,D,Answer\nQ,a,b,c,d,A\n"
    for name, file, text, message in (
        ("cmmlu", "a.csv", f"{header}Q,a,b\n", r"a\.csv, row 2 does not fit"),
        ("bbh", "a.json", '{"examples": [{"input": "Q"}]}', r"a\.json, row 1 .* no 'target'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_records(name, write(tmp_path, file, text))


GSM8K = pytest.mark.skipif(
    not (PUBLISHED / "gsm8k").is_dir(), reason="the published files are not here"
)


@GSM8K
@pytest.mark.parametrize(("name", "count"), [("train", 1500), ("dev", 500)])
def test_of_gsm8k_every_solution_says_its_answer(name, count):
    path = PUBLISHED / f"gsm8k/{name}.jsonl"
    records = read_records("gsm8k", path)
    assert len(records) == count
    for record, row in zip(records, raw(path), strict=True):
        assert record.question == row["question"]
        assert record.answer == row["answer"].split()[-1].replace(",", "")
        assert not re.search("<<|>>|####", record.reasoning)
        text = f"{record.reasoning}\nThe answer is ${record.answer}. That is all 2 asked."
        for solution in (row["answer"], text, text.replace("The answer is", "####")):
            assert extract_answer("number", solution) == record.answer


# -- problems as conversations


@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_solution_ends_with_an_accepted_answer(kind):
    record, answers = READ[kind], DATA_SETS[kind].answer_kind
    prompt, solution = messages(record)
    assert (prompt["role"], solution["role"]) == ("user", "assistant")
    assert all(
        part in prompt["content"] for part in (record.context, record.question, *record.choices)
    )
    assert solution["content"].startswith(record.reasoning)
    assert not solution["content"].startswith(" ")
    extracted = extract_answer(answers, solution["content"])
    assert any(same_answer(answers, extracted, one) for one in accepted_answers(record))


def test_a_solution_of_a_multiple_choice_ends_with_its_letter():
    for number, letter in enumerate("ABCDEFGH"):
        record = Record(
            "A text.", "Which?", (f"option {number}",), tuple(f"option {n}" for n in range(8))
        )
        prompt, solution = messages(record)
        assert prompt["content"].startswith("A text.\n\nWhich?\nA) option 0\nB) option 1\n")
        assert f"\n{letter}) option {number}" in prompt["content"]
        assert extract_answer("choice", solution["content"]) == letter
        assert accepted_answers(record) == (letter,)


def test_all_answers_to_a_question_are_accepted_and_the_first_is_written():
    record = Record("", "Where?", ("in Rome", "Rome"), reasoning="She lives there.")
    assert accepted_answers(record) == ("in Rome", "Rome")
    assert messages(record)[1]["content"] == "She lives there. The answer is in Rome."


@pytest.mark.parametrize(
    "path", sorted((PUBLISHED / "gsm8k").glob("*.jsonl")), ids=lambda path: path.stem
)
def test_solutions_of_published_problems_are_right(path):
    for record in read_records("gsm8k", path):
        assert extract_answer("number", messages(record)[1]["content"]) == record.answer
