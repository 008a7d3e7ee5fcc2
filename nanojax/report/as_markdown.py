"""A page as Markdown: tables, and each curve as a line of characters."""

import re
from collections.abc import Sequence

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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], alignment: str) -> str:
    cells = [list(map(_escaped, row)) for row in rows]
    return _lines(head, ["---", *[alignment] * (len(head) - 1)], cells)


def _lines(head: Sequence[str], alignments: list[str], cells: list[list[str]]) -> str:
    """A table; `cells` are Markdown already."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (list(map(_escaped, head)), alignments, *cells))


def _chart(chart: Chart) -> str:
    cells = []
    for name, points in chart.curves.items():
        values = [value for _, value in points]
        shown = map(figure, (values[0], values[-1], min(values), max(values)))
        cells.append([_escaped(name), f"`{sparkline(points)}`", *shown])
    head = (chart.title, f"step {_steps(chart)}", "first", "last", "least", "most")
    return _lines(head, ["---", "---", *["---:"] * 4], cells)


def _steps(chart: Chart) -> str:
    steps = [step for points in chart.curves.values() for step, _ in points]
    return f"{min(steps):,.0f} to {max(steps):,.0f}"


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
