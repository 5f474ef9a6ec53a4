"""Losses on next-token distributions: p is the target's (or a teacher's), q that of the model in training.

A distance takes log q and log p of a token, (..., V), and gives nats (or a probability) for each,
(...). What is accepted in speculative decoding is alpha = sum_x min(p(x), q(x)), a share of 1
(Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6); with greedy choice it is 1 where both have
the same likeliest token, else 0.

The vocabulary of q may be shorter than that of p: then it has the first tokens of it. Acceptance
counts the whole of p, so what q cannot say is lost; the divergences compare q with p on the tokens
that both have.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q). It makes q cover all that p says, and falls fast from a cold start.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> round(kl(q, p).item(), 4), round(kl(p, p).item(), 4)
        (0.1438, 0.0)
    """
    return _divergence(_renormalized(log_p, log_q), log_q)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) = sum q (log q - log p). It makes q keep to what p says, and leave out what it cannot say well.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> round(reverse_kl(q, p).item(), 4)
        0.1308
    """
    return _divergence(log_q, _renormalized(log_p, log_q))


def tv(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Total variation, 1 - alpha: the share of drafted tokens that are rejected when tokens are drawn.

    The very thing to make small, but where q has little of what p says its gradient, sum over x
    with q < p of q(x) (d log q(x)), vanishes with q: from a cold start it hardly moves (Samarin et
    al. 2026, arXiv 2602.23881).

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> tv(q, p).item()
        0.25
    """
    return 1 - acceptance(log_q, log_p)


def log_alpha(log_q: Tensor, log_p: Tensor) -> Tensor:
    """-log alpha: its gradient is that of total variation over alpha, so it is large where acceptance is small.

    Source: Samarin et al. (2026), arXiv 2602.23881, the negative log-acceptance loss.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> round(log_alpha(q, p).item(), 4)  # -log 0.75
        0.2877
    """
    return -_overlap(log_q, log_p).logsumexp(-1)


def lk_hybrid(log_q: Tensor, log_p: Tensor) -> Tensor:
    """lam KL(p || q) + (1 - lam) TV with lam = exp(-3 alpha), alpha without gradient: KL first, acceptance later.

    Source: Samarin et al. (2026), arXiv 2602.23881, the hybrid loss with an adaptive weight, here
    for each token.

    Example:
        >>> p = torch.tensor([0.5, 0.5]).log()
        >>> round(lk_hybrid(p, p).item(), 4)
        0.0
    """
    lam = torch.exp(-3 * acceptance(log_q, log_p).detach())
    return lam * kl(log_q, log_p) + (1 - lam) * tv(log_q, log_p)


def acceptance(log_q: Tensor, log_p: Tensor) -> Tensor:
    """alpha = sum min(p, q), the probability that a token drawn from q is accepted.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> acceptance(q, p).item()
        0.75
    """
    return _overlap(log_q, log_p).exp().sum(-1)


def _overlap(log_q: Tensor, log_p: Tensor) -> Tensor:
    return torch.minimum(log_q, _shared(log_p, log_q))


def _shared(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p of the tokens that q has."""
    size, whole = log_q.shape[-1], log_p.shape[-1]
    if size > whole:
        raise ValueError(
            f"q has {size} tokens, p only {whole}; expected as many or fewer: pad the target's logits."
        )
    return log_p[..., :size]


def _renormalized(log_p: Tensor, log_q: Tensor) -> Tensor:
    shared = _shared(log_p, log_q)
    return shared if shared.shape == log_p.shape else shared.log_softmax(-1)


def _divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b), 0.0).sum(-1)


DISTANCES = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "tv": tv,
    "log_alpha": log_alpha,
    "lk_hybrid": lk_hybrid,
}
NAMES = ("ce", *DISTANCES)


def distill(
    shares: Mapping[str, float],
    logits: Tensor,
    target_logits: Tensor,
    input_ids: Tensor,
    weights: Tensor,
    distill_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Several losses at once, each a mean over token weights times its share, for `fit`.

    Args:
        shares: the factor of each loss by name, {"kl": 0.5, "ce": 1.0}, say. "ce" is cross-entropy
            with the tokens.
        logits, target_logits: (B, T, V) and (B, T, V_p >= V), the outputs at each position. The
            target gets no gradient.
        input_ids, weights: (B, T), as for `cross_entropy`.
        distill_weights: (B, T), the weights for all losses but "ce"; by default the same ones.
            Where a text is not the target's own, its distributions are of no use.

    Raises:
        ValueError: a loss that does not exist, or shapes that do not fit; the message names the
            choices.

    Example:
        >>> logits, ids = torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]])
        >>> losses = distill({"kl": 0.5, "ce": 1.0}, logits, logits, ids, torch.ones(1, 3))
        >>> {name: round(value.item(), 4) for name, value in losses.items()}
        {'ce': 2.0794, 'kl': 0.0}
    """
    require_known(shares)
    if logits.shape[:2] != target_logits.shape[:2] or logits.shape[:2] != input_ids.shape:
        shapes = f"logits {tuple(logits.shape)}, target_logits {tuple(target_logits.shape)}"
        raise ValueError(
            f"{shapes} and input_ids {tuple(input_ids.shape)} do not fit: expected the same (B, T)."
        )
    found = (
        {"ce": shares["ce"] * cross_entropy(logits, input_ids, weights)} if "ce" in shares else {}
    )
    asked = [name for name in shares if name != "ce"]
    if asked:
        weights = (weights if distill_weights is None else distill_weights)[:, 1:].to(torch.float32)
        counted = (
            weights > 0
        )  # the vocabulary is large: nothing is computed for tokens that do not count
        log_q, log_p = (
            _log_softmax(x[:, :-1][counted]) for x in (logits, target_logits.detach())
        )  # (N, V)
        weights = weights[counted]
        for name in asked:
            values = (DISTANCES[name](log_q, log_p) * weights).sum()
            found[name] = shares[name] * values / weights.sum().clamp_min(1e-9)
    return found


def require_known(shares: Mapping[str, float]) -> None:
    """Raise ValueError unless all losses exist, and there is one.

    >>> require_known({"kl": 1.0})
    """
    unknown = sorted(set(shares) - set(NAMES))
    if unknown or not shares:
        raise ValueError(
            f"There is no loss {unknown or shares}; expected one or more of {', '.join(NAMES)}."
        )


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def cross_entropy(logits: Tensor, input_ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted next-token cross-entropy in nats, a mean over token weights.

    Args:
        logits: (B, T, V), the output at each position.
        input_ids: (B, T), the tokens; position t is predicted from t-1.
        weights: (B, T), the weight of predicting each token; the first column is never predicted.

    Returns:
        A scalar: sum of weight * -log p(token) over sum of weights; 0 when all weights are 0.

    Example:
        >>> logits, ids = torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]])
        >>> round(cross_entropy(logits, ids, torch.ones(1, 3)).item(), 4)  # log 8
        2.0794
    """
    weights = weights[:, 1:].to(torch.float32)
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum().clamp_min(1e-9)
