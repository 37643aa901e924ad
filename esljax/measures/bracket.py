r"""Two sides of the W2² between the laws at the start and the end of a run.

    debiased W2² of independent halves  ≲  W2²(q_0, q_1)  ≤  E‖θ(1) - θ(0)‖²

The right side is the cost of one coupling of the two laws, the members' own paths, and its sample
mean is without bias. The left side takes off a bias that is larger than what is left of it: it
tends to W2² from below, slowly for members of many coordinates, and faster modulo a symmetry.
"""

import equinox as eqx
import jax.numpy as jnp

from esljax._checks import check_kind, door, refuse
from esljax._numerics import safe_root
from esljax._types import Scalar
from esljax.measures.report import SpeedLimit
from esljax.simulation import Trajectory


class Bracket(eqx.Module):
    """Where the W2² between the laws lies. `print` shows both sides and their errors."""

    lower: Scalar
    """The debiased W2², shape (), in units of θ². It tends to the truth from below, and is no
    certified bound: its own noise moves it to both sides."""
    lower_error: Scalar | None
    """Its standard error, by a jackknife over the members or over runs; None without one."""
    upper: Scalar
    """The mean squared displacement of the members, shape (): above W2² in expectation."""
    upper_error: Scalar
    """Its standard error, over the members or over runs."""
    geometry: str = eqx.field(static=True)
    """The name of the transport of the lower side."""

    def __str__(self) -> str:
        left = f"{float(self.lower):.4g}"
        left += "" if self.lower_error is None else f" ± {float(self.lower_error):.2g}"
        right = f"{float(self.upper):.4g} ± {float(self.upper_error):.2g}"
        return (
            f"W2² between the laws lies between about {left} (debiased, in {self.geometry}; tends "
            f"to it from below) and {right} (the members' own paths; not below it in expectation)."
        )


@door
def w2_bracket(trajectory: Trajectory, report: SpeedLimit) -> Bracket:
    """Return both sides of the W2² between the laws at the start and the end of a run.

    **Args:** `trajectory`: one run, or several with positions (runs, J+1, n, d). `report`: that of
    `speed_limit(trajectory, debias=True)`, best in a `QuotientTransport`.
    **Returns:** `Bracket`, of several runs the mean with errors over the runs.
    **Raises:** `InputError` for a report that is not debiased, and for what is no run.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> x = jax.random.normal(jax.random.key(0), (2, 64, 2))
        >>> path = esl.from_snapshots(x * jax.numpy.array([1.0, 2.0])[:, None, None])
        >>> report = esl.speed_limit(path, transport=esl.ExactTransport(), debias=True)
        >>> bracket = esl.measures.w2_bracket(path, report)
        >>> bool(bracket.lower < 2 < bracket.upper)
        True
    """
    check_kind("trajectory", trajectory, Trajectory, "be a run, as simulate returns it")
    check_kind("report", report, SpeedLimit, "be what speed_limit returns")
    if report.debiased_w2_squared is None:
        raise refuse("report", "be debiased, by speed_limit(..., debias=True)", "is not")
    positions = trajectory.positions
    squares = jnp.sum((positions[..., -1, :, :] - positions[..., 0, :, :]) ** 2, axis=-1)
    # Runs, or the members of one, are independent of each other.
    independent = squares if squares.ndim == 1 else jnp.mean(squares, axis=1)
    variance = jnp.var(independent, ddof=1) / len(independent)
    errors = report.standard_error
    return Bracket(
        lower=report.debiased_w2_squared,
        lower_error=None if errors is None else errors.get("debiased_w2_squared"),
        upper=jnp.mean(squares),
        upper_error=safe_root(variance),
        geometry=report.source.partition(" in ")[2],
    )
