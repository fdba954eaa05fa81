"""This module describes the model and the optimizer that a trial of a calibration
builds.

The losses of two trials with the same LoRA rank can only be compared if the models have
the same configuration and the optimizers have the same settings.
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

# Arguments of RankAwareOptimizer that `calibrate` sets for every trial. The user's code must
# not pass them to `trial.optimizer`, or the trials could no longer be compared.
_SET_BY_THE_TRIAL = ("lr", "tuned_at", "law", "recipe", "method")
# Settings that are not compared between trials: `calibrate` sets them itself, or they
# identify the model (params, model), or they do not change the updates.
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
    """Raise a `CalibrationError` if the user called `trial.optimizer` with an argument
    that only `calibrate` may set.
    """
    for argument in _SET_BY_THE_TRIAL:
        if argument in settings:
            value = settings[argument]
            raise CalibrationError(
                f"trial.optimizer() was called with {argument}={value!r}, but calibrate() chooses"
                " the learning rate, the scaling law and the training method of every trial.",
                f"Remove {argument}= from the call. If you need the learning rate of the trial,"
                " read trial.lr after the call.",
            )


def survey_of(params: Any, rank: int | None, settings: Mapping[str, Any]) -> Survey:
    """Inspect the model that the user's code passed to `trial.optimizer`.

    Args:
        params: the first argument of `trial.optimizer`.
        rank: the trial's rank.
        settings: the other arguments of `trial.optimizer`.
    """
    model = settings.get("model")
    model = as_one_model(params if model is None else model)
    return inspect_model(model, method=_method(rank), init=settings.get("init"))


def describe(survey: Survey, rank: int | None, batch: float | None) -> Build:
    """Describe the model that a trial of the calibration built.

    The returned description does not contain the settings of the optimizer. The caller
    of this function adds them later.

    Raises:
        CalibrationError: the rank of the model is not the rank of the trial.
    """
    at = survey.dominant().resolve(survey)
    if at.rank != rank:
        raise CalibrationError(
            f"train() built a model of rank {at.rank}, but trial.rank is {rank}.",
            "Build a model of rank trial.rank, for example with LoraConfig(r=trial.rank, ...).",
        )
    return Build(
        reference=replace(at, batch=batch),
        full_fan_in=survey.full_width(at.init),
        layers=layers_of(survey),
    )


def multiplier_of(law: Law, survey: Survey, build: Build, first: Build) -> float:
    """Return the factor by which the scaling law multiplies the base learning rate for
    the model's most common kind of LoRA A matrix.

    In full finetuning there are no LoRA matrices, so this function returns the factor
    for the model's weight matrices.

    Args:
        law: the scaling law.
        survey: the inspected model.
        build: the description of the trial.
        first: the description of the first trial. Its model is the reference
            configuration.
    """
    at = build.reference
    # LoRA and full finetuning use different widths. The init comes from the first trial,
    # because it cannot be read from a model without adapters.
    width = width_for(survey, at.method, first.reference.init)
    factor = replace(at, fan_in=width).as_factor()
    return checked_multiplier(law, factor, first.reference)


# --- its optimizer --------------------------------------------------------------------------------


def groups_of(params: Any) -> Any:
    """Turn an iterator of parameters into a list, so that the code can loop over the
    parameters twice.

    A model is returned unchanged.
    """
    if isinstance(as_one_model(params), nn.Module):
        return params
    if not isinstance(params, Iterable):
        raise CalibrationError(
            "The first argument of trial.optimizer() must be the model, but"
            f" {shown(params)} was passed.",
            "Call trial.optimizer(model). If you have parameter groups, call"
            " trial.optimizer(groups, model=model).",
        )
    return [*params]


def groups_with_lr(params: object) -> set[int]:
    """Return the indices of the parameter groups in which the user has set an "lr"."""
    groups = params if isinstance(params, list) else []
    return {i for i, g in enumerate(groups) if isinstance(g, Mapping) and "lr" in g}


def trained_groups(opt: Optimizer) -> list[int]:
    """Return the indices of the parameter groups that train at the trial's learning
    rate.

    The parameter groups with the trial's learning rate contain LoRA matrices or, in
    full finetuning, whole weight matrices. If the optimizer is not a
    `RankAwareOptimizer`, only the index of its first parameter group is returned.
    """
    if not isinstance(opt, RankAwareOptimizer):
        return [0]
    # A rate group is a part of a parameter group: the tensors that share a learning rate.
    # If `given` is set, `rates=` fixed that learning rate, so the trial does not change it.
    parts = [part for part in opt.rates.groups if part.role != "other"]
    return sorted({part.user_group for part in parts if part.given is None})


def refuse_own_rates(opt: RankAwareOptimizer, lr: float) -> None:
    """Raise a `CalibrationError` if some LoRA matrices would not train at the learning
    rate of the trial.
    """
    numbers = trained_groups(opt)
    if not numbers:
        raise CalibrationError(
            "rates= sets a fixed learning rate for every LoRA matrix, so all trials would train"
            " at the same learning rate.",
            "Remove the name patterns that match LoRA matrices from rates=.",
        )
    for number in numbers:
        group_lr = float(opt.param_groups[number]["lr"])
        if group_lr != lr:
            raise CalibrationError(
                f"Parameter group {number} was passed with lr={group_lr:.3g}, but this trial must"
                f" train at the learning rate {lr:.3g}.",
                "Remove 'lr' from this parameter group. If all trials use the same list of"
                " groups, build a new list in each trial, because an optimizer stores its learning"
                " rate in the groups.",
            )


def settings_in_force(
    opt: RankAwareOptimizer,
    native: type[Optimizer],
    settings: Mapping[str, object],
    at_own_lr: Collection[int],
) -> dict[str, Any]:
    """Return all settings of the trial's optimizer as values that can be stored as
    JSON.

    Together with the rank, the seed, the learning rate and the model, the optimizer's
    settings determine the result of a trial. If the user did not pass a setting, the
    result contains its default value. If a setting has different values in different
    parameter groups, the function returns a list of these values. Parameter groups
    without LoRA matrices are listed separately, and each of them with its learning
    rate. In distributed training, the returned settings are the same in every process.

    Args:
        opt: the trial's optimizer.
        native: the torch optimizer's class.
        settings: the arguments of `trial.optimizer`.
        at_own_lr: the indices of the groups that were passed with an "lr".
    """
    arguments = {**defaults_of(RankAwareOptimizer.__new__), **defaults_of(native)}
    arguments.update(settings)
    # The settings come from three sources, and later ones replace earlier ones: the defaults of
    # both constructors, the arguments of this call, and the values in the parameter groups.
    # The optimizer trains with the values in the parameter groups.
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
    # Only for LoRA: the other rates belong to parameters that train together with the adapters.
    if not any(group.role == "full" for group in rates):
        made["other rates"] = _other_rates(rates, at_own_lr)
    return made


def _other_rates(
    rates: Iterable[RateGroup], at_own_lr: Collection[int]
) -> dict[str, Any]:
    """Return a dict from patterns of parameter names to learning rates, for the
    parameters that are not LoRA matrices.

    The dict omits a name pattern if the parameters that match it have different
    learning rates.
    """
    tables = []
    for group in rates:
        if group.role != "other":
            continue
        is_own = group.given is not None or group.user_group in at_own_lr
        # A parameter without a fixed learning rate trains at the trial's learning rate, which
        # differs between trials, so a placeholder is stored. Rounding to twelve digits removes
        # rounding errors.
        rate = float(f"{group.lr:.12g}") if is_own else BASE
        tables.append({name_pattern(name): rate for name in group.names})
    return without_conflicts(tables)


def _method(rank: int | None) -> Method:
    return "full" if rank is None else "lora"
