r"""The velocity of an ensemble from its members, and the rate σ of entropy production.

    ∂_t q + ∇·(q v) = 0,    σ = E‖v‖²

Members that move by dθ = b dt + sqrt(2 D) dW have v = b - D ∇log q, so only the score ∇log q of
their law is missing. For any field w,

    σ ≥ 2 E[w·b] + 2 E[tr(D ∇w)] - E‖w‖² = σ - E‖w - v‖²

(Hyvärinen, JMLR 6, 695 (2005)). A field fitted on some members and evaluated on others therefore
gives a lower bound in expectation, short of σ by E‖w - v‖²: the square of the bias of the fit and
its variance. Far from rest that is little. Near rest σ itself is small, the variance is not, and
the bound falls below 0. Two fields w_a, w_b fitted to independent members disagree by exactly that
variance, so

    σ̂ = ½ (bound[w_a] + bound[w_b]) + ½ E‖w_a - w_b‖²,    E σ̂ = σ - E‖E w - v‖²

is short of σ by the bias of the fit alone: for affine fields of Gaussian laws by nothing. With
gradients g for w the same expression estimates E‖∇ψ‖², the part of the velocity that moves mass;
the rest of σ is housekeeping.

Time is any clock: with b = -η∇Φ and D = ηT it is training time, with b = -∇Φ and D = T learning
time. Source of Σ: Okanohara, arXiv 2601.17607.
"""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import as_cloud, as_real, check_choice, door, known, refuse, wrong_answer
from esljax._numerics import debiased_variance, product
from esljax._types import Array, ArrayLike, Float, Scalar, ScalarLike
from esljax.results import StandardErrors, measured

BOUNDS = ("lower", "upper", "none")
"""The directions in which the σ of an estimator can be a bound."""
# Two fits judge each member. Over three pairs of thirds the noise of σ̂ near rest is √3/2 of that
# over one pair of halves, and no member is judged by a fit of its own.
FOLDS = 3


class Snapshot(eqx.Module):
    """The input of a velocity estimator: an ensemble at one time.

    A run gives an estimator only the parts that it asks for by `needs_drift` and `between`; the
    others may be None.
    """

    positions: Float[Array, "n d"]
    """The members, shape (n, d), in units of θ."""
    drift: Any = None
    """b at every member, shape (n, d), in units of θ per unit of the clock."""
    diffusion: Any = None
    """D, shape (), (d,) for a diagonal or symmetric (d, d), in θ² per unit of the clock."""
    before: Any = None
    """The members one snapshot earlier, shape (n, d), or now if there is none."""
    after: Any = None
    """The members one snapshot later, shape (n, d), or now if there is none."""
    elapsed: Any = None
    """The time between `before` and `after`, shape (), in units of the clock."""


class Velocity(eqx.Module):
    """The answer of a velocity estimator for one snapshot; `print` shows it.

    **Raises:** `InputError` if `bound` is not one of its three words.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> values = jnp.array([[1.0], [-2.0]])
        >>> squares = jnp.sum(values**2, axis=1)
        >>> velocity = esl.velocity.Velocity(values, squares, squares, None, bound="none")
        >>> print(velocity)
        σ = 2.5 ± 1.5
        >>> float(velocity.standard_error.squared), velocity.errors
        (1.5, 'spread over 2 members')
    """

    values: Float[Array, "n d"]
    """v at every member, shape (n, d), in units of θ per unit of the clock."""
    contributions: Float[Array, " n"]
    """One number for each member, shape (n,), whose mean is σ, in the units of σ."""
    gradient_contributions: Float[Array, " n"] | None
    """The same for E‖∇ψ‖², the part of the velocity that moves mass, shape (n,).

    None if the estimator does not resolve it: σ then contains what moves no mass, unresolved.
    """
    divergence: Float[Array, " n"] | None
    """∇·v at every member, shape (n,), per unit of the clock; None if it is not known."""
    bound: str = eqx.field(static=True)
    """The direction in which σ is a bound.

    "lower": σ is a lower bound in expectation. "upper": Σ made from it is never below W2² of the
    same members. "none": neither.
    """
    note: str = eqx.field(static=True, default="")
    """How the estimator treated the data, in words."""
    bound_contributions: Float[Array, " n"] | None = None
    """The same for a number that is below σ in expectation for every fit, shape (n,), and not only
    on the average over fits. None if there is none."""
    sees_circulation: bool = eqx.field(static=True, default=True)
    """Whether σ contains motion that moves no mass. False for an estimate from laws alone."""

    def __check_init__(self):
        check_choice("bound", self.bound, BOUNDS)

    @property
    def squared(self) -> Scalar:
        """σ = E‖v‖², shape (), in units of θ² per squared unit of the clock."""
        return jnp.mean(self.contributions)

    @property
    def standard_error(self) -> StandardErrors:
        """The standard error of `squared`, shape (), in the units of σ.

        Where the noise of the fits is all there is, near rest, the variance of the contributions
        counts it twice, because each fit also judges the two others.
        """
        variance = jnp.var(self.contributions, ddof=1) / self.contributions.shape[0]
        if self.bound_contributions is not None:
            noise = (self.squared - jnp.mean(self.bound_contributions)) / 2
            # A σ below 0 is noise alone, whose variance the contributions show all the same.
            variance = debiased_variance(jnp.maximum(self.squared, 0), variance, noise)
        return StandardErrors({"squared": jnp.sqrt(variance)})

    @property
    def errors(self) -> str:
        """The sample behind `standard_error`, in words."""
        return f"spread over {self.contributions.shape[0]} members"

    def __str__(self) -> str:
        if not known(self.contributions) or self.contributions.ndim != 1:
            return repr(self)
        bound = ", a lower bound in expectation" if self.bound == "lower" else ""
        note = f" ({self.note})" if self.note else ""
        return f"σ = {measured(self.squared, self.standard_error.squared)}{bound}{note}"


class AbstractField(eqx.Module):
    """A vector field w(θ) that has been fitted and can be evaluated anywhere: a pytree.

    A subclass holds arrays and defines one method, `evaluate`. `AbstractVariationalVelocity` has an
    example.
    """

    @abc.abstractmethod
    def evaluate(
        self, positions: Float[Array, "m d"], diffusion: Float[Array, "..."]
    ) -> tuple[Array, Array, Array]:
        """Return w (m, d), tr(D ∇w) (m,) and ∇·w (m,) at these positions.

        **Args:** `positions`: shape (m, d). `diffusion`: D, of shape (), (d,) or (d, d).
        """


class AbstractVelocity(eqx.Module):
    """A way to estimate the velocity of an ensemble, called as `AffineVelocity()(x, b, D)`.

    A subclass defines three properties (class attributes do), `init`, `estimate` and `flow`. Its
    fields are its settings. An estimator that fits fields is a shorter subclass of
    `AbstractVariationalVelocity`, which needs `fit` alone.

    **Example:** all members move as their mean does.

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> class Translation(esl.AbstractVelocity):
        ...     moments_only, needs_drift, between = True, True, False
        ...     def init(self, positions):
        ...         return None
        ...     def estimate(self, snapshot, state):
        ...         values = self.flow(snapshot)
        ...         squares = jnp.sum(values**2, axis=1)
        ...         result = esl.velocity.Velocity(values, squares, squares, None, bound="lower")
        ...         return result, state
        ...     def flow(self, snapshot):
        ...         return jnp.broadcast_to(jnp.mean(snapshot.drift, axis=0), snapshot.drift.shape)
        >>> x = jnp.arange(4.0)[:, None]
        >>> float(Translation()(x, -x, 1.0).squared)
        2.25
    """

    @property
    @abc.abstractmethod
    def moments_only(self) -> bool:
        """Whether the estimate depends on the law by its mean and covariance alone.

        Its Σ then bounds no more than the Bures distance.
        """

    @property
    @abc.abstractmethod
    def needs_drift(self) -> bool:
        """Whether it needs the drift and the diffusion at the members.

        If not, it needs their neighbors in time: `before`, `after` and `elapsed` of a `Snapshot`.
        """

    @property
    @abc.abstractmethod
    def between(self) -> bool:
        """Whether a velocity belongs to the link from `before` to `after`, not to one snapshot."""

    def in_units(self, size: Scalar) -> "AbstractVelocity | None":
        """Return the estimator V' with size V'(θ/size, b/size, D/size²) = V(θ, b, D).

        It must not matter where members lie, either. Reports then measure members in a unit of
        their own, in which the squares of very large and very small numbers are numbers. None if
        there is none, or if it is not known: a report then measures the members as they are.
        """
        return None

    @abc.abstractmethod
    def init(self, positions: Float[Array, "n d"]) -> Any:
        """Return the state before the first snapshot: arrays for warm starts, or None."""

    @abc.abstractmethod
    def estimate(self, snapshot: Snapshot, state: Any) -> tuple[Velocity, Any]:
        """Return the velocity at one snapshot and the state for the next, like the given one.

        The values are not checked: for use inside `jit`, `vmap` and `scan`.
        """

    @abc.abstractmethod
    def flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """Return velocities to move the members by, shape (n, d), from one field fitted to all.

        Cross-fitting would move each third by the fields of the others, and their differences
        would grow. As an estimate of σ these velocities would be optimistic.
        """

    def checked_estimate(self, snapshot: Snapshot, state: Any) -> tuple[Velocity, Any]:
        """Return `estimate(snapshot, state)`, or reject an answer of the wrong kind or shape.

        **Raises:** `InputError` for anything but a `Velocity` of these members and a state of the
        same structure, shapes and types as the given one.
        """
        answer: Any = self.estimate(snapshot, state)
        pair = isinstance(answer, tuple) and len(answer) == 2
        if not pair or not isinstance(answer[0], Velocity):
            raise wrong_answer("velocity", self, "estimate", "a Velocity and a state", answer)
        velocity, after = answer
        n, d = snapshot.positions.shape
        _check_shape(self, "estimate", "values", velocity.values, (n, d))
        _check_shape(self, "estimate", "contributions", velocity.contributions, (n,))
        for name in ("gradient_contributions", "divergence"):
            if getattr(velocity, name) is not None:
                _check_shape(self, "estimate", name, getattr(velocity, name), (n,))
        if _kinds(after) != _kinds(state):
            raise refuse(
                "velocity",
                "return a state from `estimate` with the structure, shapes and types of the one "
                "that `init` returns",
                f"{type(self).__name__}.estimate returns another",
            )
        return velocity, after

    def checked_flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """Return `flow(snapshot)`, or reject an answer of the wrong shape.

        **Raises:** `InputError` for anything but one velocity for each member.
        """
        values: Any = self.flow(snapshot)
        _check_shape(self, "flow", "velocities", values, snapshot.positions.shape)
        return values

    @door
    def __call__(
        self,
        positions: Float[ArrayLike, "n d"],
        drift: Float[ArrayLike, "n d"],
        diffusion: ScalarLike | Float[ArrayLike, "..."],
    ) -> Velocity:
        """Estimate the velocity of one snapshot of members that drift and diffuse.

        **Args:** `positions`: shape (n, d), n ≥ 4. `drift`: b = -η∇Φ at each of them, shape (n, d).
        `diffusion`: D = ηT, a scalar, (d,) or a symmetric matrix (d, d).
        **Returns:** `Velocity`; `print` shows it.
        **Raises:** `InputError` for wrong shapes, for members that are not finite, and for an
        estimator that needs a run.
        **Differentiation:** as the class documents.

        **Example:**

            >>> import jax
            >>> import esljax as esl
            >>> x = jax.random.normal(jax.random.key(0), (2000, 2))
            >>> velocity = esl.AffineVelocity()(x, -x, 1.0)  # at equilibrium nothing moves
            >>> bool(abs(velocity.squared) < 1e-2)
            True
        """
        if not self.needs_drift or self.between:
            name = type(self).__name__
            raise refuse(
                "velocity",
                "be an estimator that works on one snapshot",
                f"is {name}, which needs a run: speed_limit(..., velocity=...)",
            )
        positions = as_cloud("positions", positions, minimum_members=4)
        drift, diffusion = as_cloud("drift", drift), as_real("diffusion", diffusion)
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
        rates = drift.astype(positions.dtype), diffusion.astype(positions.dtype)
        snapshot = Snapshot(positions, *rates)
        return _compiled_estimate(self, snapshot)


class AbstractVariationalVelocity(AbstractVelocity):
    """Fields fitted on one third of the members and evaluated on the others, all three ways.

        σ̂ = E[w̄·b + tr(D ∇w̄)] · 2 - E[w_a·w_b],    w̄ = (w_a + w_b)/2

    at each member, w_a and w_b being the fields of the two thirds that it is not in: nothing is
    judged by the members that it was fitted to. Each w is a gradient field g plus a field r for
    what g leaves, so that E‖∇ψ‖² is nested in σ. A subclass defines `moments_only`, `note`, `init`
    and `fit`; the cross-fitting, the gradient part and the bound come with the base.

    **Example:** constant fields; all of them are gradients.

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> class ConstantField(esl.velocity.AbstractField):
        ...     mean: jnp.ndarray
        ...     def evaluate(self, positions, diffusion):
        ...         none = jnp.zeros(len(positions))
        ...         return jnp.broadcast_to(self.mean, positions.shape), none, none
        >>> class ConstantVelocity(esl.velocity.AbstractVariationalVelocity):
        ...     moments_only, note = True, "constant fields"
        ...     def init(self, positions):
        ...         return None
        ...     def fit(self, snapshot, gradient, state):
        ...         return ConstantField(jnp.mean(snapshot.drift, axis=0)), state
        >>> x = jnp.array([[1.0], [1.0], [1.0], [2.0], [2.0], [2.0]])
        >>> float(ConstantVelocity()(x, -x, 1.0).squared)
        2.25
    """

    needs_drift: ClassVar[bool] = True
    between: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def note(self) -> str:
        """How a fit treats the data, in words for a report."""

    @abc.abstractmethod
    def fit(self, snapshot: Snapshot, gradient: bool, state: Any) -> tuple[AbstractField, Any]:
        """Return the best field of the class for these members, and the state for the next fit.

        **Args:** `snapshot`: the members to learn from. `gradient`: whether the field must be a
        gradient. `state`: None, or one of the six that `init` returns: three for a gradient, one
        for each third of the members, then three for any field.
        """

    def estimate(self, snapshot: Snapshot, state: Any) -> tuple[Velocity, Any]:
        """Cross-fit a gradient field, and any field for the rest of the velocity."""
        check_parts(snapshot, ("drift", "diffusion"))
        starts = self._starts(state)
        parts = thirds(snapshot)
        gradients, wholes, states = [], [], list(starts)
        for i, part in enumerate(parts):
            learned = unbiased(part)
            gradient, states[i] = self._checked_fit(learned, True, starts[i])
            whole = gradient
            # On a line every field is a gradient.
            if snapshot.positions.shape[1] > 1:
                after = learned.drift - evaluated(gradient, learned)[0]
                left = Snapshot(learned.positions, after, learned.diffusion)
                rest, states[FOLDS + i] = self._checked_fit(left, False, starts[FOLDS + i])
                whole = Sum(gradient, rest)
            gradients.append(gradient)
            wholes.append(whole)
        values, divergence, contributions, bounds = cross_fitted(wholes, parts)
        of_gradient = contributions
        if snapshot.positions.shape[1] > 1:
            of_gradient = cross_fitted(gradients, parts)[2]
        return Velocity(
            values,
            contributions,
            of_gradient,
            divergence,
            bound="lower",
            note=self.note,
            bound_contributions=bounds,
        ), None if state is None else states

    def flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """Return the best gradient field of the class, at the members that it was fitted to."""
        check_parts(snapshot, ("drift", "diffusion"))
        start = self._starts(self.init(snapshot.positions))[0]
        field, _ = self._checked_fit(snapshot, True, start)
        return evaluated(field, snapshot)[0]

    def _starts(self, state: Any) -> list[Any]:
        """Return the starts of the six fits: a gradient or any field, of each third."""
        starts = [None] * (2 * FOLDS) if state is None else state
        if not isinstance(starts, list) or len(starts) != 2 * FOLDS:
            expected = f"None or a list of {2 * FOLDS} states"
            raise wrong_answer("velocity", self, "init", expected, starts)
        return starts

    def _checked_fit(self, snapshot: Snapshot, gradient: bool, state: Any) -> tuple[Any, Any]:
        answer: Any = self.fit(snapshot, gradient, state)
        pair = isinstance(answer, tuple) and len(answer) == 2
        if not pair or not isinstance(answer[0], AbstractField):
            raise wrong_answer("velocity", self, "fit", "an AbstractField and a state", answer)
        return answer


class Sum(AbstractField):
    """The sum of two fields."""

    one: AbstractField
    other: AbstractField

    def evaluate(
        self, positions: Float[Array, "m d"], diffusion: Float[Array, "..."]
    ) -> tuple[Array, Array, Array]:
        one, other = (each.evaluate(positions, diffusion) for each in (self.one, self.other))
        w, spread, divergence = (a + b for a, b in zip(one, other, strict=True))
        return w, spread, divergence


def cross_fitted(
    fields: Sequence[AbstractField], parts: Sequence[Snapshot]
) -> tuple[Array, Array, Array, Array]:
    """Evaluate at each member the fields that were fitted to the other parts, two for each.

    **Args:** `fields`: one for each of the `thirds` of the members, fitted to it alone.
    **Returns:** for all members in their order: the mean of the two fields (n, d), its divergence
    (n,), the terms of σ̂ (n,), and those of the lower bound 2 w·b + 2 tr(D ∇w) - ‖w‖² (n,).
    """
    answers = []
    for i, part in enumerate(parts):
        both = [evaluated(field, part) for j, field in enumerate(fields) if j != i]
        (w, spread, divergence), (other, other_spread, other_divergence) = both
        middle = (w + other) / 2
        linear = 2 * jnp.sum(middle * part.drift, axis=1) + spread + other_spread
        apart = jnp.sum((w - other) ** 2, axis=1) / 4
        bounds = linear - jnp.sum(middle**2, axis=1) - apart
        answers.append((middle, (divergence + other_divergence) / 2, bounds + 2 * apart, bounds))
    values, divergence, contributions, bounds = (
        interleave(each) for each in zip(*answers, strict=True)
    )
    return values, divergence, contributions, bounds


def evaluated(field: AbstractField, snapshot: Snapshot) -> tuple[Array, Array, Array]:
    """Return `field.evaluate` at the members of `snapshot`, or reject wrong shapes."""
    answer: Any = field.evaluate(snapshot.positions, snapshot.diffusion)
    if not isinstance(answer, tuple) or len(answer) != 3:
        raise wrong_answer("field", field, "evaluate", "w, tr(D ∇w) and ∇·w", answer)
    n, d = snapshot.positions.shape
    for name, part, shape in zip(
        ("w", "tr(D ∇w)", "∇·w"), answer, ((n, d), (n,), (n,)), strict=True
    ):
        _check_shape(field, "evaluate", name, part, shape, argument="field")
    return answer


def thirds(snapshot: Snapshot) -> tuple[Snapshot, ...]:
    """Return every third member, from the first, the second and the third on."""
    return tuple(rows(snapshot, slice(i, None, FOLDS)) for i in range(FOLDS))


def unbiased(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot from which an affine fit comes out right on the average.

    The score of a Gaussian law is -C⁻¹(θ - E[θ]), and the inverse of a sample covariance (1/n) is
    too large by n/(n - d - 2) on the average; the diffusion is smaller by that much here. Fewer
    members than `resolved` asks for have a shrunk covariance, to which this does not apply.
    """
    n, d = snapshot.positions.shape
    if not resolved(n, d):
        return snapshot
    return Snapshot(snapshot.positions, snapshot.drift, snapshot.diffusion * ((n - d - 2) / n))


def resolved(n: int, d: int) -> bool:
    """Return whether n members determine a covariance of d coordinates without shrinking it.

    Its inverse has a finite variance from n = d + 4 on.
    """
    return n >= 2 * (d + 2)


def rows(snapshot: Snapshot, which: Any) -> Snapshot:
    """Return some of the members, by a slice, a NumPy mask or NumPy indices."""
    return Snapshot(snapshot.positions[which], snapshot.drift[which], snapshot.diffusion)


def interleave(parts: Sequence[Array]) -> Array:
    """Return results on the `thirds` in the order of the members."""
    joined = jnp.zeros((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    for i, part in enumerate(parts):
        joined = joined.at[i::FOLDS].set(part)
    return joined


def diffusion_matrix(diffusion: Float[Array, "..."], d: int) -> Float[Array, "d d"]:
    """Return D as a matrix (d, d), from a scalar, a diagonal or a matrix."""
    return diffusion if jnp.ndim(diffusion) == 2 else diffusion * jnp.eye(d, dtype=diffusion.dtype)


def diffuse(diffusion: Float[Array, "..."], x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Return D x for one vector (d,), or for each of several."""
    return product(x, diffusion) if jnp.ndim(diffusion) == 2 else diffusion * x


def check_parts(snapshot: Snapshot, names: Sequence[str]) -> None:
    """Reject a snapshot without one of these parts."""
    for name in names:
        if getattr(snapshot, name) is None:
            raise refuse(
                "snapshot",
                f"carry {', '.join(f'`{each}`' for each in names)} for this estimator",
                f"has no `{name}`",
            )


def _check_shape(
    owner: Any, method: str, name: str, x: Any, shape: tuple[int, ...], argument: str = "velocity"
) -> None:
    """Reject the part `name` of an answer if it is no array of this shape."""
    if getattr(x, "shape", None) != shape:
        raise wrong_answer(argument, owner, method, f"{name} of shape {shape}", x)


def _kinds(state: Any) -> tuple[Any, list[Any]]:
    """Return the structure of a state, and the shapes and types of its arrays."""
    leaves, structure = jax.tree.flatten(eqx.filter(state, eqx.is_array))
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


@eqx.filter_jit
def _compiled_estimate(velocity: AbstractVelocity, snapshot: Snapshot) -> Velocity:
    return velocity.checked_estimate(snapshot, velocity.init(snapshot.positions))[0]
