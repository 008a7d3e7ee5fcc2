"""Low-bit storage and int8 compute: formats, stochastic rounding, the linear layers."""

from nanojax.quant.formats import BLOCK, Quantized, decode, decode_tree, encode, is_stored, quantize_rows, zeros
from nanojax.quant.packed import Packed
from nanojax.quant.rounding import noise_u16, round_bf16, round_int

__all__ = [
    "BLOCK",
    "Packed",
    "Quantized",
    "decode",
    "decode_tree",
    "encode",
    "is_stored",
    "noise_u16",
    "quantize_rows",
    "round_bf16",
    "round_int",
    "zeros",
]
