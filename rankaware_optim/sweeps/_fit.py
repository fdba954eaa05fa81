"""`fit_sweep`: the calibration's fit on the rows of a sweep from any tool."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch.optim import Optimizer

from .._checks import MOST_RANKS, MOST_TRIALS, check_init, is_within, range_of, shown
from .._optimizers import get_optimizer_class
from .._types import Reference, Scaling, infer_scaling
from ..calibration import versions_used
from ..errors import CalibrationError
from ..fitting import (
    Fit,
    Observation,
    Prior,
    centred_law,
    diverged,
    fit_observations,
    prior_of,
    shrink,
)
from ..laws import PRIOR_LAW, Constant, Law, MuA, bound_law, checked_multiplier, get_law
from ..recipe import Z90, Recipe, recipe_of
from ._io import Source, Sweep, SweepRun, read_sweep
from ._runs import GridEnd, ends_of, known_alpha, observation_of, selected, site_of

# If alpha is unknown: standard deviations of the drift about the middle convention, s ∝ 1/√r, and
# of full finetuning. The conventions s ∝ 1 and s ∝ 1/r are a quarter of an octave per octave to
# either side (η ∝ s^(-1/2)).
_AS_SWEPT_SD = (0.3, 2.0)
# Prior of log2 of the effective tokens: published language models 8 to 16, small networks 1 to 50.
_TOKENS = (3.0, 1.5)
_TOKENS_GRID = np.arange(-2.0, 10.25, 0.5)
# A best rate at an end of its grid is a bound. Octaves by which the optimum may be beyond it, and
# below the lowest rate.
_EDGE_SD, _BELOW = 1.0, 0.5
_OFF = 0.1  # octaves: error of µA for a rank's best rate at the right number of tokens
_UNSURE = 0.75  # octaves: a base rate with a larger standard deviation gets a note
_NO_DRIFT_SD = 1e-3  # octaves per octave, in a fit of tokens
_SAME_SCALING = 1e-3  # octaves
_OPEN = 0.8  # share of the prior's sd above which the data hardly determine the drift


def fit_sweep(
    sweep: Source | Sweep,
    *,
    optimizer: type[Optimizer] | str = "AdamW",
    name: str = "sweep",
    law: str | Law = PRIOR_LAW,
    fit: Literal["drift", "tokens"] = "drift",
    model: str | None = None,
    alpha: float | Literal["rank"] | None = None,
    init: Literal["A", "B"] | None = None,
    fan_in: float | None = None,
    full_fan_in: float | None = None,
    batch: float | None = None,
    steps: int | None = None,
    warmup: float | None = None,
    settings: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Recipe:
    """Fit a recipe to an existing learning-rate sweep from any tool.

    A rank's loss against log2 of the rate is modelled as a bowl with a cliff, and the best rates
    are shrunk towards the law. What the data do not determine is in the recipe's `notes` and widens
    its band: a best rate at an edge of its grid, a single rank, a loss that hardly depends on the
    rate. Diverged runs set the ceiling.

    Args:
        sweep: dicts, or a .csv, .tsv, .json or .jsonl file, with the columns of `read_sweep`.
        optimizer: the optimizer of the sweep, a class or a name. It decides the law's form.
        name: the recipe's name.
        law: the law that maps rates between ranks, by default µA with 8 tokens. The fall in rank at
            Init[B] is in the fit's prior.
        fit: the correction of the law: "drift" is a power of the rank. "tokens" is the number of
            effective tokens of `MuA`, whose effect is bounded.
        model: selects the rows of one model, if the sweep has several. It is filled in if rows have
            none.
        alpha: alpha of rows without one: a number, or "rank" if it follows the rank. If it stays
            unknown, the rates hold only for the alpha swept, and the drift in rank is less certain.
        init: selects rows as `model` does: "A" (B starts at zero, as in PEFT, the default) or "B"
            (A starts at zero).
        fan_in: the model's mean fan-in, for rows without one. If it stays unknown, the recipe has
            no rate for full finetuning or for the other init.
        full_fan_in: the largest fan-in of the adapted layers, on which the rate of full finetuning
            depends. By default `fan_in`.
        batch: selects rows as `model` does.
        steps: number of steps of a run, if known.
        warmup: share of the steps with a rising rate, from 0 to 1, if known.
        settings: the optimizer's settings. They are only recorded.
        columns: {field: column} if the names differ.

    Returns:
        The recipe.

    Raises:
        CalibrationError: a cell is impossible, several models, batches or inits are mixed, only one
            rate was tried, the loss is the same everywhere, or every run diverged.

    >>> rows = [{"rank": r, "lr": 2.0**x, "loss": 1 + 0.1 * (x + 11) ** 2} for r in (8, 64) for x in range(-14, -8)]
    >>> recipe = fit_sweep(rows, alpha="rank", steps=500)
    >>> 2**-11.5 < recipe.fitted_lr < 2**-10.5
    True
    """
    check_init(init, "The sweep's init is", CalibrationError, known=("A", "B", None))
    given = {
        "fan_in": fan_in,
        "full_fan_in": full_fan_in,
        "batch": batch,
        "steps": steps,
        "warmup": warmup,
    }
    for key, value in given.items():
        kind = {"full_fan_in": "fan_in", "warmup": "share"}.get(key, key)
        if value is not None and not is_within(kind, value):
            raise CalibrationError(f"{key} is {shown(value)}.", f"Give {range_of(kind)}.", key)
    read = read_sweep(sweep, columns=columns)
    chosen = {"model": model, "batch": batch, "init": init, "steps": steps}
    runs = known_alpha(selected(read.runs, chosen), alpha)
    _check_enough(runs)
    found = get_law(law)
    if fit not in ("drift", "tokens"):
        raise CalibrationError(f"fit is {fit!r}.", "Give 'drift' or 'tokens'.", "fit")
    optimizer = get_optimizer_class(optimizer)
    bound = bound_law(found, optimizer, {})
    rows = _Rows(runs, fan_in, full_fan_in)
    if fit == "drift":
        fitted = rows.by_drift(bound)
    elif isinstance(bound, MuA):
        fitted = rows.by_tokens(bound)
    else:
        raise CalibrationError(
            f"The law {found.name!r} has no tokens to fit for {optimizer.__name__}.",
            "Give the fit 'drift', or the law 'mua' for Adam.",
        )
    return recipe_of(
        fitted.fit,
        fitted.law,
        rows.reference,
        name=name,
        scaling_rule=rows.scaling_rule,
        full_fan_in=rows.widest,
        ranks=rows.ranks,
        full_seen=rows.full_seen,
        optimizer=f"{optimizer.__module__}.{optimizer.__qualname__}",
        settings=settings or {},
        steps=runs[0].steps,
        batch=runs[0].batch,
        warmup=warmup,
        versions=versions_used(),
        notes=(*read.notes, *rows.notes(fitted.fit)),
        tensors=rows.tensors(fitted.seen),
    )


def _check_enough(runs: Sequence[SweepRun]) -> None:
    """Raise if the runs cannot be fitted, or not in reasonable time."""
    if len(runs) > MOST_TRIALS:
        raise CalibrationError(
            f"{len(runs)} runs are more than a fit allows, {MOST_TRIALS}.",
            "Select those near the best rates.",
        )
    if len({run.rank for run in runs}) > MOST_RANKS:
        raise CalibrationError(
            f"The sweep has more than {MOST_RANKS} ranks.", "Select some of them."
        )
    if all(math.isinf(run.loss) for run in runs):
        raise CalibrationError(
            f"Every one of {len(runs)} runs diverged.", "Add lower rates to the sweep."
        )
    if all(
        len({run.lr for run in runs if run.rank == rank}) < 2 for rank in {run.rank for run in runs}
    ):
        raise CalibrationError(
            "No rank was tried at more than one rate, so the best rate is unknown.",
            "Sweep at least two rates, better six.",
        )
    losses = {run.loss for run in runs}
    if len(losses) == 1 and len(runs) > 1:
        raise CalibrationError(
            f"The loss is {losses.pop():g} at every rate, so the best rate is unknown.",
            "Check which column holds the loss, and that the runs trained.",
        )


@dataclass(frozen=True)
class _LawFit:
    """A fit, the law on which it is centred, and the runs in reference coordinates."""

    fit: Fit
    law: Law
    seen: list[Observation]


@dataclass(frozen=True)
class _Rows:
    """The rows to fit: runs of one model, and the fan-ins given as arguments."""

    runs: tuple[SweepRun, ...]
    fan_in: float | None
    full_fan_in: float | None

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({run.rank for run in self.runs if run.rank is not None}))

    @property
    def as_swept(self) -> bool:
        return any(run.rank is not None and run.alpha is None for run in self.runs)

    def width(self, full: bool) -> float | None:
        """Return the fan-in of the LoRA rows or of the full-finetuning rows: as given, else from
        the rows.
        """
        given = self.full_fan_in if full and self.full_fan_in is not None else self.fan_in
        said = {
            run.fan_in for run in self.runs if (run.rank is None) == full and run.fan_in is not None
        }
        if given is None and len(said) > 1:
            raise CalibrationError(
                f"The sweep mixes fan-ins: {', '.join(f'{n:g}' for n in sorted(said))}.",
                "A recipe is for one model: give its mean fan-in.",
            )
        return next(iter(said)) if len(said) == 1 else given

    @property
    def reference(self) -> Reference:
        """Return the middle one of the ranks swept, or full finetuning if there are none."""
        if not self.ranks:
            return Reference(method="full", fan_in=self.width(True), batch=self.runs[0].batch)
        rank = self.ranks[(len(self.ranks) - 1) // 2]
        run = min((run for run in self.runs if run.rank == rank), key=lambda run: run.alpha or 0.0)
        alpha = float(rank) if run.alpha is None else run.alpha
        init = run.init or "A"
        return Reference(rank, alpha, run.rslora, init, self.width(False), batch=run.batch)

    @property
    def widest(self) -> float | None:
        """Return the width of full finetuning, or that of LoRA if it is unknown."""
        return self.width(True) or self.width(False)

    @property
    def scaling_rule(self) -> Scaling:
        """Return how the effective multiplier follows the rank."""
        if self.as_swept:
            return "as swept"
        scalings: dict[int, float] = {}
        for run in self.runs:
            if run.rank is None:
                continue
            scaling = site_of(run, self.reference, None)[0].scaling
            known = scalings.setdefault(run.rank, scaling)
            if abs(math.log2(scaling / known)) > _SAME_SCALING:
                return "unknown"  # a rank at several alphas follows no rule
        return infer_scaling(scalings)

    @property
    def full_seen(self) -> bool:
        return any(run.rank is None for run in self.runs)

    def observations(self, law: Law) -> list[Observation]:
        """Return every run at its rate in reference coordinates."""
        seen, reference = [], self.reference
        for run in self.runs:
            here, there = site_of(run, reference, self.width(run.rank is None))
            x = math.log2(run.lr / checked_multiplier(law, here.as_factor(), there))
            seen.append(observation_of(run, run.rank, x))
        return seen

    def tensors(self, seen: Sequence[Observation]) -> dict[str, np.ndarray[Any, Any]]:
        """Return `Recipe.tensors`: the runs in reference coordinates, and at their own rates."""
        return {
            "rank": np.array([o.rank or 0 for o in seen], np.int64),
            "seed": np.array([o.seed for o in seen], np.int64),
            "lr": np.array([2.0**o.x for o in seen]),
            "own_lr": np.array([run.lr for run in self.runs], np.float64),
            "value": np.array([o.value for o in seen], np.float64),
            "diverged": np.array(diverged(seen), bool),
        }

    def _fitted(self, law: Law, prior: Prior) -> _LawFit:
        """Return the fit of the runs along `law`. Best rates at an end of their grid are bounds."""
        seen = self.observations(centred_law(law, self.reference, prior.pivot))
        made = fit_observations(seen, prior)
        if made is None:
            raise CalibrationError(
                f"Every one of {len(seen)} runs diverged.", "Add lower rates to the sweep."
            )
        return _LawFit(_bounded(made, ends_of(seen)), law, seen)

    def by_drift(self, law: Law) -> _LawFit:
        """Return the calibration's fit: base rate, drift in rank, factor of full finetuning."""
        prior = prior_of(self.reference, self.ranks, self.widest)
        if self.as_swept:
            prior = replace(prior, drift_sd=_AS_SWEPT_SD[0], full_sd=_AS_SWEPT_SD[1])
        return self._fitted(law, prior)

    def by_tokens(self, bound: MuA) -> _LawFit:
        """Return the fit without drift, with the tokens at which the ranks' best rates agree,
        averaged over a grid.
        """
        laws = [replace(bound, tokens=float(2.0**t)) for t in _TOKENS_GRID]
        prior = replace(prior_of(self.reference, self.ranks, self.widest), drift_sd=_NO_DRIFT_SD)
        fits = [self._fitted(law, prior).fit for law in laws]
        belief = -0.5 * ((_TOKENS_GRID - _TOKENS[0]) / _TOKENS[1]) ** 2
        weights = np.exp([b - m for b, m in zip(belief, map(_disagreement, fits), strict=True)])
        weights /= weights.sum()
        best = replace(bound, tokens=float(2.0 ** float(weights @ _TOKENS_GRID)))
        fitted = self._fitted(best, prior)
        lines = np.array([self._line(law, best) for law in laws])
        lines[:, 0] += [fit.mean[0] for fit in fits]
        about = lines - weights @ lines
        covariance = fitted.fit.covariance.copy()
        covariance[:2, :2] += (weights[:, None] * about).T @ about
        without_drift = fitted.fit.mean * (1.0, 0.0, 1.0)
        return replace(fitted, fit=replace(fitted.fit, mean=without_drift, covariance=covariance))

    def _line(self, law: Law, best: Law) -> tuple[float, float]:
        """Return how `law` differs from `best` over the ranks: octaves at their middle, and octaves
        per octave.
        """
        if not self.ranks:
            return 0.0, 0.0
        low, high = (
            next(run for run in self.runs if run.rank == self.ranks[end]) for end in (0, -1)
        )
        if low.rank == high.rank:
            high = replace(high, rank=4 * self.ranks[0])
        apart = []
        for run in (low, high):
            here, there = site_of(run, self.reference, self.width(False))
            rates = [checked_multiplier(each, here.as_factor(), there) for each in (law, best)]
            apart.append(math.log2(rates[0] / rates[1]))
        return sum(apart) / 2, (apart[1] - apart[0]) / math.log2((high.rank or 1) / (low.rank or 1))

    def notes(self, fit: Fit) -> Iterator[str]:
        """Yield sentences on what the rows do not determine."""
        ended = {run.rank for run in self.runs if math.isfinite(run.loss)}
        for lost in sorted(set(self.ranks) - ended):
            yield (
                f"rank {lost}: every run diverged, so its rate is no measurement, and may"
                " diverge too"
            )
        for rank, end in ends_of(self.observations(Constant())).items():
            label, way = (
                f"rank {rank}" if rank else "full finetuning",
                "below" if end.end == "lowest" else "above",
            )
            yield (
                f"{label}: the best rate, {2.0**end.x:.3g}, is the {end.end} tried; the optimum may"
                f" be {way}"
            )
        sd = np.sqrt(np.diag(fit.covariance))
        if sd[0] > _UNSURE:
            yield (
                f"the loss hardly determines the best rate: its band is {2 * Z90 * sd[0]:.1f}"
                " octaves wide"
            )
        if len(self.ranks) == 1:
            yield "one rank was swept, so only the law says how the rate moves with rank"
        elif self.ranks and sd[1] > _OPEN * fit.prior.drift_sd > _OPEN * _NO_DRIFT_SD:
            yield (
                "the ranks swept hardly determine how the rate moves with rank: it mostly follows"
                " the law"
            )
        if self.as_swept:
            yield "the sweep has no alpha: its rates hold for the alpha swept"
        if self.runs[0].steps is None:
            yield "the sweep does not give its steps, on which the best rate depends"


def _disagreement(fit: Fit) -> float:
    """Return half the weighted sum of squares of the LoRA ranks' best rates about their mean."""
    vertices = [vertex for rank, vertex in fit.vertices.items() if rank is not None]
    if not vertices:
        return 0.0
    means, sds = np.array(vertices).T
    weights = 1.0 / (sds**2 + _OFF**2)
    return float(0.5 * weights @ (means - weights @ means / weights.sum()) ** 2)


def _bounded(fit: Fit, ends: Mapping[int | None, GridEnd]) -> Fit:
    """Return the fit with the ranks at `ends` as wide bounds. Their errors have one sign and do not
    average out.
    """
    if not ends:
        return fit
    bounds = {rank: (x - _BELOW * (end == "lowest"), _EDGE_SD) for rank, (x, end) in ends.items()}
    vertices = {**fit.vertices, **bounds}
    mean, covariance = shrink(vertices, fit.prior)
    weights = {rank: 1.0 / (sd**2 + fit.prior.scatter**2) for rank, (_, sd) in vertices.items()}
    share = sum(weights[rank] for rank in bounds) / sum(weights.values())
    covariance[0, 0] += (share * _EDGE_SD) ** 2
    return replace(fit, mean=mean, covariance=covariance, vertices=vertices)
