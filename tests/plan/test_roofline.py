"""The planner's reading of HLO: times of hand-written programs with known answers, and the parsing of buffers."""
# ruff: noqa: E501  HLO has long lines

import pytest

from nanojax import hardware
from nanojax.plan import hlo, roofline
from nanojax.plan.compile import read_temporaries

CARD = hardware.CARDS["rtx4070"]
IDEAL = roofline.Efficiency(**{name: 1.0 for name in vars(roofline.Efficiency()) if name != "launch"}, launch=0.0)

MATMUL = """HloModule jit_f, is_scheduled=true

%fused (p0: {t}[4096,2048], p1: {t}[8192,2048]) -> {o}[4096,8192] {{
  %p0 = {t}[4096,2048]{{1,0}} parameter(0)
  %p1 = {t}[8192,2048]{{1,0}} parameter(1)
  ROOT %dot.1 = {o}[4096,8192]{{1,0}} dot(%p0, %p1), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}{extra}
}}

ENTRY %main (a: {t}[4096,2048], b: {t}[8192,2048]) -> {o}[4096,8192] {{
  %a = {t}[4096,2048]{{1,0}} parameter(0), metadata={{op_name="x (of y)"}}
  %b = {t}[8192,2048]{{1,0}} parameter(1)
  ROOT %gemm = {o}[4096,8192]{{1,0}} fusion(%a, %b), kind=kCustom, calls=%fused, metadata={{op_name="jit(f)/dot"}}
}}
"""


@pytest.mark.parametrize(
    ("operand", "out", "extra", "kind", "rate"),
    [
        ("bf16", "f32", "", "bf16", 58.2912e12),
        ("s8", "s32", "", "int8", 233.1648e12),
        ("f8e4m3fn", "f32", "", "fp8", 116.5824e12),
        ("f32", "f32", "", "tf32", 29.1456e12),
        ("f32", "f32", ", operand_precision={highest,highest}", "f32", 29.1456e12),
    ],
)
def test_matmul_time_is_flops_over_the_operand_types_peak(operand, out, extra, kind, rate):
    """2*4096*8192*2048 FLOP at the card's peak for that operand type, to 1e-6."""
    estimate = roofline.estimate(MATMUL.format(t=operand, o=out, extra=extra), CARD, IDEAL)
    (kernel,) = estimate.kernels
    assert kernel.kind == f"{kind} matmul"
    assert kernel.flops == 2 * 4096 * 8192 * 2048
    assert estimate.seconds == pytest.approx(2 * 4096 * 8192 * 2048 / rate, rel=1e-6)


def test_efficiency_and_launch_enter_the_time():
    """At 0.5 of the peak and 3 us per launch the matmul takes twice its ideal time plus 3 us, to 1e-6."""
    text = MATMUL.format(t="bf16", o="f32", extra="")
    ideal = roofline.estimate(text, CARD, IDEAL).seconds
    slow = roofline.Efficiency(bf16=0.5, memory=1.0, vector=1.0, launch=3e-6)
    assert roofline.estimate(text, CARD, slow).seconds == pytest.approx(2 * ideal + 3e-6, rel=1e-6)


LOOP = """HloModule jit_step

%add_slice (stack: bf16[32,1024,2048], i: s32[], x: bf16[1024,2048]) -> bf16[32,1024,2048] {
  %stack = bf16[32,1024,2048]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[1024,2048]{1,0} parameter(2)
  %c0 = s32[] constant(0)
  %one = bf16[1,1024,2048]{2,1,0} bitcast(%x)
  ROOT %dus = bf16[32,1024,2048]{2,1,0} dynamic-update-slice(%stack, %one, %i, %c0, %c0)
}

%accumulate (total: f32[32,512,256], i.1: s32[], g: f32[512,256]) -> f32[32,512,256] {
  %total = f32[32,512,256]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %c1 = s32[] constant(0)
  %g = f32[512,256]{1,0} parameter(2)
  %old = f32[1,512,256]{2,1,0} dynamic-slice(%total, %i.1, %c1, %c1), dynamic_slice_sizes={1,512,256}
  %g1 = f32[1,512,256]{2,1,0} bitcast(%g)
  %sum = f32[1,512,256]{2,1,0} add(%old, %g1)
  ROOT %dus.1 = f32[32,512,256]{2,1,0} dynamic-update-slice(%total, %sum, %i.1, %c1, %c1)
}

%body (t: (s32[], bf16[1024,2048], bf16[32,1024,2048], f32[32,512,256], f32[512,256])) -> (s32[], bf16[1024,2048], bf16[32,1024,2048], f32[32,512,256], f32[512,256]) {
  %t = (s32[], bf16[1024,2048]{1,0}, bf16[32,1024,2048]{2,1,0}, f32[32,512,256]{2,1,0}, /*index=4*/f32[512,256]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %x.1 = bf16[1024,2048]{1,0} get-tuple-element(%t), index=1
  %kept = bf16[32,1024,2048]{2,1,0} get-tuple-element(%t), index=2
  %acc = f32[32,512,256]{2,1,0} get-tuple-element(%t), index=3
  %dw = f32[512,256]{1,0} get-tuple-element(%t), index=4
  %write = bf16[32,1024,2048]{2,1,0} fusion(%kept, %n, %x.1), kind=kLoop, calls=%add_slice
  %add = f32[32,512,256]{2,1,0} fusion(%acc, %n, %dw), kind=kLoop, calls=%accumulate
  ROOT %out = (s32[], bf16[1024,2048]{1,0}, bf16[32,1024,2048]{2,1,0}, f32[32,512,256]{2,1,0}, f32[512,256]{1,0}) tuple(%n, %x.1, %write, %add, %dw)
}

%condition (t.1: (s32[], bf16[1024,2048], bf16[32,1024,2048], f32[32,512,256], f32[512,256])) -> pred[] {
  %t.1 = (s32[], bf16[1024,2048]{1,0}, bf16[32,1024,2048]{2,1,0}, f32[32,512,256]{2,1,0}, f32[512,256]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: (s32[], bf16[1024,2048], bf16[32,1024,2048], f32[32,512,256], f32[512,256])) -> (s32[], bf16[1024,2048], bf16[32,1024,2048], f32[32,512,256], f32[512,256]) {
  %a = (s32[], bf16[1024,2048]{1,0}, bf16[32,1024,2048]{2,1,0}, f32[32,512,256]{2,1,0}, f32[512,256]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[1024,2048]{1,0}, bf16[32,1024,2048]{2,1,0}, f32[32,512,256]{2,1,0}, f32[512,256]{1,0}) while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"32"}}
}
"""


def test_loops_multiply_and_slices_count_as_slices():
    """32 trips; the stack's write touches its 4 MiB slice and the source, the accumulation three slices of 0.5 MiB."""
    estimate = roofline.estimate(LOOP, CARD, IDEAL)
    by_name = {k.name: k for k in estimate.kernels}
    slice_bytes, small, index = 1024 * 2048 * 2, 512 * 256 * 4, 4
    assert by_name["write"].calls == 32
    assert by_name["write"].bytes == 32 * (2 * slice_bytes + index)
    assert by_name["add"].bytes == 32 * (3 * small + index)
    assert estimate.seconds == pytest.approx(32 * (2 * slice_bytes + 3 * small + 2 * index) / 504e9, rel=1e-6)
    assert estimate.unknown == []


def test_unknown_trip_count_is_told():
    """A loop whose length XLA does not know counts once and is listed as not modelled."""
    estimate = roofline.estimate(LOOP.replace("known_trip_count", "other"), CARD, IDEAL)
    assert estimate.unknown == ["trip count of loop"]


def test_one_pass_of_a_loop_and_what_stands_around_it():
    """An unknown length: a pass is the body's time once, whatever else the program does; the rest is told apart."""
    text = LOOP.replace("known_trip_count", "other").replace(
        "  ROOT %loop", "  %x.2 = bf16[1024,2048]{1,0} get-tuple-element(%a), index=1\n"
        "  %copied = bf16[1024,2048]{1,0} copy(%x.2)\n  ROOT %loop"
    )  # fmt: skip
    step, outside = roofline.estimate_loop(text, CARD, IDEAL)
    assert step.seconds == pytest.approx(roofline.estimate(LOOP, CARD, IDEAL).seconds / 32, rel=1e-6)
    assert outside == pytest.approx(2 * 1024 * 2048 * 2 / 504e9, rel=1e-6)
    assert step.unknown == []


ATTENTION = """HloModule jit_f

ENTRY %main (q: bf16[2,2048,16,128], k: bf16[2,2048,16,128], v: bf16[2,2048,16,128]) -> bf16[2,2048,16,128] {
  %q = bf16[2,2048,16,128]{3,2,1,0} parameter(0)
  %k = bf16[2,2048,16,128]{3,2,1,0} parameter(1)
  %v = bf16[2,2048,16,128]{3,2,1,0} parameter(2)
  ROOT %att = bf16[2,2048,16,128]{3,2,1,0} custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmaxDIRECTION", backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.08, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "16", "2048", "2048"], "tuple_shapes": []}, "mask_type": "MASK", "sliding_window_length": WINDOW}}
}
"""


@pytest.mark.parametrize(
    ("direction", "mask", "window", "matmuls", "pairs"),
    [
        ("", "CAUSAL", 0, 2, 2048 * 2048 / 2),
        ("", "NO_MASK", 0, 2, 2048 * 2048),
        ("Backward", "CAUSAL", 0, 5, 2048 * 2048 / 2),
        ("", "CAUSAL", 512, 2, 2048 * 512 - 512 * 512 / 2),
    ],
)
def test_flash_attention_counts_its_real_flops(direction, mask, window, matmuls, pairs):
    """2 matmuls forward, 5 backward, over the pairs that the mask allows."""
    text = ATTENTION.replace("DIRECTION", direction).replace("MASK", mask).replace("WINDOW", str(window))
    (kernel,) = roofline.estimate(text, CARD, IDEAL).kernels
    assert kernel.kind == "attention"
    assert kernel.flops == 2 * matmuls * 2 * 16 * 128 * pairs


CUBLAS = """HloModule jit_f

ENTRY %main (a: s8[4096,2048], b: s8[8192,2048]) -> s32[4096,8192] {
  %a = s8[4096,2048]{1,0} parameter(0)
  %b = s8[8192,2048]{1,0} parameter(1)
  %call = (s32[4096,8192]{1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  ROOT %out = s32[4096,8192]{1,0} get-tuple-element(%call), index=0
}
"""


def test_cublas_counts_flops_and_leaves_its_workspace_out():
    """2*M*N*K int8 operations; operands and result count as traffic, the 32 MiB of scratch do not."""
    (kernel,) = roofline.estimate(CUBLAS, CARD, IDEAL).kernels
    assert (kernel.kind, kernel.flops) == ("int8 matmul", 2 * 4096 * 8192 * 2048)
    assert kernel.bytes == 4096 * 2048 + 8192 * 2048 + 4 * 4096 * 8192


def test_unknown_custom_call_is_told():
    """A call with unknown arithmetic counts its traffic and is listed."""
    text = CUBLAS.replace("__cublas$gemm", "my_kernel")
    assert roofline.estimate(text, CARD, IDEAL).unknown == ["my_kernel"]


COSINE = """HloModule jit_f

%f (p: f32[2048]) -> f32[4096,2048] {
  %p = f32[2048]{0} parameter(0)
  %cos = f32[2048]{0} cosine(%p)
  ROOT %wide = f32[4096,2048]{1,0} broadcast(%cos), dimensions={1}
}

ENTRY %main (a: f32[2048]) -> f32[4096,2048] {
  %a = f32[2048]{0} parameter(0)
  ROOT %k = f32[4096,2048]{1,0} fusion(%a), kind=kLoop, calls=%f
}
"""


def test_vector_work_is_evaluated_once_per_result_element():
    """A cosine below a broadcast runs 4096 times as often as its own shape says: the kernel is bound by vector work
    on a card whose memory is fast enough, at 40 lane instructions each; exact to 1e-6."""
    import dataclasses

    card = dataclasses.replace(CARD, gb_per_s=1e6)
    (kernel,) = roofline.estimate(COSINE, card, IDEAL).kernels
    assert kernel.bound == "vector"
    assert kernel.seconds == pytest.approx(40 * 4096 * 2048 / card.lane_ops, rel=1e-6)


BRANCH = """HloModule jit_f

%small (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  ROOT %r = f32[16]{0} negate(%p)
}

%large (q: f32[1000000]) -> f32[1000000] {
  %q = f32[1000000]{0} parameter(0)
  ROOT %s = f32[1000000]{0} negate(%q)
}

ENTRY %main (i: s32[], a: f32[16], b: f32[1000000]) -> f32[16] {
  %i = s32[] parameter(0)
  %a = f32[16]{0} parameter(1)
  %b = f32[1000000]{0} parameter(2)
  ROOT %c = f32[16]{0} conditional(%i, %b, %a), branch_computations={%large, %small}
}
"""


def test_conditional_takes_its_slowest_branch():
    """The 8 MB of traffic of the larger branch, in either order."""
    assert roofline.estimate(BRANCH, CARD, IDEAL).kernels[0].bytes == 8_000_000


@pytest.mark.parametrize("text", ["", "HloModule nothing", LOOP.replace("ENTRY ", "")])
def test_text_without_entry_is_refused(text):
    """Not HLO: a ValueError that says what is missing."""
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse(text)


def test_unknown_element_type_is_refused():
    """A dtype that the table lacks raises, rather than counting as zero bytes."""
    with pytest.raises(ValueError, match="f7e3"):
        hlo.arrays("f7e3[2,2]{1,0}")


@pytest.mark.parametrize(("shape", "size"), [("s4[3,3]{1,0}", 5), ("pred[]", 1), ("bf16[0,4]", 0), ("token[]", 0)])
def test_sub_byte_and_empty_shapes(shape, size):
    """Bytes round up for packed types; scalars are one element; empty arrays are nothing."""
    assert sum(a.bytes for a in hlo.arrays(shape)) == size


ASSIGNMENT = """BufferAssignment:
allocation 0: size 100000, parameter 0, shape |f32[1]| at ShapeIndex {}:
 value: <1 x @0> (size=100000,offset=0): f32[25000]{0}
allocation 1: size 30000, preallocated-temp:
 value: <12 stack @0> (size=20000,offset=0): bf16[10000]{0}
 value: <13 stack @0> (size=20000,offset=0): bf16[10000]{0}
 value: <14 while.6{2} (phi) @0> (size=20000,offset=0): bf16[10000]{0}
 value: <15 tiny @0> (size=4,offset=29000): s32[]
 value: <16 late @0> (size=9000,offset=20000): f32[2250]{0}

Total bytes used: 130000

Used values:
<12 stack @0>
"""


def test_buffer_assignment_names_the_temporaries():
    """Only the temporary allocation, largest first, tuple indices dropped, counters left out."""
    values = read_temporaries(ASSIGNMENT)
    assert [(v.name, v.bytes, v.offset) for v in values] == [
        ("stack", 20000, 0),
        ("while.6", 20000, 0),
        ("late", 9000, 20000),
    ]


EXCHANGES = """HloModule jit_step, num_partitions=4

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main (g: bf16[4,1000], w: s8[250,8], s: f32[250,1], n: f32[2]) -> bf16[1,1000] {
  %g = bf16[4,1000]{1,0} parameter(0)
  %w = s8[250,8]{1,0} parameter(1)
  %s = f32[250,1]{1,0} parameter(2)
  %n = f32[2]{0} parameter(3)
  %rs = ((bf16[4,1000]{1,0}), bf16[1,1000]{1,0}) reduce-scatter-start(%g), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%sum
  %ag = ((s8[250,8]{1,0}, f32[250,1]{1,0}), (s8[1000,8]{1,0}, f32[1000,1]{1,0})) all-gather-start(%w, %s), replica_groups={{0,1,2,3}}, dimensions={0}
  %plain = s8[1000,8]{1,0} all-gather(%w), replica_groups={{0,1,2,3}}, dimensions={0}
  %ar = f32[2]{0} all-reduce-start(%n), replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %done = bf16[1,1000]{1,0} reduce-scatter-done(%rs)
}
"""


def test_exchanges_take_the_bytes_that_a_card_sends() -> None:
    """Of four cards: three quarters of what is scattered or gathered, twice what is summed; latency once each; no link, no time."""
    link = hardware.Link("test", "a test", 1.0, 5.0)
    estimate = roofline.estimate(EXCHANGES, CARD, IDEAL, link)
    sent = {kernel.name: kernel.bytes for kernel in estimate.kernels}
    assert sent == {"rs": 6000, "ag": 3 * (2000 + 1000), "plain": 3 * 2000, "ar": 16}
    assert estimate.communication == (pytest.approx(4 * 5e-6 + sum(sent.values()) / 1e9), sum(sent.values()))
    alone = roofline.estimate(EXCHANGES, CARD, IDEAL)
    assert alone.communication[0] == 0 and "all-reduce-start" in alone.unknown
