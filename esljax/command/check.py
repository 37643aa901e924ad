"""`esljax check`: reference numbers of the theory, recomputed by the public functions.

Every row names a number by its label among the reference numbers of docs/theory.md, gives its
printed digits, and computes it with the package. A number agrees if it is within half a unit of its
last printed digit. Rows that hold exactly, or that a discretization limits, have a relative
tolerance of their own. Everything is computed in float64. Rows marked ∇ divide the slope of a
transport by automatic differentiation by the same slope by central differences.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import rich.table

from esljax import gaussian
from esljax._types import Array, Float, Scalar, ScalarLike
from esljax.command.streams import legible, print_whole
from esljax.experiment import enable
from esljax.measures import SpeedLimit, speed_limit
from esljax.potentials import Quadratic
from esljax.schedules import AbstractSchedule, Constant, Cosine, Exponential, Knots, Linear
from esljax.simulation import Langevin, Trajectory, simulate
from esljax.transport import (
    AbstractTransport,
    ExactTransport,
    GaussianTransport,
    MappedTransport,
    ProjectedTransport,
    SinkhornTransport,
    SlicedTransport,
)


@dataclasses.dataclass(frozen=True)
class Check:
    """One reference number and how the package computes it."""

    name: str
    """The label in the theory, such as "O3"."""
    what: str
    """The quantity, in words."""
    reference: float
    """Its value."""
    tolerance: float
    """The largest relative error that passes."""
    compute: Callable[[], ScalarLike]
    """Computes it with the package; called with 64-bit numbers enabled."""


def run_checks(*, quiet: bool = False) -> bool:
    """Compute every row of `CHECKS` and print it beside its reference.

    Double precision is enabled for the run, and the precision of before is restored afterwards.

    **Args:** `quiet`: print failures only.
    **Returns:** whether all rows agree. A value that is not finite, or a computation that fails,
    does not agree.
    """
    console = rich.console.Console()
    table = rich.table.Table(
        title="Reference numbers, computed through the public functions",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    for heading, justify in _COLUMNS.items():
        table.add_column(heading, justify=justify, no_wrap=True)
    failures, troubles = 0, []
    before = jax.config.read("jax_enable_x64")
    enable("float64")
    try:
        for check in rich.progress.track(
            CHECKS, "checking", console=console, transient=True, disable=quiet
        ):
            cells, agrees, trouble = _row(check)
            failures += not agrees
            troubles += trouble
            if not (quiet and agrees):
                cells = map(legible, cells)
                table.add_row(*cells, style=None if agrees else "bold red")
    finally:
        enable("float64" if before else "float32")
    if table.row_count:
        print_whole(console, table)
    for trouble in troubles:
        console.print(trouble, markup=False, highlight=False, soft_wrap=True)
    if not quiet:
        verdict = "All agree." if not failures else f"{failures} of them do not agree."
        console.print(f"{len(CHECKS)} reference numbers. {verdict}", highlight=False)
    return failures == 0


# Narrow enough for 80 columns; errors are relative.
_COLUMNS: dict[str, Literal["left", "right"]] = {
    "label": "left",
    "what": "left",
    "reference": "right",
    "computed": "right",
    "error": "right",
    "allowed": "right",
    "": "left",
}


def _row(check: Check) -> tuple[tuple[str, ...], bool, list[str]]:
    """The cells of a row, whether it agrees, and the error if it cannot be computed."""
    trouble = []
    try:
        value = float(check.compute())
    except Exception as exception:  # the other rows help to find the fault of the installation
        computed, error, agrees = "none", "", False
        trouble = [
            f"{check.name}, {check.what}: {type(exception).__name__}: {exception}".splitlines()[0]
        ]
    else:
        relative = abs(value / check.reference - 1)
        computed, error, agrees = f"{value:.9g}", f"{relative:.1e}", relative <= check.tolerance
    verdict = "pass" if agrees else "FAIL"
    return (
        (
            check.name,
            check.what,
            f"{check.reference:.9g}",
            computed,
            error,
            f"{check.tolerance:.1e}",
            verdict,
        ),
        agrees,
        trouble,
    )


# --- The rows -------------------------------------------------------------------------------------


def _printed(name: str, what: str, digits: str, compute: Callable[[], ScalarLike]) -> Check:
    """A row with a tolerance of half a unit of the last printed digit.

    A little is added, because both sides are rounded.
    """
    unit = 10.0 ** int(Decimal(digits).as_tuple().exponent)
    return Check(name, what, float(digits), 0.501 * unit / float(digits), compute)


def _ornstein_uhlenbeck(d: int, mobility: AbstractSchedule, steps: int = 1) -> SpeedLimit:
    """Φ = |θ|²/2, T = .1, start N(2 e₁, I)."""
    return gaussian.speed_limit(
        _start(d), Quadratic(1.0), Langevin(_Clock.of(mobility), 0.1), steps=steps
    )


def _start(d: int) -> gaussian.Law:
    return gaussian.Law(2 * np.eye(d)[0], np.eye(d))


class _Clock(AbstractSchedule):
    """Σ_i w_i schedule_i, with one weight 1 and the others 0.

    One class for all mobilities, so that they share one compilation.
    """

    weights: Float[Array, " c"]
    parts: tuple[AbstractSchedule, ...]

    @staticmethod
    def of(mobility: AbstractSchedule) -> "_Clock":
        parts = (
            Constant(1.0),
            Linear(1.0, 1.0),
            Cosine(1.0),
            Exponential(1.0, 1.0),
            Knots(np.ones(_KNOTS)),
        )
        parts = tuple(mobility if isinstance(mobility, type(part)) else part for part in parts)
        return _Clock(jnp.asarray([part is mobility for part in parts], float), parts)

    def __call__(self, s: ScalarLike) -> Scalar:
        return jnp.dot(self.weights, jnp.stack([part(s) for part in self.parts]))


def _o1(d: int, sigma: str, length_squared: str, w2_squared: str) -> list[Check]:
    def report():
        return _ornstein_uhlenbeck(d, Constant(0.01), steps=100)

    return [
        _printed("O1", f"Σ, d = {d}", sigma, lambda: report().entropy_production),
        _printed("O1", f"L², d = {d}", length_squared, lambda: report().length_squared),
        _printed("O1", f"W2², d = {d}", w2_squared, lambda: report().w2_squared),
    ]


def _o2(x: float, digits: str) -> Check:
    def compute():
        law = gaussian.Law([2.0], [[0.1]])
        report = gaussian.speed_limit(
            law, Quadratic(1.0), Langevin(_Clock.of(Constant(x)), 0.1), steps=1
        )
        return report.entropy_production / report.w2_squared

    return _printed("O2", f"Σ/W2², S₀ = T/k, x = {x:g}", digits, compute)


def _o3(mobility: str, make: Callable[[], AbstractSchedule], one: str, ten: str) -> list[Check]:
    return [
        _printed(
            "O3",
            f"Σ, d = {d}, η {mobility}",
            digits,
            lambda d=d: _ornstein_uhlenbeck(d, make()).entropy_production,
        )
        for d, digits in ((1, one), (10, ten))
    ]


def _o3_path(d: int, dissipation: str, w2_squared: str, length_squared: str) -> list[Check]:
    # The path is the same for every mobility; a cosine differs most from the constant of O1.
    return [
        _printed(
            "O3",
            f"D, d = {d}",
            dissipation,
            lambda: jnp.asarray(_ornstein_uhlenbeck(d, Cosine(4.0)).dissipation),
        ),
        _printed(
            "O3",
            f"W2², d = {d}",
            w2_squared,
            lambda: _ornstein_uhlenbeck(d, Cosine(4.0)).w2_squared,
        ),
        _printed(
            "O3",
            f"L², d = {d}",
            length_squared,
            lambda: _ornstein_uhlenbeck(d, Cosine(4.0)).length_squared,
        ),
    ]


# Knots between which the optimum is interpolated, which costs Σ about 1/knots².
_KNOTS = 1025


def _optimum(d: int) -> Knots:
    return gaussian.optimal_learning_rate(
        _start(d), Quadratic(1.0), temperature=0.1, learning_time=2.0, steps=1, knots=_KNOTS
    )


def _o3_optimum(d: int, digits: str) -> Check:
    def compute():
        return _ornstein_uhlenbeck(d, _optimum(d)).entropy_production

    return Check("O3", f"Σ, d = {d}, optimal η", float(digits), _KNOTS**-2.0, compute)


def _o5(time: float, sigma: str, length_squared: str, w2_squared: str) -> list[Check]:
    def report():
        # Eight more modes at rest change nothing, and reuse the compiled code of rows with d = 10.
        law = gaussian.Law(np.repeat([1.0, 0.0], [2, 8]), np.zeros((10, 10)))
        trap = Quadratic([1.0, 10.0, *np.ones(8)])
        return gaussian.speed_limit(law, trap, Langevin(_Clock.of(Constant(time)), 0.0), steps=1)

    return [
        _printed("O5", f"τΣ, τ = {time:g}", sigma, lambda: report().entropy_production),
        _printed("O5", f"L², τ = {time:g}", length_squared, lambda: report().length_squared),
        _printed("O5", f"W2², τ = {time:g}", w2_squared, lambda: report().w2_squared),
    ]


def _o12(links: int, digits: str) -> Check:
    def compute():
        path = gaussian.laws(
            _start(1), Quadratic(1.0), Langevin(1.0, 0.1), steps=1, times=jnp.linspace(0, 1, 65)
        )
        # Coarse chains repeat their snapshots, so that all rows have one shape: a law is at
        # distance 0 from itself.
        stride = 64 // links
        ends = np.arange(65) // stride * stride
        first, second = (jax.tree.map(lambda x, i=i: x[i], path) for i in (ends[:-1], ends[1:]))
        return links * jnp.sum(jax.vmap(gaussian.w2_squared)(first, second))

    return _printed("O12", f"Σ of {links} links", digits, compute)


def _o14_laws() -> float | Scalar:
    wide = np.diag([1.0, 4.0])
    return gaussian.w2_squared(
        gaussian.Law(np.zeros(2), wide), gaussian.Law(np.zeros(2), _TURN @ wide @ _TURN.T)
    )


def _o14_clouds() -> float | Scalar:
    cloud = np.sqrt(2) * np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    return GaussianTransport().squared(jnp.asarray(cloud), jnp.asarray(cloud @ _TURN.T))


_TURN = np.array([[1.0, -1.0], [1.0, 1.0]]) / np.sqrt(2)


def _o15(of: Callable[..., Scalar]) -> Callable[[], Scalar]:
    return lambda: of(gaussian.Law([0.0], [[1.0]]), gaussian.Law([1.0], [[4.0]]), epsilon=0.1)


# Members of a grid of quantiles at the middles of equal shares. It lacks the spread within the
# shares, .0032 of the variance: the distance, 1 + (2 - 1)² times the variance, is .0016 too small.
_GRID = 400


def _o15_clouds() -> float | Scalar:
    normal = statistics.NormalDist()
    z = jnp.asarray([normal.inv_cdf((i + 0.5) / _GRID) for i in range(_GRID)])[:, None]
    return SinkhornTransport(0.1, threshold=1e-6).squared(z, 1 + 2 * z)


def _gradient(name: str, make: Callable[[], AbstractTransport]) -> Check:
    def compute():
        transport, (x, y, dx, dy) = make(), (jnp.asarray(cloud) for cloud in _skewed_clouds())

        def along(transport, t):
            return transport.squared(x + t * dx, y + t * dy)

        both = eqx.filter_jit(
            lambda transport, t: jax.value_and_grad(lambda t: along(transport, t))(t)
        )
        h = jnp.asarray(1e-5)
        return both(transport, 0 * h)[1] / (
            (both(transport, h)[0] - both(transport, -h)[0]) / (2 * h)
        )

    # Central differences err by 1e-16/h and h², both below 1e-9 of a slope of order 1.
    return Check("∇", f"slope ratio, {name}", 1.0, 1e-7, compute)


def _skewed_clouds() -> list[np.ndarray]:
    """Two clouds of 12 members in 3 dimensions, and a direction for each.

    They are exponential, because a symmetric law hides wrong signs.
    """
    random = np.random.default_rng(0)
    x, y, dx, dy = random.exponential(size=(4, 12, 3)) * np.array([1.0, 0.5, 2.0])
    return [x, 1.5 * y + 0.3, dx, dy - 0.5]


def _descent(rates: Sequence[float]) -> tuple[Trajectory, SpeedLimit]:
    """Gradient descent of a skewed cloud on Φ = |θ|²/2, every step a snapshot."""
    start = jnp.asarray(_skewed_clouds()[0])
    steps, table = len(rates), Knots([*rates, rates[-1]], "linear")
    path = simulate(
        Quadratic(1.0), Langevin(table), start, steps=steps, snapshots=steps, key=jax.random.key(0)
    )
    return path, speed_limit(path, transport=ExactTransport(), jackknife=0)


def _o13() -> Scalar:
    path, report = _descent([0.1] * 10)
    energies = Quadratic(1.0)(path.positions)
    return (jnp.mean(energies[0]) - jnp.mean(energies[-1])) / report.entropy_production


def _pure_mean() -> Scalar:
    # η_j = 1/(N - j) takes every member straight to the center in N equal steps.
    _, report = _descent([1 / (10 - j) for j in range(10)])
    return report.entropy_production / report.w2_squared


CHECKS: Sequence[Check] = (
    *_o1(1, "2.04312999", "1.87917202", "1.87819069"),
    *_o1(10, "4.86733501", "4.40146852", "4.39715642"),
    _o2(0.5, "1.0207470"),
    _o2(1.0, "1.0819767"),
    _o2(2.0, "1.3130353"),
    _o2(5.0, "2.5339183"),
    _o2(10.0, "5.0004540"),
    *_o3_path(1, "2.2976266", "3.4244691", "3.4379491"),
    *_o3_path(10, "5.3059480", "7.3294684", "7.4011631"),
    *_o3("2", lambda: Constant(2.0), "4.5952533", "10.611896"),
    *_o3("4(1-s)", lambda: Linear(4.0, 0.0), "7.9919600", "18.767854"),
    *_o3("2(1+cos πs)", lambda: Cosine(4.0), "8.6114022", "20.141747"),
    *_o3(
        "∝ exp(-5s)",
        lambda: Exponential(*(10 / (1 - np.exp(-5.0)) * np.exp([0.0, -5.0]))),
        "17.965774",
        "42.634841",
    ),
    *_o3("4s", lambda: Linear(0.0, 4.0), "3.9002495", "8.5662907"),
    _o3_optimum(1, "3.4379491"),
    _o3_optimum(10, "7.4011631"),
    _printed("O3", "η*(0)", "0.84542908", lambda: _optimum(1)(0.0)),
    _printed("O3", "η*(½)", "1.4918779", lambda: _optimum(1)(0.5)),
    _printed("O3", "η*(1)", "6.7437645", lambda: _optimum(1)(1.0)),
    *_o5(1.0, "5.4323323", "1.9224652", "1.3994856"),
    *_o5(3.0, "16.496282", "2.9057372", "1.9029046"),
    _o12(1, "1.8781907"),
    _o12(2, "1.9989684"),
    _o12(4, "2.0318893"),
    _o12(8, "2.0403070"),
    _o12(16, "2.0424234"),
    _o12(64, "2.0430858"),
    Check("O13", "ΔΦ/Σ of descent, h = .1", 0.95, 1e-12, _o13),
    Check("O3", "Σ/W2², η_j = 1/(N-j)", 1.0, 1e-12, _pure_mean),
    _printed("O14", "W2² of laws", "0.94461486", _o14_laws),
    _printed("O14", "W2² of clouds", "0.94461486", _o14_clouds),
    _printed("O15", "OT_ε of laws", "2.2347565", _o15(gaussian.entropic_transport)),
    _printed("O15", "S_ε of laws", "1.9999219", _o15(gaussian.sinkhorn_divergence)),
    Check("O15", f"S_ε of {_GRID} quantiles", 1.9999219, 2e-3, _o15_clouds),
    _gradient("exact", ExactTransport),
    _gradient("Gaussian", GaussianTransport),
    _gradient("sliced", lambda: SlicedTransport(6, jax.random.key(3))),
    _gradient("Sinkhorn", lambda: SinkhornTransport(2.0, threshold=1e-11)),
    _gradient("mapped", lambda: MappedTransport(GaussianTransport(), jnp.tanh)),
    _gradient(
        "projected",
        lambda: ProjectedTransport(
            GaussianTransport(), np.array([[1.0, 0.3], [-0.5, 1.0], [0.2, 0.7]])
        ),
    ),
)
