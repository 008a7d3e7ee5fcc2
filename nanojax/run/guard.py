"""What keeps the loop going: work that may fail, data that may be gone for a while, and one more save on the way out."""

import threading
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from nanojax import xla
from nanojax.cli import UserError, first_line
from nanojax.data.loader import TrainIterator
from nanojax.run import exits
from nanojax.run.metrics import Metrics
from nanojax.run.watch import Watch

PATIENCE = 600.0  # seconds for which missing data and the last save are tried again
PATIENCE_STOPPING = 5.0  # the same after a signal: whoever sent it waits, a supervisor 30 to 90 s
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0


class DataGone(Exception):
    """No batch could be read for PATIENCE seconds. The message is one line."""


class Warned(Protocol):
    """What takes warnings: the run's logs."""

    def warn(self, about: str, text: str) -> None: ...


class AskedToStop(Exception):
    """Work that the run can go on without ends early: a signal came."""


def attempt(log: Metrics, about: str, work: Callable[..., None], *arguments: Any) -> None:
    """Does what the run can go on without (an evaluation, a trace). What it raises is a warning in the log."""
    try:
        work(*arguments)
    except AskedToStop:
        log.say(f"step {log.step} · {about} left out: asked to stop")
    except Exception as error:
        log.warn(about, f"{about} after step {log.step} failed ({reason(error)}); the run goes on without it")


def next_batch(batches: TrainIterator, log: Warned, watch: Watch, stop: threading.Event) -> np.ndarray | None:
    """The next rows. While they cannot be read it tries again, at growing intervals, for PATIENCE seconds.

    None when `stop` is set meanwhile. DataGone when the time is over. The position does not move by failures.
    """
    waited, wait = 0.0, FIRST_WAIT
    broken = False
    while True:
        try:
            if broken:
                batches.reopen()
            return next(batches)
        except Exception as error:
            broken = True
            why = reason(error)
            if waited >= PATIENCE:
                raise DataGone(f"data: {why}; tried again for {waited / 60:.0f} minutes") from error
        log.warn("data", f"data cannot be read ({why}); trying again for {PATIENCE / 60:.0f} minutes")
        watch.beat()
        if stop.wait(wait):
            return None
        waited, wait = waited + wait, min(2 * wait, LONGEST_WAIT)


def alive(watch: Watch, stop: threading.Event) -> None:
    """Called by long work between its parts: tells the watch, and ends the work if a signal came."""
    watch.beat()
    if stop.is_set():
        raise AskedToStop


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory was too small."""
    return isinstance(error, jax.errors.JaxRuntimeError) and xla.is_out_of_memory(error)


def is_a_bug(error: BaseException) -> bool:
    """Whether a traceback helps: the error is not one of the user, the disk, the data or the device."""
    known = UserError | DataGone | OSError | KeyboardInterrupt | jax.errors.JaxRuntimeError
    return not isinstance(error, known)


def reason(error: BaseException) -> str:
    """One line on what happened, with advice where there is some."""
    if is_out_of_memory(error):
        advice = "lower train.microbatch, or set compute.residuals=inputs; python -m nanojax.plan shows what fits"
        return f"out of device memory: {first_line(error)}; {advice}"
    if isinstance(error, UserError | DataGone | exits.Failed):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"
