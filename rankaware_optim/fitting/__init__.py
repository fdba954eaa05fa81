"""This package estimates the best learning rate, and how it depends on the rank, from trials."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
