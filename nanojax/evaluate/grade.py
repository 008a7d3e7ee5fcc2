"""Whether a written answer is right: the number behind ####, the exact text, a program that passes its tests."""

import re
from typing import NamedTuple

from nanojax.conversation import PARTS
from nanojax.evaluate import sandbox
from nanojax.tokenizer import Tokenizer

SECONDS = 5.0  # that a program may run, as in nanochat
_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
_FENCED = re.compile(r"```(?:python)?[ \t]*\n(.*?)\n[ \t]*```", re.DOTALL)


class Reply(NamedTuple):
    """An answer as text. whole: special tokens by name. texts: what stands before, between and behind its tool blocks."""

    whole: str
    texts: tuple[str, ...]


class Grade(NamedTuple):
    """right, and a remark for the reader: what was expected, or how a program ended."""

    right: bool
    remark: str


def reply(tokenizer: Tokenizer, tokens: list[int]) -> Reply:
    """The reply that these tokens are. A tool block that is not closed goes on to the end."""
    closes = {tokenizer.special(before): tokenizer.special(after) for before, after, _ in PARTS.values() if before}
    texts: list[list[int]] = [[]]
    until = None
    for token in tokens:
        if until is not None:
            if token == until:
                until = None
                texts.append([])
        elif token in closes:
            until = closes[token]
        else:
            texts[-1].append(token)
    return Reply(tokenizer.decode(tokens), tuple(map(tokenizer.decode, texts)))


def final_number(texts: tuple[str, ...]) -> str | None:
    """The first number behind `#### `, without commas, as nanochat reads it; None if there is none.

    It is compared as text: "10." and "10.0" are not "10", and "#### $5" has none.
    """
    for text in texts:
        if found := _NUMBER.search(text):
            return found[1].replace(",", "")
    return None


def number(expected: str, given: Reply) -> Grade:
    """Right if the final number is the expected one."""
    found = final_number(given.texts)
    return Grade(
        found == expected, f"expected {expected}, " + ("found no number" if found is None else f"found {found}")
    )


def exact(expected: str, given: Reply) -> Grade:
    """Right if nothing but the expected text was written; white space around it does not count."""
    return Grade(given.whole.strip() == expected.strip(), f"expected {expected}")


def program(prompt: str, tests: str, entry_point: str, given: Reply) -> Grade:
    """Right if the program that was written passes the tests, in the sandbox."""
    text = "".join(given.texts)
    fenced = _FENCED.search(text)
    code = (fenced[1] if fenced else text).strip()
    result = sandbox.run(f"{imports(prompt)}\n\n{code}\n\n{tests}\n\ncheck({entry_point})\n", SECONDS)
    return Grade(result.outcome == "finished", result.reason)


def imports(prompt: str) -> str:
    """The import lines at the top of a program; blank lines and comments may stand between them."""
    found = []
    for line in map(str.strip, prompt.splitlines()):
        if line.startswith(("import ", "from ")):
            found.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(found)
