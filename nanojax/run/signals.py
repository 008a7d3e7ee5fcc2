"""SIGTERM and Ctrl-C: finish the step and save."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def stop_requests() -> Iterator[tuple[threading.Event, threading.Event]]:
    """(stop, in_loop). Once in_loop is set, SIGTERM or SIGINT sets stop, and a SIGINT after that exits at once.

    Before, nothing is worth saving and a signal exits at once, with 0. A thread reads the signals from Python's wake-up
    pipe, because handlers wait for the main thread, which may be inside a compilation of minutes.
    """
    stop, in_loop = threading.Event(), threading.Event()
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        while (byte := os.read(read, 1)) and byte[0]:
            if stop.is_set() and byte[0] == signal.SIGINT:
                os._exit(130)
            if not in_loop.is_set():
                os._exit(0)
            stop.set()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    earlier_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    earlier = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop, in_loop
    finally:
        signal.set_wakeup_fd(earlier_fd)
        for s, handler in earlier.items():
            signal.signal(s, handler)
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)
