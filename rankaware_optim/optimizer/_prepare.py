"""The one road from a model and a rate to split groups: for the wrapper, for native groups, and for
groups that are added later.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from .._checks import check_lr, plain_lr
from .._optimizers import in_force
from .._rate import Rate
from .._types import Init, Method
from .._warn import warn
from ..inspection import Models, ReferenceLike, Survey, as_one_model, survey_of, walk
from ..laws import Law
from ..recipe import Recipe
from ._assign import Assigner, Explicit, make_assigner
from ._notes import notes_of
from ._parts import SplitGroup, split
from ._refuse import (
    Wrapped,
    check_base_lr,
    refuse_one_rate,
    refuse_outside,
    refuse_own_rates,
    settings_of_built,
)
from ._source import Source, on_this_model, read_source
from ._user_groups import MULTIPLIED, UserGroup, user_groups


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
    assigner = make_assigner(
        trained,
        source,
        explicit,
        method,
        native,
        settings,
        are_several=isinstance(model, Models),
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
    method, survey = prepared.assigner.method, prepared.survey
    later = survey_of(walked, method=method, init=prepared.init, also=also)
    # those of before stay, since trained weights do not show their init
    factors = {f.name: f for f in (*later.factors, *survey.factors)}
    survey = replace(survey, factors=tuple(factors.values()))
    (split_group,) = split(groups, prepared.assigner, survey)
    return replace(prepared, survey=survey), split_group


def _frozen(groups: Iterable[UserGroup]) -> set[int]:
    """Return the ids of frozen parameters that the user listed, since they get a rate if they train
    later.
    """
    return {id(p) for group in groups for _, p in group.named if not p.requires_grad}


# --- groups for an optimizer without the wrapper --------------------------------------------------


def rank_aware_param_groups(  # noqa: PLR0913
    params: Any,
    *,
    lr: float | Rate | None = None,
    model: nn.Module | Sequence[nn.Module] | None = None,
    law: str | Law | None = None,
    tuned_at: ReferenceLike | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    optimizer_class: type[Optimizer] | None = None,
    settings: Mapping[str, Any] | None = None,
    named: bool = True,
    method: Method = "lora",
    init: Init | None = None,
    rates: Mapping[str, float | Rate] | None = None,
    other_lr: float | Rate | None = None,
    batch: float | None = None,
    steps: int | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups with their rates, for any torch optimizer without the wrapper.

    group["lr"] is the user group's lr, or the base rate, times group["rank_multiplier"]. The
    optimizer's step does not multiply again. A scheduler that sets rates to absolute values
    therefore removes the multipliers.

    Args:
        params: a model (its trainable parameters), or parameters or groups with `model=`.
        lr: the base rate, per step, tuned at `tuned_at`. A recipe has its own.
        model: as for `RankAwareOptimizer`.
        law: a law or its name.
        tuned_at: the configuration of `lr`, as for `RankAwareOptimizer`.
        recipe: as for `RankAwareOptimizer`.
        optimizer_class: the optimizer that gets the groups, by default AdamW. It decides the form
            of the law.
        settings: its settings. Muon's adjust_lr_fn and Adafactor's scale_parameter change the law's
            form.
        named: whether groups contain parameter names. ZeroRedundancyOptimizer needs False.
        method: "lora", or "full" for full finetuning of a model without adapters.
        init: as for `RankAwareOptimizer`.
        rates: as for `RankAwareOptimizer`.
        other_lr: as for `RankAwareOptimizer`.
        batch: as for `RankAwareOptimizer`.
        steps: as for `RankAwareOptimizer`.

    Raises:
        OptimizerError: the parameters or a rate cannot be used, or the optimizer would not train
            at the groups' rates.
        InspectionError: the adapters cannot be read.
        LawError: the law cannot be used.
        RecipeError: the recipe cannot be read, or has no rate for this model.

    >>> import torch
    >>> pair, linear = torch.nn.Module(), torch.nn.Linear
    >>> pair.lora_A, pair.lora_B = linear(64, 8, bias=False), linear(8, 64, bias=False)
    >>> pair.r, pair.scaling = 8, 1.0
    >>> _ = torch.nn.init.zeros_(pair.lora_B.weight)
    >>> groups = rank_aware_param_groups(pair, lr=1e-3, tuned_at="r=32,alpha=32")
    >>> [(g["lora_role"], round(g["lr"], 5)) for g in groups]
    [('A', 0.00222), ('B', 0.00222)]
    """
    params = as_one_model(params)
    holder = params if model is None else as_one_model(model)
    native = AdamW if optimizer_class is None else optimizer_class
    refuse_one_rate(native)
    source = read_source(recipe, law, tuned_at, plain_lr(lr), batch, steps)
    if recipe is None:
        check_lr(lr)
    wrapped = Wrapped(native, None, settings or {})
    explicit = Explicit(dict(rates or {}), other_lr)
    prepared, splits = prepare(params, holder, wrapped, source, explicit, method, init)
    groups = []
    for split_group in splits:
        for part in split_group.parts:
            group, assigned = dict(part.group), part.assigned
            part.settle(group.get("lr", prepared.assigner.source.lr))
            group["lr"] = part.base * part.multiplier
            for key in ("initial_lr", "max_lr", "min_lr"):
                if group.get(key) is not None:
                    group[key] = group[key] * part.multiplier
            group.pop("param_names", None)
            if named:
                names = split_group.names_of(part)
                group["params"] = list(zip(names, group["params"], strict=True))
            group |= {"lora_role": assigned.role, "lora_rank": assigned.rank}
            groups.append({**group, MULTIPLIED: part.multiplier})
    return groups
