"""The step on several devices: what lies on which, and the ways from a plain state to a shared one and back.

Parameters are on every device, optimizer arrays divided by layers or rows (share.py), and a batch by microbatches.
Accumulators exist within a step only. Checkpoints, evaluations and texts see plain arrays of the first device: a run goes on
from a checkpoint on any number of devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanojax import config as configs
from nanojax import config_rules, weights, xla
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.step import step
from nanojax.step.share import AXIS, Share
from nanojax.step.state import State, abstract_state

EVERYWHERE, DIVIDED = PartitionSpec(), PartitionSpec(AXIS)


def concrete(config: Config) -> Config:
    """`config` with parallel.devices as a number that this machine has. UserError where it has fewer."""
    if not config.several:
        return config
    here, processes = jax.device_count(), jax.process_count()
    if config.parallel.devices == "all":
        config = config_rules.resolve(configs.override(config, {"parallel.devices": str(here)}))
    if config.devices % processes:
        raise UserError(f"--parallel.devices={config.devices}: {processes} processes cannot have as many each")
    if config.devices > here:
        where = "in all processes" if processes > 1 else "here"
        raise UserError(f"--parallel.devices={config.devices}: jax sees {here} {where}{xla.more_devices()}")
    return config


def mesh_here(config: Config) -> Mesh:
    """The first devices of each process, in all as many as the config asks for."""
    each = config.devices // jax.process_count()
    of = lambda i: [device for device in jax.devices() if device.process_index == i][:each]
    return mesh_of([device for i in range(jax.process_count()) for device in of(i)])


def own_rows(config: Config, mesh: Mesh) -> range:
    """Which rows of a step's batch this process's devices compute."""
    own = [i for i, device in enumerate(mesh.devices) if device.process_index == jax.process_index()]
    each = config.microbatches // config.devices * config.train.microbatch
    return range(own[0] * each, (own[-1] + 1) * each)


def mesh_of(devices: list[Any]) -> Mesh:
    """The mesh of these devices, present or not."""
    return Mesh(np.array(devices), (AXIS,))


def train_step(config: Config, mesh: Mesh) -> Callable[[State, step.Batch], tuple[State, step.Metrics]]:
    """step.train_step of a shared state and batch; to be compiled for the shapes of `abstract`."""
    specs = _specs(config)
    inside = lambda state, batch: step.train_step(config, state, batch, share=Share(config.devices))
    return jax.shard_map(inside, mesh=mesh, in_specs=(specs, DIVIDED), out_specs=(specs, EVERYWHERE), check_vma=False)


def abstract(config: Config, mesh: Mesh) -> tuple[Any, Any]:
    """Shapes, dtypes and shardings of the shared state and of the batch."""
    state, specs = jax.eval_shape(functools.partial(_padded, config), abstract_state(config)), _specs(config)
    place = lambda spec, tree: jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)), tree
    )
    shared = jax.tree.map(place, specs, state, is_leaf=lambda x: isinstance(x, PartitionSpec))
    return shared, place(DIVIDED, step.abstract_batch(config))


def _specs(config: Config) -> State:
    """Where the state's arrays lie: a tree of prefixes."""
    share = Share(config.devices)
    opt = {
        name: DIVIDED if share.divides(weight) else EVERYWHERE for name, weight in weights.table(config.model).items()
    }
    return State(EVERYWHERE, EVERYWHERE, opt, EVERYWHERE)  # pyright: ignore[reportArgumentType]


def _padded(config: Config, state: State) -> State:
    """A plain state with as many layers and rows of optimizer arrays on each device."""
    share, table = Share(config.devices), weights.table(config.model)
    pad = lambda name, arrays: jax.tree.map(share.padded, arrays) if share.divides(table[name]) else arrays
    return state._replace(opt={name: pad(name, arrays) for name, arrays in state.opt.items()})


def spread(config: Config, mesh: Mesh, state: State) -> State:
    """A plain state on all devices of `mesh`, array after array; the plain arrays are deleted.

    Of several processes that of the first one counts; the others give `blank`. Copied by jit: a donated buffer that
    device_put made is accepted but not reused.
    """
    shardings = jax.tree.map(lambda a: a.sharding, abstract(config, mesh)[0])
    leaves, tree = jax.tree.flatten(state)
    for i, sharding in enumerate(jax.tree.leaves(shardings)):
        plain = leaves[i]
        padded = Share(config.devices).padded(plain) if sharding.spec == DIVIDED else plain
        put = jax.device_put(padded, sharding) if jax.process_count() == 1 else _sent(padded, sharding)
        leaves[i] = jax.block_until_ready(jax.jit(jnp.copy, out_shardings=sharding)(put))
        if isinstance(plain, jax.Array):
            plain.delete()
    return jax.tree.unflatten(tree, leaves)


def blank(config: Config) -> State:
    """A plain state in whose place `spread` puts the first process's; of zeros, which take no memory until they are read."""
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract_state(config))


def _sent(plain: Any, sharding: NamedSharding) -> jax.Array:
    """The first process's array, on all devices. Its bits are sent: as numbers, what is sent is a sum, which turns -0 into 0."""
    host = np.asarray(plain)
    bits = multihost_utils.broadcast_one_to_all(host.view(f"uint{8 * host.dtype.itemsize}"))
    whole = np.asarray(bits).view(host.dtype)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def batch_on(config: Config, mesh: Mesh, batch: step.Batch) -> step.Batch:
    """Each device's microbatches of a batch; of several processes each gives the whole one or its own rows (`own_rows`)."""
    sharding = NamedSharding(mesh, DIVIDED)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    rows, A = own_rows(config, mesh), config.microbatches
    own = slice(rows.start // config.train.microbatch, rows.stop // config.train.microbatch)

    def put(a: jax.Array) -> jax.Array:
        part = np.asarray(a[own] if len(a) == A else a)
        return jax.make_array_from_process_local_data(sharding, part, (A, *a.shape[1:]))

    return jax.tree.map(put, batch)


def model_of(state: State) -> State:
    """Step and parameters on the first device, without a copy: for evaluations and texts."""
    first = lambda a: a.addressable_data(0)
    return State(first(state.step), jax.tree.map(first, state.params), {}, {})


def plain(config: Config, state: State) -> State:
    """The whole state on the first device, as checkpoints have it."""
    if not config.several:
        return state
    shapes = abstract_state(config).opt
    whole = jax.tree.map(lambda a, shape: a if a.is_fully_replicated else _gather(a, shape.shape[0]), state.opt, shapes)
    return model_of(state)._replace(opt=jax.tree.map(lambda a: a.addressable_data(0), whole))


def _gather(a: jax.Array, count: int) -> jax.Array:
    """The first `count` layers or rows of a divided array, on every device."""
    mesh: Any = a.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
    return jax.jit(lambda a: a[:count], out_shardings=NamedSharding(mesh, EVERYWHERE))(a)
