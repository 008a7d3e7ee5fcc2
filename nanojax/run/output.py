"""Output that never raises and never blocks: what a terminal, a pipe or a full disk does not take is lost and counted."""

import contextlib
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

KEPT = 10_000  # writes that wait while the reader of a pipe pauses
LAST_SECONDS = 2.0  # that an ending process waits for its output
OURS = {1: 1, 2: 2}  # where stdout and stderr are; others than 1 and 2 within `of_libraries`


class Output:
    """A text stream in front of another one, which a thread writes to.

    A character that the other stream's encoding lacks is replaced. `lost` counts what could not be written, `reason` says
    why.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.errors = "replace"
        self.lost = 0
        self.reason = ""
        self.waiting: queue.Queue[str] = queue.Queue(KEPT)
        self.thread = threading.Thread(target=self._write_all, daemon=True, name="output")
        self.thread.start()

    def write(self, text: str) -> int:
        """Takes `text` and returns at once."""
        try:
            self.waiting.put_nowait(text)
        except queue.Full:
            self.lost += 1
            self.reason = "the reader is too slow"
        return len(text)

    def flush(self) -> None:
        """Nothing: the thread flushes."""

    def isatty(self) -> bool:
        """Whether the other stream is a terminal. A closed one is not."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return bool(self.stream.isatty()) or os.isatty(OURS.get(self.stream.fileno()) or -1)
        return False

    def fileno(self) -> int:
        """The other stream's descriptor; OSError if it has none."""
        return self.stream.fileno()

    def drain(self, seconds: float = LAST_SECONDS) -> None:
        """Until everything is written, but not longer than `seconds`."""
        end = time.monotonic() + seconds
        while self.waiting.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.01)

    def _write_all(self) -> None:
        while True:
            text = self.waiting.get()
            try:
                self._write(text)
            except (OSError, ValueError) as error:
                self.lost += 1
                self.reason = getattr(error, "strerror", None) or str(error)
            finally:
                self.waiting.task_done()

    def _write(self, text: str) -> None:
        try:
            descriptor = self.stream.fileno()
        except (OSError, ValueError, AttributeError):  # not a file: a test's or a notebook's stream
            self.stream.write(text)
            self.stream.flush()
            return
        data = text.encode(self.encoding, "replace")  # past Python's buffer, which would fail again at the exit
        while data:
            data = data[os.write(OURS.get(descriptor) or descriptor, data) :]


@contextlib.contextmanager
def unfailing() -> Iterator[list[Output]]:
    """sys.stdout and sys.stderr are Outputs until the block ends; yields them."""
    before = sys.stdout, sys.stderr
    for stream in before:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    outputs = [Output(stream) for stream in before]
    sys.stdout, sys.stderr = outputs  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield outputs
    finally:
        sys.stdout, sys.stderr = before
        for output in outputs:
            output.drain()


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """Until the block ends, errors of background threads and callbacks are not printed.

    A save that meets a full disk prints hundreds of lines of tracebacks from the threads of orbax and tensorstore. What
    matters of them is raised in the main thread.
    """
    before = sys.excepthook, sys.unraisablehook, threading.excepthook
    sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *_: None
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook, threading.excepthook = before


def last_words(text: str) -> None:
    """Writes a line to stderr before the process ends at once; gives up after LAST_SECONDS."""

    def write() -> None:
        with contextlib.suppress(OSError):
            os.write(OURS[2], (text + "\n").encode("utf-8", "replace"))

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(LAST_SECONDS)


@contextlib.contextmanager
def of_libraries() -> Iterator[int]:
    """Until the block ends, what C++ libraries print is kept in a file without a name; yields its descriptor.

    Only what Outputs and `last_words` write goes on to stdout and stderr.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with tempfile.TemporaryFile() as kept:
        for descriptor in OURS:
            OURS[descriptor] = os.dup(descriptor)
            os.dup2(kept.fileno(), descriptor)
        try:
            yield kept.fileno()
        finally:
            for descriptor, ours in OURS.items():
                os.dup2(ours, descriptor)
                os.close(ours)
                OURS[descriptor] = descriptor
