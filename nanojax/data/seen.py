"""A growing set of 64-bit document hashes in flat memory: 8 bytes a document, so 100 million take 0.8 GB."""

import numpy as np


class Seen:
    """Sorted runs, merged when the newer has grown to half the older: every hash is copied O(log n) times in all."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(len(run) for run in self.runs)

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """bool [n]: which of the uint64 hashes [n] are in the set."""
        found = np.zeros(len(hashes), bool)
        for run in self.runs:
            at = np.searchsorted(run, hashes)
            found |= run[np.minimum(at, len(run) - 1)] == hashes
        return found

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Adds the hashes; bool [n]: those that were not there before (of equal ones among them, the first)."""
        first = np.zeros(len(hashes), bool)
        first[np.unique(hashes, return_index=True)[1]] = True
        first &= ~self.contains(hashes)
        new = np.sort(hashes[first])
        while len(new) and self.runs and len(self.runs[-1]) < 2 * len(new):
            new = np.sort(np.concatenate([self.runs.pop(), new]), kind="stable")
        if len(new):
            self.runs.append(new)
        return first
