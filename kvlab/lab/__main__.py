"""`python -m kvlab.lab train [NAME ...]` makes the lab models again; `report` prints what each can do."""

from jsonargparse import auto_cli

from kvlab.lab import models, recipe


def train(names: list[str] = list(models.NAMES), work: str = "lab-runs", seed: int = 0) -> None:
    """Train lab models from nothing; a run that was stopped goes on from its checkpoint in WORK.

    Args:
        names: which models.
        work: folder of the checkpoints.
        seed: of weights and data.
    """
    from pathlib import Path

    for name in names:
        print(recipe.train(name, Path(work), seed=seed))


if __name__ == "__main__":
    auto_cli([train], as_positional=False)
