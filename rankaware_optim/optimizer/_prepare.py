"""This module prepares the parameter groups of a `RankAwareOptimizer`.

It reads the user's arguments, assigns a learning rate to each parameter, and splits
every group into parts with one learning rate each. Groups are prepared when the
optimizer is built and when a group is added later. The user's arguments are not
changed.
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
    """Assign a learning rate to each parameter and split the groups of a new optimizer.

    Args:
        params: a model, parameters, or parameter groups.
        model: the model that contains the adapters.
        wrapped: the optimizer to wrap.
        source: where the base learning rate comes from.
        method: "lora" or "full".
        init: the init of all LoRA pairs, if it cannot be read from the model.
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
    # The most common configuration, the width and the notes depend only on the
    # parameters that are trainable now. Frozen parameters in the groups get a learning
    # rate as well, because they may be unfrozen later.
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
    """Split a parameter group that the user adds to an existing optimizer.

    Returns:
        The survey, to which the LoRA matrices of the group have been added, and the
        group.
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
    # Old descriptions replace new ones of the same matrix, because the init can no
    # longer be read from weights that have been trained.
    factors = {f.name: f for f in (*later.factors, *wrapper.survey.factors)}
    survey = replace(wrapper.survey, factors=tuple(factors.values()))
    split_into_parts(groups, assigner, survey)
    _refuse_parallel_lists(groups, type(opt))
    return survey, groups[0]


def _parameters_of(
    walked: Walk, method: Method, init: Init | None
) -> list[nn.Parameter]:
    """Return the parameters of a model that the optimizer should contain.

    These are the trainable parameters. For LoRA, the result includes the matrices of
    inactive adapters, because PEFT's `set_adapter` may activate these adapters during
    the run.
    """
    # All other frozen parameters are left out. They belong to the base model, which can
    # have very many of them.
    inactive = set[torch.Tensor]()
    if method == "lora":
        inactive = {p for p in factor_tensors(walked) if not p.requires_grad}
    if inactive:
        try:
            survey_of(walked, init=init, also=inactive)
        except InspectionError:
            # An inactive adapter that we cannot read should not prevent the training of
            # the active one.
            inactive = set()
    return [p for _, p in walked.parameters if p.requires_grad or p in inactive]


def _set_lr(groups: Iterable[SplitGroup], lr: float | torch.Tensor | None) -> None:
    """Set the recipe's learning rate in the groups of an existing optimizer.

    If there is no recipe, `lr` is None and the groups are not changed.
    """
    for group in groups:
        if lr is not None:
            group.snapshot["lr"] = lr


def _refuse_no_parameters(groups: Iterable[SplitGroup]) -> None:
    """Raise an error if none of the groups contains a parameter, as torch does."""
    if not any(group.names for group in groups):
        raise OptimizerError(
            "The optimizer got no parameters. If you passed an iterator such as"
            " model.parameters(), it is probably empty because it was used before.",
            "Pass the model itself, or a list of its parameters.",
        )


def _refuse_parallel_lists(groups: Iterable[SplitGroup], native: type) -> None:
    """Raise an error if a group must be split but has an option with one value per
    parameter.

    After the split, each part would have the values of all parameters, and the
    optimizer would use the wrong values.
    """
    # The standard options of the optimizer, such as AdamW's two betas, apply to the
    # whole group, even if their length equals the number of parameters.
    own = {*defaults_of(native), "params", "param_names"}
    for group in groups:
        if len(group.parts) == 1:
            continue
        for option, value in group.snapshot.items():
            is_list = isinstance(value, (list, tuple)) and option not in own
            if is_list and len(value) == len(group.names):
                raise OptimizerError(
                    f"In a parameter group, the option {option!r} has {len(value)} values, one for"
                    " each parameter. The parameters of this group need different learning rates,"
                    " but RankAwareOptimizer cannot split such an option.",
                    f"Pass a separate parameter group for each value of {option!r}.",
                )


def _settings_of_factors(
    wrapped: NativeOptimizer, groups: Iterable[SplitGroup], survey: Survey
) -> list[Settings]:
    """Return the optimizer settings of each group that contains LoRA matrices.

    If no group contains LoRA matrices, the common settings of all groups are returned.
    """
    common = in_force(wrapped.native, wrapped.settings)
    factors = {f.name for f in survey.factors}
    settings: list[Settings] = []
    for group in groups:
        if not factors.isdisjoint(group.names):
            settings.append({**common, **group.snapshot})
    return settings or [common]


def _frozen(groups: Iterable[SplitGroup]) -> set[torch.Tensor]:
    """Return the frozen parameters in the given parameter groups."""
    frozen = set[torch.Tensor]()
    for group in groups:
        frozen.update(p for p in group.snapshot["params"] if not p.requires_grad)
    return frozen


def _weak_reference(model: nn.Module) -> Callable[[], nn.Module | None]:
    """Return a function that returns the model, or None if the model was deleted.

    If the optimizer has several models, the function returns None as soon as one of the
    models was deleted.
    """
    if not isinstance(model, Models):
        return weakref.ref(model)
    # We created the `Models` object, and nobody else refers to it, so a weak reference
    # to it would be dead immediately. Each of the user's models gets a reference
    # instead.
    references = list(map(weakref.ref, model))

    def dereference() -> nn.Module | None:
        models = [reference() for reference in references]
        return None if None in models else as_one_model(models)

    return dereference
