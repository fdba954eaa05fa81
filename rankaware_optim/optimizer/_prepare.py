"""The road from a model and a rate to split groups: at construction, and for later groups."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .._optimizers import defaults_of, in_force
from .._types import Init, Method
from ..errors import InspectionError, OptimizerError
from ..inspection import (
    Models,
    Survey,
    Walk,
    as_one_model,
    factor_tensors,
    survey_of,
    walk,
)
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
from ._parts import SplitGroup, WrapperState, split_into_parts
from ._source import Settings, Source, on_this_model


def prepare(
    params: Any,
    model: nn.Module,
    wrapped: Wrapped,
    source: Source,
    method: Method,
    init: Init | None,
) -> WrapperState:
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
    if isinstance(params, nn.Module):
        of_params = walked if params is model else walk(params)
        params = _parameters_of(of_params, method, init)
    groups = user_groups(params, walked)
    held = {param for _, param in walked.parameters}
    refuse_outside(groups, held, source, built=built is not None)
    refuse_own_rates(native, groups, settings)
    # only what trains decides where a rate counts as tuned, and is spoken of
    trained = survey = survey_of(walked, method=method, init=init)
    if not any(group.names for group in groups):
        raise OptimizerError(
            "The optimizer got no parameters. An iterator, such as model.parameters() or a filter,"
            " is empty once it was read.",
            "Pass the model itself, or the parameters as a list.",
        )
    if frozen := _frozen(groups):
        survey = survey_of(walked, method=method, init=init, also=frozen)
    in_groups = _settings_of_factors(wrapped, groups, trained)
    source = on_this_model(source, trained, native, in_groups)
    if built is not None and source.lr is not None:  # a recipe's replaces theirs
        for group in groups:
            group.snapshot["lr"] = source.lr
    source = with_base_lr(source, wrapped, groups)
    are_several = isinstance(model, Models)
    assigner = make_assigner(
        trained, source, method, native, settings, are_several=are_several
    )
    split_into_parts(groups, assigner, survey, None if built is None else built.state)
    _refuse_parallel_lists(groups, native)
    assigned = [part.assigned for group in groups for part in group.parts]
    notes = notes_of(assigner, trained, assigned)
    return WrapperState(assigner, survey, init, notes, groups, _weakly(model))


def _settings_of_factors(
    wrapped: Wrapped, groups: Iterable[SplitGroup], survey: Survey
) -> list[Settings]:
    """Return the settings in force in each group that has factors, or in all."""
    given = in_force(wrapped.native, wrapped.settings)
    factors = {f.name for f in survey.factors}
    found: list[Settings] = []
    for group in groups:
        if not factors.isdisjoint(group.names):
            found.append({**given, **group.snapshot})
    return found or [given]


def prepare_later(
    wrapper: WrapperState,
    opt: Optimizer,
    model: nn.Module,
    param_group: Mapping[str, Any],
) -> tuple[Survey, SplitGroup]:
    """Return the survey with the factors of a later group, and its split. Nothing is changed."""
    walked = walk(model)
    assigner = wrapper.assigner
    groups = user_groups([param_group], walked, first=len(wrapper.splits))
    held = {param for _, param in walked.parameters}
    refuse_outside(groups, held, assigner.source, later=True)
    refuse_own_rates(type(opt), groups, settings_of_built(opt))
    also = _frozen(groups)
    also |= {p for group in opt.param_groups for p in group["params"]}
    later = survey_of(walked, method=assigner.method, init=wrapper.init, also=also)
    # those of before stay, since trained weights do not show their init
    factors = {f.name: f for f in (*later.factors, *wrapper.survey.factors)}
    survey = replace(wrapper.survey, factors=tuple(factors.values()))
    split_into_parts(groups, assigner, survey)
    _refuse_parallel_lists(groups, type(opt))
    return survey, groups[0]


def _parameters_of(
    walked: Walk, method: Method, init: Init | None
) -> list[nn.Parameter]:
    """Return the parameters of a model that train, and with LoRA also the matrices of adapters that
    are not active. PEFT's set_adapter may activate those in the middle of a run.
    """
    inactive = set[Any]()
    if method == "lora":
        inactive = {p for p in factor_tensors(walked) if not p.requires_grad}
    if inactive:
        try:
            survey_of(walked, init=init, also=inactive)
        except InspectionError:  # An adapter that rests need not be readable.
            inactive = set()
    return [p for _, p in walked.parameters if p.requires_grad or p in inactive]


def _refuse_parallel_lists(groups: Iterable[SplitGroup], native: type) -> None:
    """Raise if a group is split although one of its options has a value for each parameter. Each
    part would get the whole list, so that values would go to the wrong parameters.
    """
    own = defaults_of(native)
    for group in groups:
        if len(group.parts) == 1:
            continue
        for name, value in group.snapshot.items():
            is_known = name in ("params", "param_names") or name in own
            is_list = isinstance(value, (list, tuple)) and not is_known
            if is_list and len(value) == len(group.names):
                raise OptimizerError(
                    f"The group's option {name!r} has a value for each of its {len(value)}"
                    " parameters, but these train at several learning rates, in several parts.",
                    "Pass one group for each value, with that value in the group.",
                )


def _frozen(groups: Iterable[SplitGroup]) -> set[Any]:
    """Return frozen parameters that the user listed, since they get a rate if they train later."""
    return {
        p for group in groups for p in group.snapshot["params"] if not p.requires_grad
    }


def _weakly(model: nn.Module) -> Callable[[], nn.Module | None]:
    """Return what gives the model back while it lives, and several only while all of them do."""
    if not isinstance(model, Models):
        return weakref.ref(model)
    references = list(map(weakref.ref, model))

    def again() -> nn.Module | None:
        models = [reference() for reference in references]
        return None if None in models else as_one_model(models)

    return again
