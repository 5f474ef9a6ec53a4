"""Losses on next-token distributions: p is the target's (or a teacher's), q that of the model in training.

A distance takes log q and log p of a token, (..., V), and returns nats (or a probability), (...).
Speculative decoding accepts a token with probability alpha = sum_x min(p(x), q(x)) (Leviathan et al.
2023, arXiv 2211.17192, corollary 3.6); with greedy choice it accepts where both have the same likeliest
token.

The vocabulary of q may be the first tokens of that of p. Acceptance counts all of p, so tokens that q
lacks are lost; the divergences compare q with p on the tokens that both have.
"""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 2**25  # logits that a loss works on at once: 220 tokens of 152 thousand, 134 MB in float32


def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q). It makes q cover all of p, and falls fast from a cold start.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> round(kl(q, p).item(), 4), round(kl(p, p).item(), 4)
        (0.1438, 0.0)
    """
    return _divergence(_renormalized(log_p, log_q), log_q)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) = sum q (log q - log p). It keeps q to what is likely under p, and lets it leave out the rest.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> round(reverse_kl(q, p).item(), 4)
        0.1308
    """
    return _divergence(log_q, _renormalized(log_p, log_q))


def tv(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Total variation, 1 - alpha: the fraction of drafted tokens that are rejected in sampling.

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


def distillation_losses(
    loss_weights: Mapping[str, float],
    logits: Tensor,
    target_logits: Tensor,
    input_ids: Tensor,
    weights: Tensor,
    distill_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute several losses at once, each a mean over token weights times its loss weight, for `fit`.

    Args:
        loss_weights: By name, such as {"kl": 0.5, "ce": 1.0}; "ce" is cross-entropy with the tokens.
        logits: (B, T, V), the output at each position.
        target_logits: (B, T, V_p >= V), the target's; it gets no gradient.
        input_ids: (B, T), as for `cross_entropy`.
        weights: (B, T), as for `cross_entropy`.
        distill_weights: (B, T), the token weights of all losses but "ce"; default: the same. Where a
            text is not the target's own, its distributions are of no use.

    Example:
        >>> logits, ids = torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]])
        >>> distillation_losses({"kl": 0.5}, logits, logits, ids, torch.ones(1, 3))["kl"].item()
        0.0
    """
    require_known_losses(loss_weights)
    if logits.shape[:2] != target_logits.shape[:2] or logits.shape[:2] != input_ids.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, target_logits {tuple(target_logits.shape)} and input_ids "
            f"{tuple(input_ids.shape)} do not fit: expected the same (B, T)."
        )
    losses = {}
    if "ce" in loss_weights:
        losses["ce"] = loss_weights["ce"] * cross_entropy(logits, input_ids, weights)
    if losses.keys() == loss_weights.keys():
        return losses
    weights = (weights if distill_weights is None else distill_weights)[:, 1:].to(torch.float32)
    counted = weights > 0  # the vocabulary is large: compute nothing for tokens that do not count
    weights = weights[counted]
    names = [name for name in loss_weights if name != "ce"]

    def distances(logits: Tensor, target_logits: Tensor) -> Tensor:
        log_q, log_p = _log_softmax(logits), _log_softmax(target_logits)
        return torch.stack([DISTANCES[name](log_q, log_p) for name in names], -1)

    rows = logits[:, :-1][counted], target_logits.detach()[:, :-1][counted]  # (N, V)
    totals = (_in_chunks(distances, *rows) * weights[:, None]).sum(0)
    for name, total in zip(names, totals, strict=True):
        losses[name] = loss_weights[name] * total / weights.sum().clamp_min(1e-9)
    return losses


def _in_chunks(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """A function of logits (N, V) and other rows, computed for `CHUNK` logits at a time.

    With more than one chunk, what the function needs for its gradient is computed again in the
    backward pass: a vocabulary is large, and each intermediate result in float32 as large.
    """
    size = max(1, CHUNK // rows[0].shape[-1])
    if len(rows[0]) <= size:
        return function(*rows)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    chunks = zip(*(x.split(size) for x in rows), strict=True)
    return torch.cat([checkpoint(function, *chunk, **options) for chunk in chunks])


def columns_to_keep(weights: Tensor) -> int:
    """The number of last columns whose logits a loss needs: `logits_to_keep` of a causal LM.

    Args:
        weights: (B, T), as for `cross_entropy`.

    Example:
        >>> columns_to_keep(torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]]))
        3
    """
    counted = (weights[:, 1:] > 0).any(0).nonzero()
    return weights.shape[1] - int(counted[0]) if len(counted) else 1


def require_known_losses(names: Collection[str]) -> None:
    """Raise ValueError unless all losses exist, and there is one."""
    unknown = sorted(set(names) - set(NAMES))
    if unknown or not names:
        raise ValueError(f"There is no loss {unknown}: expected one or more of {', '.join(NAMES)}.")


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
    counted = weights > 0
    weights = weights[counted]
    rows = logits[:, :-1][counted], input_ids[:, 1:][counted]
    losses = _in_chunks(lambda q, ids: F.cross_entropy(q.float(), ids, reduction="none"), *rows)
    return (losses * weights).sum() / weights.sum().clamp_min(1e-9)
