"""Checkpoints: what is saved comes back, damage is told by name, older good ones are used; any device and dtype."""

import functools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.paths import ROOT
from orbax.checkpoint import v1 as ocp

from nanojax import quant, step
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.run import checkpoint, exits, run_folder
from nanojax.tokenizer import Tokenizer

Make = Callable[..., Config]
INT8 = dict(blocks="int8", embed="bf16", head="bf16", momentum="int8", adam="int8")


@functools.cache
def _fresh(config: Config) -> step.State:
    return jax.jit(step.init_state, static_argnums=0)(config)


def _noise(state: step.State, seed: int) -> step.State:
    """The state with other numbers in every leaf but the accumulators, which are zeros between steps."""
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.ndim:
            return jnp.asarray(rng.integers(-127, 128, leaf.shape), leaf.dtype)
        return leaf if leaf.ndim == 0 else jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return step.State(state.step + seed, jax.tree.map(fill, state.params), jax.tree.map(fill, state.opt), state.accum)


def _save(run: Path, config: Config, seeds: list[int]) -> dict[int, step.State]:
    """Checkpoints of steps `seeds` in `run`; the states."""
    run.mkdir(exist_ok=True)
    tokens = [bytes([b]) for b in range(256)]
    Tokenizer(tokens).save(run / "tokenizer")
    run_folder.write_config(run, config)
    states = {seed: _noise(_fresh(config), seed) for seed in seeds}
    writer = checkpoint.open_for_saving(run, config)
    for seed, state in states.items():
        checkpoint.save(writer, config, state, {"position": seed}, "abc")
    checkpoint.wait(writer, max(seeds, default=0))
    writer.close()
    return states


def _same(a: step.State, b: step.State) -> bool:
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def test_a_restored_state_exists_once(tmp_path: Path, tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is read and copied, one state and no second one is in memory, but for the largest leaf; so it fits again."""
    config = tiny(stored=INT8)
    _save(tmp_path, config, [1])
    before = {id(a) for a in jax.live_arrays()}
    held: list[int] = []
    size = lambda: sum(a.nbytes for a in jax.live_arrays() if id(a) not in before)
    checks = checkpoint.checks
    monkeypatch.setattr(checkpoint, "checks", lambda parts: (held.append(size()), checks(parts))[1])
    restored = checkpoint.restore(tmp_path, config)
    assert restored is not None
    kept = jax.tree.leaves((restored[0].params, restored[0].opt))
    assert held[0] <= sum(a.nbytes for a in kept) + max(a.nbytes for a in kept) + 4096


@pytest.mark.long
@pytest.mark.parametrize(
    "stored",
    [
        INT8 | {"blocks": "b2.67"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(INT8, marks=pytest.mark.slow),
        pytest.param(INT8 | {"blocks": "nf4", "remainder": 0}, marks=pytest.mark.slow),
    ],
    ids=["b2.67", "f32", "int8", "nf4-without-remainder"],
)
def test_round_trip(tiny: Make, tmp_path: Path, stored: dict[str, str | int]) -> None:
    """Every leaf comes back bit by bit with its dtype, the accumulators as zeros, and the meta data with it."""
    config = tiny(stored=stored, model=dict(width=256, vocab=272))
    state = _save(tmp_path / "run", config, [5])[5]
    restored = checkpoint.restore(tmp_path / "run", config)
    assert restored is not None
    assert _same(restored[0], state)
    assert restored[1]["step"] == 5 and restored[1]["data"] == {"position": 5} and restored[1]["tokenizer"] == "abc"


def test_nothing_there(tiny: Make, tmp_path: Path) -> None:
    """No checkpoint: None to a training run, one line to a reader; a cut-off save is not a checkpoint."""
    config = tiny()
    _save(tmp_path / "run", config, [])
    (tmp_path / "run" / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    assert checkpoint.restore(tmp_path / "run", config) is None
    with pytest.raises(UserError, match="no checkpoint yet"):
        checkpoint.load_params(tmp_path / "run")
    with pytest.raises(UserError, match="not a run folder"):
        checkpoint.load_params(tmp_path / "elsewhere")


@pytest.mark.long
def test_keep_last_and_keep_every(tiny: Make, tmp_path: Path) -> None:
    """keep_last 2 and keep_every 4 of steps 1..9 leave 4, 8, 9."""
    _save(tmp_path / "run", tiny(checkpoint=dict(keep_last=2, keep_every=4)), list(range(1, 10)))
    assert run_folder.available(tmp_path / "run") == [4, 8, 9]


def test_nan_is_not_saved(tiny: Make, tmp_path: Path) -> None:
    """A NaN anywhere in parameters or optimizer is named and nothing is written."""
    config = tiny()
    _save(tmp_path / "run", config, [1])
    state = _fresh(config)
    up = {**state.opt["up"], "momentum": state.opt["up"]["momentum"].at[1, 2, 3].set(jnp.nan)}
    writer = checkpoint.open_for_saving(tmp_path / "run", config)
    with pytest.raises(checkpoint.NotFinite, match="up/momentum"):
        checkpoint.save(writer, config, state._replace(opt={**state.opt, "up": up}), {}, "abc")
    writer.close()
    assert run_folder.available(tmp_path / "run") == [1]


def _files(folder: Path) -> list[Path]:
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


@pytest.mark.long
@pytest.mark.parametrize("kinds", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_damage(tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture, kinds: int) -> None:
    """Each file of a checkpoint removed, cut in half, or with one bit flipped: what is restored is right or refused.

    Files are damaged in one of these ways, or (slow) in all three. Refused means that the older checkpoint is used, a
    warning names the damaged folder, and it is moved to damaged/.
    """
    config = tiny(model=dict(vocab=272))
    states = _save(tmp_path / "good", config, [3, 6])
    rng, fallbacks = random.Random(0), 0
    for file in _files(tmp_path / "good" / "checkpoints" / "6"):
        for kind in rng.sample(("removed", "cut", "flipped"), kinds):
            run = tmp_path / "run"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(tmp_path / "good", run)
            victim = run / "checkpoints" / "6" / file
            content = bytearray(victim.read_bytes())
            if kind == "removed":
                victim.unlink()
            elif kind == "cut":
                victim.write_bytes(content[: len(content) // 2])
            elif content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                victim.write_bytes(content)
            restored = checkpoint.restore(run, config)
            assert restored is not None
            state, meta = restored
            assert _same(state, states[meta["step"]]), (file, kind)
            said = capsys.readouterr().err.splitlines()
            if meta["step"] == 3:
                fallbacks += 1
                assert len(said) == 1 and f"warning: {run}/checkpoints/6: damaged" in said[0], said
                assert (run / "damaged" / "6").is_dir() and run_folder.available(run) == [3]
            else:
                assert said == [] and run_folder.available(run) == [3, 6]
    assert fallbacks >= 4 * kinds  # the data, the trees, the meta data and the marks of completeness


@pytest.mark.long
def test_a_flipped_bit_in_meta_is_seen(tiny: Make, tmp_path: Path) -> None:
    """Each of 2,000 flipped bits of meta is refused or changes nothing; a flipped data position falls back to the older one."""
    config = tiny()
    _save(tmp_path / "run", config, [3, 6])
    path = tmp_path / "run" / "checkpoints" / "6" / "meta" / "data.json"
    good, meta, rng = path.read_bytes(), run_folder.saved_meta(tmp_path / "run", 6), random.Random(0)
    refused = 0
    for _ in range(2000):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            found = run_folder.saved_meta(tmp_path / "run", 6)
            assert {key: found[key] for key in meta if key != "seal"} == {k: v for k, v in meta.items() if k != "seal"}
        except UserError:
            refused += 1
    assert refused > 1900
    path.write_bytes(good.replace(b'"position": 6', b'"position": 7'))
    assert path.read_bytes() != good
    restored = checkpoint.restore(tmp_path / "run", config)
    assert restored is not None and restored[1]["data"] == {"position": 3}


def test_only_damaged(tiny: Make, tmp_path: Path) -> None:
    """With no good checkpoint left: one line that names the folder, and nothing is moved."""
    config = tiny()
    _save(tmp_path / "run", config, [3, 6])
    for number in (3, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(number) / "params")
    with pytest.raises(UserError, match=r"checkpoints/6: damaged checkpoint \(params/commit_success.txt is missing\)"):
        checkpoint.restore(tmp_path / "run", config)
    with pytest.raises(UserError, match="nor is any of the 1 older ones whole"):
        checkpoint.load_params(tmp_path / "run")
    with pytest.raises(exits.Lost), exits.restarting(True):  # a restart loop would try for ever
        checkpoint.restore(tmp_path / "run", config)
    assert run_folder.available(tmp_path / "run") == [3, 6]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"depth": "x"}}', '{"model": {"depht": 3}}'])
def test_damaged_config(tmp_path: Path, content: str) -> None:
    """A config.json that cannot be read is named."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        run_folder.read_config(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_other_dtypes(tiny: Make, tmp_path: Path, dtype: str) -> None:
    """An int8 run loaded as f32 or bf16 has the decoded values exactly, and a config that computes in them."""
    config = tiny(stored=INT8, model=dict(width=256, vocab=272), compute=dict(forward="int8", dx="int8", dw="int8"))
    state = _save(tmp_path / "run", config, [2])[2]
    loaded, params, tokenizer = checkpoint.load_params(tmp_path / "run", dtype)
    expected = quant.decode_tree(state.params, checkpoint.DTYPES[dtype])
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert a.dtype == checkpoint.DTYPES[dtype] and bool((a == b).all())
    assert loaded.stored.blocks == loaded.compute.dtype == dtype and loaded.compute.forward == "float"
    assert tokenizer.vocab_size == 265
    with pytest.raises(UserError, match="no checkpoint of step 9; there are"):
        checkpoint.load_params(tmp_path / "run", step=9)


@pytest.mark.long
def test_copied_elsewhere(tiny: Make, tmp_path: Path) -> None:
    """A run folder copied away loads in a fresh process, with no config file and from another working directory."""
    state = _save(tmp_path / "run", tiny(model=dict(vocab=272)), [4])[4]
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    code = "import sys, nanojax, numpy; from nanojax.run import checkpoint; "
    code += "numpy.save(sys.argv[2], checkpoint.load_params(sys.argv[1])[1]['head'])"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "copy"), str(tmp_path / "head.npy")]
    subprocess.run(command, env=env, cwd=tmp_path, check=True)
    assert (np.load(tmp_path / "head.npy") == np.asarray(state.params["head"])).all()


@pytest.mark.long
def test_state_may_be_donated_at_once(tiny: Make, tmp_path: Path) -> None:
    """The asynchronous save holds the values of the call, though the next step overwrites the buffers meanwhile."""
    config = tiny(model=dict(vocab=272))
    _save(tmp_path / "run", config, [])
    state = _noise(_fresh(config), 1)
    expected = jax.tree.map(np.asarray, state)
    advance = jax.jit(functools.partial(step.train_step, config), donate_argnums=0)
    advance(_noise(_fresh(config), 2), step.Batch(jnp.zeros(config.batch_shape, jnp.int32)))
    state = jax.tree.map(jax.jit(jnp.copy), state)
    writer = checkpoint.open_for_saving(tmp_path / "run", config)
    checkpoint.save(writer, config, state, {}, "abc")
    for _ in range(3):
        state, _ = advance(state, step.Batch(jnp.zeros(config.batch_shape, jnp.int32)))
    checkpoint.wait(writer, int(state.step))
    writer.close()
    restored = checkpoint.restore(tmp_path / "run", config)
    assert restored is not None and _same(restored[0], expected)


def test_failed_save_is_told(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that fails becomes one line with the folder and the reason."""
    config = tiny(model=dict(vocab=272))
    _save(tmp_path / "run", config, [1])
    writer = checkpoint.open_for_saving(tmp_path / "run", config)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", full)
    with pytest.raises(UserError, match=r"checkpoints: saving step 2 failed: .*No space left on device"):
        checkpoint.save(writer, config, _noise(_fresh(config), 2), {}, "abc")
    monkeypatch.undo()
    writer.close()


def test_config_json_does_not_count(tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Missing, empty, edited to another width, or of another version: the checkpoint's own copy is used, without a word."""
    config = tiny(model=dict(vocab=272))
    _save(tmp_path / "run", config, [3])
    path = tmp_path / "run" / "config.json"
    whole = path.read_text()
    for content in (None, "", "{", whole.replace('"width": 64', '"width": 128'), '{"model": {"depht": 3}}'):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        assert checkpoint.load(tmp_path / "run")[0] == config == run_folder.read_config(tmp_path / "run")
        assert checkpoint.restore(tmp_path / "run", config) is not None
    assert capsys.readouterr().err == ""


@pytest.mark.long
@pytest.mark.parametrize("module, arguments", [
    ("sample", ["--run={run}", "--tokens=2", "--step=6"]),
    ("evaluate", ["--run={run}", "--eval=sample", "--tokens=2"]),
    ("interop", ["export", "{run}", "{run}-x"]),
])  # fmt: skip
def test_commands_fall_back_quietly(tiny: Make, tmp_path: Path, module: str, arguments: list[str]) -> None:
    """As processes, on a run whose newest checkpoint is cut: one warning line on stderr, and the one before is used.

    With --step it is an error that names the other one. Nothing of the run is deleted.
    """
    _save(tmp_path / "run", tiny(model=dict(vocab=272)), [3, 6])
    victim = max((tmp_path / "run/checkpoints/6/params").rglob("d/*"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:100])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"nanojax.{module}", *(a.format(run=tmp_path / "run") for a in arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    (told,) = done.stderr.splitlines()
    if module == "sample":
        assert done.returncode == 2 and "checkpoints/6: damaged" in told and told.endswith("; use another (3)")
    else:
        assert done.returncode == 0 and told.startswith("warning: ") and told.endswith("checkpoints/3"), told
    assert run_folder.available(tmp_path / "run") == [3, 6]
