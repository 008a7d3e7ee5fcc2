"""Block matrices below 8 bits: codes of 4, 3 or 2.67 bits and one bf16 scale per 64 values, packed into plain integers.

A code stands for a level in [-1, 1] and a value is level * scale. int4, int3 and b2.67 (six levels, twelve to a 32-bit
word) have equidistant levels without a zero, a finer step than with one: only a whole block is ever 0, by its scale. NF4
has QLoRA's quantiles of a normal distribution (arXiv 2305.14314, appendix E). A new scale is the block's largest magnitude,
so that the outermost level is in use and encoding a decoded block gives the same codes again.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 64  # values to a scale: with bf16 scales 0.25 bits a value
SHRINK = 0.6  # a held scale is given up when its block's largest value falls below this part of it
SNAP = 2.0**-13  # closer than this to a level, in steps, is that level: decoding and dividing again errs by 2^-21
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
LEVELS: dict[str, tuple[float, ...]] = {
    "int4": tuple((2 * k - 15) / 15 for k in range(16)),
    "nf4": NF4,
    "int3": tuple((2 * k - 7) / 7 for k in range(8)),
    "b2.67": tuple((2 * k - 5) / 5 for k in range(6)),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """words: uint8 or uint32 [..., W], the codes of K values (see pack); scale: bf16 [..., K/64]; form: key of LEVELS."""

    words: jax.Array
    scale: jax.Array
    form: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scale.shape[:-1], self.scale.shape[-1] * BLOCK)


def words_of(form: str, K: int) -> tuple[int, type]:
    """Words that a row of K codes takes, and their dtype."""
    if form == "b2.67":
        return math.ceil(K / 12), jnp.uint32
    return (3 * K // 32, jnp.uint32) if form == "int3" else (K // 2, jnp.uint8)


def bits(form: str, K: int) -> float:
    """Bits a value takes in a row of K values, scale and padding included."""
    count, dtype = words_of(form, K)
    return (count * jnp.dtype(dtype).itemsize * 8 + K // BLOCK * 16) / K


def pack(codes: jax.Array, form: str) -> jax.Array:
    """Codes (whole numbers from 0) [..., K] as words [..., W].

    The values of one word are K/2 (nibbles), K/32 (int3: three words hold the three bits of 32 codes) or W (b2.67: digits
    of base six) apart, so that all that moves are contiguous runs.
    """
    *lead, K = codes.shape
    if form == "b2.67":
        W = math.ceil(K / 12)
        digits = jnp.pad(codes.astype(jnp.uint32), [(0, 0)] * len(lead) + [(0, 12 * W - K)]).reshape(*lead, 12, W)
        return sum((digits[..., i, :] * jnp.uint32(6**i) for i in range(12)), jnp.zeros((*lead, W), jnp.uint32))
    if form == "int3":
        runs = codes.astype(jnp.uint32).reshape(*lead, 1, 32, K // 32)
        bit = (runs >> jnp.arange(3, dtype=jnp.uint32)[:, None, None]) & jnp.uint32(1)
        shifted = bit << jnp.arange(32, dtype=jnp.uint32)[:, None]
        return jnp.sum(shifted, -2, dtype=jnp.uint32).reshape(*lead, 3 * K // 32)
    low, high = jnp.split(codes.astype(jnp.uint8), 2, -1)
    return low | (high << jnp.uint8(4))


def unpack(words: jax.Array, form: str, K: int) -> jax.Array:
    """The inverse of pack: codes int32 [..., K]."""
    lead = words.shape[:-1]
    if form == "b2.67":
        digits = []
        for _ in range(12):
            quotient = words // jnp.uint32(6)  # by a constant: a multiplication and a shift
            digits.append(words - quotient * jnp.uint32(6))
            words = quotient
        return jnp.concatenate(digits, -1)[..., :K].astype(jnp.int32)
    if form == "int3":
        planes = words.reshape(*lead, 3, 1, K // 32) >> jnp.arange(32, dtype=jnp.uint32)[:, None]
        one, two, four = (planes[..., i, :, :] & jnp.uint32(1) for i in range(3))
        return (one | two << jnp.uint32(1) | four << jnp.uint32(2)).astype(jnp.int32).reshape(*lead, K)
    return jnp.concatenate([words & jnp.uint8(15), words >> jnp.uint8(4)], -1).astype(jnp.int32)


def levels_of(stored: Packed) -> jax.Array:
    """The level of each value, f32 [..., K]."""
    codes, table = unpack(stored.words, stored.form, stored.shape[-1]), LEVELS[stored.form]
    if stored.form == "nf4":
        return jnp.asarray(table, jnp.float32)[codes]
    top = len(table) - 1
    return (2 * codes - top).astype(jnp.float32) * (1 / top)


def decode(stored: Packed, dtype: Any = jnp.float32) -> jax.Array:
    """Values [..., K] as floats."""
    values = _blocks(levels_of(stored)) * stored.scale.astype(jnp.float32)[..., None]
    return values.reshape(stored.shape).astype(dtype)


def int8_rows(stored: Packed) -> tuple[jax.Array, jax.Array]:
    """int8 codes [..., K] and f32 scale [..., 1] of each row, for int8 products: one pass, scale = largest block's / 127.

    Off by at most 1/254 of the row's largest value, where the format's own step is at least 1/11 of the block's.
    """
    scale = stored.scale.astype(jnp.float32)
    row = jnp.max(scale, -1, keepdims=True)
    row = jnp.where(row > 0, row * (1 / 127), 1.0)
    return jnp.round(_blocks(levels_of(stored)) * (scale / row)[..., None]).astype(jnp.int8).reshape(stored.shape), row


def encode(x: jax.Array, form: str, dither: jax.Array | None = None, old: Packed | None = None) -> Packed:
    """f32 [..., K] as stored, K a multiple of 64.

    Args:
      dither: f32 in (0, 1) of x's shape: a value goes to the upper of its two levels if it lies further than this, in
        steps, above the lower one. Uniform noise rounds without bias. None: to nearest.
      old: what is stored now. A block's scale is kept unless some value, dithered, needs one level more than there is, or
        the largest is below SHRINK of it. A scale that follows the largest value moves all levels of its block at every
        step, and all values are rounded anew: a quarter of int4's loss with fresh noise.
    """
    top, table = len(LEVELS[form]) - 1, jnp.asarray(LEVELS[form], jnp.float32)
    v, cut = _blocks(x.astype(jnp.float32)), 0.5 if dither is None else _blocks(dither)
    amax = jnp.max(jnp.abs(v), -1, keepdims=True)
    scale = amax.astype(jnp.bfloat16).astype(jnp.float32)
    if old is not None:
        held = old.scale.astype(jnp.float32)[..., None]
        step = held * (1 - LEVELS[form][-2])
        beyond = jnp.any(jnp.abs(v) - held > step * cut, -1, keepdims=True)
        scale = jnp.where(beyond | (amax < SHRINK * held) | (held == 0), scale, held)
    v = jnp.clip(v / jnp.where(scale > 0, scale, 1.0), -1, 1)
    if form == "nf4":
        # term by term: as a reduction, XLA computes v anew for each of the 14, in a kernel that takes minutes to compile
        low = sum(((v >= level).astype(jnp.int32) for level in NF4[1:-1]), jnp.zeros(v.shape, jnp.int32))
        part = (v - table[low]) / (table[low + 1] - table[low])
    else:
        steps = (v + 1) * (top / 2)
        low = jnp.clip(jnp.floor(steps), 0, top - 1).astype(jnp.int32)
        part = steps - low.astype(jnp.float32)
    part = jnp.where(part < SNAP, 0.0, jnp.where(part > 1 - SNAP, 1.0, part))
    codes = low + (part > cut).astype(jnp.int32)
    return Packed(pack(codes.reshape(x.shape), form), scale[..., 0].astype(jnp.bfloat16), form)


def zeros(shape: tuple[int, ...], form: str) -> Packed:
    """Stored zeros: codes 0 with scale 0."""
    count, dtype = words_of(form, shape[-1])
    return Packed(
        jnp.zeros((*shape[:-1], count), dtype), jnp.zeros((*shape[:-1], shape[-1] // BLOCK), jnp.bfloat16), form
    )


def _blocks(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
