"""The run, readable top to bottom: config, data, compiled step, state (restored or fresh), loop."""

import signal

if __name__ == "__main__":
    # A KeyboardInterrupt that meets jax's garbage-collector callback while jax is imported is swallowed, and the run goes on.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import collections
import contextlib
import functools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from nanojax import config as configs
from nanojax import config_files, files, follow, xla
from nanojax import source as sources
from nanojax import step as steps
from nanojax.card import machine, memory
from nanojax.card import start as starting
from nanojax.cli import Parser, UserError, run_main
from nanojax.config import Config
from nanojax.evaluate import core
from nanojax.model.forward import residual_names
from nanojax.plan import planner
from nanojax.run import (
    checkpoint,
    ending,
    exits,
    guard,
    metrics,
    output,
    processes,
    resume,
    run_folder,
    saving,
    signals,
)
from nanojax.run import watch as watching
from nanojax.run.exits import Diverged
from nanojax.run.trace import Trace
from nanojax.source import Source
from nanojax.step import devices
from nanojax.tokenizer import Tokenizer

Late = collections.deque[tuple[int, dict[str, Any]]]  # (step, its metrics)

USAGE = """usage: python -m nanojax.train --config=NAME [--section.key=value ...] [--help]

Trains a model. The same command again resumes where the run folder's newest checkpoint ends. SIGTERM, SIGHUP and Ctrl-C
finish the step and save; a second Ctrl-C exits at once. Exit codes: 0 done; 1 the loss became NaN or Inf; 2 a mistake in
config, data or folders, in one line; 3 stopped by a signal and saved, 4 not saved; 5 ended by its surroundings (data,
disk, device) and saved, 6 not saved; 7 a step did not return for train.stall_minutes. Starting again helps from 3 on;
docs/running.md has a loop for it. python -m nanojax.status --run=RUN tells where a run is.

examples:
  python -m nanojax.train --config=demo
  python -m nanojax.train --config=demo --model.depth=2 --train.steps=100 --train.run=runs/small
  python -m nanojax.train --config=d32_4070 --profile.start=10 --profile.steps=3
  python -m nanojax.train --config=d32_4070 --parallel.devices=all                     all cards of this machine
  python -m nanojax.train --config=d32_4070 --parallel.coordinator=HOST:PORT --parallel.processes=2 --parallel.process=0
  python -m nanojax.train --config=demo --train.steps=320 --train.extend=120          more steps, from checkpoint 120
  python -m nanojax.train --config=demo --train.run=runs/second --train.init=runs/demo     from another run's weights
"""


def train(config: Config, by_hand: frozenset[str] = frozenset(), card: starting.Card = starting.HERE) -> int:
    """Runs `config` (resolved) to its last step, or to a signal; resumes if its run folder has a checkpoint.

    Args:
      by_hand: keys that were typed on the command line; compute.residuals stays if it was.
      card: what is asked of the machine.

    Returns an exit code (run/exits.py). Raises UserError before anything compiles when data, folder or sizes cannot work;
    Diverged on NaN or Inf; Failed when the surroundings end the run, which is then saved if that is possible.
    """
    run, t = Path(config.train.run), config.train
    may_lower = "compute.residuals" not in by_hand or config.compute.residuals == "auto"
    run_folder.check_path(run)
    begun = bool(run_folder.available(run) or metrics.read(run, "train"))
    if config.compute.residuals != "auto":
        residual_names(config)

    with contextlib.ExitStack() as open_until_the_end:
        stop, in_loop = open_until_the_end.enter_context(signals.stop_requests())
        config, group = open_until_the_end.enter_context(processes.joined(config, by_hand, stop))
        if group and group.number:
            return group.ends(follow.follow(config, group, in_loop, _compiled))

        # data
        with exits.restarting(begun):
            source = sources.of(config)
            tokenizer, batches = source.tokenizer, source.batches
            tasks = core.tasks_of(config)
        if group:
            group.same("data", sources.fingerprint(config))
            group.same("tasks of CORE", core.fingerprint(tasks))

        # the card: kernels checked and chosen before jax starts on it
        if card.here() and not t.extend:
            resume.check(run, config)  # a mistake shows before minutes of trials
        started = starting.begin(config, run, card)
        config = started.config
        if group:
            group.chosen(config)
        if told := xla.start():
            print(told)
        if group:
            group.same("number of devices", jax.local_device_count())
        config = devices.concrete(config)
        if config.compute.residuals == "auto":
            config = _with_residuals(config, run)

        # run folder
        if t.init and not run_folder.available(run):
            resume.check_init(config, tokenizer)
        open_until_the_end.enter_context(files.locked(run, "--train.run"))
        resumption = resume.check(run, config)
        config = resumption.config
        open_until_the_end.enter_context(exits.restarting(begun))
        watch = open_until_the_end.enter_context(watching.standing(run, t.stall_minutes))
        tokenizer.save(run / "tokenizer")
        run_folder.write_config(run, config)
        files.write_json(run / run_folder.DATA, sources.described(config, tokenizer))

        # the step, compiled before the state exists: autotuning on a GPU wants scratch memory
        begin = time.monotonic()
        print(f"{config.name}: {config.model.parameters:,} parameters, {t.tokens:,} tokens in {t.steps} steps, {run}")
        mesh = devices.mesh_here(config) if config.several else None
        if group and mesh:
            group.chosen(config)
            sources.of_process(source, config, devices.own_rows(config, mesh))
        print(f"compiling for {f'{config.devices} x ' if mesh else ''}{jax.devices()[0].device_kind} ...", flush=True)
        take = card.take if started.on_gpu and not config.several else None
        fitting, train_step, line = memory.fitting(config, _compiled, take, may_lower, print)
        print(f"compiled in {time.monotonic() - begin:.0f} s; {line}")
        if fitting != config:
            started = started.lowered(config, fitting)
            config = fitting
            resumption = resume.check(run, config)
            run_folder.write_config(run, config)
        if started.on_gpu:
            machine.update(run, started.record)

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
            momenta = "taken over" if config.optim.steps_before else "fresh"
            print(f"weights of {t.init}, step {of_step}; {momenta} momenta")
            records = [{"kind": "init", "step": 0, "from": t.init, "from_step": of_step, "momenta": momenta}]
        else:
            state = jax.jit(steps.init_state, static_argnums=0)(config)
        if group:
            group.shared(batches.get_state())
            group.meet()
        if mesh:
            state = devices.spread(config, mesh, state)
        done = first = int(state.step)
        if done >= t.steps and not any(_due(config, tasks, done, metrics.measured(metrics.read(run)))):
            print(f"{run}: all {t.steps} steps are done")
            return group.ends(exits.DONE) if group else exits.DONE
        log = open_until_the_end.enter_context(contextlib.closing(metrics.Metrics(config, run, done)))
        for record in [*records, *started.records(done)]:
            log.record(record)
        gathered = [functools.partial(group.gathered, config)] if group else []
        saver = saving.Saver(run, config, tokenizer, log, *gathered)
        open_until_the_end.enter_context(contextlib.closing(saver))
        alive = functools.partial(group.alive, watch) if group else functools.partial(guard.alive, watch, stop)

        # loop
        in_loop.set()
        watch.beat(done)
        trace = Trace(config, run, log)
        first_row = batches.position
        late: Late = collections.deque()  # metrics of steps that the device may still be computing
        try:
            while True:
                saver.notice()
                last, stopping = done >= t.steps, stop.is_set()
                evaluate, run_core = _due(config, tasks, done, log.recorded) if not stopping else (False, False)
                on_time = config.checkpoint.every and done % config.checkpoint.every == 0
                save = done > first and (on_time or last or stopping or saver.retry_is_due)
                profiled = trace.until and (done == trace.until or stopping)
                if save or evaluate or run_core or profiled:
                    _log(log, late)  # waits for the device
                    if save:  # before anything that may fail
                        log.flush()
                        saver.save(state, batches.get_state())
                    if profiled:
                        guard.attempt(log, "trace", trace.end, train_step)
                        if started.on_gpu:
                            guard.attempt(log, "machine.json", machine.report, config, run, train_step, log.say, True)
                    attempt = group.attempt if group else guard.attempt
                    if evaluate:
                        attempt(log, "evaluation", _evaluate, state, source, log, alive)
                    if run_core:
                        attempt(log, "CORE", _core, config, state, tokenizer, tasks, log, alive)
                    log.restart_clock(done)
                if last or stopping:
                    break
                if stop.is_set():
                    continue  # to save this very step: a measurement that was cut short is made when the run resumes here
                if done == config.profile.start:
                    guard.attempt(log, "trace", trace.begin, done, state)
                rows = guard.next_batch(batches, log, watch, stop)
                if rows is None:
                    continue
                try:
                    batch, told = source.batch(rows, state, alive)
                except guard.AskedToStop:  # in the middle of answers, which the resumed run writes again
                    batches.set_state(batches.get_state(unused=1))
                    continue
                if mesh and batch:
                    batch = devices.batch_on(config, mesh, batch)
                if group:
                    group.order("step")
                with jax.profiler.StepTraceAnnotation("train", step_num=done):
                    state, new = train_step(state, batch) if batch else (state._replace(step=state.step + 1), {})
                done += 1
                late.append((done, new | told))
                _log(log, late, but=1)  # the device is busy with the newest step meanwhile
                watch.beat(done)
                if started.on_gpu and done == first + machine.STEPS:
                    guard.attempt(log, "machine.json", machine.report, config, run, train_step, log.say)
            cut_short = stop.is_set() and any(_due(config, tasks, done, log.recorded))
            code = ending.ended(done >= t.steps and not cut_short, state, batches, log, saver, watch, stop)
            return group.ends(code) if group else code
        except Diverged as error:
            log.end(exits.DIVERGED, str(error))
            raise
        except BaseException as error:
            if group and group.cuts_off(error):
                raise ending.lost(group.reason(error), done == first, log, saver) from error
            log_rest = functools.partial(_log, log, late)
            raise ending.rescued(error, first, first_row, state, batches, log, saver, log_rest) from error


def _compiled(config: Config) -> Any:
    """The step, compiled for this machine."""
    fused = config.compute.fused != "off"
    if config.several:
        mesh = devices.mesh_here(config)
        return xla.compiled(devices.train_step(config, mesh), *devices.abstract(config, mesh), fused=fused)
    shapes = steps.abstract_state(config), steps.abstract_batch(config)
    return xla.compiled(functools.partial(steps.train_step, config), *shapes, fused=fused)


def _due(config: Config, tasks: list[core.Task], done: int, measured: set[tuple[str, int]]) -> tuple[bool, bool]:
    """(evaluate, run CORE) after step `done`: what the config asks for and is not on record."""
    last, every = done >= config.train.steps, config.eval.every
    begun = done > 0 or config.data.kind == "rollouts"  # only of the latter it is worth knowing what they begin with
    evaluate = begun and (last or (every > 0 and done % every == 0))
    run_core = done > 0 and bool(tasks) and (last or done % config.eval.core_every == 0)
    return evaluate and ("eval", done) not in measured, run_core and ("core", done) not in measured


def _log(log: metrics.Metrics, late: Late, but: int = 0) -> None:
    """Logs the steps of `late`, oldest first, until `but` of them are left."""
    while len(late) > but:
        log.train(late[0][0], _read(*late[0]))
        late.popleft()


def _read(step: int, device_metrics: dict[str, Any]) -> dict[str, float]:
    """A step's metrics as floats. Diverged if one is not finite."""
    values = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise Diverged(f"step {step}: {name} is {value}")
    return values


def _evaluate(state: steps.State, source: Source, log: metrics.Metrics, alive: Callable[[], None]) -> None:
    """Logs scores of what is held out, and a text."""
    log.evaluation(int(state.step), *source.evaluate(state, alive))


def _core(
    config: Config, state: steps.State, tokenizer: Tokenizer, tasks: list[core.Task], log: metrics.Metrics,
    alive: Callable[[], None],
) -> None:  # fmt: skip
    """Logs CORE. A signal ends it without a result."""
    finished = core.finished(config, state.params, tokenizer, tasks, alive)
    by_task = {score.task.label: score.centred for score in finished}
    log.core(int(state.step), core.core_of(finished), by_task, sum(score.total for score in finished))


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
        shown = config_files.load_unresolved(known.config) if known.config else Config()
        print(f"{USAGE}\nconfigs: {', '.join(config_files.available())}; or the path of a file\n")
        print(f"keys, with their value in {known.config or 'an empty config'}:\n{configs.describe(shown)}")
        return None
    if not known.config:
        raise UserError(
            f"--config=NAME is missing; there are {', '.join(config_files.available())}; --help lists all keys"
        )
    return config_files.load(known.config, rest)


def main() -> None:
    """The command."""
    config = parse(sys.argv[1:])
    if config is not None:
        end_process(lambda: config)


def end_process(make: Callable[[], Config]) -> NoReturn:
    """Trains what `make` gives, which may raise as `train` does, and ends the process with the exit code."""
    with output.unfailing(), output.quiet_threads():
        code = _run(make)
    if jax.distributed.is_initialized():
        os._exit(code)  # jax's own way out waits for the other processes, which may be gone
    sys.exit(code)


def _run(make: Callable[[], Config]) -> int:
    """`train` as a process: its exit code; errors are told on stderr."""
    xla.settings()
    hint = ""
    try:
        config = make()
        hint = config.train.run
        return train(config, config_files.typed(sys.argv[1:]))
    except Diverged as error:
        print(f"error: {error}; {run_folder.recovery_hint(Path(hint))}", file=sys.stderr)
        return exits.DIVERGED
    except exits.Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except Exception as error:  # before the loop; Python's own exit code would be that of a diverged run
        mistake = UserError(guard.reason(error)) if guard.is_out_of_memory(error) else error
        if isinstance(mistake, UserError | OSError):
            if not jax.distributed.is_initialized():
                raise mistake from None
            print(f"error: {mistake}", file=sys.stderr)
            return exits.MISTAKE
        traceback.print_exc()
        return exits.FAILED


if __name__ == "__main__":
    run_main(main)
