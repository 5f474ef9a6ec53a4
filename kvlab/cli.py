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
from functools import partial
from itertools import product, zip_longest
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from jsonargparse import ArgumentParser, auto_cli
from torch import Tensor, nn
from torch.utils.data import ConcatDataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlab import compress, lab
from kvlab import draft as drafts
from kvlab.align import (
    STARTS,
    KVAlignmentLoss,
    Lessons,
    Projector,
    Segmented,
    by_index,
    load_seen,
    plan_time,
    save_seen,
    seen_by,
    segment,
    similar_layers,
)
from kvlab.align import train as train_pupil
from kvlab.answers import extract_answer, same_answer
from kvlab.cache import Prefix, fingerprint, nbytes, prefix_of, truncate
from kvlab.compress import AWARE, KVDistiller
from kvlab.draft import Accepted, Example, KnowledgeDraft
from kvlab.evaluate import (
    answers,
    circumstances,
    encode,
    exact_match,
    f1,
    figure,
    log_likelihoods,
    rouge_l,
)
from kvlab.files import write_text
from kvlab.fuse import KEYS, Aligned, Fuser, Size
from kvlab.fuse import Lesson as FuserLesson
from kvlab.fuse import Settings as FuserSettings
from kvlab.fuse import train as train_on
from kvlab.knowledge import ARMS, Item, KnowledgeCache, loaded
from kvlab.lab import corpora
from kvlab.lab.__main__ import COMMANDS as LAB_COMMANDS
from kvlab.lab.report import problems
from kvlab.losses import require_known
from kvlab.records import (
    CONTEXTS,
    DATA_SETS,
    PROBLEMS,
    Record,
    accepted,
    messages,
    read_faq,
    read_prompts,
    read_records,
)
from kvlab.scale import Scale
from kvlab.similarity import (
    STATES,
    first_aligned,
    last_aligned,
    layer_map,
    load_layer_map,
    proportional,
    save_layer_map,
)
from kvlab.speculate import (
    FusedProposer,
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
    print(
        f"Scale {current.name} on {current.device}, {current.dtype}. Change it with KVLAB_SCALE=tiny, t4 or full."
    )
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

    Args: prompts: a user's messages, e.g. --prompts "One?" "Two?", or, if the tokenizer has no chat
    template, texts to continue. By default three word problems. max_new_tokens: of each prompt.
    gamma: tokens drafted a round. base_model: the small model, which drafts; a lab model, a hub
    name or a folder, such as `kvlab train-draft` makes. Default: the scale's draft. teacher_model:
    the large model, whose text it is. Default: the scale's target. fuser_checkpoint: folder that
    `kvlab train-fuser` made for these two models: the draft's cache is fused from the target's.
    Default: the draft is alone. skip_standard: leave plain decoding out, and with it every
    comparison. no_prefill_fusion: do not fuse the prompt. no_decode_fusion: do not fuse what was
    accepted. save_results: write a JSON file with settings, texts and numbers. output_dir: folder
    of that file. prompt_file: more prompts, one a line, or JSON lines with "turns", of which the
    first is used. temperature: 0 takes the likeliest token, else tokens are drawn. top_k: draw
    among so many of the likeliest tokens; 0 keeps all. top_p: draw among the likeliest tokens that
    reach this probability; 1.0 keeps all. repetition_penalty: above 1.0 makes tokens seen before
    less likely. seed: of what is drawn. compiled: compile both models first; worth it for many
    prompts. store: folder that `kvlab build-cache` made; a draft that reads is given the item found
    for each prompt. What finding and loading it takes is told apart, as finding_seconds. Default:
    it drafts without knowledge. threshold: least similarity of an item that counts as found.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    if (no_prefill_fusion or no_decode_fusion) and not fuser_checkpoint:
        raise ValueError(
            "Without a fuser nothing is fused: give --fuser_checkpoint, or leave --no_..._fusion out."
        )
    fuser = Fuser.from_pretrained(fuser_checkpoint) if fuser_checkpoint else None
    if store:
        _require_store(store)
        if compiled:
            raise ValueError(
                "What a draft knows differs from prompt to prompt: leave --compiled out, or --store."
            )
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
    drafter = ModelProposer
    if fuser:
        fuser = _fitting(fuser, draft.model, target.model)
        switches = {"prefill": not no_prefill_fusion, "decode": not no_decode_fusion}
        drafter = partial(FusedProposer, target=target, fuser=fuser, **switches)
    arms = ["speculative"] if skip_standard else ["plain", "speculative"]

    def run(
        ids: list[int], arm: str, proposer: ModelProposer, tokens: int = max_new_tokens
    ) -> Generated:
        generator = torch.Generator().manual_seed(seed)
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, generator)
        proposer = None if arm == "plain" else proposer
        return generate(
            target, [ids], proposer, gamma=gamma, max_new_tokens=tokens, sampling=sampling
        )

    done, results = [], []
    for text, ids in zip(tqdm(asked, desc="prompts"), rows, strict=True):
        if not done:
            proposer, _ = _proposer(drafter, draft, known, threshold, text, ids)
            for arm in arms:
                run(ids, arm, proposer, tokens=4)  # warms up, and compiles
        proposer, found = _proposer(drafter, draft, known, threshold, text, ids)
        done.append({arm: run(ids, arm, proposer) for arm in arms})
        results.append(
            {"prompt": text}
            | found
            | {arm: _result(made, tokenizer) for arm, made in done[-1].items()}
        )
    summary = compare(
        {arm: summarize([r for pair in done for r in pair[arm].rounds]) for arm in arms},
        len(rows),
        gamma,
    )
    if temperature == 0 and not skip_standard:
        summary["equal_texts"] = all(
            r["plain"]["token_ids"] == r["speculative"]["token_ids"] for r in results
        )
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


def _fitting(fuser: Fuser, draft: PreTrainedModel, target: PreTrainedModel) -> Fuser:
    """The fuser, beside the draft, if it is for these two."""
    have, want = (fuser.receiver, fuser.sharer), (Size.of(draft.config), Size.of(target.config))
    if have != want:
        seen = f"The fuser is from {have[1]} to {have[0]}, the models are {want[1]} and {want[0]}"
        raise ValueError(f"{seen}: train one for them (`kvlab train-fuser`).")
    fuser.warn_of_others(draft, target)
    return fuser.to(draft.device, draft.dtype)


def _proposer(
    drafter: Callable[..., ModelProposer],
    draft: Runner,
    store: KnowledgeCache | None,
    threshold: float,
    text: str,
    ids: list[int],
) -> tuple[ModelProposer, dict]:
    """What drafts for a prompt, with what the store has on it, and what was found in how many seconds."""
    if store is None:
        return drafter(draft), {}
    started = time.perf_counter()
    item = _found(store, text, threshold)
    knowing, prefix = draft.model.knowing(store, [item], [len(ids)])
    proposer, seconds = drafter(knowing, prefix=prefix), time.perf_counter() - started
    return proposer, {"found": item and item.question, "finding_seconds": seconds}


def _shared_tokenizer(scale: Scale) -> PreTrainedTokenizerBase:
    target, draft = (scale.load_tokenizer(role) for role in ("target", "draft"))
    if target.get_vocab() != draft.get_vocab():
        sizes = f"{scale.target} has {len(target)} tokens, {scale.draft} {len(draft)}"
        raise ValueError(
            f"The two models' tokenizers differ ({sizes}): choose a base_model of the same family."
        )
    return target


def _result(made: Generated, tokenizer: PreTrainedTokenizerBase) -> dict:
    tokens, summary = made.tokens[0].tolist(), summarize(made.rounds)
    text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return {
        "text": text,
        "token_ids": tokens,
        **asdict(summary),
        "tokens_per_second": summary.tokens_per_second,
    }


def compare(arms: dict[str, Summary], prompts: int, gamma: int) -> dict:
    """Means a prompt of each arm and, with a plain arm, what theory says of the other and what was measured.

    The cost of a verification between one token and gamma + 1 is taken to grow evenly.

    Example:
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
    scale = _scale(base_model)
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


def _scale(base_model: str | None) -> Scale:
    scale = Scale.current()
    return replace(scale, target=base_model or scale.target)


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
    _require_store(store)
    scale = _scale(base_model)
    model, tokenizer = scale.load("target"), scale.load_tokenizer("target")
    known = _opened(store, model, tokenizer, scale, "kv", embed=not exact)
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


def _require_store(store: Path, options: str = "") -> None:
    if not (store / "manifest.json").is_file():
        raise ValueError(
            f"There is no store in {store}: build one with `kvlab build-cache --store {store}{options}`."
        )


def _opened(
    store: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scale: Scale,
    reads: str | None,
    embed=True,
) -> KnowledgeCache:
    """A store that keeps what is read: "vector", or "kv" and "prefix"; None reads nothing."""
    known = KnowledgeCache.load(store, model, tokenizer, scale.load_embedder() if embed else None)
    part, name = ("hidden", "hidden states") if reads == "vector" else ("kv", "keys and values")
    if reads and part not in known.keep:
        raise ValueError(
            f"The store in {store} keeps no {name}: build one with --keep {part}, in a new folder."
        )
    return known


def _found(store: KnowledgeCache, question: str, threshold: float) -> Item | None:
    hits = store.retrieve(question, threshold=threshold)
    return hits[0].item if hits else None


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

    The draft learns from the model's own answers to the store's questions (and to those of a file),
    from the answers that the store's items have, and from made-up records, which can only be read.
    Then the share of its guesses that the model would accept is measured on questions that were
    held out: the untrained draft, the trained one, and the trained one when it is given no
    knowledge. OUTPUT_DIR holds the draft, all that was found (training.json) and, if the draft is a
    plain model, that model (plain). The same command goes on where a run was stopped, from the
    checkpoint in OUTPUT_DIR/run-NAME, which can be deleted when it is done; with other settings it
    starts anew.

    Args: store: folder that `kvlab build-cache` made; reading vectors needs one built with --keep
    hidden. output_dir: folder of the draft. knowledge: how the draft reads: vector (last hidden
    states), kv (keys and values), prefix (the same ones before its text, without new parameters),
    or none. layers: of the model that the draft gets, first:N, uniform:N, or their indices, e.g.
    --layers '[0, 5, 11]'. transitions: put a small network between layers, for those that were left
    out. questions: more questions, one a line, or JSON lines with "turns", of which the first is
    used. heldout: share of the questions, of the file's if there is one, that the draft does not
    learn from; at least one. Weights are kept when they do better on these. threshold: least
    similarity of an item that counts as found for a question. other_prompts: a file of prompts to
    learn from without knowledge. made_up: how many records to make up, for a draft that reads.
    max_new_tokens: of each answer. losses: the share of each by name (ce, kl, reverse_kl, tv,
    log_alpha, lk_hybrid), e.g. --losses.kl 1 --losses.ce 0.5; without ce only the model's own
    answers are learned from. Default: those of the systems that it follows, kl 0.8, tv 0.3 for kv,
    kl 0.5, tv 0.3 for others, and ce 1. epochs: passes over all there is to learn from. batch_size:
    of training. learning_rate: by default 1e-3 for the tiny scale, whose models are small, else
    3e-5. accumulate: batches of an optimizer step. precision: of the arithmetic in training;
    weights are trained in float32. seed: of what is held out, of the order, and of knowledge that
    is taken away or exchanged. base_model: the model that the store was built with. Default: the
    scale's target.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    _require_store(store, " --keep kv hidden")
    reads = None if knowledge == "none" else knowledge
    shares = _shares(losses, reads)
    if max_new_tokens < 2:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, expected at least 2: the model gives the first itself."
        )
    asked, others = (read_prompts(path) if path else [] for path in (questions, other_prompts))
    scale = _scale(base_model)
    rate = learning_rate if learning_rate is not None else 1e-3 if scale.name == "tiny" else 3e-5
    settings |= {"base_model": scale.target, "losses": shares, "learning_rate": rate}
    main = PartialState(
        cpu=scale.device == "cpu"
    ).is_main_process  # before loading: gives each process its own GPU
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
        print(
            f"Held out: {len(checks)} questions; items are found for {sum(e.known is not None for e in checks)}."
        )
    examples = [*drafts.unsettle([*own, *given], seed=seed), *free, *practice]
    options = {"shares": shares, "epochs": epochs, "batch_size": batch_size, "learning_rate": rate}
    options |= {"accumulate": accumulate, "precision": precision, "seed": seed}
    history, measured = _trained(draft, known.model, examples, checks, options, output_dir)
    if main:
        _save_draft(draft, *parts, output_dir)
        result = {
            "settings": settings,
            "heldout": held,
            **_told(measured, draft, known.model),
            "history": history,
        }
        print(_write_json(output_dir / "training.json", result))


def _shares(losses: Mapping[str, float] | None, reads: str | None) -> dict[str, float]:
    """Losses as asked for, or as in the sources, which have no given answers for a draft that reads keys and values."""
    shares = dict(losses if losses is not None else drafts.source_shares(reads, given=True))
    require_known(shares)
    return shares


def _split(
    questions: Sequence[str], more: Sequence[str], share: float, seed: int
) -> tuple[list[str], list[str]]:
    """All questions, and those held out of them: a share of `more` if there are any, else of all."""
    pool, source = ([*dict.fromkeys(texts)] for texts in ([*questions, *more], more or questions))
    held = _held_out(source, share, seed)
    if len(held) >= len(pool):
        raise ValueError(
            f"There are {len(pool)} questions, {len(held)} to hold out: add items to the store, or give --questions."
        )
    return pool, held


def _held_out(texts: Sequence[str], share: float, seed: int) -> list[str]:
    """A share of texts, at least one if there are any."""
    if not 0 < share < 1:
        raise ValueError(f"heldout is {share}, expected a share between 0 and 1, such as 0.1.")
    return random.Random(seed).sample(texts, min(len(texts), max(1, round(share * len(texts)))))


def _answers(
    draft: KnowledgeDraft,
    store: KnowledgeCache,
    questions: list[str],
    threshold: float,
    folder: Path,
    max_new: int,
) -> dict[str, Example]:
    """What the model says to each question, with what the draft may read of the item that is found for it."""
    reads = draft.config.knowledge
    items = [_found(store, question, threshold) if reads else None for question in questions]
    said = drafts.attach(draft, store, _said(store, questions, folder, max_new), items)
    return dict(zip(questions, said, strict=True))


def _said(
    store: KnowledgeCache, texts: Sequence[str], folder: Path, max_new_tokens: int
) -> list[Example]:
    """What the model says to texts; kept in a folder."""
    prompts = [encode(store.tokenizer, [{"role": "user", "content": text}]) for text in texts]
    return (
        drafts.listen(store.model, store.tokenizer, prompts, folder, max_new_tokens)
        if prompts
        else []
    )


def _given(draft: KnowledgeDraft, store: KnowledgeCache, items: Sequence[Item]) -> list[Example]:
    """The answers of items as they were given; the draft may read each item itself."""
    return drafts.attach(
        draft, store, drafts.given(items), items if draft.config.knowledge else [None] * len(items)
    )


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
    shape = [getattr(draft.config, name) for name in ("layers", "knowledge", "transitions")]
    texts = [
        [e.input_ids.tolist(), e.known is not None and list(e.known.shape)]
        for e in [*examples, *checks]
    ]
    run = folder / _run_name(target, shape, options, texts)
    history = drafts.train(draft, target, examples, checks, folder=run, **options)
    drafts.cast(draft, target.dtype)  # as it is saved
    measured["trained"] = drafts.acceptance(draft, target, checks)
    if draft.config.knowledge:
        measured["trained, without knowledge"] = drafts.acceptance(draft, target, alone)
    return history, measured


def _run_name(target: PreTrainedModel, *told) -> str:
    """A name for what is trained, how, and on what: a checkpoint serves no other run."""
    return f"run-{_digest(json.dumps([fingerprint(target)['weights'], *told]))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
        arm: {
            way: figure(f"{arm}, {way}", values, "fraction", what)
            for way, values in accepted._asdict().items()
        }
        for arm, accepted in arms.items()
    }
    told = {
        arm: {
            way: "{value:.3f} [{low:.3f}, {high:.3f}]".format(**f) for way, f in found[arm].items()
        }
        for arm in found
    }
    sizes = {"draft": draft.num_parameters(), "target": target.num_parameters()}
    print(f"{what.capitalize()} (95 % intervals):", pd.DataFrame(told).T.to_string(), sep="\n")
    print(
        f"The draft has {sizes['draft'] / 1e6:.2f} million parameters, the target {sizes['target'] / 1e6:.2f}."
    )
    return {
        "figures": [f for ways in found.values() for f in ways.values()],
        "parameters": sizes,
        **circumstances(),
    }


DATA = ("lab", *CONTEXTS)
LONG = ("self_instruct", "p3", "long_alpaca")  # data whose answers are texts, not spans
LARGE = {"retention": (0.001, 0.8), "batch_size": 32, "learning_rate": 5e-5}
SMALL = {
    "retention": (0.03, 0.8),
    "batch_size": 16,
    "learning_rate": 1e-3,
    "standardize": True,
    "rank": 32,
    "width": 512,
    "sinks": 1,
}
SHARES = ("exact_match", "f1", "accuracy", "rouge_l")
SCORES = dict.fromkeys(SHARES, "fraction") | {"perplexity": "per token", "MB": "MB"}
Contexts = Sequence[Sequence[Record]]  # the records of each context


def distill(
    data: Literal[DATA] = "lab",
    source: str | None = None,
    split: str = "train",
    output_dir: Path = Path("distiller"),
    layer: int | None = None,
    rank: int | None = None,
    width: int | None = None,
    gate: Literal["multiply", "none"] = "multiply",
    standardize: bool | None = None,
    routing: Literal[compress.ROUTINGS] = "conditional",
    sinks: int | None = None,
    row: int | None = None,
    retention: list[float] | None = None,
    forward_share: float = 0.6,
    instruction: float = 0.0,
    questions: int = 8,
    heldout: float = 0.1,
    contexts: int = 64,
    steps: int = 1000,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    accumulate: int = 1,
    precision: Literal["no", "fp16", "bf16"] = "no",
    seed: int = 0,
    base_model: str | None = None,
) -> None:
    """Teach a model's cache to shrink (KV-Distill): which tokens of a context to keep, and what to write into them.

    Adapters and a scorer learn to make of a context a small cache, behind which the unchanged model
    says what it says behind the whole one. Then answers are compared, on contexts that were held
    out: with the full cache and with a half, a quarter and a tenth of it. OUTPUT_DIR holds the
    distiller and all that was found (training.json). The same command goes on where a run was
    stopped, from the checkpoint in OUTPUT_DIR/run-NAME, which can be deleted when it is done; with
    other settings it starts anew.

    Args: data: what to read: lab (made-up passages without end) or records of squad, quality,
    self_instruct, p3 or long_alpaca. source: of records; a file as their authors published it, or a
    name on the Hugging Face hub. split: part of the hub's data set; a file is read whole.
    output_dir: folder of the distiller. layer: tokens are scored by what this layer of the model
    gives. Default: as the source's 6 of 32. rank: of the adapters. Default: 128; 32 for the tiny
    scale, whose models are small. width: of the scorer's hidden layer. Default: 1024; 512 for the
    tiny scale. gate: multiply (kept keys times sigma of their score), or none, with which the
    scorer cannot learn. standardize: bring the scores of a context to one mean and deviation, so
    that gates stay able to learn. Default: false, as in the source; true for the tiny scale.
    routing: conditional (adapters of queries and outputs act on kept tokens only), all (on every
    token), or embedding (as all, and a learned vector marks kept tokens). sinks: so many first
    tokens are always kept. Default: 4; 1 for the tiny scale, whose contexts are short. row: longer
    contexts are read in rows of so many tokens. Default: 1536. retention: two shares, between which
    each batch draws the one it keeps, e.g. --retention 0.001 0.8, the default; 0.03 0.8 for the
    tiny scale. forward_share: of KL(p||q) in the loss; KL(q||p) has the rest. instruction: weight
    of the questions' tokens in the loss; answers have 1. questions: most questions of one context
    in one example, and in the comparison. heldout: share of the contexts of records that are not
    learned from; at least one. The lab has test passages. contexts: most contexts to compare
    answers on. steps: of the optimizer. batch_size: of training, in contexts. Default: 32; 16 for
    the tiny scale. learning_rate: by default 5e-5; 1e-3 for the tiny scale. accumulate: batches of
    an optimizer step. precision: of the arithmetic in training; adapters and scorer are in float32.
    seed: of what is held out, of the start, of the order, and of the shares drawn. base_model: the
    model whose cache it is; a lab model, a hub name or a folder. Default: the scale's target.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    scale = _scale(base_model)
    settings = (SMALL if scale.name == "tiny" else LARGE) | {
        k: v for k, v in settings.items() if v is not None
    }
    settings["base_model"] = scale.target
    _require_shares(forward_share, settings["retention"])
    lessons, checks = _lessons(settings)
    main = PartialState(
        cpu=scale.device == "cpu"
    ).is_main_process  # before loading: gives each process its own GPU
    model, tokenizer = scale.load("target"), scale.load_tokenizer("target")
    torch.manual_seed(seed)
    shape = ("layer", "rank", "width", "gate", "standardize", "routing", "sinks", "row")
    distiller = KVDistiller(model, **{name: settings[name] for name in shape if name in settings})
    settings |= asdict(distiller.settings)
    options = (
        "retention",
        "forward_share",
        "steps",
        "batch_size",
        "learning_rate",
        "accumulate",
        "precision",
        "seed",
    )
    options = {name: settings[name] for name in options}
    if main:
        print(f"To learn from: {len(lessons)} examples. Held out: {_counted(checks)}.")
    texts = vars(lessons) if data == "lab" else [_digest(str(lesson)) for lesson in lessons]
    run = output_dir / _run_name(model, asdict(distiller.settings), options, instruction, texts)
    examples = compress.Examples(tokenizer, lessons, instruction)
    history = compress.train(
        distiller, examples, checkpoint=run / "checkpoint.safetensors", **options
    )
    if main:
        distiller.save_pretrained(output_dir)
        options = {"distiller": distiller, "long_answers": data in LONG, "seed": seed}
        scores = compression_scores(
            model, tokenizer, checks[:contexts], ["distill"], [0.5, 0.25, 0.1], **options
        )
        result = {
            "settings": settings,
            "heldout": [] if data == "lab" else [_digest(r[0].context) for r in checks],
        }
        result |= {
            "figures": _compared(scores, ["exact_match", "f1"]),
            **circumstances(),
            "history": history,
        }
        print(_write_json(output_dir / "training.json", result))


def _require_shares(forward_share: float, retention: Sequence[float]) -> None:
    if not 0 <= forward_share <= 1:
        raise ValueError(f"forward_share is {forward_share}, expected a share from 0 to 1.")
    if len(retention) != 2 or not 0 < retention[0] <= retention[1] <= 1:
        told = " ".join(map(str, retention))
        raise ValueError(
            f"retention is {told}, expected two shares above 0, at most 1, the lower first: 0.001 0.8, say."
        )


def _lessons(settings: dict) -> tuple[Sequence[tuple[str, list[tuple[str, str]]]], Contexts]:
    """Contexts with questions and answers to learn from, and the records of contexts that are held out."""
    counts = {
        name: settings[name]
        for name in ("contexts", "questions", "batch_size", "steps", "accumulate")
    }
    _require_counts(**counts)
    n, questions, batch, steps, accumulate = counts.values()
    data, source, seed = settings["data"], settings.get("source"), settings["seed"]
    if data == "lab":
        held = _passages(n, questions, seed, source)
        return corpora.Readings(steps * batch * accumulate, questions=questions, seed=seed), held
    records = _records(data, source, settings["split"])
    held = dict.fromkeys(_held_out([*records], settings["heldout"], seed))
    if len(held) >= len(records):
        raise ValueError(
            f"There are {len(records)} contexts, {len(held)} to hold out: give a source that has more."
        )
    lessons = [
        (
            context,
            [
                (record.question, record.answer)
                for record in records[context][start : start + questions]
            ],
        )
        for context in records
        if context not in held
        for start in range(0, len(records[context]), questions)
    ]
    if len(lessons) < batch:
        raise ValueError(
            f"{len(lessons)} examples are less than a batch of {batch}: give more, or a smaller batch_size."
        )
    return lessons, [records[context][:questions] for context in held]


def _require_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}, expected a whole number from 1.")


def _records(data: str, source: str | None, split: str) -> dict[str, list[Record]]:
    """Records by their context."""
    if source is None:
        raise ValueError(
            f"There is no source of {data} records: give --source, a file or a name on the hub."
        )
    records = {}
    for record in read_records(data, source, split):
        records.setdefault(record.context, []).append(record)
    return records


def _passages(n: int, questions: int, seed: int, source: str | None) -> Contexts:
    """The lab's test passages."""
    _require_no_source(source)
    readings = corpora.Readings(n, questions=questions, seed=seed, test=True)
    return [[Record(text, *turn[:1], turn[1:]) for turn in turns] for text, turns in readings]


def _require_no_source(source: str | None) -> None:
    if source is not None:
        raise ValueError(
            f"source is {source!r}, but the lab makes its texts up: leave it out, or name other data."
        )


def _counted(contexts: Contexts) -> str:
    return f"{len(contexts)} contexts with {sum(map(len, contexts))} questions"


def eval_compression(
    distiller: Path | None = None,
    data: Literal[DATA] = "lab",
    source: str | None = None,
    split: str = "validation",
    contexts: int = 64,
    questions: int = 8,
    methods: list[str] | None = None,
    retention: list[float] | None = None,
    shared: bool = False,
    max_new_tokens: int = 64,
    save_results: bool = False,
    output_dir: Path = Path("results"),
    seed: int = 0,
    base_model: str | None = None,
) -> None:
    """Compare what a model answers behind compressed caches, made in several ways and of several sizes.

    Each context is compressed, then its questions are answered behind what is left. Methods that
    see a question before they compress serve this question only; they have a table of their own.
    Intervals (95 %) are over contexts, which count alike. If a distiller learned from the same
    records, contexts are among those that it was not shown.

    Args: distiller: folder that `kvlab distill` made. Default: only the other methods are compared.
    data: what to read: lab (made-up test passages) or records of squad, quality, self_instruct, p3
    or long_alpaca. source: of records; a file as their authors published it, or a name on the
    Hugging Face hub. split: part of the hub's data set; a file is read whole. contexts: most
    contexts to read. questions: most questions to each. methods: some of distill, random,
    sinks_recent, h2o, snapkv, key_norm, key_norm_reversed, h2o_aware and snapkv_aware, e.g.
    --methods distill h2o. Default: all. retention: shares of a context's entries to keep, e.g.
    --retention 0.5 0.1. Default: 1 0.5 0.25 0.1 0.05 0.02. shared: keep the same entries in all
    heads and layers, by the mean of their scores; distill always does. max_new_tokens: of each
    answer. save_results: write a JSON file with settings and figures. output_dir: folder of that
    file. seed: of the choice of contexts, and of the method random. base_model: the model that
    answers. Default: the scale's target.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    scale = _scale(base_model)
    methods = _known_methods(methods, distiller)
    retention = retention or [1.0, 0.5, 0.25, 0.1, 0.05, 0.02]
    settings |= {"base_model": scale.target, "methods": methods, "retention": retention}
    _require_counts(contexts=contexts, questions=questions, max_new_tokens=max_new_tokens)
    for share in retention:
        compress.count_kept(1, share)
    checks = _checks(data, source, split, contexts, questions, seed, distiller)
    model, tokenizer = scale.load("target"), scale.load_tokenizer("target")
    options = {
        "distiller": KVDistiller.from_pretrained(distiller, model) if distiller else None,
        "shared": shared,
    }
    options |= {"max_new_tokens": max_new_tokens, "long_answers": data in LONG, "seed": seed}
    print(f"To compare answers on: {_counted(checks)}.")
    scores = compression_scores(model, tokenizer, checks, methods, retention, **options)
    result = {"settings": settings, "figures": _compared(scores), **circumstances()}
    if save_results:
        print(
            _write_json(
                output_dir / f"eval_compression_{datetime.now():%Y%m%d_%H%M%S}.json", result
            )
        )


def _known_methods(
    methods: Sequence[str] | None, distiller: Path | KVDistiller | None
) -> list[str]:
    known = [*["distill"] * (distiller is not None), *compress.METHODS, *AWARE]
    unknown = [name for name in methods or () if name not in known]
    if unknown == ["distill"]:
        raise ValueError(
            "The method distill needs a distiller: give one that `kvlab distill` made."
        )
    if unknown:
        raise ValueError(
            f"There is no method {', '.join(unknown)}: expected some of {', '.join(known)}."
        )
    return list(dict.fromkeys(known if methods is None else methods))


def _checks(
    data: str,
    source: str | None,
    split: str,
    contexts: int,
    questions: int,
    seed: int,
    distiller: Path | None,
) -> Contexts:
    """Records to compare answers on, by context; if some were held out of a distiller's training, only these."""
    if data == "lab":
        return _passages(contexts, questions, seed, source)
    records = _records(data, source, split)
    if distiller and (distiller / "training.json").is_file():
        held = {*json.loads((distiller / "training.json").read_text("utf-8"))["heldout"]}
        records = {c: rows for c, rows in records.items() if _digest(c) in held} or records
    chosen = random.Random(seed).sample([*records], min(contexts, len(records)))
    if not chosen:
        raise ValueError(f"There is no record in {source}: give a source that has some.")
    return [records[context][:questions] for context in chosen]


@torch.no_grad()
def compression_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Contexts,
    methods: Sequence[str],
    retention: Sequence[float],
    *,
    distiller: KVDistiller | None = None,
    shared: bool = False,
    max_new_tokens: int = 64,
    long_answers: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """Score a model's answers behind whole and behind compressed contexts.

    Args:
        contexts: the records of each context.
        methods: names of `compress.METHODS` and of `AWARE`, and "distill", which needs a distiller.
        retention: shares of a context's entries to keep.
        shared: as in `compress.evict`.
        long_answers: score ROUGE-L, too.
        seed: of the method "random".

    Raises:
        ValueError: an unknown method, "distill" without a distiller, or one whose gate is "log".

    Returns:
        A row for each method, share and record. The first method is "full", the whole cache.
        Columns are method, retention, context (its number), exact_match, f1 (the best of the
        record's answers), log_likelihood (nats) and tokens of its first answer, bytes of the cache
        and, where they apply, accuracy (whether the right choice is the likeliest) and rouge_l.

    Example:
        >>> records = [Record("Anna lives in Rome. Ben has a dog.", "Where does Anna live?", ("Rome",))]
        >>> parts = lab.load("lab-target"), lab.load_tokenizer("lab-target")
        >>> compression_scores(*parts, [records], ["key_norm"], [0.5])[["method", "retention"]].values.tolist()
        [['full', 1.0], ['key_norm', 0.5]]
    """
    methods = _known_methods(methods, distiller)
    if distiller and distiller.settings.gate == "log":
        raise ValueError(
            "The distiller has the gate 'log', which no cache can hold: train one with gate 'multiply'."
        )
    torch.manual_seed(seed)
    ways, rows = (
        [("full", 1.0), *((method, share) for method in methods for share in retention)],
        [],
    )
    for number, records in enumerate(tqdm(contexts, desc="contexts")):
        asked = [_in_tokens(tokenizer, record, model.device) for record in records]
        for method, share in ways:
            prefixes = _compressed(model, asked, method, share, distiller, shared)
            told = {"method": method, "retention": share, "context": number}
            scores = _scores(model, tokenizer, asked, prefixes, max_new_tokens, long_answers)
            rows += [told | score for score in scores]
    return pd.DataFrame(rows)


class _Asked(NamedTuple):
    """A record in token ids: its context (1, T), its question (Q,), and its answer and choices (each (n,))."""

    record: Record
    context: Tensor
    question: Tensor
    endings: list[Tensor]


def _in_tokens(tokenizer: PreTrainedTokenizerBase, record: Record, device: torch.device) -> _Asked:
    """As in training."""
    turns = [(record.question, text) for text in (record.answer, *record.choices)]
    examples = [compress.example(tokenizer, record.context, [turn]) for turn in turns]
    question, *_ = (e.text[e.weights == 0] for e in examples)
    return _Asked(
        record,
        examples[0].context[None].to(device),
        question,
        [e.text[e.weights == 1] for e in examples],
    )


def _compressed(
    model: PreTrainedModel,
    asked: Sequence[_Asked],
    method: str,
    share: float,
    distiller: KVDistiller | None,
    shared: bool,
) -> list[Prefix]:
    """What is left of one context for each of its questions: the same for all, but for methods that see a question."""
    context, options = asked[0].context, {"retention": share, "shared": shared}
    if method in AWARE:
        seen = [a.question[None].to(model.device) for a in asked]
        return [
            compress.evict(model, context, AWARE[method], question_ids=ids, **options).prefix
            for ids in seen
        ]
    if method == "full":
        prefix = prefix_of(model, context)
    elif method == "distill":
        prefix = distiller.compress(context, retention=share).prefix
    else:
        prefix = compress.evict(model, context, compress.METHODS[method], **options).prefix
    return [prefix] * len(asked)


def _scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[_Asked],
    prefixes: Sequence[Prefix],
    max_new_tokens: int,
    long_answers: bool,
) -> list[dict]:
    """Scores of each question behind its prefix."""
    made = generate(
        model, [a.question for a in asked], prefix=prefixes, max_new_tokens=max_new_tokens
    )
    rows = []
    for (record, _, question, endings), prefix, tokens in zip(
        asked, prefixes, made.tokens, strict=True
    ):
        said = [tokenizer.decode(tokens, skip_special_tokens=True).strip()]
        answer, *choices = log_likelihoods(
            model, tokenizer, [question] * len(endings), endings, prefix
        )
        row = {
            "exact_match": exact_match(said, [record.answers])[0],
            "f1": f1(said, [record.answers])[0],
        }
        if choices:
            row["accuracy"] = float(record.choices[np.argmax(choices)] in record.answers)
        if long_answers:
            row["rouge_l"] = rouge_l(said, [record.answers])[0]
        rows.append(
            row
            | {"log_likelihood": answer, "tokens": len(endings[0]), "bytes": nbytes(prefix.cache)}
        )
    return rows


def compression_figures(scores: pd.DataFrame) -> list[dict]:
    """Figures with 95 % intervals of what `compression_scores` gives; contexts count alike, and are drawn anew.

    Beside what `figure` gives, each has method, retention and score: exact_match, f1, accuracy,
    rouge_l, perplexity (of the first answer) or MB (of the cache).

    Example:
        >>> columns = "method retention context exact_match log_likelihood tokens bytes".split()
        >>> rows = [["full", 1.0, 0, 1, -3 * np.log(2), 3, 5000000]]
        >>> [round(f["value"], 3) for f in compression_figures(pd.DataFrame(rows, columns=columns))]
        [1.0, 2.0, 5.0]
    """
    figures = []
    for (method, share), rows in scores.groupby(["method", "retention"], sort=False):
        each = rows.groupby("context").mean(numeric_only=True)
        each = each.assign(
            perplexity=-each["log_likelihood"] / each["tokens"], MB=each["bytes"] / 1e6
        )
        for score, unit in SCORES.items():
            values = each[score].dropna() if score in each else ()
            if len(values):
                what = f"{len(rows)} questions to {len(each)} contexts"
                found = figure(f"{method}, {share:g}, {score}", values, unit, what)
                if score == "perplexity":
                    found |= {name: float(np.exp(found[name])) for name in ("value", "low", "high")}
                figures.append(found | {"method": method, "retention": share, "score": score})
    return figures


def _compared(scores: pd.DataFrame, shown: Sequence[str] = tuple(SCORES)) -> list[dict]:
    """Print a table of what was found without knowing the questions, and one of what was found with them."""
    figures = compression_figures(scores)
    told = pd.DataFrame(
        {
            "method": f["method"],
            "retention": f["retention"],
            "score": f["score"],
            "cell": "{value:.3f} [{low:.3f}, {high:.3f}]".format(**f),
        }
        for f in figures
        if f["score"] in shown
    )
    table = told.pivot(index=["method", "retention"], columns="score", values="cell")
    table = table.reindex(pd.MultiIndex.from_frame(told[["method", "retention"]].drop_duplicates()))
    table = table[[score for score in shown if score in table]].rename_axis(columns=None)
    method = table.index.get_level_values("method")
    for title, part in (
        ("Compressed without the question", table[~method.isin(AWARE)]),
        ("Compressed for one question, which was seen first", table[method.isin([*AWARE, "full"])]),
    ):
        if len(part) > 1:
            print(f"\n{title} (95 % intervals over contexts):", part.to_string(), sep="\n")
    return figures


SOLVED = ("lab", *PROBLEMS)
ALIGNMENTS = {  # whether layers go by likeness, time by segments, and what is wrong with what the teacher read
    "ce_only": None,
    "baseline": (False, False, ""),
    "cka": (True, False, ""),
    "segment": (False, True, ""),
    "full": (True, True, ""),
    "shuffled": (True, True, "another problem"),
    "shuffled_segment": (False, True, "another problem"),
    "random_teacher": (True, True, "nothing learned"),
}
SAMPLES = 100  # problems by which layers are compared
TOGETHER = 256  # problems in a file of what a teacher made of them
SMALL_ALIGNED = {"kv_warmup": 50, "learning_rate": 1e-3}
LARGE_ALIGNED = {"kv_warmup": 1000, "learning_rate": 2e-5}
Conversation = list[dict[str, str]]
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


CONTROLS = ("none", "self", "matched")
FUSER_LARGE = {"hidden": 1024, "dropout": 0.1, "gate": 0.0, "batch_size": 8, "learning_rate": 1e-4}
FUSER_SMALL = {"hidden": 128, "dropout": 0.0, "gate": 4.0, "batch_size": 16, "learning_rate": 2e-3}
FUSIONS = {"none": None, "prefill": (True, False), "decode": (False, True), "both": (True, True)}


def train_fuser(
    output_dir: Path = Path("fuser"),
    data: Literal[DATA] = "lab",
    source: str | None = None,
    split: str = "train",
    prompts: int | None = None,
    heldout: int = 40,
    max_new_tokens: int = 128,
    hidden: int | None = None,
    dropout: float | None = None,
    gate: float | None = None,
    keys: Literal[KEYS] = "unrotated",
    noise: Literal["logistic", "gumbel"] = "logistic",
    layer_map: Literal["last", "proportional", "first"] = "last",
    control: Literal[CONTROLS] = "none",
    no_decode_fusion: bool = False,
    gamma: int = 4,
    steps: int = 1000,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    accumulate: int = 1,
    precision: Literal["no", "fp16", "bf16"] = "no",
    seed: int = 0,
    base_model: str | None = None,
    teacher_model: str | None = None,
) -> None:
    """Teach a fuser to add to a small model's cache what a large one made of the same text (Cache-to-Cache).

    The large model answers prompts, and the fuser learns to make these answers likely for the small
    one, which reads the prompt for itself; both models stay as they are. Then, on prompts that were
    held out, the share of the small model's guesses is measured that the large one accepts in
    speculative decoding. OUTPUT_DIR holds the fuser and all that was found (training.json). The
    same command goes on where a run was stopped, from the checkpoint in OUTPUT_DIR/run-NAME, which
    can be deleted when it is done; with other settings it starts anew.

    Args: output_dir: folder of the fuser. data: what to ask about: lab (made-up passages, of which
    somebody is to be told about) or records of squad, quality, self_instruct, p3 or long_alpaca,
    with their contexts. source: of records; a file as their authors published it, or a name on the
    Hugging Face hub. split: part of the hub's data set; a file is read whole. prompts: most prompts
    to learn from. Default: all; the lab makes 4000. heldout: prompts that are not learned from but
    measured on. max_new_tokens: of each answer. hidden: width of the fuser. Default: 1024; 128 for
    the tiny scale, whose models are small. dropout: in the fuser, in training. Default: 0.1; 0 for
    the tiny scale. gate: the logit that gates start with. Default: 0, at which they are closed
    about half of the time in training; 4 for the tiny scale, with which they are open from the
    start. keys: are fused unrotated, or rotated as published. noise: of the gates in training,
    logistic, or gumbel as published. layer_map: the large model's last layers for the small one's,
    or those at the same shares of the depth, or its first. control: self (the small model in place
    of the large one), or matched (as many parameters, and no large model). no_decode_fusion: learn
    to fuse prompts only, as published, and not what was said since. gamma: tokens drafted a round,
    in the measurement. steps: of the optimizer. batch_size: of training, in prompts. Default: 8; 16
    for the tiny scale. learning_rate: by default 1e-4; 2e-3 for the tiny scale. accumulate: batches
    of an optimizer step. precision: of the arithmetic in training; the fuser is in float32. seed:
    of what is learned from, of the start, and of the order. base_model: the small model, which
    receives; a lab model, a hub name or a folder. Default: the scale's draft. teacher_model: the
    large model, which shares, with the same tokenizer. Default: the scale's target.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    scale = Scale.current()
    scale = replace(scale, draft=base_model or scale.draft, target=teacher_model or scale.target)
    settings = (FUSER_SMALL if scale.name == "tiny" else FUSER_LARGE) | {
        k: v for k, v in settings.items() if v is not None
    }
    settings |= {"base_model": scale.draft, "teacher_model": scale.target}
    _require_fusible(settings)
    tokenizer, texts, checks = _shared_tokenizer(scale), *_requests(settings)
    main = PartialState(
        cpu=scale.device == "cpu"
    ).is_main_process  # before loading: gives each process its own GPU
    draft, target = scale.load("draft"), scale.load("target")
    asked, checked = ([encode(tokenizer, text) for text in part] for part in (texts, checks))
    said = drafts.listen(target, tokenizer, asked, output_dir, max_new_tokens)
    if main:
        print(
            f"To learn from: {len(said)} answers of {scale.target}. Held out: {len(checks)} prompts."
        )
    options = {
        name: settings[name]
        for name in ("steps", "batch_size", "learning_rate", "accumulate", "precision", "seed")
    }
    fuser, history = tuned(draft, target, said, settings, options, output_dir)
    if not main:
        return
    fuser.save_pretrained(output_dir)
    found = speculated(
        target, checked, drafters(draft, target, fuser, control), gamma, max_new_tokens
    )
    guessed = found.dropna(subset="acceptance").groupby(
        "arm", sort=False
    )  # of one token nothing is guessed
    told = f"{len(checks)} prompts that were not learned from, greedy, gamma {gamma}"
    figures = [
        figure(f"acceptance_{arm}", rows["acceptance"], "fraction", told) for arm, rows in guessed
    ]
    print(
        _table(figures)
        if figures
        else "Each held-out prompt is answered by one token, so that nothing was guessed."
    )
    result = {
        "settings": settings,
        "gates": fuser.gate_logits().tolist(),
        "parameters": fuser.num_parameters(),
    }
    result |= {"figures": figures, **circumstances(), "history": history}
    print(_write_json(output_dir / "training.json", result))


def _require_fusible(settings: Mapping) -> None:
    names = ("prompts", "heldout", "gamma", "steps", "batch_size", "accumulate")
    _require_counts(**{name: settings[name] for name in names if name in settings})
    most, rate, folder = (
        settings[name] for name in ("max_new_tokens", "learning_rate", "output_dir")
    )
    if most < 2:
        raise ValueError(
            f"max_new_tokens is {most}, expected at least 2: the first is not guessed."
        )
    if not rate >= 0:
        raise ValueError(f"learning_rate is {rate}, expected 0 or more.")
    if Path(folder).is_file():
        raise ValueError(f"{folder} is a file: give the name of a folder as output_dir.")
    _fuser_settings(settings)


def _fuser_settings(settings: Mapping) -> FuserSettings:
    made = {name: settings[name] for name in ("hidden", "dropout", "gate", "keys", "noise")}
    return FuserSettings(**made, sharer_seen=settings["control"] != "matched")


def _requests(settings: Mapping) -> tuple[list[Conversation], list[Conversation]]:
    """Prompts to learn from, which the seed chooses, and prompts to measure on, the same for every seed."""
    data, source, most, seed = (
        settings["data"],
        settings.get("source"),
        settings.get("prompts"),
        settings["seed"],
    )
    if data == "lab":
        _require_no_source(source)
        held = [*corpora.Requests(settings["heldout"], test=True)]
        chosen = [*corpora.Requests(most or 4000, seed=seed)]
    else:
        records = _records(data, source, settings["split"])
        contexts = random.Random(0).sample([*records], len(records))
        kept, rest = contexts[: settings["heldout"]], contexts[settings["heldout"] :]
        if not rest:
            seen = f"There are {len(records)} contexts, {settings['heldout']} to hold out"
            raise ValueError(f"{seen}: give a source that has more, or a smaller heldout.")
        held = [messages(records[context][0])[:1] for context in kept]
        texts = [messages(record)[:1] for context in rest for record in records[context]]
        chosen = random.Random(seed).sample(texts, min(most or len(texts), len(texts)))
    if len(chosen) < settings["batch_size"]:
        seen = f"{len(chosen)} prompts are less than a batch of {settings['batch_size']}"
        raise ValueError(f"{seen}: give more, or a smaller batch_size.")
    return chosen, held


def tuned(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    said: Sequence[Example],
    settings: Mapping,
    options: Mapping,
    folder: Path,
) -> tuple[Fuser, list[dict[str, float]]]:
    """A fuser from the target to the draft, or a control, trained on the target's answers, and its history."""
    control, made = settings["control"], _fuser_settings(settings)
    sharer = draft if control == "self" else target
    receiving, sharing = Size.of(draft.config), Size.of(sharer.config)
    layers = {"last": last_aligned, "proportional": proportional, "first": first_aligned}[
        settings["layer_map"]
    ]
    torch.manual_seed(options["seed"])
    chosen = layers(receiving.layers, sharing.layers)
    fuser = Fuser(receiving, sharing, chosen, made).to(draft.device)
    texts = [(e.input_ids[: e.start], e.input_ids[e.start :]) for e in said]
    lessons = [FuserLesson(Aligned(prompt, prompt), answer) for prompt, answer in texts]
    decode = not settings["no_decode_fusion"]
    told = [
        fingerprint(draft)["weights"],
        asdict(made),
        settings["layer_map"],
        control,
        decode,
        dict(options),
    ]
    run = folder / _run_name(target, *told, [e.input_ids.tolist() for e in said])
    checkpoint = run / "checkpoint.safetensors"
    return fuser, train_on(
        fuser, draft, sharer, lessons, decode=decode, checkpoint=checkpoint, **options
    )


def drafters(
    draft: PreTrainedModel, target: PreTrainedModel, fuser: Fuser, control: str = "none"
) -> dict[str, Callable[[], ModelProposer]]:
    """The draft alone, and fused where the prompt stands, where answers do, and at both."""
    fuse = (lambda own, theirs: fuser(own, own)) if control == "self" else fuser

    def make(ways: tuple[bool, bool] | None) -> ModelProposer:
        return FusedProposer(draft, target, fuse, None, *ways) if ways else ModelProposer(draft)

    return {arm: partial(make, ways) for arm, ways in FUSIONS.items()}


def speculated(
    target: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    makers: Mapping[str, Callable[[], ModelProposer | None]],
    gamma: int,
    max_new_tokens: int,
) -> pd.DataFrame:
    """Each prompt decoded by each arm, one after another: acceptance, tokens a call, seconds, and the tokens."""
    rows = []
    for number, ids in enumerate(tqdm(prompts, desc="prompts")):
        for arm, make in makers.items():
            started = time.perf_counter()
            made = generate(target, [ids], make(), gamma=gamma, max_new_tokens=max_new_tokens)
            row = {"prompt": number, "arm": arm, "seconds": time.perf_counter() - started}
            summary = summarize(made.rounds)
            row |= {
                "decoding": summary.seconds,
                "drafting": summary.draft_seconds,
                "calls": summary.target_calls,
            }
            row |= {"acceptance": summary.acceptance, "tokens_per_call": summary.tokens_per_call}
            rows.append(row | {"tokens": made.tokens[0].tolist()})
    return pd.DataFrame(rows)


class Problems(NamedTuple):
    """Problems as a student and its teachers solve them, to learn from, and others to be asked.

    asked : conversations that end with the question. answers : of each the accepted ones. kind : of
    `extract_answer`.
    """

    own: list[Conversation]
    theirs: list[Conversation]
    asked: list[Conversation]
    answers: list[tuple[str, ...]]
    kind: str


def map_layers(
    student_model: str | None = None,
    teacher_model: str | None = None,
    dataset_name: Literal[SOLVED] = "lab",
    num_samples: int = 100,
    output: Path = Path("layer_map.json"),
    source: str | None = None,
    split: str = "train",
    what: Literal[STATES] = "hidden",
    k: int = 2,
) -> None:
    """Find the teacher layers that are most like each student layer (unbiased CKA), and write them as JSON.

    Args: student_model: a lab model, a hub name or a folder. Default: the scale's student.
    teacher_model: the same. Default: the scale's teacher. dataset_name: problems that both read
    with their solutions, but for the answers: lab (made up without end) or records. num_samples:
    problems to read. output: the file, for `kvlab train-aligned --layer_mapping_path`. source: of
    records; a file as their authors published it, or a name on the Hugging Face hub. split: part of
    the hub's data set; a file is read whole. what: is compared, each layer's hidden states, its
    keys (before they are rotated) or its values. k: teacher layers for each student layer; their
    weights are a softmax of what was found.
    """
    _require_counts(num_samples=num_samples, k=k)
    scale = Scale.current()
    scale = replace(
        scale, student=student_model or scale.student, teacher=teacher_model or scale.teacher
    )
    settings = {
        "dataset_name": dataset_name,
        "source": source,
        "split": split,
        "problems": num_samples,
    }
    own, theirs = zip(*_solutions(settings)[0], strict=True)
    student, tokenizer = scale.load("student"), scale.load_tokenizer("student")
    texts, teacher = (
        [segment(tokenizer, c) for c in own],
        (scale.load("teacher"), scale.load_tokenizer("teacher")),
    )
    layers = teacher[0].config.num_hidden_layers
    if k > layers:
        raise ValueError(f"k is {k}, but {scale.teacher} has {layers} layers: give a smaller one.")
    matrix = _likeness(student, texts, *teacher, theirs, what)
    chosen = layer_map(matrix, k)
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {"student": scale.student, "teacher": scale.teacher, "samples": len(own), "what": what}
    path = save_layer_map(output, chosen, **about)
    print(
        f"CKA of each layer of {scale.student} (rows) with each of {scale.teacher}, {len(own)} problems:"
    )
    print(pd.DataFrame(matrix.numpy()).to_string(float_format="{:.2f}".format))
    for layer, (indices, weights) in enumerate(
        zip(chosen.indices.tolist(), chosen.weights.tolist(), strict=True)
    ):
        told = ", ".join(f"{i} ({w:.2f})" for i, w in zip(indices, weights, strict=True))
        print(f"student layer {layer}: teacher layers {told}")
    print(path)


def _likeness(
    student: PreTrainedModel,
    texts: Sequence[Segmented],
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    theirs: Sequence[Conversation],
    what: str = "hidden",
) -> Tensor:
    return similar_layers(student, texts, teacher, [segment(tokenizer, c) for c in theirs], what)


def train_aligned(
    model_name: str | None = None,
    teacher_model: list[str] | None = None,
    dataset_name: Literal[SOLVED] = "lab",
    source: str | None = None,
    split: str = "train",
    eval_dataset_name: Literal[SOLVED] | None = None,
    eval_source: str | None = None,
    eval_split: str = "test",
    use_cka_layer_mapping: bool = False,
    layer_mapping_path: list[str] | None = None,
    use_segment_resampling: bool = False,
    kv_weight: float = 1.0,
    codi_weight: float = 0.5,
    kv_warmup: int | None = None,
    kv_end: float = 0.0,
    start: Literal[STARTS] = "xavier",
    freeze_projectors: bool = False,
    problems: int | None = None,
    heldout: int = 200,
    epochs: int = 2,
    batch_size: int = 8,
    learning_rate: float | None = None,
    accumulate: int = 1,
    fp16: bool = False,
    gradient_checkpointing: bool = False,
    max_new_tokens: int = 256,
    seed: int = 0,
    output_dir: Path = Path("aligned"),
) -> None:
    """Teach a student to solve problems, and to make keys and values like those of its teachers (4D alignment).

    Each teacher reads the problems with their solutions, in its own tokens, one teacher after
    another; what it made of them is kept in OUTPUT_DIR, so that a run that was stopped goes on by
    the same command. Then OUTPUT_DIR holds the student, a projector for each teacher, and what was
    found (training.json). The four arms of the source are: neither, one or both of
    --use_cka_layer_mapping and --use_segment_resampling. With both weights 0 there is no teacher.

    Args: model_name: the student; a lab model, a hub name or a folder. Default: the scale's
    student. teacher_model: one or more teachers, e.g. --teacher_model A B. Default: the scale's
    teacher. dataset_name: problems with reasoning, to learn from: lab (made up; the teacher reads
    longer solutions), or records, of which teacher and student read the same. source: of records; a
    file as their authors published it, or a name on the Hugging Face hub. split: part of the hub's
    data set; a file is read whole. eval_dataset_name: problems to be asked. Default: some that are
    held out of the others. eval_source: of these. eval_split: of these. use_cka_layer_mapping: each
    student layer learns from the teacher layers that are most like it; else from the one at the
    same share of the depth. layer_mapping_path: for each teacher a file that `kvlab layer-map`
    wrote. Default: they are made first. use_segment_resampling: stretch the teacher's prompt,
    reasoning and answer, each over the student's; else token i learns from the teacher's token i.
    kv_weight: of the difference of keys and values. codi_weight: of the difference of hidden states
    before the answer. kv_warmup: steps over which both rise from 0. Default: 1000; 50 for the tiny
    scale. kv_end: share of the steps after which both have faded to 0; 0: they stay. start: of the
    projectors, xavier, orthogonal or identity. freeze_projectors: they stay as they start, and the
    student alone moves. problems: most problems to learn from. Default: all; the lab makes 600.
    heldout: problems that are not learned from but asked. epochs: times that each problem is read.
    batch_size: of training, in problems. learning_rate: by default 2e-5; 1e-3 for the tiny scale.
    accumulate: batches of an optimizer step. fp16: mixed precision. gradient_checkpointing: make
    again in the backward pass what layers computed: slower, in much less memory. max_new_tokens: of
    each solution, when problems are asked. seed: of what is learned from, of the projectors, and of
    the order. output_dir: folder of the student.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    scale, settings = _pair(settings, model_name, teacher_model)
    _require_maps(layer_mapping_path, settings["teacher_model"], use_cka_layer_mapping)
    tasks = _tasks(settings)
    main = PartialState(
        cpu=scale.device == "cpu"
    ).is_main_process  # before loading: gives each process its own GPU
    if main:
        print(f"To learn from: {len(tasks.own)} problems. To be asked: {len(tasks.asked)}.")
    student, tokenizer = _learner(scale, gradient_checkpointing), scale.load_tokenizer("student")
    right = {"before": solved(student, tokenizer, tasks, max_new_tokens)} if main else {}
    arm = (use_cka_layer_mapping, use_segment_resampling, "") if kv_weight or codi_weight else None
    teachers = _teachers(scale, settings["teacher_model"])
    history, alignment = teach(
        arm, student, tokenizer, tasks, teachers, settings, output_dir, layer_mapping_path
    )
    if not main:
        return
    student.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    for number, projector in enumerate(alignment.projectors if alignment else ()):
        projector.save_pretrained(output_dir / f"projector_{number}")
    right["after"] = solved(student, tokenizer, tasks, max_new_tokens)
    told = "problems that were not learned from, the answer right, greedy"
    figures = [
        figure(f"accuracy_{when}", values, "fraction", told) for when, values in right.items()
    ]
    print(_table(figures))
    result = {"settings": settings, "figures": figures, **circumstances(), "history": history}
    print(_write_json(output_dir / "training.json", result))


def compare_alignments(
    model_name: str | None = None,
    teacher_model: list[str] | None = None,
    dataset_name: Literal[SOLVED] = "lab",
    source: str | None = None,
    split: str = "train",
    eval_dataset_name: Literal[SOLVED] | None = None,
    eval_source: str | None = None,
    eval_split: str = "test",
    arms: list[str] | None = None,
    seeds: int = 3,
    kv_weight: float = 1.0,
    codi_weight: float = 0.5,
    kv_warmup: int | None = None,
    kv_end: float = 0.0,
    start: Literal[STARTS] = "xavier",
    freeze_projectors: bool = False,
    problems: int | None = None,
    heldout: int = 200,
    epochs: int = 2,
    batch_size: int = 8,
    learning_rate: float | None = None,
    accumulate: int = 1,
    fp16: bool = False,
    gradient_checkpointing: bool = False,
    max_new_tokens: int = 256,
    output_dir: Path = Path("alignments"),
) -> None:
    """Train one student after another, by each arm of 4D alignment and by controls, and compare what they solve.

    Arms are ce_only (no teacher), baseline (by index, proportional layers), cka (layers by
    likeness), segment (time by segments), full (both), and controls that should be no better than
    ce_only: shuffled and shuffled_segment (as full and segment, but the teacher read another
    problem), and random_teacher (as full, with random weights). All have the same problems, order
    and steps. OUTPUT_DIR holds what was found (comparison.json), and what a run that was stopped
    needs to go on.

    Args:
        model_name: the student, as for train-aligned; so are all options that are not told here.
        teacher_model: one or more teachers.
        dataset_name: problems to learn from.
        source: of records.
        split: of records.
        eval_dataset_name: problems to be asked.
        eval_source: of these.
        eval_split: of these.
        arms: some of them, e.g. --arms ce_only full. Default: all.
        seeds: runs of each arm. Each seed has its own problems to learn from, order and projectors.
        kv_weight: of the difference of keys and values.
        codi_weight: of the difference of hidden states before the answer.
        kv_warmup: steps over which both rise from 0.
        kv_end: share of the steps after which both have faded to 0.
        start: of the projectors.
        freeze_projectors: they stay as they start.
        problems: most problems to learn from.
        heldout: problems to be asked.
        epochs: times that each problem is read.
        batch_size: of training.
        learning_rate: of training.
        accumulate: batches of an optimizer step.
        fp16: mixed precision.
        gradient_checkpointing: slower, in less memory.
        max_new_tokens: of each solution.
        output_dir: folder of the comparison.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    _require_counts(seeds=seeds)
    arms = list(dict.fromkeys(arms or ALIGNMENTS))
    unknown = [arm for arm in arms if arm not in ALIGNMENTS]
    if unknown:
        raise ValueError(
            f"There is no arm {', '.join(unknown)}: expected some of {', '.join(ALIGNMENTS)}."
        )
    scale, settings = _pair(settings | {"arms": arms}, model_name, teacher_model)
    main, rows = PartialState(cpu=scale.device == "cpu").is_main_process, []
    tokenizer, teachers = (
        scale.load_tokenizer("student"),
        _teachers(scale, settings["teacher_model"]),
    )
    every_task = [_tasks(settings | {"seed": seed}) for seed in range(seeds)]
    for (seed, tasks), arm in product(enumerate(every_task), arms):
        student = _learner(scale, gradient_checkpointing)
        torch.cuda.reset_peak_memory_stats() if scale.device == "cuda" else None
        history, _ = teach(
            ALIGNMENTS[arm],
            student,
            tokenizer,
            tasks,
            teachers,
            settings | {"seed": seed},
            output_dir,
        )
        row = {
            "arm": arm,
            "seed": seed,
            "seconds": sum(entry["seconds"] for entry in history),
        }  # a stopped run's too
        if scale.device == "cuda":
            row["GB"] = torch.cuda.max_memory_allocated() / 1e9
        rows.append(
            row | {"accuracy": float(solved(student, tokenizer, tasks, max_new_tokens).mean())}
        )
        if main:
            print("{arm}, seed {seed}: {accuracy:.3f}".format(**rows[-1]))
    if main:
        figures = alignment_figures(pd.DataFrame(rows))
        print(_table(figures))
        result = {"settings": settings, "figures": figures, **circumstances(), "runs": rows}
        print(_write_json(output_dir / "comparison.json", result))


def _pair(settings: dict, student: str | None, teachers: list[str] | None) -> tuple[Scale, dict]:
    """The scale with the student that is asked for, and settings with the scale's own where none are."""
    names = ("heldout", "epochs", "batch_size", "accumulate", "max_new_tokens")
    _require_counts(
        **{name: settings[name] for name in (*names, "problems") if settings[name] is not None}
    )
    for name in ("kv_weight", "codi_weight", "kv_warmup", "learning_rate"):
        if not (settings[name] or 0) >= 0:
            raise ValueError(f"{name} is {settings[name]}, expected 0 or more.")
    if not 0 <= settings["kv_end"] <= 1:
        raise ValueError(f"kv_end is {settings['kv_end']}, expected a share from 0 to 1.")
    scale = Scale.current()
    if settings["fp16"] and scale.device == "cpu":
        raise ValueError(
            f"fp16 needs a GPU, but the scale {scale.name} computes on the CPU: leave --fp16 out."
        )
    scale = replace(scale, student=student or scale.student)
    own = SMALL_ALIGNED if scale.name == "tiny" else LARGE_ALIGNED
    settings = own | {name: value for name, value in settings.items() if value is not None}
    return scale, settings | {
        "model_name": scale.student,
        "teacher_model": teachers or [scale.teacher],
    }


def _require_maps(maps: list[str] | None, teachers: list[str], by_likeness: bool) -> None:
    if maps and not by_likeness:
        raise ValueError(
            "layer_mapping_path is given without --use_cka_layer_mapping: give both, or none."
        )
    if maps and len(maps) != len(teachers):
        raise ValueError(
            f"There are {len(teachers)} teachers and {len(maps)} layer maps: give one for each teacher."
        )
    for path in maps or ():
        if not Path(path).is_file():
            raise ValueError(
                f"There is no layer map {path}: make one by `kvlab layer-map --output {path}`."
            )


def _learner(scale: Scale, checkpointing: bool) -> PreTrainedModel:
    student = scale.load("student").float().requires_grad_(True)
    if checkpointing:
        student.gradient_checkpointing_enable()
    return student


def _teachers(scale: Scale, names: Sequence[str]) -> list[Callable[[], Loaded]]:
    """Functions that load them, so that there is one at a time."""
    scales = [replace(scale, teacher=name) for name in names]
    return [lambda one=one: (one.load("teacher"), one.load_tokenizer("teacher")) for one in scales]


def _tasks(settings: Mapping) -> Problems:
    """Problems to learn from, which the seed chooses, and others to be asked, the same for every seed."""
    about, source = settings.get("eval_dataset_name"), settings.get("eval_source")
    if source is not None and about in (None, "lab"):
        held = (
            "the lab makes its problems up"
            if about
            else "problems to be asked are held out of the others"
        )
        raise ValueError(
            f"eval_source is {source!r}, but {held}: leave it out, or give another --eval_dataset_name."
        )
    learned, spare, data = *_solutions(settings), about or settings["dataset_name"]
    if about and about != "lab":
        spare = _solvable(about, source, settings["eval_split"])[: settings["heldout"]]
        if not spare:
            raise ValueError(f"There is no problem to be asked in {source}: give another source.")
    if data == "lab":
        test = corpora.Solutions(settings["heldout"], test=True)
        to_ask = [(own[:1], (extract_answer("number", own[1]["content"]),)) for own, _ in test]
    else:
        to_ask = [(messages(record)[:1], accepted(record)) for record in spare]
    known = {question["content"] for (question,), _ in to_ask}
    learned = [pair for pair in learned if pair[0][0]["content"] not in known]
    _steps(len(learned), settings)
    (own, theirs), (asked, right) = (
        map(list, zip(*pairs, strict=True)) for pairs in (learned, to_ask)
    )
    return Problems(
        own, theirs, asked, right, "number" if data == "lab" else DATA_SETS[data].answer_kind
    )


def _solutions(settings: Mapping) -> tuple[list[tuple[Conversation, Conversation]], list[Record]]:
    """Problems as student and teacher solve them, and records that were held out."""
    data, source, most = settings["dataset_name"], settings.get("source"), settings.get("problems")
    seed, held = settings.get("seed", 0), settings.get("heldout", 0)
    if data == "lab":
        _require_no_source(source)
        return [*corpora.Solutions(most or 600, seed=seed)], []
    records = _solvable(data, source, settings["split"])
    bare = sum(not record.reasoning.strip() for record in records)
    if bare:
        seen = f"{bare} of {len(records)} {data} records have no reasoning, so that they cannot be aligned"
        raise ValueError(f"{seen}: leave them out, or learn from another data set.")
    held = 0 if settings.get("eval_dataset_name") else held
    if len(records) <= held:
        raise ValueError(
            f"There are {len(records)} problems, {held} to hold out: give more, or a smaller heldout."
        )
    chosen = random.Random(seed).sample(
        records[held:], min(most or len(records), len(records) - held)
    )
    return [(messages(record),) * 2 for record in chosen], records[:held]


def _solvable(data: str, source: str | None, split: str) -> list[Record]:
    """Records, each once, in an order that is always the same: many sources go by subject."""
    if source is None:
        raise ValueError(f"There is no source of {data} records: give a file or a name on the hub.")
    records = dict.fromkeys(read_records(data, source, split))
    return random.Random(0).sample([*records], len(records))


def _steps(problems: int, settings: Mapping) -> int:
    batch = settings["batch_size"] * settings["accumulate"]
    if problems < batch:
        raise ValueError(
            f"{problems} problems are less than a batch of {batch}: give more, or smaller batches."
        )
    return settings["epochs"] * (problems // batch)


def teach(
    arm: tuple[bool, bool, str] | None,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Problems,
    teachers: Sequence[Callable[[], Loaded]],
    settings: Mapping,
    folder: Path,
    maps: Sequence[str] | None = None,
    **fit_options,
) -> tuple[list[dict[str, float]], KVAlignmentLoss | None]:
    """Train a student by one arm; a run that was stopped goes on. Its history, and the alignment that learned along.

    Args:
        arm: one of `ALIGNMENTS`.
        teachers: functions that load each with its tokenizer. They are called one after another.
        settings: kv_weight, codi_weight, kv_warmup, kv_end, start, freeze_projectors, epochs,
            batch_size, accumulate, learning_rate, fp16, seed and teacher_model, as for
            `train_aligned`.
        maps: of each teacher, the file of its layer map.
        fit_options: of `kvlab.training.fit`: evaluate, every, ...
    """
    steps = _steps(len(tasks.own), settings)
    names = (
        "batch_size",
        "accumulate",
        "learning_rate",
        "seed",
        "kv_weight",
        "codi_weight",
        "kv_warmup",
        "kv_end",
    )
    options = {name: settings[name] for name in names}
    options |= {
        "steps": steps,
        "precision": "fp16" if settings["fp16"] else "no",
        "shares_every": max(1, steps // 20),
    }
    texts = [segment(tokenizer, conversation) for conversation in tasks.own]
    shape = [settings[name] for name in ("start", "freeze_projectors", "teacher_model")]
    told, mapped = (
        [list(map(Tensor.tolist, text)) for text in texts],
        [Path(path).read_text() for path in maps or ()],
    )
    run = folder / _run_name(student, arm, options, shape, mapped, told, tasks.theirs)
    if arm is None:
        lessons, alignment = Lessons(texts), None
    else:
        lessons, alignment = _listened(
            arm, student, texts, tasks.theirs, teachers, settings, run, maps
        )
    options |= {"checkpoint": run / "checkpoint.safetensors"} | fit_options
    return train_pupil(student, lessons, alignment, **options), alignment


def _listened(
    arm: tuple[bool, bool, str],
    student: PreTrainedModel,
    texts: Sequence[Segmented],
    theirs: Sequence[Conversation],
    teachers: Sequence[Callable[[], Loaded]],
    settings: Mapping,
    run: Path,
    maps: Sequence[str] | None,
) -> tuple[Lessons, KVAlignmentLoss]:
    """What teachers made of the problems, kept on disk, and projectors for it."""
    seen = []
    for number, (load, path) in enumerate(zip_longest(teachers, maps or ())):
        home = run / f"teacher_{number}"
        with PartialState().main_process_first():
            files = [home / f"{start:06}.safetensors" for start in range(0, len(texts), TOGETHER)]
            if not all(file.is_file() for file in files):
                torch.manual_seed(settings["seed"])
                _read_by(arm, student, texts, theirs, *load(), path and Path(path), files)
        seen.append(ConcatDataset([load_seen(file) for file in files]))
    width = student.base_model.layers[0].self_attn.k_proj.out_features
    torch.manual_seed(settings["seed"])
    projectors = [Projector(part[0].keys.shape[-1], width, settings["start"]) for part in seen]
    states = [
        nn.Linear(len(part[0].state.T), student.config.hidden_size, bias=False) for part in seen
    ]
    alignment = KVAlignmentLoss(projectors, states if settings["codi_weight"] else ())
    alignment.requires_grad_(not settings["freeze_projectors"])
    return Lessons(texts, *seen), alignment


def _read_by(
    arm: tuple[bool, bool, str],
    student: PreTrainedModel,
    texts: Sequence[Segmented],
    theirs: Sequence[Conversation],
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path | None,
    files: Sequence[Path],
) -> None:
    """Keep what a teacher makes of problems for a student, some in each file, and a layer map that had to be made."""
    by_likeness, by_segments, wrong = arm
    if wrong == "nothing learned":
        teacher = type(teacher)(teacher.config).to(teacher.device, teacher.dtype).eval()
    layers = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    path = path or files[0].with_name("layer_map.json")
    files[0].parent.mkdir(parents=True, exist_ok=True)
    if by_likeness and path.is_file():
        chosen = load_layer_map(path, *layers).layer_map
    elif by_likeness:
        matrix = _likeness(student, texts[:SAMPLES], teacher, tokenizer, theirs[:SAMPLES])
        chosen, names = (
            layer_map(matrix, min(2, layers[1])),
            [m.config.name_or_path for m in (student, teacher)],
        )
        about = dict(
            zip(("student", "teacher"), names, strict=True), samples=min(SAMPLES, len(texts))
        )
        save_layer_map(path, chosen, **about)
    else:
        chosen = proportional(*layers)
    if wrong == "another problem":
        theirs = [*theirs[len(theirs) // 2 :], *theirs[: len(theirs) // 2]]
    plan = plan_time if by_segments else by_index
    for number, file in enumerate(files):
        part = slice(number * TOGETHER, (number + 1) * TOGETHER)
        if not file.is_file():
            save_seen(file, seen_by(teacher, tokenizer, theirs[part], texts[part], chosen, plan))


def solved(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Problems,
    max_new_tokens: int = 256,
) -> np.ndarray:
    """1 for each problem to be asked whose greedy answer is an accepted one, else 0."""
    said = answers(model, tokenizer, tasks.asked, max_new_tokens, label="problems")
    found = [extract_answer(tasks.kind, text) for text in said]
    right = [
        any(same_answer(tasks.kind, one, a) for a in good)
        for one, good in zip(found, tasks.answers, strict=True)
    ]
    return np.array(right, float)


def alignment_figures(runs: pd.DataFrame) -> list[dict]:
    """Figures of runs with arm, seed, accuracy, seconds and perhaps GB; intervals (95 %) are over seeds.

    `gain_ARM` is its accuracy minus that of ce_only, seed by seed.

    Example:
        >>> rows = [["ce_only", 0, 0.5, 9.0], ["full", 0, 0.75, 10.0]]
        >>> figures = alignment_figures(pd.DataFrame(rows, columns=["arm", "seed", "accuracy", "seconds"]))
        >>> [(f["name"], f["value"]) for f in figures if "accuracy" in f["name"] or "gain" in f["name"]]
        [('accuracy_ce_only', 0.5), ('accuracy_full', 0.75), ('gain_full', 0.25)]
    """
    figures, table = [], runs.pivot(index="seed", columns="arm")
    for score, unit in {"accuracy": "fraction", "seconds": "seconds", "GB": "GB"}.items():
        for arm in runs["arm"].unique() if score in runs else ():
            figures.append(figure(f"{score}_{arm}", table[score][arm], unit, "n is seeds"))
    alone = table["accuracy"].get("ce_only")
    for arm in runs["arm"].unique() if alone is not None else ():
        if arm != "ce_only":
            told = f"accuracy of {arm} minus that of ce_only, seed by seed; n is seeds"
            figures.append(
                figure(f"gain_{arm}", table["accuracy"][arm] - alone, "difference", told)
            )
    return figures


def _table(figures: Sequence[Mapping]) -> str:
    columns = ["value", "low", "high", "n"]
    return pd.DataFrame(figures).set_index("name")[columns].to_string(float_format="{:.3f}".format)


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


_LISTS = {list[str]: str, list[str] | None: str, list[float] | None: float}


class _Parser(ArgumentParser):
    """As jsonargparse has it, but `--flag` alone means true, and a list is texts side by side, not a YAML list."""

    def add_argument(self, *names, **options):
        if options.get("type") is bool:
            options |= {"nargs": "?", "const": True}
        hint = getattr(
            options.get("action"), "_typehint", None
        )  # jsonargparse leaves no other trace of it
        if hint in _LISTS:
            told = {name: options[name] for name in ("default", "help") if name in options}
            names, options = names[:1], told | {"type": _LISTS[hint], "nargs": "+"}
        return super().add_argument(*names, **options)


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Example:
        >>> main(["scale"])  # doctest: +ELLIPSIS
        Scale ...
    """
    models = {"_help": "Make and measure the lab models."} | LAB_COMMANDS
    commands = {"scale": scale, "speculate": speculate, "build-cache": build_cache, "ask": ask}
    commands |= {
        "train-draft": train_draft,
        "distill": distill,
        "eval-compression": eval_compression,
    }
    commands |= {
        "layer-map": map_layers,
        "train-aligned": train_aligned,
        "compare-alignments": compare_alignments,
    }
    commands |= {"train-fuser": train_fuser, "lab": models}
    args = sys.argv[1:] if args is None else args
    args = [_OPTION.sub(lambda name: name[0].replace("-", "_"), arg) for arg in args]
    try:
        auto_cli(commands, args, parser_class=_Parser)
    except (
        ValueError,
        OSError,
        FloatingPointError,
    ) as error:  # what the user can mend needs no traceback
        raise SystemExit(f"kvlab: {error}") from error


if __name__ == "__main__":
    main()
