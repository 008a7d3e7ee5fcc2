"""Downloads against a misbehaving server on 127.0.0.1: whole and checked files, or one line that says what is wrong."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.hub_server import HubServer

from nanojax.cli import UserError
from nanojax.data import download as module
from nanojax.data.download import TRIES, download

ROOT = Path(__file__).parents[2]
REPO = "someone/texts"
WAIT = 0.01  # seconds before the first repeat, instead of 1


@pytest.fixture
def hub(monkeypatch):
    """Five text shards of 200 kB, one of them stored as a small (not LFS) file, and a README."""
    rng = np.random.default_rng(0)
    files = {f"shard_{n:05d}.jsonl": rng.integers(0, 256, 200_000 + n, np.uint8).tobytes() for n in range(5)}
    with HubServer(REPO, {"README.md": b"# read me", **files}, small=("README.md", "shard_00001.jsonl")) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield server


def get(hub: HubServer, out: Path, shards: int = 4, threads: int = 3) -> list[Path]:
    """Downloads, and checks that what arrived is what the server has."""
    paths = download(REPO, out, shards, threads, WAIT, quiet=True)
    for path in paths:
        assert path.read_bytes() == hub.files[path.name]
    assert not list(out.rglob("*.incomplete"))
    return paths


def test_first_shards_and_the_last_one(hub: HubServer, tmp_path: Path) -> None:
    """N shards are the first N and the repository's last, which comes last in the list; others are not fetched."""
    paths = get(hub, tmp_path, shards=2)
    assert [path.name for path in paths] == ["shard_00000.jsonl", "shard_00001.jsonl", "shard_00004.jsonl"]
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == [
        "download.json", "shard_00000.jsonl", "shard_00001.jsonl", "shard_00004.jsonl",
    ]  # fmt: skip
    assert not any("00002" in name or "README" in name for name in hub.requests)


@pytest.mark.parametrize(
    "names, training, validation",
    [
        ("data/test-0 data/train-0 data/train-1 data/train-2 data/validation-0", "data/train-0 data/train-1", "data/validation-0"),
        ("en/dev en/test en/train-0 en/train-1", "en/train-0 en/train-1", "en/dev"),
        ("test-0 train-0 train-1 train-2", "train-0 train-1", "train-2"),
        ("a b c test validation", "a b", "validation"),
        ("training/a training/b eval/a", "training/a training/b", "eval/a"),
        ("latest contest trainer validity", "contest latest", "validity"),
    ],
)  # fmt: skip
def test_splits_of_a_repository(tmp_path: Path, monkeypatch, names: str, training: str, validation: str) -> None:
    """Files named train are training text and one named validation is validation, wherever the names stand in the path; a
    file named test is never fetched, and metadata is no text."""
    files = {f"{name}.jsonl": name.encode() for name in names.split()} | {"dataset_infos.json": b"{}", "README.md": b"#"}
    with HubServer(REPO, files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        for _ in range(2):  # the second call has nothing to fetch and says the same
            paths = download(REPO, tmp_path, 2, 1, WAIT, quiet=True)
            expected = [f"{name}.jsonl" for name in [*training.split(), validation]]
            assert [path.relative_to(tmp_path).as_posix() for path in paths] == expected


def test_a_repository_without_training_files(tmp_path: Path, monkeypatch) -> None:
    """Test files alone are not trained on: one line with the names."""
    with HubServer(REPO, {"test-0.jsonl": b"a", "test-1.jsonl": b"b"}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(UserError, match=r"no training files among test-0\.jsonl, test-1\.jsonl"):
            download(REPO, tmp_path, 1, 1, WAIT, quiet=True)


@pytest.mark.parametrize("fault", ["cut", "429", "500", "short", "corrupt", "head500", "head429"])
def test_each_fault_is_overcome(hub: HubServer, tmp_path: Path, fault: str) -> None:
    """A file that fails once in this way (and another that fails three times) arrives whole and right."""
    hub.faults = {"shard_00000.jsonl": [fault], "shard_00001.jsonl": ["short", "corrupt", "500"]}
    get(hub, tmp_path)
    assert not any(hub.faults.values())  # every fault really happened


def test_a_cut_transfer_goes_on_where_it_was(hub: HubServer, tmp_path: Path) -> None:
    """After a connection cut in the middle the rest is asked for by range, not the whole file again."""
    hub.files["shard_00000.jsonl"] = bytes(30 << 20)  # the client writes pieces of 10 MiB; a cut in the first loses it
    hub.faults = {"shard_00000.jsonl": ["cut"]}
    get(hub, tmp_path, shards=1)
    assert len(hub.ranges) == 1 and int(hub.ranges[0].split()[1]) >= 10 << 20


@pytest.mark.long
def test_listing_survives_errors(hub: HubServer, tmp_path: Path) -> None:
    """500 and 429 answers to the listing are waited out."""
    hub.faults = {"info": ["500"], "tree": ["500", "429"]}
    get(hub, tmp_path)
    assert not any(hub.faults.values())


@pytest.mark.parametrize("fault", ["corrupt", "short", "500"])
def test_a_file_that_keeps_failing_is_named(hub: HubServer, tmp_path: Path, fault: str) -> None:
    """After TRIES tries: one UserError with the file; the others are kept, no wrong file is left, and the same call
    ends well once the server does."""
    hub.faults = {"shard_00002.jsonl": [fault] * 100}
    with pytest.raises(UserError, match=rf"shard_00002\.jsonl: still failing after {TRIES} tries"):
        get(hub, tmp_path, threads=1)
    assert not (tmp_path / "shard_00002.jsonl").exists()
    hub.faults = {}
    done = hub.requests["GET shard_00000.jsonl"]
    get(hub, tmp_path)
    assert hub.requests["GET shard_00000.jsonl"] == done == 1  # kept from the first call


def test_rerun_fetches_nothing_and_more_shards_add(hub: HubServer, tmp_path: Path) -> None:
    """A second call makes no request at all; a larger one fetches only the new files, of the same revision."""
    get(hub, tmp_path, shards=2)
    before = hub.requests.copy()
    get(hub, tmp_path, shards=2)
    assert hub.requests == before
    get(hub, tmp_path, shards=4)
    assert hub.requests["info"] == 1
    assert all(count == 1 for name, count in hub.requests.items() if name.startswith("GET"))


def test_a_damaged_local_file_is_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    """A file changed, cut or removed since it was verified is noticed and replaced; a touched one is checked."""
    paths = get(hub, tmp_path)
    raw = bytearray(paths[0].read_bytes())
    raw[77] ^= 1
    paths[0].write_bytes(raw)
    os.truncate(paths[1], 10)
    paths[2].unlink()
    os.utime(paths[3])
    get(hub, tmp_path)
    assert [hub.requests[f"GET {path.name}"] for path in paths] == [2, 2, 2, 1, 1]


@pytest.mark.long
def test_killed_downloads_go_on(hub: HubServer, tmp_path: Path) -> None:
    """kill -9 in the middle leaves only whole files under their names; the same command then completes."""
    hub.files["shard_00003.jsonl"] = b"x" * 40_000_000
    arguments = [sys.executable, "-m", "nanojax.data", "download", "--dataset", REPO, "--shards", "4", "--threads", "1",
                 "--out", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "shard_00000.jsonl").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in tmp_path.glob("shard_*"):
        assert path.read_bytes() == hub.files[path.name]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "5 files" in done.stdout and "checksums verified" in done.stdout
    assert all((tmp_path / name).read_bytes() == data for name, data in hub.files.items() if name != "README.md")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nobody/nothing", 1), "nobody/nothing: the server answers 404"),
        (("word", 1), "--dataset=word: give fineweb-edu, climbmix or a hub repository"),
        ((REPO, 5), "--shards=5: someone/texts has 4 training shards"),
    ],
)
def test_wrong_requests_are_one_line(hub: HubServer, tmp_path: Path, arguments: tuple, message: str) -> None:
    """No such repository, not a repository name, more shards than there are: reported at once, without retries."""
    with pytest.raises(UserError, match=message):
        download(arguments[0], tmp_path, arguments[1], 1, WAIT, quiet=True)
    assert not list(tmp_path.glob("shard_*"))


def test_another_repository_in_the_folder_is_refused(hub: HubServer, tmp_path: Path) -> None:
    """A folder that holds one repository's files does not take another's."""
    get(hub, tmp_path)
    with pytest.raises(UserError, match="holds files of someone/texts"):
        download("climbmix", tmp_path, 1, 1, WAIT, quiet=True)


def test_disk_space_is_checked_first(hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    """With too little room nothing is fetched, and the line says how much is needed."""
    usage = shutil.disk_usage(tmp_path)._replace(free=500_000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"5 files need 0\.00 GB and the disk has 0\.00 GB free"):
        get(hub, tmp_path)
    assert not any(name.startswith("GET") for name in hub.requests)


def test_damaged_record_is_named(hub: HubServer, tmp_path: Path) -> None:
    """A broken download.json is a UserError; deleted, the files are checked and kept."""
    get(hub, tmp_path)
    (tmp_path / "download.json").write_text("{")
    with pytest.raises(UserError, match=r"download\.json: damaged"):
        get(hub, tmp_path)
    (tmp_path / "download.json").unlink()
    get(hub, tmp_path)
    assert all(count == 1 for name, count in hub.requests.items() if name.startswith("GET"))


def test_presets_are_nanochats(hub: HubServer, tmp_path: Path) -> None:
    """The record keeps repository, revision and checksums; the presets name nanochat's sets."""
    get(hub, tmp_path, shards=1)
    record = json.loads((tmp_path / "download.json").read_text())
    assert record["repo"] == REPO and record["revision"] == hub.sha
    content = hub.files["shard_00000.jsonl"]
    assert isinstance(content, bytes)
    expected = hashlib.sha256(content).hexdigest()
    assert record["files"]["shard_00000.jsonl"]["sha256"] == expected
    assert module.PRESETS["fineweb-edu"] == "karpathy/fineweb-edu-100b-shuffle"
    assert module.PRESETS["climbmix"] == "karpathy/climbmix-400b-shuffle"


def test_unreachable_server_is_one_line(tmp_path: Path, monkeypatch) -> None:
    """Nobody answers at the endpoint: one line after the tries, nothing written but an empty folder."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(module, "TRIES", 2)
    with pytest.raises(UserError, match="listing of someone/texts: still failing after 2 tries"):
        download(REPO, tmp_path, 1, 1, WAIT, quiet=True)
