"""100,000 steps in one process: its memory, its threads and every file of the run folder stay within bounds."""

from pathlib import Path

import pytest
from helpers import tiny_run

from nanojax.run import records, run_folder

compile_cache = tiny_run.compile_cache
home = tiny_run.home
STEPS = 100_000
SMALLEST = dict(
    model__depth=1, model__width=32, model__seq=8, compute__loss_chunk=8, train__microbatch=1, train__tokens_per_step=8,
    eval__every=20_000, eval__tokens=64, eval__sample_tokens=2, checkpoint__every=1_000, train__steps=STEPS,
)  # fmt: skip
# A train record of these steps has 257 bytes and as TensorBoard events 264; nothing else grows with the steps.
BYTES_PER_STEP = {records.FILE: 300, "tensorboard": 300}
GROWTH_MIB = 10  # from 40,000 steps on, when everything has been compiled; measured 1


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.mark.slow
def test_a_hundred_thousand_steps(home: Path, tmp_path: Path, compile_cache: Path) -> None:
    """Memory and threads do not grow with steps and saves; files that grow do so by the bytes of a record, the others not."""
    run = tmp_path / "run"
    process = tiny_run.spawn(home / "tiny.py", run, compile_cache, **SMALLEST)
    resident, threads = [], []
    for step in range(STEPS // 5, STEPS, STEPS // 5):
        reached = lambda step=step: run_folder.available(run) and run_folder.available(run)[-1] >= step
        tiny_run.wait_for(process, reached, seconds=1200)
        resident.append(_resident_mib(process.pid))
        threads.append(len(list(Path(f"/proc/{process.pid}/task").iterdir())))
    process.communicate()
    assert process.returncode == 0
    sizes = {str(p.relative_to(run)): p.stat().st_size for p in run.rglob("*") if p.is_file()}
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:6]
    begin, end = (records.read(run, kind)[-1]["time"] for kind in ("start", "end"))
    print(f"{(end - begin) / STEPS * 1e3:.2f} ms per step; MiB {[round(r) for r in resident]}; {threads=}; {largest}")
    assert max(resident) - resident[1] < GROWTH_MIB
    assert max(threads) <= threads[0] + 5
    assert run_folder.available(run) == [STEPS - 1_000, STEPS]
    for name, size in sizes.items():
        part = name.split("/")[0]
        assert size < BYTES_PER_STEP.get(part, 0) * STEPS + 200_000, name
    assert len(sizes) < 200
