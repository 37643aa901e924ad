r"""Gradient optimization of any pytree of controls, under constraints, with fresh noise each time.

    minimize E f(controls)   subject to   E r(controls) ≤ 0,   E h(controls) = 0

by the augmented Lagrangian: minimize f + Σ (max(0, λ + μ r)² - λ²)/2μ + Σ (λ h + μ h²/2) for a
while, then move the multipliers to max(0, λ + μ r) and λ + μ h, and repeat. Candidates are compared
on keys that no gradient ever saw.
Reference: Hestenes (1969); Powell (1969); Nocedal and Wright, Numerical Optimization (2006), ch. 17
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from esljax._checks import (
    check_key,
    check_nonnegative,
    check_positive,
    check_positive_int,
    door,
    refuse,
)
from esljax._types import Array, Key
from esljax.files import Checkpoints, session
from esljax.optimization.doubts import doubts, judged_multipliers
from esljax.optimization.lagrangian import Compiled, Objective, Seen, split
from esljax.optimization.result import Iteration, Optimum
from esljax.optimization.search import Search, State, Trouble
from esljax.results import StandardErrors
from esljax.sharding import AnyMesh, find_mesh, replicate


@door
def optimize(
    objective: Objective,
    controls: Any,
    *,
    key: Key,
    iterations: int,
    optimizer: optax.GradientTransformation | None = None,
    rounds: int = 8,
    validation: int = 1,
    tolerance: float = 1e-3,
    penalty: float = 10.0,
    callback: Callable[[Iteration], None] | None = None,
    checkpoints: Checkpoints | None = None,
    mesh: AnyMesh | None = None,
) -> Optimum:
    """Minimize `objective` over the floating leaves of `controls` by gradient.

    **Args:**
    - `objective`: `objective(controls, key)` to a scalar; or `(scalar, residuals)`, a pytree of
      residuals, to be ≤ 0, or = 0 inside `Equality`; or `(scalar, residuals, auxiliary)`, the last
      for the callback. Make residuals relative: `loss/target - 1`.
    - `controls`: where to start, any pytree.
    - `key`: iteration i sees `fold_in(key, i)`, fresh noise each time.
    - `iterations`: gradient steps.
    - `optimizer`: any optax transformation; by default Adam with rate 0.15 falling to 0 on a cosine
      and short memories (β = .8, .95), right for controls on a log scale such as `Knots` and some
      tens of iterations; it cuts gradients of more than 10 times the usual size. `optax.lbfgs()`
      suits objectives without noise.
    - `rounds`: how often a candidate is judged; in each round the multipliers move once in all.
    - `validation`: held-out keys for each judgment.
    - `tolerance`: residual up to which a constraint counts as satisfied.
    - `penalty`: the most that μ may be, for an objective divided by its first value. A residual
      that scatters over keys gets a smaller one, so that its noise does not drive the multiplier.
    - `callback`: sees an `Iteration` after each. `KeyboardInterrupt` ends the search with the best
      so far; anything else that the callback raises passes through.
    - `checkpoints`: where to save the search between iterations, so that it survives its process;
      see `Checkpoints`. A resumed search ends with the same bits as one that nothing disturbed.
    - `mesh`: the devices that every run in `objective` is spread over, such as `member_mesh()`, as
      if all of it stood under `jax.set_mesh`. By default each run lies where its own `mesh` or its
      `positions` are.

    **Returns:** `Optimum`. A value or gradient that is not finite, or explodes, ends the search:
    the best so far is returned and `message` names the iteration and the likely cause. At the start
    and after each round one more gradient, of another noise, tells signal from noise; `agreement`
    has the numbers. `doubts` names what speaks against the answer: gradients of two noises that
    disagree, or far above the usual size; controls whose gradient is exactly 0 at the start, such
    as a temperature that starts at 0; a multiplier beside a slack residual.
    **Raises:** `InputError` if `controls` has no floating leaf, or the first value or gradient is
    not finite.
    **Differentiation:** none; this is a loop on the host around one compiled step.

    **Example:**

        >>> import esljax as esl
        >>> import jax
        >>> import jax.numpy as jnp
        >>> objective = lambda x, key: (x - 3) ** 2
        >>> start = jnp.array(0.0)
        >>> optimum = esl.optimize(objective, start, key=jax.random.key(0), iterations=200)
        >>> round(float(optimum.controls), 1)
        3.0

        A temperature that starts at 0 has slope 0 there, by convention:

        >>> def energy(temperature, key):
        ...     rule = esl.Langevin(0.1, temperature)
        ...     start = jnp.ones((4, 1))
        ...     path = esl.simulate(esl.Quadratic(1.0), rule, start, steps=20, key=key)
        ...     return jnp.mean(path.final**2)
        >>> cold = esl.optimize(energy, esl.Constant(0.0), key=jax.random.key(0), iterations=2)
        >>> print(cold.doubts[0].split(";")[0])
        The gradient of controls.value is exactly 0 at the start on two noises
    """
    check_positive_int("iterations", iterations)
    check_positive_int("rounds", rounds)
    check_positive_int("validation", validation)
    check_positive("penalty", penalty)
    check_nonnegative("tolerance", tolerance)
    check_key("key", key)
    if not callable(objective):
        raise refuse("objective", "be a function of (controls, key)", f"is {objective!r}")
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        raise refuse("optimizer", "be an optax optimizer", f"is {optimizer!r}")
    # Cutting a gradient is a choice of the optimizer, and contradicts a search along a line.
    cuts = optimizer is None
    optimizer = _default_optimizer(iterations) if optimizer is None else optimizer
    mesh = find_mesh(mesh, None)
    moving, fixed = split(controls)
    # Laid out from the start as they will come back, so that each step compiles once.
    moving, fixed, key = replicate((moving, fixed, key), mesh)
    about = {
        "iterations": iterations,
        "rounds": rounds,
        "validation": validation,
        "tolerance": tolerance,
        "penalty": penalty,
        "objective": objective,
        "controls": eqx.combine(moving, fixed),
        "optimizer": optimizer,
        "key": key,
    }
    compiled = Compiled(objective, fixed, optax.with_extra_args_support(optimizer))
    within = jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext()
    # An error over one key is NaN, and so may be what the objective returns at a bad rate: both are
    # judged here, and neither ends the search where jax looks for NaN.
    settings: Any = jax.config
    quiet = jax.debug_nans(False) if settings.jax_debug_nans else contextlib.nullcontext()
    with within, quiet, session(checkpoints, about) as saved:
        equalities = compiled.equalities(moving)
        search = Search(
            compiled,
            key,
            validation,
            equalities,
            iterations,
            rounds,
            tolerance,
            penalty,
            cuts,
            mesh,
        )
        state = search.start(moving)
        restored = saved.restore(state.like)
        state = search.probed(state) if restored is None else restored[1]
        steps = _saving(saved, search.run(state), iterations)
        message, interrupted = "Ran all iterations.", False
        try:
            for state, seen in steps:
                if callback is not None:
                    callback(search.report(state, seen))
        except Trouble as trouble:
            message, state = str(trouble), search.judged(state, state.last_good)
        except KeyboardInterrupt:
            saved.offer(state.done, lambda: state, last=True)
            message, interrupted = _interrupted(state.done, iterations), True
            state = search.judged(state, state.moving)
    best = state.best
    multipliers, failing = judged_multipliers(state, equalities, tolerance, validation)
    return Optimum(
        controls=eqx.combine(best.controls, fixed),
        value=best.value,
        residuals=best.residuals,
        standard_error=StandardErrors(
            {"value": best.value_error, "residuals": best.residuals_error}
        ),
        errors=f"spread over {validation} held-out keys" if validation > 1 else "none",
        satisfied=bool(np.all(best.violations(equalities) <= tolerance)),
        multipliers=jnp.asarray(multipliers, best.residuals.dtype),
        history=state.history,
        agreement=state.probes.agreement,
        message=message,
        doubts=doubts(state, moving, search.ends, cuts, failing),
        interrupted=interrupted,
    )


# Adam's usual β₂ = .999 remembers the first, largest gradients through a search of tens of
# iterations and brakes its end.
_ADAM = optax.scale_by_adam(b1=0.8, b2=0.95)


class _Falling(eqx.Module):
    """Adam's update, by a rate of 0.15 that falls to 0 on a cosine.

    The length is an array, so that searches of any length share one compiled program.
    """

    iterations: Array

    def __call__(self, updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        passed = jnp.minimum(state.count, self.iterations) / self.iterations
        rate = 0.15 * (1 + jnp.cos(jnp.pi * passed)) / 2
        updates, state = _ADAM.update(updates, state, params)
        return jax.tree.map(lambda x: -rate.astype(x.dtype) * x, updates), state


def _default_optimizer(iterations: int) -> optax.GradientTransformationExtraArgs:
    return optax.GradientTransformationExtraArgs(_ADAM.init, _Falling(jnp.asarray(iterations)))


def _saving(saved: Any, rounds: Iterator[tuple[State, Seen]], iterations: int) -> Iterator:
    """The same rounds, each offered to the checkpoints once its user has finished with it."""
    for state, seen in rounds:
        yield state, seen
        saved.offer(state.done, lambda state=state: state, last=state.done == iterations)


def _interrupted(done: int, iterations: int) -> str:
    return f"Interrupted after {done} of {iterations} iterations; this is the best so far."
