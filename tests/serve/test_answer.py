"""An answer's text: characters, stop strings and steps, however its tokens are cut."""

import random

from helpers.serving import TOKENIZER

from nanojax.serve.answer import Answer, name


def fed(ids: list[int], sizes: list[int], **options: object) -> tuple[str, list[dict[str, str]], Answer]:
    """(text, parts with neighbours of text joined, the answer) after feeding `ids` in pieces of `sizes`, in turn."""
    answer, parts = Answer(TOKENIZER, **options), []  # type: ignore
    pieces, at = [], 0
    for i in range(len(ids)):
        pieces.append(answer.feed(ids[at : at + sizes[i % len(sizes)]]))
        at += sizes[i % len(sizes)]
    for piece in [*pieces, answer.rest()]:
        for part in piece.parts:
            if parts and parts[-1]["type"] == part["type"] == "text":
                parts[-1]["text"] += part["text"]
            else:
                parts.append(dict(part))
    return "".join(p["text"] for p in parts if p["type"] == "text"), parts, answer


def test_stop_strings_across_tokens() -> None:
    """200 random texts of few letters, cut anywhere: what is shown is what stands before the first of the stop strings,
    and nothing that was shown has to be taken back."""
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("STOPab日é") for _ in range(rng.randrange(1, 30)))
        stops = [
            "".join(rng.choice("STOPab日") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))
        ]
        sizes = [rng.randrange(1, 4) for _ in range(5)]
        ends = [text.find(stop) for stop in stops if stop in text]
        shown, _, answer = fed(TOKENIZER.encode(text), sizes, stops=stops)
        assert shown == (text[: min(ends)] if ends else text), (text, stops)
        assert answer.stopped == bool(ends)


def test_steps_are_apart() -> None:
    """Text, a call with its result, text: three kinds of parts in their order, no special token's name in any; half a
    character before a step is U+FFFD; a call that is cut is a part; without `chat` the text alone is left."""
    special = TOKENIZER.special
    ids = [*b"x", 0xE6, special("<|python_start|>"), *b"6*7", special("<|python_end|>")]
    ids += [special("<|output_start|>"), *b"42", special("<|output_end|>"), *b" y", special("<|assistant_end|>")]
    want = [("text", "x�"), ("python", "6*7"), ("python_output", "42"), ("text", " y")]
    for sizes in ([1], [3], [100]):
        text, parts, answer = fed(ids, sizes)
        assert text == "x� y" and [(p["type"], p["text"]) for p in parts] == want and answer.count == len(ids)
    assert [p["type"] for p in fed(ids[:5], [1])[1]] == ["text", "python"]
    assert fed(ids, [2], chat=False)[0] == "x�6*742 y"


def test_names() -> None:
    """A token that is not whole characters is named by its bytes, so that two of them differ."""
    assert name(TOKENIZER, 0xE6) == "bytes:\\xe6" and name(TOKENIZER, 65) == "A"
    assert name(TOKENIZER, TOKENIZER.bos) == "<|bos|>"
