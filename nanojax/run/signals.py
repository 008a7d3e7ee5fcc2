"""SIGTERM, SIGHUP and Ctrl-C: finish the step and save; before the first step, say that nothing was saved."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from nanojax.run import exits
from nanojax.run.output import last_words

STARTING = "stopped while starting: no step was done and nothing was saved; the same command starts again"
AT_ONCE = "stopped at once by a second Ctrl-C: the steps since the last checkpoint are not saved"


@contextlib.contextmanager
def stop_requests() -> Iterator[tuple[threading.Event, threading.Event]]:
    """(stop, in_loop). Once in_loop is set, SIGTERM, SIGHUP or SIGINT sets stop; a SIGINT after that exits at once.

    Before, there is nothing to save, and a signal exits at once, with STOPPED_UNSAVED. A SIGHUP that the process was
    started to ignore (nohup) stays ignored. A thread reads the signals from Python's wake-up pipe, because handlers wait
    for the main thread, which may be inside a compilation of minutes.
    """
    stop, in_loop = threading.Event(), threading.Event()
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        while (byte := os.read(read, 1)) and byte[0]:
            if stop.is_set() and byte[0] == signal.SIGINT:
                last_words(AT_ONCE)
                os._exit(exits.SECOND_INTERRUPT)
            if not in_loop.is_set():
                last_words(STARTING)
                os._exit(exits.STOPPED_UNSAVED)
            stop.set()

    thread = threading.Thread(target=watch, daemon=True, name="signals")
    thread.start()
    earlier_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    wanted = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        wanted.append(signal.SIGHUP)
    earlier = {s: signal.signal(s, lambda *_: None) for s in wanted}
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
