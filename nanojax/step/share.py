"""One device's share of a step that several devices compute: its microbatches, its layers and rows, and what is exchanged.

Gradients meet once, after the microbatches: each device gets the sums of its own layers, and of its own rows of an embedding
or head. It updates those, and the stored results are gathered. Layers and rows are divided in order: of n devices, device d
has the d-th n-th, and the last one may have fewer.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nanojax import weights

AXIS = "data"  # the mesh's only axis


class Share(NamedTuple):
    """devices: how many compute the step together. Of one, every method returns what it was given."""

    devices: int = 1

    @property
    def several(self) -> bool:
        return self.devices > 1

    def of(self, count: int) -> int:
        """How many of `count` layers or rows are a device's own; `padded` fills the last device's up to this."""
        return math.ceil(count / self.devices)

    def number(self, i: jax.Array, count: int) -> jax.Array:
        """Which of all devices' `devices*count` microbatches, layers or chunks is this device's i-th of `count`."""
        return lax.axis_index(AXIS) * count + i if self.several else i

    def key(self, key: jax.Array) -> jax.Array:
        """A key that no other device has."""
        return jax.random.fold_in(key, lax.axis_index(AXIS)) if self.several else key

    def summed(self, tree: Any) -> Any:
        """The sum over all devices, on each of them."""
        return lax.psum(tree, AXIS) if self.several else tree

    def layers(self, layers: tuple[Any, ...]) -> tuple[Any, ...]:
        """The device's own of all layers' arrays."""
        if not self.several:
            return layers
        places = self._places(len(layers))
        last = len(layers) - 1
        return tuple(
            lax.switch(lax.axis_index(AXIS), [lambda i=i: layers[min(i, last)] for i in each]) for each in places
        )

    def rows(self, table: Any) -> Any:
        """The device's own rows of a whole table, in any stored format."""
        if not self.several:
            return table

        def own(a: jax.Array) -> jax.Array:
            each = self.of(a.shape[0])
            return lax.dynamic_slice_in_dim(self.padded(a), lax.axis_index(AXIS) * each, each)

        return jax.tree.map(own, table)

    def gathered(self, tree: Any, count: int) -> Any:
        """The `count` layers (stacked) or rows of all devices, of which each gives its own."""
        if not self.several:
            return tree
        return jax.tree.map(lambda a: lax.all_gather(a, AXIS, axis=0, tiled=True)[:count], tree)

    def met(self, table: weights.Table, totals: dict[str, Any]) -> dict[str, Any]:
        """Gradients of the whole step from each device's own sums: of its layers and rows, and whole where a weight is small.

        One array after the other, and none that has been met is kept, so that no second copy of the sums exists.
        """
        if not self.several:
            return totals
        meetings = [(name, *each) for name in sorted(totals) for each in self._meetings(table[name], totals[name])]
        names, left, ways = ([*column] for column in zip(*meetings))
        met: dict[str, list[jax.Array]] = {name: [] for name in names}
        for name, meet in zip(names, ways):
            left, met = lax.optimization_barrier((left, met))
            part, *left = left
            met[name].append(meet(part))
        return {name: tuple(done) if isinstance(totals[name], tuple) else done[0] for name, done in met.items()}

    def _meetings(self, weight: weights.Weight, total: Any) -> list[tuple[Any, Any]]:
        """The arrays of a weight's sums that meet at one time, and how."""
        arrays = total if isinstance(total, tuple) else (total,)
        if not self.divides(weight):
            return [(a, self.summed) for a in arrays]
        if weight.use != "layer":
            return [(a, lambda rows: lax.psum_scatter(self.padded(rows), AXIS, tiled=True)) for a in arrays]
        layer = lambda i: total[i] if i < len(total) else jnp.zeros_like(total[0])
        scattered = lambda layers: lax.psum_scatter(jnp.stack(layers), AXIS)
        return [([layer(i) for i in each], scattered) for each in self._places(len(total))]

    def divides(self, weight: weights.Weight) -> bool:
        """Whether devices update parts of the weight. The few numbers outside layers and tables are updated by each."""
        return weight.use != "shared"

    def padded(self, a: jax.Array) -> jax.Array:
        """The array with rows of zeros at its end, so that all devices have as many."""
        more = self.of(a.shape[0]) * self.devices - a.shape[0]
        return jnp.pad(a, [(0, more), *[(0, 0)] * (a.ndim - 1)]) if more else a

    def _places(self, count: int) -> list[list[int]]:
        """For the j-th own layer, which one it is on each device; from `count` on there is none."""
        each = self.of(count)
        return [[d * each + j for d in range(self.devices)] for j in range(each)]


ALONE = Share()
