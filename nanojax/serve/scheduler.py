"""Who is read and written next: a bounded queue before a fixed number of slots, one thread that works on the device.

Each turn of the thread reads one chunk of one prompt and then writes a token, or a few, of every row that is going. Prompts that
are being read take turns, so that a short one waits for no more than a chunk of each other one.
"""

import collections
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from nanojax.engine.choose import Choice
from nanojax.engine.generate import PATIENCE, Calculator
from nanojax.engine.slots import STEPS, Scores, Written

log = logging.getLogger("nanojax.serve")


class Tokens(NamedTuple):
    """Some more tokens of an answer; their scores, where wanted."""

    ids: list[int]
    scores: Scores | None


class Prompt(NamedTuple):
    """Scores of the prompt's tokens after the first, some at a time."""

    scores: Scores


class End(NamedTuple):
    """The last event of a job. reason: "stop", "length", "cancelled", "late" (never begun) or "failed"."""

    reason: str


Event = Tokens | Prompt | End


class Full(Exception):
    """The queue has no room; `seconds` is a guess at when it will."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class Closed(Exception):
    """The server is stopping, or its decoder has failed."""


@dataclasses.dataclass(eq=False)
class Job:
    """One answer: what is asked, and how far it is. `send` gets its events, in the scheduler's thread."""

    prompt: list[int]
    new: int  # tokens at most
    send: Callable[[Event], None]
    choice: Choice = Choice()
    seed: int = 0
    sample: int = 0
    scored: bool = False  # whether scores of its tokens are wanted
    prompt_scored: bool = False
    calculator: Calculator | None = None
    seconds: float = 600.0  # after which it ends, however far it is
    begun: float = dataclasses.field(default_factory=time.monotonic)
    first: float | None = None  # when its first token was written
    slot: int = -1
    read: int = 0  # tokens of the prompt that are in the slot's cache
    cached: int = 0  # of these, how many were there already
    written: int = 0
    counted: int = 0  # scores of its prompt that were handed on
    cancelled: str = ""  # why nobody waits for it any more

    @property
    def over(self) -> str:
        """Why it must end now; "" where it may go on."""
        late = time.monotonic() - self.begun > self.seconds
        return self.cancelled or (("length" if self.written else "late") if late else "")


class Engine(Protocol):
    """What a scheduler needs of nanojax.engine.slots.Slots."""

    count: int
    context: int

    def common(self, slot: int, prompt: Sequence[int]) -> int: ...
    def read(self, slot: int, prompt: Sequence[int], done: int, scored: bool = False) -> tuple[int, Scores | None]: ...
    def begin(
        self, slot: int, prompt: Sequence[int], new: int, choice: Choice, seed: int, sample: int = 0, scored: bool = False
    ) -> None: ...  # fmt: skip
    def force(self, slot: int, tokens: Sequence[int]) -> None: ...
    def end(self, slot: int) -> None: ...
    def step(self, limit: int = STEPS) -> Written: ...


class Watch(Protocol):
    """Who is told what was done (metrics.py)."""

    def read(self, tokens: int, cached: int) -> None: ...
    def wrote(self, tokens: int, seconds: float) -> None: ...
    def began(self, seconds: float) -> None: ...
    def ended(self, job: Job, reason: str) -> None: ...


class Scheduler:
    """Jobs, first come, first served. `ends` are the tokens that end a row; `queue` is how many jobs may wait."""

    def __init__(self, engine: Engine, ends: Sequence[int], queue: int, watch: Watch):
        self.engine, self.ends, self.queue, self.watch = engine, frozenset(ends), queue, watch
        self.waiting: collections.deque[Job] = collections.deque()
        self.reading: collections.deque[Job] = collections.deque()
        self.writing: dict[int, Job] = {}
        self.used = [0.0] * engine.count  # when each slot was last left
        self.limit = 1  # tokens that one call writes
        self.seconds = 1.0  # that a job takes, on average
        self.closed = self.failed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="decoder", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts the jobs of one request in the queue, all or none. Raises Full and Closed."""
        with self.changed:
            if self.closed:
                raise Closed
            if len(self.waiting) + len(jobs) > self.queue:
                turns = (len(self.waiting) + len(self.writing)) / self.engine.count
                raise Full(max(1, min(60, round(self.seconds * turns / 2))))
            self.waiting.extend(jobs)
            self.changed.notify()

    def cancel(self, jobs: Sequence[Job], reason: str = "cancelled") -> None:
        """Jobs that nobody waits for any more give up their places before the next turn."""
        with self.changed:
            for job in jobs:
                job.cancelled = reason
            self.changed.notify()

    def close(self) -> None:
        """No more jobs are taken, and those that are there are cancelled."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join()

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.reading or self.writing)

    def turn(self) -> None:
        """Frees, admits, reads a chunk, writes."""
        self._drop()
        self._admit()
        self._read()
        self._write()

    def _run(self) -> None:
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.closed or not self.idle)
                    if self.closed:
                        break
                self.turn()
        except Exception:
            log.exception("the decoder failed")
            self.failed = True
        with self.changed:
            self.closed = True
            left = [*self.waiting, *self.reading, *self.writing.values()]
        for job in left:
            self._end(job, "failed" if self.failed else "cancelled")

    def _drop(self) -> None:
        """Ends what nobody waits for, or what has taken too long."""
        with self.changed:
            gone = [job for job in self.waiting if job.over]
            self.waiting = collections.deque(job for job in self.waiting if job not in gone)
        for job in gone:
            self._end(job, job.over)
        for job in [*self.reading, *self.writing.values()]:
            if job.over:
                self._leave(job, job.over)

    def _admit(self) -> None:
        """Gives free slots to those who have waited longest."""
        while (free := self._free()) and (job := self._next()):
            # The cache of a conversation that goes on; else the one that was left first, of the first quarter if one is free
            # there: attention is computed up to the last row that is going.
            same = {slot: 0 if job.prompt_scored else self.engine.common(slot, job.prompt) for slot in free}
            worth = {slot: count if 2 * count >= len(job.prompt) else 0 for slot, count in same.items()}
            few = math.ceil(self.engine.count / 4)
            job.slot = max(free, key=lambda slot: (worth[slot], slot < few, -self.used[slot]))
            job.read = job.cached = same[job.slot]
            self.watch.read(len(job.prompt), job.cached)
            self.reading.append(job)

    def _free(self) -> list[int]:
        taken = {job.slot for job in self.reading} | self.writing.keys()
        return [slot for slot in range(self.engine.count) if slot not in taken]

    def _next(self) -> Job | None:
        with self.changed:
            return self.waiting.popleft() if self.waiting else None

    def _read(self) -> None:
        """One chunk of the prompt whose turn it is; those that are read whole begin to be written."""
        if not self.reading:
            return
        job = self.reading.popleft()
        if job.read < len(job.prompt) - 1:
            job.read, scores = self.engine.read(job.slot, job.prompt, job.read, job.prompt_scored)
            if scores is not None:
                job.send(Prompt(scores))
        if job.read < len(job.prompt) - 1:
            self.reading.append(job)
        elif job.new:
            self.engine.begin(job.slot, job.prompt, job.new, job.choice, job.seed, job.sample, job.scored)
            self.writing[job.slot] = job
        else:
            self._leave(job, "length")

    def _write(self) -> None:
        if not self.writing:
            return
        begin = time.monotonic()
        written = self.engine.step(1 if self.reading else self.limit)
        seconds = time.monotonic() - begin
        count = max(1, int((written.tokens >= 0).any(1).sum()))
        self.limit = max(1, min(STEPS, int(PATIENCE * count / max(seconds, 1e-6))))
        self.watch.wrote(int((written.tokens >= 0).sum()), seconds)
        for slot, job in list(self.writing.items()):
            self._deliver(job, written.tokens[:, slot], written.forced[:, slot], written, slot)

    def _deliver(self, job: Job, tokens: np.ndarray, forced: np.ndarray, written: Written, slot: int) -> None:
        ids = tokens[: int((tokens >= 0).sum())].tolist()
        if not ids:
            return
        if job.first is None:
            job.first = time.monotonic()
            self.watch.began(job.first - job.begun)
        job.written += len(ids)
        scores = Scores(*(a[: len(ids), slot] for a in written.scores)) if job.scored else None
        job.send(Tokens(ids, scores))
        if ids[-1] in self.ends:
            return self._leave(job, "stop")
        if job.written >= job.new:
            return self._leave(job, "length")
        for token, was_forced in zip(ids, forced.tolist()):
            answer = job.calculator.read(0, token) if job.calculator and not was_forced else None
            if answer is not None:
                self.engine.force(slot, answer)

    def _leave(self, job: Job, reason: str) -> None:
        """The job's slot is free, and its cache stays for the next turn of its conversation."""
        if self.writing.pop(job.slot, None) is not None:
            self.engine.end(job.slot)
        self.reading = collections.deque(other for other in self.reading if other is not job)
        self.used[job.slot] = time.monotonic()
        self.seconds += 0.1 * (time.monotonic() - job.begun - self.seconds)
        self._end(job, reason)

    def _end(self, job: Job, reason: str) -> None:
        self.watch.ended(job, reason)
        job.send(End(reason))


def usage(jobs: Sequence[Job], completion: int) -> dict[str, Any]:
    """What a request has used, in OpenAI's form."""
    prompt, cached = sum(len(job.prompt) for job in jobs), sum(job.cached for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
