"""scripts/beside_torch.py, as far as it needs neither torch nor nanochat."""

import argparse
import subprocess
import sys
from pathlib import Path

import beside_torch
import pytest

SCRIPT = Path(beside_torch.__file__)
SMALL = argparse.Namespace(depth=2, vocab=128, seq=16, rows=2)


@pytest.mark.long
def test_our_turns_train() -> None:
    """Both parts run again and again on the same state, which a step donates and replaces."""
    turns = beside_torch.ours(SMALL)
    assert set(turns) == set(beside_torch.PARTS)
    for part in (*beside_torch.PARTS, *beside_torch.PARTS):
        turns[part]()


@pytest.mark.parametrize("missing", ["--nanochat", "--python"])
def test_what_is_missing_is_one_line(tmp_path: Path, missing: str) -> None:
    """A folder that is no checkout and a Python that is none are told before anything compiles."""
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "muon.py").touch()
    given = {"--nanochat": str(tmp_path), "--python": sys.executable} | {missing: str(tmp_path / "absent")}
    command = [sys.executable, str(SCRIPT), *(f"{name}={value}" for name, value in given.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and missing in done.stderr
