"""The stated rules for documents: which are dropped, which are cut, how they are hashed and split."""

import hashlib
from collections.abc import Iterator

import numpy as np

from nanojax.cli import UserError
from nanojax.data.text import Dropped, Source

RULES = """\
  empty          nothing but white space: dropped
  invalid UTF-8  bytes that are not UTF-8, or half a surrogate pair in JSON: the document is dropped
  binary         a NUL, or more than 1 in 50 bytes an ASCII control character: dropped
  giant          over 1,000,000 characters: cut at white space into documents of at most that; a JSON line over 64 MiB
                 is dropped
  duplicate      (with --dedup) a document that came before, byte for byte: dropped
  held out       equal to a validation document, byte for byte: dropped from training"""
MAX_CHARS = 1_000_000
_CONTROL = bytes({*range(1, 32), 127} - set(b"\t\n\f\r"))  # deleting these from bytes is 4 times faster than a regex


def clean(document: str | Dropped) -> Iterator[str | Dropped]:
    """The document under the rules: itself, its parts when it is giant, or what it was dropped for."""
    if isinstance(document, Dropped):
        yield document
    elif not document or document.isspace():
        yield Dropped("empty")
    elif _is_binary(document.encode()):
        yield Dropped("binary")
    elif len(document) <= MAX_CHARS:
        yield document
    else:
        begin = 0
        while begin < len(document):
            end = min(begin + MAX_CHARS, len(document))
            if end < len(document):
                cut = max(document.rfind("\n", begin, end), document.rfind(" ", begin, end)) + 1
                end = cut if cut > begin else end
            if not document[begin:end].isspace():
                yield document[begin:end]
            begin = end


def _is_binary(data: bytes) -> bool:
    return b"\x00" in data or (len(data) - len(data.translate(None, _CONTROL))) * 50 > len(data)


def document_hash(text: str) -> int:
    """64 bits of blake2b over the UTF-8 bytes: among 100 million documents a false match has a chance of 1 in 3,700."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Split:
    """Which documents are validation. Rules: `hash:F` (a fraction F of documents, by hash), `last` (the last input
    file), or a file name or glob among the inputs' names. Every rule keeps equal documents on one side."""

    def __init__(self, rule: str):
        self.rule = rule
        self.fraction = 0.0
        if rule.startswith("hash:"):
            try:
                self.fraction = float(rule[5:])
            except ValueError:
                self.fraction = -1.0
            if not 0 < self.fraction < 1:
                raise UserError(f"--valid={rule}: the fraction after hash: must be between 0 and 1, as in hash:0.01")
        self.threshold = np.uint64(int(self.fraction * 2.0**64))

    def files(self, sources: list[Source]) -> list[Source]:
        """The held-out files among the sources; UserError when there are none, or nothing is left for training."""
        if self.fraction:
            return []
        if self.rule == "last":
            held = sources[-1:]
        else:
            from fnmatch import fnmatchcase

            held = [source for source in sources if fnmatchcase(source.name, self.rule)]
        if not held:
            raise UserError(f"--valid={self.rule}: matches none of the inputs, e.g. {sources[0].name}")
        if len(held) == len(sources):
            raise UserError(f"--valid={self.rule}: all inputs would be validation; use hash:0.01 for a single file")
        return held

    def chosen(self, hashes: np.ndarray) -> np.ndarray:
        """bool [documents]: those whose uint64 hash makes them validation (all False under a rule of files)."""
        return hashes < self.threshold
