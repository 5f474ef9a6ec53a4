"""A parallel draft: small heads guess several tokens in one call, from what the target has just computed.

A chain draft (`speculate.ModelProposer`) computes one token after the other. Here every guess comes
from the same two vectors, the target's last hidden state and the embedding of the token that
followed it, so all of them cost one small call; but no guess has read the guesses before it.

Sources: the heads are those of Medusa (Cai et al. 2024, arXiv 2401.10774, section 2.1), with the
target's own output head, and with the next token as an input (Ankner et al. 2024, Hydra, arXiv
2402.05109). DFlash and P-EAGLE use a whole transformer in their place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from kvlab.losses import distillation_losses, require_known_losses
from kvlab.training import fit, require_least


class ParallelDraft(nn.Module, PyTorchModelHubMixin):
    """Heads that guess the tokens after the next one. A new draft guesses the next one again.

    Args:
        hidden_size: d of the target.
        guesses: Number of tokens to guess.

    Example:
        >>> draft = ParallelDraft(hidden_size=8, guesses=3)
        >>> draft(torch.zeros(5, 8), torch.ones(5, 8)).shape
        torch.Size([5, 3, 8])
    """

    def __init__(self, hidden_size: int, guesses: int = 8):
        super().__init__()
        self.guesses = guesses
        self.input_proj = nn.Linear(2 * hidden_size, guesses * hidden_size)
        self.output_proj = nn.Parameter(torch.zeros(guesses, hidden_size, hidden_size))
        self.eval()

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """States (..., guesses, d) for the target's output head.

        Args:
            hidden: (..., d), the target's last hidden states, from which it chose the next token.
            embeddings: (..., d), its embeddings of these next tokens.
        """
        normed = F.rms_norm(embeddings, embeddings.shape[-1:])
        x = F.silu(self.input_proj(torch.cat((hidden, normed), -1)))
        x = x.unflatten(-1, (self.guesses, -1))
        return hidden[..., None, :] + torch.einsum("...gd,gde->...ge", x, self.output_proj)


@dataclass(frozen=True)
class ParallelSettings:
    """How a parallel draft is trained.

    Args:
        loss_weights: Weight of each loss (`kvlab.losses.distillation_losses`).
        decay: Each guess weighs this many times as much as the one before (Medusa: 0.8).
        epochs: Passes over all examples.
        batch_size: Examples per batch.
        learning_rate: Of AdamW.
        seed: Random seed (shuffling).
    """

    loss_weights: Mapping[str, float] = field(default_factory=lambda: {"ce": 1.0})
    decay: float = 0.8
    epochs: int = 8
    batch_size: int = 16
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self):
        require_known_losses(self.loss_weights)
        require_least(self, epochs=1, batch_size=1, learning_rate=0, decay=0)


def train_parallel(
    draft: ParallelDraft, target: PreTrainedModel, examples: Sequence, checkpoint=None, **options
) -> list[dict[str, float]]:
    """Train a parallel draft on the target's own answers. The target is not called.

    Args:
        draft: On the device that `fit` trains on, in float32.
        target: Its embeddings and its output head are used, and stay as they are.
        examples: Of `kvlab.draft.generate_targets`, with the target's hidden states.
        checkpoint: File from which a stopped run goes on.
        **options: Of `ParallelSettings`.

    Returns:
        The history of `fit`.
    """
    settings = ParallelSettings(**options)
    # the last guesses of a text have no token to be compared with
    examples = [e for e in examples if len(e.hidden_states) > draft.guesses]
    if len(examples) < settings.batch_size:
        counts = f"There are {len(examples)} answers of more than {draft.guesses} tokens"
        raise ValueError(f"{counts}, a batch has {settings.batch_size}: give more, or guess less.")
    loader = DataLoader(
        examples, settings.batch_size, shuffle=True, drop_last=True, collate_fn=pad_parallel_batch
    )

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return parallel_losses(model, target, batch, settings.loss_weights, settings.decay)

    target.requires_grad_(False)
    steps = settings.epochs * len(loader)
    return fit(
        draft,
        loader,
        losses,
        steps=steps,
        learning_rate=settings.learning_rate,
        warmup=max(1, steps // 20),
        seed=settings.seed,
        weight=lambda batch: batch["weights"].sum(),
        checkpoint=checkpoint,
    )


def pad_parallel_batch(examples: Sequence) -> dict[str, Tensor]:
    """Answers (B, R), padded on the right, with weights (B, R) and the states before each token (B, R, d)."""
    answers = [example.input_ids[example.start :] for example in examples]
    batch = {"answers": pad_sequence(answers, batch_first=True)}
    batch["weights"] = pad_sequence([torch.ones(len(a)) for a in answers], batch_first=True)
    states = [example.hidden_states.float() for example in examples]
    return batch | {"hidden_states": pad_sequence(states, batch_first=True)}


def parallel_losses(
    draft: nn.Module,
    target: PreTrainedModel,
    batch: Mapping[str, Tensor],
    loss_weights: Mapping[str, float],
    decay: float,
) -> dict[str, Tensor]:
    """Losses of all guesses, means over tokens and weighted means over guesses.

    Column r has the state from which the target chose token r; guess k of it (1, 2, ...) is
    compared with token r + k, and with the distribution from which the target chose that.
    """
    answers, weights, hidden = batch["answers"], batch["weights"], batch["hidden_states"]
    head = target.get_output_embeddings()
    states = draft(hidden, target.get_input_embeddings()(answers).to(hidden.dtype))
    columns = answers.shape[1]
    after = F.pad(hidden, (0, 0, 0, 1))  # no loss compares with the padding
    share = [decay**k for k in range(states.shape[2])]
    totals: dict[str, Tensor] = {}
    for k, factor in enumerate(share, 1):
        logits = head(states[:, : columns + 1 - k, k - 1].to(head.weight.dtype))
        with torch.no_grad():
            target_logits = head(after[:, k:].to(head.weight.dtype))
        rows = answers[:, k - 1 :], weights[:, k - 1 :]
        for name, loss in distillation_losses(loss_weights, logits, target_logits, *rows).items():
            totals[name] = totals.get(name, 0.0) + loss * factor / sum(share)
    return totals
