"""Between our parameter tree and other programs' flat tensor names: one table per layout, checked both ways.

Ours stacks layers and joins q, k and v; both other layouts have one [out, in] matrix per layer and projection, and keep
nanochat's halves of the head dim in the same order, so that no row is ever permuted.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nanojax.cli import UserError
from nanojax.config import Model

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {np.dtype(np.float32): np.dtype(np.float32), BF16: BF16, np.dtype(np.float16): np.dtype(np.float32)}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names of the tensors; block names have {i} for the layer. `qkv` is three names."""

    embed: str
    head: str
    qkv: tuple[str, str, str]
    o: str
    up: str
    down: str

    def blocks(self, name: str) -> tuple[str, ...]:
        """Names of the matrices that make up one of our block matrices, in order of its rows."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,)


NANOCHAT = Layout(
    "transformer.wte.weight",
    "lm_head.weight",
    ("transformer.h.{i}.attn.c_q.weight", "transformer.h.{i}.attn.c_k.weight", "transformer.h.{i}.attn.c_v.weight"),
    "transformer.h.{i}.attn.c_proj.weight",
    "transformer.h.{i}.mlp.c_fc.weight",
    "transformer.h.{i}.mlp.c_proj.weight",
)
TRANSFORMERS = Layout(
    "model.embed_tokens.weight",
    "lm_head.weight",
    (
        "model.layers.{i}.self_attn.q_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight",
    ),
    "model.layers.{i}.self_attn.o_proj.weight",
    "model.layers.{i}.mlp.fc1.weight",
    "model.layers.{i}.mlp.fc2.weight",
)


def shapes(layout: Layout, m: Model) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, in the order in which `split` yields them."""
    out: dict[str, tuple[int, ...]] = {layout.embed: (m.V, m.D)}
    for i in range(m.L):
        for name, (rows, columns) in m.shapes.items():
            parts = layout.blocks(name)
            out |= {part.format(i=i): (rows // len(parts), columns) for part in parts}
    return out | {layout.head: (m.V, m.D)}


def join(
    layout: Layout, m: Model, found: Mapping[str, tuple[tuple[int, ...], np.dtype]], read: Callable, where: Path
) -> dict[str, Any]:
    """Our parameter tree, numpy f32 or bf16, from flat tensors.

    Args:
      found: name -> (shape, dtype) of every tensor in the file.
      read: name -> array; called once a tensor.
    Raises UserError naming missing, extra and misshapen tensors, in one line.
    """
    wanted = shapes(layout, m)
    missing, extra = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    wrong = [n for n in wanted if n in found and tuple(found[n][0]) != wanted[n]]
    problems = [f"missing {_few(missing)}"] * bool(missing) + [f"unknown {_few(extra)}"] * bool(extra)
    problems += [f"{n} has shape {list(found[n][0])}, expected {list(wanted[n])}" for n in wrong[:3]]
    if problems:
        hint = "; this is not nanochat's Nov-2025 architecture (d32)" if extra else ""
        raise UserError(f"{where}: {'; '.join(problems)}{hint}")
    for n in wanted:
        if np.dtype(found[n][1]) not in FLOATS:
            raise UserError(f"{where}: {n} is {found[n][1]}, expected float32, bfloat16 or float16")

    def dtype(names: list[str]) -> np.dtype:
        kinds = {FLOATS[np.dtype(found[n][1])] for n in names}
        return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

    blocks = {}
    for name, (rows, columns) in m.shapes.items():
        parts = layout.blocks(name)
        names = [part.format(i=i) for i in range(m.L) for part in parts]
        stack = np.empty((m.L * len(parts), rows // len(parts), columns), dtype(names))
        for row, n in enumerate(names):
            stack[row] = read(n)
        blocks[name] = stack.reshape(m.L, rows, columns)
    edges = {k: np.array(read(n), dtype([n])) for k, n in (("embed", layout.embed), ("head", layout.head))}
    return {"embed": edges["embed"], "blocks": blocks, "head": edges["head"]}


def split(layout: Layout, params: Mapping[str, Any], m: Model) -> Iterator[np.ndarray]:
    """The tensors of float numpy `params`, in the order of `shapes`."""
    yield params["embed"]
    for i in range(m.L):
        for name in m.shapes:
            yield from np.split(params["blocks"][name][i], len(layout.blocks(name)))
    yield params["head"]


def dtypes(layout: Layout, params: Mapping[str, Any], m: Model) -> dict[str, np.dtype]:
    """Every tensor's name and dtype."""
    out = {layout.embed: params["embed"].dtype}
    for i in range(m.L):
        for name in m.shapes:
            out |= {part.format(i=i): params["blocks"][name].dtype for part in layout.blocks(name)}
    return out | {layout.head: params["head"].dtype}


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
