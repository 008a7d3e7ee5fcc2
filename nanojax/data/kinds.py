"""The documents in one open file of text, JSON or parquet; what cannot be read is replaced by its reason, piece by piece."""

import codecs
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanojax.cli import UserError

PIECE_CHARS = 1_000_000  # a larger .txt file is read in pieces of this size, so that memory stays flat
MAX_LINE = 64 << 20  # characters; a longer JSON line or value is dropped as giant, because it could fill the memory
MAX_LOST = 1_000_000  # characters; where JSON makes no sense over a longer stretch, its file is damaged
ODDITIES = ("invalid UTF-8", "not JSON", "no text")  # what a well-made file does not have
_INVALID = "\udcff"  # stands for bytes that are not valid in the file's encoding; no valid text has it
_UNREADABLE = re.compile("[\0\ud800-\udfff]")
_LINES = re.compile(r"[^\r\n]{1,10000}[\r\n]*|[\r\n]+")  # a line, or 10,000 characters of one, with its end
_BETWEEN = re.compile("[\\s,\\[\\]\x1e\ufeff]*")  # what may stand between the values of arrays, lines, JSON sequences
_NEXT = re.compile(r"(?:\}\s*,?|\n)\s*(?=\{)")  # where a value or a line ends and an object begins
_JSON = json.JSONDecoder(parse_int=float, strict=False)  # int() refuses 5,000 digits; a tab in a string is harmless


def _mark(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return _INVALID, error.end


codecs.register_error("nanojax.invalid", _mark)


@dataclass(frozen=True)
class Dropped:
    """Takes the place of a document that cannot be used; the counts list it under `reason`.

    `size` is about its length in bytes. `advice` says where it stands and what to do, for the first of many.
    """

    reason: str
    size: int = field(default=0, compare=False)
    advice: str = field(default="", compare=False)


Record = Callable[[Any, str, int], str | Dropped]  # a JSON value, its place, its size -> its text
Rows = Callable[[Path, pq.ParquetFile], Iterator[str | Dropped]]  # a parquet file -> the text of each row


def decoded(plain: io.BufferedReader) -> io.TextIOWrapper:
    """The characters of a file in UTF-8, or in UTF-16 or UTF-32 as its byte order mark or its zeros tell."""
    head = plain.peek(4096)[:4096]
    encoding = json.detect_encoding(head)  # of json.loads: the mark, or else which of the first four bytes are zero
    width = 2 if encoding.startswith("utf-16-") else 4 if encoding.startswith("utf-32-") else 1
    if head.count(0) < 0.4 * len(head) * (width - 1) / width:  # a zero by chance; Latin script has one per character
        encoding = "utf-8"
    return io.TextIOWrapper(plain, encoding, "nanojax.invalid", newline="\n")


def plain_text(path: Path, file: io.TextIOWrapper, tick: Callable[[], None]) -> Iterator[str | Dropped]:
    """The text in pieces of about PIECE_CHARS cut at line ends, without the lines that cannot be read, and these."""
    rest = ""
    while block := file.read(PIECE_CHARS):
        tick()
        rest += block
        while len(rest) >= 2 * PIECE_CHARS:
            cut = rest.rfind("\n", 0, PIECE_CHARS) + 1 or PIECE_CHARS
            yield from _readable(path, rest[:cut])
            rest = rest[cut:]
    yield from _readable(path, rest)


def _readable(path: Path, piece: str) -> Iterator[str | Dropped]:
    if "\0" not in piece and isinstance(encodable(piece, "", 0), str):  # 8 times as fast as the regex
        yield piece
        return
    lines = _LINES.findall(piece)
    bad = {number: line for number, line in enumerate(lines) if _UNREADABLE.search(line)}
    if len(bad) < len(lines):
        yield "".join(line for number, line in enumerate(lines) if number not in bad)
    for line in bad.values():
        if "\0" in line:
            yield Dropped("binary", len(line), f"{path}: has zero bytes, so it is not text; leave it out")
        else:
            advice = f"{path}: has bytes that are not UTF-8; convert it, for example with iconv -f latin1 -t utf-8"
            yield Dropped("invalid UTF-8", len(line), advice)


def text_of(path: Path, key: str) -> Record:
    """What takes the text under `key` out of a JSON value of the file; a string by itself is text."""

    def text(value: Any, place: str, size: int) -> str | Dropped:
        found = value.get(key, value) if isinstance(value, dict) else value
        if isinstance(found, str):
            return encodable(found, f"{path} {place}", size)
        if found is None:
            return Dropped("empty", size)
        has = ", ".join(map(str, list(value)[:8])) if isinstance(value, dict) else type(value).__name__
        advice = f"{path} {place}: no text under {key!r} (it has: {has[:100]}); choose with --key"
        return Dropped("no text", size, advice)

    return text


def encodable(text: str, place: str, size: int) -> str | Dropped:
    """The text, unless a byte of it was invalid or it has half a character ("\\ud800" in JSON), which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return Dropped("invalid UTF-8", size, f"{place}: its text is not UTF-8; repair or convert the file")
    return text


def json_values(path: Path, file: io.TextIOWrapper, text: Record, tick: Callable[[], None]) -> Iterator[str | Dropped]:
    """One document per value: of JSON lines, or of arrays and of objects over several lines, whatever the file's name."""
    blank = 0
    while (first := file.readline(MAX_LINE)) and not first.strip(" \t\r\n\ufeff"):
        blank += 1
        yield Dropped("empty")
    if _is_line(first):
        yield from _lines(path, itertools.chain([first], iter(lambda: file.readline(MAX_LINE), "")), blank, text, tick)
    else:
        yield from _values(path, first, file, text, tick)


def _is_line(first: str) -> bool:
    """Whether the file's first line is a whole JSON value; an array may be the whole file."""
    try:
        return not first.lstrip().startswith("[") and _JSON.decode(first.strip(" \t\r\n\ufeff")) is not None
    except (ValueError, RecursionError):
        return len(first) == MAX_LINE


def _lines(
    path: Path, lines: Iterator[str], number: int, text: Record, tick: Callable[[], None]
) -> Iterator[str | Dropped]:
    for line in lines:
        number += 1
        if number % 64 == 0:
            tick()
        if len(line) == MAX_LINE and not line.endswith("\n"):
            size = len(line)
            for more in lines:
                size += len(more)
                if more.endswith("\n"):
                    break
            yield Dropped("giant", size)
            continue
        line = line.strip(" \t\r\n\ufeff")
        if not line:
            yield Dropped("empty")
            continue
        try:
            value = _JSON.decode(line)
        except (ValueError, RecursionError):
            yield Dropped("not JSON", len(line), f"{path} line {number}: not JSON; repair or remove the line")
            continue
        yield text(value, f"line {number}", len(line))


def _values(
    path: Path, buffer: str, file: io.TextIOWrapper, text: Record, tick: Callable[[], None]
) -> Iterator[str | Dropped]:
    """Value after value. Behind one that makes no sense, reading goes on where the next object begins."""
    at = number = lost = depth = 0
    more = True  # whether the file may have more characters

    def read() -> None:
        nonlocal buffer, at, more
        tick()
        # Doubled, so that a long value is not parsed too often; small at first, as json counts lines up to each error.
        block = file.read(max(1 << 16, len(buffer) - at))
        buffer, at, more = buffer[at:] + block, 0, bool(block)

    while True:
        end = _BETWEEN.match(buffer, at).end()  # pyright: ignore[reportOptionalMemberAccess]  it matches anything
        depth += buffer.count("[", at, end) - buffer.count("]", at, end)
        at = end
        if at == len(buffer):
            if not more:
                break
            read()
            continue
        try:
            value, end = _JSON.raw_decode(buffer, at)
            if end == len(buffer) and more and not isinstance(value, (dict, str)):
                read()  # the number may go on
                continue
        except (ValueError, RecursionError) as error:
            if more and _is_cut(error, buffer) and len(buffer) - at < MAX_LINE:
                read()
                continue
            while not (resume := _NEXT.search(buffer, at)) and more and len(buffer) - at < MAX_LOST:
                read()
            if not lost:
                advice = f"{path} value {number + 1}: not JSON; repair or remove it"
                yield Dropped("not JSON", (resume.end() if resume else len(buffer)) - at, advice)
                number += 1
            lost += (resume.end() if resume else len(buffer)) - at
            if lost > MAX_LOST:
                raise UserError(
                    f"{path} value {number}: not JSON from there on; repair the file or leave it out"
                ) from None
            at = resume.end() if resume else len(buffer)
            continue
        number, lost = number + 1, 0
        yield text(value, f"value {number}", end - at)
        at = end
    if depth > 0:
        yield Dropped("not JSON", 1, f"{path}: ends inside an array, so it was cut off; fetch it again")


def _is_cut(error: Exception, buffer: str) -> bool:
    """Whether the value may be whole with more characters."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 16


def parquet_text(key: str) -> Rows:
    """The rows of a column of text of any of Arrow's types. UserError if there is no such column."""

    def text(path: Path, file: pq.ParquetFile) -> Iterator[str | Dropped]:
        check_column(path, file, key)
        number = 0
        for column in batches(file, key):
            for value in column.cast(pa.large_binary()).to_pylist():
                number += 1
                if value is None:
                    yield Dropped("empty")
                    continue
                try:
                    yield value.decode("utf-8")
                except UnicodeDecodeError:
                    advice = f"{path} row {number}: its text is not UTF-8; convert the file"
                    yield Dropped("invalid UTF-8", len(value), advice)

    return text


def parquet_labels(by: str) -> Rows:
    """The rows of a column of any type, as text; "" for null. UserError if there is no such column."""

    def label(path: Path, file: pq.ParquetFile) -> Iterator[str]:
        if (names := file.schema_arrow.names).count(by) != 1:
            raise UserError(f"{path}: no column {by!r} (it has: {', '.join(names[:8])}); choose with --by")
        for column in batches(file, by):
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                column = column.cast(pa.large_binary())  # of a damaged file it need not be UTF-8
            for value in column.to_pylist():
                text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
                yield "" if text is None else str(text)

    return label


def batches(file: pq.ParquetFile, name: str) -> Iterator[pa.Array]:
    """The column's values in pieces of 256 rows: a row group of 1,024 web pages is ~5 MB, but others make groups of a GB."""
    for batch in file.iter_batches(batch_size=256, columns=[name]):
        column = batch.column(batch.schema.get_field_index(name))
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        yield column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column


def check_column(path: Path, file: pq.ParquetFile, key: str) -> None:
    """UserError unless the file has one column `key` and it is text."""
    names = file.schema_arrow.names
    if names.count(key) != 1:
        how = "two columns" if key in names else "no column"
        raise UserError(f"{path}: {how} {key!r} (it has: {', '.join(names[:8])}); choose with --key")
    kind = file.schema_arrow.field(key).type
    stored = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    stored = stored.value_type if isinstance(stored, pa.DictionaryType) else stored
    t = pa.types
    tests = (t.is_string, t.is_large_string, t.is_string_view, t.is_binary, t.is_large_binary, t.is_binary_view,
             t.is_fixed_size_binary, t.is_null)  # fmt: skip
    if not any(test(stored) for test in tests):
        raise UserError(f"{path}: column {key!r} is {kind}, not text; choose with --key")
