"""Parameter groups: a plan splits the user's parameters into named, ordered groups.

A group has `lr` (the base rate) and plain scalars, its `TAGS`, so that checkpoints can be loaded
with weights_only=True.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from .._checks import check_lr, plain_lr
from .._types import Factor, Survey
from .._warn import warn
from ..errors import OptimizerError, RankAwareError
from ..inspection import (
    Walk,
    refuse_frozen,
    walk,
)
from ..laws import caution_of
from ._plan import Label, Plan, PlanOptions, Rule, Settings

Group = dict[str, Any]
Groups = Sequence[Group]
Native = type[Optimizer]  # the class that is wrapped
Shape = tuple[int, ...]
State = Mapping[Any, Any]

GROUP_FORMAT = 1
# Keys of our groups besides torch's.
TAGS = (
    *Label._fields,
    "user_group",
    "rankaware_format",
    "param_shapes",
    "rankaware_recipe",
    "rankaware_lr",
)
# A group's rate, and those between which schedulers move it.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_OF_LR = "the base rate: our step multiplies it, to_plain_state_dict(opt) is for native optimizers"


class Models(nn.ModuleList):
    """Several models that one optimizer trains. A name begins with the number of its model."""


def together(model: Any) -> Any:
    """Return several models as one; anything else as it is."""
    listed = isinstance(model, (list, tuple)) and len(model) > 0
    if listed and all(isinstance(each, nn.Module) for each in model):
        return Models(model)
    return model


def model_of(params: Any, model: Any) -> nn.Module:
    """Return the model that holds the adapters: `model`, by default `params`."""
    holder = params if model is None else together(model)
    is_trainer = hasattr(holder, "args") or hasattr(holder, "train")
    if hasattr(holder, "model") and is_trainer and not isinstance(holder, nn.Module):
        raise OptimizerError(
            f"A {type(holder).__name__} is a trainer, not a model.",
            "Call rankaware_optim.integrations.attach(trainer, AdamW, ...) with the same settings.",
        )
    if isinstance(holder, (str, type)):
        raise OptimizerError(
            "The model and the optimizer's class are swapped.",
            "Give the model first: RankAwareOptimizer(model, AdamW, ...).",
        )
    if not isinstance(holder, nn.Module):
        raise OptimizerError(
            "LoRA factors cannot be found from parameters alone.",
            "Give the model as the first argument, or as model= with parameters or an optimizer.",
        )
    return holder


def named_params(groups: Iterable[Group]) -> list[tuple[str, Any]]:
    """Return names and parameters of built groups, or names and keys of a state's groups."""
    return [
        pair
        for group in groups
        for pair in zip(group.get("param_names", ()), group["params"], strict=False)
    ]


def params_in(groups: Iterable[Group]) -> list[Any]:
    """Return the parameters of groups, or the keys of a state's groups."""
    return [param for group in groups for param in group["params"]]


def without(group: Settings, keys: Collection[str]) -> Group:
    """Return a copy of a group without some of its keys."""
    return {key: value for key, value in group.items() if key not in keys}


def settings_in(group: Group) -> Group:
    """Return the settings of a group: neither its parameters nor our tags."""
    return without(group, (*TAGS, "params", "param_names"))


class UserGroup(NamedTuple):
    """One of the user's groups: its named parameters and its options, without `params`."""

    named: list[tuple[str, torch.Tensor]]
    options: Group

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.named)

    def options_at(self, positions: Sequence[int]) -> Group:
        """Return the options for some of the parameters.

        PEFT's LoRA-FA and some of pytorch_optimizer have options with a value for each parameter.
        """
        options = dict(self.options)
        for key, value in options.items():
            if isinstance(value, list) and len(value) == len(self.named) > 1:
                options[key] = [value[position] for position in positions]
        return options


def user_groups(
    params: Any,
    model: nn.Module,
    walked: Walk,
    first: int = 0,
    *,
    outside: bool = False,
) -> list[UserGroup]:
    """Return the user's parameters as named groups.

    Args:
        params: a model (its trainable parameters), parameters, named parameters, or dicts of them.
        model: the model that holds the adapters.
        walked: the model's parameters.
        first: number of the first group.
        outside: whether it is allowed that no parameter belongs to the model.

    Raises:
        InspectionError: there is no parameter, and the model's LoRA factors are frozen.
        OptimizerError: a parameter is listed twice, there is none, or none belongs to the model.
    """
    names: dict[Any, str] = {p: name for name, p in walked.parameters}
    taken, dicts = set(names.values()), _dicts(params, model, walked)
    groups: list[UserGroup] = []
    seen: set[torch.Tensor] = set()
    for number, given in enumerate(dicts, first):
        options = own_settings(given)
        check_lr(options.get("lr", 1.0), "A parameter group's lr")
        named = list(_named(options, names, taken, number))
        for name, param in named:
            if param in seen:
                raise OptimizerError(
                    f"The parameter {name} is listed twice.",
                    "List every parameter in one group only.",
                )
            seen.add(param)
        options = {key: plain_lr(value) for key, value in options.items()}
        groups.append(UserGroup(named, options))
    if not seen:
        refuse_frozen(walked)
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


def _dicts(params: Any, model: nn.Module, walked: Walk) -> list[Any]:
    """Return the user's parameters as torch's list of dicts."""
    if isinstance(params, nn.Module):
        parameters = (walked if params is model else walk(params)).parameters
        params = [p for _, p in parameters if p.requires_grad]
    entries = _listed(params)
    is_of_dicts = bool(entries) and isinstance(entries[0], Mapping)
    return entries if is_of_dicts else [{"params": entries}]


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


def _named(
    options: Group, names: Mapping[Any, str], taken: Collection[str], number: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Take a group's parameters out of it, each by its name in the model, or one of its own."""
    entries = _listed(options.pop("params"))
    labels = options.pop("param_names", None) or [None] * len(entries)
    for place, (entry, label) in enumerate(zip(entries, labels, strict=True)):
        name, param = entry if isinstance(entry, tuple) else (label, entry)
        if not isinstance(param, torch.Tensor):
            raise OptimizerError(
                f"A parameter group holds a {type(param).__name__}.",
                "Give tensors, (name, tensor) pairs, or dicts.",
            )
        if name is None or name in taken:
            name = f"group{number}.{name or 'unnamed'}.{place}"
        yield names.get(param, name), param


def refuse_outside(
    groups: Iterable[UserGroup], walked: Walk, options: PlanOptions, built: bool = False
) -> None:
    """Raise for a listed parameter that no model given holds, unless a rate is given for it.

    It may be an adapter's, whose rank would move nothing. built: whether the groups are those of a
    built optimizer, all of which have a rate.
    """
    held = {p for _, p in walked.parameters}
    for group in groups:
        if options.other_lr is not None or ("lr" in group.options and not built):
            continue
        for name, param in group.named:
            if param not in held and options.rate_of(name) is None:
                raise OptimizerError(
                    f"The parameter {name} of shape {tuple(param.shape)} belongs to no model given,"
                    " so its rank is unknown and its rate would not move.",
                    "Give all models, as model=[unet, text_encoder], or a rate for it: lr in its"
                    " group, or other_lr=.",
                )


def own_settings(group: Settings) -> Group:
    """Return a group without the keys that this package wrote, and at its base rate."""
    clash = next((key for key in TAGS if key in group), None)
    if clash is not None and "rankaware_format" not in group:
        raise OptimizerError(
            f"A parameter group has the key {clash!r}, which this package uses.",
            "Rename your key.",
        )
    return without(at_base_rate(group), TAGS)


def split(
    groups: Iterable[UserGroup],
    plan: Plan,
    survey: Survey,
    first: int = 0,
    state: Mapping[Any, Any] | None = None,
) -> list[Group]:
    """Label every parameter, and split each user group by label, in the user's order. Groups are
    never merged.

    Args:
        groups: the user's groups.
        plan: the plan of the model.
        survey: the model's, with the factors that do not train yet.
        first: number of the first group.
        state: the state of a built optimizer. Some mark there which parameters Muon gets.

    Returns:
        Groups for torch, of (name, parameter) pairs, with tags and the user's own rate if any.
    """
    factors = {f.name: f for f in survey.factors}
    parts: list[Group] = []
    for number, group in enumerate(groups, first):
        positions: dict[Any, list[int]] = {}
        labels = _labels(group, plan, factors, state or {})
        for position, label in enumerate(labels):
            positions.setdefault(label, []).append(position)
        for (label, marks), at in positions.items():
            options = {**group.options_at(at), **dict(marks)}
            tags = {**label._asdict(), "user_group": number}
            pairs = [group.named[position] for position in at]
            parts.append({"params": pairs, **options, **tags, **_record(pairs, plan)})
    for part in parts:
        caution = caution_of(part["rank_multiplier"])
        if caution and part["pinned_lr"] is None:
            warn(f"{part['params'][0][0]}: {caution}")
            break
    return parts


def _labels(
    group: UserGroup,
    plan: Plan,
    factors: Mapping[str, Factor],
    state: Mapping[Any, Any],
) -> Iterator[tuple[Label, tuple[tuple[str, Any], ...]]]:
    """Yield each parameter's label, and the settings by which its state decides its family."""
    switches = sorted({switch.setting for switch in plan.known.switches})
    own_lr = "lr" in group.options
    rules: dict[Any, Rule] = {}
    for name, param in group.named:
        moments = state.get(param, {})
        marks = tuple((key, moments[key]) for key in switches if key in moments)
        settings = {**group.options, **dict(marks)}
        to_adam = plan.goes_to_adam(settings, param.shape)
        if (to_adam, marks) not in rules:
            rules[to_adam, marks] = plan.rule_for(settings, to_adam)
        rule, factor = rules[to_adam, marks], factors.get(name)
        trains = param.requires_grad
        yield plan.label(name, factor, rule, own_lr=own_lr, trains=trains), marks


def _record(pairs: Iterable[tuple[str, torch.Tensor]], plan: Plan) -> Group:
    """Return the tags by which a load and a reader of the state know a group."""
    return {
        "rankaware_format": GROUP_FORMAT,
        # "8x64 64x8": by it a load identifies the state
        "param_shapes": " ".join("x".join(map(str, p.shape)) for _, p in pairs),
        "rankaware_recipe": "" if plan.use is None else plan.use.recipe.tag,
        "rankaware_lr": _OF_LR,
    }


def rated(part: Group, lr: Any, named: bool) -> Group:
    """Return a group of `split` at its own rate or `lr`, with the parameters' names if `named`."""
    group = {"lr": lr, **part}
    if not named:
        group["params"] = [param for _, param in part["params"]]
    set_rate(group)
    return group


def set_rate(group: Group) -> None:
    """Turn an explicit rate into a ratio to the group's base rate, so that schedulers scale it.
    Check the product.

    A tensor rate is copied, so that a loop that scales every group's in place scales each once.
    """
    if isinstance(group["lr"], torch.Tensor):
        group["lr"] = group["lr"].clone()
    if group["pinned_lr"] is not None:
        group["rank_multiplier"] = group["pinned_lr"] / float(group["lr"])
    check_product(group)


def base_of(group: Group) -> Any:
    """Return the rate from which a group's schedule starts, or its rate."""
    return group.get("initial_lr", group["lr"])


def check_product(group: Group, error: type[RankAwareError] = OptimizerError) -> None:
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
    multiplied = group.get("rank_multiplied")
    multiplier = 1.0 if multiplied else float(group.get("rank_multiplier", 1))
    return float(group["lr"]) * multiplier


def multiply_for_native(group: Group) -> None:
    """Multiply a group's rates once, for an optimizer with torch's own step, and record it in the
    group.

    The record stays in the states of that optimizer, so that a load by `RankAwareOptimizer` does
    not multiply again.
    """
    multiplier = group["rank_multiplier"]
    for key in _RATES:
        if group.get(key) is not None:
            group[key] = group[key] * multiplier
    group["rank_multiplied"] = True
    group.pop("rankaware_lr", None)


def at_base_rate(group: Settings) -> Group:
    """Return a group as it was before `multiply_for_native`, without the record of it."""
    base = without(group, ("rank_multiplied",))
    if not group.get("rank_multiplied"):
        return base
    for key in _RATES:
        if group.get(key) is not None:
            base[key] = group[key] / group["rank_multiplier"]
    return base
