"""200 randomly broken data files: each is one line on stderr and exit 2, with nothing half-written."""

import gzip
import json
import lzma
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanojax import tokenizer as tokenizers
from nanojax.cli import run_main
from nanojax.data.__main__ import main
from nanojax.data.tokenize import Options, tokenize


def texts(count: int) -> list[str]:
    """Documents of random letters, which do not compress to nothing."""
    rng = np.random.default_rng(5)
    return ["".join(map(chr, rng.integers(97, 123, 300))) for _ in range(count)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """text/ with one file of each checksummed kind, tok/ with a tokenizer, and data/ made from them."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(30)).encode()
    (folder / "text" / "a.jsonl").write_bytes(lines)
    (folder / "text" / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "text" / "c.jsonl.xz").write_bytes(lzma.compress(lines))
    (folder / "text" / "d.jsonl.zst").write_bytes(pa.Codec("zstd").compress(lines, asbytes=True))
    pq.write_table(pa.table({"text": texts(30)}), folder / "text" / "e.parquet", write_page_checksum=True)
    tokenizers.train(iter(texts(5)), 280).save(folder / "data" / "tokenizer")
    shutil.copytree(folder / "data" / "tokenizer", folder / "tok")
    tokenize([str(folder / "text")], folder / "data", Options(valid="hash:0.2"), 1, quiet=True)
    return folder


def break_file(path: Path, rng: np.random.Generator) -> str:
    """Damages the file in one random way that must be noticed, and says how."""
    raw = bytearray(path.read_bytes())
    ways = ["cut", "grown", "emptied", "noise"] + ["flipped", "overwritten", "swapped"] * 2
    if path.name.endswith((".zst", ".jsonl")):
        ways = ["cut"]  # plain text and pyarrow's zstd frames carry no checksum: other letters are just another text
    elif path.name.endswith((".gz", ".xz", ".parquet")):
        ways = ["cut", "noise", "overwritten"]
    how = str(rng.choice(ways))
    if how == "cut":
        raw = raw[: int(rng.integers(1, len(raw) - 2))]
        if path.name.endswith(".jsonl") and raw.endswith((b"\n", b"}")):
            raw = raw[:-3]
    elif how == "grown":
        raw += rng.integers(0, 256, int(rng.integers(1, 50)), np.uint8).tobytes()
    elif how == "emptied":
        raw = bytearray()
    elif how == "noise":
        raw = bytearray(rng.integers(0, 256, len(raw), np.uint8).tobytes())
    elif how == "flipped":
        raw[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
    elif how == "overwritten":
        begin = int(rng.integers(len(raw) // 4, len(raw) // 2))
        length = int(rng.integers(20, 200))
        raw[begin : begin + length] = rng.integers(0, 256, length, np.uint8).tobytes()[: len(raw) - begin]
    elif how == "swapped":
        at = int(rng.integers(0, len(raw) - 2))
        raw[at], raw[at + 1] = raw[at + 1] ^ 1, raw[at]
    path.write_bytes(raw)
    return how


@pytest.mark.parametrize("part", range(4))
def test_every_broken_file_is_one_line(whole: Path, tmp_path: Path, part: int, monkeypatch, capsys) -> None:
    """50 random damages (in each of 4 parts) of token shards, their JSON, the tokenizer, and text of every kind: the
    command that reads the file ends with exit 2 and one `error:` line that names the file; no shard appears."""
    rng = np.random.default_rng(part)
    for case in range(50):
        folder = tmp_path / str(case)
        shutil.copytree(whole, folder)
        shards = sorted(p for p in (folder / "data").iterdir() if p.name.startswith(("train_", "valid_")))
        victims = [*shards, folder / "data" / "tokenizer" / "tokenizer.json", *sorted((folder / "text").iterdir())]
        victim = victims[case % len(victims)]
        how = break_file(victim, rng)
        if victim.parent.name == "text":
            shutil.copytree(folder / "tok", folder / "new" / "tokenizer")
            arguments = ["tokenize", "--input", str(victim), "--out", str(folder / "new"), "--workers", "1"]
        else:
            arguments = ["inspect", "--data", str(folder / "data"), "--seq", "64"]
        monkeypatch.setattr(sys, "argv", ["nanojax.data", *arguments])
        with pytest.raises(SystemExit) as exit:
            run_main(main)
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        note = f"case {case}: {victim.name} {how}: {lines}"
        assert exit.value.code == 2 and len(errors) == 1 and lines[-1] == errors[0], note
        assert (victim.name in errors[0] or f"{victim.stem}.bin" in errors[0]) and len(errors[0]) < 600, note
        assert not any("Traceback" in line for line in lines), note
        if victim.parent.name == "text":
            assert [p.name for p in (folder / "new").iterdir()] == ["tokenizer"], note
        shutil.rmtree(folder)
