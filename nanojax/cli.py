"""What all data subcommands' command lines share: one-line argument errors, numbers like 2e9, a progress line."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_SECONDS = 10.0  # on a terminal the bar is live; in a log file one line per this many seconds


class UserError(ValueError):
    """A mistake of the person at the keyboard, told in one line: what, where, what to do."""


def run_main(main: Callable[[], None]) -> None:
    """Runs a command's `main`; UserError becomes `error: ...` on stderr, exit 2; a closed pipe and Ctrl-C are quiet."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line; `examples` end the help text."""

    def __init__(self, prog: str, description: str, examples: str):
        super().__init__(
            prog=f"python -m nanojax.data {prog}",
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def count(text: str) -> int:
    """A positive whole number, also as 2e9 or 100_000."""
    try:
        value = float(text.replace("_", ""))
        if value != int(value) or value < 1:
            raise ValueError
        return int(value)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number") from None


def output_folder(path: str | os.PathLike) -> Path:
    """Makes the folder and sees that it can be written, before hours of work; UserError when not."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return Path(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None


class Bar:
    """A progress line on stderr: done/total, rate and remaining time; periodic plain lines where stderr is a file.

    `unit` is what is counted; `total` may be None when it cannot be known.
    """

    def __init__(self, title: str, total: float | None, unit: str, quiet: bool = False):
        self.title, self.total, self.unit, self.quiet = title, total, unit, quiet
        self.done, self.start, self.logged = 0.0, time.monotonic(), time.monotonic()
        self.note = ""
        console = Console(stderr=True)
        self.live = console.is_terminal and not quiet
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console, disable=not self.live,
        )  # fmt: skip
        self.task = self.progress.add_task(title, total=total, text="")

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, failed: type | None, *_: Any) -> None:
        self.progress.stop()
        if not self.live and not self.quiet and not failed:
            print(f"{self.title}: {self._text()}, {time.monotonic() - self.start:.0f} s", file=sys.stderr)

    def reach(self, done: float, note: str = "") -> None:
        """Says that `done` units are done by now."""
        self.done = done
        self.note = note or self.note
        if self.live:
            self.progress.update(self.task, completed=self.done, text=self._text())
        elif not self.quiet and time.monotonic() - self.logged > LOG_SECONDS:
            self.logged = time.monotonic()
            spent = self.logged - self.start
            left = f", {spent * (self.total / self.done - 1):.0f} s left" if self.total and self.done else ""
            print(f"{self.title}: {self._text()}, {spent:.0f} s{left}", file=sys.stderr, flush=True)

    def _text(self) -> str:
        rate = self.done / max(1e-9, time.monotonic() - self.start)
        of = f"/{_short(self.total)}" if self.total else ""
        return (
            f"{_short(self.done)}{of} {self.unit}, {_short(rate)} {self.unit}/s{', ' + self.note if self.note else ''}"
        )


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f}{letter}"
    return f"{value:.0f}"
