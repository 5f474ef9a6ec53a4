"""The lab family: shapes, growth, and loading of the models that ship with kvlab."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

MODELS = Path(__file__).parent / "models"
NAMES = ("lab-target", "lab-draft", "lab-teacher")
EMBEDDER = "lab-embedder"
# Entries of each model's Qwen3Config, beside those that all of them share.
SHAPES = json.loads((Path(__file__).parent / "data" / "shapes.json").read_text("utf-8"))
_SHARED = SHAPES.pop("shared")


def make(name: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A lab model with random weights; `changes` replace entries of its shape.

    Example:
        >>> make("lab-draft").config.num_hidden_layers
        2
    """
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(make_config(name, **changes)).eval()


def make_config(name: str, **changes) -> Qwen3Config:
    """The configuration of a lab model; `changes` replace entries of its shape."""
    return Qwen3Config(**_SHARED | SHAPES[name] | changes)


def grow(model: PreTrainedModel, n_layers: int) -> PreTrainedModel:
    """A deeper copy that computes the same function: copies that add nothing yet follow each layer.

    The copies' two output projections are zero, so they pass the residual stream on and learn from
    the first step.

    Example:
        >>> small, ids = make("lab-draft"), torch.arange(8)[None]
        >>> torch.equal(grow(small, 6)(ids).logits, small(ids).logits)
        True
    """
    old = model.config.num_hidden_layers
    if n_layers % old:
        raise ValueError(f"Cannot grow {old} layers to {n_layers}; expected a multiple of {old}.")
    changes = {"num_hidden_layers": n_layers, "layer_types": None}
    grown = Qwen3ForCausalLM(Qwen3Config(**model.config.to_dict() | changes)).eval()
    copies = n_layers // old
    grown.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    grown.model.norm.load_state_dict(model.model.norm.state_dict())
    for i, layer in enumerate(grown.model.layers):
        layer.load_state_dict(model.model.layers[i // copies].state_dict())
        if i % copies:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return grown


def load_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A trained lab model, or one from the hub or a folder by its name, in evaluation mode.

    Example:
        >>> load_model("lab-target").config.num_hidden_layers
        12
    """
    with _loading(name):
        return AutoModelForCausalLM.from_pretrained(_folder_of(name), dtype=dtype).eval()


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a model, by the model's name.

    Example:
        >>> load_config("lab-target").num_hidden_layers
        12
    """
    with _loading(name):
        return AutoConfig.from_pretrained(_folder_of(name))


def load_embedder(name: str = EMBEDDER, device: str = "cpu") -> torch.nn.Module:
    """A `SentenceTransformer`: the lab's own, or one from the hub by its name.

    Example:
        >>> load_embedder().encode(["What is a hash table?"]).shape
        (1, 128)
    """
    from sentence_transformers import SentenceTransformer  # slow to import

    with _loading(name):
        return SentenceTransformer(str(_folder_of(name)), device=device)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, by the model's name.

    Example:
        >>> load_tokenizer("lab-target")("Anna lives in Paris.").input_ids == []
        False
    """
    with _loading(name):
        return AutoTokenizer.from_pretrained(_folder_of(name))


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Name the model that cannot be loaded: what goes wrong has many kinds, of several packages."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0].removesuffix(".")
        expected = f"expected one of {', '.join(NAMES)}, a folder of a model, or a name on the hub"
        raise ValueError(f"{str(name)!r} cannot be loaded ({reason}): {expected}.") from error


def _folder_of(name: str) -> str | Path:
    return MODELS / name if name in (*NAMES, EMBEDDER) else name
