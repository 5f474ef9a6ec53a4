"""`kvlab speculate`: plain and speculative decoding, prompt by prompt."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlab.commands.shared import (
    command_settings,
    find_item,
    load_shared_tokenizer,
    open_store,
    require_store,
    write_json,
)
from kvlab.draft import KnowledgeDraft
from kvlab.evaluate import run_info
from kvlab.fuse import Fuser, Size
from kvlab.generation import encode
from kvlab.knowledge import KnowledgeCache
from kvlab.lab.report import problems
from kvlab.records import read_prompts
from kvlab.scale import Scale
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
    generate,
    summarize,
)


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
    seed: int = 0,
    compiled: bool = False,
    store: Path | None = None,
    threshold: float = 0.5,
    **options,
) -> None:
    """Decode prompts plainly and speculatively, prompt by prompt in one run, and compare.

    Args:
        prompts: A user's messages, e.g. --prompts "One?" "Two?", or, if the tokenizer has no chat template, texts to
            continue. Default: three word problems.
        max_new_tokens: Tokens per prompt.
        gamma: Tokens drafted per round.
        base_model: The small model, which drafts: a lab model, a hub name or a folder, such as `kvlab train-draft`
            makes. Default: the scale's draft.
        teacher_model: The large model, whose text is generated. Default: the scale's target.
        fuser_checkpoint: Folder that `kvlab train-fuser` made for these two models: the draft's cache is fused from
            the target's. Default: the draft is alone.
        skip_standard: Leave plain decoding out, and with it every comparison.
        no_prefill_fusion: Do not fuse the prompt.
        no_decode_fusion: Do not fuse accepted tokens.
        save_results: Write a JSON file with settings, texts and numbers.
        output_dir: Folder of that file.
        prompt_file: More prompts, one per line, or JSON lines with "turns", of which the first is used.
        seed: Random seed of sampling.
        compiled: Compile both models first; worth it for many prompts.
        store: Folder that `kvlab build-cache` made; a draft that reads knowledge gets the item retrieved for each
            prompt. Retrieval and loading are timed apart, as finding_seconds. Default: no knowledge.
        threshold: Minimum cosine similarity of a retrieved item.
        **options: Of `kvlab.speculate.Sampling`.
    """
    generator = torch.Generator()
    sampling = Sampling(generator=generator, **options)
    if (no_prefill_fusion or no_decode_fusion) and not fuser_checkpoint:
        raise ValueError(
            "Without a fuser nothing is fused: give --fuser_checkpoint, or leave --no_..._fusion out."
        )
    fuser = Fuser.from_pretrained(fuser_checkpoint) if fuser_checkpoint else None
    if store:
        require_store(store)
        if compiled:
            raise ValueError(
                "What a draft knows differs from prompt to prompt: leave --compiled out, or --store."
            )
    asked = [*(prompts or []), *(read_prompts(prompt_file) if prompt_file else [])]
    asked = asked or [problem[0]["content"] for problem in problems(4, "long", 3, seed=0)]
    scale = Scale.current()
    scale = replace(scale, draft=base_model or scale.draft, target=teacher_model or scale.target)
    tokenizer = load_shared_tokenizer(scale)
    rows = [encode(tokenizer, [{"role": "user", "content": text}]) for text in asked]
    room = max(map(len, rows)) + max_new_tokens + gamma + 1 if compiled else None
    draft = Runner(scale.load("draft"), room)
    reads = _reads(draft.model, scale.draft) if store else None
    target = Runner(scale.load("target"), room)
    known = open_store(store, target.model, tokenizer, scale, reads) if store else None
    drafter = ModelProposer
    if fuser:
        fuser = _fitting(fuser, draft.model, target.model)
        switches = {"prefill": not no_prefill_fusion, "decode": not no_decode_fusion}
        drafter = partial(FusedProposer, target=target, fuser=fuser, **switches)
    arms = ["speculative"] if skip_standard else ["plain", "speculative"]

    def run(
        ids: list[int], arm: str, proposer: ModelProposer, tokens: int = max_new_tokens
    ) -> Generated:
        generator.manual_seed(seed)
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
    if sampling.greedy and not skip_standard:
        summary["equal_texts"] = all(
            r["plain"]["token_ids"] == r["speculative"]["token_ids"] for r in results
        )
    if store:
        summary["found"] = sum(r["found"] is not None for r in results)
        summary["finding_seconds"] = float(np.mean([r["finding_seconds"] for r in results]))
    _print(results, summary)
    if save_results:
        settings = command_settings(base_model=scale.draft, teacher_model=scale.target)
        result = {"settings": settings, "prompts": results, "summary": summary, **run_info()}
        print(write_json(output_dir / f"speculate_{datetime.now():%Y%m%d_%H%M%S}.json", result))


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
    item = find_item(store, text, threshold)
    knowing, prefix = draft.model.knowing(store, [item], [len(ids)])
    proposer, seconds = drafter(knowing, prefix=prefix), time.perf_counter() - started
    return proposer, {"found": item and item.question, "finding_seconds": seconds}


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


def _print(results: list[dict], summary: dict) -> None:
    for result in results:
        known = f"    knows: {result['found'] or 'nothing'}\n" if "found" in result else ""
        print(f"{result['prompt']}\n{known}    {result['speculative']['text']}\n")
    arms = {key: value for key, value in summary.items() if isinstance(value, dict)}
    print(pd.DataFrame(arms).to_string(float_format="{:.3f}".format, na_rep="-"))
    for name, value in summary.items():
        if name not in arms:
            print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")
