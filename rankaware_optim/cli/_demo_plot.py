"""The picture of the demo: the calibration's trials, and the rates it gave, checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._figures import COLOURS, figure_of, rate_axis, save
from ..recipe import Recipe, draw_trials, drawable

if TYPE_CHECKING:
    from ._demo import Arm

__all__ = ["plot_transfer"]


def plot_transfer(recipe: Recipe, arms: Sequence[Arm], factors: Sequence[float], path: str | Path) -> Path:
    """Draw the demo's check: held-out loss around the recipe's rate at configurations it never saw."""
    figure, axes = figure_of(1 + len(arms), 5.2 * (1 + len(arms)))
    draw_trials(axes[0], drawable(recipe))
    for axis, arm in zip(axes[1:], arms, strict=True):
        _draw_arm(axis, arm, factors)
    return save(figure, path)


def _draw_arm(axis: Any, arm: Arm, factors: Sequence[float]) -> None:
    rates = [arm.rate.lr * f for f in factors]
    axis.axvspan(arm.rate.low, arm.rate.high, color=COLOURS[0], alpha=0.12, lw=0, label="90 % band")
    for seed, losses in enumerate(zip(*arm.losses, strict=True)):
        axis.plot(rates, losses, "o", color="0.6", markersize=4, label="each seed" if seed == 0 else None)
    axis.plot(rates, arm.means, "o-", color=COLOURS[0], label="mean")
    axis.axvline(arm.rate.lr, color=COLOURS[1], linestyle="--", label="the recipe's rate")
    axis.axhline(arm.start, color="0.8", linewidth=0.8, label="before training")
    rate_axis(axis)
    axis.set(ylabel="held-out loss, nats", ylim=(0.9 * min(map(min, arm.losses)), 1.1 * arm.start))
    axis.set_title(f"Checked: {arm.label}", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
