"""Sweeps of other tools: read them, and fit a recipe to them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
