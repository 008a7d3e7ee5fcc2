"""The largest nanochat we found that learns from scratch in 12 GB: d40, 3,481,272,320 parameters.

plan (rtx4070): peak 10.0 GiB, 4.0k tok/s modelled, 200 days

python -m nanojax.train --config=largest_4070

A weight takes 2.9 bits (b2.67), its remainder 2, and its momentum 16. Gradients are summed into the momentum: there is no
gradient buffer, no Nesterov and no clipping. Embedding and head are int8; the forward pass keeps only the blocks' inputs.
d42 fits only without remainders; d40 does not fit with remainders of 4 bits.
"""

from nanojax.config import Config, override
from nanojax.config_files import load_unresolved


def get_config() -> Config:
    return override(
        load_unresolved("d32_4070_laptop"),
        {"model.depth": 40, "stored.blocks": "b2.67", "stored.remainder": 2, "compute.residuals": "inputs"},
    )
