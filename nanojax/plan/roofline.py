"""Models the time of a compiled step on a card, kernel by kernel.

A kernel takes max(matmul FLOPs / tensor rate, bytes / bandwidth, vector instructions / lane rate) + launch time. A loop
multiplies its kernels by its trip count. Bytes are what a fusion touches: of a sliced read, or of a slice written in place,
only the slice. The model finds bottlenecks and plans weeks; `--measure` replaces its efficiencies with the card's own.
"""

import collections
import dataclasses
import re

from nanojax.hardware import Card, Link
from nanojax.plan import exchange, hlo


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """The share of each peak that a kernel reaches, and the seconds of a launch.

    bf16 0.90: cuBLAS reaches 0.98 on an Ada laptop chip, and a user's 4070 reached 61 TFLOP/s against a peak of 58 (it
    boosted past 2,475 MHz); incomplete last waves cost some of it. int8 0.70: measured are 151 TOP/s at 4096^3 from JAX on
    a 4070 (0.65), and 3.14 x bf16 with a tuned Triton kernel on a 4070 Ti Super (0.74). Attention 0.75 of the bf16 peak
    and memory 0.85 are usual for flash attention and streaming kernels. Vector work 0.50: dependent chains do not fill
    every lane. Launch 2.5 us: kernels back to back.
    """

    bf16: float = 0.90
    int8: float = 0.70
    fp8: float = 0.80
    tf32: float = 0.90
    f32: float = 0.80
    attention: float = 0.75
    memory: float = 0.85
    vector: float = 0.50
    launch: float = 2.5e-6


# H100/H200 throttle below the whitepaper's clock under tensor load: cuBLAS reaches 650-750 of 989 TFLOP/s in bf16 and
# FlashAttention through cuDNN about 55 % forward and backward together.
HOPPER = Efficiency(bf16=0.70, int8=0.55, fp8=0.60, tf32=0.65, attention=0.55, memory=0.90)


def efficiency_of(card: Card) -> Efficiency:
    """The default shares for `card`."""
    return HOPPER if card.capability == "9.0" else Efficiency()


TRITON = "__gpu$xla.gpu.triton"  # the custom call of a Pallas kernel


@dataclasses.dataclass
class Kernel:
    """All calls of one kernel of the program."""

    name: str
    kind: str  # "int8 matmul", "attention", "elementwise", ...
    op_name: str
    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    bound: str = ""  # "tensor", "memory", "vector" or "link"


@dataclasses.dataclass
class Estimate:
    """The modelled program: its kernels, slowest first, and the names of what could not be modelled."""

    kernels: list[Kernel]
    unknown: list[str]

    @property
    def seconds(self) -> float:
        return sum(k.seconds for k in self.kernels)

    @property
    def communication(self) -> tuple[float, float]:
        """(seconds, bytes that a card sends) of the program's exchanges."""
        total = self.by_kind().get(exchange.KIND)
        return (total.seconds, total.bytes) if total else (0.0, 0.0)

    def by_kind(self) -> dict[str, Kernel]:
        """Totals per kind, slowest first."""
        out: dict[str, Kernel] = {}
        for k in self.kernels:
            total = out.setdefault(k.kind, Kernel(k.kind, k.kind, ""))
            total.calls += k.calls
            total.seconds += k.seconds
            total.flops += k.flops
            total.bytes += k.bytes
        return dict(sorted(out.items(), key=lambda item: -item[1].seconds))


@dataclasses.dataclass
class _Work:
    """The work of one execution of one kernel."""

    bytes: float = 0.0
    flops: dict[str, float] = dataclasses.field(default_factory=dict)  # by operand type: bf16, int8, attention, ...
    vector: float = 0.0  # 32-bit lane instructions


_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "optimization-barrier", "domain", "add-dependency"}
_ALIAS = {"bitcast", "reshape", "copy", "transpose"}
# Lane instructions per element. 32-bit float and logic instructions run on 128 lanes per SM; integer multiplication, shifts
# and type conversion on 64 (weight 2); special functions on 16 (weight 8). libdevice's pow, sin and cos take tens.
_VECTOR_COST = {op: 0 for op in (*_FREE, "broadcast", "reshape", "transpose", "copy", "slice", "dynamic-slice", "pad")}
_VECTOR_COST |= {op: 0 for op in ("concatenate", "reverse", "gather", "dynamic-update-slice", "bitcast-convert", "dot")}
_VECTOR_COST |= {op: 2 for op in ("convert", "shift-left", "shift-right-logical", "shift-right-arithmetic", "iota")}
_VECTOR_COST |= {op: 2 for op in ("round-nearest-even", "round-nearest-afz", "floor", "ceil", "compare", "select")}
_VECTOR_COST |= {"divide": 10, "sqrt": 10, "rsqrt": 9, "exponential": 10, "log": 12, "tanh": 20, "logistic": 20}
_VECTOR_COST |= {"power": 40, "sine": 40, "cosine": 40, "tan": 60, "atan2": 40, "erf": 30, "cbrt": 30, "remainder": 30}
_VECTOR_COST |= {"exponential-minus-one": 16, "log-plus-one": 16, "clamp": 2}
# These read each operand element once; every other instruction evaluates its producers once per result element.
_REDUCING = {"reduce", "reduce-window", "dot", "scatter", "sort"}
_DTYPES = {"s8": "int8", "u8": "int8", "bf16": "bf16", "f16": "bf16", "f64": "f32"}


def _operand_class(dot: hlo.Instruction, dtype: str) -> str:
    """The tensor-core class of a dot on operands of HLO type `dtype`."""
    if dtype.startswith("f8"):
        return "fp8"
    if dtype == "f32":
        # XLA runs f32 dots on TF32 tensor cores unless the highest precision was asked for.
        exact = "highest" in dot.attributes or "algorithm=dot_f32_f32_f32" in dot.attributes
        return "f32" if exact else "tf32"
    return _DTYPES.get(dtype, "f32")


class _Program:
    def __init__(self, module: hlo.Module, card: Card, efficiency: Efficiency, link: Link | None = None):
        self.module, self.card, self.eff, self.link = module, card, efficiency, link
        self.kernels: dict[str, Kernel] = {}
        self.unknown: dict[str, None] = {}

    # -- work of one kernel ------------------------------------------------------------------------------------------

    def dot(self, computation: hlo.Computation, dot: hlo.Instruction) -> tuple[str, float]:
        lhs = computation.instructions[dot.operands[0]].arrays[0]
        contracting = dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        k = 1
        for d in contracting.split(","):
            k *= lhs.dims[int(d)] if d else 1
        return _operand_class(dot, lhs.dtype), 2.0 * dot.arrays[0].size * k

    def reads(self, computation: hlo.Computation, name: str) -> float:
        """Bytes that the computation reads of its instruction `name` (a parameter, or a view of one)."""
        whole = computation.instructions[name].bytes
        total = 0.0
        for user in computation.users[name]:
            if user.opcode in ("slice", "dynamic-slice") or (user.opcode == "gather" and user.operands[0] == name):
                total += user.bytes
            elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
                pass  # in place: only the update is touched, counted where it is written
            elif user.opcode in _ALIAS and user.bytes == whole:
                total += self.reads(computation, user.name)
            elif user.opcode == "fusion":  # nested in this kernel
                inner = self.module.computations[user.called("calls")]
                for i, operand in enumerate(user.operands):
                    if operand == name:
                        total += self.reads(inner, inner.parameters[i].name)
            elif user.opcode in ("tuple", "get-tuple-element"):
                pass
            else:
                return whole
        return min(total, whole)

    def writes(self, computation: hlo.Computation, root: hlo.Instruction) -> float:
        """Bytes that a fusion with this root writes: only the slice, if the root updates a slice in place."""
        if root.opcode == "tuple":
            return sum(self.writes(computation, computation.instructions[o]) for o in root.operands)
        if root.opcode == "dynamic-update-slice":
            return computation.instructions[root.operands[1]].bytes
        if root.opcode == "scatter":  # read, add, write of the rows that are hit
            n = (len(root.operands) - 1) // 2
            return 2.0 * sum(computation.instructions[o].bytes for o in root.operands[n + 1 :])
        if root.opcode in _ALIAS and root.operands:
            source = computation.instructions[root.operands[0]]
            if source.opcode in ("dynamic-update-slice", "scatter") and source.bytes == root.bytes:
                return self.writes(computation, source)
        if root.opcode == "fusion":
            inner = self.module.computations[root.called("calls")]
            return self.writes(inner, inner.root)
        return root.bytes

    def inside(self, computation: hlo.Computation, work: _Work, evaluations: float | None = None) -> None:
        """Adds the dots and the vector instructions of a fused computation to `work`."""
        # XLA evaluates an operand once per element of its user, through a broadcast too: a cosine broadcast over heads is
        # computed once per head. So we walk from the root and carry how often each instruction is evaluated.
        demand: dict[str, float] = collections.defaultdict(float)
        instructions = list(computation.instructions.values())
        demand[computation.root.name] = computation.root.size if evaluations is None else evaluations
        for instruction in reversed(instructions):
            times = max(demand[instruction.name], 1.0 if instruction.root else 0.0)
            if instruction.opcode == "tuple":
                for o in instruction.operands:
                    demand[o] = max(demand[o], computation.instructions[o].size)
                continue
            if instruction.opcode == "fusion":
                self.inside(self.module.computations[instruction.called("calls")], work)
            if instruction.opcode == "dot":
                kind, flops = self.dot(computation, instruction)
                work.flops[kind] = work.flops.get(kind, 0.0) + flops
            for o in instruction.operands:
                operand = computation.instructions[o]
                once = instruction.opcode in _REDUCING or operand.opcode in _REDUCING
                need = operand.size if once else times
                if instruction.opcode == "dynamic-update-slice":
                    need = min(times, operand.size) if o == instruction.operands[1] else 0.0
                elif instruction.opcode in ("concatenate", "pad"):
                    need = min(times, operand.size * max(1.0, times / max(1, instruction.size)))
                demand[o] = max(demand[o], need)
            if instruction.opcode == "reduce":
                work.vector += sum(computation.instructions[o].size for o in instruction.operands[:1])
            elif instruction.arrays:
                cost = _VECTOR_COST.get(instruction.opcode, 1)
                if cost == 1 and instruction.arrays[0].dtype in ("s32", "u32", "s64", "u64"):
                    cost = 2 if instruction.opcode == "multiply" else 1
                work.vector += cost * times

    def operand_bytes(self, computation: hlo.Computation, instruction: hlo.Instruction) -> float:
        return sum(computation.instructions[o].bytes for o in instruction.operands)

    def work(self, computation: hlo.Computation, i: hlo.Instruction) -> _Work:
        """What one execution of the kernel `i` does."""
        work = _Work()
        if i.opcode in ("fusion", "async-start", "fusion-start"):
            inner = self.module.computations[i.called("calls")]
            work.bytes = sum(self.reads(inner, p.name) for p in inner.parameters) + self.writes(inner, inner.root)
            self.inside(inner, work)
        elif i.opcode == "custom-call":
            self.custom_call(computation, i, work)
        elif i.opcode == "dot":
            kind, flops = self.dot(computation, i)
            work.flops[kind] = flops
            work.bytes = i.bytes + self.operand_bytes(computation, i)
        elif i.opcode == "dynamic-update-slice":
            work.bytes = 2.0 * computation.instructions[i.operands[1]].bytes
        elif i.opcode in ("slice", "dynamic-slice", "gather"):
            work.bytes = 2.0 * i.bytes
        elif i.opcode == "scatter":
            n = (len(i.operands) - 1) // 2
            work.bytes = 3.0 * sum(computation.instructions[o].bytes for o in i.operands[n + 1 :])
        elif i.opcode == "copy-start":
            work.bytes = 2.0 * i.arrays[0].bytes
        elif i.opcode == "sort":  # radix sort: 8 bits a pass, each pass reads and writes
            passes = max((hlo.BITS[a.dtype] for a in i.arrays), default=32) // 8
            work.bytes = 2.0 * passes * i.bytes
        else:
            work.bytes = i.bytes + self.operand_bytes(computation, i)
            work.vector = _VECTOR_COST.get(i.opcode, 1) * i.size
        return work

    def custom_call(self, computation: hlo.Computation, i: hlo.Instruction, work: _Work) -> None:
        target = i.attribute(r'custom_call_target="([^"]+)"') or "?"
        operands = [computation.instructions[o] for o in i.operands]
        work.bytes = i.bytes + sum(o.bytes for o in operands)
        if "fmha" in target:
            text = i.attribute(r'"intermediate_tensor_shape":\s*\{[^}]*?"dimensions":\s*\[([^\]]*)\]') or ""
            dims = [int(d) for d in re.findall(r"\d+", text)]
            if len(dims) != 4:  # B N T S
                self.unknown[target] = None
                return
            head = operands[0].arrays[0].dims[-1]
            batch, heads, rows, columns = dims
            window = int(i.attribute(r'"sliding_window_length":\s*(\d+)') or 0)
            causal = "CAUSAL" in (i.attribute(r'"mask_type":\s*"(\w+)"') or "")
            pairs = rows * columns / 2 if causal else rows * columns
            if window and window < columns:
                pairs = rows * window - window * window / 2
            # forward is two matmuls; backward is five (it recomputes the scores)
            work.flops["attention"] = 2.0 * batch * heads * pairs * head * (5 if "Backward" in target else 2)
        elif target.startswith("__cublas"):
            lhs, out = operands[0].arrays[0], i.arrays[0]
            dims = re.findall(r"\d+", i.attribute(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]') or "")
            k = 1
            for d in dims or [str(len(lhs.dims) - 1)]:
                k *= lhs.dims[int(d)]
            work.flops[_operand_class(i, lhs.dtype)] = 2.0 * out.size * k
            beta = i.attribute(r'"beta":\s*([\d.]+)')
            if len(i.arrays) > 1:
                work.bytes -= i.arrays[-1].bytes  # the workspace is scratch, not traffic
            if beta and float(beta) == 0 and len(operands) > 2 and operands[2].arrays[0] == out:
                work.bytes -= operands[2].bytes
        elif target == TRITON:
            pass  # our row kernels (ops/rows.py, ops/rope.py) are bound by memory
        elif target in ("AllocateBuffer", "annotate_device_placement", "Sharding"):
            work.bytes = 0.0
        else:
            self.unknown[target] = None  # its bytes count; its arithmetic is unknown

    # -- the walk ----------------------------------------------------------------------------------------------------

    def time(self, work: _Work) -> tuple[float, str]:
        tensor = 0.0
        for kind, flops in work.flops.items():
            peak = self.card.peak("bf16" if kind == "attention" else kind)
            # Without fp8 tensor cores, XLA converts to bf16 and multiplies that.
            peak = peak or self.card.peak("bf16")
            tensor += flops / (peak * getattr(self.eff, kind))
        memory = work.bytes / (self.card.bandwidth * self.eff.memory)
        vector = work.vector / (self.card.lane_ops * self.eff.vector)
        seconds, bound = max((tensor, "tensor"), (memory, "memory"), (vector, "vector"))
        return seconds + self.eff.launch, bound

    def kernel(self, computation: hlo.Computation, i: hlo.Instruction, times: int) -> None:
        sent = exchange.sent(self.module, computation, i)
        if sent is not None:
            self.unknown |= {} if self.link else {i.opcode: None}
            seconds = times * self.link.seconds(sent) if self.link else 0.0
            self.kernels[i.name] = Kernel(i.name, exchange.KIND, i.op_name, times, seconds, 0.0, sent * times, "link")
            return
        work = self.work(computation, i)
        if i.opcode == "custom-call" and not work.bytes:
            return
        seconds, bound = self.time(work)
        kind = "elementwise"
        if work.flops:
            top = max(work.flops, key=lambda k: work.flops[k])
            kind = "attention" if top == "attention" else f"{top} matmul"
        elif i.opcode in ("copy", "transpose", "copy-start") or "transpose" in i.name:
            kind = "copy and transpose"
        elif i.opcode == "custom-call" and i.attribute(r'custom_call_target="([^"]+)"') != TRITON:
            kind = i.attribute(r'custom_call_target="([^"]+)"') or "custom call"
        total = self.kernels.setdefault(i.name, Kernel(i.name, kind, i.op_name, bound=bound))
        total.calls += times
        total.seconds += seconds * times
        total.flops += sum(work.flops.values()) * times
        total.bytes += work.bytes * times

    def walk(self, name: str, times: int) -> None:
        computation = self.module.computations[name]
        for i in computation.instructions.values():
            if i.opcode in _FREE or i.opcode.endswith("-done"):
                continue
            if i.opcode == "while":
                trips = _trips(i)
                if trips is None:
                    self.unknown[f"trip count of {i.name}"] = None
                self.walk(i.called("body"), times * (trips or 1))
            elif i.opcode == "conditional":
                self.walk(self.slowest_branch(i), times)
            elif i.opcode == "call":
                self.walk(i.called("to_apply"), times)
            else:
                self.kernel(computation, i, times)

    def estimate(self) -> Estimate:
        """Of what was walked."""
        return Estimate(sorted(self.kernels.values(), key=lambda k: -k.seconds), list(self.unknown))

    def slowest_branch(self, i: hlo.Instruction) -> str:
        text = i.attribute(r"branch_computations=\{([^}]*)\}")
        if text is not None:
            names = [n.strip().lstrip("%") for n in text.split(",")]
        else:
            names = [i.called("true_computation"), i.called("false_computation")]

        def seconds(name: str) -> float:
            probe = _Program(self.module, self.card, self.eff, self.link)
            probe.walk(name, 1)
            return sum(k.seconds for k in probe.kernels.values())

        return max(names, key=seconds)


def estimate(text: str, card: Card, efficiency: Efficiency | None = None, link: Link | None = None) -> Estimate:
    """Models the time of a program on `card`, or on one of several.

    Args:
      text: its optimised HLO, `compiled.as_text()`, compiled for a GPU.
      efficiency: shares of the card's peaks; None: the defaults for the card.
      link: what joins it to the others.
    """
    module = hlo.parse(text)
    program = _Program(module, card, efficiency or efficiency_of(card), link)
    program.walk(module.entry, 1)
    return program.estimate()


def estimate_loop(text: str, card: Card, efficiency: Efficiency | None = None) -> tuple[Estimate, float]:
    """(one pass through a program's only loop of unknown length, the seconds of everything outside it).

    Not modelled is that the host waits at each pass for the loop's condition, and for that of each conditional in it.
    """
    module = hlo.parse(text)
    loops = [i for i in module.computations[module.entry].instructions.values() if i.opcode == "while"]
    (loop,) = [i for i in loops if _trips(i) is None]
    program = _Program(module, card, efficiency or efficiency_of(card))
    program.walk(loop.called("body"), 1)
    outside = estimate(text, card, efficiency).seconds - sum(k.seconds for k in program.kernels.values())
    program.walk(loop.called("condition"), 1)
    return program.estimate(), outside


def _trips(loop: hlo.Instruction) -> int | None:
    """How often a loop runs, where XLA knows it."""
    found = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    return None if found is None else int(found)
