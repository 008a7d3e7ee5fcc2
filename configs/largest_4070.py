"""The largest nanochat found to train from scratch in 12 GB and still to learn: d40, 3,481,272,320 parameters.

plan (rtx4070): peak 9.9 GiB, 3.8k tok/s modelled, 214 days

python -m nanojax.train --config=largest_4070

A weight takes 2.9 bits (b2.67), 2 of what rounding leaves, and 16 of momentum, into which gradients are summed: no gradient
buffer, no Nesterov, no clipping. Embedding and head are int8, forward keeps only the blocks' inputs. d42 fits only without
the 2 bits, d40 not with 4.
"""

from nanojax.config import Config, load_unresolved, override


def get_config() -> Config:
    return override(
        load_unresolved("d32_4070_laptop"),
        {"model.depth": 40, "stored.blocks": "b2.67", "stored.remainder": 2, "compute.residuals": "inputs"},
    )
