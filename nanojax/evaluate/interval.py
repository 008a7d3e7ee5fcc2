"""95% intervals of what is measured on n problems: a share, and a mean of centred shares."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z = 1.959963984540054  # the normal distribution's 97.5% point


class Estimate(NamedTuple):
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f})"


def share(right: int, n: int) -> Estimate:
    """right / n with Wilson's interval (1927), which is never empty: of 0 right in 20 it ends at 0.16."""
    p = right / n
    centre = p + Z * Z / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    # Rounding must not put a share of 0 or 1 outside its own interval.
    return Estimate(p, min(p, max(0.0, (centre - half) / scale)), max(p, min(1.0, (centre + half) / scale)))


def centred(of: Estimate, baseline: float) -> Estimate:
    """The share on a scale where guessing, `baseline`, is 0 and perfection 1."""
    return Estimate(*((bound - baseline) / (1 - baseline) for bound in of))


def mean(of: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates. Its distances to the bounds are the root of the summed squares of theirs over K.

    This is MOVER (Zou and Donner 2008). Unlike the delta method it has a width where a task has nothing right.
    """
    K = len(of)
    value = sum(e.value for e in of) / K
    low = math.hypot(*(e.value - e.low for e in of)) / K
    high = math.hypot(*(e.high - e.value for e in of)) / K
    return Estimate(value, value - low, value + high)
