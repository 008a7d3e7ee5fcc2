"""machine.json in the run folder: what the card is, what was chosen on it, and what it measured beside the model.

Small, and made to be sent around: no name of a user or host and no path is in it.
"""

import contextlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax

from nanojax import config_files, files, hardware, xla
from nanojax.card import facts, traced
from nanojax.cli import short
from nanojax.config import Config
from nanojax.hardware import GIB
from nanojax.plan import roofline
from nanojax.run import records

FILE = "machine.json"
STEPS = 50  # after which the run prints what it measured


def read(run: Path) -> dict[str, Any]:
    """The run folder's; {} where it is absent or damaged."""
    try:
        found = json.loads((run / FILE).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def update(run: Path, record: dict[str, Any]) -> None:
    """Replaces the parts that `record` has. A file that cannot be written is nothing to stop for."""
    with contextlib.suppress(ValueError, OSError):  # a UserError is a ValueError
        files.write_json(run / FILE, _clean(read(run) | record))


def described(config: Config, seen: facts.Facts) -> dict[str, Any]:
    """The machine, the versions and the model: the beginning of machine.json."""
    versions = {}
    for name in ("nanojax", "jax", "jaxlib"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    name = config.name if config.name in config_files.available() else "of the user's own"
    m, t = config.model, config.train
    sizes = {"depth": m.L, "width": m.D, "vocab": m.V, "seq": m.T, "parameters": m.parameters}
    sizes |= {"microbatch": t.microbatch, "tokens_per_step": t.tokens_per_step, "residuals": config.compute.residuals}
    return {
        "facts": facts.as_json(seen),
        "versions": versions,
        "config": {"name": name, **sizes},
    }


def modelled(config: Config, compiled: Any) -> tuple[dict[str, Any], roofline.Estimate | None]:
    """(the modelled tokens/s and the compiled peak, the Estimate) of the config's whole step on this machine's GPU.

    No speed and no Estimate where hardware.py does not know the GPU.
    """
    device = jax.devices()[0].device_kind
    card = next((c for c in hardware.CARDS.values() if c.name == device), None)
    estimate = roofline.estimate(compiled.as_text() or "", card) if card else None
    rate = config.train.tokens_per_step / estimate.seconds if estimate else None
    return {"tokens_per_s": rate, "compiled_peak_bytes": xla.peak_bytes(compiled)}, estimate


def compared(config: Config, train_step: Any, tokens_per_s: float, trace: Path | None = None) -> tuple[dict, list[str]]:
    """(measured and modelled figures, lines that say them) of a compiled step that ran on this machine's GPU.

    Args:
      trace: folder of a profiler trace of it; with one, the seconds of each class of kernels are compared too.
    """
    model, estimate = modelled(config, train_step)
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if estimate:
        share = tokens_per_s / model["tokens_per_s"]
        said = f", modelled {short(model['tokens_per_s'])} ({share:.0%})"
    else:
        said = f"; {jax.devices()[0].device_kind} is not modelled"
    memory = f", used at most {used / GIB:.2f}, with what was tried at the start" if used else ""
    peak = f"compiled peak {model['compiled_peak_bytes'] / GIB:.2f} GiB"
    lines = [f"measured {short(tokens_per_s)} tokens/s{said}; memory: {peak}{memory}"]
    out = {"measured": {"tokens_per_s": tokens_per_s, "peak_bytes_at_most": used}, "modelled": model}
    if trace and estimate:
        out["by_kind"] = traced.by_kind(trace, estimate)
        for kind, of in out["by_kind"].items():
            lines.append(f"  {kind:<20} measured {of['measured']:8.4f} s per step, modelled {of['modelled']:8.4f}")
    return out, lines


def report(config: Config, run: Path, train_step: Any, say: Any, trace: bool = False) -> None:
    """Says what the run measured beside the model, and keeps it in machine.json."""
    rates = [r["tokens_per_s"] for r in records.read(run, "train") if r.get("tokens_per_s")]
    if not rates:
        return
    out, lines = compared(config, train_step, rates[-1], run / "profile" if trace else None)
    update(run, out)
    for line in lines:
        say(line)
    say(f"{run / FILE} has these and this machine's choices; docs/first-gpu-run.md says where to send it")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return facts.scrubbed(value)
    if isinstance(value, dict):
        return {key: _clean(of) for key, of in value.items()}
    return [_clean(of) for of in value] if isinstance(value, list | tuple) else value
