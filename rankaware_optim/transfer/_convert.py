"""This module uses a scaling law to convert a learning rate to another LoRA rank, alpha
or width, or to full finetuning.

The command `rankaware convert` is in `cli/_convert.py`.
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
    """Convert a tuned learning rate to another LoRA rank, alpha or width, or between
    LoRA and full finetuning.

    `RankAwareOptimizer` would use the same learning rate for the new configuration. If
    the scaling law uses different learning rates for the LoRA matrices A and B,
    `convert_lr` returns the learning rate for A.

    Args:
        lr: the tuned learning rate, per step.
        from_: the configuration that `lr` was tuned for. It can be a `Reference`, a string such as
            "r=16,alpha=32", the folder or file of an adapter, or a LoraConfig.
        to: the new configuration. If it is a string without alpha, such as "r=64", alpha is taken
            from `from_`. If only one of the two configurations has a width, it is used for both. If
            neither has a width, 4096 is used. The width for LoRA is the mean fan-in
            (`Survey.width`), and the width for full finetuning is the largest fan-in, or the mean
            if A starts at zero (`Survey.full_width`). If both configurations have a batch size, the
            learning rate is also converted by the law's rule for batch sizes.
        law: a scaling law or its name. For optimizers that are not variants of Adam, pass
            Falling().bind(optimizer_class, settings).
        dtype: the dtype of the weights during full finetuning, such as "bfloat16". The default is
            float32, which also covers float32 master weights. At a LoRA width of 1,024 or more, the
            learning rate is 2.8 times as high in bfloat16.

    Returns:
        The learning rate without a 90 % interval, and notes about how it was computed.

    Raises:
        InvalidReferenceError: a string is not a valid configuration, the init changes, or the
            method changes and no width is known.
        InspectionError: an adapter cannot be read.
        OptimizerError: `lr` is not a positive finite number.
        LawError: the law is unknown or returned an unusable multiplier.

    >>> rate = convert_lr(2e-4, "r=16,alpha=32", "r=64,alpha=64", law="mua-paper")
    >>> print(f"{rate.lr:.3g}")
    0.000139
    """
    base = check_lr(lr)
    law = get_law(law)
    origin = as_reference(from_)
    # `asked` is returned as the rate's reference. `target` gets defaults for missing values below.
    asked = target = as_reference(to, like=origin)
    width = origin.fan_in or target.fan_in
    if origin.method == target.method == "lora" and origin.init != target.init:
        old, new = origin.init, target.init
        raise InvalidReferenceError(
            f"A learning rate cannot be converted from init {old!r} to init {new!r}, because no"
            " scaling law describes this change. (B starts at zero with init 'A', and A starts at"
            " zero with init 'B'.)",
            f"To get a first learning rate, call ra.suggest_lr(model, init={new!r}) (in a shell:"
            f" rankaware suggest --init {new}), or run ra.calibrate with the new init.",
        )
    if origin.method != target.method and width is None:
        raise InvalidReferenceError(
            f"The conversion from {origin} to {target} depends on the model's width, but the width"
            " is unknown.",
            "Add the model's width to one of the two configurations, for example fan_in=4096.",
        )
    origin = replace(origin, fan_in=width or ANY_WIDTH)
    target = replace(target, fan_in=target.fan_in or origin.fan_in)
    # A batch size can only be converted if it is known for both configurations.
    batch = None if origin.batch is None else target.batch
    # Compute the learning rate with the optimizer's code, so that the two can never disagree.
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
    """Yield notes that explain how the converted learning rate was computed and which
    widths were assumed.
    """
    factor = target.as_factor()
    multiplier = checked_multiplier(law, factor, origin)
    lora = target if target.method == "lora" else origin
    if origin.method != target.method and is_measured(law, lora):
        yield (
            "The learning rate was converted between LoRA and full finetuning by a ratio that was"
            " measured on large models, and between LoRA ranks and alphas by the"
            f" {law_title(law)}."
        )
    elif multiplier != 1.0:
        yield f"The learning rate was converted by the {law_title(law)}."
    if caution := caution_of(moved):
        yield caution
    if origin.method != target.method:
        widths = {at.method: at.fan_in for at in (origin, target)}
        of_full = "mean" if origin.init == "B" else "largest"
        yield (
            f"The conversion used the mean fan-in {widths['lora']:g} for LoRA and the {of_full}"
            f" fan-in {widths['full']:g} for full finetuning. If your model has other values, set"
            " fan_in= in both configurations."
        )
    # The factor of `as_factor` has the role A, so compare with B.
    if target.method == "lora":
        of_b = checked_multiplier(law, replace(factor, role="B"), origin)
        if of_b != multiplier:
            yield (
                f"The law {law.name!r} uses different learning rates for the LoRA matrices A and B."
                " This is the learning rate for A."
            )
    if width is None and multiplier != 1.0:
        yield (
            f"The model's width is unknown, so {ANY_WIDTH:g} was assumed. Add the width, for"
            " example fan_in=2048."
        )
