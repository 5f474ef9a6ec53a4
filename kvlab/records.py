"""Records and prompts from files.

Question/answer records, for `kvlab.knowledge`, are JSON lines, or the YAML of the chatterbot corpus (gunthercox,
https://github.com/gunthercox/chatterbot-corpus, BSD-3-Clause): `categories: [...]` and
`conversations: [[text, reply, reply, ...], ...]`. Each reply counts as an answer to the first text, and the first
category is the domain.
"""

import json
import warnings
from pathlib import Path

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


def _json_lines(path: Path) -> list[dict[str, str]]:
    records = []
    for number, line in enumerate(_text(path).split("\n"), 1):  # not splitlines: a JSON text may hold U+2028
        if line.strip():
            records.append(_record(f"{path}, line {number}", line))
    return records


def _record(place: str, line: str) -> dict[str, str]:
    try:
        given = json.loads(line)
    except ValueError:
        given = None
    _require(isinstance(given, dict), f"{place} is {line[:60]!r}, expected a JSON object like {LINE}.")
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


READERS = {".jsonl": _json_lines, ".yml": _chatterbot, ".yaml": _chatterbot}
