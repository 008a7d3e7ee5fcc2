"""The table's initialisation, as functions that draw a weight."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nanojax import weights


def initializer(weight: weights.Weight) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """The table's initialisation as a function (key, shape) -> f32 array."""

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        init = weight.init
        if init.values:
            return jnp.array(init.values, jnp.float32).reshape(shape)
        if not init.std and not init.uniform:
            return jnp.zeros(shape, jnp.float32)
        part = (shape[0] // weight.parts, *shape[1:])
        keys = [key] if weight.parts == 1 else jax.random.split(key, weight.parts)
        if init.uniform:
            low = 0.0 if init.positive else -init.uniform
            drawn = [jax.random.uniform(k, part, jnp.float32, low, init.uniform) for k in keys]
        else:
            drawn = [jax.random.normal(k, part, jnp.float32) * init.std for k in keys]
        return drawn[0] if weight.parts == 1 else jnp.concatenate(drawn)

    return draw
