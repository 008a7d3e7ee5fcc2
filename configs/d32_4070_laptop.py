"""nanochat's d32 on an RTX 4070 Laptop (8 GB): int8 stored and multiplied as in d32_4070, 37.6 B tokens.

plan (rtx4070_laptop): peak 6.7 GiB, 4.8k tok/s modelled, 91 days

python -m nanojax.train --config=d32_4070_laptop

Three choices save 3 GiB. Gradients are summed into the momentum (bf16), which excludes Nesterov and clipping. Embedding
and head are int8 too. The backward pass recomputes qkv and the hidden layer. A laptop that sustains less than 115 W is slower.
"""

from nanojax.config import Config, override
from nanojax.config_files import load_unresolved


def get_config() -> Config:
    return override(
        load_unresolved("d32_4070"),
        {
            "stored.embed": "int8",
            "stored.head": "int8",
            "stored.momentum": "bf16",
            "accumulate.blocks": "momentum",
            "optim.nesterov": False,
            "optim.clip": 0.0,
            "compute.held": 0,
            "compute.loss_chunk": 512,  # 0.12 GiB less than 1,024, and 1% slower
            "compute.residuals": "attn_in+attn+proj_in+mlp_in",
        },
    )
