"""The evaluate command on a real run folder: bits per byte by hand, independent of the batch, CORE files, errors."""

import dataclasses
import json
import lzma
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import core_bundle, tiny_run
from oracles import numpy_gpt

from nanojax.cli import UserError
from nanojax.config import Compute, Config, Data, Model, Train
from nanojax.config_rules import resolve
from nanojax.data import loader
from nanojax.evaluate import __main__ as evaluate
from nanojax.evaluate import bpb
from nanojax.evaluate.subject import load
from nanojax.interop import Imported, convert, to_run
from nanojax.run import checkpoint
from nanojax.tokenizer import Tokenizer

STEP = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_run.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A run folder with random parameters, a checkpoint of step 3, and a bundle of two small tasks beside it."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = Tokenizer.load(data / "tokenizer")
    m = Model(depth=1, width=64, head_dim=32, vocab=320, seq=32)
    config = Config(model=m, data=Data(path=str(data)), compute=Compute(loss_chunk=32), train=Train(tokens_per_step=32))
    config = resolve(config)
    to_run(Imported(config, numpy_gpt.random_params(0, config), tokenizer, STEP), folder / "run")
    core_bundle.write_small(folder / "bundle")
    return folder / "run"


def _bpb(run: Path, texts: dict[str, str], batch: int) -> dict:
    config, params, tokenizer = checkpoint.load_params(run, "f32")
    return bpb.summary(bpb.of_texts(config, params, tokenizer, list(texts.items()), batch))


TEXTS = {"a": "the people of this great nation " * 9, "b": "Fünf ünïté! 1837\n" * 20, "c": "x", "d": "peace " * 50}


def test_bits_per_byte_by_hand(run):
    """Against numpy to 1e-6, in total and per source: every token once; special tokens in neither sum."""
    config, params, tokenizer = checkpoint.load_params(run, "f32")
    T, nats, size = config.model.T, dict.fromkeys(TEXTS, 0.0), dict.fromkeys(TEXTS, 0)
    stream: list[tuple[int, str]] = []
    for name, text in TEXTS.items():
        stream += [(tokenizer.bos, "")] * bool(len(stream) % T) + [(i, name) for i in tokenizer.encode(text)]
    for start in range(0, len(stream), T):
        part = stream[start : start + T]
        row = np.array([[tokenizer.bos, *(i for i, _ in part)]])
        for nll, (_, name) in zip(numpy_gpt.token_losses(params, row[:, :-1], row[:, 1:], config)[0], part):
            if name:
                nats[name] += nll
    for name, text in TEXTS.items():
        size[name] = len(text.encode())
    found = _bpb(run, TEXTS, 3)
    assert found["bytes"] == sum(size.values()) == sum(len(t.encode()) for t in TEXTS.values())
    assert found["bpb"] == pytest.approx(sum(nats.values()) / math.log(2) / sum(size.values()), rel=1e-6)
    for name, scores in found["sources"].items():
        assert scores["bytes"] == size[name]
        assert scores["bpb"] == pytest.approx(nats[name] / math.log(2) / size[name], rel=1e-6)
        assert scores["tokens"] == len(tokenizer.encode(TEXTS[name]))


@pytest.mark.long
def test_bits_per_byte_do_not_depend_on_the_batch(run):
    """Batches of 1, 2, 5 and more rows than there are: equal to 1e-6, the counts exactly."""
    first = _bpb(run, TEXTS, 1)
    for batch in (2, 5, 64):
        found = _bpb(run, TEXTS, batch)
        assert found["bpb"] == pytest.approx(first["bpb"], rel=1e-6)
        assert (found["tokens"], found["bytes"]) == (first["tokens"], first["bytes"])


def test_validation_shards_equal_numpy(run, data):
    """--data: all rows of the validation shards, special tokens left out, equal numpy's figure to 1e-6."""
    config, params, tokenizer = checkpoint.load_params(run, "f32")
    rows = np.concatenate(list(loader.valid_batches(data, 1, config.model.T)))
    nll = numpy_gpt.token_losses(params, rows[:, :-1], rows[:, 1:], config)
    size = tokenizer.bytes_per_token()[rows[:, 1:]]
    done: list[int] = []
    found = bpb.of_folder(config, params, tokenizer, data, 7, progress=done.append).scores()
    assert found["bpb"] == pytest.approx(nll[size > 0].sum() / math.log(2) / size.sum(), rel=1e-6)
    assert found["bytes"] == size.sum() and found["tokens"] == (size > 0).sum() < size.size
    assert done == [*range(7, len(rows), 7), len(rows)]
    first = bpb.of_folder(config, params, tokenizer, data, 2, tokens=2 * config.model.T + 1)
    assert first.bytes == size[:3].sum()  # three rows hold the first two rows and one token


def test_no_text(run):
    """Nothing to measure is an error, not a division by zero."""
    with pytest.raises(UserError, match="no text found"):
        _bpb(run, {}, 2)


def test_files_and_sources(tmp_path):
    """Compressed JSON lines by a key's value, text by file; a key that is not there is one line."""
    lines = [{"source": "x", "text": "peace and law"}, {"source": "y", "text": "honor"}, {"source": "x", "text": "law"}]
    compressed = lzma.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    (tmp_path / "m.jsonl.xz").write_bytes(compressed)
    (tmp_path / "t.txt").write_text("the state")
    by_key = list(bpb.text_documents([str(tmp_path / "m.jsonl.xz")], by="source"))
    assert by_key == [("x", "peace and law"), ("y", "honor"), ("x", "law")]
    by_file = dict(bpb.text_documents([str(tmp_path / "m.jsonl.xz"), str(tmp_path / "t.txt")]))
    assert set(by_file) == {"m.jsonl.xz", "t.txt"}
    with pytest.raises(UserError, match="'nope'"):
        list(bpb.text_documents([str(tmp_path / "m.jsonl.xz")], by="nope"))


def _command(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    evaluate.main()


@pytest.mark.long
def test_the_command_writes_everything(run, tmp_path, monkeypatch, capsys):
    """bpb, CORE and samples: JSON, CSV, text and TensorBoard in the run folder; the second time CORE resumes."""
    _command(monkeypatch, f"--run={run}", "--eval=bpb,core,sample", f"--bundle={run.parent / 'bundle'}", "--tokens=4")
    said = capsys.readouterr().out
    assert "GPT-2" in said and "0.3168" in said and "choice" in said
    found = json.loads((run / "evals" / "core_000003.json").read_text())
    accuracy = {k: v["accuracy"] for k, v in found["tasks"].items()}
    assert found["core"] == pytest.approx(((accuracy["choice"] - 0.5) / 0.5 + accuracy["lm"]) / 2)
    assert found["step"] == STEP and found["tasks"]["choice"]["total"] == 9
    csv = (run / "evals" / "core_000003.csv").read_text().splitlines()
    assert csv[0] == "Task,Accuracy,Centered" and csv[-1] == f"CORE,,{found['core']:.6f}"
    assert json.loads((run / "evals" / "bpb_000003.json").read_text())["bpb"] > 1
    assert (run / "evals" / "sample_000003.txt").read_text().startswith("The capital of France is")
    assert list((run / "tensorboard").glob("events*"))
    _command(monkeypatch, f"--run={run}", "--eval=core", f"--bundle={run.parent / 'bundle'}")
    assert "resuming: 18 examples" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_on_two_devices(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--devices=all: bits per byte to 1e-9, CORE's tasks and the texts exactly those of one device."""
    shared = (f"--run={run}", "--eval=bpb,core,sample", f"--bundle={run.parent / 'bundle'}", "--tokens=4")
    for number in ("1", "all"):
        _command(monkeypatch, *shared, f"--out={tmp_path / number}", f"--devices={number}")
    one, two = (tmp_path / number / "evals" for number in ("1", "all"))
    read = lambda folder, name, key: json.loads((folder / f"{name}_000003.json").read_text())[key]
    assert read(two, "bpb", "bpb") == pytest.approx(read(one, "bpb", "bpb"), rel=1e-9)
    for key in ("core", "tasks", "params"):
        assert read(two, "core", key) == read(one, "core", key)
    assert (two / "sample_000003.txt").read_text() == (one / "sample_000003.txt").read_text()


@pytest.mark.long
def test_a_hugging_face_folder_scores_as_the_run(run, tmp_path, monkeypatch, capsys):
    """--hf on the exported folder gives the run's CORE and bits per byte, without an import."""
    config, params, tokenizer = checkpoint.load_params(run, "f32")
    convert.export_transformers(tmp_path / "hf", config, jax.tree.map(np.asarray, params), tokenizer)
    (tmp_path / "t.txt").write_text("the people have met " * 30)
    shared = ("--eval=bpb,core", f"--bundle={run.parent / 'bundle'}", f"--text={tmp_path / 't.txt'}")
    _command(monkeypatch, f"--hf={tmp_path / 'hf'}", f"--out={tmp_path / 'a'}", *shared)
    _command(monkeypatch, f"--run={run}", f"--out={tmp_path / 'b'}", *shared)
    read = lambda path: json.loads(path.read_text())
    for key, name in (("core", "core"), ("bpb", "bpb")):
        a, b = (read(tmp_path / f) for f in (f"a/evals/{name}_000000.json", f"b/evals/{name}_000003.json"))
        assert a[key] == b[key]


@pytest.mark.long
def test_another_programs_folder_stays_as_it_is(run, tmp_path, monkeypatch, capsys):
    """--hf without --out: results are printed only; without --eval what cannot be measured is left out and said."""
    config, params, tokenizer = checkpoint.load_params(run, "f32")
    convert.export_transformers(tmp_path / "hf", config, jax.tree.map(np.asarray, params), tokenizer)
    (tmp_path / "t.txt").write_text("the people have met " * 30)
    before = sorted(tmp_path.rglob("*"))
    _command(monkeypatch, f"--hf={tmp_path / 'hf'}", "--tokens=2", "--prompt=the")
    said = capsys.readouterr().out
    assert "bits per byte skipped: nothing says which data this model was validated on" in said and "· the" in said
    for rule in ("raw", "decoded"):
        text = ("--eval=bpb,core", f"--text={tmp_path / 't.txt'}", f"--bundle={run.parent / 'bundle'}")
        _command(monkeypatch, f"--hf={tmp_path / 'hf'}", *text, f"--token-bytes={rule}")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="was validated on; give --data"):
        _command(monkeypatch, f"--hf={tmp_path / 'hf'}", "--eval=bpb")


def test_another_model_does_not_resume(run):
    """A single changed parameter, or two rows exchanged, gives another identity: no outcome is taken over."""
    subject = load(str(run), None, "f32", None)
    head = subject.params["head"]
    changed = dataclasses.replace(subject, params={**subject.params, "head": head.at[0, 0].add(jnp.float32(1e-3))})
    swapped = dataclasses.replace(subject, params={**subject.params, "head": head[::-1]})
    assert subject.identity() == subject.identity()
    assert subject.identity() not in (changed.identity(), swapped.identity())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--run=DIR"),
        (("--run={run}", "--hf=x"), "--run=DIR"),
        (("--run=nowhere",), "not a run folder"),
        (("--hf=nowhere",), "no such folder"),
        (("--run={run}", "--eval=perplexity"), "choose from"),
        (("--run={run}", "--eval=,"), "empty"),
        (("--run={run}", "--eval=core", "--bundle=nowhere"), "eval_bundle.zip"),
        (("--run={run}", "--step=99"), "no checkpoint of step 99"),
        (("--run={run}", "--text=nothing*"), "no such file"),
        (("--run={run}", "--data=nothing"), "no data folder"),
        (("--run={run}", "--batch-tokens=0"), "at least 1"),
        (("--run={run}", "--nope"), "unrecognized"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run, monkeypatch):
    """Wrong or missing arguments: UserError in one line, before anything is written."""
    with pytest.raises(UserError, match=message) as caught:
        _command(monkeypatch, *(a.format(run=run) for a in arguments))
    assert "\n" not in str(caught.value)
