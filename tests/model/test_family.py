"""The seam for a second model: unequal layers, things that all layers read, and gradients of these without a line by hand."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax import model, step, weights
from nanojax.config import Config
from nanojax.model import family, gpt
from nanojax.model.seam import Family
from nanojax.ops.linear import float_dtype, linear
from nanojax.quant import decode
from nanojax.step import optim

KEY = jax.random.key(5)


def table(m: weights.Sizes) -> weights.Table:
    """gpt's weights, a second embedding, a mixing pair in layers 0 and 2, a matrix in layer 1, and one gate for all."""
    return weights.gpt(m) | {
        "value": weights.Weight((m.V, m.D), "rows", weights.Init(0.5), "embed", "embed_head", "embed"),
        "mix": weights.Weight((2,), "layer", weights.Init(0.3), "embed", "embed_head", "embed", (0, 2)),
        "extra": weights.Weight((m.D, m.D), "layer", weights.Init(0.1), "blocks", "blocks", "matrix", (1,)),
        "gate": weights.Weight((1,), "shared", weights.Init(0.4), "head", "embed_head", "head"),
    }


def tapped(held: Any, taps: Any, name: str) -> jax.Array:
    """A small weight as floats; its tap takes its gradient."""
    return decode(held[name]) + (0 if taps is None else taps[name])


def enter(config: Config, rows: Any, before: Any, params: Any, taps: Any) -> tuple[jax.Array, Any]:
    """The gated embedding. Every layer may read it again, and the second embedding's rows."""
    x, _ = gpt.enter(config, rows, before, params, taps)
    x = x * (1 + tapped(params, taps, "gate"))[None, None].astype(x.dtype)
    return x, {"x0": x, "value": rows["value"]}


def block(
    config: Config,
    i: int,
    layer: Any,
    taps: Any,
    rows: Any,
    x_BTD: jax.Array,
    shared: Any,
    attend: Any,
    start: Any = None,
) -> tuple[jax.Array, Any, Any]:
    """gpt's block after what this layer's own weights do."""
    own = {"qkv", "o", "up", "down"}
    x = x_BTD
    some = lambda held: {name: w for name, w in held.items() if name in own}
    if "mix" in layer:
        keep, again = tapped(layer, taps, "mix").astype(x.dtype)
        x = x * (1 + keep) + shared["x0"] * again
    if "extra" in layer:
        tap = None if taps is None else taps["extra"]
        value = shared["value"].reshape(-1, x.shape[-1]).astype(x.dtype)
        added: Any = linear(config.compute, "extra", layer["extra"], tap, value, x.reshape(value.shape))
        x = added.reshape(x.shape)
    taps = None if taps is None else some(taps)
    return gpt.block(config, i, some(layer), taps, rows, x, shared, attend, start)


def leave(config: Config, params: Any, taps: Any, x_BTD: jax.Array, shared: Any) -> jax.Array:
    """Takes some of the first residual stream out again."""
    del config
    return x_BTD - tapped(params, taps, "gate")[None, None].astype(x_BTD.dtype) * shared["x0"]


def drawn(config: Config, key: jax.Array, names: list[str]) -> dict[str, jax.Array]:
    """The table's draw of some weights."""
    rows = table(config.model)
    keys = dict(zip(names, jax.random.split(key, len(names))))
    return {name: gpt.initializer(rows[name])(k, rows[name].shape) for name, k in keys.items()}


def init_layer(config: Config, has: weights.Table, i: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    """gpt's weights and the layer's own; the mixing pair depends on how deep the layer is."""
    more = drawn(config, key, [name for name in has if name in ("mix", "extra")])
    if "mix" in more:
        more["mix"] = 0.1 * i.astype(jnp.float32) + jnp.zeros(2)
    return gpt.init_layer(config, has, i, key) | more


def init_once(config: Config, embed_key: jax.Array, head_key: jax.Array) -> dict[str, jax.Array]:
    """gpt's weights and two more."""
    return gpt.init_once(config, embed_key, head_key) | drawn(config, embed_key, ["value", "gate"])


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """nanojax with this file's model in the place of gpt."""
    monkeypatch.setattr(weights, "table", table)
    made = Family(enter, block, leave, init_layer, init_once)
    monkeypatch.setattr(family, "of", lambda config: made)


def floats(config: Config) -> Any:
    """Random f32 parameters without zeros."""
    params = model.init_params(config, KEY)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    return jax.tree.unflatten(tree, [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys)])


@pytest.mark.long
@pytest.mark.parametrize("residuals", [pytest.param("inputs", marks=pytest.mark.slow), "all"])
def test_every_gradient_equals_whole_model_grad(tiny: Callable[..., Config], second: None, residuals: str) -> None:
    """Of all ten weights, those shared by layers included, 1e-5 relative in f32; sums over two microbatches."""
    config = tiny(model={"depth": 3}, compute={"residuals": residuals})
    params, tokens = floats(config), jax.random.randint(KEY, config.batch_shape, 0, config.model.V)
    rows = tokens.reshape(-1, tokens.shape[-1])
    want = jax.jit(jax.grad(lambda p: jnp.mean(model.token_losses(config, p, rows))))(params)
    accum = step.init_state(config).accum
    run = jax.jit(lambda accum, rows: step.forward_backward(config, params, accum, rows, None, {}, KEY)[1])
    for part in tokens:
        accum = run(accum, part)
    for name, weight in table(config.model).items():
        for place, i in enumerate(weight.layers) if weight.use == "layer" else [(0, None)]:
            got, expected = (accum[name], want[name]) if i is None else (accum[name][place], want["blocks"][i][name])
            assert float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)) < 1e-5, (name, i)


@pytest.mark.slow
def test_it_trains_in_low_bits_and_donates_everything(tiny: Callable[..., Config], second: None) -> None:
    """int8 matrices and tables of this model: 20 steps on one batch halve the loss, and every byte of state is reused."""
    config = tiny(
        model={"depth": 3},
        stored={"blocks": "int8", "momentum": "int8"},
        accumulate={"blocks": "bf16", "embed_head": "bf16"},
        compute={"dtype": "bf16", "forward": "int8", "dx": "int8", "dw": "int8"},
    )
    state = jax.jit(lambda: step.init_state(config))()
    tokens = step.Batch(jax.random.randint(KEY, config.batch_shape, 0, config.model.V))
    run = jax.jit(functools.partial(step.train_step, config), donate_argnums=0).lower(state, tokens).compile()
    memory: Any = run.memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    losses = []
    for _ in range(20):
        state, metrics = run(state, tokens)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 2, losses
    assert [sorted(layer) for layer in state.params["blocks"]] == [
        ["down", "mix", "o", "qkv", "up"],
        ["down", "extra", "o", "qkv", "up"],
        ["down", "mix", "o", "qkv", "up"],
    ]


@pytest.mark.long
def test_initialisation_knows_the_layer(tiny: Callable[..., Config], second: None) -> None:
    """Layers with the same weights are drawn together, and each still gets its own number."""
    params = model.init_params(tiny(model={"depth": 3}), KEY)
    np.testing.assert_allclose(params["blocks"][0]["mix"], [0.0, 0.0])
    np.testing.assert_allclose(params["blocks"][2]["mix"], [0.2, 0.2], rtol=1e-6)


@pytest.mark.long
def test_cached_decoding_takes_the_same_walk(tiny: Callable[..., Config], second: None) -> None:
    """A prompt, then one token at a time: logits equal the whole forward pass to 1e-5."""
    config = tiny(model={"depth": 3})
    params, tokens = floats(config), jax.random.randint(KEY, (2, 12), 0, config.model.V)
    want = model.forward(config, params, tokens)
    got, cache = model.forward_cached(
        config, params, tokens[:, :8], model.empty_cache(config, 2, 12), jnp.int32(0), None
    )
    parts = [got]
    for t in range(8, 12):
        got, cache = model.forward_cached(config, params, tokens[:, t : t + 1], cache, jnp.int32(t), tokens[:, t - 1])
        parts.append(got)
    np.testing.assert_allclose(np.concatenate(parts, 1), want, atol=1e-5)


def test_a_weight_without_a_group_fails(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose group does not exist stops the state from being made, and the message names both."""
    lost = lambda m: (
        weights.gpt(m) | {"lost": weights.Weight((4, 4), "shared", weights.Init(), "head", "embed_head", "nobody")}
    )
    monkeypatch.setattr(weights, "table", lost)
    with pytest.raises(ValueError, match="weight lost: no optimizer group 'nobody'"):
        step.init_state(tiny())
    with pytest.raises(TypeError, match="group"):
        weights.Weight((4, 4), "shared", weights.Init(), "head", "embed_head")  # pyright: ignore[reportCallIssue]


def test_a_removed_weight_is_seen(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its row, a weight that the layers read stops the initialisation."""
    config = tiny()
    monkeypatch.setattr(weights, "table", lambda m: {n: w for n, w in weights.gpt(m).items() if n != "up"})
    with pytest.raises(KeyError, match="up"):
        model.init_params(config, KEY)


def test_state_is_the_table(tiny: Callable[..., Config]) -> None:
    """Parameters, moments and accumulators have exactly the table's names and shapes, and every group is used."""
    config = tiny(stored={"blocks": "int8"})
    state, rows = step.abstract_state(config), weights.table(config.model)
    once = {name for name, weight in rows.items() if weight.use != "layer"}
    assert set(state.params) == once | {"blocks"}
    assert [set(layer) for layer in state.params["blocks"]] == [set(rows) - once] * config.model.L
    assert set(state.opt) == set(state.accum) == set(rows)
    assert {weight.group for weight in rows.values()} == set(optim.groups(config))
    chex.assert_tree_shape_prefix(state.opt["up"], (config.model.L,))
    for name, weight in rows.items():
        stored = [layer[name] for layer in state.params["blocks"]] if weight.use == "layer" else [state.params[name]]
        assert all(p.shape == weight.shape for p in stored)
    assert weights.parameters(config.model) == config.model.parameters
    assert float_dtype(config.compute) == jnp.float32
