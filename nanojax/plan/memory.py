"""Splits a compiled step's memory into parameters, optimizer state, accumulators, residuals and temporaries."""

import dataclasses

from nanojax.plan import hlo
from nanojax.plan.cards import Card
from nanojax.plan.compile import Program, Value

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Temporary:
    """A stretch of the temporary allocation, named after the largest value that lies there."""

    bytes: int  # of the allocation, not covered by a larger one above
    name: str
    shape: str
    op_name: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one compiled step. `peak` is XLA's argument + output - alias + temp."""

    params: int
    opt: int
    accum: int
    other: int  # step counter, tokens, outputs that reuse no argument
    residuals: int  # what forward keeps for backward
    temporaries: int  # everything else that lives only within the step
    peak: int
    not_reused: int  # bytes of state whose buffer the new state does not reuse: 0 when donation is complete
    largest: tuple[Temporary, ...]  # of the temporary allocation


def measure(program: Program, residuals: int) -> Memory:
    """The Memory of `program`, whose forward keeps `residuals` bytes (step.residual_bytes)."""
    module = hlo.parse(program.hlo)
    residuals = min(residuals, program.temp_bytes)
    groups = program.groups
    state = groups.get("params", 0) + groups.get("opt", 0) + groups.get("accum", 0)
    return Memory(
        params=groups.get("params", 0),
        opt=groups.get("opt", 0),
        accum=groups.get("accum", 0),
        other=groups["other"] + program.output_bytes - program.alias_bytes,
        residuals=residuals,
        temporaries=program.temp_bytes - residuals,
        peak=program.peak_bytes,
        not_reused=max(0, state - program.alias_bytes),
        largest=tuple(_coverage(module, program.temporaries)),
    )


def verdict(memory: Memory, card: Card) -> tuple[bool, str]:
    """Whether the step fits the card's budget, and the sentence that says so."""
    left = card.budget_bytes - memory.peak
    budget = f"{card.budget_bytes / GIB:.1f} GiB that {card.key} leaves to XLA"
    if left >= 0:
        return True, f"fits: {left / GIB:.1f} GiB of the {budget} stay free"
    return False, f"does not fit: {-left / GIB:.1f} GiB more than the {budget}"


def _coverage(module: hlo.Module, values: tuple[Value, ...], most: int = 8) -> list[Temporary]:
    """What fills the temporary allocation, largest first: each value counts where no larger one covers it."""
    names = {i.name: i for c in module.computations.values() for i in c.instructions.values()}
    covered: list[tuple[int, int]] = []
    out = []
    for value in values:
        start, end = value.offset, value.offset + value.bytes
        free = value.bytes - sum(max(0, min(end, b) - max(start, a)) for a, b in covered)
        if free < value.bytes / 2:
            continue
        covered = _union([*covered, (start, end)])
        instruction = names.get(value.name)
        out.append(Temporary(free, value.name, value.shape.split("{")[0], instruction.op_name if instruction else ""))
        if len(out) == most:
            break
    return out


def _union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out
