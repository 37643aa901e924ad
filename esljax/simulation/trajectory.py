"""An ensemble at several training times: the result of a simulation or a recording, which every
measure reads."""

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from esljax._checks import (
    InputError,
    as_array,
    check_finite,
    check_positive_int,
    check_real,
    door,
    known,
    refuse,
)
from esljax._types import Array, ArrayLike, Float, Shaped
from esljax.sharding import AnyMesh, find_mesh, replicate, shard_members
from esljax.simulation.diffusion import Diffusion
from esljax.simulation.narrowing import narrowed

Keys: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
"""The parameters of a member in the order in which it is raveled, by name and shape."""


class Folded(eqx.Module):
    """What is known of members of which `Trajectory.positions` keeps the distances alone."""

    sample: Float[Array, "*runs snapshots n count"]
    """Some of their numbers as they were stored, evenly drawn."""
    sizes: tuple[int, ...] = eqx.field(static=True)
    """How many numbers of a member each of `Trajectory.keys` holds; without names, d alone."""
    all_pairs: bool = eqx.field(static=True)
    """Whether distances are kept between any two snapshots, and not only those next to each other
    or next but one, and from each to the first."""
    directions: Float[Array, "p q"] | None = None
    """The matrix of a `ProjectedTransport` on the random directions that were asked for."""
    spread: Float[Array, "*runs"] | None = None
    """The sum of the squares of all members at all snapshots about their mean; known beside
    `directions`."""

    @property
    def coordinates(self) -> int:
        """d, the numbers of a member."""
        return sum(self.sizes)

    def keeps(self, matrix: Float[Array, "p q"]) -> bool:
        """Whether members in the coordinates of a projection are those of the run itself."""
        if self.all_pairs or self.directions is None:
            return self.all_pairs
        return known(matrix, self.directions) and np.array_equal(matrix, self.directions)


class Trajectory(eqx.Module):
    """An ensemble at J+1 training times, with the controls that drove it if they are known.

    `simulate` makes it, `from_snapshots` makes one of a recording, and every measure reads it.
    Several runs of one shape, as `jax.vmap` of `simulate` makes them, have one more leading axis.
    """

    times: Float[Array, "*runs snapshots"]
    """Training times, from 0 to 1: s_j = j/J if simulated, any increasing ones if recorded."""
    positions: Float[Array, "*runs snapshots n p"]
    """The members at these times, or their features if the run was observed; p = d if not. In units
    of θ, or of the features."""
    energies: Float[Array, "*runs snapshots n"] | None
    """Φ of each member at these times, on the batch that its next step would see: unbiased, and
    exact for potentials without batches. None if the run was recorded."""
    rates: Float[Array, "*runs K"] | None
    """The learning rates η_k, per step: the mobility of the law, if the rule has one. None if the
    run was recorded."""
    temperatures: Float[Array, "*runs K"] | None
    """The temperatures T_k, in units of Φ; None if the run was recorded."""
    final: Float[Array, "*runs n d"]
    """The positions at s = 1, also of an observed run; of recorded features the last ones."""
    observed: bool = eqx.field(static=True)
    """Whether `positions` holds features instead of positions."""
    mesh: AnyMesh | None = eqx.field(static=True, default=None)
    """The devices that share the members, if there are several."""
    injected: Float[Array, "*runs K"] | None = None
    """The temperatures of the noise that the members received, in units of Φ; None where they are
    `temperatures`, as in a trajectory made by hand, or not known."""
    work_of_links: Float[Array, "*runs J n"] | None = None
    """The work on each member along each link, in units of Φ, exact for the steps of the run: the
    changes of Φ at the positions of the member, with the jumps at both ends. On the batches of the
    steps, unbiased. None if the run was recorded, or made by hand without it."""
    lawful: bool = eqx.field(static=True, default=True)
    """Whether `rates` and `temperatures`, if there are any, are those of overdamped Langevin
    dynamics. False after a rule without a law."""
    keys: Keys | None = eqx.field(static=True, default=None)
    """The parameters of a member in the order in which it is raveled: pairs of a name and a shape,
    such as `(("bias", (3,)), ("kernel", (2, 3)))`. None if they are not known, and for features."""
    origin: Float[Array, "*runs d"] | None = None
    """The place that `positions` are relative to, in units of θ. None where they are relative to 0,
    as in every simulated run; `from_snapshots` says when recorded ones are not."""
    folded: Folded | None = None
    """Of a run that `from_checkpoints` read: `positions` are then not the members themselves, but
    lie at the same distances from each other. None for all others."""

    @property
    def law(self) -> Diffusion | None:
        """The dynamics that the members followed, of all K steps. None if the run was recorded, or
        its rule claims no law."""
        if not self.lawful or self.rates is None or self.temperatures is None:
            return None
        injected = self.temperatures if self.injected is None else self.injected
        return Diffusion(self.rates, self.temperatures, injected)

    @property
    def placed(self) -> "Trajectory":
        """The same run with `positions` relative to 0, rounded to their type."""
        if self.origin is None:
            return self
        positions = self.positions + self.origin[..., None, None, :]
        return dataclasses.replace(self, positions=positions, origin=None)

    @property
    def work(self) -> Float[Array, "*runs n"] | None:
        """The work on each member along the whole run, in units of Φ; None if it is not known. Its
        mean over members has the standard error std(work)/√n."""
        return None if self.work_of_links is None else jnp.sum(self.work_of_links, axis=-2)

    def __str__(self) -> str:
        *runs, snapshots, members, numbers = self.positions.shape
        kind = "features" if self.observed else "coordinates"
        if self.folded is not None:
            kind += f", folded into {numbers}"
            numbers = self.folded.coordinates
        several = f"{'x'.join(map(str, runs))} runs, each " if runs else ""
        steps = "recorded" if self.rates is None else f"{self.rates.shape[-1]} steps"
        where = "" if self.mesh is None else f", on {self.mesh.size} devices"
        shape = f"{several}{members} members of {numbers} {kind}"
        return f"Trajectory: {shape}, {steps}, {snapshots} snapshots{where}"


@door
def from_snapshots(
    positions: Shaped[ArrayLike, "snapshots n d"],
    times: Any = None,
    *,
    observed: bool = False,
    keys: Mapping[str, Sequence[int]] | Keys | None = None,
) -> Trajectory:
    """A run made outside of this package, as a `Trajectory` without learning rates, temperatures
    and energies.

    It is measured by its snapshots alone: Σ, L², W2² and their split on the clock of training time.
    D and U need learning rates.

    **Args:**
    - `positions`: the members at each snapshot, shape (J+1, n, d) with J ≥ 1 and n ≥ 2; member i is
      the same network in every snapshot. NumPy or JAX arrays, or anything that `numpy.asarray`
      accepts (a PyTorch tensor on the CPU, detached). Integers and half precision become the
      default floating type. Where wider numbers (float64, longdouble, int64) lie so far from 0 that
      rounding them would change their distances, a common place is taken off first, in their own
      type: the trajectory then holds it as `origin`, its `positions` are relative to that, and
      `trajectory.placed.positions` and `final` are the places themselves, for a potential. Reports
      are of the members where they lie. Values that `jit` hides are rounded as they are.
    - `times`: when they were taken, shape (J+1,), increasing, in any unit and from any origin: they
      are rescaled to [0, 1]. Evenly spaced by default.
    - `observed`: whether `positions` holds features of the members, such as their outputs, instead
      of parameters.
    - `keys`: the parameters of a member by name, such as `{"bias": (3,), "kernel": (2, 3)}`: their
      shapes in the order in which a member is raveled. Reports then say which parameters move
      (`SpeedLimit.by_key`). Not for features.

    **Returns:** `Trajectory`, whose `energies`, `rates` and `temperatures` are None.
    **Raises:** `InputError` for wrong shapes, values that are not finite numbers, times that do not
    increase, keys whose shapes do not hold d numbers together, masked entries, and members that
    move by less than rounding does.
    **Differentiation:** in `positions` and `times`.

    **Example:**

        >>> import numpy as np
        >>> import esljax as esl
        >>> snapshots = np.random.default_rng(0).normal(size=(5, 8, 2))
        >>> print(esl.from_snapshots(snapshots, times=[0, 10, 20, 50, 100]))
        Trajectory: 8 members of 2 coordinates, recorded, 5 snapshots
    """
    name = "features" if observed else "positions"
    positions, origin = narrowed(name, positions)
    if positions.ndim != 3 or positions.shape[2] < 1:
        raise refuse(
            name,
            "have shape (snapshots, members, numbers per member)",
            f"has shape {positions.shape}",
        )
    snapshots, members, _ = positions.shape
    if snapshots < 2 or members < 2:
        counted = (
            f"holds {snapshots} snapshot{'s' * (snapshots != 1)} "
            f"of {members} member{'s' * (members != 1)}"
        )
        raise refuse(name, "hold at least two snapshots of at least two members", counted)
    if known(positions):
        bad = ~np.isfinite(np.asarray(positions)).all(axis=2)
        if bad.any():
            snapshot, member = (int(i) for i in np.argwhere(bad)[0])
            where = f"member {member} at snapshot {snapshot}" + (
                f", the first of {int(bad.sum())} such places" if bad.sum() > 1 else ""
            )
            raise refuse(name, f"be finite in {positions.dtype}", f"is not for {where}")
    if observed and keys is not None:
        raise refuse("keys", "be None for features, which are no parameters", "names some")
    return Trajectory(
        times=rescaled(times, snapshots, positions.dtype),
        positions=positions,
        energies=None,
        rates=None,
        temperatures=None,
        final=positions[-1] if origin is None else positions[-1] + origin,
        origin=origin,
        observed=observed,
        keys=None if keys is None else checked_keys("keys", keys, positions.shape[2]),
    )


def checked_keys(argument: str, keys: Any, d: int) -> Keys:
    """Return names and shapes in their hashable form.

    **Raises:** `InputError` unless they are strings, each once, and shapes of d numbers together.
    """
    must = "map the name of each parameter to its shape"
    try:
        given = dict(keys)
        found = tuple((name, tuple(map(operator.index, shape))) for name, shape in given.items())
    except (TypeError, ValueError) as error:
        raise refuse(argument, must, f"is {_brief(keys)}") from error
    if len(found) < len(keys):
        raise refuse(argument, "name each parameter once", f"is {_brief(keys)}")
    odd = [name for name, shape in found if not isinstance(name, str) or min(shape, default=0) < 0]
    if odd:
        raise refuse(argument, must, f"has {odd[0]!r} of shape {given[odd[0]]}")
    held = sum(math.prod(shape) for _, shape in found)
    if held != d:
        raise refuse(
            argument,
            f"have shapes that hold the {d} numbers of a member together",
            f"holds {held} in {len(found)} parameters",
        )
    return found


def _brief(keys: Any) -> str:
    text = repr(keys)
    return text if len(text) <= 80 else f"{text[:77]}..."


def stack(trajectories: Sequence[Trajectory]) -> Trajectory:
    """Several runs of one shape in one `Trajectory`, on a leading axis."""
    must = "be a Trajectory or a sequence of at least two"
    if not isinstance(trajectories, Sequence):
        raise refuse("trajectory", must, f"is a {type(trajectories).__name__}")
    if len(trajectories) < 2 or not all(isinstance(one, Trajectory) for one in trajectories):
        raise refuse("trajectory", must, f"is a sequence of {len(trajectories)} items")
    if len({one.keys for one in trajectories}) > 1:
        # What holds for some runs only is not known of all.
        trajectories = [dataclasses.replace(one, keys=None) for one in trajectories]
    if len({one.origin is None for one in trajectories}) > 1:
        trajectories = [_with_origin(one) for one in trajectories]
    shapes = {one.positions.shape for one in trajectories}
    if len(shapes) > 1 or len({_kind(one) for one in trajectories}) > 1:
        raise refuse(
            "trajectory",
            "hold runs of one shape",
            f"holds {len(trajectories)} runs with positions of shapes {sorted(shapes)}",
        )
    mesh = next((one.mesh for one in trajectories if one.mesh is not None), None)
    together = [on_devices(one, mesh if isinstance(mesh, Mesh) else None) for one in trajectories]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *together)


def _with_origin(trajectory: Trajectory) -> Trajectory:
    if trajectory.origin is not None:
        return trajectory
    return dataclasses.replace(trajectory, origin=jnp.zeros_like(trajectory.positions[0, 0]))


def on_devices(trajectory: Trajectory, mesh: AnyMesh | None = None) -> Trajectory:
    """The same run on the devices that will measure it: those of `mesh`, else its own, else those
    that `find_mesh` finds for it."""
    # A run that `jit` made under `jax.set_mesh` knows its devices by its arrays alone.
    own = None if isinstance(trajectory.mesh, AbstractMesh) else trajectory.mesh
    mesh = find_mesh(own if mesh is None else mesh, trajectory.positions)
    return trajectory if mesh == trajectory.mesh else laid(trajectory, mesh)


def laid(trajectory: Trajectory, mesh: AnyMesh | None) -> Trajectory:
    """The same run with its members spread over a mesh, or whole on each device if the mesh does
    not divide them."""
    if mesh is None:
        return trajectory
    divides = trajectory.positions.shape[-2] % mesh.size == 0

    def lay(x, axis):
        # Devices will share pairs of snapshots; until then members lie wherever they can.
        return shard_members(x, mesh, axis=x.ndim + axis) if divides else replicate(x, mesh)

    whole = {
        name: replicate(getattr(trajectory, name), mesh)
        for name in ("times", "rates", "temperatures", "injected", "origin")
    }
    energies, work = trajectory.energies, trajectory.work_of_links
    return dataclasses.replace(
        trajectory,
        positions=lay(trajectory.positions, -2),
        energies=None if energies is None else lay(energies, -1),
        work_of_links=None if work is None else lay(work, -1),
        final=lay(trajectory.final, -2),
        mesh=mesh,
        **whole,
    )


def check_runs(trajectory: Trajectory, jackknife: int, *, folded: bool = False) -> None:
    """Reject anything but one run, or several, of at least two snapshots of at least two members
    that stayed finite.

    **Args:** `folded`: whether the distances between members are enough.
    """
    if trajectory.folded is not None and not folded:
        raise refuse(
            "trajectory",
            "hold the members themselves (from_snapshots)",
            "holds the distances between them alone (from_checkpoints)",
        )
    shape = trajectory.positions.shape
    if len(shape) not in (3, 4):
        raise refuse(
            "trajectory",
            "hold positions (J+1, n, d), or (runs, J+1, n, d)",
            f"has positions of shape {shape}",
        )
    if shape[-3] < 2 or shape[-2] < 2:
        raise refuse(
            "trajectory",
            "hold at least two snapshots of at least two members",
            f"has positions of shape {shape}",
        )
    if len(shape) == 4 and shape[0] < 2:
        raise refuse(
            "trajectory",
            "hold at least two runs on its leading axis",
            f"has positions of shape {shape}",
        )
    check_positive_int("jackknife", jackknife, 0)
    if known(trajectory.positions):
        bad = np.logical_not(np.isfinite(np.asarray(trajectory.positions)).all(axis=-1))
        if bad.any():
            snapshot = int(np.argwhere(bad.any(axis=-1).reshape(-1, shape[-3]))[:, 1].min())
            raise InputError(
                "Argument `trajectory` must hold finite members, but "
                f"{int(bad[..., -1, :].sum())} of them are not at the end, the first from snapshot "
                f"{snapshot} on; the likely cause is a learning rate above the stability limit "
                "2/(largest curvature)."
            )


def _kind(trajectory: Trajectory) -> tuple:
    arrays = dataclasses.replace(trajectory, mesh=None)
    return jax.tree.structure(arrays), tuple(x.shape for x in jax.tree.leaves(arrays))


def rescaled(times: Any, snapshots: int, dtype: Any) -> Float[Array, " snapshots"]:
    """Return increasing times in [0, 1], evenly spaced ones for None.

    **Raises:** `InputError` for others, and for times that become one in this type.
    """
    if times is None:
        return jnp.arange(snapshots, dtype=dtype) / (snapshots - 1)
    if known(times):
        # Step counts and seconds since an epoch differ in digits that single precision lacks.
        times = _double("times", times)
    if times.shape != (snapshots,):
        raise refuse(
            "times", f"have shape ({snapshots},), one for each snapshot", f"has shape {times.shape}"
        )
    if known(times):
        check_finite("times", times)
        flat = np.flatnonzero(np.diff(times) <= 0)
        if flat.size:
            j = int(flat[0])
            raise refuse(
                "times",
                "increase from snapshot to snapshot",
                f"is {times[j]:.12g} and then {times[j + 1]:.12g} at snapshots {j} and {j + 1}",
            )
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = jnp.asarray((times - times[0]) / (times[-1] - times[0]), dtype)
    if known(scaled) and not np.all(np.diff(np.asarray(scaled)) > 0):
        raise refuse(
            "times",
            f"stay apart in {scaled.dtype} once rescaled to [0, 1]",
            "has times that become one",
        )
    return scaled


def _double(name: str, x: Any) -> np.ndarray:
    array = as_array(name, x, "be an array")
    check_real(name, array)
    return np.asarray(array).astype(np.float64)
