"""Facts of made-up machines: what NVML, nvidia-smi, packages and files say, and that nothing they do raises."""

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_card import NvmlError, nvml, raises

from nanojax import hardware
from nanojax.card import facts

MIB = 2**20
SMI = "550.54, NVIDIA GeForce RTX 4070, 12282, 11000, 150.00, 200.00, 8.9"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The files of a Linux with a driver."""
    for name, text in {
        "proc/driver/nvidia/version": "NVRM version", "proc/version": "Linux version 6.8.0",
        "proc/meminfo": "MemTotal:  65536 kB\nMemAvailable:  32768 kB\n", "sys/bus/pci/devices/0/vendor": "0x10de\n",
        "sys/bus/pci/devices/0/class": "0x030000\n",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def gather(root: Path, **sources: Any) -> facts.Facts:
    packages = lambda: {"jax": "0.10.2", "jax-cuda12-plugin": "0.10.2", "nvidia-cudnn-cu12": "9.8.0.87"}
    known: dict[str, Any] = {"environ": {}, "nvml": nvml, "smi": lambda fields: SMI, "packages": packages}
    return facts.gather(root=root, folder=root / "runs" / "new", **{**known, **sources})


def test_a_healthy_machine(root: Path) -> None:
    """Every field of the card, from NVML; memory in bytes, power in watts; what is not asked is not known."""
    seen = gather(root)
    assert (seen.driver, seen.driver_cuda, seen.card) == ("570.86.10", (12, 8), "NVIDIA GeForce RTX 4070")
    assert (seen.capability, seen.memory_total, seen.memory_free) == ((8, 9), 12282 * MIB, 11000 * MIB)
    assert (seen.watts_limit, seen.watts_default, seen.display, seen.wsl2) == (150.0, 200.0, True, False)
    assert seen.others[0][1] == 700 * MIB and (seen.ram_total, seen.ram_free) == (64 * MIB, 32 * MIB)
    assert seen.driver_loaded and seen.nvidia_device and seen.plugins == ["jax-cuda12-plugin"]
    assert seen.disk_free and seen.jax_device is None and not seen.nvml_error


def test_without_nvml_nvidia_smi_answers(root: Path) -> None:
    """Its module is optional."""
    seen = gather(root, nvml=raises(ModuleNotFoundError("pynvml")))
    assert (seen.driver, seen.card, seen.memory_free) == ("550.54", "NVIDIA GeForce RTX 4070", 11000 * MIB)
    assert (seen.watts_limit, seen.watts_default, seen.capability) == (150.0, 200.0, (8, 9)) and not seen.nvml_error


def test_which_card(root: Path) -> None:
    """CUDA_VISIBLE_DEVICES names it by number or by the beginning of its UUID; one that is not there is an error."""
    library = nvml(
        nvmlDeviceGetHandleByIndex=lambda i: i, nvmlDeviceGetName=lambda i: f"card\x1b[31m\n{i}", nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetUUID=lambda i: b"GPU-%d5-6" % i,
    )  # fmt: skip
    for visible, card in (
        ("1", "card [31m 1"),
        ("1,0", "card [31m 1"),
        ("GPU-15", "card [31m 1"),
        ("GPU-05-6", "card [31m 0"),
    ):
        assert gather(root, nvml=lambda: library, environ={"CUDA_VISIBLE_DEVICES": visible}).card == card
    absent = gather(root, nvml=lambda: library, smi=raises(OSError()), environ={"CUDA_VISIBLE_DEVICES": "GPU-9"})
    assert "no GPU is named GPU-9" in absent.nvml_error and not absent.card


NOTHING = [raises(NvmlError("x")), raises(OSError("x")), None, "", b"\xff", -1, float("nan"), object(), [None], {}]


@pytest.mark.parametrize("name", vars(nvml()))
def test_nvml_of_every_kind(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its functions raises, is missing, or returns nonsense: facts all the same, and JSON; so do readings."""
    monkeypatch.setattr(hardware, "nvidia_driver", lambda *_: True)
    monkeypatch.setattr(hardware, "_read_smi", lambda _: None)
    for odd in NOTHING:
        library = nvml() if name == "NVMLError" else nvml(**{name: odd})
        json.dumps(facts.as_json(gather(root, nvml=lambda library=library: library)), allow_nan=False)
        monkeypatch.setitem(sys.modules, "pynvml", library)
        meter = hardware.PowerMeter()
        meter.update()
    missing = nvml()
    delattr(missing, name)
    monkeypatch.setitem(sys.modules, "pynvml", missing)
    gather(root, nvml=lambda: missing)
    hardware.read_gpu()


@pytest.mark.parametrize(
    "sources",
    [
        {"smi": raises(OSError("gone")), "nvml": raises(NvmlError("Driver/library version mismatch"))},
        {"smi": lambda _: "", "nvml": raises(ImportError())}, {"smi": lambda _: "a,b,c,d,e,f,g", "nvml": raises(ImportError())},
        {"smi": lambda _: "[N/A], [N/A], nan, inf, -1, x, 8", "nvml": raises(ImportError())},
        {"packages": raises(RuntimeError("damaged"))}, {"requirements": raises(RuntimeError("damaged"))},
        {"requirements": lambda _: ["", ";;;", "jax", "nvidia-cudnn-cu12 (<10,>=9.8) ; extra == 'with-cuda'"]},
        {"probe": raises(OSError("fork"))}, {"environ": {"CUDA_VISIBLE_DEVICES": "GPU-77", "LD_LIBRARY_PATH": "::/no:/proc"}},
    ],
)  # fmt: skip
def test_broken_sources(sources: dict[str, Any], root: Path) -> None:
    """Whatever a source raises or returns costs its facts and no others."""
    seen = gather(root, **sources)
    assert seen.driver_loaded and seen.ram_total == 64 * MIB
    json.dumps(facts.as_json(seen), allow_nan=False)


def test_an_empty_machine(tmp_path: Path) -> None:
    """No /proc, no /sys: no driver, nothing known."""
    seen = gather(tmp_path, packages=dict)
    assert not seen.driver_loaded and not seen.nvidia_device and seen.ram_total is None and seen.card == ""


def test_a_card_without_its_driver(root: Path) -> None:
    """It is seen on the bus."""
    (root / "proc/driver/nvidia/version").unlink()
    assert gather(root).nvidia_device and not gather(root).driver_loaded


def test_libraries_before_jax_s_own(root: Path) -> None:
    """CUDA's in LD_LIBRARY_PATH, by name alone; those of WSL2's driver belong there."""
    for folder in ("cuda", "wsl/lib"):
        (root / folder).mkdir(parents=True)
        (root / folder / "libcudnn.so.8").touch()
    path = f"{root / 'cuda'}:{root / 'wsl/lib'}:/nowhere"
    assert gather(root, environ={"LD_LIBRARY_PATH": path}).library_path == ("libcudnn.so.8",)


def test_what_the_plugin_wants() -> None:
    """The bounds of its metadata, of the extra that brings CUDA's libraries, and no others."""
    wanted = facts.required([
        "jax-cuda12-pjrt==0.10.2", 'nvidia-cudnn-cu12<10.0,>=9.8; sys_platform == "linux" and extra == "with-cuda"',
        'pytest>=8; extra == "test"', "jax[cuda12]<0.13,>=0.10.2",
    ])  # fmt: skip
    assert wanted == {"jax-cuda12-pjrt": "==0.10.2", "nvidia-cudnn-cu12": "<10.0,>=9.8", "jax": "<0.13,>=0.10.2"}


def test_nothing_private(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Paths become their last part; user and host are left out; rates and versions stay."""
    monkeypatch.setenv("USER", "ada")
    monkeypatch.setattr("platform.node", lambda: "lovelace-pc")
    said = (
        "cannot open /mnt/ada/.cache/x/libcudnn.so.9: ada@lovelace-pc, 12 tokens/s, jax 0.10/0.11, ~/runs/mine 'C:/x'"
    )
    clean = facts.scrubbed(said)
    assert (
        "/mnt" not in clean and "ada" not in clean.replace("…", "") and "lovelace" not in clean and "runs" not in clean
    )
    assert "libcudnn.so.9" in clean and "12 tokens/s" in clean and "0.10/0.11" in clean
    error = gather(root, nvml=raises(NvmlError("no /mnt/ada/libnvidia-ml.so on lovelace-pc"))).nvml_error
    assert error == "no libnvidia-ml.so on …"


def test_jax_is_asked_in_a_process_that_may_die(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, silent for too long, ended with a traceback: one line each."""
    for code, said in {
        "import os; os.kill(os.getpid(), 9)": "was killed by signal 9", "import time; time.sleep(30)": "did not answer for 0 s",
        "raise RuntimeError('CUDA_ERROR_UNKNOWN')": "RuntimeError: CUDA_ERROR_UNKNOWN", "import sys; sys.exit(3)": "code 3",
        "import sys; sys.exit('RuntimeError: no cuda\\n' + '-' * 20 + '\\nFor simplicity, JAX has removed its internal frames')":
            "RuntimeError: no cuda",
    }.items():  # fmt: skip
        monkeypatch.setattr(facts, "PROBE", code)
        device, error = facts.ask_jax(0.4 if "sleep" in code else 60)
        assert device == "" and said in error, error


def test_every_fact_is_plain() -> None:
    """They go to JSON and back into a report."""
    types_of = {field.type for field in dataclasses.fields(facts.Facts)}
    assert types.ModuleType not in types_of
    assert facts.as_json(facts.Facts()) == {"nvidia_device": False, "driver_loaded": False, "wsl2": False}
