"""Next-token cross entropy, with logits for one chunk of tokens at a time: d32's logits of 2,048 tokens take 537 MB in f32."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nanojax.config import Compute
from nanojax.ops.columns import column_codes
from nanojax.ops.linear import F32, float_dtype, float_dw, matmul_t, norm_backward, row_major
from nanojax.ops.rows import inverse_rms
from nanojax.quant import decode, quantize_rows
from nanojax.quant.formats import Quantized, Stored
from nanojax.quant.rounding import add_rounded, dither_vectors


class Head(NamedTuple):
    """An output matrix as the int8 products of one step read it: its rows' codes [V,D] for logits, its columns' [D,V] for dx."""

    rows: Quantized
    columns: Quantized


def as_operands(c: Compute, head: Stored | Head) -> Stored | Head:
    """The head as `loss_and_grads` reads it. To be called once per step, because each call reads all of the head."""
    if c.head != "int8" or isinstance(head, Head):
        return head
    rows = head if isinstance(head, Quantized) else quantize_rows(decode(head))
    columns = quantize_rows(decode(head), axis=0)
    return lax.optimization_barrier(Head(rows, Quantized(columns.codes.T, columns.scale.T)))


def loss_and_grads(
    c: Compute,
    cap: float,
    head: Stored | Head,
    total_VD: jax.Array,
    x_MD: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array | float,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross entropy of the last block's output x, with gradients. No logits outlive their chunk.

    In float exact; in int8 right in the mean over `key`, but for the rounding of the products' other operands.

    Args:
      cap: softcap of the logits.
      head: the output matrix [V,D], as stored or as `as_operands` returns it.
      total_VD: the accumulator of the head's gradient, f32 or bf16.
      weights_M: f32 weight of each token in the loss whose gradient is wanted; a float = the same for all.
      key: for the stochastic rounding of a bf16 accumulator and of int8 codes.

    Returns:
      The loss, f32: sum(weights*nll), or with one weight for all the plain sum(nll) in nats; total_VD plus the head's
      gradient of sum(weights*nll); its gradient dx_MD in x's dtype.
    """
    each = () if isinstance(weights_M, (int, float)) else (weights_M,)
    head = as_operands(c, head)
    gradients: Any = _int8_gradients if isinstance(head, Head) else _float_gradients

    def chunk(carry, inputs):
        total, loss = carry
        x, targets, i, *weights = inputs
        r = inverse_rms(x)
        h = (x.astype(F32) * r).astype(x.dtype)
        z = logits(c, cap, head, h)
        losses, lse = nll(cap, z, targets)
        weight = weights[0][:, None] if weights else weights_M
        chunk_key = jax.random.fold_in(key, i)
        dh, dw = gradients(c, head, h, _dlogits(cap, z, lse, targets), weight, chunk_key)
        total = add_rounded(total, dw, dither_vectors(chunk_key, max(total.shape)))
        loss += jnp.sum(losses * weights[0] if weights else losses)
        return (total, loss), norm_backward(dh, h, r).astype(x.dtype)

    xs, ts, *ws = chunks(c, x_MD, targets_M, *each)
    (total_VD, loss), dx = lax.scan(chunk, (total_VD, jnp.float32(0)), (xs, ts, jnp.arange(len(xs)), *ws))
    return loss, total_VD, dx.reshape(x_MD.shape)


def _dlogits(cap: float, z_CV: jax.Array, lse_C1: jax.Array, targets_C: jax.Array) -> jax.Array:
    """The gradient of each token's nll with respect to its logits before the cap, f32 [C,V], of magnitude 1 at most."""
    hot = lax.broadcasted_iota(jnp.int32, z_CV.shape, 1) == targets_C[:, None]
    return (jnp.exp(z_CV - lse_C1) - hot.astype(F32)) * (1 - jnp.square(z_CV / cap))


def _float_gradients(
    c: Compute, head: Any, h_CD: jax.Array, dz_CV: jax.Array, weight: jax.Array | float, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of h [C,D] and of the head [V,D], f32, from that of the logits; weight: of each token, [C,1] or one."""
    del key
    dz = lax.optimization_barrier((dz_CV * weight).astype(h_CD.dtype))
    dh = lax.dot_general(dz, decode(head, h_CD.dtype), (((1,), (0,)), ((), ())), preferred_element_type=F32)
    return dh, float_dw(c, dz, h_CD)


def _int8_gradients(
    c: Compute, head: Head, h_CD: jax.Array, dz_CV: jax.Array, weight: jax.Array | float, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """_float_gradients with int8 products.

    A step of the codes is 1/127 everywhere, far above most probabilities: rounded to nearest they would all be lost (0.6 nats).
    Rounded stochastically, a probability p becomes one step 127*p of the time. The variance of that, p/127, is a 127th of what
    the draw of the target itself gives the gradient, about p(1-p).
    """
    u, v = dither_vectors(jax.random.fold_in(key, 1), max(dz_CV.shape))
    noise = u[: dz_CV.shape[0], None] + v[None, : dz_CV.shape[1]]
    codes = jnp.floor(dz_CV * 127 + (noise - jnp.floor(noise))).astype(jnp.int8)
    codes_CV, codes_VC = lax.optimization_barrier((row_major(codes), row_major(codes.T)))
    per_token = jnp.broadcast_to(jnp.asarray(weight, F32), (h_CD.shape[0], 1)) / 127
    dh = matmul_t(codes_CV, head.columns.codes).astype(F32) * per_token * head.columns.scale.T
    h = lax.optimization_barrier(column_codes(c, h_CD, per_token))
    dw = matmul_t(codes_VC, h.codes).astype(F32) * h.scale.T
    return dh, dw


def logits(c: Compute, cap: float, head: Stored | Head, h_CD: jax.Array) -> jax.Array:
    """cap*tanh(h @ head.T / cap), f32 [C,V], of the normed output h in the compute dtype.

    In int8 only of a head that has codes already: outside training it would be quantised anew for each token.
    """
    if isinstance(head, Head) or (c.head == "int8" and isinstance(head, Quantized)):
        h, w = quantize_rows(h_CD), head.rows if isinstance(head, Head) else head
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
