"""nanochat's recipe of July 2026 at d32, ratio 12, on two RTX 4070 (12 GB) that share each step: 2,818,575,450 parameters.

20.1 B tokens, 2.2e20 FLOPs. No d32 of this recipe is published. Extrapolated: CORE 0.331, from 0.316 to 0.346.

plan (2 x rtx4070, pcie4): peak 10.5 GiB, 16.4k tok/s modelled, 14 days

python -m nanojax.train --config=d32_2026_2x4070

One card has no room for it: the optimizer's arrays alone take 3.8 GiB, of which each of the two has half. The forward pass
keeps only the blocks' inputs.
"""

import dataclasses

from nanojax.config import Config, Parallel
from nanojax.recipe import CARD_COMPUTE, CARD_STORED, on_a_card


def get_config() -> Config:
    return dataclasses.replace(
        on_a_card(depth=32, ratio=12),
        stored=dataclasses.replace(CARD_STORED, value="int8"),
        compute=dataclasses.replace(CARD_COMPUTE, residuals="inputs", loss_chunk=512),
        parallel=Parallel(devices="2"),
    )
