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
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import check_choice, refuse
from esljax._types import Array, Float, Int, Scalar
from esljax.measures import diagnosis
from esljax.measures.evidence import Evidence
from esljax.measures.finding import Finding
from esljax.results import StandardErrors, is_number, measured, table

# The numbers of a report that have standard errors.
NUMBERS = (
    "entropy_production",
    "length_squared",
    "w2_squared",
    "gap",
    "temporal",
    "geometric",
    "housekeeping",
    "dissipation",
    "debiased_entropy_production",
    "debiased_w2_squared",
    "debiased_gap",
    "gap_lower",
    "gap_upper",
)

# The former name of the class of `SpeedLimit.standard_error`, for one release.
Split = StandardErrors

_PRINTED = {
    "entropy production Σ": "entropy_production",
    "Wasserstein length L²": "length_squared",
    "Wasserstein distance W2²": "w2_squared",
    "gap Σ - W2²": "gap",
    "  housekeeping": "housekeeping",
    "  temporal": "temporal",
    "  geometric": "geometric",
    "dissipation D": "dissipation",
    "learning time U": "learning_time",
    "Σ of the chain": "entropy_production_chain",
    "Σ of the chain, debiased": "debiased_entropy_production",
    "W2², debiased": "debiased_w2_squared",
    "noise floor of Σ": "noise_floor",
    "Σ, every 2nd snapshot": "entropy_production_coarse",
}


class Interval(eqx.Module):
    """A confidence interval of one number. `print` shows its ends and its level."""

    lower: Scalar
    """The lower end, in the units of the number."""
    upper: Scalar
    """The upper end, in the units of the number."""
    level: float = eqx.field(static=True)
    """The nominal probability that the interval covers the true number, between 0 and 1."""

    def __str__(self) -> str:
        return f"[{float(self.lower):.6g}, {float(self.upper):.6g}] at {100 * self.level:g} %"


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
    housekeeping: Scalar
    """∫E‖v - ∇ψ‖² ds, the part of Σ that moves no mass. A chain of laws cannot see it: 0 there, and
    missing from Σ as well. An estimator without `Velocity.gradient_contributions` cannot tell it
    apart: 0 there too, and contained in Σ and L²."""
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
    """The chain's Σ with the sampling bias of each link removed by splitting the members in two.
    None without `debias`."""
    debiased_w2_squared: Scalar | None = None
    """W2² with its sampling bias removed in the same way. None without `debias`."""
    standard_error: StandardErrors | None = None
    """Standard errors under the names of the numbers, each of the shape and units of its number:
    `entropy_production`, `length_squared`, `w2_squared`, `gap`, `temporal`, `geometric`,
    `housekeeping`, `dissipation`, `debiased_entropy_production`, `debiased_w2_squared`,
    `debiased_gap`, `gap_lower` and `gap_upper`; None for a number that this report does not have.
    None altogether without errors: for `jackknife=0`, too few members, or an exact law."""
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

    @property
    def gap(self) -> Float[Array, "*runs"]:
        """Σ - W2², the distance from the speed limit."""
        return self.entropy_production - self.w2_squared

    @property
    def temporal(self) -> Float[Array, "*runs"]:
        """∫ℓ² ds - L²: the saving of a better timing along the same path."""
        return self.entropy_production - self.housekeeping - self.length_squared

    @property
    def geometric(self) -> Float[Array, "*runs"]:
        """L² - W2²: the saving that only another path can bring."""
        return self.length_squared - self.w2_squared

    @property
    def debiased_gap(self) -> Float[Array, "*runs"] | None:
        """Σ - W2², both debiased. None without `debias`."""
        if self.debiased_entropy_production is None or self.debiased_w2_squared is None:
            return None
        return self.debiased_entropy_production - self.debiased_w2_squared

    @property
    def gap_lower(self) -> Float[Array, "*runs"] | None:
        """An estimate that errs below the gap: a Σ from below minus the plug-in W2², which sampling
        pushes up. None without `debias`."""
        if self.debiased_entropy_production is None:
            return None
        below = self.bound == "lower"
        sigma = self.entropy_production if below else self.debiased_entropy_production
        return sigma - self.w2_squared

    @property
    def gap_upper(self) -> Float[Array, "*runs"] | None:
        """An estimate that errs above the gap: the plug-in chain, plus the part that its spacing
        still hides, minus the debiased W2². None without `debias`."""
        if self.debiased_w2_squared is None:
            return None
        return self.chained + self.hidden_by_spacing - self.debiased_w2_squared

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
        return self.w2_squared / self.entropy_production

    @property
    def holds(self) -> bool:
        """Whether Σ ≥ W2², up to the rounding of the two; False if they are not finite. For the
        report of one run, outside of `jit`."""
        return float(self.gap) >= -diagnosis.rounding(self)

    def interval(self, name: str, level: float = 0.95) -> Interval:
        """Return the confidence interval of one number.

        The interval of "gap" in a report with `debias=True` reaches from `gap_lower` to
        `gap_upper`, each widened by its own error; others are symmetric about their number.

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
        ends = (name, name)
        if name == "gap" and errors.get("gap_lower") is not None:
            ends = ("gap_lower", "gap_upper")
        lower, upper = (jnp.asarray(getattr(self, end)) for end in ends)
        below, above = (jnp.asarray(errors.get(end)) for end in ends)
        width = _quantile(0.5 + level / 2, self.freedom)
        return Interval(lower - width * below, upper + width * above, level)

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
        """Whether the limit holds and by how much, which numbers are bounds, and which are in
        doubt, in words."""
        if not _is_one_run(self):
            return "Several runs in one report: index or average them before asking for a verdict."
        return " ".join(_sentences(self))

    def __str__(self) -> str:
        if not _is_one_run(self):
            return repr(self)
        errors = StandardErrors({}) if self.standard_error is None else self.standard_error
        rows = [
            (label, measured(getattr(self, name), errors.get(name)))
            for label, name in _PRINTED.items()
            if getattr(self, name) is not None
        ]
        lines = [f"speed limit by {self.source}; standard errors: {self.errors}", table(rows)]
        if errors.get("gap_lower") is not None:
            lines.append(f"gap within {self.interval('gap')}")
        return "\n".join([*lines, self.verdict()])

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


def jackknife_groups(
    members: int, most: int, *, unit: int = 1, least: int = 2
) -> Int[np.ndarray, "groups kept"] | None:
    """The members that stay while each of at most `most` disjoint groups leaves in turn.

    **Args:** `unit`: the size of a group is a multiple of it. `least`: how many members must stay.
    **Returns:** a row of indices for each group; None if there are not two groups, or if too few
    members would stay.
    """
    groups = min(members // unit, most)
    size = members // groups // unit * unit if groups else 0
    if members - size < least or groups < 2:
        return None
    return np.stack(
        [np.delete(np.arange(members), np.arange(i * size, (i + 1) * size)) for i in range(groups)]
    )


def average(reports: SpeedLimit) -> SpeedLimit:
    """The mean of independent runs, with standard errors from their spread.

    **Args:** `reports`: stacked on a leading axis of length R ≥ 2.
    """
    runs = reports.entropy_production.shape[0]
    mean = jax.tree.map(
        lambda x: jnp.all(x, axis=0) if x.dtype == bool else jnp.mean(x, axis=0), reports
    )
    errors = jax.tree.map(
        lambda x: jnp.std(x, axis=0, ddof=1) / np.sqrt(runs), jax.vmap(numbers)(reports)
    )
    return with_errors(mean, errors, f"spread over {runs} independent runs", runs - 1)


def _quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t above its median, by halving the angle arctan(t/√ν).

    In that angle the law of ν whole degrees of freedom is a finite sum (Abramowitz and Stegun
    26.7.3 and 26.7.4).
    """

    def within(angle: float) -> float:
        # The probability of (-t, t): powers of the cosine, odd or even as ν is not, each (k-1)/k
        # of the last but one.
        term = math.cos(angle) if freedom % 2 else 1.0
        total = 0.0
        for k in range(3 if freedom % 2 else 2, freedom + 1, 2):
            total += term
            term *= (k - 1) / k * math.cos(angle) ** 2
        return (
            2 / math.pi * (angle + math.sin(angle) * total)
            if freedom % 2
            else math.sin(angle) * total
        )

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 2 * probability - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _is_one_run(report: SpeedLimit) -> bool:
    return is_number(report.entropy_production)


# --- The verdict, one sentence for each question -------------------------------------------------


def _sentences(report: SpeedLimit) -> list[str]:
    if not np.isfinite(float(report.entropy_production + report.gap + report.length_squared)):
        return ["No verdict: the numbers are not finite."]
    findings = [finding.name for finding in report.diagnose()]
    sentences = (
        _on_the_limit(report, "bound violated" in findings),
        _on_the_transport(report),
        _on_spacing(report),
        report.worth,
        _on_noise(report),
        _on_pairing(report),
        _on_findings(findings),
    )
    return [sentence for sentence in sentences if sentence]


def _on_the_limit(report: SpeedLimit, violated: bool) -> str:
    sigma, whole, gap = (
        float(x) for x in (report.entropy_production, report.w2_squared, report.gap)
    )
    error = None if report.standard_error is None else float(report.standard_error.gap)
    errors = f"{abs(gap) / error:.1f} standard errors" if error else ""
    comma = ", " if errors else ""
    if sigma == 0 and gap == 0:
        return "Nothing moved: Σ and W2² are both 0."
    if report.holds:
        ratio = sigma / max(whole, 1e-300)
        return f"The speed limit holds: Σ is {ratio:.3g} times W2² (gap {gap:.4g}{comma}{errors})."
    if error and not violated:
        return (
            f"The gap is negative, {gap:.4g}, but by no more than {errors}: it cannot be "
            "distinguished from 0."
        )
    return (
        f"The speed limit is violated by {-gap:.4g}{comma}{errors}: Σ and W2² do not come from one "
        "geometry, or an estimate is off."
    )


def _on_the_transport(report: SpeedLimit) -> str:
    sentences = []
    if not report.is_bound:
        sentences.append(
            "This transport is not a metric, so the inequality holds only approximately."
        )
    if not bool(report.converged):
        sentences.append("A transport problem did not converge: do not trust these numbers.")
    return " ".join(sentences)


def _on_spacing(report: SpeedLimit) -> str:
    if report.entropy_production_coarse is None:
        return ""
    name = "Σ" if report.entropy_production_chain is None else "the chain's Σ"
    change = float(report.chained - report.entropy_production_coarse)
    return (
        f"Halving the number of snapshots changes {name} by {change:.3g}, so spacing still hides "
        f"about {float(report.hidden_by_spacing):.2g}."
    )


def _on_noise(report: SpeedLimit) -> str:
    if report.entropy_production_chain is not None or report.noise_floor is None:
        return ""
    floor = float(report.noise_floor)
    if floor <= 0.05 * float(report.entropy_production):
        return ""
    # The floor belongs to links whose assignment is the identity; where members change partners
    # the noise is mostly reassigned away.
    if _paired(report) > 0.5:
        return (
            "The chain is noise-dominated: injected noise alone contributes up to "
            f"{floor:.3g} to Σ."
        )
    return (
        f"Injected noise would contribute {floor:.3g} to Σ if no member changed partners; here "
        "most links do."
    )


def _on_pairing(report: SpeedLimit) -> str:
    share = _paired(report)
    if share <= 0.5:
        return ""
    return (
        f"In {100 * share:.0f} % of the links each member is its own "
        "best partner: the numbers describe the members' paths, not a resolved density."
    )


def _on_findings(findings: list[str]) -> str:
    # The other sentences of the verdict already name these.
    named = {
        "bound violated",
        "transport did not converge",
        "noise-dominated chain",
        "n too small for d",
    }
    others = [name for name in findings if name not in named]
    return f"See diagnose() for: {', '.join(others)}." if others else ""


def _paired(report: SpeedLimit) -> float:
    """The share of the links in which each member is its own best partner; 0 if it is unknown."""
    return 0.0 if report.identity_fraction is None else float(report.identity_fraction)
