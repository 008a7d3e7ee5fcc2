"""What a page consists of. page.py makes it, as_html.py and as_markdown.py show it; all text is as it was found, unescaped."""

from typing import NamedTuple

Points = list[tuple[float, float]]


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Table(NamedTuple):
    """Rows under a head. The first column names the row, the others are figures."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Prose(NamedTuple):
    """A table whose cells are read, not compared: names and what is said about them."""

    rows: list[tuple[str, str]]


class Commands(NamedTuple):
    """Command lines."""

    lines: list[str]


class Sample(NamedTuple):
    """A text of the model, with what stands above it."""

    caption: str
    text: str


class Chart(NamedTuple):
    """Curves over steps: {"training": [(step, value), ...]}, of one unit."""

    title: str
    curves: dict[str, Points]


Block = Text | Table | Prose | Commands | Sample | Chart


class Section(NamedTuple):
    """A heading of `level` 2 or 3, and what stands below it."""

    level: int
    title: str
    blocks: list[Block]


class Page(NamedTuple):
    """The whole."""

    title: str
    sections: list[Section]
