"""What counts as a right answer: written cases of numbers, exact text and programs."""

import sys

import pytest

from nanojax.evaluate import grade
from nanojax.evaluate.grade import Reply
from nanojax.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])


def reply_of(text: str) -> Reply:
    """The reply whose tokens are this text, special tokens written as [python] and so on."""
    tokens: list[int] = []
    for piece in text.replace("[", "|[").replace("]", "]|").split("|"):
        name = f"<|{piece[1:-1]}|>"
        tokens += [TOKENIZER.special(name)] if piece.startswith("[") else TOKENIZER.encode(piece)
    return grade.reply(TOKENIZER, tokens)


CALL = "[python_start]{}[python_end][output_start]{}[output_end]"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so #### 10", "10"),
        ("#### -3 apples", "-3"),
        ("#### 1,234,567", "1234567"),
        ("#### 0.5", "0.5"),
        ("#### 10.", "10."),  # nanochat's: not 10
        ("#### 10.0", "10.0"),
        ("#### 7 or #### 8", "7"),
        ("#### $5", None),
        ("####5", None),
        ("10", None),
        ("", None),
        (CALL.format("#### 1", "2") + " #### 3", "3"),  # not the one inside a tool block
        ("2+2 is " + CALL.format("2+2", "#### 9") + "#### 4", "4"),
        ("#### " + CALL.format("2+2", "4") + "4", None),  # no number follows
        ("#### 4" + CALL.format("2+2", "5") + "#### 5", "4"),
        ("[python_start]2+2 #### 4", None),  # a block that is not closed
        ("[python_end]#### 4[output_end]", "4"),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    """nanochat's pattern, on the text outside of tool blocks; compared as text."""
    assert grade.final_number(reply_of(text).texts) == number
    assert grade.number("10", reply_of(text)).right == (number == "10")


def test_exact_text() -> None:
    """White space around it is forgiven, anything else is not, nor a tool block."""
    for text, right in (("cat:c,a,t", True), (" cat:c,a,t\n", True), ("cat:c,a,t.", False), ("Cat:c,a,t", False),
                        ("cat:c,a,t" + CALL.format("1", "1"), False), ("", False)):  # fmt: skip
        assert grade.exact("cat:c,a,t", reply_of(text)).right == right


def test_imports_at_the_top() -> None:
    """Up to the first line that is neither an import, a comment nor blank."""
    prompt = "# typed\nfrom typing import List\n\nimport math as m\n\ndef f():\n    import os\n"
    assert grade.imports(prompt) == "from typing import List\nimport math as m"
    assert grade.imports("def f():\n    pass\nimport os") == ""


PROMPT = "from typing import List\n\ndef double(x: List[int]) -> List[int]:\n"
BODY = "    return [2 * i for i in x]\n"
TESTS = "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")
@pytest.mark.parametrize(
    ("answer", "right", "remark"),
    [
        (PROMPT + BODY, True, "ran to its end"),
        (
            f"Here:\n```python\n{PROMPT.splitlines()[2]}\n{BODY}```\nand\n```\n1/0\n```",
            True,
            "ran to its end",
        ),  # imports
        (f"```\n{PROMPT + BODY}\n```", True, "ran to its end"),
        (PROMPT + "    return x\n", False, "AssertionError"),
        (BODY, False, "SyntaxError"),  # a continuation, as a base model writes it
        ("import os\nos._exit(0)", False, "exited with 0 before its end"),
        ("", False, "NameError"),
    ],
)
def test_programs(answer: str, right: bool, remark: str) -> None:
    """The first fenced block, else the whole answer, with the prompt's imports; ended early is not passed."""
    found = grade.program(PROMPT, TESTS, "double", Reply(answer, (answer,)))
    assert found.right == right and found.remark.startswith(remark)
