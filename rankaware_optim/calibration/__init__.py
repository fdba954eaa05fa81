"""This package makes a series of short training runs at several ranks and learning
rates. From the losses of these runs, the package computes a recipe, which contains a
learning rate for every LoRA rank.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
