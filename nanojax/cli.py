"""What every command shares: one-line errors, an argument parser, paths, number formats, a progress bar."""

import argparse
import contextlib
import errno
import importlib
import importlib.metadata
import io
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_SECONDS = 10.0  # without a terminal, at most one progress line per this many seconds


class UserError(ValueError):
    """A mistake that the user can correct. The message is one line: what is wrong, where, and what to do."""


# What a disk says that takes no more: full, over a quota or a size limit, read-only, broken.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def run_main(main: Callable[[], None]) -> None:
    """Runs a command. Its mistakes are one line on stderr, `error: ...`, and exit code 2.

    A UserError is such a mistake. So are a file that cannot be read or written, and a path that a library wants in UTF-8. A
    closed pipe or terminal and Ctrl-C are silent. A character that the output's encoding lacks is replaced.
    """
    _repair_streams()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) or (error.errno == errno.EIO and error.filename is None):
            with contextlib.suppress(OSError, ValueError):  # else Python complains when it flushes at the exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        elif error.errno in _DISK:
            _fail(
                f"{error.filename or 'the output'}: cannot be written ({error.strerror}); free space, then run it again"
            )
        else:
            _fail(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
    except UnicodeEncodeError as error:
        if error.reason != "surrogates not allowed":
            raise
        _fail(f"{error.object}: is not UTF-8, which is needed here; rename it")
    except KeyboardInterrupt:
        sys.exit(130)


def run_subcommand(package: str, about: str, names: dict[str, str], examples: str) -> None:
    """Runs main(arguments) of the module `package`.NAME; NAME, one of `names`, comes first on the command line.

    Args:
      names: what each does, in a few words.
      about, examples: of the help.
    """
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        listed = "\n".join(f"  {name:<10} {what}" for name, what in names.items())
        print(f"usage: python -m {package} SUBCOMMAND [--help]\n\n{about}\n\n{listed}\n\nexamples:\n{examples}")
        return
    name = sys.argv[1]
    if name == "--version":
        return print(version())
    if name not in names:
        raise UserError(f"no subcommand {name!r}; there are {', '.join(names)}")
    importlib.import_module(f"{package}.{name}").main(sys.argv[2:])


def _fail(message: str) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def _repair_streams() -> None:
    """stdin, stdout and stderr are open, if only to nothing: a file opened later would get a closed one's number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, --version, layout kept in its texts, and no abbreviated options.

    Args:
      prog: the command as it is typed: "python -m nanojax.sample".
      description: what the command does.
      examples: commands to copy, one per line; they end the help text.
    """

    def __init__(self, prog: str, description: str = "", examples: str = "", **options: Any):
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"examples:\n{examples}" if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )
        self.add_argument("--version", action="version", version=version(), help="print the version and exit")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def count(text: str) -> int:
    """An argument that is a positive whole number, also written as 2e9 or 100_000."""
    try:
        value = float(text.replace("_", ""))
        if value != int(value) or value < 1:
            raise ValueError
        return int(value)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number") from None


def version() -> str:
    """As --version prints it: nanojax and its version."""
    try:
        return f"nanojax {importlib.metadata.version('nanojax')}"
    except importlib.metadata.PackageNotFoundError:
        return "nanojax, not installed as a package"


def command() -> str:
    """The command line of this process as it is typed again, for records: python -m nanojax.train --config=demo."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def path(text: str) -> str:
    """An argument that is a path: a leading `~` becomes the home folder, which a shell does not do behind `=`."""
    whole = os.path.expanduser(text)
    if whole.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text!r}: no such home folder is known; write the path in full, or ./{text}")
    return whole


def live(console: Console) -> bool:
    """Whether a bar can be redrawn on this console: not in a file, nor on a terminal without cursor movement."""
    return console.is_terminal and not console.is_dumb_terminal


def positive(text: str) -> float:
    """A number of a command line, above 0 and below a million."""
    try:
        value = float(text)
        if not 0 < value < 1e6:
            raise ValueError
        return value
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1,000,000") from None


def output_folder(path: str | os.PathLike) -> Path:
    """Makes the folder and checks that files can be written there. UserError if not, before hours of work."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return Path(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 200 characters; its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def short(value: float) -> str:
    """A number in three to five characters and a unit prefix: 12, 2.90k, 3.40M, 1.50G, 2.00T."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f}{letter}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """01:02:03, or 1d 02:03:04 from one day on."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{f'{days}d ' if days else ''}{h:02d}:{m:02d}:{s:02d}"


class Bar:
    """Progress on stderr: amount, rate, time left. A live bar on a terminal, otherwise a line every LOG_SECONDS.

    Args:
      title: what is being done.
      total: the amount at the end; None if it is not known.
      unit: what is counted: "tokens", "B".
      quiet: shows nothing.
    """

    def __init__(self, title: str, total: float | None, unit: str, quiet: bool = False):
        self.title, self.total, self.unit, self.quiet = title, total, unit, quiet
        self.done, self.note = 0.0, ""
        self.start = self.logged = time.monotonic()
        console = Console(stderr=True)
        self.live = live(console) and not quiet
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console, disable=not self.live,
            redirect_stdout=sys.stdout.isatty(),  # lines printed meanwhile stand above the bar, unless they go to a file
        )  # fmt: skip
        self.task = self.progress.add_task(title, total=total, text="")

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, failed: type | None, *_: Any) -> None:
        self.progress.stop()
        if not self.live and not self.quiet and not failed:
            print(f"{self.title}: {self._text()}, {duration(time.monotonic() - self.start)}", file=sys.stderr)

    def reach(self, done: float, note: str = "") -> None:
        """Sets the amount that is done; `note`, once given, stays behind the rate."""
        self.done = done
        self.note = note or self.note
        if self.live:
            self.progress.update(self.task, completed=self.done, text=self._text())
        elif not self.quiet and time.monotonic() - self.logged > LOG_SECONDS:
            self.logged = time.monotonic()
            spent = self.logged - self.start
            left = f", {duration(spent * (self.total / self.done - 1))} left" if self.total and self.done else ""
            print(f"{self.title}: {self._text()}, {duration(spent)}{left}", file=sys.stderr, flush=True)

    def _text(self) -> str:
        rate = self.done / max(1e-9, time.monotonic() - self.start)
        of = f"/{short(self.total)}" if self.total else ""
        note = f", {self.note}" if self.note else ""
        return f"{short(self.done)}{of} {self.unit}, {short(rate)} {self.unit}/s{note}"
