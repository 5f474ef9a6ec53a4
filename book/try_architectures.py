"""Sort the causal LMs of transformers into those that kvlab reads right and those that it refuses.

python book/try_architectures.py            write book/architectures.md
python book/try_architectures.py --check    write nothing; exit 1 if the page is not current

Each is built small, with random weights and otherwise its default configuration. Those whose default has other
than full attention are tried with full attention in every layer as well.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from kvlab import cache as kv
from kvlab.models import CacheError, first_layers, rotary_of
from kvlab.speculate import generate

PAGE = Path(__file__).with_name("architectures.md")
LAYERS = 4  # layers without rotation come in fours
SIZES = {
    r"(pad|bos|eos)_token_id": 0,
    r".*vocab_size.*|n_vocab": 97,
    r".*(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|depth)": LAYERS,
    r".*num_(key_value|kv)_heads": 2,
    r".*heads?": 4,
    r"qk_(nope|rope)_head_dim": 8,
    r".*head_dim|d_kv": 16,
    r".*(hidden_size|d_model|n_embd|embedding_size|embed_dim|embedding_dim)": 64,
    r".*(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|d_inner)": 64,
    r".*(experts|num_experts)": 4,
    r".*(per_tok|per_token|moe_k|topk|top_k)": 2,
    r".*rank": 8,
}
TEXT = """# Architectures

Which causal LMs of transformers {version} does kvlab read right? Each class below was built small, with random weights and
its default configuration, and was either refused with a sentence or right in all of these: reading in parts, moving a
text by 100 positions (every layer), dropping entries, the first layers alone, and greedy decoding beside a shorter text.
{right} classes are right, {refused} are refused. `python book/try_architectures.py` makes this page.

A checkpoint can differ from the default configuration, so the trial is repeated for every model on its first use; see
`kvlab.models.require_supported`.

| class | result | condition or reason |
|---|---|---|
{rows}

{left} classes could not be built small from their default configuration, and were not tried: {names}.
"""
IDS = torch.randint(1, 97, (1, 12), generator=torch.Generator().manual_seed(3))


def small(config: PreTrainedConfig) -> dict:
    """Return changes that make a configuration small."""
    changes = {}
    for name, value in config.to_dict().items():
        own = getattr(type(config), name, None)
        part = config.__dict__.get(name)
        if isinstance(own, property) and own.fset is None:
            continue
        if name.endswith("layer_types") and value:
            changes[name] = value[:LAYERS]
        elif name == "is_decoder":
            changes[name] = True
        elif isinstance(part, PreTrainedConfig):
            changes[name] = type(part)(**small(part)).to_dict()
        elif name == "rope_parameters" and value is None:
            changes[name] = {"rope_type": "default", "rope_theta": 1e4}
        elif value is None and name == "head_dim":
            changes[name] = 16
        elif name.endswith("_token_id") or type(value) is int:
            size = next((n for pattern, n in SIZES.items() if re.fullmatch(pattern, name)), value)
            changes[name] = min(value, size) if isinstance(value, int) else size
    return changes


def full_attention(config: PreTrainedConfig) -> dict:
    """Return changes that give every layer full attention, where a configuration knows how."""
    changes = {}
    if getattr(config, "layer_types", None):
        changes["layer_types"] = ["full_attention"] * LAYERS
    for name in ("sliding_window", "use_sliding_window"):
        if getattr(config, name, None):
            changes[name] = None if name == "sliding_window" else False
    return changes


def build(name: str, full: bool) -> PreTrainedModel:
    """Return a small model with random weights, in norms too."""
    model_class = getattr(transformers, name)
    config = model_class.config_class()
    changes = small(config) | (full_attention(config) if full else {})
    config = model_class.config_class(**changes)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > 5e6:
        raise ValueError(f"it has {size:,} parameters")
    torch.manual_seed(0)
    model = model_class(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-3 * b.norm())


@torch.no_grad()
def check(model: PreTrainedModel) -> None:
    """Try what the chapters build on; AssertionError for a wrong value."""
    whole, begin = kv.prefill(model, IDS), kv.prefill(model, IDS[:, :8])
    parts = kv.prefill(model, IDS[:, 8:], begin)
    assert near(parts.logits, whole.logits), "continued in parts, logits differ"
    assert near(whole.logits, model(IDS).logits[:, -1]), "logits are not the model's"
    moved = kv.to_tensor(kv.shift(whole.cache, 100, rotary_of(model)))
    there = kv.to_tensor(kv.prefill(model, IDS, position=100).cache)
    for i in range(len(there)):
        assert near(moved[i], there[i]), f"layer {i}, shifted, is not what is read there"
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[0, [1, 4, 5]] = 0
    masked = kv.prefill(model, IDS[:, 8:], kv.Prefix(begin.cache, 8, attention_mask=mask))
    chosen = kv.Prefix(kv.select(begin.cache, mask[0].nonzero()[:, 0]), 8)
    assert near(kv.prefill(model, IDS[:, 8:], chosen).logits, masked.logits), "selection differs"
    first = kv.to_tensor(kv.prefill(first_layers(model, 2), IDS).cache)
    assert near(first, kv.to_tensor(whole.cache)[:2]), "the first layers differ"
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    text = model.generate(IDS, **options)[0, IDS.shape[1] :]
    together = generate(model, [IDS[0], IDS[0, :7]], max_new_tokens=6).tokens[0]
    assert together.equal(text), f"slots decode {together.tolist()}, generate {text.tolist()}"


def outcome(name: str) -> tuple[str, str]:
    """Return "right", "refused", "wrong" or "not built" for a class, and under which condition or why."""
    refusal = ""
    for full in (False, True):
        try:
            model = build(name, full)
        except Exception as error:  # of any kind: each class has checks of its own
            return ("refused", refusal) if refusal else ("not built", type(error).__name__)
        try:
            check(model)
        except CacheError as error:
            refusal = refusal or str(error)
        except Exception as error:  # a crash counts as wrong
            return "wrong", f"{type(error).__name__}: {error}"
        else:
            return "right", "with full attention in every layer" if full else ""
    return "refused", refusal


def outcomes() -> dict[str, tuple[str, str]]:
    """Sort all classes, by name."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        return {name: outcome(name) for name in sorted({*NAMES.values()})}
    finally:
        transformers.logging.set_verbosity(verbosity)


def page(sorted_classes: dict[str, tuple[str, str]]) -> str:
    """Return the page, without what differs between machines (errors in brackets)."""
    rows, counts = [], Counter(result for result, _ in sorted_classes.values())
    for name, (result, why) in sorted_classes.items():
        if result != "not built":
            why = re.sub(r" \(relative error.*?\)| \(\w+: .*\)", "", " ".join(why.split()))
            rows.append(f"| `{name}` | {result} | {why.replace('|', '/')} |")
    left_out = [
        f"`{name}`" for name, (result, _) in sorted_classes.items() if result == "not built"
    ]
    numbers = {"right": counts["right"], "refused": counts["refused"], "left": counts["not built"]}
    version = transformers.__version__
    return TEXT.format(**numbers, version=version, rows="\n".join(rows), names=", ".join(left_out))


def main(check_only: bool) -> None:
    text = page(outcomes())
    if not check_only:
        PAGE.write_text(text, encoding="utf-8")
    elif text != PAGE.read_text(encoding="utf-8"):
        sys.exit("book/architectures.md is not current: run `python book/try_architectures.py`.")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
