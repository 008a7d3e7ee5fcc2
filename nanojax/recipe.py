"""nanochat's recipe of July 2026 as one function of depth and ratio, for config files. Source: nanochat, commit 92d63d4.

Batch, steps, rates and weight decay follow from depth and ratio (config_rules.resolve, step/optim.py), also when a command line
changes them: depth is the one dial.
"""

import dataclasses

from nanojax.config import Accumulate, Compute, Config, Data, Model, Optim, Stored, Train

CARD_STORED = Stored(blocks="int8", embed="bf16", head="bf16", value="bf16", momentum="int8", adam="int8")
CARD_COMPUTE = Compute(dtype="bf16", forward="int8", dx="int8", dw="int8", head="int8", residuals="all")
OPTIM = Optim(
    muon="normuon",
    embed_lr=0.3,
    head_lr=0.008,
    momentum=0.97,
    momentum_warmup=400,
    momentum_final=0.90,
    matrix_decay=0.28,
    clip=0.0,
    warmup=40,
    warmdown=0.65,
    final_lr=0.05,
)


def nanochat_2026(depth: int, ratio: float, vocab: int = 32768, seq: int = 2048) -> Config:
    """The recipe in f32. `ratio`: tokens per parameter of the layers' matrices and the head."""
    return Config(
        model=Model(family="2026", depth=depth, vocab=vocab, seq=seq, rope_base=100_000.0, qk_scale=1.2),
        optim=OPTIM,
        data=Data(path="data/climbmix"),
        train=Train(ratio=ratio, tokens_per_step=0),
    )


def on_a_card(depth: int, ratio: float, held: int = 0) -> Config:
    """The recipe in 12 GB: int8 matrices and moments, int8 tensor cores, gradients summed in bf16, one row at a time.

    held: of how many layers the matrices are also held transposed, where there is room.
    """
    return dataclasses.replace(
        nanochat_2026(depth, ratio),
        stored=CARD_STORED,
        compute=dataclasses.replace(CARD_COMPUTE, held=held),
        accumulate=Accumulate(blocks="bf16", embed_head="bf16"),
    )
