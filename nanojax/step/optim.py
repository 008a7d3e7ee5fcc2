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
from nanojax.config_rules import matrix_decay
from nanojax.quant import BLOCK, Quantized, decode, encode, zeros
from nanojax.quant.formats import Stored

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
RESTART = (
    3  # iterations; 2 are no better, without a restart the error of bf16 is 20 times the matrix if its spectrum falls
)
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class Group(NamedTuple):
    """How the weights of one group are updated. `lr` is the rate before the schedule."""

    optimizer: Literal["muon", "adamw"]
    lr: float
    betas: tuple[float, float] = (0.0, 0.0)  # AdamW's; Muon's momentum follows its schedule
    weight_decay: float = 0.0  # AdamW: decoupled; Muon: cautious, at the first step
    states: Format = "f32"  # the format of the optimizer's arrays


def groups(config: Config) -> dict[str, Group]:
    """The groups of the config's model, by the names that the table of weights has for them."""
    return _groups_2026(config) if config.model.family == "2026" else _groups_2025(config)


def _groups_2025(config: Config) -> dict[str, Group]:
    """nanochat's groups of November 2025. AdamW's rates are scaled by (width/768)^-0.5."""
    o, states = config.optim, config.stored.adam
    adamw = lambda lr: Group("adamw", lr * (config.model.D / 768) ** -0.5, (o.beta1, o.beta2), o.weight_decay, states)
    muon = Group("muon", o.matrix_lr, weight_decay=matrix_decay(config), states=config.stored.momentum)
    matrix = adamw(o.matrix_lr) if o.matrix == "adamw" else muon
    return {"matrix": matrix, "embed": adamw(o.embed_lr), "head": adamw(o.head_lr)}


def _groups_2026(config: Config) -> dict[str, Group]:
    """nanochat's groups of July 2026. All rates but the gates' grow with the root of the batch.

    AdamW's of embeddings and head fall with the root of the width.
    """
    o, states = config.optim, config.stored.adam
    batch = (config.train.tokens_per_step / 2**19) ** 0.5
    width = (config.model.D / 768) ** -0.5
    muon = Group("muon", o.matrix_lr * batch, weight_decay=matrix_decay(config), states=config.stored.momentum)
    adamw = Group("adamw", o.matrix_lr * batch * width, (0.8, 0.95), states=states)
    return {
        "matrix": adamw if o.matrix == "adamw" else muon,
        "value_gate": muon._replace(states="f32"),
        "embed": Group("adamw", o.embed_lr * batch * width, (0.8, 0.995), 0.001, states),
        "value": Group("adamw", o.embed_lr / 2 * batch * width, (0.8, 0.995), 0.01, states),
        "head": Group("adamw", o.head_lr * batch * width, (0.8, 0.96), 0.01, states),
        "residual": Group("adamw", 0.005 * batch, (0.8, 0.95), 0.05),
        "first": Group("adamw", 0.5 * batch, (0.96, 0.95)),
        "gate": Group("adamw", 0.2, (0.8, 0.95)),
    }


def group_of(config: Config, name: str, weight: weights.Weight) -> Group:
    """The weight's group. ValueError where the table names one that does not exist."""
    known = groups(config)
    if weight.group not in known:
        raise ValueError(f"weight {name}: no optimizer group {weight.group!r}; there are {', '.join(known)}")
    return known[weight.group]


def summed_into_momentum(config: Config, weight: weights.Weight) -> bool:
    """Whether the weight's gradients are summed into its momentum, which then needs no accumulator."""
    return config.summed_as(weight) == "momentum"


class OptState(NamedTuple):
    """step: updates so far, int32; moments: the optimizer's arrays by name, as stored."""

    step: jax.Array
    moments: dict[str, Stored]


def moments(config: Config, group: Group, weight: weights.Weight) -> dict[str, tuple[tuple[int, ...], Format]]:
    """Which arrays the group's optimizer keeps for one such weight: shape and format by name."""
    if group.optimizer == "adamw":
        return {"mu": (weight.shape, group.states), "nu": (weight.shape, group.states)}
    kept: dict[str, tuple[tuple[int, ...], Format]] = {"momentum": (weight.shape, group.states)}
    if config.optim.muon == "normuon":
        rows, columns = weight.shape
        kept["second"] = (weight.parts, max(rows // weight.parts, columns)), "f32"
    return kept


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
    up, down = round(o.warmup if o.warmup >= 1 else o.warmup * steps), round(o.warmdown * steps)

    def rate(step: Any) -> jax.Array:
        """nanochat's: (step+1)/warmup, then 1, then linear or cosine to final_lr. Where both overlap, the warm-up wins."""
        step = jnp.asarray(step, jnp.float32)
        rising = jnp.minimum(1.0, (step + 1) / max(up, 1)) if up else jnp.float32(1)
        if not down:
            return peak(rising)
        left = jnp.clip((steps - step) / down, 0.0, 1.0)
        if o.decay == "cosine":
            left = 0.5 - 0.5 * jnp.cos(jnp.pi * left)
        falling = left + (1 - left) * o.final_lr
        return peak(jnp.where(step < up, rising, falling))

    def peak(rate: jax.Array) -> jax.Array:
        return rate if o.peak_lr == 1 else o.peak_lr * rate

    def momentum(step: Any) -> jax.Array:
        frac = (
            jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / max(o.momentum_warmup, 1)) if o.momentum_warmup else 1.0
        )
        rising = jnp.float32(o.momentum_start) * (1 - frac) + jnp.float32(o.momentum) * frac
        if not (o.momentum_final and down):
            return rising
        left = jnp.clip((steps - jnp.asarray(step, jnp.float32)) / down, 0.0, 1.0)
        falling = jnp.float32(o.momentum) * left + jnp.float32(o.momentum_final) * (1 - left)
        return jnp.where(step < o.momentum_warmup, rising, falling)  # nanochat's order: a short run may never fall

    return rate, momentum


def decay_schedule(config: Config, step: jax.Array) -> jax.Array:
    """Muon's weight decay by step, as a share of the first: a cosine to 0."""
    return 0.5 * (1 + jnp.cos(jnp.pi * step.astype(jnp.float32) / config.train.steps))


def newton_schulz(g: jax.Array, steps: int, dtype: Any) -> jax.Array:
    """The nearest matrix with singular values in about [0.7, 1.2], f32: `steps` quintic iterations in `dtype`; g [..., O, K]."""
    a, b, c = (jnp.asarray(k, dtype) for k in COEFFICIENTS)
    x = g.astype(dtype)
    tall = g.shape[-2] > g.shape[-1]
    norm = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), (-2, -1), keepdims=True))
    x = jax.lax.optimization_barrier((x.astype(jnp.float32) / (norm + 1e-7)).astype(dtype))
    if dtype == jnp.bfloat16 and max(g.shape[-2:]) >= 2 * min(g.shape[-2:]):
        return newton_schulz_by_gram(x, steps)
    for _ in range(steps):
        # the smaller of the two Gram matrices, from whichever side: no transposes (d32: 0.5 GiB of the peak)
        gram = jnp.einsum("...ij,...ik->...jk", x, x) if tall else jnp.einsum("...ij,...kj->...ik", x, x)
        poly = b * gram + c * (gram @ gram)
        x = a * x + (x @ poly if tall else poly @ x)
    return x.astype(jnp.float32)


def newton_schulz_by_gram(x: jax.Array, steps: int) -> jax.Array:
    """newton_schulz's iterations of x [...,O,K] in x's dtype, f32: of a 4:1 matrix with two thirds of the products.

    x' = p x with a polynomial p of the smaller Gram matrix, and so the next Gram matrix is p gram p: only the product of all p
    meets x (github.com/Dao-AILab/gram-newton-schulz). In bf16 gram's small eigenvalues are rounding, which grows with them
    and beside them: hence a new start from x after RESTART iterations.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    dtype = x.dtype
    product = lambda y, z: jnp.matmul(y.astype(dtype), z.astype(dtype), preferred_element_type=jnp.float32)
    n = min(x.shape[-2:])
    identity = jnp.broadcast_to(jnp.eye(n, dtype=jnp.float32), (*x.shape[:-2], n, n))
    for start in range(0, steps, RESTART):
        form = "...ij,...ik->...jk" if tall else "...ij,...kj->...ik"
        gram, poly, whole = jnp.einsum(form, x, x, preferred_element_type=jnp.float32), identity, None
        for _ in range(start, min(start + RESTART, steps)):
            if whole is not None:
                gram = product(product(poly, gram), poly)
            poly = a * identity + b * gram + c * product(gram, gram)
            whole = poly if whole is None else product(poly, whole)
        x = (product(x, whole) if tall else product(whole, x)).astype(dtype)
    return x.astype(jnp.float32)


def polar(x: jax.Array, steps: int, dtype: Any) -> jax.Array:
    """The nearest matrix with singular values near 1, f32, by Polar Express (arXiv:2505.16932); x [..., O, K].

    As `newton_schulz`, with other coefficients in each of up to 5 steps.
    """
    tall = x.shape[-2] > x.shape[-1]
    norm = jnp.sqrt(jnp.sum(jnp.square(x), (-2, -1), keepdims=True))
    x = jax.lax.optimization_barrier((x / (1.01 * norm + 1e-6)).astype(dtype))
    for a, b, c in (tuple(jnp.asarray(k, dtype) for k in step) for step in POLAR[:steps]):
        gram = jnp.einsum("...ij,...ik->...jk", x, x) if tall else jnp.einsum("...ij,...kj->...ik", x, x)
        poly = b * gram + c * (gram @ gram)
        x = a * x + (x @ poly if tall else poly @ x)
    return x.astype(jnp.float32)


def normuon(g: jax.Array, second: jax.Array, steps: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(direction [P,O,K] f32, second) from the momentum g [P,O,K] and the second moments [P, max(O,K)] of P matrices.

    nanochat's of July 2026: rows of equal norm (MuonEq), Polar Express, the norm of a semi-orthogonal matrix (Muon+), and
    NorMuon (arXiv:2510.05491): each row, or each column of a wide matrix, divided by the root of its second moment, the norm
    kept.
    """
    rows, columns = g.shape[-2:]
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), (-2, -1), keepdims=True))
    each = jnp.sqrt(jnp.sum(jnp.square(g), -1, keepdims=True))
    x = polar(g * (norm(g) / rows**0.5 / jnp.maximum(each, 1e-6)), steps, dtype)
    x *= min(rows, columns) ** 0.5 / jnp.maximum(norm(x), 1e-6)
    along = -1 if rows >= columns else -2
    second = 0.9 * second + 0.1 * jnp.mean(jnp.square(x), along)
    scaled = x * jax.lax.rsqrt(jnp.maximum(jnp.expand_dims(second, along), 1e-10))
    return scaled * (norm(x) / jnp.maximum(norm(scaled), 1e-10)), second


def orthogonalise(config: Config, group: Group, parts: int = 1) -> optax.GradientTransformationExtraArgs:
    """Muon where g is already the momentum: updates -lr*rate*sqrt(max(1, rows/columns))*(X + decay*p where X*p >= 0).

    X: newton_schulz(g), or with optim.muon=normuon that of `normuon`, which keeps second moments.
    """
    rate, _ = schedules(config)
    dtype = jnp.float32 if config.compute.dtype == "f32" else jnp.bfloat16
    nor = config.optim.muon == "normuon"

    def init(params: Any) -> OptState:
        rows, columns = params.shape[-2] // parts, params.shape[-1]
        return OptState(jnp.int32(0), {"second": jnp.zeros((parts, max(rows, columns)))} if nor else {})

    def update(g: Any, state: OptState, params: Any = None, **_: Any) -> tuple[jax.Array, OptState]:
        split = g.astype(jnp.float32).reshape(*g.shape[:-2], parts, g.shape[-2] // parts, g.shape[-1])
        rows, columns = split.shape[-2:]
        moments: dict[str, Any] = dict(state.moments)
        if nor:
            split, moments["second"] = normuon(split, moments["second"], config.optim.ns_steps, dtype)
        else:
            split = newton_schulz(split, config.optim.ns_steps, dtype)
        x = split.reshape(g.shape)
        if group.weight_decay:
            p = decode(params)
            x += jnp.where(x * p >= 0, group.weight_decay * decay_schedule(config, state.step) * p, 0.0)
        lr = group.lr * rate(state.step)
        return -lr * max(1.0, rows / columns) ** 0.5 * x, OptState(state.step + 1, moments)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]  its own state type


def muon(config: Config, group: Group, parts: int = 1) -> optax.GradientTransformationExtraArgs:
    """Momentum, then `orthogonalise`.

    nanochat's momentum: buf = m*buf + (1-m)*g; the update is of m*buf + (1-m)*g with Nesterov, otherwise of buf.
    """
    form, nesterov = group.states, config.optim.nesterov
    _, momentum = schedules(config)
    after: Any = orthogonalise(config, group, parts)

    def init(params: Any) -> OptState:
        return OptState(jnp.int32(0), after.init(params).moments | {"momentum": zeros(params.shape, form, BLOCK)})

    def update(g: Any, state: OptState, params: Any = None, *, key: jax.Array, **_: Any) -> tuple[Any, OptState]:
        m = momentum(state.step)
        buf = m * decode(state.moments["momentum"]) + (1 - m) * g
        direction = m * buf + (1 - m) * g if nesterov else buf
        others = {name: a for name, a in state.moments.items() if name != "momentum"}
        updates, new = after.update(direction, OptState(state.step, others), params)
        stored = encode(buf, form, jax.random.fold_in(key, 0), BLOCK)
        return updates, OptState(state.step + 1, {**new.moments, "momentum": stored})

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
    form, eps, before = group.states, config.optim.eps, config.optim.steps_before
    beta1, beta2 = group.betas
    rate, _ = schedules(config)

    def init(params: Any) -> OptState:
        empty = lambda: zeros(params.shape, form, BLOCK)
        return OptState(jnp.int32(0), {"mu": empty(), "nu": empty()})

    def update(g: Any, state: OptState, params: Any = None, *, key: jax.Array, **_: Any) -> tuple[Any, OptState]:
        count = state.step + 1
        fix1, fix2 = (1 - jnp.float32(b) ** (count + before).astype(jnp.float32) for b in (beta1, beta2))
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
