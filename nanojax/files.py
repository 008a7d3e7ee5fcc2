"""Files and folders that appear whole or not at all, JSON files that a user may have damaged, folders that one process holds."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nanojax.cli import UserError

IDLE = 60.0  # seconds without a write after which a temporary file of no process is left over


@contextlib.contextmanager
def write_atomic(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Opens a temporary file in the folder of `path`; it becomes `path` when the block ends without an exception.

    The folder is made if it is missing. The content reaches the disk before the name does, so a crash leaves the old
    file or the new one. After an exception the old file is unchanged and no temporary file is left. What needs a path
    rather than an open file may write to `file.name`. An empty folder in the place of the file is replaced.

        with files.write_atomic(run / "config.json") as file:
            file.write(text.encode())

    Raises:
      UserError: the file cannot be made or written (permissions, full disk).
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):
            path.rmdir()  # does nothing unless it is an empty folder
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError) or Path(error.filename or temporary) not in (temporary, *path.parents):
            raise  # the block's own exception, or an OSError about a file that it reads
        raise write_error(path, error) from None


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes `content` as indented JSON, whole or not at all."""
    with write_atomic(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


@contextlib.contextmanager
def write_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder beside `path` to write files in. When the block ends it becomes `path`; after an exception it is removed.

    Raises:
      UserError: `path` is there and not empty, or cannot be made or written.
    """
    path = Path(path)
    check_empty(path)
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir():
            path.rmdir()
        os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise write_error(path, error) from None


def _temporary(path: Path) -> Path:
    """The name under which `path` is written. What a killed process left under such a name a minute ago is removed."""
    with contextlib.suppress(OSError):
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
            pid = left.name.split(".")[-2]
            idle = time.time() - left.stat().st_mtime  # on a shared disk the process may be another machine's
            if pid.isdecimal() and not _runs(int(pid)) and idle > IDLE:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def _runs(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def check_empty(folder: str | os.PathLike) -> None:
    """UserError unless `folder` is empty or not there, so that what is written in it never mixes with other files."""
    try:
        if any(Path(folder).iterdir()):
            raise UserError(f"{folder}: is not empty; choose another folder")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror})") from None


def write_error(path: str | os.PathLike, error: OSError) -> UserError:
    """The one-line error of a file that could not be written and of which nothing is left."""
    return UserError(
        f"{path}: cannot be written ({error.strerror or error}); nothing half-written is left: free space or "
        "permissions, then run the same command again"
    )


def read_table(path: str | os.PathLike, missing: str) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Args:
      missing: the whole message of the error if there is no such file; only the caller knows what to do then.

    Raises:
      UserError: the file is missing, cannot be read, is not JSON, or holds something other than an object.
    """
    path = Path(path)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({error}); copy it again") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: unreadable (not a JSON table); copy it again")
    return table


@contextlib.contextmanager
def locked(folder: str | os.PathLike, option: str) -> Iterator[None]:
    """Makes `folder` if needed and holds it until the block ends; the kernel releases it if the process is killed.

    Where the file system has no locks (some NFS, Lustre and FUSE mounts), a warning says so and the block runs.

    Args:
      folder: the file `lock` in it carries the lock.
      option: the command-line option that names the folder, for the messages: "--train.run".

    Raises:
      UserError: another process holds the folder, or it cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")  # noqa: SIM115  closed below
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror}); choose another {option}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"{folder}: another process is using it; stop that one first") from None
            reason = f"this file system has no locks ({error.strerror})"
            print(f"warning: {folder}: {reason}; make sure that no second process uses it", file=sys.stderr)
        yield
