"""`kvlab distill` and `kvlab eval-compression`: KV-Distill, and what smaller caches cost."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlab import compress
from kvlab.cache import Prefix, nbytes, prefill
from kvlab.commands.shared import (
    DATA,
    Contexts,
    lab_passages,
    load_records,
    require_counts,
    run_name,
    sample_heldout,
    scale_with_target,
    short_digest,
    write_json,
)
from kvlab.compress import AWARE, KVDistiller
from kvlab.evaluate import exact_match, f1, figure, log_likelihoods, rouge_l, run_info
from kvlab.lab import corpora
from kvlab.records import Record
from kvlab.speculate import generate

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
    scale = scale_with_target(base_model)
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
    texts = vars(lessons) if data == "lab" else [short_digest(str(lesson)) for lesson in lessons]
    run = output_dir / run_name(model, asdict(distiller.settings), options, instruction, texts)
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
            "heldout": [] if data == "lab" else [short_digest(r[0].context) for r in checks],
        }
        result |= {
            "figures": _compared(scores, ["exact_match", "f1"]),
            **run_info(),
            "history": history,
        }
        print(write_json(output_dir / "training.json", result))


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
    require_counts(**counts)
    n, questions, batch, steps, accumulate = counts.values()
    data, source, seed = settings["data"], settings.get("source"), settings["seed"]
    if data == "lab":
        held = lab_passages(n, questions, seed, source)
        return corpora.Readings(steps * batch * accumulate, questions=questions, seed=seed), held
    records = load_records(data, source, settings["split"])
    held = dict.fromkeys(sample_heldout([*records], settings["heldout"], seed))
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
    scale = scale_with_target(base_model)
    methods = _known_methods(methods, distiller)
    retention = retention or [1.0, 0.5, 0.25, 0.1, 0.05, 0.02]
    settings |= {"base_model": scale.target, "methods": methods, "retention": retention}
    require_counts(contexts=contexts, questions=questions, max_new_tokens=max_new_tokens)
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
    result = {"settings": settings, "figures": _compared(scores), **run_info()}
    if save_results:
        print(
            write_json(output_dir / f"eval_compression_{datetime.now():%Y%m%d_%H%M%S}.json", result)
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
        return lab_passages(contexts, questions, seed, source)
    records = load_records(data, source, split)
    if distiller and (distiller / "training.json").is_file():
        held = {*json.loads((distiller / "training.json").read_text("utf-8"))["heldout"]}
        records = {c: rows for c, rows in records.items() if short_digest(c) in held} or records
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
        >>> from kvlab import lab
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
        prefix = prefill(model, context)
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
