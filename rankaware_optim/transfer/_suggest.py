"""A rate before any run: published best rates moved by the law to another configuration, with an honest, wide band."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .._optimizer_classes import get_optimizer_class
from .._optimizers import known_optimizer
from .._rate import Rate
from .._types import Method, Reference, Survey
from ..errors import InvalidReferenceError, LawError, OptimizerError
from ..inspection import declared_init, declared_inits, other_kind, survey_of, walk
from ..laws import MuA, checked_multiplier
from ..recipe import FULL_SD, INIT_SD, RANK_SD, WIDTH_SD, Z90

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Task = Literal["chat", "other"]

NO_WIDTH = 4096.0  # theirs in the middle: taken where none is given
PUBLISHED = Reference(rank=16, alpha=32, fan_in=NO_WIDTH)
# Made by benchmarks/laws/suggestion.py (results/suggestion.md): log2 of the best rate at PUBLISHED, and the standard
# deviation between models once the law has moved them there, octaves.
LOG2_RATE, SPREAD = -11.45, 0.50
RANKS, WIDTHS = (1, 128), (2048, 8192)
# Octaves by which a rate quoted lies below the middle of its band: one too low costs little, one too high everything.
LEAN = 0.5
# Standard deviations, octaves, by rules of thumb: another task, batch and horizon (small sweeps of narrow networks lie
# 0.5 to 2.5 away); each octave of alpha away from 32; a width left out.
TASK_SD, ALPHA_SD, NO_WIDTH_SD = 1.0, 0.1, 0.5

_SOURCE = (
    "It stands on published sweeps of 18 language models (tinker-cookbook: AdamW, Tulu 3 chat data, batch 128, about "
    "780 steps, alpha 32, ranks 1 to 128, hidden sizes 2048 to 8192), moved here by the law"
)
_NARROW = (
    "To narrow it, calibrate on your own task (ra.calibrate), or fit runs you have (ra.sweeps.fit_sweep, "
    "`rankaware fit`)."
)


class Step(NamedTuple):
    """One move of the published rate, in octaves, the standard deviation that it adds, and why in words.

    outside: whether it leads outside what was published.
    """

    octaves: float
    sd: float
    why: str = ""
    outside: bool = False


_ONE_STUDY = "published best rate is plain LoRA's divided by {} (one 0.6B model)."
VARIANTS = {
    "pissa": Step(-math.log2(10), 1.0, f"PiSSA's {_ONE_STUDY.format(10)}"),
    "olora": Step(-math.log2(18), 1.0, f"OLoRA's {_ONE_STUDY.format(18)}"),
    "lora_ga": Step(-math.log2(18), 1.0, f"LoRA-GA's {_ONE_STUDY.format(18)}"),
}
DORA = Step(-math.log2(1.8), 0.5, f"DoRA's {_ONE_STUDY.format(1.8)}")

_MATCHED_MUON = Step(
    0.0, 1.0, "{} has no published rate: torch's documentation reuses AdamW's with match_rms_adamw, on whole weights."
)
# How another optimizer's rate follows from AdamW's, by the table of optimizers. Muon's is decided by its settings.
RULES: dict[str, Step] = {
    "as AdamW": Step(0.0, 0.0),
    "steps of AdamW's size": Step(
        0.0, 0.5, "{} has no published rate of its own: it is taken as AdamW, whose steps have the same size."
    ),
    "Lion's rule": Step(
        -math.log2(30) / 2,
        math.log2(10 / 3) / 2,
        "{} has no published rate: rule of thumb of its authors (Chen et al. 2023), AdamW's divided by 3 to 10.",
    ),
    "schedule-free's rule": Step(
        math.log2(10) / 2,
        math.log2(10) / 2,
        "{} has no published rate: rule of thumb of its authors' README, 1 to 10 times AdamW's.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Suggestion(Rate):
    """A rate to start from. `low` and `high` bound the best rate with about 90 %; `lr` lies half an octave low in it.

    `reference` is the configuration it is for, on the model it was asked for and therefore without a fan-in:
    `RankAwareOptimizer(model, AdamW, lr=s.lr, tuned_at=s.reference)`. `fan_in` is the width it was seen at.
    `notes` are what widens the band or moved the rate, a sentence each; printed, all of it is a short paragraph.
    """

    optimizer: str
    reference: Reference
    fan_in: float

    def explain(self) -> str:
        """What it is for, the rate, its band, what stands behind it, and how to narrow it, in a paragraph."""
        where = f"{self.optimizer}, {self.reference}, fan-in {self.fan_in:g}"
        band = f"the best rate lies between {self.low:.1e} and {self.high:.1e} with about 90 %"
        return " ".join([f"{where}: start with lr {self.lr:.1e}; {band}.", *self.notes, _NARROW])


class _Case(NamedTuple):
    """What a rate is asked for: a resolved reference, one of VARIANTS or none, and whether it is DoRA."""

    reference: Reference
    variant: str = ""
    dora: bool = False
    notes: tuple[str, ...] = ()


def suggest_lr(
    model: nn.Module | Survey | Reference,
    optimizer: type[Optimizer] | str = "adamw",
    *,
    settings: Mapping[str, Any] | None = None,
    method: Method = "lora",
    init: str | bool | None = None,
    dora: bool | None = None,
    task: Task = "other",
) -> Suggestion:
    """A learning rate for a model's rank, alpha, init and width, or for a `Reference`, without a single run.

    lr = 2^(-11.45 - 0.5) · law(model; rank 16, alpha 32, fan-in 4096) · factors, the law being `MuA()`. The 90 % band
    is ± 1.645·√(sum of variances), octaves: 0.5 between published models, 1.0 for another task, batch and
    horizon than theirs (none with task="chat"), and what the notes name. The model's own width is its commonest
    fan-in, which is the hidden size; full finetuning takes the largest. A model of several ranks is answered for the
    commonest: let `tuned_at=suggestion.reference` move the rate to the others.

    optimizer: a class, or a name; `settings` are its arguments (Muon's `adjust_lr_fn` matters). init: "A", "B", or a
    value of PEFT's `init_lora_weights` such as "pissa"; by default as the model declares. dora: as the model has it.

    Raises:
        OptimizerError: no published rate and no documented rule of thumb leads to this optimizer.
        LawError: no published rate is known for this init.
        InspectionError: the model holds no LoRA pair; InvalidReferenceError: method and reference disagree.

    >>> print(f"{suggest_lr(Reference(rank=16, alpha=32, fan_in=4096)).lr:.1e}")
    2.5e-04
    """
    if task not in ("chat", "other"):
        raise InvalidReferenceError(f"The task is 'chat' or 'other', not {task!r}.", "Give one of the two.")
    name, rule = _rule(optimizer, settings or {})
    case = _case(model, method, init, dora)
    steps = [*_steps(case, task), rule._replace(why=rule.why.format(name))]
    middle = LOG2_RATE + sum(step.octaves for step in steps)
    reach = Z90 * math.hypot(SPREAD, *(step.sd for step in steps))
    return Suggestion(
        lr=2.0 ** (middle - LEAN),
        low=2.0 ** (middle - reach),
        high=2.0 ** (middle + reach),
        optimizer=name,
        extrapolated=any(step.outside for step in steps),
        reference=replace(case.reference, fan_in=None),
        fan_in=case.reference.fan_in or NO_WIDTH,
        notes=(f"{_SOURCE}, half an octave low.", *(step.why for step in steps if step.why), *case.notes),
    )


# --- the optimizer --------------------------------------------------------------------------------------------------


def _rule(optimizer: type[Optimizer] | str, settings: Mapping[str, Any]) -> tuple[str, Step]:
    """The optimizer's name and how its rate follows from AdamW's. A subclass follows its base."""
    by_name = isinstance(optimizer, str) and known_optimizer(optimizer)[1].relation  # its package need not be there
    kind = optimizer if by_name else get_optimizer_class(optimizer)
    (known, row), name = known_optimizer(kind), kind if isinstance(kind, str) else kind.__name__
    if known == "muon" and settings.get("adjust_lr_fn") == "match_rms_adamw":
        return name, _MATCHED_MUON
    if not row.relation:
        muon = " With adjust_lr_fn='match_rms_adamw' in settings Muon reuses AdamW's." if known == "muon" else ""
        raise OptimizerError(
            f"No published rate is known for {name}, and no documented rule leads to it from AdamW's.",
            f"Calibrate it (ra.calibrate), or fit runs you have (ra.sweeps.fit_sweep).{muon}",
        )
    return "AdamW" if name.lower() == "adamw" else name, RULES[row.relation]


# --- the configuration ----------------------------------------------------------------------------------------------


def _case(model: nn.Module | Survey | Reference, method: Method, init: str | bool | None, dora: bool | None) -> _Case:
    if isinstance(model, Reference):
        if method == "full" and model.method == "lora":
            raise InvalidReferenceError(
                "The reference is one of LoRA, and method is 'full'.", "Give Reference(method='full', fan_in=...)."
            )
        return _with_init(_Case(model, dora=bool(dora)), init)
    if isinstance(model, Survey):
        return _surveyed(model, method, init, dora)
    from torch import nn

    if not isinstance(model, nn.Module):
        raise InvalidReferenceError(
            f"A rate is suggested for a model, a survey or a Reference, not for {model!r}.",
            "Give one of them, as Reference(rank=16, alpha=32, fan_in=4096).",
        )
    walked = walk(model)
    survey = survey_of(walked, method=method, init=init if init in ("A", "B") else None)  # type: ignore[arg-type]
    if init is None and _neither_zero(survey):
        init = next(filter(None, map(published_init, declared_inits(walked.modules).values())), None)
    return _surveyed(survey, method, init, dora)


def _surveyed(survey: Survey, method: Method, init: str | bool | None, dora: bool | None) -> _Case:
    reference = Reference(method="full") if method == "full" else survey.dominant()
    if reference.method == "full":
        return _with_init(_Case(replace(reference, fan_in=survey.full_width()), dora=bool(dora)), init)
    if init is None and _neither_zero(survey):
        raise LawError(
            "Neither factor of these adapters starts at zero, and they declare no init of which a rate is published.",
            f"Say it by init=: {', '.join(map(repr, VARIANTS))}, or 'A' where B started at zero; or calibrate.",
        )
    kinds = {(f.rank, f.scaling) for f in survey.factors}
    notes = []
    if len(kinds) > 1:
        notes.append(f"The model holds {len(kinds)} ranks or scalings: the rate is for the commonest of them.")
    if init is None and any(f.init == "unknown" for f in survey.factors):
        notes.append("The init could not be read: Init[A] is assumed.")
    has_dora = any(other_kind(name) == "DoRA magnitude" for name in survey.other) if dora is None else dora
    # The commonest fan-in of the adapted layers: what is known of the published models is their hidden size.
    layers = {f.layer: f.fan_in for f in survey.factors if f.kind != "embedding"}
    found = replace(reference, fan_in=Counter(layers.values()).most_common(1)[0][0] if layers else 1.0)
    return _with_init(_Case(found, dora=has_dora, notes=tuple(notes)), init)


def _neither_zero(survey: Survey) -> bool:
    """Whether most pairs start with neither factor at zero."""
    return 2 * sum(f.init == "other" for f in survey.factors) > len(survey.factors)


def _with_init(case: _Case, init: str | bool | None) -> _Case:
    """The case under an init by name: A, B, PEFT's that start as A, or one of VARIANTS."""
    if init is None:
        return case
    if init == "B":
        return case._replace(reference=replace(case.reference, init="B"))
    case = case._replace(reference=replace(case.reference, init="A"))
    if init == "A" or declared_init(init, "linear") == "A":
        return case
    variant = published_init(init)
    if variant is None:
        raise LawError(
            f"No published rate is known for the init {init!r}.",
            f"Known are 'A', 'B', {', '.join(map(repr, VARIANTS))}; or calibrate (ra.calibrate).",
        )
    return case._replace(variant=variant)


def published_init(declared: object) -> str | None:
    """The name in VARIANTS of a value of PEFT's `init_lora_weights`, None where it is none of them.

    >>> published_init("pissa_niter_16"), published_init("corda")
    ('pissa', None)
    """
    name = str(declared).lower().replace("-", "_").partition("_niter_")[0]
    return name if name in VARIANTS else None


# --- the moves ------------------------------------------------------------------------------------------------------


def _steps(case: _Case, task: Task) -> Iterator[Step]:
    """From the published configuration to the case."""
    at = case.reference
    if at.fan_in is None:
        at = replace(at, fan_in=NO_WIDTH)
        yield Step(0.0, NO_WIDTH_SD, f"No width was given: fan-in {NO_WIDTH:g} is assumed.")
    yield Step(math.log2(checked_multiplier(MuA(), at.as_factor(), PUBLISHED)), 0.0)
    if task == "other":
        yield Step(0.0, TASK_SD, "Your task, batch and horizon are not theirs, which widens the band most.")
    if at.method == "lora":
        yield from _lora_steps(case, at.rank or 1, at.fan_in or 1.0)
        return
    if case.variant or case.dora:
        raise InvalidReferenceError("Full finetuning has neither an init nor DoRA.", "Leave init= and dora= out.")
    low, high = WIDTHS
    yield from _outside("fan-in", at.fan_in or 1.0, (low, 4 * high), WIDTH_SD)  # of feed-forward layers
    yield Step(
        0.0,
        FULL_SD["A"],
        "For full finetuning it is the law's point, seen from LoRA: no sweep of it stands behind this, and too high "
        "costs more than too low.",
    )


def _lora_steps(case: _Case, rank: int, fan_in: float) -> Iterator[Step]:
    at = case.reference
    yield from _outside("fan-in", fan_in, WIDTHS, WIDTH_SD)
    yield from _outside("rank", rank, RANKS, RANK_SD)
    yield Step(0.0, ALPHA_SD * abs(math.log2(at.scaling * rank / (PUBLISHED.alpha or 1.0))))
    if at.init == "B":
        yield Step(
            0.0, INIT_SD, "All used Init[A]: µA carries the rate to Init[B], where in our tasks low ranks like more."
        )
    if case.variant:
        yield VARIANTS[case.variant]
    if case.dora:
        yield DORA


def _outside(what: str, value: float, known: tuple[float, float], sd: float) -> Iterator[Step]:
    low, high = known
    octaves = max(0.0, math.log2(low / value), math.log2(value / high))
    if octaves:
        yield Step(0.0, sd * octaves, f"The {what} {value:g} lies outside theirs ({low:g} to {high:g}).", outside=True)
