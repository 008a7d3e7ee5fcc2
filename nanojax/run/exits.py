"""How a run ends: its exit codes. docs/running.md has the table and the loop of a supervisor, which reads them."""

import contextlib
from collections.abc import Iterator

from nanojax.cli import UserError

DONE = 0
DIVERGED = 1
MISTAKE = 2
STOPPED = 3  # a signal; every finished step is saved
STOPPED_UNSAVED = 4  # a signal before the first step, or while the disk was full
FAILED = 5  # the surroundings: data, disk, device; every finished step is saved
FAILED_UNSAVED = 6
STALLED = 7
SECOND_INTERRUPT = 130


class Diverged(Exception):
    """The loss, another metric or the state is NaN or Inf. The message says which and when."""


class Failed(Exception):
    """The surroundings ended the run. The message is one line: what failed, and what is saved."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Lost(UserError):
    """A mistake in the run folder that no other try mends, also where the run has begun."""


@contextlib.contextmanager
def restarting(begun: bool) -> Iterator[None]:
    """Where a run that has begun starts again, what goes wrong becomes Failed.

    What is missing or full now was good enough before, so it is no mistake of the command, and another try may help. Lost
    stays what it is.
    """
    try:
        yield
    except Lost:
        raise
    except (UserError, OSError) as error:
        if not begun:
            raise
        raise Failed(
            f"{error}; put back what was there: the checkpoints are untouched, and the same command resumes", FAILED
        ) from error
