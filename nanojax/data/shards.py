"""Token shards: flat little-endian uint16 files, each with a JSON that describes it; written atomically."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from nanojax import files
from nanojax.cli import UserError

FORMAT = "nanojax-tokens-1"
_NAME = re.compile(r"(train|valid)_(\d{5})\.json")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One token shard as its JSON describes it; `path` is the .bin file, `meta` the whole JSON."""

    path: Path
    number: int
    tokens: int
    documents: int
    sha256: str
    fingerprint: str
    meta: dict[str, Any] = dataclasses.field(compare=False)

    @property
    def name(self) -> str:
        """For example train_00007."""
        return self.path.stem

    def open(self) -> np.ndarray:
        """uint16 [tokens], memory-mapped. UserError when the file is missing or has another length."""
        self.check_size()
        try:
            return np.memmap(self.path, np.dtype("<u2"), mode="r", shape=(self.tokens,))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None

    def check_size(self) -> os.stat_result:
        """The file's stat. UserError unless its length is the one recorded."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            raise UserError(f"{self.path}: this token shard is missing; copy it again or rerun tokenize") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        if stat.st_size != 2 * self.tokens:
            raise UserError(
                f"{self.path}: {stat.st_size} bytes where {2 * self.tokens} are recorded (truncated or still being "
                "copied); copy it again, or delete it with its .json and rerun tokenize"
            )
        return stat

    def verify(self) -> None:
        """Reads the whole file; UserError unless its sha256 is the recorded one."""
        self.check_size()
        try:
            with open(self.path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        if digest != self.sha256:
            raise UserError(
                f"{self.path}: content does not match its sha256 (corrupted); copy it again, or delete it with its "
                ".json and rerun tokenize"
            )


def find_shards(folder: str | os.PathLike, split: str, fingerprint: str) -> list[Shard]:
    """The folder's shards of a split ("train" or "valid") by number. Only their JSON is read, no token.

    UserError names the shard that is missing, damaged, or made with a tokenizer of another fingerprint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no data folder there; `python -m nanojax.data prepare --input TEXTS --out={folder}` makes one"
        )
    entries = sorted(entry.name for entry in os.scandir(folder) if _NAME.fullmatch(entry.name))
    shards = [_read(folder / name) for name in entries if name.startswith(split)]
    for expected, shard in enumerate(shards):
        if shard.number != expected:
            raise UserError(
                f"{folder / f'{split}_{expected:05d}.json'}: missing, though {shard.name} is there; copy it again"
            )
        if shard.fingerprint != fingerprint:
            raise UserError(
                f"{shard.path}: made with another tokenizer (fingerprint {shard.fingerprint[:12]}, this folder's is "
                f"{fingerprint[:12]}); tokenize again into a new folder"
            )
        shard.check_size()
    return shards


def _read(path: Path) -> Shard:
    try:
        raw = path.read_bytes()
        meta = json.loads(raw)
        if meta["format"] != FORMAT or raw != _dump(meta):
            raise UserError(f"{path}: damaged (its own checksum does not match); copy it again or rerun tokenize")
        matched = _NAME.fullmatch(path.name)
        assert matched
        return Shard(
            path.with_suffix(".bin"), int(matched[2]), int(meta["tokens"]), int(meta["documents"]), meta["sha256"],
            meta["tokenizer"], meta,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged ({type(error).__name__}); copy it again or rerun tokenize") from None


def _dump(meta: dict[str, Any]) -> bytes:
    body = {name: value for name, value in meta.items() if name != "self_sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "self_sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


class Writer:
    """Writes one shard: `append` tokens, then `commit`. Until then only a .tmp file exists, which `discard` removes."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / f"{name}.bin"
        self.temporary = folder / f"{name}.bin.tmp"
        self.tokens = self.documents = 0
        self.digest = hashlib.sha256()
        try:
            self.file = open(self.temporary, "wb")  # noqa: SIM115 (closed by commit or discard)
        except OSError as error:
            raise files.write_error(self.temporary, error) from None

    def append(self, tokens: np.ndarray, documents: int) -> None:
        """Adds uint16 tokens [n] of whole documents."""
        data = np.ascontiguousarray(tokens, np.dtype("<u2")).tobytes()
        try:
            self.file.write(data)
        except OSError as error:
            self.discard()
            raise files.write_error(self.path, error) from None
        self.digest.update(data)
        self.tokens += len(tokens)
        self.documents += documents

    def commit(self, meta: dict[str, Any]) -> Shard:
        """Makes the shard visible: data first, then JSON, each by a rename after fsync."""
        meta = {
            "format": FORMAT, "dtype": "uint16", **meta,
            "tokens": self.tokens, "documents": self.documents, "sha256": self.digest.hexdigest(),
        }  # fmt: skip
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.temporary, self.path)
            with files.write_atomic(self.path.with_suffix(".json")) as file:
                file.write(_dump(meta))
        except OSError as error:
            self.discard()
            raise files.write_error(self.path, error) from None
        return _read(self.path.with_suffix(".json"))

    def discard(self) -> None:
        """Forgets the unfinished shard."""
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self.file.close()
        self.temporary.unlink(missing_ok=True)
