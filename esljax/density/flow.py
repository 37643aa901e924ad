r"""Normalizing flows: a smooth invertible map f from the ensemble to a standard normal.

log q̂(θ) = log N(f(y); 0, 1) + log|∂f/∂y| - log|L|,    y = L⁻¹(θ - θ̄)
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from esljax._checks import check_key, check_positive, check_positive_int, door, plain_int
from esljax._types import Array, Float, Key, Scalar
from esljax.density.base import AbstractDensity, AbstractLogDensity, Frame
from esljax.density.training import train


class FlowDensity(AbstractDensity):
    r"""A normalizing flow: smooth invertible layers from the ensemble to a standard normal.

        log q̂(θ) = log N(f(y); 0, 1) + log|∂f/∂y| - log|L|

    f is a block neural autoregressive flow of smooth layers, so that the score is smooth as well.
    Four members in five are fitted by likelihood, with Adam on a cosine that ends at 0; the fit is
    the parameters at which every fifth member, left over, was likeliest.

    **Args:** `key`: draws the parameters of the first fit. `layers`: of the flow. `width`: hidden
    units per coordinate. `steps`: how many sets of parameters each fit compares: the start, and the
    result of every update by Adam. `learning_rate`: of Adam, at the start.
    **Raises:** `InputError` if `key` is not a key or a number is not positive.
    **Differentiation:** forward and reverse, of every order, in x. In the members the derivative
    goes through the optimization and costs its memory.
    **Reference:** De Cao, Aziz and Titov, "Block neural autoregressive flow", UAI 2019. The flow
    itself is flowjax's.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> x = jax.random.normal(jax.random.key(0), (100, 1))
        >>> flow = esl.density.FlowDensity(jax.random.key(1), layers=1, width=2, steps=5).fit(x)
        >>> flow.score(x[0]).shape
        (1,)
    """

    spares_a_fifth: ClassVar[bool] = True
    key: Key
    layers: int = eqx.field(static=True, converter=plain_int, default=2)
    width: int = eqx.field(static=True, converter=plain_int, default=8)
    steps: int = eqx.field(static=True, converter=plain_int, default=1000)
    learning_rate: float = eqx.field(static=True, default=2e-2)

    def __check_init__(self):
        check_key("key", self.key)
        check_positive_int("layers", self.layers)
        check_positive_int("width", self.width)
        check_positive_int("steps", self.steps)
        check_positive("learning_rate", self.learning_rate)

    @property
    def note(self) -> str:
        return (
            f"block neural autoregressive flow of {self.layers} layers, {self.steps} steps of "
            "Adam, stopped by every fifth member"
        )

    def init(self, positions: Float[Array, "n d"]) -> list[Array]:
        parameters = jax.tree.leaves(
            eqx.filter(self._flow(positions.shape[1]), eqx.is_inexact_array)
        )
        return [parameter.astype(positions.dtype) for parameter in parameters]

    def estimate(
        self, positions: Float[Array, "n d"], state: list[Array]
    ) -> tuple[AbstractLogDensity, list[Array]]:
        frame = Frame.of(positions)
        members = frame.into(positions)
        chosen = jnp.arange(len(members)) % 5 > 0  # `spares_a_fifth`

        def loss(parameters):
            logs = self.log_prob(parameters, members)
            return -jnp.sum(jnp.where(chosen, logs, 0)) / jnp.sum(chosen)

        def value(parameters):
            logs = self.log_prob(parameters, members)
            return jnp.sum(jnp.where(chosen, 0, logs)) / jnp.sum(~chosen)

        best, _ = train(
            state,
            lambda parameters, _: jax.grad(loss)(parameters),
            value,
            optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.steps)),
            rounds=self.steps - 1,
        )
        return _Flow(frame, best, self), best

    def log_prob(self, parameters: list[Array], y: Float[Array, "*n d"]) -> Float[Array, "*n"]:
        """Return log p̂ of positions in the frame, by the flow with these parameters."""
        # Made anew in each trace: flowjax's layers hold functions that hold arrays, and the arrays
        # of one trace must not appear in another.
        learned, rest = eqx.partition(self._flow(y.shape[-1]), eqx.is_inexact_array)
        flow = eqx.combine(jax.tree.unflatten(jax.tree.structure(learned), parameters), rest)
        with jax.default_matmul_precision("highest"):
            # flowjax answers in the default precision of numbers.
            return flow.log_prob(y).astype(y.dtype)

    def _flow(self, d: int) -> Any:
        # Imported here: only flows need flowjax.
        from flowjax.distributions import StandardNormal
        from flowjax.flows import block_neural_autoregressive_flow

        return block_neural_autoregressive_flow(
            self.key,
            base_dist=StandardNormal((d,)),
            nn_block_dim=self.width,
            flow_layers=self.layers,
        )


class _Flow(AbstractLogDensity):
    frame: Frame
    parameters: list[Array]
    density: FlowDensity

    @door
    def log_density(self, x: Float[Array, " d"]) -> Scalar:
        return self._within(self.frame.into(x)) - self.frame.log_volume

    @door
    def score(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.frame.gradient(jax.grad(self._within)(self.frame.into(x)))

    def _within(self, y: Float[Array, " d"]) -> Scalar:
        return self.density.log_prob(self.parameters, y)
