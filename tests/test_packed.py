"""Formats below 8 bits: exact packing and re-encoding, errors as theory says, even dither, training that works."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax import config as configs
from nanojax import model, optim, quant, step
from nanojax.config import Compute, Config, Model, Optim, Stored, Train, UserError
from nanojax.quant import packed
from nanojax.quant.rounding import dither

KEY = jax.random.key(0)
FORMS = list(packed.LEVELS)


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


def test_bits_count_everything():
    """Bits a value, from the bytes of real arrays of d32's row, are what `bits` says: 4.25, 3.25 and 2.92."""
    for form, expected in {"int4": 4.25, "nf4": 4.25, "int3": 3.25, "b2.67": 171 * 32 / 2048 + 0.25}.items():
        q = packed.encode(normal(4, 2048), form)
        assert 8 * (q.words.nbytes + q.scale.nbytes) / (4 * 2048) == packed.bits(form, 2048) == expected


@pytest.mark.parametrize("form", FORMS)
def test_encoding_again_is_exact(form: str):
    """Decoded values encode to the same words and scales: to nearest, with any noise, and with scales held."""
    q = packed.encode(normal(16, 256), form)
    x, noise = packed.decode(q), jax.random.uniform(KEY, (16, 256), minval=1e-4, maxval=1 - 1e-4)
    for again in (packed.encode(x, form), packed.encode(x, form, noise), packed.encode(x, form, noise, q)):
        np.testing.assert_array_equal(again.words, q.words)
        np.testing.assert_array_equal(again.scale, q.scale)


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


def test_error_on_normal_data():
    """Error / deviation of normal data: uniform levels, 2*2.46/(levels-1)/sqrt(12) within 5%; NF4 below int4."""
    x = normal(512, 1024)
    amax = float(jnp.mean(jnp.square(jnp.max(jnp.abs(x.reshape(512, 16, 64)), -1)))) ** 0.5
    rms = {form: float(jnp.sqrt(jnp.mean(jnp.square(packed.decode(packed.encode(x, form)) - x)))) for form in FORMS}
    for form in ("int4", "int3", "b2.67"):
        theory = 2 * amax / (len(packed.LEVELS[form]) - 1) / math.sqrt(12)
        assert rms[form] == pytest.approx(theory, rel=0.05), form
    assert rms["nf4"] < rms["int4"] < rms["int3"] < rms["b2.67"]


@pytest.mark.parametrize("form", FORMS)
def test_zeros(form: str):
    """Stored zeros decode to 0, encoded zeros too, and a first update from them lands on its own scale."""
    assert not np.any(packed.decode(packed.zeros((3, 128), form)))
    q = packed.encode(jnp.zeros((3, 128)), form)
    assert not np.any(packed.decode(q)) and not np.any(packed.int8_rows(q)[0])
    moved = packed.encode(1e-3 * normal(3, 128), form, jnp.full((3, 128), 0.5), q)
    largest = 1e-3 * float(jnp.max(jnp.abs(normal(3, 128))))
    assert float(jnp.max(jnp.abs(packed.decode(moved)))) == pytest.approx(largest, rel=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_int8_rows(form: str):
    """Codes for int8 products are the decoded values to half a step of the row's largest scale / 127."""
    q = packed.encode(normal(8, 256) * jnp.exp(normal(8, 256, seed=1)), form)
    codes, scale = packed.int8_rows(q)
    assert codes.dtype == jnp.int8
    off = jnp.abs(codes.astype(jnp.float32) * scale - packed.decode(q)) / scale
    assert float(jnp.max(off)) <= 0.5 + 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_stochastic_rounding_has_no_bias(form: str):
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


@pytest.mark.parametrize("form", FORMS)
def test_held_scales(form: str):
    """Small updates leave scales alone; values beyond the outermost level raise them; shrunken blocks lower them."""
    q = packed.encode(normal(4, 128), form)
    x, noise = packed.decode(q), jnp.full((4, 128), 0.5)
    still = packed.encode(x + 1e-3 * normal(4, 128, seed=2), form, noise, q)
    np.testing.assert_array_equal(still.scale, q.scale)
    np.testing.assert_array_equal(still.words, q.words)
    for factor in (2.0, 0.5):
        new = packed.encode(x * factor, form, noise, q)
        np.testing.assert_array_equal(new.scale, q.scale * jnp.bfloat16(factor))
        np.testing.assert_array_equal(new.words, q.words)


def tiny(form: str, **stored: str) -> Config:
    return configs.resolve(
        Config(
            model=Model(depth=2, width=64, head_dim=32, vocab=128, seq=16),
            stored=Stored(blocks=form, **stored),  # pyright: ignore[reportArgumentType]
            compute=Compute(forward="int8", dx="int8", dw="int8", residuals="all", loss_chunk=32),
            train=Train(steps=40, tokens_per_step=64, microbatch=2),
        )
    )


@pytest.mark.parametrize("form", ["nf4", "b2.67"])
def test_trains(form: str):
    """A repeated batch is learnt: the loss falls by more than 1.5 nats in 40 steps; the stored matrices stay packed."""
    config = tiny(form)
    state = jax.jit(step.init_state, static_argnums=0)(config)
    train = jax.jit(step.train_step(config), donate_argnums=0)
    tokens = jax.random.randint(KEY, config.batch_shape, 0, 128)
    losses = []
    for _ in range(40):
        state, metrics = train(state, tokens)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 1.5
    assert isinstance(state.params["blocks"]["up"], quant.Packed) and state.params["blocks"]["up"].form == form
    whole = quant.decode_tree(state.params)
    assert whole["blocks"]["up"].shape == (2, 256, 64) and whole["blocks"]["up"].dtype == jnp.float32


def test_products_see_the_stored_values():
    """The model on packed matrices gives the logits of the model on their decoded values (float products, 1e-5)."""
    config = dataclasses.replace(tiny("nf4"), compute=Compute(residuals="all", loss_chunk=32))
    state = jax.jit(step.init_state, static_argnums=0)(config)
    params = {**state.params, "head": normal(128, 64)}
    tokens = jax.random.randint(KEY, (2, 16), 0, 128)
    a, b = model.forward(config, params, tokens), model.forward(config, quant.decode_tree(params), tokens)
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_errors_return_through_the_momentum(rate: float):
    """A rounding error moves the next update towards undoing it, at any learning rate: by 0.3(1-m) of the error, half of
    it for a square matrix, whose orthogonalisation is not linear; without an error the momentum stays as it is."""
    config = tiny("nf4")
    config = dataclasses.replace(config, optim=Optim(matrix_lr=0.02 * rate, momentum_warmup=0, warmdown=0.0))
    tx, count = optim.muon(config), jnp.int32(3)
    momentum = {"o": normal(64, 64), "up": normal(256, 64, seed=1)}
    move = lambda buf: tx.update(
        jax.tree.map(jnp.zeros_like, buf), optim.MuonState(count, buf), key=KEY
    )  # no gradient: the update is of the momentum itself
    updates = move(momentum)[0]
    none = jax.tree.map(jnp.zeros_like, momentum)
    same = optim.feed_back(config, count, momentum, updates, none, KEY)
    np.testing.assert_array_equal(same["up"], momentum["up"])
    errors = {"o": 1e-4 * normal(64, 64, seed=2), "up": 1e-4 * normal(256, 64, seed=3)}
    fed = move(optim.feed_back(config, count, momentum, updates, errors, KEY))[0]
    for name, error in errors.items():
        along = float(jnp.sum((fed[name] - updates[name]) * error) / jnp.sum(error * error))
        assert 0.4 * 0.3 * 0.05 < along < 1.5 * 0.3 * 0.05, (name, along)


def test_adamw_for_matrices():
    """optim.matrix=adamw with int8 moments learns a repeated batch; its state is two int8 trees for the blocks."""
    config = dataclasses.replace(tiny("int3", adam="int8"), optim=Optim(matrix="adamw", matrix_lr=0.003))
    state = jax.jit(step.init_state, static_argnums=0)(config)
    assert {x.codes.dtype for x in state.opt["blocks"][1].values()} == {jnp.dtype(jnp.int8)}
    train = jax.jit(step.train_step(config), donate_argnums=0)
    tokens = jax.random.randint(KEY, config.batch_shape, 0, 128)
    first = None
    for _ in range(40):
        state, metrics = train(state, tokens)
        first = first or float(metrics["loss"])
    assert float(metrics["loss"]) < first - 1.5


def test_mistakes():
    """Widths that blocks of 64 do not divide, and AdamW folded into a momentum, are told in one line."""
    with pytest.raises(UserError, match="multiple of 64"):
        configs.resolve(Config(model=Model(depth=2, width=96, head_dim=32), stored=Stored(blocks="int3")))
    folded = {"accumulate.dtype": "momentum", "optim.matrix": "adamw", "optim.clip": "0", "optim.nesterov": "false"}
    with pytest.raises(UserError, match="AdamW"):
        configs.resolve(configs.override(Config(), folded))
