"""nanochat's recipe of July 2026 at d28, ratio 12, on one RTX 4070 (12 GB): what comes near d32's CORE.

13.7 B tokens, 1.0e20 FLOPs. No d28 is published. Extrapolated: CORE 0.304, from 0.290 to 0.319; d32 of 2025 has 0.317.

plan (rtx4070): peak 10.5 GiB, 14.1k tok/s modelled, 11 days

python -m nanojax.train --config=d28_2026_4070
"""

import dataclasses

from nanojax.config import Config
from nanojax.recipe import CARD_COMPUTE, CARD_STORED, on_a_card


def get_config() -> Config:
    return dataclasses.replace(
        on_a_card(depth=28, ratio=12),
        stored=dataclasses.replace(CARD_STORED, value="int8"),
        compute=dataclasses.replace(CARD_COMPUTE, loss_chunk=512),  # 1024 would take 0.03 GiB more than there are
    )
