"""Conversion: a rate tuned at one rank, alpha, init, width or method becomes the rate at another, exact or by law.

With Adam and decoupled decay, replacing s by s/(p·q), A₀ by p·A₀, B₀ by q·B₀, η by (p·η_A, q·η_B), ε by (ε_A/p, ε_B/q)
and the decays likewise leaves training unchanged. A factor that starts at zero needs no rescaling, so its rate alone
undoes a change of s. Everything else follows a law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .._checks import check_lr
from .._types import Reference, Survey
from ..errors import InvalidReferenceError
from ..laws import DEFAULT_LAW, Law, checked_multiplier, get_law
from ..optimizer import PlanOptions, make_plan

__all__ = ["Conversion", "convert_lr", "parse_reference"]

_LARGE = 2.0**200  # a width at which every law has reached its limit, to rounding, and its squares stay finite
_WORDS = {"method": "method", "rank": "rank", "init": "init", "fan_in": "width"}


@dataclass(frozen=True, eq=False)
class Conversion(float):
    """A converted rate: in arithmetic, comparison, formatting and JSON the float `lr`, with what else is to change.

    `lr` is the law's single rate (that of A, if the law gives B its own), `lr_a` and `lr_b` the two-rate form. The
    scales are what each factor's eps and decoupled weight decay are multiplied by, dimensionless. `a_scale` is
    √(s/s′): with the drawn factor's initial values (A₀ under Init[A], B₀ under Init[B]) multiplied by it, both tuned
    rates times `a_scale`, eps and decay divided by it, are exact as well; 1 where more than s differs. `exact` tells
    whether the two-rate form reproduces the tuned training to rounding. `notes` are sentences.

    >>> c = Conversion(1e-4, lr_a=2e-4, lr_b=5e-5)
    >>> c * 10, c.lr_a, str(c)
    (0.001, 0.0002, '0.0001')
    """

    lr: float
    lr_a: float
    lr_b: float
    eps_scale_a: float = 1.0
    eps_scale_b: float = 1.0
    weight_decay_scale_a: float = 1.0
    weight_decay_scale_b: float = 1.0
    a_scale: float = 1.0
    exact: bool = False
    notes: tuple[str, ...] = field(default=(), repr=False)

    def __new__(cls, lr: float, *_: Any, **__: Any) -> Conversion:
        return super().__new__(cls, lr)

    __str__ = float.__repr__

    def explain(self) -> str:
        """The conversion in words: one rate, two rates, what becomes of eps and decay, and the notes."""
        how = "exact" if self.exact else "approximate"
        if self.lr == self.lr_a == self.lr_b:
            lines = [f"One rate for all: {self.lr:.4g} ({how})."]
        else:
            lines = [
                f"As one rate: {self.lr:.4g} (approximate).",
                f"Two rates: {self.lr_a:.4g} for A, {self.lr_b:.4g} for B ({how}).",
            ]
        return "\n".join([*lines, *self._scales(), *(f"note: {note}" for note in self.notes)])

    def _scales(self) -> list[str]:
        scales = {
            "A": (self.eps_scale_a, self.weight_decay_scale_a),
            "B": (self.eps_scale_b, self.weight_decay_scale_b),
        }
        return [
            f"With the two rates, multiply {role}'s eps by {eps:.4g} and its weight decay by {decay:.4g}."
            for role, (eps, decay) in scales.items()
            if (eps, decay) != (1.0, 1.0)
        ]


# An optimizer built with a conversion as its lr keeps it, and so does its checkpoint: let weights_only=True read it.
torch.serialization.add_safe_globals([Conversion])


def convert_lr(lr: float, *, from_: Reference | str, to: Reference | str, law: str | Law = DEFAULT_LAW) -> Conversion:
    """The rate at `to` of a rate tuned at `from_`; both are references or words such as "r=16,alpha=32".

    The tuned pair is (lr, lr × the law's multiplier of B at `from_`). At equal method, rank, init and width, where only
    the effective multiplier s becomes s′, the two-rate form is exact: with q = s/s′, Init[A] keeps η_A and multiplies
    η_B by q, ε_B and λ_B by 1/q; Init[B] does so to A (theory: module docstring). Otherwise the rates are the law's.
    A width that one reference names holds for both; if neither does, the limit of a large width is taken. Where both
    name a batch, every rate is moved by the law's rule for it. For another optimizer than Adam's kind give
    law=MuA().bind(optimizer_class, settings).

    Raises:
        InvalidReferenceError: the words make no reference; the method or the init changes, or the law has no limit, and
            no width is known.
        OptimizerError: `lr` is not a positive finite number. LawError: the law is unknown or gives no multiplier.

    >>> c = convert_lr(2e-4, from_="r=16,alpha=32", to="r=16,alpha=16")
    >>> c.lr_a, c.lr_b, c.eps_scale_b, c.exact
    (0.0002, 0.0004, 0.5, True)
    >>> round(convert_lr(1.0, from_="r=16,alpha=16", to="r=64,alpha=64", law="mua-paper"), 3)
    0.5
    """
    base, bound = check_lr(lr), get_law(law)
    pair = _as_reference(from_), _as_reference(to)
    base *= _batch_multiplier(*pair, bound)
    origin, target = _at_widths(*pair, _LARGE)
    try:
        made = _convert(base, origin, target, bound)
        if target.fan_in == _LARGE:
            _check_limit(made, _convert(base, *_at_widths(*pair, _LARGE / 2), bound), bound)
        return made
    except ArithmeticError as error:
        raise InvalidReferenceError(
            f"From {origin} to {target} a rate leaves the range of floating point.", "Check the alphas and ranks."
        ) from error


def _as_reference(value: Reference | str) -> Reference:
    if isinstance(value, str):
        return parse_reference(value)
    if not isinstance(value, Reference):
        raise InvalidReferenceError(
            f"{value!r} is no reference.", 'Give a Reference, or words such as "r=16,alpha=32" or "full".'
        )
    return value


def _at_widths(origin: Reference, target: Reference, large: float) -> tuple[Reference, Reference]:
    """Both references with a width: their own, the other's, or where the two start alike `large`."""
    known = origin.fan_in or target.fan_in
    if known is None and _start(origin) != _start(target):
        raise InvalidReferenceError(
            f"From {_start(origin)} to {_start(target)} the rate moves by the model's width, which neither reference "
            "names.",
            "Give fan_in=, such as 4096, in one of them.",
        )
    width = known or large
    return replace(origin, fan_in=width), replace(target, fan_in=target.fan_in or width)


def _check_limit(made: Conversion, at_half: Conversion, law: Law) -> None:
    """Refuse rates that still move with the width at the large one that stands for none."""
    rates = zip((made.lr, made.lr_a, made.lr_b), (at_half.lr, at_half.lr_a, at_half.lr_b), strict=True)
    if not all(math.isclose(rate, other, rel_tol=1e-9) for rate, other in rates):
        raise InvalidReferenceError(
            f"The law {law.name!r} has no limit at a large width here.", "Give fan_in=, such as 4096, in a reference."
        )


def _start(reference: Reference) -> str:
    return "full finetuning" if reference.method == "full" else f"Init[{reference.init}]"


def _convert(base: float, origin: Reference, target: Reference, law: Law) -> Conversion:
    changes, full = _changes(origin, target), target.method == "full"
    one = check_lr(base * checked_multiplier(law, target.as_factor(), origin), "The converted lr")
    notes = tuple(_notes(origin, target, law, changes))
    if full:
        return Conversion(one, one, one, exact=not changes and _same_batch(origin, target), notes=notes)
    if changes:
        rate_b = base * _rate_b(target, origin, law)
        return Conversion(one, one, check_lr(rate_b, "The converted lr_b"), notes=notes)
    return _two_rates(base, one, origin, target, law, notes)


def _two_rates(
    base: float, one: float, origin: Reference, target: Reference, law: Law, notes: tuple[str, ...]
) -> Conversion:
    """The exact form of a change of s alone: the factor that starts at zero takes all of it."""
    q, zero = _ratio(origin, target), "b" if origin.init == "A" else "a"
    rates = {"a": base, "b": base * _rate_b(origin, origin, law)}
    rates[zero] *= q
    return Conversion(
        one,
        **{f"lr_{role}": check_lr(rate, f"The converted lr_{role}") for role, rate in rates.items()},
        **{f"{what}_scale_{zero}": 1.0 / q for what in ("eps", "weight_decay")},
        a_scale=math.sqrt(q),
        exact=_same_batch(origin, target) and _scale_free(law),
        notes=notes,
    )


def _rate_b(target: Reference, origin: Reference, law: Law) -> float:
    """The law's multiplier of B's rate at `target`, whose base is A's at `origin`."""
    return checked_multiplier(law, replace(target.as_factor(), role="B"), origin)


def _changes(origin: Reference, target: Reference) -> list[str]:
    """The fields, beside alpha, in which the two differ as a law sees them; full finetuning has but a width."""
    if origin.method != target.method:
        return ["method"]
    seen = ("fan_in",) if target.method == "full" else ("rank", "init", "fan_in")
    return [name for name in seen if getattr(origin, name) != getattr(target, name)]


def _ratio(origin: Reference, target: Reference) -> float:
    """s/s′, and 1 where the two are equal but for rounding."""
    q = origin.scaling / target.scaling
    return 1.0 if math.isclose(q, 1.0, rel_tol=1e-12) else q


def _scale_free(law: Law) -> bool:
    """Whether the law is for updates that the gradient's scale does not move: what the two-rate form needs."""
    inner = getattr(law, "law", None)
    if isinstance(inner, Law):
        return _scale_free(inner)
    return getattr(law, "family", "sign-like") in ("sign-like", "unknown")


def _same_batch(origin: Reference, target: Reference) -> bool:
    return None in (origin.batch, target.batch) or origin.batch == target.batch


def _batch_multiplier(origin: Reference, target: Reference, law: Law) -> float:
    """What the law says of the batch, where both name one."""
    if origin.batch is None or target.batch is None:
        return 1.0
    return law.batch_multiplier(target.batch / origin.batch)


def _notes(origin: Reference, target: Reference, law: Law, changes: list[str]) -> list[str]:
    q = _ratio(origin, target)
    if changes:
        notes = [f"With another {' and '.join(_WORDS[c] for c in changes)} the rates follow the law {law.name!r}."]
    elif q == 1.0:
        notes = ["Both sides train alike, so the rates stay."]
    elif _scale_free(law):
        notes = _exact_notes(origin.init, math.sqrt(q))
    else:
        notes = ["The two rates are exact for Adam-like optimizers only."]
    if target.fan_in == _LARGE and (changes or q != 1.0):
        notes.append("No width was given: the single rate is the limit of a large one; give fan_in= for your model's.")
    if target.method == "lora" and _rate_b(target, origin, law) != checked_multiplier(law, target.as_factor(), origin):
        notes.append(f"The law {law.name!r} gives B a rate of its own; the single rate is A's.")
    if not _same_batch(origin, target):
        moved = _batch_multiplier(origin, target, law)
        notes.append(f"The batch goes from {origin.batch:g} to {target.batch:g}: every rate × {moved:.3g}, by a rule.")
    plan = make_plan(Survey((target.as_factor(),)), PlanOptions(law, tuned_at=origin, across_inits=True))
    return [*notes, *plan.notes]


def _exact_notes(drawn: str, a_scale: float) -> list[str]:
    return [
        f"One rate for both factors is approximate: a change of alpha is undone by the rate of {'AB'[drawn == 'A']} "
        f"alone, or by both tuned rates × {a_scale:.4g} with {drawn}'s initial values × {a_scale:.4g}, "
        f"eps and weight decay ÷ {a_scale:.4g}.",
        "Exactness holds for Adam-like optimizers with decoupled weight decay and without gradient clipping.",
    ]


# --- words ----------------------------------------------------------------------------------------------------------

_KEYS = {"r": "rank", "rank": "rank", "alpha": "alpha", "init": "init", "fan_in": "fan_in", "batch": "batch"}
_KINDS: Mapping[str, type] = {"rank": int, "init": str}
_OF_FULL = {"method", "fan_in", "batch"}


def parse_reference(text: str) -> Reference:
    """A reference from words: "r=16,alpha=32" with rslora, init=B, fan_in=4096, batch=64; or "full,fan_in=4096".

    Raises:
        InvalidReferenceError: a part is unknown, unreadable, given twice, missing, impossible, or not for "full".

    >>> str(parse_reference("r=16,alpha=32"))
    'rank 16, alpha 32, Init[A]'
    """
    values: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, value = _reference_entry(part)
        if name in values:
            raise InvalidReferenceError(f"{part!r} gives {name} a second time in {text!r}.", "Give each part once.")
        values[name] = value
    extra = values.keys() - _OF_FULL if "method" in values else set()
    if extra:
        raise InvalidReferenceError(
            f"Full finetuning has no {sorted(extra)[0]}, which {text!r} gives it.",
            'Write "full", with fan_in=4096 or batch=64.',
        )
    return Reference(**values)


def _reference_entry(part: str) -> tuple[str, Any]:
    """The field of `Reference` that one part names, and its value."""
    flags = {"full": ("method", "full"), "rslora": ("rslora", True)}
    if part in flags:
        return flags[part]
    key, _, value = (piece.strip() for piece in part.partition("="))
    try:
        name = _KEYS[key]
        return name, _KINDS.get(name, float)(value)
    except (KeyError, ValueError) as error:
        raise InvalidReferenceError(
            f"{part!r} is no part of a reference.",
            'Write it as "r=16,alpha=32", with rslora, init=B, fan_in=4096, batch=64; or as "full,fan_in=4096".',
        ) from error
