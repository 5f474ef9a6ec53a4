"""The knowledge cache: retrieval, splicing, time and memory, and stores after a kill."""

import gc
import io
import multiprocessing
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import psutil
import torch
from _benchmark import benchmark
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kvlab import lab
from kvlab.cache import Prefix, join, nbytes, prefill, select, shift
from kvlab.evaluate import exponential, figure
from kvlab.generation import encode
from kvlab.knowledge import (
    CACHES_USED,
    Embedder,
    Item,
    KnowledgeCache,
    prefill_behind,
    splice,
    tokens_computed,
)
from kvlab.lab import corpora, worlds
from kvlab.lab.models import make
from kvlab.lab.report import questions, split_questions
from kvlab.models import CacheError, rotary_of
from kvlab.records import read_faq
from kvlab.scale import config_of

THREADS, SHARES, TOKENS, BIG = 2, (0, 5, 15, 30, 100), 512, "Qwen/Qwen3-0.6B"
LINKS = (4, 8, 16)  # first tokens of pieces that LegoLink computes again
CONTROLS = ("recompute_0", "recompute_5", "recompute_100", "recompute_random", "shift_without_sink")
TIMED = {"legolink": "legolink_16"}  # the default
LARGE_FAQ = (
    Path(__file__).parents[3] / "shared/data/faq_chatterbot/english"
)  # beside the repository, if at all
PAIRS = (
    ("concat", "shift"),
    ("shift", "recompute"),
    ("shift", "shift_without_sink"),
    ("recompute_random", "recompute"),
    ("recompute", "gradual"),
    ("recompute", "legolink"),
    ("gradual", "legolink"),
    ("shift", "dummy"),
    ("legolink", "dummy_legolink"),
)
Ids = list[int]


class Setup(NamedTuple):
    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    embedder: Embedder
    quick: bool
    seed: int
    folder: Path


def clocked(run: Callable, *given, **options) -> tuple:
    """What a call returns, and the seconds it took."""
    started = time.perf_counter()
    made = run(*given, **options)
    return made, time.perf_counter() - started


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6


# -- finding


def retrieval_figures(s: Setup) -> list[dict]:
    """The lab's FAQ: questions that it answers in other words, and questions that it does not answer."""
    folder, items = s.folder / "lab_faq", corpora.faq()
    parts = (s.target, s.tokenizer, s.embedder)
    store, took = clocked(KnowledgeCache.build, folder, items, *parts, dtype=torch.float16)
    held = [(item["paraphrases"][2], item["question"]) for item in items]
    trained = [(wording, item["question"]) for item in items for wording in item["paraphrases"][:2]]
    built = (
        f"the lab's FAQ ({len(items)} items) with lab-target in float16 and lab-embedder, one value"
    )
    told = f"{len(items)} items of 7 domains, lab-embedder, the nearest stored question is the right one"
    one, all_trained = (
        f"{kind}, {told}" for kind in ("one held-out paraphrase an item", "two trained on an item")
    )
    words = f"{one.replace('lab-embedder', 'TF-IDF over words instead of an embedder')}"
    return [
        figure("retrieval_at_1", nearest_is_right(store, held), "fraction", one),
        figure("retrieval_at_1_trained", nearest_is_right(store, trained), "fraction", all_trained),
        figure("retrieval_at_1_words", nearest_by_words(items, held), "fraction", words),
        *threshold_figures(store, held),
        chinese_figure(s),
        figure("lab_faq_build_seconds", [took], "s", f"reading and writing {built}"),
        figure("lab_faq_mb", [megabytes(folder)], "10^6 bytes", f"size on disk of {built}"),
    ]


def nearest_is_right(
    store: KnowledgeCache, asked: Sequence[tuple[str, str]], **options
) -> list[bool]:
    found = [store.retrieve(question, **{"threshold": -1, **options}) for question, _ in asked]
    return [
        bool(hits) and hits[0].item.question == right
        for hits, (_, right) in zip(found, asked, strict=True)
    ]


def chinese_figure(s: Setup) -> dict:
    """An embedder that has read no Chinese, for comparison."""
    items = corpora.faq("zh")
    store = KnowledgeCache.build(s.folder / "zh", items, make("lab-draft"), s.tokenizer, s.embedder)
    held = [(item["paraphrases"][2], item["question"]) for item in items]
    told = f"one held-out paraphrase each of {len(items)} Chinese items; lab-embedder was trained on English only"
    return figure("retrieval_at_1_zh", nearest_is_right(store, held), "fraction", told)


def nearest_by_words(items: Sequence[dict], asked: Sequence[tuple[str, str]]) -> list[bool]:
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    stored, vectorizer = [item["question"] for item in items], TfidfVectorizer()
    table = vectorizer.fit_transform(stored)
    best = (vectorizer.transform([question for question, _ in asked]) @ table.T).toarray().argmax(1)
    return [stored[i] == right for i, (_, right) in zip(best, asked, strict=True)]


def threshold_figures(store: KnowledgeCache, held: Sequence[tuple[str, str]]) -> list[dict]:
    """Hits and false hits at the threshold that is the default, and at one chosen on other questions."""
    near = {split: [store.retrieve(q, threshold=-1)[0].score for q in corpora.outside(split)]
            for split in ("calibrate", "test")}  # fmt: skip
    false = [bool(store.retrieve(question)) for question in corpora.outside("test")]
    grid = [i / 100 for i in range(101)]
    chosen = next(t for t in grid if np.mean([score >= t for score in near["calibrate"]]) <= 0.05)
    hit = "held-out paraphrases, one an item, whose right item is found above the threshold"
    miss = "test questions that the FAQ does not answer, half of them close to one, which are given an item"
    least = "the least cosine on a grid of 0.01 that lets through at most 5 % of the calibration questions"
    at, count = f"threshold {chosen:.2f}, chosen on calibration questions", len(near["calibrate"])
    return [
        figure(
            "hits",
            nearest_is_right(store, held, threshold=0.5),
            "fraction",
            f"{hit} 0.5, the default",
        ),
        figure("false_hits", false, "fraction", f"{miss}, threshold 0.5, the default"),
        figure("threshold_chosen", [chosen], "cosine", f"{least} which no item answers")
        | {"n": count},
        figure(
            "hits_at_chosen",
            nearest_is_right(store, held, threshold=chosen),
            "fraction",
            f"{hit}; {at}",
        ),
        figure(
            "false_hits_at_chosen",
            [score >= chosen for score in near["test"]],
            "fraction",
            f"{miss}; {at}",
        ),
    ]


class Fixed:
    """An embedder that costs nothing."""

    def encode(self, sentences: list[str], **options) -> torch.Tensor:
        return unit_vectors(len(sentences), 0)


def unit_vectors(count: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(count, 384, generator=torch.Generator().manual_seed(seed)), dim=-1)


def search_figures(s: Setup) -> list[dict]:
    """Retrieval among very many items."""
    count, calls = 100_000, 5 if s.quick else 50
    record = {"question": "Who?", "answer": "Ben"}
    store = KnowledgeCache.build(
        s.folder / "search", [record], make("lab-draft"), s.tokenizer, Fixed()
    )
    item = store.items[0]
    store.items = [replace(item, id=str(i), domain=f"domain {i % 7}") for i in range(count)]
    store.domains = {f"domain {d}": torch.arange(d, count, 7) for d in range(7)}
    store.embeddings = unit_vectors(count, s.seed + 1)
    told = (
        f"{count:,} items of 7 domains, 384 numbers each, k 1, the embedder's own time not counted"
    )
    told += f", {torch.get_num_threads()} threads, one value a call"
    figures = []
    for suffix, domain, which in (
        ("", None, "all items"),
        ("_domain", "domain 3", "the items of one domain"),
    ):
        find = partial(store.retrieve, "What?", threshold=-1, domain=domain)
        find()  # warms up
        values = [1000 * clocked(find)[1] for _ in range(calls)]
        figures.append(figure(f"retrieval_ms_100k{suffix}", values, "ms", f"among {which}; {told}"))
    return figures


# -- putting pieces together


class Case(NamedTuple):
    """A passage in pieces, the question behind it, and the answer with its end token; all were tokenized at once."""

    pieces: list[Ids]
    question: Ids
    answer: Ids


class Outcome(NamedTuple):
    """Of one passage: mean divergence through question and answer, at the answer alone; if it is right; the error."""

    divergence: float
    at_answer: float
    right: bool
    error: float


class Pieces(NamedTuple):
    """Pieces that were read alone, and the later ones behind a dummy prefix."""

    alone: list[Prefix]
    behind: list[Prefix]


Arm = Callable[[PreTrainedModel, Pieces], Prefix]


def cases(s: Setup, n: int, facts: tuple[int, int], pieces: int) -> list[Case]:
    """Passages cut behind full stops into pieces of about as many sentences."""
    made = []
    for document in questions("free", n, facts, s.seed):
        sentences = re.findall(r"[^.]+\.", document[0]["content"])
        texts = ["".join(part) for part in np.array_split(sentences, pieces)]
        made.append(case_of(s, document, texts))
    return made


def case_of(s: Setup, document: Sequence[dict[str, str]], texts: Sequence[str]) -> Case:
    """A passage's tokens, cut where its texts end."""
    prompt = encode(s.tokenizer, document[:-1])
    answer, cut = encode(s.tokenizer, document)[len(prompt) :], [0]
    for text in texts:
        ends = range(cut[-1] + 1, len(prompt))
        cut.append(next(i for i in ends if s.tokenizer.decode(prompt[cut[-1] : i]).endswith(text)))
    return Case([prompt[a:b] for a, b in pairwise(cut)], prompt[cut[-1] :], answer)


@torch.no_grad()
def after(model: PreTrainedModel, prefix: Prefix | None, ids: Ids, count: int) -> torch.Tensor:
    """Log-probabilities of what follows each of the last `count` ids, (count, vocab)."""
    past, start = (prefix.cache, prefix.next_position) if prefix else (None, 0)
    places = torch.arange(start, start + len(ids))[None]
    logits = model(input_ids=torch.tensor([ids]), position_ids=places, past_key_values=past).logits
    return logits[0, -count:].double().log_softmax(-1)


def arm_of(name: str, behind: bool = False, **options) -> Arm:
    return lambda model, pieces: splice(model, pieces[behind], name, **options)


def same_work(model: PreTrainedModel, prefixes: Sequence[Prefix]) -> int:
    """The first tokens of each later piece that LegoLink computes for the work of "recompute"."""
    lengths, layers = [len(p.input_ids) for p in prefixes], model.config.num_hidden_layers
    work = sum(tokens_computed("recompute", lengths, layers))
    return min(
        range(max(lengths) + 1),
        key=lambda k: abs(sum(tokens_computed("legolink", lengths, layers, first_tokens=k)) - work),
    )


def legolink(model: PreTrainedModel, pieces: Pieces, behind: bool = False) -> Prefix:
    """LegoLink at the work of "recompute"."""
    first_tokens = same_work(model, pieces.alone)
    return splice(model, pieces[behind], "legolink", first_tokens=first_tokens)


def recompute_at_random(model: PreTrainedModel, pieces: Pieces) -> Prefix:
    """Recompute the same number of tokens, chosen at random instead of by their differences."""
    generator = torch.Generator().manual_seed(sum(pieces.alone[0].input_ids))

    def by_chance(values: torch.Tensor, k: int) -> SimpleNamespace:
        return SimpleNamespace(indices=torch.randperm(len(values), generator=generator)[:k])

    with mock.patch.object(torch.Tensor, "topk", by_chance):
        return splice(model, pieces.alone, "recompute")


def shift_without_sink(model: PreTrainedModel, pieces: Pieces) -> Prefix:
    """Move prefixes to their positions, without the first entry of each later one."""
    cache, input_ids = pieces.alone[0].cache, list(pieces.alone[0].input_ids)
    for prefix in pieces.alone[1:]:
        moved = shift(prefix.cache, len(input_ids), rotary_of(model))
        cache = join(cache, select(moved, torch.arange(1, len(prefix.input_ids))))
        input_ids += prefix.input_ids
    return Prefix(cache, len(input_ids), input_ids)


def compare(
    model: PreTrainedModel, asked: Sequence[Case], arms: dict[str, Arm], dummy: Ids, label: str
) -> dict[str, list]:
    """What each arm gives on each passage, against reading the whole prompt in one call."""
    done = {name: [] for name in arms}
    for pieces, question, answer in tqdm(asked, desc=label, delay=2, leave=False):
        rest, count = [*question, *answer[:-1]], len(question) + len(answer) - 1
        true = after(model, None, [*chain(*pieces), *rest], count)
        alone = [prefill(model, torch.tensor([ids])) for ids in pieces]
        behind = [alone[0], *(prefill_behind(model, ids, dummy) for ids in pieces[1:])]
        for name, arm in arms.items():
            mine = after(model, arm(model, Pieces(alone, behind)), rest, count)
            divergence, last = (true.exp() * (true - mine)).sum(-1), slice(-len(answer), None)
            right, error = (
                mine[last].argmax(-1).tolist() == answer,
                (true.exp() - mine.exp()).abs().max().item(),
            )
            done[name].append(
                Outcome(divergence.mean().item(), divergence[last].mean().item(), right, error)
            )
    return done


def splice_figures(s: Setup) -> list[dict]:
    """Every way to put four pieces together, against reading them in one go."""
    arms = {name: arm_of(name) for name in ("full", "prefix", "concat", "shift", "gradual")}
    arms |= {f"recompute_{share}": arm_of("recompute", fraction=share / 100) for share in SHARES}
    arms |= {f"legolink_{k}": arm_of("legolink", first_tokens=k) for k in LINKS}
    arms |= {"legolink": legolink, "dummy_legolink": partial(legolink, behind=True)}
    arms |= {"dummy": arm_of("shift", behind=True)}
    arms |= {"recompute_random": recompute_at_random, "shift_without_sink": shift_without_sink}
    dummy, n = s.tokenizer("<|system|>.").input_ids, 4 if s.quick else 200
    told = "lab-target in float32, held-out passages of 16 facts in 4 pieces that were read alone, one question each"
    stated = cases(s, n, (16, 16), 4)
    figures = arm_comparison(s, stated, arms, dummy, told)
    split = [case_of(s, *made) for made in split_questions(n, 16, 4, s.seed)]
    told += ", about a sentence whose subject ends the piece before"
    some = {name: arm for name, arm in arms.items() if name not in CONTROLS}
    figures += arm_comparison(s, split, some, dummy, told, "_reference")
    return figures + work_figures(s, stated)


def arm_comparison(
    s: Setup, asked: list[Case], arms: dict[str, Arm], dummy: Ids, told: str, suffix: str = ""
) -> list[dict]:
    """Divergence and right answers of each arm, and pairs of arms."""
    done = compare(s.target, asked, arms, dummy, f"splicing{suffix}")
    done["recompute"] = done["recompute_15"]
    apart = (
        f"KL(reading all at once || arm) of the next token, mean over question and answer; {told}"
    )
    there = apart.replace("question and answer", "the answer's tokens")
    exact = f"all tokens of the answer are the likeliest; {told}"
    figures = []
    for name, outcomes in done.items():
        measured = {
            f"kl_{name}{suffix}": ([o.divergence for o in outcomes], "nats", apart),
            f"kl_{name}_answer{suffix}": ([o.at_answer for o in outcomes], "nats", there),
            f"em_{name}{suffix}": ([o.right for o in outcomes], "fraction", exact),
        }
        for figure_name, (values, unit, conditions) in measured.items():
            figures.append(figure(figure_name, values, unit, f"{conditions}; {meaning(name)}"))
    for name, other in PAIRS:
        if not {name, other} <= done.keys():
            continue
        pairs = np.array(
            [(a.divergence, b.divergence) for a, b in zip(done[name], done[other], strict=True)]
        )
        conditions, end = (
            f"{apart}; {meaning(name)}, against {meaning(other)}, paired",
            other.removeprefix("shift_") + suffix,
        )
        figures.append(
            figure(f"kl_{name}_minus_{end}", pairs @ [1, -1], "nats", f"{conditions}, difference")
        )
        figures.append(
            ratio_figure(f"kl_{name}_over_{end}", pairs, f"{conditions}, geometric mean of ratios")
        )
    errors, largest = (
        [o.error for o in done["prefix"]],
        "the largest of all differences between probabilities",
    )
    name = f"prefix_error{suffix}"
    return [
        *figures,
        figure(name, [max(errors)], "fraction", f"{largest}; {told}") | {"n": len(errors)},
    ]


def work_figures(s: Setup, asked: Sequence[Case]) -> list[dict]:
    """What the arms that recompute compute of the later pieces, all layers counted."""
    layers, work = s.target.config.num_hidden_layers, {}
    for pieces, _, _ in asked:
        lengths, prefixes = [*map(len, pieces)], [Prefix(None, len(ids), ids) for ids in pieces]
        arms = {"recompute": {}, "gradual": {}}
        arms |= {f"legolink_{k}": {"first_tokens": k} for k in LINKS}
        arms["legolink"] = {"first_tokens": same_work(s.target, prefixes)}
        for name, options in arms.items():
            counts = tokens_computed(name.split("_")[0], lengths, layers, **options)
            work.setdefault(name, []).append(sum(counts) / layers / sum(lengths[1:]))
    told = "tokens of the later three of four pieces that are computed again, mean over the layers"
    return [
        figure(f"work_{name}", values, "fraction", f"{told}; {meaning(name)}")
        for name, values in work.items()
    ]


def ratio_figure(name: str, pairs: np.ndarray, conditions: str) -> dict:
    """The geometric mean of ratios: how it is for most passages, where a few decide about a mean."""
    return exponential(figure(name, np.log(pairs) @ [1, -1], "ratio", conditions))


def meaning(arm: str) -> str:
    """What is done in an arm, for those who read only the figure."""
    name, _, number = ("recompute_15" if arm == "recompute" else arm).rpartition("_")
    if number.isdecimal():
        if name == "legolink":
            return f"pieces moved, the first {number} tokens of each later one computed again"
        return f"pieces moved, {number} % of the later tokens computed again where they differ most"
    link = "the first tokens of each later one computed again, as many as are the work of recompute"
    return {
        "full": "all pieces read again",
        "prefix": "the first piece kept, the others read again",
        "concat": "pieces joined with keys at wrong positions",
        "shift": "pieces moved to their places",
        "gradual": "pieces moved, 15 % of the later tokens computed again, fewer from layer to layer",
        "legolink": f"pieces moved, {link}",
        "dummy": "pieces read behind a dummy prefix that was cut off, and moved to their places",
        "dummy_legolink": f"pieces read behind a dummy prefix that was cut off, and moved, {link}",
        "recompute_random": "pieces moved, 15 % of the later tokens computed again, chosen at random",
        "shift_without_sink": "pieces moved, the first entry of each later one dropped",
    }[arm]


def length_figures(s: Setup) -> list[dict]:
    """Long passages in few and in many pieces."""
    arms, figures = {name: arm_of(name) for name in ("shift", "recompute", "gradual")}, []
    arms["legolink"] = legolink
    for count in (2, 8):
        asked = cases(s, 2 if s.quick else 30, (24, 40), count)
        done = compare(s.target, asked, arms, [], f"splicing {count} pieces")
        told = f"lab-target in float32, held-out passages of 24-40 facts in {count} pieces that were read alone"
        apart = f"KL(reading all at once || arm) of the next token, mean over question and answer; {told}"
        for name, outcomes in done.items():
            values = [o.divergence for o in outcomes]
            figures.append(
                figure(f"kl_{name}_pieces_{count}", values, "nats", f"{apart}; {meaning(name)}")
            )
    return figures


# -- what it saves and what it takes


def long_records(s: Setup, count: int) -> list[dict[str, str]]:
    """Records of about 512 tokens each."""
    made = []
    for i in range(count):
        text = worlds.make_passage(random.Random(f"{s.seed}:{i}"), 90).text
        answer = s.tokenizer.decode(s.tokenizer(text)["input_ids"][: TOKENS - 16])
        made.append({"question": f"What is in text {i}?", "answer": answer})
    return made


def big_model(s: Setup) -> PreTrainedModel:
    if s.quick:
        return make("lab-draft")
    torch.manual_seed(0)
    return (
        AutoModelForCausalLM.from_config(config_of(BIG), dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )


def cost_figures(s: Setup) -> list[dict]:
    """Time to the first token with and without a store, and the memory that reading it takes."""
    model, folder, count = big_model(s), s.folder / "costs", 6 if s.quick else 18
    store = KnowledgeCache.build(folder, long_records(s, count), model, s.tokenizer, batch_size=1)
    shape = "a shape of two layers" if s.quick else f"the shape of {BIG}"
    size = f"items of about {TOKENS} tokens, {shape} with random weights in float32"
    # Memory first, while nothing is there that could be used again.
    return (
        memory_figures(store, size)
        + speed_figures(s, store, store.items[:6], size)
        + arm_figures(s, store, size)
    )


def memory_figures(store: KnowledgeCache, size: str) -> list[dict]:
    process, total, growth = psutil.Process(), megabytes(store.folder), []
    gc.collect()
    before = process.memory_info().rss
    for item in store.items:
        cache = store.read(item).cache
        one = nbytes(cache) / 1e6
        sum(
            float(layer.keys.sum() + layer.values.sum()) for layer in cache.layers
        )  # touches every page
        growth.append((process.memory_info().rss - before) / 1e6)
        del cache
    told = f"{len(store)} {size}, read one after another and dropped"
    most = (
        f"the largest growth of the process's resident memory; {told}; the store has {total:.0f} MB"
    )
    return [
        figure("resident_mb", [max(growth)], "10^6 bytes", most) | {"n": len(growth)},
        figure("store_mb", [total], "10^6 bytes", f"size on disk of {told}"),
        figure("one_item_mb", [one], "10^6 bytes", f"keys and values of one of {told}"),
    ]


def speed_figures(s: Setup, store: KnowledgeCache, items: Sequence[Item], size: str) -> list[dict]:
    repeats = 1 if s.quick else 3
    text = "What do the people and the things in this text have in common, and who owns them?"
    asked = encode(s.tokenizer, [{"role": "user", "content": text}])[:12]
    turn(store, items[0], asked)
    taken = []  # seconds of each arm, for each item
    for item in tqdm(items, desc="time to first token", delay=2, leave=False):
        turns = [turn(store, item, asked) for _ in range(repeats)]
        taken.append({name: float(np.median([t[name] for t in turns])) for name in turns[0]})
    times = "one run" if s.quick else f"median of {repeats} runs in turn"
    told = f"{size}, files in the system's page cache, {torch.get_num_threads()} threads, {times} an item"
    what = f"time to the first token, all prefilled over item read from disk and question prefilled; {told}"
    alone = f"prefill of an item over reading it from disk, checksum included; {told}"
    whole, stored = (
        "prefill of item and question of 12 tokens",
        "reading an item from disk and prefill of 12 tokens",
    )
    table = pd.DataFrame(taken)
    return [
        figure("ttft_ratio", table.whole / table.stored, "ratio", f"question of 12 tokens; {what}"),
        figure(
            "ttft_ratio_one_token",
            table.whole_one / table.stored_one,
            "ratio",
            f"question of 1 token; {what}",
        ),
        figure("load_ratio", table.alone / table.load, "ratio", alone),
        figure("prefill_seconds", table.whole, "s", f"{whole}; {told}"),
        figure("question_seconds", table.stored, "s", f"{stored}; {told}"),
        figure(
            "load_seconds", table.load, "s", f"reading an item from disk, checksum included; {told}"
        ),
    ]


@torch.no_grad()
def turn(store: KnowledgeCache, item: Item, asked: Ids) -> dict[str, float]:
    """Seconds of one run of each arm; both ways to a first token must give the same."""
    model, taken = store.model, {}
    for suffix, question in (("", asked), ("_one", asked[:1])):
        ids = torch.tensor([[*item.input_ids, *question]])
        whole, taken["whole" + suffix] = clocked(prefill, model, ids)
        stored, taken["stored" + suffix] = clocked(after_stored, store, item, question)
        if not torch.allclose(whole.logits, stored.logits, atol=1e-3):
            raise RuntimeError(
                "The first token after a stored item differs from that after reading it anew."
            )
    _, taken["alone"] = clocked(prefill, model, torch.tensor([item.input_ids]))
    _, taken["load"] = clocked(store.read, item)
    return taken


def arm_figures(s: Setup, store: KnowledgeCache, size: str) -> list[dict]:
    """Three items behind one another: how much sooner than reading them all the first token comes, and why."""
    arms, rows = ("full", "prefix", "shift", "recompute", "gradual", "legolink"), []
    question = torch.tensor([store.items[0].input_ids[:12]])
    for run in range(1 if s.quick else 4):
        items = [store.items[(3 * run + i) % len(store)] for i in range(3)]
        for arm in arms:
            used, parts = CACHES_USED.get(arm, 3), {"arm": arm}
            read, parts["load"] = clocked(lambda some=items[:used]: [*map(store.read, some)])
            bare = [Prefix(None, len(x.input_ids), x.input_ids) for x in items[used:]]
            prefix, parts["splice"] = clocked(splice, store.model, [*read, *bare], arm)
            _, parts["question"] = clocked(prefill, store.model, question, prefix)
            rows.append(parts)
    table = pd.DataFrame(rows).set_index("arm")
    whole = table.sum(axis=1)
    told = f"three {size}, and a question of 12 tokens; one value a run"
    parts = {
        "load": "reading items from disk",
        "splice": "joining the items, and computing what the arm computes",
        "question": "prefill of the question",
    }
    figures = []
    for arm in arms:
        taken = table.loc[[arm]]
        for part, what in parts.items():
            conditions = f"{what}; {meaning(TIMED.get(arm, arm))}; {told}"
            figures.append(figure(f"{part}_seconds_{arm}", taken[part], "s", conditions))
        if arm != "full":
            ratios = whole.loc[["full"]].to_numpy() / whole.loc[[arm]].to_numpy()
            what = f"time to the first token after {told}: all read again, over"
            conditions = f"{what}: {meaning(TIMED.get(arm, arm))}"
            figures.append(figure(f"ttft_ratio_{arm}", ratios, "ratio", conditions))
    return figures


def after_stored(store: KnowledgeCache, item: Item, question: Ids) -> Prefix:
    prefix = store.splice([item], "prefix")
    return prefill(store.model, torch.tensor([question]), prefix)


# -- what a kill leaves


@contextmanager
def small_shards():
    with (
        mock.patch("kvlab.knowledge.SHARD_ITEMS", 2),
        redirect_stderr(io.StringIO()),
    ):  # a bar each time
        yield


def numbered(start: int, stop: int) -> list[dict[str, str]]:
    return [
        {"question": f"What is number {i}?", "answer": f"It is {i}."} for i in range(start, stop)
    ]


def open_store(folder: Path) -> KnowledgeCache:
    return KnowledgeCache.load(folder, make("lab-draft"), lab.load_tokenizer("lab-draft"))


def mark(folder: Path, name: str) -> Path:
    return folder.with_suffix(f".{name}")


def add_in_a_process(folder: Path, records: list[dict[str, str]]) -> None:
    """Add records, and say by two files when that began and when it was done."""
    torch.set_num_threads(1)
    tqdm.set_lock(
        threading.RLock()
    )  # the usual one is the system's, and a kill would leave it behind
    with small_shards():
        store = open_store(folder)
        mark(folder, "begun").touch()
        store.add(records)
        mark(folder, "done").touch()


def add_and_kill(folder: Path, records: list[dict[str, str]], wait: float) -> None:
    """Let a process of its own add records, and kill it so many seconds after it began."""
    server = multiprocessing.get_context(
        "forkserver"
    )  # else each process would import everything anew
    server.set_forkserver_preload(["kvlab.knowledge", "kvlab.lab"])
    process = server.Process(target=add_in_a_process, args=(folder, records))
    process.start()
    while not mark(folder, "begun").exists():
        if not process.is_alive():
            raise RuntimeError(
                f"The process that adds records ended with code {process.exitcode} before it began."
            )
        time.sleep(0.001)
    process.join(wait)
    process.kill()
    process.join()


def is_sound(folder: Path, whole: KnowledgeCache, old: int) -> tuple[bool, bool]:
    """Whether a store has its old items and whole shards of new ones, reads, and can be completed; and is half full."""
    try:
        with small_shards():
            store = open_store(folder)
            count, new = len(store), len(store) - old
            sound = new % 2 == 0 and same_items(store.items, whole.items[:count])
            prefixes = [store.read(item) for item in store.items]
            store.add(numbered(old, len(whole)))
        sound &= same_items(store.items, whole.items) and len(prefixes) == count
        sound &= all(
            same_entries(store.read(a), whole.read(b))
            for a, b in zip(store.items, whole.items, strict=True)
        )
    except CacheError:
        return False, False
    return sound, 0 < new < len(whole) - old


def same_items(some: Sequence[Item], others: Sequence[Item]) -> bool:
    content = [
        [(i.id, i.question, i.answer, i.input_ids, i.answer_start) for i in items]
        for items in (some, others)
    ]
    return content[0] == content[1]


def same_entries(one: Prefix, other: Prefix) -> bool:
    layers = zip(one.cache.layers, other.cache.layers, strict=True)
    pairs = [pair for a, b in layers for pair in ((a.keys, b.keys), (a.values, b.values))]
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def kill_figures(s: Setup) -> list[dict]:
    """Kills at any moment while records are added."""
    kills, old, total = (3, 4, 24) if s.quick else (50, 4, 84)
    base, records = s.folder / "base", numbered(old, total)
    KnowledgeCache.build(base, numbered(0, old), make("lab-draft"), s.tokenizer)
    shutil.copytree(base, s.folder / "whole")
    add_and_kill(s.folder / "whole", records, wait=60)  # not killed: it is done long before
    begun, done = (mark(s.folder / "whole", name).stat().st_mtime for name in ("begun", "done"))
    whole, found = open_store(s.folder / "whole"), []
    moments = np.random.default_rng(s.seed).uniform(0, done - begun, kills)
    for number, moment in enumerate(tqdm(moments, desc="kills", delay=2, leave=False)):
        folder = s.folder / f"killed_{number}"
        shutil.copytree(base, folder)
        add_and_kill(folder, records, moment)
        found.append(is_sound(folder, whole, old))
    told = f"a process that adds {total - old} records in shards of 2 to a store of {old}"
    killed = f"{told} is killed at a random moment of the {done - begun:.2f} s that adding takes"
    right = "old items and whole new shards are there, all items read, and adding again completes the store"
    return [
        figure("kills_survived", [sound for sound, _ in found], "fraction", f"{killed}; {right}"),
        figure(
            "kills_mid",
            [mid for _, mid in found],
            "fraction",
            f"{killed}; it had added some records, not all",
        ),
    ]


# -- a larger FAQ, if it is there


def large_faq_figures(s: Setup) -> list[dict]:
    """A public FAQ of many kinds of small talk, built, loaded and asked."""
    if not LARGE_FAQ.is_dir():
        return []
    records, folder = read_faq(LARGE_FAQ), s.folder / "large_faq"
    records = records[:40] if s.quick else records
    parts, options = (s.target, s.tokenizer, s.embedder), {"dtype": torch.float16}
    store, built = clocked(KnowledgeCache.build, folder, records, *parts, **options)
    loaded = [clocked(KnowledgeCache.load, folder, *parts)[1] for _ in range(1 if s.quick else 5)]
    asked = [
        item.question for item in random.Random(s.seed).sample(store.items, 5 if s.quick else 100)
    ]
    took = [1000 * clocked(store.retrieve, question, threshold=-1)[1] for question in asked]
    told = f"the English ChatterBot corpus ({len(store):,} distinct pairs), lab-target in float16, lab-embedder"
    told += f", {torch.get_num_threads()} threads"
    return [
        figure("faq_build_seconds", [built], "s", f"reading and writing all; {told}"),
        figure("faq_load_seconds", loaded, "s", f"opening the store, one value a time; {told}"),
        figure("faq_mb", [megabytes(folder)], "10^6 bytes", f"size on disk; {told}"),
        figure(
            "faq_ask_ms",
            took,
            "ms",
            f"finding the nearest item, embedding included, one value a question; {told}",
        ),
    ]


PARTS = {
    "finding": (retrieval_figures, search_figures),
    "splicing": (splice_figures, length_figures),
    "costs": (cost_figures,),
    "kills": (kill_figures,),
    "faq": (large_faq_figures,),
}


def measure(quick: bool, seed: int, parts: Sequence[str]) -> list[dict]:
    """Measure the knowledge cache: finding, splicing, time to first token, memory, kills."""
    torch.set_num_threads(1 if quick else THREADS)
    groups = [*chain(*(PARTS[part] for part in parts))]
    with tempfile.TemporaryDirectory() as folder:
        embedder, names = lab.load_embedder(), ("lab-target",)
        s = Setup(lab.load(*names), lab.load_tokenizer(*names), embedder, quick, seed, Path(folder))
        return [f for group in tqdm(groups, desc="knowledge") for f in group(s)]


if __name__ == "__main__":
    benchmark(measure, parts=tuple(PARTS))
