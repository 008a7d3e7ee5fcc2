"""Muon and AdamW as optax transforms over one layer's tree, with low-bit states; schedules; which parameter gets which.

Muon: https://kellerjordan.github.io/posts/muon with nanochat's rates. AdamW: arXiv 1711.05101. Both keep their state as
config.stored says; int8 states have one f32 scale per 256 values and are rounded stochastically. The step hands a layer (or
a chunk of embedding rows) at a time, so no transform ever sees, or makes, a parameter-sized float array.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanojax.config import Config, Format
from nanojax.quant import BLOCK, Quantized, decode, encode, is_stored, packed, zeros
from nanojax.quant.rounding import dither

RULES = {"embed": "adamw", "head": "adamw", "blocks": "muon"}  # every group of parameters and its optimizer
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
PARTS = {"qkv": 3}  # matrices that are several stacked: q, k and v are orthogonalised one by one, as nanochat's are


def schedules(config: Config) -> tuple[optax.Schedule, optax.Schedule]:
    """Learning-rate factor and Muon momentum by step (0-based)."""
    o, steps = config.optim, config.train.steps
    up, down = round(o.warmup * steps), round(o.warmdown * steps)

    def rate(step: Any) -> jax.Array:
        """nanochat's: (step+1)/warmup, then 1, then linear to final_lr at the end."""
        step = jnp.asarray(step, jnp.float32)
        factor = jnp.minimum(1.0, (step + 1) / max(up, 1)) if up else jnp.float32(1)
        left = jnp.clip((steps - step) / max(down, 1), 0.0, 1.0)
        return factor * (left + (1 - left) * o.final_lr) if down else factor

    def momentum(step: Any) -> jax.Array:
        frac = (
            jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / max(o.momentum_warmup, 1)) if o.momentum_warmup else 1.0
        )
        return jnp.float32(o.momentum_start) * (1 - frac) + jnp.float32(o.momentum) * frac

    return rate, momentum


def newton_schulz(g: jax.Array, steps: int, dtype: Any) -> jax.Array:
    """The nearest matrix with singular values in about [0.7, 1.2], f32: `steps` quintic iterations in `dtype`; g [..., O, K]."""
    a, b, c = (jnp.asarray(k, dtype) for k in COEFFICIENTS)
    x = g.astype(dtype)
    tall = g.shape[-2] > g.shape[-1]
    norm = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), (-2, -1), keepdims=True))
    x = jax.lax.optimization_barrier((x.astype(jnp.float32) / (norm + 1e-7)).astype(dtype))
    for _ in range(steps):
        # the smaller of the two Gram matrices, from whichever side: no transposes (d32: 0.5 GiB of the peak)
        gram = jnp.einsum("...ij,...ik->...jk", x, x) if tall else jnp.einsum("...ij,...kj->...ik", x, x)
        poly = b * gram + c * (gram @ gram)
        x = a * x + (x @ poly if tall else poly @ x)
    return x.astype(jnp.float32)


class MuonState(NamedTuple):
    """count: updates so far, int32; momentum: tree like the parameters, as config.stored.momentum."""

    count: jax.Array
    momentum: Any


def muon(config: Config) -> optax.GradientTransformationExtraArgs:
    """Updates -lr*sqrt(max(1, rows/columns)) * newton_schulz(momentum of g); takes `key` for stochastic rounding.

    nanochat's momentum: buf = m*buf + (1-m)*g; u = m*buf + (1-m)*g with Nesterov, else buf. With accumulate.blocks=momentum the
    "gradients" are the finished buf (the step has summed m*buf + (1-m)*g while accumulating) and the state is not read.
    """
    o, form = config.optim, config.stored.momentum
    rate, momentum = schedules(config)
    dtype = jnp.float32 if config.compute.dtype == "f32" else jnp.bfloat16
    folded = config.accumulate.blocks == "momentum"

    def init(params: Any) -> MuonState:
        return MuonState(jnp.int32(0), jax.tree.map(lambda p: zeros(p.shape, form, BLOCK), params, is_leaf=is_stored))

    def update(grads: Any, state: MuonState, params: Any = None, *, key: jax.Array, **_: Any) -> tuple[Any, MuonState]:
        del params
        m, lr = momentum(state.count), o.matrix_lr * rate(state.count)
        updates, bufs = {}, {}
        for i, (name, g) in enumerate(sorted(grads.items())):
            if folded:
                u, bufs[name] = g.astype(jnp.float32), state.momentum[name]
            else:
                buf = m * decode(state.momentum[name]) + (1 - m) * g
                u = m * buf + (1 - m) * g if o.nesterov else buf
                bufs[name] = encode(buf, form, jax.random.fold_in(key, i), BLOCK)
            parts = _parts(name, u)
            rows, columns = parts.shape[-2:]
            orthogonal = newton_schulz(parts, o.ns_steps, dtype).reshape(g.shape)
            updates[name] = -lr * max(1.0, rows / columns) ** 0.5 * orthogonal
        return updates, MuonState(state.count + 1, bufs)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]  it needs `key`


def _parts(name: str, x: jax.Array) -> jax.Array:
    """x [..., O, K] as the matrices it stacks, [..., parts, O/parts, K]."""
    count = PARTS.get(name, 1)
    return x.reshape(*x.shape[:-2], count, x.shape[-2] // count, x.shape[-1])


class AdamState(NamedTuple):
    """count: int32; mu, nu: first and second moment (int8: the square root of the second) as config.stored.adam."""

    count: jax.Array
    mu: Any
    nu: Any


def _encode_nu(nu: jax.Array, form: Format, key: jax.Array) -> Any:
    """Second moment as stored; int8: codes of its square root, at least 1 where it is not zero.

    A linear int8 second moment rounds small values to 0 and divides by them: known to diverge. The root halves the dynamic
    range in bits, and the floor of one grid step bounds every update.
    """
    if form != "int8":
        return encode(nu, form, key, BLOCK)
    root = jnp.sqrt(nu)
    q = encode(root, form, key, BLOCK)
    return Quantized(jnp.where((q.codes == 0) & (root > 0), jnp.int8(1), q.codes), q.scale)


def _decode_nu(nu: Any) -> jax.Array:
    return jnp.square(decode(nu)) if isinstance(nu, Quantized) else decode(nu)


def adamw(config: Config, lr: float) -> optax.GradientTransformationExtraArgs:
    """Updates -lr*rate*(m_hat/(sqrt(v_hat)+eps) + weight_decay*p); `lr` is scaled by (width/768)^-0.5 here."""
    o, form = config.optim, config.stored.adam
    rate, _ = schedules(config)
    lr = lr * (config.model.D / 768) ** -0.5

    def init(params: Any) -> AdamState:
        empty = lambda: jax.tree.map(lambda p: zeros(p.shape, form, BLOCK), params, is_leaf=is_stored)
        return AdamState(jnp.int32(0), empty(), empty())

    def update(grads: Any, state: AdamState, params: Any = None, *, key: jax.Array, **_: Any) -> tuple[Any, AdamState]:
        count = state.count + 1
        fix1, fix2 = (1 - jnp.float32(b) ** count.astype(jnp.float32) for b in (o.beta1, o.beta2))
        keys = jax.random.split(key)

        def one(g: jax.Array, mu: Any, nu: Any, p: Any) -> tuple[jax.Array, Any, Any]:
            g = g.astype(jnp.float32)
            mu = o.beta1 * decode(mu) + (1 - o.beta1) * g
            nu = o.beta2 * _decode_nu(nu) + (1 - o.beta2) * g * g
            step = (mu / fix1) / (jnp.sqrt(nu / fix2) + o.eps)
            if o.weight_decay:
                step += o.weight_decay * decode(p)
            return -lr * rate(state.count) * step, encode(mu, form, keys[0], BLOCK), _encode_nu(nu, form, keys[1])

        flat = jax.tree.map(one, grads, state.mu, state.nu, params)
        pick = lambda i: jax.tree.map(lambda _, out: out[i], grads, flat)
        return pick(0), AdamState(count, pick(1), pick(2))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]  it needs `key`


def step(tx: optax.GradientTransformationExtraArgs, grads: Any, state: Any, params: Any, key: jax.Array) -> Any:
    """tx.update with its rounding key, (updates, new state); optax's types know no named states."""
    return tx.update(grads, state, params, key=key)


def apply(stored: Any, updates: Any, form: Format, key: jax.Array) -> Any:
    """Stored parameters plus f32 updates: decode, add, encode stochastically (optax.apply_updates would truncate int8)."""
    leaves, structure = jax.tree.flatten(updates)
    parts = zip(structure.flatten_up_to(stored), leaves)
    new = [encode(decode(p) + u, form, jax.random.fold_in(key, i)) for i, (p, u) in enumerate(parts)]
    return jax.tree.unflatten(structure, new)


def apply_packed(stored: Any, remainder: Any, updates: Any, bits: int, key: jax.Array, step: Any) -> tuple[Any, Any]:
    """`apply` below 8 bits, (parameters, remainder): dicts by name; `key` is the same at every step (rounding.dither). With 0
    bits `remainder` is empty.

    What rounding leaves of a weight is not lost (packed.encode_fine): rounded anew to 16 levels and fewer, weights would take
    up more noise at every step than update.
    """
    params, rest = {}, {}
    for i, (name, u) in enumerate(sorted(updates.items())):
        noise = dither(jax.random.fold_in(key, i), step, u.shape)
        x = packed.decode_fine(stored[name], remainder.get(name), bits) + u
        params[name], rest[name] = packed.encode_fine(x, noise, stored[name], bits)
    return params, rest
