"""A rate without any run: published best rates, moved to another configuration by the law, with a
wide band.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .._optimizers import get_optimizer_class, known_optimizer
from .._printing import times
from .._rate import Rate
from .._types import Method, Reference, Survey
from ..errors import InvalidReferenceError, LawError, OptimizerError
from ..fitting import FULL_SD
from ..inspection import configs_of, declared_init, other_kind, survey_of, walk
from ..laws import MuA, checked_multiplier
from ..recipe import INIT_SD, RANK_SD, WIDTH_SD, Z90

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Task = Literal["chat", "other"]

NO_WIDTH = 4096.0  # the middle of the published models, used if no width is given
PUBLISHED = Reference(rank=16, alpha=32, fan_in=NO_WIDTH)
# From benchmarks/laws/suggestion.py (results/suggestion.md): log2 of the best rate at PUBLISHED,
# and the standard deviation between models after the law has moved them there, octaves.
LOG2_RATE, SPREAD = -11.45, 0.50
RANKS, WIDTHS = (1, 128), (2048, 8192)
_LAW = MuA(tokens=8.0)  # published language models prefer more tokens than the default
# Octaves by which a quoted rate lies below the middle of its band: too low a rate costs little, too
# high a rate a lot.
MARGIN = 0.5
# Standard deviations, octaves, by rules of thumb: another task, batch and horizon (small sweeps of
# narrow networks are 0.5 to 2.5 away); each octave of alpha away from 32; an unknown width.
TASK_SD, ALPHA_SD, NO_WIDTH_SD = 1.0, 0.1, 0.5

_SOURCE = (
    "It is based on published sweeps of 18 language models (tinker-cookbook: AdamW, Tulu 3 chat"
    " data, batch 128, about 780 steps, alpha 32, ranks 1 to 128, hidden sizes 2048 to 8192), moved"
    " to this configuration by the law"
)
_NARROW = (
    "To narrow it, calibrate on your own task (ra.calibrate), or fit runs you have"
    " (ra.sweeps.fit_sweep, `rankaware fit`)."
)


class Step(NamedTuple):
    """One move of the published rate.

    sd: the standard deviation that it adds, octaves. why: the reason in words. octaves: change of
    log2 of the rate. outside: whether it leaves the range of the published configurations.
    """

    sd: float
    why: str = ""
    octaves: float = 0.0
    outside: bool = False


def _between(name: str, published: float, measured: float) -> Step:
    """Return the move to the middle of two factors of plain LoRA's best rate, which is half their
    distance from both, octaves.

    published: of one 0.6B model (arXiv 2602.04998). measured: of a small one
    (benchmarks/README.md, frozen answers).
    """
    low, high = sorted((math.log2(published), math.log2(measured)))
    why = (
        f"{name}'s best rate is plain LoRA's × {published:.2g} in a published 0.6B model, and"
        f" × {measured:.2g} in a small one of ours: the middle is taken."
    )
    return Step((high - low) / 2, why, (high + low) / 2)


VARIANTS = {
    "pissa": _between("PiSSA", 1 / 10, 0.88),
    "olora": _between("OLoRA", 1 / 18, 0.80),
    "lora_ga": Step(
        2.0,
        "LoRA-GA's best rate is plain LoRA's × 0.056 in a published 0.6B model. Its factors for"
        " PiSSA and OLoRA did not hold in a small one of ours.",
        -math.log2(18),
    ),
}
DORA = _between("DoRA", 1 / 1.8, 1.5)

_MATCHED_MUON = Step(
    1.0,
    "{} has no published rate: torch's documentation reuses AdamW's with match_rms_adamw, on whole"
    " weights.",
)
# How another optimizer's rate follows from AdamW's, by the relation in the table of optimizers.
# Muon's depends on its settings.
RULES: dict[str, Step] = {
    "as AdamW": Step(0.0),
    "steps of AdamW's size": Step(
        0.5,
        "{} has no published rate: that of AdamW is used, whose steps have the same size.",
    ),
    "Lion's rule": Step(
        math.log2(10 / 2) / 2,
        "{} has no published rate: rule of thumb of its authors (Chen et al. 2023), AdamW's divided"
        " by 3 to 10. In small tasks of ours it was 2.",
        -math.log2(20) / 2,
    ),
    "schedule-free's rule": Step(
        math.log2(10) / 2,
        "{} has no published rate: rule of thumb of its authors' README, 1 to 10 times AdamW's.",
        math.log2(10) / 2,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Suggestion(Rate):
    """A rate to start from. `low` and `high` bound the best rate with about 90 % probability.

    `lr` is × 0.71 of the middle of the band. `notes` are sentences on what widens the band or moves
    the rate. Use it as `RankAwareOptimizer(model, AdamW, lr=s.lr,
    tuned_at=s.reference)`.

    Args:
        optimizer: the optimizer's name.
        reference: the configuration of the rate, without a fan-in if it was made for a model.
        fan_in: the model's width.
    """

    optimizer: str
    reference: Reference
    fan_in: float

    def explain(self) -> str:
        """Return a paragraph: the configuration, the rate, its band, its sources, and how to narrow
        it.
        """
        band = (
            f"The best rate is between {self.low:.1e} and {self.high:.1e} with about 90 %"
            " probability"
        )
        return " ".join(
            [f"{self.configuration}: start with lr {self.lr:.1e}. {band}.", *self.notes]
        )


class _Case(NamedTuple):
    """The configuration of a suggestion: a resolved reference, one of VARIANTS or "", and whether
    it is DoRA.
    """

    reference: Reference
    variant: str
    dora: bool
    notes: tuple[str, ...]


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
    """Suggest a learning rate for a model's rank, alpha, init and width, or for a `Reference`,
    without any run.

    lr = 2^(-11.45 - 0.5) · law(model; rank 16, alpha 32, fan-in 4096) · factors, with the law
    `MuA(tokens=8)`. The 90 % band is ± 1.645·√(sum of variances) octaves. Standard deviations are
    0.5 octaves between published models, 1.0 for another task, batch and horizon (0 with
    task="chat"), and those in the notes.

    Args:
        model: the model, its survey, or a `Reference`. A model's width is its most common fan-in,
            or the largest for full finetuning. With several ranks the rate is for the most common
            one. `tuned_at=suggestion.reference` moves it to the others.
        optimizer: a torch optimizer class or its name.
        settings: its settings. Muon's `adjust_lr_fn` changes the rate.
        method: "lora" or "full".
        init: "A" (B starts at zero, as in PEFT), "B" (A starts at zero), or a value of PEFT's
            `init_lora_weights` such as "pissa". By default as the model declares.
        dora: whether the adapters are DoRA. By default as the model declares.
        task: "chat" if the task is like that of the published sweeps, else "other".

    Raises:
        OptimizerError: neither a published rate nor a documented rule of thumb exists for this
            optimizer.
        LawError: no published rate is known for this init.
        InspectionError: the model has no LoRA pair.
        InvalidReferenceError: method and reference disagree.

    >>> print(f"{suggest_lr(Reference(rank=16, alpha=32, fan_in=4096)).lr:.1e}")
    2.5e-04
    """
    if task not in ("chat", "other"):
        raise InvalidReferenceError(
            f"The task is 'chat' or 'other', not {task!r}.", "Give one of the two."
        )
    name, rule = _rule(optimizer, settings or {})
    case = _case(model, method, init, dora)
    steps = [*_steps(case, task), rule._replace(why=rule.why.format(name))]
    middle = LOG2_RATE + sum(step.octaves for step in steps)
    width = case.reference.fan_in or NO_WIDTH
    reach = Z90 * math.hypot(SPREAD, *(step.sd for step in steps))
    return Suggestion(
        lr=2.0 ** (middle - MARGIN),
        low=2.0 ** (middle - reach),
        high=2.0 ** (middle + reach),
        optimizer=name,
        extrapolated=any(step.outside for step in steps),
        reference=replace(case.reference, fan_in=None),
        fan_in=width,
        configuration=f"{name}, {case.reference}, fan-in {width:g}",
        notes=(
            f"{_SOURCE}, then {times(-MARGIN)}, since too high costs more.",
            *(step.why for step in steps if step.why),
            *case.notes,
            _NARROW,
        ),
    )


# --- the optimizer --------------------------------------------------------------------------------


def _rule(
    optimizer: type[Optimizer] | str, settings: Mapping[str, Any]
) -> tuple[str, Step]:
    """Return the optimizer's name and how its rate follows from AdamW's. A subclass follows its
    base class.
    """
    # A name whose relation is known needs no installed package.
    by_name = isinstance(optimizer, str) and known_optimizer(optimizer)[1].relation
    kind = optimizer if by_name else get_optimizer_class(optimizer)
    known, row = known_optimizer(kind)
    name = kind if isinstance(kind, str) else kind.__name__
    if known == "muon" and settings.get("adjust_lr_fn") == "match_rms_adamw":
        return name, _MATCHED_MUON
    if not row.relation:
        muon = (
            " With adjust_lr_fn='match_rms_adamw' in settings Muon reuses AdamW's."
            if known == "muon"
            else ""
        )
        raise OptimizerError(
            f"No published rate is known for {name}, and no documented rule derives it from"
            " AdamW's.",
            f"Calibrate it (ra.calibrate), or fit runs you have (ra.sweeps.fit_sweep).{muon}",
        )
    return "AdamW" if name.lower() == "adamw" else name, RULES[row.relation]


# --- the configuration ----------------------------------------------------------------------------


def _case(
    model: nn.Module | Survey | Reference,
    method: Method,
    init: str | bool | None,
    dora: bool | None,
) -> _Case:
    notes: Iterable[str] = ()
    if isinstance(model, Reference):
        if method == "full" and model.method == "lora":
            raise InvalidReferenceError(
                "The reference is for LoRA, but method is 'full'.",
                "Give Reference(method='full', fan_in=...).",
            )
        reference = model
    else:
        survey, init = _read(model, method, init)
        reference = Reference(method="full") if method == "full" else survey.dominant()
        if reference.method == "full":
            reference = replace(reference, fan_in=survey.full_width())
        else:
            reference = replace(reference, fan_in=_common_width(survey))
            notes = _assumptions(survey, init)
            if dora is None:
                dora = "DoRA magnitude" in map(other_kind, survey.other)
    if init is not None:
        reference = replace(reference, init="B" if init == "B" else "A")
    return _Case(reference, _variant(init), bool(dora), tuple(notes))


def _read(
    model: object, method: Method, init: str | bool | None
) -> tuple[Survey, str | bool | None]:
    """Return a model's survey, and its init: where neither factor starts at zero, the declared
    one.
    """
    if isinstance(model, Survey):
        return model, init
    from torch import nn

    if not isinstance(model, nn.Module):
        raise InvalidReferenceError(
            f"A rate is suggested for a model, a survey or a Reference, not for {model!r}.",
            "Give one of them, such as Reference(rank=16, alpha=32, fan_in=4096).",
        )
    walked = walk(model)
    read_as: Any = init if init in ("A", "B") else None
    survey = survey_of(walked, method=method, init=read_as)
    if init is None and _neither_zero(survey):
        configs = configs_of(walked.modules).values()
        declared = (fields.get("init_lora_weights") for fields in configs)
        init = next(filter(None, map(published_init, declared)), None)
    return survey, init


def _assumptions(survey: Survey, init: str | bool | None) -> Iterator[str]:
    """Yield what is assumed of adapters.

    Raises:
        LawError: their init has no published rate.
    """
    if init is None and _neither_zero(survey):
        raise LawError(
            "Neither factor of these adapters starts at zero, and they declare no init with a"
            " published rate.",
            f"Give an init: {', '.join(map(repr, VARIANTS))}, or 'A' if B started at zero; or"
            " calibrate.",
        )
    kinds = {(f.rank, f.scaling) for f in survey.factors}
    if len(kinds) > 1:
        yield (
            f"The model has {len(kinds)} ranks or scalings: the rate is for the most common of"
            " them."
        )
    if init is None and any(f.init == "unknown" for f in survey.factors):
        yield "The init could not be read. It is assumed that B started at zero, as in PEFT."


def _common_width(survey: Survey) -> float:
    """Return the most common fan-in of the adapted layers: the published models are known by their
    hidden size.
    """
    layers = {f.layer: f.fan_in for f in survey.factors if f.kind != "embedding"}
    return Counter(layers.values()).most_common(1)[0][0] if layers else 1.0


def _neither_zero(survey: Survey) -> bool:
    """Return whether neither factor starts at zero in most pairs."""
    return 2 * sum(f.init == "other" for f in survey.factors) > len(survey.factors)


def _variant(init: str | bool | None) -> str:
    """Return the name in VARIANTS of an init, "" for "A", "B" and PEFT's names that start with B =
    0.
    """
    if init in (None, "A", "B") or declared_init(init, "linear") == "A":
        return ""
    variant = published_init(init)
    if variant is None:
        raise LawError(
            f"No published rate is known for the init {init!r}.",
            f"Known are 'A', 'B', {', '.join(map(repr, VARIANTS))}; or calibrate (ra.calibrate).",
        )
    return variant


def published_init(declared: object) -> str | None:
    """Return the name in VARIANTS for a value of PEFT's `init_lora_weights`; None if there is none.

    >>> published_init("pissa_niter_16"), published_init("corda")
    ('pissa', None)
    """
    name = str(declared).lower().replace("-", "_").partition("_niter_")[0]
    return name if name in VARIANTS else None


# --- the moves ------------------------------------------------------------------------------------


def _steps(case: _Case, task: Task) -> Iterator[Step]:
    """Yield the moves from the published configuration to the case."""
    at = case.reference
    if at.fan_in is None:
        at = replace(at, fan_in=NO_WIDTH)
        yield Step(NO_WIDTH_SD, f"No width was given: fan-in {NO_WIDTH:g} is assumed.")
    multiplier = checked_multiplier(_LAW, at.as_factor(), PUBLISHED)
    yield Step(0.0, octaves=math.log2(multiplier))
    if task == "other":
        yield Step(
            TASK_SD,
            "Your task, batch and horizon differ from theirs, which widens the band most.",
        )
    if at.method == "lora":
        yield from _lora_steps(case, at.rank or 1, at.fan_in or 1.0)
        return
    if case.variant or case.dora:
        raise InvalidReferenceError(
            "Full finetuning has neither an init nor DoRA.", "Leave them out."
        )
    low, high = WIDTHS
    feed_forward = 4 * high
    yield from _outside("fan-in", at.fan_in or 1.0, (low, feed_forward), WIDTH_SD)
    yield Step(
        FULL_SD["A"],
        "For full finetuning it is the law's rate, derived from LoRA: no sweep of full finetuning"
        " supports it, and too high costs more than too low.",
    )


def _lora_steps(case: _Case, rank: int, fan_in: float) -> Iterator[Step]:
    at = case.reference
    yield from _outside("fan-in", fan_in, WIDTHS, WIDTH_SD)
    yield from _outside("rank", rank, RANKS, RANK_SD)
    yield Step(ALPHA_SD * abs(math.log2(at.scaling * rank / (PUBLISHED.alpha or 1.0))))
    if at.init == "B":
        yield Step(
            INIT_SD,
            "All used B = 0: µA moves the rate to A = 0, where low ranks needed more in our tasks.",
        )
    if case.variant:
        yield VARIANTS[case.variant]
    if case.dora:
        yield DORA


def _outside(
    what: str, value: float, known: tuple[float, float], sd: float
) -> Iterator[Step]:
    low, high = known
    octaves = max(0.0, math.log2(low / value), math.log2(value / high))
    if octaves:
        yield Step(
            sd * octaves,
            f"The {what} {value:g} is outside theirs ({low:g} to {high:g}).",
            outside=True,
        )
