r"""Find the answer in a generated text, and compare two answers.

`extract_answer` looks in the last \boxed{}, then after the last "answer is", "Answer:", "####" or
"答案是", then in the whole text; without thoughts (<think>...</think>) and without what follows the
answer ("#### 9" and then other lines, or a next question). `same_answer` compares what it found with a reference. Both depend
on the kind of the answer, one of `ANSWER_KINDS`; `kvlab.records.DATA_SETS` has that of each data
set.
"""

import re
from fractions import Fraction

MARK = (
    r"(?i:####|\banswer\b(?:[\w ]{0,30}?\b(?:is|be)\b|\W{0,4}[:：=])"
    r"|答案[^，。\d\n]{0,6}?[是为选:：]|答[:：])"
)
THOUGHT = r"(?is)\A.*</think(?:ing)?>|<think(?:ing)?>.*"  # one that does not end has no answer
# What ends an answer: the rest of its line after "####", and a line that asks the next question.
RUN_ON = (
    r"(?is)(####\s*[^\w\s]*(?:\d(?:[\d,./]*\d)?|[a-m]|yes|no)(?!\w|\.\s+\w)[^\n]*)\n.*"
    r"|(?<=\S)\s*\n\W*(?:question|problem|q|user|human)(?: ?\d+)?\W{0,2}:.*"
)
SENTENCE_END = r"\.(?=\s|$)|。"
LETTER = (
    r"[(（][A-Ma-m][)）]"
    r"|(?<![A-Za-z'’])[A-M](?![A-Za-z'’]|(?<=[AI]) (?!(?:because|since|as|is|and)\b)[A-Za-z])"
)
# "a" and "i" are also words.
SMALL_LETTER = r"(?<![\w'’])(?:[b-hj-m](?![\w'’/])|[ai](?=\W*(?:\n|\Z)|[.,:;)]))"
LETTER_PATTERNS = (
    rf"\\boxed\{{(?:\\text\w*\{{)?({LETTER}|{SMALL_LETTER})",
    rf"(?:{MARK}|(?i:\b(?:(?:option|choice) is|choose|chose|pick|select|go with))|选[择项]?)"
    rf"\W*(?:(?i:option|choice)\W+|选项\W*)?({LETTER}|{SMALL_LETTER})",
    rf"({LETTER})\W*\b(?i:(?:is|must be|would be|seems)\s+(?:the\s+|most\s+|likely\s+|only\s+)*"
    r"(?:correct|right|best|answer)\b)",
    rf"\A[\"'*_`\s]*({LETTER}|[a-m](?!\w))[\"'*_`]*(?:[.:：、．)]|\s*(?:\n|\Z))",
    r"[*_`]([(（]?[A-M][)）]?)[.:]?[*_`]",
    r"([(（][A-M][)）])",
    r"(?<!\w)([(（][a-m][)）])",
)
NUMBER = (
    r"(?:(?<![A-Za-z\d)}])-)?"
    r"(?:\d+\(\d+/0*[1-9]\d*\)|(?:\d+ )?\d+/0*[1-9]\d*|\d+(?:\.\d+)?|\.\d+)(?: ?%)?"
)
PART = r"\{\s*-?\s*\d+\s*\}"
FRACTION = rf"(?:(?<![\w)}}])-)?\\[dt]?frac\s*(?:{PART}\s*{PART}|{PART}\d|\d\s*{PART}|\d\d(?!\d))"
YES_NO = r"(?<![A-Za-z])(yes|no|true|false)(?![A-Za-z])"
UNIT, COUNTS = r"\\(?:text|textrm|mbox|mathrm)", "(?:hundred|thousand|[mbtr]+illion|dozen)"
LATEX = (
    # \\ stays: it separates the rows of a matrix.
    (r"(\\\\)|\\[ !,;:()\[\]]|\\(?:left|right)(?![A-Za-z])", r"\1"),
    (r"(?<!\d)\s+|\s+(?!\d)|\\?[$%]|\^\{?\\circ\}?|\.\s*$", ""),
    (r"\\[dt]frac", r"\\frac"),
    (rf"(?i)(?<=\d)(?:{UNIT}\{{)?([ap])\.?m\.?\}}?$", lambda half: f"{half[1].lower()}m"),
    (rf"(?<=[\d}})]){UNIT}\{{(?!{COUNTS})[^{{}}]*\}}(?:\^\{{?\d\}}?)?$", ""),
    (r"\\(?:text|textrm|textbf|mbox|mathrm|mathbf)\{([^{}]*)\}", r"\1"),
    (r"\\(frac|sqrt)(\w)", r"\\\1{\2}"),
    (r"(\\frac\{[^{}]*\})(\w)", r"\1{\2}"),
    (r"\\frac\{-((?:[^{}+-]|\{[^{}]*\})*)\}", r"-\\frac{\1}"),
    (r"(?<!\d)\.(?=\d)", "0."),
    (r"^[A-Za-z]{1,2}=", ""),
)


def extract_answer(kind: str, text: str) -> str:
    r"""The answer in a generated text, or an empty text.

    Args:
        kind: "number": in a box or after a mark the first number after the last "=", else the last
            number of the text; without currency and thousands commas. (The GSM8K task of the
            lm-evaluation-harness reads the same: its strict pattern takes the number after "####",
            its flexible one the last number.)
            "math": the content of the box, else the sentence after the mark, else the last line.
            "choice": the letter, A to M, also at the beginning of the text or as the last one in
            parentheses; an article does not count.
            "yes_no": "yes" or "no", also for true and false.
            "text": as "math", but the whole line after the mark, as in BBH's task, without the
            final period.
        text: what a model generated.

    Example:
        >>> extract_answer("number", "They pay 2 * 600 = $1,200. #### 1,200")
        '1200'
        >>> extract_answer("choice", "So it is (B).")
        'B'
    """
    _require_kind(kind)
    text = re.sub(THOUGHT, "", text)
    return ANSWER_KINDS[kind](re.sub(RUN_ON, r"\1", text))


def same_answer(kind: str, one: str, two: str) -> bool:
    r"""Whether two extracted answers are the same; an empty answer equals nothing.

    Args:
        kind: as for `extract_answer`. Numbers are compared exactly: 0.5 is 1/2, 0.33 is not 1/3. As
            some data sets write the sign and others only ask for percent, 50% equals both 50 and
            0.5, which are not equal. Mathematics is equal if its LaTeX is, apart from spaces,
            delimiters, \left, \dfrac, \text, units, percent signs, "x =" and the like, much as in
            is_equiv of the MATH paper (https://github.com/hendrycks/math), or if both are the same
            number. In other kinds case, outer parentheses, spaces and a final period do not count.
        one, two: results of `extract_answer`, or the answer (for a multiple choice, the letter) of
            a record.

    Example:
        >>> same_answer("number", "50%", "1/2"), same_answer("math", r"\dfrac12\text{ cm}", "0.5")
        (True, True)
    """
    _require_kind(kind)
    if kind == "number":
        return bool(_number_values(_extract_number(one)) & _number_values(_extract_number(two)))
    if kind == "math":
        one, two = _plain_latex(one), _plain_latex(two)
        if _number_values(_plain_digits(one)) & _number_values(_plain_digits(two)):
            return True
    else:
        one, two = _plain_answer(one), _plain_answer(two)
    return one == two != ""


def boxed(text: str) -> str:
    r"""The content of the last \boxed{}, or of a \boxed without braces, or an empty text.

    Example:
        >>> boxed(r"So $\boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
    """
    _, *boxes = re.split(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", text)
    box, depth = boxes[-1] if boxes else "", 0
    if not box.startswith("{"):
        return re.match(r"[^\s$]*", box)[0].rstrip(".")
    for token in re.finditer(r"(?s)\\.|[{}]", box):  # \{ opens no group
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return box[1 : token.start()].strip()
    return ""


def _require_kind(kind: str) -> None:
    if kind not in ANSWER_KINDS:
        raise ValueError(f"No answers of kind {kind!r}: expected one of {', '.join(ANSWER_KINDS)}.")


def _after_mark(text: str) -> str:
    """The line after the last mark, or an empty text."""
    parts = re.split(MARK, text)
    return parts[-1].lstrip("*:： \t\r\n").split("\n")[0] if len(parts) > 1 else ""


def _extract_number(text: str) -> str:
    text = _plain_digits(text)
    for part in (boxed(text), re.split(SENTENCE_END, _after_mark(text))[0]):
        number = re.search(NUMBER, part.rpartition("=")[2])
        if number:
            return number[0]
    return (re.findall(NUMBER, text) or [""])[-1]


def _extract_math(text: str) -> str:
    return boxed(text) or re.split(SENTENCE_END, _extract_line(text))[0].strip("$")


def _extract_line(text: str) -> str:
    return (boxed(text) or _after_mark(text) or text.strip().split("\n")[-1]).strip(" *.。")


def _extract_letter(text: str) -> str:
    for pattern in LETTER_PATTERNS:
        letters = re.findall(pattern, text)
        if letters:
            return letters[-1].strip("()（）").upper()
    return ""


def _extract_yes_no(text: str) -> str:
    words = re.findall(YES_NO, boxed(text) or _after_mark(text), re.IGNORECASE)[:1]
    if not words:
        words = re.findall(rf"\A\W*{YES_NO}(?=\s*(?:[.,;:!*\n]|\Z))", text, re.IGNORECASE)
    if not words:
        words = re.findall(YES_NO, text, re.IGNORECASE)[-1:] or [""]
    word = words[0].lower()
    return {"true": "yes", "false": "no"}.get(word, word)


ANSWER_KINDS = {
    "number": _extract_number,
    "math": _extract_math,
    "choice": _extract_letter,
    "yes_no": _extract_yes_no,
    "text": _extract_line,
}


def _plain_digits(text: str) -> str:
    """A text whose numbers have no currency, no thousands commas, and plain signs and fractions."""
    text = text.translate({ord("−"): "-", ord("－"): "-", ord("％"): "%"})
    text = text.replace("{,}", ",").replace("\\!", "")
    text = re.sub(r"\\?[$¥￥€£]|\\(?=%)|(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)(?=\\[dt]?frac)", " ", text)
    text = re.sub(FRACTION, _plain_fraction, text)
    return re.sub(r"\((\d+)\)/\((\d+)\)", r"\1/\2", text)  # ((1)/(2)), as Math23K has it


def _plain_fraction(match: re.Match) -> str:
    signs, numbers = (re.findall(pattern, match[0]) for pattern in ("-", r"\d+"))
    if len(numbers) == 1:  # \frac12
        numbers = numbers[0]
    return f"{'-' * (len(signs) % 2)}{numbers[0]}/{numbers[1]}"


def _plain_latex(text: str) -> str:
    text = text.replace("{,}", ",")
    for pattern, replacement in LATEX:
        text = re.sub(pattern, replacement, text)
    is_number = re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text)
    return text.replace(",", "") if is_number else text


def _plain_answer(text: str) -> str:
    return re.sub(r"^\((\w+)\)$", r"\1", " ".join(text.casefold().split()).strip(" .。"))


def _number_values(number: str) -> set[Fraction]:
    """The values a number can have: one, or two with a percent sign."""
    # Python refuses to read thousands of digits.
    if len(number) > 999 or not re.fullmatch(NUMBER, number):
        return set()
    value = sum(map(Fraction, re.findall(r"[\d./]+", number)))
    if number.startswith("-"):
        value = -value
    return {value, value / 100} if "%" in number else {value}
