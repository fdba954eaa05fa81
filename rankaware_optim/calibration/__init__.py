"""Calibration: a short study of the base rate at several ranks, whose result is a recipe."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
