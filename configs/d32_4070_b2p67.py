"""d32_4070 with its block matrices at six levels, twelve to a word: 2.92 bits a weight, scales and padding included.

python -m nanojax.train --config=d32_4070_b2p67
plan (rtx4070): peak 9.1 GiB, 4.9k tok/s modelled, 89 days
"""

from nanojax.config import Config, load_unresolved, override


def get_config() -> Config:
    return override(load_unresolved("d32_4070"), {"stored.blocks": "b2.67"})
