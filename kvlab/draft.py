"""Drafts cut from a target: copies of a few of its layers, which can read an item of a knowledge cache.

A draft is an ordinary causal LM (`draft.plain`). It can read an item of the knowledge cache by
cross-attention after each of its layers. A gate that starts at 0 multiplies the cross-attention, so
an untrained draft equals the truncated target bit for bit ("prefix", below, has no gate). Only the
draft reads knowledge: the decoded text stays the target's.

Three ways to read:

- "vector": keys and values are projected from the target's last hidden states of the item;
- "kv": keys and values are the target's own, un-rotated, of the layer that this layer was cut from;
- "prefix": the same keys and values are the first entries of the draft's own cache (no new
  parameters).

A draft reads only the item's answer. Its entries get the positions of the answer in the draft's own
text, so that the draft finds the next token by position as well as by content.

>>> from kvlab import lab
>>> target = lab.load("lab-target")
>>> draft = KnowledgeDraft.cut(target, "uniform:3", knowledge="kv", transitions=True)
>>> input_ids = torch.arange(8)[None]
>>> draft.config.layers, torch.equal(draft(input_ids).logits, draft.plain(input_ids).logits)
([0, 6, 11], True)
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.llama.modeling_llama import rotate_half

from kvlab.cache import Prefix, from_tensor, select, to_tensor, unrotate
from kvlab.files import read_tensors, write_tensors
from kvlab.generation import Ending, Stop, continuations, end_tokens, process, processors_of
from kvlab.losses import CHUNK, NAMES, acceptance, columns_to_keep, distillation_losses
from kvlab.models import fingerprint, require_supported, rotary_of
from kvlab.training import fit, require_least

KINDS = ("vector", "kv", "prefix")
ANSWERS_PER_FILE = 256
BATCH_SIZE = 32  # of everything except training
GATE_SCALE = 16.0  # AdamW moves a parameter by about its rate per step: too little to open a gate
Layers = str | Sequence[int]


def sample_layers(layers: Layers, depth: int) -> list[int]:
    """Indices of the layers to copy from a model with `depth` layers.

    Args:
        layers: "first:N", "uniform:N" (round(linspace(0, depth - 1, N))), or rising indices.

    Example:
        >>> sample_layers("first:3", 28), sample_layers("uniform:6", 28)
        ([0, 1, 2], [0, 5, 11, 16, 22, 27])
    """
    indices = layers
    if isinstance(layers, str):
        method, _, number = layers.partition(":")
        count = int(number) if number.isdecimal() else 0
        uniform = np.linspace(0, depth - 1, count).round().astype(int).tolist()
        indices = {"first": range(count), "uniform": uniform}.get(method, ())
    indices = list(indices)
    if not indices or indices != sorted({*indices}) or not {*indices} <= {*range(depth)}:
        expected = f"'first:N', 'uniform:N' or rising indices, of at most {depth} layers"
        raise ValueError(f"layers is {layers!r}, expected {expected}.")
    return indices


class Knowledge(NamedTuple):
    """Knowledge for each row of a batch.

    Attributes:
        states: last hidden states of the target ("vector"), (B, S, d), or un-rotated keys and
            values for each of the draft's n layers ("kv", "prefix"), (B, n, 2, H_kv, S, D).
        mask: (B, S), True for entries, False for padding; all False in a row without knowledge.
        start: (B,), the position of the answer in each row's text.
    """

    states: Tensor
    mask: Tensor
    start: Tensor


class KnowledgeDraftConfig(PreTrainedConfig):
    """Configuration of a draft.

    Args:
        text_config: configuration of the plain model.
        layers: indices of the target's layers that were copied.
        knowledge: None, "vector", "kv" or "prefix".
        transitions: whether a residual MLP replaces the layers left out between two copied ones.
    """

    model_type = "knowledge_draft"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012
    layers = ()
    knowledge = None
    transitions = False

    def __init__(self, text_config=None, **options):
        if not options.get("aligned", True):  # an option of earlier versions
            raise ValueError("aligned is False, expected True: train a new draft.")
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        super().__init__(**options)  # sets the others

    @classmethod
    def of(cls, target: PreTrainedConfig, layers: Layers, **options) -> Self:
        """The configuration of a draft of a target with this configuration; options as for `cut`.

        Example:
            >>> from kvlab.scale import config_of
            >>> large = config_of("Qwen/Qwen3-0.6B")
            >>> KnowledgeDraftConfig.of(large, "uniform:6").text_config.num_hidden_layers
            6
        """
        kind = options.get("knowledge")
        if kind not in (None, *KINDS):
            raise ValueError(f"knowledge is {kind!r}, expected None or one of {', '.join(KINDS)}.")
        text_config = copy.deepcopy(target.get_text_config(decoder=True))
        indices = sample_layers(layers, text_config.num_hidden_layers)
        text_config.num_hidden_layers = len(indices)
        if getattr(text_config, "layer_types", None):
            text_config.layer_types = [text_config.layer_types[index] for index in indices]
        return cls(text_config, layers=indices, **options)


class Reader(nn.Module):
    """Cross-attention from hidden states (B, T, d) to knowledge, multiplied by a gate that starts at 0.

    It starts as a copy of the layer's self-attention, whose queries fit these keys. With `projects`
    it also has key and value projections, for knowledge that is hidden states.
    """

    def __init__(self, layer: nn.Module, projects: bool):
        super().__init__()
        attention = layer.self_attn
        self.head_dim = attention.head_dim
        self.gate = nn.Parameter(attention.o_proj.weight.new_zeros(1))
        self.norm = copy.deepcopy(layer.input_layernorm)
        self.query = copy.deepcopy(attention.q_proj)
        self.query_norm = copy.deepcopy(getattr(attention, "q_norm", nn.Identity()))
        self.output = copy.deepcopy(attention.o_proj)
        self.output.bias = None  # a query that attends to nothing adds zero
        if projects:
            self.key = copy.deepcopy(attention.k_proj)
            self.key_norm = copy.deepcopy(getattr(attention, "k_norm", nn.Identity()))
            self.value = copy.deepcopy(attention.v_proj)

    def project(self, states: Tensor) -> Tensor:
        """Keys and values (2, B, H_kv, S, D) of hidden states (B, S, d)."""
        keys = self.key_norm(self._heads(self.key(states)))
        return torch.stack((keys, self._heads(self.value(states)))).transpose(2, 3)

    def forward(self, hidden: Tensor, entries: Tensor, mask: Tensor, rotary) -> Tensor:
        query = self.query_norm(self._heads(self.query(self.norm(hidden))))
        query = _rotate(query.transpose(1, 2), *rotary)  # (B, H, T, D)
        keys, values = entries.to(query.dtype)  # under autocast
        mask = mask[:, None, None]
        read = scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
        return GATE_SCALE * self.gate * self.output(read.transpose(1, 2).flatten(2))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)


class Transition(nn.Module):
    """A residual MLP in place of the layers left out between two copied ones; it starts at 0."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down.starts_at_zero = True

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(gelu(self.up(self.norm(hidden))))


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (..., B, H, T, D) by cosines and sines (B, T, D), as Llama does."""
    cos = cos[:, None].to(states.dtype)
    return states * cos + rotate_half(states) * sin[:, None].to(states.dtype)


class KnowledgeDraft(PreTrainedModel, GenerationMixin):
    """A causal LM of a few of a target's layers that can read knowledge. Make one with `cut`.

    It saves and loads like any model of transformers (`AutoModelForCausalLM` knows it once
    `kvlab.draft` is imported). It drafts in `kvlab.speculate.ModelProposer(draft)` or in
    `target.generate(..., assistant_model=draft)`; `with_knowledge` gives it something to read.
    """

    config_class = KnowledgeDraftConfig
    base_model_prefix = "plain"
    _supports_sdpa = True

    def __init__(self, config: KnowledgeDraftConfig):
        super().__init__(config)
        self.plain = AutoModelForCausalLM.from_config(config.text_config)
        gaps = config.layers[1:] if config.transitions else ()
        self.transitions = nn.ModuleList(Transition(config.text_config) for _ in gaps)
        self.readers = self._copied_attention()
        self._knowledge = None  # keys and values (n, 2, B, H_kv, S, D), and their mask (B, S)
        self.post_init()

    @classmethod
    def cut(
        cls, target: PreTrainedModel, layers: Layers = "first:3", share: bool = False, **options
    ) -> Self:
        """Copy layers, embedding, final norm and head of a target. The target does not change.

        Args:
            layers: "first:N", "uniform:N", or indices.
            share: for training in little memory: embedding and head, most of a draft's parameters,
                are the target's own, frozen, and all else is in float32. Train in the target's
                precision, and `cast` the draft to it afterwards.
            options: knowledge and transitions, see `KnowledgeDraftConfig`.

        Raises:
            ValueError: layers or a way to read that do not exist, or a target that is not a
                Llama-like decoder.
        """
        require_supported(target)
        with torch.device(target.device):
            draft = cls(KnowledgeDraftConfig.of(target.config, layers, **options))
        draft.init_weights()
        if share:
            cast(draft, torch.float32)
            draft.plain.set_input_embeddings(target.get_input_embeddings().requires_grad_(False))
            draft.plain.set_output_embeddings(target.get_output_embeddings().requires_grad_(False))
            draft.to(target.device)
        else:
            cast(draft.to(target.device), target.dtype)
        decoder = target.base_model
        plain = draft.plain.base_model
        for copied, index in zip(plain.layers, draft.config.layers, strict=True):
            copied.load_state_dict(decoder.layers[index].state_dict())
        plain.norm.load_state_dict(decoder.norm.state_dict())
        if not share:
            embedding, head = draft.get_input_embeddings(), draft.get_output_embeddings()
            embedding.load_state_dict(target.get_input_embeddings().state_dict())
            head.load_state_dict(target.get_output_embeddings().state_dict())
        draft.readers = draft._copied_attention()
        draft.generation_config = copy.deepcopy(target.generation_config)
        return draft.eval()

    def _copied_attention(self) -> nn.ModuleList:
        kind = self.config.knowledge
        layers = self.plain.base_model.layers if kind in ("vector", "kv") else ()
        return nn.ModuleList(Reader(layer, projects=kind == "vector") for layer in layers)

    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "starts_at_zero", False):
            nn.init.zeros_(module.weight)
        elif isinstance(module, Reader):
            nn.init.zeros_(module.gate)
        else:
            super()._init_weights(module)

    @property
    def compilable(self) -> bool:
        """Whether `kvlab.speculate.Runner` can compile it: hooks run readers and transitions."""
        return not (len(self.readers) or len(self.transitions))

    def get_output_embeddings(self) -> nn.Module:
        return self.plain.get_output_embeddings()

    # -- reading

    def read(self, store, item) -> Tensor:
        """The `states` of `Knowledge` for an item of a `KnowledgeCache`, without the batch dimension."""
        kind = self.config.knowledge
        if kind is None:
            raise ValueError("This draft does not read: cut one with knowledge='kv', say.")
        if kind == "vector":
            return store.hidden_states(item)[0, item.answer_start :]
        if item.kept:
            raise ValueError("Drafts do not read compressed caches: build a store without.")
        positions = torch.arange(item.answer_start, len(item.input_ids), device=store.model.device)
        cache = select(store.read(item).cache, positions)
        cache = unrotate(cache, positions, rotary_of(store.model))
        return to_tensor(cache)[self.config.layers][:, :, 0]

    def with_knowledge(self, store, items: Sequence, starts: Sequence[int]) -> tuple:
        """A draft that reads an item in each row, and the prefixes that it needs.

        Keys and values are computed here, once. The returned draft shares all weights with this
        one. Without prefixes it also works in `generate`, with as many rows as items. Use it as
        `ModelProposer(*draft.with_knowledge(...))`.

        Args:
            store: the `KnowledgeCache` of the items.
            items: the item of each row, or None for a row without knowledge.
            starts: the position of the answer in each row: the number of prompt tokens.

        Returns:
            The draft, and for "prefix" a `Prefix` (or None) for each row; otherwise None.

        Example:
            >>> import tempfile
            >>> from kvlab import lab
            >>> from kvlab.knowledge import KnowledgeCache
            >>> target, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
            >>> draft = KnowledgeDraft.cut(target, "first:1", knowledge="kv")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     records = [{"question": "Who sings?", "answer": "Ben"}]
            ...     store = KnowledgeCache.build(folder, records, target, tokenizer)
            ...     reader, prefixes = draft.with_knowledge(store, [store.items[0], None], [4, 4])
            >>> reader(torch.arange(8).expand(2, -1)).logits.shape
            torch.Size([2, 8, 1536])
        """
        states = [None if item is None else self.read(store, item) for item in items]
        knowledge = gather(states, starts)
        if knowledge is None:
            return self, None
        with torch.no_grad():
            entries, mask = self._entries(knowledge)
        if self.config.knowledge != "prefix":
            return self._reading(entries, mask), None
        prefixes = []
        for row, count in enumerate(mask.sum(1).tolist()):
            cache = from_tensor(entries[:, :, [row], :, :count])
            prefixes.append(Prefix(cache, next_position=0) if count else None)
        return self, prefixes

    def for_row(self, row: int) -> Self:
        """A draft that reads the knowledge of one row."""
        if self._knowledge is None:
            return self
        entries, mask = self._knowledge
        return self._reading(entries[:, :, [row]], mask[[row]])

    def _reading(self, entries: Tensor, mask: Tensor) -> Self:
        reader = copy.copy(self)
        reader._knowledge = entries, mask
        return reader

    def _entries(self, knowledge: Knowledge) -> tuple[Tensor, Tensor]:
        """Keys and values (n, 2, B, H_kv, S, D), rotated to their positions, and their mask (B, S)."""
        states = knowledge.states.to(self.device, self.dtype)
        mask = knowledge.mask.to(self.device)
        if self.config.knowledge == "vector":
            entries = torch.stack([reader.project(states) for reader in self.readers])
        else:
            entries = states.permute(1, 2, 0, 3, 4, 5)
        positions = knowledge.start.to(self.device)[:, None]
        positions = positions + torch.arange(mask.shape[1], device=self.device)
        rotary = self.plain.base_model.rotary_emb(entries, positions)
        entries = torch.stack((_rotate(entries[:, 0], *rotary), entries[:, 1]), 1)
        if self.config.knowledge != "prefix":  # an entry of zeros: a head can attend to nothing
            entries = pad(entries, (0, 0, 1, 0))
            mask = pad(mask, (1, 0), value=True)
        return entries, mask

    # -- running

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        knowledge=None,
        logits_to_keep=0,
        **options,
    ):
        """As any causal LM. `knowledge` is for training: it is projected in each call."""
        reading = self._knowledge if knowledge is None else self._entries(knowledge)
        if reading is not None and self.config.knowledge == "prefix":
            entries, mask = reading
            reading = None
            options["past_key_values"] = from_tensor(entries)
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=mask.device)[None]
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            attention_mask = torch.cat((mask.to(attention_mask), attention_mask), 1)
        options["logits_to_keep"] = logits_to_keep
        with self._hooks(reading):
            return self.plain(input_ids, attention_mask, position_ids, **options)

    def _hooks(self, reading: tuple[Tensor, Tensor] | None) -> ExitStack:
        """Run readers and transitions after the layers of the plain model, within a `with`."""

        def after(i, layer, args, options, hidden):
            if reading is not None:
                entries, mask = reading
                rotary = options["position_embeddings"]
                hidden = hidden + self.readers[i](hidden, entries[i], mask, rotary)
            if i < len(self.transitions):
                hidden = hidden + self.transitions[i](hidden)
            return hidden

        hooks = ExitStack()
        if reading is not None or len(self.transitions):
            for i, layer in enumerate(self.plain.base_model.layers):
                hook = layer.register_forward_hook(partial(after, i), with_kwargs=True)
                hooks.enter_context(hook)
        return hooks


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the dtype of a model's parameters; `to` would also round the rotary frequencies.

    Example:
        >>> from kvlab import lab
        >>> cast(model := lab.load("lab-draft"), torch.float16)
        >>> model.dtype
        torch.float16
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


AutoConfig.register(KnowledgeDraftConfig.model_type, KnowledgeDraftConfig, exist_ok=True)
AutoModelForCausalLM.register(KnowledgeDraftConfig, KnowledgeDraft, exist_ok=True)


def gather(states: Sequence[Tensor | None], starts: Sequence[int]) -> Knowledge | None:
    """Pad the knowledge of rows (`KnowledgeDraft.read`, or None) to one batch; None if no row has any.

    Example:
        >>> gather([torch.ones(2, 8), None], [4, 5]).mask
        tensor([[ True,  True],
                [False, False]])
    """
    present = [row for row in states if row is not None]
    if not present:
        return None
    longest = max(1, *(row.shape[-2] for row in present))
    padded, lengths = [], []
    for row, _ in zip(states, starts, strict=True):
        row = present[0][..., :0, :] if row is None else row
        lengths.append(row.shape[-2])
        padded.append(pad(row, (0, 0, 0, longest - row.shape[-2])))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return Knowledge(torch.stack(padded), mask, torch.tensor(starts))


# -- training


class DraftExample(NamedTuple):
    """A text to train on.

    Attributes:
        input_ids: (T,), a prompt and its answer.
        start: the position of the answer.
        hidden_states: (T - start, d), the target's last hidden states before each token of its
            answer, from which the head computes its logits; None for an answer that is not the
            target's own.
        knowledge: what `KnowledgeDraft.read` returns, or None.
    """

    input_ids: Tensor
    start: int
    hidden_states: Tensor | None = None
    knowledge: Tensor | None = None


Examples = Sequence[DraftExample]


@torch.no_grad()
def generate_targets(
    target: PreTrainedModel,
    tokenizer,
    prompts: list[list[int]],
    folder=None,
    max_new_tokens=128,
    stop: Stop = (),
) -> list[DraftExample]:
    """Generate the target's greedy answers to prompts (token ids), with its last hidden states.

    Args:
        folder: where answers are kept (a path), in files of 256 named by a hash of target, prompts and
            length. Existing files are read instead. Under a launcher, the processes share the work
            if all can read the folder.
        stop: strings that end an answer, as for `kvlab.speculate.decode`.

    Example:
        >>> from kvlab import lab
        >>> target, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
        >>> prompt = tokenizer("<|user|> Who?<|assistant|>").input_ids
        >>> generate_targets(target, tokenizer, [prompt], max_new_tokens=4)[0].hidden_states.shape
        torch.Size([4, 128])
    """
    ending = Ending.of(target, tokenizer, stop)
    load = partial(_load_or_generate, target, ending, folder, max_new_tokens)
    starts = range(0, len(prompts), ANSWERS_PER_FILE)
    parts = [prompts[start : start + ANSWERS_PER_FILE] for start in starts]
    state = PartialState(cpu=target.device.type == "cpu")
    if folder and state.num_processes > 1:
        for part in parts[state.process_index :: state.num_processes]:
            load(part)
        state.wait_for_everyone()
    examples = []
    for part in parts:
        examples += load(part)
    return examples


def _load_or_generate(target, ending, folder, max_new_tokens, prompts) -> list[DraftExample]:
    """The answers to one file's prompts."""
    run = [fingerprint(target)["weights"], prompts, max_new_tokens, ending.ids, ending.stop]
    settings = target.generation_config.to_diff_dict()
    settings.pop("transformers_version", None)
    run.append({name: repr(value) for name, value in settings.items()})
    digest = hashlib.sha256(json.dumps(run).encode()).hexdigest()[:16]
    path = Path(folder or "") / f"answers-{digest}.safetensors"
    if folder and path.exists():
        tensors = read_tensors(path)
    else:
        answers = continuations(target, ending.tokenizer, prompts, max_new_tokens, stop=ending.stop)
        texts = [
            torch.tensor([*row, *answer]) for row, answer in zip(prompts, answers, strict=True)
        ]
        starts = [len(prompt) for prompt in prompts]
        hidden = []
        for first in range(0, len(texts), BATCH_SIZE):
            rows = pad_sequence(texts[first : first + BATCH_SIZE], batch_first=True)  # on the right
            output = target.base_model(input_ids=rows.to(target.device), use_cache=False)
            for row, states in enumerate(output.last_hidden_state.cpu(), first):
                hidden.append(states[starts[row] - 1 : len(texts[row]) - 1])
        tensors = {"input_ids": torch.cat(texts), "hidden_states": torch.cat(hidden)}
        tensors["lengths"] = torch.tensor([len(text) for text in texts])
        tensors["starts"] = torch.tensor(starts)
        if folder:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, tensors)
    texts = tensors["input_ids"].split(tensors["lengths"].tolist())
    states = tensors["hidden_states"].split((tensors["lengths"] - tensors["starts"]).tolist())
    return list(map(DraftExample, texts, tensors["starts"].tolist(), states))


def item_examples(items: Iterable) -> list[DraftExample]:
    """The stored answers of items (of a store, say), each after its prompt."""
    return [DraftExample(torch.tensor(item.input_ids), item.answer_start) for item in items]


def attach(draft: KnowledgeDraft, store, examples: Examples, items: Sequence) -> list[DraftExample]:
    """Give each example the knowledge of its item (None: none). Each item is read once."""
    states = {None: None}
    attached = []
    for example, item in zip(examples, items, strict=True):
        key = item and item.id
        if key not in states:
            states[key] = draft.read(store, item).cpu()
        attached.append(example._replace(knowledge=states[key]))
    return attached


def corrupt_knowledge(examples: Examples, drop=0.3, swap=0.15, seed=0) -> list[DraftExample]:
    """Drop the knowledge of a fraction of the examples and swap that of another fraction.

    A draft that always reads the right item forgets how to draft without knowledge, and trusts a
    wrong one.

    Example:
        >>> examples = [DraftExample(torch.arange(4), 2, None, torch.ones(2, 8))] * 100
        >>> 20 < sum(example.knowledge is None for example in corrupt_knowledge(examples)) < 40
        True
    """
    rng = np.random.default_rng(seed)
    others = rng.permutation(len(examples))
    corrupted = list(examples)
    for i, u in enumerate(rng.random(len(examples))):
        if u < drop:
            corrupted[i] = examples[i]._replace(knowledge=None)
        elif u < drop + swap:
            corrupted[i] = examples[i]._replace(knowledge=examples[others[i]].knowledge)
    return corrupted


def pad_draft_examples(examples: Examples, hidden_size: int) -> dict:
    """A batch, padded on the right.

    Returns:
        input_ids, weights (1 for answer tokens) and distill_weights (1 for the target's own answer
        tokens), all (B, T); hidden_states (B, T, d); knowledge (`Knowledge`) if an example has it.
    """
    input_ids = pad_sequence([example.input_ids for example in examples], batch_first=True)
    weights = torch.zeros(input_ids.shape)
    distill_weights = torch.zeros(input_ids.shape)
    hidden = torch.zeros(*input_ids.shape, hidden_size)
    for row, example in enumerate(examples):
        answer = slice(example.start, len(example.input_ids))
        weights[row, answer] = 1
        if example.hidden_states is not None:
            distill_weights[row, answer] = 1
            hidden[row, answer.start - 1 : answer.stop - 1] = example.hidden_states
    batch = {"input_ids": input_ids, "weights": weights}
    batch |= {"distill_weights": distill_weights, "hidden_states": hidden}
    knowledge = gather([e.knowledge for e in examples], [e.start for e in examples])
    return batch | {"knowledge": knowledge} if knowledge else batch


def _logits(draft: nn.Module, batch: Mapping, last: int) -> Tensor:
    """Logits of the last columns of a batch."""
    options = {"knowledge": batch["knowledge"]} if "knowledge" in batch else {}
    options |= {"use_cache": False, "logits_to_keep": last}
    return draft(input_ids=batch["input_ids"], **options).logits


class Acceptance(NamedTuple):
    """The fraction of accepted tokens of each text whose answer has two tokens or more.

    `greedy`: with greedy decoding; `sampled`: at temperature 1, the mean of alpha.
    """

    greedy: np.ndarray
    sampled: np.ndarray


@torch.inference_mode()
def measure_acceptance(draft: nn.Module, target: PreTrainedModel, examples: Examples) -> Acceptance:
    """The fraction of the tokens of the target's own answers that a draft would have had accepted.

    The draft guesses every token after the target's own tokens, in one call per batch. Speculative
    decoding guesses the same tokens, except for the free token after each round. The first token of
    an answer does not count: the target computes it when it reads the prompt.
    """
    _require_targets(examples)
    head = target.get_output_embeddings()
    longest = max(len(example.input_ids) for example in examples)
    size = min(BATCH_SIZE, max(1, 4 * CHUNK // (longest * target.config.vocab_size)))
    greedy, sampled = [], []
    for first in range(0, len(examples), size):
        group = examples[first : first + size]
        batch = pad_draft_examples(group, target.config.hidden_size)
        last = columns_to_keep(batch["weights"])
        skipped = batch["input_ids"].shape[1] - last  # columns without logits
        logits = _logits(draft, send_to_device(batch, draft.device), last)
        for row, example in enumerate(group):  # a vocabulary can be large: one text at a time
            q = logits[row, example.start - skipped : len(example.input_ids) - 1 - skipped]
            if len(q):
                p = head(example.hidden_states[1:].to(target.device, target.dtype)).to(q.device)
                p, q = _process_as_decoded(target, example, p, q)
                greedy.append((p.argmax(-1) == q.argmax(-1)).float().mean().item())
                alpha = acceptance(q.float().log_softmax(-1), p.float().log_softmax(-1))
                sampled.append(alpha.mean().item())
    return Acceptance(np.array(greedy), np.array(sampled))


def _process_as_decoded(
    target: PreTrainedModel, example: DraftExample, *logits: Tensor
) -> Iterator[Tensor]:
    """Logits (k, V) of the last k tokens of an example, as the generation config changes them."""
    prompt, text = example.input_ids[: example.start].tolist(), example.input_ids[:-1].tolist()
    ending = Ending(end_tokens(target))
    processors = processors_of(target, prompt, ending, len(example.input_ids) - len(prompt))
    size = target.config.get_text_config(decoder=True).vocab_size
    for rows in logits:
        yield process(rows[None].float(), [text], [processors], size)[0] if processors else rows


def _require_targets(examples: Examples) -> None:
    own = sum(example.hidden_states is not None for example in examples)
    guessed = sum(len(example.input_ids) - example.start > 1 for example in examples)
    if own < len(examples) or not guessed:
        counts = f"Of {len(examples)} answers {own} are the target's own, {guessed} have two tokens"
        raise ValueError(f"{counts} or more; expected all and some: use `generate_targets`.")


def default_loss_weights(knowledge: str | None, stored_answers: bool) -> dict[str, float]:
    """The loss weights of the systems that this draft follows.

    Args:
        knowledge: how the draft reads.
        stored_answers: whether some answers are not the target's own; these need "ce".

    Example:
        >>> default_loss_weights("kv", stored_answers=True)
        {'ce': 1.0, 'kl': 0.8, 'tv': 0.3}
    """
    weights = {"kl": 0.8 if knowledge == "kv" else 0.5, "tv": 0.3}
    return {"ce": 1.0} | weights if stored_answers or knowledge != "kv" else weights


@dataclass(frozen=True)
class DraftSettings:
    """How a draft is trained.

    Args:
        loss_weights: Weight of each loss (`kvlab.losses.distillation_losses`); by default those of
            `default_loss_weights`.
        epochs: Passes over all examples.
        batch_size: Examples per batch.
        learning_rate: Of AdamW.
        accumulate: Batches per optimizer step.
        precision: Precision of the arithmetic; weights are trained in float32.
        seed: Random seed (shuffling).
        every: Optimizer steps between checks on held-out answers; 0 is an epoch.
        folder: Where checkpoint.safetensors, from which a stopped run goes on, and best.safetensors
            are kept. Use one folder per run: it is not checked that examples and losses are the
            same.
    """

    loss_weights: Mapping[str, float] | None = None
    epochs: int = 5
    batch_size: int = 8
    learning_rate: float = 3e-5
    accumulate: int = 1
    precision: Literal["no", "fp16", "bf16"] = "no"
    seed: int = 0
    every: int = 0
    folder: str | Path | None = None

    def __post_init__(self):
        require_least(self, epochs=1, batch_size=1, accumulate=1, learning_rate=0, every=0)
        for name, weight in (self.loss_weights or {}).items():
            if not weight >= 0:
                raise ValueError(f"The weight of {name} is {weight}, expected 0 or more.")


def train_draft(
    draft: KnowledgeDraft, target: PreTrainedModel, examples: Examples, heldout: Examples, **options
) -> list[dict[str, float]]:
    """Train a draft, and leave it with the checked weights that did best on `heldout`.

    Args:
        examples: the target's own answers (`generate_targets`) and stored ones (`item_examples`),
            with knowledge (`attach`).
        heldout: the target's own answers to other questions. Their greedy acceptance decides which
            weights are kept.
        **options: of `DraftSettings`.

    Returns:
        The history of `fit`, with "acceptance" where it was checked.
    """
    settings = DraftSettings(**options)
    targets_only = all(example.hidden_states is not None for example in examples)
    defaults = default_loss_weights(draft.config.knowledge, not targets_only)
    weights = settings.loss_weights or defaults
    if "ce" not in weights and not targets_only:
        raise ValueError("Some answers are not the target's own: give 'ce' a loss weight.")
    steps = settings.epochs * (len(examples) // settings.batch_size) // settings.accumulate
    _require_targets(heldout)
    state = PartialState(cpu=target.device.type == "cpu")  # before `fit`, which would take a GPU
    if state.num_processes > 1 and not settings.folder:
        raise ValueError("Several processes train this draft: give a folder that all can read.")

    def evaluate(model: KnowledgeDraft) -> dict[str, float]:
        score = float(measure_acceptance(model, target, heldout).greedy.mean())
        if state.is_main_process:
            _keep_best(model, score, best)
        return {"acceptance": score}

    states = next((e.knowledge for e in examples if e.knowledge is not None), None)
    rows = list(examples)
    for i, example in enumerate(examples):
        if example.knowledge is None and states is not None:
            rows[i] = example._replace(knowledge=states[..., :0, :])  # processes run the same
    collate = partial(pad_draft_examples, hidden_size=target.config.hidden_size)
    loader = DataLoader(rows, settings.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    with TemporaryDirectory() as scratch:
        folder = Path(settings.folder or scratch)
        best = folder / "best.safetensors"
        checkpoint = folder / "checkpoint.safetensors"
        if state.is_main_process and not checkpoint.exists():
            best.unlink(missing_ok=True)  # of a run that is not resumed
        losses = partial(_draft_losses, target, weights)
        options = {"learning_rate": settings.learning_rate, "precision": settings.precision}
        options |= {"accumulate": settings.accumulate, "seed": settings.seed, "steps": steps}
        options |= {"every": settings.every or max(1, steps // settings.epochs)}
        options |= {"warmup": max(1, steps // 20), "checkpoint": checkpoint}
        history = fit(draft, loader, losses, weight=_token_counts, evaluate=evaluate, **options)
        state.wait_for_everyone()
        draft.load_state_dict(read_tensors(best), strict=False)  # a tied weight has one name
    return history


def _draft_losses(target, loss_weights, model, batch) -> dict[str, Tensor]:
    last = columns_to_keep(batch["weights"])
    with torch.no_grad():
        states = batch["hidden_states"][:, -last:].to(target.dtype)
        target_logits = target.get_output_embeddings()(states)
    inputs = [batch[name][:, -last:] for name in ("input_ids", "weights", "distill_weights")]
    return distillation_losses(loss_weights, _logits(model, batch, last), target_logits, *inputs)


def _token_counts(batch) -> dict[str, Tensor]:
    """The weight of a batch in each loss; "ce" is the first, which goes into the history."""
    return dict.fromkeys(NAMES, batch["distill_weights"].sum()) | {"ce": batch["weights"].sum()}


def _keep_best(draft: KnowledgeDraft, score: float, path: Path) -> None:
    """Write the weights if they score higher than those in the file."""
    if path.exists():
        with safe_open(path, "pt") as file:
            if score <= float(file.metadata()["acceptance"]):
                return
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach() for name, p in draft.named_parameters() if p.requires_grad}
    write_tensors(path, weights, {"acceptance": repr(score)})


def train_and_measure(
    draft: KnowledgeDraft, target: PreTrainedModel, examples: Examples, heldout: Examples, **options
) -> tuple[list[dict[str, float]], dict[str, Acceptance]]:
    """Train a draft, and measure it before, after, and after but without knowledge (the control).

    Args:
        **options: of `train_draft`.

    Returns:
        The history, and the acceptance on `heldout` of each arm.
    """
    without = [example._replace(knowledge=None) for example in heldout]
    arms = {"truncated": measure_acceptance(draft, target, without)}
    history = train_draft(draft, target, examples, heldout, **options)
    cast(draft, target.dtype)  # as it is saved
    arms["trained"] = measure_acceptance(draft, target, heldout)
    if draft.config.knowledge:
        arms["trained, without knowledge"] = measure_acceptance(draft, target, without)
    return history, arms


# -- giving away


@torch.no_grad()
def export(draft: PreTrainedModel, folder: str | Path, tokenizer, vocab_size: int = 0) -> None:
    """Write a draft as a plain model directory for transformers and vLLM, and check it.

    Args:
        draft: a KnowledgeDraft without cross-attention and transitions, or any causal LM.
        vocab_size: the target's. Models of one family can have different sizes, which transformers
            and vLLM refuse; tokens that the draft lacks are added with logit 0.

    Raises:
        ValueError: a draft that is more than a plain model or has too many tokens, or a directory
            whose model has other weights or logits.

    Example:
        >>> import tempfile
        >>> from kvlab import lab
        >>> draft = KnowledgeDraft.cut(lab.load("lab-target"), "first:2")
        >>> tokenizer = lab.load_tokenizer("lab-target")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(draft, folder, tokenizer)
        ...     type(AutoModelForCausalLM.from_pretrained(folder)).__name__
        'Qwen3ForCausalLM'
    """
    model = draft
    if isinstance(draft, KnowledgeDraft):
        if not draft.compilable:
            raise ValueError("Cross-attention and transitions are kvlab's: use save_pretrained.")
        model = draft.plain
    size = model.config.vocab_size
    if 0 < vocab_size < size:
        raise ValueError(f"The draft has {size} tokens, the target {vocab_size}: use its family.")
    if vocab_size > size:
        model = copy.deepcopy(model)
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
        model.get_input_embeddings().weight[size:] = 0
        model.get_output_embeddings().weight[size:] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options = {"dtype": model.dtype, "output_loading_info": True}
    plain, loading = AutoModelForCausalLM.from_pretrained(folder, **options)
    if loading["missing_keys"] or loading["unexpected_keys"] or loading["mismatched_keys"]:
        raise ValueError(f"{folder} does not hold the model's weights: do not use it.")
    plain.to(model.device)
    input_ids = torch.arange(min(size, 64), device=model.device)[None]
    if not torch.allclose(model(input_ids).logits, plain(input_ids).logits, atol=1e-5):
        raise ValueError(f"{folder} gives other logits than the draft: do not use it.")
