"""The fit: from scored runs to a base rate, a drift in rank, and their covariance."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
