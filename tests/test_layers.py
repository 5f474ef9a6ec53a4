"""The laws of unbiased CKA, against sums over all tuples; and layer maps that survive a file."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab import layers as module
from kvlab.layers import (
    CKA,
    first_aligned,
    hsic,
    last_aligned,
    layer_map,
    load_layer_map,
    proportional,
    save_layer_map,
)

DOUBLE = torch.float64
seeds = st.integers(0, 10**6)
both_forms = pytest.mark.parametrize("gram", [True, False])


def near(one, two, within=1e-10):
    torch.testing.assert_close(one, two, rtol=within, atol=within)


def biased_cka(x, y):
    """Kornblith et al. (2019), equations 3 and 4: the estimate that reports similarity where there is none."""
    x, y = ((z - z.mean(0)).double() for z in (x, y))
    return (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def some(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def related(n, p=6, q=9, noise=1.0, seed=0):
    """Two layers that have something in common."""
    x = some(n, p, seed=seed)
    return x, x @ some(p, q, seed=1) / p**0.5 + noise * some(n, q, seed=seed + 10**7)


def cka_of(x, y):
    cka = CKA()
    cka.update([x], [y])
    return cka.matrix()[0, 0]


def streamed(batches):
    cka = CKA()
    for xs, ys in batches:
        cka.update(xs, ys)
    return cka


def use_gram(monkeypatch, gram):
    monkeypatch.setattr(module, "_gram_is_cheaper", lambda *_: gram)


# -- HSIC is what the papers say


def by_tuples(x, y):
    """The mean over all four different tokens of K_ij (L_ij + L_qr - 2 L_iq): the U-statistic itself."""
    gram, other = x @ x.T, y @ y.T
    tuples = itertools.permutations(range(len(x)), 4)
    return torch.stack(
        [gram[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q]) for i, j, q, r in tuples]
    ).mean()


def by_grams(x, y):
    """Nguyen et al., equation 3, as printed."""
    n, ones = len(x), torch.ones(len(x), 1, dtype=DOUBLE)
    gram, other = ((z @ z.T).fill_diagonal_(0) for z in (x, y))
    common = (ones.T @ gram @ ones) * (ones.T @ other @ ones) / ((n - 1) * (n - 2))
    both = torch.trace(gram @ other) + common - 2 / (n - 2) * (ones.T @ gram @ other @ ones)
    return both.squeeze() / (n * (n - 3))


@both_forms
@pytest.mark.parametrize("n", [4, 5, 7])
@pytest.mark.parametrize(("p", "q"), [(1, 1), (3, 8)])
def test_it_is_the_mean_over_all_tuples_and_the_printed_formula(monkeypatch, gram, n, p, q):
    use_gram(monkeypatch, gram)
    x, y = some(n, p) + 3, some(n, q, seed=1) - some(n, p) @ some(p, q, seed=2)
    near(hsic(x, y), by_tuples(x, y))
    near(hsic(x, y), by_grams(x, y))


@both_forms
def test_over_all_samples_its_mean_is_the_squared_covariance(monkeypatch, gram):
    use_gram(monkeypatch, gram)
    x, y = (
        some(4, 2),
        some(4, 3, seed=1),
    )  # a distribution on four points, from which four tokens are drawn
    draws = [list(draw) for draw in itertools.product(range(4), repeat=4)]
    covariance = (x - x.mean(0)).T @ (y - y.mean(0)) / 4
    near(torch.stack([hsic(x[draw], y[draw]) for draw in draws]).mean(), covariance.square().sum())


def test_over_all_pairings_its_mean_is_zero_and_that_of_the_biased_form_is_not():
    x, y = some(5, 3), some(5, 4, seed=1)
    orders = [list(order) for order in itertools.permutations(range(5))]
    near(
        torch.stack([cka_of(x, y[order]) for order in orders]).mean(),
        torch.tensor(0.0, dtype=DOUBLE),
    )
    assert torch.stack([biased_cka(x, y[order]) for order in orders]).mean() > 0.4


@both_forms
def test_the_biased_form_is_the_printed_formula(monkeypatch, gram):
    use_gram(monkeypatch, gram)
    x, y = related(11)
    center = torch.eye(11, dtype=DOUBLE) - 1 / 11
    grams = (x + 2) @ (x + 2).T, y @ y.T
    xy, xx, yy = (
        torch.trace(k @ center @ other @ center)
        for k, other in (grams, grams[:1] * 2, grams[1:] * 2)
    )
    near(biased_cka(x + 2, y), xy / (xx * yy).sqrt())


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds,
    n=st.integers(4, 20),
    p=st.integers(1, 12),
    q=st.integers(1, 12),
    offset=st.sampled_from([0, 1e3]),
)
def test_both_forms_are_equal_and_symmetric(seed, n, p, q, offset):
    x, y = some(n, p, seed=seed) + offset, some(n, q, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        use_gram(patch, True)
        gram, mirrored = hsic(x, y), hsic(y, x)
        use_gram(patch, False)
        near(hsic(x, y), gram)
    near(mirrored, gram)
    near(by_grams(x, y), gram, within=1e-6)


def test_the_cheaper_form_is_taken():
    cheaper = module._gram_is_cheaper
    assert cheaper(40, [100], [100])  # 40 * 40 * 201 multiplications against 40 * 100 * 100
    assert not cheaper(60, [100], [100])
    assert not cheaper(1000, [8], [8])
    assert not cheaper(10**5, [64] * 28, [128] * 36)
    assert cheaper(200, [1024] * 28, [2048] * 36)


# -- CKA


@settings(deadline=None, max_examples=40)
@given(seed=seeds, n=st.integers(4, 30), p=st.integers(2, 40))
def test_of_a_layer_with_itself_it_is_one(seed, n, p):
    x = some(n, p, seed=seed)
    near(cka_of(x, x), torch.tensor(1.0, dtype=DOUBLE))
    near(biased_cka(x, x), torch.tensor(1.0, dtype=DOUBLE))


@pytest.mark.parametrize(("n", "p"), [(12, 48), (40, 5)])
def test_independent_layers_have_none_in_common_though_the_biased_form_says_so(n, p):
    pairs = [(some(n, p, seed=2 * i), some(n, p, seed=2 * i + 1)) for i in range(300)]
    values = torch.stack([cka_of(x, y) for x, y in pairs])
    biased = torch.stack([biased_cka(x, y) for x, y in pairs])
    assert values.mean().abs() < 3 * values.std() / len(values) ** 0.5
    assert values.std() > 0.01  # or nothing was measured
    assert (values < 0).any()
    assert biased.mean() > 10 * biased.std() / len(values) ** 0.5
    assert biased.mean() > (0.7 if p > n else 0.1)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, scale=st.sampled_from([-1e4, 1e-4, 3.0]), shift=st.sampled_from([0.0, -20.0]))
def test_turning_scaling_and_moving_either_side_changes_nothing(seed, scale, shift):
    x, y = related(20, seed=seed)
    turn, other = (torch.linalg.qr(some(p, p, seed=seed + 5)).Q for p in (6, 9))
    want = cka_of(x, y)
    near(cka_of(scale * x @ turn + shift, y), want, within=1e-8)
    near(cka_of(x, scale * y @ other + shift), want, within=1e-8)
    near(hsic(scale * x @ turn + shift, y), scale**2 * hsic(x, y), within=1e-8)


def test_a_general_linear_map_changes_it():
    x, y = related(200)
    stretched = x * torch.tensor([100.0, 1, 1, 1, 1, 1], dtype=DOUBLE)
    assert abs(cka_of(stretched, y) - cka_of(x, y)) > 0.05
    assert cka_of(stretched, x) < 0.9


@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_the_order_of_tokens_does_not_matter_but_their_pairing_does(seed):
    x, y = related(24, noise=0.1, seed=seed)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    near(cka_of(x[order], y[order]), cka_of(x, y))
    assert cka_of(x, y.roll(1, 0)) < cka_of(x, y) - 0.2


def test_the_matrix_is_that_of_all_pairs_alone():
    xs, ys = [some(30, p, seed=p) for p in (3, 50)], [some(30, q, seed=q) for q in (4, 3, 20)]
    ys[2][:, :3] += 2 * xs[0]
    matrix = streamed([(xs, ys)]).matrix()
    assert matrix.shape == (2, 3)
    assert matrix.dtype == DOUBLE
    near(matrix, torch.stack([torch.stack([cka_of(x, y) for y in ys]) for x in xs]))
    near(matrix[0, 1], torch.tensor(1.0, dtype=DOUBLE))  # seed 3 is both


# -- minibatches


def test_minibatches_estimate_the_whole_and_a_mean_of_ratios_does_not():
    x, y = related(8000, p=2, q=2, noise=0.5)
    parts = list(zip(x.split(5), y.split(5), strict=True))
    got, whole = streamed(([a], [b]) for a, b in parts).matrix()[0, 0], cka_of(x, y)
    xy, xx, yy = torch.stack(
        [torch.stack([hsic(a, b), hsic(a, a), hsic(b, b)]) for a, b in parts]
    ).T
    near(got, xy.mean() / (xx.mean() * yy.mean()).sqrt())
    slopes = (
        xy / (xx.mean() * yy.mean()).sqrt() - got * (xx / xx.mean() + yy / yy.mean()) / 2
    )  # the delta method
    error = slopes.std() / len(parts) ** 0.5
    ratios = (xy / (xx * yy).sqrt()).mean()
    biased = torch.stack([biased_cka(a, b) for a, b in parts]).mean()
    assert error < 0.02
    assert abs(got - whole) < 3 * error
    assert abs(ratios - whole) > 5 * error
    assert abs(biased - whole) > 5 * error


def test_what_is_kept_does_not_grow_with_tokens():
    x, y = related(500)
    assert [tuple(t.shape) for t in streamed([([x, x], [y, y, y])] * 3).sums] == [
        (2, 3),
        (2,),
        (3,),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_of_any_precision_are_computed_in_float64(dtype):
    x, y = (z.to(dtype) for z in related(30))
    assert hsic(x, y).dtype == DOUBLE
    assert torch.equal(hsic(x, y), hsic(x.double(), y.double()))
    assert torch.equal(cka_of(x, y), cka_of(x.double(), y.double()))


def test_a_far_offset_costs_no_precision():
    x, y = related(30)
    near(cka_of(x + 1e6, y), cka_of(x, y), within=1e-8)


@pytest.mark.parametrize(("n", "m"), [(3, 3), (5, 6)])
def test_other_numbers_of_tokens_are_refused(n, m):
    with pytest.raises(ValueError, match=r"expected the same 4 or more: align the texts"):
        CKA().update([some(n, 2)], [some(m, 2)])


def test_other_layers_are_refused_and_leave_the_sums_as_they_were():
    x, y = related(10)
    cka = streamed([([x], [y])])
    for xs, ys in (([x, x], [y]), ([x], [y, y])):
        with pytest.raises(ValueError, match="give the same layers"):
            cka.update(xs, ys)
    near(cka.matrix()[0, 0], cka_of(x, y))


def only_one_differs(n=7):
    return torch.nn.functional.pad(torch.full((1, 3), 0.3, dtype=DOUBLE), (0, 0, n - 1, 0)) + 0.1


@pytest.mark.parametrize("flat", [torch.full((7, 3), 0.1, dtype=DOUBLE), only_one_differs()])
@both_forms
def test_layers_that_say_nothing_are_named(monkeypatch, gram, flat):
    use_gram(monkeypatch, gram)
    assert hsic(flat, some(7, 2)) == hsic(flat, flat) == 0
    cka = streamed([([some(7, 2), flat], [some(7, 2)])])
    with pytest.raises(ValueError, match=r"Layers \[1\] of xs do not vary over tokens"):
        cka.matrix()
    cka.update([some(7, 2), some(7, 3)], [some(7, 2)])
    assert torch.isfinite(cka.matrix()).all()


# -- layer maps


@settings(deadline=None, max_examples=50)
@given(seed=seeds, rows=st.integers(1, 6), columns=st.integers(1, 8), data=st.data())
def test_a_map_has_the_best_layers_and_their_softmax(seed, rows, columns, data):
    k = data.draw(st.integers(1, columns))
    matrix = some(rows, columns, seed=seed)
    chosen = layer_map(matrix, k)
    assert chosen.teacher_layers == columns
    assert chosen.indices.shape == chosen.weights.shape == (rows, k)
    for row, indices, weights in zip(
        matrix.tolist(), chosen.indices.tolist(), chosen.weights, strict=True
    ):
        assert indices == sorted(range(columns), key=lambda i: -row[i])[:k]
        total = sum(math.exp(row[i]) for i in indices)
        near(weights, torch.tensor([math.exp(row[i]) / total for i in indices], dtype=DOUBLE))
        assert abs(weights.sum() - 1) < 1e-12


@pytest.mark.parametrize("k", [1, 7, 40])
def test_of_equal_layers_the_lower_comes_first(k):
    matrix = torch.zeros(2, 40)
    matrix[1, 30:] = 1.0
    assert layer_map(matrix, k).indices.tolist() == [[*range(k)], [*range(30, 40), *range(30)][:k]]


@pytest.mark.parametrize(
    ("matrix", "k", "sentence"),
    [
        (torch.eye(3), 0, "k is 0, expected 1 to 3, the number of teacher layers"),
        (torch.eye(3), 4, "k is 4, expected 1 to 3"),
        (torch.full((2, 2), math.nan), 1, "not finite: run the models in bfloat16 or float32"),
    ],
)
def test_a_map_that_cannot_be_is_refused(matrix, k, sentence):
    with pytest.raises(ValueError, match=sentence):
        layer_map(matrix, k)


def saved(folder, chosen=None, **about):
    chosen = layer_map(some(4, 6), 3) if chosen is None else chosen
    return save_layer_map(
        folder / "map.json", chosen, **{"student": "s", "teacher": "t", "samples": 100} | about
    )


def test_a_map_comes_back_bit_for_bit(tmp_path):
    chosen = layer_map(some(4, 6), 3)
    path = saved(tmp_path, chosen, student="lab-draft", teacher="lab-教師", samples=7, what="keys")
    back = load_layer_map(str(path), 4, 6)
    assert torch.equal(back.indices, chosen.indices)
    assert torch.equal(back.weights, chosen.weights)
    assert (back.weights.dtype, back.teacher_layers) == (DOUBLE, 6)
    about = {"k": 3, "student_layers": 4, "teacher_layers": 6, "version": 1, "what": "keys"}
    about |= {"student": "lab-draft", "teacher": "lab-教師", "samples": 7}
    content = json.loads(path.read_text("utf-8"))
    assert content | about == content
    assert [path.name for path in tmp_path.iterdir()] == ["map.json"]


def test_a_map_for_other_models_is_refused(tmp_path):
    path = saved(tmp_path)
    for layers in ((4, 7), (5, 6), (6, 4)):
        want = f"maps 4 layers of s to 6 of t, but the models have {layers[0]} and {layers[1]}"
        with pytest.raises(ValueError, match=want):
            load_layer_map(path, *layers)


CHANGES = {
    "another version": {"version": 2},
    "no names": {"indices": None},
    "another k": {"k": 2},
    "fewer rows": {"indices": [[0, 1, 2]] * 3},
    "ragged": {"indices": [[0, 1, 2], [0]]},
    "words": {"weights": "some"},
    "too high": {"indices": [[0, 1, 6]] * 4},
    "negative layer": {"indices": [[0, 1, -1]] * 4},
    "sum": {"weights": [[0.5, 0.4, 0.2]] * 4},
    "negative weight": {"weights": [[1.5, -0.5, 0.0]] * 4},
    "nan": {"weights": [[math.nan, 0.5, 0.5]] * 4},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_is_no_layer_map_is_refused(tmp_path, name):
    path = saved(tmp_path)
    content = json.loads(path.read_text("utf-8")) | CHANGES[name]
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match="is no layer map"):
        load_layer_map(path, 4, 6)


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe"])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "map.json").write_bytes(content)
    with pytest.raises(ValueError, match="no layer map"):
        load_layer_map(tmp_path / "map.json", 4, 6)


def test_the_proportional_map_goes_from_end_to_end():
    cases = {
        (4, 4): [0, 1, 2, 3],
        (3, 7): [0, 3, 6],
        (2, 12): [0, 11],
        (1, 5): [0],
        (5, 3): [0, 0, 1, 2, 2],
        (6, 28): [0, 5, 11, 16, 22, 27],
    }
    for (own, theirs), want in cases.items():
        indices, weights, layers = proportional(own, theirs)
        assert (indices.flatten().tolist(), layers) == (want, theirs)
        assert weights.tolist() == [[1.0]] * own


def test_last_layers_are_aligned_whichever_model_is_deeper():
    assert last_aligned(28, 24).indices.flatten().tolist() == [0] * 4 + list(range(24))
    assert last_aligned(24, 28).indices.flatten().tolist() == list(range(4, 28))
    assert first_aligned(28, 24).indices.flatten().tolist() == [*range(24), *[23] * 4]
    for made in (last_aligned(5, 5), proportional(5, 5), first_aligned(5, 5)):
        assert made.indices.flatten().tolist() == list(range(5))
