"""A recipe as one self-contained page: its figure, rates by rank, trials and provenance.

The page is `page.html`, filled in by jinja2 with every value escaped but the figure, which
matplotlib writes as SVG. It loads nothing and runs nothing.
"""

from __future__ import annotations

from io import StringIO

from .._printing import printable
from ..errors import PlotError
from ..recipe import Recipe, facts
from ._figure import (
    COLOURS,
    INK,
    known_rate,
    rates_by_rank,
    recipe_figure,
    trials_of,
)

# The page's colours, which depend on its theme, by those that matplotlib writes.
_OF_PAGE = {
    COLOURS[0]: "--blue",
    COLOURS[1]: "--orange",
    INK: "--ink",
    "#000000": "--soft",
}


def report_html(recipe: Recipe) -> str:
    """Return the recipe's page as text. It is the same for the same recipe and matplotlib. Without
    matplotlib it has no figure.
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
    text = environment.get_template("page.html").render(
        recipe=recipe,
        by_rank=rates_by_rank(recipe),
        full=known_rate(recipe, 0),
        figure=figure,
        no_figure=no_figure,
        trials=zip(*trials_of(recipe).values(), strict=True),
        facts=facts(recipe),
    )
    return printable(text)


def _svg(recipe: Recipe) -> str:
    """Return the recipe's figure as an SVG element with the page's fonts and colours."""
    figure = recipe_figure(recipe)
    file = StringIO()
    from matplotlib import rc_context

    # the salt gives elements the same names in every run
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "recipe"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    for colour, name in _OF_PAGE.items():
        text = text.replace(colour.lower(), f"var({name})")
    return text[text.index("<svg") :]
