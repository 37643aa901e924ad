r"""The ensemble tracker: the package's only loop over training time.

    θ_{k+1} = rule.step(θ_k; controls(k/K), fold_in(key, k)),   k = 0, ..., K-1

The state is one array (n, d). Randomness is addressed by step, never threaded, so no number depends
on snapshots, recomputation, the way of differentiating, or the devices that the members live on.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import (
    check_finite,
    check_fits,
    check_key,
    check_kind,
    check_nonnegative,
    check_positive_int,
    door,
    in_words,
    plain_int,
    refuse,
    wrong_answer,
)
from esljax._types import Array, ArrayLike, Float, Int, Key
from esljax.files import Checkpoints, session, watch_processes
from esljax.potentials import AbstractPotential, as_of_jax, check_potential, drawn_in_line
from esljax.sharding import AnyMesh, bring, choose_mesh, shard_members
from esljax.simulation.adjoint import AbstractGradient, HessianAdjoint, group_length
from esljax.simulation.checks import (
    as_ensemble,
    check_arrays,
    check_functions,
    check_law,
    check_links,
)
from esljax.simulation.rules import AbstractRule, Controls
from esljax.simulation.trajectory import Keys, Trajectory, checked_keys, laid
from esljax.simulation.work import work_of_change

# The two uses of the key of a step.
_BATCHES, _NOISE = 0, 1


class Steps(NamedTuple):
    """Some of the steps of a run, on common leading axes."""

    k: Int[Array, "..."]
    """Their numbers, from 0 to K-1."""
    before: Int[Array, "..."]
    """The numbers of the steps before them; of the first step of a link its own."""
    control: Controls
    """Their learning rates and temperatures."""


class Kept(NamedTuple):
    """The history of a run, on a leading axis of its links (J,)."""

    features: Float[Array, "J n p"]
    """The members where each link begins, or their features."""
    energies: Float[Array, "J n"]
    """Their energies there."""
    entry: Float[Array, "J n"] | None
    """The work there, of the change of the potential that the link before ends with; 0 at the
    start. None if the potential never moves."""
    work: Float[Array, "J n"] | None
    """The work inside each link. None if the potential never moves."""


class Run(eqx.Module):
    """Everything that moves an ensemble, except its start. It holds arrays and knows no devices."""

    potential: AbstractPotential
    """Φ, at any training time."""
    rule: AbstractRule
    """The map of one step, with its schedules."""
    key: Key
    """The source of the noise and the batches of all steps."""
    observe: Callable[[Array], Array] | None
    """The features (p,) of one member (d,) that snapshots hold; None for the member itself."""
    gradient: AbstractGradient
    """The way in which the run is differentiated."""
    steps: int = eqx.field(static=True, converter=plain_int)
    """K."""

    def __check_init__(self):
        check_positive_int("steps", self.steps)
        check_potential("potential", self.potential)
        must = "be a rule such as Langevin(learning_rate, temperature)"
        check_kind("rule", self.rule, AbstractRule, must)
        check_key("key", self.key)
        if self.observe is not None and not callable(self.observe):
            raise refuse(
                "observe", "be a function of one member (d,)", f"is {in_words(self.observe)}"
            )
        must = "be HessianAdjoint(), Autodiff() or ForwardMode()"
        check_kind("gradient", self.gradient, AbstractGradient, must)
        controls: Any = self.rule.controls(self.steps)
        if not isinstance(controls, Controls):
            raise wrong_answer("rule", self.rule, "controls", "Controls", controls)
        for name, values in controls._asdict().items():
            if jnp.shape(values) != (self.steps,):
                must = "be one number at each training time (Knots(values) for a table of them)"
                raise refuse(name, must, f"has shape {jnp.shape(values)[1:]}")
            check_finite(name, values)
            check_nonnegative(name, values)
        check_law(self.rule, controls)

    def links(self, snapshots: int, dtype: Any) -> Steps:
        """All steps by the links between snapshots that they belong to, each (J, K/J)."""
        controls = self.rule.controls(self.steps)
        k = jnp.arange(self.steps)
        before = jnp.maximum(k - 1, k - k % (self.steps // snapshots))
        steps = Steps(k, before, jax.tree.map(lambda x: x.astype(dtype), controls))
        return jax.tree.map(lambda x: x.reshape(snapshots, -1, *x.shape[1:]), steps)

    def through(self, positions: Float[Array, "n d"], links: Steps) -> tuple[Array, Kept]:
        """Through some links: their end, and the rest where each of them begins."""

        def link(positions, steps):
            end, energies, work = self.between(positions, steps)
            first = steps.k[0]
            entry = self.work(jnp.maximum(first - 1, 0), positions, first)
            return end, Kept(self.features(positions), energies, entry, work)

        return jax.lax.scan(link, positions, links)

    def between(
        self, positions: Float[Array, "n d"], steps: Steps
    ) -> tuple[Array, Array, Array | None]:
        """Through the steps of one link: positions at its end, energies at its start, and the work
        inside.

        If states are recomputed, the steps are grouped, and the backward pass recomputes one group
        at a time.
        """
        length, recompute = steps.k.size, self.gradient.recompute
        if recompute:
            length = group_length(self.steps, self.steps // length)

        def step(state, step):
            # A method bound to tracers has no hash, which a scan asks its body for.
            positions, work = state
            if work is not None:
                work += self.work(step.before, positions, step.k)
            positions, energies = self.step(positions, step)
            return (positions, work), energies

        def group(state, steps):
            return jax.lax.scan(step, state, steps)

        group = jax.checkpoint(group, prevent_cse=False) if recompute else group
        grouped = jax.tree.map(lambda x: x.reshape(-1, length, *x.shape[1:]), steps)
        none = jnp.zeros_like(positions[:, 0]) if self.potential.moves else None
        (positions, work), energies = jax.lax.scan(group, (positions, none), grouped)
        return positions, energies[0, 0], work

    def at(self, k: int | Int[Array, ""], dtype: Any) -> AbstractPotential:
        """The potential that acts during step k, at s = k/K."""
        return self.potential.at(jnp.asarray(k, dtype) / self.steps)

    def work(
        self, before: Int[Array, ""], positions: Float[Array, "n d"], k: Int[Array, ""]
    ) -> Float[Array, " n"] | None:
        """The work on each member as step k begins and the potential of step `before` ends."""
        if not self.potential.moves:
            return None
        pair = self.at(before, positions.dtype), self.at(k, positions.dtype)
        return work_of_change(*pair, positions, self.key_of(k, _BATCHES))

    def jumps(self, start: Float[Array, "n d"], final: Float[Array, "n d"]) -> Any:
        """The work at both ends, before the first step and after the last one, (2, n)."""
        if not self.potential.moves:
            return None
        first = self.potential.at_start(), self.at(0, start.dtype)
        last = self.at(self.steps - 1, final.dtype), self.potential.at_end()
        return jnp.stack(
            [
                work_of_change(*first, start, self.key_of(0, _BATCHES)),
                work_of_change(*last, final, self.key_of(self.steps, _BATCHES)),
            ]
        )

    def step(self, positions: Float[Array, "n d"], step: Steps) -> tuple[Array, Array]:
        """θ_k to θ_{k+1}, and the energies Φ(θ_k; k/K)."""
        acting = self.at(step.k, positions.dtype)

        def kick(x, scale):
            return self.kick(acting, x, scale, step.k)

        moved = self.rule.step(positions, kick, step.control, self.key_of(step.k, _NOISE))
        shapes = {"positions": positions.shape, "energies": positions.shape[:1]}
        check_arrays("rule", self.rule, "step", moved, shapes)
        return moved

    def last(self, final: Float[Array, "n d"]) -> tuple[Array, Array]:
        """Features and energies of the last snapshot, at s = 1."""
        unscaled = jnp.ones((), final.dtype)
        energies, _ = self.kick(self.potential.at(1.0), final, unscaled, self.steps)
        return self.features(final), energies

    def kick(
        self,
        acting: AbstractPotential,
        positions: Float[Array, "n d"],
        scale: Array,
        k: int | Int[Array, ""],
    ) -> tuple[Array, Array]:
        """Energies (n,) and scaled gradients (n, d) on the batches of step k."""
        kicked = self.gradient.kick(acting, positions, scale, self.key_of(k, _BATCHES))
        shapes = {"energies": positions.shape[:1], "kicks": positions.shape}
        check_arrays("gradient", self.gradient, "kick", kicked, shapes)
        return kicked

    def features(self, positions: Float[Array, "n d"]) -> Float[Array, "n p"]:
        """The part of these members that a snapshot holds."""
        return positions if self.observe is None else jax.vmap(self.observe)(positions)

    def key_of(self, k: int | Int[Array, ""], use: int) -> Key:
        """The key of step k for its batches or its noise."""
        key = jax.random.fold_in(jax.random.fold_in(drawn_in_line(self.key), k), use)
        # Potentials and rules from outside mix it with keys of their own.
        return as_of_jax(key)


@door
def simulate(
    potential: AbstractPotential,
    rule: AbstractRule,
    positions: Float[ArrayLike, "n d"],
    *,
    steps: int,
    key: Key,
    snapshots: int = 20,
    observe: Callable[[Float[Array, " d"]], Float[Array, " p"]] | None = None,
    gradient: AbstractGradient | None = None,
    mesh: AnyMesh | None = None,
    checkpoints: Checkpoints | None = None,
) -> Trajectory:
    """Move an ensemble through `steps` steps of `rule` in `potential` and store evenly spaced
    snapshots.

    **Args:**
    - `potential`: Φ, which may depend on training time (`Driven`).
    - `rule`: the map of one step, with its schedules.
    - `positions`: the ensemble at s = 0, shape (n, d), one row per member, n ≥ 2.
    - `steps`: K ≥ 1.
    - `key`: of the noise and the batches; step k uses `fold_in(key, k)`.
    - `snapshots`: J, the number of links between snapshots; it must divide `steps`.
    - `observe`: a function of one member (d,) to its features (p,), which snapshots hold instead of
      positions when d is large.
    - `gradient`: how to differentiate, `HessianAdjoint()` by default; also `Autodiff()` and
      `ForwardMode()`.
    - `mesh`: the devices that share the members, such as `member_mesh()`; by default those that
      `positions` lies on, those of `jax.set_mesh`, or all local ones if it was not placed anywhere.
      Positions that are made inside `jit` lie nowhere yet: give or set a mesh there, or a single
      device runs it all. The numbers are the same on any number of devices.
    - `checkpoints`: where to save the run between snapshots, so that it survives its process; see
      `Checkpoints`. A resumed run ends with the same bits as an uninterrupted checkpointed run, on
      any number of devices. Not inside `jit` or `grad`.

    **Returns:** `Trajectory`, with `positions` (J+1, n, d) and `times` (J+1,).
    **Raises:** `InputError` for bad shapes, J that does not divide K, negative rates or
    temperatures, members that are not finite or that the devices cannot share evenly.
    **Differentiation:** in `rule`, `positions` and `potential`, as `gradient` documents. All values
    of `gradient` give the same numbers.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> positions = jax.random.normal(jax.random.key(0), (8, 2))
        >>> rule = esl.Langevin(learning_rate=0.1, temperature=0.01)
        >>> path = esl.simulate(
        ...     esl.Quadratic(1.0), rule, positions, steps=40, key=jax.random.key(1))
        >>> print(path)
        Trajectory: 8 members of 2 coordinates, 40 steps, 21 snapshots
    """
    start = as_ensemble("positions", positions)
    gradient = HessianAdjoint() if gradient is None else gradient
    check_links(steps, snapshots)
    run = Run(potential, rule, key, observe, gradient, steps)
    mesh = choose_mesh(mesh, start)
    _check_room(run, start, snapshots, 1 if mesh is None else mesh.size)
    watch_processes()
    run, spread = bring(run, mesh), shard_members(start, mesh)
    if checkpoints is None:
        path = _at_once(run, spread, snapshots)
    else:
        # The members are described before they are spread: the run may resume on other devices.
        about = {
            "steps": steps,
            "snapshots": snapshots,
            "potential": run.potential,
            "rule": run.rule,
            "positions": start,
            "key": run.key,
            "observe": run.observe,
        }
        if potential.moves:
            # Checkpoints of 0.1 hold no work, and read as those of another run.
            about["work"] = "counted"
        path = _link_by_link(run, spread, snapshots, checkpoints, about)
    return laid(path, mesh)


def _check_room(run: Run, start: Array, snapshots: int, devices: int) -> None:
    """Reject a history, or rates, that this machine cannot hold, before anything is computed."""
    n, d = start.shape
    member = jax.ShapeDtypeStruct((d,), start.dtype)
    p = d if run.observe is None else math.prod(jax.eval_shape(run.observe, member).shape)
    check_fits(
        "snapshots",
        2 * (snapshots + 1) * n * p * start.dtype.itemsize,
        f"{snapshots + 1:,} snapshots of {n:,} members of {p:,} numbers",
        "keep fewer snapshots or members, or a few numbers of each member by `observe`",
        devices,
    )
    kept = 8 * run.steps * start.dtype.itemsize
    check_fits("steps", kept, f"the rates and times of {run.steps:,} steps", "take fewer steps")


@eqx.filter_jit
def _at_once(run: Run, start: Array, snapshots: int) -> Trajectory:
    # A derivative of the whole run must not close over tracers: all arrays go in as arguments.
    arrays, rest = eqx.partition((run, start), eqx.is_array)

    def path(arrays):
        run, start = eqx.combine(arrays, rest)
        check_functions(run.potential, start, run.key, run.observe)
        links = run.links(snapshots, start.dtype)
        final, kept = run.through(start, links)
        return _trajectory(run, final, kept, run.last(final), run.jumps(start, final), links)

    return run.gradient.wrap(path)(arrays)


def _link_by_link(
    run: Run, start: Array, snapshots: int, checkpoints: Checkpoints, about: dict[str, Any]
) -> Trajectory:
    """The same run with a program for each link, and a chance to be saved after each."""
    eqx.filter_eval_shape(check_functions, run.potential, start, run.key, run.observe)
    links = _links(run, snapshots, start.dtype)
    each = jax.tree.map(lambda x: x[:, None], links)

    def advance(j, state):
        positions, kept = state
        positions, link = _through(run, positions, jax.tree.map(lambda x: x[j], each))
        return jax.block_until_ready((positions, _entered(kept, link, j)))

    state = start, _room(run, start, snapshots)
    final, kept = _surviving(checkpoints, about, snapshots, state, advance)
    return _trajectory(run, final, kept, _last(run, final), _jumps(run, start, final), links)


def _surviving(
    checkpoints: Checkpoints,
    about: dict[str, Any],
    rounds: int,
    state: Any,
    advance: Callable[[int, Any], Any],
) -> Any:
    """`advance(j, state)` for every round j, from the latest checkpoint on."""
    with session(checkpoints, about) as saved:
        done, state = saved.restore(lambda _: state) or (0, state)
        for j in range(done, rounds):
            state = advance(j, state)
            saved.offer(j + 1, lambda state=state: state, last=j + 1 == rounds)
    return state


_links = eqx.filter_jit(Run.links)
_through = eqx.filter_jit(Run.through)
_last = eqx.filter_jit(Run.last)
_jumps = eqx.filter_jit(Run.jumps)


@eqx.filter_jit
def _room(run: Run, start: Array, snapshots: int) -> Kept:
    """Room for the whole history, on the devices of the start. A history that grew would compile
    anew for each of its lengths."""
    work = start[:, 0] if run.potential.moves else None
    of_one = Kept(run.features(start), start[:, 0], work, work)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (snapshots, *x.shape)), of_one)


@functools.partial(jax.jit, donate_argnums=0)
def _entered(kept: Kept, link: Kept, j: Any) -> Kept:
    """The history with the link that begins at snapshot j, in the same memory."""
    return jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, j, 0), kept, link
    )


def _trajectory(
    run: Run, final: Array, kept: Kept, last: tuple[Array, Array], jumps: Any, links: Steps
) -> Trajectory:
    def ended(x, end):
        return jnp.concatenate([x, end[None]])

    controls = jax.tree.map(jnp.ravel, links.control)
    law = jax.tree.map(lambda x: x.astype(final.dtype), jax.vmap(run.rule.law)(controls))
    snapshots, members = kept.features.shape[:2]
    work = jnp.zeros((snapshots, members), final.dtype)
    if kept.entry is not None and kept.work is not None:
        # The potential changes after each step, so a link ends with the entry of the next one.
        work = ended(kept.entry[1:], jumps[1]) + kept.work
        work = work.at[0].add(jumps[0])
    return Trajectory(
        times=jnp.arange(snapshots + 1, dtype=final.dtype) / snapshots,
        positions=ended(kept.features, last[0]),
        energies=ended(kept.energies, last[1]),
        rates=controls.learning_rate if law is None else law.mobility,
        temperatures=controls.temperature if law is None else law.temperature,
        final=final,
        observed=run.observe is not None,
        injected=None if law is None else law.injected,
        lawful=law is not None,
        work_of_links=work,
        keys=_keys(run, final),
    )


def _keys(run: Run, final: Array) -> Keys | None:
    """The names of the parameters, if the potential knows them and snapshots hold them."""
    keys = run.potential.parameter_keys
    if keys is None or run.observe is not None:
        return None
    return checked_keys("potential.parameter_keys", keys, final.shape[-1])
