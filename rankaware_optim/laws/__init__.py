"""This package contains the scaling laws.

A scaling law predicts how the best learning rate changes with the LoRA rank, alpha, the
init and the width, and between LoRA and full finetuning.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
