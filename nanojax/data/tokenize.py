"""Text files to token shards: streaming, atomic per shard, restartable at the last whole shard."""

import collections
import dataclasses
import json
import os
from collections.abc import Iterable
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nanojax import cli, files
from nanojax.cli import UserError
from nanojax.data import text
from nanojax.data.clean import RULES, HashSet, Split
from nanojax.data.encode import Encoded, Task, open_pool, results
from nanojax.data.kinds import ODDITIES
from nanojax.data.shards import Shard, Writer, find_shards
from nanojax.data.tokenizer import TRAINED
from nanojax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Options:
    """What determines the shards' content; recorded in each shard, and the same for all shards of a folder."""

    valid: str = "hash:0.01"
    shard_tokens: int = 100_000_000
    dedup: bool = False
    key: str = "text"


MAX_LINES = 10  # of files with losses that are printed; manifest.json has all of them
_LOSSES = (*ODDITIES, "binary", "giant", "empty")  # by the file's own fault
_NOT_DROPPED = ("read", "characters", "odd characters")  # among the counts of an input


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
            with files.write_atomic(_hash_path(self.writer.path)) as file:
                file.write(np.concatenate(self.hashes).astype("<u8").tobytes())
        inputs = {name: dict(counts) for name, counts in self.inputs.items()}
        shard = self.writer.commit({**meta, "inputs": inputs})
        self.writer, self.inputs, self.hashes = None, {}, []
        return shard

    def discard(self) -> None:
        if self.writer:
            self.writer.discard()


def _hash_path(shard: Path) -> Path:
    return shard.parent / "hashes" / f"{shard.stem}.u64"


def _changed(source: text.Source, done: dict[str, Any]) -> bool:
    if source.size != done["size"]:
        return True
    return "sha256" in done and text.digest(source) != done["sha256"]  # older shards have none


class _Job:
    """One run over one folder: what the shards there record as done, and the shards written since."""

    def __init__(
        self, out: Path, options: Options, tokenizer: Tokenizer, sources: list[text.Source], left_out: dict[str, str]
    ):
        self.out, self.options, self.tokenizer, self.left_out = out, options, tokenizer, left_out
        self.shards = {split: find_shards(out, split, tokenizer.fingerprint) for split in ("valid", "train")}
        for path in [*out.glob("*.tmp"), *(out / "hashes").glob("*.tmp")]:
            path.unlink()  # of an earlier run that was killed
        # A validation shard is written just before the training shard of the same documents. A run that was killed
        # between the two makes both again.
        while self.shards["valid"] and self.shards["valid"][-1].meta["with_train"] >= len(self.shards["train"]):
            last = self.shards["valid"].pop()
            last.path.with_suffix(".json").unlink()
            last.path.unlink()
        for shard in self.shards["valid"] + self.shards["train"]:
            if shard.meta["options"] != dataclasses.asdict(options):
                before = ", ".join(f"{name}={value}" for name, value in shard.meta["options"].items())
                raise UserError(f"{shard.path}: made with other options ({before}); use these or a new --out folder")
        grown = bool(self.shards["valid"] or self.shards["train"])
        self.split = Split(options.valid, sources, options.key, self._held_before(), grown)
        self.held = HashSet()  # hashes of the documents of validation files
        self.seen = HashSet()  # hashes of all documents
        self.keep_hashes = {"valid": options.dedup or self.split.by_file, "train": options.dedup}
        for split, shards in self.shards.items():
            for shard in shards:
                of_file = split == "valid" and shard.meta.get("by_file", not options.valid.startswith("hash:"))
                if options.dedup or of_file:
                    hashes = self._hashes(shard)
                    for kept, wanted in ((self.held, of_file), (self.seen, options.dedup)):
                        if wanted:
                            kept.add(hashes)
        self.leftover: dict[str, collections.Counter[str]] = {}  # dropped since the last shard
        self.tally = text.Tally()
        for shard in self.shards["valid"] + self.shards["train"]:
            for name, counts in shard.meta["counts"].items():
                self.tally.counts.update(counts)
                if counts.get("odd characters"):
                    self.tally.advice = f"{name}: has text that cannot be read"

    def _held_before(self) -> frozenset[str]:
        """The validation files that the folder's shards are of."""
        done = [done for shard in self.shards["valid"] for done in (*shard.meta["finished"], shard.meta["position"])]
        return frozenset(entry["name"] for entry in done if entry)

    def _hashes(self, shard: Shard) -> np.ndarray:
        path = _hash_path(shard.path)
        if not path.exists() or path.stat().st_size != 8 * shard.documents:
            raise UserError(f"{path}: missing or truncated; copy it again, or tokenize into a new --out folder")
        return np.fromfile(path, "<u8").astype(np.uint64)

    def left(self, split: str, sources: list[text.Source]) -> list[tuple[text.Source, int]]:
        """The sources that are not done, each with the number of its first document that is not done."""
        named = {source.name: source for source in sources}
        # If the last documents of a run are all validation, it is a validation shard that records what is finished.
        shards = self.shards["valid"] + self.shards["train"] if split == "train" else self.shards["valid"]
        finished = [done for shard in shards for done in shard.meta["finished"]]
        over = {done["name"] for done in finished}
        position = self.shards[split][-1].meta["position"] if self.shards[split] else {}
        if position.get("name") in over:
            position = {}
        for done in [*finished, *([position] if position else [])]:
            source = named.get(done["name"])
            if source and _changed(source, done):
                raise UserError(
                    f"{source.path}: has changed since it was tokenised ({done['size']} bytes then, {source.size} now); "
                    "put the old file back, or tokenize into a new --out folder"
                )
        if position and position["name"] not in named:
            raise UserError(
                f"{position['name']}: tokenising stopped inside this input, which is now missing; put it back"
            )
        open_at = []
        if position:
            source = named[position["name"]]
            if (
                position.get("end") is not None
            ):  # its end was held out; with other inputs it is read up to there all the same
                source = dataclasses.replace(source, end=position["end"])
            open_at = [(source, position["documents"])]
        return open_at + [(s, 0) for s in sources if s.name not in over and s.name != position.get("name")]

    def run(
        self, split: str, left: list[tuple[text.Source, int]], encoded: Iterable[tuple[Task, Encoded]], bar: cli.Bar
    ) -> None:
        """Writes what became of `left` into shards of `split`; under a hash rule also validation shards of training text."""
        parts = {name: _Part(self.out, name) for name in ("valid", "train")}
        starts = {source.name: start for source, start in left}
        sha256 = {"": ""}  # of the file that is being read
        position: dict[str, Any] = {}
        finished: list[dict[str, Any]] = []
        bytes_before = 0
        try:
            for task, result in encoded:
                source = task.source
                if source.name not in sha256:
                    sha256 = {source.name: text.digest(source)}
                counts = self.leftover.setdefault(source.name, collections.Counter())
                self.tally.update(result.counts, result.advice)
                keep = self._keep(split, result, counts)
                chosen = self.split.chosen(result.hashes) if split == "train" else np.ones(len(keep), bool)
                for name, part in parts.items():
                    part.append(len(self.shards[name]), source, result, keep & (chosen == (name == "valid")))
                done = position.get("documents", starts[source.name]) + result.counts["read"]
                file = {"name": source.name, "size": source.size, "sha256": sha256[source.name], "end": source.end}
                position = {**file, "documents": done}
                tokens = sum(map(self._tokens, parts.values()))
                bar.reach(bytes_before + task.fraction * source.size, f"{tokens / 1e6:.1f} M tokens")
                if task.last:
                    finished.append(file)
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
        if split == "valid" and self.split.by_file:
            self.held.add(encoded.hashes[keep])
        return keep

    def _commit(self, split: str, parts: dict[str, _Part], position: dict, finished: list) -> None:
        carrier = split if parts[split].writer else "valid"  # the shard that records how far the run has come
        common = {
            "tokenizer": self.tokenizer.fingerprint, "options": dataclasses.asdict(self.options),
            "with_train": len(self.shards["train"]) if carrier == "train" else -1,
            "by_file": self.split.by_file,
        }  # fmt: skip
        for name, part in parts.items():  # validation first: see __init__
            if part.writer:
                progress = {"position": {}, "finished": [], "counts": {}}
                if name == carrier:
                    counts = {source: dict(counts) for source, counts in self.leftover.items()}
                    progress = {"position": position, "finished": finished, "counts": counts}
                self.shards[name].append(part.commit({**common, **progress}, self.keep_hashes[name]))
        self.leftover.clear()
        self.write_manifest()

    def write_manifest(self) -> dict[str, Any]:
        """Writes manifest.json: options, shards with counts and checksums, counts by input. A run copies some."""
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
            "command": cli.command(),
            "documents": read.pop("read", 0),
            "dropped": {name: count for name, count in read.items() if count and name not in _NOT_DROPPED},
            "left_out": self.left_out | self.split.left_out,
            "shards": [
                {"name": s.name, "tokens": s.tokens, "documents": s.documents, "sha256": s.sha256}
                for shards in self.shards.values() for s in shards
            ],
            "inputs": {name: {kind: dict(c) for kind, c in kinds.items()} for name, kinds in inputs.items()},
        }  # fmt: skip
        with files.write_atomic(self.out / "manifest.json") as file:
            file.write(json.dumps(manifest, indent=1).encode())
        return manifest

    def check(self, dropped: dict[str, int]) -> None:
        """UserError if too much could not be read, or if nothing is in one of the splits."""
        self.tally.check()
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
        for split, what in (("train", "training"), ("valid", "validation")):
            if not self.shards[split]:
                why = f"dropped: {reasons}" if dropped else f"--valid={self.options.valid} gives it none"
                raise UserError(
                    f"{self.tally.advice or self.out}: no text is left for {what} ({why}); give more text, or another "
                    "--valid (end:0.05 holds out the end of the last file), with a new --out folder"
                )


def tokenize(
    inputs: list[str], out: str | os.PathLike, options: Options, workers: int, quiet: bool = False
) -> dict[str, Any]:
    """Tokenises the inputs with the tokenizer in `out`/tokenizer into shards in `out`; returns the manifest.

    Continues after the last whole shard in `out`; inputs that earlier runs did not have are appended. The shards depend
    on the inputs and options only, not on workers or interruptions. UserError names the file at fault; unfinished shards
    are removed.
    """
    out = Path(out)
    left_out: dict[str, str] = {}
    sources = text.find(inputs, left_out)
    tokenizer = Tokenizer.load(out / "tokenizer")
    text.check_columns(sources, options.key)
    job = _Job(out, options, tokenizer, sources, left_out)
    pool = open_pool(workers, str(out / "tokenizer"))
    try:
        for split, group in (("valid", job.split.held), ("train", job.split.training)):
            left = job.left(split, group)
            if left:
                with cli.Bar(f"tokenize {split}", sum(source.size for source, _ in left), "B", quiet) as bar:
                    job.run(split, left, results(pool, workers, left, options.key), bar)
        manifest = job.write_manifest()
        job.check(manifest["dropped"])
        return manifest
    except BrokenExecutor:
        raise UserError(
            "a tokenising process died (out of memory?); run the same command again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def add_arguments(parser: cli.Parser) -> None:
    """The options that `tokenize` and `prepare` share."""
    text.add_arguments(parser)
    parser.add_argument(
        "--out", type=cli.path, required=True, metavar="DIR", help="data folder to write or to continue"
    )
    parser.add_argument("--dedup", action="store_true", help="drop documents equal to an earlier one, byte for byte")
    parser.add_argument(
        "--shard-tokens", type=cli.count, default=100_000_000, metavar="N",
        help="a shard is closed at this many tokens (default 1e8: a 200 MB file)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=cli.count, default=os.cpu_count() or 1, metavar="N",
        help="processes (default: all %(default)s cores)",
    )  # fmt: skip


def report(manifest: dict[str, Any], out: str) -> None:
    """Prints what the folder holds."""
    for split in ("train", "valid"):
        total = manifest["totals"][split]
        shards = sum(shard["name"].startswith(split) for shard in manifest["shards"])
        tokens, size, documents = (total.get(kind, 0) for kind in ("tokens", "bytes", "documents"))
        each = size / (tokens - documents) if tokens > documents else 0  # begin tokens have no bytes
        print(f"{split}: {shards} shards, {documents:,} documents, {tokens:,} tokens, {each:.2f} bytes/token")
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in manifest["dropped"].items()) or "none"
    print(f"documents read: {manifest['documents']:,}; dropped: {dropped}")
    lost = [
        f"  {name}: " + ", ".join(f"{reason} {read[reason]:,}" for reason in _LOSSES if read.get(reason))
        for name, read in ((name, kinds.get("read", {})) for name, kinds in manifest["inputs"].items())
        if any(read.get(reason) for reason in _LOSSES)
    ]
    left_out = [f"  {name}: left out, {why}" for name, why in manifest["left_out"].items()]
    for lines in (lost, left_out):
        print(*lines[:MAX_LINES], *[f"  and {len(lines) - MAX_LINES:,} more files in manifest.json"][: len(lines) > MAX_LINES],
              sep="\n", end="\n" if lines else "")  # fmt: skip
    print(f"written to {out}; train with --data.path={out}")


def main(arguments: list[str]) -> None:
    """`python -m nanojax.data tokenize`."""
    parser = cli.Parser(
        "python -m nanojax.data tokenize",
        "Text files -> token shards. A run that was stopped continues; a run with more inputs adds shards.\n\n"
        f"Rules for documents, counted in manifest.json:\n{RULES}",
        "  python -m nanojax.data tokenize --input texts/ --tokenizer data/tok --out data/mine\n"
        "  python -m nanojax.data tokenize --input 'fw/*.parquet' --out data/fw --valid last --dedup",
    )
    add_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        type=cli.path,
        metavar="DIR",
        help="folder with tokenizer.json, copied to the data folder (default: the one there)",
    )
    args = parser.parse_args(arguments)
    out = Path(args.out)
    if args.tokenizer:
        place_tokenizer(Tokenizer.load(args.tokenizer), out)
        if (Path(args.tokenizer) / TRAINED).is_file():
            content = (Path(args.tokenizer) / TRAINED).read_bytes()
            with files.write_atomic(out / "tokenizer" / TRAINED) as file:
                file.write(content)
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
