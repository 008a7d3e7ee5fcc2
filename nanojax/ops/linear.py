"""Linear layers y = f(x) @ W.T whose three matmuls take float or int8 operands, with hand-written backward passes.

In int8, both operands of a matmul are int8 codes and its sums are int32. W is stored as codes, or quantised on the fly,
with one scale per output row. A scale that varies along the contraction cannot be factored out of the sum, so it is
multiplied into the other operand before that one is quantised:
  forward  y[t,o]  = sx[t] * sw[o] * sum_k xq[t,k] wq[o,k]
  dX       dx[t,k] = sd[t] * sum_o dq[t,o] wq[o,k]             dq, sd: codes and scales of the rows of dy*sw
  dW       dw[o,k] = sum_t (dy[t,o] sx[t]) xq[t,k]             O < K: dy*sx is quantised over t; the codes of x are reused
                   = sum_t dq[t,o] (sd[t] sx[t] xq[t,k]) / sw[o]   O >= K: sd*sx*xq is; the codes of dy are reused
So x is quantised once, and its codes are what the backward pass keeps; the wide dy of the up and qkv matrices is quantised
once. Each op saves, by `checkpoint_name`, exactly what its backward pass needs.

An optimization barrier stands on either side of every int8 matmul. Its operands are materialised as codes, contiguous along
the contraction: the tensor cores need that layout, and a kernel that quantised its own operand would repeat the work for
each tile of outputs. Scales, residual addition and rounding become the matmul's epilogue, which costs nothing. Quantising
or normalising rows takes one pass over them (rows.py), quantising columns for dW two, the second from the cache (columns.py).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from nanojax.config import Compute
from nanojax.ops import mix, rope
from nanojax.ops.columns import column_codes
from nanojax.ops.rows import F32, by_rows, implementation, inverse_rms, quantized
from nanojax.quant.formats import Quantized, decode, is_stored, quantize_rows
from nanojax.quant.packed import Packed, int8_rows

FEW = 64  # rows


def _materialised(x: Any) -> Any:
    """x behind a barrier: XLA writes it to memory once instead of recomputing it inside each consumer."""
    return lax.optimization_barrier(x)


def row_major(x_MK: jax.Array) -> jax.Array:
    """x, contiguous along K."""
    return with_layout_constraint(x_MK, Layout((0, 1)))


def matmul_t(a_MK: jax.Array, b_OK: jax.Array) -> jax.Array:
    """a @ b.T [M,O]: int32 of int8 operands, f32 of floats.

    int8 operands are forced to be contiguous along K, the only layout that the int8 tensor cores read at full speed. Without
    the constraint XLA skips the transpose and gives them the other layout.
    """
    out = jnp.int32 if a_MK.dtype == jnp.int8 else F32
    if a_MK.dtype == jnp.int8:
        a_MK, b_OK = row_major(a_MK), row_major(b_OK)
    return lax.dot_general(a_MK, b_OK, (((1,), (1,)), ((), ())), preferred_element_type=out)


def _transposed(x: jax.Array) -> jax.Array:
    """x.T as a copy, made where it is used.

    Without both barriers XLA gives x itself the transposed layout. Where x is a parameter, that is a copy of every layer's
    before the first microbatch, held to the end (d32: 1.5 GiB).
    """
    return _materialised(row_major(_materialised(row_major(x)).T))


class Held(NamedTuple):
    """A weight stored in int8 and its transposed codes, which dX multiplies, held for a step instead of made per microbatch."""

    stored: Quantized
    transposed: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape


def held(w: Quantized) -> Held:
    """w with its transposed codes. To be called once per step."""
    return Held(w, _transposed(w.codes))


def float_dtype(c: Compute) -> Any:
    """The dtype of activations, and of matmul operands that are not int8."""
    return F32 if c.dtype == "f32" else jnp.bfloat16


def materialised_codes(q: Quantized) -> Quantized:
    return _materialised(Quantized(row_major(q.codes), q.scale))


def weight_codes(w: Any) -> Quantized:
    if isinstance(w, Held):
        return w.stored
    if isinstance(w, Packed):
        codes, scale = int8_rows(w)
        return Quantized(_materialised(row_major(codes)), scale)
    return w if isinstance(w, Quantized) else quantize_rows(w)


def _forward(c: Compute, w: Any, saved: Any, residual: jax.Array | None, parts: int = 1) -> tuple[jax.Array, ...]:
    """The forward matmul with a saved operand (Quantized if c.forward is int8), plus the residual, in the compute dtype.

    Returns `parts` arrays [M,O/parts]. Each comes from a matmul of its own, so that no consumer has to copy its part out. Of
    a few rows they come from one matmul: reading its weights takes longer than copying its results.
    """
    w = weight_codes(w) if c.forward == "int8" else decode(w, float_dtype(c))

    def product(rows: slice) -> jax.Array:
        return matmul_t(saved.codes, w.codes[rows]) if c.forward == "int8" else matmul_t(saved, w[rows])

    def finished(y: jax.Array, rows: slice) -> jax.Array:
        y = y.astype(F32) * saved.scale * w.scale[rows].T if c.forward == "int8" else y
        return (y if residual is None else y + residual.astype(F32)).astype(float_dtype(c))

    parted = [slice(i * w.shape[0] // parts, (i + 1) * w.shape[0] // parts) for i in range(parts)]
    if parts > 1 and saved.shape[0] <= FEW:
        sums = jnp.split(_materialised(product(slice(None))), parts, 1)
        return tuple(_materialised([finished(y, rows) for y, rows in zip(sums, parted)]))
    out = []
    for rows in parted:
        if out:
            # Orders the matmuls. Otherwise XLA merges them and splits the result in another pass.
            saved, out[-1] = _materialised((saved, out[-1]))
        out.append(_materialised(finished(product(rows), rows)))
    return tuple(out)


def _row_codes(c: Compute, w: Any, dys: tuple[jax.Array, ...]) -> Quantized | None:
    """dq, sd: the codes of dy*sw [M,O] and one scale per row, for dX, and for dW if O >= K. None if c.dx is not int8.

    dys: the parts of dy, side by side.
    """
    if c.dx != "int8":
        return None
    parts = len(dys)

    def row(*values: jax.Array) -> tuple[Any, jax.Array]:
        return quantized([dy.astype(F32) * sw for dy, sw in zip(values[:parts], values[parts:])])

    return materialised_codes(Quantized(*by_rows(c, row, dys, jnp.split(weight_codes(w).scale.T, parts, 1))))


def _dx(c: Compute, w: Any, dy: jax.Array, dq: Quantized | None) -> jax.Array:
    """The gradient of the matmul's input, f32 [M,K], from dy [M,O]."""
    if dq is not None:
        transposed = w.transposed if isinstance(w, Held) else _transposed(weight_codes(w).codes)
        return matmul_t(dq.codes, transposed).astype(F32) * dq.scale
    return lax.dot_general(dy, decode(w, dy.dtype), (((1,), (0,)), ((), ())), preferred_element_type=F32)


def _dw(c: Compute, w: Any, dy: Any, saved: Any, dq: Quantized | None) -> jax.Array:
    """The gradient of the weights, f32 [O,K], from dy [M,O] and the saved input [M,K].

    dy may be None if c.dw is int8 and O >= K.
    """
    if c.dw != "int8":
        return float_dw(c, dy, decode(saved, dy.dtype))
    x = saved if isinstance(saved, Quantized) else quantize_rows(saved)
    if dq is not None and dq.shape[1] >= x.shape[1]:
        q = materialised_codes(column_codes(c, x.codes, x.scale, dq.scale))
        return matmul_t(_transposed(dq.codes), q.codes).astype(F32) * (1 / weight_codes(w).scale) * q.scale.T
    d = materialised_codes(column_codes(c, dy, x.scale))
    return matmul_t(d.codes, _transposed(x.codes)).astype(F32) * d.scale


def float_dw(c: Compute, dy: jax.Array, x: jax.Array) -> jax.Array:
    """dy.T @ x, f32 [O,K] of [M,O] and [M,K] in one float dtype."""
    product = functools.partial(lax.dot_general, preferred_element_type=F32)
    if implementation(c.rows) == "pallas":
        return product(dy, x, (((0,), (0,)), ((), ())))
    # A CPU's products want the first operand's rows together, so that the narrower one is transposed (4% of a d4's step).
    narrow, wide = (x, dy) if x.shape[1] < dy.shape[1] else (dy, x)
    dw = lax.optimization_barrier(product(lax.optimization_barrier(narrow.T), wide, (((1,), (0,)), ((), ()))))
    return dw if narrow is dy else dw.T


def _save_operand(c: Compute, x: jax.Array, name: str, function: Callable[[jax.Array], jax.Array] = lambda x: x) -> Any:
    """function(x) as the matmul's operand, saved for backward: codes if c.forward is int8, otherwise the compute dtype."""
    if c.forward == "int8":
        saved = materialised_codes(Quantized(*by_rows(c, lambda x: quantized([function(x.astype(F32))]), (x,))))
    else:
        saved = function(x).astype(float_dtype(c))
    return jax.tree.map(lambda a: checkpoint_name(a, name), saved)


def _mark(tap: jax.Array | None) -> Any:
    """Whether there is a tap, as tree structure; a bool among a custom_vjp's residuals would become an array."""
    return None if tap is None else ()


def _gradient(w: Any, tapped: Any, dw: jax.Array) -> tuple[Any, Any]:
    """The cotangents of (w, tap): dw goes to the tap if there is one, otherwise to a float w. A stored w has none."""
    if tapped is not None:
        return None, dw
    return (None if is_stored(w) or isinstance(w, Held) else dw.astype(w.dtype)), None


# The arguments of every op:
#   name      the checkpoint_name of what it saves for backward
#   w         [O,K], as stored
#   tap       None, or f32 [O,K]. Its value is never read; its cotangent is dW in f32, whatever format w is stored in.
#   x         [M,K] in the compute dtype
#   residual  None, or [M,O], added in f32
# It returns [M,O] in the compute dtype.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linear(
    c: Compute, name: str, w: Any, tap: jax.Array | None, x: jax.Array, residual: jax.Array | None = None
) -> jax.Array:
    """x @ W.T + residual."""
    return _linear_fwd(c, name, w, tap, x, residual)[0]


def _linear_fwd(c, name, w, tap, x, residual=None):
    saved = _save_operand(c, x, name)
    return _forward(c, w, saved, residual)[0], (w, _mark(tap), saved, _mark(residual))


def _linear_bwd(c, name, residuals, dy):
    w, tapped, saved, added = residuals
    dq = _row_codes(c, w, (dy,))
    dx = _materialised(_dx(c, w, dy, dq).astype(float_dtype(c)))
    return (*_gradient(w, tapped, _dw(c, w, dy, saved, dq)), dx, None if added is None else dy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 5))
def norm_linear(c: Compute, name: str, w: Any, tap: jax.Array | None, x: jax.Array, parts: int = 1) -> Any:
    """(rms_norm(x) @ W.T as `parts` arrays [M,O/parts], x).

    Backward needs the normed x (or its codes) and 1/rms per row, not x. Returning x lets backward add the gradient of the
    residual stream in the pass that computes this op's own.
    """
    return norm_linear_fwd(c, name, w, tap, x, parts)[0]


def norm_backward(dy: jax.Array, y: jax.Array, r: jax.Array, K: int = 0) -> jax.Array:
    """The f32 gradient through y = x*r with r = inverse_rms(x, K): r*(dy - y*mean(dy*y)); exact, including eps."""
    dy, y = dy.astype(F32), y.astype(F32)
    return r * (dy - y * (jnp.sum(dy * y, -1, keepdims=True) * (1 / (K or dy.shape[-1]))))


def norm_linear_fwd(c, name, w, tap, x, parts=1, first=None, factors=()):
    """first, factors: None, or what x is mixed with (mix.py) before the norm. The x that is returned is the mixed one."""
    if c.forward == "int8":  # the norm changes the scale, not the codes

        def row(x: jax.Array, *mixing: jax.Array) -> tuple[Any, ...]:
            x = mix.forward(x, *mixing) if mixing else x
            codes, scale = quantized([x.astype(F32)])
            r = inverse_rms(x, K)
            return (codes, scale * r, r, x) if mixing else (codes, scale * r, r)

        K = x.shape[-1]
        codes, scale, r, *mixed = by_rows(c, row, (x,) if first is None else (x, first), factors)
        x = _materialised(mixed[0]) if mixed else x
        saved = materialised_codes(Quantized(codes, scale))
    else:
        x = x if first is None else _materialised(mix.forward(x, first, *factors))
        r = inverse_rms(x)
        saved = (x.astype(F32) * r).astype(float_dtype(c))
    saved, r = jax.tree.map(lambda a: checkpoint_name(a, name), (saved, r))
    return (_forward(c, w, saved, None, parts), x), (w, _mark(tap), saved, r)


def norm_linear_bwd(c, name, parts, residuals, cotangents):
    w, dys = residuals[0], cotangents[0]
    dy = dys[0] if parts == 1 else _materialised(jnp.concatenate(dys, -1))  # dead code if only its codes are used
    return _norm_linear_gradients(c, residuals, dy, _row_codes(c, w, dys), cotangents[1])


def _norm_linear_gradients(c, residuals, dy, dq, dx, du=None, streams=(), factors=()):
    """The cotangents of w, tap and x.

    Args:
      du: None, or what else the first values of the normed x get, f32 [M,channels].
      streams, factors: none, or where x was mixed the gradient of the first stream so far, x before the mix, the first stream,
        and the two factors: then of w, tap, x, the first stream, and, for each row, of both factors [M,2].
    """
    w, tapped, saved, r = residuals
    dh = _materialised(_dx(c, w, dy, dq).astype(float_dtype(c)))
    if du is not None:
        dh = dh.at[:, : du.shape[1]].add(du.astype(dh.dtype))
    K, kept = dx.shape[-1], jax.tree.leaves(saved)

    def row(dx: jax.Array, dh: jax.Array, r: jax.Array, *others: jax.Array) -> tuple[Any, ...]:
        (y, *scale), mixing = others[: len(kept)], others[len(kept) :]
        y = y.astype(F32) * scale[0] if scale else y
        dx = dx.astype(F32) + norm_backward(dh, y, r, K)
        return mix.backward(dx, *mixing) if mixing else (dx.astype(float_dtype(c)),)

    dxs = _materialised(by_rows(c, row, (dx, dh, r, *kept, *streams), factors))
    return (*_gradient(w, tapped, _dw(c, w, dy, saved, dq)), *dxs)


def norm_linear_epilogue(c: Compute, residuals: Any, dq: Any, dx: jax.Array, dot: jax.Array) -> tuple[Any, ...]:
    """_norm_linear_gradients without another pass over dx: the norm's gradient is part of dX's matmul.

    norm_backward needs the dot product of each row of the normed x and of its gradient, dX. That is the dot product of the
    matmul's result and its gradient, `dot`, which is known before dX is.
    """
    w, tapped, saved, r = residuals
    along = r * (dot * (1 / dx.shape[-1]) * saved.scale)
    dx = dx.astype(F32) + r * _dx(c, w, dx, dq) - along * saved.codes.astype(F32)
    return *_gradient(w, tapped, _dw(c, w, None, saved, dq)), _materialised(dx.astype(float_dtype(c)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def qkv_linear(
    c: Compute, names: tuple[str, str], rotation: rope.Rotation, channels: int, w: Any, tap: jax.Array | None,
    x: jax.Array, start: jax.Array | None, first: jax.Array | None = None, factors: jax.Array | None = None,
) -> Any:  # fmt: skip
    """(q, k, v [B,T,N,H], x, u, first): norm_linear in three parts, then RoPE and QK-norm of q and k (rope.py).

    Backward needs q and k as returned, and where x is mixed also x and first as given: 2D bytes per token and layer in bf16.

    Args:
      names: of what norm_linear saves; of q, k, v and the heads' 1/rms.
      channels: how many of the normed x's first values are returned as u, f32 [M,channels], for gates.
      start: int32, the position of the first token; None: 0 (rope.angles).
      first, factors: None, or [M,K] and f32 [2]: x is mixed with first before the norm (mix.py), and the x that is returned is
        the mixed one. Returning first lets backward add its gradient from later layers in the pass that computes this one's.
    """
    return _qkv_linear_fwd(c, names, rotation, channels, w, tap, x, start, first, factors)[0]


def _qkv_linear_fwd(c, names, rotation, channels, w, tap, x, start, first=None, factors=None):
    pair = () if factors is None else (factors[:1, None], factors[1:, None])
    streams = () if first is None else (x, first)
    ((q, k, v), x), residuals = norm_linear_fwd(c, names[0], w, tap, x, 3, first, pair)
    heads, r = rope.forward(c, rotation, q, k, start)
    # Saved in the shape that is returned, so that attention and this op save one array rather than two views of it.
    heads = tuple(a.reshape(-1, rotation.T, rotation.N, rotation.H) for a in (*heads, v))
    (q, k, v), r = jax.tree.map(lambda a: checkpoint_name(a, names[1]), (heads, r))
    u = checkpoint_name(x[:, :channels].astype(F32) * residuals[3], names[0])
    kept = v if _in_epilogue(c, channels, streams) else None
    return (q, k, v, x, u, first), (residuals, q, k, kept, r, start, streams, pair)


def _in_epilogue(c: Compute, channels: int, streams: tuple[Any, ...]) -> bool:
    """Whether dX's matmul can end in the norm's gradient: it needs v, and none of what else backward may add to x."""
    return c.dx == c.dw == c.forward == "int8" and not channels and not streams


def _qkv_linear_bwd(c, names, rotation, channels, residuals, cotangents):
    (residuals, q, k, v, r, start, streams, pair), (*dys, dx, du, dfirst) = residuals, cotangents
    w, flat = residuals[0], lambda a: a.reshape(dx.shape)
    kept, dys, dot = ((flat(q), flat(k)), r), tuple(map(flat, dys)), None
    if c.dx == c.dw == "int8":  # O = 3K, so dX and dW take the same codes
        v = None if v is None else flat(v)
        codes, scale, *rest = rope.backward(c, rotation, kept, start, dys, weight_codes(w).scale.T, v)
        dy, dq, dot = None, materialised_codes(Quantized(codes, scale)), rest[0] if rest else None
    else:
        (dy,) = rope.backward(c, rotation, kept, start, dys, None)
        dq = _row_codes(c, w, (dy,))
    streams = (dfirst, *streams) if streams else ()
    if dot is not None:
        return *norm_linear_epilogue(c, residuals, dq, dx, dot), None, None, None
    found = _norm_linear_gradients(c, residuals, dy, dq, dx, du if channels else None, streams, pair)
    dw, dtap, dx, *mixing = found
    dfirst, dfactors = (mixing[0], jnp.sum(mixing[1], 0)) if mixing else (None, None)
    return dw, dtap, dx, None, dfirst, dfactors


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def relu2_linear(
    c: Compute, name: str, w: Any, tap: jax.Array | None, x: jax.Array, residual: jax.Array | None = None
) -> jax.Array:
    """relu(x)^2 @ W.T + residual. Backward needs relu(x) (float) or the codes of its square (int8), not x."""
    return relu2_linear_fwd(c, name, w, tap, x, residual)[0]


def relu2_linear_fwd(c, name, w, tap, x, residual=None):
    if c.forward == "int8":
        a = _save_operand(c, x, name, lambda x: jnp.square(jnp.maximum(x, 0.0)))
        return _forward(c, w, a, residual)[0], (w, _mark(tap), a, _mark(residual))
    p = checkpoint_name(jax.nn.relu(x), name)
    return _forward(c, w, p * p, residual)[0], (w, _mark(tap), p, _mark(residual))


def relu2_linear_bwd(c, name, residuals, dy):
    w, tapped, saved, added = residuals
    if isinstance(saved, Quantized):
        a, p = saved, jnp.sqrt(decode(saved))
    else:
        a, p = saved * saved, saved.astype(F32)
    dq = _row_codes(c, w, (dy,))
    dx = _materialised((_dx(c, w, dy, dq) * (2 * p)).astype(float_dtype(c)))
    return (*_gradient(w, tapped, _dw(c, w, dy, a, dq)), dx, None if added is None else dy)


linear.defvjp(_linear_fwd, _linear_bwd)
norm_linear.defvjp(norm_linear_fwd, norm_linear_bwd)
qkv_linear.defvjp(_qkv_linear_fwd, _qkv_linear_bwd)
relu2_linear.defvjp(relu2_linear_fwd, relu2_linear_bwd)
