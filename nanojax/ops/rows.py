"""Runs a function of whole rows in one pass: as a Pallas (Triton) kernel on an NVIDIA GPU, as it is elsewhere.

XLA writes a row's maximum to memory before it can quantise the row, and so reads the row twice; in d32's step that is a
fifth of all traffic outside matmuls and attention. A kernel holds the row in registers. Both forms run the same Python
function and differ only in the order of sums. A program takes one row; several would help below about 1,000 values per row.
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

# jax warns at every compile from 0.11 on. Pallas' other GPU backend, Mosaic, supports Ampere and Ada only from 0.11 on, and we
# support 0.10 too. compute.rows=xla needs neither.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

Row = Callable[..., tuple[Any, ...]]
F32 = jnp.float32
EPS = 2.0**-23  # under the norms' square root; torch's F.rms_norm, and so nanochat, has the same in f32
EXACT = 1.5 * 2.0**23  # x + EXACT has x, |x| < 2^22, in its low bits, rounded to nearest with ties to even
VALUES_PER_WARP = 1024  # 32 per thread: enough loads in flight without spilling
ARRAYS = 4  # so many of 32 values fit in a thread's registers; more take more warps


def quantized(parts: Sequence[jax.Array]) -> tuple[Any, jax.Array]:
    """The int8 codes of f32 rows, rounded to nearest, and one scale per row, as formats.quantize_rows makes them.

    parts: arrays that lie side by side. The codes come in the same parts; a single one is not wrapped in a tuple.
    """
    scale = scale_of(functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x), -1, keepdims=True) for x in parts]))
    codes = [codes_of(x, scale) for x in parts]
    return codes[0] if len(codes) == 1 else tuple(codes), scale


def codes_of(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x/scale, at most 127 in magnitude, rounded to nearest as int8. (Triton has no rounding instruction.)"""
    bits = lax.bitcast_convert_type(x / scale + EXACT, jnp.int32)
    return (bits - jnp.int32(0x4B400000)).astype(jnp.int8)


def inverse_rms(x: jax.Array, K: int = 0) -> jax.Array:
    """1/sqrt(mean(x^2) + eps) over the last axis, which stays as 1; f32. K: the number of values, if some are padding."""
    x = x.astype(F32)
    return inverse_rms_of(jnp.sum(x * x, -1, keepdims=True), K or x.shape[-1])


def inverse_rms_of(squares: jax.Array, K: int) -> jax.Array:
    """inverse_rms from the sum of K squares."""
    return lax.rsqrt(squares * (1 / K) + EPS)


@functools.cache
def implementation(choice: str) -> str:
    """Resolves "auto": pallas if jax's default backend is a GPU, otherwise xla."""
    if choice != "auto":
        return choice
    return "pallas" if jax.default_backend() == "gpu" else "xla"


def by_rows(
    c: Compute,
    function: Row,
    rows: Sequence[jax.Array],
    columns: Sequence[jax.Array] = (),
) -> tuple[jax.Array, ...]:
    """function(*rows, *columns), computed one row at a time if c.rows resolves to pallas.

    Args:
      function: takes arrays [m,K] (`rows`) and [1,K] (`columns`), where K may differ between arrays. It returns a tuple whose
        items are arrays [m,n], or tuples of such arrays to be placed side by side. It reduces over the last axis only, and
        zeros appended to its inputs must not change its results.
      rows: arrays [M,K].
      columns: arrays [1,K], the same for all rows.

    Returns:
      One array [M, sum of n] per item.
    """
    if implementation(c.rows) == "xla":
        return tuple(jnp.concatenate(y, -1) if isinstance(y, tuple) else y for y in function(*rows, *columns))
    shapes: Any = jax.eval_shape(function, *(a[:1] for a in rows), *columns)
    outputs = [y if isinstance(y, tuple) else (y,) for y in shapes]
    M = rows[0].shape[0]
    widths = [sum(part.shape[-1] for part in y) for y in outputs]
    values = [a.shape[-1] for a in (*rows, *columns)]
    call = pl.pallas_call(
        functools.partial(_kernel, function, len(rows) + len(columns), outputs),
        grid=(M,),
        in_specs=[pl.BlockSpec((1, a.shape[1]), lambda i: (i, 0)) for a in rows]
        + [pl.BlockSpec(a.shape, lambda i: (0, 0)) for a in columns],
        out_specs=[pl.BlockSpec((1, width), lambda i: (i, 0)) for width in widths],
        out_shape=[jax.ShapeDtypeStruct((M, width), y[0].dtype) for width, y in zip(widths, outputs)],
        compiler_params=triton.CompilerParams(num_warps=_warps(max(*values, sum(values) // ARRAYS)), num_stages=1),
    )
    # jit, because jax keeps a pallas_call whose results nobody uses, and under remat its inputs with it: d32's laptop config
    # would hold every block's input, 8 MiB per layer.
    return tuple(jax.jit(call)(*rows, *columns))


def _warps(values: int) -> int:
    return max(1, min(8, pl.next_power_of_2(values) // VALUES_PER_WARP))


def _kernel(function: Row, inputs: int, outputs: list[Any], *refs: Any) -> None:
    """One program: loads its row, padded with zeros to a power of two, and stores each output's parts side by side."""
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
