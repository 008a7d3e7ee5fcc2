"""Independent float64 numpy forward and backward of nanochat's GPT of July 2026: the oracle that the JAX model is tested against.

Written from the published formulas, not from nanojax/model, and sharing no code with it or with the older oracle.

    e = rms(embed[tokens]);  x_t = e_t + s sigmoid(w . e_t[:24]) e_(t-1);  x0 = x
    for layer i of L:
        x = r_i x + a_i x0;  u = rms(x);  q, k, v = u Wq^T, u Wk^T, u Wv^T
        if i % 2 == (L-1) % 2:  v_n = v_n + 3 sigmoid(u[:12] G_i^T)_n value_i[tokens]_n, for each head n
        q, k = 1.2 rms(rope(q)), 1.2 rms(rope(k))
        x = x + softmax(q k^T / sqrt(H), over the keys t - window .. t) v Wo^T
        x = x + relu(rms(x) Wup^T)^2 Wdown^T
        if i == L // 2:  b = x
    logits = 15 tanh(rms(x - beta b) Whead^T / 15)

Parameters, matrices as [out, in]: embed, head [V, D]; smear_gate (w) [1, 24]; smear (s), backout (beta) [1]; residual (r),
first (a) [L]; blocks, a tuple of L dicts: q, k, v, o [D, D], up [4D, D], down [D, 4D], and gate [N, 12], value [V, D] in
the layers that have them. Gradients come in the same tree.
Shapes: B batch · T time · D model · N heads · H head dim · F hidden · V vocab · L layers · C gate channels.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Params = dict[str, Any]  # arrays, and a tuple of dicts of arrays

SMEAR_CHANNELS, VALUE_CHANNELS = 24, 12
QK_GAIN = 1.2
CAP = 15.0


class Model(NamedTuple):
    """What the arrays' shapes do not tell."""

    head_dim: int
    short_window: int  # of the layers S: a query sees this many keys to its left, and its own
    rope_base: float = 100_000.0
    eps: float = 2.0**-23  # under every norm's square root


def windows(depth: int, seq: int, short: int) -> list[int]:
    """Left window of each layer: short, short, short, full, and so on; the last layer is full whatever its number."""
    return [seq if i % 4 == 3 or i == depth - 1 else short for i in range(depth)]


def short_window(seq: int) -> int:
    """The recipe's short window: a quarter of the sequence, up to a multiple of 128."""
    return -(-seq // (4 * 128)) * 128


def has_value(layer: int, depth: int) -> bool:
    """Whether the layer adds a value embedding: every other one, counted back from the last."""
    return layer % 2 == (depth - 1) % 2


def logits(params: Mapping[str, Any], tokens: Array, model: Model) -> Array:
    """Logits [B, T, V] of tokens [B, T]."""
    return CAP * _run(to_float64(params), np.asarray(tokens), model)[-1]


def losses(params: Mapping[str, Any], tokens: Array, targets: Array, model: Model) -> Array:
    """Negative log likelihood in nats [B, T] of targets [B, T]."""
    return -np.take_along_axis(log_softmax(logits(params, tokens, model)), np.asarray(targets)[..., None], -1)[..., 0]


def loss_and_grads(
    params: Mapping[str, Any], tokens_BT: Array, targets_BT: Array, model: Model, weights: Array | None = None
) -> tuple[float, Params]:
    """Mean of the losses and its gradient tree. weights [B, T]: the mean is sum(weights losses) / sum(weights)."""
    p, tokens, targets = to_float64(params), np.asarray(tokens_BT), np.asarray(targets_BT)
    (e, r_e, smear_gate), layers, x0, b, (z, r_z), tanh = _run(p, tokens, model)
    share = np.ones(tokens.shape) if weights is None else np.asarray(weights, np.float64)
    share = share / share.sum()
    log_p = log_softmax(CAP * tanh)
    target = np.eye(tanh.shape[-1])[targets]  # one-hot [B, T, V]
    loss = float(-(share * (target * log_p).sum(-1)).sum())

    da = share[..., None] * (np.exp(log_p) - target) * (1 - tanh**2)  # d 15 tanh(a/15) / da = 1 - tanh^2
    grad: Params = {"head": np.einsum("btv,btd->vd", da, z)}
    dx = rms_backward(da @ p["head"], z, r_z)
    grad["backout"] = np.array([-(dx * b).sum()])  # x - beta b
    db = -p["backout"][0] * dx

    L = len(layers)
    grad["residual"], grad["first"], dx0, blocks = np.zeros(L), np.zeros(L), np.zeros_like(x0), [{}] * L
    for i in reversed(range(L)):
        if i == L // 2:
            dx = dx + db  # b is this layer's output
        x_in, kept = layers[i]
        dmix, blocks[i] = _block_backward(dx, p["blocks"][i], kept, tokens, model)
        grad["residual"][i] = (dmix * x_in).sum()  # r_i x + a_i x0
        grad["first"][i] = (dmix * x0).sum()
        dx0 += p["first"][i] * dmix
        dx = p["residual"][i] * dmix
    grad["blocks"] = tuple(blocks)

    de, grad["smear"], grad["smear_gate"] = _smear_backward(dx + dx0, p["smear"], p["smear_gate"], e, smear_gate)
    grad["embed"] = np.zeros_like(p["embed"])
    np.add.at(grad["embed"], tokens, rms_backward(de, e, r_e))
    return loss, grad


def random_params(rng: np.random.Generator, depth: int, vocab: int, head_dim: int, width: int | None = None) -> Params:
    """float64 parameters without a zero, so that no gradient is zero. width: 64 per layer, in whole heads, unless given."""
    D = width or -(-64 * depth // head_dim) * head_dim
    assert D % head_dim == 0 and D >= SMEAR_CHANNELS, (D, head_dim)

    def matrix(out: int, into: int, gain: float = 1.0) -> Array:
        return gain * into**-0.5 * rng.standard_normal((out, into))

    def block(i: int) -> Params:
        w = {name: matrix(D, D) for name in ("q", "k", "v", "o")} | {"up": matrix(4 * D, D), "down": matrix(D, 4 * D)}
        if has_value(i, depth):
            w |= {"gate": matrix(D // head_dim, VALUE_CHANNELS, 2.0), "value": rng.standard_normal((vocab, D))}
        return w

    return {
        "embed": 0.8 * rng.standard_normal((vocab, D)),
        "head": matrix(vocab, D, 3.0),  # logits of about 3, where the cap bends
        "smear_gate": matrix(1, SMEAR_CHANNELS, 2.0),
        "smear": np.array([0.7]),
        "backout": np.array([0.2]),
        "residual": rng.uniform(0.8, 1.2, depth),
        "first": rng.uniform(0.1, 0.4, depth),
        "blocks": tuple(block(i) for i in range(depth)),
    }


def to_float64(params: Mapping[str, Any]) -> Params:
    """The tree as float64 numpy arrays."""
    wide = {name: np.asarray(leaf).astype(np.float64) for name, leaf in params.items() if name != "blocks"}
    return wide | ({"blocks": tuple(map(to_float64, params["blocks"]))} if "blocks" in params else {})


def rms(x: Array, eps: float) -> tuple[Array, Array]:
    """y = x r with r = (mean x^2 + eps)^-1/2 over the last axis; returns y and r."""
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x * r, r


def rms_backward(dy: Array, y: Array, r: Array) -> Array:
    """dr/dx = -r^3 x / D, so dx = r dy - r^3 x mean(dy x) = r (dy - y mean(dy y))."""
    return r * (dy - y * (dy * y).mean(-1, keepdims=True))


def rope(x_BTNH: Array, base: float, sign: float = 1.0) -> Array:
    """Pairs (j, j + H/2) by the angle t base^(-2j/H): (a cos + b sin, -a sin + b cos). sign=-1 is inverse and gradient."""
    _, T, _, H = x_BTNH.shape
    angle = np.arange(T)[:, None] * base ** (-2 * np.arange(H // 2) / H)
    cos, sin = np.cos(angle)[:, None, :], sign * np.sin(angle)[:, None, :]  # [T, 1, H/2]
    a, b = x_BTNH[..., : H // 2], x_BTNH[..., H // 2 :]
    return np.concatenate([a * cos + b * sin, -a * sin + b * cos], -1)


def visible(T: int, window: int) -> Array:
    """[T queries, T keys]: query t sees the keys t - window .. t, which are window + 1."""
    t, s = np.arange(T)[:, None], np.arange(T)[None, :]
    return (t - window <= s) & (s <= t)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def log_softmax(x: Array) -> Array:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _run(p: Params, tokens: Array, m: Model) -> tuple[Any, ...]:
    """The forward pass: (e, its 1/rms, smear gate), the layers' inputs and activations, x0, b, (z, its 1/rms), tanh."""
    L, T = len(p["blocks"]), tokens.shape[1]
    e, r_e = rms(p["embed"][tokens], m.eps)
    gate = sigmoid(e[:, 1:, :SMEAR_CHANNELS] @ p["smear_gate"].T)  # [B, T-1, 1]; position 0 has no token before it
    x0 = e.copy()
    x0[:, 1:] += p["smear"][0] * gate * e[:, :-1]
    x, b, layers = x0, x0, []
    for i, (w, window) in enumerate(zip(p["blocks"], windows(L, T, m.short_window), strict=True)):
        assert ("value" in w) == ("gate" in w) == has_value(i, L), f"value embedding of layer {i}"
        x_in = x
        x, kept = _block_forward(p["residual"][i] * x + p["first"][i] * x0, w, tokens, window, m)
        layers.append((x_in, kept))
        if i == L // 2:
            b = x
    z, r_z = rms(x - p["backout"][0] * b, m.eps)
    return (e, r_e, gate), layers, x0, b, (z, r_z), np.tanh(z @ p["head"].T / CAP)


def _block_forward(x: Array, w: Params, tokens: Array, window: int, m: Model) -> tuple[Array, dict[str, Array]]:
    B, T, D = x.shape
    heads = (B, T, D // m.head_dim, m.head_dim)
    kept: dict[str, Array] = {}  # for the backward
    kept["u"], kept["r_u"] = rms(x, m.eps)
    v = (kept["u"] @ w["v"].T).reshape(heads)
    if "value" in w:
        kept["gate"] = 3 * sigmoid(kept["u"][..., :VALUE_CHANNELS] @ w["gate"].T)  # [B, T, N]
        kept["value"] = w["value"][tokens].reshape(heads)
        v = v + kept["gate"][..., None] * kept["value"]
    kept["v"] = v
    kept["q"], kept["r_q"] = rms(rope((kept["u"] @ w["q"].T).reshape(heads), m.rope_base), m.eps)
    kept["k"], kept["r_k"] = rms(rope((kept["u"] @ w["k"].T).reshape(heads), m.rope_base), m.eps)
    scores = np.einsum("btnh,bsnh->bnts", QK_GAIN * kept["q"], QK_GAIN * kept["k"]) / np.sqrt(m.head_dim)
    kept["p"] = np.exp(log_softmax(np.where(visible(T, window), scores, -np.inf)))
    kept["y"] = np.einsum("bnts,bsnh->btnh", kept["p"], v).reshape(B, T, D)
    x = x + kept["y"] @ w["o"].T
    kept["g"], kept["r_g"] = rms(x, m.eps)
    kept["relu"] = np.maximum(kept["g"] @ w["up"].T, 0)
    return x + kept["relu"] ** 2 @ w["down"].T, kept


def _block_backward(dx: Array, w: Params, kept: dict[str, Array], tokens: Array, m: Model) -> tuple[Array, Params]:
    """Gradients of the block's input and weights from its output's, dx."""
    B, T, D = dx.shape
    heads = (B, T, D // m.head_dim, m.head_dim)
    grad: Params = {"down": np.einsum("btd,btf->df", dx, kept["relu"] ** 2)}
    dup = 2 * kept["relu"] * (dx @ w["down"])  # d relu(a)^2 / da = 2 relu(a)
    grad["up"] = np.einsum("btf,btd->fd", dup, kept["g"])
    dx = dx + rms_backward(dup @ w["up"], kept["g"], kept["r_g"])

    grad["o"] = np.einsum("btd,bte->de", dx, kept["y"])
    dy = (dx @ w["o"]).reshape(heads)
    dv = np.einsum("bnts,btnh->bsnh", kept["p"], dy)
    dp = np.einsum("btnh,bsnh->bnts", dy, kept["v"])
    dscores = kept["p"] * (dp - (dp * kept["p"]).sum(-1, keepdims=True)) * QK_GAIN**2 / np.sqrt(m.head_dim)
    dq = rms_backward(np.einsum("bnts,bsnh->btnh", dscores, kept["k"]), kept["q"], kept["r_q"])
    dk = rms_backward(np.einsum("bnts,btnh->bsnh", dscores, kept["q"]), kept["k"], kept["r_k"])
    parts = {"q": rope(dq, m.rope_base, -1), "k": rope(dk, m.rope_base, -1), "v": dv}
    du = np.zeros((B, T, D))
    for name, part in parts.items():
        grad[name] = np.einsum("bte,btd->ed", part.reshape(B, T, D), kept["u"])
        du += part.reshape(B, T, D) @ w[name]
    if "value" in w:
        grad["value"] = np.zeros_like(w["value"])
        np.add.at(grad["value"], tokens, (kept["gate"][..., None] * dv).reshape(B, T, D))
        dgate = (
            (dv * kept["value"]).sum(-1) * kept["gate"] * (1 - kept["gate"] / 3)
        )  # g = 3 sigmoid(a): dg/da = g (1 - g/3)
        grad["gate"] = np.einsum("btn,btc->nc", dgate, kept["u"][..., :VALUE_CHANNELS])
        du[..., :VALUE_CHANNELS] += dgate @ w["gate"]
    return dx + rms_backward(du, kept["u"], kept["r_u"]), grad


def _smear_backward(dx: Array, s: Array, w: Array, e: Array, gate: Array) -> tuple[Array, Array, Array]:
    """Gradients of e, s and w where x_t = e_t + s gate_t e_(t-1) and gate_t = sigmoid(w . e_t[:24])."""
    along = (dx[:, 1:] * e[:, :-1]).sum(-1, keepdims=True)  # of s gate_t
    da = s[0] * along * gate * (1 - gate)  # of w . e_t
    de = dx.copy()
    de[:, :-1] += s[0] * gate * dx[:, 1:]
    de[:, 1:, :SMEAR_CHANNELS] += da * w[0]
    return de, np.array([(along * gate).sum()]), np.einsum("bto,btc->oc", da, e[:, 1:, :SMEAR_CHANNELS])
