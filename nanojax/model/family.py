"""The seam between a model and everything that runs it: four functions, and which file has them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from nanojax.config import Config
from nanojax.model import gpt

Layer = dict[str, Any]  # one layer's weights by name, each as stored
Taps = dict[str, jax.Array]  # f32 arrays of the weights' shapes; the cotangent of a tap is its weight's gradient
Shared = Any  # a tree of arrays that `enter` makes and every layer may read
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]  # q, k, v [B,T,N,H] -> output, what to keep


class Family(NamedTuple):
    """A model. Its weights are rows of weights.table; all that it computes is here.

    Attributes:
      enter: (config, rows, params, taps) -> (x [B,T,D] in the compute dtype, shared). `rows` are the float rows [B,T,D] that
        the tokens select from each embedding, by its name.
      block: (config, i, layer, taps, x, shared, attend, start) -> (x, what `attend` kept). Layers may differ by `i` and by
        the weights they have.
      leave: (config, params, taps, x, shared) -> x before the head's norm.
      init_layer: (config, i, key) -> the layer's weights by name, f32.
      init_once: (config, embed_key, head_key) -> all other weights by name, f32.

    `params` and `taps` hold the weights of use "shared"; taps may be None where no gradient is wanted. Every function is
    pure, and differentiable in rows, x, shared and taps.
    """

    enter: Callable[..., tuple[jax.Array, Shared]]
    block: Callable[..., tuple[jax.Array, Any]]
    leave: Callable[..., jax.Array]
    init_layer: Callable[..., Layer]
    init_once: Callable[..., Layer]


def of(config: Config) -> Family:
    """The family of the config's model."""
    del config  # one family so far
    return Family(gpt.enter, gpt.block, gpt.leave, gpt.init_layer, gpt.init_once)
