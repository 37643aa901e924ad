"""All figures, and the only use of matplotlib: reports and tables go in, figures come out."""

# The engine comes first: it sees that matplotlib can be imported by the others.
from esljax.figures.engine import rendered
from esljax.figures.front import plot_front
from esljax.figures.schedules import plot_schedules, plot_speed_limit
from esljax.figures.study import plot_settings
from esljax.figures.trade import plot_study

__all__ = [
    "plot_front",
    "plot_schedules",
    "plot_settings",
    "plot_speed_limit",
    "plot_study",
    "rendered",
]
