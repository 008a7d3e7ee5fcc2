"""nanochat's recipe of July 2026 at d12, ratio 12, on one RTX 4070 (12 GB): a trial run of hours.

1.3 B tokens, 1.0e18 FLOPs. Published: CORE 0.145 at 8.8e17 FLOPs (d12, nanochat pull request 563).

plan (rtx4070): peak 1.9 GiB, 97.8k tok/s modelled, 3.8 hours

python -m nanojax.train --config=d12_2026_4070
"""

from nanojax.config import Config
from nanojax.recipe import on_a_card


def get_config() -> Config:
    return on_a_card(depth=12, ratio=12)
