"""Preparing a mixture: what is in the folder is what was rendered; what is wrong is one line and leaves nothing behind."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanojax.cli import UserError
from nanojax.conversation import render
from nanojax.tasks import download, mixture, prepare, prepared, show, stream
from nanojax.tokenizer import Tokenizer

TOKENIZER = Tokenizer([*(bytes([b]) for b in range(256)), b"ab"])
WORDS = [f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "nrst"]


def messages(i: int) -> list[dict]:
    return [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i} ünïté"}]


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(tasks: list[str], out: Path, source: Path = Path("none")) -> dict:
    entries = [mixture.parse(task) for task in tasks]
    return prepare.prepare(entries, source, TOKENIZER, lambda: WORDS, out, quiet=True)


def hub_folder(folder: Path) -> Path:
    """Two tasks as the hub has them: parquet of two files, and a compressed file of one's own."""
    for number in range(2):
        path = folder / "smoltalk/default/train" / f"000{number}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"messages": [messages(2 * number), messages(2 * number + 1)]}), path)
    (folder / "smoltalk/default/test").mkdir()
    pq.write_table(pa.table({"messages": [messages(9)]}), folder / "smoltalk/default/test/0000.parquet")
    (folder / "gsm8k").mkdir()
    problem = json.dumps({"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"})
    (folder / "gsm8k/train.jsonl.gz").write_bytes(gzip.compress(f"{problem}\n\n{problem}\n".encode()))
    write(folder / "gsm8k/test.jsonl", [{"question": "2+2?", "answer": "#### 4"}])
    return folder


def test_a_mixture_is_what_was_rendered(tmp_path: Path) -> None:
    """Every conversation of every kind of task, ids and mask, in the order of the entries; the first of 50 is held out."""
    own = write(tmp_path / "own.jsonl", [{"messages": messages(i)} for i in range(60)])
    bare = write(tmp_path / "bare.jsonl", [messages(i) for i in range(100, 103)])
    tasks = [f"{own}:2", "smoltalk", "gsm8k:4", "spelling:7", "sums:5", str(bare)]
    content = make(tasks, tmp_path / "out", hub_folder(tmp_path / "texts"))
    counts = [(e["repeats"], e["train"], e["valid"]) for e in content["entries"]]
    assert counts == [(2, 58, 2), (1, 4, 1), (4, 2, 1), (1, 7, 256), (1, 5, 256), (1, 2, 1)]
    tokenizer, train = prepared.load(tmp_path / "out", "train")
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    expected = [messages(i) for i in range(60) if i not in (0, 50)] + [messages(i) for i in range(4)]
    for number, conversation in enumerate(expected):
        ids, mask = train[number]
        assert (ids.tolist(), mask.tolist()) == render(TOKENIZER, conversation)
    assert "<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>" in TOKENIZER.decode(train[62][0])
    assert TOKENIZER.decode(train[len(train) - 1][0]).startswith("<|bos|><|user_start|>say 102")
    _, valid = prepared.load(tmp_path / "out", "valid")
    assert valid[2][0].tolist() == render(TOKENIZER, messages(9))[0] and len(valid) == 517
    again = make(tasks, tmp_path / "again", tmp_path / "texts")
    assert again["files"] == content["files"]


@pytest.mark.parametrize(
    "rows, says",
    [
        ([{"messages": messages(1)}, {"messages": [{"role": "assistant", "content": "a"}]}], "line 2: message 0: role"),
        ([{"text": "a"}], "line 1: no conversation"),
        ([3], "line 1: no conversation"),
        ([{"messages": messages(1)}], "no conversation to train on"),
        ([], "no conversation to train on"),
    ],
)
def test_a_bad_file_is_named_and_nothing_is_left(tmp_path: Path, rows: list, says: str) -> None:
    """File and line; no folder remains, so the command can be repeated."""
    path = write(tmp_path / "own.jsonl", rows)
    with pytest.raises(UserError, match=says):
        make([str(path)], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["own.jsonl"]


def test_lines_that_are_not_json(tmp_path: Path) -> None:
    """A cut line, as a crash leaves it; a parquet file that is none; a row of another task."""
    (tmp_path / "cut.jsonl").write_text(json.dumps(messages(1)) + '\n[{"role": "us')
    with pytest.raises(UserError, match=r"cut.jsonl line 2: not JSON"):
        make([str(tmp_path / "cut.jsonl")], tmp_path / "out")
    folder = hub_folder(tmp_path / "texts")
    (folder / "smoltalk/default/train/0001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"0001.parquet: damaged"):
        make(["smoltalk"], tmp_path / "out", folder)
    write(folder / "gsm8k/test.jsonl", [{"prompt": "x"}])
    with pytest.raises(UserError, match=r"test.jsonl line 1: not a row of this task \(KeyError"):
        make(["gsm8k"], tmp_path / "out", folder)


@pytest.mark.parametrize(
    "task, says",
    [
        ("nothing", "no such file"), ("spelling", "spelling:10000"), ("sums:0", "from 1 to"),
        ("humaneval", "evaluation"), ("mmlu:x", "no such file"),
    ],
)  # fmt: skip
def test_a_task_that_is_none(task: str, says: str) -> None:
    """Before anything is read."""
    with pytest.raises(UserError, match=says):
        mixture.parse(task)


def test_missing_rows_say_how_to_fetch_them(tmp_path: Path) -> None:
    """The command to copy."""
    with pytest.raises(UserError, match=r"python -m nanojax.tasks download mmlu --out"):
        make(["mmlu"], tmp_path / "out", tmp_path)


@pytest.mark.parametrize(
    "name", ["train.tokens", "train.mask", "train.ends", "mixture.json", "tokenizer/tokenizer.json"]
)
def test_damage_is_seen(tmp_path: Path, name: str) -> None:
    """A flipped bit, a cut end and a missing file of a prepared folder are one line that names the file."""
    made = tmp_path / "made"
    make(["sums:30"], made)
    for i, damage in enumerate([lambda b: bytes([b[0] ^ 1]) + b[1:], lambda b: b[:-2], None]):
        folder = tmp_path / f"copy{i}"
        shutil.copytree(made, folder)
        path = folder / name
        path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
        with pytest.raises(UserError, match=path.name if damage or path.name != "mixture.json" else "no prepared"):
            prepared.load(folder, "train")


def test_rows_are_found_again(tmp_path: Path) -> None:
    """A restored stream continues in any pass as the first one went on, with rows of another batch size, too."""
    make(["sums:40"], tmp_path / "out")
    _, batches = stream.train_iterator(str(tmp_path / "out"), 3, 150, 5, 300)
    per_pass = batches.stream.at(0).plan.rows
    taken, states = [], []
    for _ in range(2 * per_pass):
        states.append(batches.get_state())
        taken.append(next(batches))
    for at in (0, 1, per_pass // 3, per_pass, 2 * per_pass - 2):
        _, other = stream.train_iterator(str(tmp_path / "out"), 3, 150, 5, 300)
        other.set_state(json.loads(json.dumps(states[at])))
        for expected in taken[at : at + 2]:
            assert np.array_equal(next(other), expected)
    flat = np.concatenate(taken)[: 2 * per_pass]
    first, second = np.split(flat, 2)
    assert not np.array_equal(first, second)  # each pass has an order of its own
    make(["sums:41"], tmp_path / "more")
    _, other = stream.train_iterator(str(tmp_path / "more"), 3, 150, 5, 300)
    with pytest.raises(UserError, match="was made with conversations"):
        other.set_state(states[1])


def test_the_viewer(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal supervised spans stand in brackets; with colours they have their own; ids on request."""
    make(["sums:30"], tmp_path / "out")
    tokenizer, of = prepared.load(tmp_path / "out", "train")
    show.main([str(tmp_path / "out"), "--conversation=3", "--count=2"])
    lines = capsys.readouterr().out
    assert "--- conversation 4:" in lines and "<|assistant_start|>「<|python_start|>" in lines
    assert "<|python_end|>」<|output_start|>" in lines and "<|assistant_end|>」\n" in lines
    text = show.shown(tokenizer, *of[3])
    green = "".join(text.plain[s.start : s.end] for s in text.spans if s.style == show.SUPERVISED)
    ids, mask = of[3]
    assert green == tokenizer.decode(ids[mask == 1]) and text.plain == tokenizer.decode(ids)
    show.main([str(tmp_path / "out"), "--row=0", "--seq=100", "--ids"])
    assert f"<|bos|>[{tokenizer.bos}]" in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "argv", ["x"])
    show.main([str(tmp_path / "out")])
    assert "\x1b[1;32m" in capsys.readouterr().out
    for wrong in (["--conversation=30"], ["--row=99"], ["--conversation=-1"]):
        with pytest.raises(UserError, match="there are 0 to"):
            show.main([str(tmp_path / "out"), *wrong])


def test_download_names_a_task_that_is_none(tmp_path: Path) -> None:
    """Before anything is asked."""
    with pytest.raises(UserError, match="no such task; there are smoltalk"):
        download.fetch(["smaltalk"], tmp_path)


@pytest.mark.parametrize("number", ["0", "-1", "10000001", "9" * 20, "9" * 5000])
def test_a_number_out_of_reach_is_refused(number: str) -> None:
    """None and more than a mixture can be are mistakes, at once; longer digits than that are no number."""
    with pytest.raises(UserError, match="from 1 to 10,000,000" if len(number) < 100 else "nor a task"):
        mixture.parse(f"spelling:{number}")


@pytest.mark.parametrize("bad", [b"h\xe9i", b"h\\ud800i"])
def test_text_that_is_none_is_named(tmp_path: Path, bad: bytes) -> None:
    """A byte that is not UTF-8 and half a surrogate pair end it with file and line; nothing is trained on in its place."""
    own = write(tmp_path / "own.jsonl", [{"messages": messages(i)} for i in range(3)])
    own.write_bytes(own.read_bytes().replace(b"say 1", bad))
    with pytest.raises(UserError, match=r"own\.jsonl line 2: bytes that are not UTF-8"):
        make([str(own)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
