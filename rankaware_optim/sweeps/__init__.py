"""This package reads learning-rate sweeps from other tools and fits a recipe to them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
