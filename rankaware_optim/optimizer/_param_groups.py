"""Parameter groups: a plan splits the user's parameters into named, ordered groups.

A group has `lr` (the base rate), `rank_multiplier` and the plain scalars `pinned_lr`, `lora_role`,
`lora_rank`, `lora_scale` and `lora_init`, so that checkpoints can be loaded with weights_only=True.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from .._checks import check_lr, plain_lr
from .._optimizers import optimizer_family
from .._rate import Rate
from .._types import Init, Method, Survey
from .._warn import warn
from ..errors import OptimizerError, RankAwareError
from ..inspection import ReferenceLike, Walk, as_reference, survey_of, walk
from ..laws import DEFAULT_LAW, Law, caution_of
from ._plan import Assignment, Plan, PlanOptions, make_plan

# in format 1 rates were multiplied, and "rank_multiplier" was called "lr_multiplier"
GROUP_FORMAT = 2
# Keys of our groups besides torch's. Their values are plain scalars, so that checkpoints load with
# weights_only=True.
TAGS = (
    "rank_multiplier",
    "pinned_lr",
    "lora_role",
    "lora_rank",
    "lora_scale",
    "lora_init",
    "user_group",
    "rankaware_format",
    "param_shapes",
    "rankaware_recipe",
    "rankaware_lr",
)
# Keys that record what `multiply_for_native` changed.
MADE_NATIVE = ("rank_multiplied", "rank_divided_decay")
# A group's rate, and those between which schedulers move it.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
# torch's optimizers that add the decay to the gradient and normalize the sum, unless their group
# says otherwise.
_L2 = (
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
)
_OF_LR = "the base rate: our step multiplies it, to_plain_state_dict(opt) is for native optimizers"


def model_of(params: Any, model: nn.Module | None) -> nn.Module:
    """Return the model that holds the adapters: `model`, by default `params`."""
    found = params if model is None else model
    if not isinstance(found, nn.Module):
        raise OptimizerError(
            "LoRA factors cannot be found from parameters alone.",
            "Give the model as the first argument, or as model= with parameters or an optimizer.",
        )
    return found


class UserGroup(NamedTuple):
    """One of the user's groups: its named parameters and its options, without `params`."""

    named: list[tuple[str, torch.Tensor]]
    options: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.named)

    def without(self, option: str) -> UserGroup:
        """Return the group without one of its options."""
        return self._replace(
            options={key: value for key, value in self.options.items() if key != option}
        )


def user_groups(
    params: Any, model: nn.Module, walked: Walk, first: int = 0, *, outside: bool = False
) -> list[UserGroup]:
    """Return the user's parameters as named groups.

    Args:
        params: a model (its trainable parameters), parameters, named parameters, or dicts of them.
        model: the model that holds the adapters.
        walked: the model's parameters.
        first: number of the first group.
        outside: whether it is allowed that no parameter belongs to the model.

    Raises:
        OptimizerError: a parameter is listed twice, there is none, or none belongs to the model.
    """
    if isinstance(params, nn.Module):
        own = walked if params is model else walk(params)
        params = [p for _, p in own.parameters if p.requires_grad]
    entries = [params] if isinstance(params, torch.Tensor) else list(params)
    dicts: list[Any] = (
        entries if entries and isinstance(entries[0], Mapping) else [{"params": entries}]
    )
    names = {id(p): name for name, p in walked.parameters}
    taken = set(names.values())
    groups = [_user_group(group, number, names, taken) for number, group in enumerate(dicts, first)]
    seen: set[int] = set()
    for name, param in (pair for group in groups for pair in group.named):
        if id(param) in seen:
            raise OptimizerError(
                f"The parameter {name} is listed twice.", "List every parameter in one group only."
            )
        seen.add(id(param))
    if not seen:
        raise OptimizerError(
            "There is no trainable parameter to optimize.",
            "Set requires_grad on what should be trained.",
        )
    if seen.isdisjoint(names) and not outside:
        raise OptimizerError(
            f"None of the {len(seen)} parameters given belongs to the model.",
            "Give the model that these parameters belong to as model=.",
        )
    return groups


def _user_group(
    group: Mapping[str, Any], number: int, names: Mapping[int, str], taken: set[str]
) -> UserGroup:
    group = own_settings(group)
    listed = (
        [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
    )
    given = list(group.get("param_names") or [None] * len(listed))
    if "lr" in group:
        check_lr(group["lr"], "A parameter group's lr")
    named: list[tuple[str, torch.Tensor]] = []
    for entry, given_name in zip(listed, given, strict=True):
        name, param = entry if isinstance(entry, tuple) else (given_name, entry)
        if not isinstance(param, torch.Tensor):
            raise OptimizerError(
                f"A parameter group holds a {type(param).__name__}.",
                "Give tensors, (name, tensor) pairs, or dicts.",
            )
        if id(param) not in names and (
            name is None or name in taken
        ):  # not in the model, so not named as one of it
            name = f"group{number}.{name or 'unnamed'}.{len(named)}"
        named.append((names.get(id(param), name), param))
    return UserGroup(
        named, {k: plain_lr(v) for k, v in group.items() if k not in ("params", "param_names")}
    )


def own_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group without the keys that this package wrote, and at its base rate."""
    ours = "rankaware_format" in group
    clash = next((key for key in TAGS if key in group), None)
    if clash is not None and not ours:
        raise OptimizerError(
            f"A parameter group has the key {clash!r}, which this package uses.",
            "Rename your key.",
        )
    made = {key: value for key, value in group.items() if key not in (*TAGS, *MADE_NATIVE)}
    return made | at_base_rate(group)


class PlannedGroup(NamedTuple):
    """A group to build: parameters of one user group that share an assignment, with that user
    group's options.
    """

    assignment: Assignment
    named: list[tuple[str, torch.Tensor]]
    options: dict[str, Any]
    user_group: int = 0
    recipe_tag: str = ""

    def as_dict(self, *, named: bool = True) -> dict[str, Any]:
        """Return the group for torch, with the user's lr."""
        params = [p for _, p in self.named]
        a = self.assignment
        decided = (a.multiplier, a.rate, a.role, a.rank, a.scaling, a.init)
        values = (
            *decided,
            self.user_group,
            GROUP_FORMAT,
            shapes_text(params),
            self.recipe_tag,
            _OF_LR,
        )
        tags = dict(zip(TAGS, values, strict=True))
        return {"params": list(self.named) if named else params, **self.options, **tags}


def shapes_text(params: Iterable[torch.Tensor]) -> str:
    """Return shapes as one string, such as "8x64 64x8". A checkpoint stores it to identify its
    state.
    """
    return " ".join("x".join(map(str, p.shape)) for p in params)


def split(
    groups: Iterable[UserGroup], plan: Plan, survey: Survey, first: int = 0
) -> list[PlannedGroup]:
    """Split each user group by assignment, in the user's order. They are never merged. `first` is
    the first number.
    """
    factors = {f.name: f for f in survey.factors}
    planned: list[PlannedGroup] = []
    tag = "" if plan.recipe is None else plan.recipe.tag
    for number, group in enumerate(groups, first):
        cut: dict[Assignment, PlannedGroup] = {}
        listed = [
            k
            for k, v in group.options.items()
            if isinstance(v, list) and len(v) == len(group.named) > 1
        ]
        for position, (name, param) in enumerate(group.named):
            own_lr, trains = "lr" in group.options, param.requires_grad
            assignment = plan.assign(name, factors.get(name), own_lr=own_lr, trains=trains)
            options = {**group.options, **{key: [] for key in listed}}
            part = cut.setdefault(assignment, PlannedGroup(assignment, [], options, number, tag))
            part.named.append((name, param))
            for key in (
                listed
            ):  # one value per parameter, as in PEFT's LoRA-FA and some of pytorch_optimizer
                part.options[key].append(group.options[key][position])
        planned.extend(cut.values())
    moved = [part for part in planned if part.assignment.rate is None]
    far = next((part for part in moved if caution_of(part.assignment.multiplier)), None)
    if far is not None:
        warn(f"{far.named[0][0]}: {caution_of(far.assignment.multiplier)}")
    return planned


def set_rate(group: dict[str, Any]) -> None:
    """Turn an explicit rate into a ratio to the group's base rate, so that schedulers scale it.
    Check the product.

    A tensor rate is copied, so that a loop that scales every group's in place scales each once.
    """
    if isinstance(group["lr"], torch.Tensor):
        group["lr"] = group["lr"].clone()
    if group["pinned_lr"] is not None:
        group["rank_multiplier"] = group["pinned_lr"] / float(group["lr"])
    check_product(group)


def base_of(group: Mapping[str, Any]) -> Any:
    """Return the rate from which a group's schedule starts, or its rate."""
    return group.get("initial_lr", group["lr"])


def check_product(group: Mapping[str, Any], error: type[RankAwareError] = OptimizerError) -> None:
    """Raise if the base rate times the multiplier, in the base rate's dtype, is 0 or infinite."""
    base, multiplier = group["lr"], group["rank_multiplier"]
    rate = float(base * multiplier)
    if float(base) and not 0 < rate < math.inf:
        raise error(
            f"The base rate {base!r} times the multiplier {multiplier:.3g} of a group is {rate}.",
            "Give a rate whose product is a positive finite number. A tensor should be float32.",
        )


def effective_lr(group: Mapping[str, Any]) -> float:
    """Return the rate that a group trains at: base rate × multiplier, or the lr of a native
    optimizer's group.
    """
    multiplied = group.get("rank_multiplied", False)
    return float(group["lr"]) * (1.0 if multiplied else group.get("rank_multiplier", 1.0))


def multiply_for_native(group: dict[str, Any], keep_decay: bool = False) -> None:
    """Multiply a group's rates once, for an optimizer with torch's own step, and record it in the
    group.

    The record stays in the states of that optimizer, so that a load by `RankAwareOptimizer` does
    not multiply again.

    With keep_decay, the shrinkage lr × weight_decay is kept by dividing weight_decay.
    """
    group |= {
        key: group[key] * group["rank_multiplier"] for key in _RATES if group.get(key) is not None
    }
    group["rank_multiplied"] = True
    group.pop("rankaware_lr", None)
    if keep_decay:
        group["weight_decay"], group["rank_divided_decay"] = (
            group["weight_decay"] / group["rank_multiplier"],
            True,
        )


def at_base_rate(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a group that `multiply_for_native` changed as they were; empty if it
    changed nothing.
    """
    if not group.get("rank_multiplied"):
        return {}
    made = {
        key: group[key] / group["rank_multiplier"] for key in _RATES if group.get(key) is not None
    }
    if group.get("rank_divided_decay"):
        made["weight_decay"] = group["weight_decay"] * group["rank_multiplier"]
    return made


def shrinks_by_decay(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Return whether a step shrinks the parameters of a group by lr × weight_decay, as AdamW and
    SGD do.

    An L2 decay is part of the gradient. Where a step normalizes the gradient, as Adam does, the
    rate does not change the decay's share of it. A fixed decay is not multiplied by the rate.
    """
    if "weight_decay" not in group or _setting(optimizer, group, "fixed_decay"):
        return False
    decoupled = _setting(optimizer, group, "decoupled_weight_decay")
    if decoupled is None:
        decoupled = _setting(optimizer, group, "weight_decouple")
    if decoupled is None:
        return not isinstance(optimizer, _L2)
    return bool(decoupled) or optimizer_family(type(optimizer)) == "gradient-like"


def _setting(optimizer: Optimizer, group: Mapping[str, Any], name: str) -> Any:
    """Return a setting of a group, or of the optimizer where its class has one for all groups; else
    None.
    """
    return group.get(name, getattr(optimizer, name, getattr(optimizer, f"_{name}", None)))


def rank_aware_param_groups(
    params: Any,
    *,
    lr: float | Rate,
    model: nn.Module | None = None,
    law: str | Law = DEFAULT_LAW,
    tuned_at: ReferenceLike | None = None,
    optimizer_class: type | None = None,
    settings: Mapping[str, Any] | None = None,
    named: bool = True,
    method: Method = "lora",
    init: Init | None = None,
    rates: Mapping[str, float | Rate] | None = None,
    other_lr: float | Rate | None = None,
    per_layer_width: bool = False,
    batch: float | None = None,
    strict: bool = False,
) -> list[dict[str, Any]]:
    """Return parameter groups with their rates, for any torch optimizer without the wrapper.

    group["lr"] is the user group's lr, or `lr`, times group["rank_multiplier"]. The optimizer's
    step does not multiply again. A scheduler that sets rates to absolute values therefore removes
    the multipliers.

    Args:
        params: a model (its trainable parameters), or parameters or groups with `model=`.
        lr: the base rate, per step, tuned at `tuned_at`.
        model: the model that holds the adapters, if it is not `params`.
        law: a law or its name.
        tuned_at: the configuration of `lr`, as for `RankAwareOptimizer`.
        optimizer_class: the optimizer that gets the groups. It decides the form of the law.
        settings: its settings. Muon's adjust_lr_fn and Adafactor's scale_parameter change the law's
            form.
        named: whether groups contain parameter names. ZeroRedundancyOptimizer needs False.
        method: "lora", or "full" for full finetuning of a model without adapters.
        init: as for `RankAwareOptimizer`.
        rates: as for `RankAwareOptimizer`.
        other_lr: as for `RankAwareOptimizer`.
        per_layer_width: as for `RankAwareOptimizer`.
        batch: as for `RankAwareOptimizer`.
        strict: as for `RankAwareOptimizer`.

    Raises:
        OptimizerError: the parameters or a rate cannot be used.
        InspectionError: the adapters cannot be read.
        LawError: the law cannot be used.

    >>> pair = torch.nn.Module()
    >>> pair.lora_A, pair.lora_B = torch.nn.Linear(64, 8, bias=False), torch.nn.Linear(8, 64, bias=False)
    >>> pair.r, pair.scaling = 8, 1.0
    >>> _ = torch.nn.init.zeros_(pair.lora_B.weight)
    >>> groups = rank_aware_param_groups(pair, lr=1e-3, tuned_at="r=32,alpha=32")
    >>> [(g["lora_role"], round(g["lr"], 5)) for g in groups]
    [('A', 0.00206), ('B', 0.00206)]
    """
    model = model_of(params, model)
    check_lr(lr)
    reference = None if tuned_at is None else as_reference(tuned_at)
    options = PlanOptions(
        law, reference, dict(rates or {}), other_lr, per_layer_width, batch, strict
    )
    walked = walk(model)
    survey = survey_of(walked, method=method, init=init)
    plan = make_plan(survey, options, optimizer_class, settings)
    groups = []
    for planned in split(user_groups(params, model, walked), plan, survey):
        group = {"lr": plain_lr(lr), **planned.as_dict(named=named)}
        set_rate(group)
        multiply_for_native(group)
        groups.append(group)
    return groups
