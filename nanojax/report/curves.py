"""A chart as SVG: axes with round numbers, each curve as the mean of neighbouring points within their range."""

import html
import math

from nanojax.report.blocks import Chart
from nanojax.report.text import Bucket, figure, thinned, visible

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 26  # room for the axes' numbers
POINTS = 240  # of a curve


def svg(chart: Chart) -> str:
    """The chart; colours are those of the classes s0, s1 and s2."""
    curves = [thinned(points, POINTS) for points in chart.curves.values()]
    every = [bucket for curve in curves for bucket in curve]
    xs = ticks(min(b.step for b in every), max(b.step for b in every), 5)
    ys = ticks(min(b.low for b in every), max(b.high for b in every), 5)
    x_low, x_high = min(b.step for b in every), max(b.step for b in every)
    y_low, y_high = min(ys[0], *(b.low for b in every)), max(ys[-1], *(b.high for b in every))
    x = lambda step: LEFT + (WIDTH - LEFT - RIGHT) * ((step - x_low) / (x_high - x_low) if x_high > x_low else 0.5)
    y = lambda v: TOP + (HEIGHT - TOP - BOTTOM) * ((y_high - v) / (y_high - y_low) if y_high > y_low else 0.5)
    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{figure(v)}</text>'
        for v in ys
    ]
    parts += [
        f'<text x="{x(v):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{figure(v)}</text>'
        for v in xs
        if x_low <= v <= x_high
    ]
    for i, curve in enumerate(curves):
        parts += _curve(curve, i % 3, x, y)
    label = html.escape(visible(chart.title))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _curve(curve: list[Bucket], colour: int, x, y) -> list[str]:
    at = lambda pairs: " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in pairs)
    if len(curve) == 1:
        (only,) = curve
        return [f'<circle class="s{colour}" cx="{x(only.step):.1f}" cy="{y(only.mean):.1f}" r="3"/>']
    out = []
    if any(b.low < b.high for b in curve):
        band = [(b.step, b.high) for b in curve] + [(b.step, b.low) for b in reversed(curve)]
        out.append(f'<polygon class="range s{colour}" points="{at(band)}"/>')
    out.append(f'<polyline class="mean s{colour}" points="{at((b.step, b.mean) for b in curve)}"/>')
    return out


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about so many."""
    rough = (high - low) / about
    if rough <= 1e-12 * max(abs(low), abs(high)) or rough < 1e-290:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]
