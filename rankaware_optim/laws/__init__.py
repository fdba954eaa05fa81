"""Scaling laws: how the best learning rate changes with rank, scaling, init, width and method."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
