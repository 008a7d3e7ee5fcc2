"""d32_4070 with block matrices in NF4 (4.25 bits per weight) and remainders of 2 bits; matmuls stay int8.

plan (rtx4070): peak 9.6 GiB, 8.7k tok/s modelled, 50 days

python -m nanojax.train --config=d32_4070_nf4
"""

from nanojax.config import Config, override
from nanojax.config_files import load_unresolved


def get_config() -> Config:
    return override(load_unresolved("d32_4070"), {"stored.blocks": "nf4", "stored.remainder": 2})
