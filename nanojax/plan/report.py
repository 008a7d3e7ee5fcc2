"""Draws plans in the terminal: memory bar, time by kernel, days, energy and money; tables of several plans."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from nanojax.hardware import GIB, Card
from nanojax.plan import core_of_flops, days, energy, planner, rollouts
from nanojax.plan.compile import Memory
from nanojax.plan.core_of_flops import Core
from nanojax.plan.decoding import Decoding
from nanojax.plan.planner import Plan
from nanojax.plan.rollouts import Rollouts

_PARTS = (
    ("params", "parameters", "cyan"),
    ("opt", "optimizer state", "blue"),
    ("accum", "accumulators", "magenta"),
    ("residuals", "residuals", "green"),
    ("operands", "held operands", "bright_green"),
    ("temporaries", "temporaries", "yellow"),
    ("other", "tokens, counters", "white"),
)


def bar(memory: Memory, card: Card, width: int = 72) -> Text:
    """The card's memory as one line: what the step needs (█), what stays free (·), what XLA cannot use (▒)."""
    total = max(card.memory_mib * 2**20, memory.peak)
    text, cells = Text(), 0
    spent = 0
    for key, _, colour in _PARTS:
        spent += getattr(memory, key)
        upto = round(spent / total * width)
        text.append("█" * (upto - cells), style=colour)
        cells = max(cells, upto)
    budget = round(min(card.budget_bytes / total, 1) * width)
    text.append("·" * max(0, budget - cells))
    text.append("▒" * (width - max(cells, budget)), style="bright_black")
    return text


def _memory(plan: Plan) -> RenderableType:
    m = plan.memory
    table = Table.grid(padding=(0, 2))
    table.add_column(width=18)
    table.add_column(justify="right", width=9)
    table.add_column()
    for key, label, colour in _PARTS:
        size = getattr(m, key)
        if size >= GIB * 0.0005:
            table.add_row(Text("█ ", style=colour) + Text(label), f"{size / GIB:.3f}", "GiB")
    stored, rest = plan.block_bits
    left = f", and {rest:g} of remainders" if rest else ""
    table.add_row("block matrices", f"{stored:.2f}", f"bits per weight, scales included{left}")
    table.add_row("peak", f"{m.peak / GIB:.3f}", "GiB: XLA's arguments + outputs - aliased + temporaries")
    lines: list[RenderableType] = [bar(m, plan.card), table]
    style = "bold green" if plan.fits else "bold red"
    lines.append(Text(plan.verdict, style=style))
    if m.not_reused:
        lines.append(Text(f"state that is not updated in place: {m.not_reused / GIB:.3f} GiB", style="red"))
    share = m.temporaries / max(1, m.params)
    lines.append(
        Text(f"temporaries are {share:.2f} of the parameters' bytes; the largest of the temporary allocation:")
    )
    lines += [
        Text(f"  {t.bytes / GIB:6.3f} GiB  {t.shape:26} {t.name:36} {_tail(t.op_name)}", no_wrap=True, overflow="crop")
        for t in m.largest[:5]
    ]
    return Group(*lines)


def _tail(op_name: str, most: int = 48) -> str:
    name = "/".join(p for p in op_name.split("/") if p not in ("while", "body", "closed_call", "jit(step)"))
    return name if len(name) <= most else "…" + name[-most:]


def _time(plan: Plan, top: int) -> RenderableType:
    model, train = plan.config.model, plan.config.train
    step = plan.estimate.seconds
    kinds = Table("kernels", "calls", "ms/step", "share", "TFLOP", "GB", box=None, pad_edge=False)
    for column in kinds.columns[1:]:
        column.justify = "right"
    for kind, k in plan.estimate.by_kind().items():
        ms, share = f"{k.seconds * 1e3:.1f}", f"{k.seconds / step:.1%}"
        kinds.add_row(kind, f"{k.calls}", ms, share, f"{k.flops / 1e12:.2f}", f"{k.bytes / 1e9:.1f}")
    kernels = Table("slowest kernels (modelled)", "bound", "ms/step", "share", "from", box=None, pad_edge=False)
    for k in plan.estimate.kernels[:top]:
        kernels.add_row(
            k.name, k.bound, f"{k.seconds * 1e3:.1f}", f"{k.seconds / step:.1%}", Text(_tail(k.op_name, 40))
        )
    rate = plan.tokens_per_second
    word = "measured" if plan.measured else "modelled"
    flops = rate * model.flops_per_token
    lines: list[RenderableType] = [
        Text(
            f"{model.parameters:,} parameters, {train.tokens:,} tokens in {train.steps:,} steps of "
            f"{train.tokens_per_step:,} ({train.microbatch} rows per microbatch)"
        ),
        Text(
            f"{model.flops_per_token / 1e9:.3f} GFLOP per token, {model.flops_per_token * train.tokens:.3g} FLOP in total "
            "(6(N - embedding) + 12 L N H T)"
        ),
        Text(
            f"{rate:,.0f} tokens/s {word}, {train.tokens_per_step / rate:.1f} s per step, "
            f"{flops / 1e12:.1f} model TFLOP/s ({flops / plan.cards / plan.card.peak('bf16'):.0%} of the card's bf16 peak)",
            style="bold",
        ),
        Text(""),
        kinds,
    ]
    if top:
        lines += [Text(""), kernels]
    if plan.estimate.unknown:
        lines.append(Text(f"not modelled beyond their traffic: {', '.join(plan.estimate.unknown)}", style="yellow"))
    return Group(*lines)


def _money(bill: energy.Bill, prices: dict[str, float]) -> Text:
    costs = ", ".join(f"{c} {bill.cost[c]:,.0f} at {p:g} per kWh" for c, p in prices.items())
    return Text(
        f"{bill.days:,.1f} days, {bill.kwh:,.0f} kWh at {bill.watts:g} W (the GPU alone): {costs}", style="bold"
    )


def show(plan: Plan, console: Console, prices: dict[str, float], top: int = 10) -> None:
    """The whole plan."""
    several = f"{plan.cards} x " if plan.link else ""
    console.rule(f"{plan.config.name} on {several}{plan.card.name}", align="left")
    exchange = [_exchange(plan), Text("")] if plan.link else []
    console.print(_memory(plan), Text(""), _time(plan, top), Text(""), *exchange, _money(plan.bill, prices), sep="\n")


def _exchange(plan: Plan) -> Text:
    """What several cards send each other in a step."""
    assert plan.link is not None
    seconds, sent = plan.estimate.communication
    text = (
        f"{plan.cards} cards over {plan.link.name}, {plan.link.gb_per_s:g} GB/s each way assumed: each sends "
        f"{sent / 1e9:.2f} GB a step, {seconds:.2f} s modelled, {plan.efficiency:.1%} of the step is computation"
    )
    slow = planner.advice(plan)
    return Text(text + (f"\n{slow}" if slow else ""), style="yellow" if slow else "")


def show_cards(plans: Sequence[Plan], console: Console, prices: dict[str, float]) -> None:
    """One row per number of cards that share a step."""
    head = (
        "cards",
        "peak GiB\na card",
        "fits",
        "GB sent\na step",
        "s",
        "tokens/s",
        "efficiency",
        "days",
        "kWh",
        *prices,
    )
    first = plans[0]
    title = f"{first.config.name}: {first.card.key}, {first.config.train.tokens_per_step:,} tokens per step (modelled)"
    table = Table(*head, title=title, title_justify="left", box=None)
    for column in table.columns:
        column.justify = "right"
    for p in plans:
        seconds, sent = p.estimate.communication
        size = (f"{p.memory.peak / GIB:.2f}", "yes" if p.fits else "NO", f"{sent / 1e9:.2f}", f"{seconds:.2f}")
        costs = [f"{p.bill.cost[c]:,.0f}" for c in prices]
        speed = (f"{p.tokens_per_second:,.0f}", f"{p.efficiency:.1%}", f"{p.bill.days:,.1f}", f"{p.bill.kwh:,.0f}")
        table.add_row(f"{p.cards}", *size, *speed, *costs)
    console.print(table)
    for p in plans:
        if slow := planner.advice(p):
            console.print(f"{p.cards} cards: {slow}")


def show_changes(found: Sequence[tuple[dict[str, str], Plan]], console: Console) -> None:
    """The changes that would make a plan fit."""
    if not found:
        console.print(
            "no change of microbatch, residuals or formats makes it fit; a smaller model.depth or model.seq would"
        )
        return
    console.print("what would make it fit (each compiled):")
    console.print(_trials(found))


def _trials(trials: Sequence[tuple[dict[str, str], Plan]]) -> Table:
    table = Table("change", "peak GiB", "fits", "tokens/s modelled", "days", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for change, plan in trials:
        text = " ".join(f"--{k}={v}" for k, v in change.items())
        peak, rate = f"{plan.memory.peak / GIB:.2f}", f"{plan.tokens_per_second:,.0f}"
        table.add_row(text, peak, "yes" if plan.fits else "no", rate, f"{plan.bill.days:,.1f}")
    return table


def show_sweep(trials: Sequence[tuple[dict[str, str], Plan]], console: Console) -> None:
    console.print(_trials(trials))


def show_table(plans: Sequence[Plan], console: Console, prices: dict[str, float]) -> None:
    """One row per plan."""
    head = ("config", "recipe", "card", "params", "bits", "tokens", "FLOPs")
    head += ("peak\nGiB", "fits", "tok/s", "days", "kWh", *prices)
    title = (
        "shipped configs (modelled; GPU power at its limit; bits per block weight + remainder; recipe: model.family)"
    )
    table = Table(*head, title=title, title_justify="left", box=None)
    for column in table.columns[3:]:
        column.justify = "right"
    for p in plans:
        tokens, b = f"{p.config.train.tokens / 1e9:.2f}B", p.bill
        peak, rate = f"{p.memory.peak / GIB:.2f}", f"{p.tokens_per_second:,.0f}"
        costs = [f"{b.cost[c]:,.0f}" for c in prices]
        stored, rest = p.block_bits
        row = (
            p.config.name,
            p.config.model.family,
            p.card.key,
            f"{p.config.model.parameters / 1e6:,.0f}M",
            f"{stored:.2f}" + (f"+{rest:g}" if rest else ""),
            tokens,
            f"{p.config.model.flops_per_token * p.config.train.tokens:.1e}",
            peak,
            "yes" if p.fits else "NO",
            rate,
        )
        table.add_row(*row, f"{b.days:,.1f}", f"{b.kwh:,.0f}", *costs)
    console.print(table)


def show_decoding(plans: Sequence[Decoding], console: Console) -> None:
    """One row per number of rows, and what the figures are."""
    first = plans[0]
    kind = "int8" if first.int8_cache else first.config.compute.dtype
    console.rule(
        f"{first.config.name} on {first.card.name}: decoding over {first.context:,} tokens, cache in {kind}",
        align="left",
    )
    head = ("rows", "tokens/s", "ms/step", "kernels", "weights\nMB", "cache\nMB", "moved\nMB", "limit\ntokens/s")
    table = Table(*head, "share", "peak\nGiB", "fits", box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for p in plans:
        sizes = (f"{size / 1e6:,.0f}" for size in (p.weight_bytes, p.cache_bytes, p.moved_bytes))
        speed = (f"{p.tokens_per_second:,.0f}", f"{p.seconds * 1e3:.2f}", f"{sum(k.calls for k in p.step.kernels)}")
        limit = (f"{p.limit_tokens_per_second:,.0f}", f"{p.share:.0%}")
        peak = (f"{p.program.peak_bytes / GIB:.2f}", "yes" if p.fits else "NO")
        table.add_row(f"{p.rows}", *speed, *sizes, *limit, *peak)
    console.print(table)
    console.print(
        f"Peak is compiled, times are modelled. The limit: weights and cache once a step at {first.card.gb_per_s:g} GB/s. "
        "Moved: what the compiled step reads and writes. Not modelled: the host waits for the loop's condition once per token."
    )
    if first.step.unknown:
        console.print(f"not modelled beyond their traffic: {', '.join(first.step.unknown)}", style="yellow")


def show_rollouts(plan: Rollouts, console: Console) -> None:
    """Both peaks, and the hours of nanochat's epoch."""
    decoder, card = plan.decoder, plan.decoder.card
    console.rule(
        f"{decoder.config.name} on {card.name}: {decoder.rows} answers at a time, rows of {decoder.context:,} tokens",
        align="left",
    )
    table = Table("", "peak\nGiB", "in memory", "tokens/s", "hours", box=None, pad_edge=False)
    for column in (table.columns[1], *table.columns[3:]):
        column.justify = "right"
    rate, limit, hours = decoder.tokens_per_second, decoder.limit_tokens_per_second, plan.decode_hours
    size = f"{plan.answering_bytes / GIB:.2f}"
    table.add_row("answering", size, "parameters, optimizer, cache", f"{rate:,.0f}", f"{hours:.1f}")
    table.add_row("its limit by bandwidth", "", "", f"{limit:,.0f}", f"{plan.limit_hours:.1f}")
    size, rate = f"{plan.training_bytes / GIB:.2f}", plan.training.tokens_per_second
    held = "parameters, optimizer, accumulators, residuals"
    table.add_row("training", size, held, f"{rate:,.0f}", f"{plan.train_hours:.1f}")
    console.print(table)
    console.print(
        f"{'Fits' if plan.fits else 'Does not fit'}: {card.key} leaves {card.budget_bytes / GIB:.1f} GiB to XLA, and the two "
        f"are never in memory together. Hours are of nanochat's epoch: {rollouts.EPOCH:,} answers of {rollouts.TOKENS} tokens "
        f"each, written {decoder.rows} at a time with the cache full, and their rows trained, padding included. Peaks are "
        f"compiled, times modelled. The limit: weights and cache once a step at {card.gb_per_s:g} GB/s."
    )


def show_choices(choices: Sequence[days.Choice], console: Console, prices: dict[str, float]) -> None:
    """The models for a time budget, one row each, how they are ordered, and the command that starts the first."""
    head = (
        "depth",
        "parameters",
        "tokens",
        "ratio",
        "tok/s",
        "peak\nGiB",
        "fits",
        "days",
        "kWh",
        *prices,
        "FLOPs",
        "CORE",
    )
    table = Table(*head, box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    table.columns[-1].justify = "left"
    for c in choices:
        p = c.plan
        table.add_row(
            f"d{c.depth}",
            f"{p.config.model.parameters / 1e9:.2f}B",
            f"{p.config.train.tokens / 1e9:.2f}B",
            f"{c.ratio:.1f}" + ("" if c.usual else "*"),
            f"{p.tokens_per_second:,.0f}",
            f"{p.memory.peak / GIB:.1f}",
            "yes" if p.fits else "NO",
            _three(p.bill.days),
            _three(p.bill.kwh),
            *(_three(p.bill.cost[currency]) for currency in prices),
            f"{c.flops:.1e}",
            _core(c.core),
        )
    console.print(table)
    for line in _notes(choices):
        console.print(line)


def _three(value: float) -> str:
    """To three digits, or to a whole number."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _core(core: Core) -> str:
    return f"{core.value:.3f} ({core.low:.3f} to {core.high:.3f})" + " extrapolated" * core.extrapolated


def _notes(choices: Sequence[days.Choice]) -> list[str]:
    """What the table's figures are, and the command."""
    first, (low, high) = choices[0], days.RATIOS
    least, most = core_of_flops.published()
    order = f"Best first: a ratio of {low:g} to {high:g} tokens per parameter of matrices and head, as nanochat's; then FLOPs."
    lines = [order]
    if first.ratio > high and not any(c.depth > first.depth and c.plan.fits for c in choices):
        lines.append(f"No deeper model fits {first.plan.card.key}.")
    if not all(c.usual for c in choices):
        lines.append(f"* outside {low:g} to {high:g}, where the published runs lie; CORE may be lower than theirs.")
    return [
        "",
        *lines,
        f"Memory is compiled, time modelled (training steps alone, {first.plan.bill.watts:g} W).",
        f"CORE: what other people's runs on other hardware reached at these FLOPs, and its 95% range; published are "
        f"{least:.2g} to {most:.2g}.",
        "",
        f"python -m nanojax.train {first.arguments}",
    ]
