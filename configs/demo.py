"""A model that trains in a few minutes on two CPU cores, on the State of the Union addresses.

python -m nanojax.train --config=demo
"""

from nanojax.config import Checkpoint, Compute, Config, Data, Eval, Model, Train


def get_config() -> Config:
    return Config(
        model=Model(depth=4, head_dim=64, vocab=4096, seq=256),
        compute=Compute(loss_chunk=1024),
        data=Data(path="data/demo"),
        train=Train(steps=160, tokens_per_step=4096, microbatch=16),
        eval=Eval(every=80, tokens=1 << 15),
        checkpoint=Checkpoint(every=80),
    )
