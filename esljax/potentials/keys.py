"""Keys whose random numbers are drawn in one pass, with the same bits as those of jax.

jax's threefry is a loop over whole arrays on a CPU, which keeps programs short to compile and takes
four times as long to run as the same twenty rounds in line. A step draws noise for every parameter
of every member, so it was a fifth of a run.

Reference: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import random as extended

from esljax._types import AnyKeys, Array

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_WORD = 32


def drawn_in_line(key: AnyKeys) -> AnyKeys:
    """The key of the same random numbers, which a CPU draws in one pass over each array.

    Splitting it, folding in and drawing give the bits that jax gives for `key`, on every platform.
    A key of another generator than threefry stays what it is, and so does every key where
    `jax_threefry_partitionable` is off. To jax the two keys are of different types: draw from this
    one at once, and keep and hand on the other.

    **Args:** `key`: one key or an array of them, made by `jax.random.key`.
    **Returns:** a key or keys of the same shape.
    **Differentiation:** none: keys are no numbers.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> key = jax.random.key(0)
        >>> same = jax.random.normal(esl.potentials.drawn_in_line(key), (3,))
        >>> bool((same == jax.random.normal(key, (3,))).all())
        True
    """
    settings: Any = jax.config
    threefry = jax.random.key_impl(key) == "threefry2x32"
    if not threefry or not settings.jax_threefry_partitionable:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_IN_LINE)


def as_of_jax(key: AnyKeys) -> AnyKeys:
    """The key of jax for one that draws in line; any other key as it is."""
    if jax.random.key_impl(key) != _IN_LINE:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl="threefry2x32")


def _threefry(key: Array, high: Array, low: Array) -> tuple[Array, Array]:
    """Both words of threefry2x32 with twenty rounds, at counters of two words."""
    first, second = key[0], key[1]
    keys = first, second, first ^ second ^ jnp.uint32(_PARITY)
    x, y = high + keys[0], low + keys[1]
    for i in range(5):
        for places in _ROTATIONS[i % 2]:
            x = x + y
            y = x ^ (y << places | y >> (_WORD - places))
        x = x + keys[(i + 1) % 3]
        y = y + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x, y


def _at_places(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Both words at the place of each entry in an array of this shape of fewer than 2³² entries."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, length in enumerate(shape):
        place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _threefry(key, jnp.uint32(0), place)


def _bits(key: Array, width: int, shape: tuple[int, ...]) -> Array:
    def in_line(key: Array) -> Array:
        high, low = _at_places(key, shape)
        if width > _WORD:
            return high.astype(jnp.uint64) << _WORD | low.astype(jnp.uint64)
        return (high ^ low).astype(f"uint{width}")

    def in_loops(key: Array) -> Array:
        of_jax = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.bits(of_jax, shape, f"uint{width}")

    if math.prod(shape) >= 2**_WORD:
        return in_loops(key)
    # A GPU has a kernel of its own, and elsewhere jax writes the rounds in line by itself.
    return jax.lax.platform_dependent(key, cpu=in_line, default=in_loops)


def _data(words: tuple[Array, Array]) -> Array:
    """Both words of keys as their data, computed once.

    Without the barrier XLA may repeat the rounds behind a key in whatever is drawn from it, and the
    compiler of jax 0.12 did not end for gradients of noise in batches, side by side.
    """
    return jax.lax.optimization_barrier(jnp.stack(words, axis=-1))


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    return _data(_at_places(key, shape))


def _fold_in(key: Array, data: Any) -> Array:
    return _data(_threefry(key, jnp.uint32(0), jnp.asarray(data, jnp.uint32)))


_LOOPS = extended.threefry_prng_impl
_IN_LINE = extended.define_prng_impl(
    key_shape=_LOOPS.key_shape,
    seed=_LOOPS.seed,
    split=_split,
    random_bits=_bits,
    fold_in=_fold_in,
    name="threefry2x32_in_line",
    tag="fry in line",
)
