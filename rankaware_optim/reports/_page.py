"""A recipe as one self-contained page: its figure, rates by rank, a control for rank, alpha and
method, provenance.

The page is `page.html`, filled in by jinja2 with every value escaped but the panels, which
matplotlib writes as SVG from numbers. It loads nothing, so it has the recipe's rates at ranks and
alphas that are powers of two, between which its control interpolates.
"""

from __future__ import annotations

import math
import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from .._files import replace_bytes
from .._printing import printable
from .._rate import Rate
from ..errors import PageError, PlotError, RankAwareError
from ..recipe import (
    Recipe,
    configuration,
    facts,
    known_rate,
    lead,
    missing_trials,
    rate,
)
from ._figure import draw_rates, draw_trials, panel_svg
from ._picture import picture_of

_RANKS = 13  # the largest rank of the control is 2 ** 13
_SCALINGS = range(-14, 11)  # of the control, log2 of alpha / rank


def write_report(recipe: Recipe, path: str | os.PathLike[str]) -> Path:
    """Write the recipe's page to a file, atomically. Without matplotlib it has no pictures.

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
    """Return the recipe's page as text. It is the same for the same recipe and matplotlib."""
    picture = picture_of(recipe)
    panels, chart, no_panels = [], "", ""
    try:
        for arm in picture.arms:
            svg = panel_svg(arm.title, draw_trials, picture, arm)
            panels.append((arm.title, arm.words, svg))
        if panels and picture.by_rank:
            chart = panel_svg("rates", draw_rates, picture)
    except PlotError as error:
        no_panels = str(error)
    text = _template().render(
        recipe=recipe,
        lead=lead(recipe),
        missing=missing_trials(recipe),
        picture=picture,
        panels=panels,
        no_panels=no_panels,
        chart=chart,
        table=rate_table(recipe),
        provenance=facts(recipe),
    )
    return printable(text)


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    file = resources.files(__package__).joinpath("page.html")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["short"] = lambda value: "" if value is None else f"{value:.3g}"
    return environment.from_string(file.read_text(encoding="utf-8"))


# --- the rates to look up -------------------------------------------------------------------------


def rate_table(recipe: Recipe) -> dict[str, Any]:
    """Return the JSON values from which the page's control computes a rate, as log2.

    rates: at each rank. free: whether the rate there needs no alpha. lr: the rate at each rank and
    scaling. full: the rate of full finetuning, or why there is none.
    """
    ranks = {2**power for power in range(_RANKS + 1)} | {*recipe.ranks}
    nodes = sorted(ranks | {recipe.reference.rank or 1})
    rates, free, by_scaling = [], [], []
    for rank in nodes:
        own = known_rate(recipe, rank)
        free.append(own is not None)
        rates.append(_logs(own or known_rate(recipe, rank, alpha=rank)))
        scaled = [known_rate(recipe, rank, alpha=rank * 2.0**s) for s in _SCALINGS]
        by_scaling.append([found and math.log2(found.lr) for found in scaled])
    try:
        full = _logs(rate(recipe, configuration(recipe, method="full")))
    except RankAwareError as error:
        full = {"error": printable(str(error))}
    return {
        "ranks": nodes,
        "rates": rates,
        "free": free,
        "scalings": list(_SCALINGS),
        "lr": by_scaling,
        "full": full,
    }


def _logs(known: Rate | None) -> dict[str, Any] | None:
    if known is None:
        return None
    notes = [printable(note) for note in known.notes]
    logs: dict[str, Any] = {"notes": notes, "extrapolated": known.extrapolated}
    for name in ("lr", "low", "high", "ceiling"):
        value = getattr(known, name)
        logs[name] = value and math.log2(value)
    return logs
