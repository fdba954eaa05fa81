"""Common parts of figures: colours, axes and saving. matplotlib (the extra `plots`) is imported
when one is drawn.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PlotError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def figure_of(
    columns: int, rows: int, width: float, height: float
) -> tuple[Figure, Any]:
    """Return a figure and its axes, row by row. width, height: inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            "Plots need matplotlib.",
            'In a clone of this package: pip install ".[plots]".',
        ) from error

    class Shown(Figure):
        """A figure that notebooks show. They show others only once pyplot is imported."""

        def _repr_png_(self) -> bytes:
            buffer = BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    figure = Shown(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def rate_axis(axis: Any, side: str = "x") -> None:
    """Make an axis, "x" or "y", one of rates: logarithmic, with ticks at 1 and 3."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(**{f"{side}scale": "log", f"{side}label": "learning rate, per step"})
    own = getattr(axis, f"{side}axis")
    own.set_major_locator(LogLocator(subs=(1, 3)))
    own.set_major_formatter(lambda value, _: f"{value:.6g}")
    own.set_minor_locator(NullLocator())


def save(figure: Any, path: str | Path) -> Path:
    target = Path(path)
    try:
        if not target.suffix:
            raise ValueError("its name has no suffix")
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=130)
    except (OSError, ValueError) as error:
        raise PlotError(
            f"The figure {target} cannot be written: {error}.",
            "Give a writable .png, .svg or .pdf.",
        ) from error
    return target
