"""Fetches the rows of nanochat's tasks from the hub, checked and resumable: `python -m nanojax.tasks download`."""

from pathlib import Path

from nanojax import cli
from nanojax.cli import UserError
from nanojax.data.download import download_parquet
from nanojax.tasks import hub


def fetch(names: list[str], out: Path, wait_seconds: float = 1.0, quiet: bool = False) -> list[Path]:
    """All rows of the named tasks, train and test, into OUT/TASK/subset/split/. UserError as `download_parquet`."""
    for name in names:
        if name not in hub.TASKS:
            raise UserError(f"{name}: no such task; there are {', '.join(hub.TASKS)}")
    paths = []
    for name in names:
        task = hub.TASKS[name]
        folders = [folder for folder in (task.train, task.test) if folder]
        paths += download_parquet(task.repo, folders, out / name, wait_seconds=wait_seconds, quiet=quiet)
    return paths


def main(arguments: list[str]) -> None:
    """`python -m nanojax.tasks download`."""
    parser = cli.Parser(
        "python -m nanojax.tasks download",
        f"Fetches tasks from the Hugging Face hub (or the server in HF_ENDPOINT) and checks every checksum:\n"
        f"{', '.join(hub.TASKS)}. The command may be stopped and repeated.",
        "  python -m nanojax.tasks download smoltalk mmlu gsm8k --out texts/chat",
    )
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="what to fetch")
    parser.add_argument("--out", type=cli.path, default="texts/chat", metavar="DIR",
                        help="folder for a folder per task (%(default)s)")  # fmt: skip
    args = parser.parse_args(arguments)
    paths = fetch(args.tasks, Path(args.out))
    print(f"{len(paths)} files in {args.out}, checksums verified")
