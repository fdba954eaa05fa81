"""What a trial builds: its model's configuration, and the settings of its optimizer.

Trials can only be compared if all of a rank have built the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .._checks import shown
from .._optimizers import defaults_of
from .._types import Method, width_for
from ..errors import CalibrationError
from ..inspection import Survey, as_one_model, inspect_model
from ..laws import Law, checked_multiplier
from ..optimizer import RankAwareOptimizer, RateGroup
from ..recipe import (
    BASE,
    SAME_UPDATES,
    layers_of,
    name_pattern,
    plain_value,
    settings_of,
    without_conflicts,
)
from ._trials import Build

# Arguments with which a loop would choose what the trial chooses.
_SET_BY_THE_TRIAL = ("lr", "tuned_at", "law", "recipe", "method")
# Optimizer settings that the study decides, or that do not change the updates.
_LEFT_OUT = {
    "cls",
    "self",
    "params",
    "optimizer",
    "model",
    "steps",
    "seed",
    "generator",
    *_SET_BY_THE_TRIAL,
    *SAME_UPDATES,
}


def refuse_settings(settings: Mapping[str, object]) -> None:
    """Raise a `CalibrationError` for an argument of `trial.optimizer` that the trial sets."""
    for name in _SET_BY_THE_TRIAL:
        if name in settings:
            raise CalibrationError(
                f"trial.optimizer got {name}={settings[name]!r}, but every trial tries its own"
                " learning rate, and calibrate chooses the law and the method.",
                f"Remove {name}=. To choose the range that is searched, pass lr_range=(low, high)"
                " to calibrate; after the call trial.lr is the trial's learning rate.",
            )


def survey_of(params: Any, rank: int | None, settings: Mapping[str, Any]) -> Survey:
    """Inspect the model that a trial has built.

    Args:
        params: the first argument of `trial.optimizer`.
        rank: the trial's rank.
        settings: its other arguments.
    """
    model = settings.get("model")
    model = as_one_model(params if model is None else model)
    return inspect_model(model, method=_method(rank), init=settings.get("init"))


def describe(survey: Survey, rank: int | None, batch: float | None) -> Build:
    """Return what a trial has built, still without the optimizer's settings.

    Raises:
        CalibrationError: the model has another rank than the trial.
    """
    at = survey.dominant().resolve(survey)
    if at.rank != rank:
        raise CalibrationError(
            f"The model that train built has rank {at.rank}, but trial.rank is {rank}.",
            "Build the model at rank=trial.rank.",
        )
    return Build(
        reference=replace(at, batch=batch),
        full_fan_in=survey.full_width(at.init),
        layers=layers_of(survey),
    )


def multiplier_of(law: Law, survey: Survey, build: Build, first: Build) -> float:
    """Return the multiplier of the model's most common A matrices, or of its whole weights.

    first: the build of the study's first trial, whose configuration is the reference.
    """
    at = build.reference
    width = width_for(survey, at.method, first.reference.init)
    factor = replace(at, fan_in=width).as_factor()
    return checked_multiplier(law, factor, first.reference)


# --- its optimizer --------------------------------------------------------------------------------


def groups_of(params: Any) -> Any:
    """Return parameters as a list that can be read twice; a model stays itself."""
    if isinstance(as_one_model(params), nn.Module):
        return params
    if not isinstance(params, Iterable):
        raise CalibrationError(
            f"trial.optimizer got {shown(params)} instead of a model.",
            "Call trial.optimizer(model), or trial.optimizer(groups, model=model).",
        )
    return [*params]


def groups_with_lr(params: object) -> set[int]:
    """Return the numbers of the parameter groups that were passed with an "lr" of their own."""
    groups = params if isinstance(params, list) else []
    return {i for i, g in enumerate(groups) if isinstance(g, Mapping) and "lr" in g}


def trained_groups(opt: Optimizer) -> list[int]:
    """Return the numbers of the parameter groups whose learning rate the trial sets: those with
    LoRA matrices, or with whole weights in full finetuning. An optimizer of another class has one.
    """
    if not isinstance(opt, RankAwareOptimizer):
        return [0]
    parts = [part for part in opt.rates.groups if part.role != "other"]
    return sorted({part.user_group for part in parts if part.given is None})


def refuse_own_rates(opt: RankAwareOptimizer, lr: float) -> None:
    """Raise a `CalibrationError` if LoRA matrices would not train at the trial's learning rate."""
    numbers = trained_groups(opt)
    if not numbers:
        raise CalibrationError(
            "rates= sets a learning rate for every LoRA matrix, so none is left that the trials"
            " could change.",
            "Remove the LoRA matrices from rates=.",
        )
    for number in numbers:
        own = float(opt.param_groups[number]["lr"])
        if own != lr:
            raise CalibrationError(
                f"Parameter group {number} was passed with lr={own:.3g}, but this trial tries"
                f" {lr:.3g}. Every trial would train the group at {own:.3g}, and the search would"
                " compare nothing.",
                "Remove 'lr' from that group. If the trials share one list of groups, build the"
                " list again in each trial.",
            )


def settings_in_force(
    opt: RankAwareOptimizer,
    native: type[Optimizer],
    settings: Mapping[str, object],
    at_own_lr: Collection[int],
) -> dict[str, Any]:
    """Return the optimizer's settings as JSON values that are equal in every process.

    Together with rank, seed, learning rate and model they decide a trial. Settings that were not
    passed have their defaults. A setting in which groups differ is a list of its values. Groups
    without LoRA matrices are listed apart, with the learning rates of their parameters.

    Args:
        opt: the trial's optimizer.
        native: the torch optimizer's class.
        settings: the arguments of `trial.optimizer`.
        at_own_lr: numbers of the groups that were passed with an "lr".
    """
    arguments = {**defaults_of(RankAwareOptimizer.__new__), **defaults_of(native)}
    arguments.update(settings)
    made = {name: plain_value(arguments[name]) for name in arguments.keys() - _LEFT_OUT}
    names = opt.defaults.keys() - _LEFT_OUT
    rates = opt.rates.groups
    trained = {group.user_group for group in rates if group.role != "other"}
    others: list[dict[str, Any]] = []
    factors: list[dict[str, Any]] = []
    for number, group in enumerate(opt.param_groups):
        (factors if number in trained else others).append(group)
    made |= settings_of(factors or others, names)
    if others:
        made["others' settings"] = settings_of(others, names)
    if not any(group.role == "full" for group in rates):
        made["other rates"] = _other_rates(rates, at_own_lr)
    return made


def _other_rates(
    rates: Iterable[RateGroup], at_own_lr: Collection[int]
) -> dict[str, Any]:
    """Return the learning rates of parameters that are no LoRA matrices, by name pattern.

    A pattern with two different rates is left out.
    """
    tables = []
    for group in rates:
        if group.role != "other":
            continue
        is_own = group.given is not None or group.user_group in at_own_lr
        # twelve digits remove a ratio's rounding error
        rate = float(f"{group.lr:.12g}") if is_own else BASE
        tables.append({name_pattern(name): rate for name in group.names})
    return without_conflicts(tables)


def _method(rank: int | None) -> Method:
    return "full" if rank is None else "lora"
