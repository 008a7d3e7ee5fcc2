"""What reinforcement learning needs on a card: the peaks of answering and of training, which are never together, and hours."""

import dataclasses
import math
from typing import Any

from nanojax import config as configs
from nanojax import config_rules
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.hardware import Card
from nanojax.plan import compile, decoding, planner
from nanojax.plan.planner import Say

EPOCH, TOKENS = 119_552, 256  # nanochat's: 467 steps of 16 questions, 16 answers each, at most so many tokens an answer


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Answers written by `decoder`, then learnt by the step of `training`. Memory is compiled, times are modelled.

    Attributes:
      beside_bytes: what lies beside the decoder's program: the optimizer's state, and the cache of one prompt being read.
    """

    decoder: decoding.Decoding
    training: planner.Plan
    beside_bytes: int

    @property
    def answering_bytes(self) -> int:
        """Parameters, optimizer, cache; accumulators and residuals do not exist."""
        return self.decoder.program.peak_bytes + self.beside_bytes

    @property
    def training_bytes(self) -> int:
        """Parameters, optimizer, accumulators, residuals; the cache does not exist."""
        return self.training.memory.peak

    @property
    def fits(self) -> bool:
        return max(self.answering_bytes, self.training_bytes) <= self.decoder.card.budget_bytes

    @property
    def decode_hours(self) -> float:
        """Of EPOCH answers of TOKENS tokens each, the cache as full as it gets."""
        return EPOCH * TOKENS / self.decoder.tokens_per_second / 3600

    @property
    def limit_hours(self) -> float:
        """The least that the card's bandwidth allows for the same."""
        return EPOCH * TOKENS / self.decoder.limit_tokens_per_second / 3600

    @property
    def train_hours(self) -> float:
        """Of the rows of as many answers, padding included."""
        return EPOCH * self.decoder.context / self.training.tokens_per_second / 3600

    def as_json(self) -> dict[str, Any]:
        """For scripts: bytes and hours."""
        return {
            "config": self.decoder.config.name,
            "card": self.decoder.card.key,
            "rows": self.decoder.rows,
            "row": self.decoder.context,
            "microbatch": self.training.config.train.microbatch,
            "answering_peak_bytes": self.answering_bytes,
            "training_peak_bytes": self.training_bytes,
            "budget_bytes": self.decoder.card.budget_bytes,
            "fits": self.fits,
            "answers": EPOCH,
            "tokens_of_an_answer": TOKENS,
            "decode_hours": self.decode_hours,
            "decode_limit_hours": self.limit_hours,
            "train_hours": self.train_hours,
            "decode_tokens_per_second": self.decoder.tokens_per_second,
            "train_tokens_per_second": self.training.tokens_per_second,
        }


def make(config: Config, card: Card, rows: int, row: int, cache: bool, say: Say) -> Rollouts:
    """The Rollouts of a resolved config's model: `rows` answers at a time, with their questions `row` tokens long."""
    config = of_config(config, rows, row)
    compile.start_compiler()
    decoder = decoding.make(config, card, rows, row, int8_cache=False, cache=cache, say=say)
    training = planner.make(config, card, cache=cache, say=say)
    import jax

    from nanojax import step
    from nanojax.engine import decode

    one_prompt = jax.eval_shape(lambda: decode.empty_cache(config, row))
    beside = compile.tree_bytes(step.abstract_state(config).opt) + compile.tree_bytes(one_prompt)
    return Rollouts(decoder, training, beside)


def of_config(config: Config, rows: int, row: int) -> Config:
    """The config of rollouts, with as many tokens in a microbatch as `config` has, or fewer."""
    tokens = min(configs.Rollouts.tokens, row // 2)
    if row > config.model.T:
        raise UserError(f"--rl={rows}x{row}: longer than the model's sequence of {config.model.T} tokens; choose less")
    answers = config.rl.questions * config.rl.samples
    most = max(1, config.train.microbatch * config.model.T // row)
    microbatch = max(n for n in range(1, min(most, answers) + 1) if answers % n == 0)
    changes: dict[str, Any] = {"data.kind": "rollouts", "rl.rows": rows, "rl.row": row, "rl.tokens": tokens}
    changes |= {"train.microbatch": microbatch, "train.tokens_per_step": 0, "compute.held": 0}
    changes["compute.loss_chunk"] = math.gcd(config.compute.loss_chunk, microbatch * row)
    return config_rules.resolve(configs.override(config, changes))
