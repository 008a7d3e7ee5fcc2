"""Days, kilowatt hours and money: plain arithmetic, and the published runs it is checked against."""

import dataclasses

DAY = 86400.0
# Household electricity: USA 2025 average (EIA, about 17 US cents), Taiwan NT$3-4 (the note's range, middle).
PRICES = {"USD": 0.17, "NT$": 3.5}


def kwh(watts: float, seconds: float) -> float:
    """Energy in kWh of `watts` for `seconds`."""
    return watts * seconds / 3.6e6


@dataclasses.dataclass(frozen=True)
class Bill:
    """What a run takes: seconds on the clock, watts drawn, kWh, and money per currency."""

    seconds: float
    watts: float
    kwh: float
    cost: dict[str, float]

    @property
    def days(self) -> float:
        return self.seconds / DAY


def bill(tokens: float, tokens_per_second: float, watts: float, prices: dict[str, float] | None = None) -> Bill:
    """The Bill of `tokens` at `tokens_per_second` and `watts`; `prices` are per kWh, PRICES if None."""
    seconds = tokens / tokens_per_second
    energy = kwh(watts, seconds)
    return Bill(seconds, watts, energy, {c: energy * p for c, p in (PRICES if prices is None else prices).items()})


# nanochat's d32 (run1000.sh): 71,680 steps of 524,288 tokens, 12 * 32 * 2048^2 + 2 * 65,536 * 2048 parameters.
D32_FLOPS_PER_TOKEN = 6 * (1_879_048_192 - 134_217_728) + 12 * 32 * 16 * 128 * 2048
D32_TOKENS = 71_680 * 524_288
D32_FLOPS = D32_FLOPS_PER_TOKEN * D32_TOKENS  # 4.54e20


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published statement about d32 and what the arithmetic makes of it."""

    label: str
    tflops: tuple[float, float]  # effective, slow and fast end
    days: tuple[float, float] | None  # as stated, short and long; None = stated to be impossible
    kwh: tuple[float, float] | None = None
    watts: float = 220.0  # middle of the note's 200-250 W
    devices: int = 1

    @property
    def true_days(self) -> tuple[float, float]:
        """Days of d32's 4.54e20 FLOPs at the stated rate, short and long."""
        fast, slow = (D32_FLOPS / (rate * 1e12 * self.devices) / DAY for rate in reversed(self.tflops))
        return fast, slow

    @property
    def true_kwh(self) -> tuple[float, float]:
        """kWh over `true_days` at `watts` per device."""
        fast, slow = (kwh(self.watts * self.devices, days * DAY) for days in self.true_days)
        return fast, slow

    @property
    def needed_tflops(self) -> tuple[float, float] | None:
        """TFLOP/s per device that the stated days would need, for the long and the short end."""
        if self.days is None:
            return None
        slow, fast = (D32_FLOPS / (days * DAY) / 1e12 / self.devices for days in reversed(self.days))
        return slow, fast


NOTE = (
    Claim("note: FP16/BF16, nothing quantised", (25, 30), None),
    Claim("note: 4-bit + gradient checkpointing", (18, 22), (35, 45), (150, 200)),
    Claim("note: 3-bit or NF4 + 8-bit AdamW", (20, 24), (30, 38), (150, 200)),
    Claim("note: 2.5-2.7 bit", (22, 26), (28, 35), (150, 200)),
)
# 31.3 h of pretraining at 1.572 s a step (its log, MFU 50.9 %); the README rounds up to 33 h with everything else.
# 700 W is the limit of each H100 SXM; host, fans and cooling are not in it.
H100_NODE = Claim("nanochat: 8 x H100, 33 h", (477.6, 503.6), (31.3 / 24, 33 / 24), watts=700.0, devices=8)
# A reader's RTX 4070, nanochat's torch code (newest recipe, d12, bf16, 8 x 2048): 55.7k tokens/s, 887.1 MFLOP a token.
MEASURED_4070 = (55_700.0, 887.1e6)
