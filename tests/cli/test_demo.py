"""What the demo says of its runs: errors by seed, verdicts in words, the time left."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from rankaware_optim.cli import _demo
from rankaware_optim.cli._demo import (
    FACTORS,
    TransferCheck,
    draw,
    followed,
    table,
    title,
    verdict,
)

from ..helpers.recipes import RECIPE

HERE = FACTORS.index(1.0)


def checked(
    *above: tuple[float, float, float],
    seeds: tuple[float, float, float] = (0.3, 0.5, 0.7),
) -> TransferCheck:
    """A check at rank 16 whose losses lie so far above those at the recipe's rate, seed by seed."""
    rows = tuple(
        tuple(seed + more for seed, more in zip(seeds, row, strict=True))
        for row in above
    )
    return TransferCheck(16, RECIPE.at(rank=16), rows, start=2.5)


SAME, WORSE, BETTER = (0.0, 0.0, 0.0), (0.2, 0.2, 0.2), (-0.03, -0.02, -0.01)
DIVERGED = (math.inf, 1.0, 2.0)


def test_errors_leave_out_what_seeds_share() -> None:
    """Seeds that differ by .2 everywhere give differences without an error; those that do not share it give theirs."""
    apart = checked(WORSE, BETTER, SAME, WORSE, DIVERGED).apart
    assert apart[0] == pytest.approx((0.2, 0.0))
    assert apart[1] == pytest.approx((-0.02, 0.01 / math.sqrt(3)))
    assert apart[HERE] == (0.0, 0.0)
    assert apart[4][0] == math.inf
    assert math.isnan(apart[4][1])


VERDICTS = {
    "the best": (
        checked(WORSE, WORSE, SAME, WORSE, DIVERGED),
        "was the best of the five",
        "it held.",
    ),
    "a little worse": (
        checked(WORSE, BETTER, SAME, WORSE, DIVERGED),
        "lost 1.0% ± 0.3% .* to half of it",
        "it held.",
    ),
    "worse": (
        checked(WORSE, WORSE, SAME, WORSE, (-0.2, -0.2, -0.2)),
        "lost 9.1% .* to four times it",
        "it missed.",
    ),
    "diverged": (
        checked(WORSE, WORSE, DIVERGED, SAME, SAME),
        "diverged, unlike twice it",
        "it missed.",
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_a_verdict_says_what_was_lost(case: str) -> None:
    """It names the better rate, the share of the gain that was lost to it with its error, and whether it held."""
    found, lost, worth = VERDICTS[case]
    said = verdict(found)
    assert said.endswith(worth)
    assert re.search(lost, said)


TITLES = {
    "the best": "Rank 16: the rate held, the best of five",
    "a little worse": "Rank 16: the rate held, 1.0% of the gain lost",
    "worse": "Rank 16: the rate missed, 9.1% of the gain lost",
    "diverged": "Rank 16: the rate missed, it diverged",
}


@pytest.mark.parametrize("case", TITLES)
def test_a_picture_says_whether_the_rate_held(case: str, tmp_path: Path) -> None:
    """The panel's title answers it as the verdict does, whatever was lost, and the picture is drawn."""
    assert title(VERDICTS[case][0]) == TITLES[case]
    pytest.importorskip("matplotlib")
    assert (
        draw(RECIPE, [VERDICTS[case][0]], tmp_path / "out.png").stat().st_size > 10_000
    )


def test_the_table_shows_every_factor() -> None:
    """Two rows a configuration: the mean losses, the lowest marked, and their differences but at the recipe's rate."""
    text = table([checked(WORSE, BETTER, SAME, WORSE, DIVERGED)])
    first, second = text.splitlines()[-2:]
    assert first.split()[3:] == ["0.700", "0.480*", "0.500", "0.700", "inf"]
    assert second.split() == [
        "+0.20",
        "±",
        "0.00",
        "-0.02",
        "±",
        "0.01",
        "+0.20",
        "±",
        "0.00",
        "+inf",
        "±",
        "nan",
    ]


def test_the_time_left_is_said_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Every fifth run is a line, and the losses come through."""
    assert list(followed(map(float, range(10)), 10)) == list(range(10))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ·")[0] for line in lines] == ["run 5/10", "run 10/10"]
    assert lines[-1].endswith("0 s left")


def test_the_checks_seeds_are_fresh() -> None:
    """No seed of the check was one of the calibration's."""
    assert not {*_demo.SEEDS} & {*_demo.CHECKED_SEEDS}
