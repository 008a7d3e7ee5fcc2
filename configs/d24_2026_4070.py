"""nanochat's recipe of July 2026 at d24, ratio 8, on one RTX 4070 (12 GB): GPT-2's CORE.

5.8 B tokens, 2.8e19 FLOPs. Published: CORE 0.263 (mean of 5 runs, nanochat's leaderboard, run 6); GPT-2 has 0.2565.

plan (rtx4070): peak 8.5 GiB, 21.0k tok/s modelled, 3.2 days

python -m nanojax.train --config=d24_2026_4070
"""

from nanojax.config import Config
from nanojax.recipe import on_a_card


def get_config() -> Config:
    return on_a_card(depth=24, ratio=8, held=18)
