"""Which conversations fill which row of one pass: whole ones, best fit, padded.

Conversations come in the order of the mixture's permutation into a buffer of BUFFER. A row takes the longest of the buffer that
still fits, until none does; the rest of the row is padding. One that is longer than a row is cut on the right to a row's length
before it comes into the buffer. One without a supervised token in that length is left out. So every row has supervised tokens.
Rows are then shuffled: best fit takes long conversations early, and what is left of the buffer at the end is all short.
"""

import bisect
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np

from nanojax.tasks.prepared import Conversations

BUFFER = 1000  # nanochat's is 100; a larger one leaves less padding


class Plan(NamedTuple):
    """Row r has the conversations numbers[first[r]:first[r+1]]."""

    first: np.ndarray  # int64 [rows + 1]
    numbers: np.ndarray  # int64 [conversations]
    cut: int  # conversations that are cut to a row's length
    left_out: int  # conversations without a supervised token in that length

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.first) - 1


def plan_pass(of: Conversations, row: int, seed: int) -> Plan:
    """The rows of `row` tokens of one pass over the mixture, each conversation once for each of its repeats."""
    lengths = np.diff(of.ends, prepend=0)
    supervised = _first_supervised(of) < np.minimum(lengths, row)
    once = np.split(np.arange(len(of)), np.cumsum(of.counts)[:-1])
    order = shuffled(np.concatenate([np.tile(part, times) for part, times in zip(once, of.repeats)]), seed)
    chosen = order[supervised[order]]
    cut = int((lengths[chosen] > row).sum())
    pieces = zip(np.minimum(lengths[chosen], row).tolist(), chosen.tolist())
    rows = list(_best_fit(pieces, row))
    rows = [rows[i] for i in shuffled(np.arange(len(rows)), seed)]
    first = np.cumsum([0, *map(len, rows)])
    numbers = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
    return Plan(first, numbers, cut, len(order) - len(chosen))


def shuffled(values: np.ndarray, seed: int) -> np.ndarray:
    """The values in a pseudo-random order that is the same on every machine and version."""
    if len(values) < 2:
        return values
    shuffle = grain.experimental.index_shuffle
    return values[[shuffle(i, max_index=len(values) - 1, seed=seed, rounds=4) for i in range(len(values))]]


def _first_supervised(of: Conversations) -> np.ndarray:
    """int64: how many tokens of each conversation come before its first supervised one; all where there is none."""
    begins = np.concatenate([[0], of.ends[:-1]])
    places = np.append(np.flatnonzero(of.mask), len(of.mask))
    return places[np.searchsorted(places, begins)] - begins


def _best_fit(pieces: Iterator[tuple[int, int]], row: int) -> Iterator[list[int]]:
    """The numbers of each row's members, from (length, number) pairs of at most `row`."""
    waiting = sorted(itertools.islice(pieces, BUFFER))
    while waiting:
        members, room = [], row
        while fitting := bisect.bisect_right(waiting, (room, np.inf)):
            length, number = waiting.pop(fitting - 1)
            members.append(number)
            room -= length
            for piece in itertools.islice(pieces, 1):
                bisect.insort(waiting, piece)
        yield members
