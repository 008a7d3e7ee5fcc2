"""The next token of each row: the likeliest, or drawn from the likeliest by temperature, top-k and top-p."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

BLOCK = 128  # probabilities that are summed before their sums are


class Choice(NamedTuple):
    """How a token is drawn: numbers for all rows, or arrays [B] for each. None of these is compiled in.

    temperature 0 = the likeliest token. top_k: among the k likeliest; 0 = all. top_p: among the fewest likeliest that together
    have this probability; 1 = all. Both keep tokens that tie with the last one.
    """

    temperature: ArrayLike = 0.0
    top_k: ArrayLike = 0
    top_p: ArrayLike = 1.0


def choose(vocab: int, logits_BV: jax.Array, key_B: jax.Array, choice: Choice) -> jax.Array:
    """Tokens int32 [B] below `vocab`. A row's depends on its own logits and key alone."""
    logits_BV = jnp.where((jnp.arange(logits_BV.shape[1]) < vocab)[None], logits_BV, -jnp.inf)
    drawn = jnp.asarray(choice.temperature, jnp.float32) > 0
    likeliest = lambda: jnp.argmax(logits_BV, -1).astype(jnp.int32)
    if not drawn.ndim:
        return lax.cond(drawn, lambda: _draw(logits_BV, key_B, choice), likeliest)
    both = lambda: jnp.where(drawn, _draw(logits_BV, key_B, choice), likeliest())
    return lax.cond(jnp.any(drawn), both, likeliest)


def _draw(logits_BV: jax.Array, key_B: jax.Array, choice: Choice) -> jax.Array:
    order_BV = _order(logits_BV)
    k = jnp.asarray(choice.top_k, jnp.int32)
    few = (k > 0) & (k < logits_BV.shape[1])
    least = _column(jnp.where(few, k, logits_BV.shape[1])) if k.ndim else k
    among_k = lambda: _highest(order_BV, lambda kept: jnp.sum(kept, -1, dtype=jnp.int32) >= least)
    keep_BV = lax.cond(jnp.any(few), among_k, lambda: jnp.ones(logits_BV.shape, bool))
    scaled_BV = logits_BV - jnp.max(logits_BV, -1, keepdims=True)
    scaled_BV = scaled_BV / _column(jnp.maximum(jnp.asarray(choice.temperature, jnp.float32), 1e-6))
    p_BV = jnp.where(keep_BV, jnp.exp(scaled_BV), 0.0)
    needed = jnp.asarray(choice.top_p, jnp.float32)
    needed_B = needed * jnp.sum(p_BV, -1)
    among_p = lambda: _highest(
        order_BV, lambda kept: jnp.sum(jnp.where(kept, p_BV[:, None], 0.0), -1) >= needed_B[:, None]
    )
    kept = lambda: among_p() | _column(needed >= 1) if needed.ndim else among_p()
    p_BV = lax.cond(jnp.any(needed < 1), lambda: jnp.where(kept(), p_BV, 0.0), lambda: p_BV)
    uniform_B = jax.vmap(lambda key: jax.random.uniform(key))(key_B)
    return _inverse(p_BV, uniform_B)


def _column(value: jax.Array) -> jax.Array:
    """A number as it is, an array [B] as [B,1]."""
    return value[:, None] if value.ndim else value


def _order(x: jax.Array) -> jax.Array:
    """uint32 that compare as the floats do."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _highest(order_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The values from the highest bound on that still keeps enough of them, bool [B,V].

    The bound is found digit by digit. A sort, or XLA's top_k, takes ten times as long for 16 rows on a CPU. A GPU takes as
    long for a pass over 15 candidates as for one over a single one, so its digits have four bits; on a CPU they have one.

    Args:
      enough: of what is kept under C bounds, bool [B,C,V], whether it is enough, bool [B,C].
    """
    search = lambda bits: functools.partial(_bound, bits, enough)
    bound_B = lax.platform_dependent(order_BV, cpu=search(1), default=search(4))
    return order_BV >= bound_B[:, None]


def _bound(bits: int, enough: Callable[[jax.Array], jax.Array], order_BV: jax.Array) -> jax.Array:
    """The highest bound that keeps enough, uint32 [B]."""

    def digit(i: jax.Array, bound_B: jax.Array) -> jax.Array:
        shift = 32 - bits * (jnp.asarray(i, jnp.uint32) + 1)
        higher_BC = bound_B[:, None] | (jnp.arange(1, 2**bits, dtype=jnp.uint32) << shift)[None]
        enough_BC = enough(order_BV[:, None] >= higher_BC[..., None])
        return bound_B | jnp.sum(enough_BC, -1, dtype=jnp.uint32) << shift  # a higher bound keeps fewer

    return lax.fori_loop(0, 32 // bits, digit, jnp.zeros(len(order_BV), jnp.uint32), unroll=bits > 1)


def _inverse(p_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index at which the running sum of p exceeds uniform * its total; one with p > 0 even where sums round."""
    B, V = p_BV.shape
    blocks = jnp.pad(p_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    before_B, block_B = _exceeds(jnp.sum(blocks, -1), None, uniform_B)
    inside_BC = jnp.take_along_axis(blocks, block_B[:, None, None], 1)[:, 0]
    _, place_B = _exceeds(inside_BC, before_B, uniform_B)
    return (block_B * BLOCK + place_B).astype(jnp.int32)


def _exceeds(p_BC: jax.Array, target_B: jax.Array | None, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(what of the target is left before it, the first index whose running sum exceeds the target)."""
    sums_BC = jnp.cumsum(p_BC, -1)
    target_B = uniform_B * sums_BC[:, -1] if target_B is None else target_B
    last_B = p_BC.shape[1] - 1 - jnp.argmax(p_BC[:, ::-1] > 0, -1)
    index_B = jnp.minimum(jnp.sum(sums_BC <= target_B[:, None], -1), last_B)
    before_B = jnp.take_along_axis(sums_BC - p_BC, index_B[:, None], 1)[:, 0]
    return target_B - before_B, index_B
