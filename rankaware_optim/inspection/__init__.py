"""Inspection of a model or of an adapter on disk: a `Survey` of its LoRA factors."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
