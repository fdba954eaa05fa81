"""This module writes the notes of an optimizer's report.

The notes list adapters that no scaling law covers, the assumptions that were made, and
conversions that are uncertain. The notes do not influence the learning rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .._warn import warn
from ..inspection import (
    LAWLESS,
    Survey,
    is_other_adapter,
    unread_lora,
    without_embeddings,
)
from ..laws import (
    BFLOAT16,
    FORMS,
    FULL_TRUST,
    ONE_RATE,
    beyond_batches,
    checked_batch_multiplier,
    is_measured,
)
from ._assign import Assigned, Assigner

_NO_ZERO = (
    "pairs in which neither A nor B started at zero (PiSSA, OLoRA, LoRA-GA, or a trained pair with"
    " an unknown init; pass init='A' if B started at zero, or init='B' if A started at zero)"
)
_UNREAD = (
    "LoRA parameters that were not recognised as pairs (describe their layout with"
    " register_convention())"
)

_SETTLE = (
    "To find the best one, search on the full model with ra.calibrate(trainer, 'adamw'). If you"
    " pass a function that builds the model of each trial, add full_trials=3."
)
_NOT_ADAM = " This was measured with Adam and its variants, but not with this family of optimizers."


def notes_of(
    assigner: Assigner, survey: Survey, assigned: Iterable[Assigned] = ()
) -> tuple[str, ...]:
    """Return the notes for the report on the learning rates of a model.

    If no scaling law covers an adapter or the optimizer, there is also a warning.

    Args:
        assigner: the object that assigned the model's learning rates.
        survey: a survey of the trainable parameters.
        assigned: the assigned learning rates, for notes on the optimizer.
    """
    notes = [*assigner.source.notes, *survey.notes]
    if without_law := _without_law(assigner, survey):
        warn(without_law)
        notes.append(without_law)
    notes += _on_reference(assigner, survey)
    notes += _on_inits(assigner, survey)
    notes += _on_full_finetuning(assigner, survey)
    notes += _on_batch(assigner)
    # Parameters that are not LoRA matrices get the base learning rate with any
    # optimizer, so the family of their optimizer does not matter.
    families = [each.family for each in assigned if each.role != "other"]
    for family in dict.fromkeys(families):
        note = _on_family(assigner, family)
        if note and family == "unknown" and assigner.source.recipe is None:
            warn(f"{note} To measure the best learning rate, run ra.calibrate.")
        if note:
            notes.append(note)
    return tuple(notes)


def _without_law(assigner: Assigner, survey: Survey) -> str:
    """Return a warning about adapters without a scaling law, or "" if there are none."""
    kinds = _kinds_without_law(assigner, survey)
    if not kinds:
        return ""
    words = " and ".join(sorted(set(kinds.values())))
    return (
        f"No scaling law covers {words}: {len(kinds)} parameters, such as {next(iter(kinds))},"
        " train at the base learning rate, regardless of tuned_at=. To use a different learning"
        " rate for them, pass rates=."
    )


def _kinds_without_law(assigner: Assigner, survey: Survey) -> dict[str, str]:
    """Return the names of the parameters that no scaling law covers, with the adapter's
    type.

    Parameters for which the user set an explicit learning rate are left out. Adapters
    without matrices A and B, such as LoHa, are included only if the user passed a
    reference. A user who passes no reference does not expect the package to convert
    learning rates.
    """
    kinds = dict[str, str]()
    explicit_rate = assigner.source.explicit_rate
    for factor in survey.factors:
        if factor.init == "other" and explicit_rate(factor.name) is None:
            kinds[factor.name] = LAWLESS.get(factor.kind, _NO_ZERO)
    if assigner.method == "full":
        return kinds
    others = dict.fromkeys(unread_lora(survey), _UNREAD)
    if assigner.source.reference is not None:
        for name, kind in survey.unsupported.items():
            # A LoRA adapter can have further parameters, such as DoRA's magnitude. They
            # train at the base learning rate, as users expect, so there is no warning.
            if is_other_adapter(name) or not survey.factors:
                others[name] = kind
    for name, kind in others.items():
        if explicit_rate(name, other=True) is None:
            kinds[name] = kind
    return kinds


def _on_reference(assigner: Assigner, survey: Survey) -> Iterator[str]:
    """Yield a note about the assumed reference if the user did not pass `tuned_at`."""
    configurations = {(f.rank, f.scaling, f.init) for f in survey.factors}
    if assigner.source.reference is None and len(configurations) > 1:
        yield (
            f"tuned_at= was not passed, so we assume that lr was tuned at {assigner.reference},"
            " which is the most common configuration of this model."
        )


def _on_inits(assigner: Assigner, survey: Survey) -> Iterator[str]:
    """Yield notes about unknown inits and about inits that differ from the reference."""
    if any(f.init == "unknown" for f in survey.factors):
        yield (
            "The init of some adapters could not be read. Their learning rates are scaled as if B"
            " had started at zero, as in PEFT."
        )
    tuned = assigner.reference
    if assigner.method == "full" or tuned.method == "full":
        return
    other = "B" if tuned.init == "A" else "A"
    if any(f.init == other for f in without_embeddings(survey.factors)):
        yield (
            f"Some adapters have init {other}, but lr was tuned at init {tuned.init}. Their"
            f" learning rates are converted with the scaling law for init {other}, which cannot"
            f" account for this difference. Tune or calibrate at init {other} instead."
        )


def _on_full_finetuning(assigner: Assigner, survey: Survey) -> Iterator[str]:
    """If the learning rate was converted from LoRA to full finetuning, yield notes that
    explain how uncertain the result is.
    """
    if assigner.method != "full" or assigner.reference.method != "lora":
        return
    if assigner.law.name == "constant":
        yield (
            "No scaling law converts this LoRA learning rate to full finetuning. The best learning"
            f" rate for full finetuning may be several times higher or lower. {_SETTLE}"
        )
        return
    if assigner.law.name != "power":
        others = "" if assigner.family == "sign-like" else _NOT_ADAM
        yield f"{FULL_TRUST}{others} {_SETTLE}{_on_dtype(assigner, survey)}"
        return
    # With a recipe, its notes already describe the uncertainty and the effect of
    # bfloat16.
    recipe = assigner.source.recipe
    if recipe is None or recipe.full_seen:
        return
    if _is_raised(assigner, survey):
        yield _on_dtype(assigner, survey).strip()


def _on_dtype(assigner: Assigner, survey: Survey) -> str:
    """Return a note about the effect of the weights' dtype in full finetuning."""
    if not _is_measured(assigner):
        return ""
    if _is_raised(assigner, survey):
        return (
            f" The learning rate was multiplied by {BFLOAT16:g}, because these weights train in"
            " bfloat16. If your trainer keeps a float32 copy of the weights, as DeepSpeed does,"
            f" divide the learning rate by {BFLOAT16:g}."
        )
    return (
        " The learning rate assumes that the weights train in float32 or have float32 masters. If"
        f" the weights themselves train in bfloat16, multiply it by {BFLOAT16:g}."
    )


def _is_raised(assigner: Assigner, survey: Survey) -> bool:
    """Return whether the learning rate was increased because weights train in bfloat16."""
    dtypes = {factor.dtype for factor in survey.factors} - {*assigner.kept}
    return "bfloat16" in dtypes and _is_measured(assigner)


def _is_measured(assigner: Assigner) -> bool:
    """Return whether the measured ratio between LoRA's and full finetuning's learning rates
    is used, instead of the ratio that the scaling law predicts.
    """
    of_recipe = assigner.source.recipe is not None
    return is_measured(assigner.law, assigner.reference, of_recipe=of_recipe)


def _on_batch(assigner: Assigner) -> Iterator[str]:
    """Yield a note about the effect of the batch size on the learning rates."""
    batch = assigner.source.batch
    tuned = assigner.reference.batch
    if batch is None or batch == tuned:
        return
    if tuned is None:
        yield (
            "batch= has no effect, because tuned_at= contains no batch size. Add the batch size at"
            " which lr was tuned, for example tuned_at='r=16,alpha=32,batch=16'."
        )
        return
    ratio = batch / tuned
    by_batch = checked_batch_multiplier(assigner.law, ratio)
    yield (
        f"From batch {tuned:g} to {batch:g}, every learning rate is multiplied by"
        f" {by_batch:.3g}{beyond_batches(ratio)}. This is a rule of thumb."
    )


def _on_family(assigner: Assigner, family: str) -> str:
    """Return a note about the family of an optimizer, or "" if none is needed.

    No note is needed for the family of Adam, and for a law that gives every parameter
    the base learning rate.
    """
    law = assigner.source.law
    if assigner.optimizer is None or family == "sign-like" or law.name == "constant":
        return ""
    words = FORMS[family].words if family in FORMS else ONE_RATE[family]
    if family != "unknown" and law.family is None:
        words = f"{family}, for which the law {law.name!r} is not defined"
    return f"{assigner.optimizer.__name__} is {words}."
