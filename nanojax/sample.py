"""Text from a trained run, token by token over a KV cache.

python -m nanojax.sample --run=runs/demo --prompt="The Congress" --temperature=0.8 --top-k=50 --samples=2
"""

import codecs
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojax import cli, model, xla
from nanojax.cli import Parser, UserError, run_main
from nanojax.config import Config
from nanojax.run import checkpoint
from nanojax.tokenizer import Tokenizer

PREFILL = 256  # prompt tokens at one time: 64 MiB of logits at V = 65,536
ROUND = 64  # cache lengths and prompt chunks are multiples of it, so that few shapes are ever compiled


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _extend(
    config: Config,
    params: Any,
    tokens_BS: jax.Array,
    cache: Any,
    start: jax.Array,
    before_B: jax.Array,
    last: jax.Array,
):
    """Logits [B,V] of token `last` of the S new ones, which follow `before_B`, and the cache."""
    logits, cache = model.forward_cached(config, params, tokens_BS, cache, start, before_B)
    return jax.lax.dynamic_index_in_dim(logits, last, 1, keepdims=False), cache


@functools.partial(jax.jit, static_argnums=(0, 6))
def _choose(
    vocab: int, logits_BV: jax.Array, seed: jax.Array, position: jax.Array, temperature: jax.Array, ended_B, top_k: int
):
    """Next tokens int32 [B] below `vocab`: the argmax at temperature 0, else drawn from the top_k; -1 where ended."""
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < vocab, logits_BV, -jnp.inf)
    if 0 < top_k < vocab:
        smallest = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= smallest, logits_BV, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(seed), position)
    drawn = jax.random.categorical(key, logits_BV / jnp.maximum(temperature, 1e-6))
    tokens = jnp.where(temperature > 0, drawn, jnp.argmax(logits_BV, -1))
    return jnp.where(ended_B, -1, tokens.astype(jnp.int32))


def stream(
    config: Config,
    params: Any,
    tokens: Sequence[int] | np.ndarray,
    max_new: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    samples: int = 1,
    end: int | None = None,
    vocab: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields the next token of each row, int32 [B], up to `max_new` times; rows that met `end` yield -1 from then on.

    Args:
      tokens: the prompt's ids [S], repeated `samples` times, or rows [B,S].
      temperature: 0 = the most likely token.
      top_k: draw among the k most likely; None or 0 = all.
      seed: the same seed gives the same text.
      end: a token that ends a row (it is not yielded), e.g. the tokenizer's bos; None = none.
      vocab: ids at and beyond it are never chosen (a model may be wider than its tokenizer); None = config.model.vocab.
    Raises UserError, before the first token is asked for, when prompt and `max_new` exceed the model's sequence, or an id
    its vocabulary.
    """
    prompt = np.asarray(tokens, np.int32)
    prompt = np.tile(prompt, (samples, 1)) if prompt.ndim == 1 else np.repeat(prompt, samples, 0)
    S = prompt.shape[1]
    vocab = config.model.V if vocab is None else min(vocab, config.model.V)
    if not S:
        raise UserError("empty prompt: give at least the begin token")
    if S >= config.model.T:
        raise UserError(
            f"the prompt's {S} tokens leave no room in the model's sequence of {config.model.T}; shorten it"
        )
    if S + max_new > config.model.T:
        raise UserError(
            f"the prompt's {S} tokens and {max_new} new ones exceed the model's sequence of {config.model.T}; "
            f"ask for at most {config.model.T - S}"
        )
    if prompt.min() < 0 or prompt.max() >= config.model.V:
        raise UserError(f"the prompt holds ids outside the model's vocabulary of {config.model.V}")
    return _stream(config, params, prompt, max_new, (temperature, top_k or 0, seed), end, vocab)


def _stream(
    config: Config,
    params: Any,
    prompt: np.ndarray,
    max_new: int,
    choice: tuple[float, int, int],
    end: int | None,
    vocab: int,
) -> Iterator[np.ndarray]:
    B, S = prompt.shape
    temperature, top_k, seed = choice
    cache = model.empty_cache(config, B, math.ceil((S + max_new) / ROUND) * ROUND, ROUND)
    logits, before = None, np.full(B, -1, np.int32)
    for start in range(0, S, PREFILL):
        # Padding on the right is harmless: no earlier position sees it, and later tokens overwrite it in the cache.
        chunk = prompt[:, start : start + PREFILL]
        padded = np.pad(chunk, ((0, 0), (0, -chunk.shape[1] % ROUND)))
        last = jnp.int32(chunk.shape[1] - 1)
        logits, cache = _extend(config, params, padded, cache, jnp.int32(start), before, last)
        before = chunk[:, -1]
    ended = np.zeros(B, bool)
    for position in range(S, S + max_new):
        where = (jnp.uint32(seed), jnp.int32(position), jnp.float32(temperature))
        chosen = np.asarray(_choose(vocab, logits, *where, jnp.asarray(ended), top_k))
        ended = ended | (chosen == end) if end is not None else ended
        if ended.all():
            return
        chosen = np.where(ended, -1, chosen)
        yield chosen
        if position + 1 < S + max_new:
            row = np.maximum(chosen, 0)
            logits, cache = _extend(config, params, row[:, None], cache, jnp.int32(position), before, jnp.int32(0))
            before = row


def generate(config: Config, params: Any, tokens: Sequence[int] | np.ndarray, max_new: int, **options: Any):
    """`stream` gathered: int32 [B, up to max_new], -1 after a row's end. Options as stream's."""
    columns = list(stream(config, params, tokens, max_new, **options))
    rows = len(tokens) if np.ndim(tokens) == 2 else 1
    return np.stack(columns, 1) if columns else np.zeros((rows * options.get("samples", 1), 0), np.int32)


def text(config: Config, params: Any, tokenizer: Tokenizer, prompt: str, max_new: int, **options: Any) -> list[str]:
    """Continuations of `prompt` as text, the prompt in front, one a sample; `max_new` is cut to fit the model's T."""
    ids = [tokenizer.bos, *tokenizer.encode(prompt)][: config.model.T - 1]
    room = min(max_new, config.model.T - len(ids))
    rows = generate(config, params, ids, room, end=tokenizer.bos, vocab=tokenizer.vocab_size, **options)
    return [prompt + tokenizer.decode([int(i) for i in row if i >= 0]) for row in rows]


def main() -> None:
    """The command."""
    parser = Parser(
        prog="python -m nanojax.sample",
        description="Continues a prompt with a trained run. Needs nothing but the run folder, wherever it was copied.",
        examples="  python -m nanojax.sample --run=runs/demo --prompt='Fellow citizens'\n"
        "  python -m nanojax.sample --run=runs/demo --prompt=The --temperature=0 --tokens=32\n"
        "  python -m nanojax.sample --run=runs/demo --prompt=War --samples=3 --temperature=0.8 --top-k=50 --seed=7\n",
    )
    parser.add_argument("--run", type=cli.path, required=True, help="run folder")
    parser.add_argument("--prompt", default="", help="text to continue; empty = a new document")
    parser.add_argument(
        "--tokens", type=int, help="new tokens at most; fewer when the document ends (128, or what fits the model)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the most likely token (0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="draw among the k most likely tokens; 0 = all (50)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (0)")
    parser.add_argument("--samples", type=int, default=1, help="continuations, drawn together (1)")
    parser.add_argument("--step", type=int, help="a checkpoint's step; default: the newest")
    parser.add_argument(
        "--dtype", choices=[*checkpoint.DTYPES, "stored"], help="default: f32 on a CPU, else as trained"
    )
    a = parser.parse_args()
    checks = {
        "tokens": a.tokens is None or a.tokens >= 1,
        "temperature": 0 <= a.temperature < 1e6,
        "top-k": a.top_k >= 0,
    }
    checks |= {"seed": 0 <= a.seed < 2**32, "samples": a.samples >= 1}
    for name, good in checks.items():
        if not good:
            raise UserError(f"--{name}={getattr(a, name.replace('-', '_'))}: out of range; see --help")
    xla.configure()
    dtype = a.dtype or ("f32" if jax.default_backend() == "cpu" else "stored")
    config, params, tokenizer = checkpoint.load_params(a.run, None if dtype == "stored" else dtype, a.step)
    ids = [tokenizer.bos, *tokenizer.encode(a.prompt)]
    options = dict(temperature=a.temperature, top_k=a.top_k, seed=a.seed, samples=a.samples)
    new = min(128, config.model.T - len(ids)) if a.tokens is None else a.tokens
    tokens = stream(config, params, ids, new, end=tokenizer.bos, vocab=tokenizer.vocab_size, **options)
    if a.samples == 1:
        _print_live(tokenizer, a.prompt, tokens)
        return
    columns = list(tokens)
    for row in range(a.samples):
        new = [int(column[row]) for column in columns if column[row] >= 0]
        print(f"--- {row + 1}\n{a.prompt}{tokenizer.decode(new)}")


def _print_live(tokenizer: Tokenizer, prompt: str, tokens: Iterator[np.ndarray]) -> None:
    """Writes each token as it comes; bytes of an unfinished character wait for the next token."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sys.stdout.write(prompt)
    for column in tokens:
        sys.stdout.write(decoder.decode(tokenizer.decode_bytes([int(column[0])])))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")


if __name__ == "__main__":
    run_main(main)
