"""The scheduler, turn by turn without a thread: who waits for whom, who is refused, and what leaves nothing behind."""

from collections.abc import Sequence
from typing import Any

import pytest
from helpers.serving import ENDS, Scripted

from nanojax.serve.metrics import Metrics
from nanojax.serve.scheduler import Closed, End, Event, Full, Job, Scheduler, Tokens


def made(count: int = 4, queue: int = 8, answer: Sequence[int] = (65,) * 50) -> Scheduler:
    return Scheduler(Scripted(lambda prompt: answer, count), ENDS, queue, Metrics())


def job(length: int, new: int = 5, **options: Any) -> tuple[Job, list[Event]]:
    events: list[Event] = []
    return Job([1] * length, new, events.append, **options), events


def test_a_short_prompt_waits_for_few_chunks_of_a_long_one() -> None:
    """While 1,500 tokens are read, a prompt of 20 has its first token after at most 3 chunks, counted, and so have four of
    them after at most 6; a row that is being written gets a token after every chunk."""
    chunks: list[int] = []
    scheduler = made(count=8)
    read = scheduler.engine.read
    scheduler.engine.read = lambda slot, prompt, done, scored=False: (
        chunks.append(len(prompt))
        or read(  # type: ignore
            slot, prompt, done, scored
        )
    )
    writing, written = job(2, 50)
    scheduler.submit([writing])
    scheduler.turn()
    long, _ = job(1500)
    scheduler.submit([long])
    scheduler.turn()
    for others in (1, 4):
        shorts = [job(20, 1) for _ in range(others)]
        before, tokens = len(chunks), len(written)
        scheduler.submit([short for short, _ in shorts])
        while not all(events for _, events in shorts):
            scheduler.turn()
        assert len(chunks) - before <= (3 if others == 1 else 6)
        assert len(written) - tokens >= len(chunks) - before
    assert long.first is None


def test_first_come_first_served_and_the_rest_is_refused() -> None:
    """Two rows, eight places: the eleventh job is refused with seconds to wait, all or none of a request's; those that wait
    begin in their order, and all end."""
    scheduler = made(count=2)
    jobs = [job(4, 3) for _ in range(8)]
    scheduler.submit([j for j, _ in jobs[:6]])
    with pytest.raises(Full) as full:
        scheduler.submit([j for j, _ in jobs[5:]])
    assert 1 <= full.value.seconds <= 60
    scheduler.submit([j for j, _ in jobs[6:]])
    order: list[int] = []
    while not scheduler.idle:
        scheduler.turn()
        order += [i for i, (j, _) in enumerate(jobs) if j.written and i not in order]
    assert order == list(range(8))
    assert all(events[-1] == End("length") for _, events in jobs)
    assert all(sum(len(e.ids) for e in events if isinstance(e, Tokens)) == 3 for _, events in jobs)


def test_who_leaves_gives_up_the_place() -> None:
    """Cancelled in the queue, while read and while written; too late in the queue and midway: each gets one last event, and
    the rows are free for others."""
    scheduler = made(count=2)
    reading, writing = job(1500), job(2, 50)
    scheduler.submit([reading[0], writing[0]])
    scheduler.turn()
    scheduler.turn()
    waiting, late = job(3), job(3, seconds=0.0)
    scheduler.submit([waiting[0], late[0]])
    scheduler.cancel([reading[0], waiting[0]])
    writing[0].seconds = 0.0
    scheduler.turn()
    assert scheduler.idle
    assert [events[-1] for _, events in (reading, writing, waiting, late)] == [
        End("cancelled"), End("length"), End("cancelled"), End("late"),
    ]  # fmt: skip
    after, events = job(3, 2)
    scheduler.submit([after])
    while not scheduler.idle:
        scheduler.turn()
    assert events[-1] == End("length")


def test_a_decoder_that_fails_tells_everybody() -> None:
    """An exception on the device ends every job as failed, those in the queue too; later ones are refused."""
    scheduler = made(count=1)

    def step(limit: int = 1) -> Any:
        raise RuntimeError("out of memory")

    scheduler.engine.step = step  # type: ignore
    jobs = [job(3) for _ in range(3)]
    scheduler.submit([j for j, _ in jobs])
    scheduler.start()
    scheduler.thread.join(10)
    assert scheduler.failed and all(events[-1] == End("failed") for _, events in jobs)
    with pytest.raises(Closed):
        scheduler.submit([job(3)[0]])
