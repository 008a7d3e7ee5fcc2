"""Checks an NVIDIA GPU's results against the CPU, and measures its rates and the step's tokens/s and memory.

  python scripts/bench_gpu.py                                  all parts, d32_4070 and d32_4070_bf16, within 8 minutes
  python scripts/bench_gpu.py --quick                          small shapes, 4 layers, within 3 minutes
  python scripts/bench_gpu.py --config=d12_4070 --out=d12.json
  python scripts/bench_gpu.py --parts=step --config=d32_4070 --depth=8 --train.microbatch=2
  python scripts/bench_gpu.py --device=cpu                     the same parts at tiny sizes: tests this script

Runs from a plain checkout with the packages of nanojax[cuda12]; it needs no network and no data. Each part runs in a process
of its own, so that peak memory is measured per part and a failure ends only that part. A part for which no time is left is
skipped and says so. Exit code 1: a result is wrong or a part failed; the JSON says which.

parts:
  ops    values and gradients of each op on the GPU against the CPU; matmuls against float64 sums
  curve  the losses of 20 steps of a small int8 and a small f32 model, GPU against CPU
  step   per config: seconds per step, tokens/s, memory as compiled and as used
  rates  bf16 and int8 matmuls at the model's shapes, copy, attention
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from nanojax import config_files, config_rules, hardware, weights, xla
from nanojax.card import facts, machine
from nanojax.card.facts import Facts
from nanojax.cli import Parser, UserError, run_main
from nanojax.config import Config
from nanojax.hardware import GIB

PARTS = ("ops", "curve", "step", "rates")  # the most important first: there may not be time for all
DEFAULTS = ("d32_4070", "d32_4070_bf16")
TINY = ["--model.depth=1", "--model.width=64", "--model.head_dim=32", "--model.vocab=128", "--model.seq=32"]
TINY += ["--train.tokens_per_step=64", "--train.microbatch=2", "--compute.loss_chunk=32", "--compute.attention=chunked"]
# Nats, at any step. Another order of sums (CPU, chunks of loss and attention) makes a difference of 6e-4 in int8, 1e-6 in f32.
CURVE = {"int8": 0.01, "f32": 0.003}
Keep = Callable[[dict[str, Any]], None]  # saves a part's results so far, in case the time runs out


class Clock:
    """The time that is left, and progress lines that show it."""

    def __init__(self, minutes: float) -> None:
        self.begin = time.monotonic()
        self.seconds = minutes * 60

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begin:5.0f} s] {text}", flush=True)


# -- the parts ---------------------------------------------------------------------------------------------------------


def ops(a: argparse.Namespace, config: Config, clock: Clock, keep: Keep) -> dict[str, Any]:
    """Part `ops`."""
    import jax

    from nanojax.plan import verify

    place, reference = jax.devices()[0], jax.devices("cpu")[0]
    layer = weights.layer_weights(weights.table(config.model), 0)
    shapes = {name: weight.shape for name, weight in layer.items()}
    M = config.train.microbatch * config.model.T
    if a.quick and not a.tiny:
        shapes, M = {"up": shapes["up"]}, min(M, 2048)
    out: dict[str, Any] = {"ok": True, "cases": [], "skipped": []}
    for case in verify.cases(shapes, M, a.tiny, place.platform == "gpu"):
        if clock.left < 0:
            out["skipped"].append(case.name)
            clock.say(f"skipped, no time left: {case.name}")
            continue
        found = verify.check(case, place, reference)
        out["cases"].append(found)
        out["ok"] &= found["ok"]
        keep(out)
        word = "ok   " if found["ok"] else "WRONG"
        clock.say(f"{word} {case.name}: off by {found['error']:.1e}, at most {case.tolerance:.0e}")
    return out


def small(kind: str, tiny: bool) -> Config:
    """The config of a curve: a small model in d32_4070's formats, or in f32."""
    size = TINY if tiny else ["--model.depth=2", "--model.width=384", "--model.vocab=1024", "--model.seq=256"]
    size = [*size, "--train.tokens_per_step=1024", "--compute.loss_chunk=256"] if not tiny else size
    config = config_files.load("d32_4070", [*size, "--train.microbatch=2", "--train.steps=20"])
    plain = Config(name="f32", model=config.model, train=config.train)
    return config if kind == "int8" else config_rules.resolve(plain)


def losses(config: Config, place: Any, steps: int) -> list[float]:
    """The losses of the first steps on the jax device `place`, in nats per token. State and data do not depend on it."""
    import jax
    import numpy as np

    from nanojax import step

    gpu = place.platform == "gpu"
    flash = gpu and config.compute.dtype == "bf16"
    compute = dataclasses.replace(
        config.compute, attention="cudnn" if flash else "chunked", rows="pallas" if gpu else "xla"
    )
    config = dataclasses.replace(config, compute=compute)
    with jax.default_device(jax.devices("cpu")[0]):
        state = jax.device_get(jax.jit(step.init_state, static_argnums=0)(config))
    # or f32 matmuls would be TF32 on a GPU; bf16 and int8 ones do not change
    with jax.default_device(place), jax.default_matmul_precision("highest"):
        state = jax.device_put(state, place)
        chance = 1 / np.arange(1, config.model.V + 1)

        def batch(i: int) -> step.Batch:
            tokens = np.random.default_rng(i).choice(config.model.V, config.batch_shape, p=chance / chance.sum())
            return step.Batch(jax.device_put(tokens.astype(np.int32), place))

        lowered = jax.jit(functools.partial(step.train_step, config), donate_argnums=0).lower(state, batch(0))
        run = xla.compile_for_gpu(lowered) if place.platform == "gpu" else lowered.compile()
        out = []
        for i in range(steps):
            state, metrics = run(state, batch(i))
            out.append(float(metrics["loss"]))
    return out


def curve(a: argparse.Namespace, _: Config, clock: Clock, keep: Keep) -> dict[str, Any]:
    """Part `curve`."""
    import jax

    steps = 10 if a.quick or a.tiny else 20
    out: dict[str, Any] = {"ok": True, "runs": {}, "skipped": []}
    for kind, tolerance in CURVE.items():
        if clock.left < 0:
            out["skipped"].append(kind)
            clock.say(f"skipped, no time left: curve in {kind}")
            continue
        config = small(kind, a.tiny)
        here, there = (losses(config, place, steps) for place in (jax.devices()[0], jax.devices("cpu")[0]))
        apart = max(abs(x - y) for x, y in zip(here, there, strict=True))
        ok = apart <= tolerance and here[-1] < here[0]
        out["runs"][kind] = {"device": here, "cpu": there, "apart": apart, "tolerance": tolerance, "ok": ok}
        out["ok"] &= ok
        keep(out)
        clock.say(
            f"{'ok   ' if ok else 'WRONG'} {steps} steps in {kind}: loss {here[0]:.4f} to {here[-1]:.4f}, "
            f"at most {apart:.1e} nats from the CPU's, {tolerance:g} allowed"
        )
    return out


def step_part(a: argparse.Namespace, config: Config, clock: Clock, keep: Keep) -> dict[str, Any]:
    """Part `step` of one config. The memory used includes that of XLA's autotuning."""
    import jax

    from nanojax import step
    from nanojax.plan import measure

    m, train = config.model, config.train
    out: dict[str, Any] = {"parameters": m.parameters, "depth": m.depth, "microbatch": train.microbatch, "ok": True}
    clock.say(f"{config.name}: compiling {m.depth} layers, microbatch {train.microbatch}")
    begin = time.monotonic()
    with xla.no_remat_pass():
        shapes, fused = (step.abstract_state(config), step.abstract_batch(config)), config.compute.fused != "off"
        compiled = xla.compiled(functools.partial(step.train_step, config), *shapes, fused=fused)
    out |= {"compile_seconds": time.monotonic() - begin, "planned_peak_bytes": xla.peak_bytes(compiled)}
    out["modelled"] = machine.modelled(config, compiled)[0]
    clock.say(
        f"compiled in {out['compile_seconds']:.0f} s; memory as compiled {out['planned_peak_bytes'] / GIB:.2f} GiB"
    )
    limit = xla.pool_bytes()
    out["limit_bytes"] = limit
    keep(out)
    if limit is not None and out["planned_peak_bytes"] > limit:
        out["skipped"] = f"needs {out['planned_peak_bytes'] / GIB:.2f} GiB, XLA has {limit / GIB:.2f}"
        clock.say(f"skipped: {config.name} {out['skipped']}; --depth=8 measures fewer layers")
        return out
    if clock.left < out["compile_seconds"]:
        out["skipped"] = "no time left to run it; --minutes gives more"
        clock.say(f"skipped: {out['skipped']}")
        return out
    del compiled
    clock.say("timing steps of 2 and of 4 microbatches; compiles the latter first")
    seconds = measure.seconds_per_step(config, repeats=1 if a.tiny else 3)
    out |= {"seconds_per_step": seconds, "tokens_per_step": train.tokens_per_step}
    out["tokens_per_second"] = train.tokens_per_step / seconds
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    out["used_peak_bytes"] = used
    memory = f"; memory used {used / GIB:.2f} GiB" if used else ""
    model = out["modelled"]["tokens_per_s"]
    said = f", modelled {model:,.0f}" if model else ""
    clock.say(f"{config.name}: {out['tokens_per_second']:,.0f} tokens/s{said}, {seconds:.2f} s per step{memory}")
    return out


def rates(a: argparse.Namespace, config: Config, clock: Clock, keep: Keep) -> dict[str, Any]:
    """Part `rates`, by plan/measure.py."""
    from nanojax.plan import measure

    clock.say("matmuls, copy, attention")
    found = measure.rates(config, at_least=0.01 if a.tiny else 0.05 if a.quick else 0.2)
    for r in found:
        unit, size = ("GB/s", 1e9) if r.kind == "memory" else ("TOP/s", 1e12)
        clock.say(f"{r.what}: {r.per_second / size:,.1f} {unit}")
    return {"ok": True, "rates": [dataclasses.asdict(r) for r in found]}


# -- the command -------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """The checked command line. `overrides` holds the --section.key=value arguments."""
    parser = Parser("python scripts/bench_gpu.py", __doc__ or "")
    parser.add_argument(
        "--config", default=",".join(DEFAULTS), help="configs of step; ops and rates have the first's shapes"
    )
    parser.add_argument("--depth", type=int, help="layers, at the config's own width")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--minutes", type=float, help="parts that start later are skipped (8; --quick: 3)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, 4 layers, shorter timings")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="cpu: tiny sizes, to test the script")
    a, a.overrides = parser.parse_known_args()
    a.parts, a.config = a.parts.split(","), a.config.split(",")
    a.tiny = a.device == "cpu"
    a.minutes = a.minutes if a.minutes is not None else 3.0 if a.quick else 8.0
    if not 0 < a.minutes < 1e4:
        raise UserError(f"--minutes={a.minutes:g}: must be greater than 0")
    for part in a.parts:
        if part not in PARTS:
            raise UserError(f"--parts={part}: choose from {', '.join(PARTS)}")
    if a.out and not a.out.absolute().parent.is_dir():
        raise UserError(f"--out={a.out}: its folder does not exist")
    if not a.tiny and hardware.read_gpu() is None:
        raise UserError("no NVIDIA GPU with a driver in this machine; --device=cpu tests the script at tiny sizes")
    return a


def load(a: argparse.Namespace, name: str) -> Config:
    """Config `name` with --depth, --quick, --device=cpu and the overrides applied."""
    config = config_files.load(name)
    depth = a.depth if a.depth is not None else 4 if a.quick else None
    changes = TINY if a.tiny else [f"--model.depth={depth}", f"--model.width={config.model.D}"] if depth else []
    return config_files.load(name, [*changes, *a.overrides])


def here(a: argparse.Namespace, part: str, name: str) -> dict[str, Any]:
    """The part's results, computed in this process."""
    if a.tiny:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if not a.tiny:
        xla.configure()
    import jax

    if not a.tiny and jax.default_backend() != "gpu":
        raise UserError("jax does not see this machine's GPU: pip install 'nanojax[cuda12]', and unset JAX_PLATFORMS")
    if not a.tiny and part in ("ops", "curve") and "cpu" not in os.environ.get("JAX_PLATFORMS", "cpu"):
        raise UserError(f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: hides the CPU to compare with; unset it")
    function = {"ops": ops, "curve": curve, "step": step_part, "rates": rates}[part]

    def keep(results: dict[str, Any]) -> None:
        if a.out:
            a.out.write_text(json.dumps({"parts": {part: results}}))

    return function(a, load(a, name), Clock(a.minutes), keep)


def in_a_child(a: argparse.Namespace, part: str, name: str, clock: Clock) -> dict[str, Any]:
    """The part's results from a process of its own, which is killed when the time is up."""
    with tempfile.TemporaryDirectory(prefix="nanojax-bench-") as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, __file__, f"--parts={part}", f"--config={name}", f"--device={a.device}"]
        command += [f"--minutes={clock.left / 60:.3f}", f"--out={out}", *a.overrides]
        if a.depth is not None:
            command.append(f"--depth={a.depth}")
        if a.quick:
            command.append("--quick")
        child = subprocess.Popen(command)
        try:
            child.wait(timeout=max(1.0, clock.left))
        except subprocess.TimeoutExpired:
            clock.say(f"{part} {name}: stopped, the time is up")
        finally:
            stopped = child.poll() is None
            child.kill()
            child.wait()
        results: dict[str, Any] = {} if stopped else {"ok": False}
        if out.exists():
            results = next(iter(json.loads(out.read_text())["parts"].values()))
    if stopped:
        results.setdefault("ok", True)
        results["skipped"] = "stopped, the time was up; --minutes gives more"
    elif child.returncode != (0 if results["ok"] else 1):  # it did not finish
        results |= {"ok": False, "failed": f"exit code {child.returncode}; its messages are above"}
    return results


def main() -> None:
    a = arguments()
    clock = Clock(a.minutes)
    todo = [(part, name) for part in a.parts for name in (a.config if part == "step" else a.config[:1])]
    # last: the second config's step takes as long as all other parts
    todo.sort(key=lambda t: t[0] == "step" and t[1] != a.config[0])
    for _, name in todo:
        load(a, name)  # reports mistakes before anything is measured
    if a.out:
        a.out.open("a").close()
    seen = Facts() if a.tiny else facts.gather()
    of_run = machine.described(load(a, todo[0][1]), seen)
    out: dict[str, Any] = {"machine": of_run, "command": sys.argv[1:], "parts": {}}
    for part, name in todo:
        key = f"step {name}" if part == "step" else part
        if clock.left <= 0:
            out["parts"][key] = {"skipped": "no time left", "ok": True}
            clock.say(f"{key}: skipped, no time left; --minutes gives more")
        elif len(todo) == 1:
            out["parts"][key] = here(a, part, name)
        else:
            clock.say(f"{key}: begins, {clock.left / 60:.1f} minutes left")
            out["parts"][key] = in_a_child(a, part, name, clock)
    out |= {"seconds": time.monotonic() - clock.begin, "ok": all(p["ok"] for p in out["parts"].values())}
    if a.out:
        a.out.write_text(json.dumps(out, indent=1) + "\n")
    if len(todo) > 1:
        wrong = [key for key, p in out["parts"].items() if not p["ok"]]
        clock.say(f"done; wrong or failed: {', '.join(wrong)}" if wrong else "done; all results right")
    if not out["ok"]:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
