"""What every process of a run but the first does: its devices' share of each step, as process 0 says. It has no run folder."""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from nanojax import source as sources
from nanojax import xla
from nanojax.config import Config
from nanojax.evaluate import core
from nanojax.plan import planner
from nanojax.run import exits, guard
from nanojax.run.processes import Group
from nanojax.run.watch import Watch
from nanojax.step import devices


class Told:
    """In the place of the run's logs: warnings on stderr."""

    def warn(self, about: str, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)


def follow(config: Config, group: Group, in_loop: threading.Event, build: Callable[[Config], Any]) -> int:
    """Process 0 has the same config and calls train.train, whose comments say what happens when. Returns its exit code.

    Args:
      in_loop: set once there is something to save when a signal comes.
      build: compiles the step.
    Raises UserError before anything compiles when its data cannot work, or what process 0 raised.
    """
    source, tasks = sources.of(config), core.tasks_of(config)
    group.same("data", sources.fingerprint(config))
    group.same("tasks of CORE", core.fingerprint(tasks))
    config = group.chosen(config)
    xla.start()
    group.same("number of devices", jax.local_device_count())
    config = group.chosen(config)
    mesh = devices.mesh_here(config)
    sources.of_process(source, config, devices.own_rows(config, mesh))
    print(f"process {group.number}: compiling for {jax.local_devices()[0].device_kind} ...", flush=True)
    train_step = build(config)
    planner.check(train_step, config, xla.pool_bytes())

    data = group.shared(None)
    group.meet()
    state = devices.spread(config, mesh, devices.blank(config))
    if data:
        source.batches.set_state(data)
    in_loop.set()
    unwatched = Watch(Path(), 0)  # process 0 has the watch of the run
    alive = functools.partial(group.alive, unwatched)
    while True:
        match group.next():
            case ["step"]:
                rows = guard.next_batch(source.batches, Told(), unwatched, group.stop)
                if rows is None:
                    raise exits.Failed("stopped while its data could not be read", exits.STOPPED_UNSAVED)
                batch, _ = source.batch(rows, state, alive)
                assert batch
                state, _ = train_step(state, devices.batch_on(config, mesh, batch))
            case ["gather"]:
                devices.plain(config, state)
            case ["evaluation"]:
                with contextlib.suppress(guard.AskedToStop):
                    source.evaluate(state, alive)
            case ["CORE"]:
                with contextlib.suppress(guard.AskedToStop):
                    core.finished(config, state.params, source.tokenizer, tasks, alive)
            case ["end", code]:
                if code not in (exits.DONE, exits.STOPPED):
                    print(
                        f"process {group.number}: the run ended with exit code {code}; process 0 says why",
                        file=sys.stderr,
                    )
                return code
