"""What decoding a config's model needs on a card: the engine's loop compiled, its time modelled, beside the bandwidth's limit."""

import dataclasses
import functools
from typing import Any

from nanojax import weights
from nanojax.config import Config
from nanojax.hardware import Card
from nanojax.plan import compile, roofline
from nanojax.plan.planner import Say

SOURCES = (*compile.STEP_SOURCES, "engine/*.py")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The decoder's loop of `rows` rows of `context` tokens on `card`. Memory is compiled, times are modelled."""

    config: Config
    card: Card
    rows: int
    context: int
    int8_cache: bool
    program: compile.Program
    step: roofline.Estimate  # one token of each row
    call_seconds: float  # what a call of the loop takes besides its steps
    weight_bytes: int  # of all weights but those that tokens select rows of
    cache_bytes: int  # of the positions that a row's last token sees, over all rows

    @property
    def seconds(self) -> float:
        """One token of each row; a call writes up to BLOCK of them."""
        from nanojax.engine.decode import BLOCK

        return self.step.seconds + self.call_seconds / BLOCK

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""
        return self.rows / self.seconds

    @property
    def limit_tokens_per_second(self) -> float:
        """The most that the card's bandwidth allows: weights and cache are read once a step, and nothing else is."""
        return self.rows * self.card.bandwidth / (self.weight_bytes + self.cache_bytes)

    @property
    def share(self) -> float:
        """Of the limit."""
        return self.tokens_per_second / self.limit_tokens_per_second

    @property
    def moved_bytes(self) -> float:
        """What the compiled loop reads and writes in a step."""
        return sum(k.bytes for k in self.step.kernels)

    @property
    def fits(self) -> bool:
        return self.program.peak_bytes <= self.card.budget_bytes

    def as_json(self) -> dict[str, Any]:
        """For scripts: bytes, seconds, tokens."""
        return {
            "config": self.config.name,
            "card": self.card.key,
            "rows": self.rows,
            "context": self.context,
            "cache": "int8" if self.int8_cache else "float",
            "modelled_tokens_per_second": self.tokens_per_second,
            "seconds_per_step": self.seconds,
            "seconds_per_call": self.call_seconds,
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.cache_bytes,
            "moved_bytes": self.moved_bytes,
            "limit_tokens_per_second": self.limit_tokens_per_second,
            "share_of_limit": self.share,
            "peak_bytes": self.program.peak_bytes,
            "temp_bytes": self.program.temp_bytes,
            "budget_bytes": self.card.budget_bytes,
            "fits": self.fits,
            "kernels_per_step": sum(k.calls for k in self.step.kernels),
            "kernels": [dataclasses.asdict(k) for k in self.step.kernels[:20]],
            "time_by_kind": {kind: k.seconds for kind, k in self.step.by_kind().items()},
            "not_modelled": self.step.unknown,
            "compile_seconds": self.program.compile_seconds,
            "cached": self.program.cached,
        }


def make(config: Config, card: Card, rows: int, context: int, int8_cache: bool, cache: bool, say: Say) -> Decoding:
    """The Decoding of a resolved config.

    Args:
      context: tokens that the cache has room for, and that are in it.
      cache: take the compiled loop from the user's cache folder, and keep it there.
      say: called with a line before the compilation.
    """
    compile.start_compiler()
    say(f"compiling the decoder of {config.name} for {card.key}: {rows} rows of {context} tokens")
    config = compile.for_gpu(config)
    build = functools.partial(_compiled, config, card, rows, context, int8_cache)
    key = compile.key(config, card, SOURCES, ["decoding", rows, context, int8_cache])
    program = compile.kept(key, build) if cache else build()
    step, call_seconds = roofline.estimate_loop(program.hlo, card)
    sizes = _weight_bytes(config), rows * _cache_bytes(config, context, int8_cache)
    return Decoding(config, card, rows, context, int8_cache, program, step, call_seconds, *sizes)


def _compiled(config: Config, card: Card, rows: int, context: int, int8_cache: bool) -> compile.Program:
    """The engine's loop as `engine.generate` calls it."""
    import jax
    import numpy as np

    from nanojax import step
    from nanojax.engine import decode
    from nanojax.engine.choose import Choice

    def state() -> decode.Rows:
        return decode.begin([decode.empty_cache(config, context, int8_cache)], [[0]], rows, [context - 1], seed=0)

    def loop(params: Any, rows: decode.Rows, *others: Any) -> Any:
        return decode.block(config, config.model.V, params, rows, *others)

    one = np.zeros((), np.int32)
    choice, stops = Choice(np.float32(0), one, np.float32(0)), decode.Stops(np.zeros(decode.ENDS, np.int32), one)
    arguments = (step.abstract_state(config).params, jax.eval_shape(state), choice, stops, one)
    return compile.compile_for(loop, arguments, card, donate=1, as_trained=False)


def _weight_bytes(config: Config) -> int:
    from nanojax import step

    params, table = step.abstract_state(config).params, weights.table(config.model)
    every = [*params["blocks"], {name: w for name, w in params.items() if name != "blocks"}]
    return sum(compile.tree_bytes(w) for tree in every for name, w in tree.items() if table[name].use != "rows")


def _cache_bytes(config: Config, context: int, int8_cache: bool) -> int:
    """Of one row: of each layer, as many of the last positions as its window reaches."""
    import jax

    from nanojax.engine import decode

    layers = jax.eval_shape(lambda: decode.empty_cache(config, context, int8_cache))
    seen = [min(context, window + 1) for window in weights.windows(config.model)]
    return sum(compile.tree_bytes(layer) // layer[0].shape[2] * count for layer, count in zip(layers, seen))
