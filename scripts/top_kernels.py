"""Prints the kernels of a run's profiler trace that took the most time, and the layers that they come from.

python -m nanojax.train --config=demo --profile.start=10 --profile.steps=3
python scripts/top_kernels.py runs/demo
"""

import collections
import re
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData
from rich.console import Console
from rich.table import Table

from nanojax.cli import Parser, UserError, run_main

CONTAINERS = ("while", "call", "conditional")  # their time is the time of the kernels inside them


class Kernel(NamedTuple):
    """One HLO instruction: its total time in ns, how often it ran, and the jax operation that it came from."""

    name: str
    ns: float
    times: int
    source: str


def newest_trace(folder: Path) -> Path:
    """The newest .xplane.pb under a run folder, its profile/ folder, or the file itself."""
    found = [folder] if folder.is_file() else sorted(folder.rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError(f"{folder}: no profiler trace (*.xplane.pb); train with --profile.start=10 --profile.steps=3")
    return found[-1]


def kernels(trace: Path) -> tuple[list[Kernel], int]:
    """The kernels, most time first, and the number of traced steps. Times are summed over threads and streams."""
    try:
        data = ProfileData.from_serialized_xspace(trace.read_bytes())
        events = [event for plane in data.planes for line in plane.lines for event in line.events]
        ns: dict[str, float] = collections.defaultdict(float)
        times: dict[str, int] = collections.defaultdict(int)
        steps = set()
        for event in events:
            stats = dict(event.stats)
            if event.name == "train" and "step_num" in stats:
                steps.add(stats["step_num"])
            name = str(stats.get("hlo_op", ""))
            if name and not name.startswith(CONTAINERS):
                ns[name] += event.duration_ns
                times[name] += 1
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{trace}: not a profiler trace ({error})") from None
    sources = _sources(trace)
    listed = [Kernel(name, ns[name], times[name], sources.get(name, "")) for name in ns]
    return sorted(listed, key=lambda k: -k.ns), len(steps)


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
    trace = newest_trace(args.run)
    found, steps = kernels(trace)
    if not found:
        raise UserError(f"{trace}: holds no kernels; trace at least one whole step")
    total = sum(k.ns for k in found)
    table = Table(title=f"{trace}: {steps} steps, {total / 1e6 / max(1, steps):.1f} ms of kernels per step")
    for column in ("ms/step", "share", "calls/step"):
        table.add_column(column, justify="right")
    table.add_column("kernel", overflow="fold")
    table.add_column("operation", overflow="fold")
    for k in found[: args.top]:
        n = max(1, steps)
        table.add_row(f"{k.ns / 1e6 / n:.2f}", f"{k.ns / total:.1%}", f"{k.times / n:.0f}", k.name, k.source)
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    console.print(table)


if __name__ == "__main__":
    run_main(main)
