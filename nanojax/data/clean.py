"""The rules for documents: which are dropped, which are cut, which are duplicates, which are validation."""

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

import numpy as np

from nanojax.cli import UserError
from nanojax.data.kinds import Dropped
from nanojax.data.text import Source, Tally, documents

RULES = """\
  empty          nothing but white space, a null, a file of no bytes: dropped
  invalid UTF-8  a line of .txt or a document with bytes that are not UTF-8 (nor UTF-16 or UTF-32 throughout), or with
                 half a surrogate pair in JSON: dropped
  not JSON       a line, or a value of an array, that is not JSON: dropped
  no text        a JSON value with no text under the key: dropped
  binary         a NUL (in .txt, the line), or more than 1 ASCII control character per 50 bytes: dropped
  giant          over 1,000,000 characters: cut at white space into documents of at most that; a JSON line of 64 million
                 characters is dropped
  duplicate      (with --dedup) equal to an earlier document, byte for byte: dropped
  held out       equal to a validation document, byte for byte: dropped from training
More than 10 pieces that are invalid UTF-8, not JSON or no text are an error if they are over 5% of the text, of its first
10 million characters or of all."""
MAX_CHARS = 1_000_000
MIN_END = 0.05  # of a single file's text
FEW = 10  # validation documents that a hash rule gives at least, on average
_CONTROL = bytes({*range(1, 32), 127} - set(b"\t\n\f\r"))  # deleting these is 4 times as fast as a regex


def clean(document: str | Dropped) -> Iterator[str | Dropped]:
    """What the rules make of a document: itself, its parts if it is giant, or the reason why it is dropped."""
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
    """64 bits of blake2b over the UTF-8 bytes. Any two of 100 million documents collide with a probability of 1 in 3,700."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class HashSet:
    """A growing set of 64-bit document hashes in flat memory: 8 bytes per document, so 100 million take 0.8 GB.

    It is a list of sorted runs. A run is merged into the one before it once it has half that one's size, so every hash is
    copied O(log n) times in all.
    """

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(len(run) for run in self.runs)

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """bool [n]: which of the uint64 hashes [n] are in the set."""
        found = np.zeros(len(hashes), bool)
        for run in self.runs:
            at = np.searchsorted(run, hashes)
            found |= run[np.minimum(at, len(run) - 1)] == hashes
        return found

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Adds the hashes; bool [n]: those that were not in the set before (of equal ones, only the first)."""
        first = np.zeros(len(hashes), bool)
        first[np.unique(hashes, return_index=True)[1]] = True
        first &= ~self.contains(hashes)
        new = np.sort(hashes[first])
        while len(new) and self.runs and len(self.runs[-1]) < 2 * len(new):
            new = np.sort(np.concatenate([self.runs.pop(), new]), kind="stable")
        if len(new):
            self.runs.append(new)
        return first


class Split:
    """Which documents are validation, by a rule.

    `hash:F` is a fraction F of the documents, by hash; `end:F` the last F of all text; `last` the last input file; anything
    else a file name or glob among the inputs' names. Every rule but `end` puts equal documents on the same side.

    * With fewer than FEW/F documents, and with a single .txt, `hash:F` would be a matter of luck: it becomes `end`, and so
      does `last` with a single file. The share is F, at least MIN_END. A data folder that has shards (`grown`) keeps what
      it had: `before` has the names of its validation files.
    * If inputs are named as training files (train-00000.parquet), `hash` and `last` hold out those named validation, valid,
      val, dev or eval, if there are any, and files named test are left out.

    `held` and `training` are the files of the two sides, and `left_out` the others with the reason. Under a hash rule
    (`threshold` > 0) `held` is empty. `by_file` says that whole files are held out.
    UserError: a rule that makes no sense, or leaves one side empty.
    """

    def __init__(
        self, rule: str, sources: list[Source], key: str, before: frozenset[str] = frozenset(), grown: bool = False
    ):
        self.held: list[Source] = []
        self.training = sources
        self.left_out: dict[str, str] = {}
        self.threshold = np.uint64(0)
        self.by_file = False
        kind, share = _rule(rule)
        if kind in ("hash", "last"):
            self._leave_out_tests()
            marked = [source for source in self.training if split_of(source.name) == "valid"]
            if marked and any(split_of(source.name) == "train" for source in self.training):
                self._hold(marked, rule)
                return
            one = len(self.training) == 1
            as_before = not grown or any(_end_name(source) in before for source in self.training)
            if as_before and (one if kind == "last" else _few(self.training, share, key)):
                kind, share = "end", max(share, MIN_END)
        if kind == "hash":
            self.threshold = np.uint64(int(share * 2.0**64))
        elif kind == "end":
            self.held, self.training = _end(self.training, share, key)
        elif kind == "last":
            chosen = [source for source in self.training if source.name in before]
            self._hold(chosen if before else self.training[-1:], rule)
        else:
            self._hold([source for source in sources if fnmatchcase(source.name, rule)], rule)
            self._leave_out_tests()

    def _hold(self, held: list[Source], rule: str) -> None:
        if not held and rule != "last":
            raise UserError(f"--valid={rule}: matches none of the inputs, e.g. {self.training[0].name}")
        self.held = held
        self.by_file = True
        self.training = [source for source in self.training if source not in held]
        if not self.training:
            raise UserError(f"--valid={rule}: all inputs would be validation; use end:0.05, the end of the last file")

    def _leave_out_tests(self) -> None:
        if any(split_of(source.name) == "train" for source in self.training):
            tests = [source for source in self.training if split_of(source.name) == "test"]
            self.training = [source for source in self.training if source not in tests]
            self.left_out = {source.name: "a test file beside training files" for source in tests}

    def chosen(self, hashes: np.ndarray) -> np.ndarray:
        """bool [documents]: those whose uint64 hash makes them validation (all False when the rule names files)."""
        return hashes < self.threshold


def split_of(name: str) -> str:
    """ "train", "valid" or "test" if the name of a file or folder on its path says so, as on the hub; or ""."""
    for split, words in (("test", "test"), ("valid", "validation|valid|val|dev|eval"), ("train", "train|training")):
        if re.search(rf"(?:^|[/._-])(?:{words})(?=[/._-]|$)", name.lower()):
            return split
    return ""


def _rule(rule: str) -> tuple[str, float]:
    kind, colon, number = rule.partition(":")
    if kind not in ("hash", "end") or not colon:
        return ("last" if rule == "last" else "name"), 0.0
    try:
        share = float(number)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise UserError(f"--valid={rule}: the fraction after {kind}: must be between 0 and 1, as in {kind}:0.01")
    return kind, share


def _end_name(source: Source) -> str:
    return f"{source.name} (end)"


def _few(sources: list[Source], share: float, key: str) -> bool:
    """Whether a hash rule holds out less than a handful of documents, or pieces of a single text."""
    if len(sources) == 1 and ".txt" in sources[0].path.name.lower():
        return True
    enough = math.ceil(FEW / share)
    tally = Tally()
    found = (1 for source in sources for _ in _texts(source, key, tally))
    return sum(itertools.islice(found, enough)) < enough


def _texts(source: Source, key: str, tally: Tally) -> Iterator[str]:
    """The source's documents that can be read; UserError early if too many cannot."""
    for document in documents(source, 0, key):
        tally.add(document)
        if isinstance(document, str):
            yield document


def _end(sources: list[Source], share: float, key: str) -> tuple[list[Source], list[Source]]:
    """(the end of all text, what comes before it); the file where the end begins is on both sides."""
    tally = Tally()
    lengths = [[len(text) for text in _texts(source, key, tally)] for source in sources]
    cut = _cut(sources, lengths, share, key)
    held = []
    training = []
    begin = 0
    for source, of_source in zip(sources, lengths):
        inside = cut - begin
        begin += sum(of_source)
        if cut < begin:
            held.append(dataclasses.replace(source, name=_end_name(source), begin=max(0, inside)))
        if inside > 0 or not sum(of_source):
            training.append(dataclasses.replace(source, end=inside if cut < begin else None))
    return held, training


def _cut(sources: list[Source], lengths: list[list[int]], share: float, key: str) -> int:
    """Where the end begins, in characters of all text: between documents if one ends near there, or else between lines."""
    total = sum(map(sum, lengths))
    wanted = max(0, min(int(total * (1 - share)), total - 1))
    borders = (border for border in itertools.accumulate(itertools.chain(*lengths)) if border < total)
    near = min(borders, key=lambda border: abs(border - wanted), default=-total)
    if 2 * abs(near - wanted) <= total - wanted:
        return near
    at = 0
    for source in sources:
        for text in _texts(source, key, Tally()):
            if at + len(text) > wanted:
                inside = wanted - at
                ends = (text.find(end, inside, inside + 10_000) + 1 for end in ("\n", " "))
                return at + next((cut for cut in ends if 0 < cut < len(text)), inside or 1)
            at += len(text)
    return 0
