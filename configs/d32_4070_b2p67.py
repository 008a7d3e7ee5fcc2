"""d32_4070 with block matrices at six levels, twelve to a 32-bit word: 2.92 bits per weight with scales and padding.

The optimizer's state holds 4 more bits per weight, the remainder, which carries the rounding error to the next update.

plan (rtx4070): peak 9.7 GiB, 8.9k tok/s modelled, 49 days

python -m nanojax.train --config=d32_4070_b2p67
"""

from nanojax.config import Config, override
from nanojax.config_files import load_unresolved


def get_config() -> Config:
    return override(load_unresolved("d32_4070"), {"stored.blocks": "b2.67"})
