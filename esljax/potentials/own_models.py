"""A model of the user's for data of any shape: a factory of the numbers of inputs and outputs.

    def make(inputs, outputs, rngs): return MyNetwork(inputs, outputs, rngs=rngs)
    class MyNetwork(nnx.Module): def __init__(self, inputs, outputs, *, rngs): ...
    class MyNetwork(linen.Module): outputs: int
    def make(inputs, outputs): return lambda rngs: MyNetwork(inputs, outputs, rngs=rngs)

The factory gets what it has a parameter for, by name; parameters of other names that have no
default get the inputs and the outputs, in this order.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from esljax._checks import InputError, failure, in_words, refuse


class Sizes(NamedTuple):
    """What a factory may ask for, by these names and `rngs`."""

    inputs: int | tuple[int, ...]
    """Numbers or tokens in one example: p for inputs (m, p), and the shape for others."""
    outputs: int
    """The number of classes, or of numbers to predict."""
    vocabulary: int | None
    """The number of tokens, if the inputs are token ids."""
    hidden: tuple[int, ...]
    """Widths of hidden layers."""


def parameters_of(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters that a function or a class may still be given, by name."""
    # The metaclass of nnx hides those of its classes.
    if isinstance(factory, functools.partial):
        inner, given, named = factory.func, factory.args, factory.keywords
    else:
        inner, given, named = factory, (), {}
    # Without Flax, nothing is a class of it.
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(inner, type) and issubclass(inner, nnx.Module):
        factory = functools.partial(inner.__init__, None, *given, **named)
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return {}


def takes(factory: Any, name: str) -> bool:
    """Whether a factory has a parameter of this name."""
    return callable(factory) and name in parameters_of(factory)


def own_model(factory: Any, sizes: Sizes, name: str) -> Any:
    """The model for `FlaxLoss`, by a factory or as it is.

    **Args:** `factory`: a factory as above, or a Flax module. `sizes`: of the data. `name`: of the
    factory, for messages.
    **Raises:** `InputError`, about `model`, with the line of the user's file, for a factory that
    fails or returns no model.
    """
    # Imported here: Flax takes half as long as jax.
    from flax import linen, nnx

    must = "be a factory of (inputs, outputs), and perhaps rngs, hidden or vocabulary, to a model"
    if isinstance(factory, nnx.Module | linen.Module):
        return factory
    if not callable(factory):
        raise refuse("model", must, f"{name} is {in_words(factory)}")
    given = _given(factory, sizes, name, must)
    parameters = parameters_of(factory)
    if "rngs" in parameters and parameters["rngs"].kind is not inspect.Parameter.VAR_KEYWORD:
        return OwnModel(factory, tuple(given.items()))
    try:
        made = factory(**given)
    except InputError:
        raise
    except Exception as error:
        raise refuse("model", f"{must} of Flax", f"{name} fails: {failure(error)}") from error
    if not isinstance(made, nnx.Module | linen.Module) and not callable(made):
        raise refuse("model", f"{must} of Flax", f"{name} returns {in_words(made)}")
    return made


@dataclasses.dataclass(frozen=True)
class OwnModel:
    """A function `rngs -> nnx.Module`. Equal factories of equal sizes compare equal, so that the
    networks share compiled code."""

    factory: Callable[..., Any]
    given: tuple[tuple[str, Any], ...]

    def __call__(self, rngs: Any) -> Any:
        return self.factory(**dict(self.given), rngs=rngs)


def _given(factory: Callable[..., Any], sizes: Sizes, name: str, must: str) -> dict[str, Any]:
    """The values of the parameters of a factory, by name."""
    known = {each: value for each, value in sizes._asdict().items() if value is not None}
    given, others = {}, []
    for parameter in parameters_of(factory).values():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if parameter.kind is parameter.POSITIONAL_ONLY and not optional:
            raise refuse("model", must, f"{name} takes {parameter.name} by its place alone")
        if parameter.name in known:
            given[parameter.name] = known[parameter.name]
        elif parameter.name == "vocabulary" and not optional:
            must = "have token ids, which are integers, for a model with a vocabulary"
            raise refuse("data", must, f"that for {name} has none")
        elif parameter.name != "rngs" and not optional:
            others.append(parameter.name)
    left = [known[each] for each in ("inputs", "outputs") if each not in given]
    if len(others) > len(left):
        raise refuse("model", must, f"{name} also takes {others[-1]}, which has no default")
    return given | dict(zip(others, left, strict=False))
