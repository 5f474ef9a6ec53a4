"""Figures that the benchmarks measured: `results(name)` reads the JSON files beside this module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval, where it has one; a format applies to all its numbers.

    Example:
        >>> f"{Figure('em', 0.5, 0.41, 0.6, unit='fraction', n=64, conditions='greedy'):.2f}"
        '0.50 [0.41, 0.60]'
    """

    name: str
    value: float
    low: float | None  # None where a measurement was made once
    high: float | None
    unit: str
    n: int  # of independent measurements
    conditions: str
    values: list[float] | None = None  # those measurements, where the file has them

    @property
    def interval(self) -> tuple[float, float, float]:
        """Value, low end and high end; three times the value where there is no interval."""
        if self.low is None:
            return self.value, self.value, self.value
        return self.value, self.low, self.high

    def __format__(self, spec: str) -> str:
        value, low, high = (format(number, spec or ".3g") for number in self.interval)
        return value if self.low is None else f"{value} [{low}, {high}]"


class Results(dict[str, Figure]):
    """Figures of a benchmark by name, with its `device`, `versions`, `commit` and `seeds`."""

    def __init__(self, run: Mapping):
        super().__init__({figure["name"]: Figure(**figure) for figure in run["figures"]})
        self.device: str = run["device"]
        self.versions: dict[str, str] = run["versions"]
        self.commit: str = run["commit"]
        self.seeds: list[int] = run["seeds"]
        self.seconds: float = run["seconds"]

    def __missing__(self, name: str) -> Figure:
        near = [other for other in self if name.split("_")[0] in other] or list(self)
        raise KeyError(f"There is no figure {name!r}; expected one such as {', '.join(near[:8])}.")

    def intervals(self, labels: Mapping[str, str]) -> dict[str, tuple[float, float, float]]:
        """(value, low, high) by label, as `kvlab.plots` draws them.

        Args:
            labels: label of each figure, by the figure's name.

        Raises:
            ValueError: two figures have the same label, so one would hide the other.
        """
        if len({*labels.values()}) < len(labels):
            raise ValueError(
                f"Two of {list(labels.values())} are the same: give each its own label."
            )
        return {label: self[name].interval for name, label in labels.items()}

    def table(self, rows: Mapping[str, Mapping[str, str]], spec: str = ".2f") -> pd.DataFrame:
        """A table of figures with their intervals; each column's header has its unit.

        Args:
            rows: for each row, the name of the figure in each column; columns may be left out.
            spec: format of the numbers.

        Raises:
            ValueError: a column has figures of different units.

        Example:
            >>> rows = {"KV-Distill": {"25 %": "em_distill_25", "10 %": "em_distill_10"}}
            >>> results("distill").table(rows).columns.tolist()
            ['25 % (fraction)', '10 % (fraction)']
        """
        import pandas as pd  # here, because it takes a second

        table = pd.DataFrame(index=list(rows))
        units = {}
        for label, names in rows.items():
            for column, name in names.items():
                unit = units.setdefault(column, self[name].unit)
                if self[name].unit != unit:
                    raise ValueError(f"{column!r} has figures in {unit} and in {self[name].unit}.")
                table.loc[label, f"{column} ({unit})"] = format(self[name], spec)
        return table.fillna("")


def results(name: str) -> Results:
    """Figures of a benchmark, measured beforehand.

    Args:
        name: the benchmark, for example "distill" for `tests/benchmarks/distill.py`.

    Raises:
        FileNotFoundError: There is no such file; the message has the command that writes it.

    Example:
        >>> results("distill")["em_distill_25"].unit
        'fraction'
    """
    path = Path(__file__).with_name(f"{name}.json")
    if not path.exists():
        names = ", ".join(sorted(file.stem for file in path.parent.glob("*.json")))
        command = f"python tests/benchmarks/{name}.py --out kvlab/results/{name}.json"
        raise FileNotFoundError(f"No {name!r}; expected one of {names}. Or run `{command}`.")
    return Results(json.loads(path.read_text(encoding="utf-8")))
