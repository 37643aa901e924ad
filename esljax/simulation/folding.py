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

from typing import NamedTuple

import numpy as np

from esljax._types import Float, Int

# Columns that are multiplied at a time: 4n rows of them stay in the cache of a core.
_COLUMNS = 2048
# Directions whose share of a vector's square is less are rounding of the products.
_ROUNDING = 1e-13


class Products(NamedTuple):
    """Inner products of the members of a run, in float64; those of two parts of the coordinates
    are added."""

    start: Float[np.ndarray, "n n"]
    """X Xᵀ, of the members of the start about their mean."""
    links: Float[np.ndarray, "J n 4n"]
    """Of Δ_j with X, D_j, Δ_{j-1} and Δ_j, in that order; Δ_{-1} = 0."""

    def plus(self, other: "Products") -> "Products":
        """Return the products over the coordinates of both."""
        return Products(self.start + other.start, self.links + other.links)

    def among(self, kept: Int[np.ndarray, " k"]) -> "Products":
        """Return the products of some of the members, about the same place."""
        members = len(self.start)
        columns = (np.arange(4)[:, None] * members + kept).ravel()
        return Products(self.start[np.ix_(kept, kept)], self.links[:, kept][:, :, columns])


def no_products(snapshots: int, members: int) -> Products:
    """Return the products over no coordinates."""
    links = np.zeros((snapshots - 1, members, 4 * members))
    return Products(np.zeros((members, members)), links)


def products_of(block: Float[np.ndarray, "snapshots n count"]) -> Products:
    """Return the products over the coordinates of a block, of any floating type.

    The bits of the sum depend on the block alone.
    """
    snapshots, members, count = block.shape
    found = no_products(snapshots, members)
    width = min(_COLUMNS, count)
    held = np.empty((4, members, width))
    part = np.empty((members, 4 * members))
    for first in range(0, count, width):
        columns = block[:, :, first : first + width]
        if columns.shape[2] < width:
            held = np.empty((4, members, columns.shape[2]))
        start, apart = held[0], held[1]
        np.copyto(start, columns[0])
        start -= start.mean(axis=0)
        found.start[...] += start @ start.T
        held[1:] = 0.0
        for j in range(snapshots - 1):
            # The two last increments take turns in two places.
            step = held[2 + (j + 1) % 2]
            np.subtract(columns[j + 1], columns[j], out=step, dtype=np.float64)
            np.matmul(step, held.reshape(4 * members, -1).T, out=part)
            found.links[j] += part
            apart += step
    turned = found.links[1::2]
    last, own = (slice(k * members, (k + 1) * members) for k in (2, 3))
    # At every second link they stand in each other's place.
    turned[:, :, last], turned[:, :, own] = turned[:, :, own].copy(), turned[:, :, last].copy()
    return found


def folded(products: Products) -> Float[np.ndarray, "snapshots n 4n"]:
    """Return members of 4n coordinates with these inner products, about the mean of the start."""
    start, links = products
    count, members, _ = links.shape
    x, d, last, own = (slice(k * members, (k + 1) * members) for k in range(4))
    placed = slice(0, 3 * members)
    gram = np.zeros((4 * members, 4 * members))
    gram[x, x] = start
    places = np.zeros((count + 1, members, 4 * members))
    places[0] = _factored(gram)[0][x]
    step = np.zeros_like(places[0])
    for j, link in enumerate(links):
        gram[own], gram[:, own] = link, link.T
        gram[own, own] = (link[:, own] + link[:, own].T) / 2
        local, sizes = _factored(gram)
        here = np.concatenate([places[0], places[j] - places[0], step]) / sizes[placed]
        left, _, right = np.linalg.svd((local[placed] / sizes[placed]).T @ here)
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
