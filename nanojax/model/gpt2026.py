"""nanochat's GPT of July 2026 (commit 92d63d4): Block as a flax.linen module, and the family's functions.

Beside gpt.py's: every second layer adds a gated value embedding to v; three of four layers see a window; each layer's input
is a mix of the residual stream and the first one; the stream begins with some of the token before (smear) and ends without
some of its middle (backout); q and k are scaled by 1.2, RoPE's base is 100,000. Left out: nothing of the forward pass.
Rotary tables are f32 here and bf16 there.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanojax import weights
from nanojax.config import Config
from nanojax.model.gpt import Module, feed_forward, variables
from nanojax.model.gpt import init_once as init_edges
from nanojax.model.initial import initializer
from nanojax.model.seam import Attend, Family, NamedParams, Rows, Shared, Start, Taps
from nanojax.ops import rope
from nanojax.ops.gate import gated_add
from nanojax.ops.linear import float_dtype, linear, qkv_linear
from nanojax.ops.norm import rms_norm
from nanojax.quant import decode
from nanojax.quant.formats import Stored


def scalars(stored: Stored, tap: jax.Array | None) -> jax.Array:
    """A small weight as floats. Its tap takes its gradient."""
    return decode(stored) if tap is None else decode(stored) + tap


def named(params: NamedParams, taps: Taps, name: str) -> jax.Array:
    """`scalars` of one of several weights."""
    return scalars(params[name], None if taps is None else taps[name])


def smeared(e_BTD: jax.Array, before_BTD: jax.Array | None, gate_1C: jax.Array, factor_1: jax.Array) -> jax.Array:
    """e + factor*sigmoid(gate . e's first channels)*(e of the token before); f32."""
    if before_BTD is None:
        before_BTD = jnp.pad(e_BTD, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    gate_BT1 = jax.nn.sigmoid(e_BTD[..., : gate_1C.shape[1]] @ gate_1C.T)
    return e_BTD + factor_1[None, None] * gate_BT1 * before_BTD


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), of the mixed x; v has the layer's value embedding added.

    Returns x [B,T,D], the first stream (qkv_linear says why), and whatever `attend` keeps. `start` as in gpt.Block.
    """

    @nn.compact
    def __call__(
        self, rows: Rows, x_BTD: jax.Array, first_MD: jax.Array | None, factors_2: jax.Array | None, attend: Attend,
        start: Start = None,
    ) -> tuple[jax.Array, jax.Array | None, Any]:  # fmt: skip
        c, m = self.config.compute, self.config.model
        B, T, D = x_BTD.shape
        rotation = rope.Rotation(T, m.N, m.H, m.rope_base)
        x_MD = x_BTD.reshape(B * T, D)
        names = ("attn_in", "qkv")
        channels = weights.GATE_CHANNELS if "value" in rows else 0
        heads: Any = qkv_linear(c, names, rotation, channels, *self.weight("qkv"), x_MD, start, first_MD, factors_2)
        q, k, v, x_MD, u_MC, first_MD = heads
        if channels:
            gate_NC = scalars(*self.weight("value_gate"))
            gate_BTN = 3 * jax.nn.sigmoid(u_MC @ gate_NC.T).reshape(B, T, m.N)
            v: Any = gated_add(c, "qkv", v, gate_BTN, rows["value"])
        out_BTNH, kept = attend(q, k, v)
        x_MD: Any = linear(c, "proj_in", *self.weight("o"), out_BTNH.reshape(B * T, D), x_MD)
        return feed_forward(self, x_MD).reshape(x_BTD.shape), first_MD, kept


def enter(config: Config, rows: Rows, before: Rows | None, params: NamedParams, taps: Taps) -> tuple[jax.Array, Shared]:
    """The smeared, normed embedding, which is also the first stream; and the two factors [2] of each layer still to come."""
    x_BTD = rms_norm(rows["embed"])
    if "smear" in params:
        before_BTD = None if before is None else rms_norm(before["embed"])
        x_BTD = smeared(x_BTD, before_BTD, named(params, taps, "smear_gate"), named(params, taps, "smear"))
    x_BTD = x_BTD.astype(float_dtype(config.compute))
    if "first" not in params:
        return x_BTD, {}
    factors_L2 = jnp.stack([named(params, taps, name) for name in ("residual", "first")], 1)
    return x_BTD, {"first": x_BTD.reshape(-1, x_BTD.shape[-1]), "factors": tuple(factors_L2)}


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
    """Block; the middle layer's output is shared, for `leave` to take out again."""
    factors, *rest = shared.get("factors", (None,))
    out: Any = Block(config).apply(variables(layer, taps), rows, x_BTD, shared.get("first"), factors, attend, start)
    x_BTD, first, kept = out
    if first is not None:
        shared = shared | {"first": first, "factors": tuple(rest)}
    if i == config.model.L // 2 and "backout" not in config.model.left_out:
        shared = shared | {"middle": x_BTD}
    return x_BTD, shared, kept


def leave(config: Config, params: NamedParams, taps: Taps, x_BTD: jax.Array, shared: Shared) -> jax.Array:
    """x less a share of the middle layer's output."""
    if "middle" not in shared:
        return x_BTD
    share_1 = named(params, taps, "backout")[None, None]
    return (x_BTD.astype(jnp.float32) - share_1 * shared["middle"].astype(jnp.float32)).astype(
        float_dtype(config.compute)
    )


def init_layer(config: Config, has: weights.Table, i: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    """A layer's weights but its embedding, f32."""
    del i
    names = list(has)
    keys = dict(zip(names, jax.random.split(key, len(names))))
    return {name: initializer(has[name])(keys[name], has[name].shape) for name in names}


def init_once(config: Config, embed_key: jax.Array, head_key: jax.Array) -> dict[str, jax.Array]:
    """The weights outside the layers, f32."""
    table = weights.table(config.model)
    shared = [name for name, weight in table.items() if weight.use == "shared"]
    keys = dict(zip(shared, jax.random.split(jax.random.fold_in(embed_key, 1), len(shared) or 1)))
    small = {name: initializer(table[name])(keys[name], table[name].shape) for name in shared}
    return init_edges(config, embed_key, head_key) | small


FAMILY = Family(enter, block, leave, init_layer, init_once)
