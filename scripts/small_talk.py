"""Conversations of the PyPI package chatterbot-corpus as JSON lines that nanojax.tasks reads.

pip install chatterbot-corpus
python scripts/small_talk.py greetings conversations --out texts/greetings.jsonl
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from nanojax import cli, files
from nanojax.cli import UserError

PACKAGE = "chatterbot_corpus"


def conversations(path: Path) -> Iterator[dict[str, Any]]:
    """The conversations of a corpus file: user and assistant in turns; a last message without an answer is left out.

    UserError for a file that is no such corpus.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
        for lines in found:
            if not isinstance(lines, list):
                raise TypeError(f"{lines!r} is no list of messages")
            whole = [str(line) for line in lines[: len(lines) // 2 * 2]]  # a bare 1963 is a number to YAML
            if whole:
                roles = ("user", "assistant") * (len(whole) // 2)
                yield {"messages": [{"role": role, "content": line} for role, line in zip(roles, whole)]}
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a file of chatterbot-corpus ({cli.first_line(error)})") from None


def folder(language: str) -> Path:
    """Where the installed package has this language's files. UserError if it is not installed or lacks the language."""
    found = importlib.util.find_spec(PACKAGE)
    if not found or not found.origin:
        raise UserError("chatterbot-corpus is not installed: pip install chatterbot-corpus")
    data = Path(found.origin).parent / "data"
    if not (data / language).is_dir():
        raise UserError(f"--language={language}: there are {', '.join(sorted(p.name for p in data.iterdir()))}")
    return data / language


def main() -> None:
    """The command."""
    parser = cli.Parser(
        "python scripts/small_talk.py",
        "Writes conversations of chatterbot-corpus (BSD licence) as JSON lines for nanojax.tasks prepare.",
        "  python scripts/small_talk.py greetings conversations --out texts/greetings.jsonl",
    )
    parser.add_argument("topics", nargs="+", help="names of the corpus' files, such as greetings")
    parser.add_argument("--language", default="english", help="folder of the corpus (english)")
    parser.add_argument("--out", type=cli.path, required=True, metavar="FILE", help="file of JSON lines to write")
    a = parser.parse_args()
    corpus = folder(a.language)
    there = sorted(path.stem for path in corpus.glob("*.yml"))
    for topic in a.topics:
        if topic not in there:
            raise UserError(f"{topic}: no such topic; there are {', '.join(there)}")
    lines = [json.dumps(each) for topic in a.topics for each in conversations(corpus / f"{topic}.yml")]
    with files.write_atomic(Path(a.out)) as file:
        file.write(("\n".join(lines) + "\n").encode())
    print(f"{a.out}: {len(lines)} conversations")


if __name__ == "__main__":
    cli.run_main(main)
