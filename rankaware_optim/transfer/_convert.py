"""Conversion of a rate tuned at one rank, alpha, init, width or method to another, exactly or by a
law.

With Adam and decoupled decay, training does not change if s is replaced by s/(p·q), A₀ by p·A₀, B₀
by q·B₀, η by (p·η_A, q·η_B), ε by (ε_A/p, ε_B/q), and the decays likewise. A factor that starts at
zero needs no rescaling, so its rate alone undoes a change of s. All other changes follow a law.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from .._checks import check_lr
from .._rate import Rate
from .._types import Rated, Reference, Survey, dense, init_text
from ..errors import InvalidReferenceError, LawError
from ..inspection import ReferenceLike, as_reference, survey_config
from ..laws import (
    DEFAULT_LAW,
    DISTANCE_NOTE,
    SIGN_LIKE,
    Law,
    at_distance,
    caution_of,
    checked_batch_multiplier,
    checked_multiplier,
    get_law,
    innermost,
    law_title,
)
from ..optimizer import PlanOptions, make_plan

# A width at which every law has reached its limit up to rounding, and whose square is finite.
_LARGE = 2.0**200
_WORDS = {"method": "method", "rank": "rank", "init": "init", "fan_in": "width"}


@dataclass(frozen=True, kw_only=True)
class Conversion(Rate):
    """A converted rate, with the other settings that must change. It has no band.

    A second exact form uses `a_scale`: multiply the initial values of the drawn factor (A₀ under
    Init[A], B₀ under Init[B]) and both tuned rates by it, and divide eps and weight decay by it.

    Args:
        lr: the law's single rate, per step. It is A's rate if the law gives B another one. The
            default law's keeps a distance, × .9, if it moves; exact rates keep none.
        lr_a: A's rate in the two-rate form, per step.
        lr_b: B's rate in the two-rate form, per step.
        eps_scale_a: factor of A's eps in the two-rate form.
        eps_scale_b: factor of B's eps in the two-rate form.
        weight_decay_scale_a: factor of A's decoupled weight decay in the two-rate form.
        weight_decay_scale_b: factor of B's decoupled weight decay in the two-rate form.
        a_scale: √(s/s′) if only the scaling differs, else 1.
        exact: whether the two-rate form reproduces the tuned training up to rounding.

    >>> c = Conversion(1e-4, lr_a=2e-4, lr_b=5e-5)
    >>> float(c), c.lr_a, c.high
    (0.0001, 0.0002, inf)
    """

    lr_a: float
    lr_b: float
    eps_scale_a: float = 1.0
    eps_scale_b: float = 1.0
    weight_decay_scale_a: float = 1.0
    weight_decay_scale_b: float = 1.0
    a_scale: float = 1.0
    exact: bool = False
    _line: ClassVar[str] = "{}: {}."

    def _facts(self) -> Iterator[tuple[str, str]]:
        how = "exact" if self.exact else "approximate"
        if self.lr == self.lr_a == self.lr_b:
            yield "One rate for all", f"{self.lr:.4g} ({how})"
        else:
            yield "As one rate", f"{self.lr:.4g} (approximate)"
            yield "Two rates", f"{self.lr_a:.4g} for A, {self.lr_b:.4g} for B ({how})"
        for role, eps, decay in (
            ("A", self.eps_scale_a, self.weight_decay_scale_a),
            ("B", self.eps_scale_b, self.weight_decay_scale_b),
        ):
            if (eps, decay) != (1.0, 1.0):
                yield (
                    "With the two rates",
                    f"multiply {role}'s eps by {eps:.4g} and its weight decay by {decay:.4g}",
                )


def convert_lr(
    lr: float | Rate,
    *,
    from_: ReferenceLike,
    to: ReferenceLike,
    law: str | Law = DEFAULT_LAW,
    model: str | os.PathLike[str] | None = None,
    target_modules: str | Sequence[str] | None = None,
) -> Conversion:
    """Convert a rate tuned at one configuration to another.

    If only the scaling s changes to s′, the two-rate form is exact. With q = s/s′,
    Init[A] (B = 0 at the start) keeps η_A and multiplies η_B by q, ε_B and λ_B by 1/q. Init[B] (A =
    0 at the start) does the same to A. Otherwise the rates follow the law. A rate that the default
    law moves keeps the distance that the optimizer keeps, × .9: convert the tuned rate, not a
    converted one.

    Args:
        lr: the tuned rate, per step.
        from_: the configuration of `lr`: a `Reference`, a text such as "r=16,alpha=32", a dict
            such as {"r": 16, "lora_alpha": 32}, an adapter's folder or file, or a LoraConfig.
        to: the other configuration. A text or dict without alpha, such as "r=64", keeps the
            alpha of `from_`. A width that only one of the two has is used for both. If neither has
            one, the limit of a large width is used. The optimizer uses `Survey.width` for LoRA, the
            mean fan-in, and `Survey.full_width` for full finetuning, the largest one (from Init[B]
            the mean). If both have a batch, the rate moves by the law's rule for the batch.
        law: a law or its name. For an optimizer other than Adam and its variants, give
            Falling().bind(optimizer_class, settings).
        model: a model's folder or its config.json, of transformers or diffusers, for the width of
            both: `lr` is then the rate that the optimizer trains at on this model. It needs that
            library, and peft for LoRA.
        target_modules: the layers of that model to adapt, as PEFT's `LoraConfig` takes them.

    Raises:
        InvalidReferenceError: a text is no configuration; or no width is known although the method
            or the init changes, or the law has no limit.
        InspectionError: the model's configuration or an adapter cannot be read.
        OptimizerError: `lr` is not a positive finite number.
        LawError: the law is unknown or gives no multiplier.

    >>> c = convert_lr(2e-4, from_="r=16,alpha=32", to="r=16,alpha=16")
    >>> c.lr_a, c.lr_b, c.eps_scale_b, c.exact
    (0.0002, 0.0004, 0.5, True)
    >>> round(convert_lr(1.0, from_="r=16,alpha=16", to="r=64,alpha=64", law="mua-paper").lr, 3)
    0.5
    """
    base, bound = check_lr(lr), get_law(law)
    origin = as_reference(from_)
    target = as_target(to, origin, model)
    if model is not None:
        origin, target, words = _at_model(origin, target, model, target_modules)
        converted = convert_lr(lr, from_=origin, to=target, law=law)
        return replace(converted, notes=(words, *converted.notes))
    move = _Move(*_at_widths(origin, target, _LARGE), bound)
    try:
        converted = move.convert(base)
        if move.target.fan_in != _LARGE:
            return converted
        half = _Move(*_at_widths(origin, target, _LARGE / 2), bound).convert(base)
    except (ArithmeticError, LawError) as error:
        if not isinstance(error.__cause__ or error, ArithmeticError):
            raise
        raise InvalidReferenceError(
            f"From {origin} to {target} a rate leaves the range of floating point.",
            "Check the alphas and ranks.",
        ) from error
    rates = ("lr", "lr_a", "lr_b")
    if not all(math.isclose(getattr(converted, r), getattr(half, r)) for r in rates):
        raise InvalidReferenceError(
            f"The law {bound.name!r} has no limit at a large width here.",
            "Give fan_in=, such as 4096, in a reference.",
        )
    return converted


def as_target(to: ReferenceLike, origin: Reference, model: object) -> Reference:
    """Return the reference `to`, which keeps what it lacks of `origin`, but no width if a model has
    one.
    """
    like = origin if model is None else replace(origin, fan_in=None)
    return as_reference(to, like=like)


def _at_model(
    origin: Reference,
    target: Reference,
    model: str | os.PathLike[str],
    target_modules: str | Sequence[str] | None,
) -> tuple[Reference, Reference, str]:
    """Return both references with the widths that the optimizer gives them on a model that trains
    at `target`, and a note on these.
    """
    survey = survey_config(model, target_modules=target_modules, method=target.method)
    layers = len({f.layer for f in dense(survey.factors)})
    words = (
        f"Read off {os.fspath(model)}: mean fan-in {survey.width:.6g}, largest"
        f" {survey.full_width():g}, of {layers} layers that train."
    )
    width = replace(target, init=origin.init).resolve(survey).fan_in
    return origin.resolve(survey), replace(target, fan_in=width), words


def _at_widths(
    origin: Reference, target: Reference, large: float
) -> tuple[Reference, Reference]:
    """Return both references with a width: their own, the other's, or `large` if the inits are
    equal.
    """
    width = origin.fan_in or target.fan_in
    before, after = (
        "full finetuning" if r.method == "full" else init_text(r.init)
        for r in (origin, target)
    )
    if width is None and before != after:
        raise InvalidReferenceError(
            f"From {before} to {after} the rate depends on the model's width, which neither"
            " reference has.",
            "Give fan_in=, such as 4096, in one of them.",
        )
    width = width or large
    return replace(origin, fan_in=width), replace(target, fan_in=target.fan_in or width)


@dataclass(frozen=True)
class _Move:
    """The move from one reference to another by a law. Both have a width."""

    origin: Reference
    target: Reference
    law: Law

    def convert(self, lr: float) -> Conversion:
        """Return the rate at the target for a rate tuned at the origin."""
        base = lr * self.by_batch
        of_a = at_distance(self.law, self.of_a(self.target))
        one = check_lr(base * of_a, "The converted lr")
        exact = not self.changes and self.same_batch
        lr_a, lr_b = one, one
        on_a, on_b, a_scale = 1.0, 1.0, 1.0
        if self.target.method == "lora" and self.changes:
            of_b = at_distance(self.law, self.of_b(self.target))
            lr_b = check_lr(base * of_b, "The converted lr_b")
        elif self.target.method == "lora":
            # If only s changes, the rate of the factor that starts at zero undoes all of it.
            on_a, on_b = (
                (1.0, self.ratio) if self.origin.init == "A" else (self.ratio, 1.0)
            )
            lr_a = check_lr(base * on_a, "The converted lr_a")
            lr_b = check_lr(
                base * (self.of_b(self.origin) * on_b), "The converted lr_b"
            )
            a_scale = math.sqrt(self.ratio)
            exact = exact and self.scale_free
        return Conversion(
            one,
            lr_a=lr_a,
            lr_b=lr_b,
            eps_scale_a=1.0 / on_a,
            eps_scale_b=1.0 / on_b,
            weight_decay_scale_a=1.0 / on_a,
            weight_decay_scale_b=1.0 / on_b,
            a_scale=a_scale,
            exact=exact,
            notes=tuple(self.notes()),
        )

    def of_a(self, at: Reference) -> float:
        return checked_multiplier(self.law, at.as_factor(), self.origin)

    def of_b(self, at: Reference) -> float:
        """Return the law's multiplier of B's rate at a reference, relative to A's rate at the
        origin.
        """
        return checked_multiplier(
            self.law, replace(at.as_factor(), role="B"), self.origin
        )

    @cached_property
    def changes(self) -> list[str]:
        """The fields other than alpha in which the two differ for a law. Full finetuning has only a
        width.
        """
        if self.origin.method != self.target.method:
            return ["method"]
        names = (
            ("fan_in",) if self.target.method == "full" else ("rank", "init", "fan_in")
        )
        return [
            name
            for name in names
            if getattr(self.origin, name) != getattr(self.target, name)
        ]

    @cached_property
    def ratio(self) -> float:
        """s/s′, or 1 if the two are equal up to rounding."""
        q = self.origin.scaling / self.target.scaling
        return 1.0 if math.isclose(q, 1.0, rel_tol=1e-12) else q

    @property
    def scale_free(self) -> bool:
        """Whether the law's updates do not depend on the gradient's scale, which the two-rate form
        requires.
        """
        return getattr(innermost(self.law), "family", "sign-like") in SIGN_LIKE

    @property
    def same_batch(self) -> bool:
        batches = (self.origin.batch, self.target.batch)
        return None in batches or batches[0] == batches[1]

    @property
    def by_batch(self) -> float:
        """The law's factor for the batch, if both references have one."""
        if self.origin.batch is None or self.target.batch is None:
            return 1.0
        return checked_batch_multiplier(self.law, self.target.batch / self.origin.batch)

    def notes(self) -> Iterator[str]:
        yield from self.notes_on_change()
        multiplier = self.of_a(self.target)
        if at_distance(self.law, multiplier) != multiplier:
            yield DISTANCE_NOTE
        if caution := caution_of(multiplier):
            yield caution
        if self.target.fan_in == _LARGE and (self.changes or self.ratio != 1.0):
            yield (
                "No width was given: the single rate is the limit of a large width. Add your"
                " model's to the reference, such as fan_in=4096."
            )
        if self.target.method == "lora" and self.of_b(self.target) != multiplier:
            yield f"The law {self.law.name!r} gives B a separate rate. The single rate is A's."
        if not self.same_batch:
            batches = f"from {self.origin.batch:g} to {self.target.batch:g}"
            yield (
                f"The batch changes {batches}: every rate × {self.by_batch:.3g}, by a rule of"
                " thumb."
            )
        yield from self.notes_of_law()

    def notes_of_law(self) -> Iterator[str]:
        """Yield the law's own notes. No law is derived between inits."""
        origin = self.origin
        if "init" in self.changes:
            yield (
                "Between the inits the law is a guess, from B = 0 to A = 0 up to 8 times too high"
                " in the study's domains: try a quarter of the rate too, or calibrate there."
            )
            origin = replace(origin, init=self.target.init)
        plan = make_plan(
            Survey((self.target.as_factor(),)), PlanOptions(self.law, tuned_at=origin)
        )
        yield from (note for note in plan.notes if note != DISTANCE_NOTE)

    def notes_on_change(self) -> Iterator[str]:
        """Yield what the rates follow from, and how exact they are."""
        if self.changes:
            words = " and ".join(_WORDS[name] for name in self.changes)
            yield f"With another {words} the rates follow the {law_title(self.law)}."
            if "method" in self.changes:
                widths = {at.method: at.fan_in for at in (self.origin, self.target)}
                of_full = "mean" if self.origin.init == "B" else "largest"
                advice = ""
                if widths["lora"] == widths["full"]:
                    advice = ": give each its fan_in= where they differ"
                yield (
                    f"The width is the mean fan-in for LoRA, {widths['lora']:g}, and the {of_full}"
                    f" for full finetuning, {widths['full']:g}, as the optimizer reads them off a"
                    f" model{advice}."
                )
        elif self.ratio == 1.0:
            if self.same_batch:
                yield "Both configurations train equally, so the rates do not change."
        elif self.scale_free:
            drawn, zero = ("A", "B") if self.origin.init == "A" else ("B", "A")
            scale = f"{math.sqrt(self.ratio):.4g}"
            yield (
                "One rate for both factors is approximate: a change of alpha is undone by the rate"
                f" of {zero} alone, or by both tuned rates × {scale} with {drawn}'s initial values"
                f" × {scale}, eps and weight decay ÷ {scale}."
            )
            yield (
                "Exactness holds for Adam-like optimizers with decoupled weight decay and without"
                " gradient clipping."
            )
        else:
            yield "The two rates are exact for Adam-like optimizers only."


# --- the rates of an adapter on disk --------------------------------------------------------------


def survey_rates(
    survey: Survey,
    *,
    lr: float | None = None,
    law: str = DEFAULT_LAW,
    tuned_at: str | None = None,
) -> tuple[Survey, Mapping[str, Rated]]:
    """Return a survey with the law's notes, and each factor's rate by name. Without `lr` there are
    no rates.

    Args:
        survey: the survey, such as from `inspect_file`.
        lr: the base rate, per step.
        law: the law's name.
        tuned_at: the configuration of `lr`, as for `RankAwareOptimizer`.
    """
    reference = None if tuned_at is None else as_reference(tuned_at)
    if lr is None:
        return survey, {}
    from ..optimizer import plan_rates  # needs torch

    base, plan = check_lr(lr), make_plan(survey, PlanOptions(law, tuned_at=reference))
    return replace(survey, notes=tuple(plan.notes)), plan_rates(plan, base)
