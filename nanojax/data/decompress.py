"""The plain bytes of a file, whatever it is compressed with: told by its content, all members, zeros behind them ignored."""

from __future__ import annotations

import bz2
import codecs
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from nanojax.cli import UserError

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)  # what reading a damaged file raises
# Compressed bytes that are expanded at one time. The most that any of the formats makes of so many is 130 MB.
BLOCK = 4096
WINDOW = 2**31  # bytes; zstd --long=31, as large dumps are packed, needs all of it
_OTHER = (  # what a file of text is not, though its name may say so
    (b"PK\x03\x04", "a zip archive"), (b"7z\xbc\xaf\x27\x1c", "a 7z archive"), (b"Rar!\x1a\x07", "a rar archive"),
    (b"%PDF-", "a PDF"), (b"PAR1", "a parquet file"), (b"ARROW1", "an Arrow file"), (b"\x89HDF", "an HDF5 file"),
    (b"SQLite format 3\x00", "an SQLite database"), (b"\x7fELF", "a program"), (b"\x89PNG", "a picture"),
)  # fmt: skip


def open_plain(path: Path, raw: io.BufferedReader[Any]) -> io.BufferedReader[Any]:
    """The plain bytes of `raw`, which is the open file `path`.

    The content decides what they are compressed with: a server may have unpacked a .gz on the way, and another program
    may have packed a .txt. UserError if the name promises a compressed file and the content is neither that nor text, or
    if the plain bytes are an archive or a file of another kind. While reading, damage raises one of DAMAGE.
    """
    head = raw.read(16)
    raw.seek(0)
    member = _member(head)
    if member is None and head and path.name.lower().endswith(SUFFIXES) and not _is_text(head):
        raise UserError(f"{path}: damaged (not a {path.suffix[1:]} file); fetch it again or leave it out")
    plain = io.BufferedReader(_Members(raw, member), 1 << 20) if member else raw
    start = plain.peek(512)
    kind = next((kind for magic, kind in _OTHER if start.startswith(magic)), "")
    if kind or start[257:262] == b"ustar":
        raise UserError(f"{path}: this is {kind or 'a tar archive'}, not text; unpack or convert it, or leave it out")
    return plain


class _Members(io.RawIOBase):
    """Reads a compressed file to the end of its last member. EOFError if it ends inside one."""

    def __init__(self, file: BinaryIO, member: Callable[[], Any]):
        self.parts = _expand(file, member)
        self.left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fills the buffer, unless the file ends."""
        into = memoryview(buffer).cast("B")
        done = 0
        while done < len(into):
            if not self.left:
                part = next(self.parts, None)
                if part is None:
                    break
                self.left = memoryview(part)
            some = self.left[: len(into) - done]
            into[done : done + len(some)] = some
            self.left = self.left[len(some) :]
            done += len(some)
        return done


def _expand(file: BinaryIO, member: Callable[[], Any]) -> Iterator[bytes]:
    decoder = member()
    rest = b""
    while data := rest or file.read(BLOCK):
        rest = b""
        if decoder is None:
            data = data.lstrip(b"\0")  # padding to the end of a block of tape, as gzip and xz accept it
            if not data:
                continue
            decoder = member()
        yield decoder.decompress(data)
        if decoder.eof:
            rest, decoder = decoder.unused_data, None
    if decoder is not None:
        raise EOFError("it ends too early")


def _member(head: bytes) -> Callable[[], Any] | None:
    """What makes a decoder of one member of a file that begins with `head`; None if it is not compressed."""
    if head.startswith(b"\x1f\x8b"):
        return lambda: zlib.decompressobj(wbits=31)
    if head.startswith(b"BZh"):
        return bz2.BZ2Decompressor
    if head.startswith(b"\xfd7zXZ\0"):
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] < 0x60):
        return lambda: zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
    return None


def _is_text(head: bytes) -> bool:
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
