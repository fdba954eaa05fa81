"""A rate without any run: published best rates, moved to another configuration by the law, with a
wide band.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from .._optimizers import get_optimizer_class, in_force, known_optimizer
from .._printing import times
from .._rate import Rate
from .._types import LAWLESS, Method, Reference, Survey, Task, dense
from ..errors import InvalidReferenceError, LawError, OptimizerError
from ..fitting import FULL_SD
from ..inspection import declared_init, inspect_model, other_kind
from ..laws import MuA, checked_multiplier
from ..recipe import ANY_WIDTH, INIT_SD, RANK_SD, WIDTH_SD, Z90

if TYPE_CHECKING:
    from torch.optim import Optimizer

# the middle of the published models
PUBLISHED = Reference(rank=16, alpha=32, fan_in=ANY_WIDTH)
# From benchmarks/laws/suggestion.py (results/suggestion.md): log2 of the best rate at PUBLISHED,
# and the standard deviation between models after the law has moved them there, octaves.
LOG2_RATE, SPREAD = -11.45, 0.50
RANKS, WIDTHS = (1, 128), (2048, 8192)
_LAW = MuA(tokens=8.0)  # published language models prefer more tokens than the default
# Octaves by which a quoted rate lies below the middle of its band: too low a rate costs little, too
# high a rate a lot. By hand; results/suggestion.md has what others would lose.
MARGIN = 0.5
# Standard deviations, octaves, by rules of thumb: another task, batch and horizon (narrow networks'
# best rates lie 1.4 above the middle in the mean; raising theirs lost more: frozen answers);
# each octave of alpha away from 32; an unknown width.
TASK_SD, ALPHA_SD, NO_WIDTH_SD = 1.0, 0.1, 0.5
# Reinforcement learning with LoRA: octaves from the published rate, and their standard deviation.
# By it the rates quoted for the three ranks of a published GRPO lie around the middle of where its
# accuracy is flat (results/large_models.md). The band is wide enough for the study's small task,
# whose best rates lie 2.5 octaves higher (results/suggestion.md).
RL_OCTAVES, RL_SD = -2.5, 1.5

_SOURCE = (
    "It is based on published sweeps of 35 language models (tinker-cookbook: AdamW, Tulu 3 chat"
    " data, batch 128, about 780 steps, alpha 32, ranks 1 to 128, hidden sizes 2048 to 8192), moved"
    " to this configuration by the law"
)
_RL = (
    f"For reinforcement learning LoRA's rate is {times(RL_OCTAVES)}: in GRPO on a 1.7B with alpha"
    " 32 accuracy was flat from 3e-5 to 1e-4, and runs collapsed from 2e-4 on. On a small task of"
    " ours higher rates were best."
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


def _middle(low: float, high: float) -> tuple[float, float]:
    """Return the middle of two factors and half their distance, octaves."""
    ends = math.log2(low), math.log2(high)
    return (ends[1] + ends[0]) / 2, (ends[1] - ends[0]) / 2


# Octaves from the rate of AdamW and plain LoRA, and their standard deviation. Of an init and DoRA:
# from the factor in a published 0.6B model (arXiv 2602.04998) to that in a small one of ours
# (benchmarks/README.md, frozen answers); in a published 1B model PiSSA's lies between
# (results/large_models.md). LoRA-GA was published only.
VARIANTS = {
    "pissa": _middle(1 / 10, 0.88),
    "olora": _middle(1 / 18, 0.80),
    "lora_ga": (-math.log2(18), 2.0),
}
DORA = _middle(1 / 1.8, 1.5)
# Of an optimizer, by its relation in the table of optimizers.
RULES = {
    "as AdamW": (0.0, 0.0),
    "steps of AdamW's size": (0.0, 0.5),
    # 1/10 (Chen et al. 2023 say 1/10 to 1/3) to 1/2, as in small tasks of ours
    "Lion's rule": (-math.log2(20) / 2, math.log2(10 / 2) / 2),
    "schedule-free's rule": _middle(1, 10),  # its authors' README
}
# torch's documentation reuses AdamW's rate, on whole weights
_MATCHED_MUON = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Suggestion(Rate):
    """A rate to start from. `low` and `high` bound the best rate with about 90 % probability.

    `lr` is × 0.71 of the middle of the band. `notes` are sentences on what widens the band or moves
    the rate. Use it as `RankAwareOptimizer(model, AdamW, lr=s.lr,
    tuned_at=s.reference)`.

    Args:
        reference: the configuration of the rate, without a fan-in.
    """

    reference: Reference


def suggest_lr(
    model: Any,
    optimizer: type[Optimizer] | str = "adamw",
    *,
    settings: Mapping[str, Any] | None = None,
    method: Method = "lora",
    init: str | bool | None = None,
    dora: bool | None = None,
    task: Task | None = None,
) -> Suggestion:
    """Suggest a learning rate for a model's rank, alpha, init and width, or for a `Reference`,
    without any run.

    lr = 2^(-11.45 - 0.5) · law(model; rank 16, alpha 32, fan-in 4096) · factors, with the law
    `MuA(tokens=8)`. The 90 % band is ± 1.645·√(sum of variances) octaves. Standard deviations are
    0.5 octaves between published models, 1.0 for another task and horizon (0 with
    task="chat"), and those in the notes. With task="rl" LoRA's rate is × 2^-2.5, and the standard
    deviation 1.5 in place of 1.0.

    Args:
        model: the model, its survey, a `Reference`, or a built trainer, which gives its model and
            task. Its hidden size is its most common fan-in, or the largest for full finetuning.
            With several ranks the rate is for the most common one.
            `tuned_at=suggestion.reference` moves it to the others.
        optimizer: a torch optimizer class or its name.
        settings: its settings. Muon's `adjust_lr_fn` changes the rate.
        method: "lora" or "full".
        init: "A" (B starts at zero, as in PEFT), "B" (A starts at zero), or a value of PEFT's
            `init_lora_weights` such as "pissa". Needed if neither factor starts at zero.
        dora: whether the adapters are DoRA. By default as the model declares.
        task: "chat" if the task is like that of the published sweeps, "rl" for reinforcement
            learning (GRPO, RLOO), else "other". By default "rl" for a trainer with `reward_funcs`,
            else "other".

    Raises:
        OptimizerError: neither a published rate nor a documented rule of thumb exists for this
            optimizer.
        LawError: no published rate is known for this init.
        InspectionError: the model has no LoRA pair.
        InvalidReferenceError: method and reference disagree.

    >>> print(f"{suggest_lr(Reference(rank=16, alpha=32, fan_in=4096)).lr:.1e}")
    2.5e-04
    """
    if task is None:
        task = "rl" if hasattr(model, "reward_funcs") else "other"
    if task not in get_args(Task):
        raise InvalidReferenceError(
            f"The task is 'chat', 'other' or 'rl', not {task!r}.",
            "Give one of the three.",
        )
    name, rule = _rule(optimizer, settings)
    known = (
        model
        if isinstance(model, (Reference, Survey))
        else _survey(model, method, init)
    )
    at, dora, notes = _configuration(known, method, init, dora)
    if init is not None:
        at = replace(at, init="B" if init == "B" else "A")
    steps = [
        *_steps(at, task),
        *_variants(at, init, dora),
        _by_factor(name, *rule),
    ]
    middle = LOG2_RATE + sum(step.octaves for step in steps)
    width = at.fan_in or ANY_WIDTH
    reach = Z90 * math.hypot(SPREAD, *(step.sd for step in steps))
    return Suggestion(
        lr=2.0 ** (middle - MARGIN),
        low=2.0 ** (middle - reach),
        high=2.0 ** (middle + reach),
        extrapolated=any(step.outside for step in steps),
        reference=replace(at, fan_in=None),
        configuration=f"{name}, {at}, fan-in {width:g}",
        notes=(
            f"{_SOURCE}, with a margin of {times(-MARGIN)}, since too high costs more.",
            *(step.why for step in steps if step.why),
            *notes,
            _NARROW,
        ),
    )


# --- the optimizer --------------------------------------------------------------------------------


def _rule(
    optimizer: type[Optimizer] | str, settings: Mapping[str, Any] | None
) -> tuple[str, tuple[float, float]]:
    """Return the optimizer's name and how its rate follows from AdamW's. A subclass follows its
    base class.
    """
    # A name whose relation is known needs no installed package.
    is_name, row = isinstance(optimizer, str), known_optimizer(optimizer)[1]
    if is_name and row.one_rate:
        raise OptimizerError(
            f"No rate is suggested for {optimizer}, which {row.one_rate}.",
            "Leave its lr at its own default, or take a rate for adamw.",
        )
    kind = optimizer if is_name and row.relation else get_optimizer_class(optimizer)
    row = known_optimizer(kind)[1]
    name = kind if isinstance(kind, str) else kind.__name__
    of_muon = in_force(kind, settings).get("adjust_lr_fn")
    if row.family == "spectral" and of_muon == "match_rms_adamw":
        return name, _MATCHED_MUON
    if not row.relation:
        raise OptimizerError(
            f"No published rate is known for {name}, and no documented rule derives it from"
            " AdamW's.",
            "Calibrate it (ra.calibrate), or fit runs you have (ra.sweeps.fit_sweep). Muon reuses"
            " AdamW's with adjust_lr_fn='match_rms_adamw' in settings.",
        )
    return "AdamW" if name.lower() == "adamw" else name, RULES[row.relation]


# --- a model --------------------------------------------------------------------------------------


def _configuration(
    known: Survey | Reference,
    method: Method,
    init: str | bool | None,
    dora: bool | None,
) -> tuple[Reference, bool | None, Iterable[str]]:
    """Return the configuration, whether it is DoRA, and what is assumed."""
    if isinstance(known, Reference):
        if method == "full" and known.method == "lora":
            raise InvalidReferenceError(
                "The reference is for LoRA, but method is 'full'.",
                "Give Reference(method='full', fan_in=...).",
            )
        return known, dora, ()
    at = Reference(method="full") if method == "full" else known.dominant()
    if at.method == "full":
        return replace(at, fan_in=known.full_width()), dora, ()
    if dora is None:
        dora = "DoRA magnitude" in map(other_kind, known.other)
    # the most common width: published models are known by their hidden size
    layers = {f.layer: f.fan_in for f in dense(known.factors)}
    [(width, _)] = Counter(layers.values()).most_common(1) or [(1.0, 0)]
    return replace(at, fan_in=width), dora, _assumptions(known, init)


def _survey(model: object, method: Method, init: str | bool | None) -> Survey:
    from torch import nn

    if not isinstance(model, nn.Module):
        model = getattr(model, "model", model)  # of a trainer
    if not isinstance(model, nn.Module):
        raise InvalidReferenceError(
            f"A rate is suggested for a model, a survey or a Reference, not for {model!r}.",
            "Give one of them, such as Reference(rank=16, alpha=32, fan_in=4096).",
        )
    read_as: Any = init if init in ("A", "B") else None
    return inspect_model(model, method=method, init=read_as)


def _assumptions(survey: Survey, init: str | bool | None) -> Iterator[str]:
    """Yield what is assumed of adapters.

    Raises:
        LawError: neither factor starts at zero, and no init is given, or some pairs add more than
            s·B·A.
    """
    lawless = sorted({LAWLESS[f.kind] for f in survey.factors if f.kind in LAWLESS})
    if lawless:
        raise LawError(
            f"No law covers {' and '.join(lawless)}, so no rate is known for it.",
            "Calibrate.",
        )
    kinds = {(f.rank, f.scaling) for f in survey.factors}
    if len(kinds) > 1:
        yield (
            f"The model has {len(kinds)} ranks or scalings: the rate is for the most common of"
            " them."
        )
    inits = Counter(f.init for f in survey.factors)
    if init is None and 2 * inits["other"] > inits.total():
        raise LawError(
            "Neither factor of these adapters starts at zero, so their init must be known.",
            f"Give an init: {', '.join(map(repr, VARIANTS))}, or 'A' if B started at zero; or"
            " calibrate.",
        )
    if init is None and inits["unknown"]:
        yield "The init could not be read. It is assumed that B started at zero, as in PEFT."


def published_init(declared: object) -> str | None:
    """Return the name in VARIANTS for a value of PEFT's `init_lora_weights`; None if there is none.

    >>> published_init("pissa_niter_16"), published_init("corda")
    ('pissa', None)
    """
    name = str(declared).lower().replace("-", "_").partition("_niter_")[0]
    return name if name in VARIANTS else None


# --- the moves ------------------------------------------------------------------------------------


def _steps(at: Reference, task: Task) -> Iterator[Step]:
    """Yield the moves from the published configuration to another."""
    width = at.fan_in or ANY_WIDTH
    if at.fan_in is None:
        yield Step(NO_WIDTH_SD, f"No width was given: fan-in {ANY_WIDTH:g} is assumed.")
        at = replace(at, fan_in=width)
    multiplier = checked_multiplier(_LAW, at.as_factor(), PUBLISHED)
    yield Step(0.0, octaves=math.log2(multiplier))
    if task == "rl" and at.method == "lora":
        yield Step(RL_SD, _RL, RL_OCTAVES)
    elif task != "chat":
        yield Step(
            TASK_SD,
            "Your task and horizon differ from theirs, which widens the band most.",
        )
    low, high = WIDTHS
    if at.method == "full":
        feed_forward = 4 * high
        yield from _outside("fan-in", width, (low, feed_forward), WIDTH_SD)
        yield Step(
            FULL_SD["A"],
            "For full finetuning it is the law's rate, derived from LoRA: on three published models"
            " the best one was 0.8 to 2.6 times it, and too high costs more than too low.",
        )
        return
    rank, alpha = at.rank or 1, PUBLISHED.alpha or 1.0
    yield from _outside("fan-in", width, WIDTHS, WIDTH_SD)
    yield from _outside("rank", rank, RANKS, RANK_SD)
    yield Step(ALPHA_SD * abs(math.log2(at.scaling * rank / alpha)))
    if at.init == "B":
        yield Step(
            INIT_SD,
            "All used B = 0: µA moves the rate to A = 0, where low ranks needed more in our tasks.",
        )


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


def _variants(
    at: Reference, init: str | bool | None, dora: bool | None
) -> Iterator[Step]:
    """Yield the moves to an init of PEFT and to DoRA.

    Raises:
        InvalidReferenceError: full finetuning has neither.
        LawError: no rate is published for the init.
    """
    variant = published_init(init)
    starts_at_zero = init in (None, "A", "B") or declared_init(init, "linear") == "A"
    if variant is None and not starts_at_zero:
        raise LawError(
            f"No published rate is known for the init {init!r}.",
            f"Known are 'A', 'B', {', '.join(map(repr, VARIANTS))}; or calibrate (ra.calibrate).",
        )
    if at.method == "full" and (variant or dora):
        raise InvalidReferenceError(
            "Full finetuning has neither an init nor DoRA.", "Leave them out."
        )
    if variant:
        yield _by_factor(str(init), *VARIANTS[variant])
    if dora:
        yield _by_factor("DoRA", *DORA)


def _by_factor(what: str, octaves: float, sd: float) -> Step:
    """Return the move by a factor that is known to lie within a range."""
    if not sd:
        return Step(0.0, octaves=octaves)
    low, high = 2.0 ** (octaves - sd), 2.0 ** (octaves + sd)
    why = (
        f"For {what} the rate of AdamW and plain LoRA is multiplied by {low:.2g} to {high:.2g}: the"
        " middle is taken."
    )
    return Step(sd, why, octaves)
