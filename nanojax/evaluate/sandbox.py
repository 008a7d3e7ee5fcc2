"""Runs Python that a model wrote, in a process that can do little harm, and says how it ended.

The program gets an empty folder, no input, and limits on time, memory, output, files and processes. Where the kernel allows
it, it has no network, sees and signals no process but its own, and opens files only in its folder and, to read, in Python's
(sandboxed.py); `Result.missing` names what the kernel refused. This contains the mistakes of a program, not an attacker who
knows a hole in the kernel.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, NamedTuple

Outcome = Literal["finished", "failed", "time", "output", "killed"]
CHILD = Path(__file__).with_name("sandboxed.py")


class Result(NamedTuple):
    """How a program ended.

    outcome: finished = it ran to its end; failed = an exception, or an exit before its end; time, output = it was stopped at
    that limit; killed = by a signal. reason: one line. output: what it printed, cut. missing: protections that are not there.
    """

    outcome: Outcome
    reason: str
    output: str
    seconds: float
    missing: tuple[str, ...]


def run(program: str, seconds: float = 5.0, memory: int = 1 << 30, output: int = 1 << 16) -> Result:
    """Runs `program`; returns at most about a tenth of a second after `seconds`, with all that it started ended.

    Args:
      memory: bytes of address space of each process.
      output: bytes that it may print.
    """
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        told, tell = os.pipe()
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", str(CHILD), folder, str(tell), str(memory), str(int(seconds) + 1)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={"PATH": os.defpath, "PYTHONHASHSEED": "0"},
                pass_fds=[tell],
                start_new_session=True,
            )
        except BaseException:
            os.close(told)
            raise
        finally:
            os.close(tell)
        begin = time.monotonic()
        try:
            stopped, printed = _watch(child, program.encode(errors="replace"), begin + seconds, output)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # the program dies with it (sandboxed.py)
            child.wait()
            assert child.stdout
            child.stdout.close()
        with os.fdopen(told, "rb") as file:
            said = _said(file.read(1 << 16))
        took = time.monotonic() - begin
    return _result(stopped, said, printed.decode(errors="replace"), took, seconds, output)


def _watch(child: subprocess.Popen, program: bytes, deadline: float, most: int) -> tuple[Outcome | None, bytes]:
    """(the limit that it met, what it printed up to there) once it ended or met one."""
    assert child.stdin and child.stdout
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(program)
        child.stdin.close()
    printed = b""
    with selectors.DefaultSelector() as ready:
        ready.register(child.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not ready.select(left):
                continue
            piece = os.read(child.stdout.fileno(), 1 << 16)
            printed += piece
            if len(printed) > most:
                return "output", printed[:most]
            if not piece:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.0, deadline - time.monotonic()))
                    return None, printed
    return "time", printed


def _said(line: bytes) -> dict:
    """What the child reported; nothing where it was stopped before."""
    with contextlib.suppress(ValueError):
        said = json.loads(line)
        return said if isinstance(said, dict) else {}
    return {}


def _result(stopped: Outcome | None, said: dict, printed: str, took: float, seconds: float, most: int) -> Result:
    missing = tuple(said.get("missing", ()))
    if stopped == "time":
        return Result("time", f"stopped after {seconds:g} s", printed, took, missing)
    if stopped == "output":
        return Result("output", f"stopped after {most} bytes of output", printed, took, missing)
    if "signal" in said or not said:
        by = signal.Signals(said["signal"]).name if "signal" in said else "a signal"
        return Result("killed", f"killed by {by}", printed, took, missing)
    return Result("finished" if said["finished"] else "failed", said["reason"], printed, took, missing)
