"""`kvlab scale` and `kvlab lab`: what notebooks use here, and the lab's models."""

import pandas as pd

from kvlab.scale import Scale


def scale() -> None:
    """Print the models and the device of notebooks, and the predicted memory of each chapter."""
    current = Scale.current()
    chapters = pd.DataFrame({name: current.memory(name) for name in sorted(current.needs)}).T
    choice = "Change it with KVLAB_SCALE=tiny, t4 or full."
    print(f"Scale {current.name} on {current.device}, {current.dtype}. {choice}")
    print(chapters.add_suffix(" (GB)").round(3).to_string())
