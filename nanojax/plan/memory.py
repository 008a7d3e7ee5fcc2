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
    residuals: int  # stacked by the forward scan for backward
    temporaries: int  # everything else that lives only within the step
    peak: int
    not_reused: int  # bytes of state whose buffer the new state does not reuse: 0 when donation is complete
    largest: tuple[Temporary, ...]  # of the temporary allocation


def measure(program: Program, layers: int) -> Memory:
    """The Memory of `program`, whose blocks are a scan over `layers`."""
    module = hlo.parse(program.hlo)
    stacks = residual_stacks(module, layers)
    residuals = min(sum(stacks.values()), program.temp_bytes)
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


def residual_stacks(module: hlo.Module, layers: int) -> dict[str, int]:
    """Bytes of each array that a loop over `layers` fills slice by slice and never reads: what forward keeps.

    A stack counts if a loop of `layers` trips carries it, writes it only by dynamic-update-slice and never reads it.
    Gradient accumulators and updated state are read too, so they do not count.
    """
    out: dict[str, int] = {}
    for computation in module.computations.values():
        for loop in computation.instructions.values():
            if loop.opcode != "while" or loop.attribute(r'"known_trip_count":\{"n":"(\d+)"') != str(layers):
                continue
            body = module.computations[loop.called("body")]
            if body.root.opcode != "tuple" or len(body.root.operands) != len(loop.arrays):
                continue
            for index, array in enumerate(loop.arrays):
                if array.dims[:1] == (layers,) and len(array.dims) > 1 and _only_written(module, body, index):
                    out[f"{loop.name}{{{index}}}"] = array.bytes
    return out


def _only_written(module: hlo.Module, body: hlo.Computation, index: int) -> bool:
    """Whether loop element `index` is used by nothing but in-place slice updates."""
    carried = [i for i in body.instructions.values() if i.opcode == "get-tuple-element" and _index(i) == index]
    carried = [i for i in carried if body.instructions[i.operands[0]].opcode == "parameter"]
    if not carried:
        return False
    written = False
    for element in carried:
        for user in body.users[element.name]:
            if user.opcode == "tuple":  # handed on unchanged: an input of the loop, not a stack it fills
                return False
            if user.opcode == "dynamic-update-slice":
                updated = user.operands[0] == element.name and element.name not in user.operands[1:]
            elif user.opcode == "fusion":
                inner = module.computations[user.called("calls")]
                places = [inner.parameters[n].name for n, o in enumerate(user.operands) if o == element.name]
                updated = all(_only_updates(inner, place) for place in places)
            else:
                return False
            if not updated:
                return False
            written = True
    return written


def _index(instruction: hlo.Instruction) -> int:
    return int(instruction.attribute(r"index=(\d+)") or -1)


def _only_updates(computation: hlo.Computation, name: str) -> bool:
    users = computation.users[name]
    return bool(users) and all(
        (u.opcode == "dynamic-update-slice" and u.operands[0] == name and name not in u.operands[1:])
        or (u.opcode == "bitcast" and _only_updates(computation, u.name))
        for u in users
    )


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
