"""What a profiler trace says: the kernels of its steps by time, and their classes beside the modelled ones."""

import collections
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData

from nanojax.cli import UserError
from nanojax.plan.roofline import Estimate

CONTAINERS = ("while", "call", "conditional")  # their time is the time of the kernels inside them


class Kernel(NamedTuple):
    """One HLO instruction: its total time in ns, and how often it ran."""

    name: str
    ns: float
    times: int


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
    return sorted((Kernel(name, ns[name], times[name]) for name in ns), key=lambda k: -k.ns), len(steps)


def by_kind(folder: Path, estimate: Estimate) -> dict[str, dict[str, float]]:
    """kind -> {"measured", "modelled"}: seconds per step of each class of kernels, the modelled slowest first.

    Kernels that the model does not have are of the kind "other".
    """
    found, steps = kernels(newest_trace(folder))
    kinds = {kernel.name: kernel.kind for kernel in estimate.kernels}
    seconds: dict[str, float] = collections.defaultdict(float)
    for kernel in found:
        seconds[kinds.get(kernel.name, "other")] += kernel.ns * 1e-9 / max(1, steps)
    modelled = {kind: kernel.seconds for kind, kernel in estimate.by_kind().items()}
    return {kind: {"measured": seconds[kind], "modelled": modelled.get(kind, 0.0)} for kind in [*modelled, *seconds]}
