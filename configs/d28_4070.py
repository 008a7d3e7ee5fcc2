"""d32_4070 at depth 28: 1,313,865,728 parameters.

plan (rtx4070): peak 8.3 GiB, 13.3k tok/s modelled, 23 days

python -m nanojax.train --config=d28_4070
"""

from nanojax.config import Config, override
from nanojax.config_files import load_unresolved


def get_config() -> Config:
    return override(load_unresolved("d32_4070"), {"model.depth": 28, "compute.held": 28})
