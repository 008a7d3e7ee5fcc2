"""Rollouts: the current weights' answers to a step's questions, their rewards, and what the step learns from them."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanojax.config import Config
from nanojax.engine.choose import Choice
from nanojax.engine.generate import Calculator, Decoder, Written, rows_of
from nanojax.evaluate import grade, interval
from nanojax.questions import Question
from nanojax.step import Batch
from nanojax.tokenizer import Tokenizer

TRAINING, HELD_OUT = 2, 3  # added to train.seed: what each draws from; 0 and 1 are parameters and rounding
Alive = Callable[[], None]  # called between two blocks of tokens; may raise


class Rollout(NamedTuple):
    """An answer: its tokens int32 [n] with the one that ended it, and which of them the model chose, bool [n]."""

    tokens: np.ndarray
    chosen: np.ndarray
    ended: bool


Groups = list[list[Rollout]]  # the answers to each question


def learn(
    config: Config, params: Any, tokenizer: Tokenizer, questions: Sequence[Question], numbers: np.ndarray, step: int,
    alive: Alive,
) -> tuple[Batch | None, dict[str, float]]:  # fmt: skip
    """(the batch of step `step`, None if there is nothing to learn; its metrics), from answers to questions `numbers`."""
    began = time.monotonic()
    rl, asked = config.rl, [questions[number] for number in numbers]
    choice = Choice(rl.temperature, rl.top_k)
    keys = functools.partial(_keys, config.train.seed + TRAINING, step)
    groups = write(config, params, tokenizer, asked, numbers, rl.samples, choice, keys, alive)
    rewards_QS = rewards(tokenizer, asked, groups)
    batch = batch_of(config, tokenizer.bos, [question.prompt for question in asked], groups, rewards_QS)
    told = {
        "reward": float(rewards_QS.mean()),
        **passes(rewards_QS),
        "skipped": float(np.mean([_equal(group) for group in rewards_QS])),
        **_lengths(groups),
        "rollout_s": time.monotonic() - began,
    }
    return batch, told


def evaluate(
    config: Config, params: Any, tokenizer: Tokenizer, held_out: Sequence[Question], step: int, alive: Alive
) -> tuple[dict[str, float], str]:
    """Scores of held-out questions, greedily and drawn, and the first of them with its greedy answer."""
    numbers, samples = np.arange(len(held_out)), config.rl.held_out_samples
    keys = functools.partial(_keys, config.train.seed + HELD_OUT, step)
    ask = functools.partial(write, config, params, tokenizer, held_out, numbers)
    greedy = ask(1, Choice(), keys, alive)
    right = int(np.sum(rewards(tokenizer, held_out, greedy) >= 1))
    accuracy = interval.share(right, len(held_out))
    scores = {"accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high, "questions": len(held_out)}
    if samples:
        drawn = ask(samples, Choice(config.rl.temperature, config.rl.top_k), keys, alive)
        scores |= passes(rewards(tokenizer, held_out, drawn))
    answer = grade.reply(tokenizer, greedy[0][0].tokens.tolist()).whole
    return scores | _lengths(greedy), f"{held_out[0].text}\n{answer}"


def write(
    config: Config, params: Any, tokenizer: Tokenizer, asked: Sequence[Question], numbers: np.ndarray, samples: int,
    choice: Choice, keys: Callable[[np.ndarray, np.ndarray], jax.Array], alive: Alive,
) -> Groups:  # fmt: skip
    """`samples` answers to each question, rl.rows of them at a time, by the weights as they are stored.

    Args:
      numbers: of the questions; with the number of the sample they are all that an answer's key follows from.
    """
    rl, found = config.rl, [[] for _ in asked]
    each = math.gcd(samples, rl.rows)  # answers to a question at a time
    for start in range(0, len(asked), rl.rows // each):
        group = range(start, min(start + rl.rows // each, len(asked)))
        padded = [*group, *[start] * (rl.rows // each - len(group))]
        prompts = [asked[i].prompt for i in padded]
        room = [rl.tokens] * len(group) + [0] * (len(padded) - len(group))
        for first in range(0, samples, each):
            key = keys(np.repeat(numbers[padded], each), np.tile(np.arange(first, first + each), len(padded)))
            rows = rows_of(config, params, prompts, room, each, length=rl.row)._replace(key=key)
            ends = (tokenizer.special("<|assistant_end|>"), tokenizer.bos)
            decoder = Decoder(config, params, rows, choice, ends, tokenizer.vocab_size, Calculator(tokenizer, rl.rows))
            del rows  # otherwise the cache would exist twice
            blocks = []
            for block in decoder.blocks():
                alive()
                blocks.append(block)
            answers = _rollouts(blocks, ends)
            for place, i in enumerate(group):
                found[i] += answers[place * each : (place + 1) * each]
    return found


@functools.partial(jax.jit, static_argnums=0)
def _keys(seed: int, step: int, question_B: jax.Array, sample_B: jax.Array) -> jax.Array:
    of_step = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda q, s: jax.random.fold_in(jax.random.fold_in(of_step, q), s))(question_B, sample_B)


def _rollouts(blocks: Sequence[Written], ends: Sequence[int]) -> list[Rollout]:
    tokens_TB, forced_TB = (np.concatenate(parts) for parts in zip(*blocks))
    out = []
    for tokens, forced in zip(tokens_TB.T, forced_TB.T):
        written = tokens >= 0
        tokens, chosen = tokens[written], ~forced[written]
        out.append(Rollout(tokens, chosen, bool(len(tokens)) and int(tokens[-1]) in ends))
    return out


def rewards(tokenizer: Tokenizer, asked: Sequence[Question], groups: Groups) -> np.ndarray:
    """The reward of each answer without its end, f64 [Q,S]."""
    text = lambda rollout: grade.reply(tokenizer, rollout.tokens[: len(rollout.tokens) - rollout.ended].tolist())
    each = [[question.reward(text(rollout)) for rollout in group] for question, group in zip(asked, groups)]
    return np.array(each, np.float64)


def batch_of(
    config: Config, bos: int, prompts: Sequence[Sequence[int]], groups: Groups, rewards_QS: np.ndarray
) -> Batch | None:
    """The step's argument: a row for each answer, padded; its chosen tokens weigh its advantage.

    The advantage is the reward minus its group's mean. Groups of equal rewards have none and do not count. All other chosen
    tokens of the step, the end among them, weigh alike: the loss is their mean of -advantage*log p. None where no group is left.
    """
    A, B, T1 = config.batch_shape
    tokens, weights = np.full((A * B, T1), bos, np.int32), np.zeros((A * B, T1 - 1))
    trained, row = 0, 0
    for prompt, group, reward_S in zip(prompts, groups, rewards_QS):
        for rollout, advantage in zip(group, reward_S - reward_S.mean()):
            begin, end = len(prompt), len(prompt) + len(rollout.tokens)
            tokens[row, :begin], tokens[row, begin:end] = prompt, rollout.tokens
            if not _equal(reward_S):
                weights[row, begin - 1 : end - 1] = (
                    advantage * rollout.chosen
                )  # a target's place is that of the token before
                trained += int(rollout.chosen.sum())
            row += 1
    if not trained:
        return None
    weights = (weights / trained).astype(np.float32)
    return Batch(jnp.asarray(tokens.reshape(A, B, T1)), jnp.asarray(weights.reshape(A, B, T1 - 1)))


def passes(rewards_QS: np.ndarray) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, ...: the chance that one of k answers is right, which is a reward of at least 1.

    The unbiased estimator of arXiv:2107.03374: of n answers, c of them right, 1 - C(n-c,k)/C(n,k), averaged over questions.
    """
    n, right = rewards_QS.shape[1], np.sum(rewards_QS >= 1, 1).tolist()
    ks = [1 << i for i in range(n.bit_length())]
    return {f"pass_{k}": float(np.mean([1 - math.comb(n - c, k) / math.comb(n, k) for c in right])) for k in ks}


def _equal(reward_S: np.ndarray) -> bool:
    return bool(reward_S.max() == reward_S.min())


def _lengths(groups: Groups) -> dict[str, float]:
    """Mean tokens of an answer, and the share of answers that the limit cut."""
    every = [rollout for group in groups for rollout in group]
    lengths, cut = [len(rollout.tokens) for rollout in every], [not rollout.ended for rollout in every]
    return {"length": float(np.mean(lengths)), "unfinished": float(np.mean(cut))}
