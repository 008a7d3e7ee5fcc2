"""The doctor's command: its lines, its JSON, its exit codes, on this machine and on made-up ones."""

import json
import sys
from typing import Any

import pytest
from helpers import fake_card
from helpers.fake_card import VERSIONS

from nanojax import cli, doctor
from nanojax.card import facts
from nanojax.cli import UserError


def run(monkeypatch: pytest.MonkeyPatch, seen: facts.Facts, *arguments: str) -> int:
    """The exit code."""
    monkeypatch.setattr(facts, "gather", lambda **_: seen)
    monkeypatch.setattr(sys, "argv", ["doctor", *arguments])
    try:
        doctor.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("changes", "code", "last"),
    [
        ({}, 0, "nothing prevents training"),
        ({"watts_limit": 100.0}, 0, "nothing prevents training"),
        ({"driver": "470.1"}, 1, "something prevents training"),
        ({"versions": VERSIONS | {"jax-cuda12-plugin": "0.9"}}, 1, "something prevents training"),
    ],
)
def test_exit_codes(
    changes: dict[str, Any], code: int, last: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """0: nothing prevents training, warnings or not; 1: a problem does. Every line has its level first."""
    assert run(monkeypatch, fake_card.facts(**changes)) == code
    *lines, end = capsys.readouterr().out.splitlines()
    assert end.startswith(last) and all(line.split()[0] in ("ok", "warning", "problem") for line in lines)


def test_json_and_a_config(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Facts and lines, nothing else on stdout; with a config, whether it fits this card now, with its keys overridden."""
    small = ("--config=demo", "--model.depth=1", "--json")
    assert run(monkeypatch, fake_card.facts(), *small) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["facts"]["card"] == "NVIDIA GeForce RTX 4070"
    assert [line["level"] for line in told["lines"] if line["about"] == "fits"] == ["ok"]
    assert run(monkeypatch, fake_card.facts(memory_free=2**29), *small) == 1
    assert [line["level"] for line in json.loads(capsys.readouterr().out)["lines"] if line["about"] == "fits"] == [
        "problem"
    ]


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, exit 2, as everywhere."""
    for arguments in (["--config=nothing"], ["--nonsense"], ["--config=demo", "--model.nonsense=1"]):
        with pytest.raises(UserError):
            run(monkeypatch, fake_card.facts(), *arguments)


@pytest.mark.slow
def test_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The real command, jax asked in its own process: no traceback, and a line on what jax computes on."""
    monkeypatch.setattr(sys, "argv", ["doctor"])
    try:
        cli.run_main(doctor.main)
    except SystemExit as stop:
        assert stop.code == 1
    out, err = capsys.readouterr()
    assert "jax computes on" in out and err == ""
