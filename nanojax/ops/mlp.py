"""The second half of a block as one op, so that backward of its first matmul can use what its second one keeps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from nanojax.config import Compute
from nanojax.ops import linear
from nanojax.ops.rows import F32, by_rows, quantized
from nanojax.quant.formats import Quantized


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def mlp(
    c: Compute, names: tuple[str, str], up: Any, up_tap: jax.Array | None, down: Any, down_tap: jax.Array | None,
    x: jax.Array,
) -> jax.Array:  # fmt: skip
    """x + relu(norm(x) @ up.T)^2 @ down.T [M,K] in the compute dtype: norm_linear, then relu2_linear.

    names: the checkpoint_names of what the two save.
    """
    return _mlp_fwd(c, names, up, up_tap, down, down_tap, x)[0]


def _mlp_fwd(c, names, up, up_tap, down, down_tap, x):
    ((hidden,), x), first = linear.norm_linear_fwd(c, names[0], up, up_tap, x)
    y, second = linear.relu2_linear_fwd(c, names[1], down, down_tap, hidden, x)
    return y, (first, second)


def _mlp_bwd(c, names, residuals, dy):
    first, second = residuals
    d_down, d_down_tap, dhidden, _ = linear.relu2_linear_bwd(c, names[1], second, dy)
    if c.forward == c.dx == c.dw == "int8":
        dq, dot = _codes_and_dot(c, first[0], dhidden, second[2])
        *d_up, dx = linear.norm_linear_epilogue(c, first, dq, dy, dot)
        return *d_up, d_down, d_down_tap, dx
    *d_up, dx = linear.norm_linear_bwd(c, names[0], 1, first, ((dhidden,), dy))
    return *d_up, d_down, d_down_tap, dx


def _codes_and_dot(c: Compute, up: Any, dhidden: jax.Array, squares: Quantized) -> tuple[Quantized, jax.Array]:
    """The codes of the rows of dhidden*scale of up, and the dot product of each row of dhidden and of the hidden layer, [M,1].

    The hidden layer is known where its gradient is not 0: it is the root of `squares`.
    """

    def row(d: jax.Array, codes: jax.Array, scale: jax.Array, columns: jax.Array) -> tuple[Any, ...]:
        d = d.astype(F32)
        hidden = jnp.sqrt(codes.astype(F32) * scale)
        return *quantized([d * columns]), jnp.sum(d * hidden, -1, keepdims=True)

    codes, scale, dot = by_rows(c, row, (dhidden, *squares), (linear.weight_codes(up).scale.T,))
    return linear.materialised_codes(Quantized(codes, scale)), dot


mlp.defvjp(_mlp_fwd, _mlp_bwd)
