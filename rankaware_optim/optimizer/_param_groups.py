"""Groups: a survey, a law and a base rate become merged, named, ordered parameter groups.

`Plan` decides for every parameter by name; the functions below it cut the user's groups accordingly. A group holds
`lr`, `lr_multiplier` and the plain scalars `lora_role`, `lora_rank`, `lora_scale`, `lora_init`, so that checkpoints
stay loadable with weights_only=True.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from .._checks import check_lr, plain_lr
from .._rate import Rate
from .._types import Factor, Init, Method, Reference, Survey
from ..errors import OptimizerError, RankAwareWarning
from ..inspection import Walk, survey_of, walk
from ..laws import DEFAULT_LAW, Law, checked_multiplier, get_law, known_family, optimizer_family

__all__ = ["Assignment", "Plan", "rank_aware_param_groups"]

GROUP_FORMAT = 1
# What our groups hold beside torch's own keys: plain scalars, so that checkpoints load with weights_only=True.
TAGS = (
    "lr_multiplier",
    "lora_role",
    "lora_rank",
    "lora_scale",
    "lora_init",
    "user_group",
    "rankaware_format",
    "param_shapes",
    "rankaware_recipe",
)


class Assignment(NamedTuple):
    """What is decided for one parameter. Parameters of equal assignment share a group.

    `multiplier` is of the base rate, dimensionless; `rate` replaces the product by a rate of its own.
    """

    role: str = "other"
    rank: int | None = None
    scaling: float = 1.0
    init: str | None = None
    multiplier: float = 1.0
    rate: float | None = None


@dataclass(frozen=True)
class Plan:
    """Law, resolved reference and the user's exceptions: from a factor or a name to an `Assignment`.

    rates: learning rates by name pattern (fnmatch), for any parameter. other_lr: the rate of every other parameter.
    per_layer_width: give the law each layer's own fan-in in place of the model's. across_inits: let the law carry
    the rate from the reference's init to another. batch_multiplier: what another batch than the reference's multiplies
    every rate by, other parameters' too. recipe: the tag of the recipe that the base rate is from, or "".
    """

    law: Law
    reference: Reference
    method: Method = "lora"
    width: float = 1.0
    rates: tuple[tuple[str, float], ...] = ()
    other_lr: float | None = None
    per_layer_width: bool = False
    across_inits: bool = False
    batch_multiplier: float = 1.0
    notes: tuple[str, ...] = ()
    recipe: str = ""

    def assign(self, name: str, factor: Factor | None) -> Assignment:
        """The assignment of the parameter `name`, which is `factor` or, where that is None, an other one."""
        pinned = _pinned(name, self.rates)
        if factor is None:
            rate = self.other_lr if pinned is None else pinned
            moved = self.multiplier(self._whole()) if self.method == "full" else 1.0
            return Assignment(multiplier=1.0 if rate is not None else moved * self.batch_multiplier, rate=rate)
        moved = 1.0 if pinned is not None else self.multiplier(factor) * self.batch_multiplier
        return Assignment(factor.role, factor.rank, factor.scaling, factor.init, moved, pinned)

    def has_own_rate(self, group: Mapping[str, Any]) -> bool:
        """Whether a built group has a rate of its own, by `rates` or `other_lr`."""
        return self.is_named(group) or (group.get("lora_role") == "other" and self.other_lr is not None)

    def base_of(self, groups: Sequence[Mapping[str, Any]]) -> float | None:
        """The base rate of built groups, before any scheduler; None where every rate is a group's own, or is 0."""
        scaled = next((group for group in groups if not self.has_own_rate(group)), None)
        rate = 0.0 if scaled is None else float(scaled.get("initial_lr", scaled["lr"])) / scaled["lr_multiplier"]
        return rate if rate > 0 else None

    def is_named(self, group: Mapping[str, Any]) -> bool:
        """Whether a pattern of `rates` names a built group's parameters."""
        return any(_pinned(name, self.rates) is not None for name in group.get("param_names", ())[:1])

    def multiplier(self, factor: Factor) -> float:
        """The law's answer for `factor`, seen at the model's width and along its own init's law.

        Factors with neither half zero keep the base rate. An embedding's input is one-hot, so its width is 1 and its
        rate moves along its own init's law alone; from a full-finetuning rate, where that has no start, not at all.
        """
        if factor.role == "full":
            seen = factor if self.per_layer_width else replace(factor, fan_in=self.width)
            return checked_multiplier(self.law, seen, self.reference)
        embedding = factor.kind == "embedding"
        if factor.init == "other" or (embedding and self.reference.method == "full"):
            return 1.0
        width = 1.0 if embedding else factor.fan_in if self.per_layer_width else self.width
        seen = replace(factor, fan_in=width, init="B" if factor.init == "B" else "A")
        return checked_multiplier(self.law, seen, self._reference_for(seen, embedding))

    def _reference_for(self, seen: Factor, embedding: bool) -> Reference:
        reference = self.reference
        own = seen.init == reference.init or self.across_inits
        if not embedding and (own or reference.method == "full"):
            return reference
        fan_in = 1.0 if embedding else reference.fan_in
        return replace(reference, init="B" if seen.init == "B" else "A", fan_in=fan_in)

    def _whole(self) -> Factor:
        return Factor("other parameters", "full", None, self.width, self.width)


def make_plan(
    survey: Survey,
    *,
    law: str | Law = DEFAULT_LAW,
    tuned_at: Reference | None = None,
    optimizer_class: type | None = None,
    settings: Mapping[str, Any] | None = None,
    rates: Mapping[str, float | Rate] | None = None,
    other_lr: float | Rate | None = None,
    per_layer_width: bool = False,
    across_inits: bool = False,
    batch: float | None = None,
    strict: bool = False,
    notes: tuple[str, ...] = (),
    recipe: str = "",
) -> Plan:
    """Bind the law, resolve the reference and check the user's exceptions, before anything is built."""
    method: Method = "full" if any(f.role == "full" for f in survey.factors) else "lora"
    pairs = tuple((pattern, plain_lr(rate)) for pattern, rate in (rates or {}).items())
    moved = replace(survey, factors=tuple(f for f in survey.factors if _pinned(f.name, pairs) is None))
    fallback = survey.dominant() if survey.factors else Reference(method="full")  # no pair: nothing will be moved
    reference = (tuned_at or fallback).resolve(moved)
    names = [*(f.name for f in survey.factors), *survey.other]
    for pattern, rate in pairs:
        check_lr(rate, f"rates[{pattern!r}]")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OptimizerError(
                f"The pattern {pattern!r} of rates= matches none of {len(names)} trainable parameters.",
                f"Patterns are those of fnmatch on full names, such as {names[-1]!r}.",
            )
    if other_lr is not None:
        check_lr(other_lr, "other_lr")
    bound = get_law(law)
    if optimizer_class is not None:
        if strict:
            known_family(optimizer_class, settings)
        bound = bound.bind(optimizer_class, settings or {})
    by_batch = _batch_multiplier(bound, reference, batch)
    return Plan(
        law=bound,
        reference=reference,
        method=method,
        width=moved.full_width(reference.init) if method == "full" else moved.width,
        rates=pairs,
        other_lr=plain_lr(other_lr),
        per_layer_width=per_layer_width,
        across_inits=across_inits,
        batch_multiplier=by_batch,
        notes=(
            *survey.notes,
            *notes,
            *_notes(survey, reference, bound, method, optimizer_class, settings, across_inits),
            *_batch_notes(reference, batch, by_batch),
        ),
        recipe=recipe,
    )


def _batch_multiplier(law: Law, reference: Reference, batch: float | None) -> float:
    """The law's rule for the batch, where the reference and this run both name theirs; else 1."""
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, (int, float)) or not 0 < batch < 2**63):
        raise OptimizerError(f"batch is {batch!r}.", "Give a positive number, or leave it out.")
    return 1.0 if batch is None or reference.batch is None else law.batch_multiplier(batch / reference.batch)


def _batch_notes(reference: Reference, batch: float | None, moved: float) -> list[str]:
    if batch is not None and reference.batch is None:
        return ["The reference names no batch, so this run's moves no rate: tuned_at=Reference(..., batch=...)."]
    if moved == 1.0:
        return []
    return [f"From batch {reference.batch:g} to {batch:g} every rate is multiplied by {moved:.3g}, a rule of thumb."]


def _pinned(name: str, rates: Iterable[tuple[str, float]]) -> float | None:
    """The rate of the first pattern that matches `name`, or None."""
    return next((rate for pattern, rate in rates if fnmatchcase(name, pattern)), None)


def _notes(
    survey: Survey,
    reference: Reference,
    law: Law,
    method: Method,
    optimizer_class: type | None,
    settings: Mapping[str, Any] | None,
    across_inits: bool,
) -> list[str]:
    notes = []
    inits = {f.init for f in survey.factors if f.role != "full"}
    if "other" in inits:
        notes.append(
            "Adapters with neither factor zero (PiSSA, OLoRA, LoRA-GA, or trained ones of undeclared init) stay at the "
            "base rate, since no law covers them: name their init by init='A' or 'B' if you know it."
        )
        warnings.warn(notes[-1], RankAwareWarning, stacklevel=4)
    if "unknown" in inits:
        notes.append("The init of some adapters could not be read; they count as Init[A].")
    others = {f.init for f in survey.factors if f.kind != "embedding"} & {"A", "B"} - {reference.init}
    crossing = method == "lora" and reference.method == "lora" and bool(others)
    if crossing and across_inits and law.falls_with_rank:
        notes.append(
            "Between the inits the law is a guess, from Init[A] to Init[B] up to three octaves too high in the study's "
            "domains: try a quarter of the rate too, or calibrate there."
        )
    if crossing and not across_inits:
        notes.append(
            f"Adapters at Init[{others.pop()}] are scaled along their own init's law from a rate tuned at "
            f"Init[{reference.init}]; across_inits=True lets the law carry the rate across."
        )
    if method == "full" and reference.method == "lora" and law.name != "power":
        notes.append(
            "From a LoRA rate alone the law's point for full finetuning is good to an octave or two, and too high "
            "costs more than too low: start at half of it, or calibrate with full runs."
        )
    family = "sign-like" if optimizer_class is None else optimizer_family(optimizer_class, settings)
    if family != "sign-like" and optimizer_class is not None and law.name != "constant":
        notes.append(f"{optimizer_class.__name__} {_family_words(family, law)}.")
    return notes


def _family_words(family: str, law: Law) -> str:
    if family == "unknown":
        return "is of an unknown family; it is scaled as a sign-like optimizer (Adam and kin)"
    inner = getattr(law, "law", law)
    if getattr(inner, "family", None) == family:
        return f"is {family}: µA's form for that family moves its rates, derived for square layers"
    return f"is {family}, which the law {law.name!r} does not know of"


# --- from the user's parameters to groups ---------------------------------------------------------------------------


class UserGroup(NamedTuple):
    """One of the user's groups: its named parameters and its options, without `params`."""

    named: list[tuple[str, torch.Tensor]]
    options: dict[str, Any]


def user_groups(params: Any, model: nn.Module, walked: Walk) -> list[UserGroup]:
    """The user's parameters as named groups: a model, parameters, named parameters, or dicts of them.

    A model stands for its trainable parameters. Raises OptimizerError where a parameter comes twice or none is the
    model's.
    """
    known = walked.parameters
    if isinstance(params, nn.Module):
        own = known if params is model else walk(params).parameters
        params = [p for _, p in own if p.requires_grad]
    entries = [params] if isinstance(params, torch.Tensor) else list(params)
    dicts: list[Any] = entries if entries and isinstance(entries[0], Mapping) else [{"params": entries}]
    names = {id(p): name for name, p in known}
    groups = [_user_group(group, names) for group in dicts]
    _check_parameters(groups, names)
    return [group for group in groups if group.named]


def _user_group(group: Mapping[str, Any], names: Mapping[int, str]) -> UserGroup:
    listed = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
    given = list(group.get("param_names") or [None] * len(listed))
    if "lr" in group:
        check_lr(group["lr"], "A parameter group's lr")
    named: list[tuple[str, torch.Tensor]] = []
    for entry, given_name in zip(listed, given, strict=True):
        name, param = entry if isinstance(entry, tuple) else (given_name, entry)
        if not isinstance(param, torch.Tensor):
            raise OptimizerError(
                f"A parameter group holds a {type(param).__name__}.", "Give tensors, (name, tensor) pairs, or dicts."
            )
        named.append((names.get(id(param)) or name or f"unnamed.{len(named)}", param))
    return UserGroup(named, {k: plain_lr(v) for k, v in group.items() if k not in ("params", "param_names")})


def _check_parameters(groups: Sequence[UserGroup], names: Mapping[int, str]) -> None:
    listed = [(name, id(param)) for group in groups for name, param in group.named]
    seen: set[int] = set()
    for name, key in listed:
        if key in seen:
            raise OptimizerError(f"The parameter {name} is listed twice.", "List every parameter in one group only.")
        seen.add(key)
    if not seen:
        raise OptimizerError(
            "There is no trainable parameter to optimize.", "Set requires_grad on what should be trained."
        )
    if seen.isdisjoint(names):
        raise OptimizerError(
            f"None of the {len(seen)} parameters given belongs to the model.",
            "Pass the model that these parameters come from as model=.",
        )


class PlannedGroup(NamedTuple):
    """A group to be built: parameters of one user group that share an assignment, with that user group's options."""

    assignment: Assignment
    named: list[tuple[str, torch.Tensor]]
    options: dict[str, Any]
    user_group: int = 0
    recipe: str = ""

    def as_dict(self, *, named: bool = True) -> dict[str, Any]:
        """The group for torch, its lr still the user's own."""
        params: list[Any] = list(self.named) if named else [p for _, p in self.named]
        a = self.assignment
        shapes = shapes_text(p for _, p in self.named)
        decided = (a.multiplier, a.role, a.rank, a.scaling, a.init)
        values = (*decided, self.user_group, GROUP_FORMAT, shapes, self.recipe)
        return {"params": params, **self.options, **dict(zip(TAGS, values, strict=True))}


def shapes_text(params: Iterable[torch.Tensor]) -> str:
    """Shapes as one plain string, "8x64 64x8": a checkpoint says by it what its state belongs to."""
    return " ".join("x".join(map(str, p.shape)) for p in params)


def split(groups: Iterable[UserGroup], plan: Plan, survey: Survey, first: int = 0) -> list[PlannedGroup]:
    """Cut each user group by assignment, never merging two of the user's; groups at the base rate come first.

    The user's groups are counted from `first`.
    """
    factors = {f.name: f for f in survey.factors}
    planned: list[PlannedGroup] = []
    for number, group in enumerate(groups, first):
        cut: dict[Assignment, PlannedGroup] = {}
        for name, param in group.named:
            assignment = plan.assign(name, factors.get(name))
            blank = PlannedGroup(assignment, [], dict(group.options), number, plan.recipe)
            cut.setdefault(assignment, blank).named.append((name, param))
        planned.extend(cut.values())
    return sorted(planned, key=lambda g: g.assignment.multiplier != 1.0 or g.assignment.rate is not None)


def scale_lr(group: dict[str, Any], assignment: Assignment, *, scale_weight_decay: bool = True) -> None:
    """Multiply a built group's lr in place, or set the rate of its own and record the multiplier it amounts to.

    A decoupled decay is lr × weight_decay: without scale_weight_decay it is divided so that the product stays.
    """
    base = group["lr"]
    if assignment.rate is not None:
        group["lr_multiplier"] = assignment.rate / float(base)
        group["lr"] = torch.full_like(base, assignment.rate) if isinstance(base, torch.Tensor) else assignment.rate
    elif assignment.multiplier != 1.0 or isinstance(base, torch.Tensor):  # a tensor is filled in place: never shared
        group["lr"] = base * assignment.multiplier
    if not scale_weight_decay and "weight_decay" in group:
        group["weight_decay"] = group["weight_decay"] / group["lr_multiplier"]


def rank_aware_param_groups(
    params: Any,
    *,
    lr: float | Rate,
    model: nn.Module | None = None,
    law: str | Law = DEFAULT_LAW,
    tuned_at: Reference | None = None,
    optimizer_class: type | None = None,
    named: bool = True,
    method: Method = "lora",
    init: Init | None = None,
    rates: Mapping[str, float | Rate] | None = None,
    other_lr: float | Rate | None = None,
    per_layer_width: bool = False,
    across_inits: bool = False,
    batch: float | None = None,
    strict: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups with their rates, for any torch optimizer: the wrapper's work without the wrapper.

    group["lr"] = (the user group's lr, or `lr`) × group["lr_multiplier"]. `params` is a model, or groups with
    `model=`. named=False leaves the names out, as ZeroRedundancyOptimizer needs.

    >>> pair = torch.nn.Module()
    >>> pair.lora_A, pair.lora_B = torch.nn.Linear(64, 8, bias=False), torch.nn.Linear(8, 64, bias=False)
    >>> pair.r, pair.scaling = 8, 1.0
    >>> _ = torch.nn.init.zeros_(pair.lora_B.weight)
    >>> groups = rank_aware_param_groups(pair, lr=1e-3, tuned_at=Reference(rank=32, alpha=32))
    >>> [(g["lora_role"], round(g["lr"], 5)) for g in groups]
    [('A', 0.00199), ('B', 0.00199)]
    """
    model = _model_of(params, model)
    check_lr(lr)
    walked = walk(model)
    survey = survey_of(walked, method=method, init=init)
    plan = make_plan(
        survey,
        law=law,
        tuned_at=tuned_at,
        optimizer_class=optimizer_class,
        rates=rates,
        other_lr=other_lr,
        per_layer_width=per_layer_width,
        across_inits=across_inits,
        batch=batch,
        strict=strict,
    )
    groups = []
    for planned in split(user_groups(params, model, walked), plan, survey):
        group = {"lr": plain_lr(lr), **planned.as_dict(named=named)}
        scale_lr(group, planned.assignment)
        groups.append(group)
    return groups


def _model_of(params: Any, model: nn.Module | None) -> nn.Module:
    found = params if model is None else model
    if not isinstance(found, nn.Module):
        raise OptimizerError(
            "Parameters alone do not say which of them are LoRA factors.",
            "Give the model: first argument, or model= beside the parameters.",
        )
    return found
