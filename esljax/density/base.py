r"""The density of the law that an ensemble samples: log q̂ and its score ∇log q̂, from the members.

Gaussian, flow and kernel densities work in the frame y = L⁻¹(θ - θ̄), where L Lᵀ is the covariance
of the members with its correlations shrunk. There the cloud has unit width along every axis, so the
answers do not depend on the units of θ:

    log q̂(θ) = log p̂(y) - log|L|,    ∇log q̂(θ) = L⁻ᵀ ∇log p̂(y)

`AbstractDensity` is a way to fit; the fit is an `AbstractLogDensity`, a pytree. A density evaluated
at the members that it was fitted to flatters itself: fit one half and evaluate the other.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from esljax._checks import as_cloud, door, known, refuse, wrong_answer
from esljax._numerics import shrunk_covariance
from esljax._types import Array, ArrayLike, Float, Scalar

# Members whose kernels or whose derivatives are held in memory at a time.
BLOCK = 128


class AbstractLogDensity(eqx.Module):
    """A density that has been fitted and can be evaluated anywhere: a pytree.

    A subclass holds arrays and defines two methods of one point. `AbstractDensity` has an example.
    """

    @abc.abstractmethod
    def log_density(self, x: Float[Array, " d"]) -> Scalar:
        """Return log q̂ at one point, shape (), in nats for θ in its own units."""

    @abc.abstractmethod
    def score(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """Return ∇log q̂ at one point, shape (d,), in units of 1/θ."""


class AbstractSmoother(eqx.Module):
    """A density whose kernels or bins can also average what the members carry.

    A velocity estimator then smooths the drift with the kernels of the density. A density that is
    no smoother is paired with the kernels of `KDEDensity` for this.

    A subclass of `AbstractLogDensity` that is also a smoother adds one method, `smooth`.

    **Example:** one value everywhere, the crudest of smoothers.

        >>> import equinox as eqx
        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> class Flat(esl.density.AbstractSmoother):
        ...     def smooth(self, positions, values):
        ...         return eqx.Partial(lambda mean, x: mean, jnp.mean(values, axis=0))
        >>> local = Flat().smooth(jnp.zeros((4, 1)), jnp.arange(4.0)[:, None])
        >>> float(local(jnp.zeros(1))[0])
        1.5
    """

    @abc.abstractmethod
    def smooth(
        self, positions: Float[Array, "n d"], values: Float[Array, "n p"]
    ) -> Callable[[Array], Array]:
        """Return the local mean of `values`, as a function of one position.

        **Args:** `positions`: shape (n, d), the members that the density was fitted to. `values`:
        shape (n, p), one row for each of them, in any unit.
        **Returns:** a pytree that maps a position (d,) to a mean (p,), differentiable once.
        """


class AbstractDensity(eqx.Module):
    """A way to fit a density to an ensemble, called as `KDEDensity().fit(positions)`.

    A subclass defines `note`, `init` and `estimate`; `estimate` returns an `AbstractLogDensity`.
    Its fields are its settings.

    **Example:** an exponential density on the positive axis, by its mean.

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> class Exponential(esl.density.AbstractLogDensity):
        ...     mean: jnp.ndarray
        ...     def log_density(self, x):
        ...         return jnp.sum(-x / self.mean - jnp.log(self.mean))
        ...     def score(self, x):
        ...         return -1 / self.mean
        >>> class ExponentialDensity(esl.density.AbstractDensity):
        ...     note = "exponential, by its mean"
        ...     def init(self, positions):
        ...         return None
        ...     def estimate(self, positions, state):
        ...         return Exponential(jnp.mean(positions, axis=0)), state
        >>> fitted = ExponentialDensity().fit(jnp.array([[1.0], [2.0], [2.0], [3.0]]))
        >>> float(fitted.score(jnp.ones(1))[0])
        -0.5
    """

    spares_a_fifth: ClassVar[bool] = False
    """Whether a fit uses every fifth member, the first included, only to decide when to stop."""

    @property
    @abc.abstractmethod
    def note(self) -> str:
        """How a fit treats the data, in words for a report."""

    @abc.abstractmethod
    def init(self, positions: Float[Array, "n d"]) -> Any:
        """Return the state before the first fit, a pytree of arrays or None.

        A fit of a similar ensemble starts from the state that the fit before it returned.
        """

    @abc.abstractmethod
    def estimate(
        self, positions: Float[Array, "n d"], state: Any
    ) -> tuple[AbstractLogDensity, Any]:
        """Return the density of these members, shape (n, d), and the state for the next fit.

        The values of the members are not checked: for use inside `jit`, `vmap` and `scan`.
        """

    def checked_estimate(
        self, positions: Float[Array, "n d"], state: Any
    ) -> tuple[AbstractLogDensity, Any]:
        """Return `estimate(positions, state)`, or reject an answer of the wrong kind.

        **Raises:** `InputError` for anything but an `AbstractLogDensity` and a state.
        """
        answer: Any = self.estimate(positions, state)
        pair = isinstance(answer, tuple) and len(answer) == 2
        if not pair or not isinstance(answer[0], AbstractLogDensity):
            expected = "an AbstractLogDensity and a state"
            raise wrong_answer("density", self, "estimate", expected, answer)
        return answer

    @door
    def fit(self, positions: Float[ArrayLike, "n d"]) -> AbstractLogDensity:
        """Fit the density of the law of these members, compiled once per shape.

        **Args:** `positions`: shape (n, d), n ≥ 4, one row per member, spread out in every
        direction.
        **Returns:** a pytree with `log_density(x)` and `score(x)` of one point, shape (d,);
        `jax.vmap` evaluates many points.
        **Raises:** `InputError` for wrong shapes, for members that are not finite or lie in a
        plane, and for ensembles that the class cannot handle.
        **Differentiation:** as the class documents.

        **Example:**

            >>> import jax
            >>> import jax.numpy as jnp
            >>> import esljax as esl
            >>> x = jax.random.normal(jax.random.key(0), (2000, 1))
            >>> density = esl.density.KDEDensity().fit(x)
            >>> abs(float(density.log_density(jnp.zeros(1))) + 0.919) < 0.1  # -½ log(2π)
            True
        """
        positions = as_cloud("positions", positions, minimum_members=4)
        density = _compiled_fit(self, positions)
        fitted = jax.tree.leaves(eqx.filter(density, eqx.is_inexact_array))
        if known(fitted) and not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in fitted):
            raise refuse(
                "positions",
                "be spread out in every direction",
                "gives a density that is not finite",
            )
        return density


class Frame(eqx.Module):
    """Coordinates y = L⁻¹(θ - θ̄) with mean 0 and, up to the shrinkage, covariance 1."""

    center: Float[Array, " d"]
    """θ̄, the mean of the members, shape (d,)."""
    root: Float[Array, "d d"]
    """L, lower triangular, shape (d, d), in units of θ."""

    @classmethod
    def of(cls, positions: Float[Array, "n d"]) -> "Frame":
        """Return the frame of an ensemble (n, d)."""
        # Shrinkage is towards equal widths, so every coordinate first gets its own unit.
        scale = jnp.std(positions, axis=0)
        return cls(
            jnp.mean(positions, axis=0),
            scale[:, None] * jnp.linalg.cholesky(shrunk_covariance(positions / scale)),
        )

    @property
    def log_volume(self) -> Scalar:
        """log|L|, which a log density loses on the way out of the frame."""
        return jnp.sum(jnp.log(jnp.diagonal(self.root)))

    def into(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Return positions in the frame: y, of the shape of x."""
        return solve_triangular(self.root, (x - self.center).T, lower=True).T

    def gradient(self, within: Float[Array, " d"]) -> Float[Array, " d"]:
        """Return the gradient in θ, L⁻ᵀ g, from the gradient g in the frame."""
        return solve_triangular(self.root, within, lower=True, trans=1)


@eqx.filter_jit
def _compiled_fit(density: AbstractDensity, positions: Float[Array, "n d"]) -> AbstractLogDensity:
    return density.checked_estimate(positions, density.init(positions))[0]
