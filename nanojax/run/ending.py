"""The end of a run, wanted or not: one more save, one line on what is saved, the exit code."""

import threading
import traceback
from collections.abc import Callable

from nanojax import step as steps
from nanojax.cli import UserError
from nanojax.data.loader import TrainIterator
from nanojax.run import exits, guard
from nanojax.run.metrics import Metrics
from nanojax.run.saving import Saver
from nanojax.run.watch import Watch


def ended(
    finished: bool,
    state: steps.State,
    batches: TrainIterator,
    log: Metrics,
    saver: Saver,
    watch: Watch,
    stop: threading.Event,
) -> int:
    """After the loop: waits until `state` is on disk, says so, and returns the exit code."""
    step = int(state.step)
    if step == 0:
        return _told(log, exits.STOPPED_UNSAVED, "stopped before the first step; nothing was saved")
    if stop.is_set():
        saved = saver.finish(state, batches.get_state(), guard.PATIENCE_STOPPING, beat=watch.beat)
    else:
        saved = saver.finish(state, batches.get_state(), guard.PATIENCE, stop, watch.beat)
    end = f"done, {step} steps" if finished else f"stopped after step {step}; the same command resumes"
    if not saved:
        code = exits.FAILED_UNSAVED if finished else exits.STOPPED_UNSAVED
        return _told(log, code, f"{end}; {saver.left()}")
    return _told(log, exits.DONE if finished else exits.STOPPED, f"{end}; saved in {saver.run}")


def rescued(
    error: BaseException,
    first: int,
    first_row: int,
    state: steps.State,
    batches: TrainIterator,
    log: Metrics,
    saver: Saver,
    log_last_steps: Callable[[], None],
) -> Exception:
    """What to raise instead of `error`, which left the loop: every finished step is saved before, if that is possible.

    Args:
      first, first_row: the step and the data position at which this process began.
      log_last_steps: logs what is not logged yet. Raises Diverged if it is not finite; then nothing is saved.
    """
    why, saved = guard.reason(error), False
    if guard.is_a_bug(error):
        traceback.print_exception(error)
    try:
        step = int(state.step)  # raises if the device is gone, or the state with the step that failed
        if step == first and guard.is_out_of_memory(error):
            return UserError(why)  # not one step was possible: a mistake in the config
        try:
            log_last_steps()
        except exits.Diverged:
            raise
        except Exception as another:
            log.warn("records", f"the last steps' metrics cannot be read ({guard.reason(another)})")
        log.flush()
        taken = (batches.position - first_row) // batches.rows
        unused = taken - (step - first)  # 1 if it was the step itself that failed
        saved = step == saver.saved or saver.finish(state, batches.get_state(unused), guard.PATIENCE_STOPPING)
    except exits.Diverged as diverged:
        return diverged
    except Exception as another:
        log.warn("save", f"the state cannot be saved ({guard.reason(another)})")
    if isinstance(error, KeyboardInterrupt):
        code = exits.STOPPED if saved else exits.STOPPED_UNSAVED
    else:
        code = exits.FAILED if saved else exits.FAILED_UNSAVED
    text = f"{why}; " + (f"saved after step {saver.saved}" if saved else saver.left()) + "; the same command resumes"
    log.end(code, text)
    return exits.Failed(text, code)


def lost(error: BaseException, first: bool, log: Metrics, saver: Saver) -> Exception:
    """What to raise when another process of the run has ended, or a step failed: the rest of its state is not here.

    Args:
      first: whether this process has not done a step.
    """
    saver.close()
    if first and guard.is_out_of_memory(error):
        return UserError(guard.reason(error))
    code = error.code if isinstance(error, exits.Failed) else exits.FAILED_UNSAVED
    text = f"{guard.reason(error)}; {saver.left()}"
    log.end(code, text)
    return exits.Failed(text, code)


def _told(log: Metrics, code: int, text: str) -> int:
    log.say(text)
    log.end(code, text)
    return code
