"""The table of known trainers, one class for each library.

Importing this module imports none of the libraries.
"""

from __future__ import annotations

from ._lightning import LightningTrainer
from ._sentence_transformers import SentenceTransformersTrainer
from ._trainer import Trainer
from ._transformers import TransformersTrainer

# The first class that knows an object is taken, so a subclass stands before its base class.
TRAINERS: tuple[type[Trainer], ...] = (
    SentenceTransformersTrainer,
    TransformersTrainer,
    LightningTrainer,
)
NAMES = (
    "a trainer of transformers, TRL or sentence-transformers, or Lightning's tuple"
    " (trainer, module, *data)"
)


def trainer_of(value: object) -> Trainer | None:
    """Return the trainer that an object is, None if no class of `TRAINERS` knows it."""
    for kind in TRAINERS:
        if kind.is_one(value):
            return kind(value)
    return None
