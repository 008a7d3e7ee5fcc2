"""The linear layers: y = f(x) @ W.T with float or int8 operands in each of the three matmuls, and what backward keeps.

int8 (Quantized W, or floats quantised on the fly, one scale an output row): both operands of every product are int8 codes,
sums are int32. Scales along a contraction are folded into the other operand before it is quantised:
  forward  y[t,o]  = sx[t] * sw[o] * sum_k xq[t,k] wq[o,k]
  dX       dx[t,k] = sd[t] * sum_o dq[t,o] wq[o,k]            dq, sd = rows of dy*sw
  dW       dw[o,k] = sum_t dy[t,o] sx[t] xq[t,k]              quantised over t: the narrower of dy*sx (codes of x reused, O < K)
                   = sum_t dq[t,o] sd[t] sx[t] xq[t,k] / sw[o]               and sd*sx*xq (codes of dy reused, O >= K)
so x is quantised once and its codes are the residual, and the wide dy of the up and qkv matrices is quantised once.
Each op saves, by `checkpoint_name`, exactly what its backward needs.

Around every int8 product stand barriers: operands exist as codes, contiguous along the contraction (tensor cores want both
so, and a kernel that quantised its operand would do it again for each tile of outputs), while scales, residual add and
rounding become the product's epilogue, which costs nothing. What makes codes of rows, or norms them, is one pass (rows.py).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from nanojax.config import Compute
from nanojax.ops import rope
from nanojax.ops.rows import F32, by_rows, inverse_rms, quantized
from nanojax.quant.formats import Quantized, decode, is_stored, quantize_rows
from nanojax.quant.packed import Packed, int8_rows


def _kept(x: Any) -> Any:
    """x, made to exist: not recomputed inside its consumers."""
    return lax.optimization_barrier(x)


def _by_rows(x_MK: jax.Array) -> jax.Array:
    return with_layout_constraint(x_MK, Layout((0, 1)))


def matmul_t(a_MK: jax.Array, b_OK: jax.Array) -> jax.Array:
    """a @ b.T: int8 gives int32, floats give f32. int8 operands are laid out along K, the only way its tensor cores like:
    left alone, XLA would hand them over against the grain wherever a transpose is cheaper to ignore than to write."""
    out = jnp.int32 if a_MK.dtype == jnp.int8 else F32
    if a_MK.dtype == jnp.int8:
        a_MK, b_OK = _by_rows(a_MK), _by_rows(b_OK)
    return lax.dot_general(a_MK, b_OK, (((1,), (1,)), ((), ())), preferred_element_type=out)


def _transposed(x: jax.Array) -> jax.Array:
    """x.T, written out from x as it lies: XLA would else hand a transposed layout back to the stack that x is a slice of,
    and copy the stack (d32: 1.6 GB)."""
    return _kept(_by_rows(_kept(_by_rows(x)).T))


def float_dtype(c: Compute) -> Any:
    return F32 if c.dtype == "f32" else jnp.bfloat16


def _codes_kept(q: Quantized) -> Quantized:
    return _kept(Quantized(_by_rows(q.codes), q.scale))


def _codes(w: Any) -> Quantized:
    if isinstance(w, Packed):
        codes, scale = int8_rows(w)
        return Quantized(_kept(_by_rows(codes)), scale)
    return w if isinstance(w, Quantized) else quantize_rows(w)


def _forward(c: Compute, w: Any, saved: Any, residual: jax.Array | None, parts: int = 1) -> tuple[jax.Array, ...]:
    """The product with saved inputs (Quantized when c.forward is int8), plus residual: [M,O] in the compute dtype, as so
    many arrays [M,O/parts], each a product of its own: a part that is used alone is not copied out."""
    w = _codes(w) if c.forward == "int8" else decode(w, float_dtype(c))
    out = []
    for i in range(parts):
        if out:
            # after the part before: XLA would else merge the products and split what they give in a pass of its own
            saved, out[-1] = _kept((saved, out[-1]))
        rows = slice(i * w.shape[0] // parts, (i + 1) * w.shape[0] // parts)
        if c.forward == "int8":
            y = matmul_t(saved.codes, w.codes[rows]).astype(F32) * saved.scale * w.scale[rows].T
        else:
            y = matmul_t(saved, w[rows])
        if residual is not None:
            y += residual.astype(F32)
        out.append(_kept(y.astype(float_dtype(c))))
    return tuple(out)


def _rows(c: Compute, w: Any, dys: tuple[jax.Array, ...]) -> Quantized | None:
    """dy*sw [M,O], dy given in parts side by side, as codes with one scale a row: what dX multiplies, and dW where it is
    the wider side."""
    if c.dx != "int8":
        return None
    parts = len(dys)

    def row(*values: jax.Array) -> tuple[Any, jax.Array]:
        return quantized([dy.astype(F32) * sw for dy, sw in zip(values[:parts], values[parts:])])

    return _codes_kept(Quantized(*by_rows(c, row, dys, jnp.split(_codes(w).scale.T, parts, 1))))


def _dx(c: Compute, w: Any, dy: jax.Array, rows: Quantized | None) -> jax.Array:
    """dy [M,O] to the gradient of the product's input [M,K], f32."""
    if rows is not None:
        # unlike other operands transposed straight from the stack: a copy of the slice first would be 100 MB a layer more
        return matmul_t(rows.codes, _kept(_by_rows(_codes(w).codes.T))).astype(F32) * rows.scale
    return lax.dot_general(dy, decode(w, dy.dtype), (((1,), (0,)), ((), ())), preferred_element_type=F32)


def _dw(c: Compute, w: Any, dy: Any, saved: Any, rows: Quantized | None) -> jax.Array:
    """dy [M,O] and saved input [M,K] to the weights' gradient [O,K], f32. dy may be None where c.dw is int8 and O >= K."""
    if c.dw != "int8":
        return lax.dot_general(dy, decode(saved, dy.dtype), (((0,), (0,)), ((), ())), preferred_element_type=F32)
    x = saved if isinstance(saved, Quantized) else quantize_rows(saved)
    if rows is not None and rows.shape[1] >= x.shape[1]:
        q = quantize_rows(x.codes.astype(F32) * (x.scale * rows.scale), axis=0)
        return matmul_t(_transposed(rows.codes), _transposed(q.codes)).astype(F32) * (1 / _codes(w).scale) * q.scale
    d = quantize_rows(dy.astype(F32) * x.scale, axis=0)
    return matmul_t(_transposed(d.codes), _transposed(x.codes)).astype(F32) * d.scale.T


def _keep(c: Compute, x: jax.Array, name: str, function: Callable[[jax.Array], jax.Array] = lambda x: x) -> Any:
    """function(x) as the product's operand and residual: codes if forward is int8, else the compute dtype."""
    if c.forward == "int8":
        saved = _codes_kept(Quantized(*by_rows(c, lambda x: quantized([function(x.astype(F32))]), (x,))))
    else:
        saved = function(x).astype(float_dtype(c))
    return jax.tree.map(lambda a: checkpoint_name(a, name), saved)


def _mark(tap: jax.Array | None) -> Any:
    """Whether there is a tap, as tree structure (a bool would become an array)."""
    return None if tap is None else ()


def _gradient(w: Any, tapped: Any, dw: jax.Array) -> tuple[Any, Any]:
    """Cotangents of (w, tap): the tap takes the gradient when there is one, else a float w does."""
    if tapped is not None:
        return None, dw
    return (None if is_stored(w) else dw.astype(w.dtype)), None


# Every op: (c, name, w, tap, x, residual=None). w [O,K] as stored; tap, if given, is an f32 [O,K] whose value is never read:
# its cotangent is dW in f32 whatever w is stored in. x [M,K] in the compute dtype; residual [M,O], if given, is added in f32.
# Returns [M,O] in the compute dtype.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linear(
    c: Compute, name: str, w: Any, tap: jax.Array | None, x: jax.Array, residual: jax.Array | None = None
) -> jax.Array:
    """x @ W.T + residual."""
    return _linear_fwd(c, name, w, tap, x, residual)[0]


def _linear_fwd(c, name, w, tap, x, residual=None):
    saved = _keep(c, x, name)
    return _forward(c, w, saved, residual)[0], (w, _mark(tap), saved, _mark(residual))


def _linear_bwd(c, name, residuals, dy):
    w, tapped, saved, added = residuals
    rows = _rows(c, w, (dy,))
    dx = _kept(_dx(c, w, dy, rows).astype(float_dtype(c)))
    return (*_gradient(w, tapped, _dw(c, w, dy, saved, rows)), dx, None if added is None else dy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 5))
def norm_linear(c: Compute, name: str, w: Any, tap: jax.Array | None, x: jax.Array, parts: int = 1) -> Any:
    """(rms_norm(x) @ W.T as a tuple of `parts` arrays [M,O/parts], x); backward needs the normed x (or its codes) and 1/rms
    a row, not x.

    x is handed on so that the residual stream's gradient is added in the pass that makes this one's.
    """
    return _norm_linear_fwd(c, name, w, tap, x, parts)[0]


def norm_backward(dy: jax.Array, y: jax.Array, r: jax.Array, K: int = 0) -> jax.Array:
    """Gradient through y = x*r, r = inverse_rms(x, K): r*(dy - y*mean(dy*y)), f32 (exact, eps included)."""
    dy, y = dy.astype(F32), y.astype(F32)
    return r * (dy - y * (jnp.sum(dy * y, -1, keepdims=True) * (1 / (K or dy.shape[-1]))))


def _norm_linear_fwd(c, name, w, tap, x, parts=1):
    if c.forward == "int8":  # codes do not see the norm, only their scale does

        def row(x: jax.Array) -> tuple[Any, ...]:
            codes, scale = quantized([x.astype(F32)])
            r = inverse_rms(x, K)
            return codes, scale * r, r

        K = x.shape[-1]
        codes, scale, r = by_rows(c, row, (x,))
        saved = _codes_kept(Quantized(codes, scale))
    else:
        r = inverse_rms(x)
        saved = (x.astype(F32) * r).astype(float_dtype(c))
    saved, r = jax.tree.map(lambda a: checkpoint_name(a, name), (saved, r))
    return (_forward(c, w, saved, None, parts), x), (w, _mark(tap), saved, r)


def _norm_linear_bwd(c, name, parts, residuals, cotangents):
    w, dys = residuals[0], cotangents[0]
    dy = dys[0] if parts == 1 else _kept(jnp.concatenate(dys, -1))  # not made where only its codes are used
    return _norm_linear_gradients(c, residuals, dy, _rows(c, w, dys), cotangents[1])


def _norm_linear_gradients(c, residuals, dy, rows, dx):
    w, tapped, saved, r = residuals
    dh = _kept(_dx(c, w, dy, rows).astype(float_dtype(c)))
    K, kept = dx.shape[-1], jax.tree.leaves(saved)

    def row(dx: jax.Array, dh: jax.Array, r: jax.Array, y: jax.Array, *scale: jax.Array) -> tuple[jax.Array]:
        y = y.astype(F32) * scale[0] if scale else y
        return ((dx.astype(F32) + norm_backward(dh, y, r, K)).astype(float_dtype(c)),)

    dx = _kept(by_rows(c, row, (dx, dh, r, *kept))[0])
    return (*_gradient(w, tapped, _dw(c, w, dy, saved, rows)), dx)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def qkv_linear(
    c: Compute, names: tuple[str, str], rotation: rope.Rotation, w: Any, tap: jax.Array | None, x: jax.Array,
    start: jax.Array,
) -> Any:  # fmt: skip
    """(q, k, v [B,T,N,H], x): norm_linear in three parts, then RoPE at positions start.. and QK-norm of q and k (rope.py).

    names: of what norm_linear keeps, and of q, k, v and the heads' 1/rms. Backward needs q and k as returned.
    """
    return _qkv_linear_fwd(c, names, rotation, w, tap, x, start)[0]


def _qkv_linear_fwd(c, names, rotation, w, tap, x, start):
    ((q, k, v), x), residuals = _norm_linear_fwd(c, names[0], w, tap, x, 3)
    heads, r = rope.forward(c, rotation, q, k, start)
    # q and k are kept as they are returned, so that attention and this op keep one array, not two views of it
    heads = tuple(a.reshape(-1, rotation.T, rotation.N, rotation.H) for a in (*heads, v))
    (q, k, v), r = jax.tree.map(lambda a: checkpoint_name(a, names[1]), (heads, r))
    return (q, k, v, x), (residuals, q, k, r, start)


def _qkv_linear_bwd(c, names, rotation, residuals, cotangents):
    (residuals, q, k, r, start), (*dys, dx) = residuals, cotangents
    w, flat = residuals[0], lambda a: a.reshape(dx.shape)
    kept, dys = ((flat(q), flat(k)), r), tuple(map(flat, dys))
    if c.dx == c.dw == "int8":  # qkv is wider than its input, so both products take the same codes
        rows = _codes_kept(Quantized(*rope.backward(c, rotation, kept, start, dys, _codes(w).scale.T)))
        return *_norm_linear_gradients(c, residuals, None, rows, dx), None
    (dy,) = rope.backward(c, rotation, kept, start, dys, None)
    return *_norm_linear_gradients(c, residuals, dy, _rows(c, w, (dy,)), dx), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def relu2_linear(
    c: Compute, name: str, w: Any, tap: jax.Array | None, x: jax.Array, residual: jax.Array | None = None
) -> jax.Array:
    """relu(x)^2 @ W.T + residual; backward needs relu(x) (float) or the codes of its square (int8), not x."""
    return _relu2_linear_fwd(c, name, w, tap, x, residual)[0]


def _relu2_linear_fwd(c, name, w, tap, x, residual=None):
    if c.forward == "int8":
        a = _keep(c, x, name, lambda x: jnp.square(jnp.maximum(x, 0.0)))
        return _forward(c, w, a, residual)[0], (w, _mark(tap), a, _mark(residual))
    p = checkpoint_name(jax.nn.relu(x), name)
    return _forward(c, w, p * p, residual)[0], (w, _mark(tap), p, _mark(residual))


def _relu2_linear_bwd(c, name, residuals, dy):
    w, tapped, saved, added = residuals
    if isinstance(saved, Quantized):
        a, p = saved, jnp.sqrt(decode(saved))
    else:
        a, p = saved * saved, saved.astype(F32)
    rows = _rows(c, w, (dy,))
    dx = _kept((_dx(c, w, dy, rows) * (2 * p)).astype(float_dtype(c)))
    return (*_gradient(w, tapped, _dw(c, w, dy, a, rows)), dx, None if added is None else dy)


linear.defvjp(_linear_fwd, _linear_bwd)
norm_linear.defvjp(_norm_linear_fwd, _norm_linear_bwd)
qkv_linear.defvjp(_qkv_linear_fwd, _qkv_linear_bwd)
relu2_linear.defvjp(_relu2_linear_fwd, _relu2_linear_bwd)
