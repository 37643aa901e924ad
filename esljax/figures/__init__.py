"""All figures, and the only use of matplotlib: reports and tables go in, figures come out."""

from esljax.figures.schedules import plot_schedules, plot_speed_limit
from esljax.figures.study import plot_study

__all__ = [
    "plot_schedules",
    "plot_speed_limit",
    "plot_study",
]
