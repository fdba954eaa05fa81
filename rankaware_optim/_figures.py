"""Common parts of figures: colours, axes and saving. matplotlib (the extra `plots`) is imported
when one is drawn.
"""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PlotError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LEAST_TICKS = 3  # of a log axis, or finer ones are taken


def figure_of(
    columns: int, width: float, height: float = 4.2, rows: int = 1, sharey: bool = False
) -> tuple[Figure, Any]:
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
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel()


def short(name: str, most: int = 30) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values from `low` to `high` on a log axis, at most `most`: decades, or 1, 2 and 5 of
    each, or finer ones.

    >>> log_ticks(0.0004, 0.03), log_ticks(0.0003, 0.00045)
    ([0.0005, 0.001, 0.002, 0.005, 0.01, 0.02], [0.0003, 0.0004])
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside: list[float] = []
    for digits in ("1", "125", "123456789"):
        inside = [
            value
            for decade in decades
            for n in digits
            if low <= (value := float(f"{n}e{decade}")) <= high
        ]
        if len(inside) >= _LEAST_TICKS:
            break
    return inside[:: -(-len(inside) // most) or 1]


def rate_axis(axis: Any, side: str = "x") -> None:
    """Make an axis, "x" or "y", one of rates: logarithmic, its ticks where their labels say."""
    from matplotlib.ticker import Locator, NullLocator

    class Rounded(Locator):
        def __call__(self) -> list[float]:
            return self.tick_values(*own.get_view_interval())

        def tick_values(self, vmin: float, vmax: float) -> list[float]:
            return log_ticks(min(vmin, vmax), max(vmin, vmax))

    axis.set(**{f"{side}scale": "log", f"{side}label": "learning rate, per step"})
    own = getattr(axis, f"{side}axis")
    own.set_major_locator(Rounded())
    own.set_major_formatter(lambda value, _: f"{value:g}")
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
