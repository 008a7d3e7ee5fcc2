"""nanojax.status: what it says of a run that goes on, ended, stalled, was killed, is damaged, empty, or a copy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nanojax import cli, files, status
from nanojax.config import Config
from nanojax.run import records, run_folder, watch

Make = Callable[..., Config]
NOON = 1_800_000_000.0


def write(run: Path, config: Config, *entries: dict) -> Path:
    """A run folder with these records, a second apart where they have no time."""
    run.mkdir()
    run_folder.write_config(run, config)
    lines = [json.dumps({"time": NOON + i, **entry}) for i, entry in enumerate(entries)]
    (run / records.FILE).write_text("\n".join(lines) + "\n")
    return run


def trained(step: int, **more: float | dict) -> dict:
    """A train record of 128 tokens per step."""
    return {"kind": "train", "step": step, "tokens": 128 * step, "loss": 2.5, "tokens_per_s": 64.0, "kwh": None, **more}


START = {"kind": "start", "step": 0}


def test_a_run_that_goes_on(tiny: Make, tmp_path: Path) -> None:
    """Step, loss, energy and money; speed over the last day is all of it that the records say, and gives the time left."""
    old = [
        trained(1, time=NOON - 90_000),
        trained(2, time=NOON - 86_400),
    ]  # more than a day, and a day, before the last
    new = [
        trained(10, time=NOON - 10, kwh=2.0),
        {"kind": "eval", "step": 10, "bpb": 1.25},
        trained(12, time=NOON, kwh=4.0),
    ]
    run = write(tmp_path / "run", tiny(train=dict(steps=20)), START, *old, *new)
    with files.locked(run, "--train.run"):
        found = status.status(run)
    assert (found.state, found.step, found.steps, found.loss, found.bpb) == ("running", 12, 20, 2.5, 1.25)
    assert found.tokens_per_s_day == pytest.approx(10 * 128 / 86_400)
    assert found.eta == pytest.approx(8 * 8640)
    assert found.kwh == 4.0 and found.cost["USD"] == pytest.approx(0.68)
    text = status.table(found, NOON + 60)
    assert "step       12 of 20" in text and "last record 00:01:00 ago" in text and "last save  none yet" in text
    assert "time left  19:12:00" in text and "4.00 kWh, USD 0.68" in text


@pytest.mark.parametrize(
    "code, saved, state",
    [(0, 20, "done"), (3, 10, "stopped"), (6, 10, "failed, not saved"), (1, 10, "diverged"), (None, 10, "killed, or")],
)
def test_how_it_ended(code: int | None, saved: int, state: str, tiny: Make, tmp_path: Path) -> None:
    """From the last start's end record, where there is one; an older one does not count."""
    stop = {"kind": "end", "step": 5, "code": 3}
    end = [{"kind": "end", "step": saved, "code": code}] if code is not None else []
    run = write(tmp_path / "run", tiny(train=dict(steps=20)), START, trained(5), stop, START, trained(saved), *end)
    (run / "checkpoints" / str(saved)).mkdir(parents=True)
    found = status.status(run)
    assert found.state.startswith(state) and found.saved == saved and found.starts == 2


def test_warnings(tiny: Make, tmp_path: Path) -> None:
    """Each kind's text with its count, and the watch's report."""
    warned = {"kind": "warning", "step": 3, "about": "save", "text": "saving step 3 failed"}
    run = write(tmp_path / "run", tiny(), START, warned, trained(4, warnings={"save": 7}))
    (run / watch.REPORT).write_text("2026-01-01: nothing has happened\nstacks")
    assert status.status(run).warnings == [
        "step 3: saving step 3 failed (7 times)",
        "2026-01-01: nothing has happened (stalled.txt)",
    ]


def test_a_jump_of_the_clock(tiny: Make, tmp_path: Path) -> None:
    """Times that run backwards give no negative speed or time left."""
    run = write(tmp_path / "run", tiny(), START, trained(1, time=NOON), trained(2, time=NOON - 5000))
    found = status.status(run)
    assert found.tokens_per_s_day is None and found.eta is not None and found.eta > 0
    assert "-" not in status.table(found, NOON - 9999).split("time left")[1].splitlines()[0]


@pytest.mark.parametrize("damage", ["config", "records", "all"])
def test_damaged(
    damage: str, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It says what is left, and never fails."""
    run = write(tmp_path / "run", tiny(), START, trained(4))
    if damage in ("config", "all"):
        (run / "config.json").write_text("")
    if damage in ("records", "all"):
        odd = {"kind": "train", "step": 9, "loss": "x", "tokens": None, "time": "y", "warnings": 3, "kwh": True}
        (run / records.FILE).write_bytes(b"\xff\x00\n" + json.dumps(odd).encode() + b"\nnull\n[]\n{")
    monkeypatch.setattr("sys.argv", ["status", f"--run={run}", "--json"])
    status.main()
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == (4 if damage == "config" else 9)
    assert bool(found["warnings"]) == (damage != "records")
    monkeypatch.setattr("sys.argv", ["status", f"--run={run}"])
    status.main()
    assert "step " in capsys.readouterr().out


def test_damaged_checkpoints_are_told(tiny: Make, tmp_path: Path) -> None:
    """One that is not whole, with the file that says so, and one that a resumed run moved aside."""
    run = write(tmp_path / "run", tiny(), START, trained(4))
    meta = run / "checkpoints" / "4" / "meta"
    meta.mkdir(parents=True)
    for part in ("", "meta", "params"):
        (meta.parent / part).mkdir(exist_ok=True)
        (meta.parent / part / "commit_success.txt").touch()
    (meta / "data.json").write_text(json.dumps(run_folder.sealed({"step": 4, "data": {"row": 3}})))
    (run / "damaged" / "2").mkdir(parents=True)
    incomplete, aside = status.status(run).warnings
    assert incomplete == f"{run}/checkpoints/4: damaged (opt/commit_success.txt is missing)"
    assert aside == f"{run}/damaged/2: was damaged and moved here"
    (meta.parent / "opt").mkdir()
    (meta.parent / "opt" / "commit_success.txt").touch()
    assert status.status(run).warnings == [aside]
    (meta / "data.json").write_text((meta / "data.json").read_text().replace('"row": 3', '"row": 4'))
    assert "is not what was saved" in status.status(run).warnings[0]


def test_empty_missing_and_copied(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder is a run that has not begun, a missing one a mistake, a copy as good as the original."""
    (tmp_path / "empty").mkdir()
    assert status.status(tmp_path / "empty").state == "empty"
    monkeypatch.setattr("sys.argv", ["status", f"--run={tmp_path / 'nothing'}"])
    with pytest.raises(cli.UserError, match="no such folder"):
        status.main()
    (tmp_path / "empty" / "train.tokens").touch()
    monkeypatch.setattr("sys.argv", ["status", f"--run={tmp_path / 'empty'}"])
    with pytest.raises(cli.UserError, match=r"not a run folder; it holds train\.tokens"):
        status.main()
    run = write(tmp_path / "run", tiny(), START, trained(4))
    shutil.copytree(run, tmp_path / "copy")
    found, copy = status.status(run), status.status(tmp_path / "copy")
    assert found.step == copy.step == 4 and found.last_record == copy.last_record


def test_watch(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """--watch says it again, as JSON one object per line."""
    run = write(tmp_path / "run", tiny(), START, trained(4))
    naps = iter([None, None])

    def nap(_: float) -> None:
        if next(naps, "over"):
            raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", nap)
    monkeypatch.setattr("sys.argv", ["status", f"--run={run}", "--watch", "--json"])
    with pytest.raises(KeyboardInterrupt):
        status.main()
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == [4, 4, 4]
