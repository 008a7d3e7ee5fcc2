"""Bits per byte of any text, by nanochat's definition, streaming, in total and per source.

bpb = sum of nats over the text's tokens / ln 2 / sum of these tokens' UTF-8 bytes. Special tokens count in neither sum.
Text is cut into rows that begin with the begin token; every token of the text is predicted exactly once, given what
stands before it in its row. Rows do not depend on how many go through the model together, so neither does the result.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanojax import model
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.data import text
from nanojax.tokenizer import Tokenizer


class Row(NamedTuple):
    """tokens int32 [T+1]; source int32 [T] of each target, -1 = not counted."""

    tokens: np.ndarray
    source: np.ndarray


@dataclasses.dataclass
class Total:
    """Sums of one source."""

    nats: float = 0.0
    bytes: int = 0
    tokens: int = 0

    def scores(self) -> dict[str, float]:
        """bpb (bits a byte), nll (nats a token), tokens, bytes."""
        return {
            "bpb": self.nats / math.log(2) / self.bytes,
            "nll": self.nats / self.tokens,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def text_documents(inputs: list[str], key: str = "text", by: str | None = None) -> Iterator[tuple[str, str]]:
    """(source, text) of every usable document of files, folders or globs; source = file name, or the value under `by`.

    `by` names a key of JSON lines or a column of parquet that holds text. UserError when it is not there.
    """
    for source in text.find(inputs):
        found = text.documents(source, key=key)
        labels: Iterable[str | text.Dropped] = text.documents(source, key=by) if by else itertools.repeat(source.name)
        for document, label in zip(found, labels):
            if isinstance(document, str) and isinstance(label, str):
                yield label, document


def text_rows(documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, T: int, names: list[str]) -> Iterator[Row]:
    """Rows [T+1] of the documents' tokens in order. `names` receives each source at its first appearance."""
    index: dict[str, int] = {}
    tokens, sources = np.zeros(0, np.int32), np.zeros(0, np.int32)

    def row(part: np.ndarray, part_sources: np.ndarray) -> Row:
        padding = T - len(part)
        filled = np.concatenate([[tokenizer.bos], part, np.full(padding, tokenizer.bos)])
        return Row(filled.astype(np.int32), np.concatenate([part_sources, np.full(padding, -1)]).astype(np.int32))

    for name, document in documents:
        if name not in index:
            index[name] = len(names)
            names.append(name)
        new = tokenizer.encode_numpy(document).astype(np.int32)
        between = [tokenizer.bos] if len(tokens) else []  # a row begins with the begin token anyway
        tokens = np.concatenate([tokens, np.array(between, np.int32), new])
        sources = np.concatenate([sources, np.full(len(between) + len(new), index[name], np.int32)])
        while len(tokens) >= T:
            yield row(tokens[:T], sources[:T])
            tokens, sources = tokens[T:], sources[T:]
    if len(tokens):
        yield row(tokens, sources)


def shard_rows(batches: Iterable[np.ndarray]) -> Iterator[Row]:
    """Rows of a data folder's validation batches (loader.valid_batches with rows=1, so that none is left out)."""
    for batch in batches:
        for tokens in batch:
            yield Row(tokens, np.zeros(len(tokens) - 1, np.int32))


@functools.partial(jax.jit, static_argnums=0)
def _losses(config: Config, params: Any, tokens_BT1: jax.Array) -> jax.Array:
    return model.token_losses(config, params, tokens_BT1)


def measure(
    config: Config, params: Any, rows: Iterable[Row], bytes_V: np.ndarray, batch: int
) -> Iterator[dict[int, Total]]:
    """Yields the totals by source so far after every `batch` rows; the last one yielded is the result.

    Args:
      bytes_V: int32, the tokenizer's bytes_per_token(): 0 for special tokens.
      batch: rows that go through the model together; the last batch is padded with rows that do not count.
    """
    totals: dict[int, Total] = {}
    pending: tuple[jax.Array, np.ndarray, np.ndarray] | None = None

    def add(nats: jax.Array, tokens: np.ndarray, source: np.ndarray) -> None:
        size = np.where(source >= 0, bytes_V[tokens[:, 1:]], 0)
        counted = size > 0
        which, nll = source[counted], np.asarray(nats)[counted].astype(np.float64)
        for i in np.unique(which):
            total = totals.setdefault(int(i), Total())
            total.nats += float(nll[which == i].sum())
            total.bytes += int(size[counted][which == i].sum())
            total.tokens += int((which == i).sum())

    iterator = iter(rows)
    while group := list(itertools.islice(iterator, batch)):
        tokens, source = np.stack([r.tokens for r in group]), np.stack([r.source for r in group])
        if len(group) < batch:
            fill = ((0, batch - len(group)), (0, 0))
            tokens, source = np.pad(tokens, fill), np.pad(source, fill, constant_values=-1)
        ahead = _losses(config, params, jnp.asarray(tokens)), tokens, source
        if pending is not None:  # read one batch late, so that the device never waits
            add(*pending)
            yield totals
        pending = ahead
    if pending is not None:
        add(*pending)
        yield totals


def summary(totals: dict[int, Total], names: list[str]) -> dict[str, Any]:
    """Scores of everything together and of each source, as JSON. UserError when no text was counted."""
    if not totals:
        raise UserError("bpb: no text found in the input, nothing to measure")
    parts = [(names[i], totals[i]) for i in sorted(totals)]
    everything = Total(*(sum(getattr(t, f) for _, t in parts) for f in ("nats", "bytes", "tokens")))
    return {**everything.scores(), "sources": {name: t.scores() for name, t in parts}}
