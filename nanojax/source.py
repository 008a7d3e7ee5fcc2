"""What a run learns from, token shards, prepared conversations or its own answers: batches, and what is measured of it."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from nanojax import files, questions, rollouts, sample
from nanojax import step as steps
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.conversation import render_for_completion
from nanojax.data import loader
from nanojax.data.tokenizer import TRAINED
from nanojax.evaluate import bpb, devices
from nanojax.run import run_folder
from nanojax.tasks import prepared, stream
from nanojax.tokenizer import Tokenizer

Alive = Callable[[], None]  # what long work calls between its parts; may raise


class Source(NamedTuple):
    """One kind of data as the loop sees it.

    Attributes:
      batches: rows of a step; of rollouts, numbers of questions.
      batch: (the argument of step `step`, its own metrics), from such rows and the state before it. None: the step has
        nothing to learn from, and changes no weight.
      evaluate: (scores of what is held out, a text that the model wrote or None), of the state.
    """

    tokenizer: Tokenizer
    batches: loader.TrainIterator
    batch: Callable[[np.ndarray, steps.State, Alive], tuple[steps.Batch | None, dict[str, float]]]
    evaluate: Callable[[steps.State, Alive], tuple[dict[str, float], str | None]]


def of(config: Config) -> Source:
    """The source that data.kind names. UserError for data that is missing, damaged, too large or too small."""
    A, B, _ = config.batch_shape
    where = config.data.path, A * B, config.model.T, config.train.seed, config.model.V
    return {"text": _text, "conversations": _conversations, "rollouts": _rollouts}[config.data.kind](config, *where)


def of_process(source: Source, config: Config, own: range) -> None:
    """Of several processes each reads its `own` rows of a step. Of conversations all: each weight depends on every row."""
    if config.data.kind == "text":
        loader.share(source.batches, own)


def fingerprint(config: Config) -> str:
    """What must be the same on all machines of a run: a hash of the data folder's description."""
    path = config.data.path
    return prepared.fingerprint(path) if config.data.kind == "conversations" else loader.fingerprint(path)


def described(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a run keeps of its data folder, which may be gone later: its counts, its command, the tokenizer's training."""
    path = Path(config.data.path)
    found: dict[str, Any] = {"path": config.data.path, "kind": config.data.kind, "tokenizer": {
        "ids": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}}  # fmt: skip
    names = prepared.FILE if config.data.kind == "conversations" else "manifest.json"
    with contextlib.suppress(UserError):
        of_data = files.read_table(path / names, "missing")
        kept = ("command", "entries", "totals", "documents", "dropped", "options")
        found |= {key: of_data[key] for key in kept if key in of_data}
    with contextlib.suppress(UserError):
        found["tokenizer"] |= files.read_table(path / "tokenizer" / TRAINED, "missing")
    return found


def supervised_batch(rows: np.ndarray, shape: tuple[int, int, int]) -> steps.Batch:
    """The step's argument from rows int32 [A*B,2,T+1]: all supervised tokens of the step weigh the same, together 1."""
    targets = rows[:, 1, 1:].astype(np.float32)
    A, B, T1 = shape
    weights = (targets / np.float32(rows[:, 1, 1:].sum())).reshape(A, B, T1 - 1)
    return steps.Batch(jnp.asarray(rows[:, 0].reshape(shape)), jnp.asarray(weights))


def _text(config: Config, path: str, rows: int, T: int, seed: int, V: int) -> Source:
    batches = loader.train_iterator(path, rows, T, seed, V)
    tokenizer = Tokenizer.load(Path(path) / "tokenizer")
    loader.valid_batches(path, 1, T)  # a mistake shows now rather than at the first evaluation

    def answer(params: Any) -> str:
        drawn = dict(temperature=0.8, top_k=50)  # greedy text of a young model is one phrase over and over
        return sample.text(config, params, tokenizer, config.eval.prompt, config.eval.sample_tokens, **drawn)[0]

    batch = lambda found, *_: (steps.Batch(jnp.asarray(found.reshape(-1, *config.batch_shape[1:]))), {})
    return Source(tokenizer, batches, batch, _read(config, tokenizer, answer))


def _conversations(config: Config, path: str, rows: int, T: int, seed: int, V: int) -> Source:
    tokenizer, batches = stream.train_iterator(path, rows, T, seed, V)
    stream.valid_rows(path, T)

    def answer(params: Any) -> str:
        prompt = render_for_completion(tokenizer, [{"role": "user", "content": config.eval.prompt}])[-T + 1 :]
        room = min(config.eval.sample_tokens, T - len(prompt))
        end, vocab = tokenizer.special("<|assistant_end|>"), tokenizer.vocab_size
        (ids,) = sample.generate(config, params, prompt, room, end=end, vocab=vocab)
        return f"{config.eval.prompt}\n{tokenizer.decode([i for i in ids.tolist() if i >= 0])}"

    batch = lambda found, *_: (supervised_batch(found, config.batch_shape), {})
    return Source(tokenizer, batches, batch, _read(config, tokenizer, answer))


def _read(config: Config, tokenizer: Tokenizer, answer: Callable[[Any], str]) -> Any:
    """Source.evaluate of a data folder: bits per byte of what it holds out, and the answer to eval.prompt."""

    def evaluate(state: steps.State, alive: Alive) -> tuple[dict[str, float], str | None]:
        rows, tokens = config.train.microbatch, config.eval.tokens
        total = bpb.of_folder(config, state.params, tokenizer, config.data.path, rows, tokens, lambda _: alive())
        asked = config.eval.prompt and config.eval.sample_tokens
        return total.scores(), answer(devices.on_each(state.params)[0]) if asked else None

    return evaluate


def _rollouts(config: Config, path: str, rows: int, T: int, seed: int, V: int) -> Source:
    if not config.train.init:
        raise UserError("--data.kind=rollouts: begins from a fine-tuned run; python -m nanojax.rl --help")
    tokenizer = Tokenizer.load(Path(run_folder.origin(config)) / "tokenizer")
    if tokenizer.vocab_size > V:
        raise UserError(f"{config.train.init}: its tokenizer has {tokenizer.vocab_size} ids, the model only {V}")
    asked = questions.load(path, config.rl, tokenizer, config.rl.row - config.rl.tokens)
    batches = loader.TrainIterator(questions.Order(path, asked, config.rl.questions, seed), config.rl.questions)

    def batch(numbers: np.ndarray, state: steps.State, alive: Alive) -> tuple[steps.Batch | None, dict[str, float]]:
        return rollouts.learn(config, state.params, tokenizer, asked.train, numbers, int(state.step), alive)

    def evaluate(state: steps.State, alive: Alive) -> tuple[dict[str, float], str | None]:
        return rollouts.evaluate(config, state.params, tokenizer, asked.held_out, int(state.step), alive)

    return Source(tokenizer, batches, batch, evaluate)
