"""Rows of the hub's tasks as conversations, against what nanochat makes of them."""

import pytest

from nanojax.cli import UserError
from nanojax.tasks import hub


def test_multiple_choice_is_nanochats() -> None:
    """The whole text, letter for letter: the letter follows its choice without a space."""
    row = {"question": "What is 2+2?", "choices": ["3", "4", "5", "22"], "answer": 1, "subject": "x"}
    asked, answer = hub.mmlu(row)
    assert asked["content"] == (
        "Multiple Choice question: What is 2+2?\n- 3=A\n- 4=B\n- 5=C\n- 22=D\n\n"
        "Respond only with the letter of the correct answer."
    )
    assert answer == {"role": "assistant", "content": "B"}


def test_arc_uses_the_rows_own_labels() -> None:
    """Digits, and three choices."""
    row = {"question": "q", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    asked, answer = hub.arc(row)
    assert "- a=1\n- b=2\n- c=3\n\n" in asked["content"] and answer["content"] == "3"


def test_calls_of_the_calculator_are_parsed() -> None:
    """<<expression=result>> become parts; the result is what follows the last =; without one it is empty."""
    answer = "She earns 12/60 = $<<12/60=0.2>>0.2. <<x==3=4>><<5>>end\n#### 10"
    (asked, told) = hub.gsm8k({"question": "How much?", "answer": answer})
    assert asked["content"] == "How much?"
    assert [(p["type"], p["text"]) for p in told["content"]] == [
        ("text", "She earns 12/60 = $"),
        ("python", "12/60"),
        ("python_output", "0.2"),
        ("text", "0.2. "),
        ("python", "x==3"),
        ("python_output", "4"),
        ("python", "5"),
        ("python_output", ""),
        ("text", "end\n#### 10"),
    ]


def test_humaneval_and_messages() -> None:
    """The prompt and the whole program; messages in an object or a bare list, as in nanochat's identity file."""
    told = hub.humaneval({"prompt": "def f():", "canonical_solution": "    return 1\n"})
    assert [m["content"] for m in told] == ["def f():", "def f():\n    return 1\n"]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert hub.messages({"messages": messages, "source": "x"}) == hub.messages(messages) == messages
    with pytest.raises(UserError, match="no conversation"):
        hub.messages({"text": "a"})
