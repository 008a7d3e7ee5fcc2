"""One optimizer step in 12 GB."""

from nanojax.step.step import *  # noqa: F403
