"""Velocities by networks on top of the affine field."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from esljax._checks import as_float, check_key, check_positive, check_positive_int
from esljax._numerics import product
from esljax._types import Array, Float, Key, Scalar
from esljax.velocity.affine import AffineVelocity
from esljax.velocity.base import (
    AbstractField,
    AbstractVariationalVelocity,
    Snapshot,
    diffusion_matrix,
    whitening,
)


class NetworkVelocity(AbstractVariationalVelocity):
    r"""Affine fields plus networks: u = s N(C^{-1/2}(θ - E[θ])) or u = ∇N, trained by Adam from where the last snapshot left off.

    A quarter of the half that is learned from is held out; kept are the weights that did best on it at the end of one of `rounds` rounds,
    or none if the affine field alone did better. The network starts from u = 0. tr(D ∇u) is estimated by one random sign vector for each
    member and iteration while learning (Hutchinson), and exact in the result.

    **Args:** `key`: of the first weights and the sign vectors. `width`, `depth`: of the hidden layers. `iterations`: of Adam for each
    snapshot and each of its four fits. `learning_rate`: its largest; it falls on a cosine. `rounds`: how often weights are judged.
    **Differentiation:** forward and reverse, at the fields found; what a change of the members does to a fit is of second order in σ.
    **Reference:** Song, Garg, Shi and Ermon, "Sliced score matching", UAI (2019); Boffi and Vanden-Eijnden, "Probability flow solution of
    the Fokker-Planck equation", MLST 4, 035012 (2023).
    """

    moments_only: ClassVar[bool] = False
    note: ClassVar[str] = "affine and network fields, stopped early by a held-out part"
    key: Key = eqx.field(kw_only=True)
    width: int = eqx.field(static=True, default=64, kw_only=True)
    depth: int = eqx.field(static=True, default=2, kw_only=True)
    iterations: int = eqx.field(static=True, default=400, kw_only=True)
    learning_rate: Scalar = eqx.field(converter=as_float, default=5e-3, kw_only=True)  # type: ignore
    rounds: int = eqx.field(static=True, default=20, kw_only=True)

    def __check_init__(self):
        check_key("key", self.key)
        for name in ("width", "depth", "iterations", "rounds"):
            check_positive_int(name, getattr(self, name))
        check_positive("learning_rate", self.learning_rate)

    def init(self, positions: Float[Array, "n d"]) -> list[Any]:
        networks = [
            self._network(positions, gradient, i)
            for i, gradient in enumerate((False, False, True, True))
        ]
        return [eqx.filter(network, eqx.is_array) for network in networks]

    def fit(self, snapshot: Snapshot, gradient: bool, state: Any) -> tuple[AbstractField, Any]:
        snapshot = jax.lax.stop_gradient(snapshot)
        x = snapshot.positions
        n, d = x.shape
        fixed = eqx.filter(self._network(x, gradient, 0), eqx.is_array, inverse=True)
        held_out = np.arange(n) % 4 == 3
        learned, judged = _members(snapshot, ~held_out), _members(snapshot, held_out)
        base, _ = AffineVelocity().fit(learned, gradient, None)
        center, linear = whitening(learned.positions)

        def field_of(weights, felt):
            return _NetworkField(
                base, eqx.combine(weights, fixed), center, linear, scale * felt, gradient
            )

        rest = learned.drift - base.evaluate(learned.positions, learned.diffusion)[0]
        noise = product(linear, diffusion_matrix(learned.diffusion, d))
        scale = jnp.sqrt(jnp.mean(rest**2) + jnp.sum(noise**2) / d)
        safe = jnp.where(scale > 0, scale, 1)

        def loss(weights, signs):
            field = field_of(weights, 1)
            values, turned = jax.vmap(lambda x, s: jax.jvp(field.remainder, (x,), (s,)))(
                learned.positions, _spread(signs, learned.diffusion)
            )
            return (
                jnp.mean(jnp.sum(values**2 - 2 * values * rest - 2 * signs * turned, axis=1))
                / safe**2
            )

        def value(weights):
            field = field_of(weights, 1)
            values, turned, _ = field.added(judged.positions, judged.diffusion)
            ahead = judged.drift - base.evaluate(judged.positions, judged.diffusion)[0]
            gains = jnp.sum(2 * values * ahead - values**2, axis=1) + 2 * turned
            # Less its standard error, because the best of many noisy gains is positive by chance.
            return jnp.mean(gains) - jnp.std(gains) / jnp.sqrt(len(gains))

        per_round = -(-self.iterations // self.rounds)
        rate = optax.cosine_decay_schedule(1.0, per_round * self.rounds)
        optimizer = optax.chain(
            optax.clip_by_global_norm(10.0),
            optax.scale_by_adam(b2=0.99),
            optax.scale_by_schedule(rate),
        )

        def iteration(carry, i):
            weights, memory = carry
            signs = jax.random.rademacher(
                jax.random.fold_in(self.key, i), learned.positions.shape, x.dtype
            )
            slopes = jax.grad(loss)(weights, signs)
            steps, memory = optimizer.update(slopes, memory)
            moved = jax.tree.map(
                lambda w, step: w - self.learning_rate.astype(w.dtype) * step, weights, steps
            )
            return (moved, memory), None

        def one_round(carry, iterations):
            found, best, most = carry
            found, _ = jax.lax.scan(iteration, found, iterations)
            score = value(found[0])
            better = score > most
            return (
                found,
                jax.tree.map(lambda a, b: jnp.where(better, a, b), found[0], best),
                jnp.where(better, score, most),
            ), None

        start = (state, optimizer.init(state))
        counts = jnp.arange(self.rounds * per_round).reshape(self.rounds, per_round)
        (_, best, most), _ = jax.lax.scan(one_round, (start, state, value(state)), counts)
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
        # u = 0 at first, so that nothing is worse than the affine field before something is learned.
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
        """u at one position."""
        z = product(self.whitening, position - self.center)
        with jax.default_matmul_precision("highest"):
            if not self.gradient:
                return self.scale * self.network(z)
            slope = jax.grad(lambda z: self.network(z)[0])(z)
        # In units of the mean width, so that the slope of N is of order 1 as its value is.
        push = product(slope, self.whitening)
        return self.scale * push / jnp.sqrt(jnp.mean(self.whitening**2) * len(self.center))

    def added(
        self, positions: Float[Array, "m d"], diffusion: Float[Array, "..."]
    ) -> tuple[Array, Array, Array]:
        """What u adds to the base."""
        d = positions.shape[1]
        slopes = jax.vmap(jax.jacfwd(self.remainder))(positions)
        spread = jnp.einsum(
            "ij,nij->n", diffusion_matrix(diffusion, d), slopes, precision=jax.lax.Precision.HIGHEST
        )
        return jax.vmap(self.remainder)(positions), spread, jnp.trace(slopes, axis1=1, axis2=2)

    def evaluate(
        self, positions: Float[Array, "m d"], diffusion: Float[Array, "..."]
    ) -> tuple[Array, Array, Array]:
        values, spread, divergence = self.base.evaluate(positions, diffusion)
        more, turned, diverging = self.added(positions, diffusion)
        return values + more, spread + turned, divergence + diverging


def _members(snapshot: Snapshot, kept: np.ndarray) -> Snapshot:
    return Snapshot(snapshot.positions[kept], snapshot.drift[kept], snapshot.diffusion)


def _spread(x: Float[Array, "n d"], diffusion: Float[Array, "..."]) -> Float[Array, "n d"]:
    return product(x, diffusion) if jnp.ndim(diffusion) == 2 else x * diffusion
