"""Compiles a config's real train step for a card, present or not, and says what its memory is made of."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanojax import files, hardware, xla
from nanojax.cli import UserError, first_line
from nanojax.config import Config, to_dict
from nanojax.hardware import CARDS, GIB, Card
from nanojax.plan import hlo

_VALUE = re.compile(r"^ value: <\d+ (\S+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$")
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*)$")
# The code from which a step is compiled, relative to nanojax/. The cache key has the config's values, not its code.
STEP_SOURCES = ("weights.py", "step/*.py", "model/*.py", "ops/*.py", "quant/*.py", "xla.py")
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu12")


@dataclasses.dataclass(frozen=True)
class Value:
    """A value in XLA's temporary allocation: the instruction that defines it, its size and offset in bytes."""

    name: str
    bytes: int
    offset: int
    shape: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step: its optimised HLO, XLA's memory figures in bytes, and what shares the temporary allocation."""

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


def start_compiler() -> None:
    """Loads XLA's CUDA compiler. UserError if that or jax's own device does not start. Call it before importing jax."""
    xla.start_cuda_compiler(CARDS["rtx4070"].target_config())
    xla.start_device()


def _sharding(card: Card) -> Any:
    import jax

    reading = hardware.read_gpu()
    if reading is not None and reading.name == card.name and jax.default_backend() == "gpu":
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    mesh = jax.sharding.Mesh([xla.absent_gpu(card.target_config())], ("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _named(sharding: Any) -> contextlib.AbstractContextManager[Any]:
    """A context for lowering: from jax 0.11 on Pallas asks which GPU it compiles for, and finds an absent one in the mesh."""
    import jax

    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh)
    return contextlib.nullcontext()


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of their shapes; of an array that several devices divide, those of one device."""
    import jax

    own = lambda a: a.sharding.shard_shape(a.shape) if getattr(a, "sharding", None) else a.shape
    return sum(math.prod(own(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compile_for(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    card: Card,
    donate: int = 0,
    as_trained: bool = True,
) -> Program:
    """Compiles `function(*arguments)` for `card`. UserError if XLA cannot.

    Args:
      arguments: pytrees of anything with a shape and a dtype, or of shapes with the shardings of several absent cards. If the
        first is a State, its fields are the groups.
      donate: index of the donated argument.
      as_trained: with xla.GPU_OPTIONS, as steps run; False: as jax.jit compiles.
    """
    start_compiler()
    import jax

    specs = arguments
    sharding: Any = getattr(jax.tree.leaves(arguments)[0], "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        sharding = _sharding(card)
        specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nanojax-plan-") as folder, xla.no_remat_pass(), xla.unkept_programs():
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        jitted = jax.jit(function, donate_argnums=donate)
        try:
            with _named(sharding):
                lowered = jitted.lower(*specs)
            compiled = xla.compile_for_gpu(lowered, dump) if as_trained else lowered.compile(dump)
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"XLA cannot compile this program for {card.key}: {first_line(error)}") from None
        dumps = sorted(Path(folder).glob("*-buffer-assignment.txt"), key=lambda p: p.stat().st_size)
        temporaries = read_temporaries(dumps[-1].read_text()) if dumps else ()
    stats: Any = compiled.memory_analysis()
    state = specs[0]
    groups = {name: tree_bytes(getattr(state, name)) for name in ("params", "opt", "accum") if hasattr(state, name)}
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
    """The values of the temporary allocation in XLA's buffer-assignment dump, largest first.

    A value that is listed several times with one name, offset and size is returned once.
    """
    out: dict[tuple[str, int, int], Value] = {}
    inside = False
    for line in text.splitlines():
        allocation = _ALLOCATION.match(line)
        if allocation:
            inside = "preallocated-temp" in allocation.group(2)
        elif inside:
            value = _VALUE.match(line)
            if value and int(value.group(2)) > 4096:  # not loop counters and tuple tables
                name = re.sub(r"\{[\d,]*\}$", "", value.group(1))
                key = (name, int(value.group(3)), int(value.group(2)))
                out[key] = Value(name, int(value.group(2)), int(value.group(3)), value.group(4))
        elif line.startswith("Used values"):
            break
    return tuple(sorted(out.values(), key=lambda v: (-v.bytes, v.offset)))


def step_arguments(config: Config) -> tuple[Any, Any]:
    """The shapes of the state and the batch that one step of `config` takes."""

    from nanojax import step

    return step.abstract_state(config), step.abstract_batch(config)


def for_gpu(config: Config) -> Config:
    """`config` with its "auto" choices made for a GPU rather than for the machine that compiles.

    Rows run as Pallas kernels. Attention is cuDNN's where it has kernels: bf16, head_dim a multiple of 8 up to 128.
    """
    c = config.compute
    attention = ("cudnn" if flash(config) else "chunked") if c.attention == "auto" else c.attention
    rows = "pallas" if c.rows == "auto" else c.rows
    return dataclasses.replace(config, compute=dataclasses.replace(c, attention=attention, rows=rows))


def flash(config: Config) -> bool:
    """Whether cuDNN has attention kernels for the config on any GPU from Ampere on."""
    return config.compute.dtype == "bf16" and config.model.head_dim % 8 == 0 and config.model.head_dim <= 128


def compile_step(config: Config, card: Card, cache: bool = True) -> Program:
    """The train step of a resolved config, compiled for `card`, or for as many as share a step (parallel.devices).

    From the cache if neither code nor versions changed.
    """
    start_compiler()
    from nanojax import step
    from nanojax.step import devices

    config = for_gpu(config)
    fused = config.compute.fused != "off"

    def build() -> Program:
        if config.several:
            mesh = devices.mesh_of(xla.absent_gpus(card.target_config(), config.devices))
            shared = devices.train_step(config, mesh)
            return compile_for(shared, devices.abstract(config, mesh), card, as_trained=fused)
        return compile_for(functools.partial(step.train_step, config), step_arguments(config), card, as_trained=fused)

    return kept(key(config, card), build) if cache else build()


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Temporary:
    """A part of the temporary allocation, named after the largest value in it."""

    bytes: int  # not counting what a larger Temporary covers
    name: str
    shape: str
    op_name: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """Where the bytes of one compiled step go."""

    params: int
    opt: int
    accum: int
    other: int  # step counter, tokens, outputs that reuse no argument
    residuals: int  # what the forward pass keeps for the backward pass
    operands: int  # parameters' codes as matmuls read them, held for a step
    temporaries: int  # all else that exists only within the step
    peak: int  # Program.peak_bytes
    not_reused: int  # state whose buffers the new state does not reuse; 0 if donation is complete
    largest: tuple[Temporary, ...]  # parts of the temporary allocation, largest first


def state_bytes(config: Config) -> int:
    """Bytes of the training state, accumulators included. No GPU can train `config` with less."""
    return tree_bytes(step_arguments(config)[0])


def least_bytes(config: Config) -> int:
    """Bytes of the state and of the residuals: less than the compiled step needs, and known within seconds."""
    from nanojax import step

    return state_bytes(config) + step.residual_bytes(config)


def memory_of(program: Program, residuals: int, operands: int, accum: int = 0) -> Memory:
    """The Memory of `program`, which holds `residuals` and `operands` bytes (step.residual_bytes, step.operand_bytes).

    Args:
      accum: bytes of accumulators that exist within the step only (step.accumulator_bytes).
    """
    module = hlo.parse(program.hlo)
    accum = min(accum, program.temp_bytes)
    residuals = min(residuals, program.temp_bytes - accum)
    operands = min(operands, program.temp_bytes - accum - residuals)
    groups = program.groups
    state = groups.get("params", 0) + groups.get("opt", 0) + groups.get("accum", 0)
    return Memory(
        params=groups.get("params", 0),
        opt=groups.get("opt", 0),
        accum=groups.get("accum", 0) + accum,
        other=groups["other"] + program.output_bytes - program.alias_bytes,
        residuals=residuals,
        operands=operands,
        temporaries=program.temp_bytes - accum - residuals - operands,
        peak=program.peak_bytes,
        not_reused=max(0, state - program.alias_bytes),
        largest=tuple(_coverage(module, program.temporaries)),
    )


def verdict(memory: Memory, card: Card) -> tuple[bool, str]:
    """Whether the step fits the card's budget, and a sentence that says so."""
    left = card.budget_bytes - memory.peak
    budget = f"{card.budget_bytes / GIB:.1f} GiB that {card.key} leaves to XLA"
    if left >= 0:
        return True, f"fits: {left / GIB:.1f} GiB of the {budget} stay free"
    return False, f"does not fit: {-left / GIB:.1f} GiB more than the {budget}"


def _coverage(module: hlo.Module, values: tuple[Value, ...], most: int = 8) -> list[Temporary]:
    """The values that fill the temporary allocation, largest first; each counts only bytes that no larger one covers."""
    names = {i.name: i for c in module.computations.values() for i in c.instructions.values()}
    covered: list[tuple[int, int]] = []
    out = []
    for value in values:
        start, end = value.offset, value.offset + value.bytes
        free = value.bytes - sum(max(0, min(end, b) - max(start, a)) for a, b in covered)
        if free < value.bytes / 2:
            continue
        covered = _union([*covered, (start, end)])
        instruction = names.get(value.name)
        out.append(Temporary(free, value.name, value.shape.split("{")[0], instruction.op_name if instruction else ""))
        if len(out) == most:
            break
    return out


def _union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


# -- the cache ---------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where compiled steps are kept."""
    return xla.user_cache() / "plan"


def kept(key: str, build: Callable[[], Program]) -> Program:
    """The program of this key: from the cache, or built and put there."""
    path = cache_folder() / f"{key}.json.gz"
    program = _load(path)
    if program is None:
        program = build()
        _store(path, program)
    return program


def key(config: Config, card: Card, sources: tuple[str, ...] = STEP_SOURCES, others: list[Any] | None = None) -> str:
    """A hash of all that a program's memory and time depend on: shapes, formats, card, versions, its code, and `others`."""
    values = to_dict(config)
    parts: list[Any] = [{name: values[name] for name in ("model", "stored", "accumulate", "compute", "optim")}]
    parts += [
        config.batch_shape,
        config.data.kind,
        config.parallel.devices,
        card.target_config(),
        *(others or []),
    ]  # not the number of steps, a constant in the schedules
    for package in _PACKAGES:
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"{package} absent")
    package = Path(__file__).parents[1]
    for pattern in (*sources, "plan/compile.py"):
        parts += [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(package.glob(pattern))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _load(path: Path) -> Program | None:
    try:
        kept = json.loads(gzip.decompress(path.read_bytes()))
        kept["temporaries"] = tuple(Value(**v) for v in kept["temporaries"])
        return Program(**{**kept, "cached": True})
    except (OSError, ValueError, TypeError, KeyError, EOFError):  # absent, truncated, or of another version
        return None


def _store(path: Path, program: Program) -> None:
    kept = json.dumps(dataclasses.asdict(program)).encode()
    try:
        with files.write_atomic(path) as file:  # a second planner never sees half a file
            file.write(gzip.compress(kept, 3))
    except UserError as error:
        print(f"plan: not cached ({error})", file=sys.stderr)
