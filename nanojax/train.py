"""The run, readable top to bottom: config, data, compiled step, state (restored or fresh), loop."""

import contextlib
import functools
import math
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nanojax import config as configs
from nanojax import files, sample, xla
from nanojax import step as steps
from nanojax.cli import Parser, UserError, run_main
from nanojax.config import Config
from nanojax.data import loader
from nanojax.evaluate import bpb, core
from nanojax.model.forward import residual_names
from nanojax.plan import planner
from nanojax.run import checkpoint, metrics, resume, run_folder, signals
from nanojax.tokenizer import Tokenizer

USAGE = """usage: python -m nanojax.train --config=NAME [--section.key=value ...] [--help]

Trains a model. The same command again resumes where the run folder's newest checkpoint ends. SIGTERM and Ctrl-C finish
the step, save and exit 0; a second Ctrl-C exits at once. Exit codes: 0 done, or stopped and saved; 1 the loss became
NaN or Inf; 2 a mistake in config, data or folders, in one line.

examples:
  python -m nanojax.train --config=demo
  python -m nanojax.train --config=demo --model.depth=2 --train.steps=100 --train.run=runs/small
  python -m nanojax.train --config=d32_4070 --profile.start=10 --profile.steps=3
  python -m nanojax.train --config=demo --train.steps=320 --train.extend=120          more steps, from checkpoint 120
  python -m nanojax.train --config=demo --train.run=runs/second --train.init=runs/demo     from another run's weights
"""


class Diverged(Exception):
    """The loss, another metric or the state is NaN or Inf. The message says which and when."""


def train(config: Config) -> None:
    """Runs `config` (resolved) to its last step, or to a signal; resumes if its run folder has a checkpoint.

    Raises UserError before anything compiles when data, folder or sizes cannot work; Diverged on NaN or Inf.
    """
    run, t, T = Path(config.train.run), config.train, config.model.T
    if config.compute.residuals != "auto":
        residual_names(config)

    # data
    A, B, _ = config.batch_shape
    batches = loader.train_iterator(config.data.path, A * B, T, t.seed, config.model.V)
    tokenizer = Tokenizer.load(Path(config.data.path) / "tokenizer")
    loader.valid_batches(config.data.path, 1, T)  # a mistake shows now rather than at the first evaluation
    tasks = _core_tasks(config)
    run_folder.check_path(run)
    if config.compute.residuals == "auto":
        config = _with_residuals(config, run)

    with contextlib.ExitStack() as open_until_the_end:
        # run folder
        open_until_the_end.enter_context(files.locked(run, "--train.run"))
        stop, in_loop = open_until_the_end.enter_context(signals.stop_requests())
        resumption = resume.check(run, config)
        config = resumption.config
        if config.train.init and not run_folder.available(run):
            resume.check_init(config, tokenizer)
        tokenizer.save(run / "tokenizer")
        run_folder.write_config(run, config)

        # the step, compiled before the state exists: autotuning on a GPU wants scratch memory
        begin = time.monotonic()
        print(f"{config.name}: {config.model.parameters:,} parameters, {t.tokens:,} tokens in {t.steps} steps, {run}")
        print(f"compiling for {jax.devices()[0].device_kind} ...", flush=True)
        train_step = xla.compiled(
            functools.partial(steps.train_step, config), steps.abstract_state(config), steps.abstract_batch(config)
        )
        print(f"compiled in {time.monotonic() - begin:.0f} s; {planner.check(train_step, config, xla.pool_bytes())}")

        # state, restored or fresh
        restored = checkpoint.restore(run, config, resumption.step)
        records: list[dict[str, Any]] = []
        if restored:
            state, meta = restored
            batches.set_state(meta["data"])
            print("\n".join([f"resuming after step {meta['step']}", *resumption.lines(meta["step"])]))
            records = resumption.records(meta["step"])
        elif t.init:
            state, of_step = resume.init_state(config)
            print(f"weights of {t.init}, step {of_step}; fresh optimizer")
            records = [{"kind": "init", "step": 0, "from": t.init, "from_step": of_step}]
        else:
            state = jax.jit(steps.init_state, static_argnums=0)(config)
        done = int(state.step)
        if done >= t.steps:
            print(f"{run}: all {t.steps} steps are done")
            return
        writer = open_until_the_end.enter_context(contextlib.closing(checkpoint.open_for_saving(run, config)))
        log = open_until_the_end.enter_context(contextlib.closing(metrics.Metrics(config, run, done)))
        for record in records:
            log.record(record)

        # loop
        in_loop.set()
        traced_until = 0  # the step after which a trace that is being taken ends
        late: tuple[int, dict[str, jax.Array]] | None = None  # the last step's metrics, still being computed
        stopping = False
        while done < t.steps and not stopping:
            if done == config.profile.start:
                jax.block_until_ready(state)  # otherwise the trace would hold the end of the step before
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # a trace of three steps would be 25 MB of Python calls
                jax.profiler.start_trace(run / "profile", profiler_options=options)
                traced_until = min(done + config.profile.steps, t.steps)
            with jax.profiler.StepTraceAnnotation("train", step_num=done):
                state, new = train_step(state, steps.Batch(jnp.asarray(next(batches).reshape(config.batch_shape))))
            done += 1
            if late:  # the device is busy with the next step meanwhile
                log.train(late[0], _read(*late))
            late = done, new
            stopping = stop.is_set()  # read once per step, so that the step it ends is the step that is saved

            evaluate = done == t.steps or (config.eval.every and done % config.eval.every == 0)
            run_core = tasks and (done == t.steps or done % config.eval.core_every == 0)
            save = done == t.steps or stopping or (config.checkpoint.every and done % config.checkpoint.every == 0)
            profiled = traced_until and (done == traced_until or stopping)
            if not (evaluate or run_core or save or profiled):
                continue
            log.train(done, _read(*late))  # waits for the device
            late = None
            if profiled:
                jax.profiler.stop_trace()
                traced_until = 0
                (run / "profile" / "step.hlo.txt").write_text(train_step.as_text() or "")
                log.say(f"trace in {run / 'profile'}; python scripts/top_kernels.py {run} prints its top kernels")
            if evaluate:
                scores = bpb.of_shards(
                    config, state.params, tokenizer, config.data.path, t.microbatch, config.eval.tokens
                )
                log.evaluation(done, scores.scores(), _sample(config, state.params, tokenizer))
            if run_core:
                _core(config, state.params, tokenizer, tasks, done, log, stop)
            if save:
                log.flush()
                _save(writer, config, state, batches, tokenizer)
            log.restart_clock(done)

        checkpoint.wait(writer)
        left = f"stopped after step {done}; the same command resumes" if done < t.steps else f"done, {t.steps} steps"
        log.say(f"{left}; saved in {run}")


def _read(step: int, device_metrics: dict[str, jax.Array]) -> dict[str, float]:
    """A step's metrics as floats. Diverged if one is not finite."""
    values = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise Diverged(f"step {step}: {name} is {value}")
    return values


def _save(writer: Any, config: Config, state: steps.State, batches: loader.TrainIterator, tokenizer: Tokenizer) -> None:
    step = int(state.step)
    try:
        checkpoint.save(writer, config, state, batches.get_state(), tokenizer.fingerprint)
    except checkpoint.NotFinite as error:
        raise Diverged(f"step {step}: {error} holds NaN or Inf, not saved") from None


def _core_tasks(config: Config) -> list[core.Task]:
    """CORE's tasks, every file of them read and found usable; none when eval.core_every is 0."""
    if not config.eval.core_every:
        return []
    tasks = core.load_tasks(Path(config.eval.core_bundle), "eval.core_bundle")
    for task in tasks:
        core.load_examples(task, config.eval.core_per_task, "eval.core_per_task")
    return tasks


def _core(
    config: Config,
    params: Any,
    tokenizer: Tokenizer,
    tasks: list[core.Task],
    step: int,
    log: metrics.Metrics,
    stop: threading.Event,
) -> None:
    """Logs CORE, in batches of a microbatch's size, which are known to fit. A signal ends it without a result."""
    batch_tokens = config.train.microbatch * config.model.T
    finished = []
    for score in core.evaluate(config, params, tokenizer, tasks, config.eval.core_per_task, batch_tokens):
        if score.finished:
            finished.append(score)
        if stop.is_set():
            return log.say(f"step {step} · CORE left out: asked to stop")
    by_task = {score.task.label: score.centred for score in finished}
    log.core(step, core.core_of(finished), by_task, sum(score.total for score in finished))


def _sample(config: Config, params: Any, tokenizer: Tokenizer) -> str | None:
    if not config.eval.prompt or not config.eval.sample_tokens:
        return None
    drawn = dict(temperature=0.8, top_k=50)  # greedy text of a young model is one phrase over and over
    return sample.text(config, params, tokenizer, config.eval.prompt, config.eval.sample_tokens, **drawn)[0]


def _with_residuals(config: Config, run: Path) -> Config:
    """`config` with compute.residuals=auto made concrete: as the run was begun, else the fastest that fits the GPU."""
    if run_folder.available(run):
        choice = run_folder.read_config(run).compute.residuals
    else:
        say = lambda message: print(message, flush=True)
        plan = planner.best_residuals(config, planner.card_here(xla.pool_bytes()), say=say)
        choice = plan.config.compute.residuals
    print(f"compute.residuals={choice} chosen by auto")
    return configs.override(config, {"compute.residuals": choice})


def parse(arguments: Sequence[str]) -> Config | None:
    """The config of a command line, None for --help (printed, with the named config's values if there is one)."""
    parser = Parser("python -m nanojax.train", add_help=False)
    parser.add_argument("--config")
    parser.add_argument("-h", "--help", action="store_true")
    known, rest = parser.parse_known_args(arguments)
    if known.help:
        shown = configs.load_unresolved(known.config) if known.config else Config()
        print(f"{USAGE}\nconfigs: {', '.join(configs.available())}; or the path of a file\n")
        print(f"keys, with their value in {known.config or 'an empty config'}:\n{configs.describe(shown)}")
        return None
    if not known.config:
        raise UserError(f"--config=NAME is missing; there are {', '.join(configs.available())}; --help lists all keys")
    return configs.load(known.config, rest)


def main() -> None:
    """The command."""
    config = parse(sys.argv[1:])
    if config is None:
        return
    memory = xla.configure()
    if memory:
        print(memory)
    try:
        train(config)
    except Diverged as error:
        print(f"error: {error}; {run_folder.recovery_hint(Path(config.train.run))}", file=sys.stderr)
        sys.exit(1)
    except jax.errors.JaxRuntimeError as error:
        if not xla.is_out_of_memory(error):
            raise
        hint = "lower train.microbatch, or set compute.residuals=inputs; python -m nanojax.plan shows what fits"
        raise UserError(f"out of device memory: {str(error).splitlines()[0][:200]}; {hint}") from None


if __name__ == "__main__":
    run_main(main)
