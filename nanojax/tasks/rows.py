"""The rows of local files, parquet or JSON lines, one after the other; an error names the file and the row."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanojax.cli import UserError, first_line
from nanojax.data import decompress, kinds, text


class Row(NamedTuple):
    """A row's value and where it stands: "texts/identity.jsonl line 7"."""

    place: str
    value: Any


def read(path: Path) -> Iterator[Row]:
    """The rows of a file, or of all files in a folder in the order of their names. JSON may be compressed.

    UserError: nothing there, a damaged file, a line that is not JSON.
    """
    for source in text.find([str(path)]):
        try:
            yield from (_parquet if source.path.suffix == ".parquet" else _json_lines)(source.path)
        except (*decompress.DAMAGE, pa.ArrowException) as error:
            raise UserError(
                f"{source.path}: damaged or unreadable ({first_line(error)}); fetch it again or leave it out"
            ) from None


@contextlib.contextmanager
def named(row: Row) -> Iterator[None]:
    """What goes wrong with the row's value in the block becomes a UserError that names the row."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{row.place}: {error}") from None
    except UnicodeEncodeError:
        raise UserError(
            f"{row.place}: bytes that are not UTF-8, or half a surrogate pair; repair or remove it"
        ) from None
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise UserError(f"{row.place}: not a row of this task ({type(error).__name__}: {error})") from None


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(batch_size=256):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{path} row {number}", value)


def _json_lines(path: Path) -> Iterator[Row]:
    with io.BufferedReader(io.FileIO(path), 1 << 20) as raw, kinds.decoded(decompress.open_plain(path, raw)) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip(" \t\r\n\ufeff"):
                continue
            try:
                value = json.loads(line.strip("\ufeff"))
            except (ValueError, RecursionError):
                raise UserError(f"{path} line {number}: not JSON; repair or remove the line") from None
            yield Row(f"{path} line {number}", value)
