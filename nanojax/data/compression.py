"""Bytes per token of tokenizers on four kinds of text, as nanochat's tok_eval measures it."""

import argparse
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import tiktoken

from nanojax.tokenizer import Tokenizer

_HOST = "https://openaipublic.blob.core.windows.net"
REFERENCES = {  # tiktoken's name of the vocabulary, and the files it needs
    "gpt2": (f"{_HOST}/gpt-2/encodings/main/vocab.bpe", f"{_HOST}/gpt-2/encodings/main/encoder.json"),
    "cl100k_base": (f"{_HOST}/encodings/cl100k_base.tiktoken",),
}
_LANGUAGES = {  # Universal Declaration of Human Rights, article 1 (public domain)
    "French": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et "
    "de conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen "
    "begabt und sollen einander im Geist der Brüderlichkeit begegnen.",
    "Spanish": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
    "conciencia, deben comportarse fraternalmente los unos con los otros.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью "
    "и должны поступать в отношении друг друга в духе братства.",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
}


def sample_texts(prose: str) -> dict[str, str]:
    """Text by kind: the given prose, Python code (the standard library's argparse), numbers, other languages."""
    squares = "".join(f"{n} squared is {n * n}; {n}/7 = {n / 7:.6f}\n" for n in range(1, 2000, 7))
    return {
        "prose": prose,
        "code": Path(argparse.__file__).read_text(encoding="utf-8"),
        "numbers": squares,
        "languages": "\n".join(_LANGUAGES.values()),
    }


def reference_encoders() -> tuple[dict[str, Callable[[str], list[int]]], list[str]]:
    """(encoders of GPT-2 and GPT-4 whose files are in tiktoken's cache, names of those that are not)."""
    folder = Path(
        os.environ.get("TIKTOKEN_CACHE_DIR")
        or os.environ.get("DATA_GYM_CACHE_DIR")
        or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    )
    encoders = {}
    missing = []
    for name, urls in REFERENCES.items():
        # tiktoken names a cached file by the sha1 of its address, and downloads the ones that are missing.
        if all((folder / hashlib.sha1(url.encode()).hexdigest()).exists() for url in urls):
            encoders[name] = tiktoken.get_encoding(name).encode_ordinary
        else:
            missing.append(name)
    return encoders, missing


def bytes_per_token(
    encoders: dict[str, Callable[[str], list[int]]], texts: dict[str, str]
) -> dict[str, dict[str, float]]:
    """{kind: {encoder: UTF-8 bytes per token}}; larger is better."""
    return {
        kind: {name: len(text.encode()) / len(encode(text)) for name, encode in encoders.items()}
        for kind, text in texts.items()
    }


def print_comparison(tokenizer: Tokenizer, prose: str) -> None:
    """Prints the table of this tokenizer and of the reference vocabularies in tiktoken's cache."""
    encoders, missing = reference_encoders()
    table = bytes_per_token({"this": tokenizer.encode, **encoders}, sample_texts(prose))
    names = ["this", *encoders]
    print("bytes per token" + "".join(f"{name:>14}" for name in names))
    for kind, row in table.items():
        print(f"{kind:<15}" + "".join(f"{row[name]:14.3f}" for name in names))
    if missing:
        print(
            f"not compared: {', '.join(missing)} (not in tiktoken's cache; fetch once with "
            f"python -c 'import tiktoken; tiktoken.get_encoding(\"{missing[0]}\")')"
        )
