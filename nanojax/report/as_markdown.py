"""A page as Markdown: tables, and each curve as a line of characters."""

import re

from nanojax.report.blocks import Block, Chart, Commands, Page, Points, Prose, Sample, Table, Text
from nanojax.report.text import figure, thinned, visible

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 48  # characters of a curve
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&$])")  # what begins something in Markdown, or HTML within it


def markdown(page: Page) -> str:
    """The page. Text that a model or a user wrote shows as it is: nothing in it is markup."""
    out = [f"# {_escaped(page.title)}"]
    for section in page.sections:
        out += [f"{'#' * section.level} {_escaped(section.title)}", *map(_block, section.blocks)]
    return "\n\n".join(part for part in out if part) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return _escaped(block.text)
    if isinstance(block, Table):
        return _table(block.head, block.rows, "---:")
    if isinstance(block, Prose):
        return _table(("", ""), block.rows, "---")
    if isinstance(block, Commands):
        return _fenced("\n".join(block.lines))
    if isinstance(block, Sample):
        return f"{_escaped(block.caption)}\n\n{_fenced(block.text)}"
    return _chart(block)


def _table(head: tuple[str, ...], rows: list, alignment: str) -> str:
    lines = [head, ("---", *[alignment] * (len(head) - 1))]
    lines = [tuple(map(_escaped, head)), lines[1], *(tuple(map(_escaped, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _chart(chart: Chart) -> str:
    rows = [
        (name, f"`{sparkline(points)}`", *(figure(value) for value in (points[0][1], points[-1][1], *_ends(points))))
        for name, points in chart.curves.items()
    ]
    head = (chart.title, f"step {_steps(chart)}", "first", "last", "least", "most")
    lines = [tuple(map(_escaped, head)), ("---", "---", *["---:"] * 4)]
    lines += [(_escaped(name), *rest) for name, *rest in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _steps(chart: Chart) -> str:
    steps = [step for points in chart.curves.values() for step, _ in points]
    return f"{min(steps):,.0f} to {max(steps):,.0f}"


def _ends(points: Points) -> tuple[float, float]:
    values = [value for _, value in points]
    return min(values), max(values)


def sparkline(points: Points) -> str:
    """The points as at most WIDTH characters, from the least value ▁ to the most █."""
    means = [bucket.mean for bucket in thinned(points, WIDTH)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", " ".join(visible(text).split()))


def _fenced(text: str) -> str:
    text = visible(text)
    ticks = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, ticks + 1)
    return f"{fence}text\n{text}\n{fence}"
