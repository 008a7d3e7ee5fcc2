"""Tokens of one answer as text: characters whole, cut before a stop string, the calculator's steps apart, no special token."""

import codecs
from collections.abc import Sequence
from typing import Any, NamedTuple

from nanojax.conversation import PARTS
from nanojax.engine.slots import Scores
from nanojax.tokenizer import SPECIAL_TOKENS, Tokenizer

LEAST = -9999.0  # what JSON has no number for


class Scored(NamedTuple):
    """A token, its log-probability (None: nothing stands before it), and the likeliest in its place with theirs."""

    id: int
    logprob: float | None
    top: list[tuple[int, float]]


class Piece(NamedTuple):
    """What can be shown now, in its order: parts as in conversation.py, of which a step of the calculator's is complete."""

    parts: list[dict[str, str]]
    tokens: list[Scored]

    @property
    def text(self) -> str:
        """Without the steps."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    @property
    def has_steps(self) -> bool:
        return any(part["type"] != "text" for part in self.parts)


class Answer:
    """An answer as it grows. `count` is its tokens so far; `stopped`, whether a stop string has ended it.

    Args:
      chat: whether the calculator's steps are parts of it. If not, their special tokens are left out as all others are.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), chat: bool = True):
        self.tokenizer, self.stops, self.chat = tokenizer, tuple(stops), chat
        self.special = {tokenizer.special(name) for name in SPECIAL_TOKENS}
        kinds = {kind: names[:2] for kind, names in PARTS.items() if names[0]} if chat else {}
        self.opens = {tokenizer.special(before): kind for kind, (before, _) in kinds.items()}
        self.closes = {tokenizer.special(after) for _, after in kinds.values()}
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""  # text that may be the beginning of a stop string
        self.step: tuple[str, list[int]] | None = None  # one that is not complete
        self.count, self.stopped = 0, False

    def feed(self, ids: Sequence[int], scores: Scores | None = None) -> Piece:
        """Some more tokens; those behind a stop string are left out."""
        parts, tokens = [], []
        for i, id in enumerate(ids):
            if self.stopped:
                break
            self.count += 1
            inside = self.step is not None or id in self.special
            if scores is not None and not (self.chat and inside):
                tokens.append(scored(id, scores, i))
            self._take(id, parts)
        return Piece(parts, tokens)

    def rest(self) -> Piece:
        """What is left at the end: text that began no stop string, half a character as U+FFFD, a step that was cut."""
        parts = []
        if not self.stopped:
            self._end_text(parts)
            self._end_step(parts)
        return Piece(parts, [])

    def _take(self, id: int, parts: list[dict[str, str]]) -> None:
        if id in self.opens or id in self.closes:
            self._end_text(parts)
            self._end_step(parts)
            self.step = (self.opens[id], []) if id in self.opens else None
        elif id in self.special:
            self._add(parts, self._characters())
        elif self.step:
            self.step[1].append(id)
        else:
            self._add(parts, self.decoder.decode(self.tokenizer.decode_bytes([id])))

    def _end_step(self, parts: list[dict[str, str]]) -> None:
        if self.step:
            (kind, ids), self.step = self.step, None
            parts.append({"type": kind, "text": self.tokenizer.decode(ids)})

    def _end_text(self, parts: list[dict[str, str]]) -> None:
        """No stop string reaches over a step or the end, so nothing needs to be held back."""
        self._add(parts, self._characters())
        held, self.held = self.held, ""
        if held and not self.stopped:
            parts.append({"type": "text", "text": held})

    def _characters(self) -> str:
        """An unfinished character, given up."""
        rest = self.decoder.decode(b"", final=True)
        self.decoder.reset()
        return rest

    def _add(self, parts: list[dict[str, str]], text: str) -> None:
        """What of the held text and this may be shown. The rest is held back, or left out behind a stop string."""
        whole, self.held = self.held + text, ""
        found = min((at for stop in self.stops if (at := whole.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped, shown = True, whole[:found]
        else:
            ends = (n for stop in self.stops for n in range(1, len(stop)) if whole.endswith(stop[:n]))
            keep = len(whole) - max(ends, default=0)
            shown, self.held = whole[:keep], whole[keep:]
        if shown:
            parts.append({"type": "text", "text": shown})


def scored(id: int, scores: Scores, i: int) -> Scored:
    """Token number `i` of some that were scored."""
    top = [(int(other), _finite(value)) for other, value in zip(scores.ids[i], scores.top[i])]
    return Scored(id, _finite(scores.own[i]), top)


def _finite(value: Any) -> float:
    return float(value) if value > LEAST else LEAST


def name(tokenizer: Tokenizer, id: int) -> str:
    """A token as a string; one that is not whole characters as bytes:\\xe2\\x80."""
    raw = tokenizer.decode_bytes([id])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
