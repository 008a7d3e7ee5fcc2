"""Cases that check each op on a device against the CPU, and matmuls against float64 sums, with their tolerances."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojax import config as configs
from nanojax import config_rules, weights, xla
from nanojax.config import Compute, Config
from nanojax.ops import attention, cross_entropy, linear, rope
from nanojax.quant import Quantized, quantize_rows, rounding

INT8 = Compute(dtype="bf16", forward="int8", dx="int8", dw="int8", attention="chunked")
BF16 = Compute(dtype="bf16", attention="chunked")

# rms(difference) / rms(value). Devices sum in different orders, so an f32 value next to a rounding boundary may be rounded
# to the other neighbour: in bf16 that is 2^-8 of the value away, in int8 codes 1/127 of the row's largest value.
EXACT, SUMS, ROUNDED = 0.0, 1e-4, 3e-3
# Flash attention rounds its probabilities to bf16; the reference on the CPU is f32 throughout.
FLASH = 1e-2
# bf16 neighbours are up to 2^-7 of the value apart. If the device drew other noise than the CPU, the difference would be 2e-3.
DITHER = 5e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """A function whose outputs on the device must be within `tolerance` of those on the CPU.

    `arguments` is a pytree. `reference`, if given, is what the CPU computes instead of `function`; it may use numpy.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    tolerance: float
    reference: Callable[..., Any] | None = None


def difference(got: Any, want: Any) -> float:
    """The largest rms(got - want) / rms(want) over the arrays of two trees; inf for NaN, Inf or another shape."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if a.dtype == jax.dtypes.float0:
            continue
        a, b = (np.asarray(jax.device_get(x)).astype(np.float64) for x in (a, b))
        if a.shape != b.shape or not np.all(np.isfinite(a)):
            return float("inf")
        size = np.sqrt(np.mean(b * b))
        worst = max(worst, float(np.sqrt(np.mean((a - b) ** 2)) / (size if size > 0 else 1.0)))
    return worst


def on(place: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Compiles function(*arguments) for the jax device `place` as training would, and runs it there."""
    with jax.default_device(place):
        lowered = jax.jit(lambda *a: function(*a)).lower(*jax.device_put(arguments, place))
        compiled = xla.compile_for_gpu(lowered) if place.platform == "gpu" else lowered.compile()
        return jax.block_until_ready(compiled(*jax.device_put(arguments, place)))


def check(case: Case, place: Any, reference: Any) -> dict[str, Any]:
    """Runs a Case: {name, error, tolerance, ok}."""
    got = on(place, case.function, case.arguments)
    want = case.reference(*case.arguments) if case.reference else on(reference, case.function, case.arguments)
    error = difference(got, want)
    return {"name": case.name, "error": error, "tolerance": case.tolerance, "ok": error <= case.tolerance}


def cases(shapes: dict[str, tuple[int, ...]], M: int, tiny: bool, gpu: bool) -> Iterator[Case]:
    """The cases of every op. Matmuls have full size; the other ops are small, because the CPU computes them too.

    Args:
      shapes: (outputs, inputs) of the model's matrices, by name.
      M: tokens in a matmul.
      tiny: even smaller, for seconds on a CPU.
      gpu: use cuDNN attention and Pallas row kernels, which need a GPU.
    """
    yield from _products(shapes, M)
    m, d, head = (64, 64, 32) if tiny else (512, 768, 128)
    yield from _linears(m, d, head, gpu)
    yield from _others(m, d, head, gpu)


def of_choice(config: Config, choice: str) -> Iterator[Case]:
    """The cases of one choice of config.compute, at the config's own widths, with few tokens.

    Args:
      choice: "rows" (the row kernels, against XLA's form on the CPU), "attention" (cuDNN's, against chunks on the CPU).
    """
    c, m = config.compute, config.model
    if choice == "rows":
        kind = "int8" if c.forward == "int8" or c.dx == "int8" else "bf16"
        yield from _linears(128, m.D, m.H, True, (kind,))
    if choice == "attention":
        windows = sorted({min(window, 512) for window in weights.windows(m)} | {128})
        yield from _attentions((1, 512, 2, m.H), windows, True)


def _random(seed: int, *shape: int, dtype: Any = "float32") -> Any:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def _products(shapes: dict[str, tuple[int, ...]], M: int) -> Iterator[Case]:
    """matmul_t at full size, of which 16 rows are compared: int8 to the last bit, bf16 with f32 sums."""

    def rows(a: Any, b: Any) -> Any:
        whole = jax.lax.optimization_barrier(linear.matmul_t(a, b))  # or XLA would multiply only those rows
        return whole[:: max(1, a.shape[0] // 16)]

    def wide(a: Any, b: Any) -> Any:  # exact: float64 holds any sum of 2^17 products of codes
        return a[:: max(1, a.shape[0] // 16)].astype(np.float64) @ b.astype(np.float64).T

    for name, (O, K) in shapes.items():
        for label, (a, b) in {"forward": ((M, K), (O, K)), "dX": ((M, O), (K, O)), "dW": ((O, M), (K, M))}.items():
            codes = [np.random.default_rng(i).integers(-127, 128, s).astype(np.int8) for i, s in enumerate((a, b))]
            size = f"{a[0]}x{a[1]}x{b[0]}"
            yield Case(f"int8 product {label} of {name} {size}", rows, tuple(codes), EXACT, wide)
            floats = tuple(_random(i, *s, dtype=jnp.bfloat16) for i, s in enumerate((a, b)))
            yield Case(f"bf16 product {label} of {name} {size}", rows, floats, SUMS, wide)


def _linears(m: int, d: int, head: int, gpu: bool, kinds: tuple[str, ...] = ("int8", "bf16")) -> Iterator[Case]:
    """y, dX and dW of the linear ops with int8 and with bf16 weights; on a GPU, row kernels against XLA's form on the CPU."""
    cpu = jax.devices("cpu")[0]
    for kind in kinds:
        compute = INT8 if kind == "int8" else BF16
        for op, (O, K), parts in (
            ("linear", (d, d), 0),
            ("norm_linear", (4 * d, d), 1),
            ("qkv_linear", (3 * d, d), 3),
            ("relu2_linear", (d, 4 * d), 0),
        ):
            w = _random(1, O, K) / K**0.5
            scale = np.abs(w).max(-1, keepdims=True) / np.float32(127)
            stored = (np.rint(w / scale).astype(np.int8), scale) if kind == "int8" else (w.astype(jnp.bfloat16),)
            x, dy = _random(2, m, K, dtype=jnp.bfloat16), _random(3, m, O, dtype=jnp.bfloat16)
            other = _random(4, m, K if parts else O, dtype=jnp.bfloat16)
            run = functools.partial(_linear, op, parts, rope.Rotation(m // 2, d // head, head, 1e4))
            name, plain = f"{kind} {op} {m}x{K}x{O}: y, dW, dX", dataclasses.replace(compute, rows="xla")
            if gpu:
                kernels = functools.partial(run, dataclasses.replace(compute, rows="pallas"))
                reference = lambda *a, run=run, plain=plain: on(cpu, functools.partial(run, plain), a)
                yield Case(name, kernels, (stored, x, dy, other), ROUNDED, reference)
            else:
                yield Case(name, functools.partial(run, plain), (stored, x, dy, other), ROUNDED)


def _linear(
    op: str, parts: int, rotation: rope.Rotation, c: Compute, stored: Any, x: Any, dy: Any, other: Any
) -> tuple[Any, Any]:
    """An op's outputs and gradients. `other` is the residual, or, for ops that also return x, the gradient of that x."""
    weights = Quantized(*stored) if len(stored) == 2 else stored[0]
    tap = jnp.zeros(weights.shape, jnp.float32)
    if not parts:
        function = getattr(linear, op)
        y, vjp = jax.vjp(lambda tap, x, r: function(c, "", weights, tap, x, r), tap, x, other)
        return y, vjp(dy)
    dys = tuple(jnp.split(dy, parts, -1))
    if op == "qkv_linear":
        dys = tuple(a.reshape(-1, rotation.T, rotation.N, rotation.H) for a in dys)

        def run(tap: jax.Array, x: jax.Array) -> Any:
            heads: Any = linear.qkv_linear(c, ("", ""), rotation, 0, weights, tap, x, jnp.int32(0))
            return heads[:4]

    else:
        run = lambda tap, x: linear.norm_linear(c, "", weights, tap, x, parts)
        dys = (dys,)
    both: Any = jax.vjp(run, tap, x)
    ys, vjp = both
    return ys, vjp((*dys, other))


def _others(m: int, d: int, head: int, gpu: bool) -> Iterator[Case]:
    """Quantised rows, rounding, attention, the chunked loss."""
    x, noise = _random(5, m, d), np.random.default_rng(6).random((2, max(m, d)), np.float32)
    yield Case(f"quantize_rows {m}x{d}", lambda x: tuple(quantize_rows(x)), (x,), DITHER)
    old = x.astype(jnp.bfloat16).astype(np.float32)
    yield Case(f"dithered {m}x{d}", lambda x, u, v: rounding.dithered(x, (u, v)), (old, *noise), DITHER)
    words = np.arange(2, dtype=np.uint32)
    uniform = lambda words: rounding.noise_u16(jax.random.wrap_key_data(words), (m, d))
    yield Case(f"noise_u16 {m}x{d}", uniform, (words,), EXACT)

    changes = {"model.depth": 1, "model.width": d, "model.head_dim": head, "model.vocab": 4 * d, "model.seq": m}
    changes |= {"train.tokens_per_step": m, "compute.dtype": "bf16", "compute.loss_chunk": m // 2}
    config = config_rules.resolve(configs.override(Config(), changes))

    yield from _attentions((1, m, d // head, head), [m, m // 4], gpu)

    def lost(head: Any, x: Any, targets: Any) -> Any:
        total = jnp.zeros(head.shape, jnp.float32)
        return cross_entropy.loss_and_grads(
            config.compute, config.model.softcap, head, total, x, targets, 1 / m, jax.random.key(0)
        )

    weights = (_random(11, 4 * d, d) / d**0.5).astype(jnp.bfloat16)
    targets = np.random.default_rng(12).integers(0, 4 * d, m).astype(np.int32)
    yield Case(
        f"loss_and_grads {m}x{d}x{4 * d}: loss, dhead, dx", lost, (weights, x.astype(jnp.bfloat16), targets), FLASH
    )


def _attentions(shape: tuple[int, int, int, int], windows: list[int], gpu: bool) -> Iterator[Case]:
    """Attention [B,T,N,H] and its gradients over these windows, cuDNN's on a GPU, against f32 chunks on the CPU."""
    q, k, v, dout = (_random(i, *shape, dtype=jnp.bfloat16) for i in range(7, 11))
    for window in windows:

        def attended(
            q: Any, k: Any, v: Any, dy: Any, implementation: str = "cudnn" if gpu else "chunked", window: int = window
        ) -> Any:
            scale = shape[-1] ** -0.5
            y, vjp = jax.vjp(lambda q, k, v: attention.attention(q, k, v, implementation, window, scale), q, k, v)
            return y, vjp(dy)

        def plain(*arrays: Any, attended: Any = attended) -> Any:
            chunked = lambda *a: attended(*a, implementation="chunked")
            return on(jax.devices("cpu")[0], chunked, tuple(a.astype(np.float32) for a in arrays))

        name = f"{'cudnn' if gpu else 'chunked'} attention {q.shape}, window {window}: y, dq, dk, dv"
        yield Case(name, attended, (q, k, v, dout), FLASH, plain)
