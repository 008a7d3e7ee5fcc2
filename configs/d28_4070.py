"""d28 on one RTX 4070, stored and computed as d32_4070.

python -m nanojax.train --config=d28_4070
"""

from nanojax.config import Config, load_unresolved, override


def get_config() -> Config:
    return override(load_unresolved("d32_4070"), {"model.depth": 28, "train.microbatch": 2})
