"""`fit_sweep`: the calibration's fit on the rows of a sweep from any tool."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.optim import Optimizer

from .._checks import MOST_RANKS, MOST_TRIALS, check_init, is_within, range_of, shown
from .._optimizers import get_optimizer_class
from .._printing import times
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
)
from ..laws import PRIOR_LAW, Law, MuA, bound_law, checked_multiplier, get_law
from ..recipe import Z90, Recipe, recipe_of
from ._runs import (
    GridEnd,
    Runs,
    Source,
    SweepRun,
    ends_of,
    observation_of,
    read_sweep,
    reference_of,
    selected,
    site_of,
    with_alpha,
    with_width,
)

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


def fit_sweep(  # noqa: PLR0913
    sweep: Source,
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
        law: the law that maps rates between ranks, by default µA. The fall in rank at
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

    >>> points = [(rank, x) for rank in (8, 64) for x in range(-14, -8)]
    >>> rows = [{"rank": r, "lr": 2.0**x, "loss": 1 + 0.1 * (x + 11) ** 2} for r, x in points]
    >>> recipe = fit_sweep(rows, alpha="rank", steps=500)
    >>> 2**-11.5 < recipe.fitted_lr < 2**-10.5
    True
    """
    check_init(init, "The sweep's init is", CalibrationError, known=("A", "B", None))
    _check_within("fan_in", fan_in)
    _check_within("full_fan_in", full_fan_in, "fan_in")
    _check_within("batch", batch)
    _check_within("steps", steps)
    _check_within("warmup", warmup, "share")
    if fit not in ("drift", "tokens"):
        raise CalibrationError(f"fit is {fit!r}.", "Give 'drift' or 'tokens'.", "fit")
    chosen_law = get_law(law)
    optimizer = get_optimizer_class(optimizer)
    bound = bound_law(chosen_law, optimizer, {})
    read = read_sweep(sweep, columns=columns)
    chosen = {"model": model, "batch": batch, "init": init, "steps": steps}
    runs = with_alpha(selected(read.runs, chosen), alpha)
    _check_enough(runs)
    full_fan_in = full_fan_in or fan_in
    runs = with_width(runs, fan_in, full_fan_in)
    rows = _Rows(runs, reference_of(runs), full_fan_in)
    if fit == "drift":
        fitted = rows.by_drift(bound)
    elif isinstance(bound, MuA):
        fitted = rows.by_tokens(bound)
    else:
        raise CalibrationError(
            f"The law {chosen_law.name!r} has no tokens to fit for {optimizer.__name__}.",
            "Give the fit 'drift', or the law 'mua' for Adam.",
        )
    return recipe_of(
        fitted.fit,
        fitted.law,
        rows.reference,
        name=name,
        scaling_rule=rows.scaling_rule,
        full_fan_in=rows.full_width,
        ranks=tuple(rows.ranks),
        full_seen=any(run.rank is None for run in runs),
        optimizer=f"{optimizer.__module__}.{optimizer.__qualname__}",
        settings=settings or {},
        steps=runs[0].steps,
        warmup=warmup,
        versions=versions_used(),
        notes=(*read.notes, *rows.notes(fitted.fit)),
        tensors=_tensors(runs, fitted.observations),
    )


def _check_within(name: str, value: object, range_: str = "") -> None:
    """Raise if an argument is outside the range of this name, by default its own."""
    range_ = range_ or name
    if value is not None and not is_within(range_, value):
        raise CalibrationError(
            f"{name} is {shown(value)}.", f"Give {range_of(range_)}.", name
        )


def _check_enough(runs: Runs) -> None:
    """Raise if the runs cannot be fitted, or not in reasonable time."""
    if len(runs) > MOST_TRIALS:
        raise CalibrationError(
            f"{len(runs)} runs are more than a fit allows, {MOST_TRIALS}.",
            "Select those near the best rates.",
        )
    losses = {run.loss for run in runs}
    rates: dict[int | None, set[float]] = {}
    for run in runs:
        rates.setdefault(run.rank, set()).add(run.lr)
    if len(rates) > MOST_RANKS:
        raise CalibrationError(
            f"The sweep has more than {MOST_RANKS} ranks.", "Select some of them."
        )
    if max(map(len, rates.values())) == 1:
        raise CalibrationError(
            "No rank was tried at more than one rate, so the best rate is unknown.",
            "Sweep at least two rates, better six.",
        )
    if len(losses) == 1 and math.isfinite(runs[0].loss):
        raise CalibrationError(
            f"The loss is {runs[0].loss:g} at every rate, so the best rate is unknown.",
            "Check which column holds the loss, and that the runs trained.",
        )


class _LawFit(NamedTuple):
    """A fit, the law on which it is centred, and the runs in reference coordinates."""

    fit: Fit
    law: Law
    observations: list[Observation]


@dataclass(frozen=True)
class _Rows:
    """The runs of one model to fit. full_fan_in: as given."""

    runs: Runs
    reference: Reference
    full_fan_in: float | None

    @property
    def ranks(self) -> list[int]:
        return sorted({run.rank for run in self.runs if run.rank is not None})

    @property
    def lora(self) -> Runs:
        return [run for run in self.runs if run.rank is not None]

    @property
    def as_swept(self) -> bool:
        return any(run.alpha is None for run in self.lora)

    @property
    def full_width(self) -> float | None:
        """Return the width of full finetuning: that of its rows, as given, or that of LoRA."""
        widths = [run.fan_in for run in self.runs if run.rank is None]
        return next(iter(widths), self.full_fan_in) or self.reference.fan_in

    @property
    def scaling_rule(self) -> Scaling:
        """Return how the scaling follows the rank."""
        if self.as_swept:
            return "as swept"
        scalings = {}
        for rank in self.ranks:
            runs = [run for run in self.lora if run.rank == rank]
            values = [site_of(run, self.reference)[0].scaling for run in runs]
            if math.log2(max(values) / min(values)) > _SAME_SCALING:
                return "unknown"  # a rank at several alphas follows no rule
            scalings[rank] = values[0]
        return infer_scaling(scalings)

    @property
    def prior(self) -> Prior:
        return prior_of(self.reference, self.ranks, self.full_width)

    def by_drift(self, law: Law) -> _LawFit:
        """Return the calibration's fit: base rate, drift in rank, factor of full finetuning."""
        prior = self.prior
        if self.as_swept:
            drift_sd, full_sd = _AS_SWEPT_SD
            prior = replace(prior, drift_sd=drift_sd, full_sd=full_sd)
        return self._fitted(law, prior)

    def by_tokens(self, bound: MuA) -> _LawFit:
        """Return the fit without drift, with the tokens at which the ranks' best rates agree,
        averaged over a grid.
        """
        prior = replace(self.prior, drift_sd=_NO_DRIFT_SD)
        laws = [replace(bound, tokens=float(2.0**octaves)) for octaves in _TOKENS_GRID]
        fits = [self._fitted(law, prior).fit for law in laws]
        usual, sd = _TOKENS
        belief = -0.5 * ((_TOKENS_GRID - usual) / sd) ** 2
        weights = np.exp(belief - [_disagreement(fit) for fit in fits])
        weights /= weights.sum()
        best = replace(bound, tokens=float(2.0 ** (weights @ _TOKENS_GRID)))
        fitted = self._fitted(best, prior)

        # With other tokens the base rate is another, and so is the law's line over the ranks.
        lines = np.array([self._line(law, best) for law in laws])
        lines[:, 0] += [fit.mean[0] for fit in fits]
        deviation = lines - weights @ lines
        covariance = fitted.fit.covariance.copy()
        covariance[:2, :2] += (weights * deviation.T) @ deviation
        mean = fitted.fit.mean * (1.0, 0.0, 1.0)
        return fitted._replace(
            fit=replace(fitted.fit, mean=mean, covariance=covariance)
        )

    def _fitted(self, law: Law, prior: Prior) -> _LawFit:
        """Return the fit of the runs along `law`. Best rates at an end of their grid are bounds."""
        centred = centred_law(law, self.reference, prior.pivot)
        observations = []
        for run in self.runs:
            x = math.log2(run.lr) - self._octaves(centred, run)
            observations.append(observation_of(run, x))
        fit = fit_observations(observations, prior)
        if fit is None:
            raise CalibrationError(
                f"Every one of {len(self.runs)} runs diverged.",
                "Add lower rates to the sweep.",
            )
        return _LawFit(_bounded(fit, ends_of(observations)), law, observations)

    def _octaves(self, law: Law, run: SweepRun) -> float:
        """Return log2 of a law's multiplier from the reference to a run."""
        here, there = site_of(run, self.reference)
        return math.log2(checked_multiplier(law, here.as_factor(), there))

    def _line(self, law: Law, best: Law) -> tuple[float, float]:
        """Return how `law` differs from `best` over the ranks: octaves at their middle, and octaves
        per octave.
        """
        ranks = self.ranks
        if not ranks:
            return 0.0, 0.0
        low = next(run for run in self.lora if run.rank == ranks[0])
        high = next(run for run in self.lora if run.rank == ranks[-1])
        if len(ranks) == 1:
            high = replace(low, rank=4 * ranks[0])
        below = self._octaves(law, low) - self._octaves(best, low)
        above = self._octaves(law, high) - self._octaves(best, high)
        return (below + above) / 2, (above - below) / math.log2(
            (high.rank or 1) / ranks[0]
        )

    def notes(self, fit: Fit) -> Iterator[str]:
        """Yield sentences on what the rows leave open."""
        yield from self._notes_on_grid()
        yield from self._notes_on_fit(fit)
        if self.as_swept:
            yield "the sweep has no alpha: its rates hold for the alpha swept"
        if self.runs[0].steps is None:
            yield "the sweep does not give its steps, on which the best rate depends"

    def _notes_on_grid(self) -> Iterator[str]:
        """Yield sentences on ranks where the grid of rates does not hold the best one."""
        ended = {run.rank for run in self.runs if math.isfinite(run.loss)}
        for rank in self.ranks:
            if rank not in ended:
                yield (
                    f"rank {rank}: every run diverged, so its rate is no measurement, and may"
                    " diverge too"
                )
        at_rates = [observation_of(run, math.log2(run.lr)) for run in self.runs]
        for group, (x, end) in ends_of(at_rates).items():
            label = f"rank {group}" if group else "full finetuning"
            way = "below" if end == "lowest" else "above"
            yield (
                f"{label}: the best rate, {2.0**x:.3g}, is the {end} tried; the optimum may"
                f" be {way}"
            )

    def _notes_on_fit(self, fit: Fit) -> Iterator[str]:
        """Yield sentences on what a fit does not determine."""
        base_sd, drift_sd, _ = np.sqrt(np.diag(fit.covariance))
        if base_sd > _UNSURE:
            yield (
                "the loss hardly determines the best rate: from end to end its band is"
                f" {times(2 * Z90 * base_sd)}"
            )
        prior_sd = fit.prior.drift_sd
        if len(self.ranks) == 1:
            yield "one rank was swept, so only the law says how the rate moves with rank"
        elif self.ranks and prior_sd > _NO_DRIFT_SD and drift_sd > _OPEN * prior_sd:
            yield (
                "the ranks swept hardly determine how the rate moves with rank: it mostly follows"
                " the law"
            )


def _disagreement(fit: Fit) -> float:
    """Return half the weighted sum of squares of the LoRA ranks' best rates about their mean."""
    vertices = [vertex for rank, vertex in fit.vertices.items() if rank is not None]
    if not vertices:
        return 0.0
    means, sds = np.array(vertices).T
    weights = 1.0 / (sds**2 + _OFF**2)
    mean = weights @ means / weights.sum()
    return float(0.5 * weights @ (means - mean) ** 2)


def _bounded(fit: Fit, ends: Mapping[int | None, GridEnd]) -> Fit:
    """Return the fit with the ranks at `ends` as wide bounds. Their errors have one sign and do not
    average out.
    """
    if not ends:
        return fit
    vertices = dict(fit.vertices)
    for rank, (x, end) in ends.items():
        vertices[rank] = (x - _BELOW if end == "lowest" else x, _EDGE_SD)
    bounded = fit.at(vertices)
    sds = np.array([sd for _, sd in vertices.values()])
    weights = 1.0 / (sds**2 + fit.prior.scatter**2)
    share = weights[[rank in ends for rank in vertices]].sum() / weights.sum()
    bounded.covariance[0, 0] += (share * _EDGE_SD) ** 2
    return bounded


def _tensors(
    runs: Runs, observations: Sequence[Observation]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return `Recipe.tensors`: the runs in reference coordinates, and at their own rates."""
    return {
        "rank": np.array([run.rank or 0 for run in runs], np.int64),
        "seed": np.array([run.seed for run in runs], np.int64),
        "lr": np.array([2.0**o.x for o in observations]),
        "own_lr": np.array([run.lr for run in runs], np.float64),
        "value": np.array([run.loss for run in runs], np.float64),
        "diverged": np.array(diverged(observations), bool),
    }
