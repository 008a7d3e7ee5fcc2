"""A profiler trace of a few steps (profile.start, profile.steps), in RUN/profile."""

from pathlib import Path
from typing import Any

import jax

from nanojax.config import Config
from nanojax.run.metrics import Metrics


class Trace:
    """`until` is the step after which the trace that is being taken ends; 0 while none is."""

    def __init__(self, config: Config, run: Path, log: Metrics):
        self.config, self.folder, self.log = config, run / "profile", log
        self.until = 0

    def begin(self, done: int, state: Any) -> None:
        """Starts the trace after step `done`."""
        jax.block_until_ready(state)  # otherwise the trace would hold the end of the step before
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # a trace of three steps would be 25 MB of Python calls
        jax.profiler.start_trace(self.folder, profiler_options=options)
        self.until = min(done + self.config.profile.steps, self.config.train.steps)

    def end(self, train_step: Any) -> None:
        """Writes the trace and the compiled step's program beside it."""
        self.until = 0
        jax.profiler.stop_trace()
        (self.folder / "step.hlo.txt").write_text(train_step.as_text() or "")
        self.log.say(
            f"trace in {self.folder}; python scripts/top_kernels.py {self.folder.parent} prints its top kernels"
        )
