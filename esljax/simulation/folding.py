r"""A run in few coordinates, from inner products of its members alone.

No distance between members changes where all of them are turned together. So n members in a space
of any dimension are drawn in one of few, and what is computed of them there is what they would have
given themselves. The inner products needed are sums over coordinates, which can be taken in blocks:

    X = θ(0) - c,  c the mean of the start,     Δ_j = θ(j+1) - θ(j),     D_j = θ(j) - θ(0)
    X Xᵀ,  and for each link  Δ_j [X, D_j, Δ_{j-1}, Δ_j]ᵀ                       (n, n) each

Increments instead of places: the square of a small displacement is then a sum of squares, and no
difference of large numbers. These products know all distances within the snapshots 0, j-1, j, j+1
for each j, and no others. That is what a chain of links, its ends, its coarse links and the checks
of labels and snapshots compare.

The snapshots are placed in turn. The Gram matrix of (X, D_j, Δ_{j-1}, Δ_j), scaled to a diagonal of
ones and factored by its eigenvectors, gives places in 4n coordinates of their own; the rotation
that carries the first three to where they lie already (orthogonal Procrustes) carries Δ_j along.
A rotation keeps the lengths of all increments whatever it does to their directions.
**Reference:** Young and Householder, Psychometrika 3, 19 (1938); Schönemann, Psychometrika 31, 1
(1966).
"""

from typing import NamedTuple, TypeAlias

import numpy as np

from esljax._types import Float, Int

# Columns that are multiplied at a time: 4n rows of them stay in the cache of a core.
_COLUMNS = 2048
# Directions whose share of a vector's square is less are rounding of the products.
_ROUNDING = 1e-13


class Near(NamedTuple):
    """Inner products of the members of a run within its windows, in float64."""

    start: Float[np.ndarray, "n n"]
    """X Xᵀ, of the members of the start about their mean."""
    links: Float[np.ndarray, "J n 4*n"]
    """Of Δ_j with X, D_j, Δ_{j-1} and Δ_j, in that order; Δ_{-1} = 0."""

    @classmethod
    def nothing(cls, snapshots: int, members: int) -> "Near":
        """Return the products over no coordinates."""
        links = np.zeros((snapshots - 1, members, 4 * members))
        return cls(np.zeros((members, members)), links)

    @classmethod
    def of(cls, block: Float[np.ndarray, "snapshots n count"]) -> "Near":
        """Return the products over the coordinates of a block, of any floating type.

        The bits of the sum depend on the block alone.
        """
        snapshots, members, width = block.shape
        found = cls.nothing(snapshots, members)
        part = np.empty((members, 4 * members))
        wide = np.empty((6, members, 0))
        for first in range(0, width, _COLUMNS):
            columns = block[:, :, first : first + _COLUMNS]
            count = columns.shape[2]
            if wide.shape[2] != count:
                wide = np.empty((6, members, count))
            held, ends = wide[:4], wide[4:]
            rows, start, apart = held.reshape(4 * members, -1).T, held[0], held[1]
            # Wide before the difference: a difference that widens is slower.
            np.copyto(ends[0], columns[0])
            np.subtract(ends[0], ends[0].mean(axis=0), out=start)
            found.start[...] += start @ start.T
            held[1:] = 0
            for j in range(snapshots - 1):
                before, after = ends[j % 2], ends[(j + 1) % 2]
                np.copyto(after, columns[j + 1])
                # The two last increments take turns in two places.
                step = held[2 + (j + 1) % 2]
                np.subtract(after, before, out=step)
                np.matmul(step, rows, out=part)
                found.links[j] += part
                apart += step
        # At every second link they stand in each other's place.
        last, own = (slice(k * members, (k + 1) * members) for k in (2, 3))
        turned = found.links[1::2]
        turned[:, :, last], turned[:, :, own] = turned[:, :, own].copy(), turned[:, :, last].copy()
        return found

    @property
    def coordinates(self) -> int:
        """How many coordinates the members are placed in."""
        return self.links.shape[2]

    def plus(self, other: "Near") -> "Near":
        """Return the products over the coordinates of both."""
        return Near(self.start + other.start, self.links + other.links)

    def among(self, kept: Int[np.ndarray, " k"]) -> "Near":
        """Return the products of some of the members, about the same place."""
        members = len(self.start)
        columns = (np.arange(4)[:, None] * members + kept).ravel()
        return Near(self.start[np.ix_(kept, kept)], self.links[:, kept][:, :, columns])

    def without(self, rows: Float[np.ndarray, "snapshots n p"]) -> "Near":
        """Return the products of what is left of X and the increments beside these of them, which
        are along orthonormal directions."""
        start, steps = rows[0], rows[1:]
        apart = np.cumsum(steps, axis=0) - steps
        last = np.concatenate([np.zeros_like(rows[:1]), steps[:-1]])
        sides = np.concatenate([np.broadcast_to(start, steps.shape), apart, last, steps], axis=1)
        return Near(self.start - start @ start.T, self.links - steps @ sides.swapaxes(1, 2))

    def squares(self) -> Float[np.ndarray, "snapshots n"]:
        """Return the squares of X and of the increments."""
        own = self.links[:, :, 3 * len(self.start) :]
        own = np.diagonal(own, axis1=1, axis2=2)
        return np.concatenate([np.diagonal(self.start)[None], own])

    def placed(self) -> Float[np.ndarray, "snapshots n 4*n"]:
        """Return members with these inner products, about the mean of the start."""
        start, links = self
        count, members, _ = links.shape
        x, d, last, own = (slice(k * members, (k + 1) * members) for k in range(4))
        known = slice(0, 3 * members)
        gram = np.zeros((4 * members, 4 * members))
        gram[x, x] = start
        places = np.zeros((count + 1, members, 4 * members))
        places[0] = _factored(gram)[0][x]
        step = np.zeros_like(places[0])
        for j, link in enumerate(links):
            gram[own], gram[:, own] = link, link.T
            gram[own, own] = (link[:, own] + link[:, own].T) / 2
            local, sizes = _factored(gram)
            here = np.concatenate([places[0], places[j] - places[0], step]) / sizes[known]
            left, _, right = np.linalg.svd((local[known] / sizes[known]).T @ here)
            step = local[own] @ (left @ right)
            places[j + 1] = places[j] + step
            # D and Δ of the next link: D_{j+1} = D_j + Δ_j, and Δ_j is the last one there.
            gram[d, d] += gram[d, own] + gram[own, d] + gram[own, own]
            gram[x, d] += gram[x, own]
            gram[d, x] = gram[x, d].T
            gram[d, last] = gram[d, own] + gram[own, own]
            gram[last, d] = gram[d, last].T
            gram[x, last], gram[last, x] = gram[x, own], gram[own, x]
            gram[last, last] = gram[own, own]
        return places


class All(NamedTuple):
    """Inner products of X and of all increments of a run with each other, in float64: of all
    members at all snapshots, (J+1) n of them."""

    gram: Float[np.ndarray, "snapshots n snapshots n"]
    """Of X and Δ_0, ..., Δ_{J-1}."""

    @classmethod
    def nothing(cls, snapshots: int, members: int) -> "All":
        """Return the products over no coordinates."""
        return cls(np.zeros((snapshots, members, snapshots, members)))

    @classmethod
    def of(cls, block: Float[np.ndarray, "snapshots n count"]) -> "All":
        """Return the products over the coordinates of a block, of any floating type.

        The bits of the sum depend on the block alone.
        """
        snapshots, members, width = block.shape
        gram = np.zeros((snapshots * members, snapshots * members))
        for first in range(0, width, _COLUMNS):
            wide = block[:, :, first : first + _COLUMNS].astype(np.float64)
            held = np.empty_like(wide)
            np.subtract(wide[0], wide[0].mean(axis=0), out=held[0])
            np.subtract(wide[1:], wide[:-1], out=held[1:])
            rows = held.reshape(len(gram), -1)
            gram += rows @ rows.T
        return cls(gram.reshape(snapshots, members, snapshots, members))

    @property
    def coordinates(self) -> int:
        """How many coordinates the members are placed in."""
        return self.gram.shape[0] * self.gram.shape[1]

    def plus(self, other: "All") -> "All":
        """Return the products over the coordinates of both."""
        return All(self.gram + other.gram)

    def among(self, kept: Int[np.ndarray, " k"]) -> "All":
        """Return the products of some of the members, about the same place."""
        return All(self.gram[:, kept][:, :, :, kept])

    def without(self, rows: Float[np.ndarray, "snapshots n p"]) -> "All":
        """Return the products of what is left of X and the increments beside these of them, which
        are along orthonormal directions."""
        flat = rows.reshape(self.coordinates, -1)
        return All(self.gram - (flat @ flat.T).reshape(self.gram.shape))

    def squares(self) -> Float[np.ndarray, "snapshots n"]:
        """Return the squares of X and of the increments."""
        snapshots, members = self.gram.shape[:2]
        return np.diagonal(self.gram.reshape(2 * (self.coordinates,))).reshape(snapshots, members)

    def placed(self) -> Float[np.ndarray, "snapshots n all"]:
        """Return members with these inner products, about the mean of the start."""
        snapshots, members = self.gram.shape[:2]
        rows, _ = _factored(self.gram.reshape(2 * (self.coordinates,)))
        return np.cumsum(rows.reshape(snapshots, members, -1), axis=0)


Products: TypeAlias = Near | All


def _factored(gram: Float[np.ndarray, "m m"]) -> tuple[np.ndarray, np.ndarray]:
    """Return rows with these inner products, shape (m, m), and their lengths, shape (m, 1); 1
    stands for a length of 0.

    Of rows of unit length, so that short ones are known as well as long ones.
    """
    lengths = np.sqrt(np.maximum(np.diagonal(gram), 0))[:, None]
    sizes = np.where(lengths > 0, lengths, 1.0)
    values, vectors = np.linalg.eigh(gram / sizes / sizes.T)
    values = np.where(values > _ROUNDING, values, 0.0)
    return lengths * vectors * np.sqrt(values), sizes
