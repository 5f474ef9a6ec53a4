"""`kvlab build-cache` and `kvlab ask`: keep what a model read, and answer from it."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Literal

import pandas as pd
import torch
from accelerate import PartialState

from kvlab import lab
from kvlab.cache import Prefix, truncate
from kvlab.commands.shared import open_store, require_store, scale_with_target
from kvlab.generation import encode
from kvlab.knowledge import ARMS, Item, KnowledgeCache, loaded
from kvlab.records import read_faq
from kvlab.speculate import decode, generate


def build_cache(
    store: Path = Path("knowledge"),
    records: Path | None = None,
    per_domain: bool = False,
    generate_answers: bool = False,
    max_new_tokens: int = 128,
    keep: list[str] | None = None,
    dtype: str | None = None,
    base_model: str | None = None,
    language: str = "en",
    batch_size: int = 8,
) -> None:
    """Let a model read question/answer records and keep what it computed; what is in the store already is skipped.

    Args: store: folder of the store; new, or one to add to. records: JSON lines with "question",
    "answer" and, if wanted, "domain" and "id", a YAML file of the chatterbot corpus, or a folder of
    such files. Default: the lab's FAQ. per_domain: also copy the items of each domain to a store of
    their own, in the folder STORE-DOMAIN. generate_answers: let the model answer; answers in the
    records are not used. max_new_tokens: of a generated answer. keep: kv (keys and values), hidden
    (last hidden states), or both, e.g. --keep kv hidden. Default: kv. dtype: in which it is kept,
    e.g. float16. Default: that of the model. base_model: the model that reads; a lab model, a hub
    name or a folder. Default: the scale's target. language: of the lab's FAQ, en or zh. batch_size:
    of reading and of generating.
    """
    kept = None if dtype is None else getattr(torch, dtype, None)
    if dtype and not isinstance(kept, torch.dtype):
        raise ValueError(f"dtype is {dtype!r}, expected the name of one, such as float16.")
    found = read_faq(records) if records else lab.faq(language)
    scale = scale_with_target(base_model)
    main = PartialState(
        cpu=scale.device == "cpu"
    ).is_main_process  # before loading: gives each process its own GPU
    parts = scale.load("target"), scale.load_tokenizer("target"), scale.load_embedder()
    made = KnowledgeCache.build(store, [], *parts, keep=keep or ("kv",), dtype=kept)
    size = f"{'at most ' * generate_answers}{made.estimate(found, generate_answers, max_new_tokens) / 1e6:.1f} MB"
    if main:
        print(
            f"{store} has {len(made)} items. Of {len(found)} records, those that are new to it will take {size}."
        )
    new = made.add(found, generate_answers, max_new_tokens, batch_size)
    if main:
        print(
            f"{new} items are new, {len(found) - new} were there.",
            made.summary().round(2).to_string(),
            sep="\n\n",
        )
    if main and per_domain:
        print("", *_export_domains(made), sep="\n")


def _export_domains(store: KnowledgeCache) -> list[str]:
    """A store for each domain, beside the whole one, brought up to date."""
    lines = []
    for domain in store.domains:
        name = re.sub(
            r"[^\w -]", lambda odd: f"%{ord(odd[0]):02X}", domain
        )  # any text becomes a name of its own
        home = store.folder.resolve()
        copy = store.export(home.with_name(f"{home.name}-{name}"), domain)
        lines.append(f"{copy.folder.name}: {len(copy)} items")
    return lines


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
) -> None:
    """Ask a model with and without what a store knows, and compare answers, time, tokens read and bytes loaded.

    Four ways: the question alone; after the items found, read anew as text; after the same items
    from the store; and the best item's own question, whose cache is in the store, so that one token
    is read. Time to first token is from the start of loading and splicing (finding apart) to the
    first token, the median of 3 runs after one to warm up; by then the file is in the system's
    memory.

    Args: questions: one or more, before all options. store: folder that `kvlab build-cache` made.
    k: items to put before the question. threshold: least similarity of an item that counts as
    found. domain: look among the items of this domain only. arm: how items from the store are put
    together: full, prefix, concat, shift or recompute (chapter 01). exact: find the same question
    only, but for case, punctuation and space. max_new_tokens: of each answer. base_model: that the
    store was built with. Default: the scale's target.
    """
    require_store(store)
    scale = scale_with_target(base_model)
    model, tokenizer = scale.load("target"), scale.load_tokenizer("target")
    known = open_store(store, model, tokenizer, scale, "kv", embed=not exact)
    for question in questions:
        hits = known.retrieve(question, k, threshold, domain, exact)
        print(f"{question}")
        for hit in hits:
            print(
                f"    found: {hit.item.question} (domain {hit.item.domain or 'none'}, score {hit.score:.2f})"
            )
        if not hits:
            print(
                f"    not in the store: {'no item has this question' if exact else f'nothing scores {threshold}'}"
            )
        table = _ways(known, question, [hit.item for hit in hits], arm, max_new_tokens)
        print(table.drop(columns="answer").to_string(float_format="{:.2f}".format))
        for way, answer in table["answer"].items():
            print(f"{way}: {answer}")
        print()


def _ways(
    store: KnowledgeCache, question: str, items: Sequence[Item], arm: str, max_new_tokens: int
) -> pd.DataFrame:
    """One row a way to answer; without items only the first."""
    alone, asked = (
        encode(store.tokenizer, [{"role": "user", "content": question}]),
        store.prompt(question),
    )
    ways = {"question alone": (lambda: None, alone, 0, 0)}
    if items:
        sizes, best = [len(item.input_ids) for item in items], items[0]
        anew = {"full": 0, "prefix": 1, "recompute": 1}.get(arm, len(items))
        stop = best.answer_start - 1
        ways |= {
            "knowledge as text": (lambda: store.splice(items, "full"), asked, sum(sizes), 0),
            "knowledge from the store": (
                lambda: store.splice(items, arm),
                asked,
                sum(sizes[anew:]),
                sum(sizes[: loaded(arm)]),
            ),
            "the stored question itself": (
                lambda: _asked(store, best),
                best.input_ids[stop : stop + 1],
                0,
                sizes[0],
            ),
        }
    rows = {
        way: {
            "first token (ms)": _first_token_ms(store, begin, ids),
            "tokens read": more + len(ids),
            "loaded (MB)": store.bytes_of(loaded) / 1e6,
            "answer": _answer(store, begin(), ids, max_new_tokens),
        }
        for way, (begin, ids, more, loaded) in ways.items()
    }
    return pd.DataFrame(rows.values(), rows)


def _asked(store: KnowledgeCache, item: Item) -> Prefix:
    """A stored question, but for its last token, which is read again for what follows it."""
    stop = item.answer_start - 1
    return Prefix(truncate(store.read(item).cache, stop), stop, item.input_ids[:stop])


def _first_token_ms(
    store: KnowledgeCache, begin: Callable[[], Prefix | None], ids: Sequence[int]
) -> float:
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        next(decode(store.model, [ids], prefix=begin(), max_new_tokens=1))
        seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds[1:])


def _answer(
    store: KnowledgeCache, prefix: Prefix | None, ids: Sequence[int], max_new_tokens: int
) -> str:
    made = generate(store.model, [ids], prefix=prefix, max_new_tokens=max_new_tokens)
    return " ".join(store.tokenizer.decode(made.tokens[0], skip_special_tokens=True).split())
