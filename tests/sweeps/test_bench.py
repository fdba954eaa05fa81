"""The yardstick: what a law that is right, or wrong by a known amount, scores; and laws named by text."""

from __future__ import annotations

import csv
import json
import math
import random
import subprocess
import sys

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from rankaware_optim import CalibrationError, Constant, Falling, LawError, MuA, Power, Reference
from rankaware_optim.cli._bench_law import _cell
from rankaware_optim.cli._bench_law import bench_law as bench
from rankaware_optim.laws import DEFAULT_LAW
from rankaware_optim.sweeps import COMPARED, DEMO_SWEEP, bench_law, score_table
from rankaware_optim.sweeps._bench import vertex_of

LAWS = [MuA(), MuA(tokens=None), Constant(), Power(exponent=-0.5, law=Constant()), Power(exponent=0.25)]
RANKS = (4, 16, 64)


def drawn(
    law, *, ranks=RANKS, alpha=32.0, model="m", exponents=range(-15, -3), seeds=(0,), cliff=None, init="A"
) -> list[dict]:
    """A sweep of parabolas of loss 1 at the best rates of `law`, diverged above log2 rate `cliff`."""
    at_16 = Reference(16, alpha, fan_in=4096.0, init=init)
    rows = []
    for rank in ranks:
        there = Reference(rank, alpha, fan_in=4096.0, init=init)
        best = -9.3 + math.log2(law.multiplier(there.as_factor(), at_16))
        for x in exponents:
            loss = "diverged" if cliff is not None and x > cliff else 1 + 0.1 * (x - best) ** 2
            rows += [
                {"model": model, "rank": rank, "alpha": alpha, "lr": 2.0**x, "loss": loss, "seed": s} for s in seeds
            ]
    return rows


# --- what it finds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_the_law_a_sweep_was_drawn_from_errs_by_nothing(law):
    """The true law scores 0 octaves; over a grid of one octave it loses at most what straight lines overstate."""
    (score,) = bench_law(drawn(law), [law])
    assert len(score.moves) == 6
    assert (score.median, score.worst) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert max(score.lost) < 0.1 / 4
    assert score.off_grid == 0


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
def test_a_vertex_lies_inside_the_grid_or_nowhere(curve, vertex):
    """The parabola's lowest point on an uneven grid, half a step below a cliff, and None at an end."""
    assert vertex_of(curve) == (None if vertex is None else pytest.approx(vertex))


WRONG = [(0.5, "constant"), (-0.25, "constant"), (0.5, "power?exponent=1,law=constant")]


@pytest.mark.parametrize(("exponent", "law"), WRONG)
def test_a_wrong_power_errs_by_its_octaves(exponent, law):
    """A law wrong by an exponent errs by it times the octaves of rank, up one way and down the other."""
    (score,) = bench_law(drawn(Power(exponent=exponent, law=Constant())), [law])
    off = 0.5 if law.startswith("power") else -exponent
    for move in score.moves:
        octaves = math.log2(move.target.rank / move.source.rank)
        assert move.octaves == pytest.approx(off * octaves, abs=1e-9)
    assert (score.median, score.worst) == (pytest.approx(2 * abs(off)), pytest.approx(4 * abs(off)))


def test_the_loss_lost_is_that_of_the_grid():
    """The loss at a moved rate is read off the target's own curve, above its lowest, as a share of it."""
    rows = drawn(Power(exponent=0.5, law=Constant()), ranks=(16, 64))
    (score,) = bench_law(rows, ["constant"])
    up = next(move for move in score.moves if move.target.rank == 64)
    lowest = 1 + 0.1 * 0.3**2  # the best rate is -8.3, the nearest tried -8
    low, high = 1 + 0.1 * 1.7**2, 1 + 0.1 * 0.7**2  # and -9.3 lies between -10 and -9
    assert up.lost == pytest.approx((0.3 * low + 0.7 * high - lowest) / lowest)


def test_moves_beyond_the_grid_and_into_the_cliff_are_told_apart():
    """Off the grid the loss is not known; among diverged runs it is infinite."""
    law = Power(exponent=1.0, law=Constant())
    off = bench_law(drawn(law, ranks=(4, 64), exponents=range(-13, -4)), ["power?exponent=-1,law=constant"])[0]
    assert off.off_grid == 2
    assert off.row()["median_loss"] is None
    (cliff,) = bench_law(drawn(Constant(), cliff=-8), ["power?exponent=1,law=constant"])
    assert cliff.row()["worst_loss"] == math.inf
    assert "diverged" in score_table([cliff])


@pytest.mark.parametrize("best", ["parabola", "bowl"])
def test_both_ways_of_finding_a_best_rate_rank_the_laws_alike(best):
    """By the parabola or by the bowl, the law the sweep was drawn from comes first by a quarter of an octave."""
    laws = ["mua?tokens=8", *COMPARED[1:-1]]
    scores = bench_law(drawn(MuA(tokens=8.0), seeds=(0, 1)), laws, best=best)
    assert scores[0].worst < 0.2
    assert all(score.worst > scores[0].worst + 0.25 for score in scores[1:])


def test_the_default_law_is_among_those_scored():
    """A sweep at Init[B] that falls as the default law says is moved best by it, without naming a law."""
    rows = [{**row, "init": "B"} for row in drawn(Falling(), init="B")]
    worst = {score.label: score.worst for score in bench_law(rows)}
    assert min(worst, key=lambda label: worst[label]) == DEFAULT_LAW


def test_what_does_not_compare_is_not_compared():
    """Other models, batches and inits are each on their own; full finetuning and best rates at an end are left out."""
    rows = [*drawn(MuA()), *drawn(MuA(), model="n")]
    rows += [{**row, "batch": 8} for row in drawn(MuA())] + [{**row, "init": "B"} for row in drawn(Constant())]
    rows += [{**row, "rank": "full"} for row in drawn(MuA())]
    rows += [{**row, "rank": 256} for row in drawn(MuA(), ranks=(16,), exponents=range(-9, -3))]
    (score,) = bench_law(rows, ["mua"])
    assert len(score.moves) == 4 * 6
    assert all((m.source.batch, m.source.init) == (m.target.batch, m.target.init) for m in score.moves)
    assert {m.target.rank for m in score.moves} == set(RANKS)


def test_the_own_sweep_is_the_default():
    """The package carries its sweep: two customs of alpha, five ranks each, scored by every usual law."""
    scores = bench_law()
    assert [score.label for score in scores] == list(COMPARED)
    models = {move.model for move in scores[0].moves}
    assert len(models) == 2
    assert {move.source.rank for move in scores[0].moves} == {1, 4, 16, 64, 256}
    by_label = {score.label: score.worst for score in scores}
    assert by_label["mua"] < by_label["constant"]
    assert DEMO_SWEEP.parent.name == "sweeps"


# --- what changes nothing -------------------------------------------------------------------------------------------

rows_of = st.builds(drawn, st.sampled_from(LAWS), alpha=st.floats(1, 64), seeds=st.sampled_from([(0,), (0, 1)]))


def octaves_of(rows) -> list[float]:
    (score,) = bench_law(rows, ["mua"])
    return sorted(move.octaves for move in score.moves)


@given(rows=rows_of, seed=st.integers(0, 99), offset=st.floats(-0.5, 100), scale=st.floats(0.01, 100))
def test_order_units_and_the_unit_of_the_rate_do_not_matter(rows, seed, offset, scale):
    """The order of rows, the loss's unit and offset, and a factor on every rate leave all errors as they are."""
    moved = [{**row, "loss": scale * (row["loss"] + offset), "lr": row["lr"] * 3} for row in rows]
    shuffled = random.Random(seed).sample(moved, len(moved))
    assert octaves_of(shuffled) == pytest.approx(octaves_of(rows), abs=1e-6)


# --- errors ---------------------------------------------------------------------------------------------------------

BAD = [
    (lambda: [{**row, "alpha": None} for row in drawn(MuA())], {}, "has no alpha.*alpha="),
    (lambda: drawn(MuA(), ranks=(16,)), {}, "No model of the sweep has two ranks"),
    (lambda: drawn(MuA(), exponents=range(-6, -3)), {}, "No model of the sweep has two ranks"),
    (lambda: drawn(MuA()), {"best": "guess"}, "best is 'guess'"),
    (lambda: drawn(MuA()), {"alpha": "no"}, "alpha is 'no'"),
    (lambda: [{**row, "lr": "x"} for row in drawn(MuA())], {}, "row 1, column 'lr'"),
]


@pytest.mark.parametrize(("rows", "options", "message"), BAD)
def test_a_sweep_that_measures_no_law_is_refused(rows, options, message):
    """Without alpha, a second rank or an inner best rate no law can be scored."""
    with pytest.raises(CalibrationError, match=message):
        bench_law(rows(), ["mua"], **options)


def test_a_law_without_a_usable_multiplier_is_refused(own_module):
    """A negative multiplier is the law's error."""
    with pytest.raises(LawError, match="as the multiplier"):
        bench_law(drawn(MuA()), ["test_law_module:Negative"])


def test_alpha_is_filled_in_by_number_or_rank():
    """alpha= serves sweeps that do not say it, as if their rows did."""
    for alpha, stated in ((32.0, 32.0), ("rank", None)):
        rows = [{**row, "alpha": None} for row in drawn(MuA())]
        said = [{**row, "alpha": stated or row["rank"]} for row in rows]
        assert bench_law(rows, ["mua"], alpha=alpha)[0].moves == bench_law(said, ["mua"])[0].moves


# --- the command ----------------------------------------------------------------------------------------------------


def call(*arguments):
    return CliRunner().invoke(bench, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def sweep_csv(tmp_path):
    """A sweep drawn from MuA in a CSV file."""
    path = tmp_path / "mine.csv"
    rows = drawn(MuA())
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_bench_law_prints_a_table(sweep_csv, own_module):
    """The laws asked for, one's own among them, a line each."""
    done = call(sweep_csv, "--law", "mua", "--law", "constant", "--law", "test_law_module:Bare")
    assert done.exit_code == 0
    cells = {line.split()[0]: line.split()[1:3] for line in done.output.splitlines() if line.strip()}
    assert cells["mua"] == ["0.00", "0.00"]
    assert cells["constant"] == cells["test_law_module:Bare"] != cells["mua"]
    assert "6 moves between 3 ranks of 1 models" in done.output


def test_bench_law_writes_json_and_csv(sweep_csv, tmp_path):
    """-o writes every law's row; as JSON with each move, where a rate into the cliff is the text "inf"."""
    for suffix in (".json", ".csv"):
        assert call(sweep_csv, "--law", "mua", "--law", "constant", "-o", tmp_path / f"out{suffix}").exit_code == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    documents = json.loads((tmp_path / "out.json").read_text())
    assert [row["law"] for row in rows] == [document["law"] for document in documents] == ["mua", "constant"]
    for row, document in zip(rows, documents, strict=True):
        assert float(row["worst_octaves"]) == document["worst_octaves"]
        assert len(document["each"]) == int(row["moves"]) == 6
        assert max(abs(move["octaves"]) for move in document["each"]) == document["worst_octaves"]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-x", "@sum", "\t=1", "-1", "mua"])
def test_no_cell_is_a_formula(text):
    """A text that a spreadsheet would run begins with a quote; other texts, and numbers below zero, stay."""
    assert _cell(text) == (text if text == "mua" else f"'{text}")
    assert _cell(-1.5) == -1.5


def test_bench_law_needs_no_sweep():
    """Without a path it is the package's own sweep, with the usual laws."""
    done = call()
    assert done.exit_code == 0
    assert all(f" {label} " in done.output for label in COMPARED)


@pytest.mark.parametrize(
    "options", [["-o", "out.txt"], ["--alpha", "x"], ["--best", "y"], ["--column", "z"]], ids=" ".join
)
def test_wrong_options_show_the_usage(options):
    """An option that cannot be read ends with code 2 and the usage."""
    done = call(*options)
    assert (done.exit_code, "Usage:" in done.output) == (2, True)


def test_a_law_in_the_folder_one_stands_in_is_found(own_module):
    """As a script's neighbour a law is importable, and the search path is left as it was."""
    code = (
        "import sys, torch._dynamo; before = list(sys.path)  # older versions of torch._dynamo add to it\n"
        "from rankaware_optim.cli import main\n"
        "main(['bench-law', '--law', 'test_law_module:HALF'], standalone_mode=False)\n"
        "assert sys.path == before"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=own_module)
    assert done.returncode == 0, done.stderr
    assert "test_law_module:HALF" in done.stdout
