"""The train step: forward, layer-by-layer backward into accumulators, update one layer at a time. Pure; to be jitted, donated.

Per microbatch the layers run forward, each keeping what its vjp needs (compute.residuals); the chunked loss turns the last
output into its gradient; the layers' vjps run in reverse and add each dW to that matrix's accumulator. Once per step, for
each of a layer's matrices, a scan over layers runs the optax transform, decodes, adds and encodes. The full gradient, the
full float view of the parameters and the full logits never exist.

Forward and backward are unrolled, and every layer's accumulators are arrays of their own: in a scan XLA copies each slice of
parameters, residuals and accumulators out of its stack and back, and cannot add dW to its accumulator within the product
(d32 on an RTX 4070, modelled, before rows were kernels: 5.1k tokens/s with scans, 7.5k without; 26 and 70 s to compile).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nanojax import model
from nanojax.config import Config
from nanojax.ops.cross_entropy import accumulate, loss_and_grads
from nanojax.ops.linear import F32, inverse_rms, norm_backward
from nanojax.quant import BLOCK, decode, zeros
from nanojax.quant.packed import LEVELS, Packed
from nanojax.quant.rounding import dither_vectors, shifted
from nanojax.step import optim

# Scales, residual adds and accumulators become epilogues of the products that make them. Modelled, d32 on an RTX 4070: 7.5k
# tokens/s instead of 5.8k (experimental in XLA, but in jax 0.10 to 0.12).
GPU_OPTIONS: dict[str, Any] = {"xla_gpu_experimental_gemm_fusion_v2": True}
ROWS_BYTES = 32 << 20  # f32 bytes of the embedding or head rows updated at one time


class State(NamedTuple):
    """What a step turns into the next: all of it donated.

    step int32; params (model.py, as `layered`); opt {"blocks": momentum, or (mu, nu) with optim.matrix=adamw, "embed": (mu,
    nu), "head": (mu, nu) as stored, and, with blocks below 8 bits and stored.remainder, "remainder": what rounding left of
    them (quant/packed.py)}; accum {"embed", "head": [V,D], "blocks": {name: one array a layer}}, zeros between steps. With
    accumulate.blocks=momentum accum has no "blocks", and the momentum is one array a layer.
    """

    step: jax.Array
    params: Any
    opt: Any
    accum: Any


def init_state(config: Config) -> State:
    """Fresh state from config.train.seed. Jit it: eagerly it would hold f32 copies."""
    m, s, a = config.model, config.stored, config.accumulate
    stacks = {name: (m.L, *shape) for name, shape in m.shapes.items()}
    edge = lambda form: zeros((m.V, m.D), form, BLOCK)
    accum: dict[str, Any] = {name: jnp.zeros((m.V, m.D), _dtype(a.embed_head)) for name in ("embed", "head")}
    layers = lambda form: {
        name: tuple(jnp.zeros(shape, _dtype(form)) for _ in range(m.L)) for name, shape in m.shapes.items()
    }
    if a.blocks != "momentum":
        accum["blocks"] = layers(a.blocks)
    buffer = lambda form: {name: zeros(shape, form, BLOCK) for name, shape in stacks.items()}
    momentum = layers if a.blocks == "momentum" else buffer
    opt = {
        "blocks": (buffer(s.adam), buffer(s.adam)) if config.optim.matrix == "adamw" else momentum(s.momentum),
        "embed": (edge(s.adam), edge(s.adam)),
        "head": (edge(s.adam), edge(s.adam)),
    }
    if s.blocks in LEVELS and s.remainder:
        rows = {name: (*shape[:-1], shape[-1] * s.remainder // 8) for name, shape in stacks.items()}
        opt["remainder"] = {name: jnp.zeros(shape, jnp.uint8) for name, shape in rows.items()}
    params = layered(model.init_params(config, jax.random.key(config.train.seed)))
    return State(jnp.int32(0), params, opt, accum)


def layered(params: Any) -> Any:
    """`params` as the step takes them: below 8 bits `blocks` is a tuple of layers, not stacks of them.

    Out of a stack of 32 layers XLA copies words before it decodes them (d32: 67 MB a layer and microbatch, 2 % of a step).
    """
    first, *_ = params["blocks"].values()
    if not isinstance(first, Packed):
        return params
    return params | {"blocks": tuple(_at(params["blocks"], i) for i in range(first.shape[0]))}


def stacked(params: Any) -> Any:
    """The inverse of `layered`: `params` as everything but the step takes them."""
    if not isinstance(params["blocks"], tuple):
        return params
    stack = lambda *layers: jnp.stack(layers)
    return params | {"blocks": jax.jit(lambda layers: jax.tree.map(stack, *layers))(params["blocks"])}


def abstract_state(config: Config) -> State:
    """Shapes and dtypes of the state, nothing allocated."""
    return jax.eval_shape(lambda: init_state(config))


def block_bits(config: Config) -> tuple[float, float]:
    """Bits that a weight of the block matrices takes, scales and padding included: in params, and as a remainder."""
    m, state = config.model, abstract_state(config)
    weights = m.L * sum(math.prod(shape) for shape in m.shapes.values())
    stored, rest = (
        8 * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree)) / weights
        for tree in (state.params["blocks"], state.opt.get("remainder"))
    )
    return stored, rest


def _dtype(name: str) -> Any:
    return {"f32": jnp.float32, "bf16": jnp.bfloat16}[name]


def _at(tree: Any, i: Any) -> Any:
    take = lambda a: a[i] if isinstance(i, int) else lax.dynamic_index_in_dim(a, i, keepdims=False)
    return jax.tree.map(take, tree)


def _put(tree: Any, new: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, i, 0), tree, new)


def forward_backward(
    config: Config, params: Any, accum: Any, tokens_BT1: jax.Array, decay: jax.Array, weight: jax.Array, key: jax.Array
) -> tuple[jax.Array, Any]:
    """Loss sum (f32, nats) of one microbatch, and `accum` with its gradients added.

    The gradient is of the mean over the whole step's tokens. Block accumulators become decay*old + weight*gradient: 1 and 1,
    or, when they are the momentum m, m (at a step's first microbatch) and 1-m.
    """
    m = config.model
    scale = 1 / config.train.tokens_per_step
    tokens, targets = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    embed_key, head_key, block_key = jax.random.split(key, 3)
    x0 = model.apply(model.Embed(config), {"params": params}, tokens)
    x, saved = _forward(config, params["blocks"], x0)
    flat = x.reshape(-1, m.D)
    with jax.named_scope("loss"):
        loss, head, dx = loss_and_grads(
            config, params["head"], accum["head"], flat, targets.reshape(-1), scale, head_key
        )
    dx, blocks = dx.reshape(x0.shape), {name: list(layers) for name, layers in accum["blocks"].items()}
    noise = dither_vectors(block_key, max(size for shape in m.shapes.values() for size in shape))
    for i in reversed(range(m.L)):
        tree, leaves = saved.pop()
        # together with dx: XLA would else transpose every layer's parameters ahead of the microbatches, and share what is
        # recomputed from the residuals with forward, holding it for all layers (d32 in bf16: 1 GiB)
        kept = {j: leaf for j, leaf in enumerate(leaves) if not isinstance(leaf, int)}
        layer, kept, dx = _layer(params["blocks"], i, kept, dx)
        leaves = [kept.get(j, leaf) for j, leaf in enumerate(leaves)]
        own = jax.tree.leaves(layer)
        vjp = jax.tree.unflatten(tree, [own[leaf] if isinstance(leaf, int) else leaf for leaf in leaves])
        new = {}
        with jax.named_scope(f"backward_{i}"):
            dx, dws = vjp(dx)
            for j, (name, dw) in enumerate(dws.items()):
                new[name] = accumulate(blocks[name][i], dw, shifted(noise, i * len(dws) + j), decay, weight)
        # a layer is finished before the next begins: XLA would else join layers' sums and hold their dW until then
        dx, new = lax.optimization_barrier((dx, new))
        for name, total in new.items():
            blocks[name][i] = total
    embed = _embed_backward(params["embed"], accum["embed"], tokens, dx, embed_key)
    return loss, {"embed": embed, "blocks": {name: tuple(layers) for name, layers in blocks.items()}, "head": head}


def _forward(config: Config, blocks: Any, x: jax.Array) -> tuple[jax.Array, list[tuple[Any, list[Any]]]]:
    """The last block's output, and each layer's vjp as (tree, leaves); in place of a leaf that is the layer's own
    parameter stands its index."""
    block = model.rematerialised_block(config)
    taps = {name: jnp.zeros(shape, F32) for name, shape in config.model.shapes.items()}
    saved = []
    for i in range(config.model.L):
        # a constant index lets a product read its layer from the stack
        layer, x = _layer(blocks, i, x) if isinstance(blocks, tuple) else (_at(blocks, i), x)
        with jax.named_scope(f"layer_{i}"):
            x, vjp = jax.vjp(lambda x, taps, layer=layer: block(layer, x, taps), x, taps)
        leaves, tree = jax.tree.flatten(vjp)
        own = {id(leaf): j for j, leaf in enumerate(jax.tree.leaves(layer))}
        saved.append((tree, [own.get(id(leaf), leaf) for leaf in leaves]))
    return x, saved


def residual_bytes(config: Config) -> int:
    """Bytes that one microbatch's forward keeps for backward."""

    def kept(blocks: Any, x: jax.Array) -> list[jax.Array]:
        leaves = [leaf for _, leaves in _forward(config, blocks, x)[1] for leaf in leaves]
        return list({id(leaf): leaf for leaf in leaves if not isinstance(leaf, int)}.values())

    m = config.model
    x = jax.ShapeDtypeStruct((config.train.microbatch, m.T, m.D), _dtype(config.compute.dtype))
    return sum(a.size * a.dtype.itemsize for a in jax.eval_shape(kept, abstract_state(config).params["blocks"], x))


def _layer(blocks: Any, i: int, *values: Any) -> tuple[Any, ...]:
    """(layer i of `blocks`, *values), the layer tied to the values: nothing is computed with it before they are."""
    if isinstance(blocks, tuple):
        return lax.optimization_barrier((blocks[i], *values))
    index, *tied = lax.optimization_barrier((jnp.int32(i), *values))
    return _at(blocks, index), *tied


def _embed_backward(embed: Any, total_VD: jax.Array, tokens_BT: jax.Array, dx: jax.Array, key: jax.Array) -> jax.Array:
    """total plus the embedding's gradient: a token's occurrences are summed in f32 first, each row then rounded once."""
    tokens, dx = tokens_BT.reshape(-1), dx.reshape(-1, dx.shape[-1])
    rows = decode(jax.tree.map(lambda a: a[tokens], embed))
    r = inverse_rms(rows)
    drows = norm_backward(dx, rows * r, r)
    unique, place = jnp.unique(tokens, return_inverse=True, size=tokens.size, fill_value=total_VD.shape[0])
    sums = jnp.zeros(drows.shape, F32).at[place.reshape(-1)].add(drows)
    old = total_VD.at[unique].get(mode="clip")
    new = accumulate(old, sums, dither_vectors(key, max(old.shape)))
    return total_VD.at[unique].set(new, mode="drop", unique_indices=True)


def _squares(tree: Any) -> jax.Array:
    """Sum of squares."""
    return sum((jnp.sum(jnp.square(a.astype(F32))) for a in jax.tree.leaves(tree)), jnp.float32(0))


def _rows(config: Config) -> int:
    """Chunks in which embedding and head are updated: the fewest that divide V and keep one below ROWS_BYTES."""
    m = config.model
    least = math.ceil(m.V * m.D * 4 / ROWS_BYTES)
    return next(n for n in range(least, m.V + 1) if m.V % n == 0)


def _update_blocks(config: Config, state: State, totals: Any, clip: jax.Array, key: jax.Array) -> tuple[Any, Any, Any]:
    """(parameters, entries of opt, accumulators) of the blocks after Muon or AdamW."""
    blocks, opt, cleared = {}, {}, {}
    for j, (name, layers) in enumerate(totals.items()):
        blocks[name], opt[name], cleared[name] = _update_matrices(config, state, name, layers, clip, j, key)
        # one after the other: below 8 bits each holds its new layers twice
        blocks, opt, cleared, clip = lax.optimization_barrier((blocks, opt, cleared, clip))
    opt = {part: {name: o[part] for name, o in opt.items()} for part in next(iter(opt.values()))}
    if "blocks" in opt and config.optim.matrix == "adamw":
        opt["blocks"] = tuple({name: moments[i] for name, moments in opt["blocks"].items()} for i in range(2))
    if config.stored.blocks in LEVELS:
        blocks = tuple({name: layers[i] for name, layers in blocks.items()} for i in range(config.model.L))
    if config.accumulate.blocks == "momentum":
        return blocks, {"blocks": cleared} | opt, None
    return blocks, opt, cleared


def _update_matrices(
    config: Config, state: State, name: str, totals: tuple[jax.Array, ...], clip: jax.Array, j: int, key: jax.Array
) -> tuple[Any, Any, Any]:
    """_update_blocks for the matrices called `name`, the j-th of a layer, one layer at a time."""
    adamw, packed = config.optim.matrix == "adamw", config.stored.blocks in LEVELS
    tx: Any = optim.adamw(config, config.optim.matrix_lr) if adamw else optim.muon(config)
    folded, key = config.accumulate.blocks == "momentum", jax.random.fold_in(key, j)
    opt: dict[str, Any] = {}
    if not folded:  # else the accumulators are the momentum and stay
        opt["blocks"] = tuple(m[name] for m in state.opt["blocks"]) if adamw else state.opt["blocks"][name]
    if "remainder" in state.opt:
        opt["remainder"] = state.opt["remainder"][name]

    blocks = state.params["blocks"]
    branches = [lambda i=i: (totals[i], blocks[i][name] if packed else ()) for i in range(config.model.L)]

    def layer(carry: Any, i: jax.Array) -> tuple[Any, Any]:
        params, opt = carry
        keys = jax.random.split(jax.random.fold_in(key, i))
        total, p = lax.switch(i, branches)
        p, old, new = p if packed else _at(params, i), _at(opt, i), {}
        g = total.astype(F32) * clip
        tree = lambda x: {name: x}
        if adamw:
            before: Any = optim.AdamState(state.step, *map(tree, old["blocks"]))
        else:
            before = optim.MuonState(state.step, tree(g if folded else old["blocks"]))
        updates, after = optim.step(tx, tree(g), before, tree(p), keys[0])
        if not folded:
            new["blocks"] = (after.mu[name], after.nu[name]) if adamw else after.momentum[name]
        if packed:
            phase = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.train.seed), i), j)
            bits, rest = config.stored.remainder, {name: old["remainder"]} if "remainder" in old else {}
            p, rest = optim.apply_packed(tree(p), rest, updates, bits, phase, state.step)
            if bits:
                new["remainder"] = rest[name]
        else:
            p = optim.apply(tree(p), updates, config.stored.blocks, keys[1])
        p, new = lax.optimization_barrier((p[name], new))
        opt = _put(opt, new, i)
        return ((None, opt), p) if packed else ((_put(params, p, i), opt), None)

    carry = (None if packed else blocks[name], opt)
    (params, opt), layers = lax.scan(layer, carry, jnp.arange(config.model.L))
    if packed:
        params = tuple(_at(layers, i) for i in range(config.model.L))
    if folded:
        return params, opt, totals
    params, opt, totals = lax.optimization_barrier((params, opt, totals))
    return params, opt, jax.tree.map(jnp.zeros_like, totals)


def _update_rows(
    config: Config, lr: float, form: Any, step: jax.Array, carry: Any, clip: jax.Array, key: jax.Array
) -> tuple[Any, Any, Any]:
    """(parameters, (mu, nu), accumulator) [V,D] of embedding or head after AdamW, a chunk of rows at a time."""
    tx, n = optim.adamw(config, lr), _rows(config)
    split = lambda a: a.reshape(n, a.shape[0] // n, *a.shape[1:])

    def rows(carry: Any, i: jax.Array) -> tuple[Any, None]:
        params, (mu, nu), total = carry
        keys = jax.random.split(jax.random.fold_in(key, i))
        p, grads = _at(params, i), _at(total, i).astype(F32) * clip
        before = optim.AdamState(step, _at(mu, i), _at(nu, i))
        updates, new = optim.step(tx, grads, before, p, keys[0])
        p = optim.apply(p, updates, form, keys[1])
        cleared = jnp.zeros_like(_at(total, i))
        p, mu_i, nu_i, cleared = lax.optimization_barrier((p, new.mu, new.nu, cleared))
        return (_put(params, p, i), (_put(mu, mu_i, i), _put(nu, nu_i, i)), _put(total, cleared, i)), None

    out = lax.scan(rows, jax.tree.map(split, carry), jnp.arange(n))[0]
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)


def keyed_step(
    config: Config, state: State, tokens_ABT1: jax.Array, key: jax.Array
) -> tuple[State, dict[str, jax.Array]]:
    """One update. tokens int32 [A,B,T+1], A = config.microbatches; `key` only feeds stochastic rounding.

    Metrics, f32 scalars: loss (mean nats a token), grad_norm (before clipping; absent when gradients are summed into the
    momentum), lr (factor), momentum.
    """
    A = tokens_ABT1.shape[0]
    rate, momentum = optim.schedules(config)
    folded, m = config.accumulate.blocks == "momentum", momentum(state.step)
    accum = dict(state.accum)
    if folded:
        accum["blocks"] = state.opt["blocks"]

    def microbatch(carry: Any, inputs: Any) -> tuple[Any, None]:
        accum, loss = carry
        i, tokens = inputs
        decay = jnp.where(i == 0, m, 1.0) if folded else jnp.float32(1)
        weight = jnp.where(folded, 1 - m, 1.0)
        more, accum = forward_backward(config, state.params, accum, tokens, decay, weight, jax.random.fold_in(key, i))
        return (accum, loss + more), None

    (accum, loss), _ = lax.scan(microbatch, (accum, jnp.float32(0)), (jnp.arange(A), tokens_ABT1))
    metrics = {"loss": loss / config.train.tokens_per_step, "lr": rate(state.step), "momentum": m}
    clip = jnp.float32(1)
    if not folded:
        norm = jnp.sqrt(sum((_squares(accum[n]) for n in ("blocks", "embed", "head")), jnp.float32(0)))
        metrics["grad_norm"] = norm
        if config.optim.clip:
            clip = jnp.minimum(1.0, config.optim.clip / (norm + 1e-6))
    keys = jax.random.split(jax.random.fold_in(key, A), 3)
    with jax.named_scope(config.optim.matrix):
        blocks, opt, totals = _update_blocks(config, state, accum["blocks"], clip, keys[0])
    params, cleared = {"blocks": blocks}, {}
    for k, name, lr in ((keys[1], "embed", config.optim.embed_lr), (keys[2], "head", config.optim.head_lr)):
        carry = (state.params[name], state.opt[name], accum[name])
        form = getattr(config.stored, name)
        with jax.named_scope(f"adamw_{name}"):
            params[name], opt[name], cleared[name] = _update_rows(config, lr, form, state.step, carry, clip, k)
    if not folded:
        cleared["blocks"] = totals
    return State(state.step + 1, params, opt, cleared), metrics


def train_step(config: Config) -> Callable[[State, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """`keyed_step` as the loop calls it, (state, tokens_ABT1) -> (state, metrics): jit with donate_argnums=0.

    Its key is fold_in(key(seed + 1), step), so a resumed run rounds as the uninterrupted one.
    """

    def step(state: State, tokens_ABT1: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.train.seed + 1), state.step)
        return keyed_step(config, state, tokens_ABT1, key)

    return step


def compiled(config: Config) -> Any:
    """`train_step` compiled for jax's default device before any state exists: a GPU's autotuning wants scratch memory."""
    tokens = jax.ShapeDtypeStruct(config.batch_shape, jnp.int32)
    lowered = jax.jit(train_step(config), donate_argnums=0).lower(abstract_state(config), tokens)
    return compiled_for_gpu(lowered) if jax.default_backend() == "gpu" else lowered.compile()


def compiled_for_gpu(lowered: Any, options: dict[str, Any] | None = None) -> Any:
    """`lowered` compiled with GPU_OPTIONS, or, where XLA fails with them (it does on matrices of width 256 or 512), without."""
    try:
        return lowered.compile(compiler_options={**GPU_OPTIONS, **(options or {})})
    except (jax.errors.JaxRuntimeError, IndexError):  # what else is wrong is wrong without them, too
        return lowered.compile(compiler_options=options)
