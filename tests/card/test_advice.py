"""Rules over tables of facts: the level, what is said, and that each line says what to do."""

from typing import Any

import pytest
from helpers.fake_card import GIB, GOOD, VERSIONS, facts

from nanojax.card import advice
from nanojax.card.advice import Line, Need
from nanojax.card.facts import Facts

NEED = Need("d32_4070", 10 * GIB, 8 * GIB, 4 * GIB)
BARE = Facts(versions={"jax": "0.10.2", "jaxlib": "0.10.2"}, driver_loaded=False)
CASES: list[tuple[Facts, str, str, str]] = [
    # facts, level, about, words
    (BARE, "ok", "card", "no NVIDIA GPU"),
    (Facts(nvidia_device=True), "problem", "card", "install NVIDIA's driver"),
    (facts(card=""), "warning", "card", "run nvidia-smi"),
    (facts(card="NVIDIA GeForce GT 9"), "warning", "card", "not a card that the planner knows"),
    (facts(visible=""), "problem", "card", "unset it"),
    (facts(visible="-1"), "problem", "card", "CUDA_VISIBLE_DEVICES"),
    (facts(card="", visible="7", nvml_error="Invalid Argument"), "problem", "card", "CUDA_VISIBLE_DEVICES=7 may name no GPU"),
    (facts(jax_error="Unknown flag in XLA_FLAGS: --xla_x=1"), "problem", "start", "unset XLA_FLAGS"),
    (facts(jax_error="Unknown backend nonsense", jax_platforms="nonsense"), "problem", "start", "names no device"),
    (facts(nvml_error="Driver/library version mismatch"), "problem", "driver", "restart the machine"),
    (facts(nvml_error="Unknown Error"), "warning", "driver", "does nvidia-smi work"),
    (facts(driver=""), "warning", "driver", "nvidia-smi shows it"),
    (facts(driver="510.108.03"), "problem", "driver", "update the driver"),
    (facts(driver="550.1", versions=VERSIONS | {"jax-cuda13-plugin": "0.10.2"}), "problem", "driver", "install nanojax[cuda12]"),
    (facts(capability=(5, 0)), "problem", "capability", "need 5.2"),
    (facts(capability=(7, 5)), "warning", "capability", "no flash attention"),
    (facts(capability=(12, 0)), "warning", "capability", "first compiles take long"),
    (facts(memory_free=2 * GIB), "warning", "memory", "close the programs"),
    (facts(display=True), "ok", "display", "0.3 to 1 GiB"),
    (facts(others=(("Xorg", 100 * 2**20), ("python", None))), "ok", "processes", "Xorg 0.1 GiB, python on this card"),
    (facts(others=(("game", 4 * GIB),)), "warning", "processes", "close what you can"),
    (facts(watts_limit=120.0), "warning", "power", "sudo nvidia-smi -pl 200"),
    (Facts(), "problem", "jax", "not installed"),
    (facts(versions=VERSIONS | {"jax": "0.13.0", "jaxlib": "0.13.0"}), "problem", "jax", "nanojax needs <0.13,>=0.10.2"),
    (facts(versions={"jax": "0.10.2", "jaxlib": "0.10.2"}), "problem", "jax", "pip install -e '.[cuda12]'"),
    (facts(versions=VERSIONS | {"jax-cuda12-plugin": "0.10.1"}), "problem", "jax", "does not fit jaxlib 0.10.2"),
    (facts(versions=VERSIONS | {"jax-cuda13-plugin": "0.10.2"}), "warning", "jax", "pip uninstall one of them"),
    (facts(jax_platforms="cpu"), "warning", "jax", "unset it to train there"),
    (facts(versions=VERSIONS | {"nvidia-cudnn-cu12": "9.1.0.70"}), "problem", "CUDA libraries", "9.1.0.70 (wanted <10.0,>=9.8)"),
    (facts(wanted={"nvidia-nccl-cu12": ">=2"}), "warning", "CUDA libraries", "nvidia-nccl-cu12 not installed"),
    (facts(library_path=("libcudnn.so.8",)), "warning", "LD_LIBRARY_PATH", "unset LD_LIBRARY_PATH"),
    (Facts(library_path=("libcudnn.so.8",)), "ok", "LD_LIBRARY_PATH", "does not load"),
    (Facts(jax_error="no backend", jax_platforms="cuda"), "problem", "start", "JAX_PLATFORMS=cuda, but there is no NVIDIA"),
    (facts(system_libraries=("libcudnn.so.8",)), "ok", "system CUDA", "jax takes its own"),
    (facts(versions=VERSIONS | {"torch": "2.9.1+cu128"}), "warning", "torch", "another environment"),
    (facts(versions=VERSIONS | {"tensorflow": "2.20"}), "warning", "tensorflow", "another environment"),
    (facts(wsl2=True, versions=VERSIONS | {"jax": "0.11.1"}), "warning", "WSL2", "XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async"),
    (facts(wsl2=True), "ok", "WSL2", ".wslconfig"),
    (facts(jax_error="CUDA_ERROR_UNKNOWN", wsl2=True), "problem", "start", "wsl --shutdown"),
    (facts(jax_error="CUDA_ERROR_UNKNOWN"), "problem", "start", "run nvidia-smi"),
    (facts(jax_device="cpu"), "problem", "start", "shows why"),
    (facts(jax_device="NVIDIA GeForce RTX 4070"), "ok", "start", "jax computes on NVIDIA"),
    (facts(ram_free=GIB), "warning", "RAM", "close other programs"),
    (facts(disk_free=GIB), "warning", "disk", "free space"),
    (facts(disk_free=2**20), "problem", "disk", "free space"),
    (facts(disk_files=12), "warning", "disk", "room for only 12 more files"),
    (facts(cache_writable=False), "warning", "cache", "set XDG_CACHE_HOME"),
]  # fmt: skip
FITS: list[tuple[Facts, str, str, str]] = [
    (facts(), "ok", "fits", "needs 10.0 GiB on the card, 10.8 GiB are free"),
    (facts(memory_free=None), "ok", "fits", "how much is free on one here is not known"),
    (facts(), "ok", "disk", "free for checkpoints of d32_4070"),
    (facts(), "ok", "RAM", "enough for a save of d32_4070"),
    (facts(memory_free=10 * GIB), "warning", "fits", "fewer residuals (8.0 GiB)"),
    (facts(memory_free=5 * GIB), "problem", "fits", "python -m nanojax.plan --config=d32_4070"),
    (facts(disk_free=10 * GIB), "warning", "disk", "choose --train.run on another disk"),
    (facts(disk_free=2 * GIB), "problem", "disk", "two checkpoints of 4.0 GiB"),
    (facts(ram_free=3 * GIB), "warning", "RAM", "copies 4.0 GiB to RAM"),
    (facts(ram_free=3 * GIB, wsl2=True), "warning", "RAM", ".wslconfig"),
]


@pytest.mark.parametrize(("seen", "level", "about", "words"), CASES, ids=[f"{c[2]}: {c[3]}" for c in CASES])
def test_rules(seen: Facts, level: str, about: str, words: str) -> None:
    """These facts give this line, once, of this level."""
    found = [line for line in advice.lines(seen) if words in line.text]
    assert [(line.level, line.about) for line in found] == [(level, about)], advice.lines(seen)


@pytest.mark.parametrize(("seen", "level", "about", "words"), FITS, ids=[c[3] for c in FITS])
def test_a_config_fits(seen: Facts, level: str, about: str, words: str) -> None:
    """The config's peak, its checkpoints and their copy in RAM, against what is free."""
    found = [line for line in advice.fits(seen, NEED) if words in line.text]
    assert [(line.level, line.about) for line in found] == [(level, about)], list(advice.fits(seen, NEED))


def test_a_healthy_machine_is_told_nothing() -> None:
    """The short form of a healthy card is empty; every rule has a line in some case above."""
    assert advice.worth_telling(advice.lines(GOOD, NEED)) == []
    told = {line.about for case in (*CASES, *FITS) for line in advice.lines(case[0], NEED)}
    assert {case[2] for case in CASES} <= told


def test_nothing_known_and_everything_odd() -> None:
    """Facts that say nothing, or nonsense, raise nothing."""
    odd: dict[str, Any] = {
        "driver": "n/a",
        "memory_free": 0,
        "memory_total": 0,
        "watts_limit": 0.0,
        "capability": (0, 0),
    }
    odd |= {"versions": {"jax": "dev", "jaxlib": "", "jax-cuda12-plugin": "x"}, "jax_wanted": "nonsense", "ram_free": 0}
    odd |= {"wanted": {"nvidia-cudnn-cu12": ">>9", "a": ""}, "others": (("", None),), "visible": ",,", "disk_free": 0}
    for seen in (Facts(), facts(**odd), Facts(driver_loaded=True), facts(driver="", driver_cuda=None)):
        assert all(isinstance(line, Line) and "\n" not in str(line) for line in advice.lines(seen, NEED))


@pytest.mark.parametrize(
    ("version", "bounds", "inside"),
    [
        ("9.28.0.42", "<10.0,>=9.8", True), ("9.7.1", "<10.0,>=9.8", False), ("10.0", "<10.0,>=9.8", False),
        ("0.10.2", "==0.10.2", True), ("0.10.2.1", "==0.10.2", False), ("0.10.2", "==0.10.*", True), ("12.9", ">=12.1.3.1", True),
        ("", ">=1", True), ("1.0", "", True), ("1.0", "nonsense", True), ("1.4", "~=1.2", True), ("2.0", "!=2.0", False),
    ],
)  # fmt: skip
def test_version_bounds(version: str, bounds: str, inside: bool) -> None:
    """As package metadata writes them; what cannot be read does not count against anyone."""
    assert advice.within(version, bounds) is inside
