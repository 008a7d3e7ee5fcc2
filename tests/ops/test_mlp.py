"""The second half of a block as one op against the two ops that it is made of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojax import quant
from nanojax.config import Compute, Format
from nanojax.ops.linear import norm_linear, relu2_linear
from nanojax.ops.mlp import mlp

INT8 = Compute(dtype="f32", forward="int8", dx="int8", dw="int8")
M, D, F = 128, 64, 256


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def gradients(c: Compute, one: bool, form: Format) -> tuple[jax.Array, ...]:
    """y, and the gradients of up, down and x; weights stored as `form`."""
    up, down = (quant.encode(normal(i, *shape) / shape[1] ** 0.5, form) for i, shape in enumerate([(F, D), (D, F)]))
    x, dy = normal(2, M, D) * jnp.exp(normal(3, M, 1)), normal(4, M, D)

    def run(up_tap: jax.Array, down_tap: jax.Array, x: jax.Array) -> jax.Array:
        if one:
            return mlp(c, ("", ""), up, up_tap, down, down_tap, x)
        hidden: Any = norm_linear(c, "", up, up_tap, x)
        return relu2_linear(c, "", down, down_tap, hidden[0][0], hidden[1])

    y, vjp = jax.vjp(run, jnp.zeros((F, D)), jnp.zeros((D, F)), x)
    return (y, *vjp(dy))


def test_floats_are_the_two_ops() -> None:
    """In f32 the output and all gradients are those of norm_linear and relu2_linear, bit for bit."""
    for got, want in zip(gradients(Compute(), True, "f32"), gradients(Compute(), False, "f32"), strict=True):
        np.testing.assert_array_equal(got, want)


def test_int8_is_as_near_to_f32_as_the_two_ops() -> None:
    """In int8 the output and dW are those of the two ops. dX, in which a dot product is known beforehand, is as far from f32's
    as theirs, within 5%."""
    (y, dup, ddown, dx), two = gradients(INT8, True, "int8"), gradients(INT8, False, "int8")
    for got, want in zip((y, dup, ddown), two):
        np.testing.assert_array_equal(got, want)
    exact = gradients(Compute(), True, "int8")[3]
    error = lambda a: float(jnp.linalg.norm(a - exact) / jnp.linalg.norm(exact))
    assert 0 < error(dx) < 1.05 * error(two[3]) < 0.1, (error(dx), error(two[3]))
