"""`kvlab train-draft`: a draft from the first or sampled layers of a target, with knowledge."""

from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState

from kvlab import draft as drafts
from kvlab.commands.shared import (
    figures_table,
    find_item,
    open_store,
    require_counts,
    require_store,
    run_name,
    sample_heldout,
    scale_with_target,
    write_json,
)
from kvlab.draft import DraftExample, KnowledgeDraft
from kvlab.evaluate import circumstances, figure
from kvlab.generation import encode
from kvlab.knowledge import Item, KnowledgeCache
from kvlab.lab import corpora
from kvlab.losses import require_known
from kvlab.records import read_prompts

ACCEPTED = "fraction of guesses accepted on held-out questions, by which the weights were chosen"


def train_draft_command(
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
    """Cut a small draft from a model, and train it to guess that model's answers with a store's knowledge.

    The draft learns from the model's own answers to the store's questions (and to those of a file),
    from the stored answers, and from made-up records, which it can only read. Then the fraction of
    its guesses that the model would accept is measured on held-out questions, for the untrained
    draft, the trained one, and the trained one without knowledge. OUTPUT_DIR holds the draft, all
    results (training.json) and, if the draft is a plain model, that model (plain). The same command
    resumes a stopped run from the checkpoint in OUTPUT_DIR/run-NAME, which can be deleted
    afterwards; with other settings it starts again.

    Args:
        store: Folder that `kvlab build-cache` made; vectors need one built with --keep hidden.
        output_dir: Folder of the draft.
        knowledge: How the draft reads: vector (last hidden states), kv (keys and values), prefix
            (the same ones before its text, without new parameters), or none.
        layers: Layers of the model to copy: first:N, uniform:N, or indices, e.g. --layers
            '[0, 5, 11]'.
        transitions: Put a small network between layers, in place of those left out.
        questions: More questions, one per line, or JSON lines with "turns", of which the first is
            used.
        heldout: Fraction of the questions (of the file's, if there is one) to hold out, at least
            one question. They decide which weights are kept.
        threshold: Minimum cosine similarity of a retrieved item.
        other_prompts: File of prompts to learn from without knowledge.
        made_up: Number of records to make up, for a draft that reads.
        max_new_tokens: Maximum length of an answer.
        losses: Weight of each loss (ce, kl, reverse_kl, tv, log_alpha, lk_hybrid), e.g.
            --losses.kl 1 --losses.ce 0.5; without ce the draft learns only from the model's own
            answers. Default: ce 1, and kl 0.8, tv 0.3 for kv, kl 0.5, tv 0.3 for others.
        epochs: Passes over all examples.
        batch_size: Examples per batch.
        learning_rate: Default: 1e-3 at scale tiny, else 3e-5.
        accumulate: Batches per optimizer step.
        precision: Precision of the arithmetic; weights are trained in float32.
        seed: Random seed (held-out questions, shuffling, corrupted knowledge).
        base_model: Model that the store was built with. Default: the scale's target.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    require_store(store, " --keep kv hidden")
    require_counts(epochs=epochs, batch_size=batch_size, accumulate=accumulate)
    reads = None if knowledge == "none" else knowledge
    loss_weights = drafts.default_loss_weights(reads, True) if losses is None else dict(losses)
    require_known(loss_weights)
    if max_new_tokens < 2:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, expected at least 2: the model itself gives the first."
        )
    more_questions = read_prompts(questions) if questions else []
    others = read_prompts(other_prompts) if other_prompts else []
    scale = scale_with_target(base_model)
    rate = learning_rate if learning_rate is not None else 1e-3 if scale.name == "tiny" else 3e-5
    settings |= {"base_model": scale.target, "losses": loss_weights, "learning_rate": rate}
    main = PartialState(cpu=scale.device == "cpu").is_main_process  # gives each process its GPU
    target = scale.load("target")
    tokenizer = scale.load_tokenizer("target")
    known = open_store(store, target, tokenizer, scale, reads, embed=reads is not None)
    stored = [item.question for item in known]
    pool = [*dict.fromkeys([*stored, *more_questions])]
    held = sample_heldout([*dict.fromkeys(more_questions or stored)], heldout, seed)
    if len(held) >= len(pool):
        raise ValueError(
            f"There are {len(pool)} questions, {len(held)} to hold out: add items to the store, or "
            "give --questions."
        )
    torch.manual_seed(seed)
    draft = KnowledgeDraft.cut(target, layers, knowledge=reads, transitions=transitions)
    drafts.cast(draft, torch.float32)

    def answer(texts: list[str]) -> list[DraftExample]:
        prompts = [encode(tokenizer, [{"role": "user", "content": text}]) for text in texts]
        return drafts.generate_targets(target, tokenizer, prompts, output_dir, max_new_tokens)

    def stored_answers(source: KnowledgeCache, items: list[Item]) -> list[DraftExample]:
        examples = drafts.item_examples(items)
        return drafts.attach(draft, source, examples, items) if reads else examples

    items = [find_item(known, text, threshold) if reads else None for text in pool]
    answers = drafts.attach(draft, known, answer(pool), items)
    checks = [answers[pool.index(text)] for text in held]
    examples = [answers[i] for i, text in enumerate(pool) if text not in held]
    free, practice = answer(others), []
    if "ce" in loss_weights:  # the other losses compare with the model's own distributions
        examples += stored_answers(known, [i for i in known if i.question not in held])
        if reads and made_up:
            records = corpora.made_up(made_up)
            options = {"keep": known.keep, "dtype": known.dtype}
            folder = output_dir / "made_up"
            invented = KnowledgeCache.build(folder, records, target, tokenizer, **options)
            practice = stored_answers(invented, invented.items[:made_up])
    if main:
        print(
            f"To learn from: {len(examples)} answers to questions, {len(free)} to other prompts, "
            f"{len(practice)} made-up records. Held out: {len(checks)} questions; items are found "
            f"for {sum(e.knowledge is not None for e in checks)}."
        )
    examples = [*drafts.corrupt_knowledge(examples, seed=seed), *free, *practice]
    options = {"loss_weights": loss_weights, "epochs": epochs, "batch_size": batch_size}
    options |= {"learning_rate": rate, "accumulate": accumulate, "precision": precision}
    options |= {"seed": seed}
    texts = [
        [e.input_ids.tolist(), e.knowledge is not None and list(e.knowledge.shape)]
        for e in [*examples, *checks]
    ]
    run = run_name(target, [draft.config.layers, reads, transitions], options, texts)
    options["folder"] = output_dir / run
    history, arms = drafts.train_and_measure(draft, target, examples, checks, **options)
    if not main:
        return
    draft.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    if draft.compilable:
        drafts.export(draft, output_dir / "plain", tokenizer, target.config.vocab_size)
    figures = []
    for arm, acceptance in arms.items():
        for way, values in acceptance._asdict().items():
            figures.append(figure(f"{arm}, {way}", values, "fraction", ACCEPTED))
    parameters = {"draft": draft.num_parameters(), "target": target.num_parameters()}
    print(f"{ACCEPTED.capitalize()} (95 % intervals):", figures_table(figures), sep="\n")
    print("Parameters: draft {draft:,}, target {target:,}.".format(**parameters))
    result = {"settings": settings, "heldout": held, "figures": figures, "parameters": parameters}
    result |= {**circumstances(), "history": history}
    print(write_json(output_dir / "training.json", result))
