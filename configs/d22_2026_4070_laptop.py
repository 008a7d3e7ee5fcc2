"""nanochat's recipe of July 2026 at d22, ratio 8, on an RTX 4070 Laptop (8 GB): the deepest that fits it as it is.

4.6 B tokens, 1.7e19 FLOPs. CORE by the line through published runs (nanojax.plan --days): 0.24, from 0.23 to 0.26.

plan (rtx4070_laptop): peak 6.6 GiB, 14.8k tok/s modelled, 3.6 days

python -m nanojax.train --config=d22_2026_4070_laptop
"""

from nanojax.config import Config
from nanojax.recipe import on_a_card


def get_config() -> Config:
    return on_a_card(depth=22, ratio=8)
