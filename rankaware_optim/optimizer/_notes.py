"""What a report says of the rates that an `Assigner` gives."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from .._optimizers import RANK_AWARE
from .._types import LAWLESS, Factor, Survey, dense, init_text
from .._warn import warn
from ..inspection import is_other_adapter, unread_lora
from ..laws import (
    FORMS,
    SIGN_LIKE,
    Constant,
    beyond_batches,
    checked_batch_multiplier,
    innermost,
)
from ._assign import Assigner, Rule, Settings
from ._source import ByRecipe

_NO_ZERO = (
    "Adapters with neither factor zero (PiSSA, OLoRA, LoRA-GA, or trained ones of undeclared init)"
    " keep the base rate, since no law covers them: give init='A' (B = 0 at the start) or 'B' (A ="
    " 0) if you know it."
)
_CLASSIFIER = re.compile(r"(^|\.)(score|classifier|classification_head)(\.|$)")
_NEW_HEAD = (
    "A new text classifier often wants 4 times the base rate at which it trains here: other_lr= or"
    " rates= sets it."
)


def notes_of(
    assigner: Assigner, survey: Survey, groups: Iterable[Settings] = ({},)
) -> tuple[str, ...]:
    """Return what a report says of the rates.

    groups: the settings of each of the user's groups, of whose families it speaks.
    """
    rules: dict[str, Rule] = {}
    shapes = set(map(_shape_of, survey.factors))
    for settings in groups:
        handed = {assigner.goes_to_adam(settings, shape) for shape in shapes} or {False}
        for rule in (assigner.rule(settings, to_adam) for to_adam in sorted(handed)):
            rules[rule.family] = rule
    notes = [*assigner.source.notes, *survey.notes]
    notes += _of_adapters(assigner, survey)
    notes += _of_full_finetuning(assigner)
    for rule in rules.values():
        notes += _of_family(assigner, rule)
    notes += _of_batch(assigner)
    return tuple(notes)


def _shape_of(factor: Factor) -> tuple[int, int]:
    rows = factor.rank if factor.role == "A" else factor.fan_out
    columns = factor.rank if factor.role == "B" else factor.fan_in
    return int(rows or 1), int(columns or 1)


def _of_adapters(assigner: Assigner, survey: Survey) -> Iterator[str]:
    """Yield what is assumed of the adapters' ranks and inits."""
    inits = {f.init for f in survey.factors}
    if any(f.init == "other" and f.kind not in LAWLESS for f in survey.factors):
        warn(_NO_ZERO)
        yield _NO_ZERO
    _warn_of_adapters_without_a_law(assigner, survey)
    yield from _of_unread_lora(assigner, survey)
    yield from _of_new_heads(assigner, survey)
    kinds = {(f.rank, f.scaling, f.init) for f in survey.factors}
    if assigner.source.reference is None and len(kinds) > 1:
        yield (
            f"tuned_at not given: lr counts as tuned at {assigner.move.reference}, the most common"
            " of this model."
        )
    if "unknown" in inits:
        yield (
            "The init of some adapters could not be read. It is assumed that they started at B ="
            " 0."
        )
    yield from _of_another_init(assigner, survey)


def _of_new_heads(assigner: Assigner, survey: Survey) -> Iterator[str]:
    """Yield that a text classifier's head is at the base rate."""
    explicit, by_recipe = assigner.explicit, isinstance(assigner.source, ByRecipe)
    at_base = [n for n in survey.other if explicit.rate_of(n, True) is None]
    heads = [name for name in at_base if _CLASSIFIER.search(name)]
    if heads and _is_lora(assigner) and not by_recipe:
        yield _NEW_HEAD


def _of_another_init(assigner: Assigner, survey: Survey) -> Iterator[str]:
    """Yield that some adapters start at another zero than those at which the rate was tuned."""
    tuned = assigner.move.reference.init
    another = "B" if tuned == "A" else "A"
    if _is_lora(assigner) and another in {f.init for f in dense(survey.factors)}:
        yield (
            f"Adapters at {init_text(another)} are scaled within their own init, though the rate"
            f" was tuned at {init_text(tuned)}: tune or calibrate there."
        )


def _is_lora(assigner: Assigner) -> bool:
    return assigner.method == assigner.move.reference.method == "lora"


def _warn_of_adapters_without_a_law(assigner: Assigner, survey: Survey) -> None:
    """Warn of pairs that no law covers, and where a rate is said to be moved of other adapters."""
    explicit = assigner.explicit
    kinds = {
        f.name: LAWLESS[f.kind]
        for f in survey.factors
        if f.kind in LAWLESS and explicit.rate_of(f.name) is None
    }
    for name, kind in survey.unsupported.items():
        is_said = assigner.source.reference is not None and is_other_adapter(name)
        if is_said and explicit.rate_of(name, other=True) is None:
            kinds[name] = kind
    if kinds:
        words = " and ".join(sorted(set(kinds.values())))
        warn(
            f"No law covers {words}: {len(kinds)} of its parameters, such as {next(iter(kinds))},"
            " train at the base rate, whatever tuned_at= says. rates= gives them another."
        )


def _of_unread_lora(assigner: Assigner, survey: Survey) -> Iterator[str]:
    """Yield, and warn, that some parameters are LoRA's by name and in no pair that was read."""
    if assigner.method == "full":
        return
    explicit = assigner.explicit
    names = [n for n in unread_lora(survey) if explicit.rate_of(n, other=True) is None]
    if names:
        sentence = (
            f"{len(names)} trainable parameters with 'lora' in their names, such as {names[0]}, are"
            " in no LoRA pair that inspection can read, so no law moves their rate: rates= gives"
            " them one, and register_convention() adds a layout."
        )
        warn(sentence)
        yield sentence


def _of_full_finetuning(assigner: Assigner) -> Iterator[str]:
    """Yield what is uncertain of a rate that is moved from LoRA to full finetuning."""
    if assigner.method != "full" or assigner.move.reference.method != "lora":
        return
    law, family = assigner.rule({})
    if law.name == "constant":
        yield (
            "No law moves this LoRA rate to full finetuning, whose best rate may be several times"
            " as high or as low: calibrate with full runs."
        )
    elif law.name != "power":
        worth = "is good to a factor of 2 to 4"
        if family not in SIGN_LIKE:
            worth = f"was never tried with {family} optimizers"
        yield (
            f"From a LoRA rate alone the law's rate for full finetuning {worth}, and too high costs"
            " more than too low: start at half of it, or settle it by three full runs (calibrate"
            " with full_trials=3)."
        )


def _of_batch(assigner: Assigner) -> Iterator[str]:
    """Yield what the run's batch does to the rates."""
    batch, tuned = assigner.source.batch, assigner.move.reference.batch
    if batch is None or batch == tuned:
        return
    if tuned is None:
        yield (
            "The reference has no batch, so batch= moves no rate: give it in tuned_at=, as in"
            " 'r=16,alpha=32,batch=16'."
        )
        return
    law, ratio = assigner.rule({}).law, batch / tuned
    by_batch = checked_batch_multiplier(law, ratio)
    if by_batch == 1.0:
        yield f"The law {law.name!r} does not move rates with the batch."
    else:
        yield (
            f"From batch {tuned:g} to {batch:g} every rate is multiplied by"
            f" {by_batch:.3g}{beyond_batches(ratio)}: a rule of thumb."
        )


def _of_family(assigner: Assigner, rule: Rule) -> Iterator[str]:
    """Yield which law moves the rates of groups that are not sign-like, and why."""
    optimizer, source = assigner.optimizer, assigner.source
    is_constant = source.law.name == "constant"
    if optimizer is None or rule.family == "sign-like" or is_constant:
        return
    words = _words_of_family(rule)
    if rule.family == "unknown" and not isinstance(source, ByRecipe):
        warn(f"{optimizer.__name__} is {words}. A calibration measures it.")
    yield f"{optimizer.__name__} is {words}."


def _words_of_family(rule: Rule) -> str:
    law, family = rule
    form = FORMS.get(family)
    if family == "unknown":
        return (
            "of an unknown family and is scaled as a sign-like optimizer, such as Adam"
        )
    if family == RANK_AWARE:
        return (
            f"{family}: by its own rule its updates move with the rank, so all ranks keep one"
            " rate"
        )
    if form is None and isinstance(law, Constant):
        return (
            f"{family}: no form of µA is known to hold for that family, so all ranks have one"
            " rate"
        )
    if form is None or getattr(innermost(law), "family", None) != family:
        return f"{family}, for which the law {law.name!r} has no form"
    return f"{family}: {form.words}"
