"""`kvlab …`: each subcommand is a function, and its options are the function's own signature."""

import hashlib
import json
import random
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from jsonargparse import ArgumentParser, auto_cli
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlab import draft as drafts
from kvlab import lab
from kvlab.cache import Prefix, fingerprint, truncate
from kvlab.draft import Accepted, Example, KnowledgeDraft
from kvlab.evaluate import circumstances, encode, figure
from kvlab.files import write_text
from kvlab.knowledge import ARMS, Item, KnowledgeCache, loaded
from kvlab.lab import corpora
from kvlab.lab.__main__ import report, train
from kvlab.lab.report import problems
from kvlab.losses import require_known
from kvlab.records import faq, read_prompts
from kvlab.scale import Scale
from kvlab.speculate import (
    Generated,
    ModelProposer,
    Runner,
    Sampling,
    Summary,
    best_gamma,
    cost_model,
    costs,
    decode,
    generate,
    summarize,
)


def scale() -> None:
    """Print which models and device notebooks will use here, and the memory each chapter is predicted to need."""
    current = Scale.current()
    chapters = pd.DataFrame({name: current.memory(name) for name in sorted(current.needs)}).T
    print(f"Scale {current.name} on {current.device}, {current.dtype}. Change it with KVLAB_SCALE=tiny, t4 or full.")
    print(chapters.add_suffix(" (GB)").round(3).to_string())


def speculate(
    prompts: list[str] | None = None,
    max_new_tokens: int = 256,
    gamma: int = 4,
    base_model: str | None = None,
    teacher_model: str | None = None,
    fuser_checkpoint: Path | None = None,
    skip_standard: bool = False,
    no_prefill_fusion: bool = False,
    no_decode_fusion: bool = False,
    save_results: bool = False,
    output_dir: Path = Path("results"),
    prompt_file: Path | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    compiled: bool = False,
    store: Path | None = None,
    threshold: float = 0.5,
) -> None:
    """Decode prompts plainly and speculatively, prompt by prompt in one run, and compare.

    Args:
        prompts: a user's messages, e.g. --prompts "One?" "Two?", or, if the tokenizer has no chat template, texts to
            continue. By default three word problems.
        max_new_tokens: of each prompt.
        gamma: tokens drafted a round.
        base_model: the small model, which drafts; a lab model, a hub name or a folder, such as `kvlab train-draft`
            makes. Default: the scale's draft.
        teacher_model: the large model, whose text it is. Default: the scale's target.
        fuser_checkpoint: of a cache fuser; kvlab has none yet, so leave it out.
        skip_standard: leave plain decoding out, and with it every comparison.
        no_prefill_fusion: without a fuser this changes nothing.
        no_decode_fusion: without a fuser this changes nothing.
        save_results: write a JSON file with settings, texts and numbers.
        output_dir: folder of that file.
        prompt_file: more prompts, one a line, or JSON lines with "turns", of which the first is used.
        temperature: 0 takes the likeliest token, else tokens are drawn.
        top_k: draw among so many of the likeliest tokens; 0 keeps all.
        top_p: draw among the likeliest tokens that reach this probability; 1.0 keeps all.
        repetition_penalty: above 1.0 makes tokens seen before less likely.
        seed: of what is drawn.
        compiled: compile both models first; worth it for many prompts.
        store: folder that `kvlab build-cache` made; a draft that reads is given the item found for each prompt. What
            finding and loading it takes is told apart, as finding_seconds. Default: it drafts without knowledge.
        threshold: least similarity of an item that counts as found.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    if fuser_checkpoint:
        raise ValueError(
            f"fuser_checkpoint is {settings['fuser_checkpoint']!r}, but kvlab has no cache fuser yet: leave it out."
        )
    if store:
        _require_store(store)
        if compiled:
            raise ValueError("What a draft knows differs from prompt to prompt: leave --compiled out, or --store.")
    asked = [*(prompts or []), *(read_prompts(prompt_file) if prompt_file else [])]
    asked = asked or [problem[0]["content"] for problem in problems(4, "long", 3, seed=0)]
    scale = Scale.current()
    scale = replace(scale, draft=base_model or scale.draft, target=teacher_model or scale.target)
    tokenizer = _shared_tokenizer(scale)
    rows = [encode(tokenizer, [{"role": "user", "content": text}]) for text in asked]
    room = max(map(len, rows)) + max_new_tokens + gamma + 1 if compiled else None
    draft = Runner(scale.load("draft"), room)
    reads = _reads(draft.model, scale.draft) if store else None
    target = Runner(scale.load("target"), room)
    known = _opened(store, target.model, tokenizer, scale, reads) if store else None
    arms = ["speculative"] if skip_standard else ["plain", "speculative"]

    def run(ids: list[int], arm: str, proposer: ModelProposer, tokens: int = max_new_tokens) -> Generated:
        generator = torch.Generator().manual_seed(seed)
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, generator)
        proposer = None if arm == "plain" else proposer
        return generate(target, [ids], proposer, gamma=gamma, max_new_tokens=tokens, sampling=sampling)

    done, results = [], []
    for text, ids in zip(tqdm(asked, desc="prompts"), rows, strict=True):
        if not done:
            proposer, _ = _proposer(draft, known, threshold, text, ids)
            for arm in arms:
                run(ids, arm, proposer, tokens=4)  # warms up, and compiles
        proposer, found = _proposer(draft, known, threshold, text, ids)
        done.append({arm: run(ids, arm, proposer) for arm in arms})
        results.append({"prompt": text} | found | {arm: _result(made, tokenizer) for arm, made in done[-1].items()})
    summary = compare(
        {arm: summarize([r for pair in done for r in pair[arm].rounds]) for arm in arms}, len(rows), gamma
    )
    if temperature == 0 and not skip_standard:
        summary["equal_texts"] = all(r["plain"]["token_ids"] == r["speculative"]["token_ids"] for r in results)
    if store:
        summary["found"] = sum(r["found"] is not None for r in results)
        summary["finding_seconds"] = float(np.mean([r["finding_seconds"] for r in results]))
    _print(results, summary)
    if save_results:
        settings |= {"base_model": scale.draft, "teacher_model": scale.target}
        result = {"settings": settings, "prompts": results, "summary": summary, **circumstances()}
        print(_write_json(output_dir / f"speculate_{datetime.now():%Y%m%d_%H%M%S}.json", result))


def _reads(draft: torch.nn.Module, name: str) -> str:
    """How a draft reads knowledge."""
    reads = draft.config.knowledge if isinstance(draft, KnowledgeDraft) else None
    if not reads:
        raise ValueError(
            f"{name} does not read knowledge: leave --store out, or give a draft that `kvlab train-draft` made with "
            "--knowledge vector, kv or prefix."
        )
    return reads


def _proposer(
    draft: Runner, store: KnowledgeCache | None, threshold: float, text: str, ids: list[int]
) -> tuple[ModelProposer, dict]:
    """What drafts for a prompt, with what the store has on it, and what was found in how many seconds."""
    if store is None:
        return ModelProposer(draft), {}
    started = time.perf_counter()
    item = _found(store, text, threshold)
    proposer = ModelProposer(*draft.model.knowing(store, [item], [len(ids)]))
    return proposer, {"found": item and item.question, "finding_seconds": time.perf_counter() - started}


def _shared_tokenizer(scale: Scale) -> PreTrainedTokenizerBase:
    target, draft = (scale.load_tokenizer(role) for role in ("target", "draft"))
    if target.get_vocab() != draft.get_vocab():
        sizes = f"{scale.target} has {len(target)} tokens, {scale.draft} {len(draft)}"
        raise ValueError(f"The two models' tokenizers differ ({sizes}): choose a base_model of the same family.")
    return target


def _result(made: Generated, tokenizer: PreTrainedTokenizerBase) -> dict:
    tokens, summary = made.tokens[0].tolist(), summarize(made.rounds)
    text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return {"text": text, "token_ids": tokens, **asdict(summary), "tokens_per_second": summary.tokens_per_second}


def compare(arms: dict[str, Summary], prompts: int, gamma: int) -> dict:
    """Means a prompt of each arm and, with a plain arm, what theory says of the other and what was measured.

    The cost of a verification between one token and gamma + 1 is taken to grow evenly.

    Examples
    --------
    >>> from kvlab.speculate import Round
    >>> plain = summarize([Round([[]], [0], [[5]], 0.0, 2.0, 2.0)])
    >>> speculative = summarize([Round([[5]], [1], [[5, 6]], 1.0, 2.0, 3.0)])
    >>> figures = compare({"plain": plain, "speculative": speculative}, prompts=1, gamma=1)
    >>> figures["c"], figures["v"], round(figures["predicted_speedup"], 3), round(figures["measured_speedup"], 3)
    (0.5, 1.0, 1.333, 1.333)
    """
    figures = {
        arm: {
            "latency": (s.reading_seconds + s.seconds) / prompts,
            "first_token_seconds": s.first_token_seconds,
            "tokens_per_second": s.tokens_per_second,
            "acceptance": s.acceptance,
            "tokens_per_call": s.tokens_per_call,
            "draft_calls": s.draft_calls,
            "target_calls": s.target_calls,
        }
        for arm, s in arms.items()
    }
    fast, plain = arms["speculative"], arms.get("plain")
    if plain and plain.target_calls and fast.draft_calls:
        c, v = costs(fast, plain)
        chain = np.nan_to_num(fast.conditional).tolist()
        figures |= {
            "c": c,
            "v": v,
            "predicted_speedup": cost_model(chain, c, len(chain), v).speedup,
            "measured_speedup": fast.tokens_per_second / plain.tokens_per_second,
            "best_gamma": best_gamma(fast.acceptance, c, lambda g: 1 + (v - 1) * g / gamma),
        }
    return figures


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

    Args:
        store: folder of the store; new, or one to add to.
        records: JSON lines with "question", "answer" and, if wanted, "domain" and "id", a YAML file of the chatterbot
            corpus, or a folder of such files. Default: the lab's FAQ.
        per_domain: also copy the items of each domain to a store of their own, in the folder STORE-DOMAIN.
        generate_answers: let the model answer; answers in the records are not used.
        max_new_tokens: of a generated answer.
        keep: kv (keys and values), hidden (last hidden states), or both, e.g. --keep kv hidden. Default: kv.
        dtype: in which it is kept, e.g. float16. Default: that of the model.
        base_model: the model that reads; a lab model, a hub name or a folder. Default: the scale's target.
        language: of the lab's FAQ, en or zh.
        batch_size: of reading and of generating.
    """
    kept = None if dtype is None else getattr(torch, dtype, None)
    if dtype and not isinstance(kept, torch.dtype):
        raise ValueError(f"dtype is {dtype!r}, expected the name of one, such as float16.")
    found = faq(records) if records else lab.faq(language)
    scale = _scale(base_model)
    main = PartialState(cpu=scale.device == "cpu").is_main_process  # before loading: gives each process its own GPU
    parts = scale.load("target"), scale.load_tokenizer("target"), scale.load_embedder()
    made = KnowledgeCache.build(store, [], *parts, keep=keep or ("kv",), dtype=kept)
    size = f"{'at most ' * generate_answers}{made.estimate(found, generate_answers, max_new_tokens) / 1e6:.1f} MB"
    if main:
        print(f"{store} has {len(made)} items. Of {len(found)} records, those that are new to it will take {size}.")
    new = made.add(found, generate_answers, max_new_tokens, batch_size)
    if main:
        print(f"{new} items are new, {len(found) - new} were there.", made.summary().round(2).to_string(), sep="\n\n")
    if main and per_domain:
        print("", *_export_domains(made), sep="\n")


def _scale(base_model: str | None) -> Scale:
    scale = Scale.current()
    return replace(scale, target=base_model or scale.target)


def _export_domains(store: KnowledgeCache) -> list[str]:
    """A store for each domain, beside the whole one, brought up to date."""
    lines = []
    for domain in store.domains:
        name = re.sub(r"[^\w -]", lambda odd: f"%{ord(odd[0]):02X}", domain)  # any text becomes a name of its own
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

    Four ways: the question alone; after the items found, read anew as text; after the same items from the store; and
    the best item's own question, whose cache is in the store, so that one token is read. Time to first token is from
    the start of loading and splicing (finding apart) to the first token, the median of 3 runs after one to warm up;
    by then the file is in the system's memory.

    Args:
        questions: one or more, before all options.
        store: folder that `kvlab build-cache` made.
        k: items to put before the question.
        threshold: least similarity of an item that counts as found.
        domain: look among the items of this domain only.
        arm: how items from the store are put together: full, prefix, concat, shift or recompute (chapter 01).
        exact: find the same question only, but for case, punctuation and space.
        max_new_tokens: of each answer.
        base_model: that the store was built with. Default: the scale's target.
    """
    _require_store(store)
    scale = _scale(base_model)
    model, tokenizer = scale.load("target"), scale.load_tokenizer("target")
    known = _opened(store, model, tokenizer, scale, "kv", embed=not exact)
    for question in questions:
        hits = known.retrieve(question, k, threshold, domain, exact)
        print(f"{question}")
        for hit in hits:
            print(f"    found: {hit.item.question} (domain {hit.item.domain or 'none'}, score {hit.score:.2f})")
        if not hits:
            print(f"    not in the store: {'no item has this question' if exact else f'nothing scores {threshold}'}")
        table = _ways(known, question, [hit.item for hit in hits], arm, max_new_tokens)
        print(table.drop(columns="answer").to_string(float_format="{:.2f}".format))
        for way, answer in table["answer"].items():
            print(f"{way}: {answer}")
        print()


def _require_store(store: Path, options: str = "") -> None:
    if not (store / "manifest.json").is_file():
        raise ValueError(f"There is no store in {store}: build one with `kvlab build-cache --store {store}{options}`.")


def _opened(
    store: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scale: Scale, reads: str | None, embed=True
) -> KnowledgeCache:
    """A store that keeps what is read: "vector", or "kv" and "prefix"; None reads nothing."""
    known = KnowledgeCache.load(store, model, tokenizer, scale.load_embedder() if embed else None)
    part, name = ("hidden", "hidden states") if reads == "vector" else ("kv", "keys and values")
    if reads and part not in known.keep:
        raise ValueError(f"The store in {store} keeps no {name}: build one with --keep {part}, in a new folder.")
    return known


def _found(store: KnowledgeCache, question: str, threshold: float) -> Item | None:
    hits = store.retrieve(question, threshold=threshold)
    return hits[0].item if hits else None


def _ways(store: KnowledgeCache, question: str, items: Sequence[Item], arm: str, max_new_tokens: int) -> pd.DataFrame:
    """One row a way to answer; without items only the first."""
    alone, asked = encode(store.tokenizer, [{"role": "user", "content": question}]), store.prompt(question)
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
            "the stored question itself": (lambda: _asked(store, best), best.input_ids[stop : stop + 1], 0, sizes[0]),
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


def _first_token_ms(store: KnowledgeCache, begin: Callable[[], Prefix | None], ids: Sequence[int]) -> float:
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        next(decode(store.model, [ids], prefix=begin(), max_new_tokens=1))
        seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds[1:])


def _answer(store: KnowledgeCache, prefix: Prefix | None, ids: Sequence[int], max_new_tokens: int) -> str:
    made = generate(store.model, [ids], prefix=prefix, max_new_tokens=max_new_tokens)
    return " ".join(store.tokenizer.decode(made.tokens[0], skip_special_tokens=True).split())


def train_draft(
    store: Path = Path("knowledge"),
    output_dir: Path = Path("draft"),
    knowledge: Literal["none", "vector", "kv", "prefix"] = "kv",
    layers: list[int] | str = "first:3",
    transitions: bool = False,
    questions: Path | None = None,
    heldout: float = 0.1,
    threshold: float = 0.5,
    other_prompts: Path | None = None,
    made_up: int = 400,
    max_new_tokens: int = 128,
    losses: dict[str, float] | None = None,
    epochs: int = 5,
    batch_size: int = 8,
    learning_rate: float | None = None,
    accumulate: int = 1,
    precision: Literal["no", "fp16", "bf16"] = "no",
    seed: int = 0,
    base_model: str | None = None,
) -> None:
    """Cut a small draft from a model, and train it to guess that model's answers with what a store knows.

    The draft learns from the model's own answers to the store's questions (and to those of a file), from the answers
    that the store's items have, and from made-up records, which can only be read. Then the share of its guesses that
    the model would accept is measured on questions that were held out: the untrained draft, the trained one, and the
    trained one when it is given no knowledge. OUTPUT_DIR holds the draft, all that was found (training.json) and, if
    the draft is a plain model, that model (plain). The same command goes on where a run was stopped, from the
    checkpoint in OUTPUT_DIR/run-NAME, which can be deleted when it is done; with other settings it starts anew.

    Args:
        store: folder that `kvlab build-cache` made; reading vectors needs one built with --keep hidden.
        output_dir: folder of the draft.
        knowledge: how the draft reads: vector (last hidden states), kv (keys and values), prefix (the same ones before
            its text, without new parameters), or none.
        layers: of the model that the draft gets, first:N, uniform:N, or their indices, e.g. --layers '[0, 5, 11]'.
        transitions: put a small network between layers, for those that were left out.
        questions: more questions, one a line, or JSON lines with "turns", of which the first is used.
        heldout: share of the questions, of the file's if there is one, that the draft does not learn from; at least
            one. Weights are kept when they do better on these.
        threshold: least similarity of an item that counts as found for a question.
        other_prompts: a file of prompts to learn from without knowledge.
        made_up: how many records to make up, for a draft that reads.
        max_new_tokens: of each answer.
        losses: the share of each by name (ce, kl, reverse_kl, tv, log_alpha, lk_hybrid), e.g. --losses.kl 1
            --losses.ce 0.5; without ce only the model's own answers are learned from. Default: those of the systems
            that it follows, kl 0.8, tv 0.3 for kv, kl 0.5, tv 0.3 for others, and ce 1.
        epochs: passes over all there is to learn from.
        batch_size: of training.
        learning_rate: by default 1e-3 for the tiny scale, whose models are small, else 3e-5.
        accumulate: batches of an optimizer step.
        precision: of the arithmetic in training; weights are trained in float32.
        seed: of what is held out, of the order, and of knowledge that is taken away or exchanged.
        base_model: the model that the store was built with. Default: the scale's target.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    _require_store(store, " --keep kv hidden")
    reads = None if knowledge == "none" else knowledge
    shares = _shares(losses, reads)
    if max_new_tokens < 2:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 2: the model gives the first itself.")
    asked, others = (read_prompts(path) if path else [] for path in (questions, other_prompts))
    scale = _scale(base_model)
    rate = learning_rate if learning_rate is not None else 1e-3 if scale.name == "tiny" else 3e-5
    settings |= {"base_model": scale.target, "losses": shares, "learning_rate": rate}
    main = PartialState(cpu=scale.device == "cpu").is_main_process  # before loading: gives each process its own GPU
    parts = scale.load("target"), scale.load_tokenizer("target")
    known = _opened(store, *parts, scale, reads, embed=reads is not None)
    pool, held = _split([item.question for item in known], asked, heldout, seed)
    torch.manual_seed(seed)
    draft = KnowledgeDraft.cut(known.model, layers, knowledge=reads, transitions=transitions)
    drafts.cast(draft, torch.float32)
    said = _answers(draft, known, pool, threshold, output_dir, max_new_tokens)
    own, checks = [said[q] for q in pool if q not in held], [said[q] for q in held]
    given, practice = [], []
    if "ce" in shares:  # the other losses compare with the model's own distributions
        given = _given(draft, known, [item for item in known if item.question not in held])
        practice = _practice(draft, known, output_dir / "made_up", made_up if reads else 0)
    free = _said(known, others, output_dir, max_new_tokens)
    if main:
        more = f"{len(given)} given ones, {len(free)} to other prompts, {len(practice)} made-up records"
        print(f"To learn from: {len(own)} answers of {scale.target}, {more}.")
        print(f"Held out: {len(checks)} questions; items are found for {sum(e.known is not None for e in checks)}.")
    examples = [*drafts.unsettle([*own, *given], seed=seed), *free, *practice]
    options = {"shares": shares, "epochs": epochs, "batch_size": batch_size, "learning_rate": rate}
    options |= {"accumulate": accumulate, "precision": precision, "seed": seed}
    history, measured = _trained(draft, known.model, examples, checks, options, output_dir)
    if main:
        _save_draft(draft, *parts, output_dir)
        result = {"settings": settings, "heldout": held, **_told(measured, draft, known.model), "history": history}
        print(_write_json(output_dir / "training.json", result))


def _shares(losses: Mapping[str, float] | None, reads: str | None) -> dict[str, float]:
    """Losses as asked for, or as in the sources, which have no given answers for a draft that reads keys and values."""
    shares = dict(losses if losses is not None else drafts.source_shares(reads, given=True))
    require_known(shares)
    return shares


def _split(questions: Sequence[str], more: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """All questions, and those held out of them: a share of `more` if there are any, else of all."""
    if not 0 < share < 1:
        raise ValueError(f"heldout is {share}, expected a share between 0 and 1, such as 0.1.")
    pool, source = ([*dict.fromkeys(texts)] for texts in ([*questions, *more], more or questions))
    n = max(1, round(share * len(source)))
    if n >= len(pool):
        raise ValueError(
            f"There are {len(pool)} questions, {n} to hold out: add items to the store, or give --questions."
        )
    return pool, random.Random(seed).sample(source, n)


def _answers(
    draft: KnowledgeDraft, store: KnowledgeCache, questions: list[str], threshold: float, folder: Path, max_new: int
) -> dict[str, Example]:
    """What the model says to each question, with what the draft may read of the item that is found for it."""
    reads = draft.config.knowledge
    items = [_found(store, question, threshold) if reads else None for question in questions]
    said = drafts.attach(draft, store, _said(store, questions, folder, max_new), items)
    return dict(zip(questions, said, strict=True))


def _said(store: KnowledgeCache, texts: Sequence[str], folder: Path, max_new_tokens: int) -> list[Example]:
    """What the model says to texts; kept in a folder."""
    prompts = [encode(store.tokenizer, [{"role": "user", "content": text}]) for text in texts]
    return drafts.listen(store.model, store.tokenizer, prompts, folder, max_new_tokens) if prompts else []


def _given(draft: KnowledgeDraft, store: KnowledgeCache, items: Sequence[Item]) -> list[Example]:
    """The answers of items as they were given; the draft may read each item itself."""
    return drafts.attach(draft, store, drafts.given(items), items if draft.config.knowledge else [None] * len(items))


def _practice(draft: KnowledgeDraft, known: KnowledgeCache, folder: Path, n: int) -> list[Example]:
    """Answers to made-up records, which are kept as the store keeps its own."""
    if not n:
        return []
    kept = {"keep": known.keep, "dtype": known.dtype}
    made = KnowledgeCache.build(folder, corpora.made_up(n), known.model, known.tokenizer, **kept)
    return _given(draft, made, made.items[:n])


def _trained(
    draft: KnowledgeDraft,
    target: PreTrainedModel,
    examples: list[Example],
    checks: list[Example],
    options: dict,
    folder: Path,
) -> tuple[list[dict[str, float]], dict[str, Accepted]]:
    """Train a draft; the history, and what is accepted of the draft before and after."""
    alone = [example._replace(known=None) for example in checks]
    measured = {"truncated": drafts.acceptance(draft, target, alone)}
    run = folder / _run_name(draft, target, [*examples, *checks], options)
    history = drafts.train(draft, target, examples, checks, folder=run, **options)
    drafts.cast(draft, target.dtype)  # as it is saved
    measured["trained"] = drafts.acceptance(draft, target, checks)
    if draft.config.knowledge:
        measured["trained, without knowledge"] = drafts.acceptance(draft, target, alone)
    return history, measured


def _run_name(draft: KnowledgeDraft, target: PreTrainedModel, examples: Sequence[Example], options: dict) -> str:
    """A name for what is trained, how, and on what: a checkpoint serves no other run."""
    shape = [getattr(draft.config, name) for name in ("layers", "knowledge", "transitions")]
    texts = [[e.input_ids.tolist(), e.known is not None and list(e.known.shape)] for e in examples]
    told = json.dumps([fingerprint(target)["weights"], shape, options, texts])
    return f"run-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def _save_draft(
    draft: KnowledgeDraft, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Save a draft and, if it is a plain model, that too, which needs no kvlab."""
    draft.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not draft.readers and not draft.transitions:
        drafts.export(draft, folder / "plain", tokenizer, target.config.vocab_size)


def _told(arms: dict[str, Accepted], draft: KnowledgeDraft, target: PreTrainedModel) -> dict:
    """Print and return what was found."""
    what = "share of the guesses accepted on held-out questions, by which the weights were chosen"
    found = {
        arm: {way: figure(f"{arm}, {way}", values, "fraction", what) for way, values in accepted._asdict().items()}
        for arm, accepted in arms.items()
    }
    told = {
        arm: {way: "{value:.3f} [{low:.3f}, {high:.3f}]".format(**f) for way, f in found[arm].items()} for arm in found
    }
    sizes = {"draft": draft.num_parameters(), "target": target.num_parameters()}
    print(f"{what.capitalize()} (95 % intervals):", pd.DataFrame(told).T.to_string(), sep="\n")
    print(f"The draft has {sizes['draft'] / 1e6:.2f} million parameters, the target {sizes['target'] / 1e6:.2f}.")
    return {"figures": [f for ways in found.values() for f in ways.values()], "parameters": sizes, **circumstances()}


def _print(results: list[dict], summary: dict) -> None:
    for result in results:
        known = f"    knows: {result['found'] or 'nothing'}\n" if "found" in result else ""
        print(f"{result['prompt']}\n{known}    {result['speculative']['text']}\n")
    arms = {key: value for key, value in summary.items() if isinstance(value, dict)}
    print(pd.DataFrame(arms).to_string(float_format="{:.3f}".format, na_rep="-"))
    for name, value in summary.items():
        if name not in arms:
            print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")


def _write_json(path: Path, result: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(result), parse_constant=lambda _: None)  # JSON has no NaN
    return write_text(path, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


_OPTION = re.compile(r"(?<=^--)\w[\w-]*(?==|$)")  # --per-domain is --per_domain


class _Parser(ArgumentParser):
    """As jsonargparse has it, but `--flag` alone means true, and a list is texts side by side, not a YAML list."""

    def add_argument(self, *names, **options):
        if options.get("type") is bool:
            options |= {"nargs": "?", "const": True}
        if names[:1] in (("--prompts",), ("--keep",), ("questions",)):
            told = {name: options[name] for name in ("default", "help") if name in options}
            names, options = names[:1], told | {"type": str, "nargs": "+"}
        return super().add_argument(*names, **options)


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Examples
    --------
    >>> main(["scale"])  # doctest: +ELLIPSIS
    Scale ...
    """
    models = {"_help": "Make and measure the lab models.", "train": train, "report": report}
    commands = {"scale": scale, "speculate": speculate, "build-cache": build_cache, "ask": ask}
    commands |= {"train-draft": train_draft, "lab": models}
    args = sys.argv[1:] if args is None else args
    args = [_OPTION.sub(lambda name: name[0].replace("-", "_"), arg) for arg in args]
    try:
        auto_cli(commands, args, parser_class=_Parser)
    except (ValueError, OSError, FloatingPointError) as error:  # what the user can mend needs no traceback
        raise SystemExit(f"kvlab: {error}") from error


if __name__ == "__main__":
    main()
