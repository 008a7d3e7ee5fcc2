"""d32_4070 with its block matrices at six levels, twelve to a word: 2.92 bits a weight, scales and padding included.

What rounding leaves of a weight takes 4 more, in the optimizer's state.

plan (rtx4070): peak 9.4 GiB, 7.9k tok/s modelled, 55 days

python -m nanojax.train --config=d32_4070_b2p67
"""

from nanojax.config import Config, load_unresolved, override


def get_config() -> Config:
    return override(load_unresolved("d32_4070"), {"stored.blocks": "b2.67"})
