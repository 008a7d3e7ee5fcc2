"""The table of weights: every weight of the model, once. Plain data without jax.

Initialisation, counts, FLOPs, bits, state, accumulators, learning rates, checkpoint names and the layouts of other programs
are read from this table. A second model adds its own table here and its own file in model/.
"""

import math
from typing import Literal, NamedTuple, Protocol


class Sizes(Protocol):
    """The letters of every shape in nanojax, as in q_BTNH.

    B batch, T time, D model width, N heads, H head dim, F hidden, V vocabulary, L layers, A microbatches; C chunk,
    M = B*T tokens, K and O a matmul's input and output.
    """

    @property
    def T(self) -> int: ...
    @property
    def D(self) -> int: ...
    @property
    def N(self) -> int: ...
    @property
    def H(self) -> int: ...
    @property
    def F(self) -> int: ...
    @property
    def V(self) -> int: ...
    @property
    def L(self) -> int: ...


class Init(NamedTuple):
    """Zeros where `std` is 0; otherwise normal with standard deviation `std`, each of the weight's parts drawn by itself."""

    std: float = 0.0


class Weight(NamedTuple):
    """One row of the table.

    Attributes:
      shape: of one layer's array. Matrices are [out, in], as torch stores them.
      use: rows = one row per token is read (an embedding); layer = a layer reads it whole; head = the output matrix;
        shared = read whole outside the layers.
      stored: the key of config.stored that names its format.
      accumulate: the key of config.accumulate that says where its gradient is summed.
      group: its optimizer group, a key of step.optim.groups.
      layers: the layers that have one; () = it exists once, outside the layers.
      parts: how many matrices are stacked in it; Muon orthogonalises each by itself.
    """

    shape: tuple[int, ...]
    use: Literal["rows", "layer", "head", "shared"]
    init: Init
    stored: Literal["blocks", "embed", "head"]
    accumulate: Literal["blocks", "embed_head"]
    group: str
    layers: tuple[int, ...] | range = ()
    parts: int = 1

    @property
    def parameters(self) -> int:
        """Parameters, over all layers."""
        return math.prod(self.shape) * (len(self.layers) if self.use == "layer" else 1)


Table = dict[str, Weight]


def gpt(m: Sizes) -> Table:
    """nanochat's d-series of November 2025. q, k and v are one array."""
    spread = lambda out, into: Init(min(1.0, math.sqrt(out / into)) / math.sqrt(into))  # arXiv:2310.17813
    every = range(m.L)

    def matrix(out: int, into: int, init: Init, parts: int = 1) -> Weight:
        return Weight((out, into), "layer", init, "blocks", "blocks", "matrix", every, parts)

    return {
        "embed": Weight((m.V, m.D), "rows", Init(1.0), "embed", "embed_head", "embed"),
        "qkv": matrix(3 * m.D, m.D, spread(m.D, m.D), parts=3),
        "o": matrix(m.D, m.D, Init()),
        "up": matrix(m.F, m.D, spread(m.F, m.D)),
        "down": matrix(m.D, m.F, Init()),
        "head": Weight((m.V, m.D), "head", Init(), "head", "embed_head", "head"),
    }


def table(m: Sizes) -> Table:
    """The weights of the model of these sizes."""
    return gpt(m)


def layer_weights(rows: Table, layer: int) -> Table:
    """The weights that layer `layer` has."""
    return {name: weight for name, weight in rows.items() if weight.use == "layer" and layer in weight.layers}


def parameters(m: Sizes) -> int:
    """Parameters of the whole model."""
    return sum(weight.parameters for weight in table(m).values())


def flops_per_token(m: Sizes) -> int:
    """Training FLOPs per token in nanochat's count: 6 per parameter that a matmul reads, and 12*L*D*T for attention.

    An embedding is looked up, not multiplied. Causality is not deducted.
    """
    return 6 * sum(w.parameters for w in table(m).values() if w.use != "rows") + 12 * m.L * m.D * m.T
