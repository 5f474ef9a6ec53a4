"""Records and prompts from files.

Question/answer records, for `kvlab.knowledge`, are JSON lines, or the YAML of the chatterbot corpus (gunthercox,
https://github.com/gunthercox/chatterbot-corpus, BSD-3-Clause): `categories: [...]` and
`conversations: [[text, reply, reply, ...], ...]`. Each reply counts as an answer to the first text, and the first
category is the domain.

A `Record` holds a context to read, a question about it and its answers. SQuAD, QuALITY, Self-Instruct, P3 and
LongAlpaca are read into such records, from the files that their authors published or from the Hugging Face hub's rows.
"""

import html
import inspect
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FIELDS = ("question", "answer", "domain", "id")
LINE = '{"question": "A question?", "answer": "An answer."}'


def faq(path: str | Path) -> list[dict[str, str]]:
    """Read the records of a file, or of all files of a folder (sorted by name).

    Parameters
    ----------
    path : a `.jsonl` file (in each line "question" and, if there are any, "answer", "domain" and "id"; other fields are
        ignored), a `.yml` or `.yaml` file of the chatterbot corpus, or a folder of such files.

    Returns
    -------
    One mapping a pair, with those of the four fields that the file gives; pairs that occur twice are there twice.

    Raises
    ------
    ValueError : there is no such file, or one has another form; the message names file, line or entry, and field. A
        conversation of one text has no answer: it is left out, with a warning.

    Examples
    --------
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
    files = sorted(file for file in path.iterdir() if file.suffix in READERS) if path.is_dir() else [path]
    _require(path.exists(), f"There is no file or folder {path}: give one that holds records ({endings}).")
    _require(files, f"The folder {path} has no file that ends in {endings}: give one that does.")
    _require(files[0].suffix in READERS, f"{path} ends in {path.suffix!r}, expected one of {endings}.")
    records = []
    for file in files:
        records += READERS[file.suffix](file)
    return records


def _require(condition: object, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _json_lines(path: Path, example: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    like = example and f" like {example}"
    for number, line in enumerate(_text(path).split("\n"), 1):  # not splitlines: a JSON text may hold U+2028
        if line.strip():
            try:
                given = json.loads(line)
            except ValueError:
                given = None
            place = f"{path}, line {number}"
            _require(isinstance(given, dict), f"{place} is {line[:60]!r}, expected a JSON object{like}.")
            yield place, given


def _pairs(path: Path) -> list[dict[str, str]]:
    return [_pair(place, given) for place, given in _json_lines(path, LINE)]


def _pair(place: str, given: dict[str, Any]) -> dict[str, str]:
    record = {field: given[field] for field in FIELDS if given.get(field) is not None}
    _require("question" in record, f"{place} has no 'question', expected a JSON object like {LINE}.")
    for field, value in record.items():
        _require_text(f"{place}, has {field!r} =", value)
    return record


def _chatterbot(path: Path) -> list[dict[str, str]]:
    try:
        given = yaml.load(_text(path), yaml.BaseLoader)  # safe, and all scalars stay text: 22, yes, 1990-01-02
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML ({' '.join(str(error).split())}): mend it there.") from error
    shape = "expected a mapping with the lists 'categories' and 'conversations'"
    _require(isinstance(given, dict), f"{path} holds {str(given)[:60]!r}, {shape}.")
    for field in ("categories", "conversations"):
        value = given.get(field)
        _require(isinstance(value, list) and value, f"{path} has {field!r} = {str(value)[:60]!r}, {shape}.")
    _require_text(f"{path}, has 'categories' beginning with", given["categories"][0])
    records = []
    for number, conversation in enumerate(given["conversations"], 1):
        texts = [conversation] if isinstance(conversation, str) else conversation
        place = f"{path}, entry {number} of 'conversations',"
        _require(isinstance(texts, list) and texts, f"{place} is {str(texts)[:60]!r}, expected a list of texts.")
        for text in texts:
            _require_text(f"{place} has a text that is", text)
        question, *answers = texts
        if not answers:
            warnings.warn(f"{place} is left out: {question[:80]!r} has no answer.", stacklevel=3)
        records += [{"question": question, "answer": text, "domain": given["categories"][0]} for text in answers]
    return records


def _require_text(place: str, value: object) -> None:
    fine = isinstance(value, str) and value.strip()
    _require(fine, f"{place} {value!r}, expected a text (in quotes, if it holds a colon or the like).")


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it as such.") from error


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: one a line, or, if it begins with "{", the first of "turns" in each line (as Spec-Bench has).

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     print('{"turns": ["Hello.", "Go on."]}', file=file, flush=True)
    ...     read_prompts(Path(file.name))
    ['Hello.']
    """
    lines = [(n, line.strip()) for n, line in enumerate(path.read_text("utf-8").splitlines(), 1) if line.strip()]
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
KINDS = {str: "a text", int: "a whole number", list: "a list"}


@dataclass(frozen=True)
class Record:
    """A question about a context: what KV-Distill (arXiv 2503.10337) compresses, what it keeps, what it has to say.

    Parameters
    ----------
    context : the text to read; a method may compress it.
    question : the text that comes after it, never compressed.
    answers : one or more accepted texts, each once; of a multiple choice, the right option alone.
    choices : the options of a multiple choice, else none.

    Examples
    --------
    >>> Record("Anna lives in Rome.", "Where does Anna live?", ("Rome", "in Rome")).answer
    'Rome'
    """

    context: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The first of the answers: the one to learn from."""
        return self.answers[0]


def read_records(kind: str, source: str | Path, split: str = "train") -> list[Record]:
    """Records of a file or, if there is no such file, of a data set of the Hugging Face hub.

    Parameters
    ----------
    kind : one of `RECORDS`: "squad", "quality", "self_instruct", "p3", "long_alpaca".
    source : a file as the data set's authors published it, or a name on the hub, with the configuration behind a colon
        if there are several: "rajpurkar/squad", "emozilla/quality", "bigscience/P3:adversarial_qa_dbert_based_on".
    split : which part of the hub's data set; a file is read whole.

    Raises
    ------
    ValueError : the kind is unknown, there is neither file nor data set, or a row has another form.

    Examples
    --------
    >>> import tempfile
    >>> row = {"context": "Anna lives in Rome.", "question": "Where?", "answers": {"text": ["Rome"]}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "rows.jsonl"
    ...     _ = path.write_text(json.dumps(row))
    ...     read_records("squad", path)
    [Record(context='Anna lives in Rome.', question='Where?', answers=('Rome',), choices=())]
    """
    _require(kind in RECORDS, f"There are no records of kind {kind!r}: expected one of {', '.join(RECORDS)}.")
    if Path(source).is_file():
        return RECORDS[kind](source)
    file = "give a file as the data set's authors published it"
    _require(Path(source).suffix not in (".json", ".jsonl"), f"There is no file {source}: {file}.")
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

    Parameters
    ----------
    source : a `.json` file (`data[].paragraphs[]` with "context" and `qas[]` of "question" and `answers[]` of "text"),
        or rows as the hub has them ("context", "question", "answers" with a list "text").
    name : what messages call rows that come from no file.

    Returns
    -------
    One record a question, texts as written. Questions of v2 that nothing answers are left out; a warning counts them.

    Raises
    ------
    ValueError : something has another form; the message names the file, article, paragraph, question and field.

    Examples
    --------
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
            texts = [_field(where, answer, "text") for where, answer in _each(there, asked, "answers", "answer")]
            yield Record(context, _field(there, asked, "question"), tuple(dict.fromkeys(filter(str.strip, texts))))


def quality(source: Source, name: str = "the list") -> list[Record]:
    r"""QuALITY (arXiv 2112.08608, https://github.com/nyu-mll/quality): four options about an article of 5000 words.

    Parameters
    ----------
    source : a file of JSON lines ("article" and `questions[]` of "question", four "options", "gold_label" or else
        "writer_label", both counted from 1), or rows as emozilla/quality on the hub has them ("article", "question",
        "options", "answer", counted from 0). The test split has no labels.
    name : as for `squad`.

    Returns
    -------
    One record a question, its options in `choices`. The HTML of the files that are not called htmlstripped becomes
    plain text, paragraphs a blank line apart.

    Raises
    ------
    ValueError : something has another form; the message names the file, line, question and field.

    Examples
    --------
    >>> asked = {"question": "Who waits?", "options": ["Ann", "Ben", "Cy", "Di"], "gold_label": 1, "writer_label": 2}
    >>> quality([{"article": "<p>Ann &amp; Ben</p><p>wait.</p>", "questions": [asked]}])[0]
    Record(context='Ann & Ben\n\nwait.', question='Who waits?', answers=('Ann',), choices=('Ann', 'Ben', 'Cy', 'Di'))
    """
    return _read(source, name, _quality)


def _quality(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    article = _plain(_field(place, row, "article"))
    flat = "question" in row
    for at, asked in [(place, row)] if flat else _each(place, row, "questions", "question"):
        options = _field(at, asked, "options", list)
        fine = len(options) == 4 and all(isinstance(option, str) and option.strip() for option in options)
        _require(fine, f"{at} has 'options' = {str(options)[:60]!r}, expected four texts.")
        yield Record(article, _field(at, asked, "question"), (options[_right(at, asked)],), tuple(options))


def _right(place: str, asked: Mapping[str, Any]) -> int:
    """The index of the right option: "answer" counts from 0, the labels of the files count from 1."""
    given = [field for field in ("answer", "gold_label", "writer_label") if asked.get(field) is not None]
    field = given[0] if given else "gold_label"
    label, first = _field(place, asked, field, int), 0 if field == "answer" else 1
    _require(first <= label < first + 4, f"{place} has {field!r} = {label}, expected {first} to {first + 3}.")
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

    Parameters
    ----------
    source : a file of JSON lines such as seed_tasks.jsonl or user_oriented_instructions.jsonl ("instruction" and
        `instances[]` of "input" and "output"), or rows as the hub has them.
    name : as for `squad`.

    Returns
    -------
    One record an instance: the input is the context, the instruction the question. An instance without input has
    nothing to compress: it is left out, and a warning counts such.

    Raises
    ------
    ValueError : something has another form; the message names the file, line, instance and field.

    Examples
    --------
    >>> self_instruct([{"instruction": "Name the color.", "instances": [{"input": "A red box.", "output": "red"}]}])
    [Record(context='A red box.', question='Name the color.', answers=('red',), choices=())]
    """
    return _read(source, name, _self_instruct)


def _self_instruct(place: str, row: Mapping[str, Any]) -> Iterator[Record]:
    question = _field(place, row, "instruction")
    for at, instance in _each(place, row, "instances", "instance"):
        yield Record(_field(at, instance, "input"), question, (_field(at, instance, "output"),))


def p3(source: Source, name: str = "the list") -> list[Record]:
    r"""P3 (arXiv 2110.08207, https://huggingface.co/datasets/bigscience/P3): the passage is read, the rest asked.

    A prompt is parted at blank lines and before labels such as "Question:" or, if there are none, at lines. If it names
    a passage (or text, context, article ...), its longest part is the context, and all that stands around it, in its
    order, is the question. Of a passage of several paragraphs only the longest is the context.

    Parameters
    ----------
    source : a file of JSON lines or rows, with "prompt" and "completion" as Self-Instruct published some of P3, or with
        "inputs_pretokenized", "targets_pretokenized" and, for some, "answer_choices" and "is_correct" as the hub does.
    name : as for `squad`.

    Returns
    -------
    One record a prompt; the answer is without the mark <|endoftext|> and outer white space. Prompts without a passage
    are left out, and a warning counts them; targets that "is_correct" calls wrong are left out as well.

    Raises
    ------
    ValueError : something has another form; the message names the file, line and field.

    Examples
    --------
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
    named = re.search(rf"(?i)\b(?:{PASSAGE})\b", question) or re.match(rf"(?i)(?:{PASSAGE})\s*:", context)
    return (context.strip(), question) if named else ("", prompt)


def long_alpaca(source: Source, name: str = "the list") -> list[Record]:
    r"""LongAlpaca (arXiv 2309.12307, https://huggingface.co/datasets/Yukang/LongAlpaca-12k): questions on papers.

    An instruction with an input asks about that input. Any other is cut in two behind the last "Now the paper ends."
    ("Now the material ends.", "Now the second paper ends."), else before its last paragraph: context, then question.

    Parameters
    ----------
    source : a `.json` file (a list of "instruction", "output" and, for some, "input"), or rows as the hub has them.
    name : as for `squad`.

    Returns
    -------
    One record a row. Rows of one paragraph have no context: they are left out, and a warning counts them.

    Raises
    ------
    ValueError : something has another form; the message names the file, row and field.

    Examples
    --------
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
    ends = [found.end() for found in re.finditer(r"(?i)\bnow the (?:\w+ )?(?:paper|material|guideline) ends\.", text)]
    cut = ends[-1] if ends else max(text.rfind("\n\n"), 0)
    yield Record(text[:cut].strip(), text[cut:].strip(), (output,))


def _read(source: Source, name: str, adapt: Callable[[str, Mapping[str, Any]], Iterator[Record]]) -> list[Record]:
    """All records of a source, but for those that lack one of the three texts: a warning counts these."""
    given = [record for place, row in _rows(source, name) for record in adapt(place, row)]
    lacks = [_lack(record) for record in given]
    if any(lacks):
        counts = Counter(filter(None, lacks))
        told = ", ".join(f"{count} without {field}" for field, count in counts.items())
        place = source if isinstance(source, str | Path) else name
        outside = next(n for n, frame in enumerate(inspect.stack(0), 1) if frame.filename != __file__)
        warnings.warn(f"{place}: {counts.total()} of {len(given)} records are left out: {told}.", stacklevel=outside)
    return [record for record, lack in zip(given, lacks, strict=True) if not lack]


def _lack(record: Record) -> str:
    """The first of the three texts that is not there, or nothing."""
    texts = {"context": record.context, "question": record.question, "answer": "".join(record.answers)}
    return next((field for field, text in texts.items() if not text.strip()), "")


def _rows(source: Source, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(source, str | Path):
        return _numbered(name, "row", source)
    path = Path(source)
    _require(path.is_file(), f"There is no file {path}: give one as the data set's authors published it.")
    if path.suffix != ".json":
        return _json_lines(path)
    try:
        given = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}): mend it or, if each line is JSON, call it .jsonl.") from error
    word, rows = ("article", given.get("data")) if isinstance(given, dict) else ("row", given)
    shape = "expected a list of rows, or a mapping with such a list in 'data'"
    _require(isinstance(rows, list), f"{path} holds {str(given)[:60]!r}, {shape}.")
    return _numbered(str(path), word, rows)


def _each(place: str, row: Mapping[str, Any], field: str, word: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The mappings of a list field, each with its place; the hub has a mapping of lists instead of such a list."""
    value = row.get(field)
    columns = list(value.values()) if isinstance(value, Mapping) else []
    if all(isinstance(column, list) for column in columns) and len({len(column) for column in columns}) == 1:
        row = {**row, field: [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]}
    return _numbered(place, word, _field(place, row, field, list))


def _numbered(place: str, word: str, rows: Iterable[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in enumerate(rows, 1):
        at = f"{place}, {word} {number}"
        _require(isinstance(row, Mapping), f"{at} is {str(row)[:60]!r}, expected a mapping of fields.")
        yield at, row


def _field(place: str, row: Mapping[str, Any], field: str, kind: type = str) -> Any:
    value = row.get(field)
    seen = f"{field!r} = {str(value)[:60]!r}" if field in row else f"no {field!r}"
    _require(isinstance(value, kind), f"{place} has {seen}, expected {KINDS[kind]}.")
    return value


RECORDS = {"squad": squad, "quality": quality, "self_instruct": self_instruct, "p3": p3, "long_alpaca": long_alpaca}
