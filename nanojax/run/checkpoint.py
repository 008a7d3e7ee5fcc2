"""Checkpoints of a run through orbax: train state, data position, config and tokenizer, saved and restored together.

A run folder holds config.json (resolved), tokenizer/, metrics.jsonl and checkpoints/STEP/ with three parts: params, opt
(optimizer state and step) and meta (JSON: layout, step, data position, config, tokenizer fingerprint, checks); arrays as in
step.State. The run's only randomness is fold_in(key(seed), step), so step and config are its RNG state; accumulators are
zeros between steps.

A check per leaf and one of meta guard what orbax does not: of 36 kinds of damage tried, flipped bits loaded silently.
"""

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from orbax.checkpoint import checkpoint_manager
from orbax.checkpoint import v1 as ocp

from nanojax import config as configs
from nanojax import step as steps
from nanojax.cli import UserError, first_line
from nanojax.config import Config
from nanojax.quant import decode_tree
from nanojax.run import exits, legacy, run_folder
from nanojax.run.run_folder import CHECKPOINTS, available
from nanojax.step import devices
from nanojax.tokenizer import Tokenizer
from nanojax.xla import is_out_of_memory

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


class NotFinite(Exception):
    """The state holds NaN or Inf: it was not saved. The message names the first such leaf."""


def open_for_saving(run: Path, config: Config) -> ocp.training.Checkpointer:
    """The writer: asynchronous, atomic, keeps what checkpoint.keep_last and keep_every say. Removes cut-off saves."""
    keep = config.checkpoint
    policies = ocp.training.preservation_policies
    policy: list[Any] = [policies.LatestN(keep.keep_last)]
    if keep.keep_every:
        policy.append(policies.EveryNSteps(keep.keep_every))
    with _folder_made(run / CHECKPOINTS):
        return ocp.training.Checkpointer(
            str((run / CHECKPOINTS).absolute()),
            context=_context(),
            preservation_policy=policies.AnyPreservationPolicy(policy),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )


@contextlib.contextmanager
def _folder_made(folder: Path) -> Iterator[None]:
    """Makes the folder where one of several processes opens it; orbax wants to, and refuses to in this case."""
    if jax.process_count() == 1:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with mock.patch.object(checkpoint_manager, "_create_root_directory"):
        yield


def save(
    writer: ocp.training.Checkpointer, config: Config, state: steps.State, data: dict[str, Any], fingerprint: str
) -> Any:
    """Starts saving `state`; blocks only until it is copied to the host, so that it may be donated next.

    Returns orbax's response, for `wait`.

    Args:
      data: the loader's get_state().
      fingerprint: the tokenizer's.
    Raises NotFinite before anything is written; UserError when the save cannot begin (disk full, ...).
    """
    state = devices.plain(config, state)
    parts = {"params": state.params, "opt": {"step": state.step, "opt": state.opt}}
    sums, finite = jax.device_get(checks(parts))
    for path, ok in finite.items():
        if not ok:
            raise NotFinite(path)
    step = int(state.step)
    meta = run_folder.sealed(
        {
            "layout": legacy.LAYOUT,
            "step": step,
            "data": data,
            "config": configs.to_dict(config),
            "tokenizer": fingerprint,
            "checks": {path: int(value) for path, value in sums.items()},
        }
    )
    if jax.process_count() > 1:
        parts = jax.device_get(parts)  # orbax takes arrays of one process for a mistake
    try:
        return writer.save_checkpointables_async(step, {**parts, "meta": meta}, force=True)
    except Exception as error:
        raise UserError(_failed(writer, step, error)) from error


def save_import(run: Path, config: Config, step: int, parts: dict[str, Any]) -> None:
    """Writes another program's weights as a checkpoint: "params" and "meta" only. UserError when that fails."""
    with contextlib.closing(open_for_saving(run, config)) as writer:
        try:
            writer.save_checkpointables(step, parts)
        except Exception as error:
            raise UserError(_failed(writer, step, error)) from error


def wait(writer: ocp.training.Checkpointer, step: int, response: Any = None) -> None:
    """Until the save of `step`, the last one begun, is on disk. UserError when it failed.

    response: what `save` returned. orbax keeps a thread for it until it is asked.
    """
    try:
        writer.wait()
    except Exception as error:
        raise UserError(_failed(writer, step, error)) from error
    finally:
        if response is not None:
            with contextlib.suppress(Exception):  # the same error
                response.result()


def _failed(writer: ocp.training.Checkpointer, step: int, error: Exception) -> str:
    return f"{writer.directory}: saving step {step} failed: {first_line(_cause(error))}"


def restore(run: Path, config: Config, step: int | None = None) -> tuple[steps.State, dict[str, Any]] | None:
    """The newest good checkpoint as (state on the default device, meta), or None where there is none.

    Leaves are copied by jit one at a time: a donated buffer that orbax or device_put made is accepted but not reused,
    and the first step would need the whole state twice. Damaged checkpoints newer than the good one are reported on
    stderr and moved aside to damaged/; UserError if none is good, and then nothing is moved.

    Args:
      step: of the only checkpoint to use (train.extend); newer ones are moved aside to superseded/.
    """
    there = available(run)
    found = _newest_good(run, there if step is None else [step], lambda _: (config, _trained(config)))
    if found is None:
        return None
    _, parts, meta = found
    newer = [other for other in there if other > meta["step"]]
    if step is not None and newer:
        run_folder.keep_records(run, "superseded")
    run_folder.set_aside(run, newer, "damaged" if step is None else "superseded")
    return _state(config, parts), meta


def restore_from(run: str | os.PathLike, config: Config) -> tuple[steps.State, int]:
    """(the newest good checkpoint's state of another run, its step); `config` has that run's shapes and formats.

    Damaged ones are reported and stay where they are; UserError if none is good.
    """
    found = _newest_good(Path(run), available(run), lambda _: (config, _trained(config)))
    if found is None:
        raise UserError(f"{run}: has no checkpoint")
    _, parts, meta = found
    return _state(config, parts), meta["step"]


def _trained(config: Config) -> dict[str, Any]:
    """Shapes of what training goes on from."""
    shapes = steps.abstract_state(config)
    return {"params": shapes.params, "opt": {"step": shapes.step, "opt": shapes.opt}}


def _state(config: Config, parts: dict[str, Any]) -> steps.State:
    shapes = steps.abstract_state(config).accum
    accum = jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes))()
    return steps.State(parts["opt"]["step"], parts["params"], parts["opt"]["opt"], accum)


class Loaded(NamedTuple):
    """A model for inference. `step` is its checkpoint's."""

    config: Config
    params: Any
    tokenizer: Tokenizer
    step: int


def load(run: str | os.PathLike, dtype: str | None = None, step: int | None = None) -> Loaded:
    """The model of a run folder, for inference on any device; needs nothing but the folder.

    Args:
      dtype: None = parameters as stored and compute as trained; "f32" or "bf16" = all parameters decoded to floats, and
        the returned config computes with them.
      step: a checkpoint's step; None = the newest good one.
    Raises UserError when the folder or a checkpoint in it is missing or damaged.
    """
    folder = Path(run)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: choose one of {', '.join(DTYPES)}")
    run_folder.check_path(folder)
    candidates = available(folder)
    if not candidates:
        run_folder.read_config(folder)  # for its error where this is no run folder
        raise UserError(f"{folder}: no checkpoint yet; train until the first one is saved")
    if step is not None and step not in candidates:
        raise UserError(f"{folder / CHECKPOINTS}: no checkpoint of step {step}; there are {candidates}")

    def own(step: int) -> tuple[Config, dict[str, Any]]:
        saved = run_folder.saved_config(folder, step)
        return saved, {"params": steps.abstract_state(saved).params}

    tokenizer = _tokenizer(folder)
    found = _newest_good(folder, candidates if step is None else [step], own)
    assert found
    config, parts, meta = found
    config = config if jax.default_backend() == "gpu" else config.without_gpu()
    params = parts["params"]
    if dtype is not None:
        config, params = config.in_floats(dtype), jax.jit(lambda p: decode_tree(p, DTYPES[dtype]))(params)
    return Loaded(config, params, tokenizer, meta["step"])


def load_params(
    run: str | os.PathLike, dtype: str | None = None, step: int | None = None
) -> tuple[Config, Any, Tokenizer]:
    """`load` without the step."""
    return load(run, dtype, step)[:3]


# Step -> the config to load that checkpoint with, and the tree of shapes that is wanted of it.
Wanted = Callable[[int], tuple[Config, dict[str, Any]]]


def _tokenizer(run: Path) -> Tokenizer:
    """The run's tokenizer. UserError with advice that does not put another one in its place."""
    try:
        return Tokenizer.load(run / "tokenizer")
    except UserError as error:
        what = str(error).split(";")[0]
        raise UserError(
            f"{what}; the run's train command writes it again, or copy tokenizer/ from the data folder it was trained on"
        ) from None


def _newest_good(run: Path, candidates: list[int], wanted: Wanted) -> tuple[Config, dict[str, Any], dict] | None:
    """(config, the wanted parts, meta) of the newest of `candidates` that loads and passes its checks; None if none given."""
    reasons = []
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None  # of one part's damage the others would tell hundreds of lines
    for step in reversed(candidates):
        folder = run / CHECKPOINTS / str(step)
        found, reason = None, ""
        with _quiet():
            try:
                config, tree = wanted(step)
                found = config, *_load(folder.absolute(), config, tree)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                reason = first_line(_cause(error))
            if found is None:
                gc.collect()
        if found is not None:
            for bad, why in reasons:
                print(f"warning: {bad}: damaged ({why}); using {folder}", file=sys.stderr)
            if not reasons:  # otherwise tensorstore's threads go on telling, as long as the process lives
                sys.unraisablehook = before
            return found
        reasons.append((folder, reason))
    if reasons:
        folder, why = reasons[0]
        left = [step for step in available(run) if step not in candidates]
        others = f"; nor is any of the {len(reasons) - 1} older ones whole" if len(reasons) > 1 else ""
        advice = (
            f"use another ({', '.join(map(str, left))})" if left else "copy the run folder again, or start another run"
        )
        raise exits.Lost(f"{folder}: damaged checkpoint ({why}){others}; {advice}")
    sys.unraisablehook = before
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the coroutines that orbax leaves behind when one part is damaged; they tell so as they are collected."""
    log = logging.getLogger("asyncio")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        log.disabled = before


def _load(folder: Path, config: Config, wanted: dict[str, Any]) -> tuple[dict[str, Any], dict]:
    run_folder.check_complete(folder, wanted)
    with _context():
        meta = ocp.load_checkpointables(str(folder), {"meta": None})["meta"]
        if not run_folder.is_sealed(meta):
            raise ValueError("meta is not what was saved")
        old = meta.get("layout") != legacy.LAYOUT
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here)
        abstract = jax.tree.map(place, legacy.abstract(config, wanted) if old else wanted)
        loaded = ocp.load_checkpointables(str(folder), abstract)
    leaves, tree = jax.tree.flatten(loaded)
    del loaded
    copy = jax.jit(jnp.copy)
    for i in range(len(leaves)):
        leaves[i] = copy(leaves[i])
    parts = jax.tree.unflatten(tree, leaves)
    del leaves
    for path, value in jax.device_get(checks(parts)[0]).items():
        if meta["checks"][path] != int(value):
            raise ValueError(f"{path} is not what was saved")
    return legacy.upgraded(config, parts) if old else parts, meta


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")  # a dict of numbers would be saved as arrays
    context = ocp.Context()
    context.checkpointables.registry = registry
    if jax.process_count() > 1:  # only the first process reads and writes
        context.multiprocessing.active_processes = {0}
        context.multiprocessing.barrier_sync_key_prefix = "run"
    return context


@jax.jit
def checks(tree: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """For each leaf by its path: a sum of its bits that depends on their places (uint32), and whether all is finite."""
    sums, finite = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis in range(leaf.ndim):  # iotas fuse into the sum; an index over all axes at once could overflow
            odd = jnp.uint32(0x9E3779B1 * (axis + 1) % 2**32 | 1)
            place = place * odd + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        sums[name] = jnp.sum(bits * (place * jnp.uint32(2) + jnp.uint32(1)), dtype=jnp.uint32)
        finite[name] = jnp.all(jnp.isfinite(leaf)) if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.bool_(True)
    return sums, finite


def _cause(error: BaseException) -> BaseException:
    """The innermost cause: orbax wraps the one sentence that helps in several that do not."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
