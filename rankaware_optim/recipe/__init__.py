"""Recipes: what a calibration learned, its files, its uncertainty, its pictures."""

from ._diff import diff_recipes, diff_text
from ._horizon import SLOPE_SD, Horizon
from ._html import write_report
from ._plots import draw_trials, drawable, plot_recipe
from ._recipe import ANY_WIDTH, Rate, Recipe, resolve_recipe
from ._schema import plain_setting
from ._uncertainty import RANK_DOUBT, WIDTH_DOUBT, Z90

__all__ = [
    "ANY_WIDTH",
    "Horizon",
    "RANK_DOUBT",
    "Rate",
    "Recipe",
    "SLOPE_SD",
    "WIDTH_DOUBT",
    "Z90",
    "diff_recipes",
    "diff_text",
    "plain_setting",
    "draw_trials",
    "drawable",
    "plot_recipe",
    "resolve_recipe",
    "write_report",
]
