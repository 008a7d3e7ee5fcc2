"""How a command goes on with the run folder it names: as it was, with other rounding, with more steps, or from other weights."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojax import config as configs
from nanojax import step as steps
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.quant import decode, encode
from nanojax.run import checkpoint, run_folder
from nanojax.step import optim
from nanojax.tokenizer import Tokenizer
from nanojax.weights import table

Changes = dict[str, tuple[Any, Any]]  # key -> (was, now)


@dataclasses.dataclass(frozen=True)
class Resumption:
    """How a run goes on.

    Attributes:
      config: the command's, with what a resumed run keeps from its beginning.
      step: the checkpoint that an extended run goes on from; None = the newest good one.
      rounding: changed keys after which the run is no longer bit for bit what it would have been.
      schedule: changed keys of an extended run.
      planned: whether an extended run is what it would have been, had it been planned so from its first step.
    """

    config: Config
    step: int | None = None
    rounding: Changes = dataclasses.field(default_factory=dict)
    schedule: Changes = dataclasses.field(default_factory=dict)
    planned: bool = True

    def lines(self, done: int) -> list[str]:
        """What the user is told when the run goes on after step `done`."""
        out = []
        if self.rounding and done < self.config.train.steps:
            out.append(f"{_list(self.rounding)}: from step {done + 1} on not bit for bit what it would have been")
        if self.schedule and self.planned:
            out.append(f"{_list(self.schedule)}: extended as if it had been planned so")
        elif self.schedule:
            out.append(
                f"{_list(self.schedule)}: extended after the learning rate had changed; it jumps to the new schedule's "
                f"at step {done + 1}, so this is not what a run planned so would be"
            )
        return out

    def records(self, done: int) -> list[dict[str, Any]]:
        """The same for metrics.jsonl."""
        out: list[dict[str, Any]] = []
        if self.rounding:
            out.append({"kind": "rounding", "step": done, "changed": self.rounding})
        if self.schedule:
            out.append({"kind": "extended", "step": done, "changed": self.schedule, "as_planned": self.planned})
        return out


def check(run: Path, config: Config) -> Resumption:
    """How `config` goes on with the checkpoints in `run`, if there are any.

    Raises UserError naming the keys in which it differs from what they were trained with, unless these only round
    otherwise or train.extend allows them; and where the checkpoints have no optimizer state.
    """
    run_folder.check_path(run)
    there = run_folder.available(run)
    if not there:
        if config.train.extend:
            raise UserError(f"--train.extend={config.train.extend}: {run} has no checkpoint to go on from")
        return Resumption(config)
    if run_folder.imported(run, there[-1]):
        raise UserError(
            f"{run}: holds imported weights without optimizer state, so training cannot go on from them; start a new run "
            f"with --train.init={run} and another --train.run"
        )
    earlier = run_folder.read_config(run)
    if not config.train.init or _same_folder(config.train.init, earlier.train.init):
        config = configs.override(config, {"train.init": earlier.train.init})
    refused = configs.changes(earlier, config, "results")
    if refused:
        raise UserError(
            f"{run}: its checkpoints were trained with other settings: {_list(refused)}; choose another --train.run"
        )
    rounding = configs.changes(earlier, config, "rounding")
    schedule = configs.changes(earlier, config, "schedule")
    if not schedule:
        if config.train.extend not in (0, earlier.train.extend):
            raise UserError(
                f"--train.extend={config.train.extend}: {run} has this schedule already; leave it out, or choose another "
                "--train.run"
            )
        kept = configs.override(config, {"train.extend": earlier.train.extend})
        return Resumption(kept, rounding=rounding)
    return Resumption(config, *_extended(run, earlier, config, there, schedule, rounding))


def _extended(
    run: Path, earlier: Config, config: Config, there: list[int], schedule: Changes, rounding: Changes
) -> tuple[int, Changes, Changes, bool]:
    """The fields of a Resumption behind its config. UserError unless train.extend names a checkpoint that is there."""
    planned = [step for step in there if _same_rates(earlier, config, step)]
    step = config.train.extend
    if step not in there:
        before = f"{planned[-1]}, the newest before the learning rates differ" if planned else f"{there[-1]}"
        wrong = f"--train.extend={step}: no such checkpoint" if step else "its schedule was another"
        raise UserError(
            f"{run}: {wrong}: {_list(schedule)}; --train.extend=STEP goes on from a checkpoint ({_steps(there)}) with "
            f"this one: {before}; or choose another --train.run"
        )
    if config.train.steps <= step:
        raise UserError(f"--train.steps={config.train.steps}: the checkpoint of --train.extend={step} is past its end")
    return step, rounding, schedule, step in planned


def _same_folder(a: str, b: str) -> bool:
    return bool(a and b) and Path(a).resolve() == Path(b).resolve()


def _same_rates(a: Config, b: Config, steps_done: int) -> bool:
    """Whether both schedules give the same learning rate, momentum and decay at every step before `steps_done`."""
    at = np.arange(steps_done)
    pairs = zip(optim.schedules(a), optim.schedules(b))
    if not all(np.array_equal(before(at), now(at)) for before, now in pairs):
        return False
    return not a.optim.matrix_decay or a.train.steps == b.train.steps  # a cosine over all steps


def _steps(there: list[int]) -> str:
    return ", ".join(map(str, there))


def _list(changed: Changes) -> str:
    return ", ".join(f"{key} (was {earlier}, now {now})" for key, (earlier, now) in changed.items())


# -- another run's weights ---------------------------------------------------------------------------------------------


def check_init(config: Config, tokenizer: Tokenizer) -> None:
    """UserError unless the weights of train.init fit `config` and mean the ids of `tokenizer`. Nothing is loaded.

    With optim.steps_before its optimizer must fit, too.
    """
    source = config.train.init
    earlier = run_folder.read_config(source)
    there = earlier.model
    if not run_folder.available(source):
        raise UserError(f"--train.init={source}: has no checkpoint")
    names: dict[str, tuple[Any, Any]] = {"family": (there.family, config.model.family)}
    names |= {"without": (there.without, config.model.without)}
    names |= {"depth": (there.L, config.model.L), "width": (there.D, config.model.D)}
    names |= {"head_dim": (there.H, config.model.H), "vocab": (there.V, config.model.V)}
    other = [f"model.{name} is {its}, here {ours}" for name, (its, ours) in names.items() if its != ours]
    if other:
        raise UserError(f"--train.init={source}: a model of another shape: {', '.join(other)}")
    if Tokenizer.load(Path(source) / "tokenizer").fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"--train.init={source}: has another tokenizer than {config.data.path}; tokenize the text with "
            f"--tokenizer={Path(source) / 'tokenizer'}"
        )
    if config.optim.steps_before:
        _check_momenta(source, earlier, config)


def _check_momenta(source: str, earlier: Config, config: Config) -> None:
    """UserError unless the optimizer of the run `source` can be taken over as it is."""
    keys = (
        "optim.matrix",
        "optim.muon",
        "accumulate.blocks",
        *(f"stored.{f.name}" for f in dataclasses.fields(config.stored)),
    )
    before, now = configs.keys(earlier), configs.keys(config)
    other = {key: (before[key].value, now[key].value) for key in keys if before[key].value != now[key].value}
    if other:
        raise UserError(f"--train.init={source}: momenta of another kind: {_list(other)}; start with fresh ones")
    if run_folder.imported(source, run_folder.available(source)[-1]):
        raise UserError(f"--train.init={source}: holds imported weights without momenta; start with fresh ones")


def init_state(config: Config) -> tuple[steps.State, int]:
    """(the state that a run begins with from train.init, the step it is of): each weight in this config's format.

    The momenta are fresh, or with optim.steps_before those of train.init.
    No more than the source's parameters, this config's, and one weight in f32 exist at once before the optimizer state does.
    """
    if config.optim.steps_before:
        state, step = checkpoint.restore_from(config.train.init, config)
        return state._replace(step=jnp.zeros_like(state.step)), step
    there, params, _, step = checkpoint.load(config.train.init)
    rows = table(config.model)

    def taken(name: str, weight: Any) -> Any:
        form, of = (getattr(c.stored, rows[name].stored) for c in (config, there))
        return weight if form == of else _as_stored(weight, form)

    blocks, own = list(params.pop("blocks")), {}
    for i, layer in enumerate(blocks):
        blocks[i] = {name: taken(name, layer.pop(name)) for name in list(layer)}
    for name in list(params):
        own[name] = taken(name, params.pop(name))
    fresh = jax.jit(lambda: steps.init_state(config)._replace(params=None))()
    return fresh._replace(params={**own, "blocks": tuple(blocks)}), step


@functools.partial(jax.jit, static_argnums=1)
def _as_stored(weight: Any, form: Any) -> Any:
    return encode(decode(weight), form)
