"""Drafts cut from a target: a few of its layers, copied, that may read what a knowledge cache has on the question.

A draft is an ordinary causal LM (`draft.plain`) and, around it, what lets it read: after each layer
a cross-attention to an item of the knowledge cache, behind a gate that starts closed, so that an
untrained draft is the plain truncated target, bit for bit ("prefix", below, has no gate). Knowledge
goes to the draft alone; what is decoded stays the target's text.

Three ways to give it:

- "vector": keys and values are projected from the target's last hidden states of the item;
- "kv": they are the target's own, of the layer that this layer of the draft was cut from,
  un-rotated;
- "prefix": the same keys and values stand in the draft's own cache before its text (no new
  parameters).

In all three only the item's answer is read, and its entries are placed where the answer begins in
the draft's own text: so the draft finds what comes next by position as well as by content.
`aligned=False` leaves positions out, as the source has it ("prefix": the whole item stands before
the text, as if the draft had read it).

>>> from kvlab import lab
>>> target = lab.load("lab-target")
>>> draft, ids = KnowledgeDraft.cut(target, "uniform:3", knowledge="kv", transitions=True), torch.arange(8)[None]
>>> draft.config.layers, torch.equal(draft(ids).logits, draft.plain(ids).logits)
([0, 6, 11], True)
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import rotate_half

from kvlab.cache import Prefix, from_tensor, select, to_tensor, unrotate
from kvlab.files import write_tensors
from kvlab.generation import continuations
from kvlab.losses import acceptance as overlap
from kvlab.losses import distillation_losses, require_known_losses
from kvlab.models import fingerprint, require_supported, rotary_of
from kvlab.training import fit

if TYPE_CHECKING:
    from kvlab.knowledge import Item, KnowledgeCache

KINDS = ("vector", "kv", "prefix")
PART = 256  # prompts whose answers are kept in one file
REACH = 16.0  # of a gate: AdamW moves a number by its learning rate a step, which would take thousands to open one
SHARES = {
    "vector": {"kl": 0.5, "ce": 1.0, "tv": 0.3},
    "kv": {"kl": 0.8, "tv": 0.3},
}  # as the sources have them


def _require(condition: object, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def sample_layers(which: str | Sequence[int], have: int) -> list[int]:
    """Indices of layers to cut: "first:N", "uniform:N" (round(linspace(0, have - 1, N))), or the indices themselves.

    Example:
        >>> sample_layers("first:3", 28), sample_layers("uniform:6", 28)
        ([0, 1, 2], [0, 5, 11, 16, 22, 27])
    """
    wanted = f"layers is {which!r}, expected 'first:N', 'uniform:N' or rising indices, with at most {have} layers"
    if isinstance(which, str):
        how, _, count = which.partition(":")
        _require(
            how in ("first", "uniform") and count.isdecimal() and 0 < int(count) <= have,
            f"{wanted}.",
        )
        spread = (
            np.arange(int(count))
            if how == "first"
            else np.linspace(0, have - 1, int(count)).round()
        )
        return spread.astype(int).tolist()
    layers = list(which) if isinstance(which, Sequence) else []
    _require(
        layers and {*layers} <= {*range(have)} and layers == sorted({*layers}),
        f"{wanted}, 0 to {have - 1}.",
    )
    return [int(layer) for layer in layers]


class Knowledge(NamedTuple):
    """What each row of a batch may read.

    `states` are (B, S, d), last hidden states of the target ("vector"), or (B, n, 2, H_kv, S, D),
    un-rotated keys and values for each of the draft's n layers ("kv", "prefix"); `mask` (B, S) is
    True where there is something to read (a row without knowledge has none), and `start` (B,) is
    where the answer begins in the row's own text.
    """

    states: Tensor
    mask: Tensor
    start: Tensor


class _Entries(NamedTuple):
    """Knowledge as attention takes it: keys and values (B, H_kv, S, D) of each layer, projected and placed."""

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor
    start: Tensor

    def row(self, row: int) -> "_Entries":
        one = slice(row, row + 1)
        return _Entries([(k[one], v[one]) for k, v in self.layers], self.mask[one], self.start[one])

    def cache(self) -> DynamicCache:
        return from_tensor(torch.stack([torch.stack(pair) for pair in self.layers]))


class KnowledgeDraftConfig(PreTrainedConfig):
    """Shape of a draft: `text_config` of its plain part, the target's `layers` it was cut from, and how it reads."""

    model_type = "knowledge_draft"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: PreTrainedConfig | dict | None = None,
        layers: Sequence[int] = (),
        knowledge: str | None = None,
        transitions: bool = False,
        aligned: bool = True,
        **options,
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config, self.layers, self.knowledge = text_config, list(layers), knowledge
        self.transitions, self.aligned = transitions, aligned
        super().__init__(**options)

    @classmethod
    def of(
        cls, target: PreTrainedConfig, layers: str | Sequence[int] = "first:3", **options
    ) -> "KnowledgeDraftConfig":
        """The configuration of a draft cut from a target of this configuration; options as for `cut`.

        Example:
            >>> from kvlab.scale import config_of
            >>> KnowledgeDraftConfig.of(config_of("Qwen/Qwen3-0.6B"), "uniform:6").text_config.num_hidden_layers
            6
        """
        kind = options.get("knowledge")
        _require(
            kind in (None, *KINDS),
            f"knowledge is {kind!r}, expected None or one of {', '.join(KINDS)}.",
        )
        text = copy.deepcopy(target.get_text_config(decoder=True))
        chosen = sample_layers(layers, text.num_hidden_layers)
        text.num_hidden_layers = len(chosen)
        if getattr(text, "layer_types", None):
            text.layer_types = [text.layer_types[layer] for layer in chosen]
        return cls(text, chosen, **options)


class Reader(nn.Module):
    """Cross-attention from hidden states (B, T, d) to knowledge, times a gate that starts at 0.

    It begins as a copy of the attention of the layer it stands behind, which knows how to make
    queries for these keys; `projects` adds keys and values of its own, for knowledge that is hidden
    states.
    """

    def __init__(self, layer: nn.Module, projects: bool):
        super().__init__()
        attention = layer.self_attn
        self.head_dim, self.gate = attention.head_dim, nn.Parameter(torch.zeros(1))
        self.norm = copy.deepcopy(layer.input_layernorm)
        self.query, self.output = copy.deepcopy(attention.q_proj), copy.deepcopy(attention.o_proj)
        self.query_norm = copy.deepcopy(getattr(attention, "q_norm", nn.Identity()))
        self.output.bias = None  # what looks at nothing adds nothing
        if projects:
            self.key, self.value = copy.deepcopy(attention.k_proj), copy.deepcopy(attention.v_proj)
            self.key_norm = copy.deepcopy(getattr(attention, "k_norm", nn.Identity()))

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H_kv, S, D) of hidden states (B, S, d)."""
        keys, values = self.key_norm(self._heads(self.key(states))), self._heads(self.value(states))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def forward(
        self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor, turn: tuple | None
    ) -> Tensor:
        query = self.query_norm(self._heads(self.query(self.norm(hidden)))).transpose(
            1, 2
        )  # (B, H, T, D)
        query = _rotated(query, turn) if turn else query
        keys, values = keys.to(query.dtype), values.to(query.dtype)  # under autocast
        read = scaled_dot_product_attention(
            query, keys, values, attn_mask=mask[:, None, None], enable_gqa=True
        )
        return REACH * self.gate * self.output(read.transpose(1, 2).flatten(2))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)


class Transition(nn.Module):
    """What stands for the layers that were left out between two: a residual MLP that starts at 0."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down.starts_at_zero = True

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(gelu(self.up(self.norm(hidden))))


def _rotated(states: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn (B, H, T, D) by cosines and sines (B, T, D), as Llama and its kin do."""
    cos, sin = (table[:, None].to(states.dtype) for table in turn)
    return states * cos + rotate_half(states) * sin


class KnowledgeDraft(PreTrainedModel, GenerationMixin):
    """A causal LM of a few of a target's layers, with what lets it read knowledge. Make one with `cut`.

    It saves and loads as any model of transformers does (`AutoModelForCausalLM` knows it once
    `kvlab.draft` is imported), and drafts in `kvlab.speculate.ModelProposer(draft)` or
    `target.generate(..., assistant_model=draft)`; what is to be known comes by `knowing`.
    """

    config_class = KnowledgeDraftConfig
    base_model_prefix = "plain"
    _supports_sdpa = True

    def __init__(self, config: KnowledgeDraftConfig):
        super().__init__(config)
        self.plain = AutoModelForCausalLM.from_config(config.text_config)
        decoder, reads = self.plain.base_model.layers, config.knowledge in ("vector", "kv")
        self.readers = nn.ModuleList(
            Reader(layer, config.knowledge == "vector") for layer in decoder if reads
        )
        between = decoder[1:] if config.transitions else ()
        self.transitions = nn.ModuleList(Transition(config.text_config) for _ in between)
        self._known: _Entries | None = None
        self.post_init()

    @classmethod
    def cut(
        cls,
        target: PreTrainedModel,
        layers: str | Sequence[int] = "first:3",
        *,
        knowledge: str | None = None,
        transitions: bool = False,
        aligned: bool = True,
    ) -> "KnowledgeDraft":
        """Copy layers, embedding, last norm and head of a target, which is left as it is.

        Args:
            layers: "first:N", "uniform:N", or indices.
            knowledge: how the draft is to read: None, "vector", "kv" or "prefix".
            transitions: put a residual MLP between layers, for what was left out.
            aligned: place knowledge where the answer begins; False: no positions, as in the source.

        Raises:
            ValueError: layers or a way to read that do not exist, or a target that is no Llama-like
                decoder.
        """
        require_supported(target)
        options = {"knowledge": knowledge, "transitions": transitions, "aligned": aligned}
        draft = cls(KnowledgeDraftConfig.of(target.config, layers, **options))
        draft.init_weights()
        cast(draft.to(target.device), target.dtype)
        draft.plain.load_state_dict(_state_of(target, draft.config.layers))
        draft.readers = nn.ModuleList(
            Reader(layer, knowledge == "vector") for layer in draft._layers[: len(draft.readers)]
        )
        draft.generation_config = copy.deepcopy(target.generation_config)
        return draft.requires_grad_(True).eval()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize what was neither cut from a target nor in a checkpoint."""
        if getattr(module, "starts_at_zero", False):
            nn.init.zeros_(module.weight)
        elif isinstance(module, Reader):
            nn.init.zeros_(module.gate)
        else:
            super()._init_weights(module)

    @property
    def compilable(self) -> bool:
        """Whether `kvlab.speculate.Runner` can compile it; what stands between layers comes by hooks in each call."""
        return not (len(self.readers) or len(self.transitions))

    @property
    def _layers(self) -> nn.ModuleList:
        return self.plain.base_model.layers

    def get_input_embeddings(self) -> nn.Module:
        return self.plain.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.plain.get_output_embeddings()

    # -- reading

    def read(self, store: "KnowledgeCache", item: "Item") -> Tensor:
        """What this draft may read of an item: (S, d), or (n, 2, H_kv, S, D) for its n layers; see `Knowledge`."""
        kind, start = self.config.knowledge, item.answer_start
        _require(
            kind, "This draft does not read: cut one with knowledge='vector', 'kv' or 'prefix'."
        )
        if kind == "vector":
            return store.hidden_states(item)[0, start:]
        _require(
            not item.kept,
            "The store keeps compressed caches, which drafts do not read: build one without.",
        )
        if kind == "prefix" and not self.config.aligned:
            start = 0
        positions = torch.arange(start, len(item.input_ids), device=store.model.device)
        found = to_tensor(
            unrotate(select(store.read(item).cache, positions), positions, rotary_of(store.model))
        )
        return found[self.config.layers][:, :, 0]

    def knowing(
        self, store: "KnowledgeCache", items: Sequence["Item | None"], starts: Sequence[int]
    ) -> tuple["KnowledgeDraft", list[Prefix | None] | None]:
        """A draft that knows an item in each row, and the prefixes it needs: `ModelProposer(*draft.knowing(...))`.

        Knowledge is projected here, once. The draft that is returned shares all weights with this
        one; without a prefix it also works in `generate`, for as many rows as there are items.

        Args:
            items: of each row, or None for a row without knowledge.
            starts: where the answer begins in each row's text; the number of its prompt's tokens.

        Example:
            >>> import tempfile
            >>> from kvlab import lab
            >>> from kvlab.knowledge import KnowledgeCache
            >>> target, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
            >>> draft = KnowledgeDraft.cut(target, "first:1", knowledge="kv")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     records = [{"question": "Who sings?", "answer": "Ben"}]
            ...     store = KnowledgeCache.build(folder, records, target, tokenizer)
            ...     knowing, prefix = draft.knowing(store, [store.items[0], None], [4, 4])
            >>> knowing(torch.arange(8).expand(2, -1)).logits.shape
            torch.Size([2, 8, 1536])
        """
        rows = len(items)
        _require(
            len(starts) == rows,
            f"There are {rows} items and {len(starts)} starts: give one for each row.",
        )
        read = [None if item is None else self.read(store, item) for item in items]
        given = gather(read, starts)
        if given is None:
            return self, None
        given = Knowledge(*(part.to(self.device) for part in given))
        with torch.no_grad():
            entries = self._entries(given)
        if self.config.knowledge == "prefix":
            return self, [self._prefix(entries.row(row)) for row in range(rows)]
        knowing = copy.copy(self)
        knowing._known = entries
        return knowing, None

    def for_row(self, row: int) -> "KnowledgeDraft":
        """A draft that knows what this one knows in one row."""
        if self._known is None:
            return self
        alone = copy.copy(self)
        alone._known = self._known.row(row)
        return alone

    def _prefix(self, entries: _Entries) -> Prefix | None:
        kept = entries.mask[0].nonzero()[:, 0]
        if not len(kept):
            return None
        return Prefix(select(entries.cache(), kept), 0 if self.config.aligned else len(kept))

    def _entries(self, given: Knowledge) -> _Entries:
        """Project knowledge, and place it."""
        states = given.states.to(self.dtype)
        if self.config.knowledge == "vector":
            layers = [reader.project(states) for reader in self.readers]
        else:
            layers = [tuple(pair) for pair in states.permute(1, 2, 0, 3, 4, 5)]
        if self.config.aligned or self.config.knowledge == "prefix":
            places = torch.arange(given.mask.shape[1], device=given.mask.device)[None]
            if self.config.knowledge == "prefix" and self.config.aligned:
                places = places + given.start[:, None]
            turn = self._turn(places)
            layers = [(_rotated(keys, turn), values) for keys, values in layers]
        if self.config.knowledge == "prefix":
            return _Entries(layers, given.mask, given.start)
        # One entry of zeros before them, so that a head can look at nothing, and a row without knowledge does.
        layers = [tuple(pad(part, (0, 0, 1, 0)) for part in pair) for pair in layers]
        return _Entries(layers, pad(given.mask, (1, 0), value=True), given.start)

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, T, D) of positions (B, T)."""
        return self.plain.base_model.rotary_emb(self.get_input_embeddings().weight, positions)

    # -- running

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        knowledge: Knowledge | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options,
    ) -> CausalLMOutputWithPast:
        """As any causal LM; `knowledge` is for training, where it is projected in each call (else see `knowing`)."""
        entries = self._known if knowledge is None else self._entries(knowledge)
        if entries is not None and position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)[
                None
            ]
        if entries is not None and self.config.knowledge == "prefix":
            past_key_values, position_ids, attention_mask = self._behind(
                entries, input_ids, position_ids, attention_mask
            )
            entries = None
        with self._between_layers(entries, position_ids):
            return self.plain(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **options,
            )

    def _behind(
        self,
        entries: _Entries,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
    ):
        """A cache that holds the entries, and positions and mask of a text that begins behind them."""
        own = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not self.config.aligned:
            position_ids = position_ids + entries.mask.sum(1, keepdim=True)
        return entries.cache(), position_ids, torch.cat((entries.mask.to(own), own), 1)

    @contextmanager
    def _between_layers(
        self, entries: _Entries | None, position_ids: Tensor | None
    ) -> Iterator[None]:
        """While it lasts, what stands between the layers of the plain model takes part."""
        turn = None
        if entries is not None and self.config.aligned:
            turn = self._turn(position_ids - entries.start[:, None])

        def after(i: int, module: nn.Module, args: tuple, hidden: Tensor) -> Tensor:
            if entries is not None:
                hidden = hidden + self.readers[i](hidden, *entries.layers[i], entries.mask, turn)
            if i < len(self.transitions):
                hidden = hidden + self.transitions[i](hidden)
            return hidden

        busy = entries is not None or len(self.transitions)
        hooks = [
            layer.register_forward_hook(partial(after, i))
            for i, layer in enumerate(self._layers)
            if busy
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Change the dtype of a model's parameters, and return it; `to` would also round what rotary embeddings turn by.

    Example:
        >>> from kvlab import lab
        >>> cast(lab.load("lab-draft"), torch.float16).dtype
        torch.float16
    """
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def _state_of(target: PreTrainedModel, layers: Sequence[int]) -> dict[str, Tensor]:
    """The target's weights, with the chosen layers counted anew."""
    stem, state = f"{target.base_model_prefix}.layers.", target.state_dict()
    chosen = {str(old): str(new) for new, old in enumerate(layers)}
    found = {}
    for name, tensor in state.items():
        if name.startswith(stem):
            old, _, rest = name.removeprefix(stem).partition(".")
            if old in chosen:
                found[f"{stem}{chosen[old]}.{rest}"] = tensor
        else:
            found[name] = tensor
    return found


AutoConfig.register(KnowledgeDraftConfig.model_type, KnowledgeDraftConfig, exist_ok=True)
AutoModelForCausalLM.register(KnowledgeDraftConfig, KnowledgeDraft, exist_ok=True)


def gather(
    known: Sequence[Tensor | None], starts: Sequence[int], like: Tensor | None = None
) -> Knowledge | None:
    """Put what rows may read (None: nothing; see `KnowledgeDraft.read`) into one batch.

    `starts` is where their answers begin. If no row reads, the result is None, or, with something
    to be `like`, a knowledge of nothing.

    Example:
        >>> gather([torch.ones(2, 8), None], [4, 5]).mask
        tensor([[ True,  True],
                [False, False]])
    """
    some = next((states for states in known if states is not None), like)
    if some is None:
        return None
    sizes = torch.tensor([0 if states is None else states.shape[-2] for states in known])
    most = max(1, int(sizes.max()))
    blank = some.new_zeros(*some.shape[:-2], most, some.shape[-1])
    rows = [
        blank if states is None else pad(states, (0, 0, 0, most - states.shape[-2]))
        for states in known
    ]
    mask = torch.arange(most) < sizes[:, None]
    return Knowledge(
        torch.stack(rows), mask.to(some.device), torch.tensor(starts, device=some.device)
    )


# -- training


class Example(NamedTuple):
    """A text to learn from: `input_ids` (T,) with an answer from `start` on, and what the draft may read meanwhile.

    `hidden_states` (T - start, d) are the target's last ones, before each token of its answer, so
    that its logits need not be computed again; None if the answer is not the target's own.
    """

    input_ids: Tensor
    start: int
    hidden_states: Tensor | None = None
    known: Tensor | None = None


@torch.no_grad()
def listen(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    folder: str | Path | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> list[Example]:
    """Let the target answer prompts (token ids), greedily, and keep its tokens and last hidden states.

    Args:
        folder: where answers are kept, each 256 in a file named for target, prompts and length: the
            same ones are read from there. Under a launcher, processes that see the folder share the
            work.

    Example:
        >>> from kvlab import lab
        >>> target, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
        >>> example = listen(target, tokenizer, [tokenizer("<|user|> Who?<|assistant|>").input_ids], max_new_tokens=4)[0]
        >>> example.start, example.hidden_states.shape[-1]
        (4, 128)
    """
    parts = [prompts[at : at + PART] for at in range(0, len(prompts), PART)]
    hear = partial(_heard, target, tokenizer, folder, max_new_tokens, batch_size)
    state = PartialState(cpu=target.device.type == "cpu")
    if folder and state.num_processes > 1:
        for part in parts[state.process_index :: state.num_processes]:
            hear(part)
        state.wait_for_everyone()
    return [example for part in parts for example in hear(part)]


def _heard(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path | None,
    max_new_tokens: int,
    batch_size: int,
    prompts: Sequence[list[int]],
) -> list[Example]:
    """The answers to some prompts, from their file if there is one."""
    asked = json.dumps([fingerprint(target)["weights"], [list(prompt) for prompt in prompts], max_new_tokens,
                        tokenizer.eos_token_id])  # fmt: skip
    name = f"answers-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.safetensors"
    if folder and (Path(folder) / name).exists():
        with safe_open(Path(folder) / name, "pt") as file:
            kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    else:
        answers = continuations(
            target, tokenizer, prompts, max_new_tokens, batch_size, "the target's answers"
        )
        texts = [
            torch.tensor([*prompt, *answer])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        starts = [len(prompt) for prompt in prompts]
        kept = {
            "input_ids": torch.cat(texts),
            "lengths": torch.tensor([len(text) for text in texts]),
        }
        kept |= {
            "starts": torch.tensor(starts),
            "hidden_states": torch.cat(_before(target, texts, starts, batch_size)),
        }
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_tensors(Path(folder) / name, kept, {})
    lengths, starts = kept["lengths"].tolist(), kept["starts"].tolist()
    texts = kept["input_ids"].split(lengths)
    hidden = kept["hidden_states"].split(
        [n - start for n, start in zip(lengths, starts, strict=True)]
    )
    return [Example(*parts) for parts in zip(texts, starts, hidden, strict=True)]


def _before(
    target: PreTrainedModel, texts: list[Tensor], starts: list[int], batch_size: int
) -> list[Tensor]:
    """The last hidden states before each token of the answers."""
    found = []
    for at in tqdm(
        range(0, len(texts), batch_size), desc="the target's hidden states", delay=2, leave=False
    ):
        rows = pad_sequence(texts[at : at + batch_size], batch_first=True).to(
            target.device
        )  # on the right: unseen
        states = target.base_model(input_ids=rows, use_cache=False).last_hidden_state.cpu()
        found += [
            states[i, starts[at + i] - 1 : len(texts[at + i]) - 1].clone() for i in range(len(rows))
        ]
    return found


def given(items: Iterable["Item"]) -> list[Example]:
    """The answers of items (of a store, say) as they were given, each with its prompt; not the target's own."""
    return [Example(torch.tensor(item.input_ids), item.answer_start) for item in items]


def attach(
    draft: KnowledgeDraft,
    store: "KnowledgeCache",
    examples: Sequence[Example],
    items: Sequence["Item | None"],
) -> list[Example]:
    """Give each example what the draft may read of an item (None: nothing); each item is read from the store once."""
    unique = {item.id: item for item in items if item is not None}
    read = {name: draft.read(store, item).cpu() for name, item in unique.items()}
    pairs = zip(examples, items, strict=True)
    return [
        example._replace(known=None if item is None else read[item.id]) for example, item in pairs
    ]


def unsettle(
    examples: Sequence[Example], hide: float = 0.3, mislead: float = 0.15, seed: int = 0
) -> list[Example]:
    """Take knowledge from a share of the examples, and give another share that of another example.

    A draft that always reads what is right forgets how to do without, and believes what a false hit
    says.

    Example:
        >>> examples = [Example(torch.arange(4), 2, None, torch.ones(2, 8))] * 100
        >>> 20 < sum(example.known is None for example in unsettle(examples)) < 40
        True
    """
    rng, changed = np.random.default_rng(seed), []
    for example, other, u in zip(
        examples, rng.permutation(len(examples)), rng.random(len(examples)), strict=True
    ):
        known = None if u < hide else examples[other].known if u < hide + mislead else example.known
        changed.append(example._replace(known=known))
    return changed


def collate(
    examples: Sequence[Example], hidden_size: int, like: Tensor | None = None
) -> dict[str, Tensor]:
    """A batch: input_ids (B, T), padded on the right, weights (1 on answers), and what target and knowledge give.

    With something to be `like`, all batches have knowledge, if only of nothing.
    """
    input_ids = pad_sequence([example.input_ids for example in examples], batch_first=True)
    weights, hidden = torch.zeros(input_ids.shape), torch.zeros(*input_ids.shape, hidden_size)
    own = torch.tensor([[float(example.hidden_states is not None)] for example in examples])
    for row, example in enumerate(examples):
        weights[row, example.start : len(example.input_ids)] = 1
        if example.hidden_states is not None:
            hidden[row, example.start - 1 : len(example.input_ids) - 1] = (
                example.hidden_states.float()
            )
    batch = {
        "input_ids": input_ids,
        "weights": weights,
        "distill_weights": weights * own,
        "hidden_states": hidden,
    }
    known = gather(
        [example.known for example in examples], [example.start for example in examples], like
    )
    return batch | (known._asdict() if known else {})


def _logits(draft: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    knowledge = (
        Knowledge(*(batch[name] for name in Knowledge._fields)) if "states" in batch else None
    )
    return draft(input_ids=batch["input_ids"], knowledge=knowledge, use_cache=False).logits


class Accepted(NamedTuple):
    """For each text with an answer of two tokens or more, the share of tokens accepted.

    `greedy`: when the likeliest is taken; `sampled`: when tokens are drawn at temperature 1, the
    mean of alpha.
    """

    greedy: np.ndarray
    sampled: np.ndarray


@torch.inference_mode()
def acceptance(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    examples: Sequence[Example],
    batch_size: int = 32,
) -> Accepted:
    """How much of the target's own answers a draft would have got accepted, if it had guessed each token.

    All tokens count but the first, which the target gives when it has read the prompt. One call a
    batch, where speculative decoding needs a loop: there the same tokens are guessed, but for those
    that come free after each round.
    """
    own = all(example.hidden_states is not None for example in examples)
    _require(
        own,
        "Some answers are not the target's own, and it did not weigh them: give what `listen` returns.",
    )
    greedy, sampled, head = [], [], target.get_output_embeddings()
    for at in range(0, len(examples), batch_size):
        group = examples[at : at + batch_size]
        batch = {
            k: v.to(draft.device) for k, v in collate(group, target.config.hidden_size).items()
        }
        logits = _logits(draft, batch)
        for row, example in enumerate(group):
            tokens = slice(example.start, len(example.input_ids) - 1)
            if tokens.stop > tokens.start:  # a vocabulary can be large: one text at a time
                p = head(example.hidden_states[1:].to(target.device, target.dtype)).to(
                    logits.device
                )
                q = logits[row, tokens]
                greedy.append((p.argmax(-1) == q.argmax(-1)).float().mean().item())
                alpha = overlap(q.float().log_softmax(-1), p.float().log_softmax(-1))
                sampled.append(alpha.mean().item())
    return Accepted(np.array(greedy), np.array(sampled))


def source_shares(knowledge: str | None, given: bool) -> dict[str, float]:
    """Shares of the losses as the sources have them, for a draft that reads in this way; "ce" where answers are given.

    Example:
        >>> source_shares("kv", given=True)
        {'ce': 1.0, 'kl': 0.8, 'tv': 0.3}
    """
    return ({"ce": 1.0} if given else {}) | SHARES["kv" if knowledge == "kv" else "vector"]


def train(
    draft: KnowledgeDraft,
    target: PreTrainedModel,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    *,
    shares: Mapping[str, float] | None = None,
    epochs: int = 5,
    batch_size: int = 8,
    learning_rate: float = 3e-5,
    accumulate: int = 1,
    precision: str = "no",
    folder: str | Path | None = None,
    every: int | None = None,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Train a draft on texts, and leave it with the weights that did best on `heldout`, of those checked on the way.

    Args:
        examples: the target's own answers (`listen`) and given ones (`given`), with knowledge
            (`attach`).
        heldout: the target's own answers to other questions; greedy acceptance on them decides
            which weights are kept.
        shares: of the losses (`kvlab.losses.distillation_losses`); by default as in the source, SHARES["kv"]
            for a draft that reads keys and values and SHARES["vector"] for any other, with
            cross-entropy where answers are given.
        epochs, batch_size, accumulate: passes over the examples, examples of a batch, batches of an
            optimizer step.
        folder: for checkpoint.safetensors, from which a run that was stopped goes on, and
            best.safetensors. It serves one run: whether examples and losses are those of before is
            not checked.
        every: steps between checks on `heldout`; by default an epoch.

    Returns:
        The history of `fit`, with "acceptance" where it was checked.
    """
    own = sum(example.hidden_states is not None for example in examples)
    shares = dict(shares or source_shares(draft.config.knowledge, given=own < len(examples)))
    require_known_losses(shares)
    _require(
        "ce" in shares or own == len(examples),
        "Some answers are given: they need the loss 'ce' among the shares.",
    )
    steps = epochs * (len(examples) // batch_size) // accumulate
    _require(
        steps > 0,
        f"{len(examples)} examples are less than a step of {batch_size} * {accumulate}: give more.",
    )
    guessed = [example for example in heldout if len(example.input_ids) - example.start > 1]
    _require(
        guessed,
        "Nothing is held out that has an answer of two tokens or more: give what `listen` returns for other questions.",
    )
    weighed = all(example.hidden_states is not None for example in heldout)
    _require(weighed, "Some held-out answers are not the target's own: give what `listen` returns.")
    state = PartialState(
        cpu=target.device.type == "cpu"
    )  # before `fit`, which would take the best device there is
    _require(
        folder or state.num_processes == 1,
        "Several processes train this draft: give a folder that all can read.",
    )
    head, like = (
        target.get_output_embeddings(),
        next((e.known for e in examples if e.known is not None), None),
    )

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            target_logits = head(batch["hidden_states"].to(target.dtype))
        weights = batch["weights"], batch["distill_weights"]
        return distillation_losses(
            shares, _logits(model, batch), target_logits, batch["input_ids"], *weights
        )

    with TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        best = _Best(Path(place) / "best.safetensors", Path(place) / "checkpoint.safetensors")

        def evaluate(model: KnowledgeDraft) -> dict[str, float]:
            score = float(acceptance(model, target, heldout).greedy.mean())
            best.offer(model, score)
            return {"acceptance": score}

        history = fit(
            draft,
            DataLoader(
                examples,
                batch_size=batch_size,
                shuffle=True,
                drop_last=True,
                collate_fn=partial(collate, hidden_size=target.config.hidden_size, like=like),
            ),
            losses,
            steps=steps,
            learning_rate=learning_rate,
            warmup=max(1, steps // 20),
            accumulate=accumulate,
            precision=precision,
            weight=lambda batch: {
                name: batch["weights" if name == "ce" else "distill_weights"].sum()
                for name in sorted(shares, key="ce".__ne__)
            },
            evaluate=evaluate,
            checkpoint=best.checkpoint,
            every=every or max(1, steps // epochs),
            seed=seed,
        )
        best.restore(draft)
    return history


class _Best:
    """The weights that did best so far, in a file beside the checkpoint."""

    def __init__(self, path: Path, checkpoint: Path):
        self.path, self.checkpoint, self.score = path, checkpoint, -1.0
        if checkpoint.exists() and path.exists():
            with safe_open(path, "pt") as file:
                self.score = float(file.metadata()["acceptance"])

    def offer(self, draft: KnowledgeDraft, score: float) -> None:
        if score > self.score:
            self.score = score
            if PartialState().is_main_process:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                weights = {name: p.detach() for name, p in draft.named_parameters()}
                write_tensors(self.path, weights, {"acceptance": repr(score)})

    def restore(self, draft: KnowledgeDraft) -> None:
        PartialState().wait_for_everyone()
        with safe_open(self.path, "pt") as file, torch.no_grad():
            for name, p in draft.named_parameters():
                p.copy_(file.get_tensor(name))


# -- giving away


def export(
    draft: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocab_size: int = 0,
) -> PreTrainedModel:
    """Write a draft as a plain model directory, which transformers and vLLM take as it is, and return it read back.

    Args:
        draft: a KnowledgeDraft without cross-attention and transitions, or any causal LM.
        vocab_size: of the target. Models of one family can be padded to different sizes, which both
            refuse; a draft with fewer is padded with tokens that have the logit 0.

    Raises:
        ValueError: a draft that is more than a plain model or has too many tokens, or a directory
            that does not give the same logits when it is read back.

    Example:
        >>> import tempfile
        >>> from kvlab import lab
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     type(export(KnowledgeDraft.cut(lab.load("lab-target"), "first:2"), folder)).__name__
        'Qwen3ForCausalLM'
    """
    more = isinstance(draft, KnowledgeDraft) and (len(draft.readers) or len(draft.transitions))
    _require(not more, "The draft has cross-attention or transitions, which no other program knows: save it with "
             "save_pretrained, or cut one with knowledge None or 'prefix' and transitions=False.")  # fmt: skip
    model = draft.plain if isinstance(draft, KnowledgeDraft) else draft
    have = model.config.vocab_size
    _require(not vocab_size or have <= vocab_size, f"The draft has {have} tokens, the target {vocab_size}, expected at "
             "least as many: use a draft of the target's family.")  # fmt: skip
    if vocab_size > have:
        model = _padded(model, vocab_size)
    model.save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    again, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype=model.dtype, output_loading_info=True
    )
    again = again.to(model.device)
    odd = {
        name: sorted(told[name])
        for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if told.get(name)
    }
    _require(not odd, f"{folder} does not hold what the model asks for ({odd}): do not use it.")
    ids = torch.arange(min(have, 64), device=model.device)[None]
    with torch.no_grad():
        one, two = model(ids).logits, again(ids).logits
    _require(
        torch.equal(one, two) or torch.allclose(one, two, atol=1e-5),
        f"{folder} gives other logits than the draft.",
    )
    return again.eval()


def _padded(model: PreTrainedModel, vocab_size: int) -> PreTrainedModel:
    have, model = model.config.vocab_size, copy.deepcopy(model)
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[have:] = 0
    return model
