"""`kvlab train-parallel`: heads on a model's last hidden states, which guess several tokens at once."""

from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import PartialState

from kvlab.commands import shared
from kvlab.draft import generate_targets
from kvlab.evaluate import figure, run_info
from kvlab.files import require_writable
from kvlab.parallel import ParallelDraft, ParallelSettings, train_parallel
from kvlab.speculate import ParallelProposer, generate, summarize


def train_parallel_command(
    output_dir: Path = Path("parallel"),
    data: Literal[shared.DATA] = "lab",
    source: str | None = None,
    split: str = "train",
    prompts: int | None = None,
    heldout: int = 40,
    max_new_tokens: int = 128,
    guesses: int = 8,
    losses: dict[str, float] | None = None,
    teacher_model: str | None = None,
    enable_thinking: bool = False,
    **options,
) -> None:
    """Train heads that guess the tokens after the next one, from a model's last hidden state.

    The model answers prompts, and the heads learn from its answers and hidden states; the model
    stays as it is. Then its greedy answers to held-out prompts are decoded with the guesses, and
    the fraction that it accepts is measured, by position. OUTPUT_DIR holds the heads, for `kvlab
    speculate --parallel_draft`, and the measurements (training.json). The same command continues an
    interrupted run.

    Args:
        output_dir: Folder of the heads.
        data: Prompts: lab (invented passages, with a request to tell about somebody), or records of
            squad, quality, self_instruct, p3 or long_alpaca, with their contexts.
        source: File of the records as published, or a name on the Hugging Face hub.
        split: Split of the hub's data set; a file is read whole.
        prompts: Maximum number of training prompts. Default: all; 4000 of the lab's.
        heldout: Number of prompts to measure on.
        max_new_tokens: Tokens per answer.
        guesses: Number of tokens to guess, each by a head of its own.
        losses: Weight of each loss (ce, kl, reverse_kl, tv, log_alpha, lk_hybrid). Default: ce 1.
        teacher_model: The model, a lab model, a hub name or a folder. Default: the scale's target.
        enable_thinking: Let the model think before it answers, if its template has this option.
        **options: Of `kvlab.parallel.ParallelSettings`.
    """
    settings = ParallelSettings(loss_weights=losses or {"ce": 1.0}, **options)
    if guesses < 1:
        raise ValueError(f"guesses is {guesses}, expected a positive integer.")
    require_writable(output_dir / "training.json")
    scale = shared.scale_with_target(teacher_model, enable_thinking=enable_thinking)
    # before loading: each process gets its GPU
    is_main = PartialState(cpu=scale.device == "cpu").is_main_process
    target, tokenizer = scale.load("target"), scale.load_tokenizer("target")
    requests = shared.load_requests(data, source, split, prompts, heldout, settings.seed)
    training_ids, tests = (
        shared.encode_requests(tokenizer, [target], rows, max_new_tokens) for rows in requests
    )
    examples = generate_targets(target, tokenizer, training_ids, output_dir, max_new_tokens)
    torch.manual_seed(settings.seed)
    draft = ParallelDraft(target.config.hidden_size, guesses).to(target.device)
    run = shared.run_name(target, guesses, asdict(settings), training_ids, max_new_tokens)
    checkpoint = output_dir / run / "checkpoint.safetensors"
    training = asdict(settings) | {"checkpoint": checkpoint}
    history = train_parallel(draft, target, examples, **training)
    if not is_main:
        return
    draft.save_pretrained(output_dir)
    proposer = ParallelProposer(target, draft.to(target.dtype))
    accepted = []
    for ids in tests:
        ends = {"max_new_tokens": max_new_tokens, "tokenizer": tokenizer}
        rounds = generate(target, [torch.tensor(ids)], proposer, gamma=guesses, **ends).rounds
        accepted.append(summarize(rounds))
    figures = _position_figures(accepted, guesses)
    print(shared.figures_table(figures))
    result = {"settings": shared.command_settings(teacher_model=scale.target), "figures": figures}
    result |= {"parameters": sum(p.numel() for p in draft.parameters()), **run_info()}
    print(shared.write_json(output_dir / "training.json", result | {"history": history}))


def _position_figures(summaries: list, guesses: int) -> list[dict]:
    """Acceptance of all guesses that were reached, and by position."""
    conditions = f"held-out prompts, greedy, gamma {guesses}; n is prompts"
    rows = {"acceptance": [s.acceptance for s in summaries]}
    for i in range(guesses):
        values = [s.conditional[i] for s in summaries if len(s.conditional) > i]
        rows[f"acceptance_position_{i + 1}"] = values
    rows["tokens_per_call"] = [s.tokens_per_call for s in summaries]
    figures = []
    for name, values in rows.items():
        finite = np.array(values)[np.isfinite(values)]
        if len(finite):
            unit = "tokens" if name == "tokens_per_call" else "fraction"
            figures.append(figure(name, finite, unit, conditions))
    return figures
