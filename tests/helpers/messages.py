"""Messages of conversations, as short calls."""

from typing import Any


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def part(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, "text": text}
