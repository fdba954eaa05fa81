"""`convert_lr`: a learning rate tuned at one rank, alpha, width, batch or method, for another one.

The command of the same name is in `cli/_convert.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .._checks import check_lr
from .._near_misses import explain_near_misses
from .._rate import Rate
from .._types import Reference
from ..errors import InvalidReferenceError
from ..inspection import ReferenceLike, Survey, as_reference
from ..laws import (
    DEFAULT_LAW,
    Law,
    caution_of,
    checked_multiplier,
    get_law,
    is_measured,
    law_title,
)
from ..optimizer import Source, make_assigner, notes_of
from ..recipe import ANY_WIDTH


@explain_near_misses
def convert_lr(
    lr: float | Rate,
    from_: ReferenceLike,
    to: ReferenceLike,
    *,
    law: str | Law = DEFAULT_LAW,
    dtype: str | None = None,
) -> Rate:
    """Convert a rate tuned at one configuration to another: the rate at which the optimizer would
    train there.

    If the law gives B a rate of its own, the converted one is A's.

    Args:
        lr: the tuned rate, per step.
        from_: the configuration of `lr`: a `Reference`, a text such as "r=16,alpha=32", an
            adapter's folder or file, or a LoraConfig.
        to: the other configuration. A text without alpha, such as "r=64", keeps the alpha
            of `from_`. A width that only one of the two has is used for both, and 4096 if
            neither has one. The optimizer uses `Survey.width` for LoRA, the mean fan-in, and
            `Survey.full_width` for full finetuning, the largest one (from A = 0 the mean). If
            both have a batch, the rate moves by the law's rule for the batch.
        law: a law or its name. For an optimizer other than Adam and its variants, give
            Falling().bind(optimizer_class, settings).
        dtype: the dtype in which the weights train in full finetuning, such as "bfloat16". By
            default float32, which also stands for float32 masters. At a LoRA width of 1,024 or more
            the learning rate is 2.8 times as high in bfloat16.

    Returns:
        The rate, without a band, and notes on what it follows from.

    Raises:
        InvalidReferenceError: a text is no configuration; the init changes; or the method changes
            and no width is known.
        InspectionError: an adapter cannot be read.
        OptimizerError: `lr` is not a positive finite number.
        LawError: the law is unknown or gives no multiplier.

    >>> rate = convert_lr(2e-4, "r=16,alpha=32", "r=64,alpha=64", law="mua-paper")
    >>> print(f"{rate.lr:.3g}")
    0.000139
    """
    base = check_lr(lr)
    law = get_law(law)
    origin = as_reference(from_)
    asked = target = as_reference(to, like=origin)
    width = origin.fan_in or target.fan_in
    if origin.method == target.method == "lora" and origin.init != target.init:
        raise InvalidReferenceError(
            f"No law moves a rate from init {origin.init} to init {target.init}.",
            "Take a first rate from suggest_lr, in a shell from rankaware suggest --init"
            f" {target.init}, or calibrate there.",
        )
    if origin.method != target.method and width is None:
        raise InvalidReferenceError(
            f"From {origin} to {target} the rate depends on the model's width, which neither"
            " reference has.",
            "Give fan_in=, such as 4096, in one of them.",
        )
    origin = replace(origin, fan_in=width or ANY_WIDTH)
    target = replace(target, fan_in=target.fan_in or origin.fan_in)
    batch = None if origin.batch is None else target.batch
    factor = replace(target.as_factor(), dtype=dtype or "")
    source = Source(law=law, reference=origin, batch=batch)
    survey = Survey((factor,))
    assigner = make_assigner(survey, source, target.method)
    moved = assigner.assign(factor.name, factor).multiplier
    notes = _notes(law, origin, target, width, moved)
    return Rate(
        check_lr(base * moved, "The converted lr"),
        notes=(*notes, *notes_of(assigner, survey)),
        configuration=str(target),
        reference=asked,
    )


def _notes(
    law: Law, origin: Reference, target: Reference, width: float | None, moved: float
) -> Iterator[str]:
    """Yield what the rate follows from."""
    factor = target.as_factor()
    multiplier = checked_multiplier(law, factor, origin)
    lora = target if target.method == "lora" else origin
    if origin.method != target.method and is_measured(law, lora):
        yield (
            f"The rate follows the {law_title(law)} between LoRA's ranks and alphas, and one ratio"
            " that was measured on large models between LoRA and full finetuning."
        )
    elif multiplier != 1.0:
        yield f"The rate follows the {law_title(law)}."
    if caution := caution_of(moved):
        yield caution
    if origin.method != target.method:
        widths = {at.method: at.fan_in for at in (origin, target)}
        of_full = "mean" if origin.init == "B" else "largest"
        yield (
            f"The width is the mean fan-in for LoRA, {widths['lora']:g}, and the {of_full} for full"
            f" finetuning, {widths['full']:g}: give each its own fan_in= if they differ."
        )
    if target.method == "lora":
        of_b = checked_multiplier(law, replace(factor, role="B"), origin)
        if of_b != multiplier:
            yield f"The law {law.name!r} gives B a rate of its own. This one is A's."
    if width is None and multiplier != 1.0:
        yield (
            f"No width was given, so {ANY_WIDTH:g} is taken. Add your model's,"
            " such as fan_in=2048."
        )
