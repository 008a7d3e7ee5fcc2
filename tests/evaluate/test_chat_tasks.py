"""The chat evaluation: choices against numpy, answers against the forward pass, and the command with its files and mistakes."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import chat_tasks, tensorboard
from helpers.oracle_2026 import joined
from oracles import numpy_gpt, numpy_gpt2026

from nanojax import model
from nanojax.cli import UserError
from nanojax.config import Compute, Config, Model, Train
from nanojax.config_rules import resolve
from nanojax.evaluate import __main__ as evaluate
from nanojax.evaluate import answers, choices, interval, problems
from nanojax.evaluate.answers import Answer
from nanojax.evaluate.choices import Question
from nanojax.interop import Imported, to_run
from nanojax.run import checkpoint
from nanojax.tokenizer import Tokenizer

STEP = 7
TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])
needs_sandbox = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")


# -- multiple choice --------------------------------------------------------------------------------------------------


def _family(tiny: Callable[..., Config], family: str) -> tuple[Config, Any, Callable[[list[int]], np.ndarray]]:
    """(config, parameters, prompt -> numpy's logits behind it) of a model whose rows have 96 tokens."""
    sizes: Any = dict(depth=1, width=64, seq=96, vocab=128)
    train = dict(tokens_per_step=192, microbatch=2)
    if family == "2025":
        config = tiny(model=sizes, train=train)
        params = numpy_gpt.random_params(0, config)
        return config, params, lambda prompt: numpy_gpt.forward(params, np.array([prompt]), config)[0, -1]
    sizes |= dict(family="2026", depth=2, window=20, rope_base=1e5, qk_scale=1.2)
    config = tiny(model=sizes, train=train)
    m = config.model
    theirs = numpy_gpt2026.random_params(np.random.default_rng(2), m.L, m.V, m.H, m.D)
    size = numpy_gpt2026.Model(m.H, m.window, m.rope_base)
    return config, joined(theirs), lambda prompt: numpy_gpt2026.logits(theirs, np.array([prompt]), size)[0, -1]


def _chosen(config: Config, params: Any, questions: Sequence[Question], tokens: int) -> list[int]:
    found = [pair for batch in choices.choose(config, params, questions, tokens) for pair in batch]
    assert sorted(number for number, _ in found) == list(range(len(questions)))
    return [place for _, place in sorted(found)]


@pytest.mark.parametrize("family", [pytest.param("2025", marks=pytest.mark.long), "2026"])
def test_choices_equal_numpy(tiny, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest of each question's own labels behind the unpadded prompt, also of one longer than the model's rows.

    The head sees one position of each row. Another batch size gives the same.
    """
    config, params, logits = _family(tiny, family)
    rng = np.random.default_rng(3)
    lengths = [1, 5, 20, 40, 63, 64, 65, 90, 110, 30, 31]
    questions = [
        Question(rng.integers(0, 128, n).tolist(), rng.permutation(128)[: 3 + i % 3].tolist())
        for i, n in enumerate(lengths)
    ]
    seen: list[tuple[int, ...]] = []
    head = model.head
    monkeypatch.setattr(model, "head", lambda config, params, x: (seen.append(x.shape), head(config, params, x))[1])
    want = [int(np.argmax(logits(list(q.prompt))[list(q.labels)])) for q in questions]
    assert len(set(want)) > 2
    assert _chosen(config, params, questions, 256) == want
    assert seen == [(2, 64), (4, 64)]  # prompts of up to 128 and of up to 64 tokens, and the model's width
    if family == "2025":
        assert _chosen(config, params, questions, 1) == want


def test_a_tie_is_the_first(tiny) -> None:
    """Of labels that are one token; a later, likelier one wins over both."""
    config, params, logits = _family(tiny, "2025")
    order = np.argsort(logits([1, 2, 3])).tolist()
    questions = [
        Question([1, 2, 3], [order[5], order[9], order[9]]),
        Question([1, 2, 3], [order[9], order[9], order[-1]]),
    ]
    assert _chosen(config, params, questions, 64) == [1, 2]


# -- written answers --------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_answers_equal_the_forward_pass(run: Path) -> None:
    """Each token is the full forward's argmax, up to the limit or the sequence, for any number of rows together."""
    config, params, tokenizer = checkpoint.load_params(run, "f32")
    T, rng = config.model.T, np.random.default_rng(5)
    prompts = [rng.integers(0, 256, n).tolist() for n in (9, 40, T - 3, T, 1, T + 5, 70)]
    found = [a for batch in answers.write(config, params, tokenizer, prompts, 12, 3) for a in batch]
    assert [a.ended == "no_room" for a in found] == [len(p) >= T for p in prompts]
    forward = jax.jit(model.forward, static_argnums=0)
    for prompt, answer in zip(prompts, found, strict=True):
        if answer.ended == "no_room":
            assert answer.tokens == []
            continue
        assert len(answer.tokens) == min(12, T - len(prompt)) or answer.ended == "end"
        row = np.zeros((1, T), np.int32)
        row[0, : len(prompt) + len(answer.tokens)] = prompt + answer.tokens
        best = np.asarray(forward(config, params, row))[0, :, : tokenizer.vocab_size].argmax(-1)
        assert best[len(prompt) - 1 : len(prompt) - 1 + len(answer.tokens)].tolist() == answer.tokens
    assert [a for batch in answers.write(config, params, tokenizer, prompts, 12, 16) for a in batch] == found


# -- problems ---------------------------------------------------------------------------------------------------------


def test_the_first_problems_are_nanochats(tmp_path: Path) -> None:
    """A limit takes the first of numpy's permutation with seed 42, in which nanochat shuffles; no limit takes all."""
    source = chat_tasks.write(tmp_path)
    every = problems.load("arc_easy", source, list)
    order = np.random.default_rng(42).permutation(8)
    asked = [problem.messages[0]["content"] for problem in every]
    assert [text.split("?")[0][-1] for text in asked] == [str(i) for i in order]
    assert problems.load("arc_easy", source, list, 3) == every[:3]


def test_generated_problems_are_held_out_and_asked_once(tmp_path: Path) -> None:
    """Words that `tasks prepare` holds out, and no question twice."""
    for task in ("spelling", "counting", "sums"):
        found = problems.load(task, tmp_path, lambda: chat_tasks.WORDS)
        asked = [problem.messages[0]["content"] for problem in found]
        assert len(set(asked)) == len(asked) > 20
        held_out = chat_tasks.WORDS[::20]
        assert task == "sums" or all(any(word in text for word in held_out) for text in asked)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_tasks.write(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a d1 with random parameters, a tokenizer of single bytes, and a checkpoint of step 7."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    sizes = Model(depth=1, width=64, head_dim=32, vocab=320, seq=256)
    config = resolve(Config(model=sizes, compute=Compute(loss_chunk=32), train=Train(tokens_per_step=256)))
    to_run(Imported(config, numpy_gpt.random_params(0, config), TOKENIZER, STEP), folder)
    return folder


def _command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--eval=chat", *map(str, arguments)])
    evaluate.main()


def _scripted(right: dict[str, str]) -> Callable[..., Iterator[list[Answer]]]:
    """A decoder that answers questions by their text, and says nothing to others."""

    def write(config: Any, params: Any, tokenizer: Tokenizer, prompts: Any, tokens: int, rows: int) -> Any:
        for start in range(0, len(prompts), rows):
            texts = [tokenizer.decode(prompt).split("<|user_start|>")[1].split("<|user_end|>")[0]
                     for prompt in prompts[start : start + rows]]  # fmt: skip
            yield [Answer(tokenizer.encode(right.get(text, "")), "end" if text in right else "cut") for text in texts]

    return write


@needs_sandbox
def test_the_command_writes_everything(run, source, tmp_path, monkeypatch, capsys) -> None:
    """All of nanochat's tasks: counts by hand, ChatCORE by its formula; JSON, CSV and TensorBoard beside each other.

    The decoder is scripted: one canonical program and one of another problem, three numbers of four.
    """
    rows = chat_tasks.ROWS
    one, two = rows["humaneval"]
    said = {row["question"]: f"It is\n#### {row['answer'].split()[-1]}" for row in rows["gsm8k"][:3]}
    said |= {one["prompt"]: f"{one['prompt']}\n{one['canonical_solution']}"}
    said |= {two["prompt"]: f"```python\n{two['prompt']}\n{one['canonical_solution']}\n```"}
    monkeypatch.setattr(answers, "write", _scripted(said))
    _command(monkeypatch, f"--run={run}", f"--source={source}", f"--out={tmp_path}", f"--words={source / 'words.txt'}")
    found = json.loads((tmp_path / "evals" / "chat_000007.json").read_text())
    tasks = found["tasks"]
    config, params, tokenizer = checkpoint.load_params(run, "f32")
    for task in ("arc_easy", "arc_challenge", "mmlu"):
        asked = problems.load(task, source, list)
        right = 0
        for problem in asked:
            assert isinstance(problem, problems.Choice)
            text = [tokenizer.bos, tokenizer.special("<|user_start|>"), *tokenizer.encode(problem.messages[0]["content"]),
                    tokenizer.special("<|user_end|>"), tokenizer.special("<|assistant_start|>")]  # fmt: skip
            logits = numpy_gpt.forward(params, np.array([text]), config)[0, -1]
            right += int(np.argmax([logits[ord(label)] for label in problem.labels])) == problem.right
        assert (tasks[task]["n"], tasks[task]["right"]) == (len(asked), right) and "samples" not in tasks[task]
    assert (tasks["gsm8k"]["n"], tasks["gsm8k"]["right"], tasks["gsm8k"]["cut"]) == (4, 3, 1)
    assert (tasks["humaneval"]["n"], tasks["humaneval"]["right"]) == (2, 1)
    assert tasks["counting"]["right"] == 0 and tasks["counting"]["n"] > 20
    (wrong,) = (s for s in tasks["humaneval"]["samples"] if not s["right"])
    assert wrong["prompt"] == two["prompt"] and wrong["remark"].startswith("AssertionError")
    centred = {name: (t["right"] / t["n"] - t["baseline"]) / (1 - t["baseline"]) for name, t in tasks.items()}
    assert [t["baseline"] for t in tasks.values()] == [0.25] * 3 + [0] * 3
    five = [centred[name] for name in ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")]
    assert found["means"]["ChatCORE"]["value"] == pytest.approx(sum(five) / 5)
    assert found["means"]["ChatCORE+counting"]["value"] == pytest.approx(sum(five) / 6)
    assert tuple(tasks["gsm8k"][key] for key in ("accuracy", "low", "high")) == interval.share(3, 4)
    table = list(csv.reader((tmp_path / "evals" / "chat_000007.csv").read_text().splitlines()))
    assert [row[0] for row in table] == ["Task", *tasks, *found["means"]]
    assert table[4][1:4] == ["4", "3", "0.750000"] and float(table[7][7]) == pytest.approx(sum(five) / 5, abs=1e-6)
    tags = {v.tag: v.simple_value for e in tensorboard.events(tmp_path / "tensorboard") for v in e.summary.value}
    assert tags["chat/ChatCORE"] == pytest.approx(sum(five) / 5) and tags["chat/gsm8k"] == 0.75
    shown = capsys.readouterr().out
    assert "gsm8k         accuracy 0.7500" in shown and "0.0884" in shown


@pytest.mark.long
def test_some_tasks_of_a_limited_number(run, source, tmp_path, monkeypatch, capsys) -> None:
    """With the real decoder: files named by what was asked, answers cut at their limit, no mean of tasks that are not there."""
    _command(monkeypatch, f"--run={run}", f"--source={source}", f"--out={tmp_path}", "--tasks=sums,gsm8k",
             "--max-per-task=3", "--tokens=4", "--rows=2")  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "evals").iterdir()) == [
        "chat_000007_gsm8k_sums_max3.csv",
        "chat_000007_gsm8k_sums_max3.json",
    ]
    found = json.loads((tmp_path / "evals" / "chat_000007_gsm8k_sums_max3.json").read_text())
    assert found["means"] == {} and list(found["tasks"]) == ["gsm8k", "sums"]
    for task in found["tasks"].values():
        assert task["n"] == task["cut"] == 3 and len(task["samples"]) == 3 and task["tokens"] == 4
    assert found | {"max_per_task": 3, "rows": 2, "source": str(source), "step": STEP} == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks=mmlu,arc",), "--tasks=arc: no such task to evaluate; there are arc_easy"),
        (("--tasks=smoltalk",), "--tasks=smoltalk: no such task"),
        (("--tasks=,",), "--tasks: empty"),
        (("--rows=0",), "--rows=0: must be at least 1"),
        (("--max-per-task=-1",), "must be at least 0"),
        (("--tokens=0",), "--tokens=0: must be at least 1"),
        (("--source=none", "--tasks=mmlu,gsm8k,sums"), "none: has no mmlu, gsm8k; fetch with `python -m nanojax.tasks download"),
        (("--tasks=counting", "--words=none"), "--words=none: no such file"),
        (("--tasks=spelling",), "the tokenizer: has 0 words of 3 to 20 English letters"),
    ],
)  # fmt: skip
def test_mistakes_of_the_command_line(arguments, message, run, tmp_path, monkeypatch) -> None:
    """One line, before anything is computed or written."""
    with pytest.raises(UserError) as caught:
        _command(monkeypatch, f"--run={run}", f"--out={tmp_path}", *arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "evals").exists() or not list((tmp_path / "evals").iterdir())


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("arc_easy", {"answerKey": "E"}, "test.jsonl line 1: its answer 'E' is not one of its labels A, B, C"),
        ("arc_easy", {"choices": {"text": ["a", "b"], "label": ["A)", "B)"]}, "answerKey": "A)"}, "label 'A)' of a choice"),
        ("arc_easy", {"choices": {"text": ["a", "b"], "label": "A"}}, "not a row of this task"),
        ("mmlu", {"answer": 4}, "test.jsonl line 1: not a row of this task"),
        ("mmlu", {"answer": -1}, "test.jsonl line 1: not a row of this task"),
        ("mmlu", {"choices": ["a"]}, "not a row of this task"),
        ("mmlu", {"question": None, "choices": None}, "not a row of this task"),
        ("gsm8k", {"answer": "forty"}, "test.jsonl line 1: its answer has no number behind ####"),
        ("gsm8k", {"question": 7}, "content of a user message must be text"),
        ("humaneval", {"test": None}, "prompt, test and entry_point must be text"),
        ("humaneval", {"entry_point": ...}, "not a row of this task (KeyError: 'entry_point')"),
    ],
)  # fmt: skip
def test_damaged_rows_are_named(task, change, message, run, tmp_path, monkeypatch) -> None:
    """A row that is none of its task: file, line and reason."""
    row = {k: v for k, v in (chat_tasks.ROWS[task][0] | change).items() if v is not ...}
    source = chat_tasks.write(tmp_path / "texts", {task: [row]})
    with pytest.raises(UserError) as caught:
        _command(monkeypatch, f"--run={run}", f"--source={source}", f"--tasks={task}", f"--out={tmp_path}")
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"question": "a', b"\x00\xff\xfe"])
def test_damaged_files_are_named(content, run, tmp_path, monkeypatch) -> None:
    """Empty, cut, or no text."""
    source = chat_tasks.write(tmp_path / "texts", {"mmlu": []})
    (source / "mmlu" / "test.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="mmlu"):
        _command(monkeypatch, f"--run={run}", f"--source={source}", "--tasks=mmlu", f"--out={tmp_path}")
