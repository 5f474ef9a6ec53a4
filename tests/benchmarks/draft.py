"""Drafts that read: how much of the target's answers they guess, with and without knowledge, and how fast that is."""

import random
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _benchmark import benchmark
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlab import draft, lab
from kvlab.draft import DraftExample, KnowledgeDraft, KnowledgeDraftConfig
from kvlab.evaluate import figure
from kvlab.generation import encode
from kvlab.knowledge import Item, KnowledgeCache
from kvlab.lab import corpora
from kvlab.lab.report import problems
from kvlab.scale import config_of, parameters
from kvlab.speculate import ModelProposer, generate, summarize

THREADS, NEW, LAYERS, BEST = 2, 64, "uniform:3", "first:1"
EPOCHS, GAMMA, THRESHOLD = 5, 8, 0.3
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

    examples: list[DraftExample]
    items: list[Item | None]


def ask(s: Lab, questions: Sequence[str], search: bool = True) -> Texts:
    prompts = [
        encode(s.tokenizer, [{"role": "user", "content": question}]) for question in questions
    ]
    items = [find(s, question) if search else None for question in questions]
    return Texts(draft.generate_targets(s.target, s.tokenizer, prompts, s.folder, NEW), items)


def find(s: Lab, question: str) -> Item | None:
    hits = s.store.retrieve(question, threshold=THRESHOLD)
    return hits[0].item if hits else None


def setup(folder: Path, quick: bool) -> Lab:
    target, tokenizer = (
        lab.load("lab-target").requires_grad_(False),
        lab.load_tokenizer("lab-target"),
    )
    parts = target, tokenizer, lab.load_embedder()
    store = KnowledgeCache.build(folder / "faq", corpora.faq(), *parts, keep=("kv", "hidden"))
    made = corpora.made_up(24 if quick else 1000)
    practice = KnowledgeCache.build(
        folder / "made up",
        made,
        target,
        tokenizer,
        keep=("kv", "hidden"),
        dtype=torch.float16,
        batch_size=32,
    )
    return Lab(target, tokenizer, store, practice, folder, quick)


# -- training


class Split(NamedTuple):
    """Texts to train on; to choose the weights by; and held-out paraphrases of items trained on, and of new ones."""

    train: Texts
    other: Texts
    checks: Texts
    seen: Texts
    new: Texts
    asked: Sequence[str] = ()  # the new ones


def split(s: Lab, seed: int) -> Split:
    """Half of the FAQ's items are new to the draft: no answer of theirs is in what it is trained on."""
    records, wordings = list(corpora.faq()), corpora.wordings()
    random.Random(seed).shuffle(records)
    seen, checked, new = (
        (records[:4], records[4:6], records[6:8]) if s.quick else np.split(records, [25, 33])
    )
    more = 0 if s.quick else 20
    train = ask(
        s,
        [
            q
            for r in seen
            for q in (r["question"], *r["paraphrases"][:2], *wordings[r["id"]][:more])
        ],
    )
    secret = {ending(encode(s.tokenizer, said(r))) for r in (*checked, *new)}
    known = [ending(example.input_ids.tolist()) not in secret for example in train.examples]
    train = Texts(*([x for x, keep in zip(column, known, strict=True) if keep] for column in train))
    others = word_problems(4 if s.quick else 50, seed + 7)
    checks = ask(s, [q for r in checked for q in (r["question"], *wordings[r["id"]][:4])])
    heldout = (ask(s, [r["paraphrases"][2] for r in group]) for group in (seen, new))
    return Split(
        train, ask(s, others, search=False), checks, *heldout, [r["paraphrases"][2] for r in new]
    )


def ending(ids: list[int]) -> tuple[int, ...]:
    """What tells one of the FAQ's answers from the others."""
    return tuple(ids[-8:])


def said(record: dict) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": record["question"]},
        {"role": "assistant", "content": record["answer"]},
    ]


def train(s: Lab, parts: Split, way: str | None, seed: int, layers: str = LAYERS) -> KnowledgeDraft:
    """One draft, for the same steps whichever way it reads; made-up items only for those that read."""
    small = KnowledgeDraft.cut(s.target, layers, knowledge=way)
    examples, checks, epochs = (
        [*parts.train.examples, *parts.other.examples],
        parts.checks.examples,
        EPOCHS,
    )
    if way:
        known = draft.corrupt_knowledge(
            draft.attach(small, s.store, *parts.train), drop=0.15, swap=0.3, seed=seed
        )
        practice = draft.attach(small, s.made_up, draft.item_examples(s.made_up), list(s.made_up))
        examples, checks = (
            [*known, *parts.other.examples, *practice],
            draft.attach(small, s.store, *parts.checks),
        )
    else:
        epochs = round(epochs * (len(examples) + len(s.made_up)) / len(examples))
    options = {"epochs": 1, "batch_size": 8} if s.quick else {"epochs": epochs, "batch_size": 32}
    loss_weights = {"kl": 1.0, "ce": 1.0} if way else {"kl": 1.0}
    draft.train_draft(
        small,
        s.target,
        examples,
        checks,
        loss_weights=loss_weights,
        learning_rate=1.5e-3,
        seed=seed,
        **options,
    )
    return small


def accepted(s: Lab, small: KnowledgeDraft, texts: Texts, know: bool = True) -> np.ndarray:
    reads = know and small.config.knowledge
    examples = draft.attach(small, s.store, *texts) if reads else texts.examples
    return draft.measure_acceptance(small, s.target, examples).greedy


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
        item = find(s, question) if small.config.knowledge else None
        return ModelProposer(*small.with_knowledge(s.store, [item], [len(ids)]))

    return timed(s, ids, proposer)


def timed(s: Lab, ids: list[int], proposer) -> Run:
    started = time.perf_counter()
    made = generate(s.target, [ids], proposer(), gamma=GAMMA, max_new_tokens=NEW)
    whole = time.perf_counter() - started
    decoding = sum(r.seconds for r in made.rounds if not r.is_prefill)
    return Run(made.tokens[0].tolist(), decoding, whole, summarize(made.rounds).acceptance)


def taking_turns(
    s: Lab, drafts: dict[str, KnowledgeDraft], questions: Sequence[str]
) -> dict[str, list[Run]]:
    """Each way of decoding on each question, one after another; the median of three runs."""
    prompts = [
        encode(s.tokenizer, [{"role": "user", "content": question}]) for question in questions
    ]
    arms = {
        "plain": lambda question, ids: plain(s, ids),
        "generate": lambda question, ids: with_generate(s, ids),
    }
    arms |= {name: partial(drafted, s, small) for name, small in drafts.items()}
    runs: dict[str, list[Run]] = {arm: [] for arm in arms}
    for run in arms.values():
        run(questions[0], prompts[0])  # warms up
    for question, ids in tqdm(list(zip(questions, prompts, strict=True)), desc="speed"):
        tries = [
            {arm: run(question, ids) for arm, run in arms.items()}
            for _ in range(1 if s.quick else 3)
        ]
        for arm in arms:
            mine = [t[arm] for t in tries]
            decoding, whole = (
                float(np.median([getattr(run, part) for run in mine]))
                for part in ("decoding", "whole")
            )
            runs[arm].append(mine[0]._replace(decoding=decoding, whole=whole))
    return runs


def ratio(runs: dict[str, list[Run]], fast: str, slow: str, part: str = "decoding") -> list[float]:
    return [
        getattr(b, part) / getattr(a, part) for a, b in zip(runs[fast], runs[slow], strict=True)
    ]


def speed_figures(
    s: Lab, seed: int, asked: Sequence[str], halved: dict[str, KnowledgeDraft]
) -> list[dict]:
    """A draft that was trained on the whole FAQ, and drafts trained on half of it, in the loop."""
    records, wordings = list(corpora.faq()), corpora.wordings()
    records = records[:4] if s.quick else records
    texts = ask(
        s,
        [
            q
            for r in records
            for q in (r["question"], *r["paraphrases"][:2], *wordings[r["id"]][:16])
        ],
    )
    checks = ask(s, [wordings[r["id"]][-1] for r in records])
    everything = Split(
        texts,
        ask(s, word_problems(4 if s.quick else 50, seed + 7), search=False),
        checks,
        None,
        None,
    )
    best = train(s, everything, None, seed, BEST)
    whole = taking_turns(s, {"best": best}, [r["paraphrases"][2] for r in records])
    new = taking_turns(s, halved, asked)
    pairs = (
        (a, b)
        for runs in (whole, new)
        for arm in runs.values()
        for a, b in zip(arm, runs["plain"], strict=True)
    )
    told = f"batch 1, greedy, gamma {GAMMA}, eager, {torch.get_num_threads()} threads, ratio of times a question, median "
    told += "of 3 runs in turn"
    all_of = f"{told}; {BEST} of 12 layers, trained on other wordings of the whole FAQ, no knowledge; held-out paraphrases"
    some = f"{told}; {LAYERS} of 12 layers, held-out paraphrases of items that were not in training"
    rows = {
        "speedup": (ratio(whole, "best", "plain"), f"decoding, over our plain loop; {all_of}"),
        "speedup_over_generate": (
            ratio(whole, "best", "generate"),
            f"decoding, over generate; {all_of}",
        ),
        "speedup_end_to_end": (
            ratio(whole, "best", "plain", "whole"),
            f"from the question on; {all_of}",
        ),
        "speedup_kv_new": (ratio(new, "kv", "plain"), f"decoding, reading keys and values; {some}"),
        "speedup_kv_new_end_to_end": (
            ratio(new, "kv", "plain", "whole"),
            f"finding and loading included; {some}",
        ),
        "speedup_trained_new": (ratio(new, "trained", "plain"), f"decoding, no knowledge; {some}"),
    }
    accepted_best = [run.acceptance for run in whole["best"]]
    return [
        *(figure(name, values, "ratio", conditions) for name, (values, conditions) in rows.items()),
        figure(
            "speedup_acceptance", accepted_best, "fraction", f"acceptance in the loop; {all_of}"
        ),
        figure(
            "identical",
            [a.tokens == b.tokens for a, b in pairs],
            "fraction",
            "texts equal to those of plain decoding",
        ),
    ]


# -- all of it

LOSSES = ("kl", "reverse_kl", "ce", "tv", "log_alpha", "lk_hybrid")
COUNTED = {
    "first_3": ("first:3", {}),
    "uniform_6": ("uniform:6", {}),
    "uniform_6_kv": ("uniform:6", {"knowledge": "kv"}),
    "uniform_6_kv_transitions": ("uniform:6", {"knowledge": "kv", "transitions": True}),
}


def reading_figures(
    s: Lab, splits: dict[int, Split]
) -> tuple[list[dict], dict[str, KnowledgeDraft]]:
    """Drafts that read and drafts that do not, on the same texts, asked the same; and those of the last seed."""
    outside = ask(s, corpora.outside("test"))
    values: dict[str, list[np.ndarray]] = {}
    for seed, parts in splits.items():
        drafts = {"truncated": KnowledgeDraft.cut(s.target, LAYERS)}
        drafts |= {name: train(s, parts, way, seed) for way, name in NAMES.items()}
        for name, small in drafts.items():
            for suffix, texts in (("", parts.new), ("_seen", parts.seen), ("_outside", outside)):
                values.setdefault(f"{name}{suffix}", []).append(accepted(s, small, texts))
            if small.config.knowledge:
                values.setdefault(f"{name}_not_given", []).append(
                    accepted(s, small, parts.new, know=False)
                )
    told = f"{LAYERS} of 12 layers, {len(splits)} seed(s), each with its own division of the FAQ, greedy acceptance "
    told += (
        f"along the target's own answers; items found by the question, cosine {THRESHOLD} or more"
    )
    kinds = {
        "": "held-out paraphrases of items that are in the store and were not in training",
        "_seen": "held-out paraphrases of items that were in training",
        "_outside": "questions that no item answers",
        "_not_given": "as acceptance, but nothing is given to read",
    }
    found = []
    for name, arrays in values.items():
        kind = next(k for k in kinds if k and name.endswith(k)) if "_" in name else ""
        found.append(
            figure(
                f"acceptance_{name}", np.concatenate(arrays), "fraction", f"{kinds[kind]}; {told}"
            )
        )
    for way in ("vector", "kv", "prefix"):
        for suffix in ("", "_seen", "_outside"):
            gain = np.concatenate(values[way + suffix]) - np.concatenate(values["trained" + suffix])
            kind = f"{way} minus trained, question by question; {kinds[suffix]}; {told}"
            found.append(figure(f"gain_{way}{suffix}", gain, "difference", kind))
    return found, drafts


def loss_figures(s: Lab, splits: dict[int, Split]) -> list[dict]:
    """Each loss alone, from the same cut, on the same texts, for the same few steps."""
    rows: dict[str, list[draft.Acceptance]] = {}
    for seed, parts in splits.items():
        tests = [
            *parts.seen.examples,
            *ask(s, word_problems(10, seed + 900), search=False).examples,
        ]
        texts = [*parts.train.examples, *parts.other.examples]
        for name in LOSSES[:2] if s.quick else LOSSES:
            small = KnowledgeDraft.cut(s.target, "first:2")
            options = {
                "epochs": 1,
                "batch_size": 8 if s.quick else 32,
                "learning_rate": 1e-3,
                "seed": seed,
            }
            draft.train_draft(
                small,
                s.target,
                texts,
                parts.checks.examples,
                loss_weights={name: 1.0},
                every=10_000,
                **options,
            )
            rows.setdefault(name, []).append(draft.measure_acceptance(small, s.target, tests))
    told = f"first:2 of 12 layers, one pass over the same texts with each loss alone, {len(splits)} seeds; held-out "
    told += "paraphrases of the FAQ and word problems"
    return [
        figure(
            f"{way}_{name}",
            np.concatenate([getattr(a, way) for a in found]),
            "fraction",
            f"{way} acceptance; {told}",
        )
        for name, found in rows.items()
        for way in ("greedy", "sampled")
    ]


def count_figures() -> list[dict]:
    """Parameters on the shape of Qwen3-0.6B, without any memory."""
    large = config_of("Qwen/Qwen3-0.6B")
    drafts = {
        name: KnowledgeDraftConfig.of(large, layers, **how)
        for name, (layers, how) in COUNTED.items()
    }
    told = "on the shape of Qwen3-0.6B, tied parameters once"
    return [
        figure(
            f"parameters_{name}",
            [parameters(config) / 1e6],
            "10^6",
            f"{name.replace('_', ' ')} {told}",
        )
        for name, config in {"target": large, **drafts}.items()
    ]


def word_problems(each: int, seed: int) -> list[str]:
    return [p[0]["content"] for n in (1, 2, 3) for p in problems(n, "long", each, seed=seed)]


def measure(quick: bool, seed: int) -> list[dict]:
    """Acceptance with and without knowledge, losses, speed and parameters of drafts."""
    torch.set_num_threads(THREADS)
    seeds = range(seed, seed + (1 if quick else 3))
    with tempfile.TemporaryDirectory() as folder:
        s = setup(Path(folder), quick)
        splits = {seed: split(s, seed) for seed in seeds}
        reading, drafts = reading_figures(s, splits)
        losses = loss_figures(s, splits)
        halved = {name: drafts[name] for name in ("trained", "kv")}
        speed = speed_figures(s, seeds[-1], splits[seeds[-1]].asked, halved)
        return [*reading, *losses, *speed, *count_figures()]


if __name__ == "__main__":
    benchmark(measure)
