"""What each lab model can do, measured on held-out data: `python -m kvlab.lab report`."""

import random
import re
import time
from collections.abc import Sequence

import numpy as np
import torch

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
CONDITIONS = {
    "reading": "held-out passages of 8-16 facts, free questions, greedy, the answer word for word",
    "reading_long": "held-out passages of 24-40 facts, free questions, greedy, the answer word for word",
    "unanswerable": 'held-out passages of 8-16 facts that leave the question open, answer "unknown"',
    "choice": "held-out passages of 8-16 facts, the likeliest of four answers to the question; chance is 0.25",
    "letter": "held-out passages of 8-16 facts, four options in the question, greedy letter; chance is 0.25",
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
    found = re.search(r"Answer: *(-?\d+)", solution)
    return found.group(1) if found else ""


def heldout(task: str, n: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """About `n` conversations of a task of the report (as many as there are, if fewer); the last message is the answer.

    Example:
        >>> heldout("choice", 1)[0][-1]["content"] in worlds.LETTERS
        True
    """
    if task in READING:
        kind, facts = READING[task]
        return questions(kind, n, facts, seed)
    if task == "arithmetic":
        return [
            p
            for steps, style in PROBLEMS
            for p in problems(steps, style, max(1, n // len(PROBLEMS)), seed)
        ]
    asked = {
        i["answer"]: i["paraphrases"][2:] if task == "faq_heldout" else _trained(i)
        for i in corpora.faq()
    }
    pairs = [(question, answer) for answer, wordings in asked.items() for question in wordings]
    pairs = random.Random(seed).sample(pairs, min(n, len(pairs)))
    return [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]


def _trained(item: dict) -> list[str]:
    return [item["question"], *item["paraphrases"][:2]]


def scores(task: str, model, tokenizer, documents: Sequence[list[dict[str, str]]]) -> np.ndarray:
    """1 for each conversation whose answer the model gets right, else 0."""
    prompts, truths = [d[:-1] for d in documents], [d[-1]["content"] for d in documents]
    if task == "choice":
        asked = [
            re.split(r" [A-D]\) ", p[-1]["content"]) for p in prompts
        ]  # the question, then its four options
        prompts = [
            [*p[:-1], {"role": "user", "content": question}]
            for p, (question, *_) in zip(prompts, asked, strict=True)
        ]
        picked = multiple_choice(model, tokenizer, prompts, [options for _, *options in asked])
        return np.array(
            [worlds.LETTERS[i] == truth for i, truth in zip(picked, truths, strict=True)], float
        )
    new_tokens = {"arithmetic": 160, "faq": 96, "faq_heldout": 96}.get(task, 12)
    texts = answers(model, tokenizer, prompts, new_tokens, label=task)
    if task == "arithmetic":
        texts, truths = map(result, texts), map(result, truths)
    return np.array([text == truth for text, truth in zip(texts, truths, strict=True)], float)


def report(
    name: str, n: int = 400, seed: int = 0, tasks: Sequence[str] = tuple(CONDITIONS)
) -> list[dict]:
    """Figures of one lab model, with intervals; names begin with its role (target, draft or teacher).

    Args:
        name: of the lab model.
        n: questions of each task; word problems are spread over 1-5 steps and both styles, and also
            told apart.
        tasks: of those in `CONDITIONS`.

    Example:
        >>> report("lab-draft", n=1, tasks=["reading"])[0]["name"]
        'draft_reading'
    """
    model, tokenizer, role = (
        models.load(name),
        models.load_tokenizer(name),
        name.removeprefix("lab-"),
    )
    figures = []
    for task in tasks:
        right = scores(task, model, tokenizer, heldout(task, n, seed))
        figures.append(figure(f"{role}_{task}", right, "fraction", CONDITIONS[task]))
        if task == "arithmetic":
            for (steps, style), part in zip(PROBLEMS, np.split(right, len(PROBLEMS)), strict=True):
                told = f"held-out problems of {steps} steps, {style} style, final answer right"
                figures.append(figure(f"{role}_arithmetic_{steps}_{style}", part, "fraction", told))
    return figures


@torch.inference_mode()
def tokens_per_second(name: str, repeats: int = 7, tokens: int = 64) -> list[float]:
    """Tokens a second of greedy decoding, batch 1, after a prompt of 16 facts; one figure a repeat.

    Example:
        >>> tokens_per_second("lab-draft", repeats=1, tokens=2)[0] > 0
        True
    """
    model, tokenizer = models.load(name), models.load_tokenizer(name)
    prompt = questions("about", 1, (16, 16), seed=0)[0][:-1]
    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    rates = []
    for _ in range(repeats + 1):  # the first warms up
        started = time.perf_counter()
        model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        rates.append(tokens / (time.perf_counter() - started))
    return rates[1:]


def megabytes() -> float:
    """Size of all shipped safetensors, in units of 10^6 bytes."""
    return sum(path.stat().st_size for path in models.MODELS.rglob("*.safetensors")) / 1e6
