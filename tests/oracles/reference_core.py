"""CORE one example at a time, slow and plain: the oracle of evaluate/core.py and likelihood.py, with none of their code.

As nanochat does it: every prompt of an example is a row of one right-padded batch; all logits, the loss and the argmax
are computed at every position, and the scored span is cut out. Rows are padded to a `multiple` of tokens so that jit compiles
few shapes; causality makes the padding harmless.
"""

import functools
import random
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojax import model
from nanojax.config import Config
from nanojax.evaluate.core import Task
from nanojax.tokenizer import Tokenizer

Example = dict[str, Any]  # as the task files have it


@functools.partial(jax.jit, static_argnums=0)
def _losses_and_guesses(config: Config, params: Any, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """nats [B,T] of every next token (the last one's means nothing) and the argmax [B,T], from all logits."""
    logits = model.forward(config, params, tokens_BT)
    log_p = jax.nn.log_softmax(logits, -1)
    return -jnp.take_along_axis(log_p, jnp.roll(tokens_BT, -1, 1)[..., None], -1)[..., 0], jnp.argmax(logits, -1)


def prompts(kind: str, item: Example, shots: Sequence[Example], delimiter: str) -> list[str]:
    """The prompts of one example, written out."""
    text = ""
    for shot in shots:
        if kind == "multiple_choice":
            text += shot["query"] + delimiter + shot["choices"][shot["gold"]]
        elif kind == "schema":
            text += shot["context_options"][shot["gold"]] + delimiter + shot["continuation"]
        else:
            text += shot["context"].strip() + delimiter + shot["continuation"]
        text += "\n\n"
    if kind == "multiple_choice":
        return [text + item["query"] + delimiter + choice for choice in item["choices"]]
    if kind == "schema":
        return [text + context + delimiter + item["continuation"] for context in item["context_options"]]
    start = text + item["context"].strip() + delimiter
    return [start.strip(), start + item["continuation"]]


def example(
    config: Config,
    params: Any,
    tokenizer: Tokenizer,
    task: Task,
    data: Sequence[Example],
    index: int,
    multiple: int = 64,
) -> bool:
    """True if the model answers example `index` of the list `data` rightly."""
    item = data[index]
    others = [i for i in range(len(data)) if i != index]
    shots = [data[i] for i in random.Random(1234 + index).sample(others, task.shots)] if task.shots else []
    rows = [[tokenizer.bos] + tokenizer.encode(p) for p in prompts(task.kind, item, shots, task.delimiter)]
    if task.kind == "language_modeling":
        without, full = rows
        start, rows = len(without), [full]
        assert full[:start] == without
        spans = [(start, len(full))]
    elif task.kind == "multiple_choice":
        start = 0
        while all(len(r) > start and r[start] == rows[0][start] for r in rows):
            start += 1
        spans = [(start, len(r)) for r in rows]
    else:
        tail = 0
        while all(len(r) > tail and r[-1 - tail] == rows[0][-1 - tail] for r in rows):
            tail += 1
        spans = [(len(r) - tail, len(r)) for r in rows]
    length = -(-max(map(len, rows)) // multiple) * multiple
    tokens = np.array([r + [tokenizer.bos] * (length - len(r)) for r in rows], np.int32)
    losses, guesses = (np.asarray(a) for a in _losses_and_guesses(config, params, tokens))
    if task.kind == "language_modeling":
        ((a, b),) = spans
        return bool((guesses[0, a - 1 : b - 1] == tokens[0, a:b]).all())
    means = [
        float(losses[row, a - 1 : b - 1].astype("f8").mean()) if b > a else np.nan for row, (a, b) in enumerate(spans)
    ]
    return means.index(min(means)) == item["gold"]
