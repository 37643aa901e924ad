"""Potentials with a formula, and any function of the parameters."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import (
    as_float,
    check_finite,
    check_nonnegative,
    check_positive,
    known,
    refuse,
)
from esljax._numerics import product, safe_root, sqrtm
from esljax._types import Array, Float, Key, Scalar
from esljax.potentials.base import AbstractPotential
from esljax.potentials.keys import as_of_jax, drawn_in_line


class Quadratic(AbstractPotential):
    """Φ = ½ (θ - c)ᵀ K (θ - c), with the drift -K (θ - c), and optionally the noise of batches.

    A matrix K need not be symmetric. The drift is then no gradient; its circulation is
    -½(K - Kᵀ)(θ - c).

    With gradient noise a batch stands for one draw of ξ ~ N(0, C), independent for every member and
    step: its energy is Φ(θ) + ξ·θ, without bias, and its gradient ∇Φ(θ) + ξ. Without a batch both
    are exact. The law of a Gaussian ensemble under it is known exactly: `gaussian.descent`.

    **Args:** `stiffness`: K, a scalar, (d,) for a diagonal, or (d, d), in units of Φ per θ².
    `center`: c, (d,) or a scalar, in units of θ. `gradient_noise`: C, a scalar for C times the
    identity, (d,) for a diagonal, or a covariance (d, d), in units of Φ² per θ²; None for no
    batches.
    **Raises:** `InputError` for other shapes, numbers that are not finite, and a C that is no
    covariance.
    **Differentiation:** in K, c and C, of every order in K and c; the infinite slope of √C at 0
    counts as 0.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> float(esl.Quadratic(2.0, center=1.0)(jnp.array([0.0, 3.0])))
        5.0

        One step of many members at the center spreads them by η² C:

        >>> import jax
        >>> noisy, start = esl.Quadratic(1.0, gradient_noise=4.0), jnp.zeros((10_000, 1))
        >>> path = esl.simulate(
        ...     noisy, esl.Langevin(0.5), start, steps=1, snapshots=1, key=jax.random.key(0)
        ... )
        >>> print(jnp.var(path.final).round(1))
        1.0
    """

    stiffness: Float[Array, "..."] = eqx.field(
        converter=functools.partial(as_float, argument="stiffness")
    )
    center: Float[Array, "..."] = eqx.field(
        converter=functools.partial(as_float, argument="center"), default=0.0
    )
    gradient_noise: Float[Array, "..."] | None = eqx.field(
        converter=lambda x: None if x is None else as_float(x, "gradient_noise"), default=None
    )

    def __check_init__(self):
        if self.stiffness.ndim > 2 or (
            self.stiffness.ndim == 2 and self.stiffness.shape[0] != self.stiffness.shape[1]
        ):
            raise refuse(
                "stiffness",
                "be a scalar or have shape (d,) or (d, d)",
                f"has shape {self.stiffness.shape}",
            )
        if self.center.ndim > 1:
            raise refuse(
                "center", "be a scalar or have shape (d,)", f"has shape {self.center.shape}"
            )
        if (
            self.stiffness.ndim
            and self.center.ndim
            and self.stiffness.shape[-1] != self.center.shape[0]
        ):
            raise refuse(
                "center",
                f"have shape ({self.stiffness.shape[-1]},) like the stiffness",
                f"has shape {self.center.shape}",
            )
        check_finite("stiffness", self.stiffness)
        check_finite("center", self.center)
        if self.gradient_noise is not None:
            _check_noise(self.gradient_noise, self.stiffness, self.center)

    @property
    def conservative(self) -> bool:
        # Under a transformation the entries are unknown, so no matrix counts as symmetric.
        return self.stiffness.ndim < 2

    def energy(self, position: Float[Array, " d"], batch: Any = None) -> Scalar:
        return self.energy_and_gradient(position, batch)[0]

    def energy_and_gradient(
        self, position: Float[Array, " d"], batch: Any = None
    ) -> tuple[Scalar, Float[Array, " d"]]:
        displacement = position - self.center.astype(position.dtype)
        stiffness = self.stiffness.astype(position.dtype)
        matrix = self.stiffness.ndim == 2
        slope = product(stiffness, displacement) if matrix else stiffness * displacement
        energy = jnp.sum(displacement * slope) / 2
        if batch is None or self.gradient_noise is None:
            return energy, slope
        noise = _drawn(self.gradient_noise, batch, position)
        return energy + jnp.sum(noise * position), slope + noise

    def draw(self, key: Key, members: int) -> Any:
        """A key for each member, from which its ξ follows; None without gradient noise.

        The ξ themselves would hide C from a derivative, and they need d, which a scalar K does not
        know.
        """
        if self.gradient_noise is None:
            return None
        return as_of_jax(jax.random.split(drawn_in_line(key), members))


class DoubleWell(AbstractPotential):
    """Φ = barrier ((θ₁/width)² - 1)² + ½ stiffness Σ_{i>1} θ_i²: wells at θ₁ = ± width, of depth
    `barrier` below the top at 0.

    **Args:** `barrier`: in units of Φ. `width`: in units of θ. `stiffness`: of the other
    coordinates, in units of Φ per θ². All are positive scalars.
    **Raises:** `InputError` for numbers that are not positive.
    **Differentiation:** in all three, of every order.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> print(esl.DoubleWell(barrier=2.0, width=1.5)(jnp.array([[0.0], [1.5]])))
        [2. 0.]
    """

    barrier: Scalar = eqx.field(
        converter=functools.partial(as_float, argument="barrier"), default=1.0
    )
    width: Scalar = eqx.field(converter=functools.partial(as_float, argument="width"), default=1.0)
    stiffness: Scalar = eqx.field(
        converter=functools.partial(as_float, argument="stiffness"), default=1.0
    )
    conservative: ClassVar[bool] = True

    def __check_init__(self):
        for name in ("barrier", "width", "stiffness"):
            check_positive(name, getattr(self, name))

    def energy(self, position: Float[Array, " d"], batch: Any = None) -> Scalar:
        well = self.barrier * ((position[0] / self.width) ** 2 - 1) ** 2
        return (well + self.stiffness * jnp.sum(position[1:] ** 2) / 2).astype(position.dtype)

    def energy_and_gradient(
        self, position: Float[Array, " d"], batch: Any = None
    ) -> tuple[Scalar, Float[Array, " d"]]:
        return jax.value_and_grad(self.energy)(position)

    def draw(self, key: Key, members: int) -> None:
        return None


class Mixture(AbstractPotential):
    """Φ = -log Σ_i w_i N(θ; μ_i, σ_i² I): at temperature 1 the stationary law is the mixture of
    Gaussians itself.

    **Args:** `means`: (c, d), in units of θ. `variances`: σ², a scalar or (c,), positive, in
    units of θ². `weights`: a scalar or (c,), positive; they are normalized.
    **Raises:** `InputError` for other shapes and numbers that are not positive.
    **Differentiation:** in all three, of every order.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> mixture = esl.Mixture([[-3.0], [3.0]], weights=[1.0, 3.0])
        >>> round(float(jnp.exp(mixture(jnp.array([-3.0])) - mixture(jnp.array([3.0])))), 3)
        3.0
    """

    means: Float[Array, "c d"] = eqx.field(converter=functools.partial(as_float, argument="means"))
    variances: Float[Array, "..."] = eqx.field(
        converter=functools.partial(as_float, argument="variances"), default=1.0
    )
    weights: Float[Array, "..."] = eqx.field(
        converter=functools.partial(as_float, argument="weights"), default=1.0
    )
    conservative: ClassVar[bool] = True

    def __check_init__(self):
        if self.means.ndim != 2:
            raise refuse(
                "means", "have shape (c, d), one row per component", f"has shape {self.means.shape}"
            )
        for name in ("variances", "weights"):
            value = getattr(self, name)
            if value.shape not in ((), self.means.shape[:1]):
                raise refuse(
                    name,
                    f"be a scalar or have shape ({self.means.shape[0]},)",
                    f"has shape {value.shape}",
                )
            check_positive(name, value)

    def energy(self, position: Float[Array, " d"], batch: Any = None) -> Scalar:
        components, dimension = self.means.shape
        weights = jnp.broadcast_to(self.weights, (components,))
        distances = jnp.sum((position[None] - self.means) ** 2, axis=1)
        exponents = -distances / (2 * self.variances) - dimension / 2 * jnp.log(
            2 * jnp.pi * self.variances
        )
        return -jax.nn.logsumexp(exponents + jnp.log(weights / jnp.sum(weights))).astype(
            position.dtype
        )

    def energy_and_gradient(
        self, position: Float[Array, " d"], batch: Any = None
    ) -> tuple[Scalar, Float[Array, " d"]]:
        return jax.value_and_grad(self.energy)(position)

    def draw(self, key: Key, members: int) -> None:
        return None


class FromFunction(AbstractPotential):
    """Φ = fn(θ), for any differentiable `fn(position (d,)) -> scalar`.

    **Args:** `fn`: the function of one member. An `equinox.Module` (or any callable pytree) keeps
    its arrays differentiable; a plain function is static, with all that it closes over.
    **Raises:** `InputError` if `fn` is no function.
    **Differentiation:** in the position and in the arrays of `fn`, to any order that `fn` allows.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> float(esl.FromFunction(lambda position: jnp.sum(position**4))(jnp.ones(3)))
        3.0
    """

    conservative: ClassVar[bool] = True
    fn: Any
    """The function, as a callable pytree."""

    def __init__(self, fn: Callable[[Array], Array]):
        if not callable(fn):
            raise refuse("fn", "be a function of one position (d,)", f"is {fn!r}")
        self.fn = (
            fn if isinstance(fn, eqx.Module | jax.tree_util.Partial) else jax.tree_util.Partial(fn)
        )

    def energy(self, position: Float[Array, " d"], batch: Any = None) -> Scalar:
        energy = self.fn(position)
        half = hasattr(energy, "dtype") and energy.dtype.itemsize < 4
        return energy.astype(position.dtype) if half else energy

    def energy_and_gradient(
        self, position: Float[Array, " d"], batch: Any = None
    ) -> tuple[Scalar, Float[Array, " d"]]:
        return jax.value_and_grad(self.energy)(position)

    def draw(self, key: Key, members: int) -> None:
        return None


def _check_noise(noise: Array, stiffness: Array, center: Array) -> None:
    sizes = [x.shape[-1] for x in (stiffness, center) if x.ndim]
    if noise.ndim > 2 or (noise.ndim == 2 and noise.shape[0] != noise.shape[1]):
        must = "be a scalar or have shape (d,) or (d, d)"
        raise refuse("gradient_noise", must, f"has shape {noise.shape}")
    if noise.ndim and sizes and noise.shape[-1] != sizes[0]:
        d = sizes[0]
        must = f"be a scalar or have shape ({d},) or ({d}, {d}), as d is {d}"
        raise refuse("gradient_noise", must, f"has shape {noise.shape}")
    check_finite("gradient_noise", noise)
    if noise.ndim < 2:
        check_nonnegative("gradient_noise", noise)
    elif known(noise):
        matrix = np.asarray(noise)
        rounding = np.sqrt(np.finfo(matrix.dtype).eps) * np.abs(matrix).max()
        skewed, least = np.abs(matrix - matrix.T).max(), np.linalg.eigvalsh(matrix).min()
        if skewed > rounding:
            was = f"differs from its transpose by {skewed:g}"
            raise refuse("gradient_noise", "be symmetric", was)
        if least < -rounding:
            was = f"has the eigenvalue {least:g}"
            raise refuse("gradient_noise", "be positive semidefinite", was)


def _drawn(noise: Array, key: Key, position: Float[Array, " d"]) -> Float[Array, " d"]:
    """One ξ ~ N(0, noise)."""
    covariance = noise.astype(position.dtype)
    normal = jax.random.normal(drawn_in_line(key), position.shape, position.dtype)
    return product(sqrtm(covariance), normal) if noise.ndim == 2 else safe_root(covariance) * normal
