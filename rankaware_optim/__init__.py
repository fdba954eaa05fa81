"""This package adjusts the learning rate when the LoRA rank, alpha or init changes.

The package also converts learning rates between LoRA and full finetuning. The file `__init__.pyi`
lists the public names, so that type checkers can find them. At run time, each name is
imported when it is first used.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
