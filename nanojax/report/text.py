"""Figures and strange characters as a reader should see them, and long curves as fewer points."""

import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from nanojax.report.blocks import Points

NONE = "–"  # where a run does not say


class Bucket(NamedTuple):
    """Neighbouring points of a curve: where they are, their mean, and their range."""

    step: float
    mean: float
    low: float
    high: float


def thinned(points: Points, most: int) -> list[Bucket]:
    """The curve as at most `most` buckets of equally many points."""
    count = min(most, len(points))
    out = []
    for i in range(count):
        part = points[i * len(points) // count : (i + 1) * len(points) // count]
        values = [value for _, value in part]
        out.append(Bucket(part[-1][0], sum(values) / len(values), min(values), max(values)))
    return out


def figure(value: float) -> str:
    """A number with four significant digits, thousands with all their digits; very small and large ones as 4.54e20."""
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.4g}"
    if 1e3 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(power)}"


def or_none(value: float | None, shown: Callable[[float], str]) -> str:
    """The number as `shown` writes it, or NONE."""
    return NONE if value is None else shown(value)


def visible(text: str) -> str:
    """The text with U+FFFD for what no page may hold: control characters, half surrogates, what turns the writing around."""
    keep = lambda c: c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Cf") or c in "\u200c\u200d\u00ad"
    return "".join(c if keep(c) else "\ufffd" for c in text.replace("\r\n", "\n"))
