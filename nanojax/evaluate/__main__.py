"""Evaluates a trained or imported model: bits per byte, CORE, sample texts.        python -m nanojax.evaluate"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX import SummaryWriter

from nanojax import interop, sample, xla
from nanojax.cli import UserError, run_main
from nanojax.config import Config
from nanojax.data import loader
from nanojax.evaluate import bpb, core, likelihood
from nanojax.run import checkpoint
from nanojax.tokenizer import Tokenizer

KINDS = ("bpb", "core", "sample")
PROMPTS = (  # greedy continuations of these tell within a second what a model has learnt
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)
EXAMPLES = """examples:
  python -m nanojax.evaluate --run=runs/demo                                    validation bits per byte, samples
  python -m nanojax.evaluate --run=runs/d32 --eval=core --bundle=eval_bundle    CORE; the same command resumes it
  python -m nanojax.evaluate --run=runs/d32 --eval=core --bundle=eval_bundle --max-per-task=500
  python -m nanojax.evaluate --run=runs/demo --eval=bpb --text=book.txt --text='more/*.jsonl.zst' --by=source
  python -m nanojax.evaluate --hf=nanochat-d32 --eval=core,sample --bundle=eval_bundle --out=runs/nanochat-d32
Results go to <run>/evals and to TensorBoard. --hf takes a folder with config.json and *.safetensors (transformers'
NanoChat) or with model_NNNNNN.pt and meta_NNNNNN.json (nanochat); neither torch nor transformers is needed.
"""


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that is evaluated. `out` is where results go; `step` its training step."""

    config: Config
    params: Any
    tokenizer: Tokenizer
    name: str
    step: int
    out: Path


def model_identity(subject: Subject) -> dict[str, Any]:
    """What an outcome depends on: the parameters' bits (a sum per leaf), how they compute, the tokenizer."""

    @jax.jit
    def sums(tree: Any) -> list[jax.Array]:
        bits = [jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}") for a in jax.tree.leaves(tree)]
        return [jnp.sum(b.astype(jnp.uint32) * jnp.uint32(2654435761), dtype=jnp.uint32) for b in bits]

    compute = dataclasses.asdict(subject.config.compute)
    return {
        "params": [int(s) for s in sums(subject.params)],
        "compute": {k: compute[k] for k in ("dtype", "forward", "head")},
        "tokenizer": subject.tokenizer.fingerprint,
    }


def evaluate_core(
    config: Config,
    params: Any,
    tokenizer: Tokenizer,
    bundle: str | os.PathLike,
    max_per_task: int = 0,
    batch_tokens: int | None = None,
    ledger: core.Ledger | None = None,
) -> Iterator[dict[str, Any]]:
    """core.run on these parameters, a dict per window; with max_per_task=100 cheap enough within a training."""
    tasks = core.load_tasks(Path(bundle))
    return core.run(tasks, tokenizer, likelihood.scorer(config, params, batch_tokens), max_per_task, ledger)


def _run_core(subject: Subject, arguments: argparse.Namespace, console: Console, board: SummaryWriter) -> None:
    tasks = core.load_tasks(Path(arguments.bundle))
    suffix = f"_max{arguments.max_per_task}" if arguments.max_per_task else ""
    stem = subject.out / f"core_{subject.step:06d}{suffix}"
    identity = {"bundle": core.fingerprint(tasks), "max_per_task": arguments.max_per_task, **model_identity(subject)}
    ledger = core.Ledger(stem.with_suffix(".progress.jsonl"), identity)
    if ledger.done:
        console.print(f"resuming: {sum(map(len, ledger.done.values())):,} examples are done already")
    results: dict[str, dict[str, Any]] = {}
    began = time.monotonic()
    with _bar(console, "CORE") as bar:
        task = bar.add_task("CORE", total=None, rate="")
        here, done = "", 0
        for event in evaluate_core(
            subject.config,
            subject.params,
            subject.tokenizer,
            arguments.bundle,
            arguments.max_per_task,
            arguments.batch_tokens,
            ledger,
        ):
            if event["task"] != here:
                here, done = event["task"], 0
                bar.reset(task, total=event["total"], description=f"{len(results) + 1}/{len(tasks)} {here}", rate="")
            rate = f"{event['done'] / max(event['seconds'], 1e-9):.0f}/s"
            bar.update(task, advance=event["done"] - done, rate=rate)
            done = event["done"]
            if "accuracy" in event:
                results[here] = event
                console.print(
                    f"{here:<34} accuracy {event['accuracy']:.4f} · centred {event['centred']:+.4f} · "
                    f"{event['total']} examples · {event['seconds']:.1f} s"
                )
    total = core.core_of(results)
    core.write_csv(stem.with_suffix(".csv"), results)
    kept = {label: {k: r[k] for k in ("accuracy", "centred", "correct", "total")} for label, r in results.items()}
    record = {"core": total, "tasks": kept, **_about(subject), "seconds": time.monotonic() - began, **identity}
    _write_json(stem.with_suffix(".json"), record)
    for label, r in results.items():
        board.add_scalar(f"core/{label}", r["centred"], subject.step)
    board.add_scalar("core/CORE", total, subject.step)
    table = Table(title="CORE" + (f", first {arguments.max_per_task} examples a task" if suffix else ""))
    table.add_column("model")
    table.add_column("CORE", justify="right")
    for name, value in sorted({**core.BASELINES, f"> {subject.name}": total}.items(), key=lambda kv: -kv[1]):
        table.add_row(name, f"{value:.4f}")
    console.print(table)
    console.print(f"written: {stem}.csv, {stem}.json")


def _run_bpb(subject: Subject, arguments: argparse.Namespace, console: Console, board: SummaryWriter) -> None:
    T, names = subject.config.model.T, []
    if arguments.text:
        documents = bpb.text_documents(arguments.text, arguments.key, arguments.by)
        rows = bpb.text_rows(documents, subject.tokenizer, T, names)
        where = ", ".join(arguments.text)
    else:
        where = arguments.data or subject.config.data.path
        if not (Path(where) / "tokenizer").is_dir():
            raise UserError(f"{where}: no data folder there; give --data=FOLDER, or text with --text=FILE")
        if Tokenizer.load(Path(where) / "tokenizer").fingerprint != subject.tokenizer.fingerprint:
            raise UserError(f"{where}: its shards were made with another tokenizer; give the text itself with --text")
        names.append("validation")
        rows = bpb.shard_rows(loader.valid_batches(where, 1, T))
    batch = max(1, arguments.batch_tokens // T)
    totals: dict[int, bpb.Total] = {}
    began = time.monotonic()
    with _bar(console, "bpb") as bar:
        task = bar.add_task("bits per byte", total=None, rate="")
        bytes_V = subject.tokenizer.bytes_per_token()
        for n, so_far in enumerate(bpb.measure(subject.config, subject.params, rows, bytes_V, batch), 1):
            totals = so_far
            rate = f"{n * batch * T / (time.monotonic() - began):,.0f} tok/s"
            bar.update(task, completed=n * batch, rate=rate)
    result = bpb.summary(totals, names)
    record = {"input": where, **result, **_about(subject), "seconds": time.monotonic() - began}
    _write_json(subject.out / f"bpb_{subject.step:06d}.json", record)
    board.add_scalar("evaluate/bpb", result["bpb"], subject.step)
    table = Table(title=f"bits per byte of {where}")
    for name in ("source", "bits/byte", "nats/token", "tokens", "bytes"):
        table.add_column(name, justify="left" if name == "source" else "right")
    lines = list(result["sources"].items()) if len(result["sources"]) > 1 else []
    for name, r in [*lines, ("all", result)]:
        table.add_row(name, f"{r['bpb']:.6f}", f"{r['nll']:.4f}", f"{r['tokens']:,}", f"{r['bytes']:,}")
    console.print(table)


def _run_sample(subject: Subject, arguments: argparse.Namespace, console: Console, board: SummaryWriter) -> None:
    prompts = arguments.prompt or PROMPTS
    config, params, tokenizer = subject.config, subject.params, subject.tokenizer
    texts = [sample.text(config, params, tokenizer, p, arguments.tokens, temperature=0.0)[0] for p in prompts]
    for text in texts:
        console.print(f"· {text}")
    (subject.out / f"sample_{subject.step:06d}.txt").write_text("\n---\n".join(texts) + "\n", encoding="utf-8")
    board.add_text("evaluate/sample", "\n\n".join(texts), subject.step)


def _about(subject: Subject) -> dict[str, Any]:
    return {"model": subject.name, "step": subject.step, "parameters": subject.config.model.parameters}


def _bar(console: Console, unit: str) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    return Progress(
        *columns,
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _write_json(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def load(run: str | None, hf: str | None, dtype: str | None, step: int | None, out: str | None) -> Subject:
    """The model behind --run or --hf. UserError when neither or both are given, or it cannot be read."""
    if (run is None) == (hf is None):
        raise UserError("give either --run=DIR (a run folder) or --hf=FOLDER (a Hugging Face or nanochat checkpoint)")
    dtype = dtype or ("f32" if jax.default_backend() == "cpu" else "stored")
    if run is not None:
        steps = checkpoint.available(run)
        step = steps[-1] if step is None and steps else step
        config, params, tokenizer = checkpoint.load_params(run, None if dtype == "stored" else dtype, step)
        return Subject(config, params, tokenizer, Path(run).name, step or 0, Path(out or run) / "evals")
    found = interop.load(Path(str(hf)), step=step)
    config, params = interop.as_dtype(found.config, found.params, dtype)
    return Subject(config, params, found.tokenizer, found.config.name, found.step, Path(out or str(hf)) / "evals")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m nanojax.evaluate --help")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = _Parser(
        prog="python -m nanojax.evaluate",
        description="Evaluates a model: bits per byte, CORE (22 tasks), sample texts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run", help="run folder that nanojax.train wrote")
    add("--hf", help="folder of a Hugging Face or nanochat checkpoint, instead of --run")
    add("--eval", default="bpb,sample", help=f"what to do, joined by commas: {', '.join(KINDS)} (bpb,sample)")
    add("--step", type=int, help="checkpoint of this step; default: the newest")
    add("--dtype", choices=["f32", "bf16", "stored"], help="default: f32 on a CPU, else as stored")
    add("--out", help="results go to OUT/evals; default: the run or checkpoint folder")
    add("--batch-tokens", type=int, help="tokens that go through the model together (8192, on a CPU 2048)")
    add("--bundle", default="eval_bundle", help="core: folder of nanochat's unpacked eval_bundle.zip (eval_bundle)")
    add("--max-per-task", type=int, default=0, help="core: the first so many examples of each task; 0 = all (0)")
    add("--data", help="bpb: data folder whose validation shards are used; default: the run's")
    add("--text", action="append", help="bpb: .txt, .jsonl(.gz/.xz/.zst), .parquet, folder or glob; may be repeated")
    add("--key", default="text", help="bpb: key of the text in JSON lines and parquet (text)")
    add("--by", help="bpb: key whose value names the source of a text; default: one source a file")
    add("--prompt", action="append", help="sample: text to continue greedily; may be repeated")
    add("--tokens", type=int, default=16, help="sample: new tokens (16)")
    a = parser.parse_args(arguments)
    a.eval = [kind for kind in a.eval.split(",") if kind]
    for kind in a.eval:
        if kind not in KINDS:
            raise UserError(f"--eval={kind}: choose from {', '.join(KINDS)}")
    for name, least in (("batch_tokens", 1), ("max_per_task", 0), ("tokens", 1)):
        if getattr(a, name) is not None and getattr(a, name) < least:
            raise UserError(f"--{name.replace('_', '-')}={getattr(a, name)}: must be at least {least}")
    if not a.eval:
        raise UserError(f"--eval: empty; choose from {', '.join(KINDS)}")
    if "core" in a.eval:
        core.load_tasks(Path(a.bundle))  # told before the model is read
    return a


def main() -> None:
    """The command."""
    a = parse()
    xla.configure()
    a.batch_tokens = a.batch_tokens or likelihood.default_tokens()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    subject = load(a.run, a.hf, a.dtype, a.step, a.out)
    console.print(f"{subject.name}, step {subject.step}: {subject.config.model.parameters:,} parameters")
    try:
        subject.out.mkdir(parents=True, exist_ok=True)
        board = SummaryWriter(str(subject.out.parent / "tensorboard"))
    except OSError as error:
        raise UserError(f"{subject.out}: cannot write there ({error.strerror}); choose another --out") from None
    try:
        run = {"bpb": _run_bpb, "core": _run_core, "sample": _run_sample}
        for kind in a.eval:
            run[kind](subject, a, console, board)
    except jax.errors.JaxRuntimeError as error:
        if not xla.is_out_of_memory(error):
            raise
        raise UserError(f"out of device memory: lower --batch-tokens={a.batch_tokens}") from None
    finally:
        board.close()


if __name__ == "__main__":
    run_main(main)
