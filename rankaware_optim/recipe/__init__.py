"""Recipes: the result of a calibration, with its files, uncertainty and figures, and the model of loss against rate."""

from .._rate import Rate
from ._diff import diff_recipes, diff_text
from ._horizon import SLOPE_SD, Horizon
from ._html import write_report
from ._loss_model import bowls_of
from ._observations import (
    CLEAR,
    EARLY,
    TAIL,
    Observation,
    arms_of,
    best_fall,
    gain_of,
    height,
    impute,
    noise_of,
    recent,
    usual_noise,
    usual_start,
)
from ._other_rates import BASE, OtherRates, name_pattern
from ._plots import draw_trials, drawable, plot_recipe
from ._recipe import ANY_WIDTH, Recipe, is_for, other_rates_on, rate_on, resolve_recipe
from ._schema import to_document
from ._settings import SAME_UPDATES, agreed, differences, plain_setting, plain_value, settings_of
from ._uncertainty import FULL_SD, INIT_SD, RANK_SD, WIDTH_SD, Z90, with_margin

__all__ = [
    "ANY_WIDTH",
    "BASE",
    "CLEAR",
    "EARLY",
    "FULL_SD",
    "Horizon",
    "INIT_SD",
    "Observation",
    "OtherRates",
    "RANK_SD",
    "Rate",
    "Recipe",
    "SAME_UPDATES",
    "SLOPE_SD",
    "TAIL",
    "WIDTH_SD",
    "Z90",
    "agreed",
    "arms_of",
    "best_fall",
    "bowls_of",
    "diff_recipes",
    "diff_text",
    "differences",
    "draw_trials",
    "drawable",
    "gain_of",
    "height",
    "impute",
    "is_for",
    "name_pattern",
    "noise_of",
    "other_rates_on",
    "plain_setting",
    "plain_value",
    "plot_recipe",
    "rate_on",
    "recent",
    "resolve_recipe",
    "settings_of",
    "to_document",
    "usual_noise",
    "usual_start",
    "with_margin",
    "write_report",
]
