r"""The report of a run against the epistemic speed limit: its numbers, their errors and a verdict.

    Σ - W2² = housekeeping + temporal + geometric                              every term ≥ 0
      housekeeping = Σ - ∫ℓ² ds       the part of the velocity that moves no mass
      temporal     = ∫ℓ² ds - L²      uneven timing: the variance of the metric speed ℓ
      geometric    = L² - W2²         the path through the space of laws is bent

Both the exact theory (`gaussian`) and the particle estimate (`speed_limit`) return the classes of
this file, so that tests compare a number and its oracle field by field. Source: Okanohara, arXiv
2601.17607; the split as in Ikeda et al., PRX 15, 031031 (2025), Eq. 68.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import check_choice, refuse
from esljax._types import Array, Float, Scalar
from esljax.measures import diagnosis
from esljax.measures.errors import Interval, interval_of_square, quantile, spread_of_runs
from esljax.measures.evidence import Evidence
from esljax.measures.finding import VIOLATION, Finding, rounding
from esljax.measures.keys import KeyShares, shares_of
from esljax.measures.verdict import sentences
from esljax.results import StandardErrors, is_number, measured, table

# The numbers of a report that have standard errors.
NUMBERS = (
    "entropy_production",
    "entropy_production_bound",
    "length_squared",
    "w2_squared",
    "gap",
    "temporal",
    "geometric",
    "housekeeping",
    "metric_action",
    "dissipation",
    "debiased_entropy_production",
    "debiased_length_squared",
    "debiased_w2_squared",
    "debiased_dissipation",
    "debiased_gap",
    "gap_lower",
    "gap_upper",
)

# The former name of the class of `SpeedLimit.standard_error`, for one release.
Split = StandardErrors

CIRCULATION = {
    "resolved": "told apart",
    "invisible": "not seen",
    "contained": "contained in Σ and L², which is then an upper value",
}
"""What becomes of motion that moves no mass."""


class SpeedLimit(eqx.Module):
    """Σ, L² and W2² of one run, their split, errors and verdict.

    `print` shows a table; every number differentiates. Numbers have shape () and the units of θ²
    unless their field gives others. Reports of several runs made by `jax.vmap` carry the axes of
    the runs first. Nothing is clipped: a negative gap or part stays negative.
    """

    entropy_production: Scalar
    """Σ = ∫E‖v‖² ds over unit training time."""
    length_squared: Scalar
    """L², the square of the Wasserstein length L = ∫ℓ ds."""
    w2_squared: Scalar
    """W2²(q₀, q₁), the squared distance between the laws at the start and at the end."""
    housekeeping: Scalar | None
    """∫E‖v - ∇ψ‖² ds, the part of Σ that moves no mass. None where it is not resolved:
    `circulation` says what became of it."""
    dissipation: Scalar | None
    """D = ∫E‖v‖²/η ds, in units of the potential. None if the run has no learning rates."""
    learning_time: Scalar | None
    """U = ∫η ds = Σ_k η_k, in units of θ² per unit of the potential; U·D ≥ L² ≥ W2². None if the
    run has no learning rates."""
    times: Float[Array, " J"]
    """The training times at which `speed` is given, shape (J,): the middle of each link between
    snapshots; of an exact law the nodes of the integration."""
    speed: Float[Array, " J"]
    """ℓ(s), the metric speed at these times, shape (J,), in units of θ per unit of training
    time."""
    converged: Array
    """Whether every transport problem behind these numbers was solved: a boolean, shape ()."""
    elapsed: Float[Array, " J"] | None = None
    """The training time that each of `times` stands for, shape (J,), with sum 1: the length of each
    link; of an exact law the weights of the integration. So L = Σ_j speed_j · elapsed_j."""
    mobility: Float[Array, " J"] | None = None
    """The mean of η(s) = K η_k over each of these times, shape (J,), in units of θ² per unit of the
    potential and of training time. None if the run has no learning rates."""
    entropy_production_coarse: Scalar | None = None
    """The chain's Σ from every second snapshot. None if the number of links is odd."""
    noise_floor: Scalar | None = None
    """Σ_j 2d Σ_{k∈j} T_k η_k/Δs_j, with tr(MᵀM) for d in a projection M: how much injected noise
    adds to a chain in which each member is its own best partner. None if the transport pairs no
    members, the run was observed in features, or its temperatures are not known."""
    identity_fraction: Scalar | None = None
    """The share of the links, between 0 and 1, for which pairing each member with itself was
    optimal. None if the transport pairs no members."""
    entropy_production_chain: Scalar | None = None
    """The chain's Σ of the same snapshots. None if Σ itself is that of the chain."""
    debiased_entropy_production: Scalar | None = None
    """The chain's Σ without its sampling bias, which a jackknife removes from distances between
    moments, and independent halves of the members from others. None without `debias`."""
    debiased_length_squared: Scalar | None = None
    """L² without its sampling bias. None without `debias`."""
    debiased_w2_squared: Scalar | None = None
    """W2² without its sampling bias. None without `debias`."""
    debiased_dissipation: Scalar | None = None
    """The D of the chain without its sampling bias. None without `debias` or without a D."""
    entropy_production_bound: Scalar | None = None
    """A lower bound of Σ from velocities, in expectation for every fitted field: Σ is larger by the
    variance of the fit, which near the limit is most of both. None for a chain."""
    length_resolved: Array | None = None
    """Whether the squared speed stands out of its noise everywhere: a boolean, shape (). If not, L²
    is known to lie between W2² and ∫ℓ² ds and no better. None where no members left in turn, for
    errors or for `debias`; then not judged."""
    standard_error: StandardErrors | None = None
    """Standard errors under the names of the numbers, each of the shape and units of its number:
    `entropy_production`, `entropy_production_bound`, `length_squared`, `w2_squared`, `gap`,
    `temporal`, `geometric`, `housekeeping`, `metric_action`, `dissipation`,
    `debiased_entropy_production`, `debiased_length_squared`, `debiased_w2_squared`,
    `debiased_dissipation`, `debiased_gap`, `gap_lower` and `gap_upper`; None for a number that this
    report does not have. None altogether without errors: for `jackknife=0`, too few members, or an
    exact law."""
    source: str = eqx.field(static=True, default="")
    """How these numbers were made, in words, such as "a chain of 30 links in ExactTransport"."""
    errors: str = eqx.field(static=True, default="none")
    """How the standard errors were taken, in words, such as "spread over 8 independent runs";
    "none" without errors."""
    evidence: Evidence | None = None
    """The observations of the run, beside these numbers, on which `diagnose` relies. None for an
    exact law."""
    freedom: int = eqx.field(static=True, default=0)
    """The degrees of freedom of the standard errors, which set the width of `interval` through
    Student's t: the number of jackknife groups, or of runs, less one. 0 without errors."""
    bound: str = eqx.field(static=True, default="chain")
    """The side on which Σ errs. "lower": Σ lies below the truth in expectation (a fitted field
    misses part of the velocity). "upper": Σ does not lie below W2² of the same members (their own
    paths). "chain": sampling pushes Σ up, and coarse snapshots and circulation push it down.
    "none": either side."""
    worth: str = eqx.field(static=True, default="")
    """One sentence that explains `bound`, which the verdict repeats. Empty for an exact law."""
    is_bound: bool = eqx.field(static=True, default=True)
    """Whether Σ ≥ L² ≥ W2² holds for the chain by construction, because the transport is a metric.
    False for an approximate transport, for which the inequality holds only approximately."""

    circulation: str = eqx.field(static=True, default="resolved")
    """What became of motion that moves no mass. "resolved": it is `housekeeping`. "invisible": laws
    alone do not show it, and it is missing from Σ. "contained": the estimator does not tell it
    apart, and it is contained in Σ and in L², which is then an upper value."""

    def __check_init__(self):
        check_choice("circulation", self.circulation, tuple(CIRCULATION))

    def best(self, name: str) -> Any:
        """The debiased value of "entropy_production", "length_squared", "w2_squared" or
        "dissipation", or the plain one without `debias`. Σ and D from velocities need no
        debiasing."""
        by_velocity = (
            name in ("entropy_production", "dissipation")
            and self.entropy_production_chain is not None
        )
        debiased = None if by_velocity else getattr(self, f"debiased_{name}")
        return getattr(self, name) if debiased is None else debiased

    @property
    def gap(self) -> Float[Array, "*runs"]:
        """Σ - W2², the distance from the speed limit, debiased if `debias` was asked for."""
        return self.best("entropy_production") - self.best("w2_squared")

    @property
    def metric_action(self) -> Float[Array, "*runs"]:
        """∫ℓ² ds, the part of Σ that moves mass: Σ without housekeeping, where that is resolved."""
        sigma = self.best("entropy_production")
        return sigma if self.housekeeping is None else sigma - self.housekeeping

    @property
    def temporal(self) -> Float[Array, "*runs"]:
        """∫ℓ² ds - L²: the saving of a better timing along the same path."""
        return self.metric_action - self.best("length_squared")

    @property
    def geometric(self) -> Float[Array, "*runs"]:
        """L² - W2²: the saving that only another path can bring."""
        return self.best("length_squared") - self.best("w2_squared")

    @property
    def debiased_gap(self) -> Float[Array, "*runs"] | None:
        """The gap, if it is debiased. None without `debias`."""
        return None if self.debiased_w2_squared is None else self.gap

    @property
    def gap_lower(self) -> Float[Array, "*runs"] | None:
        """An estimate that errs below the gap: a Σ from below minus the plug-in W2², which sampling
        pushes up. None without `debias`."""
        if self.debiased_w2_squared is None:
            return None
        bound = self.entropy_production_bound
        return (self.best("entropy_production") if bound is None else bound) - self.w2_squared

    @property
    def gap_upper(self) -> Float[Array, "*runs"] | None:
        """An estimate that errs above the gap: the plug-in chain, plus the part that its spacing
        still hides, minus the debiased W2². None without `debias`."""
        if self.debiased_w2_squared is None:
            return None
        return self.chained + self.hidden_by_spacing - self.debiased_w2_squared

    @property
    def certificate(self) -> Float[Array, "*runs"]:
        """The larger of two numbers that Σ exceeds in expectation: its lower bound from velocities,
        if there is one, and W2² (debiased with `debias`)."""
        distance, bound = self.best("w2_squared"), self.entropy_production_bound
        return distance if bound is None else jnp.maximum(bound, distance)

    @property
    def chained(self) -> Float[Array, "*runs"]:
        """The chain's Σ, which is Σ itself unless Σ was made from velocities."""
        if self.entropy_production_chain is None:
            return self.entropy_production
        return self.entropy_production_chain

    @property
    def hidden_by_spacing(self) -> Float[Array, "*runs"]:
        """How much denser snapshots would still add to the chain's Σ, at least 0. The error of the
        chain falls as 1/J², so this is a third of the last change."""
        if self.entropy_production_coarse is None:
            return jnp.zeros_like(self.chained)
        return jnp.maximum(self.chained - self.entropy_production_coarse, 0) / 3

    @property
    def efficiency(self) -> Float[Array, "*runs"]:
        """W2²/Σ, without units; 1 at the limit."""
        return self.best("w2_squared") / self.best("entropy_production")

    @property
    def holds(self) -> bool:
        """Whether Σ ≥ W2², up to rounding and four standard errors; False if they are not finite,
        and where a transport problem was not solved, so that they say nothing.

        Near the limit an unbiased gap is negative every second time. For the report of one run,
        outside of `jit`.
        """
        if not bool(self.converged):
            return False
        errors = self.standard_error
        error = 0.0 if errors is None else VIOLATION * float(errors.gap)
        return float(self.gap) >= -max(error, rounding(self))

    def interval(self, name: str, level: float = 0.95) -> Interval:
        """Return the confidence interval of one number.

        - Of "entropy_production", "w2_squared" and their debiased values: that of a square (the
          module `errors` has the equation), about the debiased value where there is one.
        - Of "gap": symmetric about the debiased gap for a Σ from velocities with a lower bound
          beside it. With `debias=True` that of any other Σ reaches from `gap_lower` to `gap_upper`,
          each widened by its own error.
        - Of "length_squared", "temporal" and "geometric" where `length_resolved` is False: a
          bracket, from W2² ≤ L² ≤ ∫ℓ² ds and the intervals of its two ends. It covers more often
          than its level.
        - Others are symmetric about their number.

        **Args:** `name`: "entropy_production", "w2_squared" or another name in `standard_error`.
        `level`: the nominal coverage, between 0 and 1.
        **Raises:** `InputError` for an unknown name, a level outside of (0, 1), or a number without
        a standard error.
        """
        check_choice("name", name, NUMBERS)
        if not 0 < level < 1:
            raise refuse("level", "lie between 0 and 1", f"is {level}")
        errors = self.standard_error
        if errors is None or errors.get(name) is None:
            raise refuse(
                "name", "be a number that the report has a standard error of", f"is {name!r}"
            )
        width = quantile(0.5 + level / 2, self.freedom)
        if name == "length_squared" and self.debiased_length_squared is not None:
            # Halves of the members know their length less well than all of them do.
            name = "debiased_length_squared"
        if name in _UNRESOLVED and self.length_resolved is not None:
            apart, around = self._symmetric(name, width, level), self._bracket(name, level)
            clear = self.length_resolved
            return Interval(
                jnp.where(clear, apart.lower, around.lower),
                jnp.where(clear, apart.upper, around.upper),
                level,
            )
        if name.removeprefix("debiased_") in ("entropy_production", "w2_squared"):
            value, bias, error = self._square(name)
            if bias is not None:
                return interval_of_square(value, error, bias, width, level)
        return self._symmetric(name, width, level)

    def _symmetric(self, name: str, width: float, level: float) -> Interval:
        errors: Any = self.standard_error
        ends = (name, name)
        if (
            name == "gap"
            and self.entropy_production_bound is None
            and errors.get("gap_lower") is not None
        ):
            ends = ("gap_lower", "gap_upper")
        lower, upper = (jnp.asarray(getattr(self, end)) for end in ends)
        below, above = (jnp.asarray(errors.get(end)) for end in ends)
        return Interval(lower - width * below, upper + width * above, level)

    def _square(self, name: str) -> tuple[Any, Any, Any]:
        """The debiased value of a square, its bias and the error of the value; None for a bias that
        is not known."""
        errors: Any = self.standard_error
        kind = name.removeprefix("debiased_")
        by_velocity = self.entropy_production_chain is not None
        if name == "entropy_production" and by_velocity:
            bound = self.entropy_production_bound
            bias = None if bound is None else (self.entropy_production - bound) / 2
            return self.entropy_production, bias, errors.entropy_production
        value, error = getattr(self, f"debiased_{kind}"), errors.get(f"debiased_{kind}")
        plain = self.chained if kind == "entropy_production" else self.w2_squared
        if value is None or error is None:
            return None, None, None
        return value, plain - value, error

    def _bracket(self, name: str, level: float) -> Interval:
        """What W2² ≤ L² ≤ ∫ℓ² ds alone says of L² and of the parts on its two sides."""
        if name.endswith("length_squared"):
            ends = [self.interval(each, level) for each in ("w2_squared", "metric_action")]
            return Interval(
                jnp.minimum(ends[0].lower, ends[1].lower),
                jnp.maximum(ends[0].upper, ends[1].upper),
                level,
            )
        whole = self.interval("gap", level)
        moving = jnp.asarray(0.0 if self.housekeeping is None else self.housekeeping)
        upper = jnp.maximum(whole.upper - moving, 0)
        return Interval(jnp.minimum(jnp.zeros_like(upper), upper), upper, level)

    def diagnose(self, convexity: float | None = None) -> tuple[Finding, ...]:
        """Return everything that is wrong with these numbers, the most serious first.

        **Args:** `convexity`: a λ such that Φ is λ-convex, in units of the potential per θ². With
        it the sharper bound U·D ≥ (x/2)coth(x/2) W2², x = λU, is checked too (equality for a
        translation).
        **Returns:** findings, each with its evidence, its likely causes and the change to make; an
        empty tuple if nothing is wrong.
        **Raises:** `InputError` for several runs in one report.
        **Reference:** Okanohara, arXiv 2601.17607.
        """
        self._check_is_one_run()
        return diagnosis.diagnose(self, convexity)

    def by_key(self) -> KeyShares:
        """Return the share of each parameter in Σ, in W2² and in the waste Σ - W2².

        They are shares of the members' squared displacements: along the links and from the start to
        the end, between the pairs of members that an assignment found, and of the members
        themselves under a transport that pairs none. Of a projection or of features they are the
        displacements of all parameters, under the pairs found there; under velocities those of the
        chain. Labels that did not follow members were put in order before. For one run or an
        average.

        **Returns:** `KeyShares`, a tuple of `KeyShare`, the largest share of Σ first; `print` shows
        a table.
        **Raises:** `InputError` for several runs in one report, and for a run whose parameters have
        no names.

        **Example:**

            >>> import numpy as np
            >>> import esljax as esl
            >>> snapshots = np.random.default_rng(0).normal(size=(1, 8, 3)) * np.ones((5, 1, 1))
            >>> snapshots[:, :, 0] += np.linspace(0, 2, 5)[:, None]
            >>> snapshots[:, :, 2] += np.array([0, 1, 0, 1, 0])[:, None] / 4
            >>> path = esl.from_snapshots(snapshots, keys={"bias": (1,), "kernel": (1, 2)})
            >>> print(esl.speed_limit(path, transport=esl.ExactTransport()).by_key())
            key     coordinates  of Σ  of W2²  of Σ - W2²
            bias              1  80 %   100 %         0 %
            kernel            2  20 %     0 %       100 %
        """
        self._check_is_one_run()
        return shares_of(self)

    def plot(self) -> Any:
        """Draw the split of Σ as a bar, and the metric speed over training time.

        **Returns:** a `matplotlib.figure.Figure`; `esljax.figures.plot_speed_limit` draws several
        reports beside each other.
        **Raises:** `InputError` for several runs in one report.

        **Example:**

            >>> import jax
            >>> import esljax as esl
            >>> start = jax.random.normal(jax.random.key(0), (8, 2))
            >>> path = esl.simulate(
            ...     esl.Quadratic(1.0), esl.Langevin(0.1), start, steps=20, key=jax.random.key(1)
            ... )
            >>> figure = esl.speed_limit(path, transport=esl.GaussianTransport()).plot()
            >>> len(figure.axes)
            2
        """
        # Imported here, because matplotlib takes longer to import than most reports to compute.
        from esljax.figures import plot_speed_limit

        self._check_is_one_run()
        return plot_speed_limit({"run": self})

    def verdict(self) -> str:
        """Return the result in words, in three lines.

        The number that can be trusted and what it is a number of; where the waste is and what would
        remove it; and what the numbers are worth.
        """
        if not _is_one_run(self):
            return "Several runs in one report: index or average them before asking for a verdict."
        return "\n".join(sentences(self))

    def __str__(self) -> str:
        if not _is_one_run(self):
            return repr(self)
        lines = [
            f"speed limit by {self.source}; standard errors: {self.errors}; units of θ²",
            table(_rows(self)),
            self.verdict(),
        ]
        return "\n".join(lines)

    def _check_is_one_run(self) -> None:
        if not _is_one_run(self):
            raise refuse(
                "report",
                "be of one run or an average, with known values",
                "holds several or is being traced",
            )


def numbers(report: SpeedLimit) -> dict[str, Array | None]:
    """The numbers of a report that have standard errors, by name."""
    return {name: getattr(report, name) for name in NUMBERS}


def with_errors(
    report: SpeedLimit, errors: dict[str, Array | None], words: str, freedom: int
) -> SpeedLimit:
    """The same report with standard errors, a phrase that describes how they were taken, and
    their degrees of freedom."""
    return dataclasses.replace(
        report, standard_error=StandardErrors(errors), errors=words, freedom=freedom
    )


def average(reports: SpeedLimit) -> SpeedLimit:
    """The mean of independent runs, with standard errors from their spread.

    **Args:** `reports`: stacked on a leading axis of length R ≥ 2.
    """
    runs = reports.entropy_production.shape[0]
    mean = jax.tree.map(
        lambda x: jnp.all(x, axis=0) if x.dtype == bool else jnp.mean(x, axis=0), reports
    )
    errors = jax.tree.map(spread_of_runs, jax.vmap(numbers)(reports))
    return with_errors(mean, errors, f"spread over {runs} independent runs", runs - 1)


def _is_one_run(report: SpeedLimit) -> bool:
    return is_number(report.entropy_production)


# --- The printed table ----------------------------------------------------------------------------

_UNRESOLVED = ("length_squared", "debiased_length_squared", "temporal", "geometric")


def _rows(report: SpeedLimit) -> list[tuple[str, str]]:
    """The headline, each number in its best version; then what stands behind it."""
    debiased = report.debiased_w2_squared is not None
    by_velocity = report.entropy_production_chain is not None
    prefix = "debiased_" if debiased else ""
    sigma = "entropy_production" if by_velocity else f"{prefix}entropy_production"
    dissipation = "dissipation" if by_velocity else f"{prefix}dissipation"
    known = [
        ("entropy production Σ", sigma),
        ("Wasserstein length L²", f"{prefix}length_squared"),
        ("Wasserstein distance W2²", f"{prefix}w2_squared"),
        ("gap Σ - W2²", "gap"),
        ("  housekeeping", "housekeeping"),
        ("  temporal", "temporal"),
        ("  geometric", "geometric"),
        ("efficiency W2²/Σ", "efficiency"),
        ("dissipation D (units of the potential)", dissipation),
        ("learning time U (θ² per unit of the potential)", "learning_time"),
        ("Σ at least, in expectation", "certificate"),
        ("lower bound of Σ", "entropy_production_bound"),
        ("Σ of the chain", "entropy_production_chain"),
        ("Σ of the chain, debiased", "debiased_entropy_production" if by_velocity else ""),
        ("Σ of the chain, plug-in", "entropy_production" if debiased and not by_velocity else ""),
        ("L², plug-in", "length_squared" if debiased else ""),
        ("W2², plug-in", "w2_squared" if debiased else ""),
        ("Σ, every 2nd snapshot", "entropy_production_coarse"),
        ("noise floor of Σ", "noise_floor"),
        ("links in which members pair with themselves", "identity_fraction"),
    ]
    return [
        (label, _cell(report, name))
        for label, name in known
        if name and (name == "housekeeping" or getattr(report, name) is not None)
    ]


def _cell(report: SpeedLimit, name: str) -> str:
    errors = StandardErrors({}) if report.standard_error is None else report.standard_error
    value = getattr(report, name)
    if value is None:
        return "not resolved"
    plug_in = name == "length_squared" and report.debiased_length_squared is not None
    unclear = report.length_resolved is not None and not report.length_resolved
    if name in _UNRESOLVED and unclear and not plug_in:
        if report.standard_error is None:
            return "not resolved"
        within = report.interval(name)
        return f"not resolved, within [{float(within.lower):.4g}, {float(within.upper):.4g}]"
    return measured(value, errors.get(name))
