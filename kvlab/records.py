"""Records and prompts from files.

Question/answer records, for `kvlab.knowledge`, are JSON lines, or the YAML of the chatterbot corpus
(gunthercox, https://github.com/gunthercox/chatterbot-corpus, BSD-3-Clause): `categories: [...]` and
`conversations: [[text, reply, reply, ...], ...]`. Each reply counts as an answer to the first text,
and the first category is the domain.

A `Record` holds a context to read, a question about it and its answers. SQuAD, QuALITY,
Self-Instruct, P3 and LongAlpaca are read into such records, from the files that their authors
published or from the Hugging Face hub's rows.

So are problems that need no context or hold one: GSM8K, SVAMP, Math23K, MATH, StrategyQA, ARC,
HotpotQA, BBH, GPQA, TruthfulQA, CMMLU and C-Eval. `extract_answer` finds what a generated text
answers, `same_answer` compares two answers.
"""

import csv
import html
import inspect
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

FIELDS = ("question", "answer", "domain", "id")
LINE = '{"question": "A question?", "answer": "An answer."}'


def faq(path: str | Path) -> list[dict[str, str]]:
    """Read the records of a file, or of all files of a folder (sorted by name).

    Args:
        path: a `.jsonl` file (in each line "question" and, if there are any, "answer", "domain" and
            "id"; other fields are ignored), a `.yml` or `.yaml` file of the chatterbot corpus, or a
            folder of such files.

    Returns:
        One mapping a pair, with those of the four fields that the file gives; pairs that occur
        twice are there twice.

    Raises:
        ValueError: there is no such file, or one has another form; the message names file, line or
            entry, and field. A conversation of one text has no answer: it is left out, with a
            warning.

    Example:
        >>> import tempfile
        >>> text = {"categories": ["bingo"], "conversations": [["Two little ducks?", "22", "quack"]]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "bingo.yml").write_text(yaml.safe_dump(text))
        ...     for record in faq(folder):
        ...         record
        {'question': 'Two little ducks?', 'answer': '22', 'domain': 'bingo'}
        {'question': 'Two little ducks?', 'answer': 'quack', 'domain': 'bingo'}
    """
    path, endings = Path(path), ", ".join(READERS)
    files = (
        sorted(file for file in path.iterdir() if file.suffix in READERS)
        if path.is_dir()
        else [path]
    )
    _require(
        path.exists(),
        f"There is no file or folder {path}: give one that holds records ({endings}).",
    )
    _require(files, f"The folder {path} has no file that ends in {endings}: give one that does.")
    _require(
        files[0].suffix in READERS, f"{path} ends in {path.suffix!r}, expected one of {endings}."
    )
    records = []
    for file in files:
        records += READERS[file.suffix](file)
    return records


def _require(condition: object, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _json_lines(path: Path, example: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    like = example and f" like {example}"
    for number, line in enumerate(
        _text(path).split("\n"), 1
    ):  # not splitlines: a JSON text may hold U+2028
        if line.strip():
            try:
                given = json.loads(line)
            except ValueError:
                given = None
            place = f"{path}, line {number}"
            _require(
                isinstance(given, dict), f"{place} is {line[:60]!r}, expected a JSON object{like}."
            )
            yield place, given


def _pairs(path: Path) -> list[dict[str, str]]:
    return [_pair(place, given) for place, given in _json_lines(path, LINE)]


def _pair(place: str, given: dict[str, Any]) -> dict[str, str]:
    record = {field: given[field] for field in FIELDS if given.get(field) is not None}
    _require(
        "question" in record, f"{place} has no 'question', expected a JSON object like {LINE}."
    )
    for field, value in record.items():
        _require_text(f"{place}, has {field!r} =", value)
    return record


def _chatterbot(path: Path) -> list[dict[str, str]]:
    try:
        given = yaml.load(
            _text(path), yaml.BaseLoader
        )  # safe, and all scalars stay text: 22, yes, 1990-01-02
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path} is no YAML ({' '.join(str(error).split())}): mend it there."
        ) from error
    shape = "expected a mapping with the lists 'categories' and 'conversations'"
    _require(isinstance(given, dict), f"{path} holds {str(given)[:60]!r}, {shape}.")
    for field in ("categories", "conversations"):
        value = given.get(field)
        _require(
            isinstance(value, list) and value,
            f"{path} has {field!r} = {str(value)[:60]!r}, {shape}.",
        )
    _require_text(f"{path}, has 'categories' beginning with", given["categories"][0])
    records = []
    for number, conversation in enumerate(given["conversations"], 1):
        texts = [conversation] if isinstance(conversation, str) else conversation
        place = f"{path}, entry {number} of 'conversations',"
        _require(
            isinstance(texts, list) and texts,
            f"{place} is {str(texts)[:60]!r}, expected a list of texts.",
        )
        for text in texts:
            _require_text(f"{place} has a text that is", text)
        question, *answers = texts
        if not answers:
            warnings.warn(f"{place} is left out: {question[:80]!r} has no answer.", stacklevel=3)
        records += [
            {"question": question, "answer": text, "domain": given["categories"][0]}
            for text in answers
        ]
    return records


def _require_text(place: str, value: object) -> None:
    fine = isinstance(value, str) and value.strip()
    _require(
        fine, f"{place} {value!r}, expected a text (in quotes, if it holds a colon or the like)."
    )


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it as such.") from error


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: one a line, or, if it begins with "{", the first of "turns" in each line (as Spec-Bench has).

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     print('{"turns": ["Hello.", "Go on."]}', file=file, flush=True)
        ...     read_prompts(Path(file.name))
        ['Hello.']
    """
    lines = [
        (n, line.strip())
        for n, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if line.strip()
    ]
    if not lines:
        raise ValueError(f"{path} is empty, expected one prompt a line.")
    if not lines[0][1].startswith("{"):
        return [line for _, line in lines]
    prompts = []
    for n, line in lines:
        try:
            prompts.append(json.loads(line)["turns"][0])
        except (ValueError, TypeError, KeyError, IndexError):
            prompts.append(None)
        if not isinstance(prompts[-1], str):
            raise ValueError(
                f'{path}, line {n} is {line[:60]!r}, expected a JSON object like {{"turns": ["A prompt."]}}.'
            )
    return prompts


READERS = {".jsonl": _pairs, ".yml": _chatterbot, ".yaml": _chatterbot}


# -- a context to read, a question, its answers

Source = str | Path | Iterable[Mapping[str, Any]]
KINDS = {
    str: "a text",
    int: "a whole number",
    list: "a list",
    bool: "true or false",
    Mapping: "a mapping",
}
KINDS |= {str | int | float: "a number"}
Adapt = Callable[[str, Mapping[str, Any]], Iterator["Record"]]


@dataclass(frozen=True)
class Record:
    """A question about a context: what KV-Distill (arXiv 2503.10337) compresses, what it keeps, what it has to say.

    Args:
        context: the text to read; a method may compress it. Most problems have none.
        question: the text that comes after it, never compressed.
        answers: one or more accepted texts, each once; of a multiple choice, the right option
            alone.
        choices: the options of a multiple choice, else none.
        reasoning: what leads to the answer, where the data set says it.

    Example:
        >>> Record("Anna lives in Rome.", "Where does Anna live?", ("Rome", "in Rome")).answer
        'Rome'
    """

    context: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    reasoning: str = ""

    @property
    def answer(self) -> str:
        """The first of the answers: the one to learn from."""
        return self.answers[0]

    @property
    def letter(self) -> str:
        """The letter of the right choice: A is the first."""
        _require(
            self.choices, f"{self.question[:60]!r} has no choices, so no letter: use its answer."
        )
        return _letter(self.choices.index(self.answer))


def _letter(number: int) -> str:
    return chr(ord("A") + number)


def read_records(kind: str, source: str | Path, split: str = "train") -> list[Record]:
    """Records of a file or, if there is no such file, of a data set of the Hugging Face hub.

    Args:
        kind: one of `RECORDS`, such as "squad" or "gsm8k".
        source: a file as the data set's authors published it, or a name on the hub, with the
            configuration behind a colon if there are several: "rajpurkar/squad",
            "emozilla/quality", "bigscience/P3:adversarial_qa_dbert_based_on".
        split: which part of the hub's data set; a file is read whole.

    Raises:
        ValueError: the kind is unknown, there is neither file nor data set, or a row has another
            form.

    Example:
        >>> import tempfile
        >>> row = {"context": "Anna lives in Rome.", "question": "Where?", "answers": {"text": ["Rome"]}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "rows.jsonl"
        ...     _ = path.write_text(json.dumps(row))
        ...     read_records("squad", path)
        [Record(context='Anna lives in Rome.', question='Where?', answers=('Rome',), choices=(), reasoning='')]
    """
    _require(
        kind in RECORDS,
        f"There are no records of kind {kind!r}: expected one of {', '.join(RECORDS)}.",
    )
    if Path(source).is_file():
        return RECORDS[kind](source)
    file = "give a file as the data set's authors published it"
    _require(
        Path(source).suffix not in (".json", ".jsonl", ".csv"),
        f"There is no file {source}: {file}.",
    )
    import datasets  # here, because it takes seconds

    try:
        rows = datasets.load_dataset(*str(source).split(":"), split=split)
    except (OSError, ValueError) as error:
        said = f"the Hugging Face hub gave no data set of that name with a split {split!r} (it says: {error})"
        hint = "or check name, split and connection"
        raise ValueError(f"There is no file {source}, and {said}: {file}, {hint}.") from error
    return RECORDS[kind](rows, f"{source}, split {split!r}")


def squad(source: Source, name: str = "the list") -> list[Record]:
    """SQuAD, v1.1 and v2 (arXiv 1606.05250, 1806.03822, https://rajpurkar.github.io/SQuAD-explorer): a span answers.

    Args:
        source: a `.json` file (`data[].paragraphs[]` with "context" and `qas[]` of "question" and
            `answers[]` of "text"), or rows as the hub has them ("context", "question", "answers"
            with a list "text").
        name: what messages call rows that come from no file.

    Returns:
        One record a question, texts as written. Questions of v2 that nothing answers are left out;
        a warning counts them.

    Raises:
        ValueError: something has another form; the message names the file, article, paragraph,
            question and field.

    Example:
        >>> answers = {"text": ["Rome", "Rome"], "answer_start": [14, 14]}
        >>> squad([{"context": "Anna lives in Rome.", "question": "Where?", "answers": answers}])[0].answers
        ('Rome',)
    """
    return _read(source, name, _squad)


def _squad(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    flat = {"context", "question"} & row.keys()
    for at, paragraph in [(place, row)] if flat else _each(place, row, "paragraphs", "paragraph"):
        context = _field(at, paragraph, "context")
        for there, asked in [(place, row)] if flat else _each(at, paragraph, "qas", "question"):
            texts = [
                _field(where, answer, "text")
                for where, answer in _each(there, asked, "answers", "answer")
            ]
            yield Record(
                context,
                _field(there, asked, "question"),
                tuple(dict.fromkeys(filter(str.strip, texts))),
            )


def quality(source: Source, name: str = "the list") -> list[Record]:
    r"""QuALITY (arXiv 2112.08608, https://github.com/nyu-mll/quality): four options about an article of 5000 words.

    Args:
        source: a file of JSON lines ("article" and `questions[]` of "question", four "options",
            "gold_label" or else "writer_label", both counted from 1), or rows as emozilla/quality
            on the hub has them ("article", "question", "options", "answer", counted from 0). The
            test split has no labels.
        name: as for `squad`.

    Returns:
        One record a question, its options in `choices`. The HTML of the files that are not called
        htmlstripped becomes plain text, paragraphs a blank line apart.

    Raises:
        ValueError: something has another form; the message names the file, line, question and
            field.

    Example:
        >>> asked = {"question": "Who waits?", "options": ["Ann", "Ben", "Cy", "Di"], "gold_label": 1, "writer_label": 2}
        >>> record = quality([{"article": "<p>Ann &amp; Ben</p><p>wait.</p>", "questions": [asked]}])[0]
        >>> record.context, record.answer, record.choices
        ('Ann & Ben\n\nwait.', 'Ann', ('Ann', 'Ben', 'Cy', 'Di'))
    """
    return _read(source, name, _quality)


def _quality(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    article = _plain(_field(place, row, "article"))
    flat = "question" in row
    for at, asked in [(place, row)] if flat else _each(place, row, "questions", "question"):
        options = _field(at, asked, "options", list)
        fine = len(options) == 4 and all(
            isinstance(option, str) and option.strip() for option in options
        )
        _require(fine, f"{at} has 'options' = {str(options)[:60]!r}, expected four texts.")
        yield Record(
            article, _field(at, asked, "question"), (options[_right(at, asked)],), tuple(options)
        )


def _right(place: str, asked: Mapping[str, Any]) -> int:
    """The index of the right option: "answer" counts from 0, the labels of the files count from 1."""
    given = [
        field for field in ("answer", "gold_label", "writer_label") if asked.get(field) is not None
    ]
    field = given[0] if given else "gold_label"
    label, first = _field(place, asked, field, int), 0 if field == "answer" else 1
    _require(
        first <= label < first + 4,
        f"{place} has {field!r} = {label}, expected {first} to {first + 3}.",
    )
    return label - first


def _plain(article: str) -> str:
    """The text of an article in HTML; one without paragraph and line tags is plain already and stays as it is."""
    if not re.search(r"<(p|br)\b[^<>]*>", article, re.IGNORECASE):
        return article
    text = re.sub(r"(?is)<!--.*?-->|<!doctype.*?>|<(head|style|script)\b.*?</\1>", "", article)
    text = re.sub(r"(?i)</?(p|div|h\d|hr|table|tr|ul|ol|li|pre|blockquote)\b[^<>]*>", "\n\n", text)
    text = re.sub(r"(?i)<br\b[^<>]*>", "\n", text)
    text = html.unescape(re.sub(r"(?i)</?[a-z][^<>]*>", "", text))
    return re.sub(r"[^\S\n]*\n\s*\n\s*", "\n\n", text).strip()


def self_instruct(source: Source, name: str = "the list") -> list[Record]:
    """Self-Instruct (arXiv 2212.10560, https://github.com/yizhongw/self-instruct): the input is read, the rest asked.

    Args:
        source: a file of JSON lines such as seed_tasks.jsonl or user_oriented_instructions.jsonl
            ("instruction" and `instances[]` of "input" and "output"), or rows as the hub has them.
        name: as for `squad`.

    Returns:
        One record an instance: the input is the context, the instruction the question. An instance
        without input has nothing to compress: it is left out, and a warning counts such.

    Raises:
        ValueError: something has another form; the message names the file, line, instance and
            field.

    Example:
        >>> self_instruct([{"instruction": "Name the color.", "instances": [{"input": "A red box.", "output": "red"}]}])
        [Record(context='A red box.', question='Name the color.', answers=('red',), choices=(), reasoning='')]
    """
    return _read(source, name, _self_instruct)


def _self_instruct(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    question = _field(place, row, "instruction")
    for at, instance in _each(place, row, "instances", "instance"):
        yield Record(_field(at, instance, "input"), question, (_field(at, instance, "output"),))


def p3(source: Source, name: str = "the list") -> list[Record]:
    r"""P3 (arXiv 2110.08207, https://huggingface.co/datasets/bigscience/P3): the passage is read, the rest asked.

    A prompt is parted at blank lines and before labels such as "Question:" or, if there are none,
    at lines. If it names a passage (or text, context, article ...), its longest part is the
    context, and all that stands around it, in its order, is the question. Of a passage of several
    paragraphs only the longest is the context.

    Args:
        source: a file of JSON lines or rows, with "prompt" and "completion" as Self-Instruct
            published some of P3, or with "inputs_pretokenized", "targets_pretokenized" and, for
            some, "answer_choices" and "is_correct" as the hub does.
        name: as for `squad`.

    Returns:
        One record a prompt; the answer is without the mark <|endoftext|> and outer white space.
        Prompts without a passage are left out, and a warning counts them; targets that "is_correct"
        calls wrong are left out as well.

    Raises:
        ValueError: something has another form; the message names the file, line and field.

    Example:
        >>> prompt = "Question: Who waits?\nContext: Anna waits for Ben.\nAnswer:"
        >>> record = p3([{"prompt": prompt, "completion": "Anna<|endoftext|>"}])[0]
        >>> record.context, record.question, record.answer
        ('Context: Anna waits for Ben.', 'Question: Who waits?\nAnswer:', 'Anna')
    """
    return _read(source, name, _p3)


def _p3(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    hub = "inputs_pretokenized" in row
    context, question = _passage(_field(place, row, "inputs_pretokenized" if hub else "prompt"))
    target = _field(place, row, "targets_pretokenized" if hub else "completion")
    answer = target.strip().removesuffix("<|endoftext|>").strip()
    choices = tuple(str(choice).strip() for choice in row.get("answer_choices") or ())
    if row.get("is_correct", True):
        yield Record(context, question, (answer,), choices if answer in choices else ())


PASSAGE = "passage|paragraph|context|text|snippet|article|document|story|background|dialogue|conversation|review"
LABELS = f"{PASSAGE}|question|q|answer|a|hint|options|choices|title|summary"


def _passage(prompt: str) -> tuple[str, str]:
    """The passage of a prompt ("" if it has none) and what stands around it."""
    border = rf"(?i)(\n\s*\n|\n(?=(?:{LABELS})\s*:))"
    if not re.search(border, prompt.strip()):
        border = r"(\n)"
    parts = re.split(border, prompt.strip())
    longest = max(range(0, len(parts), 2), key=lambda i: len(parts[i]))
    context, question = parts[longest], "".join(parts[:longest] + parts[longest + 2 :]).strip()
    named = re.search(rf"(?i)\b(?:{PASSAGE})\b", question) or re.match(
        rf"(?i)(?:{PASSAGE})\s*:", context
    )
    return (context.strip(), question) if named else ("", prompt)


def long_alpaca(source: Source, name: str = "the list") -> list[Record]:
    r"""LongAlpaca (arXiv 2309.12307, https://huggingface.co/datasets/Yukang/LongAlpaca-12k): questions on papers.

    An instruction with an input asks about that input. Any other is cut in two behind the last "Now
    the paper ends." ("Now the material ends.", "Now the second paper ends."), else before its last
    paragraph: context, then question.

    Args:
        source: a `.json` file (a list of "instruction", "output" and, for some, "input"), or rows
            as the hub has them.
        name: as for `squad`.

    Returns:
        One record a row. Rows of one paragraph have no context: they are left out, and a warning
        counts them.

    Raises:
        ValueError: something has another form; the message names the file, row and field.

    Example:
        >>> text = "Below is a paper.\n The paper begins. \n Cats purr. \n Now the paper ends. \nWhat do cats do?"
        >>> record = long_alpaca([{"instruction": text, "output": "They purr."}])[0]
        >>> record.context[-32:], record.question
        ('Cats purr. \n Now the paper ends.', 'What do cats do?')
    """
    return _read(source, name, _long_alpaca)


def _long_alpaca(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    text, output = _field(place, row, "instruction").strip(), _field(place, row, "output")
    if row.get("input"):
        yield Record(_field(place, row, "input"), text, (output,))
        return
    ends = [
        found.end()
        for found in re.finditer(
            r"(?i)\bnow the (?:\w+ )?(?:paper|material|guideline) ends\.", text
        )
    ]
    cut = ends[-1] if ends else max(text.rfind("\n\n"), 0)
    yield Record(text[:cut].strip(), text[cut:].strip(), (output,))


def _read(
    source: Source,
    name: str,
    adapt: Adapt,
    needs: tuple[str, ...] = ("context", "question", "answer"),
) -> list[Record]:
    """All records of a source, but for those that lack one of the texts they need: a warning counts these."""
    given = [record for place, row in _rows(source, name) for record in adapt(place, row)]
    lacks = [_lack(record, needs) for record in given]
    if any(lacks):
        counts = Counter(filter(None, lacks))
        told = ", ".join(f"{count} without {field}" for field, count in counts.items())
        place = source if isinstance(source, str | Path) else name
        outside = next(
            n for n, frame in enumerate(inspect.stack(0), 1) if frame.filename != __file__
        )
        warnings.warn(
            f"{place}: {counts.total()} of {len(given)} records are left out: {told}.",
            stacklevel=outside,
        )
    return [record for record, lack in zip(given, lacks, strict=True) if not lack]


def _lack(record: Record, needs: tuple[str, ...]) -> str:
    """The first of the texts that is not there, or nothing."""
    texts = {
        "context": record.context,
        "question": record.question,
        "answer": "".join(record.answers),
    }
    return next((field for field in needs if not texts[field].strip()), "")


def _rows(source: Source, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(source, str | Path):
        return _numbered(name, "row", source)
    path = Path(source)
    _require(
        path.is_file(), f"There is no file {path}: give one as the data set's authors published it."
    )
    if path.suffix == ".csv":
        return _numbered(str(path), "row", csv.DictReader(io.StringIO(_text(path), newline="")))
    if path.suffix != ".json":
        return _json_lines(path)
    text = _text(path)
    if "\n}\n{\n" in text:  # Math23K is published as one object behind the other
        text = "[" + text.replace("\n}\n{\n", "\n},\n{\n") + "]"
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no JSON ({error}): mend it or, if each line is JSON, call it .jsonl."
        ) from error
    word, rows = "row", given
    if isinstance(given, dict):
        word, rows = (
            ("example", given["examples"])
            if "examples" in given
            else ("article", given.get("data"))
        )
    shape = "expected a list of rows, or a mapping with such a list in 'data' or 'examples'"
    _require(isinstance(rows, list), f"{path} holds {str(given)[:60]!r}, {shape}.")
    return _numbered(str(path), word, rows)


def _each(
    place: str, row: Mapping[str, Any], field: str, word: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The mappings of a list field, each with its place; the hub has a mapping of lists instead of such a list."""
    value = row.get(field)
    columns = list(value.values()) if isinstance(value, Mapping) else []
    if (
        all(isinstance(column, list) for column in columns)
        and len({len(column) for column in columns}) == 1
    ):
        row = {
            **row,
            field: [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)],
        }
    return _numbered(place, word, _field(place, row, field, list))


def _numbered(
    place: str, word: str, rows: Iterable[Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in enumerate(rows, 1):
        at = f"{place}, {word} {number}"
        _require(
            isinstance(row, Mapping), f"{at} is {str(row)[:60]!r}, expected a mapping of fields."
        )
        yield at, row


def _field(place: str, row: Mapping[str, Any], field: str, kind: type = str) -> Any:
    value = row.get(field)
    seen = f"{field!r} = {str(value)[:60]!r}" if field in row else f"no {field!r}"
    _require(isinstance(value, kind), f"{place} has {seen}, expected {KINDS[kind]}.")
    return value


# -- problems: a question, often the reasoning, an answer that can be checked


def _problems(adapt: Adapt) -> Callable[..., list[Record]]:
    """Make a reader, with the parameters of `squad`, of a function that gives the records of one row."""

    def read(source: Source, name: str = "the list") -> list[Record]:
        return _read(source, name, adapt, needs=("question", "answer"))

    read.__name__, read.__qualname__, read.__doc__ = (
        adapt.__name__,
        adapt.__qualname__,
        adapt.__doc__,
    )
    return read


@_problems
def gsm8k(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    r"""GSM8K (arXiv 2110.14168, https://github.com/openai/grade-school-math): sums in English, solved step by step.

    The solution before "####" is the reasoning, without the calculator's notes in <<>>.

    >>> record = gsm8k([{"question": "2 pens and 3?", "answer": "It is 2+3 = <<2+3=5>>5.\n#### 5"}])[0]
    >>> record.reasoning, record.answer
    ('It is 2+3 = 5.', '5')
    """
    reasoning, mark, answer = _field(place, row, "answer").rpartition("####")
    _require(
        mark,
        f"{place} has 'answer' = {answer[:60]!r}, expected a solution with #### before its number.",
    )
    reasoning = re.sub(r"<<.*?>>", "", reasoning).strip()
    yield Record(
        "",
        _field(place, row, "question"),
        (_numeral(place, "answer", answer),),
        reasoning=reasoning,
    )


@_problems
def svamp(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    """SVAMP (arXiv 2103.07191, https://github.com/arkilpatel/SVAMP): its equation is the reasoning.

    >>> svamp([{"Body": "Ann has 3 pens.", "Question": "And 2 more?", "Answer": 5.0, "Equation": "( 3 + 2 )"}])
    [Record(context='', question='Ann has 3 pens. And 2 more?', answers=('5',), choices=(), reasoning='( 3 + 2 )')]
    """
    question = f"{_field(place, row, 'Body').strip()} {_field(place, row, 'Question').strip()}"
    answer = str(_field(place, row, "Answer", str | int | float)).removesuffix(".0")
    yield Record(
        "", question, (_numeral(place, "Answer", answer),), reasoning=_field(place, row, "Equation")
    )


@_problems
def math23k(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    """Math23K (https://aclanthology.org/D17-1088): sums in Chinese; the equation is the reasoning.

    >>> row = {"original_text": "1的一半是多少？", "equation": "x=1/2", "ans": "((1)/(2))"}  # codespell:ignore ans
    >>> math23k([row])[0].answer
    '1/2'
    """
    answer = _numeral(place, "ans", _field(place, row, "ans"))  # codespell:ignore ans
    yield Record(
        "", _field(place, row, "original_text"), (answer,), reasoning=_field(place, row, "equation")
    )


@_problems
def math(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    r"""MATH and MATH500 (arXiv 2103.03874, 2305.20050): the whole solution is the reasoning, its last box the answer.

    >>> math([{"problem": "Halve 1.", "solution": r"It is $\boxed{\frac{1}{2}}$."}])[0].answer
    '\\frac{1}{2}'
    """
    solution = _field(place, row, "solution")
    answer = _boxed(solution)
    _require(
        answer, f"{place} has 'solution' = {solution[:60]!r}, expected an answer in \\boxed{{}}."
    )
    yield Record("", _field(place, row, "problem"), (answer,), reasoning=solution)


@_problems
def strategyqa(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    """StrategyQA (arXiv 2101.02235): yes or no; the facts, a list or one text, are the reasoning.

    >>> strategyqa([{"question": "Do cats purr?", "answer": True, "facts": ["Cats purr."]}])[0].answer
    'yes'
    """
    facts = row.get("facts")
    reasoning = facts if isinstance(facts, str) else " ".join(_texts(place, row, "facts"))
    answer = "yes" if _field(place, row, "answer", bool) else "no"
    yield Record("", _field(place, row, "question"), (answer,), reasoning=reasoning)


@_problems
def hotpotqa(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    r"""HotpotQA (arXiv 1809.09600, https://hotpotqa.github.io): the context is all paragraphs under their titles.

    >>> row = {"context": [["Ann", ["Ann sings.", " She waits."]]], "question": "Who waits?", "answer": "Ann"}
    >>> hotpotqa([row])[0].context
    'Ann\nAnn sings. She waits.'
    """
    if isinstance(row.get("context"), list):  # the original file has pairs
        keys = ("title", "sentences")
        pairs = [
            dict(zip(keys, pair, strict=False)) if isinstance(pair, list) else pair
            for pair in row["context"]
        ]
        row = {**row, "context": pairs}
    paragraphs = [
        f"{_field(at, paragraph, 'title')}\n{''.join(_texts(at, paragraph, 'sentences')).strip()}"
        for at, paragraph in _each(place, row, "context", "paragraph")
    ]
    yield Record(
        "\n\n".join(paragraphs), _field(place, row, "question"), (_field(place, row, "answer"),)
    )


@_problems
def bbh(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    """BIG-Bench Hard (arXiv 2210.09261, https://github.com/suzgunmirac/BIG-Bench-Hard): options stay in the question.

    >>> bbh([{"input": "not True is", "target": "False"}])[0].answer
    'False'
    """
    yield Record("", _field(place, row, "input"), (_field(place, row, "target"),))


@_problems
def arc(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    """ARC (arXiv 1803.05457): options that are labeled A, B, ... or 1, 2, ...

    >>> options = {"text": ["snow", "sun"], "label": ["1", "2"]}
    >>> arc([{"question": "What is hot?", "choices": options, "answerKey": "2"}])[0].answer
    'sun'
    """
    stem = (
        row["question"] if isinstance(row.get("question"), Mapping) else {}
    )  # in the original file, with choices
    question = _field(place, stem or row, "stem" if stem else "question")
    options = list(_each(place, stem or row, "choices", "choice"))
    choices, labels = (
        [_field(at, option, field) for at, option in options] for field in ("text", "label")
    )
    yield _labeled(place, row, question, choices, labels, "answerKey")


@_problems
def gpqa(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    """GPQA (arXiv 2311.12022): the options are put in an order that their hashes give, the same each time.

    >>> row = {"Question": "What is hottest?", "Correct Answer": "Sun"}
    >>> gpqa([row | {f"Incorrect Answer {i}": text for i, text in enumerate(("Ice", "Mud", "Fog"), 1)}])[0].choices
    ('Mud', 'Ice', 'Sun', 'Fog')
    """
    fields = ("Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3)))
    yield _mixed(
        _field(place, row, "Question").strip(),
        [_field(place, row, field).strip() for field in fields],
    )


@_problems
def truthfulqa(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    """TruthfulQA's MC1 (arXiv 2109.07958): as published the right option is always the first; ordered as for `gpqa`.

    >>> truthfulqa([{"question": "What is hottest?", "mc1_targets": {"Sun": 1, "Ice": 0}}])[0].choices
    ('Ice', 'Sun')
    """
    targets = _field(place, row, "mc1_targets", Mapping)
    if "choices" not in targets:  # the original file has {text: label}
        targets = {"choices": list(targets), "labels": list(targets.values())}
    choices, labels = _texts(place, targets, "choices"), _field(place, targets, "labels", list)
    fine = len(labels) == len(choices) and labels.count(1) == 1
    _require(
        fine,
        f"{place} has 'labels' = {str(labels)[:60]!r}, expected one for each choice, and a single 1.",
    )
    right = labels.index(1)
    yield _mixed(
        _field(place, row, "question"), [choices[right], *choices[:right], *choices[right + 1 :]]
    )


@_problems
def cmmlu(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    """CMMLU (arXiv 2306.09212, https://github.com/haonan-li/CMMLU): four options, in Chinese.

    >>> cmmlu([{"Question": "1+1=？", "A": "1", "B": "2", "C": "3", "D": "4", "Answer": "B"}])[0].answer
    '2'
    """
    yield _four(place, row, "Question", "Answer")


@_problems
def ceval(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    """C-Eval (arXiv 2305.08322, https://github.com/hkust-nlp/ceval): four options, in Chinese. Tests have no answers.

    >>> ceval([{"question": "1+1=？", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}])[0].letter
    'B'
    """
    yield _four(place, row, "question", "answer")


def _four(place: str, row: Mapping[str, Any], question: str, answer: str) -> Record:
    choices = [_field(place, row, letter) for letter in "ABCD"]
    return _labeled(place, row, _field(place, row, question), choices, list("ABCD"), answer)


def _labeled(
    place: str, row: Mapping, question: str, choices: list[str], labels: list[str], field: str
) -> Record:
    label = _field(place, row, field).strip()
    _require(
        label in labels, f"{place} has {field!r} = {label!r}, expected one of {', '.join(labels)}."
    )
    return Record("", question, (choices[labels.index(label)],), tuple(choices))


def _mixed(question: str, choices: list[str]) -> Record:
    """Of choices with the right one in front: else whoever says A is always right."""
    mixed = sorted(choices, key=lambda choice: sha256(f"{question}\n{choice}".encode()).digest())
    return Record("", question, (choices[0],), tuple(mixed))


def _texts(place: str, row: Mapping[str, Any], field: str) -> list[str]:
    texts = _field(place, row, field, list)
    fine = all(isinstance(text, str) for text in texts)
    _require(fine, f"{place} has {field!r} = {str(texts)[:60]!r}, expected a list of texts.")
    return texts


def _numeral(place: str, field: str, text: str) -> str:
    number = extract_answer("number", text)
    _require(number, f"{place} has {field!r} = {text.strip()[:60]!r}, expected a number.")
    return number


def messages(record: Record) -> list[dict[str, str]]:
    r"""A problem as a conversation: context, question and lettered options, then the reasoning and the answer.

    >>> messages(Record("", "What is hot?", ("sun",), ("snow", "sun"), reasoning="Snow is cold."))[0]["content"]
    'What is hot?\nA) snow\nB) sun'
    >>> messages(Record("", "2 pens and 3?", ("5",), reasoning="2+3=5."))[1]["content"]
    '2+3=5. The answer is 5.'
    """
    options = [f"{_letter(number)}) {choice}" for number, choice in enumerate(record.choices)]
    question = "\n".join([record.question, *options])
    asked = f"{record.context}\n\n{question}" if record.context else question
    solution = f"{record.reasoning} The answer is {accepted(record)[0]}."
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": solution.strip()}]


def accepted(record: Record) -> tuple[str, ...]:
    """What a solution may answer: of a multiple choice the letter, else the answers."""
    return (record.letter,) if record.choices else record.answers


# -- answers in generated texts


def extract_answer(kind: str, text: str) -> str:
    r"""What a generated text answers, or nothing.

    It is looked for in the last \boxed{}, then behind the last "answer is", "Answer:", "####" or
    "答案是", then in the whole text.

    Args:
        kind: of the answer; `ANSWER_KINDS` has that of each data set. "number": in a box or behind
            a mark the first one after the last "=", else the last one of the text; without currency
            and thousands commas. As the GSM8K task of the lm-evaluation-harness has it, whose
            strict pattern reads the number behind "####" and whose flexible one the last number.
            "math": what is in the box, else the sentence behind the mark, else the last line.
            "choice": the letter, A to M, also where it begins the text or is the last in
            parentheses; an article is none. "yes_no": "yes" or "no", also for true and false.
            "text": as "math", but the whole line behind the mark, as BBH's task has it, without the
            final period.
        text: what a model said.

    Example:
        >>> extract_answer("number", "They pay 2 * 600 = $1,200. #### 1,200"), extract_answer("choice", "So it is (B).")
        ('1200', 'B')
        >>> extract_answer("math", r"Thus $x = \boxed{\frac{1}{\sqrt{2}}}$."), extract_answer("yes_no", "The answer is no.")
        ('\\frac{1}{\\sqrt{2}}', 'no')
    """
    return _extractor(kind)(text)


def same_answer(kind: str, one: str, two: str) -> bool:
    r"""Whether two extracted answers are the same; where there is none, there is no sameness.

    Args:
        kind: as for `extract_answer`. Numbers are compared exactly: 0.5 is 1/2, 0.33 is not 1/3. As
            some data sets write the sign and others only ask for percent, 50% is the same as 50 and
            as 0.5, which are not the same. Mathematics is the same if its LaTeX is, but for spaces,
            delimiters, \left, \dfrac, \text, units, percent signs, "x =" and the like, much as in
            is_equiv of the MATH paper (https://github.com/hendrycks/math), or if both are the same
            number. Of other kinds case, outer parentheses, spaces and a final period do not count.
        one, two: what `extract_answer` gives, or the answer (of a multiple choice, the letter) of a
            record.

    Example:
        >>> same_answer("number", "50%", "1/2"), same_answer("math", r"\dfrac12\text{ cm}", r"\frac{1}{2}")
        (True, True)
    """
    extract = _extractor(kind)
    if extract is _number:
        return bool(_values(_number(one)) & _values(_number(two)))
    plain = _latex if extract is _math else _bare
    one, two = plain(one), plain(two)
    equal = extract is _math and _values(_digits(one)) & _values(_digits(two))
    return bool(one and (one == two or equal))


def _extractor(kind: str) -> Callable[[str], str]:
    _require(
        kind in EXTRACTORS,
        f"There are no answers of kind {kind!r}: expected one of {', '.join(EXTRACTORS)}.",
    )
    return EXTRACTORS[kind]


MARK = r"(?i:####|\banswer\b(?:[\w ]{0,30}?\b(?:is|be)\b|\W{0,4}[:：=])|答案[^，。\d\n]{0,6}?[是为选:：]|答[:：])"
SENTENCE_END = r"\.(?=\s|$)|。"
LETTER = r"[(（][A-Ma-m][)）]|(?<![A-Za-z'’])[A-M](?![A-Za-z'’]|(?<=[AI]) (?!(?:because|since|as|is|and)\b)[A-Za-z])"
CHOICES = (
    rf"\\boxed\{{(?:\\text\{{)?({LETTER})",
    rf"(?:{MARK}|(?i:\b(?:option|choice) is)|选[择项]?)\W*(?:(?i:option|choice)\W+|选项\W*)?({LETTER})",
    rf"\A[\"'*\s]*({LETTER})(?:[.:：、．)]|\s*(?:\n|\Z))",
    r"([(（][A-M][)）])",
)
NUMBER = r"(?:(?<![A-Za-z\d)}])-)?(?:\d+\(\d+/0*[1-9]\d*\)|(?:\d+ )?\d+/0*[1-9]\d*|\d+(?:\.\d+)?|\.\d+)(?: ?%)?"
WORD = r"(?<![A-Za-z])(yes|no|true|false)(?![A-Za-z])"
LATEX = (
    (
        r"(\\\\)|\\[ !,;:()\[\]]|\\(?:left|right)(?![A-Za-z])",
        r"\1",
    ),  # \\ stays: it parts the rows of a matrix
    (r"(?<!\d)\s+|\s+(?!\d)|\\?[$%]|\^\{?\\circ\}?|\.\s*$", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"(?<=[\d})])\\(?:text|textrm|mbox|mathrm)\{[^{}]*\}(?:\^\{?\d\}?)?$", ""),
    (r"\\(?:text|textrm|textbf|mbox|mathrm|mathbf)\{([^{}]*)\}", r"\1"),
    (r"\\(frac|sqrt)(\w)", r"\\\1{\2}"),
    (r"(\\frac\{[^{}]*\})(\w)", r"\1{\2}"),
    (r"(?<!\d)\.(?=\d)", "0."),
    (r"^[A-Za-z]{1,2}=", ""),
)


def _number(text: str) -> str:
    text = _digits(text)
    for part in (_boxed(text), re.split(SENTENCE_END, _told(text))[0]):
        if found := re.search(NUMBER, part.rpartition("=")[2]):
            return found[0]
    return (re.findall(NUMBER, text) or [""])[-1]


def _digits(text: str) -> str:
    """A text whose numbers have no currency, no thousands commas, and plain signs and fractions."""
    text = (
        text.translate({ord("−"): "-", ord("－"): "-", ord("％"): "%"})
        .replace("{,}", ",")
        .replace("\\!", "")
    )
    text = re.sub(r"\\?[$¥￥€£]|\\(?=%)|(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)(?=\\[dt]?frac)", " ", text)
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    return re.sub(r"\((\d+)\)/\((\d+)\)", r"\1/\2", text)  # ((1)/(2)), as Math23K has it


def _values(number: str) -> set[Fraction]:
    """What a number may stand for: one value or, with a percent sign, two."""
    if len(number) > 999 or not re.fullmatch(
        NUMBER, number
    ):  # Python refuses to read thousands of digits
        return set()
    value = sum(map(Fraction, re.findall(r"[\d./]+", number))) * (
        -1 if number.startswith("-") else 1
    )
    return {value, value / 100} if "%" in number else {value}


def _math(text: str) -> str:
    return _boxed(text) or re.split(SENTENCE_END, _line(text))[0].strip("$")


def _choice(text: str) -> str:
    found = next(filter(None, (re.findall(pattern, text) for pattern in CHOICES)), [""])
    return found[-1].strip("()（）").upper()


def _yes_no(text: str) -> str:
    found = re.findall(f"(?i){WORD}", _boxed(text) or _told(text))[:1]
    found = found or re.findall(rf"(?i)\A\W*{WORD}(?=\s*(?:[.,;:!*\n]|\Z))", text)
    found = found or re.findall(f"(?i){WORD}", text)[-1:] or [""]
    return {"true": "yes", "false": "no"}.get(found[0].lower(), found[0].lower())


def _line(text: str) -> str:
    return (_boxed(text) or _told(text) or text.strip().split("\n")[-1]).strip(" *.。")


def _boxed(text: str) -> str:
    r"""The content of the last \boxed{}, or of a \boxed without braces, or nothing."""
    _, *boxes = re.split(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", text)
    box, depth = boxes[-1] if boxes else "", 0
    if not box.startswith("{"):
        return re.match(r"[^\s$]*", box)[0].rstrip(".")
    for token in re.finditer(r"(?s)\\.|[{}]", box):  # \{ opens no group
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if not depth:
            return box[1 : token.start()].strip()
    return ""


def _told(text: str) -> str:
    """The line behind the last mark, or nothing."""
    parts = re.split(MARK, text)
    return parts[-1].lstrip("*:： \t\r\n").split("\n")[0] if len(parts) > 1 else ""


def _latex(text: str) -> str:
    text = text.replace("{,}", ",")
    for pattern, new in LATEX:
        text = re.sub(pattern, new, text)
    return text.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text) else text


def _bare(text: str) -> str:
    return re.sub(r"^\((\w+)\)$", r"\1", " ".join(text.casefold().split()).strip(" .。"))


EXTRACTORS = {"number": _number, "math": _math, "choice": _choice, "yes_no": _yes_no, "text": _line}
CONTEXTS = {
    "squad": squad,
    "quality": quality,
    "self_instruct": self_instruct,
    "p3": p3,
    "long_alpaca": long_alpaca,
}
PROBLEMS = {
    "gsm8k": gsm8k,
    "svamp": svamp,
    "math23k": math23k,
    "math": math,
    "math500": math,
    "bbh": bbh,
}
PROBLEMS |= {
    "strategyqa": strategyqa,
    "hotpotqa": hotpotqa,
    "arc": arc,
    "gpqa": gpqa,
    "truthfulqa": truthfulqa,
}
PROBLEMS |= {"cmmlu": cmmlu, "ceval": ceval}
RECORDS = CONTEXTS | PROBLEMS
ANSWER_KINDS = dict.fromkeys(("gsm8k", "svamp", "math23k"), "number") | dict.fromkeys(
    ("math", "math500"), "math"
)
ANSWER_KINDS |= dict.fromkeys(("arc", "gpqa", "truthfulqa", "cmmlu", "ceval", "quality"), "choice")
ANSWER_KINDS |= {"strategyqa": "yes_no", "hotpotqa": "text", "bbh": "text"}
