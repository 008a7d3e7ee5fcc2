"""A folder of prepared conversations: their tokens, which are supervised, and the mixture; written whole, read by number.

FOLDER/tokenizer/       the tokenizer whose ids these are
FOLDER/mixture.json     entries with counts, and size and sha256 of the other files
FOLDER/train.tokens     uint16, the conversations end to end; likewise valid.*
FOLDER/train.mask       uint8, 1 where a token is supervised
FOLDER/train.ends       int64, where each conversation ends
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from nanojax import files
from nanojax.cli import UserError
from nanojax.conversation import Tokens
from nanojax.tokenizer import Tokenizer

FILE = "mixture.json"
FORMAT = "nanojax-conversations-1"
DTYPES = {"tokens": "<u2", "mask": "|u1", "ends": "<i8"}


@dataclasses.dataclass(frozen=True)
class Conversations:
    """The conversations of one split, in order of the entries.

    Attributes:
      counts: conversations of each entry.
      repeats: how often each entry's come in one pass.
      sha256: of all three files.
    """

    tokens: np.ndarray  # uint16 [tokens]
    mask: np.ndarray  # uint8 [tokens]
    ends: np.ndarray  # int64 [conversations]
    counts: tuple[int, ...]
    repeats: tuple[int, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask) of a conversation."""
        part = slice(int(self.ends[number - 1]) if number else 0, int(self.ends[number]))
        return self.tokens[part], self.mask[part]


class Writer:
    """Writes a split's files, in a folder that nobody reads yet; a context that closes them."""

    def __init__(self, folder: Path, split: str):
        self.paths = {kind: folder / f"{split}.{kind}" for kind in DTYPES}
        self.files = {kind: open(path, "wb") for kind, path in self.paths.items()}  # noqa: SIM115  closed by __exit__
        self.counts: list[int] = []
        self.tokens = self.supervised = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self.files.values():
            file.close()

    def begin_entry(self) -> None:
        """The conversations from here on are of the next entry."""
        self.counts.append(0)

    def append(self, conversation: Tokens) -> None:
        """Adds a conversation."""
        ids, mask = conversation
        self.tokens += len(ids)
        self.supervised += sum(mask)
        self.counts[-1] += 1
        for kind, values in (("tokens", ids), ("mask", mask), ("ends", [self.tokens])):
            self.files[kind].write(np.array(values, DTYPES[kind]).tobytes())

    def finished(self) -> dict[str, dict[str, Any]]:
        """What was written, on the disk: {file name: {"bytes", "sha256"}}."""
        out = {}
        for kind, path in self.paths.items():
            self.files[kind].flush()
            os.fsync(self.files[kind].fileno())
            with open(path, "rb") as file:
                out[path.name] = {
                    "bytes": path.stat().st_size,
                    "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                }
        return out


def write_mixture(folder: Path, content: dict[str, Any]) -> None:
    """mixture.json with a checksum of its own."""
    files.write_json(
        folder / FILE, {**content, "format": FORMAT, "self_sha256": _digest({**content, "format": FORMAT})}
    )


def is_prepared(folder: str | os.PathLike) -> bool:
    """Whether the folder is one of prepared conversations."""
    return (Path(folder) / FILE).is_file()


def read_mixture(folder: str | os.PathLike) -> dict[str, Any]:
    """mixture.json. UserError if the folder is none of this kind, or the file is damaged."""
    path = Path(folder) / FILE
    content = files.read_table(
        path, f"{folder}: no prepared conversations there; python -m nanojax.tasks prepare --help"
    )
    own = {name: value for name, value in content.items() if name != "self_sha256"}
    if content.get("format") != FORMAT or content.get("self_sha256") != _digest(own):
        raise UserError(f"{path}: damaged, or of another version of nanojax; copy it again or prepare anew")
    return content


def fingerprint(folder: str | os.PathLike) -> str:
    """A hash of the folder's files and its tokenizer, as mixture.json describes them."""
    content = read_mixture(folder)
    return _digest({key: content[key] for key in ("tokenizer", "files")})[:16]


def load(folder: str | os.PathLike, split: str, verify: bool = True) -> tuple[Tokenizer, Conversations]:
    """The tokenizer and the conversations of "train" or "valid". UserError names the file that is missing or damaged.

    Args:
      verify: compare every file's sha256, at about 1 GB per second; otherwise only its size.
    """
    folder = Path(folder)
    content = read_mixture(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    if tokenizer.fingerprint != content["tokenizer"]:
        raise UserError(f"{folder}: prepared with another tokenizer than its own tokenizer/; prepare anew")
    arrays, digest = {}, hashlib.sha256()
    for kind, dtype in DTYPES.items():
        path = folder / f"{split}.{kind}"
        wanted = content["files"][path.name]
        arrays[kind] = _open(path, dtype, wanted, verify)
        digest.update(wanted["sha256"].encode())
    entries = content["entries"]
    counts = tuple(entry[split] for entry in entries)
    return tokenizer, Conversations(**arrays, counts=counts, repeats=tuple(e["repeats"] for e in entries),
                                    sha256=digest.hexdigest())  # fmt: skip


def _open(path: Path, dtype: str, wanted: dict[str, Any], verify: bool) -> np.ndarray:
    advice = "copy the folder again or prepare anew"
    try:
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise UserError(f"{path}: {size} bytes where {wanted['bytes']} are recorded; {advice}")
        if verify:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != wanted["sha256"]:
                    raise UserError(f"{path}: content does not match its sha256; {advice}")
        return np.memmap(path, np.dtype(dtype), mode="r") if size else np.zeros(0, dtype)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {advice}") from None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
