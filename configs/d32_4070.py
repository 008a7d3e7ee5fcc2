"""nanochat's d32 on one RTX 4070 (12 GB): int8 stored, int8 tensor cores, 37.6 B tokens.

plan (rtx4070): peak 10.5 GiB, 9.4k tok/s modelled, 46 days

python -m nanojax.train --config=d32_4070
"""

from nanojax.config import Accumulate, Compute, Config, Eval, Model, Stored, Train


def get_config() -> Config:
    return Config(
        model=Model(depth=32),
        stored=Stored(blocks="int8", embed="bf16", head="bf16", momentum="int8", adam="int8"),
        accumulate=Accumulate(blocks="bf16", embed_head="bf16"),
        compute=Compute(dtype="bf16", forward="int8", dx="int8", dw="int8", head="int8", held=11, residuals="all"),
        train=Train(tokens_per_step=524288, microbatch=1),
        eval=Eval(every=250),
    )
