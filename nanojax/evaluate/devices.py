"""Evaluation on the devices that hold the parameters: rows of a batch are divided among them, or whole pieces of work.

A row's result does not depend on the rows beside it, so it is the same on any number of devices. Whoever calls knows one
function for one device and for several; how many there are, the parameters say.
"""

import argparse
import concurrent.futures
import functools
import queue
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanojax import xla
from nanojax.cli import UserError
from nanojax.step.share import AXIS


def number(text: str) -> str:
    """The value of --devices."""
    if text != "all" and not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of devices from 1, or all")
    return text


def chosen(number: str) -> list[Any]:
    """So many of this machine's devices, "all" or a number. UserError where there are fewer."""
    here = jax.local_devices()
    count = len(here) if number == "all" else int(number)
    if count > len(here):
        raise UserError(f"--devices={number}: jax sees {len(here)} here{xla.more_devices()}")
    return here[:count]


def spread(params: Any, devices: list[Any]) -> Any:
    """The parameters on all of these devices; of one, as they are."""
    if len(devices) == 1:
        return params
    return jax.device_put(params, NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec()))


def count(params: Any) -> int:
    """How many devices hold the parameters."""
    mesh = _mesh(params)
    return mesh.size if mesh else 1


def on_each(params: Any) -> list[Any]:
    """The parameters on each of this process's devices, without a copy."""
    if _mesh(params) is None:
        return [params]
    shards = range(len(jax.tree.leaves(params)[0].addressable_shards))
    return [jax.tree.map(lambda a, i=i: a.addressable_shards[i].data, params) for i in shards]


def by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(config, params, *rows)`, compiled; where several devices hold the parameters, each computes its n-th of the rows.

    Of several devices, rows are arrays of the host whose length the number divides. Results, which have as many rows, are whole
    on every device.
    """
    alone = jax.jit(function, static_argnums=0)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def shared(config: Any, mesh: Mesh, params: Any, *rows: Any) -> Any:
        inside, specs = functools.partial(function, config), (PartitionSpec(), *[PartitionSpec(AXIS)] * len(rows))
        # Each device by itself, since XLA would not divide Pallas kernels.
        own = jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False)
        return jax.lax.with_sharding_constraint(own(params, *rows), NamedSharding(mesh, PartitionSpec()))

    @functools.wraps(function)
    def computed(config: Any, params: Any, *rows: Any) -> Any:
        mesh = _mesh(params)
        if mesh is None:
            return alone(config, params, *rows)
        divided = NamedSharding(mesh, PartitionSpec(AXIS))
        put = lambda a: jax.make_array_from_callback(a.shape, divided, lambda index: a[index])
        return shared(config, mesh, params, *map(put, rows))

    return computed


def by_turns(work: Callable[[Any, Any], Any], pieces: Iterable[Any], params: Any) -> Iterator[Any]:
    """`work(the parameters on one device, piece)` of each piece, in order; each device that is free takes the next."""
    each = on_each(params)
    if len(each) == 1:
        yield from (work(each[0], piece) for piece in pieces)
        return
    free: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for copy in each:
        free.put(copy)

    def on_one(piece: Any) -> Any:
        copy = free.get()
        try:
            with jax.default_device(jax.tree.leaves(copy)[0].device):
                return work(copy, piece)
        finally:
            free.put(copy)

    pool = concurrent.futures.ThreadPoolExecutor(len(each))
    try:
        yield from pool.map(on_one, pieces)
    finally:
        pool.shutdown(cancel_futures=True)


def _mesh(params: Any) -> Mesh | None:
    """The mesh of the parameters' devices; None where there is one."""
    sharding: Any = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    return cast(Mesh, sharding.mesh)
