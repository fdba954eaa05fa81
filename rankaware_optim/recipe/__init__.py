"""This package saves the result of a calibration as a recipe, loads recipes, and describes them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
