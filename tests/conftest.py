"""Rules of all tests: on the CPU, as two devices; no implicit promotion of dtypes or ranks; compiled programs are kept.

Two devices, so that nothing assumes that the first one is the only one. Processes that tests start see one.

What compiles for 0.2 s or longer is kept in .pytest_cache/jax, keyed by the program and the versions of jax and XLA. A second
run of the tests then takes a third to a seventh of the CPU time for each test that compiles a step. LLVM does not
optimise, here and in the processes that tests start: a first run of the oracles of the step took 123 s of CPU. Without LLVM's
expensive passes only, it took 186; with them, about twice that.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import nanojax  # noqa: F401, I001  before jax, which would load a CUDA plugin that has no driver

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nanojax import config_rules
from nanojax import config as configs
from nanojax import hardware, xla


def pytest_configure(config: pytest.Config) -> None:
    """Before any test imports jax."""
    if "not plan" not in config.option.markexpr and xla.cuda_compiler_installed():
        xla.start_cuda_compiler(hardware.CARDS["rtx4070"].target_config())
    if "not plan" in config.option.markexpr:  # what is compiled for an absent card is the program that would run
        fast = "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
        os.environ["XLA_FLAGS"] = f"{fast} {os.environ.get('XLA_FLAGS', '')}".strip()
    import jax

    jax.config.update("jax_compilation_cache_dir", str(config.rootpath / ".pytest_cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def _programs() -> Iterator[None]:
    """A module's compiled programs are forgotten at its end: all of them together took 5 GB in each of two workers."""
    yield
    jax = sys.modules["jax"]
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _unraisable() -> Iterator[None]:
    """A command that meets a damaged checkpoint silences unraisable exceptions until its process ends; a test does not."""
    before = sys.unraisablehook
    yield
    sys.unraisablehook = before


@pytest.fixture
def tiny() -> Callable[..., configs.Config]:
    """A d2 of width 64 that runs in milliseconds: tiny(section={"key": value}, ...) overrides, resolved."""

    def make(**sections: dict[str, Any]) -> configs.Config:
        base = configs.Config(
            name="tiny",
            model=configs.Model(depth=2, width=64, head_dim=32, vocab=128, seq=32),
            compute=configs.Compute(loss_chunk=16),
            train=configs.Train(tokens_per_step=128, microbatch=2, steps=20),
        )
        changed = {name: dataclasses.replace(getattr(base, name), **keys) for name, keys in sections.items()}
        return config_rules.resolve(dataclasses.replace(base, **changed))

    return make
