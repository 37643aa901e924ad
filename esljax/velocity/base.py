r"""The velocity of an ensemble at one time, from its members: v in ∂_t q + ∇·(q v) = 0, and the rate σ = E‖v‖² of entropy production.

Members that move by dθ = b dt + sqrt(2 D) dW have v = b - D ∇log q, so only the score ∇log q of their law is missing. For any field w,

    σ ≥ 2 E[w·b] + 2 E[tr(D ∇w)] - E‖w‖² = σ - E‖w - v‖²,

(Hyvärinen, JMLR 6, 695 (2005)), so a field fitted on one half of the members and evaluated on the other half gives a lower bound in
expectation, whose deficit is of second order in the error of the field. With w restricted to gradients the same expression bounds
E‖∇ψ‖², the part of the velocity that moves mass; the rest of σ is housekeeping.

Time is any clock: with b = -η∇Φ and D = ηT it is training time, with b = -∇Φ and D = T learning time. Source of Σ: Okanohara, arXiv
2601.17607.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from esljax._checks import check_ensemble, known, refuse
from esljax._numerics import average, shrunk_covariance
from esljax._types import Array, ArrayLike, Float, Scalar, ScalarLike


class Snapshot(eqx.Module):
    """An ensemble at one time, as a velocity estimator sees it."""

    positions: Float[Array, "n d"]
    # What an estimator does not need may be absent.
    drift: Any = None
    """b at every member, shape (n, d), per unit of the clock."""
    diffusion: Any = None
    """D: a scalar, (d,) for a diagonal, or a symmetric (d, d)."""
    before: Any = None
    """The members one snapshot earlier, shape (n, d), or now if there is none."""
    after: Any = None
    """The members one snapshot later, shape (n, d), or now if there is none."""
    elapsed: Any = None
    """The time between `before` and `after`, shape ()."""


class Velocity(eqx.Module):
    """Velocities of the members and the rate of entropy production, with what it is worth."""

    values: Float[Array, "n d"]
    """v at every member, in units of θ per unit of the clock."""
    contributions: Float[Array, " n"]
    """One number for each member, whose mean is σ."""
    gradient_contributions: Float[Array, " n"] | None
    """The same for E‖∇ψ‖², the part of the velocity that moves mass; None where the estimator does not resolve it."""
    divergence: Float[Array, " n"] | None
    """∇·v at every member, where the estimator knows it."""
    bound: str = eqx.field(static=True)
    """"lower" if σ is a lower bound in expectation, "upper" if Σ made from it is not below W2² of the same members, "none" if neither."""
    note: str = eqx.field(static=True, default="")
    """What was done to the data, in words."""

    @property
    def squared(self) -> Scalar:
        """σ = E‖v‖², shape (), in units of θ² per squared unit of the clock."""
        return jnp.mean(self.contributions)

    @property
    def standard_error(self) -> Scalar:
        """The standard error of `squared` over members, for the field as it was fitted."""
        return jnp.std(self.contributions, ddof=1) / jnp.sqrt(self.contributions.shape[0])

    def __str__(self) -> str:
        if not known(self.contributions) or self.contributions.ndim != 1:
            return repr(self)
        bound = ", a lower bound in expectation" if self.bound == "lower" else ""
        note = f" ({self.note})" if self.note else ""
        return f"σ = {float(self.squared):.6g} ± {float(self.standard_error):.2g}{bound}{note}"


class AbstractField(eqx.Module):
    """A vector field w(θ), fitted once and then evaluated anywhere."""

    @abc.abstractmethod
    def evaluate(
        self, positions: Float[Array, "m d"], diffusion: Float[Array, "..."]
    ) -> tuple[Array, Array, Array]:
        """w (m, d), tr(D ∇w) (m,) and ∇·w (m,) at these positions."""


class AbstractVelocity(eqx.Module):
    """A way to estimate the velocity of an ensemble from snapshots. Calls look like `AffineVelocity()(positions, drift, diffusion)`."""

    @property
    @abc.abstractmethod
    def moments_only(self) -> bool:
        """Whether only the mean and covariance of the law are seen, so that Σ bounds no more than the Bures distance."""

    @property
    @abc.abstractmethod
    def needs_drift(self) -> bool:
        """Whether the drift and the diffusion of the members must be known, rather than their neighbors in time."""

    @property
    @abc.abstractmethod
    def between(self) -> bool:
        """Whether a velocity belongs to the link between two snapshots, `before` and `after`, rather than to one snapshot."""

    @abc.abstractmethod
    def init(self, positions: Float[Array, "n d"]) -> Any:
        """The state before the first snapshot: what a warm start needs, or None."""

    @abc.abstractmethod
    def estimate(self, snapshot: Snapshot, state: Any) -> tuple[Velocity, Any]:
        """The velocity at one snapshot and the state for the next. Not checked: for use inside `jit`, `vmap` and `scan`."""

    @abc.abstractmethod
    def flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """The velocities to move members by, from one field fitted to all of them. Cross-fitting would move each half by the other's field,
        and what sets the two halves apart then grows; as an estimate of σ these velocities would be optimistic."""

    def __call__(
        self,
        positions: Float[ArrayLike, "n d"],
        drift: Float[ArrayLike, "n d"],
        diffusion: ScalarLike | Float[ArrayLike, "..."],
    ) -> Velocity:
        """The velocity of the members of one snapshot that move by `drift` and diffuse.

        **Args:** `positions`: shape (n, d), n ≥ 4. `drift`: b = -η∇Φ at each of them, shape (n, d). `diffusion`: D = ηT, a scalar, (d,) or
        a symmetric matrix (d, d).
        **Returns:** `Velocity`. **Raises:** `InputError` for wrong shapes or members that are not finite.
        **Differentiation:** as the class documents.

        **Example:**

            >>> import jax
            >>> x = jax.random.normal(jax.random.key(0), (2000, 2))
            >>> velocity = AffineVelocity()(x, -x, 1.0)  # at equilibrium nothing moves
            >>> bool(abs(velocity.squared) < 1e-2)
            True
        """
        if not self.needs_drift:
            name = type(self).__name__
            raise refuse(
                "velocity",
                "be an estimator that works on one snapshot",
                f"is {name}, which needs a run: speed_limit(..., velocity=...)",
            )
        positions, drift, diffusion = (
            jnp.asarray(positions),
            jnp.asarray(drift),
            jnp.asarray(diffusion),
        )
        check_ensemble("positions", positions, minimum_members=4)
        check_ensemble("drift", drift)
        if drift.shape != positions.shape:
            raise refuse(
                "drift",
                f"have shape {positions.shape}, as `positions` has",
                f"has shape {drift.shape}",
            )
        d = positions.shape[1]
        if diffusion.shape not in ((), (d,), (d, d)):
            raise refuse(
                "diffusion", f"be a scalar, ({d},) or ({d}, {d})", f"has shape {diffusion.shape}"
            )
        snapshot = Snapshot(positions, drift, diffusion.astype(positions.dtype))
        return _compiled_estimate(self, snapshot)


@eqx.filter_jit
def _compiled_estimate(velocity: AbstractVelocity, snapshot: Snapshot) -> Velocity:
    return velocity.estimate(snapshot, velocity.init(snapshot.positions))[0]


def variational(field: AbstractField, snapshot: Snapshot) -> tuple[Array, Array, Array]:
    """w (m, d), ∇·w (m,) and the contributions 2 w·b + 2 tr(D ∇w) - ‖w‖² (m,) of the members of `snapshot`."""
    values, spread, divergence = field.evaluate(snapshot.positions, snapshot.diffusion)
    return (
        values,
        divergence,
        2 * jnp.sum(values * snapshot.drift, axis=1) + 2 * spread - jnp.sum(values**2, axis=1),
    )


def halves(snapshot: Snapshot) -> tuple[Snapshot, Snapshot]:
    """Every second member, and the others."""
    return rows(snapshot, slice(0, None, 2)), rows(snapshot, slice(1, None, 2))


def rows(snapshot: Snapshot, which: Any) -> Snapshot:
    """Some of the members: a slice or a NumPy mask."""
    return Snapshot(snapshot.positions[which], snapshot.drift[which], snapshot.diffusion)


def interleave(even: Array, odd: Array) -> Array:
    """What was computed on the two `halves`, back in the members' order."""
    joined = jnp.zeros((even.shape[0] + odd.shape[0], *even.shape[1:]), even.dtype)
    return joined.at[0::2].set(even).at[1::2].set(odd)


class AbstractVariationalVelocity(AbstractVelocity):
    """Fields fitted on one half of the members and evaluated on the other, both ways: a lower bound of σ in expectation."""

    needs_drift: ClassVar[bool] = True
    between: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def note(self) -> str:
        """What a fit does to the data, in words."""

    @abc.abstractmethod
    def fit(self, snapshot: Snapshot, gradient: bool, state: Any) -> tuple[AbstractField, Any]:
        """The best field of the class, or its best gradient field, for these members; and the state for the next fit."""

    def estimate(self, snapshot: Snapshot, state: Any) -> tuple[Velocity, Any]:
        """Both classes of fields, cross-fitted."""
        # Four fits (any field or a gradient, first or second half), each with its own warm start.
        given = [None] * 4 if state is None else state
        # On a line every field is a gradient.
        classes = (False,) if snapshot.positions.shape[1] == 1 else (False, True)
        first, second = halves(snapshot)
        answers, states = [], []
        for gradient in classes:
            for learned, judged in ((second, first), (first, second)):
                field, after = self.fit(learned, gradient, given[len(states)])
                answers.append(variational(field, judged))
                states.append(after)
        values, divergence, contributions = (
            interleave(*pair) for pair in zip(answers[0], answers[1], strict=True)
        )
        of_gradient = interleave(answers[-2][2], answers[-1][2])
        states += given[len(states) :]
        return Velocity(
            values, contributions, of_gradient, divergence, bound="lower", note=self.note
        ), None if state is None else states

    def flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """The best gradient field of the class, at the members that it was fitted to."""
        state = self.init(snapshot.positions)
        field, _ = self.fit(snapshot, True, None if state is None else state[2])
        return field.evaluate(snapshot.positions, snapshot.diffusion)[0]


def diffusion_matrix(diffusion: Float[Array, "..."], d: int) -> Float[Array, "d d"]:
    """D as a matrix, from a scalar, a diagonal or a matrix."""
    return diffusion if jnp.ndim(diffusion) == 2 else diffusion * jnp.eye(d, dtype=diffusion.dtype)


def whitening(positions: Float[Array, "n d"]) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """The mean m and a W with unit covariance of W(θ - m), up to the shrinkage and to directions without width, which stay narrow."""
    d = positions.shape[1]
    covariance = shrunk_covariance(positions)
    size = jnp.trace(covariance) / d
    wide = size > 0
    size = jnp.where(wide, size, 1)
    identity = jnp.eye(d, dtype=positions.dtype)
    # Members that all agree have no covariance to factorize, nor a derivative of its factor.
    relative = (
        jnp.where(wide, covariance / size, identity)
        + 4 * d * jnp.finfo(positions.dtype).eps * identity
    )
    return average(positions), solve_triangular(
        jnp.linalg.cholesky(relative), identity, lower=True
    ) / jnp.sqrt(size)
