"""The Cache-to-Cache (C2C) fuser: a receiver's KV cache, changed by a sharer's of the same text.

Sharer and receiver read the same prompt. For each receiver layer, one network for keys and one for
values reads the entries that both models have of a token, and proposes a change to the receiver's
entry. A weight per head and token scales the change; a gate per network passes or blocks it. Both
models are frozen: only the fuser is trained.

Source: Fu et al. (2025), Cache-to-Cache, arXiv 2510.03215, and its code. The published code differs
from the defaults here in three places, and each can be chosen:

- keys. It fuses keys as they are stored, rotated, so the fuser must learn every position anew, and
  two texts must start at the same position. Here keys are un-rotated first, and the change is
  rotated afterwards (`Settings.keys`).
- noise. It trains gates with Gumbel noise: a gate of logit 0 is then open with probability
  1 - 1/e = 0.632 in training, and closed at inference. With logistic noise it is open with
  probability sigma(logit), above 1/2 exactly where it is open at inference (`Settings.noise`).
- tokens. Of the sharer's tokens that spell one receiver token it keeps one
  (`align_tokens(longest=True)`). Here all count, weighted by their common characters.

`rehearsal_loss` and fusing the tokens of a response are additions of this package. Batches are
padded on the left. The gates of an untrained fuser are closed: in evaluation mode it returns the
receiver's cache, bit for bit.

>>> from kvlab import lab
>>> receiver, sharer = lab.load("lab-draft"), lab.load("lab-target")
>>> fuser = Fuser(Size.of(receiver.config), Size.of(sharer.config), settings=Settings(hidden=64))
>>> ids = lab.load_tokenizer("lab-draft")("Anna lives in Rome.", return_tensors="pt").input_ids
>>> prefix = kv.prefill(receiver, ids)
>>> fused = fuser(prefix, kv.prefill(sharer, ids))
>>> torch.equal(kv.to_tensor(fused), kv.to_tensor(prefix.cache))
True
"""

import json
import pickle
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import DynamicCache, PreTrainedConfig
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from kvlab import cache as kv
from kvlab.files import naming, read_json, read_tensors, write_tensors, write_text
from kvlab.generation import rendered
from kvlab.layers import LayerMap, first_aligned, last_aligned, proportional, ridge
from kvlab.losses import cross_entropy
from kvlab.models import CacheError, differences, fingerprint, head_dim
from kvlab.training import FitSettings, fit, require_least

NOISES = {"logistic": torch.logit, "gumbel": lambda u: -(-u.log()).log()}  # u is uniform in (0, 1)
LAYER_MAPS = {"last": last_aligned, "proportional": proportional, "first": first_aligned}
CONTENT_MARK = "\ue000"  # replaces a message's content, to find where a chat template puts it
VERSION_1_NAMES = {"enter": "input_proj", "shared": "shared_mlp", "project": "value_mlp",
                   "weigh": "weight_mlp", "change": "value_out",
                   "weight": "weight_out"}  # fmt: skip
PUBLISHED = "nics-efc/C2C_Fuser"  # on the hub, a folder for each pair of models
PUBLISHED_NAMES = {"input_proj": "in", "shared_mlp": "mlp1.blocks.0", "value_out": "proj_out",
                   "value_mlp": "proj_mlp2.blocks.0", "weight_mlp": "scalar_mlp2.blocks.0",
                   "weight_out": "scalar_head", ".norm": ".norm.weight", ".up.": ".w1.",
                   ".down.": ".w2."}  # fmt: skip
PUBLISHED_DEFAULTS = {"source_num_heads": 1, "target_num_heads": 1, "intermediate_dim": 1024,
                      "hidden_dim": 1024, "num_layers": 3, "dropout": 0.1}  # fmt: skip
Batch = Mapping[str, Tensor]
Messages = Sequence[Mapping[str, str]]  # {"role", "content"}


# -- tokens


@dataclass(frozen=True, eq=False)
class Aligned:
    """One text in the tokens of both models.

    Args:
        receiver_ids, sharer_ids: (T_r,) and (T_s,).
        token_weights: (T_r, T_s), the weights of the sharer's tokens for each receiver token. A row
            sums to 1, or to 0 if no sharer token matches. None if both models have the same tokens.
    """

    receiver_ids: Tensor
    sharer_ids: Tensor
    token_weights: Tensor | None = None

    def __post_init__(self):
        if self.token_weights is None and not torch.equal(self.receiver_ids, self.sharer_ids):
            raise ValueError("The sharer has other tokens: give token_weights (`align_tokens`).")


def align_tokens(
    receiver: Tokenizer, sharer: Tokenizer, conversation: Messages, longest: bool = False
) -> Aligned:
    """Encode a conversation for both models, and align the tokens by the characters they spell.

    If both chat templates render the same text, all of it is aligned. Otherwise only the contents
    of the messages are: the templates' own tokens get no counterpart. If both tokenizers cut the
    text in the same places, tokens correspond one to one.

    Args:
        receiver, sharer: the tokenizers of the two models.
        conversation: {"role", "content"} messages.
        longest: Of the sharer's tokens that overlap a receiver token keep one, the first with the
            largest overlap, as in the published code. Default: all, weighted by common characters.

    Raises:
        ValueError: the chat template changes the content of a message.

    Example:
        >>> from kvlab import lab
        >>> tokenizers = lab.load_tokenizer("lab-draft"), lab.load_tokenizer("lab-teacher")
        >>> aligned = align_tokens(*tokenizers, [{"role": "user", "content": "eggs"}])
        >>> [tokenizers[1].decode(i) for i in aligned.sharer_ids], aligned.token_weights[1, :3]
        (['<|user|>', ' e', 'g', 'g', 's', '<|assistant|>'], tensor([0.0000, 0.4000, 0.2000]))
    """
    text, ids, spans = _encode_spans(receiver, conversation)
    sharer_text, sharer_ids, sharer_spans = _encode_spans(sharer, conversation)
    if text == sharer_text and np.array_equal(spans, sharer_spans):
        weights = None if torch.equal(ids, sharer_ids) else torch.eye(len(ids))
        return Aligned(ids, sharer_ids, weights)
    if text != sharer_text:
        spans = _message_offsets(receiver, conversation, text)[spans]
        sharer_spans = _message_offsets(sharer, conversation, sharer_text)[sharer_spans]
    starts = np.maximum(spans[:, None, 0], sharer_spans[:, 0])
    ends = np.minimum(spans[:, None, 1], sharer_spans[:, 1])
    common = torch.from_numpy((ends - starts).clip(min=0)).float()  # (T_r, T_s), in characters
    if longest:
        best = common.argmax(1, keepdim=True)
        common = torch.zeros_like(common).scatter(1, best, common.gather(1, best).sign())
    return Aligned(ids, sharer_ids, common / common.sum(1, keepdim=True).clamp(min=1))


def _encode_spans(tokenizer: Tokenizer, conversation: Messages) -> tuple[str, Tensor, np.ndarray]:
    """The rendered text, its token ids (T,), and the start and end of each token in it, (T, 2)."""
    text = rendered(tokenizer, conversation)
    special = not tokenizer.chat_template
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    spans = np.array(encoded["offset_mapping"]).reshape(-1, 2)
    return text, torch.tensor(encoded["input_ids"]), spans


def _message_offsets(tokenizer: Tokenizer, conversation: Messages, text: str) -> np.ndarray:
    """The number of message characters before each index of the rendered text, (len(text) + 1,)."""
    inside = np.zeros(len(text) + 1, dtype=np.int64)
    for i, message in enumerate(conversation):
        content = message["content"].strip()
        marked = [*conversation[:i], {**message, "content": CONTENT_MARK}, *conversation[i + 1 :]]
        mark = rendered(tokenizer, marked).find(CONTENT_MARK)
        start = text.find(content, max(mark, 0))
        if mark < 0 or start < 0 or text[mark:start].strip():
            raise ValueError(
                f"The template changes message {i} ({content[:40]!r}): use another one."
            )
        inside[start + 1 : start + 1 + len(content)] = 1
    return inside.cumsum()


# -- the fuser


class Size(NamedTuple):
    """The part of a model's configuration that a fuser depends on."""

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
        return cls(config.num_hidden_layers, config.num_key_value_heads, head_dim(config))


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of a fuser.

    Args:
        hidden: Width of the hidden layers.
        dropout: Dropout rate in each block.
        keys: "unrotated", or "rotated" as in the published code.
        noise: Of the gates in training: "logistic", or "gumbel" as in the published code.
        gate: Initial logit of the gates. Published: 0, where noise closes about half of them in
            training.
        use_sharer: False replaces the sharer's features by zeros. This is the parameter-matched
            control: the same number of parameters, without the sharer's information.
        rank: None is C2C. A number replaces the networks of a layer by one linear map of this rank
            from keys and values of both models to the change of both, which starts at zero:
            `hidden` and `dropout` are without effect. In the spirit of Latent Cache Flow, arXiv
            2605.22863, which has a few percent of C2C's parameters.
        blocks: Number of blocks before the projection. Some published fusers have more than one.
        inner: Width inside the blocks of projections. Default: `hidden`.
    """

    hidden: int = 1024
    dropout: float = 0.1
    keys: Literal["unrotated", "rotated"] = "unrotated"
    noise: Literal["logistic", "gumbel"] = "logistic"
    gate: float = 0.0
    use_sharer: bool = True
    rank: int | None = None
    blocks: int = 1
    inner: int | None = None

    def __post_init__(self):
        choices = self.keys in ("unrotated", "rotated") and self.noise in NOISES
        if not choices or self.hidden < 1 or not 0 <= self.dropout < 1:
            expected = (
                f"hidden from 1, dropout in [0, 1), noise of {list(NOISES)}, keys (un)rotated"
            )
            raise ValueError(f"The settings are {self}, expected {expected}.")


class StackedLinear(nn.Module):
    """One linear map per network, all in one product: (n, N, inputs) -> (n, N, outputs)."""

    def __init__(self, networks: int, inputs: int, outputs: int, bias: bool = True):
        super().__init__()
        bound = inputs**-0.5  # the initialization of nn.Linear
        self.weight = nn.Parameter(torch.empty(networks, inputs, outputs).uniform_(-bound, bound))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(networks, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        product = torch.bmm(x, self.weight)
        return product if self.bias is None else product + self.bias[:, None]


class StackedMLP(nn.Module):
    """x + Dropout(W2 GELU(W1 RMSNorm(x))) per network, without biases."""

    def __init__(self, networks: int, width: int, inner: int, dropout: float):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(networks, width))
        self.dropout = nn.Dropout(dropout)
        self.up = StackedLinear(networks, width, inner, bias=False)
        self.down = StackedLinear(networks, inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.norm[:, None]
        return x + self.dropout(self.down(F.gelu(self.up(normed))))


class Fuser(nn.Module):
    """A C2C fuser from a sharer to a receiver.

    A new fuser is in evaluation mode with closed gates. Training draws soft gates at `temperature`;
    evaluation opens the gates with a logit above 0. All 2 L networks (keys and values of each
    receiver layer, in this order) are computed in the same few products.

    Args:
        receiver, sharer: sizes of the two models. The receiver as its own sharer is the self-fusion
            control: the same parameters, no new information.
        layer_map: one or more sharer layers per receiver layer, of which the network reads the
            weighted mean. Default: `last_aligned`.
        settings: default `Settings()`.

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
        if layer_map is None:
            layer_map = last_aligned(receiver.layers, sharer.layers)
        shape = len(layer_map.indices), layer_map.teacher_layers
        expected = receiver.layers, sharer.layers
        if shape != expected:
            raise ValueError(f"The layer map is for {shape} layers, expected {expected}.")
        self.receiver, self.sharer = receiver, sharer
        self.layer_map, self.settings = layer_map, settings
        networks, hidden = 2 * receiver.layers, settings.hidden
        width = receiver.heads * receiver.head_dim
        inputs = sharer.heads * sharer.head_dim + width
        if settings.rank is not None:
            self.input_proj = StackedLinear(receiver.layers, 2 * inputs, settings.rank, bias=False)
            self.value_out = StackedLinear(receiver.layers, settings.rank, 2 * width)
            for parameter in self.value_out.parameters():
                nn.init.zeros_(parameter)
        else:
            block = partial(StackedMLP, networks, hidden, dropout=settings.dropout)
            inner = settings.inner or hidden
            self.input_proj = StackedLinear(networks, inputs, hidden)
            self.shared_mlp = block(inner)
            self.value_mlp = block(inner)
            self.weight_mlp = block(hidden)
            self.value_rest = nn.Sequential(*(block(inner) for _ in range(settings.blocks - 1)))
            self.value_out = StackedLinear(networks, hidden, width)
            self.weight_out = StackedLinear(networks, hidden, receiver.heads)
        self.gate_logit = nn.Parameter(torch.full((networks,), settings.gate))
        self.temperature = 1.0
        self.trained_for: dict[str, dict] = {}  # fingerprints of "receiver" and "sharer"
        self.eval()

    def forward(
        self, receiver: kv.Prefix, sharer: kv.Prefix, token_weights: Tensor | None = None
    ) -> DynamicCache:
        """Fuse the sharer's entries into a copy of the receiver's cache.

        Args:
            receiver, sharer: the same B texts, T_r and T_s tokens with padding; `positions` and
                `rotary` set, as `prefill` does.
            token_weights: (B, T_r, T_s), the weights of the sharer's tokens for each receiver token
                (`align_tokens`). A row of zeros leaves a token unchanged. Default: both models have
                the same tokens, in the same columns.

        Returns:
            A cache in the dtype and at the positions of the receiver's. Entries that a gate, a
            weight or a mask excludes keep the receiver's bits.
        """
        for prefix, size in ((receiver, self.receiver), (sharer, self.sharer)):
            layers, _, heads, _, width = kv.shape_of(prefix.cache)
            cache = Size(layers, heads, width)
            if cache != size:
                raise CacheError(f"A cache has {cache}, the fuser {size}: receiver first.")
        weight, keys = self.input_proj.weight, self.settings.keys
        mean = mapped_entries(sharer, self.layer_map, keys, weight)
        if token_weights is not None:
            mean = token_weights.to(weight) @ mean
        if not self.settings.use_sharer:
            mean = torch.zeros_like(mean)
        features = torch.cat((mean, entries(receiver, keys).to(weight)), -1)  # (L, 2, B, T, W)
        change = self._changes(features.flatten(0, 1).flatten(1, 2))  # (2 L, B T, H d)
        change = change.view(*features.shape[:-1], self.receiver.heads, -1).transpose(3, 4)
        stored = kv.to_tensor(receiver.cache)  # (L, 2, B, H, T, d)
        changed = (self.gate_logit > 0).view(-1, 2, 1, 1, 1, 1)
        if self.training:
            change = change * self._gates((*stored.shape[:5], 1)).to(change)
            changed = torch.ones_like(changed)
        if keys == "unrotated":  # rotation is linear: stored keys stay as they are
            rotated = kv.rotate(kv.from_tensor(change), receiver.positions, receiver.rotary)
            change = kv.to_tensor(rotated)
        if receiver.attention_mask is not None:
            changed = changed & (receiver.attention_mask > 0)[:, None, :, None]
        if token_weights is not None:
            changed = changed & (token_weights.sum(-1) > 0).to(changed.device)[:, None, :, None]
        return kv.from_tensor(torch.where(changed, stored + change.to(stored), stored))

    def _changes(self, features: Tensor) -> Tensor:
        """The changes behind open gates, (2 L, N, H d), from features (2 L, N, W_s + H d)."""
        if self.settings.rank is not None:
            layers = features.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)  # (L, N, 2 W)
            change = self.value_out(self.input_proj(layers)).unflatten(-1, (2, -1))
            return change.transpose(1, 2).flatten(0, 1)
        x = self.shared_mlp(self.input_proj(features))
        value = self.value_out(self.value_rest(self.value_mlp(x)))
        value = value.unflatten(-1, (self.receiver.heads, -1))
        weight = self.weight_out(self.weight_mlp(x)).sigmoid()  # (2 L, N, H)
        return (weight[..., None] * value).flatten(2)

    def _gates(self, shape: Sequence[int]) -> Tensor:
        """Soft gates sigma((logit + noise) / temperature), drawn per row, head and token."""
        u = torch.rand(*shape, device=self.gate_logit.device).clamp(1e-6, 1 - 1e-6)
        logits = self.gate_logit.float().view(-1, 2, *[1] * (len(shape) - 2))
        return ((logits + NOISES[self.settings.noise](u)) / self.temperature).sigmoid()

    def gate_logits(self) -> Tensor:
        """The logit of every gate, (L, 2), keys before values. A gate is open above 0."""
        return self.gate_logit.detach().view(-1, 2).cpu()

    def num_parameters(self) -> int:
        """Count the parameters."""
        return sum(p.numel() for p in self.parameters())

    def warn_of_others(self, receiver: Model, sharer: Model) -> None:
        """Warn if the fuser was trained for other models than these."""
        for who, model in (("receiver", receiver), ("sharer", sharer)):
            current = fingerprint(model)
            saved = self.trained_for.get(who, current)
            if saved["weights"]["dtype"] != current["weights"]["dtype"]:
                saved = saved | {"weights": current["weights"]}  # rounding changes the digest
            if difference := differences(saved, current):
                warnings.warn(f"The fuser is for another {who} ({difference}).", stacklevel=2)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write fuser.safetensors and fuser.json (sizes, layer map, settings, fingerprints)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "fuser.safetensors", self.state_dict(), {"format": "pt"})
        indices, weights, _ = self.layer_map
        config = {
            "version": 2,
            "receiver": self.receiver._asdict(),
            "sharer": self.sharer._asdict(),
            "layer_map": {"indices": indices.tolist(), "weights": weights.tolist()},
            "settings": asdict(self.settings),
            "trained_for": self.trained_for,
        }
        return write_text(folder / "fuser.json", json.dumps(config, indent=1) + "\n").parent

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Fuser":
        """Read the files of `save_pretrained`, onto the CPU, in the file's dtype.

        A folder that was published with the paper is read too: projector_config.json, and
        projector_0.pt, projector_0.json and so on, in it or in "final" inside. It fuses rotated
        keys, and was trained to fuse prompts only. The highest layers in the configuration are
        taken for the last ones of the models.

        Args:
            folder: a local folder; one on the hub, "nics-efc/C2C_Fuser:NAME"; or NAME alone, such
                as "qwen3_0.6b+qwen2.5_0.5b_Fuser", for the same one.
        """
        folder = _find_folder(folder)
        if (folder / "projector_config.json").is_file():
            return _read_published(folder)
        config = read_json(folder / "fuser.json")
        state = read_tensors(folder / "fuser.safetensors")
        version = config.get("version")
        if version not in (1, 2):
            raise ValueError(f"{folder} has a fuser of version {version}, expected 1 or 2.")
        if version == 1:
            config["settings"]["use_sharer"] = config["settings"].pop("sharer_seen")
            renamed = {}
            for name, tensor in state.items():
                module, _, rest = name.partition(".")
                if rest.endswith(("bias", "norm")):  # flat: one row per network
                    tensor = tensor.view(2 * config["receiver"]["layers"], -1)
                renamed[f"{VERSION_1_NAMES[module]}.{rest}" if rest else name] = tensor
            state = renamed
        receiver, sharer = Size(**config["receiver"]), Size(**config["sharer"])
        indices = torch.tensor(config["layer_map"]["indices"])
        weights = torch.tensor(config["layer_map"]["weights"], dtype=torch.float64)
        layer_map = LayerMap(indices, weights, sharer.layers)
        fuser = cls(receiver, sharer, layer_map, Settings(**config["settings"]))
        fuser.load_state_dict(state, assign=True)
        fuser.trained_for = config["trained_for"]
        return fuser.requires_grad_(True)


def _find_folder(name: str | Path) -> Path:
    """The local folder of a fuser, which is downloaded if it is on the hub."""
    folder = Path(name)
    repository, _, inside = str(name).rpartition(":")
    if not repository and inside.endswith("_Fuser") and "/" not in inside:
        repository = PUBLISHED
    if repository and not folder.exists():
        try:
            folder = Path(snapshot_download(repository, allow_patterns=f"{inside}/*")) / inside
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            sentence = f"{name} is no folder here, and not to be had from the hub ({reason})"
            raise ValueError(f"{sentence}: give a folder, or REPOSITORY:FOLDER.") from error
    final = folder / "final"
    return final if (final / "projector_config.json").is_file() else folder


def _read_published(folder: Path) -> Fuser:
    """Read a folder of the published code; of several projectors for a layer the first is used."""
    place = folder / "projector_config.json"
    config = read_json(place)
    with naming(place):
        pairs = [layers for sharers in config.values() for layers in sharers.values()]
        if len(pairs) != 1 or not any(pairs[0].values()):
            raise ValueError(f"it is for {len(pairs)} pairs of models, expected one with layers")
        used = {int(layer): sources[0] for layer, sources in pairs[0].items() if sources}
        indices = torch.tensor([used.get(i, (0,))[:1] for i in range(max(used) + 1)])
        projectors = {i: used[i][1] for i in used}
    read = {index: _read_projector(folder, index) for index in set(projectors.values())}
    options = [options for options, _ in read.values()]
    if options.count(options[0]) < len(options):
        raise ValueError(f"The projectors of {folder} differ in size, expected one size.")
    *models, blocks, inner, hidden, dropout = options[0]
    receiver, sharer = Size(len(indices), *models[:2]), Size(int(indices.max()) + 1, *models[2:])
    settings = Settings(hidden, dropout, "rotated", "gumbel", blocks=blocks, inner=inner)
    layer_map = LayerMap(indices, torch.ones(indices.shape).double(), sharer.layers)
    with torch.device("meta"):
        fuser = Fuser(receiver, sharer, layer_map, settings)
    state, names = {}, {f"value_rest.{i}": f"proj_mlp2.blocks.{i + 1}" for i in range(blocks - 1)}
    for name, parameter in fuser.named_parameters():
        published, rows = name, []
        for ours, theirs in (PUBLISHED_NAMES | names).items():
            published = published.replace(ours, theirs)
        for network in range(len(parameter)):
            index, kind = projectors.get(network // 2), ("key", "value")[network % 2]
            if index is None:  # a layer without a projector: its gate stays closed
                rows.append(torch.zeros(parameter.shape[1:]))
                continue
            with naming(folder / f"projector_{index}.pt"):
                row = read[index][1][f"{kind}_{published}"]
                row = row.T if row.ndim == 2 else row
                if row.shape != parameter.shape[1:]:
                    shapes = f"{[*row.shape]}, expected {[*parameter.shape[1:]]} of its JSON file"
                    raise ValueError(f"{kind}_{published} is {shapes}")
                rows.append(row)
        state[name] = torch.stack(rows)
    fuser.load_state_dict(state, assign=True)
    return fuser.requires_grad_(True)


def _read_projector(folder: Path, index: int) -> tuple[tuple, dict[str, Tensor]]:
    """Sizes and weights of a published projector."""
    place = folder / f"projector_{index}.json"
    config = read_json(place)
    with naming(place):
        if config["class"] != "C2CProjector":
            raise ValueError(f"its class is {config['class']}, expected C2CProjector")
        options = PUBLISHED_DEFAULTS | config["init_args"]
        names = "target_num_heads target_dim source_num_heads source_dim".split()
        sizes = *(options[name] for name in names), options["num_layers"] - 2
        sizes += options["intermediate_dim"], options["hidden_dim"], options["dropout"]
    place = place.with_suffix(".pt")
    with naming(place):
        try:
            return sizes, torch.load(place, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"it is no file of tensors ({error})") from error


def entries(prefix: kv.Prefix, keys: str = "unrotated") -> Tensor:
    """Return keys ("unrotated" or "rotated") and values, heads side by side, (L, 2, B, T, H d)."""
    cache = prefix.cache
    if keys == "unrotated":
        cache = kv.unrotate(cache, prefix.positions, prefix.rotary)
    return kv.to_tensor(cache).transpose(3, 4).flatten(4)


def mapped_entries(prefix: kv.Prefix, layer_map: LayerMap, keys: str, like: Tensor) -> Tensor:
    """The `entries` of the layers of a map, the weighted mean for each, (L, 2, B, T, H d)."""
    layers = layer_map.indices  # (L, k)
    picked = kv.pick_layers(prefix.cache, layers.flatten().tolist())
    picked = entries(replace(prefix, cache=picked), keys).to(like).unflatten(0, layers.shape)
    return torch.einsum("lk,lk...->l...", layer_map.weights.to(like), picked)


@torch.no_grad()
def ridge_fuser(
    receiver: Model,
    sharer: Model,
    texts: Iterable[Tensor],
    layer_map: LayerMap | None = None,
    strength: float = 1e-3,
    mix: float = 1.0,
) -> Fuser:
    """Fit linear maps from the sharer's entries to the receiver's in closed form, without training.

    Each layer has a map for keys (un-rotated) and one for values, with a constant. What the
    receiver has read of the same tokens is the target, so on texts that both have read the mapped
    entries bring no news. They do where the receiver has read less than the sharer.

    Args:
        receiver, sharer: models with the same tokenizer.
        texts: token ids (T,).
        layer_map: default `last_aligned`.
        strength: of the ridge, relative to the mean of the diagonal of X'X.
        mix: fraction of each entry that is mapped; 1 replaces the receiver's entries.

    Returns:
        A `Fuser` of full rank: the change is mix times (mapped entry minus receiver's entry).
    """
    sizes = Size.of(receiver.config), Size.of(sharer.config)
    width, other = (size.heads * size.head_dim for size in sizes)
    fuser = Fuser(*sizes, layer_map, Settings(rank=2 * width, gate=1.0))
    products = 0
    for ids in texts:
        pair = [kv.prefill(model, ids[None].to(model.device)) for model in (receiver, sharer)]
        y = entries(pair[0]).flatten(2, 3).double()
        x = mapped_entries(pair[1], fuser.layer_map, "unrotated", y).flatten(2, 3)
        x = F.pad(x, (0, 1), value=1.0)  # the constant
        products = products + x.mT @ torch.cat((x, y), -1)
    maps = mix * ridge(*products.split((other + 1, width), -1), strength).cpu()
    projection = fuser.input_proj.weight.zero_().unflatten(1, (2, -1)).unflatten(-1, (2, -1))
    fuser.value_out.weight.copy_(torch.eye(2 * width))
    for part in (0, 1):  # keys, values
        projection[:, part, :other, part] = maps[:, part, :-1]
        projection[:, part, other:, part] = -mix * torch.eye(width)
    fuser.value_out.bias.copy_(maps[:, :, -1].flatten(1))
    for who, model in (("receiver", receiver), ("sharer", sharer)):
        fuser.trained_for[who] = fingerprint(model)
    return fuser.to(receiver.device)


@torch.no_grad()
def fuse_prompt(fuser: Fuser, receiver: Model, sharer: Model, prompt: Aligned) -> kv.Prefix:
    """Prefill a prompt with both models, and fuse all but its last token.

    The receiver reads the last token afterwards.

    >>> from kvlab import lab
    >>> model, ids = lab.load("lab-draft"), torch.tensor([5, 17, 2, 90])
    >>> fuser = Fuser(Size.of(model.config), Size.of(model.config), settings=Settings(hidden=64))
    >>> fuse_prompt(fuser, model, model, Aligned(ids, ids)).next_position
    3
    """
    ids = prompt.receiver_ids[None, :-1]
    sharer_ids, token_weights = ids, None
    if prompt.token_weights is not None:
        sharer_ids, token_weights = prompt.sharer_ids[None], prompt.token_weights[None, :-1]
    prefix = kv.prefill(receiver, ids.to(receiver.device))
    sharer_prefix = kv.prefill(sharer, sharer_ids.to(sharer.device))
    return replace(prefix, cache=fuser(prefix, sharer_prefix, token_weights), logits=None)


# -- training


class FuserExample(NamedTuple):
    """A prompt for both models, and the response (R,) in the receiver's tokens."""

    prompt: Aligned
    response: Tensor

    @classmethod
    def split(cls, input_ids: Tensor, start: int) -> "FuserExample":
        """Split a text (T,), the same tokens for both models, where the response starts."""
        return cls(Aligned(input_ids[:start], input_ids[:start]), input_ids[start:])


def pad_fuser_batch(examples: Sequence[FuserExample]) -> dict[str, Tensor]:
    """Make a batch: prompts padded on the left, then responses padded on the right.

    Returns:
        A dict. `input_ids` and `attention_mask` are (B, P + 1 + R), the receiver's; all but the last
        of the P + 1 prompt columns are fused. `weights` is (B, R), 1 for tokens of a response.
        `sharer_ids` and `sharer_mask` are (B, S), and `token_weights` is (B, P, S): they are absent
        if both models have the same tokens in all prompts.
    """
    prompts = [example.prompt for example in examples]
    prompt_ids, prompt_mask = _pad_with_mask([p.receiver_ids for p in prompts], "left")
    response_ids, response_mask = _pad_with_mask([e.response for e in examples], "right")
    batch = {"input_ids": torch.cat((prompt_ids, response_ids), 1)}
    batch["attention_mask"] = torch.cat((prompt_mask, response_mask), 1)
    batch["weights"] = response_mask.float()
    if all(prompt.token_weights is None for prompt in prompts):
        return batch
    sharer_ids, sharer_mask = _pad_with_mask([p.sharer_ids for p in prompts], "left")
    batch |= {"sharer_ids": sharer_ids, "sharer_mask": sharer_mask}
    shape = len(prompts), prompt_ids.shape[1] - 1, sharer_ids.shape[1]
    batch["token_weights"] = torch.zeros(shape)
    for row, prompt in zip(batch["token_weights"], prompts, strict=True):
        weights = prompt.token_weights
        if weights is None:
            weights = torch.eye(len(prompt.receiver_ids))
        row[-len(weights) + 1 :, -weights.shape[1] :] = weights[:-1]
    return batch


def _pad_with_mask(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Stack rows of ids with padding on one side; and their mask."""
    ids = nn.utils.rnn.pad_sequence(list(rows), True, padding_value=-1, padding_side=side)
    return ids.clamp(min=0), (ids >= 0).long()


def response_loss(
    fuser: nn.Module, receiver: Model, sharer: Model, batch: Batch, fused_response_tokens: int = 0
) -> dict[str, Tensor]:
    """Next-token cross-entropy "ce" of responses, given fused prompts.

    Args:
        batch: as `pad_fuser_batch` makes it.
        fused_response_tokens: the number of columns (the prompt's last, then the first ones of the
            response) whose entries are fused too before the receiver reads the rest, as
            `FusedProposer` fuses accepted tokens. Both models must have the same tokens.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    token_weights = batch.get("token_weights")
    if fused_response_tokens and token_weights is not None:
        raise ValueError("The sharer has other tokens: set fused_response_tokens to 0.")
    columns = ids.shape[1]
    fused = columns - batch["weights"].shape[1] - 1
    middle = fused + fused_response_tokens
    positions = mask.cumsum(1) - 1
    with torch.no_grad():
        prefix = kv.prefill(receiver, ids[:, :fused], attention_mask=mask[:, :fused])
        if token_weights is None:
            sharer_mask = mask[:, :middle].clone()
            sharer_mask[:, fused:] = 1  # no token attends to padding on its right
            sharer_prefix = kv.prefill(sharer, ids[:, :middle], attention_mask=sharer_mask)
            sharer_prompt = kv.part(sharer_prefix, 0, fused)
        else:
            other_ids, other_mask = batch["sharer_ids"], batch["sharer_mask"]
            sharer_prompt = kv.prefill(sharer, other_ids, attention_mask=other_mask)
    cache = fuser(prefix, sharer_prompt, token_weights)
    logits = []
    for start, stop in pairwise(sorted({fused, middle, columns})):
        inputs = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
        out = receiver(**inputs, attention_mask=mask[:, :stop], past_key_values=cache)
        logits.append(out.logits)
        if stop < columns:
            cache = out.past_key_values
            grown = replace(prefix, cache=cache, positions=positions, attention_mask=mask)
            response = fuser(kv.part(grown, start, stop), kv.part(sharer_prefix, start, stop))
            cache = kv.join(kv.truncate(cache, start), response)
    weights = F.pad(batch["weights"], (1, 0))  # the prompt's last token is not predicted
    return {"ce": cross_entropy(torch.cat(logits, 1), ids[:, fused:], weights)}


def rehearsal_loss(
    fuser: nn.Module, receiver: Model, sharer: Model, batch: Batch
) -> dict[str, Tensor]:
    """Distance of the fused cache from the receiver's cache of the text that only the sharer read.

    For prompts in which the receiver reads blanks: `Aligned(ids with blanks, ids, torch.eye(T))`.
    Every entry gives a training signal, where a response gives one per token. The loss "fvu" is the
    fraction of variance unexplained: the squared error of keys (un-rotated) and values over their
    variance, averaged over layers. 0 is an exact copy, 1 is no better than the mean.

    Args:
        batch: as `pad_fuser_batch` makes it.
    """
    fused = batch["token_weights"].shape[1]
    ids, mask = batch["input_ids"][:, :fused], batch["attention_mask"][:, :fused]
    sharer_ids, sharer_mask = batch["sharer_ids"], batch["sharer_mask"]
    if sharer_ids.shape[1] != fused + 1:
        raise ValueError("The prompts differ in length: let them differ in blanks only.")
    with torch.no_grad():
        prefix = kv.prefill(receiver, ids, attention_mask=mask)
        sharer_prefix = kv.prefill(sharer, sharer_ids, attention_mask=sharer_mask)
        expected = kv.prefill(receiver, sharer_ids[:, :fused], attention_mask=mask)
        expected = entries(expected)[:, :, mask > 0].float()  # (L, 2, tokens, H d)
    cache = fuser(prefix, sharer_prefix, batch["token_weights"])
    error = entries(replace(prefix, cache=cache))[:, :, mask > 0].float() - expected
    return {"fvu": (error.square().mean((2, 3)) / expected.var(2).mean(2)).mean()}


@dataclass(frozen=True)
class FuserArm(Settings):
    """A fuser, or a control that shows where its gain comes from, and its training.

    Args:
        control: "none"; "self", the receiver as its own sharer; or "matched", as many parameters
            without the sharer's information.
        layer_map: The sharer's "last" layers for the receiver's, layers at "proportional" depth, or
            its "first" layers.
        decode: Also fuse the first tokens of each response, a number drawn per batch, for use in
            speculative decoding. Both models must have the same tokens.
        steps: Optimizer steps.
        batch_size: Prompts per batch.
        learning_rate: Peak learning rate.
        accumulate: Batches per optimizer step.
        precision: Of the arithmetic in training; the fuser is in float32.
        seed: Random seed (data, initialization, shuffling, gates).
    """

    control: Literal["none", "self", "matched"] = "none"
    layer_map: Literal["last", "proportional", "first"] = "last"
    decode: bool = True
    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 1e-4
    accumulate: int = 1
    precision: Literal["no", "fp16", "bf16"] = "no"
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        require_least(self, steps=1, batch_size=1, accumulate=1, learning_rate=0)

    def train(
        self, receiver: Model, sharer: Model, examples: Sequence, loss=response_loss, **options
    ) -> tuple[Fuser, list[dict[str, float]]]:
        """Make a fuser and train it, by default as published. Both models are frozen.

        The learning rate rises over a tenth of the steps and falls linearly to 0; weight decay is
        0.01, gradients are clipped at 1. The temperature of the gates falls geometrically from 1 to
        0.001.

        Args:
            receiver, sharer: on the device that `fit` trains on.
            examples: of `FuserExample`.
            loss: `response_loss`, or `rehearsal_loss` for prompts with blanks.
            options: of `kvlab.training.fit`: checkpoint, every.

        Returns:
            The fuser, and the history of `fit`, with the loss, and "open", the fraction of open
            gates, every `every` steps and at the end.
        """
        if self.control == "self":
            sharer = receiver
        sizes = Size.of(receiver.config), Size.of(sharer.config)
        layer_map = LAYER_MAPS[self.layer_map](sizes[0].layers, sizes[1].layers)
        settings = Settings(**self._fields_of(Settings))
        if self.control == "matched":
            settings = replace(settings, use_sharer=False)
        torch.manual_seed(self.seed)
        fuser = Fuser(*sizes, layer_map, settings).to(receiver.device)
        for who, model in (("receiver", receiver), ("sharer", sharer)):
            model.requires_grad_(False).eval()
            fuser.trained_for[who] = fingerprint(model)

        def anneal(step: int) -> None:
            fuser.temperature = 0.001 ** ((step - 1) / max(1, self.steps - 1))

        def losses(fuser: nn.Module, batch: Batch) -> dict[str, Tensor]:
            if not self.decode:
                return loss(fuser, receiver, sharer, batch)
            count = int(torch.randint(batch["weights"].shape[1], ()))
            return loss(fuser, receiver, sharer, batch, fused_response_tokens=count)

        loader = DataLoader(
            examples, self.batch_size, shuffle=True, drop_last=True, collate_fn=pad_fuser_batch
        )
        options |= self._fields_of(FitSettings)
        options |= {"betas": (0.9, 0.999), "weight_decay": 0.01}
        options |= {"warmup": self.steps // 10, "decay": 0.9, "on_step": anneal}
        options["weight"] = lambda batch: batch["weights"].sum()
        options["evaluate"] = lambda fuser: {"open": (fuser.gate_logit > 0).float().mean().item()}
        return fuser, fit(fuser, loader, losses, **options)

    def _fields_of(self, settings: type) -> dict:
        """The values of the fields that this arm shares with a dataclass."""
        names = [field.name for field in fields(settings) if hasattr(self, field.name)]
        return {name: getattr(self, name) for name in names}
