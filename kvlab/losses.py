"""Losses on next-token distributions. Each takes logits and a weight per token and returns a mean over weights."""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, input_ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted next-token cross-entropy in nats, a mean over token weights.

    Parameters
    ----------
    logits : (B, T, V), the output at each position.
    input_ids : (B, T), the tokens; position t is predicted from t-1.
    weights : (B, T), the weight of predicting each token; the first column is never predicted.

    Returns
    -------
    A scalar: sum of weight * -log p(token) over sum of weights; 0 when all weights are 0.

    Examples
    --------
    >>> logits, ids = torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]])
    >>> round(cross_entropy(logits, ids, torch.ones(1, 3)).item(), 4)  # log 8
    2.0794
    """
    weights = weights[:, 1:].to(torch.float32)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum().clamp_min(1e-9)
