r"""The limit that one observable sets to Σ: no density, no transport, two means.

    E‖v‖² ≥ (dE[r]/ds)²/E‖∇r‖²    for every function r, because dE[r]/ds = E[v·∇r]

Equality holds where v is a multiple of ∇r in every place: for r = Φ along gradient flow without
noise. Over the links between snapshots, with the mean of E‖∇r‖² over each of them,

    Σ ≥ Σ_j (E[r]_{j+1} - E[r]_j)²/(Δs_j · mean_j E‖∇r‖²)

The mean over a link is taken from its two ends, a trapezoid: where E‖∇r‖² is convex in s, as where
forces fade, that is too large and the limit too low, by a share that falls as the square of Δs_j.
Source: the Cauchy-Schwarz inequality.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import check_kind, check_positive_int, door, known, refuse
from esljax._numerics import safe_divide, safe_root
from esljax._types import Array, Float, Scalar
from esljax.measures.errors import jackknife_bias, jackknife_groups, jackknife_variance
from esljax.potentials import AbstractPotential, check_potential
from esljax.results import measured
from esljax.sharding import replicate
from esljax.simulation import Trajectory


class ObservableLimit(eqx.Module):
    """What the change of one observable proves of Σ. `print` shows it with its error."""

    value: Scalar
    """The least Σ that moves the observable so, shape (), in units of θ²: a lower bound of Σ, in
    expectation."""
    error: Scalar | None
    """Its standard error, by a jackknife over the members; None without one."""
    links: Float[Array, " J"]
    """The share of each link between snapshots, shape (J,), with sum `value`."""

    def __str__(self) -> str:
        if not known(self.value):
            return repr(self)
        value = measured(self.value, self.error, digits=4)
        return f"The change of the observable alone takes Σ ≥ {value}."


@door
def observable_limit(
    trajectory: Trajectory, observable: AbstractPotential, *, jackknife: int = 32
) -> ObservableLimit:
    """Return the least Σ that changes the mean of an observable as a run did.

    **Args:**
    - `trajectory`: one run, of positions.
    - `observable`: r, a function of a member: the Φ of the run, or `FromFunction(r)`. One that
      moves is held along each link as it is in the middle of it.
    - `jackknife`: the most groups of members left out for the error, and for the bias of sampling;
      0 for neither.

    **Returns:** `ObservableLimit`.
    **Raises:** `InputError` for features, several runs, and what is no potential.
    **Differentiation:** in the positions, whose ∇r is then differentiated once more.
    **Reference:** the Cauchy-Schwarz inequality; Okanohara, arXiv 2601.17607, for Σ.

    **Example:** along gradient flow, the loss proves all of Σ.

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> hill = esl.Quadratic(1.0)
        >>> start = jnp.linspace(1.0, 2.0, 8)[:, None]
        >>> rule, key = esl.Langevin(0.01), jax.random.key(0)
        >>> path = esl.simulate(hill, rule, start, steps=100, snapshots=20, key=key)
        >>> report = esl.speed_limit(path, transport=esl.ExactTransport())
        >>> limit = esl.measures.observable_limit(path, hill)
        >>> round(float(limit.value / report.entropy_production), 2)
        1.0
    """
    check_kind("trajectory", trajectory, Trajectory, "be one run")
    if trajectory.positions.ndim != 3 or trajectory.observed or trajectory.folded is not None:
        must = "be one run of positions, shape (J+1, n, d)"
        raise refuse("trajectory", must, f"is a {trajectory}")
    check_potential("observable", observable)
    check_positive_int("jackknife", jackknife, 0)
    return _limit(trajectory.placed, observable, jackknife)


@eqx.filter_jit
def _limit(trajectory: Trajectory, observable: Any, jackknife: int) -> ObservableLimit:
    times, members = trajectory.times, trajectory.positions.shape[1]
    elapsed = jnp.diff(times)
    change, squares = _of_members(trajectory, observable)

    def over(of_members: Any) -> Array:
        """The share of each link, from the changes and the squared gradients of some members."""
        change, squares = (jnp.mean(x, axis=1) for x in of_members)
        return safe_divide(change**2, elapsed * squares)

    links, error = over((change, squares)), None
    groups = jackknife_groups(members, jackknife)
    if groups is not None:
        parts = jax.lax.map(lambda kept: over((change[:, kept], squares[:, kept])), groups.kept)
        whole = over((change[:, : groups.covered], squares[:, : groups.covered]))
        links = links - jackknife_bias(whole, parts, groups)
        error = safe_root(jackknife_variance(jnp.sum(parts, axis=1), groups, members))
    limit = ObservableLimit(jnp.sum(links), error, links)
    return replicate(limit, trajectory.mesh)


def _of_members(trajectory: Trajectory, observable: Any) -> tuple[Array, Array]:
    """The change of r and the mean of ‖∇r‖² along each link for each member, shapes (J, n)."""

    def at(moment: tuple[Array, Array]) -> tuple[Array, Array]:
        s, positions = moment
        values, slopes = jax.vmap(jax.value_and_grad(observable.at(s).energy))(positions)
        return values, jnp.sum(slopes**2, axis=1)

    times, positions = trajectory.times, trajectory.positions
    if not observable.moves:
        values, squares = jax.lax.map(at, (times, positions))
        return jnp.diff(values, axis=0), (squares[1:] + squares[:-1]) / 2
    middle = (times[1:] + times[:-1]) / 2
    (before, left), (after, right) = (
        jax.lax.map(at, (middle, ends)) for ends in (positions[:-1], positions[1:])
    )
    return after - before, (left + right) / 2
