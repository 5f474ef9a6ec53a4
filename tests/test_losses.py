"""Cross-entropy with a weight per token, against torch and transformers."""

import pytest
import torch
from torch.nn import functional as F

from kvlab.losses import cross_entropy

B, T, V = 3, 7, 11


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(B, T, V, generator=generator)
    return logits, torch.randint(0, V, (B, T), generator=generator), torch.rand(B, T, generator=generator)


def test_equal_weights_are_torchs_mean(data):
    logits, ids, _ = data
    want = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:])
    for weight in (1.0, 0.25):
        torch.testing.assert_close(cross_entropy(logits, ids, torch.full((B, T), weight)), want)


def test_it_is_the_weighted_sum_over_the_sum_of_weights(data):
    logits, ids, weights = data
    total = sum(-weights[b, t] * logits[b, t - 1].log_softmax(-1)[ids[b, t]] for b in range(B) for t in range(1, T))
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
    torch.testing.assert_close(cross_entropy(logits, ids, 50 * weights), cross_entropy(logits, ids, weights))


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
    assert torch.equal(loss, cross_entropy(logits.to(dtype).float(), ids, weights.to(dtype).float()))


def test_it_is_the_loss_of_transformers(tiny_model):
    model = tiny_model("Qwen3")
    ids = torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(1))
    weights = torch.ones(3, 12)
    weights[0, :5], weights[1, 8:], weights[2] = 0, 0, 0
    output = model(ids, labels=ids.masked_fill(weights == 0, -100))
    torch.testing.assert_close(cross_entropy(output.logits, ids, weights), output.loss)
