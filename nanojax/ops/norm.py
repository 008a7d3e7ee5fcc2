"""RMSNorm without a gain, and its gradient."""

import jax

from nanojax.ops.linear import norm_backward
from nanojax.ops.rows import F32, inverse_rms


@jax.custom_vjp
def rms_norm(x: jax.Array) -> jax.Array:
    """x / rms(x) over the last axis, computed in f32, in x's dtype; eps 2^-23 as torch's F.rms_norm in f32."""
    return (x.astype(F32) * inverse_rms(x)).astype(x.dtype)


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return rms_norm(x), x


def _backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    r = inverse_rms(x)
    return (norm_backward(dy, x.astype(F32) * r, r).astype(x.dtype),)


rms_norm.defvjp(_forward, _backward)
