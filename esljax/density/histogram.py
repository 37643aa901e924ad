r"""Histogram densities: counts c in equal bins, and a spline through log(c + ½) for the score.

q̂(θ) = (c + ½) / (n + ½ bins) / volume inside the box, 0 outside
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import door, refuse
from esljax._types import Array, Float, Scalar
from esljax.density.base import AbstractDensity, AbstractLogDensity, AbstractSmoother


class HistogramDensity(AbstractDensity):
    r"""Counts in equal bins between the least and the greatest member, along at most three axes.

        q̂(θ) = (c + ½) / (n + ½ bins) / volume inside the box, 0 outside

    c is the number of members in the bin of θ; half a member more in each bin (Jeffreys' prior)
    keeps empty ones finite. Each axis has ⌈2 n^{1/(d+2)}⌉ bins, the number that Scott's rule gives
    for a Gaussian law. A step has no slope, so the score is that of the quadratic B-spline through
    log(c + ½): continuous, constant outside the box, and but for the noise of the counts exact
    where log q is a parabola along each axis.

    **Raises:** `InputError` in more than three dimensions, where nearly every bin is empty.
    **Differentiation:** the score, once, in x. Counts are steps and have no slope in the members.
    **Reference:** Scott, "On optimal and data-based histograms", Biometrika 66, 605 (1979).

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> esl.density.HistogramDensity().fit(jnp.arange(8.0)[:, None]).counts.tolist()
        [2.0, 2.0, 2.0, 2.0]
    """

    note: ClassVar[str] = "histogram of ⌈2 n^{1/(d+2)}⌉ bins along each axis"

    def init(self, positions: Float[Array, "n d"]) -> None:
        return None

    def estimate(self, positions: Float[Array, "n d"], state: Any) -> tuple["Histogram", Any]:
        n, d = positions.shape
        if d > 3:
            raise refuse(
                "positions",
                "have at most 3 coordinates per member for a histogram",
                f"has shape {positions.shape}",
            )
        bins = math.ceil(2 * n ** (1 / (d + 2)))
        lower, upper = jnp.min(positions, axis=0), jnp.max(positions, axis=0)
        empty = Histogram(jnp.zeros((bins,) * d, positions.dtype), lower, (upper - lower) / bins)
        counts = empty.counts.at[tuple(empty.bin(positions).T)].add(1)
        return Histogram(counts, empty.lower, empty.width), state


class Histogram(AbstractLogDensity, AbstractSmoother):
    """The density that `HistogramDensity` fits."""

    counts: Float[Array, "..."]
    """Members in each bin, one axis per coordinate."""
    lower: Float[Array, " d"]
    """The corner of the box where every coordinate is least, shape (d,), in units of θ."""
    width: Float[Array, " d"]
    """The sides of one bin, shape (d,), in units of θ."""

    def bin(self, x: Float[Array, "*n d"]) -> Array:
        """Return the bin of each point, shape (..., d); outside the box the bin at the edge."""
        return jnp.clip(
            jnp.floor((x - self.lower) / self.width).astype(int), 0, len(self.counts) - 1
        )

    @door
    def log_density(self, x: Float[Array, " d"]) -> Scalar:
        inside = jnp.all((x >= self.lower) & (x <= self.lower + self.width * len(self.counts)))
        total = jnp.sum(self.counts) + self.counts.size / 2
        logs = (
            jnp.log(self.counts[tuple(self.bin(x))] + 0.5)
            - jnp.log(total)
            - jnp.sum(jnp.log(self.width))
        )
        return jnp.where(inside, logs, -jnp.inf)

    @door
    def score(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        return jax.grad(lambda x: self._spline(jnp.log(self.counts + 0.5), self._inside(x)))(x)

    def smooth(
        self, positions: Float[Array, "n d"], values: Float[Array, "n p"]
    ) -> Callable[[Array], Array]:
        """Return means over each bin, drawn to 0 by half a member, through the same spline."""
        sums = (
            jnp.zeros((*self.counts.shape, values.shape[1]), values.dtype)
            .at[tuple(self.bin(positions).T)]
            .add(values)
        )
        return eqx.Partial(self._mean, sums / (self.counts + 0.5)[..., None])

    def _mean(self, table: Float[Array, "..."], x: Float[Array, " d"]) -> Float[Array, " p"]:
        return self._spline(table, self._inside(x))

    def _inside(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        return jnp.clip(x, self.lower, self.lower + self.width * len(self.counts))

    def _spline(self, table: Float[Array, "..."], x: Float[Array, " d"]) -> Float[Array, "..."]:
        # Beyond its edges the table continues as a straight line.
        axes = len(x)
        patch = jnp.pad(
            table,
            [(1, 1)] * axes + [(0, 0)] * (table.ndim - axes),
            mode="reflect",
            reflect_type="odd",
        )
        corner = self.bin(x)
        patch = jax.lax.dynamic_slice(
            patch, [*corner, *[0] * (table.ndim - axes)], (*(3,) * axes, *table.shape[axes:])
        )
        offset = (x - self.lower) / self.width - corner - 0.5
        for t in offset:
            weights = jnp.stack([(0.5 - t) ** 2 / 2, 0.75 - t**2, (0.5 + t) ** 2 / 2])
            # A sum over the first axis; transposed for `product` it rounds differently.
            patch = jnp.tensordot(weights, patch, axes=1, precision="highest")
        return patch
