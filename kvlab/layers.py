"""How alike two layers are (unbiased linear CKA, from minibatches), and maps from student to teacher layers.

A layer is the features of its tokens, (n, p). HSIC measures what two layers have in common; CKA is
HSIC divided by that of each layer with itself. CKA is 1 for layers that differ by a rotation, a
scale or an offset, and 0 on average for independent layers, so that an estimate can be a little
below 0. The biased estimate cannot, and it grows with the width: it is 0.5 for two independent
layers with as many features as tokens.

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

from kvlab.files import write_text

MAP_VERSION = 1


# -- HSIC and CKA


class _Layer(NamedTuple):
    """Features (n, p) or Gram matrix (n, n) of one layer, and the squared norms of its rows (n,)."""

    matrix: Tensor
    norms: Tensor


def _centered(x: Tensor) -> Tensor:
    """Center (n, p) in float64, which changes no estimate and leaves small numbers to subtract."""
    x = x.to("cpu" if x.device.type == "mps" else x.device).double()  # mps has no float64
    x = x - x[:1]  # so that a layer that is the same for all tokens is exactly 0
    return x - x.mean(0)


def _gram_is_cheaper(n: int, widths: Sequence[int], other_widths: Sequence[int]) -> bool:
    """Compare multiplications, n^2 (sum p + sum q + K L) with n (sum p) (sum q)."""
    p, q = sum(widths), sum(other_widths)
    return n * (p + q + len(widths) * len(other_widths)) < p * q


def _hsic(one: _Layer, two: _Layer, gram: bool) -> Tensor:
    # As X is centered, K without its diagonal has K 1 = -r, r = |x_i|^2: only the first term needs more than r.
    n = len(one.norms)
    if gram:
        inner = one.matrix.flatten() @ two.matrix.flatten()
    else:
        inner = (one.matrix.T @ two.matrix).square().sum()
    rows = n / (n - 2) * (one.norms @ two.norms)
    product = one.norms.sum() * two.norms.sum() / ((n - 1) * (n - 2))
    total = inner - rows + product
    rounding = 1e-13 * (inner + rows + product)
    return torch.where(total.abs() > rounding, total, 0.0) / (n * (n - 3))


def _hsic_sums(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """HSIC of all pairs (K, L), and of the layers of each side with themselves, (K,) and (L,)."""
    counts = sorted({len(x) for x in (*xs, *ys)})
    if len(counts) > 1 or counts[0] < 4:
        raise ValueError(
            f"Layers have {counts} tokens, expected the same 4 or more: align the texts."
        )
    gram = _gram_is_cheaper(counts[0], [x.shape[1] for x in xs], [y.shape[1] for y in ys])
    sides = []
    for side in (xs, ys):
        features = [_centered(x) for x in side]
        sides.append([_Layer(x @ x.T if gram else x, x.square().sum(1)) for x in features])
    pairs = [_hsic(a, b, gram) for a in sides[0] for b in sides[1]]
    one, two = (torch.stack([_hsic(a, a, gram) for a in side]) for side in sides)
    return torch.stack(pairs).view(len(xs), len(ys)), one, two


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """Estimate without bias how much two layers have in common: HSIC_1 with linear kernels, in float64.

    With K = XX' and L = YY', diagonals set to 0, it is [tr(KL) + (1'K1)(1'L1) / ((n-1)(n-2)) -
    2/(n-2) 1'KL1] / (n(n-3)). For X and Y centered, and r the squared norms of their rows, that is
    [||X'Y||^2 - n/(n-2) sum r_x r_y + ||X||^2 ||Y||^2 / ((n-1)(n-2))] / (n(n-3)), where the first
    term costs n p q multiplications, or, as <XX', YY'>, n^2 (p + q): the cheaper one is taken.
    Source: Nguyen et al. (2021), arXiv 2010.15327, equation 3; Song et al. (2012), JMLR 13, HSIC_1.

    Args:
        x, y: (n, p) and (n, q), features of the same n >= 4 tokens, in any dtype.

    Returns:
        A scalar, which may be negative.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> round(hsic(x, x).item(), 4), round(hsic(x, 10 * x + 7).item(), 4)
        (2.1667, 216.6667)
    """
    return _hsic_sums([x], [y])[0][0, 0]


class CKA:
    """Unbiased CKA of K layers with L others, from minibatches; it keeps K L + K + L sums.

    HSIC is averaged over minibatches first, and the ratio is taken last: each minibatch has the
    same weight, so let their sizes be similar. An update computes the Gram matrices of K + L
    layers, n^2 numbers each, or none if n is large: a thousand tokens per minibatch are fine.
    Source: Nguyen et al. (2021), arXiv 2010.15327, equation 2.

    Example:
        >>> x, y = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
        >>> cka = CKA()
        >>> cka.update([x, y], [2 * x])
        >>> round(cka.matrix()[0, 0].item(), 12)
        1.0
    """

    def __init__(self):
        self.sums = None  # of HSIC: (K, L), of xs with themselves (K,), of ys (L,)

    @torch.no_grad()
    def update(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        """Add a minibatch: K layers (n, p_k) and L layers (n, q_l) of the same n tokens."""
        new = [sums.cpu() for sums in _hsic_sums(xs, ys)]
        if self.sums is None:
            self.sums = new
            return
        before, after = tuple(self.sums[0].shape), tuple(new[0].shape)
        if before != after:
            raise ValueError(f"There are {after} layers, {before} before: give the same layers.")
        self.sums = tuple(a + b for a, b in zip(self.sums, new, strict=True))

    def matrix(self) -> Tensor:
        """Return CKA of every pair so far, (K, L), float64."""
        pairs, xs, ys = self.sums
        for name, sums in (("xs", xs), ("ys", ys)):
            if (sums <= 0).any():
                constant = (sums <= 0).nonzero().flatten().tolist()
                raise ValueError(
                    f"Layers {constant} of {name} do not vary over tokens: leave them out."
                )
        return pairs / (xs[:, None] * ys).sqrt()  # sums serve as means: their number cancels


# -- a linear map


def ridge(xx: Tensor, xy: Tensor, strength: float) -> Tensor:
    """Solve least squares with a ridge, (..., p, q), from X'X (..., p, p) and X'Y (..., p, q).

    Args:
        strength: of the ridge, relative to the mean of the diagonal of X'X.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> ridge(x.T @ x, x.T @ torch.tensor([[2.0], [4.0]]), strength=1.0).flatten()
        tensor([1., 2.])
    """
    diagonal = xx.diagonal(dim1=-2, dim2=-1)
    penalty = strength * diagonal.mean(-1, keepdim=True).expand_as(diagonal)
    factor = torch.linalg.cholesky(xx + penalty.diag_embed())
    return torch.cholesky_solve(xy, factor)


# -- the layer map


class LayerMap(NamedTuple):
    """For each of K student layers the k teacher layers it is mapped to, best first: (K, k), and their weights."""

    indices: Tensor
    weights: Tensor
    teacher_layers: int


def layer_map(matrix: Tensor, k: int) -> LayerMap:
    """Choose the k most similar teacher layers (columns) of each student layer (row), weighted by a softmax over them.

    The lower layer comes first where two are equal.

    Example:
        >>> chosen = layer_map(torch.tensor([[0.1, 0.9, 0.9], [0.5, 0.2, 0.1]]), k=2)
        >>> chosen.indices.tolist(), chosen.weights[0].tolist()
        ([[1, 2], [0, 1]], [0.5, 0.5])
    """
    if not torch.isfinite(matrix).all():
        raise ValueError("The matrix is not finite: run the models in bfloat16 or float32.")
    layers = matrix.shape[1]
    if not 0 < k <= layers:
        raise ValueError(f"k is {k}, expected 1 to {layers}, the number of teacher layers.")
    values, indices = matrix.double().sort(dim=1, descending=True, stable=True)
    return LayerMap(indices[:, :k], values[:, :k].softmax(1), layers)


def proportional(student_layers: int, teacher_layers: int) -> LayerMap:
    """Map each student layer to the teacher layer at the same fraction of the depth, ends to ends.

    >>> proportional(3, 7).indices.flatten()
    tensor([0, 3, 6])
    """
    return _one_each(np.linspace(0, teacher_layers - 1, student_layers).round(), teacher_layers)


def last_aligned(student_layers: int, teacher_layers: int) -> LayerMap:
    """Map last layer to last layer, and so on to the front; the teacher's first layer serves all that are left.

    >>> last_aligned(4, 3).indices.flatten(), last_aligned(2, 12).indices.flatten()
    (tensor([0, 0, 1, 2]), tensor([10, 11]))
    """
    layers = np.arange(teacher_layers - student_layers, teacher_layers)
    return _one_each(layers.clip(min=0), teacher_layers)


def first_aligned(student_layers: int, teacher_layers: int) -> LayerMap:
    """Map first layer to first layer, and so on to the end; the teacher's last layer serves all that are left.

    >>> first_aligned(4, 3).indices.flatten(), first_aligned(2, 12).indices.flatten()
    (tensor([0, 1, 2, 2]), tensor([0, 1]))
    """
    return _one_each(np.arange(student_layers).clip(max=teacher_layers - 1), teacher_layers)


def _one_each(layers: np.ndarray, teacher_layers: int) -> LayerMap:
    # By way of NumPy, for what uses a map may be built on the meta device, where tensors have no numbers.
    indices = torch.from_numpy(layers.astype(np.int64)[:, None])
    return LayerMap(indices, torch.from_numpy(np.ones((len(layers), 1))), teacher_layers)


def save_layer_map(
    path: str | Path, chosen: LayerMap, student: str, teacher: str, samples: int, what="hidden"
) -> Path:
    """Write a layer map as JSON, with the models' names and what it was made from. Returns the path.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_layer_map(f"{folder}/map.json", proportional(2, 3), student="s", teacher="t", samples=9)
        ...     load_layer_map(path, student_layers=2, teacher_layers=3).indices.tolist()
        [[0], [2]]
    """
    layers, k = chosen.indices.shape
    content = {"version": MAP_VERSION, "student": student, "teacher": teacher, "samples": samples}
    content |= {"what": what, "student_layers": layers, "teacher_layers": chosen.teacher_layers}
    content |= {"k": k, "indices": chosen.indices.tolist(), "weights": chosen.weights.tolist()}
    return write_text(Path(path), json.dumps(content))


def load_layer_map(path: str | Path, student_layers: int, teacher_layers: int) -> LayerMap:
    """Read what `save_layer_map` wrote, for models with these numbers of layers.

    Raises:
        ValueError: the file is no layer map, or one for other models.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        indices = torch.tensor(content["indices"])
        weights = torch.tensor(content["weights"], dtype=torch.float64)
        layers = content["student_layers"], content["teacher_layers"]
        valid = content["version"] == MAP_VERSION
        valid &= indices.shape == weights.shape == (layers[0], content["k"])
        valid = valid and bool(((indices >= 0) & (indices < layers[1]) & (weights >= 0)).all())
        valid = valid and bool(((weights.sum(1) - 1).abs() < 1e-6).all())
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no layer map ({type(error).__name__}: {error}).") from error
    if not valid:
        raise ValueError(
            f"{path} is no layer map of version {MAP_VERSION} with layers of the teacher and weights "
            "that add up to 1: make it again by `kvlab layer-map`."
        )
    if layers != (student_layers, teacher_layers):
        names = f"maps {layers[0]} layers of {content['student']} to {layers[1]} of {content['teacher']}"
        raise ValueError(
            f"{path} {names}, but the models have {student_layers} and {teacher_layers}: make another."
        )
    return LayerMap(indices, weights, teacher_layers)
