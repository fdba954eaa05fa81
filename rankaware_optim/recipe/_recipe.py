"""`Recipe`: what users call on a calibrated rate, and its texts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

from .._checks import says_our_names
from .._printing import Table, printable, times
from .._rate import Rate
from .._types import Method, Reference, Scaling
from ..fitting import Fit, centred_law
from ..laws import Law, Power, law_sentence
from . import _files as files
from ._rates import configuration, margin, rate, spread, warn_of
from ._record import Record
from ._same_model import check_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BELOW = (
    "a run diverged at {:.3g}, below the fitted optimum, so the recipe has no ceiling: see whether"
    " that run diverges again"
)
_ALPHA: Mapping[Scaling, str] = {
    "fixed": "alpha follows rank (scaling fixed)",
    "rslora": "alpha kept under rsLoRA (scaling falls with the root of the rank)",
    "alpha": "alpha kept (scaling falls as 1/rank)",
    "unknown": "no rule known: give alpha",
}
_COLUMN = 16  # characters of a fact's name


class Recipe(Record):
    __doc__ = Record.__doc__

    @says_our_names
    def at(
        self,
        rank: int | None = None,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        init: Literal["A", "B"] | None = None,
        method: Method = "lora",
        fan_in: float | None = None,
        steps: int | None = None,
        batch: float | None = None,
    ) -> Rate:
        """Return the rate for another rank, alpha, init, width, number of steps or batch, or for
        full finetuning.

        Outside the configurations of the trials the rate is marked `extrapolated`, its band widens
        with the distance, and a warning says so.

        Args:
            rank: the LoRA rank, by default the recipe's own.
            alpha: LoRA's alpha. By default the scaling follows `scaling_rule`.
            rslora: whether alpha is divided by √rank instead of rank.
            init: "A" (B starts at zero, as in PEFT) or "B" (A starts at zero), by default the
                recipe's own.
            method: "lora" or "full".
            fan_in: the model's width, by default the recipe's own. One that differs by more than a
                factor of 2 is another model's, and refused.
            steps: optimizer steps, by default the recipe's own. Others widen the band.
            batch: batch size in the recipe's unit, by default its own. It moves the rate by the
                law's rule, which is the square root for Adam, as for 4 times the batch at most.

        Returns:
            The rate with its 90 % band, ceiling and notes.

        Raises:
            RecipeError: alpha is missing but needed, or given but unknown to the sweep; the rate
                depends on a fan-in, steps or batch that the recipe does not have; the fan-in is
                that of another model; the steps are impossible; or the rate would not be a positive
                finite number.
            InvalidReferenceError: the target's rank, alpha, init, method, width or batch is
                impossible.
            LawError: the law has no usable multiplier there.
        """
        given = rank, alpha, rslora, init, method
        target = configuration(self, *given, fan_in=fan_in, batch=batch)
        check_width(self, target)
        answer = rate(self, target, steps)
        warn_of(self, answer)
        return answer

    def explain(self) -> str:
        """Return the recipe as text, one fact per line: rate, band, ceiling, law and provenance."""
        table = self._table()
        indent = " " * _COLUMN
        lines = [table.title]
        for name, text in table.rows:
            line = name.ljust(_COLUMN) + text
            lines.append(fill(line, 100, subsequent_indent=indent))
        return printable("\n".join(lines))

    def __str__(self) -> str:
        return self.explain()

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        return Table((), facts(self), title=f"Recipe {self.name!r}")

    def plot(self) -> Figure:
        """Draw one panel per rank with its trials, band, ceiling and rate, and a panel of
        rates by rank.

        Needs the extra `plots`. A notebook shows the figure, and its `savefig(path)` writes it.

        Raises:
            PlotError: matplotlib is not installed, or the recipe has no trials.
        """
        from ..reports import recipe_figure

        return recipe_figure(self)

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the recipe as a TOML file, and its trials as a safetensors file beside it.

        The TOML gives every rate by itself. Each file is replaced atomically. NAME.toml has its
        trials in NAME.trials.safetensors.

        Args:
            path: the TOML file.

        Returns:
            The path written.

        Raises:
            RecipeError: the folder cannot be written, or a value could not be read back.
        """
        return files.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe. Every value and the trials' hash are checked. Nothing is unpickled or
        imported.

        Without the file of its trials a recipe still gives every rate. `missing` then names that
        file. A warning says so if the file there cannot be used, such as that of another save.

        Args:
            path: the TOML file.

        Raises:
            RecipeError: the TOML is missing, cut short, too large, or has an impossible value. The
                message names the value's path.
        """
        return cls(**vars(files.load(path)))


def recipe_of(fit: Fit, law: Law, reference: Reference, **others: Any) -> Recipe:
    """Return the recipe of a fit, with the margin that follows from its uncertainty.

    Args:
        fit: the fit, at the steps of the target.
        law: the law without the correction that was fitted, bound to the optimizer.
        reference: the configuration of the base rate.
        others: fields that the fit does not decide.
    """
    base, drift, factor = (float(value) for value in fit.mean)
    best = fit.best(reference.rank)
    ceiling = None
    if fit.ceiling is not None:
        ceiling = 2.0 ** (fit.ceiling + best - base)
        if ceiling <= 2.0**best:
            others["notes"] = (*others.get("notes", ()), _BELOW.format(ceiling))
            ceiling = None
    recipe = Recipe(
        fitted_lr=2.0**best,
        reference=reference,
        law=centred_law(law, reference, fit.prior.pivot, drift, factor),
        covariance=fit.covariance,
        steepness=fit.steepness,
        scatter=fit.prior.scatter,
        ceiling=ceiling,
        **others,
    )
    sd, _ = spread(recipe, reference)
    return replace(recipe, margin=margin(recipe, sd))


# --- in words -------------------------------------------------------------------------------------


def facts(recipe: Record) -> list[tuple[str, str]]:
    """Return a recipe's facts as pairs of a name and a text."""
    at = recipe.reference
    ceiling = "none seen"
    if recipe.ceiling is not None:
        ceiling = (
            f"{recipe.ceiling:.3g}, the smallest rate that diverged, moved to the base rate's"
            " configuration as a best rate"
        )
    optimizer = recipe.optimizer
    if recipe.settings:
        optimizer += f" with {_listed(recipe.settings)}"
    warmup = "unknown" if recipe.warmup is None else f"{100 * recipe.warmup:.3g}%"
    steps = _number(recipe.steps)
    batch = _number(recipe.batch)
    tried = f"ranks {', '.join(map(str, recipe.ranks)) or 'none'}"
    rest = "must be given, as full finetuning was not tried"
    if recipe.full_seen:
        tried = f"{tried} and full finetuning"
        rest = "that of full finetuning"
    others = _listed(recipe.other_rates)
    rows = {
        "base rate": f"{recipe.lr:.3g} at {at}, mean fan-in {_number(at.fan_in)}",
        "fitted optimum": f"{recipe.fitted_lr:.3g}; the base rate, the one to use, is a margin of"
        f" {times(-recipe.margin)} below",
        "90 % band": rate(recipe, at).band,
        "ceiling": ceiling,
        "largest fan-in": f"{_number(recipe.full_fan_in)}, which full finetuning's rate depends on",
        "law": _law(recipe.law),
        "alpha by rank": _ALPHA[recipe.scaling_rule],
        "optimizer": optimizer,
        "runs": f"{steps} steps, batch {batch}, warm-up {warmup}",
        "seen": f"{tried}; {trials_text(recipe)}",
        "other rates": f"{others}; any other {rest}" if others else rest,
        "code": _listed(recipe.source).removeprefix("train ") or "unknown",
        "versions": _listed(recipe.versions) or "unknown",
        "hash": recipe.tag.partition(" ")[0],
    }
    return [*rows.items(), *(("note", note) for note in recipe.notes)]


def trials_text(recipe: Record) -> str:
    """Return how many trials a recipe has, or that their file was missing when it was read."""
    if recipe.missing:
        return f"its trials are not here, {recipe.missing} is missing"
    return f"{len(recipe.tensors.get('lr', ()))} trials"


def _law(law: Power) -> str:
    """The law that rates move by, and how the trials corrected it."""
    words = law_sentence(law.law)
    if law.exponent:
        words += f", times rank^{law.exponent:.3g}"
    if law.full_factor != 1.0:
        words += f", times {law.full_factor:.3g} in full finetuning"
    return words


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{round(value)}"
