"""A page as one HTML file that needs no other: its style and its curves are in it, and it has no script."""

import html

from nanojax.report.blocks import Block, Chart, Commands, Page, Prose, Sample, Table, Text
from nanojax.report.curves import svg
from nanojax.report.text import visible

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #626b78; --line: #d9dde3; --page: #ffffff; --panel: #f5f6f8;
  --a: #1f6feb; --b: #d9480f; --c: #2b8a3e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #98a2b0; --line: #343b46; --page: #14171c;
  --panel: #1d2229; --a: #6cb0ff; --b: #ff9d66; --c: #7bd88f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .28rem .8rem .28rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 500; min-width: 6.5rem; }
.figures th:not(:first-child), .figures td { text-align: right; font-variant-numeric: tabular-nums;
  padding: .28rem 0 .28rem 1.2rem; white-space: nowrap; }
@media (max-width: 40rem) { table { font-size: .84rem; } .figures td, .figures th:not(:first-child) { padding-left: .7rem;
  white-space: normal; } }
.prose th { color: var(--soft); white-space: nowrap; }
.prose td { overflow-wrap: anywhere; }
pre { margin: .4rem 0; padding: .7rem .9rem; background: var(--panel); border-radius: .4rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .86rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
figure { margin: .6rem 0; }
figcaption { color: var(--soft); font-size: .9rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .6rem 1.6rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--soft); font-family: inherit; }
.grid { stroke: var(--line); stroke-width: 1; }
.mean { fill: none; stroke-width: 2; stroke-linejoin: round; }
.range { stroke: none; opacity: .18; }
.s0 { stroke: var(--a); fill: var(--a); } .s1 { stroke: var(--b); fill: var(--b); } .s2 { stroke: var(--c); fill: var(--c); }
.mean.s0, .mean.s1, .mean.s2 { fill: none; }
.key { display: inline-block; width: .9rem; height: .2rem; margin: 0 .35rem .22rem .8rem; vertical-align: middle; }
.key.s0 { background: var(--a); } .key.s1 { background: var(--b); } .key.s2 { background: var(--c); }
"""


def document(page: Page) -> str:
    """The page. Text that a model or a user wrote is escaped everywhere."""
    title = _escaped(page.title)
    body = [f"<h1>{title}</h1>"]
    for section in page.sections:
        body.append(f"<h{section.level}>{_escaped(section.title)}</h{section.level}>")
        body += _blocks(section.blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _blocks(blocks: list[Block]) -> list[str]:
    """Each block; charts that follow each other stand side by side where there is room."""
    out: list[str] = []
    for i, block in enumerate(blocks):
        chart = isinstance(block, Chart)
        if chart and not (i and isinstance(blocks[i - 1], Chart)):
            out.append('<div class="charts">')
        out.append(_block(block))
        if chart and not (i + 1 < len(blocks) and isinstance(blocks[i + 1], Chart)):
            out.append("</div>")
    return out


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{_escaped(block.text)}</p>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Prose):
        rows = "".join(f'<tr><th scope="row">{_escaped(a)}</th><td>{_escaped(b)}</td></tr>' for a, b in block.rows)
        return f'<div class="wide"><table class="prose"><tbody>{rows}</tbody></table></div>'
    if isinstance(block, Commands):
        return f"<pre>{_escaped(chr(10).join(block.lines))}</pre>"
    if isinstance(block, Sample):
        return f'<figure><figcaption>{_escaped(block.caption)}</figcaption><pre dir="auto">{_escaped(block.text)}</pre></figure>'
    return _chart(block)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_escaped(cell)}</th>' for cell in table.head)
    rows = "".join(
        f'<tr><th scope="row">{_escaped(first)}</th>' + "".join(f"<td>{_escaped(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in table.rows
    )
    return f'<div class="wide"><table class="figures"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _chart(chart: Chart) -> str:
    names = list(chart.curves)
    keys = "".join(f'<span class="key s{i % 3}"></span>{_escaped(name)}' for i, name in enumerate(names))
    caption = f"<figcaption>{_escaped(chart.title)}{keys if len(names) > 1 else ''}</figcaption>"
    return f"<figure>{caption}{svg(chart)}</figure>"


def _escaped(text: str) -> str:
    return html.escape(visible(text))
