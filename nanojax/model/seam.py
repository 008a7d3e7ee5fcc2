"""The seam between a model and everything that runs it: its functions and what passes through them."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from nanojax import weights
from nanojax.config import Config
from nanojax.quant.formats import Stored

NamedParams = dict[str, Stored]  # some parameters by name, as stored: one layer's, or those outside the layers
Taps = dict[str, jax.Array] | None  # f32 arrays of the weights' shapes, whose cotangents are the weights' gradients
Rows = dict[str, jax.Array]  # the float rows [B,T,D] that tokens select from embeddings: the model's, or one layer's
Shared = Any  # a tree of arrays that `enter` makes, every layer may read and add to, and `leave` sees
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]  # q, k, v [B,T,N,H] -> output, what to keep
Start = jax.Array | None  # int32 position of a row's first token, or [T] added to 0, 1, ... to give positions; None: 0


class Enter(Protocol):
    """(rows, rows of the tokens before these, weights of use "shared") -> x [B,T,D] in the compute dtype, and Shared.

    `before` None: each token follows the one to its left, and the first has none. Otherwise rows as `rows`; zeros where a
    token has none before it.
    """

    def __call__(
        self, config: Config, rows: Rows, before: Rows | None, params: NamedParams, taps: Taps
    ) -> tuple[jax.Array, Shared]: ...


class Block(Protocol):
    """Layer i: x [B,T,D] -> x, Shared for the layers after it, and what `attend` kept.

    Layers may differ by i and by the weights they have. `layer` and `taps` hold the weights of use "layer", `rows` those
    that the tokens select from the layer's embeddings.
    """

    def __call__(
        self, config: Config, i: int, layer: NamedParams, taps: Taps, rows: Rows, x_BTD: jax.Array, shared: Shared,
        attend: Attend, start: Start = None,
    ) -> tuple[jax.Array, Shared, Any]: ...  # fmt: skip


class Leave(Protocol):
    """The last block's x -> x before the head's norm."""

    def __call__(
        self, config: Config, params: NamedParams, taps: Taps, x_BTD: jax.Array, shared: Shared
    ) -> jax.Array: ...


class Family(NamedTuple):
    """A model. Its weights are rows of weights.table; all that it computes is here.

    Every function is pure, and differentiable in rows, x, shared and taps. Taps are None where no gradient is wanted.
    """

    enter: Enter
    block: Block
    leave: Leave
    # (config, the rows of weights.table that the layer has, its number i as an int32 array, key) -> its weights, f32
    init_layer: Callable[[Config, weights.Table, jax.Array, jax.Array], dict[str, jax.Array]]
    init_once: Callable[
        [Config, jax.Array, jax.Array], dict[str, jax.Array]
    ]  # (config, embed key, head key) -> the others
