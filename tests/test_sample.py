"""Sampling: the KV cache equals the full forward, draws follow temperature and top-k, the command streams."""

import io
import math
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax import model, sample, step
from nanojax.cli import UserError, run_main
from nanojax.config import Config
from nanojax.run import checkpoint, run_folder
from nanojax.tokenizer import Tokenizer

Make = Callable[..., Config]


def _params(config: Config, seed: int = 0):
    """Parameters with no zeros in them: fresh ones have a zero head, and every logit would be 0."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, a.dtype), shapes)


def test_cache_equals_full_forward(tiny: Make) -> None:
    """At every one of 300 positions, fed as chunks and single tokens: argmax equal, logits within 1e-4."""
    config = tiny(model=dict(seq=320), train=dict(tokens_per_step=640))
    params, T = _params(config), 300
    tokens = np.random.default_rng(1).integers(0, 128, (2, T)).astype(np.int32)
    full = np.asarray(jax.jit(model.forward, static_argnums=0)(config, params, jnp.asarray(tokens)))
    cached = jax.jit(model.forward_cached, static_argnums=0)
    cache, parts, start = model.empty_cache(config, 2, 320), [], 0
    for size in [128, 64, 64, *[1] * 44]:
        before = tokens[:, start - 1] if start else np.full(2, -1)
        new, cache = cached(config, params, tokens[:, start : start + size], cache, jnp.int32(start), before)
        parts.append(np.asarray(new))
        start += size
    logits = np.concatenate(parts, 1)
    assert start == T and np.abs(full).max() > 1
    assert np.abs(logits - full).max() < 1e-4
    assert (logits.argmax(-1) == full.argmax(-1)).all()


@pytest.mark.long
@pytest.mark.parametrize("length", [1, 63, 64, 65, 256, 257, 270])
def test_greedy_is_the_full_forwards_argmax(tiny: Make, length: int) -> None:
    """Greedy text equals repeated argmax of the full forward, for prompts around every chunk and padding boundary."""
    config = tiny(model=dict(seq=320), train=dict(tokens_per_step=640))
    params = _params(config, 2)
    prompt = np.random.default_rng(length).integers(0, 128, length).tolist()
    new = sample.generate(config, params, prompt, 6)[0].tolist()
    forward = jax.jit(model.forward, static_argnums=0)
    row = np.zeros((1, 320), np.int32)
    row[0, : length + 6] = prompt + new
    logits = np.asarray(forward(config, params, jnp.asarray(row)))[0]
    assert new == logits[length - 1 : length + 5].argmax(-1).tolist()


@pytest.mark.long
def test_draws(tiny: Make) -> None:
    """2,000 draws follow the softmax of logits/temperature: chi-squared below its 99.9 % point."""
    config = tiny()
    params = _params(config, 3)
    prompt = [5, 9, 77]
    logits = np.asarray(model.forward(config, params, jnp.asarray([prompt])))[0, -1].astype(np.float64)
    for temperature, top_k in ((1.0, None), (3.0, 8)):
        drawn = sample.generate(config, params, prompt, 1, temperature=temperature, top_k=top_k, samples=2000)[:, 0]
        p = np.exp(logits / temperature)
        if top_k:
            p[np.argsort(p)[:-top_k]] = 0
        p /= p.sum()
        counts = np.bincount(drawn, minlength=128)
        assert counts[p == 0].sum() == 0
        rare = p * 2000 < 5
        observed = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(p[~rare], p[rare].sum()) * 2000
        observed, expected = observed[expected > 0], expected[expected > 0]
        freedom = len(observed) - 1
        assert freedom >= 3
        chi = ((observed - expected) ** 2 / expected).sum()
        spread = 2 / (9 * freedom)
        assert chi < freedom * (1 - spread + 3.09 * math.sqrt(spread)) ** 3  # Wilson-Hilferty's 99.9 % point


@pytest.mark.long
def test_seeds_rows_and_end(tiny: Make) -> None:
    """The same seed gives the same text, another seed another; a row that met `end` is -1 from there on."""
    config = tiny()
    params = _params(config, 4)
    options = dict(temperature=2.0, samples=3)
    first = sample.generate(config, params, [1, 2], 20, seed=1, **options)
    assert (first == sample.generate(config, params, [1, 2], 20, seed=1, **options)).all()
    assert (first != sample.generate(config, params, [1, 2], 20, seed=2, **options)).any()
    assert (first[0] != first[1]).any()
    end = int(first[0, 5])
    ended = sample.generate(config, params, [1, 2], 20, seed=1, end=end, **options)
    for row, whole in zip(ended, first):
        at = np.flatnonzero(whole == end)
        stop = at[0] if len(at) else 20
        assert (row[: min(stop, len(row))] == whole[: min(stop, len(row))]).all()
        assert (row[stop:] == -1).all()
    assert sample.generate(config, params, [1, 2], 20, vocab=3, temperature=5.0).max() < 3


def test_mistakes(tiny: Make) -> None:
    """Too long, empty and foreign prompts are refused in one sentence each."""
    config = tiny()
    params = _params(config)
    with pytest.raises(
        UserError, match="30 tokens and 3 new ones exceed the model's sequence of 32; ask for at most 2"
    ):
        next(sample.stream(config, params, [0] * 30, 3))
    with pytest.raises(UserError, match="empty prompt"):
        next(sample.stream(config, params, [], 3))
    with pytest.raises(UserError, match="outside the model's vocabulary of 128"):
        next(sample.stream(config, params, [128], 3))


@pytest.fixture
def run(tiny: Make, tmp_path: Path) -> Path:
    """A run folder with one checkpoint of random parameters; its tokenizer has multi-byte text to stream."""
    config = tiny(model=dict(vocab=280))
    tokenizer = Tokenizer([*(bytes([b]) for b in range(256)), "é".encode(), "日".encode()[:2], b" the"])
    tokenizer.save(tmp_path / "run" / "tokenizer")
    run_folder.write_config(tmp_path / "run", config)
    state = jax.jit(step.init_state, static_argnums=0)(config)._replace(params=_params(config, 5))
    writer = checkpoint.open_for_saving(tmp_path / "run", config)
    checkpoint.save(writer, config, state, {}, tokenizer.fingerprint)
    writer.close()
    return tmp_path / "run"


def _command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["sample", *arguments])
    monkeypatch.setattr("nanojax.xla.configure", lambda: None)
    run_main(sample.main)


@pytest.mark.long
def test_command(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """One sample is streamed, piece by piece, and equals the text of the API; several are numbered."""
    config, params, tokenizer = checkpoint.load_params(run, "f32")
    expected = sample.text(config, params, tokenizer, "é", 20, temperature=0.8, top_k=50, seed=3)[0]
    pieces = []

    class Pieces(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Pieces())
    _command(monkeypatch, f"--run={run}", "--prompt=é", "--tokens=20", "--seed=3")
    assert "".join(pieces) == expected + "\n" and len(pieces) > 10
    monkeypatch.undo()
    _command(monkeypatch, f"--run={run}", "--prompt=é", "--tokens=5", "--samples=2", "--dtype=bf16")
    lines = capsys.readouterr().out
    assert "--- 1\né" in lines and "--- 2\né" in lines


@pytest.mark.parametrize(
    "wrong",
    [
        ["--run=/nowhere"],
        [],
        ["--tokens=0"],
        ["--tokens=33"],
        ["--temperature=-1"],
        ["--temperature=nan"],
        ["--top-k=-1"],
        ["--samples=0"],
        ["--seed=-1"],
        ["--step=7"],
        ["--dtype=int3"],
        ["--nonsense=1"],
    ],
)
def test_command_mistakes(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, wrong: list[str]
) -> None:
    """Each mistake: one line, exit 2."""
    arguments = wrong if not wrong or wrong[0].startswith("--run") else [f"--run={run}", *wrong]
    with pytest.raises(SystemExit) as stop:
        _command(monkeypatch, *arguments)
    said = capsys.readouterr()
    assert stop.value.code == 2 and len(said.err.splitlines()) == 1 and said.err.startswith("error: ")
    assert said.out == ""
