"""What a run costs: days, kilowatt hours, money."""

import dataclasses

DAY = 86400.0
# Household electricity per kWh: USA, average of 2025 (EIA); Taiwan, middle of NT$ 3 to 4.
PRICES = {"USD": 0.17, "NT$": 3.5}


def kwh(watts: float, seconds: float) -> float:
    """Energy in kWh of `watts` for `seconds`."""
    return watts * seconds / 3.6e6


@dataclasses.dataclass(frozen=True)
class Bill:
    """Seconds, watts, kWh, and money by currency."""

    seconds: float
    watts: float
    kwh: float
    cost: dict[str, float]

    @property
    def days(self) -> float:
        return self.seconds / DAY


def bill(tokens: float, tokens_per_second: float, watts: float, prices: dict[str, float] | None = None) -> Bill:
    """The Bill of `tokens` at `tokens_per_second` and `watts`. `prices`: money per kWh by currency; None: PRICES."""
    seconds = tokens / tokens_per_second
    energy = kwh(watts, seconds)
    return Bill(seconds, watts, energy, {c: energy * p for c, p in (PRICES if prices is None else prices).items()})
