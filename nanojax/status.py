"""Where a run is, from its folder alone: step, loss, time left, last save, speed, energy, money, warnings.

python -m nanojax.status --run=RUN
"""

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from nanojax import cli
from nanojax.cli import Parser, UserError, duration, run_main, short
from nanojax.plan.energy import DAY, PRICES
from nanojax.run import exits, run_folder
from nanojax.run.records import number, read
from nanojax.run.watch import REPORT

WATCH_SECONDS = 10.0
Records = list[dict[str, Any]]
ENDINGS: dict[float | None, str] = {
    exits.DONE: "done",
    exits.DIVERGED: "diverged",
    exits.STOPPED: "stopped",
    exits.STOPPED_UNSAVED: "stopped, not saved",
    exits.FAILED: "failed",
    exits.FAILED_UNSAVED: "failed, not saved",
}


@dataclasses.dataclass(frozen=True)
class Status:
    """A run at one moment. None: the folder does not say. Times are seconds, `cost` is money by currency."""

    run: str
    state: str  # running, done, stopped, failed, diverged, killed, empty
    step: int
    steps: int | None
    loss: float | None
    bpb: float | None
    reward: float | None  # of the newest step's answers, and the held-out questions answered rightly, of rollouts
    accuracy: float | None
    tokens: float | None
    tokens_per_s: float | None  # of the last records
    tokens_per_s_day: float | None  # of the last day, stops included
    eta: float | None
    last_record: float | None  # when it was written, seconds since 1970
    saved: int | None  # step of the newest checkpoint
    last_save: float | None
    kwh: float | None
    cost: dict[str, float]
    starts: int
    warnings: list[str]


def status(run: Path) -> Status:
    """The Status of a run folder: running, ended, damaged or empty, here or copied from elsewhere. Writes nothing."""
    warnings: list[str] = []
    try:
        records = read(run)
    except UserError as error:
        records, warnings = [], [str(error)]
    train = [r for r in records if r["kind"] == "train"]
    newest: dict[str, Any] = train[-1] if train else {}
    steps, per_step = _plan(run, warnings)
    available = run_folder.available(run)
    saved = available[-1] if available else None
    step = max(newest.get("step", 0), saved or 0)
    day = _speed_of_last_day(train)
    rate = number(newest, "tokens_per_s")
    pace = day or rate
    eta = (steps - step) * per_step / pace if pace and steps and per_step and step <= steps else None
    kwh = next((r["kwh"] for r in reversed(train) if number(r, "kwh") is not None), None)
    state = _state(run, records, saved or 0, steps)
    return Status(
        run=str(run),
        state=state,
        step=step,
        steps=steps,
        loss=number(newest, "loss"),
        bpb=_evaluated(records, "bpb"),
        reward=number(newest, "reward"),
        accuracy=_evaluated(records, "accuracy"),
        tokens=number(newest, "tokens"),
        tokens_per_s=rate,
        tokens_per_s_day=day,
        eta=0.0 if state == "done" else eta,
        last_record=number(records[-1], "time") if records else None,
        saved=saved,
        last_save=_saved_at(run, saved),
        kwh=kwh,
        cost={currency: kwh * price for currency, price in PRICES.items()} if kwh is not None else {},
        starts=sum(r["kind"] == "start" for r in records),
        warnings=warnings + _damaged(run, available) + _warnings(run, records, newest),
    )


def _evaluated(records: Records, key: str) -> float | None:
    """The newest evaluation's figure."""
    return next((r[key] for r in reversed(records) if r["kind"] == "eval" and number(r, key) is not None), None)


def _plan(run: Path, warnings: list[str]) -> tuple[int | None, int | None]:
    """(steps, tokens per step) of the run's config; None, None and a warning if that is damaged."""
    try:
        config = run_folder.read_config(run)
        return config.train.steps, config.train.tokens_per_step
    except UserError as error:
        warnings.append(str(error))
        return None, None


def _state(run: Path, records: Records, saved: int, steps: int | None) -> str:
    if _held(run / "lock"):
        return "running"
    if not records and not saved:
        return "empty"
    since = max((i for i, r in enumerate(records) if r["kind"] == "start"), default=0)
    end = next((r for r in records[since:] if r["kind"] == "end"), None)
    if steps is not None and saved >= steps:
        return "done"
    return ENDINGS.get(number(end, "code"), "ended") if end else "killed, or running elsewhere"


def _held(lock: Path) -> bool:
    """Whether a process of this machine holds the lock: asked of the kernel's table, which disturbs nobody."""
    try:
        inode = f":{lock.stat().st_ino} "  # by inode alone: btrfs and overlays name another device there
        return any("FLOCK" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())
    except OSError:
        return False


def _speed_of_last_day(train: Records) -> float | None:
    """Tokens per second from the first record of the 24 hours before the newest one to that one."""
    timed = [r for r in train if number(r, "time") is not None and number(r, "tokens") is not None]
    if not timed:
        return None
    last = timed[-1]
    first = next(r for r in timed if 0 <= last["time"] - r["time"] <= DAY)
    seconds = last["time"] - first["time"]
    return (last["tokens"] - first["tokens"]) / seconds if seconds > 0 and last["tokens"] > first["tokens"] else None


def _saved_at(run: Path, step: int | None) -> float | None:
    """When the checkpoint was written, by its own clock; a copy of the folder has other times on its files."""
    if step is None:
        return None
    folder = run / run_folder.CHECKPOINTS / str(step)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return json.loads((folder / "_CHECKPOINT_METADATA").read_text())["commit_timestamp_nsecs"] / 1e9
    with contextlib.suppress(OSError):
        return folder.stat().st_mtime
    return None


def _damaged(run: Path, available: list[int]) -> list[str]:
    """A line for each checkpoint that is seen to be damaged, and for each that was moved aside as such."""
    found = {step: run_folder.visible_damage(run, step) for step in available}
    out = [f"{run / run_folder.CHECKPOINTS / str(step)}: damaged ({why})" for step, why in found.items() if why]
    return out + [f"{path}: was damaged and moved here" for path in sorted((run / "damaged").glob("*"))]


def _warnings(run: Path, records: Records, newest: dict[str, Any]) -> list[str]:
    """Each kind's last text, how often it came since the last start, and a watch's report."""
    counted = newest.get("warnings")
    counts = counted if isinstance(counted, dict) else {}
    texts = {str(r.get("about")): r for r in records if r["kind"] == "warning"}
    out = [
        f"step {r['step']}: {r.get('text')}" + (f" ({counts[about]} times)" if counts.get(about, 1) != 1 else "")
        for about, r in texts.items()
    ]
    with contextlib.suppress(OSError, IndexError):
        out.append((run / REPORT).read_text(errors="replace").splitlines()[0] + f" ({REPORT})")
    return out


def table(s: Status, now: float) -> str:
    """The Status as lines of text; `now`: seconds since 1970."""
    ago = lambda then: f"{duration(max(0, now - then))} ago"
    of = f" of {s.steps}" if s.steps else ""
    rows = {"run": f"{s.run}: {s.state}" + (f", last record {ago(s.last_record)}" if s.last_record else "")}
    rows["step"] = f"{s.step}{of}" + (f", {short(s.tokens)} tokens" if s.tokens else "") + f", {s.starts} starts"
    if s.loss is not None or s.reward is None:  # a step of rollouts that earned all the same has none
        loss = f"{s.loss:.4f} nats per token" if s.loss is not None else "unknown"
        rows["loss"] = loss + (f", validation {s.bpb:.4f} bits per byte" if s.bpb is not None else "")
    if s.reward is not None:
        right = f", {s.accuracy:.1%} of the held-out questions right" if s.accuracy is not None else ""
        rows["reward"] = f"{s.reward:.4f}{right}"
    speeds = [f"{short(s.tokens_per_s)} tokens/s now"] if s.tokens_per_s else []
    if s.tokens_per_s_day:
        speeds.append(f"{short(s.tokens_per_s_day)} over the last day, stops included")
    rows["speed"] = ", ".join(speeds) or "unknown"
    rows["time left"] = duration(s.eta) if s.eta is not None else "unknown"
    saved = f"step {s.saved}" + (f", {ago(s.last_save)}" if s.last_save else "") if s.saved is not None else "none yet"
    rows["last save"] = saved
    cost = ", ".join(f"{currency} {money:.2f}" for currency, money in s.cost.items())
    rows["energy"] = f"{s.kwh:.2f} kWh, {cost}" if s.kwh is not None else "not measured (no NVIDIA driver)"
    lines = [f"{name:<10} {text}" for name, text in rows.items()]
    return "\n".join(lines + [f"{'warning':<10} {text}" for text in s.warnings])


def main() -> None:
    """The command."""
    parser = Parser(
        "python -m nanojax.status",
        "Tells where a run is, from its folder alone; a copy of the folder on another machine will do.",
        "  python -m nanojax.status --run=runs/d32_4070\n"
        "  python -m nanojax.status --run=runs/d32_4070 --watch\n"
        "  python -m nanojax.status --run=runs/d32_4070 --json\n",
    )
    parser.add_argument("--run", required=True, type=cli.path, help="run folder")
    parser.add_argument("--watch", action="store_true", help=f"again every {WATCH_SECONDS:.0f} s, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="one JSON object; with --watch one per line")
    a = parser.parse_args()
    run_folder.check(a.run)
    while True:
        found = status(Path(a.run))
        print(json.dumps(dataclasses.asdict(found)) if a.json else table(found, time.time()), flush=True)
        if not a.watch:
            return
        time.sleep(WATCH_SECONDS)
        if not a.json:
            print()


if __name__ == "__main__":
    run_main(main)
