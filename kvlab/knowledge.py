"""A knowledge cache: question/answer items that a model has read, stored on disk.

A store is a folder. Items are added in *shards*: `shards/NAME.safetensors` holds the tensors of
some items, `shards/NAME.index.safetensors` their texts, token ids and the embeddings of their
questions. A shard is never changed. `manifest.json` lists the shards, and the model, tokenizer and
embedder that they belong to. Replacing it, atomically, is what adds items, so a kill at any moment
leaves the old store or the new one. Opening a store reads the manifest and the indexes; the tensors
of an item are read when the item is.

>>> import tempfile
>>> from kvlab import lab
>>> model, tokenizer = lab.load("lab-draft"), lab.load_tokenizer("lab-draft")
>>> records = [{"question": "Where does Anna live?", "answer": "Rome"}]
>>> with tempfile.TemporaryDirectory() as folder:
...     store = KnowledgeCache.build(folder, records, model, tokenizer)
...     hit = store.retrieve("where does anna live")[0]
...     hit.item.answer, store.read(hit.item).cache.get_seq_length(), store.retrieve("Who dances?")
('Rome', 9, [])
"""

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial, reduce
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from xxhash import xxh3_128, xxh3_128_hexdigest

from kvlab import cache as kv
from kvlab import models
from kvlab.cache import Prefix
from kvlab.files import as_bytes, write_tensors, write_text
from kvlab.generation import (
    Ending,
    Stop,
    answer_text,
    close_turn,
    continuations,
    encode,
    encode_answer,
    end_tokens,
)
from kvlab.losses import kl
from kvlab.models import CacheError
from kvlab.ragged import bias_of, is_ragged, pack
from kvlab.slots import Slots, step

VERSION = 1  # of the file format
PARTS = ("kv", "hidden")
RECOMPUTING = ("recompute", "gradual", "legolink")
ARMS = ("full", "prefix", "concat", "shift", *RECOMPUTING)
CACHES_USED = {"full": 0, "prefix": 1}  # how many prefixes' caches an arm uses; the others use all
MAX_ERROR = 0.005  # nats per token that rounding may cost a splice
MIN_AGREEMENT = 0.9  # fraction of next tokens of a splice that is trusted
EARLY_LAYERS = 2  # that "recompute" and "gradual" compute for all tokens
SHARD_BYTES, SHARD_ITEMS = 2**28, 256  # a shard is closed when it reaches either
LEFTOVER = re.compile(r"[0-9a-f]{16}(\.index)?\.safetensors|\.([0-9a-f]{16}|manifest)\..*\.part")
PROBE = "Is this store of the same embedder?"


class Embedder(Protocol):
    """Encodes questions as vectors; any `SentenceTransformer` does."""

    def encode(self, sentences: list[str], **options: bool) -> Tensor:
        """Return vectors (number of sentences, E)."""


@dataclass(frozen=True)
class Item:
    """An item without its tensors; `input_ids` are those of prompt and answer."""

    id: str
    domain: str
    question: str
    answer: str
    input_ids: tuple[int, ...]
    answer_start: int
    generated: bool = False  # the model's own answer
    shard: str = ""
    number: int = 0  # in its shard
    checksum: str = ""
    kept: int = 0  # entries of its compressed cache; 0: not compressed

    @property
    def key(self) -> tuple:
        """Two records with the same key are the same item."""
        return (self.domain, self.question, self.generated or self.answer)


class Hit(NamedTuple):
    """A retrieved item, and the cosine similarity of its question (1.0 for an exact match)."""

    item: Item
    score: float


Records = Iterable[Mapping[str, str]]


# -- splicing


@torch.no_grad()
def splice(
    model: PreTrainedModel,
    prefixes: list[Prefix],
    arm: str = "recompute",
    fraction: float = 0.15,
    first_tokens: int = 16,
) -> Prefix:
    """Join prefixes of one row that were prefilled alone, each from position 0.

    A later prefix was computed without the text before it, so all arms except the first two are
    approximations.

    Args:
        prefixes: with `input_ids`; the cache may be None where the arm does not use it.
        arm: "full" prefills all tokens again (exact); "prefix" keeps the first prefix and prefills
            the rest (exact); "concat" joins the caches as they are, with keys at wrong positions;
            "shift" moves each to its positions. The others move them, then compute some tokens of
            the later prefixes again, each on everything before it. "recompute" and "gradual" are
            CacheBlend (Yao et al. 2025, arXiv 2405.16444, section 4): the first two layers for all
            tokens, the others for those whose keys and values differ most from the stored ones.
            "recompute" chooses once, after the second layer. "gradual" chooses before each layer
            among the tokens of the layer before (section 4.3); their number falls linearly from
            twice `fraction` to none, or from all if `fraction` is over a half. "legolink" computes
            the first tokens of each later prefix again in all layers (LegoLink-k of EPIC, Hu et al.
            2025, arXiv 2410.15332).
        fraction: of the tokens after the first prefix, for "recompute" and "gradual": their mean
            over the layers after the first two. 1.0 is exact.
        first_tokens: of each later prefix, k of "legolink". The longest prefix's length is exact.

    Raises:
        CacheError: an unknown arm, too many tokens for the model, or a prefix that does not start
            at position 0, is not of this model, or is compressed (if it is to be recomputed).

    Example:
        >>> from kvlab import cache, lab
        >>> model, tokenizer = lab.load("lab-draft"), lab.load_tokenizer("lab-draft")
        >>> texts = tokenizer(["Anna lives in Rome.", " Ben has a dog."]).input_ids
        >>> prefixes = [cache.prefill(model, torch.tensor([ids])) for ids in texts]
        >>> splice(model, prefixes, "shift").next_position
        12
    """
    if arm not in ARMS:
        raise CacheError(f"The arm is {arm!r}: expected one of {', '.join(ARMS)}.")
    config = model.config.get_text_config(decoder=True)
    input_ids, caches, rotary = [], [], models.rotary_of(model)
    for number, prefix in enumerate(prefixes):
        if number < CACHES_USED.get(arm, len(prefixes)):
            count, end = len(prefix.input_ids), prefix.next_position
            entries = kv.length(prefix.cache)
            if not entries <= count == end or len(prefix.cache.layers) != config.num_hidden_layers:
                message = f"A prefix has {count} ids, {entries} entries and next position {end}"
                raise CacheError(f"{message}: prefill it alone, from position 0, with this model.")
            if arm in RECOMPUTING and (entries < count or is_ragged(prefix.cache)):
                raise CacheError("Evicted entries cannot be recomputed: use 'shift'.")
            moved = input_ids and arm != "concat"
            cache = kv.shift(prefix.cache, len(input_ids), rotary) if moved else prefix.cache
            caches.append(cache)
        input_ids += prefix.input_ids
    limit = config.max_position_embeddings
    if len(input_ids) > limit:
        raise CacheError(f"{len(input_ids)} tokens, the model reads up to {limit}: give fewer.")
    tokens = torch.tensor([input_ids], device=model.device)
    if arm == "full":
        return kv.prefill(model, tokens)
    start = len(prefixes[0].input_ids)
    if arm == "prefix" and len(prefixes) > 1:
        return kv.prefill(model, tokens[:, start:], prefixes[0])
    cache = reduce(kv.join, caches)
    cache = _recompute(model, cache, prefixes, arm, fraction, first_tokens)
    return Prefix(cache, len(input_ids), input_ids)


def tokens_computed(
    arm: str, lengths: Sequence[int], layers: int, fraction: float = 0.15, first_tokens: int = 16
) -> list[int]:
    """Count the tokens that `splice` computes in each layer: the work of an arm.

    Args:
        arm: as for `splice`, as are `fraction` and `first_tokens`.
        lengths: tokens of each prefix.
        layers: of the model.

    Example:
        >>> tokens_computed("gradual", [9, 20, 20], 6, fraction=0.25)
        [40, 40, 20, 13, 7, 0]
    """
    later = sum(lengths[1:])
    if arm not in ("recompute", "gradual"):
        heads = sum(min(first_tokens, length) for length in lengths[1:])
        return [{"full": sum(lengths), "prefix": later, "legolink": heads}.get(arm, 0)] * layers
    first = min(1.0, 2 * fraction) if arm == "gradual" else fraction
    fractions = torch.linspace(first, 2 * fraction - first, max(0, layers - EARLY_LAYERS))
    counts = [later] * EARLY_LAYERS + [round(f * later) for f in fractions.tolist()]
    return counts[:layers]


def _recompute(model, cache: DynamicCache, prefixes, arm: str, fraction: float, first_tokens: int):
    """Compute tokens of later prefixes again, on a cache of all; see `splice`."""
    lengths = [len(prefix.input_ids) for prefix in prefixes]
    layers = len(cache.layers)
    counts = tokens_computed(arm, lengths, layers, fraction, first_tokens)
    depth = sum(count > 0 for count in counts)
    if not depth:
        return cache
    most = first_tokens if arm == "legolink" else max(lengths)
    ends = list(accumulate(lengths))
    chosen = [range(a, min(a + most, b)) for a, b in pairwise(ends)]
    columns = torch.tensor([*chain(*chosen)], device=model.device)
    ids = torch.tensor([*chain(*(prefix.input_ids for prefix in prefixes))], device=model.device)
    slots = Slots(model, rows=1, room=ends[-1])
    slots.put(0, cache, ends[-1])
    shallow, part = models.first_layers(model, depth), slots.first(depth)
    with _narrowing(shallow, part, cache, columns, counts):
        step(shallow, part, ids[None, columns], part.set_write_columns(columns[None]), 1)
    return slots.entries(0)


@contextmanager
def _narrowing(model, slots: Slots, stored: DynamicCache, columns: Tensor, counts: list[int]):
    """Before each layer leave `counts` of the tokens: those that differ most in the layer before."""
    rows = torch.arange(len(columns), device=columns.device)  # of the tokens, those that are left

    def narrow(layer: int, module, args, options):
        nonlocal rows
        hidden = args[0]  # (1, tokens left, d)
        if counts[layer] < len(rows):
            difference = _difference(slots.layers[layer - 1], stored.layers[layer - 1])
            left = difference[columns[rows]].topk(counts[layer]).indices.sort().values
            rows, hidden = rows[left], hidden[:, left]
            slots.set_write_columns(columns[None, rows])
        narrowed = {
            "attention_mask": options["attention_mask"][:, :, rows],
            "position_ids": options["position_ids"][:, rows],
            "position_embeddings": tuple(x[:, rows] for x in options["position_embeddings"]),
        }
        return (hidden, *args[1:]), options | narrowed

    layers = getattr(model.base_model, models.layer_list(model.base_model, len(slots.layers)))
    with ExitStack() as hooks:
        for i, layer in enumerate(layers):
            hook = layer.register_forward_pre_hook(partial(narrow, i), with_kwargs=True)
            hooks.callback(hook.remove)
        yield


def _difference(layer, stored) -> Tensor:
    """Squared distance of each entry's key and value (T,) from the stored, over their mean size."""
    total = 0
    for new, old in ((layer.keys, stored.keys), (layer.values, stored.values)):
        new, old = new.float(), old.float()
        error, size = ((x * x).sum((0, 1, 3)) for x in (new - old, new))
        total = total + error / size.mean()
    return total


def prefill_behind(
    model: PreTrainedModel, input_ids: Sequence[int], dummy_ids: Sequence[int]
) -> Prefix:
    """Prefill a piece behind a dummy prefix, whose entries are then dropped; for `splice`.

    The dummy is the attention sink, so the piece's own first tokens are not. They move back to the
    positions that they have without it.

    Args:
        input_ids: of the piece.
        dummy_ids: the same for all pieces but the first.

    Example:
        >>> from kvlab import lab
        >>> prefill_behind(lab.load("lab-draft"), [7, 8, 9], dummy_ids=[5, 6]).next_position
        3
    """
    count, ids = len(dummy_ids), [*dummy_ids, *input_ids]
    prefix = kv.prefill(model, torch.tensor([ids], device=model.device))
    cache = kv.shift(_after(prefix, count), -count, models.rotary_of(model))
    return Prefix(cache, len(input_ids), input_ids)


class Check(NamedTuple):
    """What a splice does to the next tokens of a probe text; see `check`.

    Args:
        kl: KL divergence from full reading, in nats per token: the price of the splice.
        agreement: fraction of tokens after which the likeliest next token is that of full reading.
        error: KL divergence, in nats per token, from the same arm on pieces that the model has just
            read at their positions: 0, but for rounding, if the caches and their rotation are right.
    """

    kl: float
    agreement: float
    error: float

    @property
    def verdict(self) -> str:
        """What to do: "trust" it, "recompute" more tokens, or "reject" it.

        "reject": the cache is not that of its text at its positions (damaged, moved by a rotation
        that is not the model's, or of another model): prefill the pieces again with this model, and
        use "prefix" if it is rejected again. "recompute": the cache is what it should be, but the
        pieces depend on each other: use "recompute" with a larger fraction, or "prefix".
        """
        if not self.error <= MAX_ERROR:  # nan, too
            return "reject"
        close = self.kl <= MAX_ERROR or self.agreement >= MIN_AGREEMENT
        return "trust" if close else "recompute"


@torch.no_grad()
def check(
    model: PreTrainedModel,
    prefixes: list[Prefix],
    arm: str = "recompute",
    probe_ids: Sequence[int] | None = None,
    fraction: float = 0.15,
    first_tokens: int = 16,
) -> Check:
    """Splice prefixes, and compare what the model says after them with full reading.

    Reads the text and the probe three times: run it for each model and kind of piece, not for each
    request.

    Args:
        prefixes: as for `splice`, not compressed.
        arm: as for `splice`, as are `fraction` and `first_tokens`.
        probe_ids: a text that follows, such as a question with its answer. Default: the last piece
            once more.

    Example:
        >>> from kvlab import cache, lab
        >>> model, tokenizer = lab.load("lab-draft"), lab.load_tokenizer("lab-draft")
        >>> texts = tokenizer(["Anna lives in Rome.", " Ben has a dog."]).input_ids
        >>> prefixes = [cache.prefill(model, torch.tensor([ids])) for ids in texts]
        >>> check(model, prefixes, "prefix").verdict, check(model, prefixes, "concat").verdict
        ('trust', 'reject')
    """
    given = [p for p in prefixes if p.cache is not None]
    if any(is_ragged(p.cache) or kv.length(p.cache) < len(p.input_ids) for p in given):
        raise CacheError("A piece is compressed, so it is not its text: check it uncompressed.")
    spliced = splice(model, prefixes, arm, fraction, first_tokens)
    full = splice(model, prefixes, "full")
    probe = torch.tensor([probe_ids or prefixes[-1].input_ids], device=model.device)
    total = full.next_position + probe.shape[1]
    if total > (limit := model.config.get_text_config(decoder=True).max_position_embeddings):
        raise CacheError(f"{total} tokens with the probe, the model reads up to {limit}: cut it.")
    reference = full
    if arm not in CACHES_USED:  # approximations
        in_place = _read_in_place(model, prefixes)
        in_place = _recompute(model, in_place, prefixes, arm, fraction, first_tokens)
        reference = replace(full, cache=in_place)
    p, q, r = (_log_probabilities(model, x, probe) for x in (full, spliced, reference))
    agreement = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    price, error = (kl(q, x).mean().clamp(min=0).item() for x in (p, r))
    return Check(price, agreement, error)


def _read_in_place(model: PreTrainedModel, prefixes: list[Prefix]) -> DynamicCache:
    """Each text read alone at its positions: the model itself rotates its keys."""
    caches, start = [], 0
    for prefix in prefixes:
        ids = torch.tensor([prefix.input_ids], device=model.device)
        caches.append(kv.to_tensor(kv.prefill(model, ids, position=start).cache))
        start += ids.shape[1]
    return kv.from_tensor(torch.cat(caches, dim=4))


def _log_probabilities(model: PreTrainedModel, prefix: Prefix, ids: Tensor) -> Tensor:
    """Log-probabilities of the next tokens, (S, V), after each of ids (1, S)."""
    start, past = prefix.next_position, kv.clone(prefix.cache)  # it will be appended to
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    logits = model(ids, position_ids=positions, past_key_values=past, use_cache=True).logits
    return logits[0].float().log_softmax(-1)


# -- the store


class KnowledgeCache:
    """A store of items that one model has read. Make it with `build` or open it with `load`.

    The model is checked when a store is opened and when items are added, not at each reading.

    Attributes:
        items: list of `Item`, in the order in which they were added.
        embeddings: (len(items), E), unit vectors of their questions; E is 0 without an embedder.
        domains: from a domain's name to the indices of its items.
        keep: the stored tensors: "kv" (keys and values), "hidden" (last hidden states), or both.
        dtype: of the stored tensors; reading converts them to the model's.
    """

    def __init__(self, folder: Path, model, tokenizer, embedder, settings: dict):
        self.folder, self.model, self.tokenizer, self.embedder = folder, model, tokenizer, embedder
        self.settings = settings  # the manifest without the shards
        self.keep = tuple(settings["keep"])
        self.dtype = getattr(torch, settings["dtype"])
        self.shards, self.items, self.domains = [], [], {}
        self.embeddings = torch.empty(0, len(settings["embedder"]))

    @classmethod
    def build(
        cls,
        folder: str | Path,
        records: Records,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        embedder: Embedder | None = None,
        *,
        keep: Sequence[str] = ("kv",),
        dtype: torch.dtype | None = None,
        **adding,
    ) -> "KnowledgeCache":
        """Make a store, or open an existing one, and add records.

        Args:
            folder: new, empty, or of a store with the same settings.
            records: see `add`.
            embedder: a `SentenceTransformer`; without one, retrieval is by exact question only.
            keep: "kv" for keys and values, "hidden" for last hidden states (1, T, d), or both.
            dtype: of the stored tensors. Default: that of the model.
            adding: options of `add`.

        Raises:
            CacheError: the folder holds other files, or a store of another model, tokenizer,
                embedder or setting.
        """
        if not keep or not {*keep} <= {*PARTS}:
            raise CacheError(f"keep is {keep!r}, expected a list of one or both of {PARTS}.")
        dtype = dtype or model.dtype
        if not dtype.is_floating_point:
            raise CacheError(f"dtype is {dtype}, expected a floating one such as torch.float16.")
        models.require_supported(model)
        settings = {
            "version": VERSION,
            "keep": [part for part in PARTS if part in keep],
            "dtype": str(dtype).removeprefix("torch."),
            "embedder": _embed(embedder, [PROBE])[0].tolist(),
            "model": models.fingerprint(model),
            "tokenizer": _tokenizer_hashes(tokenizer),
        }
        store = cls._load_or_start(folder, model, tokenizer, embedder, settings)
        if store.keep != tuple(settings["keep"]) or store.dtype != dtype:
            raise CacheError(f"{store.folder} keeps {store.keep}, {store.dtype}: use a new folder.")
        store.add(records, **adding)
        return store

    @classmethod
    def _load_or_start(cls, folder, model, tokenizer, embedder, settings) -> "KnowledgeCache":
        """Open the store in a folder; in an empty one, a new store that is not written yet."""
        folder = Path(folder).expanduser().absolute()
        if (folder / "manifest.json").exists():
            return cls.load(folder, model, tokenizer, embedder)
        names = sorted(path.name for path in folder.glob("[!.]*"))  # a kill may leave hidden files
        if names:
            raise CacheError(f"{folder} holds {names[:3]} and no store: give an empty folder.")
        return cls(folder, model, tokenizer, embedder, settings)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        embedder: Embedder | None = None,
    ) -> "KnowledgeCache":
        """Open a store. Items are listed; their tensors are read from disk item by item, on demand.

        Raises:
            CacheError: no store, a damaged one, or one of another model, tokenizer, rotary
                embedding or embedder.
        """
        folder = Path(folder).expanduser().absolute()
        settings, _ = _read_manifest(folder)
        stored = settings["model"] | {"tokenizer": settings["tokenizer"]}
        current = models.fingerprint(model) | {"tokenizer": _tokenizer_hashes(tokenizer)}
        message = f"The store in {folder} was built with another"
        if unlike := models.differences(stored, current):
            raise CacheError(f"{message} model or tokenizer ({unlike}): load it with that.")
        probe = torch.tensor(settings["embedder"])
        if embedder is not None and _embed(embedder, [PROBE], len(probe))[0] @ probe < 0.999:
            raise CacheError(f"{message} embedder: load it with that, or with none.")
        store = cls(folder, model, tokenizer, embedder, settings)
        store._open()
        return store

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def __getitem__(self, id: str) -> Item:
        return {item.id: item for item in self.items}[id]

    # -- adding

    def estimate(self, records: Records, generate: bool = False, max_new_tokens: int = 128) -> int:
        """Bytes of tensors that `add` would write; an upper bound for generated answers."""
        reserve = self._reserve(generate, max_new_tokens)
        items = self._new(self._items(records, generate, max_new_tokens))
        return sum(self.bytes_of(len(item.input_ids) + reserve) for item in items)

    def bytes_of(self, tokens: int, entries: int = 0) -> int:
        """Bytes of an item with this number of tokens and of cache entries (0: one per token)."""
        config = self.model.config.get_text_config(decoder=True)
        sizes = {"kv": (entries or tokens) * kv.bytes_per_token(config, self.dtype)}
        sizes["hidden"] = tokens * config.hidden_size * self.dtype.itemsize
        return sum(sizes[part] for part in self.keep)

    @torch.no_grad()
    def add(
        self,
        records: Records,
        generate: bool = False,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        compress: Callable[[Tensor], Prefix] | None = None,
        stop: Stop = (),
    ) -> int:
        """Prefill and add records that are not in the store; return the number of new items.

        Items are safe on disk as soon as their shard is, so a run that was stopped continues where
        it was. Under `accelerate launch` each process prefills a part, and the result is one store.
        One run at a time may add to a store; others may read it.

        Args:
            records: mappings with "question", "answer" and, optionally, "domain" and "id".
            generate: let the model answer, greedily; answers in the records are not used.
            max_new_tokens: of a generated answer.
            batch_size: of prefill and of generation.
            compress: from token ids (1, T) to a `Prefix` of k entries, with positions (1, k), the
                same for all heads, or (L, 1, H_kv, k) where heads have lengths of their own; see
                `kvlab.compress`. It takes k / T of the bytes.
            stop: strings that end a generated answer; they are cut off.

        Raises:
            CacheError: before any work: a record without a text, an id that is taken, a text that
                is too long for the model, or another writer.
        """
        if unlike := models.differences(self.settings["model"], models.fingerprint(self.model)):
            raise CacheError(f"The model has changed since it opened {self.folder} ({unlike}).")
        _embed(self.embedder, [PROBE], len(self.settings["embedder"]))
        items = self._items(records, generate, max_new_tokens)
        self._new(items)  # refuses a bad record before a new store's folder is made
        state = PartialState(cpu=self.model.device.type == "cpu")
        with self._writing() if state.is_main_process else nullcontext():
            state.wait_for_everyone()
            self._open()
            items = self._new(items)
            groups = self._groups(items, self._reserve(generate, max_new_tokens))
            for first in range(0, len(groups), state.num_processes):
                group = groups[first + state.process_index :][:1]  # of this process, if any
                options = max_new_tokens, batch_size, compress, stop
                new = [self._fill(*group, *options)] if group else []
                self.shards += gather_object(new)
                if state.is_main_process:
                    _commit(self.folder, self.settings, self.shards)
            state.wait_for_everyone()
            self._open()
        return len(items)

    def _items(self, records, generate: bool, max_new_tokens: int) -> list[Item]:
        """Items without tensors, and without answers if these are yet to be generated."""
        if generate and max_new_tokens < 1:
            raise CacheError(f"max_new_tokens is {max_new_tokens}, expected at least 1.")
        limit = self.model.config.get_text_config(decoder=True).max_position_embeddings
        items = []
        for number, record in enumerate(records):
            for field in ("question",) if generate else ("question", "answer"):
                value = record.get(field)
                if not isinstance(value, str) or not value.strip():
                    raise CacheError(f"Record {number} has {field!r} = {value!r}, expected a text.")
            question, answer = record["question"], "" if generate else record["answer"]
            turns = [{"role": "user", "content": question}]
            if generate:
                prompt, input_ids = encode(self.tokenizer, turns), ()
            else:
                prompt, input_ids = encode_answer(self.tokenizer, turns, answer)
                input_ids = close_turn(self.tokenizer, input_ids)
            input_ids = (*prompt, *input_ids)
            count = len(input_ids) + self._reserve(generate, max_new_tokens)
            if count > limit:
                reads = f"Record {number} has {count} tokens, the model reads {limit}"
                raise CacheError(f"{reads}: shorten it, or leave it out.")
            texts = [str(record.get("domain") or ""), question, answer]
            id = str(record.get("id") or _json_hash(texts)[:16])
            items.append(Item(id, *texts, input_ids, len(prompt), generate))
        return items

    def _reserve(self, generate: bool, max_new_tokens: int) -> int:
        """The largest number of tokens that generating an answer and closing it can add."""
        return max_new_tokens + len(close_turn(self.tokenizer, [])) if generate else 0

    def _new(self, items: Sequence[Item]) -> list[Item]:
        """Those items that are not in the store."""
        keys, ids = {item.key for item in self.items}, {item.id for item in self.items}
        new = []
        for item in items:
            if item.key in keys:
                continue
            if item.id in ids:
                raise CacheError(f"Two items have the id {item.id!r}: give each its own, or none.")
            new.append(item)
            keys.add(item.key)
            ids.add(item.id)
        return new

    def _groups(self, items: list[Item], reserve: int = 0) -> list[list[Item]]:
        """Items by shard; each may still grow by `reserve` tokens."""
        longest = max((len(item.input_ids) for item in items), default=0) + reserve
        count = min(SHARD_ITEMS, SHARD_BYTES // max(1, self.bytes_of(longest))) or 1
        return [items[i : i + count] for i in range(0, len(items), count)]

    def _fill(self, items, max_new_tokens: int, batch_size: int, compress, stop: Stop) -> dict:
        """Prefill the items of a shard and write its files; the manifest does not list them yet."""
        if items[0].generated:
            prompts = [list(item.input_ids) for item in items]
            stop = Ending.of(self.model, self.tokenizer, stop).stop
            options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "stop": stop}
            answers = continuations(self.model, self.tokenizer, prompts, **options)
            end_ids = end_tokens(self.model, self.tokenizer)
            for i, (item, ids) in enumerate(zip(items, answers, strict=True)):
                text = answer_text(self.tokenizer, ids, stop)
                if stop:  # which a turn must not contain
                    turns = [{"role": "user", "content": item.question}]
                    ids = encode_answer(self.tokenizer, turns, text)[1]
                ids = close_turn(self.tokenizer, ids, end_ids)
                items[i] = replace(item, answer=text, input_ids=(*item.input_ids, *ids))
        tensors = [{} for _ in items]
        order = sorted(range(len(items)), key=lambda i: len(items[i].input_ids))  # little padding
        for start in tqdm(range(0, len(order), batch_size), desc="reading items", leave=False):
            batch = order[start : start + batch_size]
            rows = _prefill_rows(self.model, [items[i].input_ids for i in batch])
            for i, parts in zip(batch, rows, strict=True):
                if compress and "kv" in self.keep:
                    ids = torch.tensor([items[i].input_ids], device=self.model.device)
                    parts["kv"], tensors[i]["positions"] = _compressed(ids, compress)
                for part in self.keep:
                    tensors[i][part] = kv.convert(parts[part], self.dtype)
        return self._write(items, tensors, _embed(self.embedder, [item.question for item in items]))

    def _write(self, items, tensors: list[dict[str, Tensor]], embeddings: Tensor) -> dict:
        """Write the two files of a shard and return its entry for the manifest."""
        name = os.urandom(8).hex()
        data, index = self._paths(name)
        data.parent.mkdir(exist_ok=True)
        named, rows = {}, []
        for number, (item, parts) in enumerate(zip(items, tensors, strict=True)):
            for part, tensor in parts.items():
                named[f"{number}.{part}"] = tensor
            row = {"input_ids": (), "shard": "", "number": number, "checksum": _checksum_of(parts)}
            if "positions" in parts:  # (k,), or (L, H_kv, k) with -1 before the first of a head
                kept = (parts["positions"] >= 0).sum(-1).float().mean()
                row["kept"] = max(1, round(kept.item()))
            rows.append(asdict(item) | row)
        write_tensors(data, named)
        ids = [torch.tensor(item.input_ids, dtype=torch.int32) for item in items]
        table = {"input_ids": torch.cat(ids), "lengths": torch.tensor([len(i) for i in ids])}
        write_tensors(index, table | {"embeddings": embeddings}, {"items": json.dumps(rows)})
        sizes = {"bytes": data.stat().st_size, "index": xxh3_128_hexdigest(index.read_bytes())}
        return {"name": name, "items": len(items), **sizes}

    def _paths(self, name: str) -> tuple[Path, Path]:
        shards = self.folder / "shards"
        return shards / f"{name}.safetensors", shards / f"{name}.index.safetensors"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the store's lock. Make a new store, or delete the leftovers of a kill."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock").acquire(timeout=0):
                if not (self.folder / "manifest.json").exists():
                    _commit(self.folder, self.settings, [])
                self._open()
                listed = {path for shard in self.shards for path in self._paths(shard["name"])}
                for path in [*self.folder.glob("shards/*"), *self.folder.glob(".*.part")]:
                    if LEFTOVER.fullmatch(path.name) and path not in listed:
                        path.unlink()
                yield
        except Timeout as error:
            raise CacheError(f"Another writer is adding to {self.folder}: wait for it.") from error

    # -- opening and reading

    def _open(self) -> None:
        """Read the manifest and the indexes."""
        settings, shards = _read_manifest(self.folder)
        if settings != self.settings:
            raise CacheError(f"{self.folder} now has other settings: load it again.")
        items, embeddings = [], [self.embeddings[:0]]
        for shard in shards:
            data, index = self._paths(shard["name"])
            intact = data.is_file() and index.is_file() and data.stat().st_size == shard["bytes"]
            if not intact or xxh3_128_hexdigest(index.read_bytes()) != shard["index"]:
                raise CacheError(f"{data} or its index is missing or damaged: use a backup.")
            with safe_open(index, "pt") as file:
                rows = json.loads(file.metadata()["items"])
                texts = file.get_tensor("input_ids").split(file.get_tensor("lengths").tolist())
                vectors = file.get_tensor("embeddings").clone()  # not a map of the file
            removed = shard.get("removed", ())  # in stores of earlier versions
            left = [number for number in range(len(rows)) if number not in removed]
            for number in left:
                ids = tuple(texts[number].tolist())
                items.append(Item(**rows[number] | {"input_ids": ids, "shard": shard["name"]}))
            embeddings.append(vectors[left])
        self.shards, self.items, self.embeddings = shards, items, torch.cat(embeddings)
        domains = pd.DataFrame({"domain": [item.domain for item in items]})
        self.domains = domains.groupby("domain").indices

    def read(self, item: Item) -> Prefix:
        """Read the keys and values of an item from disk, in the model's dtype and on its device.

        Raises:
            CacheError: the store keeps no keys and values, or the item's tensors are missing or
                damaged; other items are not affected.
        """
        tensors, count = self._tensors(item, "kv"), len(item.input_ids)
        entries = tensors["kv"].to(self.model.device, self.model.dtype)
        positions = tensors.get("positions", torch.arange(count)).to(self.model.device)
        if positions.ndim == 1:
            cache, positions = kv.from_tensor(entries), positions[None]
        else:
            cache, positions = _unflatten(entries, positions), positions[:, None]
        return Prefix(cache, count, item.input_ids, positions=positions)

    def hidden_states(self, item: Item) -> Tensor:
        """Read the last hidden states of an item from disk, (1, T, d); see `read`."""
        hidden = self._tensors(item, "hidden")["hidden"]
        return hidden.to(self.model.device, self.model.dtype)

    def _tensors(self, item: Item, needed: str | None = None) -> dict[str, Tensor]:
        """The tensors of an item as stored, in memory that the file is mapped to."""
        if needed and needed not in self.keep:
            raise CacheError(f"The store keeps no {needed!r}: build one with keep=['{needed}'].")
        path, _ = self._paths(item.shard)
        parts = [*self.keep, "positions"] if item.kept else self.keep
        try:
            with safe_open(path, "pt") as file:
                tensors = {part: file.get_tensor(f"{item.number}.{part}") for part in parts}
        except (SafetensorError, OSError):
            tensors = {}
        if _checksum_of(tensors) != item.checksum:
            raise CacheError(f"Item {item.id!r} in {path} is missing or damaged: use a backup.")
        return tensors

    def splice(self, items: Sequence[Item | Hit], arm: str = "recompute", **options) -> Prefix:
        """Read items and join them as turns of one conversation; see `kvlab.knowledge.splice`.

        The tokens with which the chat template opens every conversation (a begin token, a system
        prompt) stay with the first item only, so there is no attention sink in the middle. `prompt`
        gives the ids of a question that follows.
        """
        prefixes = []
        for number, item in enumerate(items):
            item = item.item if isinstance(item, Hit) else item
            start = self._opening if number else 0
            ids, cache = item.input_ids[start:], None  # the arm prefills it again
            if number < CACHES_USED.get(arm, len(items)):
                prefix = self.read(item)
                cache = prefix.cache
                if start:
                    cache = _after(prefix, start)
                    cache = kv.shift(cache, -start, models.rotary_of(self.model))
            prefixes.append(Prefix(cache, len(ids), ids))
        return splice(self.model, prefixes, arm, **options)

    @cached_property
    def _opening(self) -> int:
        """The number of tokens that the template puts before the first turn only."""
        turns = [{"role": role, "content": PROBE} for role in ("user", "assistant", "user")]
        alone, later = encode(self.tokenizer, turns[:1]), encode(self.tokenizer, turns)
        start = 0
        while later[len(later) - len(alone) + start :] != alone[start:]:
            start += 1
        # Without the question in the rest, a first turn has a form of its own.
        return start if PROBE in self.tokenizer.decode(alone[start:]) else 0

    def prompt(self, question: str) -> list[int]:
        """Token ids of a question that follows spliced items, up to where its answer begins."""
        return encode(self.tokenizer, [{"role": "user", "content": question}])[self._opening :]

    # -- finding

    def retrieve(
        self,
        question: str,
        k: int = 1,
        threshold: float = 0.5,
        domain: str | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """The items with the most similar questions, best first; an empty list if there are none.

        Args:
            k: largest number of hits.
            threshold: minimum cosine similarity of a hit. It depends on the embedder: measure what
                it lets through (see chapter 01). -1 gives the nearest items in any case.
            domain: search the items of this domain only.
            exact: only items with the same question, ignoring case, punctuation and space (the
                only way without an embedder).

        Raises:
            CacheError: k is not positive, or the domain is unknown.
        """
        if k < 1:
            raise CacheError(f"k is {k}, expected a positive integer.")
        rows = self._rows(domain)
        if exact or not self.settings["embedder"]:
            text = _normal(question)
            same = [i for i in rows.tolist() if _normal(self.items[i].question) == text]
            return [Hit(self.items[i], 1.0) for i in same[:k]]
        vector = _embed(self.embedder, [question], self.embeddings.shape[1])[0]
        best = (self.embeddings @ vector)[rows].topk(min(k, len(rows)))
        hits = zip(rows[best.indices].tolist(), best.values.tolist(), strict=True)
        return [Hit(self.items[i], score) for i, score in hits if score >= threshold]

    def _rows(self, domain: str | None) -> Tensor:
        """The indices of a domain's items, or of all."""
        if domain is None:
            return torch.arange(len(self.items))
        if domain not in self.domains:
            names = sorted(self.domains)
            raise CacheError(f"There is no domain {domain!r} in {self.folder}: it has {names}.")
        return torch.tensor(self.domains[domain])

    def summary(self) -> pd.DataFrame:
        """Items, tokens and megabytes (10^6 bytes) by domain, and in all."""
        columns = ["items", "generated", "tokens", "answer tokens", "size (MB)"]
        rows = []
        for item in self.items:
            tokens = len(item.input_ids)
            size = self.bytes_of(tokens, item.kept) / 1e6
            rows.append((item.domain, 1, item.generated, tokens, tokens - item.answer_start, size))
        table = pd.DataFrame(rows, columns=["domain", *columns]).groupby("domain").sum()
        table = pd.concat([table, table.sum().to_frame("all").T])
        return table.astype(dict.fromkeys(columns[:-1], int))

    # -- copying

    def export(self, folder: str | Path, domain: str | None = None) -> "KnowledgeCache":
        """Copy the items of one domain, or all, to another store, new or existing, and return that.

        Existing items are skipped, so an export is brought up to date by another.

        Raises:
            CacheError: the domain is unknown, or the folder holds other files or a store with other
                settings.
        """
        rows = self._rows(domain).tolist()
        copy = self._load_or_start(folder, self.model, self.tokenizer, self.embedder, self.settings)
        if copy.settings != self.settings:
            raise CacheError(f"{folder} has a store with other settings: give an empty folder.")
        vectors = {self.items[i].id: self.embeddings[i] for i in rows}
        with copy._writing():
            for group in copy._groups(copy._new([self.items[i] for i in rows])):
                tensors = [self._tensors(item) for item in group]
                embeddings = torch.stack([vectors[item.id] for item in group])
                copy.shards.append(copy._write(group, tensors, embeddings))
                _commit(copy.folder, copy.settings, copy.shards)
            copy._open()
        return copy


def _prefill_rows(model, rows: Sequence[Sequence[int]]) -> Iterator[dict[str, Tensor]]:
    """For each row its "kv" (L, 2, 1, H_kv, T, D) and last "hidden" states (1, T, d).

    Padding is on the right, where a causal model does not attend to it.
    """
    padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(model.device)
    output = model.base_model(input_ids=padded, use_cache=True)
    stacked = kv.to_tensor(output.past_key_values)
    for b, row in enumerate(rows):
        hidden = output.last_hidden_state[b : b + 1, : len(row)]
        yield {"kv": stacked[:, :, b : b + 1, :, : len(row)], "hidden": hidden}


def _compressed(input_ids: Tensor, compress: Callable[[Tensor], Prefix]) -> tuple[Tensor, Tensor]:
    """Stacked keys and values (L, 2, 1, H_kv, k, D), and their positions (k,).

    If heads keep entries of their own: (2, N, D), and positions (L, H_kv, k), -1 for padding.
    """
    prefix = compress(input_ids)
    cache, positions = prefix.cache, prefix.positions
    layers, _, heads, _, _ = kv.layout(cache)
    shape = (1,) if positions.ndim == 2 else (layers, 1, heads)
    expected = (*shape, kv.length(cache)), input_ids.shape[1]
    returned = tuple(positions.shape), prefix.next_position
    if returned != expected:
        raise CacheError(f"compress returned positions, next {returned}: expected {expected}.")
    positions = positions.to("cpu", copy=True)
    if positions.ndim == 2:
        return kv.to_tensor(cache), positions[0]
    entries = []
    for layer in cache.layers:
        bias = bias_of(layer)
        kept = bias.isfinite()
        if bias[kept].any():
            hint = "compress otherwise"
            raise CacheError(f"Entries have a bias, which a store does not keep: {hint}.")
        entries.append(torch.stack((layer.keys[kept], layer.values[kept])))
    return torch.cat(entries, 1), positions[:, 0]


def _unflatten(entries: Tensor, positions: Tensor) -> DynamicCache:
    """The cache of entries (2, N, D) of heads with lengths of their own, see `_compressed`."""
    kept = (positions >= 0)[:, None]  # (L, 1, H_kv, k)
    padded = entries.new_zeros(2, *kept.shape, entries.shape[-1])
    padded[:, kept] = entries
    return kv.from_ragged(pack(*layer) for layer in zip(*padded, kept, strict=True))


def _after(prefix: Prefix, start: int) -> DynamicCache:
    """The entries of a prefix of one row at positions from `start` on."""
    if prefix.positions.ndim == 2:
        return kv.select(prefix.cache, (prefix.positions[0] >= start).nonzero()[:, 0])
    layers = []
    for layer, positions in zip(prefix.cache.layers, prefix.positions, strict=True):
        later = positions[..., positions.shape[-1] - layer.keys.shape[2] :] >= start
        layers.append(pack(layer.keys, layer.values, later))
    return kv.from_ragged(layers)


# -- settings and manifest


def _commit(folder: Path, settings: dict, shards: list[dict]) -> None:
    """Replace the manifest: from here on these shards are the store."""
    content = settings | {"shards": shards}
    text = json.dumps({"checksum": _json_hash(content), **content}, indent=1)
    write_text(folder / "manifest.json", text)


def _read_manifest(folder: Path) -> tuple[dict, list[dict]]:
    """The settings of a store, and its shards."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise CacheError(f"There is no store in {folder}: build one with KnowledgeCache.build.")
    try:
        settings = json.loads(path.read_text("utf-8"))
        intact = settings.pop("checksum") == _json_hash(settings)
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise CacheError(f"{path} is damaged: restore it from a backup, or build another store.")
    if (version := settings["version"]) != VERSION:
        raise CacheError(f"{folder} has format version {version}, expected {VERSION}.")
    shards = settings.pop("shards")
    return settings, shards


def _json_hash(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksum_of(tensors: Mapping[str, Tensor]) -> str:
    digest = xxh3_128()
    for part, tensor in sorted(tensors.items()):
        digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def _tokenizer_hashes(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of everything that decides which tokens a text becomes."""
    content = {"vocabulary": tokenizer.get_vocab()}
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content |= {"truncation": None, "padding": None}  # these change with use
    template = {"template": tokenizer.chat_template}
    return {"vocabulary": _json_hash(content), "chat template": _json_hash(template)}


# -- texts


QUOTES = str.maketrans(dict.fromkeys("'‘’‚‛“”„‟«»‹›「」『』", '"'))


def _normal(text: str) -> str:
    """A question without case, punctuation and extra space; C++ and C#, -1 and 1 stay apart."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(QUOTES)
    words = (word.strip('?!.,;:"…。、·()¿¡') for word in text.split())
    return " ".join(filter(None, words)) or text  # "???" is not "!!!"


def _embed(embedder: Embedder | None, questions: list[str], size: int | None = None) -> Tensor:
    """Unit vectors (len(questions), E); `size` is E where it is known."""
    vectors = torch.empty(len(questions), 0)
    if embedder is not None:
        options = {"normalize_embeddings": True, "show_progress_bar": False}
        vectors = torch.as_tensor(embedder.encode(questions, **options)).float().cpu()
    expected = (len(questions), vectors.shape[-1] if size is None else size)
    if vectors.shape != expected or not vectors.isfinite().all():
        message = f"The embedder ({type(embedder).__name__}) gave {tuple(vectors.shape)}, expected"
        raise CacheError(f"{message} {expected} finite numbers: give the store's own embedder.")
    return normalize(vectors, dim=-1)
