"""Tokenising: shards equal a plain reference, whatever the workers and interruptions; errors name files."""

import contextlib
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nanojax import tokenizer as tokenizers
from nanojax.cli import UserError, run_main
from nanojax.data import encode, kinds
from nanojax.data import tokenizer as training
from nanojax.data.__main__ import SUBCOMMANDS, main
from nanojax.data.clean import HashSet, document_hash
from nanojax.data.shards import find_shards
from nanojax.data.tokenize import Options, tokenize
from nanojax.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """300 ids, trained on the documents' own words."""
    return tokenizers.train(iter([" ".join(document(n) for n in range(50))]), 300)


def document(n: int) -> str:
    """A document of 20 to 400 words that depends on n alone."""
    rng = np.random.default_rng(n)
    return f"{n}: " + " ".join(
        ["word", "of", "law", "and", "people", "the", "state", "year"][i] for i in rng.integers(0, 8, 20 + n % 380)
    )


def write(path: Path, documents: list[str]) -> None:
    """A .jsonl(.gz) file of these documents."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(lines) if path.name.endswith(".gz") else lines)


def texts(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    """All documents of a split, decoded from its shards in order."""
    found = []
    for shard in find_shards(folder, split, tokenizer.fingerprint):
        shard.verify()
        tokens = np.array(shard.open())
        begins = np.flatnonzero(tokens == tokenizer.bos)
        assert begins[0] == 0 and len(begins) == shard.documents
        found += [tokenizer.decode(part[1:]) for part in np.split(tokens, begins[1:])]
    return found


def names(folder: Path) -> list[str]:
    """Every shard file's name; one that is listed may be gone while a command works there."""
    shards = [p for p in folder.iterdir() if p.suffix in (".bin", ".json")]
    return sorted(p.name for p in shards if p.name.startswith(("train_", "valid_")))


def files(folder: Path) -> dict[str, bytes]:
    """Every shard file's bytes, by name."""
    return {name: (folder / name).read_bytes() for name in names(folder)}


@pytest.fixture
def data(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """tmp_path/text with three files of 100 documents, and tmp_path/out with the tokenizer."""
    for n in range(3):
        write(tmp_path / "text" / f"{n}.jsonl{'.gz' if n == 1 else ''}", [document(100 * n + i) for i in range(100)])
    tokenizer.save(tmp_path / "out" / "tokenizer")
    return tmp_path


def run(data: Path, options: Options, workers: int = 1, out: str = "out") -> dict:
    """Tokenises data/text into data/out, quietly."""
    return tokenize([str(data / "text")], data / out, options, workers, quiet=True)


def test_shards_hold_every_document_once_in_order(data: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    """Decoded, train and valid together are exactly the documents, split by hash; counts and checksums agree."""
    monkeypatch.setattr(encode, "TASK_CHARS", 20_000)
    manifest = run(data, Options(valid="hash:0.2", shard_tokens=10_000))
    everything = [document(n) for n in range(300)]
    limit = int(0.2 * 2.0**64)
    assert texts(data / "out", "valid", tokenizer) == [d for d in everything if document_hash(d) < limit]
    assert texts(data / "out", "train", tokenizer) == [d for d in everything if document_hash(d) >= limit]
    assert manifest["documents"] == 300 and not manifest["dropped"]
    assert sum(total["documents"] for total in manifest["totals"].values()) == 300
    assert sum(total["bytes"] for total in manifest["totals"].values()) == sum(len(d.encode()) for d in everything)
    assert sum(name["name"].startswith("train") for name in manifest["shards"]) > 2
    by_input = {
        name: sum(counts["documents"] for kind, counts in kinds.items() if kind != "read")
        for name, kinds in manifest["inputs"].items()
    }
    assert by_input == {"0.jsonl": 100, "1.jsonl.gz": 100, "2.jsonl": 100}
    assert not list((data / "out").glob("*.tmp"))


def test_workers_do_not_change_the_shards(data: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    """Two processes and one give byte-identical shards."""
    monkeypatch.setattr(encode, "TASK_CHARS", 5_000)  # many tasks in flight
    tokenizer.save(data / "two" / "tokenizer")
    options = Options(valid="hash:0.2", shard_tokens=10_000)
    run(data, options, workers=1)
    run(data, options, workers=2, out="two")
    assert files(data / "out") == files(data / "two")


def test_held_out_file_and_documents_equal_to_it(data: Path, tokenizer: Tokenizer) -> None:
    """`last` makes the last file validation, and a training document equal to one of it is left out and counted."""
    write(data / "text" / "2.jsonl", [document(5), *(document(n) for n in range(400, 450)), document(150)])
    manifest = run(data, Options(valid="last"))
    valid, train = texts(data / "out", "valid", tokenizer), texts(data / "out", "train", tokenizer)
    assert valid == [document(5), *(document(n) for n in range(400, 450)), document(150)]
    assert train == [document(n) for n in range(200) if n not in (5, 150)]
    assert manifest["dropped"] == {"held out": 2}


def test_dedup_across_files_and_runs(data: Path, tokenizer: Tokenizer) -> None:
    """--dedup keeps the first of equal documents, across files and across a later run; without it all stay."""
    write(data / "text" / "2.jsonl", [document(n) for n in (1, 1, 500, 500, 150)])
    manifest = run(data, Options(valid="hash:0.1", dedup=True))
    kept = texts(data / "out", "train", tokenizer) + texts(data / "out", "valid", tokenizer)
    assert sorted(kept) == sorted(document(n) for n in [*range(200), 500])
    assert manifest["dropped"] == {"duplicate": 4}
    write(data / "text" / "3.jsonl", [document(500), document(501), document(501)])
    manifest = run(data, Options(valid="hash:0.1", dedup=True))
    kept = texts(data / "out", "train", tokenizer) + texts(data / "out", "valid", tokenizer)
    assert sorted(kept) == sorted(document(n) for n in [*range(200), 500, 501])
    assert manifest["dropped"] == {"duplicate": 6}


def test_rules_are_counted(data: Path, tokenizer: Tokenizer) -> None:
    """Empty, binary, invalid and giant documents are dropped or cut, each counted under its name."""
    path = data / "text" / "2.jsonl"
    path.write_bytes(
        b'{"text": ""}\n{"text": "a\\u0000b"}\n{"text": "\xff"}\n{"text": "\\udc00"}\n{"text": "  "}\n'
        + json.dumps({"text": "long words " * 200_000}).encode()
        + b"\n"
    )
    manifest = run(data, Options(valid="hash:0.1"))
    assert manifest["dropped"] == {"empty": 2, "binary": 1, "invalid UTF-8": 2}
    assert manifest["documents"] == 206
    kept = texts(data / "out", "train", tokenizer) + texts(data / "out", "valid", tokenizer)
    assert "".join(text for text in kept if text.startswith(("long", "words"))) == "long words " * 200_000


def failing_after(calls: int) -> Callable:
    """encode.encode that stops the run at the call after so many."""
    real, done = encode.encode, itertools.count(1)

    def encode_or_stop(documents):
        if next(done) > calls:
            raise UserError("stopped")
        return real(documents)

    return encode_or_stop


@pytest.mark.parametrize("valid", ["hash:0.2", "last"])
@pytest.mark.parametrize("stop_after", [1, 2, 5, 9])
def test_restart_gives_the_same_shards(
    data: Path, tokenizer: Tokenizer, monkeypatch, valid: str, stop_after: int
) -> None:
    """Stopped by an error after a number of tasks and run again, all shards equal those of one uninterrupted run; at
    the stop no unfinished file is left."""
    monkeypatch.setattr(encode, "TASK_CHARS", 20_000)
    options = Options(valid=valid, shard_tokens=6_000, dedup=True)
    tokenizer.save(data / "whole" / "tokenizer")
    whole = run(data, options, out="whole")
    real = encode.encode
    monkeypatch.setattr(encode, "encode", failing_after(stop_after))
    with pytest.raises(UserError, match="stopped"):
        run(data, options)
    assert not list((data / "out").glob("*.tmp"))
    monkeypatch.setattr(encode, "encode", real)
    manifest = run(data, options)
    assert files(data / "out") == files(data / "whole")
    assert manifest == whole
    assert run(data, options) == whole  # nothing left to do: nothing changes
    assert files(data / "out") == files(data / "whole")


def test_restart_inside_a_compressed_file(data: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    """A decompressor reads its file to the end long before its last document: stopped after each possible task, the
    restart still takes up every document."""
    monkeypatch.setattr(encode, "TASK_CHARS", 10_000)
    options = Options(valid="hash:0.1", shard_tokens=3_000)
    for number in (0, 2):
        (data / "text" / f"{number}.jsonl").unlink()
    tokenizer.save(data / "whole" / "tokenizer")
    whole = run(data, options, out="whole")
    real = encode.encode
    assert whole["documents"] == 100
    for stop_after in range(1, 12):
        out = f"out{stop_after}"
        tokenizer.save(data / out / "tokenizer")
        monkeypatch.setattr(encode, "encode", failing_after(stop_after))
        with contextlib.suppress(UserError):
            run(data, options, out=out)
        monkeypatch.setattr(encode, "encode", real)
        assert run(data, options, out=out) == whole
        assert files(data / out) == files(data / "whole")


def test_a_run_that_ends_in_validation_documents(data: Path, tokenizer: Tokenizer) -> None:
    """When no training document follows the last train shard, the validation documents at the end are kept, counted,
    and not read again."""
    limit = int(0.2 * 2.0**64)
    documents = [document(n) for n in range(100)]
    chosen = [d for d in documents if document_hash(d) < limit]
    other = [d for d in documents if document_hash(d) >= limit]
    for path in (data / "text").iterdir():
        path.unlink()
    write(data / "text" / "a.jsonl", other)
    with pytest.raises(UserError, match="no text is left for validation"):
        run(data, Options(valid="hash:0.2"))
    write(data / "text" / "b.jsonl", chosen)
    manifest = run(data, Options(valid="hash:0.2"))
    assert texts(data / "out", "train", tokenizer) == other
    assert texts(data / "out", "valid", tokenizer) == chosen
    assert manifest["documents"] == 100 == sum(total["documents"] for total in manifest["totals"].values())
    before = files(data / "out")
    write(data / "text" / "c.jsonl", [document(777)])
    assert run(data, Options(valid="hash:0.2"))["documents"] == 101
    assert {name: data_ for name, data_ in files(data / "out").items() if name in before} == before
    assert texts(data / "out", "valid", tokenizer)[: len(chosen)] == chosen


@pytest.mark.long
def test_workers_end_with_a_killed_parent(data: Path) -> None:
    """kill -9 of the command leaves no worker process behind."""
    for n in range(3, 9):
        write(data / "text" / f"{n}.jsonl", [document(1000 * n + i) for i in range(2000)])
    command = [sys.executable, "-m", "nanojax.data", "tokenize", "--input", str(data / "text"), "--workers", "2"]
    command += ["--shard-tokens", "100000", "--out", str(data / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers: list[str] = []
    while process.poll() is None and not list((data / "out").glob("*.tmp")):
        time.sleep(0.005)
        for task in Path(f"/proc/{process.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                workers = task.read_text().split() or workers
    process.kill()
    process.wait()
    assert len(workers) >= 2
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in workers if _alive(pid)]


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_kill_between_a_validation_and_its_train_shard(data: Path, tokenizer: Tokenizer) -> None:
    """Killed after valid_n but before train_n was renamed: the restart writes both again, identically."""
    options = Options(valid="hash:0.2", shard_tokens=6_000)
    run(data, options)
    before = files(data / "out")
    last = max(name for name in before if name.startswith("train") and name.endswith(".bin"))
    number = int(last[6:11])
    valid = [s for s in find_shards(data / "out", "valid", tokenizer.fingerprint) if s.meta["with_train"] == number]
    assert valid
    (data / "out" / last).unlink()
    (data / "out" / last).with_suffix(".json").unlink()
    run(data, options)
    assert files(data / "out") == before


def test_new_inputs_append_shards(data: Path, tokenizer: Tokenizer) -> None:
    """Files added later become further shards; the first ones keep their bytes, and `last` keeps its first choice."""
    run(data, Options(valid="last"))
    before = files(data / "out")
    write(data / "text" / "9.jsonl", [document(n) for n in range(600, 620)])
    run(data, Options(valid="last"))
    after = files(data / "out")
    assert {name: after[name] for name in before} == before
    assert texts(data / "out", "train", tokenizer)[200:] == [document(n) for n in range(600, 620)]
    assert len(texts(data / "out", "valid", tokenizer)) == 100


def test_losses_are_named(data: Path, monkeypatch, capsys) -> None:
    """What is dropped by a file's fault and what is left out of a folder is printed by file, and is in manifest.json."""
    with open(data / "text" / "0.jsonl", "ab") as file:
        file.write(b'{bad\n{"text": 5}\n{"text": null}\n')
    (data / "text" / "readme.md").write_text("about")
    arguments = ["tokenize", "--input", str(data / "text"), "--valid", "last", "--out", str(data / "out"), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["nanojax.data", *arguments])
    run_main(main)
    printed = capsys.readouterr().out
    assert "  0.jsonl: not JSON 1, no text 1, empty 1\n" in printed
    assert "  readme.md: left out, not a kind of text\n" in printed
    manifest = json.loads((data / "out" / "manifest.json").read_text())
    assert manifest["left_out"] == {"readme.md": "not a kind of text"}
    assert manifest["dropped"] == {"not JSON": 1, "no text": 1, "empty": 1}
    assert manifest["inputs"]["0.jsonl"]["read"]["not JSON"] == 1


@pytest.mark.parametrize("mended", ["fetched again", "left out"])
def test_a_damaged_archive_leaves_no_trace(data: Path, monkeypatch, mended: str) -> None:
    """An archive that ends too early stops the job before any part of it is used; what came before it stays, and the job
    goes on with the whole file or without it."""
    monkeypatch.setattr(encode, "TASK_CHARS", 5_000)
    packed = data / "text" / "1.jsonl.gz"
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-4])
    options = Options(valid="hash:0.2", shard_tokens=3_000)
    with pytest.raises(UserError, match=r"1\.jsonl\.gz: damaged .*fetch it again or leave it out"):
        run(data, options)
    before = files(data / "out")
    assert len(before) > 2 and not any(b"1.jsonl.gz" in content for content in before.values())
    if mended == "fetched again":
        packed.write_bytes(whole)
    else:
        packed.unlink()
    manifest = run(data, options)
    assert manifest["documents"] == (300 if mended == "fetched again" else 200)
    assert {name: files(data / "out")[name] for name in before} == before


def test_too_many_oddities_end_the_job(data: Path) -> None:
    """A file of which too much is no text ends the job with the place of the first, also when the command is repeated."""
    with open(data / "text" / "0.jsonl", "ab") as file:
        file.write(b'{"body": "words of the law that are under another key"}\n' * 500)
    for place in ("0.jsonl line 101: no text under 'text' (it has: body); choose with --key", "0.jsonl: has text"):
        with pytest.raises(UserError) as ended:
            run(data, Options(valid="hash:0.2"))
        assert place in str(ended.value) and "(no text 500 are 10% of the text" in str(ended.value)


@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_one_text_is_enough(data: Path, tokenizer: Tokenizer, monkeypatch, stop_after: int) -> None:
    """Of a single book the end is validation, the rest training, and nothing is lost or in both; stopped and restarted the
    shards are the same; with another book later, the first one's end stays validation only."""
    for path in (data / "text").iterdir():
        path.unlink()
    book = "".join(document(n) + "\n" for n in range(300))
    (data / "text" / "book.txt").write_text(book)
    monkeypatch.setattr(kinds, "PIECE_CHARS", 20_000)
    monkeypatch.setattr(encode, "TASK_CHARS", 20_000)
    options = Options(shard_tokens=20_000)
    tokenizer.save(data / "whole" / "tokenizer")
    whole = run(data, options, out="whole")
    train, valid = "".join(texts(data / "whole", "train", tokenizer)), "".join(texts(data / "whole", "valid", tokenizer))
    assert train + valid == book and abs(len(valid) / len(book) - 0.05) < 0.01
    real = encode.encode
    monkeypatch.setattr(encode, "encode", failing_after(stop_after))
    with pytest.raises(UserError, match="stopped"):
        run(data, options)
    monkeypatch.setattr(encode, "encode", real)
    assert run(data, options) == whole
    assert files(data / "out") == files(data / "whole")
    second = "".join(document(n) + "\n" for n in range(1000, 1200))
    (data / "text" / "second.txt").write_text(second)
    run(data, options)
    after = ["".join(texts(data / "out", split, tokenizer)) for split in ("train", "valid")]
    assert after[0].startswith(train) and after[1].startswith(valid)
    assert after[0].removeprefix(train) + after[1].removeprefix(valid) == second


@pytest.mark.parametrize("change", ["options", "grown", "rewritten", "tokenizer", "gone", "hashes", "json", "truncated"])
def test_changes_between_runs_are_one_line(data: Path, tokenizer: Tokenizer, monkeypatch, change: str) -> None:
    """Other options, a changed or missing input, another tokenizer, damaged shards: one UserError that names the file,
    and no shard is touched."""
    monkeypatch.setattr(encode, "TASK_CHARS", 20_000)
    options = Options(valid="hash:0.2", shard_tokens=6_000, dedup=True)
    run(data, options)
    out = data / "out"
    if change == "gone":  # stopped inside the last file, which then goes
        number = max(s.number for s in find_shards(out, "train", tokenizer.fingerprint))
        for path in (*out.glob(f"train_{number:05d}.*"), data / "text" / "2.jsonl"):
            path.unlink()
        assert find_shards(out, "train", tokenizer.fingerprint)[-1].meta["position"]["name"] == "2.jsonl"
    elif change == "options":
        options = Options(valid="hash:0.3", shard_tokens=6_000, dedup=True)
    elif change == "grown":
        with open(data / "text" / "0.jsonl", "ab") as file:
            file.write(b'{"text": "more"}\n')
    elif change == "rewritten":  # as many bytes, and the time that it had
        path = data / "text" / "0.jsonl"
        stat = path.stat()
        path.write_bytes(path.read_bytes().replace(b"law", b"war"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "tokenizer":
        tokenizers.train(iter([document(7)]), 270).save(out / "tokenizer")
    elif change == "hashes":
        (out / "hashes" / "train_00001.u64").write_bytes(b"12345")
    elif change == "json":
        path = out / "train_00001.json"
        path.write_text(path.read_text().replace('"documents": ', '"documents": 1', 1))
    elif change == "truncated":
        os.truncate(out / "train_00001.bin", 100)
    expected = {
        "options": r"train_00000\.bin|valid_00000\.bin: made with other options", "grown": r"0\.jsonl: has changed", "rewritten": r"0\.jsonl: has changed",
        "tokenizer": "made with another tokenizer", "gone": r"2\.jsonl: tokenising stopped inside",
        "hashes": r"train_00001\.u64: missing or truncated", "json": r"train_00001\.json: damaged",
        "truncated": r"train_00001\.bin: 100 bytes where",
    }[change]  # fmt: skip
    before = files(out)
    with pytest.raises(UserError, match=expected):
        run(data, options)
    assert files(out) == before


def command(arguments: list[str], file_size: int = -1) -> subprocess.CompletedProcess:
    """Runs `python -m nanojax.data` with these arguments; files may grow to `file_size` bytes."""
    # the limit is set by a Python in between: a fork of this process, with jax's threads in it, is a warning
    limited = "import os, resource, sys; n = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))"
    start = [sys.executable, "-c", limited + "; os.execv(sys.executable, sys.argv[2:])", str(file_size)]
    return subprocess.run(
        [*start, sys.executable, "-m", "nanojax.data", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_full_disk_is_one_line_and_resumable(data: Path, tokenizer: Tokenizer) -> None:
    """When the disk refuses a write (here a file size limit of 16 kB): exit 2, one line with the file, nothing
    half-written; with room again the same command ends with the same shards as an undisturbed run."""
    tokenizer.save(data / "whole" / "tokenizer")
    arguments = ["tokenize", "--input", str(data / "text"), "--valid", "hash:0.05", "--shard-tokens", "9000"]
    arguments += ["--workers", "1", "--out"]
    full = command([*arguments, str(data / "out")], file_size=16_000)
    assert full.returncode == 2, full.stderr
    errors = [line for line in full.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "train_00000" in errors[0] and "cannot be written" in errors[0]
    assert "Traceback" not in full.stderr
    assert not files(data / "out") and not list((data / "out").rglob("*.tmp"))
    for out in ("out", "whole"):
        run(data, Options(valid="hash:0.05", shard_tokens=9000), out=out)
    assert files(data / "out") == files(data / "whole")


@pytest.mark.long
def test_killed_at_any_moment_restarts_exactly(data: Path, tokenizer: Tokenizer) -> None:
    """kill -9 at three moments, each followed by the same command: at the end the shards equal an undisturbed run's."""
    for n in range(3, 9):
        write(data / "text" / f"{n}.jsonl", [document(1000 * n + i) for i in range(1500)])
    tokenizer.save(data / "whole" / "tokenizer")
    options = Options(valid="hash:0.05", shard_tokens=100_000)
    run(data, options, out="whole")
    options_given = ["--valid", "hash:0.05", "--shard-tokens", "100000", "--workers", "1"]
    paths = ["--input", str(data / "text"), "--out", str(data / "out")]
    arguments = [sys.executable, "-m", "nanojax.data", "tokenize", *paths, *options_given]
    killed = 0
    for wanted in (1, 6, 11):  # when this many shard files are there
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(names(data / "out")) < wanted:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed >= 2
    run(data, options)
    assert files(data / "out") == files(data / "whole")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tokenize"], "required: --input, --out"),
        (["tokenize", "--input", "/absent", "--out", "/tmp/x"], "/absent: no such file"),
        (["tokenize", "--input", "x", "--out", "y", "--shard-tokens", "-5"], "'-5' is not a positive whole number"),
        (["tokenise"], "no subcommand 'tokenise'"),
        (["prepare", "--input", "/absent", "--out", "/proc/x", "--vocab", "10"], "/absent: no such file"),
        (["inspect", "--data", "/absent"], "/absent/tokenizer/tokenizer.json: no tokenizer"),
        (["tokenize", "--inputs", "x"], "--input"),
    ],
)
def test_bad_command_lines_are_one_line(arguments: list[str], message: str, monkeypatch, capsys) -> None:
    """Wrong arguments: exit 2 and one line on stderr that starts with `error:` and says what."""
    monkeypatch.setattr(sys, "argv", ["nanojax.data", *arguments])
    with pytest.raises(SystemExit) as exit:
        run_main(main)
    stderr = capsys.readouterr().err
    assert exit.value.code == 2
    assert len(stderr.splitlines()) == 1 and stderr.startswith("error: ") and message in stderr


@pytest.mark.parametrize("subcommand", ["prepare", "tokenizer"])
def test_unwritable_folder_is_reported_before_the_work(data: Path, monkeypatch, capsys, subcommand: str) -> None:
    """An --out that cannot be made ends the command before the first character is trained on."""
    (data / "file").write_text("in the way")
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained first"))
    arguments = [subcommand, "--input", str(data / "text"), "--vocab", "300", "--out", str(data / "file" / "out")]
    monkeypatch.setattr(sys, "argv", ["nanojax.data", *arguments])
    with pytest.raises(SystemExit) as exit:
        run_main(main)
    assert exit.value.code == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


def test_prepare_does_all_and_runs_again(data: Path, monkeypatch, capsys) -> None:
    """`prepare` gives tokenizer, shards and manifest; run again it changes nothing; another --vocab is refused."""
    arguments = [
        "prepare",
        "--input",
        str(data / "text"),
        "--vocab",
        "290",
        "--out",
        str(data / "new"),
        "--workers",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["nanojax.data", *arguments])
    run_main(main)
    assert "train: 1 shards" in capsys.readouterr().out
    before = files(data / "new")
    assert Tokenizer.load(data / "new" / "tokenizer").vocab_size == 290 and len(before) == 4
    run_main(main)
    assert files(data / "new") == before
    monkeypatch.setattr(sys, "argv", ["nanojax.data", *arguments, "--vocab", "300"])
    with pytest.raises(SystemExit):
        run_main(main)
    assert "has 290 ids, not 300" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", *SUBCOMMANDS])
def test_help_has_examples(name: str, monkeypatch, capsys) -> None:
    """--help of the command and of each subcommand exits 0 and ends with runnable examples."""
    monkeypatch.setattr(sys, "argv", ["nanojax.data", *([name] if name else []), "--help"])
    try:
        run_main(main)
    except SystemExit as exit:
        assert not exit.code
    assert f"python -m nanojax.data {name}" in capsys.readouterr().out.split("examples:")[1]


def test_hash_set_equals_a_python_set() -> None:
    """The hash set agrees with a set of integers over many batches with repeats, and its runs stay few."""
    rng = np.random.default_rng(0)
    seen = HashSet()
    reference = set()
    for _ in range(200):
        batch = rng.integers(0, 5000, rng.integers(0, 60)).astype(np.uint64)
        expected = []
        for value in batch.tolist():
            expected.append(value not in reference)
            reference.add(value)
        assert seen.add(batch).tolist() == expected
        assert seen.contains(batch).all()
    assert len(seen) == len(reference) and len(seen.runs) <= 14
    assert not seen.contains(np.array([6000], np.uint64)).any()
