"""The benchmarks' suite at its doors: what it refuses, what it keeps, and how it reads optima, exponents and regret."""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(
    not BENCHMARKS.exists(), reason="the benchmarks are not at hand"
)


@pytest.fixture(scope="module", autouse=True)
def _on_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def job(rank: int, x: float, seed: int = 0, scheme: str = "Init[A], s = 1") -> Any:
    from study.grids import Job

    return Job("language", scheme, rank, x, seed)


def bowl(
    rank: int, best: float, seeds: int = 1, scheme: str = "Init[A], s = 1"
) -> dict[Any, float]:
    """Losses 1 + (x − best)² / 10 at nine octaves, a tenth of an octave to the right by seed."""
    middle = round(best)
    return {
        job(rank, x, seed, scheme): 1.0 + (x - best - 0.1 * seed) ** 2 / 10
        for x in range(middle - 4, middle + 5)
        for seed in range(seeds)
    }


def untrained(loss: float = 9.0) -> dict[Any, float]:
    """The loss before training."""
    from study.configurations import START
    from study.grids import FULL

    return {job(FULL, 0.0, 0, START): loss}


# --- the store ------------------------------------------------------------------------------------------------------


def completed(store: Path, jobs: list[Any], ran: list[Any]) -> None:
    from study.grids import Listed
    from study.runs_on_file import complete

    def run(one: Any) -> float:
        ran.append(one)
        return float(one.x)

    complete(Listed(jobs), run, store, 1, lambda text: None)


@pytest.mark.parametrize("best", [-13, -10, -8, -6, -3])
def test_a_line_grows_until_its_best_rate_is_inside(best: int) -> None:
    """A line of rates grows by as many octaves as it takes, however far its centre is from the best rate."""
    from study.grids import Line

    line, done = Line(job(4, 0.0)[:3], centre=-8, seeds=1), {}
    while wanted := line.wanted(done):
        done |= {each: abs(each.x - best) for each in wanted}
    rates = sorted(each.x for each in done)
    assert rates[0] < best < rates[-1]


def test_finished_runs_are_not_run_again(tmp_path: Path) -> None:
    """A second call runs only what the first did not finish."""
    ran: list[Any] = []
    completed(tmp_path / "s.jsonl", [job(4, -5)], ran)
    completed(tmp_path / "s.jsonl", [job(4, -5), job(4, -6)], ran)
    assert ran == [job(4, -5), job(4, -6)]


def test_a_failing_run_loses_nothing(tmp_path: Path) -> None:
    """Runs finished before one that raises stay on file."""
    from study.grids import Listed
    from study.runs_on_file import complete, read

    def run(one: Any) -> float:
        if one.x == -6:
            raise ValueError("boom")
        return 1.0

    with pytest.raises(ValueError, match="boom"):
        complete(
            Listed([job(4, -5), job(4, -6)]),
            run,
            tmp_path / "s.jsonl",
            1,
            lambda text: None,
        )
    assert read(tmp_path / "s.jsonl") == {job(4, -5): 1.0}


NOTED = """
import pathlib, time

def noted(one):
    (pathlib.Path(one.domain) / str(one.x)).touch()
    if one.x == 0:
        raise ValueError("boom")
    time.sleep(0.2)
    return 1.0
"""


def test_a_failing_run_ends_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several processes too, a run that raises ends the suite: what waits in the queue is not run."""
    from study.grids import Job, Listed
    from study.runs_on_file import complete

    (tmp_path / "noted_runs.py").write_text(NOTED)  # where the processes find it too
    monkeypatch.syspath_prepend(str(tmp_path))
    run = importlib.import_module("noted_runs").noted
    jobs = [Job(str(tmp_path), "a", 4, x, 0) for x in range(20)]
    with pytest.raises(ValueError, match="boom"):
        complete(Listed(jobs), run, tmp_path / "s.jsonl", 2, lambda text: None)
    assert len([path for path in tmp_path.iterdir() if path.name.isdigit()]) < 10


@pytest.mark.parametrize("cut", range(2, 60, 7))
def test_a_file_cut_short_keeps_its_whole_lines(tmp_path: Path, cut: int) -> None:
    """A line cut short is run again and the next one begins on its own line."""
    from study.runs_on_file import read

    store, ran = tmp_path / "s.jsonl", []
    completed(store, [job(4, -5), job(4, -6)], ran)
    store.write_bytes(store.read_bytes()[:-cut])
    completed(store, [job(4, -5), job(4, -6)], ran)
    assert ran[2:] == [job(4, -6)]
    assert read(store) == {job(4, -5): -5.0, job(4, -6): -6.0}


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    """Runs of another version are neither read nor appended to."""
    from study.domains import DomainError

    store = tmp_path / "s.jsonl"
    store.write_text(json.dumps({"version": 99}) + "\n")
    with pytest.raises(DomainError, match="version 99, not"):
        completed(store, [job(4, -5)], [])
    assert store.read_text() == json.dumps({"version": 99}) + "\n"


def test_two_suites_do_not_write_at_once(tmp_path: Path) -> None:
    """A store that another process holds is refused with a sentence."""
    from study.domains import DomainError

    with (
        FileLock(tmp_path / "s.lock"),
        pytest.raises(DomainError, match="Another process writes"),
    ):
        completed(tmp_path / "s.jsonl", [job(4, -5)], [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said(tmp_path: Path) -> None:
    """A disk without room ends the suite with a sentence, not a traceback."""
    from study.domains import DomainError
    from study.runs_on_file import _append

    with pytest.raises(DomainError, match=r"cannot be written: .*No space left"):
        _append(Path("/dev/full"), {"a": 1})


# --- weights and data -----------------------------------------------------------------------------------------------


@pytest.fixture
def asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An asset whose fetching command is ours: it writes what the test says."""
    from study.domains import _assets

    monkeypatch.setattr(_assets, "CACHE", tmp_path / "cache")

    class Fetched(_assets.Asset):
        command: ClassVar[list[str]] = ["sh", "-c", "printf right > archive"]

    return Fetched


def test_a_pinned_archive_is_fetched_once(asset: Any) -> None:
    """The archive whose hash is the pinned one lands in the cache and is not fetched again."""
    import hashlib

    one = asset("npm", "some/package@1", hashlib.sha256(b"right").hexdigest())
    assert one.path().read_bytes() == b"right"
    type(one).command = ["false"]
    assert one.path().read_bytes() == b"right"


def test_an_archive_of_another_hash_is_refused(asset: Any) -> None:
    """An archive that is not the one pinned does not reach the cache."""
    from study.domains import DomainError, _assets

    with pytest.raises(
        DomainError, match="served another some/package@1 than the one pinned"
    ):
        asset("npm", "some/package@1", "0" * 64).path()
    assert not list(_assets.CACHE.iterdir())


@pytest.mark.parametrize("command", [["false"], ["/no/such/program"], ["true"]])
def test_a_registry_that_is_away_is_said(asset: Any, command: list[str]) -> None:
    """A fetch that fails names the command to run by hand and where to put the archive."""
    from study.domains import DomainError

    one = asset("pypi", "package==1", "0" * 64)
    type(one).command = command
    with pytest.raises(DomainError, match="could not fetch package==1") as caught:
        one.path()
    assert "put the archive at" in str(caught.value)


def test_an_archive_altered_in_the_cache_is_refused(asset: Any) -> None:
    """An archive that was changed after it was fetched is not used."""
    import hashlib

    from study.domains import DomainError, _assets

    one = asset("npm", "some/package@1", hashlib.sha256(b"right").hexdigest())
    kept = one.path()
    kept.write_bytes(b"wrong")
    _assets.check_hash.cache_clear()
    with pytest.raises(DomainError, match="is not what was kept: its hash is another"):
        one.path()
    assert kept.exists()


def test_a_pretrained_checkpoint_is_made_once(asset: Any) -> None:
    """What a seeded function made is read from the cache afterwards, to the bit."""
    from study.domains._assets import made_once

    made = {"weight": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).T}
    first = made_once("some-net-v1", lambda: made)
    again = made_once("some-net-v1", dict)
    assert torch.equal(first["weight"], made["weight"])
    assert torch.equal(again["weight"], made["weight"])


def test_a_checkpoint_of_another_hash_is_refused(asset: Any) -> None:
    """A checkpoint in the cache that is cut short or altered is named, kept, and not trained from."""
    from study.domains import DomainError, _assets

    _assets.made_once("some-net-v2", lambda: {"weight": torch.zeros(3)})
    path = _assets.CACHE / "some-net-v2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for cached in (_assets._kept, _assets.check_hash):
        cached.cache_clear()
    with pytest.raises(
        DomainError, match=r"some-net-v2\.safetensors is not what was kept"
    ):
        _assets.made_once("some-net-v2", lambda: {"weight": torch.ones(3)})
    assert path.exists()


def test_a_process_that_is_ended_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system ends a process, for its memory say, the suite ends with a cure and keeps what it has."""
    from study.domains import DomainError
    from study.grids import Job, Listed
    from study.runs_on_file import complete, read

    (tmp_path / "ended_runs.py").write_text(
        "import os\n\ndef ended(one):\n    os._exit(9)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run, jobs = (
        importlib.import_module("ended_runs").ended,
        [Job("d", "a", 4, x, 0) for x in range(3)],
    )
    completed(tmp_path / "s.jsonl", [job(4, -5)], [])
    with pytest.raises(DomainError, match="Use --workers 1"):
        complete(Listed(jobs), run, tmp_path / "s.jsonl", 2, lambda text: None)
    assert read(tmp_path / "s.jsonl") == {job(4, -5): -5.0}


def test_the_machine_is_noted_once(tmp_path: Path) -> None:
    """Every machine that ran for a file of runs stands in it once, and only if it ran."""
    from study.grids import Listed
    from study.runs_on_file import complete, machines

    store = tmp_path / "s.jsonl"
    for on, xs in (
        ({"cpu": "a"}, (1, 2)),
        ({"cpu": "a"}, (3,)),
        ({"cpu": "b"}, (3,)),
        ({"cpu": "c"}, (4,)),
    ):
        complete(
            Listed([job(4, x) for x in xs]),
            lambda one: 1.0,
            store,
            1,
            lambda text: None,
            on,
        )
    assert machines(store) == [{"cpu": "a"}, {"cpu": "c"}]


class Diverged(torch.nn.Module):
    """A language model whose logits are not numbers."""

    def forward(self, ids: torch.Tensor, **cached: Any) -> Any:
        logits = torch.full((*ids.shape, 12), math.nan, requires_grad=True)
        return SimpleNamespace(
            logits=logits,
            past_key_values=SimpleNamespace(batch_select_indices=lambda which: None),
        )


def test_reinforcement_that_diverged_is_a_loss_that_is_none() -> None:
    """Answers can be drawn from a model that is not finite: its training loss and its score are NaN."""
    from study.domains.reinforcement import batches, evaluate, loss

    assert math.isnan(loss(Diverged(), next(batches(0, 128))).item())
    assert math.isnan(evaluate(Diverged()))


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--domain", "astrology"], "There is no domain 'astrology'. Known domains: "),
        (["--suite", "huge"], "'huge' is not one of 'quick', 'full'"),
        (["--tables", "--law", "no-such-law"], "no-such-law"),
    ],
)
def test_unknown_names_are_refused(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown domain, suite or law ends the command with a sentence that names it."""
    from study.suite import main

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code != 0
    assert said in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("added", ["", ", LoRA+ 16", ", Prodigy"])
def test_a_scheme_is_of_one_configuration(added: str) -> None:
    """A scheme is built in the configuration that its name begins with, though one name begins another's."""
    from study.configurations import CONFIGS, RSLORA, config_of

    assert {name: config_of(name + added) for name in (*CONFIGS, *RSLORA)} == {
        n: n for n in (*CONFIGS, *RSLORA)
    }
    assert config_of("full" + added) == "full"


SCRIPTS = [
    path
    for path in sorted(BENCHMARKS.rglob("*.py"))
    if path.parent.name != "tests" and '__name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_how_it_is_run(path: Path) -> None:
    """Every script's usage names the path at which it lies."""
    usage = f"python {path.relative_to(BENCHMARKS.parent)}"
    by_tox = {"suite": "tox run -e bench", "mutants": "tox run -e mutants"}
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert by_tox.get(path.stem, usage) in docstring


def test_the_guide_names_every_script() -> None:
    """The README names every script above its frozen answers, and no other."""
    guide = (BENCHMARKS / "README.md").read_text().partition("## Frozen answers")[0]
    named = set(re.findall(r"`((?:[a-z_]+/)?[a-z_]+\.py)\b", guide))
    assert named == {str(path.relative_to(BENCHMARKS)) for path in SCRIPTS}


def test_the_first_screen_has_the_eight_pages() -> None:
    """The README begins with the pages that the claims rest on; each is on file."""
    first = (BENCHMARKS / "README.md").read_text().partition("What they rest on")[0]
    pages = re.findall(r"^\| \[(\w+)\]\((results/\1\.md)\)", first, re.M)
    assert len(pages) == 8
    assert all((BENCHMARKS / path).exists() for _, path in pages)


def test_a_frozen_answer_can_be_looked_up() -> None:
    """Git has every page that the table of frozen answers names, at the commit named."""
    table = (BENCHMARKS / "README.md").read_text().partition("## Frozen answers")[2]
    rows = re.findall(r"\| `([\w.]+\.md)` (?:at|of) ([0-9a-f]{8}) \|$", table, re.M)
    assert len(rows) == table.count("\n| ") - 2
    git = ["git", "-C", str(BENCHMARKS), "cat-file", "-e"]
    if subprocess.run([*git, "HEAD"], check=False).returncode:
        pytest.skip("no clone with its history")
    for page, commit in rows:
        folder = "" if page == "CHANGELOG.md" else "benchmarks/results/"
        subprocess.run([*git, f"{commit}:{folder}{page}"], check=True)


# --- what is read from runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 0.25])
def test_an_exponent_is_found(exponent: float) -> None:
    """The exponent of best rates that follow a power of the rank is that power, its interval around it."""
    from study.optima import cliff, exponent_of

    done = {
        k: v
        for r in (1, 4, 16, 64)
        for k, v in bowl(r, -6 + exponent * math.log2(r), 3).items()
    } | untrained()
    found = exponent_of(done, "language", "Init[A], s = 1")
    assert found is not None
    assert found.slope == pytest.approx(exponent, abs=1e-6)
    assert found.half == pytest.approx(0.0, abs=1e-6)
    by_cliff = exponent_of(done, "language", "Init[A], s = 1", cliff)
    assert by_cliff is not None
    # straight lines between octaves
    assert by_cliff.slope == pytest.approx(exponent, abs=0.02)


def test_a_best_rate_at_the_grids_edge_is_left_out() -> None:
    """A rank whose best rate is the grid's last is not part of an exponent."""
    from study.optima import exponent_of

    edge = {job(16, x): float(-x) for x in range(-8, -1)}
    done = {**bowl(1, -6.0), **bowl(4, -7.0), **edge, **untrained()}
    found = exponent_of(done, "language", "Init[A], s = 1")
    assert found is not None
    assert found.ranks == (1, 4)


@pytest.mark.parametrize(
    ("apart", "said"),
    [
        (0.05, "held"),
        (-0.1, "held"),
        (0.3, "held with a drift of +0.30"),
        (-0.5, "did not hold here"),
    ],
)
def test_verdicts(apart: float, said: str) -> None:
    """A claim is held, held with a drift, or not, by the rule written before any run."""
    from study.suite_tables import DRIFT, HELD, verdict

    assert verdict(apart, HELD, DRIFT) == said


def test_half_a_grid_is_not_shown(tmp_path: Path) -> None:
    """A cell is read once its grid is whole: its coarse pass, or a grid that is to grow, has no best rate yet."""
    from study.runs_on_file import complete, read
    from study.suite import finished, parts

    asked = parts("image_generation", "quick")[0]
    cells = asked.cells("image_generation")[:1]
    complete(
        asked.grid(cells),
        lambda one: abs(one.x + 7.5),
        tmp_path / "s.jsonl",
        1,
        lambda text: None,
    )
    done = read(tmp_path / "s.jsonl")
    assert finished(done, "quick") == done
    assert finished(dict(list(done.items())[:-1]), "quick") == {}


def test_a_law_of_two_rates_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A law that gives A and B different rates is refused: the sweeps are of one."""
    from llama_shapes import adapters
    from study import moving
    from study.domains import DomainError

    import rankaware_optim as ra

    pair = ra.inspect_model(adapters(1, {"q": (64, 64)}))
    monkeypatch.setattr(moving, "surveyed", lambda domain, config, rank: pair)
    octaves = moving.octaves.__wrapped__  # without the cache, which other tests share
    assert octaves("language", "Init[A], s = 1", 16, ra.MuA()) == pytest.approx(
        -0.7, abs=0.1
    )
    with pytest.raises(DomainError, match="compare laws of one"):
        octaves("language", "Init[A], s = 1", 16, ra.LoRAPlus(16.0))


def test_a_law_moves_a_rate_between_inits_at_one_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From Init[A] to Init[B] the octaves are the law's own, at the model's width."""
    from study import moving

    import rankaware_optim as ra

    monkeypatch.setattr(
        moving, "surveyed", lambda domain, config, rank: SimpleNamespace(width=64)
    )
    at = ra.Reference(16, 16, fan_in=64)
    expected = math.log2(
        ra.Falling().multiplier(ra.Factor("w", "A", 16, 64, 64, init="B"), at)
    )
    assert moving.across_inits("language", 16, ra.Falling()) == pytest.approx(expected)


def test_a_jump_is_how_far_the_moved_rate_lies_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Table (d) has octaves above the best rate there, rank by rank, in full finetuning and from Init[A] at Init[B]."""
    from study import moving, suite_tables
    from study.grids import FULL

    import rankaware_optim as ra

    monkeypatch.setattr(
        moving,
        "octaves",
        lambda domain, config, rank, law: -3.0 if rank == FULL else 0.0,
    )
    monkeypatch.setattr(suite_tables, "across_inits", lambda domain, rank, law: -1.5)
    lora = {
        **bowl(4, -6.0),
        **bowl(16, -7.0),
        **bowl(16, -8.0, scheme="Init[B], s = 1"),
    }
    done = {**lora, **bowl(FULL, -9.0, scheme="full"), **untrained()}
    rows = list(suite_tables.jumps(done, "language", {"a law": ra.MuA()}))
    assert rows == [
        [*("language", *between), estimator, off]
        # these bowls' cliffs lie equally far above their best rates
        for estimator in (
            "vertex",
            "cliff",
        )
        for between, off in (
            (("Init[A], s = 1", "full finetuning"), "+0.0, -1.0"),
            (("Init[B], s = 1", "full finetuning"), "-2.0"),
            (("Init[A], s = 1", "Init[B], s = 1"), "-0.5"),
        )
    ]


def test_ranks_without_a_grid_are_left_out() -> None:
    """Of a suite cut short, tables and figures show the ranks that have three rates on every seed."""
    from study.optima import ranks_in

    begun = {job(64, x): 1.0 for x in range(-8, -1)}
    done = {**bowl(4, -6.0, 3), **bowl(16, -7.0, 3), **begun}
    assert ranks_in(done, "language", "Init[A], s = 1") == [4, 16]


def test_a_figures_ticks_stand_where_their_labels_say() -> None:
    """The label of a rate reads as the place of its tick, and one legend names the ranks."""
    from study.grids import FULL

    pytest.importorskip("matplotlib")
    from study.suite_figures import draw_losses, draw_rates

    done = {
        **bowl(4, -6.0),
        **bowl(16, -7.0),
        **bowl(FULL, -9.0, scheme="full"),
        **untrained(),
    }
    for figure, side in (
        (draw_losses(done, "language"), "x"),
        (draw_rates(done, "language", {}), "y"),
    ):
        figure.draw_without_rendering()
        for axis in figure.axes:
            own = getattr(axis, f"{side}axis")
            labels = [text.get_text() for text in own.get_ticklabels()]
            assert labels
            assert [float(label) for label in labels] == pytest.approx(
                list(own.get_ticklocs())
            )
    (legend,) = draw_losses(done, "language").legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["r = 4", "r = 16"]


def test_a_domain_without_a_grid_has_no_tables() -> None:
    """Of a suite stopped in its first runs there is nothing to show."""
    from study.configurations import START
    from study.grids import FULL
    from study.optima import domains_in

    begun = {job(FULL, 0.0, 0, START): 2.0, job(4, -5): 1.0}
    assert domains_in(begun) == []
    assert domains_in({**begun, **bowl(4, -6.0)}) == ["language"]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ((0.5, 0.4, 0.5), -5.0),
        ((0.5, 0.4, 0.45), -4.833),
        ((0.5, 0.4, 1.4), -5.0),
        ((0.5, 0.4), None),
        ((0.41, 0.4, 0.6, 0.62), -5.0),
        ((0.41, 0.4, 0.45, 0.58), -5.333),
        ((0.41, 0.4, 0.6, math.inf), -5.452),
    ],
)
def test_a_best_rate_beside_a_cliff_is_the_lowest(
    losses: tuple[float, ...], best: float | None
) -> None:
    """A parabola's vertex, none at an edge; at a cliff, to untrained or to a plateau, the grid's lowest."""
    from study.best_rates import best_rate

    found = best_rate(
        dict(zip((-6.0, -5.0, -4.0, -3.0), losses, strict=False)), start=0.7
    )
    assert found == (None if best is None else pytest.approx(best, abs=1e-3))


def test_regret_beyond_the_grid_is_the_coarse_passs() -> None:
    """A rate beyond the grid of all seeds is scored by the coarse pass of one, not by the grid's end."""
    from study.configurations import START
    from study.grids import FULL
    from study.regret import lost

    cell = ("language", "Init[A], s = 1", 4)
    done = {**bowl(4, -6.0, 3), job(4, 0.0): 5.0, job(FULL, 0.0, 0, START): 2.0}
    lowest = lost(done, cell, cell, -6.0)
    assert lost(done, cell, cell, 0.0) == pytest.approx(
        lowest + (5.0 - 1.0 - 0.01 * 5 / 30) / (1.0 - 0.01 * 5 / 30), rel=0.01
    )
    assert lost(done, cell, cell, 3.0) == lost(done, cell, cell, 0.0)


def test_regret_is_a_share_of_the_gain() -> None:
    """Regret is 0 at the grid's best rate, else (loss − best) / (start − best), by the spline between rates."""
    from study.configurations import START
    from study.grids import FULL
    from study.regret import lost

    cell = ("language", "Init[A], s = 1", 4)
    done = {**bowl(4, -6.0), job(FULL, 0.0, 0, START): 2.0}
    assert lost(done, cell, cell, -6.0) == 0.0
    assert lost(done, cell, cell, -5.0) == pytest.approx(0.1)
    # the bowl that was tried
    assert lost(done, cell, cell, -4.5) == pytest.approx(1.5**2 / 10, abs=0.005)


@pytest.mark.parametrize(
    ("ys", "x", "expected"),
    [
        ((0.1, 0.0, 0.1), -5.0, 0.0),  # through every run
        ((0.1, 0.0, 0.1), -9.0, 0.1),  # beyond them the last one's
        ((0.4, 0.1, 0.0, math.inf), -3.0, 5.0),  # a diverged run counts as 500 %
        ((0.4, 0.1, 0.0, 9.0), -3.0, 5.0),  # and so does a larger loss
    ],
)
def test_regret_between_rates_goes_through_the_runs(
    ys: tuple[float, ...], x: float, expected: float
) -> None:
    """The curve meets every run, and is flat beyond the last ones."""
    from study.loss_curves import regret_between

    assert regret_between({-6.0 + i: y for i, y in enumerate(ys)}, x) == pytest.approx(
        expected
    )


@given(st.lists(st.floats(0, 3), min_size=2, max_size=8), st.floats(0, 1), st.data())
def test_the_curve_between_two_runs_stays_between_them(
    ys: list[float], share: float, data: Any
) -> None:
    """It neither invents a lower loss than both runs beside it, nor a higher one."""
    from study.loss_curves import regret_between

    i = data.draw(st.integers(0, len(ys) - 2))
    found = regret_between({float(x): y for x, y in enumerate(ys)}, i + share)
    assert min(ys[i : i + 2]) - 1e-9 <= found <= max(ys[i : i + 2]) + 1e-9


@pytest.mark.parametrize(
    ("above", "expected"),
    [
        ((0.05, 0.15), -4.5),
        ((0.2, 0.9), -5.5),
        ((math.inf,), -5.5),
        ((0.05, 0.09), None),
    ],
)
def test_the_cliff_is_where_a_tenth_of_the_gain_is_lost(
    above: tuple[float, ...], expected: float | None
) -> None:
    """It lies on straight lines, half way to a rate that diverged, and nowhere where no rate loses so much."""
    from study.optima import cliff_of

    tried = {-8.0: 1.7, -7.0: 1.4, -6.0: 1.0} | {
        -5.0 + i: 1.0 + loss for i, loss in enumerate(above)
    }
    assert cliff_of(tried, -6.0, start=2.0) == (
        None if expected is None else pytest.approx(expected)
    )


def test_the_noise_floor_is_what_the_others_choice_loses_on_a_seed() -> None:
    """Each seed scores the rate that all others choose; one that agrees loses nothing, and one seed alone has none."""
    from study.regret import noise_floor

    cell = ("language", "Init[A], s = 1", 4)
    losses = {-7.0: (1.5, 1.5, 1.0), -6.0: (1.0, 1.0, 1.4), -5.0: (1.6, 1.6, 1.8)}
    done = {
        job(4, x, seed): loss
        for x, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    } | untrained(2.0)
    # Seeds 0 and 2 choose -6 or -7 by their sums, 2.4 against 2.5; so -6 stands, and seed 2 loses .4 of its 1.
    assert noise_floor(done, cell) == pytest.approx(0.4 / 3)
    assert (
        noise_floor({run: loss for run, loss in done.items() if run.seed == 0}, cell)
        is None
    )


@pytest.fixture
def one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are kept, and moved in no other way."""
    from study import regret

    monkeypatch.setattr(
        regret,
        "ways",
        lambda done, domain, config, laws: [("kept", config, regret.kept)],
    )


@pytest.mark.usefixtures("one_way")
def test_the_noise_floor_stands_before_a_configurations_ways() -> None:
    """Table (c) begins a configuration with the floors of its ranks and of full finetuning."""
    from study import regret
    from study.grids import FULL

    done = {
        **bowl(4, -6.0, 3),
        **bowl(16, -7.0, 3),
        **bowl(FULL, -9.0, 3, scheme="full"),
        **untrained(),
    }
    floor, kept = regret.moves_in(done, "language", {}, {})
    assert (floor.way, floor.lora, floor.full) == (regret.FLOOR, (0.0, 0.0), (0.0,))
    assert (len(kept.lora), len(kept.full)) == (2, 2)


def test_a_grid_grows_until_its_best_lies_inside(tmp_path: Path) -> None:
    """A grid whose best rate sits at its edge is extended there by octaves until it does not."""
    from study.grids import Grid
    from study.runs_on_file import complete, read

    cell = ("language", "Init[A], s = 1", 4)
    grid = Grid([cell], {cell[1]: range(-13, -8, 2)}, seeds=1, half=1)
    complete(
        grid, lambda one: abs(one.x + 6.0), tmp_path / "s.jsonl", 1, lambda text: None
    )
    xs = sorted({one.x for one in read(tmp_path / "s.jsonl")})
    assert -6 in xs
    assert max(xs) == -5


def test_the_readmes_table_pools_a_domains_configurations() -> None:
    """A way's cell is mean, 95th percentile and share above 5 % over every configuration; a domain's lack is a dash."""
    from study.regret import Moved
    from study.suite_tables import summary

    moved = [
        Moved("language", "Init[A], s = 1", "1/r", (0.01, 0.02), (0.5,)),
        Moved("language", "Init[B], s = 1", "1/r", (0.03, 5.0), (0.7,)),
        Moved("language", "Init[A], s = 1", "one rate everywhere", (0.0, 0.1), (0.2,)),
        Moved("reinforcement", "Init[A], s = 1", "1/r", (0.04,), (0.05,)),
        Moved(
            "reinforcement", "Init[A], s = 1", "a way nobody compares", (9.0,), (9.0,)
        ),
    ]
    assert summary(moved).splitlines()[2:] == [
        "| another rank | one rate everywhere | 5.0 / 9.5 / 50 | – |",
        "| another rank | 1/r | 126.5 / 425.5 / 25 | 4.0 / 4.0 / 0 |",
        "| full finetuning | one rate everywhere | 20.0 / 20.0 / 100 | – |",
        "| full finetuning | 1/r | 60.0 / 69.0 / 100 | 5.0 / 5.0 / 0 |",
    ]


def test_the_readmes_table_pools_domains_and_keeps_settings_apart() -> None:
    """Scores are over the moves of all domains: between ranks by setting, to full finetuning by the source's init."""
    from study.regret import Moved
    from study.suite_tables import by_setting

    keep = "one rate everywhere"
    moved = [
        Moved("language", "Init[A], s = 1", keep, (0.01, 0.02), (0.5,)),
        Moved("reinforcement", "Init[A], s = 1", keep, (0.09,), (0.1,)),
        Moved("language", "Init[B], s = 1", keep, (0.03, 0.03), (0.0,)),
        Moved("language", "Init[A], s = 1", "a way nobody compares", (9.0,), (9.0,)),
    ]
    rows = {row.split(" | ")[0]: row for row in by_setting(moved).splitlines()[2:]}
    to_full = "30.0 / 48.0 / 100 | 0.0 / 0.0 / 0"
    assert (
        rows["| keeping it"]
        == f"| keeping it | 4.0 / 8.3 / 33 | – | 3.0 / 3.0 / 0 | {to_full} |"
    )
    assert rows["| the default law"] == "| the default law | – | – | – | – | – |"


@pytest.mark.usefixtures("one_way")
def test_the_worst_move_has_its_name() -> None:
    """Table (c) names the two ranks between which a kept rate loses most, and the rank it loses most from in full."""
    from study import regret
    from study.grids import FULL

    done = {
        **bowl(4, -6.0, 3),
        **bowl(16, -7.0, 3),
        **bowl(64, -9.0, 3),
        **bowl(FULL, -9.0, 3, scheme="full"),
    }
    _, kept = regret.moves_in({**done, **untrained()}, "language", {}, {})
    assert (kept.worst, kept.worst_full) == ("64 → 4", "4 → full")


@pytest.mark.usefixtures("one_way")
def test_a_moved_rate_that_was_run_counts_by_its_run() -> None:
    """The mean loss of a moved rate's own runs replaces the loss between swept rates."""
    from study import regret
    from study.grids import FULL, Job

    done = {
        **bowl(4, -6.0, 3),
        **bowl(16, -7.0, 3),
        **bowl(FULL, -9.0, 3, scheme="full"),
        **untrained(),
    }
    scheme = next(iter(bowl(4, -6.0))).scheme
    runs = {Job("language", scheme, 16, -5.9, seed): 2.0 for seed in (0, 1)}
    by_run = regret.means_of(runs, {})
    _, before = regret.moves_in(done, "language", {}, {})
    _, after = regret.moves_in(done, "language", {}, by_run)
    changed = [one != other for one, other in zip(before.lora, after.lora, strict=True)]
    assert changed == [True, False]
    assert before.full == after.full


def test_the_readmes_figure_takes_any_study() -> None:
    """The figure is drawn of one domain without full runs, and of moves that diverged or gained."""
    from study.regret import Moved

    pytest.importorskip("matplotlib")
    from study.suite_figures import draw_summary

    moved = [
        Moved("language", "Init[A], s = 1", "one rate everywhere", (-0.01, 5.0), ())
    ]
    figure = draw_summary(moved)
    assert [axis.get_title() for axis in figure.axes][
        -1
    ] == "to full finetuning,\nfrom Init[B]"


def test_a_readme_keeps_what_stands_around_the_tables(tmp_path: Path) -> None:
    """New tables take the place of the old ones between their marks, and nothing else changes."""
    from study.suite import BEGIN, END, publish

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    publish(readme, "new")
    publish(readme, "newer")
    assert readme.read_text() == f"before\n{BEGIN}\n\nnewer\n\n{END}\nafter\n"


def test_a_readme_without_its_marks_is_left_alone(tmp_path: Path) -> None:
    """A README that lost a mark is refused with a sentence, and not changed."""
    from study.domains import DomainError
    from study.suite import BEGIN, publish

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\nafter\n")
    with pytest.raises(DomainError, match="lacks"):
        publish(readme, "new")
    assert readme.read_text() == f"before\n{BEGIN}\nold\nafter\n"


def test_the_studys_domains_come_in_its_order() -> None:
    """Every domain is named once, the study's seven first."""
    from study.domains import names

    assert names()[0] == "image_generation"
    assert names()[6] == "language_smollm2"
    assert len(set(names())) == len(names())


@pytest.mark.parametrize(
    ("domain", "seeds"),
    [("language", [3, 3, 1, 1]), ("language_smollm2", [1, 1, 1, 1])],
)
def test_a_large_domain_has_one_seed(domain: str, seeds: list[int]) -> None:
    """Claims are swept with three seeds, comparisons with one, and a domain whose runs are long with one throughout."""
    from study.suite import parts

    assert [part.seeds for part in parts(domain, "full")] == seeds
    assert {16, 256 if domain == "language_smollm2" else 192} <= set(
        parts(domain, "full")[0].ranks
    )
