"""Low-bit storage and int8 compute: formats, stochastic rounding, the linear layers."""

from nanojax.quant.formats import BLOCK, Quantized, decode, decode_tree, encode, quantize_rows, zeros
from nanojax.quant.rounding import noise_u16, round_bf16, round_int

__all__ = [
    "BLOCK",
    "Quantized",
    "decode",
    "decode_tree",
    "encode",
    "noise_u16",
    "quantize_rows",
    "round_bf16",
    "round_int",
    "zeros",
]
