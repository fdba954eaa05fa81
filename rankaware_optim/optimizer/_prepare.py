"""The one road from a model and a rate to split groups: for the wrapper, for native groups, and for
groups that are added later.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .._optimizers import in_force
from .._types import Init, Method, Survey
from .._warn import warn
from ..inspection import Models, Walk, survey_of, walk
from ._assign import Assigner, Explicit, make_assigner
from ._notes import notes_of
from ._parts import SplitGroup, split
from ._refuse import (
    Wrapped,
    check_base_lr,
    refuse_outside,
    refuse_own_rates,
    settings_of_built,
)
from ._source import Source, on_this_model
from ._user_groups import UserGroup, user_groups


@dataclass(frozen=True)
class Prepared:
    """What decides the rates of a model's parameters.

    survey: with the factors that do not train yet. init: as given. notes: for the report.
    """

    assigner: Assigner
    survey: Survey
    init: Init | None
    notes: tuple[str, ...]


def prepare(
    params: Any,
    model: nn.Module,
    wrapped: Wrapped,
    source: Source,
    explicit: Explicit,
    method: Method,
    init: Init | None,
) -> tuple[Prepared, list[SplitGroup]]:
    """Read the parameters, assign their rates and split their groups. Nothing is changed.

    Args:
        params: a model, parameters or groups.
        model: the model that holds the adapters.
        wrapped: the optimizer.
        source: of the base rate.
        explicit: rates that were given outright.
        method: "lora" or "full".
        init: the adapters' init if it cannot be read.
    """
    native, built, settings = wrapped
    walked = walk(model)
    groups = user_groups(params, model, walked)
    held = {param for _, param in walked.parameters}
    refuse_outside(groups, held, explicit, built=built is not None)
    refuse_own_rates(native, groups, in_force(native, settings))
    # only what trains decides where a rate counts as tuned, and is spoken of
    trained = survey = survey_of(walked, method=method, init=init)
    if frozen := _frozen(groups):
        survey = survey_of(walked, method=method, init=init, also=frozen)
    source = on_this_model(source, trained, native, settings, groups)
    if built is not None and source.lr is not None:  # a recipe's replaces theirs
        for group in groups:
            group.options["lr"] = source.lr
    check_base_lr(wrapped, source, groups, explicit)
    are_several = isinstance(model, Models)
    assigner = make_assigner(
        trained, source, explicit, native, settings, are_several=are_several
    )
    notes = notes_of(assigner, trained)
    state = None if built is None else built.state
    splits = split(groups, assigner, survey, state)
    notes += _of_families(splits, source)
    return Prepared(assigner, survey, init, notes), splits


def _of_families(splits: Iterable[SplitGroup], source: Source) -> tuple[str, ...]:
    """Return what is said of the families of the factors. Warn of an unknown one."""
    parts = [part.assigned for split in splits for part in split.parts]
    notes = dict.fromkeys(assigned.note for assigned in parts if assigned.note)
    for assigned in parts if source.recipe is None else ():
        if assigned.note and assigned.family == "unknown":
            warn(f"{assigned.note} A calibration measures it.")
            break
    return tuple(notes)


def prepare_later(
    prepared: Prepared,
    param_group: Mapping[str, Any],
    number: int,
    model: nn.Module,
    opt: Optimizer,
    native: type[Optimizer],
) -> tuple[Prepared, SplitGroup]:
    """Return the same with a later group, and its split. Nothing is changed.

    number: that of the group. native: the class of `opt`.
    """
    walked = walk(model)
    groups = user_groups([param_group], model, walked, first=number)
    refuse_own_rates(native, groups, in_force(native, settings_of_built(opt)))
    also = _frozen(groups)
    also |= {id(p) for group in opt.param_groups for p in group["params"]}
    survey = _later_survey(prepared, walked, also)
    (split_group,) = split(groups, prepared.assigner, survey)
    return replace(prepared, survey=survey), split_group


def _later_survey(prepared: Prepared, walked: Walk, also: Collection[int]) -> Survey:
    """Return the survey with later factors. Those of before stay as they were, since trained
    weights do not show their init.
    """
    method = prepared.assigner.method
    later = survey_of(walked, method=method, init=prepared.init, also=also)
    factors = {f.name: f for f in (*later.factors, *prepared.survey.factors)}
    return replace(prepared.survey, factors=tuple(factors.values()))


def _frozen(groups: Iterable[UserGroup]) -> set[int]:
    """Return the ids of frozen parameters that the user listed, since they get a rate if they train
    later.
    """
    return {id(p) for group in groups for _, p in group.named if not p.requires_grad}
