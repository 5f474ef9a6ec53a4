"""`kvlab train-fuser`: a C2C fuser from a sharer to a receiver."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kvlab import draft as drafts
from kvlab.commands import shared
from kvlab.evaluate import figure, run_info
from kvlab.files import require_writable
from kvlab.fuse import Fuser, FuserArm, FuserExample
from kvlab.models import fingerprint
from kvlab.speculate import FusedProposer, ModelProposer, generate, summarize


def train_fuser_command(
    output_dir: Path = Path("fuser"),
    data: Literal[shared.DATA] = "lab",
    source: str | None = None,
    split: str = "train",
    prompts: int | None = None,
    heldout: int = 40,
    max_new_tokens: int = 128,
    no_decode_fusion: bool = False,
    gamma: int = 4,
    every: int = 200,
    base_model: str | None = None,
    teacher_model: str | None = None,
    enable_thinking: bool = False,
    **options,
) -> None:
    """Train a fuser from a large model's cache to a small model's (Cache-to-Cache).

    The large model answers prompts. The fuser learns to make these answers likely for the small
    model, which reads the prompt itself; both models are frozen. Then speculative decoding
    measures, on held-out prompts, the fraction of guesses that the large model accepts.
    OUTPUT_DIR holds the fuser and the measurements (training.json). The same command continues an
    interrupted run from the checkpoint in OUTPUT_DIR/run-NAME, which can be deleted afterwards;
    with other settings it starts anew.

    Args:
        output_dir: Folder of the fuser.
        data: Prompts: lab (invented passages, with a request to tell about somebody), or records of
            squad, quality, self_instruct, p3 or long_alpaca, with their contexts.
        source: File of the records as published, or a name on the Hugging Face hub.
        split: Split of the hub's data set; a file is read whole.
        prompts: Maximum number of training prompts. Default: all; 4000 of the lab's.
        heldout: Number of prompts to measure on.
        max_new_tokens: Tokens per answer.
        no_decode_fusion: Train to fuse prompts only, as published, without tokens of the answers.
        gamma: Tokens drafted per round, in the measurement.
        every: Optimizer steps between checkpoints; 0: only at the end and on Ctrl-C.
        base_model: The small model, which receives: a lab model, a hub name or a folder. Default:
            the scale's draft.
        teacher_model: The large model, which shares, with the same tokenizer. Default: the scale's
            target.
        enable_thinking: Let the model think before it answers, if its template has this option.
        **options: Of `kvlab.fuse.FuserArm`.
    """
    arm = FuserArm(use_sharer=True, blocks=1, inner=None, decode=not no_decode_fusion, **options)
    if max_new_tokens < 2:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected 2 or more.")
    require_writable(output_dir / "training.json")
    scale = shared.scale_with_target(teacher_model, base_model, enable_thinking)
    tokenizer = shared.load_shared_tokenizer(scale)
    texts, heldout_texts = shared.load_requests(data, source, split, prompts, heldout, arm.seed)
    if len(texts) < arm.batch_size:
        batch = f"a batch of {arm.batch_size}: give more, or a smaller batch_size"
        raise ValueError(f"{len(texts)} prompts are less than {batch}.")
    is_main = PartialState(cpu=scale.device == "cpu").is_main_process  # gives each process its GPU
    draft, target = scale.load("draft"), scale.load("target")
    encode = partial(shared.encode_requests, tokenizer, (draft, target))
    training_ids, tests = (encode(rows, max_new_tokens) for rows in (texts, heldout_texts))
    answers = drafts.generate_targets(target, tokenizer, training_ids, output_dir, max_new_tokens)
    if is_main:
        print(
            f"Training: {len(answers)} answers of {scale.target}. Held out: {len(tests)} prompts."
        )
    examples = [FuserExample.split(answer.input_ids, answer.start) for answer in answers]
    described = [answer.input_ids.tolist() for answer in answers], asdict(arm)
    run = shared.run_name(target, fingerprint(draft)["weights"], *described)
    checkpoint = output_dir / run / "checkpoint.safetensors"
    every = every or arm.steps
    fuser, history = arm.train(draft, target, examples, checkpoint=checkpoint, every=every)
    if not is_main:
        return
    fuser.save_pretrained(output_dir)
    proposers = fusion_proposers(draft, target, fuser, arm.control)
    scores = measure_fusion(target, tests, proposers, gamma=gamma, max_new_tokens=max_new_tokens)
    conditions = f"{len(tests)} held-out prompts, greedy, gamma {gamma}"
    figures = []
    for name, rows in scores.dropna(subset="acceptance").groupby("arm", sort=False):
        figures.append(figure(f"acceptance_{name}", rows["acceptance"], "fraction", conditions))
    print(shared.figures_table(figures) if figures else "Nothing was guessed.")
    result = {
        "settings": shared.command_settings(base_model=scale.draft, teacher_model=scale.target),
        "gates": fuser.gate_logits().tolist(),
        "parameters": fuser.num_parameters(),
        "figures": figures,
        "history": history,
    }
    print(shared.write_json(output_dir / "training.json", result | run_info()))


def fusion_proposers(
    draft: PreTrainedModel, target: PreTrainedModel, fuser: Fuser, control: str = "none"
) -> dict[str, Callable]:
    """The draft alone, and with its cache fused: in the prompt, in accepted tokens, or in both."""
    fuse = (lambda own, _: fuser(own, own)) if control == "self" else fuser
    fused = partial(FusedProposer, draft, fuse)
    ways = {"prefill": partial(fused, decode=False), "decode": partial(fused, prefill=False)}
    return {"none": partial(ModelProposer, draft), **ways, "both": fused}


def measure_fusion(
    target: PreTrainedModel, prompts: Sequence, proposers: Mapping[str, Callable], **options
) -> pd.DataFrame:
    """Decode each prompt with each proposer in turn: one row each, with summary and tokens.

    Args:
        target: The model that verifies.
        prompts: Token ids.
        proposers: Functions that make a proposer, or None, by the name of the arm.
        **options: Of `kvlab.speculate.generate`.
    """
    rows = []
    for number, ids in enumerate(tqdm(prompts, desc="prompts")):
        for arm, make_proposer in proposers.items():
            started = time.perf_counter()
            output = generate(target, [ids], make_proposer(), **options)
            row = {"prompt": number, "arm": arm, "end_to_end": time.perf_counter() - started}
            row["tokens"] = output.tokens[0].tolist()
            rows.append(asdict(summarize(output.rounds)) | row)
    return pd.DataFrame(rows)
