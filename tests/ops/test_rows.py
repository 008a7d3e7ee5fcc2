"""Row kernels in Pallas' interpreter against the same functions in XLA's form; that they compile for a card."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax import hardware, quant, xla
from nanojax.config import Compute
from nanojax.ops import linear, rope, rows
from nanojax.ops.columns import column_codes
from nanojax.plan import compile

XLA = Compute(dtype="bf16", rows="xla")
KERNELS = dataclasses.replace(XLA, rows="pallas")
INT8 = {"forward": "int8", "dx": "int8", "dw": "int8"}
M = 16


@pytest.fixture
def calls(monkeypatch):
    """Kernels are interpreted; each one made appends to the list."""
    made, real = [], rows.pl.pallas_call

    def interpreted(*arguments, **keywords):
        made.append(1)
        return real(*arguments, **keywords, interpret=True)

    monkeypatch.setattr(rows.pl, "pallas_call", interpreted)
    return made


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)


def close(got: Any, want: Any, tolerance: float) -> None:
    """Root mean square of the difference within `tolerance` of that of the values, array by array."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for a, b in zip(got, want, strict=True):
        if a.dtype == jax.dtypes.float0:
            continue
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.sum((a - b) ** 2) <= tolerance**2 * np.sum(b * b)


def test_codes_are_rounded_to_nearest_even():
    """x = k/2 for all k from -254 to 254, and their neighbours in f32: the codes are numpy's rint."""
    x = np.arange(-254, 255, dtype=np.float32) / 2
    x = np.concatenate([x, np.nextafter(x, np.float32(200)), np.nextafter(x, np.float32(-200))]).clip(-127, 127)
    np.testing.assert_array_equal(rows.codes_of(jnp.asarray(x), jnp.float32(1)), np.rint(x).astype(np.int8))


@pytest.mark.parametrize("K", [64, 768, 1408])
def test_codes_and_scale_of_a_row(K, calls):
    """A row times column weights, of a width that is a power of two or not: the kernel's codes and scales are those of
    quantize_rows; a row of zeros has scale 1."""
    x, weights = normal(0, M, K).at[3].set(0), jnp.abs(normal(1, 1, K, dtype=jnp.float32))
    row = lambda x, w: rows.quantized([x.astype(jnp.float32) * w])
    got = rows.by_rows(KERNELS, row, (x,), (weights,))
    assert calls
    want = quant.quantize_rows(x.astype(jnp.float32) * weights)
    for a, b, c in zip(got, rows.by_rows(XLA, row, (x,), (weights,)), want, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    assert got[1][3] == 1


def test_parts_lie_side_by_side(calls):
    """Three arrays quantised with one scale per row give the codes of their concatenation, at widths that are not powers of 2."""
    parts = [normal(i, M, K) * (i + 1) for i, K in enumerate((24, 40, 8))]
    got = rows.by_rows(KERNELS, lambda *parts: rows.quantized([x.astype(jnp.float32) for x in parts]), parts)
    assert calls
    want = quant.quantize_rows(jnp.concatenate(parts, -1))
    np.testing.assert_array_equal(got[0], want.codes)
    np.testing.assert_array_equal(got[1], want.scale)


@pytest.mark.parametrize(("rows", "K"), [(16, 96), (512, 64), (768, 16)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_codes_of_columns(rows, K, dtype, calls):
    """Columns times one or two scales per row, in one chunk of rows or several: the kernel's scales are those of quantize_rows,
    transposed, bit for bit, and its codes too, but for one in 10,000 where a quotient next to a half is rounded otherwise; XLA's
    form has both of quantize_rows. A column of zeros has scale 1."""
    x = (normal(0, rows, K, dtype=jnp.float32) * 40).astype(dtype).at[:, 3].set(0)
    one, two = (jnp.abs(normal(i, rows, 1, dtype=jnp.float32)) for i in (1, 2))
    for scales, product in (((one,), one), ((one, two), one * two)):
        want = quant.quantize_rows(x.astype(jnp.float32) * product, axis=0)
        plain = column_codes(XLA, x, *scales)
        np.testing.assert_array_equal(plain.codes, want.codes.T)
        np.testing.assert_array_equal(plain.scale, want.scale.T)
        got = jax.jit(functools.partial(column_codes, KERNELS))(x, *scales)
        assert calls.pop() and not calls
        apart = np.abs(np.asarray(got.codes, np.int32) - np.asarray(plain.codes, np.int32))
        assert apart.max() <= 1 and apart.mean() <= 1e-4
        np.testing.assert_array_equal(got.scale, plain.scale)
        assert got.scale[3] == 1


def test_columns_that_the_kernel_cannot_split(calls):
    """24 rows or columns have no power of two from 16 on as a factor: XLA's form runs, whatever is configured."""
    for shape in ((24, 64), (64, 24)):
        column_codes(KERNELS, normal(0, *shape), jnp.ones((shape[0], 1), jnp.float32))
    assert not calls


@pytest.mark.long
@pytest.mark.parametrize(("N", "H"), [(4, 16), (3, 8), (5, 32)])
@pytest.mark.parametrize("scaled", [True, False])
def test_rope_kernels(N, H, scaled, calls):
    """Two sequences of 8 tokens from position 3, with and without a power of two of heads: q, k and 1/rms are XLA's up to f32
    rounding; one in a thousand codes and gradients may be rounded the other way."""
    rotation, start = rope.Rotation(M // 2, N, H, 1e4), jnp.int32(3)
    q, k, *dys = (normal(i, M, N * H) for i in range(5))
    scale = jnp.abs(normal(6, 1, 3 * N * H, dtype=jnp.float32)) if scaled else None
    kept = rope.forward(KERNELS, rotation, q, k, start)
    want = rope.forward(XLA, rotation, q, k, start)
    close(kept, want, 1e-4)
    gradients = [rope.backward(c, rotation, want, start, tuple(dys), scale) for c in (KERNELS, XLA)]
    assert len(calls) == 2
    for a, b in zip(*gradients, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.mean(np.asarray(a) != np.asarray(b)) <= 1e-3
    close(gradients[0], gradients[1], 3e-3)


def test_heads_that_kernels_cannot_halve(calls):
    """H = 24 has halves of 12, not a power of two: XLA's form runs, whatever is configured."""
    rotation = rope.Rotation(M, 2, 24, 1e4)
    x = normal(0, M, 48)
    kept = rope.forward(KERNELS, rotation, x, x, jnp.int32(0))
    rope.backward(KERNELS, rotation, kept, jnp.int32(0), (x, x, x), None)
    assert not calls


@pytest.mark.long
@pytest.mark.parametrize(
    "op", ["linear", "norm_linear", "relu2_linear", "qkv_linear", "mixed qkv_linear", "gated qkv_linear"]
)
@pytest.mark.parametrize(
    "operands",
    [INT8, *(pytest.param(o, marks=pytest.mark.slow) for o in ({}, {"forward": "int8", "dx": "int8"}, {"dw": "int8"}))],
)
def test_ops_in_kernels(op, operands, calls):
    """Each linear op with row kernels, in int8, bf16 and mixed: y, dX and dW are within 3e-3 of XLA's form (values next to a
    rounding boundary of bf16 or of the codes may go to the other side)."""
    D = 96
    *kind, op = op.split()
    mixed, channels = kind == ["mixed"], 4 * bool(kind)
    O, K = {"linear": (D, D), "norm_linear": (160, D), "relu2_linear": (D, 160), "qkv_linear": (3 * D, D)}[op]
    weights = quant.encode(normal(0, O, K, dtype=jnp.float32) / K**0.5, "int8")
    x, dy, other = normal(1, M, K), normal(2, M, O), normal(3, M, K if "norm" in op or "qkv" in op else O)

    def gradients(c: Compute) -> Any:
        inputs = [jnp.zeros((O, K), jnp.float32), x]
        if op == "qkv_linear":
            rotation = rope.Rotation(M // 2, 3, D // 3, 1e4)
            inputs += [normal(4, M, K), jnp.array([0.9, 0.3])] if mixed else []
            run = lambda tap, x, *mix: linear.qkv_linear(
                c, ("", ""), rotation, channels, weights, tap, x, jnp.int32(0), *mix
            )
            heads = (a.reshape(2, M // 2, 3, D // 3) for a in jnp.split(dy, 3, -1))
            # a gradient of x along both streams: otherwise the factors' are differences of large sums
            along = x + inputs[2] if mixed else other
            cotangents = (*heads, along, normal(5, M, channels, dtype=jnp.float32), other if mixed else None)
        elif op == "norm_linear":
            run = lambda tap, x: linear.norm_linear(c, "", weights, tap, x)
            cotangents = ((dy,), other)
        else:
            run, cotangents = lambda tap, x: getattr(linear, op)(c, "", weights, tap, x, other), dy
        both: Any = jax.vjp(run, *inputs)
        y, vjp = both
        return y, vjp(cotangents)

    want = jax.jit(lambda: gradients(dataclasses.replace(XLA, **operands)))()
    assert not calls
    got = jax.jit(lambda: gradients(dataclasses.replace(KERNELS, **operands)))()
    assert calls or (op in ("linear", "relu2_linear") and not operands)
    close(got, want, 3e-3)


@pytest.mark.plan
@pytest.mark.skipif(not xla.cuda_compiler_installed(), reason="the plan extra is not installed")
@pytest.mark.parametrize(("N", "H"), [(11, 128), (4, 64)])
def test_kernels_compile_for_a_card(N, H):
    """Triton takes every kernel at d21's and at a small model's width: each is one custom call in the compiled program."""
    D, form = N * H, jax.ShapeDtypeStruct
    x, w = form((256, D), jnp.bfloat16), form((1, 3 * D), jnp.float32)
    rotation = rope.Rotation(128, N, H, 1e4)

    def all_kernels(x: jax.Array, w: jax.Array) -> Any:
        kept = rope.forward(KERNELS, rotation, x, x, jnp.int32(0))
        codes = functools.partial(rope.backward, KERNELS, rotation, kept, jnp.int32(0), (x, x, x))
        row = lambda x, w: rows.quantized([x.astype(jnp.float32) * w])
        columns = column_codes(KERNELS, x, jnp.ones((256, 1), jnp.float32))
        return kept, codes(w), codes(None), rows.by_rows(KERNELS, row, (x,), (w[:, :D],)), columns

    program = compile.compile_for(all_kernels, (x, w), hardware.CARDS["rtx4070"])
    assert program.hlo.count('custom_call_target="__gpu$xla.gpu.triton"') == 5
