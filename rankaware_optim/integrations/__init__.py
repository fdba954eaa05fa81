"""Integrations with transformers, TRL, PEFT and Lightning.

Axolotl, kohya's scripts and ms-swift load the modules `axolotl` and `kohya` and a file of
`external_plugins` themselves.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
