"""What the trial chooses from answers that are made up, and its process: questions, answers, crashes."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fake_card import NO_MEMORY, asking, off, raises, slow

from nanojax import config as configs
from nanojax import config_files, step
from nanojax.card import memory, questions, trial
from nanojax.card.questions import Answer
from nanojax.config import Config
from nanojax.hardware import GIB
from nanojax.ops import attention, linear

Tiny = Callable[..., Config]
BOTH = ("default", "cuda_async")
BF16 = {"dtype": "bf16"}


def chosen(config: Config, trials: Any = asking()) -> trial.Found:
    with trials(config) as ask:
        return trial.choose(config, ask, BOTH)


def test_a_healthy_card_gets_what_is_fast(tiny: Tiny) -> None:
    """All three, one line; the answers are kept for the next run."""
    found = chosen(tiny(compute=BF16))
    assert found.choices == trial.FAST and found.allocator == "default" and len(found.lines) == 1 and found.lasting


def test_no_flash_attention_is_asked_for_where_cudnn_has_none(tiny: Tiny) -> None:
    """f32, and heads wider than 128."""
    for config in (tiny(), tiny(compute=BF16, model={"head_dim": 256, "width": 256})):
        asked: list[str] = []
        assert chosen(config, asking(asked=asked)).choices["attention"] == "chunked"
        assert not [question for question in asked if "cudnn" in question]


def test_the_best_one_alone_where_together_they_are_slower(tiny: Tiny) -> None:
    """Fused products alone are the fastest of the three; the others fall back, in one line."""
    found = chosen(tiny(compute=BF16), asking({"together": slow}))
    assert found.choices == {"rows": "xla", "attention": "chunked", "fused": "on"}
    assert found.lines == ("compute.rows=xla instead of pallas, compute.attention=chunked instead of cudnn: together they "
                           "are slower than the fastest of them alone",)  # fmt: skip


def test_by_hand_is_never_replaced(tiny: Tiny) -> None:
    """What is wrong, slow or not to be tried stays where it was asked for."""
    by_hand = tiny(compute=BF16 | {"rows": "pallas", "attention": "chunked", "fused": "on"})
    for faults in ({"pallas": off(3.0), "on": slow}, {"plain": raises(ValueError())}, {"together": off(3.0)}):
        found = chosen(by_hand, asking(faults))
        assert found.choices == {"rows": "pallas", "attention": "chunked", "fused": "on"}


def test_want_of_memory_does_not_last(tiny: Tiny) -> None:
    """Another program may have held it: the next run tries again. A wrong kernel stays wrong."""
    config = tiny(compute=BF16)
    assert not chosen(config, asking(refused=BOTH)).lasting
    assert not chosen(config, asking({"plain": raises(NO_MEMORY)})).lasting
    assert not chosen(config, asking({"cudnn": raises(NO_MEMORY)})).lasting
    assert chosen(config, asking({"cudnn": off(2.0)})).lasting
    assert chosen(config, asking(refused=("default",))).lasting


def test_memory_is_asked_for_each_time(tiny: Tiny) -> None:
    """What is known of the kernels stays; the allocator is the first that has the memory now."""
    known = trial.Found(trial.FAST, "cuda_async", ("allocator cuda_async instead of default: old", "kernels are right"))
    asked: list[str] = []
    with asking(refused=("cuda_async",), asked=asked)(tiny(compute=BF16)) as ask:
        found = trial.choose(tiny(compute=BF16), ask, ("cuda_async", "default"), known)
    assert (found.choices, found.allocator, found.lines[-1]) == (trial.FAST, "default", "kernels are right")
    assert len(found.lines) == 2 and "old" not in found.lines[0]
    assert asked == ["memory (cuda_async)", "memory (default)"]


# -- the process -------------------------------------------------------------------------------------------------------

ANSWERS = """
import json, os, sys
config = json.loads(sys.stdin.readline())
for line in sys.stdin:
    question = line.strip()
    if question == "crash":
        os.abort()
    if question == "garbage":
        print("]["); sys.stdout.flush(); continue
    if question == "other":
        question = "not this"
    why = f"{os.getpid()} {os.environ.get('XLA_PYTHON_CLIENT_ALLOCATOR')}"
    print(json.dumps({"question": question, "ok": question != "fails", "why": why}))
    sys.stdout.flush()
"""


def test_one_process_answers_until_it_fails(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same process for question after question; a new one after a failure of any kind, and for another allocator."""
    monkeypatch.delenv("XLA_PYTHON_CLIENT_ALLOCATOR", raising=False)
    with trial.asking(tiny(), (sys.executable, "-c", ANSWERS), 60) as ask:
        pid = lambda question, allocator="default": ask(question, allocator).why
        first = pid("a")
        assert pid("b") == first and first.endswith("None")
        for fatal in ("fails", "crash", "garbage", "other"):
            before = pid("a")
            assert not ask(fatal, "default").ok
            assert pid("a") != before
        assert "SIGABRT" in ask("crash", "default").why
        assert pid("a", "cuda_async").endswith("cuda_async") and pid("a").endswith("None")


def test_it_has_a_time_in_all(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that hangs costs IN_ALL, not that for each question."""
    monkeypatch.setattr(trial, "IN_ALL", 0.3)
    with trial.asking(tiny(), (sys.executable, "-c", "import time; time.sleep(60)"), 60) as ask:
        whys = [ask(question, "default").why for question in ("memory", "plain", "rows=pallas")]
    assert whys == ["no answer for 0 s"] * 3


@pytest.mark.slow
def test_the_real_process(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On this CPU: memory and plain XLA are there, row kernels fail as they do without a GPU, and it lives on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with trial.asking(tiny(compute=BF16)) as ask:
        assert "does not find the GPU" in ask("memory", "default").why
    with trial.asking(tiny(compute=BF16), (*trial.COMMAND, questions.ANY_DEVICE)) as ask:
        assert ask("memory", "default") == Answer("memory", True)
        plain = ask("plain", "default")
        assert plain.ok and plain.seconds and plain.seconds > 0
        assert not ask("rows=pallas", "default").ok
        assert ask("fused=off", "default").error == 0.0


# -- the answers -------------------------------------------------------------------------------------------------------


def test_two_layers_of_a_config(tiny: Tiny) -> None:
    """Its width, formats and microbatch; two layers, a vocabulary of at most 4,096, one microbatch, no other run's weights."""
    config = tiny(model={"depth": 5, "width": 96, "vocab": 9000, "seq": 64}, train={"microbatch": 3, "init": "x",
                  "tokens_per_step": 384}, compute={"loss_chunk": 192, "residuals": "auto"}, data={"kind": "conversations"},
                  stored={"blocks": "int8"})  # fmt: skip
    small = questions.two_layers(config)
    assert (small.model.L, small.model.D, small.model.V, small.batch_shape) == (2, 96, 4096, (1, 3, 65))
    assert (small.stored, small.data.kind, small.train.init, small.compute.residuals) == (
        config.stored,
        "text",
        "",
        "cheap",
    )


@pytest.mark.slow
def test_a_wrong_kernel_is_found_in_real_gradients(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers in int8: equal to themselves; bf16 attention stays within the bound, a norm or a window off does not."""
    small = questions.two_layers(
        tiny(
            compute=BF16 | {"forward": "int8", "dx": "int8", "dw": "int8", "head": "int8", "held": 2},
            stored={"blocks": "int8"},
        )
    )
    plain = questions.run_two_layers(small)
    assert np.isfinite(plain.loss) and plain.seconds > 0
    assert questions.apart_by(plain.sums, plain.sums) == 0.0
    exact, rows = attention.chunked, linear.by_rows
    monkeypatch.setattr(attention, "chunked", lambda w, s, q, k, v: exact(w, s, q, k, v + (v * 0.004).astype(v.dtype)))
    noisy = questions.run_two_layers(small)
    assert 0 < questions.apart_by(noisy.sums, plain.sums) < questions.GRADIENTS
    monkeypatch.setattr(attention, "chunked", lambda w, s, q, k, v: exact(4, s, q, k, v))
    narrow = questions.run_two_layers(small)
    assert questions.apart_by(narrow.sums, plain.sums) > questions.GRADIENTS
    monkeypatch.setattr(attention, "chunked", exact)
    monkeypatch.setattr(linear, "by_rows", lambda *a: tuple((y * 1.5).astype(y.dtype) if y.dtype == jnp.float32 else y
                                                            for y in rows(*a)))  # fmt: skip
    wrong = questions.run_two_layers(small)
    assert questions.apart_by(wrong.sums, plain.sums) > questions.GRADIENTS


def test_memory_is_that_of_the_state_and_the_residuals(tiny: Tiny) -> None:
    """One buffer for each array of the state, and one for the rest; taken, touched and given back."""
    config = tiny()
    sizes = memory.planned(config)
    state = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(step.abstract_state(config)))
    assert sum(sizes[:-1]) == state and sizes[-1] >= step.residual_bytes(config) + step.operand_bytes(config)
    memory.take(sizes[:-1])
    auto = configs.override(config, {"compute.residuals": "auto"})
    assert sum(memory.planned(auto)) <= sum(sizes)


@pytest.mark.long
@pytest.mark.parametrize(("name", "compiled"), [("d32_4070", 10.46), ("d24_2026_4070", 8.48), ("d28_4070", 8.3)])
def test_what_the_doctor_compares_is_what_is_compiled(name: str, compiled: float) -> None:
    """Before anything is compiled the peak is known to 2%, held operands included: a card that it fits has room for it."""
    assert memory.need(config_files.load(name)).peak / GIB == pytest.approx(compiled, rel=0.02)


def test_fewer_residuals_in_order(tiny: Tiny) -> None:
    """Down the planner's ladder from where the config is, to the first that fits; then the end of it, with a warning."""
    refusals = [NO_MEMORY, NO_MEMORY]

    def take(sizes: Any) -> None:
        if refusals:
            raise refusals.pop()

    class Compiled:
        def memory_analysis(self) -> Any:
            return type("Stats", (), dict.fromkeys(("argument_size_in_bytes", "output_size_in_bytes",
                        "alias_size_in_bytes", "temp_size_in_bytes"), 0))  # fmt: skip

    said: list[str] = []
    build = lambda config: Compiled()
    config = tiny(compute={"residuals": "all"})
    fitted, _, _ = memory.fitting(config, build, take, True, said.append)
    assert fitted.compute.residuals not in ("all", "cheap", "inputs") and len(said) == 2
    assert memory.fitting(config, build, raises(NO_MEMORY), False, said.append)[0] == config
    assert "training starts all the same" in said[-1]
    assert memory.fewer(tiny(compute={"residuals": "inputs"})) is None
