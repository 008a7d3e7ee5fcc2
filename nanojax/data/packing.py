"""Packs a token shard's documents into rows that all begin with the begin token; the plan is an index, cached on disk.

The rule, for rows of T+1 tokens of one shard. A piece is a document or the rest of a cut one; a rest repeats the begin
token, so every piece begins with it. A row takes the largest piece that still fits, until it is full (best fit over the
whole shard). When no piece fits, the largest is cut to fill the row and its rest goes back. Nothing is padded. Only rests
under MIN_REST tokens and the last, incomplete row are dropped. nanochat's rule drops the rest of every cut document.
"""

import contextlib
import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np

from nanojax import files
from nanojax.cli import UserError
from nanojax.data.shards import Shard

MIN_REST = 16  # tokens; a shorter rest is mostly its repeated begin token: dropped, and counted


@dataclasses.dataclass(frozen=True)
class Plan:
    """Row r consists of the pieces first[r]:first[r+1]; piece p is tokens start[p]:start[p]+length[p] of the shard,
    behind a repeated begin token when it does not begin with one. All uint32."""

    first: np.ndarray  # [rows + 1]
    start: np.ndarray  # [pieces]
    length: np.ndarray  # [pieces]
    dropped: int  # tokens of the shard that are in no row
    repeated: int  # begin tokens that rows have beyond the shard's own

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.first) - 1


def plan_rows(begins: np.ndarray, total: int, row: int) -> Plan:
    """Plans rows of `row` tokens over documents that begin at the sorted positions `begins` [documents] of `total`."""
    # A piece costs its tokens plus a repeated begin token (`again` = 1) when it is a rest. Pieces that cost less than a
    # row wait in one stack per cost; bit c of `waiting` says that stack c is not empty, so "the largest that fits" is
    # one mask and one bit_length of a Python integer (~0.3 us) and planning 100 M tokens takes a second.
    stacks: list[list[tuple[int, int, int]]] = [[] for _ in range(row)]  # (start, length, again)
    waiting = 0
    first, start, length = [0], [], []
    dropped = 0
    for begin, size in zip(begins.tolist(), np.diff(np.append(begins, total)).tolist()):
        again = 0
        while size + again >= row:  # a row of its own
            start.append(begin)
            length.append(row - again)
            first.append(len(start))
            begin, size, again = begin + row - again, size - (row - again), 1
        if size >= MIN_REST or (size and not again):
            stacks[size + again].append((begin, size, again))
            waiting |= 1 << (size + again)
        else:
            dropped += size
    used = 0  # tokens in the row under construction
    while waiting:
        room = row - used
        fitting = waiting & ((2 << room) - 1)
        if not fitting and room == 1:  # a cut piece would begin with a lone begin token anyway
            start.append(int(begins[0]))
            length.append(1)
            used = row
        else:
            cost = (fitting or waiting).bit_length() - 1
            begin, size, again = stacks[cost].pop()
            if not stacks[cost]:
                waiting ^= 1 << cost
            take = size if fitting else room - again
            start.append(begin)
            length.append(take)
            used += take + again
            rest = size - take
            if rest >= MIN_REST:
                stacks[rest + 1].append((begin + take, rest, 1))
                waiting |= 1 << (rest + 1)
            else:
                dropped += rest
        if used == row:
            first.append(len(start))
            used = 0
    dropped += sum(length[first[-1] :])  # the last row, when it is incomplete
    del start[first[-1] :], length[first[-1] :]
    rows = len(first) - 1
    repeated = rows * row - (total - dropped)
    return Plan(np.array(first, np.uint32), np.array(start, np.uint32), np.array(length, np.uint32), dropped, repeated)


def has_plan(shard: Shard, bos: int, row: int) -> bool:
    """Whether the shard's plan is cached."""
    return _read_head(shard, bos, row) is not None


def packed_rows(shard: Shard, bos: int, row: int) -> int:
    """How many rows of `row` tokens the shard fills. O(1) when its plan is cached; otherwise the plan is made."""
    head = _read_head(shard, bos, row)
    return head["rows"] if head else shard_plan(shard, bos, row).rows


def shard_plan(shard: Shard, bos: int, row: int) -> Plan:
    """The shard's plan for rows of `row` tokens, from the cache folder `packed_<row>` beside the shard or made anew.

    It is made anew, and the shard's sha256 verified, when there is no plan or the shard's file has changed since. On a
    read-only disk it is used from memory.
    """
    head = _read_head(shard, bos, row)
    body = _cache(shard, row).with_suffix(".npy")
    if head:
        try:
            flat = np.load(body, mmap_mode="r")
            if zlib.crc32(flat.tobytes()) == head["crc32"]:
                first, start, length = np.split(flat, [head["rows"] + 1, head["rows"] + 1 + head["pieces"]])
                return Plan(first, start, length, head["dropped"], head["repeated"])
        except (OSError, ValueError):
            pass  # a damaged cache is made anew
    stamp = _stamp(shard, bos, row)
    shard.verify()
    tokens = shard.open()
    begins = np.flatnonzero(tokens == bos)
    if not len(begins) or begins[0] != 0:
        raise UserError(f"{shard.path}: does not start with the begin token {bos}; tokenize again into a new folder")
    plan = plan_rows(begins, len(tokens), row)
    flat = np.concatenate([plan.first, plan.start, plan.length])
    head = {
        **stamp, "rows": plan.rows, "pieces": len(plan.start), "dropped": plan.dropped, "repeated": plan.repeated,
        "crc32": zlib.crc32(flat.tobytes()),
    }  # fmt: skip
    with contextlib.suppress(UserError):  # a plan that cannot be stored is made again next time
        with files.write_atomic(body) as file:
            np.save(file, flat)
        with files.write_atomic(body.with_suffix(".json")) as file:
            file.write(json.dumps({**head, "check": _check(head)}).encode())
    return plan


def _cache(shard: Shard, row: int) -> Path:
    return shard.path.parent / f"packed_{row}" / shard.name


def _stamp(shard: Shard, bos: int, row: int) -> dict[str, int | str]:
    stat = shard.check_size()
    return {"sha256": shard.sha256, "bos": bos, "row": row, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _read_head(shard: Shard, bos: int, row: int) -> dict | None:
    """The description of the cached plan; None unless it is intact and of exactly this file."""
    stamp = _stamp(shard, bos, row)
    try:
        head = json.loads(_cache(shard, row).with_suffix(".json").read_bytes())
        check = head.pop("check")
        return head if check == _check(head) and {name: head[name] for name in stamp} == stamp else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _check(head: dict) -> int:
    return zlib.crc32(json.dumps(head, sort_keys=True).encode())


def read_row(tokens: np.ndarray, plan: Plan, index: int, bos: int, row: int) -> np.ndarray:
    """int32 [row]: row `index` of the plan, from the shard's uint16 tokens."""
    out = np.empty(row, np.int32)
    used = 0
    a, b = int(plan.first[index]), int(plan.first[index + 1])
    for begin, size in zip(plan.start[a:b].tolist(), plan.length[a:b].tolist()):
        if tokens[begin] != bos:
            out[used] = bos
            used += 1
        out[used : used + size] = tokens[begin : begin + size]
        used += size
    return out
