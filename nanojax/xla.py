"""Everything that sets XLA up: an unusable CUDA plugin, memory share, compile cache, remat pass, GPU compiler options.

Most functions must run before jax does (they set environment variables), and importing nanojax must not load jax (0.7 s
for each tokenizing process), so jax is imported inside the functions.
"""

import contextlib
import ctypes
import functools
import importlib.util
import logging
import math
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nanojax import hardware
from nanojax.cli import UserError, first_line
from nanojax.hardware import GIB

# -- the CUDA plugin where there is no driver --------------------------------------------------------------------------

_KERNELS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


class _Idle(types.ModuleType):
    """Stands in for a CUDA plugin: jax initialises every plugin that it finds."""

    def initialize(self) -> None:
        pass


def hide_unusable_cuda() -> None:
    """Hides an installed CUDA plugin from jax where there is no NVIDIA driver, and chooses the CPU.

    jax would load the plugin all the same: 2 s, eight log lines and a traceback. Nothing happens with a driver, without
    the plugin, once jax is imported, or if the user set JAX_PLATFORMS to something else. `start_cuda_compiler` undoes it.
    """
    if hardware.nvidia_driver() or not cuda_compiler_installed() or "jax" in sys.modules:
        return
    if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
        for name in _PLUGINS:
            sys.modules[name] = _Idle(name)
        for name in _KERNELS:
            sys.modules[name] = None  # pyright: ignore  importing it raises ModuleNotFoundError


def cuda_compiler_installed() -> bool:
    """Whether jax's CUDA plugin, which contains the compiler, is installed; it may be hidden."""
    return any(name in sys.modules or importlib.util.find_spec(name) for name in _KERNELS)


@functools.cache
def start_cuda_compiler(target_config: str) -> None:
    """Makes XLA's CUDA compiler available, with or without a driver. Computation stays where it was.

    Args:
      target_config: of any GPU (`Card.target_config`), to see that the compiler starts.

    Raises:
      UserError: it is not installed, does not start, or jax was imported while the plugin was hidden.
    """
    if not cuda_compiler_installed():
        raise UserError(
            "the CUDA compiler plugin is not installed; install the plan extra: pip install 'nanojax[plan]'"
        )
    if isinstance(sys.modules.get(_PLUGINS[0]), _Idle):
        if "jax" in sys.modules:
            raise UserError("jax was imported without its CUDA plugin; plan in a new process, before importing jax")
        for name in (*_KERNELS, *_PLUGINS):
            del sys.modules[name]
    # Without a driver the plugin's version checks fail, and it would refuse to load.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        absent_gpu(target_config)
    except Exception as error:  # a missing or mismatched library raises several types
        raise UserError(
            f"XLA's CUDA compiler does not start ({first_line(error)}); reinstall the plan extra: "
            "pip install 'nanojax[plan]'"
        ) from None


def absent_gpu(target_config: str) -> Any:
    """A jax device to compile for, of a GPU that need not be present (`Card.target_config`)."""
    return absent_gpus(target_config, 1)[0]


def absent_gpus(target_config: str, count: int) -> list[Any]:
    """So many of them, as of hosts with one GPU each."""
    with _no_stderr():
        from jax.experimental import topologies

        shape = f"1x{count}x1"
        described = topologies.get_topology_desc(platform="cuda", topology=shape, target_config=target_config)
    return list(described.devices)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Discards what C++ libraries write to file descriptor 2 while they load, before their log level applies."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


# -- before the first computation --------------------------------------------------------------------------------------

# jax reads either name and refuses both at once; the second is the older one.
_FRACTION = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# Outside XLA's pool: CUDA's context, cuBLAS and cuDNN handles, loaded kernels. 0.5 to 1 GB with a desktop, whose own
# part is already missing from the free memory that the driver reports.
CONTEXT_GIB = 0.7


ALLOCATOR = "XLA_PYTHON_CLIENT_ALLOCATOR"  # jax's name for it; unset: "default"
ALLOCATORS = ("default", "cuda_async", "bfc", "platform", "vmm")


def configure() -> str | None:
    """`settings` and `start`: sets jax and XLA up for a command. Returns and raises what `start` does."""
    settings()
    return start()


def settings() -> None:
    """Sets jax up without touching a device; respects jax's own environment variables.

    Turns XLA's rematerialisation pass off, keeps compiled programs in the user's cache folder, and silences orbax: what it
    logs in hundreds of lines it also raises.

    Raises:
      UserError: an environment variable for the GPU's memory says what jax does not take.
    """
    import jax

    if gpu_expected():
        check_memory_variables(os.environ)

    jax.config.update("jax_compiler_enable_remat_pass", False)  # see no_remat_pass
    if not getattr(jax.config, "jax_compilation_cache_dir", None) and cache_usable():
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "jax"))
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def start() -> str | None:
    """Starts jax's default device, with all free memory of a GPU for XLA (jax's default is 75 %).

    Returns:
      A line that says how much memory XLA may use; None where it computes on the CPU.

    Raises:
      UserError: JAX_PLATFORMS asks for a device that is not there, or jax does not find the GPU that is.
    """
    import jax

    memory = share_memory()
    if not hardware.nvidia_driver():
        keep_freed_memory()
    start_device()
    return memory if jax.default_backend() == "gpu" else None


def keep_freed_memory() -> None:
    """Keeps what XLA frees after each step on a CPU for the next one, where the C library is glibc.

    XLA allocates a step's temporaries anew each time, glibc maps and unmaps them, and Linux clears every page again: 500 MB
    and a tenth of the step of a d4. Not beside a GPU, whose checkpoints pass through gigabytes of the host's memory.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for option, value in _ONE_HEAP.items():
        mallopt(option, value)


# malloc.h: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD. Other arenas than the first cannot grow beyond 64 MiB.
_ONE_HEAP = {-8: 1, -4: 0, -1: 2**31 - 1}


def autotune_alone() -> None:
    """Makes each process of a run choose its GPU kernels by itself. To be called before `start`.

    XLA would divide the choice among the processes. But only process 0 keeps compiled programs on its disk: when it finds one
    there, the others would wait for its part. jax 0.10 to 0.12 have the option.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_shard_autotuning=false".strip()


def gpu_expected() -> bool:
    """Whether jax will compute on an NVIDIA GPU here, as far as can be said before it starts one."""
    wanted, visible = os.environ.get("JAX_PLATFORMS", ""), os.environ.get("CUDA_VISIBLE_DEVICES")
    asked = not wanted or wanted.split(",")[0] in ("cuda", "gpu")
    return asked and not hides_all(visible) and hardware.nvidia_driver() and cuda_compiler_installed()


def hides_all(visible: str | None) -> bool:
    """Whether this value of CUDA_VISIBLE_DEVICES leaves no GPU to CUDA."""
    return visible is not None and (not visible.strip() or visible.strip().startswith("-1"))


def check_memory_variables(environ: Mapping[str, str]) -> None:
    """UserError for a share of memory or an allocator that jax does not take; it would say so in a traceback, or not at all."""
    given = [name for name in _FRACTION if name in environ]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are both set, which jax refuses; unset one")
    for name in given:
        try:
            good = 0 < float(environ[name]) <= 1
        except ValueError:
            good = False
        if not good:
            raise UserError(f"{name}={environ[name]}: expected a share of the GPU's memory, above 0 and at most 1")
    if environ.get(ALLOCATOR, "default").lower() not in ALLOCATORS:
        raise UserError(f"{ALLOCATOR}={environ[ALLOCATOR]}: expected one of {', '.join(ALLOCATORS)}")


def more_devices() -> str:
    """What helps where there are fewer devices than were asked for; "" where nothing does."""
    import jax

    cpu = jax.default_backend() == "cpu"
    return "; XLA_FLAGS=--xla_force_host_platform_device_count=N makes more of a CPU" if cpu else ""


def use_allocator(name: str) -> None:
    """Makes jax's GPU memory come from this allocator: "default" or "cuda_async". To be called before `start`."""
    import jax

    os.environ[ALLOCATOR] = name
    if name != "default":  # jax 0.10.1 with the cuda13 plugin takes no notice of the variable
        jax.config.update("jax_pjrt_client_create_options", f"allocator:{name}")


def start_device() -> None:
    """Starts jax's default device. UserError where JAX_PLATFORMS asks for one that is not there, or a GPU is not found."""
    import jax

    wanted = os.environ.get("JAX_PLATFORMS", "")
    asked = f"JAX_PLATFORMS={wanted}" if wanted else "jax"
    log = logging.getLogger("jax._src.xla_bridge")  # tells a missing plugin as a traceback
    before, log.disabled = log.disabled, True
    try:
        if wanted.split(",")[0] in ("cuda", "gpu") and not hardware.nvidia_driver():  # XLA would log several lines
            raise RuntimeError("no NVIDIA driver")
        jax.devices()
    except Exception as error:  # of several types, an AssertionError among them
        why = f" ({first_line(error)})" if str(error).strip() else ""
        raise UserError(f"{asked}: no such device here{why}; unset JAX_PLATFORMS, or set cpu") from None
    finally:
        log.disabled = before
    if gpu_expected() and jax.default_backend() != "gpu":
        raise UserError(
            "jax does not find this machine's GPU; python -m nanojax.doctor says why; JAX_PLATFORMS=cpu computes on the CPU"
        )


def user_cache() -> Path:
    """$XDG_CACHE_HOME/nanojax, or ~/.cache/nanojax; for a user without a home, a folder in the system's for temporary files."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "nanojax"
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "nanojax" if home != "~" else Path(tempfile.gettempdir()) / f"nanojax-{os.getuid()}"


def cache_usable() -> bool:
    """Whether files can be written in the user's cache; asked of the nearest folder that is there."""
    folder = user_cache()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def share_memory() -> str | None:
    """Gives XLA all free GPU memory unless the user set a share; `start` calls it. Returns what `start` returns."""
    reading = hardware.read_gpu()
    if reading is None:
        if hardware.nvidia_driver() and not any(name in os.environ for name in _FRACTION):
            os.environ[_FRACTION[0]] = "0.92"  # a GPU whose free memory is unknown
        return None
    total = reading.memory_total / GIB
    for name in _FRACTION:
        if name in os.environ:
            return f"XLA may use {os.environ[name]} of {reading.name}'s {total:.1f} GiB ({name}, as set)"
    share = pool_fraction(reading)
    os.environ[_FRACTION[0]] = f"{share:.2f}"
    return (
        f"XLA may use {share * total:.1f} of {reading.name}'s {total:.1f} GiB "
        f"({reading.memory_free / GIB:.1f} are free; {_FRACTION[0]}={share:.2f})"
    )


def pool_fraction(reading: hardware.Reading) -> float:
    """The share of the GPU's memory for XLA: all that is free now except CONTEXT_GIB, between 0.1 and 0.97."""
    share = (reading.memory_free - CONTEXT_GIB * GIB) / reading.memory_total
    return max(0.1, min(0.97, int(share * 100) / 100))


# -- compiling ---------------------------------------------------------------------------------------------------------

# Fuses scales, residual additions and accumulators into the matmuls that produce them. Modelled for d32 on an RTX 4070:
# 7.5k tokens/s instead of 5.8k. XLA calls the option experimental; jax 0.10 to 0.12 have it.
GPU_OPTIONS: dict[str, Any] = {"xla_gpu_experimental_gemm_fusion_v2": True}


def compiled(function: Callable[..., Any], *shapes: Any, fused: bool = True) -> Any:
    """`function`, its first argument donated, compiled for the default device from the shapes of its arguments.

    Compile before the arguments exist: a GPU's autotuning wants scratch memory.

    Args:
      fused: with GPU_OPTIONS, on a GPU.
    """
    import jax

    lowered = jax.jit(function, donate_argnums=0).lower(*shapes)
    return compile_for_gpu(lowered) if fused and jax.default_backend() == "gpu" else lowered.compile()


def compile_for_gpu(lowered: Any, options: dict[str, Any] | None = None) -> Any:
    """Compiles a `jax.stages.Lowered` with GPU_OPTIONS; without them if XLA then fails, as it does at width 256 or 512."""
    import jax

    try:
        return lowered.compile(compiler_options={**GPU_OPTIONS, **(options or {})})
    except (jax.errors.JaxRuntimeError, IndexError):  # any other error comes again without the options
        return lowered.compile(compiler_options=options)


def no_remat_pass() -> contextlib.AbstractContextManager[None]:
    """Turns XLA's rematerialisation off: it recomputes matmuls when it expects memory to be short.

    What is recomputed is decided by compute.residuals instead.
    """
    return _setting("jax_compiler_enable_remat_pass", False)


def unkept_programs() -> contextlib.AbstractContextManager[None]:
    """Keeps programs for an absent card out of jax's cache on disk, which cannot read them back and warns of it."""
    return _setting("jax_persistent_cache_min_compile_time_secs", math.inf)


@contextlib.contextmanager
def _setting(name: str, value: Any) -> Iterator[None]:
    """One of jax's settings, until the block ends."""
    import jax

    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


# -- memory ------------------------------------------------------------------------------------------------------------


def pool_bytes() -> int | None:
    """Bytes that XLA may use on the default device; None if there is no limit (CPU). Starts the device."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def peak_bytes(compiled: Any) -> int:
    """Peak memory of a compiled program: arguments, outputs that reuse no argument, and temporaries."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA found too little memory, at compile time or at run time."""
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
