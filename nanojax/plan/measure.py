"""Measures on this machine's GPU what the roofline model assumes: rates of matmuls, copies, attention, and the step."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nanojax import step, weights, xla
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.hardware import GIB, Card
from nanojax.ops import attention
from nanojax.plan import compile, energy, planner, roofline


@dataclasses.dataclass(frozen=True)
class Rate:
    """A measured rate, in operations or bytes per second."""

    what: str
    kind: str  # the field of roofline.Efficiency that it calibrates
    per_second: float


def seconds_per_call(function: Callable[..., Any], *arguments: jax.Array, at_least: float = 0.2) -> float:
    """Seconds of one call after warming up: the median of 5 timings, which together last `at_least` seconds."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*arguments))  # compiles, autotunes
    begin = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    calls = max(1, int(at_least / 5 / max(time.perf_counter() - begin, 1e-7)))
    timings = []
    for _ in range(5):
        begin = time.perf_counter()
        out = compiled(*arguments)
        for _ in range(calls - 1):
            out = compiled(*arguments)
        jax.block_until_ready(out)
        timings.append((time.perf_counter() - begin) / calls)
    return statistics.median(timings)


def _normal(shape: tuple[int, ...], dtype: Any, seed: int) -> jax.Array:
    x = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    return jnp.round(x * 40).astype(dtype) if dtype == jnp.int8 else x.astype(dtype)


def rates(config: Config, at_least: float = 0.2) -> list[Rate]:
    """The rates of bf16 and int8 matmuls at the model's shapes, of a copy, and of attention forward and backward."""
    m, rows = config.model, config.train.microbatch * config.row
    out = []
    for kind, dtype, total in (("bf16", jnp.bfloat16, jnp.float32), ("int8", jnp.int8, jnp.int32)):
        for name, weight in weights.layer_weights(weights.table(m), 0).items():
            features, inputs = weight.shape
            # forward, and dW, which contracts over the tokens; operands are contiguous along the contraction
            for label, a, b in (
                ("forward", (rows, inputs), (features, inputs)),
                ("dW", (features, rows), (inputs, rows)),
            ):
                product = lambda x, y, total=total: lax.dot_general(
                    x, y, (((1,), (1,)), ((), ())), preferred_element_type=total
                )
                spent = seconds_per_call(product, _normal(a, dtype, 1), _normal(b, dtype, 2), at_least=at_least)
                flops = 2 * a[0] * a[1] * b[0]
                out.append(Rate(f"{kind} matmul {label} of {name} {a[0]}x{a[1]}x{b[0]}", kind, flops / spent))
    words = max(1 << 20, rows * m.D * 4)
    block = jnp.ones((words,), jnp.float32)
    spent = seconds_per_call(lambda x: x + 1, block, at_least=at_least)
    out.append(Rate(f"copy of {words * 4 / 1e6:.0f} MB", "memory", 2 * block.nbytes / spent))
    return out + [_attention(config, window, at_least) for window in sorted(set(weights.windows(m)))]


def _attention(config: Config, window: int, at_least: float) -> Rate:
    """Attention forward and backward at the config's sizes, over `window` positions."""
    m = config.model
    implementation = compile.for_gpu(config).compute.attention if jax.default_backend() == "gpu" else "chunked"
    shape = (config.train.microbatch, m.T, m.N, m.H)
    q, k, v, d = (_normal(shape, jnp.bfloat16, seed) for seed in range(3, 7))

    def both(q: jax.Array, k: jax.Array, v: jax.Array, d: jax.Array) -> Any:
        attended = lambda q, k, v: attention.attention(q, k, v, implementation, window, m.H**-0.5)
        y, vjp = jax.vjp(attended, q, k, v)
        return y, vjp(d)

    spent = seconds_per_call(both, q, k, v, d, at_least=at_least)
    pairs = m.T * window - window * window / 2  # of a query and a key that it sees
    flops = 14 * shape[0] * m.N * pairs * m.H  # 2 + 5 matmuls
    reach = "" if window >= m.T else f", window {window}"
    name = f"attention forward + backward {'x'.join(map(str, shape))} ({implementation}{reach})"
    return Rate(name, "attention", flops / spent)


def calibrate(card: Card, measured: list[Rate]) -> roofline.Efficiency:
    """The card's default Efficiency with the measured shares in it, the median over the shapes of each kind."""
    shares = {}
    for kind in {r.kind for r in measured}:
        peak = card.bandwidth if kind == "memory" else card.peak("bf16" if kind == "attention" else kind)
        shares[kind] = statistics.median(r.per_second for r in measured if r.kind == kind) / peak
    return dataclasses.replace(roofline.efficiency_of(card), **shares)


def seconds_per_step(config: Config, repeats: int = 3) -> float:
    """Seconds of one step with the real state.

    A step is A equal microbatches and one update, so t(A) = t(2) + (A - 2) * (t(4) - t(2)) / 2. Up to A = 4 the whole step
    runs; beyond, only t(2) and t(4) do.
    """
    A, B, T1 = config.batch_shape
    counts = [A] if A <= 4 else [2, 4]
    times = []
    for count in counts:
        train = dataclasses.replace(config.train, tokens_per_step=count * B * (T1 - 1))
        short = dataclasses.replace(config, train=train)
        shapes = step.abstract_batch(short)
        tokens = jax.random.randint(jax.random.key(0), shapes.tokens.shape, 0, config.model.V, jnp.int32)
        batch = step.Batch(tokens, jax.tree.map(lambda w: jnp.ones(w.shape, w.dtype), shapes.weights))
        with xla.no_remat_pass():  # before the state exists: autotuning needs scratch memory
            shapes, fused = (step.abstract_state(short), step.abstract_batch(short)), short.compute.fused != "off"
            run = xla.compiled(functools.partial(step.train_step, short), *shapes, fused=fused)
        state = jax.jit(step.init_state, static_argnums=0)(short)
        state, _ = run(state, batch)
        timings = []
        for _ in range(repeats):
            jax.block_until_ready(state)
            begin = time.perf_counter()
            state, metrics = run(state, batch)
            jax.block_until_ready((state, metrics))
            timings.append(time.perf_counter() - begin)
        times.append(statistics.median(timings))
        del state
    return times[0] if A <= 4 else times[0] + (A - 2) * (times[1] - times[0]) / 2


def plan(
    config: Config, card: Card, *, prices: dict[str, float], watts: float | None, say: planner.Say
) -> tuple[planner.Plan, list[str]]:
    """The Plan with the measured time of the step, and lines that compare each measured rate with the model's.

    UserError if jax does not see a GPU.
    """
    if jax.default_backend() != "gpu":
        raise UserError("--measure: jax does not see this machine's GPU; pip install 'nanojax[cuda12]'")
    modelled = planner.make(config, card, cache=False, watts=watts, prices=prices, say=say)
    if not modelled.fits:
        return modelled, ["not measured: it does not fit"]
    config = modelled.config
    say("measuring matmuls, copies and attention (about a minute)")
    found = rates(config)
    efficiency = calibrate(card, found)
    calibrated = roofline.estimate(modelled.program.hlo, card, efficiency)
    say("measuring the step: compiles it twice and runs each four times")
    spent = seconds_per_step(config)
    n = config.train.tokens_per_step
    bill = energy.bill(config.train.tokens, n / spent, card.watts if watts is None else watts, prices)
    lines = ["measured on this card:"]
    for r in found:
        unit, size = ("GB/s", 1e9) if r.kind == "memory" else ("TOP/s", 1e12)
        peak = card.bandwidth if r.kind == "memory" else card.peak("bf16" if r.kind == "attention" else r.kind)
        assumed = getattr(roofline.efficiency_of(card), r.kind)
        share = r.per_second / peak
        lines.append(
            f"  {r.what:56} {r.per_second / size:8.1f} {unit:5} {share:5.0%} of peak (the model: {assumed:.0%})"
        )
    lines.append(
        f"tokens/s: modelled {modelled.tokens_per_second:,.0f}, with these rates {n / calibrated.seconds:,.0f}, "
        f"measured {n / spent:,.0f}"
    )
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        lines.append(
            f"peak bytes measured {stats['peak_bytes_in_use'] / GIB:.2f} GiB, planned {modelled.memory.peak / GIB:.2f}"
        )
    measured = dataclasses.replace(modelled, estimate=calibrated, tokens_per_second=n / spent, bill=bill, measured=True)
    return measured, lines
