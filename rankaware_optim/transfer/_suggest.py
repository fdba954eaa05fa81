"""A learning rate without any run, with a wide interval: published best learning rates of LoRA,
converted by the scaling law, and published ones of full finetuning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from statistics import mode
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from .. import trainers
from .._checks import (
    PUBLISHED_INITS,
    check_choice,
    check_range,
    is_positive,
    plain,
    shown,
)
from .._near_misses import explain_near_misses
from .._optimizers import get_optimizer_class, in_force, known_optimizer
from .._printing import times
from .._rate import Rate
from .._types import Method, Reference, Task
from ..errors import InvalidReferenceError, LawError, OptimizerError
from ..fitting import FULL_SD
from ..inspection import (
    LAWLESS,
    Survey,
    declared_init,
    inspect_model,
    other_kind,
    without_embeddings,
)
from ..laws import FULL_TRUST, MuA, checked_multiplier
from ..recipe import ANY_WIDTH, INIT_SD, RANK_SD, WIDTH_SD, Z90, Judgement

if TYPE_CHECKING:
    from torch.optim import Optimizer

# the middle of the published models
ALPHA = 32.0
PUBLISHED = Reference(rank=16, alpha=ALPHA, fan_in=ANY_WIDTH)
# From benchmarks/laws/suggestion.py (results/suggestion.md): log2 of the best rate at PUBLISHED,
# and the standard deviation between models after the law has moved them there, octaves.
LOG2_RATE, SPREAD = -11.45, 0.50
RANKS, WIDTHS = (1, 128), (2048, 8192)
# Full finetuning has published learning rates of its own, from benchmarks/laws/full_finetuning.py
# (results/full_finetuning.md): log2 of the best one in supervised finetuning at 780 steps, whatever
# the width, and the standard deviation between groups that were left out, octaves.
FULL_LOG2_RATE, FULL_SPREAD = -15.13, 0.76
# The same in DPO, on four models of two groups.
DPO_LOG2_RATE, DPO_SPREAD = -19.79, 0.6
# GRPO's best learning rates differ by a factor of 43 between five sources. The interval reaches
# half an octave beyond them. None loses at most 5 points of accuracy on all: the lowest is quoted.
FULL_RL, FULL_RL_LOW, FULL_RL_HIGH = 1.2e-6, 4.9e-7, 4.2e-5
# The largest fan-in of the narrowest network among them. Below it full finetuning's learning rate
# is LoRA's, converted by the law, which is nearer on the study's networks.
FULL_WIDTHS = (3072, 4 * 8192)
_LAW = MuA(tokens=8.0)  # published language models prefer more tokens than the default
# Octaves by which a quoted rate lies below the middle of its interval: too low a rate costs
# little, too high a rate a lot. By hand; benchmarks/answers.md has what
# others lose.
MARGIN = 0.5
# Standard deviations, octaves, by rules of thumb: another task, batch and horizon (narrow networks'
# best rates lie 1.4 above the middle in the mean; raising theirs lost more: benchmarks/answers.md);
# each octave of alpha away from 32; an unknown width.
TASK_SD, ALPHA_SD, NO_WIDTH_SD = 1.0, 0.1, 0.5
# Reinforcement learning with LoRA: octaves from the published rate, and their standard deviation.
# By it the rates quoted for the three ranks of a published GRPO lie around the middle of where its
# accuracy is flat (results/large_models.md). The band is wide enough for the study's small task,
# whose best rates lie 2.5 octaves higher (results/suggestion.md).
RL_OCTAVES, RL_SD = -2.5, 1.5
# Longer runs than theirs: octaves of rate for each octave of steps beyond. Sources on large
# models name 0 to -0.9 (benchmarks/answers.md), and this is the middle. Then the standard deviation
# of six sources' exponents, widened for so few (results/full_finetuning.md). Shorter runs keep the
# learning rate, since one that is too high costs more.
STEPS, LONGER, LENGTH_SD = 780, -0.4, 0.45

_SOURCE = (
    "The learning rate is based on published sweeps of 35 language models (tinker-cookbook: AdamW,"
    " Tulu 3 chat data, batch 128, about 780 steps, alpha 32, ranks 1 to 128, hidden sizes 2048 to"
    " 8192). The scaling law converts it to this configuration"
)
_RL = (
    f"For reinforcement learning LoRA's learning rate is {times(RL_OCTAVES)} that of other tasks."
    " In"
    " GRPO on a 1.7B model with alpha 32, accuracy was flat from 3e-5 to 1e-4, and runs collapsed"
    " from 2e-4 on. On a small task of ours higher learning rates were best."
)
_UNREAD = (
    "The init could not be read. It is assumed that B started at zero, as in PEFT."
)
_NARROW = (
    "To narrow it, calibrate on your own task (ra.calibrate), or fit runs you have"
    " (ra.sweeps.fit_sweep, `rankaware fit`)."
)
_FULL_SOURCE = (
    "The learning rate is based on full finetuning itself: six groups published their best learning"
    " rates for supervised finetuning of language models of 0.6B to 32B. The fit to them is"
    f" {2.0**FULL_LOG2_RATE:.1e} at {STEPS} steps, whatever the model's width"
)
_FULL_BY_LAW = (
    " and to full finetuning. At this width that is higher than the best learning rates published"
    f" for full finetuning itself, and on narrow networks it is closer to the best one."
    f" {FULL_TRUST}"
)
_FULL_RL = (
    "In reinforcement learning, the best learning rates of full finetuning differ by a factor of 43"
    " between five published sources of GRPO, and no learning rate is good for all of them. This is"
    " the lowest one. It is safe, but too slow for most models. Calibrate (ra.calibrate), or try"
    " higher ones inside the interval: an 8B model got worse from 4e-6 on, and a 1.7B model learned"
    " best at 2e-5"
)
_FULL_DPO = (
    "The learning rate is based on full finetuning in DPO: the best learning rates of four"
    " published"
    f" models of 3B to 32B, {2.0**DPO_LOG2_RATE:.1e} on average"
)
TASKS = get_args(Task)


class Anchor(NamedTuple):
    """Published best learning rates, from which a suggestion starts.

    log2_rate: log2 of the middle. sd: the standard deviation, octaves. source: where it comes from,
    in words. margin: octaves from the middle down to the quoted learning rate.
    """

    log2_rate: float
    sd: float
    source: str
    margin: float = MARGIN


class Move(NamedTuple):
    """One move of the published rate.

    sd: the standard deviation that it adds, octaves. why: the reason in words. octaves: change of
    log2 of the rate. outside: whether it leaves the range of the published configurations.
    """

    sd: float
    why: str = ""
    octaves: float = 0.0
    outside: bool = False


# Factors of the rate of AdamW and plain LoRA: the lowest and the highest that are known. Of an init
# and DoRA: from the one in a published 0.6B model (arXiv 2602.04998) to that in a small one of ours
# (benchmarks/answers.md); in a published 1B model PiSSA's lies between
# (results/large_models.md). LoRA-GA's 1/18 was published only: a factor of 4 around it. Of an
# optimizer: by its relation in the table of optimizers.
FACTORS = {
    "pissa": (1 / 10, 0.88),
    "olora": (1 / 18, 0.80),
    "lora_ga": (1 / 72, 4 / 18),
    "DoRA": (1 / 1.8, 1.5),
    "as AdamW": (1.0, 1.0),
    "steps of AdamW's size": (2**-0.5, 2**0.5),
    # Chen et al. 2023 say 1/10 to 1/3; 1/2 in small tasks of ours
    "Lion's rule": (1 / 10, 1 / 2),
    "schedule-free's rule": (1.0, 10.0),  # its authors' README
    # torch's documentation reuses AdamW's rate, on whole weights
    "Muon matched to AdamW": (1 / 2, 2.0),
}


@explain_near_misses
def suggest_lr(
    model: Any,
    optimizer: type[Optimizer] | str | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    method: Method = "lora",
    init: str | bool | None = None,
    dora: bool | None = None,
    task: Task | None = None,
    steps: int | None = None,
    hidden_size: float | None = None,
) -> Rate:
    """Suggest a learning rate for a model's rank, alpha, init and width, or for a `Reference`,
    without any run.

    lr = 2^(-11.45 - 0.5) · law(model; rank 16, alpha 32, fan-in 4096) · factors, with the law
    `MuA(tokens=8)`. The 90 % band is ± 1.645·√(sum of variances) octaves. Standard deviations are
    0.5 octaves between published models, 1.0 for another task and horizon (0 with
    task="chat"), and those in the notes. With task="rl" LoRA's rate is × 2^-2.5, and the standard
    deviation 1.5 in place of 1.0. More than 780 steps multiply it by (780 / steps)^0.4.

    Full finetuning starts from published rates of its own: 2.8e-5 · 2^-0.5 at 780 steps, with a
    standard deviation of 0.76 octaves between groups; in DPO 1.1e-6 · 2^-0.5. In GRPO five sources
    differ by a factor of 43, and the lowest rate, 1.2e-6, is quoted. A network whose largest fan-in
    is below about 5,700 has LoRA's rate by the law if that is higher.

    Args:
        model: the model, its survey, a `Reference`, or an existing trainer. Of a trainer the model,
            task, steps and optimizer class are read, and a note judges its own learning rate.
            If the model has several ranks, the learning rate is for the most common one, and
            `RankAwareOptimizer(model, AdamW, lr=suggest_lr(model))` converts it to the others.
        optimizer: a torch optimizer class or its name. By default the class that a trainer would
            build, else AdamW.
        settings: its settings. Muon's `adjust_lr_fn` changes the rate.
        method: "lora" or "full".
        init: "A" (B starts at zero, as in PEFT), "B" (A starts at zero), or a value of PEFT's
            `init_lora_weights` such as "pissa". Needed if neither factor starts at zero.
        dora: whether the adapters are DoRA. By default as the model declares.
        task: "chat" if the task is like that of the published sweeps, "rl" for reinforcement
            learning (GRPO, RLOO), "dpo" for direct preference optimization, else "other". By
            default "rl" for a trainer with `reward_funcs`, "dpo" for a `DPOTrainer`, else "other".
        steps: optimizer steps of the run, by default those of a trainer's run. If they are unknown
            the rate is that of about 780. It lowers the
            rate of longer runs, which is right where the batch is smaller or data are repeated.
            Leave it out if the run has more fresh data at the same batch.
        hidden_size: the size of the model's residual stream, by which the published models are
            known. By default the model's most common fan-in, or the `fan_in` of a `Reference`, and
            4096 if there is none. For LoRA only: full finetuning depends on the largest fan-in.

    Raises:
        OptimizerError: neither a published rate nor a documented rule of thumb exists for this
            optimizer.
        LawError: no published rate is known for this init, or for LoRA in DPO.
        InspectionError: the model has no LoRA pair.
        InvalidReferenceError: `steps` or `hidden_size` is impossible.

    >>> print(f"{suggest_lr(Reference(rank=16, alpha=32), hidden_size=4096).lr:.1e}")
    2.5e-04
    """
    asked = _Asked.of(model, optimizer, task, steps)
    model, optimizer, task, steps, _ = asked
    check_choice(task, TASKS, "The task is", InvalidReferenceError)
    check_choice(method, get_args(Method), "The method is", InvalidReferenceError)
    name, relation = _relation(optimizer, settings)
    at, variants = _read(model, method, init, dora)
    at = _with_hidden_size(at, hidden_size)
    anchor = _anchor(at, task)
    moves = [*_moves(at, task), *variants, _factor(name, relation), *_length(steps)]
    middle = anchor.log2_rate + sum(move.octaves for move in moves)
    width = at.fan_in or ANY_WIDTH
    reach = Z90 * math.hypot(anchor.sd, *(move.sd for move in moves))
    lr, low, high = middle - anchor.margin, middle - reach, middle + reach
    bare = Rate(2.0**lr, low=2.0**low, high=2.0**high)
    return Rate(
        bare.lr,
        low=bare.low,
        high=bare.high,
        extrapolated=any(move.outside for move in moves),
        reference=replace(at, fan_in=None),
        configuration=f"{name}, {at}, {_width_name(at)} {width:g}",
        notes=(
            *asked.notes(bare),
            f"{anchor.source}.",
            f"It is {2.0**-anchor.margin:.2g} times the middle of its interval, because a"
            " learning rate"
            " that is too high costs more than one that is too low.",
            *(move.why for move in moves if move.why),
            _NARROW,
        ),
    )


class _Asked(NamedTuple):
    """What a rate is asked for: a model with its task, optimizer and steps, as passed or as a
    trainer knows them.
    """

    model: Any
    optimizer: Any
    task: Task
    steps: int | None
    trainer: Any = None

    @classmethod
    def of(
        cls, model: Any, optimizer: Any, task: Task | None, steps: int | None
    ) -> _Asked:
        """Return what was passed, completed by what a trainer knows."""
        is_light = isinstance(model, (Reference, Survey))  # which need no torch
        trainer = None if is_light else trainers.trainer_of(model)
        if trainer is None:
            other: Task = "other" if task is None else task
            return cls(model, optimizer or "AdamW", other, steps)
        return cls(
            trainer.model,
            optimizer or trainer.own_class() or "AdamW",
            trainer.task or "other" if task is None else task,
            trainer.known_steps() if steps is None else steps,
            trainer,
        )

    def notes(self, rate: Rate) -> Iterator[str]:
        """Yield how good the trainer's own learning rate is, and what the trainer knows."""
        trainer = self.trainer
        if trainer is None:
            return
        own = trainer.own_rate()
        if own is not None:
            yield Judgement(own.lr, rate).verdict(str(own))
        steps = "an unknown number of" if self.steps is None else f"{self.steps:,}"
        facts = [f"{steps} steps"]
        if trainer.batch is not None:
            facts.append(f"batch {trainer.batch:g}")
        if trainer.dtype is not None:
            facts.append(f"weights in {str(trainer.dtype).removeprefix('torch.')}")
        text = f"From the trainer: {', '.join(facts)}."
        if self.steps is None:
            text += " Its data have no length. Pass steps= if you know them."
        yield text


# --- what is asked --------------------------------------------------------------------------------


def _relation(
    optimizer: type[Optimizer] | str, settings: Mapping[str, Any] | None
) -> tuple[str, str]:
    """Return the optimizer's name and its row of FACTORS. A subclass follows its base class."""
    row = known_optimizer(optimizer)[1]
    if not row.relation and not row.one_rate:
        # a name in the table needs no installed package
        optimizer = get_optimizer_class(optimizer)
        row = known_optimizer(optimizer)[1]
    name = optimizer if isinstance(optimizer, str) else optimizer.__name__
    matched = in_force(optimizer, settings).get("adjust_lr_fn") == "match_rms_adamw"
    if matched and row.family == "spectral":
        return name, "Muon matched to AdamW"
    if not row.relation:
        why = row.one_rate or "no documented rule derives from AdamW"
        raise OptimizerError(
            f"No published rate is known for {name}, which {why}.",
            "Calibrate it (ra.calibrate), or fit runs you have (ra.sweeps.fit_sweep). Muon reuses"
            " AdamW's with adjust_lr_fn='match_rms_adamw' in settings.",
        )
    return name, row.relation


def _read(
    model: Any, method: Method, init: Any, dora: bool | None
) -> tuple[Reference, list[Move]]:
    """Return a model's most common configuration, and the moves to its init and to DoRA."""
    at = model
    survey = None
    notes: tuple[str, ...] = ()
    if not isinstance(model, Reference):
        survey = _survey(model, method, init)
        at = survey.dominant()
    if "full" in (method, at.method):
        width = survey.full_width() if survey else at.fan_in
        return Reference(method="full", fan_in=width), []
    if survey:
        notes = survey.notes
        at = replace(at, fan_in=_usual_width(survey))
        if init is None:
            init = mode(f.init for f in survey.factors)
        if dora is None:
            dora = "DoRA magnitude" in map(other_kind, survey.other)
    if init is not None:
        at = replace(at, init="B" if init == "B" else "A")
    return at, [*map(partial(Move, 0.0), notes), *_variants(init, dora)]


def _with_hidden_size(at: Reference, hidden_size: object) -> Reference:
    """Return a configuration with the hidden size that was passed, if any, as its width."""
    if hidden_size is None:
        return at
    if at.method == "full":
        raise InvalidReferenceError(
            "hidden_size= was passed, but full finetuning depends on the model's largest fan-in.",
            "Pass that: Reference(method='full', fan_in=...), in a shell --fan-in or"
            " --model-config.",
        )
    width = plain(hidden_size)
    check_range("fan_in", width, "hidden_size", InvalidReferenceError)
    return replace(at, fan_in=width)


def _survey(model: Any, method: Method, init: Any) -> Survey:
    if isinstance(model, Survey):
        return model
    read_as = init if init in ("A", "B") else None
    return inspect_model(model, method=method, init=read_as)


def _usual_width(survey: Survey) -> float:
    """Return the most common fan-in: published models are known by their hidden size.

    Raises:
        LawError: some pairs add more than s·B·A.
    """
    lawless = {f.kind for f in survey.factors} & LAWLESS.keys()
    if lawless:
        raise LawError(
            f"No law covers {LAWLESS[min(lawless)]}, so no rate is known for it.",
            "Calibrate.",
        )
    return mode([f.fan_in for f in without_embeddings(survey.factors)] or [1.0])


def _variants(init: Any, dora: bool | None) -> Iterator[Move]:
    """Yield the moves to an init of PEFT and to DoRA.

    Raises:
        LawError: no rate is published for the init.
    """
    row = published_init(init)
    if row:
        yield _factor(row, row)
    elif init == "unknown":
        yield Move(0.0, _UNREAD)
    elif init not in (None, "A", "B") and declared_init(init, "linear") != "A":
        raise LawError(
            f"No published rate is known for the init {init!r}. Neither factor starts at zero.",
            f"Give an init: {', '.join(map(repr, PUBLISHED_INITS))}, or 'A' if B started at zero;"
            " or calibrate (ra.calibrate).",
        )
    if dora:
        yield _factor("DoRA", "DoRA")


def published_init(declared: object) -> str | None:
    """Return the row of FACTORS for a value of PEFT's `init_lora_weights`; None if there is none.

    >>> published_init("pissa_niter_16"), published_init("corda")
    ('pissa', None)
    """
    name = str(declared).lower().replace("-", "_").partition("_niter_")[0]
    return name if name in PUBLISHED_INITS else None


# --- where a suggestion starts --------------------------------------------------------------------


def _anchor(at: Reference, task: Task) -> Anchor:
    """Return the published learning rates for a method and a task.

    Raises:
        LawError: LoRA's best learning rates in DPO are not known.
    """
    if at.method == "lora" and task == "dpo":
        raise LawError(
            "No published learning rate is known for LoRA in DPO. On one 8B model learning rates"
            " below 1e-5 were too low at rank 64 = alpha.",
            "Calibrate (ra.calibrate), or pass method='full' for full finetuning.",
        )
    if at.method == "lora":
        octaves = math.log2(checked_multiplier(_LAW, _sized(at).as_factor(), PUBLISHED))
        return Anchor(LOG2_RATE + octaves, SPREAD, _SOURCE)
    if task == "dpo":
        return Anchor(DPO_LOG2_RATE, DPO_SPREAD, _FULL_DPO)
    if task == "rl":
        low, high, rate = map(math.log2, (FULL_RL_LOW, FULL_RL_HIGH, FULL_RL))
        middle = (low + high) / 2
        return Anchor(middle, (high - low) / 2 / Z90, _FULL_RL, middle - rate)
    by_law = _full_by_law(at)
    if by_law > FULL_LOG2_RATE:
        return Anchor(
            by_law,
            math.hypot(SPREAD, FULL_SD["A"]),
            _SOURCE + _FULL_BY_LAW.removesuffix("."),
        )
    return Anchor(FULL_LOG2_RATE, FULL_SPREAD, _FULL_SOURCE)


def _full_by_law(at: Reference) -> float:
    """Return log2 of full finetuning's learning rate by the law, from LoRA's published one."""
    full = _sized(at).as_factor()
    return LOG2_RATE + math.log2(checked_multiplier(_LAW, full, PUBLISHED))


def _width_name(at: Reference) -> str:
    """Return what the width of a suggestion is called."""
    return "largest fan-in" if at.method == "full" else "hidden size"


def _sized(at: Reference) -> Reference:
    return replace(at, fan_in=at.fan_in or ANY_WIDTH)


# --- the moves ------------------------------------------------------------------------------------


def _moves(at: Reference, task: Task) -> Iterator[Move]:
    """Yield what moves the published learning rate, or widens its interval, at a configuration."""
    is_full = at.method == "full"
    if at.fan_in is None:
        name = _width_name(at)
        yield Move(
            NO_WIDTH_SD,
            f"The model's {name} is unknown, so {ANY_WIDTH:g} was assumed. Pass it, or the model.",
        )
    if task == "rl" and not is_full:
        yield Move(RL_SD, _RL, RL_OCTAVES)
    elif task == "other" or task == "dpo":
        yield Move(
            TASK_SD,
            "Your task, number of steps and batch differ from theirs. That widens the interval"
            " most.",
        )
    width = at.fan_in or ANY_WIDTH
    if is_full:
        if task != "rl":
            yield from _outside("largest fan-in", width, FULL_WIDTHS, WIDTH_SD)
        return
    yield from _outside("hidden size", width, WIDTHS, WIDTH_SD)
    rank = at.rank or 1
    yield from _outside("rank", rank, RANKS, RANK_SD)
    yield Move(ALPHA_SD * abs(math.log2(at.scaling * rank / ALPHA)))
    if at.init == "B":
        yield Move(
            INIT_SD,
            "All of them used init A. The scaling law µA converts the learning rate to init B,"
            " where"
            " low ranks needed a higher one in our tasks.",
        )


def _length(steps: int | None) -> Iterator[Move]:
    """Yield the move to another number of steps."""
    if steps is None:
        return
    if not is_positive(steps):
        raise InvalidReferenceError(
            f"The number of steps is {shown(steps)}.",
            "Give the optimizer steps of the run, or leave it out.",
        )
    octaves = math.log2(steps / STEPS)
    moved = LONGER * max(0.0, octaves)
    why = (
        f"For {steps} steps instead of {STEPS} the learning rate is multiplied by"
        f" {2.0**moved:.3g}. With smaller batches or repeated data, the best one on large models"
        " falls by a factor of 1 to 1.9 with each doubling of the steps. With more fresh data at"
        " the"
        " same batch it does not fall. For shorter runs it stays."
    )
    yield Move(LENGTH_SD * abs(octaves), why, moved)


def _outside(
    what: str, value: float, known: tuple[float, float], sd: float
) -> Iterator[Move]:
    low, high = known
    beyond = max(low / value, value / high)
    if beyond > 1.0:
        yield Move(
            sd * math.log2(beyond),
            f"The {what} of {value:g} lies outside those of the published models ({low:g} to"
            f" {high:g}).",
            outside=True,
        )


def _factor(what: str, row: str) -> Move:
    """Return the move by a factor that is known to lie within a range."""
    low, high = FACTORS[row]
    octaves = math.log2(low * high) / 2
    sd = math.log2(high / low) / 2
    why = (
        f"For {what} the rate of AdamW and plain LoRA is multiplied by {low:.2g} to {high:.2g}: the"
        " middle is taken."
    )
    return Move(sd, why if sd else "", octaves)
