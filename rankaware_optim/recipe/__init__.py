"""Recipes: the result of a calibration, with its files, uncertainty and texts."""

from .._rate import Rate
from ._document import to_document
from ._horizon import SLOPE_SD, Horizon
from ._recipe import (
    ANY_WIDTH,
    Recipe,
    is_for,
    known_rate,
    other_rates_on,
    rate_on,
    recipe_of,
)
from ._recipe_data import BASE, OtherRates, name_pattern
from ._recipe_text import facts, lead, missing_trials
from ._settings import (
    SAME_UPDATES,
    agreed,
    differences,
    plain_setting,
    plain_value,
    settings_of,
)
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
    "differences",
    "facts",
    "is_for",
    "known_rate",
    "lead",
    "missing_trials",
    "name_pattern",
    "other_rates_on",
    "plain_setting",
    "plain_value",
    "rate_on",
    "recipe_of",
    "settings_of",
    "to_document",
]
