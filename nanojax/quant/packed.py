"""Block matrices below 8 bits: codes of 4, 3 or 2.67 bits and one bf16 scale per 64 values, packed into plain integers.

A code stands for a level in [-1, 1] and a value is level * scale. int4, int3 and b2.67 (six levels, twelve to a 32-bit
word) have equidistant levels without a zero, a finer step than with one: only a whole block is ever 0, by its scale. NF4
has QLoRA's quantiles of a normal distribution (arXiv 2305.14314, appendix E).

Trained weights have a remainder besides, 2 or 4 bits that only the optimizer sees: with it a weight lies on a grid 4 or 16
times as fine (encode_fine). Products read the level next to the weight, as quantisation-aware training does with an f32
weight; rounded to levels alone, weights would take up more noise at every step than update (LOG.md has both in numbers).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK = 64  # values to a scale: with bf16 scales 0.25 bits a value
# Outermost level in root mean squares of its block, for least squared error on normal data (NF4: as int4). With b2.67 training
# loses 0.073 nats with the largest value there, 0.028 with this (d2, width 128, weights kept in f32).
REACH = {"int4": 2.9, "nf4": 2.9, "int3": 2.05, "b2.67": 1.83}
HELD = 1 / 10  # a held scale is given up where it is off by more than this part
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


def pack(codes: jax.Array, form: str) -> jax.Array:
    """Codes (whole numbers from 0) [..., K] as words [..., W].

    The values of one word are K/2 (nibbles), K/32 (int3) or W (b2.67) apart, so that all that moves are contiguous runs.
    int3: of three words two hold the lower two bits of 16 codes each, the third the upper bit of all 32. b2.67: each half of
    a word is a fraction of six digits of base six, first digit first, in units of 2^-16 and rounded up: one product by 6^i
    has digit i in front, where dividing an integer again and again would write every quotient out.
    """
    *lead, K = codes.shape
    u = jnp.uint32
    if form == "b2.67":
        W = math.ceil(K / 12)
        digits = jnp.pad(codes.astype(u), [(0, 0)] * len(lead) + [(0, 12 * W - K)]).reshape(*lead, 2, 6, W)
        number = jnp.sum(
            digits * _column((u(6) ** jnp.arange(6, dtype=u))[::-1], digits.ndim), -2, dtype=u
        )  # below 6^6 = 46656
        half = lax.div((number << u(16)) + u(6**6 - 1), u(6**6))
        return half[..., 0, :] | half[..., 1, :] << u(16)
    if form == "int3":
        runs = codes.astype(u).reshape(*lead, 32, K // 32)
        low = (runs & u(3)).reshape(*lead, 2, 16, K // 32)
        low = low << _column(jnp.arange(0, 32, 2, dtype=u), low.ndim)
        high = (runs >> u(2)) << _column(jnp.arange(32, dtype=u), runs.ndim)
        words = [jnp.sum(low, -2, dtype=u), jnp.sum(high, -2, dtype=u)[..., None, :]]
        return jnp.concatenate(words, -2).reshape(*lead, 3 * K // 32)
    return _pack_bits(codes, 4)


def unpack(words: jax.Array, form: str, K: int) -> jax.Array:
    """The inverse of pack: codes int32 [..., K]."""
    lead, u = words.shape[:-1], jnp.uint32
    if form == "b2.67":
        half = words[..., None, :] >> _column(jnp.repeat(u([0, 16]), 6), words.ndim + 1)
        rest = half * _column(
            jnp.tile(u(6) ** jnp.arange(6, dtype=u), 2), half.ndim
        )  # modulo 2^16: the digits from i on
        digits = ((rest & u(0xFFFF)) * u(6)) >> u(16)
        return digits.reshape(*lead, 12 * words.shape[-1])[..., :K].astype(jnp.int32)
    if form == "int3":
        planes = words.reshape(*lead, 3, K // 32)
        low = planes[..., :2, None, :] >> _column(jnp.arange(0, 32, 2, dtype=u), planes.ndim + 1)
        high = planes[..., 2:, :] >> _column(jnp.arange(32, dtype=u), planes.ndim)
        return ((low.reshape(*lead, 32, K // 32) & u(3)) | (high & u(1)) << u(2)).astype(jnp.int32).reshape(*lead, K)
    return _unpack_bits(words, 4)


def _column(values: jax.Array, ndim: int) -> jax.Array:
    """values [N] as [..., N, 1] with `ndim` axes."""
    return values.reshape(*(1,) * (ndim - 2), -1, 1)


def _pack_bits(x: jax.Array, bits: int) -> jax.Array:
    """The lower `bits` (2 or 4) bits of whole numbers [..., K] as uint8 [..., K*bits/8]; a byte's values are an equal part
    of K apart."""
    first, *rest = jnp.split((x & (2**bits - 1)).astype(jnp.uint8), 8 // bits, -1)
    return sum((part << jnp.uint8(bits * i) for i, part in enumerate(rest, 1)), first)


def _unpack_bits(words: jax.Array, bits: int) -> jax.Array:
    """The inverse of _pack_bits, int32 from 0."""
    parts = [(words >> jnp.uint8(bits * i)) & jnp.uint8(2**bits - 1) for i in range(8 // bits)]
    return jnp.concatenate(parts, -1).astype(jnp.int32)


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
    codes, top = unpack(stored.words, stored.form, stored.shape[-1]), len(LEVELS[stored.form]) - 1
    row = jnp.max(stored.scale, -1, keepdims=True).astype(jnp.float32)
    row = jnp.where(row > 0, row * (1 / 127), 1.0)
    if stored.form == "nf4":
        levels, unit = jnp.asarray(NF4, jnp.float32)[codes], 1.0
    else:
        levels, unit = codes.astype(jnp.float32) - top / 2, 2 / top
    row, unit = lax.optimization_barrier((row, unit / row))  # a division a row, not one a value
    factor = stored.scale.astype(jnp.float32) * unit
    return jnp.round(_blocks(levels) * factor[..., None]).astype(jnp.int8).reshape(stored.shape), row


def encode(x: jax.Array, form: str, dither: jax.Array | None = None) -> Packed:
    """f32 [..., K] as stored, K a multiple of 64; a block's scale is its largest magnitude.

    dither: f32 in (0, 1) of x's shape: a value goes to the upper of its two levels if it lies further than this, in steps,
    above the lower one. Uniform noise rounds without bias. None: to nearest.
    """
    v = _blocks(x.astype(jnp.float32))
    scale = jnp.max(jnp.abs(v), -1, keepdims=True).astype(jnp.bfloat16)
    codes = _rounded(v, scale, form, 1, 0.5 if dither is None else _blocks(dither))
    return Packed(pack(codes.reshape(x.shape), form), scale[..., 0], form)


def encode_fine(x: jax.Array, dither: jax.Array, old: Packed, bits: int) -> tuple[Packed, jax.Array | None]:
    """f32 [..., K] as what products read and what that leaves of x, uint8, `bits` bits a value (2 or 4; 0: None).

    x is dithered to a finer grid, of 2^bits points to each level's cell; what products read is the level, the remainder
    which of its points it is, counted from the one just above the level and around. A new scale is the block's largest value
    or REACH root mean squares if less (values end at the grid's end). But the scale stays that of `old` as long as what it
    gives fits: a scale that follows its block at every step rounds all of its values anew.
    """
    form, points, v, cut = old.form, 2**bits, _blocks(x.astype(jnp.float32)), _blocks(dither)
    end, step = min(_end(form, points)), (LEVELS[form][1] - LEVELS[form][0]) / points
    held = old.scale.astype(jnp.float32)[..., None]
    kept = _value(_rounded(v, held, form, points, cut), form, points) * held
    # judged by what rounding gives where that can be, so that encoding again what was encoded changes nothing
    (most, wide), (kept_most, kept_wide) = (
        (jnp.max(jnp.abs(a), -1, keepdims=True), _reach(a, form, bits)) for a in (v, kept)
    )
    grown = jnp.minimum(most / (1.02 * end), kept_wide / (1 + HELD)) > held
    shrunk = jnp.minimum(kept_most / min(1 - HELD, 0.98 - step), kept_wide / (1 - HELD)) < held
    wide = _reach(jnp.clip(v, -end * wide, end * wide), form, bits)  # of what will be stored
    scale = jnp.where(grown | shrunk | (held == 0), jnp.minimum(most, wide), held).astype(jnp.bfloat16)
    codes = _rounded(v, scale, form, points, cut).reshape(x.shape)
    level = lax.div(codes, jnp.int32(points))
    new, rest = Packed(pack(level, form), scale[..., 0], form), codes - level * points - points // 2
    return new, _pack_bits(rest, bits) if bits else None


def decode_fine(stored: Packed, remainder: jax.Array | None, bits: int) -> jax.Array:
    """What encode_fine rounded x to, f32 [..., K]. A remainder of zeros is next to the level, a half point above it."""
    if remainder is None:
        return decode(stored)
    points = 2**bits
    codes = unpack(stored.words, stored.form, stored.shape[-1]) * points
    codes += _unpack_bits(remainder, bits) ^ (points // 2)  # plus half a cell, around
    values = _blocks(_value(codes, stored.form, points)) * stored.scale.astype(jnp.float32)[..., None]
    return values.reshape(stored.shape)


def _reach(v: jax.Array, form: str, bits: int) -> jax.Array:
    """Where the outermost level belongs by the root mean square of each block; without a remainder not inside a block."""
    return (REACH[form] if bits else BLOCK) * jnp.sqrt(jnp.mean(v * v, -1, keepdims=True))


def _nf4() -> tuple[jax.Array, jax.Array]:
    """Levels and the distance of each but the last to the next."""
    return jnp.asarray(NF4, jnp.float32), jnp.asarray(np.diff(NF4), jnp.float32)


def _rounded(v: jax.Array, scale: jax.Array, form: str, points: int, cut: Any) -> jax.Array:
    """v / scale to the upper of its two neighbours if it lies further than `cut`, in steps, above the lower. Codes int32.

    The grid has `points` points a level, those between two levels equidistant, half of those of a level to each side of it.
    Codes count from the lowest, so that code // points is the level.
    """
    scale, table, end = scale.astype(jnp.float32), LEVELS[form], _end(form, points)
    v = jnp.clip(v / jnp.where(scale > 0, scale, 1.0), -end[0], end[1])
    if form == "nf4":
        levels, step = _nf4()
        # term by term: as a reduction, XLA computes v anew for each of the 14, in a kernel that takes minutes to compile
        low = sum(((v >= level).astype(jnp.int32) for level in table[1:-1]), jnp.zeros(v.shape, jnp.int32))
        steps = (low.astype(jnp.float32) + (v - levels[low]) / step[low]) * points
    else:
        steps = (v + 1) * ((len(table) - 1) / 2 * points)
    steps += (points - 1) / 2
    whole = jnp.floor(steps)
    part = steps - whole
    if form == "nf4":  # a level whose neighbours are not equally far is between two points: `steps` has a bend there
        below, above = (_value(whole.astype(jnp.int32) + i, form, points) for i in (0, 1))
        part = (v - below) / (above - below)
    part = jnp.where(part < SNAP, 0.0, jnp.where(part > 1 - SNAP, 1.0, part))
    code = whole.astype(jnp.int32) + (part > cut).astype(jnp.int32)
    return jnp.clip(code, 0, len(table) * points - 1)


def _value(codes: jax.Array, form: str, points: int) -> jax.Array:
    """What codes of _rounded stand for, f32."""
    halves, top = 2 * codes - (points - 1), len(LEVELS[form]) - 1  # of points, from the lowest level
    if form != "nf4":
        return (halves - top * points).astype(jnp.float32) * (1 / (top * points))
    levels, step = _nf4()
    low = jnp.clip(lax.div(halves, jnp.int32(2 * points)), 0, top - 1)
    return levels[low] + (halves - low * (2 * points)).astype(jnp.float32) * step[low] * (1 / (2 * points))


def _end(form: str, points: int) -> tuple[float, float]:
    """Magnitude of the grid's lowest and highest point."""
    table, part = LEVELS[form], (points - 1) / (2 * points)
    return 1 + part * (table[1] - table[0]), 1 + part * (table[-1] - table[-2])


def zeros(shape: tuple[int, ...], form: str) -> Packed:
    """Stored zeros: codes 0 with scale 0."""
    count, dtype = words_of(form, shape[-1])
    return Packed(
        jnp.zeros((*shape[:-1], count), dtype), jnp.zeros((*shape[:-1], shape[-1] // BLOCK), jnp.bfloat16), form
    )


def _blocks(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
