"""Next-token cross entropy, logits for one chunk of tokens at a time: d32's logits of 2048 tokens would be 537 MB in f32."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nanojax.config import Config
from nanojax.ops.linear import F32, float_dtype, inverse_rms, matmul_t, norm_backward
from nanojax.quant import decode, quantize_rows
from nanojax.quant.rounding import dither_vectors, dithered


def accumulate(total_RC: jax.Array, addend_RC: jax.Array, noise: Any, decay: Any = 1.0, weight: Any = 1.0) -> jax.Array:
    """decay*total + weight*addend (f32) in total's dtype; bf16 with `noise` (rounding.dither_vectors): to nearest, most of
    d32's 256th addend would be lost. All of it fits in the epilogue of the product that makes the addend."""
    old = total_RC.astype(F32) * decay
    if total_RC.dtype == jnp.bfloat16:
        old = dithered(old, noise)
    return (addend_RC * weight + old).astype(total_RC.dtype)


def capped(config: Config, head: Any, h_CD: jax.Array) -> jax.Array:
    """softcap*tanh(h @ head.T / softcap), f32 [C,V], from normed h in the compute dtype."""
    c = config.compute
    if c.head == "int8":
        h, w = quantize_rows(h_CD), head if hasattr(head, "codes") else quantize_rows(head)
        z = matmul_t(h.codes, w.codes).astype(F32) * h.scale * w.scale.T
    else:
        # in bf16 the logits are bf16 before the cap, as nanochat's; half the bytes of the step's largest array
        z = matmul_t(h_CD, decode(head, h_CD.dtype))
    cap = config.model.softcap
    return cap * jnp.tanh(lax.optimization_barrier(z.astype(float_dtype(c))).astype(F32) / cap)


def chunks(config: Config, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    M = arrays[0].shape[0]
    C = math.gcd(M, min(M, config.compute.loss_chunk))
    return tuple(a.reshape(M // C, C, *a.shape[1:]) for a in arrays)


def nll(cap: float, z_CV: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log p(target) [C] and the log-sum-exp [C,1], f32, of capped logits."""
    hot = lax.broadcasted_iota(jnp.int32, z_CV.shape, 1) == targets_C[:, None]
    # with |z| <= 40 no exponential of z - cap leaves f32: no pass for the maximum
    top = cap if cap <= 40 else jnp.max(z_CV, -1, keepdims=True)
    lse = top + jnp.log(jnp.sum(jnp.exp(z_CV - top), -1, keepdims=True))
    return lse[:, 0] - jnp.sum(jnp.where(hot, z_CV, 0.0), -1), lse


def loss_and_grads(
    config: Config, head: Any, total_VD: jax.Array, x_MD: jax.Array, targets_M: jax.Array, scale: float, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Summed -log p(targets) of the last block's output x, with gradients of `scale` times that sum.

    Returns (sum f32, total_VD with the head's gradient added to it, dx_MD in x's dtype). Exact; no logits survive a chunk.
    """
    cap = config.model.softcap

    def chunk(carry, inputs):
        total, loss = carry
        x, targets, i = inputs
        r = inverse_rms(x)
        h = (x.astype(F32) * r).astype(x.dtype)
        z = capped(config, head, h)
        losses, lse = nll(cap, z, targets)
        hot = lax.broadcasted_iota(jnp.int32, z.shape, 1) == targets[:, None]
        dz = ((jnp.exp(z - lse) - hot.astype(F32)) * (1 - jnp.square(z / cap)) * scale).astype(x.dtype)
        dz = lax.optimization_barrier(dz)
        dh = lax.dot_general(dz, decode(head, x.dtype), (((1,), (0,)), ((), ())), preferred_element_type=F32)
        dw = lax.dot_general(dz, h, (((0,), (0,)), ((), ())), preferred_element_type=F32)
        total = accumulate(total, dw, dither_vectors(jax.random.fold_in(key, i), max(total.shape)))
        return (total, loss + jnp.sum(losses)), norm_backward(dh, h, r).astype(x.dtype)

    xs, ts = chunks(config, x_MD, targets_M)
    (total_VD, loss), dx = lax.scan(chunk, (total_VD, jnp.float32(0)), (xs, ts, jnp.arange(len(xs))))
    return loss, total_VD, dx.reshape(x_MD.shape)
