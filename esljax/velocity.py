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
from typing import Any, ClassVar, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import check_ensemble, known, refuse
from esljax._matrix import average, lyapunov, product, shrunk_covariance
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
    def evaluate(self, positions: Float[Array, "m d"], diffusion: Float[Array, "..."]) -> tuple[Array, Array, Array]:
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
        self, positions: Float[ArrayLike, "n d"], drift: Float[ArrayLike, "n d"], diffusion: ScalarLike | Float[ArrayLike, "..."]
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
                "velocity", "be an estimator that works on one snapshot", f"is {name}, which needs a run: speed_limit(..., velocity=...)"
            )
        positions, drift, diffusion = jnp.asarray(positions), jnp.asarray(drift), jnp.asarray(diffusion)
        check_ensemble("positions", positions, minimum_members=4)
        check_ensemble("drift", drift)
        if drift.shape != positions.shape:
            raise refuse("drift", f"have shape {positions.shape}, as `positions` has", f"has shape {drift.shape}")
        d = positions.shape[1]
        if diffusion.shape not in ((), (d,), (d, d)):
            raise refuse("diffusion", f"be a scalar, ({d},) or ({d}, {d})", f"has shape {diffusion.shape}")
        snapshot = Snapshot(positions, drift, diffusion.astype(positions.dtype))
        return _compiled_estimate(self, snapshot)


@eqx.filter_jit
def _compiled_estimate(velocity: AbstractVelocity, snapshot: Snapshot) -> Velocity:
    return velocity.estimate(snapshot, velocity.init(snapshot.positions))[0]


def variational(field: AbstractField, snapshot: Snapshot) -> tuple[Array, Array, Array]:
    """w (m, d), ∇·w (m,) and the contributions 2 w·b + 2 tr(D ∇w) - ‖w‖² (m,) of the members of `snapshot`."""
    values, spread, divergence = field.evaluate(snapshot.positions, snapshot.diffusion)
    return values, divergence, 2 * jnp.sum(values * snapshot.drift, axis=1) + 2 * spread - jnp.sum(values**2, axis=1)


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
        values, divergence, contributions = (interleave(*pair) for pair in zip(answers[0], answers[1], strict=True))
        of_gradient = interleave(answers[-2][2], answers[-1][2])
        states += given[len(states) :]
        return Velocity(values, contributions, of_gradient, divergence, bound="lower", note=self.note), None if state is None else states

    def flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """The best gradient field of the class, at the members that it was fitted to."""
        state = self.init(snapshot.positions)
        field, _ = self.fit(snapshot, True, None if state is None else state[2])
        return field.evaluate(snapshot.positions, snapshot.diffusion)[0]


class AffineVelocity(AbstractVariationalVelocity):
    r"""The best affine field: exact for Gaussian laws in linear drift, a lower bound otherwise (far below where the law is multimodal).

        w(θ) = E[b] + (B + D) C⁻¹ (θ - E[θ]),    B = Cov(b, θ), C = Cov(θ)

    and for gradients the symmetric A with A C + C A = (B + D) + (B + D)ᵀ. The covariance is shrunk towards a multiple of the identity by
    the oracle-approximating rule, which vanishes as n/d grows and makes n < d possible.

    **Differentiation:** forward and reverse, of every order.
    **Reference:** Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE TSP 58, 5016 (2010).
    """

    moments_only: ClassVar[bool] = True
    note: ClassVar[str] = "affine fields, covariance shrunk by the oracle-approximating rule"

    def init(self, positions: Float[Array, "n d"]) -> None:
        return None

    def fit(self, snapshot: Snapshot, gradient: bool, state: Any) -> tuple[AbstractField, Any]:
        x, b = snapshot.positions, snapshot.drift
        n, d = x.shape
        center, offset = average(x), jnp.mean(b, axis=0)
        covariance = shrunk_covariance(x)
        crossed = product((b - offset).T, x - center) / n + diffusion_matrix(snapshot.diffusion, d)
        slope = lyapunov(covariance, crossed + crossed.T) if gradient else _right_solve(crossed, covariance)
        return _AffineField(center, offset, slope), None


class _AffineField(AbstractField):
    center: Float[Array, " d"]
    offset: Float[Array, " d"]
    slope: Float[Array, "d d"]

    def evaluate(self, positions: Float[Array, "m d"], diffusion: Float[Array, "..."]) -> tuple[Array, Array, Array]:
        values = self.offset + product(positions - self.center, self.slope.T)
        spread = jnp.sum(diffusion_matrix(diffusion, len(self.center)) * self.slope)
        everywhere = jnp.ones_like(values[:, 0])
        return values, spread * everywhere, jnp.trace(self.slope) * everywhere


@runtime_checkable
class Maps(Protocol):
    """A transport that maps one ensemble onto another."""

    def map(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n d"]:
        """Where each member of x goes on the way to y."""
        ...


class TransportVelocity(AbstractVelocity):
    """Finite differences of laws: where a transport maps each member from one snapshot to the next, over the time between.

    Central inside the run and one-sided at its ends: the error is of the order of the squared spacing where snapshots are evenly spaced on
    the clock, and of its first power at the ends and where they are not. It needs no drift, and sees only what moves mass: σ and E‖∇ψ‖²
    are the same number.

    **Args:** `transport`: `ExactTransport()`, `GaussianTransport()` or `SinkhornTransport(epsilon)`.
    **Differentiation:** at the assignment or map found.
    """

    moments_only: ClassVar[bool] = False
    needs_drift: ClassVar[bool] = False
    between: ClassVar[bool] = False
    transport: Maps

    def init(self, positions: Float[Array, "n d"]) -> None:
        return None

    def estimate(self, snapshot: Snapshot, state: Any) -> tuple[Velocity, Any]:
        forward = self.transport.map(snapshot.positions, snapshot.after)
        backward = self.transport.map(snapshot.positions, snapshot.before)
        moved = snapshot.elapsed > 0
        values = (forward - backward) * jnp.where(moved, 1 / jnp.where(moved, snapshot.elapsed, 1), 0)
        squares = jnp.sum(values**2, axis=1)
        return Velocity(values, squares, squares, None, bound="none", note="finite differences between snapshots"), None

    def flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """Finite differences, as in `estimate`."""
        return self.estimate(snapshot, None)[0].values


class PathVelocity(AbstractVelocity):
    """The members' own displacements over the time between snapshots: for members that move without noise, such as probability-flow
    members. Then Σ = Σ_j mean‖Δ_j‖²/Δs_j ≥ W2² holds on samples exactly, for every n, d and K, and with a snapshot at every step it is
    K Σ_k mean‖Δ_k‖². With noise in the steps this is not a velocity and diverges with K."""

    moments_only: ClassVar[bool] = False
    needs_drift: ClassVar[bool] = False
    between: ClassVar[bool] = True

    def init(self, positions: Float[Array, "n d"]) -> None:
        return None

    def estimate(self, snapshot: Snapshot, state: Any) -> tuple[Velocity, Any]:
        moved = snapshot.elapsed > 0
        values = (snapshot.after - snapshot.before) * jnp.where(moved, 1 / jnp.where(moved, snapshot.elapsed, 1), 0)
        return Velocity(values, jnp.sum(values**2, axis=1), None, None, bound="upper", note="the members' own paths"), None

    def flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """Finite differences, as in `estimate`."""
        return self.estimate(snapshot, None)[0].values


def _right_solve(b: Float[Array, "d d"], c: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """b c⁻¹ for a symmetric positive definite c; what c cannot resolve counts as 0. The eigenvectors stay in the primal."""

    def solve(_, b):
        values, vectors = jnp.linalg.eigh(c)
        solvable = values > values.size * jnp.finfo(values.dtype).eps * values.max()
        inverse = jnp.where(solvable, 1 / jnp.where(solvable, values, 1), 0)
        return product(product(b, vectors) * inverse, vectors.T)

    return jax.lax.custom_linear_solve(lambda x: product(x, c), b, solve, symmetric=True)


def diffusion_matrix(diffusion: Float[Array, "..."], d: int) -> Float[Array, "d d"]:
    """D as a matrix, from a scalar, a diagonal or a matrix."""
    return diffusion if jnp.ndim(diffusion) == 2 else diffusion * jnp.eye(d, dtype=diffusion.dtype)
