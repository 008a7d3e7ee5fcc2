"""The tokenizer: byte-pair merges trained by rustbpe, applied by tiktoken, kept as one plain JSON file."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import rustbpe
import tiktoken

from nanojax import files
from nanojax.cli import UserError

# nanochat's GPT-4 style split, numbers in runs of at most two digits (karpathy/nanochat, nanochat/tokenizer.py).
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
FILE_NAME = "tokenizer.json"
MAX_VOCAB = 65_536  # token shards are uint16
# tiktoken's regex engine overflows its stack on a million spaces in a row; 100,000 are fine.
MAX_SPACES = 50_000
TRAIN_BUFFER = 512  # texts that rustbpe holds at a time: 50 MB, because nanojax.data cuts texts to 100,000 characters
_LONG_SPACE = re.compile(rf"\s{{{MAX_SPACES + 1},}}")


class Tokenizer:
    """Byte-level BPE with nanochat's special tokens in the last ids.

    `tokens` are the ordinary tokens' bytes in rank order (ids 0..n-1, the 256 single bytes among them); the special
    tokens get ids n..n+8. Any string of valid Unicode round-trips; lone surrogates, which no UTF-8 text can hold,
    become U+FFFD.
    """

    def __init__(self, tokens: Sequence[bytes], pattern: str = SPLIT_PATTERN):
        if len(set(tokens)) != len(tokens) or not {bytes([b]) for b in range(256)} <= set(tokens):
            raise UserError("tokenizer: tokens must be distinct and contain all 256 single bytes")
        self.tokens = tuple(tokens)
        self.pattern = pattern
        self._special = {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "nanojax",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens=self._special,
        )

    @property
    def vocab_size(self) -> int:
        """Ordinary and special tokens together."""
        return len(self.tokens) + len(SPECIAL_TOKENS)

    @property
    def bos(self) -> int:
        """Id of the token that begins every document and every row."""
        return self._special["<|bos|>"]

    def special(self, name: str) -> int:
        """Id of a special token; UserError for a name that is not in SPECIAL_TOKENS."""
        if name not in self._special:
            raise UserError(f"no special token {name!r}; there are {', '.join(SPECIAL_TOKENS)}")
        return self._special[name]

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; a special token's name in the text is encoded as the characters it consists of."""
        return [i for part in _safe_parts(text) for i in self._encoding.encode_ordinary(part)]

    def encode_numpy(self, text: str) -> np.ndarray:
        """As `encode`, as uint32 [tokens], without a Python integer per token."""
        # disallowed_special=() makes tiktoken treat special tokens' names as ordinary text.
        parts = [self._encoding.encode_to_numpy(_valid(part), disallowed_special=()) for part in _safe_parts(text)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.uint32), *parts])

    def encode_batch(self, texts: list[str], threads: int = 8) -> list[list[int]]:
        """`encode` of each text, over threads (tiktoken releases the interpreter lock)."""
        if any(len(text) > MAX_SPACES and _LONG_SPACE.search(text) for text in texts):
            return [self.encode(text) for text in texts]
        return self._encoding.encode_ordinary_batch(texts, num_threads=threads)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids; a special token gives its name. UserError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return self._encoding.decode_bytes(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def bytes_per_token(self, rule: Literal["raw", "decoded"] = "raw") -> np.ndarray:
        """int32 [V]: UTF-8 bytes of each id, 0 for special tokens, which bits per byte leaves out.

        Rule "raw": the token's own bytes, as nanochat counts since July 2026. "decoded": those of the token decoded by
        itself, as it counted before: parts of a character become U+FFFD, of 3 bytes, so figures are lower.
        """
        decoded = lambda token: len(token.decode("utf-8", errors="replace").encode())
        size = {"raw": len, "decoded": decoded}[rule]
        return np.array([size(token) for token in self.tokens] + [0] * len(SPECIAL_TOKENS), np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of everything that determines an id: pattern, special tokens, tokens in order."""
        return _fingerprint(self.pattern, self.tokens)

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `tokenizer.json` into the folder, whole or not at all; returns its path."""
        path = Path(folder) / FILE_NAME
        with files.write_atomic(path) as file:
            file.write(self._file())
        return path

    def _file(self) -> bytes:
        content = {
            "format": "nanojax-tokenizer-1",
            "fingerprint": self.fingerprint,
            "pattern": self.pattern,
            "special_tokens": list(SPECIAL_TOKENS),
            "tokens_base64": [base64.b64encode(token).decode() for token in self.tokens],
        }
        return json.dumps(content, indent=0).encode()

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Reads what `save` wrote. UserError names the file if it is missing, damaged or of another kind."""
        path = Path(folder) / FILE_NAME
        try:
            raw = path.read_bytes()
            content = json.loads(raw)
            if content["format"] != "nanojax-tokenizer-1" or content["special_tokens"] != list(SPECIAL_TOKENS):
                raise UserError(f"{path}: not a tokenizer of this version of nanojax")
            tokens = [base64.b64decode(token, validate=True) for token in content["tokens_base64"]]
            # The fingerprint is compared before tiktoken sees the tokens: it panics on a damaged pattern.
            if _fingerprint(content["pattern"], tokens) != content["fingerprint"]:
                raise UserError(f"{path}: fingerprint does not match the content; the file is damaged, copy it again")
            tokenizer = cls(tokens, content["pattern"])
            if tokenizer._file() != raw:
                raise UserError(f"{path}: not as it was written; the file is damaged, copy it again")
            return tokenizer
        except FileNotFoundError:
            raise UserError(
                f"{path}: no tokenizer there; `python -m nanojax.data tokenizer --input TEXTS --out={path.parent}` makes one"
            ) from None
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: not a readable tokenizer ({type(error).__name__}); copy it again or train anew"
            ) from None


def _fingerprint(pattern: str, tokens: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in (pattern.encode(), *(name.encode() for name in SPECIAL_TOKENS), *tokens):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Trains BPE on the texts until the vocabulary, special tokens included, has `vocab_size` entries.

    Memory grows with the number of distinct words, not with the text. UserError if the size is impossible or the text has
    too few distinct pairs for it.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if not smallest <= vocab_size <= MAX_VOCAB:
        raise UserError(f"vocabulary of {vocab_size}: must be {smallest} to {MAX_VOCAB} (ids are stored as uint16)")
    bpe = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    bpe.train_from_iterator(
        (_valid(text) for text in texts), vocab_size - len(SPECIAL_TOKENS), TRAIN_BUFFER, SPLIT_PATTERN
    )
    ranked = sorted((rank, bytes(token)) for token, rank in bpe.get_mergeable_ranks())
    found = len(ranked) + len(SPECIAL_TOKENS)
    if found < vocab_size:
        raise UserError(f"vocabulary of {vocab_size}: this text only yields {found}; give more text or a smaller size")
    return Tokenizer([token for _, token in ranked])


def _safe_parts(text: str) -> list[str]:
    """The text cut inside runs of white space longer than MAX_SPACES, so that tiktoken's regex survives."""
    if len(text) <= MAX_SPACES:
        return [text]
    cuts = [cut for run in _LONG_SPACE.finditer(text) for cut in range(run.start() + MAX_SPACES, run.end(), MAX_SPACES)]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]


def _valid(text: str) -> str:
    """The text with lone surrogates replaced by U+FFFD, as tiktoken's own encode_ordinary does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
