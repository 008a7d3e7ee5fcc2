"""What nanochat's files do not say because its code does: which of two models it is, windows, constants, padded tables.

"2025" is nanochat's code of November 2025, "2026" that of July 2026 (commit 92d63d4, nanochat/gpt.py). Each reads only its own
checkpoints. A checkpoint is known by its tensors, since meta_NNNNNN.json names no version.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nanojax import weights
from nanojax.cli import UserError
from nanojax.config import Model
from nanojax.interop import layouts
from nanojax.interop.layouts import DATE

LAYOUTS = {"2025": layouts.NANOCHAT, "2026": layouts.NANOCHAT_2026}
FIXED: dict[str, dict[str, Any]] = {
    "2025": {"softcap": 15.0, "rope_base": 10_000.0, "qk_scale": 1.0},
    "2026": {"softcap": 15.0, "rope_base": 100_000.0, "qk_scale": 1.2},
}
TABLES_ARE_MULTIPLES_OF = 64  # rows; since December 2025
PATTERNS = (
    "SSSL",
    "L",
)  # windows by layer, short or long: the recipe's, and what nanochat advises where FA3 is missing


def read(sizes: Model, meta: Mapping[str, Any], found: Mapping[str, np.ndarray], where: Path) -> tuple[Model, dict]:
    """(the model, its parameters) of `sizes`, whose family, constants and windows are still to be found.

    Args:
      meta: model_config of meta_NNNNNN.json.
      found: every tensor by name.

    UserError in one line for a model between the two, other windows and tables of other sizes.
    """
    family = _family(found, where)
    own: Model = dataclasses.replace(sizes, family=family, **FIXED[family])
    pattern = meta.get("window_pattern", "L")  # nanochat's default too
    own = dataclasses.replace(own, window=_window(own, pattern, where))
    padded = dataclasses.replace(own, vocab=_rows(own, found, where))
    listed = {name: (array.shape, array.dtype) for name, array in found.items()}
    params = layouts.join(LAYOUTS[family], padded, listed, found.__getitem__, where)
    return own, _resized(own, params, own.V)


def tensors(m: Model, params: Mapping[str, Any]) -> tuple[dict[str, tuple[tuple[int, ...], np.dtype]], Iterator]:
    """(name -> shape and dtype, the arrays in that order) of the file that nanochat would write."""
    layout = LAYOUTS[m.family]
    padded = dataclasses.replace(m, vocab=_padded(m)) if m.family == "2026" else m
    kinds = layouts.dtypes(layout, params, m)
    listed = {name: (shape, kinds[name]) for name, shape in layouts.shapes(layout, padded).items()}
    return listed, layouts.split(layout, _resized(m, params, padded.V), padded)


def check(m: Model) -> None:
    """UserError for a model that nanochat's code does not have."""
    for key, value in FIXED[m.family].items():
        if getattr(m, key) != value:
            raise UserError(
                f"model.{key} is {getattr(m, key):g}; nanochat's code of {DATE[m.family]} has {value:g} and no setting "
                "for it; not exported"
            )
    if m.left_out:
        raise UserError(f"model.without is {m.without}; nanochat's code has all of these parts; not exported")
    _pattern(m)


def model_config(m: Model) -> dict[str, Any]:
    """The sizes of meta_NNNNNN.json; nanochat's GPTConfig takes exactly these."""
    sizes = {"sequence_len": m.T, "vocab_size": m.V, "n_layer": m.L, "n_head": m.N, "n_kv_head": m.N, "n_embd": m.D}
    return sizes if m.family == "2025" else sizes | {"window_pattern": _pattern(m)}


def _pattern(m: Model) -> str:
    """The window_pattern of these windows; UserError if there is none."""
    for pattern in PATTERNS:
        if m.family == "2025" or weights.windows(m) == _windows(pattern, m):
            return pattern
    raise UserError(
        f"model.window is {m.window}; nanochat's code has {_short(m)} for rows of {m.T}, or windows as long as the row; "
        "not exported"
    )


def _window(m: Model, pattern: Any, where: Path) -> int:
    if not isinstance(pattern, str) or not pattern or set(pattern.upper()) - set("SL"):
        raise UserError(f"{where}: window_pattern is {pattern!r}, expected letters S and L such as SSSL")
    for window in (0,) if m.family == "2025" else (_short(m), m.T):
        if weights.windows(dataclasses.replace(m, window=window)) == _windows(pattern, m):
            return window
    known = " and ".join(PATTERNS if m.family == "2026" else ("L",))
    raise UserError(f"{where}: window_pattern {pattern}; of nanochat of {DATE[m.family]} only {known} can be read")


def _family(found: Mapping[str, np.ndarray], where: Path) -> Literal["2025", "2026"]:
    marks = ("resid_lambdas", "x0_lambdas", "value_embeds", "ve_gate", "smear_gate", "smear_lambda", "backout_lambda")
    has = [mark for mark in marks if any(mark in name for name in found)]
    lacks = [mark for mark in marks if mark not in has]
    if has and lacks:
        raise UserError(
            f"{where}: has {', '.join(has)} but not {', '.join(lacks)}; only nanochat's models of {DATE['2025']} and "
            f"{DATE['2026']} are supported, none between"
        )
    return "2026" if has else "2025"


def _rows(m: Model, found: Mapping[str, np.ndarray], where: Path) -> int:
    padded = _padded(m)
    embed = found.get("transformer.wte.weight")
    rows = padded if embed is None or not embed.ndim else len(embed)  # `join` names a missing one
    if rows != padded and (m.family == "2026" or rows != m.V):
        raise UserError(
            f"{where}: transformer.wte.weight has {rows} rows for a vocabulary of {m.V}, which nanochat pads to {padded}"
        )
    return rows


def _padded(m: Model) -> int:
    """The rows that nanochat's tables have since December 2025."""
    return -(-m.V // TABLES_ARE_MULTIPLES_OF) * TABLES_ARE_MULTIPLES_OF


def _resized(m: Model, params: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """`params` with tables of that many rows: cut, or zeros added. Logits are cut to V, so rows from V on are never read."""
    table = weights.table(m)

    def one(name: str, array: np.ndarray) -> np.ndarray:
        spare = rows - len(array)
        if table[name].use not in ("rows", "head") or not spare:
            return array
        return array[:rows] if spare < 0 else np.pad(array, ((0, spare), (0, 0)))

    blocks = tuple({name: one(name, array) for name, array in layer.items()} for layer in params["blocks"])
    return {name: one(name, array) for name, array in params.items() if name != "blocks"} | {"blocks": blocks}


def _short(m: Model) -> int:
    return -(-m.T // 512) * 128


def _windows(pattern: str, m: Model) -> tuple[int, ...]:
    """Each layer's window: the pattern's letters in turn; the last layer sees all."""
    short = min(_short(m), m.T)
    letters = [pattern.upper()[i % len(pattern)] for i in range(m.L - 1)] + ["L"]
    return tuple(short if letter == "S" else m.T for letter in letters)
