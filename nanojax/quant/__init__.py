"""How numbers are stored: f32, bf16, int8 and formats below 8 bits, with stochastic rounding. Knows no model."""

from nanojax.quant.formats import BLOCK, Quantized, decode, decode_tree, encode, is_stored, quantize_rows, zeros
from nanojax.quant.packed import Packed

__all__ = ["BLOCK", "Packed", "Quantized", "decode", "decode_tree", "encode", "is_stored", "quantize_rows", "zeros"]
