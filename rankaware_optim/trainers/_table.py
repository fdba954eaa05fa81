"""This module lists the classes that support trainers, one class for each training
library.

Importing this module does not import any of the supported training libraries.
"""

from __future__ import annotations

from ._lightning import LightningTrainer
from ._sentence_transformers import SentenceTransformersTrainer
from ._trainer import Trainer
from ._transformers import TransformersTrainer

# `trainer_of` takes the first class that recognizes an object. A trainer of
# sentence-transformers is also a Trainer of transformers, so its class must come first.
TRAINERS: tuple[type[Trainer], ...] = (
    SentenceTransformersTrainer,
    TransformersTrainer,
    LightningTrainer,
)
SUPPORTED_TRAINERS = (
    "a trainer of transformers, TRL or sentence-transformers, or Lightning's tuple"
    " (trainer, module, *data)"
)


def trainer_of(value: object) -> Trainer | None:
    """Wrap a trainer of a training library in the class from `TRAINERS` that supports
    this library.

    Return None if the object is not a supported trainer.
    """
    for kind in TRAINERS:
        if kind.is_one(value):
            return kind(value)
    return None
