"""This package converts tuned learning rates and suggests learning rates for new
models, both without training runs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
