"""`python -m kvlab.lab train` trains the lab models again; `report` measures each one."""

import json
from pathlib import Path

import pandas as pd
from jsonargparse import auto_cli

from kvlab.lab.models import EMBEDDER, MODELS, NAMES
from kvlab.lab.recipe import train_embedder, train_lab_model
from kvlab.lab.report import report

ALL = (*NAMES, EMBEDDER)


def train_lab(
    names: tuple[str, ...] = ALL, work: Path = Path("lab-runs"), out: Path = MODELS
) -> None:
    """Train lab models from scratch; an interrupted run continues from its checkpoint.

    Args:
        names: which models, e.g. --names '[lab-draft]'.
        work: folder of the checkpoints.
        out: folder that the models are written to; by default the package's own.
    """
    for name in names:
        print(train_embedder(out) if name == EMBEDDER else train_lab_model(name, work, out))


def report_lab(
    names: tuple[str, ...] = NAMES, questions: int = 200, seed: int = 0, as_json: bool = False
) -> None:
    """Measure lab models on held-out data and print each figure with its 95 % interval.

    Args:
        names: which models.
        questions: number of questions of each kind.
        seed: random seed of the held-out data.
        as_json: print JSON instead of a table.
    """
    figures = []
    for name in names:
        figures += report(name, questions, seed)
    table = pd.DataFrame(figures).round(3).drop(columns="unit")
    print(json.dumps(figures) if as_json else table.to_string(index=False))


COMMANDS = {"train": train_lab, "report": report_lab}

if __name__ == "__main__":
    auto_cli(COMMANDS, as_positional=False)
