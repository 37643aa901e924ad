"""W2²: the squared Wasserstein distance between two ensembles."""

from esljax.transport.base import (
    AbstractTransport,
    Solution,
    check_is_transport,
    check_room,
    check_transport,
    pairing_of,
    part_solutions_of,
    solution_of,
    subset_solutions_of,
)
from esljax.transport.coordinates import (
    AbstractWrappedTransport,
    MappedTransport,
    ProjectedTransport,
    check_coordinates,
    normal_rows,
    principal_directions,
    random_directions,
)
from esljax.transport.exact import ExactTransport
from esljax.transport.gaussian import GaussianTransport
from esljax.transport.hierarchical import HierarchicalTransport
from esljax.transport.pairing import Assignment, assignment
from esljax.transport.quotient import QuotientTransport, aligned
from esljax.transport.sinkhorn import SinkhornTransport
from esljax.transport.sliced import SlicedTransport

__all__ = [
    "AbstractTransport",
    "AbstractWrappedTransport",
    "Assignment",
    "ExactTransport",
    "GaussianTransport",
    "HierarchicalTransport",
    "MappedTransport",
    "ProjectedTransport",
    "QuotientTransport",
    "SinkhornTransport",
    "SlicedTransport",
    "Solution",
    "aligned",
    "assignment",
    "check_coordinates",
    "check_is_transport",
    "check_room",
    "check_transport",
    "normal_rows",
    "pairing_of",
    "part_solutions_of",
    "principal_directions",
    "random_directions",
    "solution_of",
    "subset_solutions_of",
]
