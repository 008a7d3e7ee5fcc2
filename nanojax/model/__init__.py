"""What is computed: the weights, their initialisation, and the one walk through the layers."""

from nanojax.model.gpt import *  # noqa: F403
