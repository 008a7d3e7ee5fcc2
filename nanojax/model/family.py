"""Which model a config has."""

from nanojax.config import Config
from nanojax.model import gpt
from nanojax.model.seam import Family


def of(config: Config) -> Family:
    """The family of the config's model. There is one so far."""
    del config
    return gpt.FAMILY
