"""The residual stream mixed with the first one, and its gradients: rows of the kernels that norm the mix (linear.py)."""

from typing import Any

import jax
import jax.numpy as jnp

from nanojax.ops.rows import F32


def forward(x: jax.Array, first: jax.Array, keep: jax.Array, again: jax.Array) -> jax.Array:
    """keep*x + again*first [M,K] in x's dtype; the factors are f32 [1,1]."""
    return (keep * x.astype(F32) + again * first.astype(F32)).astype(x.dtype)


def backward(
    dy: jax.Array, more: jax.Array, x: jax.Array, first: jax.Array, keep: jax.Array, again: jax.Array
) -> tuple[Any, ...]:
    """The gradients of x and, with `more` of it from elsewhere, of first, in their dtype; of both factors of each row, [M,2].

    Args:
      dy: the gradient of forward's result, f32.
    """
    dot = lambda a: jnp.sum(dy * a.astype(F32), -1, keepdims=True)
    dfirst = more.astype(F32) + again * dy
    return (keep * dy).astype(x.dtype), dfirst.astype(first.dtype), (dot(x), dot(first))
