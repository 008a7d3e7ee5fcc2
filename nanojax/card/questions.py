"""The process that tries the card: reads one question per line, computes, writes one answer. It may crash; its parent lives.

Questions are "memory", "plain", and choices of compute joined by +, such as "rows=pallas+fused=on". Each choice is compared
with the same two layers as plain XLA, and kernels also by themselves with the CPU. What fails ends the process, because what
a failed kernel leaves on the device is not to be trusted.
"""

import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanojax import config as configs
from nanojax import config_rules, weights, xla
from nanojax import step as steps
from nanojax.card import memory
from nanojax.cli import first_line
from nanojax.config import Config
from nanojax.model import Params
from nanojax.plan import verify
from nanojax.quant import encode
from nanojax.step.backward import as_operands, forward_backward
from nanojax.step.state import accumulators

NO_GPU = "jax does not find the GPU"
PLAIN = {"rows": "xla", "attention": "chunked", "fused": "off"}
# rms(difference) / rms(value) of the sums of gradients of two layers, and nats of their loss. bf16 attention in place of f32
# makes 0.03 (int8 matmuls, width 64, both families), an attention scale off by 10 % 0.13, a scale of rows off by 10 % 0.7.
# plan/verify.py has the tight bounds, op by op. Sums of a few numbers are left out: theirs cancel, and are off by 0.4.
GRADIENTS, LOSS, FEW = 0.1, 0.02, 1024
ANY_DEVICE = "--device=any"  # of the process, to test it without a GPU
TIMINGS, SECONDS = 7, 0.3  # of one choice


class Answer(NamedTuple):
    """What became of a question. `seconds`: of one microbatch through two layers, forward and backward."""

    question: str
    ok: bool
    why: str = ""
    seconds: float | None = None
    error: float | None = None


class Outcome(NamedTuple):
    """One microbatch through two layers: its loss, its sums of gradients, the seconds it takes."""

    loss: float
    sums: Any
    seconds: float


Run = Callable[[Config], Outcome]
Checks = Callable[[Config, str], Iterable[dict[str, Any]]]


def two_layers(config: Config) -> Config:
    """The config's first two layers at their own width, for one microbatch, with a small vocabulary."""
    m, t = config.model, config.train
    tokens = t.microbatch * config.row
    changes = {"model.depth": 2, "model.width": m.D, "model.vocab": min(m.V, 4096), "model.seq": config.row}
    changes |= {
        "data.kind": "text",
        "train.tokens_per_step": tokens,
        "train.steps": 1,
        "train.init": "",
        "train.extend": 0,
    }
    changes |= {"optim.steps_before": 0, "compute.loss_chunk": math.gcd(config.compute.loss_chunk, tokens)}
    if config.compute.residuals == "auto":
        changes["compute.residuals"] = "cheap"
    return config_rules.resolve(configs.override(config, changes))


def choices(question: str) -> dict[str, str]:
    """{"rows": "pallas"} of "rows=pallas"."""
    return dict(part.split("=", 1) for part in question.split("+"))


def answering(
    config: Config,
    run: Run = lambda config: run_two_layers(config),
    checks: Checks = lambda config, choice: run_checks(config, choice),
    take: memory.Take = memory.take,
) -> Callable[[str], Answer]:
    """Answers questions about the config on this process's device. Never raises: what is raised is the answer."""
    small = two_layers(config)

    @functools.cache
    def plain() -> Outcome:
        return run(_chosen(small, PLAIN))

    def tried(question: str) -> Answer:
        if question == "memory":
            take(memory.planned(config))
            return Answer(question, True)
        if question == "plain":
            finite = jax.numpy.isfinite(plain().loss)
            return Answer(question, bool(finite), "" if finite else "its loss is not finite", plain().seconds)
        chosen = choices(question)
        for check in (c for name in chosen if len(chosen) == 1 for c in checks(config, name)):
            if not check["ok"]:
                why = f"{check['name']}: off by {check['error']:.2g}, at most {check['tolerance']:.2g} allowed"
                return Answer(question, False, why, error=check["error"])
        found = run(_chosen(small, PLAIN | chosen))
        nats, apart = abs(found.loss - plain().loss), apart_by(found.sums, plain().sums)
        if not (nats <= LOSS and apart <= GRADIENTS):
            why = (
                f"two layers' gradients are off by {apart:.2g}, at most {GRADIENTS:g} allowed; their loss by {nats:.2g}"
            )
            return Answer(question, False, why, found.seconds, apart)
        return Answer(question, True, "", found.seconds, apart)

    def answer(question: str) -> Answer:
        try:
            return tried(question)
        except Exception as error:
            return Answer(question, False, f"{type(error).__name__}: {first_line(error)}")

    return answer


def _chosen(config: Config, chosen: dict[str, str]) -> Config:
    return configs.override(config, {f"compute.{key}": value for key, value in chosen.items()})


def run_checks(config: Config, choice: str) -> Iterable[dict[str, Any]]:
    """plan/verify.py's cases of a choice, on this device."""
    for case in verify.of_choice(config, choice):
        yield verify.check(case, jax.devices()[0], jax.devices("cpu")[0])


def run_two_layers(config: Config) -> Outcome:
    """The Outcome of `two_layers(...)`, compiled as training would."""
    key = jax.random.key(0)
    # made once per step, however many microbatches it has: not part of what is timed
    operands = jax.jit(functools.partial(as_operands, config))

    def once(state: steps.State, params: Params, tokens: jax.Array) -> tuple[jax.Array, Any]:
        accum, mix = accumulators(config, state)
        return forward_backward(config, params, accum, tokens, None, mix(jnp.int32(0)), key)

    shape = steps.abstract_batch(config).tokens.shape[1:]
    tokens = jax.random.randint(key, shape, 0, config.model.V, jnp.int32)
    abstract = steps.abstract_state(config)
    lowered = jax.jit(once).lower(abstract, jax.eval_shape(operands, abstract.params), tokens)
    on_gpu = config.compute.fused != "off" and jax.default_backend() == "gpu"
    compiled = lowered.compile(compiler_options=xla.GPU_OPTIONS if on_gpu else None)
    state = jax.jit(steps.init_state, static_argnums=0)(config)
    state = state._replace(params=nowhere_zero(config, state.params))
    params = operands(state.params)
    loss, sums = jax.block_until_ready(compiled(state, params, tokens))
    timings: list[float] = []
    while len(timings) < TIMINGS and sum(timings) < SECONDS:
        begin = time.perf_counter()
        jax.block_until_ready(compiled(state, params, tokens))
        timings.append(time.perf_counter() - begin)
    return Outcome(float(loss) / tokens[:, 1:].size, sums, statistics.median(timings))


def nowhere_zero(config: Config, params: Any) -> Any:
    """`params` with weights that begin at zero drawn instead: with them every gradient of a layer would be zero, and right."""
    table = weights.table(config.model)

    def drawn(layer: dict[str, Any], seed: int) -> dict[str, Any]:
        out = {}
        for i, (name, stored) in enumerate(layer.items()):
            init, shape = table[name].init, table[name].shape
            begins_at_zero = not (init.std or init.uniform or init.values)
            key = jax.random.key(1000 * seed + i)
            draw = lambda key, name=name, shape=shape: encode(
                jax.random.normal(key, shape, jnp.float32) * shape[-1] ** -0.5, config.stored_as(table[name])
            )
            out[name] = jax.jit(draw)(key) if begins_at_zero else stored
        return out

    once = {name: stored for name, stored in params.items() if name != "blocks"}
    blocks = tuple(drawn(layer, i + 1) for i, layer in enumerate(params["blocks"]))
    return {**drawn(once, 0), "blocks": blocks}


@jax.jit
def _squares(got: Any, want: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    floats = lambda tree: [a.astype(jnp.float32) for a in jax.tree.leaves(tree)]
    total = lambda a: jnp.mean(jnp.square(a))
    pairs = list(zip(floats(got), floats(want), strict=True))
    return [total(a - b) for a, b in pairs], [total(b) for _, b in pairs]


def apart_by(got: Any, want: Any) -> float:
    """The largest rms(got - want) / rms(want) over the arrays of two trees, those of less than FEW values left out if there
    are larger ones; inf for NaN and Inf.
    """
    large = [i for i, a in enumerate(jax.tree.leaves(want)) if a.size >= FEW]
    some = lambda tree: [jax.tree.leaves(tree)[i] for i in large] if large else tree
    difference, size = jax.device_get(_squares(some(got), some(want)))
    ratios = [float(d / s) ** 0.5 if s > 0 else (0.0 if d == 0 else 1.0) for d, s in zip(difference, size)]
    return max(ratio if ratio == ratio else float("inf") for ratio in ratios)


def _no_gpu(question: str) -> Answer:
    return Answer(question, False, NO_GPU)


def main() -> None:
    """Reads the config, then questions, from stdin; writes answers to what was stdout, which libraries no longer see."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    config = config_rules.from_dict(json.loads(sys.stdin.readline()))
    xla.configure()
    answer = answering(config) if jax.default_backend() == "gpu" or ANY_DEVICE in sys.argv else _no_gpu
    for line in sys.stdin:
        found = answer(line.strip())
        print(json.dumps(found._asdict()), file=out, flush=True)
        if not found.ok:
            break


if __name__ == "__main__":
    main()
