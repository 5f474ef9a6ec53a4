"""Compressed caches: what is still answered from a part of the entries, by KV-Distill and by scores; bytes, latency."""

import hashlib
import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kvlab import lab
from kvlab.cache import Prefix, from_tensor, nbytes, prefill, select
from kvlab.commands.distill import SMALL
from kvlab.compress import (
    AWARE,
    METHODS,
    Examples,
    KVDistiller,
    compact,
    count_kept,
    evict,
    example,
    train,
)
from kvlab.evaluate import benchmark, figure, log_likelihoods
from kvlab.lab import worlds
from kvlab.lab.corpora import Readings
from kvlab.models import fingerprint, rotary_of
from kvlab.scale import config_of
from kvlab.slots import Slots, step
from kvlab.speculate import generate

THREADS, STEPS = 2, 400
BATCH, RATE, RETENTION = (SMALL[name] for name in ("batch_size", "learning_rate", "retention"))
SETTINGS = {name: SMALL[name] for name in ("standardize", "rank", "width", "sinks")}
PERCENTS, DEPTHS, ABLATION_STEPS = (50, 25, 10, 5, 2), (0, 25, 50, 75, 100), 100
COMPARED = ("distill", "snapkv", "key_norm_reversed", "random")
RUNS = Path(
    "lab-runs/distill"
)  # checkpoints: a run that was stopped goes on, one that is done is read
ABLATIONS = {
    "base": {},
    "free_scores": {"standardize": False},
    "forward_kl": {"forward_share": 1.0},
    "reverse_kl": {"forward_share": 0.0},
    "routing_all": {"routing": "all"},
    "routing_embedding": {"routing": "embedding"},
    "gate_log": {"gate": "log"},
    "gate_none": {"gate": "none"},
    "no_adapters": {"adapters": False},
    "layer_1": {"layer": 1},
    "layer_6": {"layer": 6},
    "layer_12": {"layer": 12},
}


class Lab(NamedTuple):
    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    quick: bool


class Passage(NamedTuple):
    """A context (1, T), and its questions with their answers as token ids."""

    context: Tensor
    questions: list[Tensor]
    answers: list[list[int]]


Compress = Callable[
    [Tensor, Tensor], Prefix
]  # of a context, for a question (which most methods do not look at)


def passages(s: Lab, readings: Sequence) -> list[Passage]:
    made = []
    for text, turns in readings:
        asked = [example(s.tokenizer, text, [turn]) for turn in turns]
        questions = [e.text[e.weights == 0] for e in asked]
        made.append(
            Passage(
                asked[0].context[None], questions, [e.text[e.weights == 1].tolist() for e in asked]
            )
        )
    return made


def held_out(s: Lab, n: int, questions: int, seed: int) -> Readings:
    """Test passages; in a quick run one small one."""
    return (
        Readings(1, (4, 4), 1, seed, test=True)
        if s.quick
        else Readings(n, (16, 24), questions, seed, test=True)
    )


def exact(s: Lab, texts: Sequence[Passage], compress: Compress, aware: bool = False) -> np.ndarray:
    """1 where a question is answered word for word from its passage's compressed cache: (passages, questions)."""
    rows, prefixes = [], []
    for p in texts:
        rows += p.questions
        made = (
            [compress(p.context, q) for q in p.questions]
            if aware
            else [compress(p.context, None)] * len(p.questions)
        )
        prefixes += made
    right = []
    for i in range(0, len(rows), 64):
        right += [
            tokens.tolist()
            for tokens in generate(
                s.target,
                rows[i : i + 64],
                prefix=prefixes[i : i + 64],
                max_new_tokens=2 if s.quick else 8,
            ).tokens
        ]
    wanted = [answer for p in texts for answer in p.answers]
    good = np.array([a == b for a, b in zip(right, wanted, strict=True)], float)
    return good.reshape(len(texts), -1)


def trained(s: Lab, name: str, seed: int, steps: int, folder: Path) -> KVDistiller:
    """A distiller for the target, with what an ablation changes. One that is there is read."""
    changes = dict(ABLATIONS[name])
    losses = {key: changes.pop(key) for key in ("forward_share",) if key in changes}
    adapters = changes.pop("adapters", True)
    torch.manual_seed(seed)
    distiller = KVDistiller(s.target, **SETTINGS | changes)
    if not adapters:
        distiller.adapted.requires_grad_(False)
    facts, questions = ((2, 3), 1) if s.quick else ((8, 24), 8)
    settings = [
        asdict(distiller.settings),
        losses,
        adapters,
        facts,
        questions,
        BATCH,
        RATE,
        RETENTION,
    ]
    of = hashlib.sha256(
        json.dumps([*settings, fingerprint(s.target)["weights"]]).encode()
    ).hexdigest()[:8]
    texts = Examples(s.tokenizer, Readings(steps * BATCH, facts, questions, seed))
    train(
        distiller,
        texts,
        steps=steps,
        batch_size=2 if s.quick else BATCH,
        learning_rate=RATE,
        retention=RETENTION,
        checkpoint=folder / f"{name}-{steps}-{seed}-{of}.safetensors",
        every=50,
        seed=seed,
        **losses,
    )
    return distiller


def agnostic(
    s: Lab, distiller: KVDistiller | None, shared: bool = False
) -> dict[str, Callable[..., Prefix]]:
    """Ways to compress a context of which no question is known: by name, called with (context, question, retention)."""
    ways = {
        name: lambda ids, _, share, score=score: (
            evict(s.target, ids, score, retention=share, shared=shared).prefix
        )
        for name, score in METHODS.items()
    }
    if distiller:
        ways["distill"] = lambda ids, _, share: distiller.compress(ids, retention=share).prefix
        ways["choice"] = lambda ids, _, share: chosen(
            s, ids, distiller.compress(ids, retention=share).positions
        )
    return ways


def chosen(s: Lab, ids: Tensor, positions: Tensor) -> Prefix:
    """What a distiller chose, with the entries that the plain model made."""
    plain = whole(s, ids)
    return plain._replace(cache=select(plain.cache, positions))


def aware(s: Lab) -> dict[str, Callable[..., Prefix]]:
    return {
        name: lambda ids, asked, share, score=score: (
            evict(s.target, ids, score, retention=share, question_ids=asked[None]).prefix
        )
        for name, score in AWARE.items()
    }


def whole(s: Lab, ids: Tensor, *_) -> Prefix:
    return prefill(s.target, ids)


def match_figures(s: Lab, distillers: dict[int, KVDistiller]) -> list[dict]:
    """Exact match over retention; passages differ from seed to seed, methods are asked about the same."""
    found: dict[str, list[np.ndarray]] = {}
    for seed, distiller in distillers.items():
        texts = passages(s, held_out(s, 48, 5, 1000 + seed))
        torch.manual_seed(seed)
        add = lambda name, *args, **kw: found.setdefault(name, []).append(
            exact(s, texts, *args, **kw).mean(1)
        )
        add("full", partial(whole, s))
        for percent in tqdm(PERCENTS, desc=f"seed {seed}"):
            for name, way in agnostic(s, distiller).items():
                add(f"{name}_{percent}", partial(way, share=percent / 100))
            for name, way in aware(s).items():
                add(f"{name}_{percent}", partial(way, share=percent / 100), aware=True)
            if percent in (25, 10):
                for name, way in agnostic(s, None, shared=True).items():
                    add(f"{name}_shared_{percent}", partial(way, share=percent / 100))
    values = {name: np.concatenate(parts) for name, parts in found.items()}
    told = f"held-out passages of 16 to 24 facts, 5 questions each, greedy, word for word; {len(distillers)} seed(s), n "
    told += "is passages; "
    figures = []
    for name, shares in values.items():
        kind = (
            "the question is known when entries are chosen"
            if "aware" in name
            else "the question is not known"
        )
        kind += ", same entries in all heads" if "shared" in name else ""
        kind += (
            ", what distill chose, as the plain model made it" if name.startswith("choice") else ""
        )
        kind = "the whole cache" if name == "full" else kind
        figures.append(figure(f"em_{name}", shares, "fraction", told + kind))
    for percent in (25, 10):
        for seed, shares in zip(distillers, found[f"distill_{percent}"], strict=True):
            figures.append(
                figure(
                    f"em_distill_{percent}_seed_{seed}",
                    shares,
                    "fraction",
                    f"{told}seed {seed} alone",
                )
            )
    for percent in PERCENTS:
        best = max(METHODS, key=lambda name: values[f"{name}_{percent}"].mean())
        gain = values[f"distill_{percent}"] - values[f"{best}_{percent}"]
        conditions = f"distill minus {best}, the best of the question-agnostic scores, passage by passage; {told}"
        figures.append(figure(f"gain_{percent}", gain, "difference", conditions))
        lost = values["full"] - values[f"distill_{percent}"]
        figures.append(
            figure(
                f"lost_{percent}",
                lost,
                "difference",
                f"full minus distill, passage by passage; {told}",
            )
        )
    return figures


def size_figures(s: Lab, distiller: KVDistiller) -> list[dict]:
    """Bytes of what is kept over bytes of the whole cache, and what compaction changes."""
    texts, figures = passages(s, held_out(s, 48, 5, 1000)), []
    full = [nbytes(whole(s, p.context).cache) for p in texts]
    for percent in PERCENTS:
        kept = [distiller.compress(p.context, retention=percent / 100).prefix.cache for p in texts]
        ratios = [nbytes(part) / all_of_it for part, all_of_it in zip(kept, full, strict=True)]
        figures.append(
            figure(
                f"bytes_ratio_{percent}", ratios, "ratio", f"bytes at {percent} % over bytes of all"
            )
        )
    rotary = rotary_of(s.target)
    for percent in (25, 10):
        moved = lambda ids, _, share=percent / 100: (
            compact(distiller.compress(ids, retention=share), rotary).prefix
        )
        told = "kept keys moved to positions 0, 1, ...; distill, seed 0, as em_distill"
        figures.append(
            figure(
                f"em_distill_compacted_{percent}", exact(s, texts, moved).mean(1), "fraction", told
            )
        )
    return figures


def choice_figures(s: Lab, distiller: KVDistiller) -> list[dict]:
    """The likeliest of four options, from the whole cache and from parts of it."""
    rng = np.random.default_rng(7)
    texts = held_out(s, 100, 1, 2000)
    arms = {"full": partial(whole, s)}
    ways = agnostic(s, distiller)
    for percent in (25, 10, 5):
        for name in COMPARED:
            arms[f"{name}_{percent}"] = partial(ways[name], share=percent / 100)
    right: dict[str, list[float]] = {name: [] for name in arms}
    for text, [(question, answer)] in texts:
        relation = next(r for r in worlds.RELATIONS.values() if answer in r.values)
        asked = [
            example(s.tokenizer, text, [(question, v)])
            for v in [answer, *others(rng, text, relation, answer)]
        ]
        prompts, endings = ([e.text[e.weights == w] for e in asked] for w in (0, 1))
        for name, way in arms.items():
            scores = log_likelihoods(
                s.target, s.tokenizer, prompts, endings, prefix=way(asked[0].context[None], None)
            )
            right[name].append(float(scores.argmax() == 0))
    told = "held-out passages of 16 to 24 facts, the likeliest of four answers of a kind, the others from the passage as "
    told += "far as it has some; distill: seed 0"
    return [figure(f"choice_{name}", values, "fraction", told) for name, values in right.items()]


def others(
    rng: np.random.Generator, text: str, relation: worlds.Relation, answer: str
) -> list[str]:
    """Three wrong answers of the same kind, from the passage if it has some: to know its words must not be enough."""
    words = set(re.findall(r"\w+", text))
    wrong = rng.permutation([v for v in relation.values if v != answer]).tolist()
    return sorted(wrong, key=lambda v: v not in words)[:3]


def needle_figures(s: Lab, distiller: KVDistiller) -> list[dict]:
    """One fact asked for, by where it stands and how much stands around it."""
    ways, figures = agnostic(s, distiller), []
    arms = {"full": partial(whole, s)}
    arms |= {f"{n}_{p}": partial(ways[n], share=p / 100) for p in (25, 10) for n in COMPARED}
    for facts in (16,) if s.quick else (8, 16, 32):
        texts = [needles(s, facts, seed) for seed in range(1 if s.quick else 40)]
        for arm, way in arms.items():
            for depth, values in zip(DEPTHS, exact(s, texts, way).T, strict=True):
                told = f"a passage of {facts} facts, the one asked for at {depth} % of its depth; distill: seed 0"
                figures.append(figure(f"needle_{arm}_{facts}_{depth}", values, "fraction", told))
    return figures


def needles(s: Lab, facts: int, seed: int) -> Passage:
    """A held-out passage and a question about the fact at each depth."""
    rng = random.Random(f"needle:{facts}:{seed}")
    passage = worlds.make_passage(rng, facts, test=True)
    asked = [passage.facts[round(depth / 100 * (facts - 1))] for depth in DEPTHS]
    return passages(s, [(passage.text, [(fact.question(rng), fact.value) for fact in asked])])[0]


def ablation_figures(s: Lab, folder: Path, seeds: Sequence[int]) -> list[dict]:
    """What each part of the method is worth: short runs that differ in one thing, each with several seeds."""
    steps, found, figures = (1 if s.quick else ABLATION_STEPS), {}, []
    texts = passages(s, held_out(s, 48, 5, 3000))
    for name in ABLATIONS:
        distillers = [trained(s, name, seed, steps, folder) for seed in seeds]
        for percent in (25, 10):
            means = [matches(s, distiller, texts, percent / 100).mean() for distiller in distillers]
            found[name, percent] = np.array(means)
        if name in ("base", "free_scores"):
            slopes = [slope(distiller, texts, 0.25) for distiller in distillers]
            told = f"mean of sigma(s) (1 - sigma(s)) over tokens kept at 25 %, after {steps} steps, n is seeds"
            figures.append(figure(f"gate_slope_{name}", slopes, "per unit of score", told))
    told = f"{steps} steps, every token of the answer the likeliest, same 48 passages, n is seeds: "
    told += "the interval has the chance of training in it"
    for (name, percent), means in found.items():
        figures.append(
            figure(f"ablation_{name}_{percent}", means, "fraction", f"at {percent} %; {told}")
        )
        if name != "base":
            change = f"{name} minus base, seed by seed, at {percent} %; {told}"
            figures.append(
                figure(
                    f"ablation_change_{name}_{percent}",
                    means - found["base", percent],
                    "difference",
                    change,
                )
            )
    return figures


def slope(distiller: KVDistiller, texts: Sequence[Passage], share: float) -> float:
    """How much the gates of kept tokens still change with their scores: 0.25 at most, 0 where they are open."""
    kept = [distiller.compress(p.context, retention=share) for p in texts]
    gates = torch.cat([part.scores.gather(1, part.positions)[0].sigmoid() for part in kept])
    return (gates * (1 - gates)).mean().item()


@torch.no_grad()
def matches(s: Lab, distiller: KVDistiller, texts: Sequence[Passage], share: float) -> np.ndarray:
    """The share of each passage's questions for which each token of the answer is the likeliest one, for any gate."""
    found = []
    for p in texts:
        rows = [
            torch.cat([q, torch.tensor(a)]) for q, a in zip(p.questions, p.answers, strict=True)
        ]
        text = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        context = p.context.expand(len(rows), -1)
        count = torch.full((len(rows),), count_kept(context.shape[1], share))
        chosen = distiller.read_on(
            distiller.keep(context, torch.ones_like(context), count), text
        ).argmax(-1)
        found.append(
            np.mean(
                [
                    c[len(q) - 1 :][: len(a)].tolist() == a
                    for c, q, a in zip(chosen, p.questions, p.answers, strict=True)
                ]
            )
        )
    return np.array(found)


@torch.inference_mode()
def speed_figures(quick: bool) -> list[dict]:
    """Decoding behind 8,192 tokens or a part of them, on a model of Qwen3-0.6B's shape with random weights."""
    config, entries = (
        config_of("lab-target" if quick else "Qwen/Qwen3-0.6B"),
        256 if quick else 8192,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    memory = {p: kept_slots(model, count_kept(entries, p / 100), entries) for p in (100, *PERCENTS)}
    seconds: dict[int, list[float]] = {p: [] for p in memory}
    for turn in range(1 if quick else 12):
        for percent, slots in memory.items():
            started = time.perf_counter()
            step(model, slots, torch.tensor([[turn]]), slots.aim(slots.lengths, 1))
            seconds[percent].append(time.perf_counter() - started)
    told = f"one token, batch 1, float32, {config.num_hidden_layers} layers, behind {entries} tokens of which so many "
    told += f"percent of the entries are kept; random weights, {torch.get_num_threads()} threads, in turn"
    figures = []
    for percent, values in seconds.items():
        warm, size = (
            values[2:] or values,
            nbytes(memory[percent].entries(0, stop=count_kept(entries, percent / 100))) / 1e6,
        )
        figures.append(figure(f"decode_ms_{percent}", [1000 * v for v in warm], "ms", told))
        ratios = [a / b for a, b in zip(seconds[100][2:] or seconds[100], warm, strict=True)]
        figures.append(
            figure(
                f"decode_speedup_{percent}",
                ratios,
                "ratio",
                f"the whole cache's time over this; {told}",
            )
        )
        figures.append(figure(f"cache_mb_{percent}", [size], "MB", f"keys and values; {told}"))
    return figures


def kept_slots(model: PreTrainedModel, kept: int, entries: int) -> Slots:
    """A cache of so many entries of a longer text."""
    slots, heads = Slots(model, rows=1, room=kept + 16), model.config.num_key_value_heads
    size = (model.config.num_hidden_layers, 2, 1, heads, kept, model.config.head_dim)
    slots.put(0, from_tensor(torch.randn(size)), entries)
    return slots


def measure(quick: bool, seed: int) -> list[dict]:
    """Exact match from compressed caches over retention, ablations, bytes, choices, needles, and decoding time."""
    torch.set_num_threads(THREADS)
    s = Lab(lab.load("lab-target"), lab.load_tokenizer("lab-target"), quick)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if quick else RUNS
        seeds = range(seed, seed + (1 if quick else 3))
        distillers = {i: trained(s, "base", i, 1 if quick else STEPS, folder) for i in seeds}
        figures = match_figures(s, distillers)
        figures += size_figures(s, distillers[seed]) + choice_figures(s, distillers[seed])
        figures += needle_figures(s, distillers[seed]) + ablation_figures(s, folder, seeds[:2])
    return figures + speed_figures(quick)


if __name__ == "__main__":
    benchmark(measure)
