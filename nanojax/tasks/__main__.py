"""Dispatches `python -m nanojax.tasks <subcommand>`; each subcommand lives in the file of its name."""

from nanojax.cli import run_main, run_subcommand

SUBCOMMANDS = {
    "download": "fetch nanochat's tasks from the Hugging Face hub",
    "prepare": "a mixture of tasks and of your own conversations -> tokens for fine-tuning",
    "show": "print conversations, supervised tokens in colour",
}
EXAMPLES = """\
  python -m nanojax.tasks download smoltalk mmlu gsm8k --out texts/chat
  python -m nanojax.tasks prepare smoltalk mmlu:3 gsm8k:4 --tokenizer runs/d24 --out data/chat
  python -m nanojax.tasks show data/chat"""


def main() -> None:
    """Runs the subcommand named first on the command line."""
    run_subcommand("nanojax.tasks", "Conversations in, tokens for fine-tuning out.", SUBCOMMANDS, EXAMPLES)


if __name__ == "__main__":
    run_main(main)
