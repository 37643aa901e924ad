"""The look of every figure."""

from typing import Any

# Okabe and Ito's palette, which color-blind readers can distinguish.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


def in_words(name: str) -> str:
    """The name of a setting or a schedule, for a label."""
    return name.replace("_", " ")


def clean(*all_axes: Any) -> None:
    """Remove the upper and the right spine of each panel."""
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
