"""Formats of stored values: encode and decode. f32, bf16, int8 with one f32 scale a row or a block, and those of packed.py.

scale = amax/127, so that the largest value of a row is always code +-127 and encoding a decoded row again gives the same
codes (a scale that clips or rounds drifts under repeated re-encoding).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanojax.config import Format
from nanojax.quant import packed
from nanojax.quant.packed import LEVELS, Packed
from nanojax.quant.rounding import noise_u16, round_bf16, round_int

BLOCK = 256  # values sharing a scale in blockwise optimizer states: 8.125 bits a value


class Quantized(NamedTuple):
    """Integer codes and the scale that makes them floats: codes * scale. codes [..., K], scale [..., 1] or [..., K/BLOCK]."""

    codes: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


Stored = jax.Array | Quantized | Packed  # one parameter or optimizer state, in any format


def scale_of(amax: jax.Array) -> jax.Array:
    """The scale of int8 codes whose largest magnitude is `amax`; 1 where that is 0, or so small that its 127th is."""
    scale = amax * (1 / 127)
    return jnp.where(scale > 0, scale, 1.0)


def quantize_rows(x: jax.Array, key: jax.Array | None = None, axis: int = -1) -> Quantized:
    """int8 codes of `x` with one f32 scale along `axis`: rounded to nearest, or stochastically with a key."""
    x = x.astype(jnp.float32)
    scale = scale_of(jnp.max(jnp.abs(x), axis, keepdims=True))
    return Quantized(round_int(x / scale, key).astype(jnp.int8), scale)


def _blocks(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """[..., K] seen as [..., K/block, block]; a last axis that block does not divide is one block."""
    block = block if block and shape[-1] % block == 0 else shape[-1]
    return (*shape[:-1], shape[-1] // block, block)


def is_stored(x: Any) -> bool:
    """Whether x is one parameter stored as codes and scales: where a tree of parameters ends."""
    return isinstance(x, (Quantized, Packed))


def encode(x: jax.Array, form: Format, key: jax.Array | None = None, block: int = 0) -> Any:
    """f32 [..., K] as stored: f32, bf16, int8 Quantized (one scale a row, or per `block` values), or below 8 bits Packed.

    Rounded to nearest, or stochastically with a key.
    """
    if form in LEVELS:
        return packed.encode(
            x, form, None if key is None else (noise_u16(key, x.shape).astype(jnp.float32) + 0.5) / 65536
        )
    if form == "f32":
        return x.astype(jnp.float32)
    if form == "bf16":
        return round_bf16(x.astype(jnp.float32), key)
    q = quantize_rows(x.reshape(_blocks(x.shape, block)), key)
    return Quantized(q.codes.reshape(x.shape), q.scale[..., 0])


def decode(stored: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Stored values as floats of the same shape."""
    if isinstance(stored, Packed):
        return packed.decode(stored, dtype)
    if not isinstance(stored, Quantized):
        return stored.astype(dtype)
    codes, scale = stored
    shape = (*codes.shape[:-1], scale.shape[-1], codes.shape[-1] // scale.shape[-1])
    return (codes.reshape(shape).astype(jnp.float32) * scale[..., None]).reshape(codes.shape).astype(dtype)


def decode_tree(params: Any, dtype: Any = jnp.float32) -> Any:
    """A tree of stored parameters as plain floats."""
    return jax.tree.map(lambda p: decode(p, dtype), params, is_leaf=is_stored)


def zeros(shape: tuple[int, ...], form: Format, block: int = 0) -> Any:
    """Stored zeros, what `encode(jnp.zeros(shape))` gives, without the f32 array."""
    if form in LEVELS:
        return packed.zeros(shape, form)
    if form != "int8":
        return jnp.zeros(shape, {"f32": jnp.float32, "bf16": jnp.bfloat16}[form])
    return Quantized(jnp.zeros(shape, jnp.int8), jnp.ones(_blocks(shape, block)[:-1], jnp.float32))
