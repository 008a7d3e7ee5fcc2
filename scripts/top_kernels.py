"""Prints the kernels of a run's profiler trace that took the most time, and the layers that they come from.

python -m nanojax.train --config=demo --profile.start=10 --profile.steps=3
python scripts/top_kernels.py runs/demo
"""

import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanojax.card import traced
from nanojax.cli import Parser, UserError, run_main


def with_sources(trace: Path) -> tuple[list[tuple[traced.Kernel, str]], int]:
    """The kernels, each with the jax operation that it came from, and the number of traced steps."""
    found, steps = traced.kernels(trace)
    sources = _sources(trace)
    return [(kernel, sources.get(kernel.name, "")) for kernel in found], steps


def _sources(trace: Path) -> dict[str, str]:
    """jax's operation per HLO instruction, from the step.hlo.txt that the run wrote beside the trace."""
    for folder in trace.parents:
        text = folder / "step.hlo.txt"
        if text.is_file():
            pairs = re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', text.read_text(), re.M)
            return {name: _plain(source) for name, source in pairs}
    return {}


def _plain(source: str) -> str:
    """jit(step)/while/body/closed_call/jvp(Block)/Block.qkv/mul -> jvp(Block)/Block.qkv/mul."""
    return "/".join(
        p for p in source.split("/") if p not in ("jit(step)", "while", "body", "closed_call", "checkpoint")
    )


def main() -> None:
    """The command."""
    parser = Parser("python scripts/top_kernels.py", __doc__ or "")
    parser.add_argument("run", type=Path, help="run folder, or a trace file")
    parser.add_argument("--top", type=int, default=25, help="kernels printed (25)")
    args = parser.parse_args()
    trace = traced.newest_trace(args.run)
    found, steps = with_sources(trace)
    if not found:
        raise UserError(f"{trace}: holds no kernels; trace at least one whole step")
    total = sum(k.ns for k, _ in found)
    table = Table(title=f"{trace}: {steps} steps, {total / 1e6 / max(1, steps):.1f} ms of kernels per step")
    for column in ("ms/step", "share", "calls/step"):
        table.add_column(column, justify="right")
    table.add_column("kernel", overflow="fold")
    table.add_column("operation", overflow="fold")
    for k, source in found[: args.top]:
        n = max(1, steps)
        table.add_row(f"{k.ns / 1e6 / n:.2f}", f"{k.ns / total:.1%}", f"{k.times / n:.0f}", k.name, source)
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    console.print(table)


if __name__ == "__main__":
    run_main(main)
