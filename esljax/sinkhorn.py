r"""The Sinkhorn divergence between two ensembles: entropic transport without its bias, smooth in everything."""

import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import as_float, check_positive, check_positive_int, refuse
from esljax._matrix import product
from esljax._ott import ott
from esljax._types import Array, Float, Scalar
from esljax.transport import AbstractTransport, Solution, recentred, solution


class SinkhornTransport(AbstractTransport):
    r"""The Sinkhorn divergence: entropic transport without its bias at x = y. Any n, m. It tends to W2² as ε → 0, and is no metric.

        S_ε(x, y) = OT_ε(x, y) - ½ OT_ε(x, x) - ½ OT_ε(y, y)
        OT_ε(x, y) = min_P Σ_ij P_ij |x_i - y_j|² + ε Σ_ij P_ij log(nm P_ij)

    Its three terms have the size of ε and of the spread of the clouds, so rounding leaves an error of that size times 1e-7 in float32: for
    the increments between the snapshots of a run take a metric. It may come out slightly negative and is not clipped.

    **Args:** `epsilon`: ε > 0 in units of θ², a leaf of the pytree, chosen once per run (`.05` of the mean squared distance is a usual
    start) and never from the data within it. `threshold`: the largest error of the column sums of P, in total mass, at
    which the iterations stop. `max_iterations`: how many of them at most; a problem that needs more comes back with `converged` False.
    **Raises:** `InputError` if ε or `threshold` is not positive or `max_iterations` not a positive integer.
    **Differentiation:** forward and reverse in x, y and ε, by the envelope theorem, and again: second derivatives solve one dense (m, m)
    linear system, good to m of a thousand or two. The error of the gradient is of the order of `threshold`.
    **Reference:** Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn divergences", AISTATS 2019.

    **Example:**

        >>> import jax.numpy as jnp
        >>> x = jnp.array([[0.0], [2.0]])
        >>> round(float(SinkhornTransport(epsilon=0.1).squared(x, x + 1.0)), 4)
        1.0
    """

    is_metric: ClassVar[bool] = False
    epsilon: Scalar = eqx.field(converter=as_float)
    threshold: float = eqx.field(static=True, default=1e-4)
    max_iterations: int = eqx.field(static=True, default=5000)

    def __check_init__(self):
        if jnp.ndim(self.epsilon) != 0:
            raise refuse("epsilon", "be one number", f"has shape {jnp.shape(self.epsilon)}")
        check_positive("epsilon", self.epsilon)
        check_positive("threshold", self.threshold)
        check_positive_int("max_iterations", self.max_iterations)

    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        x, y = recentred(x, y)
        across, within_x, within_y = self._entropic(x, y), self._entropic(x, x, symmetric=True), self._entropic(y, y, symmetric=True)
        answer = solution(across.squared - within_x.squared / 2 - within_y.squared / 2)
        return Solution(answer.squared, answer.converged & across.converged & within_x.converged & within_y.converged)

    def map(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n d"]:
        """The mean partner of each member of x under the plan of OT_ε (barycentric). Between x and itself this is not the identity but a
        contraction of the size of ε; the difference of two maps from one x is free of it to first order. Shape (n, d).

        **Differentiation:** forward and reverse, implicitly through the potential; one dense (m, m) linear system.
        """
        center = jnp.mean(x, axis=0)
        cost = _cost(x - center, y - center)
        epsilon = self.epsilon.astype(cost.dtype)
        potential, _ = _potential(cost, epsilon, self.threshold, self.max_iterations, symmetric=False)
        return product(jax.nn.softmax((potential - cost) / epsilon, axis=1), y)

    def _entropic(self, x: Float[Array, "n d"], y: Float[Array, "m d"], symmetric: bool = False) -> Solution:
        cost = _cost(x, y)
        epsilon = self.epsilon.astype(cost.dtype)
        potential, converged = _potential(cost, epsilon, self.threshold, self.max_iterations, symmetric)
        return Solution(_semi_dual(potential, cost, epsilon), converged)


def _cost(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """|x_i - y_j|² by expansion, for clouds about the origin."""
    return jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1) - 2 * product(x, y.T)


def _soft_min(cost: Float[Array, "n m"], epsilon: Scalar) -> Float[Array, " n"]:
    """-ε log of the mean over j of exp(-cost_ij/ε)."""
    return -epsilon * (jax.nn.logsumexp(-cost / epsilon, axis=1) - math.log(cost.shape[1]))


def _dual(g: Float[Array, " m"], cost: Float[Array, "n m"], epsilon: Scalar) -> Scalar:
    return jnp.mean(g) + jnp.mean(_soft_min(cost - g, epsilon))


@jax.custom_jvp
def _semi_dual(g: Float[Array, " m"], cost: Float[Array, "n m"], epsilon: Scalar) -> Scalar:
    """OT_ε = max_g mean_j g_j + mean_i softmin_j(cost_ij - g_j), for g at the maximum."""
    return _dual(g, cost, epsilon)


@_semi_dual.defjvp
def _(primals, tangents):
    # At the maximum the derivative in g is zero: saying so spares a first derivative the linear solve behind dg; a second one has it.
    _, dcost, depsilon = tangents
    g, cost, epsilon = primals
    return jax.jvp(lambda cost, epsilon: _dual(g, cost, epsilon), (cost, epsilon), (dcost, depsilon))


def _potential(
    cost: Float[Array, "n m"], epsilon: Scalar, threshold: float, max_iterations: int, symmetric: bool
) -> tuple[Float[Array, " m"], Array]:
    """The g that maximises the semi-dual, of mean 0, and whether it was reached: the iterations are ott's, the derivative is implicit."""
    pieces = ott()
    # Between a cloud and itself the two potentials are one, and half a step of both at a time finds it in tens of iterations; taking turns
    # stalls where ε is below the spacing of the members.
    turns = {"parallel_dual_updates": True, "momentum": pieces.Momentum(start=0, value=0.5)} if symmetric else {}

    def iterate(_, g):
        out = pieces.solve(pieces.Geometry(cost_matrix=cost, epsilon=epsilon), threshold=threshold, max_iterations=max_iterations, **turns)
        return (out.g - jnp.mean(out.g)).astype(g.dtype), out.converged.astype(g.dtype)  # custom_root wants floating outputs only

    def residual(g):
        # One sweep leaves g where it is, up to the constant that the last term pins.
        return g - _soft_min((cost - _soft_min(cost - g, epsilon)[:, None]).T, epsilon) + jnp.mean(g)

    def solve_tangent(linear, b):
        return jnp.linalg.solve(jax.jacobian(linear)(b), b)

    potential, converged = jax.lax.custom_root(residual, jnp.zeros_like(cost[0]), iterate, solve_tangent, has_aux=True)
    return potential, converged > 0
