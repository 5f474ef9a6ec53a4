"""Two small worlds, made by seeded generators: reading and arithmetic.

A world gives documents. A document is a list of chat messages (`system` holds a passage, `user`
asks, `assistant` answers). A hash of their content decides which facts and which problems are for
testing, so training and test data are disjoint whatever the seed. This file knows nothing of tokens
or models. Its words and sentences are in `data/worlds.json`.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

_DATA = json.loads((Path(__file__).parent / "data" / "worlds.json").read_text("utf-8"))
NAMES = _DATA["names"]
THINGS = _DATA["things"]
FRUITS = _DATA["fruits"]
Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Relation:
    """How one attribute is stated and asked: {s} is the subject, {v} the value."""

    statements: list[str]
    questions: list[str]
    values: list[str]


PEOPLE = {attribute: Relation(**texts) for attribute, texts in _DATA["people"].items()}
OBJECTS = {attribute: Relation(**texts) for attribute, texts in _DATA["objects"].items()}
RELATIONS = PEOPLE | OBJECTS
UNKNOWN = "unknown"
LETTERS = "ABCD"


def is_held_out(*parts) -> bool:
    """True for the tenth of all contents that only test data may use."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).digest()[0] < 26


@dataclass(frozen=True)
class Fact:
    """One attribute of one subject, e.g. Fact("Anna", "city", "Paris")."""

    subject: str
    attribute: str
    value: str

    def statement(self, rng: Random) -> str:
        return rng.choice(RELATIONS[self.attribute].statements).format(s=self.subject, v=self.value)

    def question(self, rng: Random) -> str:
        return rng.choice(RELATIONS[self.attribute].questions).format(s=self.subject)


@dataclass(frozen=True)
class Passage:
    """Facts, the text that states them, and the (subject, attribute) pairs that it leaves open."""

    facts: tuple[Fact, ...]
    text: str


def make_passage(rng: Random, n_facts: int, test: bool = False) -> Passage:
    """A passage of `n_facts` facts about random people and things, about two per subject.

    Example:
        >>> make_passage(Random(0), 2).text.count(".")
        2
    """
    n_subjects = max(2, round(n_facts / 2.2))
    n_people = min(len(NAMES), round(n_subjects * 0.7))
    people = rng.sample(NAMES, n_people)
    things = rng.sample(THINGS, min(len(THINGS), n_subjects - n_people))
    slots = [(s, a) for s in people for a in PEOPLE] + [(s, a) for s in things for a in OBJECTS]
    rng.shuffle(slots)
    facts = []
    for subject, attribute in slots:
        if len(facts) == n_facts:
            break
        values = RELATIONS[attribute].values
        values = [v for v in values if is_held_out(subject, attribute, v) == test]
        if values:
            facts.append(Fact(subject, attribute, rng.choice(values)))
    return Passage(tuple(facts), " ".join(f.statement(rng) for f in facts))


def ask_free(rng: Random, passage: Passage) -> tuple[str, str]:
    """A question that one fact answers: (question, answer)."""
    fact = rng.choice(passage.facts)
    return fact.question(rng), fact.value


def ask_choice(rng: Random, passage: Passage) -> tuple[str, str]:
    """The same with four options; the answer is a letter."""
    fact = rng.choice(passage.facts)
    wrong = [v for v in RELATIONS[fact.attribute].values if v != fact.value]
    options = [*rng.sample(wrong, 3), fact.value]
    rng.shuffle(options)
    question = fact.question(rng)
    for letter, option in zip(LETTERS, options, strict=True):
        question += f" {letter}) {option}"
    return question, LETTERS[options.index(fact.value)]


def ask_unanswerable(rng: Random, passage: Passage) -> tuple[str, str]:
    """A question that the passage leaves open, mostly about its subjects; the answer: "unknown"."""
    stated = {(f.subject, f.attribute) for f in passage.facts}
    subjects = sorted({f.subject for f in passage.facts}) if rng.random() < 0.7 else NAMES + THINGS
    if all((s, a) in stated for s in subjects for a in _attributes(s)):
        subjects = NAMES + THINGS
    while True:
        subject = rng.choice(subjects)
        attribute = rng.choice(_attributes(subject))
        if (subject, attribute) not in stated:
            return Fact(subject, attribute, "").question(rng), UNKNOWN


def _attributes(subject: str) -> list[str]:
    return list(PEOPLE if subject in NAMES else OBJECTS)


def ask_about(rng: Random, passage: Passage) -> tuple[str, str]:
    """An open request; order and wording of the answer are free, so samples of a model vary."""
    subject = rng.choice(passage.facts).subject
    facts = [f for f in passage.facts if f.subject == subject]
    rng.shuffle(facts)
    name = subject if subject in NAMES else f"the {subject}"
    return f"Tell me about {name}.", " ".join(f.statement(rng) for f in facts)


QUESTIONS = {
    "free": ask_free,
    "choice": ask_choice,
    "unanswerable": ask_unanswerable,
    "about": ask_about,
}


def reading_document(
    rng: Random, n_facts: int, kinds: list[str], test: bool = False, parts: int = 1
) -> Conversation:
    """A passage (in `parts` system messages) and one question of each kind named.

    Example:
        >>> [m["role"] for m in reading_document(Random(0), 4, ["free"])]
        ['system', 'user', 'assistant']
    """
    passage = make_passage(rng, n_facts, test)
    sentences = passage.text.replace(". ", ".\n").split("\n")
    size = -(-len(sentences) // parts)
    messages = []
    for start in range(0, len(sentences), size):
        part = " ".join(sentences[start : start + size])
        messages.append({"role": "system", "content": part})
    for kind in kinds:
        question, answer = QUESTIONS[kind](rng, passage)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


# -- arithmetic

STYLES = {"short": "Be brief.", "long": "Explain each step."}
CHANGES = _DATA["changes"]  # operator: [event of the story, sentence of the long solution], ...


@dataclass(frozen=True)
class Problem:
    """A start and a chain of (operator, operand); every intermediate value stays within 0-99."""

    start: int
    steps: tuple[tuple[str, int], ...]

    def values(self) -> list[int]:
        """The start and the value after each step."""
        values = [self.start]
        for operator, n in self.steps:
            values.append({"+": values[-1] + n, "-": values[-1] - n, "*": values[-1] * n}[operator])
        return values


def make_problem(rng: Random, n_steps: int, test: bool = False) -> Problem:
    """A random problem of `n_steps` steps from the training or the test side.

    Example:
        >>> len(make_problem(Random(0), 3).steps)
        3
    """
    while True:
        start, steps = rng.randint(3, 40), []
        value = start
        for _ in range(n_steps):
            choices = [("+", n) for n in range(2, 21) if value + n < 100]
            choices += [("-", n) for n in range(2, 21) if value - n >= 1]
            choices += [("*", n) for n in (2, 3) if value >= 2 and value * n < 100] * 4
            operator, n = rng.choice(choices)
            steps.append((operator, n))
            value = Problem(value, ((operator, n),)).values()[-1]
        problem = Problem(start, tuple(steps))
        if is_held_out(problem.start, *problem.steps) == test:
            return problem


def arithmetic_document(rng: Random, n_steps: int, style: str, test: bool = False) -> Conversation:
    """A word problem and its solution, reasoned in one of two styles and closed by "Answer: n".

    Example:
        >>> arithmetic_document(Random(0), 2, "short")[1]["content"].split()[-2]
        'Answer:'
    """
    problem = make_problem(rng, n_steps, test)
    name = rng.choice(NAMES)
    noun = rng.choice(FRUITS)
    story = [f"{name} has {problem.start} {noun}."]
    reasoning = [f"{name} starts with {problem.start} {noun}."] if style == "long" else []
    values = problem.values()
    for (operator, n), before, after in zip(problem.steps, values, values[1:], strict=False):
        event, explanation = rng.choice(CHANGES[operator])
        story.append(f"{name} {event.format(n=n)}.")
        equation = f"{before}{operator}{n}={after}"
        if style == "long":
            equation = f"{explanation.format(n=n)} {equation} {noun}"
        reasoning.append(f"{equation}.")
    question = f"{' '.join(story)} How many {noun} does {name} have? {STYLES[style]}"
    answer = f"{' '.join(reasoning)} Answer: {values[-1]}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# -- plain repetition, the skill that look-up grows from

_VALUES = [value for relation in RELATIONS.values() for value in relation.values]
WORDS = tuple(dict.fromkeys(NAMES + THINGS + FRUITS + _VALUES))


def repetition_document(rng: Random, n_words: int) -> Conversation:
    """A list of random words, to be repeated."""
    text = " ".join(rng.choices(WORDS, k=n_words))
    return [{"role": "system", "content": text}, {"role": "assistant", "content": text}]
