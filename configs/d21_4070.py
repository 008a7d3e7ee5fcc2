"""d32_4070 at depth 21: 684,130,304 parameters. Width 64*21 is rounded up to 1,408, which is 11 heads of 128.

plan (rtx4070): peak 4.7 GiB, 24.7k tok/s modelled, 6.4 days

python -m nanojax.train --config=d21_4070
"""

from nanojax.config import Config, override
from nanojax.config_files import load_unresolved


def get_config() -> Config:
    return override(load_unresolved("d32_4070"), {"model.depth": 21, "compute.held": 21})
