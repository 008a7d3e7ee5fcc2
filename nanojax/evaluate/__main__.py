"""Evaluates a trained or imported model: bits per byte, CORE, ChatCORE, samples.        python -m nanojax.evaluate"""

import argparse
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from nanojax import cli, files, sample, xla
from nanojax.cli import UserError, run_main
from nanojax.evaluate import bpb, chat, core, devices, figures, likelihood, problems, published
from nanojax.evaluate.subject import Subject, add_arguments, load
from nanojax.run.tensorboard import Board
from nanojax.tokenizer import Tokenizer

KINDS = ("bpb", "core", "chat", "sample")
SAMPLE_TOKENS, ANSWER_TOKENS = 16, 512
NO_DATA = "nothing says which data this model was validated on"
PROMPTS = (  # their greedy continuations show within a second what a model has learnt
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)
EXAMPLES = """\
  python -m nanojax.evaluate --run=runs/demo                                    validation bits per byte, samples
  python -m nanojax.evaluate --run=runs/d32 --eval=core --bundle=eval_bundle    CORE; the same command resumes it
  python -m nanojax.evaluate --run=runs/d32 --eval=core --bundle=eval_bundle --max-per-task=500
  python -m nanojax.evaluate --run=runs/demo --eval=bpb --text=book.txt --text='more/*.jsonl.zst' --by=source
  python -m nanojax.evaluate --run=runs/d24-chat --eval=chat --source=texts/chat                      ChatCORE
  python -m nanojax.evaluate --run=runs/d24-chat --eval=chat --devices=all                 on all cards together
  python -m nanojax.evaluate --run=runs/d24-chat --eval=chat --tasks=gsm8k,spelling,sums --max-per-task=100
  python -m nanojax.evaluate --hf=nanochat-d32 --eval=core,sample --bundle=eval_bundle --out=runs/nanochat-d32
Results go to <run>/evals and to TensorBoard; those of --hf are only printed unless there is --out. --hf takes a folder
with config.json and *.safetensors (transformers' NanoChat) or with model_NNNNNN.pt and meta_NNNNNN.json (nanochat); neither
torch nor transformers is needed.
"""


def _run_core(subject: Subject, a: argparse.Namespace, console: Console, board: Board | None) -> None:
    tasks = core.load_tasks(Path(a.bundle))
    total = sum(len(core.load_examples(task, a.max_per_task)) for task in tasks)
    suffix = f"_max{a.max_per_task}" if a.max_per_task else ""
    stem = subject.out / f"core_{subject.step:06d}{suffix}" if subject.out else None
    identity = {"bundle": core.fingerprint(tasks), "max_per_task": a.max_per_task, **subject.identity()}
    ledger = core.Ledger(stem.with_suffix(".progress.jsonl"), identity) if stem else None
    if ledger and ledger.done:
        console.print(f"resuming: {sum(map(len, ledger.done.values())):,} examples are done already")
    scores: list[core.TaskScore] = []
    began = time.monotonic()
    run = core.evaluate(
        subject.config, subject.params, subject.tokenizer, tasks, a.max_per_task, a.batch_tokens, ledger
    )
    with cli.Bar("CORE", total, "examples") as bar:
        for score in run:
            label = score.task.label
            bar.reach(sum(s.done for s in scores) + score.done, f"{len(scores) + 1}/{len(tasks)} {label}")
            if score.finished:
                scores.append(score)
                console.print(
                    f"{label:<34} accuracy {score.accuracy:.4f} · centred {score.centred:+.4f} · "
                    f"{score.total} examples · {score.seconds:.1f} s"
                )
    value = core.core_of(scores)
    kept = {
        s.task.label: {
            "accuracy": s.accuracy,
            "baseline": s.task.baseline,
            "centred": s.centred,
            "correct": s.correct,
            "total": s.total,
        }
        for s in scores
    }
    record = {"core": value, "tasks": kept, **_about(subject), "seconds": time.monotonic() - began, **identity}
    if stem:
        core.write_csv(stem.with_suffix(".csv"), scores)
        files.write_json(stem.with_suffix(".json"), record)
    if board:
        for score in scores:
            board.scalar(f"core/{score.task.label}", score.centred, subject.step)
        board.scalar("core/CORE", value, subject.step)
    table = Table(title="CORE" + (f", first {a.max_per_task} examples per task" if suffix else ""))
    table.add_column("model")
    table.add_column("CORE", justify="right")
    ranked = {**{f.model: f.value for f in published.CORE}, f"> {subject.name}": value}
    for name, of_model in sorted(ranked.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{of_model:.4f}")
    console.print(table)
    if stem:
        console.print(f"written: {stem}.csv, {stem}.json")


def _run_bpb(subject: Subject, a: argparse.Namespace, console: Console, board: Board | None) -> None:
    T, sizes = subject.config.model.T, subject.tokenizer.bytes_per_token(a.token_bytes)
    batch = max(1, a.batch_tokens // T)
    model = subject.config, subject.params, subject.tokenizer
    began = time.monotonic()
    with cli.Bar("bpb", None, "tokens") as bar:
        progress = lambda rows: bar.reach(rows * T)
        if a.text:
            where = ", ".join(a.text)
            sources = bpb.of_texts(*model, bpb.text_documents(a.text, a.key, a.by), batch, progress, sizes)
        else:
            where = _data_folder(subject, a.data)
            sources = {"validation": bpb.of_folder(*model, where, batch, progress=progress, bytes_V=sizes)}
    result = bpb.summary(sources)
    record = {
        "input": where,
        "token_bytes": a.token_bytes,
        **result,
        **_about(subject),
        "seconds": time.monotonic() - began,
    }
    if subject.out:
        files.write_json(subject.out / f"bpb_{subject.step:06d}.json", record)
    if board:
        board.scalar("evaluate/bpb", result["bpb"], subject.step)
    table = Table(title=f"bits per byte of {where}")
    for name in ("source", "bits/byte", "nats/token", "tokens", "bytes"):
        table.add_column(name, justify="left" if name == "source" else "right")
    lines = list(result["sources"].items()) if len(sources) > 1 else []
    for name, scores in [*lines, ("all", result)]:
        table.add_row(
            name, f"{scores['bpb']:.6f}", f"{scores['nll']:.4f}", f"{scores['tokens']:,}", f"{scores['bytes']:,}"
        )
    console.print(table)


def _data_folder(subject: Subject, given: str | None) -> str:
    """The folder whose validation shards are measured. UserError unless the subject's tokenizer made them."""
    folder = given or subject.config.data.path
    if not folder:
        raise UserError(f"{NO_DATA}; give --data=FOLDER, or text with --text=FILE")
    if not (Path(folder) / "tokenizer").is_dir():
        raise UserError(f"{folder}: no data folder there; give --data=FOLDER, or text with --text=FILE")
    if Tokenizer.load(Path(folder) / "tokenizer").fingerprint != subject.tokenizer.fingerprint:
        raise UserError(f"{folder}: its shards were made with another tokenizer; give the text itself with --text")
    return folder


def _run_sample(subject: Subject, a: argparse.Namespace, console: Console, board: Board | None) -> None:
    prompts = a.prompt or PROMPTS
    config, tokenizer, tokens = subject.config, subject.tokenizer, a.tokens or SAMPLE_TOKENS
    write = lambda params, prompt: sample.text(config, params, tokenizer, prompt, tokens, temperature=0.0)[0]
    texts = list(devices.by_turns(write, prompts, subject.params))
    for text in texts:
        console.print(f"· {text}")
    if subject.out:
        with files.write_atomic(subject.out / f"sample_{subject.step:06d}.txt") as file:
            file.write(("\n---\n".join(texts) + "\n").encode())
    if board:
        board.text("evaluate/sample", "\n\n".join(texts), subject.step)


def _run_chat(subject: Subject, a: argparse.Namespace, console: Console, board: Board | None) -> None:
    names, tokens = chat.names_of(a.tasks), a.tokens or ANSWER_TOKENS
    options = chat.Options(Path(a.source), a.words, a.max_per_task, tokens, a.rows, a.batch_tokens)
    began = time.monotonic()
    found = chat.run(subject, names, options, console)
    given = {"source": a.source, "words": a.words, "max_per_task": a.max_per_task, "rows": a.rows}
    seconds = time.monotonic() - began
    record = {**figures.as_json(found), **_about(subject), "seconds": seconds, **given, **subject.identity()}
    suffix = "" if names == chat.DEFAULT else "_" + "_".join(names)
    suffix += f"_max{a.max_per_task}" if a.max_per_task else ""
    stem = subject.out / f"chat_{subject.step:06d}{suffix}" if subject.out else None
    if stem:
        figures.write_csv(stem.with_suffix(".csv"), found)
        files.write_json(stem.with_suffix(".json"), record)
    if board:
        for s in found:
            board.scalar(f"chat/{s.task}", s.centred.value, subject.step)
        for name, mean in figures.means_of(found).items():
            board.scalar(f"chat/{name}", mean.value, subject.step)
    console.print(figures.table(found, a.max_per_task))
    if stem:
        console.print(f"written: {stem}.csv, {stem}.json")


def _about(subject: Subject) -> dict[str, Any]:
    return {
        "model": subject.name,
        "step": subject.step,
        "parameters": subject.config.model.parameters,
        "command": cli.command(),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    a = _parser().parse_args(arguments)
    a.default = a.eval is None
    a.eval = ["bpb", "sample"] if a.default else [kind for kind in a.eval.split(",") if kind]
    for kind in a.eval:
        if kind not in KINDS:
            raise UserError(f"--eval={kind}: choose from {', '.join(KINDS)}")
    for name, least in (("batch_tokens", 1), ("max_per_task", 0), ("tokens", 1), ("rows", 1)):
        if getattr(a, name) is not None and getattr(a, name) < least:
            raise UserError(f"--{name.replace('_', '-')}={getattr(a, name)}: must be at least {least}")
    if not a.eval:
        raise UserError(f"--eval: empty; choose from {', '.join(KINDS)}")
    if "core" in a.eval:
        core.load_tasks(Path(a.bundle))  # reports a bad bundle before the model is read
    if "chat" in a.eval:
        problems.check(chat.names_of(a.tasks), Path(a.source))
    return a


def _parser() -> cli.Parser:
    parser = cli.Parser(
        "python -m nanojax.evaluate",
        "Evaluates a model: bits per byte, CORE (22 tasks), ChatCORE (of a fine-tuned model), sample texts.",
        EXAMPLES,
    )
    add_arguments(parser)
    add = parser.add_argument
    add(
        "--eval", help=f"what to do, joined by commas: {', '.join(KINDS)}; default: sample, and bpb where there is text"
    )
    add("--out", type=cli.path, help="results go to OUT/evals; default: the run folder, nowhere with --hf")
    add("--batch-tokens", type=int, help="tokens that go through the model together on a device (8192, on a CPU 2048)")
    add(
        "--max-per-task",
        type=int,
        default=0,
        metavar="N",
        help="core, chat: examples of each task, the first N; 0 = all (0)",
    )
    add(
        "--tokens",
        type=int,
        help=f"sample, chat: new tokens at most ({SAMPLE_TOKENS} of a sample, {ANSWER_TOKENS} of an answer)",
    )
    add(
        "--bundle",
        type=cli.path,
        default="eval_bundle",
        help="core: folder of nanochat's unpacked eval_bundle.zip (eval_bundle)",
    )
    chat.add_arguments(parser)
    add("--data", type=cli.path, help="bpb: data folder whose validation shards are used; default: the run's")
    add(
        "--text",
        type=cli.path,
        action="append",
        help="bpb: .txt, JSON or parquet as `data tokenize` reads, folder or glob; may be repeated",
    )
    add("--key", default="text", help="bpb: key of the text in JSON lines and parquet (text)")
    add("--by", help="bpb: key whose value names the source of a text; default: one source per file")
    add(
        "--token-bytes",
        choices=["raw", "decoded"],
        default="raw",
        help="bpb: bytes of a part of a character: its own (raw), or U+FFFD's 3 (decoded), as in nanochat till July 2026",
    )
    add("--prompt", action="append", help="sample: text to continue greedily; may be repeated")
    return parser


def main() -> None:
    """The command."""
    a = parse()
    xla.configure()
    a.batch_tokens = a.batch_tokens or likelihood.default_tokens()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    subject = load(a.run, a.hf, a.dtype, a.step, a.out, a.devices)
    console.print(f"{subject.name}, step {subject.step}: {subject.config.model.parameters:,} parameters")
    where = subject.config.data.path
    if a.default and not (a.text or a.data or (where and (Path(where) / "tokenizer").is_dir())):
        missing = f"no data folder at {where}" if where else NO_DATA
        console.print(f"bits per byte skipped: {missing}; give --data=FOLDER or --text=FILE")
        a.eval.remove("bpb")
    board = None
    if subject.out:
        board = Board(cli.output_folder(subject.out).parent / "tensorboard")
    try:
        run = {"bpb": _run_bpb, "core": _run_core, "chat": _run_chat, "sample": _run_sample}
        for kind in a.eval:
            run[kind](subject, a, console, board)
    except jax.errors.JaxRuntimeError as error:
        if not xla.is_out_of_memory(error):
            raise
        lower = f"--batch-tokens={a.batch_tokens}" + (f" or --rows={a.rows}" if "chat" in a.eval else "")
        raise UserError(f"out of device memory: lower {lower}") from None
    finally:
        if board:
            board.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: no folder of the sandbox is left
    run_main(main)
