"""Potentials with a formula, and any function of the parameters."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import as_float, check_finite, check_positive, refuse
from esljax._numerics import product
from esljax._types import Array, Float, Key, Scalar
from esljax.potentials.base import AbstractPotential


class Quadratic(AbstractPotential):
    """Φ = ½ (θ - c)ᵀ K (θ - c), with the drift -K (θ - c).

    A matrix K need not be symmetric. The drift is then no gradient; its circulation is
    -½(K - Kᵀ)(θ - c).

    **Args:** `stiffness`: K, a scalar, (d,) for a diagonal, or (d, d), in units of Φ per θ².
    `center`: c, (d,) or a scalar, in units of θ.
    **Raises:** `InputError` for other shapes and numbers that are not finite.
    **Differentiation:** in K and c, of every order.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> float(esl.Quadratic(2.0, center=1.0)(jnp.array([0.0, 3.0])))
        5.0
    """

    stiffness: Float[Array, "..."] = eqx.field(
        converter=functools.partial(as_float, argument="stiffness")
    )
    center: Float[Array, "..."] = eqx.field(
        converter=functools.partial(as_float, argument="center"), default=0.0
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

    @property
    def conservative(self) -> bool:
        # Under a transformation the entries are unknown, so no matrix counts as symmetric.
        return self.stiffness.ndim < 2

    def energy(self, position: Float[Array, " d"], batch: Any = None) -> Scalar:
        return self.energy_and_gradient(position)[0]

    def energy_and_gradient(
        self, position: Float[Array, " d"], batch: Any = None
    ) -> tuple[Scalar, Float[Array, " d"]]:
        displacement = position - self.center.astype(position.dtype)
        stiffness = self.stiffness.astype(position.dtype)
        matrix = self.stiffness.ndim == 2
        slope = product(stiffness, displacement) if matrix else stiffness * displacement
        return jnp.sum(displacement * slope) / 2, slope

    def draw(self, key: Key, members: int) -> None:
        return None


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
