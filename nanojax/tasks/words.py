"""Words to spell: those of a text file, or those that the tokenizer learnt from its training text."""

import re
from pathlib import Path

from nanojax.cli import UserError
from nanojax.tokenizer import Tokenizer

FEWEST = 100
_WORD = re.compile("[a-z]{3,20}")


def of_file(path: str) -> list[str]:
    """The distinct words of 3 to 20 English letters in a text file, lower-cased and sorted."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--words={path}: cannot be read ({error.strerror})") from None
    return _enough(sorted({word for word in re.findall(r"[^\W\d_]+", text.lower()) if _WORD.fullmatch(word)}), path)


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
