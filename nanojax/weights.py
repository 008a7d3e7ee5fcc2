"""The table of weights: every weight of the model, once. Plain data without jax.

Initialisation, counts, FLOPs, bits, state, accumulators, learning rates, checkpoint names and the layouts of other programs
are read from this table. A second model adds its own table here and its own file in model/.
"""

import math
from typing import Literal, NamedTuple, Protocol


class Sizes(Protocol):
    """The letters of every shape in nanojax, as in q_BTNH, and which model it is.

    B batch, T time, D model width, N heads, H head dim, F hidden, V vocabulary, L layers, A microbatches; C chunk,
    M = B*T tokens, K and O a matmul's input and output.
    """

    @property
    def family(self) -> str: ...
    @property
    def left_out(self) -> tuple[str, ...]: ...
    @property
    def window(self) -> int: ...
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
    """How a weight begins: exactly `values` where given, else uniform in [-uniform, uniform) or [0, uniform), else normal.

    Zeros without any. Each of the weight's parts is drawn by itself.
    """

    std: float = 0.0
    uniform: float = 0.0
    positive: bool = False  # uniform in [0, uniform)
    values: tuple[float, ...] = ()


class Weight(NamedTuple):
    """One row of the table.

    Attributes:
      shape: of one layer's array. Matrices are [out, in], as torch stores them.
      use: rows = one row per token is read (an embedding, of the model or of a layer); layer = a layer reads it whole; head =
        the output matrix; shared = read whole outside the layers.
      stored: the key of config.stored that names its format; f32 = always f32, for a few numbers.
      accumulate: the key of config.accumulate that says where its gradient is summed, or f32.
      group: its optimizer group, a key of step.optim.groups.
      layers: the layers that have one; () = it exists once, outside the layers.
      parts: how many matrices are stacked in it; Muon orthogonalises each by itself.
    """

    shape: tuple[int, ...]
    use: Literal["rows", "layer", "head", "shared"]
    init: Init
    stored: Literal["blocks", "embed", "head", "value", "f32"]
    accumulate: Literal["blocks", "embed_head", "f32"]
    group: str
    layers: tuple[int, ...] | range = ()
    parts: int = 1

    @property
    def parameters(self) -> int:
        """Parameters, over all layers."""
        return math.prod(self.shape) * (len(self.layers) if self.layered else 1)

    @property
    def layered(self) -> bool:
        """Whether layers have one each."""
        return self.use == "layer" or bool(self.layers)

    @property
    def multiplied(self) -> bool:
        """Whether a matmul reads it: neither looked up nor a scale."""
        return self.use != "rows" and len(self.shape) > 1


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


GATE_CHANNELS, SMEAR_CHANNELS = 12, 24  # of the normed stream: what a value gate and the smear's gate read


def nanochat_2026(m: Sizes) -> Table:
    """nanochat's recipe of July 2026 (commit 92d63d4). Every second layer, the last one among them, has a value embedding."""
    spread = math.sqrt(3 / m.D)
    every, second = range(m.L), tuple(i for i in range(m.L) if i % 2 == (m.L - 1) % 2)
    slope = lambda first, last: Init(values=tuple(first + (last - first) * i / max(m.L - 1, 1) for i in every))

    def matrix(out: int, into: int, init: Init, parts: int = 1) -> Weight:
        return Weight((out, into), "layer", init, "blocks", "blocks", "matrix", every, parts)

    def shared(shape: tuple[int, ...], init: Init, group: str) -> Weight:
        return Weight(shape, "shared", init, "f32", "f32", group)

    gate = Init(uniform=0.02, positive=True)
    parts = {
        "smear": {
            "smear_gate": shared((1, SMEAR_CHANNELS), gate, "gate"),
            "smear": shared((1,), Init(), "gate"),
        },
        "backout": {"backout": shared((1,), Init(values=(0.2,)), "gate")},
        "x0": {
            "residual": shared((m.L,), slope(1.15, 1.05), "residual"),
            "first": shared((m.L,), slope(0.20, 0.05), "first"),
        },
        "value": {
            "value": Weight((m.V, m.D), "rows", Init(uniform=spread), "value", "embed_head", "value", second),
            "value_gate": Weight((m.N, GATE_CHANNELS), "layer", gate, "f32", "f32", "value_gate", second),
        },
    }
    return {
        "embed": Weight((m.V, m.D), "rows", Init(0.8), "embed", "embed_head", "embed"),
        "qkv": matrix(3 * m.D, m.D, Init(uniform=spread), parts=3),
        "o": matrix(m.D, m.D, Init()),
        "up": matrix(m.F, m.D, Init(uniform=0.4 * spread)),
        "down": matrix(m.D, m.F, Init()),
        **{name: row for part, rows in parts.items() if part not in m.left_out for name, row in rows.items()},
        "head": Weight((m.V, m.D), "head", Init(0.001), "head", "embed_head", "head"),
    }


PARTS_2026 = ("value", "x0", "smear", "backout")  # what model.without may name


def table(m: Sizes) -> Table:
    """The weights of the model of these sizes."""
    return nanochat_2026(m) if m.family == "2026" else gpt(m)


def windows(m: Sizes) -> tuple[int, ...]:
    """For each layer, how many positions before its own a query sees, T = all.

    2026: three layers of `m.window`, then one of T, and so on; the last layer sees all. cuDNN's window is one larger, since
    it counts the query's own position.
    """
    if m.family != "2026":
        return (m.T,) * m.L
    return tuple(m.T if i % 4 == 3 or i == m.L - 1 else min(m.window, m.T) for i in range(m.L))


def layer_weights(rows: Table, layer: int) -> Table:
    """The weights that layer `layer` has."""
    return {name: weight for name, weight in rows.items() if weight.layered and layer in weight.layers}


def parameters(m: Sizes) -> int:
    """Parameters of the whole model."""
    return sum(weight.parameters for weight in table(m).values())


def scaling_parameters(m: Sizes) -> int:
    """Parameters that nanochat's scaling laws count: the layers' matrices, gates included, and the head."""
    return sum(w.parameters for w in table(m).values() if w.use in ("layer", "head"))


def flops_per_token(m: Sizes) -> int:
    """Training FLOPs per token in nanochat's count: 6 per parameter that a matmul reads, and 12*D per position attended to.

    An embedding is looked up, not multiplied. Causality is not deducted.
    """
    return 6 * sum(w.parameters for w in table(m).values() if w.multiplied) + 12 * m.D * sum(windows(m))


def tokens_per_step(m: Sizes, twelve: Sizes) -> int:
    """nanochat's batch: 2^19 tokens at d12 (`twelve`), growing as tokens^0.383 at a fixed ratio, as a power of two.

    From arXiv:2505.13738's exponent.
    """
    grown = (scaling_parameters(m) / scaling_parameters(twelve)) ** 0.383
    return 2 ** round(math.log2(2**19 * grown))
