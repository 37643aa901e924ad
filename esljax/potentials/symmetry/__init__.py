"""Groups that permute the units of a network, and leave its outputs alone."""

from esljax.potentials.symmetry.finding import of
from esljax.potentials.symmetry.group import Symmetry, permutations
from esljax.potentials.symmetry.parts import Element, Group, Turned
from esljax.potentials.symmetry.trying import Trial

__all__ = ["Element", "Group", "Symmetry", "Trial", "Turned", "of", "permutations"]
