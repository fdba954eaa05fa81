"""Calibration of a model that is loaded once and left as it was found."""

from ._api import calibrate_in_place

__all__ = ["calibrate_in_place"]
