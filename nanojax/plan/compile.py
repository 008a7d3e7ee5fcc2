"""Compiles a config's real train step for a card, present or not, and keeps the result in the user's cache folder."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanojax import silent_libraries, use_cuda_compiler
from nanojax.cli import UserError
from nanojax.config import Config, to_dict
from nanojax.plan.cards import CARDS, Card

_VALUE = re.compile(r"^ value: <\d+ (\S+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$")
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*)$")
# The code that a step is compiled from, below nanojax/; the config's values are in the cache's key themselves.
STEP_SOURCES = ("weights.py", "step/*.py", "model/*.py", "ops/*.py", "quant/*.py")
_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclasses.dataclass(frozen=True)
class Value:
    """A value in XLA's temporary allocation: the instruction that defines it, its bytes and where they lie."""

    name: str
    bytes: int
    offset: int
    shape: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step: XLA's own memory figures, its optimised HLO, and what shares the temporary allocation."""

    hlo: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    groups: dict[str, int]  # bytes of the arguments: params, opt, accum, other
    temporaries: tuple[Value, ...]
    compile_seconds: float
    cached: bool = False

    @property
    def peak_bytes(self) -> int:
        """Arguments, outputs that reuse no argument, and temporaries."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


@functools.cache
def start_compiler() -> None:
    """Loads XLA's CUDA compiler, without a GPU if there is none. UserError if it is not installed or does not start."""
    reason = plugin_missing()
    if reason:
        raise UserError(reason)
    # The plugin would refuse to load because no driver answers its version checks.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with silent_libraries():
        try:
            use_cuda_compiler()
            from jax.experimental import topologies

            card = CARDS["rtx4070"]
            topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=card.target_config())
        except Exception as error:  # a missing or mismatched library shows as several types
            raise UserError(
                f"XLA's CUDA compiler does not start ({_first_line(error)}); reinstall the plan extra: "
                "pip install 'nanojax[plan]'"
            ) from None


def plugin_missing() -> str | None:
    """Why no compile for an NVIDIA card is possible in this environment; None if it is."""
    if not any(importlib.util.find_spec(name) for name in _PLUGINS):
        return "the CUDA compiler plugin is not installed; install the plan extra: pip install 'nanojax[plan]'"
    return None


def _sharding(card: Card) -> Any:
    import jax
    from jax.experimental import topologies

    from nanojax.plan import device

    reading = device.read()
    if reading is not None and reading.name == card.name and jax.default_backend() == "gpu":
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with silent_libraries():
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=card.target_config())
    mesh = jax.sharding.Mesh(topology.devices, ("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _named(sharding: Any) -> contextlib.AbstractContextManager[Any]:
    """While lowering: Pallas asks (from jax 0.11 on) what GPU it is for, and finds an absent one in the mesh only."""
    import jax

    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh)
    return contextlib.nullcontext()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


def _tree_bytes(tree: Any) -> int:
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def no_remat_pass() -> Iterator[None]:
    """XLA's own rematerialisation duplicates matmuls when it believes memory is short; here `residuals` decides."""
    import jax

    before: Any = getattr(jax.config, "jax_compiler_enable_remat_pass")  # noqa: B009  unknown to type checkers
    jax.config.update("jax_compiler_enable_remat_pass", False)
    try:
        yield
    finally:
        jax.config.update("jax_compiler_enable_remat_pass", before)


def compile_for(function: Callable[..., Any], arguments: tuple[Any, ...], card: Card, donate: int = 0) -> Program:
    """Compiles `function(*arguments)` for `card`; the arguments are trees of shapes and dtypes.

    Args:
      arguments: pytrees of anything with shape and dtype; the first may be a State whose fields give the groups.
      donate: index of the donated argument.
    """
    start_compiler()
    import jax

    from nanojax import step

    sharding = _sharding(card)
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nanojax-plan-") as folder, no_remat_pass():
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        jitted = jax.jit(function, donate_argnums=donate)
        try:
            with _named(sharding):
                lowered = jitted.lower(*specs)
            compiled = step.compiled_for_gpu(lowered, options)
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"XLA cannot compile this step for {card.key}: {_first_line(error)}") from None
        dumps = sorted(Path(folder).glob("*-buffer-assignment.txt"), key=lambda p: p.stat().st_size)
        temporaries = read_temporaries(dumps[-1].read_text()) if dumps else ()
    stats: Any = compiled.memory_analysis()
    state = arguments[0]
    groups = {name: _tree_bytes(getattr(state, name)) for name in ("params", "opt", "accum") if hasattr(state, name)}
    groups["other"] = stats.argument_size_in_bytes - sum(groups.values())
    return Program(
        hlo=compiled.as_text() or "",
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temp_bytes=stats.temp_size_in_bytes,
        groups=groups,
        temporaries=temporaries,
        compile_seconds=time.monotonic() - began,
    )


def read_temporaries(text: str) -> tuple[Value, ...]:
    """Values of the temporary allocation in XLA's buffer assignment dump, largest first, one per name, place, size."""
    out: dict[tuple[str, int, int], Value] = {}
    inside = False
    for line in text.splitlines():
        allocation = _ALLOCATION.match(line)
        if allocation:
            inside = "preallocated-temp" in allocation.group(2)
        elif inside:
            value = _VALUE.match(line)
            if value and int(value.group(2)) > 4096:  # loop counters and tuple tables are not worth a name
                name = re.sub(r"\{[\d,]*\}$", "", value.group(1))
                key = (name, int(value.group(3)), int(value.group(2)))
                out[key] = Value(name, int(value.group(2)), int(value.group(3)), value.group(4))
        elif line.startswith("Used values"):
            break
    return tuple(sorted(out.values(), key=lambda v: (-v.bytes, v.offset)))


def step_arguments(config: Config) -> tuple[Any, Any]:
    """The state's and the batch's shapes: what one step of `config` takes."""
    import jax
    import jax.numpy as jnp

    from nanojax import step

    return step.abstract_state(config), step.abstract_batch(config)


def for_gpu(config: Config) -> Config:
    """`config` with automatic choices made as on the card, not as on the machine that compiles: kernels for rows, and cuDNN
    flash attention where its kernels exist (bf16, head_dim a multiple of 8 up to 128)."""
    c = config.compute
    flash = c.dtype == "bf16" and config.model.head_dim % 8 == 0 and config.model.head_dim <= 128
    attention = ("cudnn" if flash else "chunked") if c.attention == "auto" else c.attention
    rows = "pallas" if c.rows == "auto" else c.rows
    return dataclasses.replace(config, compute=dataclasses.replace(c, attention=attention, rows=rows))


def compile_step(config: Config, card: Card, cache: bool = True) -> Program:
    """The train step of a resolved config, compiled for `card`. From the cache if neither code nor versions changed."""
    start_compiler()
    from nanojax import step

    config = for_gpu(config)
    path = cache_folder() / f"{_key(config, card)}.json.gz"
    if cache:
        found = _load(path)
        if found:
            return found
    program = compile_for(step.train_step(config), step_arguments(config), card)
    if cache:
        _store(path, program)
    return program


# -- the cache ---------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/nanojax/plan, or ~/.cache/nanojax/plan."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanojax" / "plan"


def _key(config: Config, card: Card) -> str:
    """What memory and time of the step depend on: shapes, formats, the card, versions, the code that builds the step."""
    kept = to_dict(config)
    parts: list[Any] = [{name: kept[name] for name in ("model", "stored", "accumulate", "compute", "optim")}]
    parts += [config.batch_shape, card.target_config()]  # the number of steps is only a constant of the schedules
    for package in ("jax", "jaxlib", *(name.replace("_", "-") for name in _PLUGINS), "nvidia-cudnn-cu12"):
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"{package} absent")
    package = Path(__file__).parents[1]
    for pattern in (*STEP_SOURCES, "plan/compile.py"):
        parts += [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(package.glob(pattern))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _load(path: Path) -> Program | None:
    try:
        kept = json.loads(gzip.decompress(path.read_bytes()))
        kept["temporaries"] = tuple(Value(**v) for v in kept["temporaries"])
        return Program(**{**kept, "cached": True})
    except (OSError, ValueError, TypeError, KeyError, EOFError):  # absent, cut short, or of another version
        return None


def _store(path: Path, program: Program) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = json.dumps(dataclasses.asdict(program)).encode()
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(gzip.compress(kept, 3))
        os.replace(file.name, path)  # atomic: a second planner never sees half a file
    except OSError as error:
        print(f"plan: not cached ({error})", file=sys.stderr)
