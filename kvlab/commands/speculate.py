"""`kvlab speculate`: plain and speculative decoding, prompt by prompt."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlab import speculate as decoding
from kvlab.commands import shared
from kvlab.draft import KnowledgeDraft
from kvlab.evaluate import run_info
from kvlab.fuse import Fuser, Size
from kvlab.generation import encode
from kvlab.knowledge import KnowledgeCache
from kvlab.lab.report import problems
from kvlab.records import read_prompts
from kvlab.scale import Scale
from kvlab.speculate import generate


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
        prompts: A user's messages, e.g. --prompts "One?" "Two?", or, if the tokenizer has no chat
            template, texts to continue. Default: three word problems.
        max_new_tokens: Tokens per prompt.
        gamma: Tokens drafted per round.
        base_model: The small model, which drafts: a lab model, a hub name or a folder, such as
            `kvlab train-draft` makes. Default: the scale's draft.
        teacher_model: The large model, whose text is generated. Default: the scale's target.
        fuser_checkpoint: Folder that `kvlab train-fuser` made for these two models: the draft's
            cache is fused from the target's. Default: the draft is alone.
        skip_standard: Leave plain decoding out, and with it every comparison.
        no_prefill_fusion: Do not fuse the prompt.
        no_decode_fusion: Do not fuse accepted tokens.
        save_results: Write a JSON file with settings, texts and numbers.
        output_dir: Folder of that file.
        prompt_file: More prompts, one per line, or JSON lines with "turns", of which the first is
            used.
        seed: Random seed of sampling.
        compiled: Compile both models first; worth it for many prompts.
        store: Folder that `kvlab build-cache` made; a draft that reads knowledge gets the item
            retrieved for each prompt. Retrieval and loading are timed apart, as finding_seconds.
            Default: no knowledge.
        threshold: Minimum cosine similarity of a retrieved item.
        **options: Of `kvlab.speculate.Sampling`.
    """
    fused = (not no_prefill_fusion, not no_decode_fusion)
    _check_options(store, compiled, fuser_checkpoint, fused)
    fuser = Fuser.from_pretrained(fuser_checkpoint) if fuser_checkpoint else None
    sampling = decoding.Sampling(generator=torch.Generator(), **options)
    texts = _texts(prompts, prompt_file)
    scale = Scale.current()
    scale = replace(scale, draft=base_model or scale.draft, target=teacher_model or scale.target)
    tokenizer = shared.load_shared_tokenizer(scale)
    rows = [encode(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    room = max(map(len, rows)) + max_new_tokens + gamma + 1 if compiled else None
    target = decoding.Runner(scale.load("target"), room)
    draft = decoding.Runner(scale.load("draft"), room)
    drafter = _Drafter(draft, target, threshold, fused)
    if store:
        reads = _knowledge_of(draft.model, scale.draft)
        drafter.store = shared.open_store(store, target.model, tokenizer, scale, reads)
    if fuser:
        drafter.fuser = _fit(fuser, draft.model, target.model)

    def run(ids: list[int], proposer: decoding.ModelProposer | None, count: int):
        sampling.generator.manual_seed(seed)
        limits = {"gamma": gamma, "max_new_tokens": count}
        return generate(target, [ids], proposer, sampling=sampling, **limits)

    for proposer in (None, drafter.proposer(texts[0], rows[0])[0]):
        run(rows[0], proposer, 4)  # warms up, and compiles
    results, rounds = [], {} if skip_standard else {"plain": []}
    rounds["speculative"] = []
    for text, ids in zip(tqdm(texts, desc="prompts"), rows, strict=True):
        proposer, retrieved = drafter.proposer(text, ids)
        results.append({"prompt": text} | retrieved)
        for arm in rounds:
            generated = run(ids, proposer if arm == "speculative" else None, max_new_tokens)
            rounds[arm] += generated.rounds
            results[-1][arm] = _result(generated, tokenizer)
    summary = _summarize(results, rounds, gamma, sampling.greedy)
    _print(results, summary)
    if save_results:
        settings = shared.command_settings(base_model=scale.draft, teacher_model=scale.target)
        result = {"settings": settings, "prompts": results, "summary": summary, **run_info()}
        print(shared.write_json(shared.timed_name(output_dir, "speculate"), result))


def _check_options(store: Path | None, compiled: bool, fuser: Path | None, fused: tuple) -> None:
    if not all(fused) and not fuser:
        options = "give --fuser_checkpoint, or leave --no_..._fusion out"
        raise ValueError(f"Without a fuser nothing is fused: {options}.")
    if store:
        shared.require_store(store)
    if store and compiled:
        options = "leave --compiled out, or --store"
        raise ValueError(f"What a draft knows differs from prompt to prompt: {options}.")


def _texts(prompts: list[str] | None, prompt_file: Path | None) -> list[str]:
    texts = list(prompts or [])
    if prompt_file:
        texts += read_prompts(prompt_file)
    return texts or [problem[0]["content"] for problem in problems(4, "long", 3, seed=0)]


@dataclass
class _Drafter:
    """The draft model, and what helps it: a fuser and a store of knowledge."""

    draft: decoding.Runner
    target: decoding.Runner
    threshold: float
    fused: tuple[bool, bool]
    fuser: Fuser | None = None
    store: KnowledgeCache | None = None

    def proposer(self, text: str, ids: list[int]) -> tuple[decoding.ModelProposer, dict]:
        """The proposer for a prompt, with the item retrieved for it and the seconds it took."""
        model, prefix, retrieved, started = self.draft, None, {}, time.perf_counter()
        if self.store is not None:
            item = shared.find_item(self.store, text, self.threshold)
            model, prefix = model.model.with_knowledge(self.store, [item], [len(ids)])
            retrieved = {"found": item and item.question}
        if self.fuser:
            arguments = (model, self.target, self.fuser, prefix, *self.fused)
            proposer = decoding.FusedProposer(*arguments)
        else:
            proposer = decoding.ModelProposer(model, prefix)
        if retrieved:
            retrieved["finding_seconds"] = time.perf_counter() - started
        return proposer, retrieved


def _knowledge_of(draft: PreTrainedModel, name: str) -> str:
    """How a draft reads knowledge."""
    if not isinstance(draft, KnowledgeDraft) or not draft.config.knowledge:
        options = "a draft that `kvlab train-draft` made with --knowledge vector, kv or prefix"
        raise ValueError(f"{name} does not read knowledge: leave --store out, or give {options}.")
    return draft.config.knowledge


def _fit(fuser: Fuser, draft: PreTrainedModel, target: PreTrainedModel) -> Fuser:
    """The fuser beside the draft, if it was trained for these two models."""
    receiver, sharer = Size.of(draft.config), Size.of(target.config)
    if (fuser.receiver, fuser.sharer) != (receiver, sharer):
        trained = f"The fuser is from {fuser.sharer} to {fuser.receiver}"
        raise ValueError(f"{trained}, the models are {sharer} and {receiver}: train one.")
    fuser.warn_of_others(draft, target)
    return fuser.to(draft.device, draft.dtype)


def _result(generated: decoding.Generated, tokenizer: PreTrainedTokenizerBase) -> dict:
    ids, summary = generated.tokens[0].tolist(), decoding.summarize(generated.rounds)
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    speed = {"tokens_per_second": summary.tokens_per_second}
    return {"text": text, "token_ids": ids} | asdict(summary) | speed


def _summarize(results: list[dict], rounds: dict, gamma: int, greedy: bool) -> dict:
    arms = {arm: decoding.summarize(rounds[arm]) for arm in rounds}
    summary = decoding.compare(arms, len(results), gamma)
    if greedy and "plain" in rounds:
        texts = [[r[arm]["token_ids"] for r in results] for arm in rounds]
        summary["equal_texts"] = texts[0] == texts[1]
    if "found" in results[0]:
        summary["found"] = sum(r["found"] is not None for r in results)
        summary["finding_seconds"] = float(np.mean([r["finding_seconds"] for r in results]))
    return summary


def _print(results: list[dict], summary: dict) -> None:
    for result in results:
        knowledge = f"    knows: {result['found'] or 'nothing'}\n" if "found" in result else ""
        print(f"{result['prompt']}\n{knowledge}    {result['speculative']['text']}\n")
    arms = {key: value for key, value in summary.items() if isinstance(value, dict)}
    print(pd.DataFrame(arms).to_string(float_format="{:.3f}".format, na_rep="-"))
    for name, value in summary.items():
        if name not in arms:
            print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")
