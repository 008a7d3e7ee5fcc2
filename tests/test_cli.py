"""What all commands share: errors as one line, numbers and durations as people read them, progress without a terminal."""

import argparse
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nanojax import cli


def test_a_mistake_is_one_line_and_exit_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Of the arguments too, which name the command's --help; an abbreviated option is a mistake."""
    parser = cli.Parser("python -m nanojax.x", "Does x.", "  python -m nanojax.x --number=2")
    parser.add_argument("--number", type=cli.count)
    for argument, message in (("--number=1.5", "'1.5' is not a positive whole number"), ("--num=1", "unrecognized")):
        monkeypatch.setattr(sys, "argv", ["x", argument])
        with pytest.raises(SystemExit) as stop:
            cli.run_main(parser.parse_args)  # type: ignore[arg-type]
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ") and message in err
        assert err.endswith("see python -m nanojax.x --help\n")
    assert "examples:\n  python -m nanojax.x --number=2" in parser.format_help()


def test_subcommands_are_parsers_too() -> None:
    """add_subparsers makes more of the same class."""
    commands = cli.Parser("python -m nanojax.x").add_subparsers()
    with pytest.raises(cli.UserError, match=r"see python -m nanojax.x one --help"):
        commands.add_parser("one", help="the first").parse_args(["--no"])


def test_numbers() -> None:
    """Counts as people write them; sizes and durations as they read them."""
    assert [cli.count(text) for text in ("7", "2e9", "100_000")] == [7, 2_000_000_000, 100_000]
    for text in ("0", "-1", "1.5", "many", "inf"):
        with pytest.raises(argparse.ArgumentTypeError):
            cli.count(text)
    assert [cli.short(x) for x in (12, 2900, 3_400_000, 1.5e9, 2e12)] == ["12", "2.90k", "3.40M", "1.50G", "2.00T"]
    assert cli.duration(3723) == "01:02:03" and cli.duration(90061) == "1d 01:01:01"


def test_first_line() -> None:
    """XLA's messages have hundreds of lines; some exceptions have none."""
    assert cli.first_line(ValueError("\nout of memory\nwhile ...")) == "out of memory"
    assert cli.first_line(KeyError()) == "KeyError"


def test_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A line at the end and one per LOG_SECONDS; nothing if quiet or if the work failed."""
    monkeypatch.setattr(cli, "LOG_SECONDS", 0.0)
    with cli.Bar("reading", 2000, "B") as bar:
        bar.reach(1000, "file 1")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("reading: 1.00k/2.00k B, ") and "file 1" in line for line in lines)
    assert lines[0].endswith(" left")
    with cli.Bar("reading", 2000, "B", quiet=True) as bar:
        bar.reach(1000)
    with pytest.raises(ValueError), cli.Bar("reading", None, "B"):
        raise ValueError
    assert capsys.readouterr().err == ""


def test_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` behind `=` is the home folder, which no shell expands; a home that is not known is a mistake, not a folder `~`."""
    parser = cli.Parser("python -m nanojax.x")
    parser.add_argument("--out", type=cli.path)
    monkeypatch.setenv("HOME", "/h")
    assert parser.parse_args(["--out=~/runs/x"]).out == "/h/runs/x"
    assert [parser.parse_args([f"--out={p}"]).out for p in ("a~b", "./~", "x/~")] == ["a~b", "./~", "x/~"]
    for unknown in ("~no-such-user/x", "~no-such-user"):
        with pytest.raises(cli.UserError, match=r"no such home folder is known; write .* or \./~no-such-user"):
            parser.parse_args([f"--out={unknown}"])


def test_version(capsys: pytest.CaptureFixture) -> None:
    """Every parser has --version."""
    with pytest.raises(SystemExit) as stop:
        cli.Parser("python -m nanojax.x").parse_args(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"{cli.version()}\n"
    assert cli.version().startswith("nanojax")


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar needs cursor movement, which TERM=dumb does not have; a file has none either."""
    for term, terminal, live in (("xterm", True, True), ("dumb", True, False), ("xterm", False, False)):
        monkeypatch.setenv("TERM", term)
        assert cli.live(Console(file=io.StringIO(), force_terminal=terminal)) == live


def test_errors_that_no_step_foresaw(capsys: pytest.CaptureFixture) -> None:
    """A file that cannot be read, and a path that a library wants in UTF-8, are one line too."""

    def no_file() -> None:
        Path("/nowhere/x").read_text()

    def not_utf8() -> None:
        "caf\udce9".encode()

    for main, message in ((no_file, "/nowhere/x: No such file or directory"), (not_utf8, "is not UTF-8")):
        with pytest.raises(SystemExit) as stop:
            cli.run_main(main)
        said = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(said) == 1 and message in said[0]
