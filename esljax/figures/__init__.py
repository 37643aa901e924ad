"""Every figure, and the only use of matplotlib. Reports and tables go in; nothing above is imported."""

from esljax.figures.schedules import plot_schedules, plot_speed_limit
from esljax.figures.study import plot_study

__all__ = [
    "plot_schedules",
    "plot_speed_limit",
    "plot_study",
]
