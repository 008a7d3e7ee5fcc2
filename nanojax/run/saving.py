"""Saving while the run goes on: a failed save is told at the next step and tried again; the old checkpoint stays."""

import contextlib
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanojax import step as steps
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.run import checkpoint, run_folder
from nanojax.run.exits import Diverged
from nanojax.run.metrics import Metrics
from nanojax.tokenizer import Tokenizer

RETRY_SECONDS = 60.0  # from a failed save to the next try
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between the tries of `finish`


class Saver:
    """The run's checkpoints. Only Diverged leaves `save`: whatever else fails is a warning in the log.

    `saved` is the newest step whose checkpoint is known to be whole.

    Args:
      gathered: the plain state of one that several processes hold; they take part in it.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        tokenizer: Tokenizer,
        log: Metrics,
        gathered: Callable[[steps.State], steps.State] = lambda state: state,
    ):
        self.run, self.config, self.tokenizer, self.log, self.gathered = run, config, tokenizer, log, gathered
        self.writer = checkpoint.open_for_saving(run, config)
        self.saved = max(run_folder.available(run), default=0)
        self.writing: int | None = None  # the step that is being saved
        self.response: Any = None
        self.retry_at = math.inf

    @property
    def retry_is_due(self) -> bool:
        """Whether an earlier save failed RETRY_SECONDS ago."""
        return time.monotonic() >= self.retry_at

    def notice(self) -> None:
        """Called once per step: looks whether the save that was started has ended, and how. Never waits for it."""
        if self.writing is not None and not self.writer.is_saving_in_progress():
            self._settle()

    def save(self, state: steps.State, data: dict[str, Any]) -> None:
        """Starts saving; blocks until the save before has ended and `state` is copied, so that it may be donated.

        Args:
          data: the loader's get_state().
        """
        if self.writing is not None:
            self._settle()
        step = int(state.step)
        if step == self.saved:
            return
        state = self.gathered(state)
        try:
            self._complete_folder()
            self.response = checkpoint.save(self.writer, self.config, state, data, self.tokenizer.fingerprint)
            self.writing = step
        except checkpoint.NotFinite as error:
            raise Diverged(f"step {step}: {error} holds NaN or Inf, not saved") from None
        except Exception as error:
            self._failed(step, error)

    def finish(
        self,
        state: steps.State,
        data: dict[str, Any],
        patience: float,
        stop: threading.Event | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> bool:
        """Saves and waits until the step is on disk. Whether it is.

        Args:
          patience: seconds for which a failed save is tried again.
          stop: ends the patience once it is set.
          beat: called before each try.
        """
        step, wait = int(state.step), FIRST_WAIT
        end = time.monotonic() + patience
        while True:
            beat()
            self.save(state, data)
            if self.writing is not None:
                self._settle()
            if self.saved == step:
                return True
            if time.monotonic() + wait > end or (stop is not None and stop.is_set()):
                return False
            (stop or threading.Event()).wait(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def left(self) -> str:
        """What a run whose last steps are not saved has left."""
        where = f"the newest checkpoint is of step {self.saved}" if self.saved else "there is no checkpoint"
        return f"the last steps could not be saved, {where}"

    def close(self) -> None:
        """Waits for what is being written; its failure was told or is told now."""
        if self.writing is not None:
            self._settle()
        with contextlib.suppress(Exception):
            self.writer.close()

    def _complete_folder(self) -> None:
        """Config and tokenizer, where they are gone: the folder was moved or removed while the run goes on."""
        if not (self.run / run_folder.CONFIG).exists() or not (self.run / "tokenizer").exists():
            text = f"{self.run}: was moved or removed; it is made again, with the checkpoints from here on"
            self.log.warn("run folder", text)
            self.tokenizer.save(self.run / "tokenizer")
            run_folder.write_config(self.run, self.config)

    def _settle(self) -> None:
        step, self.writing = self.writing, None
        assert step is not None
        try:
            checkpoint.wait(self.writer, step, self.response)
        except UserError as error:
            self._failed(step, error)
        else:
            self.saved, self.retry_at = step, math.inf

    def _failed(self, step: int, error: Exception) -> None:
        """Tells it, and opens a new writer: that removes the half-written folder, which may be what fills the disk."""
        if run_folder.available(self.run)[-1:] == [step]:  # it is whole: what failed is the removal of an old one
            self.saved, self.retry_at = step, math.inf
            self.log.warn("old checkpoints", f"{error}; step {step} is saved, but an old checkpoint was not removed")
        else:
            stays = f"the checkpoint of step {self.saved} stays" if self.saved else "there is none yet"
            self.log.warn("save", f"{error}; {stays}; trying again every {RETRY_SECONDS:.0f} s")
            self.retry_at = time.monotonic() + RETRY_SECONDS
        with contextlib.suppress(Exception):
            self.writer.close()
        with contextlib.suppress(Exception):  # a disk that takes no folder either: the next save fails and tells
            self.writer = checkpoint.open_for_saving(self.run, self.config)
