"""Downloads text shards from the Hugging Face hub: pinned revision, parallel, checksummed, resumable."""

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, logging

from nanojax import cli, files
from nanojax.cli import UserError, first_line
from nanojax.data.clean import split_of
from nanojax.data.text import KNOWN, is_text

# nanochat's shuffled sets: ~100 MB and ~250 M characters per shard, column `text`, the last shard is validation.
PRESETS = {
    "fineweb-edu": "karpathy/fineweb-edu-100b-shuffle",  # 1,823 shards
    "climbmix": "karpathy/climbmix-400b-shuffle",  # 6,543 shards
}
RECORD = "download.json"
PARQUET = "refs/convert/parquet"  # where the hub keeps any data set as subset/split/NNNN.parquet, and lists checksums
TRIES = 6  # waits of 1, 2, 4, 8, 16 s between them: half a minute of a failing server, twice the hub's own retries


class _Record:
    """`download.json`: repository, revision, and the wanted files with size, checksum and time of verification."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / RECORD
        self.lock = threading.Lock()
        self.content: dict[str, Any] = {}
        try:
            self.content = json.loads(self.path.read_bytes())
            assert isinstance(self.content["files"], dict)
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AssertionError):
            raise UserError(f"{self.path}: damaged; delete it, the files themselves are checked again") from None

    def save(self) -> None:
        with files.write_atomic(self.path) as file:
            file.write(json.dumps(self.content, indent=1, sort_keys=True).encode())


def download(
    dataset: str, out: str | os.PathLike, shards: int, threads: int = 4, wait_seconds: float = 1.0, quiet: bool = False
) -> list[Path]:
    """Fetches the first `shards` training files of a dataset repository and one for validation into `out`.

    Where files are named train, validation, test, the names say which are which; otherwise the last one is validation.
    download.json keeps the revision of the first call, so later calls add files of the same version. Returns the local
    paths, validation last. UserError: no such repository, no text files, disk too small, or a file that still fails after
    TRIES tries; whole files that have arrived stay, and the same call continues.
    """
    repo = PRESETS.get(dataset, dataset)
    if repo.count("/") != 1:
        raise UserError(f"--dataset={dataset}: give {', '.join(PRESETS)} or a hub repository as owner/name")
    record = _begun(repo, out)
    if record.content.get("shards", 0) < shards or not record.content.get("files"):
        files = _listing(repo, record, wait_seconds)
        training, held = _splits(sorted(files), repo)
        if shards > len(training):
            raise UserError(f"--shards={shards}: {repo} has {len(training)} training shards and one for validation")
        _want(record, files, [*training[:shards], held], {"shards": shards, "validation": held})
    names = sorted(record.content["files"])
    held = record.content.get("validation", names[-1])  # older records have the last file
    # validation first, because tokenize needs it first
    wanted = [held, *[name for name in names if name != held][:shards]]
    _fetch_missing(wanted, record, threads, wait_seconds, quiet, "ask for fewer --shards")
    return [record.folder / name for name in [*wanted[1:], wanted[0]]]


def download_parquet(
    repo: str, folders: list[str], out: str | os.PathLike, threads: int = 4, wait_seconds: float = 1.0,
    quiet: bool = False,
) -> list[Path]:  # fmt: skip
    """Fetches the parquet files in `folders`, each "subset/split", that the hub made of a dataset repository.

    They are what /api/datasets/REPO/parquet/SUBSET/SPLIT points to, but pinned to a revision and with checksums. As
    `download` otherwise.
    """
    record = _begun(repo, out)
    if record.content.get("folders") != folders:
        files = _listing(repo, record, wait_seconds, PARQUET)
        for folder in folders:
            if not any(name.startswith(f"{folder}/") for name in files):
                there = sorted({name.rpartition("/")[0] for name in files})
                raise UserError(f"{repo}: has no rows {folder}; there are {', '.join(there[:8])}")
        chosen = [name for name in sorted(files) if name.rpartition("/")[0] in folders]
        _want(record, files, chosen, {"folders": folders})
    wanted = sorted(record.content["files"])
    _fetch_missing(wanted, record, threads, wait_seconds, quiet, "choose another --out")
    return [record.folder / name for name in wanted]


def _begun(repo: str, out: str | os.PathLike) -> _Record:
    """The record in the folder `out`, which is made. UserError if it is of another repository."""
    disable_progress_bars()
    logging.set_verbosity_error()
    folder = cli.output_folder(out)
    record = _Record(folder)
    if record.content.setdefault("repo", repo) != repo:
        raise UserError(f"{folder}: holds files of {record.content['repo']}; choose another --out for {repo}")
    return record


def _want(record: _Record, files: dict[str, dict[str, Any]], names: list[str], more: dict[str, Any]) -> None:
    """Records that these files are to be fetched. Those that were verified before stay so."""
    record.content |= more
    record.content["files"] = {
        name: files[name] | ({"verified": old["verified"]} if (old := _old(record, name, files[name])) else {})
        for name in names
    }
    record.save()


def _fetch_missing(
    wanted: list[str], record: _Record, threads: int, wait_seconds: float, quiet: bool, smaller: str
) -> None:
    """Fetches those of the recorded files that are not there and whole. `smaller`: what helps a disk that is too small."""
    left = [name for name in wanted if not _verified(record.folder, name, record)]
    need = sum(record.content["files"][name]["size"] for name in left)
    free = shutil.disk_usage(record.folder).free
    if need > 0.97 * free:
        raise UserError(
            f"{record.folder}: {len(left)} files need {need / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            f"free some, or {smaller}"
        )
    _fetch_all(left, record, threads, wait_seconds, quiet)


def _splits(names: list[str], repo: str) -> tuple[list[str], str]:
    """(training files, the validation file) among the sorted names. UserError if nothing is left to train on."""
    if len(names) < 2:
        raise UserError(f"{repo}: has {len(names)} text files ({KNOWN}), and at least two are needed")
    of = {split: [name for name in names if split_of(name) == split] for split in ("train", "valid", "test", "")}
    training = of["train"] or of[""]
    if not training or len(training) + len(of["valid"]) < 2:
        raise UserError(f"{repo}: no training files among {', '.join(names[:6])}; give a repository that has some")
    return (training, of["valid"][0]) if of["valid"] else (training[:-1], training[-1])


def _old(record: _Record, name: str, info: dict[str, Any]) -> dict[str, Any] | None:
    old = record.content.get("files", {}).get(name, {})
    return old if old.get("sha256") == info["sha256"] and "verified" in old else None


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _listing(repo: str, record: _Record, wait_seconds: float, branch: str | None = None) -> dict[str, dict[str, Any]]:
    """All text files with size and checksum, at the recorded revision or, without one, at the newest of `branch`."""
    api = HfApi(endpoint=_endpoint())

    def ask() -> dict[str, dict[str, Any]]:
        if "revision" not in record.content:
            record.content["revision"] = api.repo_info(repo, repo_type="dataset", revision=branch).sha
        found = {}
        tree = api.list_repo_tree(repo, repo_type="dataset", recursive=True, revision=record.content["revision"])
        for entry in tree:
            if isinstance(entry, RepoFile) and is_text(Path(entry.path)):
                # A large file's checksum is its sha256; a small one's is git's sha1 of b"blob <size>\0" + content.
                sha256 = entry.lfs.sha256 if entry.lfs else ""
                found[entry.path] = {"size": entry.size, "sha256": sha256, "git": entry.blob_id}
        return found

    return _persist(ask, f"listing of {repo}", wait_seconds, lambda attempt, reason: None)


def _persist(action, what: str, wait_seconds: float, note):
    """`action()`, tried TRIES times with doubling waits. UserError with the last reason, at once if retrying is useless."""
    for attempt in range(TRIES):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # of the hub, of the HTTP library (which one depends on the version), of the disk
            status = getattr(getattr(error, "response", None), "status_code", None)
            reason = first_line(error)
            if isinstance(error, OSError) and error.errno in (28, 122, 27):  # ENOSPC, EDQUOT, EFBIG
                raise UserError(f"{what}: cannot be written ({error.strerror}); free space and run again") from None
            if status in (400, 401, 403, 404):
                raise UserError(
                    f"{what}: the server answers {status} ({reason}); check the name and your access"
                ) from None
            if attempt == TRIES - 1:
                raise UserError(
                    f"{what}: still failing after {TRIES} tries ({reason}); what has arrived is kept, run the same "
                    "command again later"
                ) from None
            note(attempt, reason)
            time.sleep(wait_seconds * 2**attempt)
    raise AssertionError("unreachable")


def _verified(out: Path, name: str, record: _Record) -> bool:
    """Whether size and modification time are those of the file whose checksum was verified."""
    info = record.content["files"][name]
    try:
        stat = (out / name).stat()
    except OSError:
        return False
    return stat.st_size == info["size"] and info.get("verified") == stat.st_mtime_ns


def _right(path: Path, info: dict[str, Any]) -> bool:
    if path.stat().st_size != info["size"]:
        return False
    with open(path, "rb") as file:
        if info["sha256"]:
            return hashlib.file_digest(file, "sha256").hexdigest() == info["sha256"]
        return hashlib.sha1(b"blob %d\0" % info["size"] + file.read()).hexdigest() == info["git"]


def _fetch_all(left: list[str], record: _Record, threads: int, wait_seconds: float, quiet: bool) -> None:
    if not left:
        return
    out, repo, endpoint = record.folder, record.content["repo"], _endpoint()
    notes: list[str] = []

    def fetch(name: str) -> None:
        info = record.content["files"][name]
        path = out / name

        def attempt() -> None:
            if not (path.exists() and _right(path, info)):
                path.unlink(missing_ok=True)
                hf_hub_download(
                    repo,
                    name,
                    repo_type="dataset",
                    revision=record.content["revision"],
                    local_dir=out,
                    endpoint=endpoint,
                )
                if not _right(path, info):
                    path.unlink()
                    raise ValueError("its checksum is not the one the hub lists")
            with record.lock:
                info["verified"] = path.stat().st_mtime_ns
                record.save()

        def note(tried: int, reason: str) -> None:
            notes.append(f"{name}: {reason}; try {tried + 2} of {TRIES}")

        _persist(attempt, str(path), wait_seconds, note)

    total = sum(record.content["files"][name]["size"] for name in left)
    partial = out / ".cache" / "huggingface" / "download"
    with cli.Bar("download", total, "B", quiet) as bar:
        pool = ThreadPoolExecutor(threads)
        pending = {pool.submit(fetch, name) for name in left}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                arrived = sum(record.content["files"][n]["size"] for n in left if _verified(out, n, record))
                arrived += sum(_size(path) for path in partial.rglob("*.incomplete"))
                bar.reach(min(arrived, total), notes[-1] if notes else "")
                for future in done:
                    future.result()
        except KeyboardInterrupt:
            # The hub's threads cannot be interrupted. An unfinished file still has its temporary name.
            print("stopped; run the same command again to continue", file=sys.stderr)
            os._exit(130)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # finished between listing and asking
        return 0


def main(arguments: list[str]) -> None:
    """`python -m nanojax.data download`."""
    parser = cli.Parser(
        "python -m nanojax.data download",
        "Fetches text shards from the Hugging Face hub (or the server in HF_ENDPOINT) and checks every checksum.\n"
        "A validation file, or else the repository's last file, is always fetched. The command may be stopped and\n"
        "repeated: whole files are kept, a larger --shards adds to them, and the revision stays that of the first call.",
        "  python -m nanojax.data download --dataset fineweb-edu --shards 800 --out texts/fw\n"
        "  python -m nanojax.data download --dataset climbmix --shards 2 --out texts/cm\n"
        "then\n"
        "  python -m nanojax.data tokenizer --input texts/fw --valid last --out data/fw/tokenizer\n"
        "  python -m nanojax.data tokenize --input texts/fw --valid last --out data/fw",
    )
    parser.add_argument("--dataset", required=True, help=f"{', '.join(PRESETS)}, or a dataset repository owner/name")
    parser.add_argument("--shards", type=cli.count, required=True, metavar="N", help="training files to fetch")
    parser.add_argument(
        "--out", type=cli.path, required=True, metavar="DIR", help="folder for the files and download.json"
    )
    parser.add_argument("--threads", type=cli.count, default=4, metavar="N", help="parallel downloads (%(default)s)")
    args = parser.parse_args(arguments)
    paths = download(args.dataset, args.out, args.shards, args.threads)
    print(f"{len(paths)} files in {args.out}, checksums verified; validation is {paths[-1].name}")
