r"""A finding, and the thresholds of all of them, each with its reason.

A finding is about the reliability of the numbers, not about the quality of a schedule.
"""

import dataclasses
from typing import Any

import numpy as np

# --- Thresholds on the numbers of a report --------------------------------------------------------

# One false alarm in 30 000 healthy reports, if errors are Gaussian; they are not quite, and
# jackknife errors scatter by 10 to 20 %.
VIOLATION = 4.0
# The usual schedules stay below 6 times W2² on a contracting flow; the worst of them, a decay by
# e⁵, is at 5.2.
EXTREME = 20.0
# A chain that still changes by a fifth without every second snapshot has an error of the size of
# its temporal part.
SPACING = 0.2
NOISE = 0.2
# A number that is half sampling noise has an error of its own size in every part of the split.
SAMPLING = 1.0
# A chain that keeps the partners of so many links has no bias of an assignment; at 16 members the
# debiased value was then a third of the law's Σ, and the plain one right.
FOLLOWED = 0.95
# A bias of the bend matters where it is a fifth of L².
BENT = 0.2
# Velocity and chain differ by this much by themselves: both integrate between snapshots.
DISAGREEMENT = 1.1
# The errors of both are taken over the same members, so that the larger of them overstates that of
# their difference. From above, no healthy run of 400 came within the allowance of spacing alone.
DISAGREEING = 2.0
EPSILON = 0.1
# A straight path at constant speed has no gap; by entropic transport at ε = .05 of the mean cost it
# came out up to 1.1 % of W2² below 0, and at .1 up to 2.4 % (200 members in 1, 2 and 5 dimensions
# that spread threefold).
INEXACT = 0.02
# Heating from a cold start raises E[Φ] by about d T/2, and a stable run never climbs far above its
# start.
CLIMB = 10.0

# --- Thresholds on members and snapshots ----------------------------------------------------------

# Members of a stable run stay within some ten times their typical distance from the start of the
# ensemble.
DIVERGED = 100.0
# In one link members of a stable run stay within their upper decile of distances: three times it
# for the outermost of a heated point.
LEAP = 5.0
# The outermost member over the upper quartile of distances from the mean: of 2000 draws of 64
# members from a normal law, the largest was 4.2 times it in one dimension and 2.4 times it in four;
# of a Laplace law in four, 4.4 times. A Cauchy law has 20 times, and less than 5 in 3 % of draws.
OUTERMOST, OUTERMOST_ON_A_LINE = 4.5, 5.5
# The excess falls with few members as the quartile scatters.
OUTERMOST_OF_FEW = 4.0
# A coordinate that all members share, or a twentieth of the coordinates with nearly all of Σ.
CONCENTRATED, FEW_COORDINATES = 0.95, 20
# Rounding of the stored positions that is seen in Σ.
ROUNDED = 0.02
# Changes to the next number alone, or to that after it once in three times, are no motion.
ONE_STEP = 2.0
# Rounding of a transport that is half of Σ leaves nothing of it to read.
UNRESOLVED = 0.5
# A member that comes to rest smoothly has slowed down to a few quanta before.
AT_REST = 100.0
# The relative change of the differences between members grows with the learning rate and with the
# curvature. The steepest usual warm-up, linear from 0, is a power of time and not a geometric
# sequence, and e^{1.6 s} grows fivefold.
ACCELERATION, GEOMETRIC = 30.0, 0.95


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a report. `print` shows it in one line."""

    name: str
    """Its name, always the same for the same kind of finding, such as "bound violated"."""
    evidence: str
    """The observation, with numbers: a sentence."""
    causes: tuple[str, ...]
    """The likely causes, the likeliest first."""
    change: str
    """The change to make."""

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence} Likely: {'; '.join(self.causes)}. Try: {self.change}."


def rounding(report: Any) -> float:
    """The largest gap that rounding alone can make.

    A jackknife over g groups multiplies a difference of two numbers by g - 1.
    """
    dtype = np.asarray(report.entropy_production).dtype
    amplified = 1 if report.debiased_w2_squared is None else max(report.freedom, 16)
    size = abs(float(report.entropy_production)) + abs(float(report.w2_squared))
    return 8 * float(np.finfo(dtype).eps) * amplified * size


def listed(numbers: Any, most: int = 5) -> str:
    """Return numbers as a sentence lists them, the first few by name."""
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")
