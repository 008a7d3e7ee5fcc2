"""Independent float64 numpy training of nanochat's recipe (Nov-2025): Muon, AdamW, schedules, clipping, microbatches.

Written from the published description, not from nanojax/step, and sharing no code with it. Gradients come from numpy_gpt's
hand-written backward.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from oracles import numpy_gpt
from oracles.numpy_gpt import Array

from nanojax.config import Config


def newton_schulz(g: Array, steps: int = 5) -> Array:
    """Five quintic iterations that push singular values towards 1; g [rows, columns]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (np.sqrt((x * x).sum()) + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def rate(step: int, steps: int, warmup: float, warmdown: float, final: float) -> float:
    """nanochat's learning-rate factor at 0-based `step`."""
    up, down = round(warmup * steps), round(warmdown * steps)
    if step < up:
        return (step + 1) / up
    if step <= steps - down:
        return 1.0
    left = (steps - step) / down
    return left + (1 - left) * final


class Recipe:
    """Parameters and optimizer state; `step` trains on one batch and returns (mean nats per token, gradient norm)."""

    def __init__(self, params: Mapping[str, Any], cfg: Config) -> None:
        self.params = numpy_gpt.to_float64(params)
        self.cfg, self.count = cfg, 0
        self.momentum = [{name: np.zeros_like(w) for name, w in layer.items()} for layer in self.params["blocks"]]
        self.adam = {n: [np.zeros_like(self.params[n]), np.zeros_like(self.params[n])] for n in ("embed", "head")}

    def step(self, tokens_ABT1: Array) -> tuple[float, float]:
        """tokens [A, B, T+1]: A microbatches whose gradients are averaged."""
        o, losses = self.cfg.optim, []
        total: dict[Any, Array] = {}
        for rows in tokens_ABT1:
            loss, grads = numpy_gpt.loss_and_grads(self.params, rows[:, :-1], rows[:, 1:], self.cfg)
            losses.append(loss)
            flat: dict[Any, Array] = {"embed": grads["embed"], "head": grads["head"]}
            flat |= {(i, name): g for i, layer in enumerate(grads["blocks"]) for name, g in layer.items()}
            total = {n: total[n] + g if total else g for n, g in flat.items()}
        grads = {n: g / len(losses) for n, g in total.items()}
        norm = np.sqrt(sum((g * g).sum() for g in grads.values()))
        grads = {n: g * min(1.0, o.clip / (norm + 1e-6)) for n, g in grads.items()}
        factor = rate(self.count, self.cfg.train.steps, o.warmup, o.warmdown, o.final_lr)
        self._muon(grads, o.matrix_lr * factor)
        self.count += 1
        scale = (self.cfg.model.width / 768) ** -0.5
        for name, lr in (("embed", o.embed_lr), ("head", o.head_lr)):
            self._adamw(name, grads[name], lr * scale * factor)
        return float(np.mean(losses)), float(norm)

    def _muon(self, grads: dict[Any, Array], lr: float) -> None:
        o = self.cfg.optim
        warm = min(self.count / o.momentum_warmup, 1)
        m = (1 - warm) * o.momentum_start + warm * o.momentum
        for i, layer in enumerate(self.momentum):
            for name, buf in layer.items():
                buf[:] = m * buf + (1 - m) * grads[i, name]
                update = m * buf + (1 - m) * grads[i, name]
                matrices = np.split(update, 3) if name == "qkv" else [update]
                rows, columns = matrices[0].shape
                orthogonal = np.concatenate([newton_schulz(u) for u in matrices])
                self.params["blocks"][i][name] -= lr * max(1, rows / columns) ** 0.5 * orthogonal

    def _adamw(self, name: str, g: Array, lr: float) -> None:
        o = self.cfg.optim
        mu, nu = self.adam[name]
        mu[:] = o.beta1 * mu + (1 - o.beta1) * g
        nu[:] = o.beta2 * nu + (1 - o.beta2) * g * g
        m_hat, v_hat = mu / (1 - o.beta1**self.count), nu / (1 - o.beta2**self.count)
        p = self.params[name]
        p -= lr * (m_hat / (np.sqrt(v_hat) + o.eps) + o.weight_decay * p)
