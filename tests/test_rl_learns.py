"""What rewards teach: a small model that was fine-tuned too little answers sums, in minutes on a CPU."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_run

from nanojax import config as configs
from nanojax import config_rules, questions, rl, rollouts, sft, train
from nanojax.data import prepare as data_prepare
from nanojax.data import text
from nanojax.run import checkpoint, exits, metrics, run_folder
from nanojax.tasks import mixture, prepare
from nanojax.tokenizer import Tokenizer

compile_cache = tiny_run.compile_cache
pytestmark = pytest.mark.slow
KEYS = ("--rl.questions=16", "--rl.samples=8", "--rl.tokens=28", "--rl.row=56", "--rl.rows=128", "--rl.temperature=0.5",
        "--optim.peak_lr=0.1", "--train.steps=100", "--eval.every=0", "--rl.held_out=128", "--rl.held_out_samples=0",
        "--checkpoint.every=0")  # fmt: skip


def greedy(run: Path, step: int) -> float:
    """The share of 128 held-out sums that a checkpoint answers rightly."""
    config, params, tokenizer = checkpoint.load_params(run, None, step)
    config = configs.override(config, {"rl.tokens": 28, "rl.row": 56, "rl.rows": 128, "rl.held_out_samples": 0})
    asked = questions.load("arithmetic", config.rl, tokenizer, 28).held_out[:128]
    return rollouts.evaluate(config, params, tokenizer, asked, 0, lambda: None)[0]["accuracy"]


@pytest.fixture(scope="module")
def half_tuned(tmp_path_factory: pytest.TempPathFactory, compile_cache: Path) -> Path:
    """The chat demo's model, its fine-tuning stopped where it first answers at least 10% of the sums."""
    folder = tmp_path_factory.mktemp("half_tuned")
    data = [
        "--input",
        "sotu",
        "--out",
        str(folder / "data"),
        "--vocab",
        "1024",
        "--valid",
        "hash:0.05",
        "--workers",
        "1",
    ]
    data_prepare.main(data)
    train.train(config_rules.resolve(configs.Config(
        name="base", model=configs.Model(depth=4, width=128, head_dim=32, vocab=1024, seq=256),
        compute=configs.Compute(loss_chunk=512, residuals="all"), data=configs.Data(path=str(folder / "data")),
        train=configs.Train(steps=150, tokens_per_step=4096, microbatch=8, run=str(folder / "base")),
        eval=configs.Eval(every=0, tokens=4096, prompt=""), checkpoint=configs.Checkpoint(every=0),
    )))  # fmt: skip
    words = sorted(
        set(re.findall("[a-z]{4,12}", " ".join(str(d) for s in text.find(["sotu"]) for d in text.documents(s))))
    )
    entries = [mixture.parse(task) for task in ("spelling:15000", "sums:5000")]
    tokenizer = Tokenizer.load(folder / "data" / "tokenizer")
    prepare.prepare(entries, folder, tokenizer, lambda: words, folder / "chat", quiet=True)
    keys = (
        "--eval.every=0",
        "--train.steps=150",
        "--optim.warmdown=0",
        "--checkpoint.every=2",
        "--checkpoint.keep_every=2",
    )
    wish = sft.Wish(str(folder / "base"), str(folder / "chat"), str(folder / "tuned"), 1.0, None, keys)
    assert train.train(sft.config_of(wish)) == exits.DONE
    there = np.array(run_folder.available(folder / "tuned"))
    low, high = 0, len(there) - 1  # it learns sums within a few steps, so halving finds where
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if greedy(folder / "tuned", there[middle]) < 0.1 else (low, middle)
    for later in there[high + 1 :]:
        shutil.rmtree(folder / "tuned" / "checkpoints" / str(later))
    return folder / "tuned"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_hundred_steps_of_rewards_teach_sums(half_tuned: Path, tmp_path: Path, seed: int) -> None:
    """Of held-out sums, 10 to 40% are answered rightly before, and at least 20 points more after."""
    wish = rl.Wish(str(half_tuned), "arithmetic", str(tmp_path / "rl"), 1.0, None, (*KEYS, f"--train.seed={seed}"))
    assert train.train(rl.config_of(wish)) == exits.DONE
    before = greedy(half_tuned, run_folder.available(half_tuned)[-1])
    (after,) = [record["accuracy"] for record in metrics.read(tmp_path / "rl", "eval")]
    assert 0.1 <= before <= 0.4 and after >= before + 0.2, (before, after)
