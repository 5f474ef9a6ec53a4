"""The Cache-to-Cache (C2C) fuser: what a sharer knows of a text, added to a receiver's KV cache.

Sharer and receiver read the same prompt. For each of the receiver's layers, keys and values apart,
a small network sees what both made of a token, and proposes a change to what the receiver made of
it. A weight for each head and token scales the change, and a gate for the layer lets it pass or
not. Both models stay as they are; only the fuser learns.

Source: Fu et al. (2025), Cache-to-Cache, arXiv 2510.03215, and its code. What is published differs
from the default in three places, each of which has a name:

- keys. The published fuser reads and changes keys as they are stored, rotated, so that it has to
  learn each position anew, and texts that do not start at the same position do not fit. Here keys
  are un-rotated before, and the change is rotated after (`Settings.keys`).
- noise. Its gates are trained with Gumbel noise, with which a gate of logit 0 is open with
  probability 1 - 1/e = 0.632 in training, and closed at inference. Logistic noise makes it
  sigma(logit): open more often than not where it is open at inference (`Settings.noise`).
- tokens. Of the sharer's tokens that spell one of the receiver's, it takes one
  (`align_tokens(keep="longest")`); here all count, by the characters they share with it.

Not published are `rehearsal_loss`, which teaches to carry over what a text says, and fusing what
was said in decoding. `PUBLISHED` has the first two. Batches are padded on the left, as wherever
kvlab reads contexts. An untrained fuser is closed: in evaluation mode it returns the receiver's
cache, bit for bit.

>>> from kvlab import lab
>>> receiver, sharer = lab.load("lab-draft"), lab.load("lab-target")
>>> fuser = Fuser(Size.of(receiver.config), Size.of(sharer.config), settings=Settings(hidden=64))
>>> ids = lab.load_tokenizer("lab-draft")("Anna lives in Rome.", return_tensors="pt").input_ids
>>> own, theirs = prefill(receiver, ids), prefill(sharer, ids)
>>> torch.equal(to_tensor(fuser(own, theirs)), to_tensor(own.cache))
True
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvlab.cache import (
    Prefix,
    from_tensor,
    join,
    part,
    pick_layers,
    prefill,
    rotate,
    shape_of,
    to_tensor,
    truncate,
    unrotate,
)
from kvlab.files import write_tensors, write_text
from kvlab.generation import encode_parts, rendered
from kvlab.layers import LayerMap, last_aligned
from kvlab.losses import cross_entropy
from kvlab.models import differences, fingerprint, require
from kvlab.training import fit

KEYS = ("unrotated", "rotated")
NOISES = {
    "logistic": torch.logit,
    "gumbel": lambda u: -(-u.log()).log(),
}  # from u, uniform in (0, 1)
KEEPS = ("all", "longest")
FORMAT_VERSION, WEIGHTS, ABOUT = 1, "fuser.safetensors", "fuser.json"
Conversation = Sequence[Mapping[str, str]]  # {"role", "content"} messages
MARK = "\ue000"  # stands for a message's text, to see where a chat template puts it


# -- tokens


class Aligned(NamedTuple):
    """One text in the tokens of both models: ids (T_r,) and (T_s,), and shares (T_r, T_s).

    Row i says of which sharer tokens the receiver's token i is made: it adds up to 1, or is 0 where
    it is of none. None where both have the same tokens.
    """

    receiver_ids: Tensor
    sharer_ids: Tensor
    shares: Tensor | None = None


def align_tokens(
    receiver_tokenizer: PreTrainedTokenizerBase,
    sharer_tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    keep: str = "all",
) -> Aligned:
    """Encode a conversation for both models, and align the tokens by the characters that they spell.

    Where both chat templates write the same text, all of it is aligned; else only what messages
    say, and the tokens of the templates themselves belong to no token of the other side. The same
    pieces of the same text correspond one by one. The tokens of a character that takes several all
    spell it.

    Args:
        keep: "all" sharer tokens that overlap one of the receiver's, each by its share of the
            common characters; or the "longest", the first of those with most of them, which is
            nearest to what is published.

    Raises:
        ValueError: a tokenizer without offsets, a template that changes what a message says,
            another `keep`.

    Example:
        >>> from kvlab import lab
        >>> tokenizers = lab.load_tokenizer("lab-draft"), lab.load_tokenizer("lab-teacher")
        >>> ids, other_ids, shares = align_tokens(*tokenizers, [{"role": "user", "content": "eggs"}])
        >>> [tokenizers[0].decode(i) for i in ids], [tokenizers[1].decode(i) for i in other_ids]
        (['<|user|>', ' eggs', '<|assistant|>'], ['<|user|>', ' e', 'g', 'g', 's', '<|assistant|>'])
        >>> shares[1]
        tensor([0.0000, 0.4000, 0.2000, 0.2000, 0.2000, 0.0000])
    """
    require(keep in KEEPS, f"keep is {keep!r}, expected one of {', '.join(KEEPS)}.")
    sides = [
        _encoded(tokenizer, conversation) for tokenizer in (receiver_tokenizer, sharer_tokenizer)
    ]
    (text, ids, offsets), (other_text, other_ids, other_offsets) = sides
    same = text == other_text
    if same and np.array_equal(offsets, other_offsets):
        return Aligned(ids, other_ids, None if torch.equal(ids, other_ids) else torch.eye(len(ids)))
    own, theirs = (
        side[2] if same else _spoken(tokenizer, conversation, side[0])[side[2]]
        for tokenizer, side in zip((receiver_tokenizer, sharer_tokenizer), sides, strict=True)
    )  # (T, 2), where each token begins and ends in what both have
    common = np.minimum(own[:, None, 1], theirs[:, 1]) - np.maximum(own[:, None, 0], theirs[:, 0])
    common = torch.from_numpy(common.clip(min=0)).float()  # (T_r, T_s), in characters
    if keep == "longest":
        best = common.argmax(1, keepdim=True)
        common = torch.zeros_like(common).scatter(1, best, (common.gather(1, best) > 0).float())
    return Aligned(ids, other_ids, common / common.sum(1, keepdim=True).clamp(min=1))


def _encoded(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> tuple[str, Tensor, np.ndarray]:
    """The text of a conversation, its token ids (T,), and where in it each begins and ends, (T, 2)."""
    name = type(tokenizer).__name__
    require(
        tokenizer.is_fast,
        f"{name} is not a fast tokenizer and has no offsets: load it with use_fast=True.",
    )
    require(
        conversation,
        "The conversation is empty, expected one message or more: give what the models are to read.",
    )
    text = rendered(tokenizer, conversation)
    encoded = tokenizer(
        text, add_special_tokens=not tokenizer.chat_template, return_offsets_mapping=True
    )
    return (
        text,
        torch.tensor(encoded["input_ids"]),
        np.array(encoded["offset_mapping"]).reshape(-1, 2),
    )


def _spoken(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, text: str
) -> np.ndarray:
    """For each place in a rendered text, how many characters of messages stand before it, (len(text) + 1,)."""
    inside = np.zeros(len(text), dtype=np.int64)
    for i, message in enumerate(conversation):
        marked = [*conversation[:i], {**message, "content": MARK}, *conversation[i + 1 :]]
        place, content = rendered(tokenizer, marked).find(MARK), message["content"].strip()
        start = text.find(content, max(place, 0))
        found = place >= 0 and start >= 0 and not text[place:start].strip()
        seen = f"The chat template of {type(tokenizer).__name__} changes message {i}, which begins {content[:60]!r}"
        require(
            found,
            f"{seen}: use a tokenizer whose template leaves it, or none (chat_template=None).",
        )
        inside[start : start + len(content)] = 1
    return np.concatenate(([0], inside.cumsum()))


# -- the fuser


class Size(NamedTuple):
    """What a fuser has to know of a model: its layers, KV heads, and their width."""

    layers: int
    heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Size":
        """Read the size from a model's configuration.

        >>> from kvlab.lab import models
        >>> Size.of(models.make_config("lab-teacher"))
        Size(layers=6, heads=4, head_dim=40)
        """
        config = config.get_text_config(decoder=True)
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        return cls(config.num_hidden_layers, config.num_key_value_heads, width)


@dataclass(frozen=True)
class Settings:
    """How a fuser is made.

    Args:
        hidden: the width of all that lies between input and output.
        dropout: in each block, in training.
        keys: "unrotated", or "rotated" as published.
        noise: of the gates in training, "logistic", or "gumbel" as published.
        gate: the logit that gates start with. Published: 0, at which noise closes about half of
            them in training.
        sharer_seen: False puts zeros in place of what the sharer made: the control that has as many
            parameters, and nothing but the receiver's own cache to learn from.
    """

    hidden: int = 1024
    dropout: float = 0.1
    keys: str = "unrotated"
    noise: str = "logistic"
    gate: float = 0.0
    sharer_seen: bool = True

    def __post_init__(self):
        require(self.hidden > 0, f"hidden is {self.hidden}, expected 1 or more.")
        require(
            0 <= self.dropout < 1,
            f"dropout is {self.dropout}, expected 0 or more, and less than 1.",
        )
        require(self.keys in KEYS, f"keys is {self.keys!r}, expected one of {', '.join(KEYS)}.")
        require(
            self.noise in NOISES, f"noise is {self.noise!r}, expected one of {', '.join(NOISES)}."
        )


PUBLISHED = Settings(keys="rotated", noise="gumbel")


class Linears(nn.Module):
    """A linear map for each of n sides (a layer's keys, or its values), in one product: (n, N, in) -> (n, N, out)."""

    def __init__(self, sides: int, inputs: int, outputs: int, bias: bool = True):
        super().__init__()
        bound = inputs**-0.5  # as nn.Linear starts
        self.weight = nn.Parameter(torch.empty(sides, inputs, outputs).uniform_(-bound, bound))
        # One dimension, by which `fit` knows what is not a matrix and must not decay.
        self.bias = (
            nn.Parameter(torch.empty(sides * outputs).uniform_(-bound, bound)) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        made = torch.bmm(x, self.weight)
        return made if self.bias is None else made + self.bias.view(len(x), 1, -1)


class Block(nn.Module):
    """x + W2 GELU(W1 RMSNorm(x)) for each side, without bias, with dropout on what is added."""

    def __init__(self, sides: int, width: int, dropout: float):
        super().__init__()
        self.norm, self.dropout = nn.Parameter(torch.ones(sides * width)), nn.Dropout(dropout)
        self.up, self.down = (Linears(sides, width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.norm.view(len(x), 1, -1)
        return x + self.dropout(self.down(F.gelu(self.up(normed))))


class Fuser(nn.Module):
    """A C2C fuser from a sharer to a receiver, in evaluation mode, with all gates closed.

    Training draws soft gates at `temperature`; evaluation opens those whose logit is above 0. All
    sides (each layer's keys and values) are computed in the same few products, so that a call on a
    few tokens costs little.

    Args:
        receiver, sharer: sizes of the two models. One model that is both is a control: more
            parameters, and no news.
        layer_map: for each receiver layer one or more of the sharer's, whose weighted mean it sees.
            Default: `layers.last_aligned`. Others are `layers.proportional`, and what
            `layers.layer_map` finds.
        settings: `PUBLISHED` for the fuser of the source.

    Example:
        >>> with torch.device("meta"):  # Qwen2.5-0.5B to Qwen3-0.6B
        ...     fuser = Fuser(Size(28, 8, 128), Size(24, 2, 64))
        >>> fuser.num_parameters()
        477848056
    """

    def __init__(
        self,
        receiver: Size,
        sharer: Size,
        layer_map: LayerMap | None = None,
        settings: Settings | None = None,
    ):
        super().__init__()
        settings = settings or Settings()
        layer_map = last_aligned(receiver.layers, sharer.layers) if layer_map is None else layer_map
        have, want = (
            (len(layer_map.indices), layer_map.teacher_layers),
            (receiver.layers, sharer.layers),
        )
        seen = f"The layer map is from {have[1]} layers to {have[0]}, expected from {want[1]} to {want[0]}"
        require(have == want, f"{seen}: make it for this sharer and this receiver.")
        self.receiver, self.sharer, self.layer_map, self.settings = (
            receiver,
            sharer,
            layer_map,
            settings,
        )
        self.sources = sorted(
            {*layer_map.indices.flatten().tolist()}
        )  # the sharer's layers that are seen
        sides, hidden, width = (
            2 * receiver.layers,
            settings.hidden,
            receiver.heads * receiver.head_dim,
        )
        self.enter = Linears(sides, sharer.heads * sharer.head_dim + width, hidden)
        self.shared, self.project, self.weigh = (
            Block(sides, hidden, settings.dropout) for _ in range(3)
        )
        self.change, self.weight = (
            Linears(sides, hidden, width),
            Linears(sides, hidden, receiver.heads),
        )
        self.gate_logit, self.temperature = nn.Parameter(torch.full((sides,), settings.gate)), 1.0
        self.trained_for: dict[
            str, dict
        ] = {}  # fingerprints of "receiver" and "sharer", noted by `train`
        self.eval()

    def forward(
        self, receiver: Prefix, sharer: Prefix, shares: Tensor | None = None
    ) -> DynamicCache:
        """Fuse what the sharer made of texts into the receiver's cache. Returns a new cache; neither is changed.

        Args:
            receiver, sharer: the same B texts, T_r and T_s tokens with padding.
            shares: (B, T_r, T_s), of which sharer tokens each of the receiver's is made, as
                `align_tokens` finds. A row of zeros leaves a token as it is. Default: both have the
                same tokens, in the same columns.

        Returns:
            A cache as the receiver's, in its dtype and at its positions. What no gate, share or
            mask lets change has the receiver's bits.
        """
        self._require_fit(receiver, sharer, shares)
        stored, weight = to_tensor(receiver.cache), self.enter.weight  # (L, 2, B, H, T, d)
        passing = (
            torch.ones(2 * len(stored), dtype=torch.bool) if self.training else self.gate_logit > 0
        )
        if not passing.any():
            return from_tensor(stored.clone())
        seen = replace(sharer, cache=pick_layers(sharer.cache, self.sources))
        theirs = _features(seen, self.settings.keys).to(weight)
        theirs = torch.einsum(
            "ls,s...->l...", self._mixture().to(weight), theirs
        )  # (L, 2, B, T_s, W_s)
        theirs = theirs if shares is None else shares.to(weight) @ theirs
        theirs = theirs if self.settings.sharer_seen else torch.zeros_like(theirs)
        own = _features(receiver, self.settings.keys).to(weight)  # (L, 2, B, T, H d)
        changes = self._changes(torch.cat((theirs, own), -1).flatten(0, 1).flatten(1, 2)).view(
            own.shape
        )
        changes = changes.unflatten(-1, stored.shape[3::2]).transpose(3, 4)  # (L, 2, B, H, T, d)
        if self.training:
            changes = changes * self._gates((*stored.shape[:5], 1)).to(changes)
        if (
            self.settings.keys == "unrotated"
        ):  # rotation is linear: only the change is turned, and stored keys are not
            changes = to_tensor(rotate(from_tensor(changes), receiver.positions, receiver.rotary))
        mask = receiver.attention_mask
        fused = torch.ones_like(receiver.positions) if mask is None else mask
        fused = (fused > 0).to(stored.device)  # (B, T)
        if shares is not None:
            fused = fused & (shares.sum(-1) > 0).to(stored.device)
        changed = passing.to(stored.device).view(-1, 2, 1, 1, 1, 1) & fused[:, None, :, None]
        return from_tensor(torch.where(changed, stored + changes.to(stored), stored))

    def _changes(self, x: Tensor) -> Tensor:
        """What to add where gates are open, (2 L, N, H d), from the features of both, (2 L, N, W_s + H d)."""
        x = self.shared(self.enter(x))
        change = self.change(self.project(x)).unflatten(
            -1, (self.receiver.heads, -1)
        )  # (2 L, N, H, d)
        return (self.weight(self.weigh(x)).sigmoid()[..., None] * change).flatten(2)

    def _gates(self, shape: Sequence[int]) -> Tensor:
        """Gates as in training, sigma((logit + noise) / temperature), drawn for each row, head and token."""
        u = torch.rand(*shape, device=self.gate_logit.device).clamp(1e-6, 1 - 1e-6)
        logits = self.gate_logit.float().view(-1, 2, *[1] * (len(shape) - 2))
        return ((logits + NOISES[self.settings.noise](u)) / self.temperature).sigmoid()

    def _mixture(self) -> Tensor:
        """The weight of each layer that is seen, (L, S)."""
        indices, weights, _ = self.layer_map
        columns = torch.tensor([[self.sources.index(i) for i in row] for row in indices.tolist()])
        return torch.zeros(len(indices), len(self.sources), dtype=weights.dtype).scatter_add(
            1, columns, weights
        )

    def _require_fit(self, receiver: Prefix, sharer: Prefix, shares: Tensor | None) -> None:
        shapes = []
        for who, given, size in (
            ("receiver", receiver, self.receiver),
            ("sharer", sharer, self.sharer),
        ):
            layers, rows, heads, entries, width = shape_of(given.cache)
            seen = (
                f"The {who}'s cache has {Size(layers, heads, width)}, the fuser was made for {size}"
            )
            require((layers, heads, width) == size, f"{seen}: give that model's cache.")
            checked = [("positions", given.positions), ("attention_mask", given.attention_mask)]
            for name, x in checked[: 1 + (given.attention_mask is not None)]:
                seen = f"The {name} of the {who}: shape {tuple(x.shape)}, expected (B, T) = {(rows, entries)}"
                require(
                    x.shape == (rows, entries), f"{seen}: give one for each entry of its cache."
                )
            shapes.append((rows, entries))
        (rows, own), (other_rows, other) = shapes
        seen = f"The receiver read {rows} texts of {own} tokens, the sharer {other_rows} of {other}"
        require(rows == other_rows, f"{seen}, expected as many texts: give both the same ones.")
        require(
            shares is not None or own == other,
            f"{seen}, expected as many tokens: give shares (`align_tokens`).",
        )
        fits = shares is None or shares.shape == (rows, own, other)
        require(
            fits,
            f"shares is {shares is not None and tuple(shares.shape)}, expected {(rows, own, other)}: {seen}.",
        )

    def gate_logits(self) -> Tensor:
        """The logit of every gate, (L, 2), keys before values; above 0 is open."""
        return self.gate_logit.detach().view(-1, 2).cpu()

    def open_gates(self) -> Tensor:
        """Which gates are open outside of training, (L, 2), keys before values."""
        return self.gate_logits() > 0

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def warn_of_others(self, receiver: PreTrainedModel, sharer: PreTrainedModel) -> None:
        """Warn if the fuser was trained for other models than these, or, as the control, for one that was both."""
        for who, model in (("receiver", receiver), ("sharer", sharer)) if self.trained_for else ():
            saved, own = self.trained_for[who], fingerprint(model)
            dtypes = [told["weights"]["dtype"] for told in (saved, own)]
            parts = [
                part for part in own if part != "weights" or dtypes[0] == dtypes[1]
            ]  # rounding changes digests
            if other := differences(
                {part: saved[part] for part in parts}, {part: own[part] for part in parts}
            ):
                seen = f"The fuser was trained with another {who} ({other})"
                warnings.warn(
                    f"{seen}: what it adds may be of no use. Train one for these models.",
                    stacklevel=2,
                )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write fuser.safetensors, and fuser.json with what it was made for. Returns the folder."""
        folder, (indices, weights, _) = Path(folder), self.layer_map
        require(not folder.is_file(), f"{folder} is a file: give the name of a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, self.state_dict(), {"format": "pt"})
        about = {
            "version": FORMAT_VERSION,
            "receiver": self.receiver._asdict(),
            "sharer": self.sharer._asdict(),
        }
        about |= {"layer_map": {"indices": indices.tolist(), "weights": weights.tolist()}}
        about |= {"settings": asdict(self.settings), "trained_for": self.trained_for}
        return write_text(folder / ABOUT, json.dumps(about, indent=1) + "\n").parent

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Fuser":
        """Read what `save_pretrained` wrote, onto the CPU. ValueError for a folder that is not that."""
        folder = Path(folder)
        missing = [name for name in (ABOUT, WEIGHTS) if not (folder / name).is_file()]
        require(
            not missing,
            f"{folder} has no {', '.join(missing)}: give a folder that `kvlab train-fuser` or `save_pretrained` wrote.",
        )
        try:
            about = json.loads((folder / ABOUT).read_text("utf-8"))
            require(about["version"] == FORMAT_VERSION, f"its version is {about['version']}")
            receiver, sharer = Size(**about["receiver"]), Size(**about["sharer"])
            indices, weights = (
                torch.tensor(about["layer_map"]["indices"]),
                about["layer_map"]["weights"],
            )
            layer_map = LayerMap(indices, torch.tensor(weights, dtype=torch.float64), sharer.layers)
            fuser = cls(receiver, sharer, layer_map, Settings(**about["settings"]))
            fuser.load_state_dict(
                load_file(folder / WEIGHTS), assign=True
            )  # in the dtype of the file
            fuser.trained_for = about["trained_for"]
        except (ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            wrong = f"{folder} holds no fuser of format version {FORMAT_VERSION}"
            raise ValueError(
                f"{wrong} ({type(error).__name__}: {error}): save it again."
            ) from error
        return fuser.requires_grad_(True)


def _features(read: Prefix, keys: str) -> Tensor:
    """What was read of each token, heads side by side, (L, 2, B, T, H d)."""
    cache = read.cache if keys == "rotated" else unrotate(read.cache, read.positions, read.rotary)
    return to_tensor(cache).transpose(3, 4).flatten(4)


@torch.no_grad()
def fuse_prompt(
    fuser: Fuser, receiver: PreTrainedModel, sharer: PreTrainedModel, prompt: Aligned
) -> Prefix:
    """Have both models read a prompt, and fuse all of it but the last token, which the receiver still has to read.

    >>> from kvlab import lab
    >>> model, tokenizer = lab.load("lab-draft"), lab.load_tokenizer("lab-draft")
    >>> fuser = Fuser(Size.of(model.config), Size.of(model.config), settings=Settings(hidden=64))
    >>> prompt = align_tokens(tokenizer, tokenizer, [{"role": "user", "content": "Who?"}])
    >>> fuse_prompt(fuser, model, model, prompt).next_position == len(prompt.receiver_ids) - 1
    True
    """
    _require_prompt(prompt)
    ids, other_ids, shares = prompt.receiver_ids[:-1], prompt.sharer_ids, prompt.shares
    if _alike(prompt):
        other_ids = ids
    own, theirs = (
        prefill(m, i[None].to(m.device)) for m, i in ((receiver, ids), (sharer, other_ids))
    )
    fused = fuser(own, theirs, None if shares is None else shares[None, :-1].to(receiver.device))
    return Prefix(fused, len(ids), ids.tolist())


def _require_prompt(prompt: Aligned) -> None:
    have = len(prompt.receiver_ids)
    require(
        have > 1, f"The prompt has {have} tokens, expected 2 or more: the last one is not fused."
    )


def _alike(prompt: Aligned) -> bool:
    """Whether both models have the same tokens."""
    same = prompt.shares is not None or torch.equal(prompt.receiver_ids, prompt.sharer_ids)
    require(
        same, "A prompt has other tokens for the sharer, and no shares: give them (`align_tokens`)."
    )
    return prompt.shares is None


# -- training


class Lesson(NamedTuple):
    """A prompt for both models, and the response (R,) as the receiver is to give it."""

    prompt: Aligned
    response: Tensor


def lesson(
    receiver_tokenizer: PreTrainedTokenizerBase,
    sharer_tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    keep: str = "all",
) -> Lesson:
    """Make a lesson of a conversation that ends with the response; `keep` as for `align_tokens`."""
    last = conversation[-1]["role"] if conversation else "nobody"
    require(
        last == "assistant",
        f"The last message is by {last!r}, expected the assistant's response: append it.",
    )
    prompt = align_tokens(receiver_tokenizer, sharer_tokenizer, conversation[:-1], keep)
    _require_prompt(prompt)
    return Lesson(prompt, torch.tensor(encode_parts(receiver_tokenizer, conversation)[-1]))


def collate(lessons: Sequence[Lesson]) -> dict[str, Tensor]:
    """A batch: prompts padded on the left, responses behind them on the right, P columns of prompt but the last.

    Returns:
        input_ids, attention_mask, weights (1 for what counts) : (B, P + 1 + R), the receiver's.
        sharer_ids, sharer_mask : (B, S), and shares : (B, P, S), unless all prompts have the same
        tokens for both.
    """
    prompts, responses = zip(*lessons, strict=True)
    sides = {"left": [p.receiver_ids for p in prompts], "right": responses}
    batch = {
        "input_ids": torch.cat([_padded(ids, side) for side, ids in sides.items()], 1),
        "attention_mask": torch.cat(
            [_padded(map(torch.ones_like, ids), side) for side, ids in sides.items()], 1
        ),
    }
    columns = batch["input_ids"].shape[1] - max(map(len, responses))
    batch["weights"] = batch["attention_mask"].float()
    batch["weights"][:, :columns] = 0
    alike = [_alike(prompt) for prompt in prompts]
    if all(alike):
        return batch
    batch["sharer_ids"] = _padded([p.sharer_ids for p in prompts], "left")
    batch["sharer_mask"] = _padded([torch.ones_like(p.sharer_ids) for p in prompts], "left")
    batch["shares"] = torch.zeros(len(prompts), columns - 1, batch["sharer_ids"].shape[1])
    for row, prompt in zip(batch["shares"], prompts, strict=True):
        shares = torch.eye(len(prompt.receiver_ids)) if prompt.shares is None else prompt.shares
        tokens, others = shares[:-1].shape
        row[len(row) - tokens :, row.shape[1] - others :] = shares[:-1]
    return batch


def _padded(rows, side: str) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_side=side)


def response_loss(
    fuser: nn.Module,
    receiver: PreTrainedModel,
    sharer: PreTrainedModel,
    batch: Mapping[str, Tensor],
    said: int = 0,
) -> dict[str, Tensor]:
    """Next-token cross-entropy of responses behind fused prompts, "ce", for a batch as `collate` makes it.

    Args:
        said: of this many columns (the prompt's last, then the response's first ones) the
            receiver's entries are fused too before it reads the rest, as speculative decoding fuses
            what was accepted. Needs the same tokens on both sides.
    """
    ids, mask, shares = batch["input_ids"], batch["attention_mask"], batch.get("shares")
    require(
        not said or shares is None,
        "What was said can be fused for the same tokens only: leave `said` out.",
    )
    fused = _prompt_columns(batch)
    known, places = fused + said, mask.cumsum(1) - 1
    with torch.no_grad():
        own = prefill(receiver, ids[:, :fused], attention_mask=mask[:, :fused])
        if shares is None:
            there = mask[:, :known].clone()
            there[:, fused:] = 1  # padding on the right may count as text: nothing looks back to it
            theirs = prefill(sharer, ids[:, :known], attention_mask=there)
        else:
            theirs = prefill(sharer, batch["sharer_ids"], attention_mask=batch["sharer_mask"])
    cache, logits = fuser(own, part(theirs, 0, fused) if shares is None else theirs, shares), []
    for start, stop in (
        ((fused, known), (known, ids.shape[1])) if said else ((fused, ids.shape[1]),)
    ):
        there = {"attention_mask": mask[:, :stop], "position_ids": places[:, start:stop]}
        out = receiver(ids[:, start:stop], past_key_values=cache, use_cache=True, **there)
        logits.append(out.logits)
        if stop < ids.shape[1]:
            new = Prefix(
                out.past_key_values,
                stop,
                positions=places[:, :stop],
                rotary=own.rotary,
                attention_mask=mask[:, :stop],
            )
            new = fuser(part(new, start, stop), part(theirs, start, stop))
            cache = join(truncate(out.past_key_values, start), new)
    return {"ce": cross_entropy(torch.cat(logits, 1), ids[:, fused:], batch["weights"][:, fused:])}


def _prompt_columns(batch: Mapping[str, Tensor]) -> int:
    """The columns of prompts but their last, which is the one before the first that counts."""
    return int(batch["weights"].any(0).long().argmax()) - 1


def rehearsal_loss(
    fuser: nn.Module,
    receiver: PreTrainedModel,
    sharer: PreTrainedModel,
    batch: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """How far the fused cache is from what the receiver would have made, had it read what the sharer read.

    For prompts that the receiver reads with blanks, `Aligned(ids with blanks, ids, eye)`: every
    entry teaches what the sharer's say, where a response tells of a few, and in one token each.
    "unexplained" is the squared error of keys (un-rotated) and values over their variance, the mean
    over layers: 0 is all there is, 1 no more than the mean.
    """
    ids, mask, shares = batch["input_ids"], batch["attention_mask"], batch["shares"]
    fused, others, there = shares.shape[1], batch["sharer_ids"], batch["sharer_mask"]
    alike = shares.shape[2] == fused + 1 and torch.equal(mask[:, : fused + 1], there)
    require(
        alike,
        "The receiver and the sharer read prompts of other lengths: give each token's blank its place.",
    )
    with torch.no_grad():
        own = prefill(receiver, ids[:, :fused], attention_mask=mask[:, :fused])
        theirs = prefill(sharer, others, attention_mask=there)
        wanted = prefill(receiver, others[:, :fused], attention_mask=there[:, :fused])
        wanted = _features(wanted, "unrotated")
    made = _features(replace(own, cache=fuser(own, theirs, shares)), "unrotated")
    made, wanted = (
        x[:, :, mask[:, :fused] > 0].float() for x in (made, wanted)
    )  # (L, 2, tokens, H d)
    error = (made - wanted).square().mean((2, 3)) / wanted.var(2).mean(2)
    return {"unexplained": error.mean()}


def train(
    fuser: Fuser,
    receiver: PreTrainedModel,
    sharer: PreTrainedModel,
    lessons: Sequence[Lesson],
    *,
    steps: int,
    batch_size: int = 8,
    end_temperature: float = 0.001,
    decode: bool = False,
    loss: Callable[..., dict[str, Tensor]] = response_loss,
    **options,
) -> list[dict[str, float]]:
    """Train a fuser on responses, with what is published as defaults. The two models are frozen, and stay so.

    The rate rises over a tenth of the steps to 1e-4 and falls linearly to 0; weight decay is 0.01,
    gradients are clipped at 1. The temperature of the gates falls from 1 to `end_temperature`, by
    the same factor each step.

    Args:
        receiver, sharer: on the device that `fit` trains on.
        decode: also fuse the first part of each response, drawn anew for each batch, for use in
            speculative decoding; both models must have the same tokens.
        loss: `response_loss`, or `rehearsal_loss` for prompts with blanks.
        options: of `kvlab.training.fit`: learning_rate, checkpoint, precision, seed, ...

    Returns:
        The history of `fit`, with the loss, and "open", the share of open gates, each `every` steps
        and at the end.
    """
    require(end_temperature > 0, f"end_temperature is {end_temperature}, expected more than 0.")
    alike = not decode or all(lesson.prompt.shares is None for lesson in lessons)
    require(
        alike,
        "Some prompts have other tokens for the sharer, and what was said cannot be fused: leave decode out.",
    )
    for model in (receiver, sharer):
        model.requires_grad_(False).eval()
    fuser.trained_for = {"receiver": fingerprint(receiver), "sharer": fingerprint(sharer)}

    def cool(step: int) -> dict[str, float]:
        fuser.temperature = end_temperature ** ((step - 1) / max(1, steps - 1))
        return {}

    def losses(fuser: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rest = batch["input_ids"].shape[1] - _prompt_columns(batch)
        more = {"said": int(torch.randint(rest - 1, ()))} if decode else {}
        return loss(fuser, receiver, sharer, batch, **more)

    loader = DataLoader(
        lessons, batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=collate
    )
    options = {
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "betas": (0.9, 0.999),
        "warmup": steps // 10,
        "decay": 0.9,
        "weight": lambda batch: batch["weights"].sum(),
        "evaluate": lambda fuser: {"open": fuser.open_gates().float().mean().item()},
    } | options
    # `factors` is asked as each step begins, also after a resume, so the temperature is the step's own.
    return fit(fuser, loader, losses, steps=steps, on_step=cool, **options)
