"""Scaling laws: how the best learning rate moves with rank, scaling, init, width and method."""

from ._base import (
    DEFAULT_LAW,
    LAWS,
    Law,
    bound_law,
    caution_of,
    checked_batch_multiplier,
    checked_multiplier,
    get_law,
    innermost,
    law_changes,
    law_from_dict,
    law_to_dict,
    law_words,
)
from ._constant import Constant, LoRAPlus
from ._corrections import Falling, OneRank, Power
from ._measured import Measured
from ._mua import MuA
from ._simulate import (
    Batch,
    Pair,
    Stepper,
    change_of,
    class_of,
    draw_pair,
    rates_for,
    rms_of_product,
    step_pair,
    synthetic,
)
from ._updates import FORMS, kappa, known_family

__all__ = [
    "Batch",
    "Constant",
    "DEFAULT_LAW",
    "FORMS",
    "Falling",
    "LAWS",
    "Law",
    "LoRAPlus",
    "Measured",
    "MuA",
    "OneRank",
    "Pair",
    "Power",
    "Stepper",
    "bound_law",
    "caution_of",
    "change_of",
    "checked_batch_multiplier",
    "checked_multiplier",
    "class_of",
    "draw_pair",
    "get_law",
    "innermost",
    "kappa",
    "known_family",
    "law_changes",
    "law_from_dict",
    "law_to_dict",
    "law_words",
    "rates_for",
    "rms_of_product",
    "step_pair",
    "synthetic",
]
