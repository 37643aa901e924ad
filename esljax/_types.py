"""The letters of the shapes, and the only door to the library that checks them.

| letter | meaning |
|---|---|
| n, m | members of an ensemble (m: of a second one, or examples of a data set) |
| d | numbers in one model configuration (raveled parameters) |
| p | numbers in one input or one feature vector |
| K | steps of a run; step k sits at training time s = k/K |
| J | links between the J+1 snapshots of a run |
"""

from typing import TypeAlias

import jaxtyping
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, Shaped

Key: TypeAlias = PRNGKeyArray
Keys: TypeAlias = jaxtyping.Key[Array, " R"]
AnyKeys: TypeAlias = jaxtyping.Key[Array, "..."]
Scalar: TypeAlias = Float[Array, ""]
ScalarLike: TypeAlias = float | int | Float[Array, ""]

__all__ = [
    "AnyKeys",
    "Array",
    "ArrayLike",
    "Bool",
    "Float",
    "Int",
    "Key",
    "Keys",
    "Scalar",
    "ScalarLike",
    "Shaped",
]
