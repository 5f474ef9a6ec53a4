"""Records from files: both formats say the same, values stay as written, and what does not fit is named."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.records import faq, read_prompts

CORPUS = Path(__file__).parents[2] / "shared/data/faq_chatterbot/english"
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def write(folder, name, content):
    path = folder / name
    path.write_text(content, "utf-8")
    return path


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1), TEXTS)
def test_any_text_comes_back_from_either_format(tmp_path_factory, pairs, domain):
    folder = tmp_path_factory.mktemp("records")
    records = [{"question": question, "answer": answer, "domain": domain} for question, answer in pairs]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    corpus = {"categories": [domain], "conversations": [list(pair) for pair in pairs]}
    assert faq(write(folder, "a.jsonl", lines)) == records
    assert faq(write(folder, "a.yml", yaml.safe_dump(corpus))) == records


def test_only_the_fields_that_are_given_and_known(tmp_path):
    path = write(tmp_path, "a.jsonl", '\n{"question": "Who?", "id": "w-1", "paraphrases": [3], "answer": null}\n\n')
    assert faq(path) == [{"question": "Who?", "id": "w-1"}]


@pytest.mark.parametrize("value", "22 3.10 yes No null ~ 1990-01-02 0x1F 1_000 12:30:45".split())
def test_yaml_values_are_text_as_written(value, tmp_path):
    path = write(tmp_path, "a.yaml", f"categories:\n- {value}\nconversations:\n- - {value}\n  - {value}\n")
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
    with pytest.warns(UserWarning, match=r"a\.yml, entry 1 of 'conversations', is left out: [\"']Two little") as told:
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
        ("categories: [[x]]\nconversations: [[A, B]]", r"'categories' beginning with \['x'\], expected a text"),
        ("categories: [x]\nconversations: [[A, B], {C: D}]", "entry 2 of 'conversations', is .* a list of texts"),
        ("categories: [x]\nconversations: [[A, B], []]", "entry 2 of 'conversations', is .* a list of texts"),
        ("categories: [x]\nconversations: [[A, B: C]]", "entry 1 of 'conversations', has a text that is {'B': 'C'}"),
        ("categories: [x]\nconversations:\n- - A\n  -\n", "entry 1 of 'conversations', has a text that is ''"),
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
    "written", ["One.\n\n Two [a], b: c\n", '{"turns": ["One.", "More."], "id": 3}\n{"turns": ["Two [a], b: c"]}\n']
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
