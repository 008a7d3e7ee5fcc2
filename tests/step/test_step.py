"""The production step against the obvious one: whole-model jax.grad and the same optax update."""

import functools
from collections.abc import Callable
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanojax import model, quant, step, weights
from nanojax.config import Config
from nanojax.step import optim, update

KEY = jax.random.key(3)


def batch(config: Config, seed: int = 0) -> step.Batch:
    """Random tokens of the config's batch shape."""
    return step.Batch(jax.random.randint(jax.random.key(seed), config.batch_shape, 0, config.model.V))


def perturbed(state: step.State, config: Config) -> step.State:
    """The state with every matrix non-zero (nanojax starts some at zero), as stored."""
    table = weights.table(config.model)
    floats = quant.decode_tree(state.params)
    noisy = jax.tree.map(lambda a, k: a + 0.1 * jax.random.normal(k, a.shape), floats, _keys(floats))
    form = lambda name: getattr(config.stored, table[name].stored)
    params = {name: quant.encode(w, form(name)) for name, w in noisy.items() if name != "blocks"}
    blocks = tuple({name: quant.encode(w, form(name)) for name, w in layer.items()} for layer in noisy["blocks"])
    return state._replace(params={**params, "blocks": blocks})


def _keys(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, list(jax.random.split(KEY, len(leaves))))


def obvious(
    config: Config, params: Any, opt: dict[str, Any], count: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array, Any, dict[str, Any]]:
    """(loss, norm, f32 params, optimizer states) by jax.grad of the whole model, optax.adamw, and Muon on each matrix."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    value, grads = jax.value_and_grad(lambda p: jnp.mean(model.token_losses(config, p, rows)))(params)
    norm = optax.tree.norm(grads)
    # torch's clip_grad_norm_
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, config.optim.clip / (norm + 1e-6)), grads)
    table, group, o = weights.table(config.model), optim.groups(config), config.optim
    blocks, new_opt = [dict(layer) for layer in params["blocks"]], {}
    for i, layer in enumerate(grads["blocks"]):
        for name, g in layer.items():
            tx = optim.muon(config, group["matrix"], table[name].parts)
            before: Any = optim.OptState(count, {"momentum": opt[name]["momentum"][i]})
            update, after = tx.update(g, before, key=KEY)
            blocks[i][name] = blocks[i][name] + update
            new_opt.setdefault(name, {"momentum": []})["momentum"].append(cast(Any, after).moments["momentum"])
    new = {"blocks": tuple(blocks)}
    rate, _ = optim.schedules(config)
    for name, lr in (("embed", o.embed_lr), ("head", o.head_lr)):
        lr = lr * (config.model.D / 768) ** -0.5
        aw = optax.adamw(lambda t, lr=lr: lr * rate(t), o.beta1, o.beta2, o.eps, weight_decay=o.weight_decay)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            state = opt[name] if isinstance(opt[name], tuple) else aw.init(params[name])
            u, new_opt[name] = aw.update(grads[name], state, params[name])
        new[name] = params[name] + u
    return value, norm, new, new_opt


def adamw_by_formula(config: Config, p: jax.Array, lr: float, i: int, moments: Any) -> jax.Array:
    """Parameters after step i (from 0) of AdamW without decay whose moments, this step's included, are given; by float64."""
    o, rate = config.optim, float(np.asarray(optim.schedules(config)[0](i)))
    mu, nu = (np.asarray(moments[name], np.float64) for name in ("mu", "nu"))
    mean, square = mu / (1 - o.beta1 ** (i + 1)), nu / (1 - o.beta2 ** (i + 1))
    step = lr * (config.model.D / 768) ** -0.5 * rate * mean / (np.sqrt(square) + o.eps)
    return jnp.asarray(np.asarray(p, np.float64) - step, jnp.float32)


def by_layer(config: Config, accum: dict[str, Any]) -> Any:
    """Accumulators in the tree of the parameters."""
    table = weights.table(config.model)
    blocks = tuple({name: accum[name][i] for name in weights.layer_weights(table, i)} for i in range(config.model.L))
    return {name: a for name, a in accum.items() if table[name].use != "layer"} | {"blocks": blocks}


def relative(a, b):
    return jax.tree.map(lambda x, y: float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)), a, b)


@pytest.mark.long
@pytest.mark.parametrize(
    "policy,depth,microbatch",
    [
        ("cheap", 2, 2),
        ("attn+mlp_in", 3, 2),
        pytest.param("inputs", 2, 4, marks=pytest.mark.slow),
        pytest.param("all", 4, 1, marks=pytest.mark.slow),
    ],
)
def test_step_equals_whole_model_grad(tiny, policy, depth, microbatch):
    """Three f32 steps: loss, norm, parameters and momentum equal jax.grad + optax to 1e-6 relative (weights: 3e-6).

    Newton-Schulz multiplies rounding differences of the gradient by up to 3.4^5 along small singular directions, hence
    the parameters' bound; the gradient itself is held to 1e-6 below. AdamW divides a gradient by its own size, so that rounding
    of a value with a small one is seen in full: 95% of an embedding's squared difference was one value. So of embedding and
    head the moments, linear and quadratic in the gradients, are held to the oracle's, and the parameters to the formula.
    """
    config = tiny(
        model={"depth": depth}, train={"microbatch": microbatch, "tokens_per_step": 256}, compute={"residuals": policy}
    )
    state = perturbed(step.init_state(config), config)
    run = jax.jit(functools.partial(step.train_step, config))
    want = jax.jit(obvious, static_argnums=0)
    params, opt = state.params, state.opt
    for i in range(3):
        value, norm, params, opt = want(config, params, opt, jnp.int32(i), batch(config, i).tokens)
        before = state.params
        state, metrics = run(state, batch(config, i))
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=3e-6)
        for name, lr in (("embed", config.optim.embed_lr), ("head", config.optim.head_lr)):
            params[name] = adamw_by_formula(config, before[name], lr, i, state.opt[name])
            oracle: Any = opt[name]
            for moment in ("mu", "nu"):
                assert relative(state.opt[name][moment], getattr(oracle[0], moment)) < 3e-6, (name, moment)
        assert max(jax.tree.leaves(relative(state.params, params))) < 3e-6
        params |= {name: state.params[name] for name in ("embed", "head")}
    assert int(state.step) == 3
    for name in ("qkv", "o", "up", "down"):
        assert relative(state.opt[name]["momentum"], jnp.stack(opt[name]["momentum"])) < 3e-6
    assert all(not np.any(a) for a in jax.tree.leaves(state.accum))


@pytest.mark.long
@pytest.mark.parametrize("stored", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("policy", ["inputs", "all"])
def test_gradient_of_any_stored_format(tiny, stored, policy):
    """With f32 compute, the accumulated gradient of parameters stored in any format equals jax.grad at their decoded values,
    1e-6 relative."""
    config = tiny(stored={"blocks": stored, "embed": stored, "head": stored}, compute={"residuals": policy})
    state = perturbed(step.init_state(config), config)
    tokens, floats = batch(config).tokens, quant.decode_tree(state.params)
    rows = tokens.reshape(-1, tokens.shape[-1])
    want = jax.jit(jax.grad(lambda p: jnp.mean(model.token_losses(config, p, rows))))(floats)
    got = state.accum
    run = jax.jit(lambda accum, rows: step.forward_backward(config, state.params, accum, rows, None, {}, KEY)[1])
    for i in range(tokens.shape[0]):
        got = run(got, tokens[i])
    assert max(jax.tree.leaves(relative(by_layer(config, got), want))) < 1e-6


@pytest.mark.long
def test_weights_per_target(tiny: Callable[..., Config]) -> None:
    """A step whose targets are weighted: the loss is sum(weights*nll) and the parameters those of jax.grad of it (3e-6), masked
    targets included; weights of 1 over the step's tokens give the unweighted step (1e-6)."""
    config = tiny()
    state, plain = perturbed(step.init_state(config), config), batch(config)
    shape = (*plain.tokens.shape[:-1], plain.tokens.shape[-1] - 1)
    drawn = jax.random.uniform(KEY, shape) * (jax.random.uniform(jax.random.key(9), shape) < 0.4).astype(jnp.float32)
    run = jax.jit(functools.partial(step.train_step, config))

    accum = state.accum
    fold = jax.jit(lambda accum, tokens, w: step.forward_backward(config, state.params, accum, tokens, w, {}, KEY))
    total = jnp.float32(0)
    for tokens, w in zip(plain.tokens, drawn):
        loss, accum = fold(accum, tokens, w)
        total += loss
    rows, flat = plain.tokens.reshape(-1, shape[-1] + 1), drawn.reshape(-1, shape[-1])
    weighted = lambda p: jnp.sum(flat * model.token_losses(config, p, rows))
    want, grads = jax.jit(jax.value_and_grad(weighted))(state.params)
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert max(jax.tree.leaves(relative(by_layer(config, accum), grads))) < 3e-6

    even = step.Batch(plain.tokens, jnp.full(shape, 1 / config.train.tokens_per_step))
    a, b = run(state, plain), run(state, even)
    np.testing.assert_allclose(a[1]["loss"], b[1]["loss"], rtol=1e-6)
    np.testing.assert_allclose(a[1]["grad_norm"], b[1]["grad_norm"], rtol=1e-6)


@pytest.mark.slow  # 256 steps a case
@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("folded", [False, True])
def test_rounded_storage_is_right_in_the_mean(tiny, form, folded):
    """One step with rounded parameters, averaged over 256 keys, is the unrounded step: bias below 0.05 grid-sized sigma.

    z scores over all entries must look normal: at most 0.1% beyond 4.5 sigma, mean square below 1.5.
    """
    optim_keys = {"embed_lr": 0.02, "matrix_lr": 0.005} | ({"nesterov": False, "clip": 0.0} if folded else {})
    same = {"optim": optim_keys, "accumulate": {"blocks": "momentum" if folded else "f32"}}
    config = tiny(stored={"blocks": form, "embed": form, "head": form}, **same)
    state, tokens = perturbed(step.init_state(config), config), batch(config)
    floats = state._replace(params=quant.decode_tree(state.params))
    want = jax.jit(step.train_step, static_argnums=0)(tiny(**same), floats, tokens, KEY)[0].params
    once = lambda key: quant.decode_tree(step.train_step(config, state, tokens, key)[0].params)
    many = jax.jit(lambda keys: jax.lax.map(once, keys))(jax.random.split(KEY, 256))
    for got, target in zip(jax.tree.leaves(many), jax.tree.leaves(want)):
        got = np.asarray(got, np.float64)
        sigma = np.maximum(got.std(0), 0.3 * np.sqrt(got.var(0).mean())) / 16 + 2e-6  # seldom rounded: too few events
        z = (got.mean(0) - np.asarray(target, np.float64)) / sigma
        assert np.mean(np.abs(z) > 4.5) < 1e-3 and np.mean(z**2) < 1.5, (np.abs(z).max(), np.mean(z**2))


@pytest.mark.slow  # 1,024 microbatches
def test_bf16_accumulators_are_right_in_the_mean(tiny):
    """16 microbatches summed in dithered bf16: off by under 0.8% of the f32 sum (1.6% for the head, to which each adds four
    chunks: errors grow with the root), and averaged over 64 keys by under a quarter of that, or under what rounding to
    nearest errs by: so the first sum is rounded, as its accumulator is zero."""
    config = tiny(train={"tokens_per_step": 1024}, accumulate={"blocks": "bf16", "embed_head": "bf16"})
    exact = tiny(train={"tokens_per_step": 1024})
    state, tokens = perturbed(step.init_state(config), config), batch(config)

    def total(c, accum, key):
        def add(accum, inputs):
            i, rows = inputs
            return step.forward_backward(c, state.params, accum, rows, None, {}, jax.random.fold_in(key, i))[1], None

        return jax.lax.scan(add, accum, (jnp.arange(16), tokens.tokens))[0]

    want = jax.jit(lambda: total(exact, step.init_state(exact).accum, KEY))()
    many = jax.jit(lambda keys: jax.lax.map(lambda k: total(config, state.accum, k), keys))(jax.random.split(KEY, 64))
    for (path, got), target in zip(jax.tree.leaves_with_path(many), jax.tree.leaves(want)):
        got, target = np.asarray(got, np.float64), np.asarray(target, np.float64)
        error = lambda x, target=target: np.linalg.norm(x - target) / np.linalg.norm(target)
        assert error(got[0]) < (0.016 if path[0].key == "head" else 0.008)
        # a row of the embedding is summed once or twice: 2^-7 of its power of two, uniform, against 1.5 times that
        assert error(got.mean(0)) < max(error(got[0]) / 4, 2**-7 / 12**0.5 / 1.5)


@pytest.mark.long
def test_folded_momentum_equals_heavy_ball(tiny):
    """Gradients summed into the momentum give the parameters of a separate accumulator, five f32 steps, 1e-5 relative."""
    folded = tiny(accumulate={"blocks": "momentum"}, optim={"nesterov": False, "clip": 0.0})
    apart = tiny(optim={"nesterov": False, "clip": 0.0})
    a, b = step.init_state(folded), step.init_state(apart)
    run_a, run_b = (
        jax.jit(functools.partial(step.train_step, folded)),
        jax.jit(functools.partial(step.train_step, apart)),
    )
    for i in range(5):
        a, _ = run_a(a, batch(apart, i))
        b, _ = run_b(b, batch(apart, i))
    assert set(a.accum) == {"embed", "head"}
    assert max(jax.tree.leaves(relative(a.params, b.params))) < 1e-5
    for name in ("qkv", "o", "up", "down"):
        assert relative(jnp.stack(a.opt[name]["momentum"]), b.opt[name]["momentum"]) < 1e-5


FORMATS = {
    "f32": {},
    "bf16": {
        "stored": {"blocks": "bf16", "embed": "bf16", "head": "bf16", "momentum": "bf16", "adam": "bf16"},
        "accumulate": {"blocks": "bf16", "embed_head": "bf16"},
        "compute": {"dtype": "bf16"},
    },
    "int8": {
        "stored": {"blocks": "int8", "embed": "int8", "head": "int8", "momentum": "int8", "adam": "int8"},
        "accumulate": {"blocks": "bf16", "embed_head": "bf16"},
        "compute": {"dtype": "bf16", "forward": "int8", "dx": "int8", "dw": "int8", "head": "int8", "residuals": "all"},
    },
    "folded": {
        "stored": {"blocks": "int8", "embed": "bf16", "head": "bf16", "momentum": "bf16", "adam": "int8"},
        "accumulate": {"blocks": "momentum", "embed_head": "bf16"},
        "optim": {"nesterov": False, "clip": 0.0},
        "compute": {"dtype": "bf16", "forward": "int8", "dx": "int8", "dw": "int8", "residuals": "all"},
    },
}
NEWEST = {"model": {"family": "2026", "width": 64, "window": 8}}
NORMUON = {"muon": "normuon", "matrix_decay": 0.3}  # with the rates of 2^19 tokens per step at 128
NORMUON |= {"matrix_lr": 0.02 * 64, "embed_lr": 0.3 * 64, "head_lr": 0.008 * 64}
FORMATS |= {
    "2026": NEWEST | {"optim": NORMUON},
    "2026 int8": FORMATS["int8"] | NEWEST | {"stored": FORMATS["int8"]["stored"] | {"value": "int8"}, "optim": NORMUON},
    "2026 b2.67": FORMATS["int8"]
    | NEWEST
    | {"stored": FORMATS["int8"]["stored"] | {"blocks": "b2.67", "value": "bf16"}, "optim": NORMUON},
    "2026 folded": FORMATS["folded"] | NEWEST | {"optim": FORMATS["folded"]["optim"] | NORMUON},
}


@pytest.mark.long
@pytest.mark.parametrize(
    "formats",
    [
        "2026 int8",
        *(pytest.param(f, marks=pytest.mark.slow) for f in FORMATS if f != "2026 int8"),
    ],
)
def test_donated_completely_and_learns(tiny, formats):
    """Every byte of the state is aliased by the compiled step; 20 steps on one batch bring the loss below a third."""
    config = tiny(**FORMATS[formats])
    state = jax.jit(lambda: step.init_state(config))()
    bytes_ = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    run = jax.jit(functools.partial(step.train_step, config), donate_argnums=0).lower(state, batch(config)).compile()
    memory: Any = run.memory_analysis()
    assert memory.alias_size_in_bytes == bytes_
    losses = []
    for _ in range(20):
        state, metrics = run(state, batch(config))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 3, losses


@pytest.mark.long
def test_residual_bytes_are_what_the_names_say(tiny):
    """int8, everything kept: 12D + F bytes of codes, q, k, v and attention's output a token and layer, and f32 values a row:
    four scales, two norms' and, a head, q's and k's norms and the log-sum-exp. Inputs only: 2D."""
    config = tiny(**FORMATS["int8"])
    m, tokens = config.model, config.train.microbatch * config.model.T * config.model.L
    want = 3 * m.D + 6 * m.D + 2 * m.D + m.F + 4 * (4 + 2 + 3 * m.N)
    assert step.residual_bytes(config) == pytest.approx(tokens * want, rel=0.01)
    inputs = tiny(**FORMATS["int8"] | {"compute": FORMATS["int8"]["compute"] | {"residuals": "inputs"}})
    assert step.residual_bytes(inputs) == pytest.approx(tokens * 2 * m.D, rel=0.01)


@pytest.mark.long
def test_abstract_state_is_the_state(tiny):
    """abstract_state has the tree, shapes and dtypes of init_state, for the format with most leaves."""
    config = tiny(**FORMATS["int8"])
    chex.assert_trees_all_equal_shapes_and_dtypes(step.abstract_state(config), step.init_state(config))


@pytest.mark.long
def test_same_seed_same_bits(tiny):
    """Two runs of the int8 step from one seed agree bit for bit; another seed differs."""
    config, other = tiny(**FORMATS["int8"]), tiny(**FORMATS["int8"], train={"seed": 1})
    run = jax.jit(functools.partial(step.train_step, config))
    once = lambda: run(run(step.init_state(config), batch(config))[0], batch(config, 1))[0]
    a = once()
    chex.assert_trees_all_equal(a, once())
    b = step.init_state(other)
    assert not np.array_equal(a.params["blocks"][0]["up"].codes, b.params["blocks"][0]["up"].codes)


@pytest.mark.long
def test_embedding_and_head_rows_in_chunks(tiny, monkeypatch):
    """Updating embedding and head in 8 chunks of rows gives the same f32 values as in one, 1e-6."""
    config = tiny()
    state, tokens = step.init_state(config), batch(config)
    run = lambda: jax.jit(lambda: step.train_step(config, state, tokens, KEY)[0])()
    whole = run()
    monkeypatch.setattr(update, "ROWS_BYTES", config.model.V * config.model.D * 4 // 8)
    parts = run()
    chex.assert_trees_all_close(parts, whole, rtol=1e-6, atol=1e-9)


def test_init_follows_nanochat(tiny):
    """Standard deviations of each tensor at initialisation, 3%: embedding 1, q/k/v and up as published, the rest zero."""
    params = model.init_params(tiny(model={"width": 128}), KEY)
    np.testing.assert_allclose(np.std(params["embed"]), 1.0, rtol=0.03)
    for layer in params["blocks"]:
        np.testing.assert_allclose(np.std(layer["qkv"]), 128**-0.5, rtol=0.03)
        np.testing.assert_allclose(np.std(layer["up"]), 128**-0.5, rtol=0.03)
        assert not np.any(layer["o"]) and not np.any(layer["down"])
    assert not np.any(params["head"])
