"""A recipe as one self-contained HTML page: learning rates by rank, figure, trials and provenance.

jinja2 fills in `page.html` and escapes every value except the figure, which matplotlib writes as
SVG. The page loads nothing and runs nothing, so a recipe from a stranger can be opened.
"""

from __future__ import annotations

from io import StringIO

from .._printing import printable
from ..errors import PlotError
from ..recipe import Recipe, end_of_tried, facts, known_rate
from ._figure import (
    COLOURS,
    INK,
    rates_by_rank,
    recipe_figure,
    trials_of,
)

# matplotlib's colours, and the page's in their place, which depend on its light or dark theme.
_OF_PAGE = {
    COLOURS[0]: "--blue",
    COLOURS[1]: "--orange",
    COLOURS[2]: "--green",
    COLOURS[3]: "--purple",
    INK: "--ink",
    "#000000": "--soft",
}


def report_html(recipe: Recipe) -> str:
    """Return the recipe's page as HTML. The same recipe gives the same page with the same version
    of matplotlib. Without matplotlib the page has no figure.
    """
    from jinja2 import Environment, PackageLoader

    figure = ""
    no_figure = ""
    try:
        figure = _svg(recipe)
    except PlotError as error:
        no_figure = str(error)
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    by_rank = rates_by_rank(recipe)
    known: dict[int | None, str] = {None: _known_from(recipe, None, True)}
    for rank, rate in by_rank.items():
        known[rank] = _known_from(recipe, rank, rate.extrapolated)
    text = environment.get_template("page.html").render(
        recipe=recipe,
        by_rank=by_rank,
        known=known,
        full=known_rate(recipe, None),
        figure=figure,
        no_figure=no_figure,
        trials=zip(*trials_of(recipe).values(), strict=True),
        facts=facts(recipe),
    )
    return printable(text)


def _known_from(recipe: Recipe, rank: int | None, is_extrapolated: bool) -> str:
    """Return how the learning rate at a rank is known, in a few words. rank: None for full
    finetuning.
    """
    if recipe.full_seen if rank is None else rank in recipe.ranks:
        end = end_of_tried(recipe, rank)
        return f"tried; the best was the {end} one" if end else "tried"
    return "extrapolation" if is_extrapolated else "the ranks around it"


def _svg(recipe: Recipe) -> str:
    """Return the recipe's figure as an SVG element with the page's fonts and colours."""
    figure = recipe_figure(recipe)
    file = StringIO()
    from matplotlib import rc_context

    # With a fixed salt, elements have the same names in every run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "recipe"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    for colour, name in _OF_PAGE.items():
        text = text.replace(colour.lower(), f"var({name})")
    return text[text.index("<svg") :]
