"""Formats below 8 bits: exact packing and re-encoding, errors as theory says, even dither, training that works."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax import config as configs
from nanojax import config_rules, model, quant, step
from nanojax.cli import UserError
from nanojax.config import Compute, Config, Format, Model, Optim, Stored, Train
from nanojax.quant import packed
from nanojax.quant.rounding import dither

KEY = jax.random.key(0)
FORMS = list(packed.LEVELS)
SOME = ["nf4", "b2.67"]  # uneven and even levels
BITS: list[Literal[0, 2, 4]] = [0, 2, 4]  # of remainders


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.parametrize("K", [64, 192, 2048])
@pytest.mark.parametrize("form", FORMS)
def test_packing_is_exact(form: str, K: int):
    """unpack(pack(codes)) is codes, for random ones and for the largest code everywhere (the words' highest bits)."""
    top = len(packed.LEVELS[form]) - 1
    for codes in (jax.random.randint(KEY, (3, 5, K), 0, top + 1), jnp.full((3, 5, K), top)):
        words = packed.pack(codes, form)
        assert (words.shape[-1], words.dtype) == packed.words_of(form, K)
        np.testing.assert_array_equal(packed.unpack(words, form, K), codes)


@pytest.mark.long
def test_bits_count_everything():
    """Bits a value, from the bytes of real arrays of d32's row: 4.25, 3.25 and 2.92."""
    for form, expected in {"int4": 4.25, "nf4": 4.25, "int3": 3.25, "b2.67": 171 * 32 / 2048 + 0.25}.items():
        q = packed.encode(normal(4, 2048), form)
        assert 8 * (q.words.nbytes + q.scale.nbytes) / (4 * 2048) == expected


@pytest.mark.parametrize("form", FORMS)
def test_encoding_again_is_exact(form: str):
    """Decoded values encode to the same words and scales, to nearest and with any noise."""
    q = packed.encode(normal(16, 256), form)
    x, noise = packed.decode(q), jax.random.uniform(KEY, (16, 256), minval=1e-4, maxval=1 - 1e-4)
    for again in (packed.encode(x, form), packed.encode(x, form, noise)):
        np.testing.assert_array_equal(again.words, q.words)
        np.testing.assert_array_equal(again.scale, q.scale)


@pytest.mark.long
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", SOME)
def test_hundred_updates_of_nothing(form: str, bits: int):
    """Words, remainders and scales of normal data stay what they are, bit for bit, through 100 updates by zero."""
    old = packed.encode(normal(64, 256), form)
    first = packed.encode_fine(normal(64, 256), jax.random.uniform(KEY, (64, 256)), old, bits)

    def update(stored: Any, i: jax.Array) -> tuple[Any, None]:
        noise = jnp.clip(dither(KEY, i, (64, 256)), 2e-4, 1 - 2e-4)
        return packed.encode_fine(packed.decode_fine(stored[0], stored[1], bits), noise, stored[0], bits), None

    last, _ = jax.jit(lambda stored: jax.lax.scan(update, stored, jnp.arange(100)))(first)
    jax.tree.map(np.testing.assert_array_equal, last, first)


@pytest.mark.long
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", SOME)
def test_fine_grid(form: str, bits: int):
    """Against numpy, where a scale is held: encode_fine rounds to one of the two neighbours on the grid that linear
    interpolation between levels gives; products read the level nearest to that; the mean over even noise is x (1/200 step)."""
    table, points = np.asarray(packed.LEVELS[form]), 2**bits
    x = np.asarray(normal(8, 128, seed=4))
    middle = jnp.full(x.shape, 0.5)
    old, _ = packed.encode_fine(jnp.asarray(x), middle, packed.encode(jnp.asarray(x), form), bits)
    scale = np.repeat(np.asarray(old.scale.astype(jnp.float32)), 64, -1)
    longer = np.r_[2 * table[0] - table[1], table, 2 * table[-1] - table[-2]]
    places = (np.arange(points * len(table)) - (points - 1) / 2) / points
    grid = np.interp(places, np.arange(-1, len(table) + 1), longer)
    place = np.clip(np.searchsorted(grid, x / scale, "right") - 1, 0, len(grid) - 2)
    below, above = grid[place] * scale, grid[place + 1] * scale

    def rounded(noise: jax.Array) -> tuple:
        stored, remainder = packed.encode_fine(jnp.asarray(x), jnp.full(x.shape, noise), old, bits)
        return stored.scale == old.scale, packed.decode_fine(stored, remainder, bits), packed.decode(stored)

    held, values, levels = map(np.asarray, jax.jit(jax.vmap(rounded))(jnp.linspace(0.0025, 0.9975, 200)))
    fits = np.all(np.repeat(held, 64, -1), 0) & (np.abs(x) < scale)
    assert fits.mean() > 0.5
    off = np.minimum(np.abs(values - below), np.abs(values - above))
    assert off[:, fits].max() < 1e-5
    nearest = np.round(np.interp(np.asarray(values) / scale, table, np.arange(len(table))))
    assert np.abs(table[nearest.astype(int)] * scale - levels)[:, fits].max() < 1e-5
    assert np.all((np.abs(np.mean(values, 0) - x) <= (above - below) / 200 + 1e-6)[fits])


@pytest.mark.long
@pytest.mark.parametrize("form", SOME)
def test_small_updates_add_up(form: str):
    """400 pushes, half up, half down, of 1/4000 of the outermost level: values that stay inside move by a tenth of it to 3% in
    the mean, none is off by more than three steps of the grid."""
    x = jnp.clip(normal(16, 64, seed=6), -1.2, 1.2)
    start = packed.encode_fine(x, jnp.full((16, 64), 0.5), packed.encode(x, form), 4)
    for _ in range(2):  # until the scale is that of values on the grid
        start = packed.encode_fine(packed.decode_fine(*start, 4), jnp.full((16, 64), 0.5), start[0], 4)
    scale = jnp.repeat(start[0].scale.astype(jnp.float32), 64, -1)
    push = scale / 4000 * jnp.where(jnp.arange(64) % 2 == 0, 1.0, -1.0)[None]

    def update(carry: Any, i: jax.Array) -> tuple[Any, None]:
        return packed.encode_fine(
            packed.decode_fine(carry[0], carry[1], 4) + push, dither(KEY, i, (16, 64)), carry[0], 4
        ), None

    last, _ = jax.jit(lambda carry: jax.lax.scan(update, carry, jnp.arange(400)))(start)
    still = jnp.repeat(last[0].scale == start[0].scale, 64, -1) & (jnp.abs(x) < 0.8 * scale)
    assert float(jnp.mean(still)) > 0.3
    moved = ((packed.decode_fine(last[0], last[1], 4) - packed.decode_fine(start[0], start[1], 4)) / push)[still] / 400
    assert float(jnp.mean(moved)) == pytest.approx(1, abs=0.03)
    assert float(jnp.max(jnp.abs(moved - 1))) * 0.1 < 3 * float(np.max(np.diff(packed.LEVELS[form]))) / 15


@pytest.mark.parametrize("form", FORMS)
def test_error_is_that_of_the_levels(form: str):
    """Error of rounding to nearest equals a numpy search of the closest level * bf16 block maximum, to 1e-6."""
    x = np.asarray(normal(64, 512))
    blocks = x.reshape(64, 8, 64)
    scale = np.asarray(jnp.asarray(np.abs(blocks).max(-1, keepdims=True)).astype(jnp.bfloat16).astype(jnp.float32))
    grid = scale[..., None] * np.asarray(packed.LEVELS[form], np.float32)
    nearest = np.abs(blocks[..., None] - grid).min(-1)
    error = np.abs(np.asarray(packed.decode(packed.encode(jnp.asarray(x), form))).reshape(blocks.shape) - blocks)
    np.testing.assert_allclose(error, nearest, atol=1e-6)


@pytest.mark.long
def test_error_on_normal_data():
    """Error / deviation of normal data: uniform levels, 2*2.46/(levels-1)/sqrt(12) within 5%; NF4 below int4."""
    x = normal(512, 1024)
    amax = float(jnp.mean(jnp.square(jnp.max(jnp.abs(x.reshape(512, 16, 64)), -1)))) ** 0.5
    rms = {form: float(jnp.sqrt(jnp.mean(jnp.square(packed.decode(packed.encode(x, form)) - x)))) for form in FORMS}
    for form in ("int4", "int3", "b2.67"):
        theory = 2 * amax / (len(packed.LEVELS[form]) - 1) / math.sqrt(12)
        assert rms[form] == pytest.approx(theory, rel=0.05), form
    assert rms["nf4"] < rms["int4"] < rms["int3"] < rms["b2.67"]


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_zeros(form: str):
    """Stored zeros decode to 0, encoded zeros too, and a first update from them lands on its own scale."""
    assert not np.any(packed.decode(packed.zeros((3, 128), form)))
    q = packed.encode(jnp.zeros((3, 128)), form)
    assert not np.any(packed.decode(q)) and not np.any(packed.int8_rows(q)[0])
    moved, _ = packed.encode_fine(1e-3 * normal(3, 128), jnp.full((3, 128), 0.5), q, 0)
    largest = 1e-3 * float(jnp.max(jnp.abs(normal(3, 128))))
    assert float(jnp.max(jnp.abs(packed.decode(moved)))) == pytest.approx(largest, rel=0.01)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_int8_rows(form: str):
    """Codes for int8 products are the decoded values to half a step of the row's largest scale / 127."""
    q = packed.encode(normal(8, 256) * jnp.exp(normal(8, 256, seed=1)), form)
    codes, scale = packed.int8_rows(q)
    assert codes.dtype == jnp.int8
    off = jnp.abs(codes.astype(jnp.float32) * scale - packed.decode(q)) / scale
    assert float(jnp.max(off)) <= 0.5 + 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_stochastic_rounding_has_no_bias(form: Format) -> None:
    """The mean of 1,000 draws is the value within 5 standard errors of the widest step, for values inside the scale."""
    x = jnp.clip(normal(2, 64), -1, 1).at[:, 0].set(1.0)
    many = jax.jit(jax.vmap(lambda k: quant.decode(quant.encode(x, form, k))))(jax.random.split(KEY, 1000))
    widest = float(np.max(np.diff(packed.LEVELS[form])))
    assert float(jnp.max(jnp.abs(jnp.mean(many, 0) - x))) < 5 * widest / 2 / math.sqrt(1000)


def test_dither_is_even():
    """A push of 5% of a level per step moves a value once in 20 steps: after 400 all have moved 20 +- 2 levels, with a
    deviation below 1, where independent noise would give one of 4.4; phases do not run out after 65,536 steps."""
    values, draw = jnp.zeros((64, 64)), jax.jit(dither, static_argnums=2)
    for i in range(400):
        values += (draw(KEY, jnp.int32(i), (64, 64)) < 0.05).astype(jnp.float32)
    assert float(jnp.max(jnp.abs(values - 20))) <= 2 and float(jnp.std(values)) < 1
    first = np.asarray(draw(KEY, jnp.int32(70000), (64, 64)))
    assert abs(first.mean() - 0.5) < 0.02 and first.min() > 0 and first.max() < 1


@pytest.mark.long
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("form", SOME)
def test_held_scales(form: str, bits: int):
    """Small updates leave scales alone; blocks that double or halve get a scale that fits, within 10%."""
    stored = packed.encode_fine(normal(4, 128), jnp.full((4, 128), 0.5), packed.encode(normal(4, 128), form), bits)
    x, noise = packed.decode_fine(stored[0], stored[1], bits), jnp.full((4, 128), 0.5)
    still, _ = packed.encode_fine(x + 1e-3 * normal(4, 128, seed=2), noise, stored[0], bits)
    np.testing.assert_array_equal(still.scale, stored[0].scale)
    np.testing.assert_array_equal(still.words, stored[0].words)
    for factor in (2.0, 0.5):
        new, _ = packed.encode_fine(x * factor, noise, stored[0], bits)
        ratio = np.asarray(new.scale / stored[0].scale, np.float32)
        assert np.all(np.abs(ratio / factor - 1) < 0.1), (factor, ratio)


@pytest.mark.long
def test_products_read_the_least_squares_scale():
    """With a remainder, six levels of normal data err by 0.25 deviations, where a scale of block maxima gives 0.30: the
    best six equidistant levels there are err by 0.243 (Max 1960, table 2: 0.0595)."""
    x = normal(512, 1024)
    q = packed.encode(x, "b2.67")
    error = lambda stored: float(jnp.sqrt(jnp.mean(jnp.square(packed.decode(stored) - x))))
    assert error(q) == pytest.approx(0.302, abs=0.003)
    assert 0.243 - 0.003 < error(packed.encode_fine(x, jnp.full(x.shape, 0.5), q, 4)[0]) < 0.252


def tiny(form: str, **stored: Any) -> Config:
    return config_rules.resolve(
        Config(
            model=Model(depth=2, width=64, head_dim=32, vocab=128, seq=16),
            stored=Stored(blocks=form, **stored),  # pyright: ignore[reportArgumentType]
            compute=Compute(forward="int8", dx="int8", dw="int8", residuals="all", loss_chunk=32),
            train=Train(steps=40, tokens_per_step=64, microbatch=2),
        )
    )


def trained(config: Config, steps: int) -> tuple[step.State, list[float]]:
    """The state after `steps` steps on one repeated batch, and the loss before each of them."""
    state = jax.jit(step.init_state, static_argnums=0)(config)
    train = jax.jit(functools.partial(step.train_step, config), donate_argnums=0)
    tokens = step.Batch(jax.random.randint(KEY, config.batch_shape, 0, 128))
    losses = []
    for _ in range(steps):
        state, metrics = train(state, tokens)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4", "b2.67"])
def test_trains(form: str):
    """A repeated batch is learnt: the loss falls by more than 1.5 nats in 40 steps; the stored matrices stay packed."""
    state, losses = trained(tiny(form), 40)
    assert losses[-1] < losses[0] - 1.5
    up = state.params["blocks"][1]["up"]
    assert isinstance(up, quant.Packed) and up.form == form
    whole = quant.decode_tree(state.params)["blocks"][1]["up"]
    assert whole.shape == (256, 64) and whole.dtype == jnp.float32


@pytest.mark.long
def test_products_see_the_stored_values() -> None:
    """The model on packed matrices gives the logits of the model on their decoded values (float products, 1e-5)."""
    config = dataclasses.replace(tiny("nf4"), compute=Compute(residuals="all", loss_chunk=32))
    state = jax.jit(step.init_state, static_argnums=0)(config)
    params = {**state.params, "head": normal(128, 64)}
    tokens = jax.random.randint(KEY, (2, 16), 0, 128)
    a, b = model.forward(config, params, tokens), model.forward(config, quant.decode_tree(params), tokens)
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("bits", [2, *(pytest.param(b, marks=pytest.mark.slow) for b in BITS if b != 2)])
def test_step_keeps_remainders(bits: Literal[0, 2, 4]):
    """opt's remainders are bits/8 bytes a weight, zeros at the start, none of them for 0 bits; steps move every matrix,
    and leaves remainders that are within their level's cell."""
    config = dataclasses.replace(tiny("int3"), stored=Stored(blocks="int3", remainder=bits))
    before = jax.jit(step.init_state, static_argnums=0)(config)
    remainders = {name: opt["remainder"] for name, opt in before.opt.items() if "remainder" in opt}
    widths = {"qkv": 64, "o": 64, "up": 64, "down": 256} if bits else {}
    assert {name: r.shape[-1] for name, r in remainders.items()} == {n: K * bits // 8 for n, K in widths.items()}
    assert not any(np.any(r) for r in remainders.values())
    after, _ = trained(config, 3)  # o and down begin as zeros, so that the first step leaves qkv and up alone
    for name, p in after.params["blocks"][1].items():
        assert np.any(p.words != before.params["blocks"][1][name].words), name
        if bits:  # products read the level nearest to it: half of the widest cell off at most, and off somewhere
            x = packed.decode_fine(p, after.opt[name]["remainder"][1], bits)
            off = jnp.abs(x - quant.decode(p)).reshape(*p.scale.shape, 64) / p.scale[..., None].astype(jnp.float32)
            assert float(jnp.max(off)) < 0.5 * 2 / 7 and np.any(after.opt[name]["remainder"]), name


@pytest.mark.slow
def test_adamw_for_matrices():
    """optim.matrix=adamw with int8 moments learns a repeated batch; its state is two int8 trees for the blocks."""
    config = dataclasses.replace(tiny("int3", adam="int8"), optim=Optim(matrix="adamw", matrix_lr=0.003))
    state, losses = trained(config, 40)
    matrices = ("qkv", "o", "up", "down")
    assert {state.opt[name]["nu"].codes.dtype for name in matrices} == {jnp.dtype(jnp.int8)}
    assert losses[-1] < losses[0] - 1.5


def test_mistakes():
    """Widths that blocks of 64 do not divide, remainders of 3 bits, AdamW folded into a momentum are told in one line."""
    with pytest.raises(UserError, match="choose one of 0, 2, 4"):
        config_rules.resolve(configs.override(Config(), {"stored.remainder": 3}))
    with pytest.raises(UserError, match="multiple of 64"):
        config_rules.resolve(Config(model=Model(depth=2, width=96, head_dim=32), stored=Stored(blocks="int3")))
    folded = {"accumulate.blocks": "momentum", "optim.matrix": "adamw", "optim.clip": "0", "optim.nesterov": "false"}
    with pytest.raises(UserError, match="AdamW"):
        config_rules.resolve(configs.override(Config(), folded))
