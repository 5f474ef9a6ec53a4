"""`kvlab …`: each subcommand is a function, and its options are the function's own signature."""

import json
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jsonargparse import ArgumentParser, auto_cli
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from kvlab.evaluate import circumstances, encode
from kvlab.files import write_text
from kvlab.lab.__main__ import report, train
from kvlab.lab.report import problems
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


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: one a line, or, if it begins with "{", the first of "turns" in each line (as Spec-Bench has).

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     print('{"turns": ["Hello.", "Go on."]}', file=file, flush=True)
    ...     read_prompts(Path(file.name))
    ['Hello.']
    """
    lines = [(n, line.strip()) for n, line in enumerate(path.read_text("utf-8").splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty, expected one prompt a line.")
    if not lines[0][1].startswith("{"):
        return [line for _, line in lines]
    prompts = []
    for n, line in lines:
        try:
            prompts.append(json.loads(line)["turns"][0])
        except (ValueError, TypeError, KeyError, IndexError):
            prompts.append(None)
        if not isinstance(prompts[-1], str):
            raise ValueError(
                f'{path}, line {n} is {line[:60]!r}, expected a JSON object like {{"turns": ["A prompt."]}}.'
            )
    return prompts


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


class _Parser(ArgumentParser):
    """As jsonargparse has it, but `--flag` alone means true, and prompts are texts side by side, not a YAML list."""

    def add_argument(self, *names, **options):
        if options.get("type") is bool:
            options |= {"nargs": "?", "const": True}
        if "--prompts" in names:
            told = {"default": options["default"], "help": options["help"]}
            names, options = ("--prompts",), told | {"type": str, "nargs": "+"}
        return super().add_argument(*names, **options)


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Examples
    --------
    >>> main(["scale"])  # doctest: +ELLIPSIS
    Scale ...
    """
    lab = {"_help": "Make and measure the lab models.", "train": train, "report": report}
    try:
        auto_cli({"scale": scale, "speculate": speculate, "lab": lab}, args, parser_class=_Parser)
    except (ValueError, OSError) as error:  # what the user can mend needs no traceback
        raise SystemExit(f"kvlab: {error}") from error


if __name__ == "__main__":
    main()
