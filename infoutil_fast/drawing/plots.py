"""Charts in memory: a figure, its PNG bytes, and the colours and marks that all of them share. Matplotlib is loaded by the first one."""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that the colour-blind tell apart (Okabe & Ito 2008), and a marker each, for a print in grey.
LINES = {
    "blue": ("#0072B2", "o"),
    "vermilion": ("#D55E00", "s"),
    "green": ("#009E73", "^"),
    "purple": ("#CC79A7", "D"),
    "orange": ("#E69F00", "P"),
    "grey": ("#7F7F7F", "v"),
}
INK = "#5b7fb4"  # of bars; readable on white and on black
MEDIAN = "#d9822b"
PALE = "#b9c6da"  # of what stands behind


def figure(width: float, height: float, dpi: int, **options: Any) -> Figure:
    """An empty figure of so many inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=dpi, **options)
    FigureCanvasAgg(made)
    return made


def as_png(made: Figure, transparent: bool = False) -> bytes:
    """The same bytes for the same figure: without the name of the software."""
    buffer = BytesIO()
    made.savefig(buffer, format="png", transparent=transparent, metadata={"Software": None})
    return buffer.getvalue()


def open_corner(panels: Iterable[Axes], grid: bool = False) -> None:
    """No frame above and to the right; with `grid` pale lines behind."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        if grid:
            axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
