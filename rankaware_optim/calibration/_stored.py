"""Whether a stored study can go on: it is whole, and its trials can be compared with new ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import optuna
from msgspec import ValidationError

from .._types import Reference
from .._warn import warn
from ..errors import CalibrationError
from ..laws import Law, checked_multiplier
from ..recipe import differences
from ._provenance import SAME_RATE, Code, law_values
from ._schedule import Options
from ._trials import Trials

_SCHEMA = (
    1  # version of the stored format, raised if an earlier version would misread it
)
_COMPARED = ("schema", "steps", "ranks", "seeds", "optimizer", "batch", "warmup")
_OTHER_STUDY = "Give this calibration another name, or another storage."
# what damaged values raise
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    ValidationError,
)


def made_with(options: Options, code: Code) -> dict[str, Any]:
    """Return what the trials of a calibration are made with, as its study stores it."""
    schedule = options.schedule
    return {
        "schema": _SCHEMA,
        "steps": schedule.steps,
        "ranks": schedule.lora,
        "seeds": sorted(schedule.seeds),
        "optimizer": options.optimizer_name,
        "batch": options.batch,
        "warmup": options.warmup,
        "law": repr(options.law),
        "multipliers": law_values(options.law, options.optimizer, schedule.ranks),
        **code.loop,
        "rankaware-optim": version("rankaware-optim"),
    }


def check_whole(study: optuna.Study, law: Law) -> None:
    """Raise a `CalibrationError` if a stored study is damaged, or was made by an earlier version
    with runs of several lengths or batches.
    """
    _check_one_length(study)
    try:
        trials = Trials.read(study.get_trials(deepcopy=False))
        _check_values(study, trials, law)
    except _DAMAGE as error:
        raise CalibrationError(
            f"The stored study {study.study_name!r} is damaged ({type(error).__name__}: {error}),"
            " and was not changed.",
            "Restore its storage from a copy, or give this calibration another name, or another"
            " storage.",
        ) from error


def _check_one_length(study: optuna.Study) -> None:
    stored = study.user_attrs.get("made_with")
    if not isinstance(stored, dict):
        return
    steps = stored.get("steps")
    is_mixed = isinstance(steps, list) or bool(stored.get("batches"))
    for trial in study.get_trials(deepcopy=False):
        is_mixed = is_mixed or trial.user_attrs.get("steps", steps) != steps
    if is_mixed:
        raise CalibrationError(
            f"The stored study {study.study_name!r} was made by an earlier version with several"
            " lengths or batches.",
            _OTHER_STUDY,
        )


def _check_values(study: optuna.Study, trials: Trials, law: Law) -> None:
    """Raise if a value that is read has another type, or contradicts another."""
    stored = study.user_attrs  # after the trials, before which they are written
    made = stored.get("made_with", {})
    for table in (made, made.get("multipliers", {}), stored.get("settings", {})):
        if not isinstance(table, dict):
            raise TypeError("an attribute holds an impossible value")
    if len(study.directions) > 1:
        raise TypeError("it has several objectives")
    for trial in trials:
        if trial.rank not in (None, *made.get("ranks", [trial.rank])):
            raise TypeError(f"trial {trial.number} has a rank that was not to be tried")
        if len(trial.curve or ()) > made.get("steps", math.inf):
            raise TypeError(f"trial {trial.number} has more values than steps")
    if "reference" in stored:
        reference = Reference(**stored["reference"])
        checked_multiplier(law, reference.as_factor(), reference)
        math.log2(stored["full_fan_in"])


def check_comparable(
    name: str, stored: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Raise a `CalibrationError` if the trials of a stored study cannot be compared with new ones.

    stored, now: see `made_with`.
    """
    refuse(name, differences(stored, {key: now[key] for key in _COMPARED}))
    law = differences(stored.get("multipliers", {}), now["multipliers"], SAME_RATE)
    refuse(name, law, f"other rates of the law {stored.get('law')}: ")


def refuse(name: str, difference: str, what: str = "") -> None:
    """Raise a `CalibrationError` if there is a difference."""
    if difference:
        raise CalibrationError(
            f"The stored study {name!r} was made with {what}{difference}.", _OTHER_STUDY
        )


def warn_of_code(
    name: str, stored: Mapping[str, Any], now: Mapping[str, Any], how: str
) -> None:
    """Warn if the trials were made by another loop or version. stored, now: see `made_with`."""
    left_out = ("law", "multipliers", *_COMPARED)
    changed = differences(stored, {key: now[key] for key in now if key not in left_out})
    if changed:
        warn(
            f"The stored study {name!r} {how} {changed}. Its trials can be compared with new ones"
            " only if the training has not changed. Otherwise give this calibration another name."
        )
