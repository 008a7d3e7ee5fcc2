"""d21 on one RTX 4070, stored and computed as d32_4070; width 64*21 rounded up to 11 heads of 128.

python -m nanojax.train --config=d21_4070
"""

from nanojax.config import Config, load_unresolved, override


def get_config() -> Config:
    return override(load_unresolved("d32_4070"), {"model.depth": 21, "train.microbatch": 4})
