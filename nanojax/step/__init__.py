"""One optimizer step in 12 GB. Start with step.py."""

from nanojax.step.backward import forward_backward, operand_bytes, residual_bytes
from nanojax.step.state import State, abstract_state, accumulator_bytes, block_bits, init_state
from nanojax.step.step import Batch, abstract_batch, train_step

__all__ = [
    "Batch",
    "State",
    "abstract_batch",
    "abstract_state",
    "accumulator_bytes",
    "block_bits",
    "forward_backward",
    "init_state",
    "operand_bytes",
    "residual_bytes",
    "train_step",
]
