"""Learning rates that stay right when the LoRA rank, alpha or init changes, or when you move to
full finetuning.

The public names are in `__init__.pyi`, for type checkers. Each is imported when it is first used.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
