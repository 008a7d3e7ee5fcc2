"""RoPE and QK-norm of a layer's queries and keys, and their gradients, for XLA and as Pallas kernels (a program per token).

Backward produces the operand of the qkv matmuls: the gradients of q, k and v side by side, as floats or as int8 codes with
one scale per token. XLA takes four passes over them (means, rotation, maxima, codes); the kernel takes one, which saves 43 kB
of traffic per token and layer in d32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from nanojax.config import Compute
from nanojax.ops.rows import F32, by_rows, codes_of, implementation, inverse_rms, inverse_rms_of, quantized, scale_of

WARPS = 4  # per program: 128 threads hold a token, 2,048 or more values per tensor, in registers


class Rotation(NamedTuple):
    """Sequences of T tokens, N heads of width H, frequencies base^(-2i/H)."""

    T: int
    N: int
    H: int
    base: float


def angles(rotation: Rotation, start: jax.Array | None, kernels: bool) -> tuple[jax.Array, jax.Array]:
    """f32 cos and sin [T,H/2] of positions start..start+T; None: from 0 on, and then a constant that all layers share."""
    T, _, H, base = rotation
    frequency = base ** (-jnp.arange(0, H, 2, dtype=F32) / H)
    positions = jnp.arange(T) if start is None else jnp.arange(T) + start
    angle = positions.astype(F32)[:, None] * frequency[None]
    if kernels or T % 2:
        return jnp.cos(angle), jnp.sin(angle)
    # In a loop of two turns. Otherwise XLA's CPU compiler, which ignores barriers, computes them anew for every row, head and
    # reader: a tenth of a d4's step.
    halves = lax.map(lambda a: (jnp.cos(a), jnp.sin(a)), angle.reshape(2, T // 2, H // 2))
    return halves[0].reshape(T, H // 2), halves[1].reshape(T, H // 2)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B,T,N,H] as nanochat does, by halves: y1 = x1 cos + x2 sin, y2 = -x1 sin + x2 cos; cos, sin [T,H/2]."""
    H = x.shape[-1] // 2
    cos, sin = (a[None, :, None, :] for a in (cos, sin))
    x1, x2 = x[..., :H], x[..., H:]
    y = lax.dynamic_update_slice(jnp.zeros_like(x), x1 * cos + x2 * sin, (0, 0, 0, 0))
    return lax.dynamic_update_slice(y, x2 * cos - x1 * sin, (0, 0, 0, H))


def _kernels(c: Compute, rotation: Rotation) -> bool:
    half = rotation.H // 2  # Triton's arrays are powers of two: heads can be padded, halves cannot
    return implementation(c.rows) == "pallas" and half & (half - 1) == 0


def forward(
    c: Compute, rotation: Rotation, q_MD: jax.Array, k_MD: jax.Array, start: jax.Array | None
) -> tuple[Any, Any]:
    """Rotates q and k [M,D] and normalises each head.

    Returns:
      (q, k) [M,D] in their dtype, and 1/rms of each head of (q, k), f32 [M,N].
    """
    T, N, H, _ = rotation
    M = q_MD.shape[0]
    kernels = _kernels(c, rotation)
    cos, sin = angles(rotation, start, kernels)
    if kernels:
        heads = [x.reshape(M, N, H) for x in (q_MD, k_MD)]
        shapes = [jax.ShapeDtypeStruct((M, N, H), q_MD.dtype)] * 2 + [jax.ShapeDtypeStruct((M, N), F32)] * 2
        q, k, rq, rk = _by_tokens(_forward_kernel, rotation, heads, (cos, sin), (), shapes)
        return (q.reshape(M, -1), k.reshape(M, -1)), (rq, rk)
    out = []
    for x in (q_MD, k_MD):
        x = x.reshape(-1, T, N, H)
        r = inverse_rms(x)  # of x itself: a rotation does not change its norm
        y = (_rotate(x.astype(F32), cos, sin) * r).astype(x.dtype)
        out.append((y.reshape(M, -1), r.reshape(M, N)))
    return tuple(zip(*out))  # pyright: ignore[reportReturnType]


def backward(
    c: Compute,
    rotation: Rotation,
    kept: Any,
    start: jax.Array | None,
    dys: tuple[jax.Array, ...],
    scale: jax.Array | None,
    v: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """The gradient of the qkv matmul's result.

    Args:
      kept: what forward returned.
      dys: the gradients of q and k as returned by forward, and of v; [M,D] each.
      scale: f32 [1,3D], multiplied into the gradient before it is quantised; None: return floats.
      v: None, or [M,D], the matmul's third part; with scale only.

    Returns:
      int8 codes [M,3D] and f32 scales [M,1]; with scale=None one array [M,3D] in the dtype of dys. With v also the dot product
      of the matmul's result and its gradient, f32 [M,1]. Those of q and k add nothing to it: a norm's gradient is orthogonal
      to what is normed.
    """
    (q, k), (rq, rk) = kept
    T, N, H, _ = rotation
    M, D = q.shape
    kernels = _kernels(c, rotation)
    cos, sin = angles(rotation, start, kernels)
    if kernels:
        shapes = [jax.ShapeDtypeStruct((M, 3, N, H), jnp.int8 if scale is not None else q.dtype)]
        shapes += [] if scale is None else [jax.ShapeDtypeStruct((M, 1), F32)] * (1 if v is None else 2)
        heads = [x.reshape(M, N, H) for x in (*dys, q, k)] + [rq, rk]
        heads += [] if v is None else [v.reshape(M, N, H)]
        columns = () if scale is None else (scale.reshape(3, N, H),)
        codes, *scales = _by_tokens(_backward_kernel, rotation, heads, (cos, sin), columns, shapes)
        return codes.reshape(M, 3 * D), *scales
    out = []
    for dy, y, r in zip(dys, (q, k), (rq, rk)):
        dy, y = (x.reshape(-1, T, N, H).astype(F32) for x in (dy, y))
        # norm_backward, then the inverse rotation. Rotating dy and y, which are in memory, rather than their combination
        # keeps this in one pass.
        mean = jnp.mean(dy * y, -1, keepdims=True)
        dx = r.reshape(-1, T, N, 1) * (_rotate(dy, cos, -sin) - _rotate(y, cos, -sin) * mean)
        out.append(dx.reshape(M, D).astype(q.dtype))
    parts = (*out, dys[2])
    if scale is None:
        return (lax.optimization_barrier(jnp.concatenate(parts, -1)),)
    row = lambda *a: quantized([dy.astype(F32) * sw for dy, sw in zip(a[:3], a[3:])])
    dot = () if v is None else (jnp.sum(dys[2].astype(F32) * v.astype(F32), -1, keepdims=True),)
    return *by_rows(c, row, parts, jnp.split(scale, 3, 1)), *dot


def _by_tokens(
    kernel: Any, rotation: Rotation, rows: list[jax.Array], positions: Any, columns: Any, out: list[Any]
) -> list[jax.Array]:
    """Runs the kernel with one program per token on rows [M,...], positions [T,...] and columns, in this order."""
    first: Any = lambda a: pl.BlockSpec((1, *a.shape[1:]), lambda i: (i, *([0] * (len(a.shape) - 1))))
    cyclic: Any = lambda a: pl.BlockSpec((1, *a.shape[1:]), lambda i: (i % rotation.T, *([0] * (len(a.shape) - 1))))
    whole: Any = lambda a: pl.BlockSpec(a.shape, lambda i: (0,) * len(a.shape))
    call = pl.pallas_call(
        functools.partial(kernel, rotation),
        grid=(rows[0].shape[0],),
        in_specs=[*map(first, rows), *map(cyclic, positions), *map(whole, columns)],
        out_specs=list(map(first, out)),
        out_shape=out,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
    )
    return jax.jit(call)(*rows, *positions, *columns)  # jit: as in rows.by_rows


class _Heads:
    """Loads and stores the heads of one token in a kernel.

    Heads [N,H] become their two halves, f32 [P,H/2], where P is the next power of two of N; the padding is zeros. `load_each`
    and `store_each` handle one value per head, [P]. `lead` indexes the axes before the heads.
    """

    def __init__(self, rotation: Rotation):
        _, self.N, self.H, _ = rotation
        self.P = pl.next_power_of_2(self.N)
        self.head = jnp.arange(self.P)

    def _at(self, i: int) -> tuple[jax.Array, jax.Array]:
        half = self.H // 2
        return self.head[:, None], i * half + jnp.arange(half)[None, :]

    def _mask(self, ref: Any, head: jax.Array, load: bool) -> dict[str, Any]:
        if self.P == self.N:
            return {}
        return {"mask": head < self.N} | ({"other": jnp.zeros((), ref.dtype)} if load else {})

    def load(self, ref: Any, *lead: int) -> list[jax.Array]:
        mask = self._mask(ref, self.head[:, None], True)
        return [triton.load(ref.at[*lead, *self._at(i)], **mask).astype(F32) for i in (0, 1)]

    def store(self, halves: list[jax.Array], ref: Any, *lead: int) -> None:
        mask = self._mask(ref, self.head[:, None], False)
        for i, x in enumerate(halves):
            triton.store(ref.at[*lead, *self._at(i)], x.astype(ref.dtype), **mask)

    def load_each(self, ref: Any) -> jax.Array:
        return triton.load(ref.at[0, self.head], **self._mask(ref, self.head, True))

    def store_each(self, x: jax.Array, ref: Any) -> None:
        triton.store(ref.at[0, self.head], x, **self._mask(ref, self.head, False))


def _turn(x: list[jax.Array], cos: jax.Array, sin: jax.Array) -> list[jax.Array]:
    """_rotate on halves."""
    return [x[0] * cos + x[1] * sin, x[1] * cos - x[0] * sin]


def _forward_kernel(rotation: Rotation, q, k, cos, sin, q_out, k_out, rq, rk) -> None:
    heads = _Heads(rotation)
    cos, sin = cos[0][None], sin[0][None]
    for x_ref, y_ref, r_ref in ((q, q_out, rq), (k, k_out, rk)):
        x = heads.load(x_ref, 0)
        r = inverse_rms_of(jnp.sum(x[0] * x[0] + x[1] * x[1], -1), rotation.H)
        heads.store([half * r[:, None] for half in _turn(x, cos, sin)], y_ref, 0)
        heads.store_each(r, r_ref)


def _backward_kernel(rotation: Rotation, dq, dk, dv, q, k, rq, rk, *refs) -> None:
    """refs: v or none; cos, sin; then the gradient, or the columns' scales, codes, their scale, and with v the dot product."""
    heads = _Heads(rotation)
    v, refs = (refs[0], refs[1:]) if len(refs) == 7 else (None, refs)
    cos, sin, *refs = refs
    cos, sin = cos[0][None], sin[0][None]
    parts = []
    for dy_ref, y_ref, r_ref in ((dq, q, rq), (dk, k, rk)):
        dy, y, r = heads.load(dy_ref, 0), heads.load(y_ref, 0), heads.load_each(r_ref)[:, None]
        mean = jnp.sum(dy[0] * y[0] + dy[1] * y[1], -1)[:, None] * (1 / rotation.H)
        back = zip(_turn(dy, cos, -sin), _turn(y, cos, -sin))
        # rounded to the dtype of dq, as between two passes of XLA
        parts.append([(r * (a - b * mean)).astype(dq.dtype).astype(F32) for a, b in back])
    parts.append(heads.load(dv, 0))
    if len(refs) == 1:
        for i, part in enumerate(parts):
            heads.store(part, refs[0], 0, i)
        return
    columns, codes_ref, scale_ref, *dot_ref = refs
    if v is not None:
        dot_ref[0][0, 0] = sum(jnp.sum(a * b) for a, b in zip(parts[2], heads.load(v, 0)))
    parts = [[x * s for x, s in zip(part, heads.load(columns, i))] for i, part in enumerate(parts)]
    amax = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x)) for part in parts for x in part])
    scale = scale_of(amax)
    for i, part in enumerate(parts):
        heads.store([codes_of(x, scale) for x in part], codes_ref, 0, i)
    scale_ref[0, 0] = scale
