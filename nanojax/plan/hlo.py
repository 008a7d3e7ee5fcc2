"""Parses the text of an optimised HLO module into computations and instructions."""

import dataclasses
import functools
import math
import re

BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16}
BITS |= {"bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}
BITS |= {name: 8 for name in ("f8e4m3fn", "f8e5m2", "f8e4m3", "f8e3m4", "f8e4m3fnuz", "f8e5m2fnuz", "f8e8m0fnu")}
BITS |= {"token": 0, "opaque": 0}

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\]")
_HEAD = re.compile(r"^\s*(ROOT\s+)?%?([\w.\-]+)\s+=\s+")
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\{\s*$")
_COMMENT = re.compile(r"/\*.*?\*/")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array: element type and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return (self.size * BITS[self.dtype] + 7) // 8


@functools.lru_cache(maxsize=1 << 16)
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, tuples flattened: `(f32[2,3]{1,0}, s32[])` has two. ValueError on an unknown element type."""
    out = []
    for dtype, dims in _ARRAY.findall(shape):
        if dtype not in BITS:
            raise ValueError(f"HLO element type {dtype!r} in {shape[:80]!r} is unknown")
        out.append(Array(dtype, tuple(int(d.strip("<= ")) for d in dims.split(",") if d.strip())))
    return tuple(out)


@dataclasses.dataclass
class Instruction:
    """One instruction. `operands` are names of instructions in the same computation; `attributes` is the rest of the line."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    argument: str  # the text between the parentheses: a parameter's number, a constant's value
    root: bool

    @property
    def arrays(self) -> tuple[Array, ...]:
        return arrays(self.shape)

    @property
    def bytes(self) -> int:
        return sum(a.bytes for a in self.arrays)

    @property
    def size(self) -> int:
        return sum(a.size for a in self.arrays)

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern` in the attributes; None if it does not match."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    def called(self, key: str) -> str:
        """The computation that `key=` (calls, body, to_apply, ...) names. ValueError without that key."""
        name = self.attribute(rf"\b{key}=%?([\w.\-]+)")
        if name is None:
            raise ValueError(f"HLO: {self.opcode} {self.name} has no {key}=")
        return name

    @property
    def op_name(self) -> str:
        """The JAX operation that it came from: jit(step)/while/body/dot_general."""
        return self.attribute(r'op_name="([^"]*)"') or ""


@dataclasses.dataclass
class Computation:
    """A computation's instructions by name, in the order of the text."""

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        for instruction in reversed(self.instructions.values()):
            if instruction.root:
                return instruction
        raise ValueError(f"HLO: computation {self.name} has no ROOT")

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each instruction, by name."""
        out: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                out[operand].append(instruction)
        return out

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """The parameters in the order of their numbers."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.argument))


@dataclasses.dataclass
class Module:
    """All computations by name, and the name of the entry computation."""

    computations: dict[str, Computation]
    entry: str


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`; quoted text is skipped."""
    depth, quoted = 0, False
    for i in range(start, len(text)):
        c = text[i]
        if c == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif not quoted:
            if c == "(":
                depth += 1
            elif c == ")":
                depth -= 1
                if depth == 0:
                    return i
    raise ValueError(f"HLO: unbalanced parentheses in {text[:80]!r}")


def _instruction(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if not head:
        return None
    rest = _COMMENT.sub("", line[head.end() :])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    opcode = rest[:opening]
    operands = [] if opcode in ("parameter", "constant") else _NAME.findall(inside)
    return Instruction(head.group(2), shape, opcode, operands, rest[closing + 1 :], inside, bool(head.group(1)))


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`. ValueError if it has no entry computation."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = None
    for line in text.splitlines():
        if current is None:
            head = _COMPUTATION.match(line)
            if head:
                current = computations.setdefault(head.group(2), Computation(head.group(2)))
                if head.group(1):
                    entry = current.name
        elif line.startswith("}"):
            current = None
        else:
            instruction = _instruction(line)
            if instruction:
                current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("HLO: no ENTRY computation in the text")
    return Module(computations, entry)
