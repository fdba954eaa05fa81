"""The road from a model and a rate to split groups: at construction, and for later groups."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .._optimizers import in_force
from .._types import Init, Method
from ..inspection import Models, Survey, as_one_model, survey_of, walk
from ._arguments import (
    Wrapped,
    refuse_outside,
    refuse_own_rates,
    settings_of_built,
    user_groups,
    with_base_lr,
)
from ._assign import make_assigner
from ._notes import notes_of
from ._parts import Hidden, SplitGroup, split
from ._source import Settings, Source, on_this_model


def prepare(
    params: Any,
    model: nn.Module,
    wrapped: Wrapped,
    source: Source,
    method: Method,
    init: Init | None,
) -> Hidden:
    """Read the parameters, assign their rates and split their groups. Nothing is changed.

    Args:
        params: a model, parameters or groups.
        model: the model that holds the adapters.
        wrapped: the optimizer.
        source: of the rates.
        method: "lora" or "full".
        init: the adapters' init if it cannot be read.
    """
    native, built, settings = wrapped
    walked = walk(model)
    groups = user_groups(params, model, walked)
    held = {param for _, param in walked.parameters}
    refuse_outside(groups, held, source, built=built is not None)
    refuse_own_rates(native, groups, settings)
    # only what trains decides where a rate counts as tuned, and is spoken of
    trained = survey = survey_of(walked, method=method, init=init)
    if frozen := _frozen(groups):
        survey = survey_of(walked, method=method, init=init, also=frozen)
    in_groups = _settings_of_factors(wrapped, groups, trained)
    source = on_this_model(source, trained, native, in_groups)
    if built is not None and source.lr is not None:  # a recipe's replaces theirs
        for group in groups:
            group.seen["lr"] = source.lr
    source = with_base_lr(source, wrapped, groups)
    are_several = isinstance(model, Models)
    assigner = make_assigner(
        trained, source, method, native, settings, are_several=are_several
    )
    split(groups, assigner, survey, None if built is None else built.state)
    assigned = [part.assigned for group in groups for part in group.parts]
    notes = notes_of(assigner, trained, assigned)
    return Hidden(assigner, survey, init, notes, groups, _weakly(model))


def _settings_of_factors(
    wrapped: Wrapped, groups: Iterable[SplitGroup], survey: Survey
) -> list[Settings]:
    """Return the settings in force in each group that has factors, or in all."""
    given = in_force(wrapped.native, wrapped.settings)
    factors = {f.name for f in survey.factors}
    found: list[Settings] = []
    for group in groups:
        if not factors.isdisjoint(group.names):
            found.append({**given, **group.seen})
    return found or [given]


def prepare_later(
    hidden: Hidden, opt: Optimizer, model: nn.Module, param_group: Mapping[str, Any]
) -> tuple[Survey, SplitGroup]:
    """Return the survey with the factors of a later group, and its split. Nothing is changed."""
    walked = walk(model)
    assigner = hidden.assigner
    groups = user_groups([param_group], model, walked, first=len(hidden.splits))
    refuse_own_rates(type(opt), groups, settings_of_built(opt))
    also = _frozen(groups)
    also |= {p for group in opt.param_groups for p in group["params"]}
    later = survey_of(walked, method=assigner.method, init=hidden.init, also=also)
    # those of before stay, since trained weights do not show their init
    factors = {f.name: f for f in (*later.factors, *hidden.survey.factors)}
    survey = replace(hidden.survey, factors=tuple(factors.values()))
    split(groups, assigner, survey)
    return survey, groups[0]


def _frozen(groups: Iterable[SplitGroup]) -> set[Any]:
    """Return frozen parameters that the user listed, since they get a rate if they train later."""
    return {p for group in groups for p in group.seen["params"] if not p.requires_grad}


def _weakly(model: nn.Module) -> Callable[[], nn.Module | None]:
    """Return what gives the model back while it lives, and several only while all of them do."""
    if not isinstance(model, Models):
        return weakref.ref(model)
    references = list(map(weakref.ref, model))

    def again() -> nn.Module | None:
        models = [reference() for reference in references]
        return None if None in models else as_one_model(models)

    return again
