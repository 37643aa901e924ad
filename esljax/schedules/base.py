r"""The base of every schedule: a number over training time s ∈ [0, 1], and how it leaves.

A schedule is a pytree whose floating leaves are its parameters, so `jax.grad` with respect to a
schedule is a schedule of derivatives and an optimizer can move it. Step k of K reads the schedule
at s = k/K:

    rates(K) = (schedule(0), schedule(1/K), ..., schedule((K-1)/K))

What leaves (`to_optax`, `to_code`) has these K values and, from count K on, schedule(1).
"""

import abc
import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import check_choice, check_fits, check_positive_int, door, known, refuse
from esljax._types import Array, Float, Scalar, ScalarLike
from esljax.results import in_short
from esljax.schedules import code, record


class AbstractSchedule(eqx.Module):
    """A number as a function of training time s ∈ [0, 1].

    A subclass is an `equinox.Module` with one method, `__call__`; a gradient and an optimizer see
    its floating arrays. A schedule that counts steps also overrides `over`, one with corners or
    jumps `corners`, and one with a constructor of its own `as_dict` and `from_fields`, if it is to
    be saved.

    **Example:**

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> class Wave(esl.AbstractSchedule):
        ...     mean: jax.Array
        ...     periods: int
        ...
        ...     def __call__(self, s):
        ...         return self.mean * (1 + jnp.sin(2 * jnp.pi * self.periods * s) / 2)
        >>> print(esl.Langevin(Wave(jnp.array(0.1), 2)).learning_rate.rates(4).round(3))
        [0.1 0.1 0.1 0.1]
        >>> print(Wave(jnp.array(0.1), 2))
        Wave: mean 0.1, periods 2
    """

    @abc.abstractmethod
    def __call__(self, s: ScalarLike) -> Scalar:
        """The value at training time `s`; differentiable in `s` and in every floating leaf."""

    def over(self, steps: int) -> "AbstractSchedule":
        """The schedule of a run of `steps` steps: this one, unless a subclass counts steps."""
        return self

    def corners(self) -> np.ndarray | Float[Array, " c"]:
        """The times within (0, 1) at which the value or its slope jumps, where integrals are split.

        **Returns:** shape (c,): a NumPy array if they never move, a jax array if they depend on
        parameters. By default none.
        """
        return np.zeros(0)

    @door
    def rates(self, steps: int) -> Float[Array, " K"]:
        """The values that a run of `steps` steps reads.

        **Args:** `steps`: K ≥ 1.
        **Returns:** shape (K,), the values at s = k/K, k = 0, ..., K-1.
        **Raises:** `InputError` if `steps` is not a positive integer.
        **Differentiation:** forward and reverse, in every floating leaf.
        """
        check_positive_int("steps", steps)
        kept = 4 * steps * jnp.result_type(float).itemsize
        check_fits("steps", kept, f"the rates of {steps:,} steps", "take fewer steps")
        times = jnp.arange(steps, dtype=jnp.result_type(float)) / steps
        return jax.vmap(self.over(steps))(times)

    @door
    def to_optax(self, steps: int) -> Callable[[Any], Array]:
        """The optax schedule of a run of `steps` steps: the inverse of `FromOptax`.

        At count k = 0, ..., K-1 it is bit for bit the k-th of `rates(K)`, under `jit` as well; from
        count K on it holds the value at s = 1. Between whole counts it reads the schedule itself.

        **Args:** `steps`: K ≥ 1.
        **Returns:** a function of a count, which may be traced, to a scalar.
        **Raises:** `InputError` if `steps` is not a positive integer, and for a schedule that gives
        more than one number at a time, such as a stack of schedules.
        **Differentiation:** forward and reverse, in every floating leaf and in a fractional count.

        **Example:**

            >>> import optax
            >>> import esljax as esl
            >>> optimizer = optax.adam(esl.Knots([0.1, 0.4, 0.1]).to_optax(steps=100))
            >>> back = esl.FromOptax(esl.Cosine(0.1).to_optax(steps=4))
            >>> print(back.rates(4) == esl.Cosine(0.1).rates(4))
            [ True  True  True  True]
        """
        check_positive_int("steps", steps)
        schedule = self.over(steps)
        # Computed here and not where it is read: a compiler that fuses a product with a sum moves
        # the last bit, which is 1e-5 of a rate that has fallen to a hundredth.
        with jax.ensure_compile_time_eval() if known(self) else contextlib.nullcontext():
            table = self._table(steps)
        still = jax.tree.map(jax.lax.stop_gradient, schedule)

        @door
        def read(count: Any) -> Array:
            count = jnp.asarray(count)
            if not jnp.issubdtype(count.dtype, jnp.floating):
                return table[jnp.clip(count.astype(int), 0, steps)]
            count = jnp.clip(count, 0, steps)
            nearest = jnp.round(count)
            slope = still(count / steps)
            at_step = table[nearest.astype(int)] + (slope - jax.lax.stop_gradient(slope))
            return jnp.where(count == nearest, at_step, schedule(count / steps))

        return read

    @door
    def to_code(
        self, library: Literal["optax", "pytorch"] = "optax", steps: int | None = None
    ) -> str:
        """Lines to paste, which need nothing of this package: a table of the rates of a run.

        They define `schedule`, a function of the count of steps with the values of `to_optax` to
        1e-7. Those for optax hand it to an optimizer. Those for PyTorch make `scheduler`, a
        `LambdaLR` of the `optimizer` that is there.

        **Args:** `library`: `"optax"` or `"pytorch"`. `steps`: K ≥ 1, of the run.
        **Returns:** Python code.
        **Raises:** `InputError` for another library, if `steps` is not given, and for a schedule
        that is traced, stacked or not finite.

        **Example:**

            >>> import esljax as esl
            >>> print(esl.Linear(1.0, 0.5).to_code("pytorch", steps=4))
            import torch
            <BLANKLINE>
            # Linear: start 1, end 0.5
            rates = [1.0, 0.875, 0.75, 0.625, 0.5]
            <BLANKLINE>
            <BLANKLINE>
            def schedule(count):
                return rates[min(count, 4)]
            <BLANKLINE>
            <BLANKLINE>
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = 1.0  # LambdaLR multiplies it by the rate
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
            # After each optimizer.step(): scheduler.step()
        """
        check_choice("library", library, tuple(code.LIBRARIES))
        if steps is None:
            raise refuse("steps", "be the number of steps of the run that the code is for", "None")
        check_positive_int("steps", steps)
        record.check_known(self)
        values = np.asarray(self._table(steps))
        if not np.all(np.isfinite(values)):
            raise refuse("schedule", "be finite at every step", f"is {in_short(values)}")
        return code.LIBRARIES[library](str(self), values)

    @door
    def as_dict(self) -> dict[str, Any]:
        """The schedule in types that JSON holds: what `save` writes and `from_dict` reads.

        **Returns:** the `"kind"`, the `"dtype"` of its arrays, and every field by name.
        **Raises:** `InputError` for a schedule that is traced or stacked, and for fields that are
        no numbers, texts or schedules.

        **Example:**

            >>> import esljax as esl
            >>> esl.Linear(0.5, 0.1).as_dict()
            {'kind': 'Linear', 'dtype': 'float32', 'start': 0.5, 'end': 0.1}
        """
        names = [field.name for field in dataclasses.fields(self)]
        return record.encode(self, {name: getattr(self, name) for name in names})

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "AbstractSchedule":
        """The schedule of this class whose `as_dict` has these fields, arrays as arrays again.

        **Raises:** `TypeError` or `ValueError` for fields that make none.
        """
        parameters = inspect.signature(cls).parameters
        for name in fields:
            if name not in parameters:
                raise TypeError(f"it has no `{name}`")
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty and name not in fields:
                raise TypeError(f"`{name}` is missing")
        return cls(**fields)

    @door
    def save(self, path: str | Path) -> None:
        """Write the schedule to a JSON file that `load_schedule` reads back bit for bit.

        A schedule that was saved there is replaced at once, so that no reader meets half of one.
        Any other file, and a link, is refused and stays.

        **Args:** `path`: of the file; missing folders are made.
        **Raises:** `InputError` as `as_dict` does, for numbers that are not finite, if the file
        cannot be written, and if there is one of someone else.

        **Example:**

            >>> import esljax as esl
            >>> esl.Cosine(0.1).save("cosine.json")
            >>> print(esl.load_schedule("cosine.json"))
            Cosine: peak 0.1, end 0
        """
        record.write(path, self.as_dict())

    @door
    def __str__(self) -> str:
        return f"{type(self).__name__}: {self._summary()}"

    def _summary(self) -> str:
        """Everything but the kind, in a line."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ", ".join(f"{name} {in_short(value)}" for name, value in fields.items())

    def _table(self, steps: int) -> Float[Array, " values"]:
        """The values of a run and that at its end."""
        rates = self.rates(steps)
        record.check_one_number(rates.shape[1:])
        end = self.over(steps)(jnp.ones((), jnp.result_type(float)))
        return jnp.append(rates, end)
