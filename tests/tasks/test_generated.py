"""Generated tasks: deterministic, right, and held-out items never among those trained on."""

import json
import re

import pytest

from nanojax.cli import UserError
from nanojax.conversation import turns
from nanojax.tasks import generated, words
from nanojax.tokenizer import Tokenizer

WORDS = sorted(
    {a + b + c for a in ("ba", "cor", "stra", "win") for b in ("na", "wber", "ter", "ly", "do") for c in "aeinrsty"}
)


def _made(task: str, held_out: bool, n: int = 400) -> list[list[dict]]:
    return [generated.conversation(task, WORDS, i, held_out) for i in range(n)]


@pytest.mark.parametrize("task", generated.TASKS)
def test_the_same_number_gives_the_same_conversation(task: str) -> None:
    """Of any order, and all are conversations; numbers differ."""
    assert _made(task, False, 9)[::-1] == [generated.conversation(task, WORDS, i, False) for i in reversed(range(9))]
    assert len({str(m) for m in _made(task, False)}) > 150
    for messages in _made(task, True, 50):
        turns(messages)


def test_letters_and_counts_are_right() -> None:
    """Recounted from the text: the letters of the word, each hit, the expression's value, the last number."""
    for question, answer in _made("spelling", False):
        word, letters = answer["content"].split(":")
        assert word in question["content"] and letters.split(",") == list(word)
    for _, answer in _made("counting", False):
        by_hand, call, output, last = (p["text"] for p in answer["content"])
        word, letter = re.fullmatch(r"'(\w+)'.count\('(\w)'\)", call).groups()  # pyright: ignore
        assert int(output) == word.count(letter) == by_hand.count("hit!")
        assert last == f"\n\n#### {output}" and by_hand.startswith(f"{word}:{','.join(word)}\n")
    for question, answer in _made("sums", False):
        call, output, last = (p["text"] for p in answer["content"])
        assert eval(call) == int(output) and last.endswith(f"#### {output}")
        assert call.replace("*", " * ").replace("+", " + ").replace("-", " - ") in question["content"]


def test_held_out_items_are_others() -> None:
    """No word, and no pair of numbers, of validation is in training."""

    def asked(task: str, held_out: bool) -> set[str]:
        word = {"spelling": lambda a: a.split(":")[0], "sums": lambda a: re.sub(r"[-+*]", " ", a[0]["text"])}[task]
        return {word(messages[1]["content"]) for messages in _made(task, held_out, 2000)}

    for task in ("spelling", "sums"):
        train, valid = asked(task, False), asked(task, True)
        assert valid and not train & valid
    assert asked("spelling", False) | asked("spelling", True) == set(WORDS)


def test_words_of_a_file_and_of_a_tokenizer(tmp_path) -> None:
    """Lower-cased, distinct, sorted, 3 to 20 English letters; too few are an error that says what to do."""
    (tmp_path / "text.txt").write_text("The Tree, ünïté; a " + " ".join(WORDS) + " tree x1y2 " + "z" * 21)
    assert words.of_text(str(tmp_path / "text.txt")) == sorted({*WORDS, "the", "tree"})
    (tmp_path / "words").write_text("\n".join(WORDS))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text(json.dumps({"text": " ".join(WORDS)}))
    assert words.of_text(str(tmp_path / "words")) == words.of_text(str(tmp_path / "texts")) == WORDS
    single = [bytes([b]) for b in range(256)]
    learnt = Tokenizer([*single, *(f" {word}".encode() for word in WORDS), b"inner", " ünï".encode(), b" Of"])
    assert words.of_tokenizer(learnt) == WORDS
    with pytest.raises(UserError, match=r"has 0 words.*--words=FILE"):
        words.of_tokenizer(Tokenizer(single))
    with pytest.raises(UserError, match="--words="):
        words.of_text(str(tmp_path / "none"))
