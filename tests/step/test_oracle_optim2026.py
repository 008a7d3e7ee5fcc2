"""The numpy oracle of the 2026 training rules is itself proven: the published sizes, and each step by its property or by hand."""

import math

import numpy as np
import pytest
from oracles import numpy_optim2026 as oracle

SIZES = [  # depth, width, heads, total, value, matrices, embed, scaling, flops (4 digits), decay (4 decimals)
    (12, 768, 6, 286_261_730, 150_994_944, 84_935_088, 25_165_824, 110_100_912, 7.597e8, 0.2800),
    (16, 1024, 8, 536_871_738, 268_435_456, 201_327_360, 33_554_432, 234_881_792, 1.586e9, 0.1313),
    (20, 1280, 10, 896_533_746, 419_430_400, 393_217_200, 41_943_040, 435_160_240, 2.886e9, 0.1002),
    (22, 1408, 11, 1_123_157_490, 507_510_784, 523_371_948, 46_137_344, 569_509_292, 3.763e9, 0.0766),
    (24, 1536, 12, 1_384_122_122, 603_979_776, 679_478_976, 50_331_648, 729_810_624, 4.775e9, 0.0597),
    (26, 1664, 13, 1_681_786_938, 708_837_376, 863_897_580, 54_525_952, 918_423_532, 5.991e9, 0.0475),
    (28, 1792, 14, 2_018_511_234, 822_083_584, 1_078_987_056, 58_720_256, 1_137_707_312, 7.366e9, 0.0383),
    (32, 2048, 16, 2_818_575_450, 1_073_741_824, 1_610_615_808, 67_108_864, 1_677_724_672, 1.0771e10, 0.0368),
]
RATES = {  # peak, by depth
    12: {"head": 0.008, "embed": 0.3, "value": 0.15, "residual": 0.005, "first": 0.5, "muon": 0.02},
    24: {"head": 0.008, "embed": 0.3, "value": 0.15, "residual": 0.00707, "first": 0.707, "muon": 0.0283},
    26: {"head": 0.00769, "embed": 0.288, "value": 0.144, "residual": 0.00707, "first": 0.707, "muon": 0.0283},
    32: {"head": 0.0098, "embed": 0.367, "value": 0.184, "residual": 0.01, "first": 1.0, "muon": 0.04},
}
SHAPES = [(24, 24), (48, 16), (16, 48)]


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def _spectrum(shape: tuple[int, int], values: np.ndarray) -> np.ndarray:
    """A matrix with these singular values in random bases, the same at each call for a shape."""
    rng = np.random.default_rng(shape)
    left, right = (np.linalg.qr(rng.standard_normal((n, min(shape))))[0] for n in shape)
    return left @ np.diag(values) @ right.T


@pytest.mark.parametrize("row", SIZES, ids=lambda row: f"d{row[0]}")
def test_sizes_and_decay_equal_the_published(row: tuple[float, ...]) -> None:
    """All counts to the last digit; FLOPs to the digits given; the decay does not depend on the ratio."""
    depth, width, heads, total, value, matrices, embed, scaling, flops, decay = row
    s = oracle.sizes(int(depth))
    assert (s.width, s.heads, s.total, s.value) == (width, heads, total, value)
    assert (s.matrices, s.embed, s.scaling) == (matrices, embed, scaling)
    assert s.flops == pytest.approx(flops, rel=3.5e-4)
    for ratio in (8, 12):
        assert oracle.horizon(int(depth), ratio).decay == pytest.approx(decay, abs=5.1e-5)


def test_horizons_equal_the_published() -> None:
    """Batch by depth; steps of two leaderboard runs, d24 at ratios 8 and 8.7; tokens and FLOPs of d12 and d32."""
    exponents = {d: math.log2(oracle.horizon(d).batch) for d in range(4, 36, 2)}
    expected = {4: 18, 6: 18, 8: 18} | dict.fromkeys((10, 12, 14, 16), 19) | {32: 21, 34: 21}
    assert exponents == dict.fromkeys(range(18, 32, 2), 20) | expected
    assert [oracle.horizon(24, ratio).steps for ratio in (8, 8.7)] == [5568, 6055]
    for depth, ratio, tokens, flops in (
        (12, 8, 0.881e9, 6.69e17),
        (12, 12, 1.321e9, 1.00e18),
        (32, 12, 20.13e9, 2.17e20),
    ):
        h = oracle.horizon(depth, ratio)
        assert h.tokens == pytest.approx(tokens, rel=6e-4)
        assert h.tokens * oracle.sizes(depth).flops == pytest.approx(flops, rel=5e-3)


@pytest.mark.parametrize("depth", RATES)
def test_rates_equal_the_published(depth: int) -> None:
    """Peak rates at a depth's own batch, to three digits; smear's and backout's are 0.2 at every depth."""
    batch = oracle.horizon(depth).batch
    found = {name: group.lr for name, group in oracle.adam_groups(oracle.sizes(depth).width, batch).items()}
    expected = RATES[depth] | {"smear_gate": 0.2, "smear": 0.2, "backout": 0.2}
    assert found | {"muon": oracle.muon_rate(batch)} == {
        name: pytest.approx(x, rel=2e-3) for name, x in expected.items()
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_nesterov_is_the_weighted_sum_of_gradients(shape: tuple[int, int]) -> None:
    """Gradients G then H from zero at mu 0.9: buf = 0.09 G + 0.1 H, U = 0.081 G + 0.19 H."""
    G, H = _normal(2, *shape)
    U, momentum = oracle.nesterov(G, np.zeros(shape), 0.9)
    assert np.allclose(momentum, 0.1 * G) and np.allclose(U, 0.19 * G)
    U, momentum = oracle.nesterov(H, momentum, 0.9)
    assert np.allclose(momentum, 0.09 * G + 0.1 * H) and np.allclose(U, 0.081 * G + 0.19 * H)


@pytest.mark.parametrize("shape", SHAPES)
def test_equilibrated_rows_have_one_norm_and_the_matrix_its_own(shape: tuple[int, int]) -> None:
    """Rows of very different norms: all get ||U||_F / sqrt(rows), in their own direction."""
    U = _normal(*shape) * np.logspace(-2, 2, shape[0])[:, None]
    E = oracle.equilibrated(U)
    assert np.allclose(np.linalg.norm(E, axis=1), np.linalg.norm(U) / math.sqrt(shape[0]))
    assert np.linalg.norm(E) == pytest.approx(np.linalg.norm(U))
    assert np.allclose(E / np.linalg.norm(E, axis=1, keepdims=True), U / np.linalg.norm(U, axis=1, keepdims=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_express_maps_singular_values_to_one(shape: tuple[int, int]) -> None:
    """The bases stay and each singular value goes through the five odd polynomials (1e-9), to 0.8 .. 1.2 from 0.003 of the
    norm up. Tall, wide and square, for any scale of the matrix.
    """
    values = np.geomspace(0.004, 1, min(shape))
    values /= np.linalg.norm(values)
    expected = values / (1.01 + 1e-6 / 1e3)
    for a, b, c in oracle.POLAR_EXPRESS:
        expected = a * expected + b * expected**3 + c * expected**5
    assert np.abs(expected[values > 0.003] - 1).max() < 0.2
    assert np.allclose(
        oracle.polar_express(1e3 * _spectrum(shape, values)), _spectrum(shape, expected), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_renormalised_has_the_norm_of_an_orthogonal_matrix(shape: tuple[int, int]) -> None:
    """||X||_F = sqrt(min(rows, columns)) for any X, and zero stays zero."""
    assert np.linalg.norm(oracle.renormalised(_normal(*shape))) == pytest.approx(math.sqrt(min(shape)))
    assert not oracle.renormalised(np.zeros(shape)).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_normuon_evens_the_long_side_and_keeps_the_norm(shape: tuple[int, int]) -> None:
    """First step: s = 0.1 mean(X^2) per row, per column if wide, so those get one norm; then 0.9 s + 0.1 of the next."""
    X, Y = _normal(2, *shape) * np.logspace(-1, 1, shape[0])[:, None] * np.logspace(-1, 1, shape[1])
    axis = 0 if shape == (16, 48) else 1
    zero = oracle.muon_state(X).second
    assert zero.shape == ((1, 48) if shape == (16, 48) else (shape[0], 1)) and not zero.any()
    first, second = oracle.normuon(X, zero)
    assert np.allclose(second, 0.1 * (X**2).mean(axis, keepdims=True))
    assert np.linalg.norm(first) == pytest.approx(np.linalg.norm(X))
    lengths = np.linalg.norm(first, axis=axis)
    assert np.allclose(lengths, lengths[0])
    next_, third = oracle.normuon(Y, second)
    assert np.allclose(third, (0.09 * X**2 + 0.1 * Y**2).mean(axis, keepdims=True))
    assert np.linalg.norm(next_) == pytest.approx(np.linalg.norm(Y))
    assert np.allclose(np.diff((next_ * np.sqrt(third) / Y).ravel()), 0)  # one factor, the norm's, on Y / sqrt(s)


def test_cautious_decay_by_hand() -> None:
    """lr 0.5, decay 0.2: the weight shrinks besides the step where both have one sign or either is 0, else only steps."""
    W, X = np.array([[2.0, -2.0, 2.0, -2.0, 2.0, 0.0]]), np.array([[1.0, -1.0, -1.0, 1.0, 0.0, 1.0]])
    expected = [[2 - 0.5 * (1 + 0.4), -2 + 0.5 * (1 + 0.4), 2.5, -2.5, 2 - 0.5 * 0.4, -0.5]]
    assert np.allclose(oracle.cautious(W, X, 0.5, 0.2), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_step_has_its_parts_and_the_aspect_factor(shape: tuple[int, int]) -> None:
    """Without decay the step's norm is lr sqrt(max(1, rows/columns)) sqrt(min(rows, columns)), exactly, at steps 0 and 1.
    Momentum is in the state, and a gradient of zero leaves the weight where the state is zero.
    """
    W, G, H = _normal(3, *shape)
    length = 0.02 * math.sqrt(max(1, shape[0] / shape[1])) * math.sqrt(min(shape))
    state = oracle.muon_state(W)
    for g in (G, H):
        new, state = oracle.muon_step(W, g, state, lr=0.02, mu=0.9, decay=0.0)
        assert np.linalg.norm(new - W) == pytest.approx(length)
    assert np.allclose(state.momentum, 0.09 * G + 0.1 * H)
    still, _ = oracle.muon_step(W, 0 * G, oracle.muon_state(W), lr=0.02, mu=0.9, decay=0.0)
    assert np.array_equal(still, W)


def test_muon_step_ignores_the_scales_of_gradient_and_rows() -> None:
    """A gradient's rows may have any positive scale: MuonEq comes before the orthogonalisation. Columns may not."""
    W, G = _normal(2, 24, 24)
    scale = np.logspace(-1, 1, 24)

    def step(g: np.ndarray) -> np.ndarray:
        return oracle.muon_step(W, g, oracle.muon_state(W), lr=0.02, mu=0.9, decay=0.1)[0]

    assert np.allclose(step(G * scale[:, None]), step(G), rtol=0, atol=1e-6)  # the 1e-6 beside the norm
    assert not np.allclose(step(G * scale), step(G), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_near_and_not_equal(shape: tuple[int, int]) -> None:
    """A step differs by 0.1 to 5 percent of its norm: bf16 has 8 bits, over 5 iterations.
    At mu 0 the update is the gradient, so rounding that first changes nothing.
    """
    W, G = _normal(2, *shape)
    exact, rounded = (
        oracle.muon_step(W, G, oracle.muon_state(W), 0.02, 0.9, 0.0, low)[0] - W
        for low in (oracle.exact, oracle.to_bf16)
    )
    assert 1e-3 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 5e-2
    first, second = (
        oracle.muon_step(W, g, oracle.muon_state(W), 0.02, 0.0, 0.0, oracle.to_bf16)[0] for g in (G, oracle.to_bf16(G))
    )
    assert np.array_equal(first, second)
    assert oracle.to_bf16(np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8])).tolist() == [1.0, 1 + 2.0**-6]  # ties to even


def test_adamw_by_hand() -> None:
    """Two steps on g = 2, then -1; the first moves by lr in the sign of g whatever its size, after the decay."""
    group = oracle.Adam(lr=0.1, beta1=0.8, beta2=0.96, decay=0.5)
    p, m, v = oracle.adamw_step(np.array(3.0), np.array(2.0), np.array(0.0), np.array(0.0), 0, group, factor=0.5)
    assert p == pytest.approx(3 * (1 - 0.05 * 0.5) - 0.05)
    assert (m, v) == (pytest.approx(0.4), pytest.approx(0.16))
    p2, m, v = oracle.adamw_step(p, np.array(-1.0), m, v, 1, group, factor=1.0)
    assert (m, v) == (pytest.approx(0.12), pytest.approx(0.1936))
    assert p2 == pytest.approx(p * (1 - 0.1 * 0.5) - 0.1 * (0.12 / 0.36) / math.sqrt(0.1936 / 0.0784))
    tiny, _, _ = oracle.adamw_step(np.array(0.0), np.array(1e-10), np.array(0.0), np.array(0.0), 0, group, factor=1.0)
    assert tiny == pytest.approx(-0.05)  # eps 1e-10 stands beside the root


def test_schedules_by_hand() -> None:
    """1,000 steps: the rate falls after step 350, while momentum still rises until 400. 10,000 steps: a plateau."""
    rates = {0: 1 / 40, 38: 39 / 40, 39: 1, 40: 1, 350: 1, 675: 0.525, 999: 1 / 650 + 0.05 * 649 / 650, 1000: 0.05}
    assert {t: oracle.lr_factor(t, 1000) for t in rates} == {t: pytest.approx(x) for t, x in rates.items()}
    assert oracle.lr_factor(351, 1000) == pytest.approx(1 - 0.95 / 650)
    early = {0: 0.85, 200: 0.91, 399: 0.9697, 400: 0.97 - 0.07 * 50 / 650, 675: 0.935, 1000: 0.90}
    assert {t: oracle.muon_momentum(t, 1000) for t in early} == {t: pytest.approx(x) for t, x in early.items()}
    late = {399: 0.9697, 400: 0.97, 3500: 0.97, 6750: 0.935, 10000: 0.90}
    assert {t: oracle.muon_momentum(t, 10000) for t in late} == {t: pytest.approx(x) for t, x in late.items()}
    decays = {0: 0.28, 250: 0.28 * (0.5 + math.sqrt(0.125)), 500: 0.14, 1000: 0.0}
    assert {t: oracle.muon_decay(t, 1000, 0.28) for t in decays} == {t: pytest.approx(x) for t, x in decays.items()}
