"""`kvlab speculate`: plain and speculative decoding, prompt by prompt."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvlab.draft  # noqa: F401  so that transformers can load a KnowledgeDraft
from kvlab import speculate as decoding
from kvlab.commands import shared
from kvlab.evaluate import run_info
from kvlab.files import require_writable
from kvlab.fuse import Fuser, Size
from kvlab.generation import answer_text, encode
from kvlab.lab.report import problems
from kvlab.parallel import ParallelDraft
from kvlab.records import read_prompts
from kvlab.scale import Scale
from kvlab.speculate import generate

RULES = {"token": decoding.verify, "block": decoding.verify_block}


def speculate(
    prompts: list[str] | None = None,
    max_new_tokens: int = 256,
    gamma: int = 4,
    base_model: str | None = None,
    teacher_model: str | None = None,
    fuser_checkpoint: str | None = None,
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
    stop: list[str] | None = None,
    enable_thinking: bool = False,
    parallel_draft: Path | None = None,
    verification: Literal["token", "block"] = "token",
    **options,
) -> None:
    """Decode prompts plainly and speculatively, prompt by prompt in one run, and compare.

    Args:
        prompts: A user's messages, e.g. --prompts "One?" "Two?", or, if the tokenizer has no chat
            template, texts to continue. Default: three word problems.
        max_new_tokens: Tokens per prompt.
        gamma: Tokens drafted per round.
        base_model: The small model, which drafts: a lab model, a hub name or a folder, such as
            `kvlab train-draft` makes. Its tokenizer may differ from the target's, unless it is
            compiled, fused or reads knowledge. Default: the scale's draft.
        teacher_model: The large model, whose text is generated. Default: the scale's target.
        fuser_checkpoint: Folder that `kvlab train-fuser` made for these two models, or one that
            was published with the C2C paper, here or on the hub, such as
            qwen3_0.6b+qwen3_14b_Fuser of nics-efc/C2C_Fuser (give --no_decode_fusion, as it was
            trained on prompts). The draft's cache is fused from the target's. Default: the draft
            is alone.
        skip_standard: Leave plain decoding out, and with it every comparison.
        no_prefill_fusion: Do not fuse the prompt.
        no_decode_fusion: Do not fuse accepted tokens.
        save_results: Write a JSON file with settings, texts and numbers, after each prompt.
        output_dir: Folder of that file.
        prompt_file: More prompts, one per line, or JSON: texts, or rows with "turns", of which the
            first is used.
        seed: Random seed of sampling.
        compiled: Compile both models first; worth it for many prompts.
        store: Folder that `kvlab build-cache` made; a draft that reads knowledge gets the item
            retrieved for each prompt. Retrieval and loading are timed apart, as finding_seconds.
            Default: no knowledge.
        threshold: Minimum cosine similarity of a retrieved item.
        stop: Strings that end a text, such as --stop "Question:"; they are cut off.
        enable_thinking: Let the model think before it answers, if its template has this option.
        parallel_draft: Folder that `kvlab train-parallel` made for the large model, whose own
            hidden states then draft, up to as many tokens as were trained. Default: the small model
            drafts.
        verification: Of sampled tokens: "token" accepts or rejects one after the other, "block" as
            many as possible of them together.
        **options: Of `kvlab.speculate.Sampling`.
    """
    fused = (not no_prefill_fusion, not no_decode_fusion)
    _require_options_that_fit(fused, fuser_checkpoint, store, compiled, parallel_draft)
    path = shared.timed_name(output_dir, "speculate") if save_results else None
    if path:
        require_writable(path)
    fuser = Fuser.from_pretrained(fuser_checkpoint) if fuser_checkpoint else None
    sampling = decoding.Sampling(generator=torch.Generator(), logits_processor=(), **options)
    texts = _all_prompts(prompts, prompt_file)
    scale = shared.scale_with_target(teacher_model, base_model, enable_thinking)
    must_share = bool(fuser_checkpoint or store or compiled)
    tokenizer, *translation = _load_tokenizers(scale, must_share)
    rows = [encode(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    room = max(map(len, rows)) + max_new_tokens + gamma + 1 if compiled else None
    target = decoding.Runner(scale.load("target"), room)
    draft = None if parallel_draft else decoding.Runner(scale.load("draft"), room)
    knowledge = _open_knowledge(store, target.model, draft.model, scale) if store else None
    lengths = [len(ids) + max_new_tokens for ids in rows]
    pairs = [*zip(texts, rows, strict=True)]
    models = [runner.model for runner in (target, draft) if runner]
    pairs = shared.leave_out_long(models, pairs, lengths)
    fuser = fuser and _fit(fuser, draft.model, target.model)
    make_proposer = partial(_make_proposer, draft, translation, fuser, fused, knowledge, threshold)
    if parallel_draft:
        make_proposer = _parallel_proposer(parallel_draft, target.model)

    def run(ids: list[int], proposer: decoding.ModelProposer | None, n=max_new_tokens):
        sampling.generator.manual_seed(seed)
        how = {"gamma": gamma, "sampling": sampling, "verify": RULES[verification]}
        how |= {"max_new_tokens": n, "tokenizer": tokenizer, "stop": stop or ()}
        return generate(target, [ids], proposer, **how)

    for proposer in (None, make_proposer(*pairs[0])[0]):
        run(pairs[0][1], proposer, min(4, max_new_tokens))  # warms up, and compiles
    rounds = {"speculative": []} if skip_standard else {"plain": [], "speculative": []}
    settings = shared.command_settings(base_model=scale.draft, teacher_model=scale.target)
    result = {"settings": settings, "prompts": [], **run_info()}
    read = partial(answer_text, tokenizer, stop=stop or ())
    _decode_and_write(result, path, pairs, rounds, make_proposer, run, read)
    result["summary"] = _summarize_arms(result["prompts"], rounds, gamma, sampling.greedy)
    if path:
        print(shared.write_json(path, result))


def _require_options_that_fit(
    fused: tuple[bool, bool],
    fuser_checkpoint: str | None,
    store: Path | None,
    compiled: bool,
    parallel_draft: Path | None,
) -> None:
    if parallel_draft and (fuser_checkpoint or store):
        hint = "leave --fuser_checkpoint and --store out"
        raise ValueError(f"A parallel draft has no cache to fuse, and reads no knowledge: {hint}.")
    if not all(fused) and not fuser_checkpoint:
        hint = "give --fuser_checkpoint, or leave --no_..._fusion out"
        raise ValueError(f"Without a fuser nothing is fused: {hint}.")
    if store:
        shared.require_store(store)
        if compiled:
            hint = "leave --compiled out, or --store"
            raise ValueError(f"What a draft knows differs from prompt to prompt: {hint}.")


def _all_prompts(prompts: list[str] | None, prompt_file: Path | None) -> list[str]:
    texts = [*(prompts or ()), *(read_prompts(prompt_file) if prompt_file else ())]
    return texts or [problem[0]["content"] for problem in problems(4, "long", 3, seed=0)]


def _open_knowledge(store: Path, target: PreTrainedModel, draft: PreTrainedModel, scale: Scale):
    """The store, if the draft reads one."""
    reads = getattr(draft.config, "knowledge", None)
    if not reads:
        hint = "leave --store out, or give a draft of `kvlab train-draft --knowledge kv`"
        raise ValueError(f"{scale.draft} does not read knowledge: {hint}.")
    return shared.open_store(store, target, scale, reads)


def _fit(fuser: Fuser, draft, target) -> Fuser:
    """The fuser beside the draft, if it was trained for these two models."""
    receiver, sharer = Size.of(draft.config), Size.of(target.config)
    if (fuser.receiver, fuser.sharer) != (receiver, sharer):
        trained = f"The fuser is from {fuser.sharer} to {fuser.receiver}"
        raise ValueError(f"{trained}, the models are {sharer} and {receiver}: train one.")
    fuser.warn_of_others(draft, target)
    return fuser.to(draft.device, draft.dtype)


def _load_tokenizers(scale: Scale, must_share: bool) -> list[PreTrainedTokenizerBase]:
    """The target's tokenizer; if they differ, also those between which a draft is translated."""
    if must_share:
        return [shared.load_shared_tokenizer(scale)]
    target, draft = scale.load_tokenizer("target"), scale.load_tokenizer("draft")
    if target.get_vocab() == draft.get_vocab():
        return [target]
    print(f"{scale.draft} has another tokenizer than {scale.target}: its guesses are translated.")
    return [target, draft, target]


def _make_proposer(
    draft: decoding.Runner,
    tokenizers: Sequence,
    fuser,
    fused: tuple,
    knowledge,
    threshold: float,
    text: str,
    ids: list,
) -> tuple[decoding.ModelProposer, dict]:
    """The draft for a prompt, with the item retrieved for it and the seconds it took."""
    started = time.perf_counter()
    prefix, item = None, None
    if knowledge is not None:
        item = shared.find_item(knowledge, text, threshold)
        draft, prefix = draft.model.with_knowledge(knowledge, [item], [len(ids)])
    if fuser:
        proposer = decoding.FusedProposer(draft, fuser, prefix, *fused)
    elif tokenizers:
        proposer = decoding.TranslatingProposer(draft, *tokenizers)
    else:
        proposer = decoding.ModelProposer(draft, prefix)
    if knowledge is None:
        return proposer, {}
    seconds = time.perf_counter() - started
    return proposer, {"found": item and item.question, "finding_seconds": seconds}


def _parallel_proposer(folder: Path, target: PreTrainedModel) -> Callable:
    heads = ParallelDraft.from_pretrained(folder).to(target.device, target.dtype)
    proposer = decoding.ParallelProposer(target, heads)
    return lambda text, ids: (proposer, {})


def _decode_and_write(result: dict, path: Path | None, *options) -> None:
    """Add the prompts to the result, which is in the file after each of them."""
    for decoded in _decode_prompts(*options):
        result["prompts"].append(decoded)
        if path:
            shared.write_json(path, result)


def _decode_prompts(pairs, rounds: dict, make_proposer, run, read) -> Iterator[dict]:
    """Decode each prompt with each arm, and add the rounds of each arm to `rounds`."""
    for text, ids in tqdm(pairs, desc="prompts"):
        proposer, retrieved = make_proposer(text, ids)
        result = {"prompt": text} | retrieved
        for arm in rounds:
            generated = run(ids, proposer if arm == "speculative" else None)
            rounds[arm] += generated.rounds
            summary = decoding.summarize(generated.rounds)
            tokens = generated.tokens[0].tolist()
            decoded = {"text": read(tokens)}
            result[arm] = decoded | {"token_ids": tokens} | asdict(summary)
        yield result


def _summarize_arms(results: list[dict], rounds: dict, gamma: int, greedy: bool) -> dict:
    """Print texts and statistics; return the statistics."""
    for result in results:
        knowledge = f"    knows: {result['found'] or 'nothing'}\n" if "found" in result else ""
        print(f"{result['prompt']}\n{knowledge}    {result['speculative']['text']}\n")
    arms = {arm: decoding.summarize(rounds[arm]) for arm in rounds}
    summary = decoding.compare(arms, len(results), gamma)
    table = pd.DataFrame({arm: summary[arm] for arm in arms})
    print(table.to_string(float_format="{:.3f}".format, na_rep="-"))
    if greedy and "plain" in rounds:
        pairs = [(r["plain"]["token_ids"], r["speculative"]["token_ids"]) for r in results]
        summary["equal_texts"] = all(plain == drafted for plain, drafted in pairs)
    if "found" in results[0]:
        summary["found"] = sum(r["found"] is not None for r in results)
        summary["finding_seconds"] = float(np.mean([r["finding_seconds"] for r in results]))
    for name, value in summary.items():
        if name not in arms:
            print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")
    return summary
