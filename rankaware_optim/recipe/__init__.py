"""Recipes: the result of a calibration, with its files, uncertainty and figures."""

from .._rate import Rate
from ._diff import diff_recipes, diff_text
from ._horizon import SLOPE_SD, Horizon
from ._html import write_report
from ._other_rates import BASE, OtherRates, name_pattern
from ._plots import draw_trials, drawable, plot_recipe
from ._recipe import ANY_WIDTH, Recipe, is_for, other_rates_on, rate_on, recipe_of, resolve_recipe
from ._schema import to_document
from ._settings import SAME_UPDATES, agreed, differences, plain_setting, plain_value, settings_of
from ._uncertainty import INIT_SD, RANK_SD, WIDTH_SD, Z90

__all__ = [
    "ANY_WIDTH",
    "BASE",
    "Horizon",
    "INIT_SD",
    "OtherRates",
    "RANK_SD",
    "Rate",
    "Recipe",
    "SAME_UPDATES",
    "SLOPE_SD",
    "WIDTH_SD",
    "Z90",
    "agreed",
    "diff_recipes",
    "diff_text",
    "differences",
    "draw_trials",
    "drawable",
    "is_for",
    "name_pattern",
    "other_rates_on",
    "plain_setting",
    "plain_value",
    "plot_recipe",
    "rate_on",
    "recipe_of",
    "resolve_recipe",
    "settings_of",
    "to_document",
    "write_report",
]
