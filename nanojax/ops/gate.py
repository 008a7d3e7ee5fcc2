"""A gated value embedding added to a layer's values, and the gradients of the values, the gate and the embedding's rows."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nanojax.config import Compute
from nanojax.ops.linear import float_dtype
from nanojax.ops.rows import F32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gated_add(c: Compute, name: str, v_BTNH: jax.Array, gate_BTN: jax.Array, rows_BTD: jax.Array) -> jax.Array:
    """v plus gate (f32) times each head of the rows, in the compute dtype; `name` is the result's checkpoint_name.

    Backward needs the gate and the rows. Whoever can select the rows again need not keep them (step/backward.py).
    """
    return _gated_add_fwd(c, name, v_BTNH, gate_BTN, rows_BTD)[0]


def _gated_add_fwd(c, name, v, gate, rows):
    out = v.astype(F32) + gate[..., None] * rows.reshape(v.shape).astype(F32)
    return checkpoint_name(out.astype(float_dtype(c)), name), (gate, rows)


def _gated_add_bwd(c, name, residuals, dv):
    gate, rows = residuals
    d = dv.astype(F32)
    dgate = jnp.sum(d * rows.reshape(dv.shape).astype(F32), -1)
    return dv, dgate, (gate[..., None] * d).astype(rows.dtype).reshape(rows.shape)


gated_add.defvjp(_gated_add_fwd, _gated_add_bwd)
