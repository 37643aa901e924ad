r"""Velocities by neural networks N on top of the affine field w₀, trained on the variational bound.

w = w₀ + u,    u = s N(C^{-1/2}(θ - E[θ]))  or  u = ∇N,    maximizing

2 E[u·(b - w₀)] + 2 E[tr(D ∇u)] - E‖u‖²
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from esljax._checks import as_float, check_key, check_positive, check_positive_int, plain_int
from esljax._numerics import product, safe_divide, whitening
from esljax._types import Array, Float, Key, Scalar
from esljax.density import train
from esljax.velocity.affine import AffineVelocity
from esljax.velocity.base import (
    FOLDS,
    AbstractField,
    AbstractVariationalVelocity,
    Snapshot,
    diffuse,
    diffusion_matrix,
    rows,
)


class NetworkVelocity(AbstractVariationalVelocity):
    r"""Affine fields plus networks: u = s N(C^{-1/2}(θ - E[θ])) or u = ∇N, trained by Adam.

    The fit at a snapshot starts from the weights of the snapshot before. A quarter of the third
    that is learned from is held out: the fit is the weights that did best on it after one of
    `rounds` rounds, or the affine field alone if that did better. The network starts from u = 0.
    tr(D ∇u) is
    estimated by one random sign vector for each member and iteration in training (Hutchinson), and
    is exact in the result.

    **Args:** `key`: draws the first weights and the sign vectors. `width`, `depth`: of the hidden
    layers. `iterations`: of Adam for each snapshot and each of its six fits. `learning_rate`: its
    greatest value; it falls on a cosine. `rounds`: how often weights are judged.
    **Raises:** `InputError` if `key` is not a key or a number is not positive.
    **Differentiation:** forward and reverse, at the fields found; a change of the members changes σ
    through a fit by the second order only.
    **Reference:** Song, Garg, Shi and Ermon, "Sliced score matching", UAI (2019); Boffi and
    Vanden-Eijnden, "Probability flow solution of the Fokker-Planck equation", MLST 4, 035012
    (2023).

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> network = esl.NetworkVelocity(key=jax.random.key(0), width=8, iterations=20, rounds=4)
        >>> x = jax.random.normal(jax.random.key(1), (40, 1))
        >>> network(x, -x, 0.5).bound
        'lower'
    """

    moments_only: ClassVar[bool] = False
    note: ClassVar[str] = "affine and network fields, stopped early by a held-out part"
    key: Key = eqx.field(kw_only=True)
    width: int = eqx.field(static=True, converter=plain_int, default=64, kw_only=True)
    depth: int = eqx.field(static=True, converter=plain_int, default=2, kw_only=True)
    iterations: int = eqx.field(static=True, converter=plain_int, default=400, kw_only=True)
    learning_rate: Scalar = eqx.field(converter=as_float, default=5e-3, kw_only=True)  # type: ignore
    rounds: int = eqx.field(static=True, converter=plain_int, default=20, kw_only=True)

    def __check_init__(self):
        check_key("key", self.key)
        for name in ("width", "depth", "iterations", "rounds"):
            check_positive_int(name, getattr(self, name))
        check_positive("learning_rate", self.learning_rate)

    def in_units(self, size: Scalar) -> "NetworkVelocity":
        return self

    def init(self, positions: Float[Array, "n d"]) -> list[Any]:
        networks = [
            self._network(positions, gradient, i)
            for i, gradient in enumerate([True] * FOLDS + [False] * FOLDS)
        ]
        return [eqx.filter(network, eqx.is_array) for network in networks]

    def fit(self, snapshot: Snapshot, gradient: bool, state: Any) -> tuple[AbstractField, Any]:
        snapshot = jax.lax.stop_gradient(snapshot)
        x = snapshot.positions
        n, d = x.shape
        held_out = np.arange(n) % 4 == 3
        learned, judged = rows(snapshot, ~held_out), rows(snapshot, held_out)
        base, _ = AffineVelocity().fit(learned, gradient, None)
        center, linear = whitening(learned.positions)
        rest = learned.drift - base.evaluate(learned.positions, learned.diffusion)[0]
        noise = product(linear, diffusion_matrix(learned.diffusion, d))
        scale = jnp.sqrt(jnp.mean(rest**2) + jnp.sum(noise**2) / d)
        fixed = eqx.filter(self._network(x, gradient, 0), eqx.is_array, inverse=True)

        def field_of(weights, felt):
            network = eqx.combine(weights, fixed)
            return _NetworkField(base, network, center, linear, scale * felt, gradient)

        def loss(weights, signs):
            lost = _lost(field_of(weights, 1), learned, rest, signs)
            return safe_divide(jnp.mean(lost), scale**2)

        def slope(weights, i):
            key = jax.random.fold_in(self.key, i)
            return jax.grad(loss)(
                weights, jax.random.rademacher(key, learned.positions.shape, x.dtype)
            )

        def value(weights):
            gains = _gained(field_of(weights, 1), judged)
            # Less its standard error, because the best of many noisy gains is positive by chance.
            return jnp.mean(gains) - jnp.std(gains) / jnp.sqrt(len(gains))

        updates = -(-self.iterations // self.rounds)
        optimizer = optax.chain(
            optax.clip_by_global_norm(10.0),
            optax.scale_by_adam(b2=0.99),
            optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, updates * self.rounds)),
            optax.scale(-self.learning_rate.astype(x.dtype)),
        )
        best, most = train(state, slope, value, optimizer, rounds=self.rounds, updates=updates)
        return field_of(best, (most > 0).astype(x.dtype)), best

    def _network(self, positions: Array, gradient: bool, which: int) -> eqx.nn.MLP:
        d = positions.shape[1]
        key = jax.random.fold_in(jax.random.fold_in(self.key, 0), which)
        network = eqx.nn.MLP(
            d,
            1 if gradient else d,
            self.width,
            self.depth,
            jax.nn.silu,
            dtype=positions.dtype,
            key=key,
        )
        # u = 0 at first, so that nothing is worse than the affine field before training.
        return eqx.tree_at(
            lambda n: (n.layers[-1].weight, n.layers[-1].bias), network, replace_fn=jnp.zeros_like
        )


class _NetworkField(AbstractField):
    base: AbstractField
    network: eqx.nn.MLP
    center: Float[Array, " d"]
    whitening: Float[Array, "d d"]
    scale: Scalar
    gradient: bool = eqx.field(static=True)

    def remainder(self, position: Float[Array, " d"]) -> Float[Array, " d"]:
        """Return u at one position."""
        z = product(self.whitening, position - self.center)
        with jax.default_matmul_precision("highest"):  # equinox multiplies here
            if not self.gradient:
                return self.scale * self.network(z)
            slope = jax.grad(lambda z: self.network(z)[0])(z)
        # In units of the mean width, so that the slope of N is of order 1 as its value is.
        push = product(slope, self.whitening)
        return self.scale * push / jnp.sqrt(jnp.mean(self.whitening**2) * len(self.center))

    def added(
        self, positions: Float[Array, "m d"], diffusion: Float[Array, "..."]
    ) -> tuple[Array, Array, Array]:
        """Return u (m, d), tr(D ∇u) (m,) and ∇·u (m,), which the field adds to its base."""
        m, d = positions.shape
        slopes = jax.vmap(jax.jacfwd(self.remainder))(positions)
        spread = product(slopes.reshape(m, d * d), diffusion_matrix(diffusion, d).ravel())
        return jax.vmap(self.remainder)(positions), spread, jnp.trace(slopes, axis1=1, axis2=2)

    def evaluate(
        self, positions: Float[Array, "m d"], diffusion: Float[Array, "..."]
    ) -> tuple[Array, Array, Array]:
        values, spread, divergence = self.base.evaluate(positions, diffusion)
        more, turned, diverging = self.added(positions, diffusion)
        return values + more, spread + turned, divergence + diverging


def _lost(
    field: _NetworkField, learned: Snapshot, rest: Float[Array, "n d"], signs: Float[Array, "n d"]
) -> Float[Array, " n"]:
    """Return ‖u‖² - 2 u·(b - w₀) - 2 sᵀ D ∇u s at each member, for random signs s.

    `rest` is b - w₀, computed once for all iterations.
    """
    values, turned = jax.vmap(lambda x, s: jax.jvp(field.remainder, (x,), (s,)))(
        learned.positions, diffuse(learned.diffusion, signs)
    )
    return jnp.sum(values**2 - 2 * values * rest - 2 * signs * turned, axis=1)


def _gained(field: _NetworkField, judged: Snapshot) -> Float[Array, " n"]:
    """Return 2 u·(b - w₀) + 2 tr(D ∇u) - ‖u‖² at each member."""
    values, turned, _ = field.added(judged.positions, judged.diffusion)
    rest = judged.drift - field.base.evaluate(judged.positions, judged.diffusion)[0]
    return jnp.sum(2 * values * rest - values**2, axis=1) + 2 * turned
