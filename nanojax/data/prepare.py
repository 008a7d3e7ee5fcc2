"""Tokenizer and token shards from text in one command, for small corpora."""

from pathlib import Path

from nanojax import cli
from nanojax.cli import UserError
from nanojax.data import text
from nanojax.data.tokenize import Options, add_arguments, place_tokenizer, report, tokenize
from nanojax.data.tokenizer import CHARS, train_on, write_trained
from nanojax.tokenizer import FILE_NAME, Tokenizer


def prepare(
    inputs: list[str], out: str | Path, vocab: int, options: Options, workers: int, quiet: bool = False
) -> dict:
    """Trains a tokenizer of `vocab` ids into `out`/tokenizer unless one is there, then tokenises; the manifest."""
    text.find(inputs)  # reports missing inputs before anything is written
    out = cli.output_folder(out)
    if (out / "tokenizer" / FILE_NAME).exists():
        tokenizer = Tokenizer.load(out / "tokenizer")
        if tokenizer.vocab_size != vocab:
            raise UserError(f"{out}/tokenizer: has {tokenizer.vocab_size} ids, not {vocab}; use a new --out folder")
    else:
        tokenizer = train_on(inputs, vocab, options.valid, CHARS, 0, options.key, quiet)
        write_trained(out / "tokenizer", inputs, options.valid, CHARS, 0)
    place_tokenizer(tokenizer, out)
    return tokenize(inputs, out, options, workers, quiet)


def main(arguments: list[str]) -> None:
    """`python -m nanojax.data prepare`."""
    parser = cli.Parser(
        "python -m nanojax.data prepare",
        "Trains a tokenizer on the inputs' whole training text (at most 2e9 characters), then tokenizes them.",
        "  python -m nanojax.data prepare --input sotu --out data/demo --vocab 4096 --valid hash:0.05\n"
        "  python -m nanojax.data prepare --input mytexts/ --out data/mine --vocab 16384 --dedup",
    )
    add_arguments(parser)
    parser.add_argument(
        "--vocab", type=cli.count, default=65536, metavar="N", help="ids, special tokens included (%(default)s)"
    )
    args = parser.parse_args(arguments)
    options = Options(args.valid, args.shard_tokens, args.dedup, args.key)
    report(prepare(args.input, args.out, args.vocab, options, args.workers), args.out)
