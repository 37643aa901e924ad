r"""The ensemble tracker: the package's only loop over training time.

    θ_{k+1} = rule.step(θ_k; λ(k/K), fold_in(key, k)),   k = 0, ..., K-1,   snapshots at s_j = j/J

The state is one array (n, d). Randomness is addressed by step, never threaded, so no number depends on snapshots, recomputation, the way
of differentiating, or the devices that the members live on.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import (
    check_ensemble,
    check_finite,
    check_key,
    check_nonnegative,
    check_positive_int,
    refuse,
)
from esljax._types import Array, ArrayLike, Float, Key
from esljax.files import Checkpoints, session
from esljax.potentials import AbstractPotential, Driven, potential_at
from esljax.sharding import AnyMesh, bring, choose_mesh, shard_members
from esljax.simulation.adjoint import AbstractGradient, HessianAdjoint
from esljax.simulation.rules import AbstractRule, Controls
from esljax.simulation.trajectory import Trajectory


def simulate(
    potential: AbstractPotential | Driven,
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
    """Move an ensemble through `steps` steps of `rule` in `potential` and keep evenly spaced snapshots.

    **Args:**
    - `potential`: Φ, or `Driven` if it depends on training time. - `rule`: what one step does, with its schedules.
    - `positions`: the ensemble at s = 0, shape (n, d), one row per member, n ≥ 2.
    - `steps`: K ≥ 1. - `key`: of the noise and the batches; step k uses `fold_in(key, k)`.
    - `snapshots`: J, the number of links between snapshots; it must divide `steps`.
    - `observe`: a function of one member (d,) to its features (p,), stored in place of positions when d is large.
    - `gradient`: how to differentiate, `HessianAdjoint()` by default; see `esljax.simulation.adjoint`.
    - `mesh`: the devices that share the members, such as `member_mesh()`; by default those that `positions` lies on, those of
      `jax.set_mesh`, or all local ones if it was not placed anywhere. Positions that are made inside `jit` lie nowhere yet: there a mesh
      must be given or set, or a single device runs it all. The numbers are the same on any number of devices.
    - `checkpoints`: where to save the run between snapshots, so that it survives its process; see `Checkpoints`. Taken up again it ends
      with the very bits of a checkpointed run that nothing disturbed, on any number of devices. Not inside `jit` or `grad`.

    **Returns:** `Trajectory`, with `positions` (J+1, n, d) and `times` (J+1,).
    **Raises:** `InputError` for bad shapes, J that does not divide K, negative rates or temperatures, members that are not finite or that
    cannot be shared evenly by the devices.
    **Differentiation:** in `rule`, `positions` and `potential`, as `gradient` documents. All values of `gradient` give the same numbers.

    **Example:**

        >>> import jax
        >>> positions = jax.random.normal(jax.random.key(0), (8, 2))
        >>> print(simulate(Quadratic(1.0), Langevin(0.1, 0.01), positions, steps=40, key=jax.random.key(1)))
        Trajectory: 8 members of 2 coordinates, 40 steps, 21 snapshots
    """
    gradient = HessianAdjoint() if gradient is None else gradient
    positions = jnp.asarray(positions)
    _check(potential, rule, positions, key, steps, snapshots, observe, gradient)
    mesh = choose_mesh(mesh, positions)
    potential, rule, key, observe = bring((potential, rule, key, observe), mesh)
    if checkpoints is not None:
        return _survive(
            checkpoints, potential, rule, positions, key, steps, snapshots, observe, gradient, mesh
        )
    positions = shard_members(positions, mesh)
    return _simulate(potential, rule, positions, key, steps, snapshots, observe, gradient, mesh)


@eqx.filter_jit
def _simulate(
    potential, rule, positions, key, steps, snapshots, observe, gradient, mesh
) -> Trajectory:
    # Everything that may be traced goes in as an argument: a derivative of the whole run must not close over tracers.
    arrays, rest = eqx.partition((potential, rule, positions, key, observe), eqx.is_array)

    def run(arrays):
        potential, rule, positions, key, observe = eqx.combine(arrays, rest)
        return _run(potential, rule, positions, key, steps, snapshots, observe, gradient, mesh)

    return gradient.wrap(run)(arrays)


def _run(potential, rule, positions, key, steps, snapshots, observe, gradient, mesh) -> Trajectory:
    check_functions(potential, positions, key, observe)
    controls = _controls(rule, steps, positions.dtype)
    linked = jax.tree.map(
        lambda x: x.reshape(snapshots, -1, *x.shape[1:]), (jnp.arange(steps), controls)
    )
    final, kept = _scan(potential, rule, positions, key, linked, steps, observe, gradient)
    return _trajectory(
        final, kept, _last(potential, final, key, steps, observe, gradient), controls, observe, mesh
    )


def _controls(rule: AbstractRule, steps: int, dtype: Any) -> Controls:
    return jax.tree.map(lambda control: control.astype(dtype), rule.controls(steps))


def _scan(
    potential, rule, positions, key, linked, steps, observe, gradient
) -> tuple[Array, tuple[Array, Array]]:
    """Through the links whose steps and controls are given, (links, steps of a link): where it ends, and features and energies of the
    members where each link begins."""

    def step(positions, k_and_control):
        k, control = k_and_control
        acting = potential_at(potential, k.astype(positions.dtype) / steps)

        def kick(x, scale):
            return gradient.kick(acting, x, scale, _batch_key(key, k))

        return rule.step(
            positions, kick, control, jax.random.fold_in(jax.random.fold_in(key, k), 1)
        )

    def link(positions, k_and_controls):
        """The steps between two snapshots, in groups that are recomputed one at a time."""
        start, inside = positions, k_and_controls[0].shape[0]
        length = group_length(steps, steps // inside) if gradient.recompute else inside
        grouped = jax.tree.map(lambda x: x.reshape(-1, length, *x.shape[1:]), k_and_controls)

        def group(positions, xs):
            return jax.lax.scan(step, positions, xs)

        group = jax.checkpoint(group, prevent_cse=False) if gradient.recompute else group
        positions, energies = jax.lax.scan(group, positions, grouped)
        return positions, (_features(observe, start), energies[0, 0])

    return jax.lax.scan(link, positions, linked)


def _last(potential, final, key, steps, observe, gradient) -> tuple[Array, Array]:
    """Features and energies of the members at s = 1."""
    energies, _ = gradient.kick(
        potential_at(potential, 1.0), final, jnp.ones((), final.dtype), _batch_key(key, steps)
    )
    return _features(observe, final), energies


def _trajectory(final, kept, last, controls: Controls, observe, mesh) -> Trajectory:
    positions, energies = (
        shard_members(jnp.concatenate([x, end[None]]), mesh, axis=1)
        for x, end in zip(kept, last, strict=True)
    )
    return Trajectory(
        times=jnp.arange(positions.shape[0], dtype=final.dtype) / (positions.shape[0] - 1),
        positions=positions,
        energies=energies,
        rates=controls.learning_rate,
        temperatures=controls.temperature,
        final=shard_members(final, mesh),
        observed=observe is not None,
        mesh=mesh,
    )


def _batch_key(key: Key, k: Any) -> Key:
    return jax.random.fold_in(jax.random.fold_in(key, k), 0)


def _features(observe: Any, positions: Array) -> Array:
    return positions if observe is None else jax.vmap(observe)(positions)


def _survive(
    checkpoints, potential, rule, start, key, steps, snapshots, observe, gradient, mesh
) -> Trajectory:
    """The same run link by link, each in one compiled program, with a chance to be saved after each."""
    # Told before the members are spread: over whichever processes, which may be others when the run goes on.
    run = {
        "steps": steps,
        "snapshots": snapshots,
        "potential": potential,
        "rule": rule,
        "positions": start,
        "key": key,
    }
    positions = shard_members(start, mesh)
    controls = _compiled_controls(rule, steps, positions.dtype)
    eqx.filter_eval_shape(check_functions, potential, positions, key, observe)
    linked = jax.tree.map(
        lambda x: x.reshape(snapshots, 1, -1, *x.shape[1:]), (jnp.arange(steps), controls)
    )
    features = eqx.filter_eval_shape(_features, observe, positions)
    # The whole history from the start: what grew would be compiled anew for each of its lengths.
    kept = _compiled_blank(snapshots, len(positions), features, positions.dtype, mesh)
    with session(checkpoints, {**run, "observe": observe}) as saved:
        done, (positions, kept) = saved.restore(lambda _: (positions, kept)) or (
            0,
            (positions, kept),
        )
        for j in range(done, snapshots):
            inside = jax.tree.map(lambda x, j=j: x[j], linked)
            positions, link = _compiled_scan(
                potential, rule, positions, key, inside, steps, observe, gradient
            )
            kept = _entered(kept, link, j, mesh)
            jax.block_until_ready(positions)
            saved.offer(j + 1, lambda state=(positions, kept): state, last=j + 1 == snapshots)
    last = _compiled_last(potential, positions, key, steps, observe, gradient)
    return _trajectory(positions, kept, last, controls, observe, mesh)


def _blank(snapshots, members, features, dtype, mesh) -> tuple[Array, Array]:
    kept = (
        jnp.zeros((snapshots, *features.shape), features.dtype),
        jnp.zeros((snapshots, members), dtype),
    )
    return shard_members(kept[0], mesh, axis=1), shard_members(kept[1], mesh, axis=1)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _entered(
    kept: tuple[Array, Array], link: tuple[Array, Array], j: Any, mesh: AnyMesh | None
) -> tuple[Array, Array]:
    """The history with the link that begins at snapshot j, in place."""
    history, energies = (
        jax.lax.dynamic_update_slice_in_dim(x, new, j, 0) for x, new in zip(kept, link, strict=True)
    )
    return shard_members(history, mesh, axis=1), shard_members(energies, mesh, axis=1)


_compiled_controls = eqx.filter_jit(_controls)
_compiled_scan = eqx.filter_jit(_scan)
_compiled_last = eqx.filter_jit(_last)
_compiled_blank = eqx.filter_jit(_blank)


def group_length(steps: int, snapshots: int) -> int:
    """The divisor of K/J nearest to √K on a log scale: keeping the ends of all groups and the inside of one costs about 2√K states."""
    link = steps // snapshots
    divisors = [c for c in range(1, link + 1) if link % c == 0]
    return min(divisors, key=lambda c: abs(np.log(c / np.sqrt(steps))))


def check_links(steps: int, snapshots: int) -> None:
    """Refuse snapshots that are not evenly spaced."""
    check_positive_int("steps", steps)
    check_positive_int("snapshots", snapshots)
    if steps % snapshots:
        divisors = [j for j in range(1, steps + 1) if steps % j == 0]
        near = [
            *[j for j in divisors if j < snapshots][-1:],
            *[j for j in divisors if j > snapshots][:1],
        ]
        raise refuse(
            "snapshots",
            f"divide the {steps} steps (such as {' or '.join(map(str, near))})",
            f"is {snapshots}",
        )


def check_functions(
    potential: AbstractPotential | Driven, positions: Any, key: Key, observe: Any
) -> None:
    """What a member goes through, on shapes alone and so only when a run is compiled."""
    d = positions.shape[1]
    potential = potential_at(potential, 0.0)
    member = jax.ShapeDtypeStruct((d,), positions.dtype)
    try:
        batch = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], potential.draw(key, 1)))
        energy, slope = jax.eval_shape(potential.energy_and_gradient, member, batch)
    except (TypeError, ValueError) as error:
        raise refuse(
            "potential",
            f"accept members of {d} coordinates",
            f"fails on them: {str(error).splitlines()[0]}",
        ) from error
    if energy.shape != () or slope.shape != (d,):
        raise refuse(
            "potential",
            f"accept members of {d} coordinates",
            f"gives an energy of shape {energy.shape} and a slope of shape {slope.shape}",
        )
    if observe is not None:
        features = jax.eval_shape(observe, member)
        if len(getattr(features, "shape", ())) != 1:
            raise refuse(
                "observe",
                "return shape (p,) for one member",
                f"returns shape {getattr(features, 'shape', features)}",
            )


def _check(
    potential: Any,
    rule: Any,
    positions: Any,
    key: Any,
    steps: int,
    snapshots: int,
    observe: Any,
    gradient: Any,
) -> None:
    if not isinstance(potential, AbstractPotential | Driven):
        raise refuse(
            "potential", "be a potential such as Quadratic(1.0)", f"is a {type(potential).__name__}"
        )
    check_ensemble("positions", positions, minimum_members=2)
    check_links(steps, snapshots)
    if not isinstance(rule, AbstractRule):
        raise refuse(
            "rule",
            "be a rule such as Langevin(learning_rate, temperature)",
            f"is a {type(rule).__name__}",
        )
    check_key("key", key)
    if observe is not None and not callable(observe):
        raise refuse("observe", "be a function of one member (d,)", f"is {observe!r}")
    if not isinstance(gradient, AbstractGradient):
        raise refuse(
            "gradient", "be HessianAdjoint(), Autodiff() or ForwardMode()", f"is {gradient!r}"
        )
    controls: Controls = rule.controls(steps)
    for name, values in controls._asdict().items():
        if values.shape != (steps,):
            raise refuse(
                name, "be one number at each training time", f"has shape {values.shape[1:]}"
            )
        check_finite(name, values)
        check_nonnegative(name, values)
