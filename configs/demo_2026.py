"""nanochat's recipe of July 2026 on the demo's text, in the demo's CPU time: 1.50 bits per byte where demo has 1.53.

The scaling law's rates are meant for steps of 2^18 tokens and more. At 4,096 they are multiplied by 8, as LOG.md found, and
the warm-up takes a share of the steps.

python -m nanojax.train --config=demo_2026
"""

import dataclasses

from nanojax.config import Checkpoint, Compute, Config, Data, Eval, Model, Train
from nanojax.recipe import OPTIM


def get_config() -> Config:
    rates = {key: 8 * getattr(OPTIM, key) for key in ("matrix_lr", "embed_lr", "head_lr")}
    return Config(
        model=Model(
            family="2026", depth=4, head_dim=64, vocab=4096, seq=256, rope_base=100_000.0, qk_scale=1.2, window=64
        ),
        optim=dataclasses.replace(OPTIM, **rates, warmup=0.1),
        compute=Compute(loss_chunk=1024),
        data=Data(path="data/demo"),
        train=Train(steps=150, tokens_per_step=4096, microbatch=16),
        eval=Eval(every=75, tokens=1 << 15),
        checkpoint=Checkpoint(every=75),
    )
