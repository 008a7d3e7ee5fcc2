"""Chooses what the compiler cannot, by asking a process that may crash: allocator, row kernels, attention, fused products.

A choice that is wrong, slower or does not run is replaced by plain XLA's form, and a line says why. Nothing here can stop a
run: whatever goes wrong is a reason for the plain form.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from nanojax import config as configs
from nanojax import xla
from nanojax.card.questions import PLAIN, Answer
from nanojax.config import Config
from nanojax.plan import compile

FAST = {"rows": "pallas", "attention": "cudnn", "fused": "on"}
MARGIN = 1.02  # what is slower by less than that is as fast
SECONDS, IN_ALL = 300.0, 900.0  # for one answer, and for all; compiling two layers with autotuning takes tens
COMMAND = (sys.executable, "-m", "nanojax.card.questions")

Ask = Callable[[str, str], Answer]  # (question, allocator)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a trial chose, the lines that say so, and the answers it had."""

    choices: dict[str, str]  # of compute: rows, attention, fused
    allocator: str = "default"
    lines: tuple[str, ...] = ()
    answers: tuple[Answer, ...] = ()

    @property
    def lasting(self) -> bool:
        """Whether the next run may rely on it: nothing failed for want of memory, which other programs may have held."""
        memory = any(answer.ok for answer in self.answers if answer.question == "memory")
        others = [answer for answer in self.answers if answer.question != "memory"]
        short = any(not a.ok and (a.question == "plain" or "RESOURCE_EXHAUSTED" in a.why) for a in others)
        return memory and not short


def choose(config: Config, ask: Ask, allocators: Sequence[str], known: Found | None = None) -> Found:
    """The fastest choices that are right on this card, and an allocator that has the planned memory now.

    Args:
      config: a key of compute that is not auto was set by hand and stays.
      allocators: to be tried in this order until one gives the planned memory.
      known: what an earlier trial found; only the memory is asked for again.
    """
    trial = _Trial(config, ask)
    allocator = trial.allocator(allocators)
    if known is not None:
        others = [line for line in known.lines if not line.startswith("allocator ")]
        answers = (*known.answers, *trial.answers)
        return dataclasses.replace(known, allocator=allocator, lines=(*trial.lines, *others), answers=answers)
    chosen = trial.choices()
    return Found(chosen, allocator, tuple(trial.lines), tuple(trial.answers))


class _Trial:
    def __init__(self, config: Config, ask: Ask):
        self.ask_process = ask
        self.now = {key: getattr(config.compute, key) for key in FAST}
        flash = compile.flash(config)
        self.fast = {**FAST, "attention": FAST["attention"] if flash else PLAIN["attention"]}
        self.used = "default"
        self.lines: list[str] = []
        self.answers: list[Answer] = []

    def ask(self, question: str) -> Answer:
        answer = self.ask_process(question, self.used)
        self.answers.append(answer)
        return answer

    def allocator(self, allowed: Sequence[str]) -> str:
        """The first that gives the planned memory; the first of all where none does."""
        whys = []
        for self.used in allowed:
            answer = self.ask("memory")
            if answer.ok:
                if whys:
                    self.lines.append(f"allocator {self.used} instead of {allowed[0]}: {whys[0]}")
                return self.used
            whys.append(f"the planned memory could not be allocated ({answer.why})")
        self.used = allowed[0]
        self.lines.append(f"allocator {self.used}: {whys[0]}, nor by another one; fewer residuals may be needed")
        return self.used

    def choices(self) -> dict[str, str]:
        plain = self.ask("plain")
        wanted = {key: value if value != "auto" else self.fast[key] for key, value in self.now.items()}
        if not plain.ok:
            self.lines.append(
                f"the kernels could not be tried ({plain.why}); plain XLA is used where it is not set by hand"
            )
            return {key: PLAIN[key] if self.free(key) else wanted[key] for key in wanted}
        timed: dict[str, float] = {}
        for key, value in wanted.items():
            if value != PLAIN[key]:
                answer = self.ask(f"{key}={value}")
                wanted[key] = self.judged(key, value, answer, plain)
                if answer.seconds and wanted[key] == value:
                    timed[key] = answer.seconds
        return self.together(wanted, plain, timed)

    def free(self, key: str) -> bool:
        """Whether the trial may replace this choice."""
        return self.now[key] == "auto"

    def judged(self, key: str, value: str, answer: Answer, plain: Answer) -> str:
        """The choice after its answer."""
        other = PLAIN[key]
        if not answer.ok and not self.free(key):
            self.lines.append(f"warning: compute.{key}={value}, set by hand, fails here: {answer.why}")
        elif not answer.ok:
            self.lines.append(f"compute.{key}={other} instead of {value}: {answer.why}")
            return other
        elif self.free(key) and _slower(answer, plain):
            assert answer.seconds and plain.seconds
            more = answer.seconds / plain.seconds - 1
            self.lines.append(f"compute.{key}={other} instead of {value}: {value} is {more:.0%} slower here")
            return other
        return value

    def together(self, wanted: dict[str, str], plain: Answer, timed: dict[str, float]) -> dict[str, str]:
        """All choices at once, if they are right and as fast as the best one alone; otherwise that one."""
        own = [key for key in timed if self.free(key)]
        if len(timed) < 2:
            return wanted
        answer = self.ask("+".join(f"{key}={wanted[key]}" for key in timed))
        best = min(timed, key=lambda key: timed[key])
        if answer.ok and (answer.seconds or 0) <= MARGIN * timed[best]:
            faster = (plain.seconds or 0) / max(answer.seconds or 0, 1e-9)
            self.lines.append(f"kernels are right on this card: two layers run {faster:.2f} times as fast as plain XLA")
            return wanted
        why = answer.why if not answer.ok else "together they are slower than the fastest of them alone"
        dropped = [key for key in own if key != best]
        names = ", ".join(f"compute.{key}={PLAIN[key]} instead of {wanted[key]}" for key in dropped)
        if names:
            self.lines.append(f"{names}: {why}")
        return wanted | {key: PLAIN[key] for key in dropped}


def _slower(answer: Answer, plain: Answer) -> bool:
    return bool(answer.seconds and plain.seconds and answer.seconds > MARGIN * plain.seconds)


# -- the process -------------------------------------------------------------------------------------------------------


class _Process(NamedTuple):
    child: subprocess.Popen[bytes]
    allocator: str
    errors: Any  # file with its stderr


@contextlib.contextmanager
def asking(config: Config, command: Sequence[str] = COMMAND, seconds: float = SECONDS) -> Iterator[Ask]:
    """`Ask` of a child process, which is started again after a failure; a crash, a kill or a hang is an answer, too."""
    running: list[_Process] = []
    end = time.monotonic() + IN_ALL

    def ask(question: str, allocator: str) -> Answer:
        if running and running[0].allocator != allocator:
            _end(running.pop())
        try:
            if not running:
                running.append(_begin(command, allocator))
                _send(running[0], json.dumps(configs.to_dict(config)))
            answer = _answer(running[0], question, min(seconds, end - time.monotonic()))
        except Exception as error:  # no process, no pipe, an answer that is none
            answer = Answer(question, False, _why(running, error))
        if not answer.ok and running:
            _end(running.pop())
        return answer

    try:
        yield ask
    finally:
        while running:
            _end(running.pop())


def _begin(command: Sequence[str], allocator: str) -> _Process:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
    if allocator != "default":
        environment |= {xla.ALLOCATOR: allocator, "JAX_PJRT_CLIENT_CREATE_OPTIONS": f"allocator:{allocator}"}
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms:  # which the kernels are compared with
        environment["JAX_PLATFORMS"] = f"{platforms},cpu"
    pipe, errors = subprocess.PIPE, tempfile.TemporaryFile()  # noqa: SIM115  closed by _end
    try:
        child = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=errors)
    except BaseException:
        errors.close()
        raise
    return _Process(child, allocator, errors)


def _send(process: _Process, line: str) -> None:
    assert process.child.stdin
    process.child.stdin.write(f"{line}\n".encode())
    process.child.stdin.flush()


def _answer(process: _Process, question: str, seconds: float) -> Answer:
    """The child's answer. TimeoutError after `seconds`, EOFError if it ends instead, ValueError for what is no answer."""
    _send(process, question)
    stdout, end, got = process.child.stdout, time.monotonic() + seconds, b""
    assert stdout
    with selectors.DefaultSelector() as ready:
        ready.register(stdout, selectors.EVENT_READ)
        while not got.endswith(b"\n"):
            if not ready.select(max(0.0, end - time.monotonic())):
                raise TimeoutError(f"no answer for {max(0.0, seconds):.0f} s")
            more = os.read(stdout.fileno(), 1 << 16)
            if not more:
                raise EOFError
            got += more
    answer = Answer(**json.loads(got))
    if answer.question != question or not isinstance(answer.ok, bool):
        raise ValueError("an answer to another question")
    return answer


def _why(running: list[_Process], error: Exception) -> str:
    """One line on a process that gave no answer: how it ended, and the last thing it said."""
    if isinstance(error, TimeoutError) or not running:
        return str(error) or type(error).__name__
    child, _, errors = running[0]
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5)
    code = child.poll()
    how = "gave no answer" if code is None else f"ended with code {code}"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            how = f"was killed by {signal.Signals(-code).name}"
    errors.seek(0)
    said = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return f"its process {how}{f': {said[-1].strip()[:160]}' if said else ''}"


def _end(process: _Process) -> None:
    with contextlib.suppress(OSError):
        process.child.kill()
    process.child.wait()
    for pipe in (process.child.stdin, process.child.stdout, process.errors):
        with contextlib.suppress(OSError, ValueError):
            pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
