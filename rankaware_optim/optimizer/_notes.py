"""The notes of a report: adapters without a law, assumptions, and uncertain conversions. Nothing
here decides a learning rate.
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
    "pairs in which neither A nor B started at zero (PiSSA, OLoRA, LoRA-GA, or trained pairs whose"
    " init is unknown: pass init='A' if B started at zero, or init='B' if A did)"
)
_UNREAD = (
    "LoRA parameters that inspection cannot read as pairs (describe their layout with"
    " register_convention())"
)

_SETTLE = (
    "A search on the full model settles it: ra.calibrate(trainer, 'adamw'), or full_trials=3 if a"
    " function builds the model of each trial."
)
_NOT_ADAM = (
    " That is for Adam and its variants: optimizers of another family were not tried."
)


def notes_of(
    assigner: Assigner, survey: Survey, assigned: Iterable[Assigned] = ()
) -> tuple[str, ...]:
    """Return the report's sentences on the learning rates of a model. Warn about adapters and
    optimizers without a law.

    Args:
        assigner: the assigner of the model.
        survey: the parameters of the model that train.
        assigned: the learning rates that were assigned, for notes on the optimizer's families.
    """
    notes = [*assigner.source.notes, *survey.notes]
    if without_law := _without_law(assigner, survey):
        warn(without_law)
        notes.append(without_law)
    notes += _on_reference(assigner, survey)
    notes += _on_inits(assigner, survey)
    notes += _on_full_finetuning(assigner, survey)
    notes += _on_batch(assigner)
    # Parameters outside LoRA have the base learning rate in every family.
    families = [each.family for each in assigned if each.role != "other"]
    for family in dict.fromkeys(families):
        note = _on_family(assigner, family)
        if note and family == "unknown" and assigner.source.recipe is None:
            warn(f"{note} A calibration measures it.")
        if note:
            notes.append(note)
    return tuple(notes)


def _without_law(assigner: Assigner, survey: Survey) -> str:
    """Return a sentence on the adapters without a law, "" if all have one."""
    kinds = _kinds_without_law(assigner, survey)
    if not kinds:
        return ""
    words = " and ".join(sorted(set(kinds.values())))
    return (
        f"No scaling law covers {words}: {len(kinds)} parameters, such as {next(iter(kinds))},"
        " train at the base learning rate, whatever tuned_at= says. Set another by rates=."
    )


def _kinds_without_law(assigner: Assigner, survey: Survey) -> dict[str, str]:
    """Return the kinds of adapters without a law and without an explicit learning rate, by
    parameter name.

    Adapters without A and B, such as LoHa, count only if the user gave a reference: without one
    nothing was to be converted.
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
            # Nobody expects a law for parts of a LoRA adapter, such as DoRA's magnitude.
            if is_other_adapter(name) or not survey.factors:
                others[name] = kind
    for name, kind in others.items():
        if explicit_rate(name, other=True) is None:
            kinds[name] = kind
    return kinds


def _on_reference(assigner: Assigner, survey: Survey) -> Iterator[str]:
    """Yield a note on the assumed reference, if the user did not pass tuned_at=."""
    configurations = {(f.rank, f.scaling, f.init) for f in survey.factors}
    if assigner.source.reference is None and len(configurations) > 1:
        yield (
            f"No tuned_at= was passed, so lr counts as tuned at {assigner.reference}, the most"
            " common configuration of this model."
        )


def _on_inits(assigner: Assigner, survey: Survey) -> Iterator[str]:
    """Yield notes on inits that could not be read, and on inits other than the reference's."""
    if any(f.init == "unknown" for f in survey.factors):
        yield (
            "The init of some adapters could not be read. They are scaled as if B had started at"
            " zero, as in PEFT."
        )
    tuned = assigner.reference
    if assigner.method == "full" or tuned.method == "full":
        return
    other = "B" if tuned.init == "A" else "A"
    if any(f.init == other for f in without_embeddings(survey.factors)):
        yield (
            f"Some adapters have init {other}, but lr was tuned at init {tuned.init}. They are"
            f" scaled by the law of their own init. Tune or calibrate at init {other}."
        )


def _on_full_finetuning(assigner: Assigner, survey: Survey) -> Iterator[str]:
    """Yield how uncertain a learning rate is that was converted from LoRA to full finetuning."""
    if assigner.method != "full" or assigner.reference.method != "lora":
        return
    if assigner.law.name == "constant":
        yield (
            "No scaling law converts this LoRA learning rate to full finetuning, whose best one may"
            f" be several times higher or lower. {_SETTLE}"
        )
        return
    if assigner.law.name != "power":
        others = "" if assigner.family == "sign-like" else _NOT_ADAM
        yield f"{FULL_TRUST}{others} {_SETTLE}{_on_dtype(assigner, survey)}"
        return
    # The notes of a recipe say how far to trust it, and what bfloat16 would change.
    recipe = assigner.source.recipe
    if recipe is None or recipe.full_seen:
        return
    if _is_raised(assigner, survey):
        yield _on_dtype(assigner, survey).strip()


def _on_dtype(assigner: Assigner, survey: Survey) -> str:
    """Return how the dtype of the weights changes a learning rate that is converted from LoRA."""
    if not _is_measured(assigner):
        return ""
    if _is_raised(assigner, survey):
        return (
            f" The learning rate is multiplied by {BFLOAT16:g}, because these weights train in"
            " bfloat16. If your trainer keeps float32 masters of them, as DeepSpeed does, divide it"
            f" by {BFLOAT16:g}."
        )
    return (
        " The learning rate is for float32 weights or float32 masters. If the weights themselves"
        f" train in bfloat16, multiply it by {BFLOAT16:g}."
    )


def _is_raised(assigner: Assigner, survey: Survey) -> bool:
    """Return whether the learning rate is multiplied because weights train in bfloat16."""
    dtypes = {factor.dtype for factor in survey.factors} - {*assigner.kept}
    return "bfloat16" in dtypes and _is_measured(assigner)


def _is_measured(assigner: Assigner) -> bool:
    """Return whether the ratio measured on large models replaces the law."""
    of_recipe = assigner.source.recipe is not None
    return is_measured(assigner.law, assigner.reference, of_recipe=of_recipe)


def _on_batch(assigner: Assigner) -> Iterator[str]:
    """Yield how the run's batch changes the learning rates."""
    batch = assigner.source.batch
    tuned = assigner.reference.batch
    if batch is None or batch == tuned:
        return
    if tuned is None:
        yield (
            "batch= has no effect, because tuned_at= has no batch. Add it, as in"
            " tuned_at='r=16,alpha=32,batch=16'."
        )
        return
    ratio = batch / tuned
    by_batch = checked_batch_multiplier(assigner.law, ratio)
    yield (
        f"From batch {tuned:g} to {batch:g}, every learning rate is multiplied by"
        f" {by_batch:.3g}{beyond_batches(ratio)}. This is a rule of thumb."
    )


def _on_family(assigner: Assigner, family: str) -> str:
    """Return a note on an optimizer's family. It is "" for the usual family, Adam's, and for a law
    that gives every parameter the base learning rate.
    """
    law = assigner.source.law
    if assigner.optimizer is None or family == "sign-like" or law.name == "constant":
        return ""
    words = FORMS[family].words if family in FORMS else ONE_RATE[family]
    if family != "unknown" and law.family is None:
        words = f"{family}, for which the law {law.name!r} has no form"
    return f"{assigner.optimizer.__name__} is {words}."
