"""Dataclass fields of a config: declared with meaning and bounds, read from text, checked, each mistake in one line."""

import argparse
import dataclasses
import math
import operator
import typing
from collections.abc import Callable
from typing import Any, Literal

from nanojax import cli
from nanojax.cli import UserError

# What another value of a key does to a run that is resumed with it: nothing that is computed changes; the same mathematics
# is rounded otherwise; the learning rate follows another schedule; anything else.
Effect = Literal["none", "rounding", "schedule", "results"]

BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "above": (operator.gt, "greater than"),
    "at_least": (operator.ge, "at least"),
    "below": (operator.lt, "less than"),
    "at_most": (operator.le, "at most"),
}


def key(default: Any, doc: str, *, effect: Effect = "results", path: bool = False, **bounds: float) -> Any:
    """A settable field.

    Args:
      path: its text is a path, in which `~` is the home folder.
      bounds: of a number, named as in BOUNDS: `above=0, at_most=65536`.
    """
    assert bounds.keys() <= BOUNDS.keys()
    metadata = {"doc": doc, "bounds": bounds, "effect": effect, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


def checked(name: str, field: dataclasses.Field, value: Any) -> Any:
    """The value of key `name` as its field's type. UserError when it is of another one or outside the field's bounds."""
    value = convert(name, field.type, value)
    if field.metadata["path"]:
        try:
            value = cli.path(value)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--{name}: {error}") from None
    bounds = field.metadata["bounds"]
    if not all(BOUNDS[bound][0](value, limit) for bound, limit in bounds.items()):
        allowed = " and ".join(f"{BOUNDS[bound][1]} {limit}" for bound, limit in bounds.items())
        raise UserError(f"--{name}={value}: must be {allowed} ({field.metadata['doc']})")
    return value


def type_name(kind: Any) -> str:
    """As --help shows it: int, or the choices `f32|bf16`."""
    return "|".join(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal else kind.__name__


def convert(name: str, kind: Any, value: Any) -> Any:
    """`value` (text of the command line, or JSON) as `kind`, or a UserError that names the key."""
    if typing.get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
        if str(value) not in choices:
            raise UserError(f"--{name}={value}: choose one of {', '.join(choices)}")
        return choices[str(value)]
    convert, example = {bool: (_bool, "true"), str: (_str, "text"), float: (_float, "0.5"), int: (_int, "8")}[kind]
    try:
        return convert(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        finite = "a finite " if kind is float else ""
        raise UserError(
            f"--{name}={value}: expected {finite}{type_name(kind)}, for example --{name}={example}"
        ) from None


def _bool(value: Any) -> bool:
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]


def _str(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    return value


def _float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _int(value: Any) -> int:
    """Also of text such as 1_000 or 2e9; not of fractions, nor of what 64 bits cannot hold."""
    number = _float(value)
    whole = isinstance(value, int) or str(value).lstrip("+-").replace("_", "").isdigit()
    exact = int(value) if whole else int(number)  # a float is inexact from 2^53 on
    if abs(exact - number) > abs(exact) * 1e-15 or abs(exact) >= 2**63:
        raise ValueError
    return exact
