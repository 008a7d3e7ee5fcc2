"""nanochat's d12 (185,597,952 parameters) on one RTX 4070 in bf16, 3.7 B tokens: a rehearsal of d32 that takes a day.

plan (rtx4070): peak 2.4 GiB, 46.1k tok/s modelled, 22.4 hours

python -m nanojax.train --config=d12_4070
"""

from nanojax.config import Compute, Config, Model, Stored, Train


def get_config() -> Config:
    return Config(
        model=Model(depth=12),
        stored=Stored(blocks="bf16", embed="bf16", head="bf16", momentum="bf16", adam="bf16"),
        compute=Compute(dtype="bf16", residuals="all", loss_chunk=512),
        train=Train(tokens_per_step=524288, microbatch=2),
    )
