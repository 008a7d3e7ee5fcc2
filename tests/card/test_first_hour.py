"""The first hour on a card that nobody has tried: whatever is wrong with it, the run trains, and says so in one line."""

import contextlib
import functools
import json
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import fake_card, tiny_run
from helpers.fake_card import NO_MEMORY, XLA_FAILS, asking, card, facts, off, raises, slow

from nanojax import files, train, xla
from nanojax.card import machine, start, trial
from nanojax.card.questions import NO_GPU, Answer
from nanojax.card.start import Card
from nanojax.cli import UserError
from nanojax.run import exits, metrics, run_folder

home = tiny_run.home
compile_cache = tiny_run.compile_cache
pytestmark = pytest.mark.usefixtures("compile_cache")
SHORT = dict(compute__dtype="bf16", train__steps=2, eval__prompt="", eval__tokens=64, train__tensorboard=False)


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake_card.runs_on_the_cpu(monkeypatch)
    fake_card.allocators(monkeypatch)


def child(code: str, seconds: float = 60.0) -> Any:
    """The trial's real process, with this program in it."""
    return functools.partial(trial.asking, command=(sys.executable, "-c", code), seconds=seconds)


def wrong_check(_: Any, choice: str) -> Any:
    if choice == "rows":
        yield {"name": "int8 linear", "ok": False, "error": 0.3, "tolerance": 0.003}


KILLED = f"import os; input(); os.kill(os.getpid(), {int(signal.SIGSEGV)})"


class Fault(NamedTuple):
    """What is wrong, and the line that says so."""

    card: Card
    line: str


FAULTS = {
    # the doctor
    "NVML does not start": Fault(card(facts=lambda: facts(nvml_error="Unknown Error")), "NVML does not answer"),
    "driver changed while it ran": Fault(
        card(facts=lambda: facts(nvml_error="Driver/library version mismatch")), "restart"
    ),
    "facts raise": Fault(card(facts=raises(RuntimeError("broken"))), "could not be looked at (broken)"),
    "old driver": Fault(card(facts=lambda: facts(driver="510.47")), "510.47 is too old for jax-cuda12-plugin"),
    "torch beside it": Fault(
        card(facts=lambda: facts(versions=fake_card.VERSIONS | {"torch": "2.9.0"})), "torch: 2.9.0"
    ),
    "library path": Fault(card(facts=lambda: facts(library_path=("libcudnn.so.8",))), "unset LD_LIBRARY_PATH"),
    "old cuDNN": Fault(
        card(facts=lambda: facts(versions=fake_card.VERSIONS | {"nvidia-cudnn-cu12": "9.1.0"})), "9.1.0"
    ),
    "other programs": Fault(card(facts=lambda: facts(others=(("game", 3 * 2**30),))), "game 3.0 GiB on this card"),
    "power limit": Fault(card(facts=lambda: facts(watts_limit=100.0)), "limited to 100 W of 200"),
    "WSL2 with jax 0.11": Fault(
        card(facts=lambda: facts(wsl2=True, versions=fake_card.VERSIONS | {"jax": "0.11.1"})),
        "may fail to allocate 4 GiB",
    ),
    "no plugin": Fault(card(here=lambda: False, facts=lambda: facts(versions={"jax": "0.10.2"})), "has no CUDA plugin"),
    "every value odd": Fault(
        card(
            facts=lambda: facts(
                driver="", card="", capability=None, memory_total=None, memory_free=-1, watts_limit=None
            )
        ),
        "the driver does not say which GPU",
    ),
    # kernels
    "row kernels raise": Fault(
        card(asking({"pallas": raises(ValueError("no such layout"))})), "rows=xla instead of pallas"
    ),
    "row kernels do not compile": Fault(card(asking({"pallas": raises(XLA_FAILS)})), "ptxas exited"),
    "row kernels are wrong": Fault(
        card(asking({"pallas": off(1.5)})), "rows=xla instead of pallas: two layers' gradients"
    ),
    "row kernels give NaN": Fault(card(asking({"pallas": off(float("nan"))})), "rows=xla instead of pallas"),
    "a check fails": Fault(card(asking(checks=wrong_check)), "int8 linear: off by 0.3, at most 0.003"),
    "row kernels are slow": Fault(card(asking({"pallas": slow})), "rows=xla instead of pallas: pallas is 100% slower"),
    "no cuDNN": Fault(
        card(asking({"cudnn": raises(RuntimeError("cuDNN is not detected."))})), "attention=chunked instead of"
    ),
    "cuDNN is wrong": Fault(card(asking({"cudnn": off(0.5)})), "attention=chunked instead of cudnn: two layers"),
    "fused products do not compile": Fault(
        card(asking({"on": raises(IndexError("vector"))})), "fused=off instead of on"
    ),
    "fused products are slow": Fault(card(asking({"on": slow})), "fused=off instead of on: on is 100% slower"),
    "wrong only together": Fault(card(asking({"together": off(2.0)})), "attention=chunked instead of cudnn: two"),
    "plain XLA fails": Fault(card(asking({"plain": raises(XLA_FAILS)})), "the kernels could not be tried"),
    "the trial raises": Fault(card(raises(OSError("no process"))), "the card could not be tried (no process)"),
    "the trial is killed": Fault(card(child(KILLED)), "could not be tried (its process was killed by SIGSEGV)"),
    "the trial hangs": Fault(card(child("import time; time.sleep(60)", 0.2)), "could not be tried (no answer for 0 s)"),
    "the trial talks nonsense": Fault(card(child("print('hello', flush=True); input()")), "could not be tried"),
    "the trial does not start": Fault(
        card(functools.partial(trial.asking, command=("/no/python",))), "could not be tried"
    ),
    # memory
    "default allocator refuses": Fault(card(asking(refused=("default",))), "allocator cuda_async instead of default"),
    "both refuse": Fault(card(asking(refused=("default", "cuda_async"))), "fewer residuals may be needed"),
    "peak refused at the start": Fault(card(take=raises(NO_MEMORY)), "compute.residuals=inputs instead of"),
    "peak refused for good": Fault(card(take=raises(NO_MEMORY)), "training starts all the same"),
}
BY_DEFAULT = ("row kernels are wrong", "the trial is killed", "peak refused at the start")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in BY_DEFAULT else pytest.mark.slow) for n in FAULTS]
)  # fmt: skip
def test_a_fault_is_a_line_and_the_run_trains(
    name: str, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Each trains its 2 steps to exit 0, tells its line exactly once, and leaves choices that a CPU can read again."""
    fault, run = FAULTS[name], tmp_path / "run"
    config = tiny_run.load(home / "tiny.py", run, **SHORT)
    assert train.train(config, card=fault.card) == exits.DONE
    out = "".join(capfd.readouterr())
    lines = [line for line in out.splitlines() if fault.line in line]
    assert len(lines) == 1, out
    assert "Traceback" not in out
    assert [r["step"] for r in metrics.read(run, "train")] == [1, 2]
    if fault.card.here():
        record = json.loads((run / machine.FILE).read_text())
        chosen = run_folder.read_config(run).compute
        assert {key: getattr(chosen, key) for key in trial.FAST} == {key: record["choices"][key] for key in trial.FAST}
        assert "auto" not in record["choices"].values()


@pytest.mark.parametrize("key", ["rows", "attention"])
def test_choices_that_need_a_gpu(key: str, home: Path, tmp_path: Path) -> None:
    """Typed where there is none they are refused in one line, before there is a run folder."""
    config = tiny_run.load(home / "tiny.py", tmp_path / "run", **SHORT | {f"compute__{key}": trial.FAST[key]})
    with pytest.raises(UserError, match=f"--compute.{key}={trial.FAST[key]}: needs an NVIDIA GPU"):
        train.train(config, card=card(here=lambda: False))
    assert not (tmp_path / "run").exists()


def test_a_card_that_jax_does_not_find(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The trial tells that alone, not what would follow from it: no allocator, no residuals."""
    config = tiny_run.load(home / "tiny.py", tmp_path / "run", **SHORT)
    none = card(lambda config: contextlib.nullcontext(lambda question, _: Answer(question, False, NO_GPU)))
    assert start.begin(config, tmp_path / "run", none).config.compute.rows == "xla"
    out = capsys.readouterr().out
    assert (
        "the card could not be tried (jax does not find the GPU)" in out
        and "residuals" not in out
        and "allocator" not in out
    )


def test_there_are_thirty() -> None:
    """The bar: 30 faults of the first hour."""
    assert len(FAULTS) >= 30


@pytest.mark.long
def test_a_healthy_card(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is warned of; the fast choices are taken, kept for the next run, and on resume; measured after STEPS."""
    monkeypatch.setattr(machine, "STEPS", 2)
    asked: list[str] = []
    good = card(asking(asked=asked))
    config = tiny_run.load(home / "tiny.py", tmp_path / "run", **SHORT)
    assert train.train(config, card=good) == exits.DONE
    out = capsys.readouterr().out
    assert "warning" not in out and "problem" not in out and "two layers run 1.98 times as fast" in out
    assert "measured" in out and "cpu is not modelled" in out
    record = machine.read(tmp_path / "run")
    assert record["choices"] == {"rows": "pallas", "attention": "cudnn", "fused": "on", "allocator": "default"}
    assert record["measured"]["tokens_per_s"] > 0
    assert metrics.read(tmp_path / "run", "card")[0]["choices"] == record["choices"]
    together = "rows=pallas+attention=cudnn+fused=on"
    assert asked == [f"{q} (default)" for q in ("memory", "plain", *together.split("+"), together)]

    asked.clear()  # another run: from the cache
    assert train.train(tiny_run.load(home / "tiny.py", tmp_path / "second", **SHORT), card=good) == exits.DONE
    assert asked == ["memory (default)"]
    assert tiny_run.records_of(tmp_path / "run") == tiny_run.records_of(tmp_path / "second")


@pytest.mark.long
def test_a_resumed_run_keeps_its_choices(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Whatever the cache says by now; and bit for bit, without a line of other rounding."""
    load = functools.partial(tiny_run.load, home / "tiny.py", tmp_path / "run", **SHORT, optim__warmdown=0)
    assert train.train(load(), card=card(asking({"pallas": slow}))) == exits.DONE
    (cached,) = (tmp_path / "cache" / "nanojax" / "card").iterdir()
    table = json.loads(cached.read_text())
    assert table["choices"]["rows"] == "xla"
    table["choices"] |= {"rows": "pallas", "attention": "chunked"}
    files.write_json(cached, table)
    capsys.readouterr()
    on = load(train__steps=3, train__extend=2)
    asked: list[str] = []
    assert train.train(on, card=card(asking(asked=asked))) == exits.DONE
    assert asked == ["memory (default)"]
    out = capsys.readouterr().out
    assert "compute.rows=xla stays, as the run began" in out and "not bit for bit" not in out
    chosen = run_folder.read_config(tmp_path / "run").compute
    assert (chosen.rows, chosen.attention) == ("xla", "cudnn")
    assert metrics.read(tmp_path / "run", "rounding") == []


@pytest.mark.slow
def test_a_run_of_a_gpu_goes_on_without_one(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU its checkpoints load, and it trains on, and is told that this rounds otherwise; ops are the real ones."""
    config = tiny_run.load(home / "tiny.py", tmp_path / "run", **SHORT, optim__warmdown=0)
    assert train.train(config, card=card()) == exits.DONE
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    on = tiny_run.load(
        home / "tiny.py", tmp_path / "run", **SHORT | {"train__steps": 3}, optim__warmdown=0, train__extend=2
    )
    assert train.train(on) == exits.DONE
    (record,) = metrics.read(tmp_path / "run", "rounding")
    assert record["changed"].keys() == {"compute.rows", "compute.attention"}


def test_a_damaged_cache_is_ignored(home: Path, tmp_path: Path) -> None:
    """Cut, empty, of another kind, with choices that are none: as if it were not there."""
    sound = {"choices": dict(trial.FAST), "allocator": "default", "lines": [], "answers": []}
    path = tmp_path / "choices.json"
    path.write_text(json.dumps(sound))
    assert start.load(path) == trial.Found(dict(trial.FAST))
    half = json.dumps(sound)[:50]
    wrong = [
        sound | {"choices": {"rows": "xla"}},
        sound | {"choices": trial.FAST | {"rows": "auto"}},
        sound | {"lines": 3},
    ]
    wrong += [
        sound | {"allocator": "none"},
        sound | {"answers": [{"x": 1}]},
        sound | {"choices": trial.FAST | {"rows": []}},
    ]
    for damage in ("", "{", "[]", "null", half, "\udcff", "[" * 99999, *map(json.dumps, wrong)):
        path.write_bytes(damage.encode(errors="surrogateescape"))
        assert start.load(path) is None, damage[:80]
    assert start.load(tmp_path) is None and start.load(tmp_path / "nothing") is None


@pytest.mark.slow
def test_a_damaged_cache_is_mended(home: Path, tmp_path: Path) -> None:
    """The trial is made again, and writes it anew."""
    asked: list[str] = []
    config = tiny_run.load(home / "tiny.py", tmp_path / "run", **SHORT)
    path = xla.user_cache() / "card" / f"{start.key(config, facts())}.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert train.train(config, card=card(asking(asked=asked))) == exits.DONE
    assert asked and json.loads(path.read_text())["choices"]["rows"] == "pallas"


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A warning, and the choices hold for this run."""
    (tmp_path / "cache").write_text("a file")
    assert train.train(tiny_run.load(home / "tiny.py", tmp_path / "run", **SHORT), card=card()) == exits.DONE
    assert "the choices are not kept for the next run" in capsys.readouterr().out


@pytest.mark.slow
def test_what_was_set_by_hand_stays(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A kernel that fails is a warning then; plain forms are not even asked about; typed residuals are not lowered."""
    asked: list[str] = []
    broken = card(asking({"pallas": raises(XLA_FAILS)}, asked=asked), take=raises(NO_MEMORY))
    by_hand = {"compute__rows": "pallas", "compute__fused": "off", "compute__residuals": "all"}
    config = tiny_run.load(home / "tiny.py", tmp_path / "run", **SHORT, **by_hand)
    assert train.train(config, frozenset({"compute.residuals"}), broken) == exits.DONE
    out = capsys.readouterr().out
    assert "compute.rows=pallas, set by hand, fails here" in out and "training starts all the same" in out
    chosen = run_folder.read_config(tmp_path / "run").compute
    assert (chosen.rows, chosen.attention, chosen.fused, chosen.residuals) == ("pallas", "cudnn", "off", "all")
    assert not [question for question in asked if "fused" in question]


@pytest.mark.slow
def test_lowered_residuals_are_found_again(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A run that had to go down to fewer goes on with them, by the same command, and says nothing of other rounding."""
    load = functools.partial(tiny_run.load, home / "tiny.py", tmp_path / "run", optim__warmdown=0)
    assert train.train(load(**SHORT), card=card(take=raises(NO_MEMORY))) == exits.DONE
    assert run_folder.read_config(tmp_path / "run").compute.residuals == "inputs"
    capsys.readouterr()
    assert train.train(load(**SHORT | {"train__steps": 3}, train__extend=2), card=card()) == exits.DONE
    assert "not bit for bit" not in capsys.readouterr().out
    assert run_folder.read_config(tmp_path / "run").compute.residuals == "inputs"


@pytest.mark.slow
def test_mistakes_come_before_the_trial(home: Path, tmp_path: Path) -> None:
    """Data that is not there and a folder of another run are told before minutes are spent on the card."""
    never = card(raises(AssertionError("asked")), facts=raises(AssertionError("looked")))
    with pytest.raises(UserError, match="gone"):
        train.train(
            tiny_run.load(home / "tiny.py", tmp_path / "run", **SHORT, data__path=tmp_path / "gone"), card=never
        )
    assert train.train(tiny_run.load(home / "tiny.py", tmp_path / "run", **SHORT), card=card()) == exits.DONE
    with pytest.raises(UserError, match="other settings"):
        train.train(tiny_run.load(home / "tiny.py", tmp_path / "run", **SHORT, model__depth=1), card=never)
