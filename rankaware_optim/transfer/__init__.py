"""Rates for another configuration: conversion, suggestion and checks."""

from ..inspection import parse_reference
from ._convert import Conversion, convert_lr
from ._coordinate_check import CoordinateCheck, CoordinateRow, capture, coordinate_check
from ._coordinate_plot import plot_coordinates
from ._file_rates import survey_report
from ._suggest import Suggestion, published_init, suggest_lr

__all__ = [
    "Conversion",
    "CoordinateCheck",
    "CoordinateRow",
    "Suggestion",
    "capture",
    "convert_lr",
    "coordinate_check",
    "parse_reference",
    "plot_coordinates",
    "published_init",
    "suggest_lr",
    "survey_report",
]
