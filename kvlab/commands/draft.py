"""`kvlab train-draft`: a draft from the first or sampled layers of a target, with knowledge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlab import draft as drafts
from kvlab.commands.shared import (
    find_item,
    open_store,
    require_store,
    run_name,
    sample_heldout,
    scale_with_target,
    write_json,
)
from kvlab.draft import Accepted, Example, KnowledgeDraft
from kvlab.evaluate import figure, run_info
from kvlab.generation import encode
from kvlab.knowledge import Item, KnowledgeCache
from kvlab.lab import corpora
from kvlab.losses import require_known_losses
from kvlab.records import read_prompts


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
    require_store(store, " --keep kv hidden")
    reads = None if knowledge == "none" else knowledge
    shares = _shares(losses, reads)
    if max_new_tokens < 2:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, expected at least 2: the model gives the first itself."
        )
    asked, others = (read_prompts(path) if path else [] for path in (questions, other_prompts))
    scale = scale_with_target(base_model)
    rate = learning_rate if learning_rate is not None else 1e-3 if scale.name == "tiny" else 3e-5
    settings |= {"base_model": scale.target, "losses": shares, "learning_rate": rate}
    main = PartialState(
        cpu=scale.device == "cpu"
    ).is_main_process  # before loading: gives each process its own GPU
    parts = scale.load("target"), scale.load_tokenizer("target")
    known = open_store(store, *parts, scale, reads, embed=reads is not None)
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
        print(write_json(output_dir / "training.json", result))


def _shares(losses: Mapping[str, float] | None, reads: str | None) -> dict[str, float]:
    """Losses as asked for, or as in the sources, which have no given answers for a draft that reads keys and values."""
    shares = dict(losses if losses is not None else drafts.source_shares(reads, given=True))
    require_known_losses(shares)
    return shares


def _split(
    questions: Sequence[str], more: Sequence[str], share: float, seed: int
) -> tuple[list[str], list[str]]:
    """All questions, and those held out of them: a share of `more` if there are any, else of all."""
    pool, source = ([*dict.fromkeys(texts)] for texts in ([*questions, *more], more or questions))
    held = sample_heldout(source, share, seed)
    if len(held) >= len(pool):
        raise ValueError(
            f"There are {len(pool)} questions, {len(held)} to hold out: add items to the store, or give --questions."
        )
    return pool, held


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
    items = [find_item(store, question, threshold) if reads else None for question in questions]
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
    run = folder / run_name(target, shape, options, texts)
    history = drafts.train(draft, target, examples, checks, folder=run, **options)
    drafts.cast(draft, target.dtype)  # as it is saved
    measured["trained"] = drafts.acceptance(draft, target, checks)
    if draft.config.knowledge:
        measured["trained, without knowledge"] = drafts.acceptance(draft, target, alone)
    return history, measured


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
        **run_info(),
    }
