r"""The result of holding a run against the epistemic speed limit: the numbers, their errors, and what they are worth.

    Σ - W2² = housekeeping + temporal + geometric                                             every term ≥ 0
      housekeeping = Σ - ∫ℓ² ds       the part of the velocity that moves no mass
      temporal     = ∫ℓ² ds - L²      uneven timing: the variance of the metric speed ℓ
      geometric    = L² - W2²         the path through the space of laws is bent

Both the exact theory (`gaussian`) and the particle estimate (`speed_limit`) answer with the classes of this file, so that a number and its
oracle are compared field by field. Source: Okanohara, arXiv 2601.17607; the split as in Ikeda et al., PRX 15, 031031 (2025), Eq. 68.
"""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import check_choice, known, refuse
from esljax._types import Array, Float, Int, Scalar
from esljax.measures import diagnosis
from esljax.measures.diagnosis import Evidence, Finding


class Interval(eqx.Module):
    """A confidence interval of one number."""

    lower: Scalar
    upper: Scalar
    level: float = eqx.field(static=True)

    def __str__(self) -> str:
        return f"[{float(self.lower):.6g}, {float(self.upper):.6g}] at {100 * self.level:g} %"


class Split(eqx.Module):
    """One number for each part of a `SpeedLimit`: here the standard errors. All have the units of θ², shape () each."""

    entropy_production: Scalar
    length_squared: Scalar
    w2_squared: Scalar
    gap: Scalar
    temporal: Scalar
    geometric: Scalar
    housekeeping: Scalar
    dissipation: Scalar | None = None
    debiased_entropy_production: Scalar | None = None
    debiased_w2_squared: Scalar | None = None
    debiased_gap: Scalar | None = None
    gap_lower: Scalar | None = None
    gap_upper: Scalar | None = None


class SpeedLimit(eqx.Module):
    """Σ, L² and W2² of one run, their split, errors and verdict. `print` shows a table; every number differentiates.

    Numbers are shape (), in units of θ² where nothing else is said. Nothing is clipped: a negative gap or part stays negative.
    """

    entropy_production: Scalar
    """Σ = ∫E‖v‖² ds over unit training time."""
    length_squared: Scalar
    """L², the square of the Wasserstein length L = ∫ℓ ds."""
    w2_squared: Scalar
    """W2²(q₀, q₁)."""
    housekeeping: Scalar
    """∫E‖v - ∇ψ‖² ds. A chain of laws cannot see it and leaves it out of Σ as well; it is 0 there."""
    dissipation: Scalar | None
    """D = ∫E‖v‖²/η ds, in units of the potential; None where the learning rates are not known."""
    learning_time: Scalar | None
    """U = ∫η ds = Σ_k η_k, in units of θ² per unit of the potential. U·D ≥ L² ≥ W2². None where the learning rates are not known."""
    times: Float[Array, " J"]
    """The training times at which `speed` is given."""
    speed: Float[Array, " J"]
    """ℓ(s), the metric speed, in units of θ per unit of training time."""
    converged: Array
    """Whether every transport problem in these numbers was solved (a boolean, shape ())."""
    entropy_production_coarse: Scalar | None = None
    """Σ from every second snapshot, if their number allows it."""
    noise_floor: Scalar | None = None
    """What injected noise adds to a chain whose assignments are the identity, Σ_j 2d Σ_{k∈j} T_k η_k/Δs_j; None where it is not known."""
    identity_fraction: Scalar | None = None
    """The share of links for which pairing each member with itself was optimal."""
    entropy_production_chain: Scalar | None = None
    """The chain's Σ of the same snapshots, where Σ itself was made from velocities."""
    debiased_entropy_production: Scalar | None = None
    """The chain's Σ with the sampling bias of each link removed by splitting the members, if asked for."""
    debiased_w2_squared: Scalar | None = None
    """W2² with its sampling bias removed in the same way."""
    standard_error: Split | None = None
    """Standard errors under the same names; None if they were not asked for."""
    source: str = eqx.field(static=True, default="")
    """What made these numbers, in words."""
    errors: str = eqx.field(static=True, default="none")
    """What the standard errors are taken over, in words."""
    evidence: Evidence | None = None
    """What `diagnose` looks at besides these numbers."""
    freedom: int = eqx.field(static=True, default=0)
    """How many degrees of freedom the standard errors have."""
    bound: str = eqx.field(static=True, default="chain")
    """What Σ bounds: "lower" (below the truth in expectation), "upper" (not below W2² of the same members), "chain" or "none"."""
    worth: str = eqx.field(static=True, default="")
    """What Σ is a bound of and in which direction, in a sentence."""
    is_bound: bool = eqx.field(static=True, default=True)
    """Whether Σ ≥ L² ≥ W2² holds for these numbers by construction (a true metric) rather than approximately."""

    @property
    def gap(self) -> Float[Array, "*runs"]:
        """Σ - W2², the distance from the speed limit."""
        return self.entropy_production - self.w2_squared

    @property
    def temporal(self) -> Float[Array, "*runs"]:
        """∫ℓ² ds - L²: what a better timing along the same path would save."""
        return self.entropy_production - self.housekeeping - self.length_squared

    @property
    def geometric(self) -> Float[Array, "*runs"]:
        """L² - W2²: what only another path could save."""
        return self.length_squared - self.w2_squared

    @property
    def debiased_gap(self) -> Float[Array, "*runs"] | None:
        """Σ - W2², both debiased."""
        if self.debiased_entropy_production is None or self.debiased_w2_squared is None:
            return None
        return self.debiased_entropy_production - self.debiased_w2_squared

    @property
    def gap_lower(self) -> Float[Array, "*runs"] | None:
        """An estimate that errs below the gap: a Σ from below minus the plug-in W2², which sampling pushes up."""
        if self.debiased_entropy_production is None:
            return None
        return (
            self.entropy_production if self.bound == "lower" else self.debiased_entropy_production
        ) - self.w2_squared

    @property
    def gap_upper(self) -> Float[Array, "*runs"] | None:
        """An estimate that errs above the gap: the plug-in chain and what its spacing still hides, minus the debiased W2²."""
        if self.debiased_w2_squared is None:
            return None
        return self.chained + self.hidden_by_spacing - self.debiased_w2_squared

    @property
    def chained(self) -> Float[Array, "*runs"]:
        """The chain's Σ, which is Σ itself where no velocities made it."""
        return (
            self.entropy_production
            if self.entropy_production_chain is None
            else self.entropy_production_chain
        )

    @property
    def hidden_by_spacing(self) -> Float[Array, "*runs"]:
        """What denser snapshots would still add to the chain's Σ: its error falls as 1/J², so a third of the last change; at least 0."""
        if self.entropy_production_coarse is None:
            return jnp.zeros_like(self.chained)
        return jnp.maximum(self.chained - self.entropy_production_coarse, 0) / 3

    def interval(self, name: str, level: float = 0.95) -> Interval:
        """The confidence interval of one number.

        **Args:** `name`: "entropy_production", "w2_squared" or another field of `Split`. For "gap" the interval reaches from the estimate
        that errs below to the estimate that errs above, each widened by its own error, if both are there (`debias=True`). `level`: its
        nominal coverage, between 0 and 1.
        **Raises:** `InputError` for an unknown name, a level outside of (0, 1), or if the report has no standard errors.
        """
        check_choice("name", name, tuple(Split.__dataclass_fields__))
        if not 0 < level < 1:
            raise refuse("level", "lie between 0 and 1", f"is {level}")
        errors = self.standard_error
        if errors is None or getattr(errors, name) is None:
            raise refuse(
                "name", "be a number that the report has a standard error of", f"is {name!r}"
            )
        width = _quantile(0.5 + level / 2, self.freedom)
        if name == "gap" and errors.gap_lower is not None:
            below, above = jnp.asarray(self.gap_lower), jnp.asarray(self.gap_upper)
            return Interval(
                below - width * errors.gap_lower,
                above + width * jnp.asarray(errors.gap_upper),
                level,
            )
        value, error = getattr(self, name), getattr(errors, name)
        return Interval(value - width * error, value + width * error, level)

    @property
    def efficiency(self) -> Float[Array, "*runs"]:
        """W2²/Σ, 1 at the limit."""
        return self.w2_squared / self.entropy_production

    @property
    def holds(self) -> bool:
        """Whether Σ ≥ W2², up to the rounding of the two; False where they are not finite. Of one run, outside of jax."""
        return float(self.gap) >= -diagnosis.rounding(self)

    def diagnose(self, convexity: float | None = None) -> tuple[Finding, ...]:
        """What is wrong with these numbers: findings with evidence, likely causes and what to change; empty if nothing is.

        **Args:** `convexity`: a λ such that Φ is λ-convex, if there is one; the sharper bound U·D ≥ (x/2)coth(x/2) W2², x = λU, is then
        checked too (Okanohara, arXiv 2601.17607; equality for a translation).
        **Raises:** `InputError` for several runs in one report.
        """
        if not _is_one_run(self):
            raise refuse(
                "report",
                "be of one run or an average, with known values",
                "holds several or is being traced",
            )
        return diagnosis.diagnose(self, convexity)

    def verdict(self) -> str:
        """In words: whether the limit holds and by how much, what is a bound, and what casts doubt on the numbers."""
        if not _is_one_run(self):
            return "Several runs in one report: index or average them before asking for a verdict."
        return " ".join(_sentences(self))

    def __str__(self) -> str:
        if not _is_one_run(self):
            return repr(self)
        rows = [
            ("entropy production Σ", "entropy_production"),
            ("Wasserstein length L²", "length_squared"),
            ("Wasserstein distance W2²", "w2_squared"),
            ("gap Σ - W2²", "gap"),
            ("  housekeeping", "housekeeping"),
            ("  temporal", "temporal"),
            ("  geometric", "geometric"),
            ("dissipation D", "dissipation"),
            ("learning time U", "learning_time"),
        ]
        lines = [f"speed limit by {self.source}; standard errors: {self.errors}"]
        for label, name in rows:
            value, error = getattr(self, name), getattr(self.standard_error, name, None)
            if value is not None:
                lines.append(
                    f"{label:<26}{float(value):>14.6g}"
                    + ("" if error is None else f" ± {float(error):.2g}")
                )
        if self.entropy_production_chain is not None:
            lines.append(f"{'Σ of the chain':<26}{float(self.entropy_production_chain):>14.6g}")
        if self.debiased_w2_squared is not None:
            for label, name in (
                ("Σ of the chain, debiased", "debiased_entropy_production"),
                ("W2², debiased", "debiased_w2_squared"),
            ):
                error = getattr(self.standard_error, name, None)
                lines.append(
                    f"{label:<26}{float(getattr(self, name)):>14.6g}"
                    + ("" if error is None else f" ± {float(error):.2g}")
                )
        if self.standard_error is not None and self.standard_error.gap_lower is not None:
            lines.append(f"{'gap':<26}  within {self.interval('gap')}")
        if self.noise_floor is not None:
            lines.append(f"{'noise floor of Σ':<26}{float(self.noise_floor):>14.6g}")
        if self.entropy_production_coarse is not None:
            lines.append(
                f"{'Σ, every 2nd snapshot':<26}{float(self.entropy_production_coarse):>14.6g}"
            )
        return "\n".join([*lines, self.verdict()])


def split(report: SpeedLimit) -> Split:
    """The numbers of a report that standard errors are given for."""
    return Split(**{name: getattr(report, name) for name in Split.__dataclass_fields__})


def with_errors(report: SpeedLimit, errors: Split, words: str, freedom: int) -> SpeedLimit:
    """The same report with standard errors, what they were taken over in words, and their degrees of freedom."""
    return dataclasses.replace(report, standard_error=errors, errors=words, freedom=freedom)


def jackknife_groups(
    members: int, most: int, *, unit: int = 1, least: int = 2
) -> Int[np.ndarray, "groups kept"] | None:
    """The members that stay while each of at most `most` disjoint groups leaves in turn; None where that is no jackknife.

    **Args:** `unit`: a group has a multiple of so many members. `least`: how many must stay.
    """
    groups = min(members // unit, most)
    size = members // groups // unit * unit if groups else 0
    if members - size < least or groups < 2:
        return None
    return np.stack(
        [np.delete(np.arange(members), np.arange(i * size, (i + 1) * size)) for i in range(groups)]
    )


def average(reports: SpeedLimit) -> SpeedLimit:
    """The mean of independent runs, stacked on a leading axis of length R ≥ 2, with standard errors from their spread."""
    runs = reports.entropy_production.shape[0]
    mean = jax.tree.map(
        lambda x: jnp.all(x, axis=0) if x.dtype == bool else jnp.mean(x, axis=0), reports
    )
    errors = jax.tree.map(
        lambda x: jnp.std(x, axis=0, ddof=1) / np.sqrt(runs), jax.vmap(split)(reports)
    )
    return with_errors(mean, errors, f"spread over {runs} independent runs", runs - 1)


def concise(value: float | Array, error: float | Array) -> str:
    """Concise notation: 76.717(50) is 76.717 ± 0.050. Without an error, four digits."""
    value, error = float(value), float(error)
    if not np.isfinite(value) or not np.isfinite(error) or error <= 0:
        return f"{value:.4g}"
    digits = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:.{digits}f}({error * 10**digits:.0f})"


def _quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t above its median, by halving the angle arctan(t/√ν), in which the law of ν whole degrees of freedom is a
    finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4)."""

    def within(angle: float) -> float:
        # The probability of (-t, t): powers of the cosine, odd or even as ν is not, each (k-1)/k of the last but one.
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
    value = report.entropy_production
    return (
        isinstance(value, jax.Array | np.ndarray | np.generic | float)
        and known(value)
        and np.ndim(value) == 0
    )


def _sentences(report: SpeedLimit) -> list[str]:
    sigma, gap = float(report.entropy_production), float(report.gap)
    if not np.isfinite(sigma + gap + float(report.length_squared)):
        return ["No verdict: the numbers are not finite."]
    error = None if report.standard_error is None else float(report.standard_error.gap)
    size = "" if not error else f", {abs(gap) / error:.1f} standard errors"
    found = {finding.name: finding for finding in report.diagnose()}
    if sigma == 0 and gap == 0:
        said = ["Nothing moved: Σ and W2² are both 0."]
    elif report.holds:
        said = [
            f"The speed limit holds: Σ is {sigma / max(float(report.w2_squared), 1e-300):.3g} times W2² (gap {gap:.4g}{size})."
        ]
    elif error and "bound violated" not in found:
        said = [
            f"The gap is negative, {gap:.4g}, but by no more than {abs(gap) / error:.1f} standard errors: it cannot be told from 0."
        ]
    else:
        said = [
            f"The speed limit is violated by {-gap:.4g}{size}: Σ and W2² do not come from one geometry, or an estimate is off."
        ]
    if not report.is_bound:
        said.append("This transport is not a metric, so the inequality holds only approximately.")
    if not bool(report.converged):
        said.append("A transport problem did not converge: do not trust these numbers.")
    if report.entropy_production_coarse is not None:
        whose = "Σ" if report.entropy_production_chain is None else "the chain's Σ"
        change = float(report.chained - report.entropy_production_coarse)
        hidden = float(report.hidden_by_spacing)
        said.append(
            f"Halving the number of snapshots changes {whose} by {change:.3g}, so spacing still hides about {hidden:.2g}."
        )
    if report.worth:
        said.append(report.worth)
    if (
        report.entropy_production_chain is None
        and report.noise_floor is not None
        and float(report.noise_floor) > 0.05 * sigma
    ):
        # The floor belongs to links whose assignment is the identity; where members change partners the noise is mostly reassigned away.
        paired = report.identity_fraction is not None and float(report.identity_fraction) > 0.5
        said.append(
            f"The chain is noise-dominated: injected noise alone contributes up to {float(report.noise_floor):.3g} to Σ."
            if paired
            else f"Injected noise would contribute {float(report.noise_floor):.3g} to Σ if no member changed partners; here most links do."
        )
    if report.identity_fraction is not None and float(report.identity_fraction) > 0.5:
        said.append(
            f"In {100 * float(report.identity_fraction):.0f} % of the links each member is its own best partner: "
            "the numbers describe the members' paths, not a resolved density."
        )
    told = {
        "bound violated",
        "transport did not converge",
        "noise-dominated chain",
        "n too small for d",
    }
    serious = [finding.name for finding in found.values() if finding.name not in told]
    if serious:
        said.append(f"See diagnose() for: {', '.join(serious)}.")
    return said
