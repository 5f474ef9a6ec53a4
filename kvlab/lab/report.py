"""What each lab model can do, measured on held-out data: `python -m kvlab.lab report`."""

import random
import re
import time

import numpy as np
import torch

from kvlab.evaluate import answers, bootstrap, exact_match, multiple_choice
from kvlab.lab import corpora, models, worlds

READING = {"reading": (8, 16), "reading_long": (24, 40)}


def figure(name: str, values, unit: str, conditions: str) -> dict:
    """One measured figure with its 95 % bootstrap interval, as benchmarks write it."""
    value, low, high = bootstrap(values)
    return {
        "name": name,
        "value": value,
        "low": low,
        "high": high,
        "unit": unit,
        "n": len(values),
        "conditions": conditions,
    }


def questions(kind: str, n: int, facts: tuple[int, int], seed: int) -> list[list[dict[str, str]]]:
    """`n` held-out conversations with one question of a kind; the last message is the answer.

    Examples
    --------
    >>> questions("free", 1, (2, 2), seed=0)[0][-1]["role"]
    'assistant'
    """
    rng = random.Random(f"{kind}:{facts}:{seed}")
    return [worlds.reading_document(rng, rng.randint(*facts), [kind], test=True) for _ in range(n)]


def problems(n_steps: int, style: str, n: int, seed: int) -> list[list[dict[str, str]]]:
    """`n` held-out word problems of `n_steps` steps in one style; the last message is the solution.

    Examples
    --------
    >>> "Answer:" in problems(1, "short", 1, seed=0)[0][-1]["content"]
    True
    """
    rng = random.Random(f"{n_steps}:{style}:{seed}")
    return [worlds.arithmetic_document(rng, n_steps, style, test=True) for _ in range(n)]


def result(solution: str) -> str:
    """The number after "Answer:", or an empty text.

    Examples
    --------
    >>> result("3+4=7. Answer: 7")
    '7'
    """
    found = re.search(r"Answer: *(-?\d+)", solution)
    return found.group(1) if found else ""


def report(name: str, n: int = 400, seed: int = 0) -> list[dict]:
    """Every figure of one lab model; names begin with its role (target, draft or teacher).

    Parameters
    ----------
    name : of the lab model.
    n : questions of each kind; word problems are spread over 1-5 steps and both styles.
    """
    model, tokenizer, role = models.load(name), models.load_tokenizer(name), name.removeprefix("lab-")

    def score(documents, read=str.strip, new_tokens=12):
        prompts, truths = [d[:-1] for d in documents], [d[-1]["content"] for d in documents]
        texts = answers(model, tokenizer, prompts, new_tokens, label=f"{name}: {len(prompts)} answers")
        return exact_match([read(t) for t in texts], [read(t) for t in truths])

    figures = []
    for key, facts in READING.items():
        told = f"held-out passages of {facts[0]}-{facts[1]} facts, free questions, greedy, exact match"
        figures.append(figure(f"{role}_{key}", score(questions("free", n, facts, seed)), "fraction", told))
    unanswerable = score(questions("unanswerable", n, (8, 16), seed))
    figures.append(figure(f"{role}_unanswerable", unanswerable, "fraction", 'answer "unknown", 8-16 facts'))
    choice = questions("choice", n, (8, 16), seed)
    picked = multiple_choice(model, tokenizer, [d[:-1] for d in choice], [list(worlds.LETTERS)] * len(choice))
    right = [worlds.LETTERS[p] == d[-1]["content"] for p, d in zip(picked, choice, strict=True)]
    figures.append(figure(f"{role}_choice", right, "fraction", "likeliest of four letters, 8-16 facts; chance is 0.25"))
    scores = []
    for steps in range(1, 6):
        each = [score(problems(steps, style, n // 10, seed), result, 160) for style in worlds.STYLES]
        for style, values in zip(worlds.STYLES, each, strict=True):
            told = f"held-out problems of {steps} steps, {style} style, final answer right"
            figures.append(figure(f"{role}_arithmetic_{steps}_{style}", values, "fraction", told))
        scores += each
    told = "held-out problems of 1-5 steps, both styles, final answer right"
    figures.append(figure(f"{role}_arithmetic", np.concatenate(scores), "fraction", told))
    seen = [(q, i["answer"]) for i in corpora.faq() for q in (i["question"], *i["paraphrases"][:2])]
    unseen = [(i["paraphrases"][2], i["answer"]) for i in corpora.faq()]
    for key, pairs in {"faq": seen, "faq_heldout": unseen}.items():
        prompts = [[{"role": "user", "content": q}] for q, _ in pairs]
        texts = answers(model, tokenizer, prompts, 96, label=f"{name}: FAQ")
        equal = [t == a for t, (_, a) in zip(texts, pairs, strict=True)]
        figures.append(figure(f"{role}_{key}", equal, "fraction", "the answer word for word, greedy"))
    return figures


@torch.inference_mode()
def tokens_per_second(name: str, repeats: int = 7, tokens: int = 64) -> list[float]:
    """Tokens a second of greedy decoding, batch 1, after a prompt of 16 facts; one figure a repeat.

    Examples
    --------
    >>> tokens_per_second("lab-draft", repeats=1, tokens=2)[0] > 0
    True
    """
    model, tokenizer = models.load(name), models.load_tokenizer(name)
    prompt = questions("about", 1, (16, 16), seed=0)[0][:-1]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    rates = []
    for _ in range(repeats + 1):  # the first warms up
        started = time.perf_counter()
        model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        rates.append(tokens / (time.perf_counter() - started))
    return rates[1:]


def megabytes() -> float:
    """Size of all shipped safetensors, in units of 10^6 bytes."""
    return sum(path.stat().st_size for path in models.MODELS.rglob("*.safetensors")) / 1e6
