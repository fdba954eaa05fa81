"""A law that measures its rates: a few steps of the real optimizer replace the formula."""

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

_ROWS = 1024  # most outputs simulated where only the fan-in matters; well above usual ranks
_ROWS_FULL = 128  # the same for whole weights, whose result does not depend on the number of outputs
# Larger widths are extrapolated with the exponent of the last two octaves. A rate then takes about a second.
_CAPS = {"sign-like": 4096, "gradient-like": 2048, "first-step": 2048, "relative-scale": 1024}
_MOST_RANK = 2**15  # half a gigabyte a factor
_CAP, _CAP_FULL = 512, 256  # for the other families; for whole weights of all families but sign-like


@dataclass(frozen=True)
class Measured(Law):
    """A law that measures rates with the real optimizer, for optimizers without a derived law.

    multiplier = η(factor) / η(reference). η is the rate at which `steps` steps of the optimizer move a layer's output
    by an rms of `target`. The layer has the given rank, scaling, fan-in and init, and synthetic independent tokens as
    input. No model is trained.

    The layer is square, since a reference states one width. A width of 1 means an embedding. Weight decay is left out.
    Large widths are extrapolated with the exponent of the two octaves below: above 4096 for sign-like optimizers, 2048
    for SGD and LARS, 1024 for LAMB and Adafactor, and 512 for others. For whole weights the limit is 256, except for
    sign-like optimizers.

    Args:
        tokens: independent synthetic tokens, as in `MuA`. More tokens mean less coherent gradients.
        steps: optimizer steps. A factor whose partner starts at zero loses the first one, so few steps bias the rates
            of LoRA against those of full finetuning.
        seed: random seed of the layer and its inputs.
        target: rms change of the output to reach, in units of the input's rms.
        ratio: η_B / η_A, dimensionless.
        optimizer: the optimizer as "package:Class". `bind` sets it.
        settings: the optimizer's other settings as a JSON object. `bind` sets them.

    Raises:
        LawError: an argument is out of range, or (from `multiplier`) the optimizer cannot be built or stepped, or never
            moves the output by `target`.

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
            _REMEMBERED[name] = optimizer_class  # a different class of the same name: its rates are measured again
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
        """Return η_A, per step, at which the output of a square layer of this fan-in moves by `target`."""
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


_REMEMBERED: dict[str, type[Optimizer]] = {}  # by name: a class made inside a function cannot be imported


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
    """Variance of the drawn A's entries: 1/n_in, for inputs of norm √n_in."""
    return 1.0 / batch.inputs[:, 0].square().sum().item()


def _full_change(batch: Batch, stepper: Stepper) -> Change:
    """Return the rms of ΔW·x as a function of the rate, for a whole weight W of variance 1/n_in with gradient g·xᵀ."""
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
