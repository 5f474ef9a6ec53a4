"""Cross-entropy with a weight per token, against torch and transformers; distances, against plain formulas."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kvlab.losses import (
    DISTANCES,
    NAMES,
    acceptance,
    columns_to_keep,
    cross_entropy,
    distillation_losses,
    kl,
    lk_hybrid,
    log_alpha,
    require_known_losses,
    reverse_kl,
    tv,
)
from kvlab.speculate import Proposal, sample_categorical, verify

B, T, V = 3, 7, 11


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(B, T, V, generator=generator)
    return (
        logits,
        torch.randint(0, V, (B, T), generator=generator),
        torch.rand(B, T, generator=generator),
    )


def test_equal_weights_are_torchs_mean(data):
    logits, ids, _ = data
    want = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:])
    for weight in (1.0, 0.25):
        torch.testing.assert_close(cross_entropy(logits, ids, torch.full((B, T), weight)), want)


def test_it_is_the_weighted_sum_over_the_sum_of_weights(data):
    logits, ids, weights = data
    total = sum(
        -weights[b, t] * logits[b, t - 1].log_softmax(-1)[ids[b, t]]
        for b in range(B)
        for t in range(1, T)
    )
    torch.testing.assert_close(cross_entropy(logits, ids, weights), total / weights[:, 1:].sum())


def test_it_is_a_mean_over_tokens_and_not_over_rows(data):
    logits, ids, _ = data
    weights = torch.ones(B, T)
    weights[0, 2:] = 0  # one token left in the first row, six in each of the others
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    got = cross_entropy(logits, ids, weights)
    torch.testing.assert_close(got, (each[0, 0] + each[1:].sum()) / 13)
    assert not torch.isclose(got, (each[0, 0] + each[1].mean() + each[2].mean()) / 3, atol=1e-3)


def test_scale_of_weights_does_not_matter(data):
    logits, ids, weights = data
    torch.testing.assert_close(
        cross_entropy(logits, ids, 50 * weights), cross_entropy(logits, ids, weights)
    )


def test_the_first_token_and_the_last_logits_do_not_count(data):
    logits, ids, weights = data
    want = cross_entropy(logits, ids, weights)
    weights[:, 0], logits[:, -1] = 100.0, torch.randn(B, V)
    assert torch.equal(cross_entropy(logits, ids, weights), want)


def test_tokens_without_weight_do_not_count(data):
    logits, ids, weights = data
    weights[:, 4:] = 0
    want = cross_entropy(logits[:, :4], ids[:, :4], weights[:, :4])
    torch.testing.assert_close(cross_entropy(logits, ids, weights), want)


def test_no_weight_at_all_is_zero(data):
    logits, ids, _ = data
    logits.requires_grad_()
    loss = cross_entropy(logits, ids, torch.zeros(B, T))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros(B, T, V))


def test_gradient_is_weight_times_softmax_minus_one_hot(data):
    logits, ids, weights = data
    logits.requires_grad_()
    cross_entropy(logits, ids, weights).backward()
    want = torch.zeros(B, T, V)
    share = weights[:, 1:, None] / weights[:, 1:].sum()
    want[:, :-1] = share * (logits[:, :-1].softmax(-1) - F.one_hot(ids[:, 1:], V))
    torch.testing.assert_close(logits.grad, want.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(data, dtype):
    logits, ids, weights = data
    loss = cross_entropy(logits.to(dtype), ids, weights.to(dtype))
    assert loss.dtype == torch.float32
    assert torch.equal(
        loss, cross_entropy(logits.to(dtype).float(), ids, weights.to(dtype).float())
    )


def test_it_is_the_loss_of_transformers(tiny_model):
    model = tiny_model("Qwen3")
    ids = torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(1))
    weights = torch.ones(3, 12)
    weights[0, :5], weights[1, 8:], weights[2] = 0, 0, 0
    output = model(ids, labels=ids.masked_fill(weights == 0, -100))
    torch.testing.assert_close(cross_entropy(output.logits, ids, weights), output.loss)


# distances between distributions


SIZE, WHOLE = 7, 9
DOUBLE = torch.float64


def some_logits(*shape, seed=0, scale=1.5):
    return scale * torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def pair(size=SIZE, whole=SIZE, rows=(5,), scale=1.5):
    """Log q and log p, rows of each."""
    log_q, log_p = (
        some_logits(*rows, size, seed=1, scale=scale),
        some_logits(*rows, whole, seed=2, scale=scale),
    )
    return log_q.log_softmax(-1), log_p.log_softmax(-1)


def formula(name, q, p):
    """A distance of two distributions on the same tokens, as it stands in a book."""
    alpha = sum(torch.minimum(q[..., x], p[..., x]) for x in range(q.shape[-1]))
    kl = sum(p[..., x] * torch.log(p[..., x] / q[..., x]) for x in range(q.shape[-1]))
    lam = torch.exp(-3 * alpha).detach()
    return {
        "kl": kl,
        "reverse_kl": sum(q[..., x] * torch.log(q[..., x] / p[..., x]) for x in range(q.shape[-1])),
        "tv": 0.5 * (q - p).abs().sum(-1),
        "log_alpha": -torch.log(alpha),
        "lk_hybrid": lam * kl + (1 - lam) * 0.5 * (q - p).abs().sum(-1),
    }[name]


def gradient(distance, logits, log_p):
    """By the logits that q is made of."""
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(distance(logits.log_softmax(-1), log_p).sum(), logits)[0]


every_distance = pytest.mark.parametrize("name", DISTANCES)


@every_distance
def test_a_distance_and_its_gradient_are_those_of_the_formula(name):
    log_q, log_p = pair(rows=(2, 5))
    assert DISTANCES[name](log_q, log_p).shape == (2, 5)
    assert DISTANCES[name](log_q, log_p).dtype == DOUBLE
    torch.testing.assert_close(
        DISTANCES[name](log_q, log_p), formula(name, log_q.exp(), log_p.exp())
    )
    got = gradient(DISTANCES[name], log_q, log_p)
    torch.testing.assert_close(
        got, gradient(lambda q, p: formula(name, q.exp(), p.exp()), log_q, log_p)
    )
    assert (got.abs().sum(-1) > 1e-3).all()


@every_distance
@pytest.mark.parametrize("whole", [SIZE, WHOLE])
def test_gradients_are_finite_differences(name, whole):
    log_q, log_p = pair(whole=whole)
    if name == "lk_hybrid":  # lam is held at what it is, as it has no gradient
        lam = torch.exp(-3 * acceptance(log_q, log_p))
        free = lambda q: lam * kl(q, log_p) + (1 - lam) * tv(q, log_p)
        want = gradient(lambda q, _: free(q), log_q, log_p)
        torch.testing.assert_close(gradient(lk_hybrid, log_q, log_p), want)
    else:
        free = lambda q: DISTANCES[name](q, log_p)
    assert torch.autograd.gradcheck(
        lambda x: free(x.log_softmax(-1)), log_q.clone().requires_grad_()
    )


@every_distance
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.01, 1.0, 8.0, 40.0]),
    size=st.integers(1, WHOLE),
)
def test_distances_are_finite_and_not_negative(name, seed, scale, size):
    log_q, log_p = (
        some_logits(3, size, seed=seed, scale=scale),
        some_logits(3, WHOLE, seed=seed + 1, scale=scale),
    )
    log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
    assert torch.isfinite(DISTANCES[name](log_q, log_p)).all()
    assert (DISTANCES[name](log_q, log_p) > -1e-12).all()
    assert torch.isfinite(gradient(DISTANCES[name], log_q, log_p)).all()
    assert DISTANCES[name](log_p, log_p).abs().max() < 1e-12


def test_two_directions_and_what_each_forgives():
    wide, narrow = (
        torch.tensor([0.5, 0.49, 0.01], dtype=DOUBLE).log(),
        torch.tensor([0.98, 0.01, 0.01], dtype=DOUBLE).log(),
    )
    assert kl(wide, narrow) < kl(
        narrow, wide
    )  # a q that is too wide costs less than one that leaves something out
    assert reverse_kl(narrow, wide) < reverse_kl(wide, narrow)
    torch.testing.assert_close(kl(wide, narrow), reverse_kl(narrow, wide))


def test_total_variation_is_what_is_rejected_when_tokens_are_drawn():
    log_q, log_p = pair()
    torch.testing.assert_close(tv(log_q, log_p), 1 - acceptance(log_q, log_p))
    torch.testing.assert_close(log_alpha(log_q, log_p), -acceptance(log_q, log_p).log())
    uniform, rows = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(3)), 20_000
    p, q = (x[0].exp().expand(rows, 1, -1) for x in (log_p, log_q))
    tokens = sample_categorical(q[:, 0], uniform[:, 0])[:, None]
    accepted, _ = verify(p.repeat(1, 2, 1), Proposal(tokens, q), uniform[:, 1:].repeat(1, 2))
    assert (
        abs(accepted.double().mean() - acceptance(log_q, log_p)[0]) < 4 * 0.5 / rows**0.5
    )  # standard errors


def test_the_gradient_of_log_alpha_is_that_of_total_variation_over_alpha():
    log_q, log_p = pair()
    alpha = acceptance(log_q, log_p)[:, None]
    torch.testing.assert_close(
        gradient(log_alpha, log_q, log_p), gradient(tv, log_q, log_p) / alpha
    )


def test_total_variation_has_no_gradient_from_a_cold_start_where_the_others_have():
    log_p = torch.tensor([[0.0] + 20 * [-40.0]], dtype=DOUBLE).log_softmax(-1)
    cold = torch.tensor([[-25.0] + 20 * [0.0]], dtype=DOUBLE)  # q says nothing of what p says
    sizes = {name: gradient(DISTANCES[name], cold, log_p).abs().max().item() for name in DISTANCES}
    assert sizes["tv"] < 1e-9
    assert min(sizes["kl"], sizes["log_alpha"], sizes["lk_hybrid"]) > 0.1
    step = cold - gradient(log_alpha, cold, log_p)
    assert step[0, 0] > cold[0, 0]  # downhill is towards what p says


def test_the_hybrid_is_kl_where_little_is_accepted_and_total_variation_later():
    (log_q, log_p), far = pair(rows=(1,)), pair(rows=(1,), scale=60.0)
    assert acceptance(*far) < 1e-3
    torch.testing.assert_close(lk_hybrid(*far), kl(*far), rtol=1e-2, atol=0)
    near = 0.99 * log_p.exp() + 0.01 * log_q.exp()
    alpha = acceptance(near.log(), log_p)
    lam = math.exp(-3 * alpha)
    assert lam < 0.06
    torch.testing.assert_close(
        lk_hybrid(near.log(), log_p), lam * kl(near.log(), log_p) + (1 - lam) * (1 - alpha)
    )


# a shorter vocabulary


def test_acceptance_counts_the_whole_of_p_and_divergences_what_both_have():
    log_q, log_p = pair(whole=WHOLE)
    p, q = log_p.exp(), log_q.exp()
    shared = p[:, :SIZE] / p[:, :SIZE].sum(-1, keepdim=True)
    alpha = sum(torch.minimum(q[:, x], p[:, x]) for x in range(SIZE))
    torch.testing.assert_close(acceptance(log_q, log_p), alpha)
    torch.testing.assert_close(tv(log_q, log_p), 1 - alpha)
    torch.testing.assert_close(log_alpha(log_q, log_p), -alpha.log())
    torch.testing.assert_close(kl(log_q, log_p), formula("kl", q, shared))
    torch.testing.assert_close(reverse_kl(log_q, log_p), formula("reverse_kl", q, shared))
    lam = torch.exp(-3 * alpha)
    torch.testing.assert_close(
        lk_hybrid(log_q, log_p), lam * formula("kl", q, shared) + (1 - lam) * (1 - alpha)
    )
    padded = torch.cat((log_q, torch.full((len(q), WHOLE - SIZE), -torch.inf, dtype=DOUBLE)), 1)
    torch.testing.assert_close(acceptance(padded, log_p), alpha)


@every_distance
def test_the_best_that_a_short_vocabulary_can_do(name):
    _, log_p = pair(whole=WHOLE)
    mass = log_p[:, :SIZE].exp().sum(-1)
    best = log_p[:, :SIZE].log_softmax(-1)
    want = {"kl": 0 * mass, "reverse_kl": 0 * mass, "tv": 1 - mass, "log_alpha": -mass.log(),
            "lk_hybrid": (1 - torch.exp(-3 * mass)) * (1 - mass)}[name]  # fmt: skip
    torch.testing.assert_close(DISTANCES[name](best, log_p), want)


@every_distance
def test_a_longer_vocabulary_is_refused(name):
    log_q, log_p = pair(size=WHOLE, whole=SIZE)
    with pytest.raises(
        ValueError, match=r"q has 9 tokens, p only 7; expected as many or fewer: pad the target"
    ):
        DISTANCES[name](log_q, log_p)


@every_distance
@pytest.mark.parametrize("whole", [SIZE, WHOLE])
def test_what_the_target_masks_has_probability_zero(name, whole):
    log_q, log_p = some_logits(5, SIZE, seed=1).log_softmax(-1), some_logits(5, whole, seed=2)
    log_p[:, [1, 4]] = -torch.inf
    log_p = log_p.log_softmax(-1)
    got = DISTANCES[name](log_q, log_p)
    if name == "reverse_kl":  # q says what p never does
        assert (got == torch.inf).all()
        return
    kept = [0, 2, 3, 5, 6]
    small = log_p.masked_fill(log_p == -torch.inf, -600.0)
    torch.testing.assert_close(got, DISTANCES[name](log_q, small))
    slope = gradient(DISTANCES[name], log_q, log_p)
    torch.testing.assert_close(slope, gradient(DISTANCES[name], log_q, small))
    assert torch.isfinite(slope).all()
    both = log_q[:, kept].log_softmax(-1)  # masked on both sides: as if the tokens were not there
    masked = torch.full_like(log_q, -torch.inf).index_copy(1, torch.tensor(kept), both)
    rest = log_p[:, [x for x in range(whole) if x not in (1, 4)]]
    torch.testing.assert_close(DISTANCES[name](masked, log_p), DISTANCES[name](both, rest))


def test_masked_on_both_sides_is_no_difference_to_the_reverse_divergence():
    log_q, log_p = pair()
    gone = torch.tensor([False, True, False, False, True, False, False])
    masked = [x.masked_fill(gone, -torch.inf).log_softmax(-1) for x in (log_q, log_p)]
    rest = [x[:, ~gone].log_softmax(-1) for x in (log_q, log_p)]
    torch.testing.assert_close(reverse_kl(*masked), reverse_kl(*rest))


# several losses of a batch


@pytest.fixture
def batch(data):
    """Logits, a target's logits over a larger vocabulary, ids, and weights with padding among them."""
    logits, ids, weights = data
    weights = weights.masked_fill(torch.arange(T) >= torch.tensor([[7], [3], [5]]), 0)
    weights[:, :2] = 0
    return logits, some_logits(B, T, V + 3, seed=5).float(), ids, weights


def test_distill_is_a_mean_over_tokens_of_a_plain_loop(batch):
    logits, target, ids, weights = batch
    for name in DISTANCES:
        total = 0.0
        for b, t in itertools.product(range(B), range(1, T)):
            log_q, log_p = logits[b, t - 1].log_softmax(-1), target[b, t - 1].log_softmax(-1)
            total += weights[b, t] * DISTANCES[name](log_q, log_p)
        got = distillation_losses({name: 0.3}, *batch)
        assert got.keys() == {name}
        torch.testing.assert_close(got[name], 0.3 * total / weights[:, 1:].sum())
    ones = (weights > 0).float()
    each = torch.stack(
        [
            distillation_losses({"kl": 1.0}, *(x[[b]] for x in (logits, target, ids, ones)))["kl"]
            for b in range(B)
        ]
    )
    counts = ones.sum(1)
    got = distillation_losses({"kl": 1.0}, logits, target, ids, ones)["kl"]
    torch.testing.assert_close(got, (each * counts).sum() / counts.sum())
    assert not torch.isclose(got, each.mean(), atol=1e-3)


def test_distill_gives_each_loss_its_share(batch):
    logits, _, ids, weights = batch
    shares = {"lk_hybrid": 0.25, "ce": 2.0, "kl": 0.5}
    got = distillation_losses(shares, *batch)
    assert got.keys() == shares.keys()
    torch.testing.assert_close(got["ce"], 2 * cross_entropy(logits, ids, weights))
    for name in ("kl", "lk_hybrid"):
        torch.testing.assert_close(
            got[name], shares[name] * distillation_losses({name: 1.0}, *batch)[name]
        )


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_count_changes_nothing_and_gets_no_gradient(batch, name):
    logits, target, ids, weights = batch
    logits.requires_grad_()
    target.requires_grad_()
    loss = distillation_losses({name: 1.0}, *batch)[name]
    loss.backward()
    outside = torch.cat(
        (weights[:, 1:] == 0, torch.ones(B, 1, dtype=torch.bool)), 1
    )  # (B, T), of the position before
    assert (logits.grad[outside] == 0).all()
    assert (logits.grad[~outside].abs().sum(-1) > 0).all()
    assert target.grad is None
    with torch.no_grad():
        logits[outside], target[outside] = math.nan, math.nan
        ids[weights == 0] = 0
    if name != "ce":
        assert torch.equal(
            distillation_losses({name: 1.0}, logits, target, ids, weights)[name], loss
        )
    other = distillation_losses(
        {name: 1.0}, logits.nan_to_num(7.0), target.nan_to_num(-7.0), ids, weights
    )[name]
    assert torch.equal(other, loss)


def test_weights_of_their_own_for_all_but_cross_entropy(batch):
    logits, target, ids, weights = batch
    own = weights * torch.tensor([[1.0], [0.0], [1.0]])  # the second text is not the target's
    got = distillation_losses({"ce": 1.0, "kl": 1.0, "tv": 1.0}, *batch, own)
    torch.testing.assert_close(got["ce"], cross_entropy(logits, ids, weights))
    for name in ("kl", "tv"):
        torch.testing.assert_close(
            got[name], distillation_losses({name: 1.0}, logits, target, ids, own)[name]
        )
        assert not torch.isclose(
            got[name], distillation_losses({name: 1.0}, *batch)[name], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_tokens_have_the_same_loss_and_gradient(batch, name, monkeypatch):
    logits, target, ids, weights = batch
    results = []
    for chunk in (2**25, 4 * V):
        monkeypatch.setattr("kvlab.losses.CHUNK", chunk)
        leaf = logits.clone().requires_grad_()
        loss = distillation_losses({name: 1.0}, leaf, target, ids, weights)[name]
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for whole, chunks in zip(*results, strict=True):
        torch.testing.assert_close(chunks, whole)


@pytest.mark.parametrize("first", [1, 3, T - 1])
def test_the_columns_to_keep_are_those_that_a_loss_needs(batch, first):
    logits, _, ids, weights = batch
    weights = weights.clone()
    weights[:, :first], weights[:, first] = 0, 1
    last = columns_to_keep(weights)
    assert last == T + 1 - first
    part = (x[:, -last:] for x in (logits, ids, weights))
    torch.testing.assert_close(cross_entropy(*part), cross_entropy(logits, ids, weights))
    assert columns_to_keep(torch.zeros(B, T)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_counts_is_zero_and_has_zero_gradient(batch, name):
    logits, target, ids, _ = batch
    logits.requires_grad_()
    loss = distillation_losses({name: 1.0}, logits, target, ids, torch.zeros(B, T))[name]
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(batch, name, dtype):
    logits, target, ids, weights = batch
    logits, target = logits.to(dtype), target.to(dtype)
    got = distillation_losses({name: 1.0}, logits, target, ids, weights)[name]
    assert got.dtype == torch.float32
    assert torch.equal(
        got, distillation_losses({name: 1.0}, logits.float(), target.float(), ids, weights)[name]
    )


@every_distance
def test_double_precision_stays(batch, name):
    logits, target, ids, weights = (x.double() if x.is_floating_point() else x for x in batch)
    assert distillation_losses({name: 1.0}, logits, target, ids, weights)[name].dtype == DOUBLE


@pytest.mark.parametrize("shares", [{"kld": 1.0}, {"kl": 1.0, "alpha": 0.5, "kld": 1.0}, {}])
def test_a_loss_that_does_not_exist_is_refused_with_those_that_do(batch, shares):
    for refuse in (
        lambda: require_known_losses(shares),
        lambda: distillation_losses(shares, *batch),
    ):
        with pytest.raises(
            ValueError, match="expected one or more of ce, kl, reverse_kl, tv, log_alpha, lk_hybrid"
        ) as e:
            refuse()
        assert all(repr(name) in str(e.value) for name in shares if name != "kl")
    for name in NAMES:
        require_known_losses({name: 1.0})


def test_shapes_that_do_not_fit_are_refused(batch):
    logits, target, ids, weights = batch
    for wrong in (
        (logits, target[:, :-1], ids),
        (logits[:2], target, ids),
        (logits, target, ids[:, 1:]),
    ):
        with pytest.raises(ValueError, match=r"do not fit: expected the same \(B, T\)"):
            distillation_losses({"kl": 1.0}, *wrong, weights)
