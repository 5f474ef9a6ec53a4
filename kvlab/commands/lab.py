"""`kvlab scale` and `kvlab lab`: what notebooks use here, and the lab's models."""

import pandas as pd

from kvlab.scale import Scale


def scale() -> None:
    """Print which models and device notebooks will use here, and the memory each chapter is predicted to need."""
    current = Scale.current()
    chapters = pd.DataFrame({name: current.memory(name) for name in sorted(current.needs)}).T
    print(
        f"Scale {current.name} on {current.device}, {current.dtype}. Change it with KVLAB_SCALE=tiny, t4 or full."
    )
    print(chapters.add_suffix(" (GB)").round(3).to_string())
