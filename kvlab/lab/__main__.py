"""`python -m kvlab.lab train` makes the lab models again; `report` prints what each can do, measured."""

import json
from pathlib import Path

import pandas as pd
from jsonargparse import auto_cli

from kvlab.lab import models, recipe
from kvlab.lab.report import report as measure

ALL = (*models.NAMES, models.EMBEDDER)


def train(
    names: tuple[str, ...] = ALL, work: Path = Path("lab-runs"), out: Path = models.MODELS
) -> None:
    """Train lab models from nothing; a run that was stopped goes on from its checkpoint in WORK.

    Args:
        names: which models, e.g. --names '[lab-draft]'.
        work: folder of the checkpoints.
        out: folder that the models are written to; by default the package's own.
    """
    for name in names:
        print(
            recipe.train_embedder(out) if name == models.EMBEDDER else recipe.train(name, work, out)
        )


def report(
    names: tuple[str, ...] = models.NAMES,
    questions: int = 200,
    seed: int = 0,
    as_json: bool = False,
) -> None:
    """Measure lab models on held-out data and print each figure with its 95 % interval.

    Args:
        names: which models.
        questions: questions of each kind.
        seed: of the held-out data.
        as_json: print JSON instead of a table.
    """
    figures = [figure for name in names for figure in measure(name, questions, seed)]
    table = pd.DataFrame(figures).round(3)
    print(json.dumps(figures) if as_json else table.drop(columns="unit").to_string(index=False))


if __name__ == "__main__":
    auto_cli([train, report], as_positional=False)
