"""What a recipe records: the rate, the law, how certain both are, and what they were made with.

Every other module of this folder speaks of it. `Recipe`, on top of them, adds what users call.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from .._checks import MOST_RANKS, limits
from .._types import Reference, Scaling
from ..laws import Power

# In a table of rates by name: the parameter had each trial's base rate
BASE: Literal["base"] = "base"
Trials = Mapping[str, npt.NDArray[Any]]
# Values as a file may have them
Lr = Annotated[float, limits("lr")]
Octaves = Annotated[float, limits("octaves")]
FanIn = Annotated[float, limits("fan_in")]
Rank = Annotated[int, limits("rank")]
Plain = bool | Annotated[int, limits("seed")] | float | str


@dataclass(frozen=True, eq=False)
class Record:
    """A calibrated base rate with its law, uncertainty and provenance. `calibrate` and `fit_sweep`
    make one.

    All rates are per optimizer step. Octaves are units of log2 of a rate.

    Args:
        name: the recipe's name, for messages.
        fitted_lr: the fitted optimum at `reference`. The rate to use is `lr`.
        reference: the configuration that the base rate belongs to.
        law: a `Power` around the law that was calibrated. It holds the drift in rank and the factor
            of full finetuning.
        covariance: 3 × 3 array of (log2 rate at `law.pivot`, drift, log2 `full_factor`), octaves².
        margin: octaves of `lr` below `fitted_lr`. Too high a rate costs more than too low a rate.
        ceiling: the smallest rate that diverged in any trial, moved to `reference` by the law of
            best rates, which a ceiling need not follow. None if no trial did, or if one did below
            `fitted_lr`, as a note says.
        scaling_rule: how the scaling s = alpha / rank followed the ranks r of the
            trials: "fixed" (alpha follows rank), "rslora" (s·√r constant), "alpha" (s·r constant),
            or "unknown".
        full_fan_in: the width that full finetuning's rate belongs to.
        ranks: the LoRA ranks of the trials.
        full_seen: whether full finetuning was among the trials.
        optimizer: the optimizer's class, as "module.Class".
        settings: the optimizer's settings other than the rate.
        steps: optimizer steps of a trial, None if a sweep did not give them.
        warmup: share of the steps with a rising rate, from 0 to 1.
        other_rates: rates of the parameters that LoRA trials trained beside the factors, by name
            with "*" for numbers. "base" means each trial's base rate.
        layers: mean fan-in of the adapted layers, by name with "*" for numbers. On a model that has
            others the optimizer warns.
        versions: versions of the packages used.
        source: the training loop's name and the hash of its source.
        notes: sentences on what the data did not determine.
        tensors: numpy arrays, one entry per trial: `rank` (0 for full finetuning), `lr`, `seed`,
            `value` (NaN if pruned), `diverged`, `pruned`, `steps`, and `curve` of shape (trials,
            values).
        steepness: steepness of the loss above the optimum, per octave. The margin for another
            configuration follows from it and the uncertainty there. With 0 it is `margin`
            everywhere.
        scatter: standard deviation of a rank's own best rate about the law, octaves.
        missing: the name of the trials' file if it was not beside the recipe when it was read.
            Rates do not need it.
    """

    name: str
    fitted_lr: Lr
    reference: Reference
    law: Power
    covariance: npt.NDArray[np.float64]
    margin: Octaves = 0.0
    ceiling: Lr | None = None
    scaling_rule: Scaling = "unknown"
    full_fan_in: FanIn | None = None
    ranks: Annotated[tuple[Rank, ...], Meta(max_length=MOST_RANKS)] = ()
    full_seen: bool = False
    optimizer: str = "torch.optim.AdamW"
    settings: Mapping[str, Plain | tuple[Plain, ...]] = field(default_factory=dict)
    steps: Annotated[int, limits("steps")] | None = None
    warmup: Annotated[float, limits("share")] | None = None
    other_rates: Mapping[str, Lr | Literal["base"]] = field(default_factory=dict)
    layers: Mapping[str, FanIn] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tensors: Trials = field(default_factory=dict, repr=False)
    steepness: Annotated[float, limits("steepness")] = 0.0
    scatter: Octaves = 0.0
    missing: str = ""

    def __eq__(self, other: object) -> bool:
        """Return whether all values and trials are equal. NaN equals NaN."""
        if not isinstance(other, Record):
            return NotImplemented
        return _is_equal({**vars(self), "missing": ""}, {**vars(other), "missing": ""})

    @property
    def lr(self) -> float:
        """The base rate to use, per step: `margin` octaves below `fitted_lr`."""
        return float(self.fitted_lr * 2.0**-self.margin)

    @property
    def batch(self) -> float | None:
        """Examples or tokens per step, None if unknown."""
        return self.reference.batch

    @property
    def tag(self) -> str:
        """The recipe in a line, "hash name", as stored in an optimizer's state_dict.

        The hash covers what decides the rates: base rate, reference, law and scaling rule. It does
        not depend on the name or on the version of this package.
        """
        r = self.reference
        at = (r.method, r.rank, r.scaling, r.init, r.fan_in, r.batch)
        decisive = (self.lr, at, self.scaling_rule, self.law)
        text = json.dumps(decisive, default=repr)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"{digest[:12]} {self.name}"


def _is_equal(one: Any, two: Any) -> bool:
    if isinstance(one, np.ndarray):
        return np.array_equal(one, two, equal_nan=True)
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(_is_equal(one[k], two[k]) for k in one)
    return bool(one == two)
