"""nanochat's GPT (the Nov-2025 d-series): Embed, Block, Head as pure flax.linen modules, their initialisation, whole forward.

Shape letters, everywhere in nanojax, as suffixes (q_BTNH): B batch, T time, D model width, N heads, H head dim, F hidden,
V vocabulary, L layers, C chunk, M = B*T tokens, K and O a matmul's input and output.
`params` are stored (f32, bf16 or int8 Quantized), matrices [out, in]; block matrices are stacked over layers:
  {"embed": [V,D], "blocks": {"qkv": [L,3D,D], "o": [L,D,D], "up": [L,F,D], "down": [L,D,F]}, "head": [V,D]}
RoPE base 10,000 in nanochat's rotation, QK-norm after RoPE, parameterless RMSNorm (also after the embedding and before the
head), relu^2 MLP, no biases, untied head, logits 15*tanh(x/15). Left out: nanochat's newer value embeddings, residual
scalars and windows, which the released d32 does not have.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.ops import attention, cross_entropy, rope
from nanojax.ops.linear import float_dtype, linear, norm_linear, qkv_linear, relu2_linear
from nanojax.ops.rows import F32, inverse_rms
from nanojax.quant import decode, encode

# What forward may keep for backward, by name, with bytes a token and layer in bf16 + int8 compute (d32: D = 2048):
RESIDUALS = {
    "attn_in": "normed input of the qkv matrix (int8: D)",
    "qkv": "q, k after RoPE and norm, v (6D)",
    "attn": "attention's output and log-sum-exp (2D)",
    "proj_in": "attention's output as the output matrix eats it (int8: D; else the same array as attn)",
    "mlp_in": "normed input of the up matrix (int8: D)",
    "mlp_hidden": "relu(x)^2 as the down matrix eats it (int8: 4D; else relu(x), 8D)",
}
POLICIES = {"inputs": (), "cheap": tuple(n for n in RESIDUALS if n != "mlp_hidden"), "all": tuple(RESIDUALS)}


def residual_names(config: Config) -> tuple[str, ...]:
    """The names that `compute.residuals` keeps. UserError if it is none of inputs, cheap, all or names joined by +."""
    choice = config.compute.residuals
    names = POLICIES.get(choice, tuple(choice.split("+")))
    for name in names:
        if name not in RESIDUALS:
            raise UserError(
                f"--compute.residuals={choice}: choose {', '.join(POLICIES)}, or join names by +: {', '.join(RESIDUALS)}"
            )
    return names


def rms_norm(x: jax.Array) -> jax.Array:
    """x / rms(x) over the last axis, in x's dtype; eps 2^-23 as torch's F.rms_norm in f32."""
    return (x.astype(F32) * inverse_rms(x)).astype(x.dtype)


def _linear_init(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """nanochat's: normal, std = min(1, sqrt(out/in)) / sqrt(in) (arXiv 2310.17813)."""
    out, into = shape
    return jax.random.normal(key, shape, F32) * (min(1.0, math.sqrt(out / into)) / math.sqrt(into))


def _qkv_init(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """q, k and v are three matrices [D,D], initialised one by one and stored as one."""
    D = shape[1]
    return jnp.concatenate([_linear_init(k, (D, D)) for k in jax.random.split(key, 3)])


INIT = {
    "qkv": _qkv_init,
    "o": lambda k, s: jnp.zeros(s, F32),
    "up": _linear_init,
    "down": lambda k, s: jnp.zeros(s, F32),
}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Variables: params = one layer's stored matrices; taps, optional.

    A tap is an f32 array of a matrix's shape that takes its gradient (quant/linear.py), so that stored integers need none.
    """

    config: Config
    implementation: str  # of attention: cudnn or chunked

    def _matrix(self, name: str) -> tuple[Any, jax.Array | None]:
        if self.is_initializing():
            self.param(name, INIT[name], self.config.model.shapes[name])
        stored = self.get_variable("params", name)
        return stored, self.get_variable("taps", name)

    def qkv(self, x_BTD: jax.Array, start: Any = 0) -> tuple[Any, Any, Any, Any]:
        """q, k (rotated and normed) and v, [B,T,N,H] each, of positions start..start+T; and x."""
        c, m = self.config.compute, self.config.model
        B, T, D = x_BTD.shape
        rotation = rope.Rotation(T, m.N, m.H, m.rope_base)
        x = x_BTD.reshape(B * T, D)
        start = jnp.asarray(start, jnp.int32)
        out: Any = qkv_linear(c, ("attn_in", "qkv"), rotation, *self._matrix("qkv"), x, start)
        q, k, v, x = out
        return q, k, v, x.reshape(x_BTD.shape)

    def rest(self, x_BTD: jax.Array, out_BTNH: jax.Array) -> jax.Array:
        """The block's output from its input and attention's output."""
        c = self.config.compute
        x = x_BTD.reshape(-1, x_BTD.shape[-1])
        x = linear(c, "proj_in", *self._matrix("o"), out_BTNH.reshape(x.shape), x)
        both: Any = norm_linear(c, "mlp_in", *self._matrix("up"), x)
        (hidden,), x = both
        out: Any = relu2_linear(c, "mlp_hidden", *self._matrix("down"), hidden, x)
        return out.reshape(x_BTD.shape)

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        q, k, v, x_BTD = self.qkv(x_BTD)
        return self.rest(x_BTD, attention.attention(q, k, v, self.implementation))

    @nn.compact
    def step(self, x_BSD: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, start: jax.Array):
        """S new positions from `start` with a cache of keys and values: (output, keys, values)."""
        q, k, v, x_BSD = self.qkv(x_BSD, start)
        k_BTNH = lax.dynamic_update_slice_in_dim(k_BTNH, k.astype(k_BTNH.dtype), start, 1)
        v_BTNH = lax.dynamic_update_slice_in_dim(v_BTNH, v.astype(v_BTNH.dtype), start, 1)
        return self.rest(x_BSD, attention.cached(q, k_BTNH, v_BTNH, start)), k_BTNH, v_BTNH


class Embed(nn.Module):
    """Token embedding [V,D], N(0,1), then RMSNorm; output in the compute dtype."""

    config: Config

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        m = self.config.model
        if self.is_initializing():
            self.param("embed", jax.nn.initializers.normal(1.0), (m.V, m.D), F32)
        stored = self.get_variable("params", "embed")
        rows = jax.tree.map(lambda a: a[tokens_BT], stored)  # rows first: the whole table is never decoded
        return rms_norm(decode(rows)).astype(float_dtype(self.config.compute))


class Head(nn.Module):
    """RMSNorm, matrix [V,D] (zeros at first), softcap: logits in f32."""

    config: Config

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, m = self.config.compute, self.config.model
        if self.is_initializing():
            self.param("head", jax.nn.initializers.zeros, (m.V, m.D), F32)
        w = self.get_variable("params", "head")
        both: Any = norm_linear(head_compute(c), "", w, None, x_BTD.reshape(-1, m.D))
        logits = both[0][0].astype(F32)
        return (m.softcap * jnp.tanh(logits / m.softcap)).reshape(*x_BTD.shape[:-1], m.V)


def head_compute(c: Any) -> Any:
    """The head's compute: its forward as configured, its backward in floats (int8 there costs 0.6 nats)."""
    return dataclasses.replace(c, forward=c.head, dx="float", dw="float")


def apply(module: nn.Module, variables: Any, *inputs: Any, **keywords: Any) -> Any:
    """module.apply, whose own type also speaks of mutable collections, which nothing here has."""
    return module.apply(variables, *inputs, **keywords)


def block(config: Config) -> Callable[..., jax.Array]:
    """Block's pure function (params of one layer, x_BTD, taps=None) -> x_BTD."""
    module = Block(config, attention.default_implementation(config.compute.attention))

    def run(params: Any, x_BTD: jax.Array, taps: Any = None) -> jax.Array:
        return apply(module, {"params": params} if taps is None else {"params": params, "taps": taps}, x_BTD)

    return run


def rematerialised_block(config: Config) -> Callable[..., jax.Array]:
    """`block` under jax.checkpoint: differentiated, it keeps what compute.residuals names and recomputes the rest."""
    names = residual_names(config)
    if set(names) == set(RESIDUALS):
        return block(config)

    def keep(primitive: Any, *_: Any, **parameters: Any) -> bool:
        if primitive.name == "name":
            return parameters["name"] in names
        return "attn" in names and "dot_product_attention_fwd" in primitive.name  # cuDNN's output and log-sum-exp

    return jax.checkpoint(block(config), policy=keep, prevent_cse=False)


def init_params(config: Config, key: jax.Array) -> Any:
    """Stored parameters, each encoded to nearest as config.stored says, layer by layer so that f32 never exists in full."""
    embed_key, block_key, head_key = jax.random.split(key, 3)
    m, s = config.model, config.stored
    module = Block(config, "chunked")
    x = jnp.zeros((1, 1, m.D), float_dtype(config.compute))

    def layer(key: jax.Array) -> Any:
        return jax.tree.map(lambda w: encode(w, s.blocks), module.init(key, x)["params"])

    embed: Any = Embed(config).init(embed_key, jnp.zeros((1, 1), jnp.int32))["params"]["embed"]
    head: Any = Head(config).init(head_key, x)["params"]["head"]
    blocks = lax.map(layer, jax.random.split(block_key, m.L))
    return {"embed": encode(embed, s.embed), "blocks": blocks, "head": encode(head, s.head)}


def hidden(config: Config, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """The last block's output [B,T,D], not normed, in the compute dtype."""
    run = block(config)
    x = apply(Embed(config), {"params": params}, tokens_BT)
    return lax.scan(lambda x, layer: (run(layer, x), None), x, params["blocks"])[0]


def forward(config: Config, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """Logits [B,T,V] in f32. Differentiable in float params; holds all logits: for tests, sampling and small evaluations."""
    return apply(Head(config), {"params": params}, hidden(config, params, tokens_BT))


def empty_cache(config: Config, B: int, T: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values of T positions, [L,B,T,N,H] each, zeros in the compute dtype."""
    m = config.model
    shape = (m.L, B, T, m.N, m.H)
    return jnp.zeros(shape, float_dtype(config.compute)), jnp.zeros(shape, float_dtype(config.compute))


def forward_cached(config: Config, params: Any, tokens_BS: jax.Array, cache: Any, start: jax.Array) -> tuple[Any, Any]:
    """Logits [B,S,V] of S new tokens at positions start.., and the cache with them in it."""
    module = Block(config, "chunked")

    def layer(x, inputs):
        p, k, v = inputs
        x, k, v = apply(module, {"params": p}, x, k, v, start, method="step")
        return x, (k, v)

    x = apply(Embed(config), {"params": params}, tokens_BS)
    x, cache = lax.scan(layer, x, (params["blocks"], *cache))
    return apply(Head(config), {"params": params}, x), cache


def token_losses(config: Config, params: Any, tokens_BT1: jax.Array) -> jax.Array:
    """-log p(next token) in nats, f32 [B,T], of rows of T+1 tokens; logits exist for one chunk at a time."""
    x = hidden(config, params, tokens_BT1[:, :-1])
    targets = tokens_BT1[:, 1:]
    xs, ts = cross_entropy.chunks(config, x.reshape(-1, x.shape[-1]), targets.reshape(-1))

    def chunk(inputs):
        z = cross_entropy.capped(config, params["head"], rms_norm(inputs[0]))
        return cross_entropy.nll(config.model.softcap, z, inputs[1])[0]

    losses = lax.map(chunk, (xs, ts))
    return losses.reshape(targets.shape)
