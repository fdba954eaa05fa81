"""Inspection of a model or of an adapter on disk: a `Survey` of its LoRA factors."""

from ._conventions import Convention, Reading, conventions, register_convention
from ._declarations import Config, Declaration, configs_of, declare, place_of, scaling_places
from ._initialize import (
    check_start,
    initialize,
    is_merged,
    refuse_opposite_ties,
    refuse_residual,
    start_of,
    write_starts,
)
from ._pairs import Half, Pair, Walk, canonical_name, pairs_of, read_as, reading_of, scaling_of, walk
from ._references import ReferenceLike, as_reference, parse_reference, reference_of
from ._survey import declared_init, declared_inits, inspect_model, survey_of
from ._unsupported import other_kind
from .files import Training, inspect_file, read_config, read_training

__all__ = [
    "Config",
    "Convention",
    "Declaration",
    "Half",
    "Pair",
    "Reading",
    "ReferenceLike",
    "Training",
    "Walk",
    "as_reference",
    "canonical_name",
    "check_start",
    "configs_of",
    "conventions",
    "declare",
    "declared_init",
    "declared_inits",
    "initialize",
    "inspect_file",
    "inspect_model",
    "is_merged",
    "other_kind",
    "pairs_of",
    "parse_reference",
    "place_of",
    "read_config",
    "read_as",
    "read_training",
    "reading_of",
    "reference_of",
    "refuse_opposite_ties",
    "refuse_residual",
    "register_convention",
    "scaling_of",
    "scaling_places",
    "start_of",
    "survey_of",
    "walk",
    "write_starts",
]
