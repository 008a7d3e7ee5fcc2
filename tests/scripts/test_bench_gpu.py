"""scripts/bench_gpu.py at tiny sizes on the CPU: the keys of its results, and that a wrong result does not pass."""

import json
import os
import subprocess
import sys

import bench_gpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.cli import UserError
from nanojax.ops import linear
from nanojax.plan import verify

CPU = jax.devices("cpu")[0]


def case(beginning: str) -> verify.Case:
    found = verify.cases({"o": (64, 64)}, 64, True, False)
    return next(c for c in found if c.name.startswith(beginning))


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments])
    bench_gpu.main()


def test_every_op_is_checked():
    """The cases name each op that training runs, in int8 and in bf16 if it has both."""
    names = " ".join(c.name for c in verify.cases({"o": (64, 64)}, 64, True, True))
    for op in ("product forward", "product dX", "product dW", "linear", "norm_linear", "qkv_linear", "relu2_linear"):
        assert f"int8 {op}" in names and f"bf16 {op}" in names
    for op in ("quantize_rows", "dithered", "noise_u16", "cudnn attention", "loss_and_grads"):
        assert op in names


def test_one_wrong_sum_is_found(monkeypatch):
    """An int8 product that is exact passes with an error of 0; one sum off by one among 4,096 fails."""
    product, exact = case("int8 product forward"), linear.matmul_t
    assert verify.check(product, CPU, CPU) | {"name": ""} == {"name": "", "error": 0.0, "tolerance": 0.0, "ok": True}
    monkeypatch.setattr(linear, "matmul_t", lambda a, b: exact(a, b).at[0, 3].add(1))
    assert not verify.check(product, CPU, CPU)["ok"]


@pytest.mark.parametrize("op", ["int8 linear", "bf16 qkv_linear", "chunked attention", "dithered"])
def test_an_op_wrong_on_the_device_is_found(op, monkeypatch):
    """The same op passes, and fails if only the device's values are off by 2%."""
    one, run, calls = case(op), verify.on, []
    assert verify.check(one, CPU, CPU)["ok"]

    def off(*arguments):
        out = run(*arguments)
        calls.append(1)
        return jax.tree.map(lambda a: (a.astype(jnp.float32) * 1.02).astype(a.dtype), out) if len(calls) == 1 else out

    monkeypatch.setattr(verify, "on", off)
    assert not verify.check(one, CPU, CPU)["ok"]


def test_difference_sees_nan_and_shape():
    """NaN, Inf and another shape are infinitely far apart; the worst of several arrays counts."""
    x = np.ones((4, 4), np.float32)
    for wrong in (x * np.nan, x * np.inf, x[:2]):
        assert verify.difference((x, wrong), (x, x)) == float("inf")
    assert verify.difference((x, 1.5 * x), (x, x)) == pytest.approx(0.5)


@pytest.mark.slow
def test_curve_that_leaves_the_cpus_fails(tmp_path, monkeypatch, capsys):
    """Real losses of three f32 steps fall; curves 0.05 nats apart make exit code 1 and are in the JSON."""
    falling = bench_gpu.losses(bench_gpu.small("f32", True), CPU, 3)
    assert falling[2] < falling[0] and falling[0] == pytest.approx(np.log(128), rel=0.01)
    runs = iter([[4.0, 3.0], [4.0, 3.0], [4.0, 3.05], [4.0, 3.0]])
    monkeypatch.setattr(bench_gpu, "losses", lambda *_: next(runs))
    with pytest.raises(SystemExit) as ended:
        main(monkeypatch, "--device=cpu", "--parts=curve", f"--out={tmp_path / 'out.json'}")
    assert ended.value.code == 1
    told = json.loads((tmp_path / "out.json").read_text())
    assert not told["ok"] and not told["parts"]["curve"]["ok"]
    assert [run["ok"] for run in told["parts"]["curve"]["runs"].values()] == [True, False]
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.slow
def test_parts_in_processes_of_their_own(tmp_path):
    """The command from another folder: rates and a step, each in a child; every key that readers need, values above 0."""
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        bench_gpu.__file__,
        "--device=cpu",
        "--parts=rates,step",
        "--config=d32_4070",
        f"--out={out}",
    ]
    command += ["--optim.matrix=adamw", "--stored.adam=f32"]  # compiles faster, as do the next two
    environment = os.environ | {"PYTHONPATH": "", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert told["ok"] and set(told) == {"machine", "command", "parts", "seconds", "ok"}
    assert told["machine"]["versions"]["jax"] == jax.__version__
    step = told["parts"]["step d32_4070"]
    for key in ("compile_seconds", "planned_peak_bytes", "seconds_per_step", "tokens_per_second"):
        assert step[key] > 0
    assert {"used_peak_bytes", "limit_bytes", "depth", "microbatch", "parameters"} <= set(step)
    kinds = {rate["kind"] for rate in told["parts"]["rates"]["rates"]}
    assert kinds == {"bf16", "int8", "memory", "attention"}
    assert all(rate["per_second"] > 0 for rate in told["parts"]["rates"]["rates"])


def test_no_time_left(monkeypatch, capsys):
    """Parts for which no time is left are skipped, say so, and are no failure."""
    main(monkeypatch, "--device=cpu", "--minutes=1e-9")
    assert capsys.readouterr().out.count("skipped, no time left") == 5


def test_mistakes_are_one_line(monkeypatch):
    """No GPU, unknown parts, configs, keys and options, folders that are not there: UserError before anything is measured."""
    monkeypatch.setattr(bench_gpu.hardware, "read_gpu", lambda: None)
    for arguments, words in (
        ([], "no NVIDIA GPU"),
        (["--device=cpu", "--parts=opps"], "choose from ops"),
        (["--device=cpu", "--config=d23_4070"], "no such config"),
        (["--device=cpu", "--model.dept=3"], "did you mean model.depth"),
        (["--device=cpu", "--minutes=0"], "greater than 0"),
        (["--device=cpu", "--out=/nowhere/x.json"], "does not exist"),
        (["--device=tpu"], "invalid choice"),
    ):
        with pytest.raises(UserError, match=words):
            main(monkeypatch, *arguments)


def test_help_has_examples(monkeypatch, capsys):
    """--help shows commands to copy."""
    with pytest.raises(SystemExit) as ended:
        main(monkeypatch, "--help")
    assert ended.value.code == 0 and capsys.readouterr().out.count("python scripts/bench_gpu.py") >= 5
