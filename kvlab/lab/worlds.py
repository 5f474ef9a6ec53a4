"""Two small worlds, made by seeded generators: reading and arithmetic.

A world gives documents. A document is a list of chat messages (`system` holds a passage, `user`
asks, `assistant` answers). Which facts and which problems are for testing is decided by a hash of
their content, so training and test data are disjoint whatever the seed. This file knows nothing of
tokens or models.
"""

import hashlib
import random
from dataclasses import dataclass

NAMES = (
    "Anna Ben Carla David Emma Felix Greta Henry Iris Jack Karen Leo Mara Noah Olga Peter Rosa Simon Tina Victor "
    "Wendy Adam Bella Colin Diana Erik Flora George Hanna Ivan Julia Kevin Laura Martin Nina Oscar Paula Robert Sara "
    "Thomas Ursula Vera Walter Yara Zoe Alice Bruno Clara Daniel Elsa Frank Gina Hugo Ida Jonas Kate Louis Maria Nils "
    "Olivia Paul Rita Stefan Tara"
).split()
THINGS = (
    "box lamp clock mirror basket bottle chair table carpet kettle ladder hammer bucket blanket pillow candle "
    "helmet violin wallet ring book map key coin cup bell drum flag kite mask rope sword"
).split()
FRUITS = "apples pears plums coins stamps marbles books cards shells stones pens cakes".split()


@dataclass(frozen=True)
class Relation:
    """How one attribute is stated and asked: {s} is the subject, {v} the value."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    values: tuple[str, ...]


def _relation(statements: str, questions: str, values: str) -> Relation:
    return Relation(
        tuple(statements.split(" | ")), tuple(questions.split(" | ")), tuple(values.split())
    )


PEOPLE = {
    "city": _relation(
        "{s} lives in {v}. | The home of {s} is in {v}.",
        "Where does {s} live? | In which city is the home of {s}?",
        "Paris Rome Oslo Lima Cairo Delhi Tokyo Berlin Madrid Boston Dublin Vienna Athens Lisbon Prague Seoul Quito "
        "Kyoto Geneva Havana",
    ),
    "job": _relation(
        "{s} works as a {v}. | {s} is a {v} by trade.",
        "What is the job of {s}? | What does {s} work as?",
        "doctor teacher baker farmer pilot nurse judge lawyer singer writer painter driver gardener barber sailor "
        "tailor plumber chemist banker miner",
    ),
    "pet": _relation(
        "{s} has a {v}. | {s} keeps a {v} at home.",
        "Which animal does {s} have? | What pet does {s} keep?",
        "cat dog horse rabbit parrot turtle hamster goat sheep snake duck pig fish canary donkey lizard",
    ),
    "food": _relation(
        "{s} likes to eat {v}. | The favorite food of {s} is {v}.",
        "What does {s} like to eat? | What is the favorite food of {s}?",
        "bread rice soup pasta cheese salad beans pizza honey butter carrots onions mushrooms noodles eggs curry",
    ),
    "drink": _relation(
        "{s} drinks {v}. | In the morning {s} drinks {v}.",
        "What does {s} drink?",
        "tea coffee milk water juice cocoa cider lemonade wine beer",
    ),
    "color": _relation(
        "{s} likes the color {v}. | The favorite color of {s} is {v}.",
        "Which color does {s} like? | What is the favorite color of {s}?",
        "red blue green yellow purple orange black white brown pink gray gold silver violet",
    ),
    "instrument": _relation(
        "{s} plays the {v}. | {s} is learning the {v}.",
        "Which instrument does {s} play?",
        "piano guitar flute cello trumpet harp organ banjo clarinet tuba",
    ),
    "language": _relation(
        "{s} speaks {v}. | At home {s} speaks {v}.",
        "Which language does {s} speak?",
        "French German Spanish Italian Greek Polish Hindi Arabic Korean Turkish Danish Dutch",
    ),
    "age": _relation(
        "{s} is {v} years old.", "How old is {s}?", " ".join(str(n) for n in range(11, 90))
    ),
}
OBJECTS = {
    "place": _relation(
        "The {s} is in the {v}. | You can find the {s} in the {v}.",
        "Where is the {s}? | Where can you find the {s}?",
        "kitchen garden cellar attic garage office bedroom library hall barn tower school church market museum park",
    ),
    "material": _relation(
        "The {s} is made of {v}.",
        "What is the {s} made of?",
        "wood glass steel paper leather stone copper iron clay plastic cotton silk",
    ),
    "price": _relation(
        "The {s} costs {v} dollars.",
        "How much does the {s} cost? | What is the price of the {s}?",
        " ".join(str(n) for n in range(11, 90)),
    ),
    "owner": _relation(
        "The {s} belongs to {v}. | The owner of the {s} is {v}.",
        "Who owns the {s}? | To whom does the {s} belong?",
        " ".join(NAMES),
    ),
}
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

    def statement(self, rng: random.Random) -> str:
        return rng.choice(RELATIONS[self.attribute].statements).format(s=self.subject, v=self.value)

    def question(self, rng: random.Random) -> str:
        return rng.choice(RELATIONS[self.attribute].questions).format(s=self.subject)


@dataclass(frozen=True)
class Passage:
    """Facts, the text that states them, and the (subject, attribute) pairs that it leaves open."""

    facts: tuple[Fact, ...]
    text: str


def make_passage(rng: random.Random, n_facts: int, test: bool = False) -> Passage:
    """A passage of `n_facts` facts about random people and things, two to three facts a subject on average.

    Example:
        >>> make_passage(random.Random(0), 2).text.count(".")
        2
    """
    n_subjects = max(2, round(n_facts / 2.2))
    n_people = min(len(NAMES), round(n_subjects * 0.7))
    people, things = (
        rng.sample(NAMES, n_people),
        rng.sample(THINGS, min(len(THINGS), n_subjects - n_people)),
    )
    slots = [(s, a) for s in people for a in PEOPLE] + [(s, a) for s in things for a in OBJECTS]
    rng.shuffle(slots)
    facts = []
    for subject, attribute in slots:
        if len(facts) == n_facts:
            break
        values = [
            v for v in RELATIONS[attribute].values if is_held_out(subject, attribute, v) == test
        ]
        if values:
            facts.append(Fact(subject, attribute, rng.choice(values)))
    return Passage(tuple(facts), " ".join(f.statement(rng) for f in facts))


def ask_free(rng: random.Random, passage: Passage) -> tuple[str, str]:
    """A question that one fact answers: (question, answer)."""
    fact = rng.choice(passage.facts)
    return fact.question(rng), fact.value


def ask_choice(rng: random.Random, passage: Passage) -> tuple[str, str]:
    """The same with four options; the answer is a letter."""
    fact = rng.choice(passage.facts)
    wrong = [v for v in RELATIONS[fact.attribute].values if v != fact.value]
    options = [*rng.sample(wrong, 3), fact.value]
    rng.shuffle(options)
    listed = " ".join(
        f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True)
    )
    return f"{fact.question(rng)} {listed}", LETTERS[options.index(fact.value)]


def ask_unanswerable(rng: random.Random, passage: Passage) -> tuple[str, str]:
    """A question about a subject of the passage (mostly) that the passage leaves open; the answer is "unknown"."""
    known = {(f.subject, f.attribute) for f in passage.facts}
    subjects = sorted({f.subject for f in passage.facts}) if rng.random() < 0.7 else NAMES + THINGS
    if all((s, a) in known for s in subjects for a in _attributes(s)):
        subjects = NAMES + THINGS
    while True:
        subject = rng.choice(subjects)
        attribute = rng.choice(_attributes(subject))
        if (subject, attribute) not in known:
            return Fact(subject, attribute, "").question(rng), UNKNOWN


def _attributes(subject: str) -> list[str]:
    return list(PEOPLE if subject in NAMES else OBJECTS)


def ask_about(rng: random.Random, passage: Passage) -> tuple[str, str]:
    """An open request; order and wording of the answer are free, so sampling from a model varies."""
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
    rng: random.Random, n_facts: int, kinds: list[str], test: bool = False, parts: int = 1
) -> list[dict[str, str]]:
    """A passage (in `parts` system messages) and one question of each kind named.

    Example:
        >>> [m["role"] for m in reading_document(random.Random(0), 4, ["free"])]
        ['system', 'user', 'assistant']
    """
    passage = make_passage(rng, n_facts, test)
    sentences = passage.text.replace(". ", ".\n").split("\n")
    size = -(-len(sentences) // parts)
    messages = [
        {"role": "system", "content": " ".join(sentences[i : i + size])}
        for i in range(0, len(sentences), size)
    ]
    for kind in kinds:
        question, answer = QUESTIONS[kind](rng, passage)
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return messages


# -- arithmetic

STYLES = {"short": "Be brief.", "long": "Explain each step."}
CHANGES = {
    "+": (
        ("buys {n} more", "Buying {n} more gives"),
        ("finds {n} more", "Finding {n} more gives"),
        ("gets {n} as a gift", "A gift of {n} makes"),
    ),
    "-": (
        ("gives away {n}", "Giving away {n} leaves"),
        ("loses {n}", "Losing {n} leaves"),
        ("sells {n}", "Selling {n} leaves"),
    ),
    "*": (("then has {n} times as many", "Having {n} times as many makes"),),
}


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


def make_problem(rng: random.Random, n_steps: int, test: bool = False) -> Problem:
    """A random problem of `n_steps` steps from the training or the test side.

    Example:
        >>> len(make_problem(random.Random(0), 3).steps)
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


def arithmetic_document(
    rng: random.Random, n_steps: int, style: str, test: bool = False
) -> list[dict[str, str]]:
    """A word problem and its solution, reasoned in one of two styles and closed by "Answer: n".

    Example:
        >>> arithmetic_document(random.Random(0), 2, "short")[1]["content"].split()[-2]
        'Answer:'
    """
    problem, name, noun = make_problem(rng, n_steps, test), rng.choice(NAMES), rng.choice(FRUITS)
    story, reasoning = [f"{name} has {problem.start} {noun}."], []
    if style == "long":
        reasoning.append(f"{name} starts with {problem.start} {noun}.")
    values = problem.values()
    for (operator, n), before, after in zip(problem.steps, values, values[1:], strict=False):
        told, explained = rng.choice(CHANGES[operator])
        story.append(f"{name} {told.format(n=n)}.")
        equation = f"{before}{operator}{n}={after}"
        reasoning.append(
            f"{explained.format(n=n)} {equation} {noun}." if style == "long" else f"{equation}."
        )
    question = f"{' '.join(story)} How many {noun} does {name} have? {STYLES[style]}"
    answer = f"{' '.join(reasoning)} Answer: {values[-1]}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# -- plain repetition, the skill that look-up grows from

WORDS = tuple(
    dict.fromkeys(NAMES + THINGS + FRUITS + [v for r in RELATIONS.values() for v in r.values])
)


def repetition_document(rng: random.Random, n_words: int) -> list[dict[str, str]]:
    """A list of random words, to be repeated."""
    text = " ".join(rng.choices(WORDS, k=n_words))
    return [{"role": "system", "content": text}, {"role": "assistant", "content": text}]
