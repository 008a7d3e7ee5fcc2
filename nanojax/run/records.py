"""metrics.jsonl, the source of truth about a run: one JSON record per line, read with damage and written with patience."""

import collections
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from nanojax import files
from nanojax.cli import UserError

FILE = "metrics.jsonl"
KEPT = 100_000  # records that wait in memory while the file cannot be written, about 30 MB
RETRY_SECONDS = 1.0


def read(run: str | os.PathLike, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run folder's metrics.jsonl, of one kind if given.

    Lines that are no records are left out: one that a crash cut off, what a damaged disk returns. UserError when the file
    is there and cannot be read.
    """
    found = (_record(line) for line in _lines(run))
    return [record for record in found if record is not None and kind in (None, record["kind"])]


def damaged(run: str | os.PathLike) -> int:
    """How many lines of a run folder's metrics.jsonl `read` leaves out."""
    return sum(_record(line) is None for line in _lines(run) if line.strip())


def number(record: dict[str, Any], key: str) -> float | None:
    """The finite number under `key`; None where there is none."""
    value = record.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value if abs(value) < 1e300 else None  # math.isfinite raises for a larger integer


def _lines(run: str | os.PathLike) -> list[str]:
    path = Path(run) / FILE
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int) and isinstance(record.get("kind"), str)
    return record if whole else None


def forget_after(run: Path, step: int) -> None:
    """Drops the records of steps after `step`; a resumed run writes them again."""
    if not (run / FILE).exists():
        return
    kept = "".join(json.dumps(r) + "\n" for r in read(run) if r["step"] <= step)
    with files.write_atomic(run / FILE) as file:
        file.write(kept.encode())


class Appender:
    """The open file. Records that it does not take (full disk) wait in memory and are written later, in order.

    `dropped` counts the oldest ones, which are forgotten when more than KEPT wait.
    """

    def __init__(self, run: Path):
        self.path = run / FILE
        self.waiting: collections.deque[bytes] = collections.deque()
        self.dropped = 0
        self.retry_at = 0.0
        self._open()

    def _open(self) -> None:
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self.end = os.fstat(self.file).st_size

    def write(self, *records: dict[str, Any]) -> OSError | None:
        """Appends `records` in one piece: all are in the file or none. Returns why not, if this call tried and failed."""
        self.waiting.append(b"".join(json.dumps(r).encode() + b"\n" for r in records))
        while len(self.waiting) > KEPT:
            self.waiting.popleft()
            self.dropped += 1
        return self._send() if time.monotonic() >= self.retry_at else None

    def sync(self) -> OSError | None:
        """All records to the disk; returns why not, if that failed."""
        failed = self._send()
        if failed is None:
            try:
                self._follow()
                os.fsync(self.file)
            except OSError as error:
                failed = error
        return failed

    def close(self) -> None:
        """Writes what waits, if it can be written now, and closes the file."""
        self.sync()
        with contextlib.suppress(OSError):
            os.close(self.file)

    def _send(self) -> OSError | None:
        try:
            if self.retry_at:
                self._reopen()
            data = b"".join(self.waiting)
            size = len(data)
            while data:
                data = data[os.write(self.file, data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self.file, self.end)  # half a line
            self.retry_at = time.monotonic() + RETRY_SECONDS
            return error
        self.end += size
        self.retry_at = 0.0
        self.waiting.clear()
        return None

    def _follow(self) -> None:
        """All records in a new file, where the file was moved or removed."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self.file)):
                return
        records, before = os.pread(self.file, self.end, 0), self.file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()
        os.close(before)
        if not self.end:
            self.waiting.appendleft(records)
            self._send()

    def _reopen(self) -> None:
        """After a failure: the disk may have been mounted anew, or the file be another one."""
        end, before = self.end, self.file
        self._open()
        with contextlib.suppress(OSError):
            os.close(before)
        if self.end > end:
            os.ftruncate(self.file, end)
            self.end = end
