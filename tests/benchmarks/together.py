"""Everything together: a request about a passage, in steps that each add one part of the book."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from _benchmark import benchmark
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvlab import lab
from kvlab.cache import Prefix, load, nbytes, prefill, save, select
from kvlab.distill import KVDistiller
from kvlab.evaluate import figure
from kvlab.fuse import Fuser, Settings, Size
from kvlab.generation import encode_parts
from kvlab.lab.corpora import Requests
from kvlab.lab.models import MODELS
from kvlab.models import fingerprint
from kvlab.speculate import ModelProposer, Proposer, generate, summarize

RUNS, GAMMA, NEW, THREADS, RETENTION, SEEDS, REPEATS = Path("lab-runs/fuse"), 4, 96, 2, 0.25, 3, 3
STEPS = ("plain", "knowledge", "draft", "trained", "reads", "fused", "distilled")
TOLD = "lab-target; held-out passages of 8 to 16 facts, tell about somebody; greedy, gamma 4, from files to the last token"


class Models(NamedTuple):
    """The target, the draft as shipped and as trained, and a fuser to the trained one."""

    target: PreTrainedModel
    draft: PreTrainedModel
    trained: PreTrainedModel
    fuser: Fuser


class Request(NamedTuple):
    """Ids of a passage (n,) and of the question, and a folder with caches of the passage."""

    passage: Tensor
    question: Tensor
    folder: Path


def models(seed: int, quick: bool) -> Models:
    """The models of `tests/benchmarks/fuse.py`; in a quick run nothing is trained."""
    target, draft = lab.load("lab-target"), lab.load("lab-draft")
    if quick:
        torch.manual_seed(seed)
        sizes = [Size.of(model.config) for model in (draft, target)]
        return Models(target, draft, draft, Fuser(*sizes, settings=Settings(64, gate=4.0)))
    made = sorted(RUNS.glob(f"tuned-{seed}-*"))
    if not made:
        raise FileNotFoundError(
            f"There is no trained draft in {RUNS}: run tests/benchmarks/fuse.py first."
        )
    return Models(
        target,
        draft,
        AutoModelForCausalLM.from_pretrained(made[0] / "draft"),
        Fuser.from_pretrained(made[0]),
    )


def store(m: Models, n: int, folder: Path) -> list[Request]:
    """Keep the caches of each passage: the target's, and the draft's in three forms."""
    tokenizer, distiller = (
        lab.load_tokenizer("lab-target"),
        KVDistiller.from_pretrained(MODELS / "lab-distiller", m.target),
    )
    owners, rows = {"target": fingerprint(m.target), "draft": fingerprint(m.trained)}, []
    for number, conversation in enumerate(Requests(n, test=True)):
        passage, request = map(torch.tensor, encode_parts(tokenizer, conversation))
        place, ids = folder / str(number), passage[None]
        place.mkdir()
        with torch.no_grad():
            prefix, target_prefix = prefill(m.trained, ids), prefill(m.target, ids)
            fused = m.fuser(prefix, target_prefix)
            chosen = distiller.compress(ids, retention=RETENTION).positions[0]
        forms = {
            "target": target_prefix,
            "reads": prefix,
            "fused": replace(prefix, cache=fused),
            "distilled": replace(
                prefix, cache=select(fused, chosen), positions=prefix.positions[:, chosen]
            ),
        }
        for name, form in forms.items():
            owner = owners["target" if name == "target" else "draft"]
            save(form, place / f"{name}.safetensors", owner)
        rows.append(Request(passage, request, place))
    return rows


def load_prefix(request: Request, name: str, owner: dict) -> Prefix:
    """A stored prefix of the passage."""
    prefix = load(request.folder / f"{name}.safetensors", owner)
    return replace(prefix, input_ids=request.passage.tolist())


def proposer_of(step: str, m: Models, request: Request, owner: dict) -> Proposer | None:
    """The proposer of a step."""
    if step in ("plain", "knowledge"):
        return None
    if step in ("draft", "trained"):
        return ModelProposer(m.draft if step == "draft" else m.trained)
    return ModelProposer(m.trained, load_prefix(request, step, owner))


def answer(step: str, m: Models, request: Request, owners: Mapping[str, dict]) -> dict:
    """Answer a request at a step, loading included."""
    started = time.perf_counter()
    prefix = None if step == "plain" else load_prefix(request, "target", owners["target"])
    proposer = proposer_of(step, m, request, owners["draft"])
    ids = request.question if prefix else torch.cat((request.passage, request.question))
    output = generate(m.target, [ids], proposer, gamma=GAMMA, max_new_tokens=NEW, prefix=prefix)
    seconds, summary = time.perf_counter() - started, summarize(output.rounds)
    return {
        "step": step,
        "seconds": seconds,
        "tokens": tuple(output.tokens[0].tolist()),
        "acceptance": summary.acceptance,
        "tokens_per_call": summary.tokens_per_call,
    }


def run(m: Models, requests: Sequence[Request], repeats: int) -> pd.DataFrame:
    """All steps on each request in turn; times are medians of the repeats."""
    owners = {"target": fingerprint(m.target), "draft": fingerprint(m.trained)}
    for step in STEPS:
        answer(step, m, requests[0], owners)  # warms up
    rows = [
        {"prompt": number, "repeat": repeat} | answer(step, m, one, owners)
        for number, one in enumerate(tqdm(requests, desc="requests"))
        for repeat in range(repeats)
        for step in STEPS
    ]
    return pd.DataFrame(rows)


def step_figures(runs: list[pd.DataFrame]) -> list[dict]:
    """Time of each step, time saved over the step before, acceptance, and equality of the text."""
    texts = pd.concat(runs).groupby(["prompt", "step"])["tokens"].agg(set).unstack()
    times = [r.groupby(["prompt", "step"])["seconds"].median().unstack() for r in runs]
    seconds = 1000 * sum(times) / len(times)
    told, figures = (
        f"{TOLD}; {THREADS} threads, in turn; mean over {len(runs)} trained drafts; n is prompts",
        [],
    )
    for before, step in zip((None, *STEPS), STEPS, strict=False):
        figures.append(figure(f"ms_{step}", seconds[step], "ms", told))
        if before:
            saved = f"milliseconds of {before} minus those of {step}; {told}"
            figures.append(figure(f"saved_{step}", seconds[before] - seconds[step], "ms", saved))
            figures.append(
                figure(
                    f"speedup_{step}",
                    seconds["plain"] / seconds[step],
                    "ratio",
                    f"plain over {step}; {told}",
                )
            )
        equal = [
            float(one == plain and len(one) == 1)
            for one, plain in zip(texts[step], texts["plain"], strict=True)
        ]
        figures.append(
            figure(
                f"equal_{step}", equal, "fraction", f"the text is that of plain decoding; {told}"
            )
        )
        for what, unit in (("acceptance", "fraction"), ("tokens_per_call", "tokens")):
            values = np.mean([r[r["step"] == step].groupby("prompt")[what].mean() for r in runs], 0)
            if not np.isnan(values).all():
                figures.append(figure(f"{what}_{step}", values[~np.isnan(values)], unit, told))
    return figures


def size_figures(m: Models, requests: Sequence[Request]) -> list[dict]:
    """Bytes of a passage's cache, for the target and for each form of the draft's."""
    owners = {"target": fingerprint(m.target)} | dict.fromkeys(
        ("reads", "fused", "distilled"), fingerprint(m.trained)
    )
    return [
        figure(
            f"kb_{name}",
            [nbytes(load_prefix(one, name, owner).cache) / 1e3 for one in requests],
            "kB",
            f"cache of a passage; {TOLD}",
        )
        for name, owner in owners.items()
    ]


def measure(quick: bool, seed: int) -> list[dict]:
    """Answer requests with more and more of the book's parts."""
    torch.set_num_threads(THREADS)
    runs = []
    for i in range(seed, seed + (1 if quick else SEEDS)):
        m = models(i, quick)
        with tempfile.TemporaryDirectory() as folder:
            requests = store(m, 3 if quick else 60, Path(folder))
            runs.append(run(m, requests, 1 if quick else REPEATS))
            sizes = size_figures(m, requests)
    return step_figures(runs) + sizes


if __name__ == "__main__":
    benchmark(measure)
