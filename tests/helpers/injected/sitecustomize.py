"""Python imports this first where its folder is on PYTHONPATH: faults that only the process itself can cause, on order.

An order is a file in the folder $ORDERS, named after a function below, with its argument. It is removed once obeyed.
"""

import contextlib
import os
import threading
import time
from pathlib import Path


def clock(seconds: str) -> None:
    """The clock jumps, again each time."""
    before, offset = time.time, float(seconds)
    time.time = lambda: before() + offset


def stdout(_: str) -> None:
    """stdout becomes a pipe that nobody reads."""
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(read)
    os.close(write)


def tensorboard(_: str) -> None:
    """TensorBoard's file takes nothing more."""
    full = os.open("/dev/full", os.O_WRONLY)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "tfevents" in os.readlink(f"/proc/self/fd/{name}"):
                os.dup2(full, int(name))
    os.close(full)


def obey(orders: Path) -> None:
    """The thread."""
    while True:
        for order in (clock, stdout, tensorboard):
            with contextlib.suppress(FileNotFoundError):
                argument = (orders / order.__name__).read_text()
                order(argument)
                (orders / order.__name__).unlink()
        time.sleep(0.02)


if "ORDERS" in os.environ:
    (Path(os.environ["ORDERS"]) / "pid").write_text(str(os.getpid()))
    threading.Thread(target=obey, args=(Path(os.environ["ORDERS"]),), daemon=True).start()
