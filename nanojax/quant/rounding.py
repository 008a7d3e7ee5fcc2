"""Stochastic rounding: unbiased in the mean, so that updates far below one grid step still add up.

Noise of what is stored is 16 bits a value from a counter hash (murmur3's finaliser, twice, keyed by two words of the jax
key): about 12 integer operations that fuse into the rounding, where threefry needs about 60. 8 bits would lose updates
below 1/256 of a grid step. Accumulators, which d32 rounds 1.6 B of a microbatch, have cheaper noise (`dithered`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Decode and divide again and a code comes back within 127 * 2^-23 = 1.5e-5 of itself; anything closer than this to the grid
# is the grid, which makes re-encoding exact.
SNAP = 2.0**-15
GOLDEN = 40503  # 2^16 / 1.618..., odd: all 65,536 phases come once in as many steps


def _mix(x: jax.Array) -> jax.Array:
    u = jnp.uint32
    x = (x ^ (x >> u(16))) * u(0x85EBCA6B)
    x = (x ^ (x >> u(13))) * u(0xC2B2AE35)
    return x ^ (x >> u(16))


def noise_u16(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform integers 0..65535 of `shape`, uint32. Arrays of up to 2^32 values."""
    words = jax.random.bits(key, (2,), jnp.uint32)
    strides = [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))]
    index = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return _mix(_mix(index ^ words[0]) + words[1]) >> jnp.uint32(16)


def dither(key: jax.Array, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """f32 in (0, 1): where a value lies between two levels must exceed this for it to go up at this step.

    Each value has a fixed phase from `key`, which every step moves by the golden ratio: the thresholds a value meets in n
    steps are equidistant to within 1/n, not a random n. A value that is pushed by p of a level per step goes up
    once every 1/p steps, where independent noise would let it go 1 +- 1 times. Below 8 bits, where p is a few hundredths, this
    noise is what costs loss (scripts/quality.py).
    """
    return (((noise_u16(key, shape) + step.astype(jnp.uint32) * GOLDEN) & 0xFFFF).astype(jnp.float32) + 0.5) / 65536


def round_int(x: jax.Array, key: jax.Array | None) -> jax.Array:
    """f32 to whole numbers (as f32): to one of the two neighbours with P proportional to closeness; key=None: nearest."""
    if key is None:
        return jnp.round(x)
    floor = jnp.floor(x)
    part = x - floor
    part = jnp.where(part < SNAP, 0.0, jnp.where(part > 1 - SNAP, 1.0, part))
    noise = noise_u16(key, x.shape).astype(jnp.float32) + 0.5
    return floor + (noise < part * 65536).astype(jnp.float32)


def round_bf16(x: jax.Array, key: jax.Array | None) -> jax.Array:
    """f32 to bf16 by adding 16 random bits below the cut; values of bf16 stay as they are. key=None: nearest even."""
    if key is None:
        return x.astype(jnp.bfloat16)
    bits = lax.bitcast_convert_type(x, jnp.uint32) + noise_u16(key, x.shape)
    rounded = lax.bitcast_convert_type((bits >> jnp.uint32(16)).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def dither_vectors(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Two f32 [n], uniform in [0, 1): noise for `dithered`, of a matrix of up to n rows and columns."""
    u, v = jax.random.uniform(key, (2, n))
    return u, v


def shifted(noise: tuple[jax.Array, jax.Array], i: int) -> tuple[jax.Array, jax.Array]:
    """The noise of matrix `i` of many: one draw a microbatch, moved by multiples of the golden ratio."""
    return noise[0] + i * 0.6180339887 % 1, noise[1]


def dithered(x_RC: jax.Array, noise: tuple[jax.Array, jax.Array]) -> jax.Array:
    """f32 x plus uniform noise of one step of bf16 at x: a small addend rounded after it, to nearest, is right in the mean.

    frac(u[row] + v[column]) is uniform and, taken two by two, independent. Unlike integer hashes and bit casts (round_bf16) it
    fuses into a matmul's epilogue, as long as what the matmul makes is used once: hence the step of x, not of the sum. A sum
    that leaves x's power of two upward is rounded with half the noise it should have, x = 0 with none.
    """
    rows, columns = x_RC.shape
    z = noise[0][:rows, None] + noise[1][None, :columns]
    step = jnp.exp2(jnp.floor(jnp.log2(jnp.abs(x_RC)))) * 2.0**-7
    return x_RC + (z - jnp.floor(z) - 0.5) * step


def add_rounded(
    total: jax.Array, addend: jax.Array, noise: tuple[jax.Array, jax.Array], decay: Any = 1.0, weight: Any = 1.0
) -> jax.Array:
    """decay*total + weight*addend in total's dtype; the addend is f32.

    A bf16 total [R,...] is rounded stochastically with `noise` (dither_vectors): rounding to nearest would lose most of d32's
    256th microbatch. XLA fuses all of this into the matmul that makes the addend.
    """
    old = total.astype(jnp.float32) * decay
    if total.dtype == jnp.bfloat16:
        old = dithered(old.reshape(old.shape[0], -1), noise).reshape(old.shape)
    return (addend * weight + old).astype(total.dtype)
