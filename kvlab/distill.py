"""KV-Distill: learn which tokens of a context to keep, and what to write into their entries.

`KVDistiller` (Chari and Van Durme 2025, arXiv 2503.10337) compresses a context to a small cache,
from which the unchanged model continues. `train_distiller` trains it; `compression_scores` compares
it with the scores of `kvlab.compress` on questions about compressed contexts.
"""

import copy
import importlib
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvlab import cache as kv
from kvlab.cache import Prefix, prefill
from kvlab.compress import (
    AWARE,
    METHODS,
    REPEATED,
    Repeat,
    Score,
    attention_matching,
    choose_entries,
    compact,
    count_kept,
    evict,
    expected_attention,
    keep_entries,
    kvzip,
    repeat_texts,
    score_entries,
)
from kvlab.evaluate import exact_match, exponential, f1, figure, log_likelihoods, rouge_l
from kvlab.files import naming, read_json, read_tensors, write_tensors, write_text
from kvlab.generation import Stop, answer_text, encode_parts
from kvlab.losses import distillation_losses
from kvlab.models import (
    differences,
    fingerprint,
    first_layers,
    position_limit,
    require_supported,
    rotary_of,
)
from kvlab.ragged import RaggedLayer, bias_of, is_ragged
from kvlab.records import Record
from kvlab.training import fit, require_least

GATES = ("multiply", "none")
ROUTINGS = ("conditional", "all", "embedding")
SCORER_FILE, SETTINGS_FILE = "scorer.safetensors", "kvdistill.json"
RENAMED_SETTINGS = {"width": "scorer_hidden_size", "row": "chunk_size"}  # in older files
SQUAD_V2 = {"HasAns_exact": "exact_match", "HasAns_f1": "f1"}  # as in `kvlab.evaluate.squad_v2`
SQUAD_V2 |= {"NoAns_exact": "exact_match", "NoAns_f1": "f1"}
UNITS = dict.fromkeys(("exact_match", "f1", *SQUAD_V2, "accuracy", "rouge_l"), "fraction")
UNITS |= {"perplexity": "per token", "MB": "MB"}


@dataclass(frozen=True)
class DistillSettings:
    """The shape of a `KVDistiller`. What the paper does not state is marked (ours).

    Args:
        layer: eta; tokens are scored by the hidden states after this layer. Paper: 6 of 32.
        rank: of the adapters, rank-stabilized LoRA on q, k, v and o. alpha is the rank (ours).
        scorer_hidden_size: width of the scorer's hidden layer (ours).
        gate: "multiply": the attention logits of kept entries are multiplied by sigma(s), that is,
            their keys are. "none": they are not, and the scorer cannot learn.
        standardize: bring the scores of each context to mean 2 and deviation 1 (ours). Free scores
            can grow until all gates of kept tokens are open, and then the scorer gets no gradient.
            The price: even with retention 1 the cache is not quite the plain one.
        routing: "conditional", as in the paper: the adapters of q and o act on kept tokens only;
            "all": on every token; "embedding": on every token, and a learned vector marks kept
            tokens.
        sinks: number of first tokens that are always kept. Paper: fewer than ten.
        chunk_size: longer contexts are read in chunks of this many tokens, which do not attend to
            each other.
    """

    layer: int
    rank: int = 128
    scorer_hidden_size: int = 1024
    gate: Literal[GATES] = "multiply"
    standardize: bool = False
    routing: Literal[ROUTINGS] = "conditional"
    sinks: int = 4
    chunk_size: int = 1536

    def __post_init__(self):
        require_least(self, rank=1, scorer_hidden_size=1, sinks=0, chunk_size=1)
        if self.gate not in GATES:
            raise ValueError(f"gate is {self.gate!r}, expected one of {', '.join(GATES)}.")
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing is {self.routing!r}, expected one of {', '.join(ROUTINGS)}.")


class Scorer(nn.Module):
    """s = FFN(h), one number per token, from hidden states (..., d); near 3 at the start."""

    def __init__(self, hidden_size: int, scorer_hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.up = nn.Linear(hidden_size, scorer_hidden_size)
        self.down = nn.Linear(scorer_hidden_size, 1)
        nn.init.constant_(self.down.bias, 3.0)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.norm(hidden_states.to(self.up.weight.dtype))
        return self.down(F.gelu(self.up(hidden_states)))[..., 0]


class KVDistiller(nn.Module):
    """Choose the tokens of a context to keep, and write what the others say into their entries.

    First pass: the frozen model up to layer eta, and a scorer on its hidden states; the k best
    tokens are kept, the same in all layers. Second pass: the whole context through the model with
    adapters. Kept keys are scaled by sigma(s). The unchanged model continues from the kept entries.
    Source: Chari and Van Durme (2025), arXiv 2503.10337, section 3.

    The given model is frozen and not changed: `adapted` is a PEFT model with modules of its own,
    which share the model's weights. Adapters and scorer are trained, in float32.

    Args:
        model: a Llama-like decoder.
        layer: see `DistillSettings`. Default: the fraction of the paper, 6 of 32 layers.
        settings: of `DistillSettings`.

    Example:
        >>> from kvlab import lab
        >>> distiller = KVDistiller(lab.load("lab-target"), rank=8)
        >>> prefix = distiller.compress(torch.arange(10, 30)[None], retention=0.25)
        >>> prefix.positions.shape, prefix.next_position
        (torch.Size([1, 5]), 20)
    """

    def __init__(self, model: PreTrainedModel, layer: int | None = None, **settings):
        super().__init__()
        require_supported(model)
        config = model.config.get_text_config(decoder=True)
        depth = config.num_hidden_layers
        if layer is None:
            layer = max(1, round(depth * 6 / 32))
        first_layers(model, layer)  # refuses a layer that the model does not have
        self.settings = DistillSettings(layer, **settings)
        self.model = model.requires_grad_(False)
        rank = self.settings.rank
        lora = {"r": rank, "lora_alpha": rank, "use_rslora": True, "task_type": "CAUSAL_LM"}
        lora["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
        # No key or value comes after q and o of the last layer.
        lora["exclude_modules"] = rf".*\.{depth - 1}\.self_attn\.[qo]_proj"
        weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of PEFT
            self.adapted = get_peft_model(copy.deepcopy(model, weights), LoraConfig(**lora))
        self.scorer = Scorer(config.hidden_size, self.settings.scorer_hidden_size)
        self.scorer.requires_grad_(self.settings.gate != "none")
        self.marker = None
        if self.settings.routing == "embedding":
            self.marker = nn.Parameter(torch.zeros(config.hidden_size))
        self.to(model.device)

    def scores(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """s of each token, (B, T), from ids padded on the left; gradients reach the scorer only."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        decoder = first_layers(self.model, self.settings.layer).base_model
        decoder._modules = {**decoder._modules, "norm": nn.Identity()}  # states before any norm
        inputs = _chunked_inputs(input_ids, mask, self.settings.chunk_size)
        with torch.no_grad():
            states = decoder(**inputs, use_cache=False).last_hidden_state
        scores = self.scorer(states).reshape(len(input_ids), -1)[:, -input_ids.shape[1] :]
        return _standardize(scores, mask) if self.settings.standardize else scores

    def keep(self, input_ids: Tensor, attention_mask: Tensor, counts: Sequence[int]) -> Prefix:
        """Compress several contexts; gradients reach everything that is trained.

        Args:
            input_ids: (B, T), padded on the left.
            attention_mask: (B, T), 0 for padding.
            counts: number of entries to keep, for each of the B contexts.

        Returns:
            A cache of k = max(counts) entries per row; `attention_mask`, (B, k), is 0 for those
            that a row with a smaller count does not keep.
        """
        scores = self.scores(input_ids, attention_mask)
        positions = _positions(attention_mask)
        ranked = scores.detach().masked_fill(positions < self.settings.sinks, float("inf"))
        ranked = ranked.masked_fill(attention_mask == 0, float("-inf"))
        order = ranked.argsort(dim=1, descending=True, stable=True)  # of equal scores the first
        ranks = order.argsort(1)
        kept = ranks < torch.tensor(counts, device=ranks.device)[:, None]  # (B, T)
        columns = kept.int().argsort(dim=1, stable=True)[:, -max(counts) :]  # (B, k), in order
        cache = kv.select(self._encode(input_ids, attention_mask, kept), columns)
        if self.settings.gate == "multiply":
            cache = kv.scale_keys(cache, scores.gather(1, columns).sigmoid())
        positions = positions.gather(1, columns)
        mask = kept.gather(1, columns).long()
        fields = {"positions": positions, "attention_mask": mask, "rotary": rotary_of(self.model)}
        return Prefix(cache, attention_mask.sum(1), **fields)

    def _encode(self, input_ids: Tensor, mask: Tensor, kept: Tensor) -> DynamicCache:
        """Keys and values of contexts by the adapted model, with kept tokens (B, T) routed."""
        size = self.settings.chunk_size
        inputs = _chunked_inputs(input_ids, mask, size)
        tokens = _chunks(kept, size)
        if self.marker is not None:
            embeddings = self.model.get_input_embeddings()(inputs.pop("input_ids"))
            marks = tokens[..., None] * self.marker
            inputs["inputs_embeds"] = embeddings + marks.to(embeddings.dtype)
        if self.settings.routing != "conditional":
            tokens = torch.ones_like(tokens)
        with routed(self.adapted, tokens):
            decoder = self.adapted.get_base_model().base_model
            cache = decoder(**inputs, use_cache=True).past_key_values
        return self._joined(cache, *input_ids.shape)

    def _joined(self, cache: DynamicCache, rows: int, total: int) -> DynamicCache:
        """Join the chunks of contexts that were read side by side."""
        if total <= self.settings.chunk_size:
            return cache
        layers = kv.to_tensor(cache).unflatten(2, (rows, -1))  # (L, 2, B, chunks, H_kv, size, D)
        return kv.from_tensor(layers.movedim(3, 4).flatten(4, 5)[..., -total:, :])

    @torch.no_grad()
    def compress(
        self, input_ids: Tensor, *, retention: float | None = None, budget: int | None = None
    ) -> Prefix:
        """Compress one context, (1, T), to a fraction of its entries or to a number of them.

        Kept keys have their gates in them and keep their positions: the model needs nothing else.
        If the context is longer than the positions of the model, kept entries are moved to
        positions 0 to k - 1, as by `kvlab.compress.compact`. This is exact within chunks, which do
        not attend to each other; gaps between kept entries are closed.
        """
        if input_ids.ndim != 2 or len(input_ids) != 1 or not input_ids.numel():
            raise ValueError(f"input_ids is {tuple(input_ids.shape)}, expected (1, T), one text.")
        total, limit = input_ids.shape[1], position_limit(self.model)
        count = count_kept(total, retention, budget)
        needed = max(count, min(total, self.settings.chunk_size))
        if needed > limit:
            sizes = f"{needed} tokens or entries at once, the model reads up to {limit}"
            raise ValueError(f"{sizes}: give a smaller chunk_size or budget.")
        prefix = self._kept(input_ids, count)
        return compact(prefix) if total > limit else prefix

    def _kept(self, input_ids: Tensor, count: int) -> Prefix:
        """`keep` for one context, without a mask."""
        prefix = self.keep(input_ids, torch.ones_like(input_ids), [count])
        ids, total = input_ids[0].tolist(), input_ids.shape[1]
        return replace(prefix, next_position=total, input_ids=ids, attention_mask=None)

    def forward(
        self, context: Tensor, context_mask: Tensor, text: Tensor, retention: float
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, S, V) of the model on texts, given the compressed and given the full contexts.

        Args:
            context: (B, T), padded on the left.
            context_mask: (B, T), 0 for padding.
            text: (B, S), padded on the right with any token.
            retention: fraction of each context's tokens to keep.
        """
        self.model.eval()  # whatever the mode of the rest: it never uses dropout
        counts = [count_kept(tokens, retention) for tokens in context_mask.sum(1).tolist()]
        logits = self.read_on(self.keep(context, context_mask, counts), text)
        with torch.no_grad():
            full = prefill(self.model, context, attention_mask=context_mask)
            return logits, self.read_on(full, text)

    def read_on(self, prefix: Prefix, text: Tensor) -> Tensor:
        """Logits (B, S, V) of the frozen model on texts (B, S) after caches with a mask."""
        steps = torch.arange(text.shape[1], device=text.device)
        mask = torch.cat([prefix.attention_mask, torch.ones_like(text)], 1)
        position_ids = prefix.next_position[:, None] + steps
        past = kv.truncate(prefix.cache, kv.length(prefix.cache))  # it will be appended to
        inputs = {"attention_mask": mask, "position_ids": position_ids, "past_key_values": past}
        return self.model(text, **inputs, use_cache=True).logits

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write a PEFT adapter, the scorer, and the settings with the model's fingerprint."""
        folder = Path(folder)
        adapter = self.adapted.peft_config["default"]
        name = adapter.base_model_name_or_path or ""
        if Path(name).is_dir():
            adapter.base_model_name_or_path = Path(name).name  # no path of this machine
        self.adapted.save_pretrained(folder, save_embedding_layers=False)  # True would ask the hub
        (folder / "README.md").unlink(missing_ok=True)  # an empty form with the model's path
        names = ("scorer.", "marker")
        trained = {name: p for name, p in self.named_parameters() if name.startswith(names)}
        write_tensors(folder / SCORER_FILE, trained, {"format": "pt"})
        about = {"version": 1, "kind": type(self).__name__, "settings": asdict(self.settings)}
        about["model"] = fingerprint(self.model)
        write_text(folder / SETTINGS_FILE, json.dumps(about, indent=1) + "\n")
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: PreTrainedModel) -> "KVDistiller":
        """Load what `save_pretrained` wrote, around the model it was trained for.

        Raises:
            ValueError: a model of another shape. Other weights give a warning.
        """
        folder = Path(folder)
        about = read_json(folder / SETTINGS_FILE)
        with naming(folder / SETTINGS_FILE):
            settings, trained_model = about["settings"].items(), about["model"]
            trained_for = trained_model["weights"]
        current = fingerprint(model)
        weights = current.pop("weights")
        if unlike := differences(trained_model, current):
            raise ValueError(f"{folder} was trained for another model ({unlike}): load that one.")
        if trained_for["dtype"] == weights["dtype"] and trained_for != weights:
            warning = f"{folder} was trained for other weights of this model: expect worse answers."
            warnings.warn(warning, stacklevel=2)
        kind = FreeDistiller if about.get("kind") == "FreeDistiller" else cls
        distiller = kind(model, **{RENAMED_SETTINGS.get(name, name): v for name, v in settings})
        distiller.adapted.load_adapter(str(folder), "default", torch_device=str(model.device))
        distiller.load_state_dict(read_tensors(folder / SCORER_FILE), strict=False)
        return distiller


class HeadScorer(nn.Module):
    """Scores (L, B, H_kv, T) from the hidden states that enter each layer, (L, B, T, d)."""

    def __init__(self, layers: int, hidden_size: int, scorer_hidden_size: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)
        up = torch.randn(layers, hidden_size, scorer_hidden_size) / hidden_size**0.5
        self.up, self.up_bias = (
            nn.Parameter(up),
            nn.Parameter(torch.zeros(layers, 1, 1, up.shape[2])),
        )
        self.down = nn.Parameter(torch.zeros(layers, scorer_hidden_size, heads))
        self.down_bias = nn.Parameter(torch.zeros(layers, 1, 1, heads))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.norm(hidden_states.to(self.up.dtype))
        x = F.gelu(x @ self.up[:, None] + self.up_bias)
        return (x @ self.down[:, None] + self.down_bias).mT


class FreeDistiller(KVDistiller):
    """KV-Distill with scores of its own for each layer and head, and one budget over all of them.

    One pass of the adapted model makes the entries and, from the hidden states that enter each
    layer, their scores. The scores learn those of KVzip first (`fit_scores`, as in KVzap, arXiv
    2601.07891), then the adapters learn to write (`train_distiller`). The cache is ragged
    (`kvlab.ragged`).

    Args:
        model: a Llama-like decoder.
        settings: rank, scorer_hidden_size, sinks and chunk_size of `DistillSettings`.

    Example:
        >>> from kvlab import lab
        >>> distiller = FreeDistiller(lab.load("lab-target"), rank=8, scorer_hidden_size=16)
        >>> prefix = distiller.compress(torch.arange(10, 30)[None], retention=0.25)
        >>> (prefix.positions >= 0).sum(), prefix.next_position
        (tensor(120), 20)
    """

    def __init__(self, model: PreTrainedModel, layer: int | None = None, **settings):
        super().__init__(model, layer, **settings | {"gate": "none", "routing": "all"})
        config = model.config.get_text_config(decoder=True)
        sizes = config.hidden_size, self.settings.scorer_hidden_size, config.num_key_value_heads
        self.scorer = HeadScorer(config.num_hidden_layers, *sizes).to(model.device)

    def score(self, input_ids: Tensor, mask: Tensor) -> tuple[DynamicCache, Tensor]:
        """The entries of contexts, padded on the left, and their scores (L, B, H_kv, T)."""
        inputs = _chunked_inputs(input_ids, mask, self.settings.chunk_size)
        decoder = self.adapted.get_base_model().base_model
        output = decoder(**inputs, use_cache=True, output_hidden_states=True)
        states = torch.stack(output.hidden_states[:-1])  # (L, rows * chunks, size, d)
        rows, total = input_ids.shape
        states = states.unflatten(1, (rows, -1)).flatten(2, 3)[:, :, -total:]
        return self._joined(output.past_key_values, rows, total), self.scorer(states.detach())

    def keep(self, input_ids: Tensor, attention_mask: Tensor, counts: Sequence[int]) -> Prefix:
        """As `KVDistiller.keep`, except that entries are hidden, by a bias, rather than removed."""
        cache, scores = self.score(input_ids, attention_mask)
        positions = _positions(attention_mask)
        always = (positions < self.settings.sinks)[:, None]
        ranked = scores.detach().masked_fill(always, torch.inf)
        ranked = ranked.masked_fill((attention_mask == 0)[:, None], -torch.inf)
        rows = zip(ranked.split(1, 1), counts, strict=True)
        kept = torch.cat([choose_entries(row, count, "model") for row, count in rows], 1)
        layers = []
        for layer, keep in zip(cache.layers, kept, strict=True):
            bias = torch.zeros_like(layer.keys[..., 0]).masked_fill(~keep, -torch.inf)
            layers.append(RaggedLayer(layer.keys, layer.values, bias))
        fields = {"positions": positions, "rotary": rotary_of(self.model)}
        fields["attention_mask"] = attention_mask  # if nothing is hidden, the cache is ordinary
        return Prefix(kv.from_ragged(layers), attention_mask.sum(1), **fields)

    def _kept(self, input_ids: Tensor, count: int) -> Prefix:
        """What is kept of one context, in memory of its own."""
        prefix = self.keep(input_ids, torch.ones_like(input_ids), [count])
        kept = torch.stack([bias_of(layer) == 0 for layer in prefix.cache.layers])
        return keep_entries(self.model, input_ids, prefix.cache, kept)

    def forward(self, context: Tensor, context_mask: Tensor, text=None, retention=1.0):
        """As `KVDistiller.forward`; without a text the scores, which `fit_scores` fits."""
        if text is None:
            return self.score(context, context_mask)[1]
        return super().forward(context, context_mask, text, retention)

    def read_on(self, prefix: Prefix, text: Tensor) -> Tensor:
        if not is_ragged(prefix.cache):
            return super().read_on(prefix, text)
        steps = torch.arange(text.shape[1], device=text.device)
        position_ids = prefix.next_position[:, None] + steps
        return kv.read(self.model, text, prefix.cache, position_ids=position_ids).logits


class ScoreDataset(Dataset):
    """Contexts with the logarithm of their scores by `kvzip`: (T,) and (L, H_kv, T).

    Args:
        model: scores the contexts, when they are read for the first time.
        tokenizer: of the model.
        contexts: texts.
        sinks: as in `kvzip`.
    """

    def __init__(self, model, tokenizer, contexts: Sequence[str], sinks: int = 4):
        self.model, self.tokenizer, self.contexts = model, tokenizer, contexts
        self.score = partial(kvzip, sinks=sinks)
        self.scored: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.contexts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self.scored:
            ids = encode_turns(self.tokenizer, self.contexts[index], [("", "")]).context[None]
            ids = ids.to(self.model.device)
            texts = repeat_texts(self.tokenizer, ids)
            scores, _ = score_entries(self.model, ids, self.score, ids.shape[1], repeat=texts)
            self.scored[index] = ids[0].cpu(), (scores[:, 0].cpu() + 1e-4).log().clamp(max=0.0)
        return self.scored[index]


def fit_scores(
    distiller: FreeDistiller, examples: ScoreDataset, *, steps: int, batch_size: int = 32, **options
) -> list[dict[str, float]]:
    """Fit the scorer of a distiller to scores that take more readings, by least squares.

    Args:
        distiller: its scorer is changed in place.
        examples: contexts with scores.
        steps: optimizer steps.
        batch_size: contexts per batch.
        options: of `kvlab.training.fit`.
    """

    def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        contexts, scores = zip(*rows, strict=True)
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        ids = pad(contexts, padding_value=-1)
        targets = pad([score.movedim(-1, 0) for score in scores])  # (B, T, L, H_kv)
        return {"context": ids.clamp(min=0), "mask": (ids >= 0).long(), "scores": targets}

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scores = model(batch["context"], batch["mask"]).permute(1, 3, 0, 2)
        errors = (scores - batch["scores"]).square().mean((2, 3))
        return {"squared_error": (errors * batch["mask"]).sum() / batch["mask"].sum()}

    def count_tokens(batch: Mapping[str, Tensor]) -> Tensor:
        return batch["mask"].sum()

    PartialState(cpu=distiller.model.device.type == "cpu")  # else `fit` takes the best device
    loader = DataLoader(examples, batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    defaults = {"learning_rate": 3e-3, "weight_decay": 0.0, "warmup": max(1, steps // 20)}
    trained = [p for p in distiller.adapted.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        return fit(
            distiller, loader, losses, weight=count_tokens, steps=steps, **defaults | options
        )
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _standardize(scores: Tensor, mask: Tensor) -> Tensor:
    """Bring the scores (B, T) of each context to mean 2 and deviation 1; equal scores to 2."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(mask == 0, 0)
    count = mask.sum(1, keepdim=True)
    centered = (wide - wide.sum(1, keepdim=True) / count).masked_fill(mask == 0, 0)
    variance = centered.square().sum(1, keepdim=True) / count
    return 2.0 + centered / (variance + 1e-6).sqrt()


@contextmanager
def routed(adapted: PeftModel, tokens: Tensor):
    """Let the adapters of q and o act on some tokens, (B, T), only.

    The input of the adapters is 0 for the other tokens: without a bias, so is their output.
    """

    def mask_input(_, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0] * tokens[..., None].to(inputs[0].dtype),)

    with ExitStack() as hooks:
        for name, module in adapted.named_modules():
            if name.endswith(("q_proj.lora_A.default", "o_proj.lora_A.default")):
                hooks.enter_context(module.register_forward_pre_hook(mask_input))
        yield


def _chunks(x: Tensor, size: int) -> Tensor:
    """(B, T) as (B * chunks, size); the first chunk of a row is the padded one."""
    size = min(size, x.shape[1])
    return F.pad(x, (-x.shape[1] % size, 0)).reshape(-1, size)


def _chunked_inputs(input_ids: Tensor, mask: Tensor, size: int) -> dict[str, Tensor]:
    """Inputs of a model for contexts in chunks that do not attend to each other."""
    chunk_mask = _chunks(mask, size)
    padding_only = ~chunk_mask.any(1, keepdim=True)
    return {
        "input_ids": _chunks(input_ids, size),
        "attention_mask": chunk_mask.masked_fill(padding_only, 1),  # softmax needs an entry
        "position_ids": _chunks(_positions(mask), size),
    }


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


class DistillExample(NamedTuple):
    """Token ids of a context, (T,), and of the turns after it, (S,), with their weights, (S,)."""

    context: Tensor
    text: Tensor
    weights: Tensor


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    turns: Sequence[tuple[str, str]],
    instruction: float = 0.0,
) -> DistillExample:
    """Token ids of a context and of (question, answer) turns after it, by the chat template.

    Each turn is encoded as if it were the first, since some templates change earlier turns. Tokens
    of answers have weight 1, those of questions `instruction`.

    Example:
        >>> from kvlab import lab
        >>> tokenizer, turn = lab.load_tokenizer("lab-target"), ("Where does Anna live?", "Rome")
        >>> example = encode_turns(tokenizer, "Anna lives in Rome.", [turn])
        >>> example.context.shape, example.weights
        (torch.Size([6]), tensor([0., 0., 0., 0., 0., 0., 0., 1., 1.]))
    """
    text = []
    weights = []
    for question, answer in turns:
        messages = zip(("system", "user", "assistant"), (context, question, answer), strict=True)
        conversation = [{"role": role, "content": content} for role, content in messages]
        context_ids, question_ids, answer_ids = encode_parts(tokenizer, conversation)
        text += question_ids + answer_ids
        weights += [instruction] * len(question_ids) + [1.0] * len(answer_ids)
    return DistillExample(torch.tensor(context_ids), torch.tensor(text), torch.tensor(weights))


class DistillDataset(Dataset):
    """`encode_turns` of each of a sequence of (context, turns), encoded when an item is read."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, readings, instruction: float = 0.0):
        self.tokenizer, self.readings, self.instruction = tokenizer, readings, instruction

    def __len__(self) -> int:
        return len(self.readings)

    def __getitem__(self, index: int) -> DistillExample:
        return encode_turns(self.tokenizer, *self.readings[index], self.instruction)


def pad_contexts(examples: Sequence[DistillExample]) -> dict[str, Tensor]:
    """A batch: contexts are padded on the left, texts and weights on the right."""
    contexts, texts, weights = zip(*examples, strict=True)
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    context = pad(contexts, padding_side="left", padding_value=-1)
    mask = (context >= 0).long()
    batch = {"context": context.clamp(min=0), "context_mask": mask}
    return batch | {"text": pad(texts), "weights": pad(weights)}


def train_distiller(
    distiller: KVDistiller,
    examples: Dataset,
    *,
    steps: int,
    batch_size: int = 32,
    retention: tuple[float, float] = (0.001, 0.8),
    forward_share: float = 0.6,
    **options,
) -> list[dict[str, float]]:
    """Match the next-token distributions given the compressed cache to those given the full cache.

    The loss is lambda KL(p||q) + (1 - lambda) KL(q||p) over the vocabulary, with p from the full
    context, weighted by token. Source: Chari and Van Durme (2025), arXiv 2503.10337, section 3.3.

    Args:
        distiller: changed in place.
        examples: a `DistillDataset`, or a list of what `encode_turns` returns.
        steps: optimizer steps.
        batch_size: contexts per batch.
        retention: bounds of the fraction that a batch keeps, drawn uniformly on a logarithmic scale
            (the paper does not state how it is drawn).
        forward_share: lambda.
        options: of `kvlab.training.fit`: learning_rate (5e-5), checkpoint, every, accumulate,
            precision, seed, evaluate, ...

    Returns:
        The history of `fit`; "kl" and "reverse_kl" are already multiplied by their weights.
    """
    if not 0 <= forward_share <= 1:
        raise ValueError(f"forward_share is {forward_share}, expected a fraction from 0 to 1.")
    loss_weights = {"kl": forward_share, "reverse_kl": 1 - forward_share}
    loss_weights = {name: weight for name, weight in loss_weights.items() if weight}
    PartialState(cpu=distiller.model.device.type == "cpu")  # else `fit` takes the best device

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        fraction = retention[0] * (retention[1] / retention[0]) ** torch.rand(()).item()
        text = batch["text"]
        logits, target_logits = model(batch["context"], batch["context_mask"], text, fraction)
        return distillation_losses(loss_weights, logits, target_logits, text, batch["weights"])

    def count_tokens(batch: Mapping[str, Tensor]) -> Tensor:
        return batch["weights"][:, 1:].sum()

    batches = {"batch_size": batch_size, "shuffle": True, "drop_last": True}
    loader = DataLoader(examples, collate_fn=pad_contexts, **batches)
    defaults = {"learning_rate": 5e-5, "weight_decay": 0.0, "warmup": max(1, steps // 20)}
    return fit(distiller, loader, losses, weight=count_tokens, steps=steps, **defaults | options)


# -- comparison


class EncodedQuestion(NamedTuple):
    """Token ids of a record: context (1, T), question (Q,), answer and choices, each (n,).

    `repeat` has what the model reads to score the context by repeating it.
    """

    record: Record
    context: Tensor
    question: Tensor
    answers: list[Tensor]
    repeat: list[Repeat]


def encode_question(tokenizer: PreTrainedTokenizerBase, record: Record) -> EncodedQuestion:
    """Encode a record as in training."""
    examples = []
    for answer in (record.answer, *record.choices):
        examples.append(encode_turns(tokenizer, record.context, [(record.question, answer)]))
    first = examples[0]
    context, question = first.context[None], first.text[first.weights == 0]
    answers = [example.text[example.weights == 1] for example in examples]
    return EncodedQuestion(record, context, question, answers, repeat_texts(tokenizer, context))


def compress_for(
    model: PreTrainedModel,
    questions: Sequence[EncodedQuestion],
    method: str,
    retention: float,
    distiller: KVDistiller | None = None,
    scope: str = "head",
    sinks: int = 4,
) -> list[Prefix]:
    """Compress a context for each of its questions: once, unless the method sees the question.

    Args:
        questions: questions about one context.
        method: "full" (the whole cache), "distill", "attention_matching", a name of METHODS, of
            AWARE or of REPEATED, or a score of a module, "module:name".
        retention: fraction of the entries to keep.
        distiller: for the method "distill".
        scope: as in `kvlab.compress.evict`; distill, attention_matching and REPEATED have their own.
        sinks: number of first tokens that stay, of `expected_attention`, and of scores by repeating.
    """
    context = questions[0].context.to(model.device)
    options = {"retention": retention, "scope": scope}
    if method in AWARE:
        ids = [q.question[None].to(model.device) for q in questions]
        return [evict(model, context, AWARE[method], question_ids=i, **options) for i in ids]
    repeat = [Repeat(text.input_ids.to(model.device), text.part) for text in questions[0].repeat]
    if method == "full":
        prefix = prefill(model, context)
    elif method == "distill":
        prefix = distiller.compress(context, retention=retention)
    elif method == "attention_matching":
        score = partial(kvzip, sinks=sinks)
        prefix = attention_matching(model, context, repeat, retention=retention, score=score)
    elif method in REPEATED:
        score, own_scope = REPEATED[method]
        options |= {"score": partial(score, sinks=sinks), "scope": own_scope, "repeat": repeat}
        prefix = evict(model, context, **options)
    else:
        score = own_score(method) if ":" in method else METHODS[method]
        if score is expected_attention:
            score = partial(score, sinks=sinks)
        prefix = evict(model, context, score, **options)
    return [prefix] * len(questions)


def own_score(name: str) -> Score:
    """A score of a module, "module:name", which is looked for in the current folder, too.

    Example:
        >>> own_score("kvlab.compress:key_norm").__name__
        'key_norm'
    """
    module, _, function = name.partition(":")
    folder = str(Path.cwd())
    try:
        if folder not in sys.path:
            sys.path.append(folder)
        score = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"There is no score {name} ({error}): give module:function.") from error
    if not callable(score):
        raise ValueError(f"{name} is no function: give a score such as kvlab.compress:key_norm.")
    return score


@torch.no_grad()
def compression_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[Sequence[Record]],
    methods: Sequence[str],
    retention: Sequence[float],
    generate: Callable,
    long_answers: bool = False,
    stop: Stop = (),
    **options,
) -> pd.DataFrame:
    """Score a model's answers given full and given compressed contexts.

    Args:
        model: reads the contexts and answers.
        tokenizer: of the model.
        contexts: the records of each context.
        methods: as in `compress_for`, without "full", which is always there.
        retention: fractions of a context's entries to keep.
        generate: `kvlab.speculate.generate` for this model, such as
            `partial(generate, model, max_new_tokens=64)`.
        long_answers: score ROUGE-L, too.
        stop: strings that end an answer; they are cut off.
        options: of `compress_for`: distiller, scope, sinks.

    Returns:
        A row for each method, retention and record. The first method is "full", the whole cache.
        Columns are method, retention, context (its number), answer, references, exact_match, f1 (the
        best of the references), log_likelihood (nats) and tokens of the first reference, bytes of
        the cache and, where they apply, accuracy (whether the right choice is the most probable)
        and rouge_l. Where there is no reference, the empty text is one.

    Example:
        >>> from kvlab import lab, speculate
        >>> records = [Record("Anna lives in Rome.", "Where does Anna live?", ("Rome",))]
        >>> model, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
        >>> generate = lambda *args, **options: speculate.generate(model, *args, **options)
        >>> table = compression_scores(model, tokenizer, [records], ["key_norm"], [0.5], generate)
        >>> table[["method", "retention"]].values.tolist()
        [['full', 1.0], ['key_norm', 0.5]]
    """
    rows = []
    arms = [("full", 1.0), *itertools.product(methods, retention)]
    bar = tqdm(contexts, desc="contexts", disable=len(contexts) == 1)
    for number, records in enumerate(bar):
        questions = [encode_question(tokenizer, record) for record in records]
        for method, fraction in arms:
            prefixes = compress_for(model, questions, method, fraction, **options)
            prompts = [q.question for q in questions]
            tokens = generate(prompts, prefix=prefixes, tokenizer=tokenizer, stop=stop).tokens
            for q, prefix, ids in zip(questions, prefixes, tokens, strict=True):
                row = {"method": method, "retention": fraction, "context": number}
                row["answer"] = answer_text(tokenizer, ids, stop)
                row["references"] = q.record.answers
                rows.append(row | _score_likelihoods(model, tokenizer, q, prefix))
    scores = pd.DataFrame(rows)
    pairs = scores["answer"], [texts or ("",) for texts in scores["references"]]
    scores["exact_match"] = exact_match(*pairs)
    scores["f1"] = f1(*pairs)
    if long_answers:
        scores["rouge_l"] = rouge_l(*pairs)
    return scores


def _score_likelihoods(model, tokenizer, q: EncodedQuestion, prefix: Prefix) -> dict[str, float]:
    prompts = [q.question] * len(q.answers)
    values = log_likelihoods(model, tokenizer, prompts, q.answers, prefix)
    scores = {"log_likelihood": values[0], "tokens": len(q.answers[0])}
    scores["bytes"] = kv.nbytes(prefix.cache)
    if q.record.choices:
        choice = q.record.choices[np.argmax(values[1:])]
        scores["accuracy"] = float(choice in q.record.answers)
    return scores


def compression_figures(scores: pd.DataFrame) -> list[dict]:
    """Means of `compression_scores`, with 95 % intervals over contexts, which weigh the same.

    Besides what `figure` returns, each has method, retention and score: exact_match, f1, accuracy,
    rouge_l, perplexity (of the first answer) or MB (of the cache). If some questions have no
    answer, scores of these (NoAns) and of the others (HasAns) are added.

    Example:
        >>> columns = "method retention context exact_match log_likelihood tokens bytes".split()
        >>> rows = [["full", 1.0, 0, 1, -3 * np.log(2), 3, 5000000]]
        >>> [round(f["value"], 3) for f in compression_figures(pd.DataFrame(rows, columns=columns))]
        [1.0, 2.0, 5.0]
    """
    figures = []
    has_answer = scores.get("references", scores["method"]).map(bool)
    if not has_answer.all():
        groups = {"HasAns": has_answer, "NoAns": ~has_answer}
        for name, score in SQUAD_V2.items():
            scores = scores.assign(**{name: scores[score].where(groups[name.split("_")[0]])})
    for (method, fraction), rows in scores.groupby(["method", "retention"], sort=False):
        means = rows.groupby("context").mean(numeric_only=True).dropna(axis=1, how="all")
        means["perplexity"] = -means["log_likelihood"] / means["tokens"]
        means["MB"] = means["bytes"] / 1e6
        conditions = f"{len(rows)} questions to {len(means)} contexts"
        for score in [name for name in UNITS if name in means]:
            name = f"{method}, {fraction:g}, {score}"
            result = figure(name, means[score].dropna(), UNITS[score], conditions)
            if score == "perplexity":
                result = exponential(result)
            figures.append(result | {"method": method, "retention": fraction, "score": score})
    return figures
