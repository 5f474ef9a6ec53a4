"""A knowledge cache: question/answer items that a model has read, kept on disk, found by question, put into prompts.

A store is a folder. Items are added by the *shard*: `shards/NAME.safetensors` holds the tensors of
some items and `shards/NAME.index.safetensors` what it takes to find them (texts, token ids,
embeddings of the questions). A shard is never changed. `manifest.json` names the shards, and the
model, tokenizer and embedder that they belong to; replacing it, atomically, is what adds items, so
a kill at any moment leaves the old store or the new one. Opening a store reads manifest and
indexes; the tensors of an item are read when the item is.

>>> import tempfile
>>> from kvlab import lab
>>> model, tokenizer = lab.load("lab-draft"), lab.load_tokenizer("lab-draft")
>>> records = [{"question": "Where does Anna live?", "answer": "Rome"}, {"question": "Who sings?", "answer": "Ben"}]
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
import shutil
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from xxhash import xxh3_128, xxh3_128_hexdigest

from kvlab.cache import (
    Prefix,
    bytes_per_token,
    from_tensor,
    join,
    length,
    prefill,
    select,
    shift,
    to_tensor,
    truncate,
)
from kvlab.files import as_bytes, write_tensors, write_text
from kvlab.generation import continuations, encode
from kvlab.models import (
    CacheError,
    differences,
    fingerprint,
    first_layers,
    require,
    require_supported,
    rotary_of,
)
from kvlab.slots import Slots, step

if TYPE_CHECKING:
    from kvlab.compress import Compressed

FORMAT_VERSION = 1
PARTS = ("kv", "hidden")
ARMS = ("full", "prefix", "concat", "shift", "recompute")
SHARD_BYTES, SHARD_ITEMS = 2**28, 256  # a shard is closed when it reaches either
MANIFESTS = (
    "manifest.json",
    "manifest.copy.json",
)  # the first counts; the second is for when it is damaged
LEFTOVER = re.compile(r"[0-9a-f]{16}(\.index)?\.safetensors|\.([0-9a-f]{16}|manifest)\..*\.part")
PROBE = "Is this store of the same embedder?"


class Embedder(Protocol):
    """What turns questions into vectors; any `SentenceTransformer` does."""

    def encode(
        self,
        sentences: list[str],
        *,
        normalize_embeddings: bool,
        convert_to_tensor: bool,
        show_progress_bar: bool,
    ) -> Tensor:
        """Return unit vectors, (number of sentences, E)."""


@dataclass(frozen=True)
class Item:
    """What is known of an item before its tensors are read; `input_ids` are those of prompt and answer."""

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
    kept: int = 0  # entries of its compressed cache; 0 if all of them are there

    @property
    def key(self) -> tuple[str, ...]:
        """What makes it the same item when records are added again."""
        return (
            (self.domain, self.question)
            if self.generated
            else (self.domain, self.question, self.answer)
        )


class Hit(NamedTuple):
    """An item that was found, and how similar its question is (cosine; 1.0 for an exact match)."""

    item: Item
    score: float


class Piece(NamedTuple):
    """Token ids, and what reading them alone from position 0 gave: a cache of one row, last hidden states (1, T, d).

    A compressed cache has fewer entries than there are tokens: `positions` (k,) says where they
    stand.
    """

    input_ids: Sequence[int]
    cache: DynamicCache | None
    hidden_states: Tensor | None = None
    positions: Tensor | None = None


Compress = Callable[[Tensor], "Compressed"]


# -- putting pieces together


@torch.no_grad()
def splice(
    model: PreTrainedModel,
    pieces: Sequence[Piece],
    arm: str = "recompute",
    share: float = 0.15,
    early: int = 2,
) -> Prefix:
    """Put pieces that were read alone behind one another, as what stands before a prompt.

    A piece in second place was read as if nothing stood before it, so all arms but the first two
    are approximations.

    Args:
        arm: "full" reads all tokens anew (exact); "prefix" keeps the first piece and reads the rest
            (exact); "concat" joins the pieces as they are, keys at wrong positions; "shift" moves
            each to its place; "recompute" moves them, and then computes again those tokens whose
            keys and values differ most from the true ones (CacheBlend, Yao et al. 2025, arXiv
            2405.16444, section 4).
        share: of the tokens behind the first piece, for "recompute". 1.0 is exact.
        early: layers computed anew for all of these tokens, for "recompute"; the last of them
            decides which differ most. CacheBlend narrows its choice down layer by layer; here it is
            made once.

    Returns:
        A `Prefix`, to be continued by `prefill(model, ids, prefix)` or
        by `kvlab.speculate.generate(..., prefix=prefix)`.

    Raises:
        CacheError: no pieces, an unknown arm, a share or number of layers out of range, or pieces
            without a cache.

    Example:
        >>> from kvlab import lab
        >>> model, tokenizer = lab.load("lab-draft"), lab.load_tokenizer("lab-draft")
        >>> pieces = [read(model, tokenizer(text).input_ids) for text in ("Anna lives in Rome.", " Ben has a dog.")]
        >>> exact, again = splice(model, pieces, "full"), splice(model, pieces, "recompute", share=1.0)
        >>> torch.allclose(exact.cache.layers[1].values, again.cache.layers[1].values, atol=1e-4)
        True
    """
    require(
        pieces, "There are no pieces to splice: give at least one, or ask the model without any."
    )
    require(arm in ARMS, f"The arm is {arm!r}: expected one of {', '.join(ARMS)}.")
    require(0 <= share <= 1, f"share is {share}, expected 0 to 1.")
    config = model.config.get_text_config(decoder=True)
    have, most = config.num_hidden_layers, config.max_position_embeddings
    require(
        early in range(1, have + 1),
        f"early is {early}, expected 1 to {have}, the layers of the model.",
    )
    for piece in pieces[: loaded(arm)]:
        require(
            piece.cache,
            "A piece has no keys and values: build the store with keep=('kv',), or use arm 'full'.",
        )
        seen = (
            f"A piece has {len(piece.input_ids)} ids, and a cache of {length(piece.cache)} entries"
        )
        seen += f" in {len(piece.cache.layers)} layers; the model has {have}"
        entries = len(piece.input_ids if piece.positions is None else piece.positions)
        whole = length(piece.cache) == entries and len(piece.cache.layers) == have
        require(whole, f"{seen}: give what `read` or a store of this model returned.")
        seen = "A piece is compressed, and what was evicted cannot be computed again on it"
        require(
            piece.positions is None or arm != "recompute",
            f"{seen}: use another arm, such as 'shift'.",
        )
    flat = [token for piece in pieces for token in piece.input_ids]
    require(
        len(flat) <= most,
        f"The pieces have {len(flat)} tokens, the model reads up to {most}: give fewer.",
    )
    if arm == "recompute" and len(pieces) > 1:
        cache = _recomputed(model, pieces, flat, share, early)
    elif arm in ("full", "prefix"):
        known = pieces[0] if arm == "prefix" else Piece((), None)
        rest = torch.tensor([flat[len(known.input_ids) :]], device=model.device)
        first = len(known.input_ids)
        cache = (
            prefill(model, rest, Prefix(known.cache, first) if first else None).cache
            if rest.numel()
            else _all_of(known.cache)
        )
    else:
        cache = _joined(pieces, None if arm == "concat" else rotary_of(model))
    return Prefix(cache, len(flat), flat)


@torch.no_grad()
def read(model: PreTrainedModel, input_ids: Sequence[int]) -> Piece:
    """Read tokens alone, from position 0.

    Example:
        >>> from kvlab import lab
        >>> read(lab.load("lab-draft"), [5, 6, 7]).hidden_states.shape
        torch.Size([1, 3, 128])
    """
    return next(_read(model, [list(input_ids)]))


def _read(model: PreTrainedModel, rows: list[list[int]]) -> Iterator[Piece]:
    """Read rows in one call. Padding stands on the right, where a causal model does not see it."""
    require_supported(model)
    require(rows and all(rows), "There is nothing to read: give at least one token id.")
    padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(model.device)
    out = model.base_model(input_ids=padded, use_cache=True)
    tensor = to_tensor(out.past_key_values)
    for b, ids in enumerate(rows):
        row, stop = slice(b, b + 1), len(ids)
        yield Piece(
            ids, from_tensor(tensor[:, :, row, :, :stop]), out.last_hidden_state[row, :stop]
        )


def loaded(arm: str) -> int | None:
    """How many pieces' caches an arm uses, from the first on; None for all of them.

    Example:
        >>> [100, 50, 50][: loaded("prefix")]
        [100]
    """
    return {"full": 0, "prefix": 1}.get(arm)


def _joined(pieces: Sequence[Piece], rotary: torch.nn.Module | None) -> DynamicCache:
    """Pieces behind one another, moved to their places if a rotary embedding is given."""
    starts = accumulate((len(piece.input_ids) for piece in pieces), initial=0)
    moved = [
        shift(p.cache, start, rotary) if rotary else p.cache
        for p, start in zip(pieces, starts, strict=False)
    ]
    cache = _all_of(moved[0])
    for after in moved[1:]:
        cache = join(cache, after)
    return cache


def _all_of(cache: DynamicCache) -> DynamicCache:
    """The same entries in a cache that is not the piece's own, to which its owner may add."""
    return truncate(cache, length(cache))


def _recomputed(
    model: PreTrainedModel, pieces: Sequence[Piece], flat: list[int], share: float, early: int
) -> DynamicCache:
    """Early layers are true for all tokens; above, the tokens that differ most there are computed on what is there."""
    first, ids = len(pieces[0].input_ids), torch.tensor([flat], device=model.device)
    stored = to_tensor(_joined(pieces, rotary_of(model)))  # (L, 2, 1, H_kv, T, D)
    start = from_tensor(stored[:early, ..., :first, :])
    shallow, start = first_layers(model, early), Prefix(start, first)
    true = to_tensor(prefill(shallow, ids[:, first:], start).cache)
    difference = (true - stored[:early])[-1].float().pow(2).sum((1, 2, 4))  # (2, T)
    size = true[-1].float().pow(2).sum((1, 2, 4)).mean(1, keepdim=True)
    difference = (difference / size).sum(0)[first:]
    stored[:early] = true
    chosen = difference.topk(round(share * len(difference))).indices.sort().values + first
    if not len(chosen):
        return from_tensor(stored)
    slots = Slots(model, rows=1, room=len(flat))
    slots.put(0, from_tensor(stored), len(flat))
    step(model, slots, ids[:, chosen], slots.set_write_columns(chosen[None]), logits_to_keep=1)
    return slots.entries(0)


# -- the store


class KnowledgeCache:
    """A store of items that one model has read. Make it with `build` or open it with `load`; `add` keeps it on disk.

    That the model is the right one is checked when a store is opened and when items are added, not
    at each reading.

    Attributes:
        items: list of `Item`, in the order in which they were added.
        embeddings: (len(items), E), unit vectors of their questions; E is 0 for a store built
            without an embedder.
        domains: where in `items` those of each domain are.
        keep: what is kept of each item: "kv" (keys and values), "hidden" (last hidden states), or
            both.
        dtype: in which it is kept; reading converts it to the model's.
    """

    def __init__(self, folder: Path, model, tokenizer, embedder, settings: dict):
        self.folder, self.model, self.tokenizer, self.embedder = folder, model, tokenizer, embedder
        self.settings, self.skip_damaged = (
            settings,
            False,
        )  # the first is the manifest but for the shards
        self.keep, self.dtype = tuple(settings["keep"]), getattr(torch, settings["dtype"])
        self.shards, self.items, self.domains = [], [], {}
        self.embeddings = torch.empty(0, len(self.settings["embedder"]))

    @classmethod
    def build(
        cls,
        folder: str | Path,
        records: Iterable[Mapping[str, str]],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        embedder: Embedder | None = None,
        *,
        keep: Sequence[str] = ("kv",),
        dtype: torch.dtype | None = None,
        generate: bool = False,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        compress: Compress | None = None,
    ) -> "KnowledgeCache":
        """Make a store, or open one that is there, and add records.

        Args:
            folder: of the store; new, empty, or one that holds a store made with the same settings.
            records, generate, max_new_tokens, batch_size, compress: see `add`.
            embedder: a `SentenceTransformer`; without one, retrieval is by exact question only.
            keep: "kv" for keys and values, "hidden" for last hidden states (1, T, d), or both.
            dtype: in which tensors are kept; by default that of the model.

        Raises:
            CacheError: the folder holds something else, or a store of another model, tokenizer,
                embedder or setting.
        """
        several = isinstance(keep, list | tuple | set) and len(keep) > 0
        require(
            several and {*keep} <= {*PARTS},
            f"keep is {keep!r}, expected a list of one or both of {PARTS}.",
        )
        dtype = model.dtype if dtype is None else dtype
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        require(floating, f"dtype is {dtype!r}, expected a floating one such as torch.float16.")
        require_supported(model)
        folder, state, records = _at(folder), _processes(model), _list(records)
        asked = {
            "keep": [part for part in PARTS if part in keep],
            "dtype": str(dtype).removeprefix("torch."),
        }
        if state.is_main_process and not (folder / "manifest.json").exists():
            settings = _settings(model, tokenizer, embedder, asked)
            cls(folder, model, tokenizer, embedder, settings).estimate(
                records, generate, max_new_tokens
            )  # checks them
            cls._create(folder, settings)
        state.wait_for_everyone()
        store = cls.load(folder, model, tokenizer, embedder)
        have = {name: store.settings[name] for name in asked}
        require(
            have == asked,
            f"The store in {folder} was built with {have}, not {asked}: build in another folder.",
        )
        store.add(records, generate, max_new_tokens, batch_size, compress)
        return store

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        embedder: Embedder | None = None,
        *,
        skip_damaged: bool = False,
    ) -> "KnowledgeCache":
        """Open a store. Items are listed, their tensors are read from disk one item at a time, when asked for.

        Args:
            skip_damaged: open a store of which files are missing or damaged, without what they
                held, and say so in a warning. Such a store cannot be added to; `export` it to a new
                folder, and add there.

        Raises:
            CacheError: no store, a damaged one, or one of another model, tokenizer, rotary
                embedding or embedder.
        """
        folder = _at(folder)
        manifest = _manifest(folder)
        unlike = differences(manifest["model"], fingerprint(model))
        hint = "load the store with what it was built with, or build another"
        require(
            not unlike, f"The store in {folder} was built with another model ({unlike}): {hint}."
        )
        own = _tokenizer_print(tokenizer)
        unlike = " and ".join(part for part in own if own[part] != manifest["tokenizer"].get(part))
        require(
            not unlike,
            f"The store in {folder} was built with another tokenizer (its {unlike} differs): {hint}.",
        )
        _require_embedder(folder, manifest["embedder"], embedder)
        shards = manifest.pop("shards")
        store = cls(folder, model, tokenizer, embedder, manifest)
        store.skip_damaged = skip_damaged
        store._open(shards)
        return store

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def __contains__(self, id: str) -> bool:
        return any(item.id == id for item in self.items)

    def __repr__(self) -> str:
        return (
            f"KnowledgeCache({str(self.folder)!r}: {len(self)} items of {len(self.shards)} shards)"
        )

    def __getitem__(self, id: str) -> Item:
        found = next((item for item in self.items if item.id == id), None)
        require(found, f"There is no item {id!r} in {self.folder}: `items` lists what there is.")
        return found

    # -- adding

    def estimate(
        self,
        records: Iterable[Mapping[str, str]],
        generate: bool = False,
        max_new_tokens: int = 128,
    ) -> int:
        """Bytes of tensors that `add` would write; for answers yet to be generated the most that it could."""
        todo = self._new(records, self._more(generate, max_new_tokens))
        return self.bytes_of(
            sum(len(item.input_ids) for item in todo) + generate * max_new_tokens * len(todo)
        )

    @staticmethod
    def _more(generate: bool, max_new_tokens: int) -> int:
        """Tokens by which each item can still grow."""
        require(
            max_new_tokens >= 1 or not generate,
            f"max_new_tokens is {max_new_tokens}, expected at least 1.",
        )
        return max_new_tokens if generate else 0

    def bytes_of(self, tokens: int, entries: int = 0) -> int:
        """Bytes of the tensors that are kept of so many tokens, of whose cache so many entries are left (0: all)."""
        config = self.model.config.get_text_config(decoder=True)
        kept = {
            "kv": bytes_per_token(config, self.dtype),
            "hidden": config.hidden_size * self.dtype.itemsize,
        }
        return sum(
            kept[part] * (entries or tokens if part == "kv" else tokens) for part in self.keep
        )

    @torch.no_grad()
    def add(
        self,
        records: Iterable[Mapping[str, str]],
        generate: bool = False,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        compress: Compress | None = None,
    ) -> int:
        """Read records and add them; what is there already is skipped. Returns how many were added.

        Items are safe on disk by the shard, so a run that was stopped goes on where it was. Under
        `accelerate launch` each process reads a part, and the result is one store. One process at a
        time may add to a store (others may read it). An item stays as it is: to correct an answer,
        or to generate one anew, `remove` it first.

        Args:
            records: mappings with "question" and "answer" and, if wanted, "domain" and "id".
            generate: let the model answer, greedily; answers in the records are not used.
            max_new_tokens: of a generated answer.
            batch_size: of prefill and of generation.
            compress: from token ids (1, T) to a smaller cache as `kvlab.compress` makes them, with
                positions (1, k), the same for all heads: keys and values of its entries are kept,
                so an item takes k / T of the bytes.

        Raises:
            CacheError: before any work: a record that lacks something, an id that is taken, a text
                that is too long for the model, too little room on the disk, another process that is
                adding.
        """
        require(
            not self.skip_damaged,
            f"{self.folder} was opened with skip_damaged: export it, and add there.",
        )
        unlike = differences(self.settings["model"], fingerprint(self.model))
        require(
            not unlike,
            f"The model has changed since the store was opened ({unlike}): build another store.",
        )
        require(batch_size >= 1, f"batch_size is {batch_size}, expected at least 1.")
        same = bool(self.settings["embedder"]) == (self.embedder is not None)
        require(
            same,
            f"The store in {self.folder} was built with an embedder: load it with that, to add to it.",
        )
        state = _processes(self.model)
        with self._only_writer(state):
            more = self._more(generate, max_new_tokens)
            todo = self._new(records, more)
            groups = self._groups(todo, more)
            amount = self.bytes_of(sum(len(item.input_ids) for item in todo)) / 1e6
            label = f"reading {len(todo)} items, {'at least ' * generate}{amount:.1f} MB"
            bar = tqdm(total=len(todo), desc=label, disable=not state.is_main_process or not todo)
            for first in range(0, len(groups), state.num_processes):
                group = groups[first + state.process_index :][
                    :1
                ]  # none, if there are fewer than processes
                made = [
                    self._make(items, generate, max_new_tokens, batch_size, bar, compress)
                    for items in group
                ]
                shards = self.shards + gather_object(made)
                if state.is_main_process:
                    _commit(self.folder, self.settings, shards)
                state.wait_for_everyone()
                self._open(shards)
                bar.update(sum(map(len, groups[: first + state.num_processes])) - bar.n)
            bar.close()
        return len(todo)

    def remove(self, ids: Iterable[str]) -> None:
        """Take items out of the store, so that others can take their places. Their bytes go with an `export`."""
        require(not isinstance(ids, str), f"ids is {ids!r}, expected a list of ids.")
        with self._only_writer():
            gone = [self[id] for id in ids]
            shards = [
                shard
                | {
                    "removed": shard.get("removed", [])
                    + [i.number for i in gone if i.shard == shard["name"]]
                }
                for shard in self.shards
            ]
            _commit(self.folder, self.settings, shards)
            self._open(shards)

    def _new(self, records: Iterable[Mapping[str, str]], more: int) -> list[Item]:
        """Items without tensors for those records that are not there yet; checks them all.

        If the model is to answer, with `more` tokens at most, the items have no answers yet.
        """
        known, ids, todo = (
            {item.key for item in self.items},
            {item.id: item.key for item in self.items},
            [],
        )
        for number, record in enumerate(_list(records)):
            item = self._item(number, record, more)
            if item.key in known:
                continue
            hint = "give each record an id of its own, or none; to correct an answer, `remove` the item first"
            require(
                item.id not in ids,
                f"Record {number} has the id {item.id!r} of another item: {hint}.",
            )
            todo.append(item)
            known.add(item.key)
            ids[item.id] = item.key
        return todo

    def _item(self, number: int, record: Mapping[str, str], more: int) -> Item:
        needed = ("question",) if more else ("question", "answer")
        for field in (*needed, "domain", "id"):
            value = record.get(field) if isinstance(record, Mapping) else None
            left_out = field not in needed and value in (None, "")
            fine = left_out or (isinstance(value, str) and value.strip())
            require(
                fine,
                f"Record {number} has {field!r} = {value!r}, expected a text: {str(record)[:80]}",
            )
        question, domain = record["question"], record.get("domain") or ""
        answer = "" if more else record["answer"]
        ids, start = _tokens(self.tokenizer, question, answer)
        most = self.model.config.get_text_config(decoder=True).max_position_embeddings
        seen = f"Record {number} has {len(ids)} tokens" + f" and an answer of up to {more}" * bool(
            more
        )
        require(len(ids) + more <= most, f"{seen}, the model reads up to {most}: make it shorter.")
        name = hashlib.sha256(json.dumps([domain, question, answer]).encode()).hexdigest()[:16]
        return Item(
            record.get("id") or name, domain, question, answer, tuple(ids), start, bool(more)
        )

    def _groups(self, todo: list[Item], more: int) -> list[list[Item]]:
        """Items of a shard each; `more` tokens of each are yet to come."""
        groups, size, total = [], 0, 0
        for item in todo:
            own = self.bytes_of(len(item.input_ids) + more)
            if not groups or size + own > SHARD_BYTES or len(groups[-1]) == SHARD_ITEMS:
                groups.append([])
                size = 0
            groups[-1].append(item)
            size, total = size + own, total + own
        free = shutil.disk_usage(self.folder).free
        seen = (
            f"The new items take {total / 1e6:.0f} MB, {self.folder} has {free / 1e6:.0f} MB left"
        )
        require(total < free, f"{seen}: free some, keep less, or use a smaller dtype.")
        return groups

    def _make(
        self,
        items: list[Item],
        generate: bool,
        max_new_tokens: int,
        batch_size: int,
        bar: tqdm,
        compress: Compress | None,
    ) -> dict:
        """Read the items of a shard and write its files; nothing refers to them yet."""
        if generate:
            prompts = [list(item.input_ids) for item in items]
            answers = continuations(self.model, self.tokenizer, prompts, max_new_tokens, batch_size)
            items = [_answered(self.tokenizer, *pair) for pair in zip(items, answers, strict=True)]
        order = sorted(
            range(len(items)), key=lambda i: len(items[i].input_ids)
        )  # alike lengths, little padding
        tensors: dict[int, dict[str, Tensor]] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for i, piece in zip(
                batch, _read(self.model, [list(items[i].input_ids) for i in batch]), strict=True
            ):
                parts, more = {"hidden": piece.hidden_states}, {}
                if compress and "kv" in self.keep:
                    items[i], parts["kv"], more = self._compressed(items[i], compress)
                elif "kv" in self.keep:
                    parts["kv"] = to_tensor(piece.cache)
                tensors[i] = {
                    part: parts[part].to("cpu", self.dtype, copy=True) for part in self.keep
                } | more
            bar.update(len(batch))
        embeddings = _embed(self.embedder, [item.question for item in items])
        return self._write(items, [tensors[i] for i in range(len(items))], embeddings)

    def _compressed(self, item: Item, compress: Compress) -> tuple[Item, Tensor, dict[str, Tensor]]:
        """The item with the number of its entries, these, and their positions."""
        small = compress(torch.tensor([item.input_ids], device=self.model.device))
        positions, kept = small.positions, length(small.prefix.cache)
        seen = f"compress returned positions {tuple(positions.shape)} for {kept} entries"
        hint = "let all heads keep the same (shared=True)"
        require(positions.shape == (1, kept), f"{seen}, expected (1, {kept}): {hint}.")
        told = small.prefix.next_position == len(item.input_ids)
        require(told, "compress moved the entries: give them where they stood, without `compact`.")
        return (
            replace(item, kept=kept),
            to_tensor(small.prefix.cache),
            {"positions": positions[0].to("cpu", copy=True)},
        )

    def _write(
        self, items: list[Item], tensors: list[dict[str, Tensor]], embeddings: Tensor
    ) -> dict:
        """Write the two files of a shard and return its entry for the manifest."""
        name = os.urandom(8).hex()
        data, index = self._paths(name)
        data.parent.mkdir(exist_ok=True)
        write_tensors(
            data, {f"{i}.{part}": t for i, own in enumerate(tensors) for part, t in own.items()}
        )
        rows = [
            asdict(replace(item, input_ids=(), shard="", number=i, checksum=_checksum(own)))
            for i, (item, own) in enumerate(zip(items, tensors, strict=True))
        ]
        flat = torch.tensor(
            [token for item in items for token in item.input_ids], dtype=torch.int32
        )
        lengths = torch.tensor([len(item.input_ids) for item in items])
        table = {"input_ids": flat, "lengths": lengths, "embeddings": embeddings}
        write_tensors(index, table, {"items": json.dumps(rows)})
        sizes = {"bytes": data.stat().st_size, "index": xxh3_128_hexdigest(index.read_bytes())}
        return {"name": name, "items": len(items), **sizes}

    def _paths(self, name: str) -> tuple[Path, Path]:
        shards = self.folder / "shards"
        return shards / f"{name}.safetensors", shards / f"{name}.index.safetensors"

    @staticmethod
    def _create(folder: Path, settings: dict) -> None:
        """Make an empty store, unless another process has just made one."""
        require(not folder.is_file(), f"{folder} is a file: give a new or an empty folder.")
        folder.mkdir(parents=True, exist_ok=True)
        odd = sorted(
            path.name
            for path in folder.iterdir()
            if not path.name.startswith((".manifest", ".lock"))
        )
        made = "manifest.json" in odd
        require(
            made or not odd,
            f"{folder} holds {odd[:3]} and no store: give a new or an empty folder.",
        )
        with _lock(folder):
            if not (folder / "manifest.json").exists():
                _commit(folder, settings, [])

    @contextmanager
    def _only_writer(self, state: PartialState | None = None) -> Iterator[None]:
        """Hold the store's lock, take up what others have added, and remove what a kill has left.

        With `state`, all processes of a run come here, and the main one holds the lock for them.
        """
        main, wait = (
            (state.is_main_process, state.wait_for_everyone) if state else (True, lambda: None)
        )
        with _lock(self.folder) if main else nullcontext():
            wait()
            self._open(_manifest(self.folder)["shards"])
            if main:
                named = {path for shard in self.shards for path in self._paths(shard["name"])}
                for path in {
                    *self.folder.glob("shards/*"),
                    *self.folder.glob("**/.*.part"),
                } - named:
                    if LEFTOVER.fullmatch(path.name):  # else it is not from here
                        path.unlink()
            wait()
            yield

    # -- opening and reading

    def _open(self, shards: list[dict]) -> None:
        """List the items of shards, reading those that are not listed yet."""
        kept = len(self.shards) if self.shards == shards[: len(self.shards)] else 0
        listed, found = (self.items[:], [self.embeddings]) if kept else ([], [self.embeddings[:0]])
        for shard in shards[kept:]:
            try:
                items, embeddings = self._index(shard)
            except CacheError as error:
                if not self.skip_damaged:
                    raise
                warnings.warn(f"{shard['items']} items are left out. {error}", stacklevel=3)
                continue
            listed += items
            found.append(embeddings)
        self.shards, self.items, self.embeddings = list(shards), listed, torch.cat(found)
        names = [item.domain for item in self.items]
        self.domains = {
            name: torch.tensor(rows)
            for name, rows in pd.Series(names).groupby(names).indices.items()
        }

    def _index(self, shard: dict) -> tuple[list[Item], Tensor]:
        data, index = self._paths(shard["name"])
        hint = f"restore it from a copy, or open the store with skip_damaged=True (without its {shard['items']} items)"
        for path in (data, index):
            require(path.is_file(), f"{path} is missing, which the store's manifest names: {hint}.")
        size = data.stat().st_size
        require(
            size == shard["bytes"], f"{data} has {size} bytes, expected {shard['bytes']}: {hint}."
        )
        whole = xxh3_128_hexdigest(index.read_bytes()) == shard["index"]
        require(whole, f"{index} is damaged (its contents do not match its checksum): {hint}.")
        with safe_open(index, "pt") as file:
            rows = json.loads(file.metadata()["items"])
            ids, lengths, embeddings = (
                file.get_tensor(name) for name in ("input_ids", "lengths", "embeddings")
            )
            texts = ids.split(lengths.tolist())
            embeddings = embeddings.clone()  # not a map of the file
        gone, items = shard.get("removed", []), []
        for row, text in zip(rows, texts, strict=True):
            items.append(Item(**row | {"input_ids": tuple(text.tolist()), "shard": shard["name"]}))
        left = [i for i in range(len(items)) if i not in gone]
        return [items[i] for i in left], embeddings[left]

    def read(self, item: Item | Hit | str) -> Piece:
        """Read the tensors of an item (or of a hit, or an id) from disk, in the model's dtype and on its device.

        Raises:
            CacheError: they are missing or do not match their checksum; other items are not
                affected.
        """
        item, kind = self._item_of(item), {"device": self.model.device, "dtype": self.model.dtype}
        own = self._tensors(item)
        positions = own.pop("positions").to(self.model.device) if item.kept else None
        own = {part: tensor.to(**kind) for part, tensor in own.items()}
        return Piece(
            item.input_ids,
            from_tensor(own["kv"]) if "kv" in own else None,
            own.get("hidden"),
            positions,
        )

    def _tensors(self, item: Item) -> dict[str, Tensor]:
        """The tensors of an item as they were stored, in memory that the file is mapped to."""
        path, _ = self._paths(item.shard)
        hint = "restore the file from a copy, or export the store and add the item again"
        try:
            with safe_open(path, "pt") as file:
                parts = [*self.keep, "positions"] if item.kept else self.keep
                own = {part: file.get_tensor(f"{item.number}.{part}") for part in parts}
        except (SafetensorError, OSError) as error:
            raise CacheError(
                f"Item {item.id!r} cannot be read from {path} ({error}): {hint}."
            ) from error
        whole = _checksum(own) == item.checksum
        require(
            whole,
            f"Item {item.id!r} in {path} is damaged (it does not match its checksum): {hint}.",
        )
        return own

    def splice(
        self, items: Sequence[Item | Hit | str], arm: str = "recompute", **options
    ) -> Prefix:
        """Read items and put them behind one another, as turns of one conversation; see `kvlab.knowledge.splice`.

        What the chat template opens every conversation with (a token, a system prompt) stays with
        the first item only, so it is no attention sink in the middle. `prompt` gives the ids of a
        question that goes on from here.
        """
        found = [
            self._item_of(item)
            for item in ([items] if isinstance(items, str | Item | Hit) else items)
        ]
        pieces = [self.read(item) for item in found[: loaded(arm)]]
        pieces += [
            Piece(item.input_ids, None) for item in found[len(pieces) :]
        ]  # these are read anew, not from disk
        return splice(
            self.model,
            pieces[:1] + [self._without_opening(piece) for piece in pieces[1:]],
            arm,
            **options,
        )

    def _without_opening(self, piece: Piece) -> Piece:
        start, cache, positions = self._opening, piece.cache, piece.positions
        if start and cache:
            stand = (
                torch.arange(len(piece.input_ids), device=self.model.device)
                if positions is None
                else positions
            )
            kept = (stand >= start).nonzero()[:, 0]
            cache = shift(select(cache, kept), -start, rotary_of(self.model))
            positions = None if positions is None else positions[kept] - start
        return Piece(piece.input_ids[start:], cache, None, positions)

    @cached_property
    def _opening(self) -> int:
        return _opening(self.tokenizer)

    def prompt(self, question: str) -> list[int]:
        """Token ids of a question that follows spliced items, up to where its answer begins."""
        return encode(self.tokenizer, [{"role": "user", "content": question}])[self._opening :]

    def _item_of(self, given: "Item | Hit | str") -> Item:
        item = self[given] if isinstance(given, str) else getattr(given, "item", given)
        own = isinstance(item, Item) and item.shard in {shard["name"] for shard in self.shards}
        seen = f"{given!r:.60} is not an item of the store in {self.folder}"
        require(own, f"{seen}: give one of its `items`, a hit, or an id.")
        return item

    # -- finding

    def retrieve(
        self,
        question: str,
        k: int = 1,
        threshold: float = 0.5,
        domain: str | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """The items whose questions are most like this one, best first; none if none is alike enough.

        Args:
            k: at most so many.
            threshold: least cosine similarity of a hit, which depends on the embedder: measure what
                it lets through (see chapter 01). -1 gives the nearest items in any case.
            domain: look among the items of this domain only.
            exact: only items with the same question, but for case, punctuation and space (so it is
                without an embedder).

        Raises:
            CacheError: k is not positive, the domain is unknown, the question is no text.
        """
        require(
            isinstance(question, str) and question.strip(),
            f"The question is {question!r}, expected a text.",
        )
        require(isinstance(k, int) and k >= 1, f"k is {k!r}, expected a whole number from 1.")
        require(threshold >= -1, f"threshold is {threshold}, expected a cosine, -1 to 1.")
        able = exact or self.embedder or not self.settings["embedder"]
        require(
            able,
            f"The store in {self.folder} was opened without its embedder: load it with that, or pass exact=True.",
        )
        rows = slice(None) if domain is None else self.domains.get(domain)
        require(
            rows is not None,
            f"There is no domain {domain!r} in {self.folder}: it has {sorted(self.domains)}.",
        )
        places = range(len(self)) if domain is None else rows.tolist()
        if exact or not self.embedder:
            wanted = _normal(question)
            same = [i for i in places if _normal(self.items[i].question) == wanted]
            return [Hit(self.items[i], 1.0) for i in same[:k]]
        scores = self.embeddings[rows] @ _embed(self.embedder, [question])[0]
        best = scores.topk(min(k, len(scores)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [Hit(self.items[places[i]], score) for score, i in pairs if score >= threshold]

    def summary(self) -> pd.DataFrame:
        """Items, tokens and megabytes (10^6 bytes) by domain, and in all."""
        rows = [(item.domain, 1, item.generated, len(item.input_ids), len(item.input_ids) - item.answer_start,
                 self.bytes_of(len(item.input_ids), item.kept) / 1e6) for item in self.items]  # fmt: skip
        names = ["domain", "items", "generated", "tokens", "answer tokens", "size (MB)"]
        table = pd.DataFrame(rows, columns=names).groupby("domain").sum()
        table = pd.concat(
            [table, table.sum().to_frame("all").T]
        )  # a domain may be called "all" too
        return table.astype(dict.fromkeys(names[1:-1], int))

    # -- copying

    def export(self, folder: str | Path, domain: str | None = None) -> "KnowledgeCache":
        """Copy the items of one domain, or all, to another store, new or there already, and return that.

        What is there already is skipped, so an export is brought up to date by another. A store
        opened with `skip_damaged` leaves out what cannot be read, and says so in a warning.

        Raises:
            CacheError: the domain is unknown, or the folder holds something else, or a store that
                this one does not fit.
        """
        names, folder = sorted(self.domains), _at(folder)
        require(
            domain is None or domain in names,
            f"There is no domain {domain!r} in {self.folder}: it has {names}.",
        )
        if not (folder / "manifest.json").exists():
            self._create(folder, self.settings)
        copy = KnowledgeCache.load(folder, self.model, self.tokenizer, self.embedder)
        seen = f"The store in {folder} was built with other settings than that in {self.folder}"
        require(copy.settings == self.settings, f"{seen}: give a new or an empty folder.")
        vectors = {
            item.id: vector for item, vector in zip(self.items, self.embeddings, strict=True)
        }
        with copy._only_writer():
            known, ids = {item.key for item in copy.items}, {item.id for item in copy.items}
            chosen = [
                item
                for item in self.items
                if domain in (None, item.domain) and item.key not in known
            ]
            twice = sorted(ids.intersection(item.id for item in chosen))
            require(
                not twice,
                f"{folder} has another item with the id {twice[:1]}: give a new or an empty folder.",
            )
            for group in copy._groups(chosen, 0):
                found = {item: own for item in group if (own := self._readable(item)) is not None}
                if found:
                    embeddings = torch.stack([vectors[item.id] for item in found])
                    shards = [*copy.shards, copy._write([*found], [*found.values()], embeddings)]
                    _commit(copy.folder, copy.settings, shards)
                    copy._open(shards)
        return copy

    def _readable(self, item: Item) -> dict[str, Tensor] | None:
        try:
            return self._tensors(item)
        except CacheError as error:
            if not self.skip_damaged:
                raise
            warnings.warn(f"One item is left out. {error}", stacklevel=3)
            return None


# -- what makes a store fit


def _at(folder: str | Path) -> Path:
    return Path(folder).expanduser().absolute()


def _list(records: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Records as a list; one alone, a text or a table is a slip."""
    odd = isinstance(records, str | bytes | Mapping | pd.DataFrame) or not isinstance(
        records, Iterable
    )
    hint = "give a list of mappings (of a table, table.to_dict('records'))"
    require(not odd, f"records is a {type(records).__name__}: {hint}.")
    return list(records)


def _settings(model, tokenizer, embedder: Embedder | None, asked: dict) -> dict:
    """What a store is built with, as its manifest has it; the embedder by what it makes of one sentence."""
    prints = {"model": fingerprint(model), "tokenizer": _tokenizer_print(tokenizer)}
    probe = _embed(embedder, [PROBE])[0].tolist()
    return json.loads(json.dumps({"version": FORMAT_VERSION, **asked, **prints, "embedder": probe}))


def _commit(folder: Path, settings: dict, shards: list[dict]) -> None:
    """Replace the manifest: from here on these shards are the store."""
    content = settings | {"shards": shards}
    text = json.dumps({"checksum": _json_sum(content), **content}, indent=1)
    for name in MANIFESTS:
        write_text(folder / name, text)


def _processes(model: PreTrainedModel) -> PartialState:
    """The processes of this run."""
    return PartialState(cpu=model.device.type == "cpu")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Be the only one who writes to a store; a process that dies lets go."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise CacheError(f"Another writer is adding to {folder}: wait until it is done.") from error


def _tokens(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str
) -> tuple[list[int], int]:
    """The ids of prompt and answer (if there is one), and where the answer starts."""
    asked = [{"role": "user", "content": question}]
    prompt = encode(tokenizer, asked)
    if not answer:
        return prompt, len(prompt)
    whole = encode(tokenizer, [*asked, {"role": "assistant", "content": answer}])
    if (
        whole[: len(prompt)] != prompt
    ):  # a template may render an answer otherwise than it opens one
        whole = prompt + tokenizer(answer, add_special_tokens=False)["input_ids"]
    return whole, len(prompt)


def _opening(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the template puts before the first turn of a conversation, and before no other."""
    turns = [{"role": role, "content": PROBE} for role in ("user", "assistant", "user")]
    alone, later = encode(tokenizer, turns[:1]), encode(tokenizer, turns)
    shared = next(
        i for i in range(len(alone) + 1) if later[len(later) - len(alone) + i :] == alone[i:]
    )
    return (
        shared if PROBE in tokenizer.decode(alone[shared:]) else 0
    )  # else a first turn has a form of its own


def _answered(tokenizer: PreTrainedTokenizerBase, item: Item, ids: list[int]) -> Item:
    """The item with the answer that was generated, in the tokens in which it was."""
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return replace(item, answer=text, input_ids=(*item.input_ids, *ids))


def _normal(text: str) -> str:
    """What makes two questions the same; signs inside a word or before it count (C++ and C#, -1 and 1)."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(filter(None, (word.strip("?!.,;:\"'…。、·()") for word in words)))


def _embed(embedder: Embedder | None, questions: list[str]) -> Tensor:
    """Unit vectors, (len(questions), E)."""
    if embedder is None:
        return torch.empty(len(questions), 0)
    options = {"normalize_embeddings": True, "convert_to_tensor": True, "show_progress_bar": False}
    vectors = torch.as_tensor(embedder.encode(questions, **options)).float().cpu()
    fine = vectors.ndim == 2 and len(vectors) == len(questions) and vectors.isfinite().all()
    seen = f"The embedder gave {tuple(vectors.shape)} for {len(questions)} questions"
    require(
        fine, f"{seen}, expected one vector of finite numbers for each: give a SentenceTransformer."
    )
    return normalize(vectors, dim=-1)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = xxh3_128()
    for part, tensor in sorted(tensors.items()):
        digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def _json_sum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _manifest(folder: Path) -> dict:
    """Read the manifest, or its copy if it is damaged, or say what is wrong."""
    path, copy = (folder / name for name in MANIFESTS)
    require(path.is_file(), f"There is no store in {folder}: build one with KnowledgeCache.build.")
    manifest = _intact(path)
    if manifest is None and (manifest := _intact(copy)):
        warnings.warn(
            f"{path} is damaged: its copy beside it is used, and the next `add` mends it.",
            stacklevel=4,
        )
    require(
        manifest,
        f"{path} is damaged, and so is its copy: restore one that is as new as the shards beside it.",
    )
    seen = f"The store in {folder} has format version {manifest['version']}, this kvlab reads {FORMAT_VERSION}"
    require(
        manifest["version"] == FORMAT_VERSION,
        f"{seen}: use the kvlab that wrote it, or build it again.",
    )
    return manifest


def _intact(path: Path) -> dict | None:
    """A manifest, if it matches its checksum."""
    try:
        manifest = json.loads(path.read_text("utf-8"))
        return manifest if manifest.pop("checksum") == _json_sum(manifest) else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _tokenizer_print(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What makes the same text the same tokens."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content |= {"truncation": None, "padding": None}  # these change with use
    else:
        content = {"vocabulary": tokenizer.get_vocab()}
    return {
        "vocabulary": _json_sum(content),
        "chat template": _json_sum({"template": tokenizer.chat_template}),
    }


def _require_embedder(folder: Path, probe: list[float], embedder: Embedder | None) -> None:
    if embedder is None:
        return
    require(
        probe,
        f"The store in {folder} was built without an embedder: build it again with one, or load it without.",
    )
    own, stored = _embed(embedder, [PROBE])[0], torch.tensor(probe)
    same = own.shape == stored.shape and cosine_similarity(own, stored, dim=0) > 0.999
    sizes = f" ({len(own)} numbers, not {len(stored)})" * (len(own) != len(stored))
    seen = f"The embedder gives other vectors than that of the store in {folder}{sizes}"
    require(
        same,
        f"{seen}: load it with the embedder it was built with, or with none, or build it again.",
    )
