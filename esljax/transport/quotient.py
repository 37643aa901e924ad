r"""W2² modulo the symmetries of a network: members are equal if they differ by relabelled units.

    d_G(θ, θ') = min_g ‖θ - g θ'‖,   W2²_G(q, q') = min_P Σ_ij P_ij d_G²(θ_i, θ'_j)

Let q and q' be invariant under a group G of isometries, as the laws of networks are that start from
exchangeable units and move by rules that know no unit by name. Then W2_G = W2: lift an optimal
coupling of orbits by aligned members and turn both by one random g; and project any coupling. So
W2_G is a better estimator of the same number, in which every member stands for |G| of them.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import check_kind, door, refuse
from esljax._numerics import product
from esljax._types import Array, Float, Int
from esljax.potentials.symmetry import Element, Symmetry, Turned
from esljax.sharding import keep
from esljax.transport.base import AbstractTransport, Solution
from esljax.transport.coordinates import AbstractWrappedTransport
from esljax.transport.pairing import many_pairs, solvable

# Rounds over all groups after which alternating assignments end; each must gain, and ten are rare.
_MOST_ROUNDS = 50


class QuotientTransport(AbstractWrappedTransport):
    r"""Another transport between members modulo a symmetry: each cost is the least over the group.

        d_G²(x_i, y_j) = min_g |x_i - g y_j|²

    Where the groups of the symmetry share no array, each takes one assignment for each pair of
    members, and the answer is exact: a metric, if the inner transport is one. Where they share
    arrays, assignments alternate, and distances are upper values and no metric; the name says so.

    A distance between laws that the symmetry leaves alone is the same modulo it. On samples it is a
    far better estimate: its bias is that of a space with fewer copies of everything.

    **Args:**
    - `transport`: `ExactTransport()`, or `SinkhornTransport(epsilon)` without a chunk.
    - `symmetry`: made by `esljax.symmetry`. In `speed_limit` it turns the arrays of those names
      where the run has them.

    A pair of ensembles of n members takes n² assignments of each group.

    **Raises:** `InputError` for another transport, and for members that the arrays of the symmetry
    do not make up.
    **Differentiation:** forward and reverse, at the group elements found (envelope theorem), as far
    as the inner transport allows.
    **Reference:** Okanohara, arXiv 2601.17607, for the laws; Ainsworth et al., "Git Re-Basin", ICLR
    2023, for the assignments.

    **Example:** the same network with its two hidden units in the other order.

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> symmetry = esl.symmetry.permutations(
        ...     {"hidden": [("inward", 1), ("outward", 0)]},
        ...     keys={"inward": (1, 2), "outward": (2, 1)},
        ... )
        >>> transport = esl.QuotientTransport(esl.ExactTransport(), symmetry)
        >>> float(transport.squared(jnp.array([[1.0, 2.0, 3.0, 4.0]]), jnp.array([[2.0, 1, 4, 3]])))
        0.0
    """

    symmetry: Symmetry = eqx.field(static=True)

    def __check_init__(self):
        check_kind(
            "symmetry", self.symmetry, Symmetry, "be made by esljax.symmetry, such as of(potential)"
        )
        if type(self.transport).solve_costs is AbstractTransport.solve_costs:
            raise refuse(
                "transport",
                "look at distances of members alone, as ExactTransport() and "
                "SinkhornTransport(epsilon) do",
                f"is {self.transport.name}",
            )

    @property
    def is_metric(self) -> bool:
        return self.transport.is_metric and self.symmetry.exact

    @property
    def knows_places(self) -> bool:
        return True

    @property
    def name(self) -> str:
        upper = "" if self.symmetry.exact else " (upper values by alternating assignments)"
        return f"{type(self).__name__} {self.transport.name}{upper}"

    def of_parameters(
        self, keys: tuple[tuple[str, tuple[int, ...]], ...] | None
    ) -> "AbstractTransport":
        own = self.symmetry.keys
        if keys is None or own == keys:
            return self
        # Arrays of other names may be the same; those of the same names lie where the run has them.
        turned = {axis.key for group in self.symmetry.groups for axis in group.axes}
        renamed = own is not None and [x for _, x in own] == [x for _, x in keys]
        if renamed and not turned <= set(dict(keys)):
            return self
        return QuotientTransport(self.transport, self.symmetry.at(keys))

    @door
    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        return self.paired(x, y)[0]

    @door
    def paired(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"]
    ) -> tuple[Solution, Int[Array, " n"] | None]:
        return self.transport.solve_costs(self._costs(x, y), self._within(x, y))

    def partners(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"], places: Int[Array, " n"]
    ) -> Float[Array, "n d"]:
        return jax.lax.map(lambda pair: self._turned(*pair), (x, y[places]))

    def solve_subsets(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"], subsets: Int[Array, "subsets kept"]
    ) -> Solution:
        return self.solve_parts(x, y, subsets, subsets)

    def solve_parts(
        self,
        x: Float[Array, "n d"],
        y: Float[Array, "m d"],
        rows: Int[Array, "parts k"],
        columns: Int[Array, "parts l"],
    ) -> Solution:
        across, within = self._costs(x, y), self._within(x, y)
        inner = self.transport

        def of_part(part):
            i, j = part

            def within_part():
                of_x, of_y = within()
                return of_x[i][:, i], of_y[j][:, j]

            return inner.solve_costs(across[i][:, j], within_part)[0]

        return jax.lax.map(of_part, (rows, columns))

    def numbers_held(self, n: int, d: int, differentiated: bool) -> float | int | None:
        units = sum(self.symmetry.sizes)
        most = max(self.symmetry.sizes)
        held = 2 * units * n**2 + 2 * n**2  # elements and costs
        lanes = many_pairs(most)[1] or 1
        return held + 4 * lanes * most**2 + (12 if differentiated else 7) * max(n, lanes) * d

    def numbers_waiting(self, n: int, d: int, differentiated: bool) -> float | int:
        # The elements of all pairs are marked to be kept for the derivative: places, and signs.
        ends = super().numbers_waiting(n, d, differentiated)
        groups = zip(self.symmetry.groups, self.symmetry.sizes, strict=True)
        kept = sum((2 if group.signed else 1) * h for group, h in groups)
        return ends + (kept * n**2 if differentiated else 0)

    def _costs(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
        """d_G² of each pair, differentiable at the group elements found."""
        fixed_x, fixed_y = jax.lax.stop_gradient((x, y))

        def element_of(places):
            i, j = places
            return aligned(self.symmetry, fixed_x[i], fixed_y[j])

        n, m = len(x), len(y)
        every = jnp.divmod(jnp.arange(n * m), m)
        _, together = many_pairs(max(self.symmetry.sizes))
        found = jax.lax.map(element_of, every, batch_size=together)
        elements = keep(jax.tree.map(lambda each: each.reshape(n, m, -1), found))

        @jax.checkpoint
        def costs_of(row):
            one, found = row
            return jax.vmap(
                lambda element, other: jnp.sum((one - self.symmetry.act(element, other)) ** 2)
            )(found, y)

        return jax.lax.map(costs_of, (x, elements))

    def _within(self, x: Array, y: Array) -> Callable[[], tuple[Array, Array]]:
        def symmetric(z):
            # Alternating assignments find other values on the way back.
            costs = self._costs(z, z)
            return costs if self.symmetry.exact else jnp.minimum(costs, costs.T)

        return lambda: (symmetric(x), symmetric(y))

    def _turned(self, one: Array, other: Array) -> Array:
        element = aligned(self.symmetry, *jax.lax.stop_gradient((one, other)))
        return self.symmetry.act(element, other)


def aligned(symmetry: Symmetry, x: Float[Array, " d"], y: Float[Array, " d"]) -> Element:
    """Return the g that brings y nearest to x: of least ‖x - g y‖.

    The best one if the symmetry is `exact`. Else the better of two that no single group can
    improve: one from members as they stand, which is the best for members of one run, and one from
    groups that are ordered one after the other by the arrays that later ones do not turn, which
    finds members that differ by little more than their order.
    """
    groups = range(len(symmetry.groups))
    here = symmetry.identity(x.dtype)
    if symmetry.exact:
        for k in groups:
            here = _reordered(symmetry, k, x, y, here)
        return here
    first = here
    for k, axes in _one_by_one(symmetry):
        first = _chosen(symmetry, k, x, symmetry.act(first, y), first, axes)

    def gain(state):
        element, least, count, _ = state
        for k in groups:
            element = _reordered(symmetry, k, x, y, element)
        now = _squared(symmetry, x, y, element)
        return element, now, count + 1, now < least

    def improved(start):
        state = start, _squared(symmetry, x, y, start), jnp.int32(0), jnp.array(True)
        return jax.lax.while_loop(lambda s: s[3] & (s[2] < _MOST_ROUNDS), gain, state)[:2]

    (one, near), (other, far) = improved(here), improved(first)
    return jax.tree.map(lambda a, b: jnp.where(far < near, b, a), one, other)


def _one_by_one(symmetry: Symmetry) -> list[tuple[int, tuple[Turned, ...]]]:
    """An order of the groups, and the axes of each in arrays that no later group turns.

    The group with most numbers in such arrays comes first; one that has none is left out.
    """
    shapes, left, order = dict(symmetry.keys or ()), set(range(len(symmetry.groups))), []
    while left:
        held = Counter(axis.key for k in left for axis in symmetry.groups[k].axes)
        free = {
            k: tuple(axis for axis in symmetry.groups[k].axes if held[axis.key] == 1) for k in left
        }
        numbers = {k: sum(math.prod(shapes[a.key]) for a in free[k]) for k in left}
        best = max(sorted(left), key=lambda k: numbers[k] / symmetry.sizes[k])
        left.remove(best)
        if free[best]:
            order.append((best, free[best]))
    return order


def _squared(symmetry: Symmetry, x: Array, y: Array, element: Element) -> Array:
    return jnp.sum((x - symmetry.act(element, y)) ** 2)


def _reordered(symmetry: Symmetry, k: int, x: Array, y: Array, element: Element) -> Element:
    """The element with the best order of group k while the others stay.

    An array with two axes in group k is turned along both at once, which is no assignment; so a new
    order counts only if it brings y nearer. That also keeps members of one run, which hardly
    differ, from changing places by the rounding of large products.
    """
    moved = symmetry.act(element, y)
    new = _chosen(symmetry, k, x, moved, element)
    nearer = _squared(symmetry, x, y, new) < jnp.sum((x - moved) ** 2)
    return jax.tree.map(lambda a, b: jnp.where(nearer, a, b), new, element)


def _chosen(
    symmetry: Symmetry,
    k: int,
    x: Array,
    moved: Array,
    element: Element,
    axes: Sequence[Turned] | None = None,
) -> Element:
    """The element with the order of group k that brings its units nearest along these axes.

    **Args:** `moved`: y, turned by `element`.
    """
    signed = symmetry.groups[k].signed
    own, others = symmetry.units(k, x, axes), symmetry.units(k, moved, axes)
    # From the middle of the units, or all that rounding leaves of their differences may be lost.
    middle = jnp.mean(own, axis=0)
    own, others = own - middle, others - middle
    likeness = product(own, others.T)
    # Less terms of one row or one column, which favor no order: one for a unit as it is, with
    # `shift` = (x - middle) · middle + middle · (y - middle) + middle² one for a flipped unit.
    shift = product(own, middle)[:, None] + product(others, middle) + jnp.sum(middle**2)
    flipped = likeness + 2 * shift
    cost = jnp.minimum(-likeness, flipped) if signed else -likeness
    pairs, _ = many_pairs(len(cost))
    chosen, _ = pairs(cost, solvable(cost))
    # Costs that are no numbers leave rows without partners.
    here = jnp.arange(len(chosen), dtype=chosen.dtype)
    chosen = jnp.where(chosen < 0, here, chosen)
    places, signs = list(element.places), list(element.signs)
    places[k], signs[k] = places[k][chosen], signs[k][chosen]
    if signed:
        turned = flipped[here, chosen] < -likeness[here, chosen]
        signs[k] = signs[k] * jnp.where(turned, -1, 1).astype(x.dtype)
    return Element(tuple(places), tuple(signs))
