"""Lists the commands.        python -m nanojax"""

import sys

from nanojax.cli import UserError, run_main, version

COMMANDS = {
    "doctor": "what keeps this machine from training, or slows it",
    "data": "text to token shards",
    "train": "train a model; the same command again resumes",
    "tasks": "conversations to tokens for fine-tuning",
    "sft": "fine-tune a model on conversations; the same command again resumes",
    "rl": "train a model on rewards for its own answers; the same command again resumes",
    "status": "where a run is, from its folder alone",
    "report": "one page about a run: curves, scores, texts, time, energy, money, commands",
    "sample": "text from a trained model",
    "chat": "a conversation with a trained model",
    "serve": "a chat server: a page for a browser, and OpenAI's API",
    "evaluate": "bits per byte, CORE, ChatCORE, sample texts",
    "plan": "what a run needs on a GPU that may be absent",
    "interop": "checkpoints of nanochat and Hugging Face, both ways",
}


def main() -> None:
    """The command."""
    if "--version" in sys.argv[1:]:
        return print(version())
    if sys.argv[1:] and sys.argv[1] not in ("-h", "--help"):
        raise UserError(f"{sys.argv[1]}: write python -m nanojax.{sys.argv[1]}; the commands are {', '.join(COMMANDS)}")
    print("usage: python -m nanojax.COMMAND --help\n")
    print("\n".join(f"  nanojax.{name:<10} {what}" for name, what in COMMANDS.items()))


if __name__ == "__main__":
    run_main(main)
