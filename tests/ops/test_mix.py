"""The mix of two streams inside qkv_linear: against the op on streams mixed before it, and jax's own derivatives in f32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax import quant
from nanojax.config import Compute
from nanojax.ops import rope
from nanojax.ops.linear import qkv_linear

T, N, H, CHANNELS = 8, 2, 16, 4
M, D = 2 * T, N * H
FACTORS = jnp.array([0.9, 0.3])
FLOAT = Compute(dtype="f32")
INT8 = Compute(dtype="f32", forward="int8", dx="int8", dw="int8")


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def run(c: Compute, before: bool) -> tuple[Any, Any]:
    """(what the op returns, the gradients of tap, x, first and factors) with the mix inside, or in plain jax before it."""
    w = quant.encode(normal(0, 3 * D, D) / D**0.5, "int8")

    def op(*arguments: Any) -> Any:
        return qkv_linear(c, ("", ""), rope.Rotation(T, N, H, 1e4), CHANNELS, w, *arguments)

    def function(tap: jax.Array, x: jax.Array, first: jax.Array, factors: jax.Array) -> Any:
        if before:
            return (*op(tap, factors[0] * x + factors[1] * first, jnp.int32(0))[:5], first)
        return op(tap, x, jnp.int32(0), first, factors)

    y, vjp = jax.vjp(function, jnp.zeros((3 * D, D)), normal(1, M, D), normal(2, M, D), FACTORS)
    return y, vjp(jax.tree.map(lambda a: normal(a.size, *a.shape), y))


@pytest.mark.parametrize("c", [FLOAT, INT8])
def test_mixing_inside_equals_mixing_before(c: Compute) -> None:
    """Heads, mixed x, gates' inputs and first; gradients of weights, both streams and both factors: to 1e-5 of the largest."""
    got, want = (jax.jit(lambda before=before: run(c, before))() for before in (False, True))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_without_a_first_stream_nothing_is_mixed() -> None:
    """x comes back as it is, and there is no first stream to return."""
    x, w = normal(1, M, D), normal(0, 3 * D, D)
    returned: Any = qkv_linear(FLOAT, ("", ""), rope.Rotation(T, N, H, 1e4), 0, w, None, x, jnp.int32(0))
    *_, same, _, first = returned
    np.testing.assert_array_equal(same, x)
    assert first is None
