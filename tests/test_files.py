"""Files appear whole or not at all; damaged JSON is one line; a folder is held by one process."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanojax import files
from nanojax.cli import UserError

ROOT = Path(__file__).parents[1]


def python(code: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, **options)


def test_a_file_replaces_the_old_one(tmp_path: Path) -> None:
    """Missing folders are made; nothing but the file is left; a second write replaces the first."""
    path = tmp_path / "a" / "b" / "file"
    for content in (b"old", b"new"):
        with files.write_atomic(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError(5, "bad disk", "another file")])
def test_an_exception_in_the_block_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    """The exception passes through unchanged; the old content stays and no temporary is left."""
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)) as raised, files.write_atomic(path) as file:
        file.write(b"half of the ne")
        raise error
    assert raised.value is error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    """SIGKILL after the content is written and before the rename; the next writer removes what it left."""
    path = tmp_path / "file"
    path.write_text("old")
    process = python(
        "import os, signal\nfrom nanojax import files\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"with files.write_atomic({str(path)!r}) as file: file.write(b'new')"
    )
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    (tmp_path / f"file.{os.getppid()}.tmp").write_text("of a process that runs")
    for left in tmp_path.glob("*.tmp"):
        os.utime(left, (0, 0))
    with files.write_atomic(path) as file:
        file.write(b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", f"file.{os.getppid()}.tmp"]


def test_a_killed_writer_of_a_folder(tmp_path: Path) -> None:
    """SIGKILL while files are written; the next writer removes what it left."""
    process = python(
        "import os, signal\nfrom nanojax import files\n"
        f"with files.write_folder({str(tmp_path / 'out')!r}) as out: (out / 'a').touch(), os.kill(os.getpid(), signal.SIGKILL)"
    )
    process.communicate(timeout=60)
    left = tmp_path / f"out.{process.pid}.tmp"
    assert list(tmp_path.iterdir()) == [left]
    os.utime(left, (0, 0))
    with files.write_folder(tmp_path / "out"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_refusing_disk_is_one_line(tmp_path: Path) -> None:
    """No such folder possible, a full disk, a folder in the way: UserError that names the file; no temporary is left."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    reasons = {"file/x": "File exists", "file/x/y": "Not a directory", "folder": "Is a directory"}
    for name, reason in reasons.items():
        match = rf"{name}: cannot be written \({reason}\)"
        with pytest.raises(UserError, match=match), files.write_atomic(tmp_path / name):
            pass
    full = pytest.raises(UserError, match=r"y: cannot be written \(No space left on device\)")
    with full, files.write_atomic(tmp_path / "y"):
        raise OSError(28, "No space left on device")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_an_empty_folder_in_the_way_is_replaced(tmp_path: Path) -> None:
    """A file stands where it was, whole."""
    (tmp_path / "x").mkdir()
    with files.write_atomic(tmp_path / "x") as file:
        file.write(b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_a_table_is_read(tmp_path: Path) -> None:
    """A JSON object comes back as a dict, whatever its letters."""
    path = tmp_path / "config.json"
    path.write_text('{"name": "größer", "sizes": {"D": 64}}', encoding="utf-8")
    assert files.read_table(path, "missing") == {"name": "größer", "sizes": {"D": 64}}


def test_a_table_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    """Missing: the caller's message. Empty, cut off, not UTF-8, not an object, a folder: the file and the reason."""
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"^no config here; train one$"):
        files.read_table(path, "no config here; train one")
    damaged = {
        b"": "Expecting value",
        b'{"a": 1': "Expecting ','",
        b'{"a": "\xff"}': "utf-8",
        b"[1]": "not a JSON table",
    }
    for content, reason in damaged.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"config\.json: unreadable \(.*{reason}.*\); copy it again"):
            files.read_table(path, "missing")
    with pytest.raises(UserError, match=r"unreadable \(.*Is a directory.*\); copy it again"):
        files.read_table(tmp_path, "missing")


def test_one_process_holds_a_folder(tmp_path: Path) -> None:
    """While one process holds it another gets one line at once; kill -9 releases it."""
    folder = tmp_path / "run"
    holder = python(
        "import time\nfrom nanojax import files\n"
        f"with files.locked({str(folder)!r}, '--train.run'):\n print('held', flush=True)\n time.sleep(600)"
    )
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        held = pytest.raises(UserError, match="run: another process is using it; stop that one first")
        with held, files.locked(folder, "--train.run"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    for _ in range(2):  # and a block that ends releases it too
        with files.locked(folder, "--train.run"):
            pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """The message names the option to change."""
    (tmp_path / "file").write_text("")
    refused = pytest.raises(UserError, match=r"cannot write there \(.*; choose another --train.run")
    with refused, files.locked(tmp_path / "file" / "run", "--train.run"):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The block runs, and a warning says what is missing; nobody is told to stop a process that is not there."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with files.locked(tmp_path / "run", "--train.run"):
        pass
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "has no locks (No locks available); make sure that no second process uses it" in said[0]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """It replaces an empty folder; an exception leaves nothing; a folder with files is refused before anything is written."""
    for made in (False, True):
        out = tmp_path / str(made) / "out"
        if made:
            out.mkdir(parents=True)
        with pytest.raises(KeyError), files.write_folder(out) as folder:
            (folder / "a").write_text("half")
            raise KeyError
        assert out.exists() == made and not list(out.parent.glob("*tmp"))
        with files.write_folder(out) as folder:
            (folder / "a").write_text("all")
            assert not (out / "a").exists()
        assert [p.name for p in out.iterdir()] == ["a"] and not list(out.parent.glob("*tmp"))
        with pytest.raises(UserError, match="is not empty; choose another folder"), files.write_folder(out):
            pass


def test_a_table_without_end(tmp_path: Path) -> None:
    """JSON nested deeper than Python recurses is unreadable, not a traceback."""
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"deep\.json: unreadable"):
        files.read_table(tmp_path / "deep.json", "missing")
