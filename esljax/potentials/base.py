r"""Potentials: the objective Φ(θ) whose gradient drives every member of the ensemble.

A potential sees one member at a time, a position θ of shape (d,), and optionally a batch of the
data that it averages over. It may depend on training time s, as Φ(θ; s):

    at(s)                         -> the potential that acts at s
    energy(θ, batch)              -> Φ(θ)
    energy_and_gradient(θ, batch) -> Φ(θ), ∇Φ(θ)
    draw(key, members)            -> the batches of one step, one for each member
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import check_kind, door
from esljax._types import Array, Float, Key, Scalar, ScalarLike


class AbstractPotential(eqx.Module):
    """Φ(θ), and the force that follows from it.

    A subclass is an `equinox.Module` whose arrays are its parameters. It defines four things:

    - `conservative`: a class variable or a property.
    - `energy` and `energy_and_gradient`: of one position (d,), in pure JAX; `simulate` maps them
      over the members. The gradient may be any drift if `conservative` is False.
    - `draw`: the batches of one step, or None for a potential without data.

    A potential that depends on training time also overrides `at`, and `at_start` and `at_end` if it
    jumps at the ends. Runs then use `at(s)` at every step, and `free_energy` counts its work.

    **Example:**

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> class Quartic(esl.AbstractPotential):
        ...     scale: jax.Array
        ...     conservative = True
        ...
        ...     def energy(self, position, batch=None):
        ...         return self.scale * jnp.sum(position**4)
        ...
        ...     def energy_and_gradient(self, position, batch=None):
        ...         return jax.value_and_grad(self.energy)(position, batch)
        ...
        ...     def draw(self, key, members):
        ...         return None
        >>> print(Quartic(jnp.array(2.0))(jnp.ones((3, 2))))
        [4. 4. 4.]
    """

    @property
    @abc.abstractmethod
    def conservative(self) -> bool:
        """Whether the force is minus the gradient of Φ, so that its Jacobian is symmetric."""

    @abc.abstractmethod
    def energy(self, position: Float[Array, " d"], batch: Any = None) -> Scalar:
        """Φ at one position: over `batch`, or over all the data if that is None."""

    @abc.abstractmethod
    def energy_and_gradient(
        self, position: Float[Array, " d"], batch: Any = None
    ) -> tuple[Scalar, Float[Array, " d"]]:
        """Φ and minus the force, shape (d,), at one position."""

    @abc.abstractmethod
    def draw(self, key: Key, members: int) -> Any:
        """The batches of one step: a pytree with a leading axis of length `members`, or None."""

    def at(self, s: ScalarLike) -> "AbstractPotential":
        """The potential that acts at training time `s`: this one, unless a subclass moves."""
        return self

    def at_start(self) -> "AbstractPotential":
        """The potential before the first step, and before any jump at s = 0."""
        return self.at(0.0)

    def at_end(self) -> "AbstractPotential":
        """The potential after the last step, and after any jump at s = 1."""
        return self.at(1.0)

    @property
    def moves(self) -> bool:
        """Whether Φ depends on training time, so that work is done on the members."""
        mine, base = type(self), AbstractPotential
        return any(
            getattr(mine, name) is not getattr(base, name) for name in ("at", "at_start", "at_end")
        )

    @property
    def parameter_keys(self) -> tuple[tuple[str, tuple[int, ...]], ...] | None:
        """The names and shapes of the parameters in the order in which a member is raveled.

        None if the potential does not know them. Runs carry them, so that reports can say which
        parameters move.
        """
        return None

    @property
    def outputs_by_array(self) -> Callable[[Sequence[Array], Any], Any] | None:
        """The outputs of a model as a function of its arrays, in the order and the shapes of
        `parameter_keys`, and of inputs. None if the potential has no model."""
        return None

    def probes(self, key: Key, count: int) -> tuple[Float[Array, " d"], Any] | None:
        """A random position, none of whose numbers is special, and `count` random inputs, to try
        the model on. None if the potential has no model."""
        return None

    @door
    def __call__(self, positions: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
        """Φ over all the data at positions (..., d), one number for each position."""
        return jnp.vectorize(self.energy, signature="(d)->()")(positions)


def check_potential(argument: str, value: Any) -> None:
    """Reject a value that is no potential.

    **Raises:** `InputError`, which names `FromFunction` for a bare function.
    """
    must = "be a potential such as Quadratic(1.0), or FromFunction(fn) for a function of one member"
    check_kind(argument, value, AbstractPotential, must)


def floating_as(dtype: Any, tree: Any) -> Any:
    """The real floating arrays of a tree in one type, and the others as they are."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
