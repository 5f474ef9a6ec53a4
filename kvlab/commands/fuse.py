"""`kvlab train-fuser`: a C2C fuser from a sharer to a receiver."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kvlab import draft as drafts
from kvlab.commands.shared import (
    DATA,
    Conversation,
    figures_table,
    load_records,
    load_shared_tokenizer,
    require_counts,
    require_no_source,
    run_name,
    write_json,
)
from kvlab.draft import Example
from kvlab.evaluate import figure, run_info
from kvlab.fuse import KEYS, Aligned, Fuser, Size
from kvlab.fuse import Lesson as FuserLesson
from kvlab.fuse import Settings as FuserSettings
from kvlab.fuse import train as train_on
from kvlab.generation import encode
from kvlab.lab import corpora
from kvlab.layers import first_aligned, last_aligned, proportional
from kvlab.models import fingerprint
from kvlab.records import messages
from kvlab.scale import Scale
from kvlab.speculate import FusedProposer, ModelProposer, generate, summarize

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
    tokenizer, texts, checks = load_shared_tokenizer(scale), *_requests(settings)
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
        figures_table(figures)
        if figures
        else "Each held-out prompt is answered by one token, so that nothing was guessed."
    )
    result = {
        "settings": settings,
        "gates": fuser.gate_logits().tolist(),
        "parameters": fuser.num_parameters(),
    }
    result |= {"figures": figures, **run_info(), "history": history}
    print(write_json(output_dir / "training.json", result))


def _require_fusible(settings: Mapping) -> None:
    names = ("prompts", "heldout", "gamma", "steps", "batch_size", "accumulate")
    require_counts(**{name: settings[name] for name in names if name in settings})
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
        require_no_source(source)
        held = [*corpora.Requests(settings["heldout"], test=True)]
        chosen = [*corpora.Requests(most or 4000, seed=seed)]
    else:
        records = load_records(data, source, settings["split"])
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
    run = folder / run_name(target, *told, [e.input_ids.tolist() for e in said])
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
