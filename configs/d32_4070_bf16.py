"""d32 with everything stored and computed in bf16: the baseline that int8 is measured against.

plan (rtx4070): peak 10.0 GiB, 3.6k tok/s modelled, 121 days

python -m nanojax.train --config=d32_4070_bf16

Gradients are summed into the momentum, which leaves room for four rows per microbatch but excludes Nesterov and clipping.
"""

from nanojax.config import Config, override
from nanojax.config_files import load_unresolved


def get_config() -> Config:
    return override(
        load_unresolved("d32_4070"),
        {
            "stored.blocks": "bf16",
            "stored.momentum": "bf16",
            "accumulate.blocks": "momentum",
            "optim.nesterov": False,
            "optim.clip": 0.0,
            "compute.forward": "float",
            "compute.dx": "float",
            "compute.dw": "float",
            "compute.head": "float",
            "compute.residuals": "attn",
            "train.microbatch": 4,
        },
    )
