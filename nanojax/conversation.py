"""A conversation as tokens: nanochat's rendering, and which of its tokens the model learns to write.

A conversation is a list of messages {"role", "content"}. An optional message of the role "system" comes first; then "user" and
"assistant" alternate, the user first. Content is text. That of an assistant may also be a list of parts {"type", "text"}:
"text", "python" (an expression that the calculator gets) and "python_output" (what it answered).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from nanojax.cli import UserError
from nanojax.tokenizer import Tokenizer

Message = dict[str, Any]
Tokens = tuple[list[int], list[int]]  # (ids, mask): mask 1 = supervised

# type -> (special token before, special token after, whether the part is supervised)
PARTS = {
    "text": ("", "", 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


def render(tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int | None = None) -> Tokens:
    """(ids, mask) of a conversation; mask 1 where the model learns to write the token.

    Supervised are the assistant's text, its expressions with their two special tokens, and <|assistant_end|>. Results of the
    calculator are not. Text and parts are encoded apart, so no token crosses their border, and a special token's name in them
    is encoded as the characters it consists of. A system message is put before the first user's text, with a blank line between.

    Args:
      max_tokens: what is longer is cut on the right; nothing is put in its place.

    Raises:
      UserError: if the messages are not a conversation; it names the message.
    """
    ids, mask = [tokenizer.bos], [0]
    for id, supervised in _tokens(tokenizer, turns(messages)):
        ids.append(id)
        mask.append(supervised)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a prompt that the assistant answers: they end in <|assistant_start|>. A last answer is left out."""
    messages = turns(messages)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return [*render(tokenizer, messages)[0], tokenizer.special("<|assistant_start|>")]


def turns(messages: Sequence[Message]) -> list[Message]:
    """The messages, checked, with the system's put before the first user's. UserError names the first that is wrong."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError("conversation: must be a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise UserError(f"message {i}: must be an object with role and content")
    system = None
    if messages[0]["role"] == "system":
        system, *messages = messages
    if not messages:
        raise UserError("message 0: a system message must be followed by a user's")
    for i, message in enumerate(messages):
        _check(message, i, i + (system is not None))
    if system is None:
        return list(messages)
    if not isinstance(system["content"], str):
        raise UserError("message 0: content of a system message must be text")
    first = messages[0] | {"content": f"{system['content']}\n\n{messages[0]['content']}"}
    return [first, *messages[1:]]


def _check(message: Message, turn: int, place: int) -> None:
    """UserError if `message` cannot be turn number `turn`; it names the message by its place in the list."""
    role, content = ("user", "assistant")[turn % 2], message["content"]
    if message["role"] != role:
        raise UserError(f"message {place}: role is {message['role']!r}, must be {role} (user and assistant alternate)")
    if isinstance(content, str):
        return
    if role == "user":
        raise UserError(f"message {place}: content of a user message must be text")
    if not isinstance(content, list):
        raise UserError(f"message {place}: content must be text or a list of parts")
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type") not in list(PARTS):
            raise UserError(f"message {place}: a part must have a text and a type: {', '.join(PARTS)}")


def _tokens(tokenizer: Tokenizer, messages: list[Message]) -> Iterator[tuple[int, int]]:
    """(id, supervised) of every token after the first."""
    for message in messages:
        role, content = message["role"], message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        writes = int(role == "assistant")
        yield tokenizer.special(f"<|{role}_start|>"), 0
        for part in parts:
            before, after, learnt = PARTS[part["type"]]
            around = [[tokenizer.special(name)] if name else [] for name in (before, after)]
            for id in [*around[0], *tokenizer.encode(part["text"]), *around[1]]:
                yield id, writes * learnt
        yield tokenizer.special(f"<|{role}_end|>"), writes
