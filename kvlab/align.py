"""4D alignment: what a teacher's KV cache would be with the student's tokens, layers, width and heads.

A teacher reads its own text of a problem, in its own tokens. `align_kv` carries its keys and values
over, a step for each dimension: *rotation and head* (keys as before the teacher's rope, KV heads
side by side), *time* (inside prompt, reasoning and answer each, by linear interpolation), *layer*
(a weighted mean of teacher layers), *hidden* (a linear map to the student's width) and *fusion* of
several teachers. What comes out are targets for the student's own features, and by `as_cache` a
cache that the student can read on from.

Batches are padded on the left, as wherever kvlab reads contexts: row b of a batch is its last
borders[b, 3] columns, and the longest row has no padding. Every step carries gradients, and none
reads padding.

>>> from kvlab import cache, lab
>>> from kvlab.similarity import proportional
>>> model, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
>>> problem = {"role": "user", "content": "Anna has 3 eggs. Anna buys 4. How many eggs does Anna have?"}
>>> text = segment(tokenizer, [problem, {"role": "assistant", "content": "3+4=7. Answer: 7"}])
>>> borders, rotary = text.borders[None], cache.rotary_of(model)
>>> read, same = cache.prefill(model, text.input_ids[None]).cache, Projector(64, 64, "identity")
>>> teacher = Teacher(read, positions_of(borders), rotary, plan_time(borders, borders), proportional(12, 12), same)
>>> got, own = align_kv([teacher]), features(read, positions_of(borders), rotary)
>>> torch.equal(got.keys, own.keys), torch.equal(got.values, own.values)
(True, True)
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvlab.cache import from_tensor, prefill, rotate, to_tensor, unrotate
from kvlab.files import write_tensors, write_text
from kvlab.generation import rendered
from kvlab.losses import cross_entropy
from kvlab.models import require, rotary_of
from kvlab.similarity import CKA, STATES, LayerMap
from kvlab.training import fit

SEGMENTS = ("prompt", "reasoning", "answer")
# A bare "answer" or 答案 also stands inside reasoning, so a colon or a verb must follow.
MARKER = (
    r"(?i:\b(?:the\s+)?(?:(?:final|correct)\s+)?answer(?:\s+is\b|\s*[:：]))|####|\\boxed\b"
    r"|(?:(?:因此|所以|故)[,，]?)?(?:最终)?答案(?:应该|应)?\s*(?:是|为|為|[:：])"
)
STARTS = ("xavier", "orthogonal", "identity")
FORMAT_VERSION, WEIGHTS, ABOUT = 1, "projector.safetensors", "projector.json"
SEEN = "seen 1"  # the kind of file that `save_seen` writes
KINDS = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss, "mse": F.mse_loss}


def _expect(step: str, x: Tensor, want: Mapping[str, int | None], hint: str) -> None:
    """Refuse a shape, dimension by dimension; None stands for any size."""
    seen = tuple(x.shape)
    fits = len(seen) == len(want) and all(
        w in (None, s) for s, w in zip(seen, want.values(), strict=True)
    )
    wanted = ", ".join(name if size is None else f"{name}={size}" for name, size in want.items())
    require(fits, f"Step {step}: the shape is {seen}, expected ({wanted}): {hint}.")


# -- segments


class Segmented(NamedTuple):
    """A conversation's token ids (T,), and the borders (4,): segment i is borders[i] <= t < borders[i + 1]."""

    input_ids: Tensor
    borders: Tensor


def segment(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Sequence[Mapping[str, str]],
    marker: str = MARKER,
) -> Segmented:
    """Encode a conversation as `evaluate.encode` does, and find prompt, reasoning and answer from token offsets.

    The prompt ends where the assistant's content begins, the template's header included. The answer
    begins at the last marker in that content, and goes to the end with what closes the turn. Spaces
    before a border (but no line breaks) go with what follows, as words have them in most
    vocabularies. A token belongs to the segment in which it begins, and the tokens of a character
    that takes several all begin where it does.

    Args:
        conversation: {"role", "content"} messages, of which the last is the assistant's solution.
        marker: a regular expression for what opens the answer.

    Raises:
        ValueError: a segment is empty, the tokenizer has no offsets, or the template changes the
            solution.

    Example:
        >>> from kvlab import lab
        >>> tokenizer = lab.load_tokenizer("lab-target")
        >>> messages = [{"role": "user", "content": "Add 1."}, {"role": "assistant", "content": "1+1=2. Answer: 2"}]
        >>> ids, borders = segment(tokenizer, messages)
        >>> [tokenizer.decode(ids[a:b]) for a, b in zip(borders, borders[1:])]
        ['<|user|> Add 1.<|assistant|>', ' 1+1=2.', ' Answer: 2<|end|>']
    """
    name = type(tokenizer).__name__
    require(
        tokenizer.is_fast,
        f"{name} is not a fast tokenizer and has no offsets: load it with use_fast=True.",
    )
    last = conversation[-1]["role"] if conversation else "nobody"
    require(
        last == "assistant",
        f"The last message is by {last!r}, expected the assistant's solution: append it.",
    )
    text, content = rendered(tokenizer, conversation), conversation[-1]["content"].strip()
    start = text.rfind(content)
    seen = f"The chat template changes the assistant's text, which begins {content[:60]!r}"
    require(
        start >= 0,
        f"{seen}: use a tokenizer whose template leaves it, or none (chat_template=None).",
    )
    markers = [start + found.start() for found in re.finditer(marker, content)]
    edges = [len(text[:place].rstrip(" ")) for place in (start, *markers[-1:])]
    encoded = tokenizer(
        text, add_special_tokens=not tokenizer.chat_template, return_offsets_mapping=True
    )
    # A special token that closes a text has offset 0: it begins where the token before it does.
    begins = np.maximum.accumulate([begin for begin, _ in encoded["offset_mapping"]])
    total = len(begins)
    borders = [0, *np.searchsorted(begins, edges).tolist(), *[total] * (3 - len(edges))]
    found = "was found" if markers else "was not found"
    for i in (2, 1, 0):  # without a marker the answer is what is missing
        seen = f"The {SEGMENTS[i]} is empty in a text that begins {content[:60]!r}, where the marker {marker} {found}"
        require(
            borders[i] < borders[i + 1],
            f"{seen}: give all of {', '.join(SEGMENTS)}, or another marker.",
        )
    return Segmented(torch.tensor(encoded["input_ids"]), torch.tensor(borders))


# -- time


class TimePlan(NamedTuple):
    """What each student token is made of, for left-padded batches: a sparse (B, T_s, T_t) with N entries.

    tokens : (N,), b * T_s + i, ascending: the student token.
    columns : (N,), the teacher's column in row b.
    shares : (N,), float64; those of a token add up to 1.
    mask : (B, T_s), False for the student's padding, which has no entry.
    teacher_length : T_t.
    """

    tokens: Tensor
    columns: Tensor
    shares: Tensor
    mask: Tensor
    teacher_length: int


def plan_time(student: Tensor, teacher: Tensor) -> TimePlan:
    """Stretch each of the teacher's segments over the student's: u_i = i (T_t - 1) / (T_s - 1).

    Token i is (1 - f) x[floor(u)] + f x[floor(u) + 1] inside the segment, where f is what u has
    beyond its floor. Both come from division of whole numbers, so first and last tokens map to
    first and last exactly, and no border is crossed. A student segment of one token takes the mean
    of the teacher's segment.

    Args:
        student, teacher: (B, 4), borders of the same problems, as `segment` finds them in each
            one's tokens.

    Example:
        >>> plan = plan_time(torch.tensor([[0, 3, 4, 6]]), torch.tensor([[0, 2, 5, 7]]))
        >>> resample(torch.arange(7.0).view(1, 1, 7, 1), plan).flatten()
        tensor([0.0000, 0.5000, 1.0000, 3.0000, 5.0000, 6.0000])
    """
    student, teacher = _require_borders(student, teacher)
    (i, part, mask, pad), (j, teacher_part, teacher_mask, teacher_pad) = (
        _places(student),
        _places(teacher),
    )
    sizes, teacher_sizes = student.diff(), teacher.diff()  # (B, 3)
    size, teacher_size = (
        sizes.gather(1, part),
        teacher_sizes.gather(1, part),
    )  # of each student token's segment
    steps, gaps = (
        (i - student.gather(1, part)) * (teacher_size - 1),
        (size - 1).clamp(min=1),
    )  # u is steps / gaps
    column, f = (
        teacher.gather(1, part) + teacher_pad + steps // gaps,
        (steps % gaps).double() / gaps,
    )
    two = mask & (size > 1)
    token, alone = (
        _numbers(mask),
        sizes.gather(1, teacher_part) == 1,
    )  # by teacher token: the student has one for all
    only = _numbers(mask)[:, :1] + pad + student.gather(1, teacher_part)
    share, means = 1 / teacher_sizes.gather(1, teacher_part).double(), teacher_mask & alone
    made = [(token[two], column[two], 1 - f[two]), (token[two], column[two] + 1, f[two])]
    return _plan([*made, (only[means], (j + teacher_pad)[means], share[means])], mask, teacher_mask)


def by_index(student: Tensor, teacher: Tensor) -> TimePlan:
    """Give student token i the teacher's token i, or its last, wherever segments are: the baseline.

    >>> by_index(torch.tensor([[0, 1, 2, 4]]), torch.tensor([[0, 1, 2, 3]])).columns
    tensor([0, 1, 2, 2])
    """
    student, teacher = _require_borders(student, teacher)
    (i, _, mask, _), (*_, teacher_mask, pad) = _places(student), _places(teacher)
    column = i.minimum(teacher[:, 3:] - 1) + pad
    return _plan(
        [(_numbers(mask)[mask], column[mask], torch.ones(int(mask.sum())).double())],
        mask,
        teacher_mask,
    )


def _plan(
    entries: Sequence[tuple[Tensor, Tensor, Tensor]], mask: Tensor, teacher_mask: Tensor
) -> TimePlan:
    """Sort entries by token, without those that add nothing (behind the last token of a segment, for one)."""
    tokens, columns, shares = (torch.cat(parts) for parts in zip(*entries, strict=True))
    order = tokens.sort(stable=True).indices
    order = order[shares[order] > 0]
    return TimePlan(tokens[order], columns[order], shares[order], mask, teacher_mask.shape[1])


def _require_borders(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Check borders, and return them on the CPU, where plans are made (some accelerators have no float64)."""
    for name, borders in (("student", student), ("teacher", teacher)):
        _expect(
            "time",
            borders,
            {"B": len(student), "borders": 4},
            f"give the borders of each {name} text",
        )
        wrong = ((borders[:, 0] != 0) | (borders.diff() < 1).any(1)).nonzero().flatten().tolist()
        seen = f"Step time: the {name}'s borders are {borders[wrong[:1]].tolist()} in rows {wrong}"
        require(
            not wrong,
            f"{seen}, expected 0 and larger numbers, so that no segment is empty: use `segment`.",
        )
    return student.cpu(), teacher.cpu()


def _places(borders: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token number and segment of each column (0 in padding), what is no padding, all (B, T), and its size (B, 1)."""
    pad = borders[:, 3].max() - borders[:, 3:]
    place = torch.arange(int(borders[:, 3].max()), device=borders.device) - pad
    part = (place >= borders[:, 1:2]).long() + (place >= borders[:, 2:3])
    return place.clamp(min=0), part, place >= 0, pad


def _numbers(mask: Tensor) -> Tensor:
    return torch.arange(mask.numel()).view(mask.shape)


def positions_of(borders: Tensor) -> Tensor:
    """Return the positions (B, T) of texts that start at 0 and are padded on the left, where they are 0.

    >>> positions_of(torch.tensor([[0, 1, 2, 4], [0, 1, 2, 3]]))
    tensor([[0, 1, 2, 3],
            [0, 0, 1, 2]])
    """
    return _places(borders)[0]


def resample(x: Tensor, plan: TimePlan) -> Tensor:
    """Bring features (B, L, T_t, D) to the student's tokens, (B, L, T_s, D); its padding becomes 0.

    One pass, and no memory beyond the result: a token of a layer is a bag of one or more of the
    teacher's.
    """
    _expect(
        "time",
        x,
        {"B": len(plan.mask), "L": None, "T": plan.teacher_length, "D": None},
        "pad both on the left",
    )
    (rows, layers, length, _), width = x.shape, plan.mask.shape[1]
    layer = torch.arange(layers)[:, None]
    bags = torch.searchsorted(plan.tokens, _numbers(plan.mask).flatten()) + layer * len(
        plan.tokens
    )  # where each starts
    entries = (
        plan.tokens // width * layers + layer
    ) * length + plan.columns  # (L, N), rows of (B L T_t, D)
    entries, bags = (index.flatten().to(x.device) for index in (entries, bags))
    shares = plan.shares.to(x.device, x.dtype).repeat(layers)
    out = F.embedding_bag(entries, x.flatten(0, 2), bags, mode="sum", per_sample_weights=shares)
    return out.view(layers, rows, width, -1).transpose(0, 1)


# -- layer


def mix_layers(x: Tensor, layer_map: LayerMap) -> Tensor:
    """Make each student layer of the teacher layers it is mapped to: (B, L_t, T, D) -> (B, L_s, T, D).

    >>> from kvlab.similarity import proportional
    >>> mix_layers(torch.arange(3.0).view(1, 3, 1, 1), proportional(2, 3)).flatten()
    tensor([0., 2.])
    """
    indices, weights, layers = layer_map
    _expect(
        "layer",
        x,
        {"B": None, "L": layers, "T": None, "D": None},
        "use the map made for this teacher",
    )
    matrix = x.new_zeros(len(indices), layers).scatter_add(1, indices.to(x.device), weights.to(x))
    return (matrix @ x.flatten(2)).unflatten(2, x.shape[2:])


# -- head and rotation


class KV(NamedTuple):
    """Keys, un-rotated, and values, both (B, L, T, H_kv * d): KV heads, not attention heads, side by side."""

    keys: Tensor
    values: Tensor


def merge_heads(x: Tensor) -> Tensor:
    """(B, L, H_kv, T, d) -> (B, L, T, H_kv * d)."""
    _expect(
        "head", x, dict.fromkeys(("B", "L", "H_kv", "T", "d")), "stack keys or values of all layers"
    )
    return x.transpose(2, 3).flatten(3)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, T, H_kv * d) -> (B, L, H_kv, T, d), the inverse of `merge_heads`."""
    _expect("head", x, dict.fromkeys(("B", "L", "T", "H_kv * d")), "merge the heads first")
    seen = f"Step head: the width is {x.shape[3]}, expected a multiple of {heads} heads"
    require(
        heads > 0 and x.shape[3] % heads == 0,
        f"{seen}: give the number of KV heads, num_key_value_heads.",
    )
    return x.unflatten(3, (heads, -1)).transpose(2, 3)


def features(cache: DynamicCache, positions: Tensor, rotary: nn.Module) -> KV:
    """Take a model's cache apart into features that do not depend on where the text stands, in float32 at least.

    Args:
        positions: (B, T), which its keys were rotated by (see `positions_of`). rotary :
            `cache.rotary_of` that model.
    """
    stored = to_tensor(cache)
    rows, entries = stored.shape[2], stored.shape[4]
    _expect(
        "rotation",
        positions,
        {"B": rows, "T": entries},
        "give a position for each entry of the cache",
    )
    wide = from_tensor(stored.to(torch.promote_types(stored.dtype, torch.float32)))
    keys, values = (
        to_tensor(unrotate(wide, positions, rotary)).transpose(0, 1).transpose(1, 2)
    )  # (B, L, H_kv, T, d)
    return KV(merge_heads(keys), merge_heads(values))


def as_cache(kv: KV, positions: Tensor, rotary: nn.Module, heads: int) -> DynamicCache:
    """Make features a cache as the student has it: heads apart, keys rotated to positions (B, T) by its own rope."""
    stored = torch.stack([split_heads(x, heads) for x in kv])  # (2, B, L, H_kv, T, d)
    rows, entries = stored.shape[1], stored.shape[4]
    _expect(
        "rotation",
        positions,
        {"B": rows, "T": entries},
        "give a position for each entry of the cache",
    )
    return rotate(from_tensor(stored.permute(2, 0, 1, 3, 4, 5)), positions, rotary)


# -- hidden


class Projector(nn.Module):
    """W_K and W_V, which bring one teacher's features to the student's width; the same for all layers, no bias.

    Args:
        teacher_width, student_width: H_kv * d of each.
        start: "xavier" (uniform), "orthogonal", or "identity": the first features are copied. To a
            larger width they are scaled by sqrt(student_width / teacher_width), as the rest is 0,
            so that the mean square stays what it was.

    Example:
        >>> Projector(512, 256).num_parameters(), Projector(1, 4, "identity").keys.weight.flatten().tolist()
        (262144, [2.0, 0.0, 0.0, 0.0])
    """

    def __init__(self, teacher_width: int, student_width: int, start: str = "xavier"):
        super().__init__()
        require(
            start in STARTS,
            f"Step hidden: start is {start!r}, expected one of {', '.join(STARTS)}.",
        )
        seen = f"Step hidden: widths are {teacher_width} and {student_width}"
        require(
            min(teacher_width, student_width) > 0,
            f"{seen}, expected H_kv * d of teacher and student.",
        )
        self.keys, self.values = (
            nn.Linear(teacher_width, student_width, bias=False) for _ in range(2)
        )
        for weight in self.parameters():
            if start == "identity":
                nn.init.eye_(weight)
                weight.data *= max(1, student_width / teacher_width) ** 0.5
            else:
                {"xavier": nn.init.xavier_uniform_, "orthogonal": nn.init.orthogonal_}[start](
                    weight
                )

    def forward(self, kv: KV) -> KV:
        """Project (B, L, T, teacher_width) to (B, L, T, student_width), in the dtype of the weights."""
        for x in kv:
            want = {"B": None, "L": None, "T": None, "width": self.keys.in_features}
            _expect("hidden", x, want, "use the projector of this teacher")
        return KV(
            *(
                linear(x.to(linear.weight.dtype))
                for linear, x in zip((self.keys, self.values), kv, strict=True)
            )
        )

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def fit_ridge(self, batches: Iterable[tuple[KV, KV]], strength: float = 1e-3) -> "Projector":
        """Set both maps to the least-squares ones from teacher to student features, in closed form. Returns itself.

        Args:
            batches: pairs of teacher and student features of the same tokens and layers, (...,
                width) each, without padding. They are read once; what is kept are sums.
            strength: of the ridge, relative to the mean of the diagonal of X'X.
        """
        sums = Ridge(), Ridge()
        for pair in batches:
            for each, x, y in zip(sums, *pair, strict=True):
                each.update(x, y)
        for each, linear in zip(sums, (self.keys, self.values), strict=True):
            weight = each.solve(strength)
            want = dict(zip(("student", "teacher"), linear.weight.shape, strict=True))
            _expect("hidden", weight, want, "calibrate with features of these two models")
            linear.weight.copy_(weight)
        return self

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write projector.safetensors and projector.json, which holds the widths. Returns the folder."""
        folder = Path(folder)
        require(not folder.is_file(), f"{folder} is a file: give the name of a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, self.state_dict(), {"format": "pt"})
        widths = {"teacher_width": self.keys.in_features, "student_width": self.keys.out_features}
        return write_text(
            folder / ABOUT, json.dumps({"version": FORMAT_VERSION} | widths, indent=1) + "\n"
        ).parent

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Projector":
        """Read what `save_pretrained` wrote. ValueError for a folder that is not that."""
        folder = Path(folder)
        missing = [name for name in (ABOUT, WEIGHTS) if not (folder / name).is_file()]
        require(
            not missing,
            f"{folder} has no {', '.join(missing)}: give a folder that `save_pretrained` wrote.",
        )
        wrong = f"{folder} holds no projector of format version {FORMAT_VERSION}"
        try:
            about = json.loads((folder / ABOUT).read_text("utf-8"))
            require(about["version"] == FORMAT_VERSION, f"its version is {about['version']}")
            weights = load_file(folder / WEIGHTS)
            projector = cls(about["teacher_width"], about["student_width"]).to(
                weights["keys.weight"].dtype
            )
            projector.load_state_dict(weights)
        except (ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{wrong} ({type(error).__name__}: {error}): save it again."
            ) from error
        return projector


class Ridge:
    """Least squares from minibatches, in float64: what is kept is X'X and X'Y.

    >>> x, sums = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), Ridge()
    >>> for part in x.split(20):
    ...     sums.update(part, 2 * part)
    >>> sums.solve(1e-9).round(decimals=4).diagonal()
    tensor([2., 2., 2.], dtype=torch.float64)
    """

    def __init__(self):
        self.xx, self.xy = None, None

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Add pairs (..., p) and (..., q)."""
        shapes = tuple(x.shape), tuple(y.shape)
        fits = shapes[0][:-1] == shapes[1][:-1] and x.numel() and y.numel()
        require(
            fits,
            f"Step hidden: pairs are {shapes[0]} and {shapes[1]}, expected (..., p) and (..., q): align them.",
        )
        require(
            torch.isfinite(x).all() and torch.isfinite(y).all(),
            "Step hidden: calibration pairs are not finite.",
        )
        device = "cpu" if x.device.type == "mps" else x.device  # mps has no float64
        x, y = (z.reshape(-1, z.shape[-1]).to(device).double() for z in (x, y))
        new = x.T @ x, x.T @ y
        if self.xx is not None:
            _expect(
                "hidden",
                new[1],
                dict(zip("xy", self.xy.shape, strict=True)),
                "give the same widths each time",
            )
            new = self.xx + new[0], self.xy + new[1]
        self.xx, self.xy = new

    def solve(self, strength: float) -> Tensor:
        """Return W, (q, p): least squares of XW' - Y, with a ridge of strength times the mean diagonal of X'X."""
        require(
            self.xx is not None, "Step hidden: there is no calibration pair yet: call update first."
        )
        require(strength >= 0, f"Step hidden: strength is {strength}, expected 0 or more.")
        ridge = strength * self.xx.diagonal().mean() * torch.eye(len(self.xx)).to(self.xx)
        factor, failed = torch.linalg.cholesky_ex(self.xx + ridge)
        seen = f"Step hidden: the pairs do not determine a map at strength {strength}"
        require(not failed, f"{seen}: give more pairs, or a larger strength.")
        return torch.cholesky_solve(self.xy, factor).T


# -- fusion, and all steps


def fuse(parts: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
    """Return the weighted mean of what teachers became, all (B, L, T, D).

    Args:
        weights: one for each, 0 or more; they are divided by their sum. Default: all the same. To
            learn them, give `logits.softmax(0)` with an `nn.Parameter` of logits.

    Example:
        >>> fuse([torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)], torch.tensor([1.0, 3.0])).flatten()
        tensor([0.7500, 0.7500])
    """
    require(parts, "Step fusion: there is no teacher, expected one or more.")
    for part in parts:
        _expect(
            "fusion",
            part,
            dict(zip("BLTD", parts[0].shape, strict=True)),
            "align all teachers to one student",
        )
    weights = parts[0].new_ones(len(parts)) if weights is None else weights
    _expect("fusion", weights, {"teachers": len(parts)}, "give one weight for each teacher")
    good = torch.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0
    require(
        good, f"Step fusion: weights are {weights.tolist()}, expected 0 or more, and not 0 for all."
    )
    return sum(
        w * part for w, part in zip((weights / weights.sum()).to(parts[0]), parts, strict=True)
    )


class Teacher(NamedTuple):
    """What one teacher made of a batch, and how it comes to the student; positions are (B, T_t)."""

    cache: DynamicCache
    positions: Tensor
    rotary: nn.Module
    plan: TimePlan
    layer_map: LayerMap
    projector: Projector


def align_kv(teachers: Iterable[Teacher], weights: Tensor | None = None) -> KV:
    """Carry what teachers read over to the student: rotation and head, time, layer, hidden, fusion.

    Args:
        teachers: one or more. They are taken one after another, so a generator can load each on
            demand.
        weights: as for `fuse`.

    Returns:
        Targets for the student's own `features`, (B, L_s, T_s, H_kv * d): keys un-rotated, 0 where
        the student has padding. `as_cache` makes them a cache. Gradients reach projectors, weights,
        and caches that carry them.

    Raises:
        CacheError, a ValueError: a shape does not fit; the sentence says at which step, what was
            seen and expected.
    """
    parts = [teacher.projector(_at_student(teacher)) for teacher in teachers]
    keys, values = zip(*parts, strict=True) if parts else ((), ())
    return KV(fuse(keys, weights), fuse(values, weights))


def _at_student(teacher: Teacher) -> KV:
    """Teacher features with the student's tokens and layers."""
    flat = features(teacher.cache, teacher.positions, teacher.rotary)
    return KV(*(mix_layers(resample(x, teacher.plan), teacher.layer_map) for x in flat))


# -- what a teacher says of the student's texts


class Seen(NamedTuple):
    """What one teacher made of one problem, on the student's T tokens and L_s layers.

    keys, values : (L_s, T, H_kv * d), of the teacher's width. state : (L_s, d_t), hidden states
    just before its answer.
    """

    keys: Tensor
    values: Tensor
    state: Tensor


class Lesson(NamedTuple):
    """A problem with its solution as the student reads it, and what each teacher made of it."""

    text: Segmented
    seen: tuple[Seen, ...] = ()


@torch.no_grad()
def seen_by(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    texts: Sequence[Segmented],
    layer_map: LayerMap,
    plan: Callable[[Tensor, Tensor], TimePlan] = plan_time,
    batch_size: int = 16,
) -> list[Seen]:
    """Have a teacher read its own solutions of the student's problems, and bring what it made of them to the student.

    All but the projection, which may learn: so a teacher is needed once, and only one at a time.

    Args:
        conversations: as the teacher words them: the same problems, in its own tokens and with its
            own reasoning.
        texts: the student's, as `segment` made them.
        plan: `plan_time` or `by_index`.

    Returns:
        One `Seen` a problem, in half precision, on the CPU.
    """
    require(
        len(conversations) == len(texts),
        f"There are {len(conversations)} conversations and {len(texts)} texts.",
    )
    seen, rotary = [], rotary_of(teacher)
    for start in tqdm(range(0, len(texts), batch_size), desc="teacher reads"):
        own = [segment(tokenizer, c) for c in conversations[start : start + batch_size]]
        borders, theirs = (
            torch.stack([t.borders for t in part]) for part in (texts[start:][: len(own)], own)
        )
        inputs = _inputs(own, teacher.device)
        out = teacher(**inputs, use_cache=True, output_hidden_states=True, logits_to_keep=1)
        kv = features(out.past_key_values, inputs["position_ids"], rotary)
        kv = [mix_layers(resample(x, plan(borders, theirs)), layer_map) for x in kv]
        before = inputs["input_ids"].shape[1] - (theirs[:, 3] - theirs[:, 2]) - 1
        states = torch.stack(out.hidden_states[1:], 1)[torch.arange(len(own)), :, before][
            :, :, None
        ]  # (B, L_t, 1, d)
        states = mix_layers(states, layer_map)[:, :, 0]
        sizes = borders[:, 3].tolist()
        seen += [
            Seen(*(x[i, :, -n:].half().cpu() for x in kv), states[i].half().cpu())
            for i, n in enumerate(sizes)
        ]
    return seen


def _inputs(texts: Sequence[Segmented], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """What a model takes of a batch of texts."""
    inputs = {
        "input_ids": pad_left([t.input_ids for t in texts]),
        "attention_mask": pad_left([torch.ones_like(t.input_ids) for t in texts]),
        "position_ids": positions_of(torch.stack([t.borders for t in texts])),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def pad_left(xs: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Stack tensors that differ in one dimension, zeros first."""
    rows = [x.transpose(0, dim) for x in xs]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left").transpose(
        1, dim + 1
    )


def save_seen(path: str | Path, seen: Sequence[Seen]) -> Path:
    """Write what a teacher made of problems: one safetensors file, tokens of all problems in a row."""
    sizes = torch.tensor([part.keys.shape[1] for part in seen])
    tensors = {
        name: torch.cat([getattr(part, name) for part in seen], 1) for name in ("keys", "values")
    }
    tensors |= {"states": torch.stack([part.state for part in seen]), "sizes": sizes}
    return write_tensors(Path(path), tensors, {"kvlab": SEEN})


def load_seen(path: str | Path) -> "Kept":
    """Open what `save_seen` wrote. ValueError if the file is not that."""
    path = Path(path)
    require(path.is_file(), f"There is no file {path}: have a teacher read the problems first.")
    try:
        return Kept(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold what a teacher made of problems ({error}): make it again."
        ) from error


class Kept(Dataset):
    """What a teacher made of problems, read from its file problem by problem: it may be larger than memory."""

    def __init__(self, path: Path):
        self.file = safe_open(path, "pt")
        require((self.file.metadata() or {}).get("kvlab") == SEEN, "it has another kind of content")
        sizes, self.states = (self.file.get_tensor(name) for name in ("sizes", "states"))
        self.ends = sizes.cumsum(0).tolist()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Seen:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no problem {index} among {len(self)}.")
        start = self.ends[index - 1] if index else 0
        keys, values = (
            self.file.get_slice(name)[:, start : self.ends[index]] for name in ("keys", "values")
        )
        return Seen(keys, values, self.states[index])


class Lessons(Dataset):
    """Problems as the student reads them, with what each teacher made of them.

    Args:
        texts: as `segment` makes them. seen : for each teacher a list or data set of as many
            `Seen`.
    """

    def __init__(self, texts: Sequence[Segmented], *seen: Sequence[Seen] | Dataset):
        counts = [len(texts), *map(len, seen)]
        require(
            len(set(counts)) == 1,
            f"There are {counts} texts and readings of teachers, expected as many of each.",
        )
        self.texts, self.seen = texts, seen

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Lesson:
        return Lesson(self.texts[index], tuple(part[index] for part in self.seen))


# -- losses


def own_features(model: PreTrainedModel, hidden_states: Sequence[Tensor]) -> KV:
    """Keys, un-rotated, and values of a model that learns, (B, L, T, H_kv * d), made again from its hidden states.

    A cache would do as well, but there is none under gradient checkpointing, and what a hook sees
    there is detached.
    """
    keys, values = [], []
    for layer, states in zip(
        model.base_model.layers, hidden_states, strict=False
    ):  # the last state is the output
        attention, x = layer.self_attn, layer.input_layernorm(states)
        k, v = attention.k_proj(x), attention.v_proj(x)
        if hasattr(attention, "k_norm"):
            k = attention.k_norm(k.unflatten(-1, (-1, attention.head_dim))).flatten(-2)
        keys.append(k)
        values.append(v)
    return KV(torch.stack(keys, 1), torch.stack(values, 1))


def kv_loss(student: KV, target: KV, mask: Tensor, kind: str = "smooth_l1") -> Tensor:
    """How far the student's keys and values are from their targets, in the student's own deviations.

    Each layer's difference is divided by the deviation of the student's features in that layer
    (which gets no gradient: else they would grow to make the loss small), and averaged over tokens,
    width, layers, and keys and values.

    Args:
        student, target: (B, L, T, D) each. The target's gradient reaches projectors; whoever made
            it detached the teacher.
        mask: (B, T), not 0 for tokens that count.
        kind: "smooth_l1", "l1" or "mse".

    Example:
        >>> x = torch.tensor([[-1.0, 1.0]]).view(1, 1, 2, 1)
        >>> kv_loss(KV(x, x), KV(x + 2, x), torch.ones(1, 2)).item()
        0.75
    """
    require(kind in KINDS, f"kind is {kind!r}, expected one of {', '.join(KINDS)}.")
    return torch.stack(
        [_distance(*pair, mask, kind) for pair in zip(student, target, strict=True)]
    ).mean()


def _distance(student: Tensor, target: Tensor, mask: Tensor, kind: str) -> Tensor:
    _expect(
        "loss",
        target,
        dict(zip("BLTD", student.shape, strict=True)),
        "align the teacher to this student",
    )
    chosen = mask.bool()
    student, target = (x.transpose(1, 2)[chosen] for x in (student, target))  # (N, L, D)
    return _in_deviations(student, target, student, kind)


def _in_deviations(student: Tensor, target: Tensor, measure: Tensor, kind: str) -> Tensor:
    """The mean difference of (N, L, D) features, in the deviations that one of them has in each layer."""
    scale = measure.detach().float().std((0, 2), correction=0).clamp(min=1e-6)[:, None]
    return KINDS[kind](student.float() / scale, target.float() / scale)


def codi_loss(student: Tensor, target: Tensor) -> Tensor:
    """How far hidden states at the token before the answer are from their targets, (B, L, d) each.

    Smooth L1 of the difference over the target's deviation in its layer, averaged over layers,
    texts and width. Source: Shen et al. (2025), CODI, arXiv 2502.21074, section 3.2, where teacher
    and student are one model.

    Example:
        >>> codi_loss(torch.zeros(2, 1, 2), torch.tensor([[[-1.0, 1.0]], [[1.0, -1.0]]])).item()
        0.5
    """
    _expect(
        "loss",
        target,
        dict(zip("BLd", student.shape, strict=True)),
        "align the teacher to this student",
    )
    return _in_deviations(student, target, target, "smooth_l1")


class KVAlignmentLoss(nn.Module):
    """What a student that learns is short of its teachers: KV and CODI losses, with projectors that learn along.

    Args:
        projectors: one a teacher; `requires_grad_(False)` keeps them as they are.
        states: one linear map a teacher, from its hidden states to the student's, for CODI; without
            them there is no CODI.
        kind: of `kv_loss`.
    """

    def __init__(
        self,
        projectors: Sequence[Projector],
        states: Sequence[nn.Linear] = (),
        kind: str = "smooth_l1",
    ):
        super().__init__()
        require(projectors, "There is no projector, expected one for each teacher.")
        self.projectors, self.states, self.kind = (
            nn.ModuleList(projectors),
            nn.ModuleList(states),
            kind,
        )

    def forward(
        self, student: KV, states: Tensor, seen: Sequence[tuple[KV, Tensor]], mask: Tensor
    ) -> dict[str, Tensor]:
        """Named losses, "kv" and perhaps "codi".

        Args:
            student: its features, as `own_features` has them. states : (B, L_s, d_s), before the
                answer.
            seen: of each teacher, what it made of the batch: features (B, L_s, T, D_t) and states
                (B, L_s, d_t).
            mask: (B, T), not 0 for tokens that count.
        """
        parts = [projector(kv) for projector, (kv, _) in zip(self.projectors, seen, strict=True)]
        target = KV(*(fuse(sides) for sides in zip(*parts, strict=True)))
        losses = {"kv": kv_loss(student, target, mask, self.kind)}
        if self.states:
            goals = [linear(state) for linear, (_, state) in zip(self.states, seen, strict=True)]
            losses["codi"] = codi_loss(states, sum(goals) / len(goals))
        return losses


# -- training


class Pupil(nn.Module):
    """A student with what it is short of its teachers: forward gives the named losses of a batch."""

    def __init__(self, student: PreTrainedModel, alignment: KVAlignmentLoss | None = None):
        super().__init__()
        self.student, self.alignment = student, alignment

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of lessons, as `collate` makes it."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        aligned = self.alignment is not None
        out = self.student(**inputs, use_cache=False, output_hidden_states=aligned)
        losses = {"ce": cross_entropy(out.logits, batch["input_ids"], batch["weights"])}
        if not aligned:
            return losses
        rows = torch.arange(len(batch["before"]), device=batch["before"].device)
        states = torch.stack([x[rows, batch["before"]] for x in out.hidden_states[1:]], 1)
        seen = [
            (KV(batch[f"keys_{i}"], batch[f"values_{i}"]), batch[f"state_{i}"])
            for i in range(len(self.alignment.projectors))
        ]
        own = own_features(self.student, out.hidden_states)
        return losses | self.alignment(own, states, seen, batch["attention_mask"])


def collate(lessons: Sequence[Lesson]) -> dict[str, Tensor]:
    """A batch, padded on the left: token ids, what counts in cross-entropy (the solution), and what teachers made."""
    batch = _inputs([lesson.text for lesson in lessons])
    borders = torch.stack([lesson.text.borders for lesson in lessons])
    place, pad = batch["position_ids"], batch["input_ids"].shape[1] - borders[:, 3]
    batch["weights"] = ((place >= borders[:, 1:2]) & (batch["attention_mask"] > 0)).float()
    batch["before"] = pad + borders[:, 2] - 1  # the column of the token before the answer
    for i, seen in enumerate(zip(*(lesson.seen for lesson in lessons), strict=True)):
        batch[f"keys_{i}"], batch[f"values_{i}"] = (
            pad_left([x[j].float() for x in seen], 1) for j in (0, 1)
        )
        batch[f"state_{i}"] = torch.stack([x.state.float() for x in seen])
    return batch


def train(
    student: PreTrainedModel,
    lessons: Sequence[Lesson] | Lessons,
    alignment: KVAlignmentLoss | None = None,
    *,
    steps: int,
    batch_size: int = 8,
    kv_weight: float = 1.0,
    codi_weight: float = 0.5,
    kv_warmup: int = 1000,
    kv_end: float = 0.0,
    **options,
) -> list[dict[str, float]]:
    """Teach a student solutions, and to make keys and values like its teachers' while it reads them.

    The loss is CE + kv_weight KV + codi_weight CODI; both weights rise over `kv_warmup` steps.
    Without an alignment it is CE alone.

    Args:
        kv_end: the share of the steps after which the weights of KV and CODI have faded to 0,
            linearly from the first step; 0: they do not fade, as in the source.
        options: of `kvlab.training.fit`: learning_rate, checkpoint, precision, seed, shares_every,
            ...
    """

    def factors(step: int) -> dict[str, float]:
        risen = min(1.0, step / kv_warmup) if kv_warmup else 1.0
        left = max(0.0, 1 - (step - 1) / (kv_end * steps)) if kv_end else 1.0
        return {name: weight * risen * left for name, weight in weights.items()}

    weights = {"kv": kv_weight, "codi": codi_weight} if alignment else {}
    if alignment and not alignment.states:
        del weights["codi"]
    pupil = Pupil(student, alignment)
    loader = DataLoader(
        lessons, batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=collate
    )
    options = {
        "weight": lambda batch: batch["weights"][:, 1:].sum(),
        "label": "4D alignment",
    } | options
    return fit(
        pupil, loader, lambda model, batch: model(batch), steps=steps, factors=factors, **options
    )


# -- which layers are alike


@torch.no_grad()
def similar_layers(
    student: PreTrainedModel,
    texts: Sequence[Segmented],
    teacher: PreTrainedModel,
    others: Sequence[Segmented],
    what: str = "hidden",
    batch_size: int = 16,
) -> Tensor:
    """CKA of every student layer with every teacher layer, (K, L), on tokens of prompt and reasoning.

    CKA compares token by token, so the teacher's features are brought to the student's tokens
    first, by `plan_time`.

    Args:
        texts, others: the same problems, as `segment` made them of the student's and the teacher's
            words; about 100.
        what: "hidden", "keys" (un-rotated) or "values", as for `similarity.states`.
    """
    require(what in STATES, f"what is {what!r}, expected one of {', '.join(STATES)}.")
    cka = CKA()
    for start in tqdm(range(0, len(texts), batch_size), desc="CKA"):
        pair = texts[start : start + batch_size], others[start : start + batch_size]
        borders, theirs = (torch.stack([t.borders for t in part]) for part in pair)
        plan = plan_time(borders, theirs)
        counted = (positions_of(borders) < borders[:, 2:3]) & plan.mask  # without the answer
        own, teachers = (
            _layers_of(model, part, what)
            for model, part in zip((student, teacher), pair, strict=True)
        )
        teachers = resample(teachers, plan)
        cka.update(*([x[counted] for x in layers.unbind(1)] for layers in (own, teachers)))
    return cka.matrix()


def _layers_of(model: PreTrainedModel, texts: Sequence[Segmented], what: str) -> Tensor:
    """What each layer made of texts, (B, L, T, width), padded on the left."""
    inputs = _inputs(texts, model.device)
    if what != "hidden":
        cache = prefill(model, inputs["input_ids"], attention_mask=inputs["attention_mask"]).cache
        kv = features(cache, inputs["position_ids"], rotary_of(model))
        return kv.keys if what == "keys" else kv.values
    return torch.stack(
        model(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states[1:], 1
    )
