"""Recipes: what a calibration learned, its files, its uncertainty, its pictures; and the loss over the rate."""

from .._rate import Rate
from ._diff import diff_recipes, diff_text
from ._horizon import BATCH_SD, SLOPE_SD, Horizon
from ._html import write_report
from ._loss_model import Place, bowls_of
from ._observations import EARLY, TAIL, Observation, arms_of, carried_on, gain_of, height, recent, usual_start
from ._plots import draw_trials, drawable, plot_recipe
from ._recipe import ANY_WIDTH, Recipe, resolve_recipe
from ._schema import plain_setting
from ._uncertainty import INIT_SD, RANK_SD, WIDTH_SD, Z90, with_margin

__all__ = [
    "ANY_WIDTH",
    "BATCH_SD",
    "EARLY",
    "Horizon",
    "INIT_SD",
    "Observation",
    "Place",
    "RANK_SD",
    "Rate",
    "Recipe",
    "SLOPE_SD",
    "TAIL",
    "WIDTH_SD",
    "Z90",
    "arms_of",
    "bowls_of",
    "carried_on",
    "diff_recipes",
    "diff_text",
    "draw_trials",
    "drawable",
    "gain_of",
    "height",
    "plain_setting",
    "plot_recipe",
    "recent",
    "resolve_recipe",
    "usual_start",
    "with_margin",
    "write_report",
]
