"""This module writes a recipe as a self-contained HTML page with a table of learning rates.

The page also contains the figure, the trials and the origin of the recipe. The module fills the
template `page.html` with jinja2, which escapes every value except the figure. The page loads no
other files and runs no scripts, so you can safely open it even if you do not trust the recipe.
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

# The colours of the figure are replaced by variables of the page's style, which have different
# values in the light and the dark theme.
_OF_PAGE = {
    COLOURS[0]: "--blue",
    COLOURS[1]: "--orange",
    COLOURS[2]: "--green",
    COLOURS[3]: "--purple",
    INK: "--ink",
    "#000000": "--soft",
}


def report_html(recipe: Recipe) -> str:
    """Describe a recipe in an HTML page, and return the page as a string.

    As long as the version of matplotlib does not change, a recipe always produces the same page. If
    matplotlib is not installed, the figure is left out.
    """
    # Imported here, because only the report needs jinja2.
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
    """Describe where the learning rate of a rank comes from, for example "tried" or
    "extrapolation".

    A rank of None means full finetuning.
    """
    if recipe.full_seen if rank is None else rank in recipe.ranks:
        end = end_of_tried(recipe, rank)
        return f"tried; the best was the {end} tried" if end else "tried"
    return "extrapolation" if is_extrapolated else "the ranks around it"


def _svg(recipe: Recipe) -> str:
    """Draw the recipe's figure as an SVG element that uses the page's fonts and colours."""
    figure = recipe_figure(recipe)
    file = StringIO()
    from matplotlib import rc_context

    # matplotlib names SVG elements with random ids. With a fixed salt, the ids and therefore the
    # page are the same in every run. For the same reason, the SVG gets no date.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "recipe"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    for colour, name in _OF_PAGE.items():
        text = text.replace(colour.lower(), f"var({name})")
    # Drop the XML declaration and doctype, which are not allowed inside an HTML page.
    return text[text.index("<svg") :]
