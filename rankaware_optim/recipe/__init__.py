"""Recipes: the result of a calibration, with its files, uncertainty and texts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
