"""Random faults around a run that the loop of docs/running.md restarts: its result is the undisturbed run's, bit for bit."""

import contextlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers import tiny_run
from helpers.paths import ROOT

from nanojax import train
from nanojax.run import exits, records

compile_cache = tiny_run.compile_cache
home = tiny_run.home
pytestmark = pytest.mark.usefixtures("compile_cache")
ORDERED = ("clock", "stdout", "tensorboard")  # what helpers/injected does inside the process
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "hangup": signal.SIGHUP}
FAULTS = (*SIGNALS, *ORDERED, "disk", "data")


def the_loop() -> str:
    """The bash loop that docs/running.md gives."""
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "running.md").read_text(), re.M | re.S)[0]


class Supervised:
    """A run under the loop, and the faults that can befall it."""

    def __init__(self, home: Path, run: Path, cache: Path, steps: int, rng: random.Random):
        self.run, self.rng, self.data = run, rng, home / "data"
        self.orders = run.with_name(f"{run.name}_orders")
        self.orders.mkdir()
        arguments = tiny_run.arguments(home / "tiny.py", run, train__steps=steps, checkpoint__every=20, eval__every=0)
        command = " ".join([sys.executable, "-m", "nanojax.train", *arguments])
        script = (
            the_loop().replace("python -m nanojax.train --config=d32_4070", command).replace("sleep 60", "sleep 0.1")
        )
        assert command in script and "sleep 0.1" in script
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        path = f"{ROOT / 'tests' / 'helpers' / 'injected'}:{ROOT}"
        env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "ORDERS": str(self.orders)}
        self.output = run.with_name(f"{run.name}_output")
        with open(self.output, "a") as output:
            self.loop = subprocess.Popen(["bash", "-c", script], env=env, stdout=output, stderr=output)

    @property
    def ended(self) -> bool:
        """Whether the loop is over."""
        return self.loop.poll() is not None

    @property
    def pid(self) -> int:
        """Of the training process, or of the one before while none runs."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.orders / "pid").read_text())
        return 0

    def reach(self, step: int) -> None:
        """Until that step is on record."""
        while not self.ended and max((r["step"] for r in records.read(self.run, "train")), default=0) < step:
            time.sleep(0.02)

    def befall(self, fault: str) -> None:
        """One fault, and its end if it has one."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if fault in SIGNALS:
                before = self.pid
                if before:
                    os.kill(before, SIGNALS[fault])
                while self.pid == before and not self.ended:  # until it is started again
                    time.sleep(0.02)
            elif fault in ORDERED:
                (self.orders / fault).write_text(str(self.rng.choice((-1, 1)) * self.rng.uniform(60, 1e6)))
                while (self.orders / fault).exists() and not self.ended:
                    time.sleep(0.02)
            elif fault == "disk":  # no file may grow beyond 1,000 bytes
                pid, (_, most) = self.pid, resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, most))
                time.sleep(self.rng.uniform(0, 3))
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
            else:
                away = self.data / "away"
                (self.data / "train_00000.bin").rename(away)
                time.sleep(self.rng.uniform(0, 3))
                away.rename(self.data / "train_00000.bin")


@pytest.mark.slow
@pytest.mark.parametrize(("faults", "steps", "seed"), [(5, 600, 0), (100, 6000, 1)])
def test_random_faults(home: Path, compile_cache: Path, faults: int, steps: int, seed: int) -> None:
    """Parameters, optimizer state, data position and records are those of the undisturbed run.

    Some faults come while the process starts. Nobody but the loop restarts it.
    """
    rng = random.Random(seed)
    reference, run = home / f"faults{faults}_reference", home / f"faults{faults}"
    overrides = dict(train__steps=steps, checkpoint__every=20, eval__every=0)
    assert train.train(tiny_run.load(home / "tiny.py", reference, **overrides)) == exits.DONE
    supervised = Supervised(home, run, compile_cache, steps, rng)
    supervised.reach(1)
    begin, befallen, soon = time.monotonic(), Counter(), False
    for number in range(faults):
        fault = rng.choice(FAULTS)
        if not soon:  # else while it starts, compiles or restores
            supervised.reach(number * steps // (faults + 1) + 1)
        time.sleep(rng.uniform(0, 4 if soon else 0.1))
        assert not supervised.ended, supervised.output.read_text()[-3000:]
        supervised.befall(fault)
        befallen[fault] += 1
        soon = fault in SIGNALS and rng.random() < 0.3
    assert supervised.loop.wait(timeout=600) == 0
    starts = len(records.read(run, "start"))
    print(f"{dict(befallen)} in {time.monotonic() - begin:.0f} s, {starts} starts on record")
    assert supervised.output.read_text().count("Traceback") == 0, supervised.output.read_text()
    tiny_run.assert_same_run(reference, run)
