"""Scores and their uncertainty: exact match and F1, multiple choice, perplexity, the bootstrap."""

import json
import platform
import subprocess
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlab.cache import Prefix, repeat
from kvlab.files import write_text
from kvlab.generation import encode

References = Sequence[
    str | Sequence[str]
]  # for each prediction one text or several, of which the best counts


def exact_match(predictions: Sequence[str], references: References) -> np.ndarray:
    """SQuAD's exact match, 0 or 1 for each pair: equal after dropping case, punctuation, articles and extra space.

    Example:
        >>> exact_match(["The cat.", "a dog"], ["cat", ["cat", "dog"]])
        array([1., 1.])
    """
    return _squad(predictions, references, "exact_match")


def f1(predictions: Sequence[str], references: References) -> np.ndarray:
    """SQuAD's F1 over words, between 0 and 1 for each pair.

    Example:
        >>> f1(["red box", "red box"], ["red", ["red", "box red"]]).round(3)
        array([0.667, 1.   ])
    """
    return _squad(predictions, references, "f1")


def _squad(predictions: Sequence[str], references: References, score: str) -> np.ndarray:
    from torchmetrics.functional.text import (
        squad,
    )  # here, so that a notebook without it can use all the rest

    records = (
        (
            {"prediction_text": p, "id": "0"},
            {"answers": {"text": texts, "answer_start": [0] * len(texts)}, "id": "0"},
        )
        for p, texts in _texts(predictions, references)
    )
    return np.array([squad(*record)[score].item() / 100 for record in records])


def rouge_l(predictions: Sequence[str], references: References) -> np.ndarray:
    """ROUGE-L, between 0 and 1 for each pair: the F-measure of the longest common subsequence of words.

    Words are runs of a to z and digits, without case: in other scripts there are none, and the
    score is 0. Source: Lin (2004), https://aclanthology.org/W04-1013, section 3, with beta 1.

    Example:
        >>> rouge_l(["the red box", "a box"], ["the box", ["the cat", "a red box"]])
        array([0.8, 0.8])
    """
    from torchmetrics.functional.text import rouge_score

    scores = (
        rouge_score([p], [texts], accumulate="best", rouge_keys="rougeL")
        for p, texts in _texts(predictions, references)
    )
    return np.array([score["rougeL_fmeasure"].item() for score in scores]).round(6)  # from float32


def _texts(predictions: Sequence[str], references: References) -> Iterator[tuple[str, list[str]]]:
    for prediction, given in zip(predictions, references, strict=True):
        texts = [given] if isinstance(given, str) else list(given)
        if not texts:
            raise ValueError(
                f"There is no text to compare {prediction[:60]!r} with: give one or several."
            )
        yield prediction, texts


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    endings: Sequence[Tensor],
    prefix: Prefix | None = None,
) -> np.ndarray:
    """log p(ending | prompt) in nats, summed over the ending's tokens, for each pair of 1-D id tensors.

    All of them stand behind `prefix`, if there is one: a cache of one row.
    """
    rows = [torch.cat(pair) for pair in zip(prompts, endings, strict=True)]
    input_ids = torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0
    )
    starts = torch.tensor([len(p) for p in prompts])[:, None]
    stops = torch.tensor([len(r) for r in rows])[:, None]
    places = torch.arange(input_ids.shape[1])[None]
    # Padding stands on the right, where a causal model does not see it.
    past, first = (
        (None, 0) if prefix is None else (repeat(prefix.cache, len(rows)), prefix.next_position)
    )
    ids, position_ids = input_ids.to(model.device), (first + places).to(model.device)
    logits = model(
        input_ids=ids, position_ids=position_ids, past_key_values=past, use_cache=past is not None
    ).logits
    logits = logits[:, :-1].float()
    logs = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None].to(model.device))[..., 0].cpu()
    inside = (places >= starts) & (places < stops)  # (B, T)
    return (logs * inside[:, 1:]).sum(-1).double().numpy()


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[dict[str, str]]],
    options: Sequence[Sequence[str]],
    label: str = "multiple choice",
) -> np.ndarray:
    """The index of the likeliest option for each conversation, by the sum of its tokens' log-probabilities.

    Example:
        >>> from kvlab import lab
        >>> passage = {"role": "system", "content": "Anna lives in Rome. Ben has a dog."}
        >>> ask = [passage, {"role": "user", "content": "Where does Anna live?"}]
        >>> multiple_choice(lab.load("lab-target"), lab.load_tokenizer("lab-target"), [ask], [["Oslo", "Rome"]])
        array([1])
    """
    chosen = []
    for conversation, choices in tqdm(
        list(zip(conversations, options, strict=True)), desc=label, delay=2, leave=False
    ):
        prompt = torch.tensor(encode(tokenizer, conversation))
        asked = ([*conversation, {"role": "assistant", "content": choice}] for choice in choices)
        whole = [torch.tensor(encode(tokenizer, messages)) for messages in asked]
        scores = log_likelihoods(
            model, tokenizer, [prompt] * len(whole), [w[len(prompt) :] for w in whole]
        )
        chosen.append(int(scores.argmax()))
    return np.array(chosen)


def perplexity(log_likelihood: Sequence[float], tokens: Sequence[int]) -> float:
    """exp of minus the mean log-likelihood a token, from sums over texts and their token counts.

    Example:
        >>> round(perplexity([-2 * np.log(4.0)], [2]), 6)
        4.0
    """
    return float(np.exp(-np.sum(log_likelihood) / np.sum(tokens)))


def bootstrap(
    values: Sequence[float], n: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of `values` and its percentile bootstrap interval: (mean, low, high).

    Resample what is independent (prompts, seeds), never tokens of one prompt. For a paired
    comparison pass differences. Source: Efron and Tibshirani (1993), An Introduction to the
    Bootstrap, section 13.3.

    Example:
        >>> bootstrap([1, 1, 1])
        (1.0, 1.0, 1.0)
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"Expected a list of finite numbers with at least one entry; got shape {values.shape}."
        )
    picks = np.random.default_rng(seed).integers(len(values), size=(n, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def chi_square(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """The p-value of Pearson's test that `counts` are draws from `probabilities`; small by chance alone is rare.

    Outcomes expected fewer than five times are taken together. One that has probability 0 and
    occurs gives 0.

    Example:
        >>> round(chi_square([480, 520], [0.5, 0.5]), 3), chi_square([400, 600], [0.5, 0.5]) < 1e-9
        (0.206, True)
    """
    from scipy.stats import chisquare  # slow to import

    counts, probabilities = np.asarray(counts, float), np.asarray(probabilities, float)
    expected = probabilities / probabilities.sum() * counts.sum()
    if (counts[expected == 0] > 0).any():
        return 0.0
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    return float(chisquare(counts[expected > 0], expected[expected > 0]).pvalue)


def figure(name: str, values: Sequence[float], unit: str, conditions: str) -> dict:
    """One measured figure with its 95 % bootstrap interval, in the form that results files hold.

    Example:
        >>> figure("accuracy", [1, 1], "fraction", "two questions")["low"]
        1.0
    """
    value, low, high = bootstrap(values)
    named = {"name": name, "value": value, "low": low, "high": high, "unit": unit}
    return named | {"n": len(values), "conditions": conditions}


def benchmark(measure: Callable[[bool, int], list[dict]], seed: int = 0) -> None:
    """The command line of a benchmark: `--json` prints the result, `--out FILE` writes it, `--quick` takes seconds.

    Args:
        measure: `measure(quick, seed)` returns a list of `figure`.
    """
    parser = ArgumentParser(description=measure.__doc__)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="write the result to a JSON file")
    parser.add_argument("--quick", action="store_true", help="a smaller sample, in seconds")
    options = parser.parse_args()
    started = time.perf_counter()
    figures = measure(options.quick, seed)
    result = {
        "figures": figures,
        **circumstances(),
        "seeds": [seed],
        "seconds": round(time.perf_counter() - started, 1),
    }
    text = json.dumps(result, indent=1)
    if options.out:
        write_text(options.out, text + "\n")
    if options.json:
        print(text)
    elif not options.out:
        for f in figures:
            print(
                f"{f['name']:32} {f['value']:10.3f}  [{f['low']:.3f}, {f['high']:.3f}] {f['unit']}: {f['conditions']}"
            )


def circumstances() -> dict:
    """Device, package versions and commit of a measurement."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    packages = ("torch", "transformers", "accelerate", "peft")
    return {
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages},
        "commit": git.stdout.strip(),
    }
