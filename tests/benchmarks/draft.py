"""Drafts that read: how much of the target's answers they guess, with and without knowledge, and how fast that is."""

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlab import draft, lab
from kvlab.draft import Example, KnowledgeDraft, KnowledgeDraftConfig
from kvlab.evaluate import benchmark, encode, figure
from kvlab.knowledge import Item, KnowledgeCache
from kvlab.lab import corpora
from kvlab.lab.report import problems
from kvlab.scale import config_of, parameters
from kvlab.speculate import ModelProposer, generate, summarize

THREADS, NEW, LAYERS = 2, 64, "uniform:3"
WAYS = (None, "vector", "kv", "prefix")
EPOCHS, GAMMA = 6, 6
NAMES = {None: "trained", "vector": "vector", "kv": "kv", "prefix": "prefix"}


class Lab(NamedTuple):
    """The target, and a store of the whole FAQ."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    store: KnowledgeCache
    made_up: KnowledgeCache
    folder: Path
    quick: bool


class Texts(NamedTuple):
    """What the target says to questions, and the item that each question finds."""

    examples: list[Example]
    items: list[Item | None]


def ask(s: Lab, questions: Sequence[str], search: bool = True) -> Texts:
    prompts = [encode(s.tokenizer, [{"role": "user", "content": question}]) for question in questions]
    hits = [s.store.retrieve(question) if search else [] for question in questions]
    return Texts(draft.listen(s.target, s.tokenizer, prompts, s.folder, NEW), [h[0].item if h else None for h in hits])


def setup(folder: Path, quick: bool) -> Lab:
    target, tokenizer = lab.load("lab-target").requires_grad_(False), lab.load_tokenizer("lab-target")
    parts = target, tokenizer, lab.load_embedder()
    store = KnowledgeCache.build(folder / "faq", corpora.faq(), *parts, keep=("kv", "hidden"))
    made = corpora.made_up(24 if quick else 400)
    practice = KnowledgeCache.build(folder / "made up", made, target, tokenizer, keep=("kv", "hidden"))
    return Lab(target, tokenizer, store, practice, folder, quick)


# -- training


class Split(NamedTuple):
    """What a draft is trained on, and what it is asked: paraphrases of items it was trained on, and of new ones."""

    train: Texts
    other: Texts
    heldout: Texts
    seen: Texts
    new: Texts


def split(s: Lab, seed: int) -> Split:
    """Half of the FAQ's items are new to the draft: no answer of theirs is in what it is trained on."""
    records = list(corpora.faq())
    random.Random(seed).shuffle(records)
    half, wordings = (records[:25], records[25:]), corpora.wordings()
    if s.quick:
        half = half[0][:4], half[1][:4]
    asked = [[r["question"], *r["paraphrases"][:2], *wordings[r["id"]][: 0 if s.quick else 20]] for r in half[0]]
    train = ask(s, [question for group in asked for question in group])
    secret = {tuple(encode(s.tokenizer, said(r))[-8:]) for r in half[1]}  # the ends of the new items' answers
    kept = [tuple(e.input_ids[-8:].tolist()) not in secret for e in train.examples]
    train = Texts(*([x for x, keep in zip(column, kept, strict=True) if keep] for column in train))
    checks = ask(s, [wordings[r["id"]][-1] for r in half[0]])  # other wordings, to choose the best weights by
    word_problems = [p[0]["content"] for n in (1, 2, 3) for p in problems(n, "long", 4 if s.quick else 50, seed=seed + 7)]
    other = ask(s, word_problems, search=False)
    return Split(train, other, checks, *(ask(s, [r["paraphrases"][2] for r in group]) for group in half))


def said(record: dict) -> list[dict[str, str]]:
    return [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": record["answer"]}]


def train(s: Lab, parts: Split, way: str | None, seed: int, layers: str = LAYERS) -> KnowledgeDraft:
    """One draft, on the same texts whichever way it reads."""
    small = KnowledgeDraft.cut(s.target, layers, knowledge=way)
    practice = draft.given(s.made_up)
    if way:
        known = draft.attach(small, s.store, *parts.train)
        practice = draft.attach(small, s.made_up, practice, list(s.made_up))
    else:
        known = parts.train.examples
    examples = [*draft.unsettle(known, seed=seed), *parts.other.examples, *practice]
    heldout = draft.attach(small, s.store, *parts.heldout) if way else parts.heldout.examples
    options = {"epochs": 1, "batch_size": 8} if s.quick else {"epochs": EPOCHS, "batch_size": 32}
    shares = {"kl": 1.0, "ce": 0.5}
    draft.train(small, s.target, examples, heldout, shares=shares, learning_rate=1e-3, seed=seed, **options)
    return small


def accepted(s: Lab, small: KnowledgeDraft, texts: Texts, know: bool = True) -> np.ndarray:
    reads = know and small.config.knowledge
    examples = draft.attach(small, s.store, *texts) if reads else texts.examples
    return draft.acceptance(small, s.target, examples).greedy


# -- speed


class Run(NamedTuple):
    """One answer: its tokens, seconds of decoding, and of everything from the question on."""

    tokens: list[int]
    decoding: float
    whole: float
    acceptance: float = float("nan")


def plain(s: Lab, ids: list[int]) -> Run:
    return timed(s, ids, lambda: None)


def with_generate(s: Lab, ids: list[int]) -> Run:
    """`generate` of transformers; reading the prompt is what the same call takes for one token."""
    tensor, options = torch.tensor([ids]), {"do_sample": False, "repetition_penalty": 1.0}
    with torch.inference_mode():
        started = time.perf_counter()
        tokens = s.target.generate(tensor, max_new_tokens=NEW, **options)[0, len(ids) :].tolist()
        whole = time.perf_counter() - started
        s.target.generate(tensor, max_new_tokens=1, **options)
    return Run(tokens, 2 * whole - (time.perf_counter() - started), whole)


def drafted(s: Lab, small: KnowledgeDraft, question: str, ids: list[int]) -> Run:
    """Find the item, load it, draft with it."""

    def proposer() -> ModelProposer:
        hits = s.store.retrieve(question) if small.config.knowledge else []
        return ModelProposer(*small.knowing(s.store, [hits[0].item if hits else None], [len(ids)]))

    return timed(s, ids, proposer)


def timed(s: Lab, ids: list[int], proposer) -> Run:
    started = time.perf_counter()
    made = generate(s.target, [ids], proposer(), gamma=GAMMA, max_new_tokens=NEW)
    whole = time.perf_counter() - started
    decoding = sum(r.seconds for r in made.rounds if not r.reading)
    return Run(made.tokens[0].tolist(), decoding, whole, summarize(made.rounds).acceptance)


def speed_figures(s: Lab, drafts: dict[str, KnowledgeDraft], questions: Sequence[str]) -> list[dict]:
    """Arms take turns on each question; the median of three runs."""
    prompts = [encode(s.tokenizer, [{"role": "user", "content": q}]) for q in questions]
    arms = {"plain": lambda q, ids: plain(s, ids), "generate": lambda q, ids: with_generate(s, ids)}
    arms |= {name: partial(lambda small, q, ids: drafted(s, small, q, ids), small) for name, small in drafts.items()}
    runs: dict[str, list[Run]] = {arm: [] for arm in arms}
    for arm in arms.values():
        arm(questions[0], prompts[0])  # warms up
    for question, ids in tqdm(list(zip(questions, prompts, strict=True)), desc="speed"):
        tries = [{arm: run(question, ids) for arm, run in arms.items()} for _ in range(1 if s.quick else 3)]
        for arm in arms:
            mine = [t[arm] for t in tries]
            decoding, whole = (float(np.median([getattr(run, part) for run in mine])) for part in ("decoding", "whole"))
            runs[arm].append(mine[0]._replace(decoding=decoding, whole=whole))
    return runs
