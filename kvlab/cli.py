"""`kvlab …`: each subcommand is a function, and its options are the function's own signature."""

import pandas as pd
from jsonargparse import auto_cli

from kvlab.lab.__main__ import report, train
from kvlab.scale import Scale


def scale() -> None:
    """Print which models and device notebooks will use here, and the memory each chapter is predicted to need."""
    current = Scale.current()
    chapters = pd.DataFrame({name: current.memory(name) for name in sorted(current.needs)}).T
    print(f"Scale {current.name} on {current.device}, {current.dtype}. Change it with KVLAB_SCALE=tiny, t4 or full.")
    print(chapters.add_suffix(" (GB)").round(3).to_string())


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Examples
    --------
    >>> main(["scale"])  # doctest: +ELLIPSIS
    Scale ...
    """
    auto_cli(
        {"scale": scale, "lab": {"_help": "Make and measure the lab models.", "train": train, "report": report}}, args
    )


if __name__ == "__main__":
    main()
