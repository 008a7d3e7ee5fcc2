"""nanochat's recipe of July 2026 at d20, ratio 12, on one RTX 4070 (12 GB): a weekend.

5.2 B tokens, 1.5e19 FLOPs. Published: CORE 0.239 at 1.5e19 FLOPs (mean of 20 seeds, nanochat pull request 807).

plan (rtx4070): peak 5.4 GiB, 32.2k tok/s modelled, 1.9 days

python -m nanojax.train --config=d20_2026_4070
"""

from nanojax.config import Config
from nanojax.recipe import on_a_card


def get_config() -> Config:
    return on_a_card(depth=20, ratio=12)
