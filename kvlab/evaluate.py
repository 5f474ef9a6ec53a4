"""Scores and their uncertainty: exact match, F1, ROUGE-L, multiple choice, bootstrap intervals."""

import platform
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlab.cache import Prefix, repeat
from kvlab.generation import encode

References = Sequence[str | Sequence[str]]  # per prediction one text, or several: the best counts


def exact_match(predictions: Sequence[str], references: References) -> np.ndarray:
    """Return SQuAD's exact match, 0 or 1 per pair: case, punctuation, articles and spaces are ignored.

    Example:
        >>> exact_match(["The cat.", "a dog"], ["cat", ["cat", "dog"]])
        array([1., 1.])
    """
    return _squad(predictions, references, "exact_match")


def f1(predictions: Sequence[str], references: References) -> np.ndarray:
    """Return SQuAD's F1 over words, between 0 and 1 per pair.

    Example:
        >>> f1(["red box", "red box"], ["red", ["red", "box red"]]).round(3)
        array([0.667, 1.   ])
    """
    return _squad(predictions, references, "f1")


def _squad(predictions: Sequence[str], references: References, score: str) -> np.ndarray:
    from torchmetrics.functional.text import squad  # a notebook without it can use all the rest

    scores = []
    for prediction, texts in _pair_with_references(predictions, references):
        target = {"answers": {"text": texts, "answer_start": [0] * len(texts)}, "id": "0"}
        scores.append(squad({"prediction_text": prediction, "id": "0"}, target)[score].item() / 100)
    return np.array(scores)


def rouge_l(predictions: Sequence[str], references: References) -> np.ndarray:
    """Return ROUGE-L, between 0 and 1 per pair: the F-measure of the longest common subsequence of words.

    Words are runs of a to z and digits, without case: other scripts have none, and score 0.
    Source: Lin (2004), https://aclanthology.org/W04-1013, section 3, with beta 1.

    Example:
        >>> rouge_l(["the red box", "a box"], ["the box", ["the cat", "a red box"]])
        array([0.8, 0.8])
    """
    from torchmetrics.functional.text import rouge_score

    scores = []
    for prediction, texts in _pair_with_references(predictions, references):
        score = rouge_score([prediction], [texts], accumulate="best", rouge_keys="rougeL")
        scores.append(score["rougeL_fmeasure"].item())
    return np.array(scores).round(6)  # from float32


def _pair_with_references(
    predictions: Sequence[str], references: References
) -> Iterator[tuple[str, list[str]]]:
    for prediction, texts in zip(predictions, references, strict=True):
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError(f"There is no reference for {prediction[:60]!r}: give one or several.")
        yield prediction, texts


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    endings: Sequence[Tensor],
    prefix: Prefix | None = None,
) -> np.ndarray:
    """Return log p(ending | prompt) in nats, summed over the ending's tokens, for pairs of 1-D id tensors.

    With a prefix (of one row), all prompts continue it.
    """
    rows = [torch.cat(pair) for pair in zip(prompts, endings, strict=True)]
    # Padding is on the right, where a causal model does not see it.
    input_ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
    input_ids = input_ids.to(model.device)
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    stops = torch.tensor([len(row) for row in rows])[:, None]
    columns = torch.arange(input_ids.shape[1])[None]
    past, position = None, 0
    if prefix is not None:
        past, position = repeat(prefix.cache, len(rows)), prefix.next_position
    position_ids = torch.as_tensor(position, device=model.device) + columns.to(model.device)
    text = {"input_ids": input_ids, "position_ids": position_ids}
    logits = model(**text, past_key_values=past, use_cache=past is not None).logits[:, :-1].float()
    log_p = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0].cpu()
    inside = (columns >= starts) & (columns < stops)  # (B, T)
    return (log_p * inside[:, 1:]).sum(-1).double().numpy()


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[dict[str, str]]],
    options: Sequence[Sequence[str]],
) -> np.ndarray:
    """Return the index of the likeliest option per conversation, by the sum of its log-probabilities.

    Example:
        >>> from kvlab import lab
        >>> model, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
        >>> text = "Anna lives in Rome. Where does Anna live?"
        >>> multiple_choice(model, tokenizer, [[{"role": "user", "content": text}]], [["Oslo", "Rome"]])
        array([1])
    """
    best = []
    pairs = list(zip(conversations, options, strict=True))
    for conversation, choices in tqdm(pairs, desc="multiple choice", delay=2, leave=False):
        prompt = torch.tensor(encode(tokenizer, conversation))
        endings = []
        for choice in choices:
            answered = [*conversation, {"role": "assistant", "content": choice}]
            endings.append(torch.tensor(encode(tokenizer, answered))[len(prompt) :])
        scores = log_likelihoods(model, tokenizer, [prompt] * len(endings), endings)
        best.append(int(scores.argmax()))
    return np.array(best)


def bootstrap(
    values: Sequence[float], n: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of `values` and its percentile bootstrap interval: (mean, low, high).

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
    """Return the p-value of Pearson's test that `counts` are draws from `probabilities`.

    Outcomes expected fewer than five times are pooled. An outcome of probability 0 that occurs gives 0.

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


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two computations of the same numbers agree as far as their precision allows.

    The largest difference counts, over the largest value: at most 1e-4 in float32, and 16 roundings
    in half precision (0.016 in float16, 0.125 in bfloat16), which a model's layers add up to. The
    coarser of two precisions decides.

    Example:
        >>> a = torch.linspace(-1, 1, 9)
        >>> close(a, a + 1e-6), close(a, a + 1e-3), close(a.half(), a + 1e-3)
        (True, False, True)
    """
    rounding = max(torch.finfo(x.dtype).eps for x in (a, b))
    tolerance = 16 * rounding if rounding > 1e-4 else 1e-4
    a, b = a.double().cpu(), b.double().cpu()
    return bool((a - b).abs().max() <= tolerance * torch.maximum(a.abs().max(), b.abs().max()))


def figure(name: str, values: Sequence[float], unit: str, conditions: str) -> dict:
    """Return one measured figure with its 95 % bootstrap interval, in the form of results files.

    Example:
        >>> figure("accuracy", [1, 1], "fraction", "two questions")["low"]
        1.0
    """
    value, low, high = bootstrap(values)
    named = {"name": name, "value": value, "low": low, "high": high, "unit": unit}
    return named | {"n": len(values), "conditions": conditions}


def run_info() -> dict:
    """Return device, package versions and commit of a measurement."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    command = ["git", "rev-parse", "--short", "HEAD"]
    git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "peft"):
        versions[name] = version(name)
    device = gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"device": device, "versions": versions, "commit": git.stdout.strip()}
