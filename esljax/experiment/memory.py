"""How much memory a run and its gradient take on each device, told from shapes before anything runs.

What has to be held is counted: states, snapshots, the states that the gradient keeps, the pairs of snapshots that a transport solves and
its costs. How often a compiler holds each of them at once was read off its own account of compiled programs (`tests/test_memory.py`
compares the two); what is planned is meant to be right within a half, without a gradient within a factor of two, not to the byte.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

from esljax._checks import check_positive_int, refuse
from esljax._types import Array
from esljax.measures import compared
from esljax.potentials import AbstractPotential, check_potential
from esljax.sharding import side_by_side
from esljax.simulation import (
    AbstractGradient,
    Autodiff,
    ForwardMode,
    HessianAdjoint,
    check_functions,
    check_links,
    group_length,
)
from esljax.transport import (
    AbstractTransport,
    ExactTransport,
    GaussianTransport,
    MappedTransport,
    ProjectedTransport,
    SinkhornTransport,
    SlicedTransport,
    coordinates,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on each device.

    The network and the transport are never at work at once, so the larger of the two counts; the rest is there all the time.
    """

    devices: int
    members: int
    """All of them, on all devices."""
    coordinates: int
    data: int
    state: int
    """Positions, forces and noise of a step."""
    network: int
    """What the network computes on the way, for a batch or for all examples."""
    snapshots: int
    adjoint: int
    """States kept for the gradient; 0 if there is none to take."""
    transport: int
    """Pairs of snapshots, costs, and what the gradient of the distances keeps of them."""

    @property
    def total(self) -> int:
        return (
            self.data
            + self.state
            + self.adjoint
            + max(self.network + self.snapshots, self.transport)
        )

    def check(self, available: float) -> "Plan":
        """**Raises:** `InputError` if the run needs more than `available` bytes a device; it names what to change."""
        if self.total > available:
            largest = max(_REMEDIES, key=lambda name: getattr(self, name))
            raise refuse(
                "members",
                f"fit in {size(available)} a device ({_REMEDIES[largest]}, or use more devices)",
                f"is {self.members}: with {self.coordinates} numbers each they need about {size(self.total)} on each of {self.devices}, "
                f"most of it ({size(getattr(self, largest))}) for the {largest}",
            )
        return self

    def __str__(self) -> str:
        parts = ("data", "state", "network", "snapshots", "adjoint", "transport", "total")
        lines = [f"{name:<12}{size(getattr(self, name)):>12}" for name in parts]
        shared = f"{self.members} members of {self.coordinates} numbers on {self.devices} device{'s' * (self.devices > 1)}, bytes on each:"
        return "\n".join([shared, *lines])


_REMEDIES = {
    "data": "take fewer examples",
    "state": "take fewer members",
    "network": "take smaller batches",
    "snapshots": "keep fewer snapshots",
    "adjoint": "recompute states instead of keeping all",
    "transport": "keep fewer snapshots, or take the sinkhorn transport in chunks",
}


def plan_memory(
    potential: AbstractPotential,
    positions: Any,
    *,
    steps: int,
    snapshots: int = 20,
    transport: AbstractTransport | None = None,
    observe: Callable[[Array], Array] | None = None,
    gradient: AbstractGradient | None = None,
    devices: int = 1,
    differentiated: bool = True,
) -> Plan:
    """What one run and its distances will take, with the gradient of the gap if `differentiated`.

    **Args:** `positions`: the ensemble (n, d), or only its shape as `jax.ShapeDtypeStruct`. `potential`, `steps`, `snapshots`, `observe`,
    `gradient`: as in `simulate`. `transport`: of the distances, or None to take none. `devices`: how many share the members; none has to
    be present.
    **Returns:** `Plan`: bytes on each device, if all are as those here are; print it. Nothing is computed and nothing compiled.
    What `ForwardMode` pushes along is not counted: about a state and its snapshots for each number that it is differentiated in. Nor are
    the fits of a `ProbabilityFlow`; the plan is one of `Langevin`.
    **Raises:** `InputError` for what `simulate` refuses, as far as shapes tell, and if the members cannot be shared evenly.

    **Example:**

        >>> import jax, jax.numpy as jnp
        >>> from esljax import Quadratic
        >>> ensemble = jax.ShapeDtypeStruct((64, 1000), jnp.float32)
        >>> plan_memory(Quadratic(1.0), ensemble, steps=100, transport=ExactTransport(), devices=4).check(1e9).adjoint
        12800000
    """
    check_positive_int("devices", devices)
    check_links(steps, snapshots)
    check_potential("potential", potential)
    if transport is not None and not isinstance(transport, AbstractTransport):
        raise refuse("transport", "be a transport such as ExactTransport()", f"is {transport!r}")
    if len(np.shape(positions)) != 2:
        raise refuse(
            "positions", "have shape (n, d), one row per member", f"has shape {np.shape(positions)}"
        )
    gradient = HessianAdjoint() if gradient is None else gradient
    n, d = np.shape(positions)
    dtype = jax.dtypes.canonicalize_dtype(getattr(positions, "dtype", float))
    member = jax.ShapeDtypeStruct((d,), dtype)
    potential = potential.at(0.0)
    check_functions(potential, jax.ShapeDtypeStruct((n, d), dtype), jax.random.key(0), observe)
    if n % devices:
        raise refuse("devices", f"divide the {n} members that they share", f"is {devices}")
    p = d if observe is None else jax.eval_shape(observe, member).shape[0]
    mine = n // devices
    state = mine * d * dtype.itemsize
    pairs = math.ceil(sum(map(len, compared(snapshots))) / devices)
    batch = jax.eval_shape(
        lambda: jax.tree.map(lambda x: x[0], potential.draw(jax.random.key(0), 1))
    )
    # Positions, noise and batch of a step; with checkpoints those of one group of steps, and where each group begins.
    step = 2 * state + mine * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch))
    length = group_length(steps, snapshots)
    # A batch forward and backward at every step; all examples forward at the end. Compilers fuse about half of the operations.
    of_batch = _on_the_way(potential, member, batch)
    network = max(of_batch, _on_the_way(potential, member, None) // 2)
    step += mine * of_batch if isinstance(gradient, Autodiff) else 0
    adjoint = steps // length * state + length * step if gradient.recompute else steps * step
    adjoint = 0 if isinstance(gradient, ForwardMode) else adjoint
    return Plan(
        devices=devices,
        members=n,
        coordinates=d,
        data=sum(x.nbytes for x in jax.tree.leaves(eqx.filter(potential, eqx.is_array))),
        state=8 * state,
        network=mine * network,
        snapshots=2 * (snapshots + 1) * mine * p * dtype.itemsize,
        adjoint=adjoint if differentiated else 0,
        transport=0
        if transport is None
        else int(_pairs(transport, pairs, n, p, differentiated) * dtype.itemsize),
    )


def _on_the_way(potential: AbstractPotential, member: Any, batch: Any) -> int:
    """The bytes of all that is computed on the way from one member to its energy."""
    return _of_program(jax.make_jaxpr(potential.energy)(member, batch))


def _of_program(program: Any) -> int:
    """The bytes of the results of all operations; a loop over layers counts each time it goes round."""
    own = sum(
        math.prod(out.aval.shape) * out.aval.dtype.itemsize
        for equation in program.eqns
        for out in equation.outvars
    )
    loops = (equation.params for equation in program.eqns if equation.primitive.name == "scan")
    return own + sum(loop["length"] * _of_program(loop["jaxpr"].jaxpr) for loop in loops)


def _pairs(
    transport: AbstractTransport, pairs: int, n: int, d: int, differentiated: bool
) -> float | int:
    """How many numbers a device's problems between two ensembles (n, d) hold at once."""
    together = side_by_side(pairs, n, d, transport.in_turn, jax.default_backend())
    if together == pairs:
        return pairs * _pair(transport, n, d, differentiated)
    # Those that wait hold their two ends, and later what derivatives take.
    waiting = (8 if isinstance(transport, GaussianTransport) else 5.5) if differentiated else 2
    return pairs * waiting * n * d + together * _pair(transport, n, d, differentiated)


def _pair(transport: AbstractTransport, n: int, d: int, differentiated: bool) -> float | int:
    """How many numbers one problem holds."""
    if isinstance(transport, ProjectedTransport | MappedTransport):
        compared = jax.eval_shape(
            lambda x: coordinates(transport, x)[0], jax.ShapeDtypeStruct((1, n, d), np.float32)
        )
        while isinstance(transport, ProjectedTransport | MappedTransport):
            transport = transport.transport
        return (4 if differentiated else 2) * n * d + _pair(
            transport, n, compared.shape[2], differentiated
        )
    ends = n * d
    if isinstance(transport, ExactTransport):
        return (9 if differentiated else 5) * ends + (
            0 if d == 1 else (3.1 if differentiated else 2.05) * n**2
        )
    if isinstance(transport, GaussianTransport):
        return (
            (6 * ends + 8 * min(n, d) ** 2) if differentiated else (3 * ends + 3 * min(n, d) ** 2)
        )
    if isinstance(transport, SlicedTransport):
        return (6.5 if differentiated else 4) * ends + (
            13 if differentiated else 5
        ) * n * transport.directions
    if isinstance(transport, SinkhornTransport) and transport.chunk is not None:
        return (17 if differentiated else 7) * ends + (
            3 if differentiated else 1.1
        ) * n * transport.chunk
    return (11 if differentiated else 3) * ends + 5 * n**2


def memory_of_a_device() -> float:
    """The bytes that each device of this machine can hold; devices that are cores of a CPU share its memory."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        # Where a device does not tell, what the smallest accelerators have.
        return float((device.memory_stats() or {}).get("bytes_limit", 16e9))
    return memory_of_the_machine() / len(jax.local_devices())


def memory_of_the_machine() -> float:
    """The bytes of memory beside the processor."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return np.inf


def size(count: int | float) -> str:
    """A number of bytes for readers."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
