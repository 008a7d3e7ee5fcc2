"""Next-token cross entropy, with logits for one chunk of tokens at a time: d32's logits of 2,048 tokens take 537 MB in f32."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from nanojax.config import Compute
from nanojax.ops.linear import F32, float_dtype, float_dw, matmul_t, norm_backward
from nanojax.ops.rows import inverse_rms
from nanojax.quant import decode, quantize_rows
from nanojax.quant.formats import Quantized, Stored
from nanojax.quant.rounding import add_rounded, dither_vectors


def loss_and_grads(
    c: Compute,
    cap: float,
    head: Stored,
    total_VD: jax.Array,
    x_MD: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array | float,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross entropy of the last block's output x, with gradients. Exact; no logits outlive their chunk.

    Args:
      cap: softcap of the logits.
      head: the output matrix [V,D], as stored.
      total_VD: the accumulator of the head's gradient, f32 or bf16.
      weights_M: f32 weight of each token in the loss whose gradient is wanted; a float = the same for all.
      key: for the stochastic rounding of a bf16 accumulator.

    Returns:
      The loss, f32: sum(weights*nll), or with one weight for all the plain sum(nll) in nats; total_VD plus the head's
      gradient of sum(weights*nll); its gradient dx_MD in x's dtype.
    """
    each = () if isinstance(weights_M, (int, float)) else (weights_M,)

    def chunk(carry, inputs):
        total, loss = carry
        x, targets, i, *weights = inputs
        r = inverse_rms(x)
        h = (x.astype(F32) * r).astype(x.dtype)
        z = logits(c, cap, head, h)
        losses, lse = nll(cap, z, targets)
        hot = lax.broadcasted_iota(jnp.int32, z.shape, 1) == targets[:, None]
        scale = weights[0][:, None] if weights else weights_M
        dz = ((jnp.exp(z - lse) - hot.astype(F32)) * (1 - jnp.square(z / cap)) * scale).astype(x.dtype)
        dz = lax.optimization_barrier(dz)
        dh = lax.dot_general(dz, decode(head, x.dtype), (((1,), (0,)), ((), ())), preferred_element_type=F32)
        dw = float_dw(c, dz, h)
        total = add_rounded(total, dw, dither_vectors(jax.random.fold_in(key, i), max(total.shape)))
        loss += jnp.sum(losses * weights[0] if weights else losses)
        return (total, loss), norm_backward(dh, h, r).astype(x.dtype)

    xs, ts, *ws = chunks(c, x_MD, targets_M, *each)
    (total_VD, loss), dx = lax.scan(chunk, (total_VD, jnp.float32(0)), (xs, ts, jnp.arange(len(xs)), *ws))
    return loss, total_VD, dx.reshape(x_MD.shape)


def logits(c: Compute, cap: float, head: Stored, h_CD: jax.Array) -> jax.Array:
    """cap*tanh(h @ head.T / cap), f32 [C,V], of the normed output h in the compute dtype."""
    if c.head == "int8":
        h, w = quantize_rows(h_CD), head if isinstance(head, Quantized) else quantize_rows(decode(head))
        z = matmul_t(h.codes, w.codes).astype(F32) * h.scale * w.scale.T
    else:
        # With bf16 compute the logits are bf16 before the cap, as nanochat's: half the bytes of the step's largest array.
        z = matmul_t(h_CD, decode(head, h_CD.dtype))
    return cap * jnp.tanh(lax.optimization_barrier(z.astype(float_dtype(c))).astype(F32) / cap)


def nll(cap: float, z_CV: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log p(target) in nats [C] and the log-sum-exp [C,1], f32, of capped logits."""
    hot = lax.broadcasted_iota(jnp.int32, z_CV.shape, 1) == targets_C[:, None]
    # With |z| <= 40 no exponential of z - cap leaves f32, which saves the pass for the maximum.
    top = cap if cap <= 40 else jnp.max(z_CV, -1, keepdims=True)
    lse = top + jnp.log(jnp.sum(jnp.exp(z_CV - top), -1, keepdims=True))
    return lse[:, 0] - jnp.sum(jnp.where(hot, z_CV, 0.0), -1), lse


def chunks(c: Compute, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [M,...] as [M/C,C,...], C the largest divisor of M that divides c.loss_chunk."""
    M = arrays[0].shape[0]
    C = math.gcd(M, min(M, c.loss_chunk))
    return tuple(a.reshape(M // C, C, *a.shape[1:]) for a in arrays)
