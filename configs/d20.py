"""nanochat's d20 (560,988,160 parameters), 11.2 B tokens, everything stored in f32: the reference for GPUs with enough memory.

python -m nanojax.train --config=d20
"""

from nanojax.config import Compute, Config, Model, Train


def get_config() -> Config:
    return Config(
        model=Model(depth=20),
        compute=Compute(dtype="bf16", residuals="cheap"),
        train=Train(tokens_per_step=524288, microbatch=4),
    )
