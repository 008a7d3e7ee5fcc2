"""The compiled int8 step: every int8 product's kernel has s8 tensor-core instructions in its PTX; no second set of weights."""

import math
import re
from pathlib import Path

import pytest

from nanojax import config as configs
from nanojax import hardware, step, xla
from nanojax.plan import compile, hlo, roofline

NO_COMPILER = pytest.mark.skipif(not xla.cuda_compiler_installed(), reason="the plan extra is not installed")
pytestmark = [pytest.mark.plan, NO_COMPILER]

LAYERS = 5  # a number that no other axis has
# Layers of d32's width, one row of its length: the shapes, and so the layouts and fusions, are those of d32_4070.
CHANGES = [f"--model.depth={LAYERS}", "--model.width=2048", "--model.vocab=1024", "--train.tokens_per_step=4096"]
PRODUCTS = 14  # int8 products a layer: forward q, k, v, o, up, down; dX and dW of qkv, o, up, down
S8 = re.compile(r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32|wgmma\.\S*\.s32\.s8\.s8")
ANY_MMA = re.compile(r"\bw?g?mma\.\S+")
ENTRY = re.compile(r"\.entry\s+([\w$.]+)\s*\(")


@pytest.fixture(scope="module")
def config():
    return compile.for_gpu(configs.load("d32_4070", CHANGES))


@pytest.fixture(scope="module")
def compiled(config):
    """The Program for an RTX 4070, and the PTX behind each of its instructions, by name."""
    ptx, compile_for_gpu = {}, xla.compile_for_gpu

    def keep(lowered, options):
        out = compile_for_gpu(lowered, options)
        ptx.update(kernels(Path(options["xla_dump_to"])))  # XLA writes PTX wherever it dumps
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "compile_for_gpu", keep)
        arguments = compile.step_arguments(config)
        program = compile.compile_for(step.train_step(config), arguments, hardware.CARDS["rtx4070"])
    return program, ptx


def kernels(folder: Path) -> dict[str, str]:
    """PTX of the kernel that each instruction of the HLO runs: equal instructions share one."""
    ptx = {}
    for path in folder.glob("*.ptx"):
        text = path.read_text()
        starts = [*ENTRY.finditer(text)]
        for one, end in zip(starts, [m.start() for m in starts[1:]] + [len(text)]):
            ptx[one[1]] = text[one.start() : end]
    (metadata,), (sequence,) = (list(folder.glob(f"*.thunk_{what}.txt")) for what in ("metadata", "sequence"))
    launches = re.findall(r"^\s*0*(\d+): kCustomKernel\s+\[.*?\] ([\w$.]+) grid", sequence.read_text(), re.M)
    kernel_of = dict(launches)
    thunks = re.findall(r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)', metadata.read_text())
    return {name: ptx[kernel_of[thunk]] for name, thunk in thunks if kernel_of.get(thunk) in ptx}


def products(module: hlo.Module) -> list[tuple[str, hlo.Computation, hlo.Instruction]]:
    """(fusion's name, fusion's computation, dot) of every matrix product that runs as a kernel of XLA's own."""
    out = []
    for computation in module.computations.values():
        for fusion in computation.instructions.values():
            if fusion.opcode == "fusion":
                inside = module.computations[fusion.called("calls")]
                out += [(fusion.name, inside, i) for i in inside.instructions.values() if i.opcode == "dot"]
    return out


def operand_types(computation: hlo.Computation, dot: hlo.Instruction) -> set[str]:
    return {computation.instructions[name].arrays[0].dtype for name in dot.operands}


def test_every_int8_product_runs_on_s8_tensor_cores(compiled):
    """14 int8 products a layer, neither more nor fewer, each in a kernel whose PTX multiplies s8 by s8 into s32 and nothing
    else; no integer product is left to a library or to plain code (kernels of rows take codes, but multiply none)."""
    program, ptx = compiled
    module = hlo.parse(program.hlo)
    found = [(name, inside, dot) for name, inside, dot in products(module) if dot.arrays[0].dtype == "s32"]
    assert len(found) == PRODUCTS * LAYERS, [dot.op_name for _, _, dot in found]
    for name, inside, dot in found:
        assert operand_types(inside, dot) == {"s8"}, dot
        kernel = ptx[name]
        assert S8.search(kernel), f"{name}: {dot.shape} has no s8 tensor-core instruction"
        assert all(S8.match(found) for found in ANY_MMA.findall(kernel)), f"{name}: also multiplies other types"
    integers = [i for c in module.computations.values() for i in c.instructions.values() if i.opcode == "dot"]
    assert sum(i.arrays[0].dtype == "s32" for i in integers) == len(found)
    calls = [i for c in module.computations.values() for i in c.instructions.values() if i.opcode == "custom-call"]
    calls = [i for i in calls if i.attribute(r'custom_call_target="([^"]+)"') != roofline.TRITON]
    assert not [i for i in calls if any(a.dtype in ("s8", "s32") and a.size > 4096 for a in i.arrays)]


def test_both_operands_lie_along_the_contraction(compiled):
    """Each int8 product contracts the last axis of both its operands as they lie in memory: [M,K] x [O,K]."""
    program, _ = compiled
    for _, inside, dot in products(hlo.parse(program.hlo)):
        if dot.arrays[0].dtype != "s32":
            continue
        for side, name in zip(("lhs", "rhs"), dot.operands):
            axis = dot.attribute(rf"{side}_contracting_dims={{(\d+)}}")
            minor = re.search(r"\{(\d+)", inside.instructions[name].shape.split("]")[1])
            assert minor and axis == minor[1], f"{dot.op_name}: {inside.instructions[name].shape}"


def test_every_large_float_product_runs_on_tensor_cores(compiled):
    """What stays float (head, Newton-Schulz): its kernel has tensor-core instructions in bf16."""
    program, ptx = compiled
    large = [p for p in products(hlo.parse(program.hlo)) if p[2].arrays[0].dtype != "s32" and p[2].size >= 1 << 20]
    assert large
    for name, _, dot in large:
        kernel = ptx[name]
        assert re.search(r"mma\.sync\.aligned\.\S*\.bf16\.bf16\.f32", kernel), f"{name}: {dot.shape}"


def test_no_second_copy_of_the_weights(compiled, config):
    """No 8-bit value in the temporary allocation is larger than one matrix, and none that has an axis of layers is as large as
    the smallest stack of weights."""
    program, _ = compiled
    sizes = [math.prod(shape) for shape in config.model.shapes.values()]
    codes = [v for v in program.temporaries if re.match(r"[su]8\[", v.shape)]
    assert codes, "no 8-bit temporaries: the codes of x and dy should be there"
    for value in codes:
        (array,) = hlo.arrays(value.shape)
        assert array.bytes <= max(sizes), value
        assert LAYERS not in array.dims or array.bytes < LAYERS * min(sizes), value
