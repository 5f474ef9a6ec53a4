"""How alike two layers are: unbiased linear CKA, from minibatches, and the teacher layers that a student layer maps to.

A layer is its tokens' features, (n, p): `states` takes them from a model. HSIC is how much two
layers have in common, CKA is HSIC over that of each layer with itself: 1 for what differs by a
rotation, a scale or an offset, 0 on average for what is independent. An estimate can be a little
below 0. The biased estimate cannot, and grows with the width: of two independent layers with as
many features as tokens it makes 0.5 (`biased_cka` is here to show that).

Everything is computed in float64. Sources: Nguyen et al. (2021), arXiv 2010.15327; Song et al.
(2012), JMLR 13.

>>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
>>> cka = CKA()
>>> for part in x.split(16):
...     cka.update([part, part.abs()], [-2 * part + 1])
>>> cka.matrix().shape, round(cka.matrix()[0, 0].item(), 12)
(torch.Size([2, 1]), 1.0)
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlab.cache import prefill, to_tensor, unrotate
from kvlab.files import write_text
from kvlab.models import require, rotary_of

FORMAT_VERSION = 1
STATES = ("hidden", "keys", "values")


# -- HSIC and CKA


class _Layer(NamedTuple):
    """What all pairs with a layer share: centered features (n, p), squared row norms (n,), Gram matrix (n, n) or None.

    Centering changes no estimate, and leaves the smallest numbers to subtract from each other.
    """

    centered: Tensor
    norms: Tensor
    gram: Tensor | None

    @classmethod
    def of(cls, x: Tensor, gram: bool, device: torch.device) -> "_Layer":
        x = x.to(device).double()
        require(
            torch.isfinite(x).all(),
            "Features are not all finite: run the model in bfloat16 or float32.",
        )
        x = (
            x - x[:1]
        )  # a layer that is the same for all tokens is exactly 0, where the mean alone leaves rounding
        x = x - x.mean(0)
        return cls(x, x.square().sum(1), x @ x.T if gram else None)


def _gram_is_cheaper(n: int, widths: Sequence[int], other_widths: Sequence[int]) -> bool:
    """Compare multiplications, n^2 (sum p + sum q + K L) with n (sum p) (sum q)."""
    p, q = sum(widths), sum(other_widths)
    return n * (p + q + len(widths) * len(other_widths)) < p * q


def _layers(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> tuple[list[_Layer], list[_Layer]]:
    """Prepare the layers of both sides, all for the same form."""
    shapes = [[tuple(x.shape) for x in side] for side in (xs, ys)]
    fits = all(len(shape) == 2 and shape[1] for side in shapes for shape in side)
    require(
        xs and ys and fits,
        f"Layers are {shapes[0]} and {shapes[1]}, expected (n, p) each, and one or more.",
    )
    counts = sorted({n for side in shapes for n, _ in side})
    require(
        len(counts) == 1,
        f"Layers have {counts} tokens, expected as many in all: align the texts first.",
    )
    require(
        counts[0] > 3, f"There are {counts[0]} tokens, expected 4 or more: give larger minibatches."
    )
    gram = _gram_is_cheaper(counts[0], *([p for _, p in side] for side in shapes))
    device = (
        torch.device("cpu") if xs[0].device.type == "mps" else xs[0].device
    )  # mps has no float64
    one, two = ([_Layer.of(x, gram, device) for x in side] for side in (xs, ys))
    return one, two


def _inner(one: _Layer, two: _Layer) -> Tensor:
    """<K, L> of two Gram matrices, which is ||X'Y||^2."""
    if one.gram is None or two.gram is None:
        return (one.centered.T @ two.centered).square().sum()
    return one.gram.flatten() @ two.gram.flatten()


def _hsic(one: _Layer, two: _Layer) -> Tensor:
    # As X is centered, K without its diagonal has K 1 = -r, r = |x_i|^2: all but the first term needs only r.
    n = len(one.norms)
    inner, rows = _inner(one, two), n / (n - 2) * (one.norms @ two.norms)
    whole = one.norms.sum() * two.norms.sum() / ((n - 1) * (n - 2))
    total, terms = inner - rows + whole, inner + rows + whole
    return torch.where(total.abs() > 1e-13 * terms, total, 0.0) / (
        n * (n - 3)
    )  # less than that is rounding


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """Estimate without bias how much two layers have in common: HSIC_1 with linear kernels, in float64.

    With K = XX' and L = YY', diagonals set to 0, it is [tr(KL) + (1'K1)(1'L1) / ((n-1)(n-2)) -
    2/(n-2) 1'KL1] / (n(n-3)). For X and Y centered, and r the squared norms of their rows, that is
    [||X'Y||^2 - n/(n-2) sum r_x r_y + ||X||^2 ||Y||^2 / ((n-1)(n-2))] / (n(n-3)), where the first
    term costs n p q multiplications, or, as <XX', YY'>, n^2 (p + q): the cheaper one is taken.

    Args:
        x, y: (n, p) and (n, q), features of the same n >= 4 tokens, in any dtype.

    Returns:
        A scalar, which may be negative. Raises ValueError for shapes that do not fit and numbers
        that are not finite. Source: Nguyen et al. (2021), arXiv 2010.15327, equation 3; Song et al.
        (2012), JMLR 13, HSIC_1.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> round(hsic(x, x).item(), 4), round(hsic(x, 10 * x + 7).item(), 4)
        (2.1667, 216.6667)
    """
    (one,), (two,) = _layers([x], [y])
    return _hsic(one, two)


def biased_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA, ||X'Y||^2 / (||X'X|| ||Y'Y||) with X and Y centered: large for independent layers, if p is near n.

    Only to show that; parameters as for `hsic`. Source: Kornblith et al. (2019), arXiv 1905.00414,
    equations 3 and 4.

    Example:
        >>> x, y = torch.randn(2, 50, 50, generator=torch.Generator().manual_seed(0))
        >>> round(biased_cka(x, y).item(), 1)
        0.5
    """
    (one,), (two,) = _layers([x], [y])
    own = _inner(one, one), _inner(two, two)
    require(
        min(own) > 0, "A layer is the same for all tokens, so CKA is not defined: leave it out."
    )
    return _inner(one, two) / (own[0] * own[1]).sqrt()


class CKA:
    """Unbiased CKA of K layers with L others, minibatch by minibatch; what is kept is K L + K + L sums.

    HSIC is averaged over minibatches first, and the ratio is taken last: each minibatch counts the
    same, so let them be of like size. Two objects add up, so that minibatches can be spread over
    processes: `sum(parts, CKA())`. An update costs the Gram matrices of K + L layers at a time, n^2
    numbers each, or none if n is large: some hundred or thousand tokens a minibatch are fine.
    Source: Nguyen et al. (2021), arXiv 2010.15327, equation 2.

    Example:
        >>> x, y = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
        >>> first, second, both = CKA(), CKA(), CKA()
        >>> for part, one, two in zip((first, second), x.split(20), y.split(20), strict=True):
        ...     part.update([one], [two])
        ...     both.update([one], [two])
        >>> torch.equal((first + second).matrix(), both.matrix())
        True
    """

    def __init__(self):
        self.batches = 0
        self.sums = (
            0,
            0,
            0,
        )  # of HSIC: (K, L), of xs with themselves (K,), of ys with themselves (L,)

    @torch.no_grad()
    def update(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        """Add a minibatch: K layers (n, p_k) and L layers (n, q_l) of the same n tokens."""
        one, two = _layers(xs, ys)
        pairs = torch.stack([torch.stack([_hsic(a, b) for b in two]) for a in one])
        own = (torch.stack([_hsic(a, a) for a in side]) for side in (one, two))
        self._add(1, tuple(sums.cpu() for sums in (pairs, *own)))

    def _add(self, batches: int, sums: tuple) -> None:
        if self.batches and batches:
            have, new = tuple(self.sums[0].shape), tuple(sums[0].shape)
            require(
                have == new,
                f"There are {new} layers, {have} before: give the same layers each time.",
            )
        self.batches += batches
        self.sums = tuple(a + b for a, b in zip(self.sums, sums, strict=True))

    def __add__(self, other: "CKA") -> "CKA":
        total = CKA()
        for part in (self, other):
            total._add(part.batches, part.sums)
        return total

    def matrix(self) -> Tensor:
        """Return CKA of every pair so far, (K, L), float64."""
        require(self.batches, "There is no minibatch yet: call update first.")
        pairs, *own = self.sums
        for name, each in zip(("xs", "ys"), own, strict=True):
            flat = (each <= 0).nonzero().flatten().tolist()
            require(
                not flat,
                f"Layers {flat} of {name} do not vary over tokens, so CKA is not defined: leave them out.",
            )
        return pairs / (own[0][:, None] * own[1]).sqrt()  # sums do for means: their number cancels


# -- what is compared


@torch.no_grad()
def states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    mask: Tensor,
    what: str = "hidden",
) -> list[Tensor]:
    """Run texts through a model and return what each layer made of the tokens that count.

    Args:
        input_ids, attention_mask: (B, T), padded on the left if at all.
        mask: (B, T), not 0 for the tokens that count: prompt and reasoning, say. Padding never
            counts.
        what: "hidden", the output of each layer, the last one's after the model's final norm;
            "keys", as before the rotary embedding, so that they do not depend on where a text
            stands; or "values".

    Returns:
        L tensors (n_tokens, width), tokens in order, text after text. The width is hidden_size, or
        H_kv * D: key-value heads side by side, not attention heads. In the model's dtype.

    Raises:
        ValueError: an unknown `what`, masks that do not fit, or no token that counts. CacheError :
            for keys and values, a model that `prefill` does not support.

    Example:
        >>> from kvlab.models import _example
        >>> model, ids = _example()
        >>> [layer.shape for layer in states(model, ids, torch.ones_like(ids), ids != 2, "keys")]
        [torch.Size([4, 32]), torch.Size([4, 32])]
    """
    require(what in STATES, f"what is {what!r}, expected one of {', '.join(STATES)}.")
    shapes = [tuple(x.shape) for x in (input_ids, attention_mask, mask)]
    seen = f"input_ids, attention_mask and mask are {', '.join(map(str, shapes))}"
    require(len(set(shapes)) == 1 and input_ids.ndim == 2, f"{seen}, expected the same (B, T).")
    require(attention_mask[:, -1:].all(), "attention_mask ends in 0: pad on the left.")
    counted = (mask != 0) & (attention_mask != 0)
    require(counted.any(), "mask has no token that counts: mark one or more that are no padding.")
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    if what == "hidden":
        text = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
        out = model(**text, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        layers = out.hidden_states[1:]  # without the embeddings
    else:
        cache = unrotate(
            prefill(model, input_ids, attention_mask=attention_mask).cache,
            positions,
            rotary_of(model),
        )
        layers = (
            to_tensor(cache)[:, int(what == "values")].transpose(2, 3).flatten(3)
        )  # (L, B, T, H_kv * D)
    return [layer[counted] for layer in layers]


# -- the layer map


class LayerMap(NamedTuple):
    """For each of K student layers the k teacher layers it is mapped to, best first: (K, k), and their weights."""

    indices: Tensor
    weights: Tensor
    teacher_layers: int


class SavedLayerMap(NamedTuple):
    """A layer map from a file, and how it was made."""

    layer_map: LayerMap
    student: str
    teacher: str
    samples: int
    what: str


def layer_map(matrix: Tensor, k: int) -> LayerMap:
    """Choose the k most similar teacher layers (columns) of each student layer (row), weighted by a softmax over them.

    The lower layer comes first where two are equal.

    Example:
        >>> chosen = layer_map(torch.tensor([[0.1, 0.9, 0.9], [0.5, 0.2, 0.1]]), k=2)
        >>> chosen.indices.tolist(), chosen.weights[0].tolist()
        ([[1, 2], [0, 1]], [0.5, 0.5])
    """
    shape = tuple(matrix.shape)
    good = matrix.ndim == 2 and matrix.numel() and torch.isfinite(matrix).all()
    require(
        good, f"The matrix is {shape}, expected (student layers, teacher layers) of finite numbers."
    )
    require(0 < k <= shape[1], f"k is {k}, expected 1 to {shape[1]}, the number of teacher layers.")
    values, indices = matrix.double().sort(dim=1, descending=True, stable=True)
    return LayerMap(indices[:, :k], values[:, :k].softmax(1), shape[1])


def proportional(student_layers: int, teacher_layers: int) -> LayerMap:
    """Map each student layer to the one at the same share of the teacher's depth, ends to ends.

    >>> proportional(3, 7).indices.flatten()
    tensor([0, 3, 6])
    """
    return _single(
        np.linspace(0, teacher_layers - 1, max(student_layers, 0)).round(), teacher_layers
    )


def last_aligned(student_layers: int, teacher_layers: int) -> LayerMap:
    """Map last layer to last layer, and so on to the front, where the teacher's first layer serves all that are left.

    >>> last_aligned(4, 3).indices.flatten(), last_aligned(2, 12).indices.flatten()
    (tensor([0, 0, 1, 2]), tensor([10, 11]))
    """
    return _single(
        np.arange(teacher_layers - student_layers, teacher_layers).clip(min=0), teacher_layers
    )


def first_aligned(student_layers: int, teacher_layers: int) -> LayerMap:
    """Map first layer to first layer, and so on to the end, where the teacher's last layer teaches all that are left.

    >>> first_aligned(4, 3).indices.flatten(), first_aligned(2, 12).indices.flatten()
    (tensor([0, 1, 2, 2]), tensor([0, 1]))
    """
    return _single(np.arange(student_layers).clip(max=teacher_layers - 1), teacher_layers)


def _single(chosen: np.ndarray, teacher_layers: int) -> LayerMap:
    seen = f"There are {len(chosen)} student layers and {teacher_layers} teacher layers"
    require(
        len(chosen) and teacher_layers > 0,
        f"{seen}, expected one or more of each: give the models' numbers.",
    )
    # By way of NumPy, for what uses a map may be built on the meta device, where tensors have no numbers.
    indices, weights = chosen.astype(np.int64)[:, None], np.ones((len(chosen), 1))
    return LayerMap(torch.from_numpy(indices), torch.from_numpy(weights), teacher_layers)


def save_layer_map(
    path: str | Path,
    chosen: LayerMap,
    *,
    student: str,
    teacher: str,
    samples: int,
    what: str = "hidden",
) -> Path:
    """Write a layer map as JSON, with the models' names and what it was made from. Returns the path.

    Example:
        >>> import tempfile
        >>> chosen = layer_map(torch.eye(3), k=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_layer_map(f"{folder}/map.json", chosen, student="small", teacher="large", samples=100)
        ...     load_layer_map(path, student_layers=3, teacher_layers=3).teacher
        'large'
    """
    path = Path(path)
    require(path.parent.is_dir(), f"There is no folder {path.parent}: make it first.")
    layers, k = chosen.indices.shape
    about = {
        "version": FORMAT_VERSION,
        "student": student,
        "teacher": teacher,
        "samples": samples,
        "what": what,
    }
    about |= {"student_layers": layers, "teacher_layers": chosen.teacher_layers, "k": k}
    about |= {"indices": chosen.indices.tolist(), "weights": chosen.weights.tolist()}
    return write_text(path, json.dumps(about))


def load_layer_map(path: str | Path, student_layers: int, teacher_layers: int) -> SavedLayerMap:
    """Read what `save_layer_map` wrote, for models of so many layers. ValueError if the file is not that."""
    path = Path(path)
    require(path.is_file(), f"There is no file {path}: save a layer map there first.")
    wrong = f"{path} is no layer map of format version {FORMAT_VERSION}"
    try:
        about = json.loads(path.read_text("utf-8"))
        indices, weights = (
            torch.tensor(about["indices"]),
            torch.tensor(about["weights"], dtype=torch.float64),
        )
        have, k, version = (
            (about["student_layers"], about["teacher_layers"]),
            about["k"],
            about["version"],
        )
        saved = SavedLayerMap(
            LayerMap(indices, weights, have[1]), *(about[key] for key in SavedLayerMap._fields[1:])
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{wrong} ({type(error).__name__}: {error}): make it again.") from error
    shapes = tuple(indices.shape), tuple(weights.shape)
    form = (
        version == FORMAT_VERSION and indices.dtype == torch.long and shapes == ((have[0], k),) * 2
    )
    require(form, f"{wrong}, with indices and weights {shapes}: make it again.")
    want = (student_layers, teacher_layers)
    seen = f"{path} maps {have[0]} layers of {saved.student} to {have[1]} of {saved.teacher}"
    require(
        have == want, f"{seen}, the models have {want[0]} and {want[1]}: make one for these models."
    )
    inside = ((indices >= 0) & (indices < have[1])).all() and (
        indices.sort().values.diff() > 0
    ).all()
    require(
        inside,
        f"{path} has teacher layers outside 0 to {have[1] - 1}, or one twice: make it again.",
    )
    whole = (weights >= 0).all() and ((weights.sum(1) - 1).abs() < 1e-6).all()
    require(
        whole,
        f"{path} has weights that are negative or do not add up to 1 in each row: make it again.",
    )
    return saved
