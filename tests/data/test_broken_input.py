"""Hundreds of randomly broken inputs: each is one line on stderr and exit 2 with nothing half-written, or read with its loss
counted."""

import bz2
import contextlib
import gzip
import json
import lzma
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nanojax import tokenizer as tokenizers
from nanojax.cli import UserError, run_main
from nanojax.data import loader
from nanojax.data.__main__ import main
from nanojax.data.tokenize import Options, tokenize
from nanojax.evaluate import bpb

ROOT = Path(__file__).parents[2]
COUNT = 30  # documents in each file
NAMES = ("a.txt", "b.jsonl", "c.json", "d.jsonl.gz", "e.ndjson.bz2", "f.txt.xz", "g.json.zst", "h.parquet")
PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
PIECES = (  # what people's files contain where nobody expects it
    b"\x00", b"\xff", b"\xe9", b"\xef\xbb\xbf", b"\xff\xfe", b"\\ud800", b'"', b"{", b"}", b"[", b"]", b",", b"\n", b"\r",
    b"\r\n\r\n", b"\\", b"null", b"NaN", b"1" * 5000, b"[" * 100_000, b"{}\n", b"[1,2]\n", b'{"text": null}\n',
    b'{"text": 5}\n', b'{"body": "x"}\n', b"x" * 200_000, b" " * 200_000, "日本".encode("utf-16"), b"\x1f\x8b\x08\x00",
)  # fmt: skip


def texts(count: int) -> list[str]:
    """Documents of random letters, which do not compress to nothing."""
    rng = np.random.default_rng(5)
    return ["".join(map(chr, rng.integers(97, 123, 300))) for _ in range(count)]


def plain(name: str, rng: np.random.Generator) -> bytes:
    """The file's content before it is packed."""
    if ".txt" in name:
        return "\n".join(texts(COUNT)).encode()
    records = [{"id": n, "text": text} for n, text in enumerate(texts(COUNT))]
    layout = int(rng.integers(3)) if name.startswith(("c", "g")) else 0
    if layout:
        return json.dumps(records, indent=1 if layout == 1 else None).encode()
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write(path: Path, content: bytes) -> None:
    """The content as the name says; parquet is made of the content's lines."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts(COUNT)}), path, write_page_checksum=True)
    else:
        path.write_bytes(PACKERS.get(path.suffix, bytes)(content))


def damaged(raw: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """The bytes with one random damage, and its name."""
    how = str(rng.choice(["cut", "emptied", "noise", "flipped", "overwritten", "inserted", "swapped", "doubled", "grown"]))
    at = int(rng.integers(len(raw)))
    some = rng.integers(0, 256, int(rng.integers(1, 200)), np.uint8).tobytes()
    return {
        "cut": raw[:at], "emptied": b"", "noise": rng.integers(0, 256, len(raw), np.uint8).tobytes(),
        "flipped": raw[:at] + bytes([raw[at] ^ 1 << int(rng.integers(8))]) + raw[at + 1 :],
        "overwritten": raw[:at] + some + raw[at + len(some) :], "swapped": raw[at:] + raw[:at],
        "inserted": raw[:at] + PIECES[int(rng.integers(len(PIECES)))] + raw[at:], "doubled": raw + raw[at:],
        "grown": raw + some,
    }[how], how  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """tok/ with a tokenizer, and data/ with shards made from documents."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(100)))
    tokenizers.train(iter(texts(5)), 280).save(folder / "data" / "tokenizer")
    shutil.copytree(folder / "data" / "tokenizer", folder / "tok")
    tokenize([str(folder / "a.jsonl")], folder / "data", Options(valid="hash:0.2", dedup=True), 1, quiet=True)
    return folder


def run(arguments: list[str], monkeypatch, capsys, note: str) -> str:
    """The command's one error line, or "" if it succeeded; fails on anything else and after a minute."""
    begin = time.monotonic()
    monkeypatch.setattr(sys, "argv", ["nanojax.data", *arguments])
    code = 0
    try:
        run_main(main)
    except SystemExit as exit:
        code = exit.code
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert time.monotonic() - begin < 60, note
    assert not any("Traceback" in line for line in lines), (note, lines)
    if not code:
        assert not errors, (note, lines)
        return ""
    assert code == 2 and len(errors) == 1 and lines[-1] == errors[0] and len(errors[0]) < 600, (note, lines)
    return errors[0]


def check_text(case: int, whole: Path, folder: Path, monkeypatch, capsys) -> bool:
    """Breaks one text file and gives it to a command and to evaluation; whether it was read."""
    rng = np.random.default_rng(case)
    path = folder / NAMES[case % len(NAMES)]
    write(path, plain(path.name, rng))
    content, how = damaged(path.read_bytes(), rng)
    if path.suffix in PACKERS and rng.integers(2):  # the text is broken, and packed afterwards
        broken, how = damaged(plain(path.name, rng), rng)
        content, how = PACKERS[path.suffix](broken), f"{how} inside"
    path.write_bytes(content)
    out = folder / "new"
    rest = ["--input", str(path), "--out", str(out), "--workers", "1"]
    command = str(rng.choice(["tokenize", "tokenize", "prepare", "tokenizer"]))
    if command == "tokenize":
        shutil.copytree(whole / "tok", out / "tokenizer")
        arguments = ["tokenize", *rest]
    else:
        arguments = [command, *(rest if command == "prepare" else rest[:4]), "--vocab", "270"]
    note = f"case {case}: {path.name} {how}: {' '.join(arguments)}"
    with contextlib.suppress(UserError):  # as `evaluate --text` reads it
        list(bpb.text_documents([str(path)], by="text"))
    error = run(arguments, monkeypatch, capsys, note)
    assert not list(folder.rglob("*.tmp")), note
    if error:
        assert path.name in error or str(out) in error or "the inputs" in error or "vocabulary" in error, (note, error)
        return False
    if command == "tokenizer":
        return True
    manifest = json.loads((out / "manifest.json").read_text())
    kept = sum(manifest["totals"][split]["documents"] for split in ("train", "valid"))
    size = sum(manifest["totals"][split]["bytes"] for split in ("train", "valid"))
    # What is not there any more has been counted, or was never in the file.
    missing = 300 * COUNT - size
    assert missing < 400 or manifest["dropped"] or how.startswith(("cut", "swapped", "flipped", "over", "emptied")), note
    assert kept and (manifest["documents"] >= kept or ".txt" in path.name), note
    return True


def check_folder(case: int, whole: Path, folder: Path, monkeypatch, capsys) -> None:
    """Breaks one file of a data folder; the command that reads it names it."""
    rng = np.random.default_rng(case)
    shutil.copytree(whole / "data", folder / "data")
    shards = sorted(p for p in (folder / "data").iterdir() if p.name.startswith(("train_", "valid_")))
    victims = [*shards, folder / "data" / "tokenizer" / "tokenizer.json"]
    victim = victims[case % len(victims)]
    before = victim.read_bytes()
    content, how = damaged(before, rng)
    if content == before:
        return
    victim.write_bytes(content)
    note = f"case {case}: {victim.name} {how}"
    with pytest.raises(UserError) as refused:  # as a training run reads it, before anything is compiled
        loader.train_iterator(folder / "data", 2, 64, 0, 280)
        loader.valid_batches(folder / "data", 2, 64)
    assert victim.name in str(refused.value) or f"{victim.stem}.bin" in str(refused.value), note
    arguments = ["inspect", "--data", str(folder / "data"), "--seq", "64", "--verify"]
    error = run(arguments, monkeypatch, capsys, note)
    assert error and (victim.name in error or f"{victim.stem}.bin" in error), (note, error)


@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, 5))])
def test_broken_text_is_one_line_or_counted(whole: Path, tmp_path: Path, part: int, monkeypatch, capsys) -> None:
    """40 random damages (in each of 5 parts) of text in every kind and compression, through tokenize, prepare, tokenizer
    and evaluation's reader."""
    read = 0
    for case in range(40 * part, 40 * part + 40):
        folder = tmp_path / str(case)
        folder.mkdir()
        read += check_text(case, whole, folder, monkeypatch, capsys)
        shutil.rmtree(folder)
    assert 5 < read < 38  # both ends occur


@pytest.mark.parametrize("part", range(2))
def test_broken_data_folder_is_one_line(whole: Path, tmp_path: Path, part: int, monkeypatch, capsys) -> None:
    """40 random damages (in each of 2 parts) of token shards, their JSON and the tokenizer, through the loader
    of a training run and through inspect."""
    for case in range(40 * part, 40 * part + 40):
        folder = tmp_path / str(case)
        folder.mkdir()
        check_folder(case, whole, folder, monkeypatch, capsys)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_many_more_broken_inputs(whole: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """800 further damages of text and 300 of data folders, as in the tests above."""
    for case in range(1000, 2100):
        folder = tmp_path / str(case)
        folder.mkdir()
        (check_text if case < 1800 else check_folder)(case, whole, folder, monkeypatch, capsys)
        shutil.rmtree(folder)


@pytest.mark.long
def test_broken_input_as_processes(whole: Path, tmp_path: Path) -> None:
    """A few by the real command, with two workers: exit 2 and one line, or exit 0 and the loss on stdout. A
    training run refuses a cut shard before it compiles."""
    shutil.copytree(whole / "data", tmp_path / "data")
    (tmp_path / "data" / "train_00000.bin").write_bytes(b"cut")
    config = ["--config=demo", f"--data.path={tmp_path / 'data'}", f"--train.run={tmp_path / 'run'}"]
    train = [sys.executable, "-m", "nanojax.train", *config]
    done = subprocess.run(train, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "train_00000.bin: 3 bytes where" in done.stderr.splitlines()[-1], done.stderr
    bad = {
        "latin1.txt": "é la première ligne\n".encode("latin1") * 5000,
        "wrong_key.jsonl": b'{"body": "x"}\n' * 50,
        "cut.jsonl.gz": gzip.compress(b'{"text": "some words"}\n' * 9999)[:-9],
        "one_bad_line.jsonl": b'{"text": "some words of the law"}\n' * 20 + b"{bad\n",
    }
    said = {}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        command = [sys.executable, "-m", "nanojax.data", "prepare", "--input", str(tmp_path / name), "--vocab", "265"]
        command += ["--out", str(tmp_path / "out" / name), "--workers", "2"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        said[name] = (done.returncode, done.stdout if done.returncode == 0 else done.stderr.splitlines()[-1])
        assert "Traceback" not in done.stderr
    assert {name: code for name, (code, _) in said.items()} == dict(zip(bad, (2, 2, 2, 0)))
    assert "iconv -f latin1" in said["latin1.txt"][1]
    assert "no text under 'text' (it has: body); choose with --key" in said["wrong_key.jsonl"][1]
    assert "cut.jsonl.gz: damaged" in said["cut.jsonl.gz"][1]
    assert "one_bad_line.jsonl (end): not JSON 1" in said["one_bad_line.jsonl"][1]
