"""Groups that permute the units of a network, and leave its outputs alone."""

from esljax.symmetry.finding import of
from esljax.symmetry.group import Symmetry, permutations
from esljax.symmetry.parts import Element, Group, Turned
from esljax.symmetry.trying import Trial

__all__ = ["Element", "Group", "Symmetry", "Trial", "Turned", "of", "permutations"]
