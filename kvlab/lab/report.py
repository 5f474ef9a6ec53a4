"""The abilities of the lab models, measured on held-out data: `python -m kvlab.lab report`."""

import random
import re
from collections.abc import Sequence

import numpy as np

from kvlab.evaluate import figure, multiple_choice
from kvlab.generation import answers
from kvlab.lab import corpora, models, worlds

READING = {
    "reading": ("free", (8, 16)),
    "reading_long": ("free", (24, 40)),
    "unanswerable": ("unanswerable", (8, 16)),
    "choice": ("choice", (8, 16)),
    "letter": ("choice", (8, 16)),
}
PROBLEMS = [(steps, style) for steps in range(1, 6) for style in worlds.STYLES]
_PASSAGES = "held-out passages of 8-16 facts"
_FREE = "free questions, greedy, the answer word for word"
CONDITIONS = {
    "reading": f"{_PASSAGES}, {_FREE}",
    "reading_long": f"held-out passages of 24-40 facts, {_FREE}",
    "unanswerable": f'{_PASSAGES} that leave the question open, answer "unknown"',
    "choice": f"{_PASSAGES}, the likeliest of four answers to the question; chance is 0.25",
    "letter": f"{_PASSAGES}, four options in the question, greedy letter; chance is 0.25",
    "arithmetic": "held-out problems of 1-5 steps, both styles, final answer right",
    "faq": "questions as trained on, the answer word for word, greedy",
    "faq_heldout": "held-out paraphrases, the answer word for word, greedy",
}


def questions(kind: str, n: int, facts: tuple[int, int], seed: int) -> list[list[dict[str, str]]]:
    """`n` held-out conversations with one question of a kind; the last message is the answer.

    Example:
        >>> questions("free", 1, (2, 2), seed=0)[0][-1]["role"]
        'assistant'
    """
    rng = random.Random(f"{kind}:{facts}:{seed}")
    return [worlds.reading_document(rng, rng.randint(*facts), [kind], test=True) for _ in range(n)]


def split_questions(
    n: int, facts: int, pieces: int, seed: int
) -> list[tuple[worlds.Conversation, list[str]]]:
    """`n` held-out conversations, each with its passage in pieces that refer to the piece before.

    A later piece begins after the subject of a sentence ("Anna" ends a piece, " lives in Rome."
    begins the next), as pieces of a fixed number of tokens may. The question is about one of these
    sentences.

    Example:
        >>> (conversation, texts), = split_questions(1, facts=4, pieces=2, seed=0)
        >>> len(texts), "".join(texts) == conversation[0]["content"]
        (2, True)
    """
    rng, made = random.Random(f"split:{facts}:{pieces}:{seed}"), []
    splits = [facts * i // pieces for i in range(1, pieces)]
    for _ in range(n):
        passage = worlds.make_passage(rng, facts, test=True)
        sentences, fact = passage.text.split(". "), passage.facts[rng.choice(splits)]
        for i in splits:
            subject = passage.facts[i].subject
            sentences[i] = sentences[i].replace(subject, f"{subject}|", 1)
        contents = {"system": passage.text, "user": fact.question(rng), "assistant": fact.value}
        conversation = [{"role": role, "content": text} for role, text in contents.items()]
        made.append((conversation, ". ".join(sentences).split("|")))
    return made


def problems(n_steps: int, style: str, n: int, seed: int) -> list[list[dict[str, str]]]:
    """`n` held-out word problems of `n_steps` steps in one style; the last message is the solution.

    Example:
        >>> "Answer:" in problems(1, "short", 1, seed=0)[0][-1]["content"]
        True
    """
    rng = random.Random(f"{n_steps}:{style}:{seed}")
    return [worlds.arithmetic_document(rng, n_steps, style, test=True) for _ in range(n)]


def result(solution: str) -> str:
    """The number after "Answer:", or an empty text.

    Example:
        >>> result("3+4=7. Answer: 7")
        '7'
    """
    match = re.search(r"Answer: *(-?\d+)", solution)
    return match.group(1) if match else ""


def heldout(task: str, n: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """About `n` conversations of a task (all, if fewer); the last message is the answer.

    Example:
        >>> heldout("choice", 1)[0][-1]["content"] in worlds.LETTERS
        True
    """
    if task in READING:
        kind, facts = READING[task]
        return questions(kind, n, facts, seed)
    documents = []
    if task == "arithmetic":
        for steps, style in PROBLEMS:
            documents += problems(steps, style, max(1, n // len(PROBLEMS)), seed)
        return documents
    for item in corpora.faq():
        wordings = [item["question"], *item["paraphrases"][:2]]
        if task == "faq_heldout":
            wordings = item["paraphrases"][2:]
        answer = {"role": "assistant", "content": item["answer"]}
        documents += [[{"role": "user", "content": text}, answer] for text in wordings]
    return random.Random(seed).sample(documents, min(n, len(documents)))


def scores(task: str, model, tokenizer, documents: Sequence[list[dict[str, str]]]) -> np.ndarray:
    """1 for each conversation that the model answers correctly, else 0."""
    prompts = [document[:-1] for document in documents]
    references = [document[-1]["content"] for document in documents]
    if task == "choice":  # the question alone, and the probabilities of its four options
        options = []
        for i, prompt in enumerate(prompts):
            question, *texts = re.split(r" [A-D]\) ", prompt[-1]["content"])
            prompts[i] = [*prompt[:-1], {"role": "user", "content": question}]
            options.append(texts)
        picks = multiple_choice(model, tokenizer, prompts, options)
        predictions = [worlds.LETTERS[pick] for pick in picks]
    else:
        new_tokens = {"arithmetic": 160, "faq": 96, "faq_heldout": 96}.get(task, 12)
        predictions = answers(model, tokenizer, prompts, new_tokens, label=task)
    if task == "arithmetic":
        predictions = map(result, predictions)
        references = map(result, references)
    pairs = zip(predictions, references, strict=True)
    return np.array([prediction == reference for prediction, reference in pairs], float)


def report(
    name: str, n: int = 400, seed: int = 0, tasks: Sequence[str] = tuple(CONDITIONS)
) -> list[dict]:
    """Figures of one lab model, with intervals; names begin with its role, such as "draft".

    Args:
        name: name of the lab model.
        n: questions per task; word problems are spread over 1-5 steps and both styles, and also
            reported separately.
        tasks: some of `CONDITIONS`.

    Example:
        >>> report("lab-draft", n=1, tasks=["reading"])[0]["name"]
        'draft_reading'
    """
    if name not in models.NAMES:
        raise ValueError(f"no lab model {name!r}; expected one of {', '.join(models.NAMES)}")
    model = models.load_model(name)
    tokenizer = models.load_tokenizer(name)
    role, figures = name.removeprefix("lab-"), []
    for task in tasks:
        values = scores(task, model, tokenizer, heldout(task, n, seed))
        figures.append(figure(f"{role}_{task}", values, "fraction", CONDITIONS[task]))
        if task == "arithmetic":
            parts = np.split(values, len(PROBLEMS))
            for (steps, style), part in zip(PROBLEMS, parts, strict=True):
                name = f"{role}_arithmetic_{steps}_{style}"
                text = f"held-out problems of {steps} steps, {style} style, final answer right"
                figures.append(figure(name, part, "fraction", text))
    return figures
