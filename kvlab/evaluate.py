"""Scores and their uncertainty: exact match, F1, ROUGE-L, multiple choice, confidence intervals."""

import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvlab.cache import Prefix, read, repeat
from kvlab.generation import encode_answer

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


def squad_v2(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float | int]:
    """Return the scores of SQuAD 2.0's official script, in percent, with its names.

    Questions without an accepted answer (NoAns) are right if the prediction is empty; HasAns are
    the others. A group without questions has no scores.

    Source: Rajpurkar et al. (2018), https://aclanthology.org/P18-2124.

    Example:
        >>> scores = squad_v2(["Rome", "Oslo"], [["Rome"], []])
        >>> scores["exact"], scores["HasAns_exact"], scores["NoAns_exact"]
        (50.0, 100.0, 0.0)
    """
    texts = []
    for accepted in references:  # what is an article or a sign only counts as no answer
        empty = exact_match(accepted, [""] * len(accepted))
        texts.append([text for text, same in zip(accepted, empty, strict=True) if not same] or [""])
    values = {"exact": exact_match(predictions, texts), "f1": f1(predictions, texts)}
    answerable = np.array([accepted != [""] for accepted in texts])
    groups = {"": answerable >= 0, "HasAns_": answerable, "NoAns_": ~answerable}
    scores: dict[str, float | int] = {}
    for group, rows in groups.items():
        if rows.any():
            for name, score in values.items():
                scores[group + name] = float(100 * score[rows].mean())
            scores[group + "total"] = int(rows.sum())
    return scores


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

    With a prefix (of one row), all prompts continue it. An empty prompt needs a prefix with logits.
    """
    unpredicted = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if unpredicted and (prefix is None or prefix.logits is None):
        hint = "put one token of what comes before into it, or give a prefix with logits"
        raise ValueError(
            f"Nothing predicts the ending after empty prompt {unpredicted[0]}: {hint}."
        )
    rows = [torch.cat(pair) for pair in zip(prompts, endings, strict=True)]
    # Padding is on the right, where a causal model does not see it.
    input_ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
    input_ids = input_ids.to(model.device)
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    stops = torch.tensor([len(row) for row in rows])[:, None]
    columns = torch.arange(input_ids.shape[1])[None]
    past, position = DynamicCache(), 0
    if prefix is not None:
        past, position = repeat(prefix.cache, len(rows)), prefix.next_position
    position_ids = torch.as_tensor(position, device=model.device) + columns.to(model.device)
    logits = read(model, input_ids, past, position_ids=position_ids).logits
    logits = logits[:, :-1].float()
    log_p = torch.zeros(input_ids.shape)
    log_p[:, 1:] = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0].cpu()
    if unpredicted:
        log_p[:, 0] = prefix.logits[0].float().log_softmax(-1)[input_ids[:, 0]].cpu()
    inside = (columns >= starts) & (columns < stops)  # (B, T)
    return (log_p * inside).sum(-1).double().numpy()


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
    questions = list(zip(conversations, options, strict=True))
    for conversation, choices in tqdm(questions, desc="multiple choice", delay=2, leave=False):
        pairs = [map(torch.tensor, encode_answer(tokenizer, conversation, c)) for c in choices]
        prompts, endings = zip(*pairs, strict=True)
        scores = log_likelihoods(model, tokenizer, prompts, endings)
        best.append(int(scores.argmax()))
    return np.array(best)


def mean_interval(
    values: Sequence[float], level: float = 0.95, unit: str | None = None
) -> tuple[float, float, float]:
    """Return the mean of `values` and its confidence interval: (mean, low, high).

    Give one value for each thing that is independent (prompts, seeds), never for tokens of one
    prompt; for a paired comparison give differences. Coverage is near `level` unless a few values
    far from the others decide the mean: average logarithms of such.

    Sources: Agresti and Coull (1998), https://doi.org/10.2307/2685469, for fractions, with the
    effective number of Korn and Graubard (1998) where values are not just 0 and 1; Agresti and Min
    (2005), https://doi.org/10.1002/sim.1781, for differences that are all -1, 0 or 1; else Student's t.

    Args:
        level: probability that such an interval contains the true mean.
        unit: "fraction" for values between 0 and 1, "difference" for differences of two fractions.
            Without a unit, values between 0 and 1 of which some are 0 or 1 are fractions.

    Returns:
        mean, low, high; without an interval (low and high are NaN) for one value that is not 0 or 1.

    Example:
        >>> [round(number, 2) for number in mean_interval([1, 1, 1, 1, 1, 1, 1, 1, 1, 0])]
        [0.9, 0.57, 1.0]
        >>> [round(number, 2) for number in mean_interval([2.0, 3.0, 7.0])]
        [4.0, -2.57, 10.57]
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"Expected a list of finite numbers with at least one entry; got shape {values.shape}."
        )
    inside = values.min() >= 0 and values.max() <= 1
    if unit is None and inside and (values.min() == 0 or values.max() == 1):
        unit = "fraction"
    if unit == "fraction" and inside:
        ends = _fraction_interval(values, level)
    elif unit == "difference" and np.isin(values, (-1, 0, 1)).all():
        ends = _pairs_interval(values, level)
    else:
        ends = _t_interval(values, level)
    return float(values.mean()), *map(float, ends)


def _t_interval(values: np.ndarray, level: float) -> np.ndarray:
    from scipy.special import stdtrit  # slow to import

    n = len(values)
    if n == 1:
        return np.full(2, np.nan)
    margin = stdtrit(n - 1, (1 + level) / 2) * values.std(ddof=1) / np.sqrt(n)
    return values.mean() + margin * np.array([-1, 1])


def _fraction_interval(values: np.ndarray, level: float) -> np.ndarray:
    """Agresti and Coull's, for as many questions of 0 or 1 as would have the variance of the mean."""
    from scipy.special import ndtri, stdtrit

    n, z, mean = len(values), ndtri((1 + level) / 2), values.mean()
    variance, binary = values.var(), np.isin(values, (0, 1)).all()
    if n == 1 and not binary:
        return np.full(2, np.nan)
    if not binary and variance > 0:  # unlike that of 0 and 1, it does not follow from the mean
        n = (n - 1) * mean * (1 - mean) / variance * (z / stdtrit(n - 1, (1 + level) / 2)) ** 2
    center = (n * mean + z**2 / 2) / (n + z**2)
    margin = z * np.sqrt(center * (1 - center) / (n + z**2))
    return (center + margin * np.array([-1, 1])).clip(0, 1)


def _pairs_interval(values: np.ndarray, level: float) -> np.ndarray:
    """Agresti and Min's: half an observation more in each cell of the two-by-two table."""
    from scipy.special import ndtri

    n, square = len(values) + 2, (values**2).sum() + 1
    center = values.sum() / n
    margin = ndtri((1 + level) / 2) * np.sqrt((square / n - center**2) / n)
    return (center + margin * np.array([-1, 1])).clip(-1, 1)


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
    """Return one measured figure with its 95 % interval, in the form of results files.

    A measurement that was made once has no interval: low and high are None. Up to 400 values are kept
    beside their mean, so that an interval can be computed from them again.

    Example:
        >>> figure("accuracy", [1, 0, 1, 1], "fraction", "four questions")["value"]
        0.75
    """
    value, low, high = mean_interval(values, unit=unit)
    if np.isnan(low):
        low = high = None
    named = {"name": name, "value": value, "low": low, "high": high, "unit": unit}
    named |= {"n": len(values), "conditions": conditions}
    if 1 < len(values) <= 400:
        named["values"] = [float(f"{v:.6g}") for v in values]
    return named


def exponential(logarithmic: Mapping) -> dict:
    """Return the figure of a geometric mean, from one of the logarithms' mean; `values` stay logarithms.

    Example:
        >>> exponential(figure("cost", [0.0, 0.0], "ratio", "two equal times"))["value"]
        1.0
    """
    ends = ("value", "low", "high")
    known = [end for end in ends if logarithmic[end] is not None]
    return {**logarithmic, **{end: float(np.exp(logarithmic[end])) for end in known}}


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
