"""A recipe as one self-contained page: its figure, rates by rank, a control for rank, alpha and
method, provenance.

The page is `page.html`, filled in by jinja2 with every value escaped. It loads nothing, so
it contains the recipe's rates on a grid of ranks and multipliers. Every rank up to 64 is a node,
and there are 32 nodes per octave above. Rates are interpolated in log2, linearly along the rank and
by a cubic along the multiplier, and written to three digits by the tables' rule.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from .._figures import log_ticks
from .._files import replace_bytes
from .._printing import printable
from .._rate import Rate
from ..errors import PageError, RankAwareError
from ..recipe import Recipe, facts, known_rate, lead, missing_trials
from ._picture import SCORE, Picture, PictureArm, Span, edges_of, picture_of


def write_report(recipe: Recipe, path: str | os.PathLike[str]) -> Path:
    """Write the recipe's page to a file, atomically.

    Args:
        recipe: the recipe.
        path: the HTML file.

    Returns:
        The path written.

    Raises:
        PageError: the file cannot be written.
    """
    target = Path(path)
    text = report_html(recipe).encode()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(target, text)
    except OSError as error:
        raise PageError(
            f"The page {target} cannot be written: {error}.",
            "Choose a writable folder.",
        ) from error
    return target


def report_html(recipe: Recipe) -> str:
    """Return the recipe's page as text. It is the same for the same recipe."""
    picture, reference = picture_of(recipe), recipe.reference
    text = str(
        _template().render(
            recipe=recipe,
            lead=lead(recipe),
            missing=missing_trials(recipe),
            arms=[_panel(picture, arm) for arm in picture.arms],
            chart=_chart(recipe, picture) if picture.by_rank else None,
            rows=list(_rows(recipe, picture)),
            trials=[(arm.label, point) for arm in picture.arms for point in arm.points],
            table=rate_table(recipe),
            start={"method": reference.method, "rank": reference.rank or 16},
            provenance=list(facts(recipe)),
            marks=picture.marks(),
            score=SCORE,
            frame={"left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM},
        )
    )
    return printable(text)


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    text = (
        resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["short"] = lambda value: "" if value is None else f"{value:.3g}"
    return environment.from_string(text)


def _rows(recipe: Recipe, picture: Picture) -> Iterator[tuple[str, Rate, str]]:
    """Yield the rows of the table of rates: label, rate, and how it is known."""
    named = [
        (f"rank {rank}", rate, rank in recipe.ranks)
        for rank, rate in picture.by_rank
        if rank in recipe.ranks or rank.bit_count() == 1
    ]
    if picture.full:
        named.append(("full finetuning", picture.full, recipe.full_seen))
    for label, rate, tried in named:
        untried = "extrapolated" if rate.extrapolated else "between"
        yield label, rate, "tried" if tried else untried


# --- drawings -------------------------------------------------------------------------------------

# A panel's frame in units that the page scales: left, right, top, bottom.
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 360.0, 22.0, 190.0
_MOST_TICKS = 5


@dataclass(frozen=True)
class _Axis:
    """Maps values from `low` to `high` to positions from `start` to `end`, through log2 if `log` is
    set.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = True

    def at(self, value: float) -> float:
        """Return the position of a value, clipped to the frame."""
        low, high, here = (
            math.log2(v) if self.log else v for v in (self.low, self.high, value)
        )
        share = min(max((here - low) / (high - low), 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def holds(self, value: float | None) -> bool:
        return value is not None and self.low <= value <= self.high

    def ticks(self, values: Iterable[float] | None = None) -> list[tuple[float, str]]:
        """Return (position, label) of the round values in the frame, or of those given, evenly
        thinned out.
        """
        ticks = self._round_values() if values is None else values
        inside = [value for value in ticks if self.holds(value)]
        step = -(-len(inside) // _MOST_TICKS) or 1
        form = "g" if self.log else ".12g"
        return [(self.at(value), f"{value:{form}}") for value in inside[::step]]

    def _round_values(self) -> Sequence[float]:
        """Return the ticks of `log_ticks`; on a linear axis, multiples of 1, 2 and 5."""
        if self.log:
            return log_ticks(self.low, self.high, _MOST_TICKS)
        wide = (self.high - self.low) / _MOST_TICKS
        size = 10.0 ** math.floor(math.log10(wide))
        apart = next(m * size for m in (1, 2, 5, 10, 20) if wide <= m * size)
        first, last = math.ceil(self.low / apart), math.floor(self.high / apart)
        return [n * apart for n in range(first, last + 1)]


def _panel(picture: Picture, arm: PictureArm) -> dict[str, Any]:
    """Return one rank's drawing: positions in the frame, and a description."""
    x = _Axis(*picture.rates, _LEFT, _RIGHT)
    y = _Axis(*arm.values, _BOTTOM, _TOP, log=False)
    rate = arm.rate
    return {
        "title": arm.title,
        "words": arm.words,
        "marks": [
            (mark, x.at(across), y.at(up))
            for mark, places in arm.marks(arm.values).items()
            for across, up in places
        ],
        "curve": _line(x, y, _below(arm.values[1], arm.curve)),
        "band": rate and (x.at(rate.low), round(x.at(rate.high) - x.at(rate.low), 1)),
        "rate": rate and x.at(rate.lr),
        "ceiling": rate
        and rate.ceiling
        and x.holds(rate.ceiling)
        and x.at(rate.ceiling),
        "x": x.ticks(),
        "y": y.ticks(),
    }


def _chart(recipe: Recipe, picture: Picture) -> dict[str, Any]:
    """Return the drawing of the rates by rank."""
    by_rank, full = picture.by_rank, picture.full
    (first, start), (last, end) = by_rank[0], by_rank[-1]
    ranks, rates = zip(*by_rank, strict=True)
    ceilings = [(rank, rate.ceiling) for rank, rate in by_rank if rate.ceiling]
    edges = [edge for _, edge in ceilings]
    edges += edges_of([*rates, full] if full else rates)
    x = _Axis(first, last, _LEFT, _RIGHT)
    y = _Axis(min(edges) / 1.2, max(edges) * 1.2, _BOTTOM, _TOP)
    upper = [(rank, rate.high) for rank, rate in by_rank]
    lower = [(rank, rate.low) for rank, rate in reversed(by_rank)]
    drawing: dict[str, Any] = {
        "words": f"From rank {first} to {last} the rate goes from {start.lr:.3g} to {end.lr:.3g}.",
        "curve": _line(x, y, [(rank, rate.lr) for rank, rate in by_rank]),
        "band": _line(x, y, upper + lower),
        "ceiling": _line(x, y, ceilings),
        "full": None,
        "tried": [
            (x.at(rank), y.at(rate.low), y.at(rate.lr), y.at(rate.high))
            for rank, rate in by_rank
            if rank in recipe.ranks
        ],
        "x": x.ticks(rank for rank in ranks if rank.bit_count() == 1),
        "y": y.ticks(),
    }
    if full:
        top = y.at(full.high)
        drawing["full"] = (y.at(full.lr), top, round(y.at(full.low) - top, 1))
    return drawing


def _below(top: float, curve: Sequence[Span]) -> list[Span]:
    """Return the part of a curve that lies below the top of its frame, and a step beyond it."""
    padded = [*curve[:1], *curve, *curve[-1:]]
    heights = [up for _, up in padded]
    lowest = map(min, heights, heights[1:], heights[2:])
    return [at for at, low in zip(curve, lowest, strict=True) if low <= top]


def _line(x: _Axis, y: _Axis, points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x.at(across):g},{y.at(up):g}" for across, up in points)


# --- the rates to look up -------------------------------------------------------------------------

_EVERY_RANK, _MOST, _PER_OCTAVE = 64, 8192, 32
_EDGES = ("low", "high", "ceiling")
_SCALINGS = [e / 2 for e in range(-28, 21)]  # log2 of s = alpha / rank
_NO_RULE = "The trials of this recipe give no rule for alpha by rank: give alpha."
_AS_SWEPT = "The sweep behind this recipe has no alpha, so its rates hold only for the alpha swept."


def rate_table(recipe: Recipe) -> dict[str, Any]:
    """Return the JSON values from which a page computes `recipe.at` by rank, alpha and method.

    ranks, scalings: the nodes, scalings as log2 of s. own: log2 of the rate without alpha, by rank.
    lr: the same by rank and scaling, empty if `refused` says why alpha cannot be given. low, high,
    ceiling: log2 of their ratio to the rate, by rank. outside: whether the rank is extrapolated.
    notes: by rank, the index of its list in `sentences`, in which "{rank}" stands for the rank.
    full: the numbers of full finetuning, or the reason why there are none.
    """
    ranks = _nodes(recipe)
    refused = _AS_SWEPT if recipe.scaling_rule == "as swept" else ""
    by_scaling = [] if refused else [_by_scaling(recipe, rank) for rank in ranks]
    own = [known_rate(recipe, rank) for rank in ranks]
    rates = []
    for rank, rate in zip(ranks, own, strict=True):
        rates.append(rate or known_rate(recipe, rank, alpha=rank))
    ratios = [_ratios(rate) for rate in rates]
    sentences, notes = _numbered(recipe, ranks, rates)
    return {
        "ranks": ranks,
        "scalings": _SCALINGS,
        "own": [_log(rate) for rate in own],
        "lr": by_scaling,
        **dict(zip(_EDGES, map(list, zip(*ratios, strict=True)), strict=True)),
        "outside": [rate is not None and rate.extrapolated for rate in rates],
        "notes": notes,
        "sentences": sentences,
        "refused": refused,
        "no_rule": _NO_RULE,
        "full": _full(recipe),
    }


def _by_scaling(recipe: Recipe, rank: int) -> list[float | None]:
    """Return log2 of the rates at a rank and the scalings, rounded, as they are many."""
    logs = [_log(known_rate(recipe, rank, alpha=rank * 2.0**s)) for s in _SCALINGS]
    return [None if log is None else round(log, 5) for log in logs]


def _nodes(recipe: Recipe) -> list[int]:
    """Return the ranks to store. They include those tried, and the width, at which some laws have a
    kink.
    """
    octaves, width = round(math.log2(_MOST)), recipe.reference.fan_in or 1.0
    nodes = {*range(1, _EVERY_RANK + 1), math.floor(width), math.ceil(width)}
    nodes |= {round(2 ** (e / _PER_OCTAVE)) for e in range(octaves * _PER_OCTAVE + 1)}
    nodes |= {*recipe.ranks, recipe.reference.rank or 1}
    return sorted(rank for rank in nodes if 1 <= rank <= _MOST)


def _ratios(rate: Rate | None) -> list[float | None]:
    """Return low, high and ceiling as log2 of their ratio to the rate, or None."""
    if rate is None:
        return [None] * len(_EDGES)
    edges = (rate.low, rate.high, rate.ceiling)
    return [_log(edge and edge / rate.lr) for edge in edges]


def _log(value: Rate | float | None) -> float | None:
    return None if value is None else math.log2(float(value))


def _numbered(
    recipe: Recipe, ranks: Sequence[int], rates: Sequence[Rate | None]
) -> tuple[list[list[str]], list[int]]:
    """Return the different lists of notes, and by rank the index of its list.

    In those that depend on the rank, "{rank}" stands for it. The recipe's own notes are the same at
    every rank.
    """
    own = {note: printable(note) for note in recipe.notes}
    numbers: dict[tuple[str, ...], int] = {}
    by_rank = []
    for rank, rate in zip(ranks, rates, strict=True):
        notes = rate.notes if rate else ()
        shared = (
            own.get(note) or note.replace(f"rank {rank} ", "rank {rank} ")
            for note in notes
        )
        by_rank.append(numbers.setdefault(tuple(shared), len(numbers)))
    return [list(notes) for notes in numbers], by_rank


def _full(recipe: Recipe) -> dict[str, Any]:
    rate = known_rate(recipe, None)
    if rate is not None:
        return {
            "lr": _log(rate),
            **dict(zip(_EDGES, _ratios(rate), strict=True)),
            "outside": rate.extrapolated,
            "notes": list(map(printable, rate.notes)),
        }
    try:
        recipe.at(method="full")
    except RankAwareError as error:
        return {"error": printable(str(error))}
    return {"error": ""}
