"""`kvlab distill` and `kvlab eval-compression`: KV-Distill, and the cost of smaller caches."""

import random
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from kvlab import distill as chapter
from kvlab.commands import shared as common
from kvlab.compress import AWARE, METHODS, REPEATED, SCOPES
from kvlab.distill import FreeDistiller, KVDistiller, ScoreDataset, fit_scores, own_score
from kvlab.evaluate import run_info
from kvlab.files import naming, read_json, require_writable
from kvlab.lab.corpora import Readings
from kvlab.speculate import generate

LONG = ("self_instruct", "p3", "long_alpaca")  # data whose answers are texts, not spans


def distill(
    data: Literal[common.DATA] = "lab",
    source: str | None = None,
    split: str = "train",
    output_dir: Path = Path("distiller"),
    width: int = 1024,
    row: int = 1536,
    scope: Literal["token", "model"] = "token",
    score_steps: int = 300,
    retention: list[float] | None = None,
    forward_share: float = 0.6,
    instruction: float = 0.0,
    questions: int = 8,
    heldout: float = 0.1,
    contexts: int = 64,
    steps: int = 1000,
    batch_size: int = 32,
    learning_rate: float = 5e-5,
    accumulate: int = 1,
    every: int = 200,
    precision: Literal["no", "fp16", "bf16"] = "no",
    seed: int = 0,
    base_model: str | None = None,
    enable_thinking: bool = False,
    **options,
) -> None:
    """Train a KV-Distill compressor: what to keep of a context, and what to write into it.

    Then answers to questions about held-out contexts are compared, with the full cache and with a
    half, a quarter and a tenth of it. OUTPUT_DIR holds the distiller and all results
    (training.json). The same command resumes a run that was stopped, from the checkpoint in
    OUTPUT_DIR/run-NAME, which can be deleted afterwards; with other settings it starts anew.

    Args:
        data: lab (generated passages without end) or records of squad, quality, self_instruct, p3
            or long_alpaca.
        source: Of records: a file as its authors published it, or a name on the Hugging Face hub.
        split: Part of the hub's data set; a file is read as a whole.
        output_dir: Folder of the distiller.
        width: Width of the scorer's hidden layer.
        row: Longer contexts are read in chunks of this many tokens, which do not attend to each
            other.
        scope: Where entries compete: "token" keeps the same tokens in all heads and layers, as in the
            paper; "model" scores each layer and head, with one budget over all of them. Its scores
            learn those of KVzip first.
        score_steps: Optimizer steps of that, with at most 1,000 contexts.
        retention: Bounds of the fraction to keep, drawn for each batch. Default: 0.001 0.8.
        forward_share: Weight of KL(p||q) in the loss; KL(q||p) has the rest.
        instruction: Weight of the questions' tokens in the loss; answers have 1.
        questions: Most questions about one context in one example, and in the comparison.
        heldout: Fraction of the contexts of records to hold out; at least one. The lab has test
            passages.
        contexts: Most contexts in the comparison.
        steps: Optimizer steps.
        batch_size: Contexts per batch.
        learning_rate: Peak learning rate.
        accumulate: Batches per optimizer step.
        every: Optimizer steps between checkpoints; 0: only at the end and on Ctrl-C.
        precision: Precision of the arithmetic in training; adapters and scorer are in float32.
        seed: Random seed (held-out contexts, initialization, order, retention).
        base_model: The model whose cache is compressed: a lab model, a hub name or a folder.
            Default: the scale's target.
        enable_thinking: Let the model think before it answers, if its template has this option.
        **options: Of `kvlab.distill.KVDistiller`.
    """
    scale = common.scale_with_target(base_model, enable_thinking=enable_thinking)
    counts = {"steps": steps, "batch_size": batch_size, "accumulate": accumulate}
    retention = retention or [0.001, 0.8]
    if len(retention) != 2 or retention[0] > retention[1]:
        raise ValueError(f"retention is {retention}, expected two fractions in (0, 1], in order.")
    count = steps * batch_size * accumulate
    readings, test_records = _readings(
        data, source, split, count, contexts, questions, heldout, seed
    )
    if len(readings) < batch_size:
        raise ValueError(f"{len(readings)} examples are fewer than a batch of {batch_size}.")
    require_writable(output_dir / "training.json")
    state = PartialState(cpu=scale.device == "cpu")  # gives each process its own GPU
    model, tokenizer = scale.load("target"), scale.load_tokenizer("target")
    test_records = _readable(model, tokenizer, test_records, 64)
    torch.manual_seed(seed)
    if scope == "model":
        shape = {"scorer_hidden_size": width, "chunk_size": row} | options
        distiller = FreeDistiller(model, **shape)
    else:
        distiller = KVDistiller(model, scorer_hidden_size=width, chunk_size=row, **options)
    training = counts | {"retention": retention, "forward_share": forward_share}
    training |= {"learning_rate": learning_rate, "precision": precision, "seed": seed}
    settings = asdict(distiller.settings)
    texts = instruction, enable_thinking, repr(readings), scope, score_steps
    run = output_dir / common.run_name(model, settings, training, *texts)
    training |= {"checkpoint": run / "checkpoint.safetensors", "every": every or steps}
    state.print(f"Training: {len(readings)} examples. Held out: {_count(test_records)}.")
    if scope == "model":
        _fit_scores(distiller, tokenizer, readings, training | {"steps": score_steps})
    examples = chapter.DistillDataset(tokenizer, readings, instruction)
    history = chapter.train_distiller(distiller, examples, **training)
    if state.is_main_process:
        settings |= {"base_model": scale.target, "retention": retention}
        comparison = {"long_answers": data in LONG, "seed": seed}
        parts = test_records, contexts, settings, history
        _save_compared(distiller, tokenizer, output_dir, *parts, **comparison)


def _save_compared(
    distiller, tokenizer, output_dir, records, contexts, settings, history, **options
) -> None:
    """Write a distiller, and how it answers about held-out contexts."""
    distiller.save_pretrained(output_dir)
    arms = ["distill"], [0.5, 0.25, 0.1]
    options["distiller"] = distiller
    figures = _compare(distiller.model, tokenizer, records[:contexts], *arms, **options)
    result = {"settings": common.command_settings(**settings)}
    result["heldout"] = [common.short_digest(rows[0].context) for rows in records]
    result |= {"figures": figures, **run_info(), "history": history}
    print(common.write_json(output_dir / "training.json", result))


def _readings(
    data, source, split, count: int, contexts: int, questions: int, heldout: float, seed: int
) -> tuple:
    """Contexts with questions and answers to train on, and the records of held-out contexts."""
    if data == "lab":
        test_records = common.lab_passages(contexts, questions, seed, source)
        return Readings(count, questions=questions, seed=seed), test_records
    return _split_records(common.load_records(data, source, split), heldout, questions, seed)


def _fit_scores(distiller, tokenizer, readings, training: dict) -> None:
    """Fit the scorer to KVzip's scores of the contexts, and freeze it."""
    contexts = [readings[i][0] for i in range(min(len(readings), 1000))]
    examples = ScoreDataset(distiller.model, tokenizer, contexts, distiller.settings.sinks)
    names = ("steps", "batch_size", "accumulate", "precision", "seed", "every")
    options = {name: training[name] for name in names}
    options["checkpoint"] = training["checkpoint"].with_name("scores.safetensors")
    fit_scores(distiller, examples, **options)
    distiller.scorer.requires_grad_(False)


def _split_records(records: dict[str, list], heldout: float, questions: int, seed: int) -> tuple:
    """Contexts with questions and answers to train on, and the records of held-out contexts."""
    heldout_contexts = common.sample_heldout([*records], heldout, seed)
    readings = []
    for context, rows in records.items():
        if context in heldout_contexts:
            continue
        turns = [(record.question, record.answer) for record in rows]
        for start in range(0, len(turns), questions):
            readings.append((context, turns[start : start + questions]))
    return readings, [records[context][:questions] for context in heldout_contexts]


def _count(contexts: common.Contexts) -> str:
    return f"{len(contexts)} contexts with {sum(map(len, contexts))} questions"


def eval_compression(
    distiller: Path | None = None,
    data: Literal[common.DATA] = "lab",
    source: str | None = None,
    split: str = "validation",
    contexts: int = 64,
    questions: int = 8,
    methods: list[str] | None = None,
    retention: list[float] | None = None,
    scope: Literal[SCOPES] = "head",
    sinks: int = 4,
    max_new_tokens: int = 64,
    save_results: bool = False,
    output_dir: Path = Path("results"),
    seed: int = 0,
    base_model: str | None = None,
    stop: list[str] | None = None,
    enable_thinking: bool = False,
) -> None:
    """Compare a model's answers given compressed caches, by several methods and of several sizes.

    Each context is compressed, then its questions are answered with the smaller cache. Methods that
    see a question before they compress serve this question only; they have a table of their own.
    Intervals (95 %) are over contexts, which weigh the same. If the distiller was trained on the
    same records, only contexts that were held out are used. Contexts that are longer than the
    model reads (with their repetition, for kvzip) are left out, with a count. For SQuAD v2, scores of questions with and without an
    answer (HasAns, NoAns) are added; without one, only an empty answer is right.

    Args:
        distiller: Folder that `kvlab distill` made. Default: only the other methods are compared.
        data: lab (generated test passages) or records of squad, quality, self_instruct, p3 or
            long_alpaca.
        source: Of records: a file as its authors published it, or a name on the Hugging Face hub.
        split: Part of the hub's data set; a file is read as a whole.
        contexts: Most contexts to read.
        questions: Most questions about each.
        methods: Some of distill, random, sinks_recent, h2o, snapkv, key_norm, key_norm_reversed,
            tova, keydiff, expected_attention, compactor, kvzip, kvzip_layer, kvzip_uniform,
            kvzip_plus, attention_matching, h2o_aware and snapkv_aware, e.g. --methods distill h2o,
            or a score of your own, --methods my_module:my_score. Default: all.
        retention: Fractions of a context's entries to keep, e.g. --retention 0.5 0.1. Default: 1
            0.5 0.25 0.1 0.05 0.02.
        scope: Where entries compete for the budget: within each head, each layer or the whole
            model, or as tokens that all heads and layers keep; kvzip and distill have their own.
        sinks: Number of first tokens that always stay, of expected_attention and kvzip.
        max_new_tokens: Tokens per answer.
        save_results: Write a JSON file with settings and figures, after each context.
        output_dir: Folder of that file.
        seed: Random seed (choice of contexts, method random).
        base_model: The model that answers. Default: the scale's target.
        stop: Strings that end an answer, such as --stop "Question:"; they are cut off.
        enable_thinking: Let the model think before it answers, if its template has this option.
    """
    scale = common.scale_with_target(base_model, enable_thinking=enable_thinking)
    choices = [*METHODS, *REPEATED, "attention_matching", *AWARE]
    choices = choices if distiller is None else ["distill", *choices]
    methods = list(dict.fromkeys(methods or choices))  # each once
    for name in methods:
        if ":" in name:
            own_score(name)
        elif name not in choices:
            expected = f"expected some of {', '.join(choices)} (distill needs a distiller)"
            raise ValueError(f"There is no method {name}: {expected}.")
    retention = retention or [1.0, 0.5, 0.25, 0.1, 0.05, 0.02]
    path = common.timed_name(output_dir, "eval_compression") if save_results else None
    if path:
        require_writable(path)
    if data == "lab":
        records = common.lab_passages(contexts, questions, seed, source)
    else:
        records = common.load_records(data, source, split, unanswerable=True)
        records = _test_records(records, distiller)
        sample = random.Random(seed).sample([*records], min(contexts, len(records)))
        records = [records[context][:questions] for context in sample]
    model, tokenizer = scale.load("target"), scale.load_tokenizer("target")
    repeated = not {*REPEATED, "attention_matching"}.isdisjoint(methods)
    records = _readable(model, tokenizer, records, max_new_tokens, repeated)
    print(f"Comparing answers on: {_count(records)}.")
    resolved = {"base_model": scale.target, "methods": methods, "retention": retention}
    settings = common.command_settings(**resolved)
    if distiller is not None:
        distiller = KVDistiller.from_pretrained(distiller, model)
    options = {"distiller": distiller, "scope": scope, "sinks": sinks, "long_answers": data in LONG}
    options["seed"] = seed
    options |= {"max_new_tokens": max_new_tokens, "stop": stop or ()}
    result = {"settings": settings, **run_info()}

    def keep(scores: pd.DataFrame) -> None:
        figures = chapter.compression_figures(scores)
        done = {"contexts": scores["context"].nunique(), "figures": figures}
        common.write_json(path, result | done)

    options["keep"] = keep if path else None
    _compare(model, tokenizer, records, methods, retention, **options)
    if path:
        print(path)


def _readable(model, tokenizer, contexts: list, max_new_tokens: int, repeated=False) -> list:
    """The records of contexts that the model can read with each question and its answer.

    Args:
        repeated: with the repetition of the context, too.
    """
    lengths = []
    for records in contexts:
        questions = [chapter.encode_question(tokenizer, record) for record in records]
        texts = [len(q.question) + max(max_new_tokens, *map(len, q.answers)) for q in questions]
        if repeated:
            texts += [text.input_ids.shape[1] for text in questions[0].repeat]
        lengths.append(questions[0].context.shape[1] + max(texts))
    return common.leave_out_long([model], contexts, lengths)


def _test_records(records: dict[str, list], distiller: Path | None) -> dict[str, list]:
    """The records held out of the distiller's training, or all if it saw none of them."""
    training = distiller and distiller / "training.json"
    if not training or not training.is_file():
        return records
    digests = read_json(training)
    with naming(training):
        digests = digests["heldout"]
    heldout = {c: rows for c, rows in records.items() if common.short_digest(c) in digests}
    return heldout or records


def _compare(
    model, tokenizer, records, methods, retention, seed, max_new_tokens=64, keep=None, **options
) -> list[dict]:
    """Print a table of methods that do not know the question and one of those that do.

    `keep` gets the scores so far after each context.
    """
    torch.manual_seed(seed)
    options["generate"] = partial(generate, model, max_new_tokens=max_new_tokens)
    parts = []
    for number, rows in enumerate(tqdm(records, desc="contexts")):
        part = chapter.compression_scores(model, tokenizer, [rows], methods, retention, **options)
        parts.append(part.assign(context=number))
        scores = pd.concat(parts, ignore_index=True)
        if keep:
            keep(scores)
    figures = chapter.compression_figures(scores)
    table = pd.DataFrame(figures)
    table["cell"] = table.astype({"low": float, "high": float}).apply(
        "{value:.3f} [{low:.3f}, {high:.3f}]".format_map, axis=1
    )
    table = table.set_index(["method", "retention", "score"])["cell"].unstack(sort=False)
    method = table.index.get_level_values("method")
    tables = {
        "Compressed without the question": table[~method.isin(AWARE)],
        "Compressed for one known question": table[method.isin([*AWARE, "full"])],
    }
    for title, part in tables.items():
        if len(part) > 1:
            print(f"\n{title} (95 % intervals over contexts):", part.to_string(), sep="\n")
    return figures
