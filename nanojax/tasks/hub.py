"""nanochat's tasks whose rows come from the hub: where the rows are, and how one becomes a conversation."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nanojax.cli import UserError
from nanojax.conversation import Message

Messages = list[Message]
_CALL = re.compile(r"<<([^>]+)>>")


class HubTask(NamedTuple):
    """repo: owner/name; train and test: folders subset/split of its parquet branch, "" where there are no such rows."""

    repo: str
    train: str
    test: str
    messages: Callable[[Any], Messages]


def messages(row: Any) -> Messages:
    """The conversation of a row {"messages": [...]}, or of one that is the list itself (nanochat's CustomJSON)."""
    found = row.get("messages") if isinstance(row, dict) else row
    if not isinstance(found, list):
        raise UserError('no conversation; expected {"messages": [{"role": ..., "content": ...}, ...]}')
    return found


def mmlu(row: Any) -> Messages:
    """Four choices; the answer is a letter."""
    return multiple_choice(row["question"], row["choices"], "ABCD", dict(enumerate("ABCD"))[row["answer"]])


def arc(row: Any) -> Messages:
    """Choices under the row's own labels, which may be digits, and three to five of them."""
    return multiple_choice(row["question"], row["choices"]["text"], row["choices"]["label"], row["answerKey"])


def multiple_choice(question: str, choices: Sequence[str], letters: Sequence[str], answer: str) -> Messages:
    """nanochat's form. A letter follows its choice without a space: the same token as in the answer."""
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    asked = f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."
    return exchange(asked, answer)


def gsm8k(row: Any) -> Messages:
    """The answer's <<expression=result>> become calls of the calculator; the result is what follows the last =."""
    parts = []
    for i, piece in enumerate(_CALL.split(row["answer"])):  # text and calls alternate
        if i % 2:
            expression, equals, result = piece.rpartition("=")
            parts += [part("python", expression if equals else result), part("python_output", result if equals else "")]
        elif piece:
            parts.append(part("text", piece))
    return exchange(row["question"], parts)


def humaneval(row: Any) -> Messages:
    """The beginning of a program, and the program."""
    return exchange(row["prompt"], f"{row['prompt']}\n{row['canonical_solution']}")


def exchange(question: str, answer: str | list[dict[str, str]]) -> Messages:
    """A question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def part(kind: str, text: str) -> dict[str, str]:
    """A part of an answer."""
    return {"type": kind, "text": text}


TASKS = {
    "smoltalk": HubTask("HuggingFaceTB/smol-smoltalk", "default/train", "default/test", messages),
    "mmlu": HubTask("cais/mmlu", "all/auxiliary_train", "all/test", mmlu),
    "arc_easy": HubTask("allenai/ai2_arc", "ARC-Easy/train", "ARC-Easy/test", arc),
    "arc_challenge": HubTask("allenai/ai2_arc", "ARC-Challenge/train", "ARC-Challenge/test", arc),
    "gsm8k": HubTask("openai/gsm8k", "main/train", "main/test", gsm8k),
    "humaneval": HubTask("openai/openai_humaneval", "", "openai_humaneval/test", humaneval),
}
