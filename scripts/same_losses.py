"""Losses of 20 steps of four small configs, bit by bit: proof that a change did not change results.

  python scripts/same_losses.py --out before.json          on the commit before
  python scripts/same_losses.py --compare before.json      on the commit after, same machine and same jax

demo in f32; the formats of d32_4070 (int8), d32_4070_b2p67 (below 8 bits) and d32_4070_laptop (gradients summed into the
momentum), all four at demo's size on made-up tokens. About three minutes on two cores. Exits with 1 at a difference.
"""

import nanojax  # noqa: F401, I001  before jax, so that a CUDA plugin without a driver stays quiet

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nanojax import config as configs
from nanojax import config_files
from nanojax import step, xla
from nanojax.cli import Parser, UserError, run_main

STEPS = 20
SIZE = [
    *("--model.depth=4", "--model.head_dim=64", "--model.vocab=4096", "--model.seq=256", "--compute.loss_chunk=1024"),
    *("--train.tokens_per_step=4096", "--train.steps=160", "--train.microbatch=4"),
]
ARMS = {
    "demo": config_files.load("demo"),
    "int8": config_files.load("d32_4070", SIZE),
    "b2.67": config_files.load("d32_4070_b2p67", SIZE),
    "momentum": config_files.load("d32_4070_laptop", SIZE),
}


def batch(config: configs.Config, rng: np.random.Generator) -> step.Batch:
    """Tokens with something to learn: Zipf's law, and every second one follows from the one before."""
    tokens = (rng.zipf(1.3, config.batch_shape) % config.model.V).astype(np.int32)
    tokens[..., 1::2] = (tokens[..., 0:-1:2] * 7 + 3) % config.model.V
    return step.Batch(jnp.asarray(tokens))


def losses(config: configs.Config) -> list[str]:
    """The loss of each step as a hexadecimal float."""
    state = jax.jit(step.init_state, static_argnums=0)(config)
    train_step = jax.jit(functools.partial(step.train_step, config), donate_argnums=0)
    rng, found = np.random.default_rng(1), []
    for _ in range(STEPS):
        state, metrics = train_step(state, batch(config, rng))
        found.append(float(metrics["loss"]).hex())
    return found


def main() -> None:
    """The command."""
    parser = Parser(
        prog="python scripts/same_losses.py",
        description="Losses of 20 steps of four small configs, compared bit by bit.",
        examples="  python scripts/same_losses.py --out before.json\n  python scripts/same_losses.py --compare before.json",
    )
    parser.add_argument("--out", type=Path, help="write the losses to this file")
    parser.add_argument("--compare", type=Path, help="compare with the losses in this file")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="which (all)")
    a = parser.parse_args()
    try:
        before = json.loads(a.compare.read_text()) if a.compare else {}
    except (OSError, ValueError) as error:
        raise UserError(f"--compare={a.compare}: cannot be read ({error})") from None
    xla.configure()
    found, different = {}, False
    for arm in a.arms:
        found[arm] = losses(ARMS[arm])
        print(
            f"{arm}: {float.fromhex(found[arm][0]):.6f} to {float.fromhex(found[arm][-1]):.6f} nats per token",
            flush=True,
        )
        for i, (new, old) in enumerate(zip(found[arm], before.get(arm, []))):
            if new != old:
                gap = float.fromhex(new) - float.fromhex(old)
                print(f"{arm}: differs from step {i} on, by {gap:.2e} nats", flush=True)
                different = True
                break
        else:
            if arm in before:
                print(f"{arm}: identical in all {STEPS} steps", flush=True)
    if a.out:
        a.out.write_text(json.dumps(found, indent=1) + "\n")
    if missing := [arm for arm in a.arms if a.compare and arm not in before]:
        raise UserError(f"--compare={a.compare}: has no losses of {', '.join(missing)}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    run_main(main)
