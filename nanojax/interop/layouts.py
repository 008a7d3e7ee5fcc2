"""Between our parameter tree and other programs' flat tensor names: one table per layout, checked both ways.

We keep q, k and v as one array. Both other layouts have one [out, in] matrix per layer and projection, and keep nanochat's
halves of the head dim in the same order, so that no row is ever permuted.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nanojax import weights
from nanojax.cli import UserError
from nanojax.config import Model

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {np.dtype(np.float32): np.dtype(np.float32), BF16: BF16, np.dtype(np.float16): np.dtype(np.float32)}

DATE = {"2025": "November 2025", "2026": "July 2026"}  # of each family's code

# The names of the tensors that make up each weight of ours, in the order of its rows; {i} stands for the layer.
Layout = dict[str, tuple[str, ...]]
NANOCHAT: Layout = {
    "embed": ("transformer.wte.weight",),
    "qkv": tuple(f"transformer.h.{{i}}.attn.c_{part}.weight" for part in "qkv"),
    "o": ("transformer.h.{i}.attn.c_proj.weight",),
    "up": ("transformer.h.{i}.mlp.c_fc.weight",),
    "down": ("transformer.h.{i}.mlp.c_proj.weight",),
    "head": ("lm_head.weight",),
}
NANOCHAT_2026: Layout = NANOCHAT | {
    "value": ("value_embeds.{i}.weight",),
    "value_gate": ("transformer.h.{i}.attn.ve_gate.weight",),
    "smear_gate": ("smear_gate.weight",),
    "smear": ("smear_lambda",),
    "backout": ("backout_lambda",),
    "residual": ("resid_lambdas",),
    "first": ("x0_lambdas",),
}
TRANSFORMERS: Layout = {
    "embed": ("model.embed_tokens.weight",),
    "qkv": tuple(f"model.layers.{{i}}.self_attn.{part}_proj.weight" for part in "qkv"),
    "o": ("model.layers.{i}.self_attn.o_proj.weight",),
    "up": ("model.layers.{i}.mlp.fc1.weight",),
    "down": ("model.layers.{i}.mlp.fc2.weight",),
    "head": ("lm_head.weight",),
}


def _places(m: Model) -> Iterator[tuple[str, int | None]]:
    """(weight, layer) of every array, in the order of the files: what is not the head, the layers, the head."""
    table = weights.table(m)
    last = [name for name, weight in table.items() if weight.use == "head"]
    yield from ((name, None) for name, weight in table.items() if not weight.layered and name not in last)
    yield from ((name, i) for i in range(m.L) for name in weights.layer_weights(table, i))
    yield from ((name, None) for name in last)


def _names(layout: Layout, name: str, i: int | None) -> list[str]:
    return [part.format(i=i) for part in layout[name]]


def _array(params: Mapping[str, Any], name: str, i: int | None) -> np.ndarray:
    return params[name] if i is None else params["blocks"][i][name]


def shapes(layout: Layout, m: Model) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, in the order in which `split` yields them."""
    table, out = weights.table(m), {}
    for name, i in _places(m):
        rows, *columns = table[name].shape
        parts = _names(layout, name, i)
        out |= {part: (rows // len(parts), *columns) for part in parts}
    return out


def join(
    layout: Layout, m: Model, found: Mapping[str, tuple[tuple[int, ...], np.dtype]], read: Callable, where: Path
) -> dict[str, Any]:
    """Our parameter tree, numpy f32 or bf16, from flat tensors. Weights that we always store in f32 are f32.

    Args:
      found: name -> (shape, dtype) of every tensor in the file.
      read: name -> array; called once per tensor.

    Raises UserError naming missing, extra and misshapen tensors, in one line.
    """
    _check(layout, m, found, where)
    table = weights.table(m)

    def array(name: str, i: int | None) -> np.ndarray:
        names = _names(layout, name, i)
        kinds = {FLOATS[np.dtype(found[n][1])] for n in names}
        alike = len(kinds) == 1 and table[name].stored != "f32"
        dtype = kinds.pop() if alike else np.dtype(np.float32)
        return np.concatenate([np.asarray(read(n)).astype(dtype) for n in names])

    blocks: list[dict[str, np.ndarray]] = [{} for _ in range(m.L)]
    params: dict[str, Any] = {}
    for name, i in _places(m):
        (params if i is None else blocks[i])[name] = array(name, i)
    return params | {"blocks": tuple(blocks)}


def split(layout: Layout, params: Mapping[str, Any], m: Model) -> Iterator[np.ndarray]:
    """The tensors of float numpy `params`, in the order of `shapes`."""
    for name, i in _places(m):
        yield from np.split(_array(params, name, i), len(layout[name]))


def dtypes(layout: Layout, params: Mapping[str, Any], m: Model) -> dict[str, np.dtype]:
    """Every tensor's name and dtype."""
    return {part: _array(params, name, i).dtype for name, i in _places(m) for part in _names(layout, name, i)}


def _check(layout: Layout, m: Model, found: Mapping[str, Any], where: Path) -> None:
    """UserError unless `found` has exactly the layout's tensors, in floats."""
    wanted = shapes(layout, m)
    missing, extra = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    wrong = [n for n in wanted if n in found and tuple(found[n][0]) != wanted[n]]
    problems = [f"missing {_few(missing)}"] if missing else []
    problems += [f"unknown {_few(extra)}"] if extra else []
    problems += [f"{n} has shape {list(found[n][0])}, expected {list(wanted[n])}" for n in wrong[:3]]
    if problems:
        hint = f"; this is not nanochat's architecture of {DATE[m.family]}" if extra else ""
        raise UserError(f"{where}: {'; '.join(problems)}{hint}")
    for n in wanted:
        if np.dtype(found[n][1]) not in FLOATS:
            raise UserError(f"{where}: {n} is {found[n][1]}, expected float32, bfloat16 or float16")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
