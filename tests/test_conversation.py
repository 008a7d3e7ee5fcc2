"""Conversations as tokens: ids and masks against a list written by hand from nanochat's rules."""

from typing import Any

import pytest
from helpers.messages import assistant, part, user

from nanojax.cli import UserError
from nanojax.conversation import render, render_for_completion
from nanojax.tokenizer import Tokenizer

# An id below 256 is a byte. "ab" and "12" are merged, so that a merge across a border would show.
TOKENIZER = Tokenizer([*(bytes([b]) for b in range(256)), b"ab", b"12"])
AB, N12 = 256, 257
BOS, USER, USER_END, ASSISTANT, END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = range(258, 267)

SYSTEM = {"role": "system", "content": "s"}

# messages, ids, mask
WRITTEN = {
    "one turn": (
        [user("hi"), assistant("ab")],
        [BOS, USER, 104, 105, USER_END, ASSISTANT, AB, END],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ),
    "a user alone": ([user("a")], [BOS, USER, 97, USER_END], [0, 0, 0, 0]),
    "an empty answer": ([user("a"), assistant("")], [BOS, USER, 97, USER_END, ASSISTANT, END], [0, 0, 0, 0, 0, 1]),
    "two turns": (
        [user("a"), assistant("b"), user("ab"), assistant("c")],
        [BOS, USER, 97, USER_END, ASSISTANT, 98, END, USER, AB, USER_END, ASSISTANT, 99, END],
        [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1],
    ),
    "a system message": (
        [SYSTEM, user("a"), assistant("b")],
        [BOS, USER, 115, 10, 10, 97, USER_END, ASSISTANT, 98, END],
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
    ),
    "a tool": (
        [user("?"), assistant([part("text", "a"), part("python", "1+1"), part("python_output", "2"), part("text", "b")])],
        [BOS, USER, 63, USER_END, ASSISTANT, 97, PYTHON, 49, 43, 49, PYTHON_END, OUTPUT, 50, OUTPUT_END, 98, END],
        [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1],
    ),
    "parts are encoded apart": (
        [user("1"), assistant([part("text", "a"), part("text", "b"), part("python", "1"), part("python_output", "2")])],
        [BOS, USER, 49, USER_END, ASSISTANT, 97, 98, PYTHON, 49, PYTHON_END, OUTPUT, 50, OUTPUT_END, END],
        [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1],
    ),
    "merges within a part": (
        [user("ab12"), assistant([part("python", "12")])],
        [BOS, USER, AB, N12, USER_END, ASSISTANT, PYTHON, N12, PYTHON_END, END],
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
    ),
    "names of special tokens": (
        [user("<|bos|>"), assistant("<|bos|>")],
        [BOS, USER, *b"<|bos|>", USER_END, ASSISTANT, *b"<|bos|>", END],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
    ),
    "no parts": ([user("a"), assistant([])], [BOS, USER, 97, USER_END, ASSISTANT, END], [0, 0, 0, 0, 0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_ids_and_mask(name: str) -> None:
    """Every id and every supervised token is the written one."""
    messages, ids, mask = WRITTEN[name]
    assert render(TOKENIZER, messages) == (ids, mask)


def test_the_special_tokens_are_nanochats_last_nine() -> None:
    """Their ids are V-9 to V-1, in nanochat's order: with V = 65,536 bos is 65,527."""
    assert TOKENIZER.vocab_size == 267
    assert [TOKENIZER.special(f"<|{name}|>") for name in (
        "bos", "user_start", "user_end", "assistant_start", "assistant_end", "python_start", "python_end",
        "output_start", "output_end",
    )] == list(range(267 - 9, 267))  # fmt: skip


@pytest.mark.parametrize("length", [1, 6, 7, 8, 9])
def test_truncation_cuts_on_the_right(length: int) -> None:
    """ids and mask are cut together; no <|assistant_end|> is put back."""
    messages, ids, mask = WRITTEN["one turn"]
    assert render(TOKENIZER, messages, length) == (ids[:length], mask[:length])


def test_a_prompt_ends_where_the_answer_begins() -> None:
    """The last answer is left out and the assistant's start is put in; a question without an answer gives the same."""
    asked = [user("a"), assistant("b"), user("ab")]
    prompt = [BOS, USER, 97, USER_END, ASSISTANT, 98, END, USER, AB, USER_END, ASSISTANT]
    assert render_for_completion(TOKENIZER, [*asked, assistant("c")]) == prompt
    assert render_for_completion(TOKENIZER, asked) == prompt
    assert render_for_completion(TOKENIZER, [SYSTEM, user("a")]) == [BOS, USER, *b"s\n\na", USER_END, ASSISTANT]


def test_messages_are_not_changed() -> None:
    """The caller's messages stay as they are, with a system message too."""
    messages = [dict(SYSTEM), user("a"), assistant("b")]
    render(TOKENIZER, messages)
    render_for_completion(TOKENIZER, messages)
    assert messages == [SYSTEM, user("a"), assistant("b")]


@pytest.mark.parametrize(
    "messages, says",
    [
        ([], "at least one message"),
        ("hi", "a list"),
        ({"role": "user", "content": "a"}, "a list"),
        ([["user", "a"]], "message 0: must be an object"),
        ([{"role": "user"}], "message 0: must be an object"),
        ([assistant("a")], "message 0: role is 'assistant', must be user"),
        ([user("a"), user("b")], "message 1: role is 'user', must be assistant"),
        ([SYSTEM], "message 0: a system message must be followed"),
        ([SYSTEM, assistant("a")], "message 1: role is 'assistant', must be user"),
        ([user("a"), SYSTEM], "message 1: role is 'system'"),
        ([{"role": "system", "content": 3}, user("a")], "message 0: content of a system message"),
        ([{"role": ["user"], "content": "a"}], r"message 0: role is \['user'\]"),
        ([user([part("text", "a")])], "message 0: content of a user message must be text"),  # pyright: ignore
        ([SYSTEM, user(None)], "message 1: content of a user message must be text"),  # pyright: ignore
        ([user("a"), assistant(None)], "message 1: content must be text or a list of parts"),
        ([user("a"), assistant([part("image", "b")])], "message 1: a part must have"),
        ([user("a"), assistant([{"type": "text"}])], "message 1: a part must have"),
        ([user("a"), assistant([{"type": ["text"], "text": "b"}])], "message 1: a part must have"),
        ([user("a"), assistant(["b"])], "message 1: a part must have"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(messages: Any, says: str) -> None:
    """One line that names the message; nothing is guessed."""
    with pytest.raises(UserError, match=says):
        render(TOKENIZER, messages)
