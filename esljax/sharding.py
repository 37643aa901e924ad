"""Many devices: members share them while the ensemble moves, pairs of snapshots share them while distances are solved.

A step acts on each member alone, so the run of an ensemble whose member axis lies across a mesh needs no communication at all. A transport
looks at two whole ensembles, and its iterations must not wait for other devices: before distances are taken the history (J+1, n, d) is
turned, once, from members to snapshots (an all-to-all), so that each device solves whole problems of its own and none ever holds the
whole history.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from esljax._checks import known, refuse
from esljax._types import Array, Float


def member_mesh(devices: int | Sequence[Any] | None = None) -> Mesh:
    """The devices that an ensemble is spread over, as a mesh of one axis, "members".

    **Args:** `devices`: how many of all devices of all hosts, or which; by default all of them. Of several hosts each calls this with the
    same argument, after `jax.distributed.initialize()`.
    **Returns:** `jax.sharding.Mesh`, for `simulate(..., mesh=)`. Every mesh of `jax.make_mesh` does as well.
    **Raises:** `InputError` if there are fewer devices than asked for.

    **Example:**

        >>> member_mesh(1).shape
        OrderedDict({'members': 1})
    """
    if devices is None or isinstance(devices, int | np.integer):
        present = jax.devices()
        wanted = len(present) if devices is None else devices
        if isinstance(devices, bool) or not 1 <= wanted <= len(present):
            hint = "; on a CPU, ask for more by jax.config.update('jax_num_cpu_devices', ...) before anything else" * (
                wanted > len(present)
            )
            raise refuse("devices", f"be between 1 and {len(present)}, the {present[0].platform} devices present{hint}", f"is {devices!r}")
        devices = present[:wanted]
    if len(devices) == 0 or len(set(devices)) < len(devices):
        raise refuse("devices", "name at least one device, each once", f"is {devices!r}")
    return Mesh(np.asarray(devices), ("members",), axis_types=(AxisType.Auto,))


def choose_mesh(mesh: Any, positions: Any) -> Mesh | None:
    """The mesh for an ensemble (n, d): the one asked for; else where it lies already; else all local devices. None for one device.

    **Raises:** `InputError` if the members cannot be shared evenly.
    """
    if mesh is None:
        if not isinstance(positions, jax.Array) or not known(positions):
            return None
        lies = positions.sharding
        if isinstance(lies, NamedSharding) and lies.mesh.size > 1:
            mesh = lies.mesh
        elif positions.committed or len(jax.local_devices()) == 1:
            return None
        else:
            mesh = member_mesh(jax.local_devices())
    if not isinstance(mesh, Mesh):
        raise refuse("mesh", "be a jax.sharding.Mesh such as member_mesh()", f"is {mesh!r}")
    members = positions.shape[0]
    if members % mesh.size:
        fewer = next(count for count in range(mesh.size, 0, -1) if members % count == 0)
        raise refuse(
            "positions",
            f"hold a multiple of {mesh.size} members, to be shared by as many devices (or be given mesh=member_mesh({fewer}))",
            f"holds {members}",
        )
    # Within this package the compiler, not the types, keeps track of what lies where.
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def shard_members(x: Any, mesh: Mesh | None, axis: int = 0) -> Array:
    """An array with its member axis across the mesh, within `jit` or outside of it."""
    if mesh is None:
        return jnp.asarray(x)
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))
    return jax.device_put(x, sharding) if known(x) else jax.lax.with_sharding_constraint(x, sharding)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """A copy of every array on each device, within `jit` or outside of it."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec())
    put = lambda x: jax.device_put(x, sharding) if known(x) else jax.lax.with_sharding_constraint(x, sharding)  # noqa: E731
    return jax.tree.map(lambda x: put(x) if eqx.is_array(x) else x, tree)


# Numbers in the pairs that a device solves side by side (256 MB in float32): small problems fill it together, large ones by themselves.
AT_ONCE = 2**26


_KEPT = "kept"


def keep(tree: Any) -> Any:
    """Marks what a derivative of `map_pairs` needs and should not have to find again, such as who is whose partner."""
    return jax.tree.map(lambda x: checkpoint_name(x, _KEPT), tree)


def side_by_side(pairs: int, n: int, d: int, in_turn: bool, platform: str) -> int:
    """How many of a device's pairs of ensembles (n, d) are solved at once; the others wait, and so does the memory they need."""
    if in_turn and platform == "cpu":
        return 1
    rounds = math.ceil(pairs * n * max(n, d) / AT_ONCE)
    return math.ceil(pairs / rounds)


def map_pairs(
    function: Callable[[Any, Array, Array], Any],
    shared: Any,
    snapshots: Float[Array, "snapshots n d"],
    first: Sequence[int] | np.ndarray,
    second: Sequence[int] | np.ndarray,
    mesh: Mesh | None,
    *,
    in_turn: bool = False,
) -> Any:
    """`function(shared, x, y)` for every pair of snapshots (x, y), stacked; each device of the mesh takes its share of the pairs.

    **Args:** `in_turn`: whether a CPU takes its pairs one after the other, as `AbstractTransport.in_turn` says.
    **Differentiation:** as `function`, in `shared` and in the snapshots.
    """
    pairs = np.stack([np.asarray(first), np.asarray(second)])
    count, devices = pairs.shape[1], 1 if mesh is None else mesh.size
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    share = math.ceil(count / devices)
    n, d = snapshots.shape[1:]
    together = side_by_side(share, n, d, in_turn, platform)
    share = math.ceil(share / together) * together
    # Some pairs are solved twice, so that every device has as many in every round.
    x, y = (snapshots[ends[np.arange(share * devices) % count]] for ends in pairs)

    def solve(shared, x, y):
        one = lambda pair: function(shared, *pair)  # noqa: E731
        if together == share:
            return jax.vmap(one)((x, y))
        # Problems that wait for each other shall not leave all they went through to the reverse sweep.
        one = jax.checkpoint(one, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(_KEPT))
        return jax.lax.map(one, (x, y), batch_size=together if together > 1 else None)

    if mesh is None:
        found = solve(shared, x, y)
    else:
        arrays, rest = eqx.partition(shared, eqx.is_array)
        across, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
        spread = jax.shard_map(
            lambda arrays, x, y: solve(eqx.combine(arrays, rest), x, y),
            mesh=mesh,
            in_specs=(whole, across, across),
            out_specs=across,
            check_vma=False,
        )
        found = spread(arrays, x, y)
    return jax.tree.map(lambda x: x[:count], found)
