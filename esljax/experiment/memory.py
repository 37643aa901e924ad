"""How much memory a run and its gradient take on each device, predicted from shapes alone.

The plan counts states, snapshots, the states that the gradient keeps, the pairs of snapshots that a
transport solves, and its costs. How often a compiler holds each of them at once was read off the
compiler's own account of compiled programs (`tests/test_memory.py` compares the two). A plan aims
to be right within a half, or within a factor of two without a gradient, not to the byte.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

from esljax._checks import check_positive_int, door, refuse, size
from esljax._types import Array
from esljax.measures import compared
from esljax.potentials import AbstractPotential, check_potential
from esljax.results import table
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
from esljax.transport import AbstractTransport, check_transport


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory of a run, in bytes on each device; `print` shows a table.

    The network and the transport are never at work at once, so only the larger of the two counts;
    the rest is held all the time.
    """

    devices: int
    """The devices that share the members."""
    members: int
    """The members on all devices together."""
    coordinates: int
    """Numbers in one member."""
    data: int
    """The arrays of the potential, such as its data set; a copy on each device."""
    state: int
    """Positions, forces and noise of a step."""
    network: int
    """The intermediate results of the network, for a batch or for all examples."""
    snapshots: int
    """The recorded snapshots, and a copy of them."""
    adjoint: int
    """The states that the gradient keeps; 0 without a gradient."""
    transport: int
    """Pairs of snapshots, costs, and the part of them that the gradient of the distances keeps."""

    @property
    def total(self) -> int:
        """The largest number of bytes held at once."""
        return (
            self.data
            + self.state
            + self.adjoint
            + max(self.network + self.snapshots, self.transport)
        )

    def check(self, available: float) -> "Plan":
        """Return the plan itself if it fits.

        **Args:** `available`: bytes of each device.
        **Raises:** `InputError` if the run needs more; the message names what to change.
        """
        if self.total > available:
            largest = max(_REMEDIES, key=lambda name: getattr(self, name))
            raise refuse(
                "members",
                f"fit in {size(available)} a device ({_REMEDIES[largest]}, or use more devices)",
                f"is {self.members}: with {self.coordinates} numbers each they need about "
                f"{size(self.total)} on each of {self.devices}, most of it "
                f"({size(getattr(self, largest))}) for the {largest}",
            )
        return self

    def __str__(self) -> str:
        parts = ("data", "state", "network", "snapshots", "adjoint", "transport", "total")
        lines = table([(name, size(getattr(self, name))) for name in parts])
        shared = (
            f"{self.members} members of {self.coordinates} numbers on {self.devices} "
            f"device{'s' * (self.devices > 1)}, bytes on each:"
        )
        return f"{shared}\n{lines}"


_REMEDIES = {
    "data": "take fewer examples",
    "state": "take fewer members",
    "network": "take smaller batches",
    "snapshots": "keep fewer snapshots",
    "adjoint": "recompute states instead of keeping all",
    "transport": "keep fewer snapshots, or take the sinkhorn transport in chunks",
}


@door
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
    """Predict the memory of one run and its distances, with or without the gradient of the gap.

    Nothing is computed and nothing compiled. The plan is one of `Langevin`: the fits of a
    `ProbabilityFlow` are not counted. Nor are the tangents of `ForwardMode`, about a state and its
    snapshots for each number that it differentiates in.

    **Args:**
    - `positions`: the ensemble (n, d), or only its shape as `jax.ShapeDtypeStruct`.
    - `potential`, `steps`, `snapshots`, `observe`, `gradient`: as in `simulate`.
    - `transport`: the transport of the distances; None for no distances.
    - `devices`: the number of devices that share the members; none has to be present.
    - `differentiated`: whether the gradient of the gap is taken.

    **Returns:** `Plan`: bytes on each device, if all devices are like those present.
    **Raises:** `InputError` for whatever `simulate` rejects, as far as shapes show it; if the
    members cannot be shared evenly; and for a transport that does not define `numbers_held`.

    **Example:**

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> ensemble = jax.ShapeDtypeStruct((64, 1000), jnp.float32)
        >>> planned = esl.plan_memory(
        ...     esl.Quadratic(1.0), ensemble, steps=100, transport=esl.ExactTransport(), devices=4
        ... )
        >>> planned.check(1e9).adjoint
        12800000
    """
    check_positive_int("devices", devices)
    check_links(steps, snapshots)
    check_potential("potential", potential)
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
    if transport is not None:
        check_transport("transport", transport, n, p, dtype)
    mine = n // devices
    state = mine * d * dtype.itemsize
    pairs = math.ceil(sum(map(len, compared(snapshots))) / devices)
    batch = jax.eval_shape(
        lambda: jax.tree.map(lambda x: x[0], potential.draw(jax.random.key(0), 1))
    )
    # Positions, noise and batch of a step. With states recomputed, those of one group of steps, and
    # the state at the start of each group.
    step = 2 * state + mine * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch))
    length = group_length(steps, snapshots)
    # A batch forward and backward at every step; all examples forward at the end. Compilers fuse
    # about half of the operations.
    of_batch = _intermediates(potential, member, batch)
    network = max(of_batch, _intermediates(potential, member, None) // 2)
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
        else int(_numbers(transport, pairs, n, p, differentiated) * dtype.itemsize),
    )


def _intermediates(potential: AbstractPotential, member: Any, batch: Any) -> int:
    """Return the bytes of all intermediate results from one member to its energy."""
    return _of_program(jax.make_jaxpr(potential.energy)(member, batch))


def _of_program(program: Any) -> int:
    """Return the bytes of the results of all operations; a loop over layers counts every layer."""
    own = sum(
        math.prod(out.aval.shape) * out.aval.dtype.itemsize
        for equation in program.eqns
        for out in equation.outvars
    )
    loops = (equation.params for equation in program.eqns if equation.primitive.name == "scan")
    return own + sum(loop["length"] * _of_program(loop["jaxpr"].jaxpr) for loop in loops)


def _numbers(
    transport: AbstractTransport, pairs: int, n: int, d: int, differentiated: bool
) -> float | int:
    """Return how many numbers a device's problems between two ensembles (n, d) hold at once."""
    held = transport.numbers_held(n, d, differentiated)
    if not isinstance(held, int | float):
        raise refuse(
            "transport",
            "define `numbers_held(n, d, differentiated)`, the numbers that one problem holds at "
            "once, for a plan of its memory",
            f"that of {transport.name} returns {held!r}",
        )
    together = side_by_side(pairs, n, d, transport.in_turn, jax.default_backend())
    if together == pairs:
        return pairs * held
    return pairs * transport.numbers_waiting(n, d, differentiated) + together * held
