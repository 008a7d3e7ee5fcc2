"""int8 codes of columns, transposed: a matrix that is contracted over its rows, as the int8 tensor cores read it.

XLA takes four kernels for this: the maxima, the scales, the codes and their transposition. The kernel here reads the matrix once
from memory, and a second time from the L2 cache for the codes.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from nanojax.config import Compute
from nanojax.ops.rows import F32, codes_of, implementation, scale_of
from nanojax.quant.formats import Quantized, quantize_rows

COLUMNS = 32  # per program: a row of int8 is one sector of 32 bytes; 48 or 64 programs at widths of 1,536 and 2,048
ROWS = 256  # at a time: 32 values per thread
WARPS = 8


def column_codes(c: Compute, x_MK: jax.Array, *scales_M1: jax.Array) -> Quantized:
    """Codes [K,M], contiguous along M, and scales [K,1] of the columns of x times the product of f32 scales [M,1].

    They are what quantize_rows(x*scales, axis=0) gives, transposed.
    """
    M, K = x_MK.shape
    columns, rows = math.gcd(K, COLUMNS), math.gcd(M, ROWS)
    if implementation(c.rows) == "xla" or min(columns, rows) < 16:
        q = quantize_rows(x_MK.astype(F32) * functools.reduce(jnp.multiply, scales_M1), axis=0)
        return Quantized(q.codes.T, q.scale.T)
    one: Any = lambda a: pl.BlockSpec(a.shape, lambda i: (0,) * a.ndim)
    call = pl.pallas_call(
        functools.partial(_kernel, rows, len(scales_M1)),
        grid=(K // columns,),
        in_specs=[pl.BlockSpec((M, columns), lambda i: (0, i)), *map(one, scales_M1)],
        out_specs=[pl.BlockSpec((columns, M), lambda i: (i, 0)), pl.BlockSpec((columns, 1), lambda i: (i, 0))],
        out_shape=[jax.ShapeDtypeStruct((K, M), jnp.int8), jax.ShapeDtypeStruct((K, 1), F32)],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
    )
    return Quantized(*jax.jit(call)(x_MK, *scales_M1))  # jit: as in rows.by_rows


def _kernel(rows: int, scales: int, x_ref: Any, *refs: Any) -> None:
    """One program: `columns` of x, as [columns, rows], `rows` rows at a time."""
    scale_refs, (codes_ref, scale_ref) = refs[:scales], refs[scales:]
    M, columns = x_ref.shape
    column = jnp.arange(columns)

    def values(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        row = i * rows + jnp.arange(rows)
        product = functools.reduce(jnp.multiply, [triton.load(ref.at[row, 0]) for ref in scale_refs])
        return row, triton.load(x_ref.at[row[None, :], column[:, None]]).astype(F32) * product[None, :]

    largest = lambda i, amax: jnp.maximum(amax, jnp.abs(values(i)[1]))
    amax = lax.fori_loop(0, M // rows, largest, jnp.zeros((columns, rows), F32))
    scale = scale_of(jnp.max(amax, 1))
    triton.store(scale_ref.at[column, 0], scale)

    def encode(i: jax.Array, _: None) -> None:
        row, x = values(i)
        triton.store(codes_ref.at[column[:, None], row[None, :]], codes_of(x, scale[:, None]))

    lax.fori_loop(0, M // rows, encode, None)
