"""Times a whole step and forward-backward on the CPU beside nanochat's own torch code, compiled, in alternating turns.

  git clone https://github.com/karpathy/nanochat ../nanochat && git -C ../nanochat checkout 9a71d13
  python3 -m venv torch && torch/bin/pip install torch filelock --index-url https://download.pytorch.org/whl/cpu \\
      --extra-index-url https://pypi.org/simple
  python scripts/beside_torch.py --nanochat=../nanochat --python=torch/bin/python

Both train the same model in f32, Newton-Schulz included (nanochat's is bf16, which some CPUs only emulate), on the same random
tokens with one microbatch per step. A library runs while the other waits, for `--steps` steps at a time; the result is each
one's median turn and the median of the turns' ratios.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

PARTS = ("step", "forward-backward")
Turn = Callable[[], None]  # one repetition of a part, finished when it returns


def ours(a: argparse.Namespace) -> dict[str, Turn]:
    """Our step and its forward-backward."""
    os.environ["JAX_PLATFORMS"] = "cpu"

    import nanojax  # noqa: F401, I001  before jax, so that a CUDA plugin without a driver stays quiet
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nanojax import config_rules
    from nanojax import step as steps
    from nanojax import xla
    from nanojax.config import Compute, Config, Model, Train
    from nanojax.step.state import accumulators

    xla.configure()
    model = Model(depth=a.depth, vocab=a.vocab, seq=a.seq, head_dim=128)
    train = Train(steps=1000, tokens_per_step=a.rows * a.seq, microbatch=a.rows)
    config = config_rules.resolve(Config(name="beside_torch", model=model, compute=Compute(), train=train))
    state = jax.jit(steps.init_state, static_argnums=0)(config)
    tokens = np.random.default_rng(0).integers(0, a.vocab, (1, a.rows, a.seq + 1), dtype=np.int32)
    batch = steps.Batch(jnp.asarray(tokens))
    step = jax.jit(functools.partial(steps.train_step, config), donate_argnums=0)

    @jax.jit
    def gradients(params: Any) -> Any:
        accum, mix = accumulators(config, state._replace(params=params))
        return steps.forward_backward(
            config, params, accum, batch.tokens[0], None, mix(jnp.int32(0)), jax.random.key(0)
        )

    def whole() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    return {"step": whole, "forward-backward": lambda: jax.block_until_ready(gradients(state.params)) and None}


def theirs(a: argparse.Namespace) -> dict[str, Turn]:
    """nanochat's, as its base_train.py calls it."""
    sys.path.insert(0, a.nanochat)
    import torch  # pyright: ignore[reportMissingImports]
    from nanochat import gpt, muon  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    source = Path(muon.__file__).read_text()
    assert source.count("G.bfloat16()") == 1, "nanochat/muon.py is not that of November 2025"
    exec(compile(source.replace("G.bfloat16()", "G.float()"), muon.__file__, "exec"), muon.__dict__)
    gpt.Muon = muon.Muon
    torch.manual_seed(0)
    heads = a.depth * 64 // 128
    model = gpt.GPT(gpt.GPTConfig(a.seq, a.vocab, a.depth, heads, heads, a.depth * 64))
    model.init_weights()
    optimizers = model.setup_optimizers()
    compiled = torch.compile(model, dynamic=False)
    tokens = torch.randint(0, a.vocab, (a.rows, a.seq + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def gradients() -> None:
        compiled(inputs, targets).backward()
        model.zero_grad(set_to_none=True)

    def whole() -> None:
        compiled(inputs, targets).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return {"step": whole, "forward-backward": gradients}


def serve(turns: dict[str, Turn], steps: int) -> None:
    """Runs the part that each line of stdin names, and writes its seconds per step."""
    for turn in turns.values():
        for _ in range(2):  # compiled, and warm
            turn()
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(steps):
            turns[line.strip()]()
        print((time.perf_counter() - begin) / steps, flush=True)


def main() -> None:
    """The command, and the processes that it starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanochat", required=True, help="a checkout of nanochat, at 9a71d13")
    parser.add_argument("--python", required=True, help="the Python that has torch")
    parser.add_argument("--depth", type=int, default=4, help="width 64 times it (4)")
    parser.add_argument("--vocab", type=int, default=4096, help="(4096)")
    parser.add_argument("--seq", type=int, default=512, help="tokens per row (512)")
    parser.add_argument("--rows", type=int, default=8, help="per step (8)")
    parser.add_argument("--steps", type=int, default=3, help="steps per turn (3)")
    parser.add_argument("--turns", type=int, default=7, help="of each library and part (7)")
    parser.add_argument("--worker", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        serve(ours(a) if a.worker == "ours" else theirs(a), a.steps)
        return
    for option, file in (("--nanochat", Path(a.nanochat) / "nanochat" / "muon.py"), ("--python", Path(a.python))):
        if not file.is_file():
            parser.exit(2, f"error: {option}: no {file}; see --help for how to get it\n")
    workers = {}
    for name, python in (("ours", sys.executable), ("theirs", a.python)):
        command = [python, __file__, *sys.argv[1:], f"--worker={name}"]
        workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while (line := workers[name].stdout.readline().strip()) != "ready":
            if not line and workers[name].poll() is not None:
                sys.exit(f"{name}: ended with exit code {workers[name].returncode}")

    def turn(name: str, part: str) -> float:
        workers[name].stdin.write(f"{part}\n")
        workers[name].stdin.flush()
        return float(workers[name].stdout.readline())

    tokens = a.rows * a.seq
    for part in PARTS:
        seconds = [(turn("ours", part), turn("theirs", part)) for _ in range(a.turns)]
        ratios = [b / a for a, b in seconds]
        rates = [round(tokens / statistics.median(column)) for column in zip(*seconds)]
        found = {"part": part, "ours_tokens_per_s": rates[0], "theirs_tokens_per_s": rates[1]}
        found |= {"ratio": round(statistics.median(ratios), 3), "ratios": [round(r, 2) for r in ratios]}
        print(json.dumps(found), flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()


if __name__ == "__main__":
    main()
