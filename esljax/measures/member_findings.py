"""Findings about the members of a run, its snapshots and the numbers that hold them."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from esljax.measures import finding as at
from esljax.measures.finding import Finding, listed
from esljax.measures.keys import count_of, named


def blocking(report: Any) -> tuple[Finding, ...]:
    """Return the finding that leaves the numbers of a report nothing to say, if there is one."""
    if report.evidence is None:
        return ()
    checks = (_overflow, _underflow, _nothing, _coarse, _one_step)
    return tuple(found for check in checks for found in check(report))[:1]


def _range(report: Any) -> tuple[Any, float, float]:
    """Return the limits of the report's numbers, and the largest distance and displacement."""
    evidence = report.evidence
    kind = np.finfo(np.asarray(report.entropy_production).dtype)
    return (
        kind,
        float(np.max(np.asarray(evidence.distances, float))),
        float(np.max(np.asarray(evidence.displacements, float))),
    )


_WIDER = (
    "divide the positions by their size, or compute in float64 "
    "(jax.config.update('jax_enable_x64', True))"
)


def _overflow(report: Any) -> Iterator[Finding]:
    kind, farthest, _ = _range(report)
    whole = float(report.entropy_production) + float(report.w2_squared)
    members = report.evidence.distances.shape[-1]
    own, size = _in_own_units(report)
    # The costs of all pairs of an assignment are summed, and multiplied by the members.
    summed = (farthest / size) ** 2 * members**3 > float(kind.max)
    squared = bool(np.isfinite(own).all()) and max(own) > 0
    if squared:
        # Errors may be some hundred times their number.
        largest = np.log10(max(own)) + 2 * np.log10(size)
        squared = largest > np.log10(float(kind.max)) - 3
    if np.isfinite(farthest) and not np.isfinite(whole) and (summed or squared):
        reached = "sums of their squares"
        if squared and not summed:
            reached = f"Σ, about {_power(own[0], size)}, or its errors"
        yield Finding(
            "overflow",
            f"All members are finite, at distances up to {farthest:.3g}, but {reached} "
            f"exceed the largest {kind.dtype}, {float(kind.max):.3g}.",
            ("units in which the parameters are very large", "a run that diverged long ago"),
            _WIDER,
        )


def _underflow(report: Any) -> Iterator[Finding]:
    kind, _, fastest = _range(report)
    own, size = _in_own_units(report)
    # Below, squares have fewer digits than others.
    least = float(kind.tiny) / float(kind.eps)
    if fastest > 0 and (fastest / size) ** 2 < least:
        yield Finding(
            "underflow",
            f"Members move by up to {fastest:.3g} in a link, whose square is below "
            f"{least * size**2:.3g}, where numbers of {kind.dtype} lose their digits.",
            ("units in which the parameters are very small",),
            _WIDER,
        )
        return
    # Errors of a percent have digits of their own.
    least = float(kind.tiny) * _OF_ERRORS
    if fastest > 0 and own[0] > 0 and np.log10(own[0]) + 2 * np.log10(size) < np.log10(least):
        yield Finding(
            "underflow",
            f"Members move by up to {fastest:.3g} in a link, and Σ is about "
            f"{_power(own[0], size)}, below {least:.3g}, where numbers of {kind.dtype} and their "
            "errors lose their digits.",
            ("units in which the parameters are very small",),
            _WIDER,
        )


# Standard errors are shown down to this share of their number.
_OF_ERRORS = 1e3


def _in_own_units(report: Any) -> tuple[tuple[float, float], float]:
    """Return Σ and W2² as they were computed, and the unit of length."""
    evidence = report.evidence
    if evidence.size is None:
        return (float(report.entropy_production), float(report.w2_squared)), 1.0
    sigma, whole = (float(x) for x in evidence.own)
    return (sigma, whole), float(evidence.size)


def _power(number: float, size: float) -> str:
    """Return `number` · size² in digits, also where it is no number of any type."""
    if not (number > 0 and np.isfinite(number)):
        return f"{number:.3g}"
    whole = np.log10(number) + 2 * np.log10(size)
    exponent = int(np.floor(whole))
    return f"{10 ** (whole - exponent):.3g}e{exponent:+03d}"


def _nothing(report: Any) -> Iterator[Finding]:
    if _range(report)[2] != 0:
        return
    evidence = "All members are at the same place in every snapshot: what is not 0 is rounding."
    causes = ["one checkpoint saved many times", "learning rates of 0", "a run that had ended"]
    change = "check what was recorded"
    steps, still = report.evidence.steps, np.asarray(report.evidence.still)
    if steps is not None and not still.all():
        kind = np.asarray(report.evidence.distances).dtype
        quantum = float(report.evidence.quantum)
        evidence += (
            f" The learning rates of the {steps} steps are not 0: unless the force is, each step "
            f"is below the spacing of the positions in {kind}, about {quantum:.2g}, and is lost."
        )
        causes = [
            "learning rate times force below the spacing of the positions, so that no step changes "
            "a number",
            "members that start where the force is 0",
        ]
        change = (
            "raise the learning rate, start closer to 0, or compute in float64 "
            "(jax.config.update('jax_enable_x64', True))"
        )
    yield Finding("nothing moved", evidence, tuple(causes), change)


def _coarse(report: Any) -> Iterator[Finding]:
    """Distances that are differences of far larger numbers."""
    left = report.evidence.unresolved
    if left is None:
        return
    left, sigma = float(left), float(report.chained)
    added = float(np.sum(left / durations(report)))
    if np.isfinite(left) and not added > at.UNRESOLVED * abs(sigma):
        return
    kind = np.asarray(report.evidence.distances).dtype
    error = f"of about {left:.2g}" if np.isfinite(left) else f"beyond every {kind}"
    yield Finding(
        "ε hides the motion",
        f"At this ε rounding in {kind} leaves an error {error} in each squared distance, and with "
        f"it {'all' if not added < abs(sigma) else 'most'} of the chain's Σ, {sigma:.3g}, while "
        f"members move by up to {_range(report)[2]:.3g} in a link.",
        ("ε far above the squared distance that the ensemble travels",),
        "lower ε, or use an exact or Gaussian transport",
    )


def _one_step(report: Any) -> Iterator[Finding]:
    """Motion of which each change is one to the next number."""
    evidence = report.evidence
    if evidence.spacings is not None and 0 < float(evidence.spacings) <= at.ONE_STEP:
        kind = np.asarray(evidence.distances).dtype
        yield Finding(
            "rounded positions without motion",
            "Where a number changes from one snapshot to the next, it changes to the one beside it "
            f"or not at all: the positions as stored are {float(evidence.quantum):.3g} apart, and "
            "all of Σ is rounding.",
            (
                f"an offset that {kind} cannot resolve",
                "steps below the spacing of the positions",
                "positions saved in half precision",
            ),
            "subtract the offset before the positions are rounded, store more bits, or take fewer "
            "snapshots",
        )


def of_labels(report: Any) -> Iterator[Finding]:
    """Labels that do not follow members, and copies."""
    evidence = report.evidence
    if evidence is None or evidence.labels is None:
        return
    labels, links = evidence.labels, evidence.displacements.shape[-2]
    if int(labels.links):
        some = int(labels.astray) < int(labels.members)
        which = f"{int(labels.astray)} of {int(labels.members)}" if some else "the"
        yield Finding(
            "labels do not follow members",
            f"In {int(labels.links)} of {links} links the given order of {which} members explains "
            "nothing of their motion, and the best assignment explains it: members were put back "
            "in order, and numbers of their own paths are withheld.",
            (
                "files listed in another order at each snapshot",
                "members shuffled when they were saved, or gathered from many devices",
            ),
            "store each member at the same place in every snapshot",
        )
    distinct, members = int(labels.distinct), int(labels.members)
    if distinct < members:
        counted = "and each was measured once" if distinct > 1 else "so errors have no meaning"
        yield Finding(
            "copied members",
            f"Only {distinct} of {members} members are distinct, {counted}.",
            ("one seed used for several members", "an ensemble enlarged by repetition"),
            "give each member a seed of its own",
        )


def of_members(report: Any) -> Iterator[Finding]:
    """Members that are not finite, or far outside."""
    if report.evidence is None:
        return
    distances = np.asarray(report.evidence.distances, float)
    links = distances.shape[0] - 1
    bad = ~np.isfinite(distances)
    kind = "is not finite"
    if not bad.any():
        typical = np.median(distances)
        bad = (
            (distances > at.DIVERGED * typical) & (distances > at.DIVERGED / 10 * distances[0])
            if typical > 0
            else bad
        )
        kind = f"is over {at.DIVERGED:g} times as far from the start as is typical"
    if bad.any():
        first = int(np.argmax(bad.any(axis=1)))
        members = np.flatnonzero(bad.any(axis=0))
        steps = report.evidence.steps
        after = (
            ""
            if steps is None
            else f", after step {(first - 1) * steps // links} and by step {first * steps // links}"
        )
        yield Finding(
            "members diverged",
            f"{len(members)} of {distances.shape[1]} members (number {listed(members)}) left; the "
            f"first {kind} from snapshot {first}{after}.",
            (
                "the learning rate is above the stability limit 2/(largest curvature)",
                "the start holds members far outside",
                "NaN in the data",
            ),
            "lower the learning rate where it happened, or warm it up",
        )


def of_leaps(report: Any) -> Iterator[Finding]:
    """Members that leap farther than the ensemble reaches."""
    evidence = report.evidence
    if evidence is None:
        return
    leaps = np.asarray(evidence.displacements, float)
    reach = np.quantile(np.asarray(evidence.distances, float), 0.9)
    if not np.isfinite(leaps).all() or not reach > 0 or leaps.shape[1] < 8:
        return
    far = leaps > at.LEAP * reach
    members = np.flatnonzero(far.any(axis=0))
    # If many leap, the ensemble does.
    if len(members) and len(members) <= leaps.shape[1] // 8:
        first = int(np.argmax(far.any(axis=1))) + 1
        squares = np.asarray(evidence.distances, float)[first] ** 2
        share = squares[members].sum() / squares.sum()
        yield Finding(
            "outlying members",
            f"Member {listed(members)} leaps by {leaps.max() / reach:.3g} times the reach of the "
            f"ensemble at snapshot {first}, and holds {100 * share:.0f} % of the second moment "
            "there.",
            ("a broken checkpoint", "a spike of the loss", "other units in one file"),
            "look at these members, or leave them out",
        )


def of_tails(report: Any) -> Iterator[Finding]:
    """Starts whose second moment is that of a few members."""
    evidence = report.evidence
    if evidence is None:
        return
    start = np.asarray(evidence.distances, float)[0]
    members = len(start)
    outermost, quartile = np.max(start), np.quantile(start, 0.75)
    usual = at.OUTERMOST if evidence.coordinates > 1 else at.OUTERMOST_ON_A_LINE
    usual *= 1 + at.OUTERMOST_OF_FEW / members
    if members >= 8 and np.isfinite(outermost) and outermost > usual * quartile > 0:
        share = outermost**2 / np.sum(start**2)
        yield Finding(
            "heavy tails",
            f"At the start member {int(np.argmax(start))} is {outermost / quartile:.3g} times as "
            f"far from the mean as the upper quartile, and holds {100 * share:.0f} % of the second "
            f"moment of {members} members.",
            (
                "a law without a second moment, for which W2² and Σ do not exist",
                "one member far outside",
            ),
            "start from a law with light tails, or measure features that are bounded",
        )


def of_snapshots(report: Any) -> Iterator[Finding]:
    """Snapshots that repeat others, and members that stop all at once."""
    evidence = report.evidence
    if evidence is None:
        return
    moves = np.asarray(evidence.displacements, float)
    still = np.asarray(evidence.still) if evidence.still.ndim == 1 else np.zeros(len(moves), bool)
    distances = np.asarray(evidence.distances, float)
    links = len(moves)
    resting = (moves == 0).all(axis=1) & ~still
    if not np.isfinite(moves).all() or resting.all():
        return
    # Members that come to rest have slowed down before.
    quantum = at.AT_REST * float(evidence.quantum)
    last = links
    while last and (resting | still)[last - 1]:
        last -= 1
    if last < links and resting[last:].any() and np.median(moves[last - 1]) > quantum:
        yield Finding(
            "frozen after a snapshot",
            f"No member moves after snapshot {last} of {links}, and in the link before they moved "
            f"by {np.median(moves[last - 1]):.3g}.",
            ("the run ended there", "one checkpoint copied into all later ones"),
            f"end the run at snapshot {last}, or check the later checkpoints",
        )
    twins = [(j, j + 1) for j in range(last) if resting[j]]
    # A snapshot may also be a copy of one that is not beside it.
    places: dict[bytes, int] = {}
    for j in range(last + 1):
        earlier = places.setdefault(distances[j].tobytes(), j)
        if earlier < j - 1 and moves[earlier:j].any() and moves.shape[1] > 2:
            twins.append((earlier, j))
    if twins:
        pairs = ", ".join(f"{i} and {j}" for i, j in twins[:5])
        yield Finding(
            "identical snapshots",
            f"Snapshots {pairs} hold the same members, while these move before and after.",
            ("one checkpoint saved under two names", "a time recorded twice"),
            "leave out one of the two, or record the missing one",
        )
    stopped = (moves == 0) & ~still[:, None]
    ends = stopped[last - 1] & (moves[: last - 1] > quantum).any(axis=0)
    for member in np.flatnonzero(ends):
        begin = last - 1
        while stopped[begin - 1, member]:
            begin -= 1
        ends[member] = moves[begin - 1, member] > quantum
    if ends.any() and not ends.all():
        members = np.flatnonzero(ends)
        yield Finding(
            "frozen members",
            f"{len(members)} of {moves.shape[1]} members (number {listed(members)}) stop from one "
            "snapshot to the next, while the others move on.",
            ("runs that ended early", "checkpoints copied into later ones"),
            "leave these members out, or finish their runs",
        )


def of_times(report: Any) -> Iterator[Finding]:
    """Snapshots declared even whose links grow as a geometric sequence."""
    evidence = report.evidence
    if evidence is None or evidence.steps is not None or evidence.pace.ndim > 1:
        return
    pace = np.abs(np.asarray(evidence.pace, float))
    elapsed = durations(report)
    links = len(pace)
    if links < 8 or not np.all(pace > 0) or not np.allclose(elapsed, elapsed.mean(), rtol=1e-3):
        return
    j = np.arange(1, links + 1)
    logarithms = np.log(pace)
    geometric, power = (np.corrcoef(x, logarithms)[0, 1] for x in (j, np.log(j)))
    growth = np.exp(np.polyfit(j, logarithms, 1)[0] * (links - 1))
    if growth > at.ACCELERATION and geometric > max(at.GEOMETRIC, power):
        yield Finding(
            "times may be wrong",
            f"From link to link the differences between members change {growth ** (1 / links):.3g} "
            f"times as fast, {growth:.3g} times in all, while the snapshots are declared evenly "
            "spaced.",
            (
                "snapshots spaced logarithmically and declared even",
                "a learning rate that grows geometrically",
            ),
            "give `times`, in steps or any other unit",
        )


def of_coordinates(report: Any) -> Iterator[Finding]:
    """Coordinates that are no parameters, or that hold nearly all of Σ."""
    evidence = report.evidence
    if evidence is None:
        return
    common = np.asarray(evidence.common)
    shares = None if evidence.shares is None else np.asarray(evidence.shares, float)
    if common.any() and not common.all():
        places = np.flatnonzero(common)
        one, in_all = len(places) == 1, count_of(np.arange(len(common)), evidence)
        which = listed(places)
        if evidence.keys is not None:
            which = f"{named(places, evidence.keys)}, {count_of(places, evidence)}"
        yield Finding(
            "common coordinates",
            f"Coordinate{'' if one else 's'} {which} of {in_all} {'is' if one else 'are'} the "
            f"same for all members at every snapshot, and move{'s' * one}{_held(shares, places)}.",
            ("a step counter or a learning rate among the parameters",),
            "leave them out: they belong to no member",
        )
    if shares is None or not np.isfinite(shares).all():
        return
    order = np.argsort(-shares)
    count = int(np.searchsorted(np.cumsum(shares[order]), at.CONCENTRATED)) + 1
    if at.FEW_COORDINATES * count <= len(shares) and not common[order[:count]].all():
        places = np.sort(order[:count])
        which = f"number {listed(places)} of a member's raveled parameters"
        if evidence.keys is not None:
            which = named(places, evidence.keys)
        yield Finding(
            "few coordinates hold Σ",
            f"{count} of {len(shares)} coordinates ({which}) hold "
            f"{100 * shares[places].sum():.3g} % of the members' squared displacements.",
            (
                "parameters in different units",
                "one layer that moves far more than all others",
                "a counter or a statistic among the parameters",
            ),
            "rescale these coordinates, leave them out, or read Σ as theirs",
        )


def _held(shares: np.ndarray | None, places: np.ndarray) -> str:
    if shares is None:
        return ""
    share = 100 * shares[places].sum()
    return f" (with {share:.3g} % of the members' squared displacements)"


def of_rounding(report: Any) -> Iterator[Finding]:
    """Positions so far from 0, or stored in so few bits, that rounding moves them."""
    evidence = report.evidence
    if evidence is None:
        return
    moves = np.asarray(evidence.displacements, float)
    action = float(np.sum(np.mean(moves**2, axis=1) / durations(report)))
    added = float(evidence.rounding)
    if not added > at.ROUNDED * action:
        return
    dtype = np.asarray(evidence.distances).dtype
    yield Finding(
        "rounded positions",
        f"The positions as stored are {float(evidence.quantum):.3g} apart from the next ones, "
        f"while members move by {np.sqrt(np.mean(moves**2)):.3g} in a link: rounding adds about "
        f"{added:.3g}, {100 * added / max(action, 1e-300):.3g} %, to the members' squared "
        "displacements per time.",
        (
            f"an offset that {dtype} cannot resolve",
            "positions saved in half precision",
            "snapshots so dense that members hardly move between them",
        ),
        "subtract the offset before the positions are rounded, store more bits, or take fewer "
        "snapshots",
    )


def durations(report: Any) -> np.ndarray:
    """Return the training time of each link, from the middles of the links."""
    edges = [0.0]
    for middle in np.asarray(report.times, float):
        edges.append(2 * middle - edges[-1])
    return np.diff(edges)
