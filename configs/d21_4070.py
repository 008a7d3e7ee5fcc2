"""d21 (684,130,304 parameters) on one RTX 4070, as d32_4070; width 64*21 rounded up to 1,408, 11 heads of 128.

plan (rtx4070): peak 3.9 GiB, 19.8k tok/s modelled, 8.0 days

python -m nanojax.train --config=d21_4070
"""

from nanojax.config import Config, load_unresolved, override


def get_config() -> Config:
    return override(load_unresolved("d32_4070"), {"model.depth": 21})
