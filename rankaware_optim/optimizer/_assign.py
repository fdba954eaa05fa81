"""Which learning rate each parameter gets, and why. `Assigner.assign` decides both.

    lr = base lr of the user's group × multiplier
    multiplier = the law's number (from the reference to this LoRA matrix)
                 × the number for the run's batch and steps

For a parameter outside LoRA the law's number is 1. An explicit learning rate
(`rates=`, `other_lr=`, or a recipe's rate for such a parameter) replaces the whole product.

This module needs no optimizer instance and no parameter groups: `convert_lr` uses it for a single
number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from .._optimizers import in_force, kept_dtypes, optimizer_family
from .._types import Factor, Method, Reference, width_for
from ..inspection import LAWLESS, Survey, other_kind
from ..laws import Law, checked_multiplier, from_full, to_full
from ._source import Settings, Source


def reason_of_other(kind: str | None, rate: str = "base learning rate") -> str:
    """Return why a parameter outside LoRA has its learning rate.

    kind: the kind of its adapter, for an adapter without a law. rate: the learning rate in words.
    """
    return f"{kind}: no law covers it, {rate}" if kind else f"not a LoRA matrix: {rate}"


def reason_without_law(factor: Factor) -> str:
    """Return why a LoRA matrix that no law covers keeps the base learning rate."""
    if kind := LAWLESS.get(factor.kind):
        return reason_of_other(kind)
    return "neither A nor B started at zero: no law covers it, base learning rate"


@dataclass(frozen=True)
class Assigned:
    """What a parameter is, and its learning rate: base lr × `multiplier`, or `given`.

    Parameters of a group that are assigned alike train together, as one part.

    Args:
        role: "A" or "B" for LoRA matrices, "full" for whole weights, "other" for the rest. In a
            report also "frozen".
        rank: the LoRA rank, None for a parameter outside LoRA.
        scaling: s, the number that multiplies B·A; None for a parameter outside LoRA.
        init: "A" if B started at zero, "B" if A did, else "other" or "unknown".
        family: the kind of update that the optimizer makes, such as "sign-like" for Adam.
        multiplier: the number that multiplies the base learning rate.
        given: an explicit learning rate from `rates`, `other_lr` or a recipe, else None.
        why: the reason for the learning rate, in words.
    """

    role: str = "other"
    rank: int | None = None
    scaling: float | None = None
    init: str | None = None
    family: str = "sign-like"
    multiplier: float = 1.0
    given: float | None = None
    why: str = reason_of_other(None)


class Endpoints(NamedTuple):
    """The two ends between which a law converts a model's learning rates.

    reference: where the base learning rate was tuned, with its fan-in. width: the width of the
    model that trains, see `width_for`. dtype: the dtype in which most whole weights train, "" for
    LoRA.
    """

    reference: Reference
    width: float
    dtype: str = ""


@dataclass(frozen=True)
class Assigner:
    """Assigns learning rates to the parameters of one group of a model.

    Groups differ in their settings, and the settings decide the law: a Muon, for example, trains
    one group by its own update and another by AdamW. `of_group` returns the assigner of a group.

    source: the base learning rate, and where it was tuned. method: how the model trains. endpoints:
    one for each of several models, by its number, and one for all of them together, under "". law:
    the source's law, in the form for this group's optimizer and settings. family: the optimizer's
    family with these settings. optimizer: its class, None where only a number is converted.
    settings: the arguments that apply to all groups. kept: the dtypes for which the optimizer keeps
    the bits that a weight rounds away.
    """

    source: Source
    method: Method
    endpoints: Mapping[str, Endpoints]
    law: Law
    family: str = "sign-like"
    optimizer: type | None = None
    settings: Settings = field(default_factory=dict)
    kept: Collection[str] = ()

    @property
    def reference(self) -> Reference:
        """Where the base learning rate was tuned, or counts as tuned."""
        return self.endpoints[""].reference

    def of_group(self, settings: Settings) -> Assigner:
        """Return the assigner of a group with these settings."""
        if self.optimizer is None:
            return self
        law = self.source.law.bind(self.optimizer, settings)
        family = optimizer_family(self.optimizer, settings)
        kept = kept_dtypes(self.optimizer, in_force(self.optimizer, settings))
        return replace(self, law=law, family=family, kept=kept)

    def assign(
        self,
        name: str,
        factor: Factor | None,
        *,
        own_lr: bool = False,
        trains: bool = True,
    ) -> Assigned:
        """Decide the learning rate of a parameter of this group.

        An explicit learning rate comes first, then the law for a LoRA matrix or a whole weight,
        then the recipe's rate for other parameters, then the base learning rate.

        Args:
            name: the parameter's name.
            factor: the LoRA matrix or whole weight that the parameter is, None for others.
            own_lr: whether the user's group has a learning rate of its own. For a parameter outside
                LoRA it takes precedence over a recipe.
            trains: whether the parameter trains. A frozen one needs no rate in a recipe.
        """
        known = self._known(factor)
        explicit = self.source.explicit_rate(name, other=factor is None)
        if explicit is not None:
            return replace(known, given=explicit.lr, why=explicit.reason)
        by_run = self.source.run_multiplier(self.law)
        if factor is None and self.method == "full":
            # In full finetuning embeddings, biases and norms get the learning rate of the weights.
            _, width, dtype = self.endpoints[""]
            factor = Factor("other", "full", None, width, width, dtype=dtype)
        if factor is not None:
            by_law = self.multiplier(factor)
            why = self._why(factor, by_law)
            return replace(known, multiplier=by_run * by_law, why=why)
        kind = other_kind(name)
        of_recipe = None if own_lr else self.source.recipe_rate(name, trains)
        if of_recipe is not None:
            why = reason_of_other(kind, of_recipe.reason)
            return replace(known, given=of_recipe.lr * by_run, why=why)
        words = "base learning rate (other_lr= or rates= sets another)"
        return replace(known, multiplier=by_run, why=reason_of_other(kind, words))

    def _known(self, factor: Factor | None) -> Assigned:
        """Describe a parameter before its learning rate is decided."""
        if factor is None:
            return Assigned(family=self.family)
        known = Assigned(factor.role, factor.rank, family=self.family)
        if factor.role == "full":
            return known
        return replace(known, scaling=factor.scaling, init=factor.init)

    def _why(self, factor: Factor, by_law: float) -> str:
        """Return the reason for a learning rate that the law decides."""
        if factor.init == "other":
            return reason_without_law(factor)
        if self.source.reference is None and by_law == 1.0:
            return "without tuned_at= nothing is converted"
        words = self.source.title.removeprefix("law ")
        if self.source.recipe is not None:
            words = "recipe"
        family = "" if self.family == "sign-like" else f", {self.family}"
        full = "to full finetuning " if factor.role == "full" else ""
        return f"{words}{family}: converted {full}from {self.reference}"

    def multiplier(self, factor: Factor) -> float:
        """Return the law's number for a LoRA matrix or a whole weight, at the model's width.

        If neither matrix of a pair starts at zero, the pair keeps the base learning rate.
        """
        number = _model_number(factor)
        reference, width, _ = self.endpoints.get(number, self.endpoints[""])
        if factor.role == "full":
            return self._full_multiplier(replace(factor, fan_in=width), reference)
        if factor.init == "other":
            return 1.0
        # No law converts between B = 0 and A = 0, so the reference gets the pair's init. A pair of
        # unknown init is taken for PEFT's: B starts at zero.
        init: Literal["A", "B"] = "B" if factor.init == "B" else "A"
        here = replace(factor, fan_in=width, init=init)
        if factor.kind == "embedding":
            return self._embedding_multiplier(here, reference, init)
        if reference.method == "lora":
            reference = replace(reference, init=init)
        elif not self._has_full_runs:
            of_recipe = self.source.recipe is not None
            return from_full(self.law, here, reference, of_recipe=of_recipe)
        return checked_multiplier(self.law, here, reference)

    def _full_multiplier(self, weight: Factor, reference: Reference) -> float:
        """Return the number for a whole weight in full finetuning."""
        if reference.method == "full" or self._has_full_runs:
            return checked_multiplier(self.law, weight, reference)
        # An optimizer that keeps the bits which a dtype rounds away trains as in float32.
        dtype = "" if weight.dtype in self.kept else weight.dtype
        of_recipe = self.source.recipe is not None
        return to_full(self.law, weight, reference, dtype, of_recipe=of_recipe)

    def _embedding_multiplier(
        self, here: Factor, reference: Reference, init: Literal["A", "B"]
    ) -> float:
        """Return the number for a LoRA matrix of an embedding. Its input is one-hot, so its width
        is 1. It is converted between ranks of one init, and not from full finetuning.
        """
        if reference.method == "full":
            return 1.0
        at_width_1 = replace(reference, init=init, fan_in=1.0)
        return checked_multiplier(self.law, replace(here, fan_in=1.0), at_width_1)

    @property
    def _has_full_runs(self) -> bool:
        """Whether a recipe's own trials settled the step between LoRA and full finetuning."""
        recipe = self.source.recipe
        return recipe is not None and recipe.full_seen


def _model_number(factor: Factor) -> str:
    """Return the first part of a name, which is the model's number where there are several."""
    return factor.name.partition(".")[0]


def make_assigner(
    survey: Survey,
    source: Source,
    method: Method,
    optimizer: type | None = None,
    settings: Settings | None = None,
    *,
    are_several: bool = False,
) -> Assigner:
    """Return the assigner for a model, bound to the settings that apply to all groups.

    Args:
        survey: the parameters of the model, or of several.
        source: the base learning rate, and where it was tuned.
        method: "lora" or "full".
        optimizer: the optimizer's class, None where only a number is converted.
        settings: the optimizer's arguments.
        are_several: whether the survey covers several models. Their numbers then begin its names.

    Raises:
        OptimizerError: an explicit learning rate is impossible or matches no parameter.
    """
    source.check_given([*(f.name for f in survey.factors), *survey.other])
    reference = source.reference
    if reference is None:  # without LoRA pairs nothing is converted
        reference = survey.dominant() if survey.factors else Reference(method="full")
    by_model: dict[str, list[Factor]] = {"": []}
    for factor in survey.factors:
        # A matrix with an explicit learning rate does not count for the width.
        if source.explicit_rate(factor.name) is None:
            by_model[""].append(factor)
            if are_several:
                by_model.setdefault(_model_number(factor), []).append(factor)
    endpoints = {}
    for number, factors in by_model.items():
        of_model = Survey(tuple(factors))
        width = width_for(of_model, method, reference.init)
        dtypes = Counter(factor.dtype for factor in factors)
        dtype = dtypes.most_common(1)[0][0] if dtypes else ""
        endpoints[number] = Endpoints(reference.resolve(of_model), width, dtype)
    settings = settings or {}
    assigner = Assigner(
        source, method, endpoints, source.law, optimizer=optimizer, settings=settings
    )
    return assigner.of_group(settings)
