"""Tests of the example notebook as it ran when the site was built."""

from __future__ import annotations

import nbformat
import pytest

from rankaware_optim.calibration import TRIALS_PER_RANK

from .conftest import SITE

DOCS = SITE.parents[1]
NAME = "move_and_calibrate"
STORED = nbformat.read(DOCS.parent / "examples" / f"{NAME}.ipynb", as_version=4)
# the last line of a cell, and the format of the result that is shown below it
SHOWN = {
    "opt.report()": "text/html",
    "survey": "text/html",
    'ra.convert_lr(0.01, from_="r=8,alpha=8", to=here)': "text/html",
    "recipe": "text/html",
    "recipe.plot()": "image/png",
    "recipe.at(rank=16)": "text/html",
}


@pytest.fixture(scope="module")
def outputs() -> list[tuple[str, list]]:
    """Return the last line and the outputs of every code cell."""
    ran = nbformat.read(DOCS / "generated" / f"{NAME}.ipynb", as_version=4)
    code = [cell for cell in ran.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    return [(cell.source.splitlines()[-1], cell.outputs) for cell in code]


def shown(outputs: list, form: str) -> list[str]:
    return [each.data[form] for each in outputs if form in each.get("data", {})]


def test_the_notebook_is_stored_without_outputs():
    """The notebook is stored without outputs, because every build of the site runs it again."""
    assert not [cell for cell in STORED.cells if cell.get("outputs")]


def test_every_result_is_shown(outputs):
    """Reports, surveys, conversions, recipes and learning rates are shown as tables, and the plot
    as a picture.
    """
    found = {
        line: shown(of_cell, SHOWN[line]) for line, of_cell in outputs if line in SHOWN
    }
    assert found.keys() == SHOWN.keys()
    assert all(found.values())
    assert all("<table" in html for line in found for html in found[line] if SHOWN[line] == "text/html")  # fmt: skip


def test_nothing_is_said_but_the_trials(outputs):
    """No cell fails or warns, and one table shows the cost, a row for each trial and the result."""
    kinds = {each.output_type for _, of_cell in outputs for each in of_cell}
    assert "error" not in kinds
    said = [each.text for _, of_cell in outputs for each in of_cell if each.get("name") == "stderr"]  # fmt: skip
    assert not said
    html = [each.data.get("text/html", "") for _, of_cell in outputs for each in of_cell if "data" in each]  # fmt: skip
    (table,) = [each for each in html if "calibrate: " in each]
    runs = 2 * TRIALS_PER_RANK
    assert f"{runs} trials of 100 steps, at most {100 * runs:,} steps in all" in table
    assert all(f">{number}/{runs}</td>" in table for number in range(1, runs + 1))
    assert "Best learning rate" in table
