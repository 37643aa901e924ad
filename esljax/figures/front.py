"""The figure of a front: Σ against the final loss, and the schedules along it."""

from typing import Any, Protocol, runtime_checkable

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import ArrayLike

from esljax.figures.style import COLORS, clean, in_words


@runtime_checkable
class FrontLike(Protocol):
    """Anything that `plot_front` can draw, such as an `esl.Front`."""

    @property
    def final_loss(self) -> ArrayLike:
        """The final loss of each point, (P,)."""
        ...

    @property
    def entropy_production(self) -> ArrayLike:
        """Σ of each point, (P,)."""
        ...

    @property
    def standard_error(self) -> Any:
        """An object with the errors of both, (P,), as attributes."""
        ...

    @property
    def judgments(self) -> Any:
        """P objects with a `schedule` that has `values`, evenly spaced over training time."""
        ...

    @property
    def families(self) -> Any:
        """Fronts of other families, by name."""
        ...


def plot_front(front: FrontLike) -> Figure:
    """Plot Σ against the final loss with the errors of both, and the schedules along the front.

    The front is drawn in black and families in colors; the darker a schedule, the lower its loss.

    **Returns:** the figure, which `savefig` writes.

    **Example:**

        >>> import types
        >>> import numpy as np
        >>> from esljax.figures import plot_front
        >>> errors = types.SimpleNamespace(final_loss=[0.01, 0.01], entropy_production=[1.0, 2.0])
        >>> judged = [
        ...     types.SimpleNamespace(schedule=types.SimpleNamespace(values=np.full(3, rate)))
        ...     for rate in (0.1, 0.2)
        ... ]
        >>> front = types.SimpleNamespace(
        ...     final_loss=[0.3, 0.2],
        ...     entropy_production=[100.0, 200.0],
        ...     standard_error=errors,
        ...     judgments=judged,
        ...     families={},
        ... )
        >>> [axes.get_xlabel() for axes in plot_front(front).axes]
        ['final training loss', 'training time $s$']
    """
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    trade, rates = figure.subplots(1, 2)
    for i, (name, family) in enumerate(front.families.items()):
        color = COLORS[i % len(COLORS)]
        _draw(trade, family, label=in_words(name), color=color, marker="o", linewidth=1.2)
    _draw(trade, front, label="front", color="black", marker="s", linewidth=2.2)
    trade.set(
        xlabel="final training loss",
        ylabel="entropy production $\\Sigma$ (squared parameters)",
        xscale="log",
        yscale="log",
    )
    for axis in (trade.xaxis, trade.yaxis):
        # A front often spans less than a power of ten.
        low, high = axis.get_view_interval()
        narrow = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7)
        axis.set_major_locator(LogLocator(subs=narrow if high < 4 * low else (1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    trade.legend(frameon=False, fontsize="small")
    losses = np.asarray(front.final_loss, float)
    shades = mpl.colormaps["cividis_r"](np.linspace(0.15, 1.0, len(losses)))
    for loss, judgment, shade in zip(losses, front.judgments, shades, strict=True):
        values = np.asarray(judgment.schedule.values)
        s = np.linspace(0, 1, values.size)
        rates.plot(s, values, color=shade, linewidth=1.8, label=f"loss {loss:.3g}")
    rates.set(
        xlabel="training time $s$",
        ylabel="learning rate $\\eta$ per step",
        xlim=(0, 1),
        ylim=(0, None),
    )
    rates.legend(frameon=False, fontsize="small")
    clean(trade, rates)
    return figure


def _draw(axes: Any, front: FrontLike, **style: Any) -> None:
    errors = front.standard_error
    order = np.argsort(front.final_loss)
    axes.errorbar(
        np.asarray(front.final_loss)[order],
        np.asarray(front.entropy_production)[order],
        xerr=np.asarray(errors.final_loss)[order],
        yerr=np.asarray(errors.entropy_production)[order],
        markersize=4,
        capsize=2,
        elinewidth=1,
        **style,
    )
