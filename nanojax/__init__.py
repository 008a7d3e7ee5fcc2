"""Trains nanochat's d32 from scratch on one 12 GB consumer GPU. Importing it picks the CPU where no GPU can be used."""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


def nvidia_driver() -> bool:
    """Whether an NVIDIA kernel driver serves this machine: Linux's own, or WSL2's through /dev/dxg."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    return Path("/dev/dxg").exists() and Path("/usr/lib/wsl/lib/libcuda.so.1").exists()


class _Idle(types.ModuleType):
    """Stands in for a CUDA plugin that has no driver to talk to: jax asks every plugin to initialise."""

    def initialize(self) -> None:
        pass


@contextlib.contextmanager
def silent_libraries() -> Iterator[None]:
    """Discards what C++ writes to stderr before its logging is set up: "Could not find cuda drivers" and the like."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


class _SilentLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        with silent_libraries():
            super().exec_module(module)


class _SilentJax(importlib.abc.MetaPathFinder):
    """Silences the first import of jax, whenever it comes: tokenising needs none, and each process saves 0.7 s."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != "jax":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _SilentLoader(spec.loader.name, spec.loader.path)
        return spec


def _stay_on_cpu() -> None:
    """Without a driver jax loads an installed CUDA plugin nevertheless (0.5 s, log lines, a traceback): keep it idle.

    A JAX_PLATFORMS that the user set is respected; `use_cuda_compiler` brings the plugin back for the planner.
    """
    if nvidia_driver() or not any(importlib.util.find_spec(f"jax_{name[-6:]}_plugin") for name in _PLUGINS):
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if os.environ["JAX_PLATFORMS"] == "cpu":
        for name in _PLUGINS:
            sys.modules.setdefault(name, _Idle(name))
    if "jax" not in sys.modules:
        sys.meta_path.insert(0, _SilentJax())  # jax's import loads the plugin's kernels, and each of them complains


def use_cuda_compiler() -> None:
    """Loads the real CUDA plugin where it was kept idle, for its compiler; computation stays on the CPU."""
    for name in _PLUGINS:
        idle = sys.modules.get(name)
        if isinstance(idle, _Idle) and importlib.util.find_spec(f"jax_{name[-6:]}_plugin"):
            del sys.modules[name]
            importlib.import_module(name).initialize()
            sys.modules[name] = idle  # jax's own discovery, if still to come, must not initialise it a second time


_stay_on_cpu()
