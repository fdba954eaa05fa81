"""This module assigns a learning rate to every parameter and explains it in words.

    lr = base lr of the user's group × multiplier
    multiplier = factor of the scaling law (from the reference to this LoRA matrix)
                 × factor for the run's batch and steps

For parameters that are not LoRA matrices, the multiplier of the scaling law is 1. If
the user sets an explicit learning rate for a parameter, the parameter trains at exactly
this learning rate, without a multiplier. Explicit learning rates come from `rates=`,
from `other_lr=`, or from a recipe.

`Assigner.assign` needs neither an optimizer nor parameter groups, so `convert_lr` uses
the same code to convert a single number.
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
    """Explain in a few words why a parameter that is not a LoRA matrix trains at its
    learning rate.

    kind: the type of its adapter, if it belongs to an adapter that no law covers. rate:
    the learning rate in words.
    """
    return f"{kind}: no law covers it, {rate}" if kind else f"not a LoRA matrix: {rate}"


def reason_without_law(factor: Factor) -> str:
    """Explain why no scaling law applies to a LoRA matrix, so that it trains at the
    base learning rate.
    """
    if kind := LAWLESS.get(factor.kind):
        return reason_of_other(kind)
    return "neither A nor B started at zero: no law covers it, base learning rate"


@dataclass(frozen=True)
class Assigned:
    """The learning rate that was assigned to a parameter, and the parameter's role.

    The learning rate is `given` if this attribute is set, and base lr × `multiplier`
    otherwise. Parameters of a group whose `Assigned` objects are equal train at the
    same learning rate.

    Args:
        role: "A" or "B" for LoRA matrices, "full" for whole weights, and "other" for
            all other parameters. A report also uses "frozen".
        rank: the LoRA rank, or None for a parameter outside LoRA.
        scaling: the number s that multiplies B·A, or None for a parameter outside LoRA.
        init: "A" if B started at zero, "B" if A started at zero, otherwise "other" or
            "unknown".
        family: the kind of update that the optimizer makes, such as "sign-like" for Adam.
        multiplier: the number that multiplies the base learning rate.
        given: an explicit learning rate from `rates`, `other_lr` or a recipe, or None.
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
    """This class contains the values that a scaling law needs to convert a learning
    rate.

    reference: the configuration that the base learning rate was tuned for, including
    its fan-in. width: the width of the model that trains (see `width_for`). dtype: the
    dtype of most whole weights during training, or "" for LoRA.
    """

    reference: Reference
    width: float
    dtype: str = ""


@dataclass(frozen=True)
class Assigner:
    """This class assigns learning rates to the parameters of one parameter group.

    Each group needs a separate assigner, because the form of the law depends on the
    group's settings. For example, Muon may train one group with orthogonalized updates
    and another group with AdamW. `of_group` returns the assigner for a group.

    source: the base learning rate, and where it was tuned. method: whether the model
    trains with LoRA or full finetuning. endpoints: the endpoints for each model by its
    number, and under "" the endpoints for all models together. law: the source's law in
    the form for this group's optimizer and settings. family: the optimizer's family
    with these settings. optimizer: its class, or None if only a number is converted.
    settings: the arguments that apply to all groups. kept: the dtypes in which the
    optimizer does not lose small steps to rounding.
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
        """The configuration that the base learning rate was tuned for, or is assumed to
        be tuned for.
        """
        return self.endpoints[""].reference

    def of_group(self, settings: Settings) -> Assigner:
        """Return an assigner whose scaling law is adapted to the optimizer settings of
        a parameter group.
        """
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
        """Assign a learning rate to a parameter.

        An explicit learning rate for the parameter has the highest priority. Without an
        explicit learning rate, the law determines the learning rate of a LoRA matrix or
        a whole weight. Any other parameter trains at the recipe's learning rate for it,
        or at the base learning rate if the recipe has none.

        Args:
            name: the parameter's name.
            factor: the LoRA matrix or whole weight that the parameter represents, or
                None for other parameters.
            own_lr: whether the user set a learning rate in the group. For a parameter
                outside LoRA, this learning rate takes precedence over the recipe's.
            trains: whether the parameter trains. A recipe need not contain a learning
                rate for a frozen parameter.
        """
        known = self._known(factor)
        explicit = self.source.explicit_rate(name, other=factor is None)
        if explicit is not None:
            return replace(known, given=explicit.lr, why=explicit.reason)
        by_run = self.source.run_multiplier(self.law)
        if factor is None and self.method == "full":
            # Full finetuning has one learning rate, so embeddings, biases and norms get the same
            # multiplier as the weight matrices.
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
        """Return an `Assigned` object that describes a parameter but has no learning
        rate yet.
        """
        if factor is None:
            return Assigned(family=self.family)
        known = Assigned(factor.role, factor.rank, family=self.family)
        if factor.role == "full":
            return known
        return replace(known, scaling=factor.scaling, init=factor.init)

    def _why(self, factor: Factor, by_law: float) -> str:
        """Explain in words how the scaling law determined the learning rate of a
        parameter.
        """
        if factor.init == "other":
            return reason_without_law(factor)
        if self.source.reference is None and by_law == 1.0:
            return "no conversion, because tuned_at= was not passed"
        words = self.source.title.removeprefix("law ")
        if self.source.recipe is not None:
            words = "recipe"
        family = "" if self.family == "sign-like" else f", {self.family}"
        full = "to full finetuning " if factor.role == "full" else ""
        return f"{words}{family}: converted {full}from {self.reference}"

    def multiplier(self, factor: Factor) -> float:
        """Return the law's multiplier for a LoRA matrix or a whole weight.

        If neither matrix of a LoRA pair starts at zero, no law applies to the pair, and
        the multiplier is 1.
        """
        number = _model_number(factor)
        reference, width, _ = self.endpoints.get(number, self.endpoints[""])
        if factor.role == "full":
            return self._full_multiplier(replace(factor, fan_in=width), reference)
        if factor.init == "other":
            return 1.0
        # No law converts between pairs that start with B = 0 and pairs that start with A = 0, so
        # the reference gets the init of this pair. If the init is unknown, we assume PEFT's
        # default, in which B starts at zero.
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
        """Return the law's multiplier for a weight that is trained by full finetuning."""
        if reference.method == "full" or self._has_full_runs:
            return checked_multiplier(self.law, weight, reference)
        # An optimizer that stores the bits which the dtype rounds away trains these weights as if
        # they were float32. The correction for their dtype does not apply then.
        dtype = "" if weight.dtype in self.kept else weight.dtype
        of_recipe = self.source.recipe is not None
        return to_full(self.law, weight, reference, dtype, of_recipe=of_recipe)

    def _embedding_multiplier(
        self, here: Factor, reference: Reference, init: Literal["A", "B"]
    ) -> float:
        """Return the law's multiplier for a LoRA matrix of an embedding layer.

        The input of an embedding is one-hot, so its width counts as 1. The scaling law
        can convert the learning rate of an embedding between two ranks with the same
        init. The law cannot convert a learning rate that was tuned for full finetuning,
        so the multiplier is then 1.
        """
        if reference.method == "full":
            return 1.0
        at_width_1 = replace(reference, init=init, fan_in=1.0)
        return checked_multiplier(self.law, replace(here, fan_in=1.0), at_width_1)

    @property
    def _has_full_runs(self) -> bool:
        """Return whether the recipe's trials included full finetuning."""
        recipe = self.source.recipe
        return recipe is not None and recipe.full_seen


def _model_number(factor: Factor) -> str:
    """Return the number of the model that a LoRA matrix or a whole weight belongs to."""
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
    """Create the assigner for a model from the model's survey and the user's settings.

    Args:
        survey: the survey of the parameters of one model or of several models.
        source: the base learning rate, and where it was tuned.
        method: "lora" or "full".
        optimizer: the optimizer's class, or None if only a number is converted.
        settings: the optimizer's arguments.
        are_several: whether the survey covers several models. The name of
            each parameter then begins with the position of its model in the list.

    Raises:
        OptimizerError: an explicit learning rate is not usable or matches no parameter.
    """
    source.check_given([*(f.name for f in survey.factors), *survey.other])
    reference = source.reference
    if reference is None:  # without LoRA pairs nothing is converted
        reference = survey.dominant() if survey.factors else Reference(method="full")
    by_model: dict[str, list[Factor]] = {"": []}
    for factor in survey.factors:
        # The width is an average over the matrices that the law converts. A matrix with an
        # explicit learning rate is not converted, so it must not affect the average.
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
