"""The GPU kit: every piece at its smallest on a CPU, and what the rules of its experiment of width conclude."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
BENCHMARKS = Path(__file__).parents[1]
A, B, FULL = "Init[A], s = 1", "Init[B], s = 1", "full"


def kit(folder: Path, command: str, *options: str) -> str:
    """What a command of the kit prints, at the smallest shapes on a CPU."""
    path = os.pathsep.join([str(BENCHMARKS), *filter(None, sys.path)])
    shape = ("--device", "cpu", "--smallest", "--into", str(folder))
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu" / "kit.py"), command, *shape, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every piece was run."""
    folder = tmp_path_factory.mktemp("kit") / "cuda"
    kit(folder, "run", "--minutes", "30")
    return folder


@pytest.mark.xdist_group("kit")
def test_every_piece_runs_on_a_cpu(tried: Path) -> None:
    """The smallest of every piece leaves runs, no test of the wrapper fails, and rows name their device."""
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in tried.glob("*.jsonl")
    }
    assert rows.keys() == {"step_cost", "width", "made_up"}
    assert {
        row["machine"]["device"]
        for each in rows.values()
        for row in each
        if "machine" in row
    } == {"cpu"}
    tests = json.loads((tried / "tests.json").read_text())["rows"]
    assert {row["outcome"] for row in tests} == {"passed", "skipped"}


@pytest.mark.xdist_group("kit")
def test_what_is_on_file_is_not_run_again(tried: Path) -> None:
    """Called again the kit runs nothing that it has."""
    before = {path: path.read_text() for path in tried.glob("*.jsonl")}
    kit(tried, "run", "--piece", "step_cost", "--piece", "width", "--piece", "smollm2")
    assert {path: path.read_text() for path in tried.glob("*.jsonl")} == before


@pytest.mark.xdist_group("kit")
def test_the_page_has_every_piece(tried: Path) -> None:
    """The table beside the folder names the device and has a part of each piece."""
    kit(tried, "table")
    page = tried.with_suffix(".md").read_text()
    assert page.startswith("# On cpu\n")
    for heading in (
        "The wrapper's tests",
        "What a step costs",
        "Width",
        "SmolLM2: exponent of the best rate in rank",
    ):
        assert f"\n## {heading}\n" in page


def test_a_stopped_kit_says_what_is_missing(tmp_path: Path) -> None:
    """With no time left nothing is run, and nothing is lost."""
    kit(tmp_path / "cuda", "run", "--minutes", "0")
    assert not list(tmp_path.glob("cuda/*"))


# --- the experiment of width ----------------------------------------------------------------------------------------


@pytest.fixture
def width(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield importlib.import_module("gpu.width")
    sys.modules.pop("gpu.width", None)


def by_law(width: Any, law: str) -> dict[Any, float]:
    """Rates at every cell as a law moves 2^-8 from rank 16 of each configuration at the narrowest width."""
    move, cells = width.MOVES[law], width.cells(width.WHOLE)
    first = {
        config: next(key for key in sorted(cells) if key[1:] == (config, rank))
        for config, rank in SOURCES
    }
    return {
        key: move(width.place_of(first[key[1]]), width.place_of(key), -8.0)
        for key in cells
    }


SOURCES = ((A, 16), (B, 16), (FULL, 0))


def test_cells_come_by_worth(width: Any) -> None:
    """Rank 16 and full at every width come first, from the widest; all ranks that a width allows follow, each once."""
    cells = width.cells(width.WHOLE)
    assert {key[2] for key in cells[:12]} == {0, 16}
    assert [key[0] for key in cells[:12:3]] == [4096, 512, 2048, 1024]
    assert len(cells) == len(set(cells)) == 2 * (4 + 3 * 5) + 4


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_mean_fan_in_is_the_surveys(width: Any) -> None:
    """The width that laws read is what the package surveys."""
    import rankaware_optim as ra

    model = width.adapt(width.network(64, 0, "cpu"), 4, 4.0, "A", 0, width.LAYERS)
    assert ra.inspect_model(model).width == pytest.approx(width.mean_fan_in(64))


@pytest.mark.parametrize(
    ("law", "config", "rank", "octaves"),
    [
        ("µA", A, 16, -1.4),
        ("µA, falling at B", A, 16, -1.4),
        ("n^-1/2", A, 16, -1.5),
        ("µA", B, 16, -3.0),
        ("µA, falling at B", B, 16, -2.0),
        ("µA", FULL, 0, -3.0),
    ],
)
def test_octaves_in_width_are_the_hypotheses(
    width: Any, law: str, config: str, rank: int, octaves: float
) -> None:
    """From 512 to 4096 at rank 16, as the docstring says."""
    rates = by_law(width, law)
    assert rates[4096, config, rank] - rates[512, config, rank] == pytest.approx(
        octaves, abs=0.05
    )


@pytest.mark.parametrize(
    ("law", "narrow", "wide"),
    [
        ("µA, falling at B", -2.1, -2.7),
        ("µA, r^-1/2 above 4 at B", -2.6, -3.5),
        ("µA", -0.1, 0.0),
    ],
)
def test_octaves_in_rank_are_the_hypotheses(
    width: Any, law: str, narrow: float, wide: float
) -> None:
    """At Init[B] from rank 4 to 256 at width 512, and to 1024 at 4096, as the docstring says."""
    rates = by_law(width, law)
    assert rates[512, B, 256] - rates[512, B, 4] == pytest.approx(narrow, abs=0.05)
    assert rates[4096, B, 1024] - rates[4096, B, 4] == pytest.approx(wide, abs=0.05)


@pytest.mark.parametrize(
    ("law", "question", "said"),
    [
        ("µA, falling at B", 0, "the package's law holds"),
        ("µA", 0, "µA in place of the package's law"),
        (
            "µA, r^-1/2 above 4 at B",
            0,
            "µA, r^-1/2 above 4 at B in place of the package's law",
        ),
        ("µA", 2, "the package's law holds"),
        ("one rate", 2, "one rate in place of the package's law"),
        ("n^-1/2", 4, "the package's law holds"),
        ("n^-1/2", 6, "n^-1/2 in place of the package's law"),
    ],
)
def test_the_rule_names_the_law_that_made_the_rates(
    width: Any, law: str, question: int, said: str
) -> None:
    """Rates that a law made are read as that law's, or as the package's where the two are near."""
    rates = by_law(width, law)
    assert said in width.verdict(width.QUESTIONS[question], [rates, rates])


def test_the_rule_settles_nothing_where_estimators_disagree(width: Any) -> None:
    """A law that is the best by one estimator alone does not replace the package's."""
    rates = by_law(width, "one rate")
    steep = {key: x - 2 * key[0] / 512 for key, x in by_law(width, "1/n").items()}
    assert "nothing is settled" in width.verdict(width.QUESTIONS[6], [rates, steep])


def test_the_packages_law_does_not_replace_itself(width: Any) -> None:
    """Where the package's law is an octave off and every other further, nothing is settled."""
    bent = {512: 0.0, 1024: 1.0, 2048: 1.0, 4096: 0.0}
    rates = {
        key: x + bent[key[0]] for key, x in by_law(width, "µA, falling at B").items()
    }
    assert "nothing is settled" in width.verdict(width.QUESTIONS[5], [rates, rates])


def test_nothing_is_known_before_any_run(width: Any) -> None:
    """Without two cells a question has no answer."""
    assert "not known" in width.verdict(width.QUESTIONS[0], [{}, {}])
