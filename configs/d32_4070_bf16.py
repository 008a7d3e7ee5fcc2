"""d32 with everything stored and computed in bf16: the baseline that int8 is measured against.

python -m nanojax.train --config=d32_4070_bf16
"""

from nanojax.config import Config, load_unresolved, override


def get_config() -> Config:
    return override(
        load_unresolved("d32_4070"),
        {
            "stored.blocks": "bf16",
            "stored.momentum": "bf16",
            "compute.forward": "float",
            "compute.dx": "float",
            "compute.dw": "float",
            "compute.residuals": "inputs",
        },
    )
