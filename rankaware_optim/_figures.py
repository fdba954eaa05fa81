"""Common parts of figures: colours, axes and saving. matplotlib (the extra `plots`) is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import PlotError

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def figure_of(columns: int, width: float, height: float = 4.2, rows: int = 1, sharey: bool = False) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("Plots need matplotlib.", 'Install it by pip install "rankaware-optim[plots]".') from error
    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False, sharey=sharey).ravel()


def short(name: str, most: int = 30) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def rate_axis(axis: Any) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(LogLocator(base=4))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:.1g}")
    axis.set_xlabel("learning rate, per step")


def save(figure: Any, path: str | Path) -> Path:
    target = Path(path)
    try:
        if not target.suffix:
            raise ValueError("its name has no suffix")
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=130)
    except (OSError, ValueError) as error:
        raise PlotError(
            f"The figure {target} cannot be written: {error}.", "Give a writable .png, .svg or .pdf."
        ) from error
    return target
