"""Intervals against published values and sums by hand."""

import pytest

from nanojax.evaluate import figures, interval
from nanojax.evaluate.figures import Score
from nanojax.evaluate.interval import Estimate


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(right: int, n: int, low: float, high: float) -> None:
    """The four examples of Newcombe (1998, table I, method 3), to their four decimals; exchanged, the mirror image."""
    found = interval.share(right, n)
    assert found == (right / n, pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert interval.share(n - right, n)[1:] == (pytest.approx(1 - found.high), pytest.approx(1 - found.low))


def test_a_share_is_within_its_bounds() -> None:
    """Also where nothing or everything is right, to the last bit."""
    for n in (1, 2, 3, 7, 164, 14042):
        for right in {0, 1, n // 2, n - 1, n}:
            assert 0 <= interval.share(right, n).low <= right / n <= interval.share(right, n).high <= 1


def test_a_mean_of_estimates() -> None:
    """Distances 0.3 and 0.4 below give 0.5 / 2; equal bounds of K tasks shrink by the root of K."""
    found = interval.mean([Estimate(0.5, 0.2, 0.5), Estimate(0.7, 0.3, 0.8)])
    assert found == (pytest.approx(0.6), pytest.approx(0.6 - 0.25), pytest.approx(0.65))
    one = interval.share(30, 100)
    assert interval.mean([one] * 4).high - 0.3 == pytest.approx((one.high - 0.3) / 2)


def test_chatcore_is_nanochats() -> None:
    """d20 of October 2025: its README's five accuracies give its .0884, and a mean is there only with all its tasks."""
    accuracy = {"arc_easy": 0.3876, "arc_challenge": 0.2807, "mmlu": 0.3151, "gsm8k": 0.0455, "humaneval": 0.0854}
    found = [Score(task, 10_000, round(1e4 * p), 0.25 * (p > 0.1), 1.0, {}) for task, p in accuracy.items()]
    means = figures.means_of(found)
    assert means["ChatCORE"].value == pytest.approx(0.0884, abs=5e-5)
    assert means["ChatCORE categorical"].value == pytest.approx((0.1376 + 0.0307 + 0.0651) / 0.75 / 3)
    assert set(means) == {"ChatCORE", "ChatCORE categorical"}
    with_counting = figures.means_of([*found, Score("counting", 100, 100, 0.0, 1.0, {})])
    assert with_counting["ChatCORE+counting"].value == pytest.approx((5 * means["ChatCORE"].value + 1) / 6)
    assert figures.means_of(found[:2]) == {}
