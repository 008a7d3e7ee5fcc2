"""d32_4070, trained on 20 B tokens instead of 37.6 B.

plan (rtx4070): peak 10.5 GiB, 9.4k tok/s modelled, 25 days

python -m nanojax.train --config=d32_4070_20b
"""

from nanojax.config import Config, override
from nanojax.config_files import load_unresolved


def get_config() -> Config:
    return override(load_unresolved("d32_4070"), {"train.tokens": 20_000_000_000})
