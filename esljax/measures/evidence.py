r"""The observations of a run on which a diagnosis relies, beside the numbers of its report.

They are taken inside `jit`, on the devices that hold the run, and are small beside it: a number for
each member and snapshot, and one for each coordinate. `labels` adds what only the host can see.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._numerics import power_of_two, safe_divide
from esljax._types import Array, Float, Scalar
from esljax.sharding import AnyMesh, map_pairs
from esljax.simulation import Keys, Trajectory
from esljax.transport import AbstractTransport, solution_of

# By bits of a number: its type as a whole number, and the digits of its fraction that stay 0 where
# it was once a float16, a bfloat16 or a float32.
_STORED = {32: (jnp.uint32, (13, 16)), 64: (jnp.uint64, (29, 42, 45))}


class Labels(eqx.Module):
    """What the host saw of the members' labels before anything was computed.

    A label is the place of a member in a snapshot. Numbers are counts, shape ().
    """

    links: Array
    """The links over which labels do not follow members, and were recovered."""
    distinct: Array
    """The distinct members, which alone were measured."""
    members: Array
    """The members that the run holds."""
    astray: Array
    """The most members that one snapshot held in each other's places."""
    identity_fraction: Scalar | None = None
    """The report's own number, which is withheld where labels do not follow members: paths were
    then not observed. None if it was not withheld."""


class Corrected(eqx.Module):
    """Numbers of a chain of moments without their sampling bias, which its errors know."""

    debiased_entropy_production: Scalar
    debiased_length_squared: Scalar
    debiased_w2_squared: Scalar


class Evidence(eqx.Module):
    """The observations of a run on which a diagnosis relies, beside the numbers of the report."""

    distances: Float[Array, "*runs snapshots n"]
    """The distance of each member at each snapshot from the mean of the start, shape (J+1, n), in
    units of θ; not finite where the member is not."""
    displacements: Float[Array, "*runs J n"]
    """How far each member is from where it was one snapshot before, shape (J, n), in units of θ."""
    pace: Float[Array, "*runs J"]
    """tr cov(Δ, θ)/tr cov(θ) on each link, shape (J,), without units: the relative change of the
    differences between members. Of one linear force it is the same for equal times, wherever the
    members are."""
    shares: Float[Array, "*runs d"] | None
    """The share of each coordinate in the members' squared displacements per time, shape (d,).
    None if the transport does not compare the positions themselves."""
    common: Array
    """Whether a coordinate is one number for all members at each snapshot, and moves: booleans of
    shape (d,)."""
    quantum: Scalar
    """The root mean square distance between the numbers next to each other that the positions could
    hold, shape (), in units of θ."""
    rounding: Scalar
    """How much rounding to these numbers adds to a Σ made of displacements, shape (), in units of
    θ²."""
    energies: Float[Array, "*runs snapshots"] | None
    """E[Φ] at the snapshots, shape (J+1,), in units of the potential. None for a recorded run."""
    temperature: Scalar | None
    """The highest temperature of the run, shape (), in units of the potential. None for a recorded
    run."""
    still: Array
    """Whether the learning rates of a link are 0, booleans of shape (J,); False where the rates are
    not known."""
    doubled_epsilon: Scalar | None
    """W2² at twice the ε of an entropic transport, shape (), in units of θ². None for other
    transports."""
    coordinates: int = eqx.field(static=True)
    """d, the number of coordinates that the transport compares."""
    steps: int | None = eqx.field(static=True)
    """K, the number of steps. None for a recorded run."""
    moments_only: bool = eqx.field(static=True, default=False)
    """Whether the transport compares means and covariances only."""
    spacings: Scalar | None = None
    """The mean squared change of the numbers that change in a link, shape (), in squared distances
    to the number next to them; 0 if none changes. Where it is about 1, all change is rounding."""
    unresolved: Scalar | None = None
    """How large an error rounding leaves in a squared distance of the transport, shape (), in units
    of θ². None for a transport whose error is relative."""
    size: Scalar | None = None
    """The unit in which the numbers of the report were computed, a power of two, shape (), in units
    of θ. None for a report made by hand."""
    own: tuple[Scalar, Scalar] | None = None
    """Σ and W2² in this unit squared, where no square is too large or too small for its type."""
    by_coordinate: tuple[Array, Array] | None = None
    """The parts of the coordinates in Σ and in W2², shape (d,) each, in any one unit, under the
    pairs of members that the transport found. None if `keys` are not known."""
    keys: Keys | None = eqx.field(static=True, default=None)
    """The parameters of a member by name and shape, in the order in which it is raveled."""
    sizes: tuple[int, ...] | None = eqx.field(static=True, default=None)
    """How many numbers of a member each of `keys` holds, where a fold has left other coordinates.
    None where they are those of the shapes."""
    corrected: Corrected | None = None
    """The numbers of the chain without their sampling bias, where the report does not give them
    and a jackknife over moments knows them."""
    labels: Labels | None = None
    """What the host saw of the members' labels. None if there was nothing to say, and under
    `jit`, which hides the values."""


def evidence_of(
    trajectory: Trajectory,
    transport: AbstractTransport,
    *,
    given: Trajectory | None = None,
    size: Scalar | float = 1.0,
    parts: Float[Array, "pairs d"] | None = None,
) -> Evidence:
    """Return the observations of one run. Not checked: for use inside `jit`.

    **Args:** `given`: the run itself, if `trajectory` is in units of `size`. `parts`: the squared
    displacements of the coordinates in each link, and last those from the start to the end.
    **Differentiation:** none; the observations are constants.
    """
    trajectory, given, parts = jax.lax.stop_gradient((trajectory, given, parts))
    positions, times, folded = trajectory.positions, trajectory.times, trajectory.folded
    stored = positions if given is None else given.positions
    compared = jax.eval_shape(transport.coordinates, positions)
    # In units of their own size, squares of very large or very small numbers stay numbers.
    center, scale = _center_and_scale(positions)
    scaled = (positions - center) / scale
    moves = scaled[1:] - scaled[:-1]
    elapsed = jnp.diff(times)
    apart = scaled - jnp.mean(scaled, axis=1, keepdims=True)
    squares = jnp.sum(jnp.mean(moves**2, axis=1) / elapsed[:, None], axis=0)
    # Of folded members some numbers are known as they were stored.
    held = stored if folded is None else folded.sample
    share = 1.0 if folded is None else held.shape[-1] / folded.coordinates
    quanta = _spacing(held) / size
    moved = positions if folded is None else held / size
    changes = moved[1:] - moved[:-1]
    # Of the larger of the two numbers: beside a power of two the other side is twice as dense.
    spacings = safe_divide(changes, jnp.maximum(quanta[1:], quanta[:-1])) ** 2
    rounding = _rounding(quanta, elapsed) / share
    if folded is not None:
        # The coordinates of a fold are rounded once more.
        rounding = rounding + _rounding(_spacing(positions), elapsed)
    common = jnp.all(jnp.max(stored, axis=1) == jnp.min(stored, axis=1), axis=0)
    if folded is None or trajectory.keys is None:
        common = common & (squares > 0)
    else:
        common = _in_whole_keys(common, squares > 0, trajectory.keys)
    rates, links = trajectory.rates, len(elapsed)
    return Evidence(
        distances=scale * jnp.linalg.norm(scaled, axis=-1),
        displacements=scale * jnp.linalg.norm(moves, axis=-1),
        pace=safe_divide(
            jnp.sum(moves * apart[:-1], axis=(1, 2)), jnp.sum(apart[:-1] ** 2, axis=(1, 2))
        ),
        shares=safe_divide(squares, jnp.sum(squares))
        if transport.linear and transport.projection is None and folded is None
        else None,
        common=common,
        quantum=jnp.sqrt(jnp.mean(quanta**2)),
        rounding=rounding,
        energies=None if trajectory.energies is None else jnp.mean(trajectory.energies, axis=-1),
        temperature=None if trajectory.temperatures is None else jnp.max(trajectory.temperatures),
        still=_still(rates, links),
        doubled_epsilon=_at_twice_epsilon(positions, trajectory.mesh, transport),
        coordinates=compared.shape[-1]
        if folded is None or transport.projection is not None
        else folded.coordinates,
        steps=None if rates is None else rates.shape[0],
        moments_only=transport.moments_only,
        unresolved=transport.rounding(positions[0], positions[-1]),
        spacings=safe_divide(jnp.sum(spacings), jnp.sum(changes != 0, dtype=spacings.dtype)),
        by_coordinate=None
        if parts is None
        else (jnp.sum(parts[:-1] / elapsed[:, None], axis=0), parts[-1]),
        keys=trajectory.keys,
        sizes=None if folded is None else folded.sizes,
    )


def _in_whole_keys(common: Array, moved: Array, keys: Keys) -> Array:
    """Return whether a coordinate is of a parameter that all members share, and that moves.

    A fold turns coordinates of a parameter into each other, so that no single one says anything.
    """
    counts = [math.prod(shape) for _, shape in keys]
    of = np.repeat(np.arange(len(keys)), counts)
    shared = jax.ops.segment_min(common.astype(jnp.int32), of, len(keys))
    moving = jax.ops.segment_max(moved.astype(jnp.int32), of, len(keys))
    return ((shared == 1) & (moving == 1))[of]


def _still(rates: Float[Array, " K"] | None, links: int) -> Array:
    """Return whether the learning time of each link is 0, up to the rounding of a schedule."""
    if rates is None:
        return jnp.zeros(links, bool)
    times = jnp.sum(rates.reshape(links, -1), axis=1)
    return times <= 1e-5 * jnp.max(times)


def _center_and_scale(positions: Float[Array, "snapshots n d"]) -> tuple[Array, Array]:
    """Return the mean of the start, and the largest finite distance from it in one coordinate."""
    start = positions[0]
    # Before the sum, so that it stays finite where the members are.
    center = jnp.sum(start / len(start), axis=0)
    apart = jnp.abs(positions - center)
    scale = jnp.max(jnp.where(jnp.isfinite(apart), apart, 0))
    return center, power_of_two(scale)


def _spacing(positions: Float[Array, "snapshots n d"]) -> Float[Array, "snapshots n d"]:
    """Return the distance from each number to the next that the positions could hold.

    Numbers that were once stored in fewer bits end in zeros: all of them together tell how many
    bits were in use.
    """
    kind = jnp.finfo(positions.dtype)
    whole, shorter = _STORED[kind.bits]
    bits = jax.lax.bitcast_convert_type(positions, whole)
    dropped = jnp.zeros((), int)
    for unused in shorter:
        # 0 is stored exactly in any number of bits. Devices can share a maximum, and no "or".
        used = (bits & np.asarray(2**unused - 1, whole)) != 0
        dropped = jnp.where(jnp.max(used.astype(jnp.int32)) == 0, unused, dropped)
    _, exponent = jnp.frexp(positions)
    return jnp.ldexp(jnp.ones_like(positions), exponent - 1 - kind.nmant + dropped)


def _rounding(quanta: Float[Array, "snapshots n d"], elapsed: Float[Array, " J"]) -> Scalar:
    """Return what errors within half a spacing add to the squared displacements per time."""
    of_links = jnp.sum(jnp.mean(quanta[1:] ** 2 + quanta[:-1] ** 2, axis=1) / 12, axis=1)
    return jnp.sum(of_links / elapsed)


def _at_twice_epsilon(
    positions: Float[Array, "snapshots n d"], mesh: AnyMesh | None, transport: AbstractTransport
) -> Scalar | None:
    """Return W2² of the whole run at twice the ε of an entropic transport."""
    coarser = transport.coarser()
    if coarser is None:
        return None
    ends = [0], [len(positions) - 1]
    in_turn = coarser.in_turn
    return map_pairs(solution_of, coarser, positions, *ends, mesh, in_turn=in_turn).squared[0]
