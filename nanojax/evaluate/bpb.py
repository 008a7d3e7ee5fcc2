"""Bits per byte of validation shards or of any text, as nanochat defines them, in total and per source.

bpb = sum of nats over the text's tokens / ln 2 / sum of these tokens' UTF-8 bytes. Special tokens count in neither sum.
A token's bytes are its own, also where they are part of a character (`Tokenizer.bytes_per_token` has nanochat's older rule).
Text is cut into rows that begin with the begin token; every token of the text is predicted exactly once, from the tokens
before it in its row. The rows do not depend on the batch size, so neither does the result.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from nanojax import model
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.data import loader, text
from nanojax.evaluate import devices
from nanojax.tasks import prepared, stream
from nanojax.tokenizer import Tokenizer


class Row(NamedTuple):
    """tokens int32 [T+1]; source int32 [T], the number of each target's source, -1 = not counted."""

    tokens: np.ndarray
    source: np.ndarray


@dataclasses.dataclass
class Total:
    """Sums of one source."""

    nats: float = 0.0
    bytes: int = 0
    tokens: int = 0

    def scores(self) -> dict[str, float]:
        """bpb (bits per byte), nll (nats per token), tokens, bytes."""
        return {
            "bpb": self.nats / math.log(2) / self.bytes,
            "nll": self.nats / self.tokens,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def text_documents(inputs: list[str], key: str = "text", by: str | None = None) -> Iterator[tuple[str, str]]:
    """(source, text) of every usable document of files, folders or globs; source = file name, or the value under `by`.

    `by` names a key of JSON or a column of parquet; a .txt has none and keeps its name. UserError when no record has it,
    or when too much of the text cannot be read.
    """
    tally = text.Tally()
    for source in text.find(inputs):
        labels = text.labels(source, by) if by else itertools.repeat(source.name)
        for label, document in zip(labels, text.documents(source, key=key)):
            tally.add(document)
            if isinstance(document, str):
                yield label, document
    tally.check()


def text_rows(documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, T: int, names: list[str]) -> Iterator[Row]:
    """Rows [T+1] of the documents' tokens in order. `names` receives each source at its first appearance."""
    index: dict[str, int] = {}
    tokens = np.zeros(0, np.int32)  # not yet in a row
    sources = np.zeros(0, np.int32)

    def row(part: np.ndarray, part_sources: np.ndarray) -> Row:
        padding = T - len(part)
        filled = np.concatenate([[tokenizer.bos], part, np.full(padding, tokenizer.bos)])
        return Row(filled.astype(np.int32), np.concatenate([part_sources, np.full(padding, -1)]).astype(np.int32))

    for name, document in documents:
        if name not in index:
            index[name] = len(names)
            names.append(name)
        new = tokenizer.encode_numpy(document).astype(np.int32)
        between = [tokenizer.bos] if len(tokens) else []  # every row begins with the begin token already
        tokens = np.concatenate([tokens, np.array(between, np.int32), new])
        sources = np.concatenate([sources, np.full(len(between) + len(new), index[name], np.int32)])
        while len(tokens) >= T:
            yield row(tokens[:T], sources[:T])
            tokens, sources = tokens[T:], sources[T:]
    if len(tokens):
        yield row(tokens, sources)


def shard_rows(batches: Iterable[np.ndarray]) -> Iterator[Row]:
    """Rows of a data folder's validation batches, all of source 0."""
    for batch in batches:
        for tokens in batch:
            yield Row(tokens, np.zeros(len(tokens) - 1, np.int32))


def conversation_rows(folder: str | os.PathLike, T: int) -> Iterator[Row]:
    """Rows of the held-out conversations of a prepared folder; supervised targets are of source 0."""
    for tokens, supervised in stream.valid_rows(folder, T):
        yield Row(tokens, supervised[1:] - 1)


@devices.by_rows
def _losses(config: Config, params: Any, tokens_BT1: jax.Array) -> jax.Array:
    return model.token_losses(config, params, tokens_BT1)


Progress = Callable[[int], None]  # is called with the number of rows done so far


def measure(
    config: Config, params: Any, rows: Iterable[Row], bytes_V: np.ndarray, batch: int, progress: Progress | None = None
) -> dict[int, Total]:
    """The totals by number of the source. UserError when no token was counted.

    Args:
      bytes_V: int32, the tokenizer's bytes_per_token(): 0 for special tokens.
      batch: rows that go through the model together on each device; the last batch is padded with rows that do not count.
    """
    totals: dict[int, Total] = {}
    done = 0
    pending: tuple[jax.Array, np.ndarray, np.ndarray] | None = None

    def add(nats: jax.Array, tokens: np.ndarray, source: np.ndarray) -> None:
        size = np.where(source >= 0, bytes_V[tokens[:, 1:]], 0)
        counted = size > 0
        which = source[counted]
        nll = np.asarray(nats)[counted].astype(np.float64)
        for i in np.unique(which):
            total = totals.setdefault(int(i), Total())
            total.nats += float(nll[which == i].sum())
            total.bytes += int(size[counted][which == i].sum())
            total.tokens += int((which == i).sum())
        if progress:
            progress(done)

    iterator, batch = iter(rows), batch * devices.count(params)
    while group := list(itertools.islice(iterator, batch)):
        tokens = np.stack([row.tokens for row in group])
        source = np.stack([row.source for row in group])
        if len(group) < batch:
            fill = ((0, batch - len(group)), (0, 0))
            tokens = np.pad(tokens, fill)
            source = np.pad(source, fill, constant_values=-1)
        ahead = _losses(config, params, tokens), tokens, source
        if pending is not None:  # read one batch late, so that the device never waits
            add(*pending)
        pending = ahead
        done += len(group)
    if pending is not None:
        add(*pending)
    if not totals:
        raise UserError("bpb: no text found in the input, nothing to measure")
    return totals


def of_folder(
    config: Config,
    params: Any,
    tokenizer: Tokenizer,
    folder: str | os.PathLike,
    batch: int,
    tokens: int = 0,
    progress: Progress | None = None,
    bytes_V: np.ndarray | None = None,
) -> Total:
    """The total over the first `tokens` tokens (0: all) that a data folder holds out, rounded up to whole rows.

    Of prepared conversations their supervised tokens count. `bytes_V` None: the tokenizer's bytes_per_token().
    """
    bytes_V = tokenizer.bytes_per_token() if bytes_V is None else bytes_V
    T = config.model.T
    # Batches of one row: larger ones would leave out the rows that do not fill the last batch.
    text = lambda: shard_rows(loader.valid_batches(folder, 1, T))
    rows = conversation_rows(folder, T) if prepared.is_prepared(folder) else text()
    first = itertools.islice(rows, math.ceil(tokens / config.model.T) or None)
    return measure(config, params, first, bytes_V, batch, progress)[0]


def of_texts(
    config: Config,
    params: Any,
    tokenizer: Tokenizer,
    documents: Iterable[tuple[str, str]],
    batch: int,
    progress: Progress | None = None,
    bytes_V: np.ndarray | None = None,
) -> dict[str, Total]:
    """The totals of (source, text) pairs by source, in order of appearance; see `text_documents` and `of_folder`."""
    bytes_V = tokenizer.bytes_per_token() if bytes_V is None else bytes_V
    names: list[str] = []
    rows = text_rows(documents, tokenizer, config.model.T, names)
    totals = measure(config, params, rows, bytes_V, batch, progress)
    return {names[i]: totals[i] for i in sorted(totals)}


def summary(sources: dict[str, Total]) -> dict[str, Any]:
    """Scores of everything together and of each source, as JSON."""
    everything = Total(
        *(sum(getattr(total, field) for total in sources.values()) for field in ("nats", "bytes", "tokens"))
    )
    return {**everything.scores(), "sources": {name: total.scores() for name, total in sources.items()}}
