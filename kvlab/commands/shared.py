"""What several commands need: stores, records, run folders, tables, JSON."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pandas as pd
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvlab.files import write_text
from kvlab.generation import encode
from kvlab.knowledge import Item, KnowledgeCache
from kvlab.lab import corpora
from kvlab.models import fingerprint, position_limit
from kvlab.records import CONTEXTS, Record, messages, read_records
from kvlab.scale import Scale

parsed_options: dict = {}  # of the command that `kvlab.cli.main` runs; empty if Python calls it


def command_settings(**resolved) -> dict:
    """Options of the command line as JSON, with those that the command has resolved."""
    return json.loads(json.dumps(parsed_options | resolved, default=str))  # paths as texts


def defaults_file() -> Path:
    """The YAML file with this scale's defaults, a section per command."""
    return Path(__file__).with_name(f"{Scale.current().name}.yaml")


def load_shared_tokenizer(scale: Scale) -> PreTrainedTokenizerBase:
    target, draft = scale.load_tokenizer("target"), scale.load_tokenizer("draft")
    if target.get_vocab() != draft.get_vocab():
        names = {scale.target: target, scale.draft: draft}
        differing = target.get_vocab().keys() ^ draft.get_vocab().keys()
        token = max((token for token in sorted(differing) if token.isalpha()), key=len, default="")
        text = (target if token in target.get_vocab() else draft).convert_tokens_to_string([token])
        parts = []
        for name, tokenizer in names.items():
            ids = tokenizer(text, add_special_tokens=False).input_ids
            pieces = "|".join(tokenizer.decode(i) for i in ids)
            parts.append(f"{name} has {len(tokenizer)} tokens and reads {text!r} as {pieces!r}")
        difference = ", ".join(parts)
        raise ValueError(f"The two models' tokenizers differ ({difference}): choose one family.")
    return target


def scale_with_target(
    target: str | None, draft: str | None = None, enable_thinking: bool = False
) -> Scale:
    scale = Scale.current()
    names = {"target": target or scale.target, "draft": draft or scale.draft}
    return replace(scale, **names, enable_thinking=enable_thinking)


def require_store(store: Path, options: str = "") -> None:
    if not (store / "manifest.json").is_file():
        command = f"kvlab build-cache --store {store}{options}"
        raise ValueError(f"There is no store in {store}: build one with `{command}`.")


def open_store(
    store: Path, model: PreTrainedModel, scale: Scale, reads: str | None, embed: bool = True
) -> KnowledgeCache:
    """Open a store that a draft reads as "vector", "kv" or "prefix"; None: it does not read."""
    tokenizer = scale.load_tokenizer("target")
    embedder = scale.load_embedder() if embed else None
    knowledge = KnowledgeCache.load(store, model, tokenizer, embedder)
    part, name = ("hidden", "hidden states") if reads == "vector" else ("kv", "keys and values")
    if reads and part not in knowledge.keep:
        raise ValueError(f"The store in {store} keeps no {name}: build one with --keep {part}.")
    return knowledge


def find_item(store: KnowledgeCache, question: str, threshold: float) -> Item | None:
    hits = store.retrieve(question, threshold=threshold)
    return hits[0].item if hits else None


def sample_heldout(texts: Sequence[str], share: float, seed: int) -> list[str]:
    """Sample a fraction of texts, at least one if there are any."""
    if not 0 < share < 1:
        raise ValueError(f"heldout is {share}, expected a fraction between 0 and 1, such as 0.1.")
    return random.Random(seed).sample(texts, min(len(texts), max(1, round(share * len(texts)))))


def run_name(target: PreTrainedModel, *settings) -> str:
    """A name for a run of training with these settings: a checkpoint serves no other run."""
    return f"run-{short_digest(json.dumps([fingerprint(target)['weights'], *settings]))}"


def short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


Contexts = Sequence[Sequence[Record]]  # the records of each context
DATA = ("lab", *CONTEXTS)


RANGES = {  # of numbers on the command line, by their type and, where they differ, by their name
    int: {
        "": "[1, inf)",
        **dict.fromkeys(("every", "kv_warmup", "layers", "made_up", "sinks"), "[0, inf)"),
        **dict.fromkeys(("min_new_tokens", "top_k"), "[0, inf)"),
        "seed": f"[0, {2**32 - 1}]",
    },
    float: {
        "": "[0, inf)",
        **dict.fromkeys(("retention", "top_p"), "(0, 1]"),
        **dict.fromkeys(("forward_share", "kv_end", "min_p"), "[0, 1]"),
        "dropout": "[0, 1)",
        "gate": "(-inf, inf)",
        "heldout": "(0, 1)",
        "repetition_penalty": "(0, inf)",
        "threshold": "[-1, 1]",
    },
}


def require_ranges(options: Mapping) -> None:
    """Refuse numbers of a command line that are out of their range, before anything is loaded."""
    for name, value in options.items():
        numbers = value if isinstance(value, list) else [value]
        if isinstance(value, Mapping):
            numbers = map(float, value.values())
        for number in numbers:
            if type(number) not in RANGES:
                continue
            ranges = RANGES[type(number)]
            interval = ranges.get(name, ranges[""])
            if not _is_in(number, interval):
                kind = "an integer" if type(number) is int else "a number"
                expected = (
                    "a positive integer" if interval == "[1, inf)" else f"{kind} in {interval}"
                )
                raise ValueError(f"{name} is {number}, expected {expected}.")


def _is_in(number: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    is_end = (number == low and interval[0] == "[") or (number == high and interval[-1] == "]")
    return low < number < high or is_end


def leave_out_long(
    models: Sequence[PreTrainedModel | PreTrainedConfig], items: list, lengths: Sequence[int]
) -> list:
    """Items whose number of tokens all models can read; prints how many are left out."""
    limit = min(map(position_limit, models))
    readable = [item for item, n in zip(items, lengths, strict=True) if n <= limit]
    if len(readable) < len(items):
        count = f"{len(items) - len(readable)} of {len(items)} texts are left out"
        print(f"{count}: they have more than the {limit} tokens that the model reads.")
    if items and not readable:
        raise ValueError(f"No text is left: all have more than {limit} tokens. Give shorter ones.")
    return readable


def load_records(
    data: str, source: str | None, split: str, unanswerable: bool = False
) -> dict[str, list[Record]]:
    """Records by their context; without those that have no answer, unless these are wanted."""
    if source is None:
        advice = "give --source, a file or a name on the hub"
        raise ValueError(f"There is no source of {data} records: {advice}.")
    records = {}
    rows = read_records(data, source, split)
    left = [record for record in rows if record.answers or unanswerable]
    if len(left) < len(rows):
        print(
            f"{len(rows) - len(left)} of {len(rows)} questions are left out: they have no answer."
        )
    for record in left:
        records.setdefault(record.context, []).append(record)
    if not records:
        raise ValueError(f"There is no {data} record in {source}: give a source that has some.")
    return records


def lab_passages(n: int, questions: int, seed: int, source: str | None) -> Contexts:
    """The lab's test passages."""
    require_no_source(source)
    readings = corpora.Readings(n, questions=questions, seed=seed, test=True)
    return [[Record(text, *turn[:1], turn[1:]) for turn in turns] for text, turns in readings]


def require_no_source(source: str | None) -> None:
    if source is not None:
        raise ValueError(f"source is {source!r}, but the lab makes its texts up: leave it out.")


Conversation = list[dict[str, str]]


def figures_table(figures: Sequence[Mapping]) -> str:
    table = pd.DataFrame(figures).set_index("name")[["value", "low", "high", "n"]]
    return table.astype({"low": float, "high": float}).to_string(float_format="{:.3f}".format)


def timed_name(folder: Path, command: str) -> Path:
    return folder / f"{command}_{datetime.now():%Y%m%d_%H%M%S}.json"


def write_json(path: Path, result: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(result), parse_constant=lambda _: None)  # JSON has no NaN
    return write_text(path, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


def load_requests(
    data: str, source: str | None, split: str, prompts: int | None, heldout: int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Training prompts, which the seed chooses, and held-out prompts, the same for every seed."""
    if data == "lab":
        require_no_source(source)
        training = corpora.Requests(prompts or 4000, seed=seed)
        return [*training], [*corpora.Requests(heldout, test=True)]
    records = load_records(data, source, split)
    contexts = random.Random(0).sample([*records], len(records))
    if len(contexts) <= heldout:
        hint = "give a source that has more, or a smaller heldout"
        raise ValueError(f"There are {len(records)} contexts, {heldout} to hold out: {hint}.")
    heldout_texts = [messages(records[context][0])[:1] for context in contexts[:heldout]]
    texts = []
    for context in contexts[heldout:]:
        texts += [messages(record)[:1] for record in records[context]]
    count = min(prompts or len(texts), len(texts))
    return random.Random(seed).sample(texts, count), heldout_texts


def encode_requests(
    tokenizer: PreTrainedTokenizerBase,
    models: Sequence[PreTrainedModel],
    conversations: Sequence[Conversation],
    max_new_tokens: int,
) -> list[list[int]]:
    """Token ids of those requests that all models can read with an answer of `max_new_tokens`."""
    rows = [encode(tokenizer, conversation) for conversation in conversations]
    return leave_out_long(models, rows, [len(ids) + max_new_tokens for ids in rows])
