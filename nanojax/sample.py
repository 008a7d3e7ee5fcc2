"""Text from a trained run, token by token over a KV cache.

python -m nanojax.sample --run=runs/demo --prompt="The Congress" --temperature=0.8 --top-k=50 --samples=2
"""

import codecs
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from nanojax import cli, xla
from nanojax.cli import Parser, UserError, run_main
from nanojax.config import Config
from nanojax.engine.choose import Choice
from nanojax.engine.generate import Decoder, check, rows_of
from nanojax.run import checkpoint
from nanojax.tokenizer import Tokenizer


def stream(
    config: Config,
    params: Any,
    tokens: Sequence[int] | np.ndarray,
    max_new: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
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
      top_p: draw among the fewest that together have this probability; 1 = all.
      seed: the same seed gives the same text, and a row's does not depend on the other rows.
      end: a token that ends a row (it is not yielded), e.g. the tokenizer's bos; None = none.
      vocab: ids at and beyond it are never chosen (a model may be wider than its tokenizer); None = config.model.vocab.
    Raises UserError, before the first token is asked for, when prompt and `max_new` exceed the model's sequence, or an id
    its vocabulary.
    """
    prompts = np.atleast_2d(np.asarray(tokens, np.int32)).tolist()
    for prompt in prompts:
        check(config, prompt, max_new)
    return _stream(config, params, prompts, max_new, Choice(temperature, top_k or 0, top_p), seed, samples, end, vocab)


def _stream(
    config: Config, params: Any, prompts: list[list[int]], max_new: int, choice: Choice, seed: int, samples: int,
    end: int | None, vocab: int | None,
) -> Iterator[np.ndarray]:  # fmt: skip
    rows = rows_of(config, params, prompts, [max_new] * len(prompts), samples, seed)
    decoder = Decoder(config, params, rows, choice, () if end is None else (end,), vocab)
    for written in decoder.blocks(live=True):
        for column in written.tokens:
            column = np.where(column == end, -1, column) if end is not None else column
            if (column >= 0).any():
                yield column


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
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw among the fewest tokens of this probability together; 1 = all (1)",
    )
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
        "top-k": 0 <= a.top_k < 2**31,
        "top-p": 0 < a.top_p <= 1,
    }
    checks |= {"seed": 0 <= a.seed < 2**32, "samples": a.samples >= 1}
    for name, good in checks.items():
        if not good:
            raise UserError(f"--{name}={getattr(a, name.replace('-', '_'))}: out of range; see --help")
    xla.configure()
    dtype = a.dtype or ("f32" if jax.default_backend() == "cpu" else "stored")
    config, params, tokenizer = checkpoint.load_params(a.run, None if dtype == "stored" else dtype, a.step)
    ids = [tokenizer.bos, *tokenizer.encode(a.prompt)]
    options = dict(temperature=a.temperature, top_k=a.top_k, top_p=a.top_p, seed=a.seed, samples=a.samples)
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
