"""`kvlab train-draft`: a draft from the first or sampled layers of a target, with knowledge."""

from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState

from kvlab import draft as drafts
from kvlab.commands import shared
from kvlab.draft import DraftExample, DraftSettings, KnowledgeDraft
from kvlab.evaluate import figure, run_info
from kvlab.files import require_writable
from kvlab.generation import encode
from kvlab.knowledge import KnowledgeCache
from kvlab.lab import corpora
from kvlab.losses import require_known_losses
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
    base_model: str | None = None,
    enable_thinking: bool = False,
    **options,
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
        questions: More questions, one per line, or JSON: texts, or rows with "turns", of which the
            first is used.
        heldout: Fraction of the questions (of the file's, if there is one) to hold out, at least
            one question. They decide which weights are kept.
        threshold: Minimum cosine similarity of a retrieved item.
        other_prompts: File of prompts to learn from without knowledge.
        made_up: Number of records to make up, for a draft that reads.
        max_new_tokens: Maximum length of an answer.
        losses: Weight of each loss (ce, kl, reverse_kl, tv, log_alpha, lk_hybrid), e.g.
            --losses.kl 1 --losses.ce 0.5; without ce the draft learns only from the model's own
            answers. Default: ce 1, and kl 0.8, tv 0.3 for kv, kl 0.5, tv 0.3 for others.
        base_model: Model that the store was built with. Default: the scale's target.
        enable_thinking: Let the model think before it answers, if its template has this option.
        **options: Of `kvlab.draft.DraftSettings`.
    """
    shared.require_store(store, " --keep kv hidden")
    reads = None if knowledge == "none" else knowledge
    weights = dict(drafts.default_loss_weights(reads, True) if losses is None else losses)
    require_known_losses(weights)
    settings = DraftSettings(loss_weights=weights, folder=None, **options)
    if max_new_tokens < 2:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 2.")
    others = read_prompts(other_prompts) if other_prompts else []
    more = read_prompts(questions) if questions else []
    require_writable(output_dir / "training.json")
    scale = shared.scale_with_target(base_model, enable_thinking=enable_thinking)
    state = PartialState(cpu=scale.device == "cpu")  # before loading: each process gets its GPU
    target = scale.load("target")
    tokenizer = scale.load_tokenizer("target")
    known = shared.open_store(store, target, scale, reads, embed=reads is not None)
    others = _questions_that_fit(known, others, max_new_tokens)
    pool, held = _split(
        known, _questions_that_fit(known, more, max_new_tokens), heldout, settings.seed
    )
    torch.manual_seed(settings.seed)
    draft = KnowledgeDraft.cut(target, layers, knowledge=reads, transitions=transitions).float()
    items = [shared.find_item(known, text, threshold) if reads else None for text in pool]
    answers = drafts.attach(draft, known, _answers(known, pool, output_dir, max_new_tokens), items)
    checks = [answers[pool.index(text)] for text in held]
    examples = [answers[i] for i, text in enumerate(pool) if text not in held]
    practice = []
    if "ce" in weights:  # the other losses compare with the model's own distributions
        examples += _stored_answers(draft, known, [i for i in known if i.question not in held])
        if reads and made_up:
            practice = _made_up_answers(draft, known, output_dir / "made_up", made_up)
    examples = drafts.corrupt_knowledge(examples, seed=settings.seed)
    examples += [*_answers(known, others, output_dir, max_new_tokens), *practice]
    training = asdict(settings)
    shape = (draft.config.layers, reads, transitions)
    run = shared.run_name(target, shape, training, _describe([*examples, *checks]))
    training["folder"] = output_dir / run
    if state.is_main_process:
        print(f"{len(examples)} answers to learn from, {len(practice)} of them made up.")
    history, arms = drafts.train_and_measure(draft, target, examples, checks, **training)
    if not state.is_main_process:
        return
    _save(draft, tokenizer, target.config.vocab_size, output_dir)
    parameters = {"draft": draft.num_parameters(), "target": target.num_parameters()}
    result = {"settings": shared.command_settings(base_model=scale.target, losses=weights)}
    result |= {"heldout": held, "parameters": parameters, "figures": _figures(arms), **run_info()}
    print("Parameters: draft {draft:,}, target {target:,}.".format(**parameters))
    print(shared.write_json(output_dir / "training.json", result | {"history": history}))


def _questions_that_fit(store: KnowledgeCache, texts: list[str], max_new_tokens: int) -> list[str]:
    prompts = [encode(store.tokenizer, [{"role": "user", "content": text}]) for text in texts]
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    return shared.leave_out_long([store.model], texts, lengths)


def _split(store: KnowledgeCache, more: list[str], fraction: float, seed: int) -> tuple:
    """All questions, and those to hold out, which are of the file if there is one."""
    stored = [item.question for item in store]
    pool = list(dict.fromkeys([*stored, *more]))
    heldout = shared.sample_heldout(list(dict.fromkeys(more or stored)), fraction, seed)
    if len(heldout) >= len(pool):
        counts = f"There are {len(pool)} questions, {len(heldout)} to hold out"
        raise ValueError(f"{counts}: add items to the store, or give --questions.")
    return pool, heldout


def _answers(store: KnowledgeCache, texts: list[str], *options) -> list[DraftExample]:
    """The model's own answers."""
    prompts = [encode(store.tokenizer, [{"role": "user", "content": text}]) for text in texts]
    return drafts.generate_targets(store.model, store.tokenizer, prompts, *options)


def _stored_answers(draft: KnowledgeDraft, store: KnowledgeCache, items) -> list[DraftExample]:
    examples = drafts.item_examples(items)
    return drafts.attach(draft, store, examples, items) if draft.config.knowledge else examples


def _made_up_answers(draft, store: KnowledgeCache, folder: Path, count: int) -> list[DraftExample]:
    """Answers that a draft can only read, in a store like the given one."""
    parts = corpora.made_up(count), store.model, store.tokenizer
    practice = KnowledgeCache.build(folder, *parts, keep=store.keep, dtype=store.dtype)
    return _stored_answers(draft, practice, practice.items[:count])


def _describe(examples: list[DraftExample]) -> list:
    """What distinguishes the examples of one run from those of another."""
    described = []
    for example in examples:
        shape = example.knowledge is not None and list(example.knowledge.shape)
        described.append([example.input_ids.tolist(), shape])
    return described


def _save(draft: KnowledgeDraft, tokenizer, vocab_size: int, folder: Path) -> None:
    """Save a draft and, if it is a plain model, that model too."""
    draft.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if draft.compilable:
        drafts.export(draft, folder / "plain", tokenizer, vocab_size)


def _figures(arms: dict[str, drafts.Acceptance]) -> list[dict]:
    """Print and return the measured acceptance."""
    figures = []
    for arm, acceptance in arms.items():
        for way, values in acceptance._asdict().items():
            figures.append(figure(f"{arm}, {way}", values, "fraction", ACCEPTED))
    print(f"{ACCEPTED.capitalize()} (95 % intervals):", shared.figures_table(figures), sep="\n")
    return figures
