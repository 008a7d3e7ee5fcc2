"""The processes of one run once they have met: what process 0 tells the others, and how all end when one is gone.

Process 0 leads: it alone has the run folder, and says before each thing that devices of all processes do what it is. The others
follow (nanojax/follow.py). The computation and its exchanges are jax's own multi-controller runtime; this connection carries
a line per step. It also notices at once that a process has ended, because the kernel closes it: jax.distributed takes 100 s,
and then ends the others with dumps of their stacks.
"""

import contextlib
import ctypes
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from nanojax import config as configs
from nanojax import config_rules, xla
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.run import exits, guard, meeting, output
from nanojax.run.exits import Diverged, Failed
from nanojax.run.meeting import Place, Wire
from nanojax.run.metrics import Metrics
from nanojax.run.watch import Watch
from nanojax.step import State, devices

GRACE = 10.0  # seconds that the main thread has to end by itself after another process did; it may wait for that one forever
LEAVE_SECONDS = 5.0  # that process 0 waits for the others at the end: they would find jax's coordinator gone
ABORT_SECONDS = 2.0  # after jax has ended the process, to learn that another one is gone


class Group:
    """This process among the others, `number` of `count`. Threads read the connections.

    `ended` is how another process has ended: a text and an exit code; None while all are there.
    """

    def __init__(self, where: Place, wires: dict[int, Wire], stop: threading.Event):
        self.number, self.count, self.wires, self.stop = where.number, where.processes, wires, stop
        self.ended: tuple[str, int] | None = None
        self.code = exits.FAILED_UNSAVED
        self.left = threading.Event()
        self.inbox: dict[int, queue.Queue[list[Any] | None]] = {i: queue.Queue() for i in wires}
        self.threads = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in wires.items()]
        for thread in self.threads:
            thread.start()

    # -- process 0 ----------------------------------------------------------------------------------------------------

    def order(self, what: str, *more: Any) -> None:
        """Tells all others what comes next, which the caller then does, too. Failed once one of them has ended."""
        self.check()
        for wire in self.wires.values():
            wire.send(what, *more)

    def check(self) -> None:
        """Failed once another process has ended."""
        if self.ended:
            raise Failed(*self.ended)

    def gathered(self, config: Config, state: State) -> State:
        """The plain state, of which all have parts."""
        self.order("gather")
        return devices.plain(config, state)

    def attempt(self, log: Metrics, about: str, work: Callable[..., None], *arguments: Any) -> None:
        """guard.attempt of what all do together, so that an error in one of them ends the run."""
        self.order(about)
        try:
            work(*arguments)
        except guard.AskedToStop:
            log.say(f"step {log.step} · {about} left out: asked to stop")
        except Exception as error:
            raise Failed(f"{about} failed ({guard.reason(error)})", exits.FAILED_UNSAVED) from error

    def cuts_off(self, error: BaseException) -> bool:
        """Whether `error` leaves the state in pieces: another process has ended, or a step failed here, which they wait in."""
        return self.ended is not None or isinstance(error, jax.errors.JaxRuntimeError | Failed)

    def reason(self, error: BaseException) -> BaseException:
        """How another process has ended, where `error` comes of that: an exchange may fail a moment before it is known."""
        if isinstance(error, jax.errors.JaxRuntimeError):
            self._listen(ABORT_SECONDS)
        return Failed(*self.ended) if self.ended else error

    # -- the others ---------------------------------------------------------------------------------------------------

    def next(self) -> list[Any]:
        """What process 0 says next; ["end", code] is its last. Failed if it has failed. Passes on that a signal came."""
        told = False
        while True:
            if self.stop.is_set() and not told:
                self.wires[0].send("stop")
                told = True
            with contextlib.suppress(queue.Empty):
                return self._got(self.inbox[0].get(timeout=0.1))

    # -- all ----------------------------------------------------------------------------------------------------------

    def shared(self, value: Any) -> Any:
        """Process 0's value, which JSON can carry, in all processes."""
        if self.number == 0:
            self.order("value", value)
            return value
        return self.next()[1]

    def chosen(self, config: Config) -> Config:
        """Process 0's config, with the paths of this machine."""
        table = self.shared(configs.to_dict(config))
        own = {name: configs.keys(config)[name].value for name in configs.paths()}
        return config_rules.resolve(configs.override(config_rules.from_dict(table), own)) if self.number else config

    def alive(self, watch: Watch) -> None:
        """guard.alive within what all do together: process 0 says whether a signal ends it."""
        watch.beat()
        if self.shared(self.stop.is_set()):
            raise guard.AskedToStop

    def same(self, what: str, value: Any) -> None:
        """UserError, in all processes, where `value` is not the same as in process 0."""
        if self.number:
            self.wires[0].send("value", value)
            self.next()
            return
        for i, wire in self.wires.items():
            meeting.compare(i, wire.host, {what: value}, {what: self._got(self.inbox[i].get())[1]})
        self.order("same")

    def meet(self) -> None:
        """Until all are here: an exchange between CPUs fails when one of them waits for 30 s."""
        self.same("", None)

    def ends(self, code: int) -> int:
        """Remembers the exit code of this process, which the others will hear."""
        self.code = code
        return code

    def leave(self, text: str = "") -> None:
        """Tells the others how this process ends. Process 0 waits until they are gone."""
        self.left.set()
        for wire in self.wires.values():
            wire.send("end", self.code, text)
        if self.number == 0:
            self._listen(LEAVE_SECONDS)

    def last(self) -> None:
        """Ends this process with a line on how another one did, if one has; the thread may be any."""
        if self.ended and not self.left.is_set():
            text, self.code = self.ended
            if text:
                output.last_words(f"error: {text}")
            for wire in self.wires.values():
                wire.send("end", self.code, text)
            os._exit(self.code)

    def _listen(self, seconds: float) -> None:
        """Until all connections have ended, but not longer."""
        for thread in self.threads:
            thread.join(seconds / len(self.threads))

    def _got(self, message: list[Any] | None) -> list[Any]:
        if message is None:
            assert self.ended
            if self.ended[0]:
                raise Failed(*self.ended)
            return ["end", self.ended[1]]
        return message

    def _read(self, i: int, wire: Wire) -> None:
        """The thread of one connection."""
        named = f"process {i} on {wire.host}"
        ended = f"{named} is gone; start all again", exits.FAILED_UNSAVED
        while (message := wire.receive()) is not None:
            if message[0] == "stop":
                self.stop.set()
            elif message[0] == "end":
                ended = f"{named}: {message[2]}" if message[2] else "", message[1]
                break
            else:
                self.inbox[i].put(message)
        if self.left.is_set():
            return
        self.ended = self.ended or ended
        for box in self.inbox.values():
            box.put(None)
        if not self.left.wait(GRACE):
            self.last()


@contextlib.contextmanager
def joined(config: Config, by_hand: frozenset[str], stop: threading.Event) -> Iterator[tuple[Config, Group | None]]:
    """Meets the other processes and starts jax.distributed; at the end of the block they are told how it ended.

    Yields process 0's config with the number of processes, and no group if there is only one. Raises UserError, in all processes,
    when one does not come or is not like the others.

    Args:
      by_hand: the keys of the command line.
    """
    if not config.parallel.coordinator:
        if config.parallel.processes > 1:
            raise UserError(f"--parallel.processes={config.parallel.processes}: set --parallel.coordinator, too")
        yield config, None
        return
    where = meeting.place(config)
    own = {"parallel.coordinator": "", "parallel.process": 0, "parallel.processes": where.processes}
    plain = configs.override(config, own)
    if where.processes == 1:
        yield plain, None
        return
    wires, port = meeting.met(where, meeting.facts(config, by_hand), config.parallel.wait)
    xla.autotune_alone()
    with output.of_libraries() as said:
        group = Group(where, wires, stop)
        with _ended_by_jax(group, said):
            jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
            jax.config.update("jax_check_proxy_envs", False)  # the coordinator is reached without one, as it just was
            os.environ["no_grpc_proxy"] = where.host  # noqa: SIM112
            jax.distributed.initialize(
                where._replace(port=port).address, where.processes, where.number, where.devices,
                cluster_detection_method="deactivate", initialization_timeout=60,
            )  # fmt: skip
            try:
                yield group.chosen(plain), group
            except BaseException as error:
                error = group.reason(error)
                group.code = code_of(error)
                group.leave(str(error) if isinstance(error, Diverged) else guard.reason(error))
                if group.number and isinstance(error, UserError):
                    raise UserError(f"process {group.number}: {error}") from None
                raise error
            group.leave()


def code_of(error: BaseException) -> int:
    """The exit code of a process that ends by `error`."""
    if isinstance(error, Failed):
        return error.code
    if guard.is_out_of_memory(error):
        return exits.MISTAKE
    known = {Diverged: exits.DIVERGED, UserError: exits.MISTAKE, OSError: exits.MISTAKE}
    return next((code for kind, code in known.items() if isinstance(error, kind)), exits.FAILED_UNSAVED)


@contextlib.contextmanager
def _ended_by_jax(group: Group, said: int) -> Iterator[None]:
    """jax.distributed aborts the process when it finds another one gone: that is told in one line, with our exit code.

    Args:
      said: a descriptor that reads what libraries wrote; it is shown if the abort has another reason.
    """

    def on_abort(_: int) -> None:  # in the thread that aborts, which is not in the middle of anything
        group._listen(ABORT_SECONDS)
        text = os.pread(said, 1 << 20, 0).decode("utf-8", "replace")
        if not group.ended and "JAX distributed service detected" in text:
            # One that hangs: its connection is still there.
            why = text.rpartition("absl::Status: ")[2].partition("\n")[0]
            told = f"another process does not answer jax.distributed ({why}); start all again"
            group.ended = told, exits.FAILED_UNSAVED
        group.last()
        output.last_words(text)
        os._exit(128 + signal.SIGABRT)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)  # Python's own would wait for the main thread
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    before = libc.signal(int(signal.SIGABRT), handler)
    try:
        yield
    finally:
        libc.signal(int(signal.SIGABRT), ctypes.c_void_p(before))
