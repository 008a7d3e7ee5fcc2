"""Writes a run's report: one HTML page that needs no other file, and the same as Markdown.

python -m nanojax.report --run=RUN
"""

import time
from pathlib import Path

from nanojax import cli, files
from nanojax.cli import Parser, UserError, run_main
from nanojax.report.as_html import document
from nanojax.report.as_markdown import markdown
from nanojax.report.page import page
from nanojax.report.read import stages
from nanojax.run import run_folder


def main() -> None:
    """The command."""
    parser = Parser(
        "python -m nanojax.report",
        "Writes report.html and report.md: curves, samples, scores beside published ones, tokens, hours, energy, money and\n"
        "commands of a run, and of the run that it was fine-tuned from. Reads run folders only, also copies of them.",
        "  python -m nanojax.report --run=runs/d24-chat\n  python -m nanojax.report --run=runs/d24-chat --out=reports/d24\n",
    )
    parser.add_argument("--run", required=True, type=cli.path, help="run folder")
    parser.add_argument("--out", type=cli.path, metavar="FOLDER", help="where to write; default: the run folder")
    a = parser.parse_args()
    run_folder.check(a.run)
    if not any(Path(a.run).iterdir()):
        raise UserError(f"--run={a.run}: is empty; there is nothing to report yet")
    out = cli.output_folder(a.out or a.run)
    found = page(*stages(Path(a.run)), time.time())
    for name, text in (("report.html", document(found)), ("report.md", markdown(found))):
        with files.write_atomic(out / name) as file:
            file.write(text.encode())
        print(f"written: {out / name}")


if __name__ == "__main__":
    run_main(main)
