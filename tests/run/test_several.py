"""A run on two devices of one machine: the losses of one, plain checkpoints, and going on with the same number or another."""

from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_run

from nanojax import train
from nanojax.cli import UserError
from nanojax.run import metrics

compile_cache = tiny_run.compile_cache
home = tiny_run.home
pytestmark = [pytest.mark.usefixtures("compile_cache"), pytest.mark.slow]
KEPT = dict(checkpoint__keep_last=9)


def test_goes_on_with_any_number(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """12 steps of two devices have the losses and evaluations of one (1e-6) and its data position.

    From step 6 on, two devices again are bit for bit the whole run; one device and `all` say that they are not, and stay
    within 1e-6.
    """
    go = lambda name, devices: train.train(
        tiny_run.load(home / "tiny.py", tmp_path / name, parallel__devices=devices, **KEPT)
    )
    for name, devices in (("one", "1"), ("two", "2")):
        assert go(name, devices) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    np.testing.assert_allclose(tiny_run.losses(two), tiny_run.losses(one), rtol=1e-6)
    measured = lambda run: [r["bpb"] for r in metrics.read(run, "eval")]
    np.testing.assert_allclose(measured(two), measured(one), rtol=1e-6)
    assert len(measured(two)) == 3
    assert tiny_run.saved(two)[2] == tiny_run.saved(one)[2]
    assert tiny_run.saved(two)[1].keys() == {k for k in tiny_run.saved(one)[1] if not k.startswith(".accum")}
    capsys.readouterr()

    again = tiny_run.cut_after(two, tmp_path / "again", 6)
    assert go("again", "all") == 0  # the tests have two devices
    assert "bit for bit" not in capsys.readouterr().out
    tiny_run.assert_same_run(two, again)

    fewer = tiny_run.cut_after(two, tmp_path / "fewer", 6)
    assert go("fewer", "1") == 0
    assert "parallel.devices (was 2, now 1): from step 7 on not bit for bit" in capsys.readouterr().out
    np.testing.assert_allclose(tiny_run.losses(fewer), tiny_run.losses(two), rtol=1e-6)


def test_more_devices_than_there_are(home: Path, tmp_path: Path) -> None:
    """One line that says how many there are, and no run folder."""
    with pytest.raises(UserError, match=r"--parallel.devices=4: jax sees 2 here; .*device_count"):
        train.train(tiny_run.load(home / "tiny.py", tmp_path / "run", train__tokens_per_step=256, parallel__devices=4))
    assert not (tmp_path / "run").exists()
