"""TensorBoard events, written by the caller itself: no thread that could die, no queue that could fill up and block."""

import contextlib
import os
import struct
import time
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c


class Board:
    """An event file of its own in `folder`. Methods return None, or why the event is not in the file.

    Args:
      purge_step: the first step that is written anew; TensorBoard forgets what earlier files have of it and later ones.

    Raises OSError if the file cannot be made.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{int(now)}.{os.uname().nodename}.{os.getpid()}.{time.monotonic_ns()}"
        self.file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        self.end = 0
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log={"status": "START"})

    def scalar(self, name: str, value: float, step: int) -> OSError | None:
        """One point of a curve."""
        return self._write(step=step, summary=summary.scalar(name, value))

    def text(self, name: str, text: str, step: int) -> OSError | None:
        """A text that belongs to a step."""
        return self._write(step=step, summary=summary.text(name, text.encode("utf-8", "replace").decode()))

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):
            os.close(self.file)

    def _write(self, **event: Any) -> OSError | None:
        """Appends a TFRecord: length u64, its crc, the event, its crc."""
        body = event_pb2.Event(wall_time=time.time(), **event).SerializeToString()  # pyright: ignore[reportAttributeAccessIssue]
        length = struct.pack("<Q", len(body))
        record = length + struct.pack("<I", masked_crc32c(length)) + body + struct.pack("<I", masked_crc32c(body))
        try:
            rest = record
            while rest:
                rest = rest[os.write(self.file, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self.file, self.end)  # half an event would hide all that follow
            return error
        self.end += len(record)
        return None
