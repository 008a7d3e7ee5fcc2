"""Dispatches `python -m nanojax.tasks <subcommand>`; each subcommand lives in the file of its name."""

import importlib
import sys

from nanojax.cli import UserError, run_main, version

SUBCOMMANDS = {
    "download": "fetch nanochat's tasks from the Hugging Face hub",
    "prepare": "a mixture of tasks and of your own conversations -> tokens for fine-tuning",
    "show": "print conversations, supervised tokens in colour",
}
HELP = (
    "usage: python -m nanojax.tasks SUBCOMMAND [--help]\n\nConversations in, tokens for fine-tuning out.\n\n"
    + "\n".join(f"  {name:<10} {what}" for name, what in SUBCOMMANDS.items())
    + "\n\nexamples:\n"
    "  python -m nanojax.tasks download smoltalk mmlu gsm8k --out texts/chat\n"
    "  python -m nanojax.tasks prepare smoltalk mmlu:3 gsm8k:4 --tokenizer runs/d24 --out data/chat\n"
    "  python -m nanojax.tasks show data/chat\n"
)


def main() -> None:
    """Runs the subcommand named first on the command line."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(HELP, end="")
        return
    name = sys.argv[1]
    if name == "--version":
        return print(version())
    if name not in SUBCOMMANDS:
        raise UserError(f"no subcommand {name!r}; there are {', '.join(SUBCOMMANDS)}")
    importlib.import_module(f"nanojax.tasks.{name}").main(sys.argv[2:])


if __name__ == "__main__":
    run_main(main)
