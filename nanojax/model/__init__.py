"""What is computed: initialisation, the layers of each model, and the one walk through them."""

from nanojax.model.forward import empty_cache, forward, forward_cached, hidden, token_losses
from nanojax.model.params import Params, init_params

__all__ = ["Params", "empty_cache", "forward", "forward_cached", "hidden", "init_params", "token_losses"]
