"""Conversations made from a seed: spelling a word, counting its letters, sums. Held-out ones have other words and numbers."""

import random
import string
from collections.abc import Callable, Sequence

from nanojax.tasks.hub import Messages, exchange, part

HELD_OUT = 20  # one word, and one pair of numbers, of so many is only asked in validation

ASK_SPELLING = (
    "Spell the word: {word}",
    "Spell {word}",
    "How do you spell {word}?",
    "Please spell out {word} letter by letter.",
)
ASK_COUNT = (
    "How many {letter} are there in {word}",
    "How many times does {letter} occur in {word}",
    "Count the {letter} in {word}",
    "How often is {letter} in the word {word}",
    "What number of {letter} does {word} have",
    "Please count the letter {letter} in {word}",
    "Tell me how many {letter} the word {word} has",
    "Wie oft steht {letter} in {word}",
    "Combien de {letter} y a-t-il dans {word}",
    "¿Cuántas veces está {letter} en {word}",
)
ASK_SUM = ("What is {sum}?", "Calculate {sum}", "{sum} = ?", "How much is {sum}?", "Tell me what {sum} is.")


def spelling(words: Sequence[str], rng: random.Random, held_out: bool) -> Messages:
    """A word and its letters, as nanochat writes them: `word:w,o,r,d`."""
    word = _word(words, rng, held_out)
    return exchange(rng.choice(ASK_SPELLING).format(word=word), f"{word}:{','.join(word)}")


def counting(words: Sequence[str], rng: random.Random, held_out: bool) -> Messages:
    """How often a letter is in a word: counted by hand, then by the calculator, as in nanochat's SpellingBee."""
    word = _word(words, rng, held_out)
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(string.ascii_lowercase)
    asked = rng.choice(ASK_COUNT)
    asked = asked.lower() if rng.random() < 0.3 else asked
    quoted = {"letter": _quoted(letter, rng), "word": _quoted(word, rng)}
    asked = asked.format(**quoted) + ("?" if rng.random() < 0.5 else "")
    lines, hits = [], 0
    for i, character in enumerate(word, 1):
        hits += character == letter
        lines.append(f"{i}:{character}" + (f" hit! count={hits}" if character == letter else ""))
    by_hand = f"{word}:{','.join(word)}\n\n" + "\n".join(lines) + f"\n\nBy hand I count {hits}. With Python: "
    return exchange(
        asked,
        [
            part("text", by_hand),
            part("python", f"'{word}'.count('{letter}')"),
            part("python_output", str(hits)),
            part("text", f"\n\n#### {hits}"),
        ],
    )


def sums(words: Sequence[str], rng: random.Random, held_out: bool) -> Messages:
    """Two numbers below 1,000 and the calculator. `words` is not used."""
    while True:
        a, b = rng.randrange(1000), rng.randrange(1000)
        if ((7 * a + 11 * b) % HELD_OUT == 0) == held_out:
            break
    operator, result = rng.choice([("+", a + b), ("-", a - b), ("*", a * b)])
    return exchange(
        rng.choice(ASK_SUM).format(sum=f"{a} {operator} {b}"),
        [part("python", f"{a}{operator}{b}"), part("python_output", str(result)), part("text", f"\n\n#### {result}")],
    )


TASKS: dict[str, Callable[[Sequence[str], random.Random, bool], Messages]] = {
    "spelling": spelling,
    "counting": counting,
    "sums": sums,
}


def conversation(task: str, words: Sequence[str], index: int, held_out: bool) -> Messages:
    """Number `index` of a generated task; the same on every machine."""
    return TASKS[task](words, random.Random(f"{task} {held_out} {index}"), held_out)


def _word(words: Sequence[str], rng: random.Random, held_out: bool) -> str:
    """A word. Every HELD_OUT-th is held out."""
    own = (len(words) - 1) // HELD_OUT + 1
    if held_out:
        return words[HELD_OUT * rng.randrange(own)]
    place = rng.randrange(len(words) - own)
    return words[place + place // (HELD_OUT - 1) + 1]


def _quoted(text: str, rng: random.Random) -> str:
    quote = rng.choice(["", "'", '"'])
    return f"{quote}{text}{quote}"
