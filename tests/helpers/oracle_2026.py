"""The parameters of a model of 2026 as oracles/numpy_gpt2026.py has them, and back."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from oracles import numpy_gpt2026

Tree = dict[str, Any]


def apart(params: Any) -> Tree:
    """Our parameters as the oracle's tree: q, k and v apart, the gate by its other name, float64."""
    params = numpy_gpt2026.to_float64(params)
    blocks = []
    for w in params["blocks"]:
        q, k, v = np.split(w["qkv"], 3)
        block = {"q": q, "k": k, "v": v, **{name: w[name] for name in ("o", "up", "down")}}
        blocks.append(block | ({"value": w["value"], "gate": w["value_gate"]} if "value" in w else {}))
    return {**params, "blocks": tuple(blocks)}


def joined(tree: Tree) -> Any:
    """The oracle's tree as ours, f32: q, k and v are one array, and the gate has another name."""
    f32 = lambda a: jnp.asarray(a, jnp.float32)
    blocks = []
    for w in tree["blocks"]:
        block = {name: f32(w[name]) for name in ("o", "up", "down")}
        block["qkv"] = f32(np.concatenate([w["q"], w["k"], w["v"]]))
        blocks.append(block | ({"value": f32(w["value"]), "value_gate": f32(w["gate"])} if "value" in w else {}))
    return {name: f32(a) for name, a in tree.items() if name != "blocks"} | {"blocks": tuple(blocks)}
