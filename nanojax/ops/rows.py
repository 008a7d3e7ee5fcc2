"""A function of whole rows, in one pass: on an NVIDIA GPU a Pallas kernel (Triton), elsewhere the function as it stands.

XLA writes a row's maximum out before anything can be rounded by it, and so reads the row twice: in d32's step a fifth of all
traffic outside matmuls and attention. A kernel holds one row in registers. Both forms are the same Python function; they
differ in the order of sums alone. Left out: several rows to a program, which would pay below about 1,000 values a row.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from nanojax.config import Compute
from nanojax.quant.formats import scale_of

# From jax 0.11 on, at every compile. Pallas' other backend for GPUs, Mosaic, has Ampere's and Ada's instructions only there,
# and jax 0.10 runs here too. Where Triton is gone, compute.rows=xla needs none of it.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

Row = Callable[..., tuple[Any, ...]]
F32 = jnp.float32
EPS = 2.0**-23  # inside the norms' square root: what torch's F.rms_norm, and so nanochat, uses in f32
EXACT = 1.5 * 2.0**23  # added to |x| < 2^22, leaves x rounded to nearest, ties to even, in the sum's low bits
VALUES_A_WARP = 1024  # 32 a thread: enough loads in flight without spilling


def quantized(parts: Sequence[jax.Array]) -> tuple[Any, jax.Array]:
    """f32 rows, given in parts side by side, as int8 codes (so many parts) and one scale: formats.quantize_rows, to nearest."""
    scale = scale_of(functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x), -1, keepdims=True) for x in parts]))
    codes = [codes_of(x, scale) for x in parts]
    return codes[0] if len(codes) == 1 else tuple(codes), scale


def codes_of(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x/scale, at most 127 in magnitude, to the nearest whole number: int8. (Triton knows no rounding.)"""
    bits = lax.bitcast_convert_type(x / scale + EXACT, jnp.int32)
    return (bits - jnp.int32(0x4B400000)).astype(jnp.int8)


def inverse_rms(x: jax.Array, K: int = 0) -> jax.Array:
    """1/sqrt(mean(x^2) + eps) over the last axis, kept; f32. K: how many of its values are not padding, if not all."""
    x = x.astype(F32)
    return inverse_rms_of(jnp.sum(x * x, -1, keepdims=True), K or x.shape[-1])


def inverse_rms_of(squares: jax.Array, K: int) -> jax.Array:
    """The same from the sum of K squares."""
    return lax.rsqrt(squares * (1 / K) + EPS)


@functools.cache
def implementation(choice: str) -> str:
    """`auto` resolved: pallas where jax's default backend is an NVIDIA GPU, else xla."""
    if choice != "auto":
        return choice
    return "pallas" if jax.default_backend() == "gpu" else "xla"


def by_rows(
    c: Compute,
    function: Row,
    rows: Sequence[jax.Array],
    columns: Sequence[jax.Array] = (),
) -> tuple[jax.Array, ...]:
    """function(*rows, *columns), a row at a time where c.rows is pallas.

    Args:
      function: takes arrays [m, K] (`rows`) and [1, K] (`columns`), K each array's own, and returns a tuple of arrays [m, n], or
        of tuples of these that are to lie side by side. It reduces over the last axis only; zeros appended to its inputs
        must change no result.
      rows: arrays [M, K].
      columns: arrays [1, K], the same for all rows.

    Returns:
      Arrays [M, sum of n].
    """
    if implementation(c.rows) == "xla":
        return tuple(jnp.concatenate(y, -1) if isinstance(y, tuple) else y for y in function(*rows, *columns))
    shapes: Any = jax.eval_shape(function, *(a[:1] for a in rows), *columns)
    outputs = [y if isinstance(y, tuple) else (y,) for y in shapes]
    M = rows[0].shape[0]
    widths = [sum(part.shape[-1] for part in y) for y in outputs]
    largest = max(a.shape[-1] for a in (*rows, *columns))
    call = pl.pallas_call(
        functools.partial(_kernel, function, len(rows) + len(columns), outputs),
        grid=(M,),
        in_specs=[pl.BlockSpec((1, a.shape[1]), lambda i: (i, 0)) for a in rows]
        + [pl.BlockSpec(a.shape, lambda i: (0, 0)) for a in columns],
        out_specs=[pl.BlockSpec((1, width), lambda i: (i, 0)) for width in widths],
        out_shape=[jax.ShapeDtypeStruct((M, width), y[0].dtype) for width, y in zip(widths, outputs)],
        compiler_params=triton.CompilerParams(num_warps=_warps(largest), num_stages=1),
    )
    return tuple(call(*rows, *columns))


def _warps(values: int) -> int:
    return max(1, min(8, pl.next_power_of_2(values) // VALUES_A_WARP))


def _kernel(function: Row, inputs: int, outputs: list[Any], *refs: Any) -> None:
    """One program's row: loaded up to the next power of two, zeros beyond; each output's parts stored side by side."""
    values = []
    for ref in refs[:inputs]:
        K, P = ref.shape[-1], pl.next_power_of_2(ref.shape[-1])
        at = jnp.arange(P)
        mask: dict[str, Any] = {} if P == K else {"mask": at < K, "other": jnp.zeros((), ref.dtype)}
        values.append(triton.load(ref.at[0, at], **mask)[None])
    for ref, parts, results in zip(refs[inputs:], outputs, function(*values)):
        start = 0
        for part, y in zip(parts, results if isinstance(results, tuple) else (results,)):
            n, at = part.shape[-1], jnp.arange(y.shape[-1])
            mask = {} if y.shape[-1] == n else {"mask": at < n}
            triton.store(ref.at[0, start + at], y.astype(part.dtype)[0], **mask)
            start += n
