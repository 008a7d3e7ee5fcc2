"""Shows what a data folder holds: rows, document lengths, waste, bytes per token, duplicates, sources; text and PNG."""

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np

from nanojax import cli, files
from nanojax.cli import UserError
from nanojax.data.clean import HashSet
from nanojax.data.packing import read_row, shard_plan
from nanojax.data.shards import Shard, find_shards
from nanojax.tokenizer import Tokenizer

MAX_SOURCES = 12  # lines of the table by source; the others are summed in one line


@dataclasses.dataclass
class Report:
    """Figures of one split, over the shards that were read."""

    split: str
    shards: int  # in the folder
    read: int  # shards of these that the figures below are about
    documents: int
    tokens: int
    bytes: int  # UTF-8 bytes that the tokens stand for
    lengths: np.ndarray  # int64 [documents], tokens with the begin token
    rows: int
    dropped: int  # tokens in no row
    repeated: int  # begin tokens repeated before the rest of a cut document
    duplicates: int  # documents equal to an earlier one
    sources: dict[str, dict[str, int]]  # documents, tokens, bytes by input file

    @property
    def bytes_per_token(self) -> float:
        """Bytes per ordinary token."""
        return self.bytes / max(1, self.tokens - self.documents)


def inspect(
    folder: str | os.PathLike, seq: int, shards: int, verify: bool = False, quiet: bool = False
) -> list[Report]:
    """Reads up to `shards` evenly spaced shards of each split; UserError names what is missing or damaged."""
    tokenizer = Tokenizer.load(Path(folder) / "tokenizer")
    sizes = tokenizer.bytes_per_token()
    reports = []
    for split in ("train", "valid"):
        found = find_shards(folder, split, tokenizer.fingerprint)
        chosen = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, shards).astype(int))] if found else []
        report = Report(split, len(found), len(chosen), 0, 0, 0, np.zeros(0, np.int64), 0, 0, 0, 0, {})
        seen = HashSet()
        with cli.Bar(f"inspect {split}", sum(2 * shard.tokens for shard in chosen), "B", quiet or not chosen) as bar:
            for shard in chosen:
                if verify:
                    shard.verify()
                _add(report, shard, tokenizer, sizes, seq, seen)
                bar.reach(2 * report.tokens)
        reports.append(report)
    if not any(report.shards for report in reports):
        raise UserError(f"{folder}: no token shards in it; run `python -m nanojax.data tokenize --out {folder}`")
    return reports


def _add(report: Report, shard: Shard, tokenizer: Tokenizer, sizes: np.ndarray, seq: int, seen: HashSet) -> None:
    plan = shard_plan(shard, tokenizer.bos, seq + 1)
    tokens = shard.open()
    begins = np.flatnonzero(tokens == tokenizer.bos)
    lengths = np.diff(np.append(begins, len(tokens)))
    report.documents += len(begins)
    report.tokens += len(tokens)
    report.bytes += int(np.bincount(tokens, minlength=len(sizes)) @ sizes)
    report.lengths = np.concatenate([report.lengths, lengths])
    report.rows += plan.rows
    report.dropped += plan.dropped
    report.repeated += plan.repeated
    digests = [
        hashlib.blake2b(tokens[begin : begin + length].tobytes(), digest_size=8).digest()
        for begin, length in zip(begins.tolist(), lengths.tolist())
    ]
    report.duplicates += int((~seen.add(np.frombuffer(b"".join(digests), np.uint64))).sum())
    for name, counts in shard.meta["inputs"].items():
        total = report.sources.setdefault(name, {"documents": 0, "tokens": 0, "bytes": 0})
        for key in total:
            total[key] += counts[key]


def rows_text(folder: str | os.PathLike, seq: int, rows: int, split: str = "train") -> str:
    """The first `rows` packed rows of the split, decoded; each piece begins with the begin token's name."""
    tokenizer = Tokenizer.load(Path(folder) / "tokenizer")
    lines = []
    for shard in find_shards(folder, split, tokenizer.fingerprint):
        plan = shard_plan(shard, tokenizer.bos, seq + 1)
        tokens = shard.open()
        for index in range(min(rows - len(lines), plan.rows)):
            row = read_row(tokens, plan, index, tokenizer.bos, seq + 1)
            lines += [f"--- {shard.name} row {index}\n{tokenizer.decode(row)}"]
        if len(lines) == rows:
            break
    return "\n".join(lines)


def text_report(report: Report, seq: int) -> str:
    """The report as lines of text."""
    r = report
    some = "" if r.read == r.shards else f", {r.read} of them read"
    lines = [f"{r.split}: {r.shards} shards{some}"]
    if not r.documents:
        return lines[0]
    share = lambda n: f"{100 * n / max(1, r.tokens):.3f}%"
    low, middle, high = np.percentile(r.lengths, [5, 50, 95])
    lines += [
        f"  {r.documents:,} documents, {r.tokens:,} tokens, {r.bytes:,} bytes, {r.bytes_per_token:.3f} bytes/token",
        f"  document length in tokens: median {middle:.0f}, 5% under {low:.0f}, 5% over {high:.0f}, "
        f"longest {r.lengths.max()}",
        f"  rows of {seq}+1: {r.rows:,}; tokens in no row {r.dropped:,} ({share(r.dropped)}), begin tokens repeated "
        f"{r.repeated:,} ({share(r.repeated)})",
        f"  duplicate documents: {r.duplicates:,} ({100 * r.duplicates / r.documents:.2f}%)",
        "  length histogram:",
    ]
    edges, counts = histogram(r.lengths)
    for low, high, count in zip(edges[:-1], edges[1:], counts):
        lines.append(f"    {low:>9,} - {high - 1:<9,} {count:>9,} {'#' * round(40 * count / counts.max())}")
    lines.append(f"  sources: {len(r.sources)}")
    ordered = sorted(r.sources.items(), key=lambda item: -item[1]["tokens"])
    rest = {key: sum(counts[key] for _, counts in ordered[MAX_SOURCES:]) for key in ("documents", "tokens", "bytes")}
    for name, c in ordered[:MAX_SOURCES] + ([(f"{len(ordered) - MAX_SOURCES} others", rest)] if rest["tokens"] else []):
        each = c["bytes"] / max(1, c["tokens"] - c["documents"])
        lines.append(f"    {name[-48:]:<48} {c['documents']:>9,} docs {c['tokens']:>13,} tokens {each:6.3f} B/token")
    return "\n".join(lines)


def histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges (powers of two) and counts of document lengths, without the empty ends."""
    edges = 2 ** np.arange(0, 41)
    counts = np.histogram(lengths, edges)[0]
    used = np.flatnonzero(counts)
    return edges[used[0] : used[-1] + 2], counts[used[0] : used[-1] + 1]


def picture(reports: list[Report], seq: int, path: str | os.PathLike) -> None:
    """Writes the figures as a PNG; UserError when matplotlib is missing or the file cannot be written."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--png needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    filled = [report for report in reports if report.documents]
    figure, axes = pyplot.subplots(len(filled), 3, figsize=(15, 4 * len(filled)), squeeze=False, layout="constrained")
    for (lengths, waste, sources), r in zip(axes, filled):
        edges, counts = histogram(r.lengths)
        lengths.bar(range(len(counts)), counts)
        lengths.set_xticks(range(len(counts)), [f"{edge:,}" for edge in edges[:-1].tolist()], rotation=60)
        lengths.axvline(np.log2((seq + 1) / edges[0]) - 0.5, color="tab:red", label=f"row of {seq + 1}")
        lengths.set(title=f"{r.split}: document length", xlabel="tokens, from", ylabel="documents")
        lengths.legend()
        shares = {"in no row": r.dropped / r.tokens, "begin token\nrepeated": r.repeated / r.tokens,
                  "duplicate\ndocuments": r.duplicates / r.documents}  # fmt: skip
        bars = waste.bar(list(shares), [100 * share for share in shares.values()], color="tab:orange")
        waste.bar_label(bars, fmt="%.3f%%")
        waste.margins(y=0.1)
        waste.set(title=f"{r.tokens:,} tokens in {r.rows:,} rows", ylabel="%")
        ordered = sorted(r.sources.items(), key=lambda item: item[1]["tokens"])[-MAX_SOURCES:]
        sources.barh([name[-32:] for name, _ in ordered], [c["tokens"] for _, c in ordered], color="tab:green")
        sources.set(title=f"largest of {len(r.sources)} sources, {r.bytes_per_token:.2f} bytes/token", xlabel="tokens")
    try:
        with files.write_atomic(path) as file:
            figure.savefig(file, dpi=100, format=Path(path).suffix[1:] or "png")
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: picture cannot be written ({error}); choose another --png") from None
    finally:
        pyplot.close(figure)


def main(arguments: list[str]) -> None:
    """`python -m nanojax.data inspect`."""
    parser = cli.Parser(
        "python -m nanojax.data inspect",
        "Shows what a data folder holds: document lengths, packing waste, bytes per token, duplicates, sources, rows.",
        "  python -m nanojax.data inspect --data data/demo --seq 512 --rows 2\n"
        "  python -m nanojax.data inspect --data data/fw --png fw.png --verify",
    )
    parser.add_argument("--data", type=cli.path, required=True, metavar="DIR", help="data folder")
    parser.add_argument("--seq", type=cli.count, default=2048, metavar="T", help="row length of the run (%(default)s)")
    parser.add_argument("--rows", type=cli.count, metavar="N", help="also print this many rows, decoded")
    parser.add_argument("--png", type=cli.path, metavar="FILE", help="also draw the figures")
    parser.add_argument("--shards", type=cli.count, default=10, metavar="N",
                        help="shards to read of each split, evenly spaced (%(default)s)")  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="also compare these shards with their checksums")
    args = parser.parse_args(arguments)
    reports = inspect(args.data, args.seq, args.shards, args.verify)
    for report in reports:
        print(text_report(report, args.seq))
    if args.verify:
        print(f"checksums of {sum(report.read for report in reports)} shards verified")
    if args.rows:
        print(rows_text(args.data, args.seq, args.rows))
    if args.png:
        picture(reports, args.seq, args.png)
        print(f"picture: {args.png}")
