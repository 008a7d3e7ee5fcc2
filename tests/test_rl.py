"""Reinforcement learning: its gradient against numpy, what is masked and skipped, exact resume, tasks, mistakes."""

import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import chat_tasks, tiny_run
from helpers.paths import ROOT
from oracles import numpy_gpt

from nanojax import questions, rl, rollouts, status, train
from nanojax import step as steps
from nanojax.cli import UserError
from nanojax.config import Config, Rollouts, override
from nanojax.engine.choose import Choice
from nanojax.engine.generate import Calculator
from nanojax.questions import Question
from nanojax.rollouts import Rollout
from nanojax.run import exits, metrics, records, run_folder
from nanojax.step import optim
from nanojax.tokenizer import Tokenizer

compile_cache = tiny_run.compile_cache
home = tiny_run.home
TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])
TASK = '''"""Answers are to have the letter e."""


def questions():
    return [{"question": f"say {i}", "number": i} for i in range(24)]


def reward(question, answer):
    return min(1.0, answer.count("e") / 3) + (question["number"] < 0)
'''


def of_kind(tiny: Any, kind: str = "rollouts", depth: int = 2) -> Config:
    """A model whose steps are 3 groups of 4 rows of 48 tokens, for the tokenizer of single bytes."""
    return tiny(
        model={"seq": 64 if kind == "rollouts" else 48, "vocab": 280, "depth": depth},
        compute={"loss_chunk": 32},
        data={"kind": kind},
        train={"microbatch": 2, "tokens_per_step": 3 * 4 * 48, "init": "x"},
        rl={"questions": 3, "samples": 4, "tokens": 30, "row": 48, "rows": 4},
    )


def random_params(config: Config) -> Any:
    return jax.tree.map(jnp.asarray, numpy_gpt.random_params(3, config.model, std=0.5))


def called(tokens: list[int]) -> list[bool]:
    """Which tokens of an answer the model chose, by another way than the decoder's: behind an expression comes its result."""
    opens, closes, before, after = (
        TOKENIZER.special(f"<|{n}|>") for n in ("python_start", "python_end", "output_start", "output_end")
    )
    chosen, inside, left = [], False, 0
    for i, token in enumerate(tokens):
        chosen.append(not left)
        left = max(0, left - 1)
        if chosen[-1]:
            if inside and token == closes:
                assert tokens[i + 1 : i + 5] == [before, *b"12", after][: len(tokens) - i - 1]
                left = 4
            inside = token == opens or (inside and token != closes)
    return chosen


@pytest.mark.long
def test_the_gradient_is_the_oracles(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one step, prompts and results of the calculator masked, the end trained: each weight's to 1e-5 of its largest value.

    The answers are drawn from a random model that calls the calculator often enough, since every expression has the result
    12 here. The oracle takes each answer alone, without padding, and knows which tokens were chosen from the text alone.
    """
    config = of_kind(tiny)
    params = random_params(config)
    opens, closes = TOKENIZER.special("<|python_start|>"), TOKENIZER.special("<|python_end|>")
    params["head"] = params["head"].at[opens].mul(8).at[closes].mul(8)
    monkeypatch.setattr(rollouts, "Calculator", lambda t, rows: Calculator(t, rows, lambda expression: "12"))
    asked = [
        Question([TOKENIZER.bos, *b"ask" * n], "", lambda reply: float(len(reply.whole.encode()) % 5))
        for n in (1, 4, 2)
    ]
    asked[1] = asked[1]._replace(reward=lambda reply: 0.5)  # its group is skipped
    numbers = np.array([5, 0, 2])
    ask = lambda: rollouts.learn(config, params, TOKENIZER, dict(zip(numbers, asked)), numbers, 7, lambda: None)  # pyright: ignore
    batch, told = ask()
    assert batch is not None and batch.weights is not None
    keys = lambda q, s: rollouts._keys(rollouts.TRAINING, 7, q, s)
    groups = rollouts.write(config, params, TOKENIZER, asked, numbers, 4, Choice(1.0), keys, lambda: None)
    rewards = rollouts.rewards(TOKENIZER, asked, groups)
    texts = [[rollout.tokens.tolist() for rollout in group] for group in groups]
    chosen = [[called(tokens) for tokens in group] for group in texts]
    assert chosen == [[rollout.chosen.tolist() for rollout in group] for group in groups]
    assert sum(not each for group in chosen for answer in group for each in answer) >= 8  # some were forced
    assert told["skipped"] == pytest.approx(1 / 3) and rewards[0].std() > 0 and rewards[2].std() > 0

    expected: Any = jax.tree.map(lambda a: np.zeros(a.shape), params)
    count = sum(sum(answer) for group in (0, 2) for answer in chosen[group])
    for group in (0, 2):
        for tokens, mask, reward in zip(texts[group], chosen[group], rewards[group]):
            row = np.array([asked[group].prompt + tokens])
            targets = np.where([False] * len(asked[group].prompt) + mask, row, -1)
            _, grads = numpy_gpt.loss_and_grads(
                params, row[:, :-1], targets[:, 1:], config
            )  # of the mean over the mask
            share = (reward - rewards[group].mean()) * sum(mask) / count
            expected = jax.tree.map(lambda a, g, share=share: a + share * g, expected, grads)

    accum = jax.jit(steps.init_state, static_argnums=0)(of_kind(tiny, "conversations")).accum
    add = jax.jit(steps.forward_backward, static_argnums=0)
    for i in range(config.microbatches):
        _, accum = add(config, params, accum, batch.tokens[i], batch.weights[i], {}, jax.random.key(0))
    found = {name: accum[name] for name in ("embed", "head")}
    assert set(found) == set(expected) - {"blocks"}
    for i, block in enumerate(expected["blocks"]):
        expected |= {f"{name} {i}": g for name, g in block.items()}
        found |= {f"{name} {i}": accum[name][i] for name in block}
    for name, ours in found.items():
        bound = 1e-5 * np.abs(expected[name]).max()
        assert bound > 0
        np.testing.assert_allclose(ours, expected[name], rtol=0, atol=bound, err_msg=name)


@pytest.mark.long
def test_the_step_is_the_same_without_accumulators_between_steps(tiny: Any) -> None:
    """The state of rollouts has none; its step is that of conversations with the same batch."""
    config, other = of_kind(tiny, depth=1), of_kind(tiny, "conversations", depth=1)
    rng = np.random.default_rng(0)
    shape = config.batch_shape
    assert shape == other.batch_shape
    weights = rng.normal(size=(*shape[:2], shape[2] - 1)).astype(np.float32) / 500
    batch = steps.Batch(jnp.asarray(rng.integers(0, 280, shape, np.int32)), jnp.asarray(weights - weights.mean()))
    states = [jax.jit(steps.init_state, static_argnums=0)(c) for c in (config, other)]
    assert states[0].accum == {} and states[1].accum
    (a, told), (b, plain) = (
        jax.jit(steps.train_step, static_argnums=0)(c, state, batch) for c, state in zip((config, other), states)
    )
    assert a.accum == {} and told.keys() == plain.keys()
    assert float(told["grad_norm"]) == pytest.approx(float(plain["grad_norm"]), rel=1e-5) and told["grad_norm"] > 0
    for ours, theirs in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_weights_of_a_step(tiny: Any) -> None:
    """Worked by hand: 5 chosen tokens of one group with rewards 1, 0, 0, 1; a group without a difference; an unfinished one."""
    config = of_kind(tiny)
    answer = lambda tokens, chosen: Rollout(np.array(tokens), np.array(chosen, bool), True)
    group = [answer([7, 8], [1, 1]), answer([9], [1]), answer([4, 5, 6], [1, 0, 0]), answer([3], [1])]
    same = [answer([2], [1])] * 4
    rewards = np.array([[1, 0, 0, 1], [0.5] * 4, [0] * 4])
    batch = rollouts.batch_of(config, 1, [[10, 11], [12], [13]], [group, same, same], rewards)
    assert batch is not None and batch.weights is not None
    tokens, weights = batch.tokens.reshape(12, -1), np.asarray(batch.weights.reshape(12, -1))
    assert tokens[2].tolist() == [10, 11, 4, 5, 6] + [1] * 44 and tokens[4, :3].tolist() == [12, 2, 1]
    expected = np.zeros((12, 48))
    expected[0, 1:3] = expected[3, 1] = 0.5 / 5
    expected[1, 1] = expected[2, 1] = -0.5 / 5
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert rollouts.batch_of(config, 1, [[10]] * 3, [same] * 3, np.ones((3, 4))) is None


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    """Counted over all subsets of k of the n answers; a reward of at least 1 is right."""
    rng = np.random.default_rng(1)
    rewards = (rng.random((7, 6)) < 0.4) * 1.0 + (rng.random((7, 6)) < 0.3) * 0.5
    found = rollouts.passes(rewards)
    assert list(found) == ["pass_1", "pass_2", "pass_4"]
    for k in (1, 2, 4):
        subsets = [
            any(row[i] >= 1 for i in chosen) for row in rewards for chosen in itertools.combinations(range(6), k)
        ]
        assert found[f"pass_{k}"] == pytest.approx(np.mean(subsets))


@pytest.mark.long
def test_what_is_drawn_depends_on_seed_step_question_and_sample_alone(tiny: Any) -> None:
    """Not on how many answers are written together nor on the other questions; another step, seed or sample draws anew."""
    config = of_kind(tiny, depth=1)
    params = random_params(config)
    asked = [Question([TOKENIZER.bos, *b"what"], "", lambda _: 0.0)] * 3

    def drawn(rows: int, numbers: list[int], step: int = 1, seed: int = 5) -> Any:
        c = override(config, {"rl.rows": rows})
        keys = lambda q, s: rollouts._keys(seed, step, q, s)
        found = rollouts.write(
            c, params, TOKENIZER, asked[: len(numbers)], np.array(numbers), 4, Choice(1.0), keys, lambda: None
        )
        return [[rollout.tokens.tolist() for rollout in group] for group in found]

    first = drawn(4, [3, 1, 2])
    assert drawn(8, [3, 1, 2]) == first and drawn(2, [1, 3]) == [first[1], first[0]]
    assert len({str(answer) for group in first for answer in group}) > 10
    assert drawn(4, [3, 1, 2], step=2) != first != drawn(4, [3, 1, 2], seed=6)


def test_schedules(tiny: Any) -> None:
    """A twentieth of the base's rates to 0 from the first step on: in a line, or as half a cosine."""
    for decay, form in (("linear", lambda x: 1 - x), ("cosine", lambda x: 0.5 + 0.5 * np.cos(np.pi * x))):
        config = tiny(optim={"decay": decay, "warmdown": 1.0, "peak_lr": 0.05, "final_lr": 0.0}, train={"steps": 40})
        rate, _ = optim.schedules(config)
        np.testing.assert_allclose(rate(np.arange(40)), 0.05 * form(np.arange(40) / 40), rtol=1e-5, atol=1e-9)


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right answers earn 1, wrong ones 0; held-out questions are not among those trained on; long ones are left out."""
    monkeypatch.setattr(questions, "GENERATED", 500)
    rows = {"gsm8k": [*chat_tasks.ROWS["gsm8k"]]}
    source = chat_tasks.write(tmp_path, rows)
    train_rows = [{"question": f"And {i}?", "answer": f"<<{i}+1={i + 1}>>so\n#### {i + 1}"} for i in range(20)]
    (source / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train_rows))
    options = Rollouts(source=str(source), words=str(source / "words.txt"))
    reply = lambda text: rollouts.grade.Reply(text, (text,))
    for task, count in (("gsm8k", 20), ("arithmetic", 450), ("spelling", 100)):
        found = questions.load(task, options, TOKENIZER, 100)
        assert len(found.train) >= count and found.left_out == 0 and found.longest <= 100
        assert not {q.text for q in found.train} & {q.text for q in found.held_out}
        assert found.sha256 == questions.load(task, options, TOKENIZER, 100).sha256
        first = found.train[0]
        assert first.reward(reply("I do not know")) == 0
        assert first.prompt[-1] == TOKENIZER.special("<|assistant_start|>")
    gsm8k = questions.load("gsm8k", options, TOKENIZER, 100)
    by_text = {q.text: q for q in (*gsm8k.train, *gsm8k.held_out)}
    assert (
        by_text["And 3?"].reward(reply("so\n#### 4")) == 1
        and by_text["What is 2+1000?"].reward(reply("#### 1,002")) == 1
    )
    with pytest.raises(UserError, match="all its questions to train on are longer than 5 tokens"):
        questions.load("gsm8k", options, TOKENIZER, 5)
    order = questions.Order("gsm8k", gsm8k, 6, seed=1)
    numbers = [int(order[i]) for i in range(36)]
    for first in range(0, 36, 18):  # three steps of six make a pass; two of the twenty are left out
        assert len(set(numbers[first : first + 18])) == 18 and max(numbers) < 20
    assert numbers[:18] != numbers[18:]


def test_a_file_of_the_users(tmp_path: Path) -> None:
    """The example of docs/rl.md: its questions, and rewards from the sandbox; every tenth question is held out."""
    page = (ROOT / "docs" / "rl.md").read_text()
    (example,) = (part.split("```")[0] for part in page.split("```python\n")[1:])
    assert len(example.strip().splitlines()) <= 20
    path = tmp_path / "mine.py"
    path.write_text(example)
    found = questions.load(str(path), Rollouts(questions=2), TOKENIZER, 200)
    assert len(found.held_out) == math.ceil((len(found.train) + len(found.held_out)) / 10)
    question = found.train[0]
    reply = lambda text: rollouts.grade.Reply(text, (text,))
    number = int(question.text.rsplit("times ")[1].rstrip("."))
    assert question.reward(reply(f"lambda x: x * {number}")) == 1
    assert question.reward(reply("lambda x: x")) == 0 and question.reward(reply("import os; os.abort()")) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def questions():\n    return ['a'] * 30\n", "mine.py: reward is missing; a task needs questions"),
        ("raise RuntimeError('no\\nway')\n", "RuntimeError: no;"),
        ("def questions():\n    return [3]\n\ndef reward(question, answer):\n    return 1\n", "question 0 is 3"),
        (
            "def questions():\n    return ['a'] * 30\n\ndef reward(question, answer):\n    return 1 / 0\n",
            "ZeroDivisionError",
        ),
        (
            "def questions():\n    return ['a'] * 30\n\ndef reward(question, answer):\n    return 'x'\n",
            "reward returned 'x'; it must be a number",
        ),
        ("def questions():\n    return ['a'] * 30\n\ndef reward(q, a):\n    return float('nan')\n", "must be finite"),
        ("def questions():\n    return ['a'] * 9\n\ndef reward(q, a):\n    return 1\n", "lower --rl.questions"),
        ("def questions():\n    return []\n\ndef reward(q, a):\n    return 1\n", "returned no question"),
        ("import sys\nsys.exit(3)\n", "SystemExit"),
        ("def questions():\n    raise SystemExit(0)\n\ndef reward(q, a):\n    return 1\n", "SystemExit: 0"),
        ("def questions():\n    return ['a'] * 30\n\ndef reward(q, a):\n    raise SystemExit(0)\n", "SystemExit: 0"),
        (
            "def questions():\n    return ['a'] * 30\n\ndef reward(q, a):\n    raise BaseException('b')\n",
            "Exception: b",
        ),
        ("def questions():\n    return ['a'] * 30\n\nreward = 1\n", "reward is not a function"),
        ("def questions():\n    return ['a'] * 30\n\ndef reward(q, a):\n    pass\n", "reward returned None"),
        ("def questions():\n    return ['a'] * 30\n\ndef reward(q, a):\n    return '1'\n", "reward returned '1'"),
        (
            "def questions():\n    return 'a'\n\ndef reward(q, a):\n    return 1\n",
            r"questions\(\) returned 'a'; it must",
        ),
        ("def questions():\n    pass\n\ndef reward(q, a):\n    return 1\n", r"questions\(\) returned None; it must"),
        ("def questions():\n    return ['a' * 99] * 30\n\ndef reward(q, a):\n    return 1\n", "are longer than 100"),
        ("def questions():\n    return ['a']\n\ndef reward(q, a):\n    return 1\n", "give more of them"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path: Path, text: str, said: str) -> None:
    """Each names the file and what is wrong in it, when it is loaded."""
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        questions.load(str(path), Rollouts(), TOKENIZER, 100)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(home: Path, compile_cache: Path) -> Path:
    """A base run of 12 steps that writes text, and task.py."""
    train.train(tiny_run.load(home / "tiny.py", home / "base", model__seq=64))
    (home / "task.py").write_text(TASK)
    return home / "base"


KEYS = ("--rl.questions=4", "--rl.samples=4", "--rl.tokens=12", "--rl.rows=8", "--rl.held_out=2", "--rl.held_out_samples=2",
        "--train.steps=6", "--checkpoint.every=2", "--eval.every=3", "--optim.peak_lr=1")  # fmt: skip


def wish(base: Path, out: Path, *overrides: str) -> rl.Wish:
    return rl.Wish(str(base), str(base.parent / "task.py"), str(out), 1.0, None, overrides)


@pytest.fixture(scope="module")
def whole(base: Path) -> Path:
    """A run of six steps that nothing disturbed."""
    assert train.train(rl.config_of(wish(base, base.parent / "whole", *KEYS))) == exits.DONE
    return base.parent / "whole"


@pytest.mark.long
def test_a_run_says_what_it_did(whole: Path) -> None:
    """Rewards, lengths, shares and pass@k of every step; greedy accuracy of held-out questions before the first and after."""
    records = metrics.read(whole, "train")
    assert [r["step"] for r in records] == list(range(1, 7))
    for r in records:
        assert {"reward", "pass_1", "pass_2", "pass_4", "skipped", "unfinished", "length", "lr"} <= r.keys() or r[
            "skipped"
        ] == 1
        assert 0 <= r["reward"] <= 1 and 0 <= r["skipped"] <= 1 and 1 <= r["length"] <= 12
    evals = metrics.read(whole, "eval")
    assert [r["step"] for r in evals] == [0, 3, 6]
    assert all({"accuracy", "low", "high", "pass_1", "pass_2", "questions"} <= r.keys() for r in evals)
    assert [r["from"] for r in metrics.read(whole, "init")] == [str(whole.parent / "base")]
    config = run_folder.read_config(whole)
    assert config.row == 64 and config.train.tokens_per_step == 4 * 4 * 64 and config.batch_shape == (8, 2, 65)


@pytest.mark.long
def test_status_tells_rewards_and_no_unknown_loss(whole: Path, tmp_path: Path) -> None:
    """Of a newest step whose answers all earned the same, too, which has no loss."""
    run = shutil.copytree(whole, tmp_path / "run")
    lines = (run / records.FILE).read_text().splitlines()
    table = [json.loads(line) for line in lines]
    table = [{k: v for k, v in r.items() if k != "loss" or r["kind"] != "train"} for r in table]
    (run / records.FILE).write_text("".join(json.dumps(r) + "\n" for r in table))
    shown = status.table(status.status(run), time.time())
    assert "reward" in shown and "held-out questions right" in shown and "unknown" not in shown


def spawned(out: Path, cache: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    given = [f"--run={out.parent / 'base'}", f"--task={out.parent / 'task.py'}", f"--out={out}", *KEYS]
    command = [sys.executable, "-m", "nanojax.rl", *given]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.long
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_point_it_ends_as_undisturbed(whole: Path, compile_cache: Path, kills: int) -> None:
    """kill -9 at random moments, the first ones from the loop's begin on: the same parameters, optimizer and records."""
    out, rng = whole.parent / f"killed{kills}", random.Random(kills)
    for number in range(kills):
        process = spawned(out, compile_cache)
        before = len(metrics.read(out, "start"))
        if number % 2 == 0:  # in the loop: during answers, a step, a save or an evaluation
            tiny_run.wait_for(process, lambda before=before: len(metrics.read(out, "start")) > before)
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.communicate()
    assert train.train(rl.config_of(wish(whole.parent / "base", out, *KEYS))) == exits.DONE
    tiny_run.assert_same_run(whole, out)


@pytest.mark.long
def test_stopped_in_the_middle_of_answers_it_resumes(whole: Path) -> None:
    """SIGTERM while a step's answers are written: they are given up, what is done is saved, the base run is needed no more."""
    base, out = whole.parent / "base", whole.parent / "stopped"
    thread = tiny_run.stop_after(out, 3)
    assert train.train(rl.config_of(wish(base, out, *KEYS))) == exits.STOPPED
    thread.join()
    base.rename(base.parent / "away")
    try:
        assert train.train(rl.config_of(wish(base, out, *KEYS))) == exits.DONE
    finally:
        (base.parent / "away").rename(base)
    tiny_run.assert_same_run(whole, out)


@pytest.mark.long
def test_mistakes_are_told_before_anything_compiles(base: Path, tmp_path: Path) -> None:
    """No base, no task, sizes that do not fit, wrong keys, another's folder: one line each, and nothing is left behind."""
    out = tmp_path / "out"

    def says(text: str, asked: rl.Wish) -> None:
        with pytest.raises(UserError, match=text):
            train.train(rl.config_of(asked))
        assert not out.exists()

    says("not a run folder", wish(base.parent / "none", out))
    says("neither a task", wish(base, out, *KEYS)._replace(task="sums"))
    says("neither a task", wish(base, out, *KEYS)._replace(task=str(tmp_path / "none.py")))
    says("in 64 tokens", wish(base, out, "--rl.tokens=64"))
    says("rows of --rl.row=5 tokens", wish(base, out, "--rl.row=5", "--rl.tokens=16"))
    for key in ("rl.questions", "rl.samples", "rl.rows", "rl.row", "rl.tokens", "train.microbatch"):
        says(f"{key}.*must be", wish(base, out, f"--{key}=-4"))
        says(f"{key}.*must be", wish(base, out, f"--{key}=0"))
    says("lower --rl.questions", wish(base, out, "--rl.tokens=12", "--rl.questions=100"))
    says("longer than the model's sequence", wish(base, out, "--rl.tokens=12", "--rl.row=128", *KEYS[:2]))
    says("must be greater than 1", wish(base, out, "--rl.tokens=12", "--rl.samples=1"))
    says("no such key", wish(base, out, "--rl.sample=2"))
    says("omit it", wish(base, out, *KEYS[:4], "--train.tokens_per_step=4096"))
    says(r"model.depth is 2, here 3", wish(base, out, *KEYS, "--model.depth=3"))
    says("has neither default/train|has neither main/train", wish(base, out, *KEYS)._replace(task="gsm8k"))
    with pytest.raises(UserError, match="is the base run's folder"):
        rl.parse([f"--run={base}", "--task=x", f"--out={base}/"])
    with pytest.raises(UserError, match="not a number above 0"):
        rl.parse([f"--run={base}", "--task=x", "--out=y", "--epochs=0"])


@pytest.mark.long
def test_a_run_that_has_begun_keeps_its_settings(whole: Path) -> None:
    """Another task, number of answers, rate or schedule is refused by name; a changed or missing task, too."""
    base = whole.parent / "base"
    task = whole.parent / "task.py"
    with pytest.raises(UserError, match="holds a run that began from"):
        rl.config_of(wish(base, whole, *KEYS)._replace(task="arithmetic"))
    for key in ("--rl.samples=8", "--rl.temperature=0.5", "--optim.matrix_lr=1", "--optim.decay=cosine"):
        with pytest.raises(UserError, match=r"trained with other settings|its schedule was another"):
            train.train(rl.config_of(wish(base, whole, *KEYS, key)))
    task.write_text(TASK + "\n# changed\n")
    with pytest.raises(exits.Failed, match="saved data position was made with questions"):
        train.train(rl.config_of(wish(base, whole, *KEYS)))
    task.unlink()
    with pytest.raises(exits.Failed):
        rl.config_of(wish(base, whole, *KEYS))
    task.write_text(TASK)
    assert train.train(rl.config_of(wish(base, whole, *KEYS))) == exits.DONE
