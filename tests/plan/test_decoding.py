"""The decoder compiled for an absent card: weights and cache are read once a step as they are stored, and nothing is copied."""

import pytest

from nanojax import config_files, hardware, xla
from nanojax.plan import decoding

NO_COMPILER = pytest.mark.skipif(not xla.cuda_compiler_installed(), reason="the plan extra is not installed")
CARD = hardware.CARDS["rtx4070"]
# d24's weights and windows at two layers of it, one with a window and one without
SHALLOW = ["--model.depth=2", "--model.width=1536"]


@pytest.mark.plan
@NO_COMPILER
@pytest.mark.parametrize(("rows", "int8_cache"), [(1, False), (16, True)])
def test_a_step_reads_what_is_stored_once(rows: int, int8_cache: bool) -> None:
    """Codes are decoded inside the products: a float copy of the weights or the cache would at least double what is moved,
    and a copy of the cache would be a temporary, or be made at each call. The draw's passes over the logits stand apart: of two
    layers at 16 rows they are a fifth, of d24 a fortieth."""
    config = config_files.load("d24_2026_4070", SHALLOW)
    plan = decoding.make(config, CARD, rows, 2048, int8_cache, cache=True, say=lambda _: None)
    V, D, N, H = config.model.V, config.model.D, config.model.N, config.model.H
    blocks = 2 * (12 * D * D + 4 * (3 * D + D + 4 * D + D)) + N * 12 * 4 + 24 * 4 + 4 + 4 + 16
    assert (
        plan.weight_bytes == blocks + 2 * V * D
    )  # codes and a scale a row; gates, smear, backout, mix; the head in bf16
    value = 1 + 4 / H if int8_cache else 2
    assert plan.cache_bytes == rows * 2 * N * H * (513 + 2048) * value
    draw = sum(kernel.bytes * kernel.calls for kernel in plan.step.kernels if "/cond/" in kernel.op_name)
    assert plan.moved_bytes - draw < 1.15 * (plan.weight_bytes + plan.cache_bytes)
    assert draw < 40 * rows * V * 4  # both bounds by digits of four bits, then the choice
    assert plan.program.temp_bytes < 2**20 * (1 + rows)
    assert plan.call_seconds < 20e-6
    assert plan.step.unknown == []
    assert plan.as_json()["share_of_limit"] == pytest.approx(
        plan.seconds**-1 * (plan.weight_bytes + plan.cache_bytes) / 504e9
    )
