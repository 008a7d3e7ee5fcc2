"""Batches of packed rows over all shards, shuffled by grain; the position is saved and restored in O(1)."""

import bisect
import dataclasses
import functools
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, Self, SupportsIndex, TypeVar

import grain
import numpy as np

from nanojax import cli
from nanojax.cli import UserError
from nanojax.data.packing import Plan, has_plan, packed_rows, read_row, shard_plan
from nanojax.data.shards import Shard, find_shards
from nanojax.tokenizer import Tokenizer

OPEN_SHARDS = 128  # memory-mapped at one time, two files each: well under the usual limit of 1,024 open files
ANNOUNCE_TOKENS = 500_000_000  # fewer are planned and verified within seconds, at ~200 M tokens per second
FOREVER = 1 << 60  # rows; grain wants a length, and training ends long before


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass over a fixed set of shards: rows start..start+rows of the endless stream."""

    number: int
    start: int
    shards: tuple[Shard, ...]
    ends: tuple[int, ...]  # cumulative rows of the shards

    @property
    def rows(self) -> int:
        """Rows of this pass."""
        return self.ends[-1]


class RowStream:
    """The endless stream of rows, pass after pass. Row g is found in O(log shards) without the rows before it.

    A pass consists of the shards with the fewest passes so far. Shards that appear during training therefore make up the
    next passes by themselves until they have caught up: no token is seen twice before every token was seen once. The
    shards of a pass are chosen when its first row is read, and kept in the state from then on.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, row: int, seed: int):
        self.folder, self.tokenizer, self.row, self.seed = folder, tokenizer, row, seed
        self.only: tuple[Shard, ...] | None = None  # the shards of all passes to come; None = those that are there then
        self.passes: list[Pass] = []
        self.visits: dict[int, int] = {}  # shard number -> passes begun over it
        self.lock = threading.Lock()
        self.opened = functools.lru_cache(OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return FOREVER

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        """int32 [T+1]."""
        position = int(index)
        with self.lock:
            while not self.passes or position >= self.passes[-1].start + self.passes[-1].rows:
                self._begin_pass()
            now = self.passes[bisect.bisect_right(self.passes, position, key=lambda p: p.start) - 1]
        if position < now.start:
            raise IndexError(f"row {position} lies before the restored position")
        shuffled = _shuffle(position - now.start, now.rows, pass_seed(self.seed, now.number))
        which = bisect.bisect_right(now.ends, shuffled)
        tokens, plan = self.opened(now.shards[which])
        return read_row(tokens, plan, shuffled - (now.ends[which - 1] if which else 0), self.tokenizer.bos, self.row)

    def _begin_pass(self) -> None:
        shards = self.only or find_shards(self.folder, "train", self.tokenizer.fingerprint)
        if not shards:
            raise UserError(
                f"{self.folder}: no training shards (train_00000.bin); run `python -m nanojax.data tokenize`"
            )
        for number in sorted(self.visits):
            if number >= len(shards):
                raise UserError(f"{self.folder / f'train_{number:05d}.bin'}: was there before and is gone; put it back")
        rows = {shard: packed_rows(shard, self.tokenizer.bos, self.row) for shard in shards}
        filled = [shard for shard in shards if rows[shard]]
        if not filled:
            raise UserError(
                f"{self.folder}: the training shards do not fill one row of {self.row} tokens; give more text or a "
                "shorter sequence"
            )
        least = min(self.visits.get(shard.number, 0) for shard in filled)
        chosen = {shard: rows[shard] for shard in filled if self.visits.get(shard.number, 0) == least}
        start = self.passes[-1].start + self.passes[-1].rows if self.passes else 0
        number = self.passes[-1].number + 1 if self.passes else 0
        self._add_pass(number, start, chosen)

    def _add_pass(self, number: int, start: int, rows: dict[Shard, int]) -> None:
        self.passes.append(Pass(number, start, tuple(rows), tuple(np.cumsum(list(rows.values())).tolist())))
        for shard in rows:
            self.visits[shard.number] = self.visits.get(shard.number, 0) + 1

    def _open(self, shard: Shard) -> tuple[np.ndarray, Plan]:
        return shard.open(), shard_plan(shard, self.tokenizer.bos, self.row)

    def state(self, position: int) -> dict[str, Any]:
        """JSON: the pass that holds row `position`, all passes begun after it, and the visits before them."""
        with self.lock:
            kept = [p for p in self.passes if position < p.start + p.rows] or self.passes[-1:]
            visits = dict(self.visits)
        for p in kept:
            for shard in p.shards:
                visits[shard.number] -= 1
        return {
            "visits": {str(number): times for number, times in sorted(visits.items())},
            "passes": [
                {"number": p.number, "start": p.start, "shards": {s.name: s.sha256[:16] for s in p.shards}}
                for p in kept
            ],
        }

    def identity(self) -> dict[str, Any]:
        """What must be the same wherever a state of this stream is restored."""
        return {"row": self.row, "seed": self.seed, "tokenizer": self.tokenizer.fingerprint}

    def restored(self, state: dict[str, Any]) -> "RowStream":
        """A new stream with the passes of `state`. UserError names a shard that is missing or changed."""
        new = RowStream(self.folder, self.tokenizer, self.row, self.seed)
        new.only = self.only
        new._restore(state)
        return new

    def _restore(self, state: dict[str, Any]) -> None:
        shards = {shard.name: shard for shard in find_shards(self.folder, "train", self.tokenizer.fingerprint)}
        self.visits = {int(number): times for number, times in state["visits"].items()}
        for entry in state["passes"]:
            for name, sha in entry["shards"].items():
                if name not in shards:
                    raise UserError(
                        f"{self.folder / f'{name}.bin'}: this run was reading it and it is gone; put it back to resume"
                    )
                if not shards[name].sha256.startswith(sha):
                    raise UserError(
                        f"{shards[name].path}: not what this run was reading (sha256 {shards[name].sha256[:16]}, "
                        f"expected {sha}); put the old file back to resume"
                    )
            chosen = [shards[name] for name in entry["shards"]]
            rows = {shard: packed_rows(shard, self.tokenizer.bos, self.row) for shard in chosen}
            self._add_pass(entry["number"], entry["start"], rows)


class Stream(Protocol):
    """Rows without end, found by number, with a state that says which data they come from."""

    folder: Path

    def __len__(self) -> int: ...
    def __getitem__(self, index: SupportsIndex) -> np.ndarray: ...
    def identity(self) -> dict[str, Any]: ...
    def state(self, position: int) -> dict[str, Any]: ...
    def restored(self, state: dict[str, Any]) -> Self: ...


S = TypeVar("S", bound=Stream)


class TrainIterator(Generic[S]):
    """Endless batches of rows, int32 [rows, T+1] of text. `get_state` and `set_state` take O(1), also for other `rows`."""

    def __init__(self, stream: S, rows: int):
        self.stream, self.rows = stream, rows
        self.own = range(rows)
        self._seek(0)

    def _seek(self, position: int) -> None:
        self.begun = position
        self.taken = 0
        rows = _Rows(self.stream, position, self.rows, self.own)
        source = grain.MapDataset.source(rows).batch(len(self.own), drop_remainder=True)
        # One thread keeps four batches ready. d32 on a 4070 takes 5 rows per second, so more would only hold memory.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        self.batches = iter(source.to_iter_dataset(options))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray:
        batch = next(self.batches)
        self.taken += 1
        return batch

    @property
    def position(self) -> int:
        """Rows handed out since the start of training."""
        return self.begun + self.taken * self.rows

    def hand_out(self, own: range) -> None:
        """Of each batch from here on only the rows `own`; position and state are still those of all rows."""
        self.own = own
        self._seek(self.position)

    def get_state(self, unused: int = 0) -> dict[str, Any]:
        """The position as JSON: everything that the next batches depend on, with the shards and the tokenizer.

        Args:
          unused: batches handed out last that shall come again.
        """
        position = self.position - unused * self.rows
        return {"position": position, **self.stream.identity(), **self.stream.state(position)}

    def reopen(self) -> None:
        """The same position, with every file opened anew. UserError while one is missing."""
        self.set_state(self.get_state())

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at `state`. UserError when what its rows were made of differs from when it was saved."""
        for name, value in self.stream.identity().items():
            if state[name] != value:
                raise UserError(
                    f"{self.stream.folder}: the saved data position was made with {name} {state[name]}, this run has "
                    f"{value}"
                )
        self.stream = self.stream.restored(state)  # a new one, because a prefetching thread may still read the old
        self._seek(state["position"])


class _Rows:
    """Of batches of `rows` rows, which begin at row `offset` of the stream, the rows `own`; for grain, which counts from 0."""

    def __init__(self, stream: Stream, offset: int, rows: int, own: range):
        self.stream, self.offset, self.rows, self.own = stream, offset, rows, own

    def __len__(self) -> int:
        return FOREVER

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        batch, row = divmod(int(index), len(self.own))
        return self.stream[self.offset + batch * self.rows + self.own[row]]


def train_iterator(folder: str | os.PathLike, rows: int, seq: int, seed: int, vocab: int) -> TrainIterator[RowStream]:
    """Endless shuffled training batches int32 [rows, seq+1], every row beginning with the begin token.

    The same folder content and seed give the same batches on any machine, and after `set_state(get_state())`. UserError
    names what is missing or damaged, or says that the tokenizer has more than `vocab` ids.
    """
    tokenizer = _tokenizer(folder, vocab)
    stream = RowStream(Path(folder), tokenizer, seq + 1, seed)
    _plan(find_shards(folder, "train", tokenizer.fingerprint), tokenizer.bos, seq + 1)
    stream._begin_pass()  # here and not in grain's thread, so that a bad folder is reported before anything starts
    return TrainIterator(stream, rows)


def share(batches: TrainIterator[RowStream], own: range) -> None:
    """Of each batch only the rows `own` are read, the rest by other processes. Before the first batch.

    Shards that appear from now on are left out, since not all machines would see them at the same time.
    """
    stream = batches.stream
    stream.only = tuple(find_shards(stream.folder, "train", stream.tokenizer.fingerprint))
    batches.hand_out(own)


def fingerprint(folder: str | os.PathLike) -> str:
    """A hash of all shards and the tokenizer, as their JSON describes them."""
    tokenizer = _tokenizer(folder, None)
    shards = [s for split in ("train", "valid") for s in find_shards(folder, split, tokenizer.fingerprint)]
    return _digest([tokenizer.fingerprint, *(f"{shard.name} {shard.sha256}" for shard in shards)])


def _plan(shards: list[Shard], bos: int, row: int) -> None:
    """Makes the plans that are not cached yet, with a progress bar if that takes more than seconds."""
    missing = [shard for shard in shards if not has_plan(shard, bos, row)]
    total = sum(shard.tokens for shard in missing)
    done = 0
    with cli.Bar(f"packing rows of {row}", total, "tokens", quiet=total < ANNOUNCE_TOKENS) as bar:
        for shard in missing:
            shard_plan(shard, bos, row)
            done += shard.tokens
            bar.reach(done)


def valid_batches(folder: str | os.PathLike, rows: int, seq: int) -> Iterator[np.ndarray]:
    """All validation rows once, int32 [rows, seq+1], in a fixed order; what does not fill the last batch is left out.

    Rows are shuffled within each shard, so that the first batches are a fair sample. UserError when no batch fills.
    """
    tokenizer = _tokenizer(folder, None)
    shards = find_shards(folder, "valid", tokenizer.fingerprint)
    plans = [shard_plan(shard, tokenizer.bos, seq + 1) for shard in shards]
    total = sum(plan.rows for plan in plans)
    if total < rows:
        raise UserError(
            f"{folder}: validation has {total} rows of {seq + 1} tokens, fewer than one batch of {rows}; hold out more "
            "text (--valid), or use fewer rows or a shorter sequence"
        )
    return _valid(shards, plans, rows, seq + 1, tokenizer.bos)


def _valid(shards: list[Shard], plans: list[Plan], rows: int, row: int, bos: int) -> Iterator[np.ndarray]:
    batch: list[np.ndarray] = []
    for shard, plan in zip(shards, plans):
        tokens = shard.open()
        for index in range(plan.rows):
            batch.append(read_row(tokens, plan, _shuffle(index, plan.rows, 0), bos, row))
            if len(batch) == rows:
                yield np.stack(batch)
                batch = []


def _tokenizer(folder: str | os.PathLike, vocab: int | None) -> Tokenizer:
    if not str(folder):
        raise UserError("--data.path: is empty; give the folder that `python -m nanojax.data prepare` wrote")
    if not Path(folder).is_dir():
        raise UserError(
            f"{folder}: no data folder there; `python -m nanojax.data prepare --input TEXTS --out={folder}` makes one"
        )
    tokenizer = Tokenizer.load(Path(folder) / "tokenizer")
    if vocab is not None and tokenizer.vocab_size > vocab:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, the model only {vocab}; set --model.vocab"
        )
    return tokenizer


def _shuffle(index: int, rows: int, seed: int) -> int:
    """Where a pseudo-random permutation of range(rows) sends the index; the same on every machine and version."""
    return grain.experimental.index_shuffle(index, max_index=rows - 1, seed=seed, rounds=4) if rows > 1 else index


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def pass_seed(seed: int, number: int) -> int:
    """The seed of pass `number` over the data of a run with this seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=4).digest(), "little")
