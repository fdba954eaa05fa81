"""Tests of `compare_laws`: how well each law predicts the best learning rates of configurations that were left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from rankaware_optim import CalibrationError, Constant, Factor, LawError, Reference
from rankaware_optim.laws import Law, get_law
from rankaware_optim.sweeps import compare_laws

from .test_fit import PRIOR, WIDTH, drawn

OFFSETS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0)


@dataclass(frozen=True)
class Chen(Law):
    """A user's own law: the learning rate is inversely proportional to the square root of the rank."""

    name: ClassVar[str] = "chen"

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        return ((reference.rank or 64) / (factor.rank or 64)) ** 0.5


def sweep(law: Law = PRIOR, ranks=(4, 16, 64, 0), **others) -> list[dict]:
    """Return a sweep without noise whose best learning rates follow a law."""
    return drawn(law, ranks=ranks, noise=0.0, offsets=OFFSETS, seeds=1, **others)


def off(score) -> float:
    """Return the mean distance, in octaves, between the predicted and the best learning rates of the ranks."""
    octaves = [abs(p.octaves) for p in score.between_ranks]
    return sum(octaves) / len(octaves)


@pytest.mark.parametrize("true", [PRIOR, Chen(), Constant()], ids=lambda law: law.name)
def test_the_law_that_made_a_sweep_predicts_it_best(true):
    """The law from which a sweep was drawn predicts ranks and full finetuning best, with almost no excess loss."""
    laws = [PRIOR, Chen(), Constant()]
    table = compare_laws(sweep(true), laws)
    scores = dict(zip(laws, table.scores, strict=True))
    assert min(scores, key=lambda law: off(scores[law])) == true
    best = scores[true]
    assert off(best) < 0.2
    assert [p.at.rank for p in best.between_ranks] == [4, 16, 64]
    (full,) = best.to_full
    assert abs(full.octaves) < 0.2
    assert all(p.excess < 0.01 for p in (*best.between_ranks, full))


def test_the_cell_that_is_predicted_is_left_out():
    """A rank is predicted from the other ranks alone, so its own runs do not influence the prediction."""
    rows = sweep(Constant(), ranks=(4, 16, 64))
    moved = [{**row, "lr": row["lr"] * (4 if row["rank"] == 4 else 1)} for row in rows]
    (score,) = compare_laws(moved, ["constant"]).scores
    by_rank = {p.at.rank: p.octaves for p in score.between_ranks}
    assert by_rank[4] == pytest.approx(-2.0, abs=0.2)
    assert by_rank[16] == by_rank[64] == pytest.approx(1.0, abs=0.2)


def test_models_and_inits_are_not_mixed():
    """The best learning rate of a rank is predicted only from ranks of the same model."""
    first = [{**row, "model": "a"} for row in sweep()]
    other = [{**row, "model": "b", "lr": row["lr"] * 16} for row in sweep()]
    (alone,) = compare_laws(first, ["mua"]).scores
    (both,) = compare_laws([*first, *other], ["mua"]).scores
    assert len(both.between_ranks) == 2 * len(alone.between_ranks)
    assert off(both) == pytest.approx(off(alone), abs=0.05)


def test_full_finetuning_is_predicted_from_each_init():
    """Full finetuning is predicted from the ranks of each init separately, and a rank only from ranks of its own init."""
    at_a = sweep()
    at_b = [
        {**row, "init": "B", "lr": row["lr"] * 16}
        for row in at_a
        if row["rank"] != "full"
    ]
    (alone,) = compare_laws(at_a, ["constant"]).scores
    (both,) = compare_laws([*at_a, *at_b], ["constant"]).scores
    assert off(both) == pytest.approx(off(alone), abs=0.05)
    (first, second) = sorted(p.octaves for p in both.to_full)
    assert second - first == pytest.approx(4.0, abs=0.3)


def test_what_cannot_be_compared_is_left_out_and_said():
    """A rank whose best learning rate is at an end of its grid, or whose runs all diverged, is left out with a note."""
    ends = [r for r in sweep(ranks=(4,)) if r["lr"] <= sweep(ranks=(4,))[3]["lr"]]
    lost = [{**row, "loss": "diverged"} for row in sweep(ranks=(256,))]
    table = compare_laws([*sweep(ranks=(16, 64)), *ends, *lost], ["mua"])
    assert len(table.scores[0].between_ranks) == 2
    said = str(table)
    assert "rank 4, alpha 4, init A was left out: its best learning rate is the" in said
    assert "rank 256, alpha 256, init A was left out: all of its runs diverged" in said


def test_a_prediction_where_runs_diverged_is_said():
    """If a law predicts a learning rate at which runs diverged, the table says so."""
    rows = [
        {**row, "loss": "diverged" if row["rank"] == 64 and i % 6 >= 4 else row["loss"]}
        for i, row in enumerate(sweep(Chen(), ranks=(4, 64)))
    ]
    assert "diverged" in str(compare_laws(rows, ["constant"]))


def test_the_table_names_each_law_as_it_was_given():
    """A law is listed by the name that was passed, or by its own name if it is an object. A single law needs no list."""
    table = compare_laws(sweep(), ["mua-paper", Chen()])
    assert [score.law for score in table.scores] == ["mua-paper", "chen"]
    assert "mua-paper" in str(table)
    assert "<table" in table._repr_html_()
    assert compare_laws(sweep(), "mua").scores == compare_laws(sweep(), ["mua"]).scores


def test_the_table_has_a_cell_under_every_heading():
    """The row of a law contains its mean and worst distance, its excess losses, and the same for full finetuning."""
    table = compare_laws(sweep(), ["falling"])
    [score] = table.scores
    lines = map(str.split, str(table).splitlines())
    [row] = [cells for cells in lines if cells[:1] == ["falling"]]
    distances = [abs(p.octaves) for p in score.between_ranks]
    assert len(row) == 7
    assert float(row[1]) == pytest.approx(sum(distances) / len(distances), abs=0.01)
    assert float(row[2]) == pytest.approx(max(distances), abs=0.01)
    assert float(row[5]) == pytest.approx(abs(score.to_full[0].octaves), abs=0.01)


WRONG = [
    (sweep(ranks=(4,)), ["mua"], CalibrationError, "at least two LoRA ranks"),
    (sweep(ranks=(0,)), ["mua"], CalibrationError, "at least two LoRA ranks"),
    (sweep(), ["nobody"], LawError, "nobody"),
    (None, ["mua"], CalibrationError, "sweep cannot be read from None"),
]


@pytest.mark.parametrize(("rows", "laws", "error", "message"), WRONG)
def test_what_cannot_be_compared_is_an_error(rows, laws, error, message):
    """Comparing laws with fewer than two LoRA ranks, an unknown law or no sweep raises an error."""
    with pytest.raises(error, match=message):
        compare_laws(rows, laws)


def test_the_width_is_that_of_each_cell():
    """The prediction for full finetuning uses the fan-in of the rows of full finetuning."""
    rows = [
        {**row, "fan_in": 4 * WIDTH if row["rank"] == "full" else WIDTH}
        for row in sweep()
    ]
    narrow, wide = (
        compare_laws(r, ["mua"]).scores[0].to_full[0] for r in (sweep(), rows)
    )
    law = get_law("mua")
    ratio = law.multiplier(
        Reference(method="full", fan_in=4 * WIDTH).as_factor(),
        Reference(method="full", fan_in=WIDTH),
    )
    assert 2.0 ** (wide.octaves - narrow.octaves) == pytest.approx(ratio)
