"""Measures what storage formats, int8 compute and recipes do to the loss: a small model trained by many arms; a table, a figure.

  python -m nanojax.data prepare --input train.jsonl.xz valid.jsonl.xz --valid last --vocab 2048 --out data/quality
  python scripts/quality.py run main --data data/quality --out runs/quality
  python scripts/quality.py run rates knobs ladder ladder-rates summed larger --data data/quality --out runs/quality
  python scripts/quality.py run recipe-rates recipes recipe-parts recipe-int8 --data data/quality --out runs/recipes
  python scripts/quality.py report --out runs/quality

Arms with one seed share initialisation and data order. Each run is one JSONL file. Finished runs are skipped, so the same
command continues where it was stopped. `report` writes table.md and, with matplotlib (pip install nanojax[figures]),
loss.png; it needs only some finished runs. Codes, scales and rounding are those of training on a GPU; only float sums differ.
"""

import nanojax  # noqa: F401, I001  before jax, so that a CUDA plugin without a driver stays quiet

import argparse
import dataclasses
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojax import config_rules
from nanojax import config as configs
from nanojax import config_files
from nanojax import model, step
from nanojax.cli import Bar, Parser, UserError, run_main
from nanojax.config import Compute, Config, Data, Model, Train
from nanojax.data import loader
from nanojax.hardware import GIB
from nanojax.recipe import OPTIM, nanochat_2026
from nanojax.tokenizer import Tokenizer

VALID_TOKENS = 131072  # at this size paired differences of two arms vary by about 0.001 nats
CURVE = 10  # steps whose mean training loss is one point
EVALUATIONS = 4  # per run; all but the last use a quarter of the validation tokens

RATES = 8.0  # of the recipe of 2026 at 4,096 tokens per step; the plan recipe-rates found it

SIZES = {"d2": Model(depth=2, width=128), "d3": Model(depth=3, width=192), "d6": Model(depth=6, width=256)}

INT8 = {"compute.dtype": "bf16", "compute.forward": "int8", "compute.dx": "int8", "compute.dw": "int8"}
BF16_EDGES = {"stored.embed": "bf16", "stored.head": "bf16"}


def shipped(name: str) -> dict[str, Any]:
    """The keys of config `name` that say how parameters and state are stored, computed and updated, at any model size."""
    given, usual = (configs.keys(c) for c in (config_files.load_unresolved(name), Config()))
    sections = ("stored.", "accumulate.", "optim.", "compute.")
    sized = ("compute.residuals", "compute.loss_chunk")
    found = {key: value for key, (_, value, _) in given.items() if key.startswith(sections) and key not in sized}
    return {key: value for key, value in found.items() if value != usual[key][1]}


def recipe() -> dict[str, Any]:
    """The keys that make a config of nanochat's recipe of July 2026 out of the usual one, at any size and length.

    The scaling law's rates are meant for steps of 2^18 tokens and more. At 4,096 they are far too small: hence RATES.
    """
    usual, newest = configs.keys(Config()), configs.keys(nanochat_2026(12, 12))
    changed = {key: value for key, (_, value, _) in newest.items() if value != usual[key][1]}
    kept = {key: value for key, value in changed.items() if key.startswith("optim.")}
    # a window of a quarter of the rows of 256, as in the recipe; its rule, in whole 128s, would give half
    return (
        kept
        | {f"optim.{key}": RATES * getattr(OPTIM, key) for key in ("matrix_lr", "embed_lr", "head_lr")}
        | {key: changed[key] for key in ("model.family", "model.rope_base", "model.qk_scale")}
        | {"model.window": 64}
    )


NEWEST = recipe()
TABLES = {"stored.value": "int8", "stored.adam": "int8", "accumulate.embed_head": "bf16"}

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "2026": ("f32, nanochat's recipe of July 2026", NEWEST),
    "2026-value": ("without value embeddings", NEWEST | {"model.without": "value"}),
    "2026-window": ("without windows", NEWEST | {"model.window": 1 << 16}),
    "2026-x0": ("without the mix with the first stream", NEWEST | {"model.without": "x0"}),
    "2026-smear": ("without smear", NEWEST | {"model.without": "smear"}),
    "2026-backout": ("without backout", NEWEST | {"model.without": "backout"}),
    "2026-normuon": ("with plain Muon", NEWEST | {"optim.muon": "plain"}),
    "2026-decay": ("without Muon's weight decay", NEWEST | {"optim.matrix_decay": 0.0}),
    "2026-tables": ("int8 value embeddings, all moments and sums of tables in 8 and 16 bits", NEWEST | TABLES),
    "2026-int8": (
        "d28_2026_4070: int8 compute, parameters, state; bf16 accumulators",
        shipped("d28_2026_4070") | NEWEST,
    ),
    "f32": ("f32 throughout", {}),
    "int8-bf16": ("int8 compute, bf16 stored", INT8 | BF16_EDGES | {"stored.blocks": "bf16"}),
    "int8-int8": ("int8 compute, int8 stored", INT8 | BF16_EDGES | {"stored.blocks": "int8"}),
    "d32_4070": ("d32_4070: int8 compute, parameters, state; bf16 accumulators", shipped("d32_4070")),
    "int4": (
        "the same with int4, remainders of 2 bits",
        shipped("d32_4070") | {"stored.blocks": "int4", "stored.remainder": 2},
    ),
    "nf4": ("d32_4070_nf4: the same with NF4, remainders of 2 bits", shipped("d32_4070_nf4")),
    "int3": ("the same with int3, remainders of 4 bits", shipped("d32_4070") | {"stored.blocks": "int3"}),
    "b2.67": ("d32_4070_b2p67: the same with b2.67, remainders of 4 bits", shipped("d32_4070_b2p67")),
    "laptop": (
        "d32_4070_laptop: int8, gradients of 16 microbatches summed into a bf16 heavy-ball momentum",
        shipped("d32_4070_laptop") | {"train.microbatch": 1},
    ),
    "largest": (
        "largest_4070: the same with b2.67, remainders of 2 bits",
        shipped("largest_4070") | {"train.microbatch": 1},
    ),
    "adamw": ("f32, AdamW for all", {"optim.matrix": "adamw", "optim.matrix_lr": 0.0015}),
    "int3-adamw8": (
        "d32_4070_int3_adamw8: int3, remainders of 2 bits, int8 embedding, 8-bit AdamW for all",
        shipped("d32_4070_int3_adamw8"),
    ),
    "momentum16": ("f32, bf16 momentum", {"stored.momentum": "bf16"}),
    "momentum8": ("f32, int8 momentum", {"stored.momentum": "int8"}),
    "momentum4": ("f32, NF4 momentum", {"stored.momentum": "nf4"}),
    "adam8": ("f32, int8 AdamW moments", {"stored.adam": "int8"}),
    "accum16": (
        "f32, gradients of 16 microbatches summed in bf16",
        {"accumulate.blocks": "bf16", "accumulate.embed_head": "bf16", "train.microbatch": 1},
    ),
    "heavy-ball": ("f32, heavy-ball momentum", {"optim.nesterov": False}),
    "folded": (
        "f32, gradients of 16 microbatches summed into a bf16 heavy-ball momentum",
        {"accumulate.blocks": "momentum", "optim.nesterov": False, "optim.clip": 0}
        | {"stored.momentum": "bf16", "train.microbatch": 1},
    ),
}

SEEDS = (0, 1, 2)
LADDER = ("d32_4070", "int4", "nf4", "int3", "b2.67", "int3-adamw8")  # with these, d32's state fits 12 GB
SHOWN = ("f32", "int8-bf16", "int8-int8", *LADDER)  # in the figure; the table has every arm
KNOBS = ("momentum16", "momentum8", "momentum4", "adam8", "accum16", "heavy-ball", "folded", "adamw")
PARTS = tuple(f"2026-{part}" for part in ("value", "window", "x0", "smear", "backout", "normuon", "decay"))
Run = tuple[str, str, float, int]  # size, arm, learning-rate factor, seed
PLANS: dict[str, list[Run]] = {
    "main": [("d3", arm, 1.0, seed) for seed in SEEDS for arm in ("f32", "int8-bf16", "int8-int8")],
    "rates": [("d3", arm, rate, 0) for rate in (0.5, 2.0) for arm in ("f32", "int8-bf16", "int8-int8")],
    "knobs": [("d3", arm, 1.0, 0) for arm in KNOBS],
    "ladder": [("d3", arm, 1.0, seed) for seed in SEEDS for arm in LADDER],
    "ladder-rates": [("d3", arm, rate, 0) for rate in (0.5, 2.0) for arm in LADDER],
    "summed": [("d3", arm, 1.0, 0) for arm in ("laptop", "largest")],
    "recipe-rates": [("d2", arm, rate, 0) for arm in ("f32", "2026") for rate in (0.5, 1.0, 2.0)],
    "recipes": [(size, arm, 1.0, seed) for size in ("d2", "d3") for seed in SEEDS for arm in ("f32", "2026")],
    "recipe-parts": [("d3", arm, 1.0, seed) for seed in SEEDS for arm in PARTS],
    "recipe-int8": [("d3", arm, 1.0, seed) for seed in SEEDS for arm in ("2026-tables", "2026-int8")],
    "larger": [("d6", arm, 1.0, 0) for arm in ("f32", "int8-bf16", "int8-int8", *LADDER)],
}


def make_config(run: Run, data: str, steps: int, tokens_per_step: int, seq: int, vocab: int) -> Config:
    """The resolved config of one run. A recipe's steps are as many as have the FLOPs of the usual model's `steps`."""
    size, arm, rate, seed = run
    base = Config(
        name=f"{size}-{arm}",
        model=dataclasses.replace(SIZES[size], head_dim=64, vocab=vocab, seq=seq),
        compute=Compute(residuals="all", loss_chunk=min(2048, tokens_per_step)),
        data=Data(path=data),
        train=Train(steps=steps, tokens_per_step=tokens_per_step, microbatch=min(8, tokens_per_step // seq), seed=seed),
    )
    changes = dict(ARMS[arm][1])
    if "train.microbatch" in changes:
        changes["compute.loss_chunk"] = str(min(2048, int(changes["train.microbatch"]) * seq))
    config = configs.override(base, changes)
    rates = {f"optim.{key}": rate * getattr(config.optim, key) for key in ("matrix_lr", "embed_lr", "head_lr")}
    config = config_rules.resolve(configs.override(config, rates))
    equal = round(steps * config_rules.resolve(base).model.flops_per_token / config.model.flops_per_token)
    return config_rules.resolve(configs.override(config, {"train.steps": equal, "train.tokens": 0}))


def file_of(out: Path, run: Run) -> Path:
    size, arm, rate, seed = run
    return out / f"{size}_{arm}_x{rate:g}_seed{seed}.jsonl"


def valid_rows(config: Config) -> list[np.ndarray]:
    """The validation batches of a run, [8, T+1]; at most VALID_TOKENS tokens."""
    limit = max(1, VALID_TOKENS // (8 * config.model.T))
    return list(islice(loader.valid_batches(config.data.path, 8, config.model.T), limit))


def train(config: Config, run: Run, path: Path) -> None:
    """Trains one arm. Its file has a head line, {step, loss} and {step, valid} lines, and a last line with done=true."""
    A, B, _ = config.batch_shape
    batches = loader.train_iterator(config.data.path, A * B, config.model.T, config.train.seed, config.model.V)
    rows = valid_rows(config)
    begin = time.monotonic()
    state = jax.jit(step.init_state, static_argnums=0)(config)
    train_step = jax.jit(functools.partial(step.train_step, config), donate_argnums=0)
    whole = configs.override(config, {"compute.loss_chunk": min(2048, 8 * config.model.T)})
    losses: Any = jax.jit(lambda params, tokens: jnp.mean(model.token_losses(whole, params, tokens)))

    def valid(count: int) -> float:
        return statistics.fmean(float(losses(state.params, jnp.asarray(r))) for r in rows[:count])

    head = {"run": run, "config": configs.to_dict(config), "commit": commit(), "jax": jax.__version__}
    part = path.with_suffix(".part")
    with open(part, "w") as file, Bar(path.stem, config.train.tokens, "tokens") as bar:

        def write(**line: Any) -> None:
            print(json.dumps(line), file=file, flush=True)

        write(**head)
        recent: list[jax.Array] = []
        for i in range(1, config.train.steps + 1):
            state, metrics = train_step(state, step.Batch(jnp.asarray(next(batches).reshape(config.batch_shape))))
            recent.append(metrics["loss"])
            if i % CURVE == 0 or i == config.train.steps:
                mean = statistics.fmean(float(x) for x in recent)
                recent = []
                if not math.isfinite(mean):
                    write(step=i, loss=None)
                    raise UserError(f"{path.stem}: the loss became {mean} by step {i}; see {part}")
                write(step=i, loss=mean)
                bar.reach(i * config.train.tokens_per_step, f"loss {mean:.3f}")
            if i % max(1, config.train.steps // EVALUATIONS) == 0 and i < config.train.steps:
                write(step=i, valid=valid(math.ceil(len(rows) / 4)))
        write(step=config.train.steps, valid=valid(len(rows)), seconds=round(time.monotonic() - begin), done=True)
    part.rename(path)


def commit() -> str:
    """The commit of the running code, with `+` if files differ from it; empty outside a checkout."""
    git = ["git", "-C", str(Path(step.__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.strip() + ("+" if dirty else "")


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run: training and validation points (step, nats), the last tenth's training loss, seconds."""

    run: Run
    config: Config
    curve: list[tuple[int, float]]
    valid: list[tuple[int, float]]
    seconds: float
    commit: str

    @property
    def train_end(self) -> float:
        """Mean training loss of the last tenth of the steps, nats."""
        return statistics.fmean(y for x, y in self.curve if x > 0.9 * self.curve[-1][0])

    @property
    def falls(self) -> bool:
        """Whether the mean training loss of each fifth of the run is below that of the previous fifth."""
        n = max(1, len(self.curve) // 5)
        means = [statistics.fmean(y for _, y in self.curve[i : i + n]) for i in range(0, n * (len(self.curve) // n), n)]
        return all(b < a for a, b in pairwise(means))


def read(path: Path) -> Result:
    """A finished run's file. UserError if it is not one."""
    try:
        head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
        config = config_rules.from_dict(head["config"], str(path))
        curve = [(x["step"], x["loss"]) for x in lines if "loss" in x]
        valid = [(x["step"], x["valid"]) for x in lines if "valid" in x]
        size, arm, rate, seed = head["run"]
        return Result((size, arm, float(rate), seed), config, curve, valid, lines[-1]["seconds"], head["commit"])
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: not a finished run of this script ({error!r}); delete it and run again") from None


def reference(arm: str) -> str:
    """The arm with which `arm` is compared."""
    return "2026" if arm.startswith("2026-") else "f32"


def rows_of(results: Iterable[Result]) -> list[list[str]]:
    """Table rows per size, arm and rate: mean over seeds of the loss and of its difference to the reference at the same seed.

    The reference of an arm of the recipe of 2026 is that recipe in f32, of all others f32.
    """
    found = {r.run: r for r in results}
    arms = list(ARMS)
    groups = sorted({run[:3] for run in found}, key=lambda g: (g[0], g[2] != 1, g[2], arms.index(g[1])))
    out = []
    for size, arm, rate in groups:
        runs = [r for run, r in sorted(found.items()) if run[:3] == (size, arm, rate)]
        base = [(size, reference(arm), rate, r.run[3]) for r in runs]
        pairs = [(r, found[b]) for r, b in zip(runs, base) if b in found]
        gaps = ["", ""]
        if pairs and arm != "f32":
            gaps = [
                _spread([a.valid[-1][1] - b.valid[-1][1] for a, b in pairs], "+"),
                _spread([a.train_end - b.train_end for a, b in pairs], "+"),
            ]
        ends, seconds = [r.valid[-1][1] for r in runs], statistics.fmean(r.seconds for r in runs)
        falls = "yes" if all(r.falls for r in runs) else "no"
        out.append(
            [size, arm, ARMS[arm][0], f"{rate:g}", str(len(runs)), _spread(ends), *gaps, falls, f"{seconds:.0f}"]
        )
    return out


def unigram(c: Config) -> float:
    """Validation nats per token of a unigram model of the run's training text, with add-one smoothing."""
    A, B, _ = c.batch_shape
    batches = loader.train_iterator(c.data.path, A * B, c.model.T, c.train.seed, c.model.V)
    counts = np.ones(c.model.V)
    for batch in islice(batches, c.train.steps):
        counts += np.bincount(batch.reshape(-1, c.model.T + 1)[:, 1:].ravel(), minlength=c.model.V)
    nats = -np.log(counts / counts.sum())
    return float(np.mean([nats[rows[:, 1:]].mean() for rows in valid_rows(c)]))


def bits_per_byte(c: Config) -> float:
    """Bits per byte that one nat per token amounts to on the validation text. A special token has no bytes."""
    sizes = Tokenizer.load(Path(c.data.path) / "tokenizer").bytes_per_token()
    return 1 / float(np.mean([sizes[rows[:, 1:]].mean() for rows in valid_rows(c)])) / math.log(2)


def _spread(values: list[float], sign: str = "") -> str:
    text = f"{statistics.fmean(values):{sign}.4f}"
    return f"{text} ± {statistics.stdev(values):.4f}" if len(values) > 1 else text


def report(out: Path) -> None:
    """Writes table.md and loss.png of the finished runs in `out`."""
    results = [read(p) for p in sorted(out.glob("*.jsonl"))]
    results = [r for r in results if r.run[1] in ARMS]
    if not results:
        raise UserError(f"{out}: no finished runs; python scripts/quality.py run main --data DIR --out {out}")
    heads = ["size", "arm", "what", "rate", "seeds", "validation nats", "Δ to reference", "Δ training", "falls", "s"]
    lines = [" | ".join(row) for row in (heads, ["---"] * len(heads), *rows_of(results))]
    c = results[0].config
    facts = (
        f"T {c.model.T}, vocabulary {c.model.V}, {c.train.tokens_per_step} tokens per step, {c.train.tokens:,} tokens"
    )
    facts += f"; commits {', '.join(sorted({r.commit for r in results}))}"
    if Path(c.data.path).is_dir():
        facts += f"; unigrams of the training text give {unigram(c):.2f} validation nats"
        facts += f"; one nat per token is {bits_per_byte(c):.4f} bits per byte"
    text = "".join(f"| {line} |\n" for line in lines)
    about = "± is the standard deviation over seeds, of paired differences for Δ."
    (out / "table.md").write_text(f"{facts}\n{about}\n\n{text}")
    print((out / "table.md").read_text())
    figure(out / "loss.png", results)


def d32_state(arm: str) -> float:
    """GiB of d32's state, accumulators included, in this arm's formats, with everything else as in d32_4070."""
    changes = {k: v for k, v in ARMS[arm][1].items() if k.startswith(("stored.", "optim.", "accumulate."))}
    config = config_rules.resolve(configs.override(config_files.load_unresolved("d32_4070"), changes))
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(step.abstract_state(config))) / GIB


def figure(path: Path, results: list[Result]) -> None:
    """Draws the arms SHOWN at the smallest size and rate 1.

    Training loss by tokens; validation difference to f32 by tokens, and by the memory that d32's state would take.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no figure: matplotlib is missing (pip install nanojax[figures])", file=sys.stderr)
        return
    size = min(r.run[0] for r in results)
    found = {r.run: r for r in results if r.run[0] == size and r.run[2] == 1}
    colors = pyplot.colormaps["tab10"]
    fig, (left, right, memory) = pyplot.subplots(1, 3, figsize=(16, 4.4), layout="constrained")
    for color, arm in enumerate(SHOWN):
        runs = [r for run, r in found.items() if run[1] == arm]
        if not runs:
            continue
        style: Any = {"color": colors(color), "lw": 1}
        million = lambda points, r=runs[0]: [x * r.config.train.tokens_per_step / 1e6 for x, _ in points]
        curve = [statistics.fmean(y) for y in zip(*[[y for _, y in r.curve] for r in runs])]
        left.plot(million(runs[0].curve), curve, label=arm, **style)
        pairs = [(r, found[(size, "f32", 1.0, r.run[3])]) for r in runs if (size, "f32", 1.0, r.run[3]) in found]
        if not pairs or arm == "f32":
            continue
        gaps = [[a - b for (_, a), (_, b) in zip(r.valid, f.valid)] for r, f in pairs]
        right.plot(million(runs[0].valid), [statistics.fmean(g) for g in zip(*gaps)], marker="o", ms=3, **style)
        if arm in LADDER:
            ends = [g[-1] for g in gaps]
            bar = statistics.stdev(ends) if len(ends) > 1 else 0
            memory.errorbar(d32_state(arm), statistics.fmean(ends), bar, fmt="o", capsize=3, **style)
            memory.annotate(f"  {arm}", (d32_state(arm), statistics.fmean(ends)), fontsize=8)
    seeds = max(sum(run[1] == arm for run in found) for arm in {run[1] for run in found})
    left.set(title=f"{size}, mean of seeds", xlabel="million tokens", ylabel="training loss, nats")
    right.set(title="against f32, same seeds", xlabel="million tokens", ylabel="Δ validation loss, nats")
    memory.set(
        title=f"against memory: mean ± deviation of {seeds} seeds",
        xlabel="GiB of d32's state in these formats",
        ylabel="Δ validation loss at the end, nats",
    )
    for axes in (right, memory):
        axes.axhline(0, color="black", lw=0.7)
    memory.margins(x=0.2)
    left.legend(fontsize=8)
    fig.savefig(path, dpi=130)
    print(f"figure: {path}")


def parse() -> argparse.Namespace:
    parser = Parser("python scripts/quality.py", __doc__ or "")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is not finished yet")
    run.add_argument("plans", nargs="+", choices=list(PLANS), metavar="PLAN", help=", ".join(PLANS))
    run.add_argument("--data", required=True, help="folder of `python -m nanojax.data prepare`")
    run.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help=f"only these of {', '.join(ARMS)}")
    run.add_argument("--seeds", nargs="+", type=int, help="only these")
    run.add_argument("--steps", type=int, default=300)
    run.add_argument("--tokens-per-step", type=int, default=4096)
    run.add_argument("--seq", type=int, default=256)
    run.add_argument("--vocab", type=int, default=2048, help="at least the tokenizer's")
    tell = commands.add_parser("report", help="table and figure of what is finished")
    for command in (run, tell):
        command.add_argument("--out", required=True, type=Path, help="folder of the runs")
    return parser.parse_args()


def main() -> None:
    """The command."""
    args = parse()
    if args.command == "report":
        return report(args.out)
    runs = [r for plan in args.plans for r in PLANS[plan]]
    runs = [r for r in runs if (not args.arms or r[1] in args.arms) and (not args.seeds or r[3] in args.seeds)]
    made = {r: make_config(r, args.data, args.steps, args.tokens_per_step, args.seq, args.vocab) for r in runs}
    args.out.mkdir(parents=True, exist_ok=True)
    for i, (run, config) in enumerate(made.items()):
        path = file_of(args.out, run)
        if path.exists():
            print(f"[{i + 1}/{len(made)}] {path.stem}: finished before")
            continue
        print(f"[{i + 1}/{len(made)}] {path.stem}: {ARMS[run[1]][0]}", flush=True)
        train(config, run, path)
        result = read(path)
        print(f"{path.stem}: valid {result.valid[-1][1]:.4f}, train {result.train_end:.4f}", flush=True)


if __name__ == "__main__":
    run_main(main)
