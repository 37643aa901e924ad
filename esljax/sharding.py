"""Many devices: they share the members while the ensemble moves, and the pairs of snapshots while
distances are solved.

A step acts on each member alone, so the run of an ensemble whose member axis lies across a mesh
needs no communication at all. A transport looks at two whole ensembles, and its iterations must not
wait for other devices: before distances are taken, the history (J+1, n, d) is turned, once, from
members to snapshots (an all-to-all), so that each device solves whole problems of its own and none
ever holds the whole history.

Each public verb settles its devices at its door, by `choose_mesh` or `find_mesh`, `bring` and
`shard_members`. The functions behind it take arrays and know no mesh, except `map_pairs` and the
scan over single snapshots in `measures.velocities`, which copies each to every device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from esljax._checks import known, refuse
from esljax._types import Array, Float

AnyMesh: TypeAlias = Mesh | AbstractMesh
"""Devices by name or, inside `jit` under `jax.set_mesh`, only their number and kind."""


def member_mesh(devices: int | Sequence[Any] | None = None) -> Mesh:
    """The devices that share an ensemble, as a mesh of one axis, "members".

    **Args:** `devices`: how many of all devices of all hosts, or which; by default all of them.
    Each of several hosts calls this with the same argument, after `jax.distributed.initialize()`.
    **Returns:** `jax.sharding.Mesh`, for `simulate(..., mesh=)`. Any mesh of `jax.make_mesh` works
    there too. Where older code used `pmap`, use `jit` with such a mesh.
    **Raises:** `InputError` if there are fewer devices than requested.

    **Example:**

        >>> import esljax as esl
        >>> dict(esl.member_mesh(1).shape)
        {'members': 1}
    """
    if devices is None or isinstance(devices, int | np.integer):
        present = jax.devices()
        count = len(present) if devices is None else devices
        if isinstance(devices, bool) or not 1 <= count <= len(present):
            hint = (
                "; on a CPU, ask for more by jax.config.update('jax_num_cpu_devices', ...) "
                "before anything else"
            ) * (count > len(present))
            raise refuse(
                "devices",
                f"be between 1 and {len(present)}, the {present[0].platform} devices present{hint}",
                f"is {devices!r}",
            )
        devices = present[:count]
    if isinstance(devices, str) or not isinstance(devices, Sequence | np.ndarray):
        raise refuse("devices", "be a number of devices, or devices themselves", f"is {devices!r}")
    if len(devices) == 0 or len(set(devices)) < len(devices):
        raise refuse("devices", "name at least one device, each once", f"is {devices!r}")
    return Mesh(np.asarray(devices), ("members",), axis_types=(AxisType.Auto,))


def choose_mesh(mesh: Any, positions: Any) -> AnyMesh | None:
    """The mesh for an ensemble (n, d), as `find_mesh` finds it; None for one device.

    **Raises:** `InputError` if the members cannot be shared evenly.
    """
    mesh = find_mesh(mesh, positions)
    members = positions.shape[0]
    if mesh is not None and members % mesh.size:
        fewer = next(count for count in range(mesh.size, 0, -1) if members % count == 0)
        raise refuse(
            "positions",
            f"hold a multiple of {mesh.size} members, to be shared by as many devices "
            f"(or be given mesh=member_mesh({fewer}))",
            f"holds {members}",
        )
    return mesh


def find_mesh(mesh: Any, x: Any) -> AnyMesh | None:
    """The requested mesh; else the one that `x` lies on, where jax knows it; else that of
    `jax.set_mesh`; else all local devices. None for one device.

    **Raises:** `InputError` if `mesh` is no mesh, or another than that of `jax.set_mesh`, which jax
    would not compile.
    """
    if mesh is not None and not isinstance(mesh, AnyMesh):
        raise refuse("mesh", "be a jax.sharding.Mesh such as member_mesh()", f"is {mesh!r}")
    ambient = jax.sharding.get_abstract_mesh()
    if mesh is None and AxisType.Manual in ambient.axis_types:
        return None  # within a shard_map there is only the share of one device
    ambient = None if ambient.empty or AxisType.Manual in ambient.axis_types else ambient
    visible = isinstance(x, jax.Array) and known(x)
    if (
        mesh is None
        and visible
        and isinstance(x.sharding, NamedSharding)
        and x.sharding.mesh.size > 1
    ):
        mesh = x.sharding.mesh
    elif mesh is None and ambient is None and isinstance(x, Tracer):
        # An array that came into `jit` from a mesh carries it in its type.
        lies = jax.typeof(x).sharding.mesh
        mesh = lies if lies.size > 1 and AxisType.Manual not in lies.axis_types else None
    elif mesh is None and ambient is not None:
        mesh = _mesh_that_is_set()
    elif (
        mesh is None
        and visible
        and not x.committed
        and x.device in (local := jax.local_devices())
        and len(local) > 1
    ):
        mesh = member_mesh(local)
    if mesh is None:
        return None
    mesh = _automatic(mesh)
    if ambient is not None and mesh.abstract_mesh != ambient:
        raise refuse(
            "mesh",
            "be that of jax.set_mesh, with auto axes as member_mesh() has them: "
            f"set is {_in_words(ambient)}",
            f"is {_in_words(mesh)}",
        )
    return mesh


def _in_words(mesh: AnyMesh) -> str:
    kinds = "/".join(kind.name.lower() for kind in mesh.axis_types)
    return f"{dict(mesh.shape)} with {kinds} axes"


def _mesh_that_is_set() -> AnyMesh:
    try:
        return jax.sharding.get_mesh()
    except ValueError:  # inside jit, where jax knows only the number and kind of the devices
        return jax.sharding.get_abstract_mesh()


def _automatic(mesh: AnyMesh) -> AnyMesh:
    """The same devices. Within this package the compiler, not the types, tracks the layout."""
    axes = (AxisType.Auto,) * len(mesh.axis_names)
    return (
        Mesh(mesh.devices, mesh.axis_names, axis_types=axes)
        if isinstance(mesh, Mesh)
        else mesh.update(axis_types=axes)
    )


def shard_members(x: Any, mesh: AnyMesh | None, axis: int = 0) -> Array:
    """An array with its member axis across the mesh, within `jit` or outside of it."""
    if mesh is None:
        return jnp.asarray(x)
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))
    return _put(x, sharding)


def replicate(tree: Any, mesh: AnyMesh | None) -> Any:
    """A copy of every array on each device, within `jit` or outside of it."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: _put(x, sharding) if eqx.is_array(x) else x, tree)


def bring(tree: Any, mesh: AnyMesh | None) -> Any:
    """Bring arrays that were put on other devices to those of the mesh. jax itself moves only
    arrays that were put nowhere."""
    if not isinstance(mesh, Mesh):
        return tree
    here, sharding = set(mesh.devices.flat), NamedSharding(mesh, PartitionSpec())

    def elsewhere(x):
        return (
            isinstance(x, jax.Array) and known(x) and x.committed and x.sharding.device_set != here
        )

    return jax.tree.map(lambda x: _put(x, sharding) if elsewhere(x) else x, tree)


def _put(x: Any, sharding: NamedSharding) -> Array:
    if not known(x) or not isinstance(sharding.mesh, Mesh):
        # Compiled, because a gradient that is not may meet an array that still lies on one device.
        return jax.jit(jax.lax.with_sharding_constraint, static_argnums=1)(jnp.asarray(x), sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        # jax puts only numbers on the devices of other processes.
        return jax.random.wrap_key_data(
            jax.device_put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x)
        )
    return jax.device_put(x, sharding)


# Numbers in the pairs that a device solves side by side (256 MB in float32): small problems fill it
# together, large ones by themselves.
AT_ONCE = 2**26


_KEPT = "kept"


def keep(tree: Any) -> Any:
    """Mark arrays that a derivative of `map_pairs` stores rather than recomputes, such as the
    assignment of partners."""
    return jax.tree.map(lambda x: checkpoint_name(x, _KEPT), tree)


def side_by_side(pairs: int, n: int, d: int, in_turn: bool, platform: str) -> int:
    """How many of a device's pairs of ensembles (n, d) are solved at once; the others wait, and
    take no memory until then."""
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
    mesh: AnyMesh | None,
    *,
    in_turn: bool = False,
) -> Any:
    """`function(shared, x, y)` for every pair of snapshots (x, y), stacked; each device of the mesh
    takes its share of the pairs.

    **Args:**
    - `function`: of the shared pytree and two ensembles (n, d) to a pytree of arrays.
    - `shared`: a pytree that all pairs need, such as the transport.
    - `snapshots`: the history, shape (J+1, n, d).
    - `first`, `second`: the places of the two ends of each pair in the history.
    - `mesh`: the devices, or None for one.
    - `in_turn`: whether a CPU takes its pairs one after the other; see `AbstractTransport.in_turn`.

    **Returns:** the results with the pairs on a leading axis.
    **Differentiation:** as `function`, in `shared` and in the snapshots.
    """
    pairs = np.stack([np.asarray(first), np.asarray(second)])
    count, devices = pairs.shape[1], 1 if mesh is None else mesh.size
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
    share = math.ceil(count / devices)
    n, d = snapshots.shape[1:]
    together = side_by_side(share, n, d, in_turn, platform)
    share = math.ceil(share / together) * together
    # Some pairs are solved twice, so that every device has equally many in every round.
    x, y = (snapshots[ends[np.arange(share * devices) % count]] for ends in pairs)

    def solve(shared, x, y):
        def one(pair):
            return function(shared, *pair)

        if together == share:
            return jax.vmap(one)((x, y))
        # Problems solved in sequence must not all keep their residuals for the backward pass.
        one = jax.checkpoint(
            one, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(_KEPT)
        )
        return jax.lax.map(one, (x, y), batch_size=together if together > 1 else None)

    if mesh is None:
        solved = solve(shared, x, y)
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
        solved = spread(arrays, x, y)
    return jax.tree.map(lambda x: x[:count], solved)
