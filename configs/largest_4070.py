"""The largest nanochat found to train from scratch in 12 GB, with the planner: d42, 3,993,894,912 parameters.

plan (rtx4070): peak 10.4 GiB, 3.3k tok/s modelled, 278 days

python -m nanojax.train --config=largest_4070

A weight takes 2.9 bits (b2.67) and 16 more of momentum, into which gradients are summed: no gradient buffer, no Nesterov,
no clipping, no memory for what rounding leaves. Embedding and head are int8, forward keeps only the blocks' inputs. d43 is a
head wider and does not fit.
That is memory and time as planned; how well so large a model learns in so few bits nobody has measured.
"""

from nanojax.config import Config, load_unresolved, override


def get_config() -> Config:
    return override(
        load_unresolved("d32_4070_laptop"),
        {"model.depth": 42, "stored.blocks": "b2.67", "stored.remainder": 0, "compute.residuals": "inputs"},
    )
