"""d32_4070 with block matrices in int3 (3.25 bits per weight), remainders of 2 bits, and 8-bit AdamW instead of Muon.

plan (rtx4070): peak 10.5 GiB, 8.3k tok/s modelled, 53 days

python -m nanojax.train --config=d32_4070_int3_adamw8
"""

from nanojax.config import Config, override
from nanojax.config_files import load_unresolved


def get_config() -> Config:
    changes = {"stored.blocks": "int3", "optim.matrix": "adamw", "optim.matrix_lr": 0.0015}
    # AdamW's second moment takes 1.5 GiB more than Muon: only 2-bit remainders and an int8 embedding leave room for it.
    # A head in int8 would take 0.25 GiB more.
    changes |= {"stored.remainder": 2, "stored.embed": "int8", "compute.head": "float"}
    return override(load_unresolved("d32_4070"), changes)
