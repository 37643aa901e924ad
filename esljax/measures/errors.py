r"""Standard errors and the bias of sampling by a jackknife over the members, and intervals.

Disjoint groups of m members leave in turn, g groups in all. With f of all members and f_i of the
members without group i,

    var f ≈ (g-1)/g Σ_i (f_i - f̄)²,     bias of f ≈ (g-1)(f̄ - f)

for any smooth f of means over the members. A square θ = ‖μ‖² of a mean μ, such as a squared
distance between moments or the σ of a fitted field, comes out too large by its bias b when it is
computed from the sample mean, and that variance holds 4θτ² + 4bτ², where the variance of the
debiased square is 4θτ² + 2bτ² (Efron and Stein, Ann. Statist. 9, 586 (1981)). Near θ = 0 the second
term is all there is, and a symmetric interval of a variance that vanishes with the estimate would
miss the truth. So the interval solves

    (θ̂ - θ)² = t² R (θ + b/2),    R = 4τ²

for θ, as Wilson's interval does for a share. **Reference:** Shao and Wu, Ann. Statist. 17 (1989).
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._numerics import power_of_two, safe_divide, safe_root
from esljax._types import Array, Float, Int


class Interval(eqx.Module):
    """A confidence interval of one number. `print` shows its ends and its level."""

    lower: Float[Array, "*runs"]
    """The lower end, in the units of the number."""
    upper: Float[Array, "*runs"]
    """The upper end, in the units of the number."""
    level: float = eqx.field(static=True)
    """The nominal probability that the interval covers the true number, between 0 and 1."""

    def __str__(self) -> str:
        return f"[{float(self.lower):.6g}, {float(self.upper):.6g}] at {100 * self.level:g} %"


class Groups(NamedTuple):
    """Disjoint groups of members that leave in turn."""

    kept: Int[np.ndarray, "groups kept"]
    """The members that stay without each group."""
    size: int
    """The members of a group."""
    covered: int
    """The members, from the first on, that belong to some group; a last few may belong to none."""

    @property
    def count(self) -> int:
        """g, the number of groups."""
        return self.kept.shape[0]


def jackknife_groups(members: int, most: int, *, unit: int = 1, least: int = 2) -> Groups | None:
    """The groups of members that leave in turn, at most `most` of them: those that hold the most
    members, and of these the most groups.

    **Args:** `unit`: the size of a group is a multiple of it. `least`: how many members must stay.
    **Returns:** None if there are not two groups, or if too few members would stay.
    """
    if most < 2:
        return None
    # The least that makes at most so many groups of all members, or two groups in any case.
    least_size = min(-(-members // (most * unit)), max(members // (2 * unit), 1)) * unit
    # Groups a little larger that hold every member, if there are any; else perhaps smaller ones.
    sizes = range(least_size, least_size + least_size // 2 + 1, unit)
    near = [size for size in (least_size, least_size - unit) if size > 0]
    size = next(
        (size for size in sizes if members % size == 0),
        max(near, key=lambda size: (min(members // size, most) * size, -size)),
    )
    count = min(members // size, most)
    covered = count * size
    if count < 2 or covered - size < least:
        return None
    everyone = np.arange(covered)
    kept = [np.delete(everyone, slice(i * size, (i + 1) * size)) for i in range(count)]
    return Groups(np.stack(kept), size, covered)


def jackknife_variance(
    replicates: Float[Array, "groups *rest"], groups: Groups, members: int
) -> Float[Array, " *rest"]:
    """The variance of a number of all members, from its values without each group."""
    g = groups.count
    spread = jnp.sum((replicates - jnp.mean(replicates, axis=0)) ** 2, axis=0)
    # The members in no group have left every replicate.
    return (g - 1) / g * groups.covered / members * spread


def jackknife_bias(
    whole: Float[Array, " *rest"], replicates: Float[Array, "groups *rest"], groups: Groups
) -> Float[Array, " *rest"]:
    """The bias of a number of the members that are covered by groups."""
    return (groups.count - 1) * (jnp.mean(replicates, axis=0) - whole)


def interval_of_square(
    value: Float[Array, "*runs"],
    error: Float[Array, "*runs"],
    bias: Float[Array, "*runs"],
    width: float,
    level: float,
) -> Interval:
    """The interval of a debiased square: both ends solve (θ̂ - θ)² = t² R (θ + b/2).

    Where no θ does, it is symmetric: a zero width would claim that the value is exact.

    **Args:** `error`: the standard error of `value`. `bias`: what was taken off. `width`: t.
    """
    # Of numbers near the ends of their type the squares are none.
    unit = power_of_two(jnp.maximum(jnp.maximum(jnp.abs(value), error), jnp.abs(bias)))
    value, error, bias = (x / unit for x in (value, error, bias))
    half = jnp.maximum(bias, 0) / 2
    rate = width**2 * safe_divide(error**2, jnp.maximum(value, 0) + half)
    middle, square = value + rate / 2, rate * (value + half) + rate**2 / 4
    # A value so far below 0 that no square explains it has no such ends.
    solvable, reach = square > 0, safe_root(square)
    middle, reach = jnp.where(solvable, middle, value), jnp.where(solvable, reach, width * error)
    return Interval(unit * (middle - reach), unit * (middle + reach), level)


def quantile(probability: float, freedom: int) -> float:
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


def spread_of_runs(x: Float[Array, "runs *rest"]) -> Float[Array, " *rest"]:
    """The standard error of a mean over runs."""
    return jnp.std(x, axis=0, ddof=1) / np.sqrt(x.shape[0])


def resolved_squares(squares: Float[Array, " J"], variances: Float[Array, " J"]) -> Array:
    """Whether every squared speed stands out of its noise: a boolean.

    A root of a square below two standard errors is mostly the root of noise.
    """
    return jnp.all(squares > 2 * jnp.sqrt(jnp.maximum(jax.lax.stop_gradient(variances), 0)))
