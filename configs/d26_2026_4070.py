"""nanochat's recipe of July 2026 at d26, ratio 8, on one RTX 4070 (12 GB): a week.

7.3 B tokens, 4.4e19 FLOPs. Published: CORE 0.277 at 4.7e19 FLOPs (d26 at ratio 8.25, nanochat pull request 563).

plan (rtx4070): peak 9.5 GiB, 17.0k tok/s modelled, 5.0 days

python -m nanojax.train --config=d26_2026_4070
"""

from nanojax.config import Config
from nanojax.recipe import on_a_card


def get_config() -> Config:
    return on_a_card(depth=26, ratio=8)
