"""Tasks from a server on 127.0.0.1 that speaks the hub's protocol: the right files, checked, resumed, then prepared."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.hub_server import HubServer

from nanojax.cli import UserError
from nanojax.tasks import download, mixture, prepare, prepared
from nanojax.tokenizer import Tokenizer


def parquet(questions: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"question": questions, "answer": [f"<<{q}=2>>2\n#### 2" for q in questions]}), file)
    return file.getvalue()


FILES = {
    "main/train/0000.parquet": parquet(["1+1", "3-1"]),
    "main/train/0001.parquet": parquet(["2*1"]),
    "main/test/0000.parquet": parquet(["4-2"]),
    "socratic/train/0000.parquet": parquet(["no"]),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    with HubServer("openai/gsm8k", FILES) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def fetch(out: Path) -> list[Path]:
    return download.fetch(["gsm8k"], out, wait_seconds=0.001, quiet=True)


def test_a_task_from_the_hub_to_tokens(hub: HubServer, tmp_path: Path) -> None:
    """Both splits of the task's own subset, nothing else; then its conversations, in the files' order."""
    paths = fetch(tmp_path / "texts")
    names = [str(p.relative_to(tmp_path / "texts" / "gsm8k")) for p in paths]
    assert names == ["main/test/0000.parquet", "main/train/0000.parquet", "main/train/0001.parquet"]
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    entries = [mixture.parse("gsm8k:4")]
    prepare.prepare(entries, tmp_path / "texts", tokenizer, lambda: [], tmp_path / "out", quiet=True)
    _, of = prepared.load(tmp_path / "out", "train")
    assert [tokenizer.decode(of[i][0]).split("<|")[2].split(">")[1] for i in range(3)] == ["1+1", "3-1", "2*1"]
    assert of.repeats == (4,)


def test_faults_are_mended_and_whole_files_kept(hub: HubServer, tmp_path: Path) -> None:
    """A busy listing, a cut, a corrupt and a short file: all arrive; a second call asks for nothing."""
    hub.faults = {"tree": ["500"], "main/train/0000.parquet": ["cut", "corrupt"], "main/test/0000.parquet": ["short"]}
    for path in fetch(tmp_path):
        assert path.read_bytes() == FILES[str(path.relative_to(tmp_path / "gsm8k"))]
    before = hub.requests.copy()
    fetch(tmp_path)
    assert hub.requests == before
    (tmp_path / "gsm8k/main/train/0001.parquet").write_bytes(b"no")
    fetch(tmp_path)
    assert (tmp_path / "gsm8k/main/train/0001.parquet").read_bytes() == FILES["main/train/0001.parquet"]


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository without the subset lists what it has."""
    with HubServer("openai/gsm8k", {"socratic/train/0000.parquet": b"x"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(UserError, match=r"has no rows main/train; there are socratic/train"):
            fetch(tmp_path)


def test_a_folder_of_another_task_is_not_mixed(hub: HubServer, tmp_path: Path) -> None:
    """Before anything is fetched into it."""
    fetch(tmp_path)
    (tmp_path / "gsm8k").rename(tmp_path / "mmlu")
    with pytest.raises(UserError, match="holds files of openai/gsm8k"):
        download.fetch(["mmlu"], tmp_path, quiet=True)
