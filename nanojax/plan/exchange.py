"""What the cards of one step send each other: the bytes of a compiled program's collectives."""

from nanojax.plan import hlo

KIND = "communication"  # of such a kernel


def sent(module: hlo.Module, computation: hlo.Computation, i: hlo.Instruction) -> float | None:
    """Bytes that each card sends in an exchange, in rings; None of any other instruction.

    Of n cards, all but an n-th of the whole array when it is gathered, or reduced and scattered; about twice all of it when it
    is summed everywhere.
    """
    if i.opcode == "async-start":
        inner = module.computations[i.called("calls")]
        return sent(module, inner, inner.root)
    opcode = i.opcode.removesuffix("-start")
    if opcode not in ("all-gather", "reduce-scatter", "all-reduce"):
        return None
    given = sum(computation.instructions[o].bytes for o in i.operands)
    if opcode == "all-reduce":
        return 2.0 * given
    made = i.bytes - given if i.opcode.endswith("-start") else i.bytes  # a start's shape has its operands, too
    return abs(made - given)
