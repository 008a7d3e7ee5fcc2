"""machine.json: what a run measured beside the model, and that nothing private is in it."""

import dataclasses
import functools
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers.fake_card import facts

from nanojax import hardware
from nanojax.card import machine, traced
from nanojax.config import Config
from nanojax.plan import roofline
from nanojax.run import metrics

Tiny = Callable[..., Config]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A product, compiled for this CPU, which counts as a card that the planner knows."""
    card = dataclasses.replace(hardware.CARDS["rtx4070"], name=jax.devices()[0].device_kind)
    monkeypatch.setitem(hardware.CARDS, "here", card)
    return jax.jit(jnp.dot).lower(jnp.ones((256, 256)), jnp.ones((256, 256))).compile()


def test_measured_beside_modelled(tiny: Tiny, compiled: Any) -> None:
    """The modelled rate is the step's tokens over the roofline's seconds for the very program; the line has both."""
    config = tiny()
    out, lines = machine.compared(config, compiled, 1234.0)
    seconds = roofline.estimate(compiled.as_text(), hardware.CARDS["here"]).seconds
    assert out["modelled"]["tokens_per_s"] == pytest.approx(config.train.tokens_per_step / seconds)
    assert out["modelled"]["compiled_peak_bytes"] == 3 * 256 * 256 * 4
    assert out["measured"]["tokens_per_s"] == 1234.0 and len(lines) == 1
    assert lines[0].startswith("measured 1.23k tokens/s, modelled ") and "compiled peak 0.00 GiB" in lines[0]


@pytest.mark.long
def test_classes_of_kernels_from_a_trace(compiled: Any, tmp_path: Path) -> None:
    """Traced seconds come under the kinds of the model; a class has what its kernels took, per step."""
    with jax.profiler.trace(tmp_path):
        for step in range(2):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                compiled(jnp.ones((256, 256)), jnp.ones((256, 256))).block_until_ready()
    estimate = roofline.estimate(compiled.as_text(), hardware.CARDS["here"])
    found, steps = traced.kernels(traced.newest_trace(tmp_path))
    classes = traced.by_kind(tmp_path, estimate)
    assert steps == 2 and sum(of["measured"] for of in classes.values()) == pytest.approx(
        sum(k.ns for k in found) / 2e9
    )
    assert set(estimate.by_kind()) <= set(classes) and any(of["measured"] > 0 for of in classes.values())


def test_nothing_private_in_the_file(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the user's, the host's or a config's own name, and no path, wherever an error message brought them in."""
    monkeypatch.setenv("USER", "somebody")
    host = platform.node()
    config = dataclasses.replace(tiny(), name="my_secret_model")
    record = machine.described(config, facts()) | {
        "answers": [{"why": f"cannot open /mnt/somebody/x/lib.so on {host}"}]
    }
    machine.update(tmp_path, record | {"nested": [("~/data/mine", {"a": "/tmp/somebody"})]})
    text = (tmp_path / machine.FILE).read_text()
    for private in ("somebody", "/mnt", "my_secret_model", "~/", '"/tmp', *([host] if len(host) > 2 else [])):
        assert private not in text.replace("…", ""), private
    assert json.loads(text)["answers"][0]["why"].startswith("cannot open lib.so")
    assert json.loads(text)["config"]["depth"] == 2


def test_parts_are_replaced_and_damage_is_survived(tmp_path: Path) -> None:
    """An update keeps the other parts; a damaged file begins anew; one that cannot be written stops nothing."""
    machine.update(tmp_path, {"a": 1, "b": 2})
    machine.update(tmp_path, {"b": 3})
    assert machine.read(tmp_path) == {"a": 1, "b": 3}
    for damage in ("", "[1]", "{", "\udcff"):
        (tmp_path / machine.FILE).write_bytes(damage.encode(errors="surrogateescape"))
        assert machine.read(tmp_path) == {}
    machine.update(tmp_path, {"c": 1})
    assert machine.read(tmp_path) == {"c": 1}
    machine.update(Path("/proc/nowhere"), {"c": 1})


def test_a_report_needs_a_rate(tiny: Tiny, tmp_path: Path, compiled: Any) -> None:
    """Before a step is on record there is nothing to say; then the newest record's rate is said and kept."""
    said: list[str] = []
    report = functools.partial(machine.report, tiny(), tmp_path, compiled, said.append)
    report()
    assert said == [] and not (tmp_path / machine.FILE).exists()
    (tmp_path / metrics.FILE).write_text('{"kind": "train", "step": 1, "tokens_per_s": 99.0}\n')
    report()
    assert machine.read(tmp_path)["measured"]["tokens_per_s"] == 99.0 and "measured 99 tokens/s" in said[0]
