"""This package uses trials to estimate the best learning rate and how it depends on the rank."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
