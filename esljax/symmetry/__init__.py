"""Groups that permute the units of a network, and leave its outputs alone."""

from esljax.symmetry.group import Element, Group, Symmetry, Turned, permutations

__all__ = ["Element", "Group", "Symmetry", "Turned", "permutations"]
