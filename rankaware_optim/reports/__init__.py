"""Reports: a recipe as a figure, as a page, and against another one. They only read recipes."""

from ._differences import diff_recipes, diff_text
from ._figure import draw_trials, drawable, plot_recipe
from ._page import write_report

__all__ = [
    "diff_recipes",
    "diff_text",
    "draw_trials",
    "drawable",
    "plot_recipe",
    "write_report",
]
