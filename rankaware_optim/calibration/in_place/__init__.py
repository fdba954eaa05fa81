"""Calibration of a model that is loaded once and restored afterwards."""

from ._api import calibrate_in_place

__all__ = ["calibrate_in_place"]
