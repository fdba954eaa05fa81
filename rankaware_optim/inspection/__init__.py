"""This package finds the LoRA matrices of a model or of an adapter on disk, and lists
them in a `Survey`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
