r"""The squared 2-Wasserstein distance between two ensembles of equally weighted members.

    W2²(x, y) = min_P Σ_ij P_ij |x_i - y_j|²          P ≥ 0 with row sums 1/n and column sums 1/m

`ExactTransport` solves this problem. `GaussianTransport` and `SlicedTransport` are lower bounds of
it that are metrics themselves; `SinkhornTransport` is a smooth approximation and no metric.
`MappedTransport` and `ProjectedTransport` measure any of them in other coordinates. With a metric,
dist = sqrt(squared), the chain identities of the speed limit hold on samples exactly:

    Σ_j dist²(q_j, q_{j+1})/(s_{j+1} - s_j) ≥ (Σ_j dist(q_j, q_{j+1}))² ≥ dist²(q_0, q_J)

Two ensembles of one run are close together, and small increments must survive rounding. Every
metric here is therefore a sum of squared differences of matched things, whose error is relative to
the increment, and never a difference of large moments.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import as_cloud, check_fits, check_kind, door, refuse
from esljax._numerics import product
from esljax._types import Array, ArrayLike, Float, Int, Scalar


class Solution(eqx.Module):
    """The answer of a transport problem: the squared distance, and whether it can be trusted."""

    squared: Scalar
    """The squared distance, shape (), in units of θ²; NaN where it is not finite."""
    converged: Array
    """Whether the problem was solved, a boolean of shape (); False where `squared` is NaN."""


class AbstractTransport(eqx.Module):
    """A squared distance between the laws of two ensembles, whatever the order of their members.

    **Recipe of a subclass:** define `is_metric` and `solve`. The class then works in `squared`,
    `speed_limit`, `free_energy` and inside every wrapper. Each other property has a default that
    claims nothing about the class. Define

    - `numbers_held`, to use the class in `plan_memory`, which rejects it otherwise;
    - `pairs_members`, if the distance is a mean over pairs of members, for the noise floor and the
      identity fraction of a report;
    - `moments_only`, if it compares means and covariances only, to stand beside `AffineVelocity`;
    - `of_distances`, if it looks at distances between members alone, for folded members;
    - `of_parameters` and `knows_places`, if it looks at the arrays that members are made of;
    - `projection` or `coordinates`, if it does not compare the positions themselves;
    - `in_units`, if no distance changes where both ensembles are moved together, for reports of
      members of any size and place;
    - `paired`, if the distance pairs members one to one, for the parameters that hold it;
    - `solve_subsets` and `solve_parts`, if the problem of all members helps with those of some, for
      errors;
    - `solve_costs`, if it looks at squared distances of members alone, for `QuotientTransport`;
    - `coarser`, if it has an ε, so that a diagnosis can test whether ε is small enough;
    - `rounding`, if the distance is a difference of larger numbers;
    - `in_turn`, if several problems run slower together than one after the other on a CPU;
    - `map(x, y)`, the image in y of each member of x, shape (n, d), for `TransportVelocity`.

    A class that holds another transport derives from `AbstractWrappedTransport`, which forwards
    all of these.

    **Example:** the distance between the means of two ensembles, a lower bound of W2.

        >>> from typing import ClassVar
        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> class MeanTransport(esl.AbstractTransport):
        ...     is_metric: ClassVar[bool] = True
        ...
        ...     def solve(self, x, y):
        ...         squared = jnp.sum((jnp.mean(x, axis=0) - jnp.mean(y, axis=0)) ** 2)
        ...         return esl.Solution(squared, jnp.isfinite(squared))
        >>> path = esl.from_snapshots(jnp.array([[[0.0], [2.0]], [[3.0], [5.0]]]))
        >>> float(esl.speed_limit(path, transport=MeanTransport()).w2_squared)
        9.0
    """

    @property
    @abc.abstractmethod
    def is_metric(self) -> bool:
        """Whether sqrt(squared) obeys the triangle inequality on samples, by construction."""

    @abc.abstractmethod
    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        """Return the squared distance and whether it converged.

        Neither checked nor compiled: for use inside `jit` and `vmap`. Under `solution_of` the
        answer is checked.
        """

    @property
    def name(self) -> str:
        """The name of the class in reports and messages; a wrapper adds that of its transport."""
        return type(self).__name__

    @property
    def in_turn(self) -> bool:
        """Whether a CPU is faster if it solves problems one after the other than all together.

        Accelerators always solve them together.
        """
        return False

    @property
    def pairs_members(self) -> bool:
        """Whether `squared` is the least mean squared distance between members paired one to one.

        `squared` then never exceeds the mean of |x_i - y_i|² over the compared coordinates, and
        equals it where each member is its own best partner.
        """
        return False

    @property
    def moments_only(self) -> bool:
        """Whether `squared` is the Bures distance of the means and covariances of the two laws."""
        return False

    @property
    def of_distances(self) -> bool:
        """Whether `squared` depends on the distances between members alone, within and between the
        two ensembles."""
        return False

    @property
    def knows_places(self) -> bool:
        """Whether each number of a member means something by its place, so that features or a
        projection of members must not stand for them."""
        return False

    @property
    def projection(self) -> Float[Array, "d p"] | None:
        """The matrix M, shape (d, p), if it compares the coordinates θ M; None for θ itself."""
        return None

    def coordinates(self, positions: Float[Array, "*many n d"]) -> Float[Array, "*many n p"]:
        """Return the coordinates of the members that are compared, shape (..., n, p).

        By default the positions themselves, or their projection. A class that overrides this
        counts as nonlinear unless it overrides `linear` and `projection` as well.
        """
        matrix = self.projection
        return positions if matrix is None else product(positions, matrix.astype(positions.dtype))

    @property
    def linear(self) -> bool:
        """Whether `coordinates` is the linear map that `projection` holds.

        Drifts and noise can then be projected as positions are.
        """
        return type(self).coordinates is AbstractTransport.coordinates

    def in_units(self, size: Scalar) -> "AbstractTransport | None":
        """Return the T' with size² T'((x - a)/size, (y - a)/size) = T(x, y) for every vector a.

        Reports then measure members about a place and in a unit of their own, in which the squares
        of very large and very small numbers are numbers. None if there is no such transport, or if
        it is not known: a report then measures the members as they are.
        """
        return None

    def rounding(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Scalar | None:
        """Return the size of the error that rounding leaves in `squared`, shape (), in its units.

        None for a sum of squared differences of matched things, whose error is relative.
        """
        return None

    def paired(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"]
    ) -> tuple[Solution, Int[Array, " n"] | None]:
        """Return `solve(x, y)`, and the place in y of the partner of each member of x, shape (n,).

        None instead of places for a transport that pairs no members.
        """
        return self.solve(x, y), None

    def solve_subsets(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"], subsets: Int[Array, "subsets kept"]
    ) -> Solution:
        """Return `solve(x[kept], y[kept])` for each subset of the members, stacked.

        By default one after the other. Override it where the problem of all members helps with
        those of some.
        """
        return jax.lax.map(lambda kept: self.solve(x[kept], y[kept]), subsets)

    def solve_parts(
        self,
        x: Float[Array, "n d"],
        y: Float[Array, "m d"],
        rows: Int[Array, "parts k"],
        columns: Int[Array, "parts l"],
    ) -> Solution:
        """Return `solve(x[i], y[j])` for each pair (i, j) of `rows` and `columns`, stacked.

        By default one after the other. Override it where distances of members are costly, so that
        all parts share them.
        """
        return jax.lax.map(lambda part: self.solve(x[part[0]], y[part[1]]), (rows, columns))

    def solve_costs(
        self,
        across: Float[Array, "n m"],
        within: Callable[[], tuple[Float[Array, "n n"], Float[Array, "m m"]]],
    ) -> tuple[Solution, Int[Array, " n"] | None]:
        """Return the answer for members of which only the squared distances are known.

        **Args:** `across`: between members of x and y, shape (n, m). `within`: returns those
        between members of x, and of y.
        **Returns:** the solution, and the place in y of the partner of each member of x as `paired`
        has it.
        **Differentiation:** in the distances.
        """
        must = "look at distances of members alone, as ExactTransport() does"
        raise refuse("transport", must, f"is {self.name}")

    def partners(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"], places: Int[Array, " n"]
    ) -> Float[Array, "n d"]:
        """Return what each member of x is compared with, shape (n, d): the members of y at the
        places of `paired`, unless the class turns them first."""
        return y[places]

    def of_parameters(
        self, keys: tuple[tuple[str, tuple[int, ...]], ...] | None
    ) -> "AbstractTransport":
        """Return the transport between members made of these arrays: this one, unless it must know.

        **Args:** `keys`: `Trajectory.keys`, the names and shapes of the arrays, or None.
        """
        return self

    def coarser(self) -> "AbstractTransport | None":
        """Return the same transport at twice its ε; None if it has no ε."""
        return None

    def numbers_held(self, n: int, d: int, differentiated: bool) -> float | int | None:
        """Return how many numbers one problem between two ensembles (n, d) holds at once.

        For `plan_memory`, which rejects a class that returns None: its memory is not known. The
        factors of the classes of this package were read off the compiler's own account of compiled
        programs (`tests/test_memory.py` compares the two).

        **Args:** `differentiated`: whether a gradient is taken through the problem.
        **Returns:** a count of numbers of the type of the positions, which may be a fraction.
        """
        return None

    def numbers_waiting(self, n: int, d: int, differentiated: bool) -> float | int:
        """Return how many numbers each problem holds while others are solved before or after it.

        A problem that waits holds its two ends, and later what their derivatives take. All else is
        recomputed, unless the class marks it by `esljax.sharding.keep`.
        """
        return (5.5 if differentiated else 2) * n * d

    @door
    def squared(self, x: Float[ArrayLike, "n d"], y: Float[ArrayLike, "m d"]) -> Scalar:
        """Return the squared distance between two ensembles, compiled once per shape.

        **Args:** `x`: shape (n, d), one row per member. `y`: shape (m, d).
        **Returns:** shape (), in units of θ². Under `jit`, which hides the values, a NaN member
        gives NaN. Whether iterations converged is in `solve(x, y).converged` alone. (`jax.jit`
        hashes its function, so a bare method of an object that holds arrays goes to
        `eqx.filter_jit`.)
        **Raises:** `InputError` for a wrong shape or type, and for a member that is not finite
        where the values are known.
        **Differentiation:** forward and reverse in `x`, `y` and every floating leaf, once; each
        class documents its second derivatives.
        """
        x, y = as_cloud("x", x), as_cloud("y", y)
        if x.shape[1] != y.shape[1]:
            must = f"have {x.shape[1]} coordinates per member, as `x` has"
            raise refuse("y", must, f"has {y.shape[1]}")
        return _compiled_solve(self, *of_one_type(x, y)).squared


@eqx.filter_jit
def _compiled_solve(transport: AbstractTransport, x: Any, y: Any) -> Solution:
    return solution_of(transport, x, y)


def solution_of(
    transport: AbstractTransport, x: Float[Array, "n d"], y: Float[Array, "m d"]
) -> Solution:
    """Return `transport.solve(x, y)`, and check its type and shapes at no cost.

    **Raises:** `InputError` if `solve` returns no `Solution` of one number and one boolean, and for
    a problem that does not fit in memory.
    """
    check_room(transport, max(len(x), len(y)), x.shape[1], x.dtype)
    return _checked(transport, transport.solve(x, y))


def _checked(transport: AbstractTransport, answer: Any) -> Solution:
    if not isinstance(answer, Solution):
        raise refuse(
            "transport",
            "return `Solution(squared, converged)` from `solve`",
            f"{transport.name} returns a {type(answer).__name__}",
        )
    squared, converged = jnp.asarray(answer.squared), jnp.asarray(answer.converged)
    right = (
        squared.shape == converged.shape == ()
        and jnp.issubdtype(squared.dtype, jnp.floating)
        and converged.dtype == bool
    )
    if not right:
        raise refuse(
            "transport",
            "return one number and one boolean, each of shape (), in the `Solution` of `solve`",
            f"{transport.name} returns {squared.dtype}{squared.shape} "
            f"and {converged.dtype}{converged.shape}",
        )
    return Solution(squared, converged)


def pairing_of(
    transport: AbstractTransport, x: Float[Array, "n d"], y: Float[Array, "m d"]
) -> tuple[Solution, Int[Array, " n"] | None]:
    """Return the checked solution, and the partners that it found; None if it pairs no members."""
    if not _belongs(transport, "paired"):
        return solution_of(transport, x, y), None
    solved, places = transport.paired(x, y)
    return _checked(transport, solved), places


def subset_solutions_of(
    transport: AbstractTransport, x: Float[Array, "n d"], y: Float[Array, "m d"], subsets: Array
) -> Solution:
    """Return the checked solution for each of the subsets (subsets, m) of the members, stacked."""
    if not _belongs(transport, "solve_subsets"):
        return jax.lax.map(lambda kept: solution_of(transport, x[kept], y[kept]), subsets)
    check_room(transport, len(x), x.shape[1], x.dtype)
    return transport.solve_subsets(x, y, subsets)


def part_solutions_of(
    transport: AbstractTransport, x: Array, y: Array, rows: Array, columns: Array
) -> Solution | None:
    """Return the checked solutions of these parts, stacked, if the transport shares work between
    them; None if it does not."""
    shares = type(transport).solve_parts is not AbstractTransport.solve_parts
    if not shares or not _belongs(transport, "solve_parts"):
        return None
    check_room(transport, max(len(x), len(y)), x.shape[1], x.dtype)
    return transport.solve_parts(x, y, rows, columns)


def _belongs(transport: AbstractTransport, method: str) -> bool:
    """Whether a method is of the problem that `solve` is: a subclass that solves another one has
    other partners than its base."""
    first = next(each for each in type(transport).__mro__ if {"solve", method} & set(vars(each)))
    return method in vars(first)


def check_is_transport(argument: str, value: Any) -> None:
    """Reject a value that is no transport.

    **Raises:** `InputError`.
    """
    check_kind(argument, value, AbstractTransport, "be a transport such as ExactTransport()")


def check_transport(argument: str, value: Any, n: int, d: int, dtype: Any) -> None:
    """Check that `value` is a transport whose coordinates fit an ensemble (n, d). Computes nothing.

    **Raises:** `InputError` if it is no transport, and if its `coordinates` or its `projection`
    have wrong shapes.
    """
    check_is_transport(argument, value)
    compared: Any = eqx.filter_eval_shape(value.coordinates, jax.ShapeDtypeStruct((1, n, d), dtype))
    shape = getattr(compared, "shape", None)
    if shape is None or len(shape) != 3 or shape[:2] != (1, n) or shape[2] == 0:
        raise refuse(
            argument,
            f"return shape (1, {n}, p) from `coordinates` for positions of shape (1, {n}, {d})",
            f"{value.name} returns {'no array' if shape is None else f'shape {shape}'}",
        )
    if not value.linear or (value.projection is None and shape[2] == d):
        return
    matrix = getattr(value.projection, "shape", None)
    if matrix != (d, shape[2]):
        raise refuse(
            argument,
            f"have a `projection` of shape ({d}, {shape[2]}), the matrix of its `coordinates` "
            "(or set `linear` to False)",
            f"that of {value.name} {'is None' if matrix is None else f'has shape {matrix}'}",
        )


def check_room(transport: AbstractTransport, n: int, d: int, dtype: Any) -> None:
    """Reject a problem between ensembles (n, d) that this machine cannot hold. Computes nothing.

    **Raises:** `InputError`, with the bytes that a problem takes.
    """
    held = transport.numbers_held(n, d, False)
    if isinstance(held, int | float):
        check_fits(
            "transport",
            held * jnp.dtype(dtype).itemsize,
            f"{n:,} members of {d:,} numbers in {transport.name}",
            "take fewer members, SinkhornTransport(epsilon, chunk=...), which holds no n × n "
            "matrix, or GaussianTransport(), which looks at moments",
        )


def solution(squared: Scalar, solved: Array | bool = True) -> Solution:
    """Return a `Solution` that is NaN and has no derivative where the problem has no finite answer.

    Multiply by NaN instead of choosing it: a choice would leave a finite derivative.
    """
    finite = jnp.isfinite(squared) & solved
    return Solution(
        squared * jnp.where(finite, jnp.ones_like(squared), jnp.full_like(squared, jnp.nan)), finite
    )


def of_one_type(
    x: Float[Array, "n d"], y: Float[Array, "m d"]
) -> tuple[Float[Array, "n d"], Float[Array, "m d"]]:
    """Return both clouds in the wider of their types, which is at least single precision."""
    kind = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    return jnp.asarray(x, kind), jnp.asarray(y, kind)


def recentred(x: Array, y: Array) -> tuple[Array, Array]:
    """Return both clouds about one point.

    No distance changes, and products of coordinates no longer cancel far from the origin.
    """
    center = jax.lax.stop_gradient(jnp.mean(x, axis=0))
    return x - center, y - center
