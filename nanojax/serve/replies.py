"""Replies in OpenAI's form: whole ones and the chunks of a stream."""

import codecs
import secrets
import time
from collections.abc import Sequence
from typing import Any

from nanojax.serve.answer import Piece, Scored, name
from nanojax.serve.protocol import Refused
from nanojax.tokenizer import SPECIAL_TOKENS, Tokenizer


class Form:
    """How the replies to one request are written: those of a chat, or of /v1/completions.

    Args:
      top: how many of the likeliest tokens are listed with each; None = no log-probabilities.
    """

    def __init__(self, chat: bool, model: str, tokenizer: Tokenizer, top: int | None):
        self.chat, self.tokenizer, self.top = chat, tokenizer, top
        prefix, self.object = ("chatcmpl-", "chat.completion") if chat else ("cmpl-", "text_completion")
        self.head = {"id": prefix + secrets.token_hex(12), "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence["Choice"], usage: dict[str, Any]) -> dict[str, Any]:
        """The reply of a request that is not streamed."""
        return {**self.head, "object": self.object, "choices": [c.whole(self) for c in choices], "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """One of a stream."""
        return {**self.head, "object": self.object + ".chunk" * self.chat, "choices": choices, "usage": usage}


class Choice:
    """One answer of a reply, as it grows. before: text and tokens in front of it, where they are echoed."""

    def __init__(self, index: int, before: str = ""):
        self.index, self.before, self.offset = index, before, 0
        self.parts: list[dict[str, str]] = []
        self.tokens: list[Scored] = []
        self.finish: str | None = None
        self.offsets = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: Piece) -> None:
        self.tokens += piece.tokens
        self.parts = _joined([*self.parts, *piece.parts])

    def first(self, form: Form) -> dict[str, Any]:
        """The chunk that opens a stream."""
        return self._chunk(form, {"role": "assistant", "content": ""} if form.chat else self.before, None)

    def next(self, form: Form, piece: Piece) -> dict[str, Any]:
        """The chunk of a piece."""
        delta: Any = piece.text
        if form.chat:
            delta = {"content": piece.text} | ({"parts": _joined(piece.parts)} if piece.parts else {})
        silent = form.chat and not piece.tokens
        return self._chunk(form, delta, None if silent else self._logprobs(form, piece.tokens))

    def last(self, form: Form) -> dict[str, Any]:
        """The chunk that says why it ended."""
        return self._chunk(form, {} if form.chat else "", None)

    def whole(self, form: Form) -> dict[str, Any]:
        piece = Piece(self.parts, self.tokens)
        ended = {"index": self.index, "finish_reason": self.finish, "logprobs": self._logprobs(form, self.tokens)}
        if not form.chat:
            return ended | {"text": self.before + piece.text}
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return ended | {"message": message | ({"parts": self.parts} if piece.has_steps else {})}

    def _chunk(self, form: Form, delta: Any, logprobs: Any) -> dict[str, Any]:
        body = {"delta": delta} if form.chat else {"text": delta}
        return {"index": self.index, **body, "finish_reason": self.finish, "logprobs": logprobs}

    def _logprobs(self, form: Form, tokens: Sequence[Scored]) -> dict[str, Any] | None:
        if form.top is None:
            return None
        if form.chat:
            return {"content": [_listed(form, token) for token in tokens], "refusal": None}
        names = [name(form.tokenizer, token.id) for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(form, token) for token in tokens],
            "text_offset": self._text_offsets(form.tokenizer, tokens),
        }

    def _top(self, form: Form, token: Scored) -> dict[str, float] | None:
        """The likeliest, and the token itself, which need not be one of them."""
        if token.logprob is None:
            return None
        listed = {name(form.tokenizer, id): value for id, value in token.top[: form.top]}
        return {**listed, name(form.tokenizer, token.id): token.logprob}

    def _text_offsets(self, tokenizer: Tokenizer, tokens: Sequence[Scored]) -> list[int]:
        """Where each token begins in the text."""
        special, found = {tokenizer.special(special) for special in SPECIAL_TOKENS}, []
        for token in tokens:
            found.append(self.offset)
            raw = b"" if token.id in special else tokenizer.decode_bytes([token.id])
            self.offset += len(self.offsets.decode(raw))
        return found


def _joined(parts: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Pieces of text that follow each other are one part."""
    out: list[dict[str, str]] = []
    for part in parts:
        if out and part["type"] == out[-1]["type"] == "text":
            out[-1] = {"type": "text", "text": out[-1]["text"] + part["text"]}
        else:
            out.append(part)
    return out


def _listed(form: Form, token: Scored) -> dict[str, Any]:
    entry = lambda id, value: {
        "token": name(form.tokenizer, id),
        "logprob": value,
        "bytes": list(form.tokenizer.decode_bytes([id])),
    }
    return {**entry(token.id, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top[: form.top]]}


def error(refused: Refused) -> dict[str, Any]:
    """The body of a reply that is an error, and of the event that ends a stream."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(refused.status, "server_error" if refused.status >= 500 else "invalid_request_error")
    return {"error": {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}}
