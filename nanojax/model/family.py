"""Which model a config has."""

from nanojax.config import Config
from nanojax.model import gpt, gpt2026
from nanojax.model.seam import Family


def of(config: Config) -> Family:
    """The family of the config's model."""
    return {"2025": gpt.FAMILY, "2026": gpt2026.FAMILY}[config.model.family]
