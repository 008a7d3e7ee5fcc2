"""Independent float64 numpy forward and backward of nanochat's GPT: the oracle that the JAX model is tested against.

Written from the published formulas, not from nanojax/model, and sharing no code with it.

    x = rms(embed[tokens])
    for each layer:
        h = rms(x);  q, k, v = split(h Wqkv^T);  q, k = rms(rope(q)), rms(rope(k))
        x = x + softmax(causal(q k^T / sqrt(H))) v Wo^T
        x = x + relu(rms(x) Wup^T)^2 Wdown^T
    logits = cap * tanh(rms(x) Whead^T / cap)

`cfg` is a nanojax Config or its `.model` section, or anything with `head_dim`, `softcap` and `rope_base`.
`params` is the nanojax layout (weights [out, in], blocks a tuple of layers) as float arrays.
Shapes: B batch · T time · D model · N heads · H head dim · F hidden · V vocab · L layers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Params = dict[str, Any]  # arrays and dicts of them
NORM_EPS = 2.0**-23  # inside the square root: what torch's F.rms_norm takes in f32, hence nanochat


def rms(x: Array, eps: float = NORM_EPS) -> tuple[Array, Array]:
    """RMSNorm without parameters over the last axis: returns (y, reciprocal rms kept for the backward)."""
    r = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * r, r


def rms_backward(dy: Array, y: Array, r: Array) -> Array:
    """Gradient of `rms`: y = x r, r = (mean x^2 + eps)^-1/2, so dx = r (dy - y mean(dy y))."""
    return r * (dy - y * np.mean(dy * y, axis=-1, keepdims=True))


def rope_tables(T: int, H: int, base: float, start: int = 0) -> tuple[Array, Array]:
    """cos and sin [T, H/2] of position times inverse frequency base^(-2i/H)."""
    inv_freq = base ** (-np.arange(0, H, 2, dtype=np.float64) / H)
    angle = np.arange(start, start + T, dtype=np.float64)[:, None] * inv_freq[None, :]
    return np.cos(angle), np.sin(angle)


def rope(x_BTNH: Array, cos: Array, sin: Array) -> Array:
    """nanochat's rotation, by minus the angle: (x1 c + x2 s, -x1 s + x2 c) on the two halves of H."""
    x1, x2 = np.split(x_BTNH, 2, axis=-1)
    c, s = cos[None, :, None, :], sin[None, :, None, :]
    return np.concatenate([x1 * c + x2 * s, -x1 * s + x2 * c], axis=-1)


def rope_backward(dy_BTNH: Array, cos: Array, sin: Array) -> Array:
    """The rotation is orthogonal, so its gradient is the opposite rotation."""
    return rope(dy_BTNH, cos, -sin)


def to_float64(params: Mapping[str, Any]) -> Params:
    """The parameter tree as float64 numpy arrays (bf16 leaves are widened exactly)."""
    wide = {name: np.asarray(leaf).astype(np.float64) for name, leaf in params.items() if name != "blocks"}
    return wide | ({"blocks": tuple(map(to_float64, params["blocks"]))} if "blocks" in params else {})


def _block_forward(x: Array, w: Params, cos: Array, sin: Array, H: int) -> tuple[Array, tuple[Array, ...]]:
    B, T, D = x.shape
    N = D // H
    h, r_h = rms(x)
    qkv = h @ w["qkv"].T
    q0, k0, v = (part.reshape(B, T, N, H) for part in np.split(qkv, 3, axis=-1))
    q, r_q = rms(rope(q0, cos, sin))
    k, r_k = rms(rope(k0, cos, sin))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)
    scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    y = np.einsum("bnts,bsnh->btnh", p, v).reshape(B, T, D)
    x_mid = x + y @ w["o"].T
    g, r_g = rms(x_mid)
    u = np.maximum(g @ w["up"].T, 0.0)
    out = x_mid + (u * u) @ w["down"].T
    return out, (h, r_h, q, r_q, k, r_k, v, p, y, g, r_g, u)


def _block_backward(
    dout: Array, w: Params, kept: tuple[Array, ...], cos: Array, sin: Array, H: int
) -> tuple[Array, Params]:
    h, r_h, q, r_q, k, r_k, v, p, y, g, r_g, u = kept
    B, T, D = h.shape
    grad: Params = {}
    grad["down"] = np.einsum("btd,btf->df", dout, u * u)
    du = 2.0 * u * (dout @ w["down"])  # d relu(z)^2 / dz = 2 relu(z)
    grad["up"] = np.einsum("btf,btd->fd", du, g)
    dmid = dout + rms_backward(du @ w["up"], g, r_g)
    grad["o"] = np.einsum("btd,bte->de", dmid, y)
    dy = (dmid @ w["o"]).reshape(B, T, D // H, H)
    dv = np.einsum("bnts,btnh->bsnh", p, dy)
    dp = np.einsum("btnh,bsnh->bnts", dy, v)
    ds = p * (dp - np.sum(dp * p, axis=-1, keepdims=True)) / np.sqrt(H)
    dq = np.einsum("bnts,bsnh->btnh", ds, k)
    dk = np.einsum("bnts,btnh->bsnh", ds, q)
    dq = rope_backward(rms_backward(dq, q, r_q), cos, sin)
    dk = rope_backward(rms_backward(dk, k, r_k), cos, sin)
    dqkv = np.concatenate([d.reshape(B, T, D) for d in (dq, dk, dv)], axis=-1)
    grad["qkv"] = np.einsum("bte,btd->ed", dqkv, h)
    return dmid + rms_backward(dqkv @ w["qkv"], h, r_h), grad


def _run(params: Mapping[str, Any], tokens: Array, cfg: Any) -> tuple[Any, ...]:
    m = getattr(cfg, "model", cfg)
    weights = to_float64(params)
    tokens = np.asarray(tokens)
    cos, sin = rope_tables(tokens.shape[1], m.head_dim, m.rope_base)
    x, r_x = rms(weights["embed"][tokens])
    embedded, blocks = (x, r_x), []
    for w in weights["blocks"]:
        x, kept = _block_forward(x, w, cos, sin, m.head_dim)
        blocks.append((w, kept))
    final = rms(x)
    t = np.tanh(final[0] @ weights["head"].T / m.softcap)
    return m, weights, (cos, sin), embedded, blocks, final, t


def forward(params: Mapping[str, Any], tokens: Array, cfg: Any) -> Array:
    """Logits [B, T, V] float64 for int tokens [B, T]."""
    m, *_, t = _run(params, tokens, cfg)
    return m.softcap * t


def token_losses(params: Mapping[str, Any], tokens: Array, targets: Array, cfg: Any) -> Array:
    """Negative log likelihood in nats [B, T] float64 of targets [B, T] (any id >= 0)."""
    logits = forward(params, tokens, cfg)
    top = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return log_z - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]


def loss_and_grads(params: Mapping[str, Any], tokens: Array, targets: Array, cfg: Any) -> tuple[float, Params]:
    """Mean negative log likelihood (a float, nats per target; negative targets are ignored) and its gradient tree."""
    m, weights, (cos, sin), (x0, r0), blocks, (xf, rf), t = _run(params, tokens, cfg)
    tokens, targets = np.asarray(tokens), np.asarray(targets)
    valid = targets >= 0
    count = valid.sum()
    logits = m.softcap * t
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    z = probs.sum(-1, keepdims=True)
    picked = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)
    nll = (np.log(z) + logits.max(-1, keepdims=True) - picked)[..., 0]
    loss = float((nll * valid).sum() / count)

    dlogits = probs / z
    np.put_along_axis(
        dlogits, np.maximum(targets, 0)[..., None], np.exp(picked - logits.max(-1, keepdims=True)) / z - 1.0, -1
    )
    dlogits *= valid[..., None] / count
    dpre = dlogits * (1.0 - t * t)  # d cap tanh(a / cap) / da = 1 - tanh^2
    grads: Params = {"head": np.einsum("btv,btd->vd", dpre, xf)}
    dx = rms_backward(dpre @ weights["head"], xf, rf)
    layers = []
    for w, kept in reversed(blocks):
        dx, grad = _block_backward(dx, w, kept, cos, sin, m.head_dim)
        layers.append(grad)
    grads["blocks"] = tuple(reversed(layers))
    grads["embed"] = np.zeros_like(weights["embed"])
    np.add.at(grads["embed"], tokens, rms_backward(dx, x0, r0))
    return loss, grads


def random_params(seed: int, cfg: Any, std: float = 1.0) -> Params:
    """Float32 parameters with no tensor zero, so that no gradient is (the recipe's init zeroes three)."""
    m = getattr(cfg, "model", cfg)
    rng = np.random.default_rng(seed)
    D, F, V, L = m.width, 4 * m.width, m.vocab, m.depth

    def normal(*shape: int, scale: float) -> Array:
        return (rng.standard_normal(shape) * scale * std).astype(np.float32)

    def layer() -> Params:
        return {
            "qkv": normal(3 * D, D, scale=D**-0.5),
            "o": normal(D, D, scale=D**-0.5),
            "up": normal(F, D, scale=D**-0.5),
            "down": normal(D, F, scale=F**-0.5),
        }

    return {
        "embed": normal(V, D, scale=1.0),
        "blocks": tuple(layer() for _ in range(L)),
        "head": normal(V, D, scale=D**-0.5),
    }
