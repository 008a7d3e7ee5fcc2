"""The linear layers: y = f(x) @ W.T with float or int8 operands in each of the three matmuls, and what backward keeps.

int8 (Quantized W, or floats quantised on the fly, one scale an output row): both operands of every product are int8 codes,
sums are int32. Scales along a contraction are folded into the other operand before it is quantised:
  forward  y[t,o]  = sx[t] * sw[o] * sum_k xq[t,k] wq[o,k]
  dX       dx[t,k] = sd[t] * sum_o dq[t,o] wq[o,k]          dq, sd = rows of dy*sw
  dW       dw[o,k] = sum_t dy[t,o] sx[t] xq[t,k]            quantised over t: dy*sx (codes of x reused) or sx*sd*xq (codes of dy
                                                            reused), whichever is narrower
so x is quantised once and its codes are the residual. Each op saves, by `checkpoint_name`, exactly what its backward needs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nanojax.config import Compute
from nanojax.quant.formats import Quantized, decode, is_stored, quantize_rows
from nanojax.quant.packed import Packed, int8_rows

EPS = 2.0**-23  # inside the norms' square root: what torch's F.rms_norm, and so nanochat, uses in f32
F32 = jnp.float32


def matmul_t(a_MK: jax.Array, b_OK: jax.Array) -> jax.Array:
    """a @ b.T, both contiguous along K (the only layout int8 tensor cores like): int8 gives int32, floats give f32."""
    out = jnp.int32 if a_MK.dtype == jnp.int8 else F32
    return lax.dot_general(a_MK, b_OK, (((1,), (1,)), ((), ())), preferred_element_type=out)


def float_dtype(c: Compute) -> Any:
    return F32 if c.dtype == "f32" else jnp.bfloat16


def _codes(w: Any) -> Quantized:
    if isinstance(w, Packed):
        return Quantized(*int8_rows(w))
    return w if isinstance(w, Quantized) else quantize_rows(w)


def _forward(c: Compute, w: Any, saved: Any) -> jax.Array:
    """The product with saved inputs, which are Quantized when c.forward is int8: [M,O] in the compute dtype."""
    if c.forward == "int8":
        q = _codes(w)
        return (matmul_t(saved.codes, q.codes).astype(F32) * saved.scale * q.scale.T).astype(float_dtype(c))
    return matmul_t(saved, decode(w, float_dtype(c))).astype(float_dtype(c))


def _dx(c: Compute, w: Any, dy: jax.Array) -> jax.Array:
    """dy [M,O] to the gradient of the product's input [M,K], f32."""
    if c.dx == "int8":
        q = _codes(w)
        d = quantize_rows(dy.astype(F32) * q.scale.T)
        return matmul_t(d.codes, q.codes.T).astype(F32) * d.scale
    return lax.dot_general(dy, decode(w, dy.dtype), (((1,), (0,)), ((), ())), preferred_element_type=F32)


def _dw(c: Compute, dy: jax.Array, saved: Any) -> jax.Array:
    """dy [M,O] and saved input [M,K] to the weights' gradient [O,K], f32."""
    if c.dw == "int8":
        x = saved if isinstance(saved, Quantized) else quantize_rows(saved)
        d = quantize_rows(dy.astype(F32) * x.scale, axis=0)
        return matmul_t(d.codes.T, x.codes.T).astype(F32) * d.scale.T
    x = decode(saved, dy.dtype)
    return lax.dot_general(dy, x, (((0,), (0,)), ((), ())), preferred_element_type=F32)


def _keep(c: Compute, x: jax.Array, name: str) -> Any:
    """x as the product's operand and residual: codes if forward is int8, else the compute dtype."""
    saved = quantize_rows(x) if c.forward == "int8" else x.astype(float_dtype(c))
    return jax.tree.map(lambda a: checkpoint_name(a, name), saved)


def _mark(tap: jax.Array | None) -> Any:
    """Whether there is a tap, as tree structure (a bool would become an array)."""
    return None if tap is None else ()


def _gradient(w: Any, tapped: Any, dw: jax.Array) -> tuple[Any, Any]:
    """Cotangents of (w, tap): the tap takes the gradient when there is one, else a float w does."""
    if tapped is not None:
        return None, dw
    return (None if is_stored(w) else dw.astype(w.dtype)), None


# Every op: (c, name, w, tap, x). w [O,K] as stored; tap, if given, is an f32 [O,K] whose value is never read: its cotangent
# is dW in f32 whatever w is stored in. x [M,K] in the compute dtype. Returns [M,O] in the compute dtype.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linear(c: Compute, name: str, w: Any, tap: jax.Array | None, x: jax.Array) -> jax.Array:
    """x @ W.T."""
    return _linear_fwd(c, name, w, tap, x)[0]


def _linear_fwd(c, name, w, tap, x):
    saved = _keep(c, x, name)
    return _forward(c, w, saved), (w, _mark(tap), saved)


def _linear_bwd(c, name, residuals, dy):
    w, tapped, saved = residuals
    dw = _dw(c, dy, saved)
    return (*_gradient(w, tapped, dw), _dx(c, w, dy).astype(float_dtype(c)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def norm_linear(c: Compute, name: str, w: Any, tap: jax.Array | None, x: jax.Array) -> jax.Array:
    """rms_norm(x) @ W.T; backward needs the normed x (or its codes) and 1/rms a row, not x."""
    return _norm_linear_fwd(c, name, w, tap, x)[0]


def inverse_rms(x: jax.Array) -> jax.Array:
    """1/sqrt(mean(x^2) + eps) over the last axis, kept; f32."""
    x = x.astype(F32)
    return lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS)


def norm_backward(dy: jax.Array, y: jax.Array, r: jax.Array) -> jax.Array:
    """Gradient through y = x*r, r = inverse_rms(x): r*(dy - y*mean(dy*y)), f32 (exact, eps included)."""
    dy, y = dy.astype(F32), y.astype(F32)
    return r * (dy - y * jnp.mean(dy * y, -1, keepdims=True))


def _norm_linear_fwd(c, name, w, tap, x):
    r = checkpoint_name(inverse_rms(x), name)
    saved = _keep(c, x.astype(F32) * r, name)
    return _forward(c, w, saved), (w, _mark(tap), saved, r)


def _norm_linear_bwd(c, name, residuals, dy):
    w, tapped, saved, r = residuals
    dw = _dw(c, dy, saved)
    dx = norm_backward(_dx(c, w, dy), decode(saved), r)
    return (*_gradient(w, tapped, dw), dx.astype(float_dtype(c)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def relu2_linear(c: Compute, name: str, w: Any, tap: jax.Array | None, x: jax.Array) -> jax.Array:
    """relu(x)^2 @ W.T; backward needs relu(x) (float) or the codes of its square (int8), not x."""
    return _relu2_linear_fwd(c, name, w, tap, x)[0]


def _relu2_linear_fwd(c, name, w, tap, x):
    if c.forward == "int8":
        a = _keep(c, jnp.square(jax.nn.relu(x.astype(F32))), name)
        return _forward(c, w, a), (w, _mark(tap), a)
    p = checkpoint_name(jax.nn.relu(x), name)
    return _forward(c, w, p * p), (w, _mark(tap), p)


def _relu2_linear_bwd(c, name, residuals, dy):
    w, tapped, saved = residuals
    if isinstance(saved, Quantized):
        a, p = saved, jnp.sqrt(decode(saved))
    else:
        a, p = saved * saved, saved.astype(F32)
    dw = _dw(c, dy, a)
    dx = _dx(c, w, dy) * (2 * p)
    return (*_gradient(w, tapped, dw), dx.astype(float_dtype(c)))


linear.defvjp(_linear_fwd, _linear_bwd)
norm_linear.defvjp(_norm_linear_fwd, _norm_linear_bwd)
relu2_linear.defvjp(_relu2_linear_fwd, _relu2_linear_bwd)
