r"""Members along random orthonormal directions, from blocks of their numbers.

The directions are the columns of Q in G = Q R, G normal and R upper triangular. Blocks add to
θ G and to GᵀG = RᵀR, and so no matrix of as many rows as a member has numbers is held. Parameters
that are folded apart have directions of their own, G_k = O_k R_k. Of their members two parts are
kept: the coordinates θ_k O_k, and a fold of what is left of them (`without`). Then

    θ Q = Σ_k θ_k O_k R_k R⁻¹,     R from the QR factors of all R_k, one below the other

is a matrix that acts on the coordinates which are kept, as any projection acts on members.
"""

from typing import NamedTuple

import numpy as np

from esljax._types import Float, Int

# Columns that are in double precision at a time.
_COLUMNS = 2048


class Along(NamedTuple):
    """X = θ(0) - c and the increments Δ_j along the columns of G, in float64."""

    rows: Float[np.ndarray, "snapshots n p"]
    """Of X and of the increments."""
    gram: Float[np.ndarray, "p p"]
    """GᵀG."""

    @classmethod
    def nothing(cls, snapshots: int, members: int, directions: int) -> "Along":
        """Return what is along directions of no coordinates."""
        gram = np.zeros((directions, directions))
        return cls(np.zeros((snapshots, members, directions)), gram)

    @classmethod
    def of(
        cls, block: Float[np.ndarray, "snapshots n count"], normal: Float[np.ndarray, "count p"]
    ) -> "Along":
        """Return what the coordinates of a block add; `normal` are their rows of G."""
        snapshots, members, width = block.shape
        found = cls.nothing(snapshots, members, normal.shape[1])
        for first in range(0, width, _COLUMNS):
            wide = block[:, :, first : first + _COLUMNS].astype(np.float64)
            rows = normal[first : first + _COLUMNS].astype(np.float64)
            wide[1:] -= wide[:-1].copy()
            wide[0] -= wide[0].mean(axis=0)
            found.rows[...] += wide @ rows
            found.gram[...] += rows.T @ rows
        return found

    def plus(self, other: "Along") -> "Along":
        """Return what is along the directions of both."""
        return Along(self.rows + other.rows, self.gram + other.gram)

    def among(self, kept: Int[np.ndarray, " k"]) -> "Along":
        """Return the rows of some of the members."""
        return self._replace(rows=self.rows[:, kept])

    def orthonormal(self) -> tuple[np.ndarray, np.ndarray]:
        """Return X and the increments along the orthonormal columns O of G = O R, and R."""
        lower = np.linalg.cholesky(self.gram)
        flat = self.rows.reshape(-1, len(lower))
        return np.linalg.solve(lower, flat.T).T.reshape(self.rows.shape), lower.T


def spread(block: Float[np.ndarray, "snapshots n count"]) -> float:
    """Return the sum of the squares of all members at all snapshots about their mean."""
    total = 0.0
    for first in range(0, block.shape[2], _COLUMNS):
        wide = block[:, :, first : first + _COLUMNS].astype(np.float64)
        wide -= wide.mean(axis=(0, 1))
        total += float(np.vdot(wide, wide))
    return total


def joined(parts: list[Float[np.ndarray, "_ p"]]) -> Float[np.ndarray, "all p"]:
    """Return the matrix that takes the coordinates of all parameters to those along Q: `parts` are
    R_k, with zeros for the coordinates of what is left, or G_k of members kept as they are."""
    directions, upper = np.linalg.qr(np.concatenate(parts))
    # The signs of `random_directions`.
    return directions * np.sign(np.diagonal(upper))
