"""`kvlab …`: each subcommand is a function, and its options are the function's own signature."""

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from jsonargparse import ArgumentParser, auto_cli
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from kvlab import lab
from kvlab.cache import Prefix, truncate
from kvlab.evaluate import circumstances, encode
from kvlab.files import write_text
from kvlab.knowledge import ARMS, Item, KnowledgeCache, loaded
from kvlab.lab.__main__ import report, train
from kvlab.lab.report import problems
from kvlab.records import faq, read_prompts
from kvlab.scale import Scale
from kvlab.speculate import (
    Generated,
    ModelProposer,
    Runner,
    Sampling,
    Summary,
    best_gamma,
    cost_model,
    costs,
    decode,
    generate,
    summarize,
)


def scale() -> None:
    """Print which models and device notebooks will use here, and the memory each chapter is predicted to need."""
    current = Scale.current()
    chapters = pd.DataFrame({name: current.memory(name) for name in sorted(current.needs)}).T
    print(f"Scale {current.name} on {current.device}, {current.dtype}. Change it with KVLAB_SCALE=tiny, t4 or full.")
    print(chapters.add_suffix(" (GB)").round(3).to_string())


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
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    compiled: bool = False,
) -> None:
    """Decode prompts plainly and speculatively, prompt by prompt in one run, and compare.

    Args:
        prompts: a user's messages, e.g. --prompts "One?" "Two?", or, if the tokenizer has no chat template, texts to
            continue. By default three word problems.
        max_new_tokens: of each prompt.
        gamma: tokens drafted a round.
        base_model: the small model, which drafts; a lab model, a hub name or a folder. Default: the scale's draft.
        teacher_model: the large model, whose text it is. Default: the scale's target.
        fuser_checkpoint: of a cache fuser; kvlab has none yet, so leave it out.
        skip_standard: leave plain decoding out, and with it every comparison.
        no_prefill_fusion: without a fuser this changes nothing.
        no_decode_fusion: without a fuser this changes nothing.
        save_results: write a JSON file with settings, texts and numbers.
        output_dir: folder of that file.
        prompt_file: more prompts, one a line, or JSON lines with "turns", of which the first is used.
        temperature: 0 takes the likeliest token, else tokens are drawn.
        top_k: draw among so many of the likeliest tokens; 0 keeps all.
        top_p: draw among the likeliest tokens that reach this probability; 1.0 keeps all.
        repetition_penalty: above 1.0 makes tokens seen before less likely.
        seed: of what is drawn.
        compiled: compile both models first; worth it for many prompts.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    if fuser_checkpoint:
        raise ValueError(
            f"fuser_checkpoint is {settings['fuser_checkpoint']!r}, but kvlab has no cache fuser yet: leave it out."
        )
    asked = [*(prompts or []), *(read_prompts(prompt_file) if prompt_file else [])]
    asked = asked or [problem[0]["content"] for problem in problems(4, "long", 3, seed=0)]
    scale = Scale.current()
    scale = replace(scale, draft=base_model or scale.draft, target=teacher_model or scale.target)
    tokenizer = _shared_tokenizer(scale)
    rows = [encode(tokenizer, [{"role": "user", "content": text}]) for text in asked]
    room = max(map(len, rows)) + max_new_tokens + gamma + 1 if compiled else None
    target, draft = (Runner(scale.load(role), room) for role in ("target", "draft"))
    arms = {} if skip_standard else {"plain": None}
    arms["speculative"] = ModelProposer(draft)

    def run(ids: list[int], arm: str, tokens: int = max_new_tokens) -> Generated:
        generator = torch.Generator().manual_seed(seed)
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, generator)
        return generate(target, [ids], arms[arm], gamma=gamma, max_new_tokens=tokens, sampling=sampling)

    for arm in arms:
        run(rows[0], arm, tokens=4)  # warms up, and compiles
    done = [{arm: run(ids, arm) for arm in arms} for ids in tqdm(rows, desc="prompts")]
    results = [
        {"prompt": text} | {arm: _result(made, tokenizer) for arm, made in pair.items()}
        for text, pair in zip(asked, done, strict=True)
    ]
    summary = compare(
        {arm: summarize([r for pair in done for r in pair[arm].rounds]) for arm in arms}, len(rows), gamma
    )
    if temperature == 0 and not skip_standard:
        summary["equal_texts"] = all(r["plain"]["token_ids"] == r["speculative"]["token_ids"] for r in results)
    _print(results, summary)
    if save_results:
        settings |= {"base_model": scale.draft, "teacher_model": scale.target}
        print(_save({"settings": settings, "prompts": results, "summary": summary, **circumstances()}, output_dir))


def _shared_tokenizer(scale: Scale) -> PreTrainedTokenizerBase:
    target, draft = (scale.load_tokenizer(role) for role in ("target", "draft"))
    if target.get_vocab() != draft.get_vocab():
        sizes = f"{scale.target} has {len(target)} tokens, {scale.draft} {len(draft)}"
        raise ValueError(f"The two models' tokenizers differ ({sizes}): choose a base_model of the same family.")
    return target


def _result(made: Generated, tokenizer: PreTrainedTokenizerBase) -> dict:
    tokens, summary = made.tokens[0].tolist(), summarize(made.rounds)
    text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return {"text": text, "token_ids": tokens, **asdict(summary), "tokens_per_second": summary.tokens_per_second}


def compare(arms: dict[str, Summary], prompts: int, gamma: int) -> dict:
    """Means a prompt of each arm and, with a plain arm, what theory says of the other and what was measured.

    The cost of a verification between one token and gamma + 1 is taken to grow evenly.

    Examples
    --------
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


def build_cache(
    store: Path = Path("knowledge"),
    records: Path | None = None,
    per_domain: bool = False,
    generate_answers: bool = False,
    max_new_tokens: int = 128,
    keep: list[str] | None = None,
    dtype: str | None = None,
    base_model: str | None = None,
    language: str = "en",
    batch_size: int = 8,
) -> None:
    """Let a model read question/answer records and keep what it computed; what is in the store already is skipped.

    Args:
        store: folder of the store; new, or one to add to.
        records: JSON lines with "question", "answer" and, if wanted, "domain" and "id", a YAML file of the chatterbot
            corpus, or a folder of such files. Default: the lab's FAQ.
        per_domain: also copy the items of each domain to a store of their own, in the folder STORE-DOMAIN.
        generate_answers: let the model answer; answers in the records are not used.
        max_new_tokens: of a generated answer.
        keep: kv (keys and values), hidden (last hidden states), or both, e.g. --keep kv hidden. Default: kv.
        dtype: in which it is kept, e.g. float16. Default: that of the model.
        base_model: the model that reads; a lab model, a hub name or a folder. Default: the scale's target.
        language: of the lab's FAQ, en or zh.
        batch_size: of reading and of generating.
    """
    kept = None if dtype is None else getattr(torch, dtype, None)
    if dtype and not isinstance(kept, torch.dtype):
        raise ValueError(f"dtype is {dtype!r}, expected the name of one, such as float16.")
    found = faq(records) if records else lab.faq(language)
    scale = _scale(base_model)
    main = PartialState(cpu=scale.device == "cpu").is_main_process  # before loading: gives each process its own GPU
    parts = scale.load("target"), scale.load_tokenizer("target"), scale.load_embedder()
    made = KnowledgeCache.build(store, [], *parts, keep=keep or ("kv",), dtype=kept)
    size = f"{'at most ' * generate_answers}{made.estimate(found, generate_answers, max_new_tokens) / 1e6:.1f} MB"
    if main:
        print(f"{store} has {len(made)} items. Of {len(found)} records, those that are new to it will take {size}.")
    new = made.add(found, generate_answers, max_new_tokens, batch_size)
    if main:
        print(f"{new} items are new, {len(found) - new} were there.", made.summary().round(2).to_string(), sep="\n\n")
    if main and per_domain:
        print("", *_export_domains(made), sep="\n")


def _scale(base_model: str | None) -> Scale:
    scale = Scale.current()
    return replace(scale, target=base_model or scale.target)


def _export_domains(store: KnowledgeCache) -> list[str]:
    """A store for each domain, beside the whole one, brought up to date."""
    lines = []
    for domain in store.domains:
        name = re.sub(r"[^\w -]", lambda odd: f"%{ord(odd[0]):02X}", domain)  # any text becomes a name of its own
        home = store.folder.resolve()
        copy = store.export(home.with_name(f"{home.name}-{name}"), domain)
        lines.append(f"{copy.folder.name}: {len(copy)} items")
    return lines


def ask(
    questions: list[str],
    store: Path = Path("knowledge"),
    k: int = 1,
    threshold: float = 0.5,
    domain: str | None = None,
    arm: Literal[ARMS] = "recompute",
    exact: bool = False,
    max_new_tokens: int = 96,
    base_model: str | None = None,
) -> None:
    """Ask a model with and without what a store knows, and compare answers, time, tokens read and bytes loaded.

    Four ways: the question alone; after the items found, read anew as text; after the same items from the store; and
    the best item's own question, whose cache is in the store, so that one token is read. Time to first token is from
    the start of loading and splicing (finding apart) to the first token, the median of 3 runs after one to warm up;
    by then the file is in the system's memory.

    Args:
        questions: one or more, before all options.
        store: folder that `kvlab build-cache` made.
        k: items to put before the question.
        threshold: least similarity of an item that counts as found.
        domain: look among the items of this domain only.
        arm: how items from the store are put together: full, prefix, concat, shift or recompute (chapter 01).
        exact: find the same question only, but for case, punctuation and space.
        max_new_tokens: of each answer.
        base_model: that the store was built with. Default: the scale's target.
    """
    if not (store / "manifest.json").is_file():
        raise ValueError(f"There is no store in {store}: build one with `kvlab build-cache --store {store}`.")
    scale = _scale(base_model)
    model, tokenizer = scale.load("target"), scale.load_tokenizer("target")
    known = KnowledgeCache.load(store, model, tokenizer, None if exact else scale.load_embedder())
    if "kv" not in known.keep:
        raise ValueError(f"The store in {store} keeps no keys and values: build one with --keep kv, in a new folder.")
    for question in questions:
        hits = known.retrieve(question, k, threshold, domain, exact)
        print(f"{question}")
        for hit in hits:
            print(f"    found: {hit.item.question} (domain {hit.item.domain or 'none'}, score {hit.score:.2f})")
        if not hits:
            print(f"    not in the store: {'no item has this question' if exact else f'nothing scores {threshold}'}")
        table = _ways(known, question, [hit.item for hit in hits], arm, max_new_tokens)
        print(table.drop(columns="answer").to_string(float_format="{:.2f}".format))
        for way, answer in table["answer"].items():
            print(f"{way}: {answer}")
        print()


def _ways(store: KnowledgeCache, question: str, items: Sequence[Item], arm: str, max_new_tokens: int) -> pd.DataFrame:
    """One row a way to answer; without items only the first."""
    alone, asked = encode(store.tokenizer, [{"role": "user", "content": question}]), store.prompt(question)
    ways = {"question alone": (lambda: None, alone, 0, 0)}
    if items:
        sizes, best = [len(item.input_ids) for item in items], items[0]
        anew = {"full": 0, "prefix": 1, "recompute": 1}.get(arm, len(items))
        stop = best.answer_start - 1
        ways |= {
            "knowledge as text": (lambda: store.splice(items, "full"), asked, sum(sizes), 0),
            "knowledge from the store": (
                lambda: store.splice(items, arm),
                asked,
                sum(sizes[anew:]),
                sum(sizes[: loaded(arm)]),
            ),
            "the stored question itself": (lambda: _asked(store, best), best.input_ids[stop : stop + 1], 0, sizes[0]),
        }
    rows = {
        way: {
            "first token (ms)": _first_token_ms(store, begin, ids),
            "tokens read": more + len(ids),
            "loaded (MB)": store.bytes_of(loaded) / 1e6,
            "answer": _answer(store, begin(), ids, max_new_tokens),
        }
        for way, (begin, ids, more, loaded) in ways.items()
    }
    return pd.DataFrame(rows.values(), rows)


def _asked(store: KnowledgeCache, item: Item) -> Prefix:
    """A stored question, but for its last token, which is read again for what follows it."""
    stop = item.answer_start - 1
    return Prefix(truncate(store.read(item).cache, stop), stop, item.input_ids[:stop])


def _first_token_ms(store: KnowledgeCache, begin: Callable[[], Prefix | None], ids: Sequence[int]) -> float:
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        next(decode(store.model, [ids], prefix=begin(), max_new_tokens=1))
        seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds[1:])


def _answer(store: KnowledgeCache, prefix: Prefix | None, ids: Sequence[int], max_new_tokens: int) -> str:
    made = generate(store.model, [ids], prefix=prefix, max_new_tokens=max_new_tokens)
    return " ".join(store.tokenizer.decode(made.tokens[0], skip_special_tokens=True).split())


def _print(results: list[dict], summary: dict) -> None:
    for result in results:
        print(f"{result['prompt']}\n    {result['speculative']['text']}\n")
    arms = {key: value for key, value in summary.items() if isinstance(value, dict)}
    print(pd.DataFrame(arms).to_string(float_format="{:.3f}".format, na_rep="-"))
    for name, value in summary.items():
        if name not in arms:
            print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")


def _save(result: dict, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"speculate_{datetime.now():%Y%m%d_%H%M%S}.json"
    plain = json.loads(json.dumps(result), parse_constant=lambda _: None)  # JSON has no NaN
    return write_text(path, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


_OPTION = re.compile(r"(?<=^--)\w[\w-]*(?==|$)")  # --per-domain is --per_domain


class _Parser(ArgumentParser):
    """As jsonargparse has it, but `--flag` alone means true, and a list is texts side by side, not a YAML list."""

    def add_argument(self, *names, **options):
        if options.get("type") is bool:
            options |= {"nargs": "?", "const": True}
        if names[:1] in (("--prompts",), ("--keep",), ("questions",)):
            told = {name: options[name] for name in ("default", "help") if name in options}
            names, options = names[:1], told | {"type": str, "nargs": "+"}
        return super().add_argument(*names, **options)


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Examples
    --------
    >>> main(["scale"])  # doctest: +ELLIPSIS
    Scale ...
    """
    models = {"_help": "Make and measure the lab models.", "train": train, "report": report}
    commands = {"scale": scale, "speculate": speculate, "build-cache": build_cache, "ask": ask, "lab": models}
    args = sys.argv[1:] if args is None else args
    args = [_OPTION.sub(lambda name: name[0].replace("-", "_"), arg) for arg in args]
    try:
        auto_cli(commands, args, parser_class=_Parser)
    except (ValueError, OSError) as error:  # what the user can mend needs no traceback
        raise SystemExit(f"kvlab: {error}") from error


if __name__ == "__main__":
    main()
