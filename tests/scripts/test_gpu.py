"""On an NVIDIA GPU: the kernels' results and the training curve against the CPU's, by scripts/bench_gpu.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

from nanojax import hardware

NO_GPU = pytest.mark.skipif(hardware.read_gpu() is None, reason="no NVIDIA GPU with a driver in this machine")


@pytest.mark.gpu
@NO_GPU
def test_results_equal_the_cpus(tmp_path: Path) -> None:
    """Every op of the step at small shapes, and ten steps in int8 and f32, within the script's bounds; nothing left out."""
    out = tmp_path / "out.json"
    command = [sys.executable, ROOT / "scripts" / "bench_gpu.py", "--parts=ops,curve", "--quick", "--minutes=20"]
    environment = {
        name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"
    }  # conftest hides the GPU
    done = subprocess.run([*command, f"--out={out}"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(out.read_text())["parts"]
    assert len(parts["ops"]["cases"]) > 10 and not parts["ops"]["skipped"]
    assert set(parts["curve"]["runs"]) == {"int8", "f32"}
