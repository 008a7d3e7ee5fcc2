"""A run small enough for tests: data of made-up English, a d2 config file, the command line and what must be equal."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.paths import ROOT

from nanojax import config as configs
from nanojax import config_files
from nanojax import step as steps
from nanojax.data import prepare
from nanojax.run import checkpoint, metrics, run_folder

WORDS = "the people of this great nation have met in peace and the law will serve every state with honor 1837 ünïté"
CONFIG = '''"""A test run.

python -m nanojax.train --config=tiny
"""
from nanojax.config import Checkpoint, Compute, Config, Data, Eval, Model, Train


def get_config():
    return Config(
        model=Model(depth=2, width=64, head_dim=32, vocab=320, seq=32),
        compute=Compute(loss_chunk=64),
        data=Data(path={data!r}),
        train=Train(steps=12, tokens_per_step=128, microbatch=2),
        eval=Eval(every=5, tokens=256, sample_tokens=8),
        checkpoint=Checkpoint(every=3),
    )
'''


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """jax's compile cache on, in a folder of this test session, also for what compiles fast."""
    cache = tmp_path_factory.mktemp("compile_cache")
    settings = {"jax_compilation_cache_dir": str(cache), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield cache
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ (tokenizer of 300 ids) and tiny.py."""
    folder = tmp_path_factory.mktemp("home")
    make_config(folder, make_data(folder))
    return folder


def make_data(folder: Path) -> Path:
    """A data folder (vocabulary 300) of 60 documents; returns its path."""
    rng = random.Random(0)
    texts = folder / "texts"
    texts.mkdir()
    for i in range(60):
        words = [rng.choice(WORDS.split()) for _ in range(rng.randrange(50, 400))]
        (texts / f"{i:02d}.txt").write_text(" ".join(words).capitalize() + ".\n")
    data = folder / "data"
    prepare.main(["--input", str(texts), "--out", str(data), "--vocab", "300", "--valid", "hash:0.2", "--workers", "1"])
    return data


def make_config(folder: Path, data: Path) -> Path:
    """tiny.py in `folder`, using `data`."""
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(data=str(data)))
    return path


def arguments(config: Path, run: Path, **overrides: Any) -> list[str]:
    """Command-line arguments; an override is section__key=value."""
    changed = [f"--{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return [f"--config={config}", f"--train.run={run}", *changed]


def load(config: Path, run: Path, **overrides: Any) -> configs.Config:
    """The resolved config of `arguments`."""
    return config_files.load(str(config), arguments(config, run, **overrides)[1:])


def spawn(config: Path, run: Path, cache: Path, **overrides: Any) -> subprocess.Popen[str]:
    """The training command as a process, with a compile cache of its own that also keeps what compiles fast."""
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nanojax.train", *arguments(config, run, **overrides)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process: subprocess.Popen[str], condition: Callable[[], Any], seconds: float = 300) -> None:
    """Until `condition()`, looking every 2 ms; fails with the process's output if it ends or takes too long instead."""
    begin = time.monotonic()
    while not condition():
        if process.poll() is not None or time.monotonic() - begin > seconds:
            process.kill()
            raise AssertionError(f"exit {process.poll()}: {process.communicate()[0]}")
        time.sleep(0.002)


def stop_after(run: Path, records: int) -> threading.Thread:
    """A thread that sends this process a SIGTERM once the run has logged `records` steps; to be joined."""

    def watch() -> None:
        while len(metrics.read(run, "train")) < records:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def saved(run: Path) -> tuple[int, dict[str, np.ndarray], dict[str, Any]]:
    """(step, leaves by path, data position) of the newest checkpoint."""
    restored = checkpoint.restore(run, run_folder.read_config(run))
    assert restored is not None
    state, meta = restored
    assert isinstance(state, steps.State)
    named = jax.tree_util.tree_leaves_with_path(state)
    return meta["step"], {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in named}, meta["data"]


def records_of(run: Path) -> list[dict[str, Any]]:
    """The records without what depends on the clock and on where the run was interrupted."""
    process = ("time", "tokens_per_s", "rollout_s", "mfu", "watts", "kwh", "warnings")
    kinds = ("train", "eval", "core", "sample")
    return [{k: v for k, v in r.items() if k not in process} for r in metrics.read(run) if r["kind"] in kinds]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit-exact: step, parameters, optimizer state, data position, and every record."""
    (step_a, leaves_a, data_a), (step_b, leaves_b, data_b) = saved(a), saved(b)
    assert step_a == step_b
    assert data_a == data_b
    assert leaves_a.keys() == leaves_b.keys()
    for path, leaf in leaves_a.items():
        assert leaf.dtype == leaves_b[path].dtype and leaf.tobytes() == leaves_b[path].tobytes(), path
    assert records_of(a) == records_of(b)


def losses(run: Path) -> list[float]:
    """Of all steps."""
    return [r["loss"] for r in metrics.read(run, "train")]


def cut_after(whole: Path, run: Path, step: int) -> Path:
    """A copy of the run as it was when it had saved `step`."""
    shutil.copytree(whole, run)
    for later in run_folder.available(run):
        if later > step:
            shutil.rmtree(run / run_folder.CHECKPOINTS / str(later))
    return run
