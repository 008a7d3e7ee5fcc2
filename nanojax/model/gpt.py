"""nanochat's GPT of November 2025 (the d-series): Embed, Block and Head as flax.linen modules, and the family's functions.

RoPE with base 10,000 in nanochat's rotation, QK-norm after RoPE, parameterless RMSNorm (also after the embedding and before
the head), relu^2 MLP, no biases, untied head, logits 15*tanh(x/15). Left out: the value embeddings, residual scalars and
windows of nanochat's newer models, which the released d32 does not have.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanojax import weights
from nanojax.config import Config
from nanojax.model.initial import initializer
from nanojax.model.seam import Attend, Family, NamedParams, Rows, Shared, Start, Taps
from nanojax.ops import cross_entropy, rope
from nanojax.ops.linear import float_dtype, linear, qkv_linear
from nanojax.ops.mlp import mlp
from nanojax.ops.norm import rms_norm
from nanojax.quant.formats import Stored

# What forward may keep for backward, by name, with bytes per token and layer in bf16 and int8 compute (d32: D = 2048):
RESIDUALS = {
    "attn_in": "normed input of the qkv matrix (int8: D)",
    "qkv": "q, k after RoPE and norm, v (6D)",
    "attn": "attention's output and log-sum-exp (2D)",
    "proj_in": "operand of the output matrix (int8: D; otherwise the same array as attn)",
    "mlp_in": "normed input of the up matrix (int8: D)",
    "mlp_hidden": "operand of the down matrix, relu(x)^2 (int8: 4D; otherwise relu(x), 8D)",
}
POLICIES = {"inputs": (), "cheap": tuple(n for n in RESIDUALS if n != "mlp_hidden"), "all": tuple(RESIDUALS)}


class Module(nn.Module):
    """A linen module whose variables are the table's: `params` as stored, and optional `taps`.

    A tap is an f32 array of a weight's shape whose value is never read. Its cotangent is the weight's gradient, so that
    stored integers need none (ops/linear.py).
    """

    config: Config

    def weight(self, name: str) -> tuple[Stored, jax.Array | None]:
        """The weight as stored, and its tap."""
        if self.is_initializing():
            row = weights.table(self.config.model)[name]
            self.param(name, initializer(row), row.shape)
        stored: Any = self.get_variable("params", name)
        tap: Any = self.get_variable("taps", name)
        return stored, tap


class Embed(Module):
    """Rows of the token embedding [V,D], normed; output in the compute dtype."""

    @nn.compact
    def __call__(self, rows_BTD: jax.Array) -> jax.Array:
        self.weight("embed")
        return rms_norm(rows_BTD).astype(float_dtype(self.config.compute))


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Returns x [B,T,D] and whatever `attend` keeps. `start` is the position of a row's first token, or, as an array [T], what
    each place in the row has to be moved by to be its position.
    """

    @nn.compact
    def __call__(self, x_BTD: jax.Array, attend: Attend, start: Start = None) -> tuple[jax.Array, Any]:
        c, m = self.config.compute, self.config.model
        B, T, D = x_BTD.shape
        rotation = rope.Rotation(T, m.N, m.H, m.rope_base)
        x_MD = x_BTD.reshape(B * T, D)
        names = ("attn_in", "qkv")
        heads: Any = qkv_linear(c, names, rotation, 0, *self.weight("qkv"), x_MD, start)
        q, k, v, x_MD, *_ = heads
        out_BTNH, kept = attend(q, k, v)
        x_MD: Any = linear(c, "proj_in", *self.weight("o"), out_BTNH.reshape(B * T, D), x_MD)
        return feed_forward(self, x_MD).reshape(x_BTD.shape), kept


def feed_forward(layer: Module, x_MD: jax.Array) -> jax.Array:
    """x + relu(norm(x) up.T)^2 down.T."""
    names = ("mlp_in", "mlp_hidden")
    return mlp(layer.config.compute, names, *layer.weight("up"), *layer.weight("down"), x_MD)


class Head(Module):
    """RMSNorm, the output matrix [V,D] and the softcap: f32 logits [M,V] of x [M,D]."""

    @nn.compact
    def __call__(self, x_MD: jax.Array) -> jax.Array:
        head, _ = self.weight("head")
        return cross_entropy.logits(self.config.compute, self.config.model.softcap, head, rms_norm(x_MD))


def variables(params: NamedParams, taps: Taps) -> dict[str, Any]:
    """A linen module's variables."""
    return {"params": params} if taps is None else {"params": params, "taps": taps}


def enter(config: Config, rows: Rows, before: Rows | None, params: NamedParams, taps: Taps) -> tuple[jax.Array, Shared]:
    """The normed embedding; the layers share nothing."""
    del before, params, taps
    return Embed(config).apply({"params": {}}, rows["embed"]), ()  # pyright: ignore[reportReturnType]


def block(
    config: Config,
    i: int,
    layer: NamedParams,
    taps: Taps,
    rows: Rows,
    x_BTD: jax.Array,
    shared: Shared,
    attend: Attend,
    start: Start = None,
) -> tuple[jax.Array, Shared, Any]:
    """Block; all layers are alike."""
    del i, rows
    out: Any = Block(config).apply(variables(layer, taps), x_BTD, attend, start)
    return out[0], shared, out[1]


def leave(config: Config, params: NamedParams, taps: Taps, x_BTD: jax.Array, shared: Shared) -> jax.Array:
    """Nothing stands between the last block and the head's norm."""
    del config, params, taps, shared
    return x_BTD


def init_layer(config: Config, has: weights.Table, i: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    """A layer's weights, f32; all layers are drawn alike."""
    del has, i
    x = jnp.zeros((1, 1, config.model.D), float_dtype(config.compute))
    drawn: Any = Block(config).init(key, x, lambda q, k, v: (q, None))["params"]
    return drawn


def init_once(config: Config, embed_key: jax.Array, head_key: jax.Array) -> dict[str, jax.Array]:
    """The weights outside the layers, f32."""
    x = jnp.zeros((1, config.model.D), float_dtype(config.compute))
    embed: Any = Embed(config).init(embed_key, x.astype(jnp.float32))["params"]
    head: Any = Head(config).init(head_key, x)["params"]
    return {**embed, **head}


FAMILY = Family(enter, block, leave, init_layer, init_once)
