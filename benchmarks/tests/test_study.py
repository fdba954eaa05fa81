"""Tests of the study: its store of runs, its data, and how best learning rates and regret are read."""

from __future__ import annotations

import ast
import math
import re
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from study import moving, regret
from study.best_rates import best_rate
from study.configurations import START
from study.domains import STUDY, DomainError, _assets, get_domain
from study.domains._assets import made_once
from study.grids import FULL, Grid, Job, Listed
from study.loss_curves import regret_between
from study.optima import cliff, cliff_of, exponent_of
from study.regret import Moved, lost, noise_floor
from study.runs_on_file import complete, read
from study.suite import finished, parts, publish
from study.suite_tables import by_setting

import rankaware_optim as ra

BENCHMARKS = Path(__file__).parents[1]


def job(rank: int, x: float, seed: int = 0, scheme: str = "Init[A], s = 1") -> Any:
    return Job("language", scheme, rank, x, seed)


def bowl(
    rank: int, best: float, seeds: int = 1, scheme: str = "Init[A], s = 1"
) -> dict[Any, float]:
    """Return a parabola of losses at nine octaves.

    Its minimum moves by a tenth of an octave with each seed.
    """
    middle = round(best)
    return {
        job(rank, x, seed, scheme): 1.0 + (x - best - 0.1 * seed) ** 2 / 10
        for x in range(middle - 4, middle + 5)
        for seed in range(seeds)
    }


def untrained(loss: float = 9.0) -> dict[Any, float]:
    """Return the loss before training, as a run on file."""
    return {job(FULL, 0.0, 0, START): loss}


# --- the store ------------------------------------------------------------------------------------------------------


def completed(store: Path, jobs: list[Any], ran: list[Any]) -> None:
    def run(one: Any) -> float:
        ran.append(one)
        return float(one.x)

    complete(Listed(jobs), run, store, 1, lambda text: None)


def test_finished_runs_are_not_run_again(tmp_path: Path) -> None:
    """A second call trains only the runs that the first call did not finish."""
    ran: list[Any] = []
    completed(tmp_path / "s.jsonl", [job(4, -5)], ran)
    completed(tmp_path / "s.jsonl", [job(4, -5), job(4, -6)], ran)
    assert ran == [job(4, -5), job(4, -6)]


def test_a_failing_run_loses_nothing(tmp_path: Path) -> None:
    """If a run raises an error, the runs that finished before it stay on file."""

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


@pytest.mark.parametrize("cut", range(2, 60, 7))
def test_a_file_cut_short_keeps_its_whole_lines(tmp_path: Path, cut: int) -> None:
    """If the last line of the file is truncated, only this run is trained again, and the other lines stay."""
    store, ran = tmp_path / "s.jsonl", []
    completed(store, [job(4, -5), job(4, -6)], ran)
    store.write_bytes(store.read_bytes()[:-cut])
    completed(store, [job(4, -5), job(4, -6)], ran)
    assert ran[2:] == [job(4, -6)]
    assert read(store) == {job(4, -5): -5.0, job(4, -6): -6.0}


def test_two_suites_do_not_write_at_once(tmp_path: Path) -> None:
    """If another process writes to the store, a second one raises an error."""
    with (
        FileLock(tmp_path / "s.lock"),
        pytest.raises(DomainError, match="Another process writes"),
    ):
        completed(tmp_path / "s.jsonl", [job(4, -5)], [])


# --- weights and data -----------------------------------------------------------------------------------------------


@pytest.fixture
def asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return an asset class whose fetching command is replaced by one that writes a known file."""
    monkeypatch.setattr(_assets, "CACHE", tmp_path / "cache")

    class Fetched(_assets.Asset):
        command: ClassVar[list[str]] = ["sh", "-c", "printf right > archive"]

    return Fetched


def test_an_archive_of_another_hash_is_refused(asset: Any) -> None:
    """An archive with another hash than the pinned one is an error and is not cached."""
    with pytest.raises(
        DomainError, match="served another some/package@1 than the one pinned"
    ):
        asset("npm", "some/package@1", "0" * 64).path()
    assert not list(_assets.CACHE.iterdir())


def test_a_pretrained_checkpoint_is_made_once(asset: Any) -> None:
    """A checkpoint that was made once is read from the cache afterwards, exactly as it was."""
    made = {"weight": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).T}
    first = made_once("some-net-v1", lambda: made)
    again = made_once("some-net-v1", dict)
    assert torch.equal(first["weight"], made["weight"])
    assert torch.equal(again["weight"], made["weight"])


# --- the command ----------------------------------------------------------------------------------------------------


SCRIPTS = [
    path
    for path in sorted(BENCHMARKS.rglob("*.py"))
    if path.parent.name != "tests" and '__name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_how_it_is_run(path: Path) -> None:
    """The docstring of every script shows the command that runs it, with its path."""
    usage = f"python {path.relative_to(BENCHMARKS.parent)}"
    by_tox = {"suite": "tox run -e bench"}
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert by_tox.get(path.stem, usage) in docstring


def test_the_guide_names_every_script() -> None:
    """The benchmarks' README names every script above its section of answers, and no other."""
    guide = (BENCHMARKS / "README.md").read_text().partition("## Answers")[0]
    named = set(re.findall(r"`((?:[a-z_]+/)?[a-z_]+\.py)\b", guide))
    assert named == {str(path.relative_to(BENCHMARKS)) for path in SCRIPTS}


def test_the_first_screen_has_the_six_pages() -> None:
    """The benchmarks' README begins with six pages, all of which exist."""
    first = (
        (BENCHMARKS / "README.md").read_text().partition("What these pages rest on")[0]
    )
    pages = re.findall(r"^\| \[(\w+)\]\((results/\1\.md)\)", first, re.M)
    assert len(pages) == 6
    assert all((BENCHMARKS / path).exists() for _, path in pages)


def test_a_frozen_answer_can_be_looked_up() -> None:
    """Every answer names a page and a commit, and Git has this page at this commit."""
    _, *answers = re.split("^### ", (BENCHMARKS / "answers.md").read_text(), flags=re.M)
    named = re.compile(r"`([\w.]+\.md)`\s+(?:at|of)\s+([0-9a-f]{8})")
    rows = [row for answer in answers for row in named.findall(answer)]
    assert [each.partition("\n")[0] for each in answers if not named.search(each)] == []
    git = ["git", "-C", str(BENCHMARKS), "cat-file", "-e"]
    if subprocess.run([*git, "HEAD"], check=False).returncode:
        pytest.skip("no clone with its history")
    for page, commit in rows:
        folder = "" if page == "CHANGELOG.md" else "benchmarks/results/"
        subprocess.run([*git, f"{commit}:{folder}{page}"], check=True)


# --- what is read from runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 0.25])
def test_an_exponent_is_found(exponent: float) -> None:
    """If best learning rates follow a power of the rank, this power is found, with a narrow interval."""
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


def test_half_a_grid_is_not_shown(tmp_path: Path) -> None:
    """Runs of a cell are read only when its grid is complete."""
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


def test_a_law_of_two_rates_is_not_compared() -> None:
    """A law that gives A and B different learning rates is an error, because the sweeps have one for both."""
    octaves = moving.octaves.__wrapped__  # without the cache, which other tests share
    assert octaves("language", "Init[A], s = 1", 64, ra.MuA()) == pytest.approx(
        -1.12, abs=0.01
    )
    with pytest.raises(DomainError, match="compare laws of one"):
        octaves("language", "Init[A], s = 1", 16, ra.LoRAPlus(16.0))


def test_a_domains_widths_are_its_networks() -> None:
    """The widths of every task equal those in the recipes, which were read from the networks."""
    recipes = [
        ra.Recipe.load(p)
        for p in sorted((BENCHMARKS.parent / "recipes").glob("*.toml"))
    ]
    known = {
        (recipe.reference.init, recipe.reference.fan_in): recipe.full_fan_in
        for recipe in recipes
    }
    for name in STUDY:
        mean, largest = get_domain(name).widths
        assert (known["A", mean], known["B", mean]) == (largest, mean)


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
    """The best learning rate is the vertex of a parabola, the lowest run beside a cliff, or None at an end."""
    found = best_rate(
        dict(zip((-6.0, -5.0, -4.0, -3.0), losses, strict=False)), start=0.7
    )
    assert found == (None if best is None else pytest.approx(best, abs=1e-3))


def test_regret_is_a_share_of_the_gain() -> None:
    """Regret is 0 at the best learning rate, and elsewhere (loss - best) / (start - best)."""
    cell = ("language", "Init[A], s = 1", 4)
    done = {**bowl(4, -6.0), job(FULL, 0.0, 0, START): 2.0}
    assert lost(done, cell, cell, -6.0) == 0.0
    assert lost(done, cell, cell, -5.0) == pytest.approx(0.1)
    # the value of the parabola itself
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
    """The curve of regret goes through every run, and is flat outside the learning rates tried."""
    assert regret_between({-6.0 + i: y for i, y in enumerate(ys)}, x) == pytest.approx(
        expected
    )


@given(st.lists(st.floats(0, 3), min_size=2, max_size=8), st.floats(0, 1), st.data())
def test_the_curve_between_two_runs_stays_between_them(
    ys: list[float], share: float, data: Any
) -> None:
    """Between two runs, the curve is never lower or higher than both of them."""
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
    """The cliff is interpolated linearly, lies half way to a diverged run, and is None if no run
    loses a tenth.
    """
    tried = {-8.0: 1.7, -7.0: 1.4, -6.0: 1.0} | {
        -5.0 + i: 1.0 + loss for i, loss in enumerate(above)
    }
    assert cliff_of(tried, -6.0, start=2.0) == (
        None if expected is None else pytest.approx(expected)
    )


def test_the_noise_floor_is_what_the_others_choice_loses_on_a_seed() -> None:
    """The noise floor is the mean loss on a seed of the learning rate that the other seeds choose."""
    cell = ("language", "Init[A], s = 1", 4)
    losses = {-7.0: (1.5, 1.5, 1.0), -6.0: (1.0, 1.0, 1.4), -5.0: (1.6, 1.6, 1.8)}
    done = {
        job(4, x, seed): loss
        for x, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    } | untrained(2.0)
    # Seeds 0 and 2 have summed losses of 2.4 at -6 and 2.5 at -7, so every choice is -6. On seed 2
    # this choice loses 0.4 of a gain of 1.
    assert noise_floor(done, cell) == pytest.approx(0.4 / 3)
    assert (
        noise_floor({run: loss for run, loss in done.items() if run.seed == 0}, cell)
        is None
    )
    # A learning rate between those of the sweep is best on seed 0. The other seeds choose only among
    # those of the sweep, so their choice loses on seed 0.
    beside = {job(4, -6.5, seed): 0.0 if seed == 0 else 3.0 for seed in range(3)}
    assert noise_floor(done | beside, cell) == pytest.approx((1.0 / 2.0 + 0.4) / 3)


def test_a_grid_grows_until_its_best_lies_inside(tmp_path: Path) -> None:
    """A grid whose best learning rate is at an end grows by octaves until it is inside."""
    cell = ("language", "Init[A], s = 1", 4)
    grid = Grid([cell], {cell[1]: range(-13, -8, 2)}, seeds=1, half=1)
    complete(
        grid, lambda one: abs(one.x + 6.0), tmp_path / "s.jsonl", 1, lambda text: None
    )
    xs = sorted({one.x for one in read(tmp_path / "s.jsonl")})
    assert -6 in xs
    assert max(xs) == -5


def test_the_tables_pool_domains_and_keep_settings_apart() -> None:
    """A row has one score for each setting, over the conversions of all tasks together."""
    keep = "one rate everywhere"
    moved = [
        Moved("language", "Init[A], s = 1", keep, (0.01, 0.02), (0.5,)),
        Moved("reinforcement", "Init[A], s = 1", keep, (0.09,), (0.1,)),
        Moved("language", "Init[B], s = 1", keep, (0.03, 0.03), (0.0,)),
        Moved("language", "Init[A], s = 1", "a way nobody compares", (9.0,), (9.0,)),
    ]
    rows = by_setting(moved).splitlines()[2:]
    scores = {row.split(" | ")[0]: row for row in rows}
    lora, to_full = "4.0 / 8.3 / 33 | –", "30.0 / 48.0 / 100"
    at_b = "3.0 / 3.0 / 0 | 0.0 / 0.0 / 0"
    assert (
        scores["| the rate unchanged"]
        == f"| the rate unchanged | {lora} | {to_full} | {at_b} |"
    )
    assert scores["| the default law"] == "| the default law" + " | –" * 5 + " |"


@given(st.floats(-9.9, -2.1), st.floats(0.5, 3.0), st.floats(-10.0, -2.0))
def test_what_is_run_between_the_octaves_counts_for_every_row(
    x: float, loss: float, asked: float
) -> None:
    """A run between the octaves of a sweep changes the curve and the lowest loss, but not the
    sweep's best rate.

    Regret is never below zero.
    """
    cell = ("language", "Init[A], s = 1", 4)
    swept = {**bowl(4, -6.0), **untrained(4.0)}
    done = {**swept, job(4, x): loss}
    best, start = regret.best_and_start(done, cell, cell)
    if x != round(x):
        assert best == min(loss, 1.0)
        assert lost(done, cell, cell, x) == pytest.approx(
            (loss - best) / (start - best)
        )
        assert regret.best_at(done, cell) == regret.best_at(swept, cell)
    assert lost(done, cell, cell, asked) >= 0.0


def test_a_readme_keeps_what_stands_around_the_tables(tmp_path: Path) -> None:
    """New tables replace the old ones between their marks, and the rest of the README stays as it was."""
    readme = tmp_path / "README.md"
    text = "before\n<!-- one -->\nold\n<!-- end of one -->\nafter\n"
    others = "<!-- two -->\nkept\n<!-- end of two -->\n"
    readme.write_text(text + others)
    publish(readme, "one", "new")
    publish(readme, "one", "newer")
    assert readme.read_text() == text.replace("\nold\n", "\n\nnewer\n\n") + others
    with pytest.raises(DomainError, match="lacks <!-- three -->"):
        publish(readme, "three", "new")
    assert "newer" in readme.read_text()
