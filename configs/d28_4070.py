"""d28 (1,313,865,728 parameters) on one RTX 4070, stored and computed as d32_4070: the 1.3 B model that people call d21.

plan (rtx4070): peak 7.0 GiB, 11.2k tok/s modelled, 27 days

python -m nanojax.train --config=d28_4070
"""

from nanojax.config import Config, load_unresolved, override


def get_config() -> Config:
    return override(load_unresolved("d32_4070"), {"model.depth": 28})
