"""CORE: the bundle's rules, batched scoring equal to one example at a time, resuming after kill -9, the tables."""

import dataclasses
import json
import random
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import core_bundle
from helpers.core_bundle import WORDS
from oracles import numpy_gpt, reference_core

from nanojax.cli import UserError
from nanojax.config import Compute, Config, Model, Train
from nanojax.config_rules import resolve
from nanojax.evaluate import core, likelihood
from nanojax.evaluate.likelihood import Request
from nanojax.tokenizer import Tokenizer, train

BUNDLE = Path(__file__).parents[3] / "shared" / "eval" / "eval_bundle"


def _model(tokenizer: Tokenizer, depth=1, width=64, head_dim=32):
    m = Model(depth=depth, width=width, head_dim=head_dim, vocab=tokenizer.vocab_size, seq=64)
    config = resolve(Config(model=m, compute=Compute(loss_chunk=64), train=Train(tokens_per_step=64)))
    return config, jax.tree.map(jnp.asarray, numpy_gpt.random_params(0, config))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = random.Random(0)
    return train(iter([" ".join(rng.choice(WORDS) for _ in range(400)) + ".\nAnswer: A, B"]), 300)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A bundle of the official layout with all three kinds, 0 and 3 shots, and the awkward cases."""
    rng = random.Random(1)
    say = lambda low, high: " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))
    choice = [
        {"query": say(3, 6), "choices": [say(1, 3) for _ in range(4)], "gold": rng.randrange(4)} for _ in range(20)
    ]
    choice[3]["choices"] = ["the law", "the law", "peace", "the law"]  # equal choices tie; the first wins
    choice[4]["choices"] = ["the law", "the law of peace", "the"]  # one a prefix of another: nothing scored, nan
    choice[4]["gold"] = 1
    choice[5]["choices"] = ["A", "B", "A", "B"]  # one token each
    choice[6]["query"] = "  leading and trailing space "
    schema = [
        {"context_options": [say(2, 8), say(2, 8)], "continuation": say(1, 5), "gold": rng.randrange(2)}
        for _ in range(14)
    ]
    lm = [{"context": say(2, 9) + rng.choice(["", " ", "\n"]), "continuation": say(1, 3)} for _ in range(14)]
    kind = {"choice": "multiple_choice", "schema": "schema", "lm": "language_modeling"}
    baseline = {"choice": 25, "schema": 50, "lm": 0}
    long = {"continuation_delimiter": "\nAnswer: "}
    tasks = [
        core_bundle.Task(f"{file}{shots}", kind[file], file, shots, baseline[file], long if shots > 2 else {})
        for file, shots in (("choice", 0), ("choice", 3), ("schema", 0), ("schema", 2), ("lm", 0), ("lm", 4))
    ]
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return core_bundle.write(folder, tasks, {"choice": choice, "schema": schema, "lm": lm})


def test_shots_are_those_of_the_full_list():
    """The lazy draw equals drawing from the list of all other examples, for every index of several sizes."""
    for count in (2, 5, 40, 1000):
        for index in range(0, count, 7):
            shots = min(10, count - 1)
            others = [i for i in range(count) if i != index]
            assert core.shots_of(index, count, shots) == random.Random(1234 + index).sample(others, shots)


def test_prompts_are_exactly_these(bundle):
    """Rendered text of each kind, written out by hand: delimiters, blank lines between shots, trimmed contexts."""
    task = core.Task("t", "multiple_choice", bundle, 1, "\nAnswer: ", 0.25)
    items = [{"query": "Q1", "choices": ["a", "b"], "gold": 1}, {"query": "Q2", "choices": ["c", "d"], "gold": 0}]
    assert core.prompts_of(task, items, 0) == ["Q2\nAnswer: c\n\nQ1\nAnswer: a", "Q2\nAnswer: c\n\nQ1\nAnswer: b"]
    task = core.Task("t", "schema", bundle, 1, " ", 0.5)
    items = [
        {"context_options": ["x", "y"], "continuation": "z", "gold": 1},
        {"context_options": ["u", "v"], "continuation": "w", "gold": 1},
    ]
    assert core.prompts_of(task, items, 0) == ["v w\n\nx z", "v w\n\ny z"]
    task = core.Task("t", "language_modeling", bundle, 1, " ", 0.0)
    items = [{"context": " one \n", "continuation": "two"}, {"context": "three ", "continuation": "four"}]
    assert core.prompts_of(task, items, 0) == ["three four\n\none", "three four\n\none two"]


def test_scores_equal_full_logits_with_contexts_shared(tokenizer):
    """nll to 1e-5 and argmax hits of shared-context batches equal those of each branch alone from full logits."""
    config, params = _model(tokenizer)
    rng = np.random.default_rng(0)
    draw = lambda n: tuple(int(i) for i in rng.integers(0, config.model.V, n))
    requests = [Request(draw(rng.integers(1, 60)), tuple(draw(n) for n in rng.integers(0, 5, 4))) for _ in range(12)]
    requests += [Request(draw(5), (draw(40),)), Request(draw(3), ((1,), (2,), (3,))), Request(draw(3), (draw(6), (7,)))]
    for request, answers in zip(requests, likelihood.scorer(config, params, 1024)(requests)):
        for branch, answer in zip(request.branches, answers, strict=True):
            row = np.array([[*request.context, *branch]], np.int32)
            nll = numpy_gpt.token_losses(params, row[:, :-1], row[:, 1:], config)[0][len(request.context) - 1 :]
            logits = numpy_gpt.forward(params, row[:, :-1], config)[0][len(request.context) - 1 :]
            assert answer.nll.shape == answer.hits.shape == (len(branch),)
            assert np.abs(answer.nll - nll).max(initial=0) < 1e-5
            assert np.array_equal(answer.hits, logits.argmax(-1) == np.array(branch, int))


@pytest.mark.long
def test_batched_equals_one_at_a_time(tokenizer, bundle):
    """All kinds, 0 and more shots, ties and empty spans: every example scored exactly as by the slow oracle."""
    config, params = _model(tokenizer)
    batched = likelihood.scorer(config, params)
    right = 0
    for task in core.load_tasks(bundle):
        examples = core.load_examples(task)
        fast = core.score_window(task, examples, range(len(examples)), tokenizer, batched)
        slow = [reference_core.example(config, params, tokenizer, task, examples, i, 256) for i in range(len(examples))]
        assert fast == slow, task.label
        right += sum(fast)
    assert right > 10  # not all wrong


def test_zero_logits_tie_to_the_first_option(tokenizer, bundle):
    """A model whose logits are all equal answers option 0: means of equal losses must not differ by rounding."""
    config, params = _model(tokenizer)
    params = {**params, "head": jnp.zeros_like(params["head"])}
    for task in core.load_tasks(bundle)[:4]:
        examples = core.load_examples(task)
        plain = [i for i, e in enumerate(examples) if e.get("choices") != ["the law", "the law of peace", "the"]]
        fast = core.score_window(task, examples, plain, tokenizer, likelihood.scorer(config, params))
        assert fast == [examples[i]["gold"] == 0 for i in plain]


def test_a_run_that_was_killed_resumes(tokenizer, bundle, tmp_path):
    """Cut off after any window and resumed, also with a torn last line: same results, and nothing is scored twice."""
    config, params = _model(tokenizer)
    tasks, scorer, path = core.load_tasks(bundle), likelihood.scorer(config, params), tmp_path / "ledger"
    run = lambda s, ledger: list(core.run(tasks, tokenizer, s, 0, ledger, window=16))
    clock = lambda scores: [dataclasses.replace(score, seconds=0.0) for score in scores]  # without the clock
    whole = clock(run(scorer, core.Ledger(tmp_path / "whole", {"m": 1})))
    calls = 0

    def dying(requests):
        nonlocal calls
        calls += 1
        if calls > 5:
            raise KeyboardInterrupt
        return scorer(requests)

    with pytest.raises(KeyboardInterrupt):
        run(dying, core.Ledger(path, {"m": 1}))
    with open(path, "a") as file:
        file.write('{"task": "lm0", "start": 0, "corr')
    calls, counted = 0, []
    ledger = core.Ledger(path, {"m": 1})
    assert len(ledger.done) == 5
    assert clock(run(lambda r: counted.append(1) or scorer(r), ledger)) == whole
    assert len(counted) == len(whole) - 5
    assert not core.Ledger(path, {"m": 2}).done  # another model: nothing is taken over


def _task(label: str, baseline: float) -> core.Task:
    return core.Task(label, "language_modeling", Path("none"), 0, " ", baseline)


def test_centring_and_tables(tmp_path):
    """Centred accuracy and CORE by hand; the CSV has nanochat's columns and a last row CORE."""
    score = lambda correct, baseline: core.TaskScore(_task("t", baseline), 20, 20, correct)
    centred = [score(correct, baseline).centred for correct, baseline in ((5, 0.25), (20, 0.5), (8, 0.5))]
    assert centred == pytest.approx([0, 1, -0.2])
    scores = [core.TaskScore(_task("a", 0.25), 4, 4, 2), core.TaskScore(_task("b", 0.0), 3, 3, 0)]
    assert core.core_of(scores) == pytest.approx(1 / 6)
    core.write_csv(tmp_path / "c.csv", scores)
    rows = [line.split(",") for line in (tmp_path / "c.csv").read_text().splitlines()]
    assert rows == [
        ["Task", "Accuracy", "Centered"],
        ["a", "0.500000", "0.333333"],
        ["b", "0.000000", "0.000000"],
        ["CORE", "", "0.166667"],
    ]


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("core.yaml", "icl_tasks: [{label: x}]", "malformed"),
        ("core.yaml", "]: {", "malformed"),
        ("core.yaml", None, r"core\.yaml is missing"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\nchoice0,25\n", "malformed"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\nchoice0,x\n", "malformed"),
        ("eval_data/lm.jsonl", None, "lm0 needs"),
        ("eval_data/choice.jsonl", '{"query": "a"}\n', r"choice\.jsonl:1"),
        ("eval_data/choice.jsonl", "not json\n", r"choice\.jsonl:1"),
        ("eval_data/choice.jsonl", '{"query": "a", "choices": ["b"], "gold": 1}\n', "gold=1"),
        ("eval_data/schema.jsonl", '{"context_options": ["a"], "continuation": "b", "gold": 0}\n', "2 shots"),
    ],
)
def test_broken_bundles_are_one_line(file, content, message, bundle, tmp_path):
    """Missing or malformed files of a bundle: UserError naming file and line, before anything is scored."""
    for path in bundle.rglob("*.*"):
        target = tmp_path / path.relative_to(bundle)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        for task in core.load_tasks(tmp_path):
            core.load_examples(task)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def official() -> list[core.Task]:
    if not BUNDLE.is_dir():
        pytest.skip("the evaluation bundle is not beside the repository (../shared/eval/eval_bundle)")
    return core.load_tasks(BUNDLE)


def test_the_official_layout_is_read(official):
    """22 tasks with their kinds, shots, delimiters and baselines; every file parses."""
    assert len(official) == 22
    by = {t.label: t for t in official}
    assert (by["hellaswag"].shots, by["hellaswag_zeroshot"].shots, by["agi_eval_lsat_ar"].shots) == (10, 0, 3)
    assert by["jeopardy"].delimiter == "\nAnswer: " and by["squad"].delimiter == " "
    assert by["boolq"].baseline == pytest.approx(0.62) and by["winograd"].kind == "schema"
    assert sum(len(core.load_examples(t)) for t in official if t.label != "hellaswag_zeroshot") > 70_000


@pytest.mark.slow
@pytest.mark.parametrize("vocab, least", [(65536, 5), (4096, 2)])
def test_official_tasks_batched_equal_and_faster(official, vocab, least):
    """On all 22 tasks, 3 examples each: scored as one example at a time, and 5 times faster at nanochat's vocabulary.

    A d4 of width 256. One at a time is nanochat's way (reference_core.py), jitted, lengths rounded up to 64. Both are
    timed in one process, in a second pass, after the first has compiled their shapes. The gain comes from computing the
    context of several choices once, and logits and last layer at the scored positions only. It therefore depends on the
    vocabulary: the head is 84% of a d4's multiplications at 65,536 and 25% at 4,096.
    """
    texts = (json.dumps(e, ensure_ascii=False) for t in official for e in core.load_examples(t))
    tokenizer = train(texts, vocab)
    config, params = _model(tokenizer, depth=4, width=256, head_dim=128)
    batched = likelihood.scorer(config, params)
    indices, kept = range(3), 12  # 10 shots need 11 examples
    for timed in (False, True):
        total = {"batched": 0.0, "one at a time": 0.0}
        for task in official:
            examples = core.load_examples(task, kept)
            begin = time.perf_counter()
            fast = core.score_window(task, examples, indices, tokenizer, batched)
            middle = time.perf_counter()
            slow = [reference_core.example(config, params, tokenizer, task, examples, i) for i in indices]
            end = time.perf_counter()
            assert fast == slow, task.label
            total["batched"] += middle - begin
            total["one at a time"] += end - middle
            if timed:
                a, b = middle - begin, end - middle
                print(f"{task.label:34} {a:6.2f} s {b:6.2f} s, {b / a:.1f} times faster")
    ratio = total["one at a time"] / total["batched"]
    print(f"vocabulary {vocab}:", total, f"{ratio:.1f} times faster")
    assert ratio >= least
