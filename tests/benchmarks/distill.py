"""Compressed caches by KV-Distill and by scores: answers, bytes, latency."""

import hashlib
import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from _benchmark import benchmark
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kvlab import lab
from kvlab.cache import (
    Prefix,
    bytes_per_token,
    from_ragged,
    from_tensor,
    length,
    nbytes,
    prefill,
    select,
    truncate,
)
from kvlab.commands.shared import defaults_file
from kvlab.compress import (
    AWARE,
    METHODS,
    REPEATED,
    choose_entries,
    compact,
    count_kept,
    keep_entries,
    kvzip,
    score_entries,
)
from kvlab.distill import (
    DistillDataset,
    EncodedQuestion,
    FreeDistiller,
    KVDistiller,
    ScoreDataset,
    compress_for,
    encode_question,
    fit_scores,
    train_distiller,
)
from kvlab.evaluate import figure, log_likelihoods
from kvlab.files import write_text
from kvlab.lab import worlds
from kvlab.lab.corpora import Readings
from kvlab.models import fingerprint
from kvlab.ragged import pack
from kvlab.records import Record
from kvlab.scale import config_of
from kvlab.slots import Slots, step
from kvlab.speculate import generate

THREADS, STEPS = 1, 400
DEFAULTS = yaml.safe_load(defaults_file().read_text("utf-8")).get("distill", {})
BATCH, RATE, RETENTION = (DEFAULTS[n] for n in ("batch_size", "learning_rate", "retention"))
SETTINGS = {name: DEFAULTS[name] for name in ("standardize", "rank", "sinks")}
SETTINGS["scorer_hidden_size"] = DEFAULTS["width"]
PERCENTS, DEPTHS, ABLATION_STEPS = (50, 25, 10, 5, 2), (0, 25, 50, 75, 100), 100
PASSAGES, SCORED, FREE_STEPS, SINKS = (
    16,
    600,
    (150, 50),
    0,
)  # the lab's models have no sinks to keep
FREE = ("random", "key_norm_reversed", "expected_attention")  # in scope "model", too
COSTS = ("key_norm_reversed", "expected_attention", "compactor", "kvzip", "kvzip_plus", "distill")
COSTS += ("distill_free", "attention_matching")
COMPARED = ("distill", "distill_free", "kvzip", "snapkv", "key_norm_reversed", "random")
RUNS = Path("lab-runs/distill")  # checkpoints: a stopped run goes on, a finished one is loaded
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
Passage = list[EncodedQuestion]  # questions about one context
Compress = Callable[[Passage], list[Prefix]]  # one prefix per question


class Lab(NamedTuple):
    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    quick: bool


class LogGateDistiller(KVDistiller):
    """The monotone gate: log sigma(s) is added to the logits of kept entries, which no key can hold.

    A prefix has it in `attention_mask`, (B, k): -inf for entries that a row does not keep.
    """

    def __init__(self, model: PreTrainedModel, **settings):
        super().__init__(model, **settings | {"gate": "none"})
        self.scorer.requires_grad_(True)

    def keep(self, input_ids: Tensor, attention_mask: Tensor, counts: Sequence[int]) -> Prefix:
        prefix = super().keep(input_ids, attention_mask, counts)
        padding = attention_mask.shape[1] - attention_mask.sum(1, keepdim=True)
        scores = self.scores(input_ids, attention_mask).gather(1, prefix.positions + padding)
        bias = F.logsigmoid(scores).masked_fill(prefix.attention_mask == 0, float("-inf"))
        return replace(prefix, attention_mask=bias)

    def read_on(self, prefix: Prefix, text: Tensor) -> Tensor:
        if not prefix.attention_mask.is_floating_point():  # the full cache
            return super().read_on(prefix, text)
        rows, size = text.shape
        bias = prefix.attention_mask[:, None].expand(-1, size, -1)
        causal = torch.full((size, size), float("-inf")).triu(1).expand(rows, -1, -1)
        mask = torch.cat([bias, causal], -1)[:, None].to(self.model.dtype)
        position_ids = prefix.next_position[:, None] + torch.arange(size)
        past = truncate(prefix.cache, length(prefix.cache))  # it will be appended to
        inputs = {"attention_mask": mask, "position_ids": position_ids, "past_key_values": past}
        return self.model(input_ids=text, **inputs, use_cache=True).logits


def encode_passages(s: Lab, readings: Sequence) -> list[Passage]:
    passages = []
    for text, turns in readings:
        records = [Record(text, question, (answer,)) for question, answer in turns]
        passages.append([encode_question(s.tokenizer, record) for record in records])
    return passages


def held_out(s: Lab, n: int, questions: int, seed: int) -> Readings:
    """Test passages; in a quick run one small one."""
    if s.quick:
        return Readings(1, (4, 4), 1, seed, test=True)
    return Readings(n, (16, 24), questions, seed, test=True)


def exact(s: Lab, passages: Sequence[Passage], compress: Compress) -> np.ndarray:
    """1 where a question is answered word for word from its cache: (passages, questions)."""
    questions = [q for passage in passages for q in passage]
    prefixes = [prefix for passage in passages for prefix in compress(passage)]
    correct = []
    for start in range(0, len(questions), 64):
        part = slice(start, start + 64)
        rows = [q.question for q in questions[part]]
        options = {"prefix": prefixes[part], "max_new_tokens": 2 if s.quick else 8}
        for q, tokens in zip(
            questions[part], generate(s.target, rows, **options).tokens, strict=True
        ):
            correct.append(float(tokens.tolist() == q.answers[0].tolist()))
    return np.array(correct).reshape(len(passages), -1)


def trained(s: Lab, name: str, seed: int, steps: int, folder: Path) -> KVDistiller:
    """A distiller for the target, with the changes of an ablation; a finished one is loaded."""
    changes = dict(ABLATIONS[name])
    losses = {key: changes.pop(key) for key in ("forward_share",) if key in changes}
    adapters = changes.pop("adapters", True)
    torch.manual_seed(seed)
    make = LogGateDistiller if changes.get("gate") == "log" else KVDistiller
    distiller = make(s.target, **SETTINGS | changes)
    if not adapters:
        distiller.adapted.requires_grad_(False)
    facts, questions = ((2, 3), 1) if s.quick else ((8, 24), 8)
    settings = [asdict(distiller.settings) | changes, losses, adapters, facts, questions]
    settings += [BATCH, RATE, RETENTION, fingerprint(s.target)["weights"]]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    readings = Readings(steps * BATCH, facts, questions, seed)
    train_distiller(
        distiller,
        DistillDataset(s.tokenizer, readings),
        steps=steps,
        batch_size=2 if s.quick else BATCH,
        learning_rate=RATE,
        retention=RETENTION,
        checkpoint=folder / f"{name}-{steps}-{seed}-{digest}.safetensors",
        every=50,
        seed=seed,
        **losses,
    )
    return distiller


def trained_free(s: Lab, seed: int, folder: Path) -> FreeDistiller:
    """A distiller with one budget over all heads: scores first, then writing."""
    torch.manual_seed(seed)
    free = FreeDistiller(s.target, rank=64, scorer_hidden_size=64, sinks=SINKS)
    count, (score_steps, steps) = (4, (1, 1)) if s.quick else (SCORED, FREE_STEPS)
    facts, questions, batch = ((2, 3), 1, 2) if s.quick else ((8, 24), 8, BATCH)
    name = f"free-{count}-{score_steps}-{steps}-{seed}-{fingerprint(s.target)['weights']['sha256'][:8]}"
    contexts = [text for text, _ in Readings(count, facts, 1, seed)]
    options = {"steps": score_steps, "seed": seed, "every": 50}
    checkpoint = {"checkpoint": folder / f"{name}-scores.safetensors", "batch_size": 2 * batch}
    fit_scores(free, ScoreDataset(s.target, s.tokenizer, contexts, SINKS), **options, **checkpoint)
    free.scorer.requires_grad_(False)
    readings = DistillDataset(s.tokenizer, Readings(steps * batch, facts, questions, seed))
    options |= {"checkpoint": folder / f"{name}.safetensors", "batch_size": batch, "steps": steps}
    train_distiller(free, readings, learning_rate=RATE, retention=(0.01, 0.5), **options)
    return free


def by_method(s: Lab, method: str, percent: float, **options) -> Compress:
    """Compress by a method of `compress_for`, or by one of the controls."""
    fraction = percent / 100
    controls = {"choice": choose, "random_counts": with_counts}
    if method in controls:
        return partial(controls[method], s, fraction=fraction, **options)
    # As published, the first four entries of each head always stay.
    options |= {"retention": fraction, "sinks": 4 if method == "kvzip_sinks" else SINKS}
    names = {"distill_free": "distill", "kvzip_sinks": "kvzip"}
    options["method"] = names.get(method, method)
    return partial(compress_for, s.target, **options)


def choose(s: Lab, passage: Passage, fraction: float, distiller: KVDistiller) -> list[Prefix]:
    """The entries that a distiller chose, as the plain model made them."""
    context = passage[0].context
    positions = distiller.compress(context, retention=fraction).positions
    plain = prefill(s.target, context)
    cache = select(plain.cache, positions)
    return [replace(plain, cache=cache, positions=positions)] * len(passage)


def with_counts(s: Lab, passage: Passage, fraction: float) -> list[Prefix]:
    """Random entries, as many in each head as KVzip keeps there."""
    context, q = passage[0].context, passage[0]
    count = count_kept(context.shape[1], fraction)
    score = partial(kvzip, sinks=SINKS)
    scores, cache = score_entries(s.target, context, score, count, repeat=q.repeat)
    counts = choose_entries(scores, count, "model").sum(-1, keepdim=True)
    kept = torch.rand_like(scores).argsort(-1).argsort(-1) < counts
    return [keep_entries(s.target, context, cache, kept)] * len(passage)


def arms_of_all(s: Lab, distiller: KVDistiller, free: FreeDistiller) -> dict[str, Compress]:
    """Every method at every size."""
    arms = {"full": by_method(s, "full", 100)}
    for percent in PERCENTS:
        for method in (*METHODS, *AWARE, *REPEATED, "attention_matching", "kvzip_sinks"):
            arms[f"{method}_{percent}"] = by_method(s, method, percent)
        for method in ("distill", "choice"):
            arms[f"{method}_{percent}"] = by_method(s, method, percent, distiller=distiller)
        arms[f"distill_free_{percent}"] = by_method(s, "distill_free", percent, distiller=free)
        for method in FREE:
            arms[f"{method}_free_{percent}"] = by_method(s, method, percent, scope="model")
        if percent in (25, 10):
            arms[f"random_counts_{percent}"] = by_method(s, "random_counts", percent)
            for method in ("random", "sinks_recent", "h2o", "snapkv", "key_norm"):
                arms[f"{method}_shared_{percent}"] = by_method(s, method, percent, scope="token")
            name = f"key_norm_reversed_shared_{percent}"
            arms[name] = by_method(s, "key_norm_reversed", percent, scope="token")
    return arms


def match_scores(s: Lab, seed: int, distiller, free, folder: Path) -> dict[str, np.ndarray]:
    """Exact match by passage of all arms, kept in a file after each arm."""
    path = folder / f"match-{PASSAGES}-{seed}.json"
    done = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    passages = encode_passages(s, held_out(s, PASSAGES, 5, 1000 + seed))
    for name, compress in tqdm(arms_of_all(s, distiller, free).items(), desc=f"seed {seed}"):
        if name not in done:
            torch.manual_seed(seed)
            done[name] = exact(s, passages, compress).mean(1).tolist()
            write_text(path, json.dumps(done))
    return {name: np.array(matches) for name, matches in done.items()}


def match_figures(s: Lab, shipped: KVDistiller, free: dict, folder: Path) -> list[dict]:
    """Exact match over retention; passages differ by seed, all methods get the same questions."""
    scores: dict[str, list[np.ndarray]] = {}
    for seed, distiller in free.items():
        for name, matches in match_scores(s, seed, shipped, distiller, folder).items():
            scores.setdefault(name, []).append(matches)
    values = {name: np.concatenate(parts) for name, parts in scores.items()}
    conditions = "held-out passages of 16 to 24 facts, 5 questions each, greedy, word for word; "
    conditions += f"{len(free)} seed(s), of the passages and of distill_free, n is passages; "
    figures = []
    for name, matches in values.items():
        figures.append(figure(f"em_{name}", matches, "fraction", conditions + kind_of(name)))
    for percent in (25, 10):
        for seed, matches in zip(free, scores[f"distill_free_{percent}"], strict=True):
            name, text = f"em_distill_free_{percent}_seed_{seed}", f"{conditions}seed {seed} alone"
            figures.append(figure(name, matches, "fraction", text))
    for percent in PERCENTS:
        best = max(METHODS, key=lambda name: values[f"{name}_{percent}"].mean())
        pairs = {
            "gain": ("distill", best),
            "where": ("kvzip", "kvzip_uniform"),
            "gain_free": ("distill_free", "kvzip"),
            "gain_kvzip": ("distill", "kvzip"),
            "gain_matching": ("attention_matching", "kvzip"),
            "gain_reversed": ("distill_free", "key_norm_reversed_free"),
        }
        for name, (ours, rival) in pairs.items():
            gain = values[f"{ours}_{percent}"] - values[f"{rival}_{percent}"]
            text = f"{ours} minus {rival}, passage by passage; {conditions}"
            figures.append(figure(f"{name}_{percent}", gain, "difference", text))
        for name, method in {"lost": "distill", "lost_free": "distill_free"}.items():
            loss = values["full"] - values[f"{method}_{percent}"]
            text = f"full minus {method}, passage by passage; {conditions}"
            figures.append(figure(f"{name}_{percent}", loss, "difference", text))
    return figures


def kind_of(name: str) -> str:
    """What distinguishes an arm, in words."""
    if name == "full":
        return "the whole cache"
    words = {
        "_aware": "the question is known when entries are chosen",
        "_shared": "same entries in all heads",
        "_free": "one budget over all layers and heads",
        "kvzip_layer": "one budget for each layer",
        "kvzip_uniform": "the same number in each head",
        "kvzip": "one budget over all layers and heads",
        "attention_matching": "entries of kvzip, with fitted values and biases",
        "_counts": "random entries, as many in each head as kvzip keeps",
        "choice": "what distill chose, as the plain model made it",
        "distill": "the distiller that ships, the same tokens in all layers and heads",
    }
    kind = next((text for part, text in words.items() if part in name), "")
    sinks = ", the first four always stay" if "kvzip_sinks" in name else ""
    unknown = "the question is not known"
    return kind + sinks if "_aware" in name else ", ".join(filter(None, (unknown, kind))) + sinks


def cost_figures(s: Lab, distiller: KVDistiller, free: FreeDistiller) -> list[dict]:
    """What compressing a passage to a tenth takes: readings, milliseconds, and bytes over the ideal."""
    passages = encode_passages(s, held_out(s, 12, 1, 4000))
    token = bytes_per_token(s.target.config, s.target.dtype)
    seconds, over, figures = {}, {}, []
    for passage in passages:
        whole = passage[0].context.shape[1]
        started = time.perf_counter()
        prefill(s.target, passage[0].context)
        seconds.setdefault("full", []).append(time.perf_counter() - started)
        for name in COSTS:
            options = {"distill": {"distiller": distiller}, "distill_free": {"distiller": free}}
            for percent in (25, 10, 5):
                compress = by_method(s, name, percent, **options.get(name, {}))
                started = time.perf_counter()
                cache = compress(passage)[0].cache
                if percent == 10:
                    seconds.setdefault(name, []).append(time.perf_counter() - started)
                ideal = count_kept(whole, percent / 100) * token
                over.setdefault((name, percent), []).append(nbytes(cache) / ideal)
    for name, values in seconds.items():
        milliseconds = [1000 * value for value in values]
        text = "compressing a passage of 16 to 24 facts to a tenth, with all readings; 1 process"
        figures.append(figure(f"ms_{name}", milliseconds, "ms", text))
        ratios = [a / b for a, b in zip(values, seconds["full"], strict=True)]
        text = "this time over that of reading the passage once, passage by passage"
        figures.append(figure(f"readings_ms_{name}", ratios, "ratio", text))
    for (name, percent), values in over.items():
        text = f"bytes of the cache over bytes of {percent} % of the entries, passage by passage"
        figures.append(figure(f"bytes_over_ideal_{name}_{percent}", values, "ratio", text))
    eta, depth = distiller.settings.layer, s.target.config.num_hidden_layers
    lengths = [(p[0].context.shape[1], p[0].repeat[0].input_ids.shape[1]) for p in passages]
    twice = [1 + repeated / count for count, repeated in lengths]
    readings = dict.fromkeys(COSTS, [1.0] * len(passages)) | {"distill": [1 + eta / depth]}
    readings |= dict.fromkeys(("kvzip", "kvzip_plus", "attention_matching"), twice)
    for name, values in readings.items():
        text = "tokens that pass through all layers, over tokens of the passage"
        figures.append(figure(f"readings_{name}", values, "readings", text))
    return figures


def size_figures(s: Lab, distiller: KVDistiller) -> list[dict]:
    """Bytes of the kept entries over bytes of the whole cache, and what compaction changes."""
    passages, figures = encode_passages(s, held_out(s, 48, 5, 1000)), []
    contexts = [passage[0].context for passage in passages]
    full = [nbytes(prefill(s.target, context).cache) for context in contexts]
    for percent in PERCENTS:
        fraction = percent / 100
        kept = [nbytes(distiller.compress(c, retention=fraction).cache) for c in contexts]
        ratios = [part / whole for part, whole in zip(kept, full, strict=True)]
        conditions = f"bytes at {percent} % over bytes of all"
        figures.append(figure(f"bytes_ratio_{percent}", ratios, "ratio", conditions))
    conditions = "kept keys moved to positions 0, 1, ...; distill, the one that ships"
    for percent in (25, 10):
        compress = by_method(s, "distill", percent, distiller=distiller)
        moved = lambda passage, compress=compress: [compact(compress(passage)[0])] * len(passage)
        matches = exact(s, passages, moved).mean(1)
        name = f"em_distill_compacted_{percent}"
        figures.append(figure(name, matches, "fraction", conditions))
    return figures


def arms_of(s: Lab, distillers: dict, percents: Sequence[int]) -> dict[str, Compress]:
    """The full cache and the compared methods, by name and size."""
    arms = {"full": by_method(s, "full", 100)}
    for percent in percents:
        for name in COMPARED:
            options = {"distiller": distillers[name]} if name in distillers else {}
            arms[f"{name}_{percent}"] = by_method(s, name, percent, **options)
    return arms


def choice_figures(s: Lab, distillers: dict) -> list[dict]:
    """The most probable of four options, from the whole cache and from parts of it."""
    rng = np.random.default_rng(7)
    arms = arms_of(s, distillers, (25, 10, 5))
    correct: dict[str, list[float]] = {name: [] for name in arms}
    for text, [(question, answer)] in held_out(s, 100, 1, 2000):
        relation = next(r for r in worlds.RELATIONS.values() if answer in r.values)
        options = (answer, *others(rng, text, relation, answer))
        q = encode_question(s.tokenizer, Record(text, question, (answer,), options))
        prompts, endings = [q.question] * len(options), q.answers[1:]
        for name, compress in arms.items():
            prefix = compress([q])[0]
            scores = log_likelihoods(s.target, s.tokenizer, prompts, endings, prefix=prefix)
            correct[name].append(float(scores.argmax() == 0))
    conditions = "held-out passages of 16 to 24 facts, the likeliest of four answers of a kind, the others from the passage as "
    conditions += "far as it has some; distill: the one that ships, distill_free: seed 0"
    return [figure(f"choice_{name}", v, "fraction", conditions) for name, v in correct.items()]


def others(
    rng: np.random.Generator, text: str, relation: worlds.Relation, answer: str
) -> list[str]:
    """Three wrong answers of the same kind, from the passage where it has some."""
    words = set(re.findall(r"\w+", text))
    wrong = rng.permutation([v for v in relation.values if v != answer]).tolist()
    return sorted(wrong, key=lambda v: v not in words)[:3]


def needle_figures(s: Lab, distillers: dict) -> list[dict]:
    """One fact asked for, by its depth and by the length of the passage."""
    figures = []
    arms = arms_of(s, distillers, (25, 10))
    for facts in (16,) if s.quick else (8, 16, 32):
        passages = [needles(s, facts, seed) for seed in range(1 if s.quick else 40)]
        for arm, compress in arms.items():
            matches = exact(s, passages, compress)
            for depth, values in zip(DEPTHS, matches.T, strict=True):
                conditions = f"a passage of {facts} facts, the one asked for at {depth} % of its depth; distill: the one that ships, distill_free: seed 0"
                name = f"needle_{arm}_{facts}_{depth}"
                figures.append(figure(name, values, "fraction", conditions))
    return figures


def needles(s: Lab, facts: int, seed: int) -> Passage:
    """A held-out passage and a question about the fact at each depth."""
    rng = random.Random(f"needle:{facts}:{seed}")
    passage = worlds.make_passage(rng, facts, test=True)
    needles = [passage.facts[round(depth / 100 * (facts - 1))] for depth in DEPTHS]
    turns = [(fact.question(rng), fact.value) for fact in needles]
    return encode_passages(s, [(passage.text, turns)])[0]


def ablation_figures(s: Lab, folder: Path, seeds: Sequence[int]) -> list[dict]:
    """Ablations: short runs that differ in one thing, each with several seeds."""
    steps, scores, figures = (1 if s.quick else ABLATION_STEPS), {}, []
    passages = encode_passages(s, held_out(s, 48, 5, 3000))
    for name in ABLATIONS:
        distillers = [trained(s, name, seed, steps, folder) for seed in seeds]
        for percent in (25, 10):
            means = [matches(distiller, passages, percent / 100).mean() for distiller in distillers]
            scores[name, percent] = np.array(means)
        if name in ("base", "free_scores"):
            slopes = [slope(distiller, passages, 0.25) for distiller in distillers]
            conditions = f"mean of sigma(s) (1 - sigma(s)) over tokens kept at 25 %, after {steps} steps, n is seeds"
            figures.append(figure(f"gate_slope_{name}", slopes, "per unit of score", conditions))
    conditions = (
        f"{steps} steps, every token of the answer the likeliest, same 48 passages, n is seeds: "
    )
    conditions += "the interval has the chance of training in it"
    for (name, percent), means in scores.items():
        figures.append(
            figure(f"ablation_{name}_{percent}", means, "fraction", f"at {percent} %; {conditions}")
        )
        if name != "base":
            change = f"{name} minus base, seed by seed, at {percent} %; {conditions}"
            figures.append(
                figure(
                    f"ablation_change_{name}_{percent}",
                    means - scores["base", percent],
                    "difference",
                    change,
                )
            )
    return figures


def slope(distiller: KVDistiller, passages: Sequence[Passage], retention: float) -> float:
    """Mean derivative of the gates of kept tokens by their scores: at most 0.25, 0 where open."""
    gates = []
    for passage in passages:
        context = passage[0].context
        positions = distiller.compress(context, retention=retention).positions
        gates.append(distiller.scores(context).gather(1, positions)[0].sigmoid())
    gates = torch.cat(gates)
    return (gates * (1 - gates)).mean().item()


@torch.no_grad()
def matches(distiller: KVDistiller, passages: Sequence[Passage], retention: float) -> np.ndarray:
    """Fraction of each passage's questions whose every answer token is the most probable, for any gate."""
    fractions = []
    for passage in passages:
        rows = [torch.cat([q.question, q.answers[0]]) for q in passage]
        text = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        context = passage[0].context.expand(len(rows), -1)
        counts = [count_kept(context.shape[1], retention)] * len(rows)
        kept = distiller.keep(context, torch.ones_like(context), counts)
        predicted = distiller.read_on(kept, text).argmax(-1)
        correct = []
        for tokens, q in zip(predicted, passage, strict=True):
            answer = q.answers[0]
            correct.append(tokens[len(q.question) - 1 :][: len(answer)].equal(answer))
        fractions.append(np.mean(correct))
    return np.array(fractions)


@torch.inference_mode()
def speed_figures(quick: bool) -> list[dict]:
    """Decoding after 8,192 tokens or a part of them, on random weights of Qwen3-0.6B's shape."""
    config, entries = (
        config_of("lab-target" if quick else "Qwen/Qwen3-0.6B"),
        256 if quick else 8192,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    memory = {p: kept_slots(model, count_kept(entries, p / 100), entries) for p in (100, *PERCENTS)}
    memory |= {f"free_{p}": ragged_slots(model, p / 100, entries) for p in (25, 10)}
    memory |= {"masked_10": ragged_slots(model, 0.1, entries, masked=True)}
    seconds: dict[int | str, list[float]] = {p: [] for p in memory}
    for turn in range(1 if quick else 12):
        for percent, slots in memory.items():
            started = time.perf_counter()
            step(model, slots, torch.tensor([[turn]]), slots.set_write_positions(slots.lengths, 1))
            seconds[percent].append(time.perf_counter() - started)
    conditions = f"one token, batch 1, float32, {config.num_hidden_layers} layers, behind {entries} tokens of which so many "
    conditions += f"percent of the entries are kept; random weights, {torch.get_num_threads()} threads, in turn"
    figures = []
    for percent, values in seconds.items():
        warm, slots = values[2:] or values, memory[percent]
        # Without the columns for new tokens.
        parts = [t[0, :, :-ROOM] for layer in slots.layers for t in (layer.keys, layer.values)]
        size = sum(part.nbytes for part in parts) / 1e6
        figures.append(figure(f"decode_ms_{percent}", [1000 * v for v in warm], "ms", conditions))
        ratios = [a / b for a, b in zip(seconds[100][2:] or seconds[100], warm, strict=True)]
        figures.append(
            figure(
                f"decode_speedup_{percent}",
                ratios,
                "ratio",
                f"the whole cache's time over this; {conditions}",
            )
        )
        figures.append(
            figure(f"cache_mb_{percent}", [size], "MB", f"keys and values; {conditions}")
        )
    return figures


ROOM = 16  # columns for new tokens


def kept_slots(model: PreTrainedModel, kept: int, entries: int) -> Slots:
    """A cache of so many entries of a longer text."""
    slots, heads = Slots(model, rows=1, room=kept + ROOM), model.config.num_key_value_heads
    size = (model.config.num_hidden_layers, 2, 1, heads, kept, model.config.head_dim)
    slots.put(0, from_tensor(torch.randn(size)), entries)
    return slots


def ragged_slots(model: PreTrainedModel, fraction: float, entries: int, masked=False) -> Slots:
    """A cache whose heads keep numbers of entries of their own, in real memory or only masked.

    Numbers are drawn log-normally; their deviation is 0.8 of their mean, as that of KVzip's choices
    at a tenth on the lab's passages.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    shape = (config.num_hidden_layers, 1, config.num_key_value_heads, 1)
    weights = (0.7 * torch.randn(shape, generator=generator)).exp()
    counts = (weights / weights.mean() * fraction * entries).round().clamp(0, entries)
    layers = []
    for count in counts:
        kept = torch.rand(1, shape[2], entries).argsort(-1).argsort(-1) < count
        tensor = torch.randn(1, shape[2], entries, config.head_dim)
        layers.append(pack(tensor, tensor, kept | masked))
        if masked:
            layers[-1].bias = torch.zeros(kept.shape).masked_fill(~kept, float("-inf"))
    cache = from_ragged(layers)
    slots = Slots(model, 1, length(cache) + ROOM, [cache])
    slots.put(0, cache, entries)
    return slots


PARTS = ("match", "cost", "size", "choice", "needles", "ablations", "speed")
TRAINED_APART = {"size", "ablations", "speed"}  # without a distiller with a free budget


def measure(quick: bool, seed: int, parts: Sequence[str] = PARTS) -> list[dict]:
    """Exact match over retention, costs, bytes, choices, needles, ablations, and decoding time."""
    torch.set_num_threads(THREADS)
    s = Lab(lab.load("lab-target"), lab.load_tokenizer("lab-target"), quick)
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if quick else RUNS
        seeds = range(seed, seed + (1 if quick else 3))
        shipped = KVDistiller.from_pretrained(lab.models.MODELS / "lab-distiller", s.target)
        wanted = seeds if "match" in parts else seeds[:1]
        free = {i: trained_free(s, i, folder) for i in wanted} if {*parts} - TRAINED_APART else {}
        both = {"distill": shipped, "distill_free": free.get(seed)}
        if "match" in parts:
            figures += match_figures(s, shipped, free, folder)
        if "cost" in parts:
            figures += cost_figures(s, shipped, free[seed])
        if "size" in parts:
            figures += size_figures(s, shipped)
        if "choice" in parts:
            figures += choice_figures(s, both)
        if "needles" in parts:
            figures += needle_figures(s, both)
        if "ablations" in parts:
            figures += ablation_figures(s, folder, seeds[:2])
    return figures + (speed_figures(quick) if "speed" in parts else [])


if __name__ == "__main__":
    benchmark(measure, parts=PARTS)
