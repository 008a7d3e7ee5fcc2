"""Optimizer groups, and Muon and AdamW as optax transforms with low-bit states, over one array at a time.

Muon: https://kellerjordan.github.io/posts/muon with nanochat's rates. AdamW: arXiv:1711.05101. Both keep their states as
config.stored says; int8 states have one f32 scale per 256 values and are rounded stochastically. The step hands over one
layer's matrix, or a chunk of rows, at a time, so no transform ever sees or makes a float array of a parameter's full size.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanojax import weights
from nanojax.config import Config, Format
from nanojax.quant import BLOCK, Quantized, decode, encode, zeros
from nanojax.quant.formats import Stored

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Group(NamedTuple):
    """How the weights of one group are updated. `lr` is the rate before the schedule."""

    optimizer: Literal["muon", "adamw"]
    lr: float
    betas: tuple[float, float] = (0.0, 0.0)  # AdamW's; Muon's momentum follows its schedule
    weight_decay: float = 0.0  # AdamW, decoupled


def groups(config: Config) -> dict[str, Group]:
    """nanochat's groups of November 2025. AdamW's rates are scaled by (width/768)^-0.5."""
    o = config.optim
    adamw = lambda lr: Group("adamw", lr * (config.model.D / 768) ** -0.5, (o.beta1, o.beta2), o.weight_decay)
    matrix = adamw(o.matrix_lr) if o.matrix == "adamw" else Group("muon", o.matrix_lr)
    return {"matrix": matrix, "embed": adamw(o.embed_lr), "head": adamw(o.head_lr)}


def group_of(config: Config, name: str, weight: weights.Weight) -> Group:
    """The weight's group. ValueError where the table names one that does not exist."""
    known = groups(config)
    if weight.group not in known:
        raise ValueError(f"weight {name}: no optimizer group {weight.group!r}; there are {', '.join(known)}")
    return known[weight.group]


def summed_into_momentum(config: Config, weight: weights.Weight) -> bool:
    """Whether the weight's gradients are summed into its momentum, which then needs no accumulator."""
    return getattr(config.accumulate, weight.accumulate) == "momentum"


class OptState(NamedTuple):
    """step: updates so far, int32; moments: the optimizer's arrays by name, as stored."""

    step: jax.Array
    moments: dict[str, Stored]


def moments(config: Config, group: Group) -> dict[str, Format]:
    """Which arrays the group's optimizer keeps per weight, and the format of each."""
    if group.optimizer == "adamw":
        return {"mu": config.stored.adam, "nu": config.stored.adam}
    return {"momentum": config.stored.momentum}


def transform(config: Config, name: str, weight: weights.Weight) -> optax.GradientTransformationExtraArgs:
    """The optax transform that updates the weight; its `update` takes `key` for stochastic rounding."""
    group = group_of(config, name, weight)
    if group.optimizer == "adamw":
        return adamw(config, group)
    return (
        orthogonalise(config, group, weight.parts)
        if summed_into_momentum(config, weight)
        else muon(config, group, weight.parts)
    )


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


def orthogonalise(config: Config, group: Group, parts: int = 1) -> optax.GradientTransformationExtraArgs:
    """Updates -lr*rate*sqrt(max(1, rows/columns)) * newton_schulz(g): Muon where g is already the momentum. No state."""
    rate, _ = schedules(config)
    dtype = jnp.float32 if config.compute.dtype == "f32" else jnp.bfloat16

    def init(params: Any) -> OptState:
        del params
        return OptState(jnp.int32(0), {})

    def update(g: Any, state: OptState, params: Any = None, **_: Any) -> tuple[jax.Array, OptState]:
        del params
        split = g.astype(jnp.float32).reshape(*g.shape[:-2], parts, g.shape[-2] // parts, g.shape[-1])
        rows, columns = split.shape[-2:]
        orthogonal = newton_schulz(split, config.optim.ns_steps, dtype).reshape(g.shape)
        lr = group.lr * rate(state.step)
        return -lr * max(1.0, rows / columns) ** 0.5 * orthogonal, OptState(state.step + 1, {})

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]  its own state type


def muon(config: Config, group: Group, parts: int = 1) -> optax.GradientTransformationExtraArgs:
    """Momentum, then `orthogonalise`.

    nanochat's momentum: buf = m*buf + (1-m)*g; the update is of m*buf + (1-m)*g with Nesterov, otherwise of buf.
    """
    form, nesterov = config.stored.momentum, config.optim.nesterov
    _, momentum = schedules(config)
    after: Any = orthogonalise(config, group, parts)

    def init(params: Any) -> OptState:
        return OptState(jnp.int32(0), {"momentum": zeros(params.shape, form, BLOCK)})

    def update(g: Any, state: OptState, params: Any = None, *, key: jax.Array, **_: Any) -> tuple[Any, OptState]:
        del params
        m = momentum(state.step)
        buf = m * decode(state.moments["momentum"]) + (1 - m) * g
        updates, _ = after.update(m * buf + (1 - m) * g if nesterov else buf, OptState(state.step, {}))
        stored = encode(buf, form, jax.random.fold_in(key, 0), BLOCK)
        return updates, OptState(state.step + 1, {"momentum": stored})

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]  it needs `key`


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


def adamw(config: Config, group: Group) -> optax.GradientTransformationExtraArgs:
    """Updates -lr*rate*(m_hat/(sqrt(v_hat)+eps) + weight_decay*p)."""
    form, eps = config.stored.adam, config.optim.eps
    beta1, beta2 = group.betas
    rate, _ = schedules(config)

    def init(params: Any) -> OptState:
        empty = lambda: zeros(params.shape, form, BLOCK)
        return OptState(jnp.int32(0), {"mu": empty(), "nu": empty()})

    def update(g: Any, state: OptState, params: Any = None, *, key: jax.Array, **_: Any) -> tuple[Any, OptState]:
        count = state.step + 1
        fix1, fix2 = (1 - jnp.float32(b) ** count.astype(jnp.float32) for b in (beta1, beta2))
        keys = jax.random.split(key)
        g = g.astype(jnp.float32)
        mu = beta1 * decode(state.moments["mu"]) + (1 - beta1) * g
        nu = beta2 * _decode_nu(state.moments["nu"]) + (1 - beta2) * g * g
        step = (mu / fix1) / (jnp.sqrt(nu / fix2) + eps)
        if group.weight_decay:
            step += group.weight_decay * decode(params)
        new = {"mu": encode(mu, form, keys[0], BLOCK), "nu": _encode_nu(nu, form, keys[1])}
        return -group.lr * rate(state.step) * step, OptState(count, new)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]  it needs `key`
