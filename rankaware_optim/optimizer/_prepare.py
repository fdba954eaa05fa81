"""All steps from a model and a learning rate to groups that are split into parts.

They are taken for a new wrapper, and for a group that is added later. They change nothing that the
user passed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
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
    NativeOptimizer,
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
    wrapped: NativeOptimizer,
    source: Source,
    method: Method,
    init: Init | None,
) -> WrapperState:
    """Read the parameters, assign their learning rates and split their groups.

    Args:
        params: a model, parameters or groups.
        model: the model that contains the adapters.
        wrapped: the optimizer.
        source: where the base learning rate comes from.
        method: "lora" or "full".
        init: which LoRA matrix was drawn at random, if it cannot be read from the model.
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
    # The parameters that train decide the most common configuration, the width and the notes.
    # Frozen parameters in the groups get a learning rate as well, because they may train later.
    trained = survey_of(walked, method=method, init=init)
    _refuse_no_parameters(groups)
    frozen = _frozen(groups)
    survey = trained
    if frozen:
        survey = survey_of(walked, method=method, init=init, also=frozen)
    in_groups = _settings_of_factors(wrapped, groups, trained)
    source = on_this_model(source, trained, native, in_groups)
    if built is not None:
        _set_lr(groups, source.lr)
    source = with_base_lr(source, wrapped, groups)
    are_several = isinstance(model, Models)
    assigner = make_assigner(
        trained, source, method, native, settings, are_several=are_several
    )
    split_into_parts(groups, assigner, survey, None if built is None else built.state)
    _refuse_parallel_lists(groups, native)
    assigned = [part.assigned for group in groups for part in group.parts]
    notes = notes_of(assigner, trained, assigned)
    return WrapperState(assigner, survey, init, notes, groups, _weak_reference(model))


def prepare_later(
    wrapper: WrapperState,
    opt: Optimizer,
    model: nn.Module,
    param_group: Mapping[str, Any],
) -> tuple[Survey, SplitGroup]:
    """Split a group that is added later. Return it with the survey, to which the LoRA matrices of
    the group are added.
    """
    walked = walk(model)
    assigner = wrapper.assigner
    groups = user_groups([param_group], walked, first=len(wrapper.splits))
    held = {param for _, param in walked.parameters}
    refuse_outside(groups, held, assigner.source, later=True)
    refuse_own_rates(type(opt), groups, settings_of_built(opt))
    also = _frozen(groups)
    for group in opt.param_groups:
        also.update(group["params"])
    later = survey_of(walked, method=assigner.method, init=wrapper.init, also=also)
    # Factors that were read before are kept: weights that have trained do not show their init.
    factors = {f.name: f for f in (*later.factors, *wrapper.survey.factors)}
    survey = replace(wrapper.survey, factors=tuple(factors.values()))
    split_into_parts(groups, assigner, survey)
    _refuse_parallel_lists(groups, type(opt))
    return survey, groups[0]


def _parameters_of(
    walked: Walk, method: Method, init: Init | None
) -> list[nn.Parameter]:
    """Return the parameters of a model that train, and with LoRA also the matrices of inactive
    adapters. PEFT's `set_adapter` may activate those in the middle of a run.
    """
    # Other frozen parameters are left out. They are the base model's, and may be many.
    inactive = set[torch.Tensor]()
    if method == "lora":
        inactive = {p for p in factor_tensors(walked) if not p.requires_grad}
    if inactive:
        try:
            survey_of(walked, init=init, also=inactive)
        except InspectionError:  # An inactive adapter need not be readable.
            inactive = set()
    return [p for _, p in walked.parameters if p.requires_grad or p in inactive]


def _set_lr(groups: Iterable[SplitGroup], lr: float | torch.Tensor | None) -> None:
    """Set a recipe's learning rate, if there is one, in the groups of an existing optimizer."""
    for group in groups:
        if lr is not None:
            group.snapshot["lr"] = lr


def _refuse_no_parameters(groups: Iterable[SplitGroup]) -> None:
    """Raise an error if the groups have no parameters, as torch does."""
    if not any(group.names for group in groups):
        raise OptimizerError(
            "The optimizer got no parameters. An iterator, such as model.parameters() or a filter,"
            " is empty after it was read once.",
            "Pass the model itself, or the parameters as a list.",
        )


def _refuse_parallel_lists(groups: Iterable[SplitGroup], native: type) -> None:
    """Raise an error if a group is split into parts although one of its options has a value for
    each parameter. Each part would get the whole list, with values of other parameters.
    """
    # The class's own options, such as AdamW's two betas, have one value for the whole group.
    own = {*defaults_of(native), "params", "param_names"}
    for group in groups:
        if len(group.parts) == 1:
            continue
        for name, value in group.snapshot.items():
            is_list = isinstance(value, (list, tuple)) and name not in own
            if is_list and len(value) == len(group.names):
                raise OptimizerError(
                    f"The group's option {name!r} has a value for each of its {len(value)}"
                    " parameters, but these train at several learning rates, in several parts.",
                    "Pass one group for each value of this option.",
                )


def _settings_of_factors(
    wrapped: NativeOptimizer, groups: Iterable[SplitGroup], survey: Survey
) -> list[Settings]:
    """Return the settings of each group that has LoRA matrices; if there is none, the settings for
    all groups.
    """
    common = in_force(wrapped.native, wrapped.settings)
    factors = {f.name for f in survey.factors}
    settings: list[Settings] = []
    for group in groups:
        if not factors.isdisjoint(group.names):
            settings.append({**common, **group.snapshot})
    return settings or [common]


def _frozen(groups: Iterable[SplitGroup]) -> set[torch.Tensor]:
    """Return the frozen parameters in these groups."""
    frozen = set[torch.Tensor]()
    for group in groups:
        frozen.update(p for p in group.snapshot["params"] if not p.requires_grad)
    return frozen


def _weak_reference(model: nn.Module) -> Callable[[], nn.Module | None]:
    """Return a function that returns the model while it lives. Several models are returned only
    while all of them live.
    """
    if not isinstance(model, Models):
        return weakref.ref(model)
    # A reference to each model: the `Models` around them is ours, and nobody else keeps it alive.
    references = list(map(weakref.ref, model))

    def dereference() -> nn.Module | None:
        models = [reference() for reference in references]
        return None if None in models else as_one_model(models)

    return dereference
