"""This module suggests a learning rate for a model without training the model first.

The suggested learning rates are based on the learning rates that worked best in
published experiments. For LoRA, a scaling law converts the published learning rates to
the model's rank, alpha and width. For full finetuning, the suggestion is based on
published learning rates of full finetuning, or on the converted learning rate of LoRA
if that is higher. The 90 % interval of a suggestion is wide, because the best learning
rate differs between models and tasks.
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
from .._rate import Rate
from .._types import Factor, Method, Reference, Task
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

# A typical configuration among the published models. The scaling law converts from here.
ALPHA = 32.0
PUBLISHED = Reference(rank=16, alpha=ALPHA, fan_in=ANY_WIDTH)
# log2 of the best learning rate at PUBLISHED, and the standard deviation between models after the
# law has converted their learning rates to PUBLISHED, in octaves. Both come from
# benchmarks/laws/suggestion.py (results/suggestion.md).
LOG2_RATE, SPREAD = -11.45, 0.50
# The ranks and hidden sizes of the published models, from the lowest to the highest.
RANKS, WIDTHS = (1, 128), (2048, 8192)
# log2 of the best learning rate of full finetuning in supervised finetuning at 780 steps, for all
# widths, and the standard deviation of its error for groups that were left out of the fit, in
# octaves. Both come from benchmarks/laws/full_finetuning.py (results/full_finetuning.md).
FULL_LOG2_RATE, FULL_SPREAD = -15.13, 0.76
# The same for full finetuning in DPO, from four models of two groups.
DPO_LOG2_RATE, DPO_SPREAD = -19.79, 0.6
# In GRPO, the best learning rates of five sources differ by a factor of 43. No learning rate loses
# at most 5 points of accuracy on all five, so the suggestion is the lowest one. The interval
# extends half an octave beyond the lowest and the highest.
FULL_RL, FULL_RL_LOW, FULL_RL_HIGH = 1.2e-6, 4.9e-7, 4.2e-5
# The largest fan-in of the narrowest and of the widest network among the published models of full
# finetuning. For narrower networks, the law converts LoRA's learning rate to full finetuning. This
# was more accurate on the study's networks.
FULL_WIDTHS = (3072, 4 * 8192)
_LAW = MuA(
    tokens=8.0
)  # more tokens than the default, which fits published language models better
# How far the suggestion is below the middle of its interval, in octaves. A learning rate that is
# too low costs little, but one that is too high costs a lot. benchmarks/answers.md shows the cost
# of other values: judgement
MARGIN = 0.5
# Rules of thumb for the uncertainty, as standard deviations in octaves. TASK_SD is for a different
# task, batch size and number of steps. ALPHA_SD is for each octave between alpha and 32.
# NO_WIDTH_SD is for an unknown width. (On narrow networks, the best learning rate was on average
# 1.4 octaves above the middle, but raising the suggestion for them lost more:
# benchmarks/answers.md.)
TASK_SD, ALPHA_SD, NO_WIDTH_SD = 1.0, 0.1, 0.5
# How far the learning rate of LoRA in reinforcement learning is from that of supervised finetuning,
# and the standard deviation, in octaves. With this value, the suggestions for the three ranks of a
# published GRPO experiment are near the middle of the range in which its accuracy was flat
# (results/large_models.md). The interval also contains the best learning rates of the study's small
# task, which are 2.5 octaves higher (results/suggestion.md).
RL_OCTAVES, RL_SD = -2.5, 1.5
# STEPS is the number of steps of the published runs. For longer runs, the learning rate changes by
# LONGER octaves per octave of steps. Sources on large models report 0 to -0.9
# (benchmarks/answers.md), and this is the middle. LENGTH_SD is the standard deviation of this slope
# between six sources, increased because six are few (results/full_finetuning.md). For shorter runs
# the learning rate is not raised, because a learning rate that is too high costs more.
STEPS, LONGER, LENGTH_SD = 780, -0.4, 0.45

_SOURCE = (
    "The learning rate is based on published sweeps of 35 language models (tinker-cookbook: AdamW,"
    " Tulu 3 chat data, batch 128, about 780 steps, alpha 32, ranks 1 to 128, hidden sizes 2048 to"
    " 8192). The scaling law converts it to this configuration"
)
_RL = (
    f"In reinforcement learning, LoRA's learning rate is {2.0**RL_OCTAVES:.3g} times that of other"
    " tasks. In a GRPO experiment on a 1.7B model with alpha 32, the accuracy was the same for all"
    " learning rates from 3e-5 to 1e-4, and runs collapsed at 2e-4 and above. In our small task,"
    " higher learning rates were best."
)
_UNREAD = (
    "The init could not be read from the model, so it was assumed that B started at zero, as in"
    " PEFT."
)
_NARROW = (
    "To get a narrower interval, run trials on your task with ra.calibrate, or fit existing runs"
    " with ra.sweeps.fit_sweep (in a shell: rankaware fit)."
)
_FULL_SOURCE = (
    "The learning rate is based on full finetuning: six groups published their best learning rates"
    " for supervised finetuning of language models with 0.6B to 32B parameters. A fit to their"
    f" results gives {2.0**FULL_LOG2_RATE:.1e} at {STEPS} steps for every model width"
)
_FULL_BY_LAW = (
    " and to full finetuning. For this width, the result is higher than the published learning"
    " rates of full finetuning. It is used because it was more accurate for narrow networks."
    f" {FULL_TRUST}"
)
_FULL_RL = (
    "The best learning rates of full finetuning in GRPO differ by a factor of 43 between five"
    " published experiments, and no learning rate is good for all of them. This suggestion is the"
    " lowest of the five. It is safe, but too slow for most models. Run ra.calibrate, or try higher"
    " learning rates inside the interval. An 8B model got worse at 4e-6 and above, but a 1.7B model"
    " learned best at 2e-5"
)
_FULL_DPO = (
    "The learning rate is based on full finetuning in DPO. The best learning rates of four"
    f" published models with 3B to 32B parameters are {2.0**DPO_LOG2_RATE:.1e} on average"
)
TASKS = get_args(Task)


class Anchor(NamedTuple):
    """The published learning rate on which a suggested learning rate is based.

    log2_rate: log2 of the learning rate in the middle of the interval.
    sd: its standard deviation, octaves.
    source: a sentence about the published experiments.
    margin: how far the suggestion is below the middle, octaves.
    """

    log2_rate: float
    sd: float
    source: str
    margin: float = MARGIN


class Move(NamedTuple):
    """A single change that adapts the published learning rate or its uncertainty to the
    user's model.

    sd: the standard deviation that the change adds, octaves.
    why: a sentence that explains the change, or "".
    octaves: the change of log2 of the learning rate.
    outside: whether the configuration is outside the range of the published experiments.
    """

    sd: float
    why: str = ""
    octaves: float = 0.0
    outside: bool = False


# The lowest and the highest known ratio of the best learning rate to that of AdamW and plain LoRA.
# For inits and DoRA, the two values are from a published 0.6B model (arXiv 2602.04998) and from our
# small model (benchmarks/answers.md). In a published 1B model, the ratio for PiSSA is between the
# two (results/large_models.md). For LoRA-GA only the published 1/18 is known, so the range is a
# factor of 4 to either side. For optimizers, the keys are the relations in the table of optimizers.
FACTORS = {
    "pissa": (1 / 10, 0.88),
    "olora": (1 / 18, 0.80),
    "lora_ga": (1 / 72, 4 / 18),
    "DoRA": (1 / 1.8, 1.5),
    "as AdamW": (1.0, 1.0),
    "steps of AdamW's size": (2**-0.5, 2**0.5),
    # Chen et al. 2023 recommend 1/10 to 1/3. In our small tasks, 1/2 was best.
    "Lion's rule": (1 / 10, 1 / 2),
    "schedule-free's rule": (1.0, 10.0),  # its authors' README
    # torch's documentation recommends AdamW's learning rate, but for full weights, not for LoRA.
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
    """Suggest a learning rate for a model without training the model first.

    The suggested learning rate is based on the learning rates that worked best in
    published experiments. For LoRA, the scaling law `MuA(tokens=8)` converts these
    learning rates to the model's rank, alpha, init and width:

        lr = 2^(-11.45 - 0.5) · law(model; rank 16, alpha 32, fan-in 4096) · factors

    The ends of the 90 % interval are 1.645·√(sum of variances) octaves (factors of two)
    below and above the middle of the interval. The best learning rates of different
    published models have a standard deviation of 0.5 octaves. A different task and
    number of steps than in these publications add a standard deviation of 1.0 octaves,
    or 0 octaves with task="chat". The notes list further uncertainties. With task="rl"
    (reinforcement learning), LoRA's learning rate is multiplied by 2^-2.5, and the task
    adds a standard deviation of 1.5 octaves instead of 1.0. If the training run has
    more than 780 steps, the suggested learning rate is multiplied by (780 / steps)^0.4.

    For full finetuning with 780 steps, the suggested learning rate is 2.8e-5 · 2^-0.5.
    The best learning rates that different authors published differ by a factor of about
    1.7 (a standard deviation of 0.76 octaves). For full finetuning with DPO, the
    suggested learning rate is 1.1e-6 · 2^-0.5. For full finetuning with GRPO, the best
    learning rates in five publications differ by a factor of 43. The suggested learning
    rate is the lowest of them, 1.2e-6. If the largest fan-in of the model is below
    about 5,700, the scaling law also converts LoRA's learning rate to full finetuning,
    and the suggestion is the higher of the two learning rates.

    Args:
        model: the model, its survey, a `Reference`, or an existing trainer. A trainer provides the
            model, task, steps and optimizer class, and a note compares its learning rate with the
            suggestion. If the model has several ranks, the suggestion is for the most common rank,
            and `RankAwareOptimizer(model, AdamW, lr=suggest_lr(model))` converts it to the others.
        optimizer: a torch optimizer class or its name. By default the class that the trainer would
            build, or AdamW without a trainer.
        settings: the optimizer's settings. Muon's `adjust_lr_fn` changes the suggestion.
        method: "lora" or "full".
        init: "A" (B starts at zero, as in PEFT), "B" (A starts at zero), or a value of PEFT's
            `init_lora_weights` such as "pissa". Required if neither A nor B starts at zero.
        dora: whether the adapters use DoRA. By default this is read from the model.
        task: "chat" if the task is similar to that of the published sweeps, "rl" for reinforcement
            learning (GRPO, RLOO), "dpo" for direct preference optimization, or "other". The default
            is "rl" for a trainer with `reward_funcs`, "dpo" for a `DPOTrainer`, and "other"
            otherwise.
        steps: optimizer steps of the run, by default the steps of the trainer. If they are unknown,
            the suggestion is for about 780 steps. For longer runs the suggestion is lower, which is
            correct if the batch is smaller or data are repeated. Leave `steps` out if the longer
            run only has more new data at the same batch size.
        hidden_size: the size of the model's residual stream. By default the model's most common
            fan-in or the `fan_in` of a `Reference`, or 4096 if both are unknown. It can only be set
            for LoRA, because full finetuning depends on the largest fan-in.

    Raises:
        OptimizerError: neither a published learning rate nor a documented rule of thumb exists for
            this optimizer.
        LawError: no published learning rate is known for this init, or for LoRA in DPO.
        InspectionError: the model does not contain LoRA matrices.
        InvalidReferenceError: `steps` or `hidden_size` is impossible.

    >>> print(f"{suggest_lr(Reference(rank=16, alpha=32), hidden_size=4096).lr:.1e}")
    2.5e-04
    """
    asked = _Asked.of(model, optimizer, task, steps)
    model, optimizer, task, steps, _ = asked
    check_choice(task, TASKS, "The task", InvalidReferenceError)
    check_choice(method, get_args(Method), "The method", InvalidReferenceError)
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
            f"The suggestion is {2.0**-anchor.margin:.2g} times the middle of its interval, because"
            " a learning rate that is too high costs more than one that is too low.",
            *(move.why for move in moves if move.why),
            _NARROW,
        ),
    )


class _Asked(NamedTuple):
    """The model, optimizer, task and number of steps for which a learning rate is suggested.

    If the user passed a trainer, the values that the user did not pass are read from
    this trainer.
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
        """Collect the arguments of `suggest_lr`, and take missing values from the
        trainer if the user passed one.
        """
        is_light = isinstance(model, (Reference, Survey))  # these do not need torch
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
        """Yield notes that compare the trainer's learning rate with the suggested one
        and list the trainer's settings.
        """
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
            text += (
                " The number of steps is unknown, because the training data have no length. Pass"
                " steps= if you know the number."
            )
        yield text


# --- what is asked --------------------------------------------------------------------------------


def _relation(
    optimizer: type[Optimizer] | str, settings: Mapping[str, Any] | None
) -> tuple[str, str]:
    """Return the name of an optimizer and its key in the table FACTORS.

    A subclass of a known optimizer class uses the key of this base class.

    Raises:
        OptimizerError: no published learning rate is known for the optimizer.
    """
    row = known_optimizer(optimizer)[1]
    if not row.relation and not row.one_rate:
        # Only now import the class, because its package need not be installed for a known name.
        optimizer = get_optimizer_class(optimizer)
        row = known_optimizer(optimizer)[1]
    name = optimizer if isinstance(optimizer, str) else optimizer.__name__
    matched = in_force(optimizer, settings).get("adjust_lr_fn") == "match_rms_adamw"
    if matched and row.family == "spectral":
        return name, "Muon matched to AdamW"
    if not row.relation:
        if row.family == "spectral":
            raise OptimizerError(
                f"suggest_lr cannot suggest a learning rate for {name}, because no published rule"
                " converts AdamW's learning rate to it.",
                "Run ra.calibrate with this optimizer. If it is Muon, you can also pass"
                " settings={'adjust_lr_fn': 'match_rms_adamw'}, with which Muon uses AdamW's"
                " learning rate.",
            )
        if row.one_rate:
            reason = row.one_rate
            raise OptimizerError(
                f"suggest_lr cannot suggest a learning rate for {name}, because this optimizer"
                f" {reason}.",
                "Follow the documentation of the optimizer, or use a different optimizer.",
            )
        raise OptimizerError(
            f"suggest_lr cannot suggest a learning rate for {name}, because no published rule"
            " converts AdamW's learning rate to it.",
            "Run ra.calibrate with this optimizer, or fit existing runs with ra.sweeps.fit_sweep.",
        )
    return name, row.relation


def _read(
    model: Any, method: Method, init: Any, dora: bool | None
) -> tuple[Reference, list[Move]]:
    """Return a model's most common rank, alpha and width, and the changes to the
    suggested learning rate for its init and for DoRA.
    """
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
        usual = _usual_factors(survey)
        at = replace(at, fan_in=mode(f.fan_in for f in usual))
        if init is None:
            init = mode(f.init for f in usual)
        if dora is None:
            dora = "DoRA magnitude" in map(other_kind, survey.other)
    if init is not None:
        at = replace(at, init="B" if init == "B" else "A")
    return at, [*map(partial(Move, 0.0), notes), *_variants(init, dora)]


def _with_hidden_size(at: Reference, hidden_size: object) -> Reference:
    """If the user passed a hidden size, use this size as the width of the LoRA
    configuration.
    """
    if hidden_size is None:
        return at
    if at.method == "full":
        given = shown(hidden_size)
        raise InvalidReferenceError(
            f"hidden_size={given} cannot be used for full finetuning, because the best learning"
            " rate then depends on the model's largest fan-in.",
            "Pass the largest fan-in in a Reference(method='full', fan_in=...) (in a shell:"
            " --fan-in or --model-config).",
        )
    width = plain(hidden_size)
    check_range("fan_in", width, "hidden_size", InvalidReferenceError)
    return replace(at, fan_in=width)


def _survey(model: Any, method: Method, init: Any) -> Survey:
    """Inspect the model, or return the `Survey` of a model if the user passed a
    `Survey` instead.
    """
    if isinstance(model, Survey):
        return model
    read_as = init if init in ("A", "B") else None
    return inspect_model(model, method=method, init=read_as)


def _usual_factors(survey: Survey) -> list[Factor]:
    """Return the LoRA matrices of all layers of a model except embeddings.

    The most common fan-in of these layers is usually the hidden size. Publications
    report the hidden sizes of their models, so suggested learning rates depend on the
    hidden size too.

    Raises:
        LawError: some adapters are of a type for which no scaling law is known, or all adapted
            layers are embeddings, for which no learning rates were published.
    """
    lawless = {f.kind for f in survey.factors} & LAWLESS.keys()
    if lawless:
        kind = LAWLESS[min(lawless)]
        raise LawError(
            f"suggest_lr cannot suggest a learning rate for this model, because no scaling law"
            f" covers its {kind} adapters.",
            "Run ra.calibrate to find the learning rate.",
        )
    usual = without_embeddings(survey.factors)
    if not usual:
        raise LawError(
            "suggest_lr cannot suggest a learning rate for this model, because LoRA adapts only its"
            " embeddings, and no learning rate was published for such a model.",
            "Run ra.calibrate to find the learning rate.",
        )
    return usual


def _variants(init: Any, dora: bool | None) -> Iterator[Move]:
    """Yield the changes to the suggested learning rate that a PEFT init and DoRA
    require.

    Raises:
        LawError: no learning rate was published for the init.
    """
    row = published_init(init)
    if row:
        yield _factor(row, row)
    elif init == "unknown":
        yield Move(0.0, _UNREAD)
    elif init not in (None, "A", "B") and declared_init(init, "linear") != "A":
        published = ", ".join(map(repr, PUBLISHED_INITS))
        raise LawError(
            f"suggest_lr cannot suggest a learning rate for init={init!r}. This init starts neither"
            f" A nor B at zero, and learning rates were only published for {published}.",
            "Run ra.calibrate to find the learning rate. If B started at zero in your model, pass"
            " init='A'.",
        )
    if dora:
        yield _factor("DoRA", "DoRA")


def published_init(declared: object) -> str | None:
    """Return the key in the table FACTORS for a value of PEFT's `init_lora_weights`, or
    None.

    >>> published_init("pissa_niter_16"), published_init("corda")
    ('pissa', None)
    """
    name = str(declared).lower().replace("-", "_").partition("_niter_")[0]
    return name if name in PUBLISHED_INITS else None


# --- where a suggestion starts --------------------------------------------------------------------


def _anchor(at: Reference, task: Task) -> Anchor:
    """Choose the published learning rate on which the suggested learning rate is based.

    Raises:
        LawError: the suggestion is for LoRA in DPO, for which nothing was published.
    """
    if at.method == "lora" and task == "dpo":
        raise LawError(
            "suggest_lr cannot suggest a learning rate for LoRA in DPO, because no publication"
            " reports which learning rate is best. In one experiment with an 8B model, rank 64 and"
            " alpha 64, learning rates below 1e-5 were too low.",
            "Run ra.calibrate to find the learning rate. If you train all weights, pass"
            " method='full'.",
        )
    if at.method == "lora":
        octaves = math.log2(checked_multiplier(_LAW, _sized(at).as_factor(), PUBLISHED))
        return Anchor(LOG2_RATE + octaves, SPREAD, _SOURCE)
    if task == "dpo":
        return Anchor(DPO_LOG2_RATE, DPO_SPREAD, _FULL_DPO)
    if task == "rl":
        low, high, rate = map(math.log2, (FULL_RL_LOW, FULL_RL_HIGH, FULL_RL))
        # The interval is given here, so convert its ends to a middle and a standard deviation.
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
    """Convert LoRA's published learning rate to full finetuning, and return log2 of the
    converted learning rate.
    """
    full = _sized(at).as_factor()
    return LOG2_RATE + math.log2(checked_multiplier(_LAW, full, PUBLISHED))


def _width_name(at: Reference) -> str:
    """Return the name for a model's width in notes: "largest fan-in" for full
    finetuning or "hidden size" for LoRA.
    """
    return "largest fan-in" if at.method == "full" else "hidden size"


def _sized(at: Reference) -> Reference:
    """Return a configuration unchanged, or with a default width if the width of the
    model is unknown.
    """
    return replace(at, fan_in=at.fan_in or ANY_WIDTH)


# --- the moves ------------------------------------------------------------------------------------


def _moves(at: Reference, task: Task) -> Iterator[Move]:
    """Yield all changes that adapt the published learning rate and its uncertainty to a
    user's configuration.
    """
    is_full = at.method == "full"
    if at.fan_in is None:
        name = _width_name(at)
        yield Move(
            NO_WIDTH_SD,
            f"The model's {name} is unknown, so {ANY_WIDTH:g} was assumed. Pass the model or its"
            f" {name} to get a narrower interval.",
        )
    if task == "rl" and not is_full:
        yield Move(RL_SD, _RL, RL_OCTAVES)
    elif task == "other" or task == "dpo":
        yield Move(
            TASK_SD,
            "Your task, number of steps and batch size differ from those of the published"
            " experiments. This is the main reason why the interval is so wide.",
        )
    width = at.fan_in or ANY_WIDTH
    if is_full:
        if task != "rl":
            yield from _outside("largest fan-in", width, FULL_WIDTHS, WIDTH_SD)
        return
    yield from _outside("hidden size", width, WIDTHS, WIDTH_SD)
    assert at.rank is not None  # only full finetuning has no rank
    yield from _outside("rank", at.rank, RANKS, RANK_SD)
    yield Move(ALPHA_SD * abs(math.log2(at.scaling * at.rank / ALPHA)))
    if at.init == "B":
        yield Move(
            INIT_SD,
            "All published models used init A, so the scaling law µA converts the learning rate to"
            " init B. In our tasks, low ranks needed a higher learning rate with init B.",
        )


def _length(steps: int | None) -> Iterator[Move]:
    """Yield the change to the suggested learning rate for a run that is longer or
    shorter than the published runs.

    Raises:
        InvalidReferenceError: the number of steps is impossible.
    """
    if steps is None:
        return
    if not is_positive(steps):
        given = shown(steps)
        raise InvalidReferenceError(
            f"steps must be a positive number, but it is {given}.",
            "Pass the number of optimizer steps of the run, or remove steps=.",
        )
    octaves = math.log2(steps / STEPS)
    moved = LONGER * max(0.0, octaves)
    why = (
        f"The learning rate was multiplied by {2.0**moved:.3g}, because the run has {steps} steps"
        f" and the published runs have {STEPS}. With smaller batches or repeated data, the best"
        " learning rate of large models falls by a factor of 1 to 1.9 with each doubling of the"
        " steps. With more new data at the same batch size, it does not fall. For shorter runs, the"
        " suggestion does not change."
    )
    yield Move(LENGTH_SD * abs(octaves), why, moved)


def _outside(
    what: str, value: float, known: tuple[float, float], sd: float
) -> Iterator[Move]:
    """Yield a change that widens the 90 % interval if the rank or width of the model is
    outside the range of the published models.
    """
    low, high = known
    beyond = max(low / value, value / high)
    if beyond > 1.0:
        yield Move(
            sd * math.log2(beyond),
            f"The {what} {value:g} is outside the range of the published models ({low:g} to"
            f" {high:g}).",
            outside=True,
        )


def _factor(what: str, row: str) -> Move:
    """Return the change to the suggested learning rate for an optimizer or init whose
    best learning rate is only roughly known.
    """
    low, high = FACTORS[row]
    # The factor is the geometric mean of the range, and the ends are one standard deviation away.
    octaves = math.log2(low * high) / 2
    sd = math.log2(high / low) / 2
    why = (
        f"The best learning rate for {what} is {low:.2g} to {high:.2g} times that of AdamW and"
        " plain LoRA, and the suggestion uses the middle of this range."
    )
    return Move(sd, why if sd else "", octaves)
