"""Independent float64 numpy training rules of nanochat's recipe of July 2026: Muon, AdamW, schedules, rates and sizes.

Written from the published formulas, not from nanojax/step, and sharing no code with it. Matrices are [rows, columns] = [out, in].
B: tokens per step. D: model width. L: layers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np
from oracles.numpy_gpt2026 import SMEAR_CHANNELS, VALUE_CHANNELS, Array, has_value, short_window, windows

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
Rounding = Callable[[Array], Array]


def exact(x: Array) -> Array:
    return x


def to_bf16(x: Array) -> Array:
    """Rounded to bf16, still as float64."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


# Muon


class Muon(NamedTuple):
    """One matrix's state, from zero."""

    momentum: Array  # as the matrix
    second: Array  # [rows, 1] or [1, columns]


def muon_state(W: Array) -> Muon:
    rows, columns = W.shape
    return Muon(np.zeros(W.shape), np.zeros((rows, 1) if rows >= columns else (1, columns)))


def muon_step(
    W: Array, G: Array, state: Muon, lr: float, mu: float, decay: float, low: Rounding = exact
) -> tuple[Array, Muon]:
    """One step of one matrix: its new value and state. lr is the group's scheduled rate, without the aspect factor.

    low=to_bf16 rounds the update after momentum and whatever is computed from it, but sums inside norms and means.
    """
    rows, columns = W.shape
    U, momentum = nesterov(G, state.momentum, mu)
    X = polar_express(equilibrated(low(U), low), low)
    X, second = normuon(renormalised(X, low), state.second, low)
    return cautious(W, X, lr * math.sqrt(max(1, rows / columns)), decay), Muon(momentum, second)


def nesterov(G: Array, momentum: Array, mu: float) -> tuple[Array, Array]:
    """buf = mu buf + (1-mu) G;  U = (1-mu) G + mu buf."""
    momentum = mu * momentum + (1 - mu) * G
    return (1 - mu) * G + mu * momentum, momentum


def equilibrated(U: Array, low: Rounding = exact) -> Array:
    """MuonEq: every row gets the norm that all rows have in the mean square, ||U||_F / sqrt(rows)."""
    return low(U * (norm(U) / math.sqrt(len(U))) / np.maximum(np.linalg.norm(U, axis=1, keepdims=True), 1e-6))


def polar_express(U: Array, low: Rounding = exact) -> Array:
    """Singular values to about 1: X = U / (1.01 ||U||_F + 1e-6), then five times X = a X + (b A + c A A) X, A = X X^T."""
    if len(U) > U.shape[1]:
        return polar_express(U.T, low).T  # A on the smaller side: X A with A = X^T X is the transpose of A^T X^T
    X = low(U / (1.01 * norm(U) + 1e-6))
    for a, b, c in POLAR_EXPRESS:
        A = low(X @ X.T)
        B = low(b * A + c * low(A @ A))
        X = low(a * X + low(B @ X))
    return X


def renormalised(X: Array, low: Rounding = exact) -> Array:
    """Muon+: the Frobenius norm of an orthogonal matrix, sqrt(min(rows, columns))."""
    return low(X * math.sqrt(min(X.shape)) / max(norm(X), 1e-6))


def normuon(X: Array, second: Array, low: Rounding = exact) -> tuple[Array, Array]:
    """NorMuon: divides by the root of s = 0.9 s + 0.1 mean(X^2), one per row, or per column if wide; keeps ||X||_F."""
    rows, columns = X.shape
    q = (X * X).mean(axis=1 if rows >= columns else 0, keepdims=True)
    second = 0.9 * second + 0.1 * q
    d = 1 / np.sqrt(np.maximum(second, 1e-10))
    # The floor under the last norm is ours: X is zero where the gradient is, as of all weights before a zero matrix at the start.
    return low(X * d * norm(X) / max(norm(X * d), 1e-10)), second


def cautious(W: Array, X: Array, lr: float, decay: float) -> Array:
    """W -= lr (X + decay W [X W >= 0]): decays only where the step already goes towards 0."""
    return W - lr * (X + decay * W * (X * W >= 0))


def norm(X: Array) -> float:
    return float(np.sqrt((X * X).sum()))


# AdamW


class Adam(NamedTuple):
    """One group's constants; lr is its peak rate."""

    lr: float
    beta1: float
    beta2: float
    decay: float


def adamw_step(
    p: Array, g: Array, m: Array, v: Array, t: int, group: Adam, factor: float
) -> tuple[Array, Array, Array]:
    """Step t = 0, 1, ... from m = v = 0: new p, m, v. factor is the schedule's, on the rate and so on the decay."""
    lr = group.lr * factor
    p = p * (1 - lr * group.decay)
    m = group.beta1 * m + (1 - group.beta1) * g
    v = group.beta2 * v + (1 - group.beta2) * g * g
    m_hat, v_hat = m / (1 - group.beta1 ** (t + 1)), v / (1 - group.beta2 ** (t + 1))
    return p - lr * m_hat / (np.sqrt(v_hat) + 1e-10), m, v


def adam_groups(width: int, batch: int) -> dict[str, Adam]:
    """Every weight outside Muon, by its name in numpy_gpt2026."""
    b, h = math.sqrt(batch / 2**19), math.sqrt(768 / width)
    return {
        "head": Adam(0.008 * b * h, 0.8, 0.96, 0.01),
        "embed": Adam(0.3 * b * h, 0.8, 0.995, 0.001),
        "value": Adam(0.15 * b * h, 0.8, 0.995, 0.01),
        "residual": Adam(0.005 * b, 0.8, 0.95, 0.05),
        "first": Adam(0.5 * b, 0.96, 0.95, 0.0),
        "smear_gate": Adam(0.2, 0.8, 0.95, 0.0),
        "smear": Adam(0.2, 0.8, 0.95, 0.0),
        "backout": Adam(0.2, 0.8, 0.95, 0.0),
    }


def muon_rate(batch: int) -> float:
    """Peak rate of q, k, v, o, up, down and gate, to which muon_step adds the aspect factor."""
    return 0.02 * math.sqrt(batch / 2**19)


# Schedules: t is the step from 0, of `steps` in all


def warmdown(steps: int) -> int:
    """Length of the falling part."""
    return round(0.65 * steps)


def lr_factor(t: int, steps: int) -> float:
    """Up to 1 in 40 steps, 1, then linearly towards 0.05, which step number `steps` would have."""
    if t < 40:
        return (t + 1) / 40
    f = min(1.0, (steps - t) / warmdown(steps))
    return f + 0.05 * (1 - f)


def muon_momentum(t: int, steps: int) -> float:
    """0.85 to 0.97 in 400 steps, whatever the run's length; 0.97; then to 0.90 as the rate falls."""
    if t < 400:
        return 0.85 + (0.97 - 0.85) * t / 400
    fallen = max(0.0, 1 - (steps - t) / warmdown(steps))
    return 0.97 + (0.90 - 0.97) * fallen


def muon_decay(t: int, steps: int, decay: float) -> float:
    """Half a cosine from `decay` to 0."""
    return decay * 0.5 * (1 + math.cos(math.pi * t / steps))


# Sizes


class Sizes(NamedTuple):
    """Parameter counts of a depth; flops per token of forward and backward, attention as if it were not causal."""

    width: int
    heads: int
    embed: int  # and as many in the head
    value: int  # all tables
    matrices: int  # the blocks' with their gates
    scalars: int  # residual, first, smear gate, smear, backout
    flops: int

    @property
    def total(self) -> int:
        return 2 * self.embed + self.value + self.matrices + self.scalars

    @property
    def scaling(self) -> int:
        """What the laws count: the blocks' matrices and the head."""
        return self.matrices + self.embed


def sizes(depth: int, vocab: int = 32768, seq: int = 2048, head_dim: int = 128) -> Sizes:
    """64 channels per layer, up to whole heads."""
    D = -(-64 * depth // head_dim) * head_dim
    heads, tables = D // head_dim, sum(has_value(i, depth) for i in range(depth))
    matrices = depth * (4 + 4 + 4) * D * D + tables * heads * VALUE_CHANNELS
    attention = sum(12 * D * min(window, seq) for window in windows(depth, seq, short_window(seq)))
    return Sizes(
        width=D,
        heads=heads,
        embed=vocab * D,
        value=tables * vocab * D,
        matrices=matrices,
        scalars=2 * depth + SMEAR_CHANNELS + 2,
        flops=6 * (matrices + vocab * D + SMEAR_CHANNELS) + attention,
    )


# Scaling laws, from the reference d12 at B = 2^19


class Horizon(NamedTuple):
    """How long a depth trains, at which batch and peak Muon decay."""

    tokens: float
    batch: int
    steps: int
    decay: float


def horizon(depth: int, ratio: float = 12) -> Horizon:
    """ratio: tokens per scaling parameter."""
    tokens, reference = ratio * sizes(depth).scaling, ratio * sizes(12).scaling
    batch = 2 ** round(math.log2(2**19 * (tokens / reference) ** 0.383))
    return Horizon(tokens, batch, int(tokens // batch), 0.28 * math.sqrt(batch / 2**19) * reference / tokens)
