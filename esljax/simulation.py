r"""The ensemble tracker: the package's only loop over training time.

    θ_{k+1} = rule.step(θ_k; λ(k/K), fold_in(key, k)),   k = 0, ..., K-1,   snapshots at s_j = j/J

The state is one array (n, d). Randomness is addressed by step, never threaded, so no number depends on snapshots, recomputation, the way
of differentiating, or the devices that the members live on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import InputError, check_ensemble, check_finite, check_key, check_nonnegative, check_positive_int, known, refuse
from esljax._types import Array, ArrayLike, Float, Key, Shaped
from esljax.adjoint import AbstractGradient, HessianAdjoint
from esljax.dynamics import AbstractRule, Controls
from esljax.potentials import AbstractPotential, Driven, potential_at


class Trajectory(eqx.Module):
    """An ensemble at J+1 training times, with the controls that drove it if they are known."""

    times: Float[Array, "*runs snapshots"]
    """Training times, from 0 to 1: s_j = j/J if simulated, any increasing ones if recorded."""
    positions: Float[Array, "*runs snapshots n p"]
    """The members at these times, or their features if the run was observed; p = d if not."""
    energies: Float[Array, "*runs snapshots n"] | None
    """Φ of each member at these times, on the batch that its next step would see: unbiased, and exact for potentials without batches.
    None if the run was recorded."""
    rates: Float[Array, "*runs K"] | None
    """The learning rates η_k; None if the run was recorded."""
    temperatures: Float[Array, "*runs K"] | None
    """The temperatures T_k; None if the run was recorded."""
    final: Float[Array, "*runs n d"]
    """The positions at s = 1, also of an observed run; of recorded features the last ones."""
    observed: bool = eqx.field(static=True)
    """Whether `positions` holds features instead of positions."""

    def __str__(self) -> str:
        *runs, snapshots, members, numbers = self.positions.shape
        kind = "features" if self.observed else "coordinates"
        several = f"{'x'.join(map(str, runs))} runs, each " if runs else ""
        steps = "recorded" if self.rates is None else f"{self.rates.shape[-1]} steps"
        return f"Trajectory: {several}{members} members of {numbers} {kind}, {steps}, {snapshots} snapshots"


def recorded(positions: Shaped[ArrayLike, "snapshots n d"], times: Any = None, *, observed: bool = False) -> Trajectory:
    """A run that something else has made, as a `Trajectory` without learning rates, temperatures and energies.

    Only what snapshots can tell is measured of it: Σ, L², W2² and their split on the clock of training time. D and U need learning rates.

    **Args:**
    - `positions`: the members at each snapshot, shape (J+1, n, d) with J ≥ 1 and n ≥ 2; member i is the same network in every snapshot.
      NumPy or JAX arrays, or what `numpy.asarray` takes (a PyTorch tensor on the CPU, detached). Integers and half precision become the
      default floating type.
    - `times`: when they were taken, shape (J+1,), increasing, in any unit and from any origin: they are rescaled to [0, 1]. Evenly spaced
      by default.
    - `observed`: whether `positions` holds features of the members, such as their outputs, in place of parameters.

    **Returns:** `Trajectory`, whose `energies`, `rates` and `temperatures` are None.
    **Raises:** `InputError` for wrong shapes, values that are not finite numbers, and times that do not increase.
    **Differentiation:** in `positions` and `times`.

    **Example:**

        >>> import numpy as np
        >>> print(recorded(np.random.default_rng(0).normal(size=(5, 8, 2)), times=[0, 10, 20, 50, 100]))
        Trajectory: 8 members of 2 coordinates, recorded, 5 snapshots
    """
    name = "features" if observed else "positions"
    positions = _as_numbers(name, positions)
    if positions.ndim != 3 or positions.shape[2] < 1:
        raise refuse(name, "have shape (snapshots, members, numbers per member)", f"has shape {positions.shape}")
    snapshots, members, _ = positions.shape
    if snapshots < 2 or members < 2:
        counted = f"{snapshots} snapshot{'s' * (snapshots != 1)} of {members} member{'s' * (members != 1)}"
        raise refuse(name, "hold at least two snapshots of at least two members", f"holds {counted}")
    if known(positions):
        bad = ~np.isfinite(np.asarray(positions)).all(axis=2)
        if bad.any():
            snapshot, member = (int(i) for i in np.argwhere(bad)[0])
            where = f"member {member} at snapshot {snapshot}" + (f", the first of {int(bad.sum())} such places" if bad.sum() > 1 else "")
            raise refuse(name, f"be finite in {positions.dtype}", f"is not for {where}")
    return Trajectory(
        times=_rescaled(times, snapshots, positions.dtype),
        positions=positions,
        energies=None,
        rates=None,
        temperatures=None,
        final=positions[-1],
        observed=observed,
    )


def _as_numbers(name: str, x: Any) -> Float[Array, "..."]:
    """Numbers of any kind as a floating array of at least single precision."""
    try:
        array = x if isinstance(x, jax.Array) else np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise refuse(name, "be an array", f"cannot be made one: {str(error).splitlines()[0].split('. ')[0].rstrip('.')}") from error
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    if not floating and not jnp.issubdtype(array.dtype, jnp.integer):
        raise refuse(name, "hold real numbers", f"has dtype {array.dtype}")
    keep = floating and array.dtype.itemsize in (4, 8)
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused as such
        return jnp.asarray(array, None if keep else jnp.result_type(float))


def _rescaled(times: Any, snapshots: int, dtype: Any) -> Float[Array, " snapshots"]:
    if times is None:
        return jnp.arange(snapshots, dtype=dtype) / (snapshots - 1)
    if known(times):
        # Step counts and seconds since an epoch differ in digits that single precision has not got.
        times = _double("times", times)
    if times.shape != (snapshots,):
        raise refuse("times", f"have shape ({snapshots},), one for each snapshot", f"has shape {times.shape}")
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
        raise refuse("times", f"stay apart in {scaled.dtype} once rescaled to [0, 1]", "has times that become one")
    return scaled


def _double(name: str, x: Any) -> np.ndarray:
    try:
        array = np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise refuse(name, "be an array", "cannot be made one") from error
    if array.dtype.kind not in "iuf":
        raise refuse(name, "hold real numbers", f"has dtype {array.dtype}")
    return array.astype(np.float64)


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
) -> Trajectory:
    """Move an ensemble through `steps` steps of `rule` in `potential` and keep evenly spaced snapshots.

    **Args:**
    - `potential`: Φ, or `Driven` if it depends on training time. - `rule`: what one step does, with its schedules.
    - `positions`: the ensemble at s = 0, shape (n, d), one row per member, n ≥ 2.
    - `steps`: K ≥ 1. - `key`: of the noise and the batches; step k uses `fold_in(key, k)`.
    - `snapshots`: J, the number of links between snapshots; it must divide `steps`.
    - `observe`: a function of one member (d,) to its features (p,), stored in place of positions when d is large.
    - `gradient`: how to differentiate, `HessianAdjoint()` by default; see `esljax.adjoint`.

    **Returns:** `Trajectory`, with `positions` (J+1, n, d) and `times` (J+1,).
    **Raises:** `InputError` for bad shapes, J that does not divide K, negative rates or temperatures, members that are not finite.
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
    return _simulate(potential, rule, positions, key, steps, snapshots, observe, gradient)


@eqx.filter_jit
def _simulate(potential, rule, positions, key, steps, snapshots, observe, gradient) -> Trajectory:
    # Everything that may be traced goes in as an argument: a derivative of the whole run must not close over tracers.
    arrays, rest = eqx.partition((potential, rule, positions, key, observe), eqx.is_array)

    def run(arrays):
        potential, rule, positions, key, observe = eqx.combine(arrays, rest)
        return _run(potential, rule, positions, key, steps, snapshots, observe, gradient)

    return gradient.wrap(run)(arrays)


def _run(potential, rule, positions, key, steps, snapshots, observe, gradient) -> Trajectory:
    _check_functions(potential, positions, key, observe)
    controls = jax.tree.map(lambda control: control.astype(positions.dtype), rule.controls(steps))

    def batch_key(k):
        return jax.random.fold_in(jax.random.fold_in(key, k), 0)

    def step(positions, k_and_control):
        k, control = k_and_control
        acting = potential_at(potential, k.astype(positions.dtype) / steps)
        kick = lambda x, scale: gradient.kick(acting, x, scale, batch_key(k))  # noqa: E731
        return rule.step(positions, kick, control, jax.random.fold_in(jax.random.fold_in(key, k), 1))

    def link(positions, k_and_controls):
        """The steps between two snapshots, in groups that are recomputed one at a time."""
        start = positions
        length = group_length(steps, snapshots) if gradient.checkpoint else steps // snapshots
        grouped = jax.tree.map(lambda x: x.reshape(-1, length, *x.shape[1:]), k_and_controls)
        group = lambda positions, xs: jax.lax.scan(step, positions, xs)  # noqa: E731
        group = jax.checkpoint(group, prevent_cse=False) if gradient.checkpoint else group
        positions, energies = jax.lax.scan(group, positions, grouped)
        return positions, (features(start), energies[0, 0])

    def features(positions):
        return positions if observe is None else jax.vmap(observe)(positions)

    linked = jax.tree.map(lambda x: x.reshape(snapshots, -1, *x.shape[1:]), (jnp.arange(steps), controls))
    final, (observed, energies) = jax.lax.scan(link, positions, linked)
    last_energies, _ = gradient.kick(potential_at(potential, 1.0), final, jnp.ones((), final.dtype), batch_key(steps))
    return Trajectory(
        times=jnp.arange(snapshots + 1, dtype=positions.dtype) / snapshots,
        positions=jnp.concatenate([observed, features(final)[None]]),
        energies=jnp.concatenate([energies, last_energies[None]]),
        rates=controls.learning_rate,
        temperatures=controls.temperature,
        final=final,
        observed=observe is not None,
    )


def stack(trajectories: Sequence[Trajectory]) -> Trajectory:
    """Several runs of one shape in one `Trajectory`, on a leading axis."""
    if not isinstance(trajectories, Sequence):
        raise refuse("trajectory", "be a Trajectory or a sequence of at least two", f"is a {type(trajectories).__name__}")
    if len(trajectories) < 2 or not all(isinstance(one, Trajectory) for one in trajectories):
        raise refuse("trajectory", "be a Trajectory or a sequence of at least two", f"is a sequence of {len(trajectories)} items")
    shapes = {one.positions.shape for one in trajectories}
    if len(shapes) > 1 or len({_kind(one) for one in trajectories}) > 1:
        raise refuse("trajectory", "hold runs of one shape", f"holds {len(trajectories)} runs with positions of shapes {sorted(shapes)}")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trajectories)


def _kind(trajectory: Trajectory) -> tuple:
    return None if trajectory.rates is None else trajectory.rates.shape, trajectory.final.shape, trajectory.observed


def check_runs(trajectory: Trajectory, jackknife: int) -> None:
    """Refuse what is no run, or several, of at least two snapshots of at least two members that stayed finite."""
    shape = trajectory.positions.shape
    if len(shape) not in (3, 4):
        raise refuse("trajectory", "hold positions (J+1, n, d), or (runs, J+1, n, d)", f"has positions of shape {shape}")
    if shape[-3] < 2 or shape[-2] < 2:
        raise refuse("trajectory", "hold at least two snapshots of at least two members", f"has positions of shape {shape}")
    if len(shape) == 4 and shape[0] < 2:
        raise refuse("trajectory", "hold at least two runs on its leading axis", f"has positions of shape {shape}")
    if isinstance(jackknife, bool) or not isinstance(jackknife, int) or jackknife < 0:
        raise refuse("jackknife", "be an integer of at least 0", f"is {jackknife!r}")
    if known(trajectory.positions):
        bad = np.logical_not(np.isfinite(np.asarray(trajectory.positions)).all(axis=-1))
        if bad.any():
            snapshot = int(np.argwhere(bad.any(axis=-1).reshape(-1, shape[-3]))[:, 1].min())
            raise InputError(
                f"Argument `trajectory` must hold finite members, but {int(bad[..., -1, :].sum())} of them are not at the end, the first "
                f"from snapshot {snapshot} on; the likely cause is a learning rate above the stability limit 2/(largest curvature)."
            )


def group_length(steps: int, snapshots: int) -> int:
    """The divisor of K/J nearest to √K on a log scale: keeping the ends of all groups and the inside of one costs about 2√K states."""
    link = steps // snapshots
    divisors = [c for c in range(1, link + 1) if link % c == 0]
    return min(divisors, key=lambda c: abs(np.log(c / np.sqrt(steps))))


def _check_functions(potential: AbstractPotential | Driven, positions: Array, key: Key, observe: Any) -> None:
    """What a member goes through, on shapes alone and so only when a run is compiled."""
    d = positions.shape[1]
    potential = potential_at(potential, 0.0)
    member = jax.ShapeDtypeStruct((d,), positions.dtype)
    try:
        batch = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], potential.draw(key, 1)))
        energy, slope = jax.eval_shape(potential.energy_and_gradient, member, batch)
    except (TypeError, ValueError) as error:
        raise refuse("potential", f"accept members of {d} coordinates", f"fails on them: {str(error).splitlines()[0]}") from error
    if energy.shape != () or slope.shape != (d,):
        raise refuse(
            "potential", f"accept members of {d} coordinates", f"gives an energy of shape {energy.shape} and a slope of shape {slope.shape}"
        )
    if observe is not None:
        features = jax.eval_shape(observe, member)
        if len(getattr(features, "shape", ())) != 1:
            raise refuse("observe", "return shape (p,) for one member", f"returns shape {getattr(features, 'shape', features)}")


def _check(potential: Any, rule: Any, positions: Any, key: Any, steps: int, snapshots: int, observe: Any, gradient: Any) -> None:
    if not isinstance(potential, AbstractPotential | Driven):
        raise refuse("potential", "be a potential such as Quadratic(1.0)", f"is a {type(potential).__name__}")
    check_ensemble("positions", positions, minimum_members=2)
    check_positive_int("steps", steps)
    check_positive_int("snapshots", snapshots)
    if steps % snapshots:
        divisors = [j for j in range(1, steps + 1) if steps % j == 0]
        near = [*[j for j in divisors if j < snapshots][-1:], *[j for j in divisors if j > snapshots][:1]]
        raise refuse("snapshots", f"divide the {steps} steps (such as {' or '.join(map(str, near))})", f"is {snapshots}")
    if not isinstance(rule, AbstractRule):
        raise refuse("rule", "be a rule such as Langevin(learning_rate, temperature)", f"is a {type(rule).__name__}")
    check_key("key", key)
    if observe is not None and not callable(observe):
        raise refuse("observe", "be a function of one member (d,)", f"is {observe!r}")
    if not isinstance(gradient, AbstractGradient):
        raise refuse("gradient", "be HessianAdjoint(), Autodiff() or ForwardMode()", f"is {gradient!r}")
    controls: Controls = rule.controls(steps)
    for name, values in controls._asdict().items():
        if values.shape != (steps,):
            raise refuse(name, "be one number at each training time", f"has shape {values.shape[1:]}")
        check_finite(name, values)
        check_nonnegative(name, values)
