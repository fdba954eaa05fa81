"""The law measured instead of assumed: a few steps of the real optimizer in place of a formula."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from .._checks import check_init, is_whole, shown
from .._optimizers import optimizer_family
from .._types import Factor, Reference
from ..errors import LawError
from ._base import Law, check_parameters
from ._mua import MuA
from ._simulate import (
    Batch,
    Change,
    Stepper,
    advance,
    change_of,
    class_of,
    draw_pair,
    one_hot,
    rates_for,
    step_pair,
    synthetic,
)

_ROWS = 1024  # outputs that stand for more where only the fan-in matters, while r is well below them
_ROWS_FULL = 128  # the same for whole weights, where they do not matter at all
# Widths above these are continued along the exponent of the last two octaves, to stay at a second a rate or below.
_CAPS = {"sign-like": 4096, "gradient-like": 2048, "first-step": 2048, "relative-scale": 1024}
_MOST_RANK = 2**15  # half a gigabyte a factor
_CAP, _CAP_FULL = 512, 256  # of other families; of whole weights of all but sign-like ones


@dataclass(frozen=True)
class Measured(Law):
    """The law measured instead of assumed: rates at which the real optimizer moves the output as far.

    multiplier = η(factor) / η(reference), η being the rate at which `steps` steps of the optimizer, bound by its
    class, on a layer of the given rank, scaling, fan-in and init move the output by an rms of `target`, on `tokens`
    independent synthetic tokens. Any optimizer that can step, at finite sizes and without training. B follows A at
    `ratio`. A layer counts as square, since a reference states one width, and a width of 1 is an embedding's. Widths
    above 4,096 for sign-like optimizers, 2,048 for SGD and LARS, 1,024 for LAMB's kind and 512 for others
    (256 for whole weights, but for the first) continue the exponent of the two octaves below, which costs up to 0.3
    octaves for every two continued. tokens is µA's own number, so that the two agree for AdamW within 0.2 octaves
    while r ≪ n; more tokens mean less coherent gradients. Weight decay is left out. With few steps, a factor whose
    partner starts at zero loses one of them, which would shift LoRA's rates against full finetuning's.

    optimizer: "package:Class", set by `bind`; settings: its other settings as JSON. Raises LawError where the optimizer
    cannot be built or stepped, or never moves the output by `target`.

    >>> law = Measured()
    >>> at = Reference(rank=4, alpha=4, fan_in=64)
    >>> 0.3 < law.multiplier(Factor("w", "A", 16, 64, 64), at) < 0.8
    True
    """

    tokens: int = 8
    steps: int = 16
    seed: int = 0
    target: float = 1.0
    ratio: float = 1.0
    optimizer: str = "torch.optim.adamw:AdamW"
    settings: str = field(default="{}", repr=False)
    name: ClassVar[str] = "measured"

    def __post_init__(self) -> None:
        for name, least, most in (("tokens", 1, 4096), ("steps", 1, 4096), ("seed", 0, 2**62)):
            value = getattr(self, name)
            if not is_whole(value, least) or value > most:
                raise LawError(
                    f"The law 'measured' got {name}={shown(value)}.", f"Give a whole number from {least} to {most}."
                )
        check_parameters(self, "target", "ratio")
        if not isinstance(self.optimizer, str) or not isinstance(_parsed(self.settings), dict):
            raise LawError(
                f"The law 'measured' got optimizer={self.optimizer!r}, settings={self.settings!r}.",
                'Give "package:Class" and a JSON object, or let bind() set them.',
            )

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        name = f"{optimizer_class.__module__}:{optimizer_class.__qualname__}"
        if _REMEMBERED.setdefault(name, optimizer_class) is not optimizer_class:
            _REMEMBERED[name] = optimizer_class  # another class of the same name: what was measured is not its
            _measured_rate.cache_clear()
        plain = {key: value for key, value in settings.items() if key not in ("lr", "params")}
        try:
            return replace(self, optimizer=name, settings=json.dumps(plain, sort_keys=True))
        except TypeError as error:
            raise LawError(
                f"{optimizer_class.__name__} has settings that are not plain values: {error}.",
                "Give numbers, strings and lists, or choose another law.",
            ) from error

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        init = "full" if factor.role == "full" else "B" if factor.init == "B" else "A"
        origin = "full" if reference.method == "full" else reference.init
        here = self.rate(init, factor.rank, factor.scaling, factor.fan_in)
        there = self.rate(origin, reference.rank, reference.scaling, reference.fan_in)
        return here / there * (self.ratio if factor.role == "B" else 1.0)

    def rate(self, init: str, rank: int | None, scaling: float, fan_in: float | None) -> float:
        """η_A, per step, at which the output of a square layer of this fan-in moves by `target`."""
        check_init(init, "A law's init is", LawError, known=("A", "B", "full"))
        if fan_in is None or (rank is None and init != "full"):
            raise LawError(
                "The reference was not resolved: it lacks its fan-in or its rank.",
                "Call reference.resolve(survey), or give fan_in=.",
            )
        if rank is not None and rank > _MOST_RANK:
            raise LawError(f"Rank {rank} is too large to be measured.", f"Ask for at most {_MOST_RANK}.")
        width, full = max(1, round(fan_in)), init == "full"
        at = (self, init, 1 if full or rank is None else rank, 1.0 if full else scaling)
        family = _family(self)
        cap = _CAP_FULL if full and family != "sign-like" else _CAPS.get(family, _CAP)
        if width <= cap:
            return _measured_rate(*at, width)
        top, below = _measured_rate(*at, cap), _measured_rate(*at, cap // 4)
        return float(top * (top / below) ** (math.log2(width / cap) / 2))


_REMEMBERED: dict[str, type[Optimizer]] = {}  # by name, so that a class made in a function is found again


def _parsed(settings: object) -> object:
    try:
        return json.loads(settings) if isinstance(settings, str) else None
    except (ValueError, RecursionError):
        return None


def _optimizer_of(law: Measured) -> type[Optimizer]:
    return _REMEMBERED.get(law.optimizer) or class_of(law.optimizer)


def _family(law: Measured) -> str:
    return optimizer_family(_optimizer_of(law), json.loads(law.settings))


@lru_cache(maxsize=4096)
def _measured_rate(law: Measured, init: str, rank: int, scaling: float, width: int) -> float:
    stepper = Stepper(_optimizer_of(law), json.loads(law.settings), law.steps, law.seed)
    batch = _batch(law, init, width)
    change = _full_change(batch, stepper) if init == "full" else _pair_change(batch, stepper, law, init, rank, scaling)
    guess = MuA(tokens=law.tokens).sigma(init, rank, scaling, width)
    what = f"The output of a layer of width {width} at rank {rank} under {stepper.optimizer.__name__}"
    return rates_for(change, law.target, start=guess / law.steps, what=what)


def _batch(law: Measured, init: str, width: int) -> Batch:
    if width == 1:
        return one_hot(_ROWS_FULL, law.tokens, law.seed)
    most = width if _family(law) != "sign-like" else _ROWS_FULL if init == "full" else _ROWS
    return synthetic(width, min(width, most), law.tokens, law.seed)


def _pair_change(batch: Batch, stepper: Stepper, law: Measured, init: str, rank: int, scaling: float) -> Change:
    start = draw_pair(batch.inputs.shape[0], batch.gradients.shape[0], rank, scaling, init, law.seed, _variance(batch))
    return lambda lr: change_of(batch, step_pair(batch, start, stepper, lr, lr * law.ratio))


def _variance(batch: Batch) -> float:
    """Of a drawn A's entries: 1/n_in, for inputs of norm √n_in."""
    return 1.0 / batch.inputs[:, 0].square().sum().item()


def _full_change(batch: Batch, stepper: Stepper) -> Change:
    """A whole weight W, of variance 1/n_in, under its own gradient g·xᵀ: the rms of ΔW·x."""
    x, g = batch
    weight = draw_pair(x.shape[0], 1, g.shape[0], 1.0, "A", stepper.seed, _variance(batch)).a
    gradient = g @ x.T

    def change(lr: float) -> float:
        param = nn.Parameter(weight.clone())

        def set_gradient() -> None:
            param.grad = gradient.clone()

        advance(stepper, [(param, lr)], set_gradient)
        size = ((param.detach() - weight) @ x).square().mean().sqrt().item()
        return size if math.isfinite(size) else math.inf

    return change
