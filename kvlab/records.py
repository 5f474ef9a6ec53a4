"""Records of data sets, question/answer pairs and prompts from files.

A `Record` is a question, its accepted answers and, where there is one, the context to read.
`read_records` reads one of these data sets from the file that its authors published or from the
Hugging Face hub:

- with a context to read: SQuAD v1.1 and v2 (arXiv 1606.05250, 1806.03822), QuALITY (2112.08608),
  Self-Instruct (2212.10560), P3 (2110.08207), LongAlpaca (2309.12307);
- problems: GSM8K (2110.14168), SVAMP (2103.07191), Math23K (https://aclanthology.org/D17-1088),
  MATH and MATH500 (2103.03874, 2305.20050), BIG-Bench Hard (2210.09261), StrategyQA (2101.02235),
  HotpotQA (1809.09600), ARC (1803.05457), GPQA (2311.12022), TruthfulQA MC1 (2109.07958),
  CMMLU (2306.09212), C-Eval (2305.08322).

`read_faq` reads the question/answer pairs of a knowledge cache, `read_prompts` a list of prompts.
"""

import csv
import html
import io
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import yaml

from kvlab.answers import boxed, extract_answer
from kvlab.files import naming, read_text

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """A question, its accepted answers and, for some data sets, a context to read first.

    Args:
        context: the text to read; a method may compress it. Most problems have none.
        question: the text after the context, never compressed.
        answers: accepted texts, each once; for a multiple choice, the right option. A question of
            SQuAD v2 that its context does not answer has none.
        choices: the options of a multiple choice, else none.
        reasoning: the solution that leads to the answer, if the data set has one.

    Example:
        >>> Record("Anna lives in Rome.", "Where does Anna live?", ("Rome", "in Rome")).answer
        'Rome'
    """

    context: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    reasoning: str = ""

    def __post_init__(self):
        for text in (self.context, self.question, self.reasoning, *self.answers, *self.choices):
            if not isinstance(text, str):
                raise TypeError(f"{text!r} is not a text")
            text.encode()  # refuses half a character, which JSON can hold and a tokenizer cannot

    @property
    def answer(self) -> str:
        """The first of the answers: the one to learn from. It is empty if there is none."""
        return next(iter(self.answers), "")

    @property
    def letter(self) -> str:
        """The letter of the right choice: A is the first."""
        return ascii_uppercase[self.choices.index(self.answer)]


def accepted_answers(record: Record) -> tuple[str, ...]:
    """The answers that a solution may end with; for a multiple choice, the letter."""
    return (record.letter,) if record.choices else record.answers


def messages(record: Record) -> list[dict[str, str]]:
    r"""A record as a conversation: context, question, lettered options; reasoning and answer, if any.

    Example:
        >>> messages(Record("", "What is hot?", ("sun",), ("snow", "sun")))[0]["content"]
        'What is hot?\nA) snow\nB) sun'
        >>> messages(Record("", "2 pens and 3?", ("5",), reasoning="2+3=5."))[1]["content"]
        '2+3=5. The answer is 5.'
    """
    prompt = f"{record.context}\n\n{record.question}" if record.context else record.question
    for letter, choice in zip(ascii_uppercase, record.choices, strict=False):
        prompt += f"\n{letter}) {choice}"
    question = {"role": "user", "content": prompt}
    if not record.answers:
        return [question]
    solution = f"{record.reasoning} The answer is {accepted_answers(record)[0]}.".strip()
    return [question, {"role": "assistant", "content": solution}]


def read_records(name: str, source: str | Path | Iterable, split: str = "train") -> list[Record]:
    """Records of a data set, from a file, the Hugging Face hub or rows in memory.

    Records that lack a question, an answer or (in data sets with contexts) a context are left out,
    and one warning counts them. Wrong targets of P3 (`is_correct`) are left out as well. SQuAD v2's
    unanswerable questions have no answers, and stay.

    Args:
        name: one of `DATA_SETS`, such as "squad" or "gsm8k".
        source: a file as the data set's authors published it (JSON, JSON lines or CSV), a Parquet
            file, a name on the hub, with the configuration after a colon if there are several
            ("rajpurkar/squad", "bigscience/P3:adversarial_qa_dbert_based_on"), a folder that
            `datasets.load_dataset` reads, or the rows themselves.
        split: part of the hub's data set; a file is read whole.

    Raises:
        ValueError: the name is unknown, there is no such file, or a row does not fit; the message
            names the file and the row, and says what is missing or wrong.

    Example:
        >>> row = {"context": "Anna is in Rome.", "question": "Where?", "answers": {"text": ["Rome"]}}
        >>> read_records("squad", [row])[0].answers
        ('Rome',)
    """
    if name not in DATA_SETS:
        raise ValueError(f"No records of kind {name!r}: expected one of {', '.join(DATA_SETS)}.")
    data_set = DATA_SETS[name]
    label, rows = _open_source(source, split)
    records = []
    for number, row in enumerate(rows, start=1):
        for place, item in _unnest(f"{label}, row {number}", row, data_set.nested):
            with naming(place):
                records.append(data_set.to_record(item))
    records = [record for record in records if record is not None]
    complete = []
    for record in records:
        has_context = record.context.strip() or not data_set.has_context
        has_answer = "".join(record.answers).strip() or not record.answers
        if has_context and record.question.strip() and has_answer:
            complete.append(record)
    if len(complete) < len(records):
        counts = f"{len(records) - len(complete)} of {len(records)} records are left out"
        text = f"{label}: {counts}, which lack a question, an answer or a context."
        warnings.warn(text, stacklevel=2)
    return complete


# -- how a row becomes a record


def _squad_record(row: Row) -> Record:
    texts = [answer["text"] for answer in _items(row["answers"])]
    texts = dict.fromkeys(filter(str.strip, texts)) or texts[:1]  # each once
    return Record(row["context"], row["question"], tuple(texts))


def _quality_record(row: Row) -> Record:
    """On the hub "answer" counts from 0; in the files the labels count from 1."""
    fields = [f for f in ("answer", "gold_label", "writer_label") if row.get(f) is not None]
    labels = "0123" if "answer" in fields else "1234"
    label = row[fields[0] if fields else "gold_label"]
    context = _html_to_text(row["article"])
    return _choice_record(row["question"], row["options"], labels, label, context)


def _instance_record(row: Row) -> Record:
    """Self-Instruct: the input is the context; without it there is nothing to compress."""
    return Record(row["input"], row["instruction"], (row["output"],))


def _html_to_text(article: str) -> str:
    """The text of an article in HTML; one without paragraph and line tags is plain already."""
    if not re.search(r"<(p|br)\b[^<>]*>", article, re.IGNORECASE):
        return article
    text = re.sub(r"(?is)<!--.*?-->|<!doctype.*?>|<(head|style|script)\b.*?</\1>", "", article)
    text = re.sub(r"(?i)</?(p|div|h\d|hr|table|tr|ul|ol|li|pre|blockquote)\b[^<>]*>", "\n\n", text)
    text = re.sub(r"(?i)<br\b[^<>]*>", "\n", text)
    text = html.unescape(re.sub(r"(?i)</?[a-z][^<>]*>", "", text))
    return re.sub(r"[^\S\n]*\n\s*\n\s*", "\n\n", text).strip()


PASSAGE = (
    "passage|paragraph|context|text|snippet|article|document|story|background|dialogue"
    "|conversation|review"
)
LABELS = f"{PASSAGE}|question|q|answer|a|hint|options|choices|title|summary"


def _p3_record(row: Row) -> Record | None:
    if not row.get("is_correct", True):
        return None
    on_hub = "inputs_pretokenized" in row
    prompt = row["inputs_pretokenized" if on_hub else "prompt"]
    target = row["targets_pretokenized" if on_hub else "completion"]
    answer = target.strip().removesuffix("<|endoftext|>").strip()
    choices = tuple(str(choice).strip() for choice in row.get("answer_choices") or ())
    context, question = _split_prompt(prompt)
    return Record(context, question, (answer,), choices if answer in choices else ())


def _split_prompt(prompt: str) -> tuple[str, str]:
    """The passage of a P3 prompt ("" if it has none) and the text around it.

    The prompt is split at blank lines and before labels such as "Question:" or, if there are none,
    at lines. If it names a passage (or text, article ...), its longest part is the passage.
    """
    border = rf"(?i)(\n\s*\n|\n(?=(?:{LABELS})\s*:))"
    if not re.search(border, prompt.strip()):
        border = r"(\n)"
    parts = re.split(border, prompt.strip())
    longest = max(range(0, len(parts), 2), key=lambda i: len(parts[i]))
    passage, question = parts[longest], "".join(parts[:longest] + parts[longest + 2 :]).strip()
    is_labeled = re.match(rf"(?i)(?:{PASSAGE})\s*:", passage)
    if is_labeled or re.search(rf"(?i)\b(?:{PASSAGE})\b", question):
        return passage.strip(), question
    return "", prompt


def _long_alpaca_record(row: Row) -> Record:
    """Cut after the last "Now the paper ends." (or the like), else before the last paragraph."""
    text = row["instruction"].strip()
    if row.get("input"):
        return Record(row["input"], text, (row["output"],))
    cut = max(text.rfind("\n\n"), 0)
    for end in re.finditer(r"(?i)\bnow the (?:\w+ )?(?:paper|material|guideline) ends\.", text):
        cut = end.end()
    return Record(text[:cut].strip(), text[cut:].strip(), (row["output"],))


def _gsm8k_record(row: Row) -> Record:
    """The solution before "####" is the reasoning, without the calculator's notes in <<>>."""
    reasoning, answer = row["answer"].rsplit("####", 1)
    reasoning = re.sub(r"<<.*?>>", "", reasoning).strip()
    return Record("", row["question"], (_number(answer),), reasoning=reasoning)


def _svamp_record(row: Row) -> Record:
    question = f"{row['Body'].strip()} {row['Question'].strip()}"
    answer = _number(row["Answer"]).removesuffix(".0")
    return Record("", question, (answer,), reasoning=row["Equation"])


def _math23k_record(row: Row) -> Record:
    answer = _number(row["ans"])  # codespell:ignore ans
    return Record("", row["original_text"], (answer,), reasoning=row["equation"])


def _math_record(row: Row) -> Record:
    """The whole solution is the reasoning, its last box the answer."""
    answer = boxed(row["solution"])
    if not answer:
        raise ValueError(f"the solution has no \\boxed{{}}: {row['solution'][:60]!r}")
    return Record("", row["problem"], (answer,), reasoning=row["solution"])


def _strategyqa_record(row: Row) -> Record:
    """The facts, a list or one text, are the reasoning."""
    facts = row["facts"]
    if not isinstance(row["answer"], bool):
        raise ValueError(f"the answer is {row['answer']!r}, expected true or false")
    reasoning = facts if isinstance(facts, str) else " ".join(facts)
    return Record("", row["question"], ("yes" if row["answer"] else "no",), reasoning=reasoning)


def _hotpotqa_record(row: Row) -> Record:
    """The context is all paragraphs under their titles: columns on the hub, pairs in the file."""
    pairs = row["context"]
    if isinstance(pairs, Mapping):
        pairs = zip(pairs["title"], pairs["sentences"], strict=True)
    paragraphs = [f"{title}\n{''.join(sentences).strip()}" for title, sentences in pairs]
    return Record("\n\n".join(paragraphs), row["question"], (row["answer"],))


def _arc_record(row: Row) -> Record:
    """Labels are A, B, ... or 1, 2, ...; in the file question and options are one mapping."""
    if isinstance(row["question"], Mapping):
        row = {**row, **row["question"], "question": row["question"]["stem"]}
    options = _items(row["choices"])
    choices = [option["text"] for option in options]
    labels = [option["label"] for option in options]
    return _choice_record(row["question"], choices, labels, row["answerKey"])


def _gpqa_record(row: Row) -> Record:
    answer = row["Correct Answer"].strip()
    wrong = [row[f"Incorrect Answer {i}"].strip() for i in (1, 2, 3)]
    return _shuffled_record(row["Question"].strip(), answer, [answer, *wrong])


def _truthfulqa_record(row: Row) -> Record:
    """The original file has {text: label}; the hub has a list of texts and one of labels."""
    targets = row["mc1_targets"]
    if "choices" in targets:
        targets = dict(zip(targets["choices"], targets["labels"], strict=True))
    answers = [text for text, label in targets.items() if label == 1]
    if len(answers) != 1:
        raise ValueError(f"the labels are {list(targets.values())}, expected a single 1")
    return _shuffled_record(row["question"], answers[0], list(targets))


def _cmmlu_record(row: Row) -> Record:
    choices = [row[letter] for letter in "ABCD"]
    return _choice_record(row["Question"], choices, "ABCD", row["Answer"])


def _ceval_record(row: Row) -> Record:
    return _cmmlu_record({**row, "Question": row["question"], "Answer": row["answer"]})


def _choice_record(question: str, choices: list, labels, label, context: str = "") -> Record:
    labels, label = list(labels), str(label).strip()
    if not isinstance(choices, list) or len(choices) != len(labels) or label not in labels:
        raise ValueError(f"{label!r} is not one of {labels}, the labels of the choices {choices}")
    return Record(context, question, (choices[labels.index(label)],), tuple(choices))


def _shuffled_record(question: str, answer: str, choices: list[str]) -> Record:
    """Published with the right choice first; here in an order that their hashes give."""
    choices = sorted(choices, key=lambda choice: sha256(f"{question}\n{choice}".encode()).digest())
    return Record("", question, (answer,), tuple(choices))


def _number(value: object) -> str:
    number = extract_answer("number", str(value))
    if not number:
        raise ValueError(f"{value!r} is not a number")
    return number


def _items(value: list[Row] | Mapping[str, list]) -> list[Row]:
    """A list of mappings; the hub has a mapping of lists instead."""
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        cells = zip(*value.values(), strict=True)
        return [dict(zip(value, values, strict=True)) for values in cells]
    if not isinstance(value, list):
        raise ValueError(f"{str(value)[:60]!r} is not a list")
    return value


@dataclass(frozen=True)
class DataSet:
    """How to read one data set.

    Args:
        to_record: makes a record of a row; None for a row that is no record.
        answer_kind: kind of its answers, as `kvlab.answers.extract_answer` takes it.
        nested: list fields of the published rows whose items are the questions, outermost first.
        has_context: whether a record without a context is left out.
    """

    to_record: Callable[[Row], Record | None]
    answer_kind: str
    nested: tuple[str, ...] = ()
    has_context: bool = False


DATA_SETS = {
    "squad": DataSet(_squad_record, "text", nested=("paragraphs", "qas"), has_context=True),
    "quality": DataSet(_quality_record, "choice", nested=("questions",), has_context=True),
    "self_instruct": DataSet(_instance_record, "text", nested=("instances",), has_context=True),
    "p3": DataSet(_p3_record, "text", has_context=True),
    "long_alpaca": DataSet(_long_alpaca_record, "text", has_context=True),
    "gsm8k": DataSet(_gsm8k_record, "number"),
    "svamp": DataSet(_svamp_record, "number"),
    "math23k": DataSet(_math23k_record, "number"),
    "math": DataSet(_math_record, "math"),
    "math500": DataSet(_math_record, "math"),
    "bbh": DataSet(lambda row: Record("", row["input"], (row["target"],)), "text"),
    "strategyqa": DataSet(_strategyqa_record, "yes_no"),
    "hotpotqa": DataSet(_hotpotqa_record, "text"),
    "arc": DataSet(_arc_record, "choice"),
    "gpqa": DataSet(_gpqa_record, "choice"),
    "truthfulqa": DataSet(_truthfulqa_record, "choice"),
    "cmmlu": DataSet(_cmmlu_record, "choice"),
    "ceval": DataSet(_ceval_record, "choice"),
}
CONTEXTS = tuple(name for name, data_set in DATA_SETS.items() if data_set.has_context)
PROBLEMS = tuple(name for name in DATA_SETS if name not in CONTEXTS)


# -- rows of a source


def _unnest(place: str, row: Row, nested: tuple[str, ...]) -> Iterator[tuple[str, Row]]:
    """The items of nested lists, each with the fields of the rows around it, and their places."""
    with naming(place):
        is_flat = not nested or nested[0] not in _require_fields(row)
        items = [] if is_flat else [{**row, **item} for item in _items(row[nested[0]])]
    if is_flat:
        yield place, row
    for number, item in enumerate(items, 1):
        yield from _unnest(f"{place}, {nested[0]} {number}", item, nested[1:])


def _open_source(source: str | Path | Iterable[Row], split: str) -> tuple[str, Iterable[Row]]:
    """The name of a source for messages, and its rows."""
    if not isinstance(source, str | Path):
        return "the list", source
    path = Path(source)
    if path.is_file() and path.suffix != ".parquet":
        # Not by `datasets`, which would read "1990-01-02" as a time, "007" as 7, "None" as nothing.
        if path.suffix == ".csv":
            return str(path), _csv_rows(path)
        return str(path), _json_rows(path)
    is_path = path.is_absolute() or path.suffix in (".json", ".jsonl", ".csv", ".parquet")
    if is_path and not path.exists():
        raise ValueError(f"There is no file {path}: give one as its authors published it.")
    import datasets  # here, because it takes seconds

    try:
        if path.is_file():
            return str(path), datasets.load_dataset("parquet", data_files=str(path), split="train")
        rows = datasets.load_dataset(*str(source).split(":"), split=split)
    except Exception as error:  # of many kinds, from several packages
        reason = str(error).split("\n")[0].removesuffix(".")
        hint = "give a file, a name on the hub, or a folder that `datasets` reads"
        text = f"The source {str(source)!r}, split {split!r}, cannot be read ({reason}): {hint}."
        raise ValueError(text) from error
    return f"{source}, split {split!r}", rows


def _csv_rows(path: Path) -> list[Row]:
    text = read_text(path)
    limit = csv.field_size_limit(2**31 - 1)  # of the whole process: a long article is one field
    try:
        with naming(path):
            return list(csv.DictReader(io.StringIO(text, newline="")))
    finally:
        csv.field_size_limit(limit)


def _json_rows(path: Path) -> list:
    """The rows of a JSON file: a list (or the one in "data" or "examples"), or value by value."""
    text, values, start = read_text(path).strip(" \t\r\n"), [], 0
    with naming(path):
        while start < len(text):
            value, end = json.JSONDecoder().raw_decode(text, start)
            values.append(value)
            start = len(text) - len(text[end:].lstrip(" \t\r\n"))
    if len(values) == 1 and isinstance(values[0], dict):
        values = [values[0].get("examples", values[0].get("data", values))]
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


# -- question/answer pairs, prompts


def read_faq(path: str | Path) -> list[dict[str, str]]:
    """Read the question/answer pairs of a file, or of all files of a folder (sorted by name).

    Args:
        path: a `.jsonl` file (each row has "question" and may have "answer", "domain" and "id";
            other fields are ignored), a `.yml` or `.yaml` file of the chatterbot corpus
            (https://github.com/gunthercox/chatterbot-corpus), or a folder of such files. In the
            corpus each reply answers the first text, and the first category is the domain.

    Returns:
        One mapping per pair, with those of the four fields that the file has.

    Raises:
        ValueError: a row does not fit; the message names file and row. A conversation without a
            reply is left out, with a warning.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "bingo.yml"
        >>> _ = path.write_text("{categories: [bingo], conversations: [[Two ducks, 22]]}")
        >>> read_faq(path)
        [{'question': 'Two ducks', 'answer': '22', 'domain': 'bingo'}]
    """
    path, records = Path(path), []
    readers = {".jsonl": _json_pairs, ".yml": _yaml_pairs, ".yaml": _yaml_pairs}
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in readers]
    if not files:
        raise ValueError(f"There are no records in {path}: expected {', '.join(readers)} files.")
    for file in files:
        records += readers[file.suffix](file)
    return records


def _json_pairs(path: Path) -> list[dict[str, str]]:
    records = []
    for number, row in enumerate(_json_rows(path), 1):
        with naming(f"{path}, row {number}"):
            _require_fields(row)
            others = [f for f in ("answer", "domain", "id") if row.get(f) is not None]
            record = {field: row[field] for field in ("question", *others)}
            _require_words(list(record.values()))
        records.append(record)
    return records


def _yaml_pairs(path: Path) -> list[dict[str, str]]:
    text = read_text(path)
    with naming(path):
        # The BaseLoader is safe, and all scalars stay text: 22, yes, 1990-01-02.
        corpus = yaml.load(text, yaml.BaseLoader)
        domain = _require_words(corpus["categories"])[0]
        conversations = _items(corpus["conversations"])
    records = []
    for number, conversation in enumerate(conversations, 1):
        place = f"{path}, conversation {number}"
        with naming(place):
            texts = [conversation] if isinstance(conversation, str) else conversation
            question, *answers = _require_words(texts)
        if not answers:
            warnings.warn(f"{place} is left out: {question[:80]!r} has no answer.", stacklevel=3)
        for answer in answers:
            records.append({"question": question, "answer": answer, "domain": domain})
    return records


def _require_fields(row: object) -> Row:
    if not isinstance(row, Mapping):
        raise TypeError(f"{str(row)[:60]!r} is no row of named fields")
    return row


def _require_words(texts: list[str]) -> list[str]:
    is_list = isinstance(texts, list) and len(texts) > 0
    if not is_list or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{texts!r} is not a list of texts")
    "".join(texts).encode()  # as a Record does
    return texts


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: one per line, or JSON: a list, or value by value.

    A JSON value is a prompt, or a row with "turns", of which the first is used (the form of
    Spec-Bench). A file is JSON if its name ends with .json or .jsonl, or if it begins with "{", or
    with "[" and a text, a row or a list. A line ends with a newline, not with U+2028 or the like.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "prompts.jsonl"
        >>> _ = path.write_text('{"turns": ["Hello.", "Go on."]}')
        >>> read_prompts(path)
        ['Hello.']
    """
    path = Path(path)
    text = read_text(path)
    if path.suffix not in (".json", ".jsonl") and not re.match(r'\s*(\{|\[\s*["{[\]])', text):
        return [line.strip() for line in text.split("\n") if line.strip()]
    prompts = []
    for number, row in enumerate(_json_rows(path), 1):
        with naming(f"{path}, row {number}"):
            turns = [row] if isinstance(row, str) else _require_fields(row)["turns"]
            prompts.append(_require_words(turns)[0])
    if not prompts:
        raise ValueError(f"{path} has no prompts.")
    return prompts
