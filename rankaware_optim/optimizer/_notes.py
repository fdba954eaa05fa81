"""What a report says of the rates that an `Assigner` gives."""

from __future__ import annotations

from collections.abc import Iterator

from .._warn import warn
from ..inspection import LAWLESS, Survey, dense, is_other_adapter, unread_lora
from ..laws import SIGN_LIKE, beyond_batches, checked_batch_multiplier
from ._assign import Assigner

_NO_ZERO = (
    "Adapters with neither factor zero (PiSSA, OLoRA, LoRA-GA, or trained ones of undeclared init)"
    " keep the base rate, since no law covers them: give init='A' (B = 0 at the start) or 'B' (A ="
    " 0) if you know it."
)


def notes_of(assigner: Assigner, survey: Survey) -> tuple[str, ...]:
    """Return what a report says of the rates. Warn of adapters that no law moves."""
    unmoved = list(_of_unmoved_adapters(assigner, survey))
    for sentence in unmoved:
        warn(sentence)
    notes = [*assigner.source.notes, *survey.notes, *unmoved]
    notes += _of_adapters(assigner, survey)
    notes += _of_full_finetuning(assigner)
    notes += _of_batch(assigner)
    return tuple(notes)


def _of_unmoved_adapters(assigner: Assigner, survey: Survey) -> Iterator[str]:
    """Yield which adapters keep the base rate: those that no law covers, and LoRA by its name that
    was not read.
    """
    rate_of = assigner.explicit.rate_of
    if any(f.init == "other" and f.kind not in LAWLESS for f in survey.factors):
        yield _NO_ZERO
    kinds = _kinds_without_a_law(assigner, survey)
    if kinds:
        words = " and ".join(sorted(set(kinds.values())))
        yield (
            f"No law covers {words}: {len(kinds)} of its parameters, such as {next(iter(kinds))},"
            " train at the base rate, whatever tuned_at= says. rates= gives them another."
        )
    names = [n for n in unread_lora(survey) if rate_of(n, other=True) is None]
    if names and assigner.method == "lora":
        yield (
            f"{len(names)} trainable parameters with 'lora' in their names, such as {names[0]}, are"
            " in no LoRA pair that inspection can read, so no law moves their rate: rates= gives"
            " them one, and register_convention() adds a layout."
        )


def _kinds_without_a_law(assigner: Assigner, survey: Survey) -> dict[str, str]:
    """Return the kinds of adapters that no law covers, by their parameters. Those of no A and B are
    of interest where a rate is moved from a reference.
    """
    kinds, rate_of = dict[str, str](), assigner.explicit.rate_of
    for factor in survey.factors:
        if factor.kind in LAWLESS and rate_of(factor.name) is None:
            kinds[factor.name] = LAWLESS[factor.kind]
    if assigner.source.reference is None:
        return kinds
    for name, kind in survey.unsupported.items():
        if is_other_adapter(name) and rate_of(name, other=True) is None:
            kinds[name] = kind
    return kinds


def _of_adapters(assigner: Assigner, survey: Survey) -> Iterator[str]:
    """Yield what is assumed of the adapters' ranks and inits."""
    tuned = assigner.reference
    kinds = {(f.rank, f.scaling, f.init) for f in survey.factors}
    if assigner.source.reference is None and len(kinds) > 1:
        yield (
            f"tuned_at not given: lr counts as tuned at {tuned}, the most common of this model."
        )
    if any(f.init == "unknown" for f in survey.factors):
        yield (
            "The init of some adapters could not be read. It is assumed that they started at B ="
            " 0."
        )
    another = "B" if tuned.init == "A" else "A"
    is_lora = assigner.method == tuned.method == "lora"
    if is_lora and any(f.init == another for f in dense(survey.factors)):
        yield (
            f"Adapters at init {another} are scaled within their own init, though the rate"
            f" was tuned at init {tuned.init}: tune or calibrate there."
        )


def _of_full_finetuning(assigner: Assigner) -> Iterator[str]:
    """Yield what is uncertain of a rate that is moved from LoRA to full finetuning."""
    if assigner.method != "full" or assigner.reference.method != "lora":
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
    batch, tuned = assigner.source.batch, assigner.reference.batch
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
