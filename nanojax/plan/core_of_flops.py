"""CORE that published runs of nanochat reached by their training FLOPs: the points, a line through them, its range.

All are other people's runs on H100s or A100s, and none is nanojax's. CORE also moves with the tokenizer's training text, by
0.01 to 0.018. Left out: runs whose model or FLOPs are not those of a recipe here. Three unmerged d22 (pull requests 733, 747,
830) reached 0.258 to 0.263 at 2.2e19 to 2.4e19 FLOPs with changes of their own.
"""

import math
import statistics
from typing import NamedTuple


class Run(NamedTuple):
    """One published result. FLOPs are by nanochat's count (weights.flops_per_token), CORE is the mean of the runs named."""

    family: str  # config.Model.family; the 2026 runs also have its data, ClimbMix, the others FineWeb-EDU
    model: str
    flops: float
    core: float
    source: str


LEADERBOARD = "nanochat, dev/LEADERBOARD.md"
RUNS = (
    Run("2026", "d12", 8.8e17, 0.145, "nanochat pull request 563; FLOPs by the default ratio of its day, 10.5"),
    Run(
        "2026", "d14, ratio 8", 1.48e18, 0.1574, "nanochat pull request 747, a reviewer's run of the unchanged speedrun"
    ),
    Run("2026", "d20", 1.50e19, 0.2389, "nanochat pull request 807, 20 seeds; depth inferred from 5.20 B tokens"),
    Run("2026", "d24, ratio 8", 2.79e19, 0.2626, f"{LEADERBOARD}, run 6, mean of 5"),
    Run("2026", "d24, ratio 8.7", 3.09e19, 0.2690, f"{LEADERBOARD}, run 5, mean of 5"),
    Run("2026", "d24, ratio 9.5", 3.43e19, 0.2571, f"{LEADERBOARD}, run 4, mean of 7"),
    Run("2026", "d26, ratio 8.25", 4.69e19, 0.2767, "nanochat pull request 563"),
    Run("2025", "d20", 3.92e19, 0.2219, "nanochat discussion 1"),
    Run("2025", "d32", 4.54e20, 0.3168, "nanochat discussion 8, as quoted elsewhere"),
)
NOISE = 0.006  # standard deviation of CORE between 20 seeds: nanochat pull request 807


class Core(NamedTuple):
    """CORE on the line at some FLOPs, and the range in which one more run falls 19 times of 20."""

    value: float
    low: float
    high: float
    extrapolated: bool  # beyond the published FLOPs of its family


def core(flops: float, family: str = "2026") -> Core:
    """CORE that runs of `family` reached at these training FLOPs.

    Linear in log10(FLOPs). Both families share the slope, so that d32 of 2025 says how far the line goes on. The range is the
    regression's for a new run: two standard deviations, wider away from the points.
    """
    lines = {name: _centred(name) for name in {run.family for run in RUNS}}
    pairs = [pair for _, _, pairs in lines.values() for pair in pairs]
    spread = sum(x * x for x, _ in pairs)
    slope = sum(x * y for x, y in pairs) / spread
    left = len(pairs) - len(lines) - 1  # degrees of freedom: points less a level per family and the slope
    deviation = max(NOISE, math.sqrt(sum((y - slope * x) ** 2 for x, y in pairs) / left))

    middle, level, own = lines[family]
    away = math.log10(flops) - middle
    value = level + slope * away
    margin = 2 * deviation * math.sqrt(1 + 1 / len(own) + away**2 / spread)
    low, high = published(family)
    return Core(value, value - margin, value + margin, not low <= flops <= high)


def published(family: str = "2026") -> tuple[float, float]:
    """The least and the most FLOPs of the published runs of `family`."""
    flops = [run.flops for run in RUNS if run.family == family]
    return min(flops), max(flops)


def _centred(family: str) -> tuple[float, float, list[tuple[float, float]]]:
    """(mean log10 FLOPs, mean CORE, each run's distance from both) of one family."""
    points = [(math.log10(run.flops), run.core) for run in RUNS if run.family == family]
    x, y = (statistics.mean(values) for values in zip(*points))
    return x, y, [(a - x, b - y) for a, b in points]
