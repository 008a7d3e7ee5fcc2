"""Text to tokens on several processes: documents go out in tasks, their tokens come back in order."""

import collections
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any

import numpy as np

from nanojax.data import text
from nanojax.data.clean import clean, document_hash
from nanojax.data.kinds import Dropped
from nanojax.tokenizer import Tokenizer

TASK_CHARS = 1_000_000  # text of one task: ~0.1 s of tokenising, against ~2 ms of passing it between processes


@dataclasses.dataclass
class Encoded:
    """The result of one task: the tokens of its documents end to end; of each document the length, size and hash."""

    tokens: np.ndarray  # uint16 [sum of lengths]
    lengths: np.ndarray  # int64 [documents]
    sizes: np.ndarray  # int64 [documents], in UTF-8 bytes
    hashes: np.ndarray  # uint64 [documents]
    counts: dict[str, int]  # documents read, and those of text.Tally
    advice: str  # of the first oddity


_worker_tokenizer: Tokenizer | None = None


def _load_tokenizer(folder: str) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.load(folder)


def _start_worker(folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends its workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # a worker whose parent was killed would wait for work for ever
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _load_tokenizer(folder)


def encode(documents: list[str | Dropped]) -> Encoded:
    """Cleans and tokenises documents, in a worker of `open_pool`."""
    tokenizer = _worker_tokenizer
    assert tokenizer is not None
    tally = text.Tally()
    pieces: list[np.ndarray] = []  # begin token, document, begin token, document, ...
    sizes: list[int] = []
    hashes: list[int] = []
    bos = np.array([tokenizer.bos], np.uint16)
    for document in documents:
        for part in clean(document):
            tally.add(part)
            if isinstance(part, str):
                pieces += [bos, tokenizer.encode_numpy(part).astype(np.uint16)]
                sizes.append(len(part.encode()))
                hashes.append(document_hash(part))
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)
    lengths = np.array([1 + len(piece) for piece in pieces[1::2]], np.int64)
    counts = {"read": len(documents), **tally.counts}
    return Encoded(tokens, lengths, np.array(sizes, np.int64), np.array(hashes, np.uint64), counts, tally.advice)


@dataclasses.dataclass
class Task:
    """Some documents of one source. `fraction` of its file has been read after them; `last` says that none follow."""

    source: text.Source
    documents: list[str | Dropped]
    fraction: float
    last: bool


def tasks(source: text.Source, start: int, key: str) -> Iterator[Task]:
    """The source's documents from `start` on, in tasks of about TASK_CHARS characters; at least one task."""
    meter = text.Meter()
    task: list[str | Dropped] = []
    chars = 0
    for document in text.documents(source, start, key, meter):
        task.append(document)
        chars += len(document) if isinstance(document, str) else 1000
        if chars >= TASK_CHARS:
            yield Task(source, task, meter.fraction, last=False)
            task = []
            chars = 0
    yield Task(source, task, 1.0, last=True)


class _Inline(Executor):
    """One worker: does the work in this process, which saves starting another (1.5 s) and passing text to it."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def open_pool(workers: int, tokenizer_folder: str) -> Executor:
    """An executor of `encode` on that many processes."""
    if workers == 1:
        _load_tokenizer(tokenizer_folder)
        return _Inline()
    context = multiprocessing.get_context("spawn")  # fork would copy the locks of jax's and grain's threads
    return ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_folder,))


def results(
    pool: Executor, workers: int, left: list[tuple[text.Source, int]], key: str
) -> Iterator[tuple[Task, Encoded]]:
    """The tasks and their results in order, with at most three tasks per worker in flight.

    A file is read to its end before its first task, so that no part of a damaged one is used.
    """
    flying: collections.deque[tuple[Task, Future[Encoded]]] = collections.deque()
    for source, start in left:
        if not start:
            text.verify(source, key)
        for task in tasks(source, start, key):
            flying.append((task, pool.submit(encode, task.documents)))
            task.documents = []  # the worker has them now
            if len(flying) > 3 * workers:
                first, future = flying.popleft()
                yield first, future.result()
    for task, future in flying:
        yield task, future.result()
