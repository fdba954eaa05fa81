"""A recipe as one self-contained page: its picture, rates by rank, a control for rank, alpha and method, provenance.

The page is `report_page.html`, filled in by jinja2 with every value escaped. It reaches for nothing outside itself.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import PageError
from ..laws import law_changes
from ._io import staged
from ._plot_data import Arm, Picture, picture_of
from ._rate_table import rate_table
from ._recipe import Rate, Recipe

__all__ = ["report_html", "write_report"]

# A panel's frame in its own units, which the page scales: left, right, top, bottom.
_LEFT, _RIGHT, _TOP, _BOTTOM = 60.0, 360.0, 22.0, 190.0
_MOST_TICKS = 5


@dataclass(frozen=True)
class _Axis:
    """Values `low` to `high` on `start` to `end`, through log2 where `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = True

    def at(self, value: float) -> float:
        """Where a value lies, at most at the frame's edge."""
        low, high, here = (math.log2(v) if self.log else v for v in (self.low, self.high, value))
        share = min(max((here - low) / (high - low), 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def holds(self, value: float | None) -> bool:
        return value is not None and self.low <= value <= self.high

    def ticks(self, values: Iterable[float]) -> list[tuple[float, str]]:
        """(place, label) of the values within, thinned out evenly."""
        inside = [value for value in values if self.holds(value)]
        step = -(-len(inside) // _MOST_TICKS) or 1
        return [(self.at(value), f"{value:g}") for value in inside[::step]]


def write_report(recipe: Recipe, path: str | os.PathLike[str]) -> Path:
    """Write the recipe's page to `path`, atomically. Raises PageError where it cannot be written."""
    target = Path(path)
    text = report_html(recipe).encode()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staged(target, text) as made:
            os.replace(made, target)
    except OSError as error:
        raise PageError(f"The page {target} cannot be written: {error}.", "Choose a writable folder.") from error
    return target


def report_html(recipe: Recipe) -> str:
    """The recipe's page as text, the same for the same recipe."""
    picture = picture_of(recipe)
    return str(
        _template().render(
            recipe=recipe,
            lead=_lead(recipe),
            arms=[_panel(picture, arm) for arm in picture.arms],
            chart=_chart(recipe, picture),
            rows=_rows(recipe, picture),
            trials=[(arm.label, *point) for arm in picture.arms for point in arm.points],
            table=rate_table(recipe),
            start=_start(recipe),
            provenance=list(_provenance(recipe)),
            frame={"left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM},
        )
    )


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    text = resources.files(__package__).joinpath("report_page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = _short
    return environment.from_string(text)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


# --- words ----------------------------------------------------------------------------------------------------------


def _lead(recipe: Recipe) -> str:
    seen = ", ".join(map(str, recipe.ranks))
    tried = " and ".join(filter(None, (f"ranks {seen}" if seen else "", "full finetuning" * recipe.full_seen)))
    horizon = f"{recipe.steps or 'an unknown number of'} steps at batch {recipe.batch or 'unknown'}"
    return f"{recipe.optimizer.rpartition('.')[2]}, {horizon}, calibrated at {tried or 'nothing'}."


def _start(recipe: Recipe) -> dict[str, Any]:
    """What the control shows first: the recipe's own configuration."""
    reference = recipe.reference
    return {"method": reference.method, "rank": reference.rank or 16}


def _provenance(recipe: Recipe) -> Iterator[tuple[str, str]]:
    r = recipe.reference
    own = recipe.settings.items()
    widths = (f"{width:g}" if width else "unknown" for width in (r.fan_in, recipe.full_fan_in))
    yield "Base rate", f"{recipe.lr:.4g}, {recipe.lean:.2g} octaves below the best one fitted, {recipe.best_lr:.4g}"
    yield "Tuned at", f"{r}; widths {' for LoRA, '.join(widths)} for full finetuning"
    yield "Law", _law_words(law_changes(recipe.law))
    yield "Alpha by rank", recipe.scaling_rule
    yield "Optimizer", ", ".join([recipe.optimizer, *(f"{key}={value!r}" for key, value in own)])
    warmup = "unknown" if recipe.warmup is None else f"{recipe.warmup:.0%}"
    yield "Horizon", f"{recipe.steps or 'unknown'} steps, batch {recipe.batch or 'unknown'}, warm-up {warmup}"
    horizon = recipe.horizon
    yield "Other steps", f"{horizon.slope:+.2f} ± {horizon.slope_sd:.2f} octaves of rate per octave of steps"
    yield "Trials", f"{len(recipe.tensors.get('lr', ()))}, from seed {recipe.seed}"
    yield "Versions", ", ".join(f"{name} {version}" for name, version in recipe.versions.items()) or "unknown"
    yield "Hash", recipe.tag.partition(" ")[0]
    for note in recipe.notes:
        yield "Note", note


def _law_words(law: Mapping[str, Any]) -> str:
    """ "power (exponent 0.1), on mua (tokens 4)": each law's name and what differs from its defaults."""
    told = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in law.items() if k not in ("name", "law")]
    inner = law.get("law")
    rest = f", on {_law_words(inner)}" if isinstance(inner, Mapping) else ""
    return str(law["name"]) + (f" ({', '.join(told)})" if told else "") + rest


def _rows(recipe: Recipe, picture: Picture) -> list[tuple[str, Rate, str]]:
    """The table of rates: label, rate, and how it is known."""
    rows = [(f"rank {rank}", rate, "tried" if rank in recipe.ranks else "") for rank, rate in picture.by_rank]
    if picture.full is not None:
        rows.append(("full finetuning", picture.full, "tried" if recipe.full_seen else ""))
    return [(label, rate, tried or ("extrapolated" if rate.extrapolated else "between")) for label, rate, tried in rows]


# --- drawings -------------------------------------------------------------------------------------------------------


def _panel(picture: Picture, arm: Arm) -> dict[str, Any]:
    """One rank's drawing: places in the frame, and what it shows in words."""
    x = _Axis(*picture.rates, _LEFT, _RIGHT)
    y = _Axis(*picture.values, _BOTTOM, _TOP, log=False)
    rate = arm.rate
    return {
        "title": arm.label[0].upper() + arm.label[1:],
        "words": _panel_words(arm),
        "points": [(x.at(p.rate), y.at(p.value)) for p in arm.points if y.holds(p.value)],
        "beyond": [x.at(p.rate) for p in arm.points if not y.holds(p.value)],
        "curve": _line((x.at(rate), y.at(value)) for rate, value in arm.curve),
        "band": rate and (x.at(rate.low), round(x.at(rate.high) - x.at(rate.low), 1)),
        "rate": rate and x.at(rate.lr),
        "ceiling": rate and rate.ceiling and x.holds(rate.ceiling) and x.at(rate.ceiling),
        "x": x.ticks(_log_values(*picture.rates)),
        "y": y.ticks(_even_values(*picture.values)),
    }


def _panel_words(arm: Arm) -> str:
    finite = [p for p in arm.points if math.isfinite(p.value)]
    fates = Counter(p.fate for p in arm.points)
    ends = [f"{fates[fate]} {fate}" for fate in ("diverged", "pruned") if fates[fate]]
    told = [", ".join([f"{arm.label}: {len(arm.points)} trials", *ends])]
    if finite:
        best = min(finite, key=lambda p: p.value)
        told.append(f"the lowest score is {best.value:.3g} at rate {best.rate:.3g}")
    if arm.rate is not None:
        told.append(f"the recipe's rate is {arm.rate.lr:.3g}, 90 % band {arm.rate.low:.3g} to {arm.rate.high:.3g}")
    return "; ".join(told) + "."


def _chart(recipe: Recipe, picture: Picture) -> dict[str, Any] | None:
    """The rates by rank as a drawing; None where there is no rule for alpha, or one rank alone."""
    if not picture.by_rank:
        return None
    ranks, rates = [rank for rank, _ in picture.by_rank], [rate for _, rate in picture.by_rank]
    full = picture.full
    shown = [*rates, full] if full else rates
    ends = [edge for r in shown for edge in (r.low, r.high, r.lr)] + [r.ceiling for r in rates if r.ceiling]
    x, y = _Axis(ranks[0], ranks[-1], _LEFT, _RIGHT), _Axis(min(ends) / 1.2, max(ends) * 1.2, _BOTTOM, _TOP)
    ceilings = [(rank, rate.ceiling) for rank, rate in picture.by_rank if rate.ceiling]
    lower = [(x.at(rank), y.at(rate.low)) for rank, rate in reversed(picture.by_rank)]
    return {
        "words": f"From rank {ranks[0]} to {ranks[-1]} the rate goes from {rates[0].lr:.3g} to {rates[-1].lr:.3g}.",
        "curve": _line((x.at(rank), y.at(rate.lr)) for rank, rate in picture.by_rank),
        "band": _line([*((x.at(rank), y.at(rate.high)) for rank, rate in picture.by_rank), *lower]),
        "ceiling": _line((x.at(rank), y.at(value)) for rank, value in ceilings),
        "full": full and (y.at(full.lr), y.at(full.high), round(y.at(full.low) - y.at(full.high), 1)),
        "seen": [x.at(rank) for rank in recipe.ranks if x.holds(rank)],
        "x": x.ticks(ranks),
        "y": y.ticks(_log_values(y.low, y.high)),
    }


def _line(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)


def _log_values(low: float, high: float) -> Sequence[float]:
    """1, 2 and 5 of every decade between, or the decades alone where they are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if math.log10(high / low) > 3 else (1, 2, 5)
    return [float(f"{step}e{decade}") for decade in decades for step in steps]


def _even_values(low: float, high: float) -> Sequence[float]:
    """Multiples of 1, 2 or 5 times a power of ten, at most as many as are labelled."""
    size = 10.0 ** math.floor(math.log10((high - low) / _MOST_TICKS))
    step = next(m * size for m in (1, 2, 5, 10, 20) if (high - low) / (m * size) <= _MOST_TICKS)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
