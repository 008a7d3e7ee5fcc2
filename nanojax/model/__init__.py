"""What is computed: initialisation, the layers of each model, and the one walk through them."""

from nanojax.model.forward import (
    attention_scale,
    causal,
    empty_cache,
    forward,
    forward_cached,
    head,
    hidden,
    hidden_cached,
    token_losses,
    walk,
)
from nanojax.model.params import Params, init_params

__all__ = [
    "Params",
    "attention_scale",
    "causal",
    "empty_cache",
    "forward",
    "forward_cached",
    "head",
    "hidden",
    "hidden_cached",
    "init_params",
    "token_losses",
    "walk",
]
