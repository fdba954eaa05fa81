"""Tests of the scoring of scaling laws: what a right law, or one wrong by a known amount, scores on a sweep."""

from __future__ import annotations

import math
from typing import Any

import pytest
from click.testing import CliRunner
from laws import bench_law, scoring

from rankaware_optim import (
    Constant,
    Law,
    MuA,
    Power,
    Reference,
)

LAWS = [
    MuA(),
    MuA(tokens=None),
    Constant(),
    Power(exponent=-0.5, law=Constant()),
    Power(exponent=0.25),
]
RANKS = (4, 16, 64)
Rows = list[dict[str, Any]]


def drawn(
    law: Law,
    *,
    ranks: tuple[int, ...] = RANKS,
    alpha: float = 32.0,
    exponents: range = range(-15, -3),
    seeds: tuple[int, ...] = (0,),
    cliff: float = math.inf,
    init: Any = "A",
) -> Rows:
    """Return a sweep of parabolas whose best learning rates follow `law`.

    The lowest loss is 1. Runs above the log2 learning rate `cliff` diverged.
    """
    at_16 = Reference(16, alpha, fan_in=4096.0, init=init)
    rows = []
    for rank in ranks:
        there = Reference(rank, alpha, fan_in=4096.0, init=init)
        best = -9.3 + math.log2(law.multiplier(there.as_factor(), at_16))
        for x in exponents:
            loss = "diverged" if x > cliff else 1 + 0.1 * (x - best) ** 2
            row = {
                "model": "m",
                "rank": rank,
                "alpha": alpha,
                "init": init,
                "lr": 2.0**x,
                "loss": loss,
            }
            rows += [{**row, "seed": seed} for seed in seeds]
    return rows


@pytest.mark.parametrize("best", ["parabola", "bowl"])
@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_the_law_a_sweep_was_drawn_from_errs_by_nothing(law: Law, best: str) -> None:
    """On a sweep that follows a law, this law errs by 0 octaves with the parabola, and loses almost nothing."""
    (score,) = scoring.bench_law(drawn(law, seeds=(0, 1)), [law], best=best)
    assert (len(score.moves), score.off_grid) == (6, 0)
    assert score.worst < (1e-9 if best == "parabola" else 0.2)
    assert max(score.lost) < 0.1 / 4


WRONG = [(0.5, "constant"), (-0.25, "constant"), (0.5, Power(1.0, law=Constant()))]


@pytest.mark.parametrize(("exponent", "law"), WRONG)
def test_a_wrong_power_errs_by_its_octaves(exponent: float, law: str | Law) -> None:
    """A law whose exponent is wrong errs by the wrong part times the octaves of rank."""
    (score,) = scoring.bench_law(drawn(Power(exponent=exponent, law=Constant())), [law])
    off = -exponent if law == "constant" else 0.5
    for move in score.moves:
        octaves = math.log2(move.target.rank / move.source.rank)
        assert move.octaves == pytest.approx(off * octaves, abs=1e-9)


def test_the_loss_lost_is_that_of_the_grid() -> None:
    """The excess loss is relative to the lowest loss tried at the target rank, not to the true minimum."""
    (score,) = scoring.bench_law(
        drawn(Power(exponent=0.5, law=Constant()), ranks=(16, 64)), ["constant"]
    )
    up = next(move for move in score.moves if move.target.rank == 64)
    lowest = 1 + 0.1 * 0.3**2  # the best rate is -8.3, the nearest tried -8
    # the converted learning rate is 2^-9.3, where the spline is close to the parabola
    true = 1 + 0.1 * 1.0**2
    assert up.lost == pytest.approx((true - lowest) / lowest, abs=0.01)
    # relative to the lowest loss tried, not to the true minimum
    assert up.lost != pytest.approx((true - 1) / lowest, abs=0.005)


def test_moves_beyond_the_grid_and_into_the_cliff_are_told_apart() -> None:
    """A conversion outside the grid has an unknown loss, and one to diverged runs an infinite loss."""
    rows = drawn(
        Power(exponent=1.0, law=Constant()), ranks=(4, 64), exponents=range(-13, -4)
    )
    (off,) = scoring.bench_law(rows, [Power(-1.0, law=Constant())])
    assert (off.off_grid, off.lost) == (2, ())
    (cliff,) = scoring.bench_law(
        drawn(Constant(), cliff=-8), [Power(1.0, law=Constant())]
    )
    assert max(cliff.lost) == math.inf
    assert "diverged" in scoring.score_table([cliff])


def test_what_does_not_compare_is_not_compared() -> None:
    """Learning rates are only converted within one model, batch size and init, and not to full finetuning.

    Best learning rates at an end of the grid are left out.
    """
    rows = [*drawn(MuA()), *({**row, "model": "n"} for row in drawn(MuA()))]
    rows += [{**row, "batch": 8} for row in drawn(MuA())] + drawn(Constant(), init="B")
    rows += [{**row, "rank": "full"} for row in drawn(MuA())]
    rows += [
        {**row, "rank": 256}
        for row in drawn(MuA(), ranks=(16,), exponents=range(-9, -3))
    ]
    (score,) = scoring.bench_law(rows, ["mua"])
    assert len(score.moves) == 4 * 6
    assert all(
        (m.source.batch, m.source.init) == (m.target.batch, m.target.init)
        for m in score.moves
    )
    assert {m.target.rank for m in score.moves} == set(RANKS)


CURVES = [
    ({0: 4.0, 1: 1.0, 3: 1.0}, 2.0),
    ({0: 1.0, 1: 0.0, 2: 1.0}, 1.0),
    ({0: 1.0, 1: 0.0, 2: math.inf}, 0.5),
    ({0: 1.0, 1: 1.0, 2: 1.0}, None),
    ({0: math.inf, 1: 0.0, 2: 1.0}, None),
    ({0: 0.0, 1: 1.0, 2: 2.0}, None),
    ({0: 2.0, 1: 1.0, 2: 0.0}, None),
    ({0: 1.0}, None),
]


@pytest.mark.parametrize(("curve", "vertex"), CURVES)
def test_a_vertex_lies_inside_the_grid_or_nowhere(
    curve: dict[float, float], vertex: float | None
) -> None:
    """The vertex is half a step below the lowest point if the next run diverged, and None at an end
    of the grid.
    """
    assert scoring.vertex_of(curve) == (
        None if vertex is None else pytest.approx(vertex)
    )


def test_the_script_scores_a_law() -> None:
    """Without a file, `bench_law.py score` scores the law on the package's sweep."""
    done = CliRunner().invoke(bench_law.main, ["score", "--law", "mua"])
    assert done.exit_code == 0, done.output
    assert " mua " in done.output
    assert "40 moves between 10 ranks of 2 models" in done.output
