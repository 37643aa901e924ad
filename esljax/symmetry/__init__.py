"""Groups that permute the units of a network, and leave its outputs alone."""

from esljax.symmetry.group import Element, Group, Symmetry, Turned, permutations
from esljax.symmetry.trying import Trial, check, of

__all__ = ["Element", "Group", "Symmetry", "Trial", "Turned", "check", "of", "permutations"]
