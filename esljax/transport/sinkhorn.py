"""The Sinkhorn divergence: entropic transport without its bias, smooth in everything."""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import (
    as_float,
    check_choice,
    check_positive,
    check_positive_int,
    door,
    in_words,
    known,
    plain_int,
    refuse,
)
from esljax._numerics import power_of_two, product
from esljax._types import Array, Float, Scalar
from esljax.sharding import keep
from esljax.transport._ott import ott
from esljax.transport.base import (
    AbstractTransport,
    Solution,
    check_room,
    of_one_type,
    recentred,
    solution,
)

# Iterations between two looks at the error, which is a sum over all members: devices that share
# them would have to wait for it.
EVERY = 10

# Over-relaxation of the dual updates, with `acceleration="momentum"`.
_OVER = 1.5
_ACCELERATIONS = ("anderson", "momentum", "none")

Update: TypeAlias = Callable[[Array], Array]


def _as_threshold(x: Any) -> float:
    number = plain_int(x)
    if not isinstance(number, int | float):
        must = "be one number greater than 0, not traced by jax"
        raise refuse("threshold", must, f"is {in_words(x)}")
    return number


class SinkhornTransport(AbstractTransport):
    r"""The Sinkhorn divergence: entropic transport without its bias at x = y. Any n, m.

        S_ε(x, y) = OT_ε(x, y) - ½ OT_ε(x, x) - ½ OT_ε(y, y)
        OT_ε(x, y) = min_P Σ_ij P_ij |x_i - y_j|² + ε Σ_ij P_ij log(nm P_ij)

    It tends to W2² as ε → 0, and is no metric. Its three terms have the size of ε and of the spread
    of the clouds, so rounding leaves an error of 1e-7 of that size in float32: use a metric for the
    increments between the snapshots of a run. It may come out slightly negative and is not clipped.

    **Args:**
    - `epsilon`: ε > 0 in units of θ², a leaf of the pytree. Choose it once per run (`.05` of the
      mean squared distance is a usual start), never from the data within the run.
    - `threshold`: the iterations stop once the error of the column sums of P, in total mass, is
      below this.
    - `max_iterations`: the most iterations; a problem that needs more returns with `converged`
      False.
    - `chunk`: None holds the (n, m) costs, twice or more. A number recomputes them in every
      iteration for that many members at a time, with the same answers, in memory for two or three
      times `chunk` rows instead, so that none grows with nm. A CPU is fastest where a block stays
      in its cache, with `chunk` times m at two or three million: 256 for m = 10 000, 32 for
      100 000. An accelerator prefers more.

    - `acceleration`: of the iterations between two clouds: `"momentum"`, over-relaxation by 1.5,
      `"none"`, or, without a `chunk`, `"anderson"`, of 5 iterates, which is faster still where the
      threshold is far from rounding, and slower where it is near. Answers differ within the
      threshold.

    Over-relaxed and in blocks the potentials are found by a loop of this package, otherwise by the
    solver of ott; the derivatives are those of this package in both.

    `ProjectedTransport` makes costs cheaper where d is large. The time grows with nm either way,
    and roughly with 1/ε.

    **Raises:** `InputError` if ε or `threshold` is not positive, if `max_iterations` or `chunk` is
    not a positive integer, and for another acceleration.
    **Differentiation:** forward and reverse in x, y and ε, by the envelope theorem. Second
    derivatives solve one dense (m, m) linear system, good to m of a thousand or two, and are
    rejected with a `chunk`. The error of the gradient is of the order of `threshold`.
    **Reference:** Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn
    divergences", AISTATS 2019.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> x = jnp.array([[0.0], [2.0]])
        >>> round(float(esl.SinkhornTransport(epsilon=0.1).squared(x, x + 1.0)), 4)
        1.0
        >>> x = jnp.linspace(0.0, 1.0, 3000)[:, None]
        >>> round(float(esl.SinkhornTransport(epsilon=0.1, chunk=256).squared(x, x + 1.0)), 4)
        1.0
    """

    is_metric: ClassVar[bool] = False
    # Together, all problems iterate until the hardest is solved.
    in_turn: ClassVar[bool] = True
    of_distances: ClassVar[bool] = True
    epsilon: Scalar = eqx.field(converter=functools.partial(as_float, argument="epsilon"))
    threshold: float = eqx.field(static=True, converter=_as_threshold, default=1e-4)
    max_iterations: int = eqx.field(static=True, converter=plain_int, default=5000)
    chunk: int | None = eqx.field(static=True, converter=plain_int, default=None)
    acceleration: Literal["momentum", "anderson", "none"] = eqx.field(
        static=True, default="momentum"
    )

    def __check_init__(self):
        if jnp.ndim(self.epsilon) != 0:
            raise refuse("epsilon", "be one number", f"has shape {jnp.shape(self.epsilon)}")
        check_positive("epsilon", self.epsilon)
        if known(self.epsilon) and math.isinf(float(self.epsilon)):
            raise refuse("epsilon", "be finite", "is inf")
        least = float(jnp.finfo(self.epsilon.dtype).tiny)
        if known(self.epsilon) and float(self.epsilon) < least:
            kind = self.epsilon.dtype
            raise refuse(
                "epsilon",
                f"be at least {least:.2g}, the least number that {kind} computes with (divide the "
                "positions by their size)",
                f"is {float(self.epsilon):.2g}",
            )
        check_positive("threshold", self.threshold)
        check_positive_int("max_iterations", self.max_iterations)
        check_choice("acceleration", self.acceleration, _ACCELERATIONS)
        if self.chunk is not None:
            check_positive_int("chunk", self.chunk)
            if self.acceleration == "anderson":
                raise refuse(
                    "acceleration", "be 'momentum' or 'none' with a `chunk`", "is 'anderson'"
                )

    def in_units(self, size: Scalar) -> "SinkhornTransport":
        # One after the other: the square of the size may be no number.
        return eqx.tree_at(lambda t: t.epsilon, self, self.epsilon / size / size)

    def rounding(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Scalar:
        # Clouds that differ by a permutation, 8 to 512 members at ε of .1 to 1e6 of their spread,
        # came out a distance of .1 to 1.3 times this apart.
        x, y = recentred(x, y)
        spread = jnp.mean(jnp.sum(x**2, axis=1)) + jnp.mean(jnp.sum(y**2, axis=1))
        return float(jnp.finfo(x.dtype).eps) * (self.epsilon.astype(x.dtype) + spread)

    @door
    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        x, y = recentred(x, y)
        across, reached = _entropic(self, x, y, False)
        within_x, reached_x = _entropic(self, x, x, True)
        within_y, reached_y = _entropic(self, y, y, True)
        finite = solution(across - within_x / 2 - within_y / 2)
        return Solution(finite.squared, finite.converged & (reached * reached_x * reached_y > 0))

    @door
    def solve_costs(
        self,
        across: Float[Array, "n m"],
        within: Callable[[], tuple[Float[Array, "n n"], Float[Array, "m m"]]],
    ) -> tuple[Solution, None]:
        if self.chunk is not None:
            must = "be None where the squared distances of all members are held in any case"
            raise refuse("chunk", must, f"is {self.chunk}")
        within_x, within_y = within()
        between, reached = _entropic_of(self, across, False)
        inside_x, reached_x = _entropic_of(self, within_x, True)
        inside_y, reached_y = _entropic_of(self, within_y, True)
        finite = solution(between - inside_x / 2 - inside_y / 2)
        reached = reached * reached_x * reached_y > 0
        return Solution(finite.squared, finite.converged & reached), None

    @door
    def map(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n d"]:
        """Return the mean partner of each member of x under the plan of OT_ε, shape (n, d).

        Between x and itself this (barycentric) map is not the identity but a contraction of the
        size of ε; the difference of two maps from one x is free of it to first order.

        **Differentiation:** forward and reverse, implicitly through the potential; one dense (m, m)
        linear system. Rejected with a `chunk`.
        """
        x, y = of_one_type(x, y)
        check_room(self, max(len(x), len(y)), x.shape[1], x.dtype)
        center = jnp.mean(x, axis=0)
        near_x, near_y = x - center, y - center
        epsilon = self.epsilon.astype(x.dtype)
        g, _ = _potential(self, near_x, near_y, False)
        return _by_rows(
            lambda rows: product(jax.nn.softmax((g - _cost(rows, near_y)) / epsilon, axis=1), y),
            near_x,
            self.chunk,
        )

    def coarser(self) -> "SinkhornTransport":
        return eqx.tree_at(lambda t: t.epsilon, self, 2 * self.epsilon)

    def numbers_held(self, n: int, d: int, differentiated: bool) -> float | int:
        if self.chunk is None:
            return (11 if differentiated else 3) * n * d + 5 * n**2
        blocks = (3 if differentiated else 1.1) * n * min(n, self.chunk)
        return (17 if differentiated else 7) * n * d + blocks


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _entropic(
    transport: SinkhornTransport, x: Float[Array, "n d"], y: Float[Array, "m d"], symmetric: bool
) -> tuple[Scalar, Scalar]:
    """Return the maximum over g below, OT_ε, and 1 if it was reached or 0.

    OT_ε = max_g mean_j g_j + mean_i softmin_j(|x_i - y_j|² - g_j).
    """
    g, reached = _potential(transport, x, y, symmetric)
    return _dual(g, transport, x, y), reached


@_entropic.defjvp
@door
def _(symmetric, primals, tangents):
    # At the maximum the derivative in g is zero, so a first derivative holds g fixed. A second one
    # differentiates this rule, and g with it.
    transport, x, y = primals
    g, reached = keep(_potential(transport, x, y, symmetric))
    value, slope = jax.jvp(functools.partial(_dual, g), primals, tangents)
    return (value, reached), (slope, jnp.zeros_like(reached))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _entropic_of(
    transport: SinkhornTransport, cost: Float[Array, "n m"], symmetric: bool
) -> tuple[Scalar, Scalar]:
    """Return `_entropic` from the costs."""
    g, reached = _potential_of(transport, cost, symmetric)
    return _dual_of(g, transport, cost), reached


@_entropic_of.defjvp
@door
def _(symmetric, primals, tangents):
    transport, cost = primals
    g, reached = keep(_potential_of(transport, cost, symmetric))
    value, slope = jax.jvp(functools.partial(_dual_of, g), primals, tangents)
    return (value, reached), (slope, jnp.zeros_like(reached))


def _dual_of(
    g: Float[Array, " m"], transport: SinkhornTransport, cost: Float[Array, "n m"]
) -> Scalar:
    return jnp.mean(g) + jnp.mean(_soft_min(cost - g, transport.epsilon.astype(cost.dtype)))


def _dual(
    g: Float[Array, " m"],
    transport: SinkhornTransport,
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
) -> Scalar:
    return jnp.mean(g) + jnp.mean(
        _partner(g, x, y, transport.epsilon.astype(x.dtype), transport.chunk)
    )


def _potential(
    transport: SinkhornTransport, x: Float[Array, "n d"], y: Float[Array, "m d"], symmetric: bool
) -> tuple[Float[Array, " m"], Scalar]:
    """Return the g of mean 0 that maximizes the semi-dual, and 1 if it was reached or 0.

    Not a boolean, because derivative rules need floating outputs.
    """
    if transport.chunk is not None:
        return _potential_in_blocks(transport, x, y, symmetric)
    return _potential_of(transport, _cost(x, y), symmetric)


def _potential_of(
    transport: SinkhornTransport, cost: Float[Array, "n m"], symmetric: bool
) -> tuple[Float[Array, " m"], Scalar]:
    """Return the same from the costs."""
    epsilon = transport.epsilon.astype(cost.dtype)

    def to_f(g):
        return _soft_min(cost - g, epsilon)

    def to_g(f):
        return _soft_min(cost - f[:, None], epsilon, axis=0)

    def iterate(_, start):
        # Over-relaxed, ott looks at one of two wrong marginals alone, and stops too soon.
        if transport.acceleration == "momentum" and not symmetric:
            return _iterated(transport, to_f, to_g, cost[:, 0], symmetric)
        return _by_ott(transport, cost, symmetric)

    def residual(g):
        # One sweep leaves g unchanged, up to the constant that the last term pins.
        return g - to_g(to_f(g)) + jnp.mean(g)

    def solve_tangent(linear, b):
        return jnp.linalg.solve(jax.jacobian(linear)(b), b)

    return jax.lax.custom_root(
        residual, jnp.zeros_like(cost[0]), iterate, solve_tangent, has_aux=True
    )


def _by_ott(
    transport: SinkhornTransport, cost: Float[Array, "n m"], symmetric: bool
) -> tuple[Float[Array, " m"], Scalar]:
    """Return the same by the solver of ott. No derivative goes through this."""
    parts = ott()
    # Squares of the steps of the potentials must be numbers, so they are in a unit of their own.
    unit, kind = power_of_two(transport.epsilon.astype(cost.dtype)), cost.dtype
    epsilon = transport.epsilon.astype(kind) / unit
    cost = cost / unit
    if symmetric:
        # Between a cloud and itself the two potentials are one; see `_iterated`.
        how = {"parallel_dual_updates": True, "momentum": parts.Momentum(value=0.5)}
    else:
        fast = transport.acceleration == "anderson"
        how = {"anderson": parts.AndersonAcceleration(memory=5)} if fast else {}
        # Its extrapolation is in the default type, whatever that of the potentials is.
        cost = cost.astype(jnp.result_type(float)) if fast else cost
    solver = parts.Sinkhorn(
        threshold=transport.threshold,
        max_iterations=transport.max_iterations,
        inner_iterations=EVERY,
        **how,
    )
    geometry = parts.Geometry(cost_matrix=cost, epsilon=epsilon.astype(cost.dtype))
    found = solver(parts.LinearProblem(geometry))
    g = (unit * found.g).astype(kind)
    return g - jnp.mean(g), found.converged.astype(kind)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _potential_in_blocks(
    transport: SinkhornTransport, x: Float[Array, "n d"], y: Float[Array, "m d"], symmetric: bool
) -> tuple[Float[Array, " m"], Scalar]:
    """Return the same without a matrix: every sweep recomputes the costs."""
    epsilon = transport.epsilon.astype(x.dtype)

    def to_f(g):
        return _partner(g, x, y, epsilon, transport.chunk)

    def to_g(f):
        return _partner(f, y, x, epsilon, transport.chunk)

    return _iterated(transport, to_f, to_g, x[:, 0], symmetric)


@_potential_in_blocks.defjvp
@door
def _(symmetric, primals, tangents):
    # The implicit derivative would need the matrix. Silence would leave a second derivative without
    # one of its terms.
    raise refuse(
        "chunk",
        "be None for second derivatives and for derivatives of `map`",
        f"is {primals[0].chunk}",
    )


def _iterated(
    transport: SinkhornTransport,
    to_f: Update,
    to_g: Update,
    like_f: Float[Array, " n"],
    symmetric: bool,
) -> tuple[Float[Array, " m"], Scalar]:
    """Update each potential from the other, from f = 0, until the plan has the right marginals.

    No derivative goes through this.
    """
    epsilon = transport.epsilon.astype(like_f.dtype)
    over = 1.0 if transport.acceleration == "none" else _OVER
    # The plan of f and g, where f is the partner of g, has the column sums exp((g - g')/ε)/m, with
    # g' the partner of f. Between a cloud and itself the two potentials are one, and half a step of
    # both at a time finds it in tens of iterations; taking turns stalls where ε is below the
    # spacing of the members. The rows are then as wrong as the columns; otherwise they are exact.
    wrong = 2 if symmetric else 1

    def one(_, state):
        f, g = state
        if symmetric:
            g = g + 0.5 * (to_f(g) - g)
            return g, g
        g = g + over * (to_g(f) - g)
        return f + over * (to_f(g) - f), g

    def body(state):
        iteration, (f, g), _ = state
        f, g = jax.lax.fori_loop(0, EVERY, one, (f, g))
        after = to_f(g) if symmetric else to_g(f if over == 1 else to_f(g))
        error = wrong * jnp.mean(jnp.abs(jnp.expm1((g - after) / epsilon)))
        return iteration + EVERY, (f, g), error

    def unfinished(state):
        iteration, _, error = state
        return (iteration < transport.max_iterations) & (error > transport.threshold)

    f = jnp.zeros_like(like_f)
    start = 0, (f, jnp.zeros_like(to_g(f))), jnp.asarray(jnp.inf, like_f.dtype)
    _, (_, g), error = jax.lax.while_loop(unfinished, body, start)
    return g - jnp.mean(g), (error <= transport.threshold).astype(g.dtype)


def _partner(
    g: Float[Array, " m"],
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    epsilon: Scalar,
    chunk: int | None,
) -> Float[Array, " n"]:
    """Return the f with which the plan of f and g has the right row sums."""
    return _by_rows(lambda rows: _soft_min(_cost(rows, y) - g, epsilon), x, chunk)


def _by_rows(
    fn: Callable[[Array], Array], x: Float[Array, "n d"], chunk: int | None
) -> Float[Array, "n ..."]:
    """Return fn(x) for a function of independent rows, computed for at most `chunk` at a time.

    So is its derivative.
    """
    if chunk is None:
        return fn(x)
    n, d = x.shape
    blocks = -(-n // chunk)
    rows = -(-n // blocks)  # even blocks, so that padding adds less than one row to each
    padded = jnp.pad(x, ((0, blocks * rows - n), (0, 0))).reshape(blocks, rows, d)
    # Without the checkpoint a reverse sweep would keep the weights of every block: the matrix.
    results = jax.lax.map(jax.checkpoint(fn), padded)
    return results.reshape(-1, *results.shape[2:])[:n]


def _cost(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """|x_i - y_j|² by expansion, for clouds about the origin."""
    return jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1) - 2 * product(x, y.T)


def _soft_min(cost: Float[Array, "n m"], epsilon: Scalar, axis: int = 1) -> Float[Array, " rest"]:
    """-ε log of the mean over one axis of exp(-cost_ij/ε)."""
    return -epsilon * (jax.nn.logsumexp(-cost / epsilon, axis=axis) - math.log(cost.shape[axis]))
