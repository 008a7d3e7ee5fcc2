"""inspect and the tokenizer comparison: figures equal a count by hand, the picture is drawn, absence is reported."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

from nanojax import tokenizer as tokenizers
from nanojax.cli import UserError
from nanojax.data import compression
from nanojax.data.inspect import histogram, inspect, main, picture, rows_text, text_report
from nanojax.data.tokenize import Options, tokenize

DOCUMENTS = {
    "a.txt": "The first text, of one line.",
    "b.txt": "Another text. " * 40,
    "c.txt": "Another text. " * 40,
    "d.txt": "naïve 東京 " * 100,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder from four files, two of them equal; d.txt is validation."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for name, text in DOCUMENTS.items():
        (folder / "text" / name).write_text(text)
    tokenizers.train(iter(DOCUMENTS.values()), 270).save(folder / "out" / "tokenizer")
    tokenize([str(folder / "text")], folder / "out", Options(valid="d.txt"), 1, quiet=True)
    return folder / "out"


def test_figures_equal_a_count_by_hand(data: Path) -> None:
    """Documents, bytes, tokens, lengths, duplicates, rows and sources are those of the four texts."""
    train, valid = inspect(data, 63, 10, verify=True, quiet=True)
    tokenizer = tokenizers.Tokenizer.load(data / "tokenizer")
    lengths = [1 + len(tokenizer.encode(DOCUMENTS[name])) for name in ("a.txt", "b.txt", "c.txt")]
    assert (train.documents, valid.documents) == (3, 1)
    assert train.bytes == sum(len(DOCUMENTS[name].encode()) for name in ("a.txt", "b.txt", "c.txt"))
    assert valid.bytes == len(DOCUMENTS["d.txt"].encode())
    assert train.lengths.tolist() == lengths and train.tokens == sum(lengths)
    assert train.duplicates == 1 and valid.duplicates == 0
    assert train.rows * 64 == train.tokens - train.dropped + train.repeated
    assert {name: counts["documents"] for name, counts in train.sources.items()} == {"a.txt": 1, "b.txt": 1, "c.txt": 1}
    assert train.sources["b.txt"]["tokens"] == lengths[1]
    assert train.bytes_per_token == train.bytes / (sum(lengths) - 3)


def test_report_and_rows_say_it(data: Path) -> None:
    """The text has the figures, and decoded rows start with the begin token's name and show the documents."""
    train, valid = inspect(data, 63, 10, quiet=True)
    report = text_report(train, 63)
    for part in ("3 documents", "duplicate documents: 1 (33.33%)", "length histogram", "sources: 3", "b.txt"):
        assert part in report
    rows = rows_text(data, 63, 2)
    assert rows.count("--- train_00000 row") == 2 and "\n<|bos|>" in rows and "Another text. " in rows
    assert "1 documents" in text_report(valid, 63)


def test_histogram_counts_every_length() -> None:
    """Powers of two as edges; nothing is lost at either end."""
    lengths = np.array([1, 2, 3, 4, 1023, 1024, 70_000])
    edges, counts = histogram(lengths)
    assert counts.sum() == len(lengths) and edges[0] == 1 and edges[-1] == 131_072 and counts[0] == 1


@pytest.mark.long
def test_picture_is_a_png(data: Path, tmp_path: Path) -> None:
    """The PNG is drawn with something on it; an impossible path is one line."""
    pytest.importorskip("matplotlib")
    reports = inspect(data, 63, 10, quiet=True)
    picture(reports, 63, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "a.png").stat().st_size > 20_000
    with pytest.raises(UserError, match="cannot be written"):
        picture(reports, 63, tmp_path / "a.png" / "b.png")


def test_picture_without_matplotlib_is_one_line(data: Path, tmp_path: Path, monkeypatch) -> None:
    """Without the optional package --png says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        picture(inspect(data, 63, 10, quiet=True), 63, tmp_path / "a.png")


def test_command_prints_all(data: Path, capsys) -> None:
    """The command prints both splits, the verification and the rows."""
    main(["--data", str(data), "--seq", "63", "--rows", "1", "--verify"])
    out = capsys.readouterr().out
    assert "train: 1 shards" in out and "valid: 1 shards" in out and "checksums of 2 shards verified" in out
    assert "row 0" in out


def test_empty_folder_is_one_line(data: Path, tmp_path: Path) -> None:
    """A folder with a tokenizer and no shards says what to run."""
    tokenizers.Tokenizer.load(data / "tokenizer").save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="no token shards in it"):
        inspect(tmp_path, 63, 10, quiet=True)


def test_comparison_is_bytes_over_tokens(data: Path, capsys) -> None:
    """Bytes per token of each kind of text equal a direct count, and a byte-level encoder scores exactly 1."""
    tokenizer = tokenizers.Tokenizer.load(data / "tokenizer")
    texts = compression.sample_texts("Another text. naïve")
    assert set(texts) == {"prose", "code", "numbers", "languages"}
    table = compression.bytes_per_token({"this": tokenizer.encode, "bytes": lambda t: list(t.encode())}, texts)
    for kind, text in texts.items():
        assert table[kind]["bytes"] == 1.0
        assert table[kind]["this"] == len(text.encode()) / len(tokenizer.encode(text)) >= 1.0
    compression.print_comparison(tokenizer, texts["prose"])
    assert "numbers" in capsys.readouterr().out


def test_reference_vocabularies_are_used_only_when_at_hand(tmp_path: Path, monkeypatch) -> None:
    """Without tiktoken's cached files no vocabulary is compared (and none fetched); with the files there, tiktoken is
    asked for exactly those."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compression.tiktoken, "get_encoding", lambda name: pytest.fail(f"{name} would be fetched"))
    assert compression.reference_encoders() == ({}, ["gpt2", "cl100k_base"])
    for url in compression.REFERENCES["gpt2"]:
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_text("")
    own = tokenizers.Tokenizer([bytes([b]) for b in range(256)])._encoding
    monkeypatch.setattr(compression.tiktoken, "get_encoding", lambda name: own)
    encoders, missing = compression.reference_encoders()
    assert list(encoders) == ["gpt2"] and missing == ["cl100k_base"] and encoders["gpt2"]("ab") == [97, 98]
