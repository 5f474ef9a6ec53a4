"""`kvlab build-cache` and `kvlab ask`: store what a model has read, and answer from it."""

import re
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import pandas as pd
import torch
from accelerate import PartialState

from kvlab import lab
from kvlab.cache import Prefix, truncate
from kvlab.commands.shared import open_store, require_store, scale_with_target
from kvlab.files import require_writable
from kvlab.generation import answer_text, encode
from kvlab.knowledge import ARMS, CACHES_USED, Item, KnowledgeCache, tokens_computed
from kvlab.records import read_faq
from kvlab.speculate import decode, generate


def build_cache(
    store: Path = Path("knowledge"),
    records: Path | None = None,
    per_domain: bool = False,
    generate_answers: bool = False,
    max_new_tokens: int = 128,
    keep: list[str] | None = None,
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None,
    base_model: str | None = None,
    language: str = "en",
    batch_size: int = 8,
    stop: list[str] | None = None,
    enable_thinking: bool = False,
) -> None:
    """Prefill question/answer records into a store; items that it has already are skipped.

    Args:
        store: Folder of the store; new, or one to add to.
        records: JSON lines with "question", "answer" and, optionally, "domain" and "id", a YAML
            file of the chatterbot corpus, or a folder of such files. Default: the lab's FAQ.
        per_domain: Also copy the items of each domain to a store of their own, in the folder
            STORE-DOMAIN.
        generate_answers: Let the model answer; answers in the records are not used.
        max_new_tokens: Of a generated answer.
        keep: kv (keys and values), hidden (last hidden states), or both, e.g. --keep kv hidden.
            Default: kv.
        dtype: Of the stored tensors. Default: that of the model.
        base_model: The model: a lab model, a hub name or a folder. Default: the scale's target.
        language: Of the lab's FAQ, en or zh.
        batch_size: Of prefill and of generation.
        stop: Strings that end a generated answer, such as --stop "Question:"; they are cut off.
        enable_thinking: Let the model think before it answers, if its template has this option.
    """
    items = read_faq(records) if records else lab.faq(language)
    scale = scale_with_target(base_model, enable_thinking=enable_thinking)
    require_writable(store / "manifest.json")
    # Before loading: it gives each process its own GPU.
    is_main = PartialState(cpu=scale.device == "cpu").is_main_process
    models = scale.load("target"), scale.load_tokenizer("target"), scale.load_embedder()
    settings = {"keep": keep or ("kv",), "dtype": getattr(torch, dtype) if dtype else None}
    cache = KnowledgeCache.build(store, [], *models, **settings)
    size = cache.estimate(items, generate_answers, max_new_tokens) / 1e6
    if is_main:
        bound = "at most " if generate_answers else ""
        print(f"{store} has {len(cache)} items. Of {len(items)} records, those that are new to it "
              f"will take {bound}{size:.1f} MB.")  # fmt: skip
    new = cache.add(items, generate_answers, max_new_tokens, batch_size, stop=stop or ())
    if is_main:
        print(f"{new} items are new, {len(items) - new} were there.\n")
        print(cache.summary().round(2).to_string())
    if is_main and per_domain:
        print()
        folder = cache.folder.resolve()
        for domain in cache.domains:
            # Any text becomes a folder name of its own.
            name = re.sub(r"[^\w -]", lambda match: f"%{ord(match[0]):02X}", domain)
            copy = cache.export(folder.with_name(f"{folder.name}-{name}"), domain)
            print(f"{copy.folder.name}: {len(copy)} items")


def ask(
    questions: list[str],
    store: Path = Path("knowledge"),
    k: int = 1,
    threshold: float = 0.5,
    domain: str | None = None,
    arm: Literal[ARMS] = "recompute",
    exact: bool = False,
    max_new_tokens: int = 96,
    base_model: str | None = None,
    stop: list[str] | None = None,
    enable_thinking: bool = False,
) -> None:
    """Ask a model with and without a store: answers, time, tokens read and bytes loaded.

    Four ways: the question alone; after the retrieved items as text; after the same items from the
    store; and the best item's own question, whose cache is in the store, so that one token is read.
    Time to first token includes loading and splicing, not retrieval. It is the median of 3 runs
    after one to warm up, so the file is in the system's memory.

    Args:
        questions: One or more, before all options.
        store: Folder that `kvlab build-cache` made.
        k: Number of items before the question.
        threshold: Minimum cosine similarity of a retrieved item.
        domain: Search the items of this domain only.
        arm: How items from the store are joined: full, prefix, concat, shift, recompute, gradual
            or legolink (see chapter 01).
        exact: Find the same question only, ignoring case, punctuation and space.
        max_new_tokens: Of each answer.
        base_model: The model of the store. Default: the scale's target.
        stop: Strings that end an answer, such as --stop "Question:"; they are cut off.
        enable_thinking: Let the model think before it answers, if its template has this option.
    """
    require_store(store)
    scale = scale_with_target(base_model, enable_thinking=enable_thinking)
    cache = open_store(store, scale.load("target"), scale, "kv", embed=not exact)
    ends = {"max_new_tokens": max_new_tokens, "tokenizer": cache.tokenizer, "stop": stop or ()}
    miss = "no item has this question" if exact else f"nothing scores {threshold}"
    for question in questions:
        hits = cache.retrieve(question, k, threshold, domain, exact)
        print(question)
        for item, score in hits:
            about = f"domain {item.domain or 'none'}, score {score:.2f}"
            answer = " ".join(item.answer.split())
            print(f"    found: {item.question} ({about}), stored answer: {answer}")
        if not hits:
            print(f"    not in the store: {miss}")
        table = _compare_ways(cache, question, [hit.item for hit in hits], arm, ends)
        print(table.drop(columns="answer").to_string(float_format="{:.2f}".format))
        for way, answer in table["answer"].items():
            print(f"{way}: {answer}")
        print()


def _compare_ways(store: KnowledgeCache, question: str, items, arm: str, ends: dict):
    """A table with a row per way to answer; without items only the first."""
    alone = encode(store.tokenizer, [{"role": "user", "content": question}])
    # Of each way: what makes its prefix, the ids that follow, tokens prefilled, tokens loaded.
    ways = {"question alone": (lambda: None, alone, 0, 0)}
    if items:
        later = store.prompt(question)
        sizes = [len(item.input_ids) for item in items]
        used = CACHES_USED.get(arm, len(items))
        prefilled = tokens_computed(arm, sizes, layers=1)[0]
        ways["knowledge as text"] = (partial(store.splice, items, "full"), later, sum(sizes), 0)
        splice = partial(store.splice, items, arm)
        ways["knowledge from the store"] = (splice, later, prefilled, sum(sizes[:used]))
        last = items[0].input_ids[items[0].answer_start - 1]
        stored_question = partial(_stored_question, store, items[0])
        ways["the stored question itself"] = (stored_question, [last], 0, sizes[0])
    rows = {}
    for way, (begin, ids, prefilled, loaded) in ways.items():
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            next(decode(store.model, [ids], prefix=begin(), max_new_tokens=1))
            seconds.append(time.perf_counter() - start)
        output = generate(store.model, [ids], prefix=begin(), **ends)
        answer = answer_text(store.tokenizer, output.tokens[0], ends["stop"])
        rows[way] = {
            "first token (ms)": 1000 * median(seconds[1:]),
            "tokens read": prefilled + len(ids),
            "loaded (MB)": store.bytes_of(loaded) / 1e6,
            "answer": " ".join(answer.split()),
        }
    return pd.DataFrame(rows.values(), rows)


def _stored_question(store: KnowledgeCache, item: Item) -> Prefix:
    """A stored question without its last token, which is read again to predict the next."""
    stop = item.answer_start - 1
    return Prefix(truncate(store.read(item).cache, stop), stop, item.input_ids[:stop])
